//! Passwords (`basic_auth`): the `Basic` scheme of RFC 7617 against a file of slow hashes.
//!
//! A right password is hashed once; from then on a keyed hash of it is found in memory. What is not in memory
//! waits for one of few threads that hash, one at a time for each address and only so many in all: guessing slows
//! nobody who is known, and an address that guesses wrong too often is not listened to for a while.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::header;
use proto::header::Headers;
use tokio::{
    sync::{Semaphore, oneshot},
    time::Instant,
};

use crate::config::htpasswd::Users;

/// How many users' passwords are remembered.
const MOST_KNOWN: usize = 4096;

/// How many addresses are remembered that guessed wrong. Beyond it the one whose time began first is forgotten.
const MOST_ADDRESSES: usize = 4096;

/// How often an address may guess wrong within [`WINDOW`].
const MOST_FAILURES: u32 = 10;

/// How long wrong guesses count.
const WINDOW: Duration = Duration::from_secs(60);

/// How many passwords of all tunnels wait to be hashed. At 60 ms each the last one waits for two seconds.
const MOST_WAITING: usize = 32;

/// How many requests of one address wait for their turn.
const MOST_WAITING_OF_ADDRESS: usize = 16;

/// No password is longer: it would be hashed all the same.
const MOST_PASSWORD_BYTES: usize = 1024;

/// What became of a visitor's password.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// It is right; whose it is.
    User(Arc<str>),
    /// There is none, or it is wrong.
    Wrong,
    /// Not looked at: wrong too often, or too much at once. Ask again after this long.
    Busy(Duration),
}

/// The users of one tunnel, and what is known of who asked.
pub(crate) struct Passwords {
    users: Arc<Users>,
    key: hmac::Key,
    known: Mutex<Known>,
    addresses: Arc<Mutex<Addresses>>,
}

/// Passwords that were right, as keyed hashes.
#[derive(Default)]
struct Known {
    users: HashMap<[u8; 32], Arc<str>>,
    order: VecDeque<[u8; 32]>,
}

/// Addresses that ask, or asked in vain.
#[derive(Default)]
struct Addresses {
    by_address: HashMap<IpAddr, Asking>,
    order: VecDeque<(IpAddr, Instant)>,
}

struct Asking {
    since: Instant,
    failures: u32,
    /// One: a password of it is hashed at a time. A browser that comes with several requests at once finds the
    /// others' in memory then.
    turns: Arc<Semaphore>,
    waiting: usize,
}

/// A password that is hashed elsewhere.
struct Guess {
    users: Arc<Users>,
    name: Box<str>,
    password: Box<[u8]>,
    answer: oneshot::Sender<bool>,
}

/// A place in the queue of an address.
struct Waiting {
    addresses: Arc<Mutex<Addresses>>,
    ip: IpAddr,
    turns: Arc<Semaphore>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(asking) = lock(&self.addresses).by_address.get_mut(&self.ip) {
            asking.waiting = asking.waiting.saturating_sub(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Passwords {
    /// Nobody is known yet.
    pub(crate) fn new(users: &Users) -> Self {
        let mut secret = [0; 32];
        let key = aws_lc_rs::rand::fill(&mut secret).map(|()| hmac::Key::new(hmac::HMAC_SHA256, &secret));
        Self {
            users: Arc::new(users.clone()),
            key: key.expect("the system has randomness: TLS does without it no more than this"),
            known: Mutex::default(),
            addresses: Arc::default(),
        }
    }

    /// Whose password a request shows, if that can be said without hashing.
    #[cfg(test)]
    fn known(&self, headers: &Headers) -> Option<Arc<str>> {
        let credentials = credentials(headers)?;
        lock(&self.known).users.get(&self.mark(&credentials)).cloned()
    }

    /// Whose password a request from `ip` shows.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the hash to be finished, and forgotten.
    pub(crate) async fn check(&self, headers: &Headers, ip: Option<IpAddr>) -> Checked {
        let Some(credentials) = credentials(headers) else { return Checked::Wrong };
        let mark = self.mark(&credentials);
        if let Some(user) = lock(&self.known).users.get(&mark) {
            return Checked::User(Arc::clone(user));
        }
        let ip = network(ip);
        let waiting = match Addresses::wait(&self.addresses, ip, Instant::now()) {
            Ok(waiting) => waiting,
            Err(wait) => return Checked::Busy(wait),
        };
        let Ok(_turn) = waiting.turns.acquire().await else { return Checked::Busy(Duration::from_secs(1)) };
        // What was waited for may have been this very password, or one wrong guess too many.
        if let Some(user) = lock(&self.known).users.get(&mark) {
            return Checked::User(Arc::clone(user));
        }
        if let Some(wait) = lock(&self.addresses).blocked(ip, Instant::now()) {
            return Checked::Busy(wait);
        }
        let Some((name, password)) = split(&credentials) else { return self.failed(ip) };
        let (answer, is_right) = oneshot::channel();
        let guess =
            Guess { users: Arc::clone(&self.users), name: name.into(), password: password.into(), answer };
        if HASHERS.try_send(guess).is_err() {
            return Checked::Busy(Duration::from_secs(1));
        }
        match is_right.await {
            Ok(true) => {
                let user: Arc<str> = name.into();
                lock(&self.known).insert(mark, Arc::clone(&user));
                Checked::User(user)
            }
            Ok(false) => self.failed(ip),
            Err(_) => Checked::Busy(Duration::from_secs(1)),
        }
    }

    fn failed(&self, ip: IpAddr) -> Checked {
        if let Some(asking) = lock(&self.addresses).by_address.get_mut(&ip) {
            asking.failures += 1;
        }
        Checked::Wrong
    }

    fn mark(&self, credentials: &[u8]) -> [u8; 32] {
        let mut mark = [0; 32];
        mark.copy_from_slice(hmac::sign(&self.key, credentials).as_ref());
        mark
    }
}

impl Known {
    fn insert(&mut self, mark: [u8; 32], user: Arc<str>) {
        if self.users.insert(mark, user).is_none() {
            self.order.push_back(mark);
        }
        if self.order.len() > MOST_KNOWN
            && let Some(oldest) = self.order.pop_front()
        {
            self.users.remove(&oldest);
        }
    }
}

impl Addresses {
    /// Queues a request of an address, or says when it may ask again.
    fn wait(this: &Arc<Mutex<Self>>, ip: IpAddr, now: Instant) -> Result<Waiting, Duration> {
        let mut addresses = lock(this);
        addresses.forget(now);
        if let Some(wait) = addresses.blocked(ip, now) {
            return Err(wait);
        }
        if !addresses.by_address.contains_key(&ip) {
            addresses.order.push_back((ip, now));
        }
        let asking = addresses.by_address.entry(ip).or_insert_with(|| Asking {
            since: now,
            failures: 0,
            turns: Arc::new(Semaphore::new(1)),
            waiting: 0,
        });
        if asking.waiting >= MOST_WAITING_OF_ADDRESS {
            return Err(Duration::from_secs(1));
        }
        asking.waiting += 1;
        Ok(Waiting { addresses: Arc::clone(this), ip, turns: Arc::clone(&asking.turns) })
    }

    /// How long an address is not listened to, if it guessed wrong too often.
    fn blocked(&self, ip: IpAddr, now: Instant) -> Option<Duration> {
        let asking = self.by_address.get(&ip).filter(|asking| asking.failures >= MOST_FAILURES)?;
        Some((asking.since + WINDOW).saturating_duration_since(now).max(Duration::from_secs(1)))
    }

    /// Forgets what is over, and what is too much.
    fn forget(&mut self, now: Instant) {
        while let Some(&(ip, since)) = self.order.front() {
            if since + WINDOW > now && self.order.len() < MOST_ADDRESSES {
                break;
            }
            self.order.pop_front();
            self.by_address.remove(&ip);
        }
    }
}

/// Whose guesses count together: an IPv6 network is one customer.
fn network(ip: Option<IpAddr>) -> IpAddr {
    match ip.map(|ip| ip.to_canonical()) {
        Some(IpAddr::V6(v6)) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        Some(v4) => v4,
        None => IpAddr::from([0, 0, 0, 0]),
    }
}

/// `name:password` of the one `authorization` field with the scheme `Basic`.
fn credentials(headers: &Headers) -> Option<Vec<u8>> {
    let mut values = headers.get_all(header::AUTHORIZATION);
    let value = values.next()?;
    if values.next().is_some() {
        return None;
    }
    let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") || encoded.len() > 2 * MOST_PASSWORD_BYTES {
        return None;
    }
    STANDARD.decode(encoded.trim()).ok().filter(|credentials| credentials.contains(&b':'))
}

fn split(credentials: &[u8]) -> Option<(&str, &[u8])> {
    let colon = credentials.iter().position(|&b| b == b':')?;
    let password = &credentials[colon + 1..];
    let name = std::str::from_utf8(&credentials[..colon]).ok()?;
    (password.len() <= MOST_PASSWORD_BYTES).then_some((name, password))
}

/// The threads that hash, for all tunnels. They give way to the thread that serves.
static HASHERS: LazyLock<SyncSender<Guess>> = LazyLock::new(|| {
    let (sender, guesses) = sync_channel(MOST_WAITING);
    let guesses = Arc::new(Mutex::new(guesses));
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..(cores / 2).clamp(1, 4) {
        let guesses = Arc::clone(&guesses);
        let named = thread::Builder::new().name("passwords".to_owned());
        // Without a thread nothing is taken from the queue, and everybody is told that it is busy.
        if let Err(error) = named.spawn(move || hash(&guesses)) {
            tracing::error!("no thread for passwords: {error}");
        }
    }
    sender
});

fn hash(guesses: &Mutex<Receiver<Guess>>) {
    // Linux counts niceness by thread; where it is refused the work is done all the same.
    let _ = rustix::process::nice(19);
    loop {
        let guess = lock(guesses).recv();
        let Ok(Guess { users, name, password, answer }) = guess else { return };
        if answer.is_closed() {
            continue;
        }
        let is_right = match users.get(&name) {
            Some(hash) => hash.is_of(&password),
            None => {
                // As long as for a user, and then no all the same.
                let _ = std::hint::black_box(users.decoy(&name).map(|decoy| decoy.is_of(&password)));
                false
            }
        };
        let _ = answer.send(is_right);
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn passwords(names: &[&str]) -> Passwords {
        let hash = bcrypt::hash("secret", 4).unwrap();
        let text: String = names.iter().map(|name| format!("{name}:{hash}\n")).collect();
        Passwords::new(&Users::parse(&text).unwrap())
    }

    fn basic(credentials: &str) -> Headers {
        let value = format!("Basic {}", STANDARD.encode(credentials));
        [(header::AUTHORIZATION, HeaderValue::try_from(value).unwrap())].into_iter().collect()
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[tokio::test]
    async fn a_right_password_is_hashed_once_and_a_wrong_one_never_remembered() {
        let passwords = passwords(&["ann", "böb"]);
        let me = ip("192.0.2.1");
        assert_eq!(passwords.known(&basic("ann:secret")), None);
        assert_eq!(passwords.check(&basic("ann:secret"), me).await, Checked::User("ann".into()));
        assert_eq!(passwords.known(&basic("ann:secret")).as_deref(), Some("ann"));
        assert_eq!(passwords.known(&basic("ann:Secret")), None);
        assert_eq!(passwords.known(&basic("böb:secret")), None);
        assert_eq!(passwords.check(&basic("böb:secret"), me).await, Checked::User("böb".into()));
        for wrong in ["ann:Secret", "ann:", ":secret", "bob:secret", "ann"] {
            assert_eq!(passwords.check(&basic(wrong), me).await, Checked::Wrong, "{wrong}");
            assert_eq!(passwords.known(&basic(wrong)), None);
        }
        let mut two = basic("ann:secret");
        two.push(header::AUTHORIZATION, HeaderValue::from_static("Bearer x"));
        assert_eq!(passwords.check(&two, me).await, Checked::Wrong);
        assert_eq!(passwords.check(&Headers::new(), me).await, Checked::Wrong);
    }

    #[tokio::test]
    async fn an_address_that_guesses_too_often_waits_and_nobody_else_does() {
        let passwords = passwords(&["ann"]);
        let good = basic("ann:secret");
        assert_eq!(passwords.check(&good, ip("192.0.2.7")).await, Checked::User("ann".into()));
        for _ in 0..MOST_FAILURES {
            assert_eq!(passwords.check(&basic("ann:x"), ip("::ffff:192.0.2.1")).await, Checked::Wrong);
        }
        assert!(matches!(passwords.check(&basic("ann:y"), ip("192.0.2.1")).await, Checked::Busy(_)));
        assert_eq!(passwords.check(&good, ip("192.0.2.1")).await, Checked::User("ann".into()), "it is known");
        assert_eq!(passwords.check(&basic("ann:x"), ip("192.0.2.2")).await, Checked::Wrong);
        // The networks of IPv6 count as one.
        for n in 0..MOST_FAILURES {
            let ip = ip(&format!("2001:db8::{n}"));
            assert_eq!(passwords.check(&basic("ann:x"), ip).await, Checked::Wrong);
        }
        assert!(matches!(passwords.check(&basic("ann:x"), ip("2001:db8::ffff")).await, Checked::Busy(_)));
        assert_eq!(passwords.check(&basic("ann:x"), ip("2001:db8:1::1")).await, Checked::Wrong);
    }

    #[tokio::test]
    async fn requests_that_come_together_with_a_right_password_all_pass() {
        let passwords = passwords(&["ann"]);
        let good = basic("ann:secret");
        let together = (0..MOST_WAITING_OF_ADDRESS).map(|_| passwords.check(&good, ip("192.0.2.1")));
        for checked in futures_util::future::join_all(together).await {
            assert_eq!(checked, Checked::User("ann".into()));
        }
    }

    #[test]
    fn wrong_guesses_are_forgiven_after_a_while_and_memory_has_an_end() {
        let addresses = Arc::new(Mutex::new(Addresses::default()));
        let of = |n: u32| IpAddr::from(n.to_be_bytes());
        let now = Instant::now();
        let wait = |n| Addresses::wait(&addresses, of(n), now);
        drop(wait(1).unwrap());
        lock(&addresses).by_address.get_mut(&of(1)).unwrap().failures = MOST_FAILURES;
        assert_eq!(wait(1).map(drop), Err(WINDOW));
        let later = now + WINDOW;
        let wait = |n| Addresses::wait(&addresses, of(n), later);
        let queue: Vec<_> = (0..MOST_WAITING_OF_ADDRESS).map(|_| wait(1).unwrap()).collect();
        assert_eq!(wait(1).map(drop), Err(Duration::from_secs(1)), "its queue is full");
        drop(queue);
        for n in 1..2 * MOST_ADDRESSES as u32 {
            drop(wait(n).unwrap());
        }
        let addresses = lock(&addresses);
        assert_eq!((addresses.by_address.len(), addresses.order.len()), (MOST_ADDRESSES, MOST_ADDRESSES));
    }

    #[test]
    fn the_memory_for_right_passwords_has_an_end() {
        let mut known = Known::default();
        for n in 0..2 * MOST_KNOWN as u64 {
            let mut mark = [0; 32];
            mark[..8].copy_from_slice(&n.to_be_bytes());
            known.insert(mark, "ann".into());
            known.insert(mark, "ann".into());
        }
        assert_eq!((known.users.len(), known.order.len()), (MOST_KNOWN, MOST_KNOWN));
    }

    /// Prints how long a known password takes alone and beside 100 guesses a second from as many addresses, at the cost
    /// that files usually have: `cargo test -p agentd --lib guesses -- --ignored --nocapture`.
    #[tokio::test]
    #[ignore = "a measurement"]
    async fn guesses_beside_a_known_password() {
        let hash = bcrypt::hash("secret", 10).unwrap();
        let users = Users::parse(&format!("ann:{hash}\n")).unwrap();
        let passwords = Arc::new(Passwords::new(&users));
        let (good, home) = (basic("ann:secret"), ip("192.0.2.1"));
        assert_eq!(passwords.check(&good, home).await, Checked::User("ann".into()));
        for guesses_of_second in [0u32, 100] {
            let begun = Instant::now();
            let (mut taken, mut guesses, mut sent) = (Vec::new(), Vec::new(), 0_u32);
            while begun.elapsed() < Duration::from_secs(5) {
                while f64::from(sent) < begun.elapsed().as_secs_f64() * f64::from(guesses_of_second) {
                    let (passwords, from) =
                        (Arc::clone(&passwords), IpAddr::from((0x0a00_0000 + sent).to_be_bytes()));
                    let guess = basic(&format!("user{}:{sent}", sent % 3));
                    guesses.push(tokio::spawn(async move { passwords.check(&guess, Some(from)).await }));
                    sent += 1;
                }
                let before = std::time::Instant::now();
                assert!(matches!(passwords.check(&good, home).await, Checked::User(_)));
                taken.push(before.elapsed());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            taken.sort();
            let at = |share: usize| taken[taken.len() * share / 100];
            let mut hashed = 0;
            for guess in guesses {
                hashed += u32::from(guess.await.unwrap() == Checked::Wrong);
            }
            println!(
                "{guesses_of_second} guesses/s: {} good, p50 {:?}, p95 {:?}, p99 {:?}; {sent} guesses, {hashed} of them hashed",
                taken.len(),
                at(50),
                at(95),
                at(99)
            );
        }
    }
}
