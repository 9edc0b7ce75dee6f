//! A public request through the whole designed path and back: `local`, its functions, `agentd`, an
//! upstream.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use proto::limits;
use sha2::{Digest, Sha256};
use tests::{
    Local,
    client::{Connection, Request},
    noise,
    upstream::Upstream,
};

#[tokio::test]
async fn the_demo_answers_by_host_and_by_path() {
    let local = Local::start_with(&[]);
    let _ = local.process().wait_for_line(|line| line.contains("tunnel is open"));
    for request in [
        Request::new("GET", "/").field("Host", "demo.localhost").field("Accept", "text/html"),
        Request::new("GET", "/demo/").field("Host", "127.0.0.1").field("Accept", "text/html"),
    ] {
        let answer = request.send(local.public).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.field("content-type").unwrap().starts_with("text/html"));
        assert!(answer.text().contains("--name web"), "says what to type next");
        assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
        let id = answer.field("x-tunnel-request-id").unwrap();
        assert!(answer.text().contains(&id), "shows how this very request travelled");
    }
}

#[tokio::test]
async fn method_target_fields_and_status_are_carried_as_they_are() {
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "X-B: 1\r\nSet-Cookie: a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT\r\nX-A: 2\r\n\
                      Set-Cookie: b=\"x, y\"\r\nSet-Cookie: c=\r\nX-Empty: \r\nLocation: /elsewhere?x=%2F\r\n";
        conn.answer("307 Whatever Reason", fields, b"moved").await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    for (method, target) in [
        ("GET", "/?a=1&a=2&b=%2526&c=+%20&d"),
        ("PROPFIND", "/a;b=c/d%2Fe?x"),
        ("M-SEARCH", "//double//slash"),
        ("QUERY", "/%2e%2e/%FF"),
        ("x!y", "/|{}"),
        ("DELETE", "/?"),
    ] {
        let request = Request::to("web", method, target)
            .field("X-Twice", "one")
            .field("x-other", "between")
            .field("X-Twice", "two")
            .field("Cookie", "a=1; b=2");
        let answer = request.send(local.public).await;
        assert_eq!(answer.status, 307, "{method} {target}: {}", answer.text());
        let recorded = upstream.recorded().pop().unwrap();
        assert_eq!(recorded.line, format!("{method} {target} HTTP/1.1"));
        let twice = recorded.all("x-twice").join(",");
        assert_eq!(twice.split(',').map(str::trim).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(recorded.all("cookie"), ["a=1; b=2"]);
        assert_eq!(recorded.all("x-tunnel-request-id"), answer.all("x-tunnel-request-id"));
        assert_eq!(
            answer.all("set-cookie"),
            ["a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT", "b=\"x, y\"", "c="]
        );
        assert_eq!(
            answer.field("location").unwrap(),
            "/elsewhere?x=%2F",
            "no redirect is followed or changed"
        );
        let order: Vec<_> = answer.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
        let at = |name: &str| order.iter().position(|own| own == name).unwrap();
        assert!(at("x-b") < at("x-a") && at("x-a") < at("x-empty"), "{order:?}");
        assert_eq!(answer.text(), "moved");
    }
}

#[tokio::test]
async fn bodies_of_every_awkward_size_pass_both_ways() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let kib = 1024;
    let sizes = [
        0,
        1,
        23 * kib,
        32 * kib - 1,
        32 * kib,
        32 * kib + 1,
        95 * kib,
        limits::CHUNK_BYTES - 1,
        limits::CHUNK_BYTES,
        limits::CHUNK_BYTES + 1,
        128 * kib - 1,
        128 * kib,
        128 * kib + 1,
        256 * kib,
        1024 * kib,
        4096 * kib,
    ];
    for (index, size) in sizes.into_iter().enumerate() {
        let text: Vec<u8> =
            noise(index as u64, size).iter().map(|byte| b"abc \n\"\\{}"[usize::from(byte % 9)]).collect();
        for body in [noise(index as u64, size), text] {
            let request = Request::to("web", "POST", "/echo").body(body.clone());
            let answer = request.send(local.public).await;
            assert_eq!(answer.status, 200, "{size}: {}", answer.text());
            assert!(answer.complete, "{size}");
            assert_eq!(answer.body.len(), size);
            assert_eq!(Sha256::digest(&answer.body), Sha256::digest(&body), "{size}");
            assert_eq!(answer.field("content-length").unwrap(), size.to_string());
        }
    }
}

#[tokio::test]
async fn a_body_over_the_ceiling_is_refused_before_the_upstream_is_called() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let over = limits::REQUEST_BODY_BYTES + 1;
    for size in [over, 8 * 1024 * 1024] {
        let answer = Request::to("web", "POST", "/").body(noise(1, size)).send(local.public).await;
        assert_eq!(answer.status, 413, "{size}");
        assert_eq!(answer.field("x-tunnel-error").unwrap(), "request_too_large");
        assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
        assert!(answer.text().contains("4715520"), "names the limit: {}", answer.text());
    }
    assert!(upstream.recorded().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_clients_get_their_own_answers() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let wrong = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..50u64 {
        let (public, wrong) = (local.public, Arc::clone(&wrong));
        clients.spawn(async move {
            let mut connection = Connection::open(public).await;
            for round in 0..40u64 {
                let id = client * 1000 + round;
                let body = noise(id, usize::try_from(id * 37 % 4000).unwrap());
                let request = Request::to("web", "POST", &format!("/{id}")).body(body.clone());
                let answer = connection.exchange(&request).await;
                let own = answer.status == 200
                    && answer.body == body
                    && answer.field("x-line") == Some(format!("POST /{id} HTTP/1.1"));
                if !own {
                    eprintln!("{id}: {} {}", answer.status, answer.text());
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
    assert_eq!(upstream.recorded().len(), 2000, "each request reached the upstream once");
}

#[tokio::test]
async fn a_small_request_makes_the_designed_calls_and_no_other() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    // The first request may start processes, which lease their mailboxes.
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    let settled = async || {
        // A function may still be deleting its message when the client has its answer.
        let mut before = local.counters().await;
        tests::eventually("the calls of the last request are over", async || {
            let now = local.counters().await;
            let same = now == before && now.get("sqs:DeleteMessage") == now.get("sqs:SendMessage");
            before = now;
            same
        })
        .await;
        before
    };
    let before = settled().await;
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    let after = settled().await;
    let made: Vec<(String, u64)> = after
        .iter()
        .map(|(call, count)| (call.clone(), count - before.get(call).copied().unwrap_or(0)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let count = |call: &str| made.iter().find(|(own, _)| own == call).map_or(0, |(_, count)| *count);
    assert_eq!(count("states:StartSyncExecution"), 1, "{made:?}");
    assert_eq!(count("dynamodb:Query"), 1, "{made:?}");
    assert_eq!(count("apigateway:invoke POST"), 1, "{made:?}");
    assert_eq!(count("sqs:SendMessage"), 1, "{made:?}");
    assert!((1..=2).contains(&count("sqs:ReceiveMessage")), "{made:?}");
    assert_eq!(count("sqs:DeleteMessage"), 1, "{made:?}");
    assert_eq!(made.len(), 6, "and nothing else: {made:?}");
}

#[tokio::test]
async fn path_mode_moves_what_the_upstream_says_about_its_paths() {
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "Location: /login\r\nSet-Cookie: s=1; Path=/\r\nContent-Type: text/html\r\n";
        conn.answer("302 Found", fields, b"<a href=\"/login\">").await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::new("GET", "/web/start?x=1").field("Host", "127.0.0.1").send(local.public).await;
    assert_eq!(answer.status, 302);
    assert_eq!(answer.field("location").unwrap(), "/web/login");
    assert_eq!(answer.field("set-cookie").unwrap(), "s=1; Path=/web");
    assert_eq!(answer.text(), "<a href=\"/login\">", "a body is never touched");
    let recorded = upstream.recorded().pop().unwrap();
    assert_eq!(recorded.target(), "/start?x=1");
    assert_eq!(recorded.all("x-forwarded-prefix"), ["/web"]);
}
