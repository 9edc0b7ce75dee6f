//! Which fields are hidden when a request is shown or exported.

/// Fields that prove who somebody is.
const ALWAYS: [&str; 6] =
    ["authorization", "cookie", "proxy-authorization", "set-cookie", "x-amz-security-token", "x-api-key"];

/// What a name has in it when its value is a secret, most often.
const SUSPICIOUS: [&str; 6] = ["api-key", "apikey", "password", "secret", "session", "token"];

/// What stands for a hidden value in an export.
pub(crate) const MASK: &str = "***";

/// The names of fields whose values are hidden.
#[derive(Debug, Clone, Default)]
pub(crate) struct Redact {
    more: Vec<String>,
}

impl Redact {
    /// Hides `more`, in lower case, beside those that always are.
    pub(crate) const fn new(more: Vec<String>) -> Self {
        Self { more }
    }

    /// Whether the value of a field is hidden.
    pub(crate) fn hides(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        ALWAYS.contains(&&*name)
            || SUSPICIOUS.iter().any(|part| name.contains(part))
            || self.more.contains(&name)
    }

    /// The names, and parts of names.
    pub(crate) fn names(&self) -> Vec<String> {
        let parts = SUSPICIOUS.iter().map(|part| format!("*{part}*"));
        ALWAYS.iter().map(|&name| name.to_owned()).chain(parts).chain(self.more.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proves_an_identity_is_hidden() {
        let redact = Redact::new(vec!["x-plain".to_owned()]);
        for name in [
            "authorization",
            "Authorization",
            "cookie",
            "set-cookie",
            "x-api-key",
            "my-api-key",
            "x-gitlab-token",
            "x-auth-token",
            "x-shared-secret",
            "x-plain",
        ] {
            assert!(redact.hides(name), "{name}");
        }
        for name in ["host", "content-type", "stripe-signature", "webhook-signature", "etag", "x-other"] {
            assert!(!redact.hides(name), "{name}");
        }
        assert!(!Redact::default().hides("x-plain"));
    }
}
