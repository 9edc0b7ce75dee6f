//! The Function URL's event (payload format 2.0): what the front hands over.
//!
//! Declared here and not taken from the event crate for two reasons: that one refuses an event with a
//! header value beyond ASCII, and sorts the fields by hash. A test holds this against it.

use std::fmt;

use serde::{Deserialize, Deserializer, de};

/// What a front of ours adds to a request. A request without the right [`front::SECRET`] is not
/// believed the others.
pub mod front {
    /// The host that the public client asked for.
    pub const HOST: &str = "x-tunnel-host";
    /// The secret that only the front and `ingress` know.
    pub const SECRET: &str = "x-tunnel-front";
    /// The exact request-target, where the event's path and query do not give it back.
    pub const TARGET: &str = "x-tunnel-target";
    /// The address of the public client, where it is not the event's source address.
    pub const CLIENT: &str = "x-tunnel-client";
}

/// One public request as Lambda's front describes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontEvent {
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
    /// The body.
    #[serde(default)]
    pub body: Option<String>,
    /// Whether [`FrontEvent::body`] is base64.
    #[serde(default)]
    pub is_base64_encoded: bool,
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
        let ours: FrontEvent = serde_json::from_str(EVENT).unwrap();
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
        assert_eq!(ours.body, full.body);
        assert_eq!(ours.is_base64_encoded, full.is_base64_encoded);
    }

    #[test]
    fn keeps_the_order_of_fields_and_bytes_beyond_ascii() {
        let event: FrontEvent = serde_json::from_str(&EVENT.replace("\"y\"", "\"\u{e9}\"")).unwrap();
        let names: Vec<_> = event.headers.0.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["host", "x-b", "x-a"]);
        assert_eq!(event.headers.get("X-A"), Some("\u{e9}"));
    }
}
