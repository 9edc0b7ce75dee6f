//! The edge's hands: everything that talks to AWS, and nothing else.
//!
//! This is the only crate that names an AWS SDK. It knows the [`registry`] of tunnels and connections, the
//! [`revocation`] list, the [`agent_link`] to a connected agent (all three are [`admission`]), the [`mailbox`]es through which answers
//! come back, the [`workflow`] of one public request, the [`deliveries`] that are kept for later, and the [`limit`]s of owners and tunnels. What to do
//! with them is decided in the functions.
//!
//! [`config`] reads the environment of a function, [`event`] is what API Gateway hands to the functions
//! behind the agents' WebSocket API, [`runtime`] is what they run on, [`connections`] is how they
//! speak HTTP, [`telemetry`] is how a function logs,
//! and [`metrics`] is what it tells the dashboard. [`caretaker`] looks after the mailboxes for `sweep`, [`fleet`] has
//! `relay` run or sleep.

pub mod admission;
pub mod agent_link;
pub mod aws;
mod call;
pub mod caretaker;
pub mod config;
pub mod connections;
mod connector;
pub mod deliveries;
pub mod event;
pub mod fleet;
pub mod function;
pub mod limit;
pub mod mailbox;
pub mod metrics;
pub mod registry;
pub mod revocation;
pub mod runtime;
pub mod signature;
pub mod telemetry;
mod wire;
pub mod workflow;

/// Why AWS did not do what was asked, by what a caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// AWS is short of capacity for this account now; the call had no effect.
    #[error("{call} was throttled")]
    Throttled {
        /// The API call.
        call: &'static str,
    },
    /// AWS refuses the content; trying again cannot help.
    #[error("{call} refused its input: {source}")]
    Refused {
        /// The API call.
        call: &'static str,
        /// What AWS said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What a run of Step Functions has to tell apart: it is told this name.
    #[error("{name}")]
    Named {
        /// The name.
        name: &'static str,
    },
    /// The call was sent, or may have been, and nobody knows what became of it: its connection broke or it took too long.
    #[error("{call} was not answered: {source}")]
    Unanswered {
        /// The API call.
        call: &'static str,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Anything else: permission, no connection, a fault of AWS.
    #[error("{call} failed: {source}")]
    Failed {
        /// The API call.
        call: &'static str,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Seconds since 1970 on this machine's clock.
#[must_use]
pub fn unix_now() -> u64 {
    unix_now_ms() / 1000
}

/// Milliseconds since 1970 on this machine's clock.
#[must_use]
pub fn unix_now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
