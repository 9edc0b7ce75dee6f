//! What the HTTP stack refuses before it is a request (a line that is no request's, a head that is too long, too many
//! fields) is said in the words of every other refusal, with a code and an id.
//!
//! hyper answers by itself, with a status and nothing else, and asks nobody. [`Refusals`] is the socket below it: what
//! hyper writes while no request is being answered can be nothing but such an answer, and that is replaced. Enters and
//! leaves: the bytes of one public connection, all others unchanged.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use exchange::answer::problem;
use http_body::{Body, Frame, SizeHint};
use proto::{error::ErrorCode, id::RequestId};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// For how long the rest of what was refused is read, so that its client sees the answer and not a reset.
const DRAIN: Duration = Duration::from_secs(1);

/// Whether a request of the connection is being answered.
#[derive(Debug)]
pub struct Calls(Arc<State>);

#[derive(Debug)]
struct State {
    /// A request has come, and its answer has not been handed over whole.
    answering: AtomicBool,
    /// All of the answers has been written.
    written: AtomicBool,
}

impl Calls {
    /// Notes a request. It is being answered until what is returned is dropped: it goes with the body.
    #[must_use]
    pub fn begin(&self) -> Call {
        self.0.answering.store(true, Ordering::Release);
        self.0.written.store(false, Ordering::Release);
        Call(Arc::clone(&self.0))
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub struct Call(Arc<State>);

impl Call {
    /// Has the request count as being answered until `body` has been handed over.
    pub const fn until_end_of<B>(self, body: B) -> Answering<B> {
        Answering { body, _call: self }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.answering.store(false, Ordering::Release);
    }
}

/// The body of an answer.
#[derive(Debug)]
pub struct Answering<B> {
    body: B,
    _call: Call,
}

impl<B: Body + Unpin> Body for Answering<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A public client's socket, in which hyper's own answers are replaced.
#[derive(Debug)]
pub struct Refusals<S> {
    stream: S,
    state: Arc<State>,
    /// What is written in place of hyper's answer, and how much of it has been.
    instead: Option<(Vec<u8>, usize)>,
    drain: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Refusals<S> {
    /// Over `stream`, and where to note requests.
    pub fn new(stream: S) -> (Self, Calls) {
        let state = Arc::new(State { answering: AtomicBool::new(false), written: AtomicBool::new(true) });
        (Self { stream, state: Arc::clone(&state), instead: None, drain: None }, Calls(state))
    }

    /// Whether these bytes are an answer of hyper's own, which then is noted.
    fn is_replaced(&mut self, bytes: &[u8]) -> bool {
        if self.instead.is_some() {
            return true;
        }
        if self.state.answering.load(Ordering::Acquire) || !self.state.written.load(Ordering::Acquire) {
            return false;
        }
        self.instead = replacement(bytes).map(|instead| (instead, 0));
        self.instead.is_some()
    }

    /// Writes what stands in place of hyper's answer.
    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some((bytes, written)) = &mut self.instead else { return Poll::Ready(Ok(())) };
        while *written < bytes.len() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &bytes[*written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                more => *written += more,
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// What is said in place of an answer of hyper's, if it is one.
fn replacement(bytes: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let head = text.strip_suffix("\r\n\r\n")?;
    let code = match head.strip_prefix("HTTP/1.")?.get(2..5)? {
        "400" => ErrorCode::BadRequest,
        "414" => ErrorCode::TargetTooLong,
        "431" => ErrorCode::HeadTooLarge,
        _ => return None,
    };
    let request_id = RequestId::from_random(crate::random().ok()?);
    tracing::info!(%request_id, error_code = code.as_str(), "what came is no request that can be read");
    // Nobody knows whether a page was wanted.
    let (ours, body) = problem(code, &request_id, false);
    let mut answer: Vec<u8> = Vec::with_capacity(body.len() + 512);
    for line in head.split("\r\n").filter(|line| !line.to_ascii_lowercase().starts_with("content-length:")) {
        answer.extend_from_slice(line.as_bytes());
        answer.extend_from_slice(b"\r\n");
    }
    for (name, value) in ours.headers.iter() {
        answer.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    answer.extend_from_slice(b"\r\n");
    answer.extend_from_slice(body.as_bytes());
    Some(answer)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Refusals<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Refusals<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_replaced(bytes) {
            ready!(self.poll_instead(cx))?;
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if slices.iter().find(|slice| !slice.is_empty()).is_some_and(|first| self.is_replaced(first)) {
            ready!(self.poll_instead(cx))?;
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        // hyper comes here when it has nothing left to write.
        if !self.state.answering.load(Ordering::Acquire) {
            self.state.written.store(true, Ordering::Release);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.instead.is_none() {
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.drain.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let drain = this.drain.get_or_insert_with(|| Box::pin(sleep(DRAIN)));
        let mut room = [0; 4096];
        loop {
            if drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut rest = ReadBuf::new(&mut room);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut rest)) {
                Ok(()) if !rest.filled().is_empty() => {}
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use hyper::{body::Incoming, server::conn::http1, service::service_fn};
    use hyper_util::{
        rt::{TokioExecutor, TokioIo},
        server::conn::auto,
    };
    use proto::limits;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// What hyper's own answer looks like, as a body.
    const LOOKS_ALIKE: &str = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

    async fn echo(
        calls: Arc<Calls>,
        request: Request<Incoming>,
    ) -> Result<Response<Answering<Full<Bytes>>>, Infallible> {
        let call = calls.begin();
        let body = match request.into_body().collect().await.map(http_body_util::Collected::to_bytes) {
            Ok(body) if body.is_empty() => LOOKS_ALIKE,
            Ok(_) => "whole",
            Err(_) => "broken",
        };
        Ok(Response::new(call.until_end_of(Full::from(body))))
    }

    /// Everything that is answered to these bytes by hyper as `relay` uses it, and as HTTP/1.1 alone.
    async fn answers(sent: &[u8]) -> [String; 2] {
        let mut answers = [const { String::new() }; 2];
        for (answer, is_auto) in answers.iter_mut().zip([true, false]) {
            let (mut client, server) = duplex(16 * 1024);
            let served = tokio::spawn(async move {
                let (stream, calls) = Refusals::new(server);
                let (calls, io) = (Arc::new(calls), TokioIo::new(stream));
                let service = service_fn(move |request| echo(Arc::clone(&calls), request));
                if is_auto {
                    let mut builder = auto::Builder::new(TokioExecutor::new());
                    builder.http1().max_headers(limits::HEADER_FIELDS + 24);
                    let _ = builder.serve_connection_with_upgrades(io, service).await;
                } else {
                    let _ = http1::Builder::new()
                        .max_headers(limits::HEADER_FIELDS + 24)
                        .serve_connection(io, service)
                        .with_upgrades()
                        .await;
                }
            });
            let (mut read, mut write) = tokio::io::split(&mut client);
            let write = async {
                let _ = write.write_all(sent).await;
            };
            let ((), read) = tokio::join!(write, read.read_to_string(answer));
            read.unwrap();
            drop(client);
            served.await.unwrap();
        }
        answers
    }

    fn head(fields: usize, bytes: usize) -> Vec<u8> {
        let mut head = String::from("GET / HTTP/1.1\r\nConnection: close\r\n");
        for number in 2..fields {
            head += &format!("x-{number}: y\r\n");
        }
        head += "x: ";
        head += &"y".repeat(bytes.saturating_sub(head.len() + 4));
        (head + "\r\n\r\n").into_bytes()
    }

    #[tokio::test]
    async fn what_is_refused_before_it_is_a_request_is_said_in_our_words() {
        let fields = limits::HEADER_FIELDS + 24;
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000)).into_bytes();
        for (sent, status, code) in [
            (b"GET\r\n\r\n".to_vec(), 400, "bad_request"),
            (b"GET / HTTP/1.1\r\nno field\r\n\r\n".to_vec(), 400, "bad_request"),
            (b"GET / HTTP/9.1\r\n\r\n".to_vec(), 400, "bad_request"),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n".to_vec(), 400, "bad_request"),
            (
                b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_vec(),
                400,
                "bad_request",
            ),
            (long, 414, "target_too_long"),
            (head(fields + 1, 0), 431, "head_too_large"),
            (head(3, 600_000), 431, "head_too_large"),
        ] {
            for answer in answers(&sent).await {
                let seen = String::from_utf8_lossy(&sent[..sent.len().min(60)]);
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{seen}: {answer}");
                let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                for field in
                    [&*format!("x-tunnel-error: {code}"), "connection: close", "cache-control: no-store"]
                {
                    assert!(head.contains(field), "{seen}: {answer}");
                }
                let id = head.split("x-tunnel-request-id: ").nth(1).unwrap().split("\r\n").next().unwrap();
                assert!(id.len() == 32 && body.contains(id), "{seen}: {answer}");
                assert_eq!(head.matches("content-length").count(), 1);
                assert!(head.contains(&format!("content-length: {}", body.len())), "{seen}: {answer}");
            }
        }
        for answer in answers(&head(fields, 0)).await {
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "as many fields as may be: {answer}");
        }
    }

    #[tokio::test]
    async fn what_an_upstream_says_stays_as_it_is_whatever_it_looks_like() {
        let two = b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n";
        for answer in answers(two).await {
            assert_eq!(answer.matches(LOOKS_ALIKE).count(), 2, "{answer}");
            assert!(!answer.contains("x-tunnel"), "{answer}");
        }
        // Behind an answer, the refusal comes as what it is.
        for answer in answers(b"GET /a HTTP/1.1\r\n\r\nnonsense\r\n\r\n").await {
            assert_eq!(answer.matches(LOOKS_ALIKE).count(), 1, "{answer}");
        }
        // A body that cannot be read is the service's to refuse.
        for answer in answers(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").await {
            assert!(answer.contains("broken") && !answer.contains("x-tunnel"), "{answer}");
        }
    }
}
