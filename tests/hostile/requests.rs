//! Public requests that try to be two, or to come out elsewhere.

use super::*;

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: web.localhost\r\n\r\n";

/// Everything that comes until the edge closes.
async fn raw(local: &Local, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(local.public).await.unwrap();
    // The edge may have refused before all of it is written.
    drop(stream.write_all(bytes).await);
    let mut all = Vec::new();
    drop(timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("an answer and the end"));
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn what_could_be_read_as_two_requests_is_refused() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let framings = [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 6",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding : chunked",
        " Transfer-Encoding: chunked",
        "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\u{b}chunked",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5_0",
        "Content-Length: 5 5",
        "Content-Length: 5, 6",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length : 5",
        "Content-Length: 99999999999999999999999",
        "Content-Length:",
        "Host: other.localhost",
        "X: a\0b",
        "X: a\rContent-Length: 5",
        "no colon here",
        ": empty name",
        "a b: c",
    ];
    for framing in framings {
        let text =
            format!("POST /first HTTP/1.1\r\nHost: web.localhost\r\n{framing}\r\n\r\n0\r\n\r\n{SMUGGLED}");
        let answer = raw(&local, text.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{framing:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{framing:?}: one answer, then the end: {answer}");
    }
    let chunks = [
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-1\r\nhello\r\n0\r\n\r\n",
        "0_5\r\nhello\r\n0\r\n\r\n",
        "g\r\nhello\r\n0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "\r\n0\r\n\r\n",
    ];
    for chunk in chunks {
        let text = format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{SMUGGLED}"
        );
        let answer = raw(&local, text.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{chunk:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{chunk:?}: {answer}");
    }
    let lines = [
        "GET  /first HTTP/1.1",
        "GET /first  HTTP/1.1",
        "GET /first HTTP/1.1 HTTP/1.1",
        "GET /first HTTP/2.0",
        "GET /first HTTP/1.1\0",
        "G@T /first HTTP/1.1",
        "GET\t/first HTTP/1.1",
        "CONNECT web.localhost:80 HTTP/1.1",
    ];
    for line in lines {
        let answer = raw(&local, format!("{line}\r\nHost: web.localhost\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{line:?}: {answer}");
    }
    for head in
        ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: web.localhost\r\nHost: web.localhost\r\n\r\n"]
    {
        let answer = raw(&local, head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head:?}: {answer}");
    }
    assert!(upstream.recorded().is_empty(), "nothing of it was forwarded: {:?}", upstream.recorded());
}

#[tokio::test]
async fn what_only_looks_like_two_requests_is_forwarded_as_the_one_it_is() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let length = SMUGGLED.len();
    let shapes = [
        format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
        ),
        format!(
            "GET /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
        ),
        format!(
            "POST /first HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\nTransfer-Encoding:\tChunked\r\n\r\n\
             {length:x};ext=\"0\"\r\n{SMUGGLED}\r\n0\r\nX-Trailer: 1\r\n\r\n"
        ),
    ];
    for shape in shapes {
        let before = upstream.recorded().len();
        let answer = raw(&local, shape.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{shape}: {answer}");
        let recorded = upstream.recorded();
        assert_eq!(recorded.len(), before + 1, "one request is one request");
        let last = recorded.last().unwrap();
        assert_eq!((last.target(), last.body.as_slice()), ("/first", SMUGGLED.as_bytes()));
        assert_eq!(last.all("content-length"), [length.to_string()]);
    }
    // Two requests that are two get two answers, in order.
    let pair = "GET /a HTTP/1.1\r\nHost: web.localhost\r\n\r\nGET /b HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n";
    let answer = raw(&local, pair.as_bytes()).await;
    let (a, b) = (answer.find("GET /a HTTP/1.1").unwrap(), answer.find("GET /b HTTP/1.1").unwrap());
    assert!(a < b, "{answer}");
}

/// A public request that is up to no good, and where it may come out: nowhere, or at `web` alone.
fn hostile_requests() -> Vec<(String, bool)> {
    let mut list = Vec::new();
    let get = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\n{fields}\r\n\r\n");
    // Hosts: however it is written, it is the tunnel it names or none.
    for (host, is_web) in [
        ("web.localhost", true),
        ("WEB.localhost", true),
        ("Web.LOCALHOST.", true),
        ("web.localhost:80", true),
        ("web.localhost:8443", true),
        ("web.localhost.:1", true),
        ("web.localhost..", false),
        ("web..localhost", false),
        (".web.localhost", false),
        ("web.localhost.evil.example", false),
        ("evil.example.web.localhost", false),
        ("good.web.localhost", false),
        ("www.localhost", false),
        ("_web.localhost", false),
        ("xn--web.localhost", false),
        ("web_.localhost", false),
        ("w%65b.localhost", false),
        ("web.localhost/good", false),
        ("good@web.localhost", false),
        ("web.localhost#good", false),
        ("web.localhost:80:80", false),
        ("web.localhost, good.localhost", false),
        ("web\u{ff0e}localhost", false),
        ("[::1]", false),
        ("127.0.0.1", false),
        ("localhost", false),
        ("", false),
        ("web.localhost\0", false),
        ("web.local\thost", false),
    ] {
        list.push((get("/h", &format!("Host: {host}\r\nConnection: close")), is_web));
    }
    for fields in [
        "Host: web.localhost\r\nHost: good.localhost",
        "Host: web.localhost\r\nhost: web.localhost",
        "Host: web.localhost\r\nHost : good.localhost",
        " Host: web.localhost",
        "X: y\r\n Host: web.localhost",
        "X-Forwarded-Host: web.localhost",
        "Host: web.localhost\r\nX: a\rb",
        "Host: web.localhost\r\nX: a\0b",
        "Host: web.localhost\r\nX\0: a",
        "Host: web.localhost\r\nX Y: a",
        "Host: web.localhost\r\n: a",
        "Host: web.localhost\r\nX",
    ] {
        list.push((get("/f", &format!("{fields}\r\nConnection: close")), false));
    }
    // What only a front may say is not believed, and takes the request nowhere else.
    for field in [
        "x-tunnel-host: good.localhost",
        "X-Tunnel-Host: good.localhost\r\nx-tunnel-front: ",
        "x-tunnel-host: good.localhost\r\nx-tunnel-front: secret",
        "x-tunnel-front: x\r\nx-tunnel-front: y\r\nx-tunnel-host: good.localhost",
        "x-tunnel-target: /good",
        "x-tunnel-client: 192.0.2.1",
        "X-Forwarded-Host: good.localhost",
        "Forwarded: host=good.localhost",
        "X-Original-URL: /good",
        "X-Rewrite-URL: /good",
        "X-HTTP-Method-Override: DELETE",
        "Connection: close, x-tunnel-request-id",
    ] {
        list.push((get("/t", &format!("Host: web.localhost\r\n{field}\r\nConnection: close")), true));
    }
    // Targets: absolute ones name their own host, and nothing else is taken for a path.
    for (target, is_web) in [
        ("http://web.localhost/abs", true),
        ("HTTP://WEB.localhost/abs", true),
        ("http://good@web.localhost/abs", true),
        ("http:///abs", false),
        ("http://", false),
        ("web.localhost:80", false),
        ("*", true),
        ("abs", false),
        ("?x", false),
        ("#x", false),
        ("/a b", false),
        ("/a\0b", false),
        ("/a\tb", false),
        ("/a\u{7f}b", false),
        ("/a\\..\\b", true),
        ("/../../etc/passwd", true),
        ("/%2e%2e/%2f", true),
        ("/%00", true),
        ("/%0d%0aSet-Cookie:%20evil=1", true),
        ("//good.localhost/x", true),
        ("/;a=b/..;/c", true),
    ] {
        list.push((get(target, "Host: web.localhost\r\nConnection: close"), is_web));
    }
    // Heads: large ones are refused or carried, never cut.
    for (bytes, is_web) in
        [(10 * 1024, true), (48 * 1024, true), (100 * 1024, false), (2 * 1024 * 1024, false)]
    {
        let long = "x".repeat(bytes);
        list.push((
            get("/l", &format!("Host: web.localhost\r\nX-Long: {long}\r\nConnection: close")),
            is_web,
        ));
    }
    let many: String = (0..3000).map(|index| format!("X-{index}: y\r\n")).collect();
    list.push((get("/m", &format!("Host: web.localhost\r\n{many}Connection: close")), false));
    // Bodies that say two things about their end.
    for framing in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: x, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        "Transfer-Encoding: chunked\u{b}",
        "Transfer-Encoding:\u{c}chunked",
        "Transfer-Encoding\u{b}: chunked",
        "Content-Length: 4\r\nContent-Length: 5",
        "Content-Length: 4,5",
        "Content-Length: 04a",
        "Content-Length: 4 4",
        "Content-Length: 0x4",
        "Content-Length: -4",
        "Content-Length: +4",
        "Content-Length: 18446744073709551616",
    ] {
        let text = format!(
            "POST /s HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n{framing}\r\n\r\n0\r\n\r\nGET /good HTTP/1.1\r\nHost: good.localhost\r\n\r\n"
        );
        list.push((text, false));
    }
    for method in ["CONNECT", "G@T", "GET\0", "", "get\t"] {
        list.push((
            format!("{method} / HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n"),
            false,
        ));
    }
    for version in ["HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/1.1 x", "http/1.1", "HTTP/1", ""] {
        list.push((format!("GET / {version}\r\nHost: web.localhost\r\nConnection: close\r\n\r\n"), false));
    }
    list
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_public_requests_come_out_nowhere_or_at_the_one_tunnel_they_name() {
    let (web, good) = (Upstream::echo().await, Upstream::echo().await);
    let local = Local::start(&[]);
    let tunnel = |name: &str, upstream: &Upstream| {
        format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n", upstream.address())
    };
    let alice = local.token_file(&local.issue("alice", &["web"]));
    let bob = local.token_file(&local.issue("bob", &["good"]));
    let _alice = local.agent_of(&alice, &[], &tunnel("web", &web), &["web"]);
    let _bob = local.agent_of(&bob, &[], &tunnel("good", &good), &["good"]);
    let list = hostile_requests();
    assert!(list.len() >= 100, "{}", list.len());
    let (stop, traffic) = good_traffic(&local, "good");
    let mut wrong = Vec::new();
    for (text, is_web) in &list {
        let before = web.recorded().len();
        let answer = raw(&local, text.as_bytes()).await;
        let came = web.recorded().len() - before;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        let fate = if *is_web {
            came == 1 && status == "200"
        } else {
            came == 0 && (status.is_empty() || status.starts_with(['4', '5']))
        };
        // The echo of a request's own line is in the second half of an answer, at most.
        let one_answer = answer.matches("HTTP/1.1 ").count() <= 1 + came;
        let injected = answer.to_lowercase().contains("\r\nset-cookie: evil");
        if !fate || !one_answer || injected {
            wrong.push(format!(
                "{:?} came {came} times: {}",
                text.chars().take(200).collect::<String>(),
                answer.chars().take(200).collect::<String>()
            ));
        }
    }
    stop.store(true, Ordering::Relaxed);
    let done = traffic.await.unwrap();
    let strays: Vec<String> = good.recorded().iter().map(|request| request.line.clone()).collect();
    assert_eq!(strays.len(), done, "the other tenant got what is not his: {strays:?}");
    assert!(done > 10);
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), list.len(), wrong.join("\n"));
    assert!(!local.process().printed().contains("panicked"));
}

#[tokio::test]
async fn a_request_past_the_front_is_refused() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    // The function's own address, without the front before it.
    for front in ["", "guess", "secret"] {
        let event = serde_json::json!({
            "version": "2.0", "routeKey": "$default", "rawPath": "/", "rawQueryString": "",
            "headers": {"host": "web.localhost", "x-tunnel-host": "web.localhost", "x-tunnel-front": front},
            "requestContext": {"domainName": "abc.lambda-url.on.aws",
                "http": {"method": "GET", "path": "/", "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1", "userAgent": ""}},
            "isBase64Encoded": false,
        });
        let answer = local.invoke("ingress", &event).await;
        assert!(
            answer.text().contains("front_refused") && answer.text().contains("403"),
            "{}",
            answer.text()
        );
    }
    assert!(upstream.recorded().is_empty());
}
