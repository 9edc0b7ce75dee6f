//! The public end of a WebSocket: the handshake's own fields, and messages over `tungstenite`.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use exchange::public::SocketError;
use futures_util::{Sink, Stream, ready};
use http::{HeaderMap, Method, Version, header};
use proto::socket::{Close, Message};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Bytes,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use crate::meter::Metered;

/// How often a client is pinged, so that nothing in between takes the connection for idle.
const PING_EVERY: Duration = Duration::from_secs(30);

/// How long a client may leave a ping unanswered and say nothing else.
const ANSWERED_WITHIN: Duration = Duration::from_secs(50);

/// After how long without a look this end has not been read: whoever reads looks as often as pings are due.
const UNREAD: Duration = PING_EVERY.saturating_add(Duration::from_secs(5));

/// How much is read at once. It is kept for each WebSocket, also for an idle one.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// Why a handshake is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHandshake {
    /// It is not what RFC 6455 §4.2.1 asks for.
    Invalid,
    /// It is for another version than 13.
    Version,
}

/// Checks a handshake, and gives its key.
///
/// # Errors
///
/// [`BadHandshake`].
pub fn check(method: &Method, version: Version, headers: &HeaderMap) -> Result<String, BadHandshake> {
    let has = |name, wanted: &str| {
        headers.get_all(name).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case(wanted)))
        })
    };
    if *method != Method::GET
        || version != Version::HTTP_11
        || !has(header::UPGRADE, "websocket")
        || !has(header::CONNECTION, "upgrade")
    {
        return Err(BadHandshake::Invalid);
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(BadHandshake::Version);
    }
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else { return Err(BadHandshake::Invalid) };
    // 16 bytes in base64.
    let is_key = key.len() == 24 && key.as_bytes().ends_with(b"==");
    key.to_str().ok().filter(|_| is_key).map(str::to_owned).ok_or(BadHandshake::Invalid)
}

/// A public WebSocket.
pub struct PublicSocket<S> {
    socket: WebSocketStream<Metered<S>>,
    pings: Interval,
    /// When the first ping was sent since anything was heard.
    pinged_at: Option<Instant>,
    looked_at: Instant,
    /// Whether what was read last has been given away.
    has_message: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> PublicSocket<S> {
    /// Takes over a connection whose 101 has been sent.
    pub async fn new(io: Metered<S>, message_bytes: usize) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(message_bytes))
            .max_frame_size(Some(message_bytes));
        let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
        let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { socket, pings, pinged_at: None, looked_at: Instant::now(), has_message: false }
    }
}

fn error_of(error: &tungstenite::Error) -> SocketError {
    match error {
        tungstenite::Error::Protocol(
            ProtocolError::ResetWithoutClosingHandshake | ProtocolError::SendAfterClosing,
        ) => SocketError::Gone,
        tungstenite::Error::Protocol(_) => SocketError::Violation(1002),
        tungstenite::Error::Utf8(_) => SocketError::Violation(1007),
        tungstenite::Error::Capacity(_) => SocketError::Violation(1009),
        _ => SocketError::Gone,
    }
}

/// Try again later.
const TRY_LATER: u16 = 1013;

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for PublicSocket<S> {
    type Item = Result<Message, SocketError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.has_message) {
            self.socket.get_mut().release();
        }
        if self.looked_at.elapsed() >= UNREAD {
            // What has stood still meanwhile did so because nobody read.
            self.socket.get_mut().resume();
            self.pinged_at = None;
        }
        self.looked_at = Instant::now();
        // What is there counts before anybody is judged by what is not.
        if let Poll::Ready(next) = self.poll_message(cx) {
            return Poll::Ready(next);
        }
        while self.pings.poll_tick(cx).is_ready() {
            if self.pinged_at.is_some_and(|at| at.elapsed() >= ANSWERED_WITHIN) {
                return Poll::Ready(Some(Err(SocketError::Silent)));
            }
            if self.socket.get_ref().is_stalled() {
                return Poll::Ready(Some(Err(SocketError::Violation(TRY_LATER))));
            }
            // A client that takes nothing gets no ping; it is not silent for want of one.
            if matches!(Pin::new(&mut self.socket).poll_ready(cx), Poll::Ready(Ok(()))) {
                let _ = Pin::new(&mut self.socket).start_send(tungstenite::Message::Ping(Bytes::new()));
                let _ = Pin::new(&mut self.socket).poll_flush(cx);
                self.pinged_at.get_or_insert_with(Instant::now);
            }
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> PublicSocket<S> {
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, SocketError>>> {
        loop {
            let next = ready!(Pin::new(&mut self.socket).poll_next(cx));
            self.pinged_at = None;
            self.has_message = true;
            break Poll::Ready(match next {
                None => None,
                Some(Err(_)) if self.socket.get_ref().is_refused() => {
                    Some(Err(SocketError::Violation(TRY_LATER)))
                }
                Some(Err(error)) => Some(Err(error_of(&error))),
                Some(Ok(tungstenite::Message::Text(text))) => {
                    Some(Ok(Message::Text(text.as_str().to_owned())))
                }
                Some(Ok(tungstenite::Message::Binary(bytes))) => Some(Ok(Message::Binary(bytes))),
                Some(Ok(tungstenite::Message::Close(frame))) => {
                    Some(Ok(Message::Close(frame.map(|frame| Close {
                        code: frame.code.into(),
                        reason: frame.reason.as_str().to_owned(),
                    }))))
                }
                Some(Ok(
                    tungstenite::Message::Ping(_)
                    | tungstenite::Message::Pong(_)
                    | tungstenite::Message::Frame(_),
                )) => continue,
            });
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Sink<Message> for PublicSocket<S> {
    type Error = SocketError;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.socket).poll_ready(cx).map_err(|error| error_of(&error))
    }

    fn start_send(mut self: Pin<&mut Self>, message: Message) -> Result<(), SocketError> {
        let message = match message {
            Message::Text(text) => tungstenite::Message::Text(text.into()),
            Message::Binary(bytes) => tungstenite::Message::Binary(bytes),
            Message::Close(close) => tungstenite::Message::Close(
                close
                    .and_then(Close::sendable)
                    .map(|close| CloseFrame { code: close.code.into(), reason: close.reason.into() }),
            ),
        };
        Pin::new(&mut self.socket).start_send(message).map_err(|error| error_of(&error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(|error| error_of(&error))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(|error| error_of(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
    use http::{HeaderName, HeaderValue};
    use tokio::io::DuplexStream;
    use tokio_tungstenite::tungstenite::protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    };

    use super::*;
    use exchange::budget::FREE_BYTES;

    use crate::meter::{Meter, STALLED};

    /// A client, the relay's end, and what all hold.
    async fn pair(meter: &Rc<Meter>) -> (WebSocketStream<DuplexStream>, PublicSocket<DuplexStream>) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let server = PublicSocket::new(Metered::new(server, Rc::clone(meter)), 1 << 20).await;
        (WebSocketStream::from_raw_socket(client, Role::Client, None).await, server)
    }

    fn piece(opcode: OpCode, bytes: usize, is_last: bool) -> tungstenite::Message {
        tungstenite::Message::Frame(Frame::message(vec![7; bytes], opcode, is_last))
    }

    #[tokio::test]
    async fn long_messages_share_a_budget_and_one_past_it_ends_its_own_websocket_only() {
        // Two frames of a client have 28 bytes of their own.
        const BUDGET: usize = 100_000;
        let meter = Meter::new(BUDGET + 28);
        let (mut first, mut server) = pair(&meter).await;
        let (mut second, mut other) = pair(&meter).await;
        assert_eq!(meter.open(), 2);
        // Just what the budget has.
        let half = (FREE_BYTES + BUDGET) / 2;
        let halves = async {
            first.send(piece(OpCode::Data(Data::Binary), half, false)).await.unwrap();
            first.send(piece(OpCode::Data(Data::Continue), FREE_BYTES + BUDGET - half, true)).await.unwrap();
        };
        let ((), message) = tokio::join!(halves, server.next());
        assert_eq!(message.unwrap().unwrap().len(), FREE_BYTES + BUDGET);
        // It has been given away, but not sent on: nothing is left for another one, small messages aside.
        second.send(tungstenite::Message::text("small")).await.unwrap();
        assert_eq!(other.next().await.unwrap().unwrap(), Message::Text("small".into()));
        let long =
            async { drop(second.send(piece(OpCode::Data(Data::Binary), FREE_BYTES + 1, false)).await) };
        let ((), refused) = tokio::join!(long, other.next());
        assert_eq!(refused.unwrap().unwrap_err(), SocketError::Violation(TRY_LATER));
        // It is told so.
        other.send(Message::Close(Some(Close::new(TRY_LATER, "")))).await.unwrap();
        let told = second.next().await.unwrap().unwrap();
        assert!(
            matches!(told, tungstenite::Message::Close(Some(frame)) if u16::from(frame.code) == TRY_LATER)
        );
        drop((second, other));
        // Who asks for the next message has sent the last one on.
        assert!(server.next().now_or_never().is_none());
        let (mut third, mut server) = pair(&meter).await;
        let whole = piece(OpCode::Data(Data::Binary), FREE_BYTES + BUDGET, true);
        let (sent, message) = tokio::join!(third.send(whole), server.next());
        sent.unwrap();
        assert_eq!(message.unwrap().unwrap().len(), FREE_BYTES + BUDGET);
        assert_eq!(meter.open(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_message_that_stalls_gives_its_share_back() {
        let meter = Meter::new(1000);
        let (mut client, mut server) = pair(&meter).await;
        let begin = client.send(piece(OpCode::Data(Data::Binary), FREE_BYTES + 100, false));
        let (begun, ended) = tokio::join!(begin, server.next());
        begun.unwrap();
        assert_eq!(ended.unwrap().unwrap_err(), SocketError::Violation(TRY_LATER));
        // Less than the free bytes may stay as long as the client answers pings.
        let (mut client, mut server) = pair(&meter).await;
        client.send(piece(OpCode::Data(Data::Binary), FREE_BYTES / 2, false)).await.unwrap();
        let waited = tokio::time::timeout(PING_EVERY + STALLED, server.next());
        assert!(waited.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_judged_by_what_was_not_read() {
        let meter = Meter::new(1 << 20);
        let (mut client, mut server) = pair(&meter).await;
        let long = FREE_BYTES + 100;
        let whole = client.send(piece(OpCode::Data(Data::Binary), long, true));
        let (sent, message) = tokio::join!(whole, server.next());
        sent.unwrap();
        assert_eq!(message.unwrap().unwrap().len(), long);
        // Its upstream takes nothing for longer than a client may be silent or a message may stand still.
        tokio::time::advance(ANSWERED_WITHIN * 2 + PING_EVERY + STALLED).await;
        assert!(tokio::time::timeout(PING_EVERY - STALLED / 2, server.next()).await.is_err());
        client.send(tungstenite::Message::text("still here")).await.unwrap();
        assert_eq!(server.next().await.unwrap().unwrap(), Message::Text("still here".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_nothing_is_told_so() {
        let (_client, mut server) = pair(&Meter::new(1000)).await;
        let begun = Instant::now();
        assert_eq!(server.next().await.unwrap().unwrap_err(), SocketError::Silent);
        let after = begun.elapsed();
        assert!(after >= PING_EVERY + ANSWERED_WITHIN && after <= PING_EVERY * 3, "{after:?}");
    }

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        fields.iter().map(field).collect()
    }

    #[test]
    fn a_handshake_is_what_the_standard_says() {
        let good = [
            ("upgrade", "WebSocket"),
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let checked = |fields: &[_]| check(&Method::GET, Version::HTTP_11, &headers(fields));
        assert_eq!(checked(&good).as_deref(), Ok("dGhlIHNhbXBsZSBub25jZQ=="));
        assert_eq!(check(&Method::POST, Version::HTTP_11, &headers(&good)), Err(BadHandshake::Invalid));
        assert_eq!(check(&Method::GET, Version::HTTP_10, &headers(&good)), Err(BadHandshake::Invalid));
        for missing in 0..good.len() {
            let mut fields = good.to_vec();
            let (name, _) = fields.remove(missing);
            let wanted =
                if name == "sec-websocket-version" { BadHandshake::Version } else { BadHandshake::Invalid };
            assert_eq!(checked(&fields), Err(wanted), "{name}");
        }
        let mut short = good;
        short[3].1 = "c2hvcnQ=";
        assert_eq!(checked(&short), Err(BadHandshake::Invalid));
        let mut other = good;
        other[2].1 = "8";
        assert_eq!(checked(&other), Err(BadHandshake::Version));
    }
}
