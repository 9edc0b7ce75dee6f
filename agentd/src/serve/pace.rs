//! How long small pieces of one response are gathered before they go out together. Enters: which piece was sent and when,
//! and when the edge said that the public client has it. Leaves: a duration.
//!
//! Each message costs several calls at AWS, and an edge that takes 100 ms to bring a piece to the client gains nothing by
//! one every 20 ms. So what follows a piece at once waits for about as long as an acknowledgement of that would take, and never
//! longer than [`limits::CHUNK_GATHER`]. On a quick way that is nothing, and what comes after a pause is never
//! kept.

use std::time::Duration;

use proto::limits;
use tokio::time::Instant;

/// What the public client has taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// The last piece of it.
    pub(crate) through: u32,
    /// When the edge's word of that came.
    pub(crate) at: Instant,
}

impl Taken {
    /// Nothing, so far.
    pub(crate) fn nothing() -> Self {
        Self { through: 0, at: Instant::now() }
    }
}

/// The pace of one response.
#[derive(Debug)]
pub(crate) struct Pace {
    /// A piece for which the edge is to send word, and when it was sent.
    awaited: Option<(u32, Instant)>,
    gather: Duration,
}

impl Pace {
    /// The pace of a response of which nothing is known: as if the way were quick.
    pub(crate) const fn new() -> Self {
        Self { awaited: None, gather: limits::CHUNK_LINGER }
    }

    /// The piece `seq` has been sent.
    pub(crate) fn sent(&mut self, seq: u32, now: impl FnOnce() -> Instant) {
        if self.awaited.is_none() && seq > 0 && seq.is_multiple_of(limits::CREDIT_EVERY) {
            self.awaited = Some((seq, now()));
        }
    }

    /// The edge has sent word.
    pub(crate) fn taken(&mut self, taken: Taken) {
        if let Some((seq, sent)) = self.awaited
            && taken.through >= seq
        {
            self.awaited = None;
            // Word of a later piece says nothing about this one.
            if taken.through == seq {
                let way = taken.at.saturating_duration_since(sent);
                self.gather = way.clamp(limits::CHUNK_LINGER, limits::CHUNK_GATHER);
            }
        }
    }

    /// How long what follows a piece is gathered, counted from when that was sent.
    pub(crate) const fn gather(&self) -> Duration {
        self.gather
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// What the pace is after `seq` took `way`.
    fn after(pace: &mut Pace, seq: u32, way: Duration) -> Duration {
        let now = Instant::now();
        pace.sent(seq, || now);
        pace.taken(Taken { through: seq, at: now + way });
        pace.gather()
    }

    #[test]
    fn gathers_for_as_long_as_the_way_takes_within_bounds() {
        let mut pace = Pace::new();
        assert_eq!(pace.gather(), limits::CHUNK_LINGER);
        assert_eq!(after(&mut pace, 8, 25 * MS), 25 * MS);
        assert_eq!(after(&mut pace, 16, 39 * MS), 39 * MS);
        assert_eq!(after(&mut pace, 24, 41 * MS), limits::CHUNK_GATHER);
        assert_eq!(after(&mut pace, 32, 500 * MS), limits::CHUNK_GATHER);
        assert_eq!(after(&mut pace, 40, MS), limits::CHUNK_LINGER);
    }

    #[test]
    fn only_word_of_the_very_piece_counts() {
        let mut pace = Pace::new();
        // The head, and a piece for which no word comes.
        assert_eq!(after(&mut pace, 0, 25 * MS), limits::CHUNK_LINGER);
        assert_eq!(after(&mut pace, 7, 25 * MS), limits::CHUNK_LINGER);
        let now = Instant::now();
        pace.sent(8, || now);
        pace.sent(16, || now + 30 * MS);
        pace.taken(Taken { through: 0, at: now + 10 * MS });
        pace.taken(Taken { through: 16, at: now + 35 * MS });
        assert_eq!(pace.gather(), limits::CHUNK_LINGER);
        assert_eq!(after(&mut pace, 24, 20 * MS), 20 * MS);
    }
}
