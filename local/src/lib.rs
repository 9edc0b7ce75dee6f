//! The whole edge on one machine, without AWS.

pub mod agents;
pub mod calendar;
pub mod chaos;
pub mod clock;
pub mod connections;
pub mod counters;
pub mod lambda;
pub mod latency;
pub mod public;
