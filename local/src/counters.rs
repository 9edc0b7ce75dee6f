//! How often which action of AWS was called by whom: enters one call at a time, leaves a snapshot.

use std::{
    collections::BTreeMap,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Serialize;

type PerAction = BTreeMap<Box<str>, AtomicU64>;
type PerService = BTreeMap<&'static str, PerAction>;

/// The count of calls, by caller and action.
///
/// A caller is a function's name, or `states` for the state machine; an action is what a bill
/// would name, as `sqs:ReceiveMessage`.
#[derive(Debug, Default)]
pub struct Counters {
    // An action is counted under the read lock; only its first call takes the write lock.
    by_caller: RwLock<BTreeMap<Box<str>, PerService>>,
}

/// What was counted so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CounterSnapshot {
    /// Calls by action, over all callers.
    pub actions: BTreeMap<String, u64>,
    /// Calls by caller and action.
    pub callers: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Counters {
    /// Counts one call.
    pub fn record(&self, caller: &str, service: &'static str, action: &str) {
        {
            let by_caller = self.by_caller.read().unwrap_or_else(PoisonError::into_inner);
            let actions = by_caller.get(caller).and_then(|services| services.get(service));
            if let Some(count) = actions.and_then(|actions| actions.get(action)) {
                count.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        let mut by_caller = self.by_caller.write().unwrap_or_else(PoisonError::into_inner);
        let actions = by_caller.entry(caller.into()).or_default().entry(service).or_default();
        actions.entry(action.into()).or_default().fetch_add(1, Ordering::Relaxed);
    }

    /// Everything counted since the start or the last [`Counters::reset`].
    #[must_use]
    pub fn snapshot(&self) -> CounterSnapshot {
        let mut snapshot = CounterSnapshot { actions: BTreeMap::new(), callers: BTreeMap::new() };
        let by_caller = self.by_caller.read().unwrap_or_else(PoisonError::into_inner);
        for (caller, services) in by_caller.iter() {
            let counts = snapshot.callers.entry(caller.to_string()).or_default();
            for (service, actions) in services {
                // `apigateway:invoke POST`: where the service has its action already, a method follows.
                let between = if service.contains(':') || *service == "execute-api" { ' ' } else { ':' };
                for (action, count) in actions {
                    let name = format!("{service}{between}{action}");
                    let count = count.load(Ordering::Relaxed);
                    *snapshot.actions.entry(name.clone()).or_default() += count;
                    counts.insert(name, count);
                }
            }
        }
        snapshot
    }

    /// Forgets everything counted.
    pub fn reset(&self) {
        self.by_caller.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_caller_and_in_total() {
        let counters = Counters::default();
        counters.record("ingress", "sqs", "ReceiveMessage");
        counters.record("states", "sqs", "ReceiveMessage");
        counters.record("states", "sqs", "ReceiveMessage");
        counters.record("states", "apigateway:invoke", "POST");
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.actions["sqs:ReceiveMessage"], 3);
        assert_eq!(snapshot.callers["states"]["sqs:ReceiveMessage"], 2);
        assert_eq!(
            serde_json::to_string(&snapshot.actions).unwrap(),
            r#"{"apigateway:invoke POST":1,"sqs:ReceiveMessage":3}"#
        );
        counters.reset();
        assert!(counters.snapshot().actions.is_empty());
    }
}
