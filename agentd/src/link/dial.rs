//! How a connection to the edge is opened, and what it means when it cannot be.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use http::{HeaderValue, StatusCode, header};
use proto::limits;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, client_async_with_config,
    tungstenite::{self, handshake::client::generate_key, protocol::WebSocketConfig},
};

use super::websocket::Link;
use crate::{
    config::edge_url::EdgeUrl,
    identity::credential::Token,
    report::SOFTWARE,
    resolver,
    tls::{Certificates, TlsError, Trust, client_config},
};

/// How much is read at a time: a usual request. Each read clears as much before it, also one that finds nothing.
const READ_BYTES: usize = 4 * 1024;

/// A received message may be a little longer than the edge is allowed to send.
const RECEIVE_BYTES: usize = limits::MESSAGE_BYTES + 8 * 1024;

/// How much of what is sent may wait unsent in the kernel: one message, so that what is sent next
/// is not behind megabytes of a download.
const UNSENT_BYTES: u32 = limits::MESSAGE_BYTES as u32;

/// How long unacknowledged bytes may be under way before the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// When the kernel asks for a sign of life on a silent connection.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Whether another try can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// Yes, after a while.
    Later,
    /// Not with this token.
    Never,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("cannot look up or reach {0}: {1}")]
    Connect(String, #[source] io::Error),
    #[error("TLS with the edge failed: {0}")]
    Tls(#[source] io::Error),
    #[error("the edge refused the token (HTTP {0})")]
    Identity(StatusCode),
    #[error("the edge answered HTTP {0} instead of opening a WebSocket")]
    Status(StatusCode),
    #[error("opening a WebSocket failed: {0}")]
    Handshake(#[source] Box<tungstenite::Error>),
    #[error("opening the connection took longer than {0:?}")]
    TooLate(Duration),
}

impl DialError {
    pub(crate) const fn retry(&self) -> Retry {
        match self {
            Self::Identity(_) => Retry::Never,
            Self::Connect(..) | Self::Tls(_) | Self::Status(_) | Self::Handshake(_) | Self::TooLate(_) => {
                Retry::Later
            }
        }
    }

    /// A word for the metrics.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::Connect(..) => "unreachable",
            Self::Tls(_) => "tls",
            Self::Identity(_) => "identity",
            Self::Status(_) => "status",
            Self::Handshake(_) => "handshake",
            Self::TooLate(_) => "timeout",
        }
    }
}

/// How to reach the edge. Cheap to keep: roots of trust are there only for `wss`.
#[derive(Clone)]
pub(crate) struct Dialer {
    url: EdgeUrl,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Dialer {
    /// Where it dials.
    pub(crate) const fn url(&self) -> &EdgeUrl {
        &self.url
    }

    /// Prepares dialling `url`; `ca_file` is trusted beside the system's roots.
    pub(crate) fn new(url: EdgeUrl, ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let tls = if url.is_secure() {
            let certificates = ca_file.map(Certificates::read).transpose()?;
            Some(client_config(certificates.as_ref().map_or(Trust::System, Trust::SystemAnd), &[])?)
        } else {
            None
        };
        Ok(Self { url, tls })
    }

    /// Opens a connection within [`limits::CONNECT_TIMEOUT`].
    pub(crate) async fn dial(&self, token: &Token) -> Result<Link, DialError> {
        timeout(limits::CONNECT_TIMEOUT, self.dial_without_deadline(token))
            .await
            .unwrap_or(Err(DialError::TooLate(limits::CONNECT_TIMEOUT)))
    }

    async fn dial_without_deadline(&self, token: &Token) -> Result<Link, DialError> {
        let unreachable = |error| DialError::Connect(self.url.authority().to_owned(), error);
        // The name is looked up at each try: an edge may move.
        let found = resolver::look_up_edge(self.url.host()).await.map_err(unreachable)?;
        let addresses: Vec<SocketAddr> =
            found.into_iter().map(|ip| SocketAddr::new(ip, self.url.port())).collect();
        let stream = TcpStream::connect(&*addresses).await.map_err(unreachable)?;
        tune(&stream).map_err(unreachable)?;
        let stream = match &self.tls {
            None => MaybeTlsStream::Plain(stream),
            Some(config) => {
                let name = rustls::pki_types::ServerName::try_from(self.url.host().to_owned())
                    .map_err(|error| DialError::Tls(io::Error::other(error)))?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                MaybeTlsStream::Rustls(connector.connect(name, stream).await.map_err(DialError::Tls)?)
            }
        };
        let mut request = http::Request::get(self.url.to_string())
            .header(header::HOST, self.url.authority())
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::USER_AGENT, SOFTWARE)
            .body(())
            .map_err(|error| DialError::Handshake(Box::new(error.into())))?;
        let authorization = token.authorization().unwrap_or_else(|| HeaderValue::from_static(""));
        request.headers_mut().insert(header::AUTHORIZATION, authorization);
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BYTES)
            .write_buffer_size(limits::FRAME_BYTES)
            .max_write_buffer_size(2 * limits::MESSAGE_BYTES)
            .max_message_size(Some(RECEIVE_BYTES))
            .max_frame_size(Some(RECEIVE_BYTES));
        match client_async_with_config(request, stream, Some(config)).await {
            Ok((socket, _)) => Ok(Link::start(socket)),
            Err(tungstenite::Error::Http(response)) => Err(match response.status() {
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => DialError::Identity(status),
                status => DialError::Status(status),
            }),
            Err(error) => Err(DialError::Handshake(Box::new(error))),
        }
    }
}

/// Socket options that bound what a dead or slow peer can cost. None of them is worth failing for.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
    for result in [
        socket.set_tcp_keepalive(&keepalive),
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT)),
        socket.set_tcp_notsent_lowat(UNSENT_BYTES),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "socket option was not taken");
        }
    }
    Ok(())
}
