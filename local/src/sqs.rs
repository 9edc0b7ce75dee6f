//! SQS standard queues in memory: enter messages, leave the same messages to whoever polls, with
//! the limits, the blocked names and the visibility of the real service.
//!
//! The typed API is what the state machine calls in process; [`wire`] is the same for HTTP.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use proto::limits;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    chaos::{Chaos, Fault},
    clock,
    store::{Filling, Kept, Service, Store},
};

mod error;
mod message;
mod queue;
#[cfg(test)]
mod tests;
pub mod wire;

use self::{
    error::Result,
    message::check_message,
    queue::{Queue, Receipt, Stock, Stored, Waiting},
};
pub use self::{
    error::{SqsError, SqsErrorKind},
    message::{Attribute, AttributeValue, Message, NewMessage, Received},
    queue::{DeadLetters, QueueAttributes},
};

/// How long a deleted queue's name cannot be used again
/// (SQS API Reference, "DeleteQueue": 60 seconds).
pub const NAME_BLOCKED: Duration = Duration::from_secs(60);

/// The most messages in one batch and in one receive (SQS: 10).
pub const BATCH: usize = 10;

/// The longest that a message may be held back (SQS: 15 minutes).
const DELAY: Duration = Duration::from_secs(900);

/// The most bytes that wait in one queue. SQS has no such limit; memory has.
const QUEUE_BYTES: usize = 256 * 1024 * 1024;

/// How late a reordered message becomes visible, so that the next ones overtake it.
const OVERTAKEN: Duration = Duration::from_millis(20);

/// What a receive asks for.
#[derive(Debug, Clone, Copy)]
pub struct ReceiveRequest {
    /// 1 to 10 messages.
    pub max: usize,
    /// How long to wait for the first; the queue's own time by default.
    pub wait: Option<Duration>,
    /// How long they stay hidden; the queue's own time by default.
    pub visibility: Option<Duration>,
}

impl Default for ReceiveRequest {
    fn default() -> Self {
        Self { max: 1, wait: None, visibility: None }
    }
}

/// The service.
#[derive(Debug)]
pub struct Sqs {
    base_url: Box<str>,
    chaos: Arc<Chaos>,
    queues: RwLock<Queues>,
    /// Numbers queues, messages and receives: none of them shares its number with another.
    numbers: AtomicU64,
    kept: Kept,
}

/// A change of a queue that outlives this program, as the store has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record<'a> {
    Sent {
        queue: Cow<'a, str>,
        number: u64,
        id: Cow<'a, str>,
        body: Cow<'a, str>,
        attributes: Cow<'a, BTreeMap<Box<str>, Attribute>>,
        sent_ms: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dead_letter_of: Option<Cow<'a, str>>,
    },
    Deleted {
        queue: Cow<'a, str>,
        number: u64,
    },
    Purged {
        queue: Cow<'a, str>,
    },
}

impl<'a> Record<'a> {
    fn sent(queue: &'a str, number: u64, message: &'a Message) -> Self {
        Self::Sent {
            queue: queue.into(),
            number,
            id: Cow::Borrowed(&message.id),
            body: Cow::Borrowed(&message.body),
            attributes: Cow::Borrowed(&message.attributes),
            sent_ms: message.sent_ms,
            dead_letter_of: message.dead_letter_of.as_deref().map(Cow::Borrowed),
        }
    }
}

#[derive(Debug, Default)]
struct Queues {
    open: BTreeMap<Box<str>, Arc<Queue>>,
    /// When each name may be used again.
    blocked: BTreeMap<Box<str>, Instant>,
}

impl Sqs {
    /// A service without queues, whose queue URLs begin with `base_url`.
    #[must_use]
    pub fn new(base_url: &str, chaos: Arc<Chaos>) -> Self {
        Self {
            base_url: format!("{}/000000000000/", base_url.trim_end_matches('/')).into(),
            chaos,
            queues: RwLock::default(),
            numbers: AtomicU64::new(1),
            kept: Kept::new(),
        }
    }

    /// Takes over the messages of an earlier process, whose changes these are, once the queues are there. All are visible.
    ///
    /// # Errors
    ///
    /// A change is none of SQS'.
    pub fn take_over<'c>(&self, changes: impl Iterator<Item = &'c str>) -> serde_json::Result<()> {
        let mut messages = BTreeMap::<u64, (Box<str>, Message)>::new();
        let mut last = 0;
        for change in changes {
            match serde_json::from_str(change)? {
                Record::Sent { queue, number, id, body, attributes, sent_ms, dead_letter_of } => {
                    last = last.max(number);
                    let attributes = attributes.into_owned();
                    let message = Message {
                        dead_letter_of: dead_letter_of.map(|queue| queue.as_ref().into()),
                        ..Message::new(id.as_ref().into(), body.as_ref().into(), attributes, sent_ms)
                    };
                    messages.insert(number, (queue.as_ref().into(), message));
                }
                Record::Deleted { number, .. } => drop(messages.remove(&number)),
                Record::Purged { queue } => messages.retain(|_, (name, _)| **name != *queue),
            }
        }
        self.numbers.fetch_max(last + 1, Ordering::Relaxed);
        let (now, now_ms) = (Instant::now(), clock::epoch_ms());
        for (number, (name, message)) in messages {
            let Ok(queue) = self.queue_of_any_age(&self.url(&name)) else { continue };
            let age = Duration::from_millis(now_ms.saturating_sub(message.sent_ms));
            let Some(left) = queue.attributes.retention.checked_sub(age) else { continue };
            let mut stock = queue.stock();
            stock.bytes += message.body.len();
            stock.ready.push_back(Stored {
                number,
                message: Arc::new(message),
                kept_until: now + left,
                receives: 0,
                first_received_ms: 0,
                receipt: 0,
            });
        }
        Ok(())
    }

    /// Writes down the messages of the queues that outlive this program.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn fill(&self, file: &mut Filling) -> std::io::Result<()> {
        for queue in self.queues.read().unwrap_or_else(PoisonError::into_inner).open.values() {
            let stock = queue.stock();
            let hidden = stock.hidden.values().map(|(_, stored)| stored);
            for stored in stock.ready.iter().chain(hidden).filter(|_| queue.is_kept) {
                file.add(Service::Queues, &Record::sent(&queue.name, stored.number, &stored.message))?;
            }
        }
        Ok(())
    }

    /// Keeps every change from here on.
    pub fn keep(&self, store: Arc<Store>) {
        // There is one store.
        drop(self.kept.set(store));
    }

    fn keep_change(&self, queue: &Queue, record: &Record<'_>) {
        if let Some(store) = self.kept.get().filter(|_| queue.is_kept) {
            store.append(Service::Queues, record);
        }
    }

    /// The URL of a queue with this name.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("{}{name}", self.base_url)
    }

    /// Creates a queue and returns its URL. It can be used after [`limits::MAILBOX_WARM_UP`].
    ///
    /// # Errors
    ///
    /// The name is not one, belongs to a queue with other attributes, or was deleted within
    /// [`NAME_BLOCKED`].
    pub fn create(&self, name: &str, attributes: QueueAttributes) -> Result<String> {
        self.throttled()?;
        self.create_queue(name, attributes, false)
    }

    /// Creates a queue that is there from the beginning, and whose messages outlive this program.
    ///
    /// # Errors
    ///
    /// Those of [`Sqs::create`].
    pub fn create_kept(&self, name: &str, attributes: QueueAttributes) -> Result<String> {
        self.create_queue(name, attributes, true)
    }

    fn create_queue(&self, name: &str, attributes: QueueAttributes, is_kept: bool) -> Result<String> {
        let is_name = !name.is_empty()
            && name.len() <= 80
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        if !is_name {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length.",
            ));
        }
        let now = Instant::now();
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        queues.blocked.retain(|_, until| *until > now);
        if queues.blocked.contains_key(name) {
            return Err(SqsError::new(
                SqsErrorKind::QueueDeletedRecently,
                "You must wait 60 seconds after deleting a queue before you can create another with the same name.",
            ));
        }
        if let Some(queue) = queues.open.get(name) {
            if queue.attributes != attributes {
                return Err(SqsError::new(
                    SqsErrorKind::QueueNameExists,
                    "A queue already exists with the same name and a different value for an attribute",
                ));
            }
        } else {
            let queue = Queue {
                number: self.number(),
                name: name.into(),
                attributes,
                is_kept,
                usable_at: if is_kept { now } else { now + limits::MAILBOX_WARM_UP },
                created_ms: clock::epoch_ms(),
                arrived: Notify::new(),
                waiting: watch::Sender::new(0),
                stock: Mutex::default(),
            };
            queues.open.insert(name.into(), Arc::new(queue));
        }
        Ok(self.url(name))
    }

    /// Deletes a queue with everything in it.
    ///
    /// # Errors
    ///
    /// There is no such queue.
    pub fn delete_queue(&self, url: &str) -> Result<()> {
        self.throttled()?;
        let queue = self.queue_of_any_age(url)?;
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        queues.open.remove(&queue.name);
        queues.blocked.insert(queue.name.clone(), Instant::now() + NAME_BLOCKED);
        drop(queues);
        *queue.stock() = Stock { deleted: true, ..Stock::default() };
        queue.arrived.notify_waiters();
        Ok(())
    }

    /// Deletes every message of a queue.
    ///
    /// # Errors
    ///
    /// There is no such queue.
    pub fn purge(&self, url: &str) -> Result<()> {
        self.throttled()?;
        let queue = self.queue(url)?;
        let mut stock = queue.stock();
        *stock = Stock::default();
        self.keep_change(&queue, &Record::Purged { queue: Cow::Borrowed(&queue.name) });
        Ok(())
    }

    /// The URLs of the queues whose name begins with `prefix` and comes after `after`, in order.
    ///
    /// # Errors
    ///
    /// Only the throttling that was asked for.
    pub fn list(&self, prefix: &str, after: Option<&str>, max: usize) -> Result<Vec<String>> {
        self.throttled()?;
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        Ok(queues
            .open
            .keys()
            .filter(|name| name.starts_with(prefix) && after.is_none_or(|after| &***name > after))
            .take(max)
            .map(|name| self.url(name))
            .collect())
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// What the service refuses: too large, with a character it does not carry, to no queue.
    pub fn send(&self, url: &str, new: NewMessage) -> Result<Arc<Message>> {
        self.throttled()?;
        let queue = self.queue(url)?;
        let NewMessage { body, attributes, delay } = new;
        if delay > DELAY {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                "Value for parameter DelaySeconds is invalid. Reason: DelaySeconds must be >= 0 and <= 900.",
            ));
        }
        check_message(&body, &attributes, queue.attributes.message_bytes)?;
        let now = Instant::now();
        let message = Arc::new(Message::new(self.message_id(), body, attributes, clock::epoch_ms()));
        if self.chaos.strikes(Fault::Lose) {
            return Ok(message);
        }
        let copies = 1 + usize::from(self.chaos.strikes(Fault::Duplicate));
        let delay = if self.chaos.strikes(Fault::Reorder) { delay + OVERTAKEN } else { delay };
        {
            let mut stock = queue.stock();
            if stock.deleted {
                return Err(no_queue());
            }
            if stock.bytes + copies * message.body.len() > QUEUE_BYTES {
                stock.refresh(now);
            }
            if stock.bytes + copies * message.body.len() > QUEUE_BYTES {
                return Err(SqsError::new(SqsErrorKind::OverLimit, "too much waits in the queue"));
            }
            stock.bytes += copies * message.body.len();
            for _ in 0..copies {
                let stored = Stored {
                    number: self.number(),
                    message: Arc::clone(&message),
                    kept_until: now + queue.attributes.retention,
                    receives: 0,
                    first_received_ms: 0,
                    receipt: 0,
                };
                self.keep_change(&queue, &Record::sent(&queue.name, stored.number, &message));
                if delay.is_zero() {
                    stock.ready.push_back(stored);
                } else {
                    stock.hidden.insert(stored.number, (now + delay, stored));
                }
            }
        }
        queue.arrived.notify_waiters();
        Ok(message)
    }

    /// Receives messages, waiting for the first as long as was asked for. Wakes when one arrives.
    ///
    /// # Errors
    ///
    /// What the service refuses.
    ///
    /// # Cancel safety
    ///
    /// A message is taken and handed out in one step: a future that is dropped while it waits
    /// has taken none.
    pub async fn receive(&self, url: &str, request: ReceiveRequest) -> Result<Vec<Received>> {
        self.throttled()?;
        if !(1..=BATCH).contains(&request.max) {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                format!(
                    "Value {} for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10, if provided.",
                    request.max
                ),
            ));
        }
        if request.wait.is_some_and(|wait| wait > limits::MAILBOX_WAIT) {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                "Value for parameter WaitTimeSeconds is invalid. Reason: Must be >= 0 and <= 20, if provided.",
            ));
        }
        let queue = self.queue(url)?;
        let visibility = request.visibility.unwrap_or(queue.attributes.visibility);
        check_visibility(visibility)?;
        let deadline = Instant::now() + request.wait.unwrap_or(queue.attributes.wait);
        let mut waiting = None;
        loop {
            let arrived = queue.arrived.notified();
            tokio::pin!(arrived);
            // From here on no arrival is missed, also not one between the look and the wait.
            arrived.as_mut().enable();
            let wake_at = {
                let mut stock = queue.stock();
                if stock.deleted {
                    return Err(no_queue());
                }
                let now = Instant::now();
                let mut taken = stock.take(now, request.max);
                if let Some(dead_letters) = &queue.attributes.dead_letters {
                    let is_dead = |stored: &mut Stored| stored.receives >= dead_letters.max_receives;
                    for stored in taken.extract_if(.., is_dead) {
                        stock.bytes -= stored.message.body.len();
                        // The message stays who it is, and as old as it is.
                        let letter = Message::into_dead_letter(stored.message, &queue.name);
                        self.put(&dead_letters.queue, Arc::new(letter), stored.kept_until);
                        let gone =
                            Record::Deleted { queue: Cow::Borrowed(&queue.name), number: stored.number };
                        self.keep_change(&queue, &gone);
                    }
                }
                if !taken.is_empty() {
                    return Ok(self.hand_out(&queue, &mut stock, taken, now + visibility));
                }
                if now >= deadline {
                    return Ok(Vec::new());
                }
                stock.next_visible().map_or(deadline, |visible| visible.min(deadline))
            };
            if waiting.is_none() {
                waiting = Some(Waiting::begin(&queue));
            }
            tokio::select! {
                () = arrived => {}
                () = tokio::time::sleep_until(wake_at) => {}
            }
        }
    }

    fn hand_out(
        &self,
        queue: &Queue,
        stock: &mut Stock,
        taken: Vec<Stored>,
        hidden_until: Instant,
    ) -> Vec<Received> {
        taken
            .into_iter()
            .map(|mut stored| {
                stored.receives += 1;
                stored.receipt = self.number();
                if stored.receives == 1 {
                    stored.first_received_ms = clock::epoch_ms();
                }
                let received = Received {
                    message: Arc::clone(&stored.message),
                    receipt: Receipt { queue: queue.number, message: stored.number, receive: stored.receipt }
                        .encode(),
                    receives: stored.receives,
                    first_received_ms: stored.first_received_ms,
                };
                stock.hidden.insert(stored.number, (hidden_until, stored));
                received
            })
            .collect()
    }

    /// Deletes a received message. A message received again since then is left alone.
    ///
    /// # Errors
    ///
    /// The receipt is not one of this queue.
    pub fn delete(&self, url: &str, receipt: &str) -> Result<()> {
        self.throttled()?;
        let queue = self.queue(url)?;
        let receipt = Receipt::decode(receipt, &queue)?;
        let mut stock = queue.stock();
        let bytes = match stock.hidden.get(&receipt.message) {
            Some((_, stored)) => {
                if stored.receipt != receipt.receive {
                    return Ok(());
                }
                stock.hidden.remove(&receipt.message).map(|(_, stored)| stored.message.body.len())
            }
            // Visible again, and not yet received by anybody else.
            None => {
                let at = stock
                    .ready
                    .iter()
                    .position(|stored| stored.number == receipt.message && stored.receipt == receipt.receive);
                at.and_then(|at| stock.ready.remove(at)).map(|stored| stored.message.body.len())
            }
        };
        stock.bytes -= bytes.unwrap_or(0);
        if bytes.is_some() {
            let gone = Record::Deleted { queue: Cow::Borrowed(&queue.name), number: receipt.message };
            self.keep_change(&queue, &gone);
        }
        Ok(())
    }

    /// Moves every visible message of a queue that takes other queues' dead letters: to the queue it names, or back to
    /// the queue whose dead letters they are. They are new messages there. Gives how many.
    ///
    /// Without a destination SQS moves only what it has put there itself: for a message that was sent there, the task that it
    /// has begun ends with `CouldNotDetermineMessageSource` (SQS Developer Guide, "DLQ and DLQ redrive issues"). Here a task
    /// is over once it was begun, so the call is refused, and nothing is moved.
    ///
    /// # Errors
    ///
    /// There is no such queue, it takes no dead letters, or no destination is named and those of several queues are taken, or
    /// a message there is none of them.
    pub fn move_dead_letters(&self, from: &str, to: Option<&str>) -> Result<usize> {
        self.throttled()?;
        let source = self.queue(&self.url(from))?;
        let not_valid = |what| SqsError::new(SqsErrorKind::InvalidParameterValue, what);
        let of: Vec<Box<str>> = {
            let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
            let is_source = |queue: &&Arc<Queue>| {
                queue.attributes.dead_letters.as_ref().is_some_and(|letters| *letters.queue == *from)
            };
            queues.open.values().filter(is_source).map(|queue| queue.name.clone()).collect()
        };
        let destination = match (to, &*of) {
            (_, []) => return Err(not_valid("Source queue must be configured as a Dead Letter Queue.")),
            (Some(to), _) => to,
            (None, [one]) => one,
            (None, _) => {
                return Err(not_valid(
                    "A destination is needed: several queues have their dead letters here.",
                ));
            }
        };
        let destination = self.queue(&self.url(destination))?;
        let now = Instant::now();
        let moved: Vec<Stored> = {
            let mut stock = source.stock();
            stock.refresh(now);
            let is_known =
                |stored: &Stored| stored.message.dead_letter_of.as_deref() == Some(&*destination.name);
            if to.is_none() && !stock.ready.iter().all(is_known) {
                return Err(not_valid(
                    "CouldNotDetermineMessageSource: a message was sent to the queue itself, so a destination is needed.",
                ));
            }
            let moved: Vec<_> = stock.ready.drain(..).collect();
            stock.bytes -= moved.iter().map(|stored| stored.message.body.len()).sum::<usize>();
            moved
        };
        for stored in &moved {
            let message = Message::new(
                self.message_id(),
                stored.message.body.clone(),
                stored.message.attributes.clone(),
                clock::epoch_ms(),
            );
            self.put(&destination.name, Arc::new(message), now + destination.attributes.retention);
            let gone = Record::Deleted { queue: Cow::Borrowed(&source.name), number: stored.number };
            self.keep_change(&source, &gone);
        }
        Ok(moved.len())
    }

    /// Puts a message into a queue; where there is none, it is lost.
    fn put(&self, queue: &str, message: Arc<Message>, kept_until: Instant) {
        let Ok(queue) = self.queue_of_any_age(&self.url(queue)) else { return };
        let number = self.number();
        let mut stock = queue.stock();
        self.keep_change(&queue, &Record::sent(&queue.name, number, &message));
        stock.bytes += message.body.len();
        let stored = Stored { number, message, kept_until, receives: 0, first_received_ms: 0, receipt: 0 };
        stock.ready.push_back(stored);
        drop(stock);
        queue.arrived.notify_waiters();
    }

    /// Changes for how long, from now on, a received message stays hidden.
    ///
    /// # Errors
    ///
    /// The receipt is not one of this queue, or the message is not in flight.
    pub fn change_visibility(&self, url: &str, receipt: &str, visibility: Duration) -> Result<()> {
        self.throttled()?;
        check_visibility(visibility)?;
        let queue = self.queue(url)?;
        let receipt = Receipt::decode(receipt, &queue)?;
        {
            let mut stock = queue.stock();
            let now = Instant::now();
            match stock.hidden.get_mut(&receipt.message) {
                Some((until, stored)) if stored.receipt == receipt.receive && *until > now => {
                    *until = now + visibility;
                }
                _ => {
                    return Err(SqsError::new(
                        SqsErrorKind::MessageNotInflight,
                        "The message referred to is not in flight.",
                    ));
                }
            }
        }
        // Somebody may wait for it, or for longer than it stays hidden now.
        queue.arrived.notify_waiters();
        Ok(())
    }

    /// How many receives wait on a queue, now and whenever that changes.
    ///
    /// # Errors
    ///
    /// There is no such queue.
    pub fn watch_waiting(&self, url: &str) -> Result<watch::Receiver<usize>> {
        Ok(self.queue_of_any_age(url)?.waiting.subscribe())
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn message_id(&self) -> Box<str> {
        // In the form of a UUID. Unique is enough here: nobody has to guess it.
        let number = self.number();
        format!(
            "{:08x}-{:04x}-4000-8000-{:012x}",
            clock::epoch_ms() >> 8 & 0xffff_ffff,
            number >> 48,
            number & 0xffff_ffff_ffff
        )
        .into()
    }

    fn throttled(&self) -> Result<()> {
        if self.chaos.strikes(Fault::Throttle) {
            return Err(SqsError::new(
                SqsErrorKind::RequestThrottled,
                "The request was denied due to throttling.",
            ));
        }
        Ok(())
    }

    fn queue(&self, url: &str) -> Result<Arc<Queue>> {
        let queue = self.queue_of_any_age(url)?;
        if Instant::now() < queue.usable_at { Err(no_queue()) } else { Ok(queue) }
    }

    fn queue_of_any_age(&self, url: &str) -> Result<Arc<Queue>> {
        let name = url.strip_prefix(&*self.base_url).ok_or_else(no_queue)?;
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        queues.open.get(name).cloned().ok_or_else(no_queue)
    }
}

fn no_queue() -> SqsError {
    SqsError::new(SqsErrorKind::QueueDoesNotExist, "The specified queue does not exist.")
}

fn check_visibility(visibility: Duration) -> Result<()> {
    if visibility > Duration::from_secs(43_200) {
        return Err(SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            "Value for parameter VisibilityTimeout is invalid. Reason: Must be between 0 and 43200, if provided.",
        ));
    }
    Ok(())
}
