//! What the fronts of AWS do, imitated by `local`, and what the product gives in spite of it. What each front does is
//! in `local/src/public/fronts.rs` and docs/aws-fronts.md.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use local::public::fronts::TABLE;
use proto::limits;
use sha2::{Digest as _, Sha256};
use tests::{
    Local, acceptance,
    client::Answer,
    eventually, noise, peak_resident_bytes,
    stack::Scale,
    upstream::{Conn, Upstream},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    time::timeout,
};

/// Well under the time that a front would hold what does not end: 300 s.
const AT_ONCE: Duration = Duration::from_secs(30);

async fn upstream() -> Upstream {
    Upstream::start(|request, mut conn: Conn| async move {
        let status = match request.target() {
            "/204" => "204 No Content",
            "/304" => "304 Not Modified",
            "/302" => "302 Found",
            "/digest" => "200 OK",
            // As many fields as an upstream may send, and one more.
            "/fields" | "/more-fields" => {
                let most = limits::HEADER_FIELDS - usize::from(request.target() == "/fields");
                let head =
                    format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", "X: y\r\n".repeat(most));
                return conn.write(head).await.then_some(conn);
            }
            "/huge" => {
                // One byte more than a Function URL lets through; none of it is to be asked for.
                let head = "HTTP/1.1 200 OK\r\nContent-Length: 209715201\r\n\r\n";
                conn.write(head).await;
                conn.closed().await;
                return None;
            }
            _ => "200 OK",
        };
        let body: &[u8] = if request.target() == "/digest" { b"plain" } else { b"" };
        let asked = request.all("accept-encoding").join(",");
        let fields = format!("X-Asked: {asked}\r\nContent-Digest: sha-256=:of-the-body:\r\n");
        conn.answer(status, &fields, body).await.then_some(conn)
    })
    .await
}

/// HEAD, 204, 304, an empty 302 and an empty 200 end, what is too long is refused whole, and a body's length and
/// digest are true: through every front.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn through_every_front_answers_end_and_say_what_they_are() {
    for front in ["none", "cloudfront", "httpapi", "direct"] {
        let local = Local::start(&["--front", front]);
        let stack = local.stack();
        let upstream = upstream().await;
        let web = stack.tunnel("web");
        let _agent = web.agent(&upstream.address());
        let ask = async |method: &str, target: &str| -> Answer {
            let request = web.request(method, target).field("Accept-Encoding", "gzip, br");
            timeout(AT_ONCE, web.send(&request))
                .await
                .unwrap_or_else(|_| panic!("{front}: {method} {target} does not end"))
        };
        for (method, target, status) in [
            ("HEAD", "/", 200),
            ("GET", "/204", 204),
            ("OPTIONS", "/204", 204),
            ("GET", "/304", 304),
            ("GET", "/302", 302),
            ("GET", "/", 200),
        ] {
            let answer = ask(method, target).await;
            assert_eq!((answer.status, answer.complete), (status, true), "{front}: {method} {target}");
            assert!(answer.body.is_empty(), "{front}: {method} {target}");
        }
        let answer = ask("GET", "/digest").await;
        assert_eq!(answer.text(), "plain", "{front}");
        let asked = if front == "direct" { "gzip, br" } else { "identity" };
        assert_eq!(answer.field("x-asked").as_deref(), Some(asked), "{front}");
        assert_eq!(answer.field("content-digest").as_deref(), Some("sha-256=:of-the-body:"), "{front}");
        assert_eq!(answer.field("x-tunnel-length").as_deref(), Some("5"), "{front}");
        // An HTTP API buffers, so it knows the length by itself.
        let has_length = matches!(front, "httpapi" | "direct");
        assert_eq!(answer.field("content-length").is_some(), has_length, "{front}");
        acceptance::assert_problem(&ask("GET", "/huge").await, 502, "response_too_large");
    }
}

const HEADS: &str = "method, target, fields, cookies and status are carried";
const FLUSHES: &str = "each flush arrives before the next is made";
const DIES: &str = "an agent that dies leaves no body that looks whole";
const LATE: &str = "a slow upstream is 504 and its call is cancelled";
const PREFIX: &str = "a path's prefix is taken off and put back";

/// What each front cannot do: the scenario that meets it, and the behaviour's name in docs/aws-fronts.md. Every other
/// scenario holds behind every front.
const MET: &[(&str, &str, &str)] = &[
    ("none", DIES, "silent-breaks"),
    ("cloudfront", HEADS, "edge-methods"),
    ("cloudfront", DIES, "silent-breaks"),
    ("httpapi", HEADS, "decoded-paths"),
    ("httpapi", FLUSHES, "buffered-answers"),
    ("httpapi", DIES, "buffered-answers"),
    ("relay", HEADS, "edge-methods"),
];

/// The whole acceptance run behind one front: each scenario holds, or meets what the front is known to do, by its name.
/// Tunnels are paths where there is no domain, and hosts where there is one.
async fn accepted(front: &str) {
    // A fast clock for the rate of bodies alone would shorten the life of connections too: the download is short instead.
    let scale = Scale { clients: 8, rounds: 4, download_mib: 7 };
    let start = |reply_secs: u64| {
        let websockets = if front == "relay" { "relay" } else { "none" };
        let arguments = ["--no-agent", "--front", front, "--websockets", websockets];
        let local = Local::start_in(&[("TUNNEL_REPLY_TIMEOUT_SECS", &reply_secs.to_string())], &arguments);
        let stack = if front == "none" { local.stack_by_path() } else { local.stack().clone() };
        let stack = stack.with_scale(scale).with_reply_timeout(Duration::from_secs(reply_secs));
        (local, stack)
    };
    let (_local, stack) = start(27);
    // What waits until it is too late waits for less, where nothing else has to be there in time.
    let (_impatient, impatient) = start(5);
    let mut expected: BTreeMap<_, _> = MET
        .iter()
        .filter(|met| met.0 == front)
        .map(|&(_, scenario, behaviour)| (scenario, behaviour))
        .collect();
    for scenario in acceptance::ALL {
        if scenario.name == PREFIX && !stack.is_by_path() {
            continue;
        }
        assert_eq!((scenario.inapplicable)(&stack), None, "{front}: {}", scenario.name);
        let place = if scenario.name == LATE { &impatient } else { &stack };
        let behaviour = (scenario.run)(place).await;
        assert_eq!(behaviour, expected.remove(scenario.name), "{front}: {}", scenario.name);
        println!("{front}: {}: {}", scenario.name, behaviour.unwrap_or("holds"));
    }
    assert!(expected.is_empty(), "{front}: no scenario is called {expected:?}");
}

/// The list knows fronts and behaviours alone that there are, and each front has its run below.
#[test]
fn what_a_front_cannot_do_is_known_by_its_name() {
    for (front, _, behaviour) in MET {
        let line = TABLE.iter().find(|line| line.name == *behaviour).expect("a behaviour of the table");
        assert!(line.fronts.iter().any(|kind| kind.name() == *front), "{front} does not do {behaviour}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_acceptance_run_behind_a_function_url() {
    accepted("none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_acceptance_run_behind_cloudfront() {
    accepted("cloudfront").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_acceptance_run_behind_an_http_api() {
    accepted("httpapi").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_acceptance_run_behind_a_relay() {
    accepted("relay").await;
}

/// A relay takes ordinary requests too, and a length stays one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_relay_keeps_the_length_of_an_answer() {
    let local = Local::start(&["--front", "relay", "--websockets", "relay"]);
    let upstream = upstream().await;
    let _agent = local.agent("web", &upstream.address());
    let answer = local.stack().tunnel("web").get("/digest").await;
    assert_eq!(answer.field("content-length").as_deref(), Some("5"));
    assert_eq!(answer.text(), "plain");
    let answer = local.stack().tunnel("web").get("/fields").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    assert_eq!(answer.fields.iter().filter(|(name, _)| name == "x").count(), limits::HEADER_FIELDS - 1);
    acceptance::assert_problem(
        &local.stack().tunnel("web").get("/more-fields").await,
        502,
        "upstream_invalid",
    );

    // A client that leaves before there is an answer is noticed at once: its upstream need not go on.
    let (waits, mut waiting) = mpsc::unbounded_channel();
    let silent = Upstream::start(move |_, mut conn: Conn| {
        let waits = waits.clone();
        async move {
            let _ = waits.send(());
            conn.closed().await;
            let _ = waits.send(());
            None
        }
    })
    .await;
    let web = local.stack().tunnel("silent");
    let _agent = web.agent(&silent.address());
    let mut client = web.open().await;
    client.begin(&web.request("GET", "/")).await;
    timeout(AT_ONCE, waiting.recv()).await.expect("the request arrives").unwrap();
    drop(client);
    // Far below the reply time-out of a minute.
    timeout(AT_ONCE, waiting.recv()).await.expect("its upstream is let go").unwrap();
}

/// What an upstream has to say about an upload: its method, how its length was said, how long it was, and its digest.
fn seen(method: &str, framing: &str, bytes: &[u8]) -> String {
    format!("{method} {framing} {} {:x?}", bytes.len(), Sha256::digest(bytes))
}

/// An upstream that reads uploads as they come. It begins to with a permit where `/held` is asked for, sends each piece
/// back at once where `/echo` is, refuses all of it unread where `/refused` is, and says which ones broke off.
async fn uploads(permits: Arc<Semaphore>, broken: mpsc::UnboundedSender<u64>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (permits, broken) = (Arc::clone(&permits), broken.clone());
            let service = service_fn(move |request: http::Request<Incoming>| {
                let (permits, broken) = (Arc::clone(&permits), broken.clone());
                async move {
                    let (head, mut body) = request.into_parts();
                    let whole =
                        |text: String| Ok::<_, Infallible>(http::Response::new(Full::from(text).boxed()));
                    match head.uri.path() {
                        "/echo" => {
                            let body = body.map_err(|_| unreachable!("the echo's client stays")).boxed();
                            return Ok(http::Response::new(body));
                        }
                        "/refused" => {
                            let mut answer = http::Response::new(Full::from("no").boxed());
                            *answer.status_mut() = http::StatusCode::FORBIDDEN;
                            return Ok(answer);
                        }
                        "/held" => permits.acquire().await.unwrap().forget(),
                        _ => {}
                    }
                    let framing = match head.headers.get("content-length") {
                        Some(length) => length.to_str().unwrap().to_owned(),
                        None => head.headers["transfer-encoding"].to_str().unwrap().to_owned(),
                    };
                    let (mut digest, mut length) = (Sha256::new(), 0);
                    while let Some(frame) = body.frame().await {
                        let Ok(bytes) = frame.map(|frame| frame.into_data().unwrap()) else {
                            let _ = broken.send(length);
                            return whole("broken".to_owned());
                        };
                        digest.update(&bytes);
                        length += bytes.len() as u64;
                    }
                    whole(format!("{} {framing} {length} {:x?}", head.method, digest.finalize()))
                }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    address
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// Uploads of any length flow through a relay, with as much memory as one window takes, and any method goes with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_relay_streams_uploads_of_any_length_and_method() {
    // More by hand: UPLOAD_MIB=100.
    let mib: usize = std::env::var("UPLOAD_MIB").map_or(24, |text| text.parse().unwrap());
    // Without the seven methods that CloudFront has.
    let local = Local::start(&["--front", "relay", "--websockets", "relay", "--kind", "edge-methods"]);
    let (permits, (broken, mut broke)) = (Arc::new(Semaphore::new(0)), mpsc::unbounded_channel());
    let upstream = uploads(Arc::clone(&permits), broken).await;
    let web = local.stack().tunnel("web");
    let agent = web.agent(&upstream);
    let relay = local.relay();

    // What still goes in one message, one byte more; what Lambda takes, one byte more; methods of all kinds.
    let long = limits::REQUEST_BODY_BYTES;
    let lengths =
        [(0, "POST"), (limits::CHUNK_BYTES, "PROPFIND"), (limits::CHUNK_BYTES + 1, "QUERY!#$%&'*+-.^_`|~1")];
    for (length, method) in lengths.into_iter().chain([(long, "PUT"), (long + 1, "REPORT")]) {
        let body = noise(3, length);
        let answer = web.send(&web.request(method, "/").body(body.clone())).await;
        assert_eq!(answer.text(), seen(method, &length.to_string(), &body), "{method} {length}");
    }
    acceptance::assert_problem(&web.send(&web.request("GE(T", "/")).await, 400, "bad_request");

    // Nobody says how long it is, and its upstream does not take it yet: what is under way stays bounded.
    let body = noise(4, mib << 20);
    let resident = || [relay, agent.process().id()].map(|pid| peak_resident_bytes(pid).unwrap());
    let before = resident();
    let mut client = web.open().await;
    client.begin(&web.request("POST", "/held").field("Transfer-Encoding", "chunked")).await;
    let mut sent = 0;
    // Until nothing more is taken: what the sockets on the way hold is up to the machine, and may be tens of MiB.
    let most = (mib << 20) + (128 << 20);
    for piece in body.chunks(64 * 1024).cycle().take(most / (64 * 1024)) {
        if timeout(Duration::from_secs(3), client.write(&chunk(piece))).await.is_err() {
            break;
        }
        sent += 1;
    }
    assert!(sent * 64 * 1024 < most, "all of it was taken");
    drop(client);
    permits.add_permits(1);
    // It left in the middle: for its upstream that is no end.
    let taken = timeout(AT_ONCE, broke.recv()).await.expect("the upload breaks off").unwrap();
    assert!((taken as usize) < most);

    permits.add_permits(1);
    let mut client = web.open().await;
    client.begin(&web.request("POST", "/held").field("Transfer-Encoding", "chunked")).await;
    for piece in body.chunks(64 * 1024) {
        client.write(&chunk(piece)).await;
    }
    client.write(b"0\r\n\r\n").await;
    assert_eq!(client.answer("POST").await.text(), seen("POST", "chunked", &body));
    let grown = [0, 1].map(|at| resident()[at].saturating_sub(before[at]));
    println!("{mib} MiB up: {grown:?} bytes more in relay and agentd at their peak");
    // A window of 3 MiB as bytes, as text, and on its way through the sockets.
    assert!(grown.iter().all(|&bytes| bytes < 20 << 20), "{grown:?}");

    // Both directions at once, and an answer before the end of its request.
    let mut client = web.open().await;
    client.begin(&web.request("POST", "/echo").field("Transfer-Encoding", "chunked")).await;
    client.write(&chunk(b"one")).await;
    assert_eq!(timeout(AT_ONCE, client.head()).await.unwrap().status, 200);
    assert_eq!(timeout(AT_ONCE, client.chunk()).await.unwrap().unwrap(), b"one");
    client.write(&chunk(b"two")).await;
    assert_eq!(timeout(AT_ONCE, client.chunk()).await.unwrap().unwrap(), b"two");
    client.write(b"0\r\n\r\n").await;
    assert_eq!(timeout(AT_ONCE, client.chunk()).await.unwrap(), Some(Vec::new()));
    let mut client = web.open().await;
    client.begin(&web.request("POST", "/refused").field("Content-Length", "99999999")).await;
    client.write(&noise(5, 200_000)).await;
    let answer = timeout(AT_ONCE, client.answer("POST")).await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (403, "no"));

    // Who waits to be asked is asked when an agent wants the body, and not for one that nobody takes.
    let (mut past, secret) = local.past_the_front().await;
    let expects = |host: &str| {
        format!(
            "POST / HTTP/1.1\r\nHost: {host}\r\nX-Tunnel-Front: {secret}\r\nX-Tunnel-Host: {host}\r\n\
             Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    let host = |name: &str| format!("{name}.localhost:{}", local.public.port());
    past.write(expects(&host(web.name())).as_bytes()).await;
    let asked = timeout(AT_ONCE, past.head_of_any_status()).await.unwrap();
    assert_eq!((asked.status, asked.fields.len()), (100, 0));
    past.write(b"hello").await;
    assert_eq!(past.answer("POST").await.text(), seen("POST", "5", b"hello"));
    past.write(expects(&host("nobody")).as_bytes()).await;
    assert_eq!(timeout(AT_ONCE, past.head_of_any_status()).await.unwrap().status, 404);
}

/// One distribution serves all tunnels: an error of one must not answer for another.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_offline_tunnel_does_not_answer_for_another() {
    let local = Local::start(&["--front", "cloudfront"]);
    let stack = local.stack();
    let upstream = upstream().await;
    let (gone, here) = (stack.tunnel("gone"), stack.tunnel("here"));
    drop(gone.agent(&upstream.address()));
    // Its rows go a moment after it.
    eventually("the tunnel is offline", async || gone.get("/").await.status == 503).await;
    let _agent = here.agent(&upstream.address());
    for _ in 0..3 {
        acceptance::assert_problem(&gone.get("/").await, 503, "tunnel_offline");
        assert_eq!(here.get("/").await.status, 200);
    }
}

/// An account with ten concurrent executions, as a new one has: requests that wait cannot starve the answers they wait
/// for, and who finds no place is told so by the tunnel.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_executions_are_enough_for_six_requests_and_their_answers() {
    let release = Arc::new(Semaphore::new(0));
    let released = Arc::clone(&release);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let released = Arc::clone(&released);
        async move {
            if request.target().starts_with("/wait") {
                released.acquire().await.unwrap().forget();
            }
            let body = request.target().as_bytes().to_vec();
            conn.answer("200 OK", "", &body).await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&["--front", "none", "--executions", "10"]);
    let stack = local.stack();
    let web = stack.tunnel("web");
    let _agent = web.agent(&upstream.address());
    let mut waiting = Vec::new();
    for number in 0..6 {
        let mut client = web.open().await;
        client.begin(&web.request("GET", &format!("/wait/{number}"))).await;
        eventually("it is at the upstream", async || upstream.recorded().len() == number + 1).await;
        waiting.push(client);
    }
    // One that is told so takes a place only for as long as that.
    for _ in 0..3 {
        let refused = web.get("/").await;
        acceptance::assert_problem(&refused, 429, "too_many_requests");
        assert!(refused.field("retry-after").is_some());
    }
    // Another agent finds its place, and so do the answers.
    let other = stack.tunnel("other");
    let _second = other.agent(&upstream.address());
    release.add_permits(6);
    for (number, mut client) in waiting.into_iter().enumerate() {
        let answer =
            timeout(AT_ONCE, client.answer("GET")).await.expect("an answer while all places are taken");
        assert_eq!((answer.status, answer.text()), (200, format!("/wait/{number}")));
    }
    eventually("the places are free", async || other.get("/").await.status == 200).await;
    // All at once: some find no place, whoever says so, and nobody waits for what was lost.
    let crowd = (0..30).map(|_| timeout(AT_ONCE, other.get("/")));
    let statuses: Vec<u16> = futures_util::future::join_all(crowd)
        .await
        .into_iter()
        .map(|answer| answer.unwrap().status)
        .collect();
    assert!(statuses.iter().all(|status| matches!(status, 200 | 429)), "{statuses:?}");
    assert!(statuses.contains(&200) && statuses.contains(&429), "{statuses:?}");
}

/// Behind a Function URL nobody hears that a client has left: its stream goes on to its end, or until it has paused for as
/// long as a stream may.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_leaves_is_not_noticed_until_the_stream_pauses() {
    let (ended, mut ends) = mpsc::unbounded_channel();
    let left = Arc::new(Semaphore::new(0));
    let gone = Arc::clone(&left);
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let (ended, gone) = (ended.clone(), Arc::clone(&gone));
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            assert!(conn.write(acceptance::chunked(b"first")).await);
            gone.acquire().await.unwrap().forget();
            for _ in 0..20 {
                assert!(conn.write(acceptance::chunked(b"nobody hears it")).await, "the client was missed");
            }
            // And now it says nothing more.
            conn.closed().await;
            let _ = ended.send(());
            None
        }
    })
    .await;
    let local =
        Local::start_in(&[("TUNNEL_STREAM_IDLE_SECS", "1")], &["--no-agent", "--front", "cloudfront"]);
    let stack = local.stack();
    let web = stack.tunnel("web");
    let _agent = web.agent(&upstream.address());
    let mut client = web.open().await;
    client.begin(&web.request("GET", "/")).await;
    let head = client.head().await;
    assert_eq!(client.body(&head).take(5).await, b"first");
    drop(client);
    local.process().wait_for_line(|line| {
        line.contains("a public client left, or closed its sending half, and its request goes on")
    });
    left.add_permits(1);
    timeout(AT_ONCE, ends.recv()).await.expect("streamIdleSecs ends it").unwrap();
}

/// An HTTP API passes on what is whole and not longer than 10 MB; and a body without a length that is
/// kept until it is whole has one, or is an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_kept_until_it_is_whole() {
    let upstream = Upstream::start(|request, mut conn: Conn| async move {
        let chunks = match request.target() {
            "/at" => 160,
            "/past" => 161,
            "/half" | "/short" => 1,
            other => panic!("{other}"),
        };
        assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
        for _ in 0..chunks {
            if !conn.write(acceptance::chunked(&[b'x'; 65_536])).await {
                return None;
            }
        }
        if request.target() == "/half" {
            return None;
        }
        conn.write("0\r\n\r\n").await.then_some(conn)
    })
    .await;
    // Its 30 s, and what becomes of a late answer, are tried in `local/src/public`, on a fast clock.
    let local = Local::start(&["--front", "httpapi", "--kind", "response-rate"]);
    let web = local.stack().tunnel("web");
    let _agent = web.agent(&upstream.address());
    let at = web.get("/at").await;
    assert_eq!((at.status, at.body.len()), (200, 10 * 1024 * 1024));
    assert_eq!(at.field("content-length").as_deref(), Some("10485760"));
    assert_eq!(web.get("/past").await.status, 500);
    drop(local);

    let hold = [("TUNNEL_UNKNOWN_LENGTH", "hold")];
    let local = Local::start_in(&hold, &["--no-agent", "--front", "cloudfront"]);
    let web = local.stack().tunnel("web");
    let _agent = web.agent(&upstream.address());
    let short = web.get("/short").await;
    assert_eq!((short.status, short.body.len()), (200, 65_536));
    assert_eq!(short.field("x-tunnel-length").as_deref(), Some("65536"));
    acceptance::assert_problem(&web.get("/half").await, 502, "upstream_reset");
}

/// What a front refuses by itself never reaches the upstream.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cloudfront_refuses_what_it_does_not_take() {
    let local = Local::start(&["--front", "cloudfront"]);
    let stack = local.stack();
    let upstream = upstream().await;
    let web = stack.tunnel("web");
    let _agent = web.agent(&upstream.address());
    let at = "x".repeat(8192 - format!("https://web.localhost:{}/", local.public.port()).len());
    let cases = [
        (web.request("PROPFIND", "/"), 403),
        (web.request("GET", "/").body(b"body".to_vec()), 403),
        (web.request("GET", &format!("/{at}")), 200),
        (web.request("GET", &format!("/{at}x")), 413),
        (web.request("GET", "/").field("X-Long", &"x".repeat(20_480)), 413),
    ];
    for (request, status) in cases {
        assert_eq!(web.send(&request).await.status, status);
    }
    assert_eq!(upstream.recorded().len(), 1);
    // It says so, with the front that does not and the name that leaves it out: once, however often it happens.
    for name in ["edge-methods", "edge-heads"] {
        let is_it = |line: &str| {
            line.contains("as behind the front cloudfront") && line.contains(&format!("--kind {name} "))
        };
        local.process().wait_for_line(is_it);
        assert_eq!(local.process().printed().lines().filter(|line| is_it(line)).count(), 1, "{name}");
    }
}
