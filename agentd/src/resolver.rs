//! Names become addresses, by the system's own resolver and on few threads of its own.
//!
//! A look-up by the system cannot be called off, and with a dead name server it takes a minute. On the runtime's
//! threads for blocking calls, hanging look-ups of upstreams would add up until no more threads may be made,
//! and neither the edge's own name nor a file could be looked up. Here one name is looked up once at a time, whoever
//! asks, so that one tunnel holds one thread at the most; names that were slow the last time get half of the
//! threads and no more; and the edge's name needs none of these threads.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::{IpAddr, ToSocketAddrs as _},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::apart::{Apart, NotBegun};

/// No more look-ups of upstreams than this at a time. The unit allows 64 tasks in all, of which the runtime has at most
/// 1 + [`BLOCKING_THREADS`].
const MAX_THREADS: usize = 32;

/// No more look-ups of the edge than this at a time: each of them has been given up but the last.
const MAX_EDGE_THREADS: usize = 6;

/// How many threads the runtime may make for files and the like.
pub(crate) const BLOCKING_THREADS: usize = 16;

/// A look-up that takes so long is slow: the system asks a name server again after five seconds, and a live one answers
/// within this.
const SLOW: Duration = Duration::from_secs(2);

/// A thread with nothing to do ends after this.
const IDLE_THREAD: Duration = Duration::from_secs(10);

/// What a look-up came to; `None` while it goes on.
type Outcome = Option<Result<Arc<[IpAddr]>, Failure>>;

#[derive(Debug, Clone)]
struct Failure {
    kind: io::ErrorKind,
    text: Arc<str>,
}

/// How a name is looked up.
type LookUp = fn(&str) -> io::Result<Vec<IpAddr>>;

/// The look-ups of this process.
pub(crate) struct Resolver(Arc<Shared>);

/// A name somebody asks for, and where to say what it came to.
type Asked = (Arc<str>, watch::Sender<Outcome>);

struct Shared {
    look_up: LookUp,
    max_threads: usize,
    slow: Duration,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    going_on: BTreeMap<Arc<str>, watch::Receiver<Outcome>>,
    queue: VecDeque<Asked>,
    /// Those of which the last look-up was slow, in a queue of their own.
    slow: BTreeSet<Arc<str>>,
    slow_queue: VecDeque<Asked>,
    slow_threads: usize,
    threads: usize,
    idle: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const fn max_slow_threads(&self) -> usize {
        self.max_threads.div_ceil(2)
    }

    /// The next name that a thread is to look up, and whether it is one of the slow ones.
    fn next(&self, state: &mut State) -> Option<(Asked, bool)> {
        loop {
            let next = match state.queue.pop_front() {
                Some(asked) => (asked, false),
                None if state.slow_threads < self.max_slow_threads() => (state.slow_queue.pop_front()?, true),
                None => return None,
            };
            let (name, report) = &next.0;
            // One receiver is kept for whoever asks next. Nobody waits any more: the threads have better to do.
            if report.receiver_count() <= 1 {
                state.going_on.remove(name);
                continue;
            }
            state.slow_threads += usize::from(next.1);
            return Some(next);
        }
    }

    /// What a thread does until there has been nothing to do for a while.
    fn work(&self) {
        let mut state = self.state();
        loop {
            let Some(((name, report), was_slow)) = self.next(&mut state) else {
                state.idle += 1;
                let (mut woken, waited) =
                    self.work.wait_timeout(state, IDLE_THREAD).unwrap_or_else(PoisonError::into_inner);
                woken.idle -= 1;
                state = woken;
                if waited.timed_out() && state.queue.is_empty() && state.slow_queue.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            let began = Instant::now();
            let outcome = (self.look_up)(&name)
                .map(Arc::from)
                .map_err(|error| Failure { kind: error.kind(), text: error.to_string().into() });
            let is_slow = began.elapsed() >= self.slow;
            state = self.state();
            state.slow_threads -= usize::from(was_slow);
            state.going_on.remove(&name);
            if is_slow {
                state.slow.insert(name);
            } else {
                state.slow.remove(&name);
            }
            report.send_replace(Some(outcome));
        }
    }
}

impl Resolver {
    /// The one that all upstreams share.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: LazyLock<Resolver> = LazyLock::new(|| Resolver::new(system, MAX_THREADS, SLOW));
        &SHARED
    }

    fn new(look_up: LookUp, max_threads: usize, slow: Duration) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { look_up, max_threads, slow, state, work: Condvar::new() }))
    }

    /// The addresses of a name, in the order in which they are to be tried.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the look-up goes on for whoever asks next.
    pub(crate) async fn look_up(&self, name: &str) -> io::Result<Arc<[IpAddr]>> {
        let mut outcome = self.begin(name)?;
        let outcome = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        match outcome {
            Some(Ok(addresses)) => Ok(addresses),
            Some(Err(Failure { kind, text })) => Err(io::Error::new(kind, String::from(&*text))),
            None => Err(io::Error::other("the look-up broke off")),
        }
    }

    fn begin(&self, name: &str) -> io::Result<watch::Receiver<Outcome>> {
        let mut state = self.0.state();
        if let Some(going_on) = state.going_on.get(name) {
            return Ok(going_on.clone());
        }
        let is_slow = state.slow.contains(name);
        if state.idle <= state.queue.len() + state.slow_queue.len() && state.threads < self.0.max_threads {
            let shared = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("resolver".to_owned());
            match thread.spawn(move || shared.work()) {
                Ok(_) => state.threads += 1,
                // One of those that run will come to it.
                Err(_) if state.threads > 0 => {}
                Err(error) => return Err(error),
            }
        }
        let (report, outcome) = watch::channel(None);
        let name: Arc<str> = name.into();
        state.going_on.insert(Arc::clone(&name), outcome.clone());
        if is_slow {
            state.slow_queue.push_back((name, report));
        } else {
            state.queue.push_back((name, report));
        }
        drop(state);
        self.0.work.notify_one();
        Ok(outcome)
    }
}

/// The addresses of the edge's name, whatever else is being looked up: on a thread for this one time, so that a look-up
/// that hangs since the network changed is nobody's to wait for.
///
/// # Errors
///
/// The system's; and where [`MAX_EDGE_THREADS`] look-ups hang already.
pub(crate) async fn look_up_edge(name: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(ip) = name.parse() {
        return Ok(vec![ip]);
    }
    static LOOK_UPS: LazyLock<Apart> = LazyLock::new(|| Apart::new("resolver-edge", MAX_EDGE_THREADS));
    let name = name.to_owned();
    let outcome = LOOK_UPS.begin(move || system(&name)).map_err(|error| match error {
        NotBegun::Hanging => io::Error::new(
            io::ErrorKind::TimedOut,
            "the name server does not answer, and earlier look-ups still wait for it",
        ),
        NotBegun::System(error) => error,
    })?;
    outcome.await.unwrap_or_else(|_| Err(io::Error::other("the look-up broke off")))
}

fn system(name: &str) -> io::Result<Vec<IpAddr>> {
    // The port is nobody's business here.
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in (name, 0).to_socket_addrs()? {
        if !addresses.contains(&address.ip()) {
            addresses.push(address.ip());
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Names that hang until the test lets go of them.
    static HANGING: Mutex<Vec<mpsc::Receiver<()>>> = Mutex::new(Vec::new());

    static HANGING_SLOWLY: Mutex<Vec<mpsc::Receiver<()>>> = Mutex::new(Vec::new());

    fn look_up(name: &str) -> io::Result<Vec<IpAddr>> {
        if name.starts_with("hangs-") {
            let hang = HANGING_SLOWLY.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let _ = hang.map(|hang| hang.recv());
        } else if name.starts_with("hangs") {
            let hang = HANGING.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let _ = hang.map(|hang| hang.recv());
        }
        if name == "none" {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such name"));
        }
        Ok(vec![[127, 0, 0, 1].into()])
    }

    #[tokio::test]
    async fn a_name_that_hangs_holds_one_thread_however_often_it_is_asked_for() {
        let (let_go, hang) = mpsc::channel();
        HANGING.lock().unwrap().push(hang);
        let resolver = Resolver::new(look_up, 2, SLOW);
        for _ in 0..50 {
            let mut asked = Box::pin(resolver.look_up("hangs"));
            assert!(futures_util::FutureExt::now_or_never(&mut asked).is_none());
        }
        assert_eq!(*resolver.look_up("fine").await.unwrap(), [IpAddr::from([127, 0, 0, 1])]);
        let error = resolver.look_up("none").await.unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (io::ErrorKind::NotFound, "no such name".to_owned()));
        assert!(resolver.0.state().threads <= 2);
        drop(let_go);
        assert!(resolver.look_up("hangs").await.is_ok());
        assert!(resolver.0.state().going_on.is_empty());
    }

    #[tokio::test]
    async fn names_that_were_slow_leave_threads_to_the_others() {
        // Everything is slow, so that a name is known as slow once it has been looked up.
        let resolver = Resolver::new(look_up, 4, Duration::ZERO);
        let names = ["hangs-a", "hangs-b", "hangs-c", "hangs-d", "hangs-e"];
        for name in names {
            resolver.look_up(name).await.unwrap();
        }
        let (let_go, hang): (Vec<_>, Vec<_>) = names.iter().map(|_| mpsc::channel()).unzip();
        HANGING_SLOWLY.lock().unwrap().extend(hang);
        let mut asked: Vec<_> = names.iter().map(|name| Box::pin(resolver.look_up(name))).collect();
        for asked in &mut asked {
            assert!(futures_util::FutureExt::now_or_never(asked).is_none());
        }
        // Two of four threads hang, at the most; those that are new go by.
        for name in ["fine-a", "fine-b", "fine-c"] {
            resolver.look_up(name).await.unwrap();
        }
        assert!(resolver.0.state().slow_threads <= 2);
        // Whom nobody waits for any more is not looked up.
        drop(asked.pop());
        drop(let_go);
        for asked in asked {
            asked.await.unwrap();
        }
        assert!(resolver.0.state().going_on.is_empty() && resolver.0.state().slow_threads == 0);
    }

    #[tokio::test]
    async fn the_edge_is_looked_up_apart() {
        assert_eq!(look_up_edge("192.0.2.1").await.unwrap(), [IpAddr::from([192, 0, 2, 1])]);
        assert_eq!(look_up_edge("2001:db8::1").await.unwrap(), ["2001:db8::1".parse::<IpAddr>().unwrap()]);
        assert!(look_up_edge("localhost").await.unwrap().iter().all(IpAddr::is_loopback));
        assert!(look_up_edge("no-such-name.invalid").await.is_err());
    }

    #[tokio::test]
    async fn the_systems_resolver_is_asked() {
        let addresses = Resolver::shared().look_up("localhost").await.unwrap();
        assert!(!addresses.is_empty() && addresses.iter().all(IpAddr::is_loopback));
        assert!(Resolver::shared().look_up("no-such-name.invalid").await.is_err());
    }
}
