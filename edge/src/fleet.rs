//! Whether `relay` runs: it is woken when an agent wants it and goes to sleep when none has for a while.
//!
//! Its tasks are counted by ECS, between two bounds that are registered with Application Auto Scaling: from one to the
//! most while it is wanted, none to none otherwise. Registering bounds takes effect at once, and registering
//! the same ones again does nothing. What was decided last stands beside the connections:
//!
//! | row | `tunnel` | `connection_id` | other attributes |
//! |---|---|---|---|
//! | fleet | `#relay` | `#relay` | `wanted_at`, `asleep` |
//!
//! `connect` writes it before it wakes, and `sweep` looks at it again after it has put to sleep: of the two, one
//! sees the other, and the last word is that of who wants it.

use std::time::Duration;

use aws_sdk_applicationautoscaling::types::{ScalableDimension, ServiceNamespace};
use aws_sdk_dynamodb::{
    operation::update_item::builders::UpdateItemFluentBuilder,
    types::{AttributeValue, ReturnValue},
};
use proto::limits;

use crate::{
    Error,
    aws::{Aws, classify, holds, number, text},
    config::{ConfigError, Env, env},
};

const ROW: &str = "#relay";

/// The most tasks that may be configured.
const TASKS_MAX: usize = 100;

/// The tasks of `relay`.
#[derive(Debug, Clone)]
pub struct Fleet {
    table: aws_sdk_dynamodb::Client,
    table_name: String,
    scaling: aws_sdk_applicationautoscaling::Client,
    service: String,
    most: i32,
    rest: Duration,
    takes_all: bool,
}

impl Fleet {
    /// Reads the environment. There is none without `TUNNEL_RELAY_SERVICE`.
    ///
    /// # Errors
    ///
    /// When a variable is wrong, or the table's name is missing.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Option<Self>, ConfigError> {
        let takes_all = env.flag(env::RELAY_FRONT)?;
        let most = env.count(env::RELAY_TASKS, 1, TASKS_MAX)?;
        let rest = env.secs(env::RELAY_REST_SECS, limits::RELAY_REST, Duration::from_secs(24 * 60 * 60))?;
        let Some(service) = env.optional(env::RELAY_SERVICE) else { return Ok(None) };
        Ok(Some(Self {
            table: aws.dynamodb(),
            table_name: env.required(env::CONNECTIONS_TABLE)?,
            scaling: aws.scaling(),
            service,
            most: i32::try_from(most).unwrap_or(i32::MAX),
            rest,
            takes_all,
        }))
    }

    /// Whether it is wanted by an agent that does or does not take WebSockets.
    #[must_use]
    pub const fn is_for(&self, websockets: bool) -> bool {
        websockets || self.takes_all
    }

    /// Notes that an agent wants it, and wakes it if it sleeps. Returns whether it was woken.
    ///
    /// # Errors
    ///
    /// [`Error`]; the next sweep wakes it.
    pub async fn wake(&self, now: u64) -> Result<bool, Error> {
        let was_awake = self.note_wanted(now).await?;
        if was_awake {
            return Ok(false);
        }
        self.bound(1, self.most).await?;
        Ok(true)
    }

    /// As [`Fleet::wake`], but makes sure of it.
    ///
    /// # Errors
    ///
    /// [`Error`]; the next sweep tries again.
    pub async fn keep_awake(&self, now: u64) -> Result<(), Error> {
        self.note_wanted(now).await?;
        self.bound(1, self.most).await
    }

    /// Puts it to sleep unless somebody has wanted it lately. Returns whether it sleeps.
    ///
    /// # Errors
    ///
    /// [`Error`]; the next sweep tries again.
    pub async fn rest(&self, now: u64) -> Result<bool, Error> {
        let unwanted = self
            .row()
            .update_expression("SET asleep = :yes")
            .condition_expression("attribute_not_exists(wanted_at) OR wanted_at <= :before")
            .expression_attribute_values(":before", number(now.saturating_sub(self.rest.as_secs())));
        if !holds(unwanted).await? {
            return Ok(false);
        }
        self.bound(0, 0).await?;
        let still = self.row().update_expression("SET asleep = :yes").condition_expression("asleep = :yes");
        if holds(still).await? {
            return Ok(true);
        }
        // Somebody came in the meantime, and may have been overtaken.
        self.bound(1, self.most).await?;
        Ok(false)
    }

    /// Notes that it is wanted, and says whether it was awake.
    async fn note_wanted(&self, now: u64) -> Result<bool, Error> {
        let output = self
            .table
            .update_item()
            .table_name(&self.table_name)
            .key("tunnel", text(ROW))
            .key("connection_id", text(ROW))
            .update_expression("SET wanted_at = :now, asleep = :no")
            .expression_attribute_values(":now", number(now))
            .expression_attribute_values(":no", AttributeValue::Bool(false))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(|error| classify("UpdateItem", error))?;
        let asleep = output.attributes().and_then(|row| row.get("asleep"));
        Ok(asleep.and_then(|asleep| asleep.as_bool().ok()) == Some(&false))
    }

    fn row(&self) -> UpdateItemFluentBuilder {
        self.table
            .update_item()
            .table_name(&self.table_name)
            .key("tunnel", text(ROW))
            .key("connection_id", text(ROW))
            .expression_attribute_values(":yes", AttributeValue::Bool(true))
    }

    /// Has at least `least` and at most `most` tasks run.
    async fn bound(&self, least: i32, most: i32) -> Result<(), Error> {
        self.scaling
            .register_scalable_target()
            .service_namespace(ServiceNamespace::Ecs)
            .scalable_dimension(ScalableDimension::EcsServiceDesiredCount)
            .resource_id(&self.service)
            .min_capacity(least)
            .max_capacity(most)
            .send()
            .await
            .map_err(|error| classify("RegisterScalableTarget", error))?;
        Ok(())
    }
}
