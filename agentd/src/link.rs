//! One WebSocket to the edge: how it is dialled, how messages are cut into frames and written, and
//! what its end means.
//!
//! Leaves: a stream of received messages for the connection's loop, and an [`Outbox`] through which
//! everybody on the connection sends.

pub(crate) mod connection;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderValue, StatusCode, header};
use proto::limits;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{error::Elapsed, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async_with_config,
    tungstenite::{
        self, Message,
        handshake::client::generate_key,
        protocol::{
            CloseFrame, WebSocketConfig,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};

use crate::{config::edge_url::EdgeUrl, identity::credential::Token, tls::TlsError};

/// A received message may be a little longer than the edge is allowed to send.
const RECEIVE_BYTES: usize = limits::MESSAGE_BYTES + 8 * 1024;

/// How much of what is sent may wait unsent in the kernel: one message, so that what is sent next
/// is not behind megabytes of a download.
const UNSENT_BYTES: u32 = limits::MESSAGE_BYTES as u32;

/// How long unacknowledged bytes may be under way before the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// When the kernel asks for a sign of life on a silent connection.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How many small messages may wait to be written. Whoever finds it full waits in line.
const OUTBOX_MESSAGES: usize = 64;

/// A message of more than this counts as bulk.
const BULK_BYTES: usize = 16 * 1024;

/// How many bulk messages may wait to be written: one being written and one ready behind it.
/// Small messages overtake the others, so a download delays them by no more than this.
const BULK_MESSAGES: usize = 2;

/// Control messages are few: heartbeats stop when they are not answered.
const CONTROL_MESSAGES: usize = 16;

/// How the other end says that this connection, not this agent, is over.
const RESTART_CODES: [u16; 3] = [1001, 1012, 1013];

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Received messages.
pub(crate) type Incoming = SplitStream<Socket>;

/// Whether another try can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// Yes, after a while.
    Later,
    /// Not with this token.
    Never,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("cannot look up or reach {0}: {1}")]
    Connect(String, #[source] io::Error),
    #[error("TLS with the edge failed: {0}")]
    Tls(#[source] io::Error),
    #[error("the edge refused the token (HTTP {0})")]
    Identity(StatusCode),
    #[error("the edge answered HTTP {0} instead of opening a WebSocket")]
    Status(StatusCode),
    #[error("opening a WebSocket failed: {0}")]
    Handshake(#[source] Box<tungstenite::Error>),
    #[error("opening the connection took longer than {0:?}")]
    TooLate(Duration),
}

impl DialError {
    pub(crate) const fn retry(&self) -> Retry {
        match self {
            Self::Identity(_) => Retry::Never,
            Self::Connect(..) | Self::Tls(_) | Self::Status(_) | Self::Handshake(_) | Self::TooLate(_) => {
                Retry::Later
            }
        }
    }

    /// A word for the metrics.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::Connect(..) => "unreachable",
            Self::Tls(_) => "tls",
            Self::Identity(_) => "identity",
            Self::Status(_) => "status",
            Self::Handshake(_) => "handshake",
            Self::TooLate(_) => "timeout",
        }
    }
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the edge closed the connection ({code}{reason})")]
    Closed { code: u16, reason: String },
    #[error("the edge closed the connection without a word")]
    Eof,
    #[error("the connection failed: {0}")]
    Broken(#[source] Box<tungstenite::Error>),
    #[error("writing took longer than {0:?}")]
    WriteTimedOut(Duration),
    #[error("the edge sent a binary message")]
    Binary,
}

impl LinkError {
    /// Whether the edge just wants the agent to come back.
    pub(crate) fn is_restart(&self) -> bool {
        matches!(self, Self::Closed { code, .. } if RESTART_CODES.contains(code))
    }

    /// A word for the metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Closed { .. } if self.is_restart() => "edge_restart",
            Self::Closed { .. } => "closed",
            Self::Eof => "eof",
            Self::Broken(_) => "broken",
            Self::WriteTimedOut(_) => "write_timeout",
            Self::Binary => "binary",
        }
    }

    pub(crate) fn from_close(frame: Option<&CloseFrame>) -> Self {
        match frame {
            None => Self::Eof,
            Some(frame) => {
                let reason: String = frame.reason.chars().filter(|c| !c.is_control()).take(100).collect();
                let reason = if reason.is_empty() { reason } else { format!(": {reason}") };
                Self::Closed { code: frame.code.into(), reason }
            }
        }
    }
}

impl From<tungstenite::Error> for LinkError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => Self::Eof,
            other => Self::Broken(Box::new(other)),
        }
    }
}

/// How to reach the edge. Cheap to keep: roots of trust are there only for `wss`.
#[derive(Clone)]
pub(crate) struct Dialer {
    url: EdgeUrl,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Dialer {
    /// Prepares dialling `url`; `ca_file` is trusted beside the system's roots.
    pub(crate) fn new(url: EdgeUrl, ca_file: Option<&std::path::Path>) -> Result<Self, TlsError> {
        use crate::tls::{Trust, client_config};
        let tls = if url.is_secure() {
            Some(client_config(ca_file.map_or(Trust::System, Trust::SystemAnd), &[])?)
        } else {
            None
        };
        Ok(Self { url, tls })
    }

    /// Opens a connection within [`limits::CONNECT_TIMEOUT`].
    pub(crate) async fn dial(&self, token: &Token) -> Result<Link, DialError> {
        timeout(limits::CONNECT_TIMEOUT, self.dial_without_deadline(token))
            .await
            .unwrap_or(Err(DialError::TooLate(limits::CONNECT_TIMEOUT)))
    }

    async fn dial_without_deadline(&self, token: &Token) -> Result<Link, DialError> {
        let unreachable = |error| DialError::Connect(self.url.authority().to_owned(), error);
        // The name is looked up at each try: an edge may move.
        let stream = TcpStream::connect((self.url.host(), self.url.port())).await.map_err(unreachable)?;
        tune(&stream).map_err(unreachable)?;
        let stream = match &self.tls {
            None => MaybeTlsStream::Plain(stream),
            Some(config) => {
                let name = rustls::pki_types::ServerName::try_from(self.url.host().to_owned())
                    .map_err(|error| DialError::Tls(io::Error::other(error)))?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                MaybeTlsStream::Rustls(connector.connect(name, stream).await.map_err(DialError::Tls)?)
            }
        };
        let mut request = http::Request::get(self.url.to_string())
            .header(header::HOST, self.url.authority())
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::USER_AGENT, crate::SOFTWARE)
            .body(())
            .map_err(|error| DialError::Handshake(Box::new(error.into())))?;
        let authorization = token.authorization().unwrap_or_else(|| HeaderValue::from_static(""));
        request.headers_mut().insert(header::AUTHORIZATION, authorization);
        let config = WebSocketConfig::default()
            .read_buffer_size(16 * 1024)
            .write_buffer_size(limits::FRAME_BYTES)
            .max_write_buffer_size(2 * limits::MESSAGE_BYTES)
            .max_message_size(Some(RECEIVE_BYTES))
            .max_frame_size(Some(RECEIVE_BYTES));
        match client_async_with_config(request, stream, Some(config)).await {
            Ok((socket, _)) => Ok(Link::start(socket)),
            Err(tungstenite::Error::Http(response)) => Err(match response.status() {
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => DialError::Identity(status),
                status => DialError::Status(status),
            }),
            Err(error) => Err(DialError::Handshake(Box::new(error))),
        }
    }
}

/// Socket options that bound what a dead or slow peer can cost. None of them is worth failing for.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
    for result in [
        socket.set_tcp_keepalive(&keepalive),
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT)),
        socket.set_tcp_notsent_lowat(UNSENT_BYTES),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "socket option was not taken");
        }
    }
    Ok(())
}

/// An open connection.
pub(crate) struct Link {
    /// What the edge sends.
    pub(crate) incoming: Incoming,
    /// Where everybody sends.
    pub(crate) outbox: Outbox,
    /// Ends with the connection's end as the writer sees it.
    pub(crate) writer: tokio::task::JoinHandle<Result<(), LinkError>>,
}

impl Link {
    fn start(socket: Socket) -> Self {
        let (sink, incoming) = socket.split();
        let (control, control_queue) = mpsc::channel(CONTROL_MESSAGES);
        let (data, data_queue) = mpsc::channel(OUTBOX_MESSAGES);
        let writer = tokio::spawn(write(sink, control_queue, data_queue));
        let outbox = Outbox { control, data, bulk: Arc::new(Semaphore::new(BULK_MESSAGES)) };
        Self { incoming, outbox, writer }
    }
}

/// A message on its way out. The permit is given back when it has been written.
struct Outgoing {
    text: Bytes,
    _bulk: Option<OwnedSemaphorePermit>,
}

enum Control {
    Text(Bytes),
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

impl Outbox {
    /// Sends a control message ahead of everything that waits. Never waits itself.
    pub(crate) fn send_control(&self, text: String) -> Result<(), LinkGone> {
        self.control.try_send(Control::Text(text.into())).map_err(|_| LinkGone)
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
        self.data.send(Outgoing { text: text.into(), _bulk: bulk }).await.map_err(|_| LinkGone)
    }
}

/// Writes what is handed in until the connection ends or is closed.
async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut control: mpsc::Receiver<Control>,
    mut data: mpsc::Receiver<Outgoing>,
) -> Result<(), LinkError> {
    let late = |_: Elapsed| LinkError::WriteTimedOut(limits::WRITE_TIMEOUT);
    loop {
        // Small messages that are there together leave together.
        let next = match (control.try_recv(), data.is_empty()) {
            (Ok(message), _) => Next::Control(message),
            (Err(_), false) => data.try_recv().map_or(Next::Nothing, Next::Data),
            (Err(_), true) => {
                timeout(limits::WRITE_TIMEOUT, sink.flush()).await.map_err(late)??;
                tokio::select! {
                    biased;
                    message = control.recv() => message.map_or(Next::End, Next::Control),
                    message = data.recv() => message.map_or(Next::End, Next::Data),
                }
            }
        };
        match next {
            Next::Nothing => {}
            Next::End => return Ok(()),
            Next::Control(Control::Text(text)) => write_message(&mut sink, text).await?,
            Next::Data(Outgoing { text, _bulk }) => write_message(&mut sink, text).await?,
            Next::Control(Control::Close(code, reason)) => {
                data.close();
                while let Some(Outgoing { text, _bulk }) = data.recv().await {
                    write_message(&mut sink, text).await?;
                }
                let frame = CloseFrame { code, reason: reason.into() };
                timeout(limits::WRITE_TIMEOUT, sink.send(Message::Close(Some(frame))))
                    .await
                    .map_err(late)??;
                return Ok(());
            }
        }
    }
}

enum Next {
    Nothing,
    End,
    Control(Control),
    Data(Outgoing),
}

/// Writes one text message in frames of at most [`limits::FRAME_BYTES`]. A frame is under way
/// before the next is handed over, so that the answer to a ping goes between them.
async fn write_message(sink: &mut SplitSink<Socket, Message>, mut text: Bytes) -> Result<(), LinkError> {
    let late = |_: Elapsed| LinkError::WriteTimedOut(limits::WRITE_TIMEOUT);
    let mut opcode = Data::Text;
    loop {
        let frame = text.split_to(text.len().min(limits::FRAME_BYTES));
        let last = text.is_empty();
        let frame = Message::Frame(Frame::message(frame, OpCode::Data(opcode), last));
        timeout(limits::WRITE_TIMEOUT, sink.feed(frame)).await.map_err(late)??;
        if last {
            return Ok(());
        }
        timeout(limits::WRITE_TIMEOUT, sink.flush()).await.map_err(late)??;
        opcode = Data::Continue;
    }
}
