//! The account of the stack, through AWS's own clients: the calls that a run makes besides those of the edge,
//! and the end of everything that it has made.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::operation::start_sync_execution::StartSyncExecutionOutput;
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName};
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::client::{
    result::SdkError, stalled_stream_protection::StalledStreamProtectionConfig,
};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use edge::{aws::WithoutSyncPrefix, workflow::RunInput};
use proto::{
    header::Headers,
    id::{ConnectionId, RequestId, TunnelName},
    limits,
    message::{EdgeMessage, Request, notice},
    target::Target,
};
use tests::{eventually, stack::Stack};
use tokio::{sync::Mutex, task::JoinSet};

use crate::config::Config;

/// The partition that finds the rows of a connection, see `edge::registry`.
const REVERSE: &str = "#tunnels";

/// How often the registry is looked through for what is left in it.
const MOST_PASSES: usize = 10;

/// A call that failed, by the service's own name for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    call: &'static str,
    /// The error's code; empty where the call did not reach the service.
    pub(crate) code: String,
    message: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.call, self.code, self.message)
    }
}

impl Failed {
    /// Whether it came too often.
    pub(crate) fn is_throttled(&self) -> bool {
        ["Throttl", "LimitExceeded", "TooManyRequests"].iter().any(|part| self.code.contains(part))
    }
}

fn failed<E, R>(call: &'static str) -> impl FnOnce(SdkError<E, R>) -> Failed
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: fmt::Debug + 'static,
{
    move |error| match error.as_service_error() {
        Some(error) => Failed {
            call,
            code: error.code().unwrap_or("no code").to_owned(),
            message: error.message().unwrap_or_default().to_owned(),
        },
        None => Failed {
            call,
            code: String::new(),
            message: aws_smithy_types::error::display::DisplayErrorContext(&error).to_string(),
        },
    }
}

/// How a run of the state machine ended.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// `SUCCEEDED`, or what else became of it.
    pub(crate) status: String,
    /// The run's own outcome, where it succeeded.
    pub(crate) outcome: String,
    /// Why it did not.
    pub(crate) error: String,
    /// How long the call took.
    pub(crate) took: Duration,
    /// What is paid for.
    pub(crate) billed: Duration,
}

/// The account. Clones share what they know of what was made.
#[derive(Clone)]
pub(crate) struct Account {
    dynamodb: aws_sdk_dynamodb::Client,
    sqs: aws_sdk_sqs::Client,
    sfn: aws_sdk_sfn::Client,
    link: aws_sdk_apigatewaymanagement::Client,
    connections_table: String,
    state_machine: String,
    mailbox_prefix: String,
    /// The queues that were made, or may have been; nothing once they have been taken away.
    queues: Arc<Mutex<Option<BTreeSet<String>>>>,
}

impl Account {
    pub(crate) fn new(config: &Config) -> Self {
        let plain = config.endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        let http = aws_smithy_http_client::Builder::new();
        let http = if plain {
            http.build_http()
        } else {
            http.tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc)).build_https()
        };
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(10))
            .operation_attempt_timeout(limits::RUN_DURATION + Duration::from_secs(10));
        let mut shared = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(config.region.clone()))
            .credentials_provider(SharedCredentialsProvider::new(config.credentials.clone()))
            .http_client(http)
            // What is throttled or slow is what is asked for here; and no run is started twice.
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts.build())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        shared.set_endpoint_url(config.endpoint.clone());
        let shared = shared.build();
        let mut sfn = aws_sdk_sfn::config::Builder::from(&shared);
        if config.endpoint.is_some() {
            sfn = sfn.interceptor(WithoutSyncPrefix);
        }
        let link = aws_sdk_apigatewaymanagement::config::Builder::from(&shared)
            .endpoint_url(&config.agent_endpoint)
            .build();
        Self {
            dynamodb: aws_sdk_dynamodb::Client::new(&shared),
            sqs: aws_sdk_sqs::Client::new(&shared),
            sfn: aws_sdk_sfn::Client::from_conf(sfn.build()),
            link: aws_sdk_apigatewaymanagement::Client::from_conf(link),
            connections_table: config.connections_table.clone(),
            state_machine: config.state_machine.clone(),
            mailbox_prefix: config.mailbox_prefix.clone(),
            queues: Arc::new(Mutex::new(Some(BTreeSet::new()))),
        }
    }

    /// Makes a queue as the edge makes its mailboxes; its URL, and how long that took.
    ///
    /// It is named like a mailbox, because the state machine may receive from nothing else. If this program is
    /// killed, the stack's own sweep takes the queue for a stray and deletes it an hour later.
    pub(crate) async fn make_queue(&self) -> Result<(String, Duration), Failed> {
        let url = format!("{}{}", self.mailbox_prefix, &random_id().as_str()[..24]);
        let name = url.rsplit('/').next().unwrap_or_default().to_owned();
        let (sqs, queues) = (self.sqs.clone(), Arc::clone(&self.queues));
        // In a task of its own, which holds the list: whoever cleans up waits for it, also when the run was
        // broken off in between.
        let making = tokio::spawn(async move {
            let mut queues = queues.lock().await;
            let Some(queues) = queues.as_mut() else {
                let (code, message) = (String::new(), "the run is over".to_owned());
                return Err(Failed { call: "CreateQueue", code, message });
            };
            queues.insert(url.clone());
            let begun = Instant::now();
            let request = sqs.create_queue().queue_name(name);
            let retention = limits::MAILBOX_RETENTION.as_secs().to_string();
            let request = request.attributes(QueueAttributeName::MessageRetentionPeriod, retention);
            request.send().await.map_err(failed("CreateQueue"))?;
            Ok((url, begun.elapsed()))
        });
        making.await.expect("it does not panic")
    }

    /// Sends a message to a queue, for a request if one is given.
    pub(crate) async fn send(
        &self,
        queue: &str,
        body: &str,
        request: Option<&RequestId>,
    ) -> Result<(), Failed> {
        let mut call = self.sqs.send_message().queue_url(queue).message_body(body);
        if let Some(id) = request {
            let id = MessageAttributeValue::builder().data_type("String").string_value(id.as_str()).build();
            call = call.message_attributes(notice::REQUEST_ID, id.expect("the data type is set"));
        }
        call.send().await.map_err(failed("SendMessage"))?;
        Ok(())
    }

    /// Receives a message, waiting for it as long as a queue lets one wait; its body, and what deletes it.
    pub(crate) async fn receive(&self, queue: &str) -> Result<Option<(String, String)>, Failed> {
        let call = self.sqs.receive_message().queue_url(queue).wait_time_seconds(20);
        let output = call.send().await.map_err(failed("ReceiveMessage"))?;
        let message = output.messages.unwrap_or_default().into_iter().next();
        Ok(message
            .map(|message| (message.body.unwrap_or_default(), message.receipt_handle.unwrap_or_default())))
    }

    /// Deletes a received message.
    pub(crate) async fn delete(&self, queue: &str, receipt: &str) -> Result<(), Failed> {
        let call = self.sqs.delete_message().queue_url(queue).receipt_handle(receipt);
        call.send().await.map_err(failed("DeleteMessage"))?;
        Ok(())
    }

    /// Runs the state machine for a request to a tunnel that is answered through `mailbox`, if at all.
    pub(crate) async fn run(
        &self,
        id: &RequestId,
        tunnel: &str,
        mailbox: &str,
        patience: Duration,
    ) -> Result<Run, Failed> {
        #[derive(serde::Deserialize)]
        struct Output {
            outcome: String,
        }
        let tunnel: TunnelName = tunnel.parse().expect("names of this run are names");
        let message = EdgeMessage::Request(Request {
            request_id: id.clone(),
            token: "none".into(),
            tunnel: tunnel.clone(),
            method: "GET".into(),
            target: Target::parse("/").expect("it is one"),
            headers: Headers::new(),
            body: None,
            announced: None,
            streamed: false,
            timeout_ms: u64::try_from(patience.as_millis()).expect("minutes at most"),
            upgrade: None,
            delivery: None,
        });
        let deadline = std::time::SystemTime::now() + patience;
        let deadline = deadline.duration_since(std::time::UNIX_EPOCH).expect("it is later than 1970");
        let input = RunInput {
            request_id: id,
            tunnel: &tunnel,
            deadline_ms: u64::try_from(deadline.as_millis()).expect("it is not that late"),
            mailbox,
            pick: 0.0,
            method: "",
            message: &message,
        };
        let input = serde_json::to_string(&input).expect("it has string keys");
        let begun = Instant::now();
        let call = self.sfn.start_sync_execution().state_machine_arn(&self.state_machine);
        let output: StartSyncExecutionOutput =
            call.name(id.as_str()).input(input).send().await.map_err(failed("StartSyncExecution"))?;
        let outcome = serde_json::from_str::<Output>(output.output().unwrap_or("{}"));
        let billed = output.billing_details().map_or(0, |own| own.billed_duration_in_milliseconds());
        Ok(Run {
            status: output.status().as_str().to_owned(),
            outcome: outcome.map(|own| own.outcome).unwrap_or_default(),
            error: [output.error(), output.cause()].into_iter().flatten().collect::<Vec<_>>().join(": "),
            took: begun.elapsed(),
            billed: Duration::from_millis(u64::try_from(billed).unwrap_or_default()),
        })
    }

    /// Posts a message to an agent's connection.
    pub(crate) async fn post(&self, connection: &ConnectionId, text: &str) -> Result<(), Failed> {
        let call = self.link.post_to_connection().connection_id(connection.as_str());
        let data = aws_smithy_types::Blob::new(text);
        call.data(data).send().await.map_err(failed("PostToConnection"))?;
        Ok(())
    }

    /// Asks whether an agent's connection is there.
    pub(crate) async fn look_at(&self, connection: &ConnectionId) -> Result<(), Failed> {
        let call = self.link.get_connection().connection_id(connection.as_str());
        call.send().await.map_err(failed("GetConnection"))?;
        Ok(())
    }

    /// Closes an agent's connection.
    pub(crate) async fn close(&self, connection: &str) -> Result<(), Failed> {
        let call = self.link.delete_connection().connection_id(connection);
        call.send().await.map_err(failed("DeleteConnection"))?;
        Ok(())
    }

    /// What the registry holds about a tunnel: the second part of each row's key, with the row's owner.
    pub(crate) async fn rows(&self, tunnel: &str) -> Result<BTreeMap<String, Option<String>>, Failed> {
        let call = self.dynamodb.query().table_name(&self.connections_table).consistent_read(true);
        let call = call.key_condition_expression("tunnel = :tunnel");
        let call = call.expression_attribute_values(":tunnel", AttributeValue::S(tunnel.to_owned()));
        let output = call.send().await.map_err(failed("Query"))?;
        let text = |row: &HashMap<String, AttributeValue>, name: &str| {
            row.get(name).and_then(|value| value.as_s().ok()).cloned()
        };
        let rows = output.items().iter();
        Ok(rows.filter_map(|row| Some((text(row, "connection_id")?, text(row, "owner")))).collect())
    }

    /// The connections that serve a tunnel.
    pub(crate) async fn connections(&self, tunnel: &str) -> Result<Vec<String>, Failed> {
        Ok(self.rows(tunnel).await?.into_keys().filter(|key| !key.starts_with('#')).collect())
    }

    async fn forget(&self, tunnel: &str, connection: &str) -> Result<(), Failed> {
        let call = self.dynamodb.delete_item().table_name(&self.connections_table);
        let call = call.key("tunnel", AttributeValue::S(tunnel.to_owned()));
        let call = call.key("connection_id", AttributeValue::S(connection.to_owned()));
        call.send().await.map_err(failed("DeleteItem"))?;
        Ok(())
    }

    /// Takes away everything that this run has made: queues, and what the registry holds about its tunnels.
    /// Says what it could not.
    pub(crate) async fn clean(&self, stack: &Stack) -> Vec<String> {
        let mut left = Vec::new();
        for url in self.queues.lock().await.take().unwrap_or_default() {
            let deleted = self.sqs.delete_queue().queue_url(&url).send().await.map_err(failed("DeleteQueue"));
            // It may never have been made.
            if let Err(error) = deleted
                && !["NonExistentQueue", "QueueDoesNotExist"].iter().any(|own| error.code.contains(own))
            {
                left.push(format!("queue {url}: {error}"));
            }
        }
        // Once more, until there was nothing to do: a `hello` that was under way may have written meanwhile.
        for _ in 0..MOST_PASSES {
            let mut tunnels = JoinSet::new();
            for tunnel in stack.names() {
                let account = self.clone();
                tunnels.spawn(async move {
                    let result = account.clean_tunnel(&tunnel).await;
                    result.map_err(|error| format!("tunnel {tunnel}: {error}"))
                });
            }
            let results = tunnels.join_all().await;
            let (done, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
            if !failed.is_empty() {
                left.extend(failed.into_iter().filter_map(Result::err));
                return left;
            }
            if done.into_iter().flatten().sum::<usize>() == 0 {
                return left;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        left.push("tunnels: rows keep coming; they expire within a week".to_owned());
        left
    }

    /// Takes away what the registry holds about a tunnel; how many rows.
    async fn clean_tunnel(&self, tunnel: &str) -> Result<usize, Failed> {
        // The agents are gone; `disconnect` takes their rows away, if it is told.
        let begun = Instant::now();
        while !self.connections(tunnel).await?.is_empty() && begun.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let rows = self.rows(tunnel).await?;
        for (row, owner) in &rows {
            self.forget(tunnel, row).await?;
            if !row.starts_with('#') {
                self.forget(&format!("#{row}"), REVERSE).await?;
                if let Some(owner) = owner {
                    self.forget(&format!("#owner#{owner}"), row).await?;
                }
            }
        }
        Ok(rows.len())
    }

    /// Waits until a queue can be used; how long that took since it was made.
    pub(crate) async fn usable(&self, queue: &str) -> Duration {
        let begun = Instant::now();
        eventually("the queue can be used", async || self.send(queue, "first", None).await.is_ok()).await;
        begun.elapsed()
    }
}

/// A request id that nobody else has.
pub(crate) fn random_id() -> RequestId {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    RequestId::from_random(bytes)
}
