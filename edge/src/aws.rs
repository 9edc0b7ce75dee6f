//! How the SDK clients are made: region and credentials from the environment Lambda gives a function,
//! and one HTTP client for all of them.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use aws_config::{
    BehaviorVersion, Region, SdkConfig, ecs::EcsCredentialsProvider,
    environment::EnvironmentVariableCredentialsProvider, provider_config::ProviderConfig, retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_dynamodb::{operation::update_item::builders::UpdateItemFluentBuilder, types::AttributeValue};
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        connection::{CaptureSmithyConnection, ConnectionMetadata},
        interceptors::{
            Intercept, OverriddenHooks, SharedInterceptor,
            context::{BeforeTransmitInterceptorContextMut, FinalizerInterceptorContextRef},
        },
        result::SdkError,
        runtime_components::RuntimeComponents,
        stalled_stream_protection::StalledStreamProtectionConfig,
    },
};
use aws_smithy_types::{config_bag::ConfigBag, error::metadata::ProvideErrorMetadata};

use crate::{
    Error,
    config::{ConfigError, Env},
    metrics::{self, Counted},
    signature::{ShortName, Signature},
};

/// The variables that tell a task of ECS where its credentials are.
const CONTAINER_CREDENTIALS: [&str; 2] =
    ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];

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
        let http = aws_smithy_http_client::Builder::new();
        let http = if plain {
            http.build_http()
        } else {
            http.tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc)).build_https()
        };
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
                RetryConfig::standard().with_max_attempts(4).with_initial_backoff(Duration::from_millis(50)),
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

    /// For receiving: long polls last up to 20 s.
    pub(crate) fn sqs_receiver(&self) -> aws_sdk_sqs::Client {
        self.sqs_with(Duration::from_secs(30))
    }

    /// For everything else. A message that is sent is numbered, so a second copy does no harm; and all
    /// four attempts fit the life of the function that sends, ten seconds.
    pub(crate) fn sqs(&self) -> aws_sdk_sqs::Client {
        self.sqs_with(Duration::from_secs(2))
    }

    fn sqs_with(&self, attempt: Duration) -> aws_sdk_sqs::Client {
        let mut config = aws_sdk_sqs::config::Builder::from(&self.shared)
            .timeout_config(timeouts(attempt))
            .push_auth_scheme(Signature::new("sqs", self.region.clone()));
        config.push_interceptor(SharedInterceptor::permanent(ShortName));
        aws_sdk_sqs::Client::from_conf(config.build())
    }

    pub(crate) fn sfn(&self) -> aws_sdk_sfn::Client {
        let mut config = self
            .states()
            // A run dispatches a request to an upstream: whether a failed call started one is not known,
            // so it is never started again.
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts(proto::limits::RUN_DURATION + Duration::from_secs(5)));
        if self.custom_endpoint {
            config.push_interceptor(SharedInterceptor::permanent(WithoutSyncPrefix));
        }
        aws_sdk_sfn::Client::from_conf(config.build())
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
        config.push_interceptor(SharedInterceptor::permanent(FreshConnection::new(CONNECTION_IDLE)));
        config
    }

    pub(crate) fn agent_link(&self, endpoint: &str) -> aws_sdk_apigatewaymanagement::Client {
        let config = aws_sdk_apigatewaymanagement::config::Builder::from(&self.shared).endpoint_url(endpoint);
        aws_sdk_apigatewaymanagement::Client::from_conf(config.build())
    }
}

/// After so much silence a connection may be gone without a word: Lambda freezes the process, and what watches the pool's
/// connections with it. AWS closes idle ones after 20 s and more.
const CONNECTION_IDLE: Duration = Duration::from_secs(20);

/// Has a connection that was silent for long replaced. By the clock on the wall: the other one may stand still while the
/// process is frozen.
#[derive(Debug)]
pub struct FreshConnection {
    idle: Duration,
    last: Mutex<Option<(SystemTime, ConnectionMetadata)>>,
}

impl FreshConnection {
    /// One that lets a connection be silent for `idle`.
    #[must_use]
    pub fn new(idle: Duration) -> Self {
        Self { idle, last: Mutex::default() }
    }

    fn last(&self) -> MutexGuard<'_, Option<(SystemTime, ConnectionMetadata)>> {
        // Nothing that runs under the lock can panic half way.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Intercept for FreshConnection {
    fn name(&self) -> &'static str {
        "FreshConnection"
    }

    fn overridden_hooks(&self) -> OverriddenHooks {
        OverriddenHooks::MODIFY_BEFORE_TRANSMIT | OverriddenHooks::READ_AFTER_ATTEMPT
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some((at, connection)) = self.last().take()
            // A clock that was set back says nothing.
            && at.elapsed().map_or(true, |silent| silent >= self.idle)
        {
            connection.poison();
        }
        // The SDK's own interceptor does the same, before or after this one: the later one counts for both.
        let capture = CaptureSmithyConnection::new();
        context.request_mut().add_extension(capture.clone());
        config.interceptor_state().store_put(capture);
        Ok(())
    }

    fn read_after_attempt(
        &self,
        _context: &FinalizerInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let connection = config.load::<CaptureSmithyConnection>().and_then(CaptureSmithyConnection::get);
        *self.last() = connection.map(|connection| (SystemTime::now(), connection));
        Ok(())
    }
}

/// Whether a failed call has sent nothing: no connection came about.
pub(crate) fn is_unsent<E, R>(error: &SdkError<E, R>) -> bool {
    let SdkError::DispatchFailure(failure) = error else { return false };
    let mut source = failure.as_connector_error().and_then(std::error::Error::source);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
            return matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable);
        }
        source = error.source();
    }
    false
}

fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(attempt)
        .build()
}

/// Takes back the `sync-` that the SDK puts before the host of `StartSyncExecution`: on a custom endpoint
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
        Error::Failed { call, source: text.into() }
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
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use aws_sdk_sfn::operation::start_sync_execution::StartSyncExecutionError;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// Answers every call with an error that is not tried again; how many connections it took.
    async fn server() -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut came = Vec::new();
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        came.extend_from_slice(&buffer[..read]);
                        // The input is one JSON object, the last thing of the request.
                        if came.ends_with(b"}") {
                            came.clear();
                            let answer = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
                            drop(stream.write_all(answer.as_bytes()).await);
                        }
                    }
                });
            }
        });
        (url, count)
    }

    async fn calls(
        url: &str,
        idle: Duration,
    ) -> Result<(), aws_sdk_sfn::error::SdkError<StartSyncExecutionError>> {
        let lookup = |name: &str| match name {
            "AWS_REGION" => Some("local-1".to_owned()),
            "AWS_ENDPOINT_URL" => Some(url.to_owned()),
            _ => None,
        };
        let aws = Aws::from_env(&Env::new(&lookup)).unwrap();
        let keys = aws_credential_types::Credentials::new("key", "secret", None, None, "this test");
        let config = aws_sdk_sfn::config::Builder::from(&aws.shared)
            .credentials_provider(keys)
            .retry_config(RetryConfig::disabled())
            .interceptor(WithoutSyncPrefix)
            .interceptor(FreshConnection::new(idle));
        let client = aws_sdk_sfn::Client::from_conf(config.build());
        let call = || client.start_sync_execution().state_machine_arn("arn").input("x").send();
        drop(call().await);
        drop(call().await);
        call().await.map(drop)
    }

    #[tokio::test]
    async fn a_connection_that_was_silent_for_long_is_not_used_again() {
        let (url, count) = server().await;
        let error = calls(&url, CONNECTION_IDLE).await.unwrap_err();
        assert!(!is_unsent(&error), "{error:?}");
        assert_eq!(count.load(Ordering::SeqCst), 1, "one connection for three calls");
        calls(&url, Duration::ZERO).await.unwrap_err();
        assert_eq!(count.load(Ordering::SeqCst), 4, "one for each");
    }

    #[tokio::test]
    async fn what_met_nobody_was_not_sent() {
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = calls(&format!("http://{nobody}"), CONNECTION_IDLE).await.unwrap_err();
        assert!(is_unsent(&error), "{error:?}");
    }
}
