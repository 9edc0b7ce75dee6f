//! The demo page: what the tunnel `demo` serves until there is something better.
//!
//! What enters are requests that have come the whole way; what leaves is a page that shows that way,
//! and two small things to try, `/echo` and `/events`. No script, no outside resource.

mod page;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{header::value_to_text, limits};
use serde::Serialize;
use tokio::{
    net::TcpListener,
    time::{self, Interval},
};

use crate::{aws::Aws, clock::epoch_us, listener, public::Arrivals};

/// How many events `/events` sends, and how far apart.
const EVENTS: u32 = 10;
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// What the page may do: nothing but look as it does.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// What the page shows.
#[derive(Debug)]
pub struct Demo {
    /// Where the states of a run are known.
    pub aws: Arc<Aws>,
    /// When requests came to the front.
    pub arrivals: Arrivals,
    /// Where agents connect.
    pub agents: SocketAddr,
    /// What an agent may connect with.
    pub token_file: PathBuf,
}

/// Serves the demo on a free port of loopback; gives its address.
///
/// # Errors
///
/// When there is no port.
pub async fn start(demo: Demo) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(serve(listener, Arc::new(demo)));
    Ok(address)
}

async fn serve(listener: TcpListener, demo: Arc<Demo>) {
    loop {
        let (stream, _) = listener::accept(&listener, "the demo page").await;
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        let demo = demo.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let demo = demo.clone();
                async move { Ok::<_, Infallible>(answer(&demo, request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .max_headers(limits::HEADER_FIELDS + 24)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::trace!(%error, "demo connection ended");
            }
        });
    }
}

async fn answer(demo: &Demo, request: Request<Incoming>) -> Response<Answer> {
    match request.uri().path() {
        "/" => page(demo, request.headers()),
        "/echo" => echo(request).await,
        "/events" => events(),
        _ => text(
            StatusCode::NOT_FOUND,
            "text/plain; charset=utf-8",
            "Nothing here. Try /, /echo or /events.\n",
        ),
    }
}

fn page(demo: &Demo, headers: &HeaderMap) -> Response<Answer> {
    let field = |name: &str| headers.get(name).map(|value| value_to_text(value).into_owned());
    let arrived_here_us = epoch_us();
    let request_id = field("x-tunnel-request-id");
    let run = request_id.as_deref().and_then(|id| demo.aws.states().trace(id));
    let arrival = field("x-amzn-trace-id").and_then(|id| demo.arrivals.find(&id));
    let scheme = field("x-forwarded-proto").unwrap_or_else(|| "http".to_owned());
    let host = field("x-forwarded-host").or_else(|| field("host")).unwrap_or_else(|| "localhost".to_owned());
    let prefix = field("x-forwarded-prefix").unwrap_or_default();
    let html = page::render(&page::Facts {
        url: format!("{scheme}://{host}{prefix}"),
        client: field("x-forwarded-for").unwrap_or_else(|| "unknown".to_owned()),
        request_id: request_id
            .unwrap_or_else(|| "none: this request did not come through the tunnel".to_owned()),
        process: arrival.as_ref().and_then(|arrival| {
            let caller = demo.aws.callers().find(arrival.access_key.get()?)?;
            Some(caller.environment.to_string())
        }),
        run,
        arrived_at_front_us: arrival.map(|arrival| arrival.arrived_us),
        arrived_here_us,
        agents: demo.agents,
        token_file: demo.token_file.display().to_string(),
    });
    let mut response = text(StatusCode::OK, "text/html; charset=utf-8", html);
    response.headers_mut().insert("content-security-policy", HeaderValue::from_static(POLICY));
    response
}

/// The request, as it has arrived.
#[derive(Serialize)]
struct Echo<'a> {
    method: &'a str,
    target: String,
    headers: Vec<(&'a str, String)>,
    body: String,
    body_is_base64: bool,
}

async fn echo(request: Request<Incoming>) -> Response<Answer> {
    let (parts, body) = request.into_parts();
    let Ok(body) = Limited::new(body, limits::EVENT_BYTES).collect().await else {
        return text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "text/plain; charset=utf-8",
            "That is too much to repeat.\n",
        );
    };
    let body = body.to_bytes();
    let as_text = std::str::from_utf8(&body).ok();
    let echo = Echo {
        method: parts.method.as_str(),
        target: parts.uri.to_string(),
        headers: parts
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value_to_text(value).into_owned()))
            .collect(),
        body: as_text.map_or_else(|| STANDARD.encode(&body), str::to_owned),
        body_is_base64: as_text.is_none(),
    };
    let mut json = serde_json::to_string_pretty(&echo).expect("the echo has string keys");
    json.push('\n');
    text(StatusCode::OK, "application/json", json)
}

fn events() -> Response<Answer> {
    let mut response =
        Response::new(Answer::Events(Box::new(Events { interval: time::interval(EVENT_INTERVAL), sent: 0 })));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn text(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(Full::new(body.into())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// The body of an answer.
enum Answer {
    Whole(Full<Bytes>),
    Events(Box<Events>),
}

/// Events that are still to come.
struct Events {
    interval: Interval,
    sent: u32,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context),
            Self::Events(events) if events.sent == EVENTS => Poll::Ready(None),
            Self::Events(events) => events.interval.poll_tick(context).map(|_| {
                events.sent += 1;
                let event = format!("id: {0}\ndata: event {0} of {EVENTS}\n\n", events.sent);
                Some(Ok(Frame::data(event.into())))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Events(events) => events.sent == EVENTS,
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Events(_) => http_body::SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn start() -> SocketAddr {
        let aws = Aws::start(crate::aws::Options::default()).await.unwrap();
        super::start(Demo {
            aws: Arc::new(aws),
            arrivals: Arrivals::default(),
            agents: "127.0.0.1:8081".parse().unwrap(),
            token_file: "/tmp/<token>".into(),
        })
        .await
        .unwrap()
    }

    async fn exchange(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_page_escapes_what_it_shows() {
        let address = start().await;
        let page = exchange(
            address,
            "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Host: <script>alert(1)</script>\r\n\
             X-Tunnel-Request-Id: \"><img>\r\nX-Forwarded-For: 1.2.3.4&amp;'\r\nConnection: close\r\n\r\n",
        )
        .await;
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{page}");
        assert!(!page.contains("<script") && !page.contains("<img") && !page.contains("/<token>"), "{page}");
        assert!(page.contains("1.2.3.4&amp;amp;&#39;"), "{page}");
        for outside in ["src=", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[tokio::test]
    async fn echo_repeats_the_request() {
        let address = start().await;
        let answer = exchange(
            address,
            "PROPFIND /echo?a=%20&a HTTP/1.1\r\nHost: a\r\nX-Two: 1\r\nX-Two: 2\r\nContent-Length: 3\r\n\
             Connection: close\r\n\r\nhi\n",
        )
        .await;
        let json = &answer[answer.find("\r\n\r\n").unwrap()..];
        let echo: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!((&echo["method"], &echo["target"]), (&"PROPFIND".into(), &"/echo?a=%20&a".into()));
        assert_eq!((&echo["body"], &echo["body_is_base64"]), (&"hi\n".into(), &false.into()));
        assert_eq!(echo["headers"][2], serde_json::json!(["x-two", "2"]));
    }

    #[tokio::test(start_paused = true)]
    async fn events_come_one_by_one_and_end() {
        let mut answer =
            Answer::Events(Box::new(Events { interval: time::interval(EVENT_INTERVAL), sent: 0 }));
        let begun = time::Instant::now();
        for number in 1..=EVENTS {
            let event = answer.frame().await.unwrap().unwrap().into_data().unwrap();
            assert!(
                event.starts_with(format!("id: {number}\ndata: ").as_bytes()) && event.ends_with(b"\n\n")
            );
            assert_eq!(begun.elapsed(), EVENT_INTERVAL * (number - 1));
        }
        assert!(answer.frame().await.is_none());
    }
}
