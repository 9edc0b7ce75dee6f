//! The commands beside the daemon itself: asking a running agent, diagnosis, the background, installation,
//! manual.

pub(crate) mod ask;
pub(crate) mod background;
pub(crate) mod check;
pub(crate) mod deliveries;
pub(crate) mod diagnose;
pub(crate) mod exit;
pub(crate) mod explain;
pub(crate) mod output;
pub(crate) mod reference;
pub(crate) mod requests;
pub(crate) mod service;
