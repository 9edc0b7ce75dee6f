//! How a buffered Lambda function runs: telemetry, environment, clients, then one event after the other.

use std::process::ExitCode;

use lambda_runtime::{Diagnostic, LambdaEvent, service_fn};
use serde::{Deserialize, Serialize};

use crate::{
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
    E: for<'de> Deserialize<'de>,
    R: Serialize,
    P: FnOnce(&Env<'_>) -> Result<D, ConfigError>,
    H: Fn(E, std::sync::Arc<D>) -> F,
    F: Future<Output = Result<R, crate::Error>>,
{
    crate::telemetry::init();
    let ended = prepare(&Env::process()).map_err(|error| error.to_string()).and_then(|deps| {
        let deps = std::sync::Arc::new(deps);
        // One event at a time: a second thread would only cost memory.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        metrics::cold_start();
        let service = service_fn(|event: LambdaEvent<E>| {
            // Boxed: an AWS call is kilobytes of state, and every layer of the runtime moves this future.
            let answer = Box::pin(handle(event.payload, std::sync::Arc::clone(&deps)));
            async {
                let answer = answer.await;
                metrics::flush();
                answer.map_err(|error| {
                    tracing::error!(%error, "event was not handled");
                    // The name, not the text, is for whoever invoked the function.
                    Diagnostic {
                        error_type: "EdgeFailed".into(),
                        error_message: "see the function's log".into(),
                    }
                })
            }
        });
        runtime.block_on(lambda_runtime::run(service)).map_err(|error| error.to_string())
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "function ended");
            ExitCode::FAILURE
        }
    }
}
