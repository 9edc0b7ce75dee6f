//! The mailbox of a process that serves one exchange at a time, and what was taken out of it and is still to be deleted there.
//!
//! Ten deletions are one call and are billed as one, and nothing waits for them: a message that was
//! received is hidden from everybody for [`limits::MAILBOX_VISIBILITY`]. So receipts are kept, also from
//! one request to the next, until there are ten of them or [`limits::MAILBOX_DELETE_AFTER`] has passed. While Lambda
//! has this process frozen nothing is deleted; the next request begins with it. What is left when the
//! process ends goes with [`limits::MAILBOX_RETENTION`], before the lease of the mailbox ends. A message that shows
//! up again all the same is stale: the run and [`crate::http`] know it by its request id.

use std::{
    cell::{Cell, RefCell},
    pin::pin,
    time::Duration,
};

use edge::{
    Error,
    mailbox::{BATCH, Lease, Letter, Mailboxes, Pool},
    unix_now, unix_now_ms,
};
use proto::{id::MailboxId, limits};

/// Where the answers for one exchange come from.
pub trait Mail {
    /// The mailbox that task tokens name.
    fn mailbox(&self) -> &MailboxId;

    /// Its queue, where the run is to wait there; `None` where the mailbox is shared and the run must not.
    fn queue_url(&self) -> Option<&str>;

    /// Takes what is there, waiting up to `wait` for something. To be awaited to its end.
    fn receive(&self, wait: Duration) -> impl Future<Output = Result<Vec<Letter>, Error>>;

    /// Notes that a run may be waiting at its queue that nobody will hear of again: it would take what is for later
    /// exchanges. Where no run waits there, there is nothing to note.
    fn contend(&self) {}

    /// Notes messages that are to be deleted. Returns those that are to be deleted now.
    fn discard(&self, receipts: Vec<String>) -> Option<Vec<String>>;

    /// Deletes messages.
    fn delete(&self, receipts: Vec<String>) -> impl Future<Output = ()>;
}

/// A mailbox of one's own, for the time of one exchange.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    /// The mailbox.
    pub inbox: &'a Inbox,
    /// All of them.
    pub mailboxes: &'a Mailboxes,
}

impl Mail for Own<'_> {
    fn mailbox(&self) -> &MailboxId {
        &self.inbox.lease.mailbox
    }

    fn queue_url(&self) -> Option<&str> {
        Some(&self.inbox.lease.queue_url)
    }

    async fn receive(&self, wait: Duration) -> Result<Vec<Letter>, Error> {
        let letters = self.mailboxes.receive(&self.inbox.lease, wait, self.inbox.most.get()).await?;
        self.inbox.most.set(most_after(&letters, self.inbox.most.get()));
        Ok(letters)
    }

    fn contend(&self) {
        self.inbox.contended.set(true);
    }

    fn discard(&self, receipts: Vec<String>) -> Option<Vec<String>> {
        self.inbox.discard(receipts)
    }

    fn delete(&self, receipts: Vec<String>) -> impl Future<Output = ()> {
        self.inbox.delete(self.mailboxes, receipts)
    }
}

/// A leased mailbox.
#[derive(Debug)]
pub struct Inbox {
    /// Its lease.
    pub lease: Lease,
    taken: RefCell<Taken>,
    /// How many messages the next receive takes.
    most: Cell<usize>,
    /// Whether somebody else may read it.
    contended: Cell<bool>,
}

/// How long messages that come with one receive may be together, if the next are as long as those before: all of them are
/// held several times over while they are read. A queue's calls are billed by each 64 KB, so that fewer at a time cost
/// nothing.
const RECEIVED_BYTES: usize = 512 * 1024;

/// How many messages to take next, after these; `before` where there were none.
fn most_after(letters: &[Letter], before: usize) -> usize {
    let longest = letters.iter().map(|letter| letter.body.len().max(1)).max();
    longest.map_or(before, |longest| (RECEIVED_BYTES / longest).clamp(1, BATCH))
}

impl Inbox {
    /// A mailbox out of which nothing was taken yet.
    #[must_use]
    pub fn new(lease: Lease) -> Self {
        Self { lease, taken: RefCell::default(), most: Cell::new(BATCH), contended: Cell::new(false) }
    }

    /// The same mailbox under a renewed lease, or another one, whose messages have other receipts.
    #[must_use]
    pub fn renewed(self, lease: Lease) -> Self {
        if lease.mailbox == self.lease.mailbox { Self { lease, ..self } } else { Self::new(lease) }
    }

    /// The same mailbox with a lease that outlives a request that begins now, or another one where it has gone
    /// to somebody else, or may have, or a run may still read it. `random` is for a new lease.
    ///
    /// # Errors
    ///
    /// [`Error`] when no mailbox can be had any more.
    pub async fn keep(self, pool: &Pool, holder: &str, random: [u8; 16]) -> Result<Self, Error> {
        if self.contended.get() {
            // Its lease is left to end, which it does after that run (`limits::RUN_DURATION`).
            return Ok(Self::new(pool.lease(holder, random).await?));
        }
        if pool.is_fresh(&self.lease, unix_now()) {
            return Ok(self);
        }
        let lease = match pool.keep(&self.lease).await {
            Some(kept) => kept,
            None => pool.lease(holder, random).await?,
        };
        Ok(self.renewed(lease))
    }

    /// Notes messages that are to be deleted. Returns those that are to be deleted now.
    #[must_use]
    pub fn discard(&self, receipts: impl IntoIterator<Item = String>) -> Option<Vec<String>> {
        self.taken.borrow_mut().add(receipts, unix_now_ms())
    }

    /// Deletes messages. One that stays is stale when it shows up again.
    pub async fn delete(&self, mailboxes: &Mailboxes, receipts: Vec<String>) {
        if let Err(error) = mailboxes.delete(&self.lease, receipts).await {
            tracing::warn!(%error, "mailbox messages were not deleted; they will be discarded as stale");
        }
    }

    /// Deletes what is still to be deleted.
    pub async fn flush(&self, mailboxes: &Mailboxes) {
        let receipts = self.taken.borrow_mut().take();
        if !receipts.is_empty() {
            self.delete(mailboxes, receipts).await;
        }
    }

    /// Does `work`, and meanwhile deletes what would soon be visible again.
    pub async fn tidy_beside<T>(&self, mailboxes: &Mailboxes, work: impl Future<Output = T>) -> T {
        tidy_beside(&self.taken, |receipts| self.delete(mailboxes, receipts), work).await
    }
}

async fn tidy_beside<T, D: Future<Output = ()>>(
    taken: &RefCell<Taken>,
    delete: impl Fn(Vec<String>) -> D,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    loop {
        // The work may take something out at any time: that is not due before this either.
        let left = taken.borrow().left(unix_now_ms()).unwrap_or(limits::MAILBOX_DELETE_AFTER);
        if !left.is_zero() {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = tokio::time::sleep(left) => continue,
            }
        }
        let receipts = taken.borrow_mut().take();
        let mut deleting = pin!(delete(receipts));
        tokio::select! {
            // Before the work receives it once more.
            biased;
            () = &mut deleting => {}
            done = &mut work => {
                // Frozen in the middle, it would fail.
                deleting.await;
                return done;
            }
        }
    }
}

/// Receipts of messages to be deleted. Pure.
#[derive(Debug, Default)]
struct Taken {
    receipts: Vec<String>,
    /// When the first of them was taken, by the clock on the wall: the other one may stand still while
    /// this process is frozen.
    since_ms: u64,
}

impl Taken {
    /// Adds receipts. Returns as many as one call deletes, once there are so many.
    fn add(&mut self, receipts: impl IntoIterator<Item = String>, now_ms: u64) -> Option<Vec<String>> {
        if self.receipts.is_empty() {
            self.since_ms = now_ms;
        }
        self.receipts.extend(receipts);
        (self.receipts.len() >= BATCH).then(|| self.receipts.drain(..BATCH).collect())
    }

    /// How long until they have to be deleted; `None` where there are none.
    fn left(&self, now_ms: u64) -> Option<Duration> {
        let age = Duration::from_millis(now_ms.saturating_sub(self.since_ms));
        (!self.receipts.is_empty()).then(|| limits::MAILBOX_DELETE_AFTER.saturating_sub(age))
    }

    fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.receipts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipts(count: usize) -> impl Iterator<Item = String> {
        (0..count).map(|number| number.to_string())
    }

    #[test]
    fn ten_are_one_call_and_what_is_over_waits() {
        let mut taken = Taken::default();
        assert_eq!(taken.add(receipts(BATCH - 1), 0), None);
        assert_eq!(taken.add(receipts(1), 0).unwrap().len(), BATCH);
        assert_eq!(taken.left(0), None, "nothing is left");
        assert_eq!(taken.add(receipts(BATCH - 1), 0), None);
        assert_eq!(taken.add(receipts(BATCH), 0).unwrap().len(), BATCH);
        assert_eq!(taken.take().len(), BATCH - 1);
        assert!(taken.take().is_empty());
    }

    #[test]
    fn after_long_messages_fewer_are_taken() {
        let letter = |bytes| Letter {
            receipt: String::new(),
            request_id: None,
            connection_id: None,
            owner: None,
            lost_connection: None,
            sent_ms: None,
            body: "x".repeat(bytes),
        };
        assert_eq!(most_after(&[], 7), 7);
        assert_eq!(most_after(&[letter(0)], 1), BATCH);
        assert_eq!(most_after(&[letter(200), letter(limits::MESSAGE_BYTES)], BATCH), 4);
        assert_eq!(most_after(&[letter(limits::MAILBOX_MESSAGE_BYTES)], BATCH), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_late_is_deleted_before_the_work_begins() {
        let order = RefCell::new(Vec::new());
        let taken = RefCell::<Taken>::default();
        // From long ago: Lambda had this process frozen since.
        let _ = taken.borrow_mut().add(receipts(3), 0);
        let delete = async |receipts: Vec<String>| {
            order.borrow_mut().push(receipts.len());
            tokio::time::sleep(Duration::from_secs(1)).await;
            order.borrow_mut().push(0);
        };
        tidy_beside(&taken, delete, async { order.borrow_mut().push(100) }).await;
        assert_eq!(order.into_inner(), [3, 100, 0], "the work waits for no answer, but its end does");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_late_is_kept_for_the_next_request() {
        let taken = RefCell::<Taken>::default();
        let nothing = async |_| panic!("nothing is late");
        let work = async {
            let _ = taken.borrow_mut().add(receipts(3), unix_now_ms());
        };
        tidy_beside(&taken, nothing, work).await;
        assert_eq!(taken.into_inner().take().len(), 3);
    }

    #[test]
    fn the_first_decides_when_all_are_due() {
        let after = limits::MAILBOX_DELETE_AFTER;
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap();
        let mut taken = Taken::default();
        let _ = taken.add(receipts(1), 1000);
        let _ = taken.add(receipts(1), 1000 + ms(after) - 1);
        assert_eq!(taken.left(1000), Some(after));
        assert_eq!(taken.left(1000 + ms(after) - 1), Some(Duration::from_millis(1)));
        assert_eq!(taken.left(1000 + ms(after) * 100), Some(Duration::ZERO));
        // A clock that was set back makes nothing due and panics nowhere.
        assert_eq!(taken.left(0), Some(after));
    }
}
