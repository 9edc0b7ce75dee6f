//! The HTTP side: one exchange for each request of a public connection, HTTP/1.1 or HTTP/2.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use exchange::{
    Services, answer,
    budget::Share,
    http::carry,
    public::{Head, Piece, Pieces, PublicSide, Upload},
    record::Record,
    route::{Arrival, PublicRequest, Websockets, route},
};
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use hyper::{
    body::Incoming,
    service::service_fn,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use proto::{error::ErrorCode, header::Headers, id::RequestId, limits};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    time::Instant,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    mailbox::Postbox,
    meter::{Meter, Metered},
    refused::Refusals,
    websocket::{self, BadHandshake, PublicSocket},
};

/// Where it says whether it takes requests.
pub const HEALTH_PATH: &str = "/_relay/health";

/// How long a public client may take for a request head, and stay idle between two requests: longer than a balancer
/// before it keeps a connection (130 s), or that would send a request into one that is just being closed.
pub const HEAD_TIME: Duration = Duration::from_secs(150);

/// How much of a body is taken after its answer, and for how long.
const LINGER_BYTES: usize = 4 * 1024 * 1024;
const LINGER: Duration = Duration::from_secs(5);

/// How long a short request body is waited for before the request goes on without its end.
const AT_ONCE: Duration = Duration::from_millis(200);

/// How often an HTTP/2 client is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How long a 101 may take to be written before its client counts as gone.
const SWITCH_TIME: Duration = Duration::from_secs(10);

/// What serves public connections.
pub struct Relay {
    /// What exchanges need.
    pub services: Rc<Services>,
    /// Where answers come.
    pub postbox: Rc<Postbox>,
    /// Cancelled when it is told to end.
    pub draining: CancellationToken,
    /// How many connections it holds at the same time.
    pub connections: usize,
    /// What its WebSockets hold.
    pub meter: Rc<Meter>,
}

/// Serves public connections until the relay drains, and then those that are open.
pub async fn serve(listener: TcpListener, relay: Rc<Relay>) {
    let tasks = TaskTracker::new();
    let places = Rc::new(Semaphore::new(relay.connections));
    loop {
        let accepted = tokio::select! {
            () = relay.draining.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, peer, place)) = accepted else { continue };
        let relay = Rc::clone(&relay);
        let tracked = tasks.clone();
        tasks.spawn_local(async move {
            serve_connection(stream, peer, relay, tracked).await;
            drop(place);
        });
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

struct Place(Rc<Semaphore>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

async fn accept(listener: &TcpListener, places: &Rc<Semaphore>) -> Option<(TcpStream, SocketAddr, Place)> {
    let Ok(permit) = places.acquire().await else { return None };
    match listener.accept().await {
        Ok((stream, peer)) => {
            permit.forget();
            Some((stream, peer, Place(Rc::clone(places))))
        }
        Err(error) => {
            tracing::warn!(%error, "could not accept a public connection");
            tokio::time::sleep(Duration::from_millis(10)).await;
            None
        }
    }
}

/// Has hyper's own tasks run on this thread.
#[derive(Clone)]
struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

async fn serve_connection(stream: TcpStream, peer: SocketAddr, relay: Rc<Relay>, tasks: TaskTracker) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let draining = relay.draining.clone();
    let (stream, calls) = Refusals::new(stream);
    let service = service_fn(move |request| {
        let (relay, tasks, call) = (Rc::clone(&relay), tasks.clone(), calls.begin());
        async move {
            let answer = answer_one(&relay, request, peer, &tasks).await;
            Ok::<_, Infallible>(answer.map(|body| call.until_end_of(body)))
        }
    });
    let mut builder = auto::Builder::new(Local);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(limits::HEADER_FIELDS + 24)
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .max_header_list_size(2 * limits::HEAD_BYTES as u32);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = draining.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "public connection ended");
    }
}

async fn answer_one(
    relay: &Rc<Relay>,
    mut request: Request<Incoming>,
    peer: SocketAddr,
    tasks: &TaskTracker,
) -> Response<AnswerBody> {
    if request.uri().path() == HEALTH_PATH && request.headers().get("x-tunnel-front").is_none() {
        let status =
            if relay.draining.is_cancelled() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
        let mut response = Response::new(AnswerBody::empty());
        *response.status_mut() = status;
        return response;
    }
    let Ok(request_id) = crate::random().map(RequestId::from_random) else {
        let mut response = Response::new(AnswerBody::empty());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        return response;
    };
    let (answers, answer) = oneshot::channel();
    let mut public = HttpAnswer {
        request_id: request_id.clone(),
        html: false,
        head_only: request.method() == Method::HEAD,
        upgrade: None,
        is_other_version: false,
        message_bytes: relay.services.config.socket_message_bytes,
        meter: Rc::clone(&relay.meter),
        answers,
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let mut rest = None;
    let read = read(relay, request, peer, &request_id, upgrade, &mut public, &mut rest).await;
    let relay = Rc::clone(relay);
    tasks.spawn_local(async move {
        let record = Record::begin();
        let is_socket = read.as_ref().is_ok_and(|request| request.upgrade.is_some());
        // WebSockets end when this process is told to; requests are finished.
        let closing = if is_socket { relay.draining.clone() } else { CancellationToken::new() };
        let slot = relay.postbox.slot(&request_id, closing);
        let ends_at = Instant::now() + limits::RESPONSE_DURATION;
        carry(&relay.services, &slot, &request_id, read, ends_at, public, &record).await;
        record.write(&request_id);
        if let Some(rest) = rest {
            rest.linger().await;
        }
    });
    match answer.await {
        Ok(response) => response,
        Err(_) => {
            let mut response = Response::new(AnswerBody::empty());
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        }
    }
}

async fn read(
    relay: &Relay,
    request: Request<Incoming>,
    peer: SocketAddr,
    request_id: &RequestId,
    upgrade: OnUpgrade,
    public: &mut HttpAnswer,
    rest: &mut Option<Rc<Rest>>,
) -> Result<PublicRequest, ErrorCode> {
    let (head, body) = request.into_parts();
    let mut headers = Headers::from(&head.headers);
    // HTTP/2 has it in the target.
    if headers.get(header::HOST).is_none()
        && let Some(authority) = head.uri.authority()
    {
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| ErrorCode::BadRequest)?;
        headers.set(header::HOST, host);
    }
    let target = match head.uri.path_and_query() {
        Some(target) => target.as_str().to_owned(),
        None => head.uri.to_string(),
    };
    let arrival = Arrival {
        method: head.method.clone(),
        target,
        headers,
        domain_name: String::new(),
        source: Some(peer.ip()),
    };
    public.html = arrival.wants_html();
    let mut routed = route(arrival, Vec::new(), &relay.services.config, Websockets::Carried, request_id)?;
    if routed.upgrade.is_some() {
        if relay.draining.is_cancelled() {
            return Err(ErrorCode::EdgeBusy);
        }
        match websocket::check(&head.method, head.version, &head.headers) {
            Ok(key) => public.upgrade = Some((upgrade, key)),
            Err(bad) => {
                public.is_other_version = bad == BadHandshake::Version;
                return Err(ErrorCode::BadRequest);
            }
        }
        return Ok(routed);
    }
    match take(body, head.headers.contains_key(header::EXPECT)).await? {
        Taken::Whole(bytes) => routed.body = bytes,
        Taken::Streamed(upload, body) => {
            *routed.upload.get_mut() = Some(upload);
            *rest = Some(body);
        }
    }
    Ok(routed)
}

/// A request's body.
enum Taken {
    Whole(Vec<u8>),
    Streamed(Upload, Rc<Rest>),
}

/// What is still to come of a request's body.
struct Rest {
    body: RefCell<Incoming>,
    /// Whether any of it was asked for. A client that waits for that is not asked in vain.
    is_begun: Cell<bool>,
}

impl Rest {
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.is_begun.set(true);
        Pin::new(&mut *self.body.borrow_mut()).poll_frame(cx)
    }

    /// Takes what a client still sends that was answered before its end: a connection that is closed on unread bytes is
    /// reset, and takes the answer with it. What is long or slow is not waited for.
    async fn linger(&self) {
        if !self.is_begun.get() {
            return;
        }
        let all = async {
            let mut read = 0;
            while read <= LINGER_BYTES
                && let Some(Ok(frame)) = poll_fn(|cx| self.poll_frame(cx)).await
            {
                read += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        // Late or not, the body is over.
        let _ = tokio::time::timeout(LINGER, all).await;
    }
}

/// Takes a body that is short and comes at once; any other goes on as its client sends it. What its client sends only
/// when it is asked to (`Expect: 100-continue`) is asked for when an agent wants it: hyper says so with the first read.
async fn take(mut body: Incoming, is_asked_for: bool) -> Result<Taken, ErrorCode> {
    let length = body.size_hint().exact();
    let mut begun = Vec::new();
    let has_ended = match length {
        Some(0) => true,
        _ if is_asked_for => false,
        Some(length) if length > limits::CHUNK_BYTES as u64 => false,
        _ => {
            let all = async {
                while begun.len() <= limits::CHUNK_BYTES {
                    match body.frame().await {
                        None => return Ok(true),
                        Some(Ok(frame)) => {
                            begun.extend_from_slice(frame.data_ref().map_or(&[], |bytes| bytes))
                        }
                        Some(Err(_)) => return Err(ErrorCode::BadRequest),
                    }
                }
                Ok(false)
            };
            tokio::time::timeout(AT_ONCE, all).await.unwrap_or(Ok(false))?
        }
    };
    if has_ended && begun.len() <= limits::CHUNK_BYTES {
        return Ok(Taken::Whole(begun));
    }
    let begun = stream::iter((!begun.is_empty()).then(|| Ok(Bytes::from(begun))));
    let rest = Rc::new(Rest { body: RefCell::new(body), is_begun: Cell::new(!is_asked_for) });
    let frames = stream::poll_fn({
        let rest = Rc::clone(&rest);
        move |cx| rest.poll_frame(cx)
    });
    // Trailers are none of it.
    let pieces = frames.filter_map(async |frame| match frame {
        Ok(frame) => frame.into_data().ok().map(Ok),
        Err(_) => Some(Err(ErrorCode::BadRequest)),
    });
    Ok(Taken::Streamed(Upload { length, pieces: begun.chain(pieces).boxed_local() }, rest))
}

/// The one answer to a request.
struct HttpAnswer {
    request_id: RequestId,
    html: bool,
    head_only: bool,
    upgrade: Option<(OnUpgrade, String)>,
    /// Whether it is a handshake for another version of WebSocket than 13.
    is_other_version: bool,
    message_bytes: usize,
    meter: Rc<Meter>,
    answers: oneshot::Sender<Response<AnswerBody>>,
}

fn response(head: Head, body: AnswerBody) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    for (name, value) in head.headers {
        response.headers_mut().append(name, value);
    }
    response
}

impl PublicSide for HttpAnswer {
    type Socket = PublicSocket<TokioIo<Upgraded>>;

    async fn fail(self, code: ErrorCode) {
        let (head, body) = answer::problem(code, &self.request_id, self.html);
        let body = if self.head_only { AnswerBody::empty() } else { AnswerBody::whole(body.into()) };
        let mut response = response(head, body);
        if self.is_other_version {
            // RFC 6455 §4.2.2: the version that is understood.
            response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        // Nobody may be left to tell.
        let _ = self.answers.send(response);
    }

    async fn gone(&mut self) {
        self.answers.closed().await;
    }

    fn share(&self) -> Share {
        self.meter.share()
    }

    async fn accept(self, subprotocol: Option<String>, headers: Headers) -> Option<Self::Socket> {
        let (upgrade, key) = self.upgrade?;
        let mut switch =
            response(Head { status: StatusCode::SWITCHING_PROTOCOLS.as_u16(), headers }, AnswerBody::empty());
        let fields = switch.headers_mut();
        fields.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        fields.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()?;
        fields.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        if let Some(subprotocol) = subprotocol.and_then(|one| HeaderValue::from_str(&one).ok()) {
            fields.insert(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
        }
        self.answers.send(switch).ok()?;
        let io = tokio::time::timeout(SWITCH_TIME, upgrade).await.ok()?.ok()?;
        Some(PublicSocket::new(Metered::new(TokioIo::new(io), self.meter), self.message_bytes).await)
    }

    fn begin(self, head: Head, first: Vec<u8>) -> Pieces {
        let (pieces, rest) = mpsc::channel(1);
        let first = (!first.is_empty()).then(|| Bytes::from(first));
        let body = AnswerBody { first, rest: RefCell::new(Some(rest)) };
        let _ = self.answers.send(response(head, body));
        pieces
    }
}

/// The body of an answer as it comes. Dropped before its end, it tells who sends it.
pub struct AnswerBody {
    first: Option<Bytes>,
    rest: RefCell<Option<mpsc::Receiver<Piece>>>,
}

impl AnswerBody {
    const fn empty() -> Self {
        Self { first: None, rest: RefCell::new(None) }
    }

    const fn whole(bytes: Bytes) -> Self {
        Self { first: Some(bytes), rest: RefCell::new(None) }
    }
}

/// A body that breaks off: the connection is reset, so that it does not look whole.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the response ended before its end")
    }
}

impl std::error::Error for Broken {}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(rest) = self.rest.get_mut() else { return Poll::Ready(None) };
        let piece = std::task::ready!(rest.poll_recv(cx));
        if !matches!(piece, Some(Piece::Data(_))) {
            *self.rest.get_mut() = None;
        }
        Poll::Ready(match piece {
            Some(Piece::Data(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Piece::End) => None,
            Some(Piece::Broken) | None => Some(Err(Broken)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.borrow().is_none()
    }
}
