//! Whom not to believe any more: the list of revoked owners and tokens, beside the connections.
//!
//! | row | `tunnel` | `connection_id` | other attributes |
//! |---|---|---|---|
//! | owner | `#revoked` | `owner#` + the owner | `revoked_at` |
//! | token | `#revoked` | `token#` + the token's id | `revoked_at` |
//!
//! It is asked whenever a connection is opened, whenever one says which tunnels it serves and whenever one asks about
//! deliveries; never while a request is served. Whoever adds to it also closes the connections that are open.

use aws_sdk_dynamodb::types::AttributeValue;
use proto::id::Owner;

use crate::{
    Error,
    aws::{Aws, classify, number, text},
    config::{ConfigError, Env, env},
};

const LIST: &str = "#revoked";

/// The list, in the connections table.
#[derive(Debug, Clone)]
pub struct Revocations {
    client: aws_sdk_dynamodb::Client,
    table: String,
}

/// Who is revoked.
#[derive(Debug, Clone, Copy)]
pub enum Revoked<'a> {
    /// An owner, with every token of theirs.
    Owner(&'a Owner),
    /// One token, by its id.
    Token(&'a str),
}

impl Revoked<'_> {
    fn sort_key(self) -> AttributeValue {
        match self {
            Self::Owner(owner) => text(&format!("owner#{owner}")),
            Self::Token(id) => text(&format!("token#{id}")),
        }
    }
}

impl Revocations {
    /// Reads the table's name from the environment.
    ///
    /// # Errors
    ///
    /// When it is not set.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self { client: aws.dynamodb(), table: env.required(env::CONNECTIONS_TABLE)? })
    }

    /// Whether the owner, or the token, is on the list.
    ///
    /// # Errors
    ///
    /// [`Error`] when it cannot be told; nobody may be let in then.
    pub async fn holds(&self, owner: &Owner, token_id: Option<&str>) -> Result<bool, Error> {
        let by_token = async {
            match token_id {
                Some(id) => self.has(Revoked::Token(id)).await,
                None => Ok(false),
            }
        };
        let (by_owner, by_token) = tokio::join!(self.has(Revoked::Owner(owner)), by_token);
        Ok(by_owner? || by_token?)
    }

    /// Adds to the list at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`Error`]; whether it is on the list is not known then.
    pub async fn add(&self, revoked: Revoked<'_>, now: u64) -> Result<(), Error> {
        let request = self.client.put_item().table_name(&self.table).item("tunnel", text(LIST));
        let request = request.item("connection_id", revoked.sort_key()).item("revoked_at", number(now));
        request.send().await.map_err(|error| classify("PutItem", error))?;
        Ok(())
    }

    /// Takes off the list.
    ///
    /// # Errors
    ///
    /// [`Error`]; whether it is on the list is not known then.
    pub async fn lift(&self, revoked: Revoked<'_>) -> Result<(), Error> {
        let request = self.client.delete_item().table_name(&self.table).key("tunnel", text(LIST));
        let request = request.key("connection_id", revoked.sort_key());
        request.send().await.map_err(|error| classify("DeleteItem", error))?;
        Ok(())
    }

    async fn has(&self, revoked: Revoked<'_>) -> Result<bool, Error> {
        let request = self.client.get_item().table_name(&self.table).key("tunnel", text(LIST));
        let request = request.key("connection_id", revoked.sort_key()).consistent_read(true);
        let output = request.send().await.map_err(|error| classify("GetItem", error))?;
        Ok(output.item().is_some())
    }
}
