//! The supervisor: keeps one connection in service, opens the next before the old one ends, and
//! stops in order.
//!
//! Enters: the configuration, reports of the connections, signals. Leaves: an [`Outcome`].

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
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
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    access::AccessLog,
    config::Config,
    connection::{self, Command, End, Report, Seen, Serial, Shared},
    credential::{ENV_TOKEN, Token, TokenSource},
    identity,
    link::{DialError, Dialer, Link, Retry},
    systemd::Notifier,
    telemetry::Terminal,
    tunnel::Tunnels,
    upstream::tls::TlsError,
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

/// Reports that wait for the driver. A connection that finds it full waits.
const REPORTS: usize = 64;

/// A connection is sent few commands.
const COMMANDS: usize = 4;

/// How the agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to stop, and did.
    Stopped,
    /// The edge does not accept the token, or none of the tunnels: trying again is of no use.
    IdentityRefused,
}

/// Why the agent could not begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS settings are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system gives no signals or no random numbers.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// Who is told what, beside the log.
#[derive(Debug, Clone)]
pub enum Audience {
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
pub async fn run(config: Config, audience: Audience) -> Result<Outcome, StartError> {
    let signals = Signals::new()?;
    let tunnels = Arc::new(Tunnels::new(&config.tunnels)?);
    let dialer = Dialer::new(config.edge.url.clone(), config.edge.ca_file.as_deref())?;
    let access = match &audience {
        Audience::Service => AccessLog::Log,
        Audience::People(terminal) => AccessLog::People(terminal.clone()),
    };
    let (report, reports) = mpsc::channel(REPORTS);
    let driver = Driver {
        wanted: tunnels.names().into_iter().collect(),
        shared: Arc::new(Shared { tunnels, access, seen: Mutex::new(Seen::default()) }),
        agent: agent_id(getrandom::u64().map_err(std::io::Error::other)?),
        token: config.token.clone(),
        config,
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
    };
    Ok(driver.run(reports, signals).await)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn agent_id(random: u64) -> AgentId {
    format!("agent-{random:016x}").parse().expect("letters, digits and a dash are an agent id")
}

/// Uniform in `[0, 1)`.
fn random_fraction() -> f64 {
    // 53 bits are what a double holds. Without randomness every agent waits the same: half.
    getrandom::u64().map_or(0.5, |random| (random >> 11) as f64 / (1u64 << 53) as f64)
}

/// A connection as the driver sees it.
struct Known {
    commands: mpsc::Sender<Command>,
    open: BTreeSet<TunnelName>,
    /// What the edge will not open on this connection whatever happens.
    hopeless: BTreeSet<TunnelName>,
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

struct Driver {
    config: Config,
    audience: Audience,
    wanted: BTreeSet<TunnelName>,
    shared: Arc<Shared>,
    agent: AgentId,
    token: Token,
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
}

/// What the driver does about a next connection.
enum Opening {
    /// Nothing: there is one, or none is wanted.
    Idle,
    /// It waits before the next try.
    Waiting(Instant),
    /// It dials.
    Dialling(Pin<Box<dyn Future<Output = Result<Link, DialError>> + Send>>),
}

impl Driver {
    async fn run(mut self, mut reports: mpsc::Receiver<(Serial, Report)>, mut signals: Signals) -> Outcome {
        tracing::info!(edge = %self.config.edge.url, tunnels = self.wanted.len(), "agent started");
        if !self.config.edge.url.is_secure() && !self.config.edge.url.is_loopback() {
            tracing::warn!("the edge is not reached over TLS: the token travels in the clear");
        }
        self.notifier.ready();
        self.notifier.status("connecting");
        let mut opening = Opening::Idle;
        let mut watchdog = self.notifier.watchdog().map(tokio::time::interval);
        loop {
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
                () = signals.stop() => {
                    if self.stop.is_some() {
                        tracing::warn!("stopped without waiting for what is in flight");
                        break;
                    }
                    self.begin_stop(Outcome::Stopped);
                }
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
            Ok(token) => self.token = token,
            Err(error) => tracing::warn!(%error, "the token could not be read again; the last one is used"),
        }
        let (dialer, token) = (self.dialer.clone(), self.token.clone());
        Opening::Dialling(Box::pin(async move { dialer.dial(&token).await }))
    }

    fn dial_failed(&mut self, error: &DialError) -> Opening {
        match error.retry() {
            // A token that was put in place of a good one does not end what that one has opened.
            Retry::Never if self.connections.values().any(|known| known.welcomed && !known.retiring) => {
                let delay = self.backoff.lost(Instant::now().into_std(), random_fraction());
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
                let delay = self.backoff.lost(Instant::now().into_std(), random_fraction());
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
        match self.token.says().and_then(|says| says.exp) {
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
            software: crate::SOFTWARE.to_owned(),
            jitter: random_fraction(),
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
                open: BTreeSet::new(),
                hopeless: BTreeSet::new(),
                welcomed: false,
                retiring: false,
                replace: false,
                greet_at: None,
                greetings: 0,
                token: self.token.clone(),
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
                }
            }
            Report::Alive => self.proved(serial),
            Report::Ended(end) => self.ended(serial, &end),
        }
    }

    /// Asks every connection whether its loop turns. The service manager hears of it once all have
    /// answered: one that hangs gets this process restarted, although the driver itself is well.
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
        known.hopeless = welcome
            .refused
            .iter()
            .filter(|refused| is_permanent(refused.reason))
            .filter_map(|refused| refused.name.parse().ok())
            .collect();
        if !known.welcomed {
            known.welcomed = true;
            self.backoff.connected(Instant::now().into_std());
            self.told_unreachable = false;
            tracing::info!(connection_id = %welcome.connection_id, tunnels = known.open.len(), "connected");
        }
        let again = welcome.refused.iter().any(|refused| is_passing(refused.reason));
        known.greet_at = again.then(|| {
            let factor = 1u32 << known.greetings.min(4);
            Instant::now() + GREET_AGAIN.mul_f64(f64::from(factor) * (1.0 + random_fraction()))
        });
        known.greetings = if again { known.greetings + 1 } else { 0 };
        if let (Some(left_ms), None) = (welcome.identity_ms, known.identity_ends) {
            let (now, left) = (Instant::now(), Duration::from_millis(left_ms));
            // An end beyond what the clock can count is none.
            known.identity_ends = now.checked_add(left);
            known.renew_at = known.identity_ends.map(|end| end - (left / 8).min(RENEW_AHEAD));
        }
        for tunnel in welcome.tunnels {
            if self.shown.get(&tunnel.name) != Some(&tunnel.url) {
                tracing::info!(tunnel_id = %tunnel.name, url = tunnel.url, "tunnel is open");
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
        let hopeless = !welcome.refused.is_empty()
            && self.connections[&serial].open.is_empty()
            && welcome.refused.iter().all(|refused| is_permanent(refused.reason));
        if hopeless {
            tracing::error!("the edge opens none of the tunnels");
            self.begin_stop(Outcome::IdentityRefused);
            return;
        }
        self.retire_replaced(serial);
        self.show_status();
    }

    fn refused(&self, refused: &RefusedTunnel) {
        // The name is ours as we configured it; what the edge repeats is shortened all the same.
        let name: String = refused.name.chars().filter(|c| !c.is_control()).take(64).collect();
        let advice = match refused.reason {
            Refusal::InvalidName => "choose a name of a-z, 0-9 and '-'",
            Refusal::ReservedName => "the name is reserved: choose another",
            Refusal::NotAllowed => "the token does not cover this name: use another name or another token",
            Refusal::NameTaken => "the name belongs to somebody else: choose another",
            Refusal::TooMany => "too many tunnels for one agent: run a second agent for the rest",
            Refusal::TooManyConnections => {
                "as many agents are connected as the owner or the tunnel may have: it will be asked again"
            }
            Refusal::TooManyTunnels => {
                "as many tunnels are open as the owner may have: close another one; it will be asked again"
            }
            Refusal::TryAgain => "the edge could not open it now: it will be asked again",
            Refusal::Other => "the edge gave a reason this version does not know: update agentd",
        };
        tracing::error!(tunnel_id = name, reason = ?refused.reason, "tunnel is not open: {advice}");
        self.tell(|| format!("{name} is not open: {advice}."));
    }

    /// Takes older connections out of service once `serial` serves everything they serve and it can.
    fn retire_replaced(&mut self, serial: Serial) {
        let Some(known) = self.connections.get(&serial) else { return };
        let settled: BTreeSet<_> = known.open.union(&known.hopeless).cloned().collect();
        for (_, known) in self.connections.range_mut(..serial) {
            if !known.retiring && known.open.is_subset(&settled) {
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
            // Also an edge that closes what it has just accepted is not asked again at once.
            let now = Instant::now();
            let delay = self.backoff.lost(now.into_std(), random_fraction());
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

    fn show_status(&self) {
        if self.stop.is_some() {
            return;
        }
        let current = self.connections.values().rev().find(|known| known.welcomed && !known.retiring);
        match current {
            Some(known) => self.notifier.status(&format!(
                "connected, {} of {} tunnels open",
                known.open.len(),
                self.wanted.len()
            )),
            None => self.notifier.status("connecting"),
        }
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

/// Whether a tunnel refused for this reason stays refused until somebody changes something.
const fn is_permanent(reason: Refusal) -> bool {
    match reason {
        Refusal::InvalidName | Refusal::ReservedName | Refusal::NotAllowed | Refusal::NameTaken => true,
        Refusal::TooMany
        | Refusal::TooManyConnections
        | Refusal::TooManyTunnels
        | Refusal::TryAgain
        | Refusal::Other => false,
    }
}

/// Whether asking again in a moment may help.
const fn is_passing(reason: Refusal) -> bool {
    matches!(reason, Refusal::TooManyConnections | Refusal::TooManyTunnels | Refusal::TryAgain)
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
