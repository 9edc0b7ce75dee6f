//! HTTP as it was sent: what the upstream and the public client see of each other, to the byte.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tests::{
    Local,
    client::{Answer, Connection, Request},
    noise,
    tls::{acceptor, fixture},
    upstream::{Conn, Recorded, Upstream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

fn assert_error(answer: &Answer, status: u16, code: &str, what: &str) {
    let seen = (answer.status, answer.field("x-tunnel-error"));
    assert_eq!(seen, (status, Some(code.to_owned())), "{what}: {}", answer.text());
}

/// An upstream that answers every request with these fields and this body.
async fn answering(status: &'static str, fields: &'static str, body: &'static [u8]) -> Upstream {
    Upstream::start(move |_, mut conn: Conn| async move {
        conn.answer(status, fields, body).await.then_some(conn)
    })
    .await
}

/// An upstream that writes these bytes to every request.
async fn writing(bytes: &'static [u8]) -> Upstream {
    Upstream::start(move |_, mut conn: Conn| async move { conn.write(bytes).await.then_some(conn) }).await
}

#[tokio::test]
async fn an_upstream_that_breaks_before_its_head_is_502_and_after_it_visibly_incomplete() {
    let go = Arc::new(Semaphore::new(0));
    let allowed = Arc::clone(&go);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let allowed = Arc::clone(&allowed);
        async move {
            let length = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf";
            let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
            let after = match request.target() {
                "/ok" => return conn.answer("200 OK", "", b"fine").await.then_some(conn),
                "/before/reset" => {
                    conn.reset();
                    return None;
                }
                "/before/close" => return None,
                "/before/half-a-head" => {
                    conn.write("HTTP/1.1 200 OK\r\nX: ").await;
                    return None;
                }
                "/before/garbage" => {
                    conn.write("\u{0}\u{1}\u{2} no http at all\r\n\r\n").await;
                    return None;
                }
                "/before/other-protocol" => {
                    conn.write("220 mail.example ESMTP\r\n").await;
                    return None;
                }
                "/before/bad-length" => {
                    conn.write("HTTP/1.1 200 OK\r\nContent-Length: 4x\r\n\r\nhalf").await;
                    return None;
                }
                "/before/two-lengths" => {
                    conn.write("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nhalf!")
                        .await;
                    return None;
                }
                "/before/unknown-coding" => {
                    conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhalf").await;
                    return None;
                }
                "/after/length-close" | "/after/length-reset" => length,
                _ => chunked,
            };
            assert!(conn.write(after).await);
            allowed.acquire().await.unwrap().forget();
            match request.target() {
                "/after/length-reset" | "/after/chunked-reset" => conn.reset(),
                "/after/chunked-garbage" => {
                    conn.write("zz\r\nmore\r\n0\r\n\r\n").await;
                }
                "/after/chunked-short" => {
                    conn.write("ff\r\nshort").await;
                }
                _ => {}
            }
            None
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for (target, code) in [
        ("/before/reset", "upstream_reset"),
        ("/before/close", "upstream_reset"),
        ("/before/half-a-head", "upstream_reset"),
        ("/before/garbage", "upstream_invalid"),
        ("/before/other-protocol", "upstream_invalid"),
        ("/before/bad-length", "upstream_invalid"),
        ("/before/two-lengths", "upstream_invalid"),
        ("/before/unknown-coding", "upstream_invalid"),
    ] {
        let answer = Request::to("web", "POST", target).body(b"x".to_vec()).send(local.public).await;
        assert_error(&answer, 502, code, target);
        assert!(answer.complete);
    }
    for target in [
        "/after/length-close",
        "/after/length-reset",
        "/after/chunked-close",
        "/after/chunked-reset",
        "/after/chunked-garbage",
        "/after/chunked-short",
    ] {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", target)).await;
        assert_eq!(connection.head().await.status, 200, "{target}");
        let half = match target.starts_with("/after/length") {
            true => connection.bytes(4).await,
            false => connection.chunk().await.unwrap(),
        };
        assert_eq!(half, b"half", "{target}");
        go.add_permits(1);
        if target.starts_with("/after/length") {
            assert_eq!(connection.bytes(4).await, b"", "{target}");
        } else {
            // A part may still come, an end never.
            while let Some(chunk) = connection.chunk().await {
                assert_eq!(chunk, b"short", "{target}");
            }
        }
        let answer = Request::to("web", "GET", "/ok").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "fine"), "after {target}");
    }
}

#[tokio::test]
async fn a_second_response_in_one_write_answers_nobody() {
    let count = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let count = Arc::clone(&count);
        async move {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let own = format!("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nown-{number:02}");
            let other = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nSECOND";
            conn.write(format!("{own}{other}")).await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for round in 0..20 {
        let answer = Request::to("web", "GET", "/").send(local.public).await;
        assert_eq!((answer.status, answer.text()), (200, format!("own-{round:02}")));
    }
    // Also where it comes when its own request is long over.
    let late =
        writing(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nSECOND").await;
    let _other = local.agent("late", &late.address());
    for _ in 0..10 {
        let answer = Request::to("late", "GET", "/").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (204, ""));
    }
}

#[tokio::test]
async fn answers_without_a_body_keep_their_length_and_etag() {
    let upstream = Upstream::start(|request, mut conn: Conn| async move {
        let head = match request.target() {
            "/304" => "HTTP/1.1 304 Not Modified\r\nContent-Length: 12345\r\n",
            "/204" => "HTTP/1.1 204 No Content\r\n",
            "/205" => "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n",
            _ => "HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n",
        };
        conn.write(format!("{head}ETag: \"v1\"\r\n\r\n")).await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let mut connection = Connection::open(local.public).await;
    for (method, target, status, length) in [
        ("HEAD", "/", 200, Some("12345")),
        ("GET", "/304", 304, Some("12345")),
        ("HEAD", "/304", 304, Some("12345")),
        ("GET", "/204", 204, None),
        ("DELETE", "/204", 204, None),
        ("GET", "/205", 205, Some("0")),
    ] {
        // One connection: a body where none may be would be read as the next answer.
        let answer = connection.exchange(&Request::to("web", method, target)).await;
        assert_eq!((answer.status, answer.field("etag").as_deref()), (status, Some("\"v1\"")), "{target}");
        assert_eq!(answer.field("content-length").as_deref(), length, "{method} {target}");
        assert_eq!(answer.field("transfer-encoding"), None, "{method} {target}");
        assert!(answer.complete && answer.body.is_empty(), "{method} {target}");
    }
}

#[tokio::test]
async fn informational_answers_are_not_taken_for_the_final_one() {
    let upstream = writing(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n\
          HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nfinal",
    )
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for _ in 0..3 {
        let answer = Request::to("web", "POST", "/").body(b"x".to_vec()).send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (201, "final", true));
        assert_eq!(answer.field("link"), None);
    }
}

#[tokio::test]
async fn a_client_that_expects_100_is_told_to_continue() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for size in [10, 300_000] {
        let body = noise(1, size);
        let mut stream = TcpStream::connect(local.public).await.unwrap();
        let head = format!(
            "POST / HTTP/1.1\r\nHost: web.localhost\r\nExpect: 100-continue\r\nContent-Length: {size}\r\n\
             Connection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut interim = [0; 25];
        stream.read_exact(&mut interim).await.unwrap();
        assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(&body).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&answer));
        assert!(answer.ends_with(&body));
        let recorded = upstream.recorded().pop().unwrap();
        assert_eq!(recorded.body, body);
        assert!(recorded.all("expect").is_empty(), "nobody is left to say 100 to");
    }
}

#[tokio::test]
async fn coded_bodies_pass_untouched_also_broken_ones() {
    // The gzip of nothing, the same cut short, and what only claims to be.
    let gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let cases: [(&str, Vec<u8>); 6] = [
        ("gzip", gzip.to_vec()),
        ("gzip", gzip[..12].to_vec()),
        ("gzip", b"not gzip at all".to_vec()),
        ("br", noise(3, 5000)),
        ("zstd", b"\x28\xb5\x2f\xfd\x00 broken".to_vec()),
        ("deflate, gzip", noise(4, 200_000)),
    ];
    let bodies = cases.clone();
    let upstream = Upstream::start(move |request: Recorded, mut conn: Conn| {
        let (coding, body) = bodies[request.target()[1..].parse::<usize>().unwrap()].clone();
        async move {
            let fields = format!("Content-Type: text/html\r\nContent-Encoding: {coding}\r\n");
            conn.answer("200 OK", &fields, &body).await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for (index, (coding, bytes)) in cases.into_iter().enumerate() {
        let request = Request::to("web", "POST", &format!("/{index}"))
            .field("Accept-Encoding", "gzip;q=0.5, br")
            .field("Content-Type", "text/plain")
            .field("Content-Encoding", coding)
            .body(bytes.clone());
        let answer = request.send(local.public).await;
        assert_eq!(answer.status, 200, "{coding}: {}", answer.text());
        assert_eq!(answer.body, bytes, "{coding}");
        assert_eq!(answer.all("content-encoding"), [coding]);
        assert_eq!(answer.all("content-length"), [bytes.len().to_string()]);
        let recorded = upstream.recorded().pop().unwrap();
        assert_eq!(recorded.body, bytes, "{coding}");
        assert_eq!(recorded.all("content-encoding"), [coding]);
        assert_eq!(recorded.all("accept-encoding"), ["gzip;q=0.5, br"], "nothing is asked for by ourselves");
    }
}

#[tokio::test]
async fn trailers_are_dropped_and_the_body_is_whole() {
    let upstream = writing(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n",
    )
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let mut connection = Connection::open(local.public).await;
    for _ in 0..3 {
        // On one connection: a trailer that was passed on would be in the way of the next answer.
        let answer = connection.exchange(&Request::to("web", "GET", "/")).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (200, "body", true));
        assert!(answer.field("trailer").is_none() && answer.field("x-sum").is_none());
    }
}

#[tokio::test]
async fn field_values_pass_with_every_byte_both_ways() {
    let upstream = Upstream::start(|_, mut conn: Conn| async move {
        let mut head = b"HTTP/1.1 200 OK\r\nX-Obs: caf\xe9 \xff\x80\r\nX-Empty:\r\nX-Tab: a\tb\r\n".to_vec();
        head.extend_from_slice(b"X-Utf8: \xc3\xa4\r\nX-Quote: \"\\\"\r\nContent-Length: 0\r\n\r\n");
        conn.write(head).await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::to("web", "GET", "/")
        .raw_field("X-Obs", b"caf\xe9 \xff\x80")
        .field("X-Empty", "")
        .raw_field("X-Tab", b"a\tb")
        .raw_field("X-Utf8", b"\xc3\xa4")
        .field("X-Quote", "\"\\\"")
        .send(local.public)
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let recorded = upstream.recorded().pop().unwrap();
    let value = |fields: &[(String, Vec<u8>)], name: &str| {
        let own = fields.iter().find(|(own, _)| own.eq_ignore_ascii_case(name));
        own.unwrap_or_else(|| panic!("{name} is missing")).1.clone()
    };
    for (name, expected) in [
        ("x-obs", &b"caf\xe9 \xff\x80"[..]),
        ("x-empty", b""),
        ("x-tab", b"a\tb"),
        ("x-utf8", b"\xc3\xa4"),
        ("x-quote", b"\"\\\""),
    ] {
        assert_eq!(value(&recorded.fields, name), expected, "{name} to the upstream");
        assert_eq!(value(&answer.fields, name), expected, "{name} to the client");
    }
}

#[tokio::test]
async fn hop_by_hop_fields_go_no_further_and_connection_takes_nothing_else() {
    let upstream = answering(
        "200 OK",
        "Connection: X-Own, keep-alive, content-length, set-cookie\r\nX-Own: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\nSet-Cookie: a=1\r\nX-Kept: yes\r\n",
        b"body",
    )
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::to("web", "POST", "/")
        .field("Connection", "X-Mine, keep-alive")
        .field("X-Mine", "1")
        .field("Keep-Alive", "timeout=5")
        .field("Proxy-Connection", "keep-alive")
        .field("Proxy-Authorization", "Basic eDp5")
        .field("TE", "trailers")
        .field("Upgrade", "h2c")
        .field("X-Kept", "yes")
        .body(b"sent".to_vec())
        .send(local.public)
        .await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "body"));
    assert_eq!(answer.all("content-length"), ["4"]);
    assert_eq!(answer.all("set-cookie"), ["a=1"]);
    assert_eq!(answer.all("x-kept"), ["yes"]);
    for name in ["x-own", "keep-alive", "proxy-authenticate", "upgrade"] {
        assert_eq!(answer.field(name), None, "{name}");
    }
    let recorded = upstream.recorded().pop().unwrap();
    for name in ["x-mine", "connection", "keep-alive", "proxy-connection", "te", "upgrade", "trailer"] {
        assert!(recorded.all(name).is_empty(), "{name}: {:?}", recorded.all(name));
    }
    assert_eq!(recorded.all("proxy-authorization"), ["Basic eDp5"], "a gateway does not consume it");
    assert_eq!((recorded.all("x-kept"), recorded.body), (vec!["yes".to_owned()], b"sent".to_vec()));

    let answer = Request::to("web", "POST", "/")
        .field("Connection", "host, content-length, x-forwarded-for, cookie, x-tunnel-request-id")
        .field("Cookie", "a=1")
        .body(b"sent".to_vec())
        .send(local.public)
        .await;
    assert_eq!(answer.status, 200);
    let recorded = upstream.recorded().pop().unwrap();
    assert_eq!(recorded.all("host"), [upstream.address()]);
    assert_eq!(recorded.all("content-length"), ["4"]);
    assert_eq!(recorded.all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(recorded.all("cookie"), ["a=1"]);
    assert_eq!(recorded.all("x-tunnel-request-id"), answer.all("x-tunnel-request-id"));
    assert_eq!(recorded.body, b"sent");
}

#[tokio::test]
async fn the_upstream_learns_who_asked_and_nothing_the_client_made_up() {
    let upstream = answering("200 OK", "", b"").await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let public = format!("web.localhost:{}", local.public.port());
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let answer = Request::new("GET", "/")
        .field("Host", &public)
        .field("X-Forwarded-For", "6.6.6.6")
        .field("X-Forwarded-Proto", "gopher")
        .field("X-Forwarded-Host", "evil")
        .field("X-Forwarded-Port", "1")
        .field("X-Forwarded-Server", "evil")
        .field("Forwarded", "for=6.6.6.6")
        .field("X-Real-IP", "6.6.6.6")
        .field("Via", "1.0 cdn")
        .field("X-Tunnel-Request-Id", "mine")
        .field("X-Tunnel-Host", "other.localhost")
        .field("X-Tunnel-Client", "6.6.6.6")
        .field("X-Tunnel-Target", "/evil")
        .field("X-Tunnel-Front", "guess")
        .field("traceparent", trace)
        .send(local.public)
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let recorded = upstream.recorded().pop().unwrap();
    let port = local.public.port().to_string();
    for (name, value) in [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", &public),
        ("x-forwarded-port", &port),
        ("forwarded", &format!("for=127.0.0.1;host=\"{public}\";proto=http")),
        ("via", "1.0 cdn, 1.1 tunnel"),
        ("x-tunnel-request-id", &answer.field("x-tunnel-request-id").unwrap()),
        ("traceparent", trace),
    ] {
        assert_eq!(recorded.all(name), [value], "{name}");
    }
    assert_eq!(recorded.target(), "/");
    for name in [
        "x-forwarded-server",
        "x-real-ip",
        "x-tunnel-host",
        "x-tunnel-front",
        "x-tunnel-client",
        "x-tunnel-target",
    ] {
        assert!(recorded.all(name).is_empty(), "{name}: {:?}", recorded.all(name));
    }
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    let begun = upstream.recorded().pop().unwrap().all("traceparent").pop().unwrap();
    assert!(begun.contains(&answer.field("x-tunnel-request-id").unwrap()), "{begun}");
}

#[tokio::test]
async fn a_trusted_chain_of_proxies_is_kept_and_appended_to() {
    let upstream = answering("200 OK", "", b"").await;
    let local = Local::start_in(&[("TUNNEL_TRUST_FORWARDED", "chain")], &["--no-agent"]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::to("web", "GET", "/")
        .field("X-Forwarded-For", "203.0.113.7, 198.51.100.2")
        .field("X-Forwarded-Proto", "gopher")
        .field("Forwarded", "for=203.0.113.7")
        .field("X-Real-IP", "6.6.6.6")
        .send(local.public)
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let recorded = upstream.recorded().pop().unwrap();
    assert_eq!(recorded.all("x-forwarded-for"), ["203.0.113.7, 198.51.100.2, 127.0.0.1"]);
    let forwarded = recorded.all("forwarded");
    assert!(forwarded[0].starts_with("for=203.0.113.7, for=127.0.0.1;"), "{forwarded:?}");
    assert_eq!(recorded.all("x-forwarded-proto"), ["http"], "what the edge knows itself is never taken over");
    assert!(recorded.all("x-real-ip").is_empty());
}

#[tokio::test]
async fn a_request_is_written_once_also_where_a_pooled_connection_has_died() {
    let upstream = Upstream::start(|request, mut conn: Conn| async move {
        match request.target() {
            // Read and not answered.
            "/eaten" => None,
            // Answered, and then closed without a word, as a server does that has waited long enough.
            "/closes" => {
                conn.answer("200 OK", "", b"closes").await;
                None
            }
            _ => conn.answer("200 OK", "", b"kept").await.then_some(conn),
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let post = async |target: &str| {
        Request::to("web", "POST", target).body(b"order".to_vec()).send(local.public).await
    };
    let came = |target: &str| upstream.recorded().iter().filter(|own| own.target() == target).count();
    for round in 0..10 {
        assert_eq!(post("/closes").await.text(), "closes");
        let own = format!("/after-{round}");
        let answer = post(&own).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "kept"), "the dead connection is not used");
        assert_eq!(came(&own), 1);
        // Now a connection is pooled that is alive, takes the request and dies.
        let answer = post("/eaten").await;
        assert_error(&answer, 502, "upstream_reset", "whatever became of it, it is not sent again");
        assert_eq!(came("/eaten"), round + 1);
    }
}

#[tokio::test]
async fn the_host_field_follows_the_tunnels_rule() {
    let upstream = answering("200 OK", "", b"").await;
    let local = Local::start(&[]);
    let address = upstream.address();
    let tunnels: String = [("up", "upstream"), ("pre", "preserve"), ("val", "app.internal:99")]
        .map(|(name, rule)| {
            format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{address}\"\nhost_header = \"{rule}\"\n\n")
        })
        .concat();
    let _agent = local.agent_with(&tunnels, &["up", "pre", "val"]);
    for (name, host) in [("up", address.as_str()), ("pre", "pre.localhost"), ("val", "app.internal:99")] {
        assert_eq!(Request::to(name, "GET", "/").send(local.public).await.status, 200);
        assert_eq!(upstream.recorded().pop().unwrap().all("host"), [host], "{name}");
    }
}

#[tokio::test]
async fn a_target_arrives_byte_for_byte_or_is_refused_once() {
    let upstream = answering("200 OK", "", b"").await;
    // Nobody may come here, whatever a target says.
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = elsewhere.local_addr().unwrap();
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let legal: Vec<String> = [
        "//",
        "///",
        "/%2F",
        "/%2f",
        "/%2e%2e",
        "/%2e%2e/%2e%2e/x",
        "/../x",
        "/./",
        "/a/../b",
        "/;",
        "/;a=b;c",
        "/|",
        "/?",
        "/??",
        "/?a=1&a=2",
        "/?q=%2526",
        "/%FF",
        "/%ff%00",
        "/+",
        "/?a=+%20",
        "/%20",
        "/@evil/",
        "//evil/",
        "//evil:80/x",
        "/:80/",
        "/http://evil/",
        "/a?b?c",
        "/{a}[b]",
        "/^~",
        "/\"",
        "/?`",
        "/'()*!$,",
        "/%",
        "/%zz",
        "/\\",
        "/a\\..\\b",
        "/@169.254.169.254/latest/meta-data/",
        "//169.254.169.254/latest/meta-data/",
        "/http://169.254.169.254/",
        "/?url=http://169.254.169.254/",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([format!("//{other}/"), format!("/@{other}/"), format!("/?http://{other}/")])
    .collect();
    let mut refused: Vec<String> = Vec::new();
    for target in legal {
        let before = upstream.recorded().len();
        let answer = Request::to("web", "GET", &target).send(local.public).await;
        let recorded = upstream.recorded();
        if answer.status == 400 {
            assert_eq!(recorded.len(), before, "{target}: refused and forwarded");
            refused.push(target);
        } else {
            assert_eq!(answer.status, 200, "{target}: {}", answer.text());
            assert_eq!(recorded.len(), before + 1);
            assert_eq!(recorded[before].line, format!("GET {target} HTTP/1.1"));
        }
    }
    assert_eq!(refused, Vec::<String>::new(), "each of these can be carried");
    for (sent, carried) in [
        ("http://web.localhost/a//%2F?b", "/a//%2F?b"),
        ("http://web.localhost", "/"),
        ("http://web.localhost?x", "/?x"),
        ("http://user@web.localhost/u", "/u"),
    ] {
        // RFC 9112 §3.2.2: absolute-form wins over Host.
        let answer = Request::new("GET", sent).field("Host", "other.localhost").send(local.public).await;
        assert_eq!(answer.status, 200, "{sent}: {}", answer.text());
        assert_eq!(upstream.recorded().pop().unwrap().target(), carried, "{sent}");
    }
    let before = upstream.recorded().len();
    for foreign in [format!("http://{other}/"), "http://169.254.169.254/latest/meta-data/".to_owned()] {
        let request = Request::new("GET", &foreign).field("Host", "web.localhost");
        let answer = request.send(local.public).await;
        assert_eq!(answer.status, 404, "{foreign}: the tunnel of that name is asked for, and there is none");
    }
    let beside = ["/>", "/`", "/?\"", "/?<", "/?>", "/?#", "/?\u{e4}", "/?a b"];
    for target in ["/a#b", "/\x7f", "/a b", "/\u{1}", "a", "?x", "/<", "/\u{e4}"].into_iter().chain(beside) {
        let answer = Request::to("web", "GET", target).send(local.public).await;
        assert_eq!(answer.status, 400, "{target:?}: {}", answer.text());
    }
    assert_eq!(upstream.recorded().len(), before, "what is refused goes nowhere");
    let accepted = futures_util::FutureExt::now_or_never(elsewhere.accept());
    assert!(accepted.is_none(), "the agent has connected to something else than its upstream");
}

#[tokio::test]
async fn an_upstream_on_a_unix_socket_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let count = stream.read(&mut head).await.unwrap();
            assert!(head[..count].starts_with(b"GET /x//y HTTP/1.1\r\n"));
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nunix").await.unwrap();
        }
    });
    let local = Local::start(&[]);
    let _agent = local.agent("web", &format!("unix:{}", path.display()));
    for _ in 0..2 {
        let answer = Request::to("web", "GET", "/x//y").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "unix"), "{}", answer.text());
    }
    serving.abort();
}

type AnyBody = BoxBody<Bytes, io::Error>;

fn streamed<S>(frames: S) -> AnyBody
where
    S: Stream<Item = io::Result<Frame<Bytes>>> + Send + Sync + 'static,
{
    BodyExt::boxed(StreamBody::new(frames))
}

/// Says that a response was given up.
struct OnDrop(mpsc::UnboundedSender<()>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        // Nobody may be listening any more.
        let _ = self.0.send(());
    }
}

/// What an HTTP/2 upstream answers: `/endless` until it is given up, `/breaks` half, everything else its
/// request.
async fn answer_http2(
    request: http::Request<Incoming>,
    given_up: mpsc::UnboundedSender<()>,
) -> Result<Response<AnyBody>, Infallible> {
    let whole = |bytes: Bytes| Full::new(bytes).map_err(|never| match never {}).boxed();
    let pieces = |pieces: Vec<io::Result<&'static str>>| {
        let frames = pieces.into_iter().map(|piece| piece.map(|text| Frame::data(Bytes::from(text))));
        stream::iter(frames)
    };
    let answer = Response::builder().header("x-version", format!("{:?}", request.version()));
    let (status, body) = match request.uri().path() {
        "/endless" => {
            let guard = OnDrop(given_up);
            let rest = stream::pending().map(move |never: io::Result<Frame<Bytes>>| {
                let _ = &guard;
                never
            });
            (StatusCode::OK, streamed(pieces(vec![Ok("first")]).chain(rest)))
        }
        "/breaks" => {
            let broken = pieces(vec![Ok("half"), Err(io::Error::other("broken"))]);
            (StatusCode::OK, streamed(broken))
        }
        "/trailers" => {
            let trailers = http::HeaderMap::from_iter([(
                header::HeaderName::from_static("x-sum"),
                header::HeaderValue::from_static("1"),
            )]);
            let frames = pieces(vec![Ok("body")]).chain(stream::iter([Ok(Frame::trailers(trailers))]));
            (StatusCode::ACCEPTED, streamed(frames))
        }
        _ => {
            let line = format!("{} {}", request.method(), request.uri());
            let host = request.headers().get_all(header::HOST).iter().count();
            let fields = format!("{:?}", request.headers().get_all("x-twice"));
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let answer = answer.header("x-line", line).header("x-host", host).header("x-fields", fields);
            return Ok(answer.body(whole(body)).unwrap());
        }
    };
    Ok(answer.status(status).body(body).unwrap())
}

/// An upstream that speaks HTTP/2 where TLS agreed on it, and without TLS always.
async fn http2_upstream(
    tls: Option<TlsAcceptor>,
    given_up: mpsc::UnboundedSender<()>,
) -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (tls, given_up) = (tls.clone(), given_up.clone());
            tokio::spawn(async move {
                let answer = service_fn(move |request| answer_http2(request, given_up.clone()));
                let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let Some(tls) = tls else {
                    return http2.serve_connection(TokioIo::new(stream), answer).await;
                };
                let stream = tls.accept(stream).await.unwrap();
                match stream.get_ref().1.alpn_protocol() {
                    Some(b"h2") => http2.serve_connection(TokioIo::new(stream), answer).await,
                    _ => {
                        let http1 = hyper::server::conn::http1::Builder::new();
                        http1.serve_connection(TokioIo::new(stream), answer).await
                    }
                }
            });
        }
    });
    (port, serving)
}

#[tokio::test]
async fn an_upstream_that_offers_http2_is_spoken_to_in_it_and_one_without_tls_where_asked_for() {
    let (given_up, mut gave_up) = mpsc::unbounded_channel();
    let tls = acceptor(&[b"h2", b"http/1.1"]);
    let (secure, serving_secure) = http2_upstream(Some(tls), given_up.clone()).await;
    let (clear, serving_clear) = http2_upstream(None, given_up).await;
    let local = Local::start(&[]);
    let ca = fixture("ca.pem");
    let tunnels = format!(
        "[[tunnel]]\nname = \"h2\"\nupstream = \"https://localhost:{secure}\"\nca_file = \"{ca}\"\n\n\
         [[tunnel]]\nname = \"insecure\"\nupstream = \"https://127.0.0.1:{secure}\"\n\
         insecure_skip_verify = true\n\n\
         [[tunnel]]\nname = \"h2c\"\nupstream = \"http://localhost:{clear}\"\nhttp2 = \"always\"\n\n\
         [[tunnel]]\nname = \"h1\"\nupstream = \"https://localhost:{secure}\"\nca_file = \"{ca}\"\n\
         http2 = \"never\"\n",
        ca = ca.display()
    );
    let _agent = local.agent_with(&tunnels, &["h2", "insecure", "h2c", "h1"]);
    for (name, version, authority) in [
        ("h2", "HTTP/2.0", format!("https://localhost:{secure}")),
        ("insecure", "HTTP/2.0", format!("https://127.0.0.1:{secure}")),
        ("h2c", "HTTP/2.0", format!("http://localhost:{clear}")),
        ("h1", "HTTP/1.1", String::new()),
    ] {
        for (method, target, size) in
            [("GET", "/a//b/%2F?%FF+|", 0), ("M-SEARCH", "/?", 10), ("POST", "//evil/", 1_000_000)]
        {
            let body = noise(1, size);
            let mut request =
                Request::to(name, method, target).field("X-Twice", "one").field("X-Twice", "two");
            if size > 0 {
                request = request.body(body.clone());
            }
            let answer = request.send(local.public).await;
            assert_eq!(answer.status, 200, "{name} {target}: {}", answer.text());
            assert!(answer.complete && answer.body == body, "{name} {target}");
            assert_eq!(answer.field("x-version").unwrap(), version, "{name}");
            assert_eq!(answer.field("x-line").unwrap(), format!("{method} {authority}{target}"), "{name}");
            // HTTP/2 has its authority in place of `host`.
            assert_eq!(answer.field("x-host").unwrap(), if version == "HTTP/2.0" { "0" } else { "1" });
            let fields = answer.field("x-fields").unwrap();
            assert!(fields.contains("one") && fields.contains("two"), "{fields}");
        }
        let answer = Request::to(name, "GET", "/trailers").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (202, "body", true), "{name}");
        assert_eq!(answer.field("x-sum"), None);

        let mut broken = Connection::open(local.public).await;
        broken.begin(&Request::to(name, "GET", "/breaks")).await;
        let answer = broken.answer("GET").await;
        // Before the head went out it is an error, after it an end without an end.
        assert!(answer.status == 502 || !answer.complete, "{name}: {} {}", answer.status, answer.text());

        let mut leaving = Connection::open(local.public).await;
        leaving.begin(&Request::to(name, "GET", "/endless")).await;
        assert_eq!(leaving.head().await.status, 200);
        assert_eq!(leaving.chunk().await.unwrap(), b"first", "at once, whatever follows");
        drop(leaving);
        let given_up = timeout(Duration::from_secs(1), gave_up.recv()).await;
        assert!(given_up.is_ok(), "{name}: the stream is given up within a second");
    }
    serving_secure.abort();
    serving_clear.abort();
}

#[tokio::test]
async fn an_https_upstream_is_checked_and_asked_for_by_its_name() {
    let acceptor = acceptor(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // An agent that does not trust the certificate breaks the handshake off.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let name = stream.get_ref().1.server_name().unwrap_or("none").to_owned();
            let mut head = vec![0; 4096];
            let count = stream.read(&mut head).await.unwrap();
            assert!(head[..count].starts_with(b"GET /x?y HTTP/1.1\r\n"));
            let answer = format!("HTTP/1.1 200 OK\r\nX-Name: {name}\r\nContent-Length: 3\r\n\r\ntls");
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    let local = Local::start(&[]);
    let ca = fixture("ca.pem");
    let ca = ca.display();
    let tunnels = [
        ("own-ca", format!("upstream = \"https://localhost:{port}\"\nca_file = \"{ca}\"")),
        (
            "own-name",
            format!(
                "upstream = \"https://127.0.0.1:{port}\"\nca_file = \"{ca}\"\nserver_name = \"localhost\""
            ),
        ),
        ("no-ca", format!("upstream = \"https://localhost:{port}\"")),
        ("wrong-name", format!("upstream = \"https://127.0.0.1:{port}\"\nca_file = \"{ca}\"")),
    ];
    let names = tunnels.each_ref().map(|(name, _)| *name);
    let text = tunnels.each_ref().map(|(name, rest)| format!("[[tunnel]]\nname = \"{name}\"\n{rest}\n\n"));
    let _agent = local.agent_with(&text.concat(), &names);
    for name in ["own-ca", "own-name"] {
        let answer = Request::to(name, "GET", "/x?y").send(local.public).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "tls"), "{name}");
        assert_eq!(answer.field("x-name").unwrap(), "localhost", "{name}: SNI");
    }
    for name in ["no-ca", "wrong-name"] {
        let answer = Request::to(name, "GET", "/x?y").send(local.public).await;
        assert_error(&answer, 502, "upstream_tls", name);
    }
    serving.abort();
}

#[tokio::test]
async fn no_proxy_variable_is_obeyed() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", proxy.local_addr().unwrap());
    let upstream = answering("200 OK", "", b"direct").await;
    let local = Local::start(&[]);
    let names = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let environment = names.map(|name| (name, url.as_str()));
    let tunnels = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let _agent = local.agent_in(&environment, &tunnels, &["web"]);
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "direct"));
    let accepted = futures_util::FutureExt::now_or_never(proxy.accept());
    assert!(accepted.is_none(), "the agent has asked a proxy");
}

#[tokio::test]
async fn text_travels_in_fewer_messages_than_noise_and_both_arrive_whole() {
    let text: Vec<u8> = (0..1_500_000u32 / 64)
        .flat_map(|line| format!("{:<63}\n", format!("<li>line {line} of a page</li>")).into_bytes())
        .collect();
    let noise = noise(1, text.len());
    let bodies = Arc::new((text.clone(), noise.clone()));
    let upstream = Upstream::start(move |request: Recorded, mut conn: Conn| {
        let bodies = Arc::clone(&bodies);
        async move {
            let (kind, body) = match request.target() {
                "/text" => ("text/html", &bodies.0),
                _ => ("application/octet-stream", &bodies.1),
            };
            conn.answer("200 OK", &format!("Content-Type: {kind}\r\n"), body).await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let sent = async || local.counters().await.get("sqs:SendMessage").copied().unwrap_or(0);
    let mut messages = Vec::new();
    for (target, body) in [("/text", &text), ("/noise", &noise)] {
        let before = sent().await;
        let answer = Request::to("web", "GET", target).send(local.public).await;
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == *body, "{target} arrived changed");
        messages.push(sent().await - before);
    }
    assert!(messages[0] > 0 && messages[0] * 3 <= messages[1] * 2, "{messages:?}");
}

/// Nothing else ends it before every place is taken, 64 rounds later.
#[tokio::test]
async fn a_tunnel_that_leads_back_to_itself_ends_at_the_first_return() {
    let local = Local::start(&[]);
    let port = local.public.port();
    // The resolver of this machine need not know these names.
    let to = |name: &str, via: bool| {
        format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"http://{name}.localhost:{port}\"\nvia = {via}\n")
    };
    let one = to("one", true);
    let other = to("other", false);
    // Through one another: ping → pong → ping.
    let mutual = |name: &str, next: &str| {
        format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"http://{next}.localhost:{port}\"\nvia = false\n")
    };
    let tunnels = [one, other, mutual("ping", "pong"), mutual("pong", "ping")].concat();
    let _agent = local.agent_with(&tunnels, &["one", "other", "ping", "pong"]);
    let runs = async || local.counters().await.get("states:StartSyncExecution").copied().unwrap_or(0);
    for (name, rounds) in [("one", 1), ("other", 1), ("ping", 2)] {
        let before = runs().await;
        // As a browser names it: an address is a name with its port.
        let asked = Request::new("GET", "/x").field("Host", &format!("{name}.localhost:{port}"));
        let answer = asked.send(local.public).await;
        assert_error(&answer, 508, "loop_detected", name);
        assert_eq!(runs().await - before, rounds, "{name}");
    }
}

/// An upstream that answers what each path asks for, in the terms in which it was asked.
async fn names_itself() -> Upstream {
    Upstream::start(|request, mut conn: Conn| async move {
        let host = request.all("host").concat();
        let (status, fields, body) = match request.target() {
            "/location" => ("302 Found", format!("Location: http://{host}/login?next=/\r\n"), ""),
            "/content" => ("201 Created", format!("Content-Location: http://{host}/items/1\r\n"), ""),
            "/refresh" => ("200 OK", format!("Refresh: 3; url=http://{host}/next\r\n"), ""),
            // As PHP sends what it is given.
            "/accent" => ("302 Found", format!("Location: http://{host}/café.php?à\r\n"), ""),
            "/foreign" => {
                ("302 Found", "Location: http://login.example/?to=http://localhost/\r\n".into(), "")
            }
            "/relative" => ("302 Found", "Location: next\r\n".into(), ""),
            "/host" => ("403 Forbidden", String::new(), "Invalid Host header"),
            "/csrf" => ("403 Forbidden", String::new(), "<p>CSRF verification failed. Request aborted.</p>"),
            "/vite" => ("403 Forbidden", String::new(), "Blocked request. This host (\"x\") is not allowed."),
            "/fine" => ("403 Forbidden", String::new(), "not for you"),
            _ => ("200 OK", String::new(), "ok"),
        };
        conn.answer(status, &fields, body.as_bytes()).await.then_some(conn)
    })
    .await
}

/// App and visitors have one view of the address: what either names in its own terms is said in the other's.
#[tokio::test]
async fn each_side_reads_addresses_in_its_own_terms() {
    let upstream = names_itself().await;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("app.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let local = Local::start(&[]);
    let at = upstream.address();
    let tunnels: String = [
        ("plain", &*format!("upstream = \"{at}\"")),
        ("raw", &format!("upstream = \"{at}\"\nrewrite_location = false\nvia = false")),
        ("up", &format!("upstream = \"{at}\"\norigin = \"upstream\"")),
        ("pre", &format!("upstream = \"{at}\"\nhost_header = \"preserve\"")),
        ("unix", &format!("upstream = \"unix:{}\"", socket.display())),
    ]
    .map(|(name, rest)| format!("[[tunnel]]\nname = \"{name}\"\n{rest}\n"))
    .concat();
    let names = ["plain", "raw", "up", "pre", "unix"];
    let _agent = local.agent_with(&tunnels, &names);
    let port = local.public.port();
    let public = |name: &str| format!("{name}.localhost:{port}");
    let ask = async |name: &str, method: &str, target: &str, fields: &[(&str, &str)]| {
        let mut request = Request::new(method, target).field("Host", &public(name));
        for (field, value) in fields {
            request = request.field(field, value);
        }
        let answer = request.send(local.public).await;
        (answer, upstream.recorded().pop())
    };

    // (a) the app's own address, or the Host that it was sent, becomes the public one; foreign and relative ones stay.
    for name in ["plain", "pre"] {
        let own = format!("http://{}", public(name));
        for (target, field, value) in [
            ("/location", "location", format!("{own}/login?next=/")),
            ("/content", "content-location", format!("{own}/items/1")),
            ("/refresh", "refresh", format!("3; url={own}/next")),
            ("/accent", "location", format!("{own}/café.php?à")),
            ("/foreign", "location", "http://login.example/?to=http://localhost/".into()),
            ("/relative", "location", "next".into()),
        ] {
            let (answer, _) = ask(name, "GET", target, &[]).await;
            assert_eq!(answer.field(field), Some(value), "{name} {target}");
        }
    }
    let page = format!("http://{}/café", public("up"));
    let (_, seen) = ask("up", "GET", "/", &[("Referer", &page)]).await;
    assert_eq!(seen.unwrap().all("referer"), [format!("http://{at}/café")]);
    let (answer, seen) = ask("raw", "GET", "/location", &[]).await;
    assert_eq!(answer.field("location"), Some(format!("http://{at}/login?next=/")), "as it was sent");
    // (g)
    assert!(seen.unwrap().all("via").is_empty());
    let (_, seen) = ask("raw", "GET", "/", &[("Via", "1.0 visitors-own")]).await;
    assert_eq!(seen.unwrap().all("via"), ["1.0 visitors-own"]);
    let (_, seen) = ask("plain", "GET", "/", &[]).await;
    assert_eq!(seen.unwrap().all("via"), ["1.1 tunnel"]);

    // (b) what a page of the tunnel says of its origin; a foreign one stays foreign under each rule.
    let own = |name: &str| format!("http://{}", public(name));
    for (name, origin) in [("plain", own("plain")), ("pre", own("pre")), ("up", format!("http://{at}"))] {
        let page = format!("{}/form", own(name));
        let (_, seen) = ask(name, "POST", "/", &[("Origin", &own(name)), ("Referer", &page)]).await;
        let seen = seen.unwrap();
        assert_eq!(seen.all("origin").concat(), origin, "{name}");
        assert_eq!(seen.all("referer"), [format!("{origin}/form")], "{name}");
        for foreign in ["https://evil.example", "null", "http://evil.localhost"] {
            let (_, seen) = ask(name, "POST", "/", &[("Origin", foreign)]).await;
            assert_eq!(seen.unwrap().all("origin"), [foreign], "{name}");
        }
    }
    // WebDAV names the other resource likewise.
    let there = format!("{}/b%20c", own("plain"));
    let (_, seen) = ask("plain", "MOVE", "/a", &[("Destination", &there)]).await;
    assert_eq!(seen.unwrap().all("destination"), [format!("http://{at}/b%20c")]);

    // (f) a socket has no name: its host is one that guards against rebinding let in.
    let served = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        String::from_utf8(head).unwrap()
    });
    assert_eq!(ask("unix", "GET", "/", &[]).await.0.status, 200);
    let head = served.await.unwrap().to_ascii_lowercase();
    assert!(head.contains("\r\nhost: localhost:80\r\n"), "{head}");
    // A gateway does not consume it, and RFC 9110 §7.6.1 does not list it.
    let (_, seen) = ask("plain", "GET", "/", &[("Proxy-Authorization", "Basic eDp5")]).await;
    assert_eq!(seen.unwrap().all("proxy-authorization"), ["Basic eDp5"]);
}

/// Refusals of public names can be had on one machine, and the agent says which setting helps: once for each tunnel.
#[tokio::test]
async fn a_refusal_for_a_setting_is_explained_once_for_each_tunnel() {
    let upstream = names_itself().await;
    let local = Local::start(&["--domain", "tunnel.example.test"]);
    let at = upstream.address();
    let tunnels =
        ["one", "two"].map(|name| format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{at}\"\n")).concat();
    let agent = local.agent_with(&tunnels, &["one", "two"]);
    let port = local.public.port();
    for _ in 0..2 {
        for name in ["one", "two"] {
            let host = format!("{name}.tunnel.example.test:{port}");
            for target in ["/host", "/csrf", "/vite", "/fine"] {
                let answer = Request::new("GET", target).field("Host", &host).send(local.public).await;
                assert_eq!(answer.status, 403, "{target}");
                assert!(answer.field("x-tunnel-error").is_none(), "the app's own refusal stays as it is");
                let seen = upstream.recorded().pop().unwrap();
                assert_eq!(seen.all("x-forwarded-host").concat(), host);
            }
            // A page of the tunnel, refused without a known word.
            let origin = format!("http://{host}");
            let request = Request::new("POST", "/fine").field("Host", &host).field("Origin", &origin);
            assert_eq!(request.send(local.public).await.status, 403);
        }
    }
    // The last line of the log: everything before it is there.
    let asked = Request::new("GET", "/end").field("Host", &format!("one.tunnel.example.test:{port}"));
    assert_eq!(asked.send(local.public).await.status, 200);
    agent.process().wait_for_line(|line| line.contains("/end"));
    let printed = agent.process().printed();
    for name in ["one", "two"] {
        let hints: Vec<_> =
            printed.lines().filter(|line| line.contains(&format!("hint for {name}: "))).collect();
        assert_eq!(hints.len(), 4, "{hints:?}");
        for advice in
            ["--host-header upstream", "CSRF_TRUSTED_ORIGINS", "server.allowedHosts", "--origin upstream"]
        {
            assert!(hints.iter().any(|hint| hint.contains(advice)), "{advice}: {hints:?}");
        }
    }
}
