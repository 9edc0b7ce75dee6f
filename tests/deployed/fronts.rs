//! What only a live account can say about its front: each point asks for one thing that `local` imitates on evidence, by
//! the name that docs/aws-fronts.md has for it, and leaves a sentence that settles it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future, future::LocalBoxFuture};
use rustix::process::Signal;
use tests::{
    acceptance::chunked,
    client::Answer,
    eventually,
    stack::{Front, Stack, Tunnel},
    upstream::{Conn, Upstream},
};
use tokio::{
    sync::{Notify, Semaphore},
    time::{sleep, timeout},
};

use crate::points::{Found, client_leaves};

/// What a point is called, whether it takes minutes, and how it is asked.
pub(crate) struct Point {
    pub(crate) name: &'static str,
    pub(crate) is_long: bool,
    pub(crate) ask: for<'s> fn(&'s Stack) -> LocalBoxFuture<'s, Found>,
}

macro_rules! points {
    ($( $name:ident $is_long:literal, )+) => {
        /// All of them, in the order in which a first hour asks them.
        pub(crate) const POINTS: &[Point] = &[$( Point {
            name: stringify!($name),
            is_long: $is_long,
            ask: |stack| $name(stack).boxed_local(),
        }, )+];
    };
}

points! {
    empty_answers false,
    compressed_bodies false,
    content_length false,
    large_download true,
    agent_killed false,
    small_pieces false,
    client_leaves true,
    cached_errors false,
    retried_requests true,
    silent_stream true,
    ranges false,
    few_executions false,
    after_a_pause true,
    challenges false,
    targets false,
    methods false,
    large_heads false,
    buffered false,
    new_secret false,
}

/// Why a point that takes minutes was not asked.
pub(crate) const LONG: &str = "DEPLOYED_LONG=true tries it; that takes minutes";

/// Within what time something has to end that ends at once.
const AT_ONCE: Duration = Duration::from_secs(2);

/// The longest that anything here is waited for.
const PATIENCE: Duration = Duration::from_secs(11 * 60);

/// Longer than a front waits for an origin.
const TOO_LONG: Duration = Duration::from_secs(70);

/// "hello", as gzip.
const GZIP: &[u8] =
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xcb\x48\xcd\xc9\xc9\x07\x00\x86\xa6\x10\x36\x05\x00\x00\x00";

/// "hello", as br: a stored block.
const BROTLI: &[u8] = b"\x0b\x02\x80hello\x03";

/// An upstream that answers with status, fields and body by the target.
async fn answers(by_target: fn(&str) -> (&'static str, &'static str, &'static [u8])) -> Upstream {
    Upstream::start(move |request, mut conn: Conn| async move {
        let (status, fields, body) = by_target(request.target());
        conn.answer(status, fields, body).await.then_some(conn)
    })
    .await
}

async fn ask(tunnel: &Tunnel<'_>, method: &str, target: &str) -> Result<Answer, String> {
    let answer = timeout(PATIENCE, tunnel.send(&tunnel.request(method, target))).await;
    answer.map_err(|_| format!("{method} {target} does not end"))
}

/// F1: whether answers without a body end.
async fn empty_answers(stack: &Stack) -> Found {
    let upstream = answers(|target| match target {
        "/204" => ("204 No Content", "", b""),
        "/304" => ("304 Not Modified", "ETag: \"x\"\r\n", b""),
        "/302" => ("302 Found", "Location: /\r\n", b""),
        _ => ("200 OK", "", b""),
    })
    .await;
    let web = stack.tunnel("empty");
    let _agent = web.agent(&upstream.address());
    // The process is there.
    ask(&web, "GET", "/").await?;
    let mut late = Vec::new();
    for (method, target) in
        [("HEAD", "/"), ("GET", "/204"), ("GET", "/304"), ("GET", "/302"), ("OPTIONS", "/204"), ("GET", "/")]
    {
        let begun = Instant::now();
        ask(&web, method, target).await?;
        if begun.elapsed() > AT_ONCE {
            late.push(format!("{method} {target} after {:.0} s", begun.elapsed().as_secs_f64()));
        }
    }
    Ok(if late.is_empty() {
        "each ends at once".into()
    } else {
        format!("they end late: {}", late.join(", "))
    })
}

/// F2: what becomes of packed bodies.
async fn compressed_bodies(stack: &Stack) -> Found {
    let upstream = answers(|target| match target {
        "/gzip" => ("200 OK", "Content-Encoding: gzip\r\n", GZIP),
        _ => ("200 OK", "Content-Encoding: br\r\n", BROTLI),
    })
    .await;
    let web = stack.tunnel("packed");
    let _agent = web.agent(&upstream.address());
    let mut found = Vec::new();
    for (target, packed) in [("/gzip", GZIP), ("/br", BROTLI)] {
        let answer = ask(&web, "GET", target).await?;
        let field = answer.field("content-encoding");
        found.push(match (answer.body == packed, answer.body == b"hello", field) {
            (true, _, Some(_)) => format!("{target} passes as it is"),
            (true, _, None) => format!("{target} passes packed and its field is gone"),
            (_, true, None) => format!("{target} is unpacked and its field is gone"),
            (_, true, Some(_)) => format!("{target} is unpacked and still says that it is not"),
            _ => format!("{target} is {} with {} bytes", answer.status, answer.body.len()),
        });
    }
    Ok(found.join("; "))
}

/// F5: what becomes of `Content-Length`.
async fn content_length(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"12345")).await;
    let web = stack.tunnel("length");
    let _agent = web.agent(&upstream.address());
    let answer = ask(&web, "GET", "/").await?;
    let field = |name: &str| answer.field(name).unwrap_or_else(|| "absent".into());
    let names = ["content-length", "x-amzn-remapped-content-length", "x-tunnel-length"];
    Ok(names.map(|name| format!("{name} is {}", field(name))).join(", "))
}

/// F4: where 250 MB end, and how fast.
async fn large_download(stack: &Stack) -> Found {
    const MIB: usize = 1024 * 1024;
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
        for _ in 0..250 {
            if !conn.write(chunked(&vec![b'x'; MIB])).await {
                return None;
            }
        }
        conn.write("0\r\n\r\n").await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("large");
    let _agent = web.agent(&upstream.address());
    let begun = Instant::now();
    let answer = ask(&web, "GET", "/").await?;
    let (came, took) = (answer.body.len(), begun.elapsed().as_secs_f64());
    Ok(format!(
        "{} with {came} bytes of {} after {took:.0} s ({:.1} MB/s), {}",
        answer.status,
        250 * MIB,
        f64::from(u32::try_from(came).unwrap_or(u32::MAX)) / took / 1e6,
        if answer.complete { "as if it were whole" } else { "visibly broken off" }
    ))
}

/// F6: whether a break shows.
async fn agent_killed(stack: &Stack) -> Found {
    let half = Arc::new(Notify::new());
    let written = Arc::clone(&half);
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let written = Arc::clone(&written);
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            assert!(conn.write(chunked(b"half")).await);
            written.notify_one();
            conn.closed().await;
            None
        }
    })
    .await;
    let web = stack.tunnel("killed");
    let mut agent = web.agent(&upstream.address());
    let mut connection = web.open().await;
    connection.begin(&web.request("GET", "/")).await;
    half.notified().await;
    if stack.front().streams() {
        let head = connection.head().await;
        let mut body = connection.body(&head);
        body.take(4).await;
        agent.process().signal(Signal::KILL);
        agent.process_mut().wait();
        let (_, looks_whole) = body.rest().await;
        return Ok(if looks_whole { "it looks whole" } else { "it is visibly broken off" }.into());
    }
    agent.process().signal(Signal::KILL);
    agent.process_mut().wait();
    let answer = connection.answer("GET").await;
    Ok(format!("{} with {} bytes", answer.status, answer.body.len()))
}

/// F18: whether a small piece waits for the next one.
async fn small_pieces(stack: &Stack) -> Found {
    if !stack.front().streams() {
        return Err("this front passes a response on when it is whole".into());
    }
    let go = Arc::new(Semaphore::new(0));
    let allowed = Arc::clone(&go);
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let allowed = Arc::clone(&allowed);
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            for _ in 0..3 {
                allowed.acquire().await.ok()?.forget();
                assert!(conn.write(chunked(b"data: 20 bytes long\n")).await);
            }
            allowed.acquire().await.ok()?.forget();
            conn.write("0\r\n\r\n").await.then_some(conn)
        }
    })
    .await;
    let web = stack.tunnel("small");
    let _agent = web.agent(&upstream.address());
    let mut connection = web.open().await;
    connection.begin(&web.request("GET", "/")).await;
    go.add_permits(1);
    let head = connection.head().await;
    let mut body = connection.body(&head);
    let mut waits = Vec::new();
    for number in 0..3 {
        if number > 0 {
            go.add_permits(1);
        }
        let begun = Instant::now();
        if timeout(Duration::from_secs(10), body.take(20)).await.is_err() {
            go.add_permits(3);
            return Ok(format!("the piece {number} waits for the next one"));
        }
        waits.push(format!("{:.0} ms", begun.elapsed().as_secs_f64() * 1e3));
    }
    go.add_permits(1);
    Ok(format!("each comes by itself, after {}", waits.join(", ")))
}

/// F7: whether the error of one tunnel answers for another.
async fn cached_errors(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"here")).await;
    let (gone, here) = (stack.tunnel("gone"), stack.tunnel("here"));
    drop(gone.agent(&upstream.address()));
    eventually("the tunnel is offline", async || gone.get("/cached").await.status == 503).await;
    let _agent = here.agent(&upstream.address());
    let answer = here.get("/cached").await;
    Ok(match answer.status {
        200 => "it does not".into(),
        503 => "the 503 of the tunnel that is offline answers for the other one".into(),
        status => format!("the other tunnel answers {status}"),
    })
}

/// F8: how often the upstream is asked by one GET that takes long.
async fn retried_requests(stack: &Stack) -> Found {
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        conn.closed().await;
        None
    })
    .await;
    let web = stack.tunnel("retried");
    let _agent = web.agent(&upstream.address());
    let begun = Instant::now();
    let answer = ask(&web, "GET", "/").await?;
    let (took, hits) = (begun.elapsed().as_secs(), upstream.recorded().len());
    Ok(format!("{} after {took} s, and the upstream was asked {hits} times", answer.status))
}

/// Whether a stream that says nothing for 70 s is cut.
async fn silent_stream(stack: &Stack) -> Found {
    if !stack.front().streams() {
        return Err("this front passes a response on when it is whole".into());
    }
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
        assert!(conn.write(chunked(b"begun")).await);
        sleep(TOO_LONG).await;
        (conn.write(chunked(b"ended")).await && conn.write("0\r\n\r\n").await).then_some(conn)
    })
    .await;
    let web = stack.tunnel("silent");
    let _agent = web.agent(&upstream.address());
    let begun = Instant::now();
    let answer = ask(&web, "GET", "/").await?;
    let took = begun.elapsed().as_secs();
    Ok(if answer.body == b"begunended" {
        format!("a pause of {} s passes", TOO_LONG.as_secs())
    } else {
        format!(
            "it is cut after {took} s, {}",
            if answer.complete { "as if it were whole" } else { "visibly" }
        )
    })
}

/// F10: whether a range is answered as one.
async fn ranges(stack: &Stack) -> Found {
    let upstream = Upstream::start(|request, mut conn: Conn| async move {
        let has_range = !request.all("range").is_empty();
        let (status, fields): (_, &str) = if has_range {
            ("206 Partial Content", "Content-Range: bytes 0-3/10\r\nAccept-Ranges: bytes\r\n")
        } else {
            ("200 OK", "Accept-Ranges: bytes\r\n")
        };
        let body: &[u8] = if has_range { b"0123" } else { b"0123456789" };
        conn.answer(status, fields, body).await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("ranges");
    let _agent = web.agent(&upstream.address());
    let answer = web.send(&web.request("GET", "/").field("Range", "bytes=0-3")).await;
    let range = answer.field("content-range").unwrap_or_else(|| "no content-range".into());
    Ok(format!("{} with {} bytes, {range}", answer.status, answer.body.len()))
}

/// F9: what twelve requests at once find that each take five seconds.
async fn few_executions(stack: &Stack) -> Found {
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        sleep(Duration::from_secs(5)).await;
        conn.answer("200 OK", "", b"slow").await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("executions");
    let _agent = web.agent(&upstream.address());
    let answered = future::join_all((0..12).map(|_| ask(&web, "GET", "/"))).await;
    let mut found = Vec::new();
    for answer in answered {
        let answer = answer?;
        let who = answer.field("x-tunnel-error");
        let who = who.unwrap_or_else(|| if answer.status == 200 { "ok" } else { "not ours" }.into());
        found.push(format!("{} {who}", answer.status));
    }
    found.sort();
    Ok(format!("12 at once: {}", found.join(", ")))
}

/// F17: the first request after ten minutes of silence.
async fn after_a_pause(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"awake")).await;
    let web = stack.tunnel("pause");
    let _agent = web.agent(&upstream.address());
    ask(&web, "GET", "/").await?;
    sleep(Duration::from_secs(600)).await;
    let begun = Instant::now();
    let answer = ask(&web, "GET", "/").await?;
    Ok(format!("{} after {:.2} s", answer.status, begun.elapsed().as_secs_f64()))
}

/// F15: whether a challenge arrives under its name; that the front `httpapi` could be deployed goes with it.
async fn challenges(stack: &Stack) -> Found {
    let upstream = answers(|_| ("401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n", b"")).await;
    let web = stack.tunnel("challenge");
    let _agent = web.agent(&upstream.address());
    let answer = ask(&web, "GET", "/").await?;
    let names = answer.fields.iter().map(|(name, _)| name.to_lowercase());
    let names: Vec<_> = names.filter(|name| name.contains("authenticate")).collect();
    Ok(format!("it arrives as {}", if names.is_empty() { "nothing".into() } else { names.join(" and ") }))
}

/// What becomes of a target that HTTP leaves alone.
async fn targets(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"")).await;
    let web = stack.tunnel("targets");
    let _agent = web.agent(&upstream.address());
    ask(&web, "GET", "//a%2Fb%3Fc").await?;
    let recorded = upstream.recorded();
    let line = recorded.last().map(|request| request.target().to_owned());
    Ok(format!("//a%2Fb%3Fc arrives as {}", line.as_deref().unwrap_or("nothing")))
}

/// Which requests are not let through.
async fn methods(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"")).await;
    let web = stack.tunnel("methods");
    let _agent = web.agent(&upstream.address());
    let mut found = Vec::new();
    for method in ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "POST", "DELETE", "PROPFIND", "QUERY"] {
        found.push(format!("{method} {}", ask(&web, method, "/").await?.status));
    }
    let with_body = web.send(&web.request("GET", "/").body(b"body".to_vec())).await;
    found.push(format!("GET with a body {}", with_body.status));
    Ok(found.join(", "))
}

/// Which heads are too long.
async fn large_heads(stack: &Stack) -> Found {
    let upstream = answers(|_| ("200 OK", "", b"")).await;
    let web = stack.tunnel("heads");
    let _agent = web.agent(&upstream.address());
    let mut found = Vec::new();
    for kib in [4, 8, 12, 24] {
        let field = "x".repeat(kib * 1024);
        found.push(format!(
            "{kib} KiB {}",
            web.send(&web.request("GET", "/").field("X-Long", &field)).await.status
        ));
    }
    let target = format!("/{}", "x".repeat(8192));
    found.push(format!("a URL of 8 KiB {}", ask(&web, "GET", &target).await?.status));
    Ok(found.join(", "))
}

/// Whether a body goes on while it is made.
async fn buffered(stack: &Stack) -> Found {
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
        assert!(conn.write(chunked(&[b'x'; 4096])).await);
        sleep(Duration::from_secs(3)).await;
        conn.write("0\r\n\r\n").await.then_some(conn)
    })
    .await;
    let web = stack.tunnel("buffered");
    let _agent = web.agent(&upstream.address());
    ask(&web, "GET", "/").await?;
    let mut connection = web.open().await;
    connection.begin(&web.request("GET", "/")).await;
    let begun = Instant::now();
    let head = connection.head_of_any_status().await;
    let first = begun.elapsed();
    connection.body(&head).rest().await;
    let whole = first > Duration::from_millis(2500);
    Ok(if whole { "it is kept until it is whole" } else { "it goes on as it comes" }.into())
}

/// F11: a new secret, which somebody has to make.
fn new_secret(stack: &Stack) -> future::Ready<Found> {
    if stack.front() == Front::None {
        return future::ready(Err("this front has no secret".into()));
    }
    future::ready(Err("by hand: put a new value as docs/deploy.md has it, deploy with frontGeneration raised by one, and run `fronts` \
         meanwhile: no 403 may come"
        .into()))
}
