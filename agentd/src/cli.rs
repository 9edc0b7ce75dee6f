//! The command line.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use tracing_subscriber::filter::Targets;

use crate::{
    background::{self, Forked, StateDir},
    config::{self, Config, ConfigError, Overrides, TunnelConfig, parse_duration, parse_host_header},
    credential::{ENV_CREDENTIALS, ENV_TOKEN},
    driver::{self, Audience, Outcome},
    identity, name, reference, service, telemetry,
    telemetry::LogFormat,
    upstream::address::Address,
};

/// Exit codes that scripts and systemd units may rely on.
mod exit {
    pub(super) const RUNTIME: u8 = 1;
    pub(super) const IDENTITY_REFUSED: u8 = 77;
    pub(super) const BAD_CONFIG: u8 = 78;
}

/// Serves local HTTP services to the internet through your own AWS account.
#[derive(Debug, Parser)]
#[command(
    name = "agentd",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_long_help = reference::exit_codes()
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// The edge: wss://….
    #[arg(long, global = true, value_name = "URL", env = "AGENTD_EDGE")]
    edge: Option<String>,
    /// The file that holds the token. Only its owner may be able to read it.
    #[arg(long, global = true, value_name = "FILE", env = "AGENTD_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Certificates (PEM) to trust for the edge beside the system's.
    #[arg(long, global = true, value_name = "FILE", env = "AGENTD_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// How long a stop waits for what is in flight.
    #[arg(long, global = true, value_name = "DURATION", env = "AGENTD_GRACE_PERIOD", value_parser = parse_duration)]
    grace_period: Option<Duration>,
    /// How log lines look. Default: human on a terminal, json elsewhere.
    #[arg(long, global = true, env = "AGENTD_LOG_FORMAT", value_enum)]
    log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or target=level,….
    #[arg(long, global = true, env = "AGENTD_LOG_LEVEL", value_name = "LEVEL")]
    log_level: Option<Targets>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Opens one tunnel in the foreground, for people.
    Http(Http),
    /// Runs the daemon in the foreground: what systemd starts.
    Run {
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Starts the daemon in the background, where no systemd looks after it.
    Start {
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        #[command(flatten)]
        place: Place,
    },
    /// Stops the daemon in the background, after what is in flight.
    Stop {
        #[command(flatten)]
        place: Place,
    },
    /// Stops the daemon in the background and starts it again.
    Restart {
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        #[command(flatten)]
        place: Place,
    },
    /// Says whether the daemon runs in the background.
    Status {
        #[command(flatten)]
        place: Place,
    },
    #[command(flatten)]
    Identity(identity::Command),
    /// Looks after the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Installs the agent as a service of systemd, or removes it.
    Service {
        #[command(subcommand)]
        command: service::Command,
    },
    #[command(flatten)]
    Reference(reference::Command),
}

#[derive(Debug, Clone, Args)]
struct Place {
    /// Where the pid file and the logs are. Default: the user's own state folder.
    #[arg(long, value_name = "DIR", env = "AGENTD_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Http {
    /// The local service: 3000, host:port, http://host:port, https://host or unix:/path.
    #[arg(value_name = "UPSTREAM")]
    upstream: Address,
    /// The tunnel's public name. Default: a random one that the token may open.
    #[arg(long)]
    name: Option<String>,
    /// What the Host field says to the service: "upstream", "preserve" or a host name.
    #[arg(long, value_name = "RULE")]
    host_header: Option<String>,
    /// How long the service may take to begin an answer.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    request_timeout: Option<Duration>,
    /// How many requests are served at a time.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_concurrent: Option<u32>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Says whether the configuration is valid, and what is wrong if not.
    Check {
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        /// Answer with a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the program with `args`, the program's name first.
pub(crate) fn main_with_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" that go to standard output with code 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::RUNTIME));
        }
    };
    let common = cli.common;
    let overrides = Overrides {
        edge: common.edge.filter(|value| !value.is_empty()),
        token_file: common.token_file.filter(|value| !value.as_os_str().is_empty()),
        token: std::env::var(ENV_TOKEN).ok().filter(|value| !value.is_empty()),
        credentials: std::env::var_os(ENV_CREDENTIALS).map(PathBuf::from),
        ca_file: common.ca_file,
        grace_period: common.grace_period,
    };
    let level = common.log_level;
    match cli.command {
        Command::Http(http) => {
            // What people want to see goes to standard output; the log keeps to what is wrong.
            let level = level.unwrap_or_else(|| Targets::new().with_default(tracing::Level::WARN));
            let _flush = telemetry::start(Some(common.log_format.unwrap_or(LogFormat::Human)), level);
            match http.into_tunnel(&overrides).and_then(|tunnel| overrides.with_tunnel(tunnel)) {
                Ok(config) => {
                    let (terminal, _flush) = telemetry::Terminal::open();
                    run(config, Audience::People(terminal))
                }
                Err(error) => bad_config(&error),
            }
        }
        Command::Run { config } => {
            let level = level.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
            let _flush = telemetry::start(common.log_format, level);
            match config::load(&config, &overrides) {
                Ok(config) => run(config, Audience::Service),
                Err(error) => bad_config(&error),
            }
        }
        Command::Start { config, place } => {
            let level = level.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
            match config::load(&config, &overrides) {
                Ok(config) => start(config, place, common.log_format, level),
                Err(error) => bad_config(&error),
            }
        }
        Command::Stop { place } => in_background(place, stop),
        Command::Restart { config, place } => {
            let level = level.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
            // What runs goes on where the new configuration is not valid.
            match config::load(&config, &overrides) {
                Ok(config) => match in_background(place.clone(), stop) {
                    ExitCode::SUCCESS => start(config, place, common.log_format, level),
                    failure => failure,
                },
                Err(error) => bad_config(&error),
            }
        }
        Command::Status { place } => in_background(place, background::status),
        Command::Identity(command) => identity::run(command),
        Command::Config { command: ConfigCommand::Check { config, json } } => {
            check(&config::load(&config, &overrides), json)
        }
        Command::Service { command } => match service::run(command, &overrides) {
            Ok(code) => code,
            Err(service::Error::Config(error)) => bad_config(&error),
            Err(error) => failed(&error.to_string()),
        },
        Command::Reference(command) => reference::run(&command, Cli::command()),
    }
}

fn stop(state: &StateDir) -> Result<ExitCode, background::Error> {
    match background::stop(state)? {
        Some(took) => println!("stopped after {:.1} s", took.as_secs_f64()),
        None => println!("not running"),
    }
    Ok(ExitCode::SUCCESS)
}

fn in_background(
    place: Place,
    act: impl FnOnce(&StateDir) -> Result<ExitCode, background::Error>,
) -> ExitCode {
    let environment = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let is_root = rustix::process::geteuid().is_root();
    let Some(state) = StateDir::find(place.state_dir, environment, is_root) else {
        return failed("there is no home folder; say --state-dir DIR");
    };
    act(&state).unwrap_or_else(|error| failed(&error.to_string()))
}

fn start(config: Config, place: Place, format: Option<LogFormat>, level: Targets) -> ExitCode {
    in_background(place, |state| match background::start(state, config.grace_period)? {
        Forked::Starter(pid) => {
            println!("started with pid {}; log in {}", pid.as_raw_nonzero(), state.log_dir().display());
            Ok(ExitCode::SUCCESS)
        }
        Forked::Daemon(starter) => {
            // The starter reports the failure, because nobody sees this process any more.
            let Ok(_flush) = telemetry::start_in(&state.log_dir(), format, level) else {
                return Ok(ExitCode::from(exit::RUNTIME));
            };
            starter.ready();
            Ok(run(config, Audience::Service))
        }
    })
}

fn run(config: Config, audience: Audience) -> ExitCode {
    // One thread: the work is waiting. It is started here so that whatever must happen before any
    // thread exists has happened.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    let outcome = runtime.block_on(driver::run(config, audience));
    // A look-up in progress must not hold up the exit.
    runtime.shutdown_background();
    match outcome {
        Ok(Outcome::Stopped) => ExitCode::SUCCESS,
        Ok(Outcome::IdentityRefused) => ExitCode::from(exit::IDENTITY_REFUSED),
        Err(driver::StartError::Tls(error)) => bad_config(&ConfigError::new(error.to_string())),
        Err(error @ driver::StartError::System(_)) => failed(&error.to_string()),
    }
}

fn failed(message: &str) -> ExitCode {
    eprintln!("agentd: {message}");
    ExitCode::from(exit::RUNTIME)
}

fn bad_config(error: &ConfigError) -> ExitCode {
    eprintln!("agentd: {error}");
    ExitCode::from(exit::BAD_CONFIG)
}

impl Http {
    fn into_tunnel(self, overrides: &Overrides) -> Result<TunnelConfig, ConfigError> {
        let name = match &self.name {
            Some(name) => name.parse().map_err(|error| ConfigError::new(format!("{error}")))?,
            None => {
                let random = getrandom::u64();
                let random = random.map_err(|error| ConfigError::new(format!("no random name: {error}")))?;
                name::from_patterns(random, &overrides.may_open()).map_err(ConfigError::new)?
            }
        };
        let mut tunnel = TunnelConfig::new(name, self.upstream);
        if let Some(rule) = &self.host_header {
            tunnel.host_header = parse_host_header(rule).map_err(ConfigError::new)?;
        }
        if let Some(timeout) = self.request_timeout {
            tunnel.request_timeout = timeout;
        }
        if let Some(max_concurrent) = self.max_concurrent {
            tunnel.max_concurrent = max_concurrent;
        }
        Ok(tunnel)
    }
}

/// What `config check --json` answers.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Checked<'a> {
    Valid { ok: bool, edge: String, tunnels: Vec<CheckedTunnel> },
    Invalid { ok: bool, error: &'a ConfigError },
}

#[derive(serde::Serialize)]
struct CheckedTunnel {
    name: String,
    upstream: String,
}

fn check(config: &Result<Config, ConfigError>, json: bool) -> ExitCode {
    if json {
        let answer = match config {
            Ok(config) => Checked::Valid {
                ok: true,
                edge: config.edge.url.to_string(),
                tunnels: config
                    .tunnels
                    .iter()
                    .map(|tunnel| CheckedTunnel {
                        name: tunnel.name.to_string(),
                        upstream: tunnel.upstream.to_string(),
                    })
                    .collect(),
            },
            Err(error) => Checked::Invalid { ok: false, error },
        };
        println!("{}", serde_json::to_string(&answer).expect("texts and numbers are JSON"));
    }
    match config {
        Ok(config) if !json => {
            println!("the configuration is valid: {} tunnels to {}", config.tunnels.len(), config.edge.url);
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(_) if json => ExitCode::from(exit::BAD_CONFIG),
        Err(error) => bad_config(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_cannot_be_given_as_an_argument() {
        let cli = Cli::try_parse_from(["agentd", "http", "3000", "--token", "secret"]);
        assert_eq!(cli.unwrap_err().kind(), clap::error::ErrorKind::UnknownArgument);
    }
}
