//! Small documents of sign-in providers: one request, one answer, both bounded. It follows no redirect and dials
//! only what a configuration or a provider's own document names.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use rustls::pki_types::ServerName;
use tokio::time::{Instant, timeout};

use crate::{
    config::{
        Http2,
        address::{Address, Host, Scheme},
        http_url::HttpUrl,
    },
    serve::upstream::{RequestBody, Tls, Upstream, UpstreamError},
    tls::{Certificates, TlsError, Trust, client_config},
};

/// How long an answer may take: a visitor waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// No document is longer: key sets have some kilobytes.
const MOST_BYTES: usize = 512 * 1024;

/// After this long a document is fetched anew.
const FRESH: Duration = Duration::from_secs(60 * 60);

/// For so long it is believed where it cannot be fetched anew.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Between two attempts for what may be newer, whatever visitors send.
const PAUSE: Duration = Duration::from_secs(30);

/// Between two attempts for what there is none of: whoever comes meanwhile is told so at once.
const PAUSE_WITHOUT: Duration = Duration::from_secs(3);

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("{url}: {source}")]
    Upstream { url: String, source: UpstreamError },
    #[error("{0}: no answer in time")]
    Late(String),
    #[error("{0}: the answer is over 512 KiB")]
    TooLong(String),
    #[error("{url}: it answers {status}")]
    Status { url: String, status: StatusCode },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{0} cannot be asked for")]
    Request(String),
}

/// Asks providers.
pub(crate) struct Fetch {
    certificates: Option<Certificates>,
    tls: OnceLock<Arc<rustls::ClientConfig>>,
}

impl Fetch {
    /// Trusts the system's certificates and these.
    pub(crate) const fn new(certificates: Option<Certificates>) -> Self {
        Self { certificates, tls: OnceLock::new() }
    }

    /// The document at `url`; anything but 200 is an error.
    pub(crate) async fn get(&self, url: &HttpUrl, fields: HeaderMap) -> Result<Bytes, FetchError> {
        match self.ask(Method::GET, url, fields, Bytes::new()).await? {
            (StatusCode::OK, body) => Ok(body),
            (status, _) => Err(FetchError::Status { url: shown(url), status }),
        }
    }

    /// What is answered to a form.
    pub(crate) async fn post(
        &self,
        url: &HttpUrl,
        mut fields: HeaderMap,
        form: String,
    ) -> Result<(StatusCode, Bytes), FetchError> {
        let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
        fields.insert(header::CONTENT_TYPE, kind);
        fields.insert(header::CONTENT_LENGTH, form.len().into());
        self.ask(Method::POST, url, fields, form.into()).await
    }

    async fn ask(
        &self,
        method: Method,
        url: &HttpUrl,
        mut fields: HeaderMap,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), FetchError> {
        let upstream = Upstream::new(url.address().clone(), self.tls_for(url.address())?, Http2::Never, None);
        fields.insert(header::HOST, host_of(url).ok_or_else(|| FetchError::Request(shown(url)))?);
        fields.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        let body = if body.is_empty() { RequestBody::Empty } else { RequestBody::Whole(body) };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = url.target().parse().map_err(|_| FetchError::Request(shown(url)))?;
        *request.headers_mut() = fields;
        let failed = |source| FetchError::Upstream { url: shown(url), source };
        let answer = async {
            let response = upstream.send(request).await.map_err(failed)?;
            let (head, mut body) = response.into_parts();
            let mut bytes = Vec::new();
            while let Some(piece) = body.next().await {
                let piece = piece.map_err(failed)?;
                if bytes.len() + piece.len() > MOST_BYTES {
                    return Err(FetchError::TooLong(shown(url)));
                }
                bytes.extend_from_slice(&piece);
            }
            Ok((head.status, Bytes::from(bytes)))
        };
        timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(FetchError::Late(shown(url))))
    }

    fn tls_for(&self, address: &Address) -> Result<Option<Tls>, TlsError> {
        let Address::Tcp { host, scheme: Scheme::Https, .. } = address else { return Ok(None) };
        let config = match self.tls.get() {
            Some(config) => Arc::clone(config),
            None => {
                let trust = self.certificates.as_ref().map_or(Trust::System, Trust::SystemAnd);
                let config = client_config(trust, &[b"http/1.1"])?;
                Arc::clone(self.tls.get_or_init(|| config))
            }
        };
        let server_name = match host {
            Host::Ip(ip) => (*ip).into(),
            Host::Localhost | Host::Name(_) | Host::Zoned(..) => {
                ServerName::try_from(host.to_string()).map_err(|_| TlsError::NotAName(host.to_string()))?
            }
        };
        Ok(Some(Tls { config, server_name }))
    }
}

/// As it was written: some providers compare it with their issuer's name.
fn host_of(url: &HttpUrl) -> Option<HeaderValue> {
    HeaderValue::try_from(url.address().authority()).ok()
}

/// Without the query: it may hold what is nobody's business.
fn shown(url: &HttpUrl) -> String {
    url.as_str().split('?').next().unwrap_or_default().to_owned()
}

/// How a document is read.
type Parse<T> = Box<dyn Fn(&[u8]) -> Result<T, String> + Send + Sync>;

/// A document that is fetched when it is needed, and not too often.
pub(crate) struct Remote<T> {
    url: HttpUrl,
    fetch: Arc<Fetch>,
    parse: Parse<T>,
    state: Mutex<State<T>>,
    /// One attempt at a time; the others wait for it.
    turn: tokio::sync::Mutex<()>,
}

struct State<T> {
    known: Option<(Arc<T>, Instant)>,
    tried_at: Option<Instant>,
}

impl<T> Remote<T> {
    /// Nothing is fetched yet.
    pub(crate) fn new(
        url: HttpUrl,
        fetch: Arc<Fetch>,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Self {
        let state = Mutex::new(State { known: None, tried_at: None });
        Self { url, fetch, parse: Box::new(parse), state, turn: tokio::sync::Mutex::new(()) }
    }

    /// Where it is.
    pub(crate) const fn url(&self) -> &HttpUrl {
        &self.url
    }

    /// The document as it is known; fetched if it is old, or `lacks` something that a newer one may have. `None`
    /// where it cannot be had; the log says why.
    pub(crate) async fn get(&self, lacks: bool) -> Option<Arc<T>> {
        if let Some(known) = self.known(lacks, Instant::now()) {
            return known;
        }
        let _turn = self.turn.lock().await;
        if let Some(known) = self.known(lacks, Instant::now()) {
            return known;
        }
        let fetched = self.fetch.get(&self.url, HeaderMap::new()).await.map_err(|error| error.to_string());
        let read = fetched
            .and_then(|text| (self.parse)(&text).map_err(|why| format!("{}: {why}", shown(&self.url))));
        let now = Instant::now();
        let mut state = self.state();
        state.tried_at = Some(now);
        match read {
            Ok(new) => {
                let new = Arc::new(new);
                state.known = Some((Arc::clone(&new), now));
                Some(new)
            }
            Err(message) => {
                tracing::warn!("a document that visitors are known by is not there: {message}");
                state
                    .known
                    .as_ref()
                    .filter(|(_, at)| now.duration_since(*at) < STALE)
                    .map(|(old, _)| Arc::clone(old))
            }
        }
    }

    /// As if the pause between two attempts were over.
    #[cfg(test)]
    pub(crate) fn forget_attempts(&self) {
        self.state().tried_at = None;
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said without an attempt; `None` where one is due.
    #[expect(clippy::option_option, reason = "an attempt may be needless because there is nothing")]
    fn known(&self, lacks: bool, now: Instant) -> Option<Option<Arc<T>>> {
        let state = self.state();
        let tried_within = |pause| state.tried_at.is_some_and(|at| now.duration_since(at) < pause);
        match &state.known {
            Some((known, at)) => {
                let age = now.duration_since(*at);
                let will_do = (age < FRESH && !lacks) || (age < STALE && tried_within(PAUSE));
                will_do.then(|| Some(Arc::clone(known)))
            }
            None => tried_within(PAUSE_WITHOUT).then_some(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_document_is_fetched_when_it_is_old_or_lacks_something_and_not_too_often() {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let remote =
            Remote::new("http://127.0.0.1:1/".parse().unwrap(), Arc::new(Fetch::new(None)), move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
        let now = Instant::now();
        let is_due = |lacks, after| remote.known(lacks, now + after).is_none();
        assert!(is_due(false, Duration::ZERO));
        remote.state().tried_at = Some(now);
        assert!(!is_due(false, PAUSE_WITHOUT - Duration::from_millis(1)) && is_due(false, PAUSE_WITHOUT));
        remote.state().known = Some((Arc::new(()), now));
        assert!(!is_due(false, FRESH - Duration::from_secs(1)) && is_due(false, FRESH));
        assert!(!is_due(true, PAUSE - Duration::from_secs(1)) && is_due(true, PAUSE));
        remote.state().tried_at = Some(now + STALE - Duration::from_secs(1));
        assert!(!is_due(false, STALE - Duration::from_secs(1)) && is_due(false, STALE));
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }
}
