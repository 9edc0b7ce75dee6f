//! A body that is still coming, where it may be wanted as a whole: to be kept for later.
//!
//! What has come of it is held within [`limits::REQUEST_BODY_BYTES`], and within a [`Share`] of what all may hold together.
//! [`Begun`] reads a body to its end before anybody gets it. [`Copied`] passes one on as it comes and keeps a copy, for the
//! case that whoever gets it is lost.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    stream::{self, LocalBoxStream, Stream},
};
use proto::{error::ErrorCode, limits};
use tokio::time::Instant;

use crate::{budget::Share, public::Upload};

/// Whether a body of this length, where that is known, is longer than what is kept.
pub(crate) fn is_too_long(length: Option<u64>) -> bool {
    length.is_some_and(|length| length > limits::REQUEST_BODY_BYTES as u64)
}

/// A body of which some has come.
pub(crate) struct Begun {
    length: Option<u64>,
    come: Vec<u8>,
    rest: LocalBoxStream<'static, Result<Bytes, ErrorCode>>,
    share: Share,
}

/// All of a body. What it holds is given back when it is dropped.
pub(crate) struct Whole {
    pub(crate) bytes: Vec<u8>,
    _share: Share,
}

/// Why a body was not had as a whole.
pub(crate) enum NotWhole {
    /// It is longer than what is kept. All of it can still be had as it comes.
    TooLong(Upload),
    /// It did not come in its time, or there is no memory for it.
    Busy,
    /// It broke off.
    Broken(ErrorCode),
}

impl Begun {
    /// None of it has come yet.
    pub(crate) fn new(Upload { length, pieces }: Upload, share: Share) -> Self {
        // It may be asked once more after its end.
        Self { length, come: Vec::new(), rest: pieces.fuse().boxed_local(), share }
    }

    /// Reads it to its end, until `until` at the latest.
    pub(crate) async fn whole(mut self, until: Instant) -> Result<Whole, NotWhole> {
        let is_known_to_be = is_too_long(self.length);
        while !is_known_to_be && self.come.len() <= limits::REQUEST_BODY_BYTES {
            let Ok(piece) = tokio::time::timeout_at(until, self.rest.next()).await else {
                return Err(NotWhole::Busy);
            };
            match piece {
                Some(Ok(bytes)) => {
                    if !self.share.hold(self.come.len() + bytes.len()) {
                        return Err(NotWhole::Busy);
                    }
                    self.come.extend_from_slice(&bytes);
                }
                Some(Err(code)) => return Err(NotWhole::Broken(code)),
                None => return Ok(Whole { bytes: self.come, _share: self.share }),
            }
        }
        Err(NotWhole::TooLong(self.into_upload()))
    }

    /// What has come, in pieces that can be let go one after the other, and then the rest.
    fn into_upload(self) -> Upload {
        let Self { length, come, rest, share } = self;
        let mut come = Bytes::from(come);
        let come = std::iter::from_fn(move || {
            // Held as long as any of it is.
            let _share = &share;
            let piece = come.split_to(come.len().min(limits::CHUNK_BYTES));
            (!piece.is_empty()).then_some(Ok(piece))
        });
        Upload { length, pieces: stream::iter(come).chain(rest).boxed_local() }
    }
}

/// A body that is passed on as it comes, with a copy of what has come for as long as there may be one.
pub(crate) struct Copied(RefCell<State>);

struct State {
    /// Nothing once it was taken back.
    body: Option<Begun>,
    is_copying: bool,
}

impl Copied {
    /// Takes a body that is to be passed on by [`Self::passed_on`].
    pub(crate) fn new(upload: Upload, share: Share) -> Rc<Self> {
        Rc::new(Self(RefCell::new(State { body: Some(Begun::new(upload, share)), is_copying: true })))
    }

    /// The body as it comes.
    pub(crate) fn passed_on(self: &Rc<Self>) -> Upload {
        let length = self.0.borrow().body.as_ref().and_then(|body| body.length);
        let own = Rc::clone(self);
        Upload { length, pieces: stream::poll_fn(move |cx| own.0.borrow_mut().poll(cx)).boxed_local() }
    }

    /// Takes the body back from whoever it was passed on to, who gets nothing more: not even its end. Nothing where there is
    /// no copy of what has come.
    pub(crate) fn take_back(&self) -> Option<Begun> {
        let mut state = self.0.borrow_mut();
        if state.is_copying { state.body.take() } else { None }
    }

    /// There is no further need of a copy.
    pub(crate) fn let_go(&self) {
        self.0.borrow_mut().let_go();
    }
}

impl State {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ErrorCode>>> {
        let Some(body) = &mut self.body else { return Poll::Pending };
        let piece = ready!(Pin::new(&mut body.rest).poll_next(cx));
        if let (true, Some(Ok(bytes))) = (self.is_copying, &piece) {
            let so_far = body.come.len() + bytes.len();
            if so_far <= limits::REQUEST_BODY_BYTES && body.share.hold(so_far) {
                body.come.extend_from_slice(bytes);
            } else {
                self.let_go();
            }
        }
        Poll::Ready(piece)
    }

    fn let_go(&mut self) {
        self.is_copying = false;
        if let Some(body) = &mut self.body {
            body.come = Vec::new();
            let _ = body.share.hold(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::sync::mpsc;

    use super::*;
    use crate::budget::{Budget, FREE_BYTES};

    fn upload(pieces: Vec<Vec<u8>>) -> Upload {
        let pieces = pieces.into_iter().map(|piece| Ok(Bytes::from(piece)));
        Upload { length: None, pieces: stream::iter(pieces).boxed_local() }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    async fn read(upload: Upload) -> Vec<u8> {
        upload.pieces.map(|piece| piece.unwrap().to_vec()).concat().await
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_had_as_a_whole_up_to_its_bound_and_lost_nowhere_beyond_it() {
        let budget = Budget::new(2 * limits::REQUEST_BODY_BYTES);
        let half = limits::REQUEST_BODY_BYTES / 2;
        let whole =
            Begun::new(upload(vec![vec![1; half], vec![2; half]]), budget.share()).whole(soon()).await;
        let Ok(whole) = whole else { panic!("it fits") };
        assert_eq!(whole.bytes, [vec![1; half], vec![2; half]].concat());
        // Held as long as it is there.
        assert!(!budget.share().hold(limits::REQUEST_BODY_BYTES + 2 * FREE_BYTES + 1));
        drop(whole);
        let pieces = vec![vec![1; half], vec![2; half], vec![3], vec![4; 10]];
        let all = pieces.concat();
        let Err(NotWhole::TooLong(long)) = Begun::new(upload(pieces), budget.share()).whole(soon()).await
        else {
            panic!("one past it")
        };
        assert!(read(long).await == all);
        assert!(budget.share().hold(2 * limits::REQUEST_BODY_BYTES + FREE_BYTES), "all was given back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_slow_or_broken_or_has_no_room_is_not_had() {
        let budget = Budget::new(10);
        let fits = Begun::new(upload(vec![vec![1; FREE_BYTES + 10]]), budget.share()).whole(soon()).await;
        assert!(fits.is_ok());
        drop(fits);
        let more = Begun::new(upload(vec![vec![1; FREE_BYTES + 11]]), budget.share()).whole(soon()).await;
        assert!(matches!(more, Err(NotWhole::Busy)));
        let (sender, mut pieces) = mpsc::unbounded_channel();
        sender.send(Ok(Bytes::from_static(b"a"))).unwrap();
        let slow =
            Upload { length: Some(2), pieces: stream::poll_fn(move |cx| pieces.poll_recv(cx)).boxed_local() };
        assert!(matches!(Begun::new(slow, budget.share()).whole(soon()).await, Err(NotWhole::Busy)));
        let pieces = stream::iter([Ok(Bytes::from_static(b"a")), Err(ErrorCode::BadRequest)]).boxed_local();
        let broken = Begun::new(Upload { length: None, pieces }, budget.share()).whole(soon()).await;
        assert!(matches!(broken, Err(NotWhole::Broken(ErrorCode::BadRequest))));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_passed_on_can_be_taken_back_with_all_that_has_come() {
        let budget = Budget::new(0);
        let copied = Copied::new(upload(vec![vec![1; 3], vec![2; 3], vec![3; 3]]), budget.share());
        let mut passed_on = copied.passed_on();
        assert_eq!(passed_on.pieces.next().await.unwrap().unwrap(), vec![1; 3]);
        let Ok(whole) = copied.take_back().unwrap().whole(soon()).await else { panic!("it fits") };
        assert_eq!(whole.bytes, [1, 1, 1, 2, 2, 2, 3, 3, 3]);
        // Who had it must not take it for whole.
        assert!(passed_on.pieces.next().now_or_never().is_none());
        assert!(copied.take_back().is_none());
        // Also where its end had been passed on already.
        let copied = Copied::new(upload(vec![vec![1; 3]]), budget.share());
        assert_eq!(read(copied.passed_on()).await, [1; 3]);
        let Ok(whole) = copied.take_back().unwrap().whole(soon()).await else { panic!("it fits") };
        assert_eq!(whole.bytes, [1; 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_passed_on_goes_on_where_there_is_no_room_for_a_copy() {
        for (room, pieces) in [
            (usize::MAX / 2, vec![vec![1; limits::REQUEST_BODY_BYTES], vec![2; 1], vec![3; 5]]),
            (10, vec![vec![1; FREE_BYTES + 10], vec![2; 1], vec![3; 5]]),
        ] {
            let (budget, all) = (Budget::new(room), pieces.concat());
            let copied = Copied::new(upload(pieces), budget.share());
            assert!(read(copied.passed_on()).await == all);
            assert!(copied.take_back().is_none());
            assert!(budget.share().hold(room), "nothing is held");
        }
    }
}
