//! One public exchange at the edge, from a request's head to the last byte of its answer.
//!
//! What holds the public client is not known here: `ingress` has one streamed answer of Lambda in front,
//! `relay` many connections of its own. Enters: an [`route::Arrival`], the head as its front received it. Leaves,
//! through a [`public::PublicSide`], one answer. The order of things: [`route`] turns the head into a request for
//! one tunnel (pure), [`http`] has the workflow bring it to an agent and carries the answer back with the mailbox of
//! [`inbox`], [`socket`] does so for the messages of a WebSocket,
//! [`answer`] makes heads and error pages (pure).
//!
//! [`keep`] has a request kept that is to be delivered later, and `hold` its body, where that is still coming.
//!
//! Permissions it needs: start the state machine, receive and delete in mailboxes, create them, read
//! and write the mailboxes table, post to `@connections`; where requests are limited, read names and write
//! counters in the connections table; where requests are kept, read names there, write rows of the table of deliveries and
//! start their runs.

pub mod answer;
pub mod budget;
mod hold;
pub mod http;
pub mod inbox;
pub mod keep;
pub mod public;
pub mod record;
pub mod route;
pub mod socket;

use std::time::Duration;

use edge::{
    agent_link::AgentLink,
    aws::Aws,
    config::{ConfigError, Env, env},
    limit::Limiter,
    mailbox::Pool,
    workflow::Workflow,
};
use proto::{forwarded::Trust, id::RequestId, limits, token::TokenKeys};
use tokio::sync::mpsc::UnboundedSender;

/// What the environment says about exchanges.
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
    /// The longest message of a public WebSocket, in bytes.
    pub socket_message_bytes: usize,
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
            socket_message_bytes: env.count(
                env::RELAY_MESSAGE_BYTES,
                limits::SOCKET_MESSAGE_BYTES,
                limits::SOCKET_MESSAGE_BYTES_MAX,
            )?,
        })
    }
}

/// Everything an exchange needs of the edge.
#[derive(Debug)]
pub struct Services {
    /// What the environment says.
    pub config: Config,
    /// The state machine.
    pub workflow: Workflow,
    /// The mailboxes.
    pub pool: Pool,
    /// The way to the agents.
    pub link: AgentLink,
    /// Counts requests, where they are limited.
    pub limiter: Limiter,
    /// Keeps requests for later; none where that is not deployed.
    pub keeper: Option<keep::Keeper>,
    /// Who is told which WebSockets are held, if anybody is.
    pub holdings: Option<UnboundedSender<socket::Holding>>,
}

impl Services {
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
            keeper: keep::Keeper::from_env(&aws, env)?,
            holdings: None,
        })
    }
}

/// A number in `[0, 1)` of a request's own: its id is random. It chooses among several connections, and how long what is tried
/// again waits.
pub(crate) fn pick(request_id: &RequestId) -> f64 {
    let digits = u32::from_str_radix(&request_id.as_str()[24..], 16).unwrap_or_default();
    f64::from(digits) / (f64::from(u32::MAX) + 1.0)
}
