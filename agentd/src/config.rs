//! The configuration: a TOML file and what it includes, under the environment, under flags.
//!
//! Enters: file names and [`Overrides`]. Leaves: a valid [`Config`], or one [`ConfigError`] that says
//! where and what to write instead.

pub mod address;
mod certificates;
pub(crate) mod change;
pub mod delivery;
pub mod edge_url;
mod file;
pub mod htpasswd;
pub mod http_url;
mod log;
pub mod paths;
pub mod range;
pub mod template;
pub mod traffic;
mod value;
pub mod visitors;

use std::{
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use http::{HeaderValue, uri::PathAndQuery};
use proto::{
    delivery::DeliveryPolicy,
    id::{TunnelName, TunnelPatterns},
    limits,
};
use rustls::pki_types::ServerName;

#[cfg(test)]
pub(crate) use self::file::ALL_KEYS;
pub use self::{
    file::{control_socket_named_in, load},
    log::{DEFAULT_LOG_DAYS, LogConfig, LogFormat, parse_log_level},
};
use crate::{
    config::{
        address::Address,
        edge_url::EdgeUrl,
        traffic::TrafficRules,
        visitors::{VisitorRules, WebhookRule},
    },
    identity::credential::{CREDENTIAL, Token, TokenError, TokenSource},
    tls::Certificates,
};

/// Where the configuration is unless somebody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/agentd/agentd.toml";

/// How long a stop waits for what is in flight, unless configured otherwise. It stays below the unit's
/// `TimeoutStopSec`.
pub const DEFAULT_GRACE_PERIOD: Duration = Duration::from_secs(30);

/// How long a connection to an upstream may be idle, unless configured otherwise. Many servers close theirs sooner; that
/// is noticed, and what they announce is kept to.
pub const DEFAULT_KEEP_ALIVE: Duration = Duration::from_secs(60);

/// How many requests all tunnels together serve at a time, unless configured otherwise: it bounds the
/// memory of the process. A tunnel that may serve more raises it.
pub const DEFAULT_TOTAL_CONCURRENT: u32 = 256;

/// How many bytes all captured requests may take, unless configured otherwise.
pub const DEFAULT_INSPECT_MEMORY: usize = 32 * 1024 * 1024;

/// How many bytes of each body are captured, unless configured otherwise.
pub const DEFAULT_INSPECT_BODY: usize = 256 * 1024;

/// Everything the agent needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The edge.
    pub edge: EdgeConfig,
    /// Where the token is read from, at each dial.
    pub token_source: TokenSource,
    /// The token as it was when the configuration was read.
    pub token: Token,
    /// The tunnels, in the order in which they were written.
    pub tunnels: Vec<TunnelConfig>,
    /// How long a stop waits for what is in flight.
    pub grace_period: Duration,
    /// How many requests all tunnels together serve at a time.
    pub max_concurrent: u32,
    /// Where commands reach the running agent, if a place is named.
    pub control_socket: Option<PathBuf>,
    /// Where `/healthz`, `/ready` and `/metrics` are served: a loopback address.
    pub status_address: Option<SocketAddr>,
    /// What the inspector keeps and where it is.
    pub inspect: InspectConfig,
    /// What is logged, how and where.
    pub log: LogConfig,
}

/// What the inspector keeps, for all tunnels, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InspectConfig {
    /// The loopback address of its page. Where its port is taken, the next free one is used.
    pub address: SocketAddr,
    /// How many bytes all captured requests may take.
    pub memory: usize,
    /// Names of fields, in lower case, whose values are masked beside those that always are.
    pub redact: Vec<String>,
}

impl Default for InspectConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 4040)),
            memory: DEFAULT_INSPECT_MEMORY,
            redact: Vec::new(),
        }
    }
}

/// How to reach the edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeConfig {
    /// Its address.
    pub url: EdgeUrl,
    /// Certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
}

impl EdgeConfig {
    /// The certificates that are used: none without TLS.
    pub(crate) fn trusted(&self) -> Option<&Path> {
        self.ca_file.as_deref().filter(|_| self.url.is_secure())
    }
}

/// One tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelConfig {
    /// Its public name.
    pub name: TunnelName,
    /// What it leads to; `None` where routes lead everywhere.
    pub upstream: Option<Address>,
    /// What `host` says to the upstream.
    pub host_header: HostHeader,
    /// What `origin` says to the upstream.
    pub origin: OriginRule,
    /// Whether addresses of the upstream in a response's head become public ones.
    pub rewrite_location: bool,
    /// Whether the edge's entry in `Via` reaches the upstream.
    pub via: bool,
    /// How long the upstream may take to begin its answer.
    pub request_timeout: Duration,
    /// How many requests are served at a time.
    pub max_concurrent: u32,
    /// How many WebSockets may be open at a time.
    pub max_websockets: u32,
    /// How long a WebSocket may be silent before it is closed; `None` for as long as it likes.
    pub websocket_idle_timeout: Option<Duration>,
    /// Certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// The name to ask for and check in TLS, where it is not the upstream's own.
    pub server_name: Option<ServerName<'static>>,
    /// Whether any certificate will do.
    pub insecure_skip_verify: bool,
    /// When HTTP/2 is spoken.
    pub http2: Http2,
    /// How long a connection to the upstream may be idle and is used again; `None` if none is used twice.
    pub keep_alive: Option<Duration>,
    /// How the upstream is asked whether it is well.
    pub health_check: Option<HealthCheck>,
    /// Who may use it.
    pub visitors: VisitorRules,
    /// The signatures that its webhooks must have.
    pub webhooks: Vec<WebhookRule>,
    /// Whether its requests are captured for the inspector.
    pub inspect: bool,
    /// How many bytes of each body are captured.
    pub inspect_body: usize,
    /// Where requests go, and what is changed on the way.
    pub traffic: TrafficRules,
    /// What is delivered later where it cannot be delivered now; `None` if nothing is.
    pub delivery: Option<DeliveryPolicy>,
}

/// How an upstream is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked for, with GET.
    pub path: PathAndQuery,
    /// What `host` says, where it is not what the tunnel's requests say.
    pub host: Option<HeaderValue>,
    /// The answers that are good.
    pub expect_status: Statuses,
    /// How long after one answer the next is asked for.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// After how many failures in a row the upstream counts as down.
    pub max_failed: u32,
}

impl HealthCheck {
    /// The check of `path` with every other setting at its default.
    #[must_use]
    pub const fn new(path: PathAndQuery) -> Self {
        Self {
            path,
            host: None,
            expect_status: Statuses(Vec::new()),
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(3),
            max_failed: 3,
        }
    }
}

/// Statuses, such as `204`, `2xx`, `200-399` or several of these with commas. By default 2xx and 3xx.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statuses(Vec<RangeInclusive<u16>>);

impl Statuses {
    /// Whether a status is one of them.
    #[must_use]
    pub fn contains(&self, status: u16) -> bool {
        match &self.0[..] {
            [] => (200..400).contains(&status),
            ranges => ranges.iter().any(|range| range.contains(&status)),
        }
    }
}

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |part: &str| {
            let number = |text: &str| text.parse::<u16>().ok().filter(|status| (200..600).contains(status));
            let class = part.strip_suffix("xx").and_then(|class| class.parse::<u16>().ok());
            match (class, part.split_once('-')) {
                (Some(class @ 2..=5), _) => Some(class * 100..=class * 100 + 99),
                (_, Some((from, to))) => Some(number(from)?..=number(to)?).filter(|range| !range.is_empty()),
                _ => number(part).map(|status| status..=status),
            }
        };
        let ranges: Option<Vec<_>> = text.split(',').map(|part| one(part.trim())).collect();
        ranges.map(Self).ok_or_else(|| {
            format!("{text:?} is no status: write it as 200, \"2xx\", \"200-399\" or several with commas")
        })
    }
}

impl TunnelConfig {
    /// A tunnel with every setting at its default.
    #[must_use]
    pub const fn new(name: TunnelName, upstream: Option<Address>) -> Self {
        Self {
            name,
            upstream,
            host_header: HostHeader::Upstream,
            origin: OriginRule::Auto,
            rewrite_location: true,
            via: true,
            request_timeout: limits::REPLY_TIMEOUT,
            max_concurrent: limits::MAX_CONCURRENT,
            max_websockets: limits::SOCKETS,
            websocket_idle_timeout: None,
            ca_file: None,
            server_name: None,
            insecure_skip_verify: false,
            http2: Http2::Auto,
            keep_alive: Some(DEFAULT_KEEP_ALIVE),
            health_check: None,
            visitors: VisitorRules::ANYBODY,
            webhooks: Vec::new(),
            inspect: false,
            inspect_body: DEFAULT_INSPECT_BODY,
            traffic: TrafficRules::NOTHING,
            delivery: None,
        }
    }

    /// Where requests go that no route takes, for people.
    #[must_use]
    pub(crate) fn leads_to(&self) -> String {
        self.upstream.as_ref().map_or_else(|| "its routes".to_owned(), ToString::to_string)
    }

    /// Every upstream it leads to: its own, and those of its routes.
    pub(crate) fn upstreams(&self) -> impl Iterator<Item = &Address> + Clone {
        let routed = self.traffic.routes.iter().filter_map(|route| match &route.target {
            traffic::RouteTarget::Upstreams(upstreams, _) => Some(upstreams),
            _ => None,
        });
        self.upstream.iter().chain(routed.flatten())
    }
}

/// What `host` says to the upstream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HostHeader {
    /// The upstream's own name: what its server expects when it is called directly.
    #[default]
    Upstream,
    /// The name the public client asked for.
    Preserve,
    /// Always this.
    Value(HeaderValue),
}

/// What `origin` says to the upstream, where it is the tunnel's own public one. Any other is passed on as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OriginRule {
    /// The upstream's own where another protocol is asked for (WebSockets), else as it was sent.
    #[default]
    Auto,
    /// As it was sent.
    Preserve,
    /// The upstream's own scheme and the `host` it is sent; `referer` likewise.
    Upstream,
}

/// When HTTP/2 is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Http2 {
    /// Over TLS, if the upstream offers it.
    #[default]
    Auto,
    /// Always: over TLS it must be offered, without TLS it is assumed ("prior knowledge").
    Always,
    /// Never.
    Never,
}

/// What environment and flags say; it goes over what files say.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The edge's address.
    pub edge: Option<String>,
    /// The file with the token.
    pub token_file: Option<PathBuf>,
    /// The token itself, from the environment only.
    pub token: Option<String>,
    /// The folder of systemd credentials.
    pub credentials: Option<PathBuf>,
    /// Certificates to trust for the edge.
    pub ca_file: Option<PathBuf>,
    /// How long a stop waits.
    pub grace_period: Option<Duration>,
    /// Where commands reach the running agent.
    pub control_socket: Option<PathBuf>,
    /// Where `/healthz`, `/ready` and `/metrics` are served.
    pub status_address: Option<String>,
    /// Where the inspector's page is.
    pub inspect_address: Option<String>,
    /// What is logged, how and where.
    pub log: LogConfig,
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// Counts from 1.
    pub line: usize,
    /// Counts characters from 1.
    pub column: usize,
}

/// Why there is no valid configuration: one reason, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ConfigError {
    /// Where, if it is in a file.
    #[serde(flatten)]
    pub place: Option<Place>,
    /// What is wrong and what would be right.
    pub message: String,
}

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { place: None, message: message.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{}:{}:{}: ", place.file.display(), place.line, place.column)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}

impl From<TokenError> for ConfigError {
    fn from(error: TokenError) -> Self {
        Self::new(error.to_string())
    }
}

impl Overrides {
    /// The configuration of `agentd http`: no file, one tunnel.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn with_tunnel(&self, tunnel: TunnelConfig) -> Result<Config, ConfigError> {
        self.apply(FileConfig { tunnels: vec![tunnel], ..FileConfig::default() })
    }

    /// Which tunnels the token of `agentd http` says that it may open; empty where that cannot be told.
    pub(crate) fn may_open(&self) -> TunnelPatterns {
        let token = self.token_source(None).ok().and_then(|source| source.read().ok());
        token.and_then(|token| token.says()).map(|says| says.may_open()).unwrap_or_default()
    }

    fn apply(&self, file: FileConfig) -> Result<Config, ConfigError> {
        let url = match &self.edge {
            Some(url) => url.parse().map_err(|error| ConfigError::new(format!("{error}")))?,
            None => file.url.ok_or_else(|| {
                ConfigError::new(
                    "no edge is named: give --edge wss://…, AGENTD_EDGE or [edge] url in the file",
                )
            })?,
        };
        let token_source = self.token_source(file.token_file)?;
        let token = token_source.read()?;
        let largest = file.tunnels.iter().map(|tunnel| tunnel.max_concurrent).max().unwrap_or(0);
        let max_concurrent = file.max_concurrent.unwrap_or(DEFAULT_TOTAL_CONCURRENT.max(largest));
        let status_address = match &self.status_address {
            Some(text) => Some(parse_status_address(text).map_err(ConfigError::new)?),
            None => file.status_address,
        };
        let inspect = match &self.inspect_address {
            Some(text) => InspectConfig {
                address: parse_inspect_address(text).map_err(ConfigError::new)?,
                ..file.inspect
            },
            None => file.inspect,
        };
        let edge = EdgeConfig { url, ca_file: self.ca_file.clone().or(file.ca_file) };
        if self.ca_file.is_some()
            && let Some(path) = edge.trusted()
        {
            Certificates::read(path).map_err(|error| ConfigError::new(error.to_string()))?;
        }
        Ok(Config {
            edge,
            token_source,
            token,
            tunnels: file.tunnels,
            grace_period: self.grace_period.or(file.grace_period).unwrap_or(DEFAULT_GRACE_PERIOD),
            max_concurrent,
            control_socket: self.control_socket.clone().or(file.control_socket),
            status_address,
            inspect,
            log: LogConfig {
                level: self.log.level.clone().or(file.log.level),
                format: self.log.format.or(file.log.format),
                dir: self.log.dir.clone().or(file.log.dir),
                keep_days: self.log.keep_days.or(file.log.keep_days),
            },
        })
    }

    fn token_source(&self, from_file: Option<PathBuf>) -> Result<TokenSource, ConfigError> {
        if let Some(path) = &self.token_file {
            return Ok(self.file_or_credential(path.clone()));
        }
        if let Some(token) = &self.token {
            return Ok(TokenSource::from_value(token)?);
        }
        if let Some(path) = from_file {
            return Ok(self.file_or_credential(path));
        }
        let credential = self.credentials.as_deref().map(|dir| dir.join(CREDENTIAL));
        credential.filter(|path| path.exists()).map(TokenSource::Credential).ok_or_else(|| {
            ConfigError::new(
                "there is no token: give --token-file FILE, AGENTD_TOKEN_FILE, AGENTD_TOKEN or [edge] token_file",
            )
        })
    }

    /// systemd guards its credentials itself; their permission bits say something else.
    fn file_or_credential(&self, path: PathBuf) -> TokenSource {
        if self.credentials.as_deref().is_some_and(|dir| path.starts_with(dir)) {
            TokenSource::Credential(path)
        } else {
            TokenSource::File(path)
        }
    }
}

/// What files say.
#[derive(Debug, Default)]
struct FileConfig {
    url: Option<EdgeUrl>,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    grace_period: Option<Duration>,
    max_concurrent: Option<u32>,
    control_socket: Option<PathBuf>,
    status_address: Option<SocketAddr>,
    inspect: InspectConfig,
    log: LogConfig,
    tunnels: Vec<TunnelConfig>,
}

/// Reads a duration such as `60s`: a whole number and `ms`, `s`, `m`, `h` or `d`.
///
/// # Errors
///
/// A sentence for the user.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    let ms = number.parse::<u64>().ok().zip(unit_ms).and_then(|(number, unit)| number.checked_mul(unit));
    ms.map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is not a duration: write it as 500ms, 60s, 5m or 1h"))
}

/// A duration as [`parse_duration`] reads it, in the largest unit that holds it whole.
pub(crate) fn write_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    let unit = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    let unit = unit.into_iter().find(|(_, unit_ms)| ms > 0 && ms.is_multiple_of(*unit_ms));
    unit.map_or_else(|| format!("{ms}ms"), |(unit, unit_ms)| format!("{}{unit}", ms / unit_ms))
}

/// Reads a number of bytes such as `256KiB`: a whole number and `B`, `KiB`, `MiB` or `GiB`, or a bare number of bytes.
///
/// # Errors
///
/// A sentence for the user.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit: Option<usize> = match unit.trim_start() {
        "" | "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    let bytes = number.parse::<usize>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    bytes.ok_or_else(|| format!("{text:?} is not a number of bytes: write it as 512, 256KiB or 32MiB"))
}

/// Reads a `status_address` setting.
///
/// # Errors
///
/// A sentence for the user: also for an address that others than this machine can reach.
pub fn parse_status_address(text: &str) -> Result<SocketAddr, String> {
    parse_loopback(text, 4041)
}

/// Reads an `inspect_address` setting.
///
/// # Errors
///
/// A sentence for the user: also for an address that others than this machine can reach.
pub fn parse_inspect_address(text: &str) -> Result<SocketAddr, String> {
    parse_loopback(text, 4040)
}

fn parse_loopback(text: &str, usual: u16) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an address and a port: write it as 127.0.0.1:{usual}"))?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(format!("{text:?} can be reached by other machines: use 127.0.0.1 or [::1]"))
    }
}

/// Reads a `host_header` setting.
///
/// # Errors
///
/// A sentence for the user.
pub fn parse_host_header(text: &str) -> Result<HostHeader, String> {
    match text {
        "upstream" => Ok(HostHeader::Upstream),
        "preserve" => Ok(HostHeader::Preserve),
        value => parse_host(value)
            .map(HostHeader::Value)
            .ok_or_else(|| format!("{value:?} is neither \"upstream\" nor \"preserve\" nor a host name")),
    }
}

/// Reads what a `host` field may say.
fn parse_host(text: &str) -> Option<HeaderValue> {
    let is_host = text.parse::<http::uri::Authority>().is_ok_and(|host| !host.as_str().contains('@'));
    HeaderValue::from_str(text).ok().filter(|_| is_host)
}

/// Reads an `origin` setting.
///
/// # Errors
///
/// A sentence for the user.
pub fn parse_origin(text: &str) -> Result<OriginRule, String> {
    match text {
        "preserve" => Ok(OriginRule::Preserve),
        "upstream" => Ok(OriginRule::Upstream),
        other => Err(format!("{other:?} is neither \"preserve\" nor \"upstream\"")),
    }
}

/// Where relative paths in a file begin.
fn beside(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or_else(|| Path::new(".")).join(path)
}

#[cfg(test)]
mod tests;
