//! What it means that the edge refuses a tunnel or the token, and what somebody can do about it.

use proto::message::Refusal;

use crate::identity::{
    self,
    credential::{Token, TokenSource},
};

/// What somebody can do about a refusal.
pub(crate) const fn advice(reason: Refusal) -> &'static str {
    match reason {
        Refusal::InvalidName => "choose a name of a-z, 0-9 and '-'",
        Refusal::ReservedName => "the name is reserved: choose another",
        Refusal::NotAllowed => "the token does not cover this name: use another name or another token",
        Refusal::NameTaken => "the name belongs to somebody else: choose another",
        Refusal::TooMany => "too many tunnels for one agent: run a second agent for the rest",
        Refusal::TooManyConnections => {
            "as many agents are connected as the owner or the tunnel may have: it will be asked again"
        }
        Refusal::TooManyTunnels => {
            "as many tunnels are open as the owner may have: close another one; it will be asked again"
        }
        Refusal::TryAgain => "the edge could not open it now: it will be asked again",
        Refusal::OtherVersion => {
            "the edge speaks another version of the protocol: deploy the edge of this release, or run the agentd of the edge's; it will be asked again"
        }
        Refusal::Other => "the edge gave a reason this version does not know: update agentd",
    }
}

/// Whether a tunnel refused for this reason stays refused until somebody changes something.
pub(crate) const fn is_permanent(reason: Refusal) -> bool {
    match reason {
        Refusal::InvalidName | Refusal::ReservedName | Refusal::NotAllowed | Refusal::NameTaken => true,
        Refusal::TooMany
        | Refusal::TooManyConnections
        | Refusal::TooManyTunnels
        | Refusal::TryAgain
        | Refusal::OtherVersion
        | Refusal::Other => false,
    }
}

/// Whether asking again in a moment may help.
pub(crate) const fn is_passing(reason: Refusal) -> bool {
    matches!(
        reason,
        Refusal::TooManyConnections | Refusal::TooManyTunnels | Refusal::TryAgain | Refusal::OtherVersion
    )
}

/// What to do about a token that the edge refuses, as far as the token itself tells.
pub(crate) fn token_advice(source: &TokenSource, token: &Token) -> String {
    let place = source.place();
    match token.says().and_then(|says| says.exp) {
        Some(exp) if exp <= identity::now() => format!(
            "the token ended {}: get a new one (agentd token issue), put it into {place} and start again",
            identity::utc(exp)
        ),
        _ => format!(
            "the token may be revoked, or signed with a key that the edge does not know: agentd token show says what \
             it claims; put another one into {place} and start again"
        ),
    }
}
