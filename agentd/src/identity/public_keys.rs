//! Tokens of others (JWT, RFC 7519), verified with public keys (JWK set, RFC 7517). Pure.
//!
//! Only signatures that a public key verifies are known here: a set may hold secret keys or keys for encryption,
//! and a token may name `none`; neither is ever used.

use std::collections::HashSet;

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};
use serde_json::Value;

/// No token is longer.
const MOST_TOKEN_BYTES: usize = 16 * 1024;

/// With how many keys a token that names none is tried.
const MOST_KEYS: usize = 32;

/// How far the issuer's clock may be from ours.
const LEEWAY_SECS: u64 = 60;

/// The usable keys of a set.
#[derive(Clone, Default)]
pub(crate) struct PublicKeys(Vec<PublicKey>);

#[derive(Clone)]
struct PublicKey {
    id: Option<String>,
    /// What it may be used for.
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

/// What a token must say.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    validation: Validation,
}

/// Why a token is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenFault {
    #[error("it is no signed token")]
    Malformed,
    #[error("its signature is of a kind that is not taken here")]
    Algorithm,
    #[error("it is signed with a key that is not in the set")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet")]
    Early,
    #[error("it is for somebody else")]
    Audience,
    #[error("it is from somebody else")]
    Issuer,
    #[error("a claim is missing or another")]
    Claim,
}

impl Expected {
    /// A token of `issuer` for one of `audience`, with one of these signatures.
    pub(crate) fn new(algorithms: &[Algorithm], issuer: Option<&str>, audience: &[String]) -> Self {
        let mut validation = Validation::new(algorithms.first().copied().unwrap_or(Algorithm::RS256));
        validation.algorithms = algorithms.to_vec();
        // Times are compared here: the library would read the clock.
        validation.validate_exp = false;
        validation.aud = Some(audience.iter().cloned().collect());
        validation.iss = issuer.map(|issuer| HashSet::from([issuer.to_owned()]));
        // What is not required is not looked at where it is missing.
        validation.set_required_spec_claims(&["exp", "aud"]);
        if issuer.is_some() {
            validation.set_required_spec_claims(&["exp", "aud", "iss"]);
        }
        Self { validation }
    }
}

impl PublicKeys {
    /// Reads a JWK set. Keys that cannot be used are left out.
    ///
    /// # Errors
    ///
    /// A sentence for the user, also where no key is left.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, &'static str> {
        const NO_SET: &str = "it is no JWK set: {\"keys\": […]} is wanted";
        let set: Value = serde_json::from_slice(text).map_err(|_| NO_SET)?;
        let keys = set.get("keys").and_then(Value::as_array).ok_or(NO_SET)?;
        let keys: Vec<_> = keys.iter().filter_map(PublicKey::from_value).collect();
        if keys.is_empty() {
            return Err("it holds no public key for signatures (RSA, P-256, P-384 or Ed25519)");
        }
        Ok(Self(keys))
    }

    /// The claims of a token that is signed with one of these keys, says what is expected and is valid at `now`, the Unix
    /// time in seconds.
    ///
    /// # Errors
    ///
    /// [`TokenFault`].
    pub(crate) fn verify(&self, token: &str, expected: &Expected, now: u64) -> Result<Value, TokenFault> {
        if token.len() > MOST_TOKEN_BYTES {
            return Err(TokenFault::Malformed);
        }
        let header = decode_header(token).map_err(|error| match error.kind() {
            // A signature that the library does not know is no known name.
            ErrorKind::Json(_) | ErrorKind::InvalidAlgorithmName => TokenFault::Algorithm,
            _ => TokenFault::Malformed,
        })?;
        // RFC 7515 §4.1.11: what must be understood is not.
        if header.crit.is_some() {
            return Err(TokenFault::Malformed);
        }
        if !expected.validation.algorithms.contains(&header.alg) {
            return Err(TokenFault::Algorithm);
        }
        let mut validation = expected.validation.clone();
        validation.algorithms = vec![header.alg];
        let fits = |key: &&PublicKey| {
            key.algorithms.contains(&header.alg) && (header.kid.is_none() || header.kid == key.id)
        };
        let mut fault = TokenFault::UnknownKey;
        for key in self.0.iter().filter(fits).take(MOST_KEYS) {
            match decode::<Value>(token, &key.key, &validation) {
                Ok(decoded) => return is_valid_at(&decoded.claims, now).map(|()| decoded.claims),
                Err(error) => {
                    fault = match error.kind() {
                        ErrorKind::InvalidSignature => TokenFault::Signature,
                        ErrorKind::InvalidAudience => TokenFault::Audience,
                        ErrorKind::InvalidIssuer => TokenFault::Issuer,
                        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => {
                            TokenFault::Claim
                        }
                        _ => TokenFault::Malformed,
                    };
                    // With another key the signature would be wrong.
                    if fault != TokenFault::Signature {
                        return Err(fault);
                    }
                }
            }
        }
        Err(fault)
    }
}

/// Compares `exp`, which every token has, and `nbf` with the time (RFC 7519 §4.1.4 and §4.1.5).
fn is_valid_at(claims: &Value, now: u64) -> Result<(), TokenFault> {
    let time = |name| match claims.get(name) {
        None => Ok(None),
        Some(time) => time.as_f64().map(Some).ok_or(TokenFault::Claim),
    };
    if time("exp")?.ok_or(TokenFault::Claim)? < now.saturating_sub(LEEWAY_SECS) as f64 {
        return Err(TokenFault::Expired);
    }
    if time("nbf")?.is_some_and(|from| from > now.saturating_add(LEEWAY_SECS) as f64) {
        return Err(TokenFault::Early);
    }
    Ok(())
}

impl PublicKey {
    fn from_value(value: &Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
        if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption | PublicKeyUse::Other(_))) {
            return None;
        }
        let of_kind: &[Algorithm] = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => &[
                Algorithm::RS256,
                Algorithm::RS384,
                Algorithm::RS512,
                Algorithm::PS256,
                Algorithm::PS384,
                Algorithm::PS512,
            ],
            AlgorithmParameters::EllipticCurve(key) => match key.curve {
                EllipticCurve::P256 => &[Algorithm::ES256],
                EllipticCurve::P384 => &[Algorithm::ES384],
                _ => return None,
            },
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                &[Algorithm::EdDSA]
            }
            _ => return None,
        };
        let named = value.get("alg").and_then(Value::as_str);
        let algorithms: Vec<_> = of_kind
            .iter()
            .copied()
            .filter(|algorithm| named.is_none_or(|named| format!("{algorithm:?}") == named))
            .collect();
        let key = DecodingKey::from_jwk(&jwk).ok().filter(|_| !algorithms.is_empty())?;
        Some(Self { id: jwk.common.key_id, algorithms, key })
    }
}

/// What a claim says, as texts: of a list each member, of a text with blanks (as `scope` is) also each word. A
/// name with dots leads into objects, unless a claim has just that name.
pub(crate) fn texts_of(claims: &Value, name: &str) -> Vec<String> {
    let found = claims.get(name).or_else(|| name.split('.').try_fold(claims, |at, part| at.get(part)));
    let mut texts = Vec::new();
    match found {
        Some(Value::Array(members)) => texts.extend(members.iter().filter_map(text_of)),
        Some(value) => {
            let text = text_of(value);
            if let Some(text) = text.as_ref().filter(|_| matches!(name, "scope" | "scp")) {
                texts.extend(text.split(' ').map(str::to_owned));
            }
            texts.extend(text);
        }
        None => {}
    }
    texts
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;
    use crate::identity::{Algorithm as KeyKind, Keys};

    pub(crate) const NOW_TO: u64 = 4_000_000_000;
    const NOW: u64 = 2_000_000_000;

    /// A signing key with the set that verifies it.
    pub(crate) struct Signer {
        pub(crate) key: EncodingKey,
        pub(crate) jwks: String,
        pub(crate) id: String,
        pub(crate) algorithm: Algorithm,
    }

    impl Signer {
        pub(crate) fn new(kind: KeyKind) -> Self {
            let keys = Keys::generate(kind).unwrap();
            let (algorithm, key) = match kind {
                KeyKind::Eddsa => {
                    (Algorithm::EdDSA, EncodingKey::from_ed_pem(keys.pem().unwrap().as_bytes()).unwrap())
                }
                KeyKind::Es256 => {
                    (Algorithm::ES256, EncodingKey::from_ec_pem(keys.pem().unwrap().as_bytes()).unwrap())
                }
            };
            Self { key, jwks: keys.jwks(), id: keys.id().to_owned(), algorithm }
        }

        pub(crate) fn sign(&self, claims: &Value) -> String {
            let header = Header { kid: Some(self.id.clone()), ..Header::new(self.algorithm) };
            encode(&header, claims, &self.key).unwrap()
        }
    }

    fn expected() -> Expected {
        let all = [Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256];
        Expected::new(&all, Some("https://issuer.example"), &["me".to_owned()])
    }

    fn claims(change: Value) -> Value {
        let mut claims = json!({ "iss": "https://issuer.example", "aud": "me", "sub": "ann", "exp": NOW_TO });
        for (name, value) in change.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims
    }

    #[test]
    fn a_token_is_believed_only_as_it_was_meant() {
        for kind in [KeyKind::Eddsa, KeyKind::Es256] {
            let signer = Signer::new(kind);
            let keys = PublicKeys::parse(signer.jwks.as_bytes()).unwrap();
            let run = |change| {
                keys.verify(&signer.sign(&claims(change)), &expected(), NOW)
                    .map(|claims| claims["sub"].clone())
            };
            assert_eq!(run(json!({})), Ok(json!("ann")));
            assert_eq!(run(json!({ "aud": ["other", "me"] })), Ok(json!("ann")));
            assert_eq!(run(json!({ "aud": "other" })), Err(TokenFault::Audience));
            assert_eq!(run(json!({ "aud": null })), Err(TokenFault::Claim));
            assert_eq!(run(json!({ "iss": "https://issuer.example/" })), Err(TokenFault::Issuer));
            assert_eq!(run(json!({ "iss": null })), Err(TokenFault::Claim));
            assert_eq!(run(json!({ "exp": 1 })), Err(TokenFault::Expired));
            assert_eq!(run(json!({ "exp": null })), Err(TokenFault::Claim));
            assert_eq!(run(json!({ "nbf": NOW_TO })), Err(TokenFault::Early));
            assert_eq!(run(json!({ "exp": "2100" })), Err(TokenFault::Claim));
            assert_eq!(run(json!({ "nbf": "1" })), Err(TokenFault::Claim));

            let token = signer.sign(&claims(json!({})));
            let mut changed = token.clone().into_bytes();
            let last = changed.len() - 10;
            changed[last] = if changed[last] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(keys.verify(&changed, &expected(), NOW), Err(TokenFault::Signature));
            let other = Signer::new(kind);
            assert_eq!(
                keys.verify(&other.sign(&claims(json!({}))), &expected(), NOW),
                Err(TokenFault::UnknownKey)
            );
            let unnamed = encode(&Header::new(other.algorithm), &claims(json!({})), &other.key).unwrap();
            assert_eq!(keys.verify(&unnamed, &expected(), NOW), Err(TokenFault::Signature));
            let unnamed = encode(&Header::new(signer.algorithm), &claims(json!({})), &signer.key).unwrap();
            assert!(keys.verify(&unnamed, &expected(), NOW).is_ok());
            let only_rsa = Expected::new(&[Algorithm::RS256], None, &["me".to_owned()]);
            assert_eq!(keys.verify(&token, &only_rsa, NOW), Err(TokenFault::Algorithm));
        }
    }

    #[test]
    fn a_token_is_valid_by_the_time_that_is_given_and_no_clock() {
        let signer = Signer::new(KeyKind::Eddsa);
        let keys = PublicKeys::parse(signer.jwks.as_bytes()).unwrap();
        let token = signer.sign(&claims(json!({ "nbf": 1000, "exp": 2000.5 })));
        let at = |now| keys.verify(&token, &expected(), now).map(drop);
        for (now, valid) in [
            (0, Err(TokenFault::Early)),
            (939, Err(TokenFault::Early)),
            (940, Ok(())),
            (2060, Ok(())),
            (2061, Err(TokenFault::Expired)),
            (u64::MAX, Err(TokenFault::Expired)),
        ] {
            assert_eq!(at(now), valid, "{now}");
        }
    }

    #[test]
    fn neither_none_nor_a_public_key_taken_for_a_secret_signs_anything() {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        let signer = Signer::new(KeyKind::Eddsa);
        let keys = PublicKeys::parse(signer.jwks.as_bytes()).unwrap();
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        for alg in ["none", "None", "NONE", "", "HS256", "ES256K"] {
            let unsigned = format!("{}.{}.", part(json!({ "alg": alg })), part(claims(json!({}))));
            assert!(keys.verify(&unsigned, &expected(), NOW).is_err(), "{alg}");
        }
        let secret = EncodingKey::from_secret(signer.jwks.as_bytes());
        let forged = encode(&Header::new(Algorithm::HS256), &claims(json!({})), &secret).unwrap();
        assert_eq!(keys.verify(&forged, &expected(), NOW), Err(TokenFault::Algorithm));
        let critical = Header { crit: Some(vec!["b64".into()]), ..Header::new(Algorithm::EdDSA) };
        let critical = encode(&critical, &claims(json!({})), &signer.key).unwrap();
        assert_eq!(keys.verify(&critical, &expected(), NOW), Err(TokenFault::Malformed));
        for text in ["", ".", "..", "a.b.c", &"a".repeat(MOST_TOKEN_BYTES + 1)] {
            assert!(keys.verify(text, &expected(), NOW).is_err());
        }
    }

    #[test]
    fn keys_that_cannot_be_used_are_left_out_and_an_empty_rest_is_refused() {
        let signer = Signer::new(KeyKind::Eddsa);
        let mut set: Value = serde_json::from_str(&signer.jwks).unwrap();
        let good = set["keys"][0].clone();
        let with = |name: &str, value: &str| {
            let mut key = good.clone();
            key[name] = json!(value);
            key
        };
        let useless =
            [with("use", "enc"), with("alg", "ES256"), json!({ "kty": "oct", "k": "c2VjcmV0" }), json!(1)];
        for key in useless.clone() {
            let set = json!({ "keys": [key] }).to_string();
            assert!(PublicKeys::parse(set.as_bytes()).is_err(), "{set}");
        }
        set["keys"].as_array_mut().unwrap().extend(useless);
        assert_eq!(PublicKeys::parse(set.to_string().as_bytes()).unwrap().0.len(), 1);
        for text in ["", "[]", "{}", "{\"keys\":1}", "{\"keys\":[]}"] {
            assert!(PublicKeys::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_claim_is_read_as_the_texts_it_holds() {
        let claims = json!({
            "a": "x y", "scope": "x y", "n": 3, "b": true, "l": ["x", 1, {}], "o": { "roles": ["r"] }, "o.p": "dotted"
        });
        let texts = |name| texts_of(&claims, name).join("|");
        assert_eq!([texts("a"), texts("scope"), texts("n"), texts("b")], ["x y", "x|y|x y", "3", "true"]);
        assert_eq!([texts("l"), texts("o.roles"), texts("o.p"), texts("none")], ["x|1", "r", "dotted", ""]);
    }
}
