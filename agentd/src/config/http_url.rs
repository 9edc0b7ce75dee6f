//! Addresses of documents that decide who is let in: key sets and sign-in providers.

use std::{fmt, str::FromStr};

use super::address::{Address, Host, Scheme};

/// An absolute address over TLS, or of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUrl {
    text: Box<str>,
    address: Address,
    /// Where path and query begin in `text`; its end where there are none.
    target: usize,
}

impl HttpUrl {
    /// The address, exactly as it was written: an issuer's name is compared byte by byte.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whom to dial.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Path and query, as a request line has them.
    #[must_use]
    pub fn target(&self) -> &str {
        match &self.text[self.target..] {
            "" => "/",
            target => target,
        }
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for HttpUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown = || text.chars().take(200).collect::<String>();
        let wrong = || format!("{:?} is no address: write it as https://login.example.com/path", shown());
        let start = text.find("://").map(|at| at + 3).ok_or_else(wrong)?;
        let target = text[start..].find(['/', '?', '#']).map_or(text.len(), |at| start + at);
        let is_target = text[target..].bytes().all(|b| b.is_ascii_graphic() && b != b'#')
            && (text[target..].is_empty() || text[target..].starts_with('/'));
        let address: Address = text[..target].parse().map_err(|_| wrong())?;
        let Address::Tcp { host, scheme, .. } = &address else { return Err(wrong()) };
        if !is_target || text.len() > 2048 {
            return Err(wrong());
        }
        let is_here = match host {
            Host::Localhost => true,
            Host::Ip(ip) => ip.to_canonical().is_loopback(),
            Host::Name(name) => name.ends_with(".localhost"),
            Host::Zoned(..) => false,
        };
        if *scheme == Scheme::Http && !is_here {
            return Err(format!(
                "{:?} is not encrypted, and who is let in depends on it: use https://",
                shown()
            ));
        }
        Ok(Self { text: text.into(), address, target })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_kept_as_it_was_written() {
        for (text, target, address) in [
            ("https://login.example.com", "/", "https://login.example.com"),
            ("https://login.example.com/", "/", "https://login.example.com"),
            ("https://Login.example.com:8443/a/b?c=d", "/a/b?c=d", "https://login.example.com:8443"),
            ("http://127.0.0.1:9000/keys", "/keys", "http://127.0.0.1:9000"),
            ("http://[::1]:9000/keys", "/keys", "http://[::1]:9000"),
            ("http://localhost:9000", "/", "http://localhost:9000"),
        ] {
            let url: HttpUrl = text.parse().unwrap();
            assert_eq!((url.as_str(), url.target(), &*url.address().to_string()), (text, target, address));
        }
    }

    #[test]
    fn what_is_not_encrypted_or_no_address_is_refused() {
        for text in ["http://login.example.com", "http://10.0.0.1/", "http://localhost.example.com"] {
            assert!(text.parse::<HttpUrl>().unwrap_err().contains("use https://"), "{text}");
        }
        for text in [
            "",
            "login.example.com",
            "https://",
            "https://a/b#c",
            "https://a?b",
            "ftp://a",
            "unix:/x",
            "https://u@a/",
            "https://a/ b",
        ] {
            assert!(text.parse::<HttpUrl>().unwrap_err().contains("write it as"), "{text}");
        }
    }
}
