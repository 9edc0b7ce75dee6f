//! From the front's event to a request for one tunnel. Pure.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderName, HeaderValue, Method, header};
use proto::{
    error::ErrorCode,
    forwarded::{self, Hop},
    header::{Headers, value_from_text},
    id::{RequestId, TunnelName},
    limits,
    target::Target,
};

use crate::{
    Config,
    event::{FrontEvent, front},
};

/// A public request, ready to be dispatched.
#[derive(Debug)]
pub struct PublicRequest {
    /// The tunnel it is for.
    pub tunnel: TunnelName,
    /// The path prefix that was taken off, with its `/`: path mode.
    pub prefix: Option<String>,
    /// The host as the public client wrote it.
    pub host: String,
    /// The method.
    pub method: Method,
    /// The target for the upstream.
    pub target: Target,
    /// The fields for the upstream.
    pub headers: Headers,
    /// The body.
    pub body: Vec<u8>,
}

/// Whether the one who asked is a browser that shows HTML.
#[must_use]
pub fn wants_html(event: &FrontEvent) -> bool {
    event.headers.get("accept").is_some_and(|accept| accept.contains("text/html"))
}

/// Finds the tunnel and builds the request for its upstream.
///
/// # Errors
///
/// The code to answer with; nothing has been dispatched then.
pub fn route(
    event: &mut FrontEvent,
    config: &Config,
    request_id: &RequestId,
) -> Result<PublicRequest, ErrorCode> {
    let by_front = is_by_front(event, config);
    if config.front_only && !by_front {
        return Err(ErrorCode::FrontRefused);
    }
    let fronts = |name| by_front.then(|| event.headers.get(name)).flatten();
    let host = fronts(front::HOST)
        .or_else(|| event.headers.get("host"))
        .filter(|host| !host.is_empty())
        .unwrap_or(&event.request_context.domain_name)
        .to_owned();
    let target = match fronts(front::TARGET) {
        Some(target) => target.to_owned(),
        None if event.raw_query_string.is_empty() => event.raw_path.clone(),
        None => format!("{}?{}", event.raw_path, event.raw_query_string),
    };
    let target = Target::parse(&target).map_err(|_| ErrorCode::BadRequest)?;
    let method = Method::from_bytes(event.request_context.http.method.as_bytes())
        .map_err(|_| ErrorCode::BadRequest)?;
    // CONNECT asks for a tunnel of another kind; its target has no path (RFC 9110 §9.3.6).
    if method == Method::CONNECT {
        return Err(ErrorCode::UpgradeUnsupported);
    }
    let (tunnel, prefix, target) = find_tunnel(&host, config.domain.as_deref(), target)?;
    if is_websocket(event) {
        return Err(ErrorCode::UpgradeUnsupported);
    }

    let client: Option<IpAddr> =
        fronts(front::CLIENT).unwrap_or(&event.request_context.http.source_ip).parse().ok();
    let last = |name: &str| event.headers.get(name).and_then(|value| value.rsplit(',').next()).map(str::trim);
    let scheme = if last("x-forwarded-proto") == Some("http") { "http" } else { "https" };
    let port = last("x-forwarded-port").and_then(|port| port.parse().ok());
    let port = port.unwrap_or(if scheme == "http" { 80 } else { 443 });

    let body = match event.body.take() {
        None => Vec::new(),
        Some(text) if event.is_base64_encoded => STANDARD.decode(text).map_err(|_| ErrorCode::BadRequest)?,
        Some(text) => text.into_bytes(),
    };
    if body.len() > limits::REQUEST_BODY_BYTES {
        return Err(ErrorCode::RequestTooLarge);
    }
    let mut headers = fields(event, &host, body.len())?;
    headers.strip_hop_by_hop();
    let hop = Hop { client, scheme, host: &host, port, prefix: prefix.as_deref() };
    forwarded::apply(&mut headers, &hop, config.trust, request_id);
    if !headers.is_within_limits() {
        return Err(ErrorCode::HeadTooLarge);
    }
    Ok(PublicRequest { tunnel, prefix, host, method, target, headers, body })
}

/// Whether the request came through the front: it knows the secret.
fn is_by_front(event: &FrontEvent, config: &Config) -> bool {
    let (Some(secret), Some(given)) = (&config.front_secret, event.headers.get(front::SECRET)) else {
        return false;
    };
    // Every byte is compared, so that the time does not tell how many were right.
    let differing = secret.bytes().zip(given.bytes()).fold(0, |differing, (a, b)| differing | (a ^ b));
    secret.len() == given.len() && differing == 0
}

fn find_tunnel(
    host: &str,
    domain: Option<&str>,
    target: Target,
) -> Result<(TunnelName, Option<String>, Target), ErrorCode> {
    if let Some(label) = domain.and_then(|domain| label_under(host, domain)) {
        let name = label.parse().map_err(|_| ErrorCode::NoSuchTunnel)?;
        return Ok((name, None, target));
    }
    let (segment, rest) = target.split_first_segment().ok_or(ErrorCode::NoSuchTunnel)?;
    let name: TunnelName = segment.parse().map_err(|_| ErrorCode::NoSuchTunnel)?;
    let prefix = format!("/{name}");
    Ok((name, Some(prefix), rest))
}

/// What stands before `.domain` in a host, whatever its case, port or trailing dot.
fn label_under(host: &str, domain: &str) -> Option<String> {
    let name = host
        .rsplit_once(':')
        .map_or(host, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host });
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let label = name.strip_suffix(domain)?.strip_suffix('.')?;
    (!label.is_empty()).then(|| label.to_owned())
}

/// A WebSocket handshake, also where the front has dropped its `Upgrade`. Any other upgrade is an offer
/// that may be ignored (RFC 9110 §7.8).
fn is_websocket(event: &FrontEvent) -> bool {
    let upgrade = event.headers.get("upgrade");
    upgrade.is_some_and(|value| value.split(',').any(|p| p.trim().eq_ignore_ascii_case("websocket")))
        || event.headers.get("sec-websocket-key").is_some()
}

fn fields(event: &FrontEvent, host: &str, body_bytes: usize) -> Result<Headers, ErrorCode> {
    let length = HeaderValue::from(body_bytes);
    let mut headers = Headers::new();
    let mut has_length = false;
    for (name, value) in &event.headers.0 {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| ErrorCode::BadRequest)?;
        let value = match name.as_str() {
            front::HOST | front::SECRET | front::TARGET | front::CLIENT => continue,
            // The body is here already: nobody is left to say 100 to (RFC 9110 §10.1.1).
            "expect" => continue,
            "host" => HeaderValue::from_str(host).map_err(|_| ErrorCode::BadRequest)?,
            "content-length" => {
                has_length = true;
                length.clone()
            }
            _ => value_from_text(value).ok_or(ErrorCode::BadRequest)?,
        };
        headers.push(name, value);
    }
    if !has_length && body_bytes > 0 {
        headers.push(header::CONTENT_LENGTH, length);
    }
    if !event.cookies.is_empty() {
        let cookies = value_from_text(&event.cookies.join("; ")).ok_or(ErrorCode::BadRequest)?;
        headers.push(header::COOKIE, cookies);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use proto::{forwarded::Trust, token::TokenKeys};

    use super::*;
    use crate::event::{Fields, FrontContext, FrontHttp};

    fn config() -> Config {
        Config {
            keys: TokenKeys::new(&[1; 32], None).unwrap(),
            domain: Some("tunnel.example.com".into()),
            front_secret: Some("s3cret".into()),
            front_only: false,
            trust: Trust::Nobody,
            reply_timeout: limits::REPLY_TIMEOUT,
        }
    }

    fn event(path: &str, headers: &[(&str, &str)]) -> FrontEvent {
        FrontEvent {
            raw_path: path.into(),
            raw_query_string: String::new(),
            cookies: Vec::new(),
            headers: Fields(headers.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())).collect()),
            request_context: FrontContext {
                domain_name: "abc.lambda-url.eu-central-1.on.aws".into(),
                http: FrontHttp { method: "GET".into(), source_ip: "198.51.100.7".into() },
            },
            body: None,
            is_base64_encoded: false,
        }
    }

    fn routed(mut event: FrontEvent) -> Result<PublicRequest, ErrorCode> {
        route(&mut event, &config(), &RequestId::from_random([1; 16]))
    }

    fn by_front<'a>(host: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        [&[("x-tunnel-front", "s3cret"), ("x-tunnel-host", host)], more].concat()
    }

    #[test]
    fn the_host_names_the_tunnel_in_any_spelling() {
        for host in [
            "web.tunnel.example.com",
            "WEB.Tunnel.Example.COM",
            "web.tunnel.example.com.",
            "web.tunnel.example.com:8443",
        ] {
            let request = routed(event("/web/x", &by_front(host, &[]))).unwrap();
            assert_eq!((request.tunnel.as_str(), request.target.as_str()), ("web", "/web/x"), "{host}");
            assert_eq!(request.headers.get("x-forwarded-host").unwrap(), host);
        }
        for host in [
            "a.b.tunnel.example.com",
            "-.tunnel.example.com",
            "www.tunnel.example.com",
            "w_b.tunnel.example.com",
        ] {
            assert_eq!(
                routed(event("/", &by_front(host, &[]))).err(),
                Some(ErrorCode::NoSuchTunnel),
                "{host}"
            );
        }
    }

    #[test]
    fn without_the_domain_the_path_names_it() {
        for host in
            ["abc.lambda-url.eu-central-1.on.aws", "tunnel.example.com", "xtunnel.example.com", "[::1]:8080"]
        {
            let request = routed(event("/web//a%2F?", &by_front(host, &[]))).unwrap();
            assert_eq!(request.target.as_str(), "//a%2F?", "{host}");
            assert_eq!(request.prefix.as_deref(), Some("/web"));
            assert_eq!(request.headers.get("x-forwarded-prefix").unwrap(), "/web");
        }
        assert_eq!(routed(event("/", &[("host", "x")])).err(), Some(ErrorCode::NoSuchTunnel));
    }

    #[test]
    fn nobody_but_the_front_is_believed() {
        let forged = event(
            "/web/",
            &[("x-tunnel-host", "other.tunnel.example.com"), ("x-tunnel-target", "/evil"), ("host", "h")],
        );
        let request = routed(forged).unwrap();
        assert_eq!((request.tunnel.as_str(), request.target.as_str()), ("web", "/"));
        assert!(request.headers.iter().all(|(name, _)| !name.as_str().starts_with("x-tunnel-h")));
        for wrong in ["", "s3cre", "s3cret2", "S3cret"] {
            let mut only = config();
            only.front_only = true;
            let mut event = event("/web/", &[("x-tunnel-front", wrong)]);
            let refused = route(&mut event, &only, &RequestId::from_random([1; 16]));
            assert_eq!(refused.err(), Some(ErrorCode::FrontRefused), "{wrong}");
        }
        let kept =
            routed(event("/x", &by_front("web.tunnel.example.com", &[("x-tunnel-target", "/x?")]))).unwrap();
        assert_eq!(kept.target.as_str(), "/x?");
        assert!(kept.headers.get("x-tunnel-front").is_none());
    }

    #[test]
    fn length_and_cookies_are_the_bodys_and_the_clients_own() {
        let mut sent = event(
            "/web/",
            &[("content-length", "999"), ("expect", "100-continue"), ("transfer-encoding", "chunked")],
        );
        sent.body = Some("aGk=".into());
        sent.is_base64_encoded = true;
        sent.cookies = vec!["a=1".into(), "b=\"x, y\"".into()];
        let request = routed(sent).unwrap();
        assert_eq!(request.body, b"hi");
        assert_eq!(request.headers.get("content-length").unwrap(), "2");
        assert_eq!(request.headers.get("cookie").unwrap(), "a=1; b=\"x, y\"");
        assert!(
            request.headers.get("expect").is_none() && request.headers.get("transfer-encoding").is_none()
        );
        assert!(routed(event("/web/", &[])).unwrap().headers.get("content-length").is_none());
    }

    #[test]
    fn what_cannot_be_carried_is_refused() {
        assert_eq!(routed(event("/web/a b", &[])).err(), Some(ErrorCode::BadRequest));
        assert_eq!(routed(event("web", &[])).err(), Some(ErrorCode::BadRequest));
        assert_eq!(routed(event("/web", &[("a b", "x")])).err(), Some(ErrorCode::BadRequest));
        assert_eq!(routed(event("/web", &[("a", "x\ny")])).err(), Some(ErrorCode::BadRequest));
        let websocket = event("/web", &[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
        assert_eq!(routed(websocket).err(), Some(ErrorCode::UpgradeUnsupported));
        assert!(routed(event("/web", &[("connection", "upgrade"), ("upgrade", "h2c")])).is_ok());
        let mut bad = event("/web", &[]);
        bad.body = Some("%".into());
        bad.is_base64_encoded = true;
        assert_eq!(routed(bad).err(), Some(ErrorCode::BadRequest));
    }

    #[test]
    fn a_body_and_a_head_at_their_limit_pass_and_one_byte_more_does_not() {
        let with_body = |len: usize| {
            let mut sent = event("/web/", &[]);
            sent.body = Some("x".repeat(len));
            routed(sent).map(|request| request.body.len())
        };
        assert_eq!(with_body(limits::REQUEST_BODY_BYTES), Ok(limits::REQUEST_BODY_BYTES));
        assert_eq!(with_body(limits::REQUEST_BODY_BYTES + 1), Err(ErrorCode::RequestTooLarge));
        let own = routed(event("/web/", &[("a", "")])).unwrap().headers.size_bytes();
        let with_head = |len: usize| routed(event("/web/", &[("a", &"x".repeat(len))])).map(|_| ());
        assert_eq!(with_head(limits::HEAD_BYTES - own), Ok(()));
        assert_eq!(with_head(limits::HEAD_BYTES - own + 1), Err(ErrorCode::HeadTooLarge));
    }
}
