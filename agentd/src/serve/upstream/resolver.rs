//! Names become addresses, by the system's own resolver and on few threads of its own.
//!
//! A look-up by the system cannot be called off, and with a dead name server it takes a minute. On the runtime's
//! threads for blocking calls, hanging look-ups of upstreams would add up until no more threads may be made,
//! and the edge's own name could not be looked up either. Here one name is looked up once at a time, whoever
//! asks, so that one tunnel holds one thread at the most.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{IpAddr, ToSocketAddrs as _},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

/// No more look-ups than this at a time. The unit allows 64 tasks in all.
const MAX_THREADS: usize = 16;

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
pub(super) struct Resolver(Arc<Shared>);

struct Shared {
    look_up: LookUp,
    max_threads: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    going_on: BTreeMap<Arc<str>, watch::Receiver<Outcome>>,
    queue: VecDeque<(Arc<str>, watch::Sender<Outcome>)>,
    threads: usize,
    idle: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does until there has been nothing to do for a while.
    fn work(&self) {
        let mut state = self.state();
        loop {
            let Some((name, report)) = state.queue.pop_front() else {
                state.idle += 1;
                let (mut woken, waited) =
                    self.work.wait_timeout(state, IDLE_THREAD).unwrap_or_else(PoisonError::into_inner);
                woken.idle -= 1;
                state = woken;
                if waited.timed_out() && state.queue.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            let outcome = (self.look_up)(&name)
                .map(Arc::from)
                .map_err(|error| Failure { kind: error.kind(), text: error.to_string().into() });
            state = self.state();
            state.going_on.remove(&name);
            report.send_replace(Some(outcome));
        }
    }
}

impl Resolver {
    /// The one that all upstreams share.
    pub(super) fn shared() -> &'static Self {
        static SHARED: LazyLock<Resolver> = LazyLock::new(|| Resolver::new(system, MAX_THREADS));
        &SHARED
    }

    fn new(look_up: LookUp, max_threads: usize) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { look_up, max_threads, state, work: Condvar::new() }))
    }

    /// The addresses of a name, in the order in which they are to be tried.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the look-up goes on for whoever asks next.
    pub(super) async fn look_up(&self, name: &str) -> io::Result<Arc<[IpAddr]>> {
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
        if state.idle <= state.queue.len() && state.threads < self.0.max_threads {
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
        state.queue.push_back((name, report));
        drop(state);
        self.0.work.notify_one();
        Ok(outcome)
    }
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

    fn look_up(name: &str) -> io::Result<Vec<IpAddr>> {
        if name.starts_with("hangs") {
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
        let resolver = Resolver::new(look_up, 2);
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
    async fn the_systems_resolver_is_asked() {
        let addresses = Resolver::shared().look_up("localhost").await.unwrap();
        assert!(!addresses.is_empty() && addresses.iter().all(IpAddr::is_loopback));
        assert!(Resolver::shared().look_up("no-such-name.invalid").await.is_err());
    }
}
