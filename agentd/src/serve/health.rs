//! Whether an upstream is well, by asking it now and then.
//!
//! Enters: answers and failures of the checks. Leaves: [`Health`], which a request looks at before it
//! calls the upstream, and which `status` shows. An upstream that is down never ends the agent.

use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::{HealthCheck, Statuses, address::Address},
    report::cause,
    report::status::HealthState,
    serve::host::HostRule,
    serve::upstream::{RequestBody, Upstream, UpstreamError, Way},
};

/// The count of one upstream's checks, without IO.
#[derive(Debug)]
struct Tally {
    state: HealthState,
    failed: u32,
    max_failed: u32,
}

impl Tally {
    /// Notes one check; true if that changes whether the upstream counts as well.
    fn note(&mut self, outcome: Result<(), String>) -> bool {
        match outcome {
            Ok(()) => {
                self.failed = 0;
                let changed = self.state != HealthState::Up;
                self.state = HealthState::Up;
                changed
            }
            Err(reason) => {
                self.failed = self.failed.saturating_add(1);
                if self.failed < self.max_failed {
                    return false;
                }
                let changed = !matches!(self.state, HealthState::Down { .. });
                self.state = HealthState::Down { reason };
                changed
            }
        }
    }
}

/// Whether one upstream is well.
#[derive(Debug)]
pub(crate) struct Health {
    tally: Mutex<Tally>,
    /// The same for the metrics: 1 while it counts as well.
    shown: Gauge,
}

impl Health {
    /// Of an upstream that counts as well until `max_failed` checks in a row say otherwise; `None` where
    /// nobody checks.
    pub(crate) fn new(max_failed: Option<u32>) -> Self {
        let (state, max_failed) = match max_failed {
            Some(max_failed) => (HealthState::Up, max_failed),
            None => (HealthState::Unchecked, u32::MAX),
        };
        let shown = Gauge::default();
        shown.set(1);
        Self { tally: Mutex::new(Tally { state, failed: 0, max_failed }), shown }
    }

    /// What the checks have come to.
    pub(crate) fn state(&self) -> HealthState {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).state.clone()
    }

    /// Whether the upstream should not be called.
    pub(crate) fn is_down(&self) -> bool {
        matches!(self.tally.lock().unwrap_or_else(PoisonError::into_inner).state, HealthState::Down { .. })
    }

    /// What the metrics show of it.
    pub(crate) const fn shown(&self) -> &Gauge {
        &self.shown
    }

    fn note(&self, outcome: Result<(), String>) -> bool {
        let changed = self.tally.lock().unwrap_or_else(PoisonError::into_inner).note(outcome);
        if changed {
            self.shown.set(i64::from(!self.is_down()));
        }
        changed
    }
}

/// Who is asked, and as whom.
pub(crate) struct Asked {
    /// What `host` says.
    pub(crate) host: HostRule,
    /// The tunnel's public address, once it has one.
    pub(crate) public: watch::Receiver<Option<String>>,
    /// The upstream.
    pub(crate) upstream: Arc<Upstream>,
}

impl Asked {
    /// The fields of a check, as a request of a visitor would have them. Where `host` is the public name, nobody
    /// can ask before there is one.
    async fn fields(&mut self) -> HeaderMap {
        let public = match &self.host {
            HostRule::Public => match self.public.wait_for(Option::is_some).await {
                Ok(public) => public.clone(),
                Err(_) => None,
            },
            HostRule::Fixed(_) => self.public.borrow().clone(),
        };
        fields(&self.host, public.as_deref(), self.upstream.authority())
    }
}

fn fields(rule: &HostRule, public: Option<&str>, own: &HeaderValue) -> HeaderMap {
    let public = public.and_then(|public| public.parse::<Uri>().ok());
    let named = public.as_ref().and_then(|public| {
        let host = HeaderValue::from_str(public.authority()?.as_str()).ok()?;
        Some((public.scheme_str()?, host, public.path().trim_end_matches('/')))
    });
    let host = match (rule, &named) {
        (HostRule::Fixed(host), _) => host,
        (HostRule::Public, Some((_, host, _))) => host,
        (HostRule::Public, None) => own,
    };
    let mut fields = HeaderMap::new();
    fields.insert(header::HOST, host.clone());
    fields.insert(header::USER_AGENT, HeaderValue::from_static(crate::report::SOFTWARE));
    if let Some((scheme, host, prefix)) = &named {
        let text = |text: &str| HeaderValue::from_str(text).ok();
        let forwarded = [
            ("x-forwarded-proto", text(scheme)),
            ("x-forwarded-host", Some(host.clone())),
            ("x-forwarded-prefix", text(prefix).filter(|prefix| !prefix.is_empty())),
        ];
        for (name, value) in forwarded {
            if let Some(value) = value {
                fields.insert(name, value);
            }
        }
    }
    fields
}

/// What the checks of one upstream depend on.
#[derive(PartialEq)]
pub(crate) struct Checked {
    /// The route that leads there; `None` for a tunnel's own.
    pub(crate) route: Option<String>,
    pub(crate) address: Address,
    pub(crate) way: Way,
    pub(crate) host: HostRule,
    pub(crate) settings: HealthCheck,
}

/// The checks of one upstream. They end when nobody holds this any more.
pub(crate) struct Check {
    health: Arc<Health>,
    _task: AbortOnDropHandle<()>,
}

impl Check {
    /// Begins to check, and tells `changed` whenever the upstream becomes well or not.
    pub(crate) fn start(
        settings: &HealthCheck,
        asked: Asked,
        changed: impl Fn(&HealthState) + Send + 'static,
    ) -> Self {
        let health = Arc::new(Health::new(Some(settings.max_failed)));
        let task = tokio::spawn(check(settings.clone(), asked, Arc::clone(&health), changed));
        Self { health, _task: AbortOnDropHandle::new(task) }
    }

    /// What they have come to so far.
    pub(crate) const fn health(&self) -> &Arc<Health> {
        &self.health
    }
}

/// Checks an upstream for ever and tells `changed` whenever it becomes well or not.
async fn check(
    settings: HealthCheck,
    mut asked: Asked,
    health: Arc<Health>,
    changed: impl Fn(&HealthState) + Send,
) {
    loop {
        let fields = asked.fields().await;
        let outcome = timeout(settings.timeout, ask(&settings, fields, &asked.upstream))
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", settings.timeout)));
        if health.note(outcome) {
            changed(&health.state());
        }
        // A little uneven, so that many upstreams on one machine are not asked together.
        sleep(settings.interval.mul_f64(0.9 + 0.2 * crate::random::fraction())).await;
    }
}

async fn ask(settings: &HealthCheck, fields: HeaderMap, upstream: &Upstream) -> Result<(), String> {
    let said = |error: UpstreamError| cause::explain(upstream.address(), &error);
    let mut request = Request::new(RequestBody::Empty);
    *request.method_mut() = Method::GET;
    *request.uri_mut() = Uri::from(settings.path.clone());
    *request.headers_mut() = fields;
    let response = upstream.send(request).await.map_err(said)?;
    let status = response.status();
    let mut body = response.into_body();
    // The connection is used again only if the body ends soon.
    let mut left = MOST_BODY_BYTES;
    while let Some(piece) = body.next().await {
        left = left.saturating_sub(piece.map_err(said)?.len());
        if left == 0 {
            return verdict(status, &settings.expect_status);
        }
    }
    body.finish();
    verdict(status, &settings.expect_status)
}

/// No more of an answer's body is read than this.
const MOST_BODY_BYTES: usize = 64 * 1024;

fn verdict(status: StatusCode, expected: &Statuses) -> Result<(), String> {
    if expected.contains(status.as_u16()) {
        Ok(())
    } else {
        Err(format!("the upstream answered {}", status.as_u16()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_failures_in_a_row_as_allowed_and_no_fewer_take_an_upstream_down() {
        let health = Health::new(Some(3));
        let down = || Err("x".to_owned());
        assert!(!health.note(down()) && !health.note(down()) && !health.is_down());
        assert!(!health.note(Ok(())), "it was well all the time");
        assert!(!health.note(down()) && !health.note(down()));
        assert_eq!(health.shown().get(), 1);
        assert!(health.note(down()) && health.is_down());
        assert!(!health.note(down()));
        assert_eq!(health.shown().get(), 0);
        assert_eq!(health.state(), HealthState::Down { reason: "x".into() });
        assert!(health.note(Ok(())) && !health.is_down());
        assert_eq!(health.shown().get(), 1);
        assert_eq!(Health::new(None).state(), HealthState::Unchecked);
    }

    #[test]
    fn only_good_answers_are_good() {
        let usual = Statuses::default();
        assert!(
            verdict(StatusCode::NO_CONTENT, &usual).is_ok() && verdict(StatusCode::FOUND, &usual).is_ok()
        );
        assert!(verdict(StatusCode::NOT_FOUND, &usual).is_err());
        assert!(verdict(StatusCode::SERVICE_UNAVAILABLE, &usual).is_err());
        let login = "401,2xx".parse().unwrap();
        assert!(verdict(StatusCode::UNAUTHORIZED, &login).is_ok() && verdict(StatusCode::OK, &login).is_ok());
        assert!(verdict(StatusCode::FOUND, &login).is_err());
    }

    #[test]
    fn a_check_looks_like_the_visitors_it_stands_for() {
        let own = HeaderValue::from_static("localhost:3000");
        let get =
            |fields: &HeaderMap, name: &str| fields.get(name).map(|value| value.to_str().unwrap().to_owned());
        let public = fields(&HostRule::Public, Some("https://web.example.com"), &own);
        assert_eq!(get(&public, "host").unwrap(), "web.example.com");
        assert_eq!(get(&public, "x-forwarded-proto").unwrap(), "https");
        assert_eq!(get(&public, "x-forwarded-prefix"), None);
        let fixed = HostRule::Fixed(HeaderValue::from_static("app.test"));
        let path = fields(&fixed, Some("http://127.0.0.1:8080/web/"), &own);
        assert_eq!(get(&path, "host").unwrap(), "app.test");
        assert_eq!(get(&path, "x-forwarded-host").unwrap(), "127.0.0.1:8080");
        assert_eq!(get(&path, "x-forwarded-prefix").unwrap(), "/web");
        let unknown = fields(&fixed, None, &own);
        assert_eq!((get(&unknown, "host").unwrap().as_str(), unknown.len()), ("app.test", 2));
    }
}
