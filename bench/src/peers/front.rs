//! The least that can be in front of an agent: HTTP comes in, the agent's WebSocket goes out, nothing of AWS
//! is between. With it `agentd` alone takes the same load as any other tunnel.
//!
//! Requests have no body here: what is compared are responses.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    rc::Rc,
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::stream;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{
    header::Headers,
    limits,
    message::{AgentMessage, Cancel, Credit, EdgeMessage, Request},
    target::Target,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::LocalSet,
};

use crate::edge::{self, BareEdge, Line, TUNNEL};

/// A running front. Ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Front {
    child: Child,
    /// Where requests come in.
    pub(crate) public: SocketAddr,
    /// Where the agent connects.
    pub(crate) url: String,
}

impl Front {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("front")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the front")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        let (public, url) = line.trim().split_once(' ').context("the front's addresses")?;
        Ok(Self { public: public.parse()?, url: url.to_owned(), child })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A piece of an answer with its number, or that the answer has broken off.
type Piece = io::Result<(u32, Bytes)>;

/// What the connections of clients want of the agent's.
enum Wish {
    /// A request, and where its answer goes.
    Ask(Box<http::Request<Incoming>>, oneshot::Sender<Response<Body>>),
    /// The client has taken the pieces of an answer up to that one.
    Credit(u64, u32),
}

/// A request that is not answered in full.
struct Open {
    /// Where the head goes.
    head: Option<oneshot::Sender<Response<Body>>>,
    /// Where pieces go; the agent has only so many of them under way.
    body: Option<mpsc::UnboundedSender<Piece>>,
}

/// Is the front until standard input ends.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let edge = BareEdge::bind().await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listening for clients")?;
    {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{} {}", listener.local_addr()?, edge.url)?;
        stdout.flush()?;
    }
    // The end of the input is the end of whoever measures.
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        drop(io::stdin().lock().read_until(0, &mut Vec::new()));
        let _ = ended.send(());
    });
    let serving = async {
        let line = edge.accept().await?;
        // As many as there are requests under way: whoever measures bounds them.
        let (wishes, wished) = mpsc::unbounded_channel();
        tokio::select! {
            result = relay(line, wishes.clone(), wished) => result,
            result = accept(&listener, wishes) => result,
        }
    };
    let set = LocalSet::new();
    tokio::select! {
        result = set.run_until(serving) => result,
        _ = end => Ok(()),
    }
}

/// Takes the connections of clients.
async fn accept(listener: &TcpListener, wishes: mpsc::UnboundedSender<Wish>) -> anyhow::Result<()> {
    let wishes = Rc::new(wishes);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let wishes = Rc::clone(&wishes);
        let service = service_fn(move |request| {
            let (sender, answer) = oneshot::channel();
            let asked = wishes.send(Wish::Ask(Box::new(request), sender));
            async move {
                asked.ok().context("the agent has left")?;
                answer.await.context("the agent has left")
            }
        });
        let connection =
            http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
        tokio::task::spawn_local(connection);
    }
}

/// Carries requests to the agent and its answers back.
async fn relay(
    mut line: Line,
    wishes: mpsc::UnboundedSender<Wish>,
    mut wished: mpsc::UnboundedReceiver<Wish>,
) -> anyhow::Result<()> {
    let mut open = HashMap::<u64, Open>::new();
    let mut last = 0;
    loop {
        tokio::select! {
            // What is sent leaves when the agent has nothing to say: all that is wished leaves together.
            biased;
            wish = wished.recv() => match wish.context("nobody asks")? {
                Wish::Ask(request, sender) => {
                    last += 1;
                    line.send(&message(last, *request)?).await?;
                    open.insert(last, Open { head: Some(sender), body: None });
                }
                Wish::Credit(number, through) => {
                    line.send(&EdgeMessage::Credit(Credit { request_id: edge::id(number), through })).await?;
                }
            },
            text = line.text() => {
                let text = text?;
                if line.control(&text).await? {
                    continue;
                }
                if let Some(gone) = hand_over(&text, &mut open, &wishes)? {
                    line.send(&EdgeMessage::Cancel(Cancel { request_id: edge::id(gone) })).await?;
                }
            }
        }
    }
}

fn message(number: u64, request: http::Request<Incoming>) -> anyhow::Result<EdgeMessage<'static>> {
    let (head, _) = request.into_parts();
    let mut headers = Headers::new();
    for (name, value) in &head.headers {
        headers.push(name.clone(), value.clone());
    }
    headers.strip_hop_by_hop();
    Ok(EdgeMessage::Request(Request {
        request_id: edge::id(number),
        token: number.to_string().into(),
        tunnel: TUNNEL.parse()?,
        method: head.method.as_str().to_owned().into(),
        target: Target::parse(head.uri.path_and_query().map_or("/", |target| target.as_str()))?,
        headers,
        body: None,
        announced: None,
        streamed: false,
        timeout_ms: 60_000,
        upgrade: None,
        delivery: None,
    }))
}

/// Hands a message of the agent to whom it is for; leaves the number of a request whose client has gone.
fn hand_over(
    text: &str,
    open: &mut HashMap<u64, Open>,
    wishes: &mpsc::UnboundedSender<Wish>,
) -> anyhow::Result<Option<u64>> {
    let (token, seq, body, end) = match AgentMessage::decode(text)? {
        AgentMessage::Reply(reply) => {
            let number = reply.token.parse()?;
            let Some(asked) = open.get_mut(&number) else { return Ok(None) };
            let head = asked.head.take().context("a second reply")?;
            let bytes = decoded(reply.body)?;
            let mut response = if reply.end {
                Response::new(whole(bytes))
            } else {
                let (sender, pieces) = mpsc::unbounded_channel();
                sender.send(Ok((0, bytes))).context("the first piece")?;
                asked.body = Some(sender);
                Response::new(streamed(number, pieces, wishes.clone()))
            };
            *response.status_mut() = StatusCode::from_u16(reply.status)?;
            for (name, value) in reply.headers.iter() {
                response.headers_mut().append(name.clone(), value.clone());
            }
            let gone = head.send(response).is_err();
            if reply.end || gone {
                open.remove(&number);
            }
            return Ok((gone && !reply.end).then_some(number));
        }
        AgentMessage::Chunk(chunk) => (chunk.token, chunk.seq, chunk.body, chunk.end),
        AgentMessage::Failed(failed) => {
            // Without a head, the client's connection ends; a body that has begun is broken off.
            if let Some(Open { body: Some(sender), .. }) = open.remove(&failed.token.parse()?) {
                let _ = sender.send(Err(io::Error::other(format!("{:?}", failed.code))));
            }
            return Ok(None);
        }
        other => bail!("the agent sent {other:?}"),
    };
    let number = token.parse()?;
    let Some(asked) = open.get_mut(&number) else { return Ok(None) };
    let sender = asked.body.as_ref().context("a chunk before the reply")?;
    ensure!(seq > 0, "a chunk without a number");
    let gone = sender.send(Ok((seq, decoded(body)?))).is_err();
    if end || gone {
        open.remove(&number);
    }
    Ok((gone && !end).then_some(number))
}

fn decoded(body: Option<proto::body::Body<'_>>) -> anyhow::Result<Bytes> {
    Ok(body.map(proto::body::Body::decode).transpose()?.unwrap_or_default().into())
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// The body of an answer, which returns credit as it is taken.
fn streamed(
    number: u64,
    pieces: mpsc::UnboundedReceiver<Piece>,
    wishes: mpsc::UnboundedSender<Wish>,
) -> Body {
    let frames = stream::unfold((pieces, wishes), move |(mut pieces, wishes)| async move {
        let frame = pieces.recv().await?.map(|(seq, bytes)| {
            if seq > 0 && seq.is_multiple_of(limits::CREDIT_EVERY) {
                let _ = wishes.send(Wish::Credit(number, seq));
            }
            Frame::data(bytes)
        });
        Some((frame, (pieces, wishes)))
    });
    StreamBody::new(frames).boxed_unsync()
}
