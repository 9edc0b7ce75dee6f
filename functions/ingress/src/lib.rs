//! Lambda `ingress`: takes a public request from the front, has the workflow bring it to an agent, and
//! streams the agent's answer back.
//!
//! The order of things: [`event`] is what the front hands over, [`route`] turns it into a request for one
//! tunnel (pure), [`exchange`] carries that out with the mailbox of [`inbox`], [`answer`] makes the head and the error pages (pure), and
//! [`runtime`] is the streaming side of Lambda's Runtime API.
//!
//! Permissions it needs: start the state machine, receive and delete in mailboxes, create them, read
//! and write the mailboxes table, post to `@connections`; where requests are limited, read names and write
//! counters in the connections table.

pub mod answer;
pub mod event;
pub mod exchange;
pub mod inbox;
pub mod route;
pub mod runtime;

use std::{process::ExitCode, time::Duration};

use edge::{
    agent_link::AgentLink,
    aws::Aws,
    config::{ConfigError, Env, env},
    limit::Limiter,
    mailbox::Pool,
    workflow::Workflow,
};
use proto::{forwarded::Trust, limits, token::TokenKeys};

/// What the environment says about this function.
#[derive(Debug)]
pub struct Config {
    /// Signs task tokens.
    pub keys: TokenKeys,
    /// The domain under which tunnel names are first labels.
    pub domain: Option<String>,
    /// What a front of ours sends to be believed.
    pub front_secret: Option<String>,
    /// Whether requests that come past the front are refused.
    pub front_only: bool,
    /// Whether the request's own forwarding fields are believed.
    pub trust: Trust,
    /// How long the public client waits for the head of a response.
    pub reply_timeout: Duration,
}

impl Config {
    /// Reads the environment.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong; also when only the front may come in and it has no secret.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let front_only = env.flag(env::FRONT_ONLY)?;
        let front_secret =
            if front_only { Some(env.required(env::FRONT_SECRET)?) } else { env.optional(env::FRONT_SECRET) };
        Ok(Self {
            keys: env.token_keys()?,
            domain: env.optional(env::DOMAIN).map(|domain| domain.to_ascii_lowercase()),
            front_secret,
            front_only,
            trust: env.trust()?,
            reply_timeout: env.secs(
                env::REPLY_TIMEOUT_SECS,
                limits::REPLY_TIMEOUT,
                limits::REPLY_TIMEOUT_MAX,
            )?,
        })
    }
}

/// Everything a request needs.
#[derive(Debug)]
pub struct Ingress {
    config: Config,
    workflow: Workflow,
    pool: Pool,
    link: AgentLink,
    limiter: Limiter,
}

impl Ingress {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        Ok(Self {
            config: Config::from_env(env)?,
            workflow: Workflow::from_env(&aws, env)?,
            pool: Pool::from_env(&aws, env)?,
            link: AgentLink::from_env(&aws, env)?,
            limiter: Limiter::from_env(&aws, env)?,
        })
    }
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::telemetry::init();
    let served = Ingress::from_env(&Env::process()).map_err(anyhow::Error::from).and_then(|ingress| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(serve(ingress))
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("function ended: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(ingress: Ingress) -> anyhow::Result<()> {
    let runtime = runtime::Runtime::from_env()?;
    let mut inbox = match ingress.pool.lease(&holder(), random()?).await {
        Ok(lease) => inbox::Inbox::new(lease),
        Err(error) => {
            runtime.init_error(&error).await;
            return Err(error.into());
        }
    };
    edge::metrics::cold_start();
    loop {
        let invocation = runtime.next().await?;
        inbox = exchange::serve(&ingress, &runtime, invocation, inbox).await?;
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
