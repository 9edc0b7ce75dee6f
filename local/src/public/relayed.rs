//! What the front hands to `relay` instead of a function: requests for a WebSocket, as CloudFront's function chooses
//! them by `sec-websocket-key`.
//!
//! Bytes go both ways untouched once the relay has answered 101.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header, request, uri::PathAndQuery};
use hyper::{body::Incoming, client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::watch, time};

use super::{Answer, Refusal};

/// How long the front waits for a relay that has just been started again.
const START_TIME: time::Duration = time::Duration::from_secs(10);

/// Where the relay is; `None` while it starts.
#[derive(Debug, Clone)]
pub struct Relay(pub watch::Receiver<Option<SocketAddr>>);

/// What a front adds.
pub(super) struct Added<'a> {
    pub(super) secret: &'a str,
    pub(super) host: &'a HeaderValue,
    pub(super) target: &'a [u8],
    pub(super) client: IpAddr,
    pub(super) port: u16,
}

/// Whether a request asks for a WebSocket, by the field that CloudFront's functions see.
pub(super) fn is_websocket(headers: &HeaderMap) -> bool {
    headers.contains_key(header::SEC_WEBSOCKET_KEY)
}

impl Relay {
    /// Hands a request over and gives back what the relay answers.
    pub(super) async fn forward(
        &self,
        mut parts: request::Parts,
        body: Incoming,
        added: Added<'_>,
    ) -> Response<Answer> {
        let on_upgrade = parts.extensions.remove::<OnUpgrade>();
        match self.call(parts, body, added).await {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => match on_upgrade {
                Some(on_upgrade) => switch(response, on_upgrade),
                None => Refusal::FunctionFailed.respond(),
            },
            Ok(response) => response.map(Answer::Relayed),
            Err(error) => {
                tracing::warn!(%error, "relay did not answer");
                Refusal::FunctionFailed.respond()
            }
        }
    }

    async fn call(
        &self,
        parts: request::Parts,
        body: Incoming,
        added: Added<'_>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut address = self.0.clone();
        let found = time::timeout(START_TIME, address.wait_for(Option::is_some)).await??.to_owned();
        let address = found.ok_or_else(|| anyhow::anyhow!("there is no relay"))?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // Its errors reach whoever waits for the response.
            let _ = connection.with_upgrades().await;
        });
        let mut request = Request::new(body);
        *request.method_mut() = parts.method;
        *request.headers_mut() = parts.headers;
        let target = PathAndQuery::try_from(added.target).unwrap_or(PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(target);
        let headers = request.headers_mut();
        let text = |text: &str| HeaderValue::from_str(text);
        headers.insert("x-tunnel-front", text(added.secret)?);
        headers.insert("x-tunnel-host", added.host.clone());
        headers.insert("x-tunnel-target", HeaderValue::from_bytes(added.target)?);
        headers.insert("x-tunnel-client", text(&added.client.to_string())?);
        headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
        headers.insert("x-forwarded-port", HeaderValue::from(added.port));
        Ok(sender.send_request(request).await?)
    }
}

fn switch(mut response: Response<Incoming>, public: OnUpgrade) -> Response<Answer> {
    let relay = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        let (public, relay) = match tokio::try_join!(public, relay) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "a connection was not switched");
                return;
            }
        };
        let (mut public, mut relay) = (TokioIo::new(public), TokioIo::new(relay));
        if let Err(error) = tokio::io::copy_bidirectional(&mut public, &mut relay).await {
            tracing::debug!(%error, "a websocket's connection ended");
        }
    });
    response.map(|_| Answer::Bodiless)
}
