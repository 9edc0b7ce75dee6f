//! Numbered pieces of a stream: restoring their order, and how many may be under way.
//!
//! Mailboxes deliver at least once and in any order, and invocations of `response` run side by
//! side, so every piece carries a number. Number 0 is the head, 1 the first chunk after it.

use std::collections::BTreeMap;

/// What became of a piece handed to a [`Reassembler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// Kept; it may now be that [`Reassembler::pop`] has something.
    New,
    /// Seen before; dropped.
    Duplicate,
}

/// A piece whose number is further ahead than its sender had credit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("piece {seq} is beyond the window that ends before {end}")]
pub struct BeyondWindow {
    /// The number of the piece.
    pub seq: u32,
    /// The first number outside the window.
    pub end: u32,
}

/// Puts numbered pieces in order and drops duplicates, holding at most a window of them.
#[derive(Debug)]
pub struct Reassembler<T> {
    next: u32,
    window: u32,
    waiting: BTreeMap<u32, T>,
}

impl<T> Reassembler<T> {
    /// A reassembler whose first piece has the number `first` and that takes pieces less than
    /// `window` ahead of the next one due.
    #[must_use]
    pub const fn new(first: u32, window: u32) -> Self {
        Self { next: first, window, waiting: BTreeMap::new() }
    }

    /// Takes a piece in any order.
    ///
    /// # Errors
    ///
    /// [`BeyondWindow`] when the sender ran ahead of its credit; the piece is dropped.
    pub fn push(&mut self, seq: u32, piece: T) -> Result<Accepted, BeyondWindow> {
        if seq < self.next || self.waiting.contains_key(&seq) {
            return Ok(Accepted::Duplicate);
        }
        let end = self.next.saturating_add(self.window);
        if seq >= end {
            return Err(BeyondWindow { seq, end });
        }
        self.waiting.insert(seq, piece);
        Ok(Accepted::New)
    }

    /// The next piece in order, if it has arrived.
    pub fn pop(&mut self) -> Option<(u32, T)> {
        let piece = self.waiting.remove(&self.next)?;
        let seq = self.next;
        self.next += 1;
        Some((seq, piece))
    }

    /// The number of the piece that is due next.
    #[must_use]
    pub const fn next_seq(&self) -> u32 {
        self.next
    }

    /// The lowest number that has not arrived, and whether a higher one has: then it was sent and is
    /// late or lost.
    #[must_use]
    pub fn first_missing(&self) -> (u32, bool) {
        let mut missing = self.next;
        for &seq in self.waiting.keys() {
            if seq > missing {
                return (missing, true);
            }
            missing = seq.saturating_add(1);
        }
        (missing, false)
    }

    /// How many pieces wait for an earlier one.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// The sender's side of a window: which number may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendWindow {
    window: u32,
    through: u32,
}

impl SendWindow {
    /// A window of `window` pieces beyond the head.
    #[must_use]
    pub const fn new(window: u32) -> Self {
        Self { window, through: 0 }
    }

    /// Whether the piece `seq` may be sent now.
    #[must_use]
    pub const fn may_send(&self, seq: u32) -> bool {
        seq <= self.through.saturating_add(self.window)
    }

    /// Takes credit: every piece up to and including `through` has been passed on. Credit that
    /// arrives late or twice changes nothing.
    pub fn credit(&mut self, through: u32) {
        self.through = self.through.max(through);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn window_is_open_at_its_last_piece_and_closed_one_past_it() {
        let mut window = SendWindow::new(4);
        assert!(window.may_send(4) && !window.may_send(5));
        window.credit(3);
        window.credit(1);
        assert!(window.may_send(7) && !window.may_send(8));
    }

    #[test]
    fn a_piece_at_the_end_of_the_window_is_taken_and_one_past_it_is_not() {
        let mut reassembler = Reassembler::new(1, 3);
        assert_eq!(reassembler.push(3, ()), Ok(Accepted::New));
        assert_eq!(reassembler.push(4, ()), Err(BeyondWindow { seq: 4, end: 4 }));
        assert_eq!(reassembler.pop(), None);
        assert_eq!(reassembler.push(1, ()), Ok(Accepted::New));
        assert_eq!(reassembler.pop(), Some((1, ())));
        assert_eq!(reassembler.push(1, ()), Ok(Accepted::Duplicate));
        assert_eq!(reassembler.push(4, ()), Ok(Accepted::New));
    }

    #[test]
    fn a_gap_is_seen_only_between_pieces() {
        let mut reassembler = Reassembler::new(0, 9);
        assert_eq!(reassembler.first_missing(), (0, false));
        reassembler.push(0, ()).unwrap();
        reassembler.push(1, ()).unwrap();
        assert_eq!(reassembler.first_missing(), (2, false), "what waits to be taken is not missing");
        reassembler.push(4, ()).unwrap();
        assert_eq!(reassembler.first_missing(), (2, true));
        while reassembler.pop().is_some() {}
        assert_eq!(reassembler.first_missing(), (2, true));
        reassembler.push(2, ()).unwrap();
        reassembler.push(3, ()).unwrap();
        assert_eq!(reassembler.first_missing(), (5, false));
    }

    proptest! {
        /// Whatever the order, and whatever is delivered twice, what comes out is a gapless prefix,
        /// and all of it once everything has arrived.
        #[test]
        fn order_is_restored(
            total in 1u32..60,
            shuffle in proptest::collection::vec((any::<u16>(), any::<bool>(), any::<bool>()), 60),
        ) {
            let mut deliveries: Vec<(u16, u32)> = Vec::new();
            let mut lost = Vec::new();
            for seq in 0..total {
                let (rank, twice, lose) = shuffle[seq as usize];
                if lose && rank % 5 == 0 { lost.push(seq); continue; }
                deliveries.push((rank, seq));
                if twice { deliveries.push((rank.wrapping_mul(31), seq)); }
            }
            deliveries.sort_unstable();
            let mut reassembler = Reassembler::new(0, total);
            let mut out = Vec::new();
            for (_, seq) in deliveries {
                reassembler.push(seq, seq).unwrap();
                while let Some((at, piece)) = reassembler.pop() {
                    prop_assert_eq!(at, piece);
                    out.push(piece);
                }
            }
            let complete = lost.first().copied().unwrap_or(total);
            prop_assert_eq!(out, (0..complete).collect::<Vec<_>>());
            // A loss shows as soon as anything after it has come.
            let seen = (complete..total).any(|seq| !lost.contains(&seq));
            prop_assert_eq!(reassembler.first_missing(), (complete, seen));
        }
    }
}
