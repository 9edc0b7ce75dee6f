//! The daemon beside a private service. It keeps a WebSocket to the edge, answers the public requests
//! that arrive on it by calling the configured upstreams, and connects to nothing else.
//!
//! The rooms, and the only direction in which they know each other:
//!
//! ```text
//! cli ──► operate ──► supervisor ──► control ──► inspect ──┐
//!            │             └───────► link ─────────────────┴──► serve ──► capture, report ──► identity, config, tls
//!            └── diagnose: link, serve
//! ```
//!
//! One task owns one thing: `supervisor` the set of connections, `link` one WebSocket with its
//! session and its writing half, `serve` one request and the connections to its upstream. All of them
//! run on one thread.

// These end the program where nobody reads what they print: `operate::output` does not.
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::{ffi::OsString, process::ExitCode};

mod apart;
mod capture;
mod cli;
pub mod config;
mod control;
pub mod identity;

mod inspect;
mod link;
mod loopback;
mod operate;
mod random;
mod regular_file;
mod report;
mod resolver;
mod serve;
mod supervisor;
mod timer;
pub mod tls;

/// Runs `agentd` with `args`, the program's name first, until it is done. No thread exists before it
/// needs one.
pub fn main_with_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    cli::main_with_args(args)
}
