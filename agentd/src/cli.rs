//! The command line.

use std::{
    ffi::{OsStr, OsString},
    io::IsTerminal as _,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{
    Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    builder::{PossibleValue, Resettable, StringValueParser, TypedValueParser},
    error::{ContextKind, ContextValue, ErrorKind},
};
use proto::id::TunnelName;
use tracing_subscriber::filter::Targets;

use crate::{
    config::{
        self, Config, ConfigError, LogConfig, LogFormat, Overrides, TunnelConfig, address::Address,
        parse_duration, parse_host_header, parse_log_level, parse_origin,
    },
    control::{self, client},
    identity,
    identity::credential::{ENV_CREDENTIALS, ENV_TOKEN},
    identity::name,
    inspect::screen::Screen,
    operate::ask::{self, Format},
    operate::background::{self, Forked, Starter, StateDir},
    operate::check,
    operate::deliveries,
    operate::diagnose,
    operate::exit,
    operate::explain::{self, Thought},
    operate::output::{answer, complain, stopped},
    operate::reference,
    operate::requests,
    operate::service,
    report::telemetry,
    resolver::BLOCKING_THREADS,
    supervisor::{self, Audience, Outcome, Setup, Source},
};

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
    /// Where the running agent is asked and told. Default: the usual place of this user.
    #[arg(long, global = true, value_name = "SOCKET", env = "AGENTD_CONTROL_SOCKET")]
    control_socket: Option<PathBuf>,
    /// How log lines look. Default: human on a terminal, journal under systemd, json elsewhere.
    #[arg(long, global = true, env = "AGENTD_LOG_FORMAT", value_enum)]
    log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or target=level,….
    #[arg(long, global = true, env = "AGENTD_LOG_LEVEL", value_name = "LEVEL", value_parser = parse_log_level)]
    log_level: Option<Targets>,
}

// What a command takes is put together for the one that was named: a daemon would keep the room of all others.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Opens one tunnel in the foreground, for people.
    Http(Http),
    /// Runs the daemon in the foreground: what systemd starts.
    Run {
        #[command(flatten)]
        service: Service,
    },
    /// Starts the daemon in the background, where no systemd looks after it.
    Start {
        #[command(flatten)]
        service: Service,
        #[command(flatten)]
        place: Place,
    },
    /// Stops the running agent after what is in flight.
    Stop {
        #[command(flatten)]
        reach: Reach,
    },
    /// Stops the daemon in the background and starts it again.
    Restart {
        #[command(flatten)]
        service: Service,
        #[command(flatten)]
        place: Place,
    },
    /// Says how the running agent is, the daemon or else one of `agentd http`: code 0 if one runs, 1 if not.
    Status {
        #[command(flatten)]
        reach: Reach,
        /// Answer with a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Has the running agent read its configuration again: code 0 if it took it, 78 if it kept the old one.
    Reload {
        #[command(flatten)]
        reach: Reach,
        /// Answer with a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Says by its exit code whether every tunnel of the running agent is open.
    Ready {
        #[command(flatten)]
        reach: Reach,
        /// How long to wait for it.
        #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
        wait: Duration,
    },
    /// Goes the way of a public request step by step and says where it ends: code 0 if it works.
    Diagnose {
        #[command(flatten)]
        reach: Reach,
        /// Write the report to this file as well. It holds nothing secret.
        #[arg(short = 'w', long = "write", value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Lists the requests that the running agent has captured.
    Requests {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        wanted: requests::Wanted,
        /// Go on with those that come.
        #[arg(long, short)]
        follow: bool,
        /// How many at most.
        #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
        /// Answer with a JSON list; with --follow with an object on each line.
        #[arg(long)]
        json: bool,
    },
    /// Shows one captured request.
    Request {
        #[command(subcommand)]
        command: RequestCommand,
    },
    /// Sends a captured request to its upstream again: code 0 if it was answered.
    Replay {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        replay: requests::Replay,
        /// Answer with a JSON list.
        #[arg(long)]
        json: bool,
    },
    /// Writes captured requests for other programs. What is secret is masked.
    Export {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        export: requests::Export,
    },
    /// Puts requests from elsewhere into the list of the running agent, to be replayed.
    Import {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        import: requests::Import,
    },
    /// Looks after what the edge keeps until it can be delivered.
    Delivery {
        #[command(subcommand)]
        command: DeliveryCommand,
    },
    /// Shows the tunnels of the running agent.
    Tunnel {
        #[command(subcommand)]
        command: TunnelCommand,
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

// How to run as a service. What is flattened has no doc comment: it would take the place of the command's own.
#[derive(Debug, Args)]
struct Service {
    /// The configuration file.
    #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// Where /healthz, /ready and /metrics are served over HTTP: a loopback address such as 127.0.0.1:4041.
    #[arg(long, value_name = "ADDRESS", env = "AGENTD_STATUS_ADDRESS")]
    status_address: Option<String>,
    /// Where the inspector's page is, if a tunnel is inspected: a loopback address. Default: 127.0.0.1:4040.
    #[arg(long, value_name = "ADDRESS", env = "AGENTD_INSPECT_ADDRESS")]
    inspect_address: Option<String>,
    /// The folder of log files, a new one each day. Default: standard error, or the state folder in the
    /// background.
    #[arg(long, value_name = "DIR", env = "AGENTD_LOG_DIR")]
    log_dir: Option<PathBuf>,
}

// Where a running agent is found.
#[derive(Debug, Args)]
struct Reach {
    #[command(flatten)]
    place: Place,
    /// The configuration file, which may name the control socket.
    #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum RequestCommand {
    /// Shows everything about one.
    Show {
        /// Its number in the list.
        id: u64,
        #[command(flatten)]
        reach: Reach,
        /// With both bodies; where the output is no terminal, the response's body and nothing else, as it passed.
        #[arg(long)]
        body: bool,
        /// With what is masked otherwise.
        #[arg(long)]
        reveal: bool,
        /// Answer with a JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum DeliveryCommand {
    /// Lists deliveries, the newest first.
    List {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        wanted: deliveries::List,
    },
    /// Shows everything about one.
    Show {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        wanted: deliveries::Show,
    },
    /// Delivers again what is dead. What was delivered or cancelled can be where it had no body: those are not kept.
    Retry {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        retry: deliveries::Retry,
    },
    /// Gives up what has not been delivered, and forgets its body.
    Cancel {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        cancel: deliveries::Cancel,
    },
    /// Holds everything that is kept for a tunnel until it is resumed. Live requests pass.
    Pause {
        #[command(flatten)]
        reach: Reach,
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// Goes on with what a pause has held.
    Resume {
        #[command(flatten)]
        reach: Reach,
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// Says by its exit code whether nothing waits any more.
    Drain {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        drain: deliveries::Drain,
    },
}

#[derive(Debug, Subcommand)]
enum TunnelCommand {
    /// Lists all.
    List {
        #[command(flatten)]
        reach: Reach,
        /// Answer with a JSON list.
        #[arg(long)]
        json: bool,
    },
    /// Shows everything about one.
    Info {
        /// The tunnel.
        name: String,
        #[command(flatten)]
        reach: Reach,
        /// Answer with a JSON object.
        #[arg(long)]
        json: bool,
    },
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
    #[arg(long, value_name = "RULE", value_parser = HostRule, hide_possible_values = true)]
    host_header: Option<String>,
    /// What the Origin field says to the service where it is the tunnel's own: "preserve" or "upstream".
    /// Default: "upstream" for WebSockets, "preserve" for the rest.
    #[arg(long, value_name = "RULE", value_parser = ["preserve", "upstream"])]
    origin: Option<String>,
    /// How long the service may take to begin an answer.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    request_timeout: Option<Duration>,
    /// Where the inspector's page is: a loopback address. Where the port is taken, the next free one is used.
    /// Default: 127.0.0.1:4040.
    #[arg(long, value_name = "ADDRESS", env = "AGENTD_INSPECT_ADDRESS")]
    inspect_address: Option<String>,
    /// Only lines, also on a terminal: no keys, no screen. So it is where TERM is "dumb".
    #[arg(long)]
    plain: bool,
    /// Capture nothing, and have no page.
    #[arg(long)]
    no_inspect: bool,
    /// How many requests are served at a time.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_concurrent: Option<u32>,
}

/// Takes any text, and has completions offer the two rules that have a name.
#[derive(Debug, Clone)]
struct HostRule;

impl TypedValueParser for HostRule {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(["upstream", "preserve"].into_iter().map(PossibleValue::new)))
    }
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
    /// Says which route and rules a request would meet, without sending it.
    Explain {
        /// The public address, with its scheme.
        url: http::Uri,
        /// The method.
        #[arg(long, default_value = "GET")]
        method: http::Method,
        /// The address it would come from.
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<std::net::IpAddr>,
        /// The configuration file.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
    },
}

/// Runs the program with `args`, the program's name first.
pub(crate) fn main_with_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match parse(&args) {
        Ok(cli) => cli,
        Err(error) => {
            if let Some(message) = blame_environment(&error, &args) {
                return bad_config(&ConfigError::new(message));
            }
            // Help and version are "errors" that go to standard output with code 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::RUNTIME));
        }
    };
    let common = cli.common;
    let mut overrides = Overrides {
        edge: common.edge.filter(|value| !value.is_empty()),
        token_file: common.token_file,
        token: std::env::var(ENV_TOKEN).ok().filter(|value| !value.is_empty()),
        credentials: std::env::var_os(ENV_CREDENTIALS).map(PathBuf::from),
        ca_file: common.ca_file,
        grace_period: common.grace_period,
        control_socket: common.control_socket,
        status_address: None,
        inspect_address: None,
        log: LogConfig { level: common.log_level, format: common.log_format, ..LogConfig::default() },
    };
    match cli.command {
        Command::Http(http) => {
            // What people want to see goes to standard output; the log keeps to what is wrong.
            overrides.log.level.get_or_insert_with(|| Targets::new().with_default(tracing::Level::WARN));
            overrides.log.format.get_or_insert(LogFormat::Human);
            overrides.inspect_address = http.inspect_address.clone().filter(|value| !value.is_empty());
            let is_plain = http.plain;
            match http.into_tunnel(&overrides).and_then(|tunnel| overrides.with_tunnel(tunnel)) {
                Ok(config) => in_foreground(config, is_plain),
                Err(error) => bad_config(&error),
            }
        }
        Command::Run { service } => match service.load(overrides) {
            Ok((config, source)) => logged(&config.log.clone(), || {
                let control_socket = control::place_for_service(environment, is_root());
                let setup = Setup {
                    config,
                    source: Some(source),
                    audience: Audience::Service,
                    control_socket,
                    screen: None,
                };
                run(setup, || {}).unwrap_or_else(Failure::said)
            }),
            Err(error) => bad_config(&error),
        },
        Command::Start { service, place } => match service.load(overrides) {
            Ok((config, source)) => start(config, source, place),
            Err(error) => bad_config(&error),
        },
        Command::Restart { service, place } => match service.load(overrides) {
            // What runs goes on where the new configuration is not valid.
            Ok((config, source)) => match in_background(place.clone(), stop) {
                ExitCode::SUCCESS => start(config, source, place),
                failure => failure,
            },
            Err(error) => bad_config(&error),
        },
        Command::Stop { reach } => {
            let places = reach.places(overrides.control_socket);
            in_background(reach.place, |state| {
                Ok(match background::stop(state)? {
                    Some(took) => stopped(took),
                    None => ask::stop(&places),
                })
            })
        }
        Command::Status { reach, json } => {
            ask::status(&reach.places_of_any(overrides.control_socket), Format::from_flag(json))
        }
        Command::Reload { reach, json } => {
            ask::reload(&reach.places(overrides.control_socket), Format::from_flag(json))
        }
        Command::Ready { reach, wait } => ask::ready(&reach.places(overrides.control_socket), wait),
        Command::Diagnose { reach, file } => {
            let places = reach.places(overrides.control_socket.clone());
            diagnose::run(config::load(&reach.config, &overrides), &places, file.as_deref())
        }
        Command::Requests { reach, wanted, follow, limit, json } => {
            let places = reach.places_of_any(overrides.control_socket);
            requests::list(&places, &wanted, limit, follow, Format::from_flag(json))
        }
        Command::Request { command: RequestCommand::Show { id, reach, body, reveal, json } } => {
            let places = reach.places_of_any(overrides.control_socket);
            requests::show(&places, id, body, reveal, Format::from_flag(json))
        }
        Command::Replay { reach, replay, json } => {
            requests::replay(&reach.places_of_any(overrides.control_socket), &replay, Format::from_flag(json))
        }
        Command::Export { reach, export } => {
            requests::export(&reach.places_of_any(overrides.control_socket), &export)
        }
        Command::Import { reach, import } => {
            requests::import(&reach.places_of_any(overrides.control_socket), &import)
        }
        Command::Delivery { command } => {
            let places = |reach: &Reach| reach.places(overrides.control_socket.clone());
            match command {
                DeliveryCommand::List { reach, wanted } => deliveries::list(&places(&reach), &wanted),
                DeliveryCommand::Show { reach, wanted } => deliveries::show(&places(&reach), &wanted),
                DeliveryCommand::Retry { reach, retry } => deliveries::retry(&places(&reach), &retry),
                DeliveryCommand::Cancel { reach, cancel } => deliveries::cancel(&places(&reach), &cancel),
                DeliveryCommand::Pause { reach, tunnel } => deliveries::pause(&places(&reach), tunnel),
                DeliveryCommand::Resume { reach, tunnel } => deliveries::resume(&places(&reach), tunnel),
                DeliveryCommand::Drain { reach, drain } => deliveries::drain(&places(&reach), &drain),
            }
        }
        Command::Tunnel { command } => match command {
            TunnelCommand::List { reach, json } => {
                ask::tunnel_list(&reach.places_of_any(overrides.control_socket), Format::from_flag(json))
            }
            TunnelCommand::Info { name, reach, json } => ask::tunnel_info(
                &reach.places_of_any(overrides.control_socket),
                &name,
                Format::from_flag(json),
            ),
        },
        Command::Identity(command) => identity::run(command, overrides.token_file.as_deref()),
        Command::Config { command: ConfigCommand::Check { config, json } } => {
            check::run(&config::load(&config, &overrides), json)
        }
        Command::Config { command: ConfigCommand::Explain { url, method, ip, config } } => {
            explain::run(&config::load(&config, &overrides), &Thought { url, method, ip })
        }
        Command::Service { command } => match service::run(command, &overrides, environment) {
            Ok(code) => code,
            Err(service::Error::Config(error)) => bad_config(&error),
            Err(error) => failed(&error.to_string()),
        },
        Command::Reference(command) => reference::run(&command, Cli::command()),
    }
}

fn stop(state: &StateDir) -> Result<ExitCode, background::Error> {
    Ok(match background::stop(state)? {
        Some(took) => stopped(took),
        None => answer("not running\n", ExitCode::SUCCESS),
    })
}

/// Reads the command line. A variable of the environment that is empty counts as one that is not set.
fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    let is_empty = |(name, value): (OsString, OsString)| {
        value.is_empty() && name.as_encoded_bytes().starts_with(b"AGENTD_")
    };
    if !std::env::vars_os().any(is_empty) {
        return Cli::try_parse_from(args);
    }
    let mut command = without_environment(all_commands(), |value| value.is_empty());
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// The command line with what each command takes.
fn all_commands() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// Leaves out the variables of the environment whose values are `ignored`.
fn without_environment(command: clap::Command, ignored: fn(&OsStr) -> bool) -> clap::Command {
    let reset = |arg: clap::Arg| {
        let value = arg.get_env().and_then(std::env::var_os);
        if value.is_some_and(|value| ignored(&value)) { arg.env(Resettable::Reset) } else { arg }
    };
    command.mut_args(reset).mut_subcommands(|command| without_environment(command, ignored))
}

/// Says what is wrong with the environment, if that is what is wrong: without it the same arguments do.
fn blame_environment(error: &clap::Error, args: &[OsString]) -> Option<String> {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return None;
    }
    without_environment(all_commands(), |_| true).try_get_matches_from(args).ok()?;
    let ContextValue::String(flag) = error.get(ContextKind::InvalidArg)? else { return None };
    let flag = flag.split_whitespace().next()?.trim_start_matches('-');
    let variable = format!("AGENTD_{}", flag.replace('-', "_").to_uppercase());
    let text = error.to_string();
    let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    Some(format!("the environment variable {variable}: {reason}"))
}

/// A folder that the environment names. One that is empty or relative counts as not named, as the XDG Base Directory
/// Specification asks for: it would be another one in each working directory.
fn environment(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|folder| folder.is_absolute())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Does `work` while the log is written.
fn logged(log: &LogConfig, work: impl FnOnce() -> ExitCode) -> ExitCode {
    match telemetry::start(log, None) {
        Ok(_flush) => work(),
        Err(error) => Failure::log(&error).said(),
    }
}

impl Service {
    fn load(self, mut overrides: Overrides) -> Result<(Config, Source), ConfigError> {
        overrides.status_address = self.status_address.filter(|value| !value.is_empty());
        overrides.inspect_address = self.inspect_address.filter(|value| !value.is_empty());
        overrides.log.dir = self.log_dir;
        let config = config::load(&self.config, &overrides)?;
        Ok((config, Source { path: self.config, overrides }))
    }
}

impl Reach {
    /// Also those of `agentd http`, behind the daemon's.
    fn places_of_any(&self, named: Option<PathBuf>) -> Vec<PathBuf> {
        let is_named = named.is_some() || self.place.state_dir.is_some();
        let mut places = self.places(named);
        if !is_named {
            places.extend(client::places_of_people(environment));
        }
        places
    }

    fn places(&self, named: Option<PathBuf>) -> Vec<PathBuf> {
        let usual = StateDir::find(None, environment, is_root());
        client::places(
            named,
            self.place.state_dir.as_deref(),
            Some(&self.config),
            usual.as_ref().map(StateDir::path),
            environment,
            is_root(),
        )
    }
}

fn in_background(
    place: Place,
    act: impl FnOnce(&StateDir) -> Result<ExitCode, background::Error>,
) -> ExitCode {
    let Some(state) = StateDir::find(place.state_dir, environment, is_root()) else {
        return failed("there is no home folder; say --state-dir DIR");
    };
    act(&state).unwrap_or_else(|error| failed(&error.to_string()))
}

fn start(mut config: Config, source: Source, place: Place) -> ExitCode {
    in_background(place, |state| match background::start(state, config.grace_period)? {
        Forked::Starter(pid) => {
            let said =
                format!("started with pid {}; log in {}\n", pid.as_raw_nonzero(), state.log_dir().display());
            Ok(answer(&said, ExitCode::SUCCESS))
        }
        Forked::Failed { code, reason } => {
            complain(reason);
            Ok(ExitCode::from(code))
        }
        Forked::Daemon(starter) => {
            let dir = config.log.dir.get_or_insert_with(|| state.log_dir());
            let log = LogConfig { dir: Some(dir.clone()), ..config.log.clone() };
            // The starter reports a failure, because nobody sees this process any more.
            let flush = match telemetry::start(&log, None) {
                Ok(flush) => flush,
                Err(error) => return Ok(Failure::log(&error).said_to(starter)),
            };
            let control_socket = Some(control::in_folder(state.path()));
            let setup = Setup {
                config,
                source: Some(source),
                audience: Audience::Service,
                control_socket,
                screen: None,
            };
            let mut starter = Some(starter);
            let outcome = run(setup, || {
                if let Some(starter) = starter.take() {
                    starter.ready();
                }
            });
            drop(flush);
            Ok(outcome.unwrap_or_else(|failure| match starter {
                Some(starter) => failure.said_to(starter),
                None => ExitCode::from(failure.code),
            }))
        }
    })
}

/// Why the agent could not begin, and the code to end with.
struct Failure {
    code: u8,
    reason: String,
}

impl Failure {
    fn new(reason: String) -> Self {
        Self { code: exit::RUNTIME, reason }
    }

    fn log(error: &std::io::Error) -> Self {
        Self::new(format!("cannot write the log: {error}"))
    }

    /// Says it here.
    fn said(self) -> ExitCode {
        complain(self.reason);
        ExitCode::from(self.code)
    }

    /// Has it said by the process that was asked to start a daemon.
    fn said_to(self, starter: Starter) -> ExitCode {
        starter.failed(self.code, &self.reason);
        ExitCode::from(self.code)
    }
}

impl From<supervisor::StartError> for Failure {
    fn from(error: supervisor::StartError) -> Self {
        let code = match &error {
            supervisor::StartError::Tls(_) => exit::BAD_CONFIG,
            supervisor::StartError::System(_) | supervisor::StartError::Listen(_) => exit::RUNTIME,
        };
        Self { code, reason: error.to_string() }
    }
}

/// Runs the agent to its end; `ready` is called once it has all that it needs to serve.
fn run(setup: Setup, ready: impl FnOnce()) -> Result<ExitCode, Failure> {
    // One thread: the work is waiting. It is started here so that whatever must happen before any
    // thread exists has happened.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return Err(Failure::new(format!("cannot start: {error}"))),
    };
    // Elsewhere the log is where the reason is said as well.
    let logs_to_files = setup.config.log.dir.is_some();
    let outcome = runtime.block_on(supervisor::run(setup, ready));
    // A look-up in progress must not hold up the exit.
    runtime.shutdown_background();
    match outcome {
        Ok(Outcome::Stopped) => Ok(ExitCode::SUCCESS),
        Ok(Outcome::IdentityRefused) => Ok(ExitCode::from(exit::IDENTITY_REFUSED)),
        Err(error) => {
            if logs_to_files {
                tracing::error!("{error}");
            }
            Err(error.into())
        }
    }
}

/// Serves one tunnel for somebody who sits here: on a screen with keys where there is a terminal for both, else in
/// lines.
fn in_foreground(config: Config, is_plain: bool) -> ExitCode {
    let is_terminal = std::io::stdout().is_terminal();
    let has_keys = is_terminal && std::io::stdin().is_terminal() && !is_plain && !telemetry::is_dumb();
    let is_inspected = config.tunnels.iter().any(|tunnel| tunnel.inspect);
    // A terminal that can't be drawn on has lines all the same.
    let opened = (has_keys && is_inspected).then(Screen::open).and_then(Result::ok);
    let (screen, to_screen) = opened.unzip();
    let log = match telemetry::start(&config.log, to_screen.clone()) {
        Ok(flush) => flush,
        Err(error) => {
            drop(screen);
            return Failure::log(&error).said();
        }
    };
    let (terminal, lines) = match to_screen {
        Some(screen) => (telemetry::Terminal::Screen(screen), None),
        None => match telemetry::Terminal::open() {
            Ok((terminal, flush)) => (terminal, Some(flush)),
            Err(error) => return failed(&format!("cannot write to standard output: {error}")),
        },
    };
    let audience = Audience::People { terminal, page: is_terminal && !is_plain };
    let control_socket = control::place_for_people(environment);
    let outcome = run(Setup { config, source: None, audience, control_socket, screen }, || {});
    drop((lines, log));
    outcome.unwrap_or_else(Failure::said)
}

fn failed(message: &str) -> ExitCode {
    complain(message);
    ExitCode::from(exit::RUNTIME)
}

fn bad_config(error: &ConfigError) -> ExitCode {
    complain(error);
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
        let mut tunnel = TunnelConfig::new(name, Some(self.upstream));
        tunnel.inspect = !self.no_inspect;
        if let Some(rule) = &self.host_header {
            tunnel.host_header = parse_host_header(rule).map_err(ConfigError::new)?;
        }
        if let Some(rule) = &self.origin {
            tunnel.origin = parse_origin(rule).map_err(ConfigError::new)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn completions_offer_the_rules_of_the_host_and_any_name_is_taken() {
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "agentd", &mut script);
            let script = String::from_utf8(script).unwrap();
            let after = script.split("host-header").skip(1);
            let offers = |part: &str| {
                let near: String = part.chars().take(200).collect();
                near.contains("upstream") && near.contains("preserve")
            };
            assert!(after.into_iter().any(offers), "{shell}");
        }
        assert!(Cli::try_parse_from(["agentd", "http", "3000", "--host-header", "a.example:81"]).is_ok());
    }

    #[test]
    fn a_command_says_of_itself_what_the_list_of_commands_says_of_it() {
        let listed = Cli::command();
        let own = all_commands();
        for listed in listed.get_subcommands() {
            let own = own.find_subcommand(listed.get_name()).unwrap();
            let about = |command: &clap::Command| command.get_about().map(ToString::to_string);
            assert_eq!(about(own), about(listed), "{}", listed.get_name());
            assert_eq!(own.get_long_about().map(ToString::to_string), None, "{}", listed.get_name());
        }
        let about = |path: [&str; 2]| {
            let command = path.iter().fold(&own, |command, name| command.find_subcommand(name).unwrap());
            command.get_about().unwrap().to_string()
        };
        for (path, wanted) in [
            (["delivery", "list"], "Lists deliveries"),
            (["delivery", "show"], "Shows everything"),
            (["delivery", "retry"], "Delivers again"),
            (["delivery", "cancel"], "Gives up"),
            (["delivery", "pause"], "Holds everything"),
            (["delivery", "resume"], "Goes on with"),
            (["delivery", "drain"], "Says by its exit code"),
            (["tunnel", "list"], "Lists all"),
            (["tunnel", "info"], "Shows everything"),
            (["request", "show"], "Shows everything"),
            (["config", "check"], "Says whether"),
            (["config", "explain"], "Says which"),
        ] {
            assert!(about(path).starts_with(wanted), "{path:?}: {}", about(path));
        }
    }

    #[test]
    fn a_token_cannot_be_given_as_an_argument() {
        let cli = Cli::try_parse_from(["agentd", "http", "3000", "--token", "secret"]);
        assert_eq!(cli.unwrap_err().kind(), ErrorKind::UnknownArgument);
    }
}
