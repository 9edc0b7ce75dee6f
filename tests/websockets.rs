//! Public WebSockets through the whole path: a client, `local`'s front, `relay`, the run, `agentd`, an upstream.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, header};
use proto::{
    body::{Body, Codecs},
    error::ErrorCode,
    header::Headers,
    limits,
    message::{Accepted, AgentFrames, AgentMessage, EdgeMessage, Failed},
    socket::{Frame, FrameKind},
};
use rustix::process::Signal;
use tests::{
    Agent, Local, client, eventually, noise,
    raw_agent::{Call, RawAgent},
    tls::{acceptor, fixture},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config, client_async_with_config,
    tungstenite::{
        Message,
        client::IntoClientRequest as _,
        handshake::{
            derive_accept_key,
            server::{Request, Response},
        },
        protocol::{CloseFrame, WebSocketConfig},
    },
};

type Socket = WebSocketStream<TcpStream>;

/// Longer than any step takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_frame_size(Some(64 << 20)).max_message_size(Some(64 << 20))
}

/// An upstream that echoes messages, and answers some of them in its own way.
async fn echo() -> SocketAddr {
    counted_echo().await.0
}

/// The same, and how many WebSockets it has.
async fn counted_echo() -> (SocketAddr, Arc<AtomicUsize>) {
    let open = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&open);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let open = Arc::clone(&counted);
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                open.fetch_add(1, Ordering::Relaxed);
                serve(stream).await;
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    (address, open)
}

#[allow(clippy::result_large_err, reason = "the signature of a callback")]
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S) {
    let answer = |request: &Request, mut response: Response| {
        let fields = response.headers_mut();
        for name in ["origin", "host", "cookie", "sec-websocket-extensions", "x-forwarded-host"] {
            if let Some(value) = request.headers().get(name) {
                fields.insert(header::HeaderName::try_from(format!("x-saw-{name}")).unwrap(), value.clone());
            }
        }
        fields.insert("x-saw-target", HeaderValue::from_str(&request.uri().to_string()).unwrap());
        fields.append(header::SET_COOKIE, HeaderValue::from_static("a=1"));
        if let Some(offered) = request.headers().get(header::SEC_WEBSOCKET_PROTOCOL) {
            let first = offered.to_str().unwrap().split(',').next_back().unwrap().trim();
            fields.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_str(first).unwrap());
        }
        Ok(response)
    };
    let Ok(mut socket) = accept_hdr_async_with_config(stream, answer, Some(config())).await else { return };
    while let Some(Ok(message)) = socket.next().await {
        match &message {
            Message::Text(text) if text.as_str() == "close please" => {
                socket.send(Message::Text("last words".into())).await.unwrap();
                let frame = CloseFrame { code: 4406.into(), reason: "Subprotocol not acceptable".into() };
                socket.close(Some(frame)).await.unwrap();
            }
            Message::Text(text) if text.as_str() == "much and close please" => {
                socket.send(Message::Binary(noise(2, 16 << 20).into())).await.unwrap();
                let frame = CloseFrame { code: 4406.into(), reason: "enough".into() };
                socket.close(Some(frame)).await.unwrap();
            }
            Message::Text(text) if text.as_str() == "too long please" => {
                let _ = socket.send(Message::Binary(noise(3, (16 << 20) + 1).into())).await;
            }
            Message::Text(text) if text.as_str() == "vanish" => return,
            Message::Text(_) | Message::Binary(_) => {
                if socket.send(message).await.is_err() {
                    return;
                }
            }
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => {}
        }
    }
}

/// A WebSocket as soon as one opens.
async fn connected(local: &Local) -> Socket {
    let mut socket = None;
    eventually("a websocket opens", async || {
        socket = try_connect(local, "/", &[]).await.ok().map(|(socket, _)| socket);
        socket.is_some()
    })
    .await;
    socket.unwrap()
}

async fn try_connect(
    local: &Local,
    target: &str,
    fields: &[(&'static str, &str)],
) -> Result<(Socket, http::Response<Option<Vec<u8>>>), tokio_tungstenite::tungstenite::Error> {
    let stream = TcpStream::connect(local.public).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let port = local.public.port();
    let mut request = format!("ws://web.localhost:{port}{target}").into_client_request().unwrap();
    for (name, value) in fields {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    client_async_with_config(request, stream, Some(config())).await
}

async fn connect(local: &Local) -> Socket {
    timeout(PATIENCE, try_connect(local, "/", &[])).await.unwrap().unwrap().0
}

async fn next(socket: &mut Socket) -> Message {
    loop {
        match timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

async fn close_code(socket: &mut Socket) -> Option<u16> {
    loop {
        match timeout(PATIENCE, socket.next()).await.unwrap() {
            Some(Ok(Message::Close(frame))) => return frame.map(|frame| frame.code.into()),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return None,
        }
    }
}

/// Messages of every kind and awkward length, the same for the same seed.
fn messages(seed: u64) -> Vec<Message> {
    let lengths = [0, 1, 125, 126, 4096, 32 * 1024, 70_000, 97_536, 97_537, 300_000, 7];
    let mut all = Vec::new();
    for (index, length) in lengths.into_iter().enumerate() {
        let bytes = noise(seed + index as u64, length);
        all.push(Message::Text(bytes.iter().map(|byte| char::from(byte % 127)).collect::<String>().into()));
        all.push(Message::Text("é\u{ffff}\u{1f980}".repeat(length / 9 + 1).into()));
        all.push(Message::Binary(bytes.into()));
    }
    all
}

async fn echoed(socket: &mut Socket, messages: &[Message]) {
    let (mut sink, mut stream) = socket.split();
    let send = async {
        for message in messages {
            sink.send(message.clone()).await.unwrap();
        }
    };
    let take = async {
        for (index, message) in messages.iter().enumerate() {
            // A relay pings who has been connected for a while.
            let next = async {
                loop {
                    let got = stream.next().await.unwrap().unwrap();
                    if !matches!(got, Message::Ping(_) | Message::Pong(_)) {
                        break got;
                    }
                }
            };
            let got = timeout(PATIENCE, next).await;
            let got =
                got.unwrap_or_else(|_| panic!("message {index} of {} bytes did not come", message.len()));
            assert!(got == *message, "message {index}: {} bytes for {}", got.len(), message.len());
        }
    };
    tokio::join!(send, take);
}

fn with_relay(more: &[&str]) -> Local {
    Local::start(&[&["--websockets", "relay"], more].concat())
}

/// How long something took, without the time for which this machine had no time for its tests.
async fn timed<F: Future>(work: F) -> (F::Output, Duration) {
    const TICK: Duration = Duration::from_millis(50);
    let begun = std::time::Instant::now();
    let mut late = Duration::ZERO;
    let mut work = std::pin::pin!(work);
    let output = loop {
        let before = std::time::Instant::now();
        tokio::select! {
            biased;
            output = &mut work => break output,
            () = tokio::time::sleep(TICK) => late += before.elapsed().saturating_sub(TICK),
        }
    };
    (output, begun.elapsed().saturating_sub(late))
}

/// What the inspector of `agent` has of its first request, a WebSocket that has closed.
async fn frames_are_shown(agent: &Agent) {
    let mut shown = serde_json::Value::Null;
    eventually("the socket has ended for the inspector", async || {
        let (code, text) = agent.ask(&["request", "show", "1", "--json"]);
        assert_eq!(code, Some(0), "{text}");
        shown = serde_json::from_str(&text).unwrap();
        shown["state"] == "ended"
    })
    .await;
    let is = |frame: &serde_json::Value, direction: &str, kind: &str, size: usize, first: &[u8]| {
        let first = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, first);
        frame["direction"] == direction
            && frame["kind"] == kind
            && frame["size"] == size
            && frame["base64"] == *first
    };
    let large = noise(9, 16 << 20);
    assert_eq!((&shown["kind"], &shown["status"]), (&"websocket".into(), &101.into()));
    let frames = shown["frames_kept"].as_array().unwrap();
    // Each way: those, the large one, the one after it, the last words, the close.
    let whole = 2 * (messages(1).len() + 4);
    assert_eq!(shown["frames"].as_u64().unwrap() as usize, whole, "all are counted: {} kept", frames.len());
    assert_eq!(frames.len() + shown["frames_dropped"].as_u64().unwrap() as usize, whole);
    for direction in ["to_upstream", "to_client"] {
        assert!(frames.iter().any(|frame| is(frame, direction, "binary", 16 << 20, &large[..4096])));
        assert!(frames.iter().any(|frame| is(frame, direction, "text", 5, b"after")));
    }
    assert!(frames.iter().any(|frame| is(frame, "to_upstream", "text", 12, b"close please")));
    assert!(frames.iter().any(|frame| is(frame, "to_client", "text", 10, b"last words")));
    let close = frames.last().unwrap();
    assert_eq!((&close["kind"], &close["code"]), (&"close".into(), &4406.into()), "{close}");
    let obstacle = shown["replayable"].as_str().unwrap();
    assert!(obstacle.contains("WebSocket cannot be replayed"), "{obstacle}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_passes_as_if_there_were_no_tunnel() {
    let upstream = echo().await;
    let local = with_relay(&[]);
    // Nor does it pass otherwise where it is looked at.
    let tunnel = format!(
        "inspect_address = \"127.0.0.1:0\"\n[[tunnel]]\nname = \"web\"\nupstream = \"{upstream}\"\ninspect = true\n"
    );
    let agent = local.agent_with(&tunnel, &["web"]);

    // The handshake's fields.
    let port = local.public.port();
    let own = format!("http://web.localhost:{port}");
    let fields = [
        ("sec-websocket-protocol", "vite-ping, vite-hmr"),
        ("sec-websocket-extensions", "permessage-deflate; client_max_window_bits"),
        ("cookie", "session=1; b=\"x, y\""),
        ("origin", &own),
    ];
    let (mut socket, response) = try_connect(&local, "/a%2Fb?token=x&y", &fields).await.unwrap();
    let head = response.headers();
    assert_eq!(head["sec-websocket-protocol"], "vite-hmr");
    assert_eq!(head["x-saw-target"], "/a%2Fb?token=x&y");
    assert_eq!(head["x-saw-cookie"], "session=1; b=\"x, y\"");
    assert_eq!(head["x-saw-origin"], format!("http://{upstream}"), "its own origin is the upstream's there");
    assert_eq!(head["set-cookie"], "a=1");
    assert_eq!(head["x-tunnel-request-id"].len(), 32);
    assert!(
        head.get("sec-websocket-extensions").is_none()
            && head.get("x-saw-sec-websocket-extensions").is_none()
    );
    assert_eq!(head.get_all("connection").iter().count(), 1);
    let (_, foreign) = try_connect(&local, "/", &[("origin", "https://evil.example")]).await.unwrap();
    assert_eq!(foreign.headers()["x-saw-origin"], "https://evil.example");

    // Messages, whole and in order, also more than one window of them.
    echoed(&mut socket, &messages(1)).await;
    let large = [Message::Binary(noise(9, 16 << 20).into()), Message::Text("after".into())];
    echoed(&mut socket, &large).await;

    // The last frames before a close, its code and its reason.
    socket.send(Message::Text("close please".into())).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Text("last words".into()));
    let Message::Close(Some(frame)) = next(&mut socket).await else { panic!() };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (4406, "Subprotocol not acceptable"));
    assert_eq!(close_code(&mut socket).await, None);
    frames_are_shown(&agent).await;

    // An upstream that vanishes, and a message over the limit.
    let mut socket = connect(&local).await;
    socket.send(Message::Text("vanish".into())).await.unwrap();
    assert_eq!(close_code(&mut socket).await, Some(1012));
    let mut socket = connect(&local).await;
    let _ = socket.send(Message::Binary(noise(1, (16 << 20) + 1).into())).await;
    assert_eq!(close_code(&mut socket).await, Some(1009));
    let mut socket = connect(&local).await;
    socket.send(Message::Text("too long please".into())).await.unwrap();
    assert_eq!(close_code(&mut socket).await, Some(1009), "the upstream's");

    // A client that takes its time gets all of what was said before a close, and the close.
    let mut socket = connect(&local).await;
    socket.send(Message::Text("much and close please".into())).await.unwrap();
    tokio::time::sleep(limits::SOCKET_CLOSE + Duration::from_secs(2)).await;
    assert_eq!(next(&mut socket).await.len(), 16 << 20);
    assert_eq!(close_code(&mut socket).await, Some(4406));

    // What relay counts goes where the functions' metrics go, and not into what a person reads.
    eventually("it is counted", async || local.metrics().await.contains_key("SocketsOpened")).await;
    assert!(!local.process().printed().contains("CloudWatchMetrics"));
}

/// An upstream that answers a connection with these bytes, whatever it is sent.
async fn raw(answer: impl Fn(&str) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                    break;
                }
                head.push(byte[0]);
            }
            if let Some(answer) = answer(&String::from_utf8_lossy(&head)) {
                let _ = stream.write_all(&answer).await;
            }
            open.push(stream);
        }
    });
    address
}

fn key_of(head: &str) -> String {
    let key = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("sec-websocket-key").then(|| value.trim().to_owned())
    });
    derive_accept_key(key.unwrap().as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_upstream_answers_instead_is_handed_on_or_named() {
    let upstream = raw(|head| {
        let target = head.split(' ').nth(1).unwrap_or_default();
        let switched = |more: &str| {
            format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Accept: {}\r\n{more}\r\n",
                key_of(head)
            )
        };
        Some(match target {
            "/refused" => b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\nX-Why: origin\r\n\r\nnot here\n".to_vec(),
            "/plain" => b"Unauthorized".to_vec(),
            "/wrong" => b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n".to_vec(),
            "/extended" => switched("Sec-WebSocket-Extensions: permessage-deflate\r\n").into_bytes(),
            // The first messages in the same segment as the head.
            "/early" => [switched("").as_bytes(), b"\x81\x05hello\x82\x03\x00\x01\x02"].concat(),
            _ => return None,
        })
    })
    .await;
    let local = with_relay(&[]);
    let table =
        format!("[[tunnel]]\nname = \"web\"\nupstream = \"{upstream}\"\nwebsocket_idle_timeout = \"2s\"\n");
    let _agent = local.agent_with(&table, &["web"]);
    let refused = async |target: &str| match try_connect(&local, target, &[]).await {
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => *response,
        other => panic!("{:?}", other.map(|_| ())),
    };
    let response = refused("/refused").await;
    assert_eq!((response.status().as_u16(), response.headers()["x-why"].as_bytes()), (403, &b"origin"[..]));
    assert_eq!(response.body().as_deref(), Some(&b"not here\n"[..]));
    for target in ["/plain", "/wrong", "/extended"] {
        let response = refused(target).await;
        assert_eq!(response.status(), 502, "{target}");
        assert_eq!(response.headers()["x-tunnel-error"], "upstream_invalid", "{target}");
    }
    let (mut socket, _) = try_connect(&local, "/early", &[]).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Text("hello".into()));
    assert_eq!(next(&mut socket).await, Message::Binary(vec![0, 1, 2].into()));
    // One that never answers has its own deadline.
    let silent = refused("/silent").await;
    assert_eq!(silent.headers()["x-tunnel-error"], "upstream_timed_out");
    // Nor has the one from before been allowed to say nothing for so long.
    assert_eq!(close_code(&mut socket).await, Some(1001));

    // Handshakes that are none are answered by the relay, with HTTP.
    let mut line = client::Connection::open(local.public).await;
    let bad = client::Request::new("GET", "/")
        .field("Host", "web.localhost")
        .field("Upgrade", "websocket")
        .field("Connection", "Upgrade")
        .field("Sec-WebSocket-Key", "short")
        .field("Sec-WebSocket-Version", "13");
    assert_eq!(line.exchange(&bad).await.status, 400);
    let mut line = client::Connection::open(local.public).await;
    let other = client::Request::new("GET", "/")
        .field("Host", "web.localhost")
        .field("Upgrade", "websocket")
        .field("Connection", "Upgrade")
        .field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .field("Sec-WebSocket-Version", "8");
    let other = line.exchange(&other).await;
    assert_eq!((other.status, other.field("sec-websocket-version").as_deref()), (400, Some("13")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_of_a_removed_tunnel_goes_on_and_is_shown() {
    let (upstream, open) = counted_echo().await;
    let local = with_relay(&[]);
    let tunnel = |name: &str| format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{upstream}\"\n");
    let agent = local.agent_with(&(tunnel("web") + &tunnel("other")), &["web", "other"]);
    let mut socket = connected(&local).await;
    socket.send(Message::Text("before".into())).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Text("before".into()));

    agent.write_tunnels(&local, &tunnel("other"));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!((code, printed.as_str()), (Some(0), "reloaded: removed web; 1 unchanged"));
    socket.send(Message::Text("after".into())).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::Text("after".into()));
    let removed = || {
        let status: serde_json::Value = serde_json::from_str(&agent.ask(&["status", "--json"]).1).unwrap();
        assert_eq!(status["tunnels"].as_array().unwrap().len(), 1, "{status}");
        status["removed"].clone()
    };
    assert_eq!(removed(), serde_json::json!([{ "name": "web", "in_flight": 0, "websockets": 1 }]));
    let shown = agent.ask(&["status"]).1;
    assert!(shown.contains("web was removed by a reload; in flight: 0 requests, 1 WebSockets"), "{shown}");
    assert!(try_connect(&local, "/", &[]).await.is_err(), "no new one is opened");

    socket.close(None).await.unwrap();
    eventually("it is closed", async || open.load(Ordering::Relaxed) == 0).await;
    eventually("nothing is left of it", async || removed().is_null()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_once_and_in_order_whatever_the_link_does() {
    let upstream = echo().await;
    let local = with_relay(&["--chaos", "seed=7,duplicate=0.3,reorder=0.3"]);
    let _agent = local.agent("web", &upstream.to_string());
    let mut sockets = Vec::new();
    for _ in 0..4 {
        sockets.push(connect(&local).await);
    }
    let work = sockets.iter_mut().enumerate().map(|(index, socket)| async move {
        echoed(socket, &messages(100 * index as u64)).await;
        let small: Vec<_> = (0..500).map(|n| Message::Text(format!("{index}:{n}").into())).collect();
        echoed(socket, &small).await;
    });
    futures_util::future::join_all(work).await;
}

fn kill(agent: &Agent) {
    agent.process().signal(Signal::KILL);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_survive_a_planned_replacement_and_end_in_order_otherwise() {
    let upstream = echo().await;
    let local = with_relay(&[]);
    // Many more by hand: WEBSOCKETS=50 ROTATIONS=100.
    let number = |name: &str, usual: u64| std::env::var(name).map_or(usual, |text| text.parse().unwrap());
    let (websockets, rotations) = (number("WEBSOCKETS", 3), number("ROTATIONS", 4));
    let table =
        format!("[[tunnel]]\nname = \"web\"\nupstream = \"{upstream}\"\nmax_websockets = {websockets}\n");
    let agent = local.agent_with(&table, &["web"]);
    let mut sockets = Vec::new();
    for _ in 0..websockets {
        sockets.push(connect(&local).await);
    }
    // One more than the tunnel may have.
    match try_connect(&local, "/", &[]).await {
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => assert_eq!(response.status(), 429),
        other => panic!("{:?}", other.map(|_| ())),
    }
    let mut carried = 0;
    for round in 0..rotations {
        // Another address of the edge is another connection: the next one is opened before the old one goes.
        let before = agent.process().printed().matches("a connection was retired").count();
        let host = if round % 2 == 0 { "//localhost:" } else { "//127.0.0.1:" };
        let text = local.config(&table).replace("//127.0.0.1:", host);
        agent.write_config(&text);
        agent.process().signal(Signal::HUP);
        let begun = std::time::Instant::now();
        let mut n = 0u64;
        while agent.process().printed().matches("a connection was retired").count() == before {
            let some: Vec<_> = (0..20).map(|i| Message::Text(format!("{round}:{n}:{i}").into())).collect();
            futures_util::future::join_all(sockets.iter_mut().map(|socket| echoed(socket, &some))).await;
            n += 1;
            carried += 20 * websockets;
            assert!(begun.elapsed() < PATIENCE, "it was not replaced: {}", agent.process().printed());
        }
    }
    for socket in &mut sockets {
        echoed(socket, &messages(5)).await;
    }
    println!("{rotations} rotations, {websockets} websockets: {carried} messages there and back, none lost");
    // The agent dies: every socket is closed so that its client comes again.
    kill(&agent);
    for socket in &mut sockets {
        assert_eq!(close_code(socket).await, Some(1012));
    }
}

/// A WebSocket that this agent has accepted.
async fn opened_by(local: &Local, agent: &mut RawAgent) -> (Socket, Call) {
    tokio::join!(connect(local), async {
        let call = agent.request().await;
        let accepted = Accepted {
            token: call.token.as_str().into(),
            subprotocol: None,
            headers: Headers::new(),
            codecs: Codecs::default(),
        };
        agent.say(AgentMessage::Accepted(accepted)).await;
        call
    })
}

/// A task token that leaks is of no use to another owner's agent, also to one whose own token covers the tunnel. The agent's
/// own next connection goes on with the WebSocket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_moves_with_its_agent_and_to_nobody_else() {
    let local = Local::start_in(&[], &["--no-agent", "--websockets", "relay"]);
    let mut agent = RawAgent::open(local.stack(), &["web"]).await;
    let (mut socket, call) = opened_by(&local, &mut agent).await;
    let say = async |agent: &mut RawAgent, seq: u32, moved: bool, text: &str| {
        let body = Some(Body::encode(text.as_bytes()));
        let frames = vec![Frame { kind: FrameKind::Text, body, more: false, code: None }];
        let token = call.token.as_str().into();
        let frames = AgentFrames { token, seq, through: 0, sent: None, moved, frames };
        agent.say(AgentMessage::Frames(frames)).await;
    };
    let reads = async |agent: &mut RawAgent, wanted: &str| {
        while !timeout(PATIENCE, agent.hear()).await.unwrap().contains(wanted) {}
    };

    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["*"])).await;
    let sent = async || local.counters().await["sqs:SendMessage"];
    let before = sent().await;
    say(&mut mallory, 1, true, "forged").await;
    let token = call.token.as_str().into();
    mallory.say(AgentMessage::Failed(Failed { token, seq: 0, code: ErrorCode::UpstreamReset })).await;
    eventually("both lie in the mailbox", async || sent().await >= before + 2).await;
    say(&mut agent, 1, false, "own").await;
    assert_eq!(next(&mut socket).await, Message::Text("own".into()));
    socket.send(Message::Text("for the agent alone".into())).await.unwrap();
    reads(&mut agent, "for the agent alone").await;

    let mut again = RawAgent::with(local.stack(), &local.stack().token()).await;
    say(&mut again, 2, true, "moved").await;
    assert_eq!(next(&mut socket).await, Message::Text("moved".into()));
    // What the old connection has still brought.
    say(&mut agent, 3, false, "late").await;
    assert_eq!(next(&mut socket).await, Message::Text("late".into()));
    socket.send(Message::Text("there".into())).await.unwrap();
    reads(&mut again, "there").await;
}

/// What agents begin to say and do not end, or clients do not take, has one memory for all: whoever finds no room in it is
/// told to come later, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_agents_leave_unfinished_shares_one_memory() {
    // In one frame of the link.
    const PIECE: usize = 20_000;
    let budget = [("TUNNEL_RELAY_BUFFER_BYTES", "1000000")];
    let local = Local::start_in(&budget, &["--no-agent", "--websockets", "relay"]);
    let mut agent = RawAgent::open(local.stack(), &["web"]).await;
    let mut opened = Vec::new();
    for _ in 0..2 {
        opened.push(opened_by(&local, &mut agent).await);
    }
    let [(mut first, one), (mut second, other)] = opened.try_into().ok().unwrap();
    // Says these pieces, and waits until the relay has them: it acknowledges what it holds.
    let mut say = async |call: &Call, seqs: std::ops::RangeInclusive<u32>, more: bool, is_awaited: bool| {
        let last = *seqs.end();
        for seq in seqs {
            let bytes = noise(u64::from(seq), PIECE);
            let body = Some(Body::encode(&bytes));
            let frames = vec![Frame { kind: FrameKind::Binary, body, more, code: None }];
            let token = call.token.as_str().into();
            let frames = AgentFrames { token, seq, through: 0, sent: None, moved: false, frames };
            agent.say(AgentMessage::Frames(frames)).await;
        }
        if !is_awaited {
            return;
        }
        loop {
            let text = timeout(PATIENCE, agent.hear()).await.unwrap();
            if let Ok(EdgeMessage::Frames(frames)) = EdgeMessage::decode(&text)
                && frames.request_id.as_str() == call.request_id
                && frames.through == last
            {
                return;
            }
        }
    };
    // Each holds 64 KiB of its own: together they come just below the million.
    say(&one, 1..=45, true, true).await;
    say(&other, 1..=9, true, true).await;
    // And with a few pieces more past it.
    say(&other, 10..=13, true, false).await;
    assert_eq!(close_code(&mut second).await, Some(1013));
    say(&one, 46..=46, false, false).await;
    assert_eq!(next(&mut first).await.len(), 46 * PIECE);
}

/// Not a test: the upstream that another test kills. It echoes until then.
#[tokio::test]
#[ignore = "it is a process of another test"]
async fn an_upstream_of_its_own() {
    println!("upstream {}", echo().await);
    std::future::pending().await
}

/// Such a process, and where it listens.
fn upstream_process() -> (std::process::Child, String) {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["an_upstream_of_its_own", "--exact", "--ignored", "--nocapture"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let address =
        lines.map_while(Result::ok).find_map(|line| Some(line.split_once("upstream ")?.1.to_owned()));
    (child, address.unwrap())
}

/// Whichever process dies, every WebSocket through it ends within five seconds at both of its ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_end_with_the_process_that_carries_them() {
    const SOCKETS: usize = 20;
    const WITHIN: Duration = Duration::from_secs(5);
    let local = with_relay(&[]);
    for killed in ["agentd", "upstream", "relay"] {
        // One whose ends can be counted, or one that can be killed.
        let (inside, open) = counted_echo().await;
        let (mut process, outside) = upstream_process();
        let upstream = if killed == "upstream" { outside } else { inside.to_string() };
        let agent = local.agent("web", &upstream);
        let mut sockets = vec![connected(&local).await];
        while sockets.len() < SOCKETS {
            sockets.push(connect(&local).await);
        }
        for socket in &mut sockets {
            echoed(socket, &[Message::Text("x".into())]).await;
        }
        let ended = async {
            match killed {
                "agentd" => kill(&agent),
                "upstream" => process.kill().unwrap(),
                _ => rustix::process::kill_process(
                    rustix::process::Pid::from_raw(i32::try_from(local.relay()).unwrap()).unwrap(),
                    Signal::KILL,
                )
                .unwrap(),
            }
            let mut codes = Vec::new();
            for socket in &mut sockets {
                codes.push(close_code(socket).await);
            }
            eventually("its upstream's ends are closed", async || open.load(Ordering::Relaxed) == 0).await;
            codes
        };
        let (codes, took) = timed(ended).await;
        println!("{killed} was killed: {SOCKETS} websockets ended after {took:?}");
        // Without a close where the process that would say it is gone.
        let expected = (killed != "relay").then_some(1012);
        assert!(codes.iter().all(|&code| code == expected), "{killed}: {codes:?}");
        assert!(took <= WITHIN, "{killed}: {took:?}");
        let _ = process.kill();
        let _ = process.wait();
    }
    // Nor does a relay outlive what started it.
    let relay = local.relay();
    local.process().signal(Signal::KILL);
    let of_relay = || std::fs::read_to_string(format!("/proc/{relay}/cmdline")).unwrap_or_default();
    eventually("its relay is gone", async || !of_relay().contains("relay")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_ends_in_order_says_so_and_who_carries_none_refuses() {
    let upstream = echo().await;
    let mut local = with_relay(&[]);
    let agent = local.agent("web", &upstream.to_string());
    let mut socket = connect(&local).await;
    echoed(&mut socket, &[Message::Text("x".into())]).await;
    agent.process().signal(Signal::TERM);
    assert_eq!(close_code(&mut socket).await, Some(1012));
    drop(agent);
    an_agent_of_an_older_release_refuses(&local).await;
    websockets_of_every_kind_of_upstream(&local).await;
    let _agent = local.agent("web", &upstream.to_string());
    let mut socket = connected(&local).await;
    let closed = tokio::spawn(async move { close_code(&mut socket).await });
    local.stop();
    assert_eq!(closed.await.unwrap(), Some(1012));

    let local = Local::start(&["--websockets", "none"]);
    let _agent = local.agent("web", &upstream.to_string());
    refused_with_501(&local).await;
}

async fn refused_with_501(local: &Local) {
    match try_connect(local, "/", &[]).await {
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
            assert_eq!(response.status(), 501);
            assert_eq!(response.headers()["x-tunnel-error"], "upgrade_unsupported");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

/// An agent of a release that knows no WebSockets: its `hello` names none, and it sees a request that it refuses, as it
/// refused each such request before.
async fn an_agent_of_an_older_release_refuses(local: &Local) {
    let mut old = RawAgent::open(local.stack(), &["web"]).await;
    let answers = async {
        let text = old.hear().await;
        let EdgeMessage::Request(request) = EdgeMessage::decode(&text).unwrap() else { panic!("{text}") };
        assert_eq!(request.headers.get(header::UPGRADE).map(HeaderValue::as_bytes), Some(&b"websocket"[..]));
        let token = request.token;
        old.say(AgentMessage::Failed(Failed { token, seq: 0, code: ErrorCode::UpgradeUnsupported })).await;
    };
    tokio::join!(answers, refused_with_501(local));
}

/// Upstreams with TLS of an authority of one's own, and behind a unix socket.
async fn websockets_of_every_kind_of_upstream(local: &Local) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo.sock");
    let unix = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = unix.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    // Where there is a choice it is HTTP/2, over which this handshake cannot be made.
    let tls = acceptor(&[b"h2", b"http/1.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    serve(stream).await;
                }
            });
        }
    });
    for upstream in [
        format!("upstream = \"unix:{}\"", path.display()),
        format!("upstream = \"https://localhost:{port}\"\nca_file = \"{}\"", fixture("ca.pem").display()),
    ] {
        let agent = local.agent_with(&format!("[[tunnel]]\nname = \"web\"\n{upstream}\n"), &["web"]);
        let mut socket = connected(local).await;
        echoed(&mut socket, &messages(11)).await;
        // A kill of the agent ends it within five seconds, by a close that has the client come again.
        let begun = std::time::Instant::now();
        kill(&agent);
        assert_eq!(close_code(&mut socket).await, Some(1012));
        println!("closed {} ms after the agent was killed", begun.elapsed().as_millis());
        drop(agent);
    }
}

/// A public address that needs no name: whoever connects is taken to the tunnel `web`.
async fn by_address(local: &Local) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, public) = (listener.local_addr().unwrap(), local.public);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).await.is_ok_and(|n| n > 0) {
                    head.push(byte[0]);
                }
                let mut onward = TcpStream::connect(public).await.unwrap();
                let named = |line: &str| {
                    if line.to_ascii_lowercase().starts_with("host:") { "Host: web.localhost" } else { line }
                        .to_owned()
                };
                let head: Vec<_> = String::from_utf8(head).unwrap().split("\r\n").map(named).collect();
                onward.write_all(head.join("\r\n").as_bytes()).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut onward).await;
            });
        }
    });
    address
}

/// The verdicts of a report, case by case.
fn verdicts(folder: &std::path::Path) -> std::collections::BTreeMap<String, String> {
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("index.json")).unwrap()).unwrap();
    let agent = report.as_object().unwrap().values().next().unwrap();
    agent
        .as_object()
        .unwrap()
        .iter()
        .map(|(case, verdict)| {
            let text = |key: &str| verdict[key].as_str().unwrap_or_default();
            (case.clone(), format!("{} {}", text("behavior"), text("behaviorClose")))
        })
        .collect()
}

fn kosoku(arguments: &[&str], folder: &std::path::Path) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(std::env::var_os("KOSOKU").unwrap());
    command
        .args(["-x", "12.*", "-x", "13.*", "-o", folder.to_str().unwrap()])
        .args(arguments)
        .kill_on_drop(true);
    command
}

/// Has a client answer every case of a server that is at the end of `connect`.
async fn answer_cases<F: Future<Output = Socket>>(connect: impl Fn(String) -> F) {
    let mut count = connect("/getCaseCount".into()).await;
    let Some(Ok(Message::Text(count))) = count.next().await else { panic!("no count") };
    for case in 1..=count.parse::<u32>().unwrap() {
        let begun = std::time::Instant::now();
        let mut socket = connect(format!("/runCase?case={case}&agent=tungstenite")).await;
        while let Ok(Some(Ok(message))) = timeout(Duration::from_secs(30), socket.next()).await {
            if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                break;
            }
        }
        if begun.elapsed() > Duration::from_secs(5) {
            println!("the case number {case} took {:?}", begun.elapsed());
        }
    }
    let mut end = connect("/updateReports?agent=tungstenite".into()).await;
    while let Some(Ok(_)) = end.next().await {}
}

/// What differs between two reports.
fn changed(direct: &std::path::Path, through: &std::path::Path) -> Vec<String> {
    let (direct, through) = (verdicts(direct), verdicts(through));
    assert!(direct.len() > 250, "{}", direct.len());
    let other = |case: &String| through.get(case).map_or("missing", String::as_str).to_owned();
    let differs = |(case, verdict): (&String, &String)| {
        let other = other(case);
        (other != *verdict).then(|| format!("{case}: {verdict} directly, {other} through the tunnel"))
    };
    direct.iter().filter_map(differs).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs KOSOKU; tests/conformance/run"]
async fn the_tunnel_changes_no_verdict_about_a_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let local = with_relay(&[]);
    let upstream = echo().await;
    let _agent = local.agent("web", &upstream.to_string());
    let through = by_address(&local).await;
    for (name, address) in [("direct", upstream), ("through", through)] {
        let begun = std::time::Instant::now();
        kosoku(&["-p", "2", &address.to_string()], &path(name)).status().await.unwrap();
        println!("{name}: {} cases in {:?}", verdicts(&path(name)).len(), begun.elapsed());
    }
    let changed = changed(&path("direct"), &path("through"));
    assert!(changed.is_empty(), "{}", changed.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs KOSOKU; tests/conformance/run"]
async fn the_tunnel_changes_no_verdict_about_a_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let local = with_relay(&[]);
    let fuzzing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _agent = local.agent("fuzz", &fuzzing.to_string());
    let dial = async |to: SocketAddr, host: String, target: String| {
        let stream = TcpStream::connect(to).await.unwrap();
        let request = format!("ws://{host}{target}").into_client_request().unwrap();
        client_async_with_config(request, stream, Some(config())).await.unwrap().0
    };
    let tunnel = format!("fuzz.localhost:{}", local.public.port());
    for (name, to, host) in [("direct", fuzzing, fuzzing.to_string()), ("through", local.public, tunnel)] {
        let begun = std::time::Instant::now();
        let mut server = kosoku(&["-m", "fuzzingserver", &fuzzing.to_string()], &path(name)).spawn().unwrap();
        eventually("the server listens", async || TcpStream::connect(fuzzing).await.is_ok()).await;
        answer_cases(|target| dial(to, host.clone(), target)).await;
        let _ = timeout(PATIENCE, server.wait()).await;
        println!("{name}: {} cases in {:?}", verdicts(&path(name)).len(), begun.elapsed());
    }
    let changed = changed(&path("direct"), &path("through"));
    assert!(changed.is_empty(), "{}", changed.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_frames_harm_their_own_socket_alone() {
    let upstream = echo().await;
    let local = with_relay(&[]);
    let _agent = local.agent("web", &upstream.to_string());
    let mut good = connect(&local).await;
    // Unmasked; a reserved bit; a reserved opcode; a long ping; text that is not UTF-8; 2^63 bytes; a lone continuation;
    // a close with half a code.
    let long_ping = [&b"\x89\xfe\0\x7e\0\0\0\0"[..], &[0; 126]].concat();
    let frames: [(&[u8], u16); 8] = [
        (b"\x81\x02hi", 1002),
        (b"\xc1\x82\0\0\0\0hi", 1002),
        (b"\x83\x80\0\0\0\0", 1002),
        (&long_ping, 1002),
        (b"\x81\x82\0\0\0\0\xff\xfe", 1007),
        (b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0", 1009),
        (b"\x80\x82\0\0\0\0hi", 1002),
        (b"\x88\x81\0\0\0\0\x03", 1002),
    ];
    for (bytes, code) in frames {
        let mut socket = connect(&local).await;
        socket.get_mut().write_all(bytes).await.unwrap();
        assert_eq!(close_code(&mut socket).await, Some(code), "{bytes:?}");
        echoed(&mut good, &[Message::Text("still here".into())]).await;
    }
    // One that never finishes what it began, and one that reads nothing.
    let mut slow = connect(&local).await;
    slow.get_mut().write_all(b"\x01\x82\0\0\0\0hi").await.unwrap();
    let mut deaf = connect(&local).await;
    let flood = Message::Binary(noise(3, 256 * 1024).into());
    let _ = timeout(Duration::from_secs(2), async {
        for _ in 0..64 {
            deaf.send(flood.clone()).await.unwrap();
        }
    })
    .await;
    echoed(&mut good, &messages(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_websockets_cost_little_and_what_is_lost_or_killed_is_told() {
    // Both wait more than they work.
    tokio::join!(
        idle_websockets_cost_little_and_a_killed_relay_ends_them(),
        a_lost_message_is_told(),
        a_thousand_messages_are_few_calls()
    );
}

async fn idle_websockets_cost_little_and_a_killed_relay_ends_them() {
    // More by hand: WEBSOCKETS=1000.
    let count: usize = std::env::var("WEBSOCKETS").map_or(300, |text| text.parse().unwrap());
    let (upstream, open) = counted_echo().await;
    let local = with_relay(&[]);
    let agent = local.agent("web", &upstream.to_string());
    let relay = local.relay();
    let mut sockets = vec![connect(&local).await];
    echoed(&mut sockets[0], &[Message::Text("x".into())]).await;
    let resident = || [relay, agent.process().id()].map(|pid| tests::resident_bytes(pid).unwrap());
    let before = resident();
    for _ in 1..count {
        sockets.push(connect(&local).await);
    }
    let each = [0, 1].map(|at| resident()[at].saturating_sub(before[at]) / (count as u64 - 1));
    println!("{count} idle websockets: {} bytes each in relay, {} in agentd", each[0], each[1]);
    // Among a few, what a process takes at once for all of them counts for more.
    let most = if count < 1000 { 24 * 1024 } else { 20_000 };
    assert!(each.iter().all(|&bytes| bytes <= most), "{each:?}");

    // What was said is acknowledged; then nothing is called but the one long poll.
    let calls = async || {
        let counters = local.counters().await;
        let of = |name: &str| counters.get(name).copied().unwrap_or(0);
        (of("sqs:ReceiveMessage"), counters.values().sum::<u64>() - of("sqs:ReceiveMessage"))
    };
    // The window in which nothing may happen is longer than any pause in which something still does.
    eventually("everything is acknowledged and deleted", async || {
        let (_, before) = calls().await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        calls().await.1 == before
    })
    .await;

    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(relay).unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    let begun = std::time::Instant::now();
    for socket in &mut sockets {
        // Without a close: its process is gone.
        assert_eq!(close_code(socket).await, None);
    }
    // The process that outlives it has had the agent close the other ends, which are silent.
    eventually("the upstream's ends are closed", async || open.load(Ordering::Relaxed) == 0).await;
    println!("closed at the upstream {} ms after the relay was killed", begun.elapsed().as_millis());
    // By hand, with a thousand and alone on the machine, as long as may be.
    let most = if count < 1000 { 30 } else { 5 };
    assert!(begun.elapsed() < Duration::from_secs(most), "{:?}", begun.elapsed());
    // The next relay takes over.
    eventually("another relay serves", async || try_connect(&local, "/", &[]).await.is_ok()).await;
}

/// What an upstream says 100 times a second is gathered: counted calls of a thousand small messages.
async fn a_thousand_messages_are_few_calls() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { continue };
            let Some(Ok(_)) = socket.next().await else { continue };
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            for n in 0..1000 {
                ticks.tick().await;
                socket.send(Message::Text(n.to_string().into())).await.unwrap();
            }
            while let Some(Ok(_)) = socket.next().await {}
        }
    });
    let local = with_relay(&[]);
    let _agent = local.agent("web", &upstream.to_string());
    let mut socket = connect(&local).await;
    let mut before = local.counters().await;
    for direction in ["from the upstream", "to it"] {
        if direction == "to it" {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            for n in 0..1000 {
                ticks.tick().await;
                socket.send(Message::Text(n.to_string().into())).await.unwrap();
            }
            // What it was acknowledged with is counted as well.
            tokio::time::sleep(limits::SOCKET_ACK_AFTER).await;
        } else {
            socket.send(Message::Text("begin".into())).await.unwrap();
            for n in 0..1000 {
                assert_eq!(next(&mut socket).await, Message::Text(n.to_string().into()));
            }
        }
        let after = local.counters().await;
        let made: std::collections::BTreeMap<_, _> = after
            .iter()
            .map(|(name, count)| (name, count - before.get(name).copied().unwrap_or(0)))
            .filter(|(_, count)| *count > 0)
            .collect();
        // Each answer in the mailbox was a message of the agent's and an invocation of `response` before.
        let sent = made.get(&"sqs:SendMessage".to_owned()).copied().unwrap_or(0);
        let calls = made.values().sum::<u64>() + 2 * sent;
        println!("1,000 messages {direction} at 100/s: {calls} billed calls {made:?}");
        assert!(sent > 0);
        assert!(calls <= 300, "{direction}: {made:?}");
        before = after;
    }
}

/// A message that is lost on its way ends its WebSocket so that the client comes again; what came before it was complete.
async fn a_lost_message_is_told() {
    let upstream = echo().await;
    let local = with_relay(&["--chaos", "seed=5,lose=0.05"]);
    let _agent = local.agent("web", &upstream.to_string());
    // The word that opens one may be what is lost.
    let mut socket = connected(&local).await;
    for n in 0..10_000 {
        let text = n.to_string();
        socket.send(Message::Text(text.clone().into())).await.unwrap();
        let (answer, took) = timed(next(&mut socket)).await;
        match answer {
            Message::Text(echoed) => assert_eq!(echoed.as_str(), text, "something before it is missing"),
            Message::Close(frame) => {
                assert_eq!(frame.map(|frame| u16::from(frame.code)), Some(1012));
                println!("lost at message {n}, told after {took:?}");
                assert!(took <= Duration::from_secs(45), "{took:?}");
                return;
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("nothing was lost");
}

/// The times of round trips of 100 B, a hundred a second, in order.
async fn round_trips(socket: &mut Socket) -> Vec<Duration> {
    let text = Message::Text("x".repeat(100).into());
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let mut times = Vec::new();
    for n in 0..1100 {
        ticks.tick().await;
        let begun = std::time::Instant::now();
        socket.send(text.clone()).await.unwrap();
        assert_eq!(next(socket).await, text);
        if n >= 100 {
            times.push(begun.elapsed());
        }
    }
    times.sort();
    times
}

/// How long a process has run on a processor (proc(5): `utime` and `stime`, in hundredths of a second on Linux).
fn cpu_secs(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The figures of docs/benchmarks.md about WebSockets. To be run alone on the machine, with `--release`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is for a quiet machine: cargo test --release -p tests --test websockets figures -- --ignored --nocapture"]
async fn figures_for_the_benchmarks() {
    let upstream = echo().await;
    let local = with_relay(&[]);
    let table = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{upstream}\"\n");
    let agent = local.agent_with(&table, &["web"]);

    let stream = TcpStream::connect(upstream).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let request = format!("ws://{upstream}/").into_client_request().unwrap();
    let mut direct = client_async_with_config(request, stream, Some(config())).await.unwrap().0;
    let mut through = connect(&local).await;
    let (direct, through) = (round_trips(&mut direct).await, round_trips(&mut through).await);
    let added = [500, 950].map(|at| through[at].saturating_sub(direct[at]));
    println!(
        "echo of 100 B at 100/s: added p50 {:?}, p95 {:?}; direct p50 {:?}",
        added[0], added[1], direct[500]
    );

    // Seconds of CPU of each program so far.
    let agentd = agent.process().id();
    let spent = || {
        let functions = local.function_processes().iter().map(|(_, pid)| cpu_secs(*pid)).sum();
        [cpu_secs(agentd), cpu_secs(local.relay()), functions, cpu_secs(local.process().id())]
    };
    let since = |before: [f64; 4]| {
        let [agentd, relay, functions, local] = std::array::from_fn(|at| spent()[at] - before[at]);
        format!("CPU of agentd {agentd:.2}, relay {relay:.2}, functions {functions:.2}, local {local:.2} s")
    };
    let before = spent();
    let mut sockets = Vec::new();
    for _ in 0..50 {
        sockets.push(connect(&local).await);
    }
    let small: Vec<_> = (0..4000).map(|n| Message::Text(format!("{n:020}").into())).collect();
    let begun = std::time::Instant::now();
    futures_util::future::join_all(sockets.iter_mut().map(|socket| echoed(socket, &small))).await;
    let took = begun.elapsed();
    let rate = (50 * small.len()) as f64 / took.as_secs_f64();
    println!(
        "50 websockets: {rate:.0} messages/s each way at the same time, in order, {took:?}; {}",
        since(before)
    );
    drop(sockets);

    let large = [Message::Binary(noise(1, 8_000_000).into())];
    let mut socket = connect(&local).await;
    echoed(&mut socket, &large).await;
    let before = spent();
    let begun = std::time::Instant::now();
    for _ in 0..5 {
        echoed(&mut socket, &large).await;
    }
    let speed = 5.0 * 2.0 * 8.0 / begun.elapsed().as_secs_f64();
    println!("a message of 8 MB: {speed:.1} MB/s, there and then back; {} for 80 MB", since(before));

    assert!(added[0] <= Duration::from_millis(4) && added[1] <= Duration::from_millis(8), "{added:?}");
    assert!(rate >= 20_000.0, "{rate}");
    assert!(speed >= 30.0, "{speed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_nobody_wants_sleeps_until_an_agent_wakes_it() {
    let upstream = echo().await;
    let local = with_relay(&["--chaos", "clock=120"]);
    let asleep = "relay is put to sleep";
    eventually("nobody wants it", async || local.process().printed().contains(asleep)).await;
    for _ in 0..2 {
        let before = local.process().printed().matches(asleep).count();
        let agent = local.agent("web", &upstream.to_string());
        let mut socket = connected(&local).await;
        echoed(&mut socket, &messages(1)).await;
        // An agent that is there keeps it awake.
        assert_eq!(local.process().printed().matches(asleep).count(), before);
        drop(agent);
        assert_eq!(close_code(&mut socket).await, Some(1012));
        eventually("it sleeps again", async || local.process().printed().matches(asleep).count() > before)
            .await;
    }
    assert!(local.counters().await["application-autoscaling:RegisterScalableTarget"] >= 4);
}

/// Some dev servers refuse a page's WebSocket without a status, or after they have opened it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_that_is_no_answer_is_explained() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut start = [0; 16];
            while stream.peek(&mut start).await.unwrap() < start.len() {}
            if start.starts_with(b"GET /bare") {
                let _ = stream.read(&mut [0; 4096]).await;
                // What Next.js writes.
                stream.write_all(b"Unauthorized").await.unwrap();
                continue;
            }
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                // What webpack-dev-server says.
                let said = r#"{"type":"error","data":"Invalid Host/Origin header"}"#;
                socket.send(Message::Text(said.into())).await.unwrap();
                let _ = socket.close(None).await;
                while let Some(Ok(_)) = socket.next().await {}
            });
        }
    });
    let local = with_relay(&[]);
    let agent = local.agent("web", &address.to_string());
    let origin = format!("http://web.localhost:{}", local.public.port());
    for _ in 0..2 {
        let mut opened = None;
        eventually("the websocket opens", async || {
            opened = try_connect(&local, "/opened", &[("origin", &origin)]).await.ok();
            opened.is_some()
        })
        .await;
        let mut socket = opened.unwrap().0;
        assert!(next(&mut socket).await.to_text().unwrap().contains("Invalid Host/Origin header"));
        assert!(try_connect(&local, "/bare-request", &[("origin", &origin)]).await.is_err());
    }
    let last = try_connect(&local, "/bare-without-origin", &[]).await;
    assert!(last.is_err());
    agent.process().wait_for_line(|line| line.contains("/bare-without-origin"));
    let printed = agent.process().printed();
    for advice in ["or allowedHosts of the dev server", "or allowedDevOrigins of Next.js"] {
        assert_eq!(printed.matches(advice).count(), 1, "{printed}");
    }
}
