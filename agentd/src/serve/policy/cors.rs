//! What pages of other origins may do (the Fetch standard's CORS protocol), answered here in place of the upstream.
//! Pure.

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use proto::{error::ErrorCode, header::Headers};

use crate::{
    config::traffic::CorsRule,
    serve::policy::{answer::Answer, asked::Asked},
};

/// How the fields of the protocol begin that the upstream's own answer may have: ours stand in their place.
const OWN: &str = "access-control-";

/// Answers a preflight.
pub(crate) fn preflight(rule: &CorsRule, asked: &Asked<'_>) -> Option<Answer> {
    let origin = asked.headers.get(header::ORIGIN)?;
    asked.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
    if *asked.method != Method::OPTIONS {
        return None;
    }
    let Some(allowed) = allow(rule, origin) else {
        return Some(Answer::refusal(ErrorCode::OriginRefused).with(header::VARY, Some(VARY)));
    };
    // A method that is not among them is refused by the browser, which tells the page why.
    let methods = rule.methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
    let mut answer = Answer::empty(StatusCode::NO_CONTENT)
        .with(header::ACCESS_CONTROL_ALLOW_ORIGIN, Some(allowed))
        .with(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::try_from(methods).ok());
    let headers = match &rule.headers[..] {
        [] => asked.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned(),
        headers => HeaderValue::try_from(join(headers)).ok(),
    };
    answer = answer.with(header::ACCESS_CONTROL_ALLOW_HEADERS, headers);
    if rule.credentials {
        answer =
            answer.with(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, Some(HeaderValue::from_static("true")));
    }
    if let Some(age) = rule.max_age {
        answer = answer.with(header::ACCESS_CONTROL_MAX_AGE, Some(age.as_secs().into()));
    }
    Some(answer.with(header::VARY, Some(VARY_PREFLIGHT)))
}

const VARY: HeaderValue = HeaderValue::from_static("origin");
const VARY_PREFLIGHT: HeaderValue =
    HeaderValue::from_static("origin, access-control-request-method, access-control-request-headers");

/// Says in a response who may read it.
pub(crate) fn mark(rule: &CorsRule, origin: Option<&HeaderValue>, response: &mut Headers) {
    response.retain(|name, _| !name.as_str().starts_with(OWN));
    let is_for_all = rule.origins.iter().any(|origin| origin == "*");
    if !is_for_all {
        // Also where there is none: what a cache keeps would be wrong for the next.
        response.push(header::VARY, VARY);
    }
    let Some(allowed) = origin.and_then(|origin| allow(rule, origin)) else { return };
    response.push(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
    if rule.credentials {
        response.push(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if !rule.expose.is_empty()
        && let Ok(names) = HeaderValue::try_from(join(&rule.expose))
    {
        response.push(header::ACCESS_CONTROL_EXPOSE_HEADERS, names);
    }
}

/// What `Access-Control-Allow-Origin` says to an origin, if it is one of those.
fn allow(rule: &CorsRule, origin: &HeaderValue) -> Option<HeaderValue> {
    let text = origin.to_str().ok()?;
    if rule.origins.iter().any(|own| own == "*") {
        return Some(HeaderValue::from_static("*"));
    }
    rule.origins.iter().any(|own| is_origin(own, text)).then(|| origin.clone())
}

/// Whether it names an origin. `*` names none, and `null` everybody's: who lets all of them read has not said whose pages
/// act for a visitor.
pub(crate) fn names(rule: &CorsRule, origin: &HeaderValue) -> bool {
    let is_named = |origin: &str| {
        rule.origins.iter().any(|own| !matches!(&**own, "*" | "null") && is_origin(own, origin))
    };
    origin.to_str().is_ok_and(is_named)
}

fn is_origin(own: &str, origin: &str) -> bool {
    let Some((before, after)) = own.split_once("*.") else { return own == origin };
    // The star stands for one or more whole labels.
    let labels = origin.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
    labels.and_then(|labels| labels.strip_suffix('.')).is_some_and(|labels| {
        !labels.is_empty() && labels.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
    })
}

fn join(names: &[HeaderName]) -> String {
    names.iter().map(HeaderName::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_protocol_that_the_upstream_says_is_left() {
        let rule = CorsRule {
            origins: vec!["https://a.example".to_owned()],
            methods: Vec::new(),
            headers: Vec::new(),
            expose: Vec::new(),
            credentials: false,
            max_age: None,
        };
        let mut response: Headers = [
            "access-control-allow-origin",
            "access-control-max-age",
            "access-control-allow-private-network",
            "x-own",
        ]
        .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1")))
        .into_iter()
        .collect();
        mark(&rule, None, &mut response);
        let names: Vec<_> = response.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["x-own", "vary"]);
    }

    #[test]
    fn a_star_stands_for_labels_and_for_nothing_else() {
        for (own, origin, is_one) in [
            ("https://app.example.com", "https://app.example.com", true),
            ("https://app.example.com", "http://app.example.com", false),
            ("https://app.example.com", "https://app.example.com:8443", false),
            ("https://app.example.com", "https://app.example.com.evil", false),
            ("https://*.example.com", "https://app.example.com", true),
            ("https://*.example.com", "https://a.b.example.com", true),
            ("https://*.example.com", "https://example.com", false),
            ("https://*.example.com", "https://.example.com", false),
            ("https://*.example.com", "https://evilexample.com", false),
            ("https://*.example.com", "https://evil/.example.com", false),
            ("https://*.example.com", "https://evil:1.example.com", false),
            ("https://*.example.com", "null", false),
            ("null", "null", true),
        ] {
            assert_eq!(is_origin(own, origin), is_one, "{own} {origin}");
        }
    }
}
