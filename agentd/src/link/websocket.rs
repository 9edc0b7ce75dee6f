//! One open WebSocket: what is received, how messages are cut into frames and written, and what its end
//! means.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use proto::limits;
use tokio::{
    net::TcpStream,
    time::{Instant, error::Elapsed, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{
            CloseFrame,
            frame::{
                Frame,
                coding::{Data, OpCode},
            },
        },
    },
};

use crate::serve::outbox::{Control, Outbox, Outgoing, Queue};

/// How the other end says that this connection, not this agent, is over.
const RESTART_CODES: [u16; 3] = [1001, 1012, 1013];

/// A WebSocket before it is taken apart.
pub(super) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Received messages.
pub(crate) type Incoming = SplitStream<Socket>;

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the edge closed the connection ({code}{reason})")]
    Closed { code: u16, reason: String },
    #[error("the edge closed the connection without a word")]
    Eof,
    #[error("the connection failed: {0}")]
    Broken(#[source] Box<tungstenite::Error>),
    #[error("writing took longer than {0:?}")]
    WriteTimedOut(Duration),
    #[error("the edge sent a binary message")]
    Binary,
}

impl LinkError {
    /// Whether the edge just wants the agent to come back.
    pub(crate) fn is_restart(&self) -> bool {
        matches!(self, Self::Closed { code, .. } if RESTART_CODES.contains(code))
    }

    /// A word for the metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Closed { .. } if self.is_restart() => "edge_restart",
            Self::Closed { .. } => "closed",
            Self::Eof => "eof",
            Self::Broken(_) => "broken",
            Self::WriteTimedOut(_) => "write_timeout",
            Self::Binary => "binary",
        }
    }

    pub(crate) fn from_close(frame: Option<&CloseFrame>) -> Self {
        match frame {
            None => Self::Eof,
            Some(frame) => {
                let reason: String = frame.reason.chars().filter(|c| !c.is_control()).take(100).collect();
                let reason = if reason.is_empty() { reason } else { format!(": {reason}") };
                Self::Closed { code: frame.code.into(), reason }
            }
        }
    }
}

impl From<tungstenite::Error> for LinkError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => Self::Eof,
            other => Self::Broken(Box::new(other)),
        }
    }
}

/// An open connection.
pub(crate) struct Link {
    /// What the edge sends.
    pub(crate) incoming: Incoming,
    /// Where everybody sends.
    pub(crate) outbox: Outbox,
    /// Ends with the connection's end as the writer sees it.
    pub(crate) writer: tokio::task::JoinHandle<Result<(), LinkError>>,
}

impl Link {
    /// Begins to write what is handed in.
    pub(super) fn start(socket: Socket) -> Self {
        let (sink, incoming) = socket.split();
        let (outbox, queue) = Outbox::new();
        let writer = tokio::spawn(write(sink, queue));
        Self { incoming, outbox, writer }
    }
}

/// How much of what was sent is kept for that.
const KEPT_BYTES: usize = 2 * limits::MESSAGE_BYTES;

/// The last messages that were written, so that those that the edge could not take can be sent once more. Whoever takes
/// them drops what came twice.
#[derive(Default)]
struct Kept {
    messages: VecDeque<Written>,
    bytes: usize,
}

struct Written {
    at: Instant,
    /// How often it was sent again.
    again: u32,
    text: Bytes,
}

impl Kept {
    fn push(&mut self, text: Bytes, again: u32) {
        let now = Instant::now();
        self.bytes += text.len();
        self.messages.push_back(Written { at: now, again, text });
        let is_old = |one: &Written| now.duration_since(one.at) > limits::REFUSED_WITHIN;
        while self.bytes > KEPT_BYTES || self.messages.front().is_some_and(is_old) {
            let Some(oldest) = self.messages.pop_front() else { break };
            self.bytes -= oldest.text.len();
        }
    }

    /// Takes out those that may have been refused and may be sent again.
    fn take(&mut self) -> impl Iterator<Item = Written> + use<> {
        self.bytes = 0;
        let messages = std::mem::take(&mut self.messages).into_iter();
        messages.filter(|one| one.at.elapsed() <= limits::REFUSED_WITHIN && one.again < limits::REFUSED_TRIES)
    }
}

/// Writes what is handed in until the connection ends or is closed.
async fn write(
    mut sink: SplitSink<Socket, Message>,
    Queue { mut control, mut data }: Queue,
) -> Result<(), LinkError> {
    let late = |_: Elapsed| LinkError::WriteTimedOut(limits::WRITE_TIMEOUT);
    let mut kept = Kept::default();
    loop {
        // Small messages that are there together leave together.
        let next = match (control.try_recv(), data.is_empty()) {
            (Ok(message), _) => Next::Control(message),
            (Err(_), false) => data.try_recv().map_or(Next::Nothing, Next::Data),
            (Err(_), true) => {
                timeout(limits::WRITE_TIMEOUT, sink.flush()).await.map_err(late)??;
                tokio::select! {
                    biased;
                    message = control.recv() => message.map_or(Next::End, Next::Control),
                    message = data.recv() => message.map_or(Next::End, Next::Data),
                }
            }
        };
        match next {
            Next::Nothing => {}
            Next::End => return Ok(()),
            Next::Control(Control::Text(text)) => write_message(&mut sink, text).await?,
            Next::Control(Control::Word(text)) | Next::Data(Outgoing { text, .. }) => {
                write_message(&mut sink, text.clone()).await?;
                kept.push(text, 0);
            }
            Next::Control(Control::Ping) => {
                timeout(limits::WRITE_TIMEOUT, sink.feed(Message::Ping(Bytes::new())))
                    .await
                    .map_err(late)??;
            }
            Next::Control(Control::Again) => {
                // The session greets again by itself.
                let is_empty = kept.messages.is_empty();
                let mut again = kept.take().peekable();
                if !is_empty && again.peek().is_none() {
                    tracing::warn!(
                        "what the edge could not take is too old to be sent again, or was sent again often enough"
                    );
                }
                for Written { again, text, .. } in again {
                    write_message(&mut sink, text.clone()).await?;
                    kept.push(text, again + 1);
                }
            }
            Next::Control(Control::Close(code, reason)) => {
                data.close();
                while let Some(Outgoing { text, _bulk }) = data.recv().await {
                    write_message(&mut sink, text).await?;
                }
                let frame = CloseFrame { code, reason: reason.into() };
                timeout(limits::WRITE_TIMEOUT, sink.send(Message::Close(Some(frame))))
                    .await
                    .map_err(late)??;
                return Ok(());
            }
        }
    }
}

enum Next {
    Nothing,
    End,
    Control(Control),
    Data(Outgoing),
}

/// Writes one text message in frames of at most [`limits::FRAME_BYTES`]. A frame is under way
/// before the next is handed over, so that the answer to a ping goes between them.
async fn write_message(sink: &mut SplitSink<Socket, Message>, mut text: Bytes) -> Result<(), LinkError> {
    let late = |_: Elapsed| LinkError::WriteTimedOut(limits::WRITE_TIMEOUT);
    let mut opcode = Data::Text;
    loop {
        let frame = text.split_to(text.len().min(limits::FRAME_BYTES));
        let last = text.is_empty();
        let frame = Message::Frame(Frame::message(frame, OpCode::Data(opcode), last));
        timeout(limits::WRITE_TIMEOUT, sink.feed(frame)).await.map_err(late)??;
        if last {
            return Ok(());
        }
        timeout(limits::WRITE_TIMEOUT, sink.flush()).await.map_err(late)??;
        opcode = Data::Continue;
    }
}
