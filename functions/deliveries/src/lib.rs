//! Lambda `deliveries`: answers what an agent asks about its owner's deliveries, on a route of its own.
//!
//! Permissions it needs: none yet beyond its log.

use std::process::ExitCode;

use edge::{
    Error,
    aws::Aws,
    config::{ConfigError, Env, env},
    deliveries::Deliveries as Store,
    event::AgentEvent,
    function::Answer,
};
use proto::{
    delivery::{self, DeliveriesAnswer, Refused},
    message::{AgentMessage, EdgeMessage},
};

/// Everything an answer needs.
#[derive(Debug)]
pub struct Deliveries {
    _store: Store,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Deliveries::from_env, |event, deliveries| async move { handle(event, &deliveries) })
}

impl Deliveries {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        env.required(env::DELIVERIES_TABLE)?;
        let aws = Aws::from_env(env)?;
        let store = Store::from_env(&aws, env)?;
        store.map(|store| Self { _store: store }).ok_or_else(|| env.missing(env::DELIVERIES_TABLE))
    }
}

/// Answers one question: nothing is found yet.
///
/// # Errors
///
/// Never at present.
pub fn handle(mut event: AgentEvent, _deliveries: &Deliveries) -> Result<Answer, Error> {
    let Ok(AgentMessage::Deliveries(asked)) = AgentMessage::decode(&event.body.take().unwrap_or_default())
    else {
        return Ok(Answer::status(400));
    };
    let answer = delivery::Answer::Refused { reason: Refused::NotFound };
    let answer = EdgeMessage::Deliveries(DeliveriesAnswer { seq: asked.seq, answer });
    Ok(Answer::message(answer.encode()))
}
