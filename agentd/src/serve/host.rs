//! Which name an upstream is called by.

use http::HeaderValue;

/// What `host` says to the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostRule {
    /// As configured.
    Fixed(HeaderValue),
    /// What the public client asked for.
    Public,
}
