//! The one mailbox of this process, shared out among its exchanges by request id.
//!
//! One long poll is under way as long as the process lives; while messages come faster than one poll brings them, a few
//! more. Each message goes to the exchange whose request it names, and news of a lost connection to all. What was
//! taken is deleted ten at a time, as in `exchange::inbox`.

use std::{cell::RefCell, collections::HashMap, rc::Rc, time::Duration};

use edge::{
    Error,
    mailbox::{BATCH, Lease, Letter},
    unix_now,
};
use exchange::{
    Services,
    inbox::{Inbox, Mail},
};
use futures_util::{FutureExt as _, StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use proto::{
    id::{MailboxId, RequestId},
    limits,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// The most long polls at the same time.
const POLLS: usize = 8;

/// How many messages of one exchange may wait to be taken: more than any window lets be under way.
const WAITING: usize = 512;

/// How long after a failed receive the next one begins.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How often it is looked whether the lease has to be renewed.
const LEASE_CHECK: Duration = Duration::from_secs(60);

/// What a long poll brought, and from which mailbox.
type Polled = (Rc<Inbox>, Result<Vec<Letter>, Error>);

/// A letter on the heap: a channel keeps room for 32 of its items, also while it is empty.
type Slots = RefCell<HashMap<String, mpsc::Sender<Box<Letter>>>>;

/// The mailbox of this process.
pub struct Postbox {
    services: Rc<Services>,
    inbox: RefCell<Rc<Inbox>>,
    slots: Slots,
}

/// The place of one exchange at the mailbox.
pub struct Slot {
    postbox: Rc<Postbox>,
    request_id: RequestId,
    mailbox: MailboxId,
    letters: RefCell<mpsc::Receiver<Box<Letter>>>,
    closing: CancellationToken,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.postbox.slots.borrow_mut().remove(self.request_id.as_str());
    }
}

impl Postbox {
    /// A mailbox under `lease`.
    #[must_use]
    pub fn new(services: Rc<Services>, lease: Lease) -> Rc<Self> {
        let inbox = RefCell::new(Rc::new(Inbox::new(lease)));
        Rc::new(Self { services, inbox, slots: RefCell::default() })
    }

    /// A place for the answers to `request_id`. Once `closing` is cancelled it gives no more.
    pub fn slot(self: &Rc<Self>, request_id: &RequestId, closing: CancellationToken) -> Slot {
        let (sender, letters) = mpsc::channel(WAITING);
        self.slots.borrow_mut().insert(request_id.as_str().to_owned(), sender);
        Slot {
            postbox: Rc::clone(self),
            request_id: request_id.clone(),
            mailbox: self.inbox.borrow().lease.mailbox.clone(),
            letters: RefCell::new(letters),
            closing,
        }
    }

    /// Receives until `end`.
    pub async fn run(self: Rc<Self>, end: CancellationToken) {
        let mut polls: FuturesUnordered<LocalBoxFuture<'_, Polled>> = FuturesUnordered::new();
        let mut deletions: FuturesUnordered<LocalBoxFuture<'_, ()>> = FuturesUnordered::new();
        let mut wanted = 1;
        let mut not_before = Instant::now();
        let mut check_at = Instant::now() + LEASE_CHECK;
        let mut tidy_at: Option<Instant> = None;
        loop {
            if self.inbox.borrow().lease.has_ended(unix_now()) {
                // Somebody else may read it by now.
                check_at = check_at.min(Instant::now() + AFTER_FAILURE);
                not_before = not_before.max(check_at);
            }
            while polls.len() < wanted && Instant::now() >= not_before && !end.is_cancelled() {
                let inbox = Rc::clone(&self.inbox.borrow());
                let mailboxes = self.services.pool.mailboxes();
                polls.push(
                    async move {
                        let letters = mailboxes.receive(&inbox.lease, limits::MAILBOX_WAIT, BATCH).await;
                        (inbox, letters)
                    }
                    .boxed_local(),
                );
            }
            tokio::select! {
                Some((inbox, letters)) = polls.next() => match letters {
                    Ok(letters) => {
                        wanted = match letters.len() {
                            BATCH.. => (wanted + 1).min(POLLS),
                            0..5 => (wanted - 1).max(1),
                            _ => wanted,
                        };
                        let mut receipts = Vec::with_capacity(letters.len());
                        for mut letter in letters {
                            receipts.push(std::mem::take(&mut letter.receipt));
                            self.hand_out(letter);
                        }
                        if !receipts.is_empty() {
                            tidy_at.get_or_insert(Instant::now() + limits::MAILBOX_DELETE_AFTER);
                        }
                        if let Some(full) = inbox.discard(receipts) {
                            let mailboxes = self.services.pool.mailboxes();
                            deletions.push(async move { inbox.delete(mailboxes, full).await }.boxed_local());
                        }
                    }
                    Err(error) => {
                        tracing::error!(%error, "mailbox could not be read");
                        wanted = 1;
                        not_before = Instant::now() + AFTER_FAILURE;
                    }
                },
                Some(()) = deletions.next() => {}
                () = sleep_until(not_before), if polls.is_empty() && !end.is_cancelled() => {}
                () = sleep_until(tidy_at.unwrap_or(check_at)), if tidy_at.is_some() => {
                    tidy_at = None;
                    let inbox = Rc::clone(&self.inbox.borrow());
                    let mailboxes = self.services.pool.mailboxes();
                    deletions.push(async move { inbox.flush(mailboxes).await }.boxed_local());
                }
                () = sleep_until(check_at) => {
                    self.keep_lease().await;
                    check_at = Instant::now() + LEASE_CHECK;
                }
                () = end.cancelled(), if !end.is_cancelled() => {}
                else => return,
            }
            if end.is_cancelled() && polls.is_empty() {
                return;
            }
        }
    }

    fn hand_out(&self, letter: Letter) {
        let slots = self.slots.borrow();
        if letter.lost_connection.is_some() {
            for slot in slots.values() {
                let _ = slot.try_send(Box::new(letter.clone()));
            }
            return;
        }
        // Without a place it is stale: its exchange is over.
        if let Some(slot) = letter.request_id.as_deref().and_then(|id| slots.get(id))
            && slot.try_send(Box::new(letter)).is_err()
        {
            tracing::warn!("an exchange's messages were more than it takes; it will miss one");
        }
    }

    async fn keep_lease(&self) {
        let pool = &self.services.pool;
        let lease = self.inbox.borrow().lease.clone();
        if pool.is_fresh(&lease, unix_now()) {
            return;
        }
        let kept = match pool.keep(&lease).await {
            Some(kept) if kept == lease => return,
            Some(kept) => Ok(kept),
            None => {
                tracing::error!(
                    "the mailbox has gone to somebody else, or may have; exchanges in flight are broken off"
                );
                self.slots.borrow_mut().clear();
                match crate::random() {
                    Ok(random) => pool.lease(&crate::holder(), random).await,
                    Err(_) => return,
                }
            }
        };
        match kept {
            Ok(lease) => {
                let renewed = Rc::new(Inbox::new(lease));
                let before = std::mem::replace(&mut *self.inbox.borrow_mut(), renewed);
                before.flush(pool.mailboxes()).await;
            }
            // The next look tries again; until then nothing is read.
            Err(error) => tracing::warn!(%error, "no mailbox was leased"),
        }
    }
}

impl Mail for Slot {
    fn mailbox(&self) -> &MailboxId {
        &self.mailbox
    }

    fn queue_url(&self) -> Option<&str> {
        None
    }

    /// # Cancel safety
    ///
    /// Cancel safe.
    #[expect(clippy::await_holding_refcell_ref, reason = "one exchange has one place and waits at it alone")]
    async fn receive(&self, wait: Duration) -> Result<Vec<Letter>, Error> {
        let mut letters = self.letters.borrow_mut();
        let first = tokio::select! {
            biased;
            first = tokio::time::timeout(wait, letters.recv()) => match first {
                Ok(first) => first,
                Err(_) => return Ok(Vec::new()),
            },
            () = self.closing.cancelled() => None,
        };
        let Some(first) = first else {
            return Err(Error::Refused { call: "ReceiveMessage", source: "this process ends".into() });
        };
        let mut taken = vec![*first];
        while let Ok(next) = letters.try_recv() {
            taken.push(*next);
        }
        Ok(taken)
    }

    fn discard(&self, _: Vec<String>) -> Option<Vec<String>> {
        None
    }

    async fn delete(&self, _: Vec<String>) {}
}
