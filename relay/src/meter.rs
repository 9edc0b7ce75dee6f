//! What the public WebSockets of this process hold together: how many there are, and how many bytes of messages
//! that have not come to their end.
//!
//! What they hold comes out of one [`Budget`], as do bodies that may be kept for later (`exchange::hold`). The bytes of a client's message count until the next one is asked for: by
//! then it has been sent on. What comes from agents is counted where it is joined, in `exchange::socket`.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use exchange::budget::{Budget, Share};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// How long a message that takes of the budget may make no progress.
pub const STALLED: Duration = Duration::from_secs(30);

/// The WebSockets of one process.
#[derive(Debug)]
pub struct Meter {
    budget: Rc<Budget>,
    open: Cell<usize>,
}

impl Meter {
    /// With a budget of so many bytes.
    #[must_use]
    pub fn new(budget: usize) -> Rc<Self> {
        Rc::new(Self { budget: Budget::new(budget), open: Cell::new(0) })
    }

    /// What one direction of a WebSocket, or one body, holds.
    #[must_use]
    pub fn share(&self) -> Share {
        self.budget.share()
    }

    /// How many WebSockets are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.get()
    }
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub struct Metered<S> {
    io: S,
    meter: Rc<Meter>,
    /// Bytes since the last message that was taken.
    read: usize,
    share: Share,
    read_at: Instant,
    is_refused: bool,
}

impl<S> Metered<S> {
    /// Counts a connection's bytes, and the connection.
    pub fn new(io: S, meter: Rc<Meter>) -> Self {
        meter.open.set(meter.open.get() + 1);
        let share = meter.share();
        Self { io, meter, read: 0, share, read_at: Instant::now(), is_refused: false }
    }

    /// All that was read has been sent on.
    pub fn release(&mut self) {
        self.read = 0;
        let _ = self.share.hold(0);
    }

    /// Nobody has read for a while: what stands still does so from now on.
    pub fn resume(&mut self) {
        self.read_at = Instant::now();
    }

    /// Whether reading has failed because the budget is spent.
    #[must_use]
    pub const fn is_refused(&self) -> bool {
        self.is_refused
    }

    /// Whether it holds some of the budget for a message that does not go on.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.share.is_of_budget() && self.read_at.elapsed() >= STALLED
    }

    /// Counts bytes that were read. Returns whether there was room for them.
    fn count(&mut self, bytes: usize) -> bool {
        self.read += bytes;
        self.read_at = Instant::now();
        let has_room = self.share.hold(self.read);
        self.is_refused |= !has_room;
        has_room
    }
}

impl<S> Drop for Metered<S> {
    fn drop(&mut self) {
        self.meter.open.set(self.meter.open.get() - 1);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let read = buf.filled().len() - before;
        if self.count(read) {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::OutOfMemory,
            "too many long messages at the same time",
        )))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
