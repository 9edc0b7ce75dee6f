//! How the SDK clients are made: region and credentials from the environment Lambda gives a function,
//! and one HTTP client for all of them.

use std::time::Duration;

use aws_config::{
    BehaviorVersion, Region, SdkConfig, ecs::EcsCredentialsProvider,
    environment::EnvironmentVariableCredentialsProvider, provider_config::ProviderConfig, retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        interceptors::{Intercept, context::BeforeTransmitInterceptorContextMut},
        runtime_components::RuntimeComponents,
        stalled_stream_protection::StalledStreamProtectionConfig,
    },
};
use aws_smithy_types::config_bag::ConfigBag;

use crate::{
    Error,
    config::{ConfigError, Env},
    metrics::{self, Counted},
};

/// The variables that tell a task of ECS where its credentials are.
const CONTAINER_CREDENTIALS: [&str; 2] =
    ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];

/// What every client of one function shares.
#[derive(Debug, Clone)]
pub struct Aws {
    shared: SdkConfig,
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
            .region(Region::new(region))
            .credentials_provider(credentials)
            .http_client(http)
            .retry_config(
                RetryConfig::standard().with_max_attempts(4).with_initial_backoff(Duration::from_millis(50)),
            )
            .timeout_config(timeouts(Duration::from_secs(10)))
            // Answers are small and wanted at once; a long poll is a stall by design.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        shared.set_endpoint_url(endpoint.clone());
        Ok(Self { shared: shared.build(), custom_endpoint: endpoint.is_some() })
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
        let config = aws_sdk_sqs::config::Builder::from(&self.shared).timeout_config(timeouts(attempt));
        aws_sdk_sqs::Client::from_conf(config.build())
    }

    pub(crate) fn sfn(&self) -> aws_sdk_sfn::Client {
        let mut config = aws_sdk_sfn::config::Builder::from(&self.shared)
            // A run dispatches a request to an upstream: whether a failed call started one is not known,
            // so it is never started again.
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts(proto::limits::RUN_DURATION + Duration::from_secs(5)));
        if self.custom_endpoint {
            config = config.interceptor(WithoutSyncPrefix);
        }
        aws_sdk_sfn::Client::from_conf(config.build())
    }

    pub(crate) fn agent_link(&self, endpoint: &str) -> aws_sdk_apigatewaymanagement::Client {
        let config = aws_sdk_apigatewaymanagement::config::Builder::from(&self.shared).endpoint_url(endpoint);
        aws_sdk_apigatewaymanagement::Client::from_conf(config.build())
    }
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

/// Sorts an SDK error by what a caller can do about it.
pub(crate) fn classify<E, R>(
    call: &'static str,
    error: aws_smithy_runtime_api::client::result::SdkError<E, R>,
) -> Error
where
    E: aws_smithy_types::error::metadata::ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
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
