//! Lambda `deliver`: does what the run of a durable delivery asks for.
//!
//! The run has a pointer and never the request: what is delivered is read here, and goes to the agent and nowhere else.
//! Enters an event of the state machine, one of four:
//!
//! * `deliver`: the request is posted to an agent, with the run's task token in the token that the agent returns, and the run
//!   waits for `response` to bring it back; or the run is told what it has to wait for first, [`NO_AGENT`] or
//!   [`NOT_ITS_TURN`];
//! * `turn`: the run waits until the deliveries of its key that came before have ended;
//! * `settle`: the upstream has answered, and that is the end unless its status says otherwise. The delivery is over;
//! * `judge`: an attempt has ended otherwise. The delivery is tried again after a pause, or given up: then the run is told
//!   [`DEAD`], so that it ends as failed and may be redriven.
//!
//! Everything may be repeated: a run that does not know what became of a call makes it again.
//!
//! Permissions it needs: read and write the table of deliveries, read and delete rows of the connections table, post to
//! `@connections`, answer runs and ask whether there is one, send to the queue of dead letters.

use std::process::ExitCode;

use edge::{
    Error,
    agent_link::{AgentLink, Posted},
    aws::Aws,
    config::{ConfigError, Env, env},
    deliveries::{Deliveries, Kept, Lane, Noted},
    registry::Registry,
    unix_now, unix_now_ms,
};
use proto::{
    body::Body,
    calendar,
    delivery::{self, Attempt, DeliveryPolicy, Last, State},
    error::ErrorCode,
    forwarded,
    header::Headers,
    id::{ConnectionId, DeliveryId, RequestId, TunnelName},
    limits,
    message::{Cancel, EdgeMessage, Request, RequestChunk},
    target::Target,
    token::{DeliveryClaims, OwnerMark, TaskToken, TokenKeys},
};
use serde::{Deserialize, Serialize};

/// What a run is told whose delivery was given up.
pub const DEAD: &str = "DeliveryDead";

/// What a run is told where no agent is there, or its owner holds what comes. No attempt was begun.
pub const NO_AGENT: &str = "NoAgent";

/// What a run is told that has to wait until others of its key have ended. No attempt was begun.
pub const NOT_ITS_TURN: &str = "NotItsTurn";

/// What a run is told whose delivery has ended, or gone.
pub const OVER: &str = "DeliveryOver";

/// What a run is told where AWS failed before an attempt was begun.
pub const UNREADY: &str = "EdgeUnready";

/// What a run is told where no agent took the request: certainly none has it.
pub const NO_CONNECTION: &str = "NoConnection";

/// What a run is told where AWS throttled: certainly no agent has the request.
pub const EDGE_BUSY: &str = "EdgeBusy";

/// What a run is told where only a part of the request may have reached an agent.
pub const BROKEN: &str = "DeliveryBroken";

/// What a run is told whose tunnel has become somebody else's: what was kept for its former owner is nothing to them.
pub const NOT_THEIRS: &str = "TunnelTaken";

/// What a run judges by where its delivery was not made in time.
pub const EXPIRED: &str = "Expired";

/// How much longer than its upstream has the token of an attempt is valid, in seconds.
const TOKEN_GRACE_S: u64 = 60;

/// The longest pause after an attempt that was none, in seconds, at first. As long as none is made, pauses grow to a quarter
/// of the time that this has lasted, up to [`REFUSED_PAUSE_S`].
const BUSY_PAUSE_S: u64 = 4;

/// The longest pause while no attempt is made, in seconds. A run has at most 25,000 events (Step Functions Developer Guide,
/// "Quotas") and such an attempt takes some 15 of them: at this pause they last for the 14 days that a delivery may wait.
const REFUSED_PAUSE_S: u64 = 20 * 60;

/// Everything an event needs.
#[derive(Debug)]
pub struct Deliver {
    deliveries: Deliveries,
    registry: Registry,
    link: AgentLink,
    keys: TokenKeys,
}

/// What the run of a delivery asks for.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Event {
    /// To be told when it is its turn.
    Turn {
        /// The delivery.
        delivery: DeliveryId,
        /// Its tunnel.
        tunnel: TunnelName,
        /// What the run waits with.
        token: String,
    },
    /// To have the request posted.
    Deliver {
        /// The delivery.
        delivery: DeliveryId,
        /// Its tunnel.
        tunnel: TunnelName,
        /// What the run waits with.
        token: String,
        /// When it is too late for that, in milliseconds since 1970.
        deadline_ms: u64,
        /// Whether it has its turn.
        turn: bool,
        /// How often the run was redriven.
        redrives: u64,
    },
    /// To have the delivery end as its upstream says.
    Settle(Judged),
    /// To know what comes next.
    Judge(Judged),
}

/// An attempt that has ended, or did not come about.
#[derive(Debug, Clone, Deserialize)]
pub struct Judged {
    /// The delivery.
    pub delivery: DeliveryId,
    /// Its tunnel.
    pub tunnel: TunnelName,
    /// How many attempts this run has made, this one among them.
    pub attempt: u32,
    /// When there will be no more, in milliseconds since 1970.
    pub deadline_ms: u64,
    /// The upstream's status; 0 where there is none.
    pub status: u16,
    /// Why there is none: `Tunnel.` and a code of [`ErrorCode`], or the name of an error of the run.
    pub code: String,
    /// How long the upstream wants to be left alone, in seconds.
    pub retry_after_s: u64,
    /// The run's lane.
    #[serde(flatten)]
    pub lane: Lane,
    /// How often the run was redriven.
    pub redrives: u64,
}

impl Judged {
    /// The same with what an upstream has answered, which `response` puts into the name of the error.
    fn read(self) -> Self {
        let Some((status, retry_after_s)) = delivery::answered(&self.code) else { return self };
        Self { status, retry_after_s, code: String::new(), ..self }
    }
}

/// What comes next: another attempt, which finds out where the delivery has ended.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// After how long a pause, in seconds.
    pub pause_s: u64,
    /// How many attempts the run has made.
    pub attempt: u32,
    /// The lane it goes on in.
    #[serde(flatten)]
    pub lane: Lane,
}

/// What an attempt's end means.
#[derive(Debug, PartialEq, Eq)]
enum Means {
    /// It is made again after so many seconds.
    Again(u64),
    /// It was none, and is made again after so many seconds.
    NotMade(u64),
    Dead,
}

/// What the run is answered. One that waits for its token reads nothing.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// To [`Event::Judge`].
    Verdict(Verdict),
    /// To the others.
    Nothing {},
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Deliver::from_env, |event, deliver| async move { handle(event, &deliver).await })
}

impl Deliver {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        let deliveries = Deliveries::from_env(&aws, env);
        Ok(Self {
            deliveries: deliveries.ok_or_else(|| env.missing(env::DELIVERIES_TABLE))?,
            registry: Registry::from_env(&aws, env)?,
            link: AgentLink::from_env(&aws, env)?,
            keys: env.token_keys()?,
        })
    }
}

/// Handles one event.
///
/// # Errors
///
/// A name for the run, or [`Error`] when a table or a queue cannot be used.
pub async fn handle(event: Event, deliver: &Deliver) -> Result<Answer, Error> {
    match event {
        Event::Turn { delivery, tunnel, token } => {
            let token = task_token(&token)?;
            match deliver.deliveries.find(&tunnel, &delivery).await? {
                Some(kept) => deliver.deliveries.await_turn(&kept, &token).await?,
                None => drop(deliver.deliveries.succeed(token.as_str(), "{}").await?),
            }
            Ok(Answer::Nothing {})
        }
        Event::Deliver { delivery, tunnel, token, deadline_ms, turn, redrives } => {
            let token = task_token(&token)?;
            match begin(deliver, &tunnel, &delivery, deadline_ms, turn, redrives).await {
                Ok((kept, connections)) => post(deliver, &kept, token, &connections).await?,
                // A run's usual way: no failure of this function, which alarms would count.
                Err(Error::Named { name: name @ (NO_AGENT | NOT_ITS_TURN | OVER | NOT_THEIRS) }) => {
                    let told = deliver.deliveries.fail(token.as_str(), name).await;
                    told.map_err(|error| unready(&error))?;
                }
                Err(error) => return Err(error),
            }
            Ok(Answer::Nothing {})
        }
        Event::Settle(judged) => settle(deliver, &judged).await.map(|()| Answer::Nothing {}),
        Event::Judge(judged) => judge(deliver, &judged.read()).await.map(Answer::Verdict),
    }
}

/// Finds out whether an attempt can be made now and begins it; else the name for what the run has to do first.
async fn begin(
    deliver: &Deliver,
    tunnel: &TunnelName,
    delivery: &DeliveryId,
    deadline_ms: u64,
    turn: bool,
    redrives: u64,
) -> Result<(Kept, Vec<ConnectionId>), Error> {
    if unix_now_ms() >= deadline_ms {
        return Err(Error::Named { name: EXPIRED });
    }
    let unready = |error: Error| unready(&error);
    let over = Error::Named { name: OVER };
    // A run that was redriven had its turn, and has passed it on when its delivery died.
    if !turn || redrives > 0 {
        let Some(kept) = deliver.deliveries.find(tunnel, delivery).await.map_err(unready)? else {
            return Err(over);
        };
        if !kept.state.is_final() && !deliver.deliveries.has_turn(&kept).await.map_err(unready)? {
            return Err(Error::Named { name: NOT_ITS_TURN });
        }
    }
    let takers = deliver.registry.takers(tunnel, unix_now()).await.map_err(unready)?;
    let Some(owner) = takers.owner.filter(|_| !takers.connections.is_empty()) else {
        return Err(Error::Named { name: NO_AGENT });
    };
    let store = &deliver.deliveries;
    let begun = async {
        if let Some(kept) = store.begin(tunnel, delivery, &owner).await? {
            return Ok(Ok(kept));
        }
        let Some(kept) = store.find(tunnel, delivery).await? else { return Ok(Err(OVER)) };
        if !kept.state.is_final() && kept.owner != owner {
            return Ok(Err(NOT_THEIRS));
        }
        // It died when its run was stopped, and the run was redriven since.
        if !is_redriven(&kept, redrives) || !revive(store, &kept).await? {
            return Ok(Err(OVER));
        }
        let Some(kept) = store.find(tunnel, delivery).await? else { return Ok(Err(OVER)) };
        if !store.has_turn(&kept).await? {
            return Ok(Err(NOT_ITS_TURN));
        }
        Ok(store.begin(tunnel, delivery, &owner).await?.ok_or(OVER))
    };
    match begun.await {
        Ok(Ok(kept)) => Ok((kept, takers.connections)),
        Ok(Err(name)) => Err(Error::Named { name }),
        Err(error) => Err(before_dispatch(&error)),
    }
}

/// Whether the run of a delivery was redriven since that is dead.
fn is_redriven(kept: &Kept, redrives: u64) -> bool {
    kept.state == State::Dead && redrives > kept.buried.unwrap_or_default()
}

/// Makes such a delivery wait again.
async fn revive(store: &Deliveries, kept: &Kept) -> Result<bool, Error> {
    tracing::info!(delivery_id = %kept.id, tunnel_id = %kept.tunnel, "delivery was redriven");
    store.revive(kept).await
}

fn task_token(text: &str) -> Result<TaskToken, Error> {
    TaskToken::new(text).map_err(|error| Error::Refused { call: "an event", source: error.into() })
}

/// The name for a failure before an attempt was begun.
fn unready(error: &Error) -> Error {
    tracing::warn!(%error, "no attempt was begun");
    Error::Named { name: UNREADY }
}

/// The name for a failure before anything was posted.
fn before_dispatch(error: &Error) -> Error {
    tracing::warn!(%error, "delivery was not posted");
    Error::Named { name: EDGE_BUSY }
}

/// Posts the request to the first connection that takes it.
async fn post(
    deliver: &Deliver,
    kept: &Kept,
    task_token: TaskToken,
    connections: &[ConnectionId],
) -> Result<(), Error> {
    let body = deliver.deliveries.body(kept).await.map_err(|error| before_dispatch(&error))?;
    let request_id = RequestId::from_random(random());
    let timeout_s = u64::from(kept.policy.timeout_s);
    let token = deliver.keys.mint_delivery(&DeliveryClaims {
        delivery: kept.id.clone(),
        attempt: kept.attempt,
        tunnel: kept.tunnel.clone(),
        owner: OwnerMark::from(&kept.owner),
        expires_at: unix_now() + timeout_s + TOKEN_GRACE_S,
        task_token,
    });
    let (text, whole) = head(kept, &request_id, &token, &body)?;
    // Several agents share the load.
    let begin = usize::from(random()[0]) % connections.len().max(1);
    for connection in connections.iter().cycle().skip(begin).take(connections.len()) {
        match deliver.link.post_text(connection, text.clone()).await {
            Ok(Posted::Accepted) => {
                tracing::info!(
                    delivery_id = %kept.id, tunnel_id = %kept.tunnel, %request_id, attempt = kept.attempt,
                    body_bytes = body.len(), "delivery was posted"
                );
                if !whole {
                    return upload(deliver, connection, &request_id, &body).await;
                }
                return Ok(());
            }
            // The truth about a connection: it is found again by nobody.
            Ok(Posted::Gone) => drop(deliver.registry.forget_row(&kept.tunnel, connection).await),
            Err(Error::Throttled { call }) => return Err(before_dispatch(&Error::Throttled { call })),
            Err(error) => {
                tracing::warn!(%error, delivery_id = %kept.id, "nobody knows whether the delivery was posted");
                return Err(Error::Named { name: BROKEN });
            }
        }
    }
    Err(Error::Named { name: NO_CONNECTION })
}

/// The `request` message, and whether the body is in it.
fn head(kept: &Kept, request_id: &RequestId, token: &str, body: &[u8]) -> Result<(String, bool), Error> {
    let target = Target::parse(&kept.head.target)
        .map_err(|error| Error::Refused { call: "a delivery", source: error.into() })?;
    let mut headers: Headers = kept.head.headers.clone();
    let fields = [
        (delivery::ID, kept.id.to_string()),
        (delivery::ATTEMPT, kept.attempt.to_string()),
        (delivery::RECEIVED, calendar::rfc3339(kept.received_ms)),
        // What the agent logs.
        (forwarded::REQUEST_ID, request_id.to_string()),
    ];
    for (name, value) in fields {
        if let Ok(value) = value.parse() {
            headers.set(name, value);
        }
    }
    let fits = body.len() <= limits::CHUNK_BYTES;
    let mut request = Request {
        request_id: request_id.clone(),
        token: token.into(),
        tunnel: kept.tunnel.clone(),
        method: kept.head.method.as_str().into(),
        target,
        headers,
        body: (fits && !body.is_empty()).then(|| Body::encode(body)),
        announced: (!fits).then_some(body.len() as u64),
        timeout_ms: u64::from(kept.policy.timeout_s) * 1000,
        streamed: false,
        upgrade: None,
        delivery: Some(Attempt { id: kept.id.clone(), attempt: kept.attempt, received_ms: kept.received_ms }),
    };
    if fits {
        let text = EdgeMessage::Request(request.clone()).encode();
        if text.len() <= limits::MESSAGE_BYTES {
            return Ok((text, true));
        }
        request.body = None;
        request.announced = Some(body.len() as u64);
    }
    Ok((EdgeMessage::Request(request).encode(), false))
}

/// Sends an announced body. The agent has made room for it, or has said that it has none.
async fn upload(
    deliver: &Deliver,
    connection: &ConnectionId,
    request_id: &RequestId,
    body: &[u8],
) -> Result<(), Error> {
    let mut rest = body;
    let mut seq = 0;
    while !rest.is_empty() {
        let (body, taken) = Body::encode_front(rest, None);
        rest = &rest[taken..];
        seq += 1;
        let chunk = RequestChunk { request_id: request_id.clone(), seq, body, end: rest.is_empty() };
        let posted = deliver.link.post_text(connection, chunk.encode()).await;
        if !matches!(posted, Ok(Posted::Accepted)) {
            if let Err(error) = &posted {
                tracing::warn!(%error, %request_id, "body of a delivery could not be sent on");
            }
            let cancel = EdgeMessage::Cancel(Cancel { request_id: request_id.clone() });
            drop(deliver.link.post(connection, &cancel).await);
            return Err(Error::Named { name: BROKEN });
        }
    }
    Ok(())
}

/// The upstream has taken the delivery, or it has ended otherwise meanwhile.
async fn settle(deliver: &Deliver, judged: &Judged) -> Result<(), Error> {
    let store = &deliver.deliveries;
    let Some(kept) = store.find(&judged.tunnel, &judged.delivery).await? else {
        tracing::warn!(delivery_id = %judged.delivery, "delivery has gone");
        return wake_next(store, judged, 1).await;
    };
    match kept.state {
        State::Waiting | State::Delivering if judged.code != OVER => {
            tracing::info!(
                delivery_id = %kept.id, tunnel_id = %kept.tunnel, attempt = kept.attempt, status = judged.status,
                "delivered"
            );
            let last = last(judged, kept.attempt);
            store.end(&kept, State::Delivered, &last, judged.redrives).await?;
        }
        // It was begun anew meanwhile: that is another run's.
        State::Waiting | State::Delivering => {}
        // A call that was made before, and whose answer was lost; or another run's end.
        ended => store.release(&kept, ended != State::Dead).await?,
    }
    wake_next(store, judged, kept.policy.max_concurrent).await
}

async fn judge(deliver: &Deliver, judged: &Judged) -> Result<Verdict, Error> {
    let store = &deliver.deliveries;
    // The next attempt sees that it has ended.
    let over = Verdict { pause_s: 0, attempt: judged.attempt, lane: Lane::NONE };
    let Some(kept) = store.find(&judged.tunnel, &judged.delivery).await? else {
        tracing::warn!(delivery_id = %judged.delivery, "delivery has gone");
        wake_next(store, judged, 1).await?;
        return Ok(over);
    };
    let most = kept.policy.max_concurrent;
    match kept.state {
        State::Delivered | State::Cancelled => {
            store.release(&kept, true).await?;
            wake_next(store, judged, most).await?;
            return Ok(over);
        }
        State::Dead if is_redriven(&kept, judged.redrives) => {
            revive(store, &kept).await?;
            return Ok(Verdict { pause_s: 0, attempt: 0, lane: Lane::NONE });
        }
        // A call that was made before, and whose answer was lost.
        State::Dead => {
            store.release(&kept, false).await?;
            wake_next(store, judged, most).await?;
            return Err(Error::Named { name: DEAD });
        }
        State::Waiting | State::Delivering => {}
    }
    let unready = Judged { code: UNREADY.to_owned(), ..judged.clone() };
    let judged = if kept.state == State::Waiting && has_ended(&judged.code) { &unready } else { judged };
    let now_ms = unix_now_ms();
    let refused_ms = kept.refused_since_ms.map_or(0, |since| now_ms.saturating_sub(since));
    let means = means(&kept.policy, judged, now_ms, refused_ms, unit());
    let last = last(judged, kept.attempt);
    tracing::info!(
        delivery_id = %kept.id, tunnel_id = %kept.tunnel, attempt = kept.attempt, status = judged.status,
        code = judged.code, means = ?means, "attempt has ended"
    );
    match means {
        Means::Again(pause_s) => {
            store.note(&kept, &last, Noted::Made).await?;
            wake_next(store, judged, most).await?;
            Ok(Verdict { pause_s, attempt: judged.attempt, lane: Lane::NONE })
        }
        Means::NotMade(pause_s) => {
            // Only what `begin` has counted; a second call finds the delivery waiting and leaves it.
            let is_begun = kept.state == State::Delivering && judged.code != UNREADY;
            store.note(&kept, &last, if is_begun { Noted::NotMade } else { Noted::NotBegun }).await?;
            let attempt = judged.attempt.saturating_sub(1);
            Ok(Verdict { pause_s, attempt, lane: judged.lane })
        }
        Means::Dead => {
            // The pointer first: a delivery that is dead is always in the queue, if need be twice.
            store.bury(&kept, &last.reason).await?;
            store.end(&kept, State::Dead, &last, judged.redrives).await?;
            wake_next(store, judged, most).await?;
            Err(Error::Named { name: DEAD })
        }
    }
}

/// The run leaves its lane: the next one takes its place, and the first lane opens another.
async fn wake_next(store: &Deliveries, judged: &Judged, most: u32) -> Result<(), Error> {
    let lanes = judged.lane.next(most);
    if !lanes.is_empty() {
        store.wake(&judged.tunnel, &lanes).await?;
    }
    Ok(())
}

/// Decides about an attempt. Pure. `random` is uniform in `[0, 1)`; for `refused_ms` no attempt was made.
fn means(policy: &DeliveryPolicy, judged: &Judged, now_ms: u64, refused_ms: u64, random: f64) -> Means {
    if now_ms >= judged.deadline_ms || judged.code == EXPIRED {
        return Means::Dead;
    }
    let again = match kind(judged) {
        Kind::NotMade => {
            let left_s = (judged.deadline_ms - now_ms) / 1000;
            return Means::NotMade(refused_pause(refused_ms / 1000, random).min(left_s.max(1)));
        }
        Kind::Status(status) => policy.retry_on.statuses.iter().any(|rule| rule.covers(status)),
        Kind::NoConnection => policy.retry_on.no_connection,
        Kind::Unknown => policy.retry_unknown,
        Kind::Final => false,
    };
    if !again || judged.attempt >= policy.attempts {
        return Means::Dead;
    }
    // Full jitter, so that what failed together is not tried again together.
    let doubled =
        f64::from(policy.backoff.base_s) * 2_f64.powi(judged.attempt.saturating_sub(1).min(30) as i32);
    let pause = (doubled.min(f64::from(policy.backoff.max_s)) * random).ceil() as u64;
    let left_s = (judged.deadline_ms - now_ms) / 1000;
    let wanted = judged.retry_after_s.min(delivery::RETRY_AFTER_MAX_S);
    Means::Again(pause.max(wanted).max(1).min(left_s.max(1)))
}

/// How long a delivery waits of which no attempt was made for `refused_s`, in seconds: at least half of the longest, so that
/// the events of its run last.
fn refused_pause(refused_s: u64, random: f64) -> u64 {
    let grown = (refused_s / 4).min(REFUSED_PAUSE_S) as f64 * (0.5 + random / 2.0);
    (1 + (random * BUSY_PAUSE_S as f64) as u64).max(grown as u64)
}

enum Kind {
    /// Certainly no upstream was called.
    NotMade,
    /// The upstream answered.
    Status(u16),
    /// The upstream could not be reached or gave no answer.
    NoConnection,
    /// Nobody knows what became of the attempt.
    Unknown,
    /// It would end the same way each time.
    Final,
}

fn kind(judged: &Judged) -> Kind {
    if judged.status != 0 {
        return Kind::Status(judged.status);
    }
    let Some(code) = judged.code.strip_prefix("Tunnel.") else {
        return match judged.code.as_str() {
            NO_CONNECTION | EDGE_BUSY | UNREADY | "Lambda.TooManyRequestsException" => Kind::NotMade,
            NOT_THEIRS => Kind::Final,
            // Time-outs of the task, lost heartbeats, a function that ended half way.
            _ => Kind::Unknown,
        };
    };
    // A code of a later release, too: nobody knows what became of it.
    ErrorCode::from_wire(code).map_or(Kind::Unknown, kind_of)
}

/// Whether the call of this function has ended with its process: what it had not begun by then it will not begin. A call
/// that was given up on may go on instead, and begin later what was thought not to have been.
fn has_ended(code: &str) -> bool {
    ["Runtime.", "Sandbox."].iter().any(|prefix| code.starts_with(prefix)) || code == "Lambda.Unknown"
}

/// What a failure means for a delivery. Every code has its line: what passes by itself ends no delivery.
const fn kind_of(code: ErrorCode) -> Kind {
    match code {
        ErrorCode::AgentBusy
        | ErrorCode::TooManyRequests
        | ErrorCode::RateLimited
        | ErrorCode::TooManyGuesses
        | ErrorCode::SignInUnavailable
        | ErrorCode::CircuitOpen
        | ErrorCode::Maintenance
        | ErrorCode::TunnelOffline
        | ErrorCode::EdgeBusy => Kind::NotMade,
        ErrorCode::UpstreamUnreachable
        | ErrorCode::UpstreamTls
        | ErrorCode::UpstreamUnhealthy
        | ErrorCode::UpstreamInvalid => Kind::NoConnection,
        ErrorCode::UpstreamReset
        | ErrorCode::UpstreamTimedOut
        | ErrorCode::AgentLost
        | ErrorCode::Cancelled
        | ErrorCode::EdgeFailed => Kind::Unknown,
        ErrorCode::BadRequest
        | ErrorCode::FrontRefused
        | ErrorCode::NoSuchTunnel
        | ErrorCode::RequestTooLarge
        | ErrorCode::TargetTooLong
        | ErrorCode::HeadTooLarge
        | ErrorCode::UpgradeUnsupported
        | ErrorCode::LoopDetected
        | ErrorCode::AgentInvalid
        | ErrorCode::ResponseTooLarge
        | ErrorCode::AddressRefused
        | ErrorCode::PasswordRequired
        | ErrorCode::TokenRequired
        | ErrorCode::SignInRequired
        | ErrorCode::SignInFailed
        | ErrorCode::VisitorRefused
        | ErrorCode::WebhookRefused
        | ErrorCode::WebhookTooLarge
        | ErrorCode::OriginRefused
        | ErrorCode::NoRoute
        | ErrorCode::NoSuchFile
        | ErrorCode::MethodRefused
        | ErrorCode::BodyTooLarge => Kind::Final,
    }
}

/// What is noted about an attempt.
fn last(judged: &Judged, attempt: u32) -> Last {
    let code = judged.code.strip_prefix("Tunnel.").unwrap_or(&judged.code);
    let known = ErrorCode::from_wire(code).map(ErrorCode::sentence);
    let reason = match (judged.status, known) {
        (0, Some(sentence)) => sentence.to_owned(),
        (0, None) => match code {
            EXPIRED => "it could not be delivered in the time that the policy gives it".to_owned(),
            NOT_THEIRS => "its tunnel has become somebody else's".to_owned(),
            NO_CONNECTION => "no agent was connected".to_owned(),
            EDGE_BUSY | UNREADY => "the edge was busy".to_owned(),
            "States.Timeout" | "States.HeartbeatTimeout" => {
                "the agent did not say what became of it; it may have been delivered".to_owned()
            }
            _ => format!("nobody knows what became of it ({code})"),
        },
        (status, _) => format!("the upstream answered {status}"),
    };
    Last {
        attempt,
        at_ms: unix_now_ms(),
        status: (judged.status != 0).then_some(judged.status),
        code: (judged.status == 0).then(|| code.to_owned()),
        reason,
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes
}

/// Uniform in `[0, 1)`.
fn unit() -> f64 {
    let [a, b, c, d, ..] = random();
    f64::from(u32::from_be_bytes([a, b, c, d])) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use proto::delivery::{Mode, StatusRule};

    use super::*;

    fn judged(status: u16, code: &str) -> Judged {
        Judged {
            delivery: DeliveryId::new(1, [1; 10]),
            tunnel: "web".parse().unwrap(),
            attempt: 1,
            deadline_ms: 1_000_000,
            status,
            code: code.into(),
            retry_after_s: 0,
            lane: Lane::NONE,
            redrives: 0,
        }
    }

    fn policy() -> DeliveryPolicy {
        DeliveryPolicy::new(Mode::Auto)
    }

    #[test]
    fn every_answer_of_an_upstream_has_its_meaning() {
        let of = |status| means(&policy(), &judged(status, ""), 0, 0, 0.5);
        for status in [300, 302, 400, 401, 404, 410, 422] {
            assert_eq!(of(status), Means::Dead, "{status}");
        }
        for status in [408, 425, 429, 500, 503, 599] {
            assert_eq!(of(status), Means::Again(3), "{status}");
        }
        let mut other = policy();
        other.retry_on.statuses = vec![StatusRule::Exact(404)];
        assert_eq!(means(&other, &judged(404, ""), 0, 0, 0.0), Means::Again(1));
        assert_eq!(means(&other, &judged(500, ""), 0, 0, 0.0), Means::Dead);
    }

    #[test]
    fn what_has_no_answer_is_tried_again_as_the_policy_says() {
        let of = |policy: &DeliveryPolicy, code| means(policy, &judged(0, code), 0, 0, 0.5);
        let mut strict = policy();
        strict.retry_unknown = false;
        for code in [
            "States.Timeout",
            "States.HeartbeatTimeout",
            "Tunnel.agent_lost",
            "Tunnel.upstream_reset",
            BROKEN,
            "Sandbox.Timedout",
            "Tunnel.later",
        ] {
            assert_eq!(of(&policy(), code), Means::Again(3), "{code}");
            assert_eq!(of(&strict, code), Means::Dead, "{code}");
        }
        let mut once = policy();
        once.retry_on.no_connection = false;
        for code in ["Tunnel.upstream_unreachable", "Tunnel.upstream_tls", "Tunnel.upstream_unhealthy"] {
            assert_eq!(of(&strict, code), Means::Again(3), "{code}");
            assert_eq!(of(&once, code), Means::Dead, "{code}");
        }
        for code in [
            NO_CONNECTION,
            EDGE_BUSY,
            UNREADY,
            "Tunnel.agent_busy",
            "Tunnel.too_many_requests",
            "Tunnel.maintenance",
            "Tunnel.sign_in_unavailable",
            "Tunnel.too_many_guesses",
        ] {
            let mut last = judged(0, code);
            last.attempt = policy().attempts;
            assert!(matches!(means(&strict, &last, 0, 0, 0.999), Means::NotMade(4)), "{code}");
        }
        for code in [
            "Tunnel.webhook_refused",
            "Tunnel.webhook_too_large",
            "Tunnel.no_route",
            "Tunnel.bad_request",
            NOT_THEIRS,
            EXPIRED,
        ] {
            assert_eq!(of(&policy(), code), Means::Dead, "{code}");
        }
    }

    #[test]
    fn what_is_refused_for_days_is_asked_for_ever_less_often_and_its_run_has_events_for_that() {
        assert_eq!([0.0, 0.25, 0.999].map(|random| refused_pause(0, random)), [1, 2, 4]);
        assert_eq!(refused_pause(16, 0.999), 4);
        assert_eq!([0.0, 1.0].map(|random| refused_pause(400, random)), [50, 100]);
        for long in [4 * REFUSED_PAUSE_S, u64::MAX / 1000] {
            assert_eq!([0.0, 1.0].map(|random| refused_pause(long, random)), [600, 1200]);
        }
        // The whole age of a delivery fits into one run: with the shortest draws there are half as many again as on average.
        let (mut refused_s, mut attempts) = (0, 0);
        while refused_s < *delivery::bounds::MAX_AGE_S.end() {
            refused_s += refused_pause(refused_s, 0.0);
            attempts += 1;
        }
        let mean = attempts * 2 / 3;
        assert!(mean * 15 < 25_000, "{attempts}");
        // It never lasts beyond the delivery.
        let pause = means(&policy(), &judged(0, EDGE_BUSY), 995_000, 900_000, 1.0);
        assert_eq!(pause, Means::NotMade(5));
    }

    #[test]
    fn attempts_and_time_are_bounds_at_which_it_ends() {
        let mut at = judged(500, "");
        at.attempt = policy().attempts - 1;
        assert!(matches!(means(&policy(), &at, 0, 0, 0.5), Means::Again(_)));
        at.attempt += 1;
        assert_eq!(means(&policy(), &at, 0, 0, 0.5), Means::Dead);
        let at = judged(500, "");
        assert!(matches!(means(&policy(), &at, at.deadline_ms - 1, 0, 0.5), Means::Again(1)));
        assert_eq!(means(&policy(), &at, at.deadline_ms, 0, 0.5), Means::Dead);
        // No agent's absence outlives the delivery.
        assert_eq!(means(&policy(), &judged(0, NO_CONNECTION), 1_000_000, 0, 0.5), Means::Dead);
    }

    #[test]
    fn pauses_double_with_full_jitter_up_to_their_bound_and_retry_after_is_obeyed() {
        let pause = |attempt, retry_after_s, random| {
            let judged = Judged { attempt, retry_after_s, deadline_ms: u64::MAX, ..judged(503, "") };
            let patient = DeliveryPolicy { attempts: 50, ..policy() };
            match means(&patient, &judged, 0, 0, random) {
                Means::Again(pause) => pause,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!([1, 2, 3, 10, 49].map(|attempt| pause(attempt, 0, 1.0)), [5, 10, 20, 2560, 3600]);
        assert_eq!(pause(3, 0, 0.0), 1);
        assert_eq!(pause(1, 60, 0.5), 60);
        assert_eq!(pause(1, delivery::RETRY_AFTER_MAX_S, 0.5), 3600);
        assert_eq!(pause(1, delivery::RETRY_AFTER_MAX_S + 1, 0.5), 3600);
    }

    #[test]
    fn events_of_the_machine_are_understood() {
        let event: Event = serde_json::from_str(
            r#"{"op":"judge","delivery":"00000000000101010101010101010101","tunnel":"web","attempt":1,"deadline_ms":5,
            "status":200,"code":"","retry_after_s":0,"lane":-1,"lanes":0,"redrives":0}"#,
        )
        .unwrap();
        assert!(matches!(event, Event::Judge(judged) if judged.status == 200 && judged.lane == Lane::NONE));
        let answered = Judged { code: "Upstream.503.120".into(), ..judged(0, "") }.read();
        assert_eq!((answered.status, answered.retry_after_s, &*answered.code), (503, 120, ""));
        assert_eq!(judged(0, "Tunnel.agent_lost").read().code, "Tunnel.agent_lost");
        let verdict = Verdict { pause_s: 3, attempt: 2, lane: Lane::FIRST };
        let text = serde_json::to_string(&Answer::Verdict(verdict)).unwrap();
        assert_eq!(text, r#"{"pause_s":3,"attempt":2,"lane":0,"lanes":1}"#);
        assert_eq!(serde_json::to_string(&Answer::Nothing {}).unwrap(), "{}");
    }
}
