//! Messages to a connected agent: POST to `@connections`.

use aws_sdk_apigatewaymanagement::{operation::post_to_connection::PostToConnectionError, primitives::Blob};
use proto::{id::ConnectionId, message::EdgeMessage};

use crate::{
    Error,
    aws::{Aws, classify},
    config::{ConfigError, Env, env},
};

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// API Gateway took it. Whether the agent did, only its answer tells.
    Accepted,
    /// There is no such connection any more.
    Gone,
}

/// The link to every connected agent.
#[derive(Debug, Clone)]
pub struct AgentLink {
    client: aws_sdk_apigatewaymanagement::Client,
}

impl AgentLink {
    /// Reads the endpoint from the environment.
    ///
    /// # Errors
    ///
    /// When it is not set.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self { client: aws.agent_link(&env.required(env::AGENT_ENDPOINT)?) })
    }

    /// Sends a message of at most [`proto::limits::MESSAGE_BYTES`].
    ///
    /// # Errors
    ///
    /// [`Error`]; after anything but `Throttled` it is not known whether the agent got the message.
    pub async fn post(&self, connection: &ConnectionId, message: &EdgeMessage<'_>) -> Result<Posted, Error> {
        self.post_text(connection, message.encode()).await
    }

    /// As [`Self::post`], for a message that is encoded already.
    ///
    /// # Errors
    ///
    /// As [`Self::post`].
    pub async fn post_text(&self, connection: &ConnectionId, text: String) -> Result<Posted, Error> {
        let result = self
            .client
            .post_to_connection()
            .connection_id(connection.as_str())
            .data(Blob::new(text))
            .send()
            .await;
        match result {
            Ok(_) => Ok(Posted::Accepted),
            Err(error) if error.as_service_error().is_some_and(PostToConnectionError::is_gone_exception) => {
                Ok(Posted::Gone)
            }
            Err(error) => Err(classify("PostToConnection", error)),
        }
    }

    /// Closes the connection; one that is gone is closed.
    ///
    /// # Errors
    ///
    /// [`Error`] when it may still be open.
    pub async fn close(&self, connection: &ConnectionId) -> Result<(), Error> {
        match self.client.delete_connection().connection_id(connection.as_str()).send().await {
            Ok(_) => Ok(()),
            Err(error) if error.as_service_error().is_some_and(|error| error.is_gone_exception()) => Ok(()),
            Err(error) => Err(classify("DeleteConnection", error)),
        }
    }
}
