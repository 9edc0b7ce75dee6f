//! Whether an upstream is well, by asking it now and then.
//!
//! Enters: answers and failures of the checks. Leaves: [`Health`], which a request looks at before it
//! calls the upstream, and which `status` shows. An upstream that is down never ends the agent.

use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header, uri::PathAndQuery};
use tokio::time::{sleep, timeout};

use crate::{
    config::HealthCheck,
    report::status::HealthState,
    serve::upstream::{RequestBody, Upstream, UpstreamError},
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
pub(crate) struct Health(Mutex<Tally>);

impl Health {
    /// Of an upstream that counts as well until `max_failed` checks in a row say otherwise; `None` where
    /// nobody checks.
    pub(crate) const fn new(max_failed: Option<u32>) -> Self {
        let (state, max_failed) = match max_failed {
            Some(max_failed) => (HealthState::Up, max_failed),
            None => (HealthState::Unchecked, u32::MAX),
        };
        Self(Mutex::new(Tally { state, failed: 0, max_failed }))
    }

    /// What the checks have come to.
    pub(crate) fn state(&self) -> HealthState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).state.clone()
    }

    /// Whether the upstream should not be called.
    pub(crate) fn is_down(&self) -> bool {
        matches!(self.0.lock().unwrap_or_else(PoisonError::into_inner).state, HealthState::Down { .. })
    }

    fn note(&self, outcome: Result<(), String>) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).note(outcome)
    }
}

/// Checks `upstream` for ever and tells `changed` whenever it becomes well or not.
pub(crate) async fn check(
    settings: HealthCheck,
    host: HeaderValue,
    upstream: Arc<Upstream>,
    health: Arc<Health>,
    changed: impl Fn(&HealthState) + Send,
) {
    loop {
        let outcome = timeout(settings.timeout, ask(&settings.path, &host, &upstream))
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", settings.timeout)));
        if health.note(outcome) {
            changed(&health.state());
        }
        // A little uneven, so that many upstreams on one machine are not asked together.
        sleep(settings.interval.mul_f64(0.9 + 0.2 * crate::random::fraction())).await;
    }
}

async fn ask(path: &PathAndQuery, host: &HeaderValue, upstream: &Upstream) -> Result<(), String> {
    let said = |error: UpstreamError| error.to_string();
    let mut request = Request::new(RequestBody::Empty);
    *request.method_mut() = Method::GET;
    *request.uri_mut() = Uri::from(path.clone());
    let headers: &mut HeaderMap = request.headers_mut();
    headers.insert(header::HOST, host.clone());
    headers.insert(header::USER_AGENT, HeaderValue::from_static(crate::report::SOFTWARE));
    let response = upstream.send(request).await.map_err(said)?;
    let status = response.status();
    let mut body = response.into_body();
    // The connection is used again only if the body ends soon.
    let mut left = MOST_BODY_BYTES;
    while let Some(piece) = body.next().await {
        left = left.saturating_sub(piece.map_err(said)?.len());
        if left == 0 {
            return verdict(status);
        }
    }
    body.finish();
    verdict(status)
}

/// No more of an answer's body is read than this.
const MOST_BODY_BYTES: usize = 64 * 1024;

fn verdict(status: StatusCode) -> Result<(), String> {
    if status.is_success() || status.is_redirection() {
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
        assert!(health.note(down()) && health.is_down());
        assert!(!health.note(down()));
        assert_eq!(health.state(), HealthState::Down { reason: "x".into() });
        assert!(health.note(Ok(())) && !health.is_down());
        assert_eq!(Health::new(None).state(), HealthState::Unchecked);
    }

    #[test]
    fn only_good_answers_are_good() {
        assert!(verdict(StatusCode::NO_CONTENT).is_ok() && verdict(StatusCode::FOUND).is_ok());
        assert!(verdict(StatusCode::NOT_FOUND).is_err() && verdict(StatusCode::SERVICE_UNAVAILABLE).is_err());
    }
}
