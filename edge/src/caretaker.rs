//! Looking after the mailboxes: what `sweep` does to the pool that [`crate::mailbox::Pool`] leases from.
//!
//! A mailbox that is to go is marked first, as leased for ever by nobody: from then on no process can
//! lease it, and a sweep that is cut off in the middle is finished by the next one. Then the queue
//! goes, then the row.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sqs::types::QueueAttributeName;
use proto::{id::MailboxId, limits};

use crate::{
    Error,
    aws::{Aws, classify, holds, number, text},
    config::{ConfigError, Env},
    mailbox::{POOL, Pool},
    unix_now,
};

/// Who holds a mailbox that is being deleted. No process signs like that.
const RETIRED: &str = "#retired";

/// Until when it does: the year 2100.
const FOR_EVER: u64 = 4_102_444_800;

/// One row of the table of mailboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The mailbox.
    pub mailbox: MailboxId,
    /// Until when it is leased, in seconds since 1970; free if that is past.
    pub leased_until: u64,
    /// Whether its deletion has begun.
    pub retired: bool,
}

/// The pool of mailboxes, for whoever looks after it.
#[derive(Debug, Clone)]
pub struct Caretaker {
    pool: Pool,
}

impl Caretaker {
    /// Reads the table's name and the queues' URL prefix from the environment.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self { pool: Pool::from_env(aws, env)? })
    }

    /// Every mailbox that the table knows.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn rows(&self) -> Result<Vec<Row>, Error> {
        let mut rows = Vec::new();
        let mut from = None;
        loop {
            let page = self
                .pool
                .dynamodb
                .query()
                .table_name(&self.pool.table)
                .key_condition_expression("#pool = :pool")
                // A reserved word.
                .expression_attribute_names("#pool", "pool")
                .expression_attribute_values(":pool", text(POOL))
                .consistent_read(true)
                .set_exclusive_start_key(from)
                .send()
                .await
                .map_err(|error| classify("Query", error))?;
            rows.extend(page.items().iter().filter_map(row));
            from = page.last_evaluated_key;
            if from.is_none() {
                return Ok(rows);
            }
        }
    }

    /// Every mailbox's queue there is, also of mailboxes that the table does not know.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn queues(&self) -> Result<Vec<MailboxId>, Error> {
        let prefix = self.pool.mailboxes.queue_prefix();
        let mut queues = Vec::new();
        let mut from = None;
        loop {
            let page = self
                .pool
                .mailboxes
                .sqs
                .list_queues()
                .queue_name_prefix(prefix)
                .max_results(1000)
                .set_next_token(from)
                .send()
                .await
                .map_err(|error| classify("ListQueues", error))?;
            queues.extend(page.queue_urls().iter().filter_map(|url| {
                let name = url.rsplit('/').next()?;
                // Only what the pool itself names: another stack's prefix may begin with this one.
                let id = name.strip_prefix(prefix)?.parse::<MailboxId>().ok()?;
                (id.as_str().len() == crate::mailbox::NAME_LENGTH && !id.as_str().contains('-')).then_some(id)
            }));
            from = page.next_token;
            if from.is_none() {
                return Ok(queues);
            }
        }
    }

    /// When a mailbox's queue was made, in seconds since 1970; `None` where it is gone.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn created_at(&self, mailbox: &MailboxId) -> Result<Option<u64>, Error> {
        let result = self
            .pool
            .mailboxes
            .sqs
            .get_queue_attributes()
            .queue_url(self.pool.mailboxes.url(mailbox))
            .attribute_names(QueueAttributeName::CreatedTimestamp)
            .send()
            .await;
        match result {
            Ok(output) => {
                let created =
                    output.attributes().and_then(|all| all.get(&QueueAttributeName::CreatedTimestamp));
                Ok(created.and_then(|text| text.parse().ok()))
            }
            Err(error) if error.as_service_error().is_some_and(|error| error.is_queue_does_not_exist()) => {
                Ok(None)
            }
            Err(error) => Err(classify("GetQueueAttributes", error)),
        }
    }

    /// Deletes a mailbox that is still as free as `row` says. Returns whether it was.
    ///
    /// # Errors
    ///
    /// [`Error`]; the next sweep goes on where this one stopped.
    pub async fn retire(&self, row: &Row) -> Result<bool, Error> {
        let marked = self
            .pool
            .dynamodb
            .update_item()
            .table_name(&self.pool.table)
            .set_key(Some(key(&row.mailbox)))
            .update_expression("SET holder = :retired, leased_until = :for_ever")
            .condition_expression("leased_until = :seen")
            .expression_attribute_values(":retired", text(RETIRED))
            .expression_attribute_values(":for_ever", number(FOR_EVER))
            .expression_attribute_values(":seen", number(row.leased_until));
        if !holds(marked).await? {
            return Ok(false);
        }
        self.finish(&row.mailbox).await?;
        Ok(true)
    }

    /// Deletes the queue and the row of a mailbox that is marked.
    ///
    /// # Errors
    ///
    /// [`Error`]; the next sweep goes on where this one stopped.
    pub async fn finish(&self, mailbox: &MailboxId) -> Result<(), Error> {
        self.delete_queue(mailbox).await?;
        self.pool
            .dynamodb
            .delete_item()
            .table_name(&self.pool.table)
            .set_key(Some(key(mailbox)))
            .send()
            .await
            .map_err(|error| classify("DeleteItem", error))?;
        Ok(())
    }

    /// Deletes a mailbox's queue. One that is gone already is no error.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn delete_queue(&self, mailbox: &MailboxId) -> Result<(), Error> {
        let url = self.pool.mailboxes.url(mailbox);
        match self.pool.mailboxes.sqs.delete_queue().queue_url(url).send().await {
            Ok(_) => Ok(()),
            Err(error) if error.as_service_error().is_some_and(|error| error.is_queue_does_not_exist()) => {
                Ok(())
            }
            Err(error) => Err(classify("DeleteQueue", error)),
        }
    }

    /// Makes one more mailbox. It may be leased once its queue can be used.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn make(&self, random: [u8; 16]) -> Result<(), Error> {
        let mailbox = self.pool.create(random).await?;
        // Whole seconds are compared: with one more it is never taken before it is warm.
        self.pool.put(&mailbox, unix_now() + limits::MAILBOX_WARM_UP.as_secs() + 1, None).await
    }
}

fn row(item: &HashMap<String, AttributeValue>) -> Option<Row> {
    Some(Row {
        mailbox: item.get("mailbox")?.as_s().ok()?.parse().ok()?,
        leased_until: item.get("leased_until")?.as_n().ok()?.parse().ok()?,
        retired: item.get("holder").and_then(|holder| holder.as_s().ok()).is_some_and(|own| own == RETIRED),
    })
}

fn key(mailbox: &MailboxId) -> HashMap<String, AttributeValue> {
    HashMap::from([("pool".to_owned(), text(POOL)), ("mailbox".to_owned(), text(mailbox.as_str()))])
}
