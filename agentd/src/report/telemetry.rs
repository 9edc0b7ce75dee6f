//! Logs: for people on a terminal, entries of the journal under systemd, files that are rotated in the
//! background, one JSON object a line elsewhere. What people asked to see goes to standard output.
//!
//! All but the journal are written by a thread of their own: a terminal that is stopped, or a pipe that
//! nobody reads, must not stop the agent. What does not fit the queue, or cannot be written, is lost, counted, and said
//! when there is room.

use std::{
    fs,
    io::{self, IsTerminal as _, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};

use super::{
    json::Json,
    lines::{self, Lines},
};
use crate::config::{self, LogConfig, LogFormat};
use tokio::sync::mpsc;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// Writes what is queued when it is dropped.
#[must_use = "what is queued is lost without it"]
pub(crate) struct Flush {
    _lines: lines::Flush,
}

/// How many lines this process has lost.
pub(crate) fn lost_lines() -> u64 {
    QUEUES.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Lines::lost).sum()
}

/// All queues of this process.
static QUEUES: Mutex<Vec<Lines>> = Mutex::new(Vec::new());

fn queue<W: Write + Send + 'static>(
    to: W,
    name: &str,
    say: fn(&mut W, u64, Option<&io::Error>),
) -> io::Result<(Lines, Flush)> {
    let (lines, flush) = lines::start(to, name, say)?;
    QUEUES.lock().unwrap_or_else(PoisonError::into_inner).push(lines.clone());
    Ok((lines, Flush { _lines: flush }))
}

/// Says it as any other line: behind those that wait.
fn say_in_log<W>(_: &mut W, lost: u64, error: Option<&io::Error>) {
    match error {
        Some(error) => tracing::warn!(lost, "{lost} lines of this log were lost: {error}"),
        None => tracing::warn!(lost, "{lost} lines of this log were lost: whoever reads it is too slow"),
    }
}

fn say_to_people<W: Write>(to: &mut W, lost: u64, error: Option<&io::Error>) {
    let why = error.map_or_else(|| "this output is read too slowly".to_owned(), ToString::to_string);
    let _ = to.write_all(format!("{lost} lines were lost: {why}\n").as_bytes());
}

/// Lines for people.
#[derive(Debug, Clone)]
pub(crate) enum Terminal {
    /// On standard output.
    Lines(Lines),
    /// On a screen that draws them, and requests by itself.
    Screen(ToScreen),
}

impl Terminal {
    /// Begins writing to standard output.
    ///
    /// # Errors
    ///
    /// When the system gives no thread.
    pub(crate) fn open() -> io::Result<(Self, Flush)> {
        let (lines, flush) = queue(io::stdout(), "output", say_to_people)?;
        Ok((Self::Lines(lines), flush))
    }

    /// Writes one line, or loses it.
    pub(crate) fn line(&self, mut text: String) {
        match self {
            Self::Lines(lines) => {
                text.push('\n');
                lines.push(text.as_bytes());
            }
            Self::Screen(screen) => screen.say(text),
        }
    }

    /// Writes the line of a request, where lines are what is shown of requests.
    pub(crate) fn request_line(&self, text: impl FnOnce() -> String) {
        if matches!(self, Self::Lines(_)) {
            self.line(text());
        }
    }
}

/// Hands lines to a screen. What it has no room for is lost.
#[derive(Debug, Clone)]
pub(crate) struct ToScreen(mpsc::Sender<String>);

/// How many lines may wait for a screen.
const SCREEN_LINES: usize = 256;

impl ToScreen {
    /// Where lines go in, and where the screen takes them out.
    pub(crate) fn new() -> (Self, mpsc::Receiver<String>) {
        let (said, lines) = mpsc::channel(SCREEN_LINES);
        (Self(said), lines)
    }

    fn say(&self, line: String) {
        drop(self.0.try_send(line));
    }
}

impl Write for ToScreen {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        for line in String::from_utf8_lossy(lines).split_inclusive('\n') {
            self.say(line.to_owned());
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging as configured: to files in a folder, else to the journal where standard error leads
/// there, else to standard error; to the screen instead of a terminal that it has taken. A process that already logs
/// goes on as it does.
///
/// # Errors
///
/// When the folder or the journal cannot be written to.
pub(crate) fn start(log: &LogConfig, screen: Option<ToScreen>) -> io::Result<Flush> {
    let level = log.level.clone().unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    if let Some(dir) = &log.dir {
        return start_in(dir, log, level);
    }
    let terminal = io::stderr().is_terminal();
    let usual = || match (terminal, is_journal()) {
        (true, _) => LogFormat::Human,
        (false, true) => LogFormat::Journal,
        (false, false) => LogFormat::Json,
    };
    let format = log.format.unwrap_or_else(usual);
    let (writer, flush, ansi) = match screen.filter(|_| terminal) {
        Some(screen) => {
            let (writer, flush) = queue(screen, "log", say_in_log)?;
            (writer, flush, false)
        }
        None => {
            let (writer, flush) = queue(io::stderr(), "log", say_in_log)?;
            (writer, flush, terminal && is_coloured())
        }
    };
    subscribe(format, level, writer, ansi)?;
    Ok(flush)
}

/// Logs to `agentd.DATE.log` in a folder, a new file each day, old ones removed.
fn start_in(dir: &Path, log: &LogConfig, level: Targets) -> io::Result<Flush> {
    // What writes the files tells of such in words of its own, and on standard error.
    fs::create_dir_all(dir).and_then(|()| fs::read_dir(dir)).map_err(|error| {
        io::Error::new(error.kind(), format!("{} cannot be a folder for it: {error}", dir.display()))
    })?;
    let days = log.keep_days.unwrap_or(config::DEFAULT_LOG_DAYS) as usize;
    let files = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("agentd")
        .filename_suffix("log")
        .max_log_files(days)
        .build(dir)
        .map_err(io::Error::other)?;
    let (writer, flush) = queue(files, "log", say_in_log)?;
    subscribe(log.format.unwrap_or(LogFormat::Human), level, writer, false)?;
    Ok(flush)
}

/// Whether a terminal that writes may be coloured: nobody has said otherwise (`NO_COLOR`, whatever is in it), and it does
/// not say that it obeys nothing.
pub(crate) fn is_coloured() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && !is_dumb()
}

/// Whether the terminal says that it obeys no escape sequences.
pub(crate) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// Whether standard error is the stream that systemd connected to the journal.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    stream.to_str() == Some(&format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn subscribe(format: LogFormat, level: Targets, writer: Lines, ansi: bool) -> io::Result<()> {
    let registry = tracing_subscriber::registry().with(level);
    // An error means that somebody in this process logs already.
    let _ = match format {
        LogFormat::Human => {
            registry.with(fmt::layer().with_writer(writer).with_ansi(ansi).with_target(false)).try_init()
        }
        LogFormat::Json => registry.with(fmt::layer().event_format(Json).with_writer(writer)).try_init(),
        LogFormat::Journal => {
            let journal = tracing_journald::layer()?
                .with_field_prefix(None)
                .with_syslog_identifier("agentd".to_owned());
            registry.with(journal).try_init()
        }
    };
    Ok(())
}
