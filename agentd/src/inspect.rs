//! The inspector: what was captured, for a page, for programs and for the terminal; and sending it again.
//!
//! Enters: HTTP over loopback and over the control socket. Leaves: pages, JSON as `docs/inspector-api.yaml` has it,
//! requests to the upstream of the tunnel that they were for. What is secret is hidden here, when it is shown or
//! exported, and not where it is captured: what is sent again is the whole of it.

pub(crate) mod api;
pub(crate) mod curl;
pub(crate) mod decode;
pub(crate) mod diff;
pub(crate) mod events;
pub(crate) mod filter;
pub(crate) mod har;
pub(crate) mod page;
pub(crate) mod redact;
pub(crate) mod replay;
pub(crate) mod screen;
pub(crate) mod server;
pub(crate) mod shape;
pub(crate) mod signature;
