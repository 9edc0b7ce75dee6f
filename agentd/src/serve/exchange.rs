//! One public request from its arrival to the last piece of its response.
//!
//! Enters: a [`Job`], credit, the pieces of an announced body. Leaves: `continue`, then one `reply` and
//! `chunk`s, or `failed`. Dropping the future of [`Exchange::run`] ends the call to the upstream at once.

use std::{cmp::min, pin::Pin, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header, uri::PathAndQuery};
use proto::{
    body::{self, Body, Codec, Codecs, is_compressible},
    chunk::SendWindow,
    delivery::Attempt,
    error::ErrorCode,
    header::{Headers, is_event_stream},
    id::{RequestId, TunnelName},
    limits,
    message::{AgentMessage, Chunk, Continue, Failed, Progress, Reply, Upgrade},
    prefix,
    target::Target,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    capture::{
        record::{Asked as PublicTarget, Kind},
        ring::{Capture, Tap},
    },
    report::access::{AccessLine, AccessLog, Ending, SocketLine},
    report::cause,
    report::denial::DeniedBy,
    serve::hint::{NO_HTTP, Refusal},
    serve::host::HostRule,
    serve::origin::{Rewrites, View, without_own_via},
    serve::outbox::{LinkGone, Outbox},
    serve::pace::{Pace, Tally},
    serve::policy::{
        self, Policy, Signature, Webhook,
        answer::Answer,
        asked::Asked,
        body::LocalBody,
        traffic::Passage,
        visitors::{Visitor, is_user},
    },
    serve::sockets::{Serial, Sockets},
    serve::tunnel::{Place, SocketPlace, Tunnel, Tunnels},
    serve::upgrade,
    serve::upload::{UploadBody, UploadError, UploadProgress},
    serve::upstream::{self, Dialled, RequestBody, ResponseBody, Upstream, UpstreamError},
};

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// How long a message is without what its fields say, or a little less.
const FIELD_NAMES_BYTES: usize = 128;

/// How much of the answer to a delivery is read, and for how long.
const READ_OFF_BYTES: usize = 1024 * 1024;
const READ_OFF: Duration = Duration::from_secs(5);

/// A message that is expected to be longer waits for its place before it is encoded.
const BULK_BODY_BYTES: usize = 12 * 1024;

/// A public request as the edge sent it.
pub(crate) struct Job {
    pub(crate) request_id: RequestId,
    pub(crate) token: Box<str>,
    pub(crate) tunnel: TunnelName,
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: Headers,
    pub(crate) body: JobBody,
    pub(crate) timeout: Duration,
    /// What the public client wants to go on with.
    pub(crate) upgrade: Option<Upgrade>,
    /// What it is where the edge has kept it: then only its outcome goes back.
    pub(crate) delivery: Option<Attempt>,
}

impl Job {
    /// The time by which what the sender signed is judged: when it came to the edge.
    fn time(&self) -> u64 {
        self.delivery.as_ref().map_or_else(policy::unix_now, |delivery| delivery.received_ms / 1000)
    }

    /// The host that the public client asked for.
    fn public_host(&self) -> &str {
        self.headers.get(X_FORWARDED_HOST).and_then(|host| host.to_str().ok()).unwrap_or_default()
    }
}

/// The body of a public request.
pub(crate) enum JobBody {
    /// All of it.
    Whole(Bytes),
    /// It follows after `continue`.
    Announced(Box<UploadBody>, UploadProgress),
}

impl JobBody {
    /// All of it, where it is there from the beginning.
    fn at_hand(&self) -> Option<&[u8]> {
        match self {
            Self::Whole(bytes) => Some(bytes),
            Self::Announced(..) => None,
        }
    }
}

/// Everything one request needs.
pub(crate) struct Exchange {
    pub(crate) job: Job,
    pub(crate) tunnels: Arc<Tunnels>,
    pub(crate) outbox: Outbox,
    /// What the edge can decode.
    pub(crate) codecs: Codecs,
    /// How far the response is.
    pub(crate) tally: Arc<Tally>,
    pub(crate) access: AccessLog,
    /// Where WebSockets go on once they are open, and the connection that this request came over.
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) serial: Serial,
}

/// Why an exchange stops before its end.
enum Stop {
    /// The edge is told so: number of the missing piece, and why.
    Fail { seq: u32, code: ErrorCode },
    /// The request was answered here, in place of the upstream.
    Answered(Option<ErrorCode>),
    /// There is nobody left to tell.
    Gone,
}

impl From<LinkGone> for Stop {
    fn from(LinkGone: LinkGone) -> Self {
        Self::Gone
    }
}

const fn fail(code: ErrorCode) -> Stop {
    Stop::Fail { seq: 0, code }
}

impl Exchange {
    /// Answers the request.
    #[expect(clippy::manual_async_fn, reason = "an async fn has room for what it is called with twice")]
    pub(crate) fn run(mut self) -> impl Future<Output = ()> + Send {
        async move { self.answered().await }
    }

    async fn answered(&mut self) {
        let mut line = AccessLine::begin(
            self.access.clone(),
            self.job.request_id.clone(),
            self.job.tunnel.clone(),
            &self.job.method,
            &self.job.target,
        );
        match &self.job.body {
            JobBody::Whole(bytes) => line.request_body(bytes.len() as u64),
            JobBody::Announced(body, progress) if body.is_streamed() => line.request_upload(progress.clone()),
            JobBody::Announced(body, _) => line.request_body(body.announced()),
        }
        let Self { job, tunnels, outbox, codecs, tally, access, sockets, serial } = self;
        let websockets = Websockets { access, sockets, serial: *serial };
        // Those that answer have it from the sender.
        let token = std::mem::take(&mut job.token);
        let tunnel = tunnels.get(&job.tunnel);
        let page = tunnel.as_ref().and_then(|tunnel| ErrorPage::of(job, tunnel));
        let _alive = job.delivery.as_ref().map(|_| signs_of_life(&token, outbox, limits::DELIVERY_PROGRESS));
        let sender = Sender { token: &token, outbox, tally };
        let mut capture = None;
        let outcome =
            answer(job, tunnel, tunnels, &sender, codecs, &websockets, &mut line, &mut capture).await;
        let code = match &outcome {
            Ok(()) | Err(Stop::Answered(None)) => None,
            Err(Stop::Answered(Some(code)) | Stop::Fail { code, .. }) => Some(*code),
            Err(Stop::Gone) => return,
        };
        line.end(code.map_or(Ending::Complete, Ending::Failed));
        match (capture, code) {
            (Some(capture), None) => capture.complete(),
            (Some(capture), Some(code)) => capture.failed(code),
            (None, _) => {}
        }
        if let Err(Stop::Fail { seq, code }) = outcome {
            let page = page.as_ref().filter(|_| seq == 0).and_then(|page| page.reply(&token, code));
            let failed =
                page.unwrap_or_else(|| AgentMessage::Failed(Failed { token: (&*token).into(), seq, code }));
            // If the link has gone, the edge knows.
            let _ = sender.send(failed).await;
        }
    }
}

/// Sends the messages of one request.
struct Sender<'a> {
    token: &'a str,
    outbox: &'a Outbox,
    tally: &'a Arc<Tally>,
}

impl Sender<'_> {
    /// Says how a delivery ended: nobody waits for more than its status, and when to try again.
    async fn outcome(&self, status: u16, headers: &Headers) -> Result<(), LinkGone> {
        let mut told = Headers::new();
        if let Some(value) = headers.get(header::RETRY_AFTER) {
            told.push(header::RETRY_AFTER, value.clone());
        }
        let reply = Reply { token: self.token.into(), status, headers: told, body: None, end: true };
        self.send(AgentMessage::Reply(reply)).await?;
        self.tally.set_sent(1);
        Ok(())
    }

    /// Sends a message of a few fields.
    async fn send(&self, message: AgentMessage<'_>) -> Result<(), LinkGone> {
        self.outbox.send(encode(message, self.room(0)), None).await
    }

    /// How long a message is with so much beside its token and the names of its fields.
    const fn room(&self, beside: usize) -> usize {
        FIELD_NAMES_BYTES + self.token.len() + beside
    }
}

/// A message that is about so long. What is too much for it costs, and what is too little: most are small.
fn encode(message: AgentMessage<'_>, bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes);
    message.append(&mut text);
    text
}

#[expect(clippy::too_many_arguments, reason = "each is one side of the exchange, and there is one caller")]
async fn answer(
    job: &mut Job,
    tunnel: Option<Arc<Tunnel>>,
    tunnels: &Tunnels,
    sender: &Sender<'_>,
    codecs: &Codecs,
    websockets: &Websockets<'_>,
    line: &mut AccessLine,
    capture: &mut Option<Capture>,
) -> Result<(), Stop> {
    let began = Instant::now();
    let tunnel = tunnel.ok_or(fail(ErrorCode::NoSuchTunnel))?;
    line.counted_by(tunnel.metrics());
    // Nobody waits for the answer to a delivery, and its own settings say how long it may take.
    let head_due =
        began + if job.delivery.is_some() { job.timeout } else { min(tunnel.request_timeout, job.timeout) };
    let says = match tunnel.policy() {
        None => {
            without_user(job);
            Ok((None, None))
        }
        // Boxed: who uses none of it carries no room for it.
        Some(policy) => {
            let admitted = Box::pin(admit(job, policy, head_due)).await;
            admitted.map(|(signed, passage)| (signed, Some(passage)))
        }
    };
    let (signed, mut passage) = match says {
        Ok(says) => says,
        Err(answer) => {
            *capture = capture_here(job, &tunnel, answer.code.is_some());
            let tap = capture.as_ref().map(Capture::tap);
            return Err(Box::pin(answer_here(answer, job, &tunnel, sender, codecs, line, tap)).await);
        }
    };
    let routed = passage.as_ref().and_then(|passage| passage.upstream);
    let is_own = routed.is_none();
    let own = || tunnel.own.as_ref().map(|(upstream, rule)| (upstream, rule));
    let (upstream, host_rule) = routed.or_else(own).ok_or(fail(ErrorCode::NoRoute))?;
    *capture = begin(job, &tunnel, passage.as_deref(), || (!is_own).then(|| upstream.address().to_string()));
    let seen = |job: &Job, capture: &Option<Capture>, passage: Option<&Passage<'_>>| {
        show(capture.as_ref(), job, &tunnel, upstream, host_rule, passage);
    };
    let refuse = |job: &Job, capture: &Option<Capture>, passage: Option<&Passage<'_>>, code| {
        seen(job, capture, passage);
        fail(code)
    };
    let mut place = match job.upgrade {
        None => Places::Request {
            _place: tunnels
                .enter(&tunnel, is_own)
                .map_err(|code| refuse(job, capture, passage.as_deref(), code))?,
        },
        Some(Upgrade::Websocket) => {
            let place = tunnels.enter_socket(&tunnel, is_own, websockets.sockets.count());
            Places::Socket(place.map_err(|code| refuse(job, capture, passage.as_deref(), code))?)
        }
    };
    let delivery = match &job.delivery {
        Some(_) => {
            Some(tunnel.enter_delivery().map_err(|code| refuse(job, capture, passage.as_deref(), code))?)
        }
        None => None,
    };
    let signature = match signed {
        Some(webhook) => {
            // What its head announces is not known any more once the body has been taken.
            seen(job, capture, passage.as_deref());
            Box::pin(signed_body(webhook, job, tunnels, head_due, sender)).await?.map(Some)
        }
        None => Ok(None),
    };
    let entered = signature
        .and_then(|signature| passage.as_mut().map_or(Ok(()), |passage| passage.enter()).map(|()| signature));
    let signature = match entered {
        Ok(signature) => signature,
        Err(answer) => {
            seen(job, capture, passage.as_deref());
            let tap = capture.as_ref().map(Capture::tap);
            return Err(Box::pin(answer_here(answer, job, &tunnel, sender, codecs, line, tap)).await);
        }
    };
    let host = host_for(job, host_rule).map_err(|code| refuse(job, capture, passage.as_deref(), code))?;
    check_upgrade(job).map_err(|code| refuse(job, capture, passage.as_deref(), code))?;
    let way = Way { upstream, host: &host, passage: passage.as_deref() };
    let headers = upstream_headers(job, &tunnel, &way);
    if let Some(capture) = capture {
        capture.tap().request(headers.iter(), job.body.at_hand());
    }

    if job.delivery.is_none() {
        tunnel.waited_for(job.timeout);
    }
    let streamed = match &job.body {
        JobBody::Announced(body, progress) if body.is_streamed() => Some(progress.clone()),
        JobBody::Announced(..) | JobBody::Whole(_) => None,
    };
    let answered = while_it_flows(
        streamed,
        head_due,
        head_due - began,
        std::pin::pin!(async {
            let (body, progress) = match std::mem::replace(&mut job.body, JobBody::Whole(Bytes::new())) {
                JobBody::Whole(bytes) if bytes.is_empty() => (RequestBody::Empty, None),
                JobBody::Whole(bytes) => (RequestBody::Whole(bytes), None),
                JobBody::Announced(mut body, progress) => {
                    body.show(capture.as_ref().map(|capture| capture.tap().clone()));
                    let most = body.most_held();
                    (RequestBody::Upload(ask_for(body, most, tunnels, sender).await?), Some(progress))
                }
            };
            let mut request = Request::new(body);
            *request.method_mut() = job.method.clone();
            *request.uri_mut() = origin_form(way.target(job)).ok_or(fail(ErrorCode::BadRequest))?;
            *request.headers_mut() = headers;
            if request.body().is_of_unknown_length() {
                // Said, or a method that mostly has no body would be sent without it. HTTP/2 needs no word for it.
                let chunked = HeaderValue::from_static("chunked");
                request.headers_mut().insert(header::TRANSFER_ENCODING, chunked);
            }
            if job.upgrade.is_some() {
                // Boxed, as opening a connection is: who asks for no other protocol carries no room for it.
                return Box::pin(handshake(job, &tunnel, upstream, request, line))
                    .await
                    .map(|answer| (answer, None));
            }
            match upstream.send(request).await {
                Ok(response) => Ok((Answered::Response(response), progress)),
                Err(error) => {
                    // The body's own failure explains the broken request better than its echo does.
                    let upload = progress.and_then(|progress| progress.failure());
                    let error = upload.map_or(error, UpstreamError::Upload);
                    log_failure(job, &tunnel, upstream, &error, line);
                    if let UpstreamError::Upload(UploadError::OverLimit(code)) = error {
                        line.denied_by(DeniedBy::of(code));
                    }
                    Err(fail(error.code()))
                }
            }
        }),
    )
    .await;
    let outcome = answered.unwrap_or_else(|| {
        let cause = format!("{}: no answer in time", upstream.address());
        tunnel.failed(&job.request_id, &cause);
        line.cause(&cause);
        Err(fail(ErrorCode::UpstreamTimedOut))
    });
    let good = match &outcome {
        Ok((Answered::Response(response), _)) => Some(!matches!(response.status().as_u16(), 502..=504)),
        Ok((Answered::Opened { .. }, _)) => Some(true),
        Err(Stop::Fail { code, .. }) => Some(!code.status().is_server_error()),
        Err(Stop::Answered(_) | Stop::Gone) => None,
    };
    if let (Some(passage), Some(good)) = (&mut passage, good) {
        passage.came_to(good);
    }
    let (response, progress) = outcome?;
    tunnel.answered();
    let response = match response {
        Answered::Response(response) => response,
        Answered::Opened { subprotocol, mut headers, io } => {
            line.head(http::StatusCode::SWITCHING_PROTOCOLS.as_u16());
            if let Some(capture) = capture {
                let protocol = subprotocol.as_deref().and_then(|name| HeaderValue::from_str(name).ok());
                let protocol = protocol.iter().map(|value| (&header::SEC_WEBSOCKET_PROTOCOL, value));
                capture.tap().answer(101, protocol.chain(headers.iter()), None);
            }
            Way { upstream, host: &host, passage: passage.as_deref() }.edit_response(
                job,
                &tunnel,
                &mut headers,
            );
            if let Places::Socket(place) = std::mem::replace(&mut place, Places::None) {
                upgrade::Socket {
                    line: SocketLine::begin(
                        websockets.access.clone(),
                        job.request_id.clone(),
                        &job.tunnel,
                        &job.target,
                    ),
                    request_id: job.request_id.clone(),
                    token: sender.token.into(),
                    io,
                    serial: websockets.serial,
                    outbox: sender.outbox.clone(),
                    codecs: codecs.clone(),
                    sockets: Arc::clone(websockets.sockets),
                    place,
                    idle: tunnel.websocket_idle_timeout(),
                    hints: tunnel.hints(),
                    capture: capture.take(),
                }
                .start(subprotocol, headers);
            }
            return Ok(());
        }
    };

    let tap = capture.as_ref().map(Capture::tap);
    let dialled = tap.and_then(|_| response.extensions().get::<Dialled>().copied());
    let (status, mut headers, body) = check_head(response).map_err(|error| {
        log_failure(job, &tunnel, upstream, &error, line);
        fail(error.code())
    })?;
    line.head(status);
    if let Some(signature) = signature
        && (200..400).contains(&status)
    {
        signature.delivered();
    }
    if let Some(tap) = tap {
        tap.answer(status, headers.iter(), dialled.map(|at| at.0));
    }
    if let Some(place) = delivery {
        // Before the outcome is told: the edge may send the next one at once.
        drop(place);
        sender.outcome(status, &headers).await?;
        let is_taken = progress.is_none_or(|progress| progress.is_complete());
        Box::pin(read_off(body, is_taken, tap)).await;
        return Ok(());
    }
    let way = Way { upstream, host: &host, passage: passage.as_deref() };
    way.edit_response(job, &tunnel, &mut headers);
    let mut response = Outflow {
        refused: (status >= 400).then(|| Refused { status, own_page: is_own_page(job, &tunnel, &way) }),
        tap,
        ..Outflow::new(sender, &tunnel, Source::Upstream(body), &headers, codecs)
    };
    // They are not needed any more, and a response may take hours.
    job.headers = Headers::new();
    match response.deliver(began, status, headers, line).await {
        Ok(()) => {
            if progress.is_none_or(|progress| progress.is_complete()) {
                response.body.finish();
            }
            Ok(())
        }
        Err(Broken::Gone) => Err(Stop::Gone),
        Err(Broken::TimedOut) => Err(response.broke_off(ErrorCode::UpstreamTimedOut, line)),
        Err(Broken::Upstream(error)) => {
            log_failure(job, &tunnel, upstream, &error, line);
            Err(response.broke_off(error.code(), line))
        }
    }
}

/// Begins to show a request to the inspector, if its tunnel is inspected. `elsewhere` is its upstream where that is not
/// the tunnel's own; empty where there is none.
fn begin(
    job: &Job,
    tunnel: &Tunnel,
    passage: Option<&Passage<'_>>,
    elsewhere: impl FnOnce() -> Option<String>,
) -> Option<Capture> {
    let lens = tunnel.lens()?;
    let kind = if job.upgrade.is_some() { Kind::Websocket } else { Kind::Http };
    let moved = passage.and_then(|passage| passage.target.as_ref());
    let public = match moved {
        None => PublicTarget::Target,
        Some(_) => PublicTarget::Path(format!("{}{}", asked(job).prefix(), job.target.as_str()).into()),
    };
    let target = moved.unwrap_or(&job.target).as_str();
    Some(lens.request(&job.request_id, kind, job.method.as_str(), target, public, elsewhere()))
}

/// Shows the inspector a request as its upstream gets it, or would have.
fn show(
    capture: Option<&Capture>,
    job: &Job,
    tunnel: &Tunnel,
    upstream: &Upstream,
    rule: &HostRule,
    passage: Option<&Passage<'_>>,
) {
    let Some(capture) = capture else { return };
    let host = host_for(job, rule).unwrap_or_else(|_| upstream.authority().clone());
    let headers = upstream_headers(job, tunnel, &Way { upstream, host: &host, passage });
    capture.tap().request(headers.iter(), job.body.at_hand());
}

/// Shows the inspector a request that is answered here: as it came, but one that `is_refused` as its upstream would have
/// got it.
fn capture_here(job: &mut Job, tunnel: &Tunnel, is_refused: bool) -> Option<Capture> {
    tunnel.lens()?;
    if !is_refused {
        let capture = begin(job, tunnel, None, || Some(String::new()))?;
        capture.tap().request(job.headers.iter(), job.body.at_hand());
        return Some(capture);
    }
    Visitor::default().mark(&mut job.headers);
    let meant = tunnel.policy().and_then(|policy| policy.traffic().meant(&asked(job), &job.request_id));
    let routed = meant.as_ref().and_then(|passage| passage.upstream);
    let own = meant.as_ref().and(tunnel.own.as_ref()).map(|(upstream, rule)| (upstream, rule));
    let Some((upstream, rule)) = routed.or(own) else {
        let capture = begin(job, tunnel, None, || Some(String::new()))?;
        capture.tap().request(job.headers.end_to_end(), job.body.at_hand());
        return Some(capture);
    };
    let capture =
        begin(job, tunnel, meant.as_ref(), || routed.map(|(upstream, _)| upstream.address().to_string()))?;
    show(Some(&capture), job, tunnel, upstream, rule, meant.as_ref());
    Some(capture)
}

/// Where a request goes.
struct Way<'a> {
    upstream: &'a Upstream,
    /// What `host` says to it.
    host: &'a HeaderValue,
    passage: Option<&'a Passage<'a>>,
}

impl<'a> Way<'a> {
    fn target<'t>(&'t self, job: &'t Job) -> &'t Target {
        self.passage.and_then(|passage| passage.target.as_ref()).unwrap_or(&job.target)
    }

    /// Says paths of the upstream as the edge expects them, where they are others.
    fn move_response(&self, job: &Job, headers: &mut Headers) {
        let target = self.target(job);
        if let Some(passage) = self.passage {
            return passage.move_response(headers, target, job.public_host());
        }
        let told = prefix::told(asked(job).prefix(), target.as_str());
        if !told.is_empty() {
            prefix::move_fields(headers, "", "", told, job.public_host());
        }
    }

    /// Makes the fields that the upstream answered with those for the public client.
    fn edit_response(&self, job: &Job, tunnel: &Tunnel, headers: &mut Headers) {
        self.move_response(job, headers);
        if tunnel.rewrites_location()
            && View::concerns(headers)
            && let Some(view) = self.view(job)
        {
            view.to_public(headers);
        }
        if let Some(passage) = self.passage {
            passage.edit_response(headers);
        }
    }

    fn view<'v>(&'v self, job: &'v Job) -> Option<View<'v>>
    where
        'a: 'v,
    {
        let view = View::of(&job.headers, self.upstream.address(), self.host)?;
        Some(match self.passage.and_then(Passage::prefixes) {
            Some((public, own)) => view.under(public, own),
            None => view,
        })
    }
}

/// Only the agent says who a visitor is.
fn without_user(job: &mut Job) {
    if job.headers.iter().any(|(name, _)| is_user(name)) {
        job.headers.retain(|name, _| !is_user(name));
    }
}

/// Lets a request in or answers it. Returns what its body must be signed by, and where it goes.
async fn admit<'a>(
    job: &mut Job,
    policy: &'a Policy,
    due: Instant,
) -> Result<(Option<&'a Webhook>, Box<Passage<'a>>), Answer> {
    let body_bytes = match &job.body {
        JobBody::Whole(bytes) => Some(bytes.len() as u64),
        JobBody::Announced(body, _) => {
            Some(body.announced()).filter(|&length| length != limits::UNKNOWN_LENGTH)
        }
    };
    let admitted = timeout_at(due, policy.admit(&asked(job), &job.request_id, body_bytes, job.time())).await;
    let admitted = admitted.unwrap_or_else(|_| Err(Answer::refusal(ErrorCode::SignInUnavailable)))?;
    admitted.visitor.mark(&mut job.headers);
    if let (JobBody::Announced(body, _), Some(most)) = (&mut job.body, admitted.passage.max_body) {
        body.limit(most, ErrorCode::BodyTooLarge);
    }
    Ok((admitted.signed, Box::new(admitted.passage)))
}

/// Takes the whole body and checks its signature.
async fn signed_body(
    webhook: &Webhook,
    job: &mut Job,
    tunnels: &Tunnels,
    due: Instant,
    sender: &Sender<'_>,
) -> Result<Result<Signature, Answer>, Stop> {
    let bytes = match std::mem::replace(&mut job.body, JobBody::Whole(Bytes::new())) {
        JobBody::Whole(bytes) => bytes,
        JobBody::Announced(mut body, _) => {
            body.limit(policy::SIGNED_BODY_BYTES, ErrorCode::WebhookTooLarge);
            let whole = async {
                // Of a body of unknown length what is taken, and what waits behind it.
                let most = min(body.announced(), policy::SIGNED_BODY_BYTES + body.most_held());
                let body = ask_for(body, most, tunnels, sender).await?;
                Ok(http_body_util::BodyExt::collect(body).await)
            };
            match timeout_at(due, whole).await.unwrap_or(Err(fail(ErrorCode::UpstreamTimedOut)))? {
                Ok(whole) => whole.to_bytes(),
                Err(UploadError::OverLimit(code)) => return Ok(Err(Answer::refusal(code))),
                Err(error) => return Err(fail(UpstreamError::Upload(error).code())),
            }
        }
    };
    // The sender's second try is one of ours, where this is not the first.
    let is_again = job.delivery.as_ref().is_some_and(|delivery| delivery.attempt > 1);
    let checked = webhook.check(&asked(job), &bytes, job.time(), is_again);
    job.body = JobBody::Whole(bytes);
    Ok(checked.map_err(|error| {
        tracing::info!(
            request_id = %job.request_id, tunnel_id = %job.tunnel,
            "a webhook was refused: {error}"
        );
        Answer::refusal(ErrorCode::WebhookRefused)
    }))
}

/// Asks the edge for an announced body, once there is room for `most` of it.
async fn ask_for(
    mut body: Box<UploadBody>,
    most: u64,
    tunnels: &Tunnels,
    sender: &Sender<'_>,
) -> Result<Box<UploadBody>, Stop> {
    if body.is_accepted() {
        return Ok(body);
    }
    let budget = tunnels.reserve_upload(most).await.ok_or(fail(ErrorCode::RequestTooLarge))?;
    body.accept(budget);
    let window = body.is_streamed().then_some(limits::UPLOAD_WINDOW);
    if window.is_some() {
        let (token, tally) = (sender.token.into(), Arc::clone(sender.tally));
        tokio::spawn(return_credit(body.watch_taken(), token, sender.outbox.clone(), tally));
    }
    let ask = AgentMessage::Continue(Continue { token: sender.token.into(), codecs: Codecs::all(), window });
    sender.send(ask).await?;
    Ok(body)
}

/// Tells the edge how far a streamed body was taken, until nobody takes any more of it.
async fn return_credit(mut taken: watch::Receiver<u32>, token: Box<str>, outbox: Outbox, tally: Arc<Tally>) {
    let mut told = 0;
    while taken.changed().await.is_ok() {
        let now = *taken.borrow_and_update();
        if now - told < limits::UPLOAD_CREDIT_EVERY {
            continue;
        }
        told = now;
        let progress = Progress { token: (&*token).into(), sent: tally.sent(), ended: false, taken: now };
        if outbox.send(AgentMessage::Progress(progress).encode().into_bytes(), None).await.is_err() {
            return;
        }
    }
}

/// Waits for `answer` until `due`, or as long as a streamed body flows and for `patience` after that. `None` where it
/// was too late. It is large, so it is pinned where it is made and not moved.
async fn while_it_flows<T>(
    streamed: Option<UploadProgress>,
    mut due: Instant,
    patience: Duration,
    mut answer: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    loop {
        if let Ok(answer) = timeout_at(due, answer.as_mut()).await {
            return Some(answer);
        }
        let later = streamed.as_ref().and_then(UploadProgress::moved_at).map(|at| at + patience);
        due = later.filter(|&later| later > due)?;
    }
}

/// The head of a request, as policy sees it.
fn asked(job: &Job) -> Asked<'_> {
    Asked { method: &job.method, target: &job.target, headers: &job.headers, upgrade: job.upgrade.is_some() }
}

/// Answers in place of the upstream.
async fn answer_here(
    answer: Answer,
    job: &Job,
    tunnel: &Tunnel,
    sender: &Sender<'_>,
    codecs: &Codecs,
    line: &mut AccessLine,
    tap: Option<&Tap>,
) -> Stop {
    let code = answer.code;
    line.denied_by(answer.denied_by);
    if job.delivery.is_some() {
        return outcome_here(answer, job, sender, line, tap).await;
    }
    let (status, mut headers, body) = answer.into_parts(&job.request_id, asked(job).wants_html());
    if let (Some(code), Some(policy)) = (code, tunnel.policy()) {
        policy.traffic().mark_refusal(code, job.headers.get(header::ORIGIN), &mut headers);
    }
    line.head(status);
    // The length stays in the head, also for whoever wants no body.
    let body = Source::Local(if job.method == Method::HEAD { LocalBody::default() } else { body });
    if let Some(tap) = tap {
        tap.own_answer(status, headers.iter());
    }
    let mut response = Outflow { tap, ..Outflow::new(sender, tunnel, body, &headers, codecs) };
    match response.deliver(Instant::now(), status, headers, line).await {
        Ok(()) => Stop::Answered(code),
        Err(Broken::Gone) => Stop::Gone,
        Err(Broken::TimedOut) => response.broke_off(ErrorCode::UpstreamTimedOut, line),
        Err(Broken::Upstream(error)) => {
            tracing::warn!(request_id = %job.request_id, tunnel_id = %job.tunnel, "an answer broke off: {error}");
            response.broke_off(error.code(), line)
        }
    }
}

/// What an answer in place of the upstream's means for a delivery: why it was refused, or its status.
async fn outcome_here(
    answer: Answer,
    job: &Job,
    sender: &Sender<'_>,
    line: &mut AccessLine,
    tap: Option<&Tap>,
) -> Stop {
    let code = answer.code;
    let (status, headers, _) = answer.into_parts(&job.request_id, false);
    line.head(status);
    if let Some(tap) = tap {
        tap.own_answer(status, headers.iter());
    }
    match code {
        Some(code) => fail(code),
        None => sender.outcome(status, &headers).await.map_or_else(Stop::from, |()| Stop::Answered(None)),
    }
}

/// Says now and then that a delivery is still being worked on, until this is dropped.
fn signs_of_life(token: &str, outbox: &Outbox, every: Duration) -> AbortOnDropHandle<()> {
    let progress =
        AgentMessage::Progress(Progress { token: token.into(), sent: 0, ended: false, taken: 0 }).encode();
    let outbox = outbox.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            sleep(every).await;
            outbox.send_behind(progress.clone());
        }
    }))
}

/// Reads what an upstream still says, for the inspector and so that its connection can be used again. What is long or
/// slow is not waited for: the delivery has ended.
async fn read_off(mut body: ResponseBody, is_taken: bool, tap: Option<&Tap>) {
    let whole = async {
        let mut read = 0;
        while !body.is_end() {
            match body.next().await {
                Some(Ok(bytes)) => {
                    if let Some(tap) = tap {
                        tap.answer_piece(&bytes);
                    }
                    read += bytes.len();
                    if read > READ_OFF_BYTES {
                        return false;
                    }
                }
                Some(Err(_)) => return false,
                None => return true,
            }
        }
        true
    };
    if timeout(READ_OFF, whole).await.unwrap_or(false) && is_taken {
        body.finish();
    }
}

/// The tunnel's own page for a browser whose request the upstream does not answer.
struct ErrorPage {
    tunnel: Arc<Tunnel>,
    request_id: RequestId,
    origin: Option<HeaderValue>,
    is_head: bool,
}

impl ErrorPage {
    fn of(job: &Job, tunnel: &Arc<Tunnel>) -> Option<Self> {
        tunnel.policy()?;
        let is_head = job.method == Method::HEAD;
        asked(job).wants_html().then(|| Self {
            tunnel: Arc::clone(tunnel),
            request_id: job.request_id.clone(),
            origin: job.headers.get(header::ORIGIN).cloned(),
            is_head,
        })
    }

    fn reply<'a>(&'a self, token: &'a str, code: ErrorCode) -> Option<AgentMessage<'a>> {
        let policy = self.tunnel.policy()?;
        let page = policy.error_page(code)?;
        let (status, mut headers, _) =
            Answer::refusal(code).with_page(page).into_parts(&self.request_id, true);
        policy.traffic().mark_refusal(code, self.origin.as_ref(), &mut headers);
        let body = (!self.is_head).then(|| Body::encode_front(page.as_bytes(), None).0);
        Some(AgentMessage::Reply(Reply { token: token.into(), status, headers, body, end: true }))
    }
}

/// What a WebSocket needs besides what a request does.
struct Websockets<'a> {
    access: &'a AccessLog,
    sockets: &'a Arc<Sockets>,
    serial: Serial,
}

/// What counts at the tunnel.
enum Places {
    Request { _place: Place },
    Socket(SocketPlace),
    None,
}

/// What an upstream has answered.
enum Answered {
    Response(Response<ResponseBody>),
    Opened { subprotocol: Option<String>, headers: Headers, io: hyper::upgrade::Upgraded },
}

/// Asks the upstream for a WebSocket. Some servers never answer where they know of none.
async fn handshake(
    job: &Job,
    tunnel: &Tunnel,
    upstream: &Upstream,
    mut request: Request<RequestBody>,
    line: &mut AccessLine,
) -> Result<Answered, Stop> {
    let key = generate_key();
    upgrade::ask(request.headers_mut(), &key);
    let answer = timeout(limits::SOCKET_HANDSHAKE, upstream.upgrade(request)).await;
    let answer = answer.map_err(|_| {
        tracing::info!(
            request_id = %job.request_id, tunnel_id = %job.tunnel,
            "the upstream did not answer a WebSocket's handshake; does it know this path and subprotocol?"
        );
        line.cause("the handshake of a WebSocket was not answered in time");
        fail(ErrorCode::UpstreamTimedOut)
    })?;
    let checked = answer.and_then(|answer| match answer {
        upstream::Upgrade::Refused(response) => Ok(Answered::Response(response)),
        upstream::Upgrade::Switched(head, io) => upgrade::check(&head, &key)
            .map(|(subprotocol, headers)| Answered::Opened { subprotocol, headers, io }),
    });
    checked.map_err(|error| {
        if matches!(error, UpstreamError::Invalid { source: Some(_), .. })
            && job.headers.get(header::ORIGIN).is_some()
            && let (place, hint) = NO_HTTP
            && tunnel.hints().first(place)
        {
            line.hint(error.code().status().as_u16(), hint);
        }
        log_failure(job, tunnel, upstream, &error, line);
        fail(error.code())
    })
}

fn log_failure(
    job: &Job,
    tunnel: &Tunnel,
    upstream: &Upstream,
    error: &UpstreamError,
    line: &mut AccessLine,
) {
    if error.code().status().is_server_error() {
        let cause = cause::explain(upstream.address(), error);
        tunnel.failed(&job.request_id, &cause);
        line.cause(&cause);
    }
    let cause = std::error::Error::source(error).map(ToString::to_string);
    tracing::debug!(
        request_id = %job.request_id,
        tunnel_id = %job.tunnel,
        error_code = %error.code(),
        cause = cause.as_deref(),
        "the upstream failed: {error}"
    );
}

/// Whether a page of the tunnel asks, and the upstream is told that it is another host than the page's.
fn is_own_page(job: &Job, tunnel: &Tunnel, way: &Way<'_>) -> bool {
    let Some(origin) = job.headers.get(header::ORIGIN) else { return false };
    let all = Rewrites { location: false, origin: true };
    let view = way.view(job);
    !tunnel.rewrites(false).origin
        && view.is_some_and(|view| {
            view.to_upstream(all, &header::ORIGIN, origin).is_some_and(|own| own != origin)
        })
}

/// The URI whose path and query are exactly the target's bytes, and that has nothing else: there is
/// no authority in it that could lead elsewhere.
pub(crate) fn origin_form(target: &Target) -> Option<Uri> {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(PathAndQuery::try_from(target.as_str()).ok()?);
    let uri = Uri::from_parts(parts).ok()?;
    let same = uri.path_and_query().is_some_and(|sent| sent.as_str() == target.as_str());
    (same && uri.authority().is_none()).then_some(uri)
}

/// What `host` says to the upstream.
fn host_for(job: &Job, rule: &HostRule) -> Result<HeaderValue, ErrorCode> {
    match rule {
        HostRule::Fixed(value) => Ok(value.clone()),
        HostRule::Public => job
            .headers
            .get(X_FORWARDED_HOST)
            .or_else(|| job.headers.get(header::HOST))
            .cloned()
            .ok_or(ErrorCode::BadRequest),
    }
}

/// Refuses what goes on with another protocol that is not known.
fn check_upgrade(job: &Job) -> Result<(), ErrorCode> {
    // An offer of HTTP/2 may be ignored (RFC 9110 §7.8); anything else is waited for.
    let upgrades = job.upgrade.is_none()
        && job.headers.get_all(header::UPGRADE).any(|value| !value.as_bytes().eq_ignore_ascii_case(b"h2c"));
    if upgrades || job.method == Method::CONNECT {
        return Err(ErrorCode::UpgradeUnsupported);
    }
    Ok(())
}

/// The header fields for the upstream: in the order they came, `host` by the tunnel's rule and first,
/// the length exact, nothing that belongs to one connection.
fn upstream_headers(job: &Job, tunnel: &Tunnel, way: &Way<'_>) -> HeaderMap {
    let length = match &job.body {
        JobBody::Whole(bytes) => bytes.len() as u64,
        JobBody::Announced(body, _) => body.announced(),
    };
    let is_known = length != limits::UNKNOWN_LENGTH;
    let expects_body = matches!(job.method, Method::POST | Method::PUT | Method::PATCH);
    let has_length = length > 0 || expects_body || job.headers.get(header::CONTENT_LENGTH).is_some();
    let mut length = (is_known && has_length).then(|| HeaderValue::from(length));

    let mut headers = HeaderMap::with_capacity(job.headers.len() + 2);
    headers.insert(header::HOST, way.host.clone());
    let rewrites = tunnel.rewrites(job.upgrade.is_some());
    let view = || way.view(job);
    for (name, value) in job.headers.end_to_end() {
        if name == header::CONTENT_LENGTH {
            // At its place, once.
            if let Some(length) = length.take() {
                headers.insert(name.clone(), length);
            }
        } else if name == header::VIA && !tunnel.says_via() {
            headers.extend(without_own_via(value).map(|value| (name.clone(), value)));
        } else if name != header::HOST && name != header::EXPECT {
            let concerned = rewrites.concern(name);
            let moved =
                concerned.then(view).flatten().and_then(|view| view.to_upstream(rewrites, name, value));
            headers.append(name.clone(), moved.unwrap_or_else(|| value.clone()));
        }
    }
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length);
    }
    if let Some(passage) = way.passage {
        passage.edit_request(&mut headers);
    }
    headers
}

/// Checks the head of a response and takes off what belongs to the upstream's connection.
pub(crate) fn check_head(
    response: Response<ResponseBody>,
) -> Result<(u16, Headers, ResponseBody), UpstreamError> {
    let (head, body) = response.into_parts();
    let status = head.status.as_u16();
    if !(200..=599).contains(&status) {
        return Err(UpstreamError::invalid("its status is not a final one"));
    }
    let is_chunked = {
        let mut codings = head.headers.get_all(header::TRANSFER_ENCODING).iter();
        match (codings.next(), codings.next()) {
            (None, _) => false,
            (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => true,
            _ => return Err(UpstreamError::invalid("its transfer coding is not supported")),
        }
    };
    let mut headers = Headers::from(head.headers);
    if is_chunked {
        // RFC 9112 §6.3: the transfer coding overrides a length.
        headers.remove(header::CONTENT_LENGTH);
    }
    normalise_length(status, &mut headers)?;
    headers.strip_hop_by_hop();
    if !headers.is_within_limits() {
        return Err(UpstreamError::invalid("its head is over the limit"));
    }
    Ok((status, headers, body))
}

/// Leaves one `content-length` at the most. The same length said several times is that length (RFC 9110 §8.6), and a
/// response that has no body says none (there too).
fn normalise_length(status: u16, headers: &mut Headers) -> Result<(), UpstreamError> {
    if status == 204 {
        headers.remove(header::CONTENT_LENGTH);
    }
    let is_plain = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let (mut length, mut is_one) = (None, None);
    for value in headers.get_all(header::CONTENT_LENGTH) {
        is_one = Some(is_one.is_none() && is_plain(value.as_bytes()));
        for text in value.as_bytes().split(|&b| b == b',').map(<[u8]>::trim_ascii) {
            let said = std::str::from_utf8(text).ok().filter(|_| is_plain(text));
            match (said.and_then(|text| text.parse::<u64>().ok()), length) {
                (Some(said), None) => length = Some(said),
                (Some(said), Some(before)) if said == before => {}
                _ => return Err(UpstreamError::invalid("its lengths contradict each other")),
            }
        }
    }
    if let (Some(length), Some(false)) = (length, is_one) {
        headers.set(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(())
}

fn wants_codec(headers: &Headers) -> bool {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("unreadable"));
    is_compressible(text(header::CONTENT_TYPE), text(header::CONTENT_ENCODING))
}

/// How long these fields are in a message, at most: `["name","value"],` and two bytes for each byte of a value.
fn encoded_bytes(headers: &Headers) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + 2 * value.len() + 8).sum()
}

/// How many raw bytes of body fit the message whose head has `encoded` bytes, whatever they need escaped.
fn room_beside(encoded: usize) -> usize {
    (limits::MESSAGE_BYTES - limits::ENVELOPE_BYTES).saturating_sub(encoded) / 4 * 3
}

/// What breaks a response off.
enum Broken {
    Upstream(UpstreamError),
    TimedOut,
    Gone,
}

impl From<LinkGone> for Broken {
    fn from(LinkGone: LinkGone) -> Self {
        Self::Gone
    }
}

/// An error that the upstream answered with, until its body's beginning is there.
#[derive(Clone, Copy)]
struct Refused {
    status: u16,
    own_page: bool,
}

/// Where a response's body comes from.
enum Source {
    Upstream(ResponseBody),
    Local(LocalBody),
}

impl Source {
    fn is_end(&self) -> bool {
        match self {
            Self::Upstream(body) => body.is_end(),
            Self::Local(body) => body.is_end(),
        }
    }

    async fn next(&mut self) -> Option<Result<Bytes, UpstreamError>> {
        match self {
            Self::Upstream(body) => body.next().await,
            Self::Local(body) => {
                body.next().await.map(|next| next.map_err(|error| UpstreamError::Reset(Some(error.into()))))
            }
        }
    }

    /// Gives an upstream's connection back.
    fn finish(self) {
        if let Self::Upstream(body) = self {
            body.finish();
        }
    }
}

/// A response on its way out.
struct Outflow<'a> {
    sender: &'a Sender<'a>,
    body: Source,
    /// Read from the upstream and not yet sent.
    pending: BytesMut,
    /// Nothing follows `pending`.
    ended: bool,
    /// Why nothing follows `pending` although the body has not ended.
    broken: Option<UpstreamError>,
    /// It is a stream of events.
    is_of_events: bool,
    codec: Option<Codec>,
    /// The number of the next piece.
    seq: u32,
    window: SendWindow,
    pace: Pace,
    /// What may be known for a setting that is amiss.
    refused: Option<Refused>,
    tunnel: &'a Tunnel,
    tap: Option<&'a Tap>,
}

impl<'a> Outflow<'a> {
    /// A response from its beginning.
    fn new(
        sender: &'a Sender<'a>,
        tunnel: &'a Tunnel,
        body: Source,
        headers: &Headers,
        codecs: &Codecs,
    ) -> Self {
        let codec = (codecs.has(Codec::Zstd) && wants_codec(headers)).then_some(Codec::Zstd);
        Self {
            sender,
            body,
            pending: BytesMut::new(),
            ended: false,
            broken: None,
            is_of_events: headers
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| is_event_stream(kind.as_bytes())),
            codec,
            seq: 0,
            window: SendWindow::new(limits::CHUNK_WINDOW),
            pace: Pace::new(Instant::now()),
            refused: None,
            tunnel,
            tap: None,
        }
    }

    /// Sends all of it.
    async fn deliver(
        &mut self,
        began: Instant,
        status: u16,
        headers: Headers,
        line: &mut AccessLine,
    ) -> Result<(), Broken> {
        timeout_at(began + limits::RESPONSE_DURATION, async {
            self.send_head(status, headers, line).await?;
            while !self.is_sent() {
                self.send_chunk(line).await?;
            }
            Ok(())
        })
        .await
        .unwrap_or(Err(Broken::TimedOut))
    }

    /// It ends before its end. While nothing of it has been sent, the code is the answer.
    fn broke_off(&self, code: ErrorCode, line: &mut AccessLine) -> Stop {
        if self.seq == 0 {
            line.withdraw_head();
        }
        Stop::Fail { seq: self.seq, code }
    }

    /// Whether the last piece has been sent.
    fn is_sent(&self) -> bool {
        self.ended && self.pending.is_empty() && self.seq > 0
    }

    /// Reads until there are `most` bytes, the body has ended, or `due` has passed and nothing more is
    /// there.
    async fn fill(&mut self, most: usize, due: Instant) {
        self.ended |= self.body.is_end();
        while !self.is_over() && self.pending.len() < most {
            let Ok(next) = timeout_at(due, self.body.next()).await else { break };
            self.take(next);
        }
    }

    /// Whether there is nothing left to read.
    const fn is_over(&self) -> bool {
        self.ended || self.broken.is_some()
    }

    fn take(&mut self, next: Option<Result<Bytes, UpstreamError>>) {
        match next {
            Some(Ok(bytes)) => {
                if let Some(tap) = self.tap {
                    tap.answer_piece(&bytes);
                }
                if self.seq > 0 {
                    self.pace.came(Instant::now());
                }
                self.pending.extend_from_slice(&bytes);
            }
            Some(Err(error)) => self.broken = Some(error),
            None => self.ended = true,
        }
        self.ended |= self.broken.is_none() && self.body.is_end();
    }

    /// Sends the head and what of the body is there with it.
    async fn send_head(
        &mut self,
        status: u16,
        headers: Headers,
        line: &mut AccessLine,
    ) -> Result<(), Broken> {
        let head = encoded_bytes(&headers);
        let room = room_beside(head);
        self.fill(room, Instant::now() + limits::HEAD_LINGER).await;
        // Nothing has been sent yet: an error answers better than half a body. But the readers of events come again after
        // a breakage, and never after an error (WHATWG HTML §9.2.3).
        if !(self.is_of_events && status == 200)
            && let Some(error) = self.broken.take()
        {
            return Err(Broken::Upstream(error));
        }
        if let Some(Refused { status, own_page }) = self.refused
            && let Some(hint) = self.tunnel.hint(&Refusal { status, body: &self.pending, own_page })
        {
            line.hint(status, hint);
        }
        let bulk = match self.pending.len() {
            0..BULK_BODY_BYTES => None,
            _ => Some(self.sender.outbox.reserve_bulk().await?),
        };
        let front = &self.pending[..min(room, self.pending.len())];
        let (body, taken) = match front {
            [] => (None, 0),
            front => {
                let (body, taken) = Body::encode_front(front, self.codec);
                (Some(body), taken)
            }
        };
        let end = self.ended && taken == self.pending.len();
        let reply =
            AgentMessage::Reply(Reply { token: self.sender.token.into(), status, headers, body, end });
        let text = encode(reply, self.sender.room(head + taken.div_ceil(3) * 4));
        self.sender.outbox.send(text, bulk).await?;
        self.sent(taken, line);
        Ok(())
    }

    /// Sends the next piece: at once what an upstream flushes now and then, full ones while it streams.
    async fn send_chunk(&mut self, line: &mut AccessLine) -> Result<(), Broken> {
        self.take_credit();
        while !self.window.may_send(self.seq) {
            self.sender.tally.news().await;
            self.take_credit();
        }
        if self.pending.is_empty() && !self.is_over() {
            let next = self.body.next().await;
            self.take(next);
        }
        let most = match self.codec {
            Some(Codec::Zstd) => body::COMPRESSED_CHUNK_BYTES,
            None => limits::CHUNK_BYTES,
        };
        let due = self.pace.due(Instant::now());
        self.fill(most, due).await;
        // What arrived before a breakage is passed on before the breakage is.
        if self.pending.is_empty()
            && let Some(error) = self.broken.take()
        {
            return Err(Broken::Upstream(error));
        }
        let bulk = match self.pending.len() {
            0..BULK_BODY_BYTES => None,
            _ => Some(self.sender.outbox.reserve_bulk().await?),
        };
        let (body, taken) = match &self.pending[..] {
            [] => (None, 0),
            pending => {
                let (body, taken) = Body::encode_front(pending, self.codec);
                (Some(body), taken)
            }
        };
        let end = self.ended && taken == self.pending.len();
        let chunk = AgentMessage::Chunk(Chunk { token: self.sender.token.into(), seq: self.seq, body, end });
        let text = encode(chunk, self.sender.room(taken.div_ceil(3) * 4));
        self.sender.outbox.send(text, bulk).await?;
        self.sent(taken, line);
        Ok(())
    }

    fn take_credit(&mut self) {
        let taken = self.sender.tally.taken();
        self.window.credit(taken.through);
        self.pace.taken(taken);
    }

    fn sent(&mut self, taken: usize, line: &mut AccessLine) {
        self.pace.sent(self.seq, Instant::now());
        self.pending.advance(taken);
        self.seq += 1;
        self.sender.tally.set_sent(self.seq);
        line.body(taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_delivery_shows_signs_of_life_until_it_ends() {
        let (outbox, mut queue) = Outbox::new();
        let alive = signs_of_life("token", &outbox, Duration::from_millis(1));
        for _ in 0..3 {
            let said = queue.data.recv().await.unwrap();
            let said = AgentMessage::decode(std::str::from_utf8(&said.text).unwrap())
                .unwrap()
                .token()
                .map(str::to_owned);
            assert_eq!(said.as_deref(), Some("token"));
        }
        drop((alive, outbox));
        // What had been said before the end, and then the end.
        while queue.data.recv().await.is_some() {}
    }
}
