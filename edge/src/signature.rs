//! Signature Version 4 of the calls that every public request makes. Enters: a request of an SDK. Leaves: the same
//! with date, session token and authorization.
//!
//! The SDK's own signer derives its key anew for each call, which takes eight hashes, and hashes in portable code: a third
//! of all that `response` did for a message. Here the key is derived once a day, and aws-lc-rs hashes. What is not plain
//! (a query, a path or a field that would have to be normalised) is left to the SDK's signer, and so is every
//! further attempt, because that one corrects the clock by what the service said.
//!
//! The tests hold each signature against one of the SDK's own.

use std::{
    fmt::{self, Write as _},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use aws_credential_types::Credentials;
use aws_lc_rs::{digest, hmac};
use aws_runtime::{auth::sigv4, user_agent::UserAgentInterceptor};
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        auth::{AuthScheme, AuthSchemeEndpointConfig, AuthSchemeId, Sign},
        identity::{Identity, SharedIdentityResolver},
        interceptors::{
            Intercept, OverriddenHooks,
            context::{BeforeSerializationInterceptorContextRef, BeforeTransmitInterceptorContextMut},
            disable_interceptor,
        },
        orchestrator::HttpRequest,
        retries::RequestAttempts,
        runtime_components::{GetIdentityResolver, RuntimeComponents},
    },
};
use aws_smithy_types::config_bag::ConfigBag;
use http::HeaderValue;
use time::OffsetDateTime;

/// Signs the calls of one service in one region.
#[derive(Debug)]
pub struct Signature {
    service: &'static str,
    region: String,
    key: Mutex<Option<DayKey>>,
    sdk: sigv4::SigV4Signer,
}

/// The key of one day, for one pair of credentials.
struct DayKey {
    date: String,
    access_key: String,
    secret: String,
    key: hmac::Key,
}

impl fmt::Debug for DayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DayKey").field("date", &self.date).finish_non_exhaustive()
    }
}

impl AuthScheme for Signature {
    // The same name: it takes the place of the SDK's.
    fn scheme_id(&self) -> AuthSchemeId {
        sigv4::SCHEME_ID
    }

    fn identity_resolver(&self, resolvers: &dyn GetIdentityResolver) -> Option<SharedIdentityResolver> {
        resolvers.identity_resolver(self.scheme_id())
    }

    fn signer(&self) -> &dyn Sign {
        self
    }
}

impl Sign for Signature {
    fn sign_http_request(
        &self,
        request: &mut HttpRequest,
        identity: &Identity,
        endpoint: AuthSchemeEndpointConfig<'_>,
        components: &RuntimeComponents,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        let is_first = config.load::<RequestAttempts>().is_none_or(|attempts| attempts.attempts() <= 1);
        let signed = identity.data::<Credentials>().filter(|_| is_first).and_then(|credentials| {
            let now = components.time_source().unwrap_or_default().now();
            Some((credentials, self.sign(request, credentials, now)?))
        });
        let Some((credentials, Signed { stamp, authorization })) = signed else {
            return self.sdk.sign_http_request(request, identity, endpoint, components, config);
        };
        let headers = request.headers_mut();
        headers.insert("x-amz-date", HeaderValue::try_from(stamp)?);
        if let Some(token) = credentials.session_token() {
            headers.insert("x-amz-security-token", sensitive(token)?);
        }
        headers.insert("authorization", sensitive(&authorization)?);
        Ok(())
    }
}

struct Signed {
    /// The date and time in it, `20260401T235959Z`.
    stamp: String,
    authorization: String,
}

impl Signature {
    /// `service` is the name that is signed, such as `sqs`.
    #[must_use]
    pub fn new(service: &'static str, region: String) -> Self {
        Self { service, region, key: Mutex::default(), sdk: sigv4::SigV4Signer::new() }
    }

    /// Nothing for a request that is not plain.
    fn sign(&self, request: &HttpRequest, credentials: &Credentials, now: SystemTime) -> Option<Signed> {
        let body = request.body().bytes()?;
        let (host, path) = plain_target(request.uri())?;
        if request.method() != "POST" {
            return None;
        }
        let stamp = stamp(now)?;
        let date = &stamp[..8];
        let mut fields = vec![("host", host), ("x-amz-date", &*stamp)];
        fields.extend(credentials.session_token().map(|token| ("x-amz-security-token", token)));
        fields.extend(
            request
                .headers()
                .iter()
                .filter(|(name, _)| *name == "content-type" || *name == "host" || name.starts_with("x-amz-")),
        );
        fields.sort_unstable_by_key(|(name, _)| *name);
        let is_plain = |value: &str| {
            let bytes = value.as_bytes();
            value.is_ascii() && bytes.trim_ascii() == bytes && bytes.windows(2).all(|pair| pair != b"  ")
        };
        if fields.windows(2).any(|pair| pair[0].0 == pair[1].0)
            || !fields.iter().all(|(_, value)| is_plain(value))
        {
            return None;
        }
        let mut names = String::with_capacity(96);
        let mut canonical = String::with_capacity(512 + credentials.session_token().map_or(0, str::len));
        canonical.push_str("POST\n");
        push_path(&mut canonical, path);
        canonical.push_str("\n\n");
        for (name, value) in &fields {
            if !names.is_empty() {
                names.push(';');
            }
            names.push_str(name);
            for part in [name, ":", value, "\n"] {
                canonical.push_str(part);
            }
        }
        canonical.push('\n');
        canonical.push_str(&names);
        canonical.push('\n');
        push_hex(&mut canonical, digest::digest(&digest::SHA256, body).as_ref());

        let scope = [date, "/", &self.region, "/", self.service, "/aws4_request"].concat();
        let mut to_sign = ["AWS4-HMAC-SHA256\n", &stamp, "\n", &scope, "\n"].concat();
        push_hex(&mut to_sign, digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
        let tag = hmac::sign(&self.key(date, credentials), to_sign.as_bytes());

        let mut authorization = [
            "AWS4-HMAC-SHA256 Credential=",
            credentials.access_key_id(),
            "/",
            &scope,
            ", SignedHeaders=",
            &names,
            ", Signature=",
        ]
        .concat();
        push_hex(&mut authorization, tag.as_ref());
        Some(Signed { stamp, authorization })
    }

    fn key(&self, date: &str, credentials: &Credentials) -> hmac::Key {
        let (access_key, secret) = (credentials.access_key_id(), credentials.secret_access_key());
        // Nothing that runs under the lock can panic half way.
        let mut day = self.key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(day) = &*day
            && day.date == date
            && day.access_key == access_key
            && day.secret == secret
        {
            return day.key.clone();
        }
        let with =
            |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes());
        let key = with(format!("AWS4{secret}").as_bytes(), date);
        let key = with(key.as_ref(), &self.region);
        let key = with(key.as_ref(), self.service);
        let key = with(key.as_ref(), "aws4_request");
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_ref());
        *day = Some(DayKey {
            date: date.to_owned(),
            access_key: access_key.to_owned(),
            secret: secret.to_owned(),
            key: key.clone(),
        });
        key
    }
}

/// Host and path of `scheme://host/path`, without the scheme's own port; nothing where there is a query, or a path that
/// could be written in another way.
fn plain_target(uri: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let own = match scheme {
        "https" => ":443",
        "http" => ":80",
        _ => return None,
    };
    let host = host.strip_suffix(own).unwrap_or(host);
    let is_plain =
        !host.contains(['?', '@']) && !path.contains('?') && !path.contains("/.") && !path.contains("//");
    is_plain.then_some((host, if path.is_empty() { "/" } else { path }))
}

/// Appends a path as it is signed: what it has in percent form already once more (Signature Version 4, "canonical URI").
fn push_path(text: &mut String, path: &str) {
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to memory does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

/// Nothing for a time that has no such form.
fn stamp(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    let time = OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()?;
    let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
    let (hour, minute, second) = (time.hour(), time.minute(), time.second());
    let mut text = String::with_capacity(16);
    write!(text, "{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z").ok()?;
    Some(text)
}

fn sensitive(value: &str) -> Result<HeaderValue, BoxError> {
    let mut value = HeaderValue::from_str(value)?;
    value.set_sensitive(true);
    Ok(value)
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// Names this program to AWS with one fixed text. The SDK's own name is put together anew for each call, of some twenty parts.
#[derive(Debug)]
pub struct ShortName;

impl Intercept for ShortName {
    fn name(&self) -> &'static str {
        "ShortName"
    }

    fn overridden_hooks(&self) -> OverriddenHooks {
        OverriddenHooks::READ_BEFORE_EXECUTION | OverriddenHooks::MODIFY_BEFORE_SIGNING
    }

    fn read_before_execution(
        &self,
        _context: &BeforeSerializationInterceptorContextRef<'_>,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let reason = "another interceptor names the program";
        config.interceptor_state().store_put(disable_interceptor::<UserAgentInterceptor>(reason));
        Ok(())
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        const NAME: HeaderValue =
            HeaderValue::from_static(concat!("tunnel-edge/", env!("CARGO_PKG_VERSION")));
        context.request_mut().headers_mut().insert("user-agent", NAME);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use aws_sigv4::{
        http_request::{SignableBody, SignableRequest, SigningSettings, sign},
        sign::v4,
    };
    use aws_smithy_types::body::SdkBody;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn signer(service: &'static str) -> Signature {
        Signature::new(service, "eu-central-1".to_owned())
    }

    fn request(uri: &str, body: &str, fields: &[(&'static str, &'static str)]) -> HttpRequest {
        let mut request = HttpRequest::new(SdkBody::from(body.to_owned()));
        request.set_method("POST").unwrap();
        request.set_uri(uri.to_owned()).unwrap();
        for &(name, value) in fields {
            request.headers_mut().append(name, value);
        }
        request
    }

    /// What the SDK's crate signs of the same fields.
    fn theirs(request: &HttpRequest, service: &str, keys: &Credentials, now: SystemTime) -> String {
        let identity = Identity::from(keys.clone());
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region("eu-central-1")
            .name(service)
            .time(now)
            .settings(SigningSettings::default())
            .build()
            .unwrap()
            .into();
        let fields = request.headers().iter().filter(|(name, _)| *name != "x-other");
        let body = SignableBody::Bytes(request.body().bytes().unwrap());
        let signable = SignableRequest::new(request.method(), request.uri(), fields, body).unwrap();
        let (instructions, _) = sign(signable, &params).unwrap().into_parts();
        let (headers, _) = instructions.into_parts();
        headers.into_iter().find(|header| header.name() == "authorization").unwrap().value().to_owned()
    }

    #[test]
    fn signs_as_the_sdk_does() {
        let keys = [
            Credentials::new("AKID", "secret/+=", None, None, "test"),
            Credentials::new("ASIA", "other", Some("token/with+signs==".to_owned()), None, "test"),
        ];
        let fields = [
            ("content-type", "application/x-amz-json-1.0"),
            ("x-amz-target", "AmazonSQS.SendMessage"),
            ("x-other", "  is  not signed "),
        ];
        let long = "ä".repeat(100_000);
        // The last second of a day and the first of the next: the key goes with the day.
        for now in [at(1_790_000_000), at(1_790_035_199), at(1_790_035_200), at(951_782_400)] {
            for service in ["sqs", "states"] {
                let signer = signer(service);
                for keys in &keys {
                    for body in ["", "{}", r#"{"a":"b"}"#, &long] {
                        for uri in [
                            "https://sqs.eu-central-1.amazonaws.com/",
                            "https://sqs.eu-central-1.amazonaws.com:443/",
                            "http://127.0.0.1:4566/",
                            "http://127.0.0.1:80",
                            "https://a.execute-api.eu-central-1.amazonaws.com/dev/@connections/L0SM9cOFvHcCIhw%3D",
                            "http://127.0.0.1:4566/a.b/!$&'()*+,;=:@~_-%20/",
                        ] {
                            let request = request(uri, body, &fields);
                            // Twice: with a new key, and with the one that is kept.
                            for _ in 0..2 {
                                let ours = signer.sign(&request, keys, now).unwrap().authorization;
                                assert_eq!(ours, theirs(&request, service, keys, now), "{uri} {body:.20}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_the_sdk() {
        let keys = Credentials::new("AKID", "secret", None, None, "test");
        let signed =
            |uri, fields: &[_]| signer("sqs").sign(&request(uri, "{}", fields), &keys, at(1)).is_some();
        assert!(signed("https://h/", &[]));
        for uri in [
            "https://h/?query",
            "https://h/path?query",
            "https://h?query",
            "https://user@h/",
            "https://h/a//b",
            "https://h/a/../b",
            "https://h/.",
            "ftp://h/",
            "/",
        ] {
            assert!(!signed(uri, &[]), "{uri}");
        }
        for fields in [
            [("x-amz-a", " 1"), ("x-amz-b", "2")],
            [("x-amz-a", "1  1"), ("x-amz-b", "2")],
            [("x-amz-a", "1"), ("x-amz-a", "2")],
            [("host", "other"), ("x-amz-a", "2")],
        ] {
            assert!(!signed("https://h/", &fields), "{fields:?}");
        }
        let mut get = request("https://h/", "", &[]);
        get.set_method("GET").unwrap();
        assert!(signer("sqs").sign(&get, &keys, at(1)).is_none());
    }

    #[test]
    fn no_secret_is_printed() {
        let signer = signer("sqs");
        signer.key("20260401", &Credentials::new("AKID", "hidden", None, None, "test"));
        let text = format!("{signer:?}");
        assert!(text.contains("20260401") && !text.contains("hidden"), "{text}");
    }
}
