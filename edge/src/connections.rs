//! HTTP/1.1 connections that are used again. Enters: a request. Leaves: its answer, read to the end.
//!
//! `hyper-util`'s client finds a connection by hashing the host's name, letter by letter, several times a request, and knows
//! nothing of time in which the process stood still. Here a connection that was silent for 20 s is not used again. Every
//! answer is read whole, since nobody here reads one piece by piece.

use std::{
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderValue, Request, Response, Uri, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::Body;
use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use proto::limits;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use tower_service::Service as _;

/// After so much silence a connection may be gone without a word: Lambda freezes the process, and what watches its
/// connections with it. AWS closes idle ones after 20 s and more.
const IDLE: Duration = Duration::from_secs(20);

/// How much is waited for and taken.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long it may take until there is a connection.
    pub connect: Option<Duration>,
    /// How long it may take until the answer is read.
    pub answer: Option<Duration>,
    /// The most bytes of an answer's body.
    pub bytes: usize,
}

/// The most bytes of an answer that wait in a connection. By itself hyper takes up to 400 KB; a long answer is copied into one
/// piece either way.
const BUFFER_BYTES: usize = 64 * 1024;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The request's target names no host.
    #[error("the target has no host")]
    NoHost,
    /// No connection came about, so nothing was sent.
    #[error("no connection: {0}")]
    Connect(#[source] BoxError),
    /// It took longer than the bounds allow.
    #[error("no answer in time")]
    Late,
    /// The connection ended, or what came over it is not HTTP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The answer has more bytes than are taken.
    #[error("the answer is too long")]
    TooLong,
}

/// Connections, over which requests with the body `B` go. Clones share them.
#[derive(Debug)]
pub struct Connections<B>(Arc<Shared<B>>);

impl<B> Clone for Connections<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Shared<B> {
    tcp: HttpsConnector<HttpConnector>,
    most_idle: Duration,
    /// One for each endpoint: a handful.
    hosts: Mutex<Vec<Host<B>>>,
}

/// Connections to one host that nobody uses now, the one that was used last at the end.
#[derive(Debug)]
struct Host<B> {
    scheme: Scheme,
    authority: Authority,
    unused: Vec<Unused<B>>,
}

#[derive(Debug)]
struct Unused<B> {
    connection: http1::SendRequest<B>,
    /// By the clock on the wall: the other one may stand still while the process is frozen.
    since: SystemTime,
}

impl<B> Unused<B> {
    fn is_good(&self, most_idle: Duration) -> bool {
        // A clock that was set back says nothing.
        !self.connection.is_closed() && self.since.elapsed().is_ok_and(|silent| silent < most_idle)
    }
}

impl<B> Host<B> {
    fn is_of(&self, uri: &Uri) -> bool {
        uri.authority().is_some_and(|authority| authority.as_str() == self.authority.as_str())
            && uri.scheme() == Some(&self.scheme)
    }
}

impl<B> Connections<B>
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    /// `is_plain` says that nothing is asked over TLS: the roots of trust are then not read, and nobody is trusted.
    #[must_use]
    pub fn new(is_plain: bool) -> Self {
        Self::with(if is_plain { RootCertStore::empty() } else { roots() }, IDLE)
    }

    /// Connections to whom `roots` trust, which may be silent for `most_idle`.
    fn with(roots: RootCertStore, most_idle: Duration) -> Self {
        let tls = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider has what TLS 1.2 and 1.3 need")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        // It is the one below TLS.
        tcp.enforce_http(false);
        let tcp = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Self(Arc::new(Shared { tcp, most_idle, hosts: Mutex::new(Vec::new()) }))
    }

    /// Sends a request with an absolute target.
    ///
    /// A request that finds its connection closed, before anything of it was written, goes over another one. Nothing is sent
    /// twice.
    ///
    /// # Errors
    ///
    /// See [`SendError`].
    pub async fn send(&self, request: Request<B>, bounds: Bounds) -> Result<Response<Bytes>, SendError> {
        within(bounds.answer, self.exchange(request, bounds)).await
    }

    async fn exchange(&self, request: Request<B>, bounds: Bounds) -> Result<Response<Bytes>, SendError> {
        let (uri, mut request) = to_host(request)?;
        loop {
            let known = self.0.take(&uri);
            let is_known = known.is_some();
            let mut connection = match known {
                Some(connection) => connection,
                // Seldom, and large: whoever sends moves this future.
                None => Box::pin(within(bounds.connect, self.0.connect(&uri))).await?,
            };
            // The task that has read the last answer to its end is about to find that it has.
            if is_known && connection.ready().await.is_err() {
                continue;
            }
            match connection.try_send_request(request).await {
                Ok(answer) => return self.0.read(&uri, connection, answer, bounds.bytes).await,
                Err(mut error) => match error.take_message() {
                    // Closed by the other side while nobody used it: nothing of the request was written.
                    Some(unsent) if is_known => request = unsent,
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }
}

/// The roots of trust of this machine.
fn roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(found.certs);
    if taken == 0 {
        tracing::warn!(errors = ?found.errors, "no roots of trust were found");
    }
    roots
}

impl<B> Shared<B>
where
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    async fn connect(&self, uri: &Uri) -> Result<http1::SendRequest<B>, SendError> {
        let stream = self.tcp.clone().call(uri.clone()).await.map_err(SendError::Connect)?;
        let (sender, connection) = http1::Builder::new().max_buf_size(BUFFER_BYTES).handshake(stream).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
        Ok(sender)
    }

    async fn read(
        &self,
        uri: &Uri,
        connection: http1::SendRequest<B>,
        answer: Response<hyper::body::Incoming>,
        most: usize,
    ) -> Result<Response<Bytes>, SendError> {
        let (head, body) = answer.into_parts();
        let body = read(body, most).await?;
        // Who fails may be one of several behind the same name: the next attempt is to find another one.
        if !head.status.is_server_error() {
            self.keep(uri, connection);
        }
        Ok(Response::from_parts(head, body))
    }

    fn hosts(&self) -> MutexGuard<'_, Vec<Host<B>>> {
        // Nothing that runs under the lock can panic half way.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, uri: &Uri) -> Option<http1::SendRequest<B>> {
        let mut hosts = self.hosts();
        let host = hosts.iter_mut().find(|host| host.is_of(uri))?;
        while let Some(unused) = host.unused.pop() {
            if unused.is_good(self.most_idle) {
                return Some(unused.connection);
            }
        }
        None
    }

    fn keep(&self, uri: &Uri, connection: http1::SendRequest<B>) {
        let unused = Unused { connection, since: SystemTime::now() };
        let mut hosts = self.hosts();
        if let Some(host) = hosts.iter_mut().find(|host| host.is_of(uri)) {
            host.unused.retain(|unused| unused.is_good(self.most_idle));
            host.unused.push(unused);
        } else if let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) {
            let (scheme, authority) = (scheme.clone(), authority.clone());
            hosts.push(Host { scheme, authority, unused: vec![unused] });
        }
    }
}

async fn within<T>(
    limit: Option<Duration>,
    future: impl Future<Output = Result<T, SendError>>,
) -> Result<T, SendError> {
    let future = pin!(future);
    match limit {
        None => future.await,
        Some(limit) => tokio::time::timeout(limit, future).await.unwrap_or(Err(SendError::Late)),
    }
}

/// Takes the host out of a request's target and names it in a field.
fn to_host<B>(mut request: Request<B>) -> Result<(Uri, Request<B>), SendError> {
    let uri = std::mem::take(request.uri_mut());
    let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
        return Err(SendError::NoHost);
    };
    let own = if *scheme == Scheme::HTTPS { 443 } else { 80 };
    let name = authority.as_str().rsplit('@').next().unwrap_or_default();
    let name = if authority.port_u16() == Some(own) { authority.host() } else { name };
    let name = HeaderValue::from_str(name).map_err(|_| SendError::NoHost)?;
    request.headers_mut().entry(header::HOST).or_insert(name);
    *request.uri_mut() =
        uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")).into();
    Ok((uri, request))
}

/// Reads a whole body of at most so many bytes. Most come in one piece, which is not copied; the pieces of a long one are not kept until the last.
///
/// # Errors
///
/// [`SendError::TooLong`], or what ends the body.
pub async fn read<B: Body<Data = Bytes, Error: Into<SendError>> + Unpin>(
    mut body: B,
    most: usize,
) -> Result<Bytes, SendError> {
    let length = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX).min(limits::EVENT_BYTES);
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(Into::into)?.into_data() else { continue };
        if first.len() + whole.len() + data.len() > most {
            return Err(SendError::TooLong);
        }
        if first.is_empty() && whole.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            whole.reserve(length);
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&data);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http_body_util::Full;
    use rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    };
    use tokio::{
        io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const BOUNDS: Bounds = Bounds { connect: Some(Duration::from_secs(10)), answer: None, bytes: 2 };
    const FINE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    const LAST: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
    const FAILED: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}";
    const REFUSED: &str = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
    const CUT_OFF: &str = "HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}";

    /// A server that gives every request the same answer, and after `most` of them closes without a word.
    struct Server {
        url: String,
        connections: Arc<AtomicUsize>,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        async fn start(answer: &'static str, most: usize) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/path?a=b", listener.local_addr().unwrap());
            let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<_>>>::default());
            let (counted, came) = (connections.clone(), requests.clone());
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    counted.fetch_add(1, Ordering::SeqCst);
                    tokio::spawn(serve(stream, answer, most, came.clone()));
                }
            });
            Self { url, connections, requests }
        }

        fn counts(&self) -> (usize, usize) {
            (self.connections.load(Ordering::SeqCst), self.requests.lock().unwrap().len())
        }
    }

    async fn serve(
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        answer: &'static str,
        most: usize,
        came: Arc<Mutex<Vec<String>>>,
    ) {
        for _ in 0..most {
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            // The body is one JSON object, the last thing of the request.
            while !request.ends_with(b"}") {
                match stream.read(&mut buffer).await {
                    Ok(read @ 1..) => request.extend_from_slice(&buffer[..read]),
                    _ => return,
                }
            }
            came.lock().unwrap().push(String::from_utf8(request).unwrap());
            if stream.write_all(answer.as_bytes()).await.is_err() || answer == CUT_OFF {
                return;
            }
        }
    }

    fn request(url: &str) -> Request<Full<Bytes>> {
        Request::post(url).body(Full::from("{}")).unwrap()
    }

    async fn call(connections: &Connections<Full<Bytes>>, url: &str) -> Result<(u16, String), SendError> {
        let answer = connections.send(request(url), BOUNDS).await?;
        Ok((answer.status().as_u16(), String::from_utf8(answer.into_body().to_vec()).unwrap()))
    }

    async fn three(answer: &'static str, most: usize, idle: Duration) -> (usize, usize) {
        let server = Server::start(answer, most).await;
        let connections = Connections::with(RootCertStore::empty(), idle);
        for _ in 0..3 {
            let status = answer[9..12].parse().unwrap();
            assert_eq!(call(&connections, &server.url).await.unwrap(), (status, "{}".to_owned()));
        }
        server.counts()
    }

    #[tokio::test]
    async fn a_connection_is_used_again_unless_it_was_silent_for_long_or_failed() {
        assert_eq!(three(FINE, 9, IDLE).await, (1, 3));
        assert_eq!(three(REFUSED, 9, IDLE).await, (1, 3));
        assert_eq!(three(FINE, 9, Duration::ZERO).await, (3, 3));
        assert_eq!(three(FAILED, 9, IDLE).await, (3, 3));
        assert_eq!(three(LAST, 9, IDLE).await, (3, 3));
    }

    #[tokio::test]
    async fn what_was_closed_without_a_word_is_replaced_and_each_request_arrives_once() {
        for _ in 0..20 {
            assert_eq!(three(FINE, 1, IDLE).await, (3, 3));
        }
    }

    #[tokio::test]
    async fn calls_at_once_have_a_connection_each_and_leave_them_to_the_next() {
        let server = Server::start(FINE, 9).await;
        let connections = Connections::new(true);
        for _ in 0..2 {
            let both = tokio::join!(call(&connections, &server.url), call(&connections, &server.url));
            assert!(both.0.is_ok() && both.1.is_ok());
        }
        assert_eq!(server.counts(), (2, 4));
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_off_is_an_error_and_nothing_is_sent_again() {
        let server = Server::start(CUT_OFF, 9).await;
        let connections = Connections::new(true);
        for count in 1..3 {
            let error = call(&connections, &server.url).await.unwrap_err();
            assert!(matches!(error, SendError::Http(_)), "{error:?}");
            assert_eq!(server.counts(), (count, count));
        }
    }

    #[tokio::test]
    async fn a_connection_that_does_not_come_about_in_time_is_late() {
        // It takes the connection and knows nothing of TLS.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}/", silent.local_addr().unwrap());
        let bounds = Bounds { connect: Some(Duration::from_millis(20)), ..BOUNDS };
        let late = Connections::new(true).send(request(&url), bounds).await;
        assert!(matches!(late, Err(SendError::Late)), "{late:?}");
    }

    #[tokio::test]
    async fn over_tls_the_hosts_certificate_is_asked_for_and_held_against_the_roots() {
        const CERTIFICATE: &str = include_str!("../../agentd/tests/fixtures/localhost.pem");
        const KEY: &str = include_str!("../../agentd/tests/fixtures/localhost.key");
        const ROOT: &str = include_str!("../../agentd/tests/fixtures/ca.pem");

        let chain = CertificateDer::pem_slice_iter(CERTIFICATE.as_bytes()).map(Result::unwrap).collect();
        let tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(stream).await {
                    tokio::spawn(serve(stream, FINE, 9, Arc::default()));
                }
            }
        });
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ROOT.as_bytes()).unwrap()).unwrap();
        let trusting = Connections::with(roots, IDLE);
        let named = format!("https://localhost:{port}/");
        assert_eq!(call(&trusting, &named).await.unwrap().0, 200);
        // Nobody is trusted, and the name is another.
        for (connections, url) in
            [(Connections::new(true), named), (trusting, format!("https://127.0.0.2:{port}/"))]
        {
            let refused = call(&connections, &url).await;
            assert!(matches!(refused, Err(SendError::Connect(_))), "{url}: {refused:?}");
        }
    }

    #[tokio::test]
    async fn a_host_is_named_without_its_schemes_own_port() {
        for (url, name, target) in [
            ("https://sqs.eu-central-1.amazonaws.com/", "sqs.eu-central-1.amazonaws.com", "/"),
            ("https://a.example:443/b/c?d=e", "a.example", "/b/c?d=e"),
            ("https://a.example:80", "a.example:80", "/"),
            ("http://127.0.0.1:4566/x", "127.0.0.1:4566", "/x"),
            ("http://127.0.0.1:80/x", "127.0.0.1", "/x"),
            ("http://user:password@[::1]:81/x", "[::1]:81", "/x"),
        ] {
            let (_, request) = to_host(request(url)).unwrap();
            assert_eq!(
                (&request.headers()["host"], &*request.uri().to_string()),
                (&name.parse().unwrap(), target)
            );
        }
        assert!(matches!(to_host(request("/x")), Err(SendError::NoHost)));
        let server = Server::start(FINE, 1).await;
        call(&Connections::new(true), &server.url).await.unwrap();
        let came = server.requests.lock().unwrap().join("");
        assert!(came.starts_with("POST /path?a=b HTTP/1.1\r\n"), "{came}");
    }

    #[tokio::test]
    async fn a_body_is_read_whole_or_is_too_long_whatever_it_says_of_its_length() {
        use std::iter;

        use http_body::Frame;
        use http_body_util::StreamBody;

        for pieces in [vec![], vec!["a"], vec!["", "a"], vec!["a", "bc", "", "d"]] {
            let frames = || {
                let data = pieces.iter().map(|piece| Frame::data(Bytes::from(*piece)));
                let trailers = iter::once(Frame::trailers(http::HeaderMap::new()));
                data.chain(trailers).map(Ok::<_, SendError>).collect::<Vec<_>>()
            };
            let body = |frames| StreamBody::new(futures_util::stream::iter(frames));
            let whole = pieces.concat();
            assert_eq!(read(body(frames()), whole.len()).await.unwrap(), whole, "{pieces:?}");
            if let Some(less) = whole.len().checked_sub(1) {
                assert!(matches!(read(body(frames()), less).await, Err(SendError::TooLong)), "{pieces:?}");
            }
        }
    }
}
