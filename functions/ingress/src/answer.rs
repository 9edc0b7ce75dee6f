//! The head of an answer in the form Lambda's streaming front wants, and the pages for errors. Pure.

use std::borrow::Cow;

use http::{HeaderName, HeaderValue, header};
use proto::{
    error::ErrorCode,
    forwarded,
    header::{Headers, value_to_text},
    id::RequestId,
};
use serde::{Serialize, Serializer, ser::SerializeMap};

/// What separates the head from the body in a streamed answer (Lambda Developer Guide, "Response
/// streaming with Function URLs": eight null bytes).
const DELIMITER: [u8; 8] = [0; 8];

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Prelude<'a> {
    status_code: u16,
    headers: Joined<'a>,
    cookies: Vec<Cow<'a, str>>,
}

/// Fields as an object. The front takes one value a name, so repeated fields are joined with commas
/// (RFC 9110 §5.3); cookies, which may not be joined, travel apart.
struct Joined<'a>(&'a Headers);

impl Serialize for Joined<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut done: Vec<&HeaderName> = Vec::with_capacity(self.0.len());
        for (name, first) in self.0.iter() {
            if *name == header::SET_COOKIE || done.contains(&name) {
                continue;
            }
            done.push(name);
            let mut value = value_to_text(first);
            for more in self.0.get_all(name).skip(1) {
                value = Cow::Owned(format!("{value}, {}", value_to_text(more)));
            }
            map.serialize_entry(name.as_str(), &value)?;
        }
        map.end()
    }
}

/// The head as bytes, delimiter included.
#[must_use]
pub fn prelude(status: u16, headers: &Headers) -> Vec<u8> {
    let cookies = headers.get_all(header::SET_COOKIE).map(value_to_text).collect();
    let prelude = Prelude { status_code: status, headers: Joined(headers), cookies };
    let mut bytes = serde_json::to_vec(&prelude).expect("a head has string keys and no failing serializer");
    bytes.extend_from_slice(&DELIMITER);
    bytes
}

/// Makes the fields of the upstream's response those of our answer: hop-by-hop fields go, the request id
/// comes, and in path mode what names a path of the upstream is moved under `prefix`.
pub fn finish(headers: &mut Headers, request_id: &RequestId, prefix: Option<&str>, host: &str) {
    headers.strip_hop_by_hop();
    if let Some(prefix) = prefix {
        let fields = std::mem::take(headers).into_iter().map(|(name, value)| {
            let moved = match name.as_str() {
                "location" | "content-location" => move_location(&value, prefix, host),
                "set-cookie" => move_cookie(&value, prefix),
                _ => None,
            };
            (name, moved.unwrap_or(value))
        });
        *headers = fields.collect();
    }
    let id = HeaderValue::from_str(request_id.as_str()).expect("hexadecimal digits are a header value");
    headers.set(forwarded::REQUEST_ID, id);
}

fn move_location(value: &HeaderValue, prefix: &str, host: &str) -> Option<HeaderValue> {
    let location = value.to_str().ok()?;
    if location.starts_with('/') && !location.starts_with("//") {
        return HeaderValue::from_str(&format!("{prefix}{location}")).ok();
    }
    // An absolute address of our own public host, as an upstream makes it from X-Forwarded-Host.
    let (scheme, rest) =
        location.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"))?;
    let path = rest.strip_prefix(host)?;
    if !(path.is_empty() || path.starts_with(['/', '?', '#'])) || path.starts_with(&format!("{prefix}/")) {
        return None;
    }
    HeaderValue::from_str(&format!("{scheme}://{host}{prefix}{path}")).ok()
}

fn move_cookie(value: &HeaderValue, prefix: &str) -> Option<HeaderValue> {
    let bytes = value.as_bytes();
    let mut moved = Vec::with_capacity(bytes.len() + prefix.len());
    let mut changed = false;
    for (index, part) in bytes.split(|&b| b == b';').enumerate() {
        if index > 0 {
            moved.push(b';');
        }
        let path = part.trim_ascii_start();
        if index > 0 && path.len() > 5 && path[..5].eq_ignore_ascii_case(b"path=") && path[5] == b'/' {
            let space = part.len() - path.len();
            moved.extend_from_slice(&part[..space + 5]);
            moved.extend_from_slice(prefix.as_bytes());
            // "/" alone would become "/web/", which does not cover "/web".
            if path[5..].trim_ascii_end() != b"/" {
                moved.extend_from_slice(&path[5..]);
            }
            changed = true;
        } else {
            moved.extend_from_slice(part);
        }
    }
    changed.then(|| HeaderValue::from_bytes(&moved).ok()).flatten()
}

/// An error as a whole answer: head and body in one piece.
#[must_use]
pub fn problem(code: ErrorCode, request_id: &RequestId, html: bool, head_only: bool) -> Vec<u8> {
    let status = code.status();
    let body = if html { page(code, request_id) } else { document(code, request_id) };
    let content_type = if html { "text/html; charset=utf-8" } else { "application/problem+json" };
    let mut headers = Headers::new();
    let mut field = |name: HeaderName, value: &str| {
        headers.push(name, HeaderValue::from_str(value).expect("fixed texts are header values"));
    };
    field(header::CONTENT_TYPE, content_type);
    field(header::CONTENT_LENGTH, &body.len().to_string());
    field(header::CACHE_CONTROL, "no-store");
    field(forwarded::ERROR, code.as_str());
    field(forwarded::REQUEST_ID, request_id.as_str());
    if matches!(code, ErrorCode::TooManyRequests | ErrorCode::EdgeBusy | ErrorCode::TunnelOffline) {
        field(header::RETRY_AFTER, "2");
    }
    let mut bytes = prelude(status.as_u16(), &headers);
    if !head_only {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

/// RFC 9457.
fn document(code: ErrorCode, request_id: &RequestId) -> String {
    #[derive(Serialize)]
    struct Problem<'a> {
        r#type: &'a str,
        title: &'a str,
        status: u16,
        detail: &'a str,
        code: &'a str,
        request_id: &'a str,
    }
    let status = code.status();
    let problem = Problem {
        r#type: "about:blank",
        title: status.canonical_reason().unwrap_or_default(),
        status: status.as_u16(),
        detail: code.sentence(),
        code: code.as_str(),
        request_id: request_id.as_str(),
    };
    let mut text = serde_json::to_string_pretty(&problem).expect("a problem has string keys");
    text.push('\n');
    text
}

fn page(code: ErrorCode, request_id: &RequestId) -> String {
    let status = code.status();
    let title = status.canonical_reason().unwrap_or_default();
    // Nothing of the request stands here: every part is a fixed text or a number of our own.
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\"><title>{number} {title}</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1.5rem}}\
         h1{{font-size:1.5rem}}code{{font-size:.9em}}p.id{{opacity:.7;font-size:.85rem}}</style></head>\
         <body><h1>{number} {title}</h1><p>{sentence}</p><p class=\"id\"><code>{code}</code> · request \
         <code>{request_id}</code></p></body></html>\n",
        number = status.as_u16(),
        sentence = code.sentence(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> Headers {
        fields
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    fn id() -> RequestId {
        RequestId::from_random([0xab; 16])
    }

    #[test]
    fn cookies_travel_apart_and_other_repetitions_joined_in_order() {
        let list = headers(&[
            ("x-b", "1"),
            ("set-cookie", "a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT"),
            ("x-a", "2"),
            ("set-cookie", "b=2"),
            ("x-b", ""),
        ]);
        let bytes = prelude(200, &list);
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(
            text,
            "{\"statusCode\":200,\"headers\":{\"x-b\":\"1, \",\"x-a\":\"2\"},\
             \"cookies\":[\"a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT\",\"b=2\"]}\0\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn bytes_beyond_ascii_are_characters_of_the_same_number() {
        let list: Headers = [(HeaderName::from_static("x"), HeaderValue::from_bytes(b"\xe9\xff").unwrap())]
            .into_iter()
            .collect();
        assert!(String::from_utf8(prelude(200, &list)).unwrap().contains("\u{e9}\u{ff}"));
    }

    #[test]
    fn path_mode_moves_locations_and_cookie_paths_of_our_own() {
        for (location, moved) in [
            ("/login", "/web/login"),
            ("/", "/web/"),
            ("//other/x", "//other/x"),
            ("next", "next"),
            ("https://pub:8080/x?y", "https://pub:8080/web/x?y"),
            ("https://pub:8080/web/x", "https://pub:8080/web/x"),
            ("https://pub:8080.evil/", "https://pub:8080.evil/"),
            ("https://other/x", "https://other/x"),
        ] {
            let mut list: Headers =
                [(header::LOCATION, HeaderValue::from_str(location).unwrap())].into_iter().collect();
            finish(&mut list, &id(), Some("/web"), "pub:8080");
            assert_eq!(list.get("location").unwrap(), moved);
            let mut list: Headers =
                [(header::LOCATION, HeaderValue::from_str(location).unwrap())].into_iter().collect();
            finish(&mut list, &id(), None, "pub:8080");
            assert_eq!(list.get("location").unwrap(), location);
        }
        for (cookie, moved) in [
            ("a=1; Path=/; HttpOnly", "a=1; Path=/web; HttpOnly"),
            ("a=1;path=/x", "a=1;path=/web/x"),
            ("path=/x", "path=/x"),
            ("a=1; Path=x", "a=1; Path=x"),
            ("a=1; Domain=b", "a=1; Domain=b"),
        ] {
            let mut list: Headers =
                [(header::SET_COOKIE, HeaderValue::from_str(cookie).unwrap())].into_iter().collect();
            finish(&mut list, &id(), Some("/web"), "pub");
            assert_eq!(list.get("set-cookie").unwrap(), moved);
        }
    }

    #[test]
    fn a_problem_says_its_code_and_request_in_both_forms() {
        for code in ErrorCode::ALL {
            for html in [true, false] {
                let text = String::from_utf8(problem(*code, &id(), html, false)).unwrap();
                let (head, body) = text.split_once("\0\0\0\0\0\0\0\0").unwrap();
                assert!(head.contains(&format!("\"x-tunnel-error\":\"{code}\"")), "{head}");
                assert!(head.contains(&format!("\"content-length\":\"{}\"", body.len())));
                assert!(body.contains(id().as_str()) && body.contains(code.as_str()));
            }
            assert!(problem(*code, &id(), false, true).ends_with(&DELIMITER));
        }
    }
}
