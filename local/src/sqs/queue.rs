//! One queue: what lies in it, what is hidden, and the handles that delete it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use proto::limits;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    error::{Result, SqsError, SqsErrorKind},
    message::Message,
};

/// The most messages of one queue that may be received and not deleted (SQS: about 120,000).
const IN_FLIGHT: usize = 120_000;

/// What a queue was created with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueAttributes {
    /// How long a received message stays hidden unless the receive says otherwise.
    pub visibility: Duration,
    /// How long a message is kept.
    pub retention: Duration,
    /// How long a receive waits unless it says otherwise.
    pub wait: Duration,
    /// The most bytes of a message with its attributes.
    pub message_bytes: usize,
    /// Where messages go that nobody deletes.
    pub dead_letters: Option<DeadLetters>,
}

/// Where a queue's messages go that were received too often (`RedrivePolicy`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetters {
    /// The name of the queue.
    pub queue: Box<str>,
    /// How often a message is received before it goes there.
    pub max_receives: u32,
}

impl Default for QueueAttributes {
    fn default() -> Self {
        Self {
            visibility: Duration::from_secs(30),
            retention: Duration::from_secs(4 * 24 * 60 * 60),
            wait: Duration::ZERO,
            message_bytes: limits::MAILBOX_MESSAGE_BYTES,
            dead_letters: None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) number: u64,
    pub(super) name: Box<str>,
    pub(super) attributes: QueueAttributes,
    /// Whether its messages outlive this program.
    pub(super) is_kept: bool,
    pub(super) usable_at: Instant,
    pub(super) created_ms: u64,
    pub(super) arrived: Notify,
    pub(super) waiting: watch::Sender<usize>,
    pub(super) stock: Mutex<Stock>,
}

#[derive(Debug, Default)]
pub(super) struct Stock {
    pub(super) deleted: bool,
    pub(super) bytes: usize,
    pub(super) ready: VecDeque<Stored>,
    pub(super) hidden: BTreeMap<u64, (Instant, Stored)>,
}

#[derive(Debug)]
pub(super) struct Stored {
    pub(super) number: u64,
    pub(super) message: Arc<Message>,
    pub(super) kept_until: Instant,
    pub(super) receives: u32,
    pub(super) first_received_ms: u64,
    /// The number of the latest receive: an older receipt deletes nothing.
    pub(super) receipt: u64,
}

impl Stock {
    /// Moves what became visible again, and forgets what was kept long enough.
    pub(super) fn refresh(&mut self, now: Instant) {
        if self.hidden.values().any(|(until, _)| *until <= now) {
            let due: Vec<u64> = self
                .hidden
                .iter()
                .filter(|(_, (until, _))| *until <= now)
                .map(|(number, _)| *number)
                .collect();
            for number in due {
                if let Some((_, stored)) = self.hidden.remove(&number) {
                    self.ready.push_back(stored);
                }
            }
        }
        // Kept in the order of sending, but for what came back: those are looked at when taken.
        while self.ready.front().is_some_and(|stored| stored.kept_until <= now) {
            if let Some(stored) = self.ready.pop_front() {
                self.bytes -= stored.message.body.len();
            }
        }
    }

    pub(super) fn take(&mut self, now: Instant, max: usize) -> Vec<Stored> {
        self.refresh(now);
        let mut taken = Vec::new();
        while taken.len() < max && self.hidden.len() < IN_FLIGHT {
            let Some(stored) = self.ready.pop_front() else { break };
            if stored.kept_until <= now {
                self.bytes -= stored.message.body.len();
            } else {
                taken.push(stored);
            }
        }
        taken
    }

    /// When the next hidden message becomes visible.
    pub(super) fn next_visible(&self) -> Option<Instant> {
        self.hidden.values().map(|(until, _)| *until).min()
    }
}

impl Queue {
    pub(super) fn stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a waiting receive for as long as it exists.
pub(super) struct Waiting<'q>(&'q watch::Sender<usize>);

impl<'q> Waiting<'q> {
    pub(super) fn begin(queue: &'q Queue) -> Self {
        queue.waiting.send_modify(|count| *count += 1);
        Self(&queue.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// What a receipt handle says.
pub(super) struct Receipt {
    pub(super) queue: u64,
    pub(super) message: u64,
    pub(super) receive: u64,
}

impl Receipt {
    pub(super) fn encode(&self) -> Box<str> {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.queue.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.message.to_be_bytes());
        bytes[16..].copy_from_slice(&self.receive.to_be_bytes());
        BASE64.encode(bytes).into()
    }

    pub(super) fn decode(text: &str, queue: &Queue) -> Result<Self> {
        let invalid =
            || SqsError::new(SqsErrorKind::ReceiptHandleIsInvalid, "The input receipt handle is invalid.");
        let bytes = BASE64.decode(text).map_err(|_| invalid())?;
        let bytes: [u8; 24] = bytes.try_into().map_err(|_| invalid())?;
        let part = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(number)
        };
        let receipt = Self { queue: part(0), message: part(8), receive: part(16) };
        if receipt.queue == queue.number { Ok(receipt) } else { Err(invalid()) }
    }
}
