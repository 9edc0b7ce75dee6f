//! The runs of STANDARD machines: enters what starts, stops and redrives one, leaves each run's state and history.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{
    Machine, StartError,
    interpreter::{Execution, Recorded, Tasks, run_standard},
    journal::{Checkpoint, Event, Journal, Position, Record, failure, text},
    outcome::{Outcome, Status, TaskError},
    tokens::{TaskTokens, tail},
    trace::{RunStatus, Traces},
};
use crate::{
    clock::{self, Clock},
    store::Kept,
};

/// How long after its end a run may be redriven (Step Functions API Reference, "RedriveExecution": 14 days).
const REDRIVABLE: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// How many closed runs are remembered. AWS remembers them for 90 days.
pub(super) const CLOSED: usize = 10_000;

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
    /// When it began last, in epoch milliseconds: at its start or its last redrive.
    began_ms: u64,
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

    /// Begins its history.
    fn begin(&self) {
        let details = json!({ "input": &*self.input, "roleArn": "arn:aws:iam::000000000000:role/local" });
        // A new history has room.
        let _ = self.journal.record("ExecutionStarted", Some(("executionStartedEventDetails", details)));
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
        let at = clock::epoch_seconds();
        self.journal.end(kind, Some(details));
        self.journal.keep(|run| Record::Ended { run, status: Cow::Borrowed(&status), at });
        progress.status = status;
        progress.stopped = Some(at);
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
    /// It is going on, has succeeded, ended more than 14 days ago, or has a full history.
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
#[derive(Debug)]
pub(super) struct Executions {
    runs: Mutex<Runs>,
    kept: Arc<Kept>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Runs {
    by_arn: HashMap<Arc<str>, Arc<StandardRun>>,
    /// The closed ones, oldest first.
    closed: VecDeque<Arc<str>>,
}

/// A run as the store has it.
struct Found {
    machine: String,
    name: String,
    input: String,
    started_ms: u64,
    began_ms: u64,
    redrives: u32,
    events: Vec<Event>,
    checkpoint: Option<Checkpoint>,
    ended: Option<(Status, f64)>,
}

/// What an earlier process has left.
#[derive(Default)]
pub(super) struct Left {
    runs: HashMap<String, Found>,
    /// In the order of their starts.
    order: Vec<String>,
    /// Whose token ends so.
    tokens: HashMap<String, String>,
    /// The closed ones, oldest first.
    closed: Vec<String>,
}

impl Left {
    /// Notes whose the token is that a task waits with.
    fn note_token(&mut self, run: &str, position: &Position) {
        if let Some(token) = position.begun.as_ref().and_then(|begun| begun.token.as_deref()) {
            self.tokens.insert(tail(token).to_owned(), run.to_owned());
        }
    }

    /// Takes one change into account. One of a run that was never started means nothing.
    pub(super) fn add(&mut self, record: Record<'_>) {
        match record {
            Record::Key { .. } => {}
            Record::Started { run, machine, name, input, started_ms, began_ms, redrives } => {
                let found = Found {
                    machine: machine.into_owned(),
                    name: name.into_owned(),
                    input: input.into_owned(),
                    started_ms,
                    began_ms,
                    redrives,
                    events: Vec::new(),
                    checkpoint: None,
                    ended: None,
                };
                self.order.push(run.clone().into_owned());
                self.runs.insert(run.into_owned(), found);
            }
            Record::Event { run, event } => {
                if let Some(found) = self.runs.get_mut(&*run) {
                    found.events.push(event.into_owned());
                }
            }
            Record::Entered { run, checkpoint } => {
                if let Some(position) = &checkpoint.position {
                    self.note_token(&run, position);
                }
                if let Some(found) = self.runs.get_mut(&*run) {
                    found.checkpoint = Some(checkpoint.into_owned());
                }
            }
            Record::At { run, position } => {
                self.note_token(&run, &position);
                if let Some(checkpoint) = self.runs.get_mut(&*run).and_then(|found| found.checkpoint.as_mut())
                {
                    checkpoint.position = Some(position.into_owned());
                }
            }
            Record::Answered { token, answer } => {
                let run = self.tokens.remove(&*token).and_then(|run| self.runs.get_mut(&run));
                let begun = run
                    .and_then(|found| found.checkpoint.as_mut()?.position.as_mut()?.begun.as_mut())
                    .filter(|begun| begun.token.as_deref().is_some_and(|waiting| tail(waiting) == token));
                if let Some(begun) = begun {
                    begun.result = Some(answer.into_owned());
                }
            }
            Record::Ended { run, status, at } => {
                if let Some(found) = self.runs.get_mut(&*run) {
                    found.ended = Some((status.into_owned(), at));
                    self.closed.push(run.into_owned());
                }
            }
            Record::Redriven { run, at_ms } => {
                if let Some(found) = self.runs.get_mut(&*run) {
                    found.ended = None;
                    found.redrives += 1;
                    found.began_ms = at_ms;
                    if let Some(checkpoint) = &mut found.checkpoint {
                        checkpoint.position = None;
                    }
                }
            }
        }
    }
}

impl Executions {
    pub(super) fn new(kept: Arc<Kept>, clock: Clock) -> Self {
        Self { runs: Mutex::default(), kept, clock }
    }

    /// Takes over what an earlier process has left; nothing goes on yet. Runs of machines that are not there any more
    /// are forgotten.
    pub(super) fn take_over(&self, left: Left, machine: impl Fn(&str) -> Option<Arc<Machine>>) {
        let Left { runs: mut found, order, closed, .. } = left;
        let mut runs = self.runs();
        for arn in order {
            let Some(found) = found.remove(&arn) else { continue };
            let Some(machine) = machine(&found.machine) else {
                tracing::warn!(run = arn, "its state machine is not there any more");
                continue;
            };
            let arn: Arc<str> = arn.into();
            let (status, stopped) = match found.ended {
                Some((status, at)) => (status, Some(at)),
                None => (Status::Running, None),
            };
            let run = StandardRun {
                execution: Execution {
                    machine_arn: Arc::clone(&machine.arn),
                    machine_name: Arc::clone(&machine.name),
                    arn: Arc::clone(&arn),
                    name: found.name.into(),
                    started_ms: found.started_ms,
                },
                machine,
                input: found.input.into(),
                journal: Journal::kept(
                    Arc::clone(&arn),
                    Arc::clone(&self.kept),
                    found.events,
                    found.checkpoint,
                ),
                progress: Mutex::new(Progress {
                    status,
                    stopped,
                    redrives: found.redrives,
                    began_ms: found.began_ms,
                    task: None,
                }),
            };
            runs.by_arn.insert(arn, Arc::new(run));
        }
        for arn in closed {
            runs.close(arn.into());
        }
    }

    /// Has the runs go on that an earlier process left open.
    pub(super) fn resume(
        self: &Arc<Self>,
        tasks: &(impl Tasks + Clone + Send + 'static),
        tokens: &Arc<TaskTokens>,
        traces: &Traces,
    ) -> usize {
        let open = |run: &&Arc<StandardRun>| run.progress().status == Status::Running;
        let open: Vec<_> = self.runs().by_arn.values().filter(open).cloned().collect();
        for run in &open {
            // Whoever has a token may answer from here on, also before the run has got there.
            let checkpoint = run.journal.checkpoint();
            let begun = checkpoint.and_then(|checkpoint| checkpoint.position?.begun);
            if let Some(token) = begun.filter(|begun| begun.result.is_none()).and_then(|begun| begun.token) {
                tokens.reserve(&token);
            }
            if run.journal.is_empty() {
                run.begin();
            }
            // It was JSON when the run was started.
            let input = serde_json::from_str(&run.input).unwrap_or_default();
            self.go(run, input, tasks.clone(), traces);
        }
        open.len()
    }

    /// The changes that lead to where all runs are.
    pub(super) fn records(
        &self,
        mut add: impl FnMut(&Record<'_>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let runs = self.runs();
        let is_open = |run: &&Arc<StandardRun>| run.progress().status == Status::Running;
        let closed = runs.closed.iter().filter_map(|arn| runs.by_arn.get(arn));
        for run in closed.chain(runs.by_arn.values().filter(is_open)) {
            let (execution, progress) = (&run.execution, run.progress());
            add(&Record::Started {
                run: Cow::Borrowed(&execution.arn),
                machine: Cow::Borrowed(&execution.machine_arn),
                name: Cow::Borrowed(&execution.name),
                input: Cow::Borrowed(&run.input),
                started_ms: execution.started_ms,
                began_ms: progress.began_ms,
                redrives: progress.redrives,
            })?;
            run.journal.records(&mut add)?;
            if let Some(at) = progress.stopped {
                add(&Record::Ended {
                    run: Cow::Borrowed(&execution.arn),
                    status: Cow::Borrowed(&progress.status),
                    at,
                })?;
            }
        }
        Ok(())
    }

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
            journal: Journal::new(Arc::clone(&execution.arn), Arc::clone(&self.kept)),
            progress: Mutex::new(Progress {
                status: Status::Running,
                stopped: None,
                redrives: 0,
                began_ms: execution.started_ms,
                task: None,
            }),
            execution,
            input: written.into(),
        });
        run.journal.keep(|arn| Record::Started {
            run: arn,
            machine: Cow::Borrowed(&run.execution.machine_arn),
            name: Cow::Borrowed(&run.execution.name),
            input: Cow::Borrowed(written),
            started_ms: run.execution.started_ms,
            began_ms: run.execution.started_ms,
            redrives: 0,
        });
        runs.by_arn.insert(Arc::clone(&run.execution.arn), Arc::clone(&run));
        drop(runs);
        run.begin();
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
        let is_late = progress.stopped.is_some_and(|stopped| {
            clock::epoch_seconds() - stopped > self.clock.scale(REDRIVABLE).as_secs_f64()
        });
        if !progress.status.is_redrivable() || is_late {
            return Err(RunError::ExecutionNotRedrivable);
        }
        let details = json!({ "redriveCount": progress.redrives + 1 });
        run.journal
            .record("ExecutionRedriven", Some(("executionRedrivenEventDetails", details)))
            .map_err(|_| RunError::ExecutionNotRedrivable)?;
        progress.status = Status::Running;
        progress.stopped = None;
        progress.redrives += 1;
        progress.began_ms = clock::epoch_ms();
        run.journal.enter_again();
        run.journal.keep(|arn| Record::Redriven { run: arn, at_ms: progress.began_ms });
        drop(progress);
        self.runs().closed.retain(|closed| **closed != *arn);
        self.go(&run, value, tasks, traces);
        Ok(())
    }

    /// Stops a run; one that has ended stays as it is. Gives the run if this has ended it, and when it ended.
    pub(super) async fn stop(
        &self,
        arn: &str,
        reason: TaskError,
    ) -> Result<(Option<Arc<StandardRun>>, f64), RunError> {
        let run = self.find(arn).ok_or(RunError::ExecutionDoesNotExist)?;
        let task = run.progress().task.take();
        if let Some(task) = task {
            task.abort();
            // Its task token is worth nothing from here on. That it was aborted is no news.
            let _ = task.await;
        }
        let is_stopped = run.end(Status::Aborted(reason));
        if is_stopped {
            self.remember(&run);
        }
        let at = run.standing().stopped.unwrap_or_default();
        Ok((is_stopped.then_some(run), at))
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
        let (clock, redrives) = (self.clock, progress.redrives);
        let gone = Duration::from_millis(clock::epoch_ms().saturating_sub(progress.began_ms));
        let left = clock.scale(run.machine.definition.timeout).saturating_sub(gone);
        let task = tokio::spawn(async move {
            let mut ending = super::Ending { trace: Arc::clone(&trace), status: RunStatus::Cancelled };
            let definition = &going.machine.definition;
            let recorded = Recorded { journal: &going.journal, clock, left, redrives };
            let outcome = run_standard(definition, &going.execution, input, &tasks, &trace, recorded).await;
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

    fn remember(&self, run: &StandardRun) {
        self.runs().close(Arc::clone(&run.execution.arn));
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runs {
    /// Takes a closed run into the list, and forgets the oldest one beyond [`CLOSED`].
    fn close(&mut self, arn: Arc<str>) {
        // It may have been redriven at once.
        if self.by_arn.get(&arn).is_none_or(|run| run.progress().status == Status::Running) {
            return;
        }
        self.closed.push_back(arn);
        while self.closed.len() > CLOSED
            && let Some(oldest) = self.closed.pop_front()
        {
            self.by_arn.remove(&oldest);
        }
    }
}
