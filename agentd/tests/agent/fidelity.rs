//! What goes in comes out: targets, methods, fields, statuses.

use proto::error::ErrorCode;

use crate::stage::{Manners, OK, connected, connected_with, get, request, with_body, with_header};

#[tokio::test]
async fn a_small_response_is_exactly_one_message() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for response in [
        OK,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok",
    ] {
        let request = get("/");
        line.request(&request).await;
        let (peer, _) = upstream.answer(response).await;
        drop(peer);
        let whole = line.whole(&request).await;
        assert_eq!((whole.status, &whole.body[..], whole.messages), (200, &b"ok"[..], 1));
        assert!(whole.all("transfer-encoding").is_empty() && whole.all("connection").is_empty());
    }
}

#[tokio::test]
async fn the_target_goes_out_byte_for_byte() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/warm-up")).await;
    let (mut peer, _) = upstream.answer(OK).await;
    line.answer().await;
    for target in [
        "/",
        "//",
        "//evil/",
        "/@evil/",
        "/a//b",
        "/%2F",
        "/%2e%2e/x",
        "/../x",
        "/a;b=c",
        "/a|b",
        "/a?",
        "/?",
        "/?a=1&a=2",
        "/%FF",
        "/a+b?c+d=%20",
        "/{x}",
        "/\"",
        "*",
        "/a?b?c",
        "/[::1]/",
        "/http://169.254.169.254/",
        "/a\\b",
    ] {
        line.request(&request("OPTIONS", target)).await;
        let head = peer.head().await;
        assert!(head.starts_with(&format!("OPTIONS {target} HTTP/1.1\r\n")), "{head:?}");
        peer.write(OK).await;
        line.answer().await;
    }
}

#[tokio::test]
async fn request_fields_keep_order_and_repetition() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let mut sent = get("/x");
    for (name, value) in [
        ("host", &b"public.example.com"[..]),
        ("b", b"1"),
        ("a", b"2"),
        ("b", b"3"),
        ("cookie", b"x=1, y"),
        ("cookie", b"z=2"),
        ("empty", b""),
        ("obs", b"\xe4\xff"),
        ("connection", b"close, X-Hop, host, content-length, x-forwarded-for"),
        ("x-hop", b"gone"),
        ("keep-alive", b"gone"),
        ("te", b"trailers"),
        ("expect", b"100-continue"),
        ("proxy-connection", b"gone"),
        ("upgrade", b"h2c"),
        ("x-forwarded-for", b"192.0.2.1"),
        ("accept-encoding", b"gzip, br"),
    ] {
        sent = with_header(sent, name, value);
    }
    line.request(&sent).await;
    let (_peer, head) = upstream.answer(OK).await;
    let wanted = format!(
        "GET /x HTTP/1.1\r\nhost: localhost:{}\r\nb: 1\r\nb: 3\r\na: 2\r\ncookie: x=1, y\r\ncookie: z=2\r\nempty: \r\n\
         obs: \u{e4}\u{ff}\r\nx-forwarded-for: 192.0.2.1\r\naccept-encoding: gzip, br",
        upstream.port
    );
    assert_eq!(head, wanted);
}

#[tokio::test]
async fn host_is_what_the_rule_says() {
    for (rule, wanted) in
        [("upstream", None), ("preserve", Some("web.example.com:8443")), ("app.test", Some("app.test"))]
    {
        let (_edge, mut line, upstream, _agent) =
            connected_with(Manners::default(), &["--host-header", rule]).await;
        let sent = with_header(get("/"), "host", b"inner.example.com");
        line.request(&with_header(sent, "x-forwarded-host", b"web.example.com:8443")).await;
        let (_peer, head) = upstream.answer(OK).await;
        let own = format!("localhost:{}", upstream.port);
        let host = format!("\r\nhost: {}\r\n", wanted.unwrap_or(&own));
        assert!(head.contains(&host), "{rule}: {head}");
        assert_eq!(head.matches("\r\nhost:").count(), 1);
    }
}

#[tokio::test]
async fn any_method_and_the_exact_length_of_any_body() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    for (method, body, lied, length) in [
        ("M-SEARCH", &b"abc"[..], None, Some("3")),
        ("PROPFIND", b"", None, None),
        ("QUERY", b"\xff\x00", Some("17"), Some("2")),
        ("POST", b"", None, Some("0")),
        ("DELETE", b"", Some("0"), Some("0")),
        ("get", b"", None, None),
    ] {
        let mut sent = with_body(request(method, "/"), body);
        if let Some(lied) = lied {
            sent = with_header(sent, "content-length", lied.as_bytes());
        }
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        let head = peer.head().await;
        assert!(head.starts_with(&format!("{method} / ")), "{head}");
        let lengths: Vec<_> = head.lines().filter_map(|line| line.strip_prefix("content-length: ")).collect();
        assert_eq!(lengths, length.into_iter().collect::<Vec<_>>(), "{method}");
        assert!(!head.contains("transfer-encoding"));
        assert_eq!(peer.bytes(body.len()).await, body);
        peer.write("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
        assert!(line.answer().await.is_end());
    }
}

#[tokio::test]
async fn responses_without_a_body_keep_their_fields() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    line.request(&get("/")).await;
    let (mut peer, _) = upstream.answer(OK).await;
    line.answer().await;
    for (method, status) in
        [("HEAD", "200 OK"), ("GET", "304 Not Modified"), ("GET", "204 No Content"), ("HEAD", "404 No")]
    {
        let sent = request(method, "/");
        line.request(&sent).await;
        peer.head().await;
        let length = if status.starts_with("204") { "" } else { "content-length: 1234\r\n" };
        peer.write(format!("HTTP/1.1 {status}\r\n{length}etag: \"x\"\r\n\r\n")).await;
        let whole = line.whole(&sent).await;
        assert_eq!((whole.body.len(), whole.messages), (0, 1), "{status}");
        assert_eq!(whole.all("etag"), [b"\"x\""]);
        let wanted: &[&[u8]] = if status.starts_with("204") { &[] } else { &[b"1234"] };
        assert_eq!(whole.all("content-length"), wanted, "{status}");
    }
    let sent = get("/");
    line.request(&sent).await;
    peer.head().await;
    peer.write("HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(line.whole(&sent).await.status, 205);
}

#[tokio::test]
async fn response_fields_keep_order_and_repetition() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = get("/");
    line.request(&sent).await;
    let (_peer, _) = upstream
        .answer(
            b"HTTP/1.1 418 I'm a teapot\r\nX-B: 1\r\nset-cookie: a=1; Expires=Wed, 01 Jan\r\nSet-Cookie: b=2\r\nX-A: \xe4\r\n\
              Connection: X-Hop, Set-Cookie, Content-Length\r\nX-Hop: gone\r\nKeep-Alive: timeout=5\r\nlocation: http://other/\r\n\
              content-encoding: gzip\r\nempty:\r\nContent-Length: 5\r\n\r\nnogzip",
        )
        .await;
    let whole = line.whole(&sent).await;
    let fields: Vec<_> = whole
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {}", value.as_bytes().escape_ascii()))
        .collect();
    assert_eq!(
        fields,
        [
            "x-b: 1",
            "set-cookie: a=1; Expires=Wed, 01 Jan",
            "set-cookie: b=2",
            "x-a: \\xe4",
            "location: http://other/",
            "content-encoding: gzip",
            "empty: ",
            "content-length: 5",
        ]
    );
    assert_eq!((whole.status, &whole.body[..]), (418, &b"nogzi"[..]));
}

#[tokio::test]
async fn interim_responses_and_redirects_are_not_acted_on() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = with_header(with_body(request("POST", "/"), b"x"), "expect", b"100-continue");
    line.request(&sent).await;
    let (_peer, head) = upstream
        .answer(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n\
              HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
    assert!(!head.contains("expect"));
    let whole = line.whole(&sent).await;
    assert_eq!((whole.status, whole.all("location")), (302, vec![&b"/elsewhere"[..]]));
    assert!(whole.all("link").is_empty());
    assert!(upstream.is_untouched().await, "no redirect is followed");
}

#[tokio::test]
async fn upgrades_are_refused_at_once() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let upgrade = with_header(with_header(get("/"), "connection", b"upgrade"), "upgrade", b"websocket");
    for sent in [upgrade, request("CONNECT", "/")] {
        line.request(&sent).await;
        assert_eq!(line.failure().await, (0, ErrorCode::UpgradeUnsupported));
    }
    assert!(upstream.is_untouched().await);
    line.request(&get("/")).await;
    let _peer = upstream
        .answer(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        .await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamInvalid));
}

#[tokio::test]
async fn trailers_are_dropped_and_the_body_is_whole() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = get("/");
    line.request(&sent).await;
    let _peer = upstream
        .answer(
            b"HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
        )
        .await;
    let whole = line.whole(&sent).await;
    assert_eq!(whole.body, b"abc");
    assert!(whole.headers.is_empty(), "{:?}", whole.headers);
}

#[tokio::test]
async fn no_proxy_variable_is_obeyed() {
    use crate::stage::{Agent, Edge, TOKEN, Upstream, agentd};
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let mut command = agentd();
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env(name, "http://127.0.0.1:9");
    }
    command.env("AGENTD_TOKEN", TOKEN).env("AGENTD_EDGE", &edge.url);
    command.args(["http", &upstream.port.to_string(), "--name", "web"]);
    let _agent = Agent::spawn(command);
    let mut line = edge.welcome().await;
    line.request(&get("/")).await;
    let _peer = upstream.answer(OK).await;
    assert!(line.answer().await.is_end());
}
