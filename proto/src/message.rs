//! The messages on an agent's connection: JSON text, told apart by `type`.
//!
//! [`AgentMessage`] travels from agent to edge, [`EdgeMessage`] from edge to agent. A receiver ignores
//! fields it does not know; a `type` it does not know is [`DecodeError::UnknownType`], to be logged
//! and dropped. New fields are optional and mean "feature absent" when missing.
//!
//! ```text
//! agent                                edge
//! hello {seq, tunnels}            ->
//!                                 <-   welcome {seq, connection_id, tunnels}
//!                                 <-   request {request_id, token, method, target, headers, body | announced}
//! continue {token}                ->                                   (only if the body was announced)
//!                                 <-   request_chunk {request_id, seq, body}…
//! reply {token, status, headers, body, end}   ->
//! chunk {token, seq, body, end}…  ->
//!                                 <-   credit {request_id, through}…
//! failed {token, seq, code}       ->                 (instead of a reply, or to break one off)
//!                                 <-   probe {request_id, token}          (after a silence)
//! progress {token, sent, ended}   ->
//!                                 <-   cancel {request_id}
//! heartbeat {seq}                 ->
//!                                 <-   heartbeat {seq}
//!                                 <-   drain
//! ```
//!
//! `hello` says which tunnels this connection serves *from now on*: it is sent again to add or remove
//! some, and with none before the connection is closed.
//!
//! A `request` with `upgrade` is the handshake of a public WebSocket. The agent answers `accepted`, or `reply` with the
//! upstream's refusal, and after `accepted` both ends say `frames` ([`crate::socket`]) until each has said a close:
//!
//! ```text
//! agent                                edge
//!                                 <-   request {request_id, token, upgrade, …}
//! accepted {token, subprotocol, headers}  ->
//! frames {token, seq, through, frames}…  <->  frames {request_id, seq, through, frames}…
//! ```
//!
//! A `request` with `delivery` was accepted earlier and is kept at the edge (see [`crate::delivery`]). A body that is
//! announced follows at once, without `continue`; an agent that has no room says `failed` with
//! [`ErrorCode::AgentBusy`]. The agent says `progress` every ten seconds while its upstream works, and ends with one `reply`
//! without a body, which has the status and the field `retry-after` alone:
//!
//! ```text
//! agent                                edge
//!                                 <-   request {request_id, token, delivery, headers, body | announced}
//!                                 <-   request_chunk {request_id, seq, body}…
//! progress {token, sent, ended}…  ->
//! reply {token, status, headers, end}     ->              (or failed {token, seq, code})
//! deliveries {seq, ask}           ->
//!                                 <-   deliveries {seq, answer}
//! ```
//!
//! `hello` and `welcome` say who knows `websockets`. A peer that does not never sees one of these: the field `upgrade`
//! comes with the header field of that name, which such an agent refuses with [`ErrorCode::UpgradeUnsupported`].

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::{
    body::{Body, Codecs},
    delivery::{self, Attempt, DeliveriesAnswer, DeliveriesAsk, PolicyNotice, SaidPolicy},
    error::ErrorCode,
    header::Headers,
    id::{AgentId, ConnectionId, Owner, RequestId, TunnelName},
    json::push_field,
    socket::frame::{Batch, Frame},
    target::Target,
};

/// The version of this protocol. It changes only when an older peer would misunderstand a newer one;
/// new optional fields do not change it. An edge that has a new one goes on taking the one before for a
/// release, so that agents can follow one after the other; `fixtures/version-1.jsonl` holds what that one says.
pub const VERSION: u32 = 1;

/// Why a text is not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not JSON, or not the fields that its type needs.
    #[error("message is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A message of a later version.
    #[error("message type {0:?} is unknown")]
    UnknownType(String),
    /// A value outside what its field may hold.
    #[error("message is invalid: {0}")]
    Invalid(&'static str),
}

/// The tag of a message, and the token if it carries one: as much as `response` needs to route it.
#[derive(Debug, Deserialize)]
pub struct Envelope<'a> {
    /// The message's type.
    #[serde(rename = "type", borrow)]
    pub kind: Cow<'a, str>,
    /// The task token that the message returns.
    #[serde(default, borrow)]
    pub token: Option<Cow<'a, str>>,
}

impl<'a> Envelope<'a> {
    /// Reads the tag of a message and skips the rest.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Malformed`] when it is not a JSON object with a type.
    pub fn peek(text: &'a str) -> Result<Self, DecodeError> {
        Ok(serde_json::from_str(text)?)
    }

    /// Whether API Gateway says with this text that the function for a message could not be run, or ran into an error. It
    /// does not say which message it was.
    #[must_use]
    pub fn is_failure(text: &str) -> bool {
        #[derive(Deserialize)]
        struct Failure<'a> {
            #[serde(rename = "type")]
            kind: Option<IgnoredAny>,
            #[serde(borrow)]
            message: Cow<'a, str>,
            #[serde(rename = "connectionId")]
            _connection_id: IgnoredAny,
            #[serde(rename = "requestId")]
            _request_id: IgnoredAny,
        }
        serde_json::from_str::<Failure<'_>>(text)
            .is_ok_and(|failure| failure.kind.is_none() && !failure.message.is_empty())
    }

    /// Whether this is one of the messages that answer a request.
    #[must_use]
    pub fn answers_a_request(&self) -> bool {
        matches!(&*self.kind, "reply" | "chunk" | "continue" | "failed" | "progress" | "accepted" | "frames")
    }

    /// Whether this is one of them that a WebSocket begins, goes on or ends with.
    #[must_use]
    pub fn is_of_a_websocket(&self) -> bool {
        matches!(&*self.kind, "accepted" | "frames" | "failed")
    }
}

/// The tag of a message that begins with it, as [`AgentMessage::encode`] and [`EdgeMessage::encode`] write it. Nothing else
/// is looked at.
fn leading_tag(text: &str) -> Option<&str> {
    let (tag, rest) = text.strip_prefix("{\"type\":\"")?.split_once('"')?;
    (rest.starts_with([',', '}']) && !tag.contains('\\')).then_some(tag)
}

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $( $(#[$vdoc:meta])* $variant:ident($type:ty) = $tag:literal, )+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "type")]
        pub enum $name<'a> {
            $( $(#[$vdoc])* #[serde(rename = $tag)] $variant($type), )+
        }

        impl<'a> $name<'a> {
            /// Reads a message and checks every bound that does not depend on what went before.
            ///
            /// # Errors
            ///
            /// [`DecodeError`]; the peer is not to be trusted with anything it says in that message.
            pub fn decode(text: &'a str) -> Result<Self, DecodeError> {
                // The tag is read first so that each message is parsed straight into its type:
                // a tagged enum would buffer a 128 KB body on the way.
                let kind = match leading_tag(text) {
                    Some(tag) => Cow::Borrowed(tag),
                    None => Envelope::peek(text)?.kind,
                };
                let message = match &*kind {
                    $( $tag => Self::$variant(serde_json::from_str(text)?), )+
                    other => return Err(DecodeError::UnknownType(other.chars().take(32).collect())),
                };
                message.check()?;
                Ok(message)
            }

            /// The message as it travels.
            #[must_use]
            pub fn encode(&self) -> String {
                serde_json::to_string(self).expect("messages have string keys and no failing serializer")
            }
        }
    };
}

messages! {
    /// From agent to edge.
    AgentMessage {
        /// Says which tunnels this connection serves from now on.
        Hello(Hello) = "hello",
        /// Asks for a sign of life.
        Heartbeat(Heartbeat) = "heartbeat",
        /// The head of a response, and as much of its body as was there.
        Reply(Reply<'a>) = "reply",
        /// A later piece of a response's body.
        Chunk(Chunk<'a>) = "chunk",
        /// Asks for the announced body of a request.
        Continue(Continue<'a>) = "continue",
        /// There will be no response, or no more of it.
        Failed(Failed<'a>) = "failed",
        /// Answers `probe`, and returns credit for a streamed request body.
        Progress(Progress<'a>) = "progress",
        /// The upstream has opened a WebSocket.
        Accepted(Accepted<'a>) = "accepted",
        /// Messages of an upstream's WebSocket.
        Frames(AgentFrames<'a>) = "frames",
        /// Asks about deliveries. It is answered with [`EdgeMessage::Deliveries`].
        Deliveries(DeliveriesAsk) = "deliveries",
    }
}

messages! {
    /// From edge to agent.
    EdgeMessage {
        /// Answers `hello`.
        Welcome(Welcome) = "welcome",
        /// Answers `heartbeat`.
        Heartbeat(Heartbeat) = "heartbeat",
        /// A public request.
        Request(Request<'a>) = "request",
        /// A piece of an announced request body.
        RequestChunk(RequestChunk<'a>) = "request_chunk",
        /// The public client has taken chunks; more may be sent.
        Credit(Credit) = "credit",
        /// Nobody waits for this response any more. The agent aborts the upstream call and, unless it
        /// has already sent the last piece, says `failed` with `cancelled`.
        Cancel(Cancel) = "cancel",
        /// Asks how far a response is, because nothing of it has come for a while: a quiet upstream looks
        /// just like a lost last piece. The agent answers with `progress`.
        Probe(Probe<'a>) = "probe",
        /// The edge wants this connection replaced by a new one.
        Drain(Drain) = "drain",
        /// Messages of a public WebSocket.
        Frames(EdgeFrames<'a>) = "frames",
        /// Answers `deliveries`.
        Deliveries(DeliveriesAnswer<'a>) = "deliveries",
    }
}

/// See [`AgentMessage::Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Comes back in `welcome`.
    pub seq: u32,
    /// The sender's [`VERSION`].
    pub version: u32,
    /// The agent process.
    pub agent: AgentId,
    /// The program and its version, for people: `agentd/0.1.0`.
    #[serde(default)]
    pub software: String,
    /// Every tunnel this connection serves from now on; none to take it out of service. Names stay
    /// text here: the edge answers for each one that it refuses.
    pub tunnels: Vec<String>,
    /// What the agent can decode.
    #[serde(default)]
    pub codecs: Codecs,
    /// Whether the agent serves public WebSockets.
    #[serde(default, skip_serializing_if = "is_false")]
    pub websockets: bool,
    /// Which of the tunnels keep requests for later, and how. One that is not here is live.
    /// Edges of earlier releases take no notice.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        serialize_with = "delivery::write_policies"
    )]
    pub deliveries: BTreeMap<String, SaidPolicy>,
}

/// See [`EdgeMessage::Welcome`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Of the `hello` this answers.
    pub seq: u32,
    /// The edge's [`VERSION`].
    pub version: u32,
    /// How the edge calls this connection.
    pub connection_id: ConnectionId,
    /// The tunnels that are open on this connection now.
    pub tunnels: Vec<OpenTunnel>,
    /// The tunnels that are not, and why.
    #[serde(default)]
    pub refused: Vec<RefusedTunnel>,
    /// How often the edge wants a heartbeat, in milliseconds.
    pub heartbeat_ms: u64,
    /// How old a connection may become, in milliseconds.
    pub lifetime_ms: u64,
    /// How long the edge waits for the head of a response, in milliseconds. Edges of earlier releases do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_timeout_ms: Option<u64>,
    /// What the edge can decode.
    #[serde(default)]
    pub codecs: Codecs,
    /// Whether the edge carries public WebSockets.
    #[serde(default, skip_serializing_if = "is_false")]
    pub websockets: bool,
    /// Whether the edge keeps deliveries. Every tunnel is live where it does not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub deliveries: bool,
    /// What of [`Hello::deliveries`] does not hold as it was said. Edges of earlier releases say nothing: there a policy that
    /// was not understood is none, as here. Agents of earlier releases take no notice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<PolicyNotice>,
    /// Whose the connection is, as the token says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Which tunnels the token may open: names, `prefix-*`, or `*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub may_open: Vec<String>,
    /// For how long the identity behind the connection is good, in milliseconds from now: no tunnel is
    /// served on this connection any more after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_ms: Option<u64>,
}

/// A tunnel that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenTunnel {
    /// Its name.
    pub name: TunnelName,
    /// Where the public reaches it.
    pub url: String,
}

/// A tunnel that the edge does not open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedTunnel {
    /// The name as the agent gave it.
    pub name: String,
    /// Why.
    pub reason: Refusal,
}

/// Why a tunnel is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Not a DNS label.
    InvalidName,
    /// A reserved name.
    ReservedName,
    /// The token does not cover it.
    NotAllowed,
    /// It belongs to another owner.
    NameTaken,
    /// Over [`crate::limits::TUNNELS_PER_CONNECTION`].
    TooMany,
    /// The owner, or the tunnel, has as many connections as it may; worth another try.
    TooManyConnections,
    /// The owner has as many tunnels open as it may; worth another try.
    TooManyTunnels,
    /// The edge could not register it now; worth another try.
    TryAgain,
    /// The edge does not take the agent's [`VERSION`]; the edge may be the next one to be upgraded.
    OtherVersion,
    /// A reason that this version does not know.
    #[serde(other)]
    Other,
}

/// A sign of life, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The answer carries the question's number.
    pub seq: u32,
}

/// See [`EdgeMessage::Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request<'a> {
    /// Names the request in `request_chunk`, `credit`, `cancel` and in logs.
    pub request_id: RequestId,
    /// To be returned with every answer; opaque.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// The tunnel it came in by.
    pub tunnel: TunnelName,
    /// The method, any token.
    #[serde(borrow)]
    pub method: Cow<'a, str>,
    /// The request-target for the upstream.
    pub target: Target,
    /// The header fields, hop-by-hop ones removed, forwarding ones added.
    pub headers: Headers,
    /// The whole body; empty when `announced` is there.
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub body: Option<Body<'a>>,
    /// The length in bytes of a body that follows after `continue`: it does not fit this message, or is still to
    /// come. [`crate::limits::UNKNOWN_LENGTH`] where nobody knows yet, which agents of earlier releases refuse as too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announced: Option<u64>,
    /// Whether the announced body comes as the public client sends it, and only as far as the agent has room for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub streamed: bool,
    /// How long the edge waits for the head of the response, in milliseconds from now.
    pub timeout_ms: u64,
    /// What the public client wants to go on with on the same connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<Upgrade>,
    /// The request was accepted before and waits at the edge: nobody reads the body of its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Attempt>,
}

/// See [`Request::upgrade`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upgrade {
    /// A WebSocket (RFC 6455).
    Websocket,
}

/// See [`AgentMessage::Accepted`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// The subprotocol that the upstream chose.
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub subprotocol: Option<Cow<'a, str>>,
    /// The other header fields of the upstream's 101, hop-by-hop ones removed.
    pub headers: Headers,
    /// What the agent can decode.
    #[serde(default)]
    pub codecs: Codecs,
}

/// See [`AgentMessage::Frames`] and [`crate::socket`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentFrames<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// Counts from 1; 0 where there are no frames.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq: u32,
    /// Every batch of the edge up to and including this one has been passed on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub through: u32,
    /// How many batches the agent has sent, where it wants an answer to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent: Option<u32>,
    /// From now on, what the edge has to say comes over the connection that this came over.
    #[serde(default, skip_serializing_if = "is_false")]
    pub moved: bool,
    /// The frames.
    #[serde(default, skip_serializing_if = "Vec::is_empty", borrow)]
    pub frames: Vec<Frame<'a>>,
}

/// See [`EdgeMessage::Frames`] and [`crate::socket`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeFrames<'a> {
    /// The request.
    pub request_id: RequestId,
    /// Counts from 1; 0 where there are no frames.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq: u32,
    /// Every batch of the agent up to and including this one has been passed on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub through: u32,
    /// How many batches the edge has sent, where it wants an answer to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent: Option<u32>,
    /// The frames.
    #[serde(default, skip_serializing_if = "Vec::is_empty", borrow)]
    pub frames: Vec<Frame<'a>>,
}

impl<'a> AgentFrames<'a> {
    /// The frames and what is said beside them.
    #[must_use]
    pub fn batch(self) -> Batch<'a> {
        Batch { seq: self.seq, through: self.through, sent: self.sent, frames: self.frames }
    }
}

impl<'a> EdgeFrames<'a> {
    /// The frames and what is said beside them.
    #[must_use]
    pub fn batch(self) -> Batch<'a> {
        Batch { seq: self.seq, through: self.through, sent: self.sent, frames: self.frames }
    }
}

/// See [`EdgeMessage::RequestChunk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestChunk<'a> {
    /// The request.
    pub request_id: RequestId,
    /// Counts from 1.
    pub seq: u32,
    /// The bytes.
    #[serde(borrow)]
    pub body: Body<'a>,
    /// Whether this is the last piece.
    #[serde(default, skip_serializing_if = "is_false")]
    pub end: bool,
}

impl RequestChunk<'_> {
    /// The message as it travels. It says what [`EdgeMessage::encode`] writes of it, with the body last: nothing looks at that
    /// byte by byte.
    ///
    /// # Panics
    ///
    /// Never: what stands beside the body has string keys and no failing serializer.
    #[must_use]
    pub fn encode(&self) -> String {
        #[derive(Serialize)]
        struct Head<'a> {
            #[serde(rename = "type")]
            kind: &'static str,
            request_id: &'a RequestId,
            seq: u32,
            #[serde(skip_serializing_if = "is_false")]
            end: bool,
        }
        let Self { request_id, seq, body, end } = self;
        let head = Head { kind: "request_chunk", request_id, seq: *seq, end: *end };
        let mut json = serde_json::to_vec(&head).expect("it has string keys and no failing serializer");
        push_field(&mut json, "body", |json| body.push(json));
        String::from_utf8(json).expect("JSON is UTF-8")
    }
}

/// See [`AgentMessage::Reply`]. Its number among the pieces of the response is 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// A final status, 200 to 599.
    pub status: u16,
    /// The header fields, hop-by-hop ones removed.
    pub headers: Headers,
    /// The beginning of the body, if any was there.
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub body: Option<Body<'a>>,
    /// Whether that was all of the body.
    #[serde(default, skip_serializing_if = "is_false")]
    pub end: bool,
}

/// See [`AgentMessage::Chunk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// Counts from 1.
    pub seq: u32,
    /// The bytes; absent in a last piece that only ends the body.
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub body: Option<Body<'a>>,
    /// Whether this is the last piece.
    #[serde(default, skip_serializing_if = "is_false")]
    pub end: bool,
}

/// See [`AgentMessage::Continue`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continue<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// What the agent can decode in `request_chunk`.
    #[serde(default)]
    pub codecs: Codecs,
    /// How many pieces of a streamed body may be under way beyond those that `progress` says were taken. Without it
    /// there is room for all of the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u32>,
}

/// See [`AgentMessage::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed<'a> {
    /// As it came with the request.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// 0 in place of a reply; otherwise the number after the last chunk that was sent.
    pub seq: u32,
    /// Why.
    pub code: ErrorCode,
}

/// See [`AgentMessage::Progress`]. It is sent after the pieces it counts, but may overtake them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress<'a> {
    /// As it came with `probe`.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// How many pieces have been sent so far: those with a lower number. Without meaning when `ended`.
    pub sent: u32,
    /// Whether the last piece is among them, or the agent does not know the request.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ended: bool,
    /// Every piece of a streamed request body up to and including this one has been given to the upstream. Said
    /// unasked while such a body flows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub taken: u32,
}

/// See [`EdgeMessage::Credit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// The request.
    pub request_id: RequestId,
    /// Every chunk up to and including this one has been written to the public client.
    pub through: u32,
}

/// See [`EdgeMessage::Cancel`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// The request.
    pub request_id: RequestId,
}

/// See [`EdgeMessage::Probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe<'a> {
    /// The request.
    pub request_id: RequestId,
    /// To be returned with the answer: an agent that has ended the request has forgotten it.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
}

/// See [`EdgeMessage::Drain`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl AgentMessage<'_> {
    /// Appends the message as it travels: what [`AgentMessage::encode`] says of it, with a body last. Nothing looks at that
    /// byte by byte.
    ///
    /// # Panics
    ///
    /// Never: messages have string keys and no failing serializer, and memory takes every write.
    pub fn append(mut self, json: &mut Vec<u8>) {
        let body = match &mut self {
            Self::Reply(reply) => reply.body.take(),
            Self::Chunk(chunk) => chunk.body.take(),
            _ => None,
        };
        serde_json::to_writer(&mut *json, &self)
            .expect("messages have string keys and no failing serializer");
        if let Some(body) = body {
            push_field(json, "body", |json| body.push(json));
        }
    }

    fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::Reply(reply) => {
                if !(200..=599).contains(&reply.status) {
                    return Err(DecodeError::Invalid("status is not a final one"));
                }
                if !reply.headers.is_within_limits() {
                    return Err(DecodeError::Invalid("head is over its limit"));
                }
                Ok(())
            }
            Self::Accepted(accepted) if !accepted.headers.is_within_limits() => {
                Err(DecodeError::Invalid("head is over its limit"))
            }
            Self::Chunk(chunk) if chunk.seq == 0 => Err(DecodeError::Invalid("chunk 0 is the head")),
            Self::Hello(hello) if hello.software.len() > 128 => {
                Err(DecodeError::Invalid("software is too long"))
            }
            Self::Hello(_)
            | Self::Heartbeat(_)
            | Self::Chunk(_)
            | Self::Continue(_)
            | Self::Failed(_)
            | Self::Progress(_)
            | Self::Accepted(_)
            | Self::Frames(_)
            | Self::Deliveries(_) => Ok(()),
        }
    }

    /// The token that the message returns.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        match self {
            Self::Hello(_) | Self::Heartbeat(_) | Self::Deliveries(_) => None,
            Self::Reply(message) => Some(&message.token),
            Self::Chunk(message) => Some(&message.token),
            Self::Continue(message) => Some(&message.token),
            Self::Failed(message) => Some(&message.token),
            Self::Progress(message) => Some(&message.token),
            Self::Accepted(message) => Some(&message.token),
            Self::Frames(message) => Some(&message.token),
        }
    }
}

impl EdgeMessage<'_> {
    fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::Request(request) => {
                if http::Method::from_bytes(request.method.as_bytes()).is_err() {
                    return Err(DecodeError::Invalid("method is not a token"));
                }
                if request.body.is_some() && request.announced.is_some() {
                    return Err(DecodeError::Invalid("body is both here and announced"));
                }
                if request.upgrade.is_some() && request.delivery.is_some() {
                    return Err(DecodeError::Invalid("a delivery cannot be an upgrade"));
                }
                Ok(())
            }
            Self::RequestChunk(chunk) if chunk.seq == 0 => {
                Err(DecodeError::Invalid("request chunks count from 1"))
            }
            Self::Welcome(welcome) if welcome.heartbeat_ms == 0 || welcome.lifetime_ms == 0 => {
                Err(DecodeError::Invalid("an interval is zero"))
            }
            Self::Welcome(_)
            | Self::Heartbeat(_)
            | Self::RequestChunk(_)
            | Self::Credit(_)
            | Self::Cancel(_)
            | Self::Probe(_)
            | Self::Drain(_)
            | Self::Frames(_)
            | Self::Deliveries(_) => Ok(()),
        }
    }
}

/// What may stand in a request's mailbox beside the messages of the agent it was dispatched to.
pub mod notice {
    /// The message attribute that names the request a mailbox message is for.
    pub const REQUEST_ID: &str = "request_id";

    /// The message attribute that names the agent connection an answer came over. Only the connection that
    /// a request was dispatched to may answer it.
    pub const CONNECTION_ID: &str = "connection_id";

    /// The message attribute that has the mark of the owner whose agent a word of a WebSocket came from, which goes on
    /// where its agent has moved to: any connection of that owner. Other answers have none.
    pub const OWNER: &str = "owner";

    /// The message attribute that names an agent connection that has ended. It is sent to every
    /// leased mailbox, and whoever waits for that connection stops waiting.
    pub const LOST_CONNECTION: &str = "lost_connection";

    /// The body of a message by which a front says that the public client has gone.
    pub const CLIENT_GONE: &str = r#"{"type":"client_gone"}"#;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    const TOKEN: &str = "tok";

    fn reply_text(status: &str, headers: &str) -> String {
        format!(r#"{{"type":"reply","token":"{TOKEN}","status":{status},"headers":{headers},"end":true}}"#)
    }

    #[test]
    fn what_api_gateway_says_of_a_failure_is_told_from_messages() {
        let says = |text: &str| Envelope::is_failure(text);
        assert!(says(r#"{"message": "Internal server error", "connectionId":"c=", "requestId":"r="}"#));
        assert!(says(r#"{"requestId":"r=","connectionId":"c=","message":"Too Many Requests"}"#));
        for other in [
            r#"{"message": "Internal server error"}"#,
            r#"{"message": "", "connectionId":"c=", "requestId":"r="}"#,
            r#"{"type":"x", "message": "m", "connectionId":"c=", "requestId":"r="}"#,
            "{}",
            "",
        ] {
            assert!(!says(other), "{other}");
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let request = EdgeMessage::Request(Request {
            request_id: RequestId::from_random([1; 16]),
            token: TOKEN.into(),
            tunnel: "web".parse().unwrap(),
            method: "M-SEARCH".into(),
            target: Target::parse("//a?").unwrap(),
            headers: Headers::new(),
            body: Some(Body::encode(b"hi")),
            announced: None,
            streamed: false,
            timeout_ms: 1,
            upgrade: None,
            delivery: None,
        });
        let text = request.encode();
        assert_eq!(EdgeMessage::decode(&text).unwrap(), request);
        let chunk = AgentMessage::Chunk(Chunk { token: TOKEN.into(), seq: 1, body: None, end: true });
        assert_eq!(chunk.encode(), r#"{"type":"chunk","token":"tok","seq":1,"end":true}"#);
        assert_eq!(AgentMessage::decode(&chunk.encode()).unwrap(), chunk);
        let probe =
            EdgeMessage::Probe(Probe { request_id: RequestId::from_random([1; 16]), token: TOKEN.into() });
        assert_eq!(EdgeMessage::decode(&probe.encode()).unwrap(), probe);
        let progress =
            AgentMessage::Progress(Progress { token: TOKEN.into(), sent: 3, ended: true, taken: 0 });
        assert_eq!(progress.encode(), r#"{"type":"progress","token":"tok","sent":3,"ended":true}"#);
        assert_eq!(AgentMessage::decode(&progress.encode()).unwrap(), progress);
        assert_eq!(progress.token(), Some(TOKEN));
        assert!(Envelope::peek(&progress.encode()).unwrap().answers_a_request());
    }

    #[test]
    fn a_piece_says_what_serde_writes_of_it() {
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let bodies = [
            Body::Text("".into()),
            Body::Text("\"\\\u{1}\n\u{e9}</".into()),
            Body::Base64("QUJD".repeat(50).into()),
            Body::Zstd("KLUv".into()),
        ];
        let held = |message: AgentMessage<'_>| {
            let mut appended = Vec::new();
            message.clone().append(&mut appended);
            let text = String::from_utf8(appended).unwrap();
            assert_eq!(json(&text), json(&message.encode()));
            assert_eq!(AgentMessage::decode(&text).unwrap(), message);
        };
        for body in bodies.iter().map(Some).chain([None]) {
            for end in [false, true] {
                let (token, body, headers) = (Cow::Borrowed(TOKEN), body.cloned(), Headers::new());
                held(AgentMessage::Reply(Reply {
                    token: token.clone(),
                    status: 200,
                    headers,
                    body: body.clone(),
                    end,
                }));
                held(AgentMessage::Chunk(Chunk { token, seq: 7, body, end }));
            }
        }
        for body in bodies {
            for end in [false, true] {
                let request_id = RequestId::from_random([1; 16]);
                let chunk = RequestChunk { request_id, seq: 7, body: body.clone(), end };
                let text = chunk.encode();
                let message = EdgeMessage::RequestChunk(chunk.clone());
                assert_eq!(json(&text), json(&message.encode()));
                assert_eq!(EdgeMessage::decode(&text).unwrap(), message);
            }
        }
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_types_named() {
        let text = r#"{"new":{"a":[1]},"type":"heartbeat","seq":3}"#;
        assert_eq!(AgentMessage::decode(text).unwrap(), AgentMessage::Heartbeat(Heartbeat { seq: 3 }));
        assert!(
            matches!(AgentMessage::decode(r#"{"type":"later"}"#), Err(DecodeError::UnknownType(name)) if name == "later")
        );
        for bad in
            ["", "[]", "{}", "null", r#"{"type":1}"#, r#"{"type":"heartbeat"}"#, "{\"type\":\"chunk\"}"]
        {
            assert!(matches!(AgentMessage::decode(bad), Err(DecodeError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn only_final_statuses_are_replies() {
        for good in ["200", "404", "599"] {
            assert!(AgentMessage::decode(&reply_text(good, "[]")).is_ok(), "{good}");
        }
        for bad in ["0", "100", "101", "199", "600", "999", "-1", "65536", "\"200\"", "2e2"] {
            assert!(AgentMessage::decode(&reply_text(bad, "[]")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_head_is_bounded() {
        let field = |len: usize| format!(r#"[["a","{}"]]"#, "x".repeat(len));
        let most = limits::HEAD_BYTES - 5;
        assert!(AgentMessage::decode(&reply_text("200", &field(most))).is_ok());
        assert!(AgentMessage::decode(&reply_text("200", &field(most + 1))).is_err());
    }

    #[test]
    fn the_largest_head_fits_a_message_whatever_its_bytes() {
        let mut headers = Headers::new();
        // Every byte over 0x7f takes two bytes in UTF-8, every quote two in JSON.
        headers.push(
            "a".parse().unwrap(),
            http::HeaderValue::from_bytes(&vec![0xff; limits::HEAD_BYTES - 5]).unwrap(),
        );
        let reply = AgentMessage::Reply(Reply {
            token: "t".repeat(limits::TOKEN_BYTES).into(),
            status: 200,
            headers,
            body: None,
            end: true,
        });
        assert!(reply.encode().len() <= limits::MESSAGE_BYTES);
    }

    #[test]
    fn the_envelope_shows_type_and_token_only() {
        let text = reply_text("200", "[]");
        let envelope = Envelope::peek(&text).unwrap();
        assert!(envelope.answers_a_request());
        assert_eq!(envelope.token.as_deref(), Some(TOKEN));
        assert!(!Envelope::peek(r#"{"type":"hello"}"#).unwrap().answers_a_request());
    }

    /// One line for each form that a message of version 1 may have. Lines may be added, never changed.
    const VERSION_1: &str = include_str!("../fixtures/version-1.jsonl");

    /// What a message says, read and written again by whoever may receive it.
    fn read_and_written(text: &str) -> Vec<serde_json::Value> {
        let by_agent = EdgeMessage::decode(text).map(|message| message.encode());
        let by_edge = AgentMessage::decode(text).map(|message| message.encode());
        [by_agent, by_edge].into_iter().flatten().map(|text| serde_json::from_str(&text).unwrap()).collect()
    }

    /// Calls `change` for each object of a JSON value.
    fn for_each_object(
        value: &mut serde_json::Value,
        change: &mut impl FnMut(&mut serde_json::Map<String, serde_json::Value>),
    ) {
        match value {
            serde_json::Value::Object(map) => {
                map.values_mut().for_each(|value| for_each_object(value, change));
                change(map);
            }
            serde_json::Value::Array(list) => {
                list.iter_mut().for_each(|value| for_each_object(value, change));
            }
            _ => {}
        }
    }

    #[test]
    fn every_message_of_version_1_is_understood_as_it_was() {
        let mut kinds = std::collections::BTreeSet::new();
        for line in VERSION_1.lines() {
            let said: serde_json::Value = serde_json::from_str(line).unwrap();
            let read = read_and_written(line);
            assert!(
                !read.is_empty() && read.iter().all(|read| *read == said),
                "{line}\nwas read as {read:?}"
            );
            kinds.insert(said["type"].as_str().unwrap().to_owned());
        }
        assert_eq!(kinds.len(), 17, "{kinds:?}");
    }

    #[test]
    fn what_a_later_release_adds_changes_nothing_and_what_an_earlier_one_lacks_is_not_missed() {
        for line in VERSION_1.lines() {
            let mut said: serde_json::Value = serde_json::from_str(line).unwrap();
            for_each_object(&mut said, &mut |map| {
                // A body is one of its forms and nothing else.
                if !["text", "base64", "zstd"].iter().any(|form| map.contains_key(*form)) {
                    map.insert("later".into(), serde_json::json!({ "type": "later", "seq": [0] }));
                }
            });
            assert_eq!(read_and_written(&said.to_string()), read_and_written(line), "{said}");
            // Lists that may be empty may be absent.
            let mut said: serde_json::Value = serde_json::from_str(line).unwrap();
            for_each_object(&mut said, &mut |map| {
                for optional in ["software", "refused", "codecs", "may_open", "policies"] {
                    if map.get(optional).is_some_and(|value| *value == serde_json::json!([]) || value == "") {
                        map.remove(optional);
                    }
                }
            });
            assert_eq!(read_and_written(&said.to_string()), read_and_written(line), "{said}");
        }
    }

    #[test]
    fn unknown_refusals_and_codecs_do_not_break_an_agent() {
        let text = r#"{"type":"welcome","seq":1,"version":1,"connection_id":"a=","tunnels":[],
            "refused":[{"name":"x","reason":"later"}],"heartbeat_ms":1,"lifetime_ms":1,"codecs":["zstd","x"]}"#;
        let EdgeMessage::Welcome(welcome) = EdgeMessage::decode(text).unwrap() else { panic!("a welcome") };
        assert_eq!(welcome.refused[0].reason, Refusal::Other);
        assert_eq!(welcome.codecs, Codecs::all());
    }
}
