//! The keys that may sign agent tokens: a JWK set or a secret enters, keys by their id leave.
//!
//! Each key knows its one algorithm. A token names a key and never an algorithm, so a token
//! cannot turn a public key into an HMAC secret.

use std::collections::{BTreeMap, btree_map::Entry};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose::URL_SAFE_NO_PAD},
};
use jsonwebtoken::{Algorithm, DecodingKey};

use crate::json::{Json, Object};

/// The key id under which tokens name the shared secret.
pub const SECRET_KEY_ID: &str = "hs256";

/// The least number of bytes in the shared secret: as many as SHA-256 yields (RFC 7518 §3.2).
pub const SECRET_BYTES: usize = 32;

/// The most bytes of a JWK set.
pub const JWKS_BYTES: usize = 256 * 1024;

/// The most bytes of a key id.
pub const KEY_ID_BYTES: usize = 128;

/// Moduli below are within reach of factoring, moduli above only cost time
/// (NIST SP 800-57 part 1, table 2, calls 2048 bits the least acceptable).
const RSA_MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// Why keys are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a JWK set at all.
    #[error("not a JWK set: an object with an array \"keys\" of objects, and no member twice")]
    Malformed,
    /// Larger than [`JWKS_BYTES`].
    #[error("the JWK set is larger than {JWKS_BYTES} bytes")]
    TooLarge,
    /// It holds a private or secret key, which then has been published.
    #[error("the JWK set holds a private or secret key: replace that key")]
    Private,
    /// Two usable keys have one id.
    #[error("two keys have the same id")]
    Duplicate,
    /// None of the keys can be used here.
    #[error(
        "the JWK set has no usable key (Ed25519, P-256, or RSA of at least 2048 bits, each with a \"kid\")"
    )]
    Empty,
    /// The secret is not base64.
    #[error("the secret is not base64")]
    SecretEncoding,
    /// The secret is too short to be safe.
    #[error("the secret has fewer than {SECRET_BYTES} bytes")]
    SecretTooShort,
}

/// A key with the only algorithm it is used for.
#[derive(Debug, Clone)]
pub struct Key {
    pub(crate) algorithm: Algorithm,
    pub(crate) decoding: DecodingKey,
}

/// Keys by their ids.
#[derive(Debug, Clone, Default)]
pub struct KeySet(BTreeMap<String, Key>);

impl KeySet {
    /// Reads a JWK set (RFC 7517 §5). Keys of other kinds, for other uses or without an id are left out.
    ///
    /// # Errors
    ///
    /// [`KeyError`] when the set is ambiguous, gives away a private key, or has nothing to use.
    pub fn from_jwks(text: &[u8]) -> Result<Self, KeyError> {
        if text.len() > JWKS_BYTES {
            return Err(KeyError::TooLarge);
        }
        let mut set = Json::object(text).ok_or(KeyError::Malformed)?;
        let Some(Json::Array(jwks)) = set.remove("keys") else { return Err(KeyError::Malformed) };
        let mut keys = Self::default();
        for jwk in jwks {
            let jwk = jwk.into_object().ok_or(KeyError::Malformed)?;
            if ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].iter().any(|name| jwk.contains_key(*name)) {
                return Err(KeyError::Private);
            }
            if let Some((id, key)) = usable_key(&jwk) {
                keys.add(id, key)?;
            }
        }
        if keys.0.is_empty() { Err(KeyError::Empty) } else { Ok(keys) }
    }

    /// Adds the shared secret, in base64, under [`SECRET_KEY_ID`].
    ///
    /// # Errors
    ///
    /// [`KeyError`] when it is no base64, too short, or its id is taken.
    pub fn add_secret(&mut self, secret: &str) -> Result<(), KeyError> {
        let engine = GeneralPurpose::new(
            &STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let secret = engine.decode(secret.trim()).map_err(|_| KeyError::SecretEncoding)?;
        if secret.len() < SECRET_BYTES {
            return Err(KeyError::SecretTooShort);
        }
        let key = Key { algorithm: Algorithm::HS256, decoding: DecodingKey::from_secret(&secret) };
        self.add(SECRET_KEY_ID.into(), key)
    }

    /// The key with this id.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Key> {
        self.0.get(id)
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// This set together with `other`.
    ///
    /// # Errors
    ///
    /// [`KeyError::Duplicate`] when an id is in both.
    pub(crate) fn merged(mut self, other: &Self) -> Result<Self, KeyError> {
        for (id, key) in &other.0 {
            self.add(id.clone(), key.clone())?;
        }
        Ok(self)
    }

    fn add(&mut self, id: String, key: Key) -> Result<(), KeyError> {
        match self.0.entry(id) {
            Entry::Occupied(_) => Err(KeyError::Duplicate),
            Entry::Vacant(entry) => {
                entry.insert(key);
                Ok(())
            }
        }
    }
}

/// Takes the key if it is public, meant for signatures, named, and of a kind that is used here.
fn usable_key(jwk: &Object) -> Option<(String, Key)> {
    let text = |name: &str| jwk.get(name).and_then(Json::as_text);
    let bytes = |name: &str| text(name).and_then(|value| URL_SAFE_NO_PAD.decode(value).ok());
    let coordinate = |name: &str| bytes(name).filter(|value| value.len() == 32);
    // A member that is there and says something else, or nothing that can be read, leaves the key out.
    let says = |name: &str, wanted: &str| jwk.get(name).is_none_or(|value| value.as_text() == Some(wanted));

    let id = text("kid").filter(|id| !id.is_empty() && id.len() <= KEY_ID_BYTES)?;
    let verifies =
        jwk.get("key_ops").is_none_or(|ops| ops.as_texts().is_some_and(|ops| ops.contains(&"verify")));
    if !says("use", "sig") || !verifies {
        return None;
    }
    let (name, algorithm, decoding) = match (text("kty")?, text("crv")) {
        ("OKP", Some("Ed25519")) => ("EdDSA", Algorithm::EdDSA, DecodingKey::from_ed_der(&coordinate("x")?)),
        ("EC", Some("P-256")) => {
            // The uncompressed point of SEC 1 §2.3.3.
            let point = [&[4][..], &coordinate("x")?, &coordinate("y")?].concat();
            ("ES256", Algorithm::ES256, DecodingKey::from_ec_der(&point))
        }
        ("RSA", None) => {
            let modulus = bytes("n").filter(|n| RSA_MODULUS_BYTES.contains(&n.len()) && n[0] >= 0x80)?;
            // 3 is the least exponent that signs anything; with 1 every message is its own signature.
            let exponent =
                bytes("e").filter(|e| e.len() <= 4 && *e != [1] && e.last().is_some_and(|b| b % 2 == 1))?;
            ("RS256", Algorithm::RS256, DecodingKey::from_rsa_raw_components(&modulus, &exponent))
        }
        _ => return None,
    };
    says("alg", name).then(|| (id.into(), Key { algorithm, decoding }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

    fn ed(extra: &str) -> String {
        format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{X}"{extra}}}"#)
    }

    fn set(keys: &[String]) -> Result<KeySet, KeyError> {
        KeySet::from_jwks(format!(r#"{{"keys":[{}]}}"#, keys.join(",")).as_bytes())
    }

    #[test]
    fn keys_for_something_else_are_left_out() {
        let good = ed(r#","kid":"a","use":"sig","alg":"EdDSA","key_ops":["verify"]"#);
        assert_eq!(set(std::slice::from_ref(&good)).unwrap().len(), 1);
        for other in [
            ed(""),
            ed(r#","kid":"""#),
            ed(r#","kid":7"#),
            ed(r#","kid":"b","use":"enc""#),
            ed(r#","kid":"b","use":null"#),
            ed(r#","kid":"b","key_ops":["sign"]"#),
            ed(r#","kid":"b","key_ops":"verify""#),
            ed(r#","kid":"b","alg":"HS256""#),
            r#"{"kty":"OKP","crv":"X25519","kid":"b","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#
                .into(),
            r#"{"kty":"OKP","crv":"Ed25519","kid":"b","x":"AAAA"}"#.into(),
            r#"{"kty":"EC","crv":"P-384","kid":"b","x":"AAAA","y":"AAAA"}"#.into(),
            r#"{"kty":"EC","crv":"P-256","kid":"b","x":"AAAA"}"#.into(),
            r#"{"kty":"RSA","kid":"b","n":"AQAB","e":"AQAB"}"#.into(),
            format!(r#"{{"kty":"RSA","kid":"b","n":"{}","e":"AQ"}}"#, URL_SAFE_NO_PAD.encode([0xff; 256])),
            format!(r#"{{"kty":"RSA","kid":"b","n":"{}","e":"Ag"}}"#, URL_SAFE_NO_PAD.encode([0xff; 256])),
            format!(r#"{{"kty":"RSA","kid":"b","n":"{}","e":"AQAB"}}"#, URL_SAFE_NO_PAD.encode([0xff; 128])),
        ] {
            assert_eq!(set(&[good.clone(), other.clone()]).map(|keys| keys.len()), Ok(1), "{other}");
            assert_eq!(set(&[other]).err(), Some(KeyError::Empty));
        }
    }

    #[test]
    fn ambiguous_and_private_sets_are_refused_whole() {
        let key = ed(r#","kid":"a""#);
        assert_eq!(set(&[key.clone(), key.clone()]).err(), Some(KeyError::Duplicate));
        assert_eq!(set(&[key.clone(), ed(r#","kid":"b","d":"AA""#)]).err(), Some(KeyError::Private));
        assert_eq!(
            set(&[key.clone(), r#"{"kty":"oct","kid":"c","k":"AA"}"#.into()]).err(),
            Some(KeyError::Private)
        );
        assert_eq!(set(&[ed(r#","kid":"a","kid":"b""#)]).err(), Some(KeyError::Malformed));
        for text in ["", "[]", "{}", r#"{"keys":{}}"#, r#"{"keys":[1]}"#] {
            assert_eq!(KeySet::from_jwks(text.as_bytes()).err(), Some(KeyError::Malformed), "{text}");
        }
        assert_eq!(KeySet::from_jwks(&vec![b' '; JWKS_BYTES + 1]).err(), Some(KeyError::TooLarge));
    }

    #[test]
    fn a_secret_needs_32_bytes_of_base64() {
        let add = |text: &str| KeySet::default().add_secret(text);
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        assert_eq!(add(&encode(&[7; 32])), Ok(()));
        assert_eq!(add(encode(&[7; 32]).trim_end_matches('=')), Ok(()));
        assert_eq!(add(&encode(&[7; 31])), Err(KeyError::SecretTooShort));
        assert_eq!(add(""), Err(KeyError::SecretTooShort));
        assert_eq!(add("correct horse battery staple"), Err(KeyError::SecretEncoding));
        let mut taken = set(&[ed(r#","kid":"hs256""#)]).unwrap();
        assert_eq!(taken.add_secret(&encode(&[7; 32])), Err(KeyError::Duplicate));
    }

    #[test]
    fn debug_shows_no_secret() {
        let mut keys = KeySet::default();
        keys.add_secret(&base64::engine::general_purpose::STANDARD.encode([77; 32])).unwrap();
        assert!(!format!("{keys:?}").contains("77"));
    }
}
