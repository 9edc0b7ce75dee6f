//! How long each hop of the real AWS takes: the one place where a profile of latencies is applied.

use std::time::Duration;

/// One call over the network inside AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// A call to DynamoDB.
    DynamoDb,
    /// A call to SQS; a long poll has it before it begins to wait.
    Sqs,
    /// A post to, or a question about, an agent's connection.
    Connections,
    /// Starting a run.
    StartRun,
}

/// How long hops take. The default takes no time at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Latency {
    extra: Duration,
}

impl Latency {
    /// Adds `extra` to every hop.
    #[must_use]
    pub fn with_extra(extra: Duration) -> Self {
        Self { extra }
    }

    /// How long this hop takes.
    #[must_use]
    pub fn of(&self, _hop: Hop) -> Duration {
        self.extra
    }

    /// Passes the time of one hop.
    pub async fn hop(&self, hop: Hop) {
        let duration = self.of(hop);
        if !duration.is_zero() {
            tokio::time::sleep(duration).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hop_takes_what_was_added() {
        let start = tokio::time::Instant::now();
        Latency::default().hop(Hop::Sqs).await;
        assert!(start.elapsed().is_zero());
        Latency::with_extra(Duration::from_millis(20)).hop(Hop::DynamoDb).await;
        assert_eq!(start.elapsed(), Duration::from_millis(20));
    }
}
