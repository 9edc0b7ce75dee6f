//! The daemon beside the private service.
