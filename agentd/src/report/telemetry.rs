//! Logs: for people on a terminal, entries of the journal under systemd, files that are rotated in the
//! background, one JSON object a line elsewhere. What people asked to see goes to standard output.
//!
//! All but the journal are written by a thread of their own: a terminal that is stopped, or a pipe that
//! nobody reads, must not stop the agent. What does not fit the queue is lost.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use crate::config::{self, LogConfig, LogFormat};
use tracing_appender::{
    non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard},
    rolling::{RollingFileAppender, Rotation},
};
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

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
pub(crate) struct Terminal(NonBlocking);

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

/// Starts logging as configured: to files in a folder, else to the journal where standard error leads
/// there, else to standard error. A process that already logs goes on as it does.
///
/// # Errors
///
/// When the folder or the journal cannot be written to.
pub(crate) fn start(log: &LogConfig) -> std::io::Result<Flush> {
    let level = log.level.clone().unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    if let Some(dir) = &log.dir {
        return start_in(dir, log, level);
    }
    let terminal = std::io::stderr().is_terminal();
    let usual = || match (terminal, is_journal()) {
        (true, _) => LogFormat::Human,
        (false, true) => LogFormat::Journal,
        (false, false) => LogFormat::Json,
    };
    let format = log.format.unwrap_or_else(usual);
    let (writer, flush) = queue(std::io::stderr(), "log");
    subscribe(format, level, writer, terminal)?;
    Ok(flush)
}

/// Logs to `agentd.DATE.log` in a folder, a new file each day, old ones removed.
fn start_in(dir: &Path, log: &LogConfig, level: Targets) -> std::io::Result<Flush> {
    let days = log.keep_days.unwrap_or(config::DEFAULT_LOG_DAYS) as usize;
    let files = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("agentd")
        .filename_suffix("log")
        .max_log_files(days)
        .build(dir)
        .map_err(std::io::Error::other)?;
    let (writer, flush) = queue(files, "log");
    subscribe(log.format.unwrap_or(LogFormat::Human), level, writer, false)?;
    Ok(flush)
}

/// Whether standard error is the stream that systemd connected to the journal.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr()) else { return false };
    stream.to_str() == Some(&format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn subscribe(format: LogFormat, level: Targets, writer: NonBlocking, ansi: bool) -> std::io::Result<()> {
    let registry = tracing_subscriber::registry().with(level);
    // An error means that somebody in this process logs already.
    let _ = match format {
        LogFormat::Human => {
            registry.with(fmt::layer().with_writer(writer).with_ansi(ansi).with_target(false)).try_init()
        }
        LogFormat::Json => {
            registry.with(fmt::layer().json().flatten_event(true).with_writer(writer)).try_init()
        }
        LogFormat::Journal => {
            let journal = tracing_journald::layer()?
                .with_field_prefix(None)
                .with_syslog_identifier("agentd".to_owned());
            registry.with(journal).try_init()
        }
    };
    Ok(())
}
