//! Header fields: an ordered list that keeps repetitions, how it looks on the wire, and which fields
//! are not forwarded.
//!
//! On the wire a list is an array of `[name, value]` pairs. A value is a string whose characters are
//! the value's bytes (ISO-8859-1), so that any byte HTTP allows travels through JSON and back.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser::SerializeSeq};

use crate::limits;

/// Header fields in the order in which they were sent, repetitions included.
///
/// Names are lower case, values hold no CR, LF or NUL: `http`'s types cannot hold anything else.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(HeaderName, HeaderValue)>);

impl Headers {
    /// An empty list.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// How many fields there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no field.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// The first value of `name`.
    pub fn get(&self, name: impl AsRef<str>) -> Option<&HeaderValue> {
        self.get_all(name).next()
    }

    /// Every value of `name`, in order.
    pub fn get_all(&self, name: impl AsRef<str>) -> impl Iterator<Item = &HeaderValue> {
        self.0.iter().filter(move |(own, _)| own.as_str() == name.as_ref()).map(|(_, value)| value)
    }

    /// Adds a field at the end.
    pub fn push(&mut self, name: HeaderName, value: HeaderValue) {
        self.0.push((name, value));
    }

    /// Removes every field called `name`.
    pub fn remove(&mut self, name: impl AsRef<str>) {
        self.0.retain(|(own, _)| own.as_str() != name.as_ref());
    }

    /// Replaces every field called `name` by one.
    pub fn set(&mut self, name: HeaderName, value: HeaderValue) {
        self.remove(&name);
        self.push(name, value);
    }

    /// Keeps the fields for which `keep` is true.
    pub fn retain(&mut self, mut keep: impl FnMut(&HeaderName, &HeaderValue) -> bool) {
        self.0.retain(|(name, value)| keep(name, value));
    }

    /// The size that [`limits::HEAD_BYTES`] is about: names, values and four bytes for each field.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
    }

    /// Whether the list is within [`limits::HEAD_BYTES`] and [`limits::HEADER_FIELDS`].
    #[must_use]
    pub fn is_within_limits(&self) -> bool {
        self.len() <= limits::HEADER_FIELDS && self.size_bytes() <= limits::HEAD_BYTES
    }

    /// Removes what belongs to one connection only (RFC 9110 §7.6.1): `Connection`, every field it
    /// names, and the fields that are hop-by-hop by themselves.
    ///
    /// A field that HTTP or this tunnel needs end to end stays even when `Connection` names it.
    /// Trailers are not carried, so `TE` and `Trailer` go too.
    pub fn strip_hop_by_hop(&mut self) {
        let named = self.named_by_connection();
        self.retain(|name, _| goes_on(name, &named));
    }

    /// The fields that [`Self::strip_hop_by_hop`] would leave.
    pub fn end_to_end(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        let named = self.named_by_connection();
        self.iter().filter(move |(name, _)| goes_on(name, &named))
    }

    /// The fields that `Connection` takes away.
    fn named_by_connection(&self) -> Vec<String> {
        self.get_all(header::CONNECTION)
            .flat_map(|value| value.as_bytes().split(|&b| b == b','))
            .filter_map(|token| std::str::from_utf8(token).ok())
            .map(|token| token.trim_matches([' ', '\t']).to_ascii_lowercase())
            .filter(|token| !is_end_to_end(token))
            .collect()
    }
}

/// Whether a field goes on beyond the connection whose `Connection` names these.
fn goes_on(name: &HeaderName, named: &[String]) -> bool {
    !is_hop_by_hop(name) && !named.iter().any(|token| token == name.as_str())
}

/// Fields that are hop-by-hop whether or not `Connection` names them.
///
/// `Proxy-Authorization` is for whoever consumes it (RFC 9110 §11.7.2), and a gateway does not. What
/// `Proxy-Authenticate` says is for the next client on the way back (§11.7.1), which is not the visitor.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// Fields that `Connection` cannot take away.
fn is_end_to_end(name: &str) -> bool {
    matches!(
        name,
        "authorization"
            | "cache-control"
            | "content-encoding"
            | "content-length"
            | "content-range"
            | "content-type"
            | "cookie"
            | "forwarded"
            | "host"
            | "set-cookie"
            | "traceparent"
            | "tracestate"
            | "via"
    ) || name.starts_with("x-forwarded-")
        || name.starts_with("x-tunnel-")
}

impl From<&HeaderMap> for Headers {
    fn from(map: &HeaderMap) -> Self {
        Self(map.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }
}

impl From<HeaderMap> for Headers {
    fn from(map: HeaderMap) -> Self {
        let mut headers = Self(Vec::with_capacity(map.len()));
        let mut last = None;
        for (name, value) in map {
            // Further values of a field come without its name.
            last = name.or(last);
            if let Some(name) = &last {
                headers.push(name.clone(), value);
            }
        }
        headers
    }
}

impl From<Headers> for HeaderMap {
    fn from(headers: Headers) -> Self {
        let mut map = Self::with_capacity(headers.len());
        for (name, value) in headers.0 {
            map.append(name, value);
        }
        map
    }
}

impl FromIterator<(HeaderName, HeaderValue)> for Headers {
    fn from_iter<I: IntoIterator<Item = (HeaderName, HeaderValue)>>(fields: I) -> Self {
        Self(fields.into_iter().collect())
    }
}

impl IntoIterator for Headers {
    type Item = (HeaderName, HeaderValue);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl fmt::Debug for Headers {
    /// Names only: values may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name.as_str())).finish()
    }
}

/// Whether a `content-type` is that of a stream of events (WHATWG HTML §9.2).
#[must_use]
pub fn is_event_stream(content_type: &[u8]) -> bool {
    let kind = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
}

/// The value's bytes as a string of the same number of characters (ISO-8859-1).
#[must_use]
pub fn value_to_text(value: &HeaderValue) -> Cow<'_, str> {
    match value.to_str() {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(value.as_bytes().iter().map(|&byte| char::from(byte)).collect()),
    }
}

/// The opposite of [`value_to_text`]; `None` for a character over U+00FF or a byte HTTP forbids.
#[must_use]
pub fn value_from_text(text: &str) -> Option<HeaderValue> {
    if text.is_ascii() {
        HeaderValue::from_str(text).ok()
    } else {
        let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
        HeaderValue::from_bytes(&bytes?).ok()
    }
}

impl Serialize for Headers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(self.len()))?;
        for (name, value) in self.iter() {
            seq.serialize_element(&(name.as_str(), value_to_text(value)))?;
        }
        seq.end()
    }
}

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Headers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of [name, value] pairs")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Headers, A::Error> {
                let forbidden = || de::Error::custom("a header value has a forbidden character");
                let mut names = Vec::with_capacity(USUAL_FIELDS);
                // All values lie in one piece of memory: many small ones cost more to make and to share.
                let mut values = Vec::with_capacity(USUAL_BYTES);
                while let Some((name, value)) = seq.next_element::<(Text<'de>, Text<'de>)>()? {
                    if names.len() == limits::HEADER_FIELDS {
                        return Err(de::Error::custom("too many header fields"));
                    }
                    let name = HeaderName::from_bytes(name.0.as_bytes())
                        .map_err(|_| de::Error::custom("a header name is not a token"))?;
                    push_value(&mut values, &value.0).ok_or_else(forbidden)?;
                    names.push((name, values.len()));
                }
                let mut values = Bytes::from(values);
                let mut start = 0;
                let mut headers = Headers(Vec::with_capacity(names.len()));
                for (name, end) in names {
                    let value = values.split_to(end - std::mem::replace(&mut start, end));
                    headers.push(name, HeaderValue::from_maybe_shared(value).map_err(|_| forbidden())?);
                }
                Ok(headers)
            }
        }
        deserializer.deserialize_seq(Visitor)
    }
}

/// How many fields, and bytes of their values, there is room for at once.
const USUAL_FIELDS: usize = 24;
const USUAL_BYTES: usize = 1024;

/// The opposite of [`value_to_text`], but for bytes that HTTP forbids.
fn push_value(bytes: &mut Vec<u8>, text: &str) -> Option<()> {
    if text.is_ascii() {
        bytes.extend_from_slice(text.as_bytes());
        return Some(());
    }
    for c in text.chars() {
        bytes.push(u8::try_from(u32::from(c)).ok()?);
    }
    Some(())
}

/// A string that is borrowed from the input where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(fields: &[(&str, &str)]) -> Headers {
        fields
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap()))
            .collect()
    }

    fn names(headers: &Headers) -> Vec<&str> {
        headers.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn strips_what_connection_names_but_never_what_http_needs() {
        let mut list = headers(&[
            ("host", "a"),
            ("connection", "close, X-Mine"),
            ("connection", " host,content-length,\tx-forwarded-for , cookie"),
            ("x-mine", "1"),
            ("content-length", "3"),
            ("x-forwarded-for", "::1"),
            ("cookie", "a=b"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("proxy-authorization", "secret"),
            ("x-other", "2"),
        ]);
        list.strip_hop_by_hop();
        assert_eq!(
            names(&list),
            ["host", "content-length", "x-forwarded-for", "cookie", "proxy-authorization", "x-other"]
        );
    }

    #[test]
    fn debug_shows_no_value() {
        let text = format!("{:?}", headers(&[("authorization", "Bearer secret")]));
        assert!(text.contains("authorization") && !text.contains("secret"));
    }

    #[test]
    fn refuses_what_could_inject_a_header() {
        for bad in [
            r#"[["a b","x"]]"#,
            r#"[["a","x\r\ny: z"]]"#,
            r#"[["a","x\u0000"]]"#,
            r#"[["","x"]]"#,
            r#"[["a","\u0100"]]"#,
            r#"[["a"]]"#,
            r#"{"a":"b"}"#,
        ] {
            assert!(serde_json::from_str::<Headers>(bad).is_err(), "{bad}");
        }
        let many = format!("[{}]", vec![r#"["a","b"]"#; limits::HEADER_FIELDS].join(","));
        assert_eq!(serde_json::from_str::<Headers>(&many).unwrap().len(), limits::HEADER_FIELDS);
        let more = format!("[{}]", vec![r#"["a","b"]"#; limits::HEADER_FIELDS + 1].join(","));
        assert!(serde_json::from_str::<Headers>(&more).is_err());
    }

    proptest! {
        #[test]
        fn any_legal_list_survives_the_wire(
            fields in proptest::collection::vec(("[a-z!#$%&'*+.^_`|~0-9-]{1,20}", proptest::collection::vec(
                prop_oneof![Just(b'\t'), 0x20u8..0x7f, 0x80u8..=0xff], 0..40)), 0..20)
        ) {
            let list: Headers = fields.iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_bytes(value).unwrap()))
                .collect();
            let json = serde_json::to_string(&list).unwrap();
            prop_assert_eq!(serde_json::from_str::<Headers>(&json).unwrap(), list);
        }

        #[test]
        fn stripping_is_idempotent_and_leaves_no_hop_by_hop_field(
            connection in "[a-zA-Z, -]{0,40}",
            others in proptest::collection::vec("[a-z-]{1,12}", 0..10),
        ) {
            let mut list = headers(&[("connection", connection.as_str())]);
            for name in &others {
                if let Ok(name) = name.parse::<HeaderName>() {
                    list.push(name, HeaderValue::from_static("v"));
                }
            }
            list.strip_hop_by_hop();
            let once = list.clone();
            list.strip_hop_by_hop();
            prop_assert_eq!(&once, &list);
            prop_assert!(list.iter().all(|(name, _)| !is_hop_by_hop(name)));
        }
    }
}
