//! What the upstream learns about the public client: `X-Forwarded-*`, `Forwarded`, `Via`,
//! `traceparent`.
//!
//! The rule: only what the edge knows itself is said. Copies that the public client sent are dropped
//! unless the edge is told to trust whoever stands before its front; then they are kept and ours
//! appended.

use std::net::IpAddr;

use http::{HeaderName, HeaderValue, header};

use crate::{delivery, header::Headers, id::RequestId};

/// Whether fields that arrive with the request are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// They are dropped: anybody could have written them.
    #[default]
    Nobody,
    /// They are kept and appended to: a proxy of the operator's own writes them.
    Chain,
}

/// What the edge knows about the last hop before it.
#[derive(Debug, Clone)]
pub struct Hop<'a> {
    /// The address of the public client.
    pub client: Option<IpAddr>,
    /// `http` or `https`, as the public client used it.
    pub scheme: &'a str,
    /// The host and, where it is not the scheme's own, port that the public client asked for.
    pub host: &'a str,
    /// The port that the public client connected to.
    pub port: u16,
    /// The path prefix that was taken off in path mode, such as `/web`.
    pub prefix: Option<&'a str>,
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The field that carries the request id, to the upstream and to the public client.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-tunnel-request-id");

/// The field that carries an [`crate::error::ErrorCode`] to the public client.
pub const ERROR: HeaderName = HeaderName::from_static("x-tunnel-error");

/// The edge's own entry in `Via`.
pub const VIA: &str = "1.1 tunnel";

/// The field with the public addresses of the tunnels that a request has passed, the last one last. `Via` does not name
/// tunnels, and may be kept from an upstream; this is how a request that comes back is known.
pub const PASSED: HeaderName = HeaderName::from_static("x-tunnel-passed");

/// No request passes more tunnels than this.
pub const MOST_PASSED: usize = 16;

/// Whether a request that arrives at this public address has been there before (RFC 9110 §7.6), or has passed so many
/// tunnels that it goes round somewhere.
#[must_use]
pub fn is_loop(headers: &Headers, host: &str, prefix: Option<&str>) -> bool {
    let here = place(host, prefix);
    let entries = |name: HeaderName| {
        let values = headers.get_all(name).flat_map(|value| value.as_bytes().split(|&b| b == b','));
        values.map(<[u8]>::trim_ascii).collect::<Vec<_>>()
    };
    let passed = entries(PASSED);
    passed.len() >= MOST_PASSED
        || passed.iter().any(|entry| entry.eq_ignore_ascii_case(here.as_bytes()))
        || entries(header::VIA).iter().filter(|entry| **entry == VIA.as_bytes()).count() >= MOST_PASSED
}

/// A public address of a tunnel in [`PASSED`].
fn place(host: &str, prefix: Option<&str>) -> String {
    format!("{host}{}", prefix.unwrap_or_default())
}

/// Rewrites the forwarding fields of a request on its way to the upstream.
pub fn apply(headers: &mut Headers, hop: &Hop<'_>, trust: Trust, request_id: &RequestId) {
    let earlier = |headers: &Headers, name: HeaderName| match trust {
        Trust::Nobody => Vec::new(),
        Trust::Chain => headers.get_all(&name).map(|value| value.as_bytes().to_vec()).collect::<Vec<_>>(),
    };
    let chain_for = earlier(headers, X_FORWARDED_FOR);
    let chain_forwarded = earlier(headers, header::FORWARDED);
    headers.retain(|name, _| {
        let is_ours = name.as_str().starts_with("x-tunnel-")
            && [REQUEST_ID, delivery::ID, delivery::ATTEMPT, delivery::RECEIVED].contains(name);
        !(is_ours
            || name.as_str().starts_with("x-forwarded-")
            || *name == header::FORWARDED
            || *name == X_REAL_IP)
    });

    let client = hop.client.map_or_else(|| "unknown".to_owned(), |ip| ip.to_string());
    // The front has appended the client to a list that it was sent.
    let is_named = chain_for
        .iter()
        .flat_map(|value| value.split(|&b| b == b','))
        .any(|entry| entry.trim_ascii() == client.as_bytes());
    set_list(headers, X_FORWARDED_FOR, chain_for, (!is_named).then_some(&*client));
    set(headers, X_FORWARDED_PROTO, hop.scheme);
    set(headers, X_FORWARDED_HOST, hop.host);
    set(headers, X_FORWARDED_PORT, &hop.port.to_string());
    if let Some(prefix) = hop.prefix {
        set(headers, X_FORWARDED_PREFIX, prefix);
    }
    set_list(headers, header::FORWARDED, chain_forwarded, Some(&forwarded_element(hop)));
    // RFC 9110 §7.6.3: every proxy adds itself; the client's own entries say how it came this far.
    let via = headers.get_all(header::VIA).map(|value| value.as_bytes().to_vec()).collect();
    set_list(headers, header::VIA, via, Some(VIA));
    let passed = headers.get_all(PASSED).map(|value| value.as_bytes().to_vec()).collect();
    set_list(headers, PASSED, passed, Some(&place(hop.host, hop.prefix)));
    set(headers, REQUEST_ID, request_id.as_str());
    if !headers.get(TRACEPARENT).is_some_and(is_traceparent) {
        headers.remove("tracestate");
        // W3C Trace Context §3.2: the request id is the trace, its second half the first span.
        let id = request_id.as_str();
        set(headers, TRACEPARENT, &format!("00-{id}-{}-01", &id[16..]));
    }
}

fn set(headers: &mut Headers, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.set(name, value);
    }
}

fn set_list(headers: &mut Headers, name: HeaderName, earlier: Vec<Vec<u8>>, own: Option<&str>) {
    let mut list = earlier;
    list.extend(own.map(|own| own.as_bytes().to_vec()));
    if let Ok(value) = HeaderValue::from_bytes(&list.join(&b", "[..])) {
        headers.set(name, value);
    }
}

/// One element of `Forwarded` (RFC 7239 §4): IPv6 addresses in brackets and quotes.
fn forwarded_element(hop: &Hop<'_>) -> String {
    let client = match hop.client {
        Some(IpAddr::V4(ip)) => ip.to_string(),
        Some(IpAddr::V6(ip)) => format!("\"[{ip}]\""),
        None => "unknown".to_owned(),
    };
    let is_token =
        |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    let host = if is_token(hop.host) && !hop.host.is_empty() {
        hop.host.to_owned()
    } else {
        format!("\"{}\"", hop.host.replace(['"', '\\'], ""))
    };
    format!("for={client};host={host};proto={}", hop.scheme)
}

fn is_traceparent(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes();
    let hex = |range: std::ops::Range<usize>| {
        bytes.get(range).is_some_and(|part| part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    };
    let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|&b| b == b'0');
    bytes.len() == 55
        && hex(0..2)
        && hex(3..35)
        && hex(36..52)
        && hex(53..55)
        && [2, 35, 52].iter().all(|&at| bytes[at] == b'-')
        && &bytes[..2] != b"ff"
        && !zero(3..35)
        && !zero(36..52)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop() -> Hop<'static> {
        Hop {
            client: Some("2001:db8::1".parse().unwrap()),
            scheme: "https",
            host: "web.tunnel.example.com:8443",
            port: 8443,
            prefix: Some("/web"),
        }
    }

    fn request() -> Headers {
        [
            ("x-forwarded-for", "6.6.6.6"),
            ("x-forwarded-host", "evil"),
            ("x-forwarded-scheme", "gopher"),
            ("forwarded", "for=6.6.6.6"),
            ("x-real-ip", "6.6.6.6"),
            ("via", "1.0 cdn"),
            ("x-tunnel-request-id", "mine"),
        ]
        .into_iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect()
    }

    fn get(headers: &Headers, name: &str) -> String {
        let all: Vec<_> = headers.get_all(name).map(|value| value.to_str().unwrap().to_owned()).collect();
        all.join(" | ")
    }

    #[test]
    fn a_request_that_was_here_is_known_by_where_it_has_passed() {
        let id = RequestId::from_random([0xab; 16]);
        let mut headers = request();
        apply(&mut headers, &hop(), Trust::Nobody, &id);
        assert_eq!(get(&headers, "x-tunnel-passed"), "web.tunnel.example.com:8443/web");
        assert!(is_loop(&headers, "WEB.tunnel.example.com:8443", Some("/web")));
        for (host, prefix) in
            [("web.tunnel.example.com:8443", Some("/api")), ("web.tunnel.example.com", Some("/web"))]
        {
            assert!(!is_loop(&headers, host, prefix), "{host}");
        }
        // Others go round until there are too many.
        for number in 1..MOST_PASSED {
            assert!(!is_loop(&headers, "other", None), "{number}");
            apply(
                &mut headers,
                &Hop { host: &format!("h{number}"), prefix: None, ..hop() },
                Trust::Nobody,
                &id,
            );
            headers.remove(header::VIA);
        }
        assert!(is_loop(&headers, "other", None));
        let mut by_via = Headers::new();
        by_via.push(header::VIA, HeaderValue::from_str(&[VIA; MOST_PASSED].join(", ")).unwrap());
        assert!(is_loop(&by_via, "other", None));
    }

    #[test]
    fn the_clients_copies_are_dropped_by_default() {
        let id = RequestId::from_random([0xab; 16]);
        let mut headers = request();
        apply(&mut headers, &hop(), Trust::Nobody, &id);
        assert_eq!(get(&headers, "x-forwarded-for"), "2001:db8::1");
        assert_eq!(get(&headers, "x-forwarded-host"), "web.tunnel.example.com:8443");
        assert_eq!(get(&headers, "x-forwarded-proto"), "https");
        assert_eq!(get(&headers, "x-forwarded-port"), "8443");
        assert_eq!(get(&headers, "x-forwarded-prefix"), "/web");
        assert_eq!(get(&headers, "x-forwarded-scheme"), "");
        assert_eq!(get(&headers, "x-real-ip"), "");
        assert_eq!(
            get(&headers, "forwarded"),
            "for=\"[2001:db8::1]\";host=\"web.tunnel.example.com:8443\";proto=https"
        );
        assert_eq!(get(&headers, "via"), "1.0 cdn, 1.1 tunnel");
        assert_eq!(get(&headers, "x-tunnel-request-id"), id.as_str());
        assert_eq!(get(&headers, "traceparent"), format!("00-{id}-{}-01", "ab".repeat(8)));
    }

    #[test]
    fn a_trusted_chain_is_appended_to() {
        let mut headers = request();
        apply(&mut headers, &hop(), Trust::Chain, &RequestId::from_random([1; 16]));
        assert_eq!(get(&headers, "x-forwarded-for"), "6.6.6.6, 2001:db8::1");
        assert!(get(&headers, "forwarded").starts_with("for=6.6.6.6, for="));
        let mut headers = Headers::new();
        headers.push(X_FORWARDED_FOR, HeaderValue::from_static("6.6.6.6,2001:db8::1"));
        apply(&mut headers, &hop(), Trust::Chain, &RequestId::from_random([1; 16]));
        assert_eq!(get(&headers, "x-forwarded-for"), "6.6.6.6,2001:db8::1", "the front has appended it");
    }

    #[test]
    fn a_valid_traceparent_is_passed_and_a_broken_one_replaced() {
        let id = RequestId::from_random([1; 16]);
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (sent, kept) in [(good, true), ("00-zz", false), (&good.replace("0af7", "0AF7"), false)] {
            let mut headers = Headers::new();
            headers.push(TRACEPARENT, HeaderValue::from_str(sent).unwrap());
            headers.push(HeaderName::from_static("tracestate"), HeaderValue::from_static("a=b"));
            apply(&mut headers, &hop(), Trust::Nobody, &id);
            assert_eq!(get(&headers, "traceparent") == sent, kept, "{sent}");
            assert_eq!(get(&headers, "tracestate") == "a=b", kept);
        }
    }
}
