//! Which rule of a tunnel refused a request: what the access line and the metrics call `denied_by`.

use proto::error::ErrorCode;

/// A rule that refuses requests, by its key in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeniedBy {
    AllowIps,
    DenyIps,
    Maintenance,
    RateLimit,
    Route,
    Cors,
    BasicAuth,
    Bearer,
    Oidc,
    MaxBody,
    CircuitBreaker,
    Verify,
}

impl DeniedBy {
    /// Every one.
    pub(crate) const ALL: [Self; 12] = [
        Self::AllowIps,
        Self::DenyIps,
        Self::Maintenance,
        Self::RateLimit,
        Self::Route,
        Self::Cors,
        Self::BasicAuth,
        Self::Bearer,
        Self::Oidc,
        Self::MaxBody,
        Self::CircuitBreaker,
        Self::Verify,
    ];

    /// The key.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::AllowIps => "allow_ips",
            Self::DenyIps => "deny_ips",
            Self::Maintenance => "maintenance",
            Self::RateLimit => "rate_limit",
            Self::Route => "route",
            Self::Cors => "cors",
            Self::BasicAuth => "basic_auth",
            Self::Bearer => "bearer",
            Self::Oidc => "oidc",
            Self::MaxBody => "max_body",
            Self::CircuitBreaker => "circuit_breaker",
            Self::Verify => "verify",
        }
    }

    /// The rule that answers with a code, where there is but one.
    pub(crate) const fn of(code: ErrorCode) -> Option<Self> {
        Some(match code {
            ErrorCode::AddressRefused => Self::AllowIps,
            ErrorCode::Maintenance => Self::Maintenance,
            ErrorCode::RateLimited => Self::RateLimit,
            ErrorCode::BadRequest | ErrorCode::NoRoute => Self::Route,
            ErrorCode::OriginRefused => Self::Cors,
            ErrorCode::PasswordRequired | ErrorCode::TooManyGuesses => Self::BasicAuth,
            ErrorCode::TokenRequired => Self::Bearer,
            ErrorCode::SignInRequired | ErrorCode::SignInFailed | ErrorCode::VisitorRefused => Self::Oidc,
            ErrorCode::BodyTooLarge => Self::MaxBody,
            ErrorCode::CircuitOpen => Self::CircuitBreaker,
            ErrorCode::WebhookRefused | ErrorCode::WebhookTooLarge => Self::Verify,
            _ => return None,
        })
    }
}
