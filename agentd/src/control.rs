//! How the running agent is asked and told: HTTP over a unix socket for whoever may open it, and the
//! harmless part of it over TCP on loopback for monitoring.
//!
//! Enters: requests. Leaves: [`Ask`]s to the supervisor, so that an answer also proves that its loop turns.
//!
//! | | unix socket | loopback |
//! |---|---|---|
//! | `GET /healthz` `/ready` `/metrics` | yes | yes |
//! | `GET /status` | yes | no |
//! | `POST /reload` `/stop` | yes | no |
//! | `/api/…`, see [`crate::inspect`] | yes | no |

pub(crate) mod client;
mod socket;

use std::{convert::Infallible, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout},
};

pub(crate) use self::socket::{ControlSocket, SocketError, in_folder, place_for_people, place_for_service};
use crate::{
    config::change::Change,
    inspect::api::{self, Inspector},
    loopback::is_for_this_machine,
    report::cause::Causes,
    report::metrics::{Format, Metrics},
    report::status::Status,
};

/// What the supervisor is asked.
#[derive(Debug)]
pub(crate) enum Ask {
    /// How it is.
    Status(oneshot::Sender<Status>),
    /// To read the configuration again. A refusal says why nothing was changed.
    Reload(oneshot::Sender<Result<Change, String>>),
    /// To stop after what is in flight; the number of those is the answer.
    Stop(oneshot::Sender<Stopping>),
}

/// What an agent that was told to stop answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Stopping {
    pub(crate) pid: u32,
    pub(crate) in_flight: u64,
    pub(crate) grace_ms: u64,
}

/// A refusal, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Refused {
    pub(crate) error: String,
}

/// What `/ready` answers.
#[derive(Debug, serde::Serialize)]
struct Readiness {
    ready: bool,
    connections: usize,
    tunnels: usize,
    tunnels_open: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// How many asks may wait for the supervisor.
pub(crate) const ASKS: usize = 8;

/// How many connections are served at a time. One more waits in the kernel's queue.
const CONNECTIONS: usize = 32;

/// How long a head may take, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A supervisor that does not answer by then is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A reload waits for the files of one before it, for its own and for the edge's confirmation, see [`crate::supervisor`].
/// Whoever asks waits a little longer.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(28);

/// How often a place that somebody else has is tried again: nothing tells when a port or a lock becomes free.
const TAKEN_RETRY: Duration = Duration::from_secs(1);

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Somebody whom the socket's permissions let in.
    Unix,
    /// Anybody on this machine, a browser included.
    Loopback,
}

/// Answers requests.
#[derive(Clone)]
pub(crate) struct Control {
    asks: mpsc::Sender<Ask>,
    metrics: Arc<Metrics>,
    inspector: Inspector,
}

impl Control {
    pub(crate) const fn new(asks: mpsc::Sender<Ask>, metrics: Arc<Metrics>, inspector: Inspector) -> Self {
        Self { asks, metrics, inspector }
    }

    /// Serves the unix socket for ever. The socket's file goes with the future.
    pub(crate) async fn serve_socket(self, socket: ControlSocket) {
        let mut porch = Porch::default();
        while let Some(place) = porch.place().await {
            let accepted = match socket.accept().await {
                Err(error) if porch.makes_room(&error) => socket.accept().await,
                accepted => accepted,
            };
            if let Some(stream) = porch.let_in(accepted).await {
                self.clone().spawn(stream, Door::Unix, place);
            }
        }
    }

    /// Serves the unix socket once the agent that has its place is gone.
    pub(crate) async fn serve_socket_once_free(self, path: PathBuf) {
        loop {
            tokio::time::sleep(TAKEN_RETRY).await;
            match ControlSocket::bind(&path) {
                Ok(socket) => {
                    tracing::info!("the control socket {} is free and taken", path.display());
                    return self.serve_socket(socket).await;
                }
                Err(SocketError::Taken(_)) => {}
                Err(error @ SocketError::System { .. }) => return tracing::error!("{error}"),
            }
        }
    }

    /// Serves a loopback address once whoever has it is gone.
    pub(crate) async fn serve_loopback_once_free(self, address: SocketAddr) {
        loop {
            tokio::time::sleep(TAKEN_RETRY).await;
            if let Ok(listener) = listen(address).await {
                tracing::info!("status_address {address} is free and taken");
                return self.serve_loopback(listener).await;
            }
        }
    }

    /// Serves a loopback address for ever.
    pub(crate) async fn serve_loopback(self, listener: TcpListener) {
        let mut porch = Porch::default();
        while let Some(place) = porch.place().await {
            let accepted = match listener.accept().await {
                Err(error) if porch.makes_room(&error) => listener.accept().await,
                accepted => accepted,
            };
            if let Some((stream, _)) = porch.let_in(accepted).await {
                self.clone().spawn(stream, Door::Loopback, place);
            }
        }
    }

    fn spawn<S>(self, stream: S, door: Door, place: OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        tokio::spawn(async move {
            self.serve(stream, door).await;
            drop(place);
        });
    }

    async fn serve<S>(&self, stream: S, door: Door)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request: Request<Incoming>| async move {
            if door == Door::Unix && request.uri().path().starts_with("/api/") {
                return Ok::<_, Infallible>(self.inspector.answer(request, api::Door::Socket).await);
            }
            let (head, _body) = request.into_parts();
            let answer = self.answer(&head.method, head.uri.path(), &head.headers, door).await;
            Ok(answer.map(|body| body.boxed_unsync()))
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(true)
            .max_buf_size(16 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a control connection broke off");
        }
    }

    async fn answer(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        door: Door,
    ) -> Response<Full<Bytes>> {
        if door == Door::Loopback && !is_for_this_machine(headers) {
            // A page of a foreign site that has its name point here (DNS rebinding).
            return text(StatusCode::FORBIDDEN, "this address answers to loopback names only\n");
        }
        let allowed = match (path, door) {
            ("/healthz" | "/ready" | "/metrics", _) | ("/status", Door::Unix) => Method::GET,
            ("/reload" | "/stop", Door::Unix) => Method::POST,
            _ => return text(StatusCode::NOT_FOUND, "there is /healthz, /ready and /metrics\n"),
        };
        if *method != allowed && !(*method == Method::HEAD && allowed == Method::GET) {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "another method is wanted\n");
            let value = HeaderValue::from_str(allowed.as_str()).expect("a method's name is a field value");
            answer.headers_mut().insert(header::ALLOW, value);
            return answer;
        }
        match path {
            "/metrics" => {
                let accept: Vec<_> =
                    headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
                let format = Format::wanted(&accept.join(","));
                content(StatusCode::OK, format.content_type(), self.metrics.in_format(format))
            }
            "/healthz" => match self.status().await {
                Some(_) => text(StatusCode::OK, "ok\n"),
                None => stuck(),
            },
            "/ready" => match self.status().await {
                Some(status) => ready(&status),
                None => stuck(),
            },
            "/status" => match self.status().await {
                Some(status) => json(StatusCode::OK, &status),
                None => stuck(),
            },
            "/reload" => match self.ask(Ask::Reload, RELOAD_TIMEOUT).await {
                Some(Ok(change)) => json(StatusCode::OK, &change),
                Some(Err(error)) => json(StatusCode::UNPROCESSABLE_ENTITY, &Refused { error }),
                None => stuck(),
            },
            "/stop" => match self.ask(Ask::Stop, ANSWER_TIMEOUT).await {
                Some(stopping) => json(StatusCode::ACCEPTED, &stopping),
                None => stuck(),
            },
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        }
    }

    async fn status(&self) -> Option<Status> {
        self.ask(Ask::Status, ANSWER_TIMEOUT).await
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask, patience: Duration) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        timeout(patience, async {
            self.asks.send(ask(answer)).await.ok()?;
            answered.await.ok()
        })
        .await
        .ok()
        .flatten()
    }
}

fn ready(status: &Status) -> Response<Full<Bytes>> {
    let readiness = status.readiness();
    let code = if readiness.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let answer = Readiness {
        ready: readiness.is_ok(),
        connections: status.edge.connections.len(),
        tunnels: status.tunnels.len(),
        tunnels_open: status.open(),
        reason: readiness.err(),
    };
    json(code, &answer)
}

fn stuck() -> Response<Full<Bytes>> {
    text(StatusCode::SERVICE_UNAVAILABLE, "the agent's main loop does not answer\n")
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    let mut body = serde_json::to_string(value).expect("texts, numbers and lists are JSON");
    body.push('\n');
    content(status, "application/json", body)
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    content(status, "text/plain; charset=utf-8", body.to_owned())
}

fn content(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Who is let in. A descriptor is kept in reserve, so that whoever asks what is wrong is answered when there are none left.
struct Porch {
    places: Arc<Semaphore>,
    reserve: Option<std::fs::File>,
    causes: Causes,
}

impl Default for Porch {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(CONNECTIONS)), reserve: None, causes: Causes::default() }
    }
}

impl Porch {
    /// Waits for a place.
    async fn place(&mut self) -> Option<OwnedSemaphorePermit> {
        if self.reserve.is_none() {
            self.reserve = std::fs::File::open("/dev/null").ok();
        }
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    /// Gives the reserve away if that is what is wanted.
    fn makes_room(&mut self, error: &std::io::Error) -> bool {
        matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
            && self.reserve.take().is_some()
    }

    /// Nobody could be let in: most often because there are no file descriptors left, which passes.
    async fn let_in<S>(&self, accepted: std::io::Result<S>) -> Option<S> {
        match accepted {
            Ok(stream) => {
                // Whoever came in by the reserve has not ended the shortage.
                if self.reserve.is_some() {
                    self.causes.answered();
                }
                Some(stream)
            }
            Err(error) => {
                if let Some(unsaid) = self.causes.failed(&error.to_string(), Instant::now()) {
                    let unsaid = (unsaid > 0).then_some(unsaid);
                    tracing::warn!(%error, unsaid, "a control connection was not accepted");
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                None
            }
        }
    }
}

/// Begins to listen at a loopback address.
///
/// # Errors
///
/// When the address is taken.
pub(crate) async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}
