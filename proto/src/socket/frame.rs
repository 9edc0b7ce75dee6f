//! What the messages of a public WebSocket are made of on the link.

use serde::{Deserialize, Serialize};

use crate::body::Body;

/// What a message of a WebSocket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameKind {
    /// Text.
    Text,
    /// Binary.
    Binary,
    /// The last word.
    Close,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A message of a WebSocket, or a piece of one, inside a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<'a> {
    /// What it is.
    pub kind: FrameKind,
    /// Its payload; of a close, the reason. Absent where it is empty.
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    pub body: Option<Body<'a>>,
    /// Whether the same message goes on in the next frame.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// The code of a close; a close may have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<u16>,
}

/// Numbered frames of the other end, and what it says beside them.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Counts from 1; 0 where there are no frames.
    pub seq: u32,
    /// Every batch of ours up to and including this one has been passed on.
    pub through: u32,
    /// How many batches the other end has sent: a question, to be answered at once.
    pub sent: Option<u32>,
    /// The frames.
    pub frames: Vec<Frame<'a>>,
}

impl Batch<'_> {
    /// The same, independent of what it was decoded from.
    #[must_use]
    pub fn into_owned(self) -> Batch<'static> {
        let owned = |frame: Frame<'_>| Frame {
            kind: frame.kind,
            body: frame.body.map(Body::into_owned),
            more: frame.more,
            code: frame.code,
        };
        let frames = self.frames.into_iter().map(owned).collect();
        Batch { seq: self.seq, through: self.through, sent: self.sent, frames }
    }
}
