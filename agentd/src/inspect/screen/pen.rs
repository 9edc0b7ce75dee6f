//! Writing on the terminal, in a thread of its own: one that nobody reads, as after Ctrl-S, holds up no request.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError, mpsc::RecvTimeoutError},
    time::Duration,
};

use tokio::sync::mpsc;

/// How long the end waits for a terminal to take what is written.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// The one that is being written, and the last.
const FRAMES: usize = 2;

/// Where a frame is put together before it is written.
#[derive(Debug, Clone, Default)]
pub(super) struct Sheet(Arc<Mutex<Vec<u8>>>);

impl Sheet {
    /// All that stands on it, off it.
    pub(super) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Sheet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes whole frames, one after the other. A frame says what differs from the one before, so none is ever left out:
/// the next is drawn once this one has been written, and then shows all that happened meanwhile.
#[derive(Debug)]
pub(super) struct Pen {
    /// None at the end.
    frames: Option<mpsc::Sender<Vec<u8>>>,
    written: mpsc::Receiver<io::Result<()>>,
    is_writing: bool,
    /// Says nothing; it closes with the thread.
    ended: std::sync::mpsc::Receiver<()>,
}

impl Pen {
    /// One that writes on standard output.
    ///
    /// # Errors
    ///
    /// When there is none, or no thread.
    pub(super) fn open() -> io::Result<Self> {
        let to = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Self::on(to)
    }

    fn on(mut to: impl Write + Send + 'static) -> io::Result<Self> {
        let (frames, mut next) = mpsc::channel::<Vec<u8>>(FRAMES);
        let (say, written) = mpsc::channel(FRAMES);
        let (alive, ended) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("screen".to_owned()).spawn(move || {
            let _alive: std::sync::mpsc::Sender<()> = alive;
            while let Some(frame) = next.blocking_recv() {
                let done = to.write_all(&frame).and_then(|()| to.flush());
                let is_over = done.is_err();
                // Nobody waits for the last one.
                let _ = say.try_send(done);
                if is_over {
                    return;
                }
            }
        })?;
        Ok(Self { frames: Some(frames), written, is_writing: false, ended })
    }

    /// Whether a frame is being written.
    pub(super) const fn is_writing(&self) -> bool {
        self.is_writing
    }

    /// Begins to write a frame; only when none is being written.
    pub(super) fn write(&mut self, frame: Vec<u8>) {
        debug_assert!(!self.is_writing, "a frame is drawn when the one before has been written");
        if let Some(frames) = self.frames.as_ref().filter(|_| !frame.is_empty()) {
            // If the thread has ended, `written` says why.
            let _ = frames.try_send(frame);
            self.is_writing = true;
        }
    }

    /// Waits until nothing is being written.
    ///
    /// # Errors
    ///
    /// When the terminal could not be written to.
    pub(super) async fn written(&mut self) -> io::Result<()> {
        if self.is_writing {
            let done = self.written.recv().await;
            self.is_writing = false;
            return done.unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into()));
        }
        Ok(())
    }

    /// Writes what is last. A terminal that takes nothing is not waited for longer than a second.
    pub(super) fn finish(&mut self, last: Vec<u8>) {
        let Some(frames) = self.frames.take() else { return };
        let _ = frames.try_send(last);
        drop(frames);
        let ended = self.ended.recv_timeout(LAST_WAIT);
        debug_assert!(ended != Ok(()), "it only closes");
        if ended == Err(RecvTimeoutError::Timeout) {
            tracing::debug!("the terminal takes nothing: it could not be left as it was found");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_written_whole_and_in_order_and_the_last_is_waited_for() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut pen = Pen::on(writer).unwrap();
        for frame in ["one", "two"] {
            pen.write(frame.into());
            assert!(pen.is_writing());
            pen.written().await.unwrap();
            assert!(!pen.is_writing());
        }
        pen.write(Vec::new());
        assert!(!pen.is_writing(), "nothing to write");
        pen.written().await.unwrap();
        pen.write("three".into());
        pen.finish("last".into());
        drop(pen);
        let mut all = String::new();
        io::Read::read_to_string(&mut reader, &mut all).unwrap();
        assert_eq!(all, "onetwothreelast");
    }

    #[tokio::test]
    async fn a_terminal_that_has_gone_is_an_error_and_one_that_takes_nothing_is_left() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut pen = Pen::on(writer).unwrap();
        pen.write("one".into());
        pen.written().await.unwrap_err();
        pen.write("two".into());
        pen.written().await.unwrap_err();
        pen.finish("last".into());

        let (_reader, writer) = io::pipe().unwrap();
        let mut pen = Pen::on(writer).unwrap();
        pen.write(vec![b'x'; 1 << 20]);
        let stuck = tokio::time::timeout(Duration::from_millis(20), pen.written());
        stuck.await.expect_err("nobody reads");
        pen.finish("last".into());
    }
}
