//! The edge under test, wherever it is: `local`, or a stack in an account. Enters where it is and a token;
//! leaves requests to its tunnels, agents at it, and what its front can do.

use std::{
    collections::BTreeSet,
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex},
    time::Duration,
};

use agentd::{
    config::edge_url::EdgeUrl,
    tls::{Certificates, Trust, client_config},
};
use proto::limits;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::MaybeTlsStream;

use crate::{
    Agent, PATIENCE,
    client::{Answer, Connection, Request},
    process::Process,
};

/// What stands between the public and `ingress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// `local`'s own: what goes in comes out, to the byte.
    Local,
    /// The Function URL itself.
    None,
    /// CloudFront.
    CloudFront,
    /// API Gateway's HTTP API.
    HttpApi,
    /// CloudFront with everything handed to `relay`.
    Relay,
}

impl Front {
    /// Whether framing and order of fields come out as they went in.
    #[must_use]
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Local)
    }

    /// Whether a body goes on while it is made.
    #[must_use]
    pub const fn streams(self) -> bool {
        !matches!(self, Self::HttpApi)
    }

    /// A request-target as it reaches the upstream: an HTTP API decodes paths and makes two slashes one. For the targets
    /// of the acceptance run, no others.
    #[must_use]
    pub fn target_of(self, target: &str) -> String {
        let decoded = match target {
            "/a;b=c/d%2Fe?x" => "/a;b=c/d/e?x",
            "//double//slash" => "/double/slash",
            "/%2e%2e/%FF" => "/../%FF",
            same => same,
        };
        if self == Self::HttpApi { decoded } else { target }.to_owned()
    }

    /// Whether it lets this method through.
    #[must_use]
    pub fn takes(self, method: &str) -> bool {
        !matches!(self, Self::CloudFront | Self::Relay)
            || ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "POST", "DELETE"].contains(&method)
    }

    /// The most MiB of one response.
    #[must_use]
    pub const fn response_mib(self) -> usize {
        match self {
            Self::HttpApi => 5,
            Self::Local | Self::None | Self::CloudFront | Self::Relay => 190,
        }
    }

    /// Within what time something happens that happens at once: on this machine, or an ocean away.
    #[must_use]
    pub const fn at_once(self) -> Duration {
        match self {
            Self::Local => Duration::from_secs(1),
            Self::None | Self::CloudFront | Self::HttpApi | Self::Relay => Duration::from_secs(10),
        }
    }
}

impl FromStr for Front {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Self::Local),
            "none" => Ok(Self::None),
            "cloudfront" => Ok(Self::CloudFront),
            "httpapi" => Ok(Self::HttpApi),
            "relay" => Ok(Self::Relay),
            _ => Err("is none of none, cloudfront, httpapi, relay, local".into()),
        }
    }
}

/// How the public reaches a tunnel: a URL with `{name}` in place of its name, in the host or as the first
/// segment of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    secure: bool,
    authority: String,
    /// What precedes a request-target.
    base: String,
}

impl PublicUrl {
    /// Whether tunnels are told apart by their path.
    #[must_use]
    pub fn is_by_path(&self) -> bool {
        self.base.contains("{name}")
    }

    fn authority(&self, name: &str) -> String {
        self.authority.replace("{name}", name)
    }

    /// Host and port to dial.
    fn address(&self, name: &str) -> (String, u16) {
        let authority = self.authority(name);
        let default = if self.secure { 443 } else { 80 };
        match authority.rsplit_once(':') {
            Some((host, port)) => (host.to_owned(), port.parse().expect("checked when it was read")),
            None => (authority, default),
        }
    }
}

impl FromStr for PublicUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (secure, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err("begins with neither https:// nor http://".into()),
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let port = authority.rsplit_once(':').map_or("1", |(_, port)| port);
        let base = path.trim_end_matches('/');
        let by_host = authority.starts_with("{name}.") && base.is_empty();
        let by_path = !authority.contains(['{', '}']) && base == "/{name}";
        if authority.contains('@') || port.parse::<u16>().is_err() || !(by_host || by_path) {
            return Err("is neither https://{name}.some.domain nor https://some.host/{name}/".into());
        }
        Ok(Self { secure, authority: authority.to_owned(), base: base.to_owned() })
    }
}

/// How much there is of what there may be more or less of.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// How many clients ask at the same time.
    pub clients: usize,
    /// How often each of them asks.
    pub rounds: usize,
    /// How large a download is, in MiB.
    pub download_mib: usize,
}

/// Where an edge is, and who may use it.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where the public comes in.
    pub public: PublicUrl,
    /// Where agents connect.
    pub agents: EdgeUrl,
    /// The file of a token that may open names with `prefix`.
    pub token: PathBuf,
    /// What the public comes in by.
    pub front: Front,
    /// What the names of tunnels begin with.
    pub prefix: String,
    /// Certificates to believe beside the system's.
    pub ca: Option<PathBuf>,
}

/// The edge under test.
#[derive(Clone)]
pub struct Stack {
    place: Place,
    reply_timeout: Duration,
    scale: Scale,
    /// Never asked for where nothing is secure.
    tls: Option<Arc<ClientConfig>>,
    /// Every name that a tunnel was opened with.
    names: Arc<Mutex<BTreeSet<String>>>,
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stack").field("place", &self.place).finish_non_exhaustive()
    }
}

impl AsRef<Self> for Stack {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Stack {
    /// The edge at this place.
    ///
    /// # Errors
    ///
    /// When the certificates cannot be read.
    pub fn new(place: Place) -> Result<Self, String> {
        let tls = if place.public.secure || place.agents.is_secure() {
            let certificates = place.ca.as_deref().map(Certificates::read).transpose();
            let certificates = certificates.map_err(|error| error.to_string())?;
            let trust = certificates.as_ref().map_or(Trust::System, Trust::SystemAnd);
            Some(client_config(trust, &[b"http/1.1"]).map_err(|error| error.to_string())?)
        } else {
            None
        };
        let scale = Scale { clients: 50, rounds: 40, download_mib: 100 };
        Ok(Self { reply_timeout: limits::REPLY_TIMEOUT, place, scale, tls, names: Arc::default() })
    }

    /// The same with more or less of everything.
    #[must_use]
    pub const fn with_scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// How much there is of what there may be more or less of.
    #[must_use]
    pub const fn scale(&self) -> Scale {
        self.scale
    }

    /// The same with another time that a public client waits for a head.
    #[must_use]
    pub const fn with_reply_timeout(mut self, reply_timeout: Duration) -> Self {
        self.reply_timeout = reply_timeout;
        self
    }

    /// Where it is.
    #[must_use]
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// How long a public client waits for a head.
    #[must_use]
    pub const fn reply_timeout(&self) -> Duration {
        self.reply_timeout
    }

    /// What the public comes in by.
    #[must_use]
    pub const fn front(&self) -> Front {
        self.place.front
    }

    /// Whether tunnels are told apart by their path.
    #[must_use]
    pub fn is_by_path(&self) -> bool {
        self.place.public.is_by_path()
    }

    /// Where agents connect.
    #[must_use]
    pub const fn agents(&self) -> &EdgeUrl {
        &self.place.agents
    }

    /// The token that may open names of this run.
    #[must_use]
    pub fn token(&self) -> String {
        std::fs::read_to_string(&self.place.token).unwrap().trim().to_owned()
    }

    /// Every name that a tunnel of this run may have been opened with.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        self.names.lock().unwrap().clone()
    }

    /// A tunnel of this run.
    #[must_use]
    pub fn tunnel(&self, name: &str) -> Tunnel<'_> {
        let name = format!("{}{name}", self.place.prefix);
        self.names.lock().unwrap().insert(name.clone());
        self.named(&name)
    }

    /// A tunnel with just this name, which nobody opens.
    #[must_use]
    pub fn named(&self, name: &str) -> Tunnel<'_> {
        Tunnel { stack: self, name: name.to_owned() }
    }

    /// An agent with the tunnels that `tunnels` (TOML) describes; `names` are waited for.
    #[must_use]
    pub fn agent_with(&self, tunnels: &str, names: &[&str]) -> Agent {
        self.agent_of(&self.place.token, &[], tunnels, names)
    }

    /// The same with a token and more in its environment.
    #[must_use]
    pub fn agent_of(
        &self,
        token: &Path,
        environment: &[(&str, &str)],
        tunnels: &str,
        names: &[&str],
    ) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("agentd.toml");
        std::fs::write(&config, self.config_of(token, tunnels)).unwrap();
        let socket = dir.path().join("control.sock");
        let mut environment = environment.to_vec();
        environment.push(("AGENTD_CONTROL_SOCKET", socket.to_str().unwrap()));
        if let Some(ca) = &self.place.ca {
            environment.push(("SSL_CERT_FILE", ca.to_str().unwrap()));
        }
        let process = Process::start("agentd", &["run", "--config", config.to_str().unwrap()], &environment);
        for name in names {
            process.wait_for_line(|line| line.contains("tunnel is open") && line.contains(name));
        }
        Agent::new(process, dir)
    }

    /// A configuration with the tunnels that `tunnels` (TOML) describes. What stands before the first
    /// table goes to the front.
    #[must_use]
    pub fn config(&self, tunnels: &str) -> String {
        self.config_of(&self.place.token, tunnels)
    }

    fn config_of(&self, token: &Path, tunnels: &str) -> String {
        let (top, tables) = tunnels.split_at(tunnels.find('[').unwrap_or(tunnels.len()));
        let (url, token) = (&self.place.agents, token.display());
        format!("{top}\n[edge]\nurl = \"{url}\"\ntoken_file = \"{token}\"\n\n{tables}")
    }

    /// Opens a connection to where agents connect, to be told in bytes what to say.
    ///
    /// # Errors
    ///
    /// When nobody is there.
    pub async fn dial_agents(&self) -> io::Result<MaybeTlsStream<TcpStream>> {
        let url = &self.place.agents;
        dial(url.host(), url.port(), self.tls.as_ref().filter(|_| url.is_secure())).await
    }

    /// How long it takes to get to where agents connect and back, once: a TCP handshake.
    ///
    /// # Errors
    ///
    /// When nobody is there.
    pub async fn reach_agents(&self) -> io::Result<Duration> {
        let url = &self.place.agents;
        reach(url.host(), url.port()).await
    }
}

/// A tunnel of the edge under test.
#[derive(Debug, Clone)]
pub struct Tunnel<'s> {
    stack: &'s Stack,
    name: String,
}

impl Tunnel<'_> {
    /// Its whole name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An agent that serves it from an upstream.
    #[must_use]
    pub fn agent(&self, upstream: &str) -> Agent {
        self.stack.agent_with(&self.table(upstream, ""), &[&self.name])
    }

    /// It in an agent's configuration.
    #[must_use]
    pub fn table(&self, upstream: &str, more: &str) -> String {
        format!("[[tunnel]]\nname = \"{}\"\nupstream = \"{upstream}\"\n{more}\n\n", self.name)
    }

    /// A request to it.
    #[must_use]
    pub fn request(&self, method: &str, target: &str) -> Request {
        let public = &self.stack.place.public;
        let base = public.base.replace("{name}", &self.name);
        Request::new(method, &format!("{base}{target}")).field("Host", &public.authority(&self.name))
    }

    /// Opens a connection to where the public reaches it.
    pub async fn open(&self) -> Connection {
        let public = &self.stack.place.public;
        let (host, port) = public.address(&self.name);
        let stream = dial(&host, port, self.stack.tls.as_ref().filter(|_| public.secure)).await;
        Connection::over(stream.unwrap_or_else(|error| panic!("{host}:{port}: {error}")))
    }

    /// How long it takes to get there and back, once: a TCP handshake.
    ///
    /// # Errors
    ///
    /// When nobody is there.
    pub async fn reach(&self) -> io::Result<Duration> {
        let (host, port) = self.stack.place.public.address(&self.name);
        reach(&host, port).await
    }

    /// Sends a request on a new connection and reads the whole answer.
    pub async fn send(&self, request: &Request) -> Answer {
        self.open().await.exchange(request).await
    }

    /// Asks for a target.
    pub async fn get(&self, target: &str) -> Answer {
        self.send(&self.request("GET", target)).await
    }
}

/// Opens a connection, with TLS where it is given.
async fn dial(
    host: &str,
    port: u16,
    tls: Option<&Arc<ClientConfig>>,
) -> io::Result<MaybeTlsStream<TcpStream>> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let stream = timeout(PATIENCE, connect(host, port)).await.map_err(late)??;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(MaybeTlsStream::Plain(stream)) };
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connecting = tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(name, stream);
    Ok(MaybeTlsStream::Rustls(timeout(PATIENCE, connecting).await.map_err(late)??))
}

async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    // RFC 6761 §6.3: every name under `localhost` is this machine, also where the resolver does not know.
    if host == "localhost" || host.ends_with(".localhost") {
        return TcpStream::connect(("127.0.0.1", port)).await;
    }
    TcpStream::connect((host, port)).await
}

async fn reach(host: &str, port: u16) -> io::Result<Duration> {
    // The name is resolved before the clock runs.
    let known = connect(host, port).await?.peer_addr()?;
    let begun = std::time::Instant::now();
    TcpStream::connect(known).await?;
    Ok(begun.elapsed())
}
