//! Patterns of paths: where a rule makes an exception, or where it holds.
//!
//! What a server makes of a path is its own business: some decode twice, some take `\` for `/`, some know no
//! case. So a pattern is read in two ways, each of which errs on the safe side.

use std::{borrow::Cow, fmt, str::FromStr};

use percent_encoding::percent_decode_str;

/// How often a path is decoded before nothing may be left to decode.
const MOST_DECODINGS: usize = 4;

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

    /// Whether a request's path could mean this to some server: for what shuts a door.
    #[must_use]
    pub fn could_be(&self, path: &str) -> bool {
        let Some(path) = resolved(path) else { return true };
        let own = self.path.to_lowercase();
        let own = own.trim_end_matches('/');
        if self.below {
            path.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        } else {
            path == own
        }
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
        && decoded.split('/').all(|segment| segment != "." && segment != "..");
    is_plain.then_some(decoded)
}

/// The path as the most generous server would read it, without a slash at its end. `None` where decoding
/// comes to no end or to no text.
fn resolved(path: &str) -> Option<String> {
    let mut path = path.to_owned();
    for _ in 0..MOST_DECODINGS {
        let decoded = percent_decode_str(&path).decode_utf8().ok()?.into_owned();
        if decoded == path {
            let mut segments: Vec<&str> = Vec::new();
            for segment in path.split(['/', '\\']) {
                match segment.split(';').next().unwrap_or_default() {
                    "" | "." => {}
                    ".." => {
                        segments.pop();
                    }
                    name => segments.push(name),
                }
            }
            return Some(format!("/{}", segments.join("/")).to_lowercase().trim_end_matches('/').to_owned());
        }
        path = decoded;
    }
    None
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
            ("/webhooks/*", &["/webhooks", "/webhooks/", "/webhooks/a/b", "/a/..;/webhooks/x"]),
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
            ("/webhooks/*", "/webhooks/.."),
            ("/webhooks/stripe", "/webhooks/stripe/x"),
        ] {
            assert!(!pattern(of).could_be(path), "{path} is not {of}");
        }
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
        fn what_surely_is_inside_stays_inside(path in "/a/[a-c%2eEfF5;./\\\\]{0,12}") {
            if pattern("/a/*").surely_is(&path) {
                prop_assert!(resolved(&path).unwrap().starts_with("/a"));
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
