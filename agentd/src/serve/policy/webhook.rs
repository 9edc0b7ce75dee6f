//! Signatures of webhooks, over the bytes as they came.
//!
//! Enters: a request's head and whole body, and the time. Leaves: a [`Signature`], or why the signature is not
//! taken. What each sender signs is in its own documentation; the differences that its libraries make are in
//! `docs/policy.md`.
//!
//! The text of a signature is compared, not what it decodes to: capitals or spare bits in it would otherwise be
//! bytes that nobody checks.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest,
    hmac::{self, HMAC_SHA1_FOR_LEGACY_USE_ONLY, HMAC_SHA256, HMAC_SHA512},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::header;
use proto::header::Headers;

use crate::{
    config::visitors::{Digest, Encoding, HmacForm, Scheme, WebhookRule},
    identity::private_file::Secret,
    serve::{carried::OfTunnel, policy::seen::Seen},
};

/// The part of a request that a signature may be about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Signed<'a> {
    pub(crate) headers: &'a Headers,
    /// The address as the public client wrote it, query included.
    pub(crate) url: &'a str,
    pub(crate) body: &'a [u8],
    /// When it came, in Unix seconds.
    pub(crate) now: u64,
    /// Whether this very one may have been let in before: the edge tries it again.
    pub(crate) is_again: bool,
}

/// Why a webhook was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WebhookError {
    #[error("the field {0} is missing")]
    Missing(&'static str),
    #[error("the signature's field is missing")]
    NoSignature,
    #[error("the field {0} is there more than once")]
    Repeated(&'static str),
    #[error("the signature's field is there more than once")]
    RepeatedSignature,
    #[error("the field {0} cannot be read")]
    Malformed(&'static str),
    #[error("the timestamp is further from this machine's clock than the tolerance")]
    Time,
    #[error("the signature is not one of this body with a configured secret")]
    Signature,
    #[error("this very delivery was accepted before")]
    Replay,
}

/// One rule with what it has seen.
pub(crate) struct Webhook {
    rule: WebhookRule,
    /// What was seen of each secret, in their order: nothing else makes one delivery the same as another.
    seen: Vec<Arc<Mutex<Seen>>>,
}

/// A webhook whose signature is right. It counts as seen only when it was [`delivered`](Self::delivered): its
/// sender may try again what did not reach the upstream.
#[derive(Debug)]
pub(crate) struct Signature {
    seen: Option<(Arc<Mutex<Seen>>, Vec<u8>)>,
}

impl Signature {
    /// The upstream has taken it.
    pub(crate) fn delivered(mut self) {
        self.seen = None;
    }
}

impl Drop for Signature {
    fn drop(&mut self) {
        if let Some((seen, mac)) = self.seen.take() {
            seen.lock().unwrap_or_else(PoisonError::into_inner).remove(&mac);
        }
    }
}

/// What of a request is compared.
struct Claim<'a> {
    /// What was signed, in pieces.
    text: Vec<Cow<'a, [u8]>>,
    algorithm: hmac::Algorithm,
    encoding: Encoding,
    /// The signatures that were sent: one of them must be right.
    sent: Vec<&'a str>,
    /// When it was signed, where that is signed too.
    at: Option<u64>,
}

impl Webhook {
    /// The rule. What was seen with one of its secrets is known.
    pub(crate) fn new(rule: WebhookRule, carried: OfTunnel<'_>) -> Self {
        let seen_with = |secret: &Secret| {
            carried.state((rule.scheme.clone(), secret.clone()), |_| Mutex::<Seen>::default())
        };
        Self { seen: rule.secrets.iter().map(seen_with).collect(), rule }
    }

    /// Whether requests for this path must be signed.
    pub(crate) fn covers(&self, path: &str) -> bool {
        self.rule.paths.is_empty() || self.rule.paths.iter().any(|pattern| pattern.could_be(path))
    }

    /// Checks the signature.
    ///
    /// # Errors
    ///
    /// [`WebhookError`].
    pub(crate) fn verify(&self, signed: &Signed<'_>) -> Result<Signature, WebhookError> {
        let claim = match &self.rule.scheme {
            Scheme::Github => body_alone(signed, "x-hub-signature-256", Some("sha256="), Encoding::Hex)?,
            Scheme::Shopify => {
                let newer = signed.headers.get("shopify-hmac-sha256").is_some();
                let name = if newer { "shopify-hmac-sha256" } else { "x-shopify-hmac-sha256" };
                body_alone(signed, name, None, Encoding::Base64)?
            }
            Scheme::Stripe => stripe(signed)?,
            Scheme::Slack => slack(signed)?,
            Scheme::Standard => standard(signed)?,
            Scheme::Twilio => twilio(signed)?,
            Scheme::Hmac(form) => generic(signed, form)?,
        };
        if claim.at.is_some_and(|at| at.abs_diff(signed.now) > self.rule.tolerance.as_secs()) {
            return Err(WebhookError::Time);
        }
        let (mac, seen) = self.matching(&claim).ok_or(WebhookError::Signature)?;
        // Without a time in what is signed there is no end to how long it would be believed, and no way to tell
        // a second delivery that somebody asked for from a replay. What we try again ourselves is none.
        if claim.at.is_none() || signed.is_again {
            return Ok(Signature { seen: None });
        }
        // Believed from a tolerance before its time until one after it.
        let keep = self.rule.tolerance.saturating_mul(2).max(Duration::from_secs(1));
        if seen.lock().unwrap_or_else(PoisonError::into_inner).insert(&mac, signed.now, keep) {
            Ok(Signature { seen: Some((Arc::clone(seen), mac)) })
        } else {
            Err(WebhookError::Replay)
        }
    }

    /// The digest of the first secret with which one of the signatures is right, and what was seen of that one.
    fn matching(&self, claim: &Claim<'_>) -> Option<(Vec<u8>, &Arc<Mutex<Seen>>)> {
        self.rule.secrets.iter().zip(&self.seen).find_map(|(secret, seen)| {
            let key = hmac::Key::new(claim.algorithm, &self.key(secret)?);
            let mut context = hmac::Context::with_key(&key);
            for piece in &claim.text {
                context.update(piece);
            }
            let mac = context.sign().as_ref().to_vec();
            let expected = claim.encoding.encode(&mac);
            let is_it = |sent: &&str| verify_slices_are_equal(sent.as_bytes(), expected.as_bytes()).is_ok();
            claim.sent.iter().any(is_it).then_some((mac, seen))
        })
    }

    /// What the secret's text stands for.
    fn key<'a>(&self, secret: &'a Secret) -> Option<Cow<'a, [u8]>> {
        match self.rule.scheme {
            Scheme::Standard => secret.decoded().map(Cow::Owned),
            _ => Some(Cow::Borrowed(secret.bytes())),
        }
    }
}

impl Encoding {
    fn encode(self, bytes: &[u8]) -> String {
        match self {
            Self::Hex => hex(bytes),
            Self::Base64 => STANDARD.encode(bytes),
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

/// The one value of a field. Lists are never joined: a comma means something else in some of them.
fn one<'a>(headers: &'a Headers, name: &'static str) -> Result<&'a str, WebhookError> {
    let mut values = headers.get_all(name);
    let value = values.next().ok_or(WebhookError::Missing(name))?;
    if values.next().is_some() {
        return Err(WebhookError::Repeated(name));
    }
    value.to_str().map_err(|_| WebhookError::Malformed(name))
}

fn seconds(text: &str, name: &'static str) -> Result<u64, WebhookError> {
    let digits = !text.is_empty() && text.len() < 16 && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().ok_or(WebhookError::Malformed(name))
}

fn body_alone<'a>(
    signed: &Signed<'a>,
    name: &'static str,
    prefix: Option<&str>,
    encoding: Encoding,
) -> Result<Claim<'a>, WebhookError> {
    let sent = one(signed.headers, name)?;
    let sent = sent.strip_prefix(prefix.unwrap_or_default()).ok_or(WebhookError::Malformed(name))?;
    Ok(Claim { text: vec![signed.body.into()], algorithm: HMAC_SHA256, encoding, sent: vec![sent], at: None })
}

fn stripe<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, WebhookError> {
    const NAME: &str = "stripe-signature";
    let field = one(signed.headers, NAME)?;
    let values = |wanted| field.split(',').filter_map(move |part| part.strip_prefix(wanted));
    let mut times = values("t=");
    let time = times.next().ok_or(WebhookError::Malformed(NAME))?;
    if times.next().is_some() {
        return Err(WebhookError::Malformed(NAME));
    }
    Ok(Claim {
        text: vec![time.as_bytes().into(), b"."[..].into(), signed.body.into()],
        algorithm: HMAC_SHA256,
        encoding: Encoding::Hex,
        sent: values("v1=").collect(),
        at: Some(seconds(time, NAME)?),
    })
}

fn slack<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, WebhookError> {
    const TIME: &str = "x-slack-request-timestamp";
    const NAME: &str = "x-slack-signature";
    let time = one(signed.headers, TIME)?;
    let sent = one(signed.headers, NAME)?.strip_prefix("v0=").ok_or(WebhookError::Malformed(NAME))?;
    Ok(Claim {
        text: vec![b"v0:"[..].into(), time.as_bytes().into(), b":"[..].into(), signed.body.into()],
        algorithm: HMAC_SHA256,
        encoding: Encoding::Hex,
        sent: vec![sent],
        at: Some(seconds(time, TIME)?),
    })
}

fn standard<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, WebhookError> {
    let svix = signed.headers.get("svix-id").is_some();
    let [id, time, signature] = if svix {
        ["svix-id", "svix-timestamp", "svix-signature"]
    } else {
        ["webhook-id", "webhook-timestamp", "webhook-signature"]
    };
    let (name, id, at) = (time, one(signed.headers, id)?, one(signed.headers, time)?);
    // Other versions, such as v1a, are of keys that we do not have.
    let sent = one(signed.headers, signature)?.split(' ').filter_map(|one| one.strip_prefix("v1,")).collect();
    Ok(Claim {
        text: vec![
            id.as_bytes().into(),
            b"."[..].into(),
            at.as_bytes().into(),
            b"."[..].into(),
            signed.body.into(),
        ],
        algorithm: HMAC_SHA256,
        encoding: Encoding::Base64,
        sent,
        at: Some(seconds(at, name)?),
    })
}

/// The address, and behind it the fields of a form or, for other bodies, their hash in the query.
fn twilio<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, WebhookError> {
    const NAME: &str = "x-twilio-signature";
    const SETTINGS: &str = "x-twilio-webhooks-signature-settings";
    let sent = one(signed.headers, NAME)?;
    let algorithm = match signed.headers.get(SETTINGS) {
        None => HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        Some(_) => {
            let settings = one(signed.headers, SETTINGS)?;
            let algorithm = settings.split(',').find_map(|part| part.trim().strip_prefix("algorithm="));
            match algorithm.map(str::trim) {
                None | Some("" | "HMAC_SHA1") => HMAC_SHA1_FOR_LEGACY_USE_ONLY,
                Some("HMAC_SHA256") => HMAC_SHA256,
                Some(_) => return Err(WebhookError::Malformed(SETTINGS)),
            }
        }
    };
    let mut text: Vec<Cow<'a, [u8]>> = vec![signed.url.as_bytes().into()];
    let query = signed.url.split_once('?').map_or("", |(_, query)| query);
    let body_hash = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "bodySHA256");
    let content_type = signed.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_form = content_type.is_some_and(|value| {
        let essence = value.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/x-www-form-urlencoded")
    });
    if let Some((_, expected)) = body_hash {
        let own = hex(digest::digest(&digest::SHA256, signed.body).as_ref());
        verify_slices_are_equal(expected.as_bytes(), own.as_bytes()).map_err(|_| WebhookError::Signature)?;
    } else if is_form {
        let mut fields: Vec<(Cow<'a, str>, Cow<'a, str>)> = form_urlencoded::parse(signed.body).collect();
        fields.sort();
        fields.dedup();
        for (name, value) in fields {
            text.extend([name, value].map(|part| Cow::Owned(part.into_owned().into_bytes())));
        }
    } else if !signed.body.is_empty() {
        // Nothing that was signed says anything of these bytes.
        return Err(WebhookError::Signature);
    }
    Ok(Claim { text, algorithm, encoding: Encoding::Base64, sent: vec![sent], at: None })
}

fn generic<'a>(signed: &Signed<'a>, form: &HmacForm) -> Result<Claim<'a>, WebhookError> {
    let mut values = signed.headers.get_all(&form.header);
    let value = values.next().ok_or(WebhookError::NoSignature)?;
    if values.next().is_some() {
        return Err(WebhookError::RepeatedSignature);
    }
    let sent = value.to_str().ok().and_then(|value| value.strip_prefix(&*form.prefix));
    Ok(Claim {
        text: vec![signed.body.into()],
        algorithm: match form.digest {
            Digest::Sha1 => HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            Digest::Sha256 => HMAC_SHA256,
            Digest::Sha512 => HMAC_SHA512,
        },
        encoding: form.encoding,
        sent: vec![sent.ok_or(WebhookError::Signature)?],
        at: None,
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;
    use crate::serve::carried::Carried;

    const NOW: u64 = 1_800_000_000;
    const BODY: &[u8] = b"{\"a\":1,\"b\":\"\xc3\xa4\"}";

    fn webhook(scheme: Scheme, secrets: &[&str]) -> Webhook {
        let rule = WebhookRule {
            scheme,
            secrets: secrets.iter().map(|&secret| secret.into()).collect(),
            tolerance: Duration::from_secs(300),
            paths: Vec::new(),
        };
        Webhook::new(rule, Carried::default().of(&"web".parse().unwrap()))
    }

    fn mac(algorithm: hmac::Algorithm, key: &[u8], text: &[&[u8]], encoding: Encoding) -> String {
        encoding.encode(hmac::sign(&hmac::Key::new(algorithm, key), &text.concat()).as_ref())
    }

    fn hex256(key: &str, text: &[&[u8]]) -> String {
        mac(HMAC_SHA256, key.as_bytes(), text, Encoding::Hex)
    }

    fn headers(fields: &[(&str, &str)]) -> Headers {
        fields
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn verify(webhook: &Webhook, fields: &[(&str, &str)], body: &[u8]) -> Result<Signature, WebhookError> {
        let headers = headers(fields);
        webhook.verify(&Signed {
            headers: &headers,
            url: "https://web.example.com/hook?a=b",
            body,
            now: NOW,
            is_again: false,
        })
    }

    fn outcome(webhook: &Webhook, fields: &[(&str, &str)], body: &[u8]) -> Result<(), WebhookError> {
        verify(webhook, fields, body).map(drop)
    }

    #[test]
    fn github_signs_the_body() {
        let hook = webhook(Scheme::Github, &["old", "new"]);
        let name = "x-hub-signature-256";
        for secret in ["old", "new"] {
            let signature = format!("sha256={}", hex256(secret, &[BODY]));
            assert_eq!(outcome(&hook, &[(name, &signature)], BODY), Ok(()));
            assert_eq!(outcome(&hook, &[(name, &signature)], BODY), Ok(()), "somebody asked for it again");
            assert_eq!(outcome(&hook, &[(name, &signature)], b""), Err(WebhookError::Signature));
            let upper = format!("sha256={}", hex256(secret, &[BODY]).to_uppercase());
            assert_eq!(outcome(&hook, &[(name, &upper)], BODY), Err(WebhookError::Signature));
            let twice = [(name, &*signature), (name, &*signature)];
            assert_eq!(outcome(&hook, &twice, BODY), Err(WebhookError::Repeated(name)));
        }
        let empty = format!("sha256={}", hex256("new", &[]));
        assert_eq!(outcome(&hook, &[(name, &empty)], b""), Ok(()));
        let other = format!("sha256={}", hex256("other", &[BODY]));
        assert_eq!(outcome(&hook, &[(name, &other)], BODY), Err(WebhookError::Signature));
        assert_eq!(outcome(&hook, &[], BODY), Err(WebhookError::Missing(name)));
        assert_eq!(outcome(&hook, &[(name, "sha1=00")], BODY), Err(WebhookError::Malformed(name)));
    }

    #[test]
    fn stripe_signs_time_and_body_with_the_secret_as_it_stands() {
        let hook = webhook(Scheme::Stripe, &["whsec_abc"]);
        let field =
            |t: u64, key: &str| format!("t={t},v1={}", hex256(key, &[format!("{t}.").as_bytes(), BODY]));
        let run = |field: &str| outcome(&hook, &[("stripe-signature", field)], BODY);
        assert_eq!(run(&field(NOW, "whsec_abc")), Ok(()));
        for (t, expected) in [
            (NOW - 300, Ok(())),
            (NOW - 301, Err(WebhookError::Time)),
            (NOW + 300, Ok(())),
            (NOW + 301, Err(WebhookError::Time)),
        ] {
            assert_eq!(run(&field(t, "whsec_abc")), expected, "{t}");
        }
        let right = field(NOW, "whsec_abc");
        let (_, v1) = right.split_once(',').unwrap();
        assert_eq!(run(&format!("v0=00,{v1},v1=00,t={NOW}")), Ok(()), "any order, several");
        assert_eq!(run(&format!("t={NOW},v0={}", &v1[3..])), Err(WebhookError::Signature));
        assert_eq!(run(&format!("t={NOW}, {v1}")), Err(WebhookError::Signature), "as Stripe's libraries");
        assert_eq!(run(&format!("t={NOW},t={NOW},{v1}")), Err(WebhookError::Malformed("stripe-signature")));
        assert_eq!(run(v1), Err(WebhookError::Malformed("stripe-signature")));
        assert_eq!(run(&format!("t={NOW}.5,{v1}")), Err(WebhookError::Malformed("stripe-signature")));
        assert_eq!(run(&field(NOW, "abc")), Err(WebhookError::Signature));
    }

    #[test]
    fn slack_signs_its_version_time_and_body() {
        let hook = webhook(Scheme::Slack, &["s"]);
        let run = |t: u64, signature: &str| {
            let t = t.to_string();
            outcome(&hook, &[("x-slack-request-timestamp", &t), ("x-slack-signature", signature)], BODY)
        };
        let sign = |t: u64| format!("v0={}", hex256("s", &[format!("v0:{t}:").as_bytes(), BODY]));
        assert_eq!(run(NOW, &sign(NOW)), Ok(()));
        assert_eq!(run(NOW - 1, &sign(NOW)), Err(WebhookError::Signature));
        assert_eq!(run(NOW - 301, &sign(NOW - 301)), Err(WebhookError::Time));
        assert_eq!(run(NOW, &sign(NOW)[3..]), Err(WebhookError::Malformed("x-slack-signature")));
        let fields = [("x-slack-signature", "v0=00")];
        assert_eq!(outcome(&hook, &fields, BODY), Err(WebhookError::Missing("x-slack-request-timestamp")));
    }

    #[test]
    fn standard_webhooks_sign_id_time_and_body_with_the_decoded_secret() {
        let key = b"0123456789abcdef0123456789abcdef";
        let padded = STANDARD.encode(key);
        let bare = padded.trim_end_matches('=');
        for secret in [format!("whsec_{padded}"), padded.clone(), format!("whsec_{bare}")] {
            let hook = webhook(Scheme::Standard, &[&secret]);
            let t = NOW.to_string();
            let right = format!(
                "v1,{}",
                mac(HMAC_SHA256, key, &[b"msg_1.", t.as_bytes(), b".", BODY], Encoding::Base64)
            );
            let run = |prefix: &str, id: &str, signature: &str| {
                let names = ["id", "timestamp", "signature"].map(|name| format!("{prefix}-{name}"));
                let fields = [(&*names[0], id), (&*names[1], &*t), (&*names[2], signature)];
                outcome(&hook, &fields, BODY)
            };
            assert_eq!(run("webhook", "msg_1", &right), Ok(()));
            assert_eq!(run("svix", "msg_1", &right), Ok(()));
            assert_eq!(run("webhook", "msg_1", &format!("v1a,AA== v1,AAAA {right}")), Ok(()));
            assert_eq!(run("webhook", "msg_2", &right), Err(WebhookError::Signature));
            assert_eq!(run("webhook", "msg_1", &right.replace("v1,", "v1a,")), Err(WebhookError::Signature));
            assert_eq!(run("webhook", "msg_1", right.trim_end_matches('=')), Err(WebhookError::Signature));
        }
    }

    #[test]
    fn twilio_signs_the_address_and_the_sorted_form() {
        let url = "https://web.example.com/hook?a=b";
        let hook = webhook(Scheme::Twilio, &["token"]);
        let form = b"To=%2B1&From=%2B2&Body=a+b&Body=a+b&Body=A";
        let text: &[&[u8]] = &[url.as_bytes(), b"BodyABodya bFrom+2To+1"];
        let name = "x-twilio-signature";
        let kind = ("content-type", "application/x-www-form-urlencoded; charset=UTF-8");
        let sha1 = mac(HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"token", text, Encoding::Base64);
        assert_eq!(outcome(&hook, &[kind, (name, &sha1)], form), Ok(()));
        assert_eq!(outcome(&hook, &[kind, (name, &sha1)], b"To=%2B1"), Err(WebhookError::Signature));
        let json = ("content-type", "application/json");
        assert_eq!(outcome(&hook, &[json, (name, &sha1)], form), Err(WebhookError::Signature));
        let settings = "x-twilio-webhooks-signature-settings";
        let sha256 = mac(HMAC_SHA256, b"token", text, Encoding::Base64);
        let newer = [kind, (name, &*sha256), (settings, "key=k,algorithm=HMAC_SHA256")];
        assert_eq!(outcome(&hook, &newer, form), Ok(()));
        assert_eq!(outcome(&hook, &[kind, (name, &sha256)], form), Err(WebhookError::Signature));
        let unknown = [kind, (name, &*sha256), (settings, "algorithm=MD5")];
        assert_eq!(outcome(&hook, &unknown, form), Err(WebhookError::Malformed(settings)));

        let hash = hex(digest::digest(&digest::SHA256, BODY).as_ref());
        let url = format!("https://web.example.com/hook?bodySHA256={hash}");
        let signature = mac(HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"token", &[url.as_bytes()], Encoding::Base64);
        let headers = headers(&[json, (name, &signature)]);
        let run = |body| {
            hook.verify(&Signed { headers: &headers, url: &url, body, now: NOW, is_again: false }).map(drop)
        };
        assert_eq!(run(BODY), Ok(()));
        assert_eq!(run(b"{}"), Err(WebhookError::Signature));
    }

    #[test]
    fn shopify_has_two_fields_and_anybody_else_says_how_he_signs() {
        let hook = webhook(Scheme::Shopify, &["app"]);
        let right = mac(HMAC_SHA256, b"app", &[BODY], Encoding::Base64);
        for name in ["x-shopify-hmac-sha256", "shopify-hmac-sha256"] {
            assert_eq!(outcome(&hook, &[(name, &right)], BODY), Ok(()));
        }
        let both = [("x-shopify-hmac-sha256", &*right), ("shopify-hmac-sha256", "AAAA")];
        assert_eq!(outcome(&hook, &both, BODY), Err(WebhookError::Signature));

        for (digest, algorithm) in [
            (Digest::Sha1, HMAC_SHA1_FOR_LEGACY_USE_ONLY),
            (Digest::Sha256, HMAC_SHA256),
            (Digest::Sha512, HMAC_SHA512),
        ] {
            for encoding in [Encoding::Hex, Encoding::Base64] {
                let hook = webhook(
                    Scheme::Hmac(HmacForm {
                        header: "x-signature".into(),
                        prefix: "v=".into(),
                        digest,
                        encoding,
                    }),
                    &["key"],
                );
                let right = format!("v={}", mac(algorithm, b"key", &[BODY], encoding));
                assert_eq!(outcome(&hook, &[("x-signature", &right)], BODY), Ok(()));
                assert_eq!(
                    outcome(&hook, &[("x-signature", &right[2..])], BODY),
                    Err(WebhookError::Signature)
                );
                assert_eq!(outcome(&hook, &[], BODY), Err(WebhookError::NoSignature));
            }
        }
    }

    #[test]
    fn a_delivery_is_a_replay_only_when_it_was_delivered() {
        let hook = webhook(Scheme::Stripe, &["k"]);
        let field = format!("t={NOW},v1={}", hex256("k", &[format!("{NOW}.").as_bytes(), BODY]));
        let fields = [("stripe-signature", &*field)];
        let first = verify(&hook, &fields, BODY).unwrap();
        assert_eq!(outcome(&hook, &fields, BODY), Err(WebhookError::Replay), "while the first is under way");
        drop(first);
        let again = verify(&hook, &fields, BODY).expect("its sender tries again what failed");
        again.delivered();
        assert_eq!(outcome(&hook, &fields, BODY), Err(WebhookError::Replay));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_refused(at in 0usize..4096, bit in 0u8..8, which in 0usize..2) {
            let hook = webhook(Scheme::Slack, &["s"]);
            let mut body = BODY.to_vec();
            let mut signature =
                format!("v0={}", hex256("s", &[format!("v0:{NOW}:").as_bytes(), BODY])).into_bytes();
            let changed = if which == 0 { &mut body } else { &mut signature };
            let at = at % changed.len();
            changed[at] ^= 1 << bit;
            let Ok(value) = HeaderValue::from_bytes(&signature) else { return Ok(()) };
            let mut headers = headers(&[("x-slack-request-timestamp", &NOW.to_string())]);
            headers.push(HeaderName::from_static("x-slack-signature"), value);
            let verified = hook.verify(&Signed { headers: &headers, url: "", body: &body, now: NOW, is_again: false });
            prop_assert!(verified.is_err());
        }
    }
}
