//! One public request from its head to the last byte of its answer.
//!
//! The run brings the first reply. What follows (more of the body, an upload that the agent asked for)
//! happens here: one loop receives from the mailbox, restores the order, writes to the public client and
//! returns credit. The rules that keep the mailbox fit for the next request:
//!
//! * a receive that was begun is awaited to its end: abandoned, it would take a message along;
//! * none is begun once the last piece is here;
//! * whoever stops early tells the agent (`cancel`) and receives until the agent has said its last word.
//!
//! A message of the agent can be lost on its way here. A later piece shows the gap; after a silence the agent is
//! asked how far it is (`probe`), because nothing would show that the last piece was lost. What is known
//! to have been sent and does not come breaks the response off.

use std::{borrow::Cow, cell::Cell, collections::VecDeque, pin::pin, rc::Rc, time::Duration};

use bytes::{Bytes, BytesMut};
use edge::{
    Error,
    agent_link::{AgentLink, Posted},
    deliveries::Terms,
    limit::Denied,
    mailbox::Letter,
    metrics::{self, Counted, outcome},
    unix_now, unix_now_ms,
    workflow::{RunInput, RunOutcome},
};
use futures_util::{
    FutureExt, StreamExt,
    future::{LocalBoxFuture, OptionFuture},
    stream::{self, FuturesUnordered, LocalBoxStream},
};
use proto::{
    body::{Body, Codec, is_compressible},
    chunk::{self, Reassembler},
    error::ErrorCode,
    header::value_to_text,
    id::{ConnectionId, RequestId, TunnelName},
    limits,
    message::{
        Accepted, AgentMessage, Cancel, Credit, EdgeMessage, Probe, Reply, Request, RequestChunk, notice,
    },
    token::Claims,
};
use tokio::{sync::watch, time::Instant};

use crate::{
    Services, answer,
    hold::{Begun, Copied, NotWhole, is_too_long},
    inbox::Mail,
    keep, pick,
    public::{Head, Piece, Pieces, PublicSide, Upload},
    record::Record,
    route::PublicRequest,
    socket::{FirstWord, Handshake, Socket},
};

/// How much longer than its deadline a run is waited for: a connection that froze with the process may be dead, and
/// would be found so only when the whole time of a run has passed.
const RUN_GRACE: Duration = Duration::from_secs(5);

/// How long each receive lasts that only waits for an agent's last word.
const LAST_WORD_WAIT: Duration = Duration::from_secs(1);

/// Carries one exchange: from a head to the end of its answer.
///
/// `ends_at` is when whatever holds the client will hold it no longer.
pub async fn carry<P: PublicSide, M: Mail>(
    services: &Services,
    mail: &M,
    request_id: &RequestId,
    request: Result<PublicRequest, ErrorCode>,
    ends_at: Instant,
    public: P,
    record: &Record,
) {
    let answering = Answering { request_id, public, record };
    let request = match request {
        Ok(request) => request,
        Err(code) => return answering.fail(code).await,
    };
    record.tunnel.set(Some(request.tunnel.clone()));
    if let Some(folder) = request.folder {
        let pieces = answering.begin(answer::moved(folder, request_id), Vec::new());
        drop(pieces.send(Piece::End).await);
        return;
    }

    let lasts = ends_at.saturating_duration_since(Instant::now());
    let admission = match services.limiter.admit(&request.tunnel, request_id, unix_now(), lasts).await {
        Ok(admission) => admission,
        Err(denied) => return answering.fail(denial(request_id, &request.tunnel, &denied)).await,
    };
    // A WebSocket lives as long as this future: what is over before it opens takes no room in it.
    let socket = Box::pin(relay(services, mail, request_id, &request, ends_at, answering)).await;
    // A WebSocket counts as a request until it is open.
    services.limiter.release(admission).await;
    if let Some((socket, public)) = socket {
        let tunnel = request.tunnel.clone();
        drop(request);
        socket.run(services, mail, request_id, &tunnel, public, record).await;
    }
}

/// The way to answer: once, with a whole error or with a head and what follows.
struct Answering<'a, P> {
    request_id: &'a RequestId,
    public: P,
    record: &'a Record,
}

impl<P: PublicSide> Answering<'_, P> {
    async fn fail(self, code: ErrorCode) {
        self.record.outcome.set(code.as_str());
        if code.status().is_server_error() {
            tracing::info!(request_id = %self.request_id, error_code = %code, "request was not answered by its upstream");
        }
        self.public.fail(code).await;
    }

    /// Has the request kept, to be delivered later, and says so; or asks for another try. A body that is still coming is read
    /// to its end before that; given back is one that is too long, with who is still to be answered.
    async fn keep(
        self,
        services: &Services,
        request: &PublicRequest,
        body: Option<Begun>,
        terms: &Terms,
        attempt: u32,
    ) -> Option<(Self, Upload)> {
        let body = match body {
            Some(body) => body.whole(Instant::now() + services.config.reply_timeout).await.map(Some),
            None => Ok(None),
        };
        let code = match (body, &services.keeper) {
            (Ok(body), Some(keeper)) => {
                let bytes = body.as_ref().map_or(&request.body, |body| &body.bytes);
                match keeper.keep(self.request_id, request, bytes, terms, attempt).await {
                    Ok((head, answer)) => {
                        self.record.outcome.set(outcome::ACCEPTED);
                        drop(self.public.begin(head, answer).send(Piece::End).await);
                        return None;
                    }
                    Err(code) => code,
                }
            }
            (Err(NotWhole::TooLong(upload)), _) => return Some((self, upload)),
            (Err(NotWhole::Broken(code)), _) => code,
            (Err(NotWhole::Busy), _) | (Ok(_), None) => ErrorCode::EdgeBusy,
        };
        self.fail(code).await;
        None
    }

    /// Has a request kept that nobody has got. What is too long to be kept goes on: given back is who is still to be answered.
    async fn keep_at_once(self, services: &Services, request: &PublicRequest, terms: &Terms) -> Option<Self> {
        let body = self.begun(request);
        let (answering, upload) = self.keep(services, request, body, terms, 0).await?;
        *request.upload.borrow_mut() = Some(upload);
        Some(answering)
    }

    /// Has a request kept that was not answered for this reason, or says so.
    async fn keep_or_fail(
        self,
        services: &Services,
        request: &PublicRequest,
        body: Option<Begun>,
        kept: Option<(u32, &Terms)>,
        code: ErrorCode,
    ) {
        let answering = match kept {
            Some((attempt, terms)) => match self.keep(services, request, body, terms, attempt).await {
                Some((answering, _)) => answering,
                None => return,
            },
            None => self,
        };
        answering.fail(code).await;
    }

    /// Has a request kept whose agent is lost, where its tunnel's owner wants that. One whose body was passed on without a
    /// copy of it cannot be.
    async fn lost(
        self,
        services: &Services,
        request: &PublicRequest,
        body: Option<Begun>,
        is_passed_on: bool,
    ) {
        let code = ErrorCode::AgentLost;
        let terms = match &services.keeper {
            Some(keeper) if !is_passed_on => keeper.look_up(&request.tunnel).await,
            _ => None,
        };
        let kept =
            terms.as_ref().and_then(|terms| Some((keep::attempts_behind(request, terms, code)?, terms)));
        self.keep_or_fail(services, request, body, kept, code).await;
    }

    /// The body of a request, where it is still coming and nothing of it was passed on.
    fn begun(&self, request: &PublicRequest) -> Option<Begun> {
        request.upload.take().map(|upload| Begun::new(upload, self.public.share()))
    }

    fn begin(self, head: Head, first: Vec<u8>) -> Pieces {
        self.record.answered();
        self.public.begin(head, first)
    }
}

/// The code for a request that a limit does not let through.
fn denial(request_id: &RequestId, tunnel: &TunnelName, denied: &Denied) -> ErrorCode {
    match denied {
        Denied::Exceeded(limit) => {
            tracing::info!(%request_id, tunnel_id = %tunnel, %limit, "request was refused");
            ErrorCode::TooManyRequests
        }
        Denied::Error(error) => {
            tracing::warn!(%request_id, tunnel_id = %tunnel, %error, "request could not be counted");
            ErrorCode::EdgeBusy
        }
    }
}

/// Has the workflow bring the request to an agent, and the answer back.
async fn relay<P: PublicSide, M: Mail>(
    services: &Services,
    mail: &M,
    request_id: &RequestId,
    request: &PublicRequest,
    ends_at: Instant,
    mut answering: Answering<'_, P>,
) -> Option<(Socket, P::Socket)> {
    let record = answering.record;
    let is_too_long = request.upload.borrow().as_ref().is_some_and(|upload| is_too_long(upload.length));
    let may_be_kept = request.upgrade.is_none() && !is_too_long;
    let keeper = services.keeper.as_ref().filter(|_| may_be_kept);
    let mut method = if keeper.is_some() { request.method.as_str() } else { "" };
    if let Some(keeper) = keeper.filter(|keeper| keeper.remembers(request))
        && let Some(terms) = Box::pin(keeper.terms(&request.tunnel)).await
    {
        if keep::covers(request, &terms) {
            answering = Box::pin(answering.keep_at_once(services, request, &terms)).await?;
        }
        method = "";
    }
    let mut reply_by = (Instant::now() + services.config.reply_timeout).min(ends_at);
    // Valid as long as an answer may go on. Nothing is gained by a shorter life: a reply to a request
    // that is over is recognised by its request id.
    let lasts = if request.upgrade.is_some() { limits::SOCKET_LIFETIME } else { limits::RESPONSE_DURATION };
    let expires_at = unix_now() + lasts.as_secs() + limits::RUN_DURATION.as_secs();
    let token = services.config.keys.mint(&Claims {
        request_id: request_id.clone(),
        mailbox: mail.mailbox().clone(),
        tunnel: request.tunnel.clone(),
        expires_at,
    });
    let outcome = loop {
        // Boxed: an AWS call is kilobytes of state, which would be moved with everything around it.
        let outcome = Box::pin(dispatch(services, mail, request_id, request, &token, reply_by, method));
        let Ok(outcome) = tokio::time::timeout_at(reply_by + RUN_GRACE, outcome).await else {
            metrics::count(Counted::RunFailures);
            tracing::error!(%request_id, tunnel_id = %request.tunnel, "run did not end in its time");
            mail.contend();
            answering.fail(ErrorCode::UpstreamTimedOut).await;
            return None;
        };
        match outcome {
            // Nobody has got it. What is not kept is served live: its path is one that is, or it is too long.
            Ok(RunOutcome::Accepted { terms }) if !method.is_empty() => {
                if keep::covers(request, &terms) {
                    if let Some(keeper) = keeper {
                        keeper.remember(&request.tunnel, &terms);
                    }
                    answering = Box::pin(answering.keep_at_once(services, request, &terms)).await?;
                    reply_by = (Instant::now() + services.config.reply_timeout).min(ends_at);
                }
                method = "";
            }
            outcome => break outcome,
        }
    };
    let mut copied = None;
    let (connection, first) = match outcome {
        Ok(RunOutcome::Replied { connection, reply, receipt, sent_ms }) => {
            let letter = Letter {
                receipt,
                request_id: Some(request_id.as_str().to_owned()),
                // The run has looked at it.
                connection_id: None,
                owner: None,
                lost_connection: None,
                sent_ms,
                body: reply,
            };
            (connection, vec![letter])
        }
        Ok(RunOutcome::Dispatched { connection, terms }) => {
            let is_kept =
                |terms: &Terms| keep::attempts_behind(request, terms, ErrorCode::AgentLost).is_some();
            if keeper.is_some()
                && terms.is_some_and(|terms| is_kept(&terms))
                && let Some(upload) = request.upload.take()
            {
                let body = Copied::new(upload, answering.public.share());
                *request.upload.borrow_mut() = Some(body.passed_on());
                copied = Some(body);
            }
            (connection, Vec::new())
        }
        Ok(RunOutcome::Accepted { .. }) => {
            metrics::count(Counted::RunFailures);
            tracing::error!(%request_id, tunnel_id = %request.tunnel, "run accepted what is to be dispatched");
            answering.fail(ErrorCode::EdgeFailed).await;
            return None;
        }
        Ok(RunOutcome::Failed { code, connection, receipt, terms }) => {
            let discarded = async {
                if let Some(receipts) = mail.discard(receipt.into_iter().collect()) {
                    mail.delete(receipts).await;
                }
            };
            let terms = terms.filter(|_| keeper.is_some());
            let kept = terms.and_then(|terms| Some((keep::attempts_behind(request, &terms, code)?, terms)));
            if let Some((attempt, terms)) = kept {
                discarded.await;
                let body = answering.begun(request);
                let kept = Some((attempt, &*terms));
                Box::pin(answering.keep_or_fail(services, request, body, kept, code)).await;
                return None;
            }
            let clean = async {
                discarded.await;
                if let (ErrorCode::UpstreamTimedOut, Some(connection)) = (code, connection) {
                    let exchange =
                        Exchange::new(services, mail, request_id, request, connection, &token, record);
                    exchange.give_up(None).await;
                }
            };
            tokio::join!(answering.fail(code), clean);
            return None;
        }
        Err(Error::Throttled { call }) => {
            tracing::warn!(%request_id, call, "request was not dispatched: throttled");
            answering.fail(ErrorCode::EdgeBusy).await;
            return None;
        }
        Err(error) => {
            metrics::count(Counted::RunFailures);
            tracing::error!(%request_id, tunnel_id = %request.tunnel, %error, "run failed");
            if matches!(error, Error::Unanswered { .. }) {
                mail.contend();
            }
            answering.fail(ErrorCode::EdgeFailed).await;
            return None;
        }
    };
    let first = if request.upgrade.is_some() {
        let handshake = Handshake { mail, request_id, connection: &connection };
        match handshake.first_word(first, reply_by).await {
            FirstWord::Accepted(accepted, owner, early) => {
                let Accepted { token: _, subprotocol, mut headers, codecs } = accepted;
                answer::finish(&mut headers, request_id, request.prefix.as_deref(), &request.host);
                record.answered();
                let share = answering.public.share();
                let opened = answering.public.accept(subprotocol.map(Cow::into_owned), headers).await;
                let socket = Socket { connection, owner, token, codecs, early, share };
                if opened.is_none() {
                    record.outcome.set(outcome::CLIENT_GONE);
                    socket.give_up(services, request_id).await;
                }
                return opened.map(|opened| (socket, opened));
            }
            FirstWord::Other(letters) => letters,
        }
    } else {
        first
    };
    let mut exchange = Exchange::new(services, mail, request_id, request, connection, &token, record);
    exchange.copied = copied;
    exchange.run(first, answering, reply_by, ends_at).await;
    None
}

async fn dispatch<M: Mail>(
    services: &Services,
    mail: &M,
    request_id: &RequestId,
    request: &PublicRequest,
    token: &str,
    reply_by: Instant,
    method: &str,
) -> Result<RunOutcome, Error> {
    let timeout = reply_by.saturating_duration_since(Instant::now());
    let deadline_ms = unix_now_ms() + u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX / 2);
    let streamed = request.upload.borrow().as_ref().map(|upload| upload.length);
    let announced = match streamed {
        Some(length) => Some(length.unwrap_or(limits::UNKNOWN_LENGTH)),
        None => (request.body.len() > limits::CHUNK_BYTES).then_some(request.body.len() as u64),
    };
    let whole = announced.is_none();
    let mut message = EdgeMessage::Request(Request {
        request_id: request_id.clone(),
        token: token.into(),
        tunnel: request.tunnel.clone(),
        method: request.method.as_str().into(),
        target: request.target.clone(),
        headers: request.headers.clone(),
        body: (whole && !request.body.is_empty()).then(|| Body::encode(&request.body)),
        announced,
        streamed: streamed.is_some(),
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX / 2),
        upgrade: request.upgrade,
        delivery: None,
    });
    // Most are so short that they need not be written to know.
    if whole
        && most_bytes(request) > limits::MESSAGE_BYTES
        && message.encode().len() > limits::MESSAGE_BYTES
        && let EdgeMessage::Request(message) = &mut message
    {
        message.body = None;
        message.announced = Some(request.body.len() as u64);
    }
    let input = RunInput {
        request_id,
        tunnel: &request.tunnel,
        deadline_ms,
        mailbox: mail.queue_url().unwrap_or_default(),
        pick: pick(request_id),
        method,
        message: &message,
    };
    services.workflow.run(&input).await
}

/// No request's message has more bytes than this, its body in it.
fn most_bytes(request: &PublicRequest) -> usize {
    let headers = request.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 2);
    let bytes = request.method.as_str().len()
        + request.target.as_str().len()
        + request.body.len()
        + headers.sum::<usize>();
    // Every byte as `\u00xx`; the token, the ids and what stands around them.
    bytes * 6 + 4096
}

/// The connection has gone; what was sent over it before has time to arrive.
async fn agent_lost() -> Side {
    tokio::time::sleep(limits::LOST_DELAY).await;
    Side::Stop(Stop::AgentLost)
}

/// One numbered piece of a response.
enum Part {
    Head(Reply<'static>, Option<Vec<u8>>),
    Data { bytes: Vec<u8>, end: bool },
    Failed(ErrorCode),
}

/// Why nothing more will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The answer cannot be completed, for this reason; the agent may still be sending.
    Broken(ErrorCode),
    /// The agent's connection has ended.
    AgentLost,
    /// The public client has gone.
    ClientGone,
}

/// What something on the side has found out.
enum Side {
    Nothing,
    Stop(Stop),
}

/// A piece that is known to have been sent and has not come.
#[derive(Debug, Clone, Copy)]
struct Missing {
    seq: u32,
    since: Instant,
}

/// A body that goes on to the agent while its public client sends it.
struct Streaming<'a> {
    link: &'a AgentLink,
    connection: ConnectionId,
    request_id: &'a RequestId,
    codec: Option<Codec>,
    /// How many pieces may be under way beyond those that were taken.
    window: u32,
    uploaded_at: Rc<Cell<Option<Instant>>>,
}

impl Streaming<'_> {
    /// Sends pieces as long as somebody holds the other end of `taken`: the number of the last piece that the agent has
    /// taken.
    async fn run(self, upload: Upload, mut taken: watch::Receiver<u32>) -> Side {
        let mut source = Source { pieces: upload.pieces, waiting: BytesMut::new(), ended: false };
        let mut posts = FuturesUnordered::new();
        let mut seq = 0;
        let mut sent_last = false;
        loop {
            if sent_last && posts.is_empty() {
                return Side::Nothing;
            }
            let has_credit = seq < taken.borrow_and_update().saturating_add(self.window);
            let may_send = !sent_last && has_credit && posts.len() < limits::UPLOAD_PARALLEL;
            tokio::select! {
                biased;
                changed = taken.changed() => if changed.is_err() {
                    return Side::Nothing;
                },
                Some(posted) = posts.next() => match posted {
                    Ok(Posted::Accepted) => self.uploaded_at.set(Some(Instant::now())),
                    Ok(Posted::Gone) => return agent_lost().await,
                    Err(error) => {
                        tracing::warn!(request_id = %self.request_id, %error, "request body could not be sent on");
                        return Side::Stop(Stop::Broken(ErrorCode::EdgeBusy));
                    }
                },
                piece = source.next(), if may_send => match piece {
                    Ok((bytes, end)) => {
                        seq += 1;
                        sent_last = end;
                        posts.push(self.post(seq, bytes, end));
                    }
                    Err(code) => return Side::Stop(Stop::Broken(code)),
                },
            }
        }
    }

    async fn post(&self, seq: u32, bytes: Bytes, end: bool) -> Result<Posted, Error> {
        let (body, _) = Body::encode_front(&bytes, self.codec);
        let chunk = RequestChunk { request_id: self.request_id.clone(), seq, body, end };
        self.link.post_text(&self.connection, chunk.encode()).await
    }
}

/// What a public client sends, in pieces of the link.
struct Source {
    pieces: LocalBoxStream<'static, Result<Bytes, ErrorCode>>,
    waiting: BytesMut,
    ended: bool,
}

impl Source {
    /// The next piece, and whether it is the last: as long as may be of what is there.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn next(&mut self) -> Result<(Bytes, bool), ErrorCode> {
        while !self.ended && self.waiting.len() < limits::CHUNK_BYTES {
            let more = if self.waiting.is_empty() {
                self.pieces.next().await
            } else {
                let Some(more) = self.pieces.next().now_or_never() else { break };
                more
            };
            match more {
                Some(bytes) => self.waiting.extend_from_slice(&bytes?),
                None => self.ended = true,
            }
        }
        let bytes = self.waiting.split_to(self.waiting.len().min(limits::CHUNK_BYTES)).freeze();
        Ok((bytes, self.ended && self.waiting.is_empty()))
    }
}

type Receiving<'a> = LocalBoxFuture<'a, Result<Vec<Letter>, Error>>;

struct Exchange<'a, M> {
    services: &'a Services,
    mail: &'a M,
    request_id: &'a RequestId,
    request: &'a PublicRequest,
    connection: ConnectionId,
    token: &'a str,
    record: &'a Record,
    parts: Reassembler<Part>,
    /// The number of the last piece, once that has arrived; earlier ones may still be missing.
    last: Option<u32>,
    uploading: bool,
    /// What a streamed upload goes by, while there is one.
    flow: Option<watch::Sender<u32>>,
    /// Such an upload, where its tunnel keeps what an agent was lost with.
    copied: Option<Rc<Copied>>,
    /// When a piece of such an upload was sent on last.
    uploaded_at: Rc<Cell<Option<Instant>>>,
    /// When the agent was heard last, or asked.
    news_at: Instant,
    /// How many pieces the agent says it has sent.
    sent: u32,
    /// The first piece that is late or lost.
    missing: Option<Missing>,
    /// Deletes, credit, cancel, upload: whatever goes on beside the stream.
    side: FuturesUnordered<LocalBoxFuture<'a, Side>>,
}

impl<'a, M: Mail> Exchange<'a, M> {
    fn new(
        services: &'a Services,
        mail: &'a M,
        request_id: &'a RequestId,
        request: &'a PublicRequest,
        connection: ConnectionId,
        token: &'a str,
        record: &'a Record,
    ) -> Self {
        Self {
            services,
            mail,
            request_id,
            request,
            connection,
            token,
            record,
            // The head and a window of chunks after the last one that credit was returned for.
            parts: Reassembler::new(0, limits::CHUNK_WINDOW + limits::CREDIT_EVERY + 2),
            last: None,
            uploading: false,
            flow: None,
            copied: None,
            uploaded_at: Rc::default(),
            news_at: Instant::now(),
            sent: 0,
            missing: None,
            side: FuturesUnordered::new(),
        }
    }

    async fn run<P: PublicSide>(
        mut self,
        first: Vec<Letter>,
        mut answering: Answering<'_, P>,
        reply_by: Instant,
        ends_at: Instant,
    ) {
        let record = answering.record;
        let mut receiving: Option<Receiving<'a>> = None;
        let mut stop = self.take(first).err();

        // Until the head.
        let head = loop {
            if let Some(stop) = stop {
                break Err(stop);
            }
            match self.parts.pop() {
                Some((_, Part::Head(reply, body))) => break Ok((reply, body)),
                Some((_, Part::Failed(code))) => {
                    break Err(Stop::Broken(code));
                }
                // The reassembler counts from the head, so nothing else can be first.
                Some((_, Part::Data { .. })) => break Err(Stop::Broken(ErrorCode::AgentInvalid)),
                None => {}
            }
            self.receive(&mut receiving);
            let wake_at = self.wake_at();
            let due = self.answer_due(reply_by, ends_at);
            tokio::select! {
                Some(letters) = OptionFuture::from(receiving.as_mut()) => {
                    receiving = None;
                    stop = self.took(letters).err();
                }
                Some(side) = self.side.next() => stop = self.found(side),
                Some(()) = OptionFuture::from(wake_at.map(tokio::time::sleep_until)) => stop = self.wake().err(),
                () = answering.public.gone() => stop = Some(Stop::ClientGone),
                () = tokio::time::sleep_until(due) => {
                    // It may have been put off meanwhile.
                    if self.answer_due(reply_by, ends_at) > due {
                        continue;
                    }
                    stop = Some(Stop::Broken(ErrorCode::UpstreamTimedOut));
                }
            }
        };
        let (mut reply, body) = match head {
            Ok(head) => head,
            Err(stop @ Stop::AgentLost) => {
                let (services, request) = (self.services, self.request);
                // What nobody has asked for yet, or a copy of what was passed on.
                let body = answering.begun(request).or_else(|| self.copied.as_ref()?.take_back());
                let is_passed_on = body.is_none() && self.flow.is_some();
                let finish = pin!(self.finish(stop, receiving));
                tokio::join!(Box::pin(answering.lost(services, request, body, is_passed_on)), finish);
                return;
            }
            Err(stop) => {
                let code = match stop {
                    Stop::Broken(code) => code,
                    Stop::AgentLost => ErrorCode::AgentLost,
                    // Nobody will read it, but Lambda wants an answer to every event.
                    Stop::ClientGone => ErrorCode::Cancelled,
                };
                let finish = pin!(self.finish(stop, receiving));
                tokio::join!(answering.fail(code), finish);
                if stop == Stop::ClientGone {
                    record.outcome.set(outcome::CLIENT_GONE);
                }
                return;
            }
        };

        // Begun, an answer is not kept any more.
        if let Some(copied) = self.copied.take() {
            copied.let_go();
        }
        answer::finish(
            &mut reply.headers,
            self.request_id,
            self.request.prefix.as_deref(),
            &self.request.host,
        );
        let head = Head { status: reply.status, headers: reply.headers };
        let pieces = answering.begin(head, body.unwrap_or_default());
        if reply.end {
            // Sent while messages are being deleted, where there are enough of them.
            let end = async { drop(pieces.send(Piece::End).await) };
            let settle = pin!(self.settle());
            tokio::join!(end, settle);
            return;
        }

        // At most one part, and its end.
        let mut next: VecDeque<(u32, Piece)> = VecDeque::new();
        let mut credited = 0;
        let stop = loop {
            while next.is_empty()
                && let Some((seq, part)) = self.parts.pop()
            {
                match part {
                    Part::Data { bytes, end } => {
                        if !bytes.is_empty() {
                            next.push_back((seq, Piece::Data(bytes.into())));
                        }
                        if end {
                            next.push_back((seq, Piece::End));
                        }
                    }
                    Part::Failed(_) | Part::Head(..) => next.push_back((seq, Piece::Broken)),
                }
            }
            self.receive(&mut receiving);
            let wake_at = self.wake_at();
            tokio::select! {
                Some(permit) = OptionFuture::from((!next.is_empty()).then(|| pieces.reserve())) => {
                    let Ok(permit) = permit else { break Stop::ClientGone };
                    let Some((seq, piece)) = next.pop_front() else { continue };
                    let last = !matches!(piece, Piece::Data(_));
                    if matches!(piece, Piece::Broken) {
                        record.outcome.set(outcome::BROKEN);
                    }
                    permit.send(piece);
                    if last {
                        drop(receiving);
                        self.settle().await;
                        return;
                    }
                    if seq - credited >= limits::CREDIT_EVERY && self.last.is_none() {
                        credited = seq;
                        self.post(EdgeMessage::Credit(Credit { request_id: self.request_id.clone(), through: seq }));
                    }
                }
                Some(letters) = OptionFuture::from(receiving.as_mut()) => {
                    receiving = None;
                    if let Err(stop) = self.took(letters) {
                        break stop;
                    }
                }
                Some(side) = self.side.next() => if let Some(stop) = self.found(side) {
                    break stop;
                },
                Some(()) = OptionFuture::from(wake_at.map(tokio::time::sleep_until)) => {
                    if let Err(stop) = self.wake() {
                        break stop;
                    }
                }
                () = pieces.closed() => break Stop::ClientGone,
                () = tokio::time::sleep_until(ends_at) => break Stop::Broken(ErrorCode::UpstreamTimedOut),
            }
        };
        tracing::info!(request_id = %self.request_id, tunnel_id = %self.request.tunnel, reason = ?stop, "response was broken off");
        record.outcome.set(if stop == Stop::ClientGone { outcome::CLIENT_GONE } else { outcome::BROKEN });
        let broken = async {
            if stop != Stop::ClientGone {
                drop(pieces.send(Piece::Broken).await);
            }
            // Closes the answer's body either way.
            drop(pieces);
        };
        let finish = pin!(self.finish(stop, receiving));
        tokio::join!(broken, finish);
    }

    /// Whether every piece has arrived, in whatever order.
    fn is_complete(&self) -> bool {
        self.last.is_some_and(|last| {
            u64::from(self.parts.next_seq()) + self.parts.waiting() as u64 > u64::from(last)
        })
    }

    /// Begins a receive if one is wanted and none is under way.
    fn receive(&self, receiving: &mut Option<Receiving<'a>>) {
        if receiving.is_none() && !self.is_complete() {
            *receiving = Some(Box::pin(self.mail.receive(limits::MAILBOX_WAIT)));
        }
    }

    /// When [`Self::wake`] is due; `None` once every piece is here.
    fn wake_at(&self) -> Option<Instant> {
        if self.is_complete() {
            return None;
        }
        let probe_at = self.news_at + limits::PROBE_AFTER;
        let lost_at = self.missing.map(|missing| missing.since + limits::PIECE_MISSING);
        Some(lost_at.map_or(probe_at, |lost_at| lost_at.min(probe_at)))
    }

    /// Gives up a piece that has been missing too long, and asks an agent that was silent too long.
    ///
    /// The question also finds out whether the connection is still there: the news of its end may have been
    /// lost itself.
    fn wake(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        if let Some(Missing { seq, since }) = self.missing
            && now >= since + limits::PIECE_MISSING
        {
            self.record.lay(now - since);
            tracing::error!(request_id = %self.request_id, chunk_index = seq, "a piece of the response was lost");
            return Err(Stop::Broken(ErrorCode::EdgeFailed));
        }
        if now >= self.news_at + limits::PROBE_AFTER {
            self.news_at = now;
            let (request_id, token) = (self.request_id.clone(), self.token.to_owned().into());
            self.post(EdgeMessage::Probe(Probe { request_id, token }));
        }
        Ok(())
    }

    /// Notes which piece is missing, now that something has come.
    fn look_for_gaps(&mut self) {
        let (seq, later_came) = self.parts.first_missing();
        let was_sent = later_came || seq < self.sent;
        self.missing = match self.missing {
            _ if !was_sent || self.is_complete() => None,
            Some(missing) if missing.seq == seq => Some(missing),
            _ => Some(Missing { seq, since: Instant::now() }),
        };
    }

    /// What something on the side means for the response.
    fn found(&self, side: Side) -> Option<Stop> {
        match side {
            // Nothing more is needed of a connection that has delivered everything.
            Side::Stop(Stop::AgentLost) if self.is_complete() => None,
            Side::Stop(stop) => Some(stop),
            Side::Nothing => None,
        }
    }

    fn took(&mut self, letters: Result<Vec<Letter>, Error>) -> Result<(), Stop> {
        match letters {
            Ok(letters) => self.take(letters),
            Err(error) => {
                tracing::error!(request_id = %self.request_id, %error, "mailbox could not be read");
                Err(Stop::Broken(ErrorCode::EdgeFailed))
            }
        }
    }

    /// Sorts what came out of the mailbox and has it deleted there.
    fn take(&mut self, letters: Vec<Letter>) -> Result<(), Stop> {
        let mut receipts = Vec::with_capacity(letters.len());
        let mut stop = None;
        for letter in letters {
            receipts.push(letter.receipt);
            // Only the connection that the request was dispatched to may answer it, whoever else knows
            // its token.
            let is_ours = letter.request_id.as_deref() == Some(self.request_id.as_str())
                && letter.connection_id.is_none_or(|sender| sender == self.connection.as_str());
            if is_ours {
                self.record.taken(letter.sent_ms);
                self.news_at = Instant::now();
                if let Err(reason) = self.take_message(&letter.body) {
                    stop.get_or_insert(reason);
                }
            } else if letter.lost_connection.as_deref() == Some(self.connection.as_str())
                && !self.is_complete()
            {
                stop.get_or_insert(Stop::AgentLost);
            }
            // Anything else is stale: from a request that is over.
        }
        self.look_for_gaps();
        if let Some(receipts) = self.mail.discard(receipts) {
            let mail = self.mail;
            self.side.push(
                async move {
                    mail.delete(receipts).await;
                    Side::Nothing
                }
                .boxed_local(),
            );
        }
        stop.map_or(Ok(()), Err)
    }

    fn take_message(&mut self, text: &str) -> Result<(), Stop> {
        if text == notice::CLIENT_GONE {
            return Err(Stop::ClientGone);
        }
        let invalid = |why: &dyn std::fmt::Display| {
            tracing::warn!(request_id = %self.request_id, %why, "agent's answer is invalid");
            Stop::Broken(ErrorCode::AgentInvalid)
        };
        let message = AgentMessage::decode(text).map_err(|error| invalid(&error))?;
        let decode = |body: Option<Body<'_>>| body.map(Body::decode).transpose();
        let (seq, part, is_last) = match message {
            AgentMessage::Reply(reply) => {
                let Reply { token: _, status, headers, body, end } = reply;
                let body = decode(body).map_err(|error| invalid(&error))?;
                (0, Part::Head(Reply { token: "".into(), status, headers, body: None, end }, body), end)
            }
            AgentMessage::Chunk(chunk) => {
                let bytes = decode(chunk.body).map_err(|error| invalid(&error))?.unwrap_or_default();
                (chunk.seq, Part::Data { bytes, end: chunk.end }, chunk.end)
            }
            AgentMessage::Failed(failed) => (failed.seq, Part::Failed(failed.code), true),
            AgentMessage::Continue(asked) => {
                let compress = asked.codecs.has(Codec::Zstd);
                self.upload(compress, asked.window);
                return Ok(());
            }
            AgentMessage::Progress(progress) => {
                let sent = if progress.ended { u32::MAX } else { progress.sent };
                self.sent = self.sent.max(sent);
                if let Some(flow) = &self.flow {
                    flow.send_if_modified(|taken| {
                        let is_news = progress.taken > *taken;
                        *taken = progress.taken.max(*taken);
                        is_news
                    });
                }
                return Ok(());
            }
            AgentMessage::Hello(_)
            | AgentMessage::Heartbeat(_)
            | AgentMessage::Accepted(_)
            | AgentMessage::Frames(_)
            | AgentMessage::Deliveries(_) => {
                return Err(invalid(&"it is not an answer"));
            }
        };
        match self.parts.push(seq, part) {
            // Only what was taken can end anything: whoever runs ahead is still to be cancelled, and a
            // number that was used before must not end the receiving.
            Ok(chunk::Accepted::New) => {
                if is_last {
                    self.last = Some(seq);
                }
                Ok(())
            }
            Ok(chunk::Accepted::Duplicate) => Ok(()),
            Err(error) => Err(invalid(&error)),
        }
    }

    /// Sends the announced body, once, several messages at a time; the agent puts them in order.
    fn upload(&mut self, compress: bool, window: Option<u32>) {
        if std::mem::replace(&mut self.uploading, true) {
            return;
        }
        let upload = self.request.upload.take();
        if upload.is_none() && self.request.body.is_empty() {
            return;
        }
        let text = |name| self.request.headers.get(name).map(value_to_text);
        let compressible =
            is_compressible(text("content-type").as_deref(), text("content-encoding").as_deref());
        let codec = (compress && compressible).then_some(Codec::Zstd);
        let (link, connection, request_id) = (&self.services.link, self.connection.clone(), self.request_id);
        if let Some(upload) = upload {
            let (flow, taken) = watch::channel(0);
            self.flow = Some(flow);
            let window = window.unwrap_or(u32::MAX);
            let uploading = Streaming {
                link,
                connection,
                request_id,
                codec,
                window,
                uploaded_at: Rc::clone(&self.uploaded_at),
            };
            self.side.push(uploading.run(upload, taken).boxed_local());
            return;
        }
        let mut rest = &self.request.body[..];
        let mut seq = 0;
        let chunks = std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (body, taken) = Body::encode_front(rest, codec);
            rest = &rest[taken..];
            seq += 1;
            Some(RequestChunk { request_id: request_id.clone(), seq, body, end: rest.is_empty() }.encode())
        });
        let upload = async move {
            let mut posts = stream::iter(chunks)
                .map(|chunk| {
                    let connection = &connection;
                    async move { link.post_text(connection, chunk).await }
                })
                .buffer_unordered(limits::UPLOAD_PARALLEL);
            while let Some(posted) = posts.next().await {
                match posted {
                    Ok(Posted::Accepted) => {}
                    Ok(Posted::Gone) => return agent_lost().await,
                    Err(error) => {
                        tracing::warn!(%request_id, %error, "request body could not be sent on");
                        return Side::Stop(Stop::Broken(ErrorCode::EdgeBusy));
                    }
                }
            }
            Side::Nothing
        };
        self.side.push(upload.boxed_local());
    }

    /// Sends a message whose loss is noticed by other means.
    fn post(&self, message: EdgeMessage<'static>) {
        let (link, connection, request_id) = (&self.services.link, self.connection.clone(), self.request_id);
        self.side.push(
            async move {
                match link.post(&connection, &message).await {
                    Ok(Posted::Accepted) => Side::Nothing,
                    Ok(Posted::Gone) => agent_lost().await,
                    Err(error) => {
                        tracing::warn!(%request_id, %error, "agent was not told");
                        Side::Nothing
                    }
                }
            }
            .boxed_local(),
        );
    }

    /// When the answer has to begin: whoever is still being told the request has no time yet to answer it.
    fn answer_due(&self, reply_by: Instant, ends_at: Instant) -> Instant {
        let told_at = self.uploaded_at.get().map(|at| at + self.services.config.reply_timeout);
        told_at.map_or(reply_by, |at| at.max(reply_by).min(ends_at))
    }

    /// Awaits everything on the side. What the client still sends is not wanted any more.
    async fn settle(mut self) {
        self.flow = None;
        while self.side.next().await.is_some() {}
    }

    async fn finish(self, stop: Stop, receiving: Option<Receiving<'a>>) {
        match stop {
            // The agent's own last word: there is nothing to cancel.
            _ if self.last.is_some() && receiving.is_none() => self.settle().await,
            Stop::Broken(_) | Stop::ClientGone => self.give_up(receiving).await,
            Stop::AgentLost => {
                // Nobody is left to cancel, but the receive under way must not outlive this request.
                let last = async {
                    if let Some(receiving) = receiving {
                        drop(receiving.await);
                    }
                };
                tokio::join!(last, self.settle());
            }
        }
    }

    /// Awaits a receive while everything on the side goes on: what ends the receive early is the
    /// agent's answer to a message that may still have to be sent.
    async fn await_beside(&mut self, mut receiving: Receiving<'a>) -> Result<Vec<Letter>, Error> {
        loop {
            tokio::select! {
                letters = &mut receiving => return letters,
                Some(_) = self.side.next() => {}
            }
        }
    }

    /// Tells the agent to stop and receives until it has, so that the mailbox is clean.
    async fn give_up(mut self, mut receiving: Option<Receiving<'a>>) {
        self.flow = None;
        self.post(EdgeMessage::Cancel(Cancel { request_id: self.request_id.clone() }));
        let mut quiet = false;
        while self.last.is_none() && !quiet {
            let next = receiving.take().unwrap_or_else(|| Box::pin(self.mail.receive(LAST_WORD_WAIT)));
            match self.await_beside(next).await {
                Ok(letters) => {
                    quiet = letters.is_empty();
                    // Whatever it says, it is only to be seen and deleted.
                    let _ = self.take(letters);
                }
                Err(_) => quiet = true,
            }
        }
        if let Some(receiving) = receiving {
            drop(self.await_beside(receiving).await);
        }
        self.settle().await;
    }
}
