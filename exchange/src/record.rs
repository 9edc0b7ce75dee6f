//! What becomes of a request, for the one line that is written about it.

use std::{cell::Cell, time::Duration};

use edge::{
    metrics::{Line, Metric, OUTCOME, outcome},
    unix_now_ms,
};
use proto::id::{RequestId, TunnelName};
use tokio::time::Instant;

/// A message that has lain in its mailbox for as long as this is worth telling about.
const LATE: Duration = Duration::from_secs(1);

/// What becomes of a request.
pub struct Record {
    begun: Instant,
    pub(crate) tunnel: Cell<Option<TunnelName>>,
    pub(crate) outcome: Cell<&'static str>,
    /// From the event to the head of the upstream's response.
    pub(crate) latency: Cell<Option<Duration>>,
    /// The longest that a message for it lay in the mailbox.
    oldest: Cell<Duration>,
}

impl Record {
    /// Begins with the request.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            begun: Instant::now(),
            tunnel: Cell::new(None),
            outcome: Cell::new(outcome::CLIENT_GONE),
            latency: Cell::new(None),
            oldest: Cell::new(Duration::ZERO),
        }
    }

    /// Notes that the head of the response is here.
    pub(crate) fn answered(&self) {
        self.outcome.set(outcome::ANSWERED);
        self.latency.set(Some(self.begun.elapsed()));
    }

    /// Notes a message that was sent then and has just been taken. Clocks that differ make it no younger than new.
    pub(crate) fn taken(&self, sent_ms: Option<u64>) {
        if let Some(sent_ms) = sent_ms {
            self.lay(Duration::from_millis(unix_now_ms().saturating_sub(sent_ms)));
        }
    }

    /// Notes that a message has lain, or has been missing, for so long.
    pub(crate) fn lay(&self, age: Duration) {
        self.oldest.set(self.oldest.get().max(age));
    }

    /// [`Metric::OldestMessage`], where there is something to tell.
    fn late(&self) -> Option<f64> {
        (self.oldest.get() >= LATE).then(|| self.oldest.get().as_secs_f64())
    }

    /// Notes that a WebSocket was opened: its request is answered.
    pub(crate) fn opened(&self) {
        self.outcome.set(outcome::ANSWERED);
    }

    /// Writes the line.
    pub fn write(self, request_id: &RequestId) {
        let mut line = Line::begin();
        line.add(Metric::Requests, 1.0);
        line.member(OUTCOME, self.outcome.get());
        if let Some(latency) = self.latency.get() {
            line.add(Metric::Latency, latency.as_secs_f64() * 1000.0);
        }
        if let Some(age) = self.late() {
            line.add(Metric::OldestMessage, age);
        }
        line.member("request_id", request_id.as_str());
        if let Some(tunnel) = self.tunnel.take() {
            line.member("tunnel_id", tunnel.as_str());
        }
        line.write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_late_from_one_second_on_and_the_oldest_counts() {
        let record = Record::begin();
        assert_eq!(record.late(), None);
        record.taken(None);
        // Another machine's clock.
        record.taken(Some(unix_now_ms() + 60_000));
        record.lay(LATE - Duration::from_millis(1));
        assert_eq!(record.late(), None);
        record.lay(LATE);
        assert_eq!(record.late(), Some(1.0));
        record.lay(Duration::from_secs(30));
        record.lay(Duration::from_secs(2));
        assert_eq!(record.late(), Some(30.0));
        record.taken(Some(unix_now_ms() - 90_000));
        assert!(record.late().is_some_and(|age| (90.0..100.0).contains(&age)));
    }
}
