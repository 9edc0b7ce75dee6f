//! The reloads of the configuration: where it is read again, how they went, and who waits for one: for its turn, for its
//! files, and to hear that the edge has confirmed it.
//!
//! Files are read on a thread of their own. One that is on a mount that hangs cannot be given up on otherwise, and what
//! is served must not wait for it.

use std::{future::pending, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{
    apart::{Apart, NotBegun},
    config::{self, Config, Overrides, change::Change},
    link::dial::Dialer,
    report::{
        metrics::{Metrics, unix_now},
        status::ConfigStatus,
    },
    serve::tunnel::{Prepared, Tunnels},
};

/// How long a reload waits for the edge to confirm it.
const CONFIRMATION: Duration = Duration::from_secs(10);

/// How long the files of a reload may take: they are small, and what takes longer hangs. A reload that waits for the one
/// before it takes twice this and [`CONFIRMATION`], which must be less than the 30 s that the unit and `agentd reload` wait.
const READING: Duration = Duration::from_secs(8);

/// No more threads than this wait for files that do not come: a file that was mended is read all the same, and threads are
/// few, see [`crate::resolver`].
const MAX_HANGING: usize = 3;

/// Where a configuration comes from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// The file.
    pub(crate) path: PathBuf,
    /// What goes over it.
    pub(crate) overrides: Overrides,
}

/// How the answer to a reload is given.
pub(super) type Answer = oneshot::Sender<Result<Change, String>>;

/// A configuration that was read and all that is set up for it. It is not in use yet.
pub(super) struct Fresh {
    pub(super) config: Config,
    pub(super) dialer: Dialer,
    pub(super) tunnels: Prepared,
}

/// Reads the configuration again, with every file that it names.
///
/// # Errors
///
/// A sentence for the user.
fn read(source: &Source, tunnels: &Tunnels) -> Result<Fresh, String> {
    let config = config::load(&source.path, &source.overrides).map_err(|error| error.to_string())?;
    let dialer = Dialer::new(config.edge.url.clone(), config.edge.ca_file.as_deref());
    let dialer = dialer.map_err(|error| error.to_string())?;
    let prepared = tunnels.prepare(&config.tunnels, config.max_concurrent);
    Ok(Fresh { dialer, tunnels: prepared.map_err(|error| error.to_string())?, config })
}

/// A reading that goes on.
struct Reading {
    found: oneshot::Receiver<Result<Fresh, String>>,
    within: Duration,
    until: Instant,
    /// Who asked for it.
    answers: Vec<Answer>,
}

/// The reloads of one agent.
pub(super) struct Reloads {
    source: Option<Source>,
    reading: Option<Reading>,
    /// Who waits for the next reading, if it was asked for: one that began before may have missed what they changed.
    asked: Option<Vec<Answer>>,
    readings: Apart,
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
            reading: None,
            asked: None,
            readings: Apart::new("reload", MAX_HANGING),
            metrics,
            loaded_at: unix_now().as_secs(),
            done: 0,
            last_error: None,
            waiting: Vec::new(),
            confirm_by: None,
        }
    }

    /// Asks for one more reading. Whoever asks before it begins shares it.
    pub(super) fn ask(&mut self, answer: Option<Answer>) {
        self.asked.get_or_insert_default().extend(answer);
    }

    /// Begins the reading that was asked for, unless one goes on. Whether it did.
    pub(super) fn begin(&mut self, tunnels: &Arc<Tunnels>) -> bool {
        let Some(source) = self.source.clone() else {
            return self
                .begin_with(READING, || Err("this agent runs without a configuration file".to_owned()));
        };
        let (tunnels, runtime) = (Arc::clone(tunnels), Handle::current());
        self.begin_with(READING, move || {
            // Health checks are tasks.
            let _runtime = runtime.enter();
            read(&source, &tunnels)
        })
    }

    fn begin_with(
        &mut self,
        within: Duration,
        read: impl FnOnce() -> Result<Fresh, String> + Send + 'static,
    ) -> bool {
        if self.reading.is_some() {
            return false;
        }
        let Some(answers) = self.asked.take() else { return false };
        let found = self.readings.begin(read).unwrap_or_else(|error| {
            let (report, found) = oneshot::channel();
            let _ = report.send(Err(match error {
                NotBegun::Hanging => {
                    "earlier reloads still wait for a file that does not come: see to the mount that it is \
                                      on, or restart the agent"
                        .to_owned()
                }
                NotBegun::System(error) => format!("cannot read the configuration: {error}"),
            }));
            found
        });
        self.reading = Some(Reading { found, within, until: Instant::now() + within, answers });
        true
    }

    /// Waits for the end of the reading that goes on, for ever if there is none: who asked for it, and what was read.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost by dropping the future.
    pub(super) async fn read(&mut self) -> (Vec<Answer>, Result<Fresh, String>) {
        let Some(reading) = &mut self.reading else { return pending().await };
        let outcome = match timeout_at(reading.until, &mut reading.found).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err("reading the configuration broke off".to_owned()),
            Err(_) => Err(format!(
                "the configuration could not be read within {} s: one of its files is on a mount that hangs, or a pipe that \
                 nobody writes to",
                reading.within.as_secs()
            )),
        };
        let answers = self.reading.take().map(|reading| reading.answers);
        (answers.unwrap_or_default(), outcome)
    }

    /// Gives up every reading. Who asked for one hears why.
    pub(super) fn give_up(&mut self, reason: &str) {
        let reading = self.reading.take().map(|reading| reading.answers);
        for answer in reading.into_iter().chain(self.asked.take()).flatten() {
            // Whoever asked may have left.
            let _ = answer.send(Err(reason.to_owned()));
        }
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn asked(reloads: &mut Reloads) -> oneshot::Receiver<Result<Change, String>> {
        let (answer, answered) = oneshot::channel();
        reloads.ask(Some(answer));
        answered
    }

    /// A reading that does not end before its sender is gone.
    fn hanging() -> (mpsc::Sender<()>, impl FnOnce() -> Result<Fresh, String> + Send + 'static) {
        let (let_go, hang) = mpsc::channel();
        (let_go, move || {
            let _ = hang.recv();
            Err("it came too late".to_owned())
        })
    }

    #[tokio::test]
    async fn a_file_that_never_comes_fails_the_reload_and_the_next_one_is_read_all_the_same() {
        let mut reloads = Reloads::new(None, Arc::new(Metrics::new()));
        assert!(!reloads.begin_with(READING, || unreachable!("nobody asked")));
        let mut hung = Vec::new();
        for _ in 0..MAX_HANGING {
            let (let_go, read) = hanging();
            hung.push(let_go);
            let _first = asked(&mut reloads);
            assert!(reloads.begin_with(Duration::ZERO, read));
            // Who asks while that goes on gets a reading that begins later.
            let _second = asked(&mut reloads);
            let _third = asked(&mut reloads);
            assert!(!reloads.begin_with(READING, || unreachable!("one goes on")));
            let (answers, outcome) = reloads.read().await;
            assert_eq!(answers.len(), 1);
            assert!(outcome.err().unwrap().starts_with("the configuration could not be read within 0 s: "));
            if hung.len() < MAX_HANGING {
                assert!(reloads.begin_with(READING, || Err("read".to_owned())));
                let (answers, outcome) = reloads.read().await;
                assert_eq!((answers.len(), outcome.err().as_deref()), (2, Some("read")));
            }
        }
        // Threads are few.
        assert!(reloads.begin_with(READING, || unreachable!("there is no thread for it")));
        let (answers, outcome) = reloads.read().await;
        assert_eq!(answers.len(), 2);
        assert!(outcome.err().unwrap().starts_with("earlier reloads still wait for a file"));
    }

    #[tokio::test]
    async fn who_waits_hears_that_the_agent_stops() {
        let mut reloads = Reloads::new(None, Arc::new(Metrics::new()));
        let (_let_go, read) = hanging();
        let first = asked(&mut reloads);
        assert!(reloads.begin_with(READING, read));
        let second = asked(&mut reloads);
        reloads.give_up("the agent is stopping");
        for answered in [first, second] {
            assert_eq!(answered.await.unwrap().unwrap_err(), "the agent is stopping");
        }
        assert!(!reloads.begin_with(READING, || unreachable!("nobody waits")));
    }
}
