//! Time that may pass faster: enters a duration as AWS defines it, leaves what `local` waits for it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How many times faster the long times of the edge pass: the 10 minutes and 2 hours of a
/// connection, the 15 minutes of a response, a mailbox's lease. Everything shorter keeps its real length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    factor: u32,
}

impl Default for Clock {
    fn default() -> Self {
        Self { factor: 1 }
    }
}

impl Clock {
    /// A clock that runs `factor` times faster; 0 counts as 1.
    #[must_use]
    pub fn new(factor: u32) -> Self {
        Self { factor: factor.max(1) }
    }

    /// How many times faster it runs.
    #[must_use]
    pub fn factor(self) -> u32 {
        self.factor
    }

    /// How long `duration` takes on this clock.
    #[must_use]
    pub fn scale(self, duration: Duration) -> Duration {
        duration / self.factor
    }
}

/// Microseconds since the Unix epoch.
#[must_use]
pub fn epoch_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn epoch_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Seconds since the Unix epoch with their fraction, as AWS writes timestamps in JSON.
#[must_use]
pub fn epoch_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_times_pass_faster() {
        assert_eq!(Clock::default().scale(Duration::from_secs(600)), Duration::from_secs(600));
        assert_eq!(Clock::new(60).scale(Duration::from_secs(600)), Duration::from_secs(10));
        assert_eq!(Clock::new(0).factor(), 1);
    }
}
