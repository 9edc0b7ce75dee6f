//! The real binary between a bare WebSocket edge and a raw-socket upstream.

mod body;
mod breakage;
mod cli;
mod fidelity;
mod lifecycle;
mod limit;
mod stage;
mod transport;
