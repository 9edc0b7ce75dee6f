//! How much one owner, and one tunnel, may use: enters the environment, and each public request; leaves
//! whether it may go on.
//!
//! Where no limit on requests is configured, nothing is counted and no table is asked. Where one is, each
//! request costs one write before it is dispatched, for each of edge, tunnel and owner that has a limit, and one
//! more after it where requests in flight are limited. What is counted, in the connections table:
//!
//! | row | `tunnel` | `connection_id` | other attributes |
//! |---|---|---|---|
//! | use of the edge | `#use#edge` | `#use` | `requests`, `expires_at` |
//! | use of a tunnel | `#use#tunnel#` + the name | `#use` | `requests`, `minute`, `count`, `expires_at` |
//! | use of an owner | `#use#owner#` + the owner | `#use` | the same |
//!
//! `requests` is a set with one entry for each request in flight. An entry begins with the time at which
//! it no longer counts, so that a function that was killed does not keep its place for ever. `count` is how
//! many requests there were in `minute`. Connections and tunnels are counted by the registry.

pub(crate) mod allowed;

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aws_sdk_dynamodb::types::AttributeValue;
use proto::{
    id::{Owner, RequestId, TunnelName},
    limits,
};

pub use self::allowed::{
    EXECUTIONS_FEW, LIMIT_MAX, Limits, OwnerLimits, RATE_MAX, RequestLimits, TunnelLimits, edge_requests,
};
use crate::{
    Error,
    aws::{Aws, classify, holds, number, text},
    config::{ConfigError, Env, env},
};

/// The row that counts what is in flight, whatever the tunnel.
const USE_OF_EDGE: &str = "#use#edge";

/// How long after the last request a row of counters may be deleted.
const USE_KEPT_SECS: u64 = 24 * 60 * 60;

/// How often a write is tried again that lost against another one.
const ATTEMPTS: usize = 5;

/// For how long a process remembers whose a tunnel is. A name changes hands after days at the earliest.
const OWNER_KNOWN_SECS: u64 = 60;

/// How many owners a process remembers.
const OWNERS_KNOWN: usize = 1000;

/// Which limit a request is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// As many are in flight as may be.
    #[error("as many requests are in flight as may be")]
    InFlight,
    /// As many have begun in this minute as may.
    #[error("as many requests have begun in this minute as may")]
    PerMinute,
}

/// Why a request may not go on.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// It is over a limit.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// Nobody can tell.
    #[error(transparent)]
    Error(#[from] Error),
}

/// The places a request takes while it is in flight. To be given back by [`Limiter::release`].
#[derive(Debug, Default)]
#[must_use = "a place that is not given back is taken until its time is over"]
pub struct Admission {
    rows: Vec<String>,
    entry: String,
}

/// Counts public requests.
#[derive(Debug)]
pub struct Limiter {
    client: aws_sdk_dynamodb::Client,
    /// `None` where nothing is counted; then the table need not be known.
    table: Option<String>,
    limits: Limits,
    edge: RequestLimits,
    owners: Mutex<HashMap<TunnelName, (Option<Owner>, u64)>>,
}

impl Limiter {
    /// Reads the limits, and the table's name where there are limits on requests.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        let limits = env.limits()?;
        let edge = RequestLimits { in_flight: env.edge_requests()?, per_minute: None };
        let counts = edge.is_any() || limits.owner.requests.is_any() || limits.tunnel.requests.is_any();
        let table = counts.then(|| env.required(env::CONNECTIONS_TABLE)).transpose()?;
        Ok(Self { client: aws.dynamodb(), table, limits, edge, owners: Mutex::default() })
    }

    /// Counts a request that is about to be dispatched, at the Unix time `now`, in seconds, and is over after `lasts` at
    /// the latest.
    ///
    /// # Errors
    ///
    /// [`Denied`]; the request must not be dispatched then, and takes no place.
    pub async fn admit(
        &self,
        tunnel: &TunnelName,
        request: &RequestId,
        now: u64,
        lasts: Duration,
    ) -> Result<Admission, Denied> {
        let mut admission = Admission::default();
        let Some(table) = &self.table else { return Ok(admission) };
        let until = now + lasts.min(limits::RESPONSE_DURATION).as_secs() + 1;
        // Short, because the row is paid for by its size; that two of a thousand are the same will not happen.
        admission.entry = format!("{until:x}-{}", &request.as_str()[..12]);
        // Boxed: who limits nothing has no room for it in every request.
        let taken = Box::pin(self.take_all(table, tunnel, &mut admission, now)).await;
        match taken {
            Ok(()) => Ok(admission),
            Err(denied) => {
                Box::pin(self.release(admission)).await;
                Err(denied)
            }
        }
    }

    /// Gives back what a request took.
    pub async fn release(&self, admission: Admission) {
        let Some(table) = &self.table else { return };
        for row in &admission.rows {
            let request = self.row(table, row).update_expression("DELETE requests :entry");
            let entry = AttributeValue::Ss(vec![admission.entry.clone()]);
            let request = request.expression_attribute_values(":entry", entry);
            if let Err(error) = Box::pin(request.send()).await {
                let error = classify("UpdateItem", error);
                tracing::warn!(%error, "a request's place was not given back; it is free again when its time is over");
            }
        }
    }

    async fn take_all(
        &self,
        table: &str,
        tunnel: &TunnelName,
        admission: &mut Admission,
        now: u64,
    ) -> Result<(), Denied> {
        // First: who is refused here has cost the least.
        if self.edge.is_any() {
            self.take(table, USE_OF_EDGE.to_owned(), self.edge, admission, now).await?;
        }
        if self.limits.tunnel.requests.is_any() {
            let row = format!("#use#tunnel#{tunnel}");
            self.take(table, row, self.limits.tunnel.requests, admission, now).await?;
        }
        if self.limits.owner.requests.is_any()
            && let Some(owner) = self.owner(table, tunnel, now).await?
        {
            let row = format!("#use#owner#{owner}");
            self.take(table, row, self.limits.owner.requests, admission, now).await?;
        }
        Ok(())
    }

    async fn take(
        &self,
        table: &str,
        row: String,
        limits: RequestLimits,
        admission: &mut Admission,
        now: u64,
    ) -> Result<(), Denied> {
        // Most often the minute has begun, so that is tried first.
        let mut minute = now / 60;
        let mut begun = Begun::Yes;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                let seen = self.read(table, &row).await?;
                // Another process's clock may be a little ahead.
                minute = seen.minute.map_or(minute, |seen| seen.max(minute));
                begun = if seen.minute == Some(minute) { Begun::Yes } else { Begun::No };
                if let Some(most) = limits.in_flight
                    && seen.requests.len() >= most as usize
                {
                    let over = seen.expired(now);
                    if over.is_empty() {
                        return Err(Exceeded::InFlight.into());
                    }
                    let request = self.row(table, &row).update_expression("DELETE requests :over");
                    let request = request.expression_attribute_values(":over", AttributeValue::Ss(over));
                    request.send().await.map_err(|error| classify("UpdateItem", error))?;
                }
                if let Some(most) = limits.per_minute
                    && begun == Begun::Yes
                    && seen.count >= u64::from(most)
                {
                    return Err(Exceeded::PerMinute.into());
                }
            }
            if self.write(table, &row, limits, &admission.entry, (minute, begun), now).await? {
                if limits.in_flight.is_some() {
                    admission.rows.push(row);
                }
                return Ok(());
            }
        }
        // Others were always faster: the row is as busy as its limit allows.
        Err(Exceeded::PerMinute.into())
    }

    /// Takes a place if there is one, and the minute has begun or not as was said; whether it did.
    async fn write(
        &self,
        table: &str,
        row: &str,
        limits: RequestLimits,
        entry: &str,
        (minute, begun): (u64, Begun),
        now: u64,
    ) -> Result<bool, Error> {
        let mut set = vec!["expires_at = :kept"];
        let mut add = Vec::new();
        let mut conditions = Vec::new();
        let mut request =
            self.row(table, row).expression_attribute_values(":kept", number(now + USE_KEPT_SECS));
        if let Some(most) = limits.per_minute {
            request = request
                .expression_attribute_names("#minute", "minute")
                .expression_attribute_names("#count", "count")
                .expression_attribute_values(":minute", number(minute))
                .expression_attribute_values(":one", number(1));
            if begun == Begun::Yes {
                set.push("#count = #count + :one");
                conditions.push("#minute = :minute AND #count < :rate");
                request = request.expression_attribute_values(":rate", number(most.into()));
            } else {
                set.extend(["#minute = :minute", "#count = :one"]);
                conditions.push("(attribute_not_exists(#minute) OR #minute < :minute)");
            }
        }
        if let Some(most) = limits.in_flight {
            add.push("requests :entry");
            conditions.push("(attribute_not_exists(requests) OR size(requests) < :most)");
            request = request
                .expression_attribute_values(":entry", AttributeValue::Ss(vec![entry.to_owned()]))
                .expression_attribute_values(":most", number(most.into()));
        }
        let mut update = format!("SET {}", set.join(", "));
        if !add.is_empty() {
            update.push_str(" ADD ");
            update.push_str(&add.join(", "));
        }
        holds(request.update_expression(update).condition_expression(conditions.join(" AND "))).await
    }

    async fn read(&self, table: &str, row: &str) -> Result<Use, Error> {
        let item = self.get(table, row, "#use").await?.unwrap_or_default();
        let as_number = |name: &str| item.get(name).and_then(|value| value.as_n().ok()?.parse::<u64>().ok());
        Ok(Use {
            requests: item.get("requests").and_then(|value| value.as_ss().ok()).cloned().unwrap_or_default(),
            minute: as_number("minute"),
            count: as_number("count").unwrap_or_default(),
        })
    }

    /// Whose the tunnel is, asked at most once a minute.
    async fn owner(&self, table: &str, tunnel: &TunnelName, now: u64) -> Result<Option<Owner>, Error> {
        if let Some((owner, until)) = self.owners().get(tunnel)
            && now < *until
        {
            return Ok(owner.clone());
        }
        let item = self.get(table, tunnel.as_str(), "#name").await?;
        let owner: Option<Owner> =
            item.as_ref().and_then(|item| item.get("owner")?.as_s().ok()?.parse().ok());
        // A name that is nobody's may be somebody's in a moment.
        if owner.is_some() {
            let mut owners = self.owners();
            if owners.len() >= OWNERS_KNOWN {
                owners.clear();
            }
            owners.insert(tunnel.clone(), (owner.clone(), now + OWNER_KNOWN_SECS));
        }
        Ok(owner)
    }

    fn owners(&self) -> std::sync::MutexGuard<'_, HashMap<TunnelName, (Option<Owner>, u64)>> {
        // Nothing that runs under the lock can panic half way.
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn get(
        &self,
        table: &str,
        row: &str,
        sort_key: &str,
    ) -> Result<Option<HashMap<String, AttributeValue>>, Error> {
        let request = self.client.get_item().table_name(table).key("tunnel", text(row));
        let request = request.key("connection_id", text(sort_key)).consistent_read(true);
        Ok(request.send().await.map_err(|error| classify("GetItem", error))?.item)
    }

    fn row(
        &self,
        table: &str,
        row: &str,
    ) -> aws_sdk_dynamodb::operation::update_item::builders::UpdateItemFluentBuilder {
        self.client
            .update_item()
            .table_name(table)
            .key("tunnel", text(row))
            .key("connection_id", text("#use"))
    }
}

/// Whether a row counts the present minute already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Yes,
    No,
}

/// A row of counters.
#[derive(Debug, Default, PartialEq, Eq)]
struct Use {
    requests: Vec<String>,
    minute: Option<u64>,
    count: u64,
}

impl Use {
    /// The entries whose time is over.
    fn expired(&self, now: u64) -> Vec<String> {
        let is_over = |entry: &&String| {
            let until = entry.split('-').next().and_then(|until| u64::from_str_radix(until, 16).ok());
            until.is_none_or(|until| until <= now)
        };
        self.requests.iter().filter(is_over).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_was_not_given_back_is_free_when_its_time_is_over() {
        let requests = vec!["64-a".to_owned(), "65-b".to_owned(), "nonsense".to_owned()];
        let seen = Use { requests, ..Use::default() };
        assert_eq!(seen.expired(0x63), ["nonsense"]);
        assert_eq!(seen.expired(0x64), ["64-a", "nonsense"]);
        assert_eq!(seen.expired(0x65).len(), 3);
    }
}
