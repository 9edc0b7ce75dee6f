//! The front: a Lambda Function URL on loopback.
//!
//! What enters are HTTP/1.1 requests of public clients; each becomes one event for `ingress`, and
//! what `ingress` streams back becomes the response. By itself nothing is kept, nothing is rewritten, and a
//! stream that breaks ends as a broken connection; what AWS's fronts do beyond that is imitated as [`fronts`] has it.

pub mod cloudfront;
mod event;
pub mod fronts;
mod heads;
mod origin;
pub mod relayed;

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{error::ErrorCode, header as fields, limits};
use relay::refused::Refusals;
use serde::{Deserialize, Deserializer, de};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, oneshot},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    cloudfront::{Distribution, Errors, Kept},
    fronts::{Does, Imitation},
    heads::{Head, SharedNotes, Watched},
    origin::{Decoder, Origin},
    relayed::Relayed,
};
use crate::{
    clock::epoch_us,
    lambda::{self, InvokeError, Lambda, StreamBody, StreamingResponse},
    latency::{Hop, Latency},
    listener,
};

/// How many public connections are served at the same time; further ones wait to be accepted.
const CONNECTIONS: usize = 4096;

/// How long a public client may take for a request head, and stay idle between two requests.
const HEAD_TIME: Duration = Duration::from_secs(60);

/// How long a public client may pause within a request body.
const BODY_PAUSE: Duration = Duration::from_secs(30);

/// How much memory a request body gets before any of it has come.
const RESERVED_BYTES: usize = 64 * 1024;

/// For how long a refused body is read, so that a client that sends it all sees the answer. How much that is does not
/// matter: nothing of it is kept.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// How many of the last requests the front remembers.
const ARRIVALS: usize = 256;

/// The function behind the front.
const FUNCTION: &str = "ingress";

/// Fields that only the front itself may set.
const OWN_FIELDS: [&str; 4] = ["x-tunnel-host", "x-tunnel-front", "x-tunnel-target", "x-tunnel-client"];

/// Fields of a response that are about one connection: the one to the public client is the front's own affair.
const OF_A_CONNECTION: [&str; 6] =
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "trailer"];

/// Is told the access key of the `ingress` process whose public client left before a response.
pub type ClientGone = Arc<dyn Fn(&str) + Send + Sync>;

/// The front.
pub struct Front {
    /// How long hops take.
    pub latency: Latency,
    /// Where `ingress` runs.
    pub lambda: Lambda,
    /// What proves to `ingress` that a request came through this front.
    pub secret: String,
    /// Where to report public clients that leave early.
    pub client_gone: ClientGone,
    /// The port that public clients use.
    pub port: u16,
    /// When requests came in.
    pub arrivals: Arrivals,
    /// Who takes WebSockets; without it they are refused.
    pub relay: Option<relayed::Relay>,
    /// What AWS's front would do beside.
    pub imitation: Arc<Imitation>,
    /// What the distribution says of errors and of its origin.
    pub distribution: &'static Distribution,
    /// Errors that CloudFront keeps.
    pub errors: KeptErrors,
}

/// Errors that CloudFront keeps, none at first.
#[derive(Debug, Default)]
pub struct KeptErrors(Errors);

/// When the last requests came in, by the trace id that the front gives each of them.
///
/// Real fronts give one too (`x-amzn-trace-id`); it is how the demo page finds its own request.
#[derive(Debug, Clone, Default)]
pub struct Arrivals(Arc<Mutex<VecDeque<Arrival>>>);

/// One request that came in.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The value of `x-amzn-trace-id`.
    pub trace_id: Box<str>,
    /// In microseconds since 1970.
    pub arrived_us: u64,
    /// Where the access key of the `ingress` process appears, once one serves.
    pub access_key: Arc<OnceLock<Box<str>>>,
}

impl Arrivals {
    fn note(&self, arrival: Arrival) {
        let mut arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if arrivals.len() == ARRIVALS {
            arrivals.pop_front();
        }
        arrivals.push_back(arrival);
    }

    /// The request with this trace id, if it is one of the last.
    #[must_use]
    pub fn find(&self, trace_id: &str) -> Option<Arrival> {
        let arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.iter().rev().find(|arrival| *arrival.trace_id == *trace_id).cloned()
    }
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("port", &self.port).finish_non_exhaustive()
    }
}

/// Serves public clients until `shutdown` is cancelled, then finishes the requests in flight.
pub async fn serve(listener: TcpListener, front: Arc<Front>, shutdown: CancellationToken) {
    let tasks = TaskTracker::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (stream, peer, place) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (front, shutdown) = (front.clone(), shutdown.clone());
        tasks.spawn(async move {
            serve_connection(stream, peer, front, shutdown).await;
            drop(place);
        });
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit) {
    // Nobody closes it.
    let Ok(place) = Arc::clone(places).acquire_owned().await else { return std::future::pending().await };
    let (stream, peer) = listener::accept(listener, "a public client").await;
    (stream, peer, place)
}

async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    front: Arc<Front>,
    shutdown: CancellationToken,
) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let (stream, notes) = Watched::new(stream, front.imitation.clone());
    let (stream, calls) = Refusals::new(stream);
    let of_connection = notes.clone();
    let service = service_fn(move |request| {
        let (front, notes, call) = (front.clone(), notes.clone(), calls.begin());
        let answering = heads::answering(&notes);
        async move {
            let answer = answer(&front, request, peer, notes).await;
            // Both go with the body: it is being answered until all of it has been handed over.
            Ok::<_, Infallible>(answer.map(|body| call.until_end_of(answering.until_end_of(body))))
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_headers(limits::HEADER_FIELDS + 24)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = shutdown.cancelled() => {
            heads::tell_end(&of_connection);
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "public connection ended");
    }
}

/// Why the front answers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// 400: what the request says about itself is not one thing.
    Ambiguous,
    /// 408: the body stopped.
    BodyStopped,
    /// 413: it does not fit an event.
    TooLarge,
    /// 429: as many requests are served as may.
    Throttled,
    /// 502: `ingress` failed.
    FunctionFailed,
    /// A front of AWS refuses with this status, in words of its own.
    ByFront(StatusCode),
}

impl Refusal {
    fn respond(self) -> Response<Answer> {
        let (status, code, sentence) = match self {
            Self::Ambiguous => (StatusCode::BAD_REQUEST, "bad_request", ErrorCode::BadRequest.sentence()),
            Self::BodyStopped => {
                (StatusCode::REQUEST_TIMEOUT, "bad_request", "The request's body stopped before its end.")
            }
            Self::TooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                ErrorCode::RequestTooLarge.as_str(),
                ErrorCode::RequestTooLarge.sentence(),
            ),
            Self::Throttled => {
                (StatusCode::TOO_MANY_REQUESTS, ErrorCode::EdgeBusy.as_str(), ErrorCode::EdgeBusy.sentence())
            }
            Self::FunctionFailed => {
                (StatusCode::BAD_GATEWAY, ErrorCode::EdgeFailed.as_str(), ErrorCode::EdgeFailed.sentence())
            }
            Self::ByFront(status) => return by_front(status),
        };
        let id = lambda::random_hex::<16>();
        let body = format!(
            "{{\"type\":\"about:blank\",\"title\":\"{}\",\"status\":{},\"detail\":\"{sentence}\",\"code\":\"{code}\",\"request_id\":\"{id}\"}}\n",
            status.canonical_reason().unwrap_or_default(),
            status.as_u16(),
        );
        tracing::debug!(status = status.as_u16(), error_code = code, "front answered by itself");
        Response::builder()
            .status(status)
            .header(header::CONTENT_TYPE, "application/problem+json")
            .header(header::CACHE_CONTROL, "no-store")
            .header("x-tunnel-error", code)
            .header("x-tunnel-request-id", id)
            .header(header::CONTENT_LENGTH, body.len())
            .body(Answer::Whole(Some(body.into())))
            .expect("the response is made of constants")
    }
}

/// What a front of AWS answers by itself: nothing of ours stands in it.
fn by_front(status: StatusCode) -> Response<Answer> {
    let message = status.canonical_reason().unwrap_or_default();
    let body = format!("{{\"message\":\"{message}\"}}");
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, body.len())
        .body(Answer::Whole(Some(body.into())))
        .expect("the response is made of constants")
}

/// What a front of AWS does not let in.
fn refused_by_front(
    imitation: &Imitation,
    parts: &http::request::Parts,
    target: &[u8],
    has_body: bool,
) -> Option<Refusal> {
    // The request line's spaces, version and end.
    let head_bytes = target.len() + parts.method.as_str().len() + 12 + fields_bytes(&parts.headers);
    let refuse = |does, status, applies: bool| {
        (applies && imitation.does(does)).then(|| {
            imitation.say(does);
            Refusal::ByFront(status)
        })
    };
    let host = parts.headers.get(header::HOST).map_or(0, HeaderValue::len);
    let is_seven =
        matches!(parts.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "PUT" | "PATCH" | "POST" | "DELETE");
    refuse(Does::EdgeMethods, StatusCode::FORBIDDEN, !is_seven || (parts.method == Method::GET && has_body))
        .or_else(|| {
            let is_long = head_bytes > fronts::EDGE_HEAD_BYTES
                || "https://".len() + host + target.len() > fronts::EDGE_URL_BYTES;
            refuse(Does::EdgeHeads, StatusCode::PAYLOAD_TOO_LARGE, is_long)
        })
        .or_else(|| {
            let is_long = head_bytes > fronts::API_HEAD_BYTES;
            refuse(Does::ApiHeads, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, is_long)
        })
}

/// What a front of AWS does not let out.
fn refused_head(imitation: &Imitation, headers: &HeaderMap) -> Option<Refusal> {
    let bytes = fields_bytes(headers);
    let bounds = [
        (Does::EdgeHeads, fronts::EDGE_HEAD_BYTES, StatusCode::BAD_GATEWAY),
        (Does::ApiHeads, fronts::API_HEAD_BYTES, StatusCode::INTERNAL_SERVER_ERROR),
    ];
    let (does, _, status) =
        bounds.into_iter().find(|&(does, bound, _)| bytes > bound && imitation.does(does))?;
    imitation.say(does);
    Some(Refusal::ByFront(status))
}

/// How long fields are on the wire.
fn fields_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// Answers one request, as the front does.
async fn answer(
    front: &Arc<Front>,
    request: Request<Incoming>,
    peer: SocketAddr,
    notes: SharedNotes,
) -> Response<Answer> {
    if !front.imitation.does(Does::Buffer) {
        return pass(front, request, peer, notes).await;
    }
    let is_head = *request.method() == Method::HEAD;
    let whole = async {
        let response = pass(front, request, peer, notes).await;
        let (head, body) = response.into_parts();
        collect(body, fronts::BUFFERED_BYTES).await.map(|body| (head, body))
    };
    match time::timeout(front.imitation.clock.scale(fronts::BUFFERED_TIME), whole).await {
        Ok(Some((mut head, body))) => {
            let has_length = !is_head
                && !head.status.is_informational()
                && !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
            if has_length {
                head.headers.insert(header::CONTENT_LENGTH, body.len().into());
            }
            Response::from_parts(head, Answer::Whole(Some(body).filter(|body| !body.is_empty())))
        }
        failed => {
            front.imitation.say(Does::Buffer);
            by_front(match failed {
                Err(_) => StatusCode::SERVICE_UNAVAILABLE,
                Ok(_) => StatusCode::INTERNAL_SERVER_ERROR,
            })
        }
    }
}

/// The whole of a body, if it is one and not longer.
async fn collect(mut body: Answer, most: usize) -> Option<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let data = frame.ok()?.into_data().ok()?;
        if whole.len() + data.len() > most {
            return None;
        }
        whole.extend_from_slice(&data);
    }
    Some(whole.freeze())
}

/// Hands one request to the function, and its answer on.
async fn pass(
    front: &Arc<Front>,
    request: Request<Incoming>,
    peer: SocketAddr,
    notes: SharedNotes,
) -> Response<Answer> {
    let arrived_us = epoch_us();
    let (mut parts, body) = request.into_parts();
    let head = heads::take_head(&notes);
    let (host, mut target) = match check(&parts, head) {
        Ok(checked) => checked,
        Err(refusal) => return refuse_body(refusal, body),
    };
    let imitation = &front.imitation;
    if let Some(refusal) = refused_by_front(imitation, &parts, &target, !body.is_end_stream()) {
        return refuse_body(refusal, body);
    }
    let silence = imitation.does(Does::Silence).then_some(front.distribution.read_timeout);
    if let Some(relay) = &front.relay
        && (imitation.kind() == fronts::Kind::Relay || relayed::is_websocket(&parts.headers))
    {
        for name in OWN_FIELDS {
            parts.headers.remove(name);
        }
        front.latency.hop(Hop::Front).await;
        let added = relayed::Added {
            secret: &front.secret,
            host: &host,
            target: &target,
            client: peer.ip(),
            port: front.port,
        };
        let way = relayed::Way { imitation, silence, notes };
        return relay.forward(parts, body, added, way).await.unwrap_or_else(Refusal::respond);
    }
    if imitation.does(Does::DecodePath) {
        let decoded = fronts::decoded_target(&target);
        if decoded != target {
            imitation.say(Does::DecodePath);
            target = decoded;
        }
    }
    let is_safe = matches!(parts.method, Method::GET | Method::HEAD);
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default().to_vec();
    if is_safe
        && imitation.does(Does::CacheErrors)
        && let Some(kept) = front.errors.0.find(&path)
    {
        imitation.say(Does::CacheErrors);
        return kept_response(kept);
    }
    let is_text = event::is_text(&parts.headers);
    let body = match read_body(body, &parts.headers, is_text).await {
        Ok(body) => body,
        Err((refusal, body)) => return refuse_body(refusal, body),
    };
    for name in OWN_FIELDS {
        parts.headers.remove(name);
    }
    let trace_id = format!("Root=1-{:08x}-{}", arrived_us / 1_000_000, lambda::random_hex::<12>());
    let event = event::build(&event::Source {
        method: parts.method.as_str(),
        target: &target,
        version: parts.version,
        headers: &parts.headers,
        host: &host,
        secret: &front.secret,
        port: front.port,
        peer: peer.ip(),
        body: &body,
        is_text,
        trace_id: &trace_id,
    });
    drop(body);
    front.latency.hop(Hop::Front).await;
    let origin = front.distribution;
    let attempts = if is_safe && imitation.does(Does::Retry) { origin.attempts } else { 1 };
    let mut response = None;
    for attempt in 1..=attempts {
        if attempt > 1 {
            imitation.say(Does::Retry);
        }
        let head = invoke(front, event.clone(), &trace_id, arrived_us);
        match silence {
            None => response = Some(head.await),
            Some(time) => response = time::timeout(time, head).await.ok(),
        }
        if response.is_some() {
            break;
        }
    }
    drop(event);
    let Some(response) = response else {
        imitation.say(Does::Silence);
        return Refusal::ByFront(StatusCode::GATEWAY_TIMEOUT).respond();
    };
    let StreamingResponse { prelude, mut body, may_hang } = match response {
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(%error, "ingress did not answer");
            let refusal = refusal_of(&error);
            if refusal == Refusal::Throttled && imitation.does(Does::BareThrottle) {
                imitation.say(Does::BareThrottle);
                return Refusal::ByFront(StatusCode::TOO_MANY_REQUESTS).respond();
            }
            return refusal.respond();
        }
    };
    let mut first = None;
    if may_hang && imitation.does(Does::EmptyHangs) {
        match body.next().await {
            Ok(None) => {
                imitation.say(Does::EmptyHangs);
                time::sleep(imitation.clock.scale(imitation.function_time)).await;
                return Refusal::FunctionFailed.respond();
            }
            Ok(piece) => first = piece,
            // The body says so again.
            Err(lambda::Broken) => {}
        }
    }
    let shape = Shape { imitation: imitation.clone(), silence, first };
    let Some(response) = respond(&prelude, body, &parts.method, parts.version, notes, shape) else {
        tracing::error!("ingress answered with a head that is not valid");
        return Refusal::FunctionFailed.respond();
    };
    if let Some(refusal) = refused_head(imitation, response.headers()) {
        return refusal.respond();
    }
    let keep = origin.keeps(response.status().as_u16());
    if is_safe && !keep.is_zero() && imitation.does(Does::CacheErrors) {
        return keep_error(front, &path, keep, response).await;
    }
    response
}

/// Keeps an error as CloudFront does, where it is not too long for that.
async fn keep_error(
    front: &Front,
    path: &[u8],
    time: Duration,
    response: Response<Answer>,
) -> Response<Answer> {
    /// The longest error that is kept here.
    const MOST: usize = 1024 * 1024;
    let (head, body) = response.into_parts();
    let Some(body) = collect(body, MOST).await else {
        return Refusal::ByFront(StatusCode::BAD_GATEWAY).respond();
    };
    let kept = Kept { status: head.status, headers: head.headers, body };
    front.errors.0.keep(path, time, kept.clone());
    kept_response(kept)
}

fn kept_response(kept: Kept) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(Some(kept.body).filter(|body| !body.is_empty())));
    *response.status_mut() = kept.status;
    *response.headers_mut() = kept.headers;
    response
}

/// Invokes the function and waits for the head of its answer. Dropping this is the client's departure.
async fn invoke(
    front: &Front,
    event: Bytes,
    trace_id: &str,
    arrived_us: u64,
) -> Result<StreamingResponse, InvokeError> {
    let call = front.lambda.invoke_streaming(FUNCTION, event)?;
    let access_key = call.access_key();
    front.arrivals.note(Arrival { trace_id: trace_id.into(), arrived_us, access_key: access_key.clone() });
    if front.imitation.does(Does::Deaf) {
        let (head, heard) = oneshot::channel();
        let imitation = front.imitation.clone();
        tokio::spawn(async move {
            if let Err(Ok(unheard)) = head.send(call.head().await) {
                imitation.say(Does::Deaf);
                hear_out(unheard.body).await;
            }
        });
        return heard.await.unwrap_or(Err(InvokeError::ShuttingDown));
    }
    let mut waiting = Waiting { access_key, gone: Some(front.client_gone.clone()) };
    let response = call.head().await;
    waiting.gone = None;
    response
}

/// Takes everything that a function streams, for nobody.
async fn hear_out(mut body: StreamBody) {
    while let Ok(Some(_)) = body.next().await {}
}

fn refusal_of(error: &InvokeError) -> Refusal {
    match error {
        InvokeError::Throttled => Refusal::Throttled,
        InvokeError::EventTooLarge(_) => Refusal::TooLarge,
        InvokeError::NoSuchFunction
        | InvokeError::AnswerTooLarge
        | InvokeError::Init(_)
        | InvokeError::TimedOut(_)
        | InvokeError::Exited(_)
        | InvokeError::Function { .. }
        | InvokeError::Prelude
        | InvokeError::ShuttingDown => Refusal::FunctionFailed,
    }
}

/// Reports a public client that leaves before the response: dropped while it waits.
struct Waiting {
    access_key: Arc<OnceLock<Box<str>>>,
    gone: Option<ClientGone>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let (Some(gone), Some(access_key)) = (self.gone.take(), self.access_key.get()) {
            gone(access_key);
        }
    }
}

/// Checks what every front checks, and finds the host and the target in origin-form.
fn check(parts: &http::request::Parts, head: Option<Head>) -> Result<(HeaderValue, Vec<u8>), Refusal> {
    let head = head.ok_or(Refusal::Ambiguous)?;
    let encodings = parts.headers.get_all(header::TRANSFER_ENCODING);
    let is_plainly_framed = !head.has_two_lengths
        && encodings.iter().count() <= 1
        && encodings.iter().all(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
    if !is_plainly_framed || parts.method == Method::CONNECT {
        return Err(Refusal::Ambiguous);
    }
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.clone(),
        (None, _) if parts.version < Version::HTTP_11 => HeaderValue::from_static(""),
        _ => return Err(Refusal::Ambiguous),
    };
    origin_form(head.target, &parts.uri, host).ok_or(Refusal::Ambiguous)
}

/// In absolute-form the authority wins over the `Host` field (RFC 9112 §3.2.2).
fn origin_form(target: Vec<u8>, uri: &Uri, host: HeaderValue) -> Option<(HeaderValue, Vec<u8>)> {
    if target.starts_with(b"/") || target == b"*" {
        return Some((host, target));
    }
    let authority = uri.authority()?.as_str();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let text = target.windows(3).position(|window| window == b"://")?;
    let rest = &target[text + 3..];
    let path = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let mut origin = rest[path..].to_vec();
    if !origin.starts_with(b"/") {
        origin.insert(0, b'/');
    }
    Some((HeaderValue::from_str(authority).ok()?, origin))
}

/// Reads a body that fits an event. A body that is known not to is not read at all.
async fn read_body(
    mut body: Incoming,
    headers: &HeaderMap,
    is_text: bool,
) -> Result<BytesMut, (Refusal, Incoming)> {
    let fits = |length: u64| {
        let in_event = if is_text { length } else { length.div_ceil(3).saturating_mul(4) };
        in_event < limits::EVENT_BYTES as u64
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok())
        .unwrap_or(0);
    if !fits(announced) {
        return Err((Refusal::TooLarge, body));
    }
    // What is only announced takes no memory.
    let announced = usize::try_from(announced).unwrap_or(0);
    let mut read = BytesMut::with_capacity(announced.min(RESERVED_BYTES));
    loop {
        match time::timeout(BODY_PAUSE, body.frame()).await {
            Ok(None) => return Ok(read),
            Ok(Some(Ok(frame))) => {
                let Ok(data) = frame.into_data() else { continue };
                if !fits((read.len() + data.len()) as u64) {
                    return Err((Refusal::TooLarge, body));
                }
                // Once, and not a little more each time: what is there would be copied.
                if read.len() + data.len() > read.capacity() {
                    read.reserve(announced.saturating_sub(read.len()).max(data.len()));
                }
                read.extend_from_slice(&data);
            }
            Ok(Some(Err(_))) => return Err((Refusal::Ambiguous, body)),
            Err(_) => return Err((Refusal::BodyStopped, body)),
        }
    }
}

/// Answers without having read the whole body, and closes.
fn refuse_body(refusal: Refusal, mut body: Incoming) -> Response<Answer> {
    let mut response = refusal.respond();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    // Only `TooLarge` leaves a body that is worth reading: closing while the client still sends would
    // reset the connection under the answer. A client that waits for 100 is not asked to go on.
    if refusal == Refusal::TooLarge && !body.is_end_stream() {
        tokio::spawn(async move {
            let drain = async { while let Some(Ok(_)) = body.frame().await {} };
            let _ = time::timeout(DRAIN_TIME, drain).await;
        });
    }
    response
}

/// What precedes a streamed body: status, fields and cookies.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Prelude {
    #[serde(default = "ok")]
    status_code: u16,
    #[serde(default)]
    headers: Fields,
    #[serde(default)]
    cookies: Vec<String>,
}

const fn ok() -> u16 {
    200
}

/// Fields in the order in which the function gave them.
#[derive(Default)]
struct Fields(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::with_capacity(map.size_hint().unwrap_or(16));
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// How a front lets an answer through.
struct Shape {
    imitation: Arc<Imitation>,
    /// How long the function may be silent.
    silence: Option<Duration>,
    /// What was taken of the body already.
    first: Option<Bytes>,
}

impl Shape {
    /// Does to the head what the front does, and gives what unpacks the body.
    fn head(&self, headers: &mut HeaderMap) -> Option<Decoder> {
        let imitation = &self.imitation;
        if imitation.does(Does::RenameLength)
            && let Some(length) = headers.remove(header::CONTENT_LENGTH)
        {
            imitation.say(Does::RenameLength);
            headers.insert("x-amzn-remapped-content-length", length);
        }
        if imitation.does(Does::RenameChallenge)
            && let header::Entry::Occupied(challenges) = headers.entry(header::WWW_AUTHENTICATE)
        {
            imitation.say(Does::RenameChallenge);
            let challenges: Vec<_> = challenges.remove_entry_mult().1.collect();
            for challenge in challenges {
                headers.append("x-amzn-remapped-www-authenticate", challenge);
            }
        }
        if !imitation.does(Does::Decode) {
            return None;
        }
        let decoder =
            headers.get(header::CONTENT_ENCODING).and_then(|value| Decoder::of(value.as_bytes()))?;
        imitation.say(Does::Decode);
        headers.remove(header::CONTENT_ENCODING);
        Some(decoder)
    }
}

/// Makes the response of what the function streamed; none when its head is not valid.
fn respond(
    prelude: &[u8],
    body: StreamBody,
    method: &Method,
    version: Version,
    notes: SharedNotes,
    shape: Shape,
) -> Option<Response<Answer>> {
    let prelude = if prelude.is_empty() {
        Prelude { status_code: ok(), headers: Fields::default(), cookies: Vec::new() }
    } else {
        serde_json::from_slice(prelude).ok()?
    };
    let status = StatusCode::from_u16(prelude.status_code).ok().filter(|status| status.as_u16() >= 200)?;
    let mut headers = HeaderMap::with_capacity(prelude.headers.0.len() + prelude.cookies.len());
    for (name, value) in &prelude.headers.0 {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let value = fields::value_from_text(value)?;
        if !OF_A_CONNECTION.contains(&name.as_str()) {
            headers.append(name, value);
        }
    }
    for cookie in &prelude.cookies {
        headers.append(header::SET_COOKIE, fields::value_from_text(cookie)?);
    }
    let decoder = shape.head(&mut headers);
    let length = match headers.get(header::CONTENT_LENGTH) {
        None => None,
        Some(value) => Some(value.to_str().ok()?.parse::<u64>().ok()?),
    };
    let has_body = *method != Method::HEAD
        && length != Some(0)
        && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let answer = if has_body {
        let ends_with_connection = version < Version::HTTP_11 && length.is_none();
        let mut body = Box::new(Origin::new(body, shape.imitation, decoder, shape.silence));
        if let Some(first) = shape.first {
            body.put_back(first);
        }
        let notes = ends_with_connection.then_some(notes);
        Answer::Stream { body: Source::Function(body), left: length, notes, is_broken: false }
    } else {
        tokio::spawn(finish(body));
        Answer::Bodiless
    };
    let mut response = Response::new(answer);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Some(response)
}

/// Lets a function end a stream of which nothing is sent on.
async fn finish(mut body: StreamBody) {
    while let Ok(Some(piece)) = body.next().await {
        if !piece.is_empty() {
            return;
        }
    }
}

/// The body of a response.
enum Answer {
    /// The front's own.
    Whole(Option<Bytes>),
    /// None, whatever `Content-Length` says: for HEAD, 204 and 304.
    Bodiless,
    /// What `ingress` or `relay` streams.
    Stream {
        body: Source,
        /// How much of the announced length is to come.
        left: Option<u64>,
        /// Where to have the connection reset, when its end is the end of the body.
        notes: Option<SharedNotes>,
        /// Whether it has turned out to be broken.
        is_broken: bool,
    },
}

/// Where a streamed body comes from.
enum Source {
    Function(Box<Origin>),
    Relay(Box<Relayed>),
}

impl Source {
    /// The next piece; none at the end.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, lambda::Broken>> {
        match self {
            Self::Function(body) => body.poll_next(context),
            Self::Relay(body) => body.poll_next(context),
        }
    }

    /// Everything that is sent on has come: a function may end by itself.
    fn let_end(self) {
        match self {
            Self::Function(body) => body.let_end(),
            Self::Relay(_) => {}
        }
    }
}

/// The body was broken off; the connection must not end as if it were complete.
#[derive(Debug, thiserror::Error)]
#[error("the response was broken off")]
struct BrokenOff;

impl Body for Answer {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = self.get_mut();
        let (body, left, notes, is_broken) = match this {
            Self::Whole(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Bodiless => return Poll::Ready(None),
            Self::Stream { body, left, notes, is_broken } => (body, left, notes, is_broken),
        };
        if *is_broken {
            return Poll::Ready(Some(Err(BrokenOff)));
        }
        let mut is_last = false;
        let piece = match ready!(body.poll_next(context)) {
            Ok(None) if left.is_none_or(|left| left == 0) => return Poll::Ready(None),
            Ok(Some(piece)) => match left {
                None => Some(piece),
                Some(left) => match left.checked_sub(piece.len() as u64) {
                    Some(less) => {
                        *left = less;
                        is_last = less == 0;
                        Some(piece)
                    }
                    None => None,
                },
            },
            Ok(None) | Err(lambda::Broken) => None,
        };
        match piece {
            Some(piece) => {
                // Whoever writes this asks for no more and drops what is left; yet no client has gone.
                if is_last && let Self::Stream { body, .. } = std::mem::replace(this, Self::Whole(None)) {
                    body.let_end();
                }
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            None => {
                if let Some(notes) = notes {
                    heads::end_with_reset(notes);
                }
                // One pause before the error: what came before it is flushed in the meantime.
                *is_broken = true;
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    // Neither an end nor a size is told in advance: then hyper takes `Content-Length` as it is given,
    // also where no body follows.
}

#[cfg(test)]
mod tests;
