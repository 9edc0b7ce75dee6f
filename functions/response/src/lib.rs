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
//! What an agent says about a delivery goes to the run that waits for it. The token alone tells: a live request's is never
//! taken for a delivery's.
//!
//! Permissions it needs: send to mailboxes, answer runs of deliveries, close connections.

use std::process::ExitCode;

use edge::{
    Error,
    agent_link::AgentLink,
    aws::Aws,
    config::{ConfigError, Env},
    deliveries::{Answered, Deliveries},
    event::AgentEvent,
    function::{Answer, unreadable},
    mailbox::Mailboxes,
    metrics::{self, Counted},
    unix_now,
};
use proto::{
    delivery,
    error::ErrorCode,
    message::{AgentMessage, EdgeMessage, Envelope, Failed},
    token::{Claims, DeliveryClaims, OwnerMark, TokenError, TokenKeys, Verified},
};
use serde_json::value::{RawValue, to_raw_value};

/// Everything a message needs.
#[derive(Debug)]
pub struct Response {
    keys: TokenKeys,
    mailboxes: Mailboxes,
    link: AgentLink,
    deliveries: Option<Deliveries>,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Answer a sign of life.
    Beat(String),
    /// Return it to whoever waits, and say whose agent it comes from where that is asked: a WebSocket may move to another
    /// connection, an answer may not.
    Return(Claims, Option<OwnerMark>),
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
    edge::function::run_unread(Response::from_env, |event, response| async move {
        handle(&event, &response).await
    })
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
            deliveries: Deliveries::from_env(&aws, env),
        })
    }
}

/// Handles one message of an agent.
///
/// # Errors
///
/// When the event is none, or the mailbox could not be written: the agent's message is lost, and whoever waits times out.
pub async fn handle(event: &RawValue, response: &Response) -> Result<Answer, Error> {
    let mut event: AgentEvent<&RawValue> = serde_json::from_str(event.get()).map_err(unreadable)?;
    let message = event.body.take();
    let text: String = match message {
        Some(message) => serde_json::from_str(message.get()).map_err(unreadable)?,
        None => String::new(),
    };
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
        Decision::Settle(claims) => {
            let Some(deliveries) = &response.deliveries else { return Ok(Answer::status(200)) };
            Box::pin(settle(deliveries, &claims, &text)).await
        }
        Decision::Return(claims, owner) => {
            let connection = &event.request_context.connection_id;
            tracing::trace!(request_id = %claims.request_id, tunnel_id = %claims.tunnel, body_bytes = text.len(), "agent's message was returned");
            // As it came: neither unfolded nor escaped once more. Without one there are no claims.
            let message = message.map(ToOwned::to_owned).unwrap_or_default();
            let sent = response
                .mailboxes
                .send(&claims.mailbox, &claims.request_id, connection, owner, message)
                .await;
            if let Err(Error::Refused { .. }) = sent {
                // A character that no mailbox takes. Whoever waits is told at once.
                tracing::warn!(request_id = %claims.request_id, "agent's message has a forbidden character");
                let failed = Failed { token: "".into(), seq: 0, code: ErrorCode::AgentInvalid };
                let failed = to_raw_value(&AgentMessage::Failed(failed).encode()).map_err(unreadable)?;
                response
                    .mailboxes
                    .send(&claims.mailbox, &claims.request_id, connection, owner, failed)
                    .await?;
            } else {
                sent?;
            }
            Ok(Answer::status(200))
        }
    }
}

/// Returns an agent's word about a delivery to the run that waits for it.
async fn settle(deliveries: &Deliveries, claims: &DeliveryClaims, text: &str) -> Result<Answer, Error> {
    let token = claims.task_token.as_str();
    let answered = match word(text, unix_now()) {
        Word::Answered { status, retry_after_s } => {
            if (200..=299).contains(&status) {
                deliveries.succeed(token, &format!(r#"{{"status":{status},"retry_after_s":0}}"#)).await?
            } else {
                // A run tells errors apart by their names, without a state of its own for that.
                deliveries.fail(token, &delivery::answer_name(status, retry_after_s)).await?
            }
        }
        Word::Failed(code) => deliveries.fail(token, &format!("Tunnel.{code}")).await?,
        Word::Working => deliveries.beat(token).await?,
        Word::Nothing => return Ok(Answer::status(200)),
    };
    if answered == Answered::Late {
        // Said twice, or after its time: the run has gone on.
        tracing::debug!(delivery_id = %claims.delivery, attempt = claims.attempt, "the run waits no more");
    }
    Ok(Answer::status(200))
}

/// What an agent says about a delivery.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    /// Its upstream has answered.
    Answered {
        /// With this status.
        status: u16,
        /// And wants to be left alone for so many seconds.
        retry_after_s: u64,
    },
    /// Its upstream has not answered.
    Failed(ErrorCode),
    /// Its upstream has not answered yet.
    Working,
    /// Nothing that a run waits for.
    Nothing,
}

/// Reads an agent's message about a delivery. Pure.
fn word(text: &str, now: u64) -> Word {
    match AgentMessage::decode(text) {
        Ok(AgentMessage::Reply(reply)) => {
            let retry_after = reply.headers.get("retry-after").and_then(|value| value.to_str().ok());
            let retry_after_s = retry_after.map_or(0, |text| seconds(text, now));
            Word::Answered { status: reply.status, retry_after_s }
        }
        Ok(AgentMessage::Failed(failed)) => Word::Failed(failed.code),
        // An agent that does not know the delivery any more will say nothing else about it.
        Ok(AgentMessage::Progress(progress)) if progress.ended => Word::Failed(ErrorCode::AgentLost),
        Ok(AgentMessage::Progress(_)) => Word::Working,
        Ok(_) => Word::Nothing,
        Err(_) => Word::Failed(ErrorCode::AgentInvalid),
    }
}

/// `Retry-After` in seconds: a number of them, or a date (RFC 9110 §10.2.3).
fn seconds(text: &str, now: u64) -> u64 {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return seconds;
    }
    // More than can be counted is the longest, not none.
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return u64::MAX;
    }
    let date = httpdate::parse_http_date(text).ok();
    let date = date.and_then(|date| date.duration_since(std::time::UNIX_EPOCH).ok());
    date.map_or(0, |date| date.as_secs().saturating_sub(now))
}

/// Decides about one message. Pure.
#[must_use]
pub fn decide<B>(event: &AgentEvent<B>, text: &str, keys: &TokenKeys, now: u64) -> Decision {
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
    let owner = || OwnerMark::from(&authorized.owner);
    match keys.verify(token, now) {
        Err(error) => Decision::Drop(Refused::Token(error)),
        Ok(Verified::Live(claims)) if authorized.tunnels.matches(&claims.tunnel) => {
            Decision::Return(claims, envelope.is_of_a_websocket().then(owner))
        }
        Ok(Verified::Delivery(claims))
            if authorized.tunnels.matches(&claims.tunnel) && claims.owner == owner() =>
        {
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

    fn a_delivery() -> DeliveryClaims {
        DeliveryClaims {
            delivery: proto::id::DeliveryId::new(1, [1; 10]),
            attempt: 1,
            tunnel: "web".parse().unwrap(),
            owner: OwnerMark::from(&"alice".parse().unwrap()),
            expires_at: 100,
            task_token: proto::token::TaskToken::new("AQ+/=").unwrap(),
        }
    }

    #[test]
    fn a_delivery_goes_to_its_run_and_never_to_a_mailbox() {
        let text = chunk(&keys().mint_delivery(&a_delivery()));
        let wanted = Decision::Settle(Box::new(a_delivery()));
        assert_eq!(decide(&may_serve("web"), &text, &keys(), 99), wanted);
        let refused = Decision::Drop(Refused::ForeignTunnel);
        assert_eq!(decide(&may_serve("other"), &text, &keys(), 99), refused);
        // Somebody else may serve a tunnel of that name as well.
        let other = event(r#","authorizer":{"owner":"bob","tunnels":"*"}"#);
        assert_eq!(decide(&other, &text, &keys(), 99), refused);
        // The run's own token, bare or as a live request's, is none of ours.
        for token in ["AQ+/=", "AQ"] {
            let refused = Decision::Drop(Refused::Token(TokenError::Malformed));
            assert_eq!(decide(&may_serve("web"), &chunk(token), &keys(), 99), refused, "{token}");
        }
    }

    #[test]
    fn a_run_is_told_what_it_waits_for_and_nothing_else() {
        let reply = |fields: &str| {
            format!(r#"{{"type":"reply","token":"t","status":503,"headers":[{fields}],"end":true}}"#)
        };
        for (fields, retry_after_s) in [
            ("", 0),
            (r#"["retry-after","120"]"#, 120),
            (r#"["retry-after","Thu, 01 Jan 1970 00:01:40 GMT"]"#, 90),
            (r#"["retry-after","Thu, 01 Jan 1970 00:00:01 GMT"]"#, 0),
            (r#"["retry-after","soon"]"#, 0),
            (r#"["retry-after","999999999999999999999999999999"]"#, u64::MAX),
            (r#"["retry-after",""]"#, 0),
        ] {
            assert_eq!(word(&reply(fields), 10), Word::Answered { status: 503, retry_after_s }, "{fields}");
        }
        for (text, wanted) in [
            (
                r#"{"type":"failed","token":"t","seq":0,"code":"agent_busy"}"#,
                Word::Failed(ErrorCode::AgentBusy),
            ),
            (r#"{"type":"progress","token":"t","sent":0}"#, Word::Working),
            (r#"{"type":"progress","token":"t","sent":0,"ended":true}"#, Word::Failed(ErrorCode::AgentLost)),
            (r#"{"type":"chunk","token":"t","seq":1,"end":true}"#, Word::Nothing),
            (r#"{"type":"continue","token":"t"}"#, Word::Nothing),
            (
                r#"{"type":"failed","token":"t","seq":0,"code":"later"}"#,
                Word::Failed(ErrorCode::AgentInvalid),
            ),
        ] {
            assert_eq!(word(text, 0), wanted, "{text}");
        }
    }

    #[test]
    fn returns_an_answer_whose_token_fits_its_connection() {
        let text = chunk(&keys().mint(&claims()));
        let wanted = Decision::Return(claims(), None);
        assert_eq!(decide(&may_serve("web"), &text, &keys(), 99), wanted);
        assert_eq!(decide(&may_serve("shop,w-*,web"), &text, &keys(), 99), wanted);
    }

    #[test]
    fn what_a_websocket_believes_says_whose_agent_it_comes_from() {
        let alice = Some(OwnerMark::from(&"alice".parse().unwrap()));
        let token = keys().mint(&claims());
        for (kind, owner) in [
            ("reply", None),
            ("chunk", None),
            ("continue", None),
            ("progress", None),
            ("accepted", alice),
            ("frames", alice),
            ("failed", alice),
        ] {
            let text = format!(r#"{{"type":"{kind}","token":"{token}"}}"#);
            assert_eq!(
                decide(&may_serve("web"), &text, &keys(), 99),
                Decision::Return(claims(), owner),
                "{kind}"
            );
        }
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
