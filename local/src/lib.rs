//! The whole edge on one machine, without AWS.

pub mod agents;
pub mod aws;
pub mod calendar;
pub mod chaos;
pub mod clock;
pub mod connections;
pub mod counters;
pub mod dynamodb;
pub mod lambda;
pub mod latency;
pub mod public;
pub mod services;
pub mod sqs;
pub mod states;
