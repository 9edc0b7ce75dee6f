//! A bare edge: the far end of one agent's WebSocket, with nothing behind it that would cost time.
//!
//! Enters: what to ask for and how often. Leaves: what came back, every answer matched to its own question.

use std::{
    collections::{HashMap, HashSet},
    future::poll_fn,
    task::Poll,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderName, HeaderValue};
use proto::{
    body::{Body, Codecs},
    error::ErrorCode,
    header::Headers,
    id::RequestId,
    limits,
    message::{
        AgentMessage, Cancel, Credit, EdgeMessage, Envelope, Heartbeat, OpenTunnel, Request, RequestChunk,
        VERSION, Welcome,
    },
    target::Target,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_async_with_config,
    tungstenite::{Message, Utf8Bytes, protocol::WebSocketConfig},
};

/// The tunnel that every agent here serves.
pub(crate) const TUNNEL: &str = "bench";

/// No single step takes longer, not even under an emulator of the processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many responses are cancelled together.
const CANCELLED_AT_ONCE: usize = 16;

/// Messages of agents that are not about a request are shorter than this.
const CONTROL_BYTES: usize = 2048;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask<'a> {
    /// The request-target.
    pub(crate) target: &'a str,
    /// How many bytes are sent along.
    pub(crate) upload: usize,
    /// How many bytes must come back; `None` where any number will do.
    pub(crate) expected: Option<usize>,
}

/// When to stop asking.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// After so many answers.
    Answers(usize),
    /// After that time.
    Time(Duration),
}

/// What came of asking.
#[derive(Debug)]
pub(crate) struct Load {
    /// How many answers came, each of them whole and its own.
    pub(crate) answers: usize,
    /// Body bytes that came or were sent, before base64.
    pub(crate) bytes: usize,
    /// From the first question to the last answer.
    pub(crate) time: Duration,
    /// How long each answer took, in milliseconds.
    pub(crate) delays: Vec<f64>,
}

/// Where an agent connects.
#[derive(Debug)]
pub(crate) struct BareEdge {
    listener: TcpListener,
    pub(crate) url: String,
}

impl BareEdge {
    pub(crate) async fn bind() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening for the agent")?;
        let url = format!("ws://{}", listener.local_addr()?);
        Ok(Self { listener, url })
    }

    /// Takes the connection of an agent and opens its tunnel.
    pub(crate) async fn accept(&self) -> anyhow::Result<Line> {
        let opening = async {
            let (stream, _) = self.listener.accept().await?;
            stream.set_nodelay(true)?;
            // The limits of API Gateway. Each read clears its room first, also one that finds nothing.
            let config = WebSocketConfig::default()
                .read_buffer_size(limits::FRAME_BYTES / 2)
                .max_frame_size(Some(limits::FRAME_BYTES))
                .max_message_size(Some(limits::MESSAGE_BYTES));
            let socket = accept_async_with_config(stream, Some(config)).await?;
            let mut line = Line { socket, last: 0, is_open: false };
            while !line.is_open {
                let text = line.text().await?;
                line.control(&text).await?;
            }
            line.socket.flush().await?;
            anyhow::Ok(line)
        };
        timeout(PATIENCE, opening).await.context("no agent came")?
    }
}

/// The connection of one agent.
pub(crate) struct Line {
    socket: WebSocketStream<TcpStream>,
    /// The number of the last question.
    last: u64,
    is_open: bool,
}

/// A question that is not answered yet.
struct Open {
    begun: Instant,
    /// The number of the piece that comes next.
    next: u32,
    bytes: usize,
}

/// A piece of an answer.
struct Piece {
    number: u64,
    seq: u32,
    bytes: usize,
    end: bool,
}

impl Line {
    pub(crate) async fn send(&mut self, message: &EdgeMessage<'_>) -> anyhow::Result<()> {
        // It leaves with whatever else is there before the next message is waited for.
        self.socket.feed(Message::text(message.encode())).await.context("writing to the agent")
    }

    /// The next text message, whatever it is. What is to be sent leaves before it is waited for.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when it is dropped.
    pub(crate) async fn text(&mut self) -> anyhow::Result<Utf8Bytes> {
        loop {
            let message = poll_fn(|cx| match self.socket.poll_next_unpin(cx) {
                Poll::Ready(message) => Poll::Ready(message),
                Poll::Pending => match self.socket.poll_flush_unpin(cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                },
            });
            match message.await.context("the agent has left")?? {
                Message::Text(text) => return Ok(text),
                Message::Ping(_) | Message::Pong(_) => {}
                other => bail!("the agent sent {other:?}"),
            }
        }
    }

    /// Answers `hello` and `heartbeat`; false for anything else.
    pub(crate) async fn control(&mut self, text: &str) -> anyhow::Result<bool> {
        if text.len() > CONTROL_BYTES || Envelope::peek(text)?.token.is_some() {
            return Ok(false);
        }
        let answer = match AgentMessage::decode(text)? {
            AgentMessage::Hello(hello) => {
                self.is_open = true;
                EdgeMessage::Welcome(Welcome {
                    seq: hello.seq,
                    version: VERSION,
                    connection_id: "bench=".parse()?,
                    tunnels: vec![OpenTunnel {
                        name: TUNNEL.parse()?,
                        url: format!("http://{TUNNEL}.localhost"),
                    }],
                    refused: Vec::new(),
                    // Nobody reads an agent's connection while something else is measured.
                    heartbeat_ms: 240_000,
                    lifetime_ms: 7_200_000,
                    reply_timeout_ms: None,
                    codecs: Codecs::all(),
                    websockets: false,
                    deliveries: false,
                    policies: Vec::new(),
                    owner: None,
                    may_open: Vec::new(),
                    identity_ms: None,
                })
            }
            AgentMessage::Heartbeat(Heartbeat { seq }) => EdgeMessage::Heartbeat(Heartbeat { seq }),
            other => bail!("the agent sent {other:?}"),
        };
        self.send(&answer).await?;
        Ok(true)
    }

    /// The next message about a request.
    async fn answer(&mut self) -> anyhow::Result<Utf8Bytes> {
        let answering = async {
            loop {
                let text = self.text().await?;
                if !self.control(&text).await? {
                    return Ok(text);
                }
            }
        };
        timeout(PATIENCE, answering).await.context("the agent does not answer")?
    }

    /// Sends a request and gives its number.
    async fn ask(&mut self, ask: &Ask<'_>) -> anyhow::Result<u64> {
        self.last += 1;
        let number = self.last;
        let method = if ask.upload == 0 { "GET" } else { "POST" };
        let request = Request {
            request_id: id(number),
            token: number.to_string().into(),
            tunnel: TUNNEL.parse()?,
            method: method.into(),
            target: Target::parse(ask.target)?,
            headers: fields(),
            body: None,
            announced: (ask.upload > 0).then_some(ask.upload as u64),
            streamed: false,
            timeout_ms: 60_000,
            upgrade: None,
            delivery: None,
        };
        self.send(&EdgeMessage::Request(request)).await?;
        Ok(number)
    }

    /// Sends an announced body.
    async fn upload(&mut self, number: u64, pieces: &[Body<'static>]) -> anyhow::Result<()> {
        for (body, seq) in pieces.iter().zip(1..) {
            let chunk = RequestChunk {
                request_id: id(number),
                seq,
                body: body.clone(),
                end: usize::try_from(seq)? == pieces.len(),
            };
            self.send(&EdgeMessage::RequestChunk(chunk)).await?;
        }
        Ok(())
    }

    async fn credit(&mut self, number: u64, through: u32) -> anyhow::Result<()> {
        self.send(&EdgeMessage::Credit(Credit { request_id: id(number), through })).await
    }

    /// Has always `window` requests under way.
    pub(crate) async fn load(&mut self, ask: &Ask<'_>, window: usize, until: Until) -> anyhow::Result<Load> {
        let pattern = tests::noise(3, ask.upload);
        let pieces: Vec<_> =
            pattern.chunks(limits::CHUNK_BYTES).map(|piece| Body::encode(piece).into_owned()).collect();
        let begun = Instant::now();
        let mut load = Load { answers: 0, bytes: 0, time: Duration::ZERO, delays: Vec::new() };
        let mut open = HashMap::with_capacity(window);
        loop {
            let is_over = |asked: usize| match until {
                Until::Answers(count) => asked >= count,
                Until::Time(time) => begun.elapsed() >= time,
            };
            while open.len() < window && !is_over(load.answers + open.len()) {
                let number = self.ask(ask).await?;
                open.insert(number, Open { begun: Instant::now(), next: 0, bytes: 0 });
            }
            if open.is_empty() {
                break;
            }
            let text = self.answer().await?;
            let Some(piece) = Piece::read(&text)? else {
                let number = Envelope::peek(&text)?.token.context("no token")?.parse()?;
                self.upload(number, &pieces).await?;
                load.bytes += ask.upload;
                continue;
            };
            let asked = open.get_mut(&piece.number).context("an answer to no question")?;
            ensure!(asked.next == piece.seq, "piece {} came where {} is due", piece.seq, asked.next);
            asked.next += 1;
            asked.bytes += piece.bytes;
            if piece.end {
                if let Some(expected) = ask.expected {
                    ensure!(asked.bytes == expected, "{} bytes of {expected} came", asked.bytes);
                }
                load.answers += 1;
                load.bytes += asked.bytes;
                load.delays.push(asked.begun.elapsed().as_secs_f64() * 1e3);
                open.remove(&piece.number);
            } else if piece.seq > 0 && piece.seq.is_multiple_of(limits::CREDIT_EVERY) {
                self.credit(piece.number, piece.seq).await?;
            }
        }
        load.time = begun.elapsed();
        Ok(load)
    }

    /// Asks once and gives the whole body.
    pub(crate) async fn whole(&mut self, target: &str) -> anyhow::Result<Vec<u8>> {
        let mut body = Vec::new();
        self.each_piece(target, |piece| {
            body.extend_from_slice(piece);
            Ok(())
        })
        .await?;
        Ok(body)
    }

    /// Asks once and hands over each piece of the body when it is there.
    pub(crate) async fn each_piece(
        &mut self,
        target: &str,
        mut take: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let number = self.ask(&Ask { target, upload: 0, expected: None }).await?;
        loop {
            let text = self.answer().await?;
            let (seq, body, end) = match AgentMessage::decode(&text)? {
                AgentMessage::Reply(reply) => (0, reply.body, reply.end),
                AgentMessage::Chunk(chunk) => (chunk.seq, chunk.body, chunk.end),
                other => bail!("the agent sent {other:?}"),
            };
            take(&body.map(Body::decode).transpose()?.unwrap_or_default())?;
            if end {
                return Ok(());
            }
            self.credit(number, seq).await?;
        }
    }

    /// Opens `count` endless responses; returns when each of them has sent `pieces` pieces.
    pub(crate) async fn hold(&mut self, target: &str, count: usize, pieces: u32) -> anyhow::Result<Held> {
        let mut held = Held(HashMap::with_capacity(count));
        for _ in 0..count {
            let number = self.ask(&Ask { target, upload: 0, expected: None }).await?;
            held.0.insert(number, 0);
        }
        let mut ready = 0;
        while ready < count {
            let text = self.answer().await?;
            let piece = Piece::read(&text)?.context("not a piece of an answer")?;
            let next = held.0.get_mut(&piece.number).context("an answer to no question")?;
            ensure!(*next == piece.seq && !piece.end, "a stream that is to stay open has ended");
            *next += 1;
            ready += usize::from(*next == pieces);
            self.credit(piece.number, piece.seq).await?;
        }
        Ok(held)
    }

    /// Takes at least so many bytes of an endless response and ends it; how many came.
    pub(crate) async fn part(&mut self, target: &str, bytes: usize) -> anyhow::Result<usize> {
        let number = self.ask(&Ask { target, upload: 0, expected: None }).await?;
        let mut came = 0;
        while came < bytes {
            let text = self.answer().await?;
            let piece = Piece::read(&text)?.context("not a piece of an answer")?;
            ensure!(piece.number == number && !piece.end, "a stream that is to stay open has ended");
            came += piece.bytes;
            if piece.seq > 0 && piece.seq.is_multiple_of(limits::CREDIT_EVERY) {
                self.credit(number, piece.seq).await?;
            }
        }
        self.release(Held(HashMap::from([(number, 0)]))).await?;
        Ok(came)
    }

    /// Ends what is held; returns when the agent has confirmed every one.
    pub(crate) async fn release(&mut self, held: Held) -> anyhow::Result<()> {
        let numbers: Vec<_> = held.0.into_keys().collect();
        // As many as the agent keeps last words for: an edge that is in a hurry asks again.
        for some in numbers.chunks(CANCELLED_AT_ONCE) {
            for &number in some {
                self.send(&EdgeMessage::Cancel(Cancel { request_id: id(number) })).await?;
            }
            let mut left: HashSet<_> = some.iter().copied().collect();
            while !left.is_empty() {
                let text = self.answer().await?;
                match AgentMessage::decode(&text)? {
                    AgentMessage::Failed(failed) if failed.code == ErrorCode::Cancelled => {
                        ensure!(left.remove(&failed.token.parse()?), "the end of what is not there");
                    }
                    AgentMessage::Chunk(_) => {}
                    other => bail!("the agent sent {other:?}"),
                }
            }
        }
        Ok(())
    }
}

/// Responses that stay open, each with the number of the piece that comes next.
pub(crate) struct Held(HashMap<u64, u32>);

impl Piece {
    /// Reads a piece of an answer without decoding its body; `None` where the agent asks for a body.
    fn read(text: &str) -> anyhow::Result<Option<Self>> {
        let (token, seq, body, end) = match AgentMessage::decode(text)? {
            AgentMessage::Reply(reply) => {
                ensure!(reply.status == 200, "status {}", reply.status);
                (reply.token, 0, reply.body, reply.end)
            }
            AgentMessage::Chunk(chunk) => (chunk.token, chunk.seq, chunk.body, chunk.end),
            AgentMessage::Continue(_) => return Ok(None),
            other => bail!("the agent sent {other:?}"),
        };
        let bytes = match body {
            None => 0,
            Some(Body::Text(text)) => text.len(),
            Some(Body::Base64(text)) => {
                text.len() / 4 * 3 - text.bytes().rev().take(2).filter(|&byte| byte == b'=').count()
            }
            Some(body @ Body::Zstd(_)) => body.decode()?.len(),
        };
        Ok(Some(Self { number: token.parse()?, seq, bytes, end }))
    }
}

/// The id of the request with that number.
pub(crate) fn id(number: u64) -> RequestId {
    RequestId::from_random(u128::from(number).to_be_bytes())
}

/// The fields that a browser's request has when it comes out of `ingress`.
fn fields() -> Headers {
    const FIELDS: [(&str, &str); 9] = [
        ("host", "bench.localhost"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("accept-language", "en-US,en;q=0.5"),
        ("accept-encoding", "gzip, deflate, br, zstd"),
        ("x-forwarded-for", "203.0.113.7"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "bench.localhost"),
        ("x-forwarded-port", "443"),
    ];
    let mut headers = Headers::new();
    for (name, value) in FIELDS {
        headers.push(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    headers
}
