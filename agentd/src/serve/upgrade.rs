//! One public WebSocket at its upstream, from the handshake to the close.
//!
//! Enters: the upstream's 101 and what follows it on the same connection, [`SocketEvent`]s. Leaves: `accepted` and
//! `frames` for the edge. Pings are answered here and not passed on, and so is what WebSocket says about framing.
//!
//! However it ends, each side is told by a close: what the other side said where it said something, 1012 where
//! the upstream vanished or something was lost, so that clients come again.

use std::{future::poll_fn, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderValue, StatusCode, header, response};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use proto::{
    body::{Codec, Codecs},
    error::ErrorCode,
    header::Headers,
    id::RequestId,
    limits,
    message::{Accepted, AgentFrames, AgentMessage, Failed},
    socket::{CLOSE_RESTART, Close, Envelope, Flow, FlowError, Message, Pace, Settings, patience},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use crate::{
    capture::{
        record::Direction,
        ring::{Capture, Tap},
    },
    report::access::SocketLine,
    serve::{
        hint::{self, Given},
        outbox::Outbox,
        sockets::{Registered, Serial, SocketEvent, Sockets},
        tunnel::SocketPlace,
        upstream::UpstreamError,
    },
};

/// How much is read from an upstream at once. It is kept for each WebSocket, also for an idle one.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// How long a violation is kept from the upstream that committed it: what was sent before it is answered first.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

/// What every handshake says for itself.
pub(crate) fn ask(headers: &mut HeaderMap, key: &str) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    if let Ok(key) = HeaderValue::from_str(key) {
        headers.insert(header::SEC_WEBSOCKET_KEY, key);
    }
}

/// Checks the upstream's 101 and takes off what belongs to its connection.
pub(crate) fn check(head: &response::Parts, key: &str) -> Result<(Option<String>, Headers), UpstreamError> {
    if head.status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(UpstreamError::invalid("its status is not a final one"));
    }
    let names = |name, wanted: &str| {
        head.headers.get_all(name).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case(wanted)))
        })
    };
    if !names(header::UPGRADE, "websocket") || !names(header::CONNECTION, "upgrade") {
        return Err(UpstreamError::invalid("it switched to another protocol than WebSocket"));
    }
    let accept = head.headers.get(header::SEC_WEBSOCKET_ACCEPT);
    if accept.is_none_or(|accept| accept.as_bytes() != derive_accept_key(key.as_bytes()).as_bytes()) {
        return Err(UpstreamError::invalid("its Sec-WebSocket-Accept is wrong"));
    }
    if head.headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter().any(|value| !value.is_empty()) {
        return Err(UpstreamError::invalid("it uses a WebSocket extension that was not offered"));
    }
    let subprotocol = head.headers.get(header::SEC_WEBSOCKET_PROTOCOL);
    let subprotocol = subprotocol.and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut headers = Headers::from(&head.headers);
    headers.strip_hop_by_hop();
    headers.retain(|name, _| {
        !name.as_str().starts_with("sec-websocket-")
            && !matches!(*name, header::CONTENT_LENGTH | header::TRANSFER_ENCODING)
    });
    if !headers.is_within_limits() {
        return Err(UpstreamError::invalid("its head is over the limit"));
    }
    Ok((subprotocol, headers))
}

/// An upstream's WebSocket that has just been opened.
pub(crate) struct Socket {
    pub(crate) request_id: RequestId,
    pub(crate) token: Box<str>,
    pub(crate) io: Upgraded,
    pub(crate) serial: Serial,
    pub(crate) outbox: Outbox,
    /// What the edge can decode.
    pub(crate) codecs: Codecs,
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) place: SocketPlace,
    /// How long it may be silent.
    pub(crate) idle: Option<Duration>,
    pub(crate) line: SocketLine,
    /// What the tunnel's owner has been told.
    pub(crate) hints: Arc<Given>,
    /// What shows it to the inspector.
    pub(crate) capture: Option<Capture>,
}

impl Socket {
    /// Accepts the public side, and serves it from a task of its own.
    pub(crate) fn start(self, subprotocol: Option<String>, headers: Headers) {
        let (registered, events) = self.sockets.enter(self.request_id.clone(), self.serial);
        tokio::spawn(self.run(subprotocol, headers, registered, events));
    }

    async fn run(
        self,
        subprotocol: Option<String>,
        headers: Headers,
        registered: Registered,
        events: mpsc::Receiver<Box<SocketEvent>>,
    ) {
        let Self { token, io, outbox, codecs, place, idle, mut line, hints, capture, .. } = self;
        let accepted = AgentMessage::Accepted(Accepted {
            token: (&*token).into(),
            subprotocol: subprotocol.map(Into::into),
            headers,
            codecs: Codecs::all(),
        });
        if outbox.send(accepted.encode().into_bytes(), None).await.is_err() {
            return;
        }
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(limits::SOCKET_MESSAGE_BYTES_MAX))
            .max_frame_size(Some(limits::SOCKET_MESSAGE_BYTES_MAX));
        let upstream = WebSocketStream::from_raw_socket(TokioIo::new(io), Role::Client, Some(config)).await;
        let settings = Settings {
            message_bytes: limits::SOCKET_MESSAGE_BYTES_MAX,
            pace: Pace { interval: limits::SOCKET_AGENT_INTERVAL, burst: limits::SOCKET_BURST },
            codec: codecs.has(Codec::Zstd).then_some(Codec::Zstd),
            ask_after: Some(limits::SOCKET_ASK_AFTER),
        };
        let mut pump = Pump {
            token: &token,
            outbox,
            flow: Flow::new(settings, Instant::now().into_std()),
            moving: None,
            registered,
            events,
            idle,
            line: &mut line,
            hints: &hints,
            tap: capture.as_ref().map(Capture::tap),
        };
        let end = pump.run(upstream).await;
        // The edge waits for a close; where none was sent, this is the last word.
        if end == End::Broken {
            let failed = AgentMessage::Failed(Failed {
                token: (&*token).into(),
                seq: pump.flow.sent() + 1,
                code: ErrorCode::UpstreamReset,
            });
            let _ = pump.outbox.send(failed.encode().into_bytes(), None).await;
        }
        drop(pump);
        match (capture, end) {
            (Some(capture), End::Closed) => capture.complete(),
            (Some(capture), End::Broken) => capture.failed(ErrorCode::UpstreamReset),
            (None, _) | (_, End::Gone) => {}
        }
        drop(place);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    Broken,
    /// The edge knows.
    Gone,
}

struct Pump<'a> {
    token: &'a str,
    outbox: Outbox,
    flow: Flow,
    /// The connection that it moves to, until nothing more can come over the one before.
    moving: Option<(Serial, Option<u32>)>,
    registered: Registered,
    events: mpsc::Receiver<Box<SocketEvent>>,
    idle: Option<Duration>,
    line: &'a mut SocketLine,
    hints: &'a Given,
    tap: Option<&'a Tap>,
}

type Upstream = WebSocketStream<TokioIo<Upgraded>>;

impl Pump<'_> {
    /// Some dev servers open a WebSocket to say that they refuse it.
    fn look_for_refusal(&self, message: &Message) {
        if self.line.upstream_messages() == 1
            && let Message::Text(text) = message
            && let Some((place, hint)) = hint::recognise_message(text)
            && self.hints.first(place)
        {
            self.line.hint(hint);
        }
    }

    async fn run(&mut self, upstream: Upstream) -> End {
        let (mut sink, mut stream) = upstream.split();
        let far = Instant::now() + limits::SOCKET_LIFETIME + limits::RESPONSE_DURATION;
        let mut outgoing: Option<tungstenite::Message> = None;
        let mut unflushed = false;
        // How many bytes of the last message the upstream has not taken.
        let mut unflushed_bytes = 0;
        let mut upstream_ended = false;
        let mut violation: Option<u16> = None;
        let mut close_by: Option<Instant> = None;
        let mut last = Instant::now();
        let end = loop {
            let now = Instant::now();
            if upstream_ended {
                outgoing = None;
            }
            if outgoing.is_none() {
                match self.flow.poll_message(now.into_std()) {
                    Ok(None) => {}
                    Ok(Some(message)) => {
                        self.line.client_sent(&message);
                        if let Some(tap) = self.tap {
                            tap.frame(Direction::ToUpstream, &message);
                        }
                        if let Message::Close(close) = &message {
                            self.line.code(close.as_ref().map(|close| close.code));
                            close_by.get_or_insert(now + patience(unflushed_bytes));
                        }
                        last = now;
                        if upstream_ended {
                            continue;
                        }
                        outgoing = Some(match (violation, message) {
                            (Some(code), Message::Close(_)) => closing(Some(Close::new(code, ""))),
                            (_, message) => to_upstream(message),
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a websocket was broken off");
                        break End::Broken;
                    }
                }
            }
            while let Some(text) = self.flow.poll_transmit(Envelope::Edge(self.token), now.into_std()) {
                if self.outbox.send(text.into_bytes(), None).await.is_err() && self.moving.is_none() {
                    // Where it can go instead, if anywhere, comes as an event.
                    close_by.get_or_insert(now + limits::LOST_DELAY);
                    break;
                }
            }
            if upstream_ended && self.flow.is_closed() && self.flow.is_sent() {
                break End::Closed;
            }
            let deliver = outgoing.is_some() && !upstream_ended;
            let flow_wake = self.flow.poll_timeout(now.into_std()).map(Instant::from_std);
            let idle_at = self.idle.map(|idle| last + idle);
            tokio::select! {
                biased;
                event = self.events.recv() => match event.map(|event| *event) {
                    Some(SocketEvent::Batch(batch)) => {
                        if let Err(error) = self.receive(batch) {
                            tracing::warn!(%error, "a websocket was broken off");
                            break End::Broken;
                        }
                    }
                    Some(SocketEvent::Move(serial, outbox)) => self.go_to(serial, outbox).await,
                    Some(SocketEvent::Retire) => {
                        self.flow.send(Message::Close(Some(Close::new(CLOSE_RESTART, "the agent ends"))));
                        violation = Some(1001);
                        close_by.get_or_insert(now + ANSWERED_WITHIN);
                    }
                    Some(SocketEvent::Cancel | SocketEvent::Lost) | None => {
                        self.line.code(Some(1006));
                        break End::Gone;
                    }
                },
                ready = poll_fn(|cx| if deliver { sink.poll_ready_unpin(cx) } else { sink.poll_flush_unpin(cx) }),
                    if deliver || unflushed =>
                {
                    let sent = ready.and_then(|()| match outgoing.take() {
                        Some(message) => {
                            (unflushed, unflushed_bytes) = (true, message.len());
                            sink.start_send_unpin(message)
                        }
                        None => {
                            (unflushed, unflushed_bytes) = (false, 0);
                            Ok(())
                        }
                    });
                    if sent.is_err() {
                        (unflushed, unflushed_bytes) = (false, 0);
                        // What it has sent before is still to be read.
                        outgoing = None;
                    }
                }
                next = stream.next(), if !upstream_ended && violation.is_none()
                    && (self.flow.wants_more() || self.flow.is_closing()) =>
                {
                    last = now;
                    let mut next = Some(next);
                    while let Some(item) = next.take() {
                        match from_upstream(item) {
                            Heard::Nothing => {}
                            Heard::Message(message) => {
                                self.line.upstream_sent(&message);
                                self.look_for_refusal(&message);
                                if let Some(tap) = self.tap {
                                    tap.frame(Direction::ToClient, &message);
                                }
                                if let Message::Close(close) = &message {
                                    self.line.code(close.as_ref().map(|close| close.code));
                                    close_by.get_or_insert(now + patience(self.flow.untaken()));
                                }
                                self.flow.send(message);
                                // What is there at the same time travels together.
                                if self.flow.wants_more() {
                                    next = stream.next().now_or_never();
                                }
                            }
                            Heard::Violation(code) => {
                                violation = Some(code);
                                self.line.code(Some(code));
                                self.flow.send(Message::Close(Some(Close::new(1011, "the upstream broke a rule"))));
                                close_by.get_or_insert(now + ANSWERED_WITHIN);
                            }
                            Heard::End => upstream_ended = true,
                        }
                    }
                }
                () = sleep_until(flow_wake.unwrap_or(far)), if flow_wake.is_some() => {
                    if let Err(FlowError::Lost) = self.flow.handle_timeout(Instant::now().into_std()) {
                        tracing::warn!("a message of a websocket was lost on the link");
                        break End::Broken;
                    }
                }
                () = sleep_until(idle_at.unwrap_or(far)), if idle_at.is_some() && !self.flow.is_closing() => {
                    self.flow.send(Message::Close(Some(Close::new(1001, "idle"))));
                    violation = Some(1001);
                    close_by.get_or_insert(now + ANSWERED_WITHIN);
                }
                () = sleep_until(close_by.unwrap_or(far)), if close_by.is_some() => break End::Closed,
            }
            if upstream_ended && !self.flow.is_closing() {
                // It vanished without a word: clients should come again.
                self.line.code(Some(1006));
                self.flow.send(Message::Close(Some(Close::new(CLOSE_RESTART, "the upstream has gone"))));
                close_by.get_or_insert(Instant::now() + patience(self.flow.untaken()));
            }
        };
        if !upstream_ended && (end != End::Closed || !self.flow.is_closed() || violation.is_some()) {
            let code = violation.unwrap_or(1001);
            let goodbye = async {
                let _ = sink.send(closing(Some(Close::new(code, "")))).await;
                let _ = sink.close().await;
            };
            let _ = tokio::time::timeout(ANSWERED_WITHIN, goodbye).await;
        }
        end
    }

    fn receive(&mut self, batch: proto::socket::Batch<'_>) -> Result<(), FlowError> {
        if let (Some(sent), Some((_, through))) = (batch.sent, &mut self.moving) {
            through.get_or_insert(sent);
        }
        self.flow.receive(batch, Instant::now().into_std())?;
        if let Some((serial, Some(through))) = self.moving
            && self.flow.has_received(through)
        {
            self.moving = None;
            self.registered.settled(serial);
        }
        Ok(())
    }

    async fn go_to(&mut self, serial: Serial, outbox: Outbox) {
        self.outbox = outbox;
        self.moving = Some((serial, None));
        let moved = AgentMessage::Frames(AgentFrames {
            token: self.token.into(),
            seq: 0,
            through: self.flow.taken(),
            sent: Some(self.flow.sent()),
            moved: true,
            frames: Vec::new(),
        });
        let _ = self.outbox.send(moved.encode().into_bytes(), None).await;
    }
}

/// What an upstream's WebSocket gave.
enum Heard {
    Nothing,
    Message(Message),
    Violation(u16),
    End,
}

fn from_upstream(item: Option<Result<tungstenite::Message, tungstenite::Error>>) -> Heard {
    match item {
        None => Heard::End,
        Some(Ok(tungstenite::Message::Text(text))) => Heard::Message(Message::Text(text.as_str().to_owned())),
        Some(Ok(tungstenite::Message::Binary(bytes))) => Heard::Message(Message::Binary(bytes)),
        Some(Ok(tungstenite::Message::Close(frame))) => Heard::Message(Message::Close(
            frame.map(|frame| Close { code: frame.code.into(), reason: frame.reason.as_str().to_owned() }),
        )),
        Some(Ok(
            tungstenite::Message::Ping(_) | tungstenite::Message::Pong(_) | tungstenite::Message::Frame(_),
        )) => Heard::Nothing,
        Some(Err(tungstenite::Error::Protocol(
            tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
        ))) => Heard::End,
        Some(Err(tungstenite::Error::Protocol(_))) => Heard::Violation(1002),
        Some(Err(tungstenite::Error::Utf8(_))) => Heard::Violation(1007),
        Some(Err(tungstenite::Error::Capacity(_))) => Heard::Violation(1009),
        Some(Err(_)) => Heard::End,
    }
}

fn to_upstream(message: Message) -> tungstenite::Message {
    match message {
        Message::Text(text) => tungstenite::Message::Text(text.into()),
        Message::Binary(bytes) => tungstenite::Message::Binary(bytes),
        Message::Close(close) => closing(close),
    }
}

fn closing(close: Option<Close>) -> tungstenite::Message {
    tungstenite::Message::Close(
        close
            .and_then(Close::sendable)
            .map(|close| CloseFrame { code: close.code.into(), reason: close.reason.into() }),
    )
}
