//! Where an upstream listens: what people write in a configuration, checked once.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
};

/// Where an upstream listens, and whether it speaks TLS there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// The host to dial.
        host: Host,
        /// The port to dial.
        port: u16,
        /// Whether TLS is spoken.
        scheme: Scheme,
    },
    /// A unix socket, spoken to without TLS.
    Unix(PathBuf),
}

/// Whether TLS is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS.
    Https,
}

impl Scheme {
    const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    /// The scheme's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// A host as it is dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// An address: no name is looked up.
    Ip(IpAddr),
    /// This machine's loopback, IPv4 first: development servers listen on either.
    Localhost,
    /// An IPv6 address and the zone it holds in: an interface's name, or its number (RFC 4007 §11).
    Zoned(Ipv6Addr, Box<str>),
    /// A name, looked up at each dial.
    Name(Box<str>),
}

impl Host {
    /// The addresses that need no lookup and no zone; empty for a name.
    #[must_use]
    pub fn literal(&self) -> &[IpAddr] {
        const LOOPBACK: &[IpAddr] = &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        match self {
            Self::Ip(ip) => std::slice::from_ref(ip),
            Self::Localhost => LOOPBACK,
            Self::Zoned(..) | Self::Name(_) => &[],
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(ip) => write!(f, "{ip}"),
            // A zone means something on this machine only.
            Self::Zoned(ip, _) => write!(f, "[{ip}]"),
            Self::Localhost => f.write_str("localhost"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Why a text is not an upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// None of the accepted forms.
    #[error("upstream {0:?} is none of 3000, host:port, http://host, https://host and unix:/path")]
    Form(String),
    /// A scheme that is not spoken.
    #[error("upstream {0:?} has a scheme other than http, https and unix")]
    Scheme(String),
    /// A path or query, which would be put before every request's own.
    #[error("upstream {0:?} has a path: name only the host and port, paths are carried as they come")]
    Path(String),
    /// A user name or password.
    #[error("upstream {0:?} has a user name: credentials do not belong here")]
    UserInfo(String),
    /// Not a port number.
    #[error("upstream {0:?} has no port between 1 and 65535")]
    Port(String),
    /// A unix socket without an absolute path.
    #[error("upstream {0:?} needs an absolute path: unix:/run/app.sock")]
    Socket(String),
    /// A unix socket's path that no address has room for.
    #[error("upstream {0:?} has a path over {SOCKET_PATH_BYTES} bytes, the most that a unix socket has")]
    SocketLength(String),
}

/// The most bytes of a unix socket's path: 108 with the zero behind it (unix(7)).
pub const SOCKET_PATH_BYTES: usize = 107;

impl Address {
    /// The `host[:port]` that names this upstream, without the scheme's own port.
    #[must_use]
    pub fn authority(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Tcp { host, port, scheme } if *port == scheme.default_port() => host.to_string(),
            Self::Tcp { host, port, .. } => format!("{host}:{port}"),
        }
    }

    /// What `host` says to this upstream: its authority, but a name of this machine is always said with a port.
    ///
    /// Servers that guard themselves against DNS rebinding let `localhost` in with any port, and some of them
    /// with no other spelling.
    #[must_use]
    pub fn host_field(&self) -> String {
        match self {
            Self::Unix(_) => "localhost:80".to_owned(),
            Self::Tcp { host: Host::Localhost, port, .. } => format!("localhost:{port}"),
            Self::Tcp { host: host @ Host::Ip(ip), port, .. } if ip.is_loopback() => format!("{host}:{port}"),
            Self::Tcp { .. } => self.authority(),
        }
    }

    /// Whether TLS is spoken.
    #[must_use]
    pub const fn scheme(&self) -> Scheme {
        match self {
            Self::Unix(_) => Scheme::Http,
            Self::Tcp { scheme, .. } => *scheme,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { scheme, .. } => write!(f, "{}://{}", scheme.as_str(), self.authority()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let shown = || text.chars().take(200).collect::<String>();
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
            if !path.is_absolute() || path.file_name().is_none() {
                return Err(AddressError::Socket(shown()));
            }
            return match path.as_os_str().len() {
                0..=SOCKET_PATH_BYTES => Ok(Self::Unix(path)),
                _ => Err(AddressError::SocketLength(shown())),
            };
        }
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            let port = parse_port(text).ok_or_else(|| AddressError::Port(shown()))?;
            return Ok(Self::Tcp { host: Host::Localhost, port, scheme: Scheme::Http });
        }
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (Some(Scheme::Http), rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (Some(Scheme::Https), rest),
            Some(_) => return Err(AddressError::Scheme(shown())),
            None => (None, text),
        };
        // A lone slash is how addresses are copied from a browser; it says nothing.
        let rest = if scheme.is_some() { rest.strip_suffix('/').unwrap_or(rest) } else { rest };
        if rest.contains(['/', '?', '#', '\\']) {
            return Err(AddressError::Path(shown()));
        }
        if rest.contains('@') {
            return Err(AddressError::UserInfo(shown()));
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) = bracketed.split_once(']').ok_or_else(|| AddressError::Form(shown()))?;
                // "%25" is how a URL writes it (RFC 6874), "%" how people do.
                let (ip, zone) = match host.split_once('%') {
                    Some((ip, zone)) => {
                        (ip, Some(zone.strip_prefix("25").filter(|zone| !zone.is_empty()).unwrap_or(zone)))
                    }
                    None => (host, None),
                };
                let ip: Ipv6Addr = ip.parse().map_err(|_| AddressError::Form(shown()))?;
                let host = match zone {
                    None => Host::Ip(ip.into()),
                    Some(zone) if is_zone(zone) => Host::Zoned(ip, zone.into()),
                    Some(_) => return Err(AddressError::Form(shown())),
                };
                let port = match after {
                    "" => None,
                    _ => Some(after.strip_prefix(':').ok_or_else(|| AddressError::Form(shown()))?),
                };
                (host, port)
            }
            None => match rest.split_once(':') {
                Some((host, port)) => {
                    (parse_host(host).ok_or_else(|| AddressError::Form(shown()))?, Some(port))
                }
                None => (parse_host(rest).ok_or_else(|| AddressError::Form(shown()))?, None),
            },
        };
        let port = match (port, scheme) {
            (Some(port), _) => parse_port(port).ok_or_else(|| AddressError::Port(shown()))?,
            (None, Some(scheme)) => scheme.default_port(),
            (None, None) => return Err(AddressError::Form(shown())),
        };
        Ok(Self::Tcp { host, port, scheme: scheme.unwrap_or(Scheme::Http) })
    }
}

fn parse_port(text: &str) -> Option<u16> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&port| port != 0)
}

/// Whether an interface can have this name: no more than 15 bytes of them (`IFNAMSIZ`), or whether it is a number.
fn is_zone(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@'))
}

fn parse_host(text: &str) -> Option<Host> {
    if let Ok(ip) = text.parse::<Ipv4Addr>() {
        return Some(Host::Ip(ip.into()));
    }
    let name = text.to_ascii_lowercase();
    let is_name = !name.is_empty()
        && name.len() <= 253
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    is_name.then(|| if name == "localhost" { Host::Localhost } else { Host::Name(name.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_accepted_form_names_one_address() {
        for (text, shown) in [
            ("3000", "http://localhost:3000"),
            ("127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("app:8080", "http://app:8080"),
            ("localhost:80", "http://localhost"),
            ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("http://127.0.0.1:3000/", "http://127.0.0.1:3000"),
            ("http://App.internal", "http://app.internal"),
            ("https://app.internal", "https://app.internal"),
            ("https://app.internal:80", "https://app.internal:80"),
            ("[::1]:3000", "http://[::1]:3000"),
            ("https://[fd00::1]", "https://[fd00::1]"),
            ("unix:/run/x.sock", "unix:/run/x.sock"),
            ("http://[fe80::1%eth0]:3000", "http://[fe80::1]:3000"),
            ("[fe80::1%25eth0]:3000", "http://[fe80::1]:3000"),
            ("[fe80::1%2]:80", "http://[fe80::1]"),
            ("app.internal.:80", "http://app.internal."),
            ("http://web.localhost:3000", "http://web.localhost:3000"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown, "{text}");
        }
    }

    #[test]
    fn a_name_of_this_machine_is_said_with_its_port() {
        for (text, host) in [
            ("unix:/run/x.sock", "localhost:80"),
            ("80", "localhost:80"),
            ("3000", "localhost:3000"),
            ("https://localhost", "localhost:443"),
            ("http://127.0.0.1", "127.0.0.1:80"),
            ("http://[::1]", "[::1]:80"),
            ("http://app.internal", "app.internal"),
            ("https://10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().host_field(), host, "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        let error = |text: &str| text.parse::<Address>().unwrap_err();
        assert!(matches!(error("http://a/b"), AddressError::Path(_)));
        assert!(matches!(error("http://a?b"), AddressError::Path(_)));
        assert!(matches!(error("http://u:p@a"), AddressError::UserInfo(_)));
        assert!(matches!(error("80@evil:90"), AddressError::UserInfo(_)));
        assert!(matches!(error("ftp://a"), AddressError::Scheme(_)));
        assert!(matches!(error("a"), AddressError::Form(_)));
        assert!(matches!(error(""), AddressError::Form(_)));
        assert!(matches!(error("a b:80"), AddressError::Form(_)));
        assert!(matches!(error("::1:80"), AddressError::Form(_)));
        assert!(matches!(error("[fe80::1%]:80"), AddressError::Form(_)));
        assert!(matches!(error("[fe80::1%a b]:80"), AddressError::Form(_)));
        assert!(matches!(error("[127.0.0.1%eth0]:80"), AddressError::Form(_)));
        for text in ["0", "65536", "a:0", "a:+80", "a:", "http://a:x"] {
            assert!(matches!(error(text), AddressError::Port(_)), "{text}");
        }
        let socket = |bytes: usize| format!("unix:/{}", "s".repeat(bytes - 1)).parse::<Address>();
        assert!(socket(SOCKET_PATH_BYTES).is_ok());
        assert!(matches!(socket(SOCKET_PATH_BYTES + 1), Err(AddressError::SocketLength(_))));
        for text in ["unix:", "unix:run/x", "unix:/"] {
            assert!(matches!(error(text), AddressError::Socket(_)), "{text}");
        }
    }
}
