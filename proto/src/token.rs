//! The task token of a live request: what `ingress` hands out and `response` takes back.
//!
//! A token names the request, the mailbox its answer goes to, the tunnel and the second in which it
//! ends, under an HMAC-SHA256. It is opaque to the agent, which returns it as it came. Two keys may
//! be valid at a time, so that a key can be replaced without failing a request.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{
    id::{MailboxId, RequestId, TunnelName},
    limits::TOKEN_BYTES,
};

const VERSION: u8 = 1;
const MAC_BYTES: usize = 32;

/// The least number of bytes in a key: as many as the MAC has (RFC 2104 §3).
pub const KEY_BYTES: usize = 32;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The public request to be answered.
    pub request_id: RequestId,
    /// Where the answer goes.
    pub mailbox: MailboxId,
    /// The tunnel the request came in by: only a connection that may serve it may answer.
    pub tunnel: TunnelName,
    /// The first second (Unix time) in which the token is no longer valid.
    pub expires_at: u64,
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not something this edge ever made.
    #[error("token is malformed")]
    Malformed,
    /// No valid key makes this MAC.
    #[error("token is not signed by a valid key")]
    Forged,
    /// It was valid once.
    #[error("token has expired")]
    Expired,
}

/// A key is too short to be safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token key needs at least {KEY_BYTES} bytes")]
pub struct WeakKey;

/// The keys of an edge: the one that signs, and the one it replaced, if any.
#[derive(Clone)]
pub struct TokenKeys {
    signing: Hmac<Sha256>,
    previous: Option<Hmac<Sha256>>,
}

impl TokenKeys {
    /// Takes the signing key, and the one before it for as long as its tokens may be under way.
    ///
    /// # Errors
    ///
    /// [`WeakKey`] when either is shorter than [`KEY_BYTES`].
    pub fn new(signing: &[u8], previous: Option<&[u8]>) -> Result<Self, WeakKey> {
        let key = |bytes: &[u8]| {
            if bytes.len() < KEY_BYTES {
                return Err(WeakKey);
            }
            Ok(Hmac::<Sha256>::new_from_slice(bytes).expect("HMAC takes a key of any length"))
        };
        Ok(Self { signing: key(signing)?, previous: previous.map(key).transpose()? })
    }

    /// Signs `claims`: at most [`TOKEN_BYTES`] of `A-Z a-z 0-9 - _`.
    #[must_use]
    pub fn mint(&self, claims: &Claims) -> String {
        let (mailbox, tunnel) = (claims.mailbox.as_str(), claims.tunnel.as_str());
        let mut bytes = Vec::with_capacity(128);
        bytes.push(VERSION);
        bytes.extend_from_slice(&claims.expires_at.to_be_bytes());
        bytes.extend_from_slice(claims.request_id.as_str().as_bytes());
        for text in [mailbox, tunnel] {
            bytes.push(u8::try_from(text.len()).expect("ids are shorter than 256 bytes"));
            bytes.extend_from_slice(text.as_bytes());
        }
        let mac = self.signing.clone().chain_update(&bytes).finalize().into_bytes();
        bytes.extend_from_slice(&mac);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Checks a token at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`TokenError`]; nothing of a token that is not signed by a valid key is looked at.
    pub fn verify(&self, token: &str, now: u64) -> Result<Claims, TokenError> {
        if token.len() > TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| TokenError::Malformed)?;
        let (payload, mac) = bytes.split_last_chunk::<MAC_BYTES>().ok_or(TokenError::Malformed)?;
        // `verify_slice` compares in constant time.
        let signed_by = |key: &Hmac<Sha256>| key.clone().chain_update(payload).verify_slice(mac).is_ok();
        if !signed_by(&self.signing) && !self.previous.as_ref().is_some_and(signed_by) {
            return Err(TokenError::Forged);
        }
        let claims = parse(payload).ok_or(TokenError::Malformed)?;
        if now >= claims.expires_at {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKeys").field("previous", &self.previous.is_some()).finish_non_exhaustive()
    }
}

fn parse(payload: &[u8]) -> Option<Claims> {
    let (&VERSION, rest) = payload.split_first()? else { return None };
    let (expires_at, rest) = rest.split_first_chunk::<8>()?;
    let (request_id, mut rest) = rest.split_first_chunk::<32>()?;
    let mut text = || {
        let (&len, tail) = rest.split_first()?;
        let (text, tail) = tail.split_at_checked(usize::from(len))?;
        rest = tail;
        std::str::from_utf8(text).ok()
    };
    let claims = Claims {
        request_id: std::str::from_utf8(request_id).ok()?.parse().ok()?,
        mailbox: text()?.parse().ok()?,
        tunnel: text()?.parse().ok()?,
        expires_at: u64::from_be_bytes(*expires_at),
    };
    rest.is_empty().then_some(claims)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(signing: u8, previous: Option<u8>) -> TokenKeys {
        TokenKeys::new(&[signing; 32], previous.map(|b| [b; 32]).as_ref().map(|k| &k[..])).unwrap()
    }

    fn claims() -> Claims {
        Claims {
            request_id: RequestId::from_random([7; 16]),
            mailbox: "m-12".parse().unwrap(),
            tunnel: "web".parse().unwrap(),
            expires_at: 1_000,
        }
    }

    #[test]
    fn a_token_is_valid_until_the_second_it_ends_in() {
        let token = keys(1, None).mint(&claims());
        assert_eq!(keys(1, None).verify(&token, 999), Ok(claims()));
        assert_eq!(keys(1, None).verify(&token, 1_000), Err(TokenError::Expired));
    }

    #[test]
    fn a_replaced_key_is_accepted_and_an_older_one_is_not() {
        let token = keys(1, None).mint(&claims());
        assert!(keys(2, Some(1)).verify(&token, 0).is_ok());
        assert_eq!(keys(3, Some(2)).verify(&token, 0), Err(TokenError::Forged));
    }

    #[test]
    fn short_keys_are_refused() {
        assert_eq!(TokenKeys::new(&[1; 31], None).err(), Some(WeakKey));
        assert_eq!(TokenKeys::new(&[1; 32], Some(&[])).err(), Some(WeakKey));
    }

    #[test]
    fn the_longest_token_is_within_its_limit() {
        let longest = Claims {
            mailbox: "m".repeat(40).parse().unwrap(),
            tunnel: "t".repeat(63).parse().unwrap(),
            expires_at: u64::MAX,
            ..claims()
        };
        let token = keys(1, None).mint(&longest);
        assert!(token.len() <= TOKEN_BYTES, "{}", token.len());
        assert_eq!(keys(1, None).verify(&token, 0), Ok(longest));
    }

    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", keys(7, Some(7))).contains('7'));
    }

    proptest! {
        #[test]
        fn any_change_to_a_token_is_refused(position in 0usize..200, change in 1u8..=255) {
            let token = keys(1, None).mint(&claims());
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
            let position = position % bytes.len();
            bytes[position] ^= change;
            prop_assert!(keys(1, None).verify(&URL_SAFE_NO_PAD.encode(bytes), 0).is_err());
        }

        #[test]
        fn any_text_is_refused_without_a_panic(text in ".{0,600}") {
            prop_assert!(keys(1, None).verify(&text, 0).is_err());
        }
    }
}
