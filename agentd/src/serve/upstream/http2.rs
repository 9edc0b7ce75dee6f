//! One HTTP/2 connection: its streams are counted, its silence is noticed, and what the upstream has promised not to
//! have touched is told apart from what it may have done.
//!
//! Enters: requests, one stream each. Leaves: heads, bodies, or a [`Failure`].

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use proto::limits;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{READ_BUFFER_BYTES, RequestBody, UpstreamError};
use crate::serve::upload::UploadBody;

/// How much of one response may be under way.
const STREAM_WINDOW_BYTES: u32 = 512 * 1024;

/// How long the other side's settings are waited for; they say how many streams it takes.
const SETTINGS_WITHIN: Duration = Duration::from_secs(1);

/// Heard of so long ago, a connection is asked for a sign of life before it gets another request…
const QUIET_BUSY: Duration = Duration::from_secs(1);

/// …and so long ago if it has nothing to do.
const QUIET_IDLE: Duration = Duration::from_secs(5);

/// A connection that gives no sign of life within this gets no more requests.
const SIGN_WITHIN: Duration = Duration::from_secs(1);

/// While a request waits, the first PING is sent after this long without a byte…
const FIRST_PING: Duration = Duration::from_secs(2);

/// …and the next ones each time this has passed: servers close connections that ping more often than they find useful.
const NEXT_PING: Duration = Duration::from_secs(15);

/// A connection that does not answer a PING for so long has ended, and so have its requests. An application that
/// keeps its whole server busy may be late with it.
const LOST_AFTER: Duration = Duration::from_secs(30);

/// What is known of a connection's life.
#[derive(Debug)]
struct Pulse {
    began: Instant,
    /// When the last byte came, and when the last stream ended: milliseconds after `began`.
    heard: AtomicU64,
    left: AtomicU64,
    streams: AtomicUsize,
    /// No more streams than this, whatever the settings say: it refused one more.
    refuses_above: AtomicUsize,
    /// What came first has been read and understood: its settings.
    settled: AtomicBool,
    /// No more requests.
    retired: AtomicBool,
    /// It was given up because it was silent.
    silent: AtomicBool,
    /// A sign of life is wanted.
    wanted: AtomicBool,
    /// A byte has come.
    news: Notify,
    /// The first stream has begun, or a sign of life is wanted.
    ask: Notify,
}

impl Pulse {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            heard: AtomicU64::new(0),
            left: AtomicU64::new(0),
            streams: AtomicUsize::new(0),
            refuses_above: AtomicUsize::new(usize::MAX),
            settled: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            news: Notify::new(),
            ask: Notify::new(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn heard_at(&self) -> Instant {
        self.began + Duration::from_millis(self.heard.load(Ordering::Relaxed))
    }

    /// Asks for pings where they are due, and returns when there was no answer for too long.
    async fn watch(&self, mut pings: h2::PingPong) {
        let mut patience = FIRST_PING;
        loop {
            if self.streams.load(Ordering::Relaxed) == 0 && !self.wanted.load(Ordering::Relaxed) {
                self.ask.notified().await;
                patience = FIRST_PING;
                continue;
            }
            let heard = self.heard_at();
            if !self.wanted.swap(false, Ordering::Relaxed) {
                // A request that has just begun is given its time, whenever the last byte came.
                let due = Instant::now().max(heard) + patience;
                tokio::select! {
                    () = sleep_until(due) => {}
                    () = self.ask.notified() => continue,
                }
                if self.heard_at() > heard {
                    patience = FIRST_PING;
                    continue;
                }
            }
            let news = self.news.notified();
            // The answer to the one before is taken note of; where there is none yet, it still is what is waited for.
            poll_fn(|cx| {
                let _ = pings.poll_pong(cx);
                Poll::Ready(())
            })
            .await;
            let _ = pings.send_ping(h2::Ping::opaque());
            if timeout(LOST_AFTER, news).await.is_err() {
                return;
            }
            patience = NEXT_PING;
        }
    }
}

/// A stream of bytes whose reader is overheard.
struct Overheard<S> {
    stream: S,
    pulse: Arc<Pulse>,
    has_heard: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Overheard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.has_heard && !self.pulse.settled.load(Ordering::Relaxed) {
            // More is asked for when everything before has been understood.
            self.pulse.settled.store(true, Ordering::Release);
            self.pulse.news.notify_waiters();
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.has_heard = true;
            self.pulse.heard.store(self.pulse.now(), Ordering::Relaxed);
            self.pulse.news.notify_waiters();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Overheard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// An open connection. It closes when nobody holds it and no stream is open.
pub(super) struct Connection {
    sender: SendRequest<Bytes>,
    pulse: Arc<Pulse>,
}

/// A place for one stream on a connection, given back when it is dropped.
pub(super) struct Lease(Arc<Connection>);

impl Drop for Lease {
    fn drop(&mut self) {
        let pulse = &self.0.pulse;
        pulse.left.store(pulse.now(), Ordering::Relaxed);
        pulse.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    /// Speaks HTTP/2 on `stream` from now on. Returns when the other side has said how many streams it takes.
    pub(super) async fn begin<S>(stream: S) -> Result<Arc<Self>, UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let pulse = Arc::new(Pulse::new());
        let overheard = Overheard { stream, pulse: Arc::clone(&pulse), has_heard: false };
        let (sender, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(4 * STREAM_WINDOW_BYTES)
            .max_header_list_size(READ_BUFFER_BYTES as u32)
            .handshake::<_, Bytes>(overheard)
            .await
            .map_err(|error| failure_of(error, false).error)?;
        let pings = connection.ping_pong();
        let watched = Arc::clone(&pulse);
        tokio::spawn(async move {
            let watch = async {
                match pings {
                    Some(pings) => watched.watch(pings).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Its errors reach whoever waits for a response.
                _ = &mut connection => {}
                () = watch => watched.silent.store(true, Ordering::Relaxed),
            }
            watched.retired.store(true, Ordering::Relaxed);
            watched.settled.store(true, Ordering::Relaxed);
            watched.news.notify_waiters();
        });
        let settled = async {
            loop {
                let news = pulse.news.notified();
                if pulse.settled.load(Ordering::Acquire) {
                    return;
                }
                news.await;
            }
        };
        // One that keeps its settings to itself is asked all the same.
        let _ = timeout(SETTINGS_WITHIN, settled).await;
        Ok(Arc::new(Self { sender, pulse }))
    }

    /// A place for one more stream, if there is one.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Lease> {
        if !self.is_open() {
            return None;
        }
        let most =
            self.sender.current_max_send_streams().min(self.pulse.refuses_above.load(Ordering::Relaxed));
        let before = self.pulse.streams.fetch_add(1, Ordering::Relaxed);
        if before >= most {
            self.pulse.streams.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        if before == 0 {
            self.pulse.ask.notify_one();
        }
        Some(Lease(Arc::clone(self)))
    }

    /// Whether new requests may be sent on it.
    pub(super) fn is_open(&self) -> bool {
        let ready = self.sender.clone().poll_ready(&mut Context::from_waker(std::task::Waker::noop()));
        !self.pulse.retired.load(Ordering::Relaxed) && matches!(ready, Poll::Ready(Ok(())))
    }

    /// Since when it has had nothing to do.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let pulse = &self.pulse;
        (pulse.streams.load(Ordering::Relaxed) == 0)
            .then(|| pulse.began + Duration::from_millis(pulse.left.load(Ordering::Relaxed)))
    }
}

/// Why there is no response.
pub(super) struct Failure {
    pub(super) error: UpstreamError,
    /// The request, whole, where it is certain that the upstream has done nothing with it.
    pub(super) untouched: Option<RequestBody>,
    /// Whether the connection has ended with it.
    pub(super) died: bool,
}

/// What the errors of the library say.
fn failure_of(error: h2::Error, silent: bool) -> Failure {
    let died = !error.is_reset();
    let error = if silent {
        UpstreamError::Late("answer a ping")
    } else if error.reason() == Some(Reason::HTTP_1_1_REQUIRED) {
        UpstreamError::invalid("it wants HTTP/1.1: set http2 = \"never\"")
    } else if error.is_library() {
        UpstreamError::invalid("it is not HTTP/2")
    } else {
        UpstreamError::Reset(Some(error.into()))
    };
    Failure { error, untouched: None, died }
}

/// Whether the upstream promises that it has done nothing about the request (RFC 9113 §6.8, §8.7). The library gives a
/// GOAWAY of the other side to the streams above the last one that it names, and to no other.
fn is_untouched(error: &h2::Error) -> bool {
    error.is_remote()
        && (error.is_go_away() || error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM))
}

/// A request's body on its way: what has been sent, in case that it has to be sent again.
struct Pump {
    task: AbortOnDropHandle<UploadBody>,
    sent: Arc<Mutex<Option<Vec<Bytes>>>>,
}

impl Pump {
    fn start(body: UploadBody, stream: SendStream<Bytes>) -> Self {
        let sent = Arc::new(Mutex::new(Some(Vec::new())));
        let task: JoinHandle<_> = tokio::spawn(pump(body, stream, Arc::clone(&sent)));
        Self { task: AbortOnDropHandle::new(task), sent }
    }

    /// The head is there: nothing will be sent again.
    fn forget(&self) {
        *self.sent.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The body from its beginning.
    async fn take_back(self) -> Option<RequestBody> {
        let mut body = self.task.await.ok()?;
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        body.put_back(sent);
        Some(RequestBody::Upload(body))
    }
}

async fn pump(
    mut body: UploadBody,
    mut stream: SendStream<Bytes>,
    sent: Arc<Mutex<Option<Vec<Bytes>>>>,
) -> UploadBody {
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return body,
        };
        let mut bytes = match frame {
            None => {
                let _ = stream.send_data(Bytes::new(), true);
                return body;
            }
            Some(Err(_)) => {
                stream.send_reset(Reason::CANCEL);
                return body;
            }
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        };
        if let Some(sent) = &mut *sent.lock().unwrap_or_else(PoisonError::into_inner) {
            sent.push(bytes.clone());
        }
        while !bytes.is_empty() {
            stream.reserve_capacity(bytes.len());
            let Some(Ok(room)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return body };
            let piece = bytes.split_to(room.min(bytes.len()));
            let end = bytes.is_empty() && http_body::Body::is_end_stream(&body);
            if stream.send_data(piece, end).is_err() || end {
                return body;
            }
        }
    }
}

impl Lease {
    /// Whether the connection gives a sign of life, where it has been quiet for a while. One that does not gets no
    /// more requests.
    pub(super) async fn is_alive(&self) -> bool {
        let pulse = &self.0.pulse;
        // This lease is one of them.
        let patience = if pulse.streams.load(Ordering::Relaxed) > 1 { QUIET_BUSY } else { QUIET_IDLE };
        if pulse.heard_at().elapsed() < patience {
            return true;
        }
        let news = pulse.news.notified();
        pulse.wanted.store(true, Ordering::Relaxed);
        pulse.ask.notify_one();
        let alive = timeout(SIGN_WITHIN, news).await.is_ok() && self.0.is_open();
        if !alive {
            pulse.retired.store(true, Ordering::Relaxed);
        }
        alive
    }

    /// Sends a request and waits for the final head.
    pub(super) async fn send(
        self,
        head: http::request::Parts,
        body: RequestBody,
    ) -> Result<Response<Body>, Failure> {
        let mut sender = self.0.sender.clone();
        let request = Request::from_parts(head, ());
        let is_empty = http_body::Body::is_end_stream(&body);
        let (response, mut stream) = match sender.send_request(request, is_empty) {
            Ok(sent) => sent,
            // What the connection does not take is still ours.
            Err(error) => {
                let user = !(error.is_io() || error.is_go_away() || error.is_reset());
                let failure = failure_of(error, false);
                return Err(Failure { untouched: (!user).then_some(body), ..failure });
            }
        };
        let mut whole = None;
        let mut pump = None;
        match body {
            RequestBody::Empty => {}
            // It is in memory anyway: the library sends it as the upstream takes it.
            RequestBody::Whole(bytes) => {
                if !is_empty {
                    let _ = stream.send_data(bytes.clone(), true);
                }
                whole = Some(bytes);
            }
            RequestBody::Upload(body) if is_empty => drop(body),
            RequestBody::Upload(body) => pump = Some(Pump::start(body, stream)),
        }
        match response.await {
            Ok(response) => {
                if let Some(pump) = &pump {
                    pump.forget();
                }
                Ok(response.map(|stream| Body { stream, _pump: pump, _lease: self }))
            }
            Err(error) => {
                let pulse = &self.0.pulse;
                let untouched = is_untouched(&error);
                if untouched && error.is_reset() {
                    // It has as many as it wants.
                    let streams = pulse.streams.load(Ordering::Relaxed).saturating_sub(1);
                    pulse.refuses_above.store(streams, Ordering::Relaxed);
                }
                let failure = failure_of(error, pulse.silent.load(Ordering::Relaxed));
                let untouched = match (untouched, whole, pump) {
                    (false, ..) => None,
                    (true, _, Some(pump)) => pump.take_back().await,
                    (true, Some(bytes), None) => Some(RequestBody::Whole(bytes)),
                    (true, None, None) => Some(RequestBody::Empty),
                };
                Err(Failure { untouched, ..failure })
            }
        }
    }
}

/// The body of a response. Dropped before its end it resets its stream.
pub(super) struct Body {
    stream: RecvStream,
    _pump: Option<Pump>,
    _lease: Lease,
}

impl Body {
    pub(super) fn is_end(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// The next bytes, `None` at the proper end.
    pub(super) async fn next(&mut self) -> Option<Result<Bytes, UpstreamError>> {
        loop {
            match self.stream.data().await? {
                Ok(bytes) => {
                    // It is taken as soon as it is passed on: the caller's own buffers are bounded.
                    let _ = self.stream.flow_control().release_capacity(bytes.len());
                    if !bytes.is_empty() {
                        return Some(Ok(bytes));
                    }
                }
                // An upstream that has answered may ask for the rest of the request to be kept (RFC 9113 §8.1).
                Err(_) if self.stream.is_end_stream() => return None,
                Err(error) => {
                    let silent = self._lease.0.pulse.silent.load(Ordering::Relaxed);
                    return Some(Err(failure_of(error, silent).error));
                }
            }
        }
    }
}

const _: () = assert!(READ_BUFFER_BYTES >= limits::HEAD_BYTES);
