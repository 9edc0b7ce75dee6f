//! How a person or a service manager runs the agent: control socket, diagnosis, reload, systemd, the
//! background, installation, manual.

pub(crate) mod background;
pub(crate) mod control;
pub(crate) mod diagnose;
pub(crate) mod reference;
pub(crate) mod reload;
pub(crate) mod service;
pub(crate) mod systemd;
