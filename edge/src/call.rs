//! The calls that every public request makes, without what a client of an SDK does anew for each. Enters: an operation of
//! an SDK and its [`Form`], once, and its input. Leaves: its output or the SDK's own error.
//!
//! A client puts its configuration together for each call: a dozen plugins with their components, some twenty interceptors,
//! rules that find an endpoint out of a region. That was as much work as the call itself. Here all of it is put together once,
//! and the SDK's orchestrator runs with that. From the SDK come the operation's errors and what of them is tried again, the
//! retry strategy, time-outs, the endpoint, credentials and their cache, and the correction of the clock. Left out are an
//! attempt's number and id, which AWS only writes down, and features that are off here: checks of stalled streams and
//! telemetry.

use std::{
    fmt::Debug,
    future::Future as _,
    marker::PhantomData,
    pin::pin,
    task::{Context, Poll, Waker},
};

use aws_config::{Region, SdkConfig};
use aws_runtime::{
    auth::sigv4, recursion_detection::RecursionDetectionInterceptor,
    service_clock_skew::ServiceClockSkewInterceptor,
};
use aws_smithy_async::{rt::sleep::TokioSleep, time::SystemTimeSource};
use aws_smithy_runtime::client::{
    identity::IdentityCache,
    orchestrator::invoke,
    retries::{TokenBucket, classifiers::HttpStatusCodeClassifier, strategy::StandardRetryStrategy},
};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::{
    auth::{
        SharedAuthScheme, SharedAuthSchemeOptionResolver, static_resolver::StaticAuthSchemeOptionResolver,
    },
    endpoint::{
        EndpointFuture, EndpointPrefix, EndpointResolverParams, ResolveEndpoint, SharedEndpointResolver,
        error::ResolveEndpointError,
    },
    identity::SharedIdentityResolver,
    interceptors::{
        SharedInterceptor,
        context::{Error, Input, Output},
    },
    orchestrator::{HttpRequest, HttpResponse, OrchestratorError},
    result::SdkError,
    retries::SharedRetryStrategy,
    runtime_components::RuntimeComponentsBuilder,
    runtime_plugin::{RuntimePlugin, RuntimePlugins, StaticRuntimePlugin},
    ser_de::{DeserializeResponse, SerializeRequest, SharedRequestSerializer, SharedResponseDeserializer},
    stalled_stream_protection::StalledStreamProtectionConfig,
};
use aws_smithy_types::{
    body::SdkBody,
    config_bag::{ConfigBag, FrozenLayer, Layer},
    endpoint::Endpoint,
    retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_types::{SigningName, region::SigningRegion};
use http::HeaderValue;

use crate::{
    signature::{ShortName, Signature},
    wire::Form,
};

/// One operation of a service, with all that its calls need.
#[derive(Debug)]
pub(crate) struct Call<I, O, E> {
    service: &'static str,
    operation: &'static str,
    plugins: RuntimePlugins,
    types: PhantomData<fn(I) -> Result<O, E>>,
}

/// What the calls of one operation have in common.
pub(crate) struct Settings<'a> {
    /// Region, credentials and HTTP client.
    pub(crate) shared: &'a SdkConfig,
    /// The name that is signed, such as `sqs`.
    pub(crate) signed_as: &'static str,
    pub(crate) signature: Signature,
    /// Where the service is, see [`fixed`].
    pub(crate) endpoint: SharedEndpointResolver,
    /// What goes before the endpoint's host.
    pub(crate) prefix: Option<EndpointPrefix>,
    pub(crate) retries: RetryConfig,
    pub(crate) timeouts: TimeoutConfig,
}

impl<I, O, E> Call<I, O, E>
where
    I: Debug + Send + Sync + 'static,
    O: Debug + Send + Sync + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    /// `plugin` is the SDK's of that `operation`, `E` its error.
    pub(crate) fn new(
        service: &'static str,
        operation: &'static str,
        plugin: &impl RuntimePlugin,
        form: Form<I, O>,
        settings: Settings<'_>,
    ) -> Self {
        let Settings { shared, signed_as, signature, endpoint, prefix, retries, timeouts } = settings;
        let mut layer = Layer::new("call");
        layer.store_put(EndpointResolverParams::new(()));
        layer.store_put(SigningName::from_static(signed_as));
        if let Some(region) = shared.region() {
            layer.store_put(Region::clone(region));
            layer.store_put(SigningRegion::from(region.clone()));
        }
        if let Some(prefix) = prefix {
            layer.store_put(prefix);
        }
        layer.store_put(retries);
        layer.store_put(TokenBucket::default());
        layer.store_put(timeouts);
        layer.store_put(StalledStreamProtectionConfig::disabled());

        let mut components = RuntimeComponentsBuilder::new("call")
            .with_http_client(shared.http_client())
            .with_endpoint_resolver(Some(endpoint))
            .with_auth_scheme_option_resolver(Some(SharedAuthSchemeOptionResolver::new(
                StaticAuthSchemeOptionResolver::new(vec![sigv4::SCHEME_ID]),
            )))
            .with_auth_scheme(SharedAuthScheme::new(signature))
            .with_identity_cache(Some(IdentityCache::lazy().build()))
            .with_retry_strategy(Some(SharedRetryStrategy::new(StandardRetryStrategy::new())))
            .with_retry_classifier(HttpStatusCodeClassifier::default())
            .with_time_source(Some(SystemTimeSource::new()))
            .with_sleep_impl(Some(TokioSleep::new()))
            .with_interceptor(SharedInterceptor::permanent(ServiceClockSkewInterceptor::new()))
            .with_interceptor(SharedInterceptor::permanent(RecursionDetectionInterceptor::new()))
            .with_interceptor(SharedInterceptor::permanent(ShortName));
        components
            .extend_retry_classifiers(plugin.runtime_components(&components.clone()).retry_classifiers());
        if let Some(credentials) = shared.credentials_provider() {
            components.set_identity_resolver(sigv4::SCHEME_ID, SharedIdentityResolver::new(credentials));
        }
        let own = StaticRuntimePlugin::new().with_config(layer.freeze()).with_runtime_components(components);
        // How it is signed, and how its errors are read.
        let theirs = plugin.config().expect("every operation has a serializer");
        let mut layer = Layer::new("wire");
        layer.store_put(SharedResponseDeserializer::new(Reader { read: form.read, theirs: theirs.clone() }));
        layer.store_put(SharedRequestSerializer::new(form));
        let plugins = RuntimePlugins::new()
            .with_client_plugin(own)
            .with_operation_plugin(StaticRuntimePlugin::new().with_config(theirs))
            .with_operation_plugin(StaticRuntimePlugin::new().with_config(layer.freeze()));
        Self { service, operation, plugins, types: PhantomData }
    }

    /// One call, with its retries.
    ///
    /// # Errors
    ///
    /// What a client of the SDK would say.
    pub(crate) async fn send(&self, input: I) -> Result<O, SdkError<E, HttpResponse>> {
        let output = invoke(self.service, self.operation, Input::erase(input), &self.plugins).await.map_err(
            |error| {
                error.map_service_error(|error| {
                    error.downcast().expect("the operation's deserializer makes it")
                })
            },
        )?;
        Ok(output.downcast().expect("the operation's deserializer makes it"))
    }
}

impl<I: Debug + Send + Sync + 'static, O: Debug + 'static> SerializeRequest for Form<I, O> {
    fn serialize_input(&self, input: Input, _config: &mut ConfigBag) -> Result<HttpRequest, BoxError> {
        let input = input.downcast::<I>().map_err(|_| "this is another operation's input")?;
        let body = (self.write)(&input)?;
        let length = body.len();
        let mut request = HttpRequest::new(SdkBody::from(body));
        request.set_method("POST")?;
        let headers = request.headers_mut();
        headers.insert("content-type", "application/x-amz-json-1.0");
        headers.insert("x-amz-target", self.target);
        for &(name, value) in self.fields {
            headers.insert(name, value);
        }
        headers.insert("content-length", HeaderValue::from(length));
        Ok(request)
    }
}

/// Reads answers: what went well by `read`, errors as the SDK does.
#[derive(Debug)]
struct Reader<O> {
    read: fn(&str) -> serde_json::Result<O>,
    theirs: FrozenLayer,
}

impl<O: Debug + Send + Sync + 'static> DeserializeResponse for Reader<O> {
    fn deserialize_nonstreaming_with_config(
        &self,
        response: &HttpResponse,
        config: &ConfigBag,
    ) -> Result<Output, OrchestratorError<Error>> {
        if !response.status().is_success() {
            let theirs = self.theirs.load::<SharedResponseDeserializer>();
            let theirs = theirs.expect("every operation has a deserializer");
            return theirs.deserialize_nonstreaming_with_config(response, config);
        }
        // The orchestrator has read all of it. As a whole: of bytes each string would be looked at once more. What cannot be
        // read is no error of the way: it is not asked for again.
        let text = std::str::from_utf8(response.body().bytes().unwrap_or_default());
        let text = text.map_err(OrchestratorError::other)?;
        (self.read)(text).map(Output::erase).map_err(OrchestratorError::other)
    }
}

/// An endpoint that is looked up once. What is wrong with it, each call says.
pub(crate) fn fixed<E: std::fmt::Display>(
    resolver: SharedEndpointResolver,
    params: Result<EndpointResolverParams, E>,
) -> SharedEndpointResolver {
    let find = |params: EndpointResolverParams| {
        let mut found = pin!(resolver.resolve_endpoint(&params));
        // The SDK's rules wait for nothing.
        match found.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(found) => found.map_err(|error| error.to_string()),
            Poll::Pending => Err("it is not known at once".to_owned()),
        }
    };
    SharedEndpointResolver::new(Fixed(params.map_err(|error| error.to_string()).and_then(find)))
}

#[derive(Debug)]
struct Fixed(Result<Endpoint, String>);

impl ResolveEndpoint for Fixed {
    fn resolve_endpoint<'a>(&'a self, _params: &'a EndpointResolverParams) -> EndpointFuture<'a> {
        EndpointFuture::ready(self.0.clone().map_err(|error| ResolveEndpointError::message(error).into()))
    }
}
