//! The HTTP client for one configured upstream.
//!
//! Enters: a request whose target goes out byte for byte. Leaves: the upstream's answer as it was
//! sent, or why there is none. It follows no redirect, decodes nothing, obeys no proxy variable
//! and dials the configured address only, whatever the request says.

mod pool;
mod resolver;
mod socket;

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
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proto::{error::ErrorCode, limits};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use self::{
    pool::{Checkout, Pool, Sender},
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

/// How much of an HTTP/2 response may be under way.
const STREAM_WINDOW_BYTES: u32 = 512 * 1024;

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

/// The body of a request to an upstream.
#[derive(Debug)]
pub(crate) enum RequestBody {
    /// Nothing.
    Empty,
    /// Everything at once.
    Whole(Bytes),
    /// Piece by piece.
    Upload(UploadBody),
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

impl Upstream {
    /// An upstream at `address`; `tls` is there exactly if its scheme is https.
    pub(crate) fn new(address: Address, tls: Option<Tls>, http2: Http2) -> Self {
        debug_assert_eq!(tls.is_some(), address.scheme() == address::Scheme::Https);
        let authority = HeaderValue::try_from(address.host_field())
            .expect("an authority of letters, digits and punctuation is a field value");
        Self { address, authority, tls, http2, pool: Arc::new(Pool::default()) }
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
    /// The request has an origin-form URI and a `host` field. It is sent once; only where it is
    /// certain that nothing of it was written on a pooled connection, or where that connection has died and
    /// the request is safe and has no body, it is sent once more, on a new connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection it uses.
    pub(crate) async fn send(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let repeatable = request.method().is_safe() && request.body().is_end_stream();
        let mut idle = self.pool.take();
        loop {
            let (mut connection, pooled) = match idle.take() {
                Some(connection) => (connection, true),
                // Boxed: dialling is rare and its state large, and every request would carry room for it.
                None => (Box::pin(self.open()).await?, false),
            };
            let again = (pooled && repeatable).then(|| clone_without_body(&request));
            let error = match connection.sender() {
                Sender::Http1(sender) => match sender.try_send_request(request).await {
                    Ok(response) => return Ok(response.map(|body| ResponseBody::new(body, connection))),
                    Err(error) => error,
                },
                Sender::Http2(sender) => {
                    let request = self.for_http2(request);
                    match sender.try_send_request(request).await {
                        Ok(response) => return Ok(response.map(|body| ResponseBody::new(body, connection))),
                        Err(error) => error,
                    }
                }
            };
            let died = match connection.sender() {
                Sender::Http1(_) => true,
                // A stream that was reset says nothing about its connection: the upstream has the request.
                Sender::Http2(sender) => !sender.is_ready(),
            };
            let mut error = error;
            let unsent = error.take_message();
            let error = error.into_error();
            request = match (unsent, again) {
                (Some(unsent), _) if pooled => unsent,
                (_, Some(again)) if died && !error.is_parse() => again,
                _ => return Err(error.into()),
            };
        }
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
        let Sender::Http1(sender) = connection.sender() else {
            return Err(UpstreamError::invalid("it speaks HTTP/2 only"));
        };
        let mut response = sender.send_request(request).await?;
        if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Upgrade::Refused(response.map(|body| ResponseBody::new(body, connection))));
        }
        // What came behind the head is in there.
        let io = hyper::upgrade::on(&mut response).await?;
        Ok(Upgrade::Switched(response.into_parts().0, io))
    }

    /// Puts scheme and authority where HTTP/2 wants them: the authority is what `host` says.
    fn for_http2(&self, request: Request<RequestBody>) -> Request<RequestBody> {
        let (mut head, body) = request.into_parts();
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
        Request::from_parts(head, body)
    }

    async fn connect(&self) -> Result<Socket, UpstreamError> {
        match timeout(DIAL_TIMEOUT, Socket::connect(&self.address)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Err(UpstreamError::Late(CONNECTION)),
            Ok(connected) => connected.map_err(UpstreamError::Unreachable),
            Err(_) => Err(UpstreamError::Late(CONNECTION)),
        }
    }

    async fn open(&self) -> Result<Checkout, UpstreamError> {
        let socket = self.connect().await?;
        let watch = socket.watch();
        let Some(tls) = &self.tls else {
            return match self.http2 {
                Http2::Always => self.start_http2(socket).await,
                Http2::Auto | Http2::Never => self.start_http1(socket, watch).await,
            };
        };
        let stream = agree_on_tls(Arc::clone(&tls.config), tls, socket).await?;
        let offers_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        match (self.http2, offers_http2) {
            (_, true) => self.start_http2(stream).await,
            (Http2::Always, false) => Err(UpstreamError::Tls(io::Error::other("it does not offer HTTP/2"))),
            (Http2::Auto | Http2::Never, false) => self.start_http1(stream, watch).await,
        }
    }

    async fn start_http1<S>(&self, stream: S, watch: Watch) -> Result<Checkout, UpstreamError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
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
        Ok(self.pool.check_out_http1(sender, task.abort_handle(), watch))
    }

    async fn start_http2<S>(&self, stream: S) -> Result<Checkout, UpstreamError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(4 * STREAM_WINDOW_BYTES)
            .max_header_list_size(READ_BUFFER_BYTES as u32)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(self.pool.check_out_http2(sender))
    }
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

/// A copy of a request that has no body.
fn clone_without_body(request: &Request<RequestBody>) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// The body of a response. Dropped before its end it closes the connection it comes from.
pub(crate) struct ResponseBody {
    incoming: Incoming,
    connection: Option<Checkout>,
}

impl ResponseBody {
    const fn new(incoming: Incoming, connection: Checkout) -> Self {
        Self { incoming, connection: Some(connection) }
    }

    /// Whether everything has been read.
    pub(crate) fn is_end(&self) -> bool {
        self.incoming.is_end_stream()
    }

    /// The next bytes as the upstream sent them, `None` at the proper end. Trailers are dropped.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, UpstreamError>> {
        use http_body_util::BodyExt as _;
        loop {
            match self.incoming.frame().await? {
                Err(error) => return Some(Err(UpstreamError::Reset(Some(error.into())))),
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
    pub(crate) fn finish(mut self) {
        if let Some(connection) = self.connection.take() {
            connection.give_back();
        }
    }
}
