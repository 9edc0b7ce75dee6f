//! How a buffered Lambda function runs: telemetry, environment, clients, then one event after the other.

use std::{process::ExitCode, sync::Arc};

use lambda_runtime::{Diagnostic, LambdaEvent, Runtime, service_fn};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    Error,
    config::{ConfigError, Env},
    metrics,
};

/// What API Gateway is told about an event of the agents' WebSocket API.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// 200; on `$connect` anything else refuses the connection.
    pub status_code: u16,
    /// A message for the agent, where the route has a response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

impl Answer {
    /// An answer with nothing for the agent.
    #[must_use]
    pub const fn status(status_code: u16) -> Self {
        Self { status_code, body: None }
    }

    /// A message for the agent.
    #[must_use]
    pub const fn message(body: String) -> Self {
        Self { status_code: 200, body: Some(body) }
    }
}

/// Runs a function until Lambda ends its process: `prepare` once, then `handle` for each event.
pub fn run<D, E, R, P, H, F>(prepare: P, handle: H) -> ExitCode
where
    D: 'static,
    E: for<'de> Deserialize<'de> + 'static,
    R: Serialize + 'static,
    P: FnOnce(&Env<'_>) -> Result<D, ConfigError>,
    H: Fn(E, Arc<D>) -> F + 'static,
    F: Future<Output = Result<R, Error>> + 'static,
{
    serve(prepare, move |event, deps| Ok(handle(serde_json::from_str(event.get())?, deps)))
}

/// As [`run`], for a function that reads its events itself.
pub fn run_unread<D, R, P, H, F>(prepare: P, handle: H) -> ExitCode
where
    D: 'static,
    R: Serialize + 'static,
    P: FnOnce(&Env<'_>) -> Result<D, ConfigError>,
    H: Fn(Box<RawValue>, Arc<D>) -> F + 'static,
    F: Future<Output = Result<R, Error>> + 'static,
{
    serve(prepare, move |event, deps| Ok(handle(event, deps)))
}

/// `begin` gives the future that answers an event, where that is one.
fn serve<D, R, P, B, F>(prepare: P, begin: B) -> ExitCode
where
    D: 'static,
    R: Serialize + 'static,
    P: FnOnce(&Env<'_>) -> Result<D, ConfigError>,
    B: Fn(Box<RawValue>, Arc<D>) -> serde_json::Result<F> + 'static,
    F: Future<Output = Result<R, Error>> + 'static,
{
    crate::telemetry::init();
    let ended = prepare(&Env::process()).map_err(|error| error.to_string()).and_then(|deps| {
        let deps = Arc::new(deps);
        metrics::cold_start();
        // Read here: the runtime follows the path of every field for the sake of a better message.
        let service = service_fn(move |event: LambdaEvent<Box<RawValue>>| {
            // Boxed: an AWS call is kilobytes of state, and every layer of the runtime moves this future.
            let LambdaEvent { payload, context } = event;
            let answer = begin(payload, Arc::clone(&deps)).map(Box::pin);
            async move {
                let answer = match answer {
                    Ok(answer) => answer.await,
                    Err(error) => Err(unreadable(error)),
                };
                metrics::flush();
                answer.map_err(|error| {
                    let aws_request_id = context.request_id;
                    if let Error::Named { name } = error {
                        tracing::info!(name, aws_request_id, "the run is told");
                        return Diagnostic { error_type: name.into(), error_message: String::new() };
                    }
                    tracing::error!(%error, aws_request_id, "event was not handled");
                    // The name, not the text, is for whoever invoked the function.
                    Diagnostic {
                        error_type: "EdgeFailed".into(),
                        error_message: "see the function's log".into(),
                    }
                })
            }
        });
        // Without its layer for tracing, which formats a span for each event that hardly a line is written in.
        let ended = crate::runtime::run(Runtime::new(service).run()).map_err(|error| error.to_string())?;
        ended.map_err(|error| error.to_string())
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "function ended");
            ExitCode::FAILURE
        }
    }
}

/// What is said about an event that is none of the function's.
#[must_use]
pub fn unreadable(error: serde_json::Error) -> Error {
    Error::Refused { call: "an event", source: error.into() }
}
