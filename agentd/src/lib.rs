//! The daemon beside a private service. It keeps a WebSocket to the edge, answers the public requests
//! that arrive on it by calling the configured upstreams, and connects to nothing else.
//!
//! One task owns one thing: [`driver`] the set of connections, `connection` one WebSocket with its
//! session, `link` its writing half, `exchange` one request, `upstream` the connections to one
//! service. All of them run on one thread.

use std::{ffi::OsString, process::ExitCode};

mod access;
mod background;
mod cli;
pub mod config;
mod connection;
mod control;
pub mod credential;
pub mod driver;
pub mod edge_url;
mod exchange;
mod health;
pub mod identity;
mod link;
mod metrics;
mod name;
mod reference;
mod reload;
mod service;
mod status;
mod systemd;
mod telemetry;
mod tunnel;
mod upload;
pub mod upstream;

/// How this program names itself to the edge.
pub const SOFTWARE: &str = concat!("agentd/", env!("CARGO_PKG_VERSION"));

/// Runs `agentd` with `args`, the program's name first, until it is done. No thread exists before it
/// needs one.
pub fn main_with_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    cli::main_with_args(args)
}
