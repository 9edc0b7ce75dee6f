//! Who may come in, before anything of the upstream is touched.
//!
//! Enters: a request's head ([`asked::Asked`]), and for webhooks its body. Leaves: what the upstream is told, or an
//! [`answer::Answer`] in its place. Secrets stay on this machine.

pub(crate) mod answer;
pub(crate) mod asked;
mod basic;
mod cookie;
mod fetch;
mod ip;
mod jwt;
mod oidc;
mod seen;
pub(crate) mod visitors;
mod webhook;

use std::time::{SystemTime, UNIX_EPOCH};

use proto::error::ErrorCode;

use crate::config::TunnelConfig;

use self::{
    answer::Answer,
    asked::Asked,
    visitors::{Visitor, Visitors},
    webhook::Signed,
};

pub(crate) use self::webhook::{Delivery, Webhook};

/// The most bytes of a body that are held until its signature has been checked.
pub(crate) const SIGNED_BODY_BYTES: u64 = 1024 * 1024;

/// What one tunnel asks of requests.
pub(crate) struct Policy {
    visitors: Visitors,
    webhooks: Vec<Webhook>,
}

/// A request that was let in.
pub(crate) struct Admitted<'a> {
    pub(crate) visitor: Visitor,
    /// Its body must be signed as one of these says.
    pub(crate) signed: Option<&'a Webhook>,
}

impl Policy {
    /// What a tunnel's configuration asks; `None` for nothing.
    pub(crate) fn new(config: &TunnelConfig, before: Option<&Self>) -> Option<Self> {
        if config.visitors == crate::config::visitors::VisitorRules::ANYBODY && config.webhooks.is_empty() {
            return None;
        }
        let before_visitors = before.map(|before| &before.visitors);
        Some(Self {
            visitors: Visitors::new(&config.name, &config.visitors, before_visitors),
            webhooks: config
                .webhooks
                .iter()
                .map(|rule| {
                    let same =
                        before.and_then(|before| before.webhooks.iter().find(|old| old.rule() == rule));
                    same.map_or_else(|| Webhook::new(rule.clone()), Webhook::again)
                })
                .collect(),
        })
    }

    /// Lets a request in by its head, or answers it. `body_bytes` is what its body was announced to have.
    ///
    /// # Cancel safety
    ///
    /// As [`Visitors::admit`].
    pub(crate) async fn admit(&self, asked: &Asked<'_>, body_bytes: u64) -> Result<Admitted<'_>, Answer> {
        let visitor = self.visitors.admit(asked, unix_now()).await?;
        let signed = self.webhooks.iter().find(|webhook| webhook.covers(asked.target.path()));
        if signed.is_some() && body_bytes > SIGNED_BODY_BYTES {
            return Err(Answer::refusal(ErrorCode::WebhookTooLarge));
        }
        Ok(Admitted { visitor, signed })
    }
}

impl Webhook {
    /// Checks the whole body of a request that this rule covers.
    pub(crate) fn check(&self, asked: &Asked<'_>, body: &[u8]) -> Result<Delivery, Answer> {
        let url = asked.url().unwrap_or_default();
        let signed = Signed { headers: asked.headers, url: &url, body, now: unix_now() };
        self.verify(&signed).map_err(|error| {
            tracing::info!("a webhook was refused: {error}");
            Answer::refusal(ErrorCode::WebhookRefused)
        })
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
