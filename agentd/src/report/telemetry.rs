//! Logs: for people on a terminal, entries of the journal under systemd, files that are rotated in the
//! background, one JSON object a line elsewhere. What people asked to see goes to standard output.
//!
//! All but the journal are written by a thread of their own: a terminal that is stopped, or a pipe that
//! nobody reads, must not stop the agent. What does not fit the queue is lost, counted, and said when there is room.

use std::{
    io::{self, IsTerminal as _, Write},
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use super::json::Json;
use crate::config::{self, LogConfig, LogFormat};
use tokio::sync::mpsc;
use tracing_appender::{
    non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard},
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

/// How many lines this process has lost.
pub(crate) fn lost_lines() -> u64 {
    let counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    counters.iter().map(|counter| counter.dropped_lines() as u64).sum()
}

/// What each queue has lost.
static COUNTERS: Mutex<Vec<ErrorCounter>> = Mutex::new(Vec::new());

/// What is lost goes on being lost for a while: it is said no more often than this.
const SAID_EACH: Duration = Duration::from_secs(1);

/// Says between the lines how many of them were lost.
struct Counted<W> {
    to: W,
    lost: Arc<OnceLock<ErrorCounter>>,
    said: usize,
    at: Option<Instant>,
    say: fn(&mut W, usize),
}

impl<W: Write> Counted<W> {
    fn tell(&mut self) {
        let lost = self.lost.get().map_or(0, ErrorCounter::dropped_lines);
        if lost > self.said && self.at.is_none_or(|at| at.elapsed() >= SAID_EACH) {
            (self.say)(&mut self.to, lost - self.said);
            self.said = lost;
            self.at = Some(Instant::now());
        }
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write(bytes)
    }

    /// One line, as the queue holds it.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.tell();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn queue<W: Write + Send + 'static>(to: W, name: &str, say: fn(&mut W, usize)) -> (NonBlocking, Flush) {
    let lost = Arc::new(OnceLock::new());
    let counted = Counted { to, lost: Arc::clone(&lost), said: 0, at: None, say };
    let (writer, worker) =
        NonBlockingBuilder::default().buffered_lines_limit(QUEUED_LINES).thread_name(name).finish(counted);
    COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).push(writer.error_counter());
    let _ = lost.set(writer.error_counter());
    (writer, Flush { _worker: worker })
}

/// Says it as any other line: behind those that wait.
fn say_in_log<W>(_: &mut W, lost: usize) {
    tracing::warn!(lost, "{lost} lines of this log were lost: whoever reads it is too slow");
}

fn say_to_people<W: Write>(to: &mut W, lost: usize) {
    let _ = to.write_all(format!("{lost} lines were lost: this output is read too slowly\n").as_bytes());
}

/// Lines for people.
#[derive(Debug, Clone)]
pub(crate) enum Terminal {
    /// On standard output.
    Lines(NonBlocking),
    /// On a screen that draws them, and requests by itself.
    Screen(ToScreen),
}

impl Terminal {
    /// Begins writing to standard output.
    pub(crate) fn open() -> (Self, Flush) {
        let (writer, flush) = queue(io::stdout(), "output", say_to_people);
        (Self::Lines(writer), flush)
    }

    /// Writes one line, or loses it.
    pub(crate) fn line(&self, mut text: String) {
        match self {
            Self::Lines(writer) => {
                text.push('\n');
                let _ = writer.clone().write_all(text.as_bytes());
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
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.say(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
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
            let (writer, flush) = queue(screen, "log", say_in_log);
            (writer, flush, false)
        }
        None => {
            let (writer, flush) = queue(io::stderr(), "log", say_in_log);
            (writer, flush, terminal)
        }
    };
    subscribe(format, level, writer, ansi)?;
    Ok(flush)
}

/// Logs to `agentd.DATE.log` in a folder, a new file each day, old ones removed.
fn start_in(dir: &Path, log: &LogConfig, level: Targets) -> io::Result<Flush> {
    let days = log.keep_days.unwrap_or(config::DEFAULT_LOG_DAYS) as usize;
    let files = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("agentd")
        .filename_suffix("log")
        .max_log_files(days)
        .build(dir)
        .map_err(io::Error::other)?;
    let (writer, flush) = queue(files, "log", say_in_log);
    subscribe(log.format.unwrap_or(LogFormat::Human), level, writer, false)?;
    Ok(flush)
}

/// Whether standard error is the stream that systemd connected to the journal.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    stream.to_str() == Some(&format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn subscribe(format: LogFormat, level: Targets, writer: NonBlocking, ansi: bool) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes nothing before it may.
    struct Slow {
        leave: mpsc::Receiver<()>,
        lines: Arc<Mutex<Vec<String>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.leave.recv();
            let line = String::from_utf8_lossy(bytes).into_owned();
            self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_slow_reader_loses_is_counted_and_said() {
        let (leave, waits) = mpsc::channel();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (writer, flush) = queue(Slow { leave: waits, lines: Arc::clone(&lines) }, "slow", say_to_people);
        let lost = writer.error_counter();
        let terminal = Terminal::Lines(writer);
        for number in 0..QUEUED_LINES + 2_681 {
            terminal.line(number.to_string());
        }
        let lost = lost.dropped_lines();
        // One may be in the writer's hands already.
        assert!((2_680..=2_681).contains(&lost), "{lost}");
        assert!(lost_lines() >= lost as u64);
        drop(leave);
        drop(flush);
        let lines = lines.lock().unwrap();
        let said: Vec<_> = lines.iter().filter(|line| line.contains("were lost")).collect();
        assert_eq!(said, [&format!("{lost} lines were lost: this output is read too slowly\n")]);
        assert_eq!(lines.len(), QUEUED_LINES + 2_681 - lost + 1, "all others are there");
    }
}
