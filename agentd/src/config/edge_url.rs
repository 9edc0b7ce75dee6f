//! The address of the edge, checked once.

use std::{fmt, str::FromStr};

/// A `ws://` or `wss://` address without credentials or query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeUrl {
    secure: bool,
    host: Box<str>,
    port: u16,
    authority: Box<str>,
    path: Box<str>,
}

/// Why a text is not the address of an edge.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EdgeUrlError {
    /// Not a URL.
    #[error("edge url {0:?} is not of the form wss://host/path")]
    Form(String),
    /// A scheme other than `ws` and `wss`.
    #[error("edge url {0:?} begins with neither wss:// nor ws://")]
    Scheme(String),
    /// Credentials or a query, which would end in logs.
    #[error("edge url must hold no user name and no query: the token belongs in a file")]
    Secret,
}

impl EdgeUrl {
    /// Whether TLS is spoken.
    #[must_use]
    pub const fn is_secure(&self) -> bool {
        self.secure
    }

    /// The host to dial; IPv6 without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port to dial.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// What the `host` field says.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Whether the address is on this machine, where nobody listens in.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost")
            || self.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for EdgeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "wss" } else { "ws" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

impl FromStr for EdgeUrl {
    type Err = EdgeUrlError;

    fn from_str(text: &str) -> Result<Self, EdgeUrlError> {
        if text.contains(['@', '?', '#']) {
            return Err(EdgeUrlError::Secret);
        }
        let shown = || text.chars().take(200).collect::<String>();
        let uri: http::Uri = text.parse().map_err(|_| EdgeUrlError::Form(shown()))?;
        let secure = match uri.scheme_str() {
            // In any case (RFC 3986 §3.1).
            Some(scheme) if scheme.eq_ignore_ascii_case("wss") => true,
            Some(scheme) if scheme.eq_ignore_ascii_case("ws") => false,
            Some(_) => return Err(EdgeUrlError::Scheme(shown())),
            None => return Err(EdgeUrlError::Form(shown())),
        };
        let authority = uri.authority().ok_or_else(|| EdgeUrlError::Form(shown()))?;
        let host = authority.host();
        if host.is_empty() {
            return Err(EdgeUrlError::Form(shown()));
        }
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Ok(Self {
            secure,
            host: host.into(),
            port,
            authority: authority.as_str().into(),
            path: if uri.path().is_empty() { "/" } else { uri.path() }.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_websocket_addresses_only_and_no_secret() {
        let url: EdgeUrl = "wss://abc.execute-api.eu-central-1.amazonaws.com/dev".parse().unwrap();
        assert!(url.is_secure() && url.port() == 443 && !url.is_loopback());
        assert_eq!(url.to_string(), "wss://abc.execute-api.eu-central-1.amazonaws.com/dev");
        let url: EdgeUrl = "ws://[::1]:8081".parse().unwrap();
        assert_eq!((url.host(), url.port(), url.to_string().as_str()), ("::1", 8081, "ws://[::1]:8081/"));
        assert!(url.is_loopback());
        let url: EdgeUrl = "WSS://Edge.Example.COM/Dev".parse().unwrap();
        assert!(url.is_secure() && url.port() == 443);
        assert_eq!(url.to_string(), "wss://Edge.Example.COM/Dev");
        let url: EdgeUrl = "Ws://LOCALHOST:8081".parse().unwrap();
        assert!(!url.is_secure() && url.is_loopback());
        for bad in ["", "abc", "/x", "wss://", "a:80"] {
            assert!(
                matches!(bad.parse::<EdgeUrl>(), Err(EdgeUrlError::Form(_) | EdgeUrlError::Scheme(_))),
                "{bad}"
            );
        }
        assert!(matches!("https://a".parse::<EdgeUrl>(), Err(EdgeUrlError::Scheme(_))));
        for bad in ["wss://u:p@a", "wss://a/?token=x"] {
            assert_eq!(bad.parse::<EdgeUrl>(), Err(EdgeUrlError::Secret));
        }
    }
}
