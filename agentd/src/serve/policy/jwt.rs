//! Tokens that visitors show (`bearer`, RFC 6750), verified with the keys of a file or of an address.

use std::sync::Arc;

use http::header;
use proto::header::Headers;

use crate::{
    config::{
        paths::PathPattern,
        visitors::{BearerRule, KeySource},
    },
    identity::public_keys::{Expected, PublicKeys, TokenFault, texts_of},
    serve::policy::fetch::{Fetch, Remote},
};

/// What became of a visitor's token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// It is believed; whose it is.
    User(String),
    /// There is none.
    Nothing,
    /// It is not believed.
    Wrong(TokenFault),
    /// There are no keys to verify it with.
    NoKeys,
}

/// The tokens of one tunnel.
pub(crate) struct Bearer {
    rule: BearerRule,
    expected: Expected,
    keys: Keys,
}

enum Keys {
    Here(PublicKeys),
    Elsewhere(Remote<PublicKeys>),
}

impl Bearer {
    /// Nothing is fetched yet.
    pub(crate) fn new(rule: BearerRule) -> Self {
        let keys = match &rule.keys {
            // The configuration was refused without a key; none believes nothing.
            KeySource::Set(text) => Keys::Here(PublicKeys::parse(text.as_bytes()).unwrap_or_default()),
            KeySource::Url { url, ca_file } => {
                Keys::Elsewhere(Remote::new(url.clone(), Arc::new(Fetch::new(ca_file.clone())), read_keys))
            }
        };
        let expected = Expected::new(&rule.algorithms, rule.issuer.as_deref(), &rule.audience);
        Self { rule, expected, keys }
    }

    /// Where it does not hold.
    pub(crate) fn except(&self) -> &[PathPattern] {
        &self.rule.except
    }

    /// Looks at the token of a request that came at `now`, the Unix time in seconds.
    pub(crate) async fn check(&self, headers: &Headers, now: u64) -> Shown {
        let Some(token) = token(headers) else { return Shown::Nothing };
        let verified = match &self.keys {
            Keys::Here(keys) => keys.verify(token, &self.expected, now),
            Keys::Elsewhere(remote) => match verify_with(remote, token, &self.expected, now).await {
                Some(verified) => verified,
                None => return Shown::NoKeys,
            },
        };
        let claims = match verified {
            Ok(claims) => claims,
            Err(fault) => return Shown::Wrong(fault),
        };
        let has = |(name, wanted): &(String, Vec<String>)| {
            texts_of(&claims, name).iter().any(|text| wanted.contains(text))
        };
        if !self.rule.claims.iter().all(has) {
            return Shown::Wrong(TokenFault::Claim);
        }
        Shown::User(texts_of(&claims, &self.rule.user_claim).into_iter().next().unwrap_or_default())
    }
}

/// The token of the one `authorization` field with the scheme `Bearer`.
fn token(headers: &Headers) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION);
    let value = values.next()?;
    if values.next().is_some() {
        return None;
    }
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Verifies a token with keys that are fetched; `None` where there are none. A key that is not known may be new.
pub(crate) async fn verify_with(
    keys: &Remote<PublicKeys>,
    token: &str,
    expected: &Expected,
    now: u64,
) -> Option<Result<serde_json::Value, TokenFault>> {
    let verified = keys.get(false).await?.verify(token, expected, now);
    if verified != Err(TokenFault::UnknownKey) {
        return Some(verified);
    }
    Some(keys.get(true).await?.verify(token, expected, now))
}

/// Reads a fetched key set.
pub(crate) fn read_keys(text: &[u8]) -> Result<PublicKeys, String> {
    PublicKeys::parse(text).map_err(str::to_owned)
}
