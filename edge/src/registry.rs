//! The registry: which tunnel belongs to whom, and which connections serve it. DynamoDB's table
//! `connections`, key `tunnel` + `connection_id`:
//!
//! | row | `tunnel` | `connection_id` | other attributes |
//! |---|---|---|---|
//! | name | `web` | `#name` | `owner`, `expires_at` (when the name is free again) |
//! | connection | `web` | the connection | `owner`, `agent`, `connected_at`, `expires_at` |
//! | reverse | `#` + the connection | `#tunnels` | `tunnels`, `expires_at`: finds the rows of a connection without a scan |
//!
//! `expires_at` is the table's TTL attribute. AWS deletes such rows late, so every read filters them.

use std::collections::{BTreeSet, HashMap};

use aws_sdk_dynamodb::types::AttributeValue;
use proto::{
    id::{AgentId, ConnectionId, Owner, TunnelName},
    limits,
    message::Refusal,
};

use crate::{
    Error,
    aws::{Aws, classify},
    config::{ConfigError, Env, env},
};

const NAME_ROW: &str = "#name";
const REVERSE_ROW: &str = "#tunnels";

/// An agent's connection, as the registry knows it.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Its name.
    pub id: ConnectionId,
    /// Whose it is.
    pub owner: Owner,
    /// The agent process at its other end.
    pub agent: AgentId,
    /// When it was opened, in seconds since 1970.
    pub connected_at: u64,
    /// When it is certainly over, in seconds since 1970.
    pub expires_at: u64,
}

/// The connections table.
#[derive(Debug, Clone)]
pub struct Registry {
    client: aws_sdk_dynamodb::Client,
    table: String,
}

impl Registry {
    /// Reads the table's name from the environment.
    ///
    /// # Errors
    ///
    /// When it is not set.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self { client: aws.dynamodb(), table: env.required(env::CONNECTIONS_TABLE)? })
    }

    /// Makes `connection` serve exactly `tunnels`, and says for each one whether it does.
    ///
    /// A name that nobody has, or whose time is over, becomes the connection's owner's.
    ///
    /// # Errors
    ///
    /// [`Error`] when the table cannot be read or the reverse row not be written; nothing new is
    /// served then.
    pub async fn serve(
        &self,
        connection: &Connection,
        tunnels: &BTreeSet<TunnelName>,
        now: u64,
    ) -> Result<Vec<(TunnelName, Result<(), Refusal>)>, Error> {
        let before = self.tunnels_of(&connection.id).await?;
        let all: BTreeSet<TunnelName> = before.union(tunnels).cloned().collect();
        // First of all, so that whatever is written below can be found again.
        if !all.is_empty() {
            self.put_reverse(connection, &all).await?;
        }
        let mut outcomes = Vec::with_capacity(tunnels.len());
        for name in tunnels {
            let outcome = match self.open(connection, name, now).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    tracing::warn!(tunnel_id = %name, %error, "tunnel could not be registered");
                    Err(Refusal::TryAgain)
                }
            };
            outcomes.push((name.clone(), outcome));
        }
        for name in before.difference(tunnels) {
            self.delete(name.as_str(), connection.id.as_str()).await?;
        }
        if tunnels.is_empty() {
            if !before.is_empty() {
                self.delete(&reverse_key(&connection.id), REVERSE_ROW).await?;
            }
        } else if all != *tunnels {
            self.put_reverse(connection, tunnels).await?;
        }
        Ok(outcomes)
    }

    /// Removes every row of a connection that has ended, and returns the tunnels it served.
    ///
    /// # Errors
    ///
    /// [`Error`]; rows that stay expire, and a post to the connection answers that it is gone.
    pub async fn forget(&self, connection: &ConnectionId) -> Result<BTreeSet<TunnelName>, Error> {
        let tunnels = self.tunnels_of(connection).await?;
        for name in &tunnels {
            // The key holds the connection: a newer connection's row cannot be hit.
            self.delete(name.as_str(), connection.as_str()).await?;
        }
        if !tunnels.is_empty() {
            self.delete(&reverse_key(connection), REVERSE_ROW).await?;
        }
        Ok(tunnels)
    }

    /// How many agents serve a tunnel now. Reads the whole table.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn agents(&self, now: u64) -> Result<usize, Error> {
        let mut agents = BTreeSet::new();
        let mut from = None;
        loop {
            let page = self
                .client
                .scan()
                .table_name(&self.table)
                .filter_expression("expires_at > :now AND attribute_exists(#agent)")
                .projection_expression("#owner, #agent")
                // Reserved words.
                .expression_attribute_names("#owner", "owner")
                .expression_attribute_names("#agent", "agent")
                .expression_attribute_values(":now", number(now))
                .set_exclusive_start_key(from)
                .send()
                .await
                .map_err(|error| classify("Scan", error))?;
            agents.extend(page.items().iter().filter_map(|item| {
                let part = |name| item.get(name).and_then(|value| value.as_s().ok()).cloned();
                Some((part("owner")?, part("agent")?))
            }));
            from = page.last_evaluated_key;
            if from.is_none() {
                return Ok(agents.len());
            }
        }
    }

    async fn open(
        &self,
        connection: &Connection,
        name: &TunnelName,
        now: u64,
    ) -> Result<Result<(), Refusal>, Error> {
        let held_until = connection.expires_at + limits::NAME_HELD.as_secs();
        let claim = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(name.as_str(), NAME_ROW)))
            .update_expression("SET #owner = :owner, expires_at = :held_until")
            .condition_expression("attribute_not_exists(#owner) OR #owner = :owner OR expires_at <= :now")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(connection.owner.as_str()))
            .expression_attribute_values(":held_until", number(held_until))
            .expression_attribute_values(":now", number(now))
            .send()
            .await;
        match claim {
            Ok(_) => {}
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(|error| error.is_conditional_check_failed_exception()) =>
            {
                return Ok(Err(Refusal::NameTaken));
            }
            Err(error) => return Err(classify("UpdateItem", error)),
        }
        self.client
            .put_item()
            .table_name(&self.table)
            .item("tunnel", text(name.as_str()))
            .item("connection_id", text(connection.id.as_str()))
            .item("owner", text(connection.owner.as_str()))
            .item("agent", text(connection.agent.as_str()))
            .item("connected_at", number(connection.connected_at))
            .item("expires_at", number(connection.expires_at))
            .send()
            .await
            .map_err(|error| classify("PutItem", error))?;
        Ok(Ok(()))
    }

    async fn tunnels_of(&self, connection: &ConnectionId) -> Result<BTreeSet<TunnelName>, Error> {
        let output = self
            .client
            .get_item()
            .table_name(&self.table)
            .set_key(Some(key(&reverse_key(connection), REVERSE_ROW)))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| classify("GetItem", error))?;
        let names = output.item().and_then(|item| item.get("tunnels")).and_then(|value| value.as_ss().ok());
        Ok(names.into_iter().flatten().filter_map(|name| name.parse().ok()).collect())
    }

    async fn put_reverse(
        &self,
        connection: &Connection,
        tunnels: &BTreeSet<TunnelName>,
    ) -> Result<(), Error> {
        self.client
            .put_item()
            .table_name(&self.table)
            .item("tunnel", text(&reverse_key(&connection.id)))
            .item("connection_id", text(REVERSE_ROW))
            .item("tunnels", AttributeValue::Ss(tunnels.iter().map(ToString::to_string).collect()))
            .item("expires_at", number(connection.expires_at))
            .send()
            .await
            .map_err(|error| classify("PutItem", error))?;
        Ok(())
    }

    async fn delete(&self, tunnel: &str, connection: &str) -> Result<(), Error> {
        let request =
            self.client.delete_item().table_name(&self.table).set_key(Some(key(tunnel, connection)));
        request.send().await.map_err(|error| classify("DeleteItem", error))?;
        Ok(())
    }
}

fn reverse_key(connection: &ConnectionId) -> String {
    format!("#{connection}")
}

fn key(tunnel: &str, connection: &str) -> HashMap<String, AttributeValue> {
    HashMap::from([("tunnel".to_owned(), text(tunnel)), ("connection_id".to_owned(), text(connection))])
}

fn text(value: &str) -> AttributeValue {
    AttributeValue::S(value.to_owned())
}

fn number(value: u64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}
