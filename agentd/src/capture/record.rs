//! What is known of one request.

use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;
use proto::{header::is_event_stream, id::RequestId, socket::Message};

use super::{fields::Fields, kept::Kept};

/// How many messages of one WebSocket are kept: the last ones.
const FRAMES: usize = 1000;

/// How much of each message is kept.
const FRAME_BYTES: usize = 4096;

/// For how many pieces of an event stream it is noted when they came.
const PIECES: usize = 1000;

/// Where a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Source {
    /// From the edge.
    Edge,
    /// It was sent again from here.
    Replay,
    /// It was put into the list.
    Import,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// One answer.
    Http,
    /// A WebSocket.
    Websocket,
}

/// What the public client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The target, below what `x-forwarded-prefix` says.
    Target,
    /// This path and query: a route of the tunnel changes them on the way.
    Path(Box<str>),
    /// Something else, and nobody knows what would have led to the target.
    Unknown,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// With a whole answer.
    Complete,
    /// Without one; the error says why.
    Failed,
    /// Nobody wanted the rest.
    Cancelled,
}

/// Where something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    /// From the public client.
    ToUpstream,
    /// From the upstream.
    ToClient,
}

/// What a message of a WebSocket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FrameKind {
    Text,
    Binary,
    Close,
}

/// One message of a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) direction: Direction,
    pub(crate) kind: FrameKind,
    pub(crate) size: usize,
    /// Its beginning; a close's reason.
    pub(crate) first: Bytes,
    /// Of a close.
    pub(crate) code: Option<u16>,
    pub(crate) at_us: u64,
}

impl Frame {
    fn of(direction: Direction, message: &Message, at_us: u64) -> Self {
        let (kind, bytes, code) = match message {
            Message::Text(text) => (FrameKind::Text, text.as_bytes(), None),
            Message::Binary(bytes) => (FrameKind::Binary, &bytes[..], None),
            Message::Close(Some(close)) => (FrameKind::Close, close.reason.as_bytes(), Some(close.code)),
            Message::Close(None) => (FrameKind::Close, &b""[..], None),
        };
        let first = Bytes::copy_from_slice(&bytes[..bytes.len().min(FRAME_BYTES)]);
        Self { direction, kind, size: bytes.len(), first, code, at_us }
    }

    const fn weight(&self) -> usize {
        size_of::<Self>() + self.first.len()
    }
}

/// When a piece of an event stream came.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) size: usize,
    pub(crate) at_us: u64,
}

/// What came back.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) fields: Fields,
    pub(crate) body: Kept,
    /// It is the agent's own, no upstream's.
    pub(crate) is_own: bool,
    /// Whether it is a stream of events.
    is_stream: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, fields: Fields, body: Kept) -> Self {
        let is_stream = fields.get("content-type").is_some_and(is_event_stream);
        Self { status, fields, body, is_own: false, is_stream }
    }

    /// As the agent's own.
    pub(crate) const fn own(mut self) -> Self {
        self.is_own = true;
        self
    }
}

/// Times, in microseconds after the request was received, or, of a replay, sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) connected: Option<u64>,
    pub(crate) head: Option<u64>,
    pub(crate) first_byte: Option<u64>,
    pub(crate) last_byte: Option<u64>,
    pub(crate) ended: Option<u64>,
}

/// What is known of one request. A clone shares the bodies.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) source: Source,
    pub(crate) kind: Kind,
    pub(crate) method: Box<str>,
    /// As the upstream gets it.
    pub(crate) target: Box<str>,
    pub(crate) asked: Asked,
    /// The edge's name of it.
    pub(crate) request_id: Option<RequestId>,
    pub(crate) replay_of: Option<u64>,
    pub(crate) fields: Fields,
    pub(crate) body: Kept,
    /// Whether all of the body has passed.
    pub(crate) is_whole: bool,
    /// Whether no upstream was ever to get it.
    pub(crate) leads_nowhere: bool,
    pub(crate) answer: Option<Answer>,
    pub(crate) times: Times,
    /// How long it was listed before it was sent, in microseconds: its times begin then.
    pub(super) waited: u64,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) error: Option<&'static str>,
    pub(crate) frames: VecDeque<Frame>,
    /// How many messages have passed.
    pub(crate) frames_total: u64,
    frames_weight: usize,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) pieces_dropped: u64,
    /// It has left the ring: nothing more is kept.
    pub(super) evicted: bool,
}

impl Record {
    /// Why it cannot be sent again as it is.
    pub(crate) fn obstacle(&self) -> Option<String> {
        if self.kind == Kind::Websocket {
            return Some(
                "a WebSocket cannot be replayed: what was said in it answered what the other side said"
                    .into(),
            );
        }
        if self.is_settled_here() {
            return Some(
                "the agent answered this itself (a file, a fixed answer, a redirect, a step of signing in): it never \
                 went to an upstream"
                    .into(),
            );
        }
        if self.leads_nowhere {
            return Some(
                "no upstream was to get this: no route of the tunnel leads it to one (files, fixed answers and redirects \
                 are the agent's own), nor does the tunnel itself"
                    .into(),
            );
        }
        if !self.is_whole {
            return Some(format!(
                "the body has not passed whole: {} bytes of it have, and sending those would be another request; \
                 give a body",
                self.body.size()
            ));
        }
        self.body.is_cut().then(|| {
            format!(
                "the captured body is cut: {} of {} bytes are kept, and sending half of it would be another \
                 request; give a body, or raise inspect_body",
                self.body.len(),
                self.body.size()
            )
        })
    }

    /// Whether there is more of the request's body than is kept, as far as anybody knows.
    pub(crate) fn is_body_cut(&self) -> bool {
        !self.is_whole || self.body.is_cut()
    }

    /// The public address, as the forwarding fields have it.
    pub(crate) fn url(&self) -> Option<String> {
        let scheme =
            self.fields.text("x-forwarded-proto").filter(|scheme| matches!(*scheme, "http" | "https"))?;
        let host = self.fields.text("x-forwarded-host")?;
        let (prefix, target) = match &self.asked {
            Asked::Target => (self.fields.text("x-forwarded-prefix").unwrap_or_default(), &self.target),
            Asked::Path(path) => ("", path),
            Asked::Unknown => return None,
        };
        Some(format!("{scheme}://{host}{prefix}{}", in_address(target)))
    }

    /// Whether the agent answered it, and did not refuse it: no upstream was ever meant to see it.
    fn is_settled_here(&self) -> bool {
        self.error.is_none() && self.answer.as_ref().is_some_and(|answer| answer.is_own)
    }

    /// Whether another body makes it one that can be sent.
    pub(crate) fn lacks_only_a_body(&self) -> bool {
        self.kind == Kind::Http && !self.is_settled_here() && !self.leads_nowhere
    }

    pub(crate) const fn new(source: Source, kind: Kind, method: Box<str>, target: Box<str>) -> Self {
        Self {
            source,
            kind,
            method,
            target,
            asked: Asked::Target,
            request_id: None,
            replay_of: None,
            fields: Fields::NONE,
            body: Kept::EMPTY,
            is_whole: true,
            leads_nowhere: false,
            answer: None,
            times: Times { connected: None, head: None, first_byte: None, last_byte: None, ended: None },
            waited: 0,
            outcome: None,
            error: None,
            frames: VecDeque::new(),
            frames_total: 0,
            frames_weight: 0,
            pieces: Vec::new(),
            pieces_dropped: 0,
            evicted: false,
        }
    }

    /// Takes a piece of the answer's body. The offset of what is new in it.
    pub(super) fn answer_piece(&mut self, piece: &[u8], limit: usize, at_us: u64) -> u64 {
        self.times.first_byte.get_or_insert(at_us);
        self.times.last_byte = Some(at_us);
        let Some(answer) = &mut self.answer else { return 0 };
        let offset = answer.body.size();
        answer.body.push(piece, limit);
        if answer.is_stream {
            if self.pieces.len() < PIECES {
                self.pieces.push(Piece { offset, size: piece.len(), at_us });
            } else {
                self.pieces_dropped += 1;
            }
        }
        offset
    }

    /// Takes a message of a WebSocket; those kept may weigh `limit` together.
    pub(super) fn frame(&mut self, direction: Direction, message: &Message, limit: usize, at_us: u64) {
        self.times.first_byte.get_or_insert(at_us);
        self.times.last_byte = Some(at_us);
        self.keep(Frame::of(direction, message, at_us), limit);
    }

    /// Takes the messages of a WebSocket before which `dropped` others have been; as [`frame`](Self::frame) keeps them.
    pub(super) fn frames_of_elsewhere(&mut self, frames: Vec<Frame>, dropped: u64, limit: usize) {
        self.frames_total += dropped;
        for mut frame in frames {
            // A copy, which does not hold on to the rest.
            frame.first = Bytes::copy_from_slice(&frame.first[..frame.first.len().min(FRAME_BYTES)]);
            self.keep(frame, limit);
        }
    }

    fn keep(&mut self, frame: Frame, limit: usize) {
        self.frames_total += 1;
        self.frames_weight += frame.weight();
        self.frames.push_back(frame);
        while self.frames.len() > FRAMES || self.frames_weight > limit {
            let Some(oldest) = self.frames.pop_front() else { return };
            self.frames_weight -= oldest.weight();
        }
    }

    /// How much memory it takes, with what a record needs besides and what an allocator loses to gaps.
    pub(super) fn weight(&self) -> usize {
        let asked = match &self.asked {
            Asked::Path(path) => path.len(),
            Asked::Target | Asked::Unknown => 0,
        };
        let answer = self.answer.as_ref().map_or(0, |answer| answer.fields.weight() + answer.body.weight());
        let exact = size_of::<Self>()
            + self.method.len()
            + self.target.len()
            + asked
            + self.fields.weight()
            + self.body.weight()
            + answer
            + self.frames_weight
            + self.pieces.capacity() * size_of::<Piece>()
            + OVERHEAD;
        exact + exact / GAPS
    }
}

/// A target as it stands in an address: the one that is no path, `*`, is an address without one (RFC 9112 §3.2.4).
pub(crate) fn in_address(target: &str) -> &str {
    if target == "*" { "" } else { target }
}

/// One part in so many is lost between records of all sizes that come and go.
const GAPS: usize = 3;

/// What the allocator and the ring need for each record, beside what is counted.
const OVERHEAD: usize = 400;

/// Microseconds from `began` until now.
pub(super) fn since(began: Instant) -> u64 {
    began.elapsed().as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_address_is_what_was_asked_for() {
        let mut record = Record::new(Source::Edge, Kind::Http, "GET".into(), "/v1/x".into());
        assert_eq!(record.url(), None);
        let fields = [
            ("x-forwarded-proto", &b"https"[..]),
            ("x-forwarded-host", b"h"),
            ("x-forwarded-prefix", b"/web/api"),
        ];
        record.fields = Fields::from_pairs(fields.into_iter());
        for (asked, url) in [
            (Asked::Target, Some("https://h/web/api/v1/x")),
            (Asked::Path("/web/api/x".into()), Some("https://h/web/api/x")),
            (Asked::Unknown, None),
        ] {
            record.asked = asked;
            assert_eq!(record.url().as_deref(), url);
        }
        (record.target, record.asked) = ("*".into(), Asked::Target);
        assert_eq!(record.url().as_deref(), Some("https://h/web/api"));
    }

    #[test]
    fn what_is_not_whole_or_leads_nowhere_has_an_obstacle() {
        let mut record = Record::new(Source::Edge, Kind::Http, "POST".into(), "/".into());
        assert_eq!(record.obstacle(), None);
        record.is_whole = false;
        assert!(record.obstacle().unwrap().contains("has not passed whole"));
        assert!(record.is_body_cut() && record.lacks_only_a_body());
        record.leads_nowhere = true;
        assert!(record.obstacle().unwrap().contains("no upstream was to get this"));
        assert!(!record.lacks_only_a_body());
    }
}
