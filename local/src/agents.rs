//! The agents' side of the edge: an API Gateway WebSocket API on loopback.
//!
//! What enters are handshakes and text messages of agents; what leaves are invocations of
//! `authorizer`, `connect`, `response` and `disconnect`, and to the agents what those answer or what
//! is posted to their connections. Every quota of the real API closes a connection here too.

mod event;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::limits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{self, Instant},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        handshake::derive_accept_key,
        protocol::{
            CloseFrame, Role, WebSocketConfig,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::event::STAGE;
use self::event::{Authorization, Context, Route, RouteAnswer};
use crate::{
    chaos::{Chaos, Fault},
    clock::Clock,
    connections::{Connections, Handle, Identity, Outgoing},
    lambda::{InvokeError, Lambda},
    latency::{Hop, Latency},
    listener,
};

/// How many messages of one connection are in invocations at the same time; the next one is not read
/// before one of them has ended.
const MESSAGES_IN_FLIGHT: usize = 64;

/// How many posted messages wait for one agent that reads slowly; one more is refused with 429.
const POSTS_WAITING: usize = 64;

/// How many connections are open at the same time.
const CONNECTIONS: usize = 4096;

/// How long a handshake's request may take.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// For how long, and up to how many bytes, an agent is read from after the edge has closed, so that
/// the close frame reaches it before the socket is gone.
const LINGER_TIME: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 16 * 1024 * 1024;

/// The agents' API.
#[derive(Debug)]
pub struct AgentApi {
    /// How long hops take.
    pub latency: Latency,
    /// Where the functions run.
    pub lambda: Lambda,
    /// Where open connections are entered.
    pub connections: Connections,
    /// How fast the limits on connections pass.
    pub clock: Clock,
    /// Cuts connections.
    pub chaos: Arc<Chaos>,
    /// What the API calls itself: host and port.
    pub domain: String,
    /// How long an agent may take to accept what is written to it.
    pub write_timeout: Duration,
}

/// Serves agents until `shutdown` is cancelled, then closes every connection and waits until their
/// ends have been reported.
pub async fn serve(listener: TcpListener, api: Arc<AgentApi>, shutdown: CancellationToken) {
    let tasks = TaskTracker::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener::accept(&listener, "an agent") => accepted,
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        let place = Arc::new(place);
        let server = Server { api: api.clone(), tasks: tasks.clone(), shutdown: shutdown.clone() };
        tasks.spawn(async move {
            let service = service_fn(move |request| {
                let (server, place) = (server.clone(), place.clone());
                async move { Ok::<_, Infallible>(server.handshake(request, peer, place).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                tracing::debug!(%error, "handshake ended");
            }
        });
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

#[derive(Clone)]
struct Server {
    api: Arc<AgentApi>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// A connection that `connect` has let in. However it ends, `disconnect` hears of it.
struct Session {
    context: Arc<Context>,
    server: Server,
    status: u16,
    reason: &'static str,
}

impl Drop for Session {
    fn drop(&mut self) {
        let event = self.context.disconnect(self.status, self.reason);
        tracing::info!(connection_id = %self.context.connection, status = self.status, "agent disconnected");
        let lambda = self.server.api.lambda.clone();
        self.server.tasks.spawn(async move {
            if let Err(error) = lambda.invoke("disconnect", event).await {
                tracing::debug!(%error, "disconnect was not handled");
            }
        });
    }
}

/// Why a handshake fails, as the status that the agent sees.
type Refused = StatusCode;

impl Server {
    async fn handshake(
        &self,
        mut request: Request<Incoming>,
        peer: SocketAddr,
        place: Arc<tokio::sync::OwnedSemaphorePermit>,
    ) -> Response<Full<Bytes>> {
        let Some(accept) = accept_key(&request) else { return refuse(StatusCode::UPGRADE_REQUIRED) };
        if self.shutdown.is_cancelled() {
            return refuse(StatusCode::SERVICE_UNAVAILABLE);
        }
        let upgrade = hyper::upgrade::on(&mut request);
        // In a task of its own: an agent that hangs up in between must not leave `connect` without
        // its `disconnect`.
        let opening = self.tasks.spawn(self.clone().open(request, peer));
        let session = match opening.await {
            Ok(Ok(session)) => session,
            Ok(Err(status)) => return refuse(status),
            Err(_) => return refuse(StatusCode::INTERNAL_SERVER_ERROR),
        };
        self.tasks.spawn(async move {
            match upgrade.await {
                Ok(upgraded) => session.run(upgraded).await,
                Err(error) => tracing::debug!(%error, "agent left during its handshake"),
            }
            drop(place);
        });
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        response
    }

    /// Asks `authorizer` and `connect` about a handshake.
    async fn open(self, request: Request<Incoming>, peer: SocketAddr) -> Result<Session, Refused> {
        let (headers, uri) = (request.headers(), request.uri());
        if !event::has_credentials(headers, uri) {
            return Err(StatusCode::UNAUTHORIZED);
        }
        let user_agent = headers
            .get(header::USER_AGENT)
            .map(|value| proto::header::value_to_text(value).into_owned())
            .unwrap_or_default();
        let mut context = Context::new(peer.ip(), user_agent, self.api.domain.clone());
        let arn = Context::method_arn();
        let answer = self.api.lambda.invoke("authorizer", context.connect(headers, uri, Some(&arn))).await;
        let authorized = match answer {
            Ok(answer) => match event::read_authorization(&answer) {
                Authorization::Allowed(authorized) => authorized,
                Authorization::Denied => return Err(StatusCode::FORBIDDEN),
                Authorization::Invalid => {
                    tracing::error!("authorizer answered with what is not a policy");
                    return Err(StatusCode::INTERNAL_SERVER_ERROR);
                }
            },
            // The one error by which an authorizer can say 401.
            Err(InvokeError::Function { message, .. }) if message == "Unauthorized" => {
                return Err(StatusCode::UNAUTHORIZED);
            }
            Err(error) => {
                tracing::error!(%error, "authorizer failed");
                return Err(StatusCode::INTERNAL_SERVER_ERROR);
            }
        };
        context.authorize(&authorized);
        match self.api.lambda.invoke("connect", context.connect(headers, uri, None)).await {
            Ok(answer) if event::read_answer(&answer) != RouteAnswer::Failed => {
                tracing::info!(connection_id = %context.connection, "agent connected");
                Ok(Session {
                    context: Arc::new(context),
                    server: self,
                    status: 1006,
                    reason: "Connection closed abnormally",
                })
            }
            Ok(_) => Err(StatusCode::FORBIDDEN),
            Err(error) => {
                tracing::error!(%error, "connect failed");
                Err(StatusCode::BAD_GATEWAY)
            }
        }
    }
}

/// The answer to a WebSocket handshake's key; none where the request is not one.
fn accept_key<B>(request: &Request<B>) -> Option<HeaderValue> {
    let headers = request.headers();
    let lists = |name, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value: &HeaderValue| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|one| one.trim().eq_ignore_ascii_case(token))
    };
    let is_handshake = *request.method() == Method::GET
        && request.version() >= Version::HTTP_11
        && lists(header::CONNECTION, "upgrade")
        && lists(header::UPGRADE, "websocket")
        && headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_handshake)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

fn refuse(status: StatusCode) -> Response<Full<Bytes>> {
    let body = format!("{{\"message\":\"{}\"}}", status.canonical_reason().unwrap_or("Refused"));
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(body.into()))
        .expect("the response is made of constants")
}

type Socket = WebSocketStream<TcpStream>;

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The edge closes it.
    Close(u16, &'static str),
    /// The agent has closed it.
    Closed(u16),
    /// It is gone, or is to be gone, without a word.
    Cut,
}

const GOING_AWAY: End = End::Close(1001, "Going away");

impl Session {
    async fn run(mut self, upgraded: Upgraded) {
        let Ok(parts) = upgraded.downcast::<TokioIo<TcpStream>>() else {
            return tracing::error!("the upgraded connection is not the accepted one");
        };
        let config = WebSocketConfig::default()
            // Cleared before each read, and messages are mostly about a kilobyte.
            .read_buffer_size(limits::FRAME_BYTES / 2)
            .max_frame_size(Some(limits::FRAME_BYTES))
            .max_message_size(Some(limits::MESSAGE_BYTES));
        let socket = Socket::from_partially_read(
            parts.io.into_inner(),
            parts.read_buf.to_vec(),
            Role::Server,
            Some(config),
        )
        .await;
        let identity = Identity {
            source_ip: self.context.source_ip.to_string(),
            user_agent: self.context.user_agent.clone(),
        };
        let (handle, posts) =
            self.server.api.connections.open(self.context.connection.clone(), identity, POSTS_WAITING);
        let handle = Arc::new(handle);
        let (sink, stream) = socket.split();
        // Room for the answer of each message in flight: none of them waits while it holds its place.
        let (answers, answered) = mpsc::channel(MESSAGES_IN_FLIGHT);
        let stop_writing = CancellationToken::new();
        let writer = Writer { sink, posts, answers: answered, timeout: self.server.api.write_timeout };
        let mut writing = tokio::spawn(writer.run(stop_writing.clone()));
        let mut reader = Reader { session: &self, handle: handle.clone(), stream, answers };
        let mut early = None;
        let end = tokio::select! {
            end = reader.run() => end,
            written = &mut writing => {
                let (sink, end) = written.unwrap_or((None, End::Cut));
                early = Some(sink);
                end
            }
        };
        let stream = reader.stream;
        // From here on posts to it are answered with 410.
        drop(handle);
        self.server.api.connections.close(&self.context.connection);
        stop_writing.cancel();
        let sink = match early {
            Some(sink) => sink,
            None => writing.await.ok().and_then(|(sink, _)| sink),
        };
        (self.status, self.reason) = match end {
            End::Close(status, reason) => (status, reason),
            End::Closed(1005) => (1005, "Client-side close frame status not set"),
            End::Closed(status) => (status, "Client-side close"),
            End::Cut => (1006, "Connection closed abnormally"),
        };
        if let (End::Close(status, reason), Some(sink)) = (end, sink)
            && let Ok(socket) = sink.reunite(stream)
        {
            let close = CloseFrame { code: CloseCode::from(status), reason: Utf8Bytes::from_static(reason) };
            let _ = time::timeout(LINGER_TIME, close_and_linger(socket, close)).await;
        }
    }
}

/// Sends a close frame and reads on until the agent has hung up: closing a socket with unread bytes
/// would reset it, and the frame could be lost.
async fn close_and_linger(mut socket: Socket, close: CloseFrame) {
    if socket.close(Some(close)).await.is_err() {
        return;
    }
    let stream = socket.get_mut();
    // Reading raw: what comes need not be WebSocket any more.
    let _ = tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await;
    let _ = stream.shutdown().await;
}

struct Reader<'a> {
    session: &'a Session,
    handle: Arc<Handle>,
    stream: SplitStream<Socket>,
    answers: mpsc::Sender<Bytes>,
}

impl Reader<'_> {
    async fn run(&mut self) -> End {
        let Server { api, shutdown, .. } = &self.session.server;
        let places = Arc::new(Semaphore::new(MESSAGES_IN_FLIGHT));
        let idle_time = api.clock.scale(limits::CONNECTION_IDLE);
        let mut lifetime = std::pin::pin!(time::sleep(api.clock.scale(limits::CONNECTION_LIFETIME)));
        let mut idle = std::pin::pin!(time::sleep(idle_time));
        loop {
            let next = async {
                let place = places.clone().acquire_owned().await.expect("nothing closes the semaphore");
                (self.stream.next().await, place)
            };
            let (message, place) = tokio::select! {
                next = next => next,
                () = shutdown.cancelled() => return GOING_AWAY,
                () = &mut lifetime => return GOING_AWAY,
                () = &mut idle => {
                    let over = self.handle.last_active() + idle_time;
                    if over <= Instant::now() {
                        return GOING_AWAY;
                    }
                    idle.as_mut().reset(over);
                    continue;
                }
            };
            match message {
                Some(Ok(Message::Text(text))) => {
                    self.handle.touch();
                    if api.chaos.strikes(Fault::DropLink) {
                        tracing::info!(connection_id = %self.session.context.connection, "agent's link was cut on purpose");
                        return End::Cut;
                    }
                    let work = Work {
                        context: self.session.context.clone(),
                        lambda: api.lambda.clone(),
                        latency: api.latency.clone(),
                        handle: Arc::downgrade(&self.handle),
                        answers: self.answers.clone(),
                    };
                    tokio::spawn(async move {
                        work.deliver(text).await;
                        drop(place);
                    });
                }
                Some(Ok(Message::Binary(_))) => return End::Close(1003, "Binary frames are not supported"),
                Some(Ok(Message::Close(close))) => {
                    let status = close.map_or(1005, |close| u16::from(close.code));
                    // The answer to the close frame goes out while reading goes on.
                    let _ = time::timeout(LINGER_TIME, async {
                        while let Some(Ok(_)) = self.stream.next().await {}
                    })
                    .await;
                    return End::Closed(status);
                }
                // Only messages keep a connection from idling.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(error)) => return end_of(&error),
                None => return End::Cut,
            }
        }
    }
}

fn end_of(error: &tungstenite::Error) -> End {
    match error {
        tungstenite::Error::Capacity(_) => End::Close(1009, "Message too long"),
        tungstenite::Error::Utf8(_) => End::Close(1007, "Invalid UTF-8"),
        tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => {
            End::Cut
        }
        tungstenite::Error::Protocol(_) => End::Close(1002, "Protocol error"),
        _ => End::Cut,
    }
}

/// One message on its way through its function.
struct Work {
    context: Arc<Context>,
    lambda: Lambda,
    latency: Latency,
    handle: std::sync::Weak<Handle>,
    answers: mpsc::Sender<Bytes>,
}

impl Work {
    async fn deliver(self, message: Utf8Bytes) {
        let route = Route::of(&message);
        let request = event::random_name();
        let event = self.context.message(route, &request, &message);
        drop(message);
        self.latency.hop(Hop::Link).await;
        self.latency.hop(Hop::Invoke).await;
        let answer = match self.lambda.invoke(route.function(), event).await {
            Ok(answer) if route.is_two_way() => match event::read_answer(&answer) {
                RouteAnswer::Done(body) => body.map(Bytes::from),
                RouteAnswer::Failed => Some(self.context.failure(&request)),
            },
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(
                    connection_id = %self.context.connection, apigw_request_id = request, %error,
                    "a message was not handled"
                );
                Some(self.context.failure(&request))
            }
        };
        if let Some(answer) = answer {
            if let Some(handle) = self.handle.upgrade() {
                handle.touch();
            }
            // Fails only when the connection is gone.
            let _ = self.answers.send(answer).await;
        }
    }
}

struct Writer {
    sink: SplitSink<Socket, Message>,
    posts: mpsc::Receiver<Outgoing>,
    answers: mpsc::Receiver<Bytes>,
    timeout: Duration,
}

impl Writer {
    /// Writes what is posted and answered until it is stopped. Gives the sink back unless it is broken.
    async fn run(mut self, stop: CancellationToken) -> (Option<SplitSink<Socket, Message>>, End) {
        loop {
            let message = tokio::select! {
                () = stop.cancelled() => return (Some(self.sink), End::Cut),
                Some(answer) = self.answers.recv() => answer,
                post = self.posts.recv() => match post {
                    Some(Outgoing::Message(message)) => message,
                    Some(Outgoing::Close) | None => {
                        return (Some(self.sink), End::Close(1000, "Connection closed by the edge"));
                    }
                },
            };
            match time::timeout(self.timeout, self.write(message)).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(end))) => return (Some(self.sink), end),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "agent could not be written to");
                    return (None, End::Cut);
                }
                Err(_) => {
                    tracing::warn!("agent did not take what was written to it");
                    return (None, End::Cut);
                }
            }
        }
    }

    /// Writes a message and what has been posted meanwhile, with one flush.
    async fn write(&mut self, message: Bytes) -> Result<Option<End>, tungstenite::Error> {
        self.feed(message).await?;
        let mut end = None;
        while let Ok(post) = self.posts.try_recv() {
            match post {
                Outgoing::Message(message) => self.feed(message).await?,
                Outgoing::Close => {
                    end = Some(End::Close(1000, "Connection closed by the edge"));
                    break;
                }
            }
        }
        self.sink.flush().await?;
        Ok(end)
    }

    async fn feed(&mut self, message: Bytes) -> Result<(), tungstenite::Error> {
        for frame in frames(message) {
            self.sink.feed(Message::Frame(frame)).await?;
        }
        Ok(())
    }
}

/// Cuts a message into frames that are within the quota.
fn frames(message: Bytes) -> impl Iterator<Item = Frame> {
    let count = message.len().div_ceil(limits::FRAME_BYTES).max(1);
    (0..count).map(move |index| {
        let begin = index * limits::FRAME_BYTES;
        let end = message.len().min(begin + limits::FRAME_BYTES);
        let data = if index == 0 { Data::Text } else { Data::Continue };
        Frame::message(message.slice(begin..end), OpCode::Data(data), index + 1 == count)
    })
}

#[cfg(test)]
mod tests;
