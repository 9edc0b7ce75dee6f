//! When to try again after a connection was lost: exponential with full jitter, reset only by a
//! connection that proved stable.

use std::time::{Duration, Instant};

/// The first delay's upper bound.
pub const FIRST: Duration = Duration::from_millis(500);

/// No delay is longer than this, so that a recovered edge has everybody back within a minute.
pub const CAP: Duration = Duration::from_secs(30);

/// How long a connection must last to count as stable.
pub const STABLE_AFTER: Duration = Duration::from_secs(60);

/// The schedule of one agent's reconnects.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
    connected_at: Option<Instant>,
}

impl Backoff {
    /// A schedule without failures.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that the edge accepted the connection at `now`.
    pub const fn connected(&mut self, now: Instant) {
        self.connected_at = Some(now);
    }

    /// The delay before the next try, given that the last one failed or was lost at `now`.
    /// `random` is uniform in `[0, 1)`.
    ///
    /// A link that breaks soon after it opened keeps the delays growing: only a stable connection
    /// forgets earlier failures.
    pub fn lost(&mut self, now: Instant, random: f64) -> Duration {
        let stable =
            self.connected_at.take().is_some_and(|at| now.saturating_duration_since(at) >= STABLE_AFTER);
        if stable {
            self.failures = 0;
        }
        let bound = FIRST.saturating_mul(1 << self.failures.min(16)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        bound.mul_f64(random.clamp(0.0, 1.0))
    }

    /// How many times in a row it failed.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn epoch() -> Instant {
        Instant::now()
    }

    #[test]
    fn only_a_stable_connection_resets_the_schedule() {
        let start = epoch();
        let mut backoff = Backoff::new();
        for _ in 0..10 {
            backoff.lost(start, 1.0);
        }
        backoff.connected(start);
        assert_eq!(backoff.lost(start + STABLE_AFTER - Duration::from_millis(1), 1.0), CAP);
        backoff.connected(start);
        assert_eq!(backoff.lost(start + STABLE_AFTER, 1.0), FIRST);
    }

    proptest! {
        #[test]
        fn delays_are_jittered_grow_and_stay_below_the_cap(randoms in proptest::collection::vec(0.0f64..1.0, 1..100)) {
            let now = epoch();
            let mut backoff = Backoff::new();
            let mut bound = FIRST;
            for random in randoms {
                let delay = backoff.lost(now, random);
                prop_assert!(delay <= bound && delay <= CAP);
                bound = (bound * 2).min(CAP);
            }
        }
    }
}
