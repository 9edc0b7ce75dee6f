//! The registry: which tunnel belongs to whom, and which connections serve it. DynamoDB's table
//! `connections`, key `tunnel` + `connection_id`:
//!
//! | row | `tunnel` | `connection_id` | other attributes |
//! |---|---|---|---|
//! | name | `web` | `#name` | `owner`, `expires_at` (when the name is free again), `delivery` (what its owner wants kept, as JSON), `durable` (the methods that are always kept), `paused` (while deliveries are held) |
//! | connection | `web` | the connection | `owner`, `agent`, `connected_at`, `expires_at`, `websockets` |
//! | reverse | `#` + the connection | `#tunnels` | `tunnels`, `expires_at`: finds the rows of a connection without a scan |
//! | owner | `#owner#` + the owner | the connection | `token_id`, `expires_at`: finds the connections of an owner, from before they are open; `agent`, `since_ms`, `tunnels` once they count |
//!
//! `expires_at` is the table's TTL attribute. AWS deletes such rows late, so every read filters them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use proto::{
    delivery::Mode,
    id::{AgentId, ConnectionId, Owner, TunnelName},
    limits,
    message::Refusal,
};

use crate::{
    Error,
    aws::{Aws, classify, if_held, number, text},
    config::{ConfigError, Env, env},
    deliveries::Terms,
    limit::Limits,
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
    /// The id of the token that opened it, if that has one.
    pub token_id: Option<String>,
    /// When it was opened, in seconds since 1970.
    pub connected_at: u64,
    /// When it is certainly over, in seconds since 1970.
    pub expires_at: u64,
    /// Whether the agent takes public WebSockets.
    pub websockets: bool,
}

/// A tunnel that a connection has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// Whether deliveries may wait for it: it keeps some, or did before, and they are not held.
    pub wakes: bool,
}

/// What became of each tunnel of a `hello`.
pub type Outcomes = Vec<(TunnelName, Result<Opened, Refusal>)>;

/// How many agents serve a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agents {
    /// All of them.
    pub all: usize,
    /// Those of them that take public WebSockets.
    pub websockets: usize,
}

/// Who takes the deliveries of a tunnel now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Takers {
    /// Whose the name is, if anybody's.
    pub owner: Option<Owner>,
    /// Their connections.
    pub connections: Vec<ConnectionId>,
}

/// One connection of an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    /// The connection.
    pub id: ConnectionId,
    /// The id of the token that opened it, if that has one.
    pub token_id: Option<String>,
    agent: Option<AgentId>,
    since_ms: u64,
    tunnels: BTreeSet<TunnelName>,
}

impl Owned {
    /// Whether it has said `hello`, and no limit has refused it: only then it counts, and serves anything.
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.agent.is_some()
    }
}

/// The connections table.
#[derive(Debug, Clone)]
pub struct Registry {
    client: aws_sdk_dynamodb::Client,
    table: String,
    limits: Limits,
}

impl Registry {
    /// Reads the table's name and the limits from the environment.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        let table = env.required(env::CONNECTIONS_TABLE)?;
        Ok(Self { client: aws.dynamodb(), table, limits: env.limits()? })
    }

    /// Enters a connection that is being opened among those of its owner. From then on [`Registry::connections_of`] finds
    /// it; it counts towards no limit. `expires_at` is when it is certainly over, in seconds since 1970.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may not be let in then.
    pub async fn let_in(
        &self,
        connection: &ConnectionId,
        owner: &Owner,
        token_id: Option<&str>,
        expires_at: u64,
    ) -> Result<(), Error> {
        let request = self.client.put_item().table_name(&self.table);
        let request = request.set_item(Some(key(&owner_key(owner), connection.as_str())));
        let request = request.item("expires_at", number(expires_at));
        let request = match token_id {
            Some(id) => request.item("token_id", text(id)),
            None => request,
        };
        request.send().await.map_err(|error| classify("PutItem", error))?;
        Ok(())
    }

    /// Has `connection` count among those of its owner. [`Registry::connections_of`] finds it from then on, whatever has become
    /// of its row.
    ///
    /// Gives the time since which it has been there, in milliseconds: the order in which connections count.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing may be served then.
    pub async fn enter(&self, connection: &Connection, now_ms: u64) -> Result<u64, Error> {
        let request = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(&owner_key(&connection.owner), connection.id.as_str())))
            // A reserved word.
            .expression_attribute_names("#agent", "agent")
            .expression_attribute_values(":agent", text(connection.agent.as_str()))
            .expression_attribute_values(":now", number(now_ms))
            .expression_attribute_values(":expires_at", number(connection.expires_at))
            .return_values(ReturnValue::AllNew);
        let mut update =
            "SET #agent = :agent, expires_at = :expires_at, since_ms = if_not_exists(since_ms, :now)"
                .to_owned();
        let request = match &connection.token_id {
            Some(id) => {
                update.push_str(", token_id = :token_id");
                request.expression_attribute_values(":token_id", text(id))
            }
            None => request,
        };
        let output = request.update_expression(update).send().await;
        let output = output.map_err(|error| classify("UpdateItem", error))?;
        let since = output.attributes().and_then(|row| row.get("since_ms")).and_then(as_number);
        Ok(since.unwrap_or(now_ms))
    }

    /// The connections of an owner that have not expired at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn connections_of(&self, owner: &Owner, now: u64) -> Result<Vec<Owned>, Error> {
        self.rows(&owner_key(owner), now).await
    }

    /// The live rows of one partition that are connections.
    async fn rows(&self, partition: &str, now: u64) -> Result<Vec<Owned>, Error> {
        let mut pages = self
            .client
            .query()
            .table_name(&self.table)
            .key_condition_expression("tunnel = :partition")
            .filter_expression("expires_at > :now")
            .expression_attribute_values(":partition", text(partition))
            .expression_attribute_values(":now", number(now))
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        let mut rows = Vec::new();
        while let Some(row) = pages.next().await {
            let row = row.map_err(|error| classify("Query", error))?;
            let field = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
            // The row of the name is no connection.
            let Some(id) = field("connection_id").and_then(|id| id.parse().ok()) else { continue };
            rows.push(Owned {
                id,
                token_id: field("token_id").cloned(),
                agent: field("agent").and_then(|agent| agent.parse().ok()),
                since_ms: row.get("since_ms").and_then(as_number).unwrap_or_default(),
                tunnels: names(row.get("tunnels")),
            });
        }
        Ok(rows)
    }

    /// Makes `connection` serve exactly `tunnels`, and says for each one whether it does.
    ///
    /// A name that nobody has, or whose time is over, becomes the connection's owner's. `terms` are of those tunnels that
    /// keep requests; the last `hello` counts. `since_ms` is what
    /// [`Registry::enter`] gave.
    ///
    /// # Errors
    ///
    /// [`Error`] when the table cannot be read or the reverse row not be written; nothing new is
    /// served then.
    pub async fn serve(
        &self,
        connection: &Connection,
        tunnels: &BTreeSet<TunnelName>,
        terms: &BTreeMap<TunnelName, Terms>,
        since_ms: u64,
        now: u64,
    ) -> Result<Outcomes, Error> {
        let before = self.tunnels_of(&connection.id).await?;
        let (tunnels, mut outcomes) = self.within_limits(connection, &before, tunnels, since_ms, now).await?;
        let tunnels = &tunnels;
        let all: BTreeSet<TunnelName> = before.union(tunnels).cloned().collect();
        // First of all, so that whatever is written below can be found again.
        if !all.is_empty() {
            self.put_reverse(connection, &all).await?;
        }
        outcomes.reserve(tunnels.len());
        for name in tunnels {
            let outcome = match self.open(connection, name, terms.get(name), now).await {
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
        if all != *tunnels {
            // Also where it serves none any more: what it was given before may still be under way.
            self.put_reverse(connection, tunnels).await?;
        }
        Ok(outcomes)
    }

    /// Sorts out what the limits do not allow. What the connection serves already stays allowed, so that
    /// nobody who comes later can take it away.
    async fn within_limits(
        &self,
        connection: &Connection,
        before: &BTreeSet<TunnelName>,
        tunnels: &BTreeSet<TunnelName>,
        since_ms: u64,
        now: u64,
    ) -> Result<(BTreeSet<TunnelName>, Outcomes), Error> {
        let of_owner = self.limits.owner;
        let mut allowed = tunnels.clone();
        let mut outcomes = Vec::new();
        let mut refuse = |allowed: &mut BTreeSet<TunnelName>, name: &TunnelName, reason| {
            allowed.remove(name);
            outcomes.push((name.clone(), Err(reason)));
        };
        if of_owner.connections.is_some() || of_owner.tunnels.is_some() {
            // Written before the others are counted: of two that come at once, at least one sees the other.
            self.note_tunnels(connection, tunnels).await?;
            let mut others = self.connections_of(&connection.owner, now).await?;
            others.retain(|other| other.id != connection.id && other.counts());
            if let Some(most) = of_owner.connections {
                let mine = (since_ms, &connection.id);
                let earlier = others.iter().filter(|other| (other.since_ms, &other.id) < mine);
                if count(earlier, &connection.agent) >= most {
                    self.count_no_more(connection).await?;
                    for name in tunnels {
                        refuse(&mut allowed, name, Refusal::TooManyConnections);
                    }
                    return Ok((allowed, outcomes));
                }
            }
            if let Some(most) = of_owner.tunnels {
                let mut open: BTreeSet<&TunnelName> =
                    others.iter().flat_map(|other| &other.tunnels).collect();
                open.extend(before.intersection(tunnels));
                for name in tunnels {
                    if !open.contains(name) && open.len() >= most {
                        refuse(&mut allowed, name, Refusal::TooManyTunnels);
                    } else {
                        open.insert(name);
                    }
                }
                if allowed.len() < tunnels.len() {
                    self.note_tunnels(connection, &allowed).await?;
                }
            }
        }
        if let Some(most) = self.limits.tunnel.connections {
            for name in tunnels.difference(before) {
                let mut others = self.rows(name.as_str(), now).await?;
                others.retain(|other| other.id != connection.id);
                if allowed.contains(name) && count(others.iter(), &connection.agent) >= most {
                    refuse(&mut allowed, name, Refusal::TooManyConnections);
                }
            }
        }
        Ok((allowed, outcomes))
    }

    /// Leaves a connection among those of its owner, where it is found, but has it count no more.
    async fn count_no_more(&self, connection: &Connection) -> Result<(), Error> {
        let request = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(&owner_key(&connection.owner), connection.id.as_str())))
            .update_expression("REMOVE #agent, since_ms, tunnels")
            // One that has ended meanwhile gets no row again.
            .condition_expression("attribute_exists(expires_at)")
            // A reserved word.
            .expression_attribute_names("#agent", "agent");
        crate::aws::holds(request).await.map(drop)
    }

    /// Notes among the owner's connections which tunnels this one serves.
    async fn note_tunnels(
        &self,
        connection: &Connection,
        tunnels: &BTreeSet<TunnelName>,
    ) -> Result<(), Error> {
        let request = self.client.update_item().table_name(&self.table);
        let request = request.set_key(Some(key(&owner_key(&connection.owner), connection.id.as_str())));
        let request = if tunnels.is_empty() {
            request.update_expression("REMOVE tunnels")
        } else {
            request
                .update_expression("SET tunnels = :tunnels")
                .expression_attribute_values(":tunnels", set(tunnels))
        };
        request.send().await.map_err(|error| classify("UpdateItem", error))?;
        Ok(())
    }

    /// Removes the rows by which anything is dispatched to a connection, and returns the tunnels it served; `None` where it
    /// never served any. What it was dispatched may still be under way, so that its end is still to be announced:
    /// [`Self::forget`].
    ///
    /// # Errors
    ///
    /// [`Error`]; rows that stay expire, and a post to a connection that has gone says so.
    pub async fn withdraw(
        &self,
        connection: &ConnectionId,
        owner: Option<&Owner>,
    ) -> Result<Option<BTreeSet<TunnelName>>, Error> {
        if let Some(owner) = owner {
            self.delete(&owner_key(owner), connection.as_str()).await?;
        }
        let tunnels = self.reverse(connection).await?;
        for name in tunnels.iter().flatten() {
            // The key holds the connection: a newer connection's row cannot be hit.
            self.delete(name.as_str(), connection.as_str()).await?;
        }
        Ok(tunnels)
    }

    /// Removes every row of a connection that has ended, and returns the tunnels it served; `None` where it never served
    /// any. Without its owner, the row among the owner's connections stays until it expires.
    ///
    /// # Errors
    ///
    /// [`Error`]; rows that stay expire, and a post to the connection answers that it is gone.
    pub async fn forget(
        &self,
        connection: &ConnectionId,
        owner: Option<&Owner>,
    ) -> Result<Option<BTreeSet<TunnelName>>, Error> {
        let tunnels = self.withdraw(connection, owner).await?;
        if tunnels.is_some() {
            self.delete(&reverse_key(connection), REVERSE_ROW).await?;
        }
        Ok(tunnels)
    }

    /// Whose a tunnel is, and the connections that its deliveries may go to now: none where its owner holds them.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn takers(&self, tunnel: &TunnelName, now: u64) -> Result<Takers, Error> {
        let output = self
            .client
            .query()
            .table_name(&self.table)
            .key_condition_expression("tunnel = :tunnel")
            .filter_expression("expires_at > :now")
            .projection_expression("connection_id, paused, #owner")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":tunnel", text(tunnel.as_str()))
            .expression_attribute_values(":now", number(now))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| classify("Query", error))?;
        let rows = output.items();
        let part = |row: &HashMap<String, AttributeValue>, name: &str| row.get(name)?.as_s().ok().cloned();
        let name_row = rows.iter().find(|row| part(row, "connection_id").is_some_and(|id| id == NAME_ROW));
        let Some(owner) = name_row.and_then(|row| part(row, "owner")) else { return Ok(Takers::default()) };
        let mut takers = Takers { owner: owner.parse().ok(), connections: Vec::new() };
        if rows.iter().all(|row| !row.contains_key("paused")) {
            // Connections of whoever had the name before take nothing any more.
            let own = rows.iter().filter(|row| part(row, "owner").is_some_and(|of| of == owner));
            let ids = own.filter_map(|row| part(row, "connection_id")).filter(|id| id != NAME_ROW);
            takers.connections = ids.filter_map(|id| id.parse().ok()).collect();
        }
        Ok(takers)
    }

    /// Removes the row of one tunnel and a connection that has gone.
    ///
    /// # Errors
    ///
    /// [`Error`]; a row that stays expires.
    pub async fn forget_row(&self, tunnel: &TunnelName, connection: &ConnectionId) -> Result<(), Error> {
        self.delete(tunnel.as_str(), connection.as_str()).await
    }

    /// How many agents serve a tunnel now. Reads the whole table.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn agents(&self, now: u64) -> Result<Agents, Error> {
        let mut agents = BTreeSet::new();
        let mut with_websockets = BTreeSet::new();
        let mut from = None;
        loop {
            let page = self
                .client
                .scan()
                .table_name(&self.table)
                .filter_expression("expires_at > :now AND attribute_exists(#agent)")
                .projection_expression("#owner, #agent, websockets")
                // Reserved words.
                .expression_attribute_names("#owner", "owner")
                .expression_attribute_names("#agent", "agent")
                .expression_attribute_values(":now", number(now))
                .set_exclusive_start_key(from)
                .send()
                .await
                .map_err(|error| classify("Scan", error))?;
            for item in page.items() {
                let part = |name| item.get(name).and_then(|value| value.as_s().ok()).cloned();
                let (Some(owner), Some(agent)) = (part("owner"), part("agent")) else { continue };
                if item.get("websockets").and_then(|value| value.as_bool().ok()) == Some(&true) {
                    with_websockets.insert((owner.clone(), agent.clone()));
                }
                agents.insert((owner, agent));
            }
            from = page.last_evaluated_key;
            if from.is_none() {
                return Ok(Agents { all: agents.len(), websockets: with_websockets.len() });
            }
        }
    }

    async fn open(
        &self,
        connection: &Connection,
        name: &TunnelName,
        terms: Option<&Terms>,
        now: u64,
    ) -> Result<Result<Opened, Refusal>, Error> {
        let kept_until = terms.map_or(0, |terms| connection.expires_at + terms.policy.max_age_s);
        let held_until = (connection.expires_at + limits::NAME_HELD.as_secs()).max(kept_until);
        let mut change = "SET #owner = :owner, expires_at = :held_until".to_owned();
        let durable = terms.filter(|terms| terms.policy.mode == Mode::Durable);
        let durable = durable.filter(|terms| !terms.policy.methods.is_empty());
        match (terms.is_some(), durable.is_some()) {
            (true, true) => change.push_str(", delivery = :delivery, durable = :durable"),
            (true, false) => change.push_str(", delivery = :delivery REMOVE durable"),
            (false, _) => change.push_str(" REMOVE delivery, durable"),
        }
        let mut claim = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(name.as_str(), NAME_ROW)))
            .update_expression(change)
            .condition_expression("attribute_not_exists(#owner) OR #owner = :owner OR expires_at <= :now")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(connection.owner.as_str()))
            .expression_attribute_values(":held_until", number(held_until))
            .expression_attribute_values(":now", number(now));
        if let Some(terms) = terms {
            let terms = serde_json::to_string(terms).unwrap_or_default();
            claim = claim.expression_attribute_values(":delivery", text(&terms));
        }
        if let Some(terms) = durable {
            let methods: BTreeSet<String> = terms.policy.methods.iter().cloned().collect();
            let methods = AttributeValue::Ss(methods.into_iter().collect());
            claim = claim.expression_attribute_values(":durable", methods);
        }
        let claimed = claim.return_values(ReturnValue::AllOld).send().await;
        let Some(claimed) = if_held("UpdateItem", claimed)? else { return Ok(Err(Refusal::NameTaken)) };
        let before = claimed.attributes.unwrap_or_default();
        let keeps = terms.is_some() || before.contains_key("delivery");
        let is_other = before
            .get("owner")
            .and_then(|owner| owner.as_s().ok())
            .is_some_and(|owner| owner != connection.owner.as_str());
        let mut is_paused = before.contains_key("paused");
        if is_paused && is_other {
            // Whoever had the name before has held what came: that is over with their time.
            is_paused = !self.pause(name, &connection.owner, false).await?;
        }
        let opened = Opened { wakes: keeps && !is_paused };
        self.client
            .put_item()
            .table_name(&self.table)
            .item("tunnel", text(name.as_str()))
            .item("connection_id", text(connection.id.as_str()))
            .item("owner", text(connection.owner.as_str()))
            .item("agent", text(connection.agent.as_str()))
            .item("connected_at", number(connection.connected_at))
            .item("expires_at", number(connection.expires_at))
            .item("websockets", AttributeValue::Bool(connection.websockets))
            .send()
            .await
            .map_err(|error| classify("PutItem", error))?;
        Ok(Ok(opened))
    }

    /// Whose a name is; `None` for one that nobody has.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn owner_of(&self, tunnel: &TunnelName) -> Result<Option<Owner>, Error> {
        let row = self.name_row(tunnel).await?;
        Ok(row.and_then(|row| row.get("owner")?.as_s().ok()?.parse().ok()))
    }

    /// What the owner's last `hello` said about requests that are kept, at the Unix time `now` in seconds; nothing where none
    /// are, or nobody has the name any more.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn terms_of(&self, tunnel: &TunnelName, now: u64) -> Result<Option<Terms>, Error> {
        let row = self.name_row(tunnel).await?;
        // TTL deletes late.
        let row = row.filter(|row| row.get("expires_at").and_then(as_number).is_some_and(|at| at > now));
        Ok(row.and_then(|row| serde_json::from_str(row.get("delivery")?.as_s().ok()?).ok()))
    }

    async fn name_row(&self, tunnel: &TunnelName) -> Result<Option<HashMap<String, AttributeValue>>, Error> {
        let request = self.client.get_item().table_name(&self.table);
        let request = request.set_key(Some(key(tunnel.as_str(), NAME_ROW))).consistent_read(true);
        Ok(request.send().await.map_err(|error| classify("GetItem", error))?.item)
    }

    /// Notes whether the deliveries of a tunnel are held; false where the name is not this owner's.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn pause(&self, tunnel: &TunnelName, owner: &Owner, paused: bool) -> Result<bool, Error> {
        let request = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(tunnel.as_str(), NAME_ROW)))
            // A reserved word.
            .condition_expression("#owner = :owner")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(owner.as_str()));
        // The runs ask only whether it is there.
        crate::aws::holds(if paused {
            request
                .update_expression("SET paused = :paused")
                .expression_attribute_values(":paused", AttributeValue::Bool(true))
        } else {
            request.update_expression("REMOVE paused")
        })
        .await
    }

    /// The tunnels that a connection serves.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn tunnels_of(&self, connection: &ConnectionId) -> Result<BTreeSet<TunnelName>, Error> {
        Ok(self.reverse(connection).await?.unwrap_or_default())
    }

    /// The tunnels that a connection serves; `None` where it never served any.
    async fn reverse(&self, connection: &ConnectionId) -> Result<Option<BTreeSet<TunnelName>>, Error> {
        let output = self
            .client
            .get_item()
            .table_name(&self.table)
            .set_key(Some(key(&reverse_key(connection), REVERSE_ROW)))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| classify("GetItem", error))?;
        Ok(output.item().map(|item| names(item.get("tunnels"))))
    }

    async fn put_reverse(
        &self,
        connection: &Connection,
        tunnels: &BTreeSet<TunnelName>,
    ) -> Result<(), Error> {
        let mut request = self
            .client
            .put_item()
            .table_name(&self.table)
            .item("tunnel", text(&reverse_key(&connection.id)))
            .item("connection_id", text(REVERSE_ROW))
            .item("expires_at", number(connection.expires_at));
        // A set is never empty.
        if !tunnels.is_empty() {
            request = request.item("tunnels", set(tunnels));
        }
        request.send().await.map_err(|error| classify("PutItem", error))?;
        Ok(())
    }

    async fn delete(&self, tunnel: &str, connection: &str) -> Result<(), Error> {
        let request =
            self.client.delete_item().table_name(&self.table).set_key(Some(key(tunnel, connection)));
        request.send().await.map_err(|error| classify("DeleteItem", error))?;
        Ok(())
    }
}

/// How many connections count beside a new one of `agent`. An agent has two for a moment while it replaces
/// one, so of each agent's connections one is not counted, unless it is the only one.
fn count<'a>(others: impl Iterator<Item = &'a Owned>, agent: &AgentId) -> usize {
    let mut of_agent: BTreeMap<Option<&AgentId>, usize> = BTreeMap::new();
    for other in others {
        *of_agent.entry(other.agent.as_ref()).or_default() += 1;
    }
    let counted = |(own, number): (&Option<&AgentId>, &usize)| match own {
        // The new one is the second, or a later one.
        Some(own) if *own == agent => number - 1,
        Some(_) => (number - 1).max(1),
        None => *number,
    };
    of_agent.iter().map(counted).sum()
}

fn names(value: Option<&AttributeValue>) -> BTreeSet<TunnelName> {
    let names = value.and_then(|value| value.as_ss().ok());
    names.into_iter().flatten().filter_map(|name| name.parse().ok()).collect()
}

fn set(tunnels: &BTreeSet<TunnelName>) -> AttributeValue {
    AttributeValue::Ss(tunnels.iter().map(ToString::to_string).collect())
}

fn as_number(value: &AttributeValue) -> Option<u64> {
    value.as_n().ok()?.parse().ok()
}

fn owner_key(owner: &Owner) -> String {
    format!("#owner#{owner}")
}

fn reverse_key(connection: &ConnectionId) -> String {
    format!("#{connection}")
}

fn key(tunnel: &str, connection: &str) -> HashMap<String, AttributeValue> {
    HashMap::from([("tunnel".to_owned(), text(tunnel)), ("connection_id".to_owned(), text(connection))])
}
