//! What the system has to do wherever it runs: each scenario takes an edge and panics where the edge does
//! not do it. Tests run them against `local`, `tests/deployed` against a stack in an account.
//!
//! A scenario knows no edge: what differs between them is in [`Stack`] and its [`Front`].

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use proto::limits;
use rustix::process::Signal;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::timeout,
};

use crate::{
    PATIENCE,
    client::{Answer, Connection},
    eventually, noise,
    raw_agent::RawAgent,
    sockets::Port,
    stack::{Front, Stack},
    upstream::{Conn, Upstream},
};

const MIB: usize = 1024 * 1024;

/// A scenario at work.
pub type Running<'s> = Pin<Box<dyn Future<Output = Option<&'static str>> + 's>>;

/// One thing that the system has to do.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is.
    pub name: &'static str,
    /// Why it cannot be asked of this edge, if it cannot.
    pub inapplicable: fn(&Stack) -> Option<&'static str>,
    /// Asks it of this edge. Where its front takes something away, that is what is expected, and the front's behaviour is
    /// what is returned, by its name in docs/aws-fronts.md.
    pub run: for<'s> fn(&'s Stack) -> Running<'s>,
}

/// What a scenario returns.
trait Met {
    fn behaviour(self) -> Option<&'static str>;
}

impl Met for () {
    fn behaviour(self) -> Option<&'static str> {
        None
    }
}

impl Met for Option<&'static str> {
    fn behaviour(self) -> Option<&'static str> {
        self
    }
}

impl fmt::Debug for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn always(_: &Stack) -> Option<&'static str> {
    None
}

fn by_path(stack: &Stack) -> Option<&'static str> {
    (!stack.is_by_path()).then_some("tunnels have hosts of their own here")
}

macro_rules! scenarios {
    ($( $name:literal: $function:ident if $when:ident, )+) => {
        /// All of them, in the order in which they explain each other.
        pub const ALL: &[Scenario] = &[$( Scenario {
            name: $name,
            inapplicable: $when,
            run: |stack| Box::pin(async move { $function(stack).await.behaviour() }),
        }, )+];
    };
}

scenarios! {
    "method, target, fields, cookies and status are carried": carries_everything_of_a_head if always,
    "a path's prefix is taken off and put back": path_mode if by_path,
    "bodies of every awkward size pass both ways": bodies_of_every_awkward_size if always,
    "a body of the ceiling passes, one byte more is 413": a_body_of_the_ceiling if always,
    "many clients get their own answers": many_clients if always,
    "each flush arrives before the next is made": each_flush_arrives if always,
    "a large download passes whole": a_download if always,
    "an unknown tunnel is 404, one without agent 503": unknown_and_offline if always,
    "an upstream that is down is 502, its own 500 passes": an_upstream_that_is_down if always,
    "a slow upstream is 504 and its call is cancelled": a_slow_upstream if always,
    "a tunnel past its concurrency is 429": past_its_concurrency if always,
    "a websocket handshake is refused with 501": a_websocket_handshake if always,
    "an agent that dies leaves no body that looks whole": an_agent_that_dies if always,
    "an agent is replaced and no request is lost": an_agent_is_replaced if always,
    "a token that is none is refused": a_token_that_is_none if always,
}

/// Checks an answer of the edge itself.
pub fn assert_problem(answer: &Answer, status: u16, code: &str) {
    assert_eq!(
        (answer.status, answer.field("x-tunnel-error").as_deref()),
        (status, Some(code)),
        "{}",
        answer.text()
    );
    assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
    assert_eq!(answer.field("content-type").unwrap(), "application/problem+json");
    assert!(answer.text().contains(code) && answer.complete);
}

/// The bytes as a chunk of a chunked body.
#[must_use]
pub fn chunked(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// Method, target, fields, cookies and status of a request and its response arrive as they were sent.
pub async fn carries_everything_of_a_head(stack: &Stack) -> Option<&'static str> {
    const PLAIN: &[(&str, &str)] =
        &[("GET", "/?a=1&a=2&b=%2526&c=+%20&d"), ("PUT", "/a/b-c_d.e~f"), ("DELETE", "/")];
    const RAW: &[(&str, &str)] =
        &[("PROPFIND", "/a;b=c/d%2Fe?x"), ("M-SEARCH", "//double//slash"), ("QUERY", "/%2e%2e/%FF")];
    // What a front may refuse or, like a bare question mark, cannot tell from its absence.
    const EXACT: &[(&str, &str)] = &[("x!y", "/|{}"), ("DELETE", "/?")];
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "X-B: 1\r\nSet-Cookie: a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT\r\nX-A: 2\r\n\
                      Set-Cookie: b=\"x, y\"\r\nSet-Cookie: c=\r\nX-Empty: \r\n\
                      Location: https://elsewhere.example/?x=%2F\r\n";
        conn.answer("307 Whatever Reason", fields, b"moved").await.then_some(conn)
    })
    .await;
    let front = stack.front();
    let web = stack.tunnel("head");
    let _agent = web.agent(&upstream.address());
    let exact = if front.is_exact() { EXACT } else { &[] };
    for &(method, target) in PLAIN.iter().chain(RAW).chain(exact) {
        let method = if front.takes(method) {
            method
        } else {
            let before = upstream.recorded().len();
            assert_eq!(web.send(&web.request(method, target)).await.status, 403, "{method}");
            assert_eq!(upstream.recorded().len(), before, "{method} went through");
            "PATCH"
        };
        let request = web
            .request(method, target)
            .field("X-Twice", "one")
            .field("x-other", "between")
            .field("X-Twice", "two")
            .field("Cookie", "a=1; b=2");
        let answer = web.send(&request).await;
        assert_eq!(answer.status, 307, "{method} {target}: {}", answer.text());
        let recorded = upstream.recorded().pop().unwrap();
        assert_eq!(recorded.line, format!("{method} {} HTTP/1.1", front.target_of(target)));
        let twice = recorded.all("x-twice").join(",");
        assert_eq!(twice.split(',').map(str::trim).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(recorded.all("cookie"), ["a=1; b=2"]);
        assert_eq!(recorded.all("x-tunnel-request-id"), answer.all("x-tunnel-request-id"));
        let path = if stack.is_by_path() { format!("/{}", web.name()) } else { "/".to_owned() };
        let cookies = ["a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT", "b=\"x, y\"", "c="];
        let came = answer.all("set-cookie");
        if stack.is_by_path() {
            // The path of a cookie is the tunnel's own; what it says otherwise is not touched.
            assert!(came.iter().zip(cookies).all(|(came, own)| came.starts_with(own)), "{came:?}, {path}");
            assert_eq!(came.len(), cookies.len());
        } else {
            assert_eq!(came, cookies);
        }
        let location = answer.field("location").unwrap();
        assert_eq!(location, "https://elsewhere.example/?x=%2F", "no redirect is followed or changed");
        assert_eq!((answer.field("x-a").as_deref(), answer.field("x-b").as_deref()), (Some("2"), Some("1")));
        assert_eq!(answer.field("x-empty").as_deref(), Some(""));
        if front.is_exact() {
            let order: Vec<_> = answer.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
            let at = |name: &str| order.iter().position(|own| own == name).unwrap();
            assert!(at("x-b") < at("x-a") && at("x-a") < at("x-empty"), "{order:?}");
        }
        assert_eq!(answer.text(), "moved");
    }
    match front {
        Front::HttpApi => Some("decoded-paths"),
        Front::CloudFront | Front::Relay => Some("edge-methods"),
        Front::Local | Front::None => None,
    }
}

/// In path mode, what the upstream says about its own paths is moved below the tunnel's.
pub async fn path_mode(stack: &Stack) {
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "Location: /login\r\nSet-Cookie: s=1; Path=/\r\nContent-Type: text/html\r\n\
                      Set-Cookie: __Host-id=2; Path=/; Secure\r\nSet-Cookie: __Secure-t=3; Path=/a; Secure\r\n\
                      Content-Location: /items/1\r\nRefresh: 5; url=/next\r\n";
        conn.answer("302 Found", fields, b"<a href=\"/login\">").await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("path");
    let _agent = web.agent(&upstream.address());
    let answer = web.get("/start?x=1").await;
    let prefix = format!("/{}", web.name());
    assert_eq!(answer.status, 302, "{}", answer.text());
    assert_eq!(answer.field("location").unwrap(), format!("{prefix}/login"));
    // A browser takes a cookie named `__Host-` with `Path=/` only, and rejects it otherwise.
    let cookies = [
        format!("s=1; Path={prefix}"),
        "__Host-id=2; Path=/; Secure".to_owned(),
        format!("__Secure-t=3; Path={prefix}/a; Secure"),
    ];
    assert_eq!(answer.all("set-cookie"), cookies);
    assert_eq!(answer.field("content-location").unwrap(), format!("{prefix}/items/1"));
    assert_eq!(answer.field("refresh").unwrap(), format!("5; url={prefix}/next"));
    assert_eq!(answer.text(), "<a href=\"/login\">", "a body is never touched");
    let recorded = upstream.recorded().pop().unwrap();
    assert_eq!(recorded.target(), "/start?x=1");
    assert_eq!(recorded.all("x-forwarded-prefix"), std::slice::from_ref(&prefix));

    // The resource that WebDAV names is one of the upstream's.
    let own = format!(
        "{}://{}",
        recorded.all("x-forwarded-proto").concat(),
        recorded.all("x-forwarded-host").concat()
    );
    for there in [format!("{prefix}/b%20c"), format!("{own}{prefix}/b%20c")] {
        let answer = web.send(&web.request("MOVE", "/a").field("Destination", &there)).await;
        assert_eq!(answer.status, 302, "{}", answer.text());
        let recorded = upstream.recorded().pop().unwrap();
        let said = recorded.all("destination").concat();
        assert!(said.ends_with("/b%20c") && !said.contains(&prefix), "{there}: {said}");
    }
    // Another tunnel's resource stays what it is.
    let other = format!("{own}/another/x");
    web.send(&web.request("MOVE", "/a").field("Destination", &other)).await;
    assert_eq!(upstream.recorded().pop().unwrap().all("destination"), [other]);

    // Relative links of the first page begin below the tunnel, once the address ends with a slash.
    let before = upstream.recorded().len();
    let answer = web.send(&web.request("GET", "?q=1").field("Accept", "text/html")).await;
    assert_eq!((answer.status, answer.field("location")), (308, Some(format!("{prefix}/?q=1"))));
    assert_eq!(upstream.recorded().len(), before, "nothing was dispatched");
}

/// Bodies around every limit on the way, of noise and of text, come back as they went.
pub async fn bodies_of_every_awkward_size(stack: &Stack) {
    let kib = 1024;
    let sizes = [
        0,
        1,
        23 * kib,
        32 * kib - 1,
        32 * kib,
        32 * kib + 1,
        95 * kib,
        limits::CHUNK_BYTES - 1,
        limits::CHUNK_BYTES,
        limits::CHUNK_BYTES + 1,
        128 * kib - 1,
        128 * kib,
        128 * kib + 1,
        256 * kib,
        1024 * kib,
        4096 * kib,
    ];
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("bodies");
    let _agent = web.agent(&upstream.address());
    for (index, size) in sizes.into_iter().enumerate() {
        let text: Vec<u8> =
            noise(index as u64, size).iter().map(|byte| b"abc \n\"\\{}"[usize::from(byte % 9)]).collect();
        for body in [noise(index as u64, size), text] {
            let answer = web.send(&web.request("POST", "/echo").body(body.clone())).await;
            assert_eq!(answer.status, 200, "{size}: {}", answer.text());
            assert!(answer.complete, "{size}");
            assert_eq!(answer.body.len(), size);
            assert_eq!(Sha256::digest(&answer.body), Sha256::digest(&body), "{size}");
            if stack.front().is_exact() {
                assert_eq!(answer.field("content-length").unwrap(), size.to_string());
            }
        }
    }
}

/// The largest body passes; one byte more is refused before the upstream hears of it, or streamed as any other where the
/// front has no largest.
pub async fn a_body_of_the_ceiling(stack: &Stack) {
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("ceiling");
    let _agent = web.agent(&upstream.address());
    let body = noise(1, limits::REQUEST_BODY_BYTES);
    let answer = web.send(&web.request("POST", "/").body(body.clone())).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.complete && answer.body == body);
    let more = [body, vec![0]].concat();
    let answer = web.send(&web.request("POST", "/").body(more.clone())).await;
    if stack.front() == Front::Relay {
        assert!(answer.status == 200 && answer.complete && answer.body == more, "{}", answer.status);
        return;
    }
    assert_problem(&answer, 413, "request_too_large");
    assert!(answer.text().contains(&limits::REQUEST_BODY_BYTES.to_string()), "{}", answer.text());
    assert_eq!(upstream.recorded().len(), 1, "what is refused goes nowhere");
}

/// Many clients ask at the same time, each again and again, and none gets another's answer.
pub async fn many_clients(stack: &Stack) {
    let scale = stack.scale();
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("clients");
    let _agent = web.agent(&upstream.address());
    let wrong = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..scale.clients {
        let (stack, wrong) = (stack.clone(), Arc::clone(&wrong));
        clients.spawn(async move {
            let web = stack.tunnel("clients");
            let mut connection = web.open().await;
            for round in 0..scale.rounds {
                let id = client * 1000 + round;
                let body = noise(id as u64, id * 37 % 4000);
                let request = web.request("POST", &format!("/{id}")).body(body.clone());
                let answer = connection.exchange(&request).await;
                let own = answer.status == 200
                    && answer.body == body
                    && answer.field("x-line") == Some(format!("POST /{id} HTTP/1.1"));
                if !own {
                    eprintln!("{id}: {} {}", answer.status, answer.text());
                    wrong.fetch_add(1, Ordering::Relaxed);
                    // Whatever came, the next answer is not to be read out of its rest.
                    connection = web.open().await;
                }
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    let asked = scale.clients * scale.rounds;
    assert_eq!(wrong.load(Ordering::Relaxed), 0, "of {asked} answers");
    assert_eq!(upstream.recorded().len(), asked, "each request reached the upstream once");
}

/// What the upstream flushes is with the client before the upstream makes more, the head before all.
pub async fn each_flush_arrives(stack: &Stack) -> Option<&'static str> {
    const EVENTS: usize = 10;
    let go = Arc::new(Semaphore::new(0));
    let allowed = Arc::clone(&go);
    let ended = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&ended);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let (allowed, ends) = (Arc::clone(&allowed), Arc::clone(&ends));
        async move {
            let is_chunked = request.target() == "/sse";
            let framing = if is_chunked { "Transfer-Encoding: chunked" } else { "Content-Length: 130" };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n");
            assert!(conn.write(head).await);
            for event in 0..EVENTS {
                allowed.acquire().await.unwrap().forget();
                let event = format!("data: ev {event:02}\n\n");
                let event = if is_chunked { chunked(event.as_bytes()) } else { event.into_bytes() };
                assert!(conn.write(event).await);
            }
            allowed.acquire().await.unwrap().forget();
            ends.store(true, Ordering::Release);
            if is_chunked {
                assert!(conn.write("0\r\n\r\n").await);
            }
            Some(conn)
        }
    })
    .await;
    let web = stack.tunnel("flush");
    let _agent = web.agent(&upstream.address());
    for target in ["/sse", "/length"] {
        let mut connection = web.open().await;
        connection.begin(&web.request("GET", target)).await;
        if !stack.front().streams() {
            // Everything comes at once, and not before its end.
            ended.store(false, Ordering::Release);
            go.add_permits(EVENTS + 1);
            let head = connection.head().await;
            assert!(ended.load(Ordering::Acquire), "{target}: a head before the end of the body");
            let (body, complete) = connection.body(&head).rest().await;
            let events: String = (0..EVENTS).map(|event| format!("data: ev {event:02}\n\n")).collect();
            assert_eq!((String::from_utf8(body).unwrap(), complete), (events, true), "{target}");
            continue;
        }
        let head = connection.head().await;
        assert_eq!(head.status, 200);
        assert_eq!(head.field("content-type").unwrap(), "text/event-stream");
        let mut body = connection.body(&head);
        for event in 0..EVENTS {
            // The upstream writes this event only now: whoever held it back would hold it for ever.
            go.add_permits(1);
            let event = format!("data: ev {event:02}\n\n").into_bytes();
            assert_eq!(body.take(event.len()).await, event, "{target}");
        }
        go.add_permits(1);
        assert_eq!(body.rest().await, (Vec::new(), true), "{target}: the end comes too");
    }
    (!stack.front().streams()).then_some("buffered-answers")
}

/// Bytes that a position in a stream has, so that no piece can stand for another.
#[must_use]
pub fn piece(index: usize) -> Vec<u8> {
    noise(index as u64 + 1, MIB)
}

/// A download of many MiB arrives whole.
pub async fn a_download(stack: &Stack) {
    let pieces = stack.scale().download_mib.min(stack.front().response_mib());
    let upstream = Upstream::start(move |_, mut conn: Conn| async move {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", pieces * MIB);
        assert!(conn.write(head).await);
        for index in 0..pieces {
            assert!(conn.write(piece(index)).await);
        }
        Some(conn)
    })
    .await;
    let web = stack.tunnel("download");
    let _agent = web.agent(&upstream.address());
    download(&web.request("GET", "/"), web.open().await, stack.front(), pieces).await;
}

/// Reads such a download.
pub async fn download(
    request: &crate::client::Request,
    mut connection: Connection,
    front: Front,
    pieces: usize,
) {
    connection.begin(request).await;
    let head = connection.head().await;
    assert_eq!(head.status, 200);
    if front.is_exact() {
        assert_eq!(head.field("content-length").unwrap(), (pieces * MIB).to_string());
    }
    let (mut sent, mut came) = (Sha256::new(), Sha256::new());
    let mut body = connection.body(&head);
    for index in 0..pieces {
        sent.update(piece(index));
        came.update(body.take(MIB).await);
    }
    assert_eq!(body.rest().await, (Vec::new(), true));
    assert_eq!(sent.finalize(), came.finalize());
}

/// Nobody's tunnel is 404, somebody's without an agent 503, for programs and for browsers.
pub async fn unknown_and_offline(stack: &Stack) {
    let upstream = Upstream::echo().await;
    for nobody in [stack.tunnel("nobody"), stack.named("www")] {
        assert_problem(&nobody.get("/").await, 404, "no_such_tunnel");
    }
    let web = stack.tunnel("offline");
    let mut agent = web.agent(&upstream.address());
    assert_eq!(web.get("/").await.status, 200);
    agent.process().signal(Signal::TERM);
    assert_eq!(agent.process_mut().wait(), Some(0));
    let answer = web.get("/").await;
    assert_problem(&answer, 503, "tunnel_offline");
    assert!(answer.field("retry-after").is_some());
    let page = web.send(&web.request("GET", "/").field("Accept", "text/html,*/*")).await;
    assert!(page.field("content-type").unwrap().starts_with("text/html"));
    assert!(page.text().contains("tunnel_offline"));
    // It comes back where it was.
    let _again = web.agent(&upstream.address());
    assert_eq!(web.get("/").await.status, 200);
}

/// An upstream that is down is 502 at once; what one says itself, a 500 even, passes.
pub async fn an_upstream_that_is_down(stack: &Stack) {
    let down = stack.tunnel("down");
    let nobody = Port::take();
    let _agent = down.agent(&nobody.to_string());
    let begun = Instant::now();
    assert_problem(&down.get("/").await, 502, "upstream_unreachable");
    assert!(begun.elapsed() < Duration::from_secs(4) + stack.front().at_once());

    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "X-Mine: yes\r\nContent-Type: text/plain\r\n";
        conn.answer("500 Oh No", fields, b"stack trace").await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("own-error");
    let _other = web.agent(&upstream.address());
    let answer = web.get("/").await;
    assert_eq!((answer.status, answer.text().as_str()), (500, "stack trace"));
    assert_eq!((answer.field("x-mine").as_deref(), answer.field("x-tunnel-error")), (Some("yes"), None));
    assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
}

/// A slow upstream is 504, by the agent's deadline or the edge's, and nobody goes on waiting for it.
pub async fn a_slow_upstream(stack: &Stack) {
    let (closed, mut closes) = mpsc::unbounded_channel();
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let closed = closed.clone();
        async move {
            if request.target() == "/" {
                return conn.answer("200 OK", "", b"next").await.then_some(conn);
            }
            conn.closed().await;
            closed.send(Instant::now()).unwrap();
            None
        }
    })
    .await;
    // One of the two deadlines is the agent's, the other the edge's.
    let (one, edge) = (stack.tunnel("one-second"), stack.tunnel("edge-time"));
    let address = upstream.address();
    let beyond = format!("request_timeout = \"{}s\"", stack.reply_timeout().as_secs() + 60);
    let tunnels = [one.table(&address, "request_timeout = \"1s\""), edge.table(&address, &beyond)].concat();
    let _agent = stack.agent_with(&tunnels, &[one.name(), edge.name()]);
    let at_once = stack.front().at_once();
    for (tunnel, body) in [(&one, 0), (&edge, 0), (&edge, 500_000)] {
        let name = tunnel.name();
        let begun = Instant::now();
        let request = tunnel.request("POST", "/slow").body(noise(1, body));
        assert_problem(&tunnel.send(&request).await, 504, "upstream_timed_out");
        let answered = Instant::now();
        let most = stack.reply_timeout() + Duration::from_secs(2) + at_once;
        assert!(begun.elapsed() < most, "{name}: {:?}", begun.elapsed());
        let end = timeout(PATIENCE, closes.recv()).await.expect("the upstream's connection ends").unwrap();
        assert!(end.saturating_duration_since(answered) < at_once, "{name}");
        let answer = tunnel.get("/").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "next"), "{name}");
    }
}

/// A tunnel past its bound is 429, another one notices nothing, and a place that gets free is used.
pub async fn past_its_concurrency(stack: &Stack) {
    let release = Arc::new(Notify::new());
    let released = Arc::clone(&release);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let released = Arc::clone(&released);
        async move {
            if request.target() == "/wait" {
                released.notified().await;
            }
            conn.answer("200 OK", "", b"ok").await.then_some(conn)
        }
    })
    .await;
    let (one, two) = (stack.tunnel("bound-one"), stack.tunnel("bound-two"));
    let table = |tunnel: &crate::stack::Tunnel<'_>| tunnel.table(&upstream.address(), "max_concurrent = 1");
    let _agent = stack.agent_with(&[table(&one), table(&two)].concat(), &[one.name(), two.name()]);
    let mut waiting = one.open().await;
    waiting.begin(&one.request("GET", "/wait")).await;
    eventually("the first request is at the upstream", async || !upstream.recorded().is_empty()).await;
    assert_problem(&one.get("/").await, 429, "too_many_requests");
    assert_eq!(two.get("/").await.status, 200);
    release.notify_one();
    assert_eq!(waiting.answer("GET").await.text(), "ok");
    eventually("the place is free again", async || one.get("/").await.status == 200).await;
}

/// A WebSocket handshake of the public is refused in a clean way.
pub async fn a_websocket_handshake(stack: &Stack) {
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("upgrade");
    let _agent = web.agent(&upstream.address());
    let request = web
        .request("GET", "/")
        .field("Connection", "Upgrade")
        .field("Upgrade", "websocket")
        .field("Sec-WebSocket-Version", "13")
        .field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    let answer = web.send(&request).await;
    if stack.front().is_exact() {
        assert_problem(&answer, 501, "upgrade_unsupported");
        assert!(upstream.recorded().is_empty());
    } else {
        // A front that takes the `Upgrade` away leaves an ordinary request.
        let refused = answer.field("x-tunnel-error").as_deref() == Some("upgrade_unsupported");
        assert!(refused || (200..=599).contains(&answer.status), "{}", answer.status);
    }
}

/// A response whose agent dies in the middle is broken off, never ended as if it were whole. Where the front hides that, its
/// length still tells, if it has one.
pub async fn an_agent_that_dies(stack: &Stack) -> Option<&'static str> {
    let half = Arc::new(Notify::new());
    let written = Arc::clone(&half);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let written = Arc::clone(&written);
        async move {
            match request.target() {
                "/chunked" => {
                    assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
                    assert!(conn.write(chunked(b"half")).await);
                }
                _ => assert!(conn.write("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf").await),
            }
            written.notify_one();
            conn.closed().await;
            None
        }
    })
    .await;
    let web = stack.tunnel("dies");
    let mut met = None;
    for target in ["/chunked", "/length"] {
        let mut agent = web.agent(&upstream.address());
        let mut connection = web.open().await;
        connection.begin(&web.request("GET", target)).await;
        let announced = |head: &Answer| head.field("x-tunnel-length");
        let expected = (target == "/length").then(|| "8".to_owned());
        if !stack.front().streams() {
            half.notified().await;
            agent.process().signal(Signal::KILL);
            assert_eq!(agent.process_mut().wait(), None);
            let answer = connection.answer("GET").await;
            // An error, or what had come by then with the length that it should have had; never as if that were all.
            if answer.status == 200 {
                assert_eq!((answer.text().as_str(), announced(&answer)), ("half", expected), "{target}");
            } else {
                assert!(answer.status >= 500, "{target}: {}", answer.status);
            }
            met = Some("buffered-answers");
            continue;
        }
        let head = connection.head().await;
        assert_eq!(head.status, 200);
        let mut body = connection.body(&head);
        assert_eq!(body.take(4).await, b"half");
        agent.process().signal(Signal::KILL);
        assert_eq!(agent.process_mut().wait(), None);
        let (rest, looks_whole) = body.rest().await;
        assert!(rest.is_empty(), "{target}: nothing more");
        if looks_whole {
            assert!(!stack.front().is_exact(), "{target}: an end");
            assert_eq!(announced(&head), expected, "{target}");
            met = Some("silent-breaks");
        }
    }
    met
}

/// An agent makes place for the next one while requests go on, and each of them is answered.
pub async fn an_agent_is_replaced(stack: &Stack) {
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("replaced");
    let mut first = web.agent(&upstream.address());
    let over = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicUsize::new(0));
    let asking = tokio::spawn({
        let (stack, over, answered) = (stack.clone(), Arc::clone(&over), Arc::clone(&answered));
        async move {
            let web = stack.tunnel("replaced");
            while !over.load(Ordering::Acquire) {
                let answer = web.get("/").await;
                assert_eq!(answer.status, 200, "{}", answer.text());
                answered.fetch_add(1, Ordering::AcqRel);
            }
        }
    });
    let some_more = async |what: &str| {
        let before = answered.load(Ordering::Acquire);
        eventually(what, async || asking.is_finished() || answered.load(Ordering::Acquire) >= before + 5)
            .await;
    };
    some_more("requests are answered by the first agent").await;
    let second = web.agent(&upstream.address());
    some_more("requests are answered by either agent").await;
    first.process().signal(Signal::TERM);
    assert_eq!(first.process_mut().wait(), Some(0));
    some_more("requests are answered by the second agent").await;
    over.store(true, Ordering::Release);
    asking.await.unwrap();
    drop(second);
}

/// What is no token opens nothing, and an agent that has only that gives up with its own exit code.
pub async fn a_token_that_is_none(stack: &Stack) {
    for authorization in [None, Some("Bearer no.token.atall")] {
        let status = RawAgent::dial(stack, authorization).await.unwrap_err().as_u16();
        assert!(matches!(status, 401 | 403), "{status}");
    }
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&token, "no.token.atall").unwrap();
    let tunnel = stack.tunnel("refused");
    let table = tunnel.table("127.0.0.1:9", "");
    let mut agent = stack.agent_of(token.path(), &[], &table, &[]);
    assert_eq!(agent.process_mut().wait(), Some(77), "{}", agent.process().printed());
}
