//! SQS standard queues in memory: enter messages, leave the same messages to whoever polls, with
//! the limits, the blocked names and the visibility of the real service.
//!
//! The typed API is what the state machine calls in process; [`wire`] is the same for HTTP.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use md5::{Digest as _, Md5};
use proto::limits;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    chaos::{Chaos, Fault},
    clock,
};

pub mod wire;

/// How long a deleted queue's name cannot be used again
/// (SQS API Reference, "DeleteQueue": 60 seconds).
pub const NAME_BLOCKED: Duration = Duration::from_secs(60);

/// The most messages in one batch and in one receive (SQS: 10).
pub const BATCH: usize = 10;

/// The most attributes of one message (SQS: 10).
const ATTRIBUTES: usize = 10;

/// The longest that a message may be held back (SQS: 15 minutes).
const DELAY: Duration = Duration::from_secs(900);

/// The most messages of one queue that may be received and not deleted (SQS: about 120,000).
const IN_FLIGHT: usize = 120_000;

/// The most bytes that wait in one queue. SQS has no such limit; memory has.
const QUEUE_BYTES: usize = 256 * 1024 * 1024;

/// How late a reordered message becomes visible, so that the next ones overtake it.
const OVERTAKEN: Duration = Duration::from_millis(20);

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind:?}: {message}")]
pub struct SqsError {
    /// Which of the service's errors it is.
    pub kind: SqsErrorKind,
    /// Words for people.
    pub message: String,
}

/// The service's errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is named as in the SQS API Reference")]
pub enum SqsErrorKind {
    QueueDoesNotExist,
    QueueDeletedRecently,
    QueueNameExists,
    InvalidMessageContents,
    ReceiptHandleIsInvalid,
    MessageNotInflight,
    InvalidAttributeName,
    InvalidAttributeValue,
    InvalidParameterValue,
    MissingParameter,
    EmptyBatchRequest,
    TooManyEntriesInBatchRequest,
    BatchEntryIdsNotDistinct,
    InvalidBatchEntryId,
    BatchRequestTooLong,
    OverLimit,
    RequestThrottled,
    UnsupportedOperation,
    SerializationException,
}

impl SqsErrorKind {
    /// The name of the error in the JSON protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::QueueDoesNotExist => "QueueDoesNotExist",
            Self::QueueDeletedRecently => "QueueDeletedRecently",
            Self::QueueNameExists => "QueueNameExists",
            Self::InvalidMessageContents => "InvalidMessageContents",
            Self::ReceiptHandleIsInvalid => "ReceiptHandleIsInvalid",
            Self::MessageNotInflight => "MessageNotInflight",
            Self::InvalidAttributeName => "InvalidAttributeName",
            Self::InvalidAttributeValue => "InvalidAttributeValue",
            Self::InvalidParameterValue => "InvalidParameterValue",
            Self::MissingParameter => "MissingParameter",
            Self::EmptyBatchRequest => "EmptyBatchRequest",
            Self::TooManyEntriesInBatchRequest => "TooManyEntriesInBatchRequest",
            Self::BatchEntryIdsNotDistinct => "BatchEntryIdsNotDistinct",
            Self::InvalidBatchEntryId => "InvalidBatchEntryId",
            Self::BatchRequestTooLong => "BatchRequestTooLong",
            Self::OverLimit => "OverLimit",
            Self::RequestThrottled => "RequestThrottled",
            Self::UnsupportedOperation => "UnsupportedOperation",
            Self::SerializationException => "SerializationException",
        }
    }

    /// The name of the error in the older query protocol, which the service sends beside it.
    #[must_use]
    pub fn query_name(self) -> &'static str {
        match self {
            Self::QueueDoesNotExist => "AWS.SimpleQueueService.NonExistentQueue",
            Self::QueueDeletedRecently => "AWS.SimpleQueueService.QueueDeletedRecently",
            Self::QueueNameExists => "QueueAlreadyExists",
            Self::MessageNotInflight => "AWS.SimpleQueueService.MessageNotInflight",
            Self::EmptyBatchRequest => "AWS.SimpleQueueService.EmptyBatchRequest",
            Self::TooManyEntriesInBatchRequest => "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
            Self::BatchEntryIdsNotDistinct => "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
            Self::InvalidBatchEntryId => "AWS.SimpleQueueService.InvalidBatchEntryId",
            Self::BatchRequestTooLong => "AWS.SimpleQueueService.BatchRequestTooLong",
            Self::UnsupportedOperation => "AWS.SimpleQueueService.UnsupportedOperation",
            other => other.name(),
        }
    }
}

impl SqsError {
    /// An error of this kind.
    pub fn new(kind: SqsErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

type Result<T> = std::result::Result<T, SqsError>;

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
}

impl Default for QueueAttributes {
    fn default() -> Self {
        Self {
            visibility: Duration::from_secs(30),
            retention: Duration::from_secs(4 * 24 * 60 * 60),
            wait: Duration::ZERO,
            message_bytes: limits::MAILBOX_MESSAGE_BYTES,
        }
    }
}

/// One attribute of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// `String`, `Number` or `Binary`, perhaps with a label after a dot.
    pub data_type: Box<str>,
    /// Its value.
    pub value: AttributeValue,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttributeValue {
    /// Text, also of a number.
    Text(Box<str>),
    /// Bytes.
    Binary(Box<[u8]>),
}

impl Attribute {
    /// An attribute of type `String`.
    #[must_use]
    pub fn text(value: &str) -> Self {
        Self { data_type: "String".into(), value: AttributeValue::Text(value.into()) }
    }

    /// The value, where it is text.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            AttributeValue::Text(text) => Some(text),
            AttributeValue::Binary(_) => None,
        }
    }
}

/// A message to be sent.
#[derive(Debug, Clone, Default)]
pub struct NewMessage {
    /// The body.
    pub body: Box<str>,
    /// The attributes, by name.
    pub attributes: BTreeMap<Box<str>, Attribute>,
    /// For how long nobody receives it.
    pub delay: Duration,
}

/// A message as it was sent.
#[derive(Debug)]
pub struct Message {
    /// The id that the sender was told.
    pub id: Box<str>,
    /// The body.
    pub body: Box<str>,
    /// The body's MD5, in hexadecimal digits.
    pub body_md5: Box<str>,
    /// The attributes, by name.
    pub attributes: BTreeMap<Box<str>, Attribute>,
    /// The attributes' MD5; nothing where there are none.
    pub attributes_md5: Option<Box<str>>,
    /// When it was sent, in epoch milliseconds.
    pub sent_ms: u64,
}

/// A message as it was received.
#[derive(Debug, Clone)]
pub struct Received {
    /// The message.
    pub message: Arc<Message>,
    /// What deletes it.
    pub receipt: Box<str>,
    /// How often it was received, this time included.
    pub receives: u32,
    /// When it was first received, in epoch milliseconds.
    pub first_received_ms: u64,
}

impl Received {
    /// What the service itself says about the message, as far as a receive that names `wanted` is told.
    pub(crate) fn system_attributes(&self, wanted: &[String]) -> Vec<(&'static str, u64)> {
        let mut attributes = vec![
            ("ApproximateFirstReceiveTimestamp", self.first_received_ms),
            ("ApproximateReceiveCount", self.receives.into()),
            ("SentTimestamp", self.message.sent_ms),
        ];
        attributes.retain(|(name, _)| wanted.iter().any(|wanted| wanted == "All" || wanted == name));
        attributes
    }
}

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
}

#[derive(Debug, Default)]
struct Queues {
    open: BTreeMap<Box<str>, Arc<Queue>>,
    /// When each name may be used again.
    blocked: BTreeMap<Box<str>, Instant>,
}

#[derive(Debug)]
struct Queue {
    number: u64,
    name: Box<str>,
    attributes: QueueAttributes,
    usable_at: Instant,
    created_ms: u64,
    arrived: Notify,
    waiting: watch::Sender<usize>,
    stock: Mutex<Stock>,
}

#[derive(Debug, Default)]
struct Stock {
    deleted: bool,
    bytes: usize,
    ready: VecDeque<Stored>,
    hidden: BTreeMap<u64, (Instant, Stored)>,
}

#[derive(Debug)]
struct Stored {
    number: u64,
    message: Arc<Message>,
    kept_until: Instant,
    receives: u32,
    first_received_ms: u64,
    /// The number of the latest receive: an older receipt deletes nothing.
    receipt: u64,
}

impl Stock {
    /// Moves what became visible again, and forgets what was kept long enough.
    fn refresh(&mut self, now: Instant) {
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

    fn take(&mut self, now: Instant, max: usize) -> Vec<Stored> {
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
    fn next_visible(&self) -> Option<Instant> {
        self.hidden.values().map(|(until, _)| *until).min()
    }
}

impl Queue {
    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a waiting receive for as long as it exists.
struct Waiting<'q>(&'q watch::Sender<usize>);

impl<'q> Waiting<'q> {
    fn begin(queue: &'q Queue) -> Self {
        queue.waiting.send_modify(|count| *count += 1);
        Self(&queue.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
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
                usable_at: now + limits::MAILBOX_WARM_UP,
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
        *self.queue(url)?.stock() = Stock::default();
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
        let message = Arc::new(Message {
            id: self.message_id(),
            body_md5: hex(&Md5::digest(body.as_bytes())),
            attributes_md5: attributes_md5(&attributes),
            body,
            attributes,
            sent_ms: clock::epoch_ms(),
        });
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
                let taken = stock.take(now, request.max);
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
        Ok(())
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

fn check_message(body: &str, attributes: &BTreeMap<Box<str>, Attribute>, limit: usize) -> Result<()> {
    if body.is_empty() {
        return Err(SqsError::new(
            SqsErrorKind::MissingParameter,
            "The request must contain the parameter MessageBody.",
        ));
    }
    if attributes.len() > ATTRIBUTES {
        return Err(SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            "Number of message attributes exceeds the allowed maximum 10.",
        ));
    }
    let mut bytes = body.len();
    let mut carried = is_carried(body);
    for (name, attribute) in attributes {
        let is_name = !name.is_empty()
            && name.len() <= 256
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        let base = attribute.data_type.split('.').next().unwrap_or_default();
        let (value_bytes, fits) = match &attribute.value {
            AttributeValue::Text(text) => {
                carried &= is_carried(text);
                (text.len(), base == "String" || base == "Number")
            }
            AttributeValue::Binary(bytes) => (bytes.len(), base == "Binary"),
        };
        if !is_name || !fits || value_bytes == 0 {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                format!("The message attribute '{name}' has an invalid name, type or value."),
            ));
        }
        bytes += name.len() + attribute.data_type.len() + value_bytes;
    }
    if bytes > limit {
        return Err(SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            format!(
                "One or more parameters are invalid. Reason: Message must be shorter than {limit} bytes."
            ),
        ));
    }
    if !carried {
        return Err(SqsError::new(
            SqsErrorKind::InvalidMessageContents,
            "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF.",
        ));
    }
    Ok(())
}

/// Whether every character is one that SQS carries.
fn is_carried(text: &str) -> bool {
    let is_refused = |byte: u8| byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r');
    // Two passes that use vector instructions: control characters, and what begins like U+FFFE.
    let controls = text
        .as_bytes()
        .chunks(64)
        .any(|piece| piece.iter().fold(false, |refused, &byte| refused | is_refused(byte)));
    !controls && !text.contains(['\u{fffe}', '\u{ffff}'])
}

fn attributes_md5(attributes: &BTreeMap<Box<str>, Attribute>) -> Option<Box<str>> {
    if attributes.is_empty() {
        return None;
    }
    // By name, in the order of the names' bytes: length and text of name and type, one byte for
    // the kind of value, length and value (SQS Developer Guide, "message attributes").
    let mut md5 = Md5::new();
    let add = |md5: &mut Md5, bytes: &[u8]| {
        md5.update(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        md5.update(bytes);
    };
    for (name, attribute) in attributes {
        add(&mut md5, name.as_bytes());
        add(&mut md5, attribute.data_type.as_bytes());
        match &attribute.value {
            AttributeValue::Text(text) => {
                md5.update([1]);
                add(&mut md5, text.as_bytes());
            }
            AttributeValue::Binary(bytes) => {
                md5.update([2]);
                add(&mut md5, bytes);
            }
        }
    }
    Some(hex(&md5.finalize()))
}

fn hex(bytes: &[u8]) -> Box<str> {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text.into()
}

/// What a receipt handle says.
struct Receipt {
    queue: u64,
    message: u64,
    receive: u64,
}

impl Receipt {
    fn encode(&self) -> Box<str> {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.queue.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.message.to_be_bytes());
        bytes[16..].copy_from_slice(&self.receive.to_be_bytes());
        BASE64.encode(bytes).into()
    }

    fn decode(text: &str, queue: &Queue) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::ChaosConfig;

    async fn with_queue(chaos: ChaosConfig, attributes: QueueAttributes) -> (Arc<Sqs>, String) {
        let sqs = Arc::new(Sqs::new("http://127.0.0.1:1", Arc::new(Chaos::new(chaos))));
        let url = sqs.create("mailbox", attributes).unwrap();
        tokio::time::advance(limits::MAILBOX_WARM_UP).await;
        (sqs, url)
    }

    async fn queue() -> (Arc<Sqs>, String) {
        with_queue(ChaosConfig::default(), QueueAttributes::default()).await
    }

    fn message(body: &str) -> NewMessage {
        NewMessage { body: body.into(), ..NewMessage::default() }
    }

    fn waiting(secs: u64) -> ReceiveRequest {
        ReceiveRequest { max: 10, wait: Some(Duration::from_secs(secs)), visibility: None }
    }

    fn bodies(received: &[Received]) -> Vec<&str> {
        received.iter().map(|received| &*received.message.body).collect()
    }

    async fn receive(sqs: &Sqs, url: &str) -> Vec<Received> {
        sqs.receive(url, waiting(0)).await.unwrap()
    }

    fn kind<T: std::fmt::Debug>(result: Result<T>) -> SqsErrorKind {
        result.unwrap_err().kind
    }

    #[tokio::test(start_paused = true)]
    async fn a_received_message_is_hidden_until_it_is_deleted_or_comes_back() {
        let (sqs, url) = queue().await;
        sqs.send(&url, message("a")).unwrap();
        let first = receive(&sqs, &url).await;
        assert_eq!((bodies(&first), first[0].receives), (vec!["a"], 1));
        assert!(receive(&sqs, &url).await.is_empty());
        tokio::time::advance(Duration::from_secs(30)).await;
        let second = receive(&sqs, &url).await;
        assert_eq!(second[0].receives, 2);
        assert_ne!(first[0].receipt, second[0].receipt);
        // The older receipt deletes nothing any more.
        sqs.delete(&url, &first[0].receipt).unwrap();
        tokio::time::advance(Duration::from_secs(30)).await;
        let third = receive(&sqs, &url).await;
        assert_eq!(bodies(&third), ["a"]);
        sqs.delete(&url, &third[0].receipt).unwrap();
        sqs.delete(&url, &third[0].receipt).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(receive(&sqs, &url).await.is_empty());
        assert_eq!(sqs.queue(&url).unwrap().stock().bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_visible_message_can_still_be_deleted_by_whoever_received_it_last() {
        let (sqs, url) = queue().await;
        sqs.send(&url, message("a")).unwrap();
        let received = receive(&sqs, &url).await;
        tokio::time::advance(Duration::from_secs(31)).await;
        sqs.queue(&url).unwrap().stock().refresh(Instant::now());
        sqs.delete(&url, &received[0].receipt).unwrap();
        assert!(receive(&sqs, &url).await.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_poll_wakes_at_once() {
        let (sqs, url) = queue().await;
        let start = Instant::now();
        let poll = tokio::spawn({
            let (sqs, url) = (Arc::clone(&sqs), url.clone());
            async move { sqs.receive(&url, waiting(20)).await }
        });
        sqs.watch_waiting(&url).unwrap().wait_for(|count| *count == 1).await.unwrap();
        tokio::time::advance(Duration::from_secs(3)).await;
        sqs.send(&url, message("a")).unwrap();
        assert_eq!(bodies(&poll.await.unwrap().unwrap()), ["a"]);
        assert_eq!(start.elapsed(), Duration::from_secs(3));
        // And an empty one ends after its time.
        let start = Instant::now();
        assert!(sqs.receive(&url, waiting(20)).await.unwrap().is_empty());
        assert_eq!(start.elapsed(), Duration::from_secs(20));
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_poll_sees_a_message_come_back() {
        let (sqs, url) = queue().await;
        sqs.send(&url, message("a")).unwrap();
        let request = ReceiveRequest { visibility: Some(Duration::from_secs(5)), ..waiting(20) };
        let start = Instant::now();
        assert_eq!(sqs.receive(&url, request).await.unwrap().len(), 1);
        let again = sqs.receive(&url, request).await.unwrap();
        assert_eq!((again.len(), start.elapsed()), (1, Duration::from_secs(5)));
        let end_now = sqs.change_visibility(&url, &again[0].receipt, Duration::ZERO);
        assert_eq!(end_now, Ok(()));
        assert_eq!(sqs.receive(&url, request).await.unwrap().len(), 1);
        assert_eq!(
            kind(sqs.change_visibility(&url, &again[0].receipt, Duration::ZERO)),
            SqsErrorKind::MessageNotInflight
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_poll_that_is_given_up_takes_no_message_with_it() {
        let (sqs, url) = queue().await;
        let poll = tokio::spawn({
            let (sqs, url) = (Arc::clone(&sqs), url.clone());
            async move { sqs.receive(&url, waiting(20)).await }
        });
        let mut count = sqs.watch_waiting(&url).unwrap();
        count.wait_for(|count| *count == 1).await.unwrap();
        poll.abort();
        count.wait_for(|count| *count == 0).await.unwrap();
        sqs.send(&url, message("a")).unwrap();
        assert_eq!(bodies(&receive(&sqs, &url).await), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn delays_and_retention_are_kept() {
        let attributes = QueueAttributes { retention: Duration::from_secs(60), ..QueueAttributes::default() };
        let (sqs, url) = with_queue(ChaosConfig::default(), attributes).await;
        sqs.send(&url, NewMessage { delay: Duration::from_secs(2), ..message("late") }).unwrap();
        sqs.send(&url, message("early")).unwrap();
        assert_eq!(bodies(&receive(&sqs, &url).await), ["early"]);
        assert_eq!(bodies(&sqs.receive(&url, waiting(5)).await.unwrap()), ["late"]);
        sqs.send(&url, message("old")).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(receive(&sqs, &url).await.is_empty());
        let too_late = NewMessage { delay: Duration::from_secs(901), ..message("x") };
        assert_eq!(kind(sqs.send(&url, too_late)), SqsErrorKind::InvalidParameterValue);
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_usable_late_and_blocked_after_deletion() {
        let sqs = Sqs::new("http://127.0.0.1:1", Arc::default());
        let url = sqs.create("m", QueueAttributes::default()).unwrap();
        assert_eq!(url, "http://127.0.0.1:1/000000000000/m");
        assert_eq!(kind(sqs.send(&url, message("a"))), SqsErrorKind::QueueDoesNotExist);
        tokio::time::advance(limits::MAILBOX_WARM_UP).await;
        sqs.send(&url, message("a")).unwrap();
        assert!(sqs.create("m", QueueAttributes::default()).is_ok());
        let other = QueueAttributes { visibility: Duration::from_secs(1), ..QueueAttributes::default() };
        assert_eq!(kind(sqs.create("m", other.clone())), SqsErrorKind::QueueNameExists);
        sqs.delete_queue(&url).unwrap();
        assert_eq!(kind(sqs.send(&url, message("a"))), SqsErrorKind::QueueDoesNotExist);
        assert_eq!(kind(sqs.create("m", other.clone())), SqsErrorKind::QueueDeletedRecently);
        tokio::time::advance(NAME_BLOCKED).await;
        assert!(sqs.create("m", other).is_ok());
        for bad in ["", "a b", "x.fifo", &"a".repeat(81)] {
            assert_eq!(
                kind(sqs.create(bad, QueueAttributes::default())),
                SqsErrorKind::InvalidParameterValue
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn deleting_a_queue_ends_who_waits_for_it() {
        let (sqs, url) = queue().await;
        let poll = tokio::spawn({
            let (sqs, url) = (Arc::clone(&sqs), url.clone());
            async move { sqs.receive(&url, waiting(20)).await }
        });
        sqs.watch_waiting(&url).unwrap().wait_for(|count| *count == 1).await.unwrap();
        sqs.delete_queue(&url).unwrap();
        assert_eq!(kind(poll.await.unwrap()), SqsErrorKind::QueueDoesNotExist);
    }

    #[tokio::test(start_paused = true)]
    async fn refuses_what_the_service_refuses() {
        let (sqs, url) = queue().await;
        let send = |body: &str| sqs.send(&url, message(body));
        let largest = "x".repeat(limits::MAILBOX_MESSAGE_BYTES);
        assert!(send(&largest).is_ok());
        assert_eq!(kind(send(&format!("{largest}x"))), SqsErrorKind::InvalidParameterValue);
        assert_eq!(kind(send("")), SqsErrorKind::MissingParameter);
        for bad in ["\u{0}", "a\u{1f}b", "\u{b}", "\u{fffe}", "\u{ffff}"] {
            assert_eq!(kind(send(bad)), SqsErrorKind::InvalidMessageContents, "{bad:?}");
        }
        for good in ["\t\r\n", "\u{7f}", "\u{fffd}", "\u{10000}", "\u{1f600}", "\u{d7ff}\u{e000}"] {
            assert!(send(good).is_ok(), "{good:?}");
        }
        let with = |attribute: Attribute, name: &str| {
            let attributes = BTreeMap::from([(name.into(), attribute)]);
            sqs.send(&url, NewMessage { attributes, ..message("x") })
        };
        assert!(with(Attribute::text("v"), "request_id").is_ok());
        assert_eq!(kind(with(Attribute::text(""), "a")), SqsErrorKind::InvalidParameterValue);
        assert_eq!(kind(with(Attribute::text("\u{1}"), "a")), SqsErrorKind::InvalidMessageContents);
        assert_eq!(kind(with(Attribute::text("v"), "a b")), SqsErrorKind::InvalidParameterValue);
        // Attributes count: name, type and value.
        let nearly = "x".repeat(limits::MAILBOX_MESSAGE_BYTES - 10);
        let attributes = BTreeMap::from([("name".into(), Attribute::text("v"))]);
        assert_eq!(
            kind(sqs.send(&url, NewMessage { attributes, ..message(&nearly) })),
            SqsErrorKind::InvalidParameterValue
        );
        assert_eq!(kind(sqs.receive(&url, waiting(21)).await), SqsErrorKind::InvalidParameterValue);
        let eleven = ReceiveRequest { max: 11, ..waiting(0) };
        assert_eq!(kind(sqs.receive(&url, eleven).await), SqsErrorKind::InvalidParameterValue);
        assert_eq!(kind(sqs.delete(&url, "nonsense")), SqsErrorKind::ReceiptHandleIsInvalid);
        assert_eq!(
            kind(sqs.receive("http://elsewhere/m", waiting(0)).await),
            SqsErrorKind::QueueDoesNotExist
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_receipt_belongs_to_its_queue() {
        let (sqs, url) = queue().await;
        sqs.send(&url, message("a")).unwrap();
        let received = receive(&sqs, &url).await;
        let other = sqs.create("other", QueueAttributes::default()).unwrap();
        tokio::time::advance(limits::MAILBOX_WARM_UP).await;
        assert_eq!(kind(sqs.delete(&other, &received[0].receipt)), SqsErrorKind::ReceiptHandleIsInvalid);
    }

    #[tokio::test(start_paused = true)]
    async fn bad_days_duplicate_reorder_and_throttle() {
        let (sqs, url) =
            with_queue(ChaosConfig::default().with(Fault::Duplicate, 1.0), QueueAttributes::default()).await;
        sqs.send(&url, message("a")).unwrap();
        let received = receive(&sqs, &url).await;
        assert_eq!(bodies(&received), ["a", "a"]);
        assert_ne!(received[0].receipt, received[1].receipt);

        let chaos = "seed=3,reorder=0.5".parse().unwrap();
        let (sqs, url) = with_queue(chaos, QueueAttributes::default()).await;
        for body in 0..10 {
            sqs.send(&url, message(&body.to_string())).unwrap();
        }
        let mut order = Vec::new();
        while order.len() < 10 {
            let received = sqs.receive(&url, waiting(1)).await.unwrap();
            order.extend(received.iter().map(|received| received.message.body.clone()));
        }
        let mut sorted = order.clone();
        sorted.sort();
        assert_ne!(order, sorted);
        assert_eq!(sorted.concat(), "0123456789");

        let (sqs, url) =
            with_queue(ChaosConfig::default().with(Fault::Lose, 1.0), QueueAttributes::default()).await;
        sqs.send(&url, message("a")).unwrap();
        assert!(sqs.receive(&url, waiting(10)).await.unwrap().is_empty(), "its sender knows nothing of it");

        let (sqs, url) =
            with_queue(ChaosConfig::default().with(Fault::Throttle, 0.5), QueueAttributes::default()).await;
        let throttled = (0..100).filter(|_| sqs.send(&url, message("a")).is_err()).count();
        assert!((30..70).contains(&throttled), "{throttled}");
    }

    #[test]
    fn digests_are_those_of_the_service() {
        // The example of RFC 1321, and an attribute digest computed by hand from its definition.
        assert_eq!(&*hex(&Md5::digest(b"message digest")), "f96b697d7cb7938d525a2f31aaf161d0");
        let attributes = BTreeMap::from([("a".into(), Attribute::text("b"))]);
        let by_hand = b"\0\0\0\x01a\0\0\0\x06String\x01\0\0\0\x01b";
        assert_eq!(attributes_md5(&attributes), Some(hex(&Md5::digest(by_hand))));
        assert_eq!(attributes_md5(&BTreeMap::new()), None);
    }
}
