//! The connections of one upstream that may be used again.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderName};
use hyper::client::conn::http1;
use tokio::{
    task::AbortHandle,
    time::{Instant, timeout},
};

use super::{RequestBody, http2, socket::Watch};
use crate::config::address::Address;

/// No more idle connections than this are kept for one upstream.
const MAX_IDLE: usize = 64;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// The first request of a connection that has no answer after this may be waiting for an idle connection to go: there
/// are servers that serve one connection at a time, in the order in which they came.
pub(super) const STARVED_AFTER: Duration = Duration::from_millis(100);

/// Where HTTP/2 may be spoken, whoever needs a connection waits so long for one that is being opened.
const TURN_WITHIN: Duration = Duration::from_secs(1);

struct Idle {
    connection: Connection,
    until: Instant,
}

/// An HTTP/1 connection.
struct Connection {
    sender: http1::SendRequest<RequestBody>,
    _task: AbortOnDrop,
    watch: Watch,
    /// Counts all connections of this process in the order in which they were opened.
    number: u64,
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
    http2: Vec<Arc<http2::Connection>>,
    /// The connections whose first request waits for long.
    starving: BTreeSet<u64>,
    swept: bool,
}

pub(super) struct Pool {
    address: Address,
    /// How long a connection may be idle; `None` if none is used twice.
    keep_alive: Option<Duration>,
    contents: Mutex<Contents>,
    /// Whether it was HTTP/1 that the last connection spoke.
    speaks_http1: AtomicBool,
    dialling: tokio::sync::Mutex<()>,
}

/// The pools of this process: an idle connection of one tunnel may be what another tunnel waits for.
static POOLS: Mutex<Vec<Weak<Pool>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of the next connection.
pub(super) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Pool {
    pub(super) fn new(address: Address, keep_alive: Option<Duration>) -> Arc<Self> {
        let pool = Arc::new(Self {
            address,
            keep_alive,
            contents: Mutex::default(),
            speaks_http1: AtomicBool::new(false),
            dialling: tokio::sync::Mutex::default(),
        });
        let mut pools = lock(&POOLS);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(&pool));
        pool
    }

    /// Whether connections are used more than once.
    pub(super) const fn keeps(&self) -> bool {
        self.keep_alive.is_some()
    }

    /// An HTTP/1 connection that is open, idle and quiet; the one used last first, so that few are kept.
    pub(super) fn take(self: &Arc<Self>) -> Option<Checkout> {
        let mut contents = lock(&self.contents);
        while let Some(Idle { connection, until }) = contents.idle.pop_back() {
            if connection.sender.is_ready() && connection.watch.is_quiet() && Instant::now() < until {
                return Some(Checkout { connection, pool: Arc::downgrade(self), promised: None });
            }
        }
        None
    }

    /// A stream of an HTTP/2 connection that has one left.
    pub(super) fn enter_http2(&self) -> Option<http2::Lease> {
        let mut contents = lock(&self.contents);
        if contents.http2.is_empty() {
            return None;
        }
        contents.http2.retain(|connection| connection.is_open());
        contents.http2.iter().find_map(http2::Connection::enter)
    }

    /// Waits while somebody else opens a connection that may do for both.
    pub(super) async fn turn(&self) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        if self.speaks_http1.load(Ordering::Relaxed) {
            return None;
        }
        timeout(TURN_WITHIN, self.dialling.lock()).await.ok()
    }

    /// Takes charge of a new HTTP/1 connection, in use from now on.
    pub(super) fn check_out_http1(
        self: &Arc<Self>,
        sender: http1::SendRequest<RequestBody>,
        task: AbortHandle,
        watch: Watch,
        number: u64,
    ) -> Checkout {
        self.speaks_http1.store(true, Ordering::Relaxed);
        let connection = Connection { sender, _task: AbortOnDrop(task), watch, number };
        Checkout { connection, pool: Arc::downgrade(self), promised: None }
    }

    /// Takes charge of a new HTTP/2 connection, which serves many requests at a time.
    pub(super) fn add_http2(self: &Arc<Self>, connection: &Arc<http2::Connection>) {
        self.speaks_http1.store(false, Ordering::Relaxed);
        if self.keeps() {
            let mut contents = lock(&self.contents);
            contents.http2.push(Arc::clone(connection));
            self.sweep(&mut contents);
        }
    }

    fn put(self: &Arc<Self>, connection: Connection, promised: Option<Duration>) {
        let Some(keep_alive) = self.keep_alive else { return };
        let keep_alive = promised.map_or(keep_alive, |promised| promised.min(keep_alive));
        let mut contents = lock(&self.contents);
        if keep_alive.is_zero() || contents.starving.range(connection.number..).next().is_some() {
            return;
        }
        if contents.idle.len() >= MAX_IDLE {
            contents.idle.pop_front();
        }
        contents.idle.push_back(Idle { connection, until: Instant::now() + keep_alive });
        self.sweep(&mut contents);
    }

    fn sweep(self: &Arc<Self>, contents: &mut Contents) {
        if !contents.swept {
            contents.swept = true;
            tokio::spawn(sweep(Arc::downgrade(self), self.keep_alive.unwrap_or_default()));
        }
    }
}

/// Closes connections that were idle too long, until none is left.
async fn sweep(pool: Weak<Pool>, keep_alive: Duration) {
    loop {
        let next = {
            let Some(pool) = pool.upgrade() else { return };
            let mut contents = lock(&pool.contents);
            let now = Instant::now();
            contents.idle.retain(|idle| now < idle.until && !idle.connection.sender.is_closed());
            contents.http2.retain(|connection| {
                connection.is_open() && connection.idle_since().is_none_or(|since| now < since + keep_alive)
            });
            let next_http2 =
                contents.http2.iter().map(|connection| connection.idle_since().unwrap_or(now) + keep_alive);
            let Some(next) = contents.idle.iter().map(|idle| idle.until).chain(next_http2).min() else {
                contents.swept = false;
                return;
            };
            next
        };
        tokio::time::sleep_until(next).await;
    }
}

/// Closes every idle connection of this process: somebody needs their descriptors.
pub(super) fn close_idle() {
    let pools: Vec<Arc<Pool>> = lock(&POOLS).iter().filter_map(Weak::upgrade).collect();
    for pool in pools {
        let mut contents = lock(&pool.contents);
        contents.idle.clear();
        contents.http2.retain(|connection| connection.idle_since().is_none());
    }
}

/// While it lasts, no connection that was opened before the starving one is idle.
pub(super) struct Starving {
    pools: Vec<Weak<Pool>>,
    number: u64,
}

/// Notes that the first request on the connection `number` waits.
pub(super) fn starve(address: &Address, number: u64) -> Starving {
    let pools: Vec<Arc<Pool>> = lock(&POOLS).iter().filter_map(Weak::upgrade).collect();
    let concerned = pools.into_iter().filter(|pool| pool.address == *address);
    let pools = concerned
        .map(|pool| {
            let mut contents = lock(&pool.contents);
            contents.starving.insert(number);
            contents.idle.retain(|idle| idle.connection.number > number);
            drop(contents);
            Arc::downgrade(&pool)
        })
        .collect();
    Starving { pools, number }
}

impl Drop for Starving {
    fn drop(&mut self) {
        for pool in self.pools.iter().filter_map(Weak::upgrade) {
            lock(&pool.contents).starving.remove(&self.number);
        }
    }
}

/// An HTTP/1 connection in use. Dropped, it is closed at once.
pub(super) struct Checkout {
    connection: Connection,
    pool: Weak<Pool>,
    /// How long the upstream says that it keeps the connection.
    promised: Option<Duration>,
}

impl Checkout {
    pub(super) const fn sender(&mut self) -> &mut http1::SendRequest<RequestBody> {
        &mut self.connection.sender
    }

    /// The number of the connection.
    pub(super) const fn number(&self) -> u64 {
        self.connection.number
    }

    /// Notes what a response says about its connection.
    pub(super) fn read(&mut self, headers: &HeaderMap) {
        if let Some(value) = headers.get(KEEP_ALIVE) {
            self.promised = promised(value.as_bytes());
        }
    }

    /// Makes the connection available again: its response has been read to the end.
    pub(super) fn give_back(self) {
        if let Some(pool) = self.pool.upgrade()
            && !self.connection.sender.is_closed()
        {
            pool.put(self.connection, self.promised);
        }
    }
}

/// What `Keep-Alive: timeout=5` promises, less what a request may need to arrive: a server that closes at the same moment
/// has not seen it.
fn promised(value: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?;
    let seconds = text.split(',').find_map(|part| {
        let (name, seconds) = part.split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("timeout")
            .then(|| seconds.trim().trim_matches('"').parse::<u32>().ok())?
    })?;
    let promised = Duration::from_secs(seconds.into());
    Some(promised.saturating_sub(Duration::from_secs(1)).max(promised / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_read_with_a_margin() {
        let of = |text: &str| promised(text.as_bytes()).map(|promised| promised.as_millis());
        assert_eq!(of("timeout=5, max=100"), Some(4_000));
        assert_eq!(of("max=100, Timeout = \"75\""), Some(74_000));
        assert_eq!(of("timeout=1"), Some(500));
        assert_eq!(of("timeout=0"), Some(0));
        for nothing in ["", "max=5", "timeout=x", "timeout=-1", "timeout"] {
            assert_eq!(of(nothing), None, "{nothing}");
        }
    }
}
