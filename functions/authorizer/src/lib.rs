//! Lambda: decides who may open an agent connection.
//!
//! API Gateway asks with the `$connect` request of an agent, before the connection exists. The
//! token in it is verified against the configured keys, and the answer is a policy: `Allow` with
//! the owner, the tunnels and the end of the token as context, on which `connect` and `response`
//! rely, or `Deny` with an empty context, which API Gateway turns into 403. Every refusal looks
//! the same to the caller; the reason goes to the log, and nothing of a token ever does.
//!
//! Three outcomes are no policy but errors: no credential at all is [`Error::Unauthorized`] (401),
//! keys that cannot be fetched are [`Error::Unavailable`] (500), so that an agent tries again
//! instead of giving up over an outage of the identity provider. None of them lets anyone in.
//!
//! It reads no table and calls nothing but, if so configured, the identity provider's JWK set.

use std::process::ExitCode;

use aws_lambda_events::apigw::ApiGatewayCustomAuthorizerRequestTypeRequest as Event;
use edge::config::Env;
use lambda_runtime::{Diagnostic, LambdaEvent, service_fn};
use serde_json::value::RawValue;

pub mod config;
mod credential;
mod json;
pub mod key;
pub mod policy;
pub mod remote;
pub mod verify;

use config::{Config, ConfigError, KeySource};
use policy::Policy;
use remote::Lookup;
use verify::{Identity, Reason, Refusal};

/// Outcomes that are not a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no credential. API Gateway turns exactly this text into 401.
    #[error("Unauthorized")]
    Unauthorized,
    /// Nobody can tell at present whether the credential is good.
    #[error("Unavailable")]
    Unavailable,
}

impl From<Error> for Diagnostic {
    fn from(error: Error) -> Self {
        Self { error_type: error.to_string(), error_message: error.to_string() }
    }
}

/// Keys and rules; without them, a refusal of everything.
#[derive(Debug)]
pub struct Authorizer(Option<Config>);

impl Authorizer {
    /// Takes a configuration. One with an error is logged, and refuses everything.
    #[must_use]
    pub fn new(config: Result<Config, ConfigError>) -> Self {
        match config {
            Ok(config) => Self(Some(config)),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, cause, "authorizer is not configured, every connection is refused");
                Self(None)
            }
        }
    }

    /// Answers one event of API Gateway, as JSON, at the Unix time `now` in seconds.
    ///
    /// # Errors
    ///
    /// [`Error`] where the answer is not a policy.
    pub async fn answer(&self, event: &str, now: u64) -> Result<Policy, Error> {
        // Decoded here and not by the runtime, which would log the value that it stumbles over.
        let Ok(event) = serde_json::from_str::<Event>(event) else {
            return Ok(refuse(None, &Reason::Event.into()));
        };
        let arn = event.method_arn.as_deref();
        match self.decide(&event, now).await {
            Ok(Decision::Allowed(identity)) => {
                let Some(arn) = arn else { return Ok(refuse(None, &Reason::Event.into())) };
                tracing::info!(owner = %identity.owner, tunnels = %identity.tunnels, "agent connection allowed");
                Ok(Policy::allow(arn, &identity))
            }
            Ok(Decision::NoCredential) => {
                tracing::info!("agent connection without a credential refused");
                Err(Error::Unauthorized)
            }
            Ok(Decision::Undecided) => Err(Error::Unavailable),
            Err(refusal) => Ok(refuse(arn, &refusal)),
        }
    }

    async fn decide(&self, event: &Event, now: u64) -> Result<Decision, Refusal> {
        let Some(token) = credential::token(event)? else { return Ok(Decision::NoCredential) };
        let config = self.0.as_ref().ok_or(Reason::NotConfigured)?;
        let token = verify::parse(token)?;
        let found = match &config.keys {
            KeySource::Fixed(keys) => {
                keys.get(token.key_id()).cloned().map_or(Lookup::Unknown, Lookup::Found)
            }
            KeySource::Remote(remote) => remote.find(token.key_id(), now).await,
        };
        match found {
            Lookup::Found(key) => token.verify(&key, &config.rules, now).map(Decision::Allowed),
            Lookup::Unknown => Err(token.refused(Reason::UnknownKey)),
            Lookup::Unavailable => Ok(Decision::Undecided),
        }
    }
}

enum Decision {
    Allowed(Identity),
    NoCredential,
    Undecided,
}

fn refuse(arn: Option<&str>, Refusal { reason, key_id, owner }: &Refusal) -> Policy {
    let (key_id, owner) =
        (key_id.as_ref().map(tracing::field::display), owner.as_ref().map(tracing::field::display));
    tracing::warn!(%reason, key_id, owner, "agent connection refused");
    edge::metrics::count(edge::metrics::Counted::TokensRefused);
    Policy::deny(arn)
}

/// Runs the function under Lambda's Runtime API until its environment ends.
#[must_use]
pub fn run() -> ExitCode {
    edge::telemetry::init();
    let authorizer = Authorizer::new(Config::from_env(&Env::process()));
    edge::metrics::cold_start();
    let ended = edge::runtime::run(async move {
        let serve = lambda_runtime::run(service_fn(async |event: LambdaEvent<Box<RawValue>>| {
            let answer = authorizer.answer(event.payload.get(), edge::unix_now()).await;
            edge::metrics::flush();
            answer
        }));
        serve.await
    });
    match ended.map_err(Into::into).and_then(|ended| ended) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "runtime ended");
            ExitCode::FAILURE
        }
    }
}
