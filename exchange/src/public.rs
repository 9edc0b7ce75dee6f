//! The public side of an exchange: who waits for its answer.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{Sink, Stream, stream::LocalBoxStream};
use proto::{error::ErrorCode, header::Headers, socket::Message};
use tokio::sync::mpsc;

use crate::budget::Share;

/// A part of an answer's body.
#[derive(Debug)]
pub enum Piece {
    /// Some bytes.
    Data(Bytes),
    /// That was all of it.
    End,
    /// There should have been more.
    Broken,
}

/// Where the parts of an answer's body go. Closed when the public client is gone; dropping it without a
/// last [`Piece::End`] breaks the answer.
pub type Pieces = mpsc::Sender<Piece>;

/// A request's body that its public client is still sending.
pub struct Upload {
    /// How many bytes it says there are, if it does.
    pub length: Option<u64>,
    /// The bytes as they come. Nothing is asked of the client before the first is asked for here.
    pub pieces: LocalBoxStream<'static, Result<Bytes, ErrorCode>>,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("length", &self.length).finish_non_exhaustive()
    }
}

/// The head of an answer, as the public client is to see it.
#[derive(Debug)]
pub struct Head {
    /// Its status.
    pub status: u16,
    /// Its fields, none of them hop-by-hop.
    pub headers: Headers,
}

/// Why a public WebSocket gives or takes no more messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketError {
    /// Its client broke a rule of WebSocket and is to be told so with this code.
    Violation(u16),
    /// Its client answers nothing any more.
    Silent,
    /// It has ended.
    Gone,
}

/// The WebSocket of who holds none.
#[derive(Debug)]
pub enum NoSocket {}

impl Stream for NoSocket {
    type Item = Result<Message, SocketError>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match *self {}
    }
}

impl Sink<Message> for NoSocket {
    type Error = SocketError;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        match *self {}
    }

    fn start_send(self: Pin<&mut Self>, _: Message) -> Result<(), SocketError> {
        match *self {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        match *self {}
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        match *self {}
    }
}

/// Who waits for the answer of one exchange. It is answered once.
pub trait PublicSide {
    /// Answers with an error of ours. Ends when the answer has been taken, or nobody is left to take it.
    fn fail(self, code: ErrorCode) -> impl Future<Output = ()>;

    /// Ends when nobody is left to take the answer, where that can be known before it is given. Cancel safe.
    fn gone(&mut self) -> impl Future<Output = ()> {
        std::future::pending()
    }

    /// What may be held of what a WebSocket's agent says, or of a body that is still coming.
    fn share(&self) -> Share;

    /// What a WebSocket's messages go through. Dropped, it is closed.
    type Socket: Stream<Item = Result<Message, SocketError>> + Sink<Message, Error = SocketError> + Unpin;

    /// Opens the WebSocket that was asked for; `None` where nobody is there any more.
    fn accept(
        self,
        subprotocol: Option<String>,
        headers: Headers,
    ) -> impl Future<Output = Option<Self::Socket>>;

    /// Begins the answer with its head and what is there of its body. The rest follows.
    fn begin(self, head: Head, first: Vec<u8>) -> Pieces;
}
