//! The shapes of the inspector's JSON, as `docs/inspector-api.yaml` describes them.
//!
//! Enters: records. Leaves: what may be shown of them.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use proto::{delivery, header::Headers};
use serde::{Deserialize, Serialize};

use super::{
    decode,
    diff::{BodyDiff, Change, Diff},
    redact::Redact,
    signature,
};
use crate::capture::{
    fields::Fields,
    kept::Kept,
    record::{self, Kind, Outcome, Record, Source},
    ring::Captured,
};

/// A refusal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Error {
    pub(crate) error: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ids {
    pub(crate) ids: Vec<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct State {
    pub(crate) version: &'static str,
    pub(crate) tunnels: Vec<TunnelState>,
    pub(crate) memory_bytes: usize,
    pub(crate) memory_limit_bytes: usize,
    pub(crate) requests: usize,
    pub(crate) evicted: u64,
    pub(crate) masked: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TunnelState {
    pub(crate) name: String,
    pub(crate) upstream: String,
    pub(crate) inspect: bool,
    pub(crate) url: Option<String>,
    /// None for a tunnel that is only live.
    pub(crate) delivery: Option<delivery::Mode>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct List {
    pub(crate) requests: Vec<Summary>,
    pub(crate) more: bool,
    pub(crate) evicted: u64,
}

/// One row of the list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) id: u64,
    pub(crate) tunnel: String,
    pub(crate) source: String,
    pub(crate) kind: String,
    pub(crate) request_id: Option<String>,
    pub(crate) replay_of: Option<u64>,
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) url: Option<String>,
    pub(crate) status: Option<u16>,
    pub(crate) answered_by: Option<String>,
    pub(crate) state: String,
    pub(crate) outcome: Option<String>,
    pub(crate) error: Option<String>,
    pub(crate) received_at: u64,
    pub(crate) head_us: Option<u64>,
    pub(crate) ended_us: Option<u64>,
    pub(crate) content_type: Option<String>,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
    pub(crate) frames: u64,
}

/// All of one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Detail {
    #[serde(flatten)]
    pub(crate) summary: Summary,
    pub(crate) upstream: String,
    pub(crate) times: Times,
    pub(crate) request: Message,
    pub(crate) response: Option<Message>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) pieces_dropped: u64,
    pub(crate) frames_kept: Vec<Frame>,
    pub(crate) frames_dropped: u64,
    pub(crate) signature: Option<Signature>,
    pub(crate) diff: Option<DiffShape>,
    pub(crate) replayable: Option<String>,
    pub(crate) replays: Vec<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) received_at: u64,
    pub(crate) connected_us: Option<u64>,
    pub(crate) head_us: Option<u64>,
    pub(crate) first_byte_us: Option<u64>,
    pub(crate) last_byte_us: Option<u64>,
    pub(crate) ended_us: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) fields: Vec<(String, Value)>,
    pub(crate) body: Body,
}

/// One delivery, as [`delivery::Answer`] has it, but with its fields as those of a request are shown.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename = "delivery")]
pub(crate) struct Delivery<'a> {
    pub(crate) summary: Box<delivery::Summary>,
    pub(crate) headers: Vec<(String, Value)>,
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub(crate) body: Option<proto::body::Body<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) more: Option<u64>,
}

/// The value of a field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Value {
    Text(String),
    Masked {
        masked: bool,
        length: usize,
        /// Of one that is given back: for which of the captured fields it stands, from 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<usize>,
    },
    Base64 {
        base64: String,
    },
}

impl Value {
    fn of(name: &str, value: &[u8], redact: Option<&Redact>) -> Self {
        if redact.is_some_and(|redact| redact.hides(name)) {
            return Self::Masked { masked: true, length: value.len(), at: None };
        }
        match std::str::from_utf8(value) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64 { base64: to_base64(value) },
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Body {
    pub(crate) size: u64,
    pub(crate) kept: usize,
    pub(crate) cut: bool,
    pub(crate) dropped: bool,
    pub(crate) base64: String,
    pub(crate) decoded: Option<Decoded>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Decoded {
    pub(crate) coding: String,
    pub(crate) base64: String,
    pub(crate) cut: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) size: usize,
    pub(crate) at_us: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Frame {
    pub(crate) direction: String,
    pub(crate) kind: String,
    pub(crate) size: usize,
    pub(crate) base64: String,
    pub(crate) cut: bool,
    pub(crate) code: Option<u16>,
    pub(crate) at_us: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Signature {
    pub(crate) scheme: String,
    pub(crate) signed_at: u64,
    pub(crate) tolerance_s: u64,
    pub(crate) too_old: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DiffShape {
    pub(crate) same: bool,
    /// Why there is no whole answer, where that is not the same for both.
    #[serde(default)]
    pub(crate) error: Option<ErrorDiff>,
    pub(crate) status: Option<StatusDiff>,
    pub(crate) fields: Vec<FieldDiff>,
    pub(crate) body: BodyDiffShape,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StatusDiff {
    pub(crate) before: Option<u16>,
    pub(crate) after: Option<u16>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorDiff {
    pub(crate) before: Option<String>,
    pub(crate) after: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FieldDiff {
    pub(crate) name: String,
    pub(crate) before: Vec<Value>,
    pub(crate) after: Vec<Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BodyDiffShape {
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) json: Vec<Change>,
    #[serde(default)]
    pub(crate) json_more: usize,
}

/// What an event says about the list.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RequestEvent {
    pub(crate) change: String,
    pub(crate) id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<Summary>,
}

#[derive(Debug, Serialize)]
pub(crate) struct BodyEvent {
    pub(crate) id: u64,
    pub(crate) direction: record::Direction,
    pub(crate) offset: u64,
    pub(crate) size: usize,
    pub(crate) base64: String,
    pub(crate) at_us: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct FrameEvent {
    pub(crate) id: u64,
    pub(crate) frame: Frame,
}

#[derive(Debug, Serialize)]
pub(crate) struct LaggedEvent {
    pub(crate) missed: u64,
}

pub(crate) fn to_base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

const fn source(source: Source) -> &'static str {
    match source {
        Source::Edge => "edge",
        Source::Replay => "replay",
        Source::Import => "import",
    }
}

const fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::Failed => "failed",
        Outcome::Cancelled => "cancelled",
    }
}

impl Summary {
    /// The row of a record.
    pub(crate) fn of(captured: &Captured, record: &Record) -> Self {
        let answer = record.answer.as_ref();
        Self {
            id: captured.id,
            tunnel: captured.tunnel.to_string(),
            source: source(record.source).to_owned(),
            kind: match record.kind {
                Kind::Http => "http",
                Kind::Websocket => "websocket",
            }
            .to_owned(),
            request_id: record.request_id.as_ref().map(ToString::to_string),
            replay_of: record.replay_of,
            method: record.method.to_string(),
            target: record.target.to_string(),
            url: record.url(),
            status: answer.map(|answer| answer.status),
            answered_by: answer.map(|answer| if answer.is_own { "agent" } else { "upstream" }.to_owned()),
            state: if record.outcome.is_some() { "ended" } else { "open" }.to_owned(),
            outcome: record.outcome.map(|it| outcome(it).to_owned()),
            error: record.error.map(ToOwned::to_owned),
            received_at: captured.received_at,
            head_us: record.times.head,
            ended_us: record.times.ended,
            content_type: answer.and_then(|answer| answer.fields.text("content-type")).map(ToOwned::to_owned),
            request_bytes: record.body.size(),
            response_bytes: answer.map_or(0, |answer| answer.body.size()),
            frames: record.frames_total,
        }
    }
}

fn fields(fields: &Fields, redact: Option<&Redact>) -> Vec<(String, Value)> {
    fields.iter().map(|(name, value)| (name.to_owned(), Value::of(name, value, redact))).collect()
}

/// The fields of a head that the edge keeps; with `redact` without what that hides.
pub(crate) fn head(head: &Headers, redact: Option<&Redact>) -> Vec<(String, Value)> {
    let shown = |name: &str, value: &[u8]| (name.to_owned(), Value::of(name, value, redact));
    head.iter().map(|(name, value)| shown(name.as_str(), value.as_bytes())).collect()
}

impl Body {
    fn of(fields: &Fields, body: &Kept) -> Self {
        let bytes = body.to_vec();
        let decoded = decode::body(fields, &bytes).map(|decoded| Decoded {
            coding: decoded.coding.to_owned(),
            base64: to_base64(&decoded.bytes),
            cut: decoded.cut,
            error: decoded.error,
        });
        Self {
            size: body.size(),
            kept: body.len(),
            cut: body.is_cut(),
            dropped: body.len() == 0 && body.size() > 0,
            base64: to_base64(&bytes),
            decoded,
        }
    }
}

impl Frame {
    pub(crate) fn of(frame: &record::Frame) -> Self {
        Self {
            direction: match frame.direction {
                record::Direction::ToUpstream => "to_upstream",
                record::Direction::ToClient => "to_client",
            }
            .to_owned(),
            kind: match frame.kind {
                record::FrameKind::Text => "text",
                record::FrameKind::Binary => "binary",
                record::FrameKind::Close => "close",
            }
            .to_owned(),
            size: frame.size,
            base64: to_base64(&frame.first),
            cut: frame.first.len() < frame.size,
            code: frame.code,
            at_us: frame.at_us,
        }
    }
}

impl DiffShape {
    fn between(before: &Record, after: &Record, redact: Option<&Redact>) -> Self {
        let diff = Diff::between(before.answer.as_ref(), after.answer.as_ref());
        let error = (before.error != after.error).then(|| ErrorDiff {
            before: before.error.map(ToOwned::to_owned),
            after: after.error.map(ToOwned::to_owned),
        });
        let values = |name: &str, values: &[Vec<u8>]| {
            values.iter().map(|value| Value::of(name, value, redact)).collect()
        };
        let (kind, json, json_more) = match &diff.body {
            BodyDiff::Same => ("same", Vec::new(), 0),
            BodyDiff::Json(changes, more) => ("json", changes.clone(), *more),
            BodyDiff::Bytes => ("bytes", Vec::new(), 0),
            BodyDiff::Unknown => ("unknown", Vec::new(), 0),
        };
        Self {
            same: diff.is_same() && error.is_none(),
            error,
            status: diff.status.map(|(before, after)| StatusDiff { before, after }),
            fields: diff
                .fields
                .iter()
                .map(|field| FieldDiff {
                    name: field.name.clone(),
                    before: values(&field.name, &field.before),
                    after: values(&field.name, &field.after),
                })
                .collect(),
            body: BodyDiffShape { kind: kind.to_owned(), json, json_more },
        }
    }
}

impl Detail {
    /// All that may be shown of a record; with `redact` not what that hides. `original` is what it is a replay of.
    pub(crate) fn of(
        captured: &Captured,
        record: &Record,
        redact: Option<&Redact>,
        original: Option<&Record>,
        replays: Vec<u64>,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let times = record.times;
        Self {
            summary: Summary::of(captured, record),
            upstream: captured.upstream.to_string(),
            times: Times {
                received_at: captured.received_at,
                connected_us: times.connected,
                head_us: times.head,
                first_byte_us: times.first_byte,
                last_byte_us: times.last_byte,
                ended_us: times.ended,
            },
            request: Message {
                fields: fields(&record.fields, redact),
                body: Body::of(&record.fields, &record.body),
            },
            response: record.answer.as_ref().map(|answer| Message {
                fields: fields(&answer.fields, redact),
                body: Body::of(&answer.fields, &answer.body),
            }),
            pieces: record
                .pieces
                .iter()
                .map(|piece| Piece { offset: piece.offset, size: piece.size, at_us: piece.at_us })
                .collect(),
            pieces_dropped: record.pieces_dropped,
            frames_kept: record.frames.iter().map(Frame::of).collect(),
            frames_dropped: record.frames_total - record.frames.len() as u64,
            signature: signature::signed(&record.fields).map(|signed| Signature {
                scheme: signed.scheme.to_owned(),
                signed_at: signed.at,
                tolerance_s: signed.tolerance_s,
                too_old: signed.is_too_old(now),
            }),
            // What was not sent before, or is not answered yet, has nothing to compare with.
            diff: original
                .filter(|original| original.answer.is_some() || original.error.is_some())
                .filter(|_| record.outcome.is_some())
                .map(|original| DiffShape::between(original, record, redact)),
            replayable: record.obstacle(),
            replays,
        }
    }
}
