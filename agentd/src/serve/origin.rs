//! One view of the address for the app and its visitors: where a request or a response names the other
//! side's address, it is said in the terms of whoever reads it. Pure.
//!
//! Enters: the fields in which the edge says how the public client asked ([`proto::forwarded`]), the upstream's
//! address and the `host` it is sent. Leaves: rewritten values, or `None` where nothing has to change. No body
//! is ever looked at. Bytes that are not ASCII stay as they are ([`value_to_text`]).
//!
//! Only addresses of the tunnel itself are touched: a foreign origin stays foreign, or the app's own defence
//! against requests of foreign pages would be switched off.

use http::{HeaderName, HeaderValue, header};
use proto::header::{Headers, value_from_text, value_to_text};

use crate::{
    config::OriginRule,
    config::address::{Address, Host},
};

const DESTINATION: HeaderName = HeaderName::from_static("destination");
const IF: HeaderName = HeaderName::from_static("if");

/// The fields of a response that [`View::to_public`] looks at.
const OF_RESPONSE: [HeaderName; 3] = [header::LOCATION, header::CONTENT_LOCATION, header::REFRESH];

/// Which fields of a request are said in the upstream's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rewrites {
    /// `Destination` and `If`, in which WebDAV names other resources (RFC 4918 §10.3, §10.4).
    pub(crate) location: bool,
    /// `Origin` and `Referer`.
    pub(crate) origin: bool,
}

impl Rewrites {
    /// What a tunnel's settings mean for one request; `upgrade` for one that asks for another protocol.
    ///
    /// Servers that are asked for a WebSocket compare `Origin` with the `host` they were sent, and know no
    /// forwarding fields; forms and server actions are compared with `X-Forwarded-Host` as often.
    pub(crate) const fn of(rewrite_location: bool, origin: OriginRule, upgrade: bool) -> Self {
        let origin = match origin {
            OriginRule::Auto => upgrade,
            OriginRule::Preserve => false,
            OriginRule::Upstream => true,
        };
        Self { location: rewrite_location, origin }
    }

    /// Whether a field of this name may have to be said otherwise.
    pub(crate) fn concern(self, name: &HeaderName) -> bool {
        (self.origin && (*name == header::ORIGIN || *name == header::REFERER))
            || (self.location && (*name == DESTINATION || *name == IF))
    }
}

/// The tunnel's address as either side knows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    public_scheme: &'a str,
    public_host: &'a str,
    /// In path mode, such as `/web`; else empty.
    prefix: &'a str,
    upstream: &'a Address,
    /// The `host` that the upstream is sent.
    sent: &'a str,
    /// What a route puts before the path for the upstream, such as `/v1`; else empty.
    added: &'a str,
    /// Whether a route changes the path: then paths of the public host have been moved already.
    is_moved: bool,
}

impl<'a> View<'a> {
    /// The view of a request with these fields, as the edge sent them. `None` where the edge does not say how
    /// the public client asked.
    pub(crate) fn of(headers: &'a Headers, upstream: &'a Address, sent: &'a HeaderValue) -> Option<Self> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        Some(Self {
            public_scheme: text("x-forwarded-proto").filter(|scheme| matches!(*scheme, "http" | "https"))?,
            public_host: text("x-forwarded-host").filter(|host| !host.is_empty())?,
            prefix: text("x-forwarded-prefix").filter(|prefix| prefix.starts_with('/')).unwrap_or_default(),
            upstream,
            sent: sent.to_str().ok()?,
            added: "",
            is_moved: false,
        })
    }

    /// The same for a route that changes the path: what is below `added` for the upstream is below `prefix`, also
    /// that of path mode, for the public client.
    pub(crate) const fn under(self, prefix: &'a str, added: &'a str) -> Self {
        Self { prefix, added, is_moved: true, ..self }
    }

    /// The value of a request's field as the upstream should see it, where that is another one.
    pub(crate) fn to_upstream(
        self,
        rewrites: Rewrites,
        name: &HeaderName,
        value: &HeaderValue,
    ) -> Option<HeaderValue> {
        if !rewrites.concern(name) {
            return None;
        }
        let text = value_to_text(value);
        let moved = match name.as_str() {
            "origin" => self.origin(&text)?,
            "if" => self.conditions(&text)?,
            _ => self.private(&text)?,
        };
        value_from_text(&moved)
    }

    /// Rewrites the fields of a response that begin with the upstream's own address, or with the `host` it
    /// was sent.
    pub(crate) fn to_public(self, headers: &mut Headers) {
        let fields = std::mem::take(headers).into_iter().map(|(name, value)| {
            let moved = if !OF_RESPONSE.contains(&name) {
                None
            } else if name == header::REFRESH {
                self.refresh(&value_to_text(&value))
            } else {
                self.public(&value_to_text(&value))
            };
            (name, moved.and_then(|moved| value_from_text(&moved)).unwrap_or(value))
        });
        *headers = fields.collect();
    }

    /// Whether [`Self::to_public`] would look at anything.
    pub(crate) fn concerns(headers: &Headers) -> bool {
        headers.iter().any(|(name, _)| OF_RESPONSE.contains(name))
    }

    /// `Origin` of the tunnel's own pages.
    fn origin(&self, value: &str) -> Option<String> {
        let (scheme, authority) = value.split_once("://")?;
        let own = scheme.eq_ignore_ascii_case(self.public_scheme) && self.is_public(scheme, authority);
        own.then(|| format!("{}://{}", self.upstream.scheme().as_str(), self.sent))
    }

    /// A public address in the upstream's terms; in path mode a path as well.
    fn private(&self, value: &str) -> Option<String> {
        if value.starts_with('/') && !value.starts_with("//") {
            let is_same = self.prefix.is_empty() && self.added.is_empty();
            return self
                .without_prefix(value)
                .filter(|_| !is_same)
                .map(|rest| format!("{}{rest}", self.added));
        }
        let (scheme, authority, place) = split(value)?;
        let scheme = scheme?;
        if !self.is_public(scheme, authority) {
            return None;
        }
        let place = self.without_prefix(place)?;
        Some(format!("{}://{}{}{place}", self.upstream.scheme().as_str(), self.sent, self.added))
    }

    /// What follows the prefix, if it is there.
    fn without_prefix<'t>(&self, place: &'t str) -> Option<&'t str> {
        let rest = place.strip_prefix(self.prefix)?;
        (self.prefix.is_empty() || rest.starts_with('/')).then_some(rest)
    }

    /// The resources that `If` names stand in `<>`, as its lock tokens do.
    fn conditions(&self, value: &str) -> Option<String> {
        let mut moved = String::with_capacity(value.len());
        let mut rest = value;
        let mut changed = false;
        while let Some((before, from)) = rest.split_once('<') {
            let (inside, after) = from.split_once('>')?;
            let private = self.private(inside);
            changed |= private.is_some();
            moved.extend([before, "<", private.as_deref().unwrap_or(inside), ">"]);
            rest = after;
        }
        moved.push_str(rest);
        changed.then_some(moved)
    }

    /// An address of the upstream in public terms.
    fn public(&self, value: &str) -> Option<String> {
        let (scheme, authority, place) = split(value)?;
        if !self.is_upstream(scheme, authority) {
            return None;
        }
        // An app that knows its public name may know its prefix as well; the edge moves those that do not.
        let knows_public = self.is_public(scheme.unwrap_or(self.public_scheme), authority);
        if self.is_moved && knows_public {
            return None;
        }
        let place = proto::prefix::without(place, self.added)?;
        let prefix = match self.prefix {
            prefix if knows_public && has_prefix(place, prefix) => "",
            prefix => prefix,
        };
        let scheme = match scheme {
            Some(_) => format!("{}:", self.public_scheme),
            None => String::new(),
        };
        let slash = if prefix.is_empty() || place.starts_with('/') { "" } else { "/" };
        let moved = format!("{scheme}//{}{prefix}{slash}{place}", self.public_host);
        (moved != value).then_some(moved)
    }

    /// `5; url=http://…`, as browsers read it: quotes and `url=` may be there or not.
    fn refresh(&self, value: &str) -> Option<String> {
        let after_time = value.find([';', ','])? + 1;
        let rest = &value[after_time..];
        let start = rest.len() - rest.trim_ascii_start().len();
        let named = rest[start..].get(..3).is_some_and(|word| word.eq_ignore_ascii_case("url"));
        let equals =
            named.then(|| rest[start + 3..].trim_ascii_start()).filter(|after| after.starts_with('='));
        let url = equals.map_or(&rest[start..], |after| after[1..].trim_ascii_start());
        let quote = url.chars().next().filter(|first| matches!(first, '\'' | '"'));
        let url = &url[quote.map_or(0, char::len_utf8)..];
        let before = value.len() - url.len();
        let end = quote.and_then(|quote| url.find(quote)).unwrap_or(url.len());
        let moved = self.public(&url[..end])?;
        Some(format!("{}{moved}{}", &value[..before], &url[end..]))
    }

    /// Whether an authority is the tunnel's public one.
    fn is_public(&self, scheme: &str, authority: &str) -> bool {
        same(authority, self.public_host, default_port(scheme))
    }

    /// Whether an address names the upstream, in the words of its address or of the `host` it was sent.
    ///
    /// A scheme that is neither the upstream's nor the visitor's is meant: an app that sends its visitors from
    /// http to https must not send them in circles.
    fn is_upstream(&self, scheme: Option<&str>, authority: &str) -> bool {
        let own_scheme = self.upstream.scheme().as_str();
        let scheme = scheme.unwrap_or(own_scheme);
        if !scheme.eq_ignore_ascii_case(own_scheme) && !scheme.eq_ignore_ascii_case(self.public_scheme) {
            return false;
        }
        if authority.eq_ignore_ascii_case(self.sent)
            || authority.eq_ignore_ascii_case(&self.upstream.authority())
            || same(authority, self.sent, default_port(scheme))
        {
            return true;
        }
        let Address::Tcp { host, port, .. } = self.upstream else { return false };
        let (name, named_port) = host_and_port(authority, default_port(scheme));
        // nginx puts its own port behind the name it was asked for.
        let (public_name, _) = host_and_port(self.public_host, 0);
        let (sent_name, _) = host_and_port(self.sent, 0);
        named_port == *port
            && (name.eq_ignore_ascii_case(&host.to_string())
                || is_loopback(host) && is_loopback_name(name)
                || name.eq_ignore_ascii_case(public_name)
                || name.eq_ignore_ascii_case(sent_name))
    }
}

/// Whether `place` begins with the segment that `prefix` is.
fn has_prefix(place: &str, prefix: &str) -> bool {
    place.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
}

/// Takes the edge's own entry off the end of `Via`; `None` where nothing is left.
pub(crate) fn without_own_via(value: &HeaderValue) -> Option<HeaderValue> {
    let text = value_to_text(value);
    let Some(others) = text.trim_ascii_end().strip_suffix(proto::forwarded::VIA) else {
        return Some(value.clone());
    };
    let others = others.trim_ascii_end().strip_suffix(',')?.trim_ascii_end();
    value_from_text(others)
}

/// `http://host/place` as scheme, authority and the rest; `//host/place` has no scheme.
fn split(url: &str) -> Option<(Option<&str>, &str, &str)> {
    let (scheme, rest) = match url.strip_prefix("//") {
        Some(rest) => (None, rest),
        None => {
            let (scheme, rest) = url.split_once("://")?;
            let known = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
            (Some(scheme).filter(|_| known)?.into(), rest)
        }
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, place) = rest.split_at(end);
    Some((scheme, authority, place))
}

const fn default_port(scheme: &str) -> u16 {
    if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 }
}

/// Whether two authorities name the same host and port.
fn same(one: &str, other: &str, default_port: u16) -> bool {
    let (one, other) = (host_and_port(one, default_port), host_and_port(other, default_port));
    one.0.eq_ignore_ascii_case(other.0) && one.1 == other.1
}

fn host_and_port(authority: &str, default_port: u16) -> (&str, u16) {
    match authority.rsplit_once(':') {
        Some((host, "")) => (host, default_port),
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
            // A port that is none equals no other.
            (host, port.parse().unwrap_or(0))
        }
        _ => (authority, default_port),
    }
}

fn is_loopback(host: &Host) -> bool {
    match host {
        Host::Ip(ip) => ip.is_loopback(),
        Host::Localhost => true,
        Host::Zoned(..) | Host::Name(_) => false,
    }
}

fn is_loopback_name(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost") || matches!(name, "127.0.0.1" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(proto: &str, host: &str, prefix: Option<&str>) -> Headers {
        let mut headers = Headers::new();
        let fields = [
            ("x-forwarded-proto", Some(proto)),
            ("x-forwarded-host", Some(host)),
            ("x-forwarded-prefix", prefix),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                headers.push(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
            }
        }
        headers
    }

    struct Case {
        headers: Headers,
        upstream: Address,
        sent: HeaderValue,
    }

    impl Case {
        fn new(proto: &str, host: &str, prefix: Option<&str>, upstream: &str, sent: &str) -> Self {
            Self {
                headers: headers(proto, host, prefix),
                upstream: upstream.parse().unwrap(),
                sent: HeaderValue::from_str(sent).unwrap(),
            }
        }

        fn view(&self) -> View<'_> {
            View::of(&self.headers, &self.upstream, &self.sent).unwrap()
        }

        fn response(&self, name: &'static str, value: &str) -> String {
            let mut list: Headers = [(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())]
                .into_iter()
                .collect();
            assert!(View::concerns(&list));
            self.view().to_public(&mut list);
            list.get(name).unwrap().to_str().unwrap().to_owned()
        }

        fn request(&self, rewrites: Rewrites, name: &'static str, value: &str) -> String {
            let value = HeaderValue::from_str(value).unwrap();
            let moved = self.view().to_upstream(rewrites, &HeaderName::from_static(name), &value);
            moved.unwrap_or(value).to_str().unwrap().to_owned()
        }
    }

    const ALL: Rewrites = Rewrites { location: true, origin: true };

    #[test]
    fn a_location_of_the_upstreams_own_becomes_public_and_no_other() {
        let up = Case::new("https", "web.example.com", None, "3000", "localhost:3000");
        for (location, public) in [
            ("http://localhost:3000/d/", "https://web.example.com/d/"),
            ("http://LOCALHOST:3000/d/?x#y", "https://web.example.com/d/?x#y"),
            ("http://127.0.0.1:3000/d/", "https://web.example.com/d/"),
            ("http://[::1]:3000", "https://web.example.com"),
            ("https://localhost:3000?x", "https://web.example.com?x"),
            ("//localhost:3000/x", "//web.example.com/x"),
            // nginx, which puts its port behind the name.
            ("http://web.example.com:3000/dir/", "https://web.example.com/dir/"),
        ] {
            assert_eq!(up.response("location", location), public, "{location}");
            assert_eq!(up.response("content-location", location), public, "{location}");
        }
        for other in [
            "/d/",
            "d",
            "",
            "//",
            "http://",
            "http://localhost/d/",
            "http://localhost:30000/",
            "http://localhost:3001/d/",
            "http://localhost:3000.evil.example/",
            "http://localhost:3000@evil.example/",
            "http://localhost:3000\\evil",
            "http://u@localhost:3000/",
            "http://web.example.com/",
            "https://web.example.com/d/",
            "https://idp.example/authorize?redirect_uri=http://localhost:3000/cb",
            "ftp://localhost:3000/x",
            "myapp://localhost:3000/x",
        ] {
            assert_eq!(up.response("location", other), other);
        }
    }

    #[test]
    fn the_host_that_was_sent_is_the_upstreams_name_too() {
        let value = Case::new("https", "web.example.com", None, "http://10.0.0.7:8000", "app.test");
        assert_eq!(value.response("location", "http://app.test/x"), "https://web.example.com/x");
        assert_eq!(value.response("location", "http://app.test:8000/x"), "https://web.example.com/x");
        assert_eq!(value.response("location", "http://10.0.0.7:8000/x"), "https://web.example.com/x");
        assert_eq!(value.response("location", "http://localhost:8000/x"), "http://localhost:8000/x");
        let preserve = Case::new("https", "web.example.com", None, "3000", "web.example.com");
        assert_eq!(preserve.response("location", "http://web.example.com/x"), "https://web.example.com/x");
        let unix = Case::new("http", "web.localhost:8080", None, "unix:/run/x.sock", "localhost:80");
        assert_eq!(unix.response("location", "http://localhost/x"), "http://web.localhost:8080/x");
        assert_eq!(unix.response("location", "http://localhost:80/x"), "http://web.localhost:8080/x");
        assert_eq!(unix.response("location", "http://localhost:81/x"), "http://localhost:81/x");
        let tls = Case::new("http", "web.localhost:8080", None, "https://app.internal", "app.internal");
        assert_eq!(tls.response("location", "https://app.internal:443/x"), "http://web.localhost:8080/x");
    }

    #[test]
    fn an_app_that_sends_its_visitors_to_https_sends_them_there() {
        let plain = Case::new("http", "web.localhost:8080", None, "3000", "localhost:3000");
        assert_eq!(plain.response("location", "https://localhost:3000/x"), "https://localhost:3000/x");
        let preserve = Case::new("http", "web.localhost:8080", None, "3000", "web.localhost:8080");
        assert_eq!(
            preserve.response("location", "https://web.localhost:8080/"),
            "https://web.localhost:8080/"
        );
    }

    #[test]
    fn path_mode_puts_the_prefix_before_what_was_the_upstreams() {
        let path = Case::new("https", "abc.example", Some("/web"), "3000", "localhost:3000");
        for (location, public) in [
            ("http://localhost:3000/d/", "https://abc.example/web/d/"),
            ("http://localhost:3000/web/d/", "https://abc.example/web/web/d/"),
            ("http://localhost:3000", "https://abc.example/web/"),
            ("http://localhost:3000?x", "https://abc.example/web/?x"),
            ("https://abc.example/web/x", "https://abc.example/web/x"),
        ] {
            assert_eq!(path.response("location", location), public);
        }
        let preserve = Case::new("https", "abc.example", Some("/web"), "3000", "abc.example");
        assert_eq!(preserve.response("location", "http://abc.example/web/x"), "https://abc.example/web/x");
        assert_eq!(preserve.response("location", "http://abc.example/x"), "https://abc.example/web/x");
    }

    #[test]
    fn refresh_is_read_as_browsers_do() {
        let up = Case::new("https", "web.example.com", None, "3000", "localhost:3000");
        for (value, public) in [
            ("5; url=http://localhost:3000/x", "5; url=https://web.example.com/x"),
            ("0;URL='http://localhost:3000/x'", "0;URL='https://web.example.com/x'"),
            ("0, url = \"http://localhost:3000/x\" ", "0, url = \"https://web.example.com/x\" "),
            ("1; http://localhost:3000/", "1; https://web.example.com/"),
            ("5", "5"),
            ("5;", "5;"),
            ("5; url=/x", "5; url=/x"),
            ("5; url='", "5; url='"),
            ("5; url", "5; url"),
        ] {
            assert_eq!(up.response("refresh", value), public);
        }
    }

    #[test]
    fn only_the_tunnels_own_origin_is_said_in_the_upstreams_terms() {
        let up = Case::new("https", "web.example.com", None, "3000", "localhost:3000");
        assert_eq!(up.request(ALL, "origin", "https://web.example.com"), "http://localhost:3000");
        assert_eq!(up.request(ALL, "origin", "https://WEB.example.com:443"), "http://localhost:3000");
        assert_eq!(up.request(ALL, "referer", "https://web.example.com/a?b"), "http://localhost:3000/a?b");
        for other in [
            "null",
            "",
            "http://web.example.com",
            "https://evil.example",
            "https://web.example.com.evil.example",
            "https://web.example.com:8443",
            "https://web.example.com/",
        ] {
            assert_eq!(up.request(ALL, "origin", other), other);
        }
        let local =
            Case::new("http", "web.localhost:8080", None, "https://app.test:444", "web.localhost:8080");
        assert_eq!(local.request(ALL, "origin", "http://web.localhost:8080"), "https://web.localhost:8080");
        assert_eq!(local.request(ALL, "origin", "http://web.localhost"), "http://web.localhost");
        let keep = Rewrites { location: true, origin: false };
        assert_eq!(up.request(keep, "origin", "https://web.example.com"), "https://web.example.com");
        assert_eq!(up.request(keep, "referer", "https://web.example.com/"), "https://web.example.com/");
    }

    #[test]
    fn upgrades_alone_are_said_in_the_upstreams_terms_unless_configured() {
        let origin = |rule, upgrade| Rewrites::of(true, rule, upgrade).origin;
        assert!(origin(OriginRule::Auto, true) && !origin(OriginRule::Auto, false));
        assert!(origin(OriginRule::Upstream, true) && origin(OriginRule::Upstream, false));
        assert!(!origin(OriginRule::Preserve, true) && !origin(OriginRule::Preserve, false));
        assert!(!Rewrites::of(false, OriginRule::Auto, true).location);
    }

    #[test]
    fn webdav_names_resources_in_the_upstreams_terms() {
        let up = Case::new("https", "web.example.com", None, "3000", "localhost:3000");
        assert_eq!(
            up.request(ALL, "destination", "https://web.example.com/b%20c"),
            "http://localhost:3000/b%20c"
        );
        assert_eq!(up.request(ALL, "destination", "https://other.example/b"), "https://other.example/b");
        assert_eq!(up.request(ALL, "destination", "/b"), "/b");
        let path = Case::new("https", "abc.example", Some("/web"), "3000", "localhost:3000");
        assert_eq!(path.request(ALL, "destination", "https://abc.example/web/b"), "http://localhost:3000/b");
        assert_eq!(path.request(ALL, "destination", "/web/b"), "/b");
        for other in ["https://abc.example/other/b", "https://abc.example/webb", "/webb", "/other"] {
            assert_eq!(path.request(ALL, "destination", other), other);
        }
        let list =
            "<https://web.example.com/a> (<urn:uuid:1> [\"e\"]) <https://other.example/> (Not <urn:uuid:2>)";
        let moved =
            "<http://localhost:3000/a> (<urn:uuid:1> [\"e\"]) <https://other.example/> (Not <urn:uuid:2>)";
        assert_eq!(up.request(ALL, "if", list), moved);
        assert_eq!(up.request(ALL, "if", "(<urn:uuid:1>)"), "(<urn:uuid:1>)");
        assert_eq!(up.request(ALL, "if", "<https://web.example.com/"), "<https://web.example.com/");
        let off = Rewrites { location: false, origin: true };
        assert_eq!(up.request(off, "destination", "https://web.example.com/b"), "https://web.example.com/b");
    }

    #[test]
    fn bytes_that_are_not_ascii_stay_as_they_were() {
        let bytes =
            |before: &str, rest: &[u8]| HeaderValue::from_bytes(&[before.as_bytes(), rest].concat()).unwrap();
        for (public, prefix, added) in [
            ("https://web.example.com", None, ""),
            ("https://web.example.com/web", Some("/web"), ""),
            ("https://web.example.com/web", Some("/web"), "/v1"),
        ] {
            let case = Case::new("https", "web.example.com", prefix, "3000", "localhost:3000");
            let view = match added {
                "" => case.view(),
                added => case.view().under("/web", added),
            };
            let own = format!("http://localhost:3000{added}");
            // As UTF-8, as ISO-8859-1, and with the bytes that are white space in Unicode alone.
            for rest in
                ["/café.php?ü#ß".as_bytes(), b"/caf\xe9", b"/\xe0\xff", b"/x\x85", b"/x\xa0", "/à".as_bytes()]
            {
                for (name, before) in [
                    ("location", ""),
                    ("content-location", ""),
                    ("refresh", "5; url="),
                    ("refresh", "5;url='"),
                ] {
                    let response = |to: &str| -> Headers {
                        [(HeaderName::from_static(name), bytes(&format!("{before}{to}"), rest))]
                            .into_iter()
                            .collect()
                    };
                    let mut headers = response(&own);
                    view.to_public(&mut headers);
                    assert_eq!(headers, response(public), "{name}");
                    let foreign = response("https://idp.example");
                    let mut headers = foreign.clone();
                    view.to_public(&mut headers);
                    assert_eq!(headers, foreign, "{name}");
                }
                for (name, before) in [("referer", ""), ("destination", ""), ("if", "(<urn:\u{e9}>) <")] {
                    let closed = if name == "if" { [rest, b">"].concat() } else { rest.to_vec() };
                    let request = |to: &str| bytes(&format!("{before}{to}"), &closed);
                    let moved = view.to_upstream(ALL, &HeaderName::from_static(name), &request(public));
                    assert_eq!(moved, Some(request(&own)), "{name}");
                    let foreign = request("https://other.example");
                    assert_eq!(
                        view.to_upstream(ALL, &HeaderName::from_static(name), &foreign),
                        None,
                        "{name}"
                    );
                }
            }
            let foreign = bytes("https://", b"web.example.com\xa0");
            assert_eq!(view.to_upstream(ALL, &header::ORIGIN, &foreign), None);
            for foreign in
                [bytes("http://localhost:3000", b"\xa0/x"), bytes("http://localhost", "é:3000/".as_bytes())]
            {
                let mut headers: Headers = [(header::LOCATION, foreign)].into_iter().collect();
                let sent = headers.clone();
                view.to_public(&mut headers);
                assert_eq!(headers, sent);
            }
        }
    }

    #[test]
    fn only_the_edges_own_entry_leaves_via() {
        let left = |via: &'static str| without_own_via(&HeaderValue::from_static(via));
        assert_eq!(left("1.1 tunnel"), None);
        assert_eq!(left("1.0 fred, 1.1 tunnel").unwrap(), "1.0 fred");
        assert_eq!(left("1.1 tunnel, 1.1 other").unwrap(), "1.1 tunnel, 1.1 other");
        assert_eq!(left("1.1 tunnel, 1.1 tunnel").unwrap(), "1.1 tunnel");
        for comment in ["1.0 fred (café)".as_bytes(), b"1.0 fred (\xe9)", b"1.0 \xa0"] {
            let own = [comment, b", 1.1 tunnel"].concat();
            for via in [&own, comment] {
                let via = HeaderValue::from_bytes(via).unwrap();
                assert_eq!(without_own_via(&via).unwrap().as_bytes(), comment);
            }
        }
    }

    #[test]
    fn without_forwarding_fields_there_is_nothing_to_say() {
        let upstream: Address = "3000".parse().unwrap();
        let sent = HeaderValue::from_static("localhost:3000");
        assert!(View::of(&Headers::new(), &upstream, &sent).is_none());
        assert!(View::of(&headers("gopher", "h", None), &upstream, &sent).is_none());
    }
}
