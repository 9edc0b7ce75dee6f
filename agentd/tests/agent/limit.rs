//! Limits: time, number, names, and messages nobody should send.

use std::time::{Duration, Instant};

use futures_util::SinkExt as _;
use proto::error::ErrorCode;
use tokio_tungstenite::tungstenite::Message;

use crate::stage::{Manners, OK, Sent, connected, connected_with, get};

#[tokio::test]
async fn one_too_many_is_told_so_at_once_and_a_free_place_is_used() {
    let (_edge, mut line, upstream, _agent) =
        connected_with(Manners::default(), &["--max-concurrent", "1"]).await;
    let first = get("/1");
    line.request(&first).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    line.request(&get("/2")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::TooManyRequests));
    peer.write(OK).await;
    assert!(line.answer().await.is_end());
    line.request(&get("/3")).await;
    assert!(peer.head().await.starts_with("GET /3 "));
}

#[tokio::test]
async fn a_slow_upstream_is_given_up_at_the_sooner_of_both_deadlines() {
    for (own, edges) in [("200ms", 30_000), ("60s", 200)] {
        let (_edge, mut line, upstream, _agent) =
            connected_with(Manners::default(), &["--request-timeout", own]).await;
        let mut sent = get("/");
        sent.timeout_ms = edges;
        let began = Instant::now();
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTimedOut));
        assert!(began.elapsed() >= Duration::from_millis(200));
        peer.closed().await;
    }
}

#[tokio::test]
async fn a_request_for_another_tunnel_is_refused() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let mut sent = get("/");
    sent.tunnel = "other".parse().unwrap();
    line.request(&sent).await;
    assert_eq!(line.failure().await, (0, ErrorCode::NoSuchTunnel));
    assert!(upstream.is_untouched().await);
}

#[tokio::test]
async fn a_request_that_comes_twice_is_served_once() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = get("/1");
    line.request(&sent).await;
    line.request(&sent).await;
    let (mut peer, _) = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
    line.request(&sent).await;
    line.request(&get("/2")).await;
    assert!(peer.head().await.starts_with("GET /2 "));
    peer.write(OK).await;
    assert!(line.answer().await.is_end());
    assert!(upstream.is_untouched().await);
}

#[tokio::test]
async fn what_cannot_be_read_is_dropped_and_a_broken_request_answered() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for text in [
        "nonsense",
        "{}",
        r#"{"message":"Internal server error","connectionId":"x","requestId":"y"}"#,
        r#"{"type":"later","x":1}"#,
        r#"{"type":"credit","request_id":"nonsense","through":1}"#,
    ] {
        line.ws.send(Message::text(text)).await.unwrap();
    }
    let broken = r#"{"type":"request","token":"t","request_id":"00000000000000000000000000000001","tunnel":"web",
        "method":"GET","target":"http://evil/","headers":[],"timeout_ms":1}"#;
    line.ws.send(Message::text(broken)).await.unwrap();
    assert_eq!(line.answer().await, Sent::Failed { token: "t".into(), seq: 0, code: ErrorCode::BadRequest });
    line.request(&get("/")).await;
    let _peer = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
}

#[tokio::test]
async fn a_binary_message_ends_the_connection_with_1003() {
    let (edge, mut line, _upstream, _agent) = connected().await;
    line.ws.send(Message::binary(vec![1])).await.unwrap();
    assert_eq!(line.closed().await, Some(1003));
    edge.welcome().await;
}
