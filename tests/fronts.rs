//! What the fronts of AWS do, imitated by `local`, and what the product gives in spite of it. What each front does is
//! in `local/src/public/fronts.rs` and docs/aws-fronts.md.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::time::Duration;

use tests::{
    Local, acceptance,
    client::Answer,
    eventually,
    upstream::{Conn, Upstream},
};
use tokio::time::timeout;

/// Well under the time that a front would hold what does not end: 300 s.
const AT_ONCE: Duration = Duration::from_secs(30);

async fn upstream() -> Upstream {
    Upstream::start(|request, mut conn: Conn| async move {
        let status = match request.target() {
            "/204" => "204 No Content",
            "/304" => "304 Not Modified",
            "/302" => "302 Found",
            "/digest" => "200 OK",
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
    local.process().wait_for_line(|line| line.contains("as behind the front cloudfront"));
}
