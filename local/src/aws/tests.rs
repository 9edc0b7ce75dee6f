use std::time::Duration;

use aws_credential_types::Credentials;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::types::{ExecutionStatus, HistoryEventType};
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName};
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        interceptors::{Intercept, context::BeforeTransmitInterceptorContextMut},
        runtime_components::RuntimeComponents,
    },
};
use aws_smithy_types::{config_bag::ConfigBag, error::metadata::ProvideErrorMetadata as _};
use proto::calendar::rfc3339;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::{
    connections::{Handle, Identity, Outgoing},
    dynamodb,
    states::{
        definition::{Definition, MachineType},
        trace::RunStatus,
    },
};

const CONNECTION: &str = "Abc123=";
const MACHINE: &str = include_str!("../../../statemachines/public_request.asl.json");

/// Takes back the prefix that the SDK puts before the host of `StartSyncExecution`.
#[derive(Debug)]
struct WithoutPrefix;

impl Intercept for WithoutPrefix {
    fn name(&self) -> &'static str {
        "WithoutPrefix"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let uri = context.request().uri().replacen("://sync-", "://", 1);
        context.request_mut().set_uri(uri)?;
        Ok(())
    }
}

/// The configuration of one SDK's client.
macro_rules! client {
    ($sdk:ident, $endpoint:expr, $key:expr) => {
        $sdk::Config::builder()
            .behavior_version($sdk::config::BehaviorVersion::latest())
            .region($sdk::config::Region::new("eu-central-1"))
            .credentials_provider(Credentials::new($key, "secret", None, None, "test"))
            .retry_config($sdk::config::retry::RetryConfig::disabled())
            .endpoint_url($endpoint)
    };
}

struct Edge {
    aws: Aws,
    machine_arn: Arc<str>,
    mailbox: String,
    connection: Handle,
    outgoing: tokio::sync::mpsc::Receiver<Outgoing>,
}

impl Edge {
    /// An edge with one agent's connection, which serves the tunnel `web`, and one mailbox.
    async fn start() -> Self {
        let aws = Aws::start(Options {
            latency: None,
            chaos: ChaosConfig::default(),
            connections_table: "connections".into(),
            mailboxes_table: "mailboxes".into(),
            deliveries_table: "deliveries".into(),
        })
        .await
        .unwrap();
        for function in ["ingress", "response", "connect", "disconnect", "authorizer", policy::OPERATOR] {
            aws.callers().register(&format!("KEY{function}"), function, "1");
        }
        let services = aws.services();
        for (name, partition_key, sort_key, expiry) in [
            ("connections", "tunnel", "connection_id", Some("expires_at")),
            ("mailboxes", "pool", "mailbox", None),
        ] {
            let table = dynamodb::Table { name, partition_key, sort_key: Some(sort_key), expiry };
            services.dynamodb.create_table(table).await.unwrap();
        }
        let substitutions = ["ConnectionsTable", "AgentApiEndpoint", "AgentApiStage"]
            .map(|name| (name.to_owned(), "connections".to_owned()));
        let definition = Definition::parse(MACHINE, &BTreeMap::from(substitutions)).unwrap();
        let machine_arn = aws.states().create("public_request", definition);
        let (connection, outgoing) =
            services.connections.open(CONNECTION.parse().unwrap(), Identity::default(), 2);
        let mailbox = services.sqs.create("mailbox-1", crate::sqs::QueueAttributes::default()).unwrap();
        let edge = Self { aws, machine_arn, mailbox, connection, outgoing };
        for id in ["#name", CONNECTION] {
            edge.dynamodb("KEYconnect")
                .put_item()
                .table_name("connections")
                .item("tunnel", AttributeValue::S("web".into()))
                .item("connection_id", AttributeValue::S(id.into()))
                .item("expires_at", AttributeValue::N("9999999999".into()))
                .send()
                .await
                .unwrap();
        }
        edge.warm().await;
        edge
    }

    /// Waits until the mailbox may be used: the time that SQS asks for, not one for a task to get on.
    async fn warm(&self) {
        tokio::time::sleep(proto::limits::MAILBOX_WARM_UP).await;
    }

    fn sqs(&self, key: &str) -> aws_sdk_sqs::Client {
        aws_sdk_sqs::Client::from_conf(client!(aws_sdk_sqs, self.aws.endpoint(), key).build())
    }

    fn dynamodb(&self, key: &str) -> aws_sdk_dynamodb::Client {
        aws_sdk_dynamodb::Client::from_conf(client!(aws_sdk_dynamodb, self.aws.endpoint(), key).build())
    }

    fn sfn(&self, key: &str) -> aws_sdk_sfn::Client {
        let config = client!(aws_sdk_sfn, self.aws.endpoint(), key).interceptor(WithoutPrefix);
        aws_sdk_sfn::Client::from_conf(config.build())
    }

    fn link(&self, key: &str) -> aws_sdk_apigatewaymanagement::Client {
        let endpoint = self.aws.connections_endpoint();
        aws_sdk_apigatewaymanagement::Client::from_conf(
            client!(aws_sdk_apigatewaymanagement, endpoint, key).build(),
        )
    }

    fn input(&self, request_id: &str) -> String {
        serde_json::json!({
            "request_id": request_id, "tunnel": "web", "mailbox": self.mailbox, "pick": 0.5,
            "deadline_ms": crate::clock::epoch_ms() + 60_000, "message": { "type": "request", "body": "é\"" },
        })
        .to_string()
    }

    fn start_run(
        &self,
        request_id: &str,
    ) -> tokio::task::JoinHandle<aws_sdk_sfn::operation::start_sync_execution::StartSyncExecutionOutput> {
        let call = self
            .sfn("KEYingress")
            .start_sync_execution()
            .state_machine_arn(&*self.machine_arn)
            .name(request_id)
            .input(self.input(request_id));
        tokio::spawn(async move { call.send().await.unwrap() })
    }

    /// Waits until a receive waits on the mailbox, or none does.
    async fn waiting(&self, count: usize) {
        let mut waiting = self.aws.services().sqs.watch_waiting(&self.mailbox).unwrap();
        waiting.wait_for(|waiting| *waiting == count).await.unwrap();
    }

    async fn reply(&self, request_id: &str, body: &str) {
        let attribute =
            MessageAttributeValue::builder().data_type("String").string_value(request_id).build().unwrap();
        self.sqs("KEYresponse")
            .send_message()
            .queue_url(&self.mailbox)
            .message_body(body)
            .message_attributes("request_id", attribute)
            .send()
            .await
            .unwrap();
    }

    /// Sends raw bytes to the server and reads until it hangs up.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.aws.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self
            .raw(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.aws.address))
            .await;
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

#[tokio::test]
async fn standard_runs_are_operated_through_the_sdk() {
    let edge = Edge::start().await;
    let machine = serde_json::json!({ "QueryLanguage": "JSONata", "StartAt": "Park", "States": { "Park": {
        "Type": "Task", "Resource": "arn:aws:states:::aws-sdk:dynamodb:putItem.waitForTaskToken",
        "Arguments": { "TableName": "connections", "Item": {
            "tunnel": { "S": "#parked" }, "connection_id": { "S": "{% $states.context.Execution.Name %}" },
            "token": { "S": "{% $states.context.Task.Token %}" } } },
        "TimeoutSeconds": 60, "End": true } } });
    let definition =
        Definition::parse_as(MachineType::Standard, &machine.to_string(), &BTreeMap::new()).unwrap();
    let machine = edge.aws.states().create("delivery", definition);
    let sfn = edge.sfn("KEYoperator");
    let start =
        |input: &str| sfn.start_execution().state_machine_arn(&*machine).name("d1").input(input).send();
    let arn = start("{}").await.unwrap().execution_arn;
    assert_eq!(start("{}").await.unwrap().execution_arn, arn);
    let taken = start("[]").await.unwrap_err().into_service_error();
    assert!(taken.is_execution_already_exists(), "{taken}");
    let sync = sfn.start_sync_execution().state_machine_arn(&*machine).send().await.unwrap_err();
    assert!(sync.into_service_error().is_state_machine_type_not_supported());
    // Who accepts requests may; no other role allows it.
    let denied =
        edge.sfn("KEYresponse").start_execution().state_machine_arn(&*machine).send().await.unwrap_err();
    assert_eq!(denied.into_service_error().meta().code(), Some("AccessDeniedException"));

    let token = loop {
        let row = edge.dynamodb("KEYoperator").get_item().table_name("connections");
        let key = |text: &str| AttributeValue::S(text.into());
        let row = row.key("tunnel", key("#parked")).key("connection_id", key("d1")).send().await.unwrap();
        if let Some(row) = row.item {
            break row["token"].as_s().unwrap().clone();
        }
    };
    sfn.send_task_heartbeat().task_token(&token).send().await.unwrap();
    let forged = sfn.send_task_success().task_token("AAAA").output("1").send().await.unwrap_err();
    assert!(forged.into_service_error().is_invalid_token());
    let output = sfn.send_task_success().task_token(&token).output("{").send().await.unwrap_err();
    assert!(output.into_service_error().is_invalid_output());
    sfn.send_task_failure().task_token(&token).error("E").cause("c").send().await.unwrap();
    let late = sfn.send_task_failure().task_token(&token).send().await.unwrap_err();
    assert!(late.into_service_error().is_task_timed_out());

    let described = loop {
        let described = sfn.describe_execution().execution_arn(&arn).send().await.unwrap();
        if described.status != ExecutionStatus::Running {
            break described;
        }
    };
    assert_eq!((&described.status, described.error.as_deref()), (&ExecutionStatus::Failed, Some("E")));
    let page = |token: Option<String>| {
        sfn.get_execution_history().execution_arn(&arn).max_results(4).set_next_token(token).send()
    };
    let first = page(None).await.unwrap();
    let second = page(first.next_token).await.unwrap();
    assert_eq!((first.events.len(), second.next_token), (4, None));
    assert_eq!(second.events.last().unwrap().r#type, HistoryEventType::ExecutionFailed);
    let listed = sfn.list_executions().state_machine_arn(&*machine).send().await.unwrap();
    assert_eq!(listed.executions.len(), 1);
    sfn.redrive_execution().execution_arn(&arn).send().await.unwrap();
    sfn.stop_execution().execution_arn(&arn).send().await.unwrap();
    let described = sfn.describe_execution().execution_arn(&arn).send().await.unwrap();
    assert_eq!((described.status, described.redrive_count), (ExecutionStatus::Aborted, Some(1)));
}

#[tokio::test]
async fn a_public_request_is_answered() {
    let mut edge = Edge::start().await;
    let run = edge.start_run("r1");
    let Some(Outgoing::Message(message)) = edge.outgoing.recv().await else { panic!("no message") };
    assert_eq!(message, r#"{"type":"request","body":"é\""}"#);
    edge.waiting(1).await;
    // The run can be watched while it goes.
    let trace = edge.aws.states().trace("r1").unwrap();
    assert_eq!(trace.status, RunStatus::Running);
    assert_eq!(&*trace.states.last().unwrap().state, "AwaitReply");
    assert_eq!(trace.states.last().unwrap().exited_us, None);
    edge.reply("r0", "stale").await;
    edge.reply("r1", "{\"type\":\"reply\"}").await;
    let result = run.await.unwrap();
    assert_eq!(result.status(), &aws_sdk_sfn::types::SyncExecutionStatus::Succeeded);
    let output: Value = serde_json::from_str(result.output().unwrap()).unwrap();
    assert_eq!(
        (&output["outcome"], &output["connection_id"], &output["reply"]),
        (&"Replied".into(), &CONNECTION.into(), &"{\"type\":\"reply\"}".into())
    );
    assert_eq!(result.name(), Some("r1"));
    assert!(result.start_date().secs() > 0 && result.billing_details().is_some());
    // The reply is still there for whoever has its receipt.
    let receipt = output["receipt"].as_str().unwrap();
    edge.sqs("KEYingress")
        .delete_message()
        .queue_url(&edge.mailbox)
        .receipt_handle(receipt)
        .send()
        .await
        .unwrap();

    let counters = edge.get("/_local/counters").await;
    assert_eq!(counters["callers"]["states"]["dynamodb:Query"], 1);
    assert_eq!(counters["callers"]["states"]["apigateway:invoke POST"], 1);
    assert_eq!(counters["callers"]["states"]["sqs:ReceiveMessage"], 2);
    assert_eq!(counters["callers"]["states"]["sqs:DeleteMessage"], 1);
    assert_eq!(counters["callers"]["ingress"]["states:StartSyncExecution"], 1);
    assert_eq!(counters["callers"]["ingress"]["sqs:DeleteMessage"], 1);
    assert_eq!(counters["actions"]["sqs:SendMessage"], 2);
    let trace = edge.get("/_local/traces/r1").await;
    assert_eq!(trace["status"], "SUCCEEDED");
    assert_eq!(trace["states"][0]["state"], "LookUpConnections");
    assert_eq!(edge.get("/_local/traces").await[0], trace);
}

#[tokio::test]
async fn a_caller_that_hangs_up_cancels_its_run() {
    let edge = Edge::start().await;
    let run = edge.start_run("r1");
    edge.waiting(1).await;
    run.abort();
    edge.waiting(0).await;
    // A reply that comes now is taken by nobody.
    edge.reply("r1", "late").await;
    let received = edge.sqs("KEYingress").receive_message().queue_url(&edge.mailbox).send().await.unwrap();
    assert_eq!(received.messages().len(), 1);
    assert_eq!(edge.aws.states().trace("r1").unwrap().status, RunStatus::Cancelled);
    assert_eq!(edge.aws.client_gone("KEYingress"), 0);
}

#[tokio::test]
async fn a_run_is_told_that_its_client_is_gone() {
    let edge = Edge::start().await;
    let run = edge.start_run("r1");
    edge.waiting(1).await;
    assert_eq!(edge.aws.client_gone("KEYresponse"), 0);
    assert_eq!(edge.aws.client_gone("KEYingress"), 1);
    let result = run.await.unwrap();
    let output: Value = serde_json::from_str(result.output().unwrap()).unwrap();
    assert_eq!((&output["outcome"], &output["reply"]), (&"Replied".into(), &notice::CLIENT_GONE.into()));
}

#[tokio::test]
async fn a_receive_that_is_given_up_takes_no_message_with_it() {
    let edge = Edge::start().await;
    let sqs = edge.sqs("KEYingress");
    let poll = sqs.receive_message().queue_url(&edge.mailbox).wait_time_seconds(20);
    let poll = tokio::spawn(async move { poll.send().await });
    edge.waiting(1).await;
    poll.abort();
    edge.waiting(0).await;
    edge.reply("r1", "for the next").await;
    let received = sqs.receive_message().queue_url(&edge.mailbox).send().await.unwrap();
    assert_eq!(received.messages()[0].body(), Some("for the next"));
}

#[tokio::test]
async fn queues_answer_the_sdk() {
    let edge = Edge::start().await;
    let sqs = edge.sqs("KEYoperator");
    let created = sqs
        .create_queue()
        .queue_name("mailbox-2")
        .attributes(QueueAttributeName::MessageRetentionPeriod, "1200")
        .send()
        .await
        .unwrap();
    let url = created.queue_url().unwrap();
    let too_early = sqs.send_message().queue_url(url).message_body("x").send().await.unwrap_err();
    assert!(too_early.as_service_error().unwrap().is_queue_does_not_exist(), "{too_early:?}");
    edge.warm().await;
    let large = "x\"\\\n".repeat(32 * 1024);
    sqs.send_message().queue_url(url).message_body(&large).send().await.unwrap();
    let received = sqs.receive_message().queue_url(url).message_attribute_names("All").send().await.unwrap();
    assert_eq!(received.messages()[0].body(), Some(&*large));
    // A receive with nothing in it.
    let empty = sqs.receive_message().queue_url(url).send().await.unwrap();
    assert!(empty.messages.is_none());
    let refused = sqs.send_message().queue_url(url).message_body("\u{1}").send().await.unwrap_err();
    assert!(refused.as_service_error().unwrap().is_invalid_message_contents(), "{refused:?}");
}

#[tokio::test]
async fn tables_answer_the_sdk() {
    let edge = Edge::start().await;
    let refused = edge
        .dynamodb("KEYconnect")
        .update_item()
        .table_name("connections")
        .key("tunnel", AttributeValue::S("web".into()))
        .key("connection_id", AttributeValue::S("#name".into()))
        .update_expression("SET #owner = :owner")
        .condition_expression("attribute_not_exists(tunnel)")
        .expression_attribute_names("#owner", "owner")
        .expression_attribute_values(":owner", AttributeValue::S("me".into()))
        .send()
        .await
        .unwrap_err();
    assert!(refused.as_service_error().unwrap().is_conditional_check_failed_exception(), "{refused:?}");
    let found = edge
        .dynamodb("KEYdisconnect")
        .get_item()
        .table_name("connections")
        .key("tunnel", AttributeValue::S("web".into()))
        .key("connection_id", AttributeValue::S(CONNECTION.into()))
        .consistent_read(true)
        .send()
        .await
        .unwrap();
    assert_eq!(found.item().unwrap()["expires_at"], AttributeValue::N("9999999999".into()));
}

#[tokio::test]
async fn connections_answer_the_sdk() {
    let mut edge = Edge::start().await;
    let link = edge.link("KEYingress");
    let post = |bytes: Vec<u8>| link.post_to_connection().connection_id(CONNECTION).data(bytes.into()).send();
    post(b"hello".to_vec()).await.unwrap();
    assert_eq!(edge.outgoing.recv().await, Some(Outgoing::Message(Bytes::from_static(b"hello"))));
    let error = post(vec![b'x'; proto::limits::MESSAGE_BYTES + 1]).await.unwrap_err();
    assert!(error.as_service_error().unwrap().is_payload_too_large_exception(), "{error:?}");
    post(vec![b'x'; proto::limits::MESSAGE_BYTES]).await.unwrap();
    post(b"x".to_vec()).await.unwrap();
    let error = post(b"x".to_vec()).await.unwrap_err();
    assert!(error.as_service_error().unwrap().is_limit_exceeded_exception(), "{error:?}");

    let operator = edge.link("KEYoperator");
    let info = operator.get_connection().connection_id(CONNECTION).send().await.unwrap();
    let now = i64::try_from(crate::clock::epoch_ms() / 1000).unwrap();
    assert!((now - info.connected_at().unwrap().secs()).abs() < 60);

    let denied = link.delete_connection().connection_id(CONNECTION).send().await.unwrap_err();
    assert_eq!(denied.into_service_error().code(), Some("AccessDeniedException"), "ingress closes nobody");
    let closer = edge.link("KEYresponse");
    closer.delete_connection().connection_id(CONNECTION).send().await.unwrap();
    let error = post(b"x".to_vec()).await.unwrap_err();
    assert!(error.as_service_error().unwrap().is_gone_exception(), "{error:?}");
    let error = operator.get_connection().connection_id(CONNECTION).send().await.unwrap_err();
    assert!(error.as_service_error().unwrap().is_gone_exception(), "{error:?}");
    drop(edge.connection);
}

#[tokio::test]
async fn nobody_does_what_is_not_theirs() {
    let edge = Edge::start().await;
    let denied = edge.sqs("KEYauthorizer").list_queues().send().await.unwrap_err();
    let denied = denied.into_service_error();
    assert_eq!(denied.code(), Some("AccessDeniedException"));
    assert_eq!(
        denied.message(),
        Some(
            "User: arn:aws:sts::000000000000:assumed-role/authorizer is not authorized to perform: sqs:ListQueues"
        )
    );
    let denied = edge.dynamodb("KEYingress").scan().table_name("mailboxes").send().await.unwrap_err();
    assert_eq!(denied.into_service_error().code(), Some("AccessDeniedException"));
    let link = edge.link("KEYresponse");
    let denied = link.get_connection().connection_id(CONNECTION).send().await.unwrap_err();
    assert_eq!(denied.into_service_error().code(), Some("AccessDeniedException"));
    let unknown = edge.sqs("NOBODY").list_queues().send().await.unwrap_err();
    assert_eq!(unknown.into_service_error().code(), Some("UnrecognizedClientException"));
    edge.aws.callers().forget("KEYingress");
    let unknown =
        edge.sfn("KEYingress").start_sync_execution().state_machine_arn("x").send().await.unwrap_err();
    assert_eq!(unknown.into_service_error().code(), Some("UnrecognizedClientException"));
    let unsigned = edge
        .raw("POST / HTTP/1.1\r\nHost: a\r\nx-amz-target: AmazonSQS.ListQueues\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        .await;
    assert!(unsigned.contains("MissingAuthenticationTokenException"), "{unsigned}");
}

#[tokio::test]
async fn runs_are_refused_as_step_functions_refuses_them() {
    let edge = Edge::start().await;
    let start = |arn: &str, name: &str, input: &str| {
        edge.sfn("KEYingress").start_sync_execution().state_machine_arn(arn).name(name).input(input).send()
    };
    let arn = &*edge.machine_arn;
    for (arn, name, input, wanted) in [
        ("arn:aws:states:local:000000000000:stateMachine:x", "r", "{}", "StateMachineDoesNotExist"),
        (arn, "a b", "{}", "InvalidName"),
        (arn, &"a".repeat(81), "{}", "InvalidName"),
        (arn, "r", "{", "InvalidExecutionInput"),
        (arn, "r", &format!("\"{}\"", "x".repeat(proto::limits::STATE_BYTES)), "ValidationException"),
    ] {
        let error = start(arn, name, input).await.unwrap_err();
        assert_eq!(error.into_service_error().code(), Some(wanted));
    }
    // A run that fails is no failure of the call.
    let result = start(arn, "r", "{}").await.unwrap();
    assert_eq!(result.status(), &aws_sdk_sfn::types::SyncExecutionStatus::Failed);
    assert_eq!(result.error(), Some("EdgeFailed"));
    assert_eq!(result.cause(), Some("States.QueryEvaluationError"));
}

#[tokio::test]
async fn throttling_and_latency_reach_the_sdk() {
    let aws = Aws::start(Options { chaos: "throttle=1,delay=30".parse().unwrap(), ..Options::default() })
        .await
        .unwrap();
    aws.callers().register("K", policy::OPERATOR, "1");
    let start = std::time::Instant::now();
    let sqs = aws_sdk_sqs::Client::from_conf(client!(aws_sdk_sqs, aws.endpoint(), "K").build());
    let error = sqs.list_queues().send().await.unwrap_err().into_service_error();
    assert_eq!(error.code(), Some("RequestThrottled"));
    let dynamodb =
        aws_sdk_dynamodb::Client::from_conf(client!(aws_sdk_dynamodb, aws.endpoint(), "K").build());
    let error = dynamodb.list_tables().send().await.unwrap_err().into_service_error();
    assert_eq!(error.code(), Some("ProvisionedThroughputExceededException"));
    assert!(start.elapsed() >= Duration::from_millis(60));
}

#[tokio::test]
async fn what_is_local_is_told_to_local_callers_only() {
    let edge = Edge::start().await;
    let rebound =
        edge.raw("GET /_local/traces HTTP/1.1\r\nHost: attacker.example\r\nConnection: close\r\n\r\n").await;
    assert!(rebound.starts_with("HTTP/1.1 403"), "{rebound}");
    assert_ne!(edge.get("/_local/counters").await["actions"], serde_json::json!({}));
    let reset = edge
        .raw(&format!(
            "POST /_local/counters/reset HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            edge.aws.address
        ))
        .await;
    assert!(reset.starts_with("HTTP/1.1 200"), "{reset}");
    assert_eq!(edge.get("/_local/counters").await["actions"], serde_json::json!({}));
    let missing = edge.get("/_local/nothing").await;
    assert_eq!(missing["__type"], "NotFoundException");
}

#[tokio::test]
async fn the_server_stops_with_its_owner() {
    let edge = Edge::start().await;
    let address = edge.aws.address;
    let mut open = TcpStream::connect(address).await.unwrap();
    drop(edge);
    // An open connection is ended.
    assert_eq!(open.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

#[test]
fn times_are_written_as_the_service_writes_them() {
    assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
    assert_eq!(rfc3339(951_782_400_123), "2000-02-29T00:00:00.123Z");
    assert_eq!(rfc3339(1_735_689_599_999), "2024-12-31T23:59:59.999Z");
}

#[test]
fn a_call_names_a_partition_in_its_key_its_item_or_its_condition() {
    let of = |table, call: Value| row(table, call.to_string().as_bytes());
    let item = serde_json::json!({"tunnel": {"S": "web"}, "connection_id": {"S": "#name"}});
    assert_eq!(of(Table::Connections, serde_json::json!({"Key": item})).as_deref(), Some("web"));
    assert_eq!(of(Table::Connections, serde_json::json!({"Item": item})).as_deref(), Some("web"));
    assert_eq!(of(Table::Deliveries, serde_json::json!({"Item": item})), None, "its key has another name");
    for condition in ["pk = :pk", "pk = :pk AND sk > :sk", "sk > :sk AND pk = :pk"] {
        let values = serde_json::json!({":pk": {"S": "p#web"}, ":sk": {"S": "t#web"}});
        let call =
            serde_json::json!({"KeyConditionExpression": condition, "ExpressionAttributeValues": values});
        assert_eq!(of(Table::Deliveries, call.clone()).as_deref(), Some("p#web"), "{condition}");
        assert_eq!(of(Table::Connections, call), None, "{condition}");
    }
    assert_eq!(of(Table::Deliveries, serde_json::json!({"TableName": "deliveries"})), None);
}

#[test]
fn the_access_key_is_read_from_the_signature() {
    let header =
        "AWS4-HMAC-SHA256 Credential=KEY/20260101/eu/sqs/aws4_request, SignedHeaders=host, Signature=0";
    assert_eq!(access_key(header), Some("KEY"));
    assert_eq!(access_key("AWS4-HMAC-SHA256 Credential=/x"), None);
    assert_eq!(access_key("Bearer KEY/"), None);
}
