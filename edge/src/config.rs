//! The environment of a function, read once at its start.
//!
//! Enters: a lookup function (the process environment, or a map in tests). Leaves: typed values, or
//! one sentence that names the variable and what is wrong with it. No value has a default that would
//! be a secret.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proto::{forwarded::Trust, limits, token::TokenKeys};

use crate::limit::allowed::{LIMIT_MAX, Limits};

/// A variable is missing or wrong. The value itself is not repeated: it may be secret.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("environment variable {name} {problem}")]
pub struct ConfigError {
    name: &'static str,
    problem: &'static str,
}

/// The names of the variables. `serverless.yml` and `local` set them.
pub mod env {
    /// Name of the connections table.
    pub const CONNECTIONS_TABLE: &str = "TUNNEL_CONNECTIONS_TABLE";
    /// Name of the mailboxes table.
    pub const MAILBOXES_TABLE: &str = "TUNNEL_MAILBOXES_TABLE";
    /// What precedes a mailbox's id in its queue URL.
    pub const MAILBOX_URL_PREFIX: &str = "TUNNEL_MAILBOX_URL_PREFIX";
    /// How long a mailbox is leased, in seconds.
    pub const MAILBOX_LEASE_SECS: &str = "TUNNEL_MAILBOX_LEASE_SECS";
    /// ARN of the state machine `public_request`.
    pub const STATE_MACHINE_ARN: &str = "TUNNEL_STATE_MACHINE_ARN";
    /// Name of the table of deliveries; without it nothing is kept for later.
    pub const DELIVERIES_TABLE: &str = "TUNNEL_DELIVERIES_TABLE";
    /// ARN of the state machine `delivery`.
    pub const DELIVERY_MACHINE_ARN: &str = "TUNNEL_DELIVERY_MACHINE_ARN";
    /// URL of the queue that names the deliveries that are dead.
    pub const DEAD_LETTERS_URL: &str = "TUNNEL_DEAD_LETTERS_URL";
    /// URL of the queue that names deliveries to be made once more.
    pub const REDELIVERIES_URL: &str = "TUNNEL_REDELIVERIES_URL";
    /// Where `@connections` is: the WebSocket API's endpoint and stage, with `https://`.
    pub const AGENT_ENDPOINT: &str = "TUNNEL_AGENT_ENDPOINT";
    /// The keys of task tokens in base64: the signing one and, after a comma, the one it replaced.
    pub const TOKEN_KEYS: &str = "TUNNEL_TOKEN_KEYS";
    /// The domain whose first labels are tunnel names; without it only path mode works.
    pub const DOMAIN: &str = "TUNNEL_DOMAIN";
    /// How the public reaches a tunnel, with `{name}` in place of its name.
    pub const PUBLIC_URL: &str = "TUNNEL_PUBLIC_URL";
    /// What a front of ours puts into `x-tunnel-front` to be believed.
    pub const FRONT_SECRET: &str = "TUNNEL_FRONT_SECRET";
    /// `true` where requests that do not come through the front are refused.
    pub const FRONT_ONLY: &str = "TUNNEL_FRONT_ONLY";
    /// How long a public client waits for the head of a response, in seconds.
    pub const REPLY_TIMEOUT_SECS: &str = "TUNNEL_REPLY_TIMEOUT_SECS";
    /// `identity` where upstreams are asked for bodies that are not packed, `pass` where they are asked for what the
    /// public client takes.
    pub const ACCEPT_ENCODING: &str = "TUNNEL_ACCEPT_ENCODING";
    /// `hold` where a short body of unknown length is kept until it is whole, so that it has a length, and an error in place
    /// of half of it; `stream` where every byte goes on at once.
    pub const UNKNOWN_LENGTH: &str = "TUNNEL_UNKNOWN_LENGTH";
    /// How long a response may pause before it is broken off, in seconds; 0 for as long as it may take.
    pub const STREAM_IDLE_SECS: &str = "TUNNEL_STREAM_IDLE_SECS";
    /// `chain` where forwarding fields of the request are believed.
    pub const TRUST_FORWARDED: &str = "TUNNEL_TRUST_FORWARDED";
    /// How old an agent's connection may become, in seconds.
    pub const CONNECTION_LIFETIME_SECS: &str = "TUNNEL_CONNECTION_LIFETIME_SECS";
    /// How often an agent sends a heartbeat, in milliseconds.
    pub const HEARTBEAT_MS: &str = "TUNNEL_HEARTBEAT_MS";
    /// How much one owner, and one tunnel, may use: `key=number,…`, see `edge::limit::Limits`. Without it,
    /// nothing is limited and nothing is counted.
    pub const LIMITS: &str = "TUNNEL_LIMITS";
    /// How many public requests `ingress` has in flight at most, all tunnels together: in an account with few concurrent
    /// executions, agents' answers need some as well. Without it, they are not counted.
    pub const EDGE_REQUESTS: &str = "TUNNEL_EDGE_REQUESTS";
    /// `true` where public WebSockets are carried; `connect` says so to agents.
    pub const WEBSOCKETS: &str = "TUNNEL_WEBSOCKETS";
    /// The service of ECS that runs `relay`, as `service/CLUSTER/NAME`; without it nothing wakes one or puts it to sleep.
    pub const RELAY_SERVICE: &str = "TUNNEL_RELAY_SERVICE";
    /// The most tasks of that service.
    pub const RELAY_TASKS: &str = "TUNNEL_RELAY_TASKS";
    /// `true` where `relay` takes every public request, so that every agent wants it.
    pub const RELAY_FRONT: &str = "TUNNEL_RELAY_FRONT";
    /// How long nobody has wanted `relay` before it goes to sleep, in seconds.
    pub const RELAY_REST_SECS: &str = "TUNNEL_RELAY_REST_SECS";
    /// Where `relay` listens: an address and a port.
    pub const RELAY_LISTEN: &str = "TUNNEL_RELAY_LISTEN";
    /// The longest message of a public WebSocket, in bytes.
    pub const RELAY_MESSAGE_BYTES: &str = "TUNNEL_RELAY_MESSAGE_BYTES";
    /// How many bytes of unfinished messages of WebSockets, and of bodies that may be kept for later, `relay` holds together.
    pub const RELAY_BUFFER_BYTES: &str = "TUNNEL_RELAY_BUFFER_BYTES";
    /// How many public connections `relay` holds at the same time.
    pub const RELAY_CONNECTIONS: &str = "TUNNEL_RELAY_CONNECTIONS";
    /// How long `relay` waits for its exchanges when it is told to end, in seconds.
    pub const RELAY_DRAIN_SECS: &str = "TUNNEL_RELAY_DRAIN_SECS";
    /// The namespace of the metrics; without it none are written.
    pub const METRICS_NAMESPACE: &str = "TUNNEL_METRICS_NAMESPACE";
    /// How many free mailboxes `sweep` keeps ready.
    pub const MAILBOXES_KEPT: &str = "TUNNEL_MAILBOXES_KEPT";
    /// How long a mailbox has been free before it may count as surplus, in seconds.
    pub const MAILBOX_IDLE_SECS: &str = "TUNNEL_MAILBOX_IDLE_SECS";
}

/// Reads variables through a lookup function.
pub struct Env<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Env<'a> {
    /// Reads through `lookup`.
    #[must_use]
    pub fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    /// Reads the environment of this process.
    #[must_use]
    pub fn process() -> Env<'static> {
        Env { lookup: &|name| std::env::var(name).ok() }
    }

    /// The value, where it is set and not empty.
    #[must_use]
    pub fn optional(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// The value.
    ///
    /// # Errors
    ///
    /// When it is missing or empty.
    pub fn required(&self, name: &'static str) -> Result<String, ConfigError> {
        self.optional(name).ok_or_else(|| self.missing(name))
    }

    /// What is said where a variable has no value.
    #[must_use]
    pub const fn missing(&self, name: &'static str) -> ConfigError {
        ConfigError { name, problem: "is not set" }
    }

    /// A number of whole seconds between 1 and `max`.
    ///
    /// # Errors
    ///
    /// When it is anything else.
    pub fn secs(
        &self,
        name: &'static str,
        default: Duration,
        max: Duration,
    ) -> Result<Duration, ConfigError> {
        let Some(text) = self.optional(name) else { return Ok(default) };
        let secs = text.parse::<u64>().ok().filter(|&secs| secs > 0 && secs <= max.as_secs());
        secs.map(Duration::from_secs)
            .ok_or(ConfigError { name, problem: "is not a number of seconds in its range" })
    }

    /// A number between 1 and `max`.
    ///
    /// # Errors
    ///
    /// When it is anything else.
    pub fn count(&self, name: &'static str, default: usize, max: usize) -> Result<usize, ConfigError> {
        let Some(text) = self.optional(name) else { return Ok(default) };
        let count = text.parse::<usize>().ok().filter(|&count| count > 0 && count <= max);
        count.ok_or(ConfigError { name, problem: "is not a number in its range" })
    }

    /// The keys of task tokens.
    ///
    /// # Errors
    ///
    /// When there is none, or one is too short: the edge cannot run without.
    pub fn token_keys(&self) -> Result<TokenKeys, ConfigError> {
        let text = self.required(env::TOKEN_KEYS)?;
        let wrong = ConfigError {
            name: env::TOKEN_KEYS,
            problem: "is not one or two keys of at least 32 bytes in base64",
        };
        let mut keys = text.split(',').map(|key| STANDARD.decode(key.trim()).ok());
        let (Some(Some(signing)), previous, None) = (keys.next(), keys.next(), keys.next()) else {
            return Err(wrong);
        };
        let previous = match previous {
            None => None,
            Some(Some(key)) => Some(key),
            Some(None) => return Err(wrong),
        };
        TokenKeys::new(&signing, previous.as_deref()).map_err(|_| wrong)
    }

    /// How much one owner, and one tunnel, may use.
    ///
    /// # Errors
    ///
    /// When it is not `key=number,…` with the keys of [`Limits`].
    pub fn limits(&self) -> Result<Limits, ConfigError> {
        let text = self.optional(env::LIMITS).unwrap_or_default();
        text.parse().map_err(|problem| ConfigError { name: env::LIMITS, problem })
    }

    /// How many public requests may be in flight, all tunnels together; `None` where that is not limited.
    ///
    /// # Errors
    ///
    /// When it is not a number in its range.
    pub fn edge_requests(&self) -> Result<Option<u32>, ConfigError> {
        if self.optional(env::EDGE_REQUESTS).is_none() {
            return Ok(None);
        }
        let most = self.count(env::EDGE_REQUESTS, 1, LIMIT_MAX as usize)?;
        Ok(u32::try_from(most).ok())
    }

    /// Whether forwarding fields of a request are believed.
    ///
    /// # Errors
    ///
    /// When it is neither `nobody` nor `chain`.
    pub fn trust(&self) -> Result<Trust, ConfigError> {
        match self.optional(env::TRUST_FORWARDED).as_deref() {
            None | Some("nobody") => Ok(Trust::Nobody),
            Some("chain") => Ok(Trust::Chain),
            Some(_) => {
                Err(ConfigError { name: env::TRUST_FORWARDED, problem: "is neither 'nobody' nor 'chain'" })
            }
        }
    }

    /// Whether the variable says `true`.
    ///
    /// # Errors
    ///
    /// When it is neither `true` nor `false`.
    pub fn flag(&self, name: &'static str) -> Result<bool, ConfigError> {
        match self.optional(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(ConfigError { name, problem: "is neither 'true' nor 'false'" }),
        }
    }

    /// Whether upstreams are asked for bodies that are not packed: they are, unless the environment says `pass`.
    ///
    /// # Errors
    ///
    /// When it is neither `identity` nor `pass`.
    pub fn asks_for_identity(&self) -> Result<bool, ConfigError> {
        let name = env::ACCEPT_ENCODING;
        match self.optional(name).as_deref() {
            None | Some("identity") => Ok(true),
            Some("pass") => Ok(false),
            Some(_) => Err(ConfigError { name, problem: "is neither 'identity' nor 'pass'" }),
        }
    }

    /// Whether short bodies of unknown length are kept until they are whole.
    ///
    /// # Errors
    ///
    /// When it is neither `stream` nor `hold`.
    pub fn holds_unknown_length(&self) -> Result<bool, ConfigError> {
        let name = env::UNKNOWN_LENGTH;
        match self.optional(name).as_deref() {
            None | Some("stream") => Ok(false),
            Some("hold") => Ok(true),
            Some(_) => Err(ConfigError { name, problem: "is neither 'stream' nor 'hold'" }),
        }
    }

    /// How old an agent's connection may become.
    ///
    /// # Errors
    ///
    /// When it is not a number of seconds within API Gateway's limit.
    pub fn connection_lifetime(&self) -> Result<Duration, ConfigError> {
        self.secs(env::CONNECTION_LIFETIME_SECS, limits::CONNECTION_LIFETIME, limits::CONNECTION_LIFETIME)
    }

    /// How often an agent sends a heartbeat.
    ///
    /// # Errors
    ///
    /// When it is not a number of milliseconds that keeps the connection from idling.
    pub fn heartbeat(&self) -> Result<Duration, ConfigError> {
        let Some(text) = self.optional(env::HEARTBEAT_MS) else { return Ok(limits::HEARTBEAT_INTERVAL) };
        let max = limits::CONNECTION_IDLE - limits::HEARTBEAT_ANSWER;
        let interval = text.parse::<u64>().ok().map(Duration::from_millis);
        interval.filter(|&interval| interval > Duration::ZERO && interval <= max).ok_or(ConfigError {
            name: env::HEARTBEAT_MS,
            problem: "is not a number of milliseconds in its range",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(value: Option<&str>, read: impl FnOnce(&Env<'_>) -> T) -> T {
        read(&Env::new(&|_| value.map(str::to_owned)))
    }

    #[test]
    fn token_keys_have_no_default_and_a_least_length() {
        let key = STANDARD.encode([1; 32]);
        let short = STANDARD.encode([1; 31]);
        assert!(with(None, |env| env.token_keys().is_err()));
        assert!(with(Some(""), |env| env.token_keys().is_err()));
        assert!(with(Some(&short), |env| env.token_keys().is_err()));
        assert!(with(Some("not base64"), |env| env.token_keys().is_err()));
        assert!(with(Some(&key), |env| env.token_keys().is_ok()));
        assert!(with(Some(&format!("{key},{key}")), |env| env.token_keys().is_ok()));
        assert!(with(Some(&format!("{key},{short}")), |env| env.token_keys().is_err()));
        assert!(with(Some(&format!("{key},{key},{key}")), |env| env.token_keys().is_err()));
    }

    #[test]
    fn an_error_names_the_variable_and_not_the_value() {
        let error = with(Some("hunter2"), |env| env.token_keys().unwrap_err()).to_string();
        assert!(error.contains("TUNNEL_TOKEN_KEYS") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn durations_are_bounded() {
        let read = |text| with(text, |env| env.connection_lifetime());
        assert_eq!(read(None), Ok(limits::CONNECTION_LIFETIME));
        assert_eq!(read(Some("7200")), Ok(Duration::from_secs(7200)));
        for bad in ["0", "7201", "-1", "1.5", "x"] {
            assert!(read(Some(bad)).is_err(), "{bad}");
        }
    }
}
