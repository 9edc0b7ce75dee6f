//! The event of a Function URL (payload format 2.0), as Lambda's front makes it of a request.

use std::{
    borrow::Cow,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use base64_simd::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Version, header};
use proto::{
    header::value_to_text,
    json::{push_field, push_string},
    limits,
};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{calendar::common_log_time, lambda};

/// The name of the Function URL: the first label of its domain.
const URL_ID: &str = "localfront";

/// What an event is made of.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub(super) method: &'a str,
    /// In origin-form, byte for byte.
    pub(super) target: &'a [u8],
    pub(super) version: Version,
    /// Without the fields that only the front may set.
    pub(super) headers: &'a HeaderMap,
    /// What the public client asked for.
    pub(super) host: &'a HeaderValue,
    pub(super) secret: &'a str,
    pub(super) port: u16,
    pub(super) peer: IpAddr,
    pub(super) body: &'a [u8],
    pub(super) is_text: bool,
    pub(super) trace_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    version: &'static str,
    route_key: &'static str,
    raw_path: Cow<'a, str>,
    raw_query_string: Cow<'a, str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cookies: Vec<Cow<'a, str>>,
    headers: Fields<'a>,
    request_context: RequestContext<'a>,
    is_base64_encoded: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RequestContext<'a> {
    account_id: &'static str,
    api_id: &'static str,
    domain_name: &'a str,
    domain_prefix: &'static str,
    http: Http<'a>,
    request_id: String,
    route_key: &'static str,
    stage: &'static str,
    time: String,
    time_epoch: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Http<'a> {
    method: &'a str,
    path: Cow<'a, str>,
    protocol: &'static str,
    source_ip: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<Cow<'a, str>>,
}

/// Fields by name, each once.
struct Fields<'a>(Vec<(&'a str, Cow<'a, str>)>);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Builds the event.
pub(super) fn build(source: &Source<'_>) -> Bytes {
    let domain = format!("{URL_ID}.lambda-url.{}.on.aws", lambda::REGION);
    let question = source.target.iter().position(|&byte| byte == b'?');
    let (path, query) = match question {
        Some(at) => (&source.target[..at], &source.target[at + 1..]),
        None => (source.target, &[][..]),
    };
    let peer = source.peer.to_canonical().to_string();
    let mut fields: Vec<(&str, Cow<'_, str>)> = Vec::with_capacity(source.headers.keys_len() + 8);
    for name in source.headers.keys() {
        if *name == header::COOKIE || *name == header::HOST || is_set_by_lambda(name) {
            continue;
        }
        fields.push((name.as_str(), joined(source.headers, name)));
    }
    let forwarded_for = match source.headers.get("x-forwarded-for") {
        Some(_) => Cow::Owned(format!("{}, {peer}", joined(source.headers, &X_FORWARDED_FOR))),
        None => Cow::Borrowed(peer.as_str()),
    };
    fields.push(("host", Cow::Borrowed(&domain)));
    fields.push(("x-amzn-trace-id", Cow::Borrowed(source.trace_id)));
    fields.push(("x-forwarded-for", forwarded_for));
    fields.push(("x-forwarded-port", Cow::Owned(source.port.to_string())));
    fields.push(("x-forwarded-proto", Cow::Borrowed("http")));
    fields.push(("x-tunnel-front", Cow::Borrowed(source.secret)));
    fields.push(("x-tunnel-host", value_to_text(source.host)));
    // A bare "?" is the one thing that path and query do not tell.
    if question.is_some() && query.is_empty() {
        fields.push(("x-tunnel-target", latin1(source.target)));
    }
    let cookies = source
        .headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| match value_to_text(value) {
            Cow::Borrowed(text) => text.split(';').map(|one| Cow::Borrowed(one.trim())).collect::<Vec<_>>(),
            Cow::Owned(text) => text.split(';').map(|one| Cow::Owned(one.trim().to_owned())).collect(),
        })
        .filter(|cookie| !cookie.is_empty())
        .collect();
    let text = if source.is_text { std::str::from_utf8(source.body).ok() } else { None };
    // What is escaped counts as well: a text that might not fit its event, and is longer than in base64, goes in base64,
    // so that every body within the limit fits. What AWS does with such a text is not documented.
    let text = text.filter(|text| {
        text.len() < limits::EVENT_BYTES / 8 || escaped_bytes(text) <= text.len().div_ceil(3) * 4
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let event = Event {
        version: "2.0",
        route_key: "$default",
        raw_path: latin1(path),
        raw_query_string: latin1(query),
        cookies,
        headers: Fields(fields),
        request_context: RequestContext {
            account_id: "anonymous",
            api_id: URL_ID,
            domain_name: &domain,
            domain_prefix: URL_ID,
            http: Http {
                method: source.method,
                path: latin1(path),
                protocol: if source.version < Version::HTTP_11 { "HTTP/1.0" } else { "HTTP/1.1" },
                source_ip: peer.clone(),
                user_agent: source.headers.get(header::USER_AGENT).map(value_to_text),
            },
            request_id: lambda::random_uuid(),
            route_key: "$default",
            stage: "$default",
            time: common_log_time(now.as_secs()),
            time_epoch: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        },
        is_base64_encoded: !source.body.is_empty() && text.is_none(),
    };
    let body_bytes = text.map_or(source.body.len().div_ceil(3) * 4, |text| text.len() / 8 * 9);
    let mut json = Vec::with_capacity(2048 + body_bytes);
    serde_json::to_writer(&mut json, &event).expect("the event has string keys and writes to memory");
    if source.body.is_empty() {
        return json.into();
    }
    // That is most of an event, and nothing looks at it byte by byte.
    push_field(&mut json, "body", |json| match text {
        Some(text) => push_string(json, text),
        None => {
            json.push(b'"');
            STANDARD.encode_append(source.body, json);
            json.push(b'"');
        }
    });
    json.into()
}

/// How long a text is as the inside of a JSON string.
fn escaped_bytes(text: &str) -> usize {
    let escaped = |byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..=0x1f => 6,
        _ => 1,
    };
    text.bytes().map(escaped).sum()
}

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Fields that Lambda's front writes itself.
fn is_set_by_lambda(name: &HeaderName) -> bool {
    matches!(name.as_str(), "x-amzn-trace-id" | "x-forwarded-for" | "x-forwarded-port" | "x-forwarded-proto")
}

/// The values of one field as one text.
fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Cow<'a, str> {
    let mut values = headers.get_all(name).iter().map(value_to_text);
    let first = values.next().unwrap_or_default();
    values.fold(first, |mut all, value| {
        let text = all.to_mut();
        text.push(',');
        text.push_str(&value);
        all
    })
}

/// Bytes as characters of the same number.
fn latin1(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() => Cow::Borrowed(text),
        _ => Cow::Owned(bytes.iter().map(|&byte| char::from(byte)).collect()),
    }
}

/// Whether Lambda's front hands a body of this type on as text where it is UTF-8.
pub(super) fn is_text(headers: &HeaderMap) -> bool {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return false;
    }
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.starts_with("text/")
        || kind.ends_with("+json")
        || kind.ends_with("+xml")
        || matches!(kind.as_str(), "application/json" | "application/javascript" | "application/xml")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn event(target: &str, headers: &[(&'static str, &[u8])], body: &[u8]) -> Value {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        let is_text = is_text(&map);
        let json = build(&Source {
            method: "POST",
            target: target.as_bytes(),
            version: Version::HTTP_11,
            headers: &map,
            host: &HeaderValue::from_static("demo.localhost:8080"),
            secret: "s3cret",
            port: 8080,
            peer: "::ffff:127.0.0.1".parse().unwrap(),
            body,
            is_text,
            trace_id: "Root=1-0-0",
        });
        serde_json::from_slice(&json).unwrap()
    }

    #[test]
    fn a_text_within_the_limit_fits_its_event_whatever_must_be_escaped() {
        for (unit, is_base64) in
            [("\"\\", true), ("{\"key\": \"value\"},\n", false), ("\u{1}", true), ("\u{e4}", false)]
        {
            let body = unit.repeat(limits::REQUEST_BODY_BYTES / unit.len());
            let event = event("/", &[("content-type", b"application/json")], body.as_bytes());
            assert_eq!(event["isBase64Encoded"], is_base64, "{unit:?}");
            let sent = event["body"].as_str().unwrap();
            if is_base64 {
                assert!(STANDARD.decode_to_vec(sent).unwrap() == body.as_bytes());
            } else {
                assert!(sent == body);
            }
            assert!(serde_json::to_string(&event).unwrap().len() <= limits::EVENT_BYTES, "{unit:?}");
        }
        assert_eq!(event("/", &[("content-type", b"text/plain")], b"\"\"\"\"")["isBase64Encoded"], false);
    }

    #[test]
    fn has_the_shape_of_payload_2_0() {
        let event = event(
            "/a%2Fb?x=1&x=2",
            &[
                ("host", b"demo.localhost:8080"),
                ("x-one", b"1"),
                ("cookie", b"a=b; c=\"d\""),
                ("x-many", b"1"),
                ("cookie", b"e=f"),
                ("x-many", b"2, 3"),
                ("x-bytes", b"\xe4\xff"),
                ("user-agent", b"curl"),
            ],
            b"",
        );
        assert_eq!(event["version"], "2.0");
        assert_eq!(event["rawPath"], "/a%2Fb");
        assert_eq!(event["rawQueryString"], "x=1&x=2");
        assert_eq!(event["cookies"], serde_json::json!(["a=b", "c=\"d\"", "e=f"]));
        assert_eq!(event["headers"]["x-many"], "1,2, 3");
        assert_eq!(event["headers"]["x-bytes"], "\u{e4}\u{ff}");
        assert_eq!(event["headers"]["x-tunnel-host"], "demo.localhost:8080");
        assert_eq!(event["headers"]["x-tunnel-front"], "s3cret");
        assert_eq!(event["headers"]["x-forwarded-for"], "127.0.0.1");
        assert_eq!(event["headers"]["x-forwarded-port"], "8080");
        assert_eq!(event["headers"]["host"], "localfront.lambda-url.local-1.on.aws");
        assert!(event["headers"].get("cookie").is_none());
        assert!(event["headers"].get("x-tunnel-target").is_none());
        assert!(event.get("body").is_none());
        assert_eq!(event["isBase64Encoded"], false);
        assert_eq!(event["requestContext"]["http"]["method"], "POST");
        assert_eq!(event["requestContext"]["http"]["userAgent"], "curl");
        assert_eq!(event["requestContext"]["http"]["sourceIp"], "127.0.0.1");
        assert_eq!(event["requestContext"]["stage"], "$default");
    }

    #[test]
    fn a_bare_question_mark_is_told_apart() {
        assert_eq!(event("/a?", &[], b"")["headers"]["x-tunnel-target"], "/a?");
        assert!(event("/a?b?", &[], b"")["headers"].get("x-tunnel-target").is_none());
        assert_eq!(event("/a?b?", &[], b"")["rawQueryString"], "b?");
        assert!(event("*", &[], b"")["headers"].get("x-tunnel-target").is_none());
    }

    #[test]
    fn bodies_are_text_only_where_that_is_safe() {
        let json: (&str, &[u8]) = ("content-type", b"application/json; charset=utf-8");
        let event_text = event("/", &[json], "\"ä\"".as_bytes());
        assert_eq!((&event_text["body"], &event_text["isBase64Encoded"]), (&"\"ä\"".into(), &false.into()));
        let not_utf8 = event("/", &[json], b"\xff");
        assert_eq!((&not_utf8["body"], &not_utf8["isBase64Encoded"]), (&"/w==".into(), &true.into()));
        let packed = event("/", &[json, ("content-encoding", b"gzip")], b"x");
        assert_eq!(packed["isBase64Encoded"], true);
        assert_eq!(event("/", &[("content-type", b"image/png")], b"x")["body"], "eA==");
        assert_eq!(event("/", &[], b"x")["isBase64Encoded"], true);
    }

    #[test]
    fn what_the_client_says_of_forwarding_is_appended_to() {
        let event = event("/", &[("x-forwarded-for", b"1.2.3.4"), ("x-forwarded-proto", b"https")], b"");
        assert_eq!(event["headers"]["x-forwarded-for"], "1.2.3.4, 127.0.0.1");
        assert_eq!(event["headers"]["x-forwarded-proto"], "http");
    }
}
