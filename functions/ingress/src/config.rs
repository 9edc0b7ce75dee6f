//! What the environment says about Lambda's own front, which stands before this function.
//!
//! That front unpacks `gzip` and `br` and drops `Content-Encoding`, renames `Content-Length`, and lets 200 MB
//! through (docs/aws-fronts.md). Enters heads; leaves heads that are true behind it.

use std::time::Duration;

use edge::config::{ConfigError, Env, env};
use exchange::public::Head;
use http::{HeaderName, HeaderValue, header};
use proto::{header::Headers, limits};

/// The length that the upstream announced, under a name that no front touches.
pub const LENGTH: HeaderName = HeaderName::from_static("x-tunnel-length");

/// A copy of `WWW-Authenticate`, for a front that can give it its name back.
pub const AUTHENTICATE: HeaderName = HeaderName::from_static("x-tunnel-www-authenticate");

/// Fields that are true of the packed body alone (RFC 9530, RFC 3230, RFC 1864).
const DIGESTS: [&str; 4] = ["content-digest", "repr-digest", "digest", "content-md5"];

/// How to treat Lambda's front.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Whether the front unpacks bodies: upstreams are asked not to pack them then.
    pub is_unpacked: bool,
    /// How long a response may pause, if it may not for ever.
    pub stream_idle: Option<Duration>,
    /// Whether short bodies of unknown length are kept until they are whole.
    pub is_held: bool,
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    ///
    /// When a variable is wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let is_unpacked = env.asks_for_identity()?;
        let stream_idle = match env.optional(env::STREAM_IDLE_SECS).as_deref() {
            None | Some("0") => None,
            Some(_) => {
                Some(env.secs(env::STREAM_IDLE_SECS, limits::RESPONSE_DURATION, limits::RESPONSE_DURATION)?)
            }
        };
        Ok(Self { is_unpacked, stream_idle, is_held: env.holds_unknown_length()? })
    }

    /// What the upstream is asked for.
    pub fn request(&self, headers: &mut Headers) {
        if self.is_unpacked && headers.get(header::ACCEPT_ENCODING).is_some() {
            headers.set(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
    }

    /// Whether this answer is kept until it is whole: nobody would see that it is not. Events are made to be read one by
    /// one, and their reader comes back by itself.
    #[must_use]
    pub fn holds(&self, head: &Head, is_head_only: bool) -> bool {
        const STREAMS: [&[u8]; 3] = [b"text/event-stream", b"application/x-ndjson", b"multipart/"];
        let kind = head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let is_like =
            |name: &[u8]| kind.get(..name.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(name));
        if is_head_only || matches!(head.status, 204 | 304) || STREAMS.into_iter().any(is_like) {
            return false;
        }
        let is_length_known = head.headers.get(header::CONTENT_LENGTH).is_some();
        // Unpacked by the front, it would have another length.
        let is_changed = self.is_unpacked && is_packed(&head.headers);
        self.is_held && !is_length_known && !is_changed
    }

    /// What the public client is told of the answer.
    pub fn response(&self, head: &mut Head) {
        let headers = &mut head.headers;
        let copies = [(header::CONTENT_LENGTH, LENGTH), (header::WWW_AUTHENTICATE, AUTHENTICATE)];
        for (from, to) in copies {
            headers.remove(&to);
            // A body that the front unpacks has another length behind it.
            let is_known = from != header::CONTENT_LENGTH || !self.is_unpacked || !is_packed(headers);
            let values: Vec<_> = headers.get_all(&from).filter(|_| is_known).cloned().collect();
            for value in values {
                headers.push(to.clone(), value);
            }
        }
        if self.is_unpacked && is_packed(headers) {
            headers.retain(|name, _| !DIGESTS.contains(&name.as_str()));
        }
    }
}

/// Whether the front would unpack the body.
fn is_packed(headers: &Headers) -> bool {
    headers.get(header::CONTENT_ENCODING).is_some_and(|value| {
        let coding = value.as_bytes().trim_ascii();
        [&b"gzip"[..], b"x-gzip", b"br"].iter().any(|packed| coding.eq_ignore_ascii_case(packed))
    })
}

/// Whether a body of this announced length is more than the front lets through.
#[must_use]
pub fn is_too_long(head: &Head, is_head_only: bool) -> bool {
    let length = head.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let has_body = !is_head_only && head.status != 304;
    has_body && length.and_then(|text| text.parse::<u64>().ok()).is_some_and(|l| l > limits::RESPONSE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(fields: &[(&'static str, &str)]) -> Head {
        let headers = fields
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
        Head { status: 200, headers: headers.collect() }
    }

    #[test]
    fn what_the_front_takes_away_is_there_under_another_name() {
        let config = Config { is_unpacked: true, stream_idle: None, is_held: true };
        let mut plain = head(&[
            ("content-length", "5"),
            ("content-digest", "sha-256=:x:"),
            ("x-tunnel-length", "forged"),
            ("www-authenticate", "Basic"),
        ]);
        config.response(&mut plain);
        assert_eq!(plain.headers.get(LENGTH).unwrap(), "5");
        assert_eq!(plain.headers.get_all(LENGTH).count(), 1);
        assert_eq!(plain.headers.get(AUTHENTICATE).unwrap(), "Basic");
        assert!(plain.headers.get("content-digest").is_some());
        let packed = [("content-length", "5"), ("content-encoding", "BR"), ("content-digest", "sha-256=:x:")];
        let mut one = head(&packed);
        config.response(&mut one);
        assert!(one.headers.get(LENGTH).is_none() && one.headers.get("content-digest").is_none());
        let mut other = head(&packed);
        Config { is_unpacked: false, ..config }.response(&mut other);
        assert!(other.headers.get(LENGTH).is_some() && other.headers.get("content-digest").is_some());
    }

    #[test]
    fn upstreams_are_asked_for_what_arrives() {
        let config = Config { is_unpacked: true, stream_idle: None, is_held: true };
        let mut asked = head(&[("accept-encoding", "gzip, br")]).headers;
        config.request(&mut asked);
        assert_eq!(asked.get("accept-encoding").unwrap(), "identity");
        let mut silent = head(&[]).headers;
        config.request(&mut silent);
        assert!(silent.get("accept-encoding").is_none());
        let mut passed = head(&[("accept-encoding", "gzip, br")]).headers;
        Config { is_unpacked: false, ..config }.request(&mut passed);
        assert_eq!(passed.get("accept-encoding").unwrap(), "gzip, br");
    }

    #[test]
    fn what_has_no_length_and_is_no_stream_is_kept_where_that_is_asked_for() {
        let config = Config { is_unpacked: true, stream_idle: None, is_held: true };
        for (fields, is_held) in [
            (&[("content-type", "text/html")][..], true),
            (&[], true),
            (&[("content-type", "Text/Event-Stream; charset=utf-8")], false),
            (&[("content-type", "multipart/x-mixed-replace;boundary=x")], false),
            (&[("content-encoding", "gzip")], false),
            (&[("content-length", "5")], false),
        ] {
            assert_eq!(config.holds(&head(fields), false), is_held, "{fields:?}");
            assert!(!config.holds(&head(fields), true));
            assert!(!Config { is_held: false, ..config }.holds(&head(fields), false));
        }
    }

    #[test]
    fn one_byte_more_than_the_front_lets_through_is_too_long() {
        let most = head(&[("content-length", &limits::RESPONSE_BYTES.to_string())]);
        let more = head(&[("content-length", &(limits::RESPONSE_BYTES + 1).to_string())]);
        assert!(!is_too_long(&most, false) && is_too_long(&more, false) && !is_too_long(&more, true));
    }
}
