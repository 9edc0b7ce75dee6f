//! The Runtime API that functions poll (version 2018-06-01), on loopback.
//!
//! Each process has a port of its own, which is how it is known: `AWS_LAMBDA_RUNTIME_API` is a host
//! and a port, and not every runtime client would keep a path after them.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll as TaskPoll},
};

use bytes::{Bytes, BytesMut};
use edge::connections::{SendError, read};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use super::{
    ANSWER_BYTES, InvokeError, Piece, STREAM_BYTES, STREAM_PIECES, StreamBody, StreamingResponse,
    pool::{EnvironmentId, Event, Poll, Pool, Port, Refused, Reply},
    process::Freezer,
};
use crate::listener;

/// What separates a streamed answer's head from its body.
const PRELUDE_END: [u8; 8] = [0; 8];

/// The most bytes of a streamed answer's head: a response head in JSON, escapes included.
const PRELUDE_BYTES: usize = 512 * 1024;

/// The most bytes of an error report.
const REPORT_BYTES: usize = 256 * 1024;

/// How many bytes of a stream the kernel may hold for us, so that a public client that reads slowly
/// is felt by the function and not only by memory.
const RECEIVE_BUFFER_BYTES: usize = 256 * 1024;

const STREAMING: &str = "streaming";
const PRELUDE_TYPE: &str = "application/vnd.awslambda.http-integration-response";

/// Opens a port for the process of one environment.
pub(super) fn start(pool: &Arc<Pool>, environment: EnvironmentId) -> io::Result<Port> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // Accepted sockets inherit it; later would be too late for the window's scale.
    socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(8)?;
    let listener = TcpListener::from_std(socket.into())?;
    let address = listener.local_addr()?;
    let freezer = Arc::<Freezer>::default();
    let server = tokio::spawn(serve(listener, pool.clone(), environment, freezer.clone())).abort_handle();
    Ok(Port { address, server, freezer })
}

async fn serve(listener: TcpListener, pool: Arc<Pool>, environment: EnvironmentId, freezer: Arc<Freezer>) {
    loop {
        let (stream, _) = listener::accept(&listener, "the Runtime API").await;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "connection lost before it began");
            continue;
        }
        let (pool, environment, freezer) = (pool.clone(), environment.clone(), freezer.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let (pool, environment) = (&pool, &environment);
                async move { Ok::<_, Infallible>(handle(pool, environment, request).await) }
            });
            let connection = http1::Builder::new()
                .auto_date_header(false)
                .serve_connection(TokioIo::new(ProcessStream { stream, freezer }), service);
            if let Err(error) = connection.await {
                tracing::trace!(%error, "runtime api connection ended");
            }
        });
    }
}

async fn handle(
    pool: &Arc<Pool>,
    environment: &EnvironmentId,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let Some(rest) = path.strip_prefix("/2018-06-01/runtime/") else {
        return refuse(StatusCode::NOT_FOUND, "InvalidPath");
    };
    if let Some(rest) = rest.strip_prefix("invocation/") {
        if rest == "next" {
            return match *request.method() {
                Method::GET => next(pool, environment).await,
                _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "InvalidMethod"),
            };
        }
        return match (request.method(), rest.split_once('/')) {
            (&Method::POST, Some((id, "response"))) => answer(pool, environment, id, request).await,
            (&Method::POST, Some((id, "error"))) => error(pool, environment, id, request).await,
            _ => refuse(StatusCode::NOT_FOUND, "InvalidPath"),
        };
    }
    match (request.method(), rest) {
        (&Method::POST, "init/error") => {
            let report = read_report(request).await;
            match pool.init_failed(environment, InvokeError::Init(report.to_string())) {
                Ok(()) => accepted(),
                Err(refused) => refuse_for(refused),
            }
        }
        _ => refuse(StatusCode::NOT_FOUND, "InvalidPath"),
    }
}

/// `GET invocation/next`: answers when there is an event.
async fn next(pool: &Arc<Pool>, environment: &EnvironmentId) -> Response<Full<Bytes>> {
    let event = match pool.next(environment) {
        Ok(Poll::Ready(event)) => event,
        Ok(Poll::Parked(event)) => match event.await {
            Ok(event) => event,
            Err(_) => return refuse(StatusCode::GONE, "EnvironmentClosed"),
        },
        Err(refused) => return refuse_for(refused),
    };
    let Event { aws_request_id, deadline_ms, payload } = event;
    let arn = format!("arn:aws:lambda:{}:{}:function:{}", super::REGION, super::ACCOUNT, pool.function());
    let mut response = Response::new(Full::new(payload));
    let headers = response.headers_mut();
    let text = |text: &str| HeaderValue::from_str(text).expect("ids, numbers and names are visible ASCII");
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("lambda-runtime-aws-request-id", text(&aws_request_id));
    headers.insert(
        "lambda-runtime-deadline-ms",
        HeaderValue::from(u64::try_from(deadline_ms).unwrap_or(u64::MAX)),
    );
    headers.insert("lambda-runtime-invoked-function-arn", text(&arn));
    headers.insert(
        "lambda-runtime-trace-id",
        text(&format!("Root=1-{}-{};Sampled=0", &aws_request_id[..8], &aws_request_id.replace('-', "")[8..])),
    );
    response
}

/// `POST invocation/ID/response`, buffered or streaming.
async fn answer(
    pool: &Arc<Pool>,
    environment: &EnvironmentId,
    aws_request_id: &str,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let reply = match pool.take_reply(environment, aws_request_id) {
        Ok(reply) => reply,
        Err(refused) => return refuse_for(refused),
    };
    let is_streaming = request
        .headers()
        .get("lambda-runtime-function-response-mode")
        .is_some_and(|mode| mode.as_bytes().eq_ignore_ascii_case(STREAMING.as_bytes()));
    let has_prelude = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().eq_ignore_ascii_case(PRELUDE_TYPE.as_bytes()));
    match reply {
        Reply::Streaming { head, .. } if is_streaming => {
            let answered = || pool.answered(environment);
            stream(request.into_body(), has_prelude, head, answered).await
        }
        reply => {
            let body = match read(request.into_body(), ANSWER_BYTES).await {
                Ok(body) => body,
                Err(SendError::TooLong) => {
                    reply.fail(InvokeError::AnswerTooLarge);
                    return refuse(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge");
                }
                Err(_) => {
                    reply.fail(super::lost());
                    return refuse(StatusCode::BAD_REQUEST, "BrokenUpload");
                }
            };
            pool.answered(environment);
            match reply {
                Reply::Buffered(reply) => drop(reply.send(Ok(body))),
                Reply::Streaming { head, .. } => {
                    let (pieces, receiver) = mpsc::channel(2);
                    for piece in [Piece::Chunk(body), Piece::End] {
                        pieces.try_send(piece).expect("the channel was made for both");
                    }
                    let _ = head.send(Ok(StreamingResponse {
                        prelude: Bytes::new(),
                        body: StreamBody(receiver),
                        may_hang: false,
                    }));
                }
            }
            accepted()
        }
    }
}

/// Hands a streamed answer on, only as fast as it is taken.
async fn stream(
    mut body: Incoming,
    has_prelude: bool,
    mut head: tokio::sync::oneshot::Sender<Result<StreamingResponse, InvokeError>>,
    answered: impl Fn(),
) -> Response<Full<Bytes>> {
    let mut rest = Bytes::new();
    let mut prelude = Bytes::new();
    let mut is_apart = true;
    if has_prelude {
        let mut begun = BytesMut::new();
        loop {
            if let Some(split) = split_prelude(&mut begun) {
                (prelude, rest) = split;
                break;
            }
            if begun.len() > PRELUDE_BYTES {
                let _ = head.send(Err(InvokeError::Prelude));
                return last(refuse(StatusCode::BAD_REQUEST, "InvalidPrelude"));
            }
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = head.closed() => return last(accepted()),
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        is_apart = *data == PRELUDE_END;
                        begun.extend_from_slice(&data);
                    }
                    Err(_trailers) => {
                        let _ = head.send(Err(InvokeError::Prelude));
                        return accepted();
                    }
                },
                None => {
                    let _ = head.send(Err(InvokeError::Prelude));
                    return refuse(StatusCode::BAD_REQUEST, "InvalidPrelude");
                }
                Some(Err(_)) => {
                    let _ = head.send(Err(super::lost()));
                    return refuse(StatusCode::BAD_REQUEST, "BrokenUpload");
                }
            }
        }
    }
    let (pieces, receiver) = mpsc::channel(STREAM_PIECES);
    let may_hang = rest.is_empty() && !is_apart;
    if head.send(Ok(StreamingResponse { prelude, body: StreamBody(receiver), may_hang })).is_err() {
        return last(accepted());
    }
    let mut total = 0;
    if !rest.is_empty() {
        total += rest.len() as u64;
        if pieces.send(Piece::Chunk(rest)).await.is_err() {
            return last(accepted());
        }
    }
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            // The public client has gone. Answering early and closing is how the function hears of it.
            () = pieces.closed() => return last(accepted()),
        };
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    total += data.len() as u64;
                    if total > STREAM_BYTES {
                        return last(refuse(StatusCode::PAYLOAD_TOO_LARGE, "ResponseSizeTooLarge"));
                    }
                    if pieces.send(Piece::Chunk(data)).await.is_err() {
                        return last(accepted());
                    }
                }
                Err(frame) => {
                    let failed = frame
                        .trailers_ref()
                        .is_some_and(|trailers| trailers.contains_key("lambda-runtime-function-error-type"));
                    if failed {
                        // Dropping `pieces` without an end is what breaks the stream off.
                        return accepted();
                    }
                }
            },
            None => {
                answered();
                let _ = pieces.send(Piece::End).await;
                return accepted();
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "streamed answer was broken off");
                return refuse(StatusCode::BAD_REQUEST, "BrokenUpload");
            }
        }
    }
}

/// Splits what has come so far into the head and the beginning of the body, once the separator is in.
fn split_prelude(begun: &mut BytesMut) -> Option<(Bytes, Bytes)> {
    let at = memchr::memmem::find(begun, &PRELUDE_END)?;
    let prelude = begun.split_to(at).freeze();
    let _ = begun.split_to(PRELUDE_END.len());
    Some((prelude, begun.split().freeze()))
}

/// `POST invocation/ID/error`.
async fn error(
    pool: &Arc<Pool>,
    environment: &EnvironmentId,
    aws_request_id: &str,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    match pool.take_reply(environment, aws_request_id) {
        Ok(reply) => {
            let Report { error_type, error_message } = read_report(request).await;
            pool.answered(environment);
            reply.fail(InvokeError::Function { error_type, message: error_message });
            accepted()
        }
        Err(refused) => refuse_for(refused),
    }
}

/// What a function says about its failure.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Report {
    error_type: String,
    error_message: String,
}

impl Default for Report {
    fn default() -> Self {
        Self { error_type: "Unhandled".to_owned(), error_message: String::new() }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.error_type, self.error_message)
    }
}

async fn read_report(request: Request<Incoming>) -> Report {
    match read(request.into_body(), REPORT_BYTES).await {
        Ok(body) => serde_json::from_slice(&body).unwrap_or_default(),
        Err(_) => Report::default(),
    }
}

fn accepted() -> Response<Full<Bytes>> {
    // No body: the runtime's client drops the answer unread and can use its connection again at once.
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::ACCEPTED;
    response
}

/// The same answer as the last one of its connection.
fn last(mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn refuse_for(refused: Refused) -> Response<Full<Bytes>> {
    match refused {
        Refused::UnknownEnvironment => refuse(StatusCode::FORBIDDEN, "UnknownEnvironment"),
        Refused::UnknownInvocation => refuse(StatusCode::BAD_REQUEST, "InvalidRequestID"),
    }
}

fn refuse(status: StatusCode, error_type: &'static str) -> Response<Full<Bytes>> {
    let body = format!(r#"{{"errorMessage":"{error_type}","errorType":"{error_type}"}}"#);
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A process's socket: it acknowledges at once what it has read, and lets a suspended process go on that it has written to.
///
/// A runtime client may leave Nagle's algorithm on: its second small write then waits for the
/// acknowledgement of the first, which the kernel would delay by 40 ms. The kernel forgets the
/// option, so it is set again after each read.
struct ProcessStream {
    stream: TcpStream,
    freezer: Arc<Freezer>,
}

impl ProcessStream {
    fn written(&self, result: TaskPoll<io::Result<usize>>) -> TaskPoll<io::Result<usize>> {
        if result.is_ready() {
            self.freezer.thaw();
        }
        result
    }
}

impl AsyncRead for ProcessStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> TaskPoll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        if result.is_ready() {
            let _ = SockRef::from(&self.stream).set_tcp_quickack(true);
        }
        result
    }
}

impl AsyncWrite for ProcessStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> TaskPoll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> TaskPoll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> TaskPoll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> TaskPoll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prelude_is_found_wherever_it_is_cut() {
        let whole = b"{\"statusCode\":200}\0\0\0\0\0\0\0\0body\0more";
        for cut in 0..whole.len() {
            let mut begun = BytesMut::from(&whole[..cut]);
            let early = split_prelude(&mut begun);
            assert_eq!(early.is_some(), cut >= 26, "{cut}");
            if early.is_none() {
                begun.extend_from_slice(&whole[cut..]);
                let (prelude, rest) = split_prelude(&mut begun).unwrap();
                assert_eq!(&prelude[..], b"{\"statusCode\":200}");
                assert_eq!(&rest[..], b"body\0more");
            }
        }
    }
}
