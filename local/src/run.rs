//! Puts the edge together, keeps it running and takes it apart again.
//!
//! What enters are [`Options`]; what leaves is an exit code. The first four lines on standard output
//! are for scripts; everything else goes to standard error.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use ::edge::{
    config::{Env, env},
    limit::{EXECUTIONS_FEW, edge_requests},
};
use anyhow::{Context, bail};
use authorizer::config::{
    ENV_JWKS, ENV_JWKS_FILE, ENV_JWKS_URL, ENV_OWNER_CLAIM, ENV_REVOKED, ENV_TOKEN_AUDIENCE, ENV_TOKEN_ISSUER,
};
use proto::limits;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use tokio::{
    net::TcpListener,
    process::{Child, Command},
    signal::unix::{Signal as Signals, SignalKind, signal},
    sync::{Semaphore, watch},
    task::JoinHandle,
    time,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::{
    agents::{self, AgentApi},
    aws::{
        Aws, Options as AwsOptions, RELAY_SERVICE,
        policy::{OPERATOR, RELAY},
    },
    chaos::Fault,
    cli::{Function, LogLevel, Options, Websockets},
    demo::{self, Demo},
    dynamodb::{Dynamodb, Table},
    identity::{self, Identity},
    lambda::{
        self, FunctionConfig, Lambda, LambdaConfig, Launcher, Printed, Register, process,
        share::{MB_PER_CORE, Share},
    },
    latency::Profile,
    public::{self, Arrivals, Front, fronts::Imitation},
    relay,
    services::Services,
    sqs::{DeadLetters, QueueAttributes},
    stack::{Keys, Workflow, stack},
    states::definition::{Definition, MachineType},
    store::{self, Change, Service, Store},
};

/// The file with the access key of whoever runs this edge: with it, and any secret key, AWS's own clients
/// do here what they do in an account (`aws lambda invoke --endpoint-url …`).
const OPERATOR_FILE: &str = "operator";

/// Where earlier releases kept the tables.
const TABLES_FILE: &str = "tables.json";

const CONNECTIONS_TABLE: &str = "connections";
const MAILBOXES_TABLE: &str = "mailboxes";
const DELIVERIES_TABLE: &str = "deliveries";
const MACHINE: &str = "public_request";
const MACHINE_DEFINITION: &str = include_str!("../../statemachines/public_request.asl.json");
const DELIVERY: &str = "delivery";
const DELIVERY_DEFINITION: &str = include_str!("../../statemachines/delivery.asl.json");

/// The queues of deliveries that are dead, and of those that are to be made once more.
const DEAD_LETTERS: &str = "tunnel-local-dead-letters";
const REDELIVERIES: &str = "tunnel-local-redeliveries";

/// What precedes a mailbox's id in the name of its queue.
const MAILBOX_PREFIX: &str = "tunnel-local-mailbox-";

/// The namespace of the functions' metrics.
const METRICS_NAMESPACE: &str = "tunnel/local";

/// What EventBridge sends to a function that it runs on a schedule, as far as anybody reads it.
const SCHEDULED_EVENT: &str = r#"{"source":"aws.events","detail-type":"Scheduled Event","detail":{}}"#;

/// The tunnel that is there from the beginning.
const DEMO: &str = "demo";

/// How long the end waits for public requests in flight.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How long the agent has to end, and the agents' connections to be closed.
const AGENT_TIME: Duration = Duration::from_secs(3);

/// How many invocations of one function may run at the same time.
const CONCURRENCY: usize = 1000;

/// How many of an account's executions cannot be reserved, in an account that has few: "decreases account's
/// UnreservedConcurrentExecution below its minimum value of \[10\]" is what Lambda says.
const EXECUTIONS_UNRESERVED: u32 = 10;

/// The shortest time that a fast clock leaves a response: `ingress` keeps some seconds of it for its end.
const SHORTEST_RESPONSE: Duration = Duration::from_secs(10);

/// How late after its begin an invocation's process may be lost on purpose, in milliseconds.
const KILL_WITHIN_MS: u64 = 64;

/// Runs the edge until it is told to end.
#[must_use]
pub fn run(options: Options) -> ExitCode {
    init_log(options.log_level);
    raise_file_limit();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.worker_threads(workers()).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("starting")),
    };
    let result = runtime.block_on(serve(options));
    // Nothing that is still going on is worth waiting for.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Whether a terminal may be coloured: nobody has said otherwise, and it does not say that it obeys nothing.
fn is_coloured() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// How many threads serve: one for each two cores, since the other half of a request's work is that of other processes. On two
/// cores it is one, so that nothing is handed from thread to thread, which would wake a core at each hop of a request.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(io::stderr().lock(), "local: {error:#}");
    ExitCode::FAILURE
}

/// Is one process of a function.
#[must_use]
pub fn function(function: Function) -> ExitCode {
    if let Err(error) = process::end_with_parent() {
        return fail(&anyhow::Error::new(error));
    }
    match function {
        Function::Authorizer => authorizer::run(),
        Function::Connect => connect::run(),
        Function::Deliver => deliver::run(),
        Function::Deliveries => deliveries::run(),
        Function::Disconnect => disconnect::run(),
        Function::Ingress => ingress::run(),
        Function::Response => response::run(),
        Function::Revoke => revoke::run(),
        Function::Sweep => sweep::run(),
    }
}

/// Is the relay.
#[must_use]
pub fn relay() -> ExitCode {
    // The process that serves ends with the one that started it, in its own way.
    let serves = std::env::var_os(::relay::guard::ENV_SERVES).is_some();
    if !serves && let Err(error) = process::end_with_parent() {
        return fail(&anyhow::Error::new(error));
    }
    ::relay::run()
}

/// Is an agent.
#[must_use]
pub fn agent(arguments: Vec<OsString>) -> ExitCode {
    if let Err(error) = process::end_with_parent() {
        return fail(&anyhow::Error::new(error));
    }
    agentd::main_with_args([OsString::from("agentd")].into_iter().chain(arguments))
}

fn init_log(level: LogLevel) {
    let result = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter(level, "local")))
        .with_target(false)
        .with_ansi(io::stderr().is_terminal() && is_coloured())
        .with_writer(io::stderr)
        // It would be said on standard error, which cannot be written to, and end the program.
        .log_internal_errors(false)
        .try_init();
    // Only a second call fails; the first subscriber stays.
    drop(result);
}

/// What is logged where: the details of this project, but never those of its libraries.
fn filter(level: LogLevel, own: &str) -> String {
    match level {
        LogLevel::Error | LogLevel::Warn | LogLevel::Info => level.as_str().to_owned(),
        LogLevel::Debug | LogLevel::Trace => format!("info,{own}={}", level.as_str()),
    }
}

/// Each process of a function takes a handful of descriptors; the usual limit is for 200 of them.
fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::debug!(%error, "the limit of open files was not raised");
    }
}

/// Where files are kept.
enum Folder {
    Kept(PathBuf),
    /// Removed when this is dropped.
    Temporary(tempfile::TempDir),
}

impl Folder {
    fn open(state_dir: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = state_dir else {
            let folder = tempfile::Builder::new().prefix("tunnel-local-").tempdir();
            return folder.map(Self::Temporary).context("making a temporary folder");
        };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder
            .recursive(true)
            .create(path)
            .with_context(|| format!("making the folder {}", path.display()))?;
        // The paths that are printed must hold wherever they are used.
        let path = path.canonicalize().with_context(|| format!("opening the folder {}", path.display()))?;
        Ok(Self::Kept(path))
    }

    /// Makes sure that no other process of this program has the folder.
    fn lock(&self) -> anyhow::Result<std::fs::File> {
        let path = self.path().join("lock");
        let file = std::fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(std::fs::TryLockError::WouldBlock) => {
                bail!("another local uses the folder {}; choose another --state-dir", self.path().display())
            }
            Err(std::fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("locking {}", path.display()))
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// Where the state is kept, if it is.
    fn state(&self) -> Option<PathBuf> {
        match self {
            Self::Kept(path) => Some(path.join("state")),
            Self::Temporary(_) => None,
        }
    }
}

async fn serve(options: Options) -> anyhow::Result<()> {
    if options.front == public::fronts::Kind::Relay && options.websockets == Websockets::None {
        bail!("the front relay needs a relay: leave --websockets none out");
    }
    // Before anything else, so that no signal is lost from the first printed line on.
    let mut signals = EndSignals::listen()?;
    let public_listener = bind(options.public, "--public").await?;
    let agents_listener = bind(options.agents, "--agents").await?;
    let public_address = public_listener.local_addr()?;
    let agents_address = agents_listener.local_addr()?;
    let folder = Folder::open(options.state_dir.as_deref())?;
    // Held to the end, and before anything is written: two of this program would write over each other.
    let _state_lock = folder.lock()?;
    let identity = identity::prepare(folder.path())?;
    let token_key = identity::token_key(folder.path())?;
    let changes = match folder.state() {
        Some(path) => store::read(&path).with_context(|| format!("reading {}", path.display()))?,
        None => Vec::new(),
    };
    let aws = start_aws(&options, &folder, &changes).await?;
    std::fs::write(folder.path().join("endpoint"), aws.endpoint()).context("writing the endpoint's file")?;
    let (machine, delivery) = create_machines(&aws)?;
    create_queues(&aws)?;
    if let Some(path) = folder.state() {
        let kept = keep_state(&aws, &path, &changes).await;
        kept.with_context(|| format!("keeping the state in {}", path.display()))?;
    }
    drop(changes);
    let front_secret = lambda::random_hex::<24>();
    let public_url = format!("http://{{name}}.{}:{}", options.domain, public_address.port());
    let function_time = stack().functions["ingress"].timeout;
    let imitation = Arc::new(Imitation::new(options.front, &options.kind, aws.clock(), function_time));
    let settings = Settings {
        aws: &aws,
        identity: &identity,
        machine: &machine,
        delivery: &delivery,
        front_secret: &front_secret,
        public_url: &public_url,
        domain: &options.domain,
        token_key,
        limits: &options.limits,
        log_level: options.log_level,
        choices: choices(&Env::process())?,
        relay_choices: relay_choices(&Env::process()),
        websockets: options.websockets,
        executions: Executions::new(options.executions, options.reserved_for_response)?,
        mailboxes: options.mailboxes,
        imitation: &imitation,
        share: options.latency.cpu_mb.map(share_of).transpose()?,
    };
    let lambda = start_lambda(&settings)?;
    aws.serve_functions(&lambda);
    let resumed = aws.states().resume();
    if resumed > 0 {
        tracing::info!(resumed, "runs of the time before go on");
    }
    let operator = format!("LOCAL{}", lambda::random_hex::<16>().to_ascii_uppercase());
    aws.callers().register(&operator, OPERATOR, "operator");
    identity::write_private(&folder.path().join(OPERATOR_FILE), operator.as_bytes())?;
    tokio::spawn(look_after_mailboxes(aws.clone(), lambda.clone(), options.mailboxes));
    for function in [Function::Authorizer, Function::Connect, Function::Response] {
        lambda.warm(function.name(), 1);
    }

    let stop_relay = CancellationToken::new();
    let (relay, keeping_relay) = match options.websockets {
        Websockets::None => (None, None),
        Websockets::Relay => {
            let (address, found) = watch::channel(None);
            let environment = settings.of_relay();
            let printed = metrics_of(aws.services());
            let keeping = spawn_relay(environment, printed, aws.relay_tasks(), address, stop_relay.clone())?;
            (Some(public::relayed::Relay(found)), Some(keeping))
        }
    };
    let stop_agents = CancellationToken::new();
    let api = AgentApi {
        latency: aws.services().latency.clone(),
        lambda: lambda.clone(),
        connections: aws.services().connections.clone(),
        clock: aws.clock(),
        chaos: aws.services().chaos.clone(),
        domain: agents_address.to_string(),
        write_timeout: limits::WRITE_TIMEOUT,
    };
    let serving_agents = tokio::spawn(agents::serve(agents_listener, Arc::new(api), stop_agents.clone()));
    let stop_public = CancellationToken::new();
    let arrivals = Arrivals::default();
    let gone = aws.clone();
    let front = Front {
        latency: aws.services().latency.clone(),
        lambda: lambda.clone(),
        secret: front_secret.clone(),
        client_gone: Arc::new(move |access_key| {
            let told = gone.client_gone(access_key);
            tracing::debug!(told, "a public client left before its response");
        }),
        port: public_address.port(),
        arrivals: arrivals.clone(),
        relay,
        imitation,
        distribution: public::cloudfront::distribution(),
        errors: public::KeptErrors::default(),
    };
    let serving_public = tokio::spawn(public::serve(public_listener, Arc::new(front), stop_public.clone()));

    print_interface(&public_url, agents_address, &identity)?;
    let mut agent = if options.no_agent {
        None
    } else {
        let upstream = match options.upstream {
            Some(upstream) => upstream.to_string(),
            None => demo::start(Demo {
                aws: aws.clone(),
                arrivals,
                agents: agents_address,
                token_file: identity.token_file.clone(),
            })
            .await
            .context("starting the demo page")?
            .to_string(),
        };
        Some(start_agent(&upstream, agents_address, &identity, options.log_level)?)
    };

    tokio::select! {
        () = signals.next() => {}
        status = ended(&mut agent) => {
            tracing::error!(%status, "the agent ended; the edge goes on without it");
            signals.next().await;
        }
    }
    tracing::info!("draining; a second signal ends at once");
    stop_public.cancel();
    stop_relay.cancel();
    let drain = async {
        if time::timeout(DRAIN_TIME, serving_public).await.is_err() {
            tracing::warn!("public requests in flight were broken off");
        }
        if let Some(keeping) = keeping_relay {
            let _ = tokio::task::spawn_blocking(move || keeping.join()).await;
        }
        end_agent(agent).await;
        stop_agents.cancel();
        end_within(AGENT_TIME, serving_agents).await;
    };
    tokio::select! {
        () = drain => {}
        () = signals.next() => tracing::warn!("ended at once"),
    }
    lambda.close().await;
    Ok(())
}

/// Binds a listener, or says in one sentence why not.
async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => bail!(
            "port {} is taken by another program; choose another one with {flag} {}:PORT",
            address.port(),
            address.ip()
        ),
        Err(error) => Err(error).with_context(|| format!("listening on {address} ({flag})")),
    }
}

/// The changes of one service.
fn of(changes: &[Change], service: Service) -> impl Iterator<Item = &str> {
    changes.iter().filter(move |change| change.service == service).map(|change| &*change.record)
}

/// Takes over what an earlier process has left, and keeps what changes from here on.
async fn keep_state(aws: &Aws, path: &Path, changes: &[Change]) -> anyhow::Result<()> {
    let (services, states) = (aws.services(), aws.states());
    services.sqs.take_over(of(changes, Service::Queues))?;
    states.take_over(of(changes, Service::Runs))?;
    let tables = services.dynamodb.copy().await?;
    let store = Store::create(path, |file| {
        Dynamodb::fill(&tables, file)?;
        services.sqs.fill(file)?;
        states.fill(file)
    })?;
    // What earlier releases left is in there.
    let _ = std::fs::remove_file(path.with_file_name(TABLES_FILE));
    services.dynamodb.keep(Arc::clone(&store));
    services.sqs.keep(Arc::clone(&store));
    states.keep(Arc::clone(&store));
    tokio::spawn(store.sync());
    Ok(())
}

async fn start_aws(options: &Options, folder: &Folder, changes: &[Change]) -> anyhow::Result<Arc<Aws>> {
    let aws = Aws::start(AwsOptions {
        chaos: options.chaos.clone(),
        latency: Profile::find(&options.latency.profile)?,
        connections_table: CONNECTIONS_TABLE.to_owned(),
        mailboxes_table: MAILBOXES_TABLE.to_owned(),
        deliveries_table: DELIVERIES_TABLE.to_owned(),
    });
    let aws = Arc::new(aws.await.context("starting the services")?);
    let tables = &aws.services().dynamodb;
    if let Some(path) = folder.state() {
        if changes.is_empty() {
            let path = path.with_file_name(TABLES_FILE);
            tables.load(&path).await.with_context(|| format!("reading {}", path.display()))?;
        }
        let kept = tables.take_over(of(changes, Service::Tables)).await;
        kept.with_context(|| format!("reading {}", path.display()))?;
        // Queues do not outlive this program, so neither does what is known about them.
        let gone = format!("{{\"TableName\":\"{MAILBOXES_TABLE}\"}}");
        let _ = tables.call("DeleteTable", gone.into()).await;
    }
    let table = |name, keys: &'static Keys| Table {
        name,
        partition_key: &keys.partition,
        sort_key: Some(&keys.sort),
        expiry: keys.expiry.as_deref(),
    };
    let connections = table(CONNECTIONS_TABLE, &stack().connections);
    let mailboxes = table(MAILBOXES_TABLE, &stack().mailboxes);
    let deliveries = table(DELIVERIES_TABLE, &stack().deliveries);
    for table in [connections, mailboxes, deliveries] {
        tables.create_table(table).await.context("creating the tables")?;
    }
    Ok(aws)
}

/// Creates the state machines; gives the ARN of each, that of a public request's first.
fn create_machines(aws: &Aws) -> anyhow::Result<(Arc<str>, Arc<str>)> {
    let endpoint = aws.endpoint();
    let host = endpoint.strip_prefix("http://").unwrap_or(&endpoint);
    let values = BTreeMap::from([
        ("ConnectionsTable", CONNECTIONS_TABLE),
        ("DeliveriesTable", DELIVERIES_TABLE),
        ("DeliverFunction", Function::Deliver.name()),
        ("AgentApiEndpoint", host),
        ("AgentApiStage", agents::STAGE),
    ]);
    let create = |kind, name, text, deployed: &'static Workflow| -> anyhow::Result<Arc<str>> {
        let mut substitutions = BTreeMap::new();
        for variable in &deployed.substitutions {
            let value = values.get(variable.as_str());
            let value = value.with_context(|| format!("{name} is deployed with the unknown {variable}"))?;
            substitutions.insert(variable.clone(), (*value).to_owned());
        }
        let definition = Definition::parse_as(kind, text, &substitutions)
            .with_context(|| format!("reading the state machine {name}"))?;
        Ok(aws.states().create(name, definition))
    };
    Ok((
        create(MachineType::Express, MACHINE, MACHINE_DEFINITION, &stack().workflow)?,
        create(MachineType::Standard, DELIVERY, DELIVERY_DEFINITION, &stack().delivery)?,
    ))
}

/// Creates the queues through which operators give deliveries up and have them made again.
fn create_queues(aws: &Aws) -> anyhow::Result<()> {
    for (name, deployed) in [(DEAD_LETTERS, &stack().dead_letters), (REDELIVERIES, &stack().redeliveries)] {
        let default = QueueAttributes::default();
        let dead_letters = |max_receives| DeadLetters { queue: DEAD_LETTERS.into(), max_receives };
        let attributes = QueueAttributes {
            retention: deployed.retention.unwrap_or(default.retention),
            visibility: deployed.visibility.unwrap_or(default.visibility),
            dead_letters: deployed.max_receives.map(dead_letters),
            ..default
        };
        aws.services().sqs.create_kept(name, attributes).with_context(|| format!("creating {name}"))?;
    }
    Ok(())
}

/// What the functions are told in their environments.
struct Settings<'a> {
    aws: &'a Arc<Aws>,
    identity: &'a Identity,
    machine: &'a str,
    delivery: &'a str,
    front_secret: &'a str,
    public_url: &'a str,
    domain: &'a str,
    token_key: String,
    limits: &'a str,
    log_level: LogLevel,
    mailboxes: usize,
    imitation: &'a Imitation,
    choices: Vec<(&'static str, String)>,
    relay_choices: Vec<(&'static str, String)>,
    websockets: Websockets,
    executions: Executions,
    share: Option<Arc<Share>>,
}

/// The part of a core that so much memory buys the functions' processes.
fn share_of(memory_mb: u32) -> anyhow::Result<Arc<Share>> {
    let share = Share::of(memory_mb).with_context(|| format!("--latency cpu={memory_mb}"))?;
    let of_a_core = f64::from(memory_mb) / f64::from(MB_PER_CORE);
    tracing::info!(
        memory_mb,
        of_a_core,
        "each process of a function gets the part of a core that its memory buys"
    );
    Ok(Arc::new(share))
}

/// The account's concurrent executions, where they are counted.
#[derive(Debug, Clone, Default)]
struct Executions {
    shared: Option<Arc<Semaphore>>,
    /// What only `response` may take.
    reserved: Option<Arc<Semaphore>>,
    /// How many public requests `ingress` lets in.
    requests: Option<u32>,
}

impl Executions {
    /// # Errors
    ///
    /// When Lambda would not reserve that many.
    fn new(account: Option<u32>, reserved: Option<u32>) -> anyhow::Result<Self> {
        let Some(account) = account else { return Ok(Self::default()) };
        let unreserved = account.saturating_sub(reserved.unwrap_or_default());
        if unreserved < EXECUTIONS_UNRESERVED {
            bail!(
                "--reserved-for-response: Lambda reserves nothing of the last {EXECUTIONS_UNRESERVED} executions of an \
                 account; use at most {}",
                account - EXECUTIONS_UNRESERVED
            );
        }
        let places = |count: u32| Arc::new(Semaphore::new(count as usize));
        Ok(Self {
            shared: Some(places(unreserved)),
            reserved: reserved.map(places),
            requests: (account <= EXECUTIONS_FEW).then(|| edge_requests(unreserved)),
        })
    }

    fn of(&self, function: Function) -> Option<Arc<Semaphore>> {
        let own = self.reserved.as_ref().filter(|_| function == Function::Response);
        own.or(self.shared.as_ref()).cloned()
    }
}

/// What an operator may choose for `ingress`: here too from the environment, under the same names.
fn choices(own: &Env<'_>) -> anyhow::Result<Vec<(&'static str, String)>> {
    own.trust()?;
    own.secs(env::REPLY_TIMEOUT_SECS, limits::REPLY_TIMEOUT, limits::REPLY_TIMEOUT_MAX)?;
    own.holds_unknown_length()?;
    own.secs(env::STREAM_IDLE_SECS, limits::RESPONSE_DURATION, limits::RESPONSE_DURATION)?;
    let names = [env::TRUST_FORWARDED, env::REPLY_TIMEOUT_SECS, env::UNKNOWN_LENGTH, env::STREAM_IDLE_SECS];
    Ok(names.into_iter().filter_map(|name| Some((name, own.optional(name)?))).collect())
}

/// What whoever runs a relay may choose for it, as it does itself: what is wrong ends it with a sentence.
fn relay_choices(own: &Env<'_>) -> Vec<(&'static str, String)> {
    let names =
        [env::RELAY_CONNECTIONS, env::RELAY_MESSAGE_BYTES, env::RELAY_BUFFER_BYTES, env::RELAY_DRAIN_SECS];
    names.into_iter().filter_map(|name| Some((name, own.optional(name)?))).collect()
}

impl Settings<'_> {
    /// A function as it is deployed. It gets the variables of its deployment and no others, but for keys of this
    /// machine and times that a fast clock shortens: what it does not have, it cannot leak.
    fn of(&self, function: Function) -> anyhow::Result<FunctionConfig> {
        let name = function.name();
        let deployed = stack().functions.get(name);
        let deployed = deployed.with_context(|| format!("serverless.yml has no function {name}"))?;
        let values = self.values();
        let mut environment = BTreeMap::new();
        for variable in &deployed.variables {
            let value = values.get(variable.as_str());
            let value = value.with_context(|| format!("{name} is deployed with the unknown {variable}"))?;
            environment.insert(variable.clone(), value.clone());
        }
        let clock = self.aws.clock();
        // Whole seconds, and never none.
        let seconds = |duration: Duration| clock.scale(duration).as_secs().max(1).to_string();
        let lease = || (env::MAILBOX_LEASE_SECS, seconds(limits::MAILBOX_LEASE));
        let mut own = match function {
            Function::Authorizer => vec![(ENV_JWKS, self.identity.jwks.clone())],
            Function::Connect => vec![
                (env::CONNECTION_LIFETIME_SECS, seconds(limits::CONNECTION_LIFETIME)),
                (env::HEARTBEAT_MS, clock.scale(limits::HEARTBEAT_INTERVAL).as_millis().max(1).to_string()),
            ],
            Function::Disconnect => vec![lease()],
            Function::Ingress => [vec![lease()], self.choices.clone()].concat(),
            Function::Deliver | Function::Deliveries | Function::Response | Function::Revoke => Vec::new(),
            Function::Sweep => vec![
                lease(),
                (env::MAILBOX_IDLE_SECS, seconds(limits::MAILBOX_IDLE)),
                (env::RELAY_REST_SECS, seconds(limits::RELAY_REST)),
            ],
        };
        let level = format!("edge={level},{name}", level = self.log_level.as_str());
        own.push(("AWS_LAMBDA_LOG_LEVEL", filter(self.log_level, &level)));
        environment.extend(own.into_iter().map(|(name, value)| (name.to_owned(), value)));
        Ok(FunctionConfig {
            name,
            // A fast clock shortens the longest response as well.
            timeout: match function {
                Function::Ingress => clock.scale(deployed.timeout).max(SHORTEST_RESPONSE),
                Function::Authorizer
                | Function::Connect
                | Function::Deliver
                | Function::Deliveries
                | Function::Disconnect
                | Function::Response
                | Function::Revoke
                | Function::Sweep => deployed.timeout,
            },
            memory_mb: deployed.memory_mb,
            concurrency: CONCURRENCY,
            executions: self.executions.of(function),
            environment,
        })
    }

    /// What `relay` is told: the variables of its task, and where it finds its credentials, as on ECS.
    fn of_relay(&self) -> BTreeMap<String, String> {
        let access_key = format!("LOCAL{}", lambda::random_hex::<10>().to_ascii_uppercase());
        self.aws.callers().register(&access_key, RELAY, RELAY);
        let clock = self.aws.clock();
        let lease = clock.scale(limits::MAILBOX_LEASE).as_secs().max(1).to_string();
        let mut values = self.values();
        values.extend([
            ("AWS_REGION", lambda::REGION.to_owned()),
            ("AWS_ENDPOINT_URL", self.aws.endpoint()),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", self.aws.credentials_of(&access_key)),
            (
                "AWS_LAMBDA_LOG_LEVEL",
                filter(self.log_level, &format!("edge={level},relay", level = self.log_level.as_str())),
            ),
            (env::MAILBOX_LEASE_SECS, lease),
        ]);
        values.extend(self.choices.clone());
        values.extend(self.relay_choices.clone());
        let own = [
            "AWS_ENDPOINT_URL",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_LAMBDA_LOG_LEVEL",
            env::MAILBOX_LEASE_SECS,
        ];
        let chosen = self.choices.iter().chain(&self.relay_choices).map(|(name, _)| *name);
        let wanted = |name: &&str| {
            stack().relay.variables.contains(*name)
                || own.contains(name)
                || chosen.clone().any(|one| one == *name)
        };
        values
            .into_iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// What the variables of a deployment are here.
    fn values(&self) -> BTreeMap<&'static str, String> {
        let has_relay = self.websockets == Websockets::Relay;
        BTreeMap::from([
            (env::CONNECTIONS_TABLE, CONNECTIONS_TABLE.to_owned()),
            (env::MAILBOXES_TABLE, MAILBOXES_TABLE.to_owned()),
            (env::MAILBOX_URL_PREFIX, self.aws.services().sqs.url(MAILBOX_PREFIX)),
            (env::TOKEN_KEYS, self.token_key.clone()),
            (env::STATE_MACHINE_ARN, self.machine.to_owned()),
            (env::DELIVERIES_TABLE, DELIVERIES_TABLE.to_owned()),
            (env::DELIVERY_MACHINE_ARN, self.delivery.to_owned()),
            (env::DEAD_LETTERS_URL, self.aws.services().sqs.url(DEAD_LETTERS)),
            (env::REDELIVERIES_URL, self.aws.services().sqs.url(REDELIVERIES)),
            (env::AGENT_ENDPOINT, self.aws.connections_endpoint()),
            (env::DOMAIN, self.domain.to_owned()),
            (env::PUBLIC_URL, self.public_url.to_owned()),
            (env::FRONT_SECRET, self.front_secret.to_owned()),
            (env::FRONT_ONLY, "true".to_owned()),
            (env::METRICS_NAMESPACE, METRICS_NAMESPACE.to_owned()),
            (env::MAILBOXES_KEPT, self.mailboxes.to_string()),
            (env::LIMITS, self.limits.to_owned()),
            (env::EDGE_REQUESTS, self.executions.requests.map(|most| most.to_string()).unwrap_or_default()),
            (env::WEBSOCKETS, has_relay.to_string()),
            (env::RELAY_SERVICE, if has_relay { RELAY_SERVICE.to_owned() } else { String::new() }),
            (env::RELAY_TASKS, "1".to_owned()),
            (env::RELAY_FRONT, "false".to_owned()),
            (env::REPLY_TIMEOUT_SECS, self.imitation.reply_timeout().as_secs().to_string()),
            (env::STREAM_IDLE_SECS, "0".to_owned()),
            (env::UNKNOWN_LENGTH, "stream".to_owned()),
            (env::ACCEPT_ENCODING, self.imitation.accept_encoding().to_owned()),
            // The key set is in a variable instead.
            (ENV_JWKS_FILE, String::new()),
            (ENV_JWKS_URL, String::new()),
            // Tokens are those of `agentd token issue`.
            (ENV_TOKEN_ISSUER, String::new()),
            (ENV_TOKEN_AUDIENCE, String::new()),
            (ENV_OWNER_CLAIM, String::new()),
            (ENV_REVOKED, String::new()),
        ])
    }
}

/// Keeps the relay running from a thread of its own: the kernel ends the relay with the thread that started it.
fn spawn_relay(
    environment: BTreeMap<String, String>,
    printed: Printed,
    tasks: watch::Receiver<u32>,
    address: watch::Sender<Option<SocketAddr>>,
    stop: CancellationToken,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting")?;
    std::thread::Builder::new()
        .name("relay".to_owned())
        .spawn(move || runtime.block_on(relay::keep(environment, printed, tasks, address, stop)))
        .context("starting the relay's thread")
}

/// Takes the lines of metrics out of what a process prints, as CloudWatch does.
fn metrics_of(services: &Arc<Services>) -> Printed {
    let services = Arc::clone(services);
    Arc::new(move |name, line| services.metrics.take(name, line))
}

fn start_lambda(settings: &Settings<'_>) -> anyhow::Result<Lambda> {
    let aws = settings.aws;
    let services = aws.services().clone();
    let (begun, ended) = (aws.clone(), aws.clone());
    let mut launcher = Launcher::current_program().context("finding this program")?;
    launcher.share.clone_from(&settings.share);
    let config = LambdaConfig {
        launcher,
        aws_endpoint: aws.endpoint(),
        register: Register {
            begun: Arc::new(move |key, function, environment| {
                begun.callers().register(key, function, environment);
            }),
            ended: Arc::new(move |key| ended.callers().forget(key)),
            printed: metrics_of(&services),
        },
        kill_chance: Arc::new(move || {
            services.chaos.strikes(Fault::KillFunction).then(|| {
                let [random] = lambda::random_bytes::<1>();
                Duration::from_millis(u64::from(random) % KILL_WITHIN_MS)
            })
        }),
    };
    let functions = Function::ALL.into_iter().map(|function| settings.of(function));
    let functions = functions.collect::<anyhow::Result<_>>()?;
    Lambda::start(functions, config).context("starting the functions")
}

/// Makes the first mailboxes and has `sweep` look after all of them from then on: before they are entered, it would take
/// their queues for ones that nobody knows, and delete them on a clock that runs fast.
async fn look_after_mailboxes(aws: Arc<Aws>, lambda: Lambda, count: usize) {
    seed_mailboxes(&aws, &lambda, count).await;
    sweep_mailboxes(aws.clock().scale(limits::SWEEP_INTERVAL), lambda).await;
}

/// Makes the first mailboxes, and the first process that leases one.
async fn seed_mailboxes(aws: &Aws, lambda: &Lambda, count: usize) {
    let services = aws.services();
    let attributes = QueueAttributes { retention: limits::MAILBOX_RETENTION, ..QueueAttributes::default() };
    let mut mailboxes = Vec::with_capacity(count);
    for _ in 0..count {
        let mailbox = lambda::random_hex::<12>();
        match services.sqs.create(&format!("{MAILBOX_PREFIX}{mailbox}"), attributes.clone()) {
            Ok(_) => mailboxes.push(mailbox),
            Err(error) => tracing::error!(%error, "a mailbox was not made"),
        }
    }
    // A queue cannot be used before; whoever needs one in the meantime makes one as well.
    time::sleep(limits::MAILBOX_WARM_UP).await;
    for mailbox in mailboxes {
        let row = format!(
            "{{\"TableName\":\"{MAILBOXES_TABLE}\",\"Item\":{{\"pool\":{{\"S\":\"mailboxes\"}},\
             \"mailbox\":{{\"S\":\"{mailbox}\"}},\"leased_until\":{{\"N\":\"0\"}}}}}}"
        );
        let answer = services.dynamodb.call("PutItem", row.into()).await;
        if let Some(error) = answer.error_name() {
            tracing::error!(error, "a mailbox was not entered");
        }
    }
    lambda.warm(Function::Ingress.name(), 1);
}

/// Has `sweep` run whenever its time has come.
async fn sweep_mailboxes(interval: Duration, lambda: Lambda) {
    let mut interval = time::interval(interval.max(Duration::from_millis(100)));
    interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    // The first tick is now, and there is nothing to look after yet.
    interval.tick().await;
    loop {
        interval.tick().await;
        match lambda.invoke(Function::Sweep.name(), SCHEDULED_EVENT.into()).await {
            Ok(report) => tracing::debug!(report = %String::from_utf8_lossy(&report), "mailboxes were swept"),
            Err(lambda::InvokeError::ShuttingDown) => return,
            Err(error) => tracing::warn!(%error, "mailboxes were not swept"),
        }
    }
}

/// The lines that scripts read.
fn print_interface(public_url: &str, agents: SocketAddr, identity: &Identity) -> anyhow::Result<()> {
    let lines = format!(
        "public  {}\nagents  ws://{agents}\ntoken   {}\nkey     {}\n",
        public_url.replace("{name}", DEMO),
        identity.token_file.display(),
        identity.key_file.display(),
    );
    let mut stdout = io::stdout().lock();
    stdout.write_all(lines.as_bytes()).and_then(|()| stdout.flush()).context("printing the addresses")
}

/// Starts an agent for the tunnel `demo`.
///
/// To be called on a thread that lives as long as this program: the kernel ends the agent with it.
fn start_agent(
    upstream: &str,
    agents: SocketAddr,
    identity: &Identity,
    log_level: LogLevel,
) -> anyhow::Result<Child> {
    let mut child = Command::new(std::env::current_exe().context("finding this program")?)
        .args(["agent", "http", upstream, "--name", DEMO, "--edge"])
        .arg(format!("ws://{agents}"))
        .arg("--token-file")
        .arg(&identity.token_file)
        .args(["--log-level", &filter(log_level, "agentd")])
        .env(process::ENV_PARENT, std::process::id().to_string())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting the agent")?;
    process::forward_output("agent", &mut child, None);
    Ok(child)
}

/// Waits until the agent ends by itself, if there is one.
async fn ended(agent: &mut Option<Child>) -> String {
    match agent {
        Some(agent) => match agent.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        },
        None => std::future::pending().await,
    }
}

async fn end_agent(agent: Option<Child>) {
    let Some(mut agent) = agent else { return };
    let pid = agent.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _ = kill_process(pid, Signal::TERM);
    }
    if time::timeout(AGENT_TIME, agent.wait()).await.is_err() {
        let _ = agent.kill().await;
    }
}

async fn end_within(patience: Duration, task: JoinHandle<()>) {
    let abort = task.abort_handle();
    if time::timeout(patience, task).await.is_err() {
        abort.abort();
    }
}

/// What tells this program to end.
struct EndSignals {
    interrupt: Signals,
    terminate: Signals,
}

impl EndSignals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
