//! forwarded.
