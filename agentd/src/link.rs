//! The connections to the edge: how one is dialled, written and kept in service, and when the next takes
//! its place.

pub(crate) mod connection;
pub(crate) mod deliveries;
pub(crate) mod dial;
mod known;
pub(crate) mod refusal;
pub(crate) mod rotation;
mod tokens;
pub(crate) mod websocket;
