//! What the agent says about itself: each part reports here, whoever is asked reads here.

pub(crate) mod access;
pub(crate) mod cause;
pub(crate) mod denial;
mod json;
mod lines;
pub(crate) mod metrics;
pub(crate) mod status;
pub(crate) mod systemd;
pub(crate) mod telemetry;
pub(crate) mod terminal;

/// How this program names itself to the edge.
pub(crate) const SOFTWARE: &str = concat!("agentd/", env!("CARGO_PKG_VERSION"));
