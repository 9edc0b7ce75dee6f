//! The stage of every test: an edge that speaks the protocol over a real WebSocket, an upstream that
//! shows and sends exact bytes, and the agent's process between them.

use std::{
    fmt::Write as _,
    future::Future,
    io,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderName, HeaderValue};
use proto::{
    body::{Body, Codecs},
    delivery::PolicyNotice,
    error::ErrorCode,
    header::Headers,
    id::RequestId,
    limits,
    message::{
        AgentMessage, Cancel, Credit, Drain, EdgeMessage, Heartbeat, Hello, OpenTunnel, Probe, Refusal,
        RefusedTunnel, Request, RequestChunk, VERSION, Welcome,
    },
    target::Target,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config,
    tungstenite::{
        self, Message,
        handshake::server::{ErrorResponse, Request as Handshake, Response as HandshakeResponse},
        protocol::WebSocketConfig,
    },
};

use crate::sockets::{Listener, Socket};

/// An upstream's answer of two bytes.
pub(crate) const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

pub(crate) const TOKEN: &str = "the-agents-token";

/// No step of any test takes this long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn patiently<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} took too long"))
}

/// Where agents connect.
pub(crate) struct Edge {
    listener: Listener,
    pub(crate) url: String,
}

/// What `welcome` says.
#[derive(Clone)]
pub(crate) struct Manners {
    pub(crate) heartbeat_ms: u64,
    pub(crate) reply_timeout_ms: Option<u64>,
    pub(crate) codecs: Codecs,
    pub(crate) refuse: Vec<(String, Refusal)>,
    /// Whether deliveries are kept, and what is said about the policies of that.
    pub(crate) deliveries: bool,
    pub(crate) policies: Vec<PolicyNotice>,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            heartbeat_ms: 25_000,
            reply_timeout_ms: None,
            codecs: Codecs::default(),
            refuse: Vec::new(),
            deliveries: true,
            policies: Vec::new(),
        }
    }
}

impl Edge {
    pub(crate) async fn bind() -> Self {
        let listener = Listener::bind().await;
        let url = format!("ws://127.0.0.1:{}/dev", listener.port());
        Self { listener, url }
    }

    pub(crate) async fn accept_tcp(&self) -> Socket {
        patiently("a connection of the agent", self.listener.accept()).await.unwrap()
    }

    /// Accepts a WebSocket as API Gateway does: no frame above 32 KB, no message above 128 KB.
    pub(crate) async fn accept(&self) -> Line {
        let stream = self.accept_tcp().await;
        let config = WebSocketConfig::default()
            .max_frame_size(Some(limits::FRAME_BYTES))
            .max_message_size(Some(limits::MESSAGE_BYTES));
        #[expect(clippy::result_large_err, reason = "the signature is the library's")]
        let check = |handshake: &Handshake,
                     response: HandshakeResponse|
         -> Result<HandshakeResponse, ErrorResponse> {
            assert_eq!(handshake.headers()["authorization"], format!("Bearer {TOKEN}"));
            assert_eq!(handshake.uri().path(), "/dev");
            assert_eq!(handshake.uri().query(), None);
            Ok(response)
        };
        let ws = accept_hdr_async_with_config(stream, check, Some(config)).await.unwrap();
        Line { ws, manners: Manners::default(), hellos: Vec::new() }
    }

    /// Accepts a connection and welcomes it.
    pub(crate) async fn welcome(&self) -> Line {
        self.welcome_with(Manners::default()).await
    }

    pub(crate) async fn welcome_with(&self, manners: Manners) -> Line {
        let mut line = self.accept().await;
        line.manners = manners;
        line.expect_hello().await;
        line
    }

    /// Answers the handshake with a status.
    pub(crate) async fn refuse(&self, status: &str) {
        let mut stream = self.accept_tcp().await;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        let _ = stream.read(&mut [0]).await;
    }
}

/// What the agent sent, owned.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Sent {
    Reply { token: String, status: u16, headers: Headers, body: Vec<u8>, end: bool },
    Chunk { token: String, seq: u32, body: Vec<u8>, end: bool },
    Continue { token: String },
    Failed { token: String, seq: u32, code: ErrorCode },
    Progress { token: String, sent: u32, ended: bool },
}

impl Sent {
    pub(crate) fn token(&self) -> &str {
        match self {
            Self::Reply { token, .. }
            | Self::Chunk { token, .. }
            | Self::Continue { token }
            | Self::Failed { token, .. }
            | Self::Progress { token, .. } => token,
        }
    }

    pub(crate) fn is_end(&self) -> bool {
        matches!(self, Self::Reply { end: true, .. } | Self::Chunk { end: true, .. } | Self::Failed { .. })
    }
}

/// A whole response as the edge puts it together.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: Vec<u8>,
    pub(crate) messages: usize,
}

impl Whole {
    pub(crate) fn all(&self, name: &str) -> Vec<&[u8]> {
        self.headers.get_all(name).map(HeaderValue::as_bytes).collect()
    }
}

/// One connection of the agent, as the edge sees it.
pub(crate) struct Line {
    pub(crate) ws: WebSocketStream<Socket>,
    pub(crate) manners: Manners,
    pub(crate) hellos: Vec<Hello>,
}

impl Line {
    pub(crate) async fn send(&mut self, message: &EdgeMessage<'_>) {
        self.ws.send(Message::text(message.encode())).await.unwrap();
    }

    pub(crate) async fn request(&mut self, request: &Request<'_>) {
        self.send(&EdgeMessage::Request(request.clone())).await;
    }

    pub(crate) async fn credit(&mut self, request: &Request<'_>, through: u32) {
        self.send(&EdgeMessage::Credit(Credit { request_id: request.request_id.clone(), through })).await;
    }

    pub(crate) async fn cancel(&mut self, request: &Request<'_>) {
        self.send(&EdgeMessage::Cancel(Cancel { request_id: request.request_id.clone() })).await;
    }

    pub(crate) async fn probe(&mut self, request: &Request<'_>) {
        let (request_id, token) = (request.request_id.clone(), request.token.clone());
        self.send(&EdgeMessage::Probe(Probe { request_id, token })).await;
    }

    pub(crate) async fn drain(&mut self) {
        self.send(&EdgeMessage::Drain(Drain {})).await;
    }

    pub(crate) async fn piece(&mut self, request: &Request<'_>, seq: u32, bytes: &[u8], end: bool) {
        let body = Body::encode(bytes);
        let chunk = RequestChunk { request_id: request.request_id.clone(), seq, body, end };
        self.send(&EdgeMessage::RequestChunk(chunk)).await;
    }

    /// Waits for `hello` and answers it.
    pub(crate) async fn expect_hello(&mut self) {
        let before = self.hellos.len();
        while self.hellos.len() == before {
            let text = self.text().await.expect("a hello before the end");
            self.control(&text).await;
        }
    }

    /// Answers `hello` and `heartbeat`; false for anything else.
    pub(crate) async fn control(&mut self, text: &str) -> bool {
        match AgentMessage::decode(text).unwrap() {
            AgentMessage::Hello(hello) => {
                let refused = |name: &String| self.manners.refuse.iter().find(|(refused, _)| refused == name);
                let welcome = Welcome {
                    seq: hello.seq,
                    version: VERSION,
                    connection_id: "conn=".parse().unwrap(),
                    tunnels: hello
                        .tunnels
                        .iter()
                        .filter(|name| refused(name).is_none())
                        .map(|name| OpenTunnel {
                            name: name.parse().unwrap(),
                            url: format!("https://{name}.tunnel.example.com"),
                        })
                        .collect(),
                    refused: hello
                        .tunnels
                        .iter()
                        .filter_map(refused)
                        .map(|(name, reason)| RefusedTunnel { name: name.clone(), reason: *reason })
                        .collect(),
                    heartbeat_ms: self.manners.heartbeat_ms,
                    lifetime_ms: 7_200_000,
                    reply_timeout_ms: self.manners.reply_timeout_ms,
                    owner: None,
                    may_open: Vec::new(),
                    identity_ms: None,
                    codecs: self.manners.codecs.clone(),
                    websockets: false,
                    deliveries: self.manners.deliveries,
                    policies: self.manners.policies.clone(),
                };
                self.hellos.push(hello);
                self.send(&EdgeMessage::Welcome(welcome)).await;
                true
            }
            AgentMessage::Heartbeat(Heartbeat { seq }) => {
                self.send(&EdgeMessage::Heartbeat(Heartbeat { seq })).await;
                true
            }
            _ => false,
        }
    }

    /// The next text, or how the connection ended.
    pub(crate) async fn text(&mut self) -> Result<String, Option<u16>> {
        loop {
            match patiently("a message of the agent", self.ws.next()).await {
                Some(Ok(Message::Text(text))) => return Ok(text.to_string()),
                Some(Ok(Message::Close(frame))) => {
                    // Reading on sends the answer to the goodbye.
                    let _ = patiently("the end of a connection", self.ws.next()).await;
                    return Err(frame.map(|frame| frame.code.into()));
                }
                Some(Ok(Message::Binary(_))) => panic!("the agent sent a binary message"),
                Some(Ok(_)) => {}
                Some(Err(tungstenite::Error::Capacity(error))) => panic!("the agent sent too much: {error}"),
                Some(Err(_)) | None => return Err(None),
            }
        }
    }

    /// The next message that answers a request, or the close code.
    pub(crate) async fn try_answer(&mut self) -> Result<Sent, Option<u16>> {
        loop {
            let text = self.text().await?;
            if self.control(&text).await {
                continue;
            }
            let decode = |body: Option<Body<'_>>| body.map(|body| body.decode().unwrap()).unwrap_or_default();
            return Ok(match AgentMessage::decode(&text).unwrap() {
                AgentMessage::Reply(reply) => Sent::Reply {
                    token: reply.token.into_owned(),
                    status: reply.status,
                    headers: reply.headers,
                    body: decode(reply.body),
                    end: reply.end,
                },
                AgentMessage::Chunk(chunk) => Sent::Chunk {
                    token: chunk.token.into_owned(),
                    seq: chunk.seq,
                    body: decode(chunk.body),
                    end: chunk.end,
                },
                AgentMessage::Continue(ask) => Sent::Continue { token: ask.token.into_owned() },
                AgentMessage::Failed(failed) => {
                    Sent::Failed { token: failed.token.into_owned(), seq: failed.seq, code: failed.code }
                }
                AgentMessage::Accepted(_) | AgentMessage::Frames(_) => panic!("nobody asked for a websocket"),
                AgentMessage::Progress(progress) => Sent::Progress {
                    token: progress.token.into_owned(),
                    sent: progress.sent,
                    ended: progress.ended,
                },
                AgentMessage::Hello(_) | AgentMessage::Heartbeat(_) | AgentMessage::Deliveries(_) => {
                    unreachable!("answered above")
                }
            });
        }
    }

    pub(crate) async fn answer(&mut self) -> Sent {
        self.try_answer().await.expect("an answer before the end of the connection")
    }

    pub(crate) async fn failure(&mut self) -> (u32, ErrorCode) {
        match self.answer().await {
            Sent::Failed { seq, code, .. } => (seq, code),
            other => panic!("a failure is wanted, not {other:?}"),
        }
    }

    /// A whole response, with credit for every chunk.
    pub(crate) async fn whole(&mut self, request: &Request<'_>) -> Whole {
        let Sent::Reply { token, status, headers, mut body, mut end } = self.answer().await else {
            panic!("a reply comes first")
        };
        assert_eq!(token, request.token);
        let mut messages = 1;
        while !end {
            let Sent::Chunk { seq, body: piece, end: last, .. } = self.answer().await else {
                panic!("a chunk comes next")
            };
            assert_eq!(seq, messages as u32, "one connection keeps the order");
            body.extend(piece);
            end = last;
            messages += 1;
            self.credit(request, seq).await;
        }
        Whole { status, headers, body, messages }
    }

    /// Reads until the agent closes; the close code, if there was one.
    pub(crate) async fn closed(&mut self) -> Option<u16> {
        match self.try_answer().await {
            Ok(sent) => panic!("nothing more is wanted, but {sent:?} came"),
            Err(code) => code,
        }
    }
}

/// A request for the tunnel `web`, with a fresh id and token.
pub(crate) fn request(method: &'static str, target: &str) -> Request<'static> {
    static NEXT: Mutex<u128> = Mutex::new(1);
    let number = {
        let mut next = NEXT.lock().unwrap();
        *next += 1;
        *next
    };
    Request {
        request_id: RequestId::from_random(number.to_be_bytes()),
        token: format!("token-{number}").into(),
        tunnel: "web".parse().unwrap(),
        method: method.into(),
        target: Target::parse(target).unwrap(),
        headers: Headers::new(),
        body: None,
        announced: None,
        streamed: false,
        timeout_ms: 30_000,
        upgrade: None,
        delivery: None,
    }
}

pub(crate) fn get(target: &str) -> Request<'static> {
    request("GET", target)
}

pub(crate) fn with_header(mut request: Request<'static>, name: &str, value: &[u8]) -> Request<'static> {
    request.headers.push(HeaderName::try_from(name).unwrap(), HeaderValue::from_bytes(value).unwrap());
    request
}

pub(crate) fn with_body(mut request: Request<'static>, bytes: &[u8]) -> Request<'static> {
    request.body = Some(Body::encode(bytes).into_owned());
    request
}

/// What the agent calls.
pub(crate) struct Upstream {
    listener: Listener,
    pub(crate) port: u16,
}

impl Upstream {
    pub(crate) async fn bind() -> Self {
        let listener = Listener::bind().await;
        let port = listener.port();
        Self { listener, port }
    }

    pub(crate) async fn accept(&self) -> Peer<Socket> {
        patiently("a call of the upstream", self.accept_whenever()).await
    }

    /// As [`Self::accept`], however long it takes.
    pub(crate) async fn accept_whenever(&self) -> Peer<Socket> {
        Peer::new(self.listener.accept().await.unwrap())
    }

    /// Whether nobody has connected yet.
    pub(crate) async fn is_untouched(&self) -> bool {
        timeout(Duration::from_millis(50), self.listener.accept()).await.is_err()
    }

    /// Accepts one connection for one request and answers it with `response`.
    pub(crate) async fn answer(&self, response: &[u8]) -> (Peer<Socket>, String) {
        let mut peer = self.accept().await;
        let head = peer.head().await;
        peer.write(response).await;
        (peer, head)
    }
}

/// One connection to the upstream.
pub(crate) struct Peer<S> {
    pub(crate) stream: S,
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Peer<S> {
    pub(crate) const fn new(stream: S) -> Self {
        Self { stream }
    }

    /// The exact head of the next request, up to and without the empty line.
    pub(crate) async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(patiently("a request", self.stream.read_u8()).await.expect("a whole head"));
        }
        // Field values may hold any byte: each becomes the character with its number.
        head[..head.len() - 4].iter().map(|&byte| byte as char).collect()
    }

    /// As [`Self::head`], as long as it takes; `None` where the connection ends before it.
    pub(crate) async fn head_or_end(&mut self) -> Option<String> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.stream.read_u8().await.ok()?);
        }
        Some(head[..head.len() - 4].iter().map(|&byte| byte as char).collect())
    }

    pub(crate) async fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        patiently("a body", self.stream.read_exact(&mut bytes)).await.unwrap();
        bytes
    }

    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Waits for the other side to be gone.
    pub(crate) async fn closed(&mut self) {
        let mut rest = vec![0; 64 * 1024];
        patiently("the end of a connection", async {
            while self.stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
        })
        .await;
    }
}

/// The agent's process.
pub(crate) struct Agent {
    pub(crate) child: Child,
    stdout: BufReader<ChildStdout>,
    log: Arc<Mutex<String>>,
}

/// The agent's command with a clean environment.
pub(crate) fn agentd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_agentd"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

impl Agent {
    /// `agentd http` for the tunnel `web`.
    pub(crate) fn http(edge: &Edge, upstream: impl ToString, more: &[&str]) -> Self {
        let mut command = agentd();
        command.env("AGENTD_TOKEN", TOKEN).env("AGENTD_LOG_LEVEL", "debug");
        command.args(["http", &upstream.to_string(), "--name", "web", "--edge", &edge.url]).args(more);
        Self::spawn(command)
    }

    pub(crate) fn run(config: &Path) -> Self {
        let mut command = agentd();
        command.args(["run", "--log-level", "debug", "--config"]).arg(config);
        command.env("AGENTD_CONTROL_SOCKET", config.with_file_name("control.sock"));
        Self::spawn(command)
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let lines = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok(Some(line)) = stderr.next_line().await {
                let _ = writeln!(lines.lock().unwrap(), "{line}");
            }
        });
        Self { child, stdout, log }
    }

    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        patiently("a line of output", self.stdout.read_line(&mut line)).await.unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for the log to say something.
    pub(crate) async fn says(&self, what: &str) {
        patiently(what, async {
            while !self.log().contains(what) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        patiently("the end of the agent", self.child.wait()).await.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}

/// Edge, upstream and agent, connected.
pub(crate) async fn connected() -> (Edge, Line, Upstream, Agent) {
    connected_with(Manners::default(), &[]).await
}

pub(crate) async fn connected_with(manners: Manners, more: &[&str]) -> (Edge, Line, Upstream, Agent) {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let agent = Agent::http(&edge, upstream.port, more);
    let line = edge.welcome_with(manners).await;
    (edge, line, upstream, agent)
}

/// Makes the end of a connection a reset.
pub(crate) fn reset(peer: Peer<Socket>) {
    peer.stream.reset();
}

/// Bytes without a pattern that compresses.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
    .take(len)
    .collect()
}

pub(crate) fn private_file(folder: &Path, name: &str, text: &str) -> io::Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = folder.join(name);
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(path)
}
