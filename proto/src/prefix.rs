//! Paths in the fields of a response, moved from where the upstream believes itself to be to where the public
//! client finds it. Pure.
//!
//! An upstream that was told the prefix (`X-Forwarded-Prefix`) may say it itself: such a path is public already.
//!
//! A rule of its own for each field: `Location` and `Content-Location` as absolute paths and as addresses of the
//! public host, `Refresh` as an absolute path, `Path` of `Set-Cookie`. Other paths are relative and stay true.
//!
//! Values are read byte by byte ([`value_to_text`]): what is not ASCII is no less a path, and stays as it was. White space
//! is ASCII's.

use std::borrow::Cow;

use crate::header::{Headers, value_from_text, value_to_text};

/// Moves the paths below `from` to below `to`, both such as `/web` or empty. `host` is the public one. `told` is the whole
/// public prefix where the upstream may say it itself ([`told`]), else empty: what is below it goes below `to` as well.
pub fn move_fields(headers: &mut Headers, from: &str, to: &str, told: &str, host: &str) {
    let way = Way { from, to, told, host };
    let fields = std::mem::take(headers).into_iter().map(|(name, value)| {
        let moved = match name.as_str() {
            "location" | "content-location" => way.move_location(&value_to_text(&value)),
            "refresh" => way.move_refresh(&value_to_text(&value)),
            "set-cookie" => way.move_cookie(&value_to_text(&value)),
            _ => None,
        };
        (name, moved.and_then(|moved| value_from_text(&moved)).unwrap_or(value))
    });
    *headers = fields.collect();
}

/// What follows the whole segments of `prefix`.
#[must_use]
pub fn without<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix)?;
    (prefix.is_empty() || rest.is_empty() || rest.starts_with(['/', '?', '#'])).then_some(rest)
}

/// `public` as a prefix that an upstream may say itself, or nothing where it has such a path of its own: it was asked for
/// `target`.
#[must_use]
pub fn told<'a>(public: &'a str, target: &str) -> &'a str {
    if without(target, public).is_some() { "" } else { public }
}

/// `path` below `to` instead of `from`.
fn moved(path: &str, from: &str, to: &str) -> Option<String> {
    let rest = without(path, from)?;
    let slash = if to.is_empty() && !rest.starts_with('/') { "/" } else { "" };
    Some(format!("{to}{slash}{rest}"))
}

/// From where to where paths are moved, see [`move_fields`].
struct Way<'a> {
    from: &'a str,
    to: &'a str,
    told: &'a str,
    host: &'a str,
}

impl Way<'_> {
    /// A path as the public client knows it, or as the next hop expects it from who knows of no prefix.
    fn moved(&self, path: &str) -> Option<String> {
        let told = Some(self.told).filter(|told| !told.is_empty());
        told.and_then(|told| moved(path, told, self.to)).or_else(|| moved(path, self.from, self.to))
    }

    fn move_location(&self, location: &str) -> Option<String> {
        if location.starts_with('/') && !location.starts_with("//") {
            return self.moved(location);
        }
        // An absolute address of our own public host, as an upstream makes it from X-Forwarded-Host.
        let (scheme, rest) =
            location.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"))?;
        let path = rest.strip_prefix(self.host)?;
        let is_below = |prefix: &str| {
            !prefix.is_empty() && without(path, prefix).is_some_and(|rest| rest.starts_with('/'))
        };
        let is_moved = is_below(self.to) || is_below(self.told);
        if !(path.is_empty() || path.starts_with(['/', '?', '#'])) || is_moved {
            return None;
        }
        let rest = without(path, self.from)?;
        Some(format!("{scheme}://{}{}{rest}", self.host, self.to))
    }

    /// `5; url=/next`: only an absolute path is moved; an address of the upstream's own is public already.
    fn move_refresh(&self, refresh: &str) -> Option<String> {
        let (before, url) = refresh.split_at(refresh.find('/')?);
        let is_whole = before.trim_end_matches(['\'', '"']).trim_ascii_end().ends_with(['=', ';', ',']);
        if !is_whole || url.starts_with("//") {
            return None;
        }
        Some(format!("{before}{}", self.moved(url)?))
    }

    fn move_cookie(&self, cookie: &str) -> Option<String> {
        // Browsers take a cookie of such a name with Path=/ only, in whatever case it is written (RFC 6265bis §4.1.3.2).
        if cookie.get(..7).is_some_and(|name| name.eq_ignore_ascii_case("__Host-")) {
            return None;
        }
        let mut changed = false;
        let parts: Vec<Cow<'_, str>> = cookie
            .split(';')
            .enumerate()
            .map(|(index, part)| match self.move_attribute(part).filter(|_| index > 0) {
                Some(moved) => {
                    changed = true;
                    moved.into()
                }
                None => part.into(),
            })
            .collect();
        changed.then(|| parts.join(";"))
    }

    /// ` Path=/x` of a cookie.
    fn move_attribute(&self, attribute: &str) -> Option<String> {
        let (name, path) = attribute.split_once('=')?;
        if !name.trim_ascii_start().eq_ignore_ascii_case("path") || !path.starts_with('/') {
            return None;
        }
        let moved = match (path.trim_ascii_end(), self.to) {
            // "/" alone would become "/web/", which does not cover "/web".
            ("/", "") => return None,
            ("/", to) => to.to_owned(),
            (path, _) => self.moved(path)?,
        };
        Some(format!("{name}={moved}"))
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header};

    use super::*;

    fn moved(name: http::HeaderName, value: &str, from: &str, to: &str) -> String {
        moved_by(name, value, from, to, "")
    }

    fn moved_by(name: http::HeaderName, value: &str, from: &str, to: &str, told: &str) -> String {
        let mut headers: Headers =
            [(name.clone(), HeaderValue::from_str(value).unwrap())].into_iter().collect();
        move_fields(&mut headers, from, to, told, "pub:8080");
        headers.get(name).unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn what_is_below_one_prefix_is_found_below_the_other() {
        for (from, to, sent, public) in [
            ("", "/api", "/x?y", "/api/x?y"),
            ("/v1", "/api", "/v1/x", "/api/x"),
            ("/v1", "/api", "/v1", "/api"),
            ("/v1", "/api", "/v1?y", "/api?y"),
            ("/v1", "/api", "/v10/x", "/v10/x"),
            ("/v1", "/api", "/other", "/other"),
            ("/v1", "", "/v1/x", "/x"),
            ("/v1", "", "/v1", "/"),
            ("/v1", "", "/v1?y", "/?y"),
            ("/v1", "/api", "//v1/x", "//v1/x"),
            ("/v1", "/api", "x", "x"),
            ("/v1", "/api", "https://pub:8080/v1/x", "https://pub:8080/api/x"),
            ("/v1", "", "https://pub:8080/v1/x", "https://pub:8080/x"),
            ("", "/api", "https://pub:8080/api/x", "https://pub:8080/api/x"),
            ("", "/api", "https://pub:8080/apix", "https://pub:8080/api/apix"),
            ("", "/api", "https://pub:80800/x", "https://pub:80800/x"),
            ("", "/api", "https://other/x", "https://other/x"),
        ] {
            assert_eq!(moved(header::LOCATION, sent, from, to), public, "{from} -> {to}: {sent}");
        }
        for (from, to, sent, public) in [
            ("", "/api", "a=1; Path=/; HttpOnly", "a=1; Path=/api; HttpOnly"),
            ("/v1", "/api", "a=1; Path=/v1/x", "a=1; Path=/api/x"),
            ("/v1", "/api", "a=1; path=/", "a=1; path=/api"),
            ("/v1", "/api", "a=1; path=/other", "a=1; path=/other"),
            ("/v1", "", "a=1; Path=/v1", "a=1; Path=/"),
            ("/v1", "", "a=1; Path=/", "a=1; Path=/"),
            ("/v1", "/api", "__Host-a=1; Path=/; Secure", "__Host-a=1; Path=/; Secure"),
        ] {
            assert_eq!(moved(header::SET_COOKIE, sent, from, to), public, "{from} -> {to}: {sent}");
        }
        assert_eq!(moved(header::REFRESH, "5; url=/v1/x", "/v1", "/api"), "5; url=/api/x");
        assert_eq!(moved(header::REFRESH, "5; url=/x", "/v1", "/api"), "5; url=/x");
    }

    #[test]
    fn bytes_that_are_not_ascii_stay_as_they_were() {
        let by = |name: http::HeaderName, value: &[u8]| {
            let mut headers: Headers =
                [(name.clone(), HeaderValue::from_bytes(value).unwrap())].into_iter().collect();
            move_fields(&mut headers, "/v1", "/api", "/web/api", "pub:8080");
            headers.get(name).unwrap().as_bytes().to_vec()
        };
        // As UTF-8, as ISO-8859-1, and with the bytes that are white space in Unicode alone.
        for rest in
            ["/café.php?ü#ß".as_bytes(), b"/caf\xe9", b"/\xe0\xff", b"/x\x85", b"/x\xa0", "/à".as_bytes()]
        {
            let with = |before: &str| [before.as_bytes(), rest].concat();
            for (sent, public) in [
                ("/v1", "/api"),
                ("/web/api", "/api"),
                ("/other", "/other"),
                ("https://pub:8080/v1", "https://pub:8080/api"),
                ("https://pub:8080/web/api", "https://pub:8080/web/api"),
                ("https://other/v1", "https://other/v1"),
            ] {
                for name in [header::LOCATION, header::CONTENT_LOCATION] {
                    assert_eq!(by(name, &with(sent)), with(public), "{sent} {rest:?}");
                }
            }
            assert_eq!(by(header::REFRESH, &with("5; url='/v1")), with("5; url='/api"));
            let name = "grün=ü; HttpOnly; path=";
            let cookie = |path: &str| [with(&format!("{name}{path}")).as_slice(), b"; Secure"].concat();
            let moved = [with(&format!("{name}/api")).as_slice(), b"; Secure"].concat();
            assert_eq!(by(header::SET_COOKIE, &cookie("/v1")), moved);
            assert_eq!(by(header::SET_COOKIE, &cookie("/other")), cookie("/other"));
        }
        assert_eq!(by(header::LOCATION, b"/v1\xa0/x"), b"/v1\xa0/x", "another segment");
        assert_eq!(by(header::REFRESH, b"5; url=\xa0/v1/x"), b"5; url=\xa0/v1/x", "a relative path");
        assert_eq!(by(header::SET_COOKIE, b"\xe9; Path=/"), b"\xe9; Path=/api");
    }

    #[test]
    fn what_an_upstream_says_below_the_prefix_that_it_was_told_is_not_moved_again() {
        // A route's own prefix, that of path mode alone, and both: the edge puts the latter's back.
        for (from, to, told, sent, public) in [
            ("", "/api", "/api", "/api/x", "/api/x"),
            ("", "/api", "/api", "/api", "/api"),
            ("", "/api", "/api", "/api?y", "/api?y"),
            ("", "/api", "/api", "/apix", "/api/apix"),
            ("/v1", "/api", "/api", "/api/x", "/api/x"),
            ("/v1", "/api", "/api", "/v1/x", "/api/x"),
            ("", "", "/web", "/web/x", "/x"),
            ("", "", "/web", "/web", "/"),
            ("", "", "/web", "/x", "/x"),
            ("", "/api", "/web/api", "/web/api/x", "/api/x"),
            ("", "/api", "/web/api", "/x", "/api/x"),
            ("", "/api", "/web/api", "https://pub:8080/web/api/x", "https://pub:8080/web/api/x"),
            ("", "/api", "/web/api", "https://pub:8080/x", "https://pub:8080/api/x"),
            ("/v1", "/api", "/api", "//api/x", "//api/x"),
        ] {
            let by = |name, sent: &str| moved_by(name, sent, from, to, told);
            assert_eq!(by(header::LOCATION, sent), public, "{from} -> {to}, {told}: {sent}");
            if sent.starts_with('/') && !sent.starts_with("//") {
                assert_eq!(by(header::REFRESH, &format!("5; url={sent}")), format!("5; url={public}"));
                assert_eq!(
                    by(header::SET_COOKIE, &format!("a=1; Path={sent}")),
                    format!("a=1; Path={public}")
                );
            }
        }
        for (public, target, is) in [
            ("/api", "/x", "/api"),
            ("/api", "/api/x", ""),
            ("/api", "/api?y", ""),
            ("/api", "/apix", "/api"),
            ("", "/x", ""),
        ] {
            assert_eq!(told(public, target), is, "{public} {target}");
        }
    }
}
