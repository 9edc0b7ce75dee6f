//! Names of things. Every id is a newtype whose `FromStr` checks it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

/// Why a string is not the id it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// A tunnel name breaks the rule for DNS labels.
    #[error(
        "tunnel name {0:?} is not a DNS label: use 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or digit"
    )]
    NotALabel(String),
    /// A tunnel name that nobody may have.
    #[error("tunnel name {0:?} is reserved")]
    Reserved(String),
    /// Any other id with a wrong length or alphabet.
    #[error("not a valid {0}")]
    Malformed(&'static str),
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Box<str>);

        impl $name {
            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let check: fn(&str) -> Result<(), IdError> = $check;
                check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

string_id!(
    /// The name of a tunnel: one DNS label in lower case, and not a reserved one.
    TunnelName,
    check_tunnel_name
);
string_id!(
    /// The name API Gateway gave to one WebSocket connection: 1 to 128 of `A-Z a-z 0-9 = _ - + /`.
    ConnectionId,
    |text| check_alphabet(text, 128, "connection id", |b| b.is_ascii_alphanumeric() || b"=_-+/".contains(&b))
);
string_id!(
    /// The name of one public request, chosen by `ingress`: 32 hexadecimal digits (128 random bits).
    ///
    /// It is also the execution name of the run and the value of `x-tunnel-request-id`.
    RequestId,
    |text| {
        check_alphabet(text, 32, "request id", |b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))?;
        if text.len() == 32 { Ok(()) } else { Err(IdError::Malformed("request id")) }
    }
);
string_id!(
    /// The name of one durable delivery: 32 hexadecimal digits, 12 for the milliseconds since 1970 and 20 random, so
    /// that names sort by time.
    ///
    /// It is also the execution name of its first run.
    DeliveryId,
    |text| {
        check_alphabet(text, 32, "delivery id", |b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))?;
        if text.len() == 32 { Ok(()) } else { Err(IdError::Malformed("delivery id")) }
    }
);
string_id!(
    /// The part of a mailbox's queue name that tells it from the others: 1 to 40 of `a-z 0-9 -`.
    MailboxId,
    |text| check_alphabet(text, 40, "mailbox id", |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
);
string_id!(
    /// The name of one agent process, chosen by it at start: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    AgentId,
    |text| check_alphabet(text, 64, "agent id", |b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
);
string_id!(
    /// Who owns tunnels: the subject of a token. 1 to 128 printable ASCII characters.
    Owner,
    |text| check_alphabet(text, 128, "owner", |b| b.is_ascii_graphic())
);

impl RequestId {
    /// Makes an id of 16 random bytes.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(hex(bytes))
    }
}

impl DeliveryId {
    /// Makes an id of the time, in milliseconds since 1970, and 10 random bytes.
    #[must_use]
    pub fn new(received_ms: u64, random: [u8; 10]) -> Self {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&received_ms.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&random);
        Self(hex(bytes))
    }

    /// The time in the name, in milliseconds since 1970.
    #[must_use]
    pub fn received_ms(&self) -> u64 {
        u64::from_str_radix(&self.0[..12], 16).unwrap_or_default()
    }
}

fn hex(bytes: [u8; 16]) -> Box<str> {
    let digit = |nibble| char::from_digit(u32::from(nibble), 16).expect("a nibble is a hex digit");
    bytes.into_iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect::<String>().into()
}

fn check_alphabet(
    text: &str,
    max: usize,
    what: &'static str,
    allowed: fn(u8) -> bool,
) -> Result<(), IdError> {
    if !text.is_empty() && text.len() <= max && text.bytes().all(allowed) {
        Ok(())
    } else {
        Err(IdError::Malformed(what))
    }
}

/// Names that would be mistaken for something of the tunnel's own or of the domain's operator.
const RESERVED: &[&str] = &[
    "admin",
    "api",
    "app",
    "autoconfig",
    "autodiscover",
    "dashboard",
    "ftp",
    "imap",
    "localhost",
    "mail",
    "mta-sts",
    "ns",
    "ns1",
    "ns2",
    "pop",
    "root",
    "smtp",
    "status",
    "tunnel",
    "wpad",
    "ws",
    "www",
];

fn check_tunnel_name(text: &str) -> Result<(), IdError> {
    let bytes = text.as_bytes();
    let ends_alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let label = bytes.len() <= 63
        && bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && ends_alphanumeric(bytes.first())
        && ends_alphanumeric(bytes.last());
    // "_dmarc" and its kin (RFC 8552) belong to the domain; no label of ours can look like one.
    if text.starts_with('_') {
        return Err(IdError::Reserved(text.chars().take(64).collect()));
    }
    if !label {
        return Err(IdError::NotALabel(text.chars().take(64).collect()));
    }
    // "xn--" and its kin (RFC 5890, "??--") could be shown as another name than they are.
    if RESERVED.contains(&text) || bytes.get(2..4) == Some(b"--") {
        return Err(IdError::Reserved(text.into()));
    }
    Ok(())
}

/// Which tunnels a token may open: an exact name, `prefix-*`, or `*` for any.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelPattern {
    /// Exactly this name.
    Exact(TunnelName),
    /// Every name that begins with this prefix.
    Prefix(Box<str>),
}

impl TunnelPattern {
    /// Whether the pattern covers `name`.
    #[must_use]
    pub fn matches(&self, name: &TunnelName) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Prefix(prefix) => name.as_str().starts_with(&**prefix),
        }
    }
}

impl FromStr for TunnelPattern {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_suffix('*') {
            None => text.parse().map(Self::Exact),
            Some("") => Ok(Self::Prefix("".into())),
            Some(prefix) => {
                // "pr-*": what precedes the star must be able to begin a name, and end with '-' so that
                // a pattern never ends in the middle of a word.
                let stem = prefix.strip_suffix('-').ok_or_else(|| IdError::NotALabel(text.into()))?;
                check_tunnel_name(stem).or_else(|error| match error {
                    IdError::Reserved(_) => Ok(()),
                    other => Err(other),
                })?;
                Ok(Self::Prefix(prefix.into()))
            }
        }
    }
}

impl fmt::Display for TunnelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(f, "{name}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Several patterns, in the form in which the authorizer's context carries them: separated by commas.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TunnelPatterns(pub Vec<TunnelPattern>);

impl TunnelPatterns {
    /// Whether any of the patterns covers `name`.
    #[must_use]
    pub fn matches(&self, name: &TunnelName) -> bool {
        self.0.iter().any(|pattern| pattern.matches(name))
    }
}

impl FromStr for TunnelPatterns {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        text.split(',').filter(|part| !part.is_empty()).map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for TunnelPatterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, pattern) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            write!(f, "{pattern}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_names_are_dns_labels() {
        for good in ["a", "web", "pr-12", "0", &"a".repeat(63)] {
            assert!(good.parse::<TunnelName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "a b", "*", &"a".repeat(64)] {
            assert!(matches!(bad.parse::<TunnelName>(), Err(IdError::NotALabel(_))), "{bad}");
        }
        for reserved in ["www", "api", "admin", "_dmarc", "_", "_acme-challenge", "xn--bcher-kva", "ab--cd"] {
            assert!(matches!(reserved.parse::<TunnelName>(), Err(IdError::Reserved(_))), "{reserved}");
        }
        for near in ["www2", "my-api", "xn-bcher", "a--b"] {
            assert!(near.parse::<TunnelName>().is_ok(), "{near}");
        }
    }

    #[test]
    fn patterns_match_whole_words_only() {
        let pattern: TunnelPattern = "pr-*".parse().unwrap();
        assert!(pattern.matches(&"pr-1".parse().unwrap()));
        assert!(!pattern.matches(&"print".parse().unwrap()));
        assert!("pr*".parse::<TunnelPattern>().is_err());
        assert!("*".parse::<TunnelPattern>().unwrap().matches(&"anything".parse().unwrap()));
        let several: TunnelPatterns = "web,pr-*".parse().unwrap();
        assert_eq!(several.to_string(), "web,pr-*");
        assert!(several.matches(&"web".parse().unwrap()) && !several.matches(&"web2".parse().unwrap()));
        assert!(!TunnelPatterns::default().matches(&"web".parse().unwrap()));
    }

    #[test]
    fn request_ids_are_32_hex_digits() {
        let id = RequestId::from_random([0xab; 16]);
        assert_eq!(id.as_str(), "ab".repeat(16));
        assert_eq!(id.as_str().parse::<RequestId>().unwrap(), id);
        for bad in ["", "ab", &"AB".repeat(16), &"ab".repeat(17)] {
            assert!(bad.parse::<RequestId>().is_err(), "{bad}");
        }
    }
}
