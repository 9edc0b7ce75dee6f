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
    serve::{
        carried::OfTunnel,
        policy::fetch::{Fetch, Remote},
    },
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
    Elsewhere(Arc<Remote<PublicKeys>>),
}

impl Bearer {
    /// What was fetched from the same address is known.
    pub(crate) fn new(rule: BearerRule, carried: OfTunnel<'_>) -> Self {
        let keys = match &rule.keys {
            // The configuration was refused without a key; none believes nothing.
            KeySource::Set(text) => Keys::Here(PublicKeys::parse(text.as_bytes()).unwrap_or_default()),
            KeySource::Url { url, certificates } => {
                let settings = (url.clone(), certificates.clone());
                Keys::Elsewhere(carried.state(settings, |(url, certificates)| {
                    Remote::new(url.clone(), Arc::new(Fetch::new(certificates.clone())), read_keys)
                }))
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

/// Verifies a token with keys that are fetched; `None` where there are none. What none of the known keys has signed may
/// be signed with a new one: keys without an id, or with the id of the one before, are known by nothing else.
pub(crate) async fn verify_with(
    keys: &Remote<PublicKeys>,
    token: &str,
    expected: &Expected,
    now: u64,
) -> Option<Result<serde_json::Value, TokenFault>> {
    let verified = keys.get(false).await?.verify(token, expected, now);
    if !matches!(verified, Err(TokenFault::UnknownKey | TokenFault::Signature)) {
        return Some(verified);
    }
    Some(keys.get(true).await?.verify(token, expected, now))
}

/// Reads a fetched key set.
pub(crate) fn read_keys(text: &[u8]) -> Result<PublicKeys, String> {
    PublicKeys::parse(text).map_err(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use jsonwebtoken::{Algorithm, Header, encode};
    use serde_json::{Value, json};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        identity::{
            Algorithm as KeyKind,
            public_keys::tests::{NOW_TO, Signer},
        },
        serve::carried::Carried,
    };

    /// A key set at an address, that can be replaced; and how often it was fetched.
    async fn published() -> (String, Arc<Mutex<String>>, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let (set, fetches) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicUsize::new(0)));
        let (said, counted) = (Arc::clone(&set), Arc::clone(&fetches));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                counted.fetch_add(1, Ordering::Relaxed);
                let set = said.lock().unwrap().clone();
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{set}", set.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (url, set, fetches)
    }

    #[tokio::test]
    async fn keys_that_are_replaced_under_the_same_id_or_none_are_fetched_anew_and_not_too_often() {
        for id in [None, Some("signing")] {
            let (url, set, fetches) = published().await;
            let (old, new) = (Signer::new(KeyKind::Es256), Signer::new(KeyKind::Es256));
            let publish = |signer: &Signer| {
                let mut keys: Value = serde_json::from_str(&signer.jwks).unwrap();
                keys["keys"][0].as_object_mut().unwrap().remove("kid");
                if let Some(id) = id {
                    keys["keys"][0]["kid"] = json!(id);
                }
                *set.lock().unwrap() = keys.to_string();
            };
            let shown = |signer: &Signer| -> Headers {
                let header = Header { kid: id.map(str::to_owned), ..Header::new(Algorithm::ES256) };
                let claims = json!({ "aud": "me", "sub": "ann", "exp": NOW_TO });
                let token = format!("Bearer {}", encode(&header, &claims, &signer.key).unwrap());
                [(header::AUTHORIZATION, token.try_into().unwrap())].into_iter().collect()
            };
            let rule = BearerRule {
                keys: KeySource::Url { url: url.parse().unwrap(), certificates: None },
                issuer: None,
                audience: vec!["me".to_owned()],
                algorithms: vec![Algorithm::ES256],
                claims: Vec::new(),
                user_claim: "sub".to_owned(),
                except: Vec::new(),
            };
            let bearer = Bearer::new(rule, Carried::default().of(&"web".parse().unwrap()));
            publish(&old);
            let is = async |signer| bearer.check(&shown(signer), 0).await;
            assert_eq!(is(&old).await, Shown::User("ann".to_owned()));
            publish(&new);
            // Whoever sends what nobody has signed has nothing fetched for it until half a minute is over.
            for _ in 0..3 {
                assert_eq!(is(&new).await, Shown::Wrong(TokenFault::Signature));
            }
            assert_eq!(fetches.load(Ordering::Relaxed), 1);
            let Keys::Elsewhere(remote) = &bearer.keys else { panic!("they are at an address") };
            remote.forget_attempts();
            assert_eq!(is(&new).await, Shown::User("ann".to_owned()), "{id:?}");
            for _ in 0..3 {
                assert_eq!(is(&old).await, Shown::Wrong(TokenFault::Signature));
            }
            assert_eq!(fetches.load(Ordering::Relaxed), 2);
        }
    }
}
