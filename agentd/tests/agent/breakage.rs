//! Upstreams that break off, lie or say too much.

use proto::{error::ErrorCode, limits};

use crate::{
    sockets::{ClosedPort, Socket},
    stage::{Agent, Edge, OK, Peer, Sent, connected, get, noise, patiently, request, reset, with_body},
    transport::agent_with,
};

#[tokio::test]
async fn before_the_head_every_breakage_has_its_code() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let huge = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(limits::HEAD_BYTES));
    let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(300 * 1024));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(limits::HEADER_FIELDS + 1));
    for (bytes, code) in [
        (&b""[..], ErrorCode::UpstreamReset),
        (b"HTTP/1.1 200 OK\r\ncontent-le", ErrorCode::UpstreamReset),
        (b"HTTP/1.1 100 Continue\r\n\r\n", ErrorCode::UpstreamReset),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 20 OK\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0x2\r\n\r\nok", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", ErrorCode::UpstreamInvalid),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: xchunked\r\n\r\nok", ErrorCode::UpstreamInvalid),
        (huge.as_bytes(), ErrorCode::UpstreamInvalid),
        (endless.as_bytes(), ErrorCode::UpstreamInvalid),
        (many.as_bytes(), ErrorCode::UpstreamInvalid),
    ] {
        line.request(&get("/")).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        // The agent may have seen enough before it has seen everything.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut peer.stream, bytes).await;
        if code == ErrorCode::UpstreamReset {
            drop(peer);
            assert_eq!(line.failure().await, (0, code), "{}", bytes.escape_ascii());
        } else {
            assert_eq!(line.failure().await, (0, code), "{}", bytes[..bytes.len().min(80)].escape_ascii());
            peer.closed().await;
        }
    }
    line.request(&get("/")).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    reset(peer);
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamReset));
}

#[tokio::test]
async fn an_upstream_that_is_not_there_is_unreachable() {
    let nobody = ClosedPort::bind();
    let edge = Edge::bind().await;
    let _agent = Agent::http(&edge, nobody.port(), &[]);
    let mut line = edge.welcome().await;
    line.request(&get("/")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
    let edge = Edge::bind().await;
    let _agent = Agent::http(&edge, "http://no-such-host.invalid", &[]);
    let mut line = edge.welcome().await;
    line.request(&get("/")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
}

/// The line about a request says why, in the words of the warning, to people and in the log.
#[tokio::test]
async fn the_access_line_says_the_cause() {
    let edge = Edge::bind().await;
    let mut agent = Agent::http(&edge, 1, &[]);
    let mut line = edge.welcome().await;
    line.request(&get("/for-people?secret=1")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
    let said = loop {
        let said = agent.line().await;
        if said.contains("/for-people") {
            break said;
        }
    };
    assert!(
        said.contains("  upstream_unreachable  http://localhost:1: the upstream cannot be reached: "),
        "{said}"
    );
    assert!(said.ends_with("(os error 111)") && !said.contains("secret"), "{said}");

    for (upstream, cause) in [
        ("\"unix:/tmp/no-such.sock\"", "PrivateTmp=yes"),
        ("\"http://no-such-host.invalid\"", "http://no-such-host.invalid: the upstream cannot be reached: "),
    ] {
        let (mut line, agent, _folder, _edge) = agent_with(&format!("upstream = {upstream}")).await;
        line.request(&get("/")).await;
        assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
        agent.says("agentd::access").await;
        let log = agent.log();
        let access = log.lines().find(|line| line.contains("agentd::access")).unwrap();
        assert!(access.contains("upstream_unreachable") && access.contains(cause), "{access}");
        // One request, one story.
        let told = log.lines().filter(|line| line.contains("error_code")).collect::<Vec<_>>();
        assert!(told.iter().all(|line| line.contains("upstream_unreachable")), "{told:?}");
    }
    let (_edge, mut line, upstream, agent) = connected().await;
    let sent = get("/fine");
    line.request(&sent).await;
    let (_peer, _) = upstream.answer(OK).await;
    line.whole(&sent).await;
    assert!(!agent.log().contains("cause"), "nothing has failed: {}", agent.log());
}

/// What is sent of a response that breaks off: pieces until the failure, none of them an end.
async fn broken_off(head: &str, body: &[u8], end: impl FnOnce(Peer<Socket>)) -> (Vec<u8>, u32, ErrorCode) {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = get("/");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    peer.write(head).await;
    // The head has been passed on before the body breaks off.
    let Sent::Reply { mut body, end: false, .. } = ({
        let reply = line.answer().await;
        peer.write(body).await;
        reply
    }) else {
        panic!("a reply without an end")
    };
    let mut end = Some((end, peer));
    let mut pieces = 0;
    loop {
        if let Some((end, peer)) = end.take() {
            end(peer);
        }
        match line.answer().await {
            Sent::Chunk { seq, body: piece, end: false, .. } => {
                pieces += 1;
                assert_eq!(seq, pieces);
                body.extend(piece);
            }
            Sent::Failed { seq, code, .. } => {
                assert_eq!(seq, pieces + 1);
                return (body, seq, code);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_short_body_is_never_complete() {
    let lengthy = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n";
    let (body, _, code) = broken_off(lengthy, b"12345", drop).await;
    assert_eq!((&body[..], code), (&b"12345"[..], ErrorCode::UpstreamReset));
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let (body, _, code) = broken_off(head, b"5\r\n12345\r\n", drop).await;
    assert_eq!((&body[..], code), (&b"12345"[..], ErrorCode::UpstreamReset));
    // What is no chunk is told from a connection that ends.
    for nonsense in ["nonsense\r\n", "fffffffffffffffff\r\n", "5\r\n12345x"] {
        let chunks = format!("5\r\n12345\r\n{nonsense}");
        let (body, _, code) = broken_off(head, chunks.as_bytes(), std::mem::forget).await;
        assert!(body.starts_with(b"12345"), "{nonsense}");
        assert_eq!(code, ErrorCode::UpstreamInvalid, "{nonsense}");
    }
    let (_, seq, code) = broken_off(head, b"", reset).await;
    assert_eq!((seq, code), (1, ErrorCode::UpstreamReset));
    let (_, _, code) = broken_off("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", b"12345", reset).await;
    assert_eq!(code, ErrorCode::UpstreamReset);
}

#[tokio::test]
async fn a_body_that_breaks_off_with_the_head_is_a_failure_from_the_start() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/")).await;
    let (peer, _) = upstream.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345").await;
    drop(peer);
    let first = line.answer().await;
    match first {
        Sent::Failed { seq: 0, code, .. } => assert_eq!(code, ErrorCode::UpstreamReset),
        Sent::Reply { end: false, .. } => assert_eq!(line.failure().await, (1, ErrorCode::UpstreamReset)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn events_that_break_off_with_the_head_are_passed_on_before_the_breakage_is() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for events in ["", "data: x\n\n"] {
        line.request(&get("/")).await;
        let head =
            "HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8\r\ncontent-length: 99\r\n\r\n";
        let (peer, _) = upstream.answer(format!("{head}{events}").as_bytes()).await;
        drop(peer);
        let Sent::Reply { status: 200, mut body, end: false, .. } = line.answer().await else {
            panic!("{events:?}: a reply")
        };
        let end = loop {
            match line.answer().await {
                Sent::Chunk { body: piece, end: false, .. } => body.extend(piece),
                Sent::Failed { seq, code, .. } => break (seq > 0, code),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((&body[..], end), (events.as_bytes(), (true, ErrorCode::UpstreamReset)));
    }
}

#[tokio::test]
async fn a_second_response_in_one_write_answers_nobody() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for evil in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"[..],
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
    ] {
        line.request(&get("/1")).await;
        let (mut first, _) = upstream.answer(evil).await;
        assert!(line.answer().await.is_end());
        let sent = with_body(request("POST", "/2"), b"body");
        line.request(&sent).await;
        let (second, head) =
            upstream.answer(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nright").await;
        assert!(head.starts_with("POST /2 "));
        assert_eq!(line.whole(&sent).await.body, b"right");
        first.closed().await;
        drop(second);
    }
}

#[tokio::test]
async fn a_response_to_nothing_answers_nobody() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/1")).await;
    let (mut first, _) = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
    first.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil").await;
    first.closed().await;
    let sent = get("/2");
    line.request(&sent).await;
    let _second = upstream.answer(OK).await;
    assert_eq!(line.whole(&sent).await.body, b"ok");
}

#[tokio::test]
async fn a_pooled_connection_is_used_again_and_a_closed_one_is_not() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/1")).await;
    let (mut peer, _) = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
    line.request(&get("/2")).await;
    assert!(peer.head().await.starts_with("GET /2 "));
    peer.write(OK).await;
    assert!(line.answer().await.is_end());
    drop(peer);
    // The connection is closed while it is idle: the next POST goes out once, on another one.
    let sent = with_body(request("POST", "/3"), b"body");
    line.request(&sent).await;
    let (mut peer, head) = upstream.answer(OK).await;
    assert!(head.starts_with("POST /3 "));
    assert_eq!(peer.bytes(4).await, b"body");
    assert_eq!(line.whole(&sent).await.status, 200);
    assert!(upstream.is_untouched().await);
}

#[tokio::test]
async fn a_post_that_was_written_is_not_sent_again() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/1")).await;
    let (mut peer, _) = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
    line.request(&with_body(request("POST", "/2"), b"body")).await;
    peer.head().await;
    drop(peer);
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamReset));
    assert!(upstream.is_untouched().await);
    // A GET may be asked again.
    line.request(&get("/3")).await;
    let (mut peer, _) = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
    line.request(&get("/4")).await;
    peer.head().await;
    drop(peer);
    let (_peer, head) = upstream.answer(OK).await;
    assert!(head.starts_with("GET /4 "));
    assert!(line.answer().await.is_end());
}

#[tokio::test]
async fn broken_gzip_and_noise_pass_untouched() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let body = noise(20_000);
    let sent = get("/");
    line.request(&sent).await;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n", body.len());
    let _peer = upstream.answer(&[head.as_bytes(), &body].concat()).await;
    assert_eq!(line.whole(&sent).await.body, body);
}

/// An announced body that the upstream is asked to take.
async fn announced(line: &mut crate::stage::Line, length: u64) -> proto::message::Request<'static> {
    let mut sent = request("POST", "/upload");
    sent.announced = Some(length);
    line.request(&sent).await;
    assert!(matches!(line.answer().await, Sent::Continue { .. }));
    sent
}

#[tokio::test]
async fn an_upstream_that_fails_is_to_blame_whatever_became_of_the_body() {
    // It is not there.
    let nobody = ClosedPort::bind();
    let edge = Edge::bind().await;
    let agent = Agent::http(&edge, nobody.port(), &[]);
    let mut line = edge.welcome().await;
    for length in [1, 98_000] {
        announced(&mut line, length).await;
        assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable), "{length} bytes");
    }
    drop(agent);
    // It closes, resets, or says what is not HTTP, while the body comes.
    let (_edge, mut line, upstream, agent) = connected().await;
    for (what, code) in [
        ("close", ErrorCode::UpstreamReset),
        ("reset", ErrorCode::UpstreamReset),
        ("nonsense", ErrorCode::UpstreamInvalid),
    ] {
        let sent = announced(&mut line, 1_000_000).await;
        line.piece(&sent, 1, &noise(50_000), false).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        match what {
            "close" => drop(peer),
            "reset" => reset(peer),
            _ => peer.write("SSH-2.0-OpenSSH\r\n\r\n").await,
        }
        // Pieces go on coming: the edge does not know yet.
        line.piece(&sent, 2, &noise(50_000), false).await;
        assert_eq!(line.failure().await, (0, code), "{what}");
    }
    let log = agent.log();
    assert!(!log.contains("edge_failed"), "told in two ways: {log}");
}

#[tokio::test]
async fn an_early_answer_wins_over_the_body_that_nobody_took() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for _ in 0..20 {
        let sent = announced(&mut line, 4_000_000).await;
        let piece = noise(90_000);
        line.piece(&sent, 1, &piece, false).await;
        let mut peer = upstream.accept().await;
        let answer = async {
            peer.head().await;
            peer.bytes(300_000).await;
            peer.write("HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 4\r\n\r\nmore").await;
            // What is there and not read makes a reset of the close, while more is on its way.
            drop(peer);
        };
        let upload = async {
            for seq in 2..40 {
                line.piece(&sent, seq, &piece, false).await;
            }
        };
        tokio::join!(answer, upload);
        let whole = line.whole(&sent).await;
        assert_eq!((whole.status, &whole.body[..]), (413, &b"more"[..]));
    }
}

#[tokio::test]
async fn a_head_is_as_lenient_as_the_rules_allow() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for (head, length) in [
        ("content-length: 2\r\nContent-Length: 2\r\n", &[&b"2"[..]][..]),
        ("content-length: 2, 2\r\n", &[b"2"]),
        ("content-length: 02\r\ncontent-length: 2\r\n", &[b"2"]),
        // RFC 9112 §5.1: the space goes.
        ("content-length : 2\r\n", &[b"2"]),
        ("content-length: 3\r\ntransfer-encoding: chunked\r\n", &[]),
    ] {
        let sent = get("/");
        line.request(&sent).await;
        let body = if head.contains("chunked") { "2\r\nok\r\n0\r\n\r\n" } else { "ok" };
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write(format!("HTTP/1.1 200 OK\r\nconnection: close\r\n{head}\r\n{body}")).await;
        let whole = line.whole(&sent).await;
        assert_eq!((whole.status, &whole.body[..]), (200, &b"ok"[..]), "{head}");
        assert_eq!(whole.all("content-length"), length, "{head}");
    }
    // RFC 9110 §8.6: what has no body says no length.
    let sent = get("/");
    line.request(&sent).await;
    let _peer =
        upstream.answer(b"HTTP/1.1 204 No Content\r\nconnection: close\r\ncontent-length: 5\r\n\r\n").await;
    assert!(line.whole(&sent).await.all("content-length").is_empty());
    for lengths in ["content-length: 2, 3", "content-length: 2\r\ncontent-length: 3", "content-length: 2,"] {
        line.request(&get("/")).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write(format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\nok")).await;
        assert_eq!(line.failure().await, (0, ErrorCode::UpstreamInvalid), "{lengths}");
        patiently("the end", peer.closed()).await;
    }
}
