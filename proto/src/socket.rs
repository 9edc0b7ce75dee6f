//! The messages of one public WebSocket over the link: packing, order, credit, loss. Without IO.
//!
//! Each end of the link has a [`Flow`] for each socket. Enters: messages of its own WebSocket ([`Flow::send`]),
//! [`Batch`]es of the other end, the passing of time. Leaves: batches to send ([`Flow::poll_transmit`]), messages for
//! its own WebSocket ([`Flow::poll_message`]), when to be woken ([`Flow::poll_timeout`]).
//!
//! A batch carries several frames. A WebSocket message that does not fit one is cut and joined again; where its own
//! frames were cut does not matter to anybody (RFC 6455 §5.4). Batches are numbered from 1, each way for itself, and may
//! arrive in any order and twice. `through` acknowledges what the other end has passed on, so a reader that has stopped
//! stops the sender. Nothing is sent while nothing flows: acknowledgements travel with data or a few seconds after it.
//! Whoever waits for one too long asks by saying how much was `sent`, which shows a lost batch even if it was the last.
//!
//! Batches cost money by the piece, so they are paced: a few at once, and then as many as [`Pace`] allows. An answer
//! to something that has just come goes faster than that, and a full batch waits for nothing.

pub(crate) mod frame;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

pub use self::frame::{Batch, Frame, FrameKind};

use crate::{
    body::{Body, Codec},
    chunk::{Accepted, Reassembler},
    id::RequestId,
    limits,
    message::{AgentFrames, AgentMessage, EdgeFrames, EdgeMessage},
};

/// What a frame takes in a batch beside its payload.
const FRAME_OVERHEAD_BYTES: usize = 64;

/// A piece of a cut message is not made smaller than this only to fill a batch up.
const LEAST_PIECE_BYTES: usize = 8 * 1024;

/// How many bytes may wait to be sent before no more are taken from the WebSocket.
const QUEUE_BYTES: usize = limits::CHUNK_BYTES;

/// How many messages may wait to be sent before no more are taken.
const QUEUE_MESSAGES: usize = 1024;

/// Why a WebSocket is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The code.
    pub code: u16,
    /// What is said beside it: at most 123 bytes fit.
    pub reason: String,
}

/// The other end is about to come back, or another one is (IANA WebSocket Close Code Number Registry).
pub const CLOSE_RESTART: u16 = 1012;

impl Close {
    /// A close of our own.
    #[must_use]
    pub fn new(code: u16, reason: &str) -> Self {
        Self { code, reason: reason.to_owned() }
    }

    /// What of this may be sent: a code that no endpoint may send (RFC 6455 §7.4) becomes 1011, and 1005, which only
    /// says that there was none, none. 1014 is not defined there either, and several libraries refuse it.
    #[must_use]
    pub fn sendable(self) -> Option<Self> {
        match self.code {
            1005 => None,
            1000..=1003 | 1007..=1013 | 3000..=4999 => Some(self),
            _ => Some(Self { code: 1011, reason: self.reason }),
        }
    }
}

/// A message of a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Text.
    Text(String),
    /// Binary.
    Binary(Bytes),
    /// The last one.
    Close(Option<Close>),
}

impl Message {
    /// How many bytes of payload it has.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
            Self::Close(close) => close.as_ref().map_or(0, |close| close.reason.len()),
        }
    }

    /// Whether it has no payload.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whom a batch is for.
#[derive(Debug, Clone, Copy)]
pub enum Envelope<'a> {
    /// The edge: the task token of the exchange.
    Edge(&'a str),
    /// The agent.
    Agent(&'a RequestId),
}

impl Envelope<'_> {
    fn seal(self, batch: Batch<'_>) -> String {
        let Batch { seq, through, sent, frames } = batch;
        match self {
            Self::Edge(token) => AgentMessage::Frames(AgentFrames {
                token: token.into(),
                seq,
                through,
                sent,
                moved: false,
                frames,
            })
            .encode(),
            Self::Agent(request_id) => {
                let request_id = request_id.clone();
                EdgeMessage::Frames(EdgeFrames { request_id, seq, through, sent, frames }).encode()
            }
        }
    }
}

/// Why a flow cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// A batch was sent and will not come, or the other end has fallen silent.
    #[error("a message was lost on the link")]
    Lost,
    /// The other end breaks a rule of this protocol.
    #[error("the other end of the link broke a rule: {0}")]
    Invalid(&'static str),
    /// A message is longer than may be.
    #[error("a message is longer than may be")]
    TooLong,
}

/// How many bytes in a second a side still takes at least that is not given up.
const SLOWEST: u32 = 32 * 1024;

/// How long the end is waited for after a last word while so many bytes are still to be taken before it.
#[must_use]
pub fn patience(bytes: usize) -> Duration {
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    limits::SOCKET_CLOSE + Duration::from_secs(1) * bytes / SLOWEST
}

/// How often batches may be sent that answer nothing and are not full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// The time between two, in the long run.
    pub interval: Duration,
    /// How many may go at once after a pause.
    pub burst: u32,
}

/// For an answer to what has just come: whoever asks one thing after the other waits for each.
const ANSWER_PACE: Pace = Pace { interval: Duration::from_millis(5), burst: 256 };

/// A meter of a [`Pace`] (generic cell rate).
#[derive(Debug, Clone, Copy)]
struct Meter {
    pace: Pace,
    /// When everything sent so far is paid for.
    paid_at: Option<Instant>,
}

impl Meter {
    const fn new(pace: Pace) -> Self {
        Self { pace, paid_at: None }
    }

    fn ready_at(&self, now: Instant) -> Instant {
        let burst = self.pace.interval * self.pace.burst.saturating_sub(1);
        self.paid_at.and_then(|paid_at| paid_at.checked_sub(burst)).map_or(now, |at| at.max(now))
    }

    fn pay(&mut self, now: Instant) {
        self.paid_at = Some(self.paid_at.map_or(now, |at| at.max(now)) + self.pace.interval);
    }
}

/// What a flow goes by.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The longest message of a WebSocket, in bytes.
    pub message_bytes: usize,
    /// How batches are paced.
    pub pace: Pace,
    /// What the other end can decode.
    pub codec: Option<Codec>,
    /// After how long without any word the other end is asked whether it is still there.
    pub ask_after: Option<Duration>,
}

#[derive(Debug)]
struct Pending {
    kind: FrameKind,
    code: Option<u16>,
    payload: Bytes,
    /// Nothing was gained by compressing a piece of it.
    is_dense: bool,
}

#[derive(Debug)]
struct Part {
    frames: Vec<(FrameKind, Option<u16>, Vec<u8>, bool)>,
    bytes: usize,
}

/// One end of a WebSocket over the link.
#[derive(Debug)]
pub struct Flow {
    settings: Settings,
    // Out.
    queue: VecDeque<Pending>,
    queued: usize,
    closing: bool,
    next: u32,
    /// What was sent and is not acknowledged: number, bytes and since when.
    unacked: VecDeque<(u32, usize, Instant)>,
    under_way: usize,
    meter: Meter,
    answers: Meter,
    /// Something has come since the last batch was sent.
    heard: bool,
    /// When the other end is asked.
    ask_at: Option<Instant>,
    /// Since when it has not answered.
    asked_since: Option<Instant>,
    ask: bool,
    // In.
    parts: Reassembler<Part>,
    held: usize,
    partial: Option<(FrameKind, Vec<u8>)>,
    ready: VecDeque<Message>,
    ready_bytes: usize,
    taken: u32,
    taken_unacked: usize,
    acked: u32,
    ack_at: Option<Instant>,
    sent_by_peer: u32,
    missing: Option<(u32, Instant)>,
    closed: bool,
}

impl Flow {
    /// A flow on which nothing has been sent.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings,
            queue: VecDeque::new(),
            queued: 0,
            closing: false,
            next: 1,
            unacked: VecDeque::new(),
            under_way: 0,
            meter: Meter::new(settings.pace),
            answers: Meter::new(ANSWER_PACE),
            heard: false,
            ask_at: settings.ask_after.map(|after| now + after),
            asked_since: None,
            ask: false,
            parts: Reassembler::new(1, limits::SOCKET_BATCHES + 1),
            held: 0,
            partial: None,
            ready: VecDeque::new(),
            ready_bytes: 0,
            taken: 0,
            taken_unacked: 0,
            acked: 0,
            ack_at: None,
            sent_by_peer: 0,
            missing: None,
            closed: false,
        }
    }

    /// Whether more may be taken from the WebSocket now.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        !self.closing && self.queued < QUEUE_BYTES && self.queue.len() < QUEUE_MESSAGES
    }

    /// Takes a message of the WebSocket. Nothing follows a close.
    pub fn send(&mut self, message: Message) {
        if self.closing {
            return;
        }
        let (kind, code, payload) = match message {
            Message::Text(text) => (FrameKind::Text, None, Bytes::from(text)),
            Message::Binary(bytes) => (FrameKind::Binary, None, bytes),
            Message::Close(close) => {
                self.closing = true;
                let (code, reason) = close.map_or((None, String::new()), |c| (Some(c.code), c.reason));
                (FrameKind::Close, code, Bytes::from(reason))
            }
        };
        self.queued += payload.len();
        self.queue.push_back(Pending { kind, code, payload, is_dense: false });
    }

    /// Whether the last word of this end was taken by [`Self::send`].
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        self.closing
    }

    /// Whether everything that was handed in is on its way.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many bytes of this end's messages the other end has not passed on, as far as is known here.
    #[must_use]
    pub const fn untaken(&self) -> usize {
        self.queued + self.under_way
    }

    /// Whether the other end's last word has left through [`Self::poll_message`].
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// How many batches of this end were sent.
    #[must_use]
    pub const fn sent(&self) -> u32 {
        self.next - 1
    }

    /// Up to which batch of the other end everything was passed on.
    #[must_use]
    pub const fn taken(&self) -> u32 {
        self.taken
    }

    /// Whether every batch up to `through` has come.
    #[must_use]
    pub fn has_received(&self, through: u32) -> bool {
        self.parts.first_missing().0 > through
    }

    /// How many bytes of the other end are held here: those of messages that are not whole, or not yet asked for.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held + self.ready_bytes + self.partial.as_ref().map_or(0, |(_, bytes)| bytes.len())
    }

    /// Takes a batch of the other end.
    ///
    /// # Errors
    ///
    /// [`FlowError::Invalid`]; the flow cannot go on then.
    pub fn receive(&mut self, batch: Batch<'_>, now: Instant) -> Result<(), FlowError> {
        let Batch { seq, through, sent, frames } = batch;
        if through >= self.next {
            return Err(FlowError::Invalid("it acknowledges what was not sent"));
        }
        self.asked_since = None;
        let before = self.unacked.len();
        while let Some(&(first, bytes, _)) = self.unacked.front()
            && first <= through
        {
            self.under_way -= bytes;
            self.unacked.pop_front();
        }
        match self.unacked.front() {
            None => self.ask_at = self.settings.ask_after.map(|after| now + after),
            // Whoever talks without acknowledging is asked all the same.
            Some((.., since)) if self.unacked.len() < before => {
                self.ask_at = Some((*since + limits::SOCKET_PROBE_AFTER).max(now));
            }
            Some(_) => {}
        }
        if let Some(sent) = sent {
            self.sent_by_peer = self.sent_by_peer.max(sent);
            self.ack_at = Some(now);
        }
        match (seq, frames.is_empty()) {
            (0, true) => {}
            (0, false) | (1.., true) => {
                return Err(FlowError::Invalid("frames and number do not go together"));
            }
            (1.., false) => self.take(seq, frames, now)?,
        }
        self.look_for_gaps(now);
        Ok(())
    }

    fn take(&mut self, seq: u32, frames: Vec<Frame<'_>>, now: Instant) -> Result<(), FlowError> {
        let mut part = Part { frames: Vec::with_capacity(frames.len()), bytes: 0 };
        for Frame { kind, body, more, code } in frames {
            let payload = body.map(Body::decode).transpose();
            let payload = payload.map_err(|_| FlowError::Invalid("a frame cannot be decoded"))?;
            let payload = payload.unwrap_or_default();
            part.bytes += payload.len() + FRAME_OVERHEAD_BYTES;
            part.frames.push((kind, code, payload, more));
        }
        let bytes = part.bytes;
        // An honest sender has no more under way than its window and one batch.
        if self.held + bytes > 2 * limits::SOCKET_WINDOW_BYTES {
            return Err(FlowError::Invalid("it ran ahead of its credit"));
        }
        match self.parts.push(seq, part) {
            Ok(Accepted::New) => {
                self.held += bytes;
                self.heard = true;
                Ok(())
            }
            Ok(Accepted::Duplicate) => {
                // Its acknowledgement may be what was lost.
                self.ack_at.get_or_insert(now + limits::SOCKET_ACK_AFTER);
                Ok(())
            }
            Err(_) => Err(FlowError::Invalid("it ran ahead of its credit")),
        }
    }

    fn look_for_gaps(&mut self, now: Instant) {
        let (seq, later_came) = self.parts.first_missing();
        self.missing = match self.missing {
            _ if !later_came && seq > self.sent_by_peer => None,
            Some(missing) if missing.0 == seq => Some(missing),
            _ => Some((seq, now)),
        };
    }

    /// The next message for the WebSocket, if it is here. To be asked for only when the WebSocket can take one: what
    /// is taken is acknowledged.
    ///
    /// # Errors
    ///
    /// [`FlowError`] when what came is not a message; the flow cannot go on then.
    pub fn poll_message(&mut self, now: Instant) -> Result<Option<Message>, FlowError> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                self.ready_bytes -= message.len();
                self.closed |= matches!(message, Message::Close(_));
                return Ok(Some(message));
            }
            if self.closed {
                return Ok(None);
            }
            let Some((seq, part)) = self.parts.pop() else { return Ok(None) };
            self.held -= part.bytes;
            self.taken = seq;
            self.taken_unacked += part.bytes;
            for frame in part.frames {
                self.join(frame)?;
            }
            let is_much = self.taken_unacked >= limits::SOCKET_ACK_BYTES
                || self.taken - self.acked >= limits::SOCKET_BATCHES / 4;
            let ack_at = if is_much { now } else { now + limits::SOCKET_ACK_AFTER };
            self.ack_at = Some(self.ack_at.map_or(ack_at, |at| at.min(ack_at)));
        }
    }

    fn join(
        &mut self,
        (kind, code, payload, more): (FrameKind, Option<u16>, Vec<u8>, bool),
    ) -> Result<(), FlowError> {
        let so_far = match self.partial.take() {
            None => None,
            Some((begun, bytes)) if begun == kind => Some(bytes),
            Some(_) => return Err(FlowError::Invalid("a message goes on as another kind")),
        };
        let length = so_far.as_ref().map_or(0, Vec::len) + payload.len();
        if length > self.settings.message_bytes {
            return Err(FlowError::TooLong);
        }
        let whole = match so_far {
            None => payload,
            Some(mut bytes) => {
                bytes.extend_from_slice(&payload);
                bytes
            }
        };
        if more {
            self.partial = Some((kind, whole));
            return Ok(());
        }
        let text = |bytes| String::from_utf8(bytes).map_err(|_| FlowError::Invalid("text is not UTF-8"));
        self.ready_bytes += whole.len();
        self.ready.push_back(match kind {
            FrameKind::Text => Message::Text(text(whole)?),
            FrameKind::Binary => Message::Binary(whole.into()),
            FrameKind::Close => {
                let reason = text(whole)?;
                Message::Close(code.map(|code| Close { code, reason }))
            }
        });
        Ok(())
    }

    fn window_is_open(&self) -> bool {
        self.under_way < limits::SOCKET_WINDOW_BYTES && self.unacked.len() < limits::SOCKET_BATCHES as usize
    }

    /// When what waits to be sent may go.
    fn may_send_at(&self, now: Instant) -> Option<Instant> {
        if self.queue.is_empty() || !self.window_is_open() {
            return None;
        }
        if self.closing || self.queued >= QUEUE_BYTES {
            return Some(now);
        }
        let calm = self.meter.ready_at(now);
        Some(if self.heard { calm.min(self.answers.ready_at(now)) } else { calm })
    }

    /// The next batch to send, as it travels.
    pub fn poll_transmit(&mut self, envelope: Envelope<'_>, now: Instant) -> Option<String> {
        let may_send = self.may_send_at(now).is_some_and(|at| at <= now);
        let must_ack = self.ack_at.is_some_and(|at| at <= now);
        if !may_send && !must_ack && !self.ask {
            return None;
        }
        let sent = std::mem::take(&mut self.ask).then(|| self.sent());
        // A full batch costs nothing that waiting would save.
        let is_paced = self.queued < QUEUE_BYTES;
        let (seq, text) = if may_send { (self.next, self.pack(envelope, sent, now)) } else { (0, None) };
        let through = self.taken;
        self.acked = self.taken;
        self.taken_unacked = 0;
        self.ack_at = None;
        if seq > 0 {
            if is_paced && self.heard && self.answers.ready_at(now) <= now {
                self.answers.pay(now);
            } else if is_paced {
                self.meter.pay(now);
            }
            self.heard &= !is_paced;
            self.next += 1;
            self.ask_at.get_or_insert(now + limits::SOCKET_PROBE_AFTER);
            if self.unacked.len() == 1 {
                self.ask_at = Some(now + limits::SOCKET_PROBE_AFTER);
            }
        }
        Some(text.unwrap_or_else(|| envelope.seal(Batch { seq: 0, through, sent, frames: Vec::new() })))
    }

    /// Packs what fits one message of the link and takes it off the queue.
    fn pack(&mut self, envelope: Envelope<'_>, sent: Option<u32>, now: Instant) -> Option<String> {
        let mut room = limits::MESSAGE_BYTES - limits::ENVELOPE_BYTES;
        let mut frames = Vec::new();
        let (mut whole, mut cut, mut bytes, mut is_dense) = (0, 0, 0, false);
        for pending in &self.queue {
            let Pending { kind, code, payload, is_dense: is_tried } = pending;
            let most = payload.len().div_ceil(3) * 4 + FRAME_OVERHEAD_BYTES;
            let is_first = frames.is_empty();
            let (body, taken) = if payload.is_empty() && most <= room {
                (None, 0)
            } else if is_first && most > limits::COMPRESS_SOCKET_FROM_BYTES {
                let codec = self.settings.codec.filter(|_| !is_tried);
                let (body, taken) = Body::encode_front(payload, codec);
                is_dense = !matches!(body, Body::Zstd(_));
                (Some(body), taken)
            } else if most <= room {
                (Some(Body::encode(payload)), payload.len())
            } else {
                let fits = room.saturating_sub(FRAME_OVERHEAD_BYTES) / 4 * 3;
                if fits < LEAST_PIECE_BYTES {
                    break;
                }
                let front = &payload[..fits.min(payload.len())];
                (Some(Body::encode(front)), front.len())
            };
            let encoded = match &body {
                None => 0,
                Some(Body::Text(_)) => taken.div_ceil(3) * 4,
                Some(Body::Base64(text) | Body::Zstd(text)) => text.len(),
            };
            room = room.saturating_sub(encoded + FRAME_OVERHEAD_BYTES);
            bytes += taken + FRAME_OVERHEAD_BYTES;
            let more = taken < payload.len();
            frames.push(Frame { kind: *kind, body, more, code: *code });
            if more {
                cut = taken;
                break;
            }
            whole += 1;
        }
        if frames.is_empty() {
            return None;
        }
        let text = envelope.seal(Batch { seq: self.next, through: self.taken, sent, frames });
        for pending in self.queue.drain(..whole) {
            self.queued -= pending.payload.len();
        }
        if let Some(front) = self.queue.front_mut().filter(|_| cut > 0) {
            let _ = front.payload.split_to(cut);
            front.is_dense |= is_dense;
            self.queued -= cut;
        }
        self.unacked.push_back((self.next, bytes, now));
        self.under_way += bytes;
        Some(text)
    }

    /// When [`Self::handle_timeout`] is due, and [`Self::poll_transmit`] to be asked again.
    #[must_use]
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let missing = self.missing.map(|(_, since)| since + limits::PIECE_MISSING);
        let silent = self.asked_since.map(|since| since + limits::PIECE_MISSING);
        let asks = if self.ask { Some(now) } else { self.ask_at };
        [self.may_send_at(now), self.ack_at, asks, missing, silent].into_iter().flatten().min()
    }

    /// Lets time pass.
    ///
    /// # Errors
    ///
    /// [`FlowError::Lost`] when something that was sent will not come any more.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), FlowError> {
        let is_over = |since: Instant| now >= since + limits::PIECE_MISSING;
        if self.missing.is_some_and(|(_, since)| is_over(since)) || self.asked_since.is_some_and(is_over) {
            return Err(FlowError::Lost);
        }
        if self.ask_at.is_some_and(|at| at <= now) {
            self.ask = true;
            self.asked_since.get_or_insert(now);
            self.ask_at = Some(now + limits::SOCKET_PROBE_AFTER);
        }
        Ok(())
    }

    /// Has the other end asked for at once, because the link under the flow has changed.
    pub fn ask_now(&mut self) {
        self.ask = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn epoch() -> Instant {
        Instant::now()
    }

    fn settings() -> Settings {
        Settings {
            message_bytes: limits::SOCKET_MESSAGE_BYTES,
            pace: Pace { interval: limits::SOCKET_AGENT_INTERVAL, burst: limits::SOCKET_BURST },
            codec: Some(Codec::Zstd),
            ask_after: None,
        }
    }

    /// Two ends and the link between them, over time.
    struct Pair {
        now: Instant,
        ends: [Flow; 2],
        /// What is under way to each end.
        link: [Vec<String>; 2],
        got: [Vec<Message>; 2],
        sent: usize,
        /// Whether the end's WebSocket takes anything.
        reads: [bool; 2],
    }

    impl Pair {
        fn new() -> Self {
            let now = epoch();
            let flow = || Flow::new(settings(), now);
            Self {
                now,
                ends: [flow(), flow()],
                link: [Vec::new(), Vec::new()],
                got: [Vec::new(), Vec::new()],
                sent: 0,
                reads: [true, true],
            }
        }

        fn transmit(&mut self) {
            let id = RequestId::from_random([1; 16]);
            for (end, envelope) in [(0, Envelope::Edge("token")), (1, Envelope::Agent(&id))] {
                while let Some(text) = self.ends[end].poll_transmit(envelope, self.now) {
                    assert!(text.len() <= limits::MESSAGE_BYTES, "{}", text.len());
                    self.sent += 1;
                    self.link[1 - end].push(text);
                }
            }
        }

        fn deliver(&mut self, to: usize, text: &str) -> Result<(), FlowError> {
            if to == 1 {
                let Ok(AgentMessage::Frames(frames)) = AgentMessage::decode(text) else { panic!() };
                self.ends[1].receive(frames.batch().into_owned(), self.now)?;
            } else {
                let Ok(EdgeMessage::Frames(frames)) = EdgeMessage::decode(text) else { panic!() };
                self.ends[0].receive(frames.batch(), self.now)?;
            }
            while self.reads[to]
                && let Some(message) = self.ends[to].poll_message(self.now)?
            {
                self.got[to].push(message);
            }
            Ok(())
        }

        /// Lets time pass until nothing more happens, with an orderly link.
        fn settle(&mut self) -> Result<(), FlowError> {
            for _ in 0..100_000 {
                self.transmit();
                let mut idle = true;
                for to in [0, 1] {
                    for text in std::mem::take(&mut self.link[to]) {
                        idle = false;
                        self.deliver(to, &text)?;
                    }
                }
                if idle {
                    let wake = self.ends.iter().filter_map(|end| end.poll_timeout(self.now)).min();
                    let Some(wake) = wake else { return Ok(()) };
                    self.now = self.now.max(wake);
                    for end in &mut self.ends {
                        end.handle_timeout(self.now)?;
                    }
                }
            }
            panic!("it never comes to rest");
        }
    }

    fn message() -> impl Strategy<Value = Message> {
        let long = prop_oneof![0..200usize, 30_000..40_000usize, 97_000..98_000usize, 250_000..300_000usize];
        (any::<bool>(), long, any::<u8>()).prop_map(|(text, len, seed)| {
            let byte = |n: usize| (n as u8).wrapping_mul(31).wrapping_add(seed);
            if text {
                let any = |n| if n % 7 == 0 { 'é' } else { char::from(byte(n) % 128) };
                Message::Text((0..len).map(any).collect())
            } else {
                Message::Binary((0..len).map(byte).collect::<Vec<_>>().into())
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever the messages, and however the link orders and repeats batches, each end gets what the other sent.
        #[test]
        fn messages_arrive_once_and_in_order(
            messages in proptest::collection::vec((any::<bool>(), message()), 1..24),
            shuffle in proptest::collection::vec((any::<u16>(), any::<bool>()), 256),
        ) {
            let mut pair = Pair::new();
            let mut wanted = [Vec::new(), Vec::new()];
            let mut at = 0;
            for (first, message) in messages {
                let end = usize::from(first);
                pair.ends[end].send(message.clone());
                wanted[1 - end].push(message);
                pair.transmit();
                for to in [0, 1] {
                    let mut texts = std::mem::take(&mut pair.link[to]);
                    let twice: Vec<_> = texts.iter().filter(|_| { at += 1; shuffle[at % 256].1 }).cloned().collect();
                    texts.extend(twice);
                    texts.sort_by_cached_key(|_| { at += 1; shuffle[at % 256].0 });
                    for text in texts {
                        pair.deliver(to, &text).unwrap();
                    }
                }
            }
            for end in 0..2 {
                pair.ends[end].send(Message::Close(Some(Close::new(4000, "done"))));
                wanted[1 - end].push(Message::Close(Some(Close::new(4000, "done"))));
            }
            pair.settle().unwrap();
            prop_assert!(pair.got == wanted);
            prop_assert!(pair.ends.iter().all(|end| end.is_closed() && end.is_sent()));
        }

        /// A batch that is lost is noticed within 45 seconds, also the last one, and nothing behind it gets out.
        #[test]
        fn a_lost_batch_is_noticed(count in 1usize..12, lost in 0usize..12, later in any::<bool>()) {
            let mut pair = Pair::new();
            let lost = lost % count;
            for n in 0..count {
                pair.ends[0].send(Message::Text(n.to_string()));
                pair.transmit();
                for text in std::mem::take(&mut pair.link[1]) {
                    if n != lost {
                        pair.deliver(1, &text).unwrap();
                    }
                }
            }
            if later {
                pair.ends[1].send(Message::Text("meanwhile".into()));
            }
            let begun = pair.now;
            prop_assert_eq!(pair.settle(), Err(FlowError::Lost));
            prop_assert!(pair.now - begun <= Duration::from_secs(45));
            let whole: Vec<_> = (0..lost).map(|n| Message::Text(n.to_string())).collect();
            prop_assert!(pair.got[1] == whole);
        }
    }

    #[test]
    fn nothing_is_sent_while_nothing_flows() {
        let mut pair = Pair::new();
        pair.ends[0].send(Message::Text("x".into()));
        pair.settle().unwrap();
        // The message and its acknowledgement, and then silence for good.
        assert_eq!(pair.sent, 2);
        assert_eq!(pair.ends.iter().filter_map(|end| end.poll_timeout(pair.now)).min(), None);
    }

    #[test]
    fn a_reader_that_has_stopped_stops_the_sender() {
        let mut pair = Pair::new();
        pair.reads[1] = false;
        let message = || Message::Binary(vec![7; 64 * 1024].into());
        let mut taken = 0;
        for _ in 0..1000 {
            while pair.ends[0].wants_more() {
                pair.ends[0].send(message());
                taken += 1;
            }
            pair.transmit();
            for text in std::mem::take(&mut pair.link[1]) {
                pair.deliver(1, &text).unwrap();
            }
        }
        assert!(taken * 64 * 1024 <= limits::SOCKET_WINDOW_BYTES + 4 * limits::CHUNK_BYTES, "{taken}");
        pair.reads[1] = true;
        while let Some(message) = pair.ends[1].poll_message(pair.now).unwrap() {
            pair.got[1].push(message);
        }
        pair.settle().unwrap();
        assert_eq!(pair.got[1].len(), taken);
    }

    #[test]
    fn small_messages_are_sent_at_once_and_a_stream_of_them_together() {
        let mut pair = Pair::new();
        pair.ends[0].send(Message::Text("first".into()));
        pair.transmit();
        assert_eq!(pair.sent, 1, "the first waits for nothing");
        // A thousand, a hundred a second.
        let mut pair = Pair::new();
        let mut batches = 0;
        for n in 0..1000 {
            pair.ends[0].send(Message::Text(n.to_string()));
            pair.transmit();
            for text in std::mem::take(&mut pair.link[1]) {
                batches += 1;
                pair.deliver(1, &text).unwrap();
            }
            for text in std::mem::take(&mut pair.link[0]) {
                pair.deliver(0, &text).unwrap();
            }
            pair.now += Duration::from_millis(10);
        }
        // Each of them is a message, a run of `response`, one in and one out of the mailbox, and a tenth of a deletion.
        assert!(batches <= 70, "{batches}");
    }

    #[test]
    fn the_end_of_a_long_message_does_not_wait() {
        let mut pair = Pair::new();
        pair.ends[0].send(Message::Binary(vec![7; 20 * limits::CHUNK_BYTES + 1].into()));
        let begun = pair.now;
        pair.transmit();
        for text in std::mem::take(&mut pair.link[1]) {
            pair.deliver(1, &text).unwrap();
        }
        assert_eq!((pair.got[1].len(), pair.now), (1, begun));
    }

    #[test]
    fn the_end_is_waited_for_as_long_as_something_is_taken() {
        assert_eq!(patience(0), limits::SOCKET_CLOSE);
        assert_eq!(patience(16 << 20), limits::SOCKET_CLOSE + Duration::from_secs(512));
        assert!(patience(usize::MAX) < Duration::from_secs(2 * 24 * 60 * 60));
    }

    #[test]
    fn a_message_at_its_limit_passes_and_one_byte_more_does_not() {
        for (over, outcome) in [(0, Ok(())), (1, Err(FlowError::TooLong))] {
            let mut pair = Pair::new();
            pair.ends[0].send(Message::Binary(vec![0; limits::SOCKET_MESSAGE_BYTES + over].into()));
            assert_eq!(pair.settle(), outcome);
        }
    }

    #[test]
    fn who_breaks_a_rule_is_not_believed() {
        let batch = |seq, through, frames: Vec<Frame<'static>>| Batch { seq, through, sent: None, frames };
        let text = |more| Frame { kind: FrameKind::Text, body: Some(Body::encode(b"x")), more, code: None };
        let binary = Frame { kind: FrameKind::Binary, body: None, more: false, code: None };
        let now = epoch();
        let refused = |batch| {
            let mut flow = Flow::new(settings(), now);
            flow.receive(batch, now).and_then(|()| flow.poll_message(now).map(drop)).is_err()
        };
        assert!(refused(batch(0, 1, vec![])), "acknowledges what was not sent");
        assert!(refused(batch(0, 0, vec![text(false)])));
        assert!(refused(batch(1, 0, vec![])));
        assert!(refused(batch(limits::SOCKET_BATCHES + 3, 0, vec![text(false)])), "ran ahead");
        assert!(refused(batch(1, 0, vec![text(true), binary])));
        let bad = Frame { kind: FrameKind::Text, body: Some(Body::encode(b"\xff")), more: false, code: None };
        assert!(refused(batch(1, 0, vec![bad])));
        assert!(!refused(batch(1, 0, vec![text(true), text(false)])));
    }

    #[test]
    fn codes_that_may_not_be_sent_are_not() {
        for (code, sent) in [
            (1000, Some(1000)),
            (1005, None),
            (1006, Some(1011)),
            (1015, Some(1011)),
            (1014, Some(1011)),
            (999, Some(1011)),
            (2999, Some(1011)),
            (3000, Some(3000)),
            (4999, Some(4999)),
            (5000, Some(1011)),
        ] {
            assert_eq!(Close::new(code, "").sendable().map(|close| close.code), sent, "{code}");
        }
    }
}
