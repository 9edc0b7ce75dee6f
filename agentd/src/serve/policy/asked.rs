//! A request as policy sees it: its head, and what the edge vouches for. Pure.

use std::net::IpAddr;

use http::{HeaderValue, Method, header};
use proto::{header::Headers, target::Target};

/// The head of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) method: &'a Method,
    pub(crate) target: &'a Target,
    pub(crate) headers: &'a Headers,
    /// Whether another protocol is asked for.
    pub(crate) upgrade: bool,
}

impl<'a> Asked<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The address of the public client, as the edge knows it: it always adds the last element to `Forwarded`
    /// itself, whatever else it believes. IPv4 addresses in IPv6 form are IPv4 ones.
    pub(crate) fn client(&self) -> Option<IpAddr> {
        client_of(self.headers.get_all(header::FORWARDED).last()?.to_str().ok()?)
    }

    /// `https://web.tunnel.example.com`, as the public client wrote it.
    pub(crate) fn origin(&self) -> Option<String> {
        let scheme = self.text("x-forwarded-proto").filter(|scheme| matches!(*scheme, "http" | "https"))?;
        Some(format!("{scheme}://{}", self.host()?))
    }

    /// Host and port, as the public client asked for them.
    pub(crate) fn host(&self) -> Option<&'a str> {
        let host = self.text("x-forwarded-host")?;
        let is_host = host.parse::<http::uri::Authority>().is_ok_and(|host| !host.as_str().contains('@'));
        is_host.then_some(host)
    }

    /// What was taken off the path in path mode, else nothing.
    pub(crate) fn prefix(&self) -> &'a str {
        self.text("x-forwarded-prefix").unwrap_or_default()
    }

    /// The address as the public client wrote it.
    pub(crate) fn url(&self) -> Option<String> {
        Some(format!("{}{}{}", self.origin()?, self.prefix(), self.target.as_str()))
    }

    /// Whether it may change something. A WebSocket may, with whatever method it is asked for.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.upgrade || !self.method.is_safe()
    }

    /// Whether a page of another origin made a browser send it: as `Sec-Fetch-Site` says, which no page can change; else
    /// `Origin`. Programs say neither, and older browsers `Origin` at least where something may change.
    pub(crate) fn is_cross_origin(&self) -> bool {
        let mut sites = self.headers.get_all("sec-fetch-site").peekable();
        if sites.peek().is_some() {
            // A page that hides where it comes from has the origin `null` also to itself.
            return !sites.all(|site| matches!(site.as_bytes(), b"same-origin" | b"none"));
        }
        !self.headers.get_all(header::ORIGIN).all(|origin| self.is_own(origin))
    }

    fn is_own(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
        let (Some((scheme, authority)), Some(host)) = (origin, self.host()) else { return false };
        let port = match scheme {
            "https" => ":443",
            // What stands before the front may take TLS off, and puts none on.
            "http" if self.text("x-forwarded-proto") == Some("http") => ":80",
            _ => return false,
        };
        let without_port = |host: &'a str| host.strip_suffix(port).unwrap_or(host);
        authority.strip_suffix(port).unwrap_or(authority).eq_ignore_ascii_case(without_port(host))
    }

    /// Whether it takes a page.
    pub(crate) fn wants_html(&self) -> bool {
        self.text("accept").is_some_and(|accept| accept.contains("text/html"))
    }

    /// Whether a browser would show the answer, so that it can be led elsewhere.
    pub(crate) fn is_navigation(&self) -> bool {
        let is_page = match self.text("sec-fetch-mode") {
            Some(mode) => mode == "navigate",
            None => self.wants_html(),
        };
        is_page && !self.upgrade && matches!(*self.method, Method::GET | Method::HEAD)
    }
}

/// The client of the element at the end of a `Forwarded` field. It is read backwards, because only the end is the
/// edge's own ([`proto::forwarded`]): quotes that somebody left open before it must not matter.
fn client_of(field: &str) -> Option<IpAddr> {
    let rest = field.strip_suffix(";proto=https").or_else(|| field.strip_suffix(";proto=http"))?;
    let rest = match rest.strip_suffix('"') {
        // The edge takes quotes out of what it quotes.
        Some(quoted) => quoted.rsplit_once('"')?.0.strip_suffix(";host=")?,
        None => rest.rsplit_once(";host=")?.0,
    };
    let (before, node) = rest.rsplit_once("for=")?;
    if !before.is_empty() && !before.ends_with(", ") {
        return None;
    }
    let node = node.strip_prefix("\"[").and_then(|node| node.strip_suffix("]\"")).unwrap_or(node);
    node.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use proto::forwarded::{Hop, Trust, apply};

    use super::*;

    fn asked_with<T>(headers: &Headers, of: impl FnOnce(Asked<'_>) -> T) -> T {
        let target = Target::parse("/a?b").unwrap();
        of(Asked { method: &Method::GET, target: &target, headers, upgrade: false })
    }

    fn headers(fields: &[(&'static str, &str)]) -> Headers {
        let field = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        fields.iter().map(field).collect()
    }

    #[test]
    fn the_client_is_whom_the_edge_names_whatever_was_sent() {
        let sent = [
            ("forwarded", "for=10.0.0.1;by=\"a,for=10.0.0.2\""),
            ("forwarded", "for=\"[::1]\", for=\"10.0.0.3"),
            ("x-forwarded-for", "192.0.2.7, 10.0.0.1"),
        ];
        for (ip, seen) in
            [("192.0.2.7", "192.0.2.7"), ("2001:db8::1", "2001:db8::1"), ("::ffff:192.0.2.7", "192.0.2.7")]
        {
            for trust in [Trust::Nobody, Trust::Chain] {
                for host in
                    ["web.example.com:8443", "web", "[2001:db8::2]:80", "a, for=10.0.0.9;host=b", "\"", ""]
                {
                    let mut headers = headers(&sent);
                    let hop = Hop {
                        client: Some(ip.parse().unwrap()),
                        scheme: "https",
                        host,
                        port: 443,
                        prefix: None,
                    };
                    apply(&mut headers, &hop, trust, &proto::id::RequestId::from_random([1; 16]));
                    let client = asked_with(&headers, |asked| asked.client());
                    assert_eq!(client, Some(seen.parse().unwrap()), "{headers:?}");
                }
            }
        }
        let mut unknown = headers(&sent);
        let hop = Hop { client: None, scheme: "https", host: "h", port: 443, prefix: None };
        apply(&mut unknown, &hop, Trust::Chain, &proto::id::RequestId::from_random([1; 16]));
        assert_eq!(asked_with(&unknown, |asked| asked.client()), None);
        assert_eq!(asked_with(&Headers::new(), |asked| asked.client()), None);
    }

    #[test]
    fn pages_of_other_origins_are_told_from_the_tunnels_own_and_from_programs() {
        const OWN: &str = "https://web.example.com";
        for (scheme, host, fields, is_cross) in [
            ("https", "web.example.com", &[][..], false),
            ("https", "web.example.com", &[("origin", OWN)], false),
            ("https", "WEB.example.com", &[("origin", OWN)], false),
            ("https", "web.example.com:443", &[("origin", OWN)], false),
            ("https", "web.example.com:8443", &[("origin", "https://web.example.com:8443")], false),
            ("http", "web.localhost:8080", &[("origin", "http://web.localhost:8080")], false),
            ("http", "[::1]", &[("origin", "http://[::1]:80")], false),
            // TLS ends before the front.
            ("http", "web.example.com", &[("origin", OWN)], false),
            ("https", "web.example.com", &[("origin", "http://web.example.com")], true),
            ("https", "web.example.com", &[("origin", "https://web.example.com:8443")], true),
            ("https", "web.example.com:8443", &[("origin", OWN)], true),
            ("https", "web.example.com", &[("origin", "https://other.example.com")], true),
            ("https", "web.example.com", &[("origin", "https://web.example.com.evil.test")], true),
            ("https", "web.example.com", &[("origin", "https://evil.test/web.example.com")], true),
            ("https", "web.example.com", &[("origin", "null")], true),
            ("https", "web.example.com", &[("origin", "")], true),
            ("https", "web.example.com", &[("origin", "chrome-extension://web.example.com")], true),
            ("https", "web.example.com", &[("origin", OWN), ("origin", "https://other.example.com")], true),
            // Who says where it comes from is asked nothing else.
            ("https", "web.example.com", &[("sec-fetch-site", "same-origin"), ("origin", "null")], false),
            ("https", "web.example.com", &[("sec-fetch-site", "none")], false),
            ("https", "web.example.com", &[("sec-fetch-site", "same-site")], true),
            ("https", "web.example.com", &[("sec-fetch-site", "cross-site"), ("origin", OWN)], true),
            ("https", "web.example.com", &[("sec-fetch-site", "same-origin, none"), ("origin", OWN)], true),
            (
                "https",
                "web.example.com",
                &[("sec-fetch-site", "none"), ("sec-fetch-site", "same-site")],
                true,
            ),
        ] {
            let hop = [("x-forwarded-proto", scheme), ("x-forwarded-host", host)];
            let is = asked_with(&headers(&[&hop, fields].concat()), |asked| asked.is_cross_origin());
            assert_eq!(is, is_cross, "{scheme}://{host} {fields:?}");
        }
        // Where nobody says what was asked for, no page is the tunnel's own.
        assert!(asked_with(&headers(&[("origin", OWN)]), |asked| asked.is_cross_origin()));
    }

    #[test]
    fn only_what_a_browser_shows_is_led_elsewhere() {
        for (fields, is_navigation) in [
            (&[("accept", "text/html,*/*")][..], true),
            (&[("accept", "application/json")], false),
            (&[("accept", "text/html"), ("sec-fetch-mode", "cors")], false),
            (&[("accept", "*/*"), ("sec-fetch-mode", "navigate")], true),
            (&[], false),
        ] {
            assert_eq!(
                asked_with(&headers(fields), |asked| asked.is_navigation()),
                is_navigation,
                "{fields:?}"
            );
        }
        let fields = headers(&[
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "web.example.com:8443"),
            ("x-forwarded-prefix", "/web"),
        ]);
        let url = asked_with(&fields, |asked| asked.url());
        assert_eq!(url.as_deref(), Some("https://web.example.com:8443/web/a?b"));
        let evil = headers(&[("x-forwarded-proto", "https"), ("x-forwarded-host", "a@b")]);
        assert_eq!(asked_with(&evil, |asked| asked.url()), None);
    }
}
