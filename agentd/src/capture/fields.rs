//! The fields of a head in one piece of memory.

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

/// Fields in the order in which they passed, repetitions included. A clone shares the memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fields(Bytes);

/// What stands before each field: the lengths of its name and of its value.
const PREFIX: usize = 8;

impl Fields {
    /// None.
    pub(crate) const NONE: Self = Self(Bytes::new());

    /// Copies fields.
    pub(crate) fn copy<'a>(fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>) -> Self {
        Self::from_pairs(fields.map(|(name, value)| (name.as_str(), value.as_bytes())))
    }

    /// Copies pairs of a name and a value.
    pub(crate) fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut packed = Vec::with_capacity(1024);
        for (name, value) in pairs {
            // A head is far below 4 GiB (`limits::HEAD_BYTES`), what is imported as well.
            packed.extend_from_slice(&(name.len() as u32).to_ne_bytes());
            packed.extend_from_slice(&(value.len() as u32).to_ne_bytes());
            packed.extend_from_slice(name.as_bytes());
            packed.extend_from_slice(value);
        }
        // Copied, not shrunk: that would leave a hole behind each.
        Self(Bytes::copy_from_slice(&packed))
    }

    /// The fields in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (prefix, behind) = rest.split_at_checked(PREFIX)?;
            let len = |at: usize| u32::from_ne_bytes(prefix[at..at + 4].try_into().unwrap_or_default());
            let (name, behind) = behind.split_at_checked(len(0) as usize)?;
            let (value, behind) = behind.split_at_checked(len(4) as usize)?;
            rest = behind;
            Some((std::str::from_utf8(name).ok()?, value))
        })
    }

    /// The first value of `name`, whatever the case of either.
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The first value of `name` if it is UTF-8.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// How much memory they take.
    pub(crate) const fn weight(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_out_as_they_went_in() {
        let pairs: [(&str, &[u8]); 5] =
            [("b", b"1"), ("a", b""), ("b", b"2"), ("obs", b"\xe4\xff"), ("X-Case", b"C")];
        let fields = Fields::from_pairs(pairs.into_iter());
        assert!(fields.iter().eq(pairs));
        assert_eq!((fields.get("B"), fields.text("x-case")), (Some(&b"1"[..]), Some("C")));
        assert_eq!((fields.text("obs"), fields.get("none")), (None, None));
        assert!(Fields::default().iter().next().is_none());
        assert_eq!(fields.weight(), 5 * PREFIX + 1 + 1 + 1 + 1 + 1 + 3 + 2 + 6 + 1);
    }
}
