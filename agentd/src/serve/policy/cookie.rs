//! Sealed texts and the cookies that carry them.
//!
//! A sealed text can be neither read nor changed by whoever holds it, and opens only for the purpose it was made
//! for (AES-256-GCM; the purpose is the additional data). Cookies have the `__Host-` prefix: browsers take them
//! only from the very host, over TLS, so that no other tunnel of the domain can plant or read one.

use std::sync::LazyLock;

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey},
    digest,
    error::Unspecified,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderValue, header};
use proto::header::Headers;
use serde::{Serialize, de::DeserializeOwned};

/// What the names of our cookies begin with.
pub(crate) const PREFIX: &str = "__Host-agentd-";

const NONCE_BYTES: usize = 12;

/// Browsers keep no longer cookie.
const MOST_BYTES: usize = 4096;

/// Seals and opens.
pub(crate) struct Sealer(RandomizedNonceKey);

impl Sealer {
    /// With a key that nobody else has and that ends with the process.
    pub(crate) fn of_process() -> Self {
        static KEY: LazyLock<[u8; 32]> = LazyLock::new(|| {
            let mut key = [0; 32];
            aws_lc_rs::rand::fill(&mut key)
                .expect("the system has randomness: TLS needs it no less than this");
            key
        });
        Self::from_key(&KEY)
    }

    /// With the key that a secret stands for.
    pub(crate) fn of(secret: &[u8]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"agentd session key\0");
        context.update(secret);
        let mut key = [0; 32];
        key.copy_from_slice(context.finish().as_ref());
        Self::from_key(&key)
    }

    fn from_key(key: &[u8; 32]) -> Self {
        Self(RandomizedNonceKey::new(&AES_256_GCM, key).expect("the key has the length of its kind"))
    }

    /// Seals for `purpose`.
    pub(crate) fn seal<T: Serialize>(&self, purpose: &str, content: &T) -> Result<String, Unspecified> {
        let mut bytes = serde_json::to_vec(content).map_err(|_| Unspecified)?;
        let nonce = self.0.seal_in_place_append_tag(Aad::from(purpose.as_bytes()), &mut bytes)?;
        let sealed = [&nonce.as_ref()[..], &bytes].concat();
        Ok(URL_SAFE_NO_PAD.encode(sealed))
    }

    /// Opens what was sealed for `purpose`.
    pub(crate) fn open<T: DeserializeOwned>(&self, purpose: &str, sealed: &str) -> Option<T> {
        if sealed.len() > MOST_BYTES {
            return None;
        }
        let mut bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_at_mut_checked(NONCE_BYTES)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let content = self.0.open_in_place(nonce, Aad::from(purpose.as_bytes()), sealed).ok()?;
        serde_json::from_slice(content).ok()
    }
}

/// The values of a cookie, in the order of the request. What others have put into the same field does not matter.
pub(crate) fn values<'a>(headers: &'a Headers, name: &'a str) -> impl Iterator<Item = &'a str> {
    let pairs = headers.get_all(header::COOKIE).flat_map(|field| field.as_bytes().split(|&b| b == b';'));
    pairs.filter_map(move |pair| {
        let value = pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        std::str::from_utf8(value).ok()
    })
}

/// Takes our cookies out of a request's field. `None` where nothing is left. What is not ours stays byte for byte.
pub(crate) fn without_own(field: &HeaderValue) -> Option<HeaderValue> {
    let is_own = |pair: &[u8]| pair.trim_ascii().starts_with(PREFIX.as_bytes());
    let bytes = field.as_bytes();
    if !bytes.split(|&b| b == b';').any(is_own) {
        return Some(field.clone());
    }
    let kept: Vec<&[u8]> = bytes.split(|&b| b == b';').filter(|pair| !is_own(pair)).collect();
    let kept = kept.join(&b';');
    let kept = kept.trim_ascii();
    if kept.is_empty() { None } else { HeaderValue::from_bytes(kept).ok() }
}

/// A field that sets a cookie for `seconds`, or takes it away with 0.
pub(crate) fn set(name: &str, value: &str, seconds: u64) -> Option<HeaderValue> {
    let text = format!("{name}={value}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=Lax");
    (name.len() + value.len() <= MOST_BYTES).then(|| HeaderValue::try_from(text).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_sealed_text_opens_for_its_purpose_and_its_key_only() {
        let sealer = Sealer::of_process();
        let sealed = sealer.seal("session web", &("ann", 7)).unwrap();
        assert_eq!(sealer.open::<(String, u8)>("session web", &sealed), Some(("ann".into(), 7)));
        assert_eq!(sealer.open::<(String, u8)>("session api", &sealed), None);
        assert_eq!(Sealer::of(b"another").open::<(String, u8)>("session web", &sealed), None);
        assert_ne!(sealed, sealer.seal("session web", &("ann", 7)).unwrap());
        let long = Sealer::of(b"a key that was written down somewhere");
        let sealed = long.seal("x", &1).unwrap();
        assert_eq!(Sealer::of(b"a key that was written down somewhere").open::<u8>("x", &sealed), Some(1));
        for text in ["", "AA", "!", &"A".repeat(MOST_BYTES + 1)] {
            assert_eq!(sealer.open::<u8>("x", text), None);
        }
    }

    #[test]
    fn only_our_cookies_are_taken_out() {
        for (field, kept) in [
            ("a=1; b=2", Some("a=1; b=2")),
            ("a=1; __Host-agentd-web=x; b=\"2\"", Some("a=1; b=\"2\"")),
            ("__Host-agentd-web=x; a=1", Some("a=1")),
            ("a=1;__Host-agentd-web=x", Some("a=1")),
            ("__Host-agentd-web=x; __Host-agentd-signin-web=y", None),
            ("a=__Host-agentd-web", Some("a=__Host-agentd-web")),
            ("__Host-other=1", Some("__Host-other=1")),
        ] {
            let kept = kept.map(HeaderValue::from_static);
            assert_eq!(without_own(&HeaderValue::from_static(field)), kept, "{field}");
        }
        let headers: Headers = [
            (header::COOKIE, HeaderValue::from_static("a=1; aa=2")),
            (header::COOKIE, HeaderValue::from_static("b=; a=3")),
        ]
        .into_iter()
        .collect();
        assert_eq!(values(&headers, "a").collect::<Vec<_>>(), ["1", "3"]);
        for app in ["user=zoë".as_bytes(), b"user=zo\xeb", b"\xa0", b"a=\xeb"] {
            let field = HeaderValue::from_bytes(&[app, b"; a=1; ", app].concat()).unwrap();
            let headers: Headers = [(header::COOKIE, field)].into_iter().collect();
            assert_eq!(values(&headers, "a").collect::<Vec<_>>(), ["1"]);
        }
        let cookie = set("__Host-agentd-web", "x", 60).unwrap();
        assert_eq!(cookie, "__Host-agentd-web=x; Path=/; Max-Age=60; Secure; HttpOnly; SameSite=Lax");
        assert!(set("n", &"v".repeat(MOST_BYTES), 1).is_none());
    }

    proptest! {
        #[test]
        fn any_changed_byte_of_a_sealed_text_opens_nothing(at in 0usize..1000, bit in 0u8..8) {
            let sealer = Sealer::of(b"key");
            let mut sealed = sealer.seal("x", &"content").unwrap().into_bytes();
            let at = at % sealed.len();
            sealed[at] ^= 1 << bit;
            if let Ok(changed) = String::from_utf8(sealed) {
                prop_assert_eq!(sealer.open::<String>("x", &changed), None);
            }
        }
    }
}
