//! What a STANDARD run has done: enters each event, leaves the history as Step Functions tells it, and where the
//! run may be taken up again.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::outcome::{Status, TaskError, error_name};
use crate::{
    clock,
    store::{Kept, Service},
};

/// The most events of a run (Step Functions Developer Guide, "Service quotas": 25,000, hard).
pub const EVENTS: usize = 25_000;

/// The history of one run.
#[derive(Debug)]
pub struct Journal {
    run: Arc<str>,
    kept: Arc<Kept>,
    events: Mutex<Vec<Event>>,
    checkpoint: Mutex<Option<Checkpoint>>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// What happened, such as `TaskScheduled`.
    pub kind: Cow<'static, str>,
    /// When, in epoch seconds.
    pub at: f64,
    /// The field that holds the details, and the details.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<(Cow<'static, str>, Value)>,
}

/// Where a run enters a state, with everything that it has by then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    /// The state's name.
    pub(super) state: Arc<str>,
    pub(super) input: Value,
    pub(super) variables: BTreeMap<Arc<str>, Value>,
    /// Nothing where the state is still to be entered: after a redrive.
    pub(super) position: Option<Position>,
}

/// How far a run has come in a state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Position {
    /// How often each retrier of the task has had it tried again.
    #[serde(default)]
    pub(super) retries: Vec<u32>,
    /// Until when the run waits, in epoch milliseconds.
    #[serde(default)]
    pub(super) until_ms: Option<u64>,
    /// The attempt that is being made.
    #[serde(default)]
    pub(super) begun: Option<Begun>,
}

/// One attempt of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Begun {
    /// What it is answered with.
    pub(super) token: Option<String>,
    /// When its time is over, in epoch milliseconds.
    pub(super) due_ms: u64,
    /// How long it may be silent.
    pub(super) heartbeat_ms: Option<u64>,
    /// Whether its call is done, and only the answer is missing.
    pub(super) submitted: bool,
    /// How it ended.
    pub(super) result: Option<Result<Value, TaskError>>,
}

/// A change of a run, as the store has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record<'a> {
    /// What task tokens are signed with.
    Key { key: Cow<'a, str> },
    /// A run began.
    Started {
        run: Cow<'a, str>,
        machine: Cow<'a, str>,
        name: Cow<'a, str>,
        input: Cow<'a, str>,
        started_ms: u64,
        /// When it began last: at its start or its last redrive.
        began_ms: u64,
        redrives: u32,
    },
    /// Something happened in it.
    Event { run: Cow<'a, str>, event: Cow<'a, Event> },
    /// It entered a state.
    Entered { run: Cow<'a, str>, checkpoint: Cow<'a, Checkpoint> },
    /// It went on in this state.
    At { run: Cow<'a, str>, position: Cow<'a, Position> },
    /// Somebody answered with the token that ends so.
    Answered { token: Cow<'a, str>, answer: Cow<'a, Result<Value, TaskError>> },
    /// It ended, at this time in epoch seconds.
    Ended { run: Cow<'a, str>, status: Cow<'a, Status>, at: f64 },
    /// It was taken up again, at this time in epoch milliseconds.
    Redriven { run: Cow<'a, str>, at_ms: u64 },
}

impl Journal {
    pub(super) fn new(run: Arc<str>, kept: Arc<Kept>) -> Self {
        Self { run, kept, events: Mutex::default(), checkpoint: Mutex::default() }
    }

    /// What an earlier process wrote down.
    pub(super) fn kept(
        run: Arc<str>,
        kept: Arc<Kept>,
        events: Vec<Event>,
        checkpoint: Option<Checkpoint>,
    ) -> Self {
        Self { run, kept, events: Mutex::new(events), checkpoint: Mutex::new(checkpoint) }
    }

    /// Writes down what happened in a run that goes on.
    ///
    /// # Errors
    ///
    /// The history is full; the last event is kept for the run's end.
    pub(super) fn record(
        &self,
        kind: &'static str,
        details: Option<(&'static str, Value)>,
    ) -> Result<(), TaskError> {
        let mut events = self.events();
        if events.len() + 1 >= EVENTS {
            let problem = format!("The execution reached the maximum number of history events ({EVENTS}).");
            return Err(TaskError::new(error_name::RUNTIME, problem));
        }
        self.push(&mut events, kind, details);
        Ok(())
    }

    /// Writes down how the run ended.
    pub(super) fn end(&self, kind: &'static str, details: Option<(&'static str, Value)>) {
        self.push(&mut self.events(), kind, details);
    }

    fn push(&self, events: &mut Vec<Event>, kind: &'static str, details: Option<(&'static str, Value)>) {
        let details = details.map(|(field, details)| (field.into(), details));
        let event = Event { kind: kind.into(), at: clock::epoch_seconds(), details };
        self.keep(|run| Record::Event { run, event: Cow::Borrowed(&event) });
        events.push(event);
    }

    /// Hands a change of this run to the store, where there is one.
    pub(super) fn keep<'a>(&'a self, record: impl FnOnce(Cow<'a, str>) -> Record<'a>) {
        if let Some(store) = self.kept.get() {
            store.append(Service::Runs, &record(Cow::Borrowed(&self.run)));
        }
    }

    /// The changes that lead to where the run is.
    pub(super) fn records(
        &self,
        mut add: impl FnMut(&Record<'_>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        for event in &*self.events() {
            add(&Record::Event { run: Cow::Borrowed(&self.run), event: Cow::Borrowed(event) })?;
        }
        if let Some(checkpoint) = self.checkpoint() {
            add(&Record::Entered { run: Cow::Borrowed(&self.run), checkpoint: Cow::Owned(checkpoint) })?;
        }
        Ok(())
    }

    /// How many events there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events().len()
    }

    /// Whether nothing has happened yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The events at these positions, each as `GetExecutionHistory` gives it.
    #[must_use]
    pub fn page(&self, positions: impl Iterator<Item = usize>) -> Vec<Value> {
        let events = self.events();
        let event = |at: usize| {
            let event = events.get(at)?;
            let mut fields = Map::with_capacity(5);
            fields.insert("id".into(), json!(at + 1));
            fields.insert("previousEventId".into(), json!(at));
            fields.insert("timestamp".into(), json!(event.at));
            fields.insert("type".into(), (&*event.kind).into());
            if let Some((name, details)) = &event.details {
                fields.insert((**name).into(), details.clone());
            }
            Some(Value::Object(fields))
        };
        positions.filter_map(event).collect()
    }

    /// Remembers the state that the run enters.
    pub(super) fn set_checkpoint(&self, checkpoint: Checkpoint) {
        self.keep(|run| Record::Entered { run, checkpoint: Cow::Borrowed(&checkpoint) });
        *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpoint);
    }

    /// Remembers how far the run has come in the state that it entered last, for a process that takes it up.
    pub(super) fn set_position(&self, position: impl FnOnce() -> Position) {
        if self.kept.get().is_some() {
            let position = position();
            self.keep(|run| Record::At { run, position: Cow::Borrowed(&position) });
        }
    }

    /// The state is to be entered once more.
    pub(super) fn enter_again(&self) {
        if let Some(checkpoint) = &mut *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) {
            checkpoint.position = None;
        }
    }

    /// The state that the run entered last; nothing before it has entered any.
    pub(super) fn checkpoint(&self) -> Option<Checkpoint> {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The details of a failure.
pub(super) fn failure(error: &TaskError) -> Value {
    json!({ "error": error.error, "cause": error.cause })
}

/// A value as the text that events hold.
pub(super) fn text(value: &Value) -> Value {
    Value::String(value.to_string())
}
