//! The public side of an exchange: who waits for its answer.

use bytes::Bytes;
use proto::{error::ErrorCode, header::Headers};
use tokio::sync::mpsc;

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

/// The head of an answer, as the public client is to see it.
#[derive(Debug)]
pub struct Head {
    /// Its status.
    pub status: u16,
    /// Its fields, none of them hop-by-hop.
    pub headers: Headers,
}

/// Who waits for the answer of one exchange. It is answered once.
pub trait PublicSide {
    /// Answers with an error of ours. Ends when the answer has been taken, or nobody is left to take it.
    fn fail(self, code: ErrorCode) -> impl Future<Output = ()>;

    /// Begins the answer with its head and what is there of its body. The rest follows.
    fn begin(self, head: Head, first: Vec<u8>) -> Pieces;
}
