//! `agentd diagnose`: goes the way of a connection and of a public request step by step and says where it
//! ends.
//!
//! Enters: the configuration, and the running agent if there is one. Leaves: a [`Report`] of grouped lines
//! and an exit code. Nothing in it is secret: no token, no header value, no body. Where no agent runs, this
//! program is one for the moment: it opens the tunnels and serves whatever comes through them meanwhile.

mod report;

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use http::{HeaderValue, Method, Request, Uri, header};
use proto::{
    id::{AgentId, TunnelName},
    message::Welcome,
    session,
};
use tokio::{
    net::{TcpStream, lookup_host},
    sync::mpsc,
    time::timeout,
};

use self::report::{Report, Verdict};
use crate::{
    capture::ring::Captures,
    config::edge_url::EdgeUrl,
    config::{
        Config, ConfigError, Http2, TunnelConfig,
        address::{Address, Scheme},
    },
    control::client::Agent,
    identity,
    link::connection::{self, Command, Report as FromConnection, Seen, Shared},
    link::dial::{DialError, Dialer},
    link::refusal::advice,
    link::websocket::Link,
    operate::exit,
    operate::output::{answer, complain, print},
    random,
    report::SOFTWARE,
    report::access::AccessLog,
    report::cause,
    report::metrics::Metrics,
    report::status::{Status, TunnelState},
    serve::tunnel::Tunnels,
    serve::upstream::{RequestBody, Tls, Upstream, UpstreamError, Way},
    tls::{Trust, client_config},
};

/// No single step takes longer.
const STEP_TIMEOUT: Duration = Duration::from_secs(15);

/// A token that ends sooner is worth a warning.
const TOKEN_ENDS_SOON_SECS: u64 = 7 * 24 * 60 * 60;

/// How long this program waits for what came through its tunnels, when it was an agent for the moment.
const LAST_REQUESTS: Duration = Duration::from_secs(10);

/// Runs the diagnosis, prints it, and writes it to `file` as well.
pub(crate) fn run(config: Result<Config, ConfigError>, places: &[PathBuf], file: Option<&Path>) -> ExitCode {
    let mut report = Report::new(|line| drop(print(&format!("{line}\n"))));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let code = match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(diagnose(config, places, &mut report));
            // A look-up in progress must not hold up the exit.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            report.line(Verdict::Fail, format!("this program cannot start: {error}"));
            exit::RUNTIME
        }
    };
    let summary = report.summary();
    // A line that could not be printed before cannot be either at the end.
    let code = answer(&format!("\n{summary}\n"), ExitCode::from(code));
    if let Some(path) = file
        && let Err(error) = write(path, &format!("{}\n{summary}\n", report.text()))
    {
        complain(format_args!("cannot write {}: {error}", path.display()));
        return ExitCode::from(exit::RUNTIME);
    }
    code
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

async fn diagnose(config: Result<Config, ConfigError>, places: &[PathBuf], report: &mut Report) -> u8 {
    report.group("Configuration");
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            report.line(Verdict::Fail, error.to_string());
            return exit::BAD_CONFIG;
        }
    };
    report.line(Verdict::Ok, format!("{} tunnels to {}", config.tunnels.len(), config.edge.url));
    check_token(&config, report);

    report.group("Running agent");
    let running = running_agent(places, report).await;

    report.group("Edge");
    if !reach(&config.edge.url, report).await {
        return exit::EDGE_UNREACHABLE;
    }
    let dialer = match Dialer::new(config.edge.url.clone(), config.edge.ca_file.as_deref()) {
        Ok(dialer) => dialer,
        Err(error) => {
            report.line(Verdict::Fail, error.to_string());
            return exit::BAD_CONFIG;
        }
    };
    let begun = Instant::now();
    let link = match dialer.dial(&config.token).await {
        Ok(link) => link,
        Err(error) => {
            report.line(Verdict::Fail, error.to_string());
            return match error {
                DialError::Identity(_) => exit::IDENTITY_REFUSED,
                _ => exit::EDGE_UNREACHABLE,
            };
        }
    };
    let tls = if config.edge.url.is_secure() { "TLS and token accepted" } else { "token accepted" };
    report.line(Verdict::Ok, format!("{tls}, WebSocket open, {}", took(begun)));

    // An agent that runs serves the tunnels already; a second one would take half of the requests.
    let tunnels: &[TunnelConfig] = if running.is_some() { &[] } else { &config.tunnels };
    let moment = match Moment::begin(link, tunnels, config.max_concurrent) {
        Ok(moment) => moment,
        Err(error) => {
            report.line(Verdict::Fail, error);
            return exit::RUNTIME;
        }
    };
    let begun = Instant::now();
    let mut moment = moment;
    let Some(welcome) = moment.welcome().await else {
        report.line(Verdict::Fail, "hello was not answered".to_owned());
        return exit::RUNTIME;
    };
    report
        .line(Verdict::Ok, format!("hello answered, connection {}, {}", welcome.connection_id, took(begun)));

    let urls = match &running {
        Some(status) => urls_of(status, report),
        None => opened(&welcome, report),
    };
    for config in &config.tunnels {
        report.group(&format!("Tunnel {}", config.name));
        let mut asked = Vec::new();
        for address in config.upstreams() {
            if !asked.contains(&address) {
                ask_upstream(config, address, report).await;
                asked.push(address);
            }
        }
        match urls.get(config.name.as_str()) {
            Some(url) => ask_public(url, report).await,
            None => report.line(Verdict::Fail, unopened(&config.name, running.as_ref())),
        }
    }
    moment.end().await;
    let are_refused = running.is_none() && welcome.tunnels.is_empty() && !welcome.refused.is_empty();
    match report.has_failed() {
        true if are_refused => exit::IDENTITY_REFUSED,
        true => exit::RUNTIME,
        false => 0,
    }
}

fn check_token(config: &Config, report: &mut Report) {
    let place = config.token_source.place();
    let Some(says) = config.token.says() else {
        return report.line(Verdict::Warn, format!("the token in {place} does not say when it ends"));
    };
    let now = identity::now();
    let (verdict, text) = match says.exp {
        Some(exp) if exp <= now => (Verdict::Fail, format!("ended {}", identity::utc(exp))),
        Some(exp) if exp - now < TOKEN_ENDS_SOON_SECS => {
            (Verdict::Warn, format!("ends soon, {}", identity::utc(exp)))
        }
        Some(exp) => (Verdict::Ok, format!("is good until {}", identity::utc(exp))),
        None => (Verdict::Warn, "has no end".to_owned()),
    };
    report.line(verdict, format!("the token in {place} {text}"));
    let covered = says.may_open();
    for tunnel in config.tunnels.iter().filter(|tunnel| !covered.matches(&tunnel.name)) {
        report.line(Verdict::Fail, format!("the token does not cover {}", tunnel.name));
    }
}

async fn running_agent(places: &[PathBuf], report: &mut Report) -> Option<Status> {
    let asked = async { Agent::find(places).await?.status().await };
    match asked.await {
        Ok(status) => {
            let pid = status.pid;
            match status.readiness() {
                Ok(()) => report.line(Verdict::Ok, format!("pid {pid}: every tunnel is open")),
                Err(reason) => report.line(Verdict::Warn, format!("pid {pid}: {reason}")),
            }
            if let Some(error) = &status.config.last_error {
                report.line(Verdict::Warn, format!("its last reload changed nothing: {error}"));
            }
            Some(status)
        }
        Err(error) => {
            report.line(Verdict::Warn, format!("{error}; this program is the agent for the moment"));
            None
        }
    }
}

/// DNS and TCP.
async fn reach(url: &EdgeUrl, report: &mut Report) -> bool {
    let begun = Instant::now();
    let looked_up = timeout(STEP_TIMEOUT, lookup_host((url.host(), url.port()))).await;
    let addresses: Vec<_> = match looked_up.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(addresses) => addresses.collect(),
        Err(error) => {
            report.line(Verdict::Fail, format!("DNS: {} is not found: {error}", url.host()));
            return false;
        }
    };
    let shown: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
    report.line(Verdict::Ok, format!("DNS: {} is {}, {}", url.host(), shown.join(", "), took(begun)));
    let begun = Instant::now();
    let connected = timeout(STEP_TIMEOUT, TcpStream::connect(&*addresses)).await;
    match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(_) => report.line(Verdict::Ok, format!("TCP: port {} is open, {}", url.port(), took(begun))),
        Err(error) => {
            report.line(Verdict::Fail, format!("TCP: port {} is not open: {error}", url.port()));
            return false;
        }
    }
    if !url.is_secure() && !url.is_loopback() {
        report.line(Verdict::Warn, "no TLS: the token travels in the clear; use wss://".to_owned());
    }
    true
}

/// A connection for as long as the diagnosis takes.
struct Moment {
    commands: mpsc::Sender<Command>,
    reports: mpsc::Receiver<(connection::Serial, FromConnection)>,
}

impl Moment {
    fn begin(link: Link, tunnels: &[TunnelConfig], max_concurrent: u32) -> Result<Self, String> {
        let tunnels =
            Tunnels::new(tunnels, max_concurrent, Arc::new(Metrics::new()), Arc::new(Captures::new(0)))
                .map_err(|error| error.to_string())?;
        let shared = Shared {
            tunnels: Arc::new(tunnels),
            access: AccessLog::Log,
            seen: Mutex::new(Seen::default()),
            sockets: Arc::default(),
        };
        let random = getrandom::u64().map_err(|error| error.to_string())?;
        let agent: AgentId = format!("diagnose-{random:016x}").parse().map_err(|_| "no agent id")?;
        let session = session::Config { agent, software: SOFTWARE.to_owned(), jitter: random::fraction() };
        let (commands, inbox) = mpsc::channel(4);
        let (report, reports) = mpsc::channel(64);
        tokio::spawn(connection::run(1, link, Arc::new(shared), session, inbox, report));
        Ok(Self { commands, reports })
    }

    async fn welcome(&mut self) -> Option<Welcome> {
        timeout(STEP_TIMEOUT, async {
            loop {
                match self.reports.recv().await? {
                    (_, FromConnection::Welcomed(welcome)) => return Some(*welcome),
                    (_, FromConnection::Ended(_)) => return None,
                    (_, FromConnection::Replace | FromConnection::Alive | FromConnection::Rhythm(_)) => {}
                }
            }
        })
        .await
        .ok()
        .flatten()
    }

    /// Serves what came last, then says goodbye.
    async fn end(mut self) {
        let _ = self.commands.send(Command::Retire { quiet: Duration::from_millis(500) }).await;
        let _ = timeout(LAST_REQUESTS, async {
            while let Some((_, report)) = self.reports.recv().await {
                if matches!(report, FromConnection::Ended(_)) {
                    break;
                }
            }
        })
        .await;
    }
}

/// Why a tunnel has no address: an agent that runs with another configuration has not asked for it.
fn unopened(name: &TunnelName, running: Option<&Status>) -> String {
    match running.filter(|status| status.tunnels.iter().all(|tunnel| tunnel.name != name.as_str())) {
        Some(status) => format!(
            "the agent that runs (pid {}, {}) does not serve it: reload that one, or name the other's socket with \
             --control-socket",
            status.pid,
            status.config.file.as_deref().unwrap_or("without a configuration file")
        ),
        None => "the edge has not opened it".to_owned(),
    }
}

fn urls_of(status: &Status, report: &mut Report) -> BTreeMap<String, String> {
    let mut urls = BTreeMap::new();
    for tunnel in &status.tunnels {
        match (&tunnel.state, &tunnel.url) {
            (TunnelState::Open, Some(url)) => {
                urls.insert(tunnel.name.clone(), url.clone());
            }
            (TunnelState::Refused { reason }, _) => {
                report.line(Verdict::Fail, format!("{} is not open: {reason}", tunnel.name));
            }
            (TunnelState::Open | TunnelState::Opening, _) => {
                report.line(Verdict::Warn, format!("{} is not open yet", tunnel.name));
            }
        }
    }
    urls
}

fn opened(welcome: &Welcome, report: &mut Report) -> BTreeMap<String, String> {
    for refused in &welcome.refused {
        let name: String = refused.name.chars().filter(|c| !c.is_control()).take(64).collect();
        let advice = advice(refused.reason);
        report.line(Verdict::Fail, format!("{name} is not open: {advice}"));
    }
    welcome.tunnels.iter().map(|tunnel| (tunnel.name.to_string(), tunnel.url.clone())).collect()
}

/// Asks a service itself, as its tunnel's requests do.
async fn ask_upstream(config: &TunnelConfig, address: &Address, report: &mut Report) {
    let upstream = match Way::of(config).and_then(|way| way.to(address)) {
        Ok(upstream) => upstream,
        Err(error) => {
            return report.line(Verdict::Fail, format!("upstream {address} of {}: {error}", config.name));
        }
    };
    let host = upstream.authority().clone();
    let begun = Instant::now();
    match head(&upstream, host, "/").await {
        Ok(answer) => report.line(
            Verdict::Ok,
            format!("upstream {address} answers {}, {}", answer.status().as_u16(), took(begun)),
        ),
        Err(error) => report.line(Verdict::Fail, format!("upstream {error}")),
    }
}

/// Sends a request through the public address and back.
async fn ask_public(url: &str, report: &mut Report) {
    let begun = Instant::now();
    let answer = match public(url).await {
        Ok(answer) => answer,
        Err(error) => return report.line(Verdict::Fail, format!("public {url}: {error}")),
    };
    let field = |name: &str| {
        let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
        value.map(|text| text.chars().take(64).collect::<String>())
    };
    let status = answer.status().as_u16();
    match (field("x-tunnel-error"), field("x-tunnel-request-id")) {
        // The service's own word, but one that says that what it stands for is not there.
        (None, Some(id)) if matches!(status, 502..=504) => {
            report
                .line(Verdict::Fail, format!("public {url} answers {status}, by the service, request {id}"));
        }
        (None, Some(id)) => {
            report.line(Verdict::Ok, format!("public {url} answers {status}, {}, request {id}", took(begun)));
        }
        // The request came as far as the agent and back, and visitors see an error all the same.
        (Some(code), Some(id)) if code.starts_with("upstream_") => {
            let what = format!(
                "public {url} answers {status} {code}, request {id}: the way is open, the service fails"
            );
            report.line(Verdict::Fail, what);
        }
        (Some(code), _) => report.line(Verdict::Fail, format!("public {url} answers {status} {code}")),
        (None, None) => {
            report
                .line(Verdict::Fail, format!("public {url}: something else than the edge answers {status}"));
        }
    }
}

async fn public(url: &str) -> Result<http::Response<()>, String> {
    let uri: Uri = url.parse().map_err(|_| "not a URL".to_owned())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("not a URL".to_owned());
    };
    // Names under `localhost` are this machine, although few resolvers know.
    let host = if authority.host().ends_with(".localhost") { "localhost" } else { authority.host() };
    let port = authority.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    let address: Address = format!("{scheme}://{host}{port}").parse().map_err(|error| format!("{error}"))?;
    let tls = if address.scheme() == Scheme::Https {
        let server_name = rustls::pki_types::ServerName::try_from(authority.host().to_owned())
            .map_err(|error| error.to_string())?;
        let config = client_config(Trust::System, &[b"http/1.1"]).map_err(|error| error.to_string())?;
        Some(Tls { config, server_name })
    } else {
        None
    };
    let upstream = Upstream::new(address, tls, Http2::Never, None);
    let named = HeaderValue::from_str(authority.as_str()).map_err(|error| error.to_string())?;
    head(&upstream, named, uri.path()).await
}

async fn head(upstream: &Upstream, host: HeaderValue, path: &str) -> Result<http::Response<()>, String> {
    let mut request = Request::new(RequestBody::Empty);
    // Safe by definition: asking changes nothing at the service.
    *request.method_mut() = Method::HEAD;
    *request.uri_mut() = path.parse().map_err(|error| format!("{error}"))?;
    request.headers_mut().insert(header::HOST, host);
    request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(SOFTWARE));
    let answered = timeout(STEP_TIMEOUT, upstream.send(request)).await;
    let answer = answered.map_err(|_| format!("no answer within {STEP_TIMEOUT:?}"))?;
    answer
        .map(|answer| answer.map(drop))
        .map_err(|error: UpstreamError| cause::explain(upstream.address(), &error))
}

fn took(since: Instant) -> String {
    format!("{:.1} ms", since.elapsed().as_secs_f64() * 1000.0)
}
