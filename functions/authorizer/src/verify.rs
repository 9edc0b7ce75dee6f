//! Whether a token is good: token, key, rules and the time enter; an identity or a refusal leaves.
//!
//! Pure. Two steps, because the key has to be found between them: [`parse`] reads which key the
//! token names, [`UnverifiedToken::verify`] checks everything else with it. Every check is made
//! here; `jsonwebtoken` checks the signature, and issuer and audience a second time.

use std::{collections::BTreeSet, fmt, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Validation, errors::ErrorKind};
use proto::id::{Owner, TunnelPattern, TunnelPatterns};

use crate::{
    json::{Json, Object},
    key::{KEY_ID_BYTES, Key},
};

/// The most bytes of a token: what API Gateway takes in a URL, where a token may have to travel
/// (API Gateway Developer Guide, "WebSocket quotas": URL length 4096).
pub const TOKEN_BYTES: usize = 4096;

/// How far the clocks of the issuer and of this function may be apart. The rest of the edge grants the same.
pub const SKEW: Duration = proto::limits::CLOCK_SKEW;

/// The furthest a token may end in the future. A token that ends later never ends in practice.
pub const LIFETIME: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// The most patterns in the claim `tunnels`.
pub const PATTERNS: usize = 100;

/// The most bytes of a token id.
const TOKEN_ID_BYTES: usize = 128;

/// The most bytes of a key id that is shown in the log.
const SHOWN_KEY_ID_BYTES: usize = 64;

/// What has to be true of a token besides its signature and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The claim `iss`.
    pub issuer: String,
    /// What the claim `aud` is or holds.
    pub audience: String,
    /// The name of the claim that holds the owner.
    pub owner_claim: String,
    /// Whom not to believe any more.
    pub revoked: Revoked,
}

/// Tokens that are refused although they are signed and have not ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Revoked {
    /// Values of the claim `jti`.
    pub token_ids: BTreeSet<String>,
    /// Owners, with every token of theirs.
    pub owners: BTreeSet<Owner>,
}

/// What a good token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who opens the connection.
    pub owner: Owner,
    /// Which tunnels it may open.
    pub tunnels: TunnelPatterns,
    /// The Unix time in seconds at which the token ends.
    pub expires_at: u64,
    /// The token's id, by which it can be revoked.
    pub token_id: Option<String>,
}

/// Why a token is refused. For the log only: the caller is never told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// No key is configured, or the configuration has an error.
    #[error("the authorizer has no usable configuration")]
    NotConfigured,
    /// The event is not one that API Gateway sends.
    #[error("the event is malformed")]
    Event,
    /// More than one `Authorization`, or more than one `token`.
    #[error("more than one credential")]
    Ambiguous,
    /// `Authorization` is not `Bearer` and one token.
    #[error("the credential is not a bearer token")]
    Scheme,
    /// Longer than [`TOKEN_BYTES`].
    #[error("the token is too long")]
    TooLong,
    /// Not three parts in base64url.
    #[error("the token is malformed")]
    Malformed,
    /// The header is no JSON object, or lacks what it needs.
    #[error("the token's header is malformed")]
    Header,
    /// The header asks for something that is not done: a key from elsewhere, an extension, encryption.
    #[error("the token's header asks for what is not supported")]
    HeaderParameter,
    /// The header's type is not that of a JWT.
    #[error("the token is not a JWT")]
    Type,
    /// No key has the id that the token names.
    #[error("the token's key is unknown")]
    UnknownKey,
    /// The header's algorithm is not the key's.
    #[error("the token's algorithm is not that of its key")]
    Algorithm,
    /// The key did not sign this.
    #[error("the token's signature is wrong")]
    Signature,
    /// The claims are no JSON object, or one is there twice.
    #[error("the token's claims are malformed")]
    Claims,
    /// `iss` is missing or another.
    #[error("the token is from another issuer")]
    Issuer,
    /// `aud` is missing or another.
    #[error("the token is for another audience")]
    Audience,
    /// `exp` is missing, no integer, or further away than [`LIFETIME`].
    #[error("the token's end is missing or out of range")]
    Expiry,
    /// `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// `nbf` or `iat` is no integer or still to come.
    #[error("the token is not valid yet")]
    NotYet,
    /// The owner's claim is missing or no owner.
    #[error("the token names no valid owner")]
    Owner,
    /// `tunnels` is missing, empty, too long, or holds something that is no pattern.
    #[error("the token names no valid tunnels")]
    Tunnels,
    /// `jti` is not 1 to 128 printable ASCII characters.
    #[error("the token's id is malformed")]
    TokenId,
    /// The token or its owner is on the list.
    #[error("the token is revoked")]
    Revoked,
}

/// A refusal with what the log may say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The key that the token named, if it can be shown.
    pub key_id: Option<KeyId>,
    /// The owner, if the token's signature proved it.
    pub owner: Option<Owner>,
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, key_id: None, owner: None }
    }
}

/// A key id that is safe to log: 1 to 64 printable ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyId(String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A token of which nothing is proved: all one may do with it is look for its key.
#[derive(Debug)]
pub struct UnverifiedToken<'a> {
    token: &'a str,
    key_id: String,
    algorithm: String,
}

/// Reads which key the token names.
///
/// # Errors
///
/// The [`Reason`] why it can be no token of ours, whatever the key.
pub fn parse(token: &str) -> Result<UnverifiedToken<'_>, Reason> {
    if token.len() > TOKEN_BYTES {
        return Err(Reason::TooLong);
    }
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Reason::Malformed);
    };
    let is_base64url = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    if ![header, claims, signature].into_iter().all(is_base64url) {
        return Err(Reason::Malformed);
    }
    let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| Reason::Malformed)?;
    let header = Json::object(&header).ok_or(Reason::Header)?;
    // RFC 7515 §4.1: where to find a key (never followed), extensions that must be understood (none
    // is), and RFC 7516's parameters of an encrypted token (none is read).
    if ["jku", "jwk", "x5u", "x5c", "crit", "b64", "enc", "zip"].iter().any(|name| header.contains_key(*name))
    {
        return Err(Reason::HeaderParameter);
    }
    let is_jwt = |typ: &Json| {
        typ.as_text().is_some_and(|typ| typ.eq_ignore_ascii_case("JWT") || typ.eq_ignore_ascii_case("at+jwt"))
    };
    if !header.get("typ").is_none_or(is_jwt) {
        return Err(Reason::Type);
    }
    let text = |name: &str| header.get(name).and_then(Json::as_text);
    let algorithm = text("alg").ok_or(Reason::Header)?;
    let key_id =
        text("kid").filter(|id| !id.is_empty() && id.len() <= KEY_ID_BYTES).ok_or(Reason::UnknownKey)?;
    Ok(UnverifiedToken { token, key_id: key_id.into(), algorithm: algorithm.into() })
}

impl UnverifiedToken<'_> {
    /// The id of the key that the token says it is signed with.
    #[must_use]
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The refusal of this token for `reason`, before anything of it is proved.
    #[must_use]
    pub fn refused(&self, reason: Reason) -> Refusal {
        let shown =
            self.key_id.len() <= SHOWN_KEY_ID_BYTES && self.key_id.bytes().all(|b| b.is_ascii_graphic());
        Refusal { reason, key_id: shown.then(|| KeyId(self.key_id.clone())), owner: None }
    }

    /// Checks the token with its key at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; no claim of a token that the key did not sign is looked at.
    pub fn verify(&self, key: &Key, rules: &Rules, now: u64) -> Result<Identity, Refusal> {
        let claims = self.claims(key, rules).map_err(|reason| self.refused(reason))?;
        let owner = claims
            .get(&rules.owner_claim)
            .and_then(Json::as_text)
            .and_then(|owner| owner.parse::<Owner>().ok())
            .ok_or_else(|| self.refused(Reason::Owner))?;
        check(&claims, owner.clone(), rules, now)
            .map_err(|reason| Refusal { owner: Some(owner), ..self.refused(reason) })
    }

    /// The claims, when the key signed them.
    fn claims(&self, key: &Key, rules: &Rules) -> Result<Object, Reason> {
        // The key's algorithm is used, whatever the token says; that they differ is an attack.
        if self.algorithm.parse() != Ok(key.algorithm) {
            return Err(Reason::Algorithm);
        }
        let mut validation = Validation::new(key.algorithm);
        // Times are checked below, against the time that was passed in.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.set_issuer(&[&rules.issuer]);
        validation.set_audience(&[&rules.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let decoded = jsonwebtoken::decode::<Json>(self.token, &key.decoding, &validation);
        let claims = decoded.map_err(|error| reason(error.kind()))?.claims;
        claims.into_object().ok_or(Reason::Claims)
    }
}

fn reason(kind: &ErrorKind) -> Reason {
    match kind {
        ErrorKind::MissingRequiredClaim(name) if name == "exp" => Reason::Expiry,
        ErrorKind::MissingRequiredClaim(name) if name == "iss" => Reason::Issuer,
        ErrorKind::MissingRequiredClaim(name) if name == "aud" => Reason::Audience,
        ErrorKind::InvalidIssuer => Reason::Issuer,
        ErrorKind::InvalidAudience => Reason::Audience,
        ErrorKind::Json(_) | ErrorKind::Utf8(_) | ErrorKind::InvalidClaimFormat(_) => Reason::Claims,
        ErrorKind::InvalidAlgorithm => Reason::Algorithm,
        _ => Reason::Signature,
    }
}

fn check(claims: &Object, owner: Owner, rules: &Rules, now: u64) -> Result<Identity, Reason> {
    let text = |name: &str| claims.get(name).and_then(Json::as_text);
    if text("iss") != Some(&*rules.issuer) {
        return Err(Reason::Issuer);
    }
    let audience = claims.get("aud").ok_or(Reason::Audience)?;
    let audiences = audience.as_text().map(|one| vec![one]).or_else(|| audience.as_texts());
    if !audiences.is_some_and(|audiences| audiences.contains(&&*rules.audience)) {
        return Err(Reason::Audience);
    }

    let skew = SKEW.as_secs();
    let expires_at = claims.get("exp").and_then(Json::as_integer).ok_or(Reason::Expiry)?;
    if expires_at > now.saturating_add(LIFETIME.as_secs()) {
        return Err(Reason::Expiry);
    }
    if now >= expires_at.saturating_add(skew) {
        return Err(Reason::Expired);
    }
    for name in ["nbf", "iat"] {
        let begun = claims
            .get(name)
            .is_none_or(|begin| begin.as_integer().is_some_and(|begin| begin <= now.saturating_add(skew)));
        if !begun {
            return Err(Reason::NotYet);
        }
    }

    let patterns = claims.get("tunnels").and_then(Json::as_texts).ok_or(Reason::Tunnels)?;
    if patterns.is_empty() || patterns.len() > PATTERNS {
        return Err(Reason::Tunnels);
    }
    // One by one: joined by commas first, one claim could smuggle in two.
    let patterns = patterns.into_iter().map(str::parse::<TunnelPattern>).collect::<Result<_, _>>();
    let tunnels = TunnelPatterns(patterns.map_err(|_| Reason::Tunnels)?);

    let is_token_id =
        |id: &&str| (1..=TOKEN_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    let token_id = match claims.get("jti") {
        None => None,
        Some(id) => Some(id.as_text().filter(is_token_id).ok_or(Reason::TokenId)?.to_owned()),
    };
    let token_revoked = token_id.as_ref().is_some_and(|id| rules.revoked.token_ids.contains(id));
    if token_revoked || rules.revoked.owners.contains(&owner) {
        return Err(Reason::Revoked);
    }
    Ok(Identity { owner, tunnels, expires_at, token_id })
}
