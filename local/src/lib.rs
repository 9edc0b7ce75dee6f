//! The whole edge on one machine, without AWS.

pub mod lambda;
