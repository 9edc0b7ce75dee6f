//! Runs a state machine: enter a definition, an input and somebody who carries out tasks, leaves
//! how the run ended. Everything a run may not do in AWS ends it here as well.

use std::{borrow::Cow, collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use proto::limits;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    definition::{
        Assign, Catcher, Definition, Jitter, Kind, Next, Period, Resource, SECONDS_MAX, State, Task,
        Template, WAIT_FOR_TASK_TOKEN,
    },
    journal::{Begun, Checkpoint, Journal, Position, failure, text},
    jsonata::{Evaluated, Expression, Scope},
    outcome::{Outcome, TaskError, error_name},
    tokens::PendingTask,
    trace::Trace,
};
use crate::clock::{self, Clock};

/// The most bytes of all variables together (Step Functions: 10 MiB).
const VARIABLES_BYTES: usize = 10 * 1024 * 1024;

/// The most states that one run enters that keeps no history: what 25,000 events would hold, five for a task.
const STATES_PER_RUN: usize = 5000;

/// The longest pause before a task is tried again: longer than any run lasts.
const PAUSE_MAX: Duration = Duration::from_secs(SECONDS_MAX);

/// Carries out the tasks of a run.
pub trait Tasks: Sync {
    /// Carries out one call.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the task's or the run's time is over, or when nobody waits for
    /// the run any more.
    fn call(&self, call: Call<'_>) -> impl Future<Output = Result<Value, TaskError>> + Send;

    /// Gives out the token that a task waits for. There is none for runs that keep no history.
    fn issue_token(&self) -> Option<PendingTask> {
        None
    }

    /// Takes up a token again that an earlier process gave out.
    fn take_up_token(&self, _token: &str) -> Option<PendingTask> {
        None
    }
}

/// One call of a task.
#[derive(Debug)]
pub struct Call<'a> {
    /// The state that calls.
    pub state: &'a str,
    /// What is called.
    pub resource: Resource,
    /// With which arguments.
    pub arguments: Arguments<'a>,
}

/// The evaluated arguments of a call, in the order of the definition.
#[derive(Debug, Default)]
pub struct Arguments<'a>(pub(super) Vec<(&'a str, Evaluated<'a>)>);

impl Arguments<'_> {
    /// One argument.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(key, _)| *key == name).map(|(_, value)| value.get())
    }

    /// One argument that is a string.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }
}

impl Serialize for Arguments<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value.get())))
    }
}

/// Who a run is.
#[derive(Debug, Clone)]
pub struct Execution {
    /// The machine's ARN.
    pub machine_arn: Arc<str>,
    /// The machine's name.
    pub machine_name: Arc<str>,
    /// The run's ARN.
    pub arn: Arc<str>,
    /// The run's name.
    pub name: Arc<str>,
    /// When it began, in epoch milliseconds.
    pub started_ms: u64,
}

/// Runs a machine to its end.
///
/// # Cancel safety
///
/// Dropping the future cancels the run where it waits.
pub async fn run(
    definition: &Definition,
    execution: &Execution,
    input: Value,
    tasks: &impl Tasks,
    trace: &Trace,
) -> Outcome {
    let timeout = definition.timeout;
    go(definition, execution, input, tasks, trace, timeout, None).await
}

/// How a STANDARD run runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recorded<'j> {
    /// Where it writes down what it does.
    pub(super) journal: &'j Journal,
    /// How fast its times pass.
    pub(super) clock: Clock,
    /// How much of its time is left.
    pub(super) left: Duration,
    /// How often it was redriven.
    pub(super) redrives: u32,
}

/// Runs a machine to its end and writes down what happens. A run whose journal names a state goes on there.
///
/// # Cancel safety
///
/// Dropping the future stops the run where it waits.
pub(super) async fn run_standard(
    definition: &Definition,
    execution: &Execution,
    input: Value,
    tasks: &impl Tasks,
    trace: &Trace,
    recorded: Recorded<'_>,
) -> Outcome {
    go(definition, execution, input, tasks, trace, recorded.left, Some(recorded)).await
}

async fn go(
    definition: &Definition,
    execution: &Execution,
    input: Value,
    tasks: &impl Tasks,
    trace: &Trace,
    timeout: Duration,
    recorded: Option<Recorded<'_>>,
) -> Outcome {
    let mut run = Run {
        definition,
        execution,
        execution_input: Arc::new(input),
        variables: BTreeMap::new(),
        tasks,
        trace,
        recorded,
    };
    match tokio::time::timeout(timeout, run.walk()).await {
        Ok(Ok(output)) => Outcome::Succeeded(output),
        Ok(Err(error)) => Outcome::Failed(error),
        Err(_) => Outcome::TimedOut(TaskError::new(error_name::TIMEOUT, "the run took too long")),
    }
}

struct Run<'r, T> {
    definition: &'r Definition,
    execution: &'r Execution,
    execution_input: Arc<Value>,
    variables: BTreeMap<Arc<str>, Value>,
    tasks: &'r T,
    trace: &'r Trace,
    /// What a STANDARD run has beside the rest.
    recorded: Option<Recorded<'r>>,
}

/// Where a state leads, with the next state's input.
enum Step {
    To(usize, Data),
    End(Data),
}

/// A state's input: the run's own input is shared, not copied.
enum Data {
    Shared(Arc<Value>),
    Own(Value),
}

impl Data {
    fn get(&self) -> &Value {
        match self {
            Self::Shared(value) => value,
            Self::Own(value) => value,
        }
    }

    fn into_value(self) -> Value {
        match self {
            Self::Shared(value) => Arc::unwrap_or_clone(value),
            Self::Own(value) => value,
        }
    }
}

/// What the expressions of one state may name.
struct StateScope<'s> {
    variables: &'s BTreeMap<Arc<str>, Value>,
    input: &'s Value,
    result: Option<&'s Value>,
    error_output: Option<&'s Value>,
    execution_input: &'s Value,
    execution: &'s Execution,
    state: &'s str,
    retries: u32,
    token: Option<&'s str>,
    redrives: Option<u32>,
}

impl Scope for StateScope<'_> {
    fn variable(&self, name: &str) -> Option<&Value> {
        self.variables.get(name)
    }

    fn input(&self) -> &Value {
        self.input
    }

    fn result(&self) -> Option<&Value> {
        self.result
    }

    fn error_output(&self) -> Option<&Value> {
        self.error_output
    }

    fn execution_input(&self) -> &Value {
        self.execution_input
    }

    fn context(&self) -> Value {
        let mut context = json!({
            "Execution": {
                "Id": &*self.execution.arn,
                "Name": &*self.execution.name,
                "StartTime": self.execution.started_ms,
            },
            "State": { "Name": self.state, "RetryCount": self.retries },
            "StateMachine": { "Id": &*self.execution.machine_arn, "Name": &*self.execution.machine_name },
        });
        if let Some(token) = self.token {
            context["Task"] = json!({ "Token": token });
        }
        if let Some(redrives) = self.redrives {
            context["Execution"]["RedriveCount"] = redrives.into();
        }
        context
    }
}

impl<T: Tasks> Run<'_, T> {
    async fn walk(&mut self) -> Result<Value, TaskError> {
        let mut data = Data::Shared(Arc::clone(&self.execution_input));
        let mut at = self.definition.start;
        let mut position = None;
        if let Some(checkpoint) = self.recorded.and_then(|recorded| recorded.journal.checkpoint()) {
            at = self.definition.state(&checkpoint.state).ok_or_else(|| {
                let problem = format!("the machine has no state '{}' any more", checkpoint.state);
                TaskError::new(error_name::RUNTIME, problem)
            })?;
            data = Data::Own(checkpoint.input);
            self.variables = checkpoint.variables;
            position = checkpoint.position.map(Box::new);
        }
        let mut entered = 0;
        while entered < STATES_PER_RUN || self.recorded.is_some() {
            entered += 1;
            let state = &self.definition.states[at];
            // Where an earlier process entered it already, the run only goes on.
            if position.is_none() {
                self.enter(state, &data)?;
            }
            self.trace.enter(&state.name);
            let step = self.step(state, data, position.take()).await;
            self.trace.exit();
            let step = step?;
            let (Step::To(_, output) | Step::End(output)) = &step;
            self.record(exited(&state.kind), || {
                ("stateExitedEventDetails", json!({ "name": &*state.name, "output": text(output.get()) }))
            })?;
            match step {
                Step::To(next, output) => {
                    at = next;
                    data = output;
                }
                Step::End(output) => return Ok(output.into_value()),
            }
        }
        Err(TaskError::new(error_name::RUNTIME, "the run entered too many states"))
    }

    /// Writes down that a state is entered, and that the run may be taken up there.
    fn enter(&self, state: &State, data: &Data) -> Result<(), TaskError> {
        let Some(Recorded { journal, .. }) = self.recorded else { return Ok(()) };
        self.record(entered(&state.kind), || {
            ("stateEnteredEventDetails", json!({ "name": &*state.name, "input": text(data.get()) }))
        })?;
        journal.set_checkpoint(Checkpoint {
            state: Arc::clone(&state.name),
            input: data.get().clone(),
            variables: self.variables.clone(),
            position: Some(Position::default()),
        });
        Ok(())
    }

    fn record(
        &self,
        kind: &'static str,
        details: impl FnOnce() -> (&'static str, Value),
    ) -> Result<(), TaskError> {
        self.recorded.map_or(Ok(()), |recorded| recorded.journal.record(kind, Some(details())))
    }

    /// Waits, and writes down until when.
    async fn pause(&self, pause: Duration, retries: &[u32]) {
        let Some(Recorded { journal, clock, .. }) = self.recorded else {
            return tokio::time::sleep(pause).await;
        };
        let pause = clock.scale(pause);
        journal.set_position(|| Position {
            retries: retries.to_vec(),
            until_ms: Some(after(pause)),
            begun: None,
        });
        tokio::time::sleep(pause).await;
    }

    /// Writes down what happened to a task, with what it calls.
    fn record_task(
        &self,
        task: &Task,
        kind: &'static str,
        field: &'static str,
        details: impl FnOnce() -> Value,
    ) -> Result<(), TaskError> {
        self.record(kind, || {
            let mut details = details();
            let arn = task.resource.arn();
            let resource = arn.strip_prefix("arn:aws:states:::").unwrap_or(arn);
            let (service, operation) = resource.rsplit_once(':').unwrap_or((resource, ""));
            let suffix = if task.waits_for_token { WAIT_FOR_TASK_TOKEN } else { "" };
            details["resourceType"] = service.into();
            details["resource"] = format!("{operation}{suffix}").into();
            (field, details)
        })
    }

    async fn step(
        &mut self,
        state: &State,
        input: Data,
        position: Option<Box<Position>>,
    ) -> Result<Step, TaskError> {
        match &state.kind {
            Kind::Task(task) => self.task(state, task, input, position).await,
            Kind::Choice { rules, default } => {
                let scope = self.scope(state, &input, None);
                for rule in rules {
                    if holds(&rule.condition, &scope)? {
                        let (assigned, output) = evaluate(&rule.assign, rule.output.as_ref(), &scope)?;
                        self.assign(assigned)?;
                        return Ok(Step::To(rule.next, output.map_or(input, Data::Own)));
                    }
                }
                let Some(next) = *default else {
                    return Err(TaskError::new(error_name::NO_CHOICE_MATCHED, "no choice matched"));
                };
                let output = self.finish(state, &input, None)?;
                Ok(Step::To(next, output.map_or(input, Data::Own)))
            }
            Kind::Pass(next) => {
                let output = self.finish(state, &input, None)?;
                Ok(go_on(*next, output.map_or(input, Data::Own)))
            }
            Kind::Wait { seconds, next } => {
                match position.and_then(|position| position.until_ms) {
                    Some(until_ms) => tokio::time::sleep(until(until_ms)).await,
                    None => {
                        let pause = {
                            let scope = self.scope(state, &input, None);
                            let value = fill(seconds, &scope)?;
                            let seconds = value.get().as_f64();
                            let seconds =
                                seconds.filter(|seconds| (0.0..=SECONDS_MAX as f64).contains(seconds));
                            seconds.map(Duration::from_secs_f64).ok_or_else(|| {
                                TaskError::new(error_name::QUERY_EVALUATION_ERROR, "Seconds is not a number")
                            })?
                        };
                        self.pause(pause, &[]).await;
                    }
                }
                let output = self.finish(state, &input, None)?;
                Ok(go_on(*next, output.map_or(input, Data::Own)))
            }
            Kind::Succeed => {
                let output = self.finish(state, &input, None)?;
                Ok(Step::End(output.map_or(input, Data::Own)))
            }
            Kind::Fail { error, cause } => {
                let scope = self.scope(state, &input, None);
                let part = |template: &Option<Template>| -> Result<String, TaskError> {
                    let Some(template) = template else { return Ok(String::new()) };
                    match fill(template, &scope)?.get() {
                        Value::String(text) => Ok(text.clone()),
                        _ => Err(TaskError::new(
                            error_name::QUERY_EVALUATION_ERROR,
                            "Error and Cause are strings",
                        )),
                    }
                };
                Err(TaskError { error: Cow::Owned(part(error)?), cause: part(cause)? })
            }
        }
    }

    async fn task(
        &mut self,
        state: &State,
        task: &Task,
        input: Data,
        position: Option<Box<Position>>,
    ) -> Result<Step, TaskError> {
        let mut retries = vec![0_u32; task.retry.len()];
        let mut begun = None;
        if let Some(position) = position {
            for (count, kept) in retries.iter_mut().zip(&position.retries) {
                *count = *kept;
            }
            if let Some(until_ms) = position.until_ms {
                tokio::time::sleep(until(until_ms)).await;
            }
            begun = position.begun.map(Box::new);
        }
        let error = loop {
            match self.attempt(state, task, &input, &retries, begun.take()).await {
                Ok(result) => match self.finish(state, &input, Some(&result)) {
                    Ok(output) => {
                        return Ok(go_on(task.next, Data::Own(output.unwrap_or(result))));
                    }
                    Err(error) => break error,
                },
                Err(error) => {
                    let retrier =
                        task.retry.iter().position(|retrier| matches_any(&retrier.errors, &error.error));
                    let Some(index) = retrier else { break error };
                    let retrier = &task.retry[index];
                    if retries[index] >= retrier.max_attempts {
                        break error;
                    }
                    let delay = retrier.interval.as_secs_f64()
                        * retrier.backoff_rate.powi(i32::try_from(retries[index]).unwrap_or(i32::MAX));
                    let delay = delay.min(retrier.max_delay.map_or(f64::MAX, |max| max.as_secs_f64()));
                    let delay = match retrier.jitter {
                        Jitter::None => delay,
                        Jitter::Full => delay * fraction(),
                    };
                    retries[index] += 1;
                    let delay = Duration::try_from_secs_f64(delay).unwrap_or(PAUSE_MAX).min(PAUSE_MAX);
                    self.pause(delay, &retries).await;
                }
            }
        };
        let Some(catcher) = task.catch.iter().find(|catcher| matches_any(&catcher.errors, &error.error))
        else {
            return Err(error);
        };
        self.caught(state, catcher, &input, error)
    }

    /// One call of a task, until it answers or its time is over.
    async fn attempt(
        &self,
        state: &State,
        task: &Task,
        input: &Data,
        retries: &[u32],
        begun: Option<Box<Begun>>,
    ) -> Result<Value, TaskError> {
        if let Some(recorded) = self.recorded {
            // In a box of its own: a run without a history has no room for it in its future.
            return Box::pin(self.recorded_attempt(recorded, state, task, input, retries, begun)).await;
        }
        let scope = StateScope { retries: retries.iter().sum(), ..self.scope(state, input, None) };
        let call = call(state, task, &scope)?;
        let timeout = period(&task.timeout, &scope)?;
        let result =
            tokio::time::timeout(timeout, self.tasks.call(call)).await.map_err(|_| late(state))??;
        if is_too_large(&result) {
            return Err(too_large(state));
        }
        Ok(result)
    }

    /// One call of a task of a run that keeps a history, until it answers, somebody answers with its token, or its time
    /// is over. One that an earlier process has begun goes on.
    async fn recorded_attempt(
        &self,
        recorded: Recorded<'_>,
        state: &State,
        task: &Task,
        input: &Data,
        retries: &[u32],
        begun: Option<Box<Begun>>,
    ) -> Result<Value, TaskError> {
        let Recorded { journal, clock, .. } = recorded;
        if let Some(result) = begun.as_ref().and_then(|begun| begun.result.clone()) {
            return self.closed(task, result);
        }
        let is_resumed = begun.is_some();
        if is_resumed
            && task.resource == Resource::LambdaInvoke
            && begun.as_ref().is_some_and(|begun| !begun.submitted)
        {
            // The function's process has ended with that of before, and nobody knows how far it came.
            let lost = TaskError::new("Runtime.ExitError", "the function's process ended with its edge");
            return self.closed(task, Err(lost));
        }
        // Each attempt has a token of its own: a late answer to an earlier one means nothing.
        let no_token = || TaskError::new(error_name::RUNTIME, "no task token can be given out");
        let mut pending = match begun.as_ref().and_then(|begun| begun.token.as_deref()) {
            Some(token) => Some(self.tasks.take_up_token(token).ok_or_else(no_token)?),
            None if task.waits_for_token => Some(self.tasks.issue_token().ok_or_else(no_token)?),
            None => None,
        };
        let token = pending.as_ref().map(|pending| pending.token().to_owned());
        let scope = StateScope {
            retries: retries.iter().sum(),
            token: token.as_deref(),
            ..self.scope(state, input, None)
        };
        let (left, mut begun) = match begun {
            Some(begun) => (until(begun.due_ms), *begun),
            None => {
                let timeout = long(clock, period(&task.timeout, &scope)?);
                let heartbeat =
                    task.heartbeat.as_ref().map(|heartbeat| period(heartbeat, &scope)).transpose()?;
                let heartbeat_ms = heartbeat.map(|heartbeat| millis(long(clock, heartbeat)));
                let begun = Begun {
                    token: token.clone(),
                    due_ms: after(timeout),
                    heartbeat_ms,
                    submitted: false,
                    result: None,
                };
                (timeout, begun)
            }
        };
        let at = |begun: &Begun| {
            journal.set_position(|| Position {
                retries: retries.to_vec(),
                until_ms: None,
                begun: Some(begun.clone()),
            });
        };
        let call = if begun.submitted { None } else { Some(call(state, task, &scope)?) };
        if let Some(call) = call.as_ref().filter(|_| !is_resumed) {
            self.record_task(task, "TaskScheduled", "taskScheduledEventDetails", || {
                let parameters = serde_json::to_string(&call.arguments).unwrap_or_default();
                json!({ "region": "local", "parameters": parameters })
            })?;
            self.record_task(task, "TaskStarted", "taskStartedEventDetails", || json!({}))?;
            at(&begun);
        }
        let answered = async {
            if let Some(call) = call {
                let called = self.tasks.call(call).await?;
                if pending.is_none() {
                    return Ok(called);
                }
                begun.submitted = true;
                at(&begun);
                self.record_task(
                    task,
                    "TaskSubmitted",
                    "taskSubmittedEventDetails",
                    || json!({ "output": text(&called) }),
                )?;
            }
            // A task without a token has been called.
            let Some(pending) = &mut pending else { return Err(no_token()) };
            let silence = begun.heartbeat_ms.map_or(left, Duration::from_millis);
            loop {
                let next = tokio::time::timeout(silence, pending.next()).await;
                let silent = |_| {
                    let cause = format!("nobody gave a sign of life about the state '{}'", state.name);
                    TaskError::new(error_name::HEARTBEAT_TIMEOUT, cause)
                };
                if let Some(answer) = next.map_err(silent)? {
                    return answer;
                }
            }
        };
        let result = match tokio::time::timeout(left, answered).await {
            Ok(result) => result,
            Err(_) => Err(late(state)),
        };
        let result = match result {
            Ok(result) if is_too_large(&result) => Err(too_large(state)),
            result => result,
        };
        begun.result = Some(result.clone());
        at(&begun);
        self.closed(task, result)
    }

    /// Writes down how an attempt ended.
    fn closed(&self, task: &Task, result: Result<Value, TaskError>) -> Result<Value, TaskError> {
        match &result {
            Ok(result) => self.record_task(
                task,
                "TaskSucceeded",
                "taskSucceededEventDetails",
                || json!({ "output": text(result) }),
            ),
            Err(error) if is_timeout(&error.error) => {
                self.record_task(task, "TaskTimedOut", "taskTimedOutEventDetails", || failure(error))
            }
            Err(error) => self.record_task(task, "TaskFailed", "taskFailedEventDetails", || failure(error)),
        }?;
        result
    }

    fn caught(
        &mut self,
        state: &State,
        catcher: &Catcher,
        input: &Data,
        error: TaskError,
    ) -> Result<Step, TaskError> {
        let error_output = json!({ "Error": error.error, "Cause": error.cause });
        let scope = StateScope { error_output: Some(&error_output), ..self.scope(state, input, None) };
        let (assigned, output) = evaluate(&catcher.assign, catcher.output.as_ref(), &scope)?;
        self.assign(assigned)?;
        Ok(Step::To(catcher.next, Data::Own(output.unwrap_or(error_output))))
    }

    /// Evaluates a state's `Assign` and `Output`, both with the variables as they were.
    fn finish(
        &mut self,
        state: &State,
        input: &Data,
        result: Option<&Value>,
    ) -> Result<Option<Value>, TaskError> {
        if state.assign.is_empty() && state.output.is_none() {
            return Ok(None);
        }
        let scope = self.scope(state, input, result);
        let (assigned, output) = evaluate(&state.assign, state.output.as_ref(), &scope)?;
        if output.as_ref().is_some_and(is_too_large) {
            return Err(too_large(state));
        }
        self.assign(assigned)?;
        Ok(output)
    }

    fn assign(&mut self, assigned: Vec<(Arc<str>, Value)>) -> Result<(), TaskError> {
        if assigned.is_empty() {
            return Ok(());
        }
        for (name, value) in assigned {
            if is_too_large(&value) {
                return Err(TaskError::new(
                    error_name::DATA_LIMIT_EXCEEDED,
                    format!("the variable {name} is over the limit of {} bytes", limits::STATE_BYTES),
                ));
            }
            self.variables.insert(name, value);
        }
        // Most runs have few and small variables: one that could be too large is rare.
        if self.variables.len() * limits::STATE_BYTES > VARIABLES_BYTES
            && self.variables.values().map(json_bytes).sum::<usize>() > VARIABLES_BYTES
        {
            return Err(TaskError::new(
                error_name::DATA_LIMIT_EXCEEDED,
                "the variables together are over the limit",
            ));
        }
        Ok(())
    }

    fn scope<'s>(&'s self, state: &'s State, input: &'s Data, result: Option<&'s Value>) -> StateScope<'s> {
        StateScope {
            variables: &self.variables,
            input: input.get(),
            result,
            error_output: None,
            execution_input: &self.execution_input,
            execution: self.execution,
            state: &state.name,
            retries: 0,
            token: None,
            redrives: self.recorded.map(|recorded| recorded.redrives),
        }
    }
}

fn go_on(next: Next, data: Data) -> Step {
    match next {
        Next::State(index) => Step::To(index, data),
        Next::End => Step::End(data),
    }
}

type Assigned = Vec<(Arc<str>, Value)>;

fn evaluate(
    assign: &Assign,
    output: Option<&Template>,
    scope: &impl Scope,
) -> Result<(Assigned, Option<Value>), TaskError> {
    let assigned = assign
        .iter()
        .map(|(name, template)| Ok((Arc::clone(name), fill(template, scope)?.into_owned())))
        .collect::<Result<_, TaskError>>()?;
    let output = output.map(|template| fill(template, scope).map(Evaluated::into_owned)).transpose()?;
    Ok((assigned, output))
}

/// A template with every expression replaced by its value.
fn fill<'s>(template: &'s Template, scope: &'s impl Scope) -> Result<Evaluated<'s>, TaskError> {
    match template {
        Template::Literal(value) => Ok(Evaluated::Borrowed(value)),
        Template::Expression(expression) => query(expression, scope)?.ok_or_else(|| {
            TaskError::new(
                error_name::QUERY_EVALUATION_ERROR,
                format!("the JSONata expression '{}' returned nothing (undefined)", expression.source()),
            )
        }),
        Template::Array(items) => {
            let items = items
                .iter()
                .map(|item| fill(item, scope).map(Evaluated::into_owned))
                .collect::<Result<Vec<_>, _>>()?;
            Ok(Evaluated::Owned(Value::Array(items)))
        }
        Template::Object(fields) => {
            let mut object = Map::with_capacity(fields.len());
            for (name, field) in fields {
                object.insert(name.to_string(), fill(field, scope)?.into_owned());
            }
            Ok(Evaluated::Owned(Value::Object(object)))
        }
    }
}

fn query<'s>(expression: &Expression, scope: &'s impl Scope) -> Result<Option<Evaluated<'s>>, TaskError> {
    expression
        .evaluate(scope)
        .map_err(|error| TaskError::new(error_name::QUERY_EVALUATION_ERROR, error.to_string()))
}

fn holds(condition: &Expression, scope: &impl Scope) -> Result<bool, TaskError> {
    match query(condition, scope)?.as_ref().map(Evaluated::get) {
        Some(Value::Bool(holds)) => Ok(*holds),
        _ => Err(TaskError::new(
            error_name::QUERY_EVALUATION_ERROR,
            format!("the condition '{}' is neither true nor false", condition.source()),
        )),
    }
}

/// A task's call with its arguments.
fn call<'s>(state: &'s State, task: &'s Task, scope: &'s impl Scope) -> Result<Call<'s>, TaskError> {
    let mut arguments = Vec::with_capacity(task.arguments.len());
    let mut bytes = 2;
    for (name, template) in &task.arguments {
        let value = fill(template, scope)?;
        bytes += name.len() + 4 + most_bytes(value.get());
        arguments.push((&**name, value));
    }
    let exact =
        || arguments.iter().map(|(name, value)| name.len() + 4 + json_bytes(value.get())).sum::<usize>() + 2;
    if bytes > limits::STATE_BYTES && exact() > limits::STATE_BYTES {
        return Err(too_large(state));
    }
    Ok(Call { state: &state.name, resource: task.resource, arguments: Arguments(arguments) })
}

/// How long a task's time is on a clock that may be fast. What is as short as an EXPRESS run guards work that is done
/// here, and at no other speed than anywhere.
fn long(clock: Clock, time: Duration) -> Duration {
    if time <= limits::RUN_DURATION { time } else { clock.scale(time) }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// When a time that begins now is over, in epoch milliseconds.
fn after(time: Duration) -> u64 {
    clock::epoch_ms().saturating_add(millis(time))
}

/// How long it is until then.
fn until(epoch_ms: u64) -> Duration {
    Duration::from_millis(epoch_ms.saturating_sub(clock::epoch_ms()))
}

/// How long a task's time is.
fn period(period: &Period, scope: &impl Scope) -> Result<Duration, TaskError> {
    let expression = match period {
        Period::Fixed(duration) => return Ok(*duration),
        Period::Computed(expression) => expression,
    };
    let value = query(expression, scope)?;
    let seconds = value.as_ref().and_then(|value| value.get().as_u64());
    seconds.filter(|seconds| (1..=SECONDS_MAX).contains(seconds)).map(Duration::from_secs).ok_or_else(|| {
        TaskError::new(
            error_name::QUERY_EVALUATION_ERROR,
            format!("the expression '{}' is not a whole number of seconds above 0", expression.source()),
        )
    })
}

const fn entered(kind: &Kind) -> &'static str {
    match kind {
        Kind::Task(_) => "TaskStateEntered",
        Kind::Choice { .. } => "ChoiceStateEntered",
        Kind::Pass(_) => "PassStateEntered",
        Kind::Wait { .. } => "WaitStateEntered",
        Kind::Succeed => "SucceedStateEntered",
        Kind::Fail { .. } => "FailStateEntered",
    }
}

const fn exited(kind: &Kind) -> &'static str {
    match kind {
        Kind::Task(_) => "TaskStateExited",
        Kind::Choice { .. } => "ChoiceStateExited",
        Kind::Pass(_) => "PassStateExited",
        Kind::Wait { .. } => "WaitStateExited",
        // A state that fails is never left.
        Kind::Succeed | Kind::Fail { .. } => "SucceedStateExited",
    }
}

fn is_timeout(error: &str) -> bool {
    error == error_name::TIMEOUT || error == error_name::HEARTBEAT_TIMEOUT
}

fn matches_any(names: &[Box<str>], error: &str) -> bool {
    let is_terminal = error == error_name::DATA_LIMIT_EXCEEDED || error == error_name::RUNTIME;
    names.iter().any(|name| match &**name {
        error_name::ALL => !is_terminal,
        error_name::TASK_FAILED => !is_terminal && !is_timeout(error),
        error_name::TIMEOUT => is_timeout(error),
        error_name::RUNTIME => false,
        name => name == error,
    })
}

fn late(state: &State) -> TaskError {
    TaskError::new(error_name::TIMEOUT, format!("the state '{}' took too long", state.name))
}

fn too_large(state: &State) -> TaskError {
    TaskError::new(
        error_name::DATA_LIMIT_EXCEEDED,
        format!(
            "the state '{}' has an input, output or result over the limit of {} bytes",
            state.name,
            limits::STATE_BYTES
        ),
    )
}

/// A random number from 0 to 1.
fn fraction() -> f64 {
    // Without randomness a retry waits its whole interval.
    getrandom::u32().map_or(1.0, |bits| f64::from(bits) / f64::from(u32::MAX))
}

/// Whether a value is over what a state may have. Nearly all are so far below that no text of theirs is looked at.
fn is_too_large(value: &Value) -> bool {
    most_bytes(value) > limits::STATE_BYTES && json_bytes(value) > limits::STATE_BYTES
}

/// No value has more bytes than this as compact JSON.
fn most_bytes(value: &Value) -> usize {
    // Every byte as `\u00xx`.
    let text = |text: &str| text.len() * 6 + 3;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 32,
        Value::String(value) => text(value),
        Value::Array(items) => items.iter().map(|item| most_bytes(item) + 1).sum::<usize>() + 2,
        Value::Object(fields) => {
            fields.iter().map(|(name, field)| text(name) + most_bytes(field) + 1).sum::<usize>() + 2
        }
    }
}

/// How many bytes a value has as compact JSON.
#[must_use]
pub fn json_bytes(value: &Value) -> usize {
    match value {
        Value::Null => 4,
        Value::Bool(value) => 5 - usize::from(*value),
        Value::Number(number) => number.to_string().len(),
        Value::String(text) => string_bytes(text),
        Value::Array(items) => {
            items.iter().map(json_bytes).sum::<usize>() + items.len().saturating_sub(1) + 2
        }
        Value::Object(fields) => {
            fields.iter().map(|(name, field)| string_bytes(name) + 1 + json_bytes(field)).sum::<usize>()
                + fields.len().saturating_sub(1)
                + 2
        }
    }
}

fn string_bytes(text: &str) -> usize {
    text.len() + proto::body::escape_bytes(text) + 2
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;
    use crate::states::trace::Traces;

    /// Answers each call from a list, or hangs where the list is at its end.
    struct List(Mutex<Vec<Result<Value, TaskError>>>);

    impl Tasks for List {
        async fn call(&self, _call: Call<'_>) -> Result<Value, TaskError> {
            let answer = {
                let mut answers = self.0.lock().unwrap();
                if answers.is_empty() { None } else { Some(answers.remove(0)) }
            };
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        }
    }

    fn execution() -> Execution {
        Execution {
            machine_arn: "arn:machine".into(),
            machine_name: "m".into(),
            arn: "arn:run".into(),
            name: "r".into(),
            started_ms: 5,
        }
    }

    async fn run_states(states: Value, input: Value, answers: Vec<Result<Value, TaskError>>) -> Outcome {
        let start = states.as_object().unwrap().keys().next().unwrap().clone();
        let machine =
            json!({ "QueryLanguage": "JSONata", "StartAt": start, "TimeoutSeconds": 200, "States": states });
        let definition = Definition::parse(&machine.to_string(), &BTreeMap::new()).unwrap();
        let traces = Traces::default();
        let tasks = List(Mutex::new(answers));
        run(&definition, &execution(), input, &tasks, &traces.begin("r".into())).await
    }

    fn task(more: Value) -> Value {
        let mut task = json!({
            "Type": "Task", "Resource": "arn:aws:states:::aws-sdk:sqs:deleteMessage",
            "Arguments": { "QueueUrl": "q", "ReceiptHandle": "r" }, "TimeoutSeconds": 5,
        });
        task.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        task
    }

    fn failed(name: &'static str) -> Result<Value, TaskError> {
        Err(TaskError::new(name, "words"))
    }

    fn error_of(outcome: Outcome) -> String {
        match outcome {
            Outcome::Failed(error) => error.error.into_owned(),
            Outcome::TimedOut(error) => format!("timed out: {}", error.error),
            Outcome::Succeeded(output) => panic!("{output}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn values_flow_from_state_to_state() {
        let states = json!({
            "First": { "Type": "Pass", "Assign": { "a": "{% $states.input.n + 1 %}", "b": "x" },
                       "Output": { "seen": "{% $states.input.n %}" }, "Next": "Second" },
            "Second": { "Type": "Pass", "Assign": { "a": "{% $a * 10 %}" },
                        "Output": ["{% $a %}", "{% $states.input.seen %}", "{% $states.context.Execution.Input.n %}"], "Next": "Third" },
            "Third": { "Type": "Choice", "Choices": [
                { "Condition": "{% $a = 0 %}", "Next": "Wrong" },
                { "Condition": "{% $a = 20 and $b = 'x' %}", "Assign": { "c": "{% $states.context.State.Name %}" }, "Next": "Last" }] },
            "Wrong": { "Type": "Fail" },
            "Last": { "Type": "Succeed", "Output": { "in": "{% $states.input %}", "a": "{% $a %}", "c": "{% $c %}",
                      "id": "{% $states.context.StateMachine.Id & $states.context.Execution.Id %}" } },
        });
        // Output sees the variables as they were before the state's own Assign.
        assert_eq!(
            run_states(states, json!({ "n": 1 }), vec![]).await,
            Outcome::Succeeded(json!({ "in": [2, 1, 1], "a": 20, "c": "Third", "id": "arn:machinearn:run" }))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_without_output_passes_on_what_it_has() {
        let states = json!({
            "Call": task(json!({ "Next": "Pass" })),
            "Pass": { "Type": "Pass", "Next": "Wait" },
            "Wait": { "Type": "Wait", "Seconds": "{% 1 + 1 %}", "End": true },
        });
        let start = Instant::now();
        let outcome = run_states(states, json!({}), vec![Ok(json!({ "x": [1.5, null] }))]).await;
        assert_eq!(outcome, Outcome::Succeeded(json!({ "x": [1.5, null] })));
        assert_eq!(start.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn retries_wait_longer_each_time_and_then_give_up() {
        let retry = json!([
            { "ErrorEquals": ["A"], "IntervalSeconds": 1, "BackoffRate": 2, "MaxAttempts": 3, "MaxDelaySeconds": 3 },
            { "ErrorEquals": ["States.ALL"], "IntervalSeconds": 10, "MaxAttempts": 1 },
        ]);
        let states = json!({ "Call": task(json!({ "Retry": retry, "End": true })) });
        let start = Instant::now();
        let answers = vec![failed("A"), failed("A"), failed("B"), failed("A"), Ok(json!(1))];
        let outcome = run_states(states.clone(), json!({}), answers).await;
        assert_eq!(outcome, Outcome::Succeeded(json!(1)));
        // 1 + 2 + 10 + 3: each retrier counts for itself.
        assert_eq!(start.elapsed(), Duration::from_secs(16));
        let answers = vec![failed("B"), failed("B")];
        assert_eq!(error_of(run_states(states, json!({}), answers).await), "B");
        let jitter = json!([{ "ErrorEquals": ["A"], "IntervalSeconds": 8, "JitterStrategy": "FULL" }]);
        let states = json!({ "Call": task(json!({ "Retry": jitter, "End": true })) });
        let start = Instant::now();
        run_states(states, json!({}), vec![failed("A"), Ok(json!(1))]).await;
        assert!(start.elapsed() <= Duration::from_secs(8));
    }

    #[tokio::test(start_paused = true)]
    async fn catchers_take_the_first_name_that_fits() {
        let catch = json!([
            { "ErrorEquals": ["A"], "Assign": { "e": "{% $states.errorOutput.Cause %}" }, "Output": { "by": "A" }, "Next": "End" },
            { "ErrorEquals": ["States.Timeout"], "Output": { "by": "timeout" }, "Next": "End" },
            { "ErrorEquals": ["States.TaskFailed"], "Next": "End" },
        ]);
        let states = json!({
            "Start": { "Type": "Pass", "Assign": { "e": "none" }, "Next": "Call" },
            "Call": task(json!({ "Catch": catch, "Next": "End" })),
            "End": { "Type": "Succeed", "Output": ["{% $states.input %}", "{% $e %}"] },
        });
        let outcome = |answers| run_states(states.clone(), json!({}), answers);
        assert_eq!(outcome(vec![failed("A")]).await, Outcome::Succeeded(json!([{ "by": "A" }, "words"])));
        // Nobody answers: the task's own time ends.
        assert_eq!(outcome(vec![]).await, Outcome::Succeeded(json!([{ "by": "timeout" }, "none"])));
        assert_eq!(
            outcome(vec![failed("Other")]).await,
            Outcome::Succeeded(json!([{ "Error": "Other", "Cause": "words" }, "none"]))
        );
        assert_eq!(error_of(outcome(vec![failed(error_name::RUNTIME)]).await), error_name::RUNTIME);
    }

    #[test]
    fn some_errors_are_not_caught_by_all() {
        let all = ["States.ALL".into()];
        let task_failed = ["States.TaskFailed".into()];
        for (error, by_all, by_task_failed) in [
            ("ApiGateway.410", true, true),
            (error_name::TIMEOUT, true, false),
            (error_name::HEARTBEAT_TIMEOUT, true, false),
            (error_name::QUERY_EVALUATION_ERROR, true, true),
            (error_name::DATA_LIMIT_EXCEEDED, false, false),
            (error_name::RUNTIME, false, false),
        ] {
            assert_eq!(matches_any(&all, error), by_all, "{error}");
            assert_eq!(matches_any(&task_failed, error), by_task_failed, "{error}");
        }
        assert!(matches_any(&[error_name::DATA_LIMIT_EXCEEDED.into()], error_name::DATA_LIMIT_EXCEEDED));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_ends_with_its_time() {
        let states = json!({ "Wait": { "Type": "Wait", "Seconds": 1000, "End": true } });
        let start = Instant::now();
        let outcome = run_states(states, json!({}), vec![]).await;
        assert_eq!(error_of(outcome), "timed out: States.Timeout");
        assert_eq!(start.elapsed(), Duration::from_secs(200));
        let states = json!({ "A": { "Type": "Pass", "Next": "B" }, "B": { "Type": "Pass", "Next": "A" } });
        assert_eq!(error_of(run_states(states, json!({}), vec![]).await), error_name::RUNTIME);
    }

    #[tokio::test(start_paused = true)]
    async fn large_values_end_a_run() {
        let large = "x".repeat(limits::STATE_BYTES);
        let catch_all = json!({ "Catch": [{ "ErrorEquals": ["States.ALL"], "Next": "End" }], "Next": "End" });
        let states = json!({ "Call": task(catch_all), "End": { "Type": "Succeed" } });
        let outcome = run_states(states, json!({}), vec![Ok(json!(large))]).await;
        assert_eq!(error_of(outcome), error_name::DATA_LIMIT_EXCEEDED);
        let fits = "x".repeat(limits::STATE_BYTES - 2);
        let states = json!({ "Call": task(json!({ "End": true })) });
        let outcome = run_states(states, json!({}), vec![Ok(json!(fits.clone()))]).await;
        assert_eq!(outcome, Outcome::Succeeded(json!(fits)));
        for part in ["Assign", "Output"] {
            let states = json!({ "A": { "Type": "Pass", part: { "a": "{% $states.input & $states.input %}" }, "End": true } });
            let outcome = run_states(states, json!("x".repeat(limits::STATE_BYTES / 2)), vec![]).await;
            assert_eq!(error_of(outcome), error_name::DATA_LIMIT_EXCEEDED, "{part}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_expression_without_a_value_is_an_error() {
        for state in [
            json!({ "Type": "Pass", "Output": "{% $states.input.nothing %}", "End": true }),
            json!({ "Type": "Pass", "Assign": { "a": "{% $nothing %}" }, "End": true }),
            json!({ "Type": "Choice", "Choices": [{ "Condition": "{% $states.input.nothing %}", "Next": "A" }] }),
            json!({ "Type": "Choice", "Choices": [{ "Condition": "{% 'text' %}", "Next": "A" }] }),
            json!({ "Type": "Wait", "Seconds": "{% 'text' %}", "End": true }),
            json!({ "Type": "Fail", "Error": "{% 1 %}" }),
        ] {
            let outcome = run_states(json!({ "A": state }), json!({}), vec![]).await;
            assert_eq!(error_of(outcome), error_name::QUERY_EVALUATION_ERROR, "{state}");
        }
        let states =
            json!({ "A": { "Type": "Choice", "Choices": [{ "Condition": "{% false %}", "Next": "A" }] } });
        assert_eq!(error_of(run_states(states, json!({}), vec![]).await), error_name::NO_CHOICE_MATCHED);
        let states = json!({ "A": { "Type": "Fail", "Error": "{% 'E' & $states.input %}", "Cause": "c" } });
        assert_eq!(run_states(states, json!("x"), vec![]).await, Outcome::Failed(TaskError::new("Ex", "c")));
    }

    proptest! {
        #[test]
        fn the_size_of_a_value_is_that_of_its_text(text in any::<String>(), number in any::<f64>(), pieces in prop::collection::vec("[\\x00-\\x7f]{0,70}", 0..5)) {
            let value = json!({ "text": text, text.clone(): [number, null, true, false, -1, 1], "pieces": pieces, "e": {}, "l": [] });
            prop_assert_eq!(json_bytes(&value), value.to_string().len());
            prop_assert!(most_bytes(&value) >= json_bytes(&value));
        }
    }
}
