//! Paths in the fields of a response, moved from where the upstream believes itself to be to where the public
//! client finds it. Pure.
//!
//! A rule of its own for each field: `Location` and `Content-Location` as absolute paths and as addresses of the
//! public host, `Refresh` as an absolute path, `Path` of `Set-Cookie`. Other paths are relative and stay true.

use http::HeaderValue;

use crate::header::Headers;

/// Moves the paths below `from` to below `to`, both such as `/web` or empty. `host` is the public one.
pub fn move_fields(headers: &mut Headers, from: &str, to: &str, host: &str) {
    let fields = std::mem::take(headers).into_iter().map(|(name, value)| {
        let moved = match name.as_str() {
            "location" | "content-location" => move_location(&value, from, to, host),
            "refresh" => move_refresh(&value, from, to),
            "set-cookie" => move_cookie(&value, from, to),
            _ => None,
        };
        (name, moved.unwrap_or(value))
    });
    *headers = fields.collect();
}

/// What follows the whole segments of `prefix`.
#[must_use]
pub fn without<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix)?;
    (prefix.is_empty() || rest.is_empty() || rest.starts_with(['/', '?', '#'])).then_some(rest)
}

/// `path` below `to` instead of `from`.
fn moved(path: &str, from: &str, to: &str) -> Option<String> {
    let rest = without(path, from)?;
    let slash = if to.is_empty() && !rest.starts_with('/') { "/" } else { "" };
    Some(format!("{to}{slash}{rest}"))
}

fn move_location(value: &HeaderValue, from: &str, to: &str, host: &str) -> Option<HeaderValue> {
    let location = value.to_str().ok()?;
    if location.starts_with('/') && !location.starts_with("//") {
        return HeaderValue::from_str(&moved(location, from, to)?).ok();
    }
    // An absolute address of our own public host, as an upstream makes it from X-Forwarded-Host.
    let (scheme, rest) =
        location.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"))?;
    let path = rest.strip_prefix(host)?;
    let is_moved = !to.is_empty() && without(path, to).is_some_and(|rest| rest.starts_with('/'));
    if !(path.is_empty() || path.starts_with(['/', '?', '#'])) || is_moved {
        return None;
    }
    let rest = without(path, from)?;
    HeaderValue::from_str(&format!("{scheme}://{host}{to}{rest}")).ok()
}

/// `5; url=/next`: only an absolute path is moved; an address of the upstream's own is public already.
fn move_refresh(value: &HeaderValue, from: &str, to: &str) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    let (before, url) = text.split_at(text.find('/')?);
    let is_whole = before.trim_end_matches(['\'', '"']).trim_end().ends_with(['=', ';', ',']);
    if !is_whole || url.starts_with("//") {
        return None;
    }
    HeaderValue::from_str(&format!("{before}{}", moved(url, from, to)?)).ok()
}

fn move_cookie(value: &HeaderValue, from: &str, to: &str) -> Option<HeaderValue> {
    let bytes = value.as_bytes();
    // Browsers take a cookie of such a name with Path=/ only, in whatever case it is written (RFC 6265bis §4.1.3.2).
    if bytes.get(..7).is_some_and(|name| name.eq_ignore_ascii_case(b"__Host-")) {
        return None;
    }
    let mut cookie = Vec::with_capacity(bytes.len() + to.len());
    let mut changed = false;
    for (index, part) in bytes.split(|&b| b == b';').enumerate() {
        if index > 0 {
            cookie.push(b';');
        }
        let attribute = part.trim_ascii_start();
        let is_path = index > 0 && attribute.len() > 5 && attribute[..5].eq_ignore_ascii_case(b"path=");
        let path = attribute.get(5..).filter(|path| is_path && path.starts_with(b"/"));
        let path = path.and_then(|path| std::str::from_utf8(path.trim_ascii_end()).ok());
        let new = path.and_then(|path| match (path, to) {
            // "/" alone would become "/web/", which does not cover "/web".
            ("/", "") => None,
            ("/", to) => Some(to.to_owned()),
            (path, to) => moved(path, from, to),
        });
        match new {
            Some(new) => {
                let space = part.len() - attribute.len();
                cookie.extend_from_slice(&part[..space + 5]);
                cookie.extend_from_slice(new.as_bytes());
                changed = true;
            }
            None => cookie.extend_from_slice(part),
        }
    }
    changed.then(|| HeaderValue::from_bytes(&cookie).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use http::header;

    use super::*;

    fn moved(name: http::HeaderName, value: &str, from: &str, to: &str) -> String {
        let mut headers: Headers =
            [(name.clone(), HeaderValue::from_str(value).unwrap())].into_iter().collect();
        move_fields(&mut headers, from, to, "pub:8080");
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
}
