//! Lambda `disconnect`: cleans up after an agent's connection.
//!
//! It removes the connection's rows, so that no further request is dispatched there, and tells every leased
//! mailbox, so that whoever waits for an answer over that connection stops waiting. One that served no tunnel was
//! dispatched nothing, so that nobody waits for it: each notice has to be taken out of its mailbox by the next request there,
//! and connections cost whoever may open them nothing. API Gateway delivers
//! `$disconnect` as best it can: what is missed here is noticed by expiry, by 410 on a post, and by the check
//! that follows each long poll.
//!
//! Permissions it needs: read and delete rows of the connections table, read the mailboxes table, send to
//! mailboxes.

use std::{collections::BTreeSet, process::ExitCode};

use edge::{
    Error,
    aws::Aws,
    config::{ConfigError, Env},
    event::AgentEvent,
    function::Answer,
    mailbox::Pool,
    registry::Registry,
};

/// Everything a disconnect needs.
#[derive(Debug)]
pub struct Disconnect {
    registry: Registry,
    pool: Pool,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(
        Disconnect::from_env,
        |event, disconnect| async move { handle(event, &disconnect).await },
    )
}

impl Disconnect {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        Ok(Self { registry: Registry::from_env(&aws, env)?, pool: Pool::from_env(&aws, env)? })
    }
}

/// Handles one event.
///
/// # Errors
///
/// When neither could be done.
pub async fn handle(event: AgentEvent, disconnect: &Disconnect) -> Result<Answer, Error> {
    let connection = event.request_context.connection_id;
    let owner = event.request_context.authorizer.map(|authorized| authorized.owner);
    let forgotten = disconnect.registry.forget(&connection, owner.as_ref()).await;
    let told =
        if matches!(forgotten, Ok(None)) { Ok(0) } else { disconnect.pool.announce_lost(&connection).await };
    match (&forgotten, &told) {
        (Ok(tunnels), Ok(told)) => {
            let tunnels = tunnels.as_ref().map_or(0, BTreeSet::len);
            tracing::info!(connection_id = %connection, tunnels, mailboxes = told, "agent connection ended");
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(connection_id = %connection, %error, "agent connection was cleaned up in part");
        }
    }
    forgotten.map(drop).or(told.map(drop))?;
    Ok(Answer::status(200))
}
