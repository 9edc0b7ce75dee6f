//! The supervisor: keeps one connection in service, opens the next before the old one ends, and
//! stops in order.
//!
//! Enters: a [`Setup`], reports of the connections, signals, what the control socket asks. Leaves: an
//! [`Outcome`].

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::{
    backoff::Backoff,
    id::{AgentId, TunnelName},
    message::{Refusal, RefusedTunnel, Welcome},
    session,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    config::{self, Config, Overrides, TunnelConfig, change::Change},
    control::{self, Ask, Control, ControlSocket, Stopping},
    identity,
    identity::credential::{ENV_TOKEN, Token, TokenSource},
    link::connection::{self, Command, End, Report, Seen, Serial, Shared},
    link::dial::{DialError, Dialer, Retry},
    link::refusal::{advice, is_passing, is_permanent},
    link::websocket::Link,
    random, report,
    report::access::AccessLog,
    report::metrics::{Metrics, unix_now},
    report::status::{
        ConfigStatus, ConnectionState, ConnectionStatus, EdgeStatus, HealthState, LinkState, Status,
        TunnelState, TunnelStatus,
    },
    report::systemd::Notifier,
    report::telemetry::Terminal,
    serve::tunnel::Tunnels,
    tls::TlsError,
};

/// How long a connection that was replaced waits for requests that were dispatched to it just
/// before: longer than a run needs from its look-up to its dispatch, a retry included.
const REPLACED_QUIET: Duration = Duration::from_secs(3);

/// The same when the agent stops: nobody else serves those requests, but somebody waits for the stop.
const STOP_QUIET: Duration = Duration::from_millis(500);

/// How long before the end of its identity a connection looks for another token, at most.
const RENEW_AHEAD: Duration = Duration::from_secs(60 * 60);

/// With less than this left, nothing more is looked for.
const RENEW_LAST: Duration = Duration::from_secs(2);

/// How long after a `welcome` that left some tunnels unopened `hello` is said again, at least.
const GREET_AGAIN: Duration = Duration::from_secs(2);

/// How long tunnels that a reload removed are still served: until the edge has taken the news, and
/// requests that were dispatched just before have arrived.
const LEAVING: Duration = Duration::from_secs(15);

/// How long a reload waits for the edge to confirm it.
const CONFIRMATION: Duration = Duration::from_secs(10);

/// Reports that wait for the supervisor. A connection that finds it full waits.
const REPORTS: usize = 64;

/// A connection is sent few commands.
const COMMANDS: usize = 4;

/// How the agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was asked to stop, and did.
    Stopped,
    /// The edge does not accept the token, or none of the tunnels: trying again is of no use.
    IdentityRefused,
}

/// What the agent starts with.
#[derive(Debug)]
pub(crate) struct Setup {
    /// The configuration.
    pub config: Config,
    /// Where it is read again at a reload; without it there is none.
    pub source: Option<Source>,
    /// Who is told what.
    pub audience: Audience,
    /// Where it may be asked, unless the configuration names a place. One that cannot be had is done
    /// without.
    pub control_socket: Option<PathBuf>,
}

/// Where a configuration comes from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// The file.
    pub path: PathBuf,
    /// What goes over it.
    pub overrides: Overrides,
}

/// Why the agent could not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// It cannot listen where the configuration says.
    #[error("{0}")]
    Listen(String),
    /// TLS settings are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system gives no signals or no random numbers.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// Who is told what, beside the log.
#[derive(Debug, Clone)]
pub(crate) enum Audience {
    /// A service manager and a log.
    Service,
    /// Somebody at a terminal.
    People(Terminal),
}

/// Runs the agent until it is stopped.
///
/// # Errors
///
/// [`StartError`] when it cannot begin. An edge or an upstream that cannot be reached is no error.
pub(crate) async fn run(setup: Setup) -> Result<Outcome, StartError> {
    let Setup { config, source, audience, control_socket } = setup;
    let signals = Signals::new(source.is_some())?;
    let metrics = Arc::new(Metrics::new());
    let tunnels = Arc::new(Tunnels::new(&config.tunnels, config.max_concurrent, Arc::clone(&metrics))?);
    let dialer = Dialer::new(config.edge.url.clone(), config.edge.ca_file.as_deref())?;
    let access = match &audience {
        Audience::Service => AccessLog::Log,
        Audience::People(terminal) => AccessLog::People(terminal.clone()),
    };
    let (report, reports) = mpsc::channel(REPORTS);
    let (asks, asked) = mpsc::channel(control::ASKS);
    let mut servers = JoinSet::new();
    let control = Control::new(asks, Arc::clone(&metrics));
    if let Some(socket) = open_socket(config.control_socket.as_deref(), control_socket.as_deref())? {
        servers.spawn(control.clone().serve_socket(socket));
    }
    if let Some(address) = config.status_address {
        // Whoever watches the agent must not end it: the tunnels are served without.
        match control::listen(address).await {
            Ok(listener) => {
                servers.spawn(control.serve_loopback(listener));
            }
            Err(error) => tracing::error!(
                "status_address {address}: {error}; the agent goes on without /healthz, /ready and /metrics: \
                 name another address, or restart it when this one is free"
            ),
        }
    }
    let supervisor = Supervisor {
        wanted: tunnels.names().into_iter().collect(),
        shared: Arc::new(Shared {
            tunnels,
            access,
            seen: Mutex::new(Seen::default()),
            sockets: Arc::default(),
        }),
        agent: agent_id(getrandom::u64().map_err(std::io::Error::other)?),
        config,
        source,
        metrics,
        audience,
        dialer,
        notifier: Notifier::from_env(),
        backoff: Backoff::new(),
        connections: BTreeMap::new(),
        tasks: JoinSet::new(),
        last_serial: 0,
        report,
        stop: None,
        shown: BTreeMap::new(),
        told_unreachable: false,
        dial_after: Instant::now(),
        unproven: BTreeSet::new(),
        redial: false,
        ever_open: false,
        last_error: None,
        forget_at: None,
        unconfirmed: Unconfirmed::default(),
        started: Instant::now(),
        started_at: unix_now().as_secs(),
        loaded_at: unix_now().as_secs(),
        reloads: 0,
        reload_error: None,
    };
    let outcome = supervisor.run(reports, asked, signals).await;
    servers.shutdown().await;
    Ok(outcome)
}

/// The socket the configuration names, or the usual one if it can be had.
fn open_socket(named: Option<&Path>, usual: Option<&Path>) -> Result<Option<ControlSocket>, StartError> {
    match (named, usual) {
        (Some(path), _) => {
            ControlSocket::bind(path).map(Some).map_err(|error| StartError::Listen(error.to_string()))
        }
        (None, Some(path)) => Ok(ControlSocket::bind(path)
            .inspect_err(|error| {
                tracing::warn!("this agent cannot be asked by `agentd status` and the like: {error}");
            })
            .ok()),
        (None, None) => Ok(None),
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    /// Where nothing can be read again, a hangup ends the agent as it ends every program.
    fn new(reloads: bool) -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: if reloads { Some(signal(SignalKind::hangup())?) } else { None },
        })
    }

    async fn next(&mut self) -> Asked {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => {
                    hangup.recv().await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            () = hangup => Asked::Reload,
        }
    }
}

/// What a signal asks for.
enum Asked {
    Stop,
    Reload,
}

fn agent_id(random: u64) -> AgentId {
    format!("agent-{random:016x}").parse().expect("letters, digits and a dash are an agent id")
}

/// A connection as the supervisor sees it.
struct Known {
    commands: mpsc::Sender<Command>,
    since: Instant,
    connection_id: Option<String>,
    open: BTreeSet<TunnelName>,
    /// What the edge did not open on this connection, and why.
    refused: BTreeMap<TunnelName, Refusal>,
    welcomed: bool,
    retiring: bool,
    replace: bool,
    greet_at: Option<Instant>,
    greetings: u32,
    /// What it was opened with.
    token: Token,
    /// When the identity behind it ends.
    identity_ends: Option<Instant>,
    /// When to look for another token before that.
    renew_at: Option<Instant>,
}

/// The way out.
struct Stop {
    outcome: Outcome,
    deadline: Instant,
}

/// Who waits to hear that the edge has confirmed a reload.
#[derive(Default)]
struct Unconfirmed {
    waiting: Vec<(oneshot::Sender<Result<Change, String>>, Change)>,
    until: Option<Instant>,
}

struct Supervisor {
    config: Config,
    source: Option<Source>,
    metrics: Arc<Metrics>,
    audience: Audience,
    wanted: BTreeSet<TunnelName>,
    shared: Arc<Shared>,
    agent: AgentId,
    dialer: Dialer,
    notifier: Notifier,
    backoff: Backoff,
    connections: BTreeMap<Serial, Known>,
    tasks: JoinSet<()>,
    last_serial: Serial,
    report: mpsc::Sender<(Serial, Report)>,
    stop: Option<Stop>,
    /// The public addresses people have been told.
    shown: BTreeMap<TunnelName, String>,
    told_unreachable: bool,
    /// Not before this is the next connection dialled.
    dial_after: Instant,
    /// The connections whose loops have not yet proved that they turn, since the service manager was
    /// last told so.
    unproven: BTreeSet<Serial>,
    /// What is being dialled is out of date.
    redial: bool,
    /// Whether any tunnel was ever open.
    ever_open: bool,
    last_error: Option<String>,
    /// When tunnels that a reload removed are no longer served.
    forget_at: Option<Instant>,
    unconfirmed: Unconfirmed,
    started: Instant,
    started_at: u64,
    loaded_at: u64,
    reloads: u64,
    reload_error: Option<String>,
}

/// What the supervisor does about a next connection.
enum Opening {
    /// Nothing: there is one, or none is wanted.
    Idle,
    /// It waits before the next try.
    Waiting(Instant),
    /// It dials.
    Dialling(Pin<Box<dyn Future<Output = Result<Link, DialError>> + Send>>),
}

impl Supervisor {
    async fn run(
        mut self,
        mut reports: mpsc::Receiver<(Serial, Report)>,
        mut asked: mpsc::Receiver<Ask>,
        mut signals: Signals,
    ) -> Outcome {
        tracing::info!(edge = %self.config.edge.url, tunnels = self.wanted.len(), "agent started");
        if !self.config.edge.url.is_secure() && !self.config.edge.url.is_loopback() {
            tracing::warn!("the edge is not reached over TLS: the token travels in the clear");
        }
        self.notifier.ready();
        self.notifier.status("connecting");
        let mut opening = Opening::Idle;
        let mut watchdog = self.notifier.watchdog().map(tokio::time::interval);
        loop {
            if std::mem::take(&mut self.redial) {
                opening = Opening::Idle;
            }
            if matches!(opening, Opening::Idle) && self.wants_connection() {
                opening = Opening::Waiting(self.dial_after);
            }
            if self.stop.is_some() {
                opening = Opening::Idle;
                if self.connections.is_empty() {
                    break;
                }
            }
            let deadline = self.stop.as_ref().map(|stop| stop.deadline);
            let greet_at = self.connections.values().filter_map(|known| known.greet_at).min();
            let renew_at = self.connections.values().filter_map(|known| known.renew_at).min();
            tokio::select! {
                signal = signals.next() => match signal {
                    Asked::Reload => {
                        // Who is concerned reads it in the log.
                        let _ = self.reload();
                    }
                    Asked::Stop => {
                        if self.stop.is_some() {
                            tracing::warn!("stopped without waiting for what is in flight");
                            break;
                        }
                        self.begin_stop(Outcome::Stopped);
                    }
                },
                Some(ask) = asked.recv() => self.answer(ask, &opening),
                () = at(self.forget_at) => {
                    self.forget_at = None;
                    self.shared.tunnels.forget();
                }
                () = at(self.unconfirmed.until) => self.answer_unconfirmed(false),
                () = at(deadline) => {
                    tracing::warn!("the grace period has passed; what is still in flight is cut off");
                    break;
                }
                () = at(greet_at) => self.greet_again().await,
                () = at(renew_at) => self.renew(),
                Some((serial, report)) = reports.recv() => self.handle(serial, report),
                opened = next_step(&mut opening) => {
                    opening = match opened {
                        None => self.dial(),
                        Some(Ok(link)) => {
                            self.start(link);
                            Opening::Idle
                        }
                        Some(Err(error)) => self.dial_failed(&error),
                    };
                }
                Some(_) = self.tasks.join_next() => {}
                () = tick(watchdog.as_mut()) => self.prove(),
            }
        }
        self.tasks.shutdown().await;
        let outcome = self.stop.map_or(Outcome::Stopped, |stop| stop.outcome);
        tracing::info!("agent stopped");
        outcome
    }

    /// Whether another connection should be opened: there is none to be relied on, and none on its way.
    fn wants_connection(&self) -> bool {
        self.stop.is_none() && !self.connections.values().any(|known| !known.retiring && !known.replace)
    }

    fn dial(&mut self) -> Opening {
        // The token may have been replaced since the last time; what was good once is kept otherwise.
        match self.config.token_source.read() {
            Ok(token) => self.config.token = token,
            Err(error) => tracing::warn!(%error, "the token could not be read again; the last one is used"),
        }
        let (dialer, token) = (self.dialer.clone(), self.config.token.clone());
        Opening::Dialling(Box::pin(async move { dialer.dial(&token).await }))
    }

    fn dial_failed(&mut self, error: &DialError) -> Opening {
        self.metrics.dial_failed(error.reason());
        self.last_error = Some(error.to_string());
        match error.retry() {
            // A token that was put in place of a good one does not end what that one has opened.
            Retry::Never if self.connections.values().any(|known| known.welcomed && !known.retiring) => {
                let delay = self.backoff.lost(Instant::now().into_std(), random::fraction());
                tracing::error!(
                    delay_ms = delay.as_millis() as u64,
                    "{error}; the connection that is open stays in use while it can: {}",
                    self.advice()
                );
                Opening::Waiting(Instant::now() + delay)
            }
            Retry::Never => {
                let advice = self.advice();
                tracing::error!("{error}: {advice}");
                self.tell(|| format!("{error}: {advice}."));
                self.begin_stop(Outcome::IdentityRefused);
                Opening::Idle
            }
            Retry::Later => {
                let delay = self.backoff.lost(Instant::now().into_std(), random::fraction());
                tracing::warn!(
                    attempt = self.backoff.failures(),
                    delay_ms = delay.as_millis() as u64,
                    "cannot connect: {error}"
                );
                if !self.told_unreachable {
                    self.told_unreachable = true;
                    self.tell(|| format!("{error}. Trying again until it works."));
                }
                self.show_status();
                Opening::Waiting(Instant::now() + delay)
            }
        }
    }

    /// What to do about a token that the edge refuses, as far as the token itself tells.
    fn advice(&self) -> String {
        let place = match &self.config.token_source {
            TokenSource::File(path) | TokenSource::Credential(path) => format!("{}", path.display()),
            TokenSource::Value(_) => ENV_TOKEN.to_owned(),
        };
        match self.config.token.says().and_then(|says| says.exp) {
            Some(exp) if exp <= identity::now() => format!(
                "the token ended {}: get a new one (agentd token issue), put it into {place} and start again",
                identity::utc(exp)
            ),
            _ => format!(
                "the token may be revoked, or signed with a key that the edge does not know: agentd token show says what \
                 it claims; put another one into {place} and start again"
            ),
        }
    }

    /// Looks for another token before the identity of a connection ends.
    fn renew(&mut self) {
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
            match self.config.token_source.read() {
                Ok(token) if token != known.token => {
                    tracing::info!("the token was renewed: opening the next connection with it");
                    known.replace = true;
                    self.metrics.reconnected("token_renewed");
                }
                Ok(_) | Err(_) => {
                    let left = end.saturating_duration_since(now);
                    tracing::warn!(
                        left_s = left.as_secs(),
                        "the token ends soon: put a new one in its place"
                    );
                    known.renew_at = (left > RENEW_LAST).then(|| now + left / 2);
                }
            }
        }
    }

    fn start(&mut self, link: Link) {
        self.last_serial += 1;
        let serial = self.last_serial;
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let session = session::Config {
            agent: self.agent.clone(),
            software: report::SOFTWARE.to_owned(),
            jitter: random::fraction(),
        };
        self.tasks.spawn(connection::run(
            serial,
            link,
            Arc::clone(&self.shared),
            session,
            inbox,
            self.report.clone(),
        ));
        self.connections.insert(
            serial,
            Known {
                commands,
                since: Instant::now(),
                connection_id: None,
                open: BTreeSet::new(),
                refused: BTreeMap::new(),
                welcomed: false,
                retiring: false,
                replace: false,
                greet_at: None,
                greetings: 0,
                token: self.config.token.clone(),
                identity_ends: None,
                renew_at: None,
            },
        );
    }

    fn handle(&mut self, serial: Serial, report: Report) {
        match report {
            Report::Welcomed(welcome) => self.welcomed(serial, welcome),
            Report::Replace => {
                if let Some(known) = self.connections.get_mut(&serial) {
                    tracing::info!("opening the next connection ahead of this one's end");
                    known.replace = true;
                    self.metrics.reconnected("planned");
                }
            }
            Report::Alive => self.proved(serial),
            Report::Ended(end) => self.ended(serial, &end),
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

    fn welcomed(&mut self, serial: Serial, welcome: Welcome) {
        let Some(known) = self.connections.get_mut(&serial) else { return };
        if known.retiring {
            return;
        }
        known.open = welcome.tunnels.iter().map(|tunnel| tunnel.name.clone()).collect();
        known.refused = welcome
            .refused
            .iter()
            .filter_map(|refused| Some((refused.name.parse().ok()?, refused.reason)))
            .collect();
        known.connection_id = Some(welcome.connection_id.to_string());
        if !known.welcomed {
            known.welcomed = true;
            self.backoff.connected(Instant::now().into_std());
            self.told_unreachable = false;
            self.last_error = None;
            tracing::info!(connection_id = %welcome.connection_id, tunnels = known.open.len(), "connected");
        }
        let again = welcome.refused.iter().any(|refused| is_passing(refused.reason));
        known.greet_at = again.then(|| {
            let factor = 1u32 << known.greetings.min(4);
            Instant::now() + GREET_AGAIN.mul_f64(f64::from(factor) * (1.0 + random::fraction()))
        });
        known.greetings = if again { known.greetings + 1 } else { 0 };
        self.ever_open |= !welcome.tunnels.is_empty();
        if let (Some(left_ms), None) = (welcome.identity_ms, known.identity_ends) {
            let (now, left) = (Instant::now(), Duration::from_millis(left_ms));
            // An end beyond what the clock can count is none.
            known.identity_ends = now.checked_add(left);
            known.renew_at = known.identity_ends.map(|end| end - (left / 8).min(RENEW_AHEAD));
        }
        for tunnel in welcome.tunnels {
            if let Some(known) = self.shared.tunnels.get(&tunnel.name) {
                known.opened_at(&tunnel.url);
            }
            if self.shown.get(&tunnel.name) != Some(&tunnel.url) {
                tracing::info!(tunnel_id = %tunnel.name, url = tunnel.url, "tunnel is open: {}", tunnel.url);
                let upstream = self.config.tunnels.iter().find(|config| config.name == tunnel.name);
                self.tell(|| match upstream {
                    Some(config) => format!("{}  ->  {}", tunnel.url, config.upstream),
                    None => tunnel.url.clone(),
                });
                self.shown.insert(tunnel.name, tunnel.url);
            }
        }
        for refused in &welcome.refused {
            self.refused(refused);
        }
        // After a reload it may be the file that is wrong; the next one may put it right.
        let hopeless = !self.ever_open
            && !welcome.refused.is_empty()
            && self.connections[&serial].open.is_empty()
            && welcome.refused.iter().all(|refused| is_permanent(refused.reason));
        if hopeless {
            tracing::error!("the edge opens none of the tunnels");
            self.begin_stop(Outcome::IdentityRefused);
            return;
        }
        self.retire_replaced(serial);
        self.show_status();
        if self.is_settled() {
            self.answer_unconfirmed(true);
        }
    }

    fn refused(&self, refused: &RefusedTunnel) {
        // The name is ours as we configured it; what the edge repeats is shortened all the same.
        let name: String = refused.name.chars().filter(|c| !c.is_control()).take(64).collect();
        let advice = advice(refused.reason);
        tracing::error!(tunnel_id = name, reason = ?refused.reason, "tunnel is not open: {name}: {advice}");
        self.tell(|| format!("{name} is not open: {advice}."));
    }

    /// Takes older connections out of service once `serial` serves everything they serve and it can.
    fn retire_replaced(&mut self, serial: Serial) {
        let Some(known) = self.connections.get(&serial) else { return };
        let hopeless = known.refused.iter().filter(|(_, reason)| is_permanent(**reason));
        let settled: BTreeSet<_> = known.open.iter().chain(hopeless.map(|(name, _)| name)).cloned().collect();
        for (_, known) in self.connections.range_mut(..serial) {
            // What a reload removed need not be served by anybody.
            if !known.retiring && known.open.intersection(&self.wanted).all(|name| settled.contains(name)) {
                known.retire(REPLACED_QUIET);
            }
        }
    }

    fn ended(&mut self, serial: Serial, end: &End) {
        let Some(known) = self.connections.remove(&serial) else { return };
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
        self.show_status();
    }

    async fn greet_again(&mut self) {
        let now = Instant::now();
        for known in self.connections.values_mut() {
            if known.greet_at.is_some_and(|due| due <= now) {
                known.greet_at = None;
                let _ = known.commands.send(Command::Greet).await;
            }
        }
    }

    fn begin_stop(&mut self, outcome: Outcome) {
        if self.stop.is_some() {
            return;
        }
        let grace_period = self.config.grace_period;
        tracing::info!(grace_ms = grace_period.as_millis() as u64, "stopping");
        self.notifier.stopping(grace_period);
        self.notifier.status("stopping: finishing what is in flight");
        self.stop = Some(Stop { outcome, deadline: Instant::now() + grace_period });
        for known in self.connections.values_mut() {
            known.retire(STOP_QUIET);
        }
    }

    /// The connection that public requests come through.
    fn current(&self) -> Option<&Known> {
        self.connections.values().rev().find(|known| known.welcomed && !known.retiring)
    }

    fn show_status(&self) {
        let serving = self.connections.values().filter(|known| known.welcomed && !known.retiring).count();
        self.metrics.in_service(serving, self.current().map_or(0, |known| known.open.len()));
        if self.stop.is_some() {
            return;
        }
        match self.current() {
            Some(known) => self.notifier.status(&format!(
                "connected, {} of {} tunnels open",
                known.open.len(),
                self.wanted.len()
            )),
            None => self.notifier.status("connecting"),
        }
    }

    /// Reads the configuration again and makes it so. What cannot be read, or cannot be made so, changes
    /// nothing.
    fn reload(&mut self) -> Result<Change, String> {
        if self.stop.is_some() {
            return Err("the agent is stopping".to_owned());
        }
        self.notifier.reloading();
        let outcome = self.try_reload();
        match &outcome {
            Ok(change) => {
                self.reloads += 1;
                self.loaded_at = unix_now().as_secs();
                self.reload_error = None;
                self.metrics.reloaded("ok");
                tracing::info!(
                    added = change.added.join(","),
                    removed = change.removed.join(","),
                    changed = change.changed.join(","),
                    unchanged = change.unchanged,
                    reconnects = change.reconnects,
                    "configuration {}",
                    change.summary()
                );
                for setting in &change.at_restart {
                    tracing::warn!(setting, "this setting takes effect when the agent is started again");
                }
            }
            Err(error) => {
                self.reload_error = Some(error.clone());
                self.metrics.reloaded("failed");
                tracing::error!("the reload failed and changed nothing: {error}");
            }
        }
        self.notifier.ready();
        self.show_status();
        outcome
    }

    fn try_reload(&mut self) -> Result<Change, String> {
        let source = self.source.as_ref().ok_or("this agent runs without a configuration file")?;
        let new = config::load(&source.path, &source.overrides).map_err(|error| error.to_string())?;
        let dialer = Dialer::new(new.edge.url.clone(), new.edge.ca_file.as_deref());
        let dialer = dialer.map_err(|error| error.to_string())?;
        let tunnels = &self.shared.tunnels;
        let prepared =
            tunnels.prepare(&new.tunnels, new.max_concurrent).map_err(|error| error.to_string())?;
        // From here on nothing fails.
        let change = Change::between(&self.config, &new);
        tunnels.replace(prepared);
        self.wanted = tunnels.names().into_iter().collect();
        self.shown.retain(|name, _| self.wanted.contains(name));
        self.dialer = dialer;
        self.config = new;
        if !change.removed.is_empty() {
            self.forget_at = Some(Instant::now() + LEAVING);
        }
        for known in self.connections.values_mut().filter(|known| !known.retiring) {
            if change.reconnects && !known.replace {
                known.replace = true;
                self.metrics.reconnected("reload");
            }
            if change.changes_names() {
                known.greet_at = Some(Instant::now());
                known.greetings = 0;
            }
        }
        if change.reconnects {
            self.redial = true;
            self.dial_after = Instant::now();
        }
        Ok(change)
    }

    /// Whether the connection that shall serve has been told everything and has answered.
    fn is_settled(&self) -> bool {
        self.current().is_some_and(|known| {
            !known.replace
                && known.greet_at.is_none()
                && known.open.iter().chain(known.refused.keys()).collect::<BTreeSet<_>>()
                    == self.wanted.iter().collect()
        })
    }

    fn answer(&mut self, ask: Ask, opening: &Opening) {
        // Whoever asked may have left.
        match ask {
            Ask::Status(answer) => drop(answer.send(self.status(opening))),
            Ask::Reload(answer) => match self.reload() {
                Err(error) => drop(answer.send(Err(error))),
                Ok(change) => {
                    let confirmed = self.is_settled();
                    if confirmed || self.current().is_none() {
                        drop(answer.send(Ok(Change { confirmed, ..change })));
                    } else {
                        self.unconfirmed.waiting.push((answer, change));
                        self.unconfirmed.until = Some(Instant::now() + CONFIRMATION);
                    }
                }
            },
            Ask::Stop(answer) => {
                self.begin_stop(Outcome::Stopped);
                let _ = answer.send(Stopping {
                    pid: std::process::id(),
                    in_flight: self.tunnel_statuses().iter().map(|tunnel| tunnel.figures.in_flight).sum(),
                    grace_ms: self.config.grace_period.as_millis() as u64,
                });
            }
        }
    }

    fn answer_unconfirmed(&mut self, confirmed: bool) {
        let Unconfirmed { waiting, until: _ } = std::mem::take(&mut self.unconfirmed);
        for (answer, change) in waiting {
            drop(answer.send(Ok(Change { confirmed, ..change })));
        }
    }

    fn status(&self, opening: &Opening) -> Status {
        let now = Instant::now();
        let state = match (&self.stop, self.current()) {
            (Some(_), _) => LinkState::Stopping,
            (None, Some(_)) => LinkState::Connected,
            (None, None) => LinkState::Connecting,
        };
        let connections = self.connections.values().rev().map(|known| ConnectionStatus {
            connection_id: known.connection_id.clone(),
            state: match known {
                Known { retiring: true, .. } => ConnectionState::Retiring,
                Known { welcomed: false, .. } => ConnectionState::Greeting,
                Known { replace: true, .. } => ConnectionState::BeingReplaced,
                Known { .. } => ConnectionState::Serving,
            },
            age_secs: now.duration_since(known.since).as_secs(),
            tunnels_open: known.open.len(),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            agent_id: self.agent.to_string(),
            started_at: self.started_at,
            uptime_secs: now.duration_since(self.started).as_secs(),
            systemd: self.notifier.is_managed(),
            edge: EdgeStatus {
                url: self.config.edge.url.to_string(),
                state,
                connections: connections.collect(),
                failures: if state == LinkState::Connecting { self.backoff.failures() } else { 0 },
                next_try_ms: match opening {
                    Opening::Waiting(at) => Some(at.saturating_duration_since(now).as_millis() as u64),
                    Opening::Idle | Opening::Dialling(_) => None,
                },
                last_error: self.last_error.clone(),
            },
            config: ConfigStatus {
                file: self.source.as_ref().map(|source| source.path.display().to_string()),
                loaded_at: self.loaded_at,
                reloads: self.reloads,
                last_error: self.reload_error.clone(),
            },
            tunnels: self.tunnel_statuses(),
        }
    }

    fn tunnel_statuses(&self) -> Vec<TunnelStatus> {
        let current = self.current();
        let describe = |config: &TunnelConfig| {
            let tunnel = self.shared.tunnels.get(&config.name);
            let state = match current {
                Some(known) if known.open.contains(&config.name) => TunnelState::Open,
                Some(known) => match known.refused.get(&config.name) {
                    Some(&reason) => TunnelState::Refused { reason: advice(reason).to_owned() },
                    None => TunnelState::Opening,
                },
                None => TunnelState::Opening,
            };
            TunnelStatus {
                name: config.name.to_string(),
                state,
                url: self.shown.get(&config.name).cloned(),
                upstream: config.upstream.to_string(),
                health: tunnel.as_ref().map_or(HealthState::Unchecked, |tunnel| tunnel.health()),
                max_concurrent: config.max_concurrent,
                figures: tunnel.map(|tunnel| tunnel.metrics().figures()).unwrap_or_default(),
            }
        };
        self.config.tunnels.iter().map(describe).collect()
    }

    /// Tells whoever sits at the terminal.
    fn tell(&self, text: impl FnOnce() -> String) {
        if let Audience::People(terminal) = &self.audience {
            terminal.line(text());
        }
    }
}

impl Known {
    fn retire(&mut self, quiet: Duration) {
        self.retiring = true;
        self.greet_at = None;
        self.renew_at = None;
        // Four places are more than a connection is ever sent; one that has ended takes none.
        let _ = self.commands.try_send(Command::Retire { quiet });
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn tick(interval: Option<&mut tokio::time::Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// `None` when it is time to dial, otherwise what dialling came to.
///
/// # Cancel safety
///
/// The future under way is kept in `opening`.
async fn next_step(opening: &mut Opening) -> Option<Result<Link, DialError>> {
    match opening {
        Opening::Idle => std::future::pending().await,
        Opening::Waiting(until) => {
            sleep_until(*until).await;
            None
        }
        Opening::Dialling(dialling) => Some(dialling.await),
    }
}
