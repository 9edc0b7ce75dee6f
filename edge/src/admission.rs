//! Who may be connected: the connections there are, the identities that are revoked, and the way to end a connection.
//!
//! Enters: the environment. Leaves: what whoever lets agents in, or cuts them off, decides with.

use proto::id::{ConnectionId, Owner};

use crate::{
    Error,
    agent_link::AgentLink,
    aws::Aws,
    config::{ConfigError, Env},
    registry::Registry,
    revocation::Revocations,
};

/// What letting in and cutting off need.
#[derive(Debug)]
pub struct Admission {
    /// The connections, and which tunnels they serve.
    pub registry: Registry,
    /// The identities that are let in no more.
    pub revocations: Revocations,
    /// Where connections are spoken to.
    pub link: AgentLink,
}

impl Admission {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            registry: Registry::from_env(aws, env)?,
            revocations: Revocations::from_env(aws, env)?,
            link: AgentLink::from_env(aws, env)?,
        })
    }

    /// Takes a connection's rows away, so that nothing more is dispatched to it, and closes it. `disconnect` announces its end.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be open still, or have rows. Either is tried whatever becomes of the other, and both may be
    /// tried again.
    pub async fn cut(&self, connection: &ConnectionId, owner: &Owner) -> Result<(), Error> {
        // Closed even where its rows stay: a post to it says that it is gone.
        let withdrawn = self.registry.withdraw(connection, Some(owner)).await;
        self.link.close(connection).await?;
        withdrawn.map(drop)
    }
}
