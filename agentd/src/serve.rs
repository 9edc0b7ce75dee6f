//! One public request on this machine: from the message that brings it to the last word about it.

pub(crate) mod carried;
pub(crate) mod exchange;
pub(crate) mod health;
pub(crate) mod hint;
pub(crate) mod host;
pub(crate) mod origin;
pub(crate) mod outbox;
pub(crate) mod pace;
pub(crate) mod policy;
pub(crate) mod sockets;
pub(crate) mod tunnel;
pub(crate) mod upgrade;
pub(crate) mod upload;
pub(crate) mod upstream;
