//! Connections that come and go, and the way out.

use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use proto::{limits, message::Refusal};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::Signal,
};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::stage::{
    Agent, Edge, Manners, Sent, TOKEN, Upstream, connected, connected_with, get, patiently, private_file,
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn hello_says_who_and_what() {
    let (_edge, line, _upstream, mut agent) = connected().await;
    let hello = &line.hellos[0];
    assert_eq!(hello.tunnels, ["web"]);
    assert!(hello.software.starts_with("agentd/"));
    assert!(agent.line().await.starts_with("https://web.tunnel.example.com  ->  http://localhost:"));
}

#[tokio::test]
async fn a_refused_token_is_final() {
    for status in ["401 Unauthorized", "403 Forbidden"] {
        let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
        let mut agent = Agent::http(&edge, upstream.port, &[]);
        edge.refuse(status).await;
        assert_eq!(agent.exit().await.code(), Some(77));
        assert!(!agent.log().contains(TOKEN));
    }
}

/// As on a mount that hangs: the last token is used, nothing that is served waits, and neither does who stops the agent.
#[tokio::test]
async fn a_token_that_does_not_come_keeps_nobody_waiting() {
    let (edge, folder) = (Edge::bind().await, tempfile::tempdir().unwrap());
    let config = format!(
        "[edge]\nurl = {:?}\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 1\n",
        edge.url
    );
    let token = private_file(folder.path(), "token", TOKEN).unwrap();
    let config = private_file(folder.path(), "agentd.toml", &config).unwrap();
    let mut agent = Agent::run(&config);
    let line = edge.welcome().await;
    std::fs::remove_file(&token).unwrap();
    mknodat(CWD, &token, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    drop(line);
    let line = edge.welcome().await;
    agent.says("did not come within 2 s").await;
    drop(line);
    agent.says("connection lost").await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.exit().await.code(), Some(0));
}

#[tokio::test]
async fn everything_else_is_tried_again() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let _agent = Agent::http(&edge, upstream.port, &[]);
    for status in ["500 Internal Server Error", "429 Too Many Requests", "200 OK"] {
        edge.refuse(status).await;
    }
    drop(edge.accept_tcp().await);
    let mut line = edge.welcome().await;
    line.request(&get("/")).await;
    let _peer = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
}

#[tokio::test]
async fn a_lost_connection_is_replaced_and_what_was_in_flight_on_it_ends() {
    let (edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/1")).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    drop(line);
    let began = Instant::now();
    peer.closed().await;
    assert!(began.elapsed() < Duration::from_secs(1));
    for code in [CloseCode::Away, CloseCode::Restart, CloseCode::Again, CloseCode::Policy, CloseCode::Size] {
        let mut line = edge.welcome().await;
        let frame = CloseFrame { code, reason: "\u{7}going".into() };
        line.ws.send(Message::Close(Some(frame))).await.unwrap();
        while line.ws.next().await.is_some_and(|message| message.is_ok()) {}
    }
    let mut line = edge.welcome().await;
    line.request(&get("/2")).await;
    let _peer = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
}

/// What API Gateway says when the function for a message could not be run: not which message it was.
const REFUSED: &str = r#"{"message": "Internal server error", "connectionId":"conn=", "requestId":"req="}"#;

#[tokio::test]
async fn what_the_edge_could_not_take_is_sent_again_a_few_times() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let agent = Agent::http(&edge, upstream.port, &[]);
    let mut line = edge.accept().await;
    let hello = line.text().await.unwrap();
    for _ in 0..2 {
        line.ws.send(Message::text(REFUSED)).await.unwrap();
        assert_eq!(line.text().await.unwrap(), hello);
    }
    assert!(line.control(&hello).await);
    let asked = get("/");
    line.request(&asked).await;
    let _peer = upstream.answer(OK).await;
    let reply = line.answer().await;
    assert!(reply.is_end() && reply.token() == asked.token);
    for _ in 0..limits::REFUSED_TRIES {
        // Those that were refused together are sent together.
        line.ws.send(Message::text(REFUSED)).await.unwrap();
        line.ws.send(Message::text(REFUSED)).await.unwrap();
        assert_eq!(line.answer().await, reply);
    }
    // No more than that: what comes next is the next answer.
    line.ws.send(Message::text(REFUSED)).await.unwrap();
    agent.says("too old to be sent again, or was sent again often enough").await;
    let plans = agent.log().matches("the last ones are to be sent again").count();
    assert_eq!(plans, 2 + limits::REFUSED_TRIES as usize + 1, "one for all that were refused together");
    let next = get("/next");
    line.request(&next).await;
    let _peer = upstream.answer(OK).await;
    assert_eq!(line.answer().await.token(), next.token);
}

#[tokio::test]
async fn a_replacement_loses_nothing() {
    let (edge, mut old, upstream, _agent) = connected().await;
    let slow = get("/slow");
    old.request(&slow).await;
    let mut slow_peer = upstream.accept().await;
    slow_peer.head().await;
    old.drain().await;
    let mut new = edge.welcome().await;
    // The old connection serves nothing from now on, but lives for what is in flight.
    old.expect_hello().await;
    assert_eq!(old.hellos.last().unwrap().tunnels, Vec::<String>::new());
    new.request(&get("/new")).await;
    let _peer = upstream.answer(OK).await;
    assert!(new.answer().await.is_end());
    // A request that was dispatched just before is served too.
    let late = get("/late");
    old.request(&late).await;
    let _peer = upstream.answer(OK).await;
    assert_eq!(old.whole(&late).await.body, b"ok");
    slow_peer.write(OK).await;
    assert_eq!(old.whole(&slow).await.body, b"ok");
    assert_eq!(old.closed().await, Some(1000));
    new.request(&get("/after")).await;
    let _peer = upstream.answer(OK).await;
    assert!(new.answer().await.is_end());
}

#[tokio::test]
async fn a_replacement_that_fails_leaves_the_old_connection_in_service() {
    let (edge, mut old, upstream, _agent) = connected().await;
    old.drain().await;
    edge.refuse("500 Internal Server Error").await;
    drop(edge.accept_tcp().await);
    old.request(&get("/")).await;
    let _peer = upstream.answer(OK).await;
    assert!(old.answer().await.is_end());
    let manners = Manners { refuse: vec![("web".into(), Refusal::TryAgain)], ..Manners::default() };
    let mut new = edge.welcome_with(manners).await;
    old.request(&get("/")).await;
    let _peer = upstream.answer(OK).await;
    assert!(old.answer().await.is_end());
    new.manners.refuse.clear();
    new.expect_hello().await;
    old.expect_hello().await;
    assert_eq!(old.hellos.last().unwrap().tunnels, Vec::<String>::new());
}

#[tokio::test]
async fn heartbeats_are_sent_as_often_as_the_edge_wants_and_pings_answered() {
    let (_edge, mut line, _upstream, _agent) =
        connected_with(Manners { heartbeat_ms: 50, ..Manners::default() }, &[]).await;
    for seq in 0..3 {
        let text = line.text().await.unwrap();
        assert!(text.contains(r#""type":"heartbeat""#), "{text}");
        line.send(&proto::message::EdgeMessage::Heartbeat(proto::message::Heartbeat { seq })).await;
    }
    line.ws.send(Message::Ping(b"x".as_slice().into())).await.unwrap();
    patiently("a pong", async {
        loop {
            if let Message::Pong(payload) = line.ws.next().await.unwrap().unwrap() {
                assert_eq!(payload, "x");
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn an_edge_that_falls_silent_is_left() {
    let (edge, mut line, _upstream, _agent) =
        connected_with(Manners { heartbeat_ms: 100, ..Manners::default() }, &[]).await;
    let began = Instant::now();
    assert!(line.text().await.unwrap().contains("heartbeat"));
    edge.welcome().await;
    assert!(began.elapsed() < Duration::from_secs(15));
    assert!(began.elapsed() > Duration::from_secs(9));
}

#[tokio::test]
async fn a_name_that_cannot_be_had_ends_the_agent_and_a_busy_edge_does_not() {
    for reason in [Refusal::NameTaken, Refusal::NotAllowed, Refusal::InvalidName, Refusal::ReservedName] {
        let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
        let mut agent = Agent::http(&edge, upstream.port, &[]);
        let manners = Manners { refuse: vec![("web".into(), reason)], ..Manners::default() };
        let mut line = edge.welcome_with(manners).await;
        assert!(agent.line().await.starts_with("web is not open: "));
        assert_eq!(line.closed().await, Some(1000));
        assert_eq!(agent.exit().await.code(), Some(77), "{reason:?}");
    }
    // An edge of another version may be the next one to be upgraded.
    for reason in [Refusal::TryAgain, Refusal::OtherVersion] {
        let manners = Manners { refuse: vec![("web".into(), reason)], ..Manners::default() };
        let (_edge, mut line, _upstream, mut agent) = connected_with(manners, &[]).await;
        assert!(agent.line().await.starts_with("web is not open: "));
        line.manners.refuse.clear();
        line.expect_hello().await;
        assert!(agent.line().await.starts_with("https://web."));
    }
}

#[tokio::test]
async fn a_stop_lets_what_is_in_flight_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let (_edge, mut line, upstream, mut agent) = connected().await;
        let sent = get("/slow");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        agent.signal(signal);
        line.expect_hello().await;
        assert!(line.hellos.last().unwrap().tunnels.is_empty());
        // Dispatched just before the edge heard of it.
        let late = get("/late");
        line.request(&late).await;
        let _late_peer = upstream.answer(OK).await;
        assert_eq!(line.whole(&late).await.body, b"ok");
        peer.write(OK).await;
        assert_eq!(line.whole(&sent).await.body, b"ok");
        assert_eq!(line.closed().await, Some(1000));
        assert_eq!(agent.exit().await.code(), Some(0));
    }
}

#[tokio::test]
async fn a_second_signal_and_the_end_of_the_grace_period_end_it_at_once() {
    let (_edge, mut line, upstream, mut agent) = connected().await;
    line.request(&get("/slow")).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    agent.signal(Signal::TERM);
    line.expect_hello().await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.exit().await.code(), Some(0));
    peer.closed().await;

    let (_edge, mut line, upstream, mut agent) =
        connected_with(Manners::default(), &["--grace-period", "300ms"]).await;
    line.request(&get("/slow")).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    agent.signal(Signal::TERM);
    let began = Instant::now();
    assert_eq!(agent.exit().await.code(), Some(0));
    assert!(began.elapsed() >= Duration::from_millis(250));
    peer.closed().await;
}

#[tokio::test]
async fn a_stop_without_an_edge_is_quick() {
    let edge = Edge::bind().await;
    let mut agent = Agent::http(&edge, 1, &[]);
    let _silent = edge.accept_tcp().await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.exit().await.code(), Some(0));
}

#[tokio::test]
async fn the_service_manager_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let edge = Edge::bind().await;
    private_file(folder.path(), "token", TOKEN).unwrap();
    let text = format!(
        "[edge]\nurl = \"{}\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 1\n[[tunnel]]\nname = \"two\"\nupstream = 2\n",
        edge.url
    );
    let config = private_file(folder.path(), "agentd.toml", &text).unwrap();
    let mut command = crate::stage::agentd();
    command
        .args(["run", "--config"])
        .arg(&config)
        .env("AGENTD_CONTROL_SOCKET", folder.path().join("control.sock"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "200000");
    let mut agent = Agent::spawn(command);
    let mut seen = String::new();
    let socket = std::sync::Arc::new(socket);
    let mut until = async |what: &str| {
        patiently(what, async {
            while !seen.contains(what) {
                let mut buffer = [0; 1024];
                let len = socket.recv(&mut buffer).await.unwrap();
                seen += std::str::from_utf8(&buffer[..len]).unwrap();
                seen += "\n";
            }
        })
        .await;
        seen.clear();
    };
    // Before there is any edge to talk to.
    until("READY=1").await;
    let mut line = edge.welcome().await;
    assert_eq!(line.hellos[0].tunnels, ["two", "web"]);
    until("STATUS=connected, 2 of 2 tunnels open").await;
    until("WATCHDOG=1").await;
    agent.signal(Signal::TERM);
    until("STOPPING=1").await;
    // A service manager never stops reading.
    tokio::spawn(async move { while socket.recv(&mut [0; 1024]).await.is_ok() {} });
    assert_eq!(line.closed().await, Some(1000));
    assert_eq!(agent.exit().await.code(), Some(0));
}

#[tokio::test]
async fn logs_hold_no_secret() {
    let (_edge, mut line, upstream, mut agent) = connected().await;
    let sent = crate::stage::with_header(get("/path?query-secret"), "cookie", b"field-secret");
    line.request(&crate::stage::with_body(sent, b"body-secret")).await;
    let _peer = upstream
        .answer(b"HTTP/1.1 200 OK\r\nset-cookie: reply-secret\r\ncontent-length: 11\r\n\r\nbody-secret")
        .await;
    assert!(matches!(line.answer().await, Sent::Reply { end: true, .. }));
    agent.line().await;
    assert!(agent.line().await.contains("  200  GET /path  11 B  "));
    agent.signal(Signal::TERM);
    assert_eq!(line.closed().await, Some(1000));
    agent.exit().await;
    let log = agent.log();
    assert!(log.contains("connected"));
    assert!(!log.contains("secret") && !log.contains(TOKEN), "{log}");
}
