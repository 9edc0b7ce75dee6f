//! The Function URL's event (payload format 2.0): what the front hands over.
//!
//! Declared here and not taken from the event crate for two reasons: that one refuses an event with a
//! header value beyond ASCII, and sorts the fields by hash. A test holds this against it.

use std::{borrow::Cow, fmt};

use base64_simd::STANDARD;
use exchange::route::Arrival;
use http::{HeaderName, HeaderValue, Method, header};
use proto::{
    error::ErrorCode,
    header::{Headers, value_from_text},
};
use serde::{Deserialize, Deserializer, de};

/// One public request as Lambda's front describes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontEvent<'a> {
    /// The path, percent-encoding untouched.
    pub raw_path: String,
    /// The query without its `?`.
    #[serde(default)]
    pub raw_query_string: String,
    /// `name=value` for each cookie.
    #[serde(default)]
    pub cookies: Vec<String>,
    /// The other fields; repeated ones are joined with commas.
    #[serde(default)]
    pub headers: Fields,
    /// The rest.
    pub request_context: FrontContext,
    /// The body. One in base64 stays where it is: it may be most of an event's 6 MB.
    #[serde(borrow, default, deserialize_with = "text")]
    pub body: Option<Cow<'a, str>>,
    /// Whether [`FrontEvent::body`] is base64.
    #[serde(default)]
    pub is_base64_encoded: bool,
}

impl FrontEvent<'_> {
    /// The head of the request and its body.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadRequest`] when it is none that HTTP allows.
    pub fn arrival(self) -> Result<(Arrival, Vec<u8>), ErrorCode> {
        let method = Method::from_bytes(self.request_context.http.method.as_bytes())
            .map_err(|_| ErrorCode::BadRequest)?;
        let body = match self.body {
            None => Vec::new(),
            Some(text) if self.is_base64_encoded => {
                STANDARD.decode_to_vec(text.as_bytes()).map_err(|_| ErrorCode::BadRequest)?
            }
            Some(text) => text.into_owned().into_bytes(),
        };
        let headers = fields(&self.headers, &self.cookies, body.len())?;
        let mut target = self.raw_path;
        if !self.raw_query_string.is_empty() {
            target.push('?');
            target.push_str(&self.raw_query_string);
        }
        let source = self.request_context.http.source_ip.parse().ok();
        let domain_name = self.request_context.domain_name;
        Ok((Arrival { method, target, headers, domain_name, source }, body))
    }
}

/// A text that is borrowed where it can be; serde's own reading of an `Option<Cow<str>>` never does.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Cow<'de, str>>, D::Error> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    Ok(Option::<Text<'de>>::deserialize(deserializer)?.map(|text| text.0))
}

fn fields(given: &Fields, cookies: &[String], body_bytes: usize) -> Result<Headers, ErrorCode> {
    let length = HeaderValue::from(body_bytes);
    let mut headers = Headers::new();
    let mut has_length = false;
    for (name, value) in &given.0 {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| ErrorCode::BadRequest)?;
        let value = if name == header::CONTENT_LENGTH {
            has_length = true;
            length.clone()
        } else {
            value_from_text(value).ok_or(ErrorCode::BadRequest)?
        };
        headers.push(name, value);
    }
    if !has_length && body_bytes > 0 {
        headers.push(header::CONTENT_LENGTH, length);
    }
    if !cookies.is_empty() {
        let cookies = value_from_text(&cookies.join("; ")).ok_or(ErrorCode::BadRequest)?;
        headers.push(header::COOKIE, cookies);
    }
    Ok(headers)
}

/// Where a public request comes from.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontContext {
    /// The name the request came to.
    #[serde(default)]
    pub domain_name: String,
    /// Method and source.
    pub http: FrontHttp,
}

/// See [`FrontContext::http`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontHttp {
    /// The method, any token.
    pub method: String,
    /// The address of whoever connected to the front.
    #[serde(default)]
    pub source_ip: String,
}

/// Header fields in the order of the event.
#[derive(Default)]
pub struct Fields(pub Vec<(String, String)>);

impl Fields {
    /// The first value of `name`, which is in lower case.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

impl fmt::Debug for Fields {
    /// Names only: values may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use aws_lambda_events::lambda_function_urls::LambdaFunctionUrlRequest;

    use super::*;

    const EVENT: &str = r#"{
        "version": "2.0", "routeKey": "$default", "rawPath": "/a%2Fb//c", "rawQueryString": "x=1&x=%2526",
        "cookies": ["a=1", "b=2"],
        "headers": {"host": "abc.lambda-url.eu-central-1.on.aws", "x-b": "1,2", "x-a": "y"},
        "requestContext": {"accountId": "anonymous", "apiId": "abc", "domainName": "abc.lambda-url.eu-central-1.on.aws",
            "domainPrefix": "abc", "http": {"method": "POST", "path": "/a/b//c", "protocol": "HTTP/1.1",
            "sourceIp": "198.51.100.7", "userAgent": "curl"}, "requestId": "r", "routeKey": "$default", "stage": "$default",
            "time": "12/Mar/2026:19:03:58 +0000", "timeEpoch": 1583348638390},
        "body": "aGk=", "isBase64Encoded": true}"#;

    #[test]
    fn reads_what_the_event_crate_reads() {
        let ours: FrontEvent<'_> = serde_json::from_str(EVENT).unwrap();
        let full: LambdaFunctionUrlRequest = serde_json::from_str(EVENT).unwrap();
        assert_eq!(Some(&ours.raw_path), full.raw_path.as_ref());
        assert_eq!(Some(&ours.raw_query_string), full.raw_query_string.as_ref());
        assert_eq!(Some(&ours.cookies), full.cookies.as_ref());
        assert_eq!(ours.headers.0.len(), full.headers.len());
        for (name, value) in &ours.headers.0 {
            assert_eq!(full.headers.get(name).unwrap(), value.as_str());
        }
        let http = full.request_context.http;
        assert_eq!(Some(&ours.request_context.http.method), http.method.as_ref());
        assert_eq!(Some(&ours.request_context.http.source_ip), http.source_ip.as_ref());
        assert!(matches!(ours.body, Some(Cow::Borrowed(_))));
        assert_eq!(ours.body.as_deref(), full.body.as_deref());
        assert_eq!(ours.is_base64_encoded, full.is_base64_encoded);
    }

    #[test]
    fn keeps_the_order_of_fields_and_bytes_beyond_ascii() {
        let event = EVENT.replace("\"y\"", "\"\u{e9}\"");
        let event: FrontEvent<'_> = serde_json::from_str(&event).unwrap();
        let names: Vec<_> = event.headers.0.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["host", "x-b", "x-a"]);
        assert_eq!(event.headers.get("X-A"), Some("\u{e9}"));
    }

    fn with(headers: &[(&str, &str)]) -> FrontEvent<'static> {
        let mut event: FrontEvent<'_> = serde_json::from_str(EVENT).unwrap();
        event.headers = Fields(headers.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect());
        event.cookies.clear();
        event
    }

    #[test]
    fn length_and_cookies_are_the_bodys_and_the_clients_own() {
        let mut sent = with(&[("content-length", "999"), ("x-b", "1")]);
        sent.cookies = vec!["a=1".into(), "b=\"x, y\"".into()];
        let (arrival, body) = sent.arrival().unwrap();
        assert_eq!(body, b"hi");
        assert_eq!(arrival.target, "/a%2Fb//c?x=1&x=%2526");
        assert_eq!(arrival.headers.get("content-length").unwrap(), "2");
        assert_eq!(arrival.headers.get("cookie").unwrap(), "a=1; b=\"x, y\"");
        assert_eq!(with(&[]).arrival().unwrap().0.headers.get("content-length").unwrap(), "2");
        let mut empty = with(&[]);
        empty.body = None;
        assert!(empty.arrival().unwrap().0.headers.get("content-length").is_none());
    }

    #[test]
    fn what_http_does_not_allow_is_refused() {
        let refused = |event: FrontEvent<'_>| event.arrival().err() == Some(ErrorCode::BadRequest);
        assert!(refused(with(&[("a b", "x")])));
        assert!(refused(with(&[("a", "x\ny")])));
        let mut bad = with(&[]);
        bad.body = Some("%".into());
        assert!(refused(bad));
        let mut bad = with(&[]);
        bad.request_context.http.method = "A B".into();
        assert!(refused(bad));
    }
}
