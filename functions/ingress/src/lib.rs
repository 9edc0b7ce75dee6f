//! Lambda `ingress`: takes a public request from the front, has the workflow bring it to an agent, and
//! streams the agent's answer back.
//!
//! The order of things: [`event`] is what the front hands over, [`invocation`] answers one event through an
//! `exchange`, [`answer`] makes the head and [`config`] says what to do about Lambda's front (pure), and [`runtime`] is the streaming side of Lambda's Runtime API.
//!
//! Permissions it needs: those of an exchange.

pub mod answer;
pub mod config;
pub mod event;
pub mod invocation;
pub mod runtime;

use std::process::ExitCode;

use edge::config::{ConfigError, Env};
use exchange::{Services, inbox::Inbox};

use config::Config;

/// Everything that the function needs.
#[derive(Debug)]
pub struct Ingress {
    services: Services,
    config: Config,
}

impl Ingress {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self { services: Services::from_env(env)?, config: Config::from_env(env)? })
    }
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::telemetry::init();
    let served = Ingress::from_env(&Env::process())
        .map_err(anyhow::Error::from)
        .and_then(|ingress| edge::runtime::run(serve(ingress))?);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("function ended: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(Ingress { services, config }: Ingress) -> anyhow::Result<()> {
    let runtime = runtime::Runtime::from_env()?;
    let mut inbox = match services.pool.lease(&holder(), random()?).await {
        Ok(lease) => Inbox::new(lease),
        Err(error) => {
            runtime.init_error(&error).await;
            return Err(error.into());
        }
    };
    edge::metrics::cold_start();
    loop {
        let invocation = runtime.next().await?;
        inbox = invocation::serve(&services, &config, &runtime, invocation, inbox).await?;
    }
}

/// How this process signs its lease, for whoever reads the table.
fn holder() -> String {
    std::env::var("AWS_LAMBDA_LOG_STREAM_NAME").unwrap_or_else(|_| format!("process-{}", std::process::id()))
}

fn random() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
