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
    /// The request that is trying the upstream now, and when the next one may, whatever has become of it.
    trial: Option<(u64, Instant)>,
    /// How many there have been.
    trials: u64,
}

impl State {
    /// How long nothing is let through; `None` where the next one is.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let open_until = self.open_until?;
        let until = self.trial.map_or(open_until, |(_, due)| due.max(open_until));
        Some(until.saturating_duration_since(now)).filter(|wait| !wait.is_zero())
    }
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
    /// Its number, if it tries whether the upstream is well again.
    trial: Option<u64>,
}

impl Breaker {
    pub(crate) fn new(rule: BreakerRule) -> Self {
        Self { rule, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says when to come back if nothing is let through now. Takes nobody's turn.
    pub(crate) fn look(&self, now: Instant) -> Result<(), Duration> {
        self.state().wait(now).map_or(Ok(()), Err)
    }

    /// Lets a request through, or says when to come back. A trial has as long as the upstream is left alone: what is slow,
    /// or waits for its client, does not keep everybody else out.
    pub(crate) fn enter(self: &Arc<Self>, now: Instant) -> Result<Attempt, Duration> {
        let mut state = self.state();
        if let Some(wait) = state.wait(now) {
            return Err(wait);
        }
        let trial = state.open_until.is_some().then(|| {
            state.trials += 1;
            state.trial = Some((state.trials, now + self.rule.retry_after));
            state.trials
        });
        Ok(Attempt { breaker: Arc::clone(self), trial })
    }
}

impl Attempt {
    /// Whether it is the trial that is waited for.
    fn is_trial(&self, state: &State) -> bool {
        state.trial.is_some_and(|(number, _)| self.trial == Some(number))
    }

    /// Notes whether the upstream answered properly.
    pub(crate) fn came_to(self, good: bool, now: Instant) {
        let mut state = self.breaker.state();
        let is_trial = self.is_trial(&state);
        if good {
            // A late success of a request from before says nothing of the upstream now.
            if is_trial || state.open_until.is_none() {
                (state.failures, state.open_until) = (0, None);
            }
        } else {
            state.failures = state.failures.saturating_add(1);
            if is_trial || state.failures >= self.breaker.rule.open_after {
                state.open_until = Some(now + self.breaker.rule.retry_after);
            }
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut state = self.breaker.state();
        if self.is_trial(&state) {
            state.trial = None;
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
    fn a_trial_that_comes_to_nothing_in_time_makes_room_for_the_next() {
        let breaker =
            Arc::new(Breaker::new(BreakerRule { open_after: 1, retry_after: Duration::from_secs(10) }));
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        breaker.enter(at(0)).unwrap().came_to(false, at(0));
        for _ in 0..2 {
            breaker.look(at(10)).expect("to look is no trial");
        }
        let slow = breaker.enter(at(10)).unwrap();
        assert_eq!(breaker.look(at(12)).unwrap_err(), Duration::from_secs(8));
        assert_eq!(breaker.enter(at(19)).unwrap_err(), Duration::from_secs(1));
        let next = breaker.enter(at(20)).unwrap();
        breaker.enter(at(20)).unwrap_err();
        drop(slow);
        breaker.enter(at(21)).expect_err("the next one is still on its way");
        next.came_to(true, at(22));
        breaker.enter(at(22)).unwrap();
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
