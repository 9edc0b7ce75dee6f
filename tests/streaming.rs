//! Bodies on their way: what is flushed arrives at once, memory stays bounded, a slow client slows its
//! upstream, and whatever is broken off looks broken.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use proto::{
    error::ErrorCode,
    limits,
    message::{AgentMessage, EdgeMessage, Failed},
};
use sha2::{Digest, Sha256};
use tests::{
    Agent, Local, PATIENCE,
    acceptance::{self, chunked, piece},
    client::{Connection, Request},
    noise, peak_resident_bytes, program_bytes,
    raw_agent::{Call, RawAgent},
    stack::Front,
    upstream::{Conn, Upstream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{Notify, mpsc},
    time::timeout,
};

const MIB: usize = 1024 * 1024;

#[tokio::test]
async fn each_flush_arrives_before_the_next_is_made_and_the_head_before_all() {
    acceptance::each_flush_arrives(Local::start(&[]).stack()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_mebibytes_pass_whole_and_nobody_holds_more_than_64() {
    const PIECES: usize = 100;
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", PIECES * MIB);
        assert!(conn.write(head).await);
        for index in 0..PIECES {
            assert!(conn.write(piece(index)).await);
        }
        Some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    let connection = Connection::open(local.public).await;
    acceptance::download(&Request::to("web", "GET", "/"), connection, Front::Local, PIECES).await;
    assert_peaks_are_small(&local, &agent);
}

/// No process of the path has ever held 64 MiB: its program's own pages are a matter of its build, and a test's is several
/// times as large.
fn assert_peaks_are_small(local: &Local, agent: &Agent) {
    let mut processes = local.function_processes();
    processes.push(("agentd".to_owned(), agent.process().id()));
    for name in ["agentd", "ingress", "response"] {
        assert!(processes.iter().any(|(own, _)| own == name), "{processes:?}");
    }
    for (name, pid) in processes {
        let (all, program) = (peak_resident_bytes(pid).unwrap(), program_bytes(pid).unwrap());
        let own = all - program.min(all);
        println!("{name}: at most {} KiB resident, {} its own", all / 1024, own / 1024);
        assert!(own < 64 * MIB as u64, "{name} held {} KiB", own / 1024);
    }
}

/// What the kernel may keep for one TCP connection on its way: the largest buffers of both ends.
fn kernel_bytes_for_a_connection() -> usize {
    ["tcp_rmem", "tcp_wmem"]
        .map(|name| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
            text.split_whitespace().last().unwrap().parse::<usize>().unwrap()
        })
        .iter()
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_stalls_its_upstream_and_loses_nothing() {
    // Without an end: whatever is bounded stalls it, and whatever is not never does.
    let written = Arc::new(AtomicUsize::new(0));
    let stalled = Arc::new(Notify::new());
    let finish = Arc::new(AtomicBool::new(false));
    let (counter, full, stop) = (Arc::clone(&written), Arc::clone(&stalled), Arc::clone(&finish));
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let (counter, full, stop) = (Arc::clone(&counter), Arc::clone(&full), Arc::clone(&stop));
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            let mut index = 0;
            while !stop.load(Ordering::Acquire) {
                let bytes = chunked(&piece(index));
                let mut write = std::pin::pin!(conn.write(bytes));
                while timeout(Duration::from_millis(700), &mut write).await.is_err() {
                    full.notify_one();
                }
                index += 1;
                counter.fetch_add(MIB, Ordering::AcqRel);
            }
            assert!(conn.write("0\r\n\r\n").await);
            Some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    let mut connection = Connection::open(local.public).await;
    connection.begin(&Request::to("web", "GET", "/")).await;
    assert_eq!(connection.head().await.status, 200);
    // On a busy machine one pause is not yet a stall.
    let mut seen = (usize::MAX, 0);
    while seen.1 < 3 {
        timeout(PATIENCE, stalled.notified()).await.expect("the upstream is slowed down");
        let now = written.load(Ordering::Acquire);
        seen = if now == seen.0 { (now, seen.1 + 1) } else { (now, 0) };
    }
    // The window, what ingress takes before it returns credit, and the two connections on which
    // bytes follow each other without a window of ours: upstream to agent, and edge to client
    // with the Runtime API before it. Reads are up to 128 KiB each.
    let window = (limits::CHUNK_WINDOW + limits::CREDIT_EVERY + 2) as usize * limits::CHUNK_BYTES;
    let bound = window + 3 * kernel_bytes_for_a_connection() + 8 * 128 * 1024;
    let at_most = written.load(Ordering::Acquire);
    assert!(at_most <= bound, "{at_most} bytes were taken for a client that reads none; bound {bound}");
    assert_peaks_are_small(&local, &agent);
    finish.store(true, Ordering::Release);
    let answer = connection.chunked_body().await;
    let whole = written.load(Ordering::Acquire);
    assert_eq!(answer.len(), whole);
    for (index, own) in answer.chunks(MIB).enumerate() {
        assert_eq!(Sha256::digest(own), Sha256::digest(piece(index)), "{index}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_download_does_not_delay_others_and_ends_with_its_client() {
    let closed = Arc::new(Mutex::new(Vec::new()));
    let ends = Arc::clone(&closed);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let ends = Arc::clone(&ends);
        async move {
            if request.target() == "/endless" {
                assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
                let bytes = chunked(&noise(1, 256 * 1024));
                while conn.write(&bytes).await {}
                ends.lock().unwrap().push(request.target().to_owned());
                return None;
            }
            conn.answer("200 OK", "", request.target().as_bytes()).await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());

    // One that is read as fast as it comes, and one that is not read at all.
    let mut fast = Connection::open(local.public).await;
    fast.begin(&Request::to("web", "GET", "/endless")).await;
    assert_eq!(fast.head().await.status, 200);
    let (seen, saw) = mpsc::unbounded_channel();
    let mut saw: mpsc::UnboundedReceiver<usize> = saw;
    let reader = tokio::spawn(async move {
        while let Some(chunk) = fast.chunk().await {
            if seen.send(chunk.len()).is_err() {
                return;
            }
        }
    });
    let mut unread = Connection::open(local.public).await;
    unread.begin(&Request::to("web", "GET", "/endless")).await;
    assert_eq!(unread.head().await.status, 200);
    for index in 0..10 {
        // It is under way before and after: each small request has gone past it.
        saw.recv().await.unwrap();
        let target = format!("/small-{index}");
        let answer = Request::to("web", "GET", &target).send(local.public).await;
        assert_eq!((answer.status, answer.text()), (200, target));
        while saw.try_recv().is_ok() {}
        saw.recv().await.unwrap();
    }
    reader.abort();
    drop(reader.await);
    drop(unread);
    tests::eventually("both endless ones have ended", async || closed.lock().unwrap().len() == 2).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_call_to_its_upstream_within_a_second() {
    let (ended, mut ends) = mpsc::unbounded_channel();
    let (begun, mut begins) = mpsc::unbounded_channel();
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let (ended, begun) = (ended.clone(), begun.clone());
        async move {
            match request.target() {
                "/" => return conn.answer("200 OK", "", b"next").await.then_some(conn),
                "/middle" => {
                    assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
                    assert!(conn.write(chunked(b"one")).await);
                }
                "/length" => {
                    assert!(conn.write("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\none").await);
                }
                _ => {}
            }
            begun.send(()).unwrap();
            conn.closed().await;
            ended.send(Instant::now()).unwrap();
            None
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for round in 0..3 {
        for target in ["/middle", "/length", "/before-the-head"] {
            let mut connection = Connection::open(local.public).await;
            connection.begin(&Request::to("web", "GET", target)).await;
            begins.recv().await.unwrap();
            if target != "/before-the-head" {
                assert_eq!(connection.head().await.status, 200);
                assert!(!connection.bytes(3).await.is_empty());
            }
            let left = Instant::now();
            drop(connection);
            let end = timeout(PATIENCE, ends.recv()).await.expect("the upstream's connection ends").unwrap();
            let took = end.saturating_duration_since(left);
            assert!(took < Duration::from_secs(1), "{round} {target}: {took:?}");
            let answer = Request::to("web", "GET", "/").send(local.public).await;
            assert_eq!((answer.status, answer.text().as_str(), answer.complete), (200, "next", true));
        }
    }
    // Nothing keeps running: a process that still waited for something would not have been used again.
    let processes = local.function_processes();
    let count = processes.iter().filter(|(function, _)| function == "ingress").count();
    assert!(count <= 4, "{processes:?}");
}

/// A request whose head and first piece have come, and then no more.
async fn begun(local: &Local, agent: &mut RawAgent, target: &str) -> (Connection, Call) {
    let mut connection = Connection::open(local.public).await;
    connection.begin(&Request::to("web", "GET", target)).await;
    let call = agent.request().await;
    assert_eq!(call.target, target);
    agent.say(call.reply("[0]", false)).await;
    assert_eq!(connection.head().await.status, 200);
    assert_eq!(connection.chunk().await.unwrap(), b"[0]");
    (connection, call)
}

#[tokio::test]
async fn a_piece_that_never_comes_ends_the_transfer_in_time_and_a_silence_does_not() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let (mut quiet, silent) = begun(&local, &mut agent, "/quiet").await;
    let (mut last, no_end) = begun(&local, &mut agent, "/lost-last").await;
    let (mut gap, no_middle) = begun(&local, &mut agent, "/lost-between").await;
    let since = Instant::now();
    agent.say(no_middle.chunk(2, "[2]", true)).await;
    let (mut probes, mut cancelled) = (0, Vec::new());
    while probes < 4 || cancelled.len() < 2 {
        let text = agent.hear().await;
        match EdgeMessage::decode(&text).unwrap() {
            EdgeMessage::Probe(probe) => {
                assert!(since.elapsed() > limits::PROBE_AFTER / 2, "nobody asks while something comes");
                let id = probe.request_id.as_str();
                let answer = match id {
                    _ if id == silent.request_id => {
                        probes += 1;
                        silent.progress(1, false)
                    }
                    // It was sent, and so was its end.
                    _ if id == no_end.request_id => no_end.progress(0, true),
                    _ => no_middle.progress(3, false),
                };
                agent.say(answer).await;
            }
            EdgeMessage::Cancel(cancel) => {
                let call = [&no_end, &no_middle]
                    .into_iter()
                    .find(|call| call.request_id == cancel.request_id.as_str())
                    .expect("the silent one goes on");
                let token = call.token.as_str().into();
                agent.say(AgentMessage::Failed(Failed { token, seq: 3, code: ErrorCode::Cancelled })).await;
                cancelled.push((call.target.clone(), since.elapsed()));
            }
            other => panic!("{other:?}"),
        }
    }
    // Far fewer than ten messages came to each process: only time has had them deleted.
    let calls = local.counters().await;
    let deletions = ["sqs:DeleteMessage", "sqs:DeleteMessageBatch"];
    let deletions: u64 = deletions.iter().filter_map(|&call| calls.get(call)).sum();
    assert!(deletions >= 3, "each of the three has been here for longer than a message is hidden: {calls:?}");
    for (target, took) in cancelled {
        // What only its receive was lost of may still come, and does not have to be waited for any longer.
        let most = limits::PROBE_AFTER + limits::PIECE_MISSING + Duration::from_secs(10);
        assert!(took > limits::MAILBOX_VISIBILITY && took < most, "{target}: {took:?}");
    }
    tests::eventually("each is told with how long it was missed", async || {
        let metrics = local.metrics().await;
        metrics.get("OldestMessage").is_some_and(|series| {
            series.count == 2 && series.sum >= 2.0 * limits::PIECE_MISSING.as_secs_f64()
        })
    })
    .await;
    assert_eq!(last.chunk().await, None, "no last chunk");
    assert_eq!(gap.chunk().await, None, "no last chunk, and nothing from behind the gap");
    agent.say(silent.chunk(1, "[1]", true)).await;
    assert_eq!(quiet.chunked_body().await, b"[1]");
    for _ in 0..4 {
        let asked = tokio::spawn({
            let public = local.public;
            async move { Request::to("web", "GET", "/next").send(public).await }
        });
        let call = agent.request().await;
        agent.say(call.reply("clean", true)).await;
        assert_eq!(asked.await.unwrap().text(), "clean");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_lost_on_their_way_never_make_a_body_look_whole() {
    const CLIENTS: usize = 12;
    let body = Arc::new(noise(7, 4 * limits::CHUNK_BYTES));
    let sent = Arc::clone(&body);
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let sent = Arc::clone(&sent);
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            (conn.write(chunked(&sent)).await && conn.write("0\r\n\r\n").await).then_some(conn)
        }
    })
    .await;
    let local = Local::start_in(
        &[("TUNNEL_REPLY_TIMEOUT_SECS", "15")],
        &["--no-agent", "--chaos", "seed=2,lose=0.1"],
    );
    let _agent = local.agent("web", &upstream.address());
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let public = local.public;
        clients.spawn(async move { Request::to("web", "GET", "/").send(public).await });
    }
    let mut whole = 0;
    while let Some(answer) = clients.join_next().await {
        let answer = answer.unwrap();
        match answer.status {
            200 if answer.complete => {
                assert!(answer.body == *body, "a whole answer has every byte");
                whole += 1;
            }
            200 => assert!(body.starts_with(&answer.body)),
            status => {
                assert_eq!(status, 504, "{}", answer.text());
                assert_eq!(answer.field("x-tunnel-error").unwrap(), "upstream_timed_out");
            }
        }
    }
    assert!(whole > 0 && whole < CLIENTS, "{whole} were whole: some messages are lost, not all");
}

#[tokio::test]
async fn a_response_may_last_as_long_as_its_function_and_is_broken_off_then() {
    // The 5 minutes of responseDurationSecs are 20 seconds here; 3 seconds of them are kept for the end.
    const FASTER: u32 = 15;
    let ends = local::stack::stack().functions["ingress"].timeout / FASTER - Duration::from_secs(3);
    let (closed, mut saw_close) = mpsc::unbounded_channel();
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let closed = closed.clone();
        async move {
            if request.target() == "/" {
                return conn.answer("200 OK", "", b"next").await.then_some(conn);
            }
            let enough = tokio::time::sleep(ends - Duration::from_secs(2));
            let mut enough = std::pin::pin!(enough);
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            loop {
                tokio::select! {
                    () = &mut enough, if request.target() == "/just-in-time" => {
                        return conn.write(chunked(b"last")).await.then_some(())
                            .and(conn.write("0\r\n\r\n").await.then_some(conn));
                    }
                    () = conn.closed() => {
                        closed.send(Instant::now()).unwrap();
                        return None;
                    }
                    _ = tick.tick() => {}
                }
                if !conn.write(chunked(b"tick")).await {
                    closed.send(Instant::now()).unwrap();
                    return None;
                }
            }
        }
    })
    .await;
    let local = Local::start(&["--chaos", &format!("clock={FASTER}")]);
    let _agent = local.agent("web", &upstream.address());
    let mut over = Connection::open(local.public).await;
    let began = Instant::now();
    over.begin(&Request::to("web", "GET", "/too-long")).await;
    let in_time = tokio::spawn({
        let public = local.public;
        async move { Request::to("web", "GET", "/just-in-time").send(public).await }
    });
    assert_eq!(over.head().await.status, 200);
    while let Some(chunk) = over.chunk().await {
        assert_eq!(chunk, b"tick", "no end");
    }
    let (took, broken) = (began.elapsed(), Instant::now());
    assert!(took >= ends && took < ends + Duration::from_secs(3), "{took:?}");
    let closed = timeout(PATIENCE, saw_close.recv()).await.unwrap().unwrap();
    assert!(closed.saturating_duration_since(broken) < Duration::from_secs(1));
    let in_time = in_time.await.unwrap();
    assert!(in_time.complete && in_time.text().ends_with("last"), "{}", in_time.text());
    for _ in 0..3 {
        let answer = Request::to("web", "GET", "/").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "next"));
    }
}

#[tokio::test]
async fn an_upstream_may_answer_before_it_has_read_the_upload() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let upstream = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                assert!(stream.read(&mut head).await.unwrap() > 0);
                let answer = b"HTTP/1.1 413 Too Much\r\nConnection: close\r\nContent-Length: 4\r\n\r\nmuch";
                stream.write_all(answer).await.unwrap();
                // RFC 9112 §9.6: half of the connection is closed first, so that no reset overtakes the answer.
                stream.shutdown().await.unwrap();
                while stream.read(&mut head).await.is_ok_and(|count| count > 0) {}
            });
        }
    });
    let local = Local::start(&[]);
    let _agent = local.agent("web", &address);
    for _ in 0..3 {
        let answer = Request::to("web", "POST", "/").body(noise(1, 4 * MIB)).send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (413, "much", true));
        assert_eq!(answer.field("x-tunnel-error"), None, "it is the upstream's own");
    }
    upstream.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicated_and_reordered_messages_change_no_byte() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&["--chaos", "seed=1,duplicate=0.3,reorder=0.3"]);
    let _agent = local.agent("web", &upstream.address());
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..4u64 {
        let public = local.public;
        clients.spawn(async move {
            for round in 0..5 {
                let body = noise(client * 100 + round, MIB + round as usize);
                let target = format!("/{client}/{round}");
                let answer = Request::to("web", "POST", &target).body(body.clone()).send(public).await;
                assert_eq!(answer.status, 200, "{target}: {}", answer.text());
                assert!(answer.complete, "{target}");
                assert_eq!(answer.field("x-line").unwrap(), format!("POST {target} HTTP/1.1"));
                assert_eq!(Sha256::digest(&answer.body), Sha256::digest(&body), "{target}");
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    assert_eq!(upstream.recorded().len(), 20, "each reached the upstream once");
}

#[tokio::test]
async fn an_agent_that_dies_in_mid_body_never_makes_a_short_body_look_whole() {
    acceptance::an_agent_that_dies(Local::start(&[]).stack()).await;
}
