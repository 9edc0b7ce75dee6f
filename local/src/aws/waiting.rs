//! Who waits for which run.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

use crate::states::AcceptedRun;

/// The runs that callers wait for, so that one can be told that its client went away.
#[derive(Debug, Default)]
pub(super) struct WaitingRuns {
    by_key: Mutex<HashMap<Box<str>, Vec<WaitingRun>>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WaitingRun {
    pub(super) request_id: String,
    pub(super) mailbox: String,
}

pub(super) struct WaitingGuard<'w> {
    waiting: &'w WaitingRuns,
    access_key: &'w str,
    run: WaitingRun,
}

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        let mut by_key = self.waiting.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runs) = by_key.get_mut(self.access_key) {
            if let Some(at) = runs.iter().position(|run| *run == self.run) {
                runs.swap_remove(at);
            }
            if runs.is_empty() {
                by_key.remove(self.access_key);
            }
        }
    }
}

impl WaitingRuns {
    pub(super) fn begin<'w>(&'w self, access_key: &'w str, run: &AcceptedRun) -> Option<WaitingGuard<'w>> {
        let part = |name| run.input().get(name).and_then(Value::as_str).map(str::to_owned);
        let run = WaitingRun { request_id: part("request_id")?, mailbox: part("mailbox")? };
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        by_key.entry(access_key.into()).or_default().push(run.clone());
        Some(WaitingGuard { waiting: self, access_key, run })
    }

    pub(super) fn of(&self, access_key: &str) -> Vec<WaitingRun> {
        let by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        by_key.get(access_key).cloned().unwrap_or_default()
    }
}
