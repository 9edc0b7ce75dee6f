//! Patterns of paths: where a rule makes an exception, or where it holds.
//!
//! What a server makes of a path is its own business: some decode twice, some take `\` for `/`, some know no
//! case. So a pattern is read in two ways, each of which errs on the safe side.

use std::{borrow::Cow, fmt, str::FromStr};

use percent_encoding::percent_decode_str;

/// How often a path is decoded before nothing may be left to decode.
pub(super) const MOST_DECODINGS: usize = 4;

/// More readings of one path than this, or longer ones together, are not looked at.
const MOST_READINGS: usize = 128;
const MOST_BYTES: usize = 512 * 1024;

/// One path such as `/healthz`, or all that is below one: `/webhooks/*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    /// Without the star; ends with `/` exactly where there was one.
    path: String,
    below: bool,
}

impl FromStr for PathPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, below) = match text.strip_suffix('*') {
            Some(path) => (path, true),
            None => (text, false),
        };
        let segments = || path.split('/').skip(1);
        let is_path = path.starts_with('/')
            && !path.contains(['*', '?', '#', '\\', '%', ';'])
            && !path.contains("//")
            && path.chars().all(|c| !c.is_control() && c != ' ')
            && segments().all(|segment| segment != "." && segment != "..")
            && (!below || path.ends_with('/'));
        if !is_path {
            return Err(format!(
                "{text:?} is no path: write it as \"/healthz\", or \"/webhooks/*\" for all below; without escapes"
            ));
        }
        Ok(Self { path: path.to_owned(), below })
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.path, if self.below { "*" } else { "" })
    }
}

impl PathPattern {
    /// Whether a request's path means this to every server: for what opens a door. A path that one of them
    /// could read otherwise (dot segments, doubled or escaped slashes, `;`) is none.
    #[must_use]
    pub fn surely_is(&self, path: &str) -> bool {
        plain(path)
            .is_some_and(|path| if self.below { path.starts_with(&self.path) } else { path == self.path })
    }

    /// Whether a request's path could mean this to some server: for what shuts a door. A path that is read in more
    /// ways than can be looked at could mean anything.
    #[must_use]
    pub fn could_be(&self, path: &str) -> bool {
        readings(path).is_none_or(|readings| readings.iter().any(|reading| self.may_be_read_as(reading)))
    }

    /// Whether a server that reads a path like this may take it for the pattern's: many know no case, some no
    /// difference that a slash at the end makes, and some take a format such as `.json` off the end.
    fn may_be_read_as(&self, reading: &str) -> bool {
        let reading = reading.to_lowercase();
        let own = self.path.to_lowercase();
        let Some(rest) = reading.trim_end_matches('/').strip_prefix(own.trim_end_matches('/')) else {
            return false;
        };
        rest.is_empty()
            || (rest.starts_with('.') && !rest.contains('/'))
            || (self.below && rest.starts_with('/'))
    }
}

/// The decoded path, if there is only one way to read it.
fn plain(path: &str) -> Option<Cow<'_, str>> {
    if path.contains(['\\', ';']) || path.contains("//") {
        return None;
    }
    let decoded = percent_decode_str(path).decode_utf8().ok()?;
    let slashes = |text: &str| text.bytes().filter(|&b| b == b'/').count();
    let is_plain = slashes(&decoded) == slashes(path)
        && !decoded.contains(['%', '\\', ';', '\u{fffd}'])
        && !decoded.chars().any(char::is_control)
        // With blanks around them, some take them for the same.
        && decoded.split('/').all(|segment| !matches!(segment.trim(), "." | ".."));
    is_plain.then_some(decoded)
}

/// What servers, and proxies before them, may make of a path: each takes some of the [`STEPS`], in an order of its
/// own. `None` where there are too many readings, where decoding comes to no end, or to no text.
fn readings(path: &str) -> Option<Vec<String>> {
    let mut whole = path.to_owned();
    for decodings in 0.. {
        let decoded = percent_decode_str(&whole).decode_utf8().ok()?.into_owned();
        if decoded == whole {
            break;
        }
        if decodings == MOST_DECODINGS {
            return None;
        }
        whole = decoded;
    }
    let mut readings = vec![path.to_owned()];
    let mut next = 0;
    while let Some(reading) = readings.get(next).cloned() {
        next += 1;
        let decoded = percent_decode_str(&reading).decode_utf8().ok()?.into_owned();
        for read in STEPS.iter().map(|step| step(&reading)).chain([decoded]) {
            if !readings.contains(&read) {
                readings.push(read);
            }
        }
        if readings.len() > MOST_READINGS.min(MOST_BYTES / path.len().max(1)) {
            return None;
        }
    }
    Some(readings)
}

/// What some servers do to a path besides decoding it. Each gives back what it would leave alone, so that they come to
/// an end.
const STEPS: [fn(&str) -> String; 8] = [
    slashes_for_backslashes,
    without_parameters,
    without_rest,
    without_blanks,
    without_dots_at_end,
    without_empty_segments,
    without_dot_segments,
    without_authority,
];

fn slashes_for_backslashes(path: &str) -> String {
    path.replace('\\', "/")
}

/// Without what follows a `;` in a segment.
fn without_parameters(path: &str) -> String {
    joined(path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()))
}

/// Without what a server takes for the query, or does not read any more.
fn without_rest(path: &str) -> String {
    path.split(|c: char| matches!(c, '?' | '#' | ' ') || c.is_control()).next().unwrap_or_default().to_owned()
}

/// Without control characters, and without blanks around a segment.
fn without_blanks(path: &str) -> String {
    let path: String = path.chars().filter(|c| !c.is_control()).collect();
    joined(path.split('/').map(str::trim))
}

/// Without dots and blanks at the end of a segment, as Windows names its files.
fn without_dots_at_end(path: &str) -> String {
    joined(path.split('/').map(|segment| match segment {
        "." | ".." => segment,
        name => name.trim_end_matches(|c: char| c == '.' || c.is_whitespace()),
    }))
}

fn without_empty_segments(path: &str) -> String {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let end = if path.ends_with('/') && !segments.is_empty() { "/" } else { "" };
    format!("/{}{end}", segments.join("/"))
}

/// Without `.` and `..` (RFC 3986 §5.2.4).
fn without_dot_segments(path: &str) -> String {
    if !path.split('/').any(|segment| matches!(segment, "." | "..")) {
        return path.to_owned();
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            name => kept.push(name),
        }
        // The slash before them stays.
        if matches!(segment, "." | "..") && segments.peek().is_none() {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

/// Without a host, where a path that begins with `//` is taken for a URL.
fn without_authority(path: &str) -> String {
    let rest = path.strip_prefix("//").and_then(|rest| rest.find('/').map(|slash| &rest[slash..]));
    rest.unwrap_or(path).to_owned()
}

fn joined<'a>(segments: impl Iterator<Item = &'a str>) -> String {
    segments.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> PathPattern {
        text.parse().unwrap()
    }

    #[test]
    fn an_exception_is_made_only_for_what_every_server_reads_alike() {
        let below = pattern("/webhooks/*");
        for path in [
            "/webhooks/",
            "/webhooks/x",
            "/webhooks/a/b.c",
            "/webhooks/%78",
            "/w%65bhooks/x",
            "/webhooks/a%20b",
        ] {
            assert!(below.surely_is(path), "{path}");
        }
        for path in [
            "/webhooks",
            "/webhooksx",
            "/webhooksx/",
            "/Webhooks/x",
            "/webhooks/../admin",
            "/webhooks/%2e%2e/admin",
            "/webhooks/.%2E/admin",
            "/webhooks/%252e%252e/admin",
            "/webhooks//x",
            "//webhooks/x",
            "/webhooks/..%2fadmin",
            "/webhooks/..%5cadmin",
            "/webhooks/..\\admin",
            "/webhooks/..;/admin",
            "/webhooks/;/../admin",
            "/webhooks%2fx",
            "/webhooks/./x",
            "/webhooks/%00",
            "/webhooks/%ff",
            "/webhooks/x/..",
            "/x/../webhooks/y",
            "*",
            "",
        ] {
            assert!(!below.surely_is(path), "{path}");
        }
        let one = pattern("/healthz");
        assert!(one.surely_is("/healthz") && one.surely_is("/health%7a"));
        for path in ["/healthz/", "/healthzz", "/", "/HEALTHZ", "/healthz/.", "/healthz;x"] {
            assert!(!one.surely_is(path), "{path}");
        }
        assert!(
            pattern("/*").surely_is("/")
                && pattern("/*").surely_is("/a/b")
                && !pattern("/*").surely_is("/a/..")
        );
    }

    #[test]
    fn a_rule_holds_for_whatever_some_server_reads_as_its_path() {
        for (of, paths) in [
            (
                "/webhooks/stripe",
                &[
                    "/webhooks/stripe",
                    "/webhooks/stripe/",
                    "/WebHooks/Stripe",
                    "//webhooks/stripe",
                    "/webhooks//stripe",
                    "/x/../webhooks/stripe",
                    "/webhooks/%73tripe",
                    "/webhooks%2fstripe",
                    "/webhooks%252fstripe",
                    "/webhooks;a/stripe;b",
                    "/.\\webhooks\\stripe",
                    "/%25%32%35%32%35%32%35%32%35%32%35%32%35",
                    "/%ff",
                ][..],
            ),
            (
                "/webhooks/stripe",
                &[
                    "/webhooks/stripe.json",
                    "/webhooks/stripe.",
                    "/webhooks/stripe%20",
                    "/webhooks/stripe%20HTTP/1.1",
                    "/webhooks/stripe%3fx",
                    "/webhooks/stripe%23x/y",
                    "/webhooks/stripe%00.png",
                    "/webhooks/stripe%0a",
                    "/web%00hooks./%20stripe",
                    "//example.com/webhooks/stripe",
                    "/x%2fy/../%2e%2e/webhooks/stripe",
                    "/a//../webhooks/stripe",
                ],
            ),
            ("/webhooks/*", &["/webhooks", "/webhooks/", "/webhooks/a/b", "/a/..;/webhooks/x"]),
            // A server that resolves nothing takes these for what is below.
            (
                "/webhooks/*",
                &[
                    "/webhooks/..",
                    "/webhooks/../x",
                    "/webhooks/%2e%2e/x",
                    "/webhooks/stripe/..;/..;/x",
                    "/webhooks/x%2f..%2f..%2f..",
                    "/webhooks/x%5c..%5c..",
                    "/webhooks%3fx",
                    "/webhooks%00",
                    "/webhooks./x",
                    "/webhooks%20/x",
                ],
            ),
            ("/*", &["/", "/a", "*"]),
        ] {
            for path in paths {
                assert!(pattern(of).could_be(path), "{path} could be {of}");
            }
        }
        for (of, path) in [
            ("/webhooks/stripe", "/webhooks/stripes"),
            ("/webhooks/stripe", "/webhooks"),
            ("/webhooks/*", "/webhooksx"),
            ("/webhooks/*", "/webhooks.d/x"),
            ("/webhooks/*", "/x/webhooks/y"),
            ("/webhooks/*", "/x/../y"),
            ("/webhooks/*", "/x%2Fy;z=1/a%20b/c%3Fd."),
            ("/webhooks/stripe", "/webhooks/stripe/x"),
            ("/webhooks/stripe", "/webhooks/stripe.d/x"),
        ] {
            assert!(!pattern(of).could_be(path), "{path} is not {of}");
        }
    }

    fn decoded(path: &str) -> String {
        percent_decode_str(path).decode_utf8_lossy().into_owned()
    }

    /// As nginx makes a path short: no empty segment, no dots.
    fn short(path: &str) -> String {
        let mut kept = Vec::new();
        for segment in path.split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(kept.pop()),
                name => kept.push(name),
            }
        }
        format!("/{}", kept.join("/"))
    }

    fn before<'a>(path: &'a str, ends: &[char]) -> &'a str {
        &path[..path.find(ends).unwrap_or(path.len())]
    }

    /// What a path is to servers of many kinds.
    fn servers(path: &str) -> Vec<(&'static str, String)> {
        let of_segments = |path: &str, of: fn(&str) -> &str| -> String {
            path.split('/').map(of).collect::<Vec<_>>().join("/")
        };
        let parameters = |path: &str| of_segments(path, |segment| before(segment, &[';']));
        let windows = |path: &str| {
            short(&of_segments(&decoded(path).replace('\\', "/"), |name| match name {
                "." | ".." => name,
                name => name.trim_end_matches(['.', ' ']),
            }))
        };
        vec![
            ("resolves nothing", path.to_owned()),
            ("resolves before it decodes", decoded(&short(path))),
            ("decodes and resolves nothing", decoded(path)),
            ("decodes, then resolves", short(&decoded(path))),
            ("behind a proxy that resolved it", short(&decoded(&short(&decoded(path))))),
            ("decodes twice and resolves nothing", decoded(&decoded(path))),
            ("knows parameters", short(&decoded(&parameters(path)))),
            ("knows parameters behind a proxy", short(&parameters(&decoded(path)))),
            ("knows parameters and resolves nothing", decoded(&parameters(path))),
            ("a folder of Windows", windows(path)),
            ("a folder of Windows behind a proxy", windows(&short(&decoded(path)))),
            ("ends at NUL", short(before(&decoded(path), &['\0']))),
            ("parses it again as a URL", short(before(&decoded(path), &['?', '#']))),
            ("does so and resolves nothing", before(&decoded(path), &['?', '#']).to_owned()),
        ]
    }

    #[test]
    fn no_server_takes_a_path_for_one_of_the_rule_that_the_rule_does_not_hold_for() {
        const PARTS: [&str; 18] = [
            "/a", "/x", "/..", "/.", "/", "/%2e%2e", "/..;", "\\", "%2f", "%5c", "..", ".", ";b", "%3f",
            "%23", "%00", "%20", "%252f",
        ];
        let (below, one) = (pattern("/a/*"), pattern("/a/x"));
        let mut known = 0;
        for first in ["/a", "/x", "/%61", "//"] {
            for index in 0..PARTS.len().pow(3) {
                let part = |place: u32| PARTS[index / PARTS.len().pow(place) % PARTS.len()];
                let path = [first, part(0), part(1), part(2)].concat();
                let readings = servers(&path);
                let reads_it = |is: fn(&str) -> bool| {
                    readings.iter().find(|(_, read)| is(read.strip_suffix('/').unwrap_or(read)))
                };
                if let Some((server, _)) = reads_it(|read| read == "/a" || read.starts_with("/a/")) {
                    assert!(below.could_be(&path), "{path}: {server}");
                    known += 1;
                }
                if let Some((server, _)) = reads_it(|read| read == "/a/x") {
                    assert!(one.could_be(&path), "{path}: {server}");
                }
            }
        }
        assert!(known > 8000, "{known}");
    }

    #[test]
    fn what_is_read_in_too_many_ways_could_be_anything() {
        let path = "/%25%32%35%32%35%32%35".to_owned() + &"/%2e%2e;x%5c%20.%00//..".repeat(8);
        assert!(readings(&path).is_none() && pattern("/webhooks/*").could_be(&path));
        for path in ["/", "/a/b/c.html", "/a%20b/c;v=1/d%2Fe/%c3%a4.", "/a//b/../c%3Fd"] {
            assert!(readings(path).is_some(), "{path}");
        }
        let (plain, long) =
            (format!("/{}", "a".repeat(32 * 1024)), format!("/{}", "%2e/;a/%20".repeat(3 * 1024)));
        assert!(readings(&plain).is_some() && readings(&long).is_none());
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in
            ["", "*", "x", "/a*", "/a/*/b", "/a?b", "/a/../b", "/a//b", "/a%2f", "/a b", "/a;b", "/**"]
        {
            assert!(text.parse::<PathPattern>().unwrap_err().contains("/webhooks/*"), "{text}");
        }
        assert_eq!(pattern("/a/*").to_string(), "/a/*");
    }

    proptest! {
        // The two readings never disagree: where a door is surely open, it could be.
        #[test]
        fn what_surely_is_could_be(path in "/[a-c%2eEfF5;./\\\\]{0,12}", below in any::<bool>()) {
            let pattern = pattern(if below { "/a/*" } else { "/a/b" });
            prop_assert!(!pattern.surely_is(&path) || pattern.could_be(&path));
        }

        // However a server resolves it, nothing outside is reached by what surely is inside.
        #[test]
        fn what_surely_is_inside_stays_inside(path in "/a/([a-c2eEfF5;./\\\\ ?#]|%2[0ef]|%25|%5c|%0[09]){0,8}") {
            if pattern("/a/*").surely_is(&path) {
                for reading in readings(&path).unwrap() {
                    prop_assert!(reading == "/a" || reading.starts_with("/a/"), "{}", reading);
                }
                prop_assert!(!path.split('/').any(|segment| segment == ".."));
            }
        }

        #[test]
        fn a_pattern_never_covers_the_beginning_of_a_segment(tail in "[a-z0-9_-]{1,8}") {
            let path = format!("/api{}", tail);
            prop_assert!(!pattern("/api/*").surely_is(&path));
            prop_assert!(!pattern("/api/*").could_be(&path) && !pattern("/api").could_be(&path));
        }
    }
}
