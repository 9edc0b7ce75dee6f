//! Who may come in, where requests go and what is changed on the way, before anything of the upstream is touched.
//!
//! Enters: a request's head ([`asked::Asked`]), and for webhooks its body. Leaves: what the upstream is told, or an
//! [`answer::Answer`] in its place. Secrets stay on this machine.

pub(crate) mod answer;
pub(crate) mod asked;
mod basic;
pub(crate) mod body;
mod breaker;
mod cookie;
mod cors;
mod fetch;
mod files;
mod ip;
mod jwt;
mod limit;
mod oidc;
mod seen;
pub(crate) mod traffic;
pub(crate) mod visitors;
mod webhook;

use std::time::{SystemTime, UNIX_EPOCH};

use proto::{error::ErrorCode, id::RequestId};
use tokio::time::Instant;

use crate::{
    config::{
        TunnelConfig,
        address::Address,
        traffic::{Choice, RouteRule, RouteTarget, TrafficRules},
        visitors::VisitorRules,
    },
    serve::{carried::OfTunnel, upstream::Way},
};

use self::{
    answer::Answer,
    asked::Asked,
    traffic::{Member, Passage, Traffic},
    visitors::{Visitor, Visitors},
    webhook::{Signed, WebhookError},
};

pub(crate) use self::{
    ip::lets_in,
    webhook::{Signature, Webhook},
};

/// The most bytes of a body that are held until its signature has been checked.
pub(crate) const SIGNED_BODY_BYTES: u64 = 1024 * 1024;

/// What one tunnel asks of requests.
pub(crate) struct Policy {
    visitors: Visitors,
    webhooks: Vec<Webhook>,
    traffic: Traffic,
}

/// A request that was let in.
pub(crate) struct Admitted<'a> {
    pub(crate) visitor: Visitor,
    /// Its body must be signed as one of these says.
    pub(crate) signed: Option<&'a Webhook>,
    /// Where it goes.
    pub(crate) passage: Passage<'a>,
}

impl Policy {
    /// What a tunnel's configuration asks; `None` for nothing. Its upstreams are spoken to in this `way`, and `member` is
    /// one of a route.
    pub(crate) fn new<E>(
        config: &TunnelConfig,
        way: &Way,
        carried: OfTunnel<'_>,
        member: impl FnMut(&Address, &RouteRule) -> Result<Member, E>,
    ) -> Result<Option<Self>, E> {
        let TunnelConfig { visitors, webhooks, traffic, .. } = config;
        if *visitors == VisitorRules::ANYBODY && webhooks.is_empty() && *traffic == TrafficRules::NOTHING {
            return Ok(None);
        }
        Ok(Some(Self {
            traffic: Traffic::new(config, way, carried, member)?,
            visitors: Visitors::new(&config.name, visitors, carried),
            webhooks: webhooks.iter().map(|rule| Webhook::new(rule.clone(), carried)).collect(),
        }))
    }

    /// Where requests go and what is changed.
    pub(crate) const fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The page that browsers get where the upstream did not answer.
    pub(crate) fn error_page(&self, code: ErrorCode) -> Option<&str> {
        self.traffic.error_page(code)
    }

    /// Lets a request in by its head, or answers it. `body_bytes` is what its body was announced to have, `None` where nobody
    /// knows yet; `now` the Unix time in seconds by which tokens are judged.
    ///
    /// # Cancel safety
    ///
    /// As [`Visitors::admit`].
    pub(crate) async fn admit<'a>(
        &'a self,
        asked: &Asked<'_>,
        request_id: &RequestId,
        body_bytes: Option<u64>,
        now: u64,
    ) -> Result<Admitted<'a>, Answer> {
        self.visitors.address(asked)?;
        let choice = self.traffic.enter(asked, Instant::now())?;
        let visitor = self.visitors.admit(asked, self.traffic.cors(), now).await?;
        let signed = self.webhooks.iter().find(|webhook| webhook.covers(asked.target.path()));
        if signed.is_some() && body_bytes.is_some_and(|bytes| bytes > SIGNED_BODY_BYTES) {
            return Err(Answer::refusal(ErrorCode::WebhookTooLarge));
        }
        if let (Some(_), Choice::Route(_, route)) = (signed, choice)
            && !matches!(route.target, RouteTarget::Upstreams(..))
        {
            // Its body would never be looked at.
            return Err(Answer::refusal(ErrorCode::WebhookRefused));
        }
        let user = visitor.user.as_deref();
        let passage = self.traffic.lead(choice, asked, user, request_id, body_bytes).await?;
        Ok(Admitted { visitor, signed, passage })
    }
}

impl Webhook {
    /// Checks the whole body of a request that this rule covers; `now` is the Unix time in seconds at which it came, and
    /// `is_again` says that it may have been let in before.
    pub(crate) fn check(
        &self,
        asked: &Asked<'_>,
        body: &[u8],
        now: u64,
        is_again: bool,
    ) -> Result<Signature, WebhookError> {
        let url = asked.url().unwrap_or_default();
        let signed = Signed { headers: asked.headers, url: &url, body, now, is_again };
        self.verify(&signed)
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
