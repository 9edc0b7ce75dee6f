//! How upstreams are reached: unix sockets, TLS, HTTP/2.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto::error::ErrorCode;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::stage::{Agent, Edge, Line, Peer, TOKEN, get, patiently, private_file, request, with_body};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// TLS for `localhost`, signed by the fixture's own authority.
fn acceptor(alpn: &[&[u8]]) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain =
        CertificateDer::pem_file_iter(fixture("localhost.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(fixture("localhost.key")).unwrap();
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
