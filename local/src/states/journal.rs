//! What a STANDARD run has done: enters each event, leaves the history as Step Functions tells it, and where the
//! run may be taken up again.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Map, Value, json};

use super::interpreter::{TaskError, error_name};
use crate::clock;

/// The most events of a run (Step Functions Developer Guide, "Service quotas": 25,000, hard).
pub const EVENTS: usize = 25_000;

/// The history of one run.
#[derive(Debug, Default)]
pub struct Journal {
    events: Mutex<Vec<Event>>,
    checkpoint: Mutex<Option<Checkpoint>>,
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// What happened, such as `TaskScheduled`.
    pub kind: &'static str,
    /// When, in epoch seconds.
    pub at: f64,
    /// The field that holds the details, and the details.
    pub details: Option<(&'static str, Value)>,
}

/// Where a run enters a state, with everything that it has by then.
#[derive(Debug, Clone)]
pub(super) struct Checkpoint {
    pub(super) state: usize,
    pub(super) input: Value,
    pub(super) variables: BTreeMap<Arc<str>, Value>,
}

impl Journal {
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
        events.push(Event { kind, at: clock::epoch_seconds(), details });
        Ok(())
    }

    /// Writes down how the run ended.
    pub(super) fn end(&self, kind: &'static str, details: Option<(&'static str, Value)>) {
        self.events().push(Event { kind, at: clock::epoch_seconds(), details });
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
            fields.insert("type".into(), event.kind.into());
            if let Some((name, details)) = &event.details {
                fields.insert((*name).into(), details.clone());
            }
            Some(Value::Object(fields))
        };
        positions.filter_map(event).collect()
    }

    /// Remembers the state that the run enters.
    pub(super) fn set_checkpoint(&self, checkpoint: Checkpoint) {
        *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpoint);
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
