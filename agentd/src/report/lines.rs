//! Lines that a thread of their own writes, all that have come together in one go.
//!
//! Enters: lines, from anywhere. Leaves: the same lines in their order, or how many there was no room for or could not be
//! written. Nobody who
//! hands one in ever waits. A busy agent has a line for each request, so where they come quickly the thread is not woken for
//! each of them but takes what has come every [`GATHERED`].

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

/// How many lines may wait for their reader.
const QUEUED_LINES: usize = 4096;

/// How long lines gather where the ones before them were written not much longer ago.
const GATHERED: Duration = Duration::from_millis(5);

/// How long the end of the program waits for a slow reader.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is lost goes on being lost for a while: it is said no more often than this.
const SAID_EACH: Duration = Duration::from_secs(1);

/// Room for more than this is given back after it was needed.
const KEPT_BYTES: usize = 64 * 1024;

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: usize,
    /// How many lines had no room or could not be written, in all.
    lost: u64,
    /// Nothing waits, and the thread is to be woken for the next line.
    is_idle: bool,
    is_closed: bool,
    /// The thread has written its last line.
    is_done: bool,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is a line, or there will be none any more; and: all of them are written.
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all lines, once there are some; `None` when there will be none any more. `room` is what they are put into next.
    fn take(&self, room: Vec<u8>) -> Option<(Vec<u8>, u64)> {
        let mut waiting = self.lock();
        while waiting.lines == 0 && !waiting.is_closed {
            waiting.is_idle = true;
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.is_idle = false;
        (waiting.lines > 0).then(|| {
            waiting.lines = 0;
            (std::mem::replace(&mut waiting.text, room), waiting.lost)
        })
    }

    /// Lets lines come together.
    fn gather(&self) {
        let open = |waiting: &mut Waiting| !waiting.is_closed;
        drop(self.changed.wait_timeout_while(self.lock(), GATHERED, open));
    }
}

/// Where lines are handed in.
#[derive(Debug, Clone)]
pub(crate) struct Lines(Arc<Queue>);

impl Lines {
    /// Hands in one line with its end, or loses it.
    pub(super) fn push(&self, line: &[u8]) {
        let mut waiting = self.0.lock();
        if waiting.lines >= QUEUED_LINES {
            waiting.lost += 1;
            return;
        }
        waiting.text.extend_from_slice(line);
        waiting.lines += 1;
        let wakes = std::mem::take(&mut waiting.is_idle);
        drop(waiting);
        if wakes {
            self.0.changed.notify_all();
        }
    }

    /// How many lines had no room or could not be written.
    pub(super) fn lost(&self) -> u64 {
        self.0.lock().lost
    }
}

impl Write for Lines {
    /// One line, as the log hands it in.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Waits, for a while, until what is queued is written when it is dropped.
#[must_use = "what is queued is lost without it"]
pub(super) struct Flush(Arc<Queue>);

impl Drop for Flush {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
        let writing = |waiting: &mut Waiting| !waiting.is_done;
        drop(self.0.changed.wait_timeout_while(self.0.lock(), LAST_WORDS, writing));
    }
}

/// Writes `text` and says how much of it was written before an error, if there was one.
fn write_lines(to: &mut impl Write, text: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < text.len() {
        match to.write(&text[written..]) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(bytes) => written += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((written, error)),
        }
    }
    to.flush().map_err(|error| (written, error))
}

/// Begins writing to `to` on a thread called `name`; `say` tells its readers how many lines were lost, and the error if it
/// was one that kept them from being written.
pub(super) fn start<W: Write + Send + 'static>(
    mut to: W,
    name: &str,
    say: fn(&mut W, u64, Option<&io::Error>),
) -> io::Result<(Lines, Flush)> {
    let queue = Arc::new(Queue::default());
    let taken = Arc::clone(&queue);
    let write = move || {
        let (mut room, mut said, mut said_at) = (Vec::new(), 0, None);
        let mut written_at: Option<Instant> = None;
        let mut failed: Option<io::Error> = None;
        while let Some((mut text, lost)) = taken.take(room) {
            match write_lines(&mut to, &text) {
                Ok(()) => {
                    if lost > said && said_at.is_none_or(|at: Instant| at.elapsed() >= SAID_EACH) {
                        say(&mut to, lost - said, failed.take().as_ref());
                        (said, said_at) = (lost, Some(Instant::now()));
                    }
                }
                // Who cannot be written to is tried again with the next lines.
                Err((written, error)) => {
                    let unwritten = text[written..].iter().filter(|byte| **byte == b'\n').count();
                    taken.lock().lost += unwritten as u64;
                    failed = Some(error);
                }
            }
            text.clear();
            text.shrink_to(KEPT_BYTES);
            room = text;
            let before = written_at.replace(Instant::now());
            if before.is_some_and(|at| at.elapsed() < 2 * GATHERED) {
                taken.gather();
            }
        }
        taken.lock().is_done = true;
        taken.changed.notify_all();
    };
    thread::Builder::new().name(name.to_owned()).spawn(write)?;
    Ok((Lines(Arc::clone(&queue)), Flush(queue)))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes nothing before it may.
    struct Slow {
        leave: mpsc::Receiver<()>,
        begun: mpsc::Sender<()>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.begun.send(());
            let _ = self.leave.recv();
            self.text.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_slow_reader_loses_is_counted_and_said() {
        let (leave, waits) = mpsc::channel();
        let (begun, begins) = mpsc::channel();
        let text = Arc::default();
        let slow = Slow { leave: waits, begun, text: Arc::clone(&text) };
        let say = |to: &mut Slow, lost, why: Option<&io::Error>| {
            assert!(why.is_none());
            to.write_all(format!("{lost} were lost\n").as_bytes()).unwrap();
        };
        let (lines, flush) = start(slow, "slow", say).unwrap();
        lines.push(b"first\n");
        begins.recv().unwrap();
        // The first one is in the writer's hands: all others wait.
        for number in 0..QUEUED_LINES + 2_681 {
            lines.push(format!("{number}\n").as_bytes());
        }
        assert_eq!(lines.lost(), 2_681);
        drop(leave);
        drop(flush);
        let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
        let (said, kept): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.contains("were lost"));
        assert_eq!(said, ["2681 were lost"]);
        let numbers = (0..QUEUED_LINES).map(|number| number.to_string());
        assert_eq!(kept, std::iter::once("first".to_owned()).chain(numbers).collect::<Vec<_>>());
    }

    /// Has room for so many bytes, and for any number once it may.
    struct Full {
        room: usize,
        emptied: mpsc::Receiver<()>,
        refused: mpsc::Sender<()>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.emptied.try_recv().is_ok() {
                self.room = usize::MAX;
            }
            let taken = bytes.len().min(self.room);
            if taken == 0 {
                let _ = self.refused.send(());
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.text.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_full_disk_loses_is_counted_and_said_once_there_is_room() {
        let (empty, emptied) = mpsc::channel();
        let (refused, refusals) = mpsc::channel();
        let text = Arc::default();
        let full = Full { room: 4, emptied, refused, text: Arc::clone(&text) };
        let say = |to: &mut Full, lost, why: Option<&io::Error>| {
            let why = why.map(io::Error::kind);
            to.write_all(format!("{lost} were lost: {why:?}\n").as_bytes()).unwrap();
        };
        let (lines, flush) = start(full, "full", say).unwrap();
        for line in ["one\n", "two\n", "three\n"] {
            lines.push(line.as_bytes());
        }
        refusals.recv().unwrap();
        // One of them may be tried by itself.
        while lines.lost() < 2 {
            thread::yield_now();
        }
        assert_eq!(lines.lost(), 2);
        empty.send(()).unwrap();
        lines.push(b"four\n");
        drop(flush);
        let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "one\nfour\n2 were lost: Some(StorageFull)\n");
        assert_eq!(lines.lost(), 2);
    }

    #[test]
    fn a_reader_that_never_reads_does_not_keep_the_program() {
        let (leave, waits) = mpsc::channel();
        let (begun, begins) = mpsc::channel();
        let slow = Slow { leave: waits, begun, text: Arc::default() };
        let (lines, flush) = start(slow, "slow", |_, _, _| {}).unwrap();
        lines.push(b"one\n");
        begins.recv().unwrap();
        drop(flush);
        drop(leave);
    }
}
