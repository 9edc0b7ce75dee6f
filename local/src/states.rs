//! Step Functions, as much of it as machines with JSONata need: enters a run's input, leaves how the run
//! ended, and what it does meanwhile for whoever looks. EXPRESS runs are waited for; STANDARD ones go on by
//! themselves, keep a history and may wait for task tokens.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use proto::limits;
use serde_json::Value;

use crate::{
    clock::{self, Clock},
    lambda::WeakLambda,
    latency::Hop,
    services::{STATES, Services},
    store::{Filling, Kept, Service, Store},
};

pub mod definition;
pub mod executions;
pub mod interpreter;
pub mod journal;
pub mod jsonata;
pub mod outcome;
pub mod tasks;
pub mod tokens;
pub mod trace;

#[cfg(test)]
mod public_request;
#[cfg(test)]
mod standard;

use definition::{Definition, MachineType};
use executions::{Executions, Left, RunError, StandardRun};
use interpreter::Execution;
use journal::Record;
use outcome::{Outcome, TaskError};
use tasks::{ServiceTasks, Standard};
use tokens::TaskTokens;
use trace::{RunStatus, Trace, TraceSnapshot, Traces};

/// What precedes a machine's name in its ARN.
const MACHINE_ARN: &str = "arn:aws:states:local:000000000000:stateMachine:";

/// Why a run was not started, under the names of Step Functions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// There is no such machine.
    #[error("State Machine Does Not Exist: '{0}'")]
    StateMachineDoesNotExist(String),
    /// The name has a wrong length or alphabet.
    #[error("Invalid Name: '{0}'")]
    InvalidName(String),
    /// The input is not JSON.
    #[error("Invalid State Machine Execution Input: it is not valid JSON")]
    InvalidExecutionInput,
    /// The input is over [`limits::STATE_BYTES`].
    #[error("the input has {0} bytes, more than the limit of 262144")]
    InputTooLarge(usize),
    /// Runs of this machine are started otherwise.
    #[error("This operation is not supported by this type of state machine")]
    StateMachineTypeNotSupported,
    /// A run of this name has another input, or has ended.
    #[error("Execution Already Exists: '{0}'")]
    ExecutionAlreadyExists(String),
}

impl StartError {
    /// The error's name in the JSON protocol.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::StateMachineDoesNotExist(_) => "StateMachineDoesNotExist",
            Self::InvalidName(_) => "InvalidName",
            Self::InvalidExecutionInput => "InvalidExecutionInput",
            Self::InputTooLarge(_) => "ValidationException",
            Self::StateMachineTypeNotSupported => "StateMachineTypeNotSupported",
            Self::ExecutionAlreadyExists(_) => "ExecutionAlreadyExists",
        }
    }
}

/// A run that ended.
#[derive(Debug, Clone, PartialEq)]
pub struct RunResult {
    /// The run's ARN.
    pub execution_arn: Arc<str>,
    /// The run's name.
    pub name: Arc<str>,
    /// When it began, in epoch seconds.
    pub start_date: f64,
    /// When it ended, in epoch seconds.
    pub stop_date: f64,
    /// How it ended.
    pub outcome: Outcome,
}

/// The service.
#[derive(Debug)]
pub struct States {
    services: Arc<Services>,
    machines: RwLock<BTreeMap<Box<str>, Arc<Machine>>>,
    traces: Traces,
    executions: Arc<Executions>,
    tokens: Arc<TaskTokens>,
    lambda: OnceLock<WeakLambda>,
    kept: Arc<Kept>,
}

#[derive(Debug)]
struct Machine {
    arn: Arc<str>,
    name: Arc<str>,
    definition: Definition,
}

/// A run whose input was accepted.
#[derive(Debug)]
pub struct AcceptedRun {
    machine: Arc<Machine>,
    execution: Execution,
    input: Value,
}

impl AcceptedRun {
    /// The run's input.
    #[must_use]
    pub fn input(&self) -> &Value {
        &self.input
    }
}

/// Ends a trace as cancelled when the run's future is dropped.
struct Ending {
    trace: Arc<Trace>,
    status: RunStatus,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.trace.end(self.status);
    }
}

impl States {
    /// A service without machines whose tasks call `services`. The pauses of STANDARD runs, and their times of more than
    /// five minutes, pass on `clock`.
    #[must_use]
    pub fn new(services: Arc<Services>, clock: Clock) -> Self {
        let kept = Arc::new(Kept::new());
        Self {
            services,
            machines: RwLock::default(),
            traces: Traces::default(),
            executions: Arc::new(Executions::new(Arc::clone(&kept), clock)),
            tokens: Arc::new(TaskTokens::new(Arc::clone(&kept))),
            lambda: OnceLock::new(),
            kept,
        }
    }

    /// Takes over the runs of an earlier process, whose changes these are, once the machines are there.
    ///
    /// # Errors
    ///
    /// A change is none of Step Functions'.
    pub fn take_over<'c>(&self, changes: impl Iterator<Item = &'c str>) -> serde_json::Result<()> {
        let mut left = Left::default();
        for change in changes {
            let record: Record<'_> = serde_json::from_str(change)?;
            if let Record::Key { key } = &record {
                self.tokens.set_key(key);
            }
            left.add(record);
        }
        self.executions.take_over(left, |arn| self.machine(arn));
        Ok(())
    }

    /// Writes down where all runs are.
    ///
    /// # Errors
    ///
    /// The file cannot be written, or the system gives no random bytes.
    pub fn fill(&self, file: &mut Filling) -> std::io::Result<()> {
        let key = self.tokens.key().map_err(std::io::Error::other)?;
        file.add(Service::Runs, &Record::Key { key: key.into() })?;
        self.executions.records(|record| file.add(Service::Runs, record))
    }

    /// Keeps every change from here on.
    pub fn keep(&self, store: Arc<Store>) {
        // There is one store.
        drop(self.kept.set(store));
    }

    /// Has the runs go on that an earlier process left open, and tells how many there are.
    pub fn resume(&self) -> usize {
        self.executions.resume(&self.standard_tasks(), &self.tokens, &self.traces)
    }

    fn machine(&self, arn: &str) -> Option<Arc<Machine>> {
        self.machines.read().unwrap_or_else(PoisonError::into_inner).get(arn).cloned()
    }

    /// Takes the functions that STANDARD runs call.
    pub fn serve_functions(&self, lambda: WeakLambda) {
        // A second call changes nothing: there is one set of functions.
        drop(self.lambda.set(lambda));
    }

    /// Adds a machine and returns its ARN. A machine of the same name is replaced.
    pub fn create(&self, name: &str, definition: Definition) -> Arc<str> {
        let arn: Arc<str> = format!("{MACHINE_ARN}{name}").into();
        let machine = Machine { arn: Arc::clone(&arn), name: name.into(), definition };
        let mut machines = self.machines.write().unwrap_or_else(PoisonError::into_inner);
        machines.insert((&*arn).into(), Arc::new(machine));
        arn
    }

    /// Checks what an EXPRESS run is started with.
    ///
    /// # Errors
    ///
    /// What Step Functions refuses.
    pub fn accept(
        &self,
        machine_arn: &str,
        name: Option<&str>,
        input: &str,
    ) -> Result<AcceptedRun, StartError> {
        self.check(MachineType::Express, machine_arn, name, input)
    }

    /// Counts a call of somebody.
    pub(crate) fn count(&self, caller: &str, operation: &str) {
        self.services.counters.record(caller, STATES, operation);
    }

    /// Starts a STANDARD run. The name of an open run with the same input starts nothing: that run is given.
    ///
    /// # Errors
    ///
    /// What Step Functions refuses.
    pub async fn start(
        &self,
        caller: &str,
        machine_arn: &str,
        name: Option<&str>,
        input: &str,
    ) -> Result<Arc<StandardRun>, StartError> {
        self.services.counters.record(caller, STATES, "StartExecution");
        self.services.latency.hop(Hop::StartRun).await;
        let AcceptedRun { machine, execution, input: value } =
            self.check(MachineType::Standard, machine_arn, name, input)?;
        self.executions.start(machine, execution, (input, value), self.standard_tasks(), &self.traces)
    }

    /// Takes a STANDARD run up again in the state in which it failed, ran out of time or was stopped, with the
    /// definition and the input that it had.
    ///
    /// # Errors
    ///
    /// What Step Functions refuses.
    pub fn redrive(&self, execution_arn: &str) -> Result<(), RunError> {
        self.executions.redrive(execution_arn, self.standard_tasks(), &self.traces)
    }

    /// Stops a STANDARD run for a reason. Gives when it ended, in epoch seconds.
    ///
    /// # Errors
    ///
    /// There is no such run.
    ///
    /// # Cancel safety
    ///
    /// A run that is being stopped when the future is dropped does not go on, but need not say that it ended.
    pub async fn stop(&self, execution_arn: &str, reason: TaskError) -> Result<f64, RunError> {
        let (stopped, at) = self.executions.stop(execution_arn, reason).await?;
        if let Some(run) = stopped {
            self.tell_of_stop(&run);
        }
        Ok(at)
    }

    /// What the rule `StoppedDeliveries` of EventBridge does (`resources/sweep.yml`).
    fn tell_of_stop(&self, run: &StandardRun) {
        let Some(lambda) = self.lambda.get().and_then(WeakLambda::upgrade) else { return };
        let event = serde_json::json!({
            "source": "aws.states",
            "detail-type": "Step Functions Execution Status Change",
            "detail": {
                "executionArn": &*run.execution().arn,
                "stateMachineArn": &*run.execution().machine_arn,
                "name": &*run.execution().name,
                "status": "ABORTED",
                "input": run.input(),
                "inputDetails": { "included": true },
            },
        });
        tokio::spawn(async move {
            if let Err(error) = lambda.invoke("sweep", event.to_string().into()).await {
                tracing::warn!(%error, "nobody was told of a run that was stopped");
            }
        });
    }

    /// A STANDARD run, also after its end.
    #[must_use]
    pub fn execution(&self, arn: &str) -> Option<Arc<StandardRun>> {
        self.executions.find(arn)
    }

    /// The STANDARD runs of a machine, newest first.
    #[must_use]
    pub fn executions(&self, machine_arn: &str) -> Vec<Arc<StandardRun>> {
        let mut runs = self.executions.of(machine_arn);
        runs.sort_by(|one, other| {
            let key = |run: &StandardRun| (run.execution().started_ms, Arc::clone(&run.execution().name));
            key(other).cmp(&key(one))
        });
        runs
    }

    /// The tokens that STANDARD runs wait for.
    #[must_use]
    pub fn tokens(&self) -> &TaskTokens {
        &self.tokens
    }

    fn standard_tasks(&self) -> ServiceTasks {
        let standard = Standard { tokens: Arc::clone(&self.tokens), lambda: self.lambda.get().cloned() };
        ServiceTasks::standard(Arc::clone(&self.services), standard)
    }

    fn check(
        &self,
        machine_type: MachineType,
        machine_arn: &str,
        name: Option<&str>,
        input: &str,
    ) -> Result<AcceptedRun, StartError> {
        let machine = self
            .machine(machine_arn)
            .ok_or_else(|| StartError::StateMachineDoesNotExist(machine_arn.to_owned()))?;
        if machine.definition.machine_type() != machine_type {
            return Err(StartError::StateMachineTypeNotSupported);
        }
        let name: Arc<str> = match name {
            Some(name) if is_name(name) => name.into(),
            Some(name) => return Err(StartError::InvalidName(name.chars().take(80).collect())),
            None => format!("run-{:016x}", getrandom::u64().unwrap_or_default()).into(),
        };
        if input.len() > limits::STATE_BYTES {
            return Err(StartError::InputTooLarge(input.len()));
        }
        let input = serde_json::from_str(input).map_err(|_| StartError::InvalidExecutionInput)?;
        let kind = match machine_type {
            MachineType::Express => "express",
            MachineType::Standard => "execution",
        };
        let execution = Execution {
            machine_arn: Arc::clone(&machine.arn),
            machine_name: Arc::clone(&machine.name),
            arn: format!("arn:aws:states:local:000000000000:{kind}:{}:{name}", machine.name).into(),
            name,
            started_ms: clock::epoch_ms(),
        };
        Ok(AcceptedRun { machine, execution, input })
    }

    /// Runs an EXPRESS machine to its end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future cancels the run where it waits.
    pub async fn run(&self, caller: &str, run: AcceptedRun) -> RunResult {
        self.services.counters.record(caller, STATES, "StartSyncExecution");
        let trace = self.traces.begin(Arc::clone(&run.execution.name));
        let mut ending = Ending { trace: Arc::clone(&trace), status: RunStatus::Cancelled };
        let start_date = clock::epoch_seconds();
        self.services.latency.hop(Hop::StartRun).await;
        let tasks = ServiceTasks::new(Arc::clone(&self.services));
        let AcceptedRun { machine, execution, input } = run;
        let outcome = interpreter::run(&machine.definition, &execution, input, &tasks, &trace).await;
        ending.status = RunStatus::of(&outcome);
        RunResult {
            execution_arn: execution.arn,
            name: execution.name,
            start_date,
            stop_date: clock::epoch_seconds(),
            outcome,
        }
    }

    /// The newest run of this name, also while it is going.
    #[must_use]
    pub fn trace(&self, name: &str) -> Option<TraceSnapshot> {
        self.traces.find(name)
    }

    /// The last runs, newest first.
    #[must_use]
    pub fn traces(&self) -> Vec<TraceSnapshot> {
        self.traces.all()
    }
}

/// Whether a run may have this name (Step Functions API Reference, "StartSyncExecution").
fn is_name(name: &str) -> bool {
    let refused = |c: char| c.is_whitespace() || c.is_control() || "<>{}[]?*\"#%\\^|~`$&,;:/".contains(c);
    (1..=80).contains(&name.chars().count()) && !name.contains(refused)
}
