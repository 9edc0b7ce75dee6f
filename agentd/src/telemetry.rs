//! Logs: for people on a terminal, one JSON object a line elsewhere. They go to standard error, and what
//! people asked to see goes to standard output.
//!
//! Both are written by a thread of their own: a terminal that is stopped, or a pipe that nobody reads,
//! must not stop the agent. What does not fit the queue is lost.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use tracing_appender::{
    non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard},
    rolling::{InitError, RollingFileAppender, Rotation},
};
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Short lines for people.
    Human,
    /// One JSON object for each event.
    Json,
}

/// How many lines may wait for their reader.
const QUEUED_LINES: usize = 4096;

/// Writes what is queued when it is dropped.
#[must_use = "what is queued is lost without it"]
pub(crate) struct Flush {
    _worker: WorkerGuard,
}

fn queue(to: impl std::io::Write + Send + 'static, name: &str) -> (NonBlocking, Flush) {
    let (writer, worker) =
        NonBlockingBuilder::default().buffered_lines_limit(QUEUED_LINES).thread_name(name).finish(to);
    (writer, Flush { _worker: worker })
}

/// Lines for people on standard output.
#[derive(Debug, Clone)]
pub struct Terminal(NonBlocking);

impl Terminal {
    /// Begins writing to standard output.
    pub(crate) fn open() -> (Self, Flush) {
        let (writer, flush) = queue(std::io::stdout(), "output");
        (Self(writer), flush)
    }

    /// Writes one line, or loses it.
    pub(crate) fn line(&self, mut text: String) {
        text.push('\n');
        let _ = self.0.clone().write_all(text.as_bytes());
    }
}

/// How many days of log files are kept.
const LOG_DAYS: usize = 14;

/// Starts logging to standard error. A process that already logs goes on as it does.
pub(crate) fn start(format: Option<LogFormat>, level: Targets) -> Flush {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Human } else { LogFormat::Json });
    let (writer, flush) = queue(std::io::stderr(), "log");
    subscribe(format, level, writer, terminal);
    flush
}

/// Starts logging to `agentd.DATE.log` in a folder, a new file each day, old ones removed.
pub(crate) fn start_in(dir: &Path, format: Option<LogFormat>, level: Targets) -> Result<Flush, InitError> {
    let files = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("agentd")
        .filename_suffix("log")
        .max_log_files(LOG_DAYS)
        .build(dir)?;
    let (writer, flush) = queue(files, "log");
    subscribe(format.unwrap_or(LogFormat::Human), level, writer, false);
    Ok(flush)
}

fn subscribe(format: LogFormat, level: Targets, writer: NonBlocking, ansi: bool) {
    let registry = tracing_subscriber::registry().with(level);
    // An error means that somebody in this process logs already.
    let _ = match format {
        LogFormat::Human => {
            registry.with(fmt::layer().with_writer(writer).with_ansi(ansi).with_target(false)).try_init()
        }
        LogFormat::Json => {
            registry.with(fmt::layer().json().flatten_event(true).with_writer(writer)).try_init()
        }
    };
}
