//! What the public client sees when something is missing, broken or over a limit: each row of the error
//! table, provoked for real.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::time::{Duration, Instant};

use proto::limits;
use rustix::process::Signal;
use tests::{
    Local, PATIENCE,
    client::{Answer, Connection, Request},
    upstream::{Conn, Upstream},
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

fn assert_problem(answer: &Answer, status: u16, code: &str) {
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

async fn unused_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn an_unknown_tunnel_is_404_and_a_known_one_without_agent_503() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    for request in [
        Request::to("nobody", "GET", "/"),
        Request::to("www", "GET", "/"),
        Request::to("not_a_label", "GET", "/"),
        Request::get("/nobody/x"),
        Request::get("/"),
    ] {
        assert_problem(&request.send(local.public).await, 404, "no_such_tunnel");
    }
    let mut agent = local.agent("web", &upstream.address());
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    agent.process().signal(Signal::TERM);
    assert_eq!(agent.process_mut().wait(), Some(0));
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert_problem(&answer, 503, "tunnel_offline");
    assert!(answer.field("retry-after").is_some());
    let page = Request::to("web", "GET", "/").field("Accept", "text/html,*/*").send(local.public).await;
    assert!(page.field("content-type").unwrap().starts_with("text/html"));
    assert!(page.text().contains("tunnel_offline"));
}

#[tokio::test]
async fn an_upstream_that_is_down_is_502_at_once_and_its_own_500_passes() {
    let local = Local::start(&[]);
    let _agent = local.agent("down", &unused_address().await);
    let begun = Instant::now();
    assert_problem(&Request::to("down", "GET", "/").send(local.public).await, 502, "upstream_unreachable");
    assert!(begun.elapsed() < Duration::from_secs(5));

    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "X-Mine: yes\r\nContent-Type: text/plain\r\n";
        conn.answer("500 Oh No", fields, b"stack trace").await.then_some(conn)
    })
    .await;
    let _other = local.agent("web", &upstream.address());
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!((answer.status, answer.text().as_str()), (500, "stack trace"));
    assert_eq!((answer.field("x-mine").as_deref(), answer.field("x-tunnel-error")), (Some("yes"), None));
    assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
}

#[tokio::test]
async fn a_slow_upstream_is_504_and_its_connection_is_closed_within_a_second() {
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
    let local = Local::start_in(&[("TUNNEL_REPLY_TIMEOUT_SECS", "3")], &["--no-agent"]);
    let address = upstream.address();
    let tunnels = format!(
        "[[tunnel]]\nname = \"one\"\nupstream = \"{address}\"\nrequest_timeout = \"1s\"\n\n\
         [[tunnel]]\nname = \"three\"\nupstream = \"{address}\"\n"
    );
    let _agent = local.agent_with(&tunnels, &["one", "three"]);
    for (name, body) in [("one", 0), ("three", 0), ("three", 500_000)] {
        let begun = Instant::now();
        let request = Request::to(name, "POST", "/slow").body(tests::noise(1, body));
        assert_problem(&request.send(local.public).await, 504, "upstream_timed_out");
        let answered = Instant::now();
        assert!(begun.elapsed() < Duration::from_secs(6), "{name}: {:?}", begun.elapsed());
        let end = timeout(PATIENCE, closes.recv()).await.expect("the upstream's connection ends").unwrap();
        assert!(end.saturating_duration_since(answered) < Duration::from_secs(1), "{name}");
        let answer = Request::to(name, "GET", "/").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "next"), "{name}");
    }
}

#[tokio::test]
async fn a_body_of_the_ceiling_passes_and_one_byte_more_is_413_with_the_limit() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let body = tests::noise(1, limits::REQUEST_BODY_BYTES);
    let answer = Request::to("web", "POST", "/").body(body.clone()).send(local.public).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.complete && answer.body == body);
    let more = [body, vec![0]].concat();
    let answer = Request::to("web", "POST", "/").body(more).send(local.public).await;
    assert_problem(&answer, 413, "request_too_large");
    assert!(answer.text().contains(&limits::REQUEST_BODY_BYTES.to_string()), "{}", answer.text());
    assert_eq!(upstream.recorded().len(), 1, "what is refused goes nowhere");
}

#[tokio::test]
async fn a_tunnel_past_its_concurrency_is_429_and_others_notice_nothing() {
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&[]);
    let address = upstream.address();
    let tunnels = format!(
        "[[tunnel]]\nname = \"one\"\nupstream = \"{address}\"\nmax_concurrent = 1\n\n\
         [[tunnel]]\nname = \"two\"\nupstream = \"{address}\"\nmax_concurrent = 1\n"
    );
    let _agent = local.agent_with(&tunnels, &["one", "two"]);
    let mut hanging = Connection::open(local.public).await;
    hanging.begin(&Request::to("one", "GET", "/hang")).await;
    tests::eventually("the first request is at the upstream", async || !upstream.recorded().is_empty()).await;
    let answer = Request::to("one", "GET", "/").send(local.public).await;
    assert_problem(&answer, 429, "too_many_requests");
    assert_eq!(Request::to("two", "GET", "/").send(local.public).await.status, 200);
    drop(hanging);
    tests::eventually("the place is free again", async || {
        Request::to("one", "GET", "/").send(local.public).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn a_websocket_handshake_is_refused_in_a_clean_way() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::to("web", "GET", "/")
        .field("Connection", "Upgrade")
        .field("Upgrade", "websocket")
        .field("Sec-WebSocket-Version", "13")
        .field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .send(local.public)
        .await;
    assert_problem(&answer, 501, "upgrade_unsupported");
    assert!(upstream.recorded().is_empty());
}

#[tokio::test]
async fn ctrl_c_ends_every_child_and_the_ports_are_free_again() {
    let mut local = Local::start_with(&[]);
    let _ = local.process().wait_for_line(|line| line.contains("tunnel is open"));
    assert_eq!(Request::to("demo", "GET", "/").send(local.public).await.status, 200);
    let children = local.function_processes();
    assert!(children.iter().any(|(function, _)| function == "ingress"), "{children:?}");
    assert_eq!(local.stop(), Some(0), "{}", local.process().printed());
    for (function, pid) in children {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{function} lives on");
    }
    let public = local.public.to_string();
    let again =
        tests::process::Process::start("local", &["--public", &public, "--agents", "127.0.0.1:0"], &[]);
    let _ = again.wait_for_line(|line| line.starts_with("public"));

    let mut second =
        tests::process::Process::start("local", &["--public", &public, "--agents", "127.0.0.1:0"], &[]);
    assert_eq!(second.wait(), Some(1));
    let printed = second.printed();
    let port = local.public.port().to_string();
    assert!(
        printed.lines().count() == 1 && printed.contains(&port) && printed.contains("--public"),
        "{printed}"
    );
}
