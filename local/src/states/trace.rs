//! What the last runs did: enters each state's begin and end, leaves them for whoever shows a run.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use tokio::time::Instant;

use super::outcome::Outcome;
use crate::clock;

/// How many runs are remembered.
const RUNS: usize = 256;

/// How many states of one run are remembered: the first ones.
const STATES: usize = 256;

/// The last runs, newest last.
#[derive(Debug, Default)]
pub struct Traces {
    runs: Mutex<VecDeque<Arc<Trace>>>,
}

/// One run, perhaps still going.
#[derive(Debug)]
pub struct Trace {
    name: Arc<str>,
    started_ms: u64,
    started: Instant,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    status: RunStatus,
    states: Vec<Span>,
    omitted: u64,
    /// Whether the last of `states` is the one that the run is in.
    inside: bool,
    ended_us: Option<u64>,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RunStatus {
    /// It is still going.
    Running,
    /// It ended with an output.
    Succeeded,
    /// It ended with an error.
    Failed,
    /// It ran out of time.
    TimedOut,
    /// Nobody waited for it any more.
    Cancelled,
}

impl RunStatus {
    /// Where a run stands that ended so.
    pub(super) fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Succeeded(_) => Self::Succeeded,
            Outcome::Failed(_) => Self::Failed,
            Outcome::TimedOut(_) => Self::TimedOut,
        }
    }
}

/// One stay in a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The state's name.
    pub state: Arc<str>,
    /// When the run entered it, in microseconds since the run began.
    pub entered_us: u64,
    /// When the run left it; nothing while it is in it.
    pub exited_us: Option<u64>,
}

/// A copy of a trace at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TraceSnapshot {
    /// The run's name: the request id.
    pub name: Arc<str>,
    /// When it began, in epoch milliseconds.
    pub started_ms: u64,
    /// Where it stands.
    pub status: RunStatus,
    /// How long it took, in microseconds; nothing while it is going.
    pub ended_us: Option<u64>,
    /// The states, in the order in which the run entered them.
    pub states: Vec<Span>,
    /// How many more states the run entered.
    pub omitted: u64,
}

impl Traces {
    /// Begins the trace of a run; the oldest is forgotten.
    #[must_use]
    pub fn begin(&self, name: Arc<str>) -> Arc<Trace> {
        let trace = Arc::new(Trace {
            name,
            started_ms: clock::epoch_ms(),
            started: Instant::now(),
            progress: Mutex::new(Progress {
                status: RunStatus::Running,
                states: Vec::with_capacity(8),
                omitted: 0,
                inside: false,
                ended_us: None,
            }),
        });
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if runs.len() == RUNS {
            runs.pop_front();
        }
        runs.push_back(Arc::clone(&trace));
        trace
    }

    /// The newest run with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<TraceSnapshot> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.iter().rev().find(|trace| &*trace.name == name).map(|trace| trace.snapshot())
    }

    /// All remembered runs, newest first.
    #[must_use]
    pub fn all(&self) -> Vec<TraceSnapshot> {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.iter().rev().map(|trace| trace.snapshot()).collect()
    }
}

impl Trace {
    /// The run entered a state.
    pub fn enter(&self, state: &Arc<str>) {
        let now = self.elapsed_us();
        let mut progress = self.progress();
        progress.inside = progress.states.len() < STATES;
        if progress.inside {
            progress.states.push(Span { state: Arc::clone(state), entered_us: now, exited_us: None });
        } else {
            progress.omitted += 1;
        }
    }

    /// The run left the state it was in.
    pub fn exit(&self) {
        let now = self.elapsed_us();
        let mut progress = self.progress();
        if progress.inside
            && let Some(span) = progress.states.last_mut()
        {
            span.exited_us = Some(now);
        }
        progress.inside = false;
    }

    /// The run ended.
    pub fn end(&self, status: RunStatus) {
        let now = self.elapsed_us();
        self.exit();
        let mut progress = self.progress();
        progress.status = status;
        progress.ended_us = Some(now);
    }

    /// The trace as it is now.
    #[must_use]
    pub fn snapshot(&self) -> TraceSnapshot {
        let progress = self.progress();
        TraceSnapshot {
            name: Arc::clone(&self.name),
            started_ms: self.started_ms,
            status: progress.status,
            ended_us: progress.ended_us,
            states: progress.states.clone(),
            omitted: progress.omitted,
        }
    }

    fn elapsed_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_run_can_be_watched_while_it_goes() {
        let traces = Traces::default();
        let trace = traces.begin("r1".into());
        trace.enter(&"First".into());
        tokio::time::advance(std::time::Duration::from_micros(1500)).await;
        let seen = traces.find("r1").unwrap();
        assert_eq!(seen.status, RunStatus::Running);
        assert_eq!(seen.states, [Span { state: "First".into(), entered_us: 0, exited_us: None }]);
        trace.exit();
        trace.enter(&"Second".into());
        trace.end(RunStatus::Succeeded);
        let seen = traces.find("r1").unwrap();
        assert_eq!(seen.states[0].exited_us, Some(1500));
        assert_eq!((seen.status, seen.ended_us), (RunStatus::Succeeded, Some(1500)));
        assert_eq!(traces.find("r2"), None);
    }

    #[test]
    fn memory_is_bounded() {
        let traces = Traces::default();
        for run in 0..RUNS + 10 {
            let trace = traces.begin(run.to_string().into());
            for _ in 0..STATES + 5 {
                trace.enter(&"S".into());
                trace.exit();
            }
        }
        let all = traces.all();
        assert_eq!(all.len(), RUNS);
        assert_eq!(&*all[0].name, (RUNS + 9).to_string());
        assert_eq!((all[0].states.len(), all[0].omitted), (STATES, 5));
        assert!(traces.find("9").is_none() && traces.find("10").is_some());
    }
}
