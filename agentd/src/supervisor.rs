//! The supervisor: what the agent does when something happens that concerns all of it: it starts, tells
//! people and the service manager how it is, reloads, and stops in order.
//!
//! Enters: a [`Setup`], [`News`] of the connections, signals, what the control socket asks. Leaves: an
//! [`Outcome`].

mod inspection;
mod reloads;
mod signals;
mod status;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use proto::{
    delivery::PolicyNotice,
    id::{AgentId, TunnelName},
    message::{RefusedTunnel, Welcome},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

pub(crate) use self::reloads::Source;
use self::{
    inspection::Inspection,
    reloads::{Answer, Fresh, Reloads},
    signals::{Asked, Signals},
    status::Birth,
};
use crate::{
    capture::ring::Captures,
    config::{Config, change::Change},
    control::{self, Ask, Control, ControlSocket, SocketError, Stopping},
    inspect::screen::Screen,
    link::{
        dial::{DialError, Dialer},
        refusal::{advice, is_permanent},
        rotation::{News, Rotation},
    },
    report::{access::AccessLog, metrics::Metrics, status::noticed, systemd::Notifier, telemetry::Terminal},
    serve::tunnel::Tunnels,
    timer::at,
    tls::TlsError,
};

/// How long tunnels that a reload removed are still served: until the edge has taken the news, and
/// requests that were dispatched just before have arrived.
const LEAVING: Duration = Duration::from_secs(15);

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
    /// The screen on which requests are shown.
    pub screen: Option<Screen>,
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
    People {
        /// Where they read.
        terminal: Terminal,
        /// Whether they are told where the inspector's page is. What is read by programs stays as it is.
        page: bool,
    },
}

/// Runs the agent until it is stopped. `ready` is called once nothing can keep it from serving any more.
///
/// # Errors
///
/// [`StartError`] when it cannot begin. An edge or an upstream that cannot be reached is no error.
pub(crate) async fn run(setup: Setup, ready: impl FnOnce()) -> Result<Outcome, StartError> {
    let Setup { config, source, audience, control_socket, screen } = setup;
    raise_descriptor_limit();
    let signals = Signals::new(source.is_some())?;
    let metrics = Arc::new(Metrics::new());
    let captures = Arc::new(Captures::new(config.inspect.memory));
    let tunnels =
        Tunnels::new(&config.tunnels, config.max_concurrent, Arc::clone(&metrics), Arc::clone(&captures))?;
    let tunnels = Arc::new(tunnels);
    let dialer = Dialer::new(config.edge.url.clone(), config.edge.ca_file.as_deref())?;
    let access = match &audience {
        Audience::Service => AccessLog::Log,
        Audience::People { terminal, .. } => AccessLog::People(terminal.clone()),
    };
    let (asks, asked) = mpsc::channel(control::ASKS);
    let mut servers = JoinSet::new();
    let notifier = Notifier::from_env();
    let agent = agent_id(getrandom::u64().map_err(std::io::Error::other)?);
    let links = Rotation::new(
        agent.clone(),
        dialer,
        &config,
        Arc::clone(&tunnels),
        access,
        Arc::clone(&metrics),
        notifier,
    );
    let inspection = Inspection::new(captures, Arc::clone(&tunnels), links.desk().clone(), &config)?;
    let control = Control::new(asks, Arc::clone(&metrics), inspection.inspector().clone());
    // Whoever is to watch the agent must not end it: where its place is taken, the tunnels are served without.
    let named = config.control_socket.clone();
    if let Some(path) = named.clone().or(control_socket) {
        match ControlSocket::bind(&path) {
            Ok(socket) => drop(servers.spawn(control.clone().serve_socket(socket))),
            // Whoever started it sees this, and systemd would start it again for ever.
            Err(error) if named.is_some() && !notifier.is_managed() => {
                return Err(StartError::Listen(error.to_string()));
            }
            Err(error) => {
                tracing::warn!("this agent cannot be asked by `agentd status` and the like: {error}");
                if matches!(error, SocketError::Taken(_)) {
                    servers.spawn(control.clone().serve_socket_once_free(path));
                }
            }
        }
    }
    if let Some(address) = config.status_address {
        match control::listen(address).await {
            Ok(listener) => drop(servers.spawn(control.serve_loopback(listener))),
            Err(error) => {
                tracing::error!(
                    "status_address {address}: {error}; the agent goes on without /healthz, /ready and /metrics \
                     until it is free: name another address, or end who has it"
                );
                servers.spawn(control.serve_loopback_once_free(address));
            }
        }
    }
    let mut supervisor = Supervisor {
        birth: Birth::now(agent, notifier.is_managed()),
        links,
        reloads: Reloads::new(source, metrics),
        inspection,
        config,
        tunnels,
        audience,
        notifier,
        stop: None,
        shown: BTreeMap::new(),
        told_unreachable: false,
        ever_open: false,
        told_not_kept: false,
        told_policies: BTreeMap::new(),
        forget_at: None,
    };
    supervisor.inspect();
    if let Some(screen) = screen {
        let inspector = supervisor.inspection.inspector().clone();
        servers.spawn(screen.run(inspector, supervisor.inspection.url()));
    }
    ready();
    let outcome = supervisor.run(asked, signals).await;
    servers.shutdown().await;
    Ok(outcome)
}

/// Each request may hold two descriptors, and the usual soft limit is 1,024 for the sake of programs that use `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

fn agent_id(random: u64) -> AgentId {
    format!("agent-{random:016x}").parse().expect("letters, digits and a dash are an agent id")
}

/// The way out.
struct Stop {
    outcome: Outcome,
    deadline: Instant,
}

struct Supervisor {
    birth: Birth,
    config: Config,
    tunnels: Arc<Tunnels>,
    links: Rotation,
    reloads: Reloads,
    inspection: Inspection,
    audience: Audience,
    notifier: Notifier,
    stop: Option<Stop>,
    /// The public addresses people have been told.
    shown: BTreeMap<TunnelName, String>,
    told_unreachable: bool,
    /// Whether any tunnel was ever open.
    ever_open: bool,
    /// Whether it was said that the edge keeps no deliveries.
    told_not_kept: bool,
    /// What was said about the tunnels' policies.
    told_policies: BTreeMap<TunnelName, PolicyNotice>,
    /// When tunnels that a reload removed are no longer served.
    forget_at: Option<Instant>,
}

impl Supervisor {
    async fn run(mut self, mut asked: mpsc::Receiver<Ask>, mut signals: Signals) -> Outcome {
        tracing::info!(edge = %self.config.edge.url, tunnels = self.config.tunnels.len(), "agent started");
        if !self.config.edge.url.is_secure() && !self.config.edge.url.is_loopback() {
            tracing::warn!("the edge is not reached over TLS: the token travels in the clear");
        }
        self.notifier.ready();
        self.notifier.status("connecting");
        loop {
            if self.stop.is_some() && self.links.is_empty() {
                break;
            }
            let deadline = self.stop.as_ref().map(|stop| stop.deadline);
            let confirm_by = self.reloads.confirm_by();
            tokio::select! {
                signal = signals.next() => match signal {
                    // Who is concerned reads in the log how it went.
                    Asked::Reload => self.reload(None),
                    Asked::Leave if self.stop.is_some() => {}
                    Asked::Leave | Asked::Stop => {
                        if self.stop.is_some() {
                            tracing::warn!("stopped without waiting for what is in flight");
                            break;
                        }
                        self.begin_stop(Outcome::Stopped);
                    }
                },
                Some(ask) = asked.recv() => self.answer(ask),
                () = at(self.forget_at) => {
                    self.forget_at = None;
                    self.tunnels.forget();
                }
                (answers, read) = self.reloads.read() => self.finish_reload(answers, read),
                () = at(confirm_by) => self.reloads.answer_waiting(false),
                () = at(deadline) => {
                    tracing::warn!("the grace period has passed; what is still in flight is cut off");
                    break;
                }
                news = self.links.next() => self.hear(news),
            }
        }
        self.links.shutdown().await;
        let outcome = self.stop.map_or(Outcome::Stopped, |stop| stop.outcome);
        tracing::info!("agent stopped");
        outcome
    }

    fn hear(&mut self, news: News) {
        match news {
            News::Welcomed(welcome) => self.welcomed(*welcome),
            News::Unreachable(error) => {
                if !self.told_unreachable {
                    self.told_unreachable = true;
                    self.tell(|| format!("{error}. Trying again until it works."));
                }
                self.show_status();
            }
            News::TokenRefused(error) => self.token_refused(&error),
            News::Ended => self.show_status(),
        }
    }

    fn token_refused(&mut self, error: &DialError) {
        let advice = self.links.token_advice();
        tracing::error!("{error}: {advice}");
        self.tell(|| format!("{error}: {advice}."));
        self.begin_stop(Outcome::IdentityRefused);
    }

    fn welcomed(&mut self, welcome: Welcome) {
        self.told_unreachable = false;
        self.ever_open |= !welcome.tunnels.is_empty();
        let none_open = welcome.tunnels.is_empty();
        // What holds again may be said once more.
        for tunnel in &welcome.tunnels {
            if !welcome.policies.iter().any(|notice| notice.name == tunnel.name.as_str()) {
                self.told_policies.remove(&tunnel.name);
            }
        }
        let reply_timeout = welcome.reply_timeout_ms.map(Duration::from_millis);
        for tunnel in welcome.tunnels {
            if let Some(known) = self.tunnels.get(&tunnel.name) {
                known.opened_at(&tunnel.url);
                if let Some(reply_timeout) = reply_timeout {
                    known.edge_waits(reply_timeout);
                }
            }
            if self.shown.get(&tunnel.name) != Some(&tunnel.url) {
                tracing::info!(tunnel_id = %tunnel.name, url = tunnel.url, "tunnel is open: {}", tunnel.url);
                let upstream = self.config.tunnels.iter().find(|config| config.name == tunnel.name);
                self.tell(|| match upstream {
                    Some(config) => format!("{}  ->  {}", tunnel.url, config.leads_to()),
                    None => tunnel.url.clone(),
                });
                self.shown.insert(tunnel.name, tunnel.url);
            }
        }
        if !welcome.deliveries {
            self.warn_of_loss();
        }
        for notice in &welcome.policies {
            self.warn_of_policy(notice);
        }
        for refused in &welcome.refused {
            self.refused(refused);
        }
        // After a reload it may be the file that is wrong; the next one may put it right.
        let hopeless = !self.ever_open
            && none_open
            && !welcome.refused.is_empty()
            && welcome.refused.iter().all(|refused| is_permanent(refused.reason));
        if hopeless {
            tracing::error!("the edge opens none of the tunnels");
            self.begin_stop(Outcome::IdentityRefused);
            return;
        }
        self.show_status();
        if self.links.is_settled() {
            self.reloads.answer_waiting(true);
        }
    }

    /// Says, once, that the edge does not keep what it shall.
    fn warn_of_loss(&mut self) {
        let mut keeps = self.config.tunnels.iter().filter(|tunnel| tunnel.delivery.is_some());
        if let Some(tunnel) = keeps.next().filter(|_| !self.told_not_kept) {
            let text = format!(
                "this edge keeps no deliveries, so requests for {} are lost while no agent is connected: upgrade the edge",
                tunnel.name
            );
            tracing::warn!(tunnel_id = %tunnel.name, "{text}");
            self.told_not_kept = true;
        }
    }

    /// Says what of a tunnel's deliveries does not hold as it is configured; once, for each connection hears the same.
    fn warn_of_policy(&mut self, notice: &PolicyNotice) {
        let Some(tunnel) = self.config.tunnels.iter().find(|tunnel| tunnel.name.as_str() == notice.name)
        else {
            return;
        };
        let name = tunnel.name.clone();
        if self.told_policies.get(&name) == Some(notice) {
            return;
        }
        let text = noticed(notice);
        tracing::warn!(tunnel_id = %name, holds = ?notice.holds, "deliveries of {name}: {text}");
        self.tell(|| format!("Deliveries of {name}: {text}."));
        self.told_policies.insert(name, notice.clone());
    }

    fn refused(&mut self, refused: &RefusedTunnel) {
        // Nobody reaches it there any more.
        self.shown.retain(|name, _| name.as_str() != refused.name);
        // The name is ours as we configured it; what the edge repeats is shortened all the same.
        let name: String = refused.name.chars().filter(|c| !c.is_control()).take(64).collect();
        let advice = advice(refused.reason);
        tracing::error!(tunnel_id = name, reason = ?refused.reason, "tunnel is not open: {name}: {advice}");
        self.tell(|| format!("{name} is not open: {advice}."));
    }

    fn answer(&mut self, ask: Ask) {
        // Whoever asked may have left.
        match ask {
            Ask::Status(answer) => {
                let tunnels = status::tunnels(&self.config, &self.tunnels, &self.links, &self.shown);
                drop(answer.send(self.birth.status(
                    self.links.status(),
                    self.reloads.status(),
                    tunnels,
                    self.tunnels.removed(),
                    self.inspection.url(),
                )));
            }
            Ask::Reload(answer) => self.reload(Some(answer)),
            Ask::Stop(answer) => {
                self.begin_stop(Outcome::Stopped);
                let _ = answer.send(Stopping {
                    pid: std::process::id(),
                    in_flight: self.tunnels.in_flight().into(),
                    grace_ms: self.config.grace_period.as_millis() as u64,
                });
            }
        }
    }

    /// Has the configuration read again, after a reading that goes on. What cannot be read, or cannot be made so, changes
    /// nothing.
    fn reload(&mut self, answer: Option<Answer>) {
        self.reloads.ask(answer);
        if self.stop.is_some() {
            self.reloads.give_up("the agent is stopping");
        }
        self.begin_reload();
    }

    fn begin_reload(&mut self) {
        if self.reloads.begin(&self.tunnels) {
            self.notifier.reloading();
        }
    }

    fn finish_reload(&mut self, answers: Vec<Answer>, read: Result<Fresh, String>) {
        let outcome = read.and_then(|fresh| self.make_so(fresh));
        self.reloads.note(&outcome);
        self.notifier.ready();
        self.show_status();
        let confirmed = self.links.is_settled();
        for answer in answers {
            match &outcome {
                Ok(change) if !confirmed && self.links.open().is_some() => {
                    self.reloads.wait(answer, change.clone());
                }
                // Whoever asked may have left.
                Ok(change) => drop(answer.send(Ok(Change { confirmed, ..change.clone() }))),
                Err(error) => drop(answer.send(Err(error.clone()))),
            }
        }
        self.begin_reload();
    }

    fn make_so(&mut self, fresh: Fresh) -> Result<Change, String> {
        let Fresh { config: new, dialer, tunnels: prepared } = fresh;
        self.inspection.check(&new)?;
        // From here on nothing fails.
        self.config.token = self.links.token().clone();
        let change = Change::between(&self.config, &new);
        self.tunnels.replace(prepared);
        let wanted = self.tunnels.names();
        self.shown.retain(|name, _| wanted.contains(name));
        self.links.reload(dialer, &new, &change);
        self.config = new;
        self.inspect();
        if !change.removed.is_empty() {
            self.forget_at = Some(Instant::now() + LEAVING);
        }
        Ok(change)
    }

    /// Has the inspector listen if there is something to inspect, and only then.
    fn inspect(&mut self) {
        if let Some(address) = self.inspection.align(&self.config) {
            tracing::info!("the inspector is at http://{address}");
            if matches!(self.audience, Audience::People { page: true, .. }) {
                self.tell(|| format!("http://{address}  ->  every request, to look at and to send again"));
            }
        }
    }

    fn begin_stop(&mut self, outcome: Outcome) {
        if self.stop.is_some() {
            return;
        }
        let grace_period = self.config.grace_period;
        tracing::info!(grace_ms = grace_period.as_millis() as u64, "stopping");
        self.reloads.give_up("the agent is stopping");
        self.notifier.stopping(grace_period);
        self.notifier.status("stopping: finishing what is in flight");
        self.stop = Some(Stop { outcome, deadline: Instant::now() + grace_period });
        self.links.stop();
    }

    /// Tells the service manager how the link is.
    fn show_status(&self) {
        if self.stop.is_some() {
            return;
        }
        match self.links.open() {
            Some(open) => {
                let wanted = self.config.tunnels.len();
                self.notifier.status(&format!("connected, {open} of {wanted} tunnels open"));
            }
            None => self.notifier.status("connecting"),
        }
    }

    /// Tells whoever sits at the terminal.
    fn tell(&self, text: impl FnOnce() -> String) {
        if let Audience::People { terminal, .. } = &self.audience {
            terminal.line(text());
        }
    }
}
