//! The reloads of the configuration: where it is read again, how they went, and who waits to hear that
//! the edge has confirmed one.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use crate::{
    config::{self, Config, Overrides, change::Change},
    report::{
        metrics::{Metrics, unix_now},
        status::ConfigStatus,
    },
};

/// How long a reload waits for the edge to confirm it.
const CONFIRMATION: Duration = Duration::from_secs(10);

/// Where a configuration comes from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// The file.
    pub(crate) path: PathBuf,
    /// What goes over it.
    pub(crate) overrides: Overrides,
}

/// How the answer to a reload is given.
type Answer = oneshot::Sender<Result<Change, String>>;

/// The reloads of one agent.
pub(super) struct Reloads {
    source: Option<Source>,
    metrics: Arc<Metrics>,
    /// Unix seconds.
    loaded_at: u64,
    done: u64,
    last_error: Option<String>,
    waiting: Vec<(Answer, Change)>,
    confirm_by: Option<Instant>,
}

impl Reloads {
    /// None yet: the configuration has just been read from `source`. Without a source there are none.
    pub(super) fn new(source: Option<Source>, metrics: Arc<Metrics>) -> Self {
        Self {
            source,
            metrics,
            loaded_at: unix_now().as_secs(),
            done: 0,
            last_error: None,
            waiting: Vec::new(),
            confirm_by: None,
        }
    }

    /// Reads the configuration again.
    ///
    /// # Errors
    ///
    /// A sentence for the user.
    pub(super) fn read(&self) -> Result<Config, String> {
        let source = self.source.as_ref().ok_or("this agent runs without a configuration file")?;
        config::load(&source.path, &source.overrides).map_err(|error| error.to_string())
    }

    /// Counts and logs how one went.
    pub(super) fn note(&mut self, outcome: &Result<Change, String>) {
        match outcome {
            Ok(change) => {
                self.done += 1;
                self.loaded_at = unix_now().as_secs();
                self.last_error = None;
                self.metrics.reloaded("ok");
                tracing::info!(
                    added = change.added.join(","),
                    removed = change.removed.join(","),
                    changed = change.changed.join(","),
                    unchanged = change.unchanged,
                    reconnects = change.reconnects,
                    "configuration {}",
                    change.summary()
                );
                for setting in &change.at_restart {
                    tracing::warn!(setting, "this setting takes effect when the agent is started again");
                }
            }
            Err(error) => {
                self.last_error = Some(error.clone());
                self.metrics.reloaded("failed");
                tracing::error!("the reload failed and changed nothing: {error}");
            }
        }
    }

    /// Answers when the edge has confirmed `change`, or when that takes too long.
    pub(super) fn wait(&mut self, answer: Answer, change: Change) {
        self.waiting.push((answer, change));
        self.confirm_by = Some(Instant::now() + CONFIRMATION);
    }

    /// When those who wait are answered without a confirmation.
    pub(super) const fn confirm_by(&self) -> Option<Instant> {
        self.confirm_by
    }

    /// Answers everybody who waits.
    pub(super) fn answer_waiting(&mut self, confirmed: bool) {
        self.confirm_by = None;
        for (answer, change) in std::mem::take(&mut self.waiting) {
            // Whoever asked may have left.
            drop(answer.send(Ok(Change { confirmed, ..change })));
        }
    }

    /// Where the configuration comes from, and how it went.
    pub(super) fn status(&self) -> ConfigStatus {
        ConfigStatus {
            file: self.source.as_ref().map(|source| source.path.display().to_string()),
            loaded_at: self.loaded_at,
            reloads: self.done,
            last_error: self.last_error.clone(),
        }
    }
}
