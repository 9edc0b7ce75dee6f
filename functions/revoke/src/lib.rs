//! Lambda `revoke`: ends an identity at once, also where it is connected.
//!
//! Nobody but the account's operator invokes it, by name and with a small event:
//!
//! ```json
//! {"owner": "alice"}
//! {"owner": "alice", "token_id": "4oVdE0yqCq2ZxQx1"}
//! {"owner": "alice", "action": "lift"}
//! ```
//!
//! First the list is written, so that no further connection is let in; then the rows of the connections that
//! are open go, so that no further request is dispatched to them; then the connections are closed, and
//! `disconnect` tells whoever waits for an answer over them. Nothing polls: who is cut is found through the
//! owner, and is cut before the invocation ends. A connection that was being opened meanwhile may have seen the list as
//! it was before, and cannot be closed until it is open: those that have said no `hello` are closed once more a moment later. It
//! may be repeated, and should be when it fails.
//!
//! Permissions it needs: query, write and delete rows of the connections table, close connections.

use std::{process::ExitCode, time::Duration};

use edge::{
    Error,
    admission::Admission,
    aws::Aws,
    config::{ConfigError, Env},
    registry::Owned,
    revocation::Revoked,
    unix_now,
};
use futures_util::{StreamExt as _, stream};
use proto::id::Owner;
use serde::{Deserialize, Serialize};

/// How many connections are closed at the same time: enough to be quick, few enough not to be throttled.
const PARALLEL: usize = 10;

/// How long a connection whose `$connect` has read the list may take to be open: an answer's way back through Lambda
/// and API Gateway.
const OPENING: Duration = Duration::from_secs(1);

/// Everything a revocation needs.
#[derive(Debug)]
pub struct Revoke(Admission);

/// What the operator wants.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Whose identity it is.
    pub owner: Owner,
    /// Which of the owner's tokens; all of them where it is missing.
    #[serde(default)]
    pub token_id: Option<String>,
    /// What to do.
    #[serde(default)]
    pub action: Action,
}

/// What to do about an identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Let it in no more, and close its connections.
    #[default]
    Revoke,
    /// Let it in again.
    Lift,
}

/// What was done.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// How many connections were closed.
    pub closed: usize,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Revoke::from_env, |event, revoke| async move { handle(event, &revoke).await })
}

impl Revoke {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self(Admission::from_env(&Aws::from_env(env)?, env)?))
    }
}

/// Handles one event.
///
/// # Errors
///
/// When the list could not be written, or a connection may still be open; to be repeated.
pub async fn handle(event: Event, Revoke(admission): &Revoke) -> Result<Answer, Error> {
    let Event { owner, token_id, action } = event;
    let revoked = token_id.as_deref().map_or(Revoked::Owner(&owner), Revoked::Token);
    if action == Action::Lift {
        admission.revocations.lift(revoked).await?;
        tracing::warn!(%owner, one_token = token_id.is_some(), "identity is let in again");
        return Ok(Answer { closed: 0 });
    }
    let now = unix_now();
    admission.revocations.add(revoked, now).await?;
    let mut connections = admission.registry.connections_of(&owner, now).await?;
    connections.retain(|connection| is_meant(connection, token_id.as_deref()));
    let mut results: Vec<Result<(), Error>> = stream::iter(&connections)
        .map(|connection| admission.cut(&connection.id, &owner))
        .buffer_unordered(PARALLEL)
        .collect()
        .await;
    let mut opening = connections.iter().filter(|connection| !connection.counts()).peekable();
    if opening.peek().is_some() {
        tokio::time::sleep(OPENING).await;
        let again = stream::iter(opening).map(|connection| admission.link.close(&connection.id));
        let again: Vec<Result<(), Error>> = again.buffer_unordered(PARALLEL).collect().await;
        results.extend(again.into_iter().filter(Result::is_err));
    }
    let closed = results.iter().filter(|result| result.is_ok()).count();
    let failed = results.len() - closed;
    tracing::warn!(%owner, one_token = token_id.is_some(), closed, failed, "identity revoked");
    results.into_iter().collect::<Result<(), Error>>()?;
    Ok(Answer { closed })
}

/// Whether the connection was opened with the token, or any connection is meant.
fn is_meant(connection: &Owned, token_id: Option<&str>) -> bool {
    token_id.is_none_or(|id| connection.token_id.as_deref() == Some(id))
}
