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

/// When a connection with a waiting request is asked for a sign of life, and when it has ended.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// After so long without a byte, for the first, the second and each further PING since the last byte of an answer.
    ///
    /// Servers of gRPC close a connection at the third PING that comes within five minutes of the one before
    /// without anything of an answer between (gRPC's proposal A8, `GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS`).
    pings: [Duration; 3],
    /// A connection that does not answer a PING for so long has ended, and so have its requests. An application that
    /// keeps its whole server busy may be late with it.
    lost_after: Duration,
}

const PATIENCE: Patience = Patience {
    pings: [Duration::from_secs(2), Duration::from_secs(30), Duration::from_secs(301)],
    lost_after: Duration::from_secs(30),
};

/// No more PINGs than this before a new request while nothing of an answer comes: a new connection is cheaper than one
/// that is closed with all its streams.
const PINGS_BEFORE_REQUESTS: usize = 2;

/// What is known of a connection's life.
#[derive(Debug)]
struct Pulse {
    began: Instant,
    /// When the last byte came, and when the last stream ended: milliseconds after `began`.
    heard: AtomicU64,
    left: AtomicU64,
    streams: AtomicUsize,
    /// How many PINGs were sent since the last byte of an answer.
    asked: AtomicUsize,
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
            asked: AtomicUsize::new(0),
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

    /// Something of an answer has come.
    fn answered(&self) {
        self.asked.store(0, Ordering::Relaxed);
    }

    /// Asks for pings where they are due, and returns when there was no answer for too long.
    async fn watch(&self, mut pings: h2::PingPong, patience: Patience) {
        loop {
            if self.streams.load(Ordering::Relaxed) == 0 && !self.wanted.load(Ordering::Relaxed) {
                self.ask.notified().await;
                continue;
            }
            let heard = self.heard_at();
            if !self.wanted.swap(false, Ordering::Relaxed) {
                // A request that has just begun is given its time, whenever the last byte came.
                let asked = self.asked.load(Ordering::Relaxed).min(patience.pings.len() - 1);
                let due = Instant::now().max(heard) + patience.pings[asked];
                tokio::select! {
                    () = sleep_until(due) => {}
                    () = self.ask.notified() => continue,
                }
                if self.heard_at() > heard {
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
            if pings.send_ping(h2::Ping::opaque()).is_ok() {
                self.asked.fetch_add(1, Ordering::Relaxed);
            }
            if timeout(patience.lost_after, news).await.is_err() {
                return;
            }
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
        Self::begin_with(stream, PATIENCE).await
    }

    async fn begin_with<S>(stream: S, patience: Patience) -> Result<Arc<Self>, UpstreamError>
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
                    Some(pings) => watched.watch(pings, patience).await,
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
    task: AbortOnDropHandle<Box<UploadBody>>,
    sent: Arc<Mutex<Option<Vec<Bytes>>>>,
}

impl Pump {
    fn start(body: Box<UploadBody>, stream: SendStream<Bytes>) -> Self {
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
    mut body: Box<UploadBody>,
    mut stream: SendStream<Bytes>,
    sent: Arc<Mutex<Option<Vec<Bytes>>>>,
) -> Box<UploadBody> {
    let mut kept = 0;
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
        {
            let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
            kept += bytes.len();
            match &mut *sent {
                Some(sent) if kept <= limits::REQUEST_BODY_BYTES => sent.push(bytes.clone()),
                // A streamed body is not kept whole to be sent again.
                _ => *sent = None,
            }
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
        if pulse.asked.load(Ordering::Relaxed) >= PINGS_BEFORE_REQUESTS {
            pulse.retired.store(true, Ordering::Relaxed);
            return false;
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
                self.0.pulse.answered();
                if let Some(pump) = &pump {
                    pump.forget();
                }
                Ok(response.map(|stream| Body { stream, _pump: pump, lease: self }))
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
    lease: Lease,
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
                    self.lease.0.pulse.answered();
                    // It is taken as soon as it is passed on: the caller's own buffers are bounded.
                    let _ = self.stream.flow_control().release_capacity(bytes.len());
                    if !bytes.is_empty() {
                        return Some(Ok(bytes));
                    }
                }
                // An upstream that has answered may ask for the rest of the request to be kept (RFC 9113 §8.1).
                Err(_) if self.stream.is_end_stream() => return None,
                Err(error) => {
                    let silent = self.lease.0.pulse.silent.load(Ordering::Relaxed);
                    return Some(Err(failure_of(error, silent).error));
                }
            }
        }
    }
}

const _: () = assert!(READ_BUFFER_BYTES >= limits::HEAD_BYTES);

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const QUICK: Patience = Patience {
        pings: [Duration::from_millis(20), Duration::from_millis(120), Duration::from_secs(60)],
        lost_after: Duration::from_millis(500),
    };

    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;

    async fn frame(stream: &mut DuplexStream, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &id.to_be_bytes()].concat();
        let _ = stream.write_all(&[&head, payload].concat()).await;
    }

    /// What an upstream of bytes sees and does.
    struct Peer {
        stream: DuplexStream,
        pings: Vec<Instant>,
        requests: VecDeque<u32>,
    }

    impl Peer {
        async fn accept(mut stream: DuplexStream) -> Self {
            stream.read_exact(&mut [0; 24]).await.unwrap();
            frame(&mut stream, SETTINGS, 0, 0, &[]).await;
            Self { stream, pings: Vec::new(), requests: VecDeque::new() }
        }

        /// Takes note of one frame and answers PINGs; false at the end of the connection.
        async fn step(&mut self) -> bool {
            let mut head = [0; 9];
            if self.stream.read_exact(&mut head).await.is_err() {
                return false;
            }
            let [a, b, c, kind, flags, id @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.stream.read_exact(&mut payload).await.unwrap();
            match kind {
                SETTINGS if flags == 0 => frame(&mut self.stream, SETTINGS, 1, 0, &[]).await,
                PING if flags == 0 => {
                    self.pings.push(Instant::now());
                    frame(&mut self.stream, PING, 1, 0, &payload).await;
                }
                HEADERS => self.requests.push_back(u32::from_be_bytes(id)),
                _ => {}
            }
            true
        }

        /// Steps until something has come.
        async fn until(&mut self, done: impl Fn(&Self) -> bool) {
            while !done(self) {
                assert!(self.step().await, "the connection has ended");
            }
        }

        /// `:status: 200` without a body.
        async fn answer(&mut self) {
            let id = self.requests.pop_front().unwrap();
            frame(&mut self.stream, HEADERS, 5, id, &[0x88]).await;
        }
    }

    async fn pair() -> (Arc<Connection>, Peer) {
        let (ours, theirs) = duplex(64 * 1024);
        let (connection, mut peer) = tokio::join!(Connection::begin_with(ours, QUICK), async {
            let mut peer = Peer::accept(theirs).await;
            assert!(peer.step().await);
            peer
        });
        // Its settings were answered.
        assert!(peer.step().await);
        (connection.unwrap_or_else(|error| panic!("{error}")), peer)
    }

    fn send(connection: &Arc<Connection>) -> JoinHandle<Result<Response<Body>, Failure>> {
        let lease = connection.enter().expect("a place");
        let head = Request::get("http://localhost/").body(()).unwrap().into_parts().0;
        tokio::spawn(lease.send(head, RequestBody::Empty))
    }

    #[tokio::test]
    async fn a_connection_that_does_not_answer_a_ping_has_ended_and_so_have_its_requests() {
        let (connection, mut peer) = pair().await;
        let waits = [send(&connection), send(&connection)];
        peer.until(|peer| peer.requests.len() == 2).await;
        // From here on it is silent.
        for wait in waits {
            let Err(failure) = wait.await.unwrap() else { panic!("an answer") };
            assert!(matches!(failure.error, UpstreamError::Late(_)), "{}", failure.error);
            assert!(failure.died && failure.untouched.is_none());
        }
        assert!(connection.enter().is_none(), "it takes no more requests");
        drop(connection);
        // It was asked, and then closed.
        while peer.step().await {}
        assert!(!peer.pings.is_empty());
    }

    #[tokio::test]
    async fn a_body_that_stops_on_a_silent_connection_ends_with_it() {
        let (connection, mut peer) = pair().await;
        let wait = send(&connection);
        peer.until(|peer| !peer.requests.is_empty()).await;
        frame(&mut peer.stream, HEADERS, 4, 1, &[0x88]).await;
        let Ok(response) = wait.await.unwrap() else { panic!("a head") };
        let end = response.into_body().next().await.expect("the end is no proper one");
        assert!(matches!(end, Err(UpstreamError::Late(_))));
    }

    #[tokio::test]
    async fn one_that_answers_pings_is_waited_for_and_not_asked_more_often_than_grpc_allows() {
        let (connection, mut peer) = pair().await;
        let wait = send(&connection);
        peer.until(|peer| peer.pings.len() == 2).await;
        assert!(peer.pings[1] - peer.pings[0] >= QUICK.pings[1]);
        // Two are no offence. The third would come after a minute here; nothing before, whatever else is asked.
        assert!(timeout(2 * QUICK.lost_after, peer.step()).await.is_err());
        assert!(!wait.is_finished());
        // What is asked before another request counts as well: that one goes elsewhere, and nothing breaks.
        connection.pulse.heard.store(0, Ordering::Relaxed);
        let other = connection.enter().expect("a place");
        if connection.pulse.began.elapsed() < QUIET_BUSY {
            tokio::time::sleep(QUIET_BUSY).await;
        }
        assert!(!other.is_alive().await && connection.enter().is_none());
        drop(other);
        peer.answer().await;
        let Ok(response) = wait.await.unwrap() else { panic!("an answer") };
        assert_eq!((response.status(), peer.pings.len()), (http::StatusCode::OK, 2));
    }

    #[tokio::test]
    async fn an_answer_earns_pings_anew() {
        let (connection, mut peer) = pair().await;
        for round in 1..=4 {
            let wait = send(&connection);
            peer.until(|peer| peer.pings.len() >= round).await;
            peer.answer().await;
            assert!(wait.await.unwrap().is_ok());
        }
    }
}
