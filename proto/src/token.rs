//! The task token of a request: what the edge hands out with it and `response` takes back.
//!
//! That of a live request names the request, the mailbox its answer goes to, the tunnel and the second in which it
//! ends, under an HMAC-SHA256. That of a delivery's attempt has the run's own task token in place of a mailbox, and stands for
//! whose delivery it is. The first
//! byte tells the two apart and is signed with the rest, so neither can be made to pass for the other. A token is opaque to
//! the agent, which returns it as it came. Two keys may be valid at a time, so that a key can be replaced without failing
//! a request.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest as _, Sha256};

use crate::{
    id::{DeliveryId, MailboxId, Owner, RequestId, TunnelName},
    limits::{LIVE_TOKEN_BYTES, TASK_TOKEN_BYTES, TOKEN_BYTES},
};

/// The first byte of a live request's token.
const LIVE: u8 = 1;
/// The first byte of a delivery's token.
const DELIVERY: u8 = 2;
const MAC_BYTES: usize = 32;
const MARK_BYTES: usize = 16;

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

/// What the token of a delivery's attempt says.
#[derive(Clone, PartialEq, Eq)]
pub struct DeliveryClaims {
    /// The delivery.
    pub delivery: DeliveryId,
    /// Which of its attempts, from 1.
    pub attempt: u32,
    /// The tunnel: only a connection that may serve it may answer.
    pub tunnel: TunnelName,
    /// Whose delivery it is: only a connection of theirs may answer. Others may cover the tunnel's name as well.
    pub owner: OwnerMark,
    /// The first second (Unix time) in which the token is no longer valid.
    pub expires_at: u64,
    /// What the run waits with. Whoever has it can answer the run, so it is never shown.
    pub task_token: TaskToken,
}

impl std::fmt::Debug for DeliveryClaims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeliveryClaims")
            .field("delivery", &self.delivery)
            .field("attempt", &self.attempt)
            .field("tunnel", &self.tunnel)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Stands for an owner in a token, and beside a word of a WebSocket: owners may be longer than there is room for. As text
/// it is in hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerMark([u8; MARK_BYTES]);

impl From<&Owner> for OwnerMark {
    fn from(owner: &Owner) -> Self {
        let digest = Sha256::digest(owner.as_str());
        Self(*digest.first_chunk().expect("a digest is longer"))
    }
}

impl std::fmt::Display for OwnerMark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a run of Step Functions waits with: 1 to [`TASK_TOKEN_BYTES`] printable ASCII characters.
#[derive(Clone, PartialEq, Eq)]
pub struct TaskToken(Box<str>);

impl TaskToken {
    /// Takes a token as Step Functions gave it.
    ///
    /// # Errors
    ///
    /// [`TokenError::Malformed`] when it is empty, too long or of other characters.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let fits = (1..=TASK_TOKEN_BYTES).contains(&text.len());
        if fits && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(TokenError::Malformed)
        }
    }

    /// The token as Step Functions wants it back.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for TaskToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TaskToken(…)")
    }
}

/// A token that is valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verified {
    /// Of a live request.
    Live(Claims),
    /// Of a delivery's attempt.
    Delivery(Box<DeliveryClaims>),
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

    /// Signs `claims`: at most [`LIVE_TOKEN_BYTES`] of `A-Z a-z 0-9 - _`.
    #[must_use]
    pub fn mint(&self, claims: &Claims) -> String {
        let (mailbox, tunnel) = (claims.mailbox.as_str(), claims.tunnel.as_str());
        let mut bytes = Vec::with_capacity(128);
        bytes.push(LIVE);
        bytes.extend_from_slice(&claims.expires_at.to_be_bytes());
        bytes.extend_from_slice(claims.request_id.as_str().as_bytes());
        for text in [mailbox, tunnel] {
            bytes.push(u8::try_from(text.len()).expect("ids are shorter than 256 bytes"));
            bytes.extend_from_slice(text.as_bytes());
        }
        self.sign(bytes)
    }

    /// Signs the claims of a delivery's attempt: at most [`TOKEN_BYTES`] of `A-Z a-z 0-9 - _`.
    #[must_use]
    pub fn mint_delivery(&self, claims: &DeliveryClaims) -> String {
        let tunnel = claims.tunnel.as_str();
        let mut bytes = Vec::with_capacity(192 + claims.task_token.0.len());
        bytes.push(DELIVERY);
        bytes.extend_from_slice(&claims.expires_at.to_be_bytes());
        bytes.extend_from_slice(claims.delivery.as_str().as_bytes());
        bytes.extend_from_slice(&claims.attempt.to_be_bytes());
        bytes.extend_from_slice(&claims.owner.0);
        bytes.push(u8::try_from(tunnel.len()).expect("names are shorter than 256 bytes"));
        bytes.extend_from_slice(tunnel.as_bytes());
        bytes.extend_from_slice(claims.task_token.0.as_bytes());
        self.sign(bytes)
    }

    fn sign(&self, mut bytes: Vec<u8>) -> String {
        let mac = self.signing.clone().chain_update(&bytes).finalize().into_bytes();
        bytes.extend_from_slice(&mac);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Checks a token at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`TokenError`]; nothing of a token that is not signed by a valid key is looked at.
    pub fn verify(&self, token: &str, now: u64) -> Result<Verified, TokenError> {
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
        let (expires_at, verified) = match payload.split_first() {
            Some((&LIVE, rest)) if token.len() <= LIVE_TOKEN_BYTES => {
                parse(rest).map(|claims| (claims.expires_at, Verified::Live(claims)))
            }
            Some((&DELIVERY, rest)) => {
                parse_delivery(rest).map(|claims| (claims.expires_at, Verified::Delivery(Box::new(claims))))
            }
            _ => None,
        }
        .ok_or(TokenError::Malformed)?;
        if now >= expires_at {
            return Err(TokenError::Expired);
        }
        Ok(verified)
    }
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKeys").field("previous", &self.previous.is_some()).finish_non_exhaustive()
    }
}

fn parse(payload: &[u8]) -> Option<Claims> {
    let (expires_at, rest) = payload.split_first_chunk::<8>()?;
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

fn parse_delivery(payload: &[u8]) -> Option<DeliveryClaims> {
    let (expires_at, rest) = payload.split_first_chunk::<8>()?;
    let (delivery, rest) = rest.split_first_chunk::<32>()?;
    let (attempt, rest) = rest.split_first_chunk::<4>()?;
    let (owner, rest) = rest.split_first_chunk::<MARK_BYTES>()?;
    let (&len, rest) = rest.split_first()?;
    let (tunnel, task_token) = rest.split_at_checked(usize::from(len))?;
    Some(DeliveryClaims {
        delivery: std::str::from_utf8(delivery).ok()?.parse().ok()?,
        attempt: u32::from_be_bytes(*attempt),
        tunnel: std::str::from_utf8(tunnel).ok()?.parse().ok()?,
        owner: OwnerMark(*owner),
        expires_at: u64::from_be_bytes(*expires_at),
        task_token: TaskToken::new(std::str::from_utf8(task_token).ok()?).ok()?,
    })
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

    fn delivery() -> DeliveryClaims {
        DeliveryClaims {
            delivery: DeliveryId::new(1, [7; 10]),
            attempt: 3,
            tunnel: "web".parse().unwrap(),
            owner: OwnerMark::from(&"alice".parse().unwrap()),
            expires_at: 1_000,
            task_token: TaskToken::new("AQCEAAAAKgAAAAMAAAAA+/=").unwrap(),
        }
    }

    #[test]
    fn a_delivery_is_never_a_live_request_and_the_reverse() {
        let keys = keys(1, None);
        let (live, later) = (keys.mint(&claims()), keys.mint_delivery(&delivery()));
        assert_eq!(keys.verify(&live, 999), Ok(Verified::Live(claims())));
        assert_eq!(keys.verify(&later, 999), Ok(Verified::Delivery(Box::new(delivery()))));
        assert_eq!(keys.verify(&later, 1_000), Err(TokenError::Expired));
        for (token, other) in [(live, DELIVERY), (later, LIVE)] {
            let mut bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
            bytes[0] = other;
            assert_eq!(keys.verify(&URL_SAFE_NO_PAD.encode(&bytes), 0), Err(TokenError::Forged));
            // Even where the edge itself signed it, no claims of the one kind are claims of the other.
            bytes.truncate(bytes.len() - MAC_BYTES);
            assert_eq!(keys.verify(&keys.sign(bytes), 0), Err(TokenError::Malformed));
        }
        let unknown = keys.sign([&[3_u8][..], &[0; 64]].concat());
        assert_eq!(keys.verify(&unknown, 0), Err(TokenError::Malformed));
    }

    #[test]
    fn a_task_token_at_its_limit_is_carried_and_one_byte_more_is_none() {
        let keys = keys(1, None);
        let longest = DeliveryClaims {
            attempt: u32::MAX,
            tunnel: "t".repeat(63).parse().unwrap(),
            expires_at: u64::MAX,
            task_token: TaskToken::new(&"/".repeat(TASK_TOKEN_BYTES)).unwrap(),
            ..delivery()
        };
        let token = keys.mint_delivery(&longest);
        assert!(token.len() <= TOKEN_BYTES, "{}", token.len());
        assert_eq!(keys.verify(&token, 0), Ok(Verified::Delivery(Box::new(longest))));
        for bad in [String::new(), "/".repeat(TASK_TOKEN_BYTES + 1), "a b".into(), "ä".into()] {
            assert_eq!(TaskToken::new(&bad).err(), Some(TokenError::Malformed), "{bad}");
        }
    }

    #[test]
    fn owners_are_told_apart_whatever_their_length() {
        let mark = |owner: &str| OwnerMark::from(&owner.parse::<Owner>().unwrap());
        assert_eq!(mark("alice"), mark("alice"));
        assert_ne!(mark("alice"), mark("bob"));
        assert_ne!(mark(&"a".repeat(128)), mark(&"a".repeat(127)));
    }

    #[test]
    fn what_is_logged_of_a_delivery_has_no_task_token() {
        assert!(!format!("{:?} {:?}", delivery(), delivery().task_token).contains("AQCE"));
    }

    #[test]
    fn a_token_is_valid_until_the_second_it_ends_in() {
        let token = keys(1, None).mint(&claims());
        assert_eq!(keys(1, None).verify(&token, 999), Ok(Verified::Live(claims())));
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
        assert!(token.len() <= LIVE_TOKEN_BYTES, "{}", token.len());
        assert_eq!(keys(1, None).verify(&token, 0), Ok(Verified::Live(longest)));
    }

    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", keys(7, Some(7))).contains('7'));
    }

    proptest! {
        #[test]
        fn any_change_to_a_token_is_refused(position in 0usize..200, change in 1u8..=255) {
            for token in [keys(1, None).mint(&claims()), keys(1, None).mint_delivery(&delivery())] {
                let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
                let position = position % bytes.len();
                bytes[position] ^= change;
                prop_assert!(keys(1, None).verify(&URL_SAFE_NO_PAD.encode(bytes), 0).is_err());
            }
        }

        #[test]
        fn any_text_is_refused_without_a_panic(text in ".{0,600}") {
            prop_assert!(keys(1, None).verify(&text, 0).is_err());
        }
    }
}
