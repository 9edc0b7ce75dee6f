//! The upstream of a campaign: does what each target says, and remembers how often it was asked.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tests::noise;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Says which request an answer is for.
pub(crate) const ID: &str = "x-id";

/// How large the pieces of a streamed answer are, and how far apart.
const PIECE: usize = 8 * 1024;
const PAUSE: Duration = Duration::from_millis(2);

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

#[derive(Debug, Default)]
struct State {
    calls: Mutex<HashMap<u64, u32>>,
    /// Whether connections are refused, and the ones that are there cut.
    is_down: AtomicBool,
}

/// A running upstream.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    /// Whether nothing is answered.
    stalled: watch::Sender<bool>,
    cut: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl Upstream {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let (stalled, stalls) = watch::channel(false);
        let (cut, cuts) = watch::channel(0);
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if shared.is_down.load(Ordering::Relaxed) {
                    continue;
                }
                tokio::spawn(serve(stream, Arc::clone(&shared), stalls.clone(), cuts.clone()));
            }
        });
        Ok(Self { address, state, stalled, cut, task })
    }

    /// Takes no connection any more and cuts those that are there; or is there again.
    pub(crate) fn set_down(&self, is_down: bool) {
        self.state.is_down.store(is_down, Ordering::Relaxed);
        self.cut.send_modify(|cut| *cut += 1);
    }

    /// Answers nothing; or goes on.
    pub(crate) fn set_stalled(&self, is_stalled: bool) {
        self.stalled.send_replace(is_stalled);
    }

    /// How often each request was seen, by its number.
    pub(crate) fn calls(&self) -> HashMap<u64, u32> {
        self.state.calls.lock().expect("nothing panics under this lock").clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: TcpStream,
    state: Arc<State>,
    stalls: watch::Receiver<bool>,
    mut cuts: watch::Receiver<u64>,
) {
    let _ = stream.set_nodelay(true);
    cuts.mark_unchanged();
    let service = service_fn(move |request| answer(request, Arc::clone(&state), stalls.clone()));
    let connection =
        http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // An answer that breaks off is what was asked for.
        _ = connection => {}
        _ = cuts.changed() => {}
    }
}

/// An error ends the connection without an answer.
async fn answer(
    request: Request<Incoming>,
    state: Arc<State>,
    mut stalls: watch::Receiver<bool>,
) -> anyhow::Result<Response<Body>> {
    let target = request.uri().path().to_owned();
    let mut words = target.split('/').skip(1);
    let kind = words.next().unwrap_or_default().to_owned();
    let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).context("no number");
    let (id, value) = (number()?, usize::try_from(number()?)?);
    // The recovery check repeats one number; it counts for nothing.
    *state.calls.lock().expect("nothing panics under this lock").entry(id).or_default() += 1;
    let is_post = request.method() == http::Method::POST;
    let sent = request.into_body().collect().await?.to_bytes();
    let _ = stalls.wait_for(|is_stalled| !is_stalled).await;
    let whole = |bytes: Bytes| {
        let length = bytes.len();
        (
            http_body_util::Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync(),
            Some(length),
        )
    };
    let mut status = StatusCode::OK;
    let (body, length) = match kind.as_str() {
        "echo" if is_post => whole(sent),
        "echo" => whole(noise(id + 1, value).into()),
        "status" => {
            status = StatusCode::from_u16(u16::try_from(value)?)?;
            whole(Bytes::new())
        }
        "stream" => (pieces(noise(id + 1, value), None), None),
        "short" => (pieces(noise(id + 1, value), Some(value / 2)), Some(value)),
        _ => anyhow::bail!("reset"),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(ID, HeaderValue::from(id));
    if let Some(length) = length.filter(|_| status != StatusCode::NO_CONTENT) {
        response.headers_mut().insert(http::header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}

/// A body piece by piece, which breaks off after so many bytes.
fn pieces(bytes: Vec<u8>, breaks_at: Option<usize>) -> Body {
    let bytes = Bytes::from(bytes);
    let end = breaks_at.unwrap_or(bytes.len());
    let frames = stream::unfold(0, move |at| {
        let bytes = bytes.clone();
        async move {
            if at >= end {
                let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
                return (breaks_at.is_some() && at == end).then(|| (Err(broken), at + 1));
            }
            if at > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let next = (at + PIECE).min(end);
            Some((Ok(Frame::data(bytes.slice(at..next))), next))
        }
    });
    StreamBody::new(frames.boxed()).boxed_unsync()
}
