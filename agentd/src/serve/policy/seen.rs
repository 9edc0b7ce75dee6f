//! What was seen before, for as long as it would be believed again. Bounded.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

/// How many things are remembered: 110 a second for ten minutes, in about 4 MB. Beyond it the oldest goes, and
/// could be believed a second time.
const MOST: usize = 65_536;

/// The beginning of a keyed hash is enough to know something again: whoever cannot make one cannot make two
/// that are alike.
type Mark = [u8; 16];

/// Marks, each with the Unix time until which it counts.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    until: HashMap<Mark, u64>,
    order: VecDeque<(Mark, u64)>,
}

impl Seen {
    /// Notes the beginning of a keyed hash, and whether it is new.
    pub(crate) fn insert(&mut self, mac: &[u8], now: u64, keep: Duration) -> bool {
        while self.order.front().is_some_and(|&(_, until)| until < now) || self.order.len() >= MOST {
            self.forget_first();
        }
        let mark = mark(mac);
        if self.until.get(&mark).is_some_and(|&until| until >= now) {
            return false;
        }
        let until = now.saturating_add(keep.as_secs());
        self.until.insert(mark, until);
        self.order.push_back((mark, until));
        true
    }

    /// Whether it was noted and still counts.
    pub(crate) fn contains(&self, mac: &[u8], now: u64) -> bool {
        self.until.get(&mark(mac)).is_some_and(|&until| until >= now)
    }

    /// Forgets one, as if it had not been seen.
    pub(crate) fn remove(&mut self, mac: &[u8]) {
        self.until.remove(&mark(mac));
    }

    fn forget_first(&mut self) {
        if let Some((mark, until)) = self.order.pop_front()
            && self.until.get(&mark) == Some(&until)
        {
            self.until.remove(&mark);
        }
    }
}

fn mark(mac: &[u8]) -> Mark {
    let mut mark = Mark::default();
    let len = mac.len().min(mark.len());
    mark[..len].copy_from_slice(&mac[..len]);
    mark
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_known_until_its_time_is_over() {
        let mut seen = Seen::default();
        let keep = Duration::from_secs(10);
        assert!(seen.insert(b"aaaaaaaaaaaaaaaa", 100, keep));
        assert!(!seen.insert(b"aaaaaaaaaaaaaaaa", 110, keep));
        assert!(seen.contains(b"aaaaaaaaaaaaaaaa", 110) && !seen.contains(b"aaaaaaaaaaaaaaaa", 111));
        assert!(seen.insert(b"bbbbbbbbbbbbbbbb", 105, keep));
        assert!(seen.insert(b"aaaaaaaaaaaaaaaa", 111, keep), "its time is over");
        seen.remove(b"aaaaaaaaaaaaaaaa");
        assert!(seen.insert(b"aaaaaaaaaaaaaaaa", 112, keep), "it was taken back");
    }

    #[test]
    fn there_is_an_end_to_memory_and_the_oldest_goes_first() {
        let mut seen = Seen::default();
        for n in 0..=MOST as u128 {
            assert!(seen.insert(&n.to_be_bytes(), 1, Duration::from_secs(100)));
        }
        assert_eq!((seen.until.len(), seen.order.len()), (MOST, MOST));
        assert!(!seen.contains(&0u128.to_be_bytes(), 1) && seen.contains(&1u128.to_be_bytes(), 1));
    }
}
