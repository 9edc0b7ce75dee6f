//! The whole edge on one machine, without AWS.

pub mod aws;
pub mod chaos;
pub mod clock;
pub mod connections;
pub mod counters;
pub mod dynamodb;
pub mod latency;
pub mod services;
pub mod sqs;
pub mod states;
