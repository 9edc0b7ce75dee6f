//! The request-target of a public request: carried byte for byte, or refused.

use std::{borrow::Cow, fmt};

use http::uri::PathAndQuery;
use serde::{Deserialize, Deserializer, Serialize};

/// The most bytes of a request-target.
///
/// RFC 9110 §4.1 asks for at least 8,000; the fronts allow about as much as a whole head.
pub const TARGET_BYTES: usize = 32 * 1024;

/// A request-target in origin-form (RFC 9112 §3.2.1), or `*`: exactly the bytes the public client sent.
///
/// It begins with `/`, holds no byte that could end a request line, and no `#`, which no HTTP
/// client can repeat. Nothing in it is ever decoded, joined or resolved.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Target(Box<str>);

/// Why a request-target cannot be carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Neither origin-form nor `*`.
    #[error("request-target does not begin with '/'")]
    NotOriginForm,
    /// A byte that is not allowed there.
    #[error("request-target contains a byte that HTTP does not allow there")]
    ForbiddenByte,
    /// Over [`TARGET_BYTES`].
    #[error("request-target is too long")]
    TooLong,
}

impl Target {
    /// Checks a request-target.
    ///
    /// # Errors
    ///
    /// [`TargetError`]: it is carried as it is or not at all.
    pub fn parse(text: &str) -> Result<Self, TargetError> {
        if text.len() > TARGET_BYTES {
            return Err(TargetError::TooLong);
        }
        if !text.starts_with('/') && text != "*" {
            return Err(TargetError::NotOriginForm);
        }
        // Exactly what the HTTP stack of the agent repeats as it is; it would cut a fragment off.
        let repeated = PathAndQuery::try_from(text).is_ok_and(|parsed| parsed.as_str() == text);
        if !text.is_ascii() || !repeated {
            return Err(TargetError::ForbiddenByte);
        }
        Ok(Self(text.into()))
    }

    /// The bytes, as they were sent.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path without the query, for logs.
    #[must_use]
    pub fn path(&self) -> &str {
        self.0.split('?').next().unwrap_or_default()
    }

    /// Takes the first path segment off: `/web/rest?q` becomes `web` and `/rest?q`, `/web` becomes
    /// `web` and `/`. `None` where there is no first segment.
    #[must_use]
    pub fn split_first_segment(&self) -> Option<(&str, Self)> {
        let rest = self.0.strip_prefix('/')?;
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (segment, rest) = rest.split_at(end);
        if segment.is_empty() {
            return None;
        }
        let rest = if rest.starts_with('/') { rest.into() } else { format!("/{rest}").into() };
        Some((segment, Self(rest)))
    }
}

impl fmt::Debug for Target {
    /// The path only: a query may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path())
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn odd_but_legal_targets_are_kept() {
        for target in [
            "/",
            "//",
            "//evil/",
            "/@evil/",
            "/a//b",
            "/%2F",
            "/%2e%2e/x",
            "/../x",
            "/a;b=c",
            "/a|b",
            "/a?",
            "/?",
            "/?a=1&a=2",
            "/%FF",
            "/a+b?c+d=%20",
            "/{x}",
            "/\"",
            "*",
            "/a?b?c",
            "/^~",
        ] {
            assert_eq!(Target::parse(target).unwrap().as_str(), target);
        }
    }

    #[test]
    fn what_no_hop_may_repeat_is_refused() {
        for target in
            ["", "a", "http://evil/", "/a b", "/a#b", "/\r\n", "/\0", "/ä", "/\x7f", "/<", "/`", "?a", "/?\""]
        {
            assert!(Target::parse(target).is_err(), "{target:?}");
        }
        let longest = format!("/{}", "a".repeat(TARGET_BYTES - 1));
        assert!(Target::parse(&longest).is_ok());
        assert_eq!(Target::parse(&format!("{longest}a")), Err(TargetError::TooLong));
    }

    #[test]
    fn path_mode_takes_one_segment_and_nothing_else() {
        let split = |text| {
            let target = Target::parse(text).unwrap();
            target.split_first_segment().map(|(name, rest)| (name.to_owned(), rest.as_str().to_owned()))
        };
        let some = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(split("/web"), some("web", "/"));
        assert_eq!(split("/web/"), some("web", "/"));
        assert_eq!(split("/web?a"), some("web", "/?a"));
        assert_eq!(split("/web//x/%2e?"), some("web", "//x/%2e?"));
        assert_eq!(split("/"), None);
        assert_eq!(split("//web"), None);
        assert_eq!(split("*"), None);
    }

    proptest! {
        /// Every accepted target goes through the HTTP stack unchanged.
        #[test]
        fn the_http_stack_repeats_every_accepted_target(text in "/[\\x00-\\x7f]{0,60}") {
            if let Ok(target) = Target::parse(&text) {
                let parsed = PathAndQuery::try_from(target.as_str()).unwrap();
                prop_assert_eq!(parsed.as_str(), target.as_str());
            }
        }
    }
}
