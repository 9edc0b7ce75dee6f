//! Tokens: claims and a key enter, a signed JWT leaves; or a JWT enters and what it says leaves.

use std::{fmt::Write as _, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use proto::{
    calendar,
    id::{Owner, TunnelPatterns},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::keys::Keys;

/// Who issues, unless said otherwise. The edge's authorizer expects the same.
pub const DEFAULT_ISSUER: &str = "agentd";

/// What for, unless said otherwise. The edge's authorizer expects the same.
pub const DEFAULT_AUDIENCE: &str = "tunnel";

/// The longest life of a token: the edge refuses one that ends later.
pub const LIFETIME: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// The most bytes of a token that the edge takes.
const TOKEN_BYTES: usize = 4096;

/// Why no token is issued, or none can be shown.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// No tunnel at all.
    #[error("a token needs at least one tunnel that it may open")]
    NoTunnels,
    /// It would end later than [`LIFETIME`] from now.
    #[error("a token is valid for 10 years at most")]
    TooLong,
    /// Too much in it.
    #[error(
        "the token would be longer than {TOKEN_BYTES} bytes: use a pattern such as pr-* for several names"
    )]
    TooLarge,
    /// No signature, or no randomness.
    #[error("the token could not be signed")]
    Crypto,
    /// What is to be shown is something else.
    #[error("this is not a token (JWT)")]
    NotAToken,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who issued it.
    pub iss: String,
    /// What it is for.
    pub aud: String,
    /// The owner.
    pub sub: Owner,
    /// The patterns of the tunnels it may open.
    pub tunnels: Vec<String>,
    /// When it was issued, in Unix time.
    pub iat: u64,
    /// When it ends, in Unix time.
    pub exp: u64,
    /// Its id, by which it can be revoked.
    pub jti: String,
}

impl Claims {
    /// The claims of a new token at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`IssueError`] when it would open nothing, live too long, or cannot be given an id.
    pub fn new(
        owner: &Owner,
        tunnels: &TunnelPatterns,
        now: u64,
        expires: Duration,
    ) -> Result<Self, IssueError> {
        if tunnels.0.is_empty() {
            return Err(IssueError::NoTunnels);
        }
        if expires > LIFETIME {
            return Err(IssueError::TooLong);
        }
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|_| IssueError::Crypto)?;
        Ok(Self {
            iss: DEFAULT_ISSUER.into(),
            aud: DEFAULT_AUDIENCE.into(),
            sub: owner.clone(),
            tunnels: tunnels.0.iter().map(ToString::to_string).collect(),
            iat: now,
            exp: now.saturating_add(expires.as_secs()),
            jti: URL_SAFE_NO_PAD.encode(id),
        })
    }

    /// Signs (RFC 7515 §3.1, compact serialization).
    ///
    /// # Errors
    ///
    /// [`IssueError`] when the token would be refused for its size.
    pub fn sign(&self, keys: &Keys) -> Result<String, IssueError> {
        #[derive(Serialize)]
        struct Header<'a> {
            alg: &'a str,
            typ: &'a str,
            kid: &'a str,
        }
        let header = Header { alg: keys.algorithm(), typ: "JWT", kid: keys.id() };
        let mut token = format!("{}.{}", encode(&header), encode(self));
        let signature = keys.sign(token.as_bytes()).map_err(|_| IssueError::Crypto)?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        if token.len() > TOKEN_BYTES { Err(IssueError::TooLarge) } else { Ok(token) }
    }
}

fn encode(part: &impl Serialize) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(part).expect("strings and numbers are JSON"))
}

/// Says what a token claims, one claim a line, at the Unix time `now`; nothing of it can be used as a
/// token again, and nothing of it is checked.
pub(super) fn describe(token: &str, now: u64) -> Result<String, IssueError> {
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(_), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(IssueError::NotAToken);
    };
    let decode = |part| URL_SAFE_NO_PAD.decode(part).map_err(|_| IssueError::NotAToken);
    let (header, claims) = (decode(header)?, decode(claims)?);
    let parse = |json| serde_json::from_slice::<Members<'_>>(json).map_err(|_| IssueError::NotAToken);

    let mut text = String::new();
    for (name, value) in parse(&header)?.0 {
        if ["alg", "kid"].contains(&&*name) {
            line(&mut text, &name, value.get(), None);
        }
    }
    for (name, value) in parse(&claims)?.0 {
        let time = value.get().parse::<u64>().ok().filter(|_| ["exp", "iat", "nbf"].contains(&&*name));
        let expired = if name == "exp" && time.is_some_and(|time| time <= now) { ", expired" } else { "" };
        line(&mut text, &name, value.get(), time.map(|time| format!("{}{expired}", utc(time))));
    }
    text.push_str("The signature was not checked.\n");
    Ok(text)
}

/// The members of an object in their order, duplicates included: who looks at a token wants to see
/// them.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = access.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Visitor).map(Members)
    }
}

/// One line; whatever a terminal could take for a command is escaped.
fn line(text: &mut String, name: &str, value: &str, remark: Option<String>) {
    let shown = |text: &str| -> String {
        text.chars()
            .flat_map(|c| {
                let plain = c == ' ' || c.is_ascii_graphic();
                let escaped = (!plain).then(|| c.escape_unicode());
                plain.then_some(c).into_iter().chain(escaped.into_iter().flatten())
            })
            .collect()
    };
    let remark = remark.map(|remark| format!(" ({remark})")).unwrap_or_default();
    writeln!(text, "{:<8} {}{remark}", shown(name), shown(value)).expect("writing to a string cannot fail");
}

/// A Unix time as date and time in UTC (RFC 3339).
pub(crate) fn utc(time: u64) -> String {
    let (year, month, day) = calendar::date(time / 86_400);
    let secs = time % 86_400;
    let (hour, minute, second) = (secs / 3600, secs / 60 % 60, secs % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ED25519, UnparsedPublicKey};

    use super::*;
    use crate::identity::Algorithm;

    const NOW: u64 = 1_800_000_000;

    fn parsed<T: std::str::FromStr<Err = proto::id::IdError>>(text: &str) -> T {
        text.parse().unwrap()
    }

    fn claims(tunnels: &str, secs: u64) -> Result<Claims, IssueError> {
        Claims::new(&parsed("acme"), &parsed(tunnels), NOW, Duration::from_secs(secs))
    }

    #[test]
    fn a_token_is_signed_by_its_key_and_says_what_was_asked_for() {
        for (algorithm, name) in [(Algorithm::Eddsa, "EdDSA"), (Algorithm::Es256, "ES256")] {
            let keys = Keys::generate(algorithm).unwrap();
            let claims = claims("web,pr-*", 60).unwrap();
            let token = claims.sign(&keys).unwrap();
            let (message, signature) = token.rsplit_once('.').unwrap();
            let (header, payload) = message.split_once('.').unwrap();
            let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).unwrap();
            let expected = format!(r#"{{"alg":"{name}","typ":"JWT","kid":"{}"}}"#, keys.id());
            assert_eq!(String::from_utf8(decode(header)).unwrap(), expected);
            assert_eq!(serde_json::from_slice::<Claims>(&decode(payload)).unwrap(), claims);
            assert_eq!((claims.exp, &*claims.tunnels), (NOW + 60, &["web".to_owned(), "pr-*".into()][..]));

            let jwks: serde_json::Value = serde_json::from_str(&keys.jwks()).unwrap();
            let part = |name: &str| decode(jwks["keys"][0][name].as_str().unwrap());
            let verified = match algorithm {
                Algorithm::Eddsa => UnparsedPublicKey::new(&ED25519, part("x")),
                Algorithm::Es256 => {
                    let point = [&[4][..], &part("x"), &part("y")].concat();
                    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
                }
            };
            verified.verify(message.as_bytes(), &decode(signature)).unwrap();
        }
    }

    #[test]
    fn what_the_edge_would_refuse_is_not_issued() {
        assert!(matches!(claims("", 60), Err(IssueError::NoTunnels)));
        assert!(claims("web", LIFETIME.as_secs()).is_ok());
        assert!(matches!(claims("web", LIFETIME.as_secs() + 1), Err(IssueError::TooLong)));
        let many: Vec<String> = (0..80).map(|n| format!("{n}{}", "x".repeat(60))).collect();
        let keys = Keys::generate(Algorithm::Eddsa).unwrap();
        assert!(matches!(claims(&many.join(","), 60).unwrap().sign(&keys), Err(IssueError::TooLarge)));
    }

    #[test]
    fn showing_a_token_shows_its_claims_and_not_the_token() {
        let keys = Keys::generate(Algorithm::Eddsa).unwrap();
        let claims = claims("web,pr-*", 60).unwrap();
        let token = claims.sign(&keys).unwrap();
        let shown = describe(&token, NOW).unwrap();
        for expected in
            ["EdDSA", keys.id(), r#""acme""#, r#"["web","pr-*"]"#, "(2027-01-15T08:01:00Z)", &claims.jti]
        {
            assert!(shown.contains(expected), "{expected} is not in:\n{shown}");
        }
        assert!(!shown.contains("expired"), "{shown}");
        for part in token.split('.') {
            assert!(!shown.contains(&part[..16]), "{shown}");
        }
        assert!(describe(&token, NOW + 60).unwrap().contains("expired"));
    }

    #[test]
    fn a_hostile_token_cannot_speak_to_the_terminal() {
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let token = |claims: &str| format!("{}.{}.AA", encode(r#"{"alg":"none","x":1}"#), encode(claims));
        let shown = describe(&token("{\"a\u{9b}b\":\"\u{9b}2J\u{202e}\",\"\\u001b[2J\":1}"), NOW).unwrap();
        assert!(shown.is_ascii() && !shown.contains('\u{1b}'), "{shown}");
        for bad in ["", "a.b", "a.b.c", "..", &token("[]"), &token("{"), &format!("{}.x", token("{}"))] {
            assert!(matches!(describe(bad, NOW), Err(IssueError::NotAToken)), "{bad}");
        }
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (time, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_800_000_000, "2027-01-15T08:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(time), text);
        }
        assert!(!utc(u64::MAX).is_empty());
    }
}
