//! Where the messages of one connection are handed in, and in which order they leave: what is small and
//! urgent first, and never more bulk ahead of it than the link has just taken on.
//!
//! Enters: messages of every exchange on the connection. Leaves: a [`Queue`] for whoever writes them.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

/// How many small messages may wait to be written. Whoever finds it full waits in line.
const OUTBOX_MESSAGES: usize = 64;

/// A message of more than this counts as bulk.
const BULK_BYTES: usize = 16 * 1024;

/// How many bulk messages may wait to be written: one being written and one ready behind it.
/// Small messages overtake the others, so a download delays them by no more than this.
const BULK_MESSAGES: usize = 2;

/// Control messages are few: heartbeats stop when they are not answered.
const CONTROL_MESSAGES: usize = 16;

/// A message on its way out. The permit is given back when it has been written.
pub(crate) struct Outgoing {
    pub(crate) text: Bytes,
    pub(crate) _bulk: Option<OwnedSemaphorePermit>,
}

/// What overtakes everything that waits.
pub(crate) enum Control {
    /// A message that the session says again by itself, where it has to.
    Text(Bytes),
    /// A message that is kept for a while, as those of exchanges are.
    Word(Bytes),
    /// The edge could not take one of the last messages, and does not say which: they are to be sent again.
    Again,
    /// A ping of the WebSocket itself.
    Ping,
    /// The last word, after what waits now.
    Close(CloseCode, &'static str),
}

/// Where the messages of one connection are handed in.
#[derive(Clone)]
pub(crate) struct Outbox {
    control: mpsc::Sender<Control>,
    data: mpsc::Sender<Outgoing>,
    bulk: Arc<Semaphore>,
}

/// The connection has ended; nothing can be sent on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection to the edge has ended")]
pub(crate) struct LinkGone;

/// What was handed in, for the one that writes it.
pub(crate) struct Queue {
    pub(crate) control: mpsc::Receiver<Control>,
    pub(crate) data: mpsc::Receiver<Outgoing>,
}

impl Outbox {
    /// An empty one, and the end from which it is emptied.
    pub(crate) fn new() -> (Self, Queue) {
        let (control, control_queue) = mpsc::channel(CONTROL_MESSAGES);
        let (data, data_queue) = mpsc::channel(OUTBOX_MESSAGES);
        let bulk = Arc::new(Semaphore::new(BULK_MESSAGES));
        (Self { control, data, bulk }, Queue { control: control_queue, data: data_queue })
    }

    /// Sends a control message ahead of everything that waits. Never waits itself.
    pub(crate) fn send_control(&self, text: String) -> Result<(), LinkGone> {
        self.control.try_send(Control::Text(text.into())).map_err(|_| LinkGone)
    }

    /// Sends a small message ahead of everything that waits, to be sent again if the edge cannot take it. Never waits
    /// itself.
    pub(crate) fn send_word(&self, text: String) -> Result<(), LinkGone> {
        self.control.try_send(Control::Word(text.into())).map_err(|_| LinkGone)
    }

    /// Sends a WebSocket ping.
    pub(crate) fn send_ping(&self) {
        let _ = self.control.try_send(Control::Ping);
    }

    /// Has what was sent of late be sent again.
    pub(crate) fn send_again(&self) {
        let _ = self.control.try_send(Control::Again);
    }

    /// Sends a small message behind everything that waits. Dropped where too much does, so it is for what the edge
    /// asks for again; never waits itself.
    pub(crate) fn send_behind(&self, text: String) {
        let _ = self.data.try_send(Outgoing { text: text.into(), _bulk: None });
    }

    /// Says goodbye after what waits now.
    pub(crate) fn close(&self, code: CloseCode, reason: &'static str) {
        let _ = self.control.try_send(Control::Close(code, reason));
    }

    /// A place in the line of bulk messages. What is sent with it is encoded only once there is a
    /// place, so that bodies wait in their upstream and not here.
    pub(crate) async fn reserve_bulk(&self) -> Result<OwnedSemaphorePermit, LinkGone> {
        Arc::clone(&self.bulk).acquire_owned().await.map_err(|_| LinkGone)
    }

    /// Sends a message of an exchange; waits while too many others wait.
    pub(crate) async fn send(
        &self,
        text: Vec<u8>,
        bulk: Option<OwnedSemaphorePermit>,
    ) -> Result<(), LinkGone> {
        let bulk = match bulk {
            None if text.len() > BULK_BYTES => Some(self.reserve_bulk().await?),
            None => None,
            // A place that is not needed is given back at once.
            Some(permit) => (text.len() > BULK_BYTES).then_some(permit),
        };
        self.data.send(Outgoing { text: exact(text), _bulk: bulk }).await.map_err(|_| LinkGone)
    }
}

/// A text that holds no more memory than it is long, or not much: it is kept for a while after it has been sent, by its
/// length, and most are far shorter than the room that was made for them.
fn exact(text: Vec<u8>) -> Bytes {
    if text.capacity() > text.len() / 4 * 5 { Bytes::copy_from_slice(&text) } else { text.into() }
}
