//! The daemon beside the private service.

pub mod identity;
