//! Mailboxes: the queues through which answers come back, each leased by one function process at a
//! time.
//!
//! A mailbox is an SQS standard queue called prefix + [`MailboxId`]. The table `mailboxes` says who has
//! which: key `pool` (always `mailboxes`) + `mailbox`, attributes `holder` and `leased_until`. A process
//! leases one when it starts and keeps it while it lives, so that no table is asked while a request is
//! served; a lease nobody renews ends by itself.

use std::{sync::Arc, time::Duration};

use aws_sdk_sqs::types::{
    DeleteMessageBatchRequestEntry, MessageAttributeValue, QueueAttributeName, SendMessageBatchRequestEntry,
};
use proto::{
    id::{ConnectionId, MailboxId, RequestId},
    limits,
    message::notice,
    token::OwnerMark,
};
use serde_json::value::RawValue;

use crate::{
    Error,
    aws::{Aws, ReceiveMessageCall, SendMessageCall, classify, holds, number, text},
    config::{ConfigError, Env, env},
    unix_now,
    wire::{Attributes, Message, Receive},
};

pub use crate::wire::Letter;

pub(crate) const POOL: &str = "mailboxes";

/// The most messages that one call takes or deletes
/// (SQS API Reference, "ReceiveMessage" and "DeleteMessageBatch": 10).
pub const BATCH: usize = 10;

/// How many hexadecimal digits name a mailbox.
pub(crate) const NAME_LENGTH: usize = 24;

/// How many free mailboxes a process that takes one leaves behind, so that the next need not wait
/// for a new one.
const FREE_AHEAD: usize = 2;

/// A mailbox that is this process's alone until the lease ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The mailbox.
    pub mailbox: MailboxId,
    /// Its queue.
    pub queue_url: String,
    /// When the lease ends, in seconds since 1970.
    pub until: u64,
    holder: String,
}

impl Lease {
    /// Whether it has ended at the Unix time `now`, in seconds. Somebody else may read the mailbox from then on.
    #[must_use]
    pub const fn has_ended(&self, now: u64) -> bool {
        self.until <= now
    }
}

/// Every mailbox of the edge.
#[derive(Debug, Clone)]
pub struct Mailboxes {
    pub(crate) sqs: aws_sdk_sqs::Client,
    receive: Arc<ReceiveMessageCall>,
    send: Arc<SendMessageCall>,
    url_prefix: String,
}

/// The pool from which mailboxes are leased.
#[derive(Debug, Clone)]
pub struct Pool {
    pub(crate) mailboxes: Mailboxes,
    pub(crate) dynamodb: aws_sdk_dynamodb::Client,
    pub(crate) table: String,
    lease: Duration,
}

impl Mailboxes {
    /// Reads the queues' URL prefix from the environment.
    ///
    /// # Errors
    ///
    /// When it is not set.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            sqs: aws.sqs(),
            receive: Arc::new(aws.receive_message()),
            send: Arc::new(aws.send_message()),
            url_prefix: env.required(env::MAILBOX_URL_PREFIX)?,
        })
    }

    pub(crate) fn url(&self, mailbox: &MailboxId) -> String {
        format!("{}{mailbox}", self.url_prefix)
    }

    /// What precedes a mailbox's id in the name of its queue.
    pub(crate) fn queue_prefix(&self) -> &str {
        self.url_prefix.rsplit('/').next().unwrap_or_default()
    }

    /// Puts an agent's message for `request`, which came over `connection`, into `mailbox`, and with it the mark of
    /// the agent's owner where whoever waits has to know it. The message is a string in JSON.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] when the text has a character that no mailbox takes.
    pub async fn send(
        &self,
        mailbox: &MailboxId,
        request: &RequestId,
        connection: &ConnectionId,
        owner: Option<OwnerMark>,
        message: Box<RawValue>,
    ) -> Result<(), Error> {
        let message = Message {
            queue_url: self.url(mailbox),
            message_body: message,
            message_attributes: Attributes {
                request_id: request.as_str().to_owned(),
                connection_id: connection.as_str().to_owned(),
                owner: owner.map(|owner| owner.to_string()),
            },
        };
        match self.send.send(message).await {
            Ok(_) => Ok(()),
            Err(error)
                if error.as_service_error().is_some_and(|error| error.is_invalid_message_contents()) =>
            {
                Err(Error::Refused { call: "SendMessage", source: "a character is not allowed".into() })
            }
            Err(error) => Err(classify("SendMessage", error)),
        }
    }

    /// Takes up to `most` messages (1 to [`BATCH`]) out of a mailbox, waiting up to `wait` (at most [`limits::MAILBOX_WAIT`]) for
    /// something.
    ///
    /// # Errors
    ///
    /// [`Error`].
    ///
    /// # Cancel safety
    ///
    /// None: a message that was on its way is hidden for [`limits::MAILBOX_VISIBILITY`]. Always await it.
    pub async fn receive(&self, lease: &Lease, wait: Duration, most: usize) -> Result<Vec<Letter>, Error> {
        let wait = wait.min(limits::MAILBOX_WAIT).as_secs_f64().ceil().max(1.0);
        let receive = Receive {
            queue_url: lease.queue_url.clone(),
            message_system_attribute_names: ["SentTimestamp"],
            message_attribute_names: ["All"],
            max_number_of_messages: most.clamp(1, BATCH) as u32,
            visibility_timeout: limits::MAILBOX_VISIBILITY.as_secs() as u32,
            wait_time_seconds: wait as u32,
        };
        let received = self.receive.send(receive).await.map_err(|error| classify("ReceiveMessage", error))?;
        Ok(received.messages.unwrap_or_default())
    }

    /// Removes received messages.
    ///
    /// # Errors
    ///
    /// [`Error`]; a message that stays shows up again as a stale one.
    pub async fn delete(&self, lease: &Lease, receipts: Vec<String>) -> Result<(), Error> {
        if let [receipt] = &receipts[..] {
            let request = self.sqs.delete_message().queue_url(&lease.queue_url).receipt_handle(receipt);
            // Boxed, as all that a request seldom waits for: an AWS call is kilobytes of state, and room for them would be
            // moved with every request.
            Box::pin(request.send()).await.map_err(|error| classify("DeleteMessage", error))?;
            return Ok(());
        }
        for batch in receipts.chunks(BATCH) {
            let entries = batch.iter().enumerate().map(|(index, receipt)| {
                DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .build()
                    .expect("id and receipt are set")
            });
            let request = self.sqs.delete_message_batch().queue_url(&lease.queue_url);
            let request = request.set_entries(Some(entries.collect()));
            Box::pin(request.send()).await.map_err(|error| classify("DeleteMessageBatch", error))?;
        }
        Ok(())
    }

    /// Tells a mailbox that an agent's connection has ended, after [`limits::LOST_DELAY`].
    async fn send_lost(&self, mailbox: &MailboxId, connection: &ConnectionId) -> Result<(), Error> {
        let entry = SendMessageBatchRequestEntry::builder()
            .id("0")
            .message_body("{}")
            .delay_seconds(seconds(limits::LOST_DELAY))
            .message_attributes(notice::LOST_CONNECTION, attribute(connection.as_str()))
            .build()
            .expect("id and body are set");
        let request = self.sqs.send_message_batch().queue_url(self.url(mailbox)).entries(entry);
        request.send().await.map_err(|error| classify("SendMessageBatch", error))?;
        Ok(())
    }
}

impl Pool {
    /// Reads the table's name and the lease from the environment.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            mailboxes: Mailboxes::from_env(aws, env)?,
            dynamodb: aws.dynamodb(),
            table: env.required(env::MAILBOXES_TABLE)?,
            lease: env.secs(
                env::MAILBOX_LEASE_SECS,
                limits::MAILBOX_LEASE,
                Duration::from_secs(24 * 60 * 60),
            )?,
        })
    }

    /// The mailboxes of the pool.
    #[must_use]
    pub fn mailboxes(&self) -> &Mailboxes {
        &self.mailboxes
    }

    /// Leases a free mailbox to `holder`, making new ones where the pool runs short.
    ///
    /// `random` spreads processes that start together over the pool.
    ///
    /// # Errors
    ///
    /// [`Error`] when neither a free mailbox nor a new one can be had.
    pub async fn lease(&self, holder: &str, random: [u8; 16]) -> Result<Lease, Error> {
        let now = unix_now();
        let start = name(random);
        // From a random place to the end, then from the beginning: whoever starts at the same time
        // mostly tries other mailboxes first.
        let mut free = self.free("mailbox >= :start", &start, now).await?;
        if free.len() <= FREE_AHEAD {
            free.extend(self.free("mailbox < :start", &start, now).await?);
        }
        let mut left = free.len();
        for mailbox in free {
            left -= 1;
            if let Some(lease) = self.write(&mailbox, holder, now, "leased_until <= :now").await? {
                if left < FREE_AHEAD
                    && let Err(error) = self.grow(FREE_AHEAD - left, random).await
                {
                    tracing::warn!(%error, "mailbox pool could not be grown");
                }
                return Ok(lease);
            }
        }
        // None to be had: one of its own, and its own from the beginning.
        let mailbox = self.create(random).await?;
        let until = unix_now() + self.lease.as_secs();
        self.put(&mailbox, until, Some(holder)).await?;
        tokio::time::sleep(limits::MAILBOX_WARM_UP).await;
        Ok(Lease { queue_url: self.mailboxes.url(&mailbox), mailbox, until, holder: holder.to_owned() })
    }

    /// Whether the lease outlives a request that begins now; if not, it should be renewed first.
    #[must_use]
    pub fn is_fresh(&self, lease: &Lease, now: u64) -> bool {
        // Half a lease, because the configured one may be shorter than the real one by a fast clock.
        lease.until.saturating_sub(now) > self.lease.as_secs() / 2
    }

    /// Renews a lease; `None` where the mailbox has gone to somebody else, or may have, because the lease has ended.
    pub async fn keep(&self, lease: &Lease) -> Option<Lease> {
        match self.renew(lease).await {
            Ok(renewed) => renewed,
            Err(error) => {
                tracing::warn!(%error, "mailbox lease was not renewed");
                // Nobody else has it before its end: the next look tries again.
                (!lease.has_ended(unix_now())).then(|| lease.clone())
            }
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<Option<Lease>, Error> {
        let now = unix_now();
        self.write(&lease.mailbox, &lease.holder, now, "holder = :holder AND leased_until > :now").await
    }

    /// Tells every leased mailbox that an agent's connection has ended.
    ///
    /// # Errors
    ///
    /// [`Error`] when the pool cannot be read; whoever waits then notices by asking for the connection.
    pub async fn announce_lost(&self, connection: &ConnectionId) -> Result<usize, Error> {
        let leased = self.query("#pool = :pool", "leased_until > :now", None, unix_now()).await?;
        let mut told = 0;
        // Ten at a time: enough to be quick, few enough not to be throttled.
        for batch in leased.chunks(10) {
            let mut sends = tokio::task::JoinSet::new();
            for mailbox in batch {
                let (mailboxes, mailbox, connection) =
                    (self.mailboxes.clone(), mailbox.clone(), connection.clone());
                sends.spawn(async move { mailboxes.send_lost(&mailbox, &connection).await });
            }
            while let Some(result) = sends.join_next().await {
                match result {
                    Ok(Ok(())) => told += 1,
                    Ok(Err(error)) => tracing::warn!(%error, "mailbox was not told of a lost connection"),
                    Err(error) => tracing::warn!(%error, "mailbox was not told of a lost connection"),
                }
            }
        }
        Ok(told)
    }

    async fn free(&self, half: &str, start: &str, now: u64) -> Result<Vec<MailboxId>, Error> {
        self.query(&format!("#pool = :pool AND {half}"), "leased_until <= :now", Some(start), now).await
    }

    async fn query(
        &self,
        keys: &str,
        filter: &str,
        start: Option<&str>,
        now: u64,
    ) -> Result<Vec<MailboxId>, Error> {
        let mut found = Vec::new();
        let mut from = None;
        loop {
            let mut request = self
                .dynamodb
                .query()
                .table_name(&self.table)
                .key_condition_expression(keys)
                .filter_expression(filter)
                // A reserved word.
                .expression_attribute_names("#pool", "pool")
                .expression_attribute_values(":pool", text(POOL))
                .expression_attribute_values(":now", number(now))
                .consistent_read(true)
                .set_exclusive_start_key(from);
            if let Some(start) = start {
                request = request.expression_attribute_values(":start", text(start));
            }
            let page = request.send().await.map_err(|error| classify("Query", error))?;
            found.extend(
                page.items()
                    .iter()
                    .filter_map(|item| item.get("mailbox")?.as_s().ok()?.parse::<MailboxId>().ok()),
            );
            from = page.last_evaluated_key;
            if from.is_none() {
                return Ok(found);
            }
        }
    }

    async fn write(
        &self,
        mailbox: &MailboxId,
        holder: &str,
        now: u64,
        condition: &str,
    ) -> Result<Option<Lease>, Error> {
        let until = now + self.lease.as_secs();
        let mut request = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .key("pool", text(POOL))
            .key("mailbox", text(mailbox.as_str()))
            .update_expression("SET holder = :holder, leased_until = :until")
            .condition_expression(format!("attribute_exists(mailbox) AND {condition}"))
            .expression_attribute_values(":holder", text(holder))
            .expression_attribute_values(":until", number(until));
        request = request.expression_attribute_values(":now", number(now));
        Ok(holds(request).await?.then(|| Lease {
            mailbox: mailbox.clone(),
            queue_url: self.mailboxes.url(mailbox),
            until,
            holder: holder.to_owned(),
        }))
    }

    /// Makes `count` new mailboxes for whoever comes next.
    async fn grow(&self, count: usize, random: [u8; 16]) -> Result<(), Error> {
        for index in 0..count {
            let mut seed = random;
            seed[0] = seed[0].wrapping_add(u8::try_from(index).unwrap_or(u8::MAX)).wrapping_add(1);
            let mailbox = self.create(seed).await?;
            // Whole seconds are compared: with one more it is never taken before it is warm.
            self.put(&mailbox, unix_now() + limits::MAILBOX_WARM_UP.as_secs() + 1, None).await?;
        }
        tracing::info!(count, "mailbox pool grown");
        Ok(())
    }

    /// Makes a queue with a name nobody has used.
    pub(crate) async fn create(&self, random: [u8; 16]) -> Result<MailboxId, Error> {
        let mailbox: MailboxId = name(random).parse().expect("hexadecimal digits are a mailbox id");
        let queue = format!("{}{mailbox}", self.mailboxes.queue_prefix());
        let request = self.mailboxes.sqs.create_queue().queue_name(queue);
        let retention = limits::MAILBOX_RETENTION.as_secs().to_string();
        let request = request.attributes(QueueAttributeName::MessageRetentionPeriod, retention);
        request.send().await.map_err(|error| classify("CreateQueue", error))?;
        Ok(mailbox)
    }

    pub(crate) async fn put(
        &self,
        mailbox: &MailboxId,
        leased_until: u64,
        holder: Option<&str>,
    ) -> Result<(), Error> {
        let request = self.dynamodb.put_item().table_name(&self.table);
        let request = request.item("pool", text(POOL)).item("mailbox", text(mailbox.as_str()));
        let mut request = request.item("leased_until", number(leased_until));
        if let Some(holder) = holder {
            request = request.item("holder", text(holder));
        }
        request.send().await.map_err(|error| classify("PutItem", error))?;
        Ok(())
    }
}

fn name(random: [u8; 16]) -> String {
    RequestId::from_random(random).as_str()[..NAME_LENGTH].to_owned()
}

fn attribute(value: &str) -> MessageAttributeValue {
    MessageAttributeValue::builder()
        .data_type("String")
        .string_value(value)
        .build()
        .expect("the data type is set")
}

fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).expect("limits are a few minutes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lease_that_is_not_renewed_is_kept_until_it_ends_and_no_longer() {
        // Without credentials every call fails.
        let lookup = |name: &str| match name {
            "AWS_REGION" => Some("local-1".to_owned()),
            env::MAILBOX_URL_PREFIX | "AWS_ENDPOINT_URL" => Some("http://127.0.0.1:1/".to_owned()),
            env::MAILBOXES_TABLE => Some("mailboxes".to_owned()),
            _ => None,
        };
        let env = Env::new(&lookup);
        let pool = Pool::from_env(&Aws::from_env(&env).unwrap(), &env).unwrap();
        let lease = |until| Lease {
            mailbox: "m1".parse().unwrap(),
            queue_url: "http://127.0.0.1:1/m1".to_owned(),
            until,
            holder: "this test".to_owned(),
        };
        let now = unix_now();
        assert_eq!(pool.keep(&lease(now + 600)).await, Some(lease(now + 600)));
        assert_eq!(pool.keep(&lease(now)).await, None);
        assert_eq!(pool.keep(&lease(now - 600)).await, None);
    }
}
