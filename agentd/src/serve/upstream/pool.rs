//! The idle connections of one upstream.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use hyper::client::conn::{http1, http2};
use tokio::{task::AbortHandle, time::Instant};

use super::{RequestBody, socket::Watch};

/// No more idle connections than this are kept for one upstream.
const MAX_IDLE: usize = 64;

/// How long a connection may be idle. Many servers close theirs sooner; that is noticed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// What sends requests on one connection.
pub(super) enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    task: AbortOnDrop,
    watch: Watch,
    since: Instant,
}

/// Ends the task that drives a connection, and so closes the connection.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Default)]
struct Contents {
    idle: VecDeque<Idle>,
    http2: Option<http2::SendRequest<RequestBody>>,
    swept: bool,
}

#[derive(Default)]
pub(super) struct Pool(Mutex<Contents>);

impl Pool {
    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is open, idle and quiet; the one used last first, so that few are kept.
    pub(super) fn take(self: &Arc<Self>) -> Option<Checkout> {
        let mut contents = self.contents();
        if let Some(sender) = &contents.http2 {
            if sender.is_ready() {
                return Some(Checkout { kind: Kind::Http2 { sender: Sender::Http2(sender.clone()) } });
            }
            contents.http2 = None;
        }
        while let Some(idle) = contents.idle.pop_back() {
            if idle.sender.is_ready() && idle.watch.is_quiet() {
                return Some(Checkout {
                    kind: Kind::Http1 {
                        sender: Sender::Http1(idle.sender),
                        task: idle.task,
                        watch: idle.watch,
                        pool: Arc::downgrade(self),
                    },
                });
            }
        }
        None
    }

    /// Takes charge of a new HTTP/1 connection, in use from now on.
    pub(super) fn check_out_http1(
        self: &Arc<Self>,
        sender: http1::SendRequest<RequestBody>,
        task: AbortHandle,
        watch: Watch,
    ) -> Checkout {
        Checkout {
            kind: Kind::Http1 {
                sender: Sender::Http1(sender),
                task: AbortOnDrop(task),
                watch,
                pool: Arc::downgrade(self),
            },
        }
    }

    /// Takes charge of a new HTTP/2 connection, which serves many requests at a time.
    pub(super) fn check_out_http2(self: &Arc<Self>, sender: http2::SendRequest<RequestBody>) -> Checkout {
        self.contents().http2 = Some(sender.clone());
        Checkout { kind: Kind::Http2 { sender: Sender::Http2(sender) } }
    }

    fn put(self: &Arc<Self>, idle: Idle) {
        let mut contents = self.contents();
        if contents.idle.len() >= MAX_IDLE {
            contents.idle.pop_front();
        }
        contents.idle.push_back(idle);
        if !contents.swept {
            contents.swept = true;
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }
}

/// Closes connections that were idle too long, until none is left.
async fn sweep(pool: Weak<Pool>) {
    loop {
        let next = {
            let Some(pool) = pool.upgrade() else { return };
            let mut contents = pool.contents();
            let now = Instant::now();
            contents.idle.retain(|idle| now < idle.since + IDLE_TIMEOUT && !idle.sender.is_closed());
            let Some(oldest) = contents.idle.iter().map(|idle| idle.since).min() else {
                contents.swept = false;
                return;
            };
            oldest + IDLE_TIMEOUT
        };
        tokio::time::sleep_until(next).await;
    }
}

enum Kind {
    Http1 { sender: Sender, task: AbortOnDrop, watch: Watch, pool: Weak<Pool> },
    Http2 { sender: Sender },
}

/// A connection in use. Dropped, an HTTP/1 connection is closed at once; a stream of an HTTP/2
/// connection is reset by whoever drops its response.
pub(super) struct Checkout {
    kind: Kind,
}

impl Checkout {
    pub(super) const fn sender(&mut self) -> &mut Sender {
        match &mut self.kind {
            Kind::Http1 { sender, .. } | Kind::Http2 { sender } => sender,
        }
    }

    /// Makes the connection available again: its response has been read to the end.
    pub(super) fn give_back(self) {
        if let Kind::Http1 { sender: Sender::Http1(sender), task, watch, pool } = self.kind
            && let Some(pool) = pool.upgrade()
            && !sender.is_closed()
        {
            pool.put(Idle { sender, task, watch, since: Instant::now() });
        }
    }
}
