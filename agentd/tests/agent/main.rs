//! The real binary between a bare WebSocket edge and a raw-socket upstream.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod body;
mod breakage;
mod chromium;
mod cli;
mod connections;
mod delivery;
mod fidelity;
mod inspector;
mod lifecycle;
mod limit;
mod page;
mod sockets;
mod stage;
mod terminal;
mod transport;
