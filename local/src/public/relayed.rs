//! What the front hands to `relay` instead of a function: requests for a WebSocket, as CloudFront's function chooses
//! them by `sec-websocket-key`.
//!
//! Bytes go both ways untouched once the relay has answered 101.

use std::{
    future::pending,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version, header, request, uri::PathAndQuery,
};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use proto::limits;
use tokio::{
    net::TcpStream,
    sync::{oneshot, watch},
    time,
};

use super::{
    Answer, OF_A_CONNECTION, Refusal, Source,
    fronts::{Does, Imitation},
    heads::SharedNotes,
    origin::Silence,
    refused_head,
};
use crate::lambda::Broken;

/// How long the front waits for a relay that has just been started again.
const START_TIME: Duration = Duration::from_secs(10);

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

/// How a front lets a relay's answer through.
pub(super) struct Way<'a> {
    pub(super) imitation: &'a Arc<Imitation>,
    /// How long the relay may be silent.
    pub(super) silence: Option<Duration>,
    pub(super) notes: SharedNotes,
}

/// Whether a request asks for a WebSocket, by the field that CloudFront's functions see.
pub(super) fn is_websocket(headers: &HeaderMap) -> bool {
    headers.contains_key(header::SEC_WEBSOCKET_KEY)
}

impl Relay {
    /// Hands a request over and gives back what the relay answers, or why the front answers by itself.
    pub(super) async fn forward(
        &self,
        mut parts: request::Parts,
        body: Incoming,
        added: Added<'_>,
        way: Way<'_>,
    ) -> Result<Response<Answer>, Refusal> {
        let on_upgrade = parts.extensions.remove::<OnUpgrade>();
        let version = parts.version;
        let mut response = self.call(parts, body, added, &way).await?;
        let is_switch = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if !is_switch {
            for name in OF_A_CONNECTION {
                response.headers_mut().remove(name);
            }
        }
        if let Some(refusal) = refused_head(way.imitation, response.headers()) {
            return Err(refusal);
        }
        if is_switch {
            return on_upgrade.map(|public| switch(response, public)).ok_or(Refusal::FunctionFailed);
        }
        let ends_with_connection =
            version < Version::HTTP_11 && !response.headers().contains_key(header::CONTENT_LENGTH);
        Ok(response.map(|body| Answer::Stream {
            body: Source::Relay(Box::new(Relayed {
                body,
                imitation: way.imitation.clone(),
                silence: way.silence.map(Silence::new),
            })),
            left: None,
            notes: ends_with_connection.then_some(way.notes),
            is_broken: false,
        }))
    }

    async fn call(
        &self,
        parts: request::Parts,
        body: Incoming,
        added: Added<'_>,
        way: &Way<'_>,
    ) -> Result<Response<Incoming>, Refusal> {
        let (broke_off, mut broken) = oneshot::channel();
        let body = Upload { body, broke_off: Some(broke_off) };
        let answered = tokio::select! {
            biased;
            refusal = refused(&mut broken, way) => return Err(refusal),
            answered = self.ask(parts, body, added) => answered,
        };
        answered.map_err(|error| {
            // Both may have happened since.
            if broken.try_recv().is_ok() {
                return Refusal::Ambiguous;
            }
            tracing::warn!(%error, "relay did not answer");
            Refusal::FunctionFailed
        })
    }

    async fn ask(
        &self,
        parts: request::Parts,
        body: Upload,
        added: Added<'_>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut address = self.0.clone();
        let found = time::timeout(START_TIME, address.wait_for(Option::is_some)).await??.to_owned();
        let address = found.ok_or_else(|| anyhow::anyhow!("there is no relay"))?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        // As many fields as an upstream may send, and those of the relay itself.
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(limits::HEADER_FIELDS + 24)
            .handshake(TokioIo::new(stream))
            .await?;
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

/// Why no answer is waited for any more, when that is so: the request's body broke off, or all of it was sent and the
/// relay has been silent since.
async fn refused(broken: &mut oneshot::Receiver<()>, way: &Way<'_>) -> Refusal {
    if broken.await.is_ok() {
        return Refusal::Ambiguous;
    }
    let Some(time) = way.silence else { return pending().await };
    time::sleep(time).await;
    way.imitation.say(Does::Silence);
    Refusal::ByFront(StatusCode::GATEWAY_TIMEOUT)
}

/// A request's body on its way to the relay: it is dropped when all of it was sent.
struct Upload {
    body: Incoming,
    /// Is told when the public client breaks it off, or sends what is no body.
    broke_off: Option<oneshot::Sender<()>>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Err(_)) = &frame
            && let Some(broke_off) = self.broke_off.take()
        {
            // Nobody waits once there is an answer.
            let _ = broke_off.send(());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a relay's answer, as a front lets it through.
pub(super) struct Relayed {
    body: Incoming,
    imitation: Arc<Imitation>,
    silence: Option<Silence>,
}

impl Relayed {
    /// The next piece; none at the end.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) else {
                if self.silence.as_mut().is_some_and(|silence| silence.is_over(context)) {
                    self.imitation.say(Does::Silence);
                    return Poll::Ready(Err(Broken));
                }
                return Poll::Pending;
            };
            if let Some(silence) = &mut self.silence {
                silence.end();
            }
            match frame {
                None => return Poll::Ready(Ok(None)),
                Some(Err(_)) => return Poll::Ready(Err(Broken)),
                // Trailers go no further.
                Some(Ok(frame)) => {
                    if let Ok(piece) = frame.into_data() {
                        return Poll::Ready(Ok(Some(piece)));
                    }
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body_util::Empty;
    use tokio::{
        io::{AsyncWriteExt as _, duplex},
        time::{Instant, sleep, timeout},
    };

    use super::*;
    use crate::{clock::Clock, public::fronts::Kind};

    const PATIENCE: Duration = Duration::from_secs(60);

    fn imitation() -> Arc<Imitation> {
        Imitation::new(Kind::Relay, &[], Clock::default(), Duration::from_secs(300)).into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_is_not_silent_while_it_is_still_being_told() {
        let imitation = imitation();
        let way = Way { imitation: &imitation, silence: Some(PATIENCE), notes: SharedNotes::default() };
        let (broke_off, mut broken) = oneshot::channel();
        assert!(timeout(10 * PATIENCE, refused(&mut broken, &way)).await.is_err());
        // All was sent.
        drop(broke_off);
        let begun = Instant::now();
        assert_eq!(refused(&mut broken, &way).await, Refusal::ByFront(StatusCode::GATEWAY_TIMEOUT));
        assert!(begun.elapsed() == PATIENCE && imitation.has_said(Does::Silence));
        let (broke_off, mut broken) = oneshot::channel();
        broke_off.send(()).unwrap();
        assert_eq!(refused(&mut broken, &way).await, Refusal::Ambiguous);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_falls_silent_is_given_up_and_one_that_speaks_in_time_is_not() {
        let (front, mut relay) = duplex(1024);
        let (mut sender, connection) = http1::handshake(TokioIo::new(front)).await.unwrap();
        tokio::spawn(connection);
        let relay = tokio::spawn(async move {
            relay.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            for _ in 0..2 {
                sleep(PATIENCE - Duration::from_secs(1)).await;
                relay.write_all(b"1\r\n.\r\n").await.unwrap();
            }
            relay
        });
        let response = sender.send_request(Request::new(Empty::<Bytes>::new())).await.unwrap();
        let imitation = imitation();
        let silence = Some(Silence::new(PATIENCE));
        let mut relayed = Relayed { body: response.into_body(), imitation: imitation.clone(), silence };
        for _ in 0..2 {
            assert_eq!(poll_fn(|context| relayed.poll_next(context)).await.unwrap().unwrap(), ".");
        }
        let (begun, _open) = (Instant::now(), relay.await.unwrap());
        assert_eq!(poll_fn(|context| relayed.poll_next(context)).await, Err(Broken));
        assert!(begun.elapsed() == PATIENCE && imitation.has_said(Does::Silence));
    }
}
