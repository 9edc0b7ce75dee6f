//! The head of an answer, and the pages for errors. Pure.

use http::{HeaderName, HeaderValue, header};
use proto::{error::ErrorCode, forwarded, header::Headers, id::RequestId, prefix, problem};

use crate::public::Head;

/// Makes the fields of the upstream's response those of our answer: hop-by-hop fields go, the request id
/// comes, and in path mode what names a path of the upstream is moved under `path`.
pub fn finish(headers: &mut Headers, request_id: &RequestId, path: Option<&str>, host: &str) {
    headers.strip_hop_by_hop();
    if let Some(path) = path {
        // What the upstream knows of its prefix, the agent has taken off.
        prefix::move_fields(headers, "", path, "", host);
    }
    let id = HeaderValue::from_str(request_id.as_str()).expect("hexadecimal digits are a header value");
    headers.set(forwarded::REQUEST_ID, id);
}

/// The head of an answer that sends a browser to another path of the same host; there is no body.
#[must_use]
pub fn moved(location: HeaderValue, request_id: &RequestId) -> Head {
    let mut headers = Headers::new();
    headers.push(header::LOCATION, location);
    headers.push(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    finish(&mut headers, request_id, None, "");
    Head { status: 308, headers }
}

/// An error as a whole answer. The body's length is in the head, also for whoever wants no body.
#[must_use]
pub fn problem(code: ErrorCode, request_id: &RequestId, html: bool) -> (Head, String) {
    let status = code.status();
    let (content_type, body) = problem::body(code, request_id, html);
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
    (Head { status: status.as_u16(), headers }, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> RequestId {
        RequestId::from_random([0xab; 16])
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
            ("__Host-a=1; Path=/; Secure", "__Host-a=1; Path=/; Secure"),
            ("__host-Http-a=1; path=/; Secure", "__host-Http-a=1; path=/; Secure"),
            ("__Secure-a=1; Path=/; Secure", "__Secure-a=1; Path=/web; Secure"),
        ] {
            let mut list: Headers =
                [(header::SET_COOKIE, HeaderValue::from_str(cookie).unwrap())].into_iter().collect();
            finish(&mut list, &id(), Some("/web"), "pub");
            assert_eq!(list.get("set-cookie").unwrap(), moved);
        }
    }

    #[test]
    fn path_mode_moves_the_path_of_a_refresh() {
        for (refresh, moved) in [
            ("5; url=/next?a=/b", "5; url=/web/next?a=/b"),
            ("0;URL='/next'", "0;URL='/web/next'"),
            ("0, /next", "0, /web/next"),
            ("5; url=next/x", "5; url=next/x"),
            ("5; url=https://other/x", "5; url=https://other/x"),
            ("5; url=//other/x", "5; url=//other/x"),
            ("5", "5"),
        ] {
            let mut list: Headers =
                [(header::REFRESH, HeaderValue::from_str(refresh).unwrap())].into_iter().collect();
            finish(&mut list, &id(), Some("/web"), "pub");
            assert_eq!(list.get("refresh").unwrap(), moved);
        }
    }

    #[test]
    fn a_problem_says_its_code_and_request_in_both_forms() {
        for code in ErrorCode::ALL {
            for html in [true, false] {
                let (head, body) = problem(*code, &id(), html);
                assert_eq!(head.status, code.status().as_u16());
                assert_eq!(head.headers.get("x-tunnel-error").unwrap(), code.as_str());
                assert_eq!(head.headers.get("content-length").unwrap(), &body.len().to_string());
                assert!(body.contains(id().as_str()) && body.contains(code.as_str()));
            }
        }
    }
}
