//! Which stack to try, and with what: enters the environment, leaves checked values, nothing where no stack is
//! named, or one sentence that says what is missing.

use std::{path::PathBuf, str::FromStr, time::Duration};

use aws_credential_types::Credentials;
use edge::config::{Env, env};
use proto::limits;
use tests::stack::{Place, Scale, Stack};

/// The variables that the stack's output `Acceptance` sets.
pub(crate) const OF_THE_STACK: &[&str] = &[
    env::PUBLIC_URL,
    FRONT,
    env::REPLY_TIMEOUT_SECS,
    EDGE,
    env::CONNECTIONS_TABLE,
    env::STATE_MACHINE_ARN,
    env::MAILBOX_URL_PREFIX,
    env::AGENT_ENDPOINT,
    REGION,
];

/// The variables that only who runs it can set.
const OF_THE_OPERATOR: &[&str] = &[TOKEN_FILE, ACCESS_KEY, SECRET_KEY];

/// The most seconds after which an idle connection may be said to be closed: two minutes more than AWS says.
const IDLE_SECS: usize = 12 * 60;

const FRONT: &str = "TUNNEL_FRONT";
const EDGE: &str = "AGENTD_EDGE";
const TOKEN_FILE: &str = "AGENTD_TOKEN_FILE";
const REGION: &str = "AWS_REGION";
const ACCESS_KEY: &str = "AWS_ACCESS_KEY_ID";
const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
const SESSION: &str = "AWS_SESSION_TOKEN";

/// What is said where no stack is named.
pub(crate) const SKIPPED: &str =
    "deployed: SKIPPED: the environment names no stack (TUNNEL_PUBLIC_URL is not set).
deployed: to try one, set what its output Acceptance says, AGENTD_TOKEN_FILE and AWS_ACCESS_KEY_ID, \
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; see \"Trying a deployed stack\" in docs/deploy.md.
";

/// Everything a run needs. Not to be printed: it holds credentials.
pub(crate) struct Config {
    /// The edge.
    pub(crate) stack: Stack,
    /// What the names of this run's tunnels begin with.
    pub(crate) prefix: String,
    /// The table of connections.
    pub(crate) connections_table: String,
    /// The state machine.
    pub(crate) state_machine: String,
    /// What precedes a mailbox's id in its queue URL.
    pub(crate) mailbox_prefix: String,
    /// Where `@connections` is.
    pub(crate) agent_endpoint: String,
    /// The stack's region.
    pub(crate) region: String,
    /// Where AWS is, if it is not AWS.
    pub(crate) endpoint: Option<String>,
    /// Who calls.
    pub(crate) credentials: Credentials,
    /// Parts of the names of what is to be run; none for all of it.
    pub(crate) only: Vec<String>,
    /// Whether points that take minutes are asked.
    pub(crate) long: bool,
    /// After what time an idle connection is said to be closed, where that is to be tried.
    pub(crate) idle: Option<Duration>,
    /// How many calls a measurement makes.
    pub(crate) calls: usize,
    /// Where the measured profile goes as well.
    pub(crate) profile: Option<PathBuf>,
}

impl Config {
    /// Reads the environment; nothing where it names no stack.
    pub(crate) fn find(env: &Env<'_>) -> Result<Option<Self>, String> {
        if env.optional(env::PUBLIC_URL).is_none() {
            return Ok(None);
        }
        let all = OF_THE_STACK.iter().chain(OF_THE_OPERATOR);
        let missing: Vec<&str> = all.copied().filter(|name| env.optional(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(format!("not set: {}; see docs/deploy.md", missing.join(", ")));
        }
        // Checked above.
        let value = |name: &str| env.optional(name).unwrap_or_default();
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| error.to_string())?;
        let prefix = format!("deployed-{:08x}-", u32::from_le_bytes(random));
        let reply_timeout =
            env.secs(env::REPLY_TIMEOUT_SECS, limits::REPLY_TIMEOUT, limits::REPLY_TIMEOUT_MAX);
        let token = PathBuf::from(value(TOKEN_FILE));
        // It is read again by whoever needs it.
        if !std::fs::read_to_string(&token).is_ok_and(|token| !token.trim().is_empty()) {
            return Err(format!("{TOKEN_FILE} names no file that holds a token"));
        }
        let place = Place {
            public: parse(env::PUBLIC_URL, &value(env::PUBLIC_URL))?,
            agents: parse(EDGE, &value(EDGE))?,
            token,
            front: parse(FRONT, &value(FRONT))?,
            prefix: prefix.clone(),
            ca: env.optional("SSL_CERT_FILE").map(PathBuf::from),
        };
        let count = |name, default, max| env.count(name, default, max).map_err(|error| error.to_string());
        let calls = count("DEPLOYED_CALLS", 200, 10_000)?;
        let scale = Scale {
            clients: count("DEPLOYED_CLIENTS", 50, 1000)?,
            rounds: count("DEPLOYED_ROUNDS", 4, 1000)?,
            download_mib: count("DEPLOYED_DOWNLOAD_MIB", 100, 10_000)?,
        };
        let idle = count("DEPLOYED_IDLE_SECS", usize::MAX, IDLE_SECS)?;
        let stack = Stack::new(place)?
            .with_reply_timeout(reply_timeout.map_err(|error| error.to_string())?)
            .with_scale(scale);
        let only = env.optional("DEPLOYED_ONLY").unwrap_or_default();
        Ok(Some(Self {
            stack,
            prefix,
            connections_table: value(env::CONNECTIONS_TABLE),
            state_machine: value(env::STATE_MACHINE_ARN),
            mailbox_prefix: value(env::MAILBOX_URL_PREFIX),
            agent_endpoint: value(env::AGENT_ENDPOINT),
            region: value(REGION),
            endpoint: env.optional("AWS_ENDPOINT_URL"),
            credentials: Credentials::new(
                value(ACCESS_KEY),
                value(SECRET_KEY),
                env.optional(SESSION),
                None,
                "environment",
            ),
            long: env.flag("DEPLOYED_LONG").map_err(|error| error.to_string())?,
            only: only.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect(),
            idle: (idle != usize::MAX).then(|| Duration::from_secs(idle as u64)),
            calls,
            profile: env.optional("DEPLOYED_PROFILE").map(PathBuf::from),
        }))
    }

    /// Whether something of that name is to be run.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }
}

fn parse<T: FromStr<Err: std::fmt::Display>>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("environment variable {name} {error}"))
}
