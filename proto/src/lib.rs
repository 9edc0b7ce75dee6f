//! The tunnel's protocol: what an agent and the edge say to each other, and every rule about it.
//!
//! This crate is pure. It opens no socket, asks for no time, reads no environment and draws no
//! random number: callers pass all of that in. What both sides must agree on lives here and
//! nowhere else: the [`message`] formats, the signed [`token`], the numbering and reassembly of
//! body [`chunk`]s with their credit, the [`error`] table, the [`limits`] with their sources, which
//! HTTP [`header`]s travel, the reconnect [`backoff`] the agent's [`session`] over time, and
//! the messages of a public WebSocket over the link ([`socket`]), what is kept for later ([`delivery`]), and
//! how a point in time ([`calendar`]) and a long text ([`json`]) are written.
//!
//! It does not know HTTP clients, AWS, configuration files or logs.

pub mod backoff;
pub mod body;
pub mod calendar;
pub mod chunk;
pub mod delivery;
pub mod error;
pub mod forwarded;
pub mod header;
pub mod id;
pub mod json;
pub mod limits;
pub mod message;
pub mod prefix;
pub mod problem;
pub mod session;
pub mod socket;
pub mod target;
pub mod token;
