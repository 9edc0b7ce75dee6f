//! The upstream, in a process of its own: `/hello`, `/stamp`, `/wait/MS`, `/talk/MS`, `/echo`, `/events`, `/every/MS/COUNT`,
//! `/hold`, `/flood`, `/trickle`, `/body/BYTES`, `/sink`, `/peer`.

use std::{
    convert::Infallible,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    time::{self, MissedTickBehavior},
};

use crate::client::Target;

/// What `/hello` answers.
pub(crate) const HELLO: &str = "Hello, bench!";

/// How many events `/events` sends, and how far apart.
pub(crate) const EVENTS: usize = 180;
pub(crate) const EVENT_INTERVAL: Duration = Duration::from_millis(10);

/// How far apart the events of `/hold` are, which never ends.
const HOLD_INTERVAL: Duration = Duration::from_secs(1);

/// How far apart the events of `/talk` are, which go on for as long as it was asked for: a model that writes.
const TALK_INTERVAL: Duration = Duration::from_millis(20);

/// How long the events of `/flood` are, and how many are written at a time.
const FLOOD_BYTES: usize = 1000;
const FLOOD_EVENTS: usize = 16;

/// How many bytes `/trickle` sends one by one, and how far apart.
const TRICKLE: usize = 5;
const TRICKLE_INTERVAL: Duration = Duration::from_millis(20);

/// What the bodies of `/body` repeat.
pub(crate) const PATTERN_BYTES: usize = 1 << 20;

/// How much of a body is written at a time.
const WRITE_BYTES: usize = 64 * 1024;

/// A running upstream. Ends when this is dropped, unless somebody else has started it.
#[derive(Debug)]
pub(crate) struct Upstream {
    child: Option<Child>,
    pub(crate) port: u16,
}

impl Upstream {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("upstream")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the upstream")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        Ok(Self { child: Some(child), port: line.trim().parse().context("the upstream's port")? })
    }

    /// One that runs already.
    pub(crate) const fn at(port: u16) -> Self {
        Self { child: None, port }
    }

    /// Where it is asked directly.
    pub(crate) fn direct(&self) -> Target {
        Target { address: SocketAddr::from(([127, 0, 0, 1], self.port)), host: "localhost".to_owned() }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// The bytes that `/body` repeats: nothing compresses them.
pub(crate) fn pattern() -> Bytes {
    tests::noise(1, PATTERN_BYTES).into()
}

/// Nanoseconds since 1970: the only clock that two processes share without more ado.
pub(crate) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default()
}

/// Is the upstream until standard input ends.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{}", listener.local_addr()?.port())?;
        stdout.flush()?;
    }
    let pattern = pattern();
    let accept = async {
        loop {
            let Ok((stream, peer)) = listener.accept().await else { continue };
            // Without it, delayed acknowledgements would be measured.
            drop(stream.set_nodelay(true));
            let pattern = pattern.clone();
            let service = service_fn(move |request| answer(request, peer, pattern.clone()));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    };
    // The end of the input is the end of whoever measures.
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        drop(std::io::stdin().lock().read_until(0, &mut Vec::new()));
        let _ = ended.send(());
    });
    tokio::select! {
        () = accept => {}
        _ = end => {}
    }
    Ok(())
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    pattern: Bytes,
) -> anyhow::Result<Response<Body>> {
    let path = request.uri().path().to_owned();
    let whole = |bytes: Bytes| Response::new(Full::new(bytes).boxed());
    Ok(match path.as_str() {
        "/hello" => whole(Bytes::from_static(HELLO.as_bytes())),
        "/echo" => whole(request.into_body().collect().await?.to_bytes()),
        path if path.starts_with("/wait/") => {
            time::sleep(Duration::from_millis(path["/wait/".len()..].parse()?)).await;
            whole(Bytes::from_static(HELLO.as_bytes()))
        }
        path if path.starts_with("/talk/") => {
            let time = Duration::from_millis(path["/talk/".len()..].parse()?);
            let pauses = time.as_millis() / TALK_INTERVAL.as_millis();
            events(TALK_INTERVAL, usize::try_from(pauses)? + 1)
        }
        path if path.starts_with("/every/") => {
            let (interval, count) = path["/every/".len()..].split_once('/').context("MS/COUNT")?;
            events(Duration::from_millis(interval.parse()?), count.parse()?)
        }
        "/stamp" => whole(now_ns().to_string().into()),
        // Where the connection comes from on which this is asked.
        "/peer" => whole(peer.to_string().into()),
        "/sink" => {
            let mut body = request.into_body();
            let mut length = 0;
            while let Some(frame) = body.frame().await {
                length += frame?.data_ref().map_or(0, Bytes::len);
            }
            whole(length.to_string().into())
        }
        "/events" => events(EVENT_INTERVAL, EVENTS),
        "/hold" => events(HOLD_INTERVAL, usize::MAX),
        "/flood" => flood(&pattern),
        "/trickle" => Response::new(every(TRICKLE_INTERVAL, TRICKLE, || Bytes::from_static(b"."))),
        _ => match path.strip_prefix("/body/").and_then(|bytes| bytes.parse::<usize>().ok()) {
            Some(length) => {
                let pieces = (0..length.div_ceil(WRITE_BYTES)).map(move |index| {
                    let from = index * WRITE_BYTES % PATTERN_BYTES;
                    let bytes = WRITE_BYTES.min(length - index * WRITE_BYTES);
                    Ok(Frame::data(pattern.slice(from..from + bytes)))
                });
                let mut response = Response::new(StreamBody::new(stream::iter(pieces)).boxed());
                response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
                response.headers_mut().insert(
                    header::CONTENT_TYPE,
                    header::HeaderValue::from_static("application/octet-stream"),
                );
                response
            }
            None => {
                let mut response = whole(Bytes::new());
                *response.status_mut() = http::StatusCode::NOT_FOUND;
                response
            }
        },
    })
}

/// Events without end, as fast as they are taken.
fn flood(pattern: &[u8]) -> Response<Body> {
    let mut text = String::new();
    for bytes in pattern.chunks_exact(FLOOD_BYTES / 2).take(FLOOD_EVENTS) {
        text.push_str("data: ");
        text.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
        text.push_str("\n\n");
    }
    let text = Bytes::from(text);
    let pieces = stream::iter(std::iter::repeat_with(move || Ok(Frame::data(text.clone()))));
    let mut response = Response::new(StreamBody::new(pieces).boxed());
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
    response
}

/// `count` events, each of which says when it was sent.
fn events(interval: Duration, count: usize) -> Response<Body> {
    let mut response = Response::new(every(interval, count, || format!("data: {}\n\n", now_ns()).into()));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
    response
}

/// Reads what `/events` sends: enter pieces of the body, leaves how long each event was on its way.
#[derive(Debug, Default)]
pub(crate) struct Events {
    text: String,
    delays: Vec<f64>,
}

impl Events {
    /// Takes a piece that has come now.
    pub(crate) fn take(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        let now = now_ns();
        self.text.push_str(std::str::from_utf8(piece)?);
        while let Some(end) = self.text.find("\n\n") {
            let sent: u64 = self.text[..end].trim_start_matches("data: ").parse()?;
            self.delays.push(now.saturating_sub(sent) as f64 / 1e6);
            self.text.drain(..end + 2);
        }
        Ok(())
    }

    /// The delays in milliseconds, if all `count` events have come.
    pub(crate) fn finish(self, count: usize) -> anyhow::Result<Vec<f64>> {
        anyhow::ensure!(self.delays.len() == count, "{} events of {count} came", self.delays.len());
        Ok(self.delays)
    }
}

/// A body of `count` pieces, the first at once and each other one `interval` after the one before.
fn every(interval: Duration, count: usize, piece: impl Fn() -> Bytes + Send + Sync + 'static) -> Body {
    let mut ticks = time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let pieces = stream::unfold((ticks, piece, 0), move |(mut ticks, piece, sent)| async move {
        if sent == count {
            return None;
        }
        ticks.tick().await;
        Some((Ok(Frame::data(piece())), (ticks, piece, sent + 1)))
    });
    StreamBody::new(pieces).boxed()
}
