//! The head of an answer in the form Lambda's streaming front wants. Pure.

use std::borrow::Cow;

use http::{HeaderName, header};
use proto::header::{Headers, value_to_text};
use serde::{Serialize, Serializer, ser::SerializeMap};

/// What separates the head from the body in a streamed answer (Lambda Developer Guide, "Response
/// streaming with Function URLs": eight null bytes).
pub(crate) const DELIMITER: [u8; 8] = [0; 8];

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

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> Headers {
        fields
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
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
}
