//! Which connection to the upstream a request goes out on, and when it goes out once more.

use proto::{error::ErrorCode, message::Request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    sockets::Socket,
    stage::{
        Agent, Edge, Line, Manners, OK, Peer, Sent, TOKEN, Upstream, connected_with, get, noise, patiently,
        private_file, request, with_body,
    },
    transport::agent_with,
};

// RFC 9113 §6, §7.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const NO_ERROR: u32 = 0;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// The upstream's end of an HTTP/2 connection, frame by frame.
struct Http2 {
    stream: Socket,
    body: Vec<u8>,
}

impl Http2 {
    /// Begins a connection that takes this many streams at a time.
    async fn accept(upstream: &Upstream, max_streams: u32) -> Self {
        let mut stream = upstream.accept().await.stream;
        let mut preface = [0; 24];
        patiently("a preface", stream.read_exact(&mut preface)).await.unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let mut this = Self { stream, body: Vec::new() };
        let setting = [&3u16.to_be_bytes()[..], &max_streams.to_be_bytes()].concat();
        this.send(SETTINGS, 0, 0, &setting).await;
        this
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        // An agent that has gone wants no more.
        let _ = self.stream.write_all(&[&head, payload].concat()).await;
    }

    /// The next frame of this kind; the body's bytes are kept, settings and pings are answered.
    async fn next(&mut self, wanted: u8) -> (u8, u32) {
        loop {
            let mut head = [0; 9];
            patiently("a frame", self.stream.read_exact(&mut head)).await.unwrap();
            let [a, b, c, kind, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            patiently("a frame", self.stream.read_exact(&mut payload)).await.unwrap();
            match kind {
                SETTINGS | PING if flags & ACK == 0 => {
                    let payload = if kind == PING { &payload[..] } else { &[] };
                    self.send(kind, ACK, 0, payload).await;
                }
                DATA => self.body.extend(payload),
                _ => {}
            }
            if kind == wanted {
                return (flags, u32::from_be_bytes(stream));
            }
        }
    }

    /// The stream of the next request; its body has not been read.
    async fn request(&mut self) -> u32 {
        self.next(HEADERS).await.1
    }

    /// Reads a request's body to its end.
    async fn whole_body(&mut self) -> Vec<u8> {
        while self.next(DATA).await.0 & END_STREAM == 0 {}
        std::mem::take(&mut self.body)
    }

    /// `:status: 200` and nothing else.
    async fn answer(&mut self, stream: u32) {
        self.send(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88]).await;
    }

    async fn reset(&mut self, stream: u32, code: u32) {
        self.send(RST_STREAM, 0, stream, &code.to_be_bytes()).await;
    }

    /// Nothing above `last` has been or will be touched.
    async fn go_away(&mut self, last: u32) {
        self.send(GOAWAY, 0, 0, &[last.to_be_bytes(), NO_ERROR.to_be_bytes()].concat()).await;
    }
}

async fn http2() -> (Edge, Line, Upstream, Agent, tempfile::TempDir) {
    let upstream = Upstream::bind().await;
    let (line, agent, folder, edge) =
        agent_with(&format!("upstream = \"http://127.0.0.1:{}\"\nhttp2 = \"always\"", upstream.port)).await;
    (edge, line, upstream, agent, folder)
}

async fn is_ok(line: &mut Line, sent: &Request<'_>) {
    let whole = line.whole(sent).await;
    assert_eq!(whole.status, 200);
}

#[tokio::test]
async fn what_an_upstream_promises_not_to_have_touched_is_sent_again_whatever_the_method() {
    let (_edge, mut line, upstream, _agent, _folder) = http2().await;
    let body = noise(150_000);
    for (goes, announced) in [(true, false), (true, true), (false, false), (false, true)] {
        line.request(&get("/")).await;
        let mut first = Http2::accept(&upstream, 100).await.await_request(&mut line).await;
        let mut sent = request("POST", "/pay");
        if announced {
            sent.announced = Some(body.len() as u64);
            line.request(&sent).await;
            assert!(matches!(line.answer().await, Sent::Continue { .. }));
            line.piece(&sent, 1, &body[..60_000], false).await;
        } else {
            sent = with_body(sent, &body[..50_000]);
            line.request(&sent).await;
        }
        let stream = first.request().await;
        first.next(DATA).await;
        if goes {
            first.go_away(stream - 2).await;
        } else {
            first.reset(stream, REFUSED_STREAM).await;
        }
        let mut second = Http2::accept(&upstream, 100).await;
        let stream = second.request().await;
        if announced {
            line.piece(&sent, 2, &body[60_000..], true).await;
        }
        second.send(8, 0, 0, &1_000_000u32.to_be_bytes()).await;
        second.send(8, 0, stream, &1_000_000u32.to_be_bytes()).await;
        let got = second.whole_body().await;
        assert!(got == body[..if announced { body.len() } else { 50_000 }], "{goes} {announced}");
        second.answer(stream).await;
        is_ok(&mut line, &sent).await;
        // The next turn begins with a new connection.
        second.go_away(stream).await;
        first.go_away(1).await;
        drop((first, second));
    }
}

impl Http2 {
    /// Serves one request, so that the connection is one that has served before.
    async fn await_request(mut self, line: &mut Line) -> Self {
        let stream = self.request().await;
        self.answer(stream).await;
        assert!(line.answer().await.is_end());
        self
    }
}

#[tokio::test]
async fn what_an_upstream_may_have_touched_is_not_sent_again() {
    let (_edge, mut line, upstream, _agent, _folder) = http2().await;
    for how in ["cancelled", "named", "lost"] {
        line.request(&get("/")).await;
        let mut peer = Http2::accept(&upstream, 100).await.await_request(&mut line).await;
        line.request(&with_body(request("POST", "/pay"), b"body")).await;
        let stream = peer.request().await;
        match how {
            "cancelled" => peer.reset(stream, CANCEL).await,
            "named" => peer.go_away(stream).await,
            _ => {}
        }
        if how != "cancelled" {
            drop(peer.stream);
        } else {
            peer.go_away(stream).await;
        }
        assert_eq!(line.failure().await, (0, ErrorCode::UpstreamReset), "{how}");
        assert!(upstream.is_untouched().await);
    }
    // A GET that was lost with its connection goes out once more.
    line.request(&get("/")).await;
    let mut peer = Http2::accept(&upstream, 100).await.await_request(&mut line).await;
    let sent = get("/again");
    line.request(&sent).await;
    peer.request().await;
    drop(peer);
    let mut peer = Http2::accept(&upstream, 100).await;
    let stream = peer.request().await;
    peer.answer(stream).await;
    is_ok(&mut line, &sent).await;
}

#[tokio::test]
async fn a_request_that_finds_no_stream_opens_a_connection() {
    let (_edge, mut line, upstream, _agent, _folder) = http2().await;
    let sent: Vec<_> = (0..3).map(|_| get("/slow")).collect();
    let mut peers = Vec::new();
    for sent in &sent {
        line.request(sent).await;
        let mut peer = Http2::accept(&upstream, 1).await;
        let stream = peer.request().await;
        peers.push((peer, stream));
    }
    // Each is answered while the others wait, the last one first.
    for (sent, (peer, stream)) in sent.iter().zip(&mut peers).rev() {
        peer.answer(*stream).await;
        is_ok(&mut line, sent).await;
    }
    // All three are there for what comes next.
    for _ in 0..3 {
        line.request(&get("/next")).await;
    }
    for (peer, _) in &mut peers {
        peer.request().await;
    }
    assert!(upstream.is_untouched().await);
}

#[tokio::test]
async fn a_connection_that_is_silent_costs_the_request_that_finds_it_out_and_no_more() {
    let (_edge, mut line, upstream, _agent, _folder) = http2().await;
    line.request(&get("/")).await;
    let mut silent = Http2::accept(&upstream, 100).await.await_request(&mut line).await;
    let lost = get("/lost");
    line.request(&lost).await;
    silent.request().await;
    // From here on nothing is read and nothing is said.
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    let mut second: Option<Http2> = None;
    for _ in 0..3 {
        let sent = with_body(request("POST", "/"), b"body");
        line.request(&sent).await;
        let mut peer = match second.take() {
            Some(peer) => peer,
            None => Http2::accept(&upstream, 100).await,
        };
        let stream = peer.request().await;
        peer.answer(stream).await;
        is_ok(&mut line, &sent).await;
        second = Some(peer);
    }
}

#[tokio::test]
async fn an_early_answer_over_http2_is_whole_and_a_broken_one_is_not() {
    let (_edge, mut line, upstream, _agent, _folder) = http2().await;
    let mut sent = request("POST", "/");
    sent.announced = Some(1_000_000);
    line.request(&sent).await;
    assert!(matches!(line.answer().await, Sent::Continue { .. }));
    line.piece(&sent, 1, &noise(50_000), false).await;
    let mut peer = Http2::accept(&upstream, 100).await;
    let stream = peer.request().await;
    // RFC 9113 §8.1: the answer, then that the rest is not wanted.
    peer.send(HEADERS, END_HEADERS, stream, &[0x88]).await;
    peer.send(DATA, END_STREAM, stream, b"early").await;
    peer.reset(stream, NO_ERROR).await;
    line.piece(&sent, 2, &noise(50_000), false).await;
    assert_eq!(line.whole(&sent).await.body, b"early");
    for code in [CANCEL, 2, NO_ERROR] {
        line.request(&get("/")).await;
        let stream = peer.request().await;
        peer.send(HEADERS, END_HEADERS, stream, &[0x88]).await;
        let Sent::Reply { end: false, .. } = line.answer().await else { panic!("a reply without an end") };
        peer.send(DATA, 0, stream, b"hal").await;
        peer.reset(stream, code).await;
        loop {
            match line.answer().await {
                Sent::Chunk { end: false, .. } => {}
                Sent::Failed { code, .. } => break assert_eq!(code, ErrorCode::UpstreamReset),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn an_idle_connection_blocks_no_newer_one() {
    // A server that serves one connection at a time, in the order in which they came.
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let _agent = Agent::http(&edge, upstream.port, &[]);
    let mut line = edge.welcome().await;
    for round in 0..2 {
        let (a, b) = (get("/a"), with_body(request("POST", "/b"), b"body"));
        line.request(&a).await;
        let mut first = upstream.accept().await;
        first.head().await;
        line.request(&b).await;
        if round == 1 {
            // The first is busy still when the second begins to starve.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        first.write(OK).await;
        is_ok(&mut line, &a).await;
        first.closed().await;
        let (second, _) = upstream.answer(OK).await;
        is_ok(&mut line, &b).await;
        drop(second);
    }
}

#[tokio::test]
async fn an_idle_connection_of_one_tunnel_blocks_no_other_tunnel() {
    let upstream = Upstream::bind().await;
    let port = upstream.port;
    let (mut line, _agent, _folder, _edge) =
        agent_with(&format!("upstream = {port}\n[[tunnel]]\nname = \"other\"\nupstream = {port}\n")).await;
    let a = get("/a");
    line.request(&a).await;
    let (mut first, _) = upstream.answer(OK).await;
    is_ok(&mut line, &a).await;
    let mut b = get("/b");
    b.tunnel = "other".parse().unwrap();
    line.request(&b).await;
    first.closed().await;
    let _second = upstream.answer(OK).await;
    is_ok(&mut line, &b).await;
}

/// Serves one request and waits for the connection to be closed. The last head is returned.
async fn served_and_closed(line: &mut Line, upstream: &Upstream, answer: &[u8]) -> String {
    let sent = get("/");
    line.request(&sent).await;
    let (mut peer, head): (Peer<Socket>, _) = upstream.answer(answer).await;
    is_ok(line, &sent).await;
    peer.closed().await;
    head
}

#[tokio::test]
async fn a_connection_is_kept_as_long_as_configured_and_announced() {
    let upstream = Upstream::bind().await;
    let port = upstream.port;
    let with = |keep_alive: &str| format!("upstream = {port}\n{keep_alive}\n");
    let (mut line, _agent, _folder, _edge) = agent_with(&with("keep_alive = \"off\"")).await;
    for _ in 0..2 {
        let head = served_and_closed(&mut line, &upstream, OK).await;
        assert!(head.contains("\r\nconnection: close"), "{head}");
    }
    let (mut line, _agent, _folder, _edge) = agent_with(&with("keep_alive = \"100ms\"")).await;
    let head = served_and_closed(&mut line, &upstream, OK).await;
    assert!(!head.contains("connection"), "{head}");
    // What is announced bounds what is configured.
    let (mut line, _agent, _folder, _edge) = agent_with(&with("")).await;
    for timeout in ["timeout=0", "timeout=1, max=100"] {
        let answer = format!("HTTP/1.1 200 OK\r\nKeep-Alive: {timeout}\r\ncontent-length: 2\r\n\r\nok");
        served_and_closed(&mut line, &upstream, answer.as_bytes()).await;
    }
}

#[tokio::test]
async fn out_of_descriptors_the_agent_says_so_answers_who_asks_and_recovers() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let config = format!(
        "control_socket = \"control.sock\"\n[edge]\nurl = \"{}\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = {}\n",
        edge.url, upstream.port
    );
    let path = private_file(folder.path(), "agentd.toml", &config).unwrap();
    let mut command = tokio::process::Command::new("sh");
    // Both limits: the soft one alone would be raised.
    command.args([
        "-c",
        "ulimit -n 48; exec \"$0\" run --log-level info --config \"$1\"",
        env!("CARGO_BIN_EXE_agentd"),
    ]);
    command.arg(&path).env_clear().env("PATH", "/usr/bin:/bin").kill_on_drop(true);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let agent = Agent::spawn(command);
    let mut line = edge.welcome().await;
    // More than there are descriptors, none of them answered.
    for _ in 0..60 {
        line.request(&get("/slow")).await;
    }
    let mut peers = Vec::new();
    let mut refused = 0;
    while peers.len() + refused < 60 {
        tokio::select! {
            peer = upstream.accept() => peers.push(peer),
            failure = line.failure() => {
                assert_eq!(failure, (0, ErrorCode::UpstreamUnreachable));
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    agent.says("it is agentd that may open no more files").await;
    for _ in 0..3 {
        let mut asking =
            Peer::new(tokio::net::UnixStream::connect(folder.path().join("control.sock")).await.unwrap());
        asking.write("GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
        assert!(asking.head().await.starts_with("HTTP/1.1 200 "));
        asking.closed().await;
    }
    for peer in &mut peers {
        peer.head().await;
        peer.write("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        assert!(line.answer().await.is_end());
    }
    let sent = get("/after");
    line.request(&sent).await;
    let _peer = upstream.answer(OK).await;
    is_ok(&mut line, &sent).await;
    let complaints = agent.log().lines().filter(|line| line.contains("WARN")).count();
    assert!(complaints <= 2, "{complaints}: {}", agent.log());
}

#[tokio::test]
async fn the_soft_limit_of_descriptors_is_raised() {
    let edge = Edge::bind().await;
    let agent = Agent::http(&edge, 1, &[]);
    let _line = edge.welcome().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.child.id().unwrap())).unwrap();
    let files: Vec<_> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4], "soft and hard");
}

#[tokio::test]
async fn a_timeout_that_the_edge_does_not_wait_for_is_said_once() {
    let upstream = Upstream::bind().await;
    let (mut line, agent, _folder, _edge) =
        agent_with(&format!("upstream = {}\nrequest_timeout = \"5m\"", upstream.port)).await;
    for turn in 0..2 {
        let sent = get("/");
        line.request(&sent).await;
        let (peer, _) =
            upstream.answer(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        is_ok(&mut line, &sent).await;
        drop(peer);
        agent.says("request_timeout of web is 300s, but the edge waits about 30 s for a head").await;
        assert_eq!(agent.log().matches("the edge waits").count(), 1, "{turn}");
    }
    // An edge that says how long it waits does so before the first request.
    for (reply_timeout_ms, is_less) in [(300_000, false), (299_999, true)] {
        let manners = Manners { reply_timeout_ms: Some(reply_timeout_ms), ..Manners::default() };
        let (_edge, _line, _upstream, agent) = connected_with(manners, &["--request-timeout", "5m"]).await;
        agent.says("tunnel is open").await;
        if is_less {
            agent.says("request_timeout of web is 300s, but the edge waits about 300 s").await;
        } else {
            assert!(!agent.log().contains("the edge waits"), "{}", agent.log());
        }
    }
}

/// Runs what follows where the name server is one that never answers, names are those of a file, and no more threads
/// and processes may be made than the unit's `TasksMax=` allows. The program comes on standard input: its folder may be
/// closed to the user that the limit is for.
const SILENT_NAME_SERVER: &str = r#"
set -e
mount --bind resolv.conf "$(realpath /etc/resolv.conf)"
mount --bind hosts "$(realpath /etc/hosts)"
mount --bind nsswitch.conf "$(realpath /etc/nsswitch.conf)"
exec prlimit --nproc=64 setpriv --reuid=62917 --regid=62917 --clear-groups /proc/self/fd/0 "$@"
"#;

/// The tasks of a process.
fn tasks(agent: &Agent) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", agent.child.id().unwrap())).unwrap().count()
}

/// Whatever hangs is slow for minutes: what comes at all did not wait for it.
#[tokio::test]
async fn a_name_server_that_never_answers_holds_up_neither_the_edge_nor_other_tunnels() {
    const HANGING: usize = 24;
    const MORE: usize = 60;
    let address = format!("127.91.{}.53", std::process::id() % 250);
    let Ok(_silent) = tokio::net::UdpSocket::bind((&*address, 53)).await else {
        eprintln!("skipped: only root may be a name server");
        return;
    };
    let may =
        std::process::Command::new("unshare").args(["--mount", "setpriv", "--reuid=62917", "true"]).output();
    if !may.is_ok_and(|may| may.status.success()) {
        eprintln!("skipped: no mount namespace can be made here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let file = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    file("resolv.conf", &format!("nameserver {address}\noptions timeout:30 attempts:5\n"));
    file("hosts", "127.0.0.1 edge.example.test fine.example.test\n");
    file("nsswitch.conf", "hosts: files dns\n");
    let token = private_file(folder.path(), "token", TOKEN).unwrap();
    std::os::unix::fs::chown(&token, Some(62917), Some(62917)).unwrap();
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let mut config = format!(
        "[edge]\nurl = \"{}\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = \"http://fine.example.test:{}\"\n",
        edge.url.replace("127.0.0.1", "edge.example.test"),
        upstream.port
    );
    for number in 0..MORE {
        config += &format!(
            "[[tunnel]]\nname = \"hangs-{number}\"\nupstream = \"http://hangs-{number}.example.test:80\"\n"
        );
    }
    file("agentd.toml", &config);

    let mut command = tokio::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", SILENT_NAME_SERVER, "agentd"]);
    command.args(["run", "--config"]).arg(folder.path().join("agentd.toml")).current_dir(folder.path());
    command.stdin(std::fs::File::open(env!("CARGO_BIN_EXE_agentd")).unwrap());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).kill_on_drop(true);
    let agent = Agent::spawn(command);

    let hang = |number: usize| {
        let mut request = get("/hangs");
        request.tunnel = format!("hangs-{number}").parse().unwrap();
        request
    };
    let mut line = edge.welcome().await;
    for number in 0..HANGING {
        line.request(&hang(number)).await;
    }
    // Another tunnel's name is looked up while they hang: its answer is the first.
    let sent = get("/fine");
    line.request(&sent).await;
    let (mut peer, _) = upstream.answer(OK).await;
    is_ok(&mut line, &sent).await;

    for number in HANGING..MORE {
        line.request(&hang(number)).await;
    }
    // A message that comes behind them has been read after them.
    line.probe(&hang(0)).await;
    let Sent::Progress { .. } = line.answer().await else { panic!("they hang, and nothing else") };
    assert!(tasks(&agent) < 64, "{} tasks", tasks(&agent));
    drop(line);
    // The edge's name is looked up anew.
    let mut line = edge.welcome().await;
    let sent = get("/fine");
    line.request(&sent).await;
    // Its connection was kept: this needs no name.
    peer.head().await;
    peer.write(OK).await;
    while !matches!(line.answer().await, Sent::Reply { status: 200, .. }) {}
}
