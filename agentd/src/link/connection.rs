//! One connection to the edge from its `hello` to its end: the loop that owns the session, the link
//! and every exchange on it.
//!
//! Enters: what the edge sends, commands of the supervisor. Leaves: [`Report`]s to the supervisor. When the loop
//! ends, every exchange that still runs on it ends with it, and so does its call to the upstream.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::StreamExt as _;
use http::Method;
use proto::{
    body::Codecs,
    error::ErrorCode,
    id::RequestId,
    limits,
    message::{
        AgentMessage, DecodeError, EdgeFrames, EdgeMessage, Envelope, Failed, Probe, Progress, Request,
        RequestChunk, Welcome,
    },
    session::{Config as SessionConfig, Dead, Event, Rhythm, Session},
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

use crate::{
    link::deliveries::{Question, Unanswered},
    link::websocket::{Incoming, Link, LinkError},
    report::access::AccessLog,
    serve::exchange::{Exchange, Job, JobBody},
    serve::outbox::Outbox,
    serve::pace::Tally,
    serve::sockets::{SocketEvent, Sockets},
    serve::tunnel::Tunnels,
    serve::upload::{self, Upload, UploadError},
    timer::Alarm,
};

/// How long the edge may take to answer a goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How many finished requests are remembered, so that one that is delivered twice is not served
/// twice.
const REMEMBERED_REQUESTS: usize = 1024;

/// How many pieces that came before their request are kept, of one message each at the most.
const EARLY_PIECES: usize = 8;

/// The name of one connection within this process.
pub(crate) use crate::serve::sockets::Serial;

/// What all connections of a process share.
pub(crate) struct Shared {
    pub(crate) tunnels: Arc<Tunnels>,
    pub(crate) access: AccessLog,
    pub(crate) seen: Mutex<Seen>,
    pub(crate) sockets: Arc<Sockets>,
}

/// The requests that arrived last.
#[derive(Default)]
pub(crate) struct Seen {
    order: VecDeque<RequestId>,
    ids: HashSet<RequestId>,
}

impl Seen {
    /// Notes a request; false if it was noted before.
    fn insert(&mut self, id: &RequestId) -> bool {
        if !self.ids.insert(id.clone()) {
            return false;
        }
        self.order.push_back(id.clone());
        if self.order.len() > REMEMBERED_REQUESTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

/// Pieces of bodies that came before their requests. The edge may post a piece as soon as the request's message was taken, and
/// nothing promises that the two come in that order.
#[derive(Debug, Default)]
struct Early(VecDeque<RequestChunk<'static>>);

impl Early {
    /// Keeps a piece; the oldest go.
    fn keep(&mut self, piece: RequestChunk<'_>) {
        let RequestChunk { request_id, seq, body, end } = piece;
        if self.0.len() == EARLY_PIECES {
            self.0.pop_front();
        }
        self.0.push_back(RequestChunk { request_id, seq, body: body.into_owned(), end });
    }

    /// Those of a request, in the order in which they came.
    fn take(&mut self, request_id: &RequestId) -> VecDeque<RequestChunk<'static>> {
        let (own, others) = self.0.drain(..).partition(|piece| piece.request_id == *request_id);
        self.0 = others;
        own
    }
}

/// What the supervisor may ask of a connection.
#[derive(Debug)]
pub(crate) enum Command {
    /// Say `hello` again: some tunnels were not opened yet, or others are to be served.
    Greet,
    /// Serve no new request, finish those in flight, then close. `quiet` is how long to wait for
    /// requests that were dispatched just before.
    Retire { quiet: Duration },
    /// Answer with [`Report::Alive`]: the loop still turns.
    Prove,
    /// Ask the edge about deliveries.
    Ask(Question),
}

/// What the supervisor must know.
#[derive(Debug)]
pub(crate) enum Report {
    /// The edge answered `hello`.
    Welcomed(Box<Welcome>),
    /// How the link is watched while nothing goes on.
    Rhythm(Rhythm),
    /// The connection should be replaced.
    Replace,
    /// The loop that notices a dead link turns, as [`Command::Prove`] asks.
    Alive,
    /// The connection has ended.
    Ended(End),
}

impl End {
    /// A word for the metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Retired => "retired",
            Self::Dead(Dead::NoWelcome) => "no_welcome",
            Self::Dead(Dead::NoHeartbeat) => "no_heartbeat",
            Self::Link(error) => error.reason(),
        }
    }
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("retired and closed")]
    Retired,
    #[error(transparent)]
    Dead(#[from] Dead),
    #[error(transparent)]
    Link(#[from] LinkError),
}

struct Running {
    token: Box<str>,
    abort: AbortHandle,
    tally: Arc<Tally>,
    upload: Option<Upload>,
}

struct Connection {
    serial: Serial,
    shared: Arc<Shared>,
    session: Session,
    outbox: Outbox,
    codecs: Codecs,
    /// What is under way, last words that wait for their turn included.
    exchanges: JoinSet<()>,
    running: HashMap<RequestId, Running>,
    early: Early,
    by_task: HashMap<tokio::task::Id, RequestId>,
    retirement: Option<Retirement>,
    unanswered: Unanswered,
    /// When what was sent last is sent again, because the edge could not take some of it; and how long after that it is
    /// the next time.
    again_at: Option<Instant>,
    again_in: Duration,
    was_again_at: Option<Instant>,
}

/// The way out of service.
struct Retirement {
    quiet: Duration,
    /// Set when the edge has confirmed that it dispatches nothing here any more.
    confirmed: bool,
    /// When requests dispatched just before have had time to arrive.
    quiet_until: Instant,
    deadline: Instant,
}

/// Runs a connection that has just been opened. Returns after its last report.
pub(crate) async fn run(
    serial: Serial,
    link: Link,
    shared: Arc<Shared>,
    session: SessionConfig,
    mut commands: mpsc::Receiver<Command>,
    reports: mpsc::Sender<(Serial, Report)>,
) {
    let Link { mut incoming, outbox, mut writer } = link;
    let mut connection = Connection {
        session: Session::new(session, shared.tunnels.service(), Instant::now().into_std()),
        serial,
        shared,
        outbox,
        codecs: Codecs::default(),
        exchanges: JoinSet::new(),
        running: HashMap::new(),
        early: Early::default(),
        by_task: HashMap::new(),
        retirement: None,
        unanswered: Unanswered::default(),
        again_at: None,
        again_in: limits::REFUSED_RETRY,
        was_again_at: None,
    };
    let mut alarm = Alarm::new();
    let end = loop {
        while let Some(message) = connection.session.poll_transmit() {
            // A full queue means that nothing is written; the write deadline will say so.
            let _ = connection.outbox.send_control(message.encode());
        }
        if connection.session.poll_ping() {
            connection.outbox.send_ping();
        }
        let mut dead = None;
        while let Some(event) = connection.session.poll_event() {
            match event {
                Event::Welcomed(welcome) => {
                    connection.welcomed(&welcome);
                    let _ = reports.send((serial, Report::Welcomed(welcome))).await;
                }
                Event::Replace => {
                    let _ = reports.send((serial, Report::Replace)).await;
                }
                Event::Dead(reason) => dead = Some(reason),
                Event::Rhythm(rhythm) => {
                    tracing::debug!(?rhythm, "how the link is watched while nothing goes on");
                    let _ = reports.send((serial, Report::Rhythm(rhythm))).await;
                }
            }
        }
        if let Some(reason) = dead {
            break End::Dead(reason);
        }
        if connection.is_drained() {
            connection.outbox.close(CloseCode::Normal, "retired");
            say_goodbye(&mut incoming, &mut writer).await;
            break End::Retired;
        }
        alarm.set(connection.wake_at());
        tokio::select! {
            message = incoming.next() => match message {
                Some(Ok(message)) => if let Err(error) = connection.handle(message) {
                    break error.into();
                },
                Some(Err(error)) => break LinkError::from(error).into(),
                None => break LinkError::Eof.into(),
            },
            Some(done) = connection.exchanges.join_next_with_id() => {
                connection.ended(done);
                // Those that have ended meanwhile need no round of their own.
                while let Some(done) = connection.exchanges.try_join_next_with_id() {
                    connection.ended(done);
                }
            }
            command = commands.recv() => match command {
                Some(Command::Greet) => connection.greet(),
                Some(Command::Retire { quiet }) => connection.retire(quiet),
                Some(Command::Ask(question)) => connection.unanswered.ask(question, &connection.outbox),
                Some(Command::Prove) => {
                    let _ = reports.send((serial, Report::Alive)).await;
                }
                // The supervisor has gone, and nobody is left to serve for.
                None => break End::Retired,
            },
            written = &mut writer => break match written {
                Ok(Err(error)) => error.into(),
                Ok(Ok(())) | Err(_) => LinkError::Eof.into(),
            },
            // Looked at above: whether this connection is still needed.
            () = connection.shared.sockets.left(), if connection.retirement.is_some() => {}
            () = alarm.due() => connection.woken(),
        }
    };
    if let End::Link(LinkError::Binary | LinkError::Closed { .. }) = &end {
        // The next connection does not wait for the manners of this one.
        connection.outbox.close(CloseCode::Unsupported, "text only");
        tokio::spawn(async move {
            say_goodbye(&mut incoming, &mut writer).await;
            writer.abort();
        });
    } else {
        writer.abort();
    }
    connection.shared.sockets.link_down(serial);
    drop(connection);
    let _ = reports.send((serial, Report::Ended(end))).await;
}

/// Waits until the goodbye is written and answered, but not for long.
async fn say_goodbye(incoming: &mut Incoming, writer: &mut tokio::task::JoinHandle<Result<(), LinkError>>) {
    let _ = timeout(CLOSE_TIMEOUT, async {
        let _ = writer.await;
        while let Some(Ok(_)) = incoming.next().await {}
    })
    .await;
}

impl Connection {
    fn wake_at(&self) -> Option<Instant> {
        let session = self.session.poll_timeout().map(Instant::from_std);
        let retirement = self.retirement.as_ref().map(|retirement| {
            if retirement.confirmed && self.is_quiet() {
                retirement.quiet_until.min(retirement.deadline)
            } else {
                retirement.deadline
            }
        });
        session.into_iter().chain(retirement).chain(self.again_at).min()
    }

    /// Plans to send again what was sent last: what was refused together is sent together, and said once.
    fn ask_again(&mut self) {
        let now = Instant::now();
        if self.again_at.is_some() {
            return;
        }
        let is_first =
            self.was_again_at.is_none_or(|at| now.saturating_duration_since(at) > limits::REFUSED_WITHIN);
        self.again_in =
            if is_first { limits::REFUSED_RETRY } else { (self.again_in * 2).min(limits::REFUSED_RETRY * 4) };
        self.again_at = Some(now + self.again_in);
        let in_ms = self.again_in.as_millis() as u64;
        tracing::warn!(in_ms, "the edge could not take a message: the last ones are to be sent again");
    }

    fn woken(&mut self) {
        let now = Instant::now();
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            self.was_again_at = Some(now);
            self.outbox.send_again();
        }
        let busy = !self.is_quiet();
        self.session.handle_timeout(now.into_std(), busy);
    }

    /// Whether the connection has nothing left to do.
    fn is_drained(&self) -> bool {
        let now = Instant::now();
        self.retirement.as_ref().is_some_and(|retirement| {
            now >= retirement.deadline
                || (retirement.confirmed && self.is_quiet() && now >= retirement.quiet_until)
        })
    }

    /// Whether nothing goes on here.
    fn is_quiet(&self) -> bool {
        self.exchanges.is_empty() && self.shared.sockets.count_on(self.serial) == 0
    }

    /// Says which tunnels are served from now on.
    fn greet(&mut self) {
        // One that is on its way out of service serves none.
        if self.retirement.is_none() {
            self.session.serve(self.shared.tunnels.service(), Instant::now().into_std());
        }
    }

    fn retire(&mut self, quiet: Duration) {
        let now = Instant::now();
        if let Some(retirement) = &mut self.retirement {
            // The second time only shortens the wait.
            retirement.quiet = quiet.min(retirement.quiet);
            retirement.quiet_until = retirement.quiet_until.min(now + quiet);
            return;
        }
        self.retirement = Some(Retirement {
            quiet,
            confirmed: false,
            quiet_until: now + quiet,
            deadline: now + limits::RESPONSE_DURATION,
        });
        self.session.retire(now.into_std());
        self.shared.sockets.link_leaving(self.serial);
    }

    fn welcomed(&mut self, welcome: &Welcome) {
        self.codecs = welcome.codecs.clone();
        if self.retirement.is_none() {
            self.shared.sockets.link_up(self.serial, &self.outbox);
        }
        if let Some(retirement) = &mut self.retirement {
            retirement.confirmed = true;
            retirement.quiet_until = Instant::now() + retirement.quiet;
        }
    }

    fn ended(&mut self, done: Result<(tokio::task::Id, ()), tokio::task::JoinError>) {
        let (id, unsaid) = match done {
            Ok((id, ())) => (id, None),
            Err(error) if error.is_panic() => {
                tracing::error!("an exchange ended by a defect in this program");
                (error.id(), Some(ErrorCode::AgentInvalid))
            }
            Err(error) => (error.id(), Some(ErrorCode::Cancelled)),
        };
        let running = self.by_task.remove(&id).and_then(|request_id| self.running.remove(&request_id));
        // The edge receives until it has heard the last word, so it is said for those that cannot any more.
        if let (Some(Running { token, tally, .. }), Some(code)) = (running, unsaid) {
            let seq = tally.sent();
            let failed = AgentMessage::Failed(Failed { token: (&*token).into(), seq, code }).encode();
            let outbox = self.outbox.clone();
            // It waits its turn as the exchange would have, so that none is lost when a crowd is cancelled at once.
            self.exchanges.spawn(async move { _ = outbox.send(failed.into_bytes(), None).await });
        }
    }

    fn handle(&mut self, message: Message) -> Result<(), LinkError> {
        let now = Instant::now().into_std();
        match message {
            Message::Text(text) => self.handle_text(&text),
            Message::Ping(_) => self.session.handle_ping(now),
            Message::Pong(_) => self.session.handle_pong(now),
            Message::Binary(_) => return Err(LinkError::Binary),
            Message::Close(frame) => return Err(LinkError::from_close(frame.as_ref())),
            Message::Frame(_) => {}
        }
        Ok(())
    }

    fn handle_text(&mut self, text: &str) {
        let now = Instant::now().into_std();
        match EdgeMessage::decode(text) {
            Ok(EdgeMessage::Welcome(welcome)) => return self.session.handle_welcome(welcome, now),
            Ok(EdgeMessage::Drain(_)) => return self.session.handle_drain(now),
            Ok(EdgeMessage::Heartbeat(_)) => {}
            Ok(EdgeMessage::Request(request)) => self.start(request),
            Ok(EdgeMessage::RequestChunk(chunk)) => self.upload(chunk),
            Ok(EdgeMessage::Credit(credit)) => {
                if let Some(running) = self.running.get(&credit.request_id) {
                    running.tally.credit(credit.through);
                }
            }
            Ok(EdgeMessage::Frames(frames)) => self.frames(frames),
            Ok(EdgeMessage::Cancel(cancel)) => {
                self.shared.sockets.tell(&cancel.request_id, SocketEvent::Cancel);
                if let Some(running) = self.running.get(&cancel.request_id) {
                    running.abort.abort();
                }
            }
            Ok(EdgeMessage::Probe(probe)) => self.tell_progress(probe),
            Ok(EdgeMessage::Deliveries(told)) => self.unanswered.answer(told.seq, told.answer.into_owned()),
            Err(error) => self.refuse(text, &error),
        }
        self.session.handle_alive(now);
    }

    /// Hands on what is for a WebSocket. One that has ended takes nothing: the edge has been told.
    fn frames(&self, frames: EdgeFrames<'_>) {
        let request_id = frames.request_id.clone();
        let batch = frames.batch().into_owned();
        if !self.shared.sockets.tell(&request_id, SocketEvent::Batch(batch)) {
            tracing::debug!(%request_id, "frames came for no websocket");
        }
    }

    /// Says how far a response is. Behind its pieces, so that those it counts are not later than it.
    fn tell_progress(&self, probe: Probe<'_>) {
        let running = self.running.get(&probe.request_id);
        let progress = AgentMessage::Progress(Progress {
            token: probe.token,
            sent: running.map_or(0, |running| running.tally.sent()),
            ended: running.is_none(),
            taken: running.and_then(|running| running.upload.as_ref()).map_or(0, Upload::taken),
        });
        self.outbox.send_behind(progress.encode());
    }

    /// A message that cannot be read. A request among them is answered, so that nobody waits for it.
    fn refuse(&mut self, text: &str, error: &DecodeError) {
        if Envelope::is_failure(text) {
            self.session.handle_refused(Instant::now().into_std());
            self.ask_again();
            return;
        }
        tracing::warn!(%error, "a message of the edge was dropped");
        let Ok(Envelope { kind, token: Some(token) }) = Envelope::peek(text) else { return };
        if kind == "request" {
            let failed =
                AgentMessage::Failed(Failed { token: (&*token).into(), seq: 0, code: ErrorCode::BadRequest });
            let _ = self.outbox.send_word(failed.encode());
        }
    }

    fn start(&mut self, request: Request<'_>) {
        if let Some(retirement) = &mut self.retirement {
            retirement.quiet_until = Instant::now() + retirement.quiet;
        }
        let is_new =
            self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(&request.request_id);
        if !is_new {
            tracing::debug!(request_id = %request.request_id, "a request came twice");
            return;
        }
        let answer_with = |code| {
            let failed = AgentMessage::Failed(Failed { token: (&*request.token).into(), seq: 0, code });
            let _ = self.outbox.send_word(failed.encode());
        };
        let (body, upload) = match (request.body, request.announced) {
            (_, Some(announced)) if announced > limits::REQUEST_BODY_BYTES as u64 && !request.streamed => {
                return answer_with(ErrorCode::RequestTooLarge);
            }
            (_, Some(announced)) => {
                let (upload, mut body, progress) = upload::new(announced, request.streamed);
                // The pieces of a delivery follow at once.
                if request.delivery.is_some() {
                    match self.shared.tunnels.try_reserve_upload(announced) {
                        Some(room) => body.accept(room),
                        None => return answer_with(ErrorCode::AgentBusy),
                    }
                }
                (JobBody::Announced(body, progress), Some(upload))
            }
            (None, None) => (JobBody::Whole(bytes::Bytes::new()), None),
            (Some(body), None) => match body.decode() {
                Ok(bytes) => (JobBody::Whole(bytes.into()), None),
                Err(error) => {
                    tracing::warn!(request_id = %request.request_id, %error, "a request's body is broken");
                    return answer_with(ErrorCode::BadRequest);
                }
            },
        };
        let Ok(method) = Method::from_bytes(request.method.as_bytes()) else {
            return answer_with(ErrorCode::BadRequest);
        };
        let tally = Tally::new();
        let request_id = request.request_id;
        let token: Box<str> = (&*request.token).into();
        let exchange = Exchange {
            job: Job {
                request_id: request_id.clone(),
                token: token.clone(),
                tunnel: request.tunnel,
                method,
                target: request.target,
                headers: request.headers,
                body,
                timeout: Duration::from_millis(request.timeout_ms),
                upgrade: request.upgrade,
                delivery: request.delivery,
            },
            tunnels: Arc::clone(&self.shared.tunnels),
            outbox: self.outbox.clone(),
            codecs: self.codecs.clone(),
            tally: Arc::clone(&tally),
            access: self.shared.access.clone(),
            sockets: Arc::clone(&self.shared.sockets),
            serial: self.serial,
        };
        // Boxed, because a task moves its future several times before it has its place.
        let abort = self.exchanges.spawn(Box::pin(exchange.run()));
        self.by_task.insert(abort.id(), request_id.clone());
        let early = if self.early.0.is_empty() { VecDeque::new() } else { self.early.take(&request_id) };
        self.running.insert(request_id, Running { token, abort, tally, upload });
        for piece in early {
            self.upload(piece);
        }
    }

    fn upload(&mut self, chunk: RequestChunk<'_>) {
        let Some(running) = self.running.get(&chunk.request_id) else {
            let seen = self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
            // A piece for a request that has ended is late, not wrong.
            if !seen.ids.contains(&chunk.request_id) {
                self.early.keep(chunk);
            }
            return;
        };
        let Running { upload: Some(upload), .. } = running else { return };
        match chunk.body.decode() {
            Ok(bytes) => upload.push(chunk.seq, bytes, chunk.end),
            Err(error) => {
                tracing::warn!(request_id = %chunk.request_id, %error, "a piece of a request's body is broken");
                upload.fail(UploadError::Range);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_that_comes_before_its_request_waits_for_it() {
        let id = |n: u8| RequestId::from_random([n; 16]);
        let piece = |n, seq| RequestChunk {
            request_id: id(n),
            seq,
            body: proto::body::Body::encode(b"x"),
            end: false,
        };
        let mut early = Early::default();
        for (n, seq) in [(1, 2), (2, 1), (1, 1)] {
            early.keep(piece(n, seq));
        }
        assert_eq!(early.take(&id(1)).iter().map(|piece| piece.seq).collect::<Vec<_>>(), [2, 1]);
        assert!(early.take(&id(1)).is_empty());
        // As many as there is room for, and one more: the oldest goes.
        for seq in 1..=u32::try_from(EARLY_PIECES).unwrap() {
            early.keep(piece(3, seq));
        }
        assert!(early.take(&id(2)).is_empty());
        assert_eq!(early.take(&id(3)).len(), EARLY_PIECES);
    }

    #[test]
    fn a_request_is_remembered_for_a_while() {
        let id = |n: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            RequestId::from_random(bytes)
        };
        let mut seen = Seen::default();
        assert!(seen.insert(&id(0)));
        assert!(!seen.insert(&id(0)));
        for n in 1..=REMEMBERED_REQUESTS {
            assert!(seen.insert(&id(n)));
        }
        assert!(seen.insert(&id(0)), "forgotten by now");
        assert_eq!(seen.order.len(), seen.ids.len());
    }
}
