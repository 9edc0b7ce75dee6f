//! How the SDK clients are made: region and credentials from the environment Lambda gives a function,
//! and one HTTP client for all of them.

use std::time::Duration;

use aws_config::{
    BehaviorVersion, Region, SdkConfig, ecs::EcsCredentialsProvider,
    environment::EnvironmentVariableCredentialsProvider, provider_config::ProviderConfig, retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_dynamodb::{operation::update_item::builders::UpdateItemFluentBuilder, types::AttributeValue};
use aws_sdk_sfn::operation::start_sync_execution::{StartSyncExecution, StartSyncExecutionError};
use aws_sdk_sqs::operation::{
    receive_message::{ReceiveMessage, ReceiveMessageError},
    send_message::{SendMessage, SendMessageError},
};
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        endpoint::{EndpointPrefix, EndpointResolverParams},
        http::SharedHttpClient,
        interceptors::{
            Intercept, OverriddenHooks, SharedInterceptor, context::BeforeTransmitInterceptorContextMut,
        },
        result::SdkError,
        runtime_components::RuntimeComponents,
        stalled_stream_protection::StalledStreamProtectionConfig,
    },
};
use aws_smithy_types::{config_bag::ConfigBag, error::metadata::ProvideErrorMetadata, retry::ReconnectMode};

use crate::{
    Error,
    call::{self, Call, Settings},
    config::{ConfigError, Env},
    connections::{Connections, SendError},
    connector::Client,
    metrics::{self, Counted},
    signature::{ShortName, Signature},
    wire::{self, Ended, Message, Receive, Received, Sent, Start},
};

/// The variables that tell a task of ECS where its credentials are.
const CONTAINER_CREDENTIALS: [&str; 2] =
    ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];

/// How long an attempt of a call of SQS may take, a long poll aside.
const SQS_ATTEMPT: Duration = Duration::from_secs(2);

pub(crate) type SendMessageCall = Call<Message, Sent, SendMessageError>;
pub(crate) type ReceiveMessageCall = Call<Receive, Received, ReceiveMessageError>;
pub(crate) type StartSyncExecutionCall = Call<Start, Ended, StartSyncExecutionError>;

/// What every client of one function shares.
#[derive(Debug, Clone)]
pub struct Aws {
    shared: SdkConfig,
    region: String,
    custom_endpoint: bool,
}

impl Aws {
    /// Reads region, credentials and, if there is one, `AWS_ENDPOINT_URL`.
    ///
    /// Files, profiles and the instance metadata service are never asked: a function has its
    /// credentials in its environment, and start-up time counts. A task of ECS is told where to ask for its own.
    ///
    /// # Errors
    ///
    /// When there is no region.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let region = env.required("AWS_REGION")?;
        let endpoint = env.optional("AWS_ENDPOINT_URL");
        // Without TLS the trust store need not be read, which is most of the start-up time.
        let plain = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        let http = SharedHttpClient::new(Client(Connections::new(plain)));
        let is_task = CONTAINER_CREDENTIALS.iter().any(|name| env.optional(name).is_some());
        let credentials = if is_task {
            let config = ProviderConfig::without_region().with_http_client(http.clone());
            SharedCredentialsProvider::new(EcsCredentialsProvider::builder().configure(&config).build())
        } else {
            SharedCredentialsProvider::new(EnvironmentVariableCredentialsProvider::new())
        };
        let mut shared = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(region.clone()))
            .credentials_provider(credentials)
            .http_client(http)
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(4)
                    .with_initial_backoff(Duration::from_millis(50))
                    // `Connections` itself sees to that a connection that failed is not used again.
                    .with_reconnect_mode(ReconnectMode::ReuseAllConnections),
            )
            .timeout_config(timeouts(Duration::from_secs(10)))
            // Answers are small and wanted at once; a long poll is a stall by design.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        shared.set_endpoint_url(endpoint.clone());
        Ok(Self { shared: shared.build(), region, custom_endpoint: endpoint.is_some() })
    }

    pub(crate) fn dynamodb(&self) -> aws_sdk_dynamodb::Client {
        aws_sdk_dynamodb::Client::new(&self.shared)
    }

    pub(crate) fn scaling(&self) -> aws_sdk_applicationautoscaling::Client {
        let config = aws_sdk_applicationautoscaling::config::Builder::from(&self.shared)
            .timeout_config(timeouts(Duration::from_secs(2)));
        aws_sdk_applicationautoscaling::Client::from_conf(config.build())
    }

    /// For everything but what [`Call`] does. A message that is sent is numbered, so a second copy does no harm; and all
    /// four attempts fit the life of the function that sends, ten seconds.
    pub(crate) fn sqs(&self) -> aws_sdk_sqs::Client {
        let mut config = aws_sdk_sqs::config::Builder::from(&self.shared)
            .timeout_config(timeouts(SQS_ATTEMPT))
            .push_auth_scheme(Signature::new("sqs", self.region.clone()));
        config.push_interceptor(SharedInterceptor::permanent(ShortName));
        aws_sdk_sqs::Client::from_conf(config.build())
    }

    /// Sends one message; as to retries and time-outs see [`Aws::sqs`].
    pub(crate) fn send_message(&self) -> SendMessageCall {
        let settings = self.sqs_settings(SQS_ATTEMPT);
        Call::new("SQS", "SendMessage", &SendMessage::new(), wire::SEND_MESSAGE, settings)
    }

    /// Receives messages: long polls last up to 20 s.
    pub(crate) fn receive_message(&self) -> ReceiveMessageCall {
        let settings = self.sqs_settings(Duration::from_secs(30));
        Call::new("SQS", "ReceiveMessage", &ReceiveMessage::new(), wire::RECEIVE_MESSAGE, settings)
    }

    fn sqs_settings(&self, attempt: Duration) -> Settings<'_> {
        use aws_sdk_sqs::config::endpoint::{DefaultResolver, Params, ResolveEndpoint as _};
        let params = Params::builder().region(&self.region);
        let params = params.set_endpoint(self.shared.endpoint_url().map(str::to_owned)).build();
        Settings {
            shared: &self.shared,
            signed_as: "sqs",
            signature: Signature::new("sqs", self.region.clone()),
            endpoint: call::fixed(
                DefaultResolver::new().into_shared_resolver(),
                params.map(EndpointResolverParams::new),
            ),
            prefix: None,
            retries: self.shared.retry_config().cloned().unwrap_or_else(RetryConfig::standard),
            timeouts: timeouts(attempt),
        }
    }

    /// Runs an Express state machine and waits for its end.
    pub(crate) fn start_sync_execution(&self) -> StartSyncExecutionCall {
        use aws_sdk_sfn::config::endpoint::{DefaultResolver, Params, ResolveEndpoint as _};
        let params = Params::builder().region(&self.region);
        let params = params.set_endpoint(self.shared.endpoint_url().map(str::to_owned)).build();
        let settings = Settings {
            shared: &self.shared,
            signed_as: "states",
            signature: Signature::new("states", self.region.clone()),
            endpoint: call::fixed(
                DefaultResolver::new().into_shared_resolver(),
                params.map(EndpointResolverParams::new),
            ),
            // This call has a host of its own at AWS; on a custom endpoint there is none.
            prefix: (!self.custom_endpoint)
                .then(|| EndpointPrefix::new("sync-").expect("it is one label of a host's name")),
            // A run dispatches a request to an upstream: whether a failed call started one is not known,
            // so it is never started again.
            retries: RetryConfig::disabled(),
            timeouts: timeouts(proto::limits::RUN_DURATION + Duration::from_secs(5)),
        };
        let form = wire::START_SYNC_EXECUTION;
        Call::new("SFN", "StartSyncExecution", &StartSyncExecution::new(), form, settings)
    }

    /// For STANDARD runs: starting one by its name twice starts it once, and a token is used once, so calls are tried again.
    pub(crate) fn runs(&self) -> aws_sdk_sfn::Client {
        let config = self.states().timeout_config(timeouts(Duration::from_secs(5)));
        aws_sdk_sfn::Client::from_conf(config.build())
    }

    /// What every client of Step Functions has.
    fn states(&self) -> aws_sdk_sfn::config::Builder {
        let mut config = aws_sdk_sfn::config::Builder::from(&self.shared)
            .push_auth_scheme(Signature::new("states", self.region.clone()));
        // Permanent: whether one is switched off would be looked up for each of its hooks, a few hundred times a request.
        config.push_interceptor(SharedInterceptor::permanent(ShortName));
        config
    }

    pub(crate) fn agent_link(&self, endpoint: &str) -> aws_sdk_apigatewaymanagement::Client {
        let mut config = aws_sdk_apigatewaymanagement::config::Builder::from(&self.shared)
            .endpoint_url(endpoint)
            .push_auth_scheme(Signature::new("execute-api", self.region.clone()));
        config.push_interceptor(SharedInterceptor::permanent(ShortName));
        aws_sdk_apigatewaymanagement::Client::from_conf(config.build())
    }
}

/// Whether a failed call has sent nothing: no connection came about.
pub(crate) fn is_unsent<E, R>(error: &SdkError<E, R>) -> bool {
    let SdkError::DispatchFailure(failure) = error else { return false };
    let source = failure.as_connector_error().and_then(std::error::Error::source);
    matches!(source.and_then(|source| source.downcast_ref()), Some(SendError::Connect(_)))
}

fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(attempt)
        .build()
}

/// Takes back the `sync-` that a client of the SDK puts before the host of `StartSyncExecution`: on a custom endpoint
/// there is no such host.
#[derive(Debug)]
pub struct WithoutSyncPrefix;

impl Intercept for WithoutSyncPrefix {
    fn name(&self) -> &'static str {
        "WithoutSyncPrefix"
    }

    fn overridden_hooks(&self) -> OverriddenHooks {
        OverriddenHooks::MODIFY_BEFORE_SIGNING
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        let uri = request.uri().replacen("://sync-", "://", 1);
        request.set_uri(uri)?;
        Ok(())
    }
}

/// Whether the service answered a call with this error.
pub(crate) fn is_code<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>, code: &str) -> bool {
    error.as_service_error().is_some_and(|error| error.code() == Some(code))
}

/// What a write with a condition gave; `None` where the condition did not hold.
pub(crate) fn if_held<T, E, R>(
    call: &'static str,
    result: Result<T, SdkError<E, R>>,
) -> Result<Option<T>, Error>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    match result {
        Ok(output) => Ok(Some(output)),
        Err(error) if is_code(&error, "ConditionalCheckFailedException") => Ok(None),
        Err(error) => Err(classify(call, error)),
    }
}

/// Writes, and says whether the condition held.
pub(crate) async fn holds(update: UpdateItemFluentBuilder) -> Result<bool, Error> {
    Ok(if_held("UpdateItem", update.send().await)?.is_some())
}

/// Sorts an SDK error by what a caller can do about it.
pub(crate) fn classify<E, R>(call: &'static str, error: SdkError<E, R>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let throttled = error.as_service_error().and_then(|error| error.code()).is_some_and(|code| {
        code.contains("Throttl")
            || code.contains("LimitExceeded")
            || code.contains("ProvisionedThroughputExceeded")
    });
    if throttled {
        metrics::count(Counted::Throttles);
        Error::Throttled { call }
    } else {
        // The SDK's own text is "service error"; the code and message are below it.
        let text = error.as_service_error().map_or_else(
            || aws_smithy_types::error::display::DisplayErrorContext(&error).to_string(),
            |error| {
                format!("{}: {}", error.code().unwrap_or("no code"), error.message().unwrap_or("no message"))
            },
        );
        let source = text.into();
        let answered = matches!(error, SdkError::ServiceError(_) | SdkError::ConstructionFailure(_));
        if answered || is_unsent(&error) {
            Error::Failed { call, source }
        } else {
            Error::Unanswered { call, source }
        }
    }
}

/// A string in a table.
pub(crate) fn text(value: &str) -> AttributeValue {
    AttributeValue::S(value.to_owned())
}

/// A number in a table.
pub(crate) fn number(value: u64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, VecDeque},
        sync::{Arc, Mutex},
    };

    use aws_sdk_sfn::operation::start_sync_execution::StartSyncExecutionInput;
    use aws_sdk_sqs::operation::send_message::SendMessageInput;
    use aws_smithy_runtime_api::{
        client::{
            http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn},
            orchestrator::{HttpRequest, HttpResponse},
        },
        http::StatusCode,
    };
    use aws_smithy_types::body::SdkBody;
    use tokio::net::TcpListener;

    use super::*;
    use crate::wire::Attributes;

    #[tokio::test]
    async fn what_met_nobody_was_not_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let call = async |scheme: &str| {
            let url = format!("{scheme}://{address}");
            let lookup = |name: &str| match name {
                "AWS_REGION" => Some("local-1".to_owned()),
                "AWS_ENDPOINT_URL" => Some(url.clone()),
                _ => None,
            };
            let mut aws = Aws::from_env(&Env::new(&lookup)).unwrap();
            let keys = aws_credential_types::Credentials::new("key", "secret", None, None, "this test");
            let shared = aws.shared.into_builder();
            aws.shared = shared.credentials_provider(SharedCredentialsProvider::new(keys)).build();
            aws.start_sync_execution().send(start("x")).await.unwrap_err()
        };
        let lost = async || drop(listener.accept().await.unwrap());
        let (error, ()) = tokio::join!(call("http"), lost());
        assert!(!is_unsent(&error), "{error:?}");
        // Before TLS was agreed on, nothing of the call was.
        let (error, ()) = tokio::join!(call("https"), lost());
        assert!(is_unsent(&error), "{error:?}");
        drop(listener);
        let error = call("http").await;
        assert!(is_unsent(&error), "{error:?}");
    }

    /// Answers in turn with what is given, and keeps what was asked.
    #[derive(Debug, Clone)]
    struct Script {
        answers: Arc<Mutex<VecDeque<(u16, &'static str)>>>,
        asked: Arc<Mutex<Vec<HttpRequest>>>,
    }

    impl HttpConnector for Script {
        fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
            let (status, body) = self.answers.lock().unwrap().pop_front().unwrap();
            self.asked.lock().unwrap().push(request);
            let mut answer = HttpResponse::new(StatusCode::try_from(status).unwrap(), SdkBody::from(body));
            answer.headers_mut().insert("date", "Thu, 01 Jan 2037 00:00:30 GMT");
            HttpConnectorFuture::ready(Ok(answer))
        }
    }

    fn scripted(endpoint: Option<&str>, answers: &[(u16, &'static str)]) -> (Aws, Script) {
        let lookup = |name: &str| match name {
            "AWS_REGION" => Some("eu-central-1".to_owned()),
            "AWS_ENDPOINT_URL" => endpoint.map(str::to_owned),
            _ => None,
        };
        let mut aws = Aws::from_env(&Env::new(&lookup)).unwrap();
        let answers = Arc::new(Mutex::new(answers.iter().copied().collect()));
        let script = Script { answers, asked: Arc::default() };
        let client = script.clone();
        let client = http_client_fn(move |_, _| SharedHttpConnector::new(client.clone()));
        let keys =
            aws_credential_types::Credentials::new("key", "secret", Some("t".into()), None, "this test");
        let shared = aws.shared.into_builder().http_client(client);
        aws.shared = shared.credentials_provider(SharedCredentialsProvider::new(keys)).build();
        (aws, script)
    }

    const SENT: (u16, &str) = (200, r#"{"MessageId":"m","MD5OfMessageBody":"x"}"#);
    const RAN: (u16, &str) =
        (200, r#"{"executionArn":"a","startDate":1,"stopDate":2,"status":"SUCCEEDED","output":"{}"}"#);

    /// All that a string in JSON may need.
    fn every_character() -> String {
        (0..=0x250).chain([0x2028, 0xffff, 0x1_f600]).filter_map(char::from_u32).collect()
    }

    fn message(owner: Option<&str>) -> Message {
        let attributes = Attributes {
            request_id: "r\"1\"".to_owned(),
            connection_id: "c=".to_owned(),
            owner: owner.map(str::to_owned),
        };
        Message {
            queue_url: "https://queue".to_owned(),
            message_body: serde_json::value::to_raw_value(&every_character()).unwrap(),
            message_attributes: attributes,
        }
    }

    /// The same for a client of the SDK.
    fn their_message(
        owner: Option<&str>,
    ) -> aws_sdk_sqs::operation::send_message::builders::SendMessageInputBuilder {
        let text = |value: &str| {
            let value = aws_sdk_sqs::types::MessageAttributeValue::builder().string_value(value);
            value.data_type("String").build().unwrap()
        };
        let Message { queue_url, message_body: _, message_attributes } = message(owner);
        let message = SendMessageInput::builder()
            .queue_url(queue_url)
            .message_body(every_character())
            .message_attributes("request_id", text(&message_attributes.request_id))
            .message_attributes("connection_id", text(&message_attributes.connection_id));
        match message_attributes.owner {
            Some(owner) => message.message_attributes("owner", text(&owner)),
            None => message,
        }
    }

    fn receive() -> Receive {
        Receive {
            queue_url: "https://queue".to_owned(),
            message_system_attribute_names: ["SentTimestamp"],
            message_attribute_names: ["All"],
            max_number_of_messages: 10,
            visibility_timeout: 30,
            wait_time_seconds: 20,
        }
    }

    fn start(input: &str) -> Start {
        Start { state_machine_arn: "arn".into(), name: "n".to_owned(), input: input.to_owned() }
    }

    impl Script {
        /// What the calls had in them, but for what differs from call to call or is only written down at AWS.
        fn essence(&self) -> Vec<(String, String, BTreeMap<String, String>)> {
            const OTHER: [&str; 4] =
                ["amz-sdk-invocation-id", "amz-sdk-request", "authorization", "x-amz-date"];
            let asked = self.asked.lock().unwrap();
            let essence = |request: &HttpRequest| {
                let headers = request.headers().iter().filter(|(name, _)| !OTHER.contains(name));
                let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                let body = String::from_utf8(request.body().bytes().unwrap().to_vec()).unwrap();
                (format!("{} {}", request.method(), request.uri()), body, headers)
            };
            asked.iter().map(essence).collect()
        }

        fn dates(&self) -> Vec<String> {
            let asked = self.asked.lock().unwrap();
            asked.iter().map(|request| request.headers().get("x-amz-date").unwrap().to_owned()).collect()
        }
    }

    #[tokio::test]
    async fn a_call_asks_what_a_client_of_the_sdk_asks() {
        for (endpoint, owner, sqs, states) in [
            (
                None,
                Some("0a"),
                "https://sqs.eu-central-1.amazonaws.com/",
                "https://sync-states.eu-central-1.amazonaws.com/",
            ),
            (Some("http://127.0.0.1:9"), None, "http://127.0.0.1:9/", "http://127.0.0.1:9/"),
        ] {
            let (aws, script) = scripted(endpoint, &[SENT, SENT, RAN, RAN, (200, "{}"), (200, "{}")]);
            aws.send_message().send(message(owner)).await.unwrap();
            their_message(owner).send_with(&aws.sqs()).await.unwrap();
            let ran = aws.start_sync_execution().send(start(&every_character())).await.unwrap();
            assert_eq!((&*ran.status, ran.output.as_deref()), ("SUCCEEDED", Some("{}")));
            let mut theirs = aws.states();
            if endpoint.is_some() {
                theirs.push_interceptor(SharedInterceptor::new(WithoutSyncPrefix));
            }
            let run = StartSyncExecutionInput::builder().state_machine_arn("arn").name("n");
            let run = run.input(every_character());
            run.send_with(&aws_sdk_sfn::Client::from_conf(theirs.build())).await.unwrap();
            assert!(aws.receive_message().send(receive()).await.unwrap().messages.is_none());
            let theirs = aws.sqs().receive_message().queue_url("https://queue").max_number_of_messages(10);
            let theirs = theirs.visibility_timeout(30).wait_time_seconds(20).message_attribute_names("All");
            theirs.message_system_attribute_names("SentTimestamp".into()).send().await.unwrap();
            let asked = script.essence();
            assert_eq!((&asked[2], &asked[4]), (&asked[3], &asked[5]));
            // The SDK writes attributes in any order; all else is the same to the byte.
            let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(json(&asked[0].1), json(&asked[1].1));
            let before = |text: &str| text.split(r#","MessageAttributes""#).next().unwrap().to_owned();
            assert_eq!(before(&asked[0].1), before(&asked[1].1));
            assert_eq!((&asked[0].0, &asked[0].2), (&asked[1].0, &asked[1].2));
            assert_eq!((&*asked[0].0, &*asked[2].0), (&*format!("POST {sqs}"), &*format!("POST {states}")));
        }
    }

    #[tokio::test]
    async fn a_message_is_sent_again_and_a_run_is_never_started_again() {
        let (aws, script) = scripted(None, &[(500, "{}"), (503, "{}"), SENT]);
        aws.send_message().send(message(None)).await.unwrap();
        assert_eq!(script.dates().len(), 3);
        let (aws, script) = scripted(None, &[(500, "{}")]);
        aws.start_sync_execution().send(start("{}")).await.unwrap_err();
        assert_eq!(script.dates().len(), 1);
        // Throttled to the end.
        let throttled = (400, r#"{"__type":"com.amazonaws.sqs#RequestThrottled","message":"slow"}"#);
        let (aws, script) = scripted(None, &[throttled; 4]);
        let error = aws.send_message().send(message(None)).await.unwrap_err();
        assert!(matches!(classify("SendMessage", error), Error::Throttled { .. }));
        assert_eq!(script.dates().len(), 4);
    }

    #[tokio::test]
    async fn errors_of_a_call_are_the_operations_own() {
        let refused = (400, r#"{"__type":"com.amazonaws.sqs#InvalidMessageContents","message":"no"}"#);
        let (aws, script) = scripted(None, &[refused]);
        let error = aws.send_message().send(message(None)).await.unwrap_err();
        assert!(error.as_service_error().unwrap().is_invalid_message_contents(), "{error:?}");
        assert_eq!(script.dates().len(), 1);
    }

    #[tokio::test]
    async fn an_answer_that_cannot_be_read_is_an_error_and_nothing_is_asked_again() {
        let (aws, script) = scripted(None, &[(200, "<html>"), (200, r#"{"output":"{}"}"#)]);
        let error = aws.send_message().send(message(None)).await.unwrap_err();
        assert!(matches!(error, SdkError::ResponseError(_)), "{error:?}");
        let error = aws.start_sync_execution().send(start("{}")).await.unwrap_err();
        assert!(matches!(error, SdkError::ResponseError(_)), "{error:?}");
        assert_eq!(script.dates().len(), 2);
    }

    #[tokio::test]
    async fn a_clock_that_is_wrong_is_put_right_for_the_next_attempt() {
        let skewed = (403, r#"{"__type":"InvalidSignatureException","message":"expired"}"#);
        let (aws, script) = scripted(None, &[skewed, SENT]);
        aws.send_message().send(message(None)).await.unwrap();
        let dates = script.dates();
        assert!(!dates[0].starts_with("2037") && dates[1].starts_with("20370101T0000"), "{dates:?}");
    }
}
