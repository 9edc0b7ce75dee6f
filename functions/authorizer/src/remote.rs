//! An identity provider's keys: a key id and the time enter, a key leaves; between them, sometimes,
//! one HTTPS request.
//!
//! The set is kept for [`FRESH_SECS`]. An unknown key id asks again, as the provider may have begun
//! to use a new key, but at most every [`UNKNOWN_KEY_SECS`], so that made-up ids do not turn this
//! function against the provider. What was fetched last stays in use while the provider cannot be
//! reached: its outage must not become ours.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use edge::connections::{Bounds, Connections, SendError};
use http::{Request, StatusCode, Uri, header, uri::Scheme};
use http_body_util::Empty;

use crate::key::{JWKS_BYTES, Key, KeyError, KeySet};

/// How old a set may become before it is fetched again: how long a key that its provider has
/// withdrawn is still believed.
pub const FRESH_SECS: u64 = 10 * 60;

/// How often an unknown key id may ask the provider.
pub const UNKNOWN_KEY_SECS: u64 = 60;

/// How soon to ask again after the provider did not answer.
pub const RETRY_SECS: u64 = 5;

/// How long the provider may take to answer, connecting included: well inside the time that API
/// Gateway waits for an authorizer.
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(4);

/// Why there is no set from the provider.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The address is not `https`, or no address.
    #[error("the address of the JWK set has to begin with https://")]
    NotHttps,
    /// No answer, or not one of HTTP.
    #[error("the JWK set could not be fetched")]
    Http(#[source] SendError),
    /// An answer without a set.
    #[error("the identity provider answered {0}")]
    Status(u16),
    /// An answer with a set that is refused.
    #[error("the identity provider's JWK set is refused")]
    Key(#[from] KeyError),
}

/// What became of the search for a key.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// Here it is.
    Found(Key),
    /// The provider does not have it.
    Unknown,
    /// Nobody can tell: the provider did not answer.
    Unavailable,
}

/// The keys of an identity provider, and the shared secret if there is one too.
#[derive(Debug)]
pub struct Remote {
    url: String,
    connections: Connections<Empty<Bytes>>,
    secret: KeySet,
    state: Mutex<State>,
    /// Held by the one task that asks the provider.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    keys: Arc<KeySet>,
    /// When the set was fetched (Unix time, seconds); `None` before it was.
    fetched_at: Option<u64>,
    /// When the provider was last asked.
    asked_at: Option<u64>,
    /// Whether the last answer was a set.
    answered: bool,
}

impl State {
    fn is_fresh(&self, now: u64) -> bool {
        self.fetched_at.is_some_and(|at| is_within(at, FRESH_SECS, now))
    }

    fn may_ask(&self, now: u64) -> bool {
        let pause = if self.answered { UNKNOWN_KEY_SECS } else { RETRY_SECS };
        !self.asked_at.is_some_and(|at| is_within(at, pause, now))
    }

    fn result(&self, id: &str) -> Lookup {
        match self.keys.get(id) {
            Some(key) => Lookup::Found(key.clone()),
            None if self.answered => Lookup::Unknown,
            None => Lookup::Unavailable,
        }
    }
}

/// Whether `now` is less than `secs` after `at`; not so when the clock was set back before it.
fn is_within(at: u64, secs: u64, now: u64) -> bool {
    now.checked_sub(at).is_some_and(|age| age < secs)
}

impl Remote {
    /// Prepares to ask `url`, which is not done before the first token.
    ///
    /// # Errors
    ///
    /// [`RemoteError`] when the address is not `https`.
    pub fn new(url: &str, secret: KeySet) -> Result<Self, RemoteError> {
        let https = url.parse::<Uri>().is_ok_and(|url| {
            url.scheme() == Some(&Scheme::HTTPS) && url.host().is_some_and(|host| !host.is_empty())
        });
        if !https {
            return Err(RemoteError::NotHttps);
        }
        Ok(Self::over(Connections::new(false), url, secret))
    }

    fn over(connections: Connections<Empty<Bytes>>, url: &str, secret: KeySet) -> Self {
        let keys = Arc::new(secret.clone());
        let state = Mutex::new(State { keys, fetched_at: None, asked_at: None, answered: false });
        Self { url: url.into(), connections, secret, state, asking: tokio::sync::Mutex::default() }
    }

    /// Finds the key with this id at the Unix time `now`, in seconds, and asks the provider if that
    /// is due.
    pub(crate) async fn find(&self, id: &str, now: u64) -> Lookup {
        if self.secret.get(id).is_some() || !self.is_due(id, now) {
            return self.state().result(id);
        }
        let _one_at_a_time = self.asking.lock().await;
        // Whoever held the lock before may have brought what this task came for.
        if !self.is_due(id, now) {
            return self.state().result(id);
        }
        let fetched = self.fetch().await;
        let mut state = self.state();
        state.asked_at = Some(now);
        state.answered = fetched.is_ok();
        match fetched {
            Ok(keys) => {
                tracing::info!(keys = keys.len(), "identity provider's keys fetched");
                state.keys = Arc::new(keys);
                state.fetched_at = Some(now);
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, "identity provider's keys not fetched, the last ones stay in use");
            }
        }
        state.result(id)
    }

    fn is_due(&self, id: &str, now: u64) -> bool {
        let state = self.state();
        (state.keys.get(id).is_none() || !state.is_fresh(now)) && state.may_ask(now)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing that runs under the lock can panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch(&self) -> Result<KeySet, RemoteError> {
        let request = Request::get(&self.url).header(header::ACCEPT, "application/json").body(Empty::new());
        let request = request.map_err(|_| RemoteError::NotHttps)?;
        let bounds = Bounds { connect: None, answer: Some(FETCH_TIMEOUT), bytes: JWKS_BYTES };
        let response = match self.connections.send(request, bounds).await {
            Err(SendError::TooLong) => return Err(KeyError::TooLarge.into()),
            sent => sent.map_err(RemoteError::Http)?,
        };
        // A redirect is not followed.
        if response.status() != StatusCode::OK {
            return Err(RemoteError::Status(response.status().as_u16()));
        }
        Ok(KeySet::from_jwks(response.body())?.merged(&self.secret)?)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// A provider on the loopback that gives each of `answers` once and then closes.
    async fn provider(answers: Vec<String>) -> (Remote, tokio::task::JoinHandle<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            let mut served = 0;
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let mut request = [0; 4096];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
                served += 1;
            }
            served
        });
        (Remote::over(Connections::new(true), &url, KeySet::default()), task)
    }

    fn jwks(ids: &[&str]) -> String {
        let key = |id: &&str| {
            format!(
                r#"{{"kty":"OKP","crv":"Ed25519","kid":"{id}","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}}"#
            )
        };
        let body = format!(r#"{{"keys":[{}]}}"#, ids.iter().map(key).collect::<Vec<_>>().join(","));
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn failure() -> String {
        "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into()
    }

    #[tokio::test]
    async fn a_rotated_key_is_found_and_made_up_ids_ask_once_a_minute() {
        let (remote, task) = provider(vec![jwks(&["a"]), jwks(&["b"])]).await;
        assert!(matches!(remote.find("a", 1000).await, Lookup::Found(_)));
        for second in 0..UNKNOWN_KEY_SECS {
            assert!(matches!(remote.find("b", 1000 + second).await, Lookup::Unknown));
        }
        assert!(matches!(remote.find("b", 1000 + UNKNOWN_KEY_SECS).await, Lookup::Found(_)));
        assert!(matches!(remote.find("a", 1001 + UNKNOWN_KEY_SECS).await, Lookup::Unknown));
        assert_eq!(task.await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_withdrawn_key_is_forgotten_when_the_set_is_no_longer_fresh() {
        let (remote, task) = provider(vec![jwks(&["a", "b"]), jwks(&["b"])]).await;
        assert!(matches!(remote.find("a", 1000).await, Lookup::Found(_)));
        assert!(matches!(remote.find("a", 1000 + FRESH_SECS - 1).await, Lookup::Found(_)));
        assert!(matches!(remote.find("a", 1000 + FRESH_SECS).await, Lookup::Unknown));
        assert_eq!(task.await.unwrap(), 2);
    }

    #[tokio::test]
    async fn the_last_set_outlives_its_provider_and_nothing_is_said_of_unknown_keys() {
        let (remote, task) = provider(vec![failure(), jwks(&["a"]), failure()]).await;
        assert!(matches!(remote.find("a", 1000).await, Lookup::Unavailable));
        assert!(matches!(remote.find("a", 1000 + RETRY_SECS - 1).await, Lookup::Unavailable));
        assert!(matches!(remote.find("a", 1000 + RETRY_SECS).await, Lookup::Found(_)));
        let later = 1000 + RETRY_SECS + FRESH_SECS;
        assert!(matches!(remote.find("a", later).await, Lookup::Found(_)));
        assert!(matches!(remote.find("b", later).await, Lookup::Unavailable));
        assert_eq!(task.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn redirects_and_oversized_or_private_sets_are_refused() {
        let redirect =
            "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".into();
        let large = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", " ".repeat(JWKS_BYTES + 1));
        let private = jwks(&["a\",\"d\":\"AA"]);
        for answer in [redirect, large, private] {
            let (remote, task) = provider(vec![answer]).await;
            assert!(matches!(remote.find("a", 1000).await, Lookup::Unavailable));
            drop(task);
        }
    }

    #[tokio::test]
    async fn the_secret_never_asks_the_provider() {
        let mut secret = KeySet::default();
        secret.add_secret("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=").unwrap();
        let remote = Remote::over(Connections::new(true), "http://127.0.0.1:1/", secret);
        assert!(matches!(remote.find(crate::key::SECRET_KEY_ID, 1000).await, Lookup::Found(_)));
    }

    #[test]
    fn only_https_is_asked() {
        for url in ["http://id.example.com/", "id.example.com", "file:///jwks.json", "https://", "ftp://x/"] {
            assert!(matches!(Remote::new(url, KeySet::default()), Err(RemoteError::NotHttps)), "{url}");
        }
        assert!(Remote::new("https://id.example.com/jwks", KeySet::default()).is_ok());
    }
}
