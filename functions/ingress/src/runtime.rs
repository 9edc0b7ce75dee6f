//! The streaming side of Lambda's Runtime API.
//!
//! `lambda_runtime` is not used here for one reason: when a stream breaks, it writes the error into the
//! body and ends it in an orderly way, so that a cut-off response would look like a whole one. Here a
//! broken stream carries the trailers that the Runtime API documents for it, and a producer that vanishes
//! without a word breaks the upload.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use edge::connections::{Bounds, Connections};
use exchange::public::{Head, Piece, Pieces};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{Either, Full};
use proto::limits;
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, sleep},
};

use crate::{
    answer::{DELIMITER, prelude},
    config::LENGTH,
};

const ERROR_TYPE: HeaderName = HeaderName::from_static("lambda-runtime-function-error-type");
const ERROR_BODY: HeaderName = HeaderName::from_static("lambda-runtime-function-error-body");

/// How it names itself.
const NAME: &str = concat!("tunnel-ingress/", env!("CARGO_PKG_VERSION"));

/// An event is waited for as long as it takes, and Lambda has bounded it.
const BOUNDS: Bounds = Bounds { connect: None, answer: None, bytes: usize::MAX };

/// How many pieces may wait between the producer of a body and the connection that sends it.
const PIECES: usize = 1;

/// One event to be answered.
#[derive(Debug)]
pub struct Invocation {
    /// Lambda's own id of it.
    pub aws_request_id: String,
    /// When Lambda ends the process, in milliseconds since 1970.
    pub deadline_ms: u64,
    /// The event.
    pub event: Bytes,
}

/// The head of an answer and where its body comes from.
#[derive(Debug)]
pub struct Answer {
    first: Bytes,
    rest: mpsc::Receiver<Piece>,
    /// What is kept until it is whole: the head, and what to say in its place where the body breaks off.
    held: Option<(Head, (Head, String))>,
}

/// How much of an answer is kept until it is whole; what is longer goes on as it comes.
const HELD_BYTES: usize = 4 * 1024 * 1024;

impl Answer {
    /// An answer that begins with `first` (head, delimiter and as much body as is there).
    #[must_use]
    pub fn new(first: Vec<u8>) -> (Self, Pieces) {
        let (pieces, rest) = mpsc::channel(PIECES);
        (Self { first: first.into(), rest, held: None }, pieces)
    }

    /// An answer of unknown length that is kept until it is whole, and replaced by `instead` if it breaks off. Its head goes
    /// out with a length then; without one where it is longer than what is kept.
    #[must_use]
    pub fn held(head: Head, first: Vec<u8>, instead: (Head, String)) -> (Self, Pieces) {
        let (pieces, rest) = mpsc::channel(PIECES);
        (Self { first: first.into(), rest, held: Some((head, instead)) }, pieces)
    }

    /// Keeps what is to be kept. Leaves an answer that goes out as it comes, or is over.
    async fn whole(mut self) -> Self {
        let Some((mut head, instead)) = self.held.take() else { return self };
        let mut body = Vec::from(self.first);
        let done = |head: &Head, body: &[u8]| {
            let mut bytes = prelude(head.status, &head.headers);
            bytes.extend_from_slice(body);
            let (answer, pieces) = Self::new(bytes);
            // There is room for one.
            drop(pieces.try_send(Piece::End));
            answer
        };
        while body.len() <= HELD_BYTES {
            match self.rest.recv().await {
                Some(Piece::Data(bytes)) => body.extend_from_slice(&bytes),
                Some(Piece::End) => {
                    head.headers.push(header::CONTENT_LENGTH, body.len().into());
                    head.headers.push(LENGTH, body.len().into());
                    return done(&head, &body);
                }
                Some(Piece::Broken) | None => {
                    let (head, page) = instead;
                    return done(&head, page.as_bytes());
                }
            }
        }
        let mut bytes = prelude(head.status, &head.headers);
        bytes.append(&mut body);
        Self { first: bytes.into(), rest: self.rest, held: None }
    }
}

/// The Runtime API of this process.
#[derive(Debug)]
pub struct Runtime {
    connections: Connections<Either<Full<Bytes>, AnswerBody>>,
    /// `http://host:port/2018-06-01/runtime`
    api: String,
}

impl Runtime {
    /// Finds the Runtime API in the environment.
    ///
    /// # Errors
    ///
    /// When it is not there: this is not a Lambda function's process.
    pub fn from_env() -> anyhow::Result<Self> {
        let api = std::env::var("AWS_LAMBDA_RUNTIME_API").context("AWS_LAMBDA_RUNTIME_API is not set")?;
        let api = format!("http://{api}/2018-06-01/runtime");
        api.parse::<Uri>().context("AWS_LAMBDA_RUNTIME_API is not an address")?;
        Ok(Self { connections: Connections::new(true), api })
    }

    /// Waits for the next event. Lambda freezes the process meanwhile.
    ///
    /// # Errors
    ///
    /// When the Runtime API is gone.
    pub async fn next(&self) -> anyhow::Result<Invocation> {
        let request = Request::get(format!("{}/invocation/next", self.api));
        let request = request.header(header::USER_AGENT, NAME).body(Either::Left(Full::default()))?;
        let (head, event) = self.connections.send(request, BOUNDS).await?.into_parts();
        anyhow::ensure!(head.status.is_success(), "the Runtime API answered {}", head.status);
        let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
        let aws_request_id = text("lambda-runtime-aws-request-id").context("an event has no id")?.to_owned();
        let deadline_ms = text("lambda-runtime-deadline-ms").and_then(|ms| ms.parse().ok());
        let deadline_ms = deadline_ms.context("an event has no deadline")?;
        Ok(Invocation { aws_request_id, deadline_ms, event })
    }

    /// Sends an answer, its body as it comes. Ends when all of it is sent or nobody takes it any more;
    /// the producer learns of the latter because its [`Pieces`] close.
    ///
    /// An answer that says nothing for `idle` is broken off.
    pub async fn respond(&self, aws_request_id: &str, answer: Answer, idle: Option<Duration>) {
        let body = AnswerBody::new(answer.whole().await, idle);
        let request = self
            .post(&format!("/invocation/{aws_request_id}/response"))
            .header("lambda-runtime-function-response-mode", "streaming")
            .header(header::CONTENT_TYPE, "application/vnd.awslambda.http-integration-response")
            .header(header::TRANSFER_ENCODING, "chunked")
            .header(header::TRAILER, "Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body")
            .body(Either::Right(body))
            .expect("the request's parts are fixed texts and an id that came as a header");
        if let Err(error) = self.connections.send(request, BOUNDS).await {
            tracing::debug!(%error, "answer was not taken to its end");
        }
    }

    /// Reports that the process cannot serve.
    pub async fn init_error(&self, error: &(dyn std::error::Error + Sync)) {
        let body = format!(
            r#"{{"errorType":"Runtime.InitError","errorMessage":{}}}"#,
            serde_json::to_string(&error.to_string()).unwrap_or_default()
        );
        let request = self
            .post("/init/error")
            .header(ERROR_TYPE, "Runtime.InitError")
            .body(Either::Left(Full::from(body)))
            .expect("the request's parts are fixed texts");
        // The process ends with the error either way; a Runtime API that hangs must not keep it.
        let bounds = Bounds { answer: Some(Duration::from_secs(1)), ..BOUNDS };
        drop(self.connections.send(request, bounds).await);
    }

    fn post(&self, path: &str) -> http::request::Builder {
        Request::post([&*self.api, path].concat()).header(header::USER_AGENT, NAME)
    }
}

/// The producer went away in the middle.
#[derive(Debug, thiserror::Error)]
#[error("the answer's producer vanished")]
struct Vanished;

/// What is still to be sent of the head.
#[derive(Debug)]
enum Begin {
    /// The head, and what is there of the body.
    Head(Bytes),
    /// The delimiter, of an answer whose body has no byte yet. It is a write of its own, and so is what follows: a
    /// front that gets head and end in one write does not end the answer (docs/aws-fronts.md, F1).
    Delimiter(Bytes),
    /// Nothing, but the end must not go out with the delimiter.
    Flush,
    /// Nothing.
    Done,
}

#[derive(Debug)]
struct AnswerBody {
    begin: Begin,
    rest: mpsc::Receiver<Piece>,
    /// How many bytes the front still lets through.
    left: u64,
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
    done: bool,
}

impl AnswerBody {
    fn new(answer: Answer, idle: Option<Duration>) -> Self {
        let body = memchr::memmem::find(&answer.first, &DELIMITER);
        let body = body.map_or(0, |at| answer.first.len() - at - DELIMITER.len());
        Self {
            begin: Begin::Head(answer.first),
            rest: answer.rest,
            left: limits::RESPONSE_BYTES - body as u64,
            idle: idle.map(|idle| (idle, Box::pin(sleep(idle)))),
            done: false,
        }
    }

    /// The trailers of an answer that should have gone on.
    fn broken(&mut self) -> Frame<Bytes> {
        self.done = true;
        // Whoever makes more of it learns that nobody wants it.
        self.rest.close();
        let mut trailers = HeaderMap::new();
        trailers.insert(ERROR_TYPE, HeaderValue::from_static("Tunnel.ResponseBroken"));
        // Base64 of {"errorMessage":"the response ended before its end"}.
        trailers.insert(
            ERROR_BODY,
            HeaderValue::from_static(
                "eyJlcnJvck1lc3NhZ2UiOiJ0aGUgcmVzcG9uc2UgZW5kZWQgYmVmb3JlIGl0cyBlbmQifQ==",
            ),
        );
        Frame::trailers(trailers)
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = Vanished;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Vanished>>> {
        match std::mem::replace(&mut self.begin, Begin::Done) {
            Begin::Head(mut head) => {
                // A body that is there makes the answer one that is not empty.
                if head.ends_with(&DELIMITER) {
                    let delimiter = head.split_off(head.len() - DELIMITER.len());
                    self.begin = Begin::Delimiter(delimiter);
                }
                return Poll::Ready(Some(Ok(Frame::data(head))));
            }
            Begin::Delimiter(delimiter) => {
                self.begin = Begin::Flush;
                return Poll::Ready(Some(Ok(Frame::data(delimiter))));
            }
            Begin::Flush => {
                // Nothing to send for one turn: what is written goes out.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Begin::Done => {}
        }
        if self.done {
            return Poll::Ready(None);
        }
        let Poll::Ready(piece) = self.rest.poll_recv(cx) else {
            if let Some((_, due)) = &mut self.idle
                && due.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Some(Ok(self.broken())));
            }
            return Poll::Pending;
        };
        if let Some((idle, due)) = &mut self.idle {
            due.as_mut().reset(Instant::now() + *idle);
        }
        Poll::Ready(match piece {
            Some(Piece::Data(bytes)) => match self.left.checked_sub(bytes.len() as u64) {
                Some(left) => {
                    self.left = left;
                    Some(Ok(Frame::data(bytes)))
                }
                // Cut by the front it would look whole.
                None => Some(Ok(self.broken())),
            },
            Some(Piece::End) => {
                self.done = true;
                None
            }
            Some(Piece::Broken) => Some(Ok(self.broken())),
            None => {
                self.done = true;
                Some(Err(Vanished))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    async fn collect(pieces: Vec<Piece>) -> Result<(Bytes, bool), Vanished> {
        let (answer, sender) = Answer::new(b"head".to_vec());
        let body = AnswerBody::new(answer, None);
        let send = async move {
            for piece in pieces {
                sender.send(piece).await.unwrap();
            }
        };
        let (body, ()) = tokio::join!(body.collect(), send);
        let body = body?;
        let broken = body.trailers().is_some_and(|trailers| trailers.contains_key(ERROR_TYPE));
        Ok((body.to_bytes(), broken))
    }

    /// What goes out of an answer that is kept, made of these pieces: its text and whether it was broken off.
    async fn held(pieces: Vec<Piece>) -> (String, bool) {
        let head = Head { status: 200, headers: proto::header::Headers::new() };
        let instead = Head { status: 502, headers: proto::header::Headers::new() };
        let (answer, sender) = Answer::held(head, b"first".to_vec(), (instead, "a page".to_owned()));
        let send = async move {
            for piece in pieces {
                sender.send(piece).await.unwrap();
            }
        };
        let body = async { AnswerBody::new(answer.whole().await, None).collect().await.unwrap() };
        let (body, ()) = tokio::join!(body, send);
        let broken = body.trailers().is_some_and(|trailers| trailers.contains_key(ERROR_TYPE));
        (String::from_utf8_lossy(&body.to_bytes()).into_owned(), broken)
    }

    #[tokio::test]
    async fn what_is_kept_has_a_length_or_is_an_error_and_never_half() {
        let data = || Piece::Data(Bytes::from_static(b"+rest"));
        let (whole, broken) = held(vec![data(), Piece::End]).await;
        assert!(
            whole.ends_with("first+rest") && !broken && whole.contains(r#""x-tunnel-length":"10""#),
            "{whole}"
        );
        for pieces in [vec![data(), Piece::Broken], vec![data()]] {
            let (error, broken) = held(pieces).await;
            assert!(error.contains("502") && error.ends_with("a page") && !broken, "{error}");
        }
        // At what is kept, and one byte past it.
        for (more, is_kept) in [(0, true), (1, false)] {
            let piece = Piece::Data(vec![b'x'; HELD_BYTES - 5 + more].into());
            let (long, broken) = held(vec![piece, Piece::End]).await;
            assert_eq!((long.contains("x-tunnel-length"), broken), (is_kept, false), "{more}");
        }
        let piece = Piece::Data(vec![b'x'; HELD_BYTES].into());
        assert!(held(vec![piece, Piece::Broken]).await.1, "it goes on as it comes, and breaks off as ever");
    }

    #[tokio::test]
    async fn what_the_front_would_cut_is_broken_off() {
        for (left, is_broken) in [(5, false), (4, true)] {
            let (answer, sender) = Answer::new(b"head".to_vec());
            let mut body = AnswerBody::new(answer, None);
            body.left = left;
            sender.try_send(Piece::Data(Bytes::from_static(b"+body"))).unwrap();
            let send = async move { drop(sender.send(Piece::End).await) };
            let (body, ()) = tokio::join!(body.collect(), send);
            assert_eq!(
                body.unwrap().trailers().is_some_and(|t| t.contains_key(ERROR_TYPE)),
                is_broken,
                "{left}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_pauses_for_too_long_is_broken_off() {
        let (answer, sender) = Answer::new(b"head".to_vec());
        let body = AnswerBody::new(answer, Some(Duration::from_secs(5)));
        let begun = Instant::now();
        let send = async move {
            for _ in 0..3 {
                sleep(Duration::from_secs(4)).await;
                sender.send(Piece::Data(Bytes::from_static(b"."))).await.unwrap();
            }
            sender.closed().await;
        };
        let (body, ()) = tokio::join!(body.collect(), send);
        assert!(body.unwrap().trailers().is_some_and(|trailers| trailers.contains_key(ERROR_TYPE)));
        assert_eq!(begun.elapsed().as_secs(), 17);
    }

    #[tokio::test]
    async fn only_an_announced_end_is_a_whole_answer() {
        let data = || Piece::Data(Bytes::from_static(b"+body"));
        assert_eq!(collect(vec![data(), Piece::End]).await.unwrap(), ("head+body".into(), false));
        assert_eq!(collect(vec![data(), Piece::Broken]).await.unwrap(), ("head+body".into(), true));
        assert!(collect(vec![data()]).await.is_err());
        assert!(collect(vec![]).await.is_err());
    }
}
