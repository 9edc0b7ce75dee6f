//! Bodies both ways: streaming, credit, cancelling, announced uploads.

use std::time::{Duration, Instant};

use proto::{
    body::{Body, Codec, Codecs},
    error::ErrorCode,
    limits,
    message::{EdgeMessage, Request, RequestChunk},
};
use tokio::{io::AsyncWriteExt as _, time::timeout};

use crate::stage::{Line, Manners, Sent, connected, connected_with, get, noise, patiently, request};

const CHUNKED: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

#[tokio::test]
async fn a_large_body_arrives_whole_in_frames_and_messages_of_legal_size() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for len in [
        limits::FRAME_BYTES - 1,
        limits::FRAME_BYTES + 1,
        limits::CHUNK_BYTES - 1,
        limits::CHUNK_BYTES + 1,
        128 * 1024,
        5 * 1024 * 1024,
    ] {
        let body = noise(len);
        let sent = get("/");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write(format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n")).await;
        let write = async { peer.write(&body).await };
        let (whole, ()) = tokio::join!(line.whole(&sent), write);
        assert!(whole.body == body, "{len}");
        assert!(whole.messages <= len.div_ceil(limits::CHUNK_BYTES) * 2 + 2, "{} for {len}", whole.messages);
    }
}

#[tokio::test]
async fn text_bodies_of_every_kind_arrive_whole() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for text in
        ["plain ", "\"quoted\" \\ ", "tab\tnewline\n", "\u{1}\u{2}\u{7f}", "ünï©ode \u{ffff}\u{10ffff}"]
    {
        let body = text.repeat(300_000 / text.len());
        let sent = get("/");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write(format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len()))
            .await;
        let write = async { peer.write(&body).await };
        let (whole, ()) = tokio::join!(line.whole(&sent), write);
        assert!(whole.body == body.as_bytes(), "{text:?}");
    }
}

#[tokio::test]
async fn the_largest_head_leaves_room_for_its_body() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let field = "\"".repeat(limits::HEAD_BYTES - 200);
    let body = noise(100_000);
    let sent = get("/");
    line.request(&sent).await;
    let head = format!("HTTP/1.1 200 OK\r\nx: {field}\r\ncontent-length: {}\r\n\r\n", body.len());
    let _peer = upstream.answer(&[head.as_bytes(), &body].concat()).await;
    let whole = line.whole(&sent).await;
    assert_eq!(whole.all("x")[0].len(), field.len());
    assert!(whole.body == body);
}

#[tokio::test]
async fn every_flush_is_sent_on_at_once_and_the_head_first() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/")).await;
    let (mut peer, _) = upstream.answer(CHUNKED).await;
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, end: false, .. }));
    for seq in 1..=100u32 {
        let event = format!("data: {seq}\n\n");
        peer.write(format!("{:x}\r\n{event}\r\n", event.len())).await;
        let began = Instant::now();
        let Sent::Chunk { seq: got, body, end: false, .. } = line.answer().await else { panic!("a chunk") };
        assert_eq!((got, body), (seq, event.into_bytes()));
        assert!(began.elapsed() < Duration::from_secs(1));
        if seq % 8 == 0 {
            // Credit as the edge gives it.
            let sent = get("/never-sent");
            line.credit(&sent, seq).await;
        }
        if seq == limits::CHUNK_WINDOW {
            break;
        }
    }
    peer.write("0\r\n\r\n").await;
}

#[tokio::test]
async fn without_credit_the_upstream_is_not_read() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = get("/");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    peer.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").await;
    let piece = noise(64 * 1024);
    let mut written = 0usize;
    // Writes until the agent takes no more.
    while timeout(Duration::from_millis(500), peer.stream.write_all(&piece)).await.is_ok() {
        written += piece.len();
        assert!(written < 64 * 1024 * 1024, "the agent reads without end");
        while let Ok(Ok(_)) = timeout(Duration::ZERO, line.try_answer()).await {}
    }
    // What was sent is what the window allows.
    let mut last = 0;
    while let Ok(answer) = timeout(Duration::from_millis(300), line.try_answer()).await {
        if let Sent::Chunk { seq, .. } = answer.unwrap() {
            last = seq;
        }
    }
    assert!(last == 0 || last == limits::CHUNK_WINDOW, "{last}");
    line.credit(&sent, 8).await;
    let Sent::Chunk { seq, .. } = line.answer().await else { panic!("a chunk") };
    assert_eq!(seq, limits::CHUNK_WINDOW + 1);
    line.cancel(&sent).await;
    peer.closed().await;
}

#[tokio::test]
async fn cancelling_closes_the_upstream_at_once() {
    let (_edge, mut line, upstream, mut agent) = connected().await;
    assert!(agent.line().await.starts_with("https://web.tunnel.example.com  ->  http://localhost:"));
    // Before the head.
    let sent = get("/slow?secret");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    let began = Instant::now();
    line.cancel(&sent).await;
    peer.closed().await;
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(line.failure().await, (0, ErrorCode::Cancelled), "its last word");
    let access = agent.line().await;
    assert!(access.contains("499  GET /slow  ") && access.ends_with("cancelled"), "{access}");
    // In the middle of the body.
    let sent = get("/");
    line.request(&sent).await;
    let (mut peer, _) = upstream.answer(CHUNKED).await;
    line.answer().await;
    let began = Instant::now();
    line.cancel(&sent).await;
    peer.closed().await;
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(line.failure().await, (1, ErrorCode::Cancelled), "its last word, after the head");
}

/// Many more than may wait to be written on a link.
const CROWD: usize = 200;

#[tokio::test]
async fn each_of_a_crowd_that_is_cancelled_at_once_gets_its_last_word_also_over_a_full_link() {
    let (_edge, mut line, upstream, _agent) =
        connected_with(Manners::default(), &["--max-concurrent", "256"]).await;
    let mut held = Vec::new();
    for _ in 0..CROWD {
        let sent = get("/held");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        held.push((sent, peer));
    }
    // Nobody reads the link, and downloads fill it.
    let mut downloads = Vec::new();
    for _ in 0..3 {
        line.request(&get("/")).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").await;
        let piece = noise(64 * 1024);
        while timeout(Duration::from_millis(500), peer.stream.write_all(&piece)).await.is_ok() {}
        downloads.push(peer);
    }
    for (sent, _) in &held {
        line.cancel(sent).await;
    }
    for (_, peer) in &mut held {
        peer.closed().await;
    }
    let mut last_words = 0;
    while last_words < CROWD {
        match line.answer().await {
            Sent::Failed { seq: 0, code: ErrorCode::Cancelled, .. } => last_words += 1,
            Sent::Reply { .. } | Sent::Chunk { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_probe_is_told_how_far_the_response_is() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let progress = async |line: &mut Line, request: &Request<'static>| {
        line.probe(request).await;
        let Sent::Progress { token, sent, ended } = line.answer().await else { panic!("progress") };
        assert_eq!(token, request.token);
        (sent, ended)
    };
    let sent = get("/");
    assert_eq!(progress(&mut line, &sent).await, (0, true), "it has never heard of it");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    assert_eq!(progress(&mut line, &sent).await, (0, false));
    peer.write(CHUNKED).await;
    assert!(matches!(line.answer().await, Sent::Reply { end: false, .. }));
    assert_eq!(progress(&mut line, &sent).await, (1, false));
    peer.write("4\r\nbody\r\n").await;
    assert!(matches!(line.answer().await, Sent::Chunk { seq: 1, end: false, .. }));
    assert_eq!(progress(&mut line, &sent).await, (2, false));
    peer.write("0\r\n\r\n").await;
    assert!(matches!(line.answer().await, Sent::Chunk { seq: 2, end: true, .. }));
    // Its end may be noticed a moment later than it is sent.
    let end = progress(&mut line, &sent).await;
    assert!([(3, false), (0, true)].contains(&end), "{end:?}");
}

#[tokio::test]
async fn text_is_compressed_where_the_edge_can_decode_it() {
    let text = "the same line again and again\n".repeat(20_000);
    for (codecs, most) in [(Codecs::all(), 4), (Codecs::default(), 12)] {
        let compresses = codecs.has(Codec::Zstd);
        let manners = Manners { codecs, ..Manners::default() };
        let (_edge, mut line, upstream, _agent) = connected_with(manners, &[]).await;
        let sent = get("/");
        line.request(&sent).await;
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", text.len());
        let mut peer = upstream.accept().await;
        peer.head().await;
        let all = [head.as_bytes(), text.as_bytes()].concat();
        let write = async { peer.write(&all).await };
        let (whole, ()) = tokio::join!(line.whole(&sent), write);
        assert!(whole.body == text.as_bytes());
        assert!(whole.messages <= most, "{} messages, compressed: {compresses}", whole.messages);
    }
}

#[tokio::test]
async fn an_announced_body_is_asked_for_and_streamed() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let body = noise(3 * 1024 * 1024);
    let mut sent = request("PUT", "/upload");
    sent.announced = Some(body.len() as u64);
    line.request(&sent).await;
    assert_eq!(line.answer().await, Sent::Continue { token: sent.token.to_string() });
    let mut peer = upstream.accept().await;
    let head = peer.head().await;
    assert!(head.contains(&format!("\r\ncontent-length: {}", body.len())), "{head}");
    let pieces: Vec<_> = body.chunks(90_000).collect();
    let read = async { peer.bytes(body.len()).await };
    let write = async {
        // Neighbours swapped and every third delivered twice.
        for pair in 0..pieces.len().div_ceil(2) {
            for index in [pair * 2 + 1, pair * 2] {
                if let Some(piece) = pieces.get(index) {
                    for _ in 0..if index % 3 == 0 { 2 } else { 1 } {
                        line.piece(&sent, index as u32 + 1, piece, index + 1 == pieces.len()).await;
                    }
                }
            }
        }
    };
    let (got, ()) = tokio::join!(read, write);
    assert!(got == body);
    peer.write("HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(line.whole(&sent).await.status, 201);
    // The connection is clean afterwards.
    line.request(&get("/next")).await;
    assert!(peer.head().await.starts_with("GET /next "));
}

#[tokio::test]
async fn a_compressed_piece_is_unfolded() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let text = b"again and ".repeat(20_000);
    let mut sent = request("POST", "/");
    sent.announced = Some(text.len() as u64);
    line.request(&sent).await;
    line.answer().await;
    let (body, taken) = Body::encode_front(&text, Some(Codec::Zstd));
    assert_eq!(taken, text.len());
    let chunk = RequestChunk { request_id: sent.request_id.clone(), seq: 1, body, end: true };
    line.send(&EdgeMessage::RequestChunk(chunk)).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    assert!(peer.bytes(text.len()).await == text);
}

#[tokio::test]
async fn a_body_that_is_not_as_announced_never_looks_whole() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for (announced, piece, end) in [(10u64, &b"12345"[..], true), (3, b"12345", true)] {
        let mut sent = request("POST", "/");
        sent.announced = Some(announced);
        line.request(&sent).await;
        line.answer().await;
        line.piece(&sent, 1, piece, end).await;
        let mut peer = upstream.accept().await;
        peer.closed().await;
        assert_eq!(line.failure().await, (0, ErrorCode::BadRequest));
    }
    let mut sent = request("POST", "/");
    sent.announced = Some(limits::REQUEST_BODY_BYTES as u64 + 1);
    line.request(&sent).await;
    assert_eq!(line.failure().await, (0, ErrorCode::RequestTooLarge));
}

#[tokio::test]
async fn an_early_answer_ends_the_upload_and_the_connection() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let mut sent = request("POST", "/");
    sent.announced = Some(1_000_000);
    line.request(&sent).await;
    line.answer().await;
    line.piece(&sent, 1, &noise(50_000), false).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    peer.write("HTTP/1.1 413 Too Large\r\ncontent-length: 4\r\n\r\nmore").await;
    let whole = line.whole(&sent).await;
    assert_eq!((whole.status, &whole.body[..]), (413, &b"more"[..]));
    peer.closed().await;
    // Late pieces are nobody's.
    line.piece(&sent, 2, &noise(50_000), false).await;
    line.request(&get("/")).await;
    let _peer = upstream.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    assert!(line.answer().await.is_end());
}

#[tokio::test]
async fn a_download_does_not_hold_up_a_small_request() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let large = get("/large");
    line.request(&large).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    let body = noise(30 * 1024 * 1024);
    peer.write(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len())).await;
    let pour = tokio::spawn(async move { peer.stream.write_all(&body).await });
    let mut asked = None;
    let mut chunks = 0u32;
    patiently("the small answer", async {
        loop {
            let answer = line.answer().await;
            if asked.as_ref().is_some_and(|(small, _): &(Request<'_>, u32)| small.token == answer.token()) {
                assert!(answer.is_end());
                break;
            }
            if let Sent::Chunk { seq, end, .. } = answer {
                assert!(!end, "the download ended before the small answer came");
                chunks = seq;
                line.credit(&large, seq).await;
            }
            if chunks == 20 && asked.is_none() {
                let small = get("/small");
                line.request(&small).await;
                let _peer = upstream.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                asked = Some((small, chunks));
            }
        }
    })
    .await;
    let (_, at) = asked.unwrap();
    // What was already in the sockets when the small request was answered comes first.
    assert!(chunks - at <= limits::CHUNK_WINDOW + 4, "{} chunks in between", chunks - at);
    line.cancel(&large).await;
    let _ = pour.await;
}
