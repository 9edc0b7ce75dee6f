//! What the public connections of one process hold together: messages of WebSockets that have not come to their end, and
//! bodies that may be kept for later.
//!
//! Each direction of a WebSocket, and each such body, has a [`Share`], which may hold [`FREE_BYTES`] of its own. What is more comes out of one
//! [`Budget`] for all of them, so that whoever begins long messages and never ends them, or never takes them, cannot take
//! the memory of the others.

use std::{cell::Cell, rc::Rc};

/// How many bytes each [`Share`] may hold beside the budget.
pub const FREE_BYTES: usize = 64 * 1024;

/// So many bytes for all.
#[derive(Debug)]
pub struct Budget {
    most: usize,
    held: Cell<usize>,
}

impl Budget {
    /// Of `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Rc<Self> {
        Rc::new(Self { most, held: Cell::new(0) })
    }

    /// A share that holds nothing.
    #[must_use]
    pub fn share(self: &Rc<Self>) -> Share {
        Share { budget: Rc::clone(self), taken: 0 }
    }
}

/// What one of them holds. Given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Rc<Budget>,
    /// How many bytes of the budget.
    taken: usize,
}

impl Share {
    /// From now on it holds so many bytes. Where the budget has not as many it holds what it held, and the answer is
    /// false.
    #[must_use]
    pub fn hold(&mut self, bytes: usize) -> bool {
        let taken = bytes.saturating_sub(FREE_BYTES);
        let others = self.budget.held.get() - self.taken;
        if taken > self.taken && others + taken > self.budget.most {
            return false;
        }
        self.budget.held.set(others + taken);
        self.taken = taken;
        true
    }

    /// Whether it holds more than what is free.
    #[must_use]
    pub const fn is_of_budget(&self) -> bool {
        self.taken > 0
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.held.set(self.budget.held.get() - self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_hold_no_more_together_than_the_budget_and_what_is_free() {
        let budget = Budget::new(100);
        let (mut one, mut other) = (budget.share(), budget.share());
        assert!(one.hold(FREE_BYTES) && !one.is_of_budget());
        assert!(one.hold(FREE_BYTES + 60) && one.is_of_budget());
        assert!(!other.hold(FREE_BYTES + 41), "one past it");
        assert!(other.hold(FREE_BYTES + 40), "just what is left");
        assert!(!one.hold(FREE_BYTES + 61));
        assert!(
            one.hold(FREE_BYTES + 59) && other.hold(FREE_BYTES + 41),
            "what one gives back another takes"
        );
        drop(one);
        assert!(other.hold(FREE_BYTES + 100) && !other.hold(FREE_BYTES + 101));
        // Holding less is never refused.
        assert!(other.hold(0) && !other.is_of_budget());
    }
}
