//! Exit codes that scripts and systemd units may rely on.

/// Something failed while it ran.
pub(crate) const RUNTIME: u8 = 1;

/// The edge cannot be reached.
pub(crate) const EDGE_UNREACHABLE: u8 = 69;

/// The edge refuses the token, or all of the tunnels.
pub(crate) const IDENTITY_REFUSED: u8 = 77;

/// The configuration is not valid.
pub(crate) const BAD_CONFIG: u8 = 78;

/// The command is not understood.
pub(crate) const USAGE: u8 = 2;
