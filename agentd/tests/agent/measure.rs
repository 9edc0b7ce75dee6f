//! Figures, not verdicts: what the agent costs. They mean something in a release build only:
//! `cargo test -p agentd --release --test agent measure -- --ignored --nocapture --test-threads 1`.

use std::{
    fs,
    time::{Duration, Instant},
};

use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::stage::{Agent, Edge, Line, Manners, Peer, Sent, get, request, with_header};

/// Resident kilobytes and CPU time so far of all threads of the agent.
fn usage(agent: &Agent) -> (u64, Duration) {
    let pid = agent.child.id().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident = resident.trim().trim_end_matches(" kB").parse().unwrap();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanos = threads
        .map(|thread| fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap())
        .map(|stat| stat.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    (resident, Duration::from_nanos(nanos))
}

/// Answers every request on every connection with `response`.
async fn serve(response: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let response = response.clone();
            tokio::spawn(async move {
                let mut stream = tokio::io::BufReader::new(stream);
                loop {
                    let mut line = String::new();
                    loop {
                        line.clear();
                        match tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await {
                            Ok(0) | Err(_) => return,
                            Ok(_) if line == "\r\n" => break,
                            Ok(_) => {}
                        }
                    }
                    if stream.write_all(&response).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

async fn connect(port: u16) -> (Edge, Line, Agent) {
    let edge = Edge::bind().await;
    let agent = Agent::http(&edge, port, &["--log-level", "warn"]);
    let line = edge.welcome_with(Manners::default()).await;
    (edge, line, agent)
}

fn typical() -> proto::message::Request<'static> {
    let mut sent = get("/api/items?page=2");
    for (name, value) in [
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("accept-language", "en-US,en;q=0.5"),
        ("accept-encoding", "gzip, deflate, br, zstd"),
        ("cookie", "session=0123456789abcdef0123456789abcdef"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "web.tunnel.example.com"),
        ("via", "1.1 tunnel"),
    ] {
        sent = with_header(sent, name, value.as_bytes());
    }
    sent
}

#[tokio::test]
#[ignore = "a measurement"]
async fn memory_when_idle() {
    let port = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_vec()).await;
    let (_edge, mut line, agent) = connect(port).await;
    let (fresh, _) = usage(&agent);
    for _ in 0..1000 {
        let sent = typical();
        line.request(&sent).await;
        line.answer().await;
    }
    let (used, _) = usage(&agent);
    println!("resident when idle: {fresh} kB fresh, {used} kB after 1000 requests");
}

#[tokio::test]
#[ignore = "a measurement"]
async fn small_requests() {
    let response =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\n\
                     content-length: 13\r\n\r\n{\"ok\": true}\n";
    let port = serve(response.to_vec()).await;
    let (_edge, mut line, agent) = connect(port).await;
    for concurrent in [1, 32] {
        for _ in 0..200 {
            line.request(&typical()).await;
            line.answer().await;
        }
        let total = 20_000;
        let (_, before) = usage(&agent);
        let began = Instant::now();
        let mut sent = 0;
        let mut answered = 0;
        while answered < total {
            while sent < total && sent - answered < concurrent {
                line.request(&typical()).await;
                sent += 1;
            }
            assert!(matches!(line.answer().await, Sent::Reply { end: true, .. }));
            answered += 1;
        }
        let elapsed = began.elapsed();
        let (resident, after) = usage(&agent);
        println!(
            "{concurrent} at a time: {:.0} requests/s, {:.1} us CPU of the agent for each, {resident} kB",
            f64::from(total) / elapsed.as_secs_f64(),
            (after - before).as_secs_f64() * 1e6 / f64::from(total),
        );
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn downloads() {
    let text = "{\"id\": 17, \"name\": \"a line of JSON\", \"value\": 0.25},\n".repeat(1_000_000);
    for (kind, body) in [("noise", crate::stage::noise(100 << 20)), ("text", text.into_bytes())] {
        let mut response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
        let len = body.len();
        response.extend(body);
        let port = serve(response).await;
        let (_edge, mut line, agent) = connect(port).await;
        let (_, before) = usage(&agent);
        let began = Instant::now();
        let sent = get("/");
        line.request(&sent).await;
        let whole = line.whole(&sent).await;
        let elapsed = began.elapsed();
        let (resident, after) = usage(&agent);
        println!(
            "{} MB of {kind}: {:.0} MB/s in {} messages, {:.0} ms CPU of the agent for each 100 MB, {resident} kB",
            len >> 20,
            len as f64 / 1e6 / elapsed.as_secs_f64(),
            whole.messages,
            (after - before).as_secs_f64() * 1e3 * 1e8 / len as f64,
        );
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn uploads() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (_edge, mut line, agent) = connect(port).await;
    let body = crate::stage::noise(4 << 20);
    let mut peer = None;
    let (_, before) = usage(&agent);
    let began = Instant::now();
    let rounds = 20;
    for _ in 0..rounds {
        let mut sent = request("POST", "/");
        sent.announced = Some(body.len() as u64);
        line.request(&sent).await;
        line.answer().await;
        if peer.is_none() {
            peer = Some(Peer::new(listener.accept().await.unwrap().0));
        }
        let peer = peer.as_mut().unwrap();
        let write = async {
            let pieces = body.chunks(proto::limits::CHUNK_BYTES);
            let last = pieces.len();
            for (index, piece) in pieces.enumerate() {
                line.piece(&sent, index as u32 + 1, piece, index + 1 == last).await;
            }
        };
        let read = async {
            peer.head().await;
            peer.bytes(body.len()).await;
        };
        tokio::join!(write, read);
        peer.write("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        line.answer().await;
    }
    let (resident, after) = usage(&agent);
    println!(
        "uploads of 4 MiB: {:.0} MB/s, {:.1} ms CPU of the agent for each, {resident} kB",
        f64::from(rounds) * body.len() as f64 / 1e6 / began.elapsed().as_secs_f64(),
        (after - before).as_secs_f64() * 1e3 / f64::from(rounds),
    );
}

#[tokio::test]
#[ignore = "a measurement"]
async fn flushes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (_edge, mut line, _agent) = connect(port).await;
    let sent = get("/");
    line.request(&sent).await;
    let (stream, _) = listener.accept().await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut peer = Peer::new(stream);
    peer.head().await;
    peer.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    line.answer().await;
    let mut delays = Vec::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    for seq in 1..=200 {
        ticks.tick().await;
        let began = Instant::now();
        peer.write("5\r\nevent\r\n").await;
        line.answer().await;
        delays.push(began.elapsed());
        line.credit(&sent, seq).await;
    }
    delays.sort();
    println!(
        "a flush arrives after {:?} (p50), {:?} (p95), {:?} (p99)",
        delays[100], delays[190], delays[198]
    );
}
