//! Keeps one connection in service: dials, asks again for tunnels that were not opened, opens the next
//! connection before the old one ends, and takes the old one out of service.
//!
//! Enters: what the connections report, and time. Leaves: [`News`] for the supervisor, and this part of the
//! status.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::{
    backoff::Backoff,
    delivery::PolicyNotice,
    id::{AgentId, TunnelName},
    message::Welcome,
    session,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, Interval, sleep_until},
};

use super::{
    connection::{self, Command, End, Report, Seen, Serial, Shared},
    deliveries::{Desk, NoAnswer, Question},
    dial::{DialError, Dialer, Retry},
    known::Known,
    refusal::{advice, is_permanent, token_advice},
    tokens::{self, Tokens},
    websocket::Link,
};
use crate::{
    config::{Config, change::Change},
    identity::credential::Token,
    random,
    report::{
        SOFTWARE,
        access::AccessLog,
        metrics::Metrics,
        status::{EdgeStatus, LinkState, TunnelState},
        systemd::Notifier,
    },
    serve::tunnel::Tunnels,
    timer::{at, tick},
};

/// How long a connection that was replaced waits for requests that were dispatched to it just
/// before: longer than a run needs from its look-up to its dispatch, a retry included.
const REPLACED_QUIET: Duration = Duration::from_secs(3);

/// The same when the agent stops: nobody else serves those requests, but somebody waits for the stop.
const STOP_QUIET: Duration = Duration::from_millis(500);

/// With less than this left, nothing more is looked for.
const RENEW_LAST: Duration = Duration::from_secs(2);

/// How long after a `hello` that could not be asked for it is asked for again.
const BUSY: Duration = Duration::from_secs(2);

/// Reports that wait to be looked at. A connection that finds it full waits.
const REPORTS: usize = 64;

/// A connection is sent few commands; questions take half of the places at most.
const COMMANDS: usize = 16;

/// What others must know.
#[derive(Debug)]
pub(crate) enum News {
    /// The edge has answered: what is open, and what is not.
    Welcomed(Box<Welcome>),
    /// The edge cannot be reached; it is tried again.
    Unreachable(DialError),
    /// The edge refuses the token, and nothing that an earlier one has opened is in service.
    TokenRefused(DialError),
    /// A connection has ended.
    Ended,
}

/// What dialling came to, and the token with which it was done.
type Dialled = (Token, Result<Link, DialError>);

/// What is done about a next connection.
enum Opening {
    /// Nothing: there is one, or none is wanted.
    Idle,
    /// It waits before the next try.
    Waiting(Instant),
    /// It dials.
    Dialling(Pin<Box<dyn Future<Output = Dialled> + Send>>),
}

impl Opening {
    /// `None` when it is time to dial, otherwise what dialling came to.
    ///
    /// # Cancel safety
    ///
    /// The future under way is kept in `self`.
    async fn next_step(&mut self) -> Option<Dialled> {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Waiting(until) => {
                sleep_until(*until).await;
                None
            }
            Self::Dialling(dialling) => Some(dialling.await),
        }
    }
}

/// What reading a token came to, for ever if none is being read.
///
/// # Cancel safety
///
/// The reading under way is kept.
async fn renewed(reading: &mut Option<tokens::Reading>) -> Result<Token, String> {
    let Some(under_way) = reading else { return std::future::pending().await };
    let outcome = under_way.await;
    *reading = None;
    outcome
}

/// All connections of this agent.
pub(crate) struct Rotation {
    agent: AgentId,
    dialer: Dialer,
    token: Token,
    tokens: Tokens,
    /// The token that is being read because that of a connection ends.
    renewal: Option<tokens::Reading>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    notifier: Notifier,
    watchdog: Option<Interval>,
    backoff: Backoff,
    connections: BTreeMap<Serial, Known>,
    tasks: JoinSet<()>,
    last_serial: Serial,
    report: mpsc::Sender<(Serial, Report)>,
    reports: mpsc::Receiver<(Serial, Report)>,
    opening: Opening,
    /// Not before this is the next connection dialled.
    dial_after: Instant,
    /// The connections whose loops have not yet proved that they turn, since the service manager was
    /// last told so.
    unproven: BTreeSet<Serial>,
    last_error: Option<String>,
    stopping: bool,
    /// Where and what is asked about deliveries.
    desk: Desk,
    questions: mpsc::Receiver<Question>,
}

impl Rotation {
    /// None yet; the first is dialled at once.
    pub(crate) fn new(
        agent: AgentId,
        dialer: Dialer,
        config: &Config,
        tunnels: Arc<Tunnels>,
        access: AccessLog,
        metrics: Arc<Metrics>,
        notifier: Notifier,
    ) -> Self {
        let (desk, questions) = Desk::new();
        let (report, reports) = mpsc::channel(REPORTS);
        Self {
            agent,
            dialer,
            token: config.token.clone(),
            tokens: Tokens::new(config.token_source.clone()),
            renewal: None,
            shared: Arc::new(Shared {
                tunnels,
                access,
                seen: Mutex::new(Seen::default()),
                sockets: Arc::default(),
            }),
            metrics,
            watchdog: notifier.watchdog().map(tokio::time::interval),
            notifier,
            backoff: Backoff::new(),
            connections: BTreeMap::new(),
            tasks: JoinSet::new(),
            last_serial: 0,
            report,
            reports,
            opening: Opening::Idle,
            dial_after: Instant::now(),
            unproven: BTreeSet::new(),
            last_error: None,
            stopping: false,
            desk,
            questions,
        }
    }

    /// Looks after the connections until somebody else must know of something. The service manager hears
    /// meanwhile that all of their loops turn.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: what is under way is kept in `self`.
    pub(crate) async fn next(&mut self) -> News {
        loop {
            if matches!(self.opening, Opening::Idle) && self.wants_connection() {
                self.opening = Opening::Waiting(self.dial_after);
            }
            let greet_at = self.connections.values().filter_map(|known| known.greet_at).min();
            let renew_at = self.connections.values().filter_map(|known| known.renew_at).min();
            let renew_at = renew_at.filter(|_| self.renewal.is_none());
            let news = tokio::select! {
                () = at(greet_at) => {
                    self.greet_again();
                    None
                }
                () = at(renew_at) => {
                    self.renewal = Some(self.tokens.read());
                    None
                }
                read = renewed(&mut self.renewal) => {
                    self.renew(&read);
                    None
                }
                Some((serial, report)) = self.reports.recv() => self.handle(serial, report),
                opened = self.opening.next_step() => self.opened(opened),
                Some(_) = self.tasks.join_next() => None,
                Some(question) = self.questions.recv() => {
                    self.hand_on(question);
                    None
                }
                () = tick(self.watchdog.as_mut()) => {
                    self.prove();
                    None
                }
            };
            if let Some(news) = news {
                self.count();
                return news;
            }
        }
    }

    /// Whether another connection should be opened: there is none to be relied on, and none on its way.
    fn wants_connection(&self) -> bool {
        !self.stopping && !self.connections.values().any(|known| !known.retiring && !known.replace)
    }

    fn opened(&mut self, opened: Option<Dialled>) -> Option<News> {
        let Some((token, dialled)) = opened else {
            self.dial();
            return None;
        };
        self.token = token;
        match dialled {
            Ok(link) => {
                self.opening = Opening::Idle;
                self.start(link);
                None
            }
            Err(error) => self.dial_failed(error),
        }
    }

    fn dial(&mut self) {
        let (dialer, last, reading) = (self.dialer.clone(), self.token.clone(), self.tokens.read());
        self.opening = Opening::Dialling(Box::pin(async move {
            // It may have been replaced since the last time; what was good once is kept otherwise.
            let token = reading.await.unwrap_or_else(|error| {
                tracing::warn!(%error, "the token could not be read again; the last one is used");
                last
            });
            let dialled = dialer.dial(&token).await;
            (token, dialled)
        }));
    }

    fn dial_failed(&mut self, error: DialError) -> Option<News> {
        self.metrics.dial_failed(error.reason());
        self.last_error = Some(error.to_string());
        // A token that was put in place of a good one does not end what that one has opened.
        if error.retry() == Retry::Never && self.current().is_none() {
            self.opening = Opening::Idle;
            return Some(News::TokenRefused(error));
        }
        let now = Instant::now();
        let delay = self.backoff.lost(now.into_std(), random::fraction());
        let delay_ms = delay.as_millis() as u64;
        self.opening = Opening::Waiting(now + delay);
        match error.retry() {
            Retry::Never => {
                tracing::error!(
                    delay_ms,
                    "{error}; the connection that is open stays in use while it can: {}",
                    self.token_advice()
                );
                None
            }
            Retry::Later => {
                tracing::warn!(attempt = self.backoff.failures(), delay_ms, "cannot connect: {error}");
                Some(News::Unreachable(error))
            }
        }
    }

    /// What to do about a token that the edge refuses.
    pub(crate) fn token_advice(&self) -> String {
        token_advice(self.tokens.source(), &self.token)
    }

    fn start(&mut self, link: Link) {
        self.last_serial += 1;
        let serial = self.last_serial;
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let session = session::Config {
            agent: self.agent.clone(),
            software: SOFTWARE.to_owned(),
            jitter: random::fraction(),
        };
        let (shared, report) = (Arc::clone(&self.shared), self.report.clone());
        let url = self.dialer.url().to_string();
        self.tasks.spawn(connection::run(serial, link, shared, session, inbox, report));
        self.connections.insert(serial, Known::new(commands, Instant::now(), url, self.token.clone()));
    }

    fn handle(&mut self, serial: Serial, report: Report) -> Option<News> {
        match report {
            Report::Welcomed(welcome) => self.welcomed(serial, welcome),
            Report::Replace => {
                if let Some(known) = self.connections.get_mut(&serial) {
                    tracing::info!("opening the next connection ahead of this one's end");
                    known.replace = true;
                    self.metrics.reconnected("planned");
                }
                None
            }
            Report::Rhythm(rhythm) => {
                if let Some(known) = self.connections.get_mut(&serial) {
                    known.rhythm = Some(rhythm);
                }
                None
            }
            Report::Alive => {
                self.proved(serial);
                None
            }
            Report::Ended(end) => self.ended(serial, &end),
        }
    }

    fn welcomed(&mut self, serial: Serial, welcome: Box<Welcome>) -> Option<News> {
        let now = Instant::now();
        let known = self.connections.get_mut(&serial).filter(|known| !known.retiring)?;
        known.take(&welcome, now);
        if !known.welcomed {
            known.welcomed = true;
            self.backoff.connected(now.into_std());
            self.last_error = None;
            tracing::info!(connection_id = %welcome.connection_id, tunnels = known.open.len(), "connected");
        }
        self.retire_replaced(serial);
        Some(News::Welcomed(welcome))
    }

    /// Takes older connections out of service once `serial` serves everything they serve and it can.
    fn retire_replaced(&mut self, serial: Serial) {
        let Some(known) = self.connections.get(&serial) else { return };
        let wanted = self.wanted();
        let hopeless = known.refused.iter().filter(|(_, reason)| is_permanent(**reason));
        let settled: BTreeSet<_> = known.open.iter().chain(hopeless.map(|(name, _)| name)).cloned().collect();
        for (_, known) in self.connections.range_mut(..serial) {
            // What a reload removed need not be served by anybody.
            if !known.retiring && known.open.intersection(&wanted).all(|name| settled.contains(name)) {
                known.retire(REPLACED_QUIET);
            }
        }
    }

    fn ended(&mut self, serial: Serial, end: &End) -> Option<News> {
        let known = self.connections.remove(&serial)?;
        self.proved(serial);
        match end {
            End::Retired => tracing::info!("a connection was retired"),
            End::Link(error) if error.is_restart() => tracing::info!("{error}"),
            End::Link(_) | End::Dead(_) if known.retiring => {
                tracing::info!("a retired connection ended: {end}")
            }
            End::Link(_) | End::Dead(_) => tracing::warn!("connection lost: {end}"),
        }
        if !known.retiring {
            if !known.replace {
                self.metrics.reconnected(end.reason());
            }
            self.last_error = Some(end.to_string());
            // Also an edge that closes what it has just accepted is not asked again at once.
            let now = Instant::now();
            let delay = self.backoff.lost(now.into_std(), random::fraction());
            self.dial_after = now + delay;
            tracing::info!(delay_ms = delay.as_millis() as u64, "reconnecting");
        }
        Some(News::Ended)
    }

    fn greet_again(&mut self) {
        let now = Instant::now();
        for known in self.connections.values_mut() {
            if known.greet_at.is_some_and(|due| due <= now) {
                let sent = known.commands.try_send(Command::Greet);
                // One that has ended need not be told; one that is busy is told a little later.
                let busy = matches!(sent, Err(mpsc::error::TrySendError::Full(_)));
                known.greet_at = busy.then(|| now + BUSY);
            }
        }
    }

    /// Has the connection that serves ask the edge.
    fn hand_on(&self, question: Question) {
        let refuse = |question: Question, why| drop(question.answer.send(Err(why)));
        match self.current() {
            None => refuse(question, NoAnswer::NotConnected),
            Some(known) if !known.keeps_deliveries => refuse(question, NoAnswer::NotKept),
            Some(known) if known.commands.capacity() <= COMMANDS / 2 => refuse(question, NoAnswer::Lost),
            Some(known) => {
                if let Err(unsent) = known.commands.try_send(Command::Ask(question))
                    && let Command::Ask(question) = unsent.into_inner()
                {
                    refuse(question, NoAnswer::Lost);
                }
            }
        }
    }

    /// Where the edge is asked about deliveries.
    pub(crate) const fn desk(&self) -> &Desk {
        &self.desk
    }

    /// Whether the edge keeps deliveries, once a connection serves.
    pub(crate) fn keeps_deliveries(&self) -> Option<bool> {
        self.current().map(|known| known.keeps_deliveries)
    }

    /// What the edge that serves says about a tunnel's policy that does not hold as it was said.
    pub(crate) fn policy_notice(&self, tunnel: &TunnelName) -> Option<&PolicyNotice> {
        self.current()?.policies.iter().find(|notice| notice.name == tunnel.as_str())
    }

    /// Another token was looked for before the identity of a connection ends.
    fn renew(&mut self, read: &Result<Token, String>) {
        let now = Instant::now();
        for known in self.connections.values_mut() {
            let (Some(due), Some(end)) = (known.renew_at, known.identity_ends) else { continue };
            if due > now {
                continue;
            }
            known.renew_at = None;
            if known.retiring || known.replace {
                continue;
            }
            if read.as_ref().is_ok_and(|token| *token != known.token) {
                tracing::info!("the token was renewed: opening the next connection with it");
                known.replace = true;
                self.metrics.reconnected("token_renewed");
            } else {
                let left = end.saturating_duration_since(now);
                tracing::warn!(
                    left_s = left.as_secs(),
                    error = read.as_ref().err(),
                    "the token ends soon: put a new one in its place"
                );
                known.renew_at = (left > RENEW_LAST).then(|| now + left / 2);
            }
        }
    }

    /// Asks every connection whether its loop turns. The service manager hears of it once all have
    /// answered: one that hangs gets this process restarted, although the supervisor itself is well.
    fn prove(&mut self) {
        if self.unproven.is_empty() {
            self.unproven = self.connections.keys().copied().collect();
        }
        for serial in &self.unproven {
            if let Some(known) = self.connections.get(serial) {
                // Asked again the next time if there is no place now.
                let _ = known.commands.try_send(Command::Prove);
            }
        }
        if self.unproven.is_empty() {
            self.notifier.alive();
        }
    }

    fn proved(&mut self, serial: Serial) {
        if self.unproven.remove(&serial) && self.unproven.is_empty() {
            self.notifier.alive();
        }
    }

    /// Goes on as `config`, which differs by `change`, wants it.
    pub(crate) fn reload(&mut self, dialer: Dialer, config: &Config, change: &Change) {
        self.dialer = dialer;
        self.token = config.token.clone();
        self.tokens.come_from(config.token_source.clone());
        // Where it comes from may be another place now.
        self.renewal = None;
        let now = Instant::now();
        for known in self.connections.values_mut().filter(|known| !known.retiring) {
            if change.reconnects && !known.replace {
                known.replace = true;
                self.metrics.reconnected("reload");
            }
            if change.is_for_the_edge {
                known.greet_at = Some(now);
                known.greetings = 0;
            }
        }
        if change.reconnects {
            // What is being dialled is out of date.
            self.opening = Opening::Idle;
            self.dial_after = now;
        }
    }

    /// Opens nothing any more and takes every connection out of service.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
        self.opening = Opening::Idle;
        for known in self.connections.values_mut() {
            known.retire(STOP_QUIET);
        }
    }

    /// Ends whatever is left, at once.
    pub(crate) async fn shutdown(&mut self) {
        self.tasks.shutdown().await;
    }

    /// Whether no connection is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// What was dialled with last.
    pub(crate) const fn token(&self) -> &Token {
        &self.token
    }

    /// How many tunnels are open; none without a connection in service.
    pub(crate) fn open(&self) -> Option<usize> {
        self.current().map(|known| known.open.len())
    }

    /// Whether the connection that shall serve has been told everything and has answered.
    pub(crate) fn is_settled(&self) -> bool {
        self.current().is_some_and(|known| {
            !known.replace
                && known.greet_at.is_none()
                && known.open.iter().chain(known.refused.keys()).cloned().collect::<BTreeSet<_>>()
                    == self.wanted()
        })
    }

    /// Whether public requests reach a tunnel.
    pub(crate) fn tunnel_state(&self, name: &TunnelName) -> TunnelState {
        match self.current() {
            Some(known) if known.open.contains(name) => TunnelState::Open,
            Some(known) => known.refused.get(name).map_or(TunnelState::Opening, |&reason| {
                TunnelState::Refused { reason: advice(reason).to_owned() }
            }),
            None => TunnelState::Opening,
        }
    }

    /// The state of the link.
    pub(crate) fn status(&self) -> EdgeStatus {
        let now = Instant::now();
        let state = match (self.stopping, self.current()) {
            (true, _) => LinkState::Stopping,
            (false, Some(_)) => LinkState::Connected,
            (false, None) => LinkState::Connecting,
        };
        // Once what is wanted serves, what failed before is over.
        let is_trying = match state {
            LinkState::Connecting => true,
            LinkState::Connected => !matches!(self.opening, Opening::Idle),
            LinkState::Stopping => false,
        };
        let connections = self.connections.values().rev().map(|known| known.status(now));
        EdgeStatus {
            url: self.dialer.url().to_string(),
            state,
            connections: connections.collect(),
            failures: if is_trying { self.backoff.failures() } else { 0 },
            next_try_ms: match &self.opening {
                Opening::Waiting(at) => Some(at.saturating_duration_since(now).as_millis() as u64),
                Opening::Idle | Opening::Dialling(_) => None,
            },
            last_error: self.last_error.clone(),
        }
    }

    /// The connection that public requests come through.
    fn current(&self) -> Option<&Known> {
        self.connections.values().rev().find(|known| known.serves())
    }

    fn wanted(&self) -> BTreeSet<TunnelName> {
        self.shared.tunnels.names().into_iter().collect()
    }

    /// Tells the metrics what is in service.
    fn count(&self) {
        let serving = self.connections.values().filter(|known| known.serves()).count();
        self.metrics.in_service(serving, self.open().unwrap_or(0));
    }
}
