//! The beginning of a body, as far as it is kept.

use bytes::Bytes;

/// What is kept lies in blocks of this size. Memory that is taken and given back in equal pieces does not break
/// into ones that are of no use; in blocks four times as large, bodies of all sizes took a quarter more than they are.
const BLOCK_BYTES: usize = 4 * 1024;

/// A body of which the beginning is kept. A clone shares all blocks but the last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept {
    /// How many bytes have passed.
    size: u64,
    /// Something has not been kept, and so nothing behind it is.
    closed: bool,
    full: Vec<Bytes>,
    last: Vec<u8>,
}

impl Kept {
    /// Nothing, yet.
    pub(crate) const EMPTY: Self = Self { size: 0, closed: false, full: Vec::new(), last: Vec::new() };

    /// All of a body that is there at once; more than `limit` bytes of it are not kept.
    pub(crate) fn whole(bytes: &[u8], limit: usize) -> Self {
        let mut kept = Self::default();
        kept.push(bytes, limit);
        kept
    }

    /// The beginning of a body of which somebody else kept no more, and `size` bytes are said to have passed.
    pub(crate) fn beginning(bytes: &[u8], size: u64, limit: usize) -> Self {
        let mut kept = Self::whole(bytes, limit);
        kept.size = kept.size.max(size);
        kept.closed = true;
        kept
    }

    /// Takes what has passed, and keeps what is within `limit`.
    pub(crate) fn push(&mut self, piece: &[u8], limit: usize) {
        self.size += piece.len() as u64;
        if self.closed {
            return;
        }
        let room = limit.saturating_sub(self.len());
        self.closed = room < piece.len();
        let mut rest = &piece[..room.min(piece.len())];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(BLOCK_BYTES - self.last.len()));
            if self.last.capacity() == 0 {
                self.last.reserve_exact(if later.is_empty() { now.len() } else { BLOCK_BYTES });
            } else if self.last.capacity() < self.last.len() + now.len() {
                self.last.reserve_exact(BLOCK_BYTES - self.last.len());
            }
            self.last.extend_from_slice(now);
            if self.last.len() == BLOCK_BYTES {
                self.full.push(std::mem::take(&mut self.last).into());
            }
            rest = later;
        }
    }

    /// How many bytes have passed.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes are kept.
    pub(crate) fn len(&self) -> usize {
        self.full.len() * BLOCK_BYTES + self.last.len()
    }

    /// Whether there was more of it than is kept.
    pub(crate) const fn is_cut(&self) -> bool {
        self.closed
    }

    /// How much memory it takes.
    pub(crate) const fn weight(&self) -> usize {
        self.full.len() * (BLOCK_BYTES + 64) + self.last.capacity()
    }

    /// What is kept, in one piece.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.range(0..self.len())
    }

    /// What is kept of a part of the body.
    pub(crate) fn range(&self, part: std::ops::Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(part.len().min(self.len()));
        let blocks = self.full.iter().map(|block| &block[..]).chain([&self.last[..]]);
        for (number, block) in blocks.enumerate() {
            let begin = number * BLOCK_BYTES;
            let from = part.start.saturating_sub(begin).min(block.len());
            let to = part.end.saturating_sub(begin).min(block.len());
            bytes.extend_from_slice(block.get(from..to).unwrap_or_default());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_kept_is_the_beginning(
            pieces in proptest::collection::vec(0usize..40_000, 0..12), limit in 0usize..120_000,
            from in 0usize..100_000, len in 0usize..50_000,
        ) {
            let mut all = Vec::new();
            let mut kept = Kept::default();
            for (number, len) in pieces.into_iter().enumerate() {
                let piece: Vec<u8> = (0..len).map(|at| (at * 31 + number) as u8).collect();
                kept.push(&piece, limit);
                all.extend(piece);
            }
            let wanted = &all[..all.len().min(limit)];
            prop_assert_eq!(kept.to_vec(), wanted);
            prop_assert_eq!((kept.size(), kept.len()), (all.len() as u64, wanted.len()));
            prop_assert_eq!(kept.is_cut(), all.len() > limit);
            let part = from.min(wanted.len())..(from + len).min(wanted.len());
            prop_assert_eq!(kept.range(from..from + len), wanted.get(part).unwrap_or_default());
            prop_assert!(kept.weight() <= kept.len() + BLOCK_BYTES + 64 * (kept.len() / BLOCK_BYTES));
        }
    }
}
