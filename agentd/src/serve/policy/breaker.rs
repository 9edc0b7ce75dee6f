//! An upstream that fails again and again is left alone for a while, and then tried with one request.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::config::traffic::BreakerRule;

#[derive(Debug, Default)]
struct State {
    /// In a row.
    failures: u32,
    /// Until when nothing is let through.
    open_until: Option<Instant>,
    /// Whether a request is trying the upstream now.
    trying: bool,
}

/// The breaker of one route or of the tunnel's own upstream.
#[derive(Debug)]
pub(crate) struct Breaker {
    rule: BreakerRule,
    state: Mutex<State>,
}

/// A request that was let through. What becomes of it is said with [`Attempt::came_to`]; one that is dropped
/// before says nothing.
#[derive(Debug)]
pub(crate) struct Attempt {
    breaker: Arc<Breaker>,
    is_trial: bool,
}

impl Breaker {
    pub(crate) fn new(rule: BreakerRule) -> Self {
        Self { rule, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request through, or says when to come back.
    pub(crate) fn enter(self: &Arc<Self>, now: Instant) -> Result<Attempt, Duration> {
        let mut state = self.state();
        let is_trial = match state.open_until {
            None => false,
            Some(until) if now < until => return Err(until - now),
            Some(_) if state.trying => return Err(self.rule.retry_after),
            Some(_) => true,
        };
        state.trying |= is_trial;
        Ok(Attempt { breaker: Arc::clone(self), is_trial })
    }
}

impl Attempt {
    /// Notes whether the upstream answered properly.
    pub(crate) fn came_to(self, good: bool, now: Instant) {
        let mut state = self.breaker.state();
        if good {
            // A late success of a request from before says nothing of the upstream now.
            if self.is_trial || state.open_until.is_none() {
                (state.failures, state.open_until) = (0, None);
            }
        } else {
            state.failures = state.failures.saturating_add(1);
            if self.is_trial || state.failures >= self.breaker.rule.open_after {
                state.open_until = Some(now + self.breaker.rule.retry_after);
            }
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.is_trial {
            self.breaker.state().trying = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_after_a_good_trial() {
        let breaker =
            Arc::new(Breaker::new(BreakerRule { open_after: 3, retry_after: Duration::from_secs(10) }));
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let ask = |secs, good| breaker.enter(at(secs)).map(|attempt| attempt.came_to(good, at(secs)));
        for good in [false, false, true, false, false] {
            ask(0, good).unwrap();
        }
        ask(1, false).unwrap();
        assert_eq!(ask(2, true).unwrap_err(), Duration::from_secs(9));
        let trial = breaker.enter(at(11)).unwrap();
        assert_eq!(breaker.enter(at(11)).unwrap_err(), Duration::from_secs(10), "one tries at a time");
        trial.came_to(false, at(12));
        assert_eq!(ask(13, true).unwrap_err(), Duration::from_secs(9));
        drop(breaker.enter(at(22)).unwrap());
        ask(22, true).expect("the one that left said nothing");
        for _ in 0..2 {
            ask(23, false).unwrap();
        }
        ask(23, true).expect("closed: it counts from nothing again");
    }

    #[test]
    fn what_was_let_through_before_does_not_close_it() {
        let breaker =
            Arc::new(Breaker::new(BreakerRule { open_after: 1, retry_after: Duration::from_secs(10) }));
        let now = Instant::now();
        let (slow, failing) = (breaker.enter(now).unwrap(), breaker.enter(now).unwrap());
        failing.came_to(false, now);
        slow.came_to(true, now);
        breaker.enter(now).unwrap_err();
    }
}
