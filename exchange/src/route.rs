//! From the front's event to a request for one tunnel. Pure.

use std::{borrow::Cow, cell::RefCell, net::IpAddr};

use http::{HeaderValue, Method, header};
use proto::{
    error::ErrorCode,
    forwarded::{self, Hop},
    header::{Headers, value_to_text},
    id::{RequestId, TunnelName},
    message::Upgrade,
    target::{Target, TargetError},
};

use crate::{Config, public::Upload};

/// What a front of ours adds to a request. A request without the right [`front::SECRET`] is not
/// believed the others.
pub mod front {
    /// The host that the public client asked for.
    pub const HOST: &str = "x-tunnel-host";
    /// The secret that only the front and whoever stands behind it know.
    pub const SECRET: &str = "x-tunnel-front";
    /// The exact request-target, where what arrives does not give it back.
    pub const TARGET: &str = "x-tunnel-target";
    /// The address of the public client, where it is not the source address.
    pub const CLIENT: &str = "x-tunnel-client";
}

/// The head of a public request as it arrived.
#[derive(Debug)]
pub struct Arrival {
    /// The method.
    pub method: Method,
    /// The target, as it was sent.
    pub target: String,
    /// Every field, also those of a front of ours; `content-length` is the body's own.
    pub headers: Headers,
    /// The name it came to, for a request without `host`.
    pub domain_name: String,
    /// The address of whoever connected.
    pub source: Option<IpAddr>,
}

impl Arrival {
    /// Whether the one who asked is a browser that shows HTML.
    #[must_use]
    pub fn wants_html(&self) -> bool {
        self.text("accept").is_some_and(|accept| accept.contains("text/html"))
    }

    fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        self.headers.get(name).map(value_to_text)
    }

    /// A WebSocket handshake, also where the front has dropped its `Upgrade`. Any other upgrade is an offer
    /// that may be ignored (RFC 9110 §7.8).
    fn is_websocket(&self) -> bool {
        let upgrade = self.text("upgrade");
        upgrade.is_some_and(|value| value.split(',').any(|p| p.trim().eq_ignore_ascii_case("websocket")))
            || self.headers.get("sec-websocket-key").is_some()
    }
}

/// Whether who holds the client can go on with a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Websockets {
    /// Yes.
    Carried,
    /// No.
    Refused,
}

/// A public request, ready to be dispatched.
#[derive(Debug)]
pub struct PublicRequest {
    /// The tunnel it is for.
    pub tunnel: TunnelName,
    /// The path prefix that was taken off, with its `/`: path mode.
    pub prefix: Option<String>,
    /// Where a browser is to go instead: it asks for the page of a path prefix without the slash behind it, from
    /// where relative links would leave the tunnel.
    pub folder: Option<HeaderValue>,
    /// The host as the public client wrote it.
    pub host: String,
    /// The method.
    pub method: Method,
    /// The target for the upstream.
    pub target: Target,
    /// The fields for the upstream.
    pub headers: Headers,
    /// The body, where all of it is there.
    pub body: Vec<u8>,
    /// The body, where it is not; to be taken once.
    pub upload: RefCell<Option<Upload>>,
    /// What the client wants to go on with.
    pub upgrade: Option<Upgrade>,
}

/// Finds the tunnel and builds the request for its upstream.
///
/// # Errors
///
/// The code to answer with; nothing has been dispatched then.
pub fn route(
    arrival: Arrival,
    body: Vec<u8>,
    config: &Config,
    websockets: Websockets,
    request_id: &RequestId,
) -> Result<PublicRequest, ErrorCode> {
    let by_front = is_by_front(&arrival, config);
    if config.front_only && !by_front {
        return Err(ErrorCode::FrontRefused);
    }
    let fronts = |name| by_front.then(|| arrival.text(name)).flatten();
    let host = fronts(front::HOST)
        .or_else(|| arrival.text("host"))
        .filter(|host| !host.is_empty())
        .unwrap_or(Cow::Borrowed(&arrival.domain_name))
        .into_owned();
    let target = fronts(front::TARGET).unwrap_or(Cow::Borrowed(&arrival.target));
    let target = Target::parse(&target).map_err(|error| match error {
        TargetError::TooLong => ErrorCode::TargetTooLong,
        TargetError::NotOriginForm | TargetError::ForbiddenByte => ErrorCode::BadRequest,
    })?;
    // CONNECT asks for a tunnel of another kind; its target has no path (RFC 9110 §9.3.6).
    if arrival.method == Method::CONNECT {
        return Err(ErrorCode::UpgradeUnsupported);
    }
    let folder = folder_of(&target)
        .filter(|_| matches!(arrival.method, Method::GET | Method::HEAD) && arrival.wants_html());
    let (tunnel, prefix, target) = find_tunnel(&host, config.domain.as_deref(), target)?;
    let folder = folder.filter(|_| prefix.is_some());
    let upgrade = arrival.is_websocket().then_some(Upgrade::Websocket);
    if upgrade.is_some() && websockets == Websockets::Refused {
        return Err(ErrorCode::UpgradeUnsupported);
    }

    let client = match fronts(front::CLIENT) {
        Some(client) => client.parse().ok(),
        None => arrival.source,
    };
    let last =
        |name| arrival.text(name).map(|value| value.rsplit(',').next().unwrap_or_default().trim().to_owned());
    let scheme = if last("x-forwarded-proto").as_deref() == Some("http") { "http" } else { "https" };
    let port = last("x-forwarded-port").and_then(|port| port.parse().ok());
    let port = port.unwrap_or(if scheme == "http" { 80 } else { 443 });

    let mut headers = fields(arrival.headers, &host)?;
    headers.strip_hop_by_hop();
    if upgrade.is_some() {
        // Those belong to one hop each: no end of the tunnel decodes compressed frames.
        for name in ["sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions"] {
            headers.remove(name);
        }
        // An agent that does not know WebSockets refuses what has this field.
        headers.push(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    if forwarded::is_loop(&headers, &host, prefix.as_deref()) {
        return Err(ErrorCode::LoopDetected);
    }
    let hop = Hop { client, scheme, host: &host, port, prefix: prefix.as_deref() };
    forwarded::apply(&mut headers, &hop, config.trust, request_id);
    if !headers.is_within_limits() {
        return Err(ErrorCode::HeadTooLarge);
    }
    let (method, upload) = (arrival.method, RefCell::default());
    Ok(PublicRequest { tunnel, prefix, folder, host, method, target, headers, body, upload, upgrade })
}

/// Whether the request came through the front: it knows the secret.
fn is_by_front(arrival: &Arrival, config: &Config) -> bool {
    let (Some(secret), Some(given)) = (&config.front_secret, arrival.headers.get(front::SECRET)) else {
        return false;
    };
    // Two while one replaces the other. Every byte is compared, so that the time does not tell how many were right.
    let given = given.as_bytes();
    secret.split(',').filter(|secret| !secret.is_empty()).fold(false, |is_one, secret| {
        let differing = secret.bytes().zip(given).fold(0, |differing, (a, b)| differing | (a ^ b));
        is_one | (secret.len() == given.len() && differing == 0)
    })
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

/// `/web/?q` for `/web?q`; `None` for a target with a second slash.
fn folder_of(target: &Target) -> Option<HeaderValue> {
    let segment = target.path().strip_prefix('/').filter(|segment| !segment.contains('/'))?;
    let query = &target.as_str()[target.path().len()..];
    HeaderValue::try_from(format!("/{segment}/{query}")).ok()
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

/// The fields for the upstream: those between front and edge go.
fn fields(arrived: Headers, host: &str) -> Result<Headers, ErrorCode> {
    let host = HeaderValue::from_str(host).map_err(|_| ErrorCode::BadRequest)?;
    let fields = arrived.into_iter().filter_map(|(name, value)| match name.as_str() {
        front::HOST | front::SECRET | front::TARGET | front::CLIENT => None,
        // Whoever took the request has answered that (RFC 9110 §10.1.1).
        "expect" => None,
        _ if name == header::HOST => Some((name, host.clone())),
        _ => Some((name, value)),
    });
    Ok(fields.collect())
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use proto::{forwarded::Trust, limits, token::TokenKeys};

    use super::*;

    fn config() -> Config {
        Config {
            keys: TokenKeys::new(&[1; 32], None).unwrap(),
            domain: Some("tunnel.example.com".into()),
            front_secret: Some("s3cret".into()),
            front_only: false,
            trust: Trust::Nobody,
            reply_timeout: limits::REPLY_TIMEOUT,
            socket_message_bytes: limits::SOCKET_MESSAGE_BYTES,
        }
    }

    fn arrival(path: &str, headers: &[(&str, &str)]) -> Arrival {
        let field = |&(name, value): &(&str, &str)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        Arrival {
            method: Method::GET,
            target: path.into(),
            headers: headers.iter().map(field).collect(),
            domain_name: "abc.lambda-url.eu-central-1.on.aws".into(),
            source: "198.51.100.7".parse().ok(),
        }
    }

    fn routed(arrival: Arrival) -> Result<PublicRequest, ErrorCode> {
        route(arrival, Vec::new(), &config(), Websockets::Refused, &RequestId::from_random([1; 16]))
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
            let request = routed(arrival("/web/x", &by_front(host, &[]))).unwrap();
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
                routed(arrival("/", &by_front(host, &[]))).err(),
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
            let request = routed(arrival("/web//a%2F?", &by_front(host, &[]))).unwrap();
            assert_eq!(request.target.as_str(), "//a%2F?", "{host}");
            assert_eq!(request.prefix.as_deref(), Some("/web"));
            assert_eq!(request.headers.get("x-forwarded-prefix").unwrap(), "/web");
        }
        assert_eq!(routed(arrival("/", &[("host", "x")])).err(), Some(ErrorCode::NoSuchTunnel));
    }

    #[test]
    fn a_browser_at_a_bare_prefix_is_sent_into_its_folder() {
        let folder = |path: &str, method: Method, accept: &str| {
            let mut sent = arrival(path, &[("host", "h"), ("accept", accept)]);
            sent.method = method;
            routed(sent).unwrap().folder
        };
        let html = "text/html,*/*;q=0.8";
        assert_eq!(folder("/web", Method::GET, html).unwrap(), "/web/");
        assert_eq!(folder("/web?a=/b", Method::HEAD, html).unwrap(), "/web/?a=/b");
        for (path, method, accept) in [
            ("/web", Method::POST, html),
            ("/web", Method::GET, "application/json"),
            ("/web/", Method::GET, html),
            ("/web/x", Method::GET, html),
        ] {
            assert_eq!(folder(path, method, accept), None, "{path} {accept}");
        }
        let mut by_name = by_front("web.tunnel.example.com", &[]);
        by_name.push(("accept", html));
        assert_eq!(routed(arrival("/web", &by_name)).unwrap().folder, None);
    }

    #[test]
    fn two_secrets_are_believed_while_one_replaces_the_other_and_no_part_of_them() {
        let mut config = config();
        config.front_secret = Some("s3cret-new,s3cret-old".into());
        config.front_only = true;
        let by = |config: &Config, secret: &str| {
            let sent = arrival("/web/", &[("host", "h"), ("x-tunnel-front", secret)]);
            route(sent, Vec::new(), config, Websockets::Refused, &RequestId::from_random([1; 16])).is_ok()
        };
        for (secret, is_right) in [
            ("s3cret-new", true),
            ("s3cret-old", true),
            ("s3cret-new,s3cret-old", false),
            ("s3cret-", false),
            ("s3cret-newer", false),
            ("", false),
            (",", false),
        ] {
            assert_eq!(by(&config, secret), is_right, "{secret}");
        }
        // After a rotation that had nothing before it, and after one that is over.
        config.front_secret = Some("s3cret-new,".into());
        assert!(by(&config, "s3cret-new") && !by(&config, "") && !by(&config, "s3cret-old"));
    }

    #[test]
    fn nobody_but_the_front_is_believed() {
        let forged = arrival(
            "/web/",
            &[("x-tunnel-host", "other.tunnel.example.com"), ("x-tunnel-target", "/evil"), ("host", "h")],
        );
        let request = routed(forged).unwrap();
        assert_eq!((request.tunnel.as_str(), request.target.as_str()), ("web", "/"));
        assert!(request.headers.iter().all(|(name, _)| !name.as_str().starts_with("x-tunnel-h")));
        for wrong in ["", "s3cre", "s3cret2", "S3cret"] {
            let mut only = config();
            only.front_only = true;
            let arrival = arrival("/web/", &[("x-tunnel-front", wrong)]);
            let refused =
                route(arrival, Vec::new(), &only, Websockets::Refused, &RequestId::from_random([1; 16]));
            assert_eq!(refused.err(), Some(ErrorCode::FrontRefused), "{wrong}");
        }
        let kept = routed(arrival("/x", &by_front("web.tunnel.example.com", &[("x-tunnel-target", "/x?")])))
            .unwrap();
        assert_eq!(kept.target.as_str(), "/x?");
        assert!(kept.headers.get("x-tunnel-front").is_none());
    }

    #[test]
    fn what_is_between_front_and_edge_does_not_go_on() {
        let sent = [("content-length", "2"), ("expect", "100-continue"), ("transfer-encoding", "chunked")];
        let request = routed(arrival("/web/", &sent)).unwrap();
        assert_eq!(request.headers.get("content-length").unwrap(), "2");
        assert!(
            request.headers.get("expect").is_none() && request.headers.get("transfer-encoding").is_none()
        );
    }

    #[test]
    fn what_cannot_be_carried_is_refused() {
        assert_eq!(routed(arrival("/web/a b", &[])).err(), Some(ErrorCode::BadRequest));
        assert_eq!(routed(arrival("web", &[])).err(), Some(ErrorCode::BadRequest));
        let websocket = arrival("/web", &[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
        assert_eq!(routed(websocket).err(), Some(ErrorCode::UpgradeUnsupported));
        assert!(routed(arrival("/web", &[("connection", "upgrade"), ("upgrade", "h2c")])).is_ok());
    }

    #[test]
    fn a_target_at_its_limit_passes_and_one_byte_more_does_not() {
        let with_target =
            |len: usize| routed(arrival(&format!("/web/{}", "x".repeat(len - 5)), &[])).map(|_| ());
        assert_eq!(with_target(proto::target::TARGET_BYTES), Ok(()));
        assert_eq!(with_target(proto::target::TARGET_BYTES + 1), Err(ErrorCode::TargetTooLong));
    }

    #[test]
    fn a_request_that_comes_back_goes_no_further() {
        let host = "web.tunnel.example.com";
        let again = |headers: &[(&str, &str)]| routed(arrival("/", &by_front(host, headers))).map(|_| ());
        let looped = Err(ErrorCode::LoopDetected);
        assert_eq!(again(&[("x-tunnel-passed", "Web.tunnel.example.com")]), looped);
        assert_eq!(again(&[("x-tunnel-passed", "web.tunnel.example.com,api.tunnel.example.com")]), looped);
        // Through other tunnels once is no loop, whatever the proxies between them are called.
        assert_eq!(again(&[("x-tunnel-passed", "api.tunnel.example.com"), ("via", "1.1 tunnel")]), Ok(()));
        // Somewhere round it goes, even if somebody drops what we wrote.
        let most = forwarded::MOST_PASSED;
        for (name, entry) in [("x-tunnel-passed", "a"), ("via", "1.1 tunnel")] {
            assert_eq!(again(&[(name, &vec![entry; most - 1].join(", "))]), Ok(()), "{name}");
            assert_eq!(again(&[(name, &vec![entry; most].join(", "))]), looped, "{name}");
        }
        let first = routed(arrival("/web/x", &[])).unwrap();
        let passed = first.headers.get("x-tunnel-passed").unwrap().to_str().unwrap().to_owned();
        assert!(passed.ends_with("/web"), "{passed}");
        assert_eq!(
            routed(arrival("/web/x", &[("x-tunnel-passed", &passed)])).err(),
            Some(ErrorCode::LoopDetected)
        );
        let other = routed(arrival("/blog/x", &[("x-tunnel-passed", &passed)])).unwrap();
        assert_eq!(
            other.headers.get("x-tunnel-passed").unwrap(),
            &*format!("{passed}, {}", passed.replace("web", "blog"))
        );
    }

    #[test]
    fn a_head_at_its_limit_passes_and_one_byte_more_does_not() {
        let own = routed(arrival("/web/", &[("a", "")])).unwrap().headers.size_bytes();
        let with_head = |len: usize| routed(arrival("/web/", &[("a", &"x".repeat(len))])).map(|_| ());
        assert_eq!(with_head(limits::HEAD_BYTES - own), Ok(()));
        assert_eq!(with_head(limits::HEAD_BYTES - own + 1), Err(ErrorCode::HeadTooLarge));
    }
}
