//! What the agent says about itself: each part reports here, whoever is asked reads here.

pub(crate) mod access;
pub(crate) mod metrics;
pub(crate) mod status;
pub(crate) mod telemetry;
