//! Peers that mean no good: agents that break the protocol or answer for others, public clients that try
//! to have one request taken for two.
//!
//! That a state machine with `.waitForTaskToken` is refused in an EXPRESS workflow, as AWS refuses it, is
//! shown beside the reader of state machines in `local`.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use proto::{
    header::Headers,
    limits,
    message::{AgentMessage, Refusal, Reply, VERSION},
};
use tests::{
    Local, PATIENCE,
    client::{Answer, Connection, Request},
    raw_agent::{Call, RawAgent},
    upstream::Upstream,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{http::StatusCode, protocol::frame::coding::Data};

/// Sends a request whose answer is awaited elsewhere.
fn ask(local: &Local, tunnel: &str, target: &str) -> JoinHandle<Answer> {
    let (request, public) = (Request::to(tunnel, "GET", target), local.public);
    tokio::spawn(async move { request.send(public).await })
}

/// A heartbeat that is exactly so long.
fn heartbeat_of(bytes: usize) -> String {
    let (front, back) = (r#"{"type":"heartbeat","seq":7,"padding":""#, r#""}"#);
    format!("{front}{}{back}", "x".repeat(bytes - front.len() - back.len()))
}

#[tokio::test]
async fn an_agent_without_a_valid_token_is_not_let_in() {
    let local = Local::start(&[]);
    assert_eq!(RawAgent::dial(&local, None).await.unwrap_err(), StatusCode::UNAUTHORIZED);
    let token = std::fs::read_to_string(&local.token).unwrap();
    let (signed, signature) = token.trim().rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    for bad in [
        "Bearer x".to_owned(),
        "Bearer a.b.c".to_owned(),
        format!("Bearer {signed}."),
        format!("Bearer {signed}.{other}{}", &signature[1..]),
    ] {
        let refused = RawAgent::dial(&local, Some(&bad)).await.unwrap_err();
        assert!([StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED].contains(&refused), "{bad}: {refused}");
    }
    let forged = format!("Bearer {signed}.{other}{}", &signature[1..]);
    assert_eq!(RawAgent::dial(&local, Some(&forged)).await.unwrap_err(), StatusCode::FORBIDDEN);
    RawAgent::open(&local, &["web"]).await;
}

#[tokio::test]
async fn frames_and_messages_have_the_lengths_of_the_real_service() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let frame = heartbeat_of(limits::FRAME_BYTES);
    agent.say_frame(Data::Text, frame.as_bytes(), true).await;
    assert_eq!(agent.hear().await, r#"{"type":"heartbeat","seq":7}"#, "32 KB in one frame pass");
    agent.say_text(&heartbeat_of(limits::MESSAGE_BYTES)).await;
    assert_eq!(agent.hear().await, r#"{"type":"heartbeat","seq":7}"#, "128 KB in frames pass");

    agent.say_frame(Data::Text, heartbeat_of(limits::FRAME_BYTES + 1).as_bytes(), true).await;
    assert_eq!(agent.closed().await, Some(1009), "a frame of one byte more");

    let mut agent = RawAgent::open(&local, &["web"]).await;
    agent.say_text(&heartbeat_of(limits::MESSAGE_BYTES + 1)).await;
    assert_eq!(agent.closed().await, Some(1009), "a message of one byte more");

    let mut agent = RawAgent::open(&local, &["web"]).await;
    agent.say_frame(Data::Binary, b"{}", true).await;
    assert_eq!(agent.closed().await, Some(1003), "a binary frame");
}

#[tokio::test]
async fn an_agent_of_another_version_is_told_so_and_one_that_says_less_or_more_is_served() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::with(&local, &local.as_ref().token()).await;
    for version in [0, VERSION + 1, u32::MAX] {
        agent
            .say_text(&format!(
                r#"{{"type":"hello","seq":{version},"version":{version},"agent":"a","tunnels":["web","a b"]}}"#
            ))
            .await;
        let welcome = agent.welcome().await;
        assert_eq!((welcome.seq, welcome.version, welcome.tunnels.len()), (version, VERSION, 0));
        let refused: Vec<_> = welcome.refused.iter().map(|one| (&*one.name, one.reason)).collect();
        assert_eq!(refused, [("web", Refusal::OtherVersion), ("a b", Refusal::OtherVersion)]);
    }
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 404, "it serves nothing");
    // What the first agents said, and what later ones may say.
    for hello in [
        r#"{"type":"hello","seq":1,"version":1,"agent":"a","tunnels":["web"]}"#,
        r#"{"later":[{}],"type":"hello","seq":2,"version":1,"agent":"a","tunnels":["web"],"codecs":["later"],"software":""}"#,
    ] {
        agent.say_text(hello).await;
        let welcome = agent.welcome().await;
        assert_eq!(welcome.tunnels.len(), 1, "{hello}");
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        agent.say_text(r#"{"type":"later","seq":1}"#).await;
        let reply = format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[],"body":{{"text":"ok"}},"end":true,"later":1}}"#,
            call.token
        );
        agent.say_text(&reply).await;
        assert_eq!(asked.await.unwrap().text(), "ok");
    }
}

#[tokio::test]
async fn a_connection_that_is_gone_is_forgotten_by_the_run_that_notices() {
    let upstream = Upstream::echo().await;
    // Each post finds the connection gone, as it is when an agent's machine lost its power.
    let local = Local::start(&["--chaos", "seed=1,gone=1"]);
    let _agent = local.agent("web", &upstream.address());
    let before = local.counters().await;
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!((answer.status, answer.field("x-tunnel-error").as_deref()), (503, Some("tunnel_offline")));
    let after = local.counters().await;
    let made = |call: &str| after.get(call).copied().unwrap_or(0) - before.get(call).copied().unwrap_or(0);
    assert_eq!((made("apigateway:invoke POST"), made("dynamodb:DeleteItem")), (1, 1), "{after:?}");
    let again = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!(again.status, 503);
    let last = local.counters().await;
    assert_eq!(last["apigateway:invoke POST"], after["apigateway:invoke POST"], "it is not asked again");
    assert!(upstream.recorded().is_empty());
}

#[tokio::test]
async fn late_double_stale_and_forged_answers_reach_nobody() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let mut stale: Vec<Call> = Vec::new();
    for round in 0..12 {
        // Every fourth client leaves; its answer comes after that.
        let leaves = round % 4 == 3;
        let mut connection = Connection::open(local.public).await;
        let request = Request::to("web", "GET", &format!("/{round}"));
        connection.begin(&request).await;
        let call = agent.request().await;
        assert_eq!(call.target, format!("/{round}"));
        if leaves {
            drop(connection);
            agent.cancelled(&call).await;
            agent.say(call.reply("LATE", true)).await;
            stale.push(call);
            continue;
        }
        for old in &stale {
            agent.say(old.reply("STALE", true)).await;
            agent.say(old.chunk(1, "STALE", true)).await;
        }
        for forged in forgeries(&call, stale.last()) {
            agent.say(forged.reply("FORGED", true)).await;
        }
        let own = format!("own-{round}");
        agent.say(call.reply(&own, true)).await;
        agent.say(call.reply(&own, true)).await;
        agent.say(call.chunk(1, "MORE", true)).await;
        let answer = connection.answer("GET").await;
        assert_eq!((answer.status, answer.text(), answer.complete), (200, own, true));
        stale.push(call);
        stale.drain(..stale.len().saturating_sub(3));
    }
}

/// Tokens that look much like the one of `call`.
fn forgeries(call: &Call, other: Option<&Call>) -> Vec<Call> {
    let with = |token: String| Call { token, ..call.clone() };
    let flip = |at: usize| {
        let mut bytes = call.token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        with(String::from_utf8(bytes).unwrap())
    };
    let last = call.token.len() - 2;
    let mut list = vec![
        with(String::new()),
        with("x".into()),
        with("A".repeat(call.token.len())),
        with(format!("{}A", call.token)),
        with(call.token[..last].to_owned()),
        flip(12),
        flip(30),
        flip(last),
    ];
    if let Some(other) = other {
        // What one token says with what another is signed by.
        let half = call.token.len() - 44;
        list.push(with(format!("{}{}", &call.token[..half], &other.token[other.token.len() - 44..])));
    }
    list
}

#[tokio::test]
async fn pieces_in_any_order_and_number_make_the_one_body() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        for _ in 0..2 {
            for seq in order {
                let text = format!("[{seq}]");
                match seq {
                    0 => agent.say(call.reply(&text, false)).await,
                    _ => agent.say(call.chunk(seq, &text, seq == 3)).await,
                }
            }
        }
        let answer = asked.await.unwrap();
        assert_eq!((answer.text().as_str(), answer.complete), ("[0][1][2][3]", true), "{order:?}");
    }
}

/// Answers that the protocol does not allow, with what is wrong with each.
fn invalid_answers(token: &str) -> Vec<(&'static str, String)> {
    let reply = |rest: &str| format!(r#"{{"type":"reply","token":"{token}",{rest}}}"#);
    let status = |status: &str| reply(&format!(r#""status":{status},"headers":[],"end":true"#));
    let fields = |list: &str| reply(&format!(r#""status":200,"headers":[{list}],"end":true"#));
    let body = |body: &str| reply(&format!(r#""status":200,"headers":[],"body":{body},"end":true"#));
    let many = vec![r#"["a","b"]"#; limits::HEADER_FIELDS + 1].join(",");
    let long = format!(r#"["a","{}"]"#, "x".repeat(limits::HEAD_BYTES));
    vec![
        ("status 999", status("999")),
        ("status 0", status("0")),
        ("status -1", status("-1")),
        ("status 101", status("101")),
        ("status 70000", status("70000")),
        ("a status that is a text", status("\"200\"")),
        ("a line end in a value", fields(r#"["a","x\r\nSet-Cookie: evil=1"]"#)),
        ("a bare line feed in a value", fields(r#"["a","x\ny"]"#)),
        ("a null byte in a value", fields(r#"["a","x\u0000"]"#)),
        ("a space in a name", fields(r#"["a b","x"]"#)),
        ("a line end in a name", fields(r#"["a\r\nb","x"]"#)),
        ("an empty name", fields(r#"["","x"]"#)),
        ("1001 fields", fields(&many)),
        ("a head over its limit", fields(&long)),
        ("broken base64", body(r#"{"base64":"%%%"}"#)),
        ("base64 without padding", body(r#"{"base64":"eA"}"#)),
        ("what is not zstd", body(r#"{"zstd":"AAAA"}"#)),
        // Three blocks of 128 KiB, all of one byte.
        ("zstd that unfolds to more than it may", body(r#"{"zstd":"KLUv/aAAAAYAAgAQAAIAEAADABAA"}"#)),
        ("a body of an unknown form", body(r#"{"brotli":"AAAA"}"#)),
        ("chunk 0", format!(r#"{{"type":"chunk","token":"{token}","seq":0,"end":true}}"#)),
        (
            "a chunk beyond the window",
            format!(r#"{{"type":"chunk","token":"{token}","seq":{},"end":true}}"#, limits::CHUNK_WINDOW * 4),
        ),
        (
            "a failure of an unknown kind",
            format!(r#"{{"type":"failed","token":"{token}","seq":0,"code":"x"}}"#),
        ),
        ("a reply of nothing", format!(r#"{{"type":"reply","token":"{token}"}}"#)),
    ]
}

#[tokio::test]
async fn an_agents_invalid_answer_is_502_for_its_own_client_and_for_nobody_else() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _good = local.agent("good", &upstream.address());
    let mut agent = RawAgent::open(&local, &["bad"]).await;
    let count = invalid_answers("").len();
    for index in 0..count {
        let asked = ask(&local, "bad", "/");
        let call = agent.request().await;
        let (what, text) = invalid_answers(&call.token).swap_remove(index);
        agent.say_text(&text).await;
        let answer = asked.await.unwrap();
        let seen = (answer.status, answer.field("x-tunnel-error"));
        assert_eq!(seen, (502, Some("agent_invalid".into())), "{what}: {}", answer.text());
        assert_eq!(answer.field("set-cookie"), None, "{what}");
        let good = Request::to("good", "POST", "/").body(b"undisturbed".to_vec()).send(local.public).await;
        assert_eq!((good.status, good.text().as_str()), (200, "undisturbed"), "after {what}");
        // The agent says its last word, as one that is cancelled does.
        agent
            .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"cancelled"}}"#, call.token))
            .await;
    }
    let asked = ask(&local, "bad", "/");
    let call = agent.request().await;
    agent.say_text(r#"{"type":"dance"}"#).await;
    agent.say_text("not even JSON").await;
    agent.say_text(&format!(r#"{{"type":"dance","token":"{}"}}"#, call.token)).await;
    agent.say(call.reply("better now", true)).await;
    assert_eq!(asked.await.unwrap().text(), "better now", "what has no meaning is dropped");
}

#[tokio::test]
async fn a_body_that_turns_invalid_or_contradicts_its_length_is_broken_off() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    for (what, rest) in [
        ("broken base64", r#""seq":1,"body":{"base64":"%"},"end":true"#),
        ("beyond the window", r#""seq":4000,"end":true"#),
        ("chunk 0", r#""seq":0,"end":true"#),
    ] {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", "/")).await;
        let call = agent.request().await;
        agent.say(call.reply("half", false)).await;
        assert_eq!(connection.head().await.status, 200);
        assert_eq!(connection.chunk().await.unwrap(), b"half");
        agent.say_text(&format!(r#"{{"type":"chunk","token":"{}",{rest}}}"#, call.token)).await;
        assert_eq!(connection.chunk().await, None, "{what}: no last chunk");
        agent.cancelled(&call).await;
        agent
            .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":1,"code":"cancelled"}}"#, call.token))
            .await;
    }
    // A last word under a number that was used before ends nothing.
    let mut connection = Connection::open(local.public).await;
    connection.begin(&Request::to("web", "GET", "/")).await;
    let call = agent.request().await;
    agent.say(call.reply("half", false)).await;
    assert_eq!(connection.head().await.status, 200);
    agent
        .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"upstream_reset"}}"#, call.token))
        .await;
    agent.say(call.chunk(1, "+half", false)).await;
    agent.say(call.chunk(2, "", true)).await;
    assert_eq!(connection.chunked_body().await, b"half+half");

    for (length, body) in [("8", "half"), ("4", "too long")] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        let mut headers = Headers::new();
        headers.push("content-length".parse().unwrap(), length.parse().unwrap());
        let reply = Reply {
            token: call.token.as_str().into(),
            status: 200,
            headers,
            body: Some(proto::body::Body::Text(body.into())),
            end: true,
        };
        agent.say(AgentMessage::Reply(reply)).await;
        let answer = asked.await.unwrap();
        assert!(!answer.complete, "{length}: {:?}", answer.text());
    }
    for fields in [
        r#"["content-length","4"],["content-length","5"]"#,
        r#"["content-length","-4"]"#,
        r#"["content-length","0x4"]"#,
    ] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        agent
            .say_text(&format!(
                r#"{{"type":"reply","token":"{}","status":200,"headers":[{fields}],"body":{{"text":"body"}},"end":true}}"#,
                call.token
            ))
            .await;
        assert_eq!(asked.await.unwrap().status, 502, "{fields}");
    }
    let asked = ask(&local, "web", "/");
    let call = agent.request().await;
    agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[["transfer-encoding","chunked"],["connection","x"],["content-length","4"]],"body":{{"text":"body"}},"end":true}}"#,
            call.token
        ))
        .await;
    let answer = asked.await.unwrap();
    assert_eq!((answer.text().as_str(), answer.complete), ("body", true));
    assert_eq!(answer.field("transfer-encoding"), None);
}

#[tokio::test]
async fn nobody_opens_or_answers_for_the_tunnel_of_another_owner() {
    let local = Local::start(&[]);
    let alice = format!("Bearer {}", local.issue("alice", &["web"]));
    let mallory = format!("Bearer {}", local.issue("mallory", &["other"]));
    let greedy = format!("Bearer {}", local.issue("greedy", &["web"]));
    let mut alice = RawAgent::dial(&local, Some(&alice)).await.unwrap();
    alice.hello(&["web"]).await;
    let mut mallory = RawAgent::dial(&local, Some(&mallory)).await.unwrap();
    mallory.hello(&["other"]).await;
    for (authorization, agent) in [(None, Some(&mut mallory)), (Some(greedy), None)] {
        let mut own;
        let agent = match (agent, authorization) {
            (Some(agent), _) => agent,
            (None, authorization) => {
                own = RawAgent::dial(&local, authorization.as_deref()).await.unwrap();
                &mut own
            }
        };
        agent
            .say_text(r#"{"type":"hello","seq":9,"version":1,"agent":"raw","tunnels":["web"],"codecs":[]}"#)
            .await;
        let welcome = agent.hear().await;
        assert!(welcome.contains(r#""refused":[{"name":"web""#), "{welcome}");
        assert!(welcome.contains(r#""tunnels":[]"#), "{welcome}");
    }
    let asked = ask(&local, "web", "/");
    let call = alice.request().await;
    // The token has leaked to somebody with a connection of his own.
    mallory.say(call.reply("EVIL", true)).await;
    mallory.say_text(r#"{"type":"heartbeat","seq":3}"#).await;
    assert!(mallory.hear().await.contains("heartbeat"), "his message is behind him");
    alice.say(call.reply("own", true)).await;
    let answer = asked.await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "own"));
    tests::eventually("the message is seen and dropped", async || {
        local.process().printed().contains("agent's message was dropped")
    })
    .await;
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: web.localhost\r\n\r\n";

/// Everything that comes until the edge closes.
async fn raw(local: &Local, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(local.public).await.unwrap();
    // The edge may have refused before all of it is written.
    drop(stream.write_all(bytes).await);
    let mut all = Vec::new();
    drop(timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("an answer and the end"));
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn what_could_be_read_as_two_requests_is_refused() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let framings = [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 6",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding : chunked",
        " Transfer-Encoding: chunked",
        "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\u{b}chunked",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5_0",
        "Content-Length: 5 5",
        "Content-Length: 5, 6",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length : 5",
        "Content-Length: 99999999999999999999999",
        "Content-Length:",
        "Host: other.localhost",
        "X: a\0b",
        "X: a\rContent-Length: 5",
        "no colon here",
        ": empty name",
        "a b: c",
    ];
    for framing in framings {
        let text =
            format!("POST /first HTTP/1.1\r\nHost: web.localhost\r\n{framing}\r\n\r\n0\r\n\r\n{SMUGGLED}");
        let answer = raw(&local, text.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{framing:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{framing:?}: one answer, then the end: {answer}");
    }
    let chunks = [
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-1\r\nhello\r\n0\r\n\r\n",
        "0_5\r\nhello\r\n0\r\n\r\n",
        "g\r\nhello\r\n0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "\r\n0\r\n\r\n",
    ];
    for chunk in chunks {
        let text = format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{SMUGGLED}"
        );
        let answer = raw(&local, text.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{chunk:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{chunk:?}: {answer}");
    }
    let lines = [
        "GET  /first HTTP/1.1",
        "GET /first  HTTP/1.1",
        "GET /first HTTP/1.1 HTTP/1.1",
        "GET /first HTTP/2.0",
        "GET /first HTTP/1.1\0",
        "G@T /first HTTP/1.1",
        "GET\t/first HTTP/1.1",
        "CONNECT web.localhost:80 HTTP/1.1",
    ];
    for line in lines {
        let answer = raw(&local, format!("{line}\r\nHost: web.localhost\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{line:?}: {answer}");
    }
    for head in
        ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: web.localhost\r\nHost: web.localhost\r\n\r\n"]
    {
        let answer = raw(&local, head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head:?}: {answer}");
    }
    assert!(upstream.recorded().is_empty(), "nothing of it was forwarded: {:?}", upstream.recorded());
}

#[tokio::test]
async fn what_only_looks_like_two_requests_is_forwarded_as_the_one_it_is() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let length = SMUGGLED.len();
    let shapes = [
        format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
        ),
        format!(
            "GET /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
        ),
        format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nTransfer-Encoding:\tChunked\r\n\r\n\
             {length:x};ext=\"0\"\r\n{SMUGGLED}\r\n0\r\nX-Trailer: 1\r\n\r\n"
        ),
    ];
    for shape in shapes {
        let before = upstream.recorded().len();
        let answer = raw(&local, shape.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{shape}: {answer}");
        let recorded = upstream.recorded();
        assert_eq!(recorded.len(), before + 1, "one request is one request");
        let last = recorded.last().unwrap();
        assert_eq!((last.target(), last.body.as_slice()), ("/first", SMUGGLED.as_bytes()));
        assert_eq!(last.all("content-length"), [length.to_string()]);
    }
    // Two requests that are two get two answers, in order.
    let pair = "GET /a HTTP/1.1\r\nHost: web.localhost\r\n\r\nGET /b HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n";
    let answer = raw(&local, pair.as_bytes()).await;
    let (a, b) = (answer.find("GET /a HTTP/1.1").unwrap(), answer.find("GET /b HTTP/1.1").unwrap());
    assert!(a < b, "{answer}");
}

/// The seeds of everything that is generated here; a failure names its own.
const SEED: u64 = 0x7475_6e6e_656c;

/// The splitmix64 generator: the same numbers in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % sides as u64).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.roll(of.len())]
    }
}

/// What has to become of a hostile message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The request it claims to answer ends with 502.
    Invalid,
    /// It is as if it had never been sent.
    Dropped,
}

/// A message of an agent that means no good, made from what the dice say; `token` is one of a live request.
fn hostile_message(dice: &mut Dice, token: &str) -> (String, Fate) {
    let reply = |rest: &str| format!(r#"{{"type":"reply","token":"{token}",{rest}}}"#);
    let invalid = |text: String| (text, Fate::Invalid);
    let dropped = |text: String| (text, Fate::Dropped);
    match dice.roll(14) {
        0 => {
            let status = dice.pick(&[
                "999", "0", "-1", "100", "199", "600", "65536", "1e3", "\"200\"", "null", "[200]", "200.5",
            ]);
            invalid(reply(&format!(r#""status":{status},"headers":[],"end":true"#)))
        }
        1 => {
            let evil = dice.pick(&[
                "\\r\\n", "\\n", "\\r", "\\u0000", "\\u007f", "\\u0001", "\\u001b", "\\u2028", "\\ud800",
            ]);
            let at = dice.roll(3);
            let value = ["", "x", "Set-Cookie: evil=1"].map(|part| format!("{part}{evil}"))[at].clone();
            invalid(reply(&format!(r#""status":200,"headers":[["x-evil","{value}evil: 1"]],"end":true"#)))
        }
        2 => {
            let name = dice.pick(&[
                "", " ", "a b", "a:", "a\\r\\nb", "a\\u0000", "(a)", "a\\tb", "\\u00e9", "a/b", "a\\\"b",
            ]);
            invalid(reply(&format!(r#""status":200,"headers":[["{name}","x"]],"end":true"#)))
        }
        3 => {
            let count = limits::HEADER_FIELDS + 1 + dice.roll(3000);
            let many = vec![r#"["a","b"]"#; count].join(",");
            invalid(reply(&format!(r#""status":200,"headers":[{many}],"end":true"#)))
        }
        4 => {
            let long = "x".repeat(limits::HEAD_BYTES + dice.roll(4000));
            invalid(reply(&format!(r#""status":200,"headers":[["a","{long}"]],"end":true"#)))
        }
        5 => {
            let body = dice.pick(&[
                r#"{"base64":"%%%"}"#,
                r#"{"base64":"eA"}"#,
                r#"{"base64":"eA=="  ,"text":"x"}"#,
                r#"{"base64":5}"#,
                r#"{"zstd":"AAAA"}"#,
                r#"{"zstd":"KLUv/aAAAAYAAgAQAAIAEAADABAA"}"#,
                r#"{"brotli":"AAAA"}"#,
                r#"{}"#,
                r#""text""#,
                "[]",
                "7",
            ]);
            invalid(reply(&format!(r#""status":200,"headers":[],"body":{body},"end":true"#)))
        }
        6 => {
            let seq = dice.pick(&["0", "-1", "4294967296", "4000", "4294967295", "1.5", "\"1\"", "null"]);
            invalid(format!(r#"{{"type":"chunk","token":"{token}","seq":{seq},"end":true}}"#))
        }
        7 => {
            let code = dice.pick(&["x", "", "EdgeFailed", "edge_failed ", "200"]);
            invalid(format!(r#"{{"type":"failed","token":"{token}","seq":0,"code":"{code}"}}"#))
        }
        8 => {
            let rest = dice.pick(&[
                r#""status":200"#,
                r#""headers":[]"#,
                r#""status":200,"headers":{}"#,
                r#""status":200,"headers":[["a"]],"end":true"#,
                r#""status":200,"headers":[["a","b","c"]],"end":true"#,
                r#""status":200,"headers":[{"a":"b"}],"end":true"#,
                r#""status":200,"headers":[],"end":"yes""#,
                r#""status":200,"status":200,"headers":[],"end":true"#,
            ]);
            invalid(reply(rest))
        }
        9 => {
            // A token that is almost the one.
            let mut bytes = token.as_bytes().to_vec();
            let at = dice.roll(bytes.len() - 1);
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let near = String::from_utf8(bytes).unwrap();
            dropped(format!(r#"{{"type":"reply","token":"{near}","status":200,"headers":[],"end":true}}"#))
        }
        10 => {
            let cut = &token[..dice.roll(token.len() - 1)];
            dropped(format!(r#"{{"type":"chunk","token":"{cut}","seq":1,"end":true}}"#))
        }
        11 => {
            let kind = dice
                .pick(&["dance", "", "request", "welcome", "cancel", "credit", "Reply", "reply ", "connect"]);
            dropped(format!(r#"{{"type":"{kind}","token":"{token}","status":200,"headers":[],"end":true}}"#))
        }
        12 => {
            let noise: String = (0..dice.roll(300))
                .map(|_| char::from(b' ' + u8::try_from(dice.roll(95)).unwrap()))
                .collect();
            dropped(noise)
        }
        _ => {
            // A good reply, broken off somewhere in the middle of its JSON.
            let good = reply(r#""status":200,"headers":[["a","b"]],"body":{"text":"x"},"end":true"#);
            dropped(good[..1 + dice.roll(good.len() - 2)].to_owned())
        }
    }
}

/// A tenant of its own that sends good traffic until it is told to stop; how many requests it has made.
fn good_traffic(local: &Local, tunnel: &'static str) -> (Arc<AtomicBool>, JoinHandle<usize>) {
    let (public, stop) = (local.public, Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let task = tokio::spawn(async move {
        let mut done = 0;
        while !stopped.load(Ordering::Relaxed) {
            let body = format!("undisturbed-{done}").into_bytes();
            let answer =
                Request::to(tunnel, "POST", &format!("/{done}")).body(body.clone()).send(public).await;
            assert_eq!((answer.status, &answer.body), (200, &body), "request {done}: {}", answer.text());
            assert_eq!(answer.field("x-evil"), None);
            done += 1;
        }
        done
    });
    (stop, task)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_hostile_messages_harm_nobody() {
    const MESSAGES: usize = 240;
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let bob = local.token_file(&local.issue("bob", &["good"]));
    let tunnel = format!("[[tunnel]]\nname = \"good\"\nupstream = \"{}\"\n", upstream.address());
    let _bob = local.agent_of(&bob, &[], &tunnel, &["good"]);
    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["bad"])).await;
    mallory.hello(&["bad"]).await;
    let (stop, good) = good_traffic(&local, "good");
    let mut counts = [0, 0];
    for round in 0..MESSAGES {
        let asked = ask(&local, "bad", "/");
        let call = mallory.request().await;
        let (text, fate) = hostile_message(&mut Dice(SEED + round as u64), &call.token);
        mallory.say_text(&text).await;
        let shown = text.chars().take(300).collect::<String>().replace(&call.token, "TOKEN");
        if fate == Fate::Dropped {
            mallory.say(call.reply("own", true)).await;
        }
        let answer = asked.await.unwrap();
        let seen = (answer.status, answer.field("x-tunnel-error"));
        let wanted = match fate {
            Fate::Invalid => (502, Some("agent_invalid".to_owned())),
            Fate::Dropped => (200, None),
        };
        assert_eq!(seen, wanted, "round {round}: {shown}: {}", answer.text());
        assert!(answer.field("x-evil").is_none() && answer.field("set-cookie").is_none(), "round {round}");
        counts[fate as usize] += 1;
        if fate == Fate::Invalid {
            let word = format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"cancelled"}}"#, call.token);
            mallory.say_text(&word).await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let done = good.await.unwrap();
    assert!(done > MESSAGES / 4, "only {done} good requests beside {MESSAGES} hostile messages");
    assert!(counts.iter().all(|&count| count > 40), "{counts:?}");
    let printed = local.process().printed();
    assert!(!printed.contains("panicked"), "{printed}");
    assert!(printed.contains("agent's answer is invalid") && printed.contains("agent's message was dropped"));
}

#[tokio::test]
async fn a_foreign_agent_with_a_live_token_answers_nothing() {
    let local = Local::start(&[]);
    let mut alice = RawAgent::with(&local, &local.issue("alice", &["web"])).await;
    alice.hello(&["web"]).await;
    // A token that opens everything: what it may open is not what is asked of it.
    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["*"])).await;
    mallory.hello(&["other"]).await;
    let mut stale: Option<Call> = None;
    for round in 0..6 {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", "/")).await;
        let call = alice.request().await;
        for known in stale.iter().chain([&call]) {
            mallory.say(known.reply("EVIL", round % 2 == 0)).await;
            mallory.say(known.chunk(1, "EVIL", true)).await;
            let failed =
                format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"upstream_reset"}}"#, known.token);
            mallory.say_text(&failed).await;
        }
        mallory.say_text(r#"{"type":"heartbeat","seq":3}"#).await;
        assert!(mallory.hear().await.contains("heartbeat"), "the messages are behind it");
        alice.say(call.reply("own", false)).await;
        assert_eq!(connection.head().await.status, 200);
        mallory.say(call.chunk(1, "EVIL", true)).await;
        alice.say(call.chunk(1, "-own", true)).await;
        assert_eq!(connection.chunked_body().await, b"own-own", "round {round}");
        stale = Some(call);
    }
}

/// A public request that is up to no good, and where it may come out: nowhere, or at `web` alone.
fn hostile_requests() -> Vec<(String, bool)> {
    let mut list = Vec::new();
    let get = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\n{fields}\r\n\r\n");
    // Hosts: however it is written, it is the tunnel it names or none.
    for (host, is_web) in [
        ("web.localhost", true),
        ("WEB.localhost", true),
        ("Web.LOCALHOST.", true),
        ("web.localhost:80", true),
        ("web.localhost:8443", true),
        ("web.localhost.:1", true),
        ("web.localhost..", false),
        ("web..localhost", false),
        (".web.localhost", false),
        ("web.localhost.evil.example", false),
        ("evil.example.web.localhost", false),
        ("good.web.localhost", false),
        ("www.localhost", false),
        ("_web.localhost", false),
        ("xn--web.localhost", false),
        ("web_.localhost", false),
        ("w%65b.localhost", false),
        ("web.localhost/good", false),
        ("good@web.localhost", false),
        ("web.localhost#good", false),
        ("web.localhost:80:80", false),
        ("web.localhost, good.localhost", false),
        ("web\u{ff0e}localhost", false),
        ("[::1]", false),
        ("127.0.0.1", false),
        ("localhost", false),
        ("", false),
        ("web.localhost\0", false),
        ("web.local\thost", false),
    ] {
        list.push((get("/h", &format!("Host: {host}\r\nConnection: close")), is_web));
    }
    for fields in [
        "Host: web.localhost\r\nHost: good.localhost",
        "Host: web.localhost\r\nhost: web.localhost",
        "Host: web.localhost\r\nHost : good.localhost",
        " Host: web.localhost",
        "X: y\r\n Host: web.localhost",
        "X-Forwarded-Host: web.localhost",
        "Host: web.localhost\r\nX: a\rb",
        "Host: web.localhost\r\nX: a\0b",
        "Host: web.localhost\r\nX\0: a",
        "Host: web.localhost\r\nX Y: a",
        "Host: web.localhost\r\n: a",
        "Host: web.localhost\r\nX",
    ] {
        list.push((get("/f", &format!("{fields}\r\nConnection: close")), false));
    }
    // What only a front may say is not believed, and takes the request nowhere else.
    for field in [
        "x-tunnel-host: good.localhost",
        "X-Tunnel-Host: good.localhost\r\nx-tunnel-front: ",
        "x-tunnel-host: good.localhost\r\nx-tunnel-front: secret",
        "x-tunnel-front: x\r\nx-tunnel-front: y\r\nx-tunnel-host: good.localhost",
        "x-tunnel-target: /good",
        "x-tunnel-client: 192.0.2.1",
        "X-Forwarded-Host: good.localhost",
        "Forwarded: host=good.localhost",
        "X-Original-URL: /good",
        "X-Rewrite-URL: /good",
        "X-HTTP-Method-Override: DELETE",
        "Connection: close, x-tunnel-request-id",
    ] {
        list.push((get("/t", &format!("Host: web.localhost\r\n{field}\r\nConnection: close")), true));
    }
    // Targets: absolute ones name their own host, and nothing else is taken for a path.
    for (target, is_web) in [
        ("http://web.localhost/abs", true),
        ("HTTP://WEB.localhost/abs", true),
        ("http://good@web.localhost/abs", true),
        ("http:///abs", false),
        ("http://", false),
        ("web.localhost:80", false),
        ("*", true),
        ("abs", false),
        ("?x", false),
        ("#x", false),
        ("/a b", false),
        ("/a\0b", false),
        ("/a\tb", false),
        ("/a\u{7f}b", false),
        ("/a\\..\\b", true),
        ("/../../etc/passwd", true),
        ("/%2e%2e/%2f", true),
        ("/%00", true),
        ("/%0d%0aSet-Cookie:%20evil=1", true),
        ("//good.localhost/x", true),
        ("/;a=b/..;/c", true),
    ] {
        list.push((get(target, "Host: web.localhost\r\nConnection: close"), is_web));
    }
    // Heads: large ones are refused or carried, never cut.
    for (bytes, is_web) in
        [(10 * 1024, true), (48 * 1024, true), (100 * 1024, false), (2 * 1024 * 1024, false)]
    {
        let long = "x".repeat(bytes);
        list.push((
            get("/l", &format!("Host: web.localhost\r\nX-Long: {long}\r\nConnection: close")),
            is_web,
        ));
    }
    let many: String = (0..3000).map(|index| format!("X-{index}: y\r\n")).collect();
    list.push((get("/m", &format!("Host: web.localhost\r\n{many}Connection: close")), false));
    // Bodies that say two things about their end.
    for framing in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: x, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        "Transfer-Encoding: chunked\u{b}",
        "Transfer-Encoding:\u{c}chunked",
        "Transfer-Encoding\u{b}: chunked",
        "Content-Length: 4\r\nContent-Length: 5",
        "Content-Length: 4,5",
        "Content-Length: 04a",
        "Content-Length: 4 4",
        "Content-Length: 0x4",
        "Content-Length: -4",
        "Content-Length: +4",
        "Content-Length: 18446744073709551616",
    ] {
        let text = format!(
            "POST /s HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n{framing}\r\n\r\n0\r\n\r\nGET /good HTTP/1.1\r\nHost: good.localhost\r\n\r\n"
        );
        list.push((text, false));
    }
    for method in ["CONNECT", "G@T", "GET\0", "", "get\t"] {
        list.push((
            format!("{method} / HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n"),
            false,
        ));
    }
    for version in ["HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/1.1 x", "http/1.1", "HTTP/1", ""] {
        list.push((format!("GET / {version}\r\nHost: web.localhost\r\nConnection: close\r\n\r\n"), false));
    }
    list
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_public_requests_come_out_nowhere_or_at_the_one_tunnel_they_name() {
    let (web, good) = (Upstream::echo().await, Upstream::echo().await);
    let local = Local::start(&[]);
    let tunnel = |name: &str, upstream: &Upstream| {
        format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n", upstream.address())
    };
    let alice = local.token_file(&local.issue("alice", &["web"]));
    let bob = local.token_file(&local.issue("bob", &["good"]));
    let _alice = local.agent_of(&alice, &[], &tunnel("web", &web), &["web"]);
    let _bob = local.agent_of(&bob, &[], &tunnel("good", &good), &["good"]);
    let list = hostile_requests();
    assert!(list.len() >= 100, "{}", list.len());
    let (stop, traffic) = good_traffic(&local, "good");
    let mut wrong = Vec::new();
    for (text, is_web) in &list {
        let before = web.recorded().len();
        let answer = raw(&local, text.as_bytes()).await;
        let came = web.recorded().len() - before;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        let fate = if *is_web {
            came == 1 && status == "200"
        } else {
            came == 0 && (status.is_empty() || status.starts_with(['4', '5']))
        };
        // The echo of a request's own line is in the second half of an answer, at most.
        let one_answer = answer.matches("HTTP/1.1 ").count() <= 1 + came;
        let injected = answer.to_lowercase().contains("\r\nset-cookie: evil");
        if !fate || !one_answer || injected {
            wrong.push(format!(
                "{:?} came {came} times: {}",
                text.chars().take(200).collect::<String>(),
                answer.chars().take(200).collect::<String>()
            ));
        }
    }
    stop.store(true, Ordering::Relaxed);
    let done = traffic.await.unwrap();
    let strays: Vec<String> = good.recorded().iter().map(|request| request.line.clone()).collect();
    assert_eq!(strays.len(), done, "the other tenant got what is not his: {strays:?}");
    assert!(done > 10);
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), list.len(), wrong.join("\n"));
    assert!(!local.process().printed().contains("panicked"));
}

#[tokio::test]
async fn a_request_past_the_front_is_refused() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    // The function's own address, without the front before it.
    for front in ["", "guess", "secret"] {
        let event = serde_json::json!({
            "version": "2.0", "routeKey": "$default", "rawPath": "/", "rawQueryString": "",
            "headers": {"host": "web.localhost", "x-tunnel-host": "web.localhost", "x-tunnel-front": front},
            "requestContext": {"domainName": "abc.lambda-url.on.aws",
                "http": {"method": "GET", "path": "/", "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1", "userAgent": ""}},
            "isBase64Encoded": false,
        });
        let answer = local.invoke("ingress", &event).await;
        assert!(
            answer.text().contains("front_refused") && answer.text().contains("403"),
            "{}",
            answer.text()
        );
    }
    assert!(upstream.recorded().is_empty());
}

#[tokio::test]
async fn nothing_that_any_process_prints_is_secret() {
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "Set-Cookie: session=COOKIE-OUT\r\nX-Secret: FIELD-OUT\r\nContent-Type: text/plain\r\n";
        conn.answer("200 OK", fields, b"BODY-OUT").await.then_some(conn)
    })
    .await;
    let local = Local::start(&["--log-level", "debug"]);
    let token = local.issue("alice", &["web", "raw"]);
    let tunnel = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let level = [("AGENTD_LOG_LEVEL", "debug")];
    let agent = local.agent_of(&local.token_file(&token), &level, &tunnel, &["web"]);
    let mut raw_agent = RawAgent::with(&local, &token).await;
    raw_agent.hello(&["raw"]).await;
    let request = |tunnel: &str| {
        Request::to(tunnel, "POST", "/path?query=QUERY-IN")
            .field("Cookie", "session=COOKIE-IN")
            .field("Authorization", "Bearer FIELD-IN")
            .field("X-Secret", "FIELD-IN")
            .body(b"BODY-IN".to_vec())
    };
    assert_eq!(request("web").send(local.public).await.status, 200);
    // Also where things go wrong: an unknown tunnel, answers that are wrong, forged or late.
    assert_eq!(request("nobody").send(local.public).await.status, 404);
    let (asked, public) = (request("raw"), local.public);
    let asked = tokio::spawn(async move { asked.send(public).await });
    let call = raw_agent.request().await;
    let forged = format!("{}A", call.token);
    raw_agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{forged}","status":200,"headers":[["x-secret","FIELD-OUT"]],"body":{{"text":"BODY-OUT"}},"end":true}}"#
        ))
        .await;
    raw_agent.say_text("BODY-OUT, and no message").await;
    raw_agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[["x secret","FIELD-OUT"]],"body":{{"text":"BODY-OUT"}},"end":true}}"#,
            call.token
        ))
        .await;
    assert_eq!(asked.await.unwrap().status, 502);
    raw_agent.say_text(r#"{"type":"hello","seq":"BODY-OUT","version":1}"#).await;
    let upgrade = request("web").field("Upgrade", "websocket").send(local.public).await;
    assert_eq!(upgrade.status, 501);
    assert_eq!(local.revoke(serde_json::json!({"owner": "alice"})).await, 2);
    assert_eq!(raw_agent.closed().await, Some(1000));
    tests::eventually("what was invalid has been logged", async || {
        let printed = local.process().printed();
        printed.contains("agent's answer is invalid") && printed.contains("agent's message was dropped")
    })
    .await;
    let printed = local.process().printed() + &agent.process().printed();
    let front = local.variables("ingress").await["TUNNEL_FRONT_SECRET"].as_str().unwrap().to_owned();
    let keys = local.variables("response").await["TUNNEL_TOKEN_KEYS"].as_str().unwrap().to_owned();
    let parts = token.split('.').map(|part| part[..24].to_owned());
    let secrets = ["QUERY-IN", "COOKIE-IN", "FIELD-IN", "BODY-IN", "COOKIE-OUT", "FIELD-OUT", "BODY-OUT"]
        .map(str::to_owned)
        .into_iter()
        .chain(parts)
        .chain([call.token[..24].to_owned(), call.token[call.token.len() - 24..].to_owned(), front, keys]);
    for secret in secrets {
        let line = printed.lines().find(|line| line.contains(&secret));
        assert!(line.is_none(), "{secret} was printed: {line:?}");
    }
    assert!(printed.lines().count() > 20, "there was something to look at");
}
