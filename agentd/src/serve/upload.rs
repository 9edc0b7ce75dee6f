//! The body of a request that arrives in pieces after `continue`.
//!
//! Enters: `request_chunk`s in any order, twice or not. Leaves: the body in order, as the upstream
//! takes it. What is held is bounded by the announced length, which the budget was asked for; of a streamed body by
//! the window that its sender was given, whose credit follows what the upstream has taken.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use proto::{
    chunk::{Accepted, Reassembler},
    error::ErrorCode,
    limits,
};
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::Instant,
};

use crate::capture::ring::Tap;

/// Why an announced body came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UploadError {
    /// More or fewer bytes than were announced.
    #[error("the body is not as long as it was announced")]
    Length,
    /// Pieces so far ahead that they cannot belong to this body.
    #[error("a piece of the body is out of range")]
    Range,
    /// The sender has gone.
    #[error("the rest of the body will not come")]
    Gone,
    /// The upstream's connection let go of it. Nothing is wrong with the body.
    #[error("nobody takes the rest of the body")]
    Unwanted,
    /// It has come to more bytes than may be taken, which the code says.
    #[error("the body is longer than it may be")]
    OverLimit(ErrorCode),
}

/// No sender needs smaller pieces than this, so it bounds how many of them can be waiting.
const SMALLEST_PIECE_BYTES: u64 = 1024;

/// The most of a streamed body that is held here.
const WINDOW_BYTES: u64 = limits::UPLOAD_WINDOW as u64 * limits::CHUNK_BYTES as u64;

#[derive(Debug)]
struct State {
    pieces: Reassembler<(Bytes, bool)>,
    /// How many bytes there are to be; [`limits::UNKNOWN_LENGTH`] until the last piece says so.
    announced: u64,
    streamed: bool,
    /// The most bytes of it that are taken, and what more are refused with.
    limit: Option<(u64, ErrorCode)>,
    received: u64,
    passed_on: u64,
    accepting: bool,
    /// The number of the last piece.
    last: Option<u32>,
    /// When something came or went last.
    moved_at: Option<Instant>,
    outcome: Option<Result<(), UploadError>>,
    waker: Option<Waker>,
}

impl State {
    fn fail(&mut self, error: UploadError) {
        if self.outcome.is_none() {
            self.outcome = Some(Err(error));
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn has_all(&self) -> bool {
        match self.last {
            Some(last) if self.announced == limits::UNKNOWN_LENGTH => {
                u64::from(self.pieces.next_seq()) + self.pieces.waiting() as u64 > u64::from(last)
            }
            _ => self.received >= self.announced,
        }
    }
}

/// The side that takes pieces as they arrive. Dropping it breaks off a body that is not whole.
#[derive(Debug)]
pub(crate) struct Upload(Arc<Mutex<State>>);

/// The side that the upstream's connection reads.
#[derive(Debug)]
pub(crate) struct UploadBody {
    state: Arc<Mutex<State>>,
    // Given back when the upstream's connection lets go of the body.
    budget: Option<OwnedSemaphorePermit>,
    /// The number of the last piece that the upstream has taken.
    taken: watch::Sender<u32>,
    /// What is taken before anything else.
    again: VecDeque<Bytes>,
    tap: Option<Tap>,
}

/// Tells whether the upstream has been given the whole body.
#[derive(Debug, Clone)]
pub(crate) struct UploadProgress(Arc<Mutex<State>>);

/// Makes the two sides of a body of `announced` bytes. Nothing is taken before [`UploadBody::accept`]. Its side is boxed:
/// each request has room for one, and each connection to an upstream for a whole queue of them.
pub(crate) fn new(announced: u64, streamed: bool) -> (Upload, Box<UploadBody>, UploadProgress) {
    let window = if streamed {
        limits::UPLOAD_WINDOW
    } else {
        u32::try_from(announced / SMALLEST_PIECE_BYTES + 8).unwrap_or(u32::MAX)
    };
    let state = Arc::new(Mutex::new(State {
        pieces: Reassembler::new(1, window),
        announced,
        streamed,
        limit: None,
        received: 0,
        passed_on: 0,
        accepting: false,
        last: None,
        moved_at: None,
        outcome: (announced == 0).then_some(Ok(())),
        waker: None,
    }));
    let body = Box::new(UploadBody {
        state: Arc::clone(&state),
        budget: None,
        taken: watch::Sender::new(0),
        again: VecDeque::new(),
        tap: None,
    });
    (Upload(Arc::clone(&state)), body, UploadProgress(state))
}

impl Upload {
    /// Takes a piece.
    pub(crate) fn push(&self, seq: u32, bytes: Vec<u8>, end: bool) {
        let mut state = lock(&self.0);
        if state.outcome.is_some() {
            return;
        }
        if !state.accepting {
            return state.fail(UploadError::Range);
        }
        let len = bytes.len() as u64;
        match state.pieces.push(seq, (bytes.into(), end)) {
            Err(_) => return state.fail(UploadError::Range),
            Ok(Accepted::Duplicate) => return,
            Ok(Accepted::New) => state.received += len,
        }
        state.moved_at = Some(Instant::now());
        if end {
            state.last = Some(seq);
        }
        if let Some((most, code)) = state.limit
            && state.received > most
        {
            return state.fail(UploadError::OverLimit(code));
        }
        if state.received > state.announced {
            return state.fail(UploadError::Length);
        }
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    /// Breaks the body off.
    pub(crate) fn fail(&self, error: UploadError) {
        lock(&self.0).fail(error);
    }

    /// The number of the last piece that the upstream has taken.
    pub(crate) fn taken(&self) -> u32 {
        lock(&self.0).pieces.next_seq() - 1
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut state = lock(&self.0);
        if !state.has_all() {
            state.fail(UploadError::Gone);
        }
    }
}

impl UploadBody {
    /// Takes pieces from now on; `budget` is what they may weigh together.
    pub(crate) fn accept(&mut self, budget: OwnedSemaphorePermit) {
        self.budget = Some(budget);
        lock(&self.state).accepting = true;
    }

    /// Takes no more than `most` bytes of it, and no more than was said before; where there are more, it fails with
    /// `code`. For a body whose length nobody knows yet.
    pub(crate) fn limit(&mut self, most: u64, code: ErrorCode) {
        let mut state = lock(&self.state);
        if state.limit.is_none_or(|(before, _)| most < before) {
            state.limit = Some((most, code));
        }
    }

    /// Whether pieces are taken already.
    pub(crate) const fn is_accepted(&self) -> bool {
        self.budget.is_some()
    }

    /// How many bytes of it are held at a time, at most, where they are passed on as they come.
    pub(crate) fn most_held(&self) -> u64 {
        let State { announced, streamed, .. } = *lock(&self.state);
        if streamed { announced.min(WINDOW_BYTES) } else { announced }
    }

    /// Puts back what was taken, to be taken once more: all of it, in order.
    pub(crate) fn put_back(&mut self, pieces: Vec<Bytes>) {
        let mut state = lock(&self.state);
        state.passed_on -= pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if state.outcome == Some(Ok(())) && state.passed_on < state.announced {
            state.outcome = None;
        }
        // Before what an earlier attempt put back and this one has not taken.
        for piece in pieces.into_iter().rev() {
            self.again.push_front(piece);
        }
    }

    /// Shows the inspector what passes.
    pub(crate) fn show(&mut self, tap: Option<Tap>) {
        if let Some(tap) = &tap
            && lock(&self.state).outcome == Some(Ok(()))
        {
            tap.request_ended();
        }
        self.tap = tap;
    }

    /// How many bytes were announced.
    pub(crate) fn announced(&self) -> u64 {
        lock(&self.state).announced
    }

    /// Whether its sender is told how far it was taken.
    pub(crate) fn is_streamed(&self) -> bool {
        lock(&self.state).streamed
    }

    /// The number of the last piece that the upstream has taken, as it grows; ends with the body.
    pub(crate) fn watch_taken(&self) -> watch::Receiver<u32> {
        self.taken.subscribe()
    }
}

impl UploadProgress {
    /// Whether the upstream's connection has taken the whole body.
    pub(crate) fn is_complete(&self) -> bool {
        lock(&self.0).outcome == Some(Ok(()))
    }

    /// When something of a streamed body came or went last. Whoever waits for an answer to one waits from then on.
    pub(crate) fn moved_at(&self) -> Option<Instant> {
        let state = lock(&self.0);
        state.moved_at.filter(|_| state.streamed)
    }

    /// How many bytes the upstream has taken.
    pub(crate) fn passed_on(&self) -> u64 {
        lock(&self.0).passed_on
    }

    /// What broke the body off, if anything did: not that the upstream's connection let go of it.
    pub(crate) fn failure(&self) -> Option<UploadError> {
        lock(&self.0).outcome.and_then(Result::err).filter(|error| *error != UploadError::Unwanted)
    }
}

impl Drop for UploadBody {
    /// Nobody takes the rest: what is held is let go, and what still comes is dropped.
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.outcome.get_or_insert(Err(UploadError::Unwanted));
        state.pieces = Reassembler::new(1, 0);
    }
}

impl http_body::Body for UploadBody {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let this = self.get_mut();
        let mut state = lock(&this.state);
        if let Some(bytes) = this.again.pop_front() {
            state.passed_on += bytes.len() as u64;
            if state.passed_on == state.announced {
                state.outcome.get_or_insert(Ok(()));
            }
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        loop {
            match state.outcome {
                Some(Ok(())) => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {}
            }
            let Some((seq, (bytes, end))) = state.pieces.pop() else {
                state.waker = Some(cx.waker().clone());
                return Poll::Pending;
            };
            this.taken.send_replace(seq);
            state.moved_at = Some(Instant::now());
            state.passed_on += bytes.len() as u64;
            if end && state.announced == limits::UNKNOWN_LENGTH {
                state.announced = state.passed_on;
            }
            match (state.passed_on == state.announced, end) {
                (true, _) => state.outcome = Some(Ok(())),
                (false, true) => state.fail(UploadError::Length),
                (false, false) => {}
            }
            if let Some(tap) = &this.tap {
                if !bytes.is_empty() {
                    tap.request_piece(&bytes);
                }
                if state.outcome == Some(Ok(())) {
                    tap.request_ended();
                }
            }
            if !bytes.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.state).outcome == Some(Ok(()))
    }

    fn size_hint(&self) -> SizeHint {
        let state = lock(&self.state);
        match state.announced {
            limits::UNKNOWN_LENGTH => SizeHint::default(),
            announced => SizeHint::with_exact(announced - state.passed_on),
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tokio::sync::Semaphore;

    use super::*;

    async fn open(announced: u64) -> (Upload, Box<UploadBody>, UploadProgress) {
        accepted(announced, false).await
    }

    async fn accepted(announced: u64, is_streamed: bool) -> (Upload, Box<UploadBody>, UploadProgress) {
        let (upload, mut body, progress) = new(announced, is_streamed);
        body.accept(Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap());
        (upload, body, progress)
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_is_counted_and_ends_at_its_smallest_limit() {
        for (most, bytes, expected) in [
            (4, "abcd", Ok(Bytes::from("abcd"))),
            (3, "abcd", Err(UploadError::OverLimit(ErrorCode::BodyTooLarge))),
            (0, "a", Err(UploadError::OverLimit(ErrorCode::BodyTooLarge))),
            (0, "", Ok(Bytes::new())),
            (9, "abcdefgh", Err(UploadError::OverLimit(ErrorCode::WebhookTooLarge))),
        ] {
            let (upload, mut body, _) = accepted(limits::UNKNOWN_LENGTH, true).await;
            body.limit(6, ErrorCode::WebhookTooLarge);
            body.limit(most, ErrorCode::BodyTooLarge);
            let (front, back) = bytes.split_at(bytes.len() / 2);
            upload.push(2, back.into(), true);
            upload.push(1, front.into(), false);
            let whole = body.collect().await.map(http_body_util::Collected::to_bytes);
            assert_eq!(whole, expected, "{bytes} of {most}");
        }
    }

    #[tokio::test]
    async fn pieces_in_any_order_make_the_announced_body() {
        let (upload, body, progress) = open(6).await;
        upload.push(2, b"cd".to_vec(), false);
        upload.push(3, b"ef".to_vec(), true);
        upload.push(2, b"xx".to_vec(), false);
        upload.push(1, b"ab".to_vec(), false);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "abcdef");
        assert!(progress.is_complete());
    }

    async fn streamed(announced: u64) -> (Upload, Box<UploadBody>, UploadProgress) {
        accepted(announced, true).await
    }

    #[tokio::test]
    async fn a_body_without_a_length_ends_with_its_last_piece() {
        for order in [[1, 2, 3], [3, 1, 2], [2, 3, 1]] {
            let (upload, body, progress) = streamed(limits::UNKNOWN_LENGTH).await;
            for seq in order {
                upload.push(seq, if seq == 3 { Vec::new() } else { b"ab".to_vec() }, seq == 3);
            }
            // Whoever has sent all of it may go.
            drop(upload);
            assert_eq!(http_body::Body::size_hint(&body).exact(), None);
            assert_eq!(body.collect().await.unwrap().to_bytes(), "abab");
            assert!(progress.is_complete() && progress.passed_on() == 4);
        }
        let (upload, body, _) = streamed(limits::UNKNOWN_LENGTH).await;
        upload.push(1, b"ab".to_vec(), false);
        upload.push(3, b"ef".to_vec(), true);
        drop(upload);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Gone, "a piece in the middle is missing");
    }

    #[tokio::test]
    async fn no_more_is_held_of_a_streamed_body_than_its_window() {
        let (upload, mut body, _) = streamed(limits::UNKNOWN_LENGTH).await;
        let taken = body.watch_taken();
        for seq in 1..=limits::UPLOAD_WINDOW {
            upload.push(seq, b"a".to_vec(), false);
        }
        // What was taken makes room, and one piece past the window does not fit.
        body.frame().await.unwrap().unwrap();
        assert_eq!((*taken.borrow(), upload.taken()), (1, 1));
        upload.push(limits::UPLOAD_WINDOW + 1, b"a".to_vec(), false);
        upload.push(limits::UPLOAD_WINDOW + 2, b"a".to_vec(), false);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Range);
    }

    #[tokio::test]
    async fn what_was_taken_can_be_taken_again() {
        for taken in 0..=3 {
            let (upload, mut body, progress) = open(6).await;
            for (seq, piece) in [(1, b"ab"), (2, b"cd"), (3, b"ef")] {
                upload.push(seq, piece.to_vec(), seq == 3);
            }
            let mut pieces = Vec::new();
            for _ in 0..taken {
                pieces.push(body.frame().await.unwrap().unwrap().into_data().unwrap());
            }
            body.put_back(pieces);
            assert!(!progress.is_complete());
            assert_eq!(body.collect().await.unwrap().to_bytes(), "abcdef");
            assert!(progress.is_complete());
        }
    }

    /// The second attempt may be refused before it has taken what the first one did.
    #[tokio::test]
    async fn what_was_taken_twice_is_still_in_order() {
        for again in 0..=3 {
            let (upload, mut body, _) = open(6).await;
            for (seq, piece) in [(1, b"ab"), (2, b"cd"), (3, b"ef")] {
                upload.push(seq, piece.to_vec(), seq == 3);
            }
            for taken in [3, again] {
                let mut pieces = Vec::new();
                for _ in 0..taken {
                    pieces.push(body.frame().await.unwrap().unwrap().into_data().unwrap());
                }
                body.put_back(pieces);
            }
            assert_eq!(body.collect().await.unwrap().to_bytes(), "abcdef", "{again}");
        }
    }

    #[tokio::test]
    async fn a_body_of_another_length_is_never_whole() {
        let (upload, body, _) = open(4).await;
        upload.push(1, b"abcde".to_vec(), true);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Length);

        let (upload, body, progress) = open(4).await;
        upload.push(1, b"abc".to_vec(), true);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Length);
        assert!(!progress.is_complete());

        let (upload, body, _) = open(4).await;
        upload.push(99, b"a".to_vec(), true);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Range);

        let (upload, body, _) = open(4).await;
        upload.push(1, b"abc".to_vec(), false);
        drop(upload);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Gone);

        let (upload, body, progress) = open(4).await;
        upload.push(1, b"ab".to_vec(), false);
        drop(body);
        upload.push(2, b"cd".to_vec(), true);
        drop(upload);
        assert!(!progress.is_complete() && progress.failure().is_none(), "the upstream is to blame");

        let (upload, body, _) = new(4, false);
        upload.push(1, b"abcd".to_vec(), true);
        assert_eq!(body.collect().await.unwrap_err(), UploadError::Range, "nobody asked for it yet");
    }
}
