//! The one table of what can go wrong with a public request: the code on the wire, the HTTP status
//! the public client sees and the outcome the workflow ends with.

use std::fmt;

use http::StatusCode;
use serde::{Deserialize, Serialize};

macro_rules! error_codes {
    ($( $(#[$doc:meta])* $variant:ident, $wire:literal, $status:ident, $outcome:literal, $sentence:literal; )+) => {
        /// Why a public request was not answered by the upstream.
        ///
        /// The wire name is what `x-tunnel-error` says and what an agent's `failed` message carries;
        /// it never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $( $(#[$doc])* #[serde(rename = $wire)] $variant, )+
        }

        impl ErrorCode {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable name in `x-tunnel-error` and on the link.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $wire),+ }
            }

            /// The status that the public client sees.
            #[must_use]
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status),+ }
            }

            /// The `outcome` with which the workflow ends, where it is the workflow that finds out.
            #[must_use]
            pub const fn outcome(self) -> &'static str {
                match self { $(Self::$variant => $outcome),+ }
            }

            /// One fixed sentence for the public client. It names nothing of the inside.
            #[must_use]
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$variant => $sentence),+ }
            }

            /// The code for a workflow's `outcome`.
            #[must_use]
            pub fn from_outcome(outcome: &str) -> Option<Self> {
                match outcome { $($outcome => Some(Self::$variant),)+ _ => None }
            }

            /// The code with this wire name.
            #[must_use]
            pub fn from_wire(name: &str) -> Option<Self> {
                match name { $($wire => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

error_codes! {
    /// The request cannot be forwarded as it is: no tunnel named, or a target that no hop may repeat.
    BadRequest, "bad_request", BAD_REQUEST, "BadRequest",
        "This request cannot be forwarded as it is.";
    /// The request came past the configured front.
    FrontRefused, "front_refused", FORBIDDEN, "FrontRefused",
        "This address is not open to direct requests.";
    /// No owner has this name.
    NoSuchTunnel, "no_such_tunnel", NOT_FOUND, "NoSuchTunnel",
        "There is no tunnel with this name.";
    /// The request body is over the ceiling.
    RequestTooLarge, "request_too_large", PAYLOAD_TOO_LARGE, "RequestTooLarge",
        "The request body is over the limit of 4715520 bytes (4.5 MiB).";
    /// The request-target is over the ceiling.
    TargetTooLong, "target_too_long", URI_TOO_LONG, "TargetTooLong",
        "The request's target is over the limit of 32768 bytes.";
    /// The request head is over the ceiling.
    HeadTooLarge, "head_too_large", REQUEST_HEADER_FIELDS_TOO_LARGE, "HeadTooLarge",
        "The request's header fields are over the limit of 61440 bytes.";
    /// The tunnel serves as many requests as it may.
    TooManyRequests, "too_many_requests", TOO_MANY_REQUESTS, "TooManyRequests",
        "This tunnel is serving as many requests as it may. Try again in a moment.";
    /// The edge itself failed; nothing was wrong with request, agent or upstream.
    EdgeFailed, "edge_failed", INTERNAL_SERVER_ERROR, "EdgeFailed",
        "The tunnel's edge failed to handle this request.";
    /// WebSocket and other upgrades are not carried.
    UpgradeUnsupported, "upgrade_unsupported", NOT_IMPLEMENTED, "UpgradeUnsupported",
        "This tunnel does not carry protocol upgrades such as WebSocket.";
    /// The request has come back to the tunnel that it went through.
    LoopDetected, "loop_detected", LOOP_DETECTED, "LoopDetected",
        "This tunnel leads back to itself: its upstream is, or forwards to, its own public address.";
    /// The upstream refused the connection or could not be reached.
    UpstreamUnreachable, "upstream_unreachable", BAD_GATEWAY, "UpstreamUnreachable",
        "The agent is connected, but nothing answers at the upstream it forwards to.";
    /// The upstream closed or reset the connection before a whole head.
    UpstreamReset, "upstream_reset", BAD_GATEWAY, "UpstreamReset",
        "The upstream closed the connection before it had answered.";
    /// What the upstream sent is not HTTP, or over a limit.
    UpstreamInvalid, "upstream_invalid", BAD_GATEWAY, "UpstreamInvalid",
        "The upstream's answer is not valid HTTP.";
    /// The upstream's certificate was not accepted.
    UpstreamTls, "upstream_tls", BAD_GATEWAY, "UpstreamTls",
        "The agent could not agree on TLS with the upstream.";
    /// The upstream's health check fails; it was not called.
    UpstreamUnhealthy, "upstream_unhealthy", BAD_GATEWAY, "UpstreamUnhealthy",
        "The agent is connected, but the upstream it forwards to fails its health check.";
    /// The agent's connection died while the request was in flight.
    AgentLost, "agent_lost", BAD_GATEWAY, "AgentLost",
        "The agent's connection was lost before it had answered.";
    /// The agent sent something that the protocol does not allow.
    AgentInvalid, "agent_invalid", BAD_GATEWAY, "AgentInvalid",
        "The agent's answer was not valid.";
    /// The response is known to be longer than the front lets through. Nothing of it was sent.
    ResponseTooLarge, "response_too_large", BAD_GATEWAY, "ResponseTooLarge",
        "The response is over the 209715200 bytes (200 MiB) that one streamed answer may have here; ask for it in ranges.";
    /// The tunnel is known, but no agent serves it now.
    TunnelOffline, "tunnel_offline", SERVICE_UNAVAILABLE, "TunnelOffline",
        "This tunnel is known, but no agent is connected for it.";
    /// The edge is short of capacity (throttled, no mailbox); the request was not dispatched.
    EdgeBusy, "edge_busy", SERVICE_UNAVAILABLE, "EdgeBusy",
        "The tunnel's edge is busy. Try again in a moment.";
    /// The agent has no room for a delivery now; it is brought again. No public client sees it.
    AgentBusy, "agent_busy", SERVICE_UNAVAILABLE, "AgentBusy",
        "The agent has no room for this delivery at the moment.";
    /// The edge cancelled the request; the agent says so to end the exchange. No public client sees it.
    Cancelled, "cancelled", SERVICE_UNAVAILABLE, "Cancelled",
        "This request was cancelled.";
    /// The client's address is not one that may use the tunnel.
    AddressRefused, "address_refused", FORBIDDEN, "AddressRefused",
        "This tunnel is not open to your address.";
    /// No password was shown, or a wrong one.
    PasswordRequired, "password_required", UNAUTHORIZED, "PasswordRequired",
        "This tunnel wants a user name and a password.";
    /// No token was shown, or none that is believed.
    TokenRequired, "token_required", UNAUTHORIZED, "TokenRequired",
        "This tunnel wants a valid bearer token.";
    /// Nobody is signed in, and the request is no page that could lead to signing in.
    SignInRequired, "sign_in_required", UNAUTHORIZED, "SignInRequired",
        "This tunnel wants you to sign in: open it in a browser.";
    /// Signing in did not come to its end.
    SignInFailed, "sign_in_failed", BAD_REQUEST, "SignInFailed",
        "Signing in did not work, or took too long. Open the page again to begin anew.";
    /// Whoever signed in is not among those who may use the tunnel.
    VisitorRefused, "visitor_refused", FORBIDDEN, "VisitorRefused",
        "You are signed in, but not among those who may use this tunnel.";
    /// What is needed to know visitors cannot be had.
    SignInUnavailable, "sign_in_unavailable", SERVICE_UNAVAILABLE, "SignInUnavailable",
        "This tunnel cannot check who you are at the moment. Try again in a moment.";
    /// Too many wrong passwords from this address, or too many at once.
    TooManyGuesses, "too_many_guesses", TOO_MANY_REQUESTS, "TooManyGuesses",
        "Too many passwords were tried. Wait a little, then try again.";
    /// The signature of a webhook is missing or not right.
    WebhookRefused, "webhook_refused", UNAUTHORIZED, "WebhookRefused",
        "The signature of this webhook is missing, wrong, too old or was used before.";
    /// A signed body is longer than what is held to be checked.
    WebhookTooLarge, "webhook_too_large", PAYLOAD_TOO_LARGE, "WebhookTooLarge",
        "The body of this webhook is over the 1048576 bytes (1 MiB) that are held to check a signature.";
    /// A page of an origin that `cors` does not name asks whether it may, or acts for a visitor without asking.
    OriginRefused, "origin_refused", FORBIDDEN, "OriginRefused",
        "Pages of this origin may not use this tunnel.";
    /// No route takes the request, and the tunnel has no upstream for the rest.
    NoRoute, "no_route", NOT_FOUND, "NoRoute",
        "This tunnel leads nowhere at this address.";
    /// A folder of files has none of this name.
    NoSuchFile, "no_such_file", NOT_FOUND, "NoSuchFile",
        "There is no file at this address.";
    /// Files are read and not written.
    MethodRefused, "method_refused", METHOD_NOT_ALLOWED, "MethodRefused",
        "This address can be read only.";
    /// The body is over the tunnel's or the route's own limit.
    BodyTooLarge, "body_too_large", PAYLOAD_TOO_LARGE, "BodyTooLarge",
        "The request body is longer than this tunnel takes.";
    /// More requests than `rate_limit` lets through.
    RateLimited, "rate_limited", TOO_MANY_REQUESTS, "RateLimited",
        "Too many requests. Wait a little, then try again.";
    /// The upstream has failed again and again and is left alone for a while.
    CircuitOpen, "circuit_open", SERVICE_UNAVAILABLE, "CircuitOpen",
        "The upstream has failed several times and is left alone for a while. Try again in a moment.";
    /// The tunnel is closed for maintenance.
    Maintenance, "maintenance", SERVICE_UNAVAILABLE, "Maintenance",
        "This service is under maintenance. Try again later.";
    /// The upstream did not answer in time, or nobody knows what became of the request in time.
    UpstreamTimedOut, "upstream_timed_out", GATEWAY_TIMEOUT, "UpstreamTimedOut",
        "The upstream did not answer in time.";
}

/// The `outcome` of a run that ends with a reply from the agent.
pub const OUTCOME_REPLIED: &str = "Replied";

/// The outcome of a run whose request is to be kept and delivered later.
pub const OUTCOME_ACCEPTED: &str = "Accepted";

/// The outcome of a run that waits for no reply.
pub const OUTCOME_DISPATCHED: &str = "Dispatched";

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_code() {
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_wire(code.as_str()), Some(code));
            assert_eq!(ErrorCode::from_outcome(code.outcome()), Some(code));
            assert!(code.status().is_client_error() || code.status().is_server_error());
        }
    }

    #[test]
    fn the_guide_has_every_code_and_no_other() {
        let guide = include_str!("../../docs/troubleshooting.md");
        let rows: Vec<(&str, &str)> = guide
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
            .filter_map(|(code, rest)| Some((code, rest.split_once(" |")?.0)))
            .filter(|(_, status)| status.parse::<u16>().is_ok())
            .collect();
        let codes: Vec<_> = rows.iter().map(|(code, _)| ErrorCode::from_wire(code)).collect();
        let expected: Vec<_> = ErrorCode::ALL.iter().map(|&code| Some(code)).collect();
        assert_eq!(codes, expected, "docs/troubleshooting.md, in the order of the table");
        for (&code, (_, status)) in ErrorCode::ALL.iter().zip(rows) {
            assert_eq!(code.status().as_str(), status, "{code}");
        }
    }

    #[test]
    fn the_sentences_name_the_real_limits() {
        let limit = crate::limits::REQUEST_BODY_BYTES.to_string();
        assert!(ErrorCode::RequestTooLarge.sentence().contains(&limit), "{limit}");
        let limit = crate::limits::RESPONSE_BYTES.to_string();
        assert!(ErrorCode::ResponseTooLarge.sentence().contains(&limit), "{limit}");
        let limit = crate::limits::HEAD_BYTES.to_string();
        assert!(ErrorCode::HeadTooLarge.sentence().contains(&limit), "{limit}");
    }
}
