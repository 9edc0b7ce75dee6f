//! The HTTP client for one configured upstream.
//!
//! Enters: a request whose target goes out byte for byte. Leaves: the upstream's answer as it was
//! sent, or why there is none. It follows no redirect, decodes nothing, obeys no proxy variable
//! and dials the configured address only, whatever the request says.

mod http2;
mod pool;
mod socket;
mod way;

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Version, header, uri::PathAndQuery};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use proto::{error::ErrorCode, limits};
use rustix::io::Errno;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

pub(crate) use self::way::Way;
use self::{
    pool::{Checkout, Pool},
    socket::{Socket, Watch},
};
use crate::{
    config::{
        Http2,
        address::{self, Address},
    },
    serve::upload::{UploadBody, UploadError},
};

/// How long opening a connection to an upstream may take. A head may be due sooner.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How much of a response is read ahead of whoever takes it, for each connection. It also bounds
/// the head, with room for what [`limits::HEAD_BYTES`] does not count.
const READ_BUFFER_BYTES: usize = 128 * 1024;

/// How often a request is sent again that the upstream promises not to have touched. Each time goes to another connection.
const MAX_UNTOUCHED: u32 = 100;

/// How many new connections may make that promise about their first request.
const MAX_UNTOUCHED_FIRST: u32 = 3;

/// Why an upstream gave no whole response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// It could not be connected to.
    #[error("the upstream cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    /// TLS could not be agreed on.
    #[error("the upstream's TLS was not accepted: {0}")]
    Tls(#[source] io::Error),
    /// It took too long before a request could be sent.
    #[error("the upstream took too long to {0}")]
    Late(&'static str),
    /// It closed or reset the connection.
    #[error("the upstream broke the connection off")]
    Reset(#[source] Option<Box<dyn StdError + Send + Sync>>),
    /// What it sent is not HTTP, over a limit, or not what was asked for.
    #[error("the upstream's answer is not valid: {reason}")]
    Invalid {
        /// What is wrong with it.
        reason: &'static str,
        /// The parser's view, where there is one.
        #[source]
        source: Option<hyper::Error>,
    },
    /// The request's own body broke off.
    #[error("the request's body was not delivered")]
    Upload(#[source] UploadError),
}

impl UpstreamError {
    pub(crate) const fn invalid(reason: &'static str) -> Self {
        Self::Invalid { reason, source: None }
    }

    /// What the public client is told.
    #[must_use]
    pub(crate) const fn code(&self) -> ErrorCode {
        match self {
            Self::Unreachable(_) => ErrorCode::UpstreamUnreachable,
            Self::Tls(_) => ErrorCode::UpstreamTls,
            Self::Late(_) => ErrorCode::UpstreamTimedOut,
            Self::Reset(_) => ErrorCode::UpstreamReset,
            Self::Invalid { .. } => ErrorCode::UpstreamInvalid,
            Self::Upload(UploadError::Gone | UploadError::Unwanted) => ErrorCode::EdgeFailed,
            Self::Upload(UploadError::Length | UploadError::Range) => ErrorCode::BadRequest,
            Self::Upload(UploadError::OverLimit(code)) => *code,
        }
    }
}

impl From<hyper::Error> for UpstreamError {
    fn from(error: hyper::Error) -> Self {
        let mut cause = StdError::source(&error);
        while let Some(inner) = cause {
            if let Some(&upload) = inner.downcast_ref::<UploadError>() {
                return Self::Upload(upload);
            }
            cause = inner.source();
        }
        if error.is_parse_too_large() {
            Self::Invalid { reason: "its head is too large", source: Some(error) }
        } else if error.is_parse() {
            Self::Invalid { reason: "it is not HTTP", source: Some(error) }
        } else {
            Self::Reset(Some(error.into()))
        }
    }
}

impl UpstreamError {
    /// Why a body could not be read on. What of it is not HTTP comes as an error of reading, and is told by its kind.
    fn of_body(error: hyper::Error) -> Self {
        let cause = StdError::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
        match cause.map(io::Error::kind) {
            Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
                Self::Invalid { reason: "its body is not as HTTP has it", source: Some(error) }
            }
            _ => Self::Reset(Some(error.into())),
        }
    }
}

/// The body of a request to an upstream.
#[derive(Debug)]
pub(crate) enum RequestBody {
    /// Nothing.
    Empty,
    /// Everything at once.
    Whole(Bytes),
    /// Piece by piece.
    Upload(Box<UploadBody>),
}

impl RequestBody {
    /// Whether nobody has said how long it is.
    pub(crate) fn is_of_unknown_length(&self) -> bool {
        matches!(self, Self::Upload(body) if body.announced() == limits::UNKNOWN_LENGTH)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Upload(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Upload(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upload(body) => body.size_hint(),
        }
    }
}

/// How TLS is spoken to one upstream.
#[derive(Clone)]
pub(crate) struct Tls {
    /// Settings with the roots of trust and the protocols offered.
    pub config: Arc<rustls::ClientConfig>,
    /// The name asked for and checked.
    pub server_name: rustls::pki_types::ServerName<'static>,
}

/// One upstream and its idle connections.
pub(crate) struct Upstream {
    address: Address,
    authority: HeaderValue,
    tls: Option<Tls>,
    http2: Http2,
    pool: Arc<Pool>,
}

/// A connection that is ready for a request.
enum Connected {
    Http1(Checkout),
    Http2(http2::Lease),
}

/// Whether a connection has served before.
#[derive(PartialEq, Eq)]
enum Age {
    New,
    Used,
}

impl Upstream {
    /// An upstream at `address`; `tls` is there exactly if its scheme is https.
    ///
    /// A connection is closed when it has been idle for `keep_alive`; without one, none is used twice.
    pub(crate) fn new(
        address: Address,
        tls: Option<Tls>,
        http2: Http2,
        keep_alive: Option<Duration>,
    ) -> Self {
        debug_assert_eq!(tls.is_some(), address.scheme() == address::Scheme::Https);
        let authority = HeaderValue::try_from(address.host_field())
            .expect("an authority of letters, digits and punctuation is a field value");
        let pool = Pool::new(address.clone(), keep_alive);
        Self { address, authority, tls, http2, pool }
    }

    /// Where it listens.
    pub(crate) const fn address(&self) -> &Address {
        &self.address
    }

    /// The upstream's own `host[:port]`, as `host` says it.
    pub(crate) const fn authority(&self) -> &HeaderValue {
        &self.authority
    }

    /// Sends a request and waits for the head of the final response.
    ///
    /// The request has an origin-form URI and a `host` field. It is sent once; again only where it is certain that the
    /// upstream has done nothing with it (nothing of it was written, or HTTP/2 says so), whatever its method, and once
    /// more where a connection that had served before has died and the request is safe and has no body.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection it uses, or resets its stream.
    pub(crate) async fn send(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let mut repeatable = request.method().is_safe() && request.body().is_end_stream();
        let (mut untouched, mut untouched_first) = (0, 0);
        if !self.pool.keeps() {
            request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        let mut used = self.take().await;
        let mut dialled = None;
        loop {
            let (connection, age) = match used.take() {
                Some(connection) => (connection, Age::Used),
                // Boxed: dialling is rare and its state large, and every request would carry room for it.
                None => {
                    let opened = Box::pin(self.open()).await?;
                    dialled = Some(Dialled(std::time::Instant::now()));
                    opened
                }
            };
            let is_used = age == Age::Used;
            request = match connection {
                Connected::Http1(mut connection) => {
                    let again = (is_used && repeatable).then(|| clone_without_body(&request));
                    let number = connection.number();
                    let answer = std::pin::pin!(connection.sender().try_send_request(request));
                    let answer = if is_used { answer.await } else { self.first_answer(number, answer).await };
                    match answer {
                        Ok(mut response) => {
                            if let Some(dialled) = dialled {
                                response.extensions_mut().insert(dialled);
                            }
                            connection.read(response.headers());
                            return Ok(response.map(|body| ResponseBody::http1(body, connection)));
                        }
                        Err(mut error) => {
                            let unsent = error.take_message();
                            let error = error.into_error();
                            match (unsent, again) {
                                (Some(unsent), _) if is_used => unsent,
                                (_, Some(again)) if !error.is_parse() => {
                                    repeatable = false;
                                    again
                                }
                                _ => return Err(error.into()),
                            }
                        }
                    }
                }
                Connected::Http2(lease) => {
                    let (head, body) = request.into_parts();
                    match Box::pin(lease.send(self.for_http2(head.clone()), body)).await {
                        Ok(mut response) => {
                            if let Some(dialled) = dialled {
                                response.extensions_mut().insert(dialled);
                            }
                            return Ok(response.map(ResponseBody::http2));
                        }
                        Err(http2::Failure { untouched: Some(body), error, .. }) => {
                            untouched += 1;
                            untouched_first += u32::from(!is_used);
                            if untouched > MAX_UNTOUCHED || untouched_first > MAX_UNTOUCHED_FIRST {
                                return Err(error);
                            }
                            Request::from_parts(head, body)
                        }
                        Err(http2::Failure { died: true, error, .. })
                            if is_used && repeatable && !matches!(error, UpstreamError::Invalid { .. }) =>
                        {
                            repeatable = false;
                            Request::from_parts(head, RequestBody::Empty)
                        }
                        Err(failure) => return Err(failure.error),
                    }
                }
            };
        }
    }

    /// A connection that has served before and is of use.
    async fn take(&self) -> Option<Connected> {
        match self.take_http2().await {
            Some(lease) => Some(Connected::Http2(lease)),
            None => self.pool.take().map(Connected::Http1),
        }
    }

    async fn take_http2(&self) -> Option<http2::Lease> {
        loop {
            let lease = self.pool.enter_http2()?;
            if lease.is_alive().await {
                return Some(lease);
            }
        }
    }

    /// Waits for what answers the first request on a connection. If that takes long, it is perhaps the older idle
    /// connections that the upstream waits for: those are closed.
    async fn first_answer<T>(&self, number: u64, mut answer: Pin<&mut impl Future<Output = T>>) -> T {
        if let Ok(answer) = timeout(pool::STARVED_AFTER, answer.as_mut()).await {
            return answer;
        }
        let _starving = pool::starve(&self.address, number);
        answer.await
    }

    /// Sends a request for another protocol, on a connection of its own and over HTTP/1.1: HTTP/2 knows no upgrade.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub(crate) async fn upgrade(&self, request: Request<RequestBody>) -> Result<Upgrade, UpstreamError> {
        let socket = self.connect().await?;
        let watch = socket.watch();
        let mut connection = match &self.tls {
            None => self.start_http1(socket, watch).await?,
            Some(tls) => {
                let mut config = (*tls.config).clone();
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                let stream = agree_on_tls(Arc::new(config), tls, socket).await?;
                self.start_http1(stream, watch).await?
            }
        };
        let number = connection.number();
        let answer = std::pin::pin!(connection.sender().send_request(request));
        let mut response = self.first_answer(number, answer).await?;
        if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Upgrade::Refused(response.map(|body| ResponseBody::http1(body, connection))));
        }
        // What came behind the head is in there.
        let io = hyper::upgrade::on(&mut response).await?;
        Ok(Upgrade::Switched(response.into_parts().0, io))
    }

    /// Puts scheme and authority where HTTP/2 wants them: the authority is what `host` says.
    fn for_http2(&self, mut head: http::request::Parts) -> http::request::Parts {
        // What belongs to one connection is not said in HTTP/2 (RFC 9113 §8.2.2).
        head.headers.remove(header::CONNECTION);
        head.headers.remove(header::TRANSFER_ENCODING);
        let host = head.headers.remove(header::HOST);
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(match self.address.scheme() {
            address::Scheme::Http => http::uri::Scheme::HTTP,
            address::Scheme::Https => http::uri::Scheme::HTTPS,
        });
        uri.authority = host
            .and_then(|host| host.as_bytes().try_into().ok())
            .or_else(|| self.authority.as_bytes().try_into().ok());
        uri.path_and_query =
            Some(head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")));
        if let Ok(uri) = http::Uri::from_parts(uri) {
            head.uri = uri;
        }
        head.version = Version::HTTP_2;
        head
    }

    async fn connect(&self) -> Result<Socket, UpstreamError> {
        let connect = async {
            match Socket::connect(&self.address).await {
                Err(error) if is_out_of_descriptors(&error) => {
                    pool::close_idle();
                    // What drives the connections lets go of them first.
                    tokio::task::yield_now().await;
                    Socket::connect(&self.address).await
                }
                connected => connected,
            }
        };
        match timeout(DIAL_TIMEOUT, connect).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Err(UpstreamError::Late(CONNECTION)),
            Ok(connected) => connected.map_err(UpstreamError::Unreachable),
            Err(_) => Err(UpstreamError::Late(CONNECTION)),
        }
    }

    /// A new connection, or one that somebody else has opened meanwhile and that serves both.
    async fn open(&self) -> Result<(Connected, Age), UpstreamError> {
        let may_share = self.pool.keeps()
            && match self.http2 {
                Http2::Always => true,
                Http2::Auto => self.tls.is_some(),
                Http2::Never => false,
            };
        let mut _turn = None;
        if may_share {
            _turn = self.pool.turn().await;
            if let Some(lease) = self.take_http2().await {
                return Ok((Connected::Http2(lease), Age::Used));
            }
        }
        let socket = self.connect().await?;
        let watch = socket.watch();
        let connection = match &self.tls {
            None if self.http2 == Http2::Always => self.start_http2(socket).await?,
            None => Connected::Http1(self.start_http1(socket, watch).await?),
            Some(tls) => {
                let stream = agree_on_tls(Arc::clone(&tls.config), tls, socket).await?;
                let offers_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                match (self.http2, offers_http2) {
                    (_, true) => self.start_http2(stream).await?,
                    (Http2::Always, false) => {
                        return Err(UpstreamError::Tls(io::Error::other("it does not offer HTTP/2")));
                    }
                    (Http2::Auto | Http2::Never, false) => {
                        Connected::Http1(self.start_http1(stream, watch).await?)
                    }
                }
            }
        };
        Ok((connection, Age::New))
    }

    async fn start_http1<S>(&self, stream: S, watch: Watch) -> Result<Checkout, UpstreamError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let number = pool::next_number();
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(READ_BUFFER_BYTES)
            .max_headers(limits::HEADER_FIELDS)
            // RFC 9112 §5.1: a proxy removes the space before a colon in a response.
            .allow_spaces_after_header_name_in_responses(true)
            .handshake(TokioIo::new(stream))
            .await?;
        let connection = connection.with_upgrades();
        let task = tokio::spawn(async move {
            // Its errors reach whoever waits for the response.
            let _ = connection.await;
        });
        Ok(self.pool.check_out_http1(sender, task.abort_handle(), watch, number))
    }

    async fn start_http2<S>(&self, stream: S) -> Result<Connected, UpstreamError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let connection = http2::Connection::begin(stream).await?;
        // The one who opened it comes first.
        let lease = connection.enter().ok_or(UpstreamError::Reset(None))?;
        self.pool.add_http2(&connection);
        Ok(Connected::Http2(lease))
    }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// What an upstream is late with.
const CONNECTION: &str = "accept a connection";

async fn agree_on_tls(
    config: Arc<rustls::ClientConfig>,
    tls: &Tls,
    socket: Socket,
) -> Result<tokio_rustls::client::TlsStream<Socket>, UpstreamError> {
    match timeout(DIAL_TIMEOUT, TlsConnector::from(config).connect(tls.server_name.clone(), socket)).await {
        Ok(agreed) => agreed.map_err(UpstreamError::Tls),
        Err(_) => Err(UpstreamError::Late("agree on TLS")),
    }
}

/// What an upstream made of a request for another protocol.
pub(crate) enum Upgrade {
    /// It speaks the other one from here on.
    Switched(http::response::Parts, hyper::upgrade::Upgraded),
    /// It answered as to any request.
    Refused(Response<ResponseBody>),
}

/// In a response: when the connection was opened, if that was for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialled(pub(crate) std::time::Instant);

/// A copy of a request that has no body.
fn clone_without_body(request: &Request<RequestBody>) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// The body of a response. Dropped before its end it closes the connection it comes from, or resets its stream.
pub(crate) struct ResponseBody(Source);

enum Source {
    Http1(Incoming, Checkout),
    Http2(Box<http2::Body>),
}

impl ResponseBody {
    const fn http1(incoming: Incoming, connection: Checkout) -> Self {
        Self(Source::Http1(incoming, connection))
    }

    fn http2(body: http2::Body) -> Self {
        Self(Source::Http2(Box::new(body)))
    }

    /// Whether everything has been read.
    pub(crate) fn is_end(&self) -> bool {
        match &self.0 {
            Source::Http1(incoming, _) => incoming.is_end_stream(),
            Source::Http2(body) => body.is_end(),
        }
    }

    /// The next bytes as the upstream sent them, `None` at the proper end. Trailers are dropped.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, UpstreamError>> {
        use http_body_util::BodyExt as _;
        let incoming = match &mut self.0 {
            Source::Http1(incoming, _) => incoming,
            Source::Http2(body) => return body.next().await,
        };
        loop {
            match incoming.frame().await? {
                Err(error) => return Some(Err(UpstreamError::of_body(error))),
                Ok(frame) => {
                    if let Ok(bytes) = frame.into_data()
                        && !bytes.is_empty()
                    {
                        return Some(Ok(bytes));
                    }
                }
            }
        }
    }

    /// Gives the connection back for the next request. Only after the whole body was read and
    /// the whole request was sent.
    pub(crate) fn finish(self) {
        if let Source::Http1(_, connection) = self.0 {
            connection.give_back();
        }
    }
}
