//! The runs of STANDARD machines: enters what starts, stops and redrives one, leaves each run's state and history.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{
    Machine, StartError,
    interpreter::{Execution, Outcome, TaskError, Tasks, run_standard},
    journal::{Journal, failure, text},
    trace::{RunStatus, Traces},
};
use crate::clock;

/// How many closed runs are remembered. AWS remembers them for 90 days.
const CLOSED: usize = 10_000;

/// Where a STANDARD run stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// It is still going.
    Running,
    /// It ended with this output.
    Succeeded(Value),
    /// It ended with this error.
    Failed(TaskError),
    /// It ran out of time.
    TimedOut(TaskError),
    /// Somebody stopped it.
    Aborted(TaskError),
}

impl Status {
    /// The status in the words of Step Functions.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running => "RUNNING",
            Self::Succeeded(_) => "SUCCEEDED",
            Self::Failed(_) => "FAILED",
            Self::TimedOut(_) => "TIMED_OUT",
            Self::Aborted(_) => "ABORTED",
        }
    }

    /// Whether a run that stands there may be redriven.
    fn is_redrivable(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::TimedOut(_) | Self::Aborted(_))
    }
}

/// A STANDARD run.
#[derive(Debug)]
pub struct StandardRun {
    machine: Arc<Machine>,
    execution: Execution,
    input: Box<str>,
    journal: Journal,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    status: Status,
    stopped: Option<f64>,
    redrives: u32,
    task: Option<JoinHandle<()>>,
}

/// A copy of where a run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Where it stands.
    pub status: Status,
    /// When it began, in epoch seconds.
    pub started: f64,
    /// When it ended, in epoch seconds.
    pub stopped: Option<f64>,
    /// How often it was redriven.
    pub redrives: u32,
}

impl StandardRun {
    /// Who the run is.
    #[must_use]
    pub fn execution(&self) -> &Execution {
        &self.execution
    }

    /// What it was started with.
    #[must_use]
    pub fn input(&self) -> &str {
        &self.input
    }

    /// What it has done.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Where it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let progress = self.progress();
        Standing {
            status: progress.status.clone(),
            // Exact: milliseconds of this age are far below what a double holds.
            started: self.execution.started_ms as f64 / 1000.0,
            stopped: progress.stopped,
            redrives: progress.redrives,
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the run, unless it has ended. Returns whether it did.
    fn end(&self, status: Status) -> bool {
        let mut progress = self.progress();
        if progress.status != Status::Running {
            return false;
        }
        let (kind, details) = match &status {
            Status::Running => return false,
            Status::Succeeded(output) => {
                ("ExecutionSucceeded", ("executionSucceededEventDetails", json!({ "output": text(output) })))
            }
            Status::Failed(error) => ("ExecutionFailed", ("executionFailedEventDetails", failure(error))),
            Status::TimedOut(error) => {
                ("ExecutionTimedOut", ("executionTimedOutEventDetails", failure(error)))
            }
            Status::Aborted(error) => ("ExecutionAborted", ("executionAbortedEventDetails", failure(error))),
        };
        self.journal.end(kind, Some(details));
        progress.status = status;
        progress.stopped = Some(clock::epoch_seconds());
        progress.task = None;
        true
    }
}

/// Why a run was not redriven or stopped, under the names of Step Functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// There is no such run.
    #[error("Execution Does Not Exist")]
    ExecutionDoesNotExist,
    /// It is going on, or has succeeded, or its history is full.
    #[error("Execution is not redrivable")]
    ExecutionNotRedrivable,
}

impl RunError {
    /// The error's name in the JSON protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ExecutionDoesNotExist => "ExecutionDoesNotExist",
            Self::ExecutionNotRedrivable => "ExecutionNotRedrivable",
        }
    }
}

/// All STANDARD runs.
#[derive(Debug, Default)]
pub(super) struct Executions {
    runs: Mutex<Runs>,
}

#[derive(Debug, Default)]
struct Runs {
    by_arn: HashMap<Arc<str>, Arc<StandardRun>>,
    /// The closed ones, oldest first; a redriven one may be open again.
    closed: VecDeque<Arc<str>>,
}

impl Executions {
    /// Starts a run, or finds the open one of the same name and input.
    pub(super) fn start(
        self: &Arc<Self>,
        machine: Arc<Machine>,
        execution: Execution,
        input: (&str, Value),
        tasks: impl Tasks + Send + 'static,
        traces: &Traces,
    ) -> Result<Arc<StandardRun>, StartError> {
        let (written, value) = input;
        let mut runs = self.runs();
        if let Some(run) = runs.by_arn.get(&execution.arn) {
            let is_same = *run.input == *written && run.progress().status == Status::Running;
            return if is_same {
                Ok(Arc::clone(run))
            } else {
                Err(StartError::ExecutionAlreadyExists(execution.arn.to_string()))
            };
        }
        let run = Arc::new(StandardRun {
            machine,
            execution,
            input: written.into(),
            journal: Journal::default(),
            progress: Mutex::new(Progress {
                status: Status::Running,
                stopped: None,
                redrives: 0,
                task: None,
            }),
        });
        runs.by_arn.insert(Arc::clone(&run.execution.arn), Arc::clone(&run));
        drop(runs);
        let details = json!({ "input": written, "roleArn": "arn:aws:iam::000000000000:role/local" });
        // A new history has room.
        let _ = run.journal.record("ExecutionStarted", Some(("executionStartedEventDetails", details)));
        self.go(&run, value, tasks, traces);
        Ok(run)
    }

    /// Takes a run up again in the state in which it ended.
    pub(super) fn redrive(
        self: &Arc<Self>,
        arn: &str,
        tasks: impl Tasks + Send + 'static,
        traces: &Traces,
    ) -> Result<(), RunError> {
        let run = self.find(arn).ok_or(RunError::ExecutionDoesNotExist)?;
        let value = serde_json::from_str(&run.input).map_err(|_| RunError::ExecutionNotRedrivable)?;
        let mut progress = run.progress();
        if !progress.status.is_redrivable() {
            return Err(RunError::ExecutionNotRedrivable);
        }
        let details = json!({ "redriveCount": progress.redrives + 1 });
        run.journal
            .record("ExecutionRedriven", Some(("executionRedrivenEventDetails", details)))
            .map_err(|_| RunError::ExecutionNotRedrivable)?;
        progress.status = Status::Running;
        progress.stopped = None;
        progress.redrives += 1;
        drop(progress);
        self.go(&run, value, tasks, traces);
        Ok(())
    }

    /// Stops a run; one that has ended stays as it is.
    pub(super) async fn stop(&self, arn: &str, reason: TaskError) -> Result<f64, RunError> {
        let run = self.find(arn).ok_or(RunError::ExecutionDoesNotExist)?;
        let task = run.progress().task.take();
        if let Some(task) = task {
            task.abort();
            // Its task token is worth nothing from here on. That it was aborted is no news.
            let _ = task.await;
        }
        if run.end(Status::Aborted(reason)) {
            self.remember(&run);
        }
        Ok(run.standing().stopped.unwrap_or_default())
    }

    /// A run that is remembered.
    pub(super) fn find(&self, arn: &str) -> Option<Arc<StandardRun>> {
        self.runs().by_arn.get(arn).cloned()
    }

    /// All remembered runs of a machine, in no order.
    pub(super) fn of(&self, machine_arn: &str) -> Vec<Arc<StandardRun>> {
        let runs = self.runs();
        runs.by_arn.values().filter(|run| *run.execution.machine_arn == *machine_arn).cloned().collect()
    }

    fn go(
        self: &Arc<Self>,
        run: &Arc<StandardRun>,
        input: Value,
        tasks: impl Tasks + Send + 'static,
        traces: &Traces,
    ) {
        let trace = traces.begin(Arc::clone(&run.execution.name));
        let (all, going) = (Arc::clone(self), Arc::clone(run));
        // Held until the task is known, so that a run is never stopped without it.
        let mut progress = run.progress();
        let task = tokio::spawn(async move {
            let mut ending = super::Ending { trace: Arc::clone(&trace), status: RunStatus::Cancelled };
            let definition = &going.machine.definition;
            let outcome =
                run_standard(definition, &going.execution, input, &tasks, &trace, &going.journal).await;
            ending.status = RunStatus::of(&outcome);
            let status = match outcome {
                Outcome::Succeeded(output) => Status::Succeeded(output),
                Outcome::Failed(error) => Status::Failed(error),
                Outcome::TimedOut(error) => Status::TimedOut(error),
            };
            if going.end(status) {
                all.remember(&going);
            }
        });
        progress.task = Some(task);
    }

    /// Takes a closed run into the list, and forgets the oldest one beyond [`CLOSED`].
    fn remember(&self, run: &StandardRun) {
        let mut runs = self.runs();
        runs.closed.push_back(Arc::clone(&run.execution.arn));
        while runs.closed.len() > CLOSED
            && let Some(oldest) = runs.closed.pop_front()
        {
            let is_closed = |run: &Arc<StandardRun>| run.progress().status != Status::Running;
            if runs.by_arn.get(&oldest).is_some_and(is_closed) {
                runs.by_arn.remove(&oldest);
            }
        }
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
