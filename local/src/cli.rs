//! The command line: what enters are arguments, what leaves is a [`Call`].

use std::{ffi::OsString, net::SocketAddr, path::PathBuf};

use agentd::config::address::Address;
use clap::{Args, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser};

use proto::limits;

use crate::{
    chaos::ChaosConfig,
    latency::Choice,
    public::fronts::{Kind as Front, behaviour},
};

/// Runs the whole edge on this machine, without AWS.
#[derive(Debug, Parser)]
#[command(name = "local", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    hidden: Option<Hidden>,
}

/// What the edge runs with.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Your own service: a port, host:port or URL. Without it, a demo page is served
    #[arg(long, value_name = "PORT|URL")]
    pub upstream: Option<Address>,
    /// Where public clients connect; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = loopback)]
    pub public: SocketAddr,
    /// Where agents connect; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081", value_parser = loopback)]
    pub agents: SocketAddr,
    /// The domain of the tunnels: names under it lead here where they resolve to this machine, as every name
    /// under localhost does
    #[arg(long, value_name = "NAME", default_value = "localhost", value_parser = domain)]
    pub domain: String,
    /// Who carries public WebSockets: relay, or none, which answers 501
    #[arg(long, value_name = "WHO", value_enum, default_value_t)]
    pub websockets: Websockets,
    /// Do not start an agent for the tunnel `demo`
    #[arg(long)]
    pub no_agent: bool,
    /// Let calls take as long as on the named network: none, aws, or a file with a profile of your own; with
    /// `,cpu=MB` each process of a function gets the part of a core that so much memory buys in Lambda
    #[arg(long, value_name = "PROFILE", default_value = "none")]
    pub latency: Choice,
    /// What goes wrong, as key=value,…: seed, clock, duplicate, reorder, drop_link, gone, throttle,
    /// kill_function, lose, delay
    #[arg(long, value_name = "FAULTS", default_value = "")]
    pub chaos: ChaosConfig,
    /// How much one owner and one tunnel may use, as key=number,…: owner_connections, owner_tunnels,
    /// owner_requests, owner_rate, tunnel_connections, tunnel_requests, tunnel_rate (requests: in flight;
    /// rate: a minute)
    #[arg(long, value_name = "LIMITS", default_value = "", value_parser = limits)]
    pub limits: String,
    /// How many invocations may run at the same time, all functions together, as in an account with so few: a new one
    /// has 10. Without it they are not counted
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(10..=1000))]
    pub executions: Option<u32>,
    /// How many of them are kept for agents' messages (the parameter reservedForResponse)
    #[arg(long, value_name = "COUNT", requires = "executions", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub reserved_for_response: Option<u32>,
    /// How many free mailboxes are kept ready (the parameter mailboxesKept)
    #[arg(long, value_name = "COUNT", default_value_t = limits::MAILBOXES_KEPT, value_parser = RangedU64ValueParser::<usize>::new().range(1..=200))]
    pub mailboxes: usize,
    /// Which front of AWS is imitated, with what it does to traffic (docs/aws-fronts.md); direct does nothing
    #[arg(long, value_name = "FRONT", value_enum, default_value_t)]
    pub front: Front,
    /// Leave out one thing that the front does, by its name in docs/aws-fronts.md; may be given again
    #[arg(long, value_name = "NAME", value_parser = behaviour)]
    pub kind: Vec<String>,
    /// Keep keys, tables, STANDARD runs and lasting queues here, also when this is killed
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// What is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t)]
    pub log_level: LogLevel,
}

/// Who carries public WebSockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Websockets {
    /// A process of `relay`.
    #[default]
    Relay,
    /// Nobody.
    None,
}

/// What is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogLevel {
    /// What is broken.
    Error,
    /// And what is surprising.
    Warn,
    /// And what changes.
    #[default]
    Info,
    /// And every request.
    Debug,
    /// And every message.
    Trace,
}

impl LogLevel {
    /// The level as filters spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// What this program starts itself as.
#[derive(Debug, Subcommand)]
enum Hidden {
    /// One process of a function
    #[command(hide = true)]
    Function {
        /// Its name
        #[arg(value_enum)]
        name: Function,
    },
    /// The relay
    #[command(hide = true)]
    Relay,
    /// An agent
    #[command(hide = true, disable_help_flag = true)]
    Agent {
        /// As `agentd` takes them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// The functions of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Function {
    /// Decides who may connect.
    Authorizer,
    /// Opens a connection and registers its tunnels.
    Connect,
    /// Does what the run of a delivery asks for.
    Deliver,
    /// Answers questions about deliveries.
    Deliveries,
    /// Cleans up after a connection.
    Disconnect,
    /// Takes a public request.
    Ingress,
    /// Takes an agent's message.
    Response,
    /// Ends an identity.
    Revoke,
    /// Looks after the mailboxes.
    Sweep,
}

impl Function {
    /// Every function.
    pub const ALL: [Self; 9] = [
        Self::Authorizer,
        Self::Connect,
        Self::Deliver,
        Self::Deliveries,
        Self::Disconnect,
        Self::Ingress,
        Self::Response,
        Self::Revoke,
        Self::Sweep,
    ];

    /// The function's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Authorizer => "authorizer",
            Self::Connect => "connect",
            Self::Deliver => "deliver",
            Self::Deliveries => "deliveries",
            Self::Disconnect => "disconnect",
            Self::Ingress => "ingress",
            Self::Response => "response",
            Self::Revoke => "revoke",
            Self::Sweep => "sweep",
        }
    }
}

/// What this program is asked to do.
#[derive(Debug)]
pub enum Call {
    /// Run the edge.
    Run(Box<Options>),
    /// Be one process of a function.
    Function(Function),
    /// Be the relay.
    Relay,
    /// Be an agent.
    Agent(Vec<OsString>),
}

/// Reads the command line, the program's name first.
///
/// # Errors
///
/// What clap has to say, help included.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Call, clap::Error> {
    let Cli { options, hidden } = Cli::try_parse_from(arguments)?;
    Ok(match hidden {
        None => Call::Run(Box::new(options)),
        Some(Hidden::Function { name }) => Call::Function(name),
        Some(Hidden::Relay) => Call::Relay,
        Some(Hidden::Agent { arguments }) => Call::Agent(arguments),
    })
}

/// Limits that the functions will take.
fn limits(text: &str) -> Result<String, String> {
    let checked = text.parse::<edge::limit::Limits>();
    checked.map(|_| text.to_owned()).map_err(|problem| format!("the list {problem}"))
}

/// A name that may stand behind a tunnel's.
fn domain(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A tunnel's name, at most 63 characters and a dot, stands before it.
    if name.len() <= 253 - 64 && name.split('.').all(is_label) {
        Ok(name)
    } else {
        Err("use a DNS name such as localhost or tunnel.example.com".to_owned())
    }
}

/// An address of this machine alone, or a port of it.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address = match text.parse::<u16>() {
        Ok(port) => SocketAddr::from(([127, 0, 0, 1], port)),
        Err(_) => text
            .replace("localhost:", "127.0.0.1:")
            .parse::<SocketAddr>()
            .map_err(|_| "use a port, or an address with a port such as 127.0.0.1:8080".to_owned())?,
    };
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err("the local edge is for this machine alone: use 127.0.0.1 or [::1]".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Call, clap::Error> {
        super::parse(line.split_whitespace().map(OsString::from))
    }

    fn options(line: &str) -> Options {
        match parse(line).unwrap() {
            Call::Run(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_interface_is_sound() {
        Cli::command().debug_assert();
        for function in Function::ALL {
            let call = parse(&format!("local function {}", function.name())).unwrap();
            assert!(matches!(call, Call::Function(parsed) if parsed == function));
        }
        let Call::Agent(arguments) = parse("local agent http 3000 --name demo --help").unwrap() else {
            panic!()
        };
        assert_eq!(arguments, ["http", "3000", "--name", "demo", "--help"]);
        assert!(parse("local function nobody").is_err());
    }

    #[test]
    fn defaults_and_ports() {
        let defaults = options("local");
        assert_eq!(defaults.public, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(defaults.agents, "127.0.0.1:8081".parse().unwrap());
        assert_eq!(defaults.domain, "localhost");
        assert_eq!(options("local --domain Tunnel.Example.com.").domain, "tunnel.example.com");
        assert!(!defaults.no_agent && defaults.upstream.is_none() && defaults.state_dir.is_none());
        let set = options(
            "local --upstream 3000 --public 0 --agents localhost:9 --no-agent --latency aws --chaos clock=10,gone=0.5 \
             --state-dir /tmp/x --log-level debug",
        );
        assert_eq!((set.public.port(), set.agents.port()), (0, 9));
        assert_eq!((set.latency.profile.as_str(), set.log_level), ("aws", LogLevel::Debug));
        assert_eq!(set.chaos.clock, 10);
        assert_eq!(options("local --mailboxes 1").mailboxes, 1);
        assert_eq!(options("local --mailboxes 200").mailboxes, 200);
        let chaos = options("local --chaos clock=10000,delay=60000").chaos;
        assert_eq!((chaos.clock, chaos.delay.as_secs()), (10_000, 60));
        for upstream in ["3000", "127.0.0.1:3000", "HTTP://localhost:3000/", "unix:/run/app.sock"] {
            assert!(options(&format!("local --upstream {upstream}")).upstream.is_some(), "{upstream}");
        }
    }

    #[test]
    fn mistakes_are_told_in_one_sentence() {
        for (line, expected) in [
            ("local --public 0.0.0.0:8080", "for this machine alone"),
            ("local --agents x", "use a port"),
            ("local --latency aws,cpu=127", "128 to 10240"),
            ("local --chaos wind=1", "unknown key"),
            ("local --chaos gone=2", "probability"),
            ("local --domain http://x", "use a DNS name"),
            ("local --domain a..b", "use a DNS name"),
            ("local --limits tunnel_requests=0", "out of range"),
            ("local --executions 9", "10..=1000"),
            ("local --executions 1001", "10..=1000"),
            ("local --executions 10 --reserved-for-response 0", "1..=1000"),
            ("local --mailboxes 0", "1..=200"),
            ("local --mailboxes 201", "1..=200"),
            ("local --mailboxes 100000000", "1..=200"),
            ("local --upstream abc", "\"abc\" is none of 3000, host:port"),
            ("local --upstream 0", "no port between 1 and 65535"),
            ("local --upstream http://localhost:3000/app", "has a path"),
            ("local --chaos clock=10001", "from 1 to 10000"),
            ("local --chaos delay=60001", "from 0 to 60000"),
            ("local --reserved-for-response 3", "--executions"),
            ("local --front edge", "cloudfront"),
            ("local --kind slow", "response-rate"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
