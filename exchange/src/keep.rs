//! A request that is kept, to be delivered later.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use edge::{
    aws::Aws,
    config::{ConfigError, Env},
    deliveries::{Accepted, Deliveries, Head, Offer, Terms},
    registry::Registry,
    unix_now,
};
use http::{HeaderValue, header};
use proto::{
    delivery::{self, Mode, SenderAnswer},
    error::ErrorCode,
    header::Headers,
    id::{DeliveryId, RequestId, TunnelName},
};

use crate::{answer, public, route::PublicRequest};

/// How many tunnels are remembered that have kept a request.
const KEEPERS: usize = 1000;

/// Keeps requests, and remembers as far as this process has seen it which tunnels keep some at once, with the methods that
/// they keep. For the next one nobody needs to be looked for, so it needs no run: a read of what the owner wants is enough.
#[derive(Debug)]
pub struct Keeper {
    deliveries: Deliveries,
    registry: Registry,
    known: Mutex<HashMap<TunnelName, Vec<String>>>,
}

impl Keeper {
    /// Reads the environment and remembers nothing; none where deliveries are not deployed.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Option<Self>, ConfigError> {
        let Some(deliveries) = Deliveries::from_env(aws, env) else { return Ok(None) };
        Ok(Some(Self { deliveries, registry: Registry::from_env(aws, env)?, known: Mutex::default() }))
    }

    /// Remembers a tunnel that has kept a request at once.
    pub fn remember(&self, tunnel: &TunnelName, terms: &Terms) {
        let mut known = self.known();
        if known.len() >= KEEPERS && !known.contains_key(tunnel) {
            known.clear();
        }
        known.insert(tunnel.clone(), terms.policy.methods.clone());
    }

    /// Whether it is worth asking for a tunnel's terms.
    #[must_use]
    pub fn remembers(&self, request: &PublicRequest) -> bool {
        let known = self.known();
        known
            .get(&request.tunnel)
            .is_some_and(|methods| methods.iter().any(|it| it == request.method.as_str()))
    }

    /// The terms of a tunnel that keeps requests at once, as they are now; nothing where it does not any more, or where
    /// nobody can tell: a run finds out.
    pub async fn terms(&self, tunnel: &TunnelName) -> Option<Terms> {
        let terms = self.read(tunnel).await.ok()?.filter(|terms| terms.policy.mode == Mode::Durable);
        if terms.is_none() {
            self.known().remove(tunnel);
        }
        terms
    }

    /// The terms of a tunnel that keeps requests, at once or not, as they are now; nothing where it keeps none, or where
    /// nobody can tell.
    pub async fn look_up(&self, tunnel: &TunnelName) -> Option<Terms> {
        self.read(tunnel).await.ok().flatten()
    }

    async fn read(&self, tunnel: &TunnelName) -> Result<Option<Terms>, edge::Error> {
        let terms = self.registry.terms_of(tunnel, unix_now()).await;
        terms.inspect_err(
            |error| tracing::debug!(tunnel_id = %tunnel, %error, "what a tunnel keeps could not be read"),
        )
    }

    /// Keeps the request, whose whole body this is; gives the answer for its sender. Only what is stored and has a run is accepted.
    ///
    /// # Errors
    ///
    /// The code to answer with: the sender is to try again.
    pub async fn keep(
        &self,
        request_id: &RequestId,
        request: &PublicRequest,
        body: &[u8],
        terms: &Terms,
        attempt: u32,
    ) -> Result<(public::Head, Vec<u8>), ErrorCode> {
        let head = Head {
            method: request.method.as_str().to_owned(),
            target: request.target.as_str().to_owned(),
            headers: request.headers.clone(),
        };
        let offer = Offer { tunnel: &request.tunnel, terms, head: &head, body, attempt };
        match self.deliveries.accept(&offer).await {
            Ok(Accepted::New(id)) => {
                tracing::info!(%request_id, delivery_id = %id, tunnel_id = %request.tunnel, attempt, "request was kept");
                Ok(answer_for(&terms.policy.answer, &id, request_id))
            }
            Ok(Accepted::Before(id)) => {
                tracing::info!(%request_id, delivery_id = %id, tunnel_id = %request.tunnel, "request was kept before");
                Ok(answer_for(&terms.policy.answer, &id, request_id))
            }
            Ok(Accepted::Unclear) => {
                tracing::info!(%request_id, tunnel_id = %request.tunnel, "the same request is being kept at this moment");
                Err(ErrorCode::EdgeBusy)
            }
            Err(error) => {
                tracing::warn!(%request_id, tunnel_id = %request.tunnel, %error, "request could not be kept");
                Err(ErrorCode::EdgeBusy)
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<TunnelName, Vec<String>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the tunnel's owner wants a request kept that was not answered for want of an agent, and how many attempts it has
/// behind it.
#[must_use]
pub fn attempts_behind(request: &PublicRequest, terms: &Terms, code: ErrorCode) -> Option<u32> {
    let is_covered = request.upgrade.is_none() && covers(request, terms);
    match code {
        ErrorCode::TunnelOffline if is_covered => Some(0),
        // It may have run: whoever says `retry_unknown` wants it made again, and the upstream is told that it is the second.
        ErrorCode::AgentLost if is_covered && terms.policy.retry_unknown => Some(1),
        _ => None,
    }
}

/// Whether the policy is about this request.
#[must_use]
pub fn covers(request: &PublicRequest, terms: &Terms) -> bool {
    terms.policy.covers(request.method.as_str(), request.target.path())
}

/// What the sender is answered. Pure.
fn answer_for(wanted: &SenderAnswer, id: &DeliveryId, request_id: &RequestId) -> (public::Head, Vec<u8>) {
    let (content_type, body) = match &wanted.body {
        Some(body) => (wanted.content_type.as_deref().unwrap_or("text/plain; charset=utf-8"), body.clone()),
        None => ("application/json", format!(r#"{{"delivery":"{id}","status":"accepted"}}"#)),
    };
    let mut headers = Headers::new();
    // 204 and 205 have no body (RFC 9110 §15.3.5, §15.3.6).
    let body = if matches!(wanted.status, 204 | 205) {
        Vec::new()
    } else {
        // The policy was checked: its media type is a header value.
        let content_type = HeaderValue::from_str(content_type);
        headers.push(header::CONTENT_TYPE, content_type.unwrap_or(HeaderValue::from_static("text/plain")));
        body.into_bytes()
    };
    if wanted.status != 204 {
        headers.push(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    }
    headers.push(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let name = HeaderValue::from_str(id.as_str()).expect("hexadecimal digits are a header value");
    headers.push(delivery::ID, name);
    answer::finish(&mut headers, request_id, None, "");
    (public::Head { status: wanted.status, headers }, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_is_told_the_name_of_its_delivery_and_what_the_policy_says() {
        let (id, request_id) = (DeliveryId::new(1, [1; 10]), RequestId::from_random([1; 16]));
        let (head, body) = answer_for(&SenderAnswer::default(), &id, &request_id);
        assert_eq!(head.status, 202);
        assert_eq!(head.headers.get("x-tunnel-delivery-id").unwrap(), id.as_str());
        assert_eq!(head.headers.get("content-length").unwrap(), &body.len().to_string());
        assert_eq!(body, format!(r#"{{"delivery":"{id}","status":"accepted"}}"#).into_bytes());
        let own = SenderAnswer { status: 200, body: Some("ok".into()), content_type: None };
        let (head, body) = answer_for(&own, &id, &request_id);
        assert_eq!((head.status, &*body), (200, &b"ok"[..]));
        assert_eq!(head.headers.get("content-type").unwrap(), "text/plain; charset=utf-8");
        let (head, body) = answer_for(&SenderAnswer { status: 204, ..own }, &id, &request_id);
        assert!(body.is_empty() && head.headers.get("content-length").is_none());
        assert!(head.headers.get("content-type").is_none());
    }
}
