//! How upstreams are reached: unix sockets, TLS, HTTP/2.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto::{error::ErrorCode, message::AgentMessage};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::stage::{
    Agent, Edge, Line, OK, Peer, TOKEN, Upstream, get, patiently, private_file, request, with_body,
    with_header,
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// TLS for `localhost`, signed by the fixture's own authority.
fn acceptor(alpn: &[&[u8]]) -> TlsAcceptor {
    acceptor_with("localhost.pem", "localhost.key", alpn)
}

fn acceptor_with(certificate: &str, key: &str, alpn: &[&[u8]]) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(fixture(certificate)).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(fixture(key)).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// An agent whose tunnel `web` has these lines in its configuration.
pub(crate) async fn agent_with(tunnel: &str) -> (Line, Agent, tempfile::TempDir, Edge) {
    let edge = Edge::bind().await;
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let config = format!(
        "[edge]\nurl = \"{}\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\n{tunnel}\n",
        edge.url
    );
    let path = private_file(folder.path(), "agentd.toml", &config).unwrap();
    let agent = Agent::run(&path);
    let line = edge.welcome().await;
    (line, agent, folder, edge)
}

#[tokio::test]
async fn a_unix_socket_is_an_upstream() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut line, _agent, _folder, _edge) =
        agent_with(&format!("upstream = \"unix:{}\"", path.display())).await;
    let sent = get("/x");
    line.request(&sent).await;
    let mut peer = Peer::new(patiently("a call", listener.accept()).await.unwrap().0);
    assert_eq!(peer.head().await, "GET /x HTTP/1.1\r\nhost: localhost:80");
    peer.write(OK).await;
    assert_eq!(line.whole(&sent).await.body, b"ok");
    line.request(&get("/y")).await;
    assert!(peer.head().await.starts_with("GET /y "), "the connection is used again");
}

#[tokio::test]
async fn tls_is_checked_against_the_configured_roots() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = acceptor(&[]);
    let serve = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = tls.accept(stream).await {
                let mut peer = Peer::new(stream);
                assert!(peer.head().await.starts_with("GET /x HTTP/1.1\r\nhost: "));
                peer.write(OK).await;
            }
        }
    });
    let ca = fixture("ca.pem").display().to_string();
    for (settings, works) in [
        (format!("upstream = \"https://localhost:{port}\"\nca_file = \"{ca}\""), true),
        (format!("upstream = \"https://localhost:{port}\""), false),
        (format!("upstream = \"https://localhost:{port}\"\ninsecure_skip_verify = true"), true),
        (format!("upstream = \"https://127.0.0.1:{port}\"\nca_file = \"{ca}\""), false),
        (
            format!(
                "upstream = \"https://127.0.0.1:{port}\"\nca_file = \"{ca}\"\nserver_name = \"localhost\""
            ),
            true,
        ),
    ] {
        let (mut line, _agent, _folder, _edge) = agent_with(&settings).await;
        let sent = get("/x");
        line.request(&sent).await;
        if works {
            assert_eq!(line.whole(&sent).await.body, b"ok", "{settings}");
        } else {
            assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTls), "{settings}");
        }
    }
    serve.abort();
}

/// `self.pem`, `unnamed.pem` (no subjectAltName) and `expired.pem` are what `openssl req -x509` makes, with one key: marked
/// as an authority's own. `impostor.pem` says the same as `self.pem` with another key.
#[tokio::test]
async fn a_certificate_that_is_named_itself_is_trusted_exactly() {
    for (shown, named, host, refused) in [
        ("self", Some("self.pem"), "localhost", None),
        // Signed by somebody else, and named itself.
        ("localhost", Some("localhost.pem"), "localhost", None),
        (
            "impostor",
            Some("self.pem"),
            "localhost",
            Some("authority's own: name exactly this certificate in ca_file"),
        ),
        ("self", None, "localhost", Some("authority's own: name exactly this certificate in ca_file")),
        ("self", Some("self.pem"), "127.0.0.1", Some("set server_name to a name that it has")),
        ("unnamed", Some("unnamed.pem"), "localhost", Some("-addext subjectAltName=DNS:localhost")),
        ("expired", Some("expired.pem"), "localhost", Some("renew it")),
        ("localhost", Some("self.pem"), "localhost", Some("name the authority that signed it")),
        ("plain", Some("self.pem"), "localhost", Some("does not speak TLS: use http://")),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tls = match shown {
            "plain" => None,
            "localhost" => Some(acceptor(&[])),
            "impostor" => Some(acceptor_with("impostor.pem", "impostor.key", &[])),
            mine => Some(acceptor_with(&format!("{mine}.pem"), "self.key", &[])),
        };
        let serve = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            match tls {
                None => Peer::new(stream).write(b"HTTP/1.1 400 Bad Request\r\n\r\n").await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let mut peer = Peer::new(stream);
                        peer.head().await;
                        peer.write(OK).await;
                    }
                }
            }
        });
        let ca_file = named.map(|named| format!("ca_file = \"{}\"", fixture(named).display()));
        let tunnel = format!("upstream = \"https://{host}:{port}\"\n{}", ca_file.unwrap_or_default());
        let (mut line, agent, _folder, _edge) = agent_with(&tunnel).await;
        let sent = get("/x");
        line.request(&sent).await;
        match refused {
            None => assert_eq!(line.whole(&sent).await.body, b"ok", "{shown} {named:?}"),
            Some(advice) => {
                assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTls), "{shown} {named:?}");
                agent.says(advice).await;
            }
        }
        serve.abort();
    }
}

/// Says what it was asked over HTTP/2.
async fn echo(request: http::Request<Incoming>) -> Result<http::Response<Full<Bytes>>, Infallible> {
    let head = format!(
        "{:?} {} {} host={:?} ",
        request.version(),
        request.method(),
        request.uri(),
        request.headers().get("host")
    );
    let body = request.into_body().collect().await.unwrap().to_bytes();
    Ok(http::Response::new(Full::from([head.as_bytes(), &body].concat())))
}

#[tokio::test]
async fn http2_is_spoken_where_it_is_offered_and_without_tls_where_it_is_asked_for() {
    for (scheme, setting) in [("https", "insecure_skip_verify = true"), ("http", "http2 = \"always\"")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tls = (scheme == "https").then(|| acceptor(&[b"h2", b"http/1.1"]));
        let serve = tokio::spawn(async move {
            // One connection serves everything.
            let (stream, _) = listener.accept().await.unwrap();
            let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            match tls {
                None => http2.serve_connection(TokioIo::new(stream), service_fn(echo)).await,
                Some(tls) => {
                    let stream = tls.accept(stream).await.unwrap();
                    http2.serve_connection(TokioIo::new(stream), service_fn(echo)).await
                }
            }
        });
        let (mut line, _agent, _folder, _edge) =
            agent_with(&format!("upstream = \"{scheme}://localhost:{port}\"\n{setting}")).await;
        for _ in 0..3 {
            let sent = with_body(request("POST", "/a//b?%2F"), b"body");
            line.request(&sent).await;
            let whole = line.whole(&sent).await;
            let wanted = format!("HTTP/2.0 POST {scheme}://localhost:{port}/a//b?%2F host=None body");
            assert_eq!(String::from_utf8(whole.body).unwrap(), wanted);
        }
        serve.abort();
    }
}

#[tokio::test]
async fn a_name_becomes_a_connection_as_in_curl() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    // The same port of the other family, where this machine has one.
    let other_family = TcpListener::bind(("::1", 0)).await.ok();
    let v6_port = other_family.as_ref().map(|listener| listener.local_addr().unwrap().port());
    let mut cases = vec![
        (&listener, format!("http://web.localhost:{port}"), format!("web.localhost:{port}")),
        (&listener, format!("http://localhost.:{port}"), format!("localhost.:{port}")),
    ];
    if let (Some(listener), Some(port)) = (&other_family, v6_port) {
        cases.push((listener, format!("http://a.localhost:{port}"), format!("a.localhost:{port}")));
        cases.push((listener, format!("http://[::1%lo]:{port}"), format!("[::1]:{port}")));
        cases.push((listener, format!("[::1%251]:{port}"), format!("[::1]:{port}")));
    }
    for (listener, address, host) in cases {
        let (mut line, _agent, _folder, _edge) = agent_with(&format!("upstream = \"{address}\"")).await;
        let sent = get("/x");
        line.request(&sent).await;
        let mut peer = Peer::new(patiently(&address, listener.accept()).await.unwrap().0);
        assert_eq!(peer.head().await, format!("GET /x HTTP/1.1\r\nhost: {host}"));
        peer.write(OK).await;
        assert_eq!(line.whole(&sent).await.body, b"ok", "{address}");
    }
    let (mut line, agent, _folder, _edge) = agent_with("upstream = \"http://[fe80::1%nowhere9]:80\"").await;
    line.request(&get("/")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
    agent.says("no interface \\\"nowhere9\\\"").await;
}

#[tokio::test]
async fn what_takes_too_long_before_the_request_is_late_and_no_other_failure() {
    // Nothing is said after the connection was accepted.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    // Whose backlog is full drops what comes.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let _waiting = [std::net::TcpStream::connect(address).unwrap()];
    let late = |tunnel: String, what: &'static str| async move {
        let (mut line, agent, _folder, _edge) = agent_with(&tunnel).await;
        line.request(&get("/")).await;
        let mut socket = get("/socket");
        socket.upgrade = Some(proto::message::Upgrade::Websocket);
        line.request(&socket).await;
        for _ in 0..2 {
            assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTimedOut), "{what}");
        }
        agent.says(what).await;
    };
    tokio::join!(
        late(format!("upstream = \"https://localhost:{silent_port}\""), "took too long to agree on TLS"),
        late(format!("upstream = {}", address.port()), "took too long to accept a connection"),
    );
}

#[tokio::test]
async fn the_rules_for_answers_hold_for_the_one_that_opens_a_websocket() {
    let upstream = Upstream::bind().await;
    let (mut line, _agent, _folder, _edge) = agent_with(&format!(
        "upstream = 1\nresponse_headers = {{ remove = [\"x-old\"], set = {{ x-new = \"${{tunnel}}\" }} }}\n\
         cors = {{ origins = [\"https://app.example\"] }}\n\
         [[tunnel.route]]\npath = \"/app\"\nstrip_prefix = true\nupstream = {}",
        upstream.port
    ))
    .await;
    let mut socket = with_header(get("/app/live"), "origin", b"https://app.example");
    socket.upgrade = Some(proto::message::Upgrade::Websocket);
    line.request(&socket).await;
    let mut peer = upstream.accept().await;
    let head = peer.head().await;
    assert!(head.starts_with("GET /live HTTP/1.1\r\n"), "{head}");
    let key = head.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ")).unwrap();
    let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
    peer.write(format!(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-accept: {accept}\r\nx-old: 1\r\nset-cookie: a=1; Path=/\r\n\
         access-control-allow-origin: *\r\n\r\n"
    ))
    .await;
    let text = line.text().await.unwrap();
    let AgentMessage::Accepted(accepted) = AgentMessage::decode(&text).unwrap() else { panic!("{text}") };
    let mut fields: Vec<_> =
        accepted.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    fields.sort_unstable();
    let wanted = [
        ("access-control-allow-origin", "https://app.example"),
        ("set-cookie", "a=1; Path=/app"),
        ("vary", "origin"),
        ("x-new", "web"),
    ];
    assert_eq!(fields, wanted);
}
