//! How long small pieces of one response are gathered before they go out together. Enters: when bytes came from the
//! upstream, which piece was sent and when, and when the edge said that the public client has it. Leaves: a moment.
//!
//! Each message costs several calls at AWS, and an edge that takes 100 ms to bring a piece to the client gains nothing by
//! one every 20 ms. So what comes while the piece before it is still on its way waits for what follows it: until that
//! piece should have arrived, or what is expected within [`limits::CHUNK_GATHER`] has come. What comes after a pause goes at
//! once, and so does what comes so rarely that nothing would join it. On a quick way nothing waits.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use proto::limits;
use tokio::{sync::Notify, time::Instant};

/// What the public client has taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// The last piece of it.
    pub(crate) through: u32,
    /// When the edge's word of that came.
    pub(crate) at: Instant,
}

/// How far a response is: what the exchange that sends it and the connection that it goes out on tell each other.
#[derive(Debug)]
pub(crate) struct Tally {
    /// How many pieces have been handed to the outbox.
    sent: AtomicU32,
    taken: Mutex<Taken>,
    news: Notify,
}

impl Tally {
    /// Of a response of which nothing has been sent.
    pub(crate) fn new() -> Arc<Self> {
        let taken = Mutex::new(Taken { through: 0, at: Instant::now() });
        Arc::new(Self { sent: AtomicU32::new(0), taken, news: Notify::new() })
    }

    /// How many pieces have been sent.
    pub(crate) fn sent(&self) -> u32 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Notes how many pieces have been sent.
    pub(crate) fn set_sent(&self, pieces: u32) {
        self.sent.store(pieces, Ordering::Relaxed);
    }

    /// What the public client has taken, as far as it is known.
    pub(crate) fn taken(&self) -> Taken {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that it has taken the pieces through that one. Word of fewer is late, and no news.
    pub(crate) fn credit(&self, through: u32) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if through > taken.through {
            *taken = Taken { through, at: Instant::now() };
            self.news.notify_one();
        }
    }

    /// Waits for news of what was taken; there may have been some that were seen before. One waits at a time.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost by dropping the future.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }
}

/// The pace of one response.
#[derive(Debug)]
pub(crate) struct Pace {
    /// A piece for which the edge is to send word, and when it was sent.
    awaited: Option<(u32, Instant)>,
    /// How long it takes until the edge's word of a piece comes.
    way: Duration,
    sent_at: Instant,
    came_at: Instant,
    /// How far what comes is apart. What an upstream writes in several goes is not.
    gap: Duration,
}

impl Pace {
    /// The pace of a response of which nothing is known: as if the way were quick.
    pub(crate) const fn new(now: Instant) -> Self {
        Self { awaited: None, way: limits::CHUNK_LINGER, sent_at: now, came_at: now, gap: Duration::ZERO }
    }

    /// Bytes have come from the upstream.
    pub(crate) fn came(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.came_at);
        if gap > limits::CHUNK_LINGER {
            self.gap = gap;
        }
        self.came_at = now;
    }

    /// The piece `seq` has been sent.
    pub(crate) fn sent(&mut self, seq: u32, now: Instant) {
        self.sent_at = now;
        if self.awaited.is_none() && seq > 0 && seq.is_multiple_of(limits::CREDIT_EVERY) {
            self.awaited = Some((seq, now));
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
                self.way = taken.at.saturating_duration_since(sent).max(limits::CHUNK_LINGER);
            }
        }
    }

    /// Until when something that came at `first` waits for what follows it.
    pub(crate) fn due(&self, first: Instant) -> Instant {
        // Nothing is waited for beyond the last that is expected in time; a little late is in time.
        let longest = limits::CHUNK_GATHER + limits::CHUNK_LINGER;
        let wait = match longest.as_micros().checked_div(self.gap.as_micros()) {
            Some(0) => Duration::ZERO,
            Some(joining) => {
                (self.gap * u32::try_from(joining).unwrap_or(1) + limits::CHUNK_LINGER).min(longest)
            }
            None => longest,
        };
        let soonest = self.sent_at + limits::CHUNK_LINGER;
        soonest.max((self.sent_at + self.way).min(first + wait))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt as _;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends `seq`, of which word comes after `way`.
    fn after(pace: &mut Pace, seq: u32, way: Duration) {
        let now = pace.sent_at + 5 * MS;
        pace.sent(seq, now);
        pace.taken(Taken { through: seq, at: now + way });
    }

    /// How long something waits that came `late` after the last piece was sent.
    fn waits(pace: &Pace, late: Duration) -> Duration {
        let first = pace.sent_at + late;
        pace.due(first).saturating_duration_since(first)
    }

    #[test]
    fn what_comes_while_a_piece_is_on_its_way_waits_for_its_arrival_within_bounds() {
        let mut pace = Pace::new(Instant::now());
        assert_eq!(waits(&pace, Duration::ZERO), limits::CHUNK_LINGER);
        assert_eq!(waits(&pace, 2 * MS), Duration::ZERO);
        for (seq, way, late, waiting) in
            [(8, 25, 10, 15), (16, 41, 0, 41), (24, 43, 0, 42), (32, 500, 300, 42), (40, 500, 480, 20)]
        {
            after(&mut pace, seq, way * MS);
            assert_eq!(waits(&pace, late * MS), waiting * MS, "{way} {late}");
        }
        assert_eq!(waits(&pace, 500 * MS), Duration::ZERO, "after a pause");
        after(&mut pace, 48, MS);
        assert_eq!(waits(&pace, Duration::ZERO), limits::CHUNK_LINGER, "the way is quick again");
    }

    #[tokio::test]
    async fn word_is_news_to_whoever_waits_later_and_late_word_is_none() {
        let tally = Tally::new();
        tally.credit(3);
        tally.news().await;
        tally.credit(2);
        assert!(tally.news().now_or_never().is_none());
        assert_eq!(tally.taken().through, 3);
    }

    #[test]
    fn only_word_of_the_very_piece_counts() {
        let mut pace = Pace::new(Instant::now());
        // The head, and a piece for which no word comes.
        after(&mut pace, 0, 25 * MS);
        after(&mut pace, 7, 25 * MS);
        assert_eq!(pace.way, limits::CHUNK_LINGER);
        let now = pace.sent_at;
        pace.sent(8, now);
        pace.sent(16, now + 30 * MS);
        pace.taken(Taken { through: 0, at: now + 10 * MS });
        pace.taken(Taken { through: 16, at: now + 35 * MS });
        assert_eq!(pace.way, limits::CHUNK_LINGER);
        after(&mut pace, 24, 20 * MS);
        assert_eq!(pace.way, 20 * MS);
    }

    /// How many messages `count` events make that come every `interval` over a way of 100 ms, each written in two goes, and
    /// how long the event waits that waits longest.
    fn stream(count: u32, interval: Duration) -> (u32, Duration) {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        pace.sent(0, begun);
        // The first event that has not been sent, and the words that are on their way.
        let (mut next, mut words) = (1, VecDeque::new());
        let (mut seq, mut longest) = (0, Duration::ZERO);
        while next <= count {
            let first = begun + interval * next;
            pace.came(first);
            pace.came(first + MS / 10);
            while let Some(taken) = words.pop_front_if(|taken: &mut Taken| taken.at <= first) {
                pace.taken(taken);
            }
            let due = pace.due(first).max(first);
            longest = longest.max(due - first);
            next += 1;
            while next <= count && begun + interval * next <= due {
                pace.came(begun + interval * next);
                next += 1;
            }
            seq += 1;
            pace.sent(seq, due);
            if seq.is_multiple_of(limits::CREDIT_EVERY) {
                words.push_back(Taken { through: seq, at: due + 100 * MS });
            }
        }
        (seq, longest)
    }

    #[test]
    fn events_of_a_language_model_share_messages_and_rare_ones_never_wait() {
        let (messages, longest) = stream(250, 20 * MS);
        assert!(messages <= 95 && longest <= 42 * MS, "{messages} messages, {longest:?}");
        let (messages, longest) = stream(250, 5 * MS);
        assert!(messages <= 55 && longest <= 42 * MS, "{messages} messages, {longest:?}");
        for interval in [50, 200, 1000] {
            assert_eq!(stream(250, interval * MS), (250, Duration::ZERO), "every {interval} ms");
        }
    }
}
