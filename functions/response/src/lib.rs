//! Lambda `response`: takes an agent's message and returns it, by the task token it carries, to the
//! mailbox where somebody waits.
//!
//! It is the hot path of every answer, so it reads no table: what the connection may do came with the
//! event, from the authorizer. The message itself goes on as it is; `ingress` reads all of it. Here only the
//! tag and the token are looked at.
//!
//! A connection whose token has ended is closed with the next thing it says: a heartbeat at the latest. No
//! request has been dispatched to it since the end, and nothing it says is taken.
//!
//! Permissions it needs: send to mailboxes, close connections.

use std::process::ExitCode;

use edge::{
    Error,
    agent_link::AgentLink,
    aws::Aws,
    config::{ConfigError, Env},
    event::AgentEvent,
    function::Answer,
    mailbox::Mailboxes,
    metrics::{self, Counted},
    unix_now,
};
use proto::{
    error::ErrorCode,
    message::{AgentMessage, EdgeMessage, Envelope, Failed},
    token::{Claims, DeliveryClaims, TokenError, TokenKeys, Verified},
};

/// Everything a message needs.
#[derive(Debug)]
pub struct Response {
    keys: TokenKeys,
    mailboxes: Mailboxes,
    link: AgentLink,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Answer a sign of life.
    Beat(String),
    /// Return it to whoever waits.
    Return(Claims),
    /// Return it to the run of a delivery.
    Settle(Box<DeliveryClaims>),
    /// Close the connection: its identity has ended.
    Close,
    /// Drop it, for this reason.
    Drop(Refused),
}

/// Why a message goes nowhere. Nothing is written then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not a message, or not one for this function.
    #[error("it is not an answer to a request")]
    NotAnAnswer,
    /// The connection has no identity.
    #[error("the connection has no identity")]
    NoIdentity,
    /// The token is not ours, or no longer.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is for a tunnel that this connection may not serve.
    #[error("the connection may not serve the token's tunnel")]
    ForeignTunnel,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Response::from_env, |event, response| async move { handle(event, &response).await })
}

impl Response {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        Ok(Self {
            keys: env.token_keys()?,
            mailboxes: Mailboxes::from_env(&aws, env)?,
            link: AgentLink::from_env(&aws, env)?,
        })
    }
}

/// Handles one message of an agent.
///
/// # Errors
///
/// When the mailbox could not be written: the agent's message is lost, and whoever waits times out.
pub async fn handle(mut event: AgentEvent, response: &Response) -> Result<Answer, Error> {
    let text = event.body.take().unwrap_or_default();
    match decide(&event, &text, &response.keys, unix_now()) {
        Decision::Beat(body) => Ok(Answer::message(body)),
        Decision::Drop(reason) => {
            tracing::warn!(connection_id = %event.request_context.connection_id, %reason, "agent's message was dropped");
            if matches!(reason, Refused::Token(_) | Refused::ForeignTunnel) {
                metrics::count(Counted::TokensRefused);
            }
            Ok(Answer::status(200))
        }
        Decision::Close => {
            let connection = &event.request_context.connection_id;
            tracing::warn!(connection_id = %connection, "agent connection closed: its token has ended");
            response.link.close(connection).await?;
            Ok(Answer::status(403))
        }
        // No edge hands such tokens out yet.
        Decision::Settle(_) => Ok(Answer::status(200)),
        Decision::Return(claims) => {
            let connection = &event.request_context.connection_id;
            tracing::trace!(request_id = %claims.request_id, tunnel_id = %claims.tunnel, body_bytes = text.len(), "agent's message was returned");
            let sent = response.mailboxes.send(&claims.mailbox, &claims.request_id, connection, text).await;
            if let Err(Error::Refused { .. }) = sent {
                // A character that no mailbox takes. Whoever waits is told at once.
                tracing::warn!(request_id = %claims.request_id, "agent's message has a forbidden character");
                let failed = Failed { token: "".into(), seq: 0, code: ErrorCode::AgentInvalid };
                let failed = AgentMessage::Failed(failed).encode();
                response.mailboxes.send(&claims.mailbox, &claims.request_id, connection, failed).await?;
            } else {
                sent?;
            }
            Ok(Answer::status(200))
        }
    }
}

/// Decides about one message. Pure.
#[must_use]
pub fn decide(event: &AgentEvent, text: &str, keys: &TokenKeys, now: u64) -> Decision {
    let authorized = event.request_context.authorizer.as_ref();
    if authorized.is_some_and(|authorized| authorized.is_over(now)) {
        return Decision::Close;
    }
    let Ok(envelope) = Envelope::peek(text) else { return Decision::Drop(Refused::NotAnAnswer) };
    if envelope.kind == "heartbeat" {
        return match AgentMessage::decode(text) {
            Ok(AgentMessage::Heartbeat(beat)) => Decision::Beat(EdgeMessage::Heartbeat(beat).encode()),
            _ => Decision::Drop(Refused::NotAnAnswer),
        };
    }
    let (true, Some(token)) = (envelope.answers_a_request(), &envelope.token) else {
        return Decision::Drop(Refused::NotAnAnswer);
    };
    let Some(authorized) = authorized else { return Decision::Drop(Refused::NoIdentity) };
    match keys.verify(token, now) {
        Err(error) => Decision::Drop(Refused::Token(error)),
        Ok(Verified::Live(claims)) if authorized.tunnels.matches(&claims.tunnel) => Decision::Return(claims),
        Ok(Verified::Delivery(claims)) if authorized.tunnels.matches(&claims.tunnel) => {
            Decision::Settle(claims)
        }
        Ok(_) => Decision::Drop(Refused::ForeignTunnel),
    }
}

#[cfg(test)]
mod tests {
    use proto::id::RequestId;

    use super::*;

    fn keys() -> TokenKeys {
        TokenKeys::new(&[1; 32], None).unwrap()
    }

    fn claims() -> Claims {
        Claims {
            request_id: RequestId::from_random([1; 16]),
            mailbox: "m1".parse().unwrap(),
            tunnel: "web".parse().unwrap(),
            expires_at: 100,
        }
    }

    fn event(authorizer: &str) -> AgentEvent {
        let text =
            format!(r#"{{"requestContext":{{"routeKey":"$default","connectionId":"c="{authorizer}}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn may_serve(patterns: &str) -> AgentEvent {
        event(&format!(r#","authorizer":{{"owner":"alice","tunnels":"{patterns}"}}"#))
    }

    fn chunk(token: &str) -> String {
        format!(r#"{{"type":"chunk","token":"{token}","seq":1,"end":true}}"#)
    }

    #[test]
    fn returns_an_answer_whose_token_fits_its_connection() {
        let text = chunk(&keys().mint(&claims()));
        assert_eq!(decide(&may_serve("web"), &text, &keys(), 99), Decision::Return(claims()));
        assert_eq!(decide(&may_serve("shop,w-*,web"), &text, &keys(), 99), Decision::Return(claims()));
    }

    #[test]
    fn drops_everything_else() {
        let token = keys().mint(&claims());
        let refused = |event: &AgentEvent, text: &str, now| match decide(event, text, &keys(), now) {
            Decision::Drop(reason) => reason,
            other => panic!("{other:?}"),
        };
        let foreign = TokenKeys::new(&[2; 32], None).unwrap().mint(&claims());
        assert_eq!(refused(&may_serve("web"), &chunk(&token), 100), Refused::Token(TokenError::Expired));
        assert_eq!(refused(&may_serve("web"), &chunk(&foreign), 0), Refused::Token(TokenError::Forged));
        assert_eq!(refused(&may_serve("web"), &chunk("x"), 0), Refused::Token(TokenError::Malformed));
        assert_eq!(refused(&may_serve("other"), &chunk(&token), 0), Refused::ForeignTunnel);
        assert_eq!(refused(&event(""), &chunk(&token), 0), Refused::NoIdentity);
        for text in ["", "x", "{}", r#"{"type":"hello"}"#, r#"{"type":"reply"}"#, r#"{"type":"heartbeat"}"#] {
            assert_eq!(refused(&may_serve("web"), text, 0), Refused::NotAnAnswer, "{text}");
        }
    }

    #[test]
    fn closes_a_connection_whose_token_has_ended_whatever_it_says() {
        let ends_at = |end| {
            event(&format!(r#","authorizer":{{"owner":"alice","tunnels":"web","token_expires":"{end}"}}"#))
        };
        let token = keys().mint(&Claims { expires_at: 2000, ..claims() });
        let end = 1000 + proto::limits::CLOCK_SKEW.as_secs();
        for text in [chunk(&token), r#"{"type":"heartbeat","seq":7}"#.into(), "nonsense".into()] {
            assert_ne!(decide(&ends_at(1000), &text, &keys(), end - 1), Decision::Close, "{text}");
            assert_eq!(decide(&ends_at(1000), &text, &keys(), end), Decision::Close, "{text}");
        }
    }

    #[test]
    fn answers_a_heartbeat_with_its_number() {
        let beat = decide(&may_serve("web"), r#"{"type":"heartbeat","seq":7}"#, &keys(), 0);
        assert_eq!(beat, Decision::Beat(r#"{"type":"heartbeat","seq":7}"#.into()));
    }
}
