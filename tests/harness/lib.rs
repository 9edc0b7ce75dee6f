//! The system under test as a user has it: the real `local` and `agentd` binaries on loopback, an
//! upstream that records every byte, and clients that send exactly what a test says.
//!
//! Everything listens on port 0 and ends with the value that started it, also when a test fails.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::unwrap_in_result,
    reason = "this is test code"
)]

pub mod acceptance;
pub mod calls;
pub mod client;
pub mod operator;
pub mod process;
pub mod proxy;
pub mod raw_agent;
pub mod signature;
pub mod sockets;
pub mod stack;
pub mod tls;
pub mod upstream;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use self::process::Process;
use stack::{Front, Place, Stack};
use tempfile::TempDir;

/// No single wait in a test is longer: what has not happened by then will not.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// `local`, running, with a state folder of its own.
#[derive(Debug)]
pub struct Local {
    process: Process,
    /// Where the public comes in.
    pub public: SocketAddr,
    /// Where agents connect, as a URL.
    pub agents: String,
    /// A token that may open any name.
    pub token: PathBuf,
    /// The key that signs further tokens.
    pub key: PathBuf,
    /// The AWS endpoint, where calls are counted.
    pub endpoint: SocketAddr,
    stack: Stack,
    state: TempDir,
}

impl AsRef<Stack> for Local {
    fn as_ref(&self) -> &Stack {
        &self.stack
    }
}

impl Local {
    /// Starts it without its demo agent.
    #[must_use]
    pub fn start(more: &[&str]) -> Self {
        Self::start_with(&[&["--no-agent"], more].concat())
    }

    /// Starts it.
    #[must_use]
    pub fn start_with(more: &[&str]) -> Self {
        Self::start_in(&[], more)
    }

    /// Starts it with more in its environment.
    #[must_use]
    pub fn start_in(environment: &[(&str, &str)], more: &[&str]) -> Self {
        Self::start_as(Command::new(process::binary("local")), environment, more)
    }

    /// Starts it by `command`, as [`Process::start_as`] does.
    #[must_use]
    pub fn start_as(command: Command, environment: &[(&str, &str)], more: &[&str]) -> Self {
        let state = tempfile::tempdir().unwrap();
        let named = more.iter().position(|&one| one == "--front").map(|at| more[at + 1]);
        let front = match named {
            None | Some("direct") => Front::Local,
            Some(name) => name.parse().unwrap(),
        };
        let process = launch(command, environment, more, state.path(), ["127.0.0.1:0"; 2]);
        let public = told(&process, "public");
        let port: u16 = public.rsplit(':').next().unwrap().trim_end_matches('/').parse().unwrap();
        let (agents, token) = (told(&process, "agents"), PathBuf::from(told(&process, "token")));
        let place = Place {
            public: format!("http://{{name}}.localhost:{port}").parse().unwrap(),
            agents: agents.parse().unwrap(),
            token: token.clone(),
            front,
            prefix: String::new(),
            ca: None,
        };
        Self {
            public: SocketAddr::from(([127, 0, 0, 1], port)),
            agents,
            token,
            key: told(&process, "key").into(),
            endpoint: endpoint_in(state.path()),
            process,
            stack: Stack::new(place).unwrap(),
            state,
        }
    }

    /// Kills it as a power cut does, and starts it again where it was, on what it has kept.
    pub fn kill_and_start_again(&mut self, more: &[&str]) {
        self.process.signal(rustix::process::Signal::KILL);
        self.process.wait();
        std::fs::remove_file(self.state.path().join("endpoint")).unwrap();
        let agents = self.agents.trim_start_matches("ws://").to_owned();
        let addresses = [self.public.to_string(), agents];
        // The system may have lent a port to somebody's connection meanwhile, and gets it back.
        for address in &addresses {
            let begun = std::time::Instant::now();
            while std::net::TcpListener::bind(address).is_err() {
                assert!(begun.elapsed() < PATIENCE, "{address} is taken");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let command = Command::new(process::binary("local"));
        self.process = launch(command, &[], more, self.state.path(), [&addresses[0], &addresses[1]]);
        told(&self.process, "token");
        self.endpoint = endpoint_in(self.state.path());
    }

    /// It as the acceptance run sees every edge.
    #[must_use]
    pub const fn stack(&self) -> &Stack {
        &self.stack
    }

    /// The same with tunnels told apart by their path.
    #[must_use]
    pub fn stack_by_path(&self) -> Stack {
        let public = format!("http://{}/{{name}}/", self.public).parse().unwrap();
        Stack::new(Place { public, ..self.stack.place().clone() }).unwrap()
    }

    /// The process.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Ends it as Ctrl-C does, and returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.process.signal(rustix::process::Signal::INT);
        self.process.wait()
    }

    /// Its state folder.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// An agent with one tunnel called `name`.
    #[must_use]
    pub fn agent(&self, name: &str, upstream: &str) -> Agent {
        self.agent_with(&format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{upstream}\"\n"), &[name])
    }

    /// An agent with the tunnels that `tunnels` (TOML) describes; `names` are waited for.
    #[must_use]
    pub fn agent_with(&self, tunnels: &str, names: &[&str]) -> Agent {
        self.agent_in(&[], tunnels, names)
    }

    /// The same with more in its environment.
    #[must_use]
    pub fn agent_in(&self, environment: &[(&str, &str)], tunnels: &str, names: &[&str]) -> Agent {
        self.agent_of(&self.token, environment, tunnels, names)
    }

    /// The same with another token.
    #[must_use]
    pub fn agent_of(
        &self,
        token: &Path,
        environment: &[(&str, &str)],
        tunnels: &str,
        names: &[&str],
    ) -> Agent {
        self.stack.agent_of(token, environment, tunnels, names)
    }

    /// A configuration with the tunnels that `tunnels` (TOML) describes. What stands before the first
    /// table goes to the front.
    #[must_use]
    pub fn config(&self, tunnels: &str) -> String {
        self.stack.config(tunnels)
    }

    /// The process of the relay that serves, once there is one.
    #[must_use]
    pub fn relay(&self) -> u32 {
        let begun = std::time::Instant::now();
        loop {
            if let Some(relay) = self.relay_now() {
                return relay;
            }
            assert!(begun.elapsed() < PATIENCE, "no relay was started");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn relay_now(&self) -> Option<u32> {
        let child_of = |of: u32| {
            let all = std::fs::read_dir("/proc").unwrap();
            let mut all = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
            all.find(|pid| {
                let read =
                    |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
                let parent = read("stat")
                    .rsplit(')')
                    .next()
                    .and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
                parent == Some(of) && read("cmdline").split('\0').nth(1) == Some("relay")
            })
        };
        child_of(child_of(self.process.id())?)
    }

    /// A connection to the relay itself, past the front, and the secret that makes it believe one.
    pub async fn past_the_front(&self) -> (client::Connection, String) {
        let environment = std::fs::read(format!("/proc/{}/environ", self.relay())).unwrap();
        let value = |name: &str| {
            let mut all = environment.split(|&byte| byte == 0);
            let value = all.find_map(|one| one.strip_prefix(name.as_bytes())?.strip_prefix(b"=")).unwrap();
            String::from_utf8(value.to_vec()).unwrap()
        };
        let address = value("TUNNEL_RELAY_LISTEN").parse().unwrap();
        (client::Connection::open(address).await, value("TUNNEL_FRONT_SECRET"))
    }

    /// How often each AWS call was made so far: `service:Action` to a number.
    pub async fn counters(&self) -> BTreeMap<String, u64> {
        let counts: Counts = serde_json::from_str(&self.own("counters").await).unwrap();
        counts.actions
    }

    /// What CloudWatch would show of the functions' metrics, by name and dimension.
    pub async fn metrics(&self) -> BTreeMap<String, Series> {
        serde_json::from_str(&self.own("metrics").await).unwrap()
    }

    /// What `local` tells about itself under a path.
    pub async fn own(&self, path: &str) -> String {
        // It answers under its own name only.
        let request =
            client::Request::new("GET", &format!("/_local/{path}")).field("Host", &self.endpoint.to_string());
        let answer = request.send(self.endpoint).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text()
    }

    /// The processes of the functions, by function: Linux process ids.
    #[must_use]
    pub fn function_processes(&self) -> Vec<(String, u32)> {
        let own = self.process.id();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let parent =
                stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
            if parent == Some(own) {
                let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let words: Vec<_> = command.split(|&b| b == 0).map(String::from_utf8_lossy).collect();
                // Words of a program that watches it may stand before.
                if let Some(at) = words.iter().position(|word| word == "function") {
                    found.push((words[at + 1].clone().into_owned(), pid));
                }
            }
        }
        found
    }
}

/// Starts `local` on a state folder, where the public and the agents come in.
fn launch(
    command: Command,
    environment: &[(&str, &str)],
    more: &[&str],
    state: &Path,
    [public, agents]: [&str; 2],
) -> Process {
    let common = ["--public", public, "--agents", agents, "--state-dir", state.to_str().unwrap()];
    // A process more for each edge that no test of websockets needs.
    let sockets = if more.contains(&"--websockets") { &[][..] } else { &["--websockets", "none"] };
    // What tests the exchange itself is not to meet what the fronts of AWS do to it; tests/fronts.rs is.
    let direct = if more.contains(&"--front") { &[][..] } else { &["--front", "direct"] };
    Process::start_as("local", command, &[&common, sockets, direct, more].concat(), environment)
}

/// What `local` says of one of its addresses or files.
fn told(process: &Process, name: &str) -> String {
    let line = process.wait_for_line(|line| line.split_whitespace().next() == Some(name));
    line.split_whitespace().nth(1).unwrap().to_owned()
}

fn endpoint_in(state: &Path) -> SocketAddr {
    wait_for_file(&state.join("endpoint")).trim().trim_start_matches("http://").parse().unwrap()
}

/// The values of one metric.
#[derive(Debug, Clone, Copy, serde::Deserialize)]
pub struct Series {
    /// How many there were.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The largest.
    pub max: f64,
    /// The last.
    pub last: f64,
}

#[derive(serde::Deserialize)]
struct Counts {
    actions: BTreeMap<String, u64>,
}

/// The resident memory of a process, in bytes.
#[must_use]
pub fn resident_bytes(pid: u32) -> Option<u64> {
    proc_status(pid, "VmRSS:")
}

/// The resident memory of a process that is its own: without the pages of its program, in bytes.
#[must_use]
pub fn anonymous_bytes(pid: u32) -> Option<u64> {
    proc_status(pid, "RssAnon:")
}

/// The pages of its program and libraries that a process has resident, in bytes.
#[must_use]
pub fn program_bytes(pid: u32) -> Option<u64> {
    proc_status(pid, "RssFile:")
}

/// The most memory that a process has had resident, in bytes.
#[must_use]
pub fn peak_resident_bytes(pid: u32) -> Option<u64> {
    proc_status(pid, "VmHWM:")
}

fn proc_status(pid: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn wait_for_file(path: &Path) -> String {
    let begun = std::time::Instant::now();
    loop {
        match std::fs::read_to_string(path) {
            Ok(text) if !text.is_empty() => return text,
            _ if begun.elapsed() > PATIENCE => panic!("{} was not written", path.display()),
            // The file appears before the line that says so is printed; this is the exception.
            _ => std::thread::yield_now(),
        }
    }
}

/// `agentd`, running and connected.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    dir: TempDir,
}

impl Agent {
    /// The agent that this process is, with the folder of its configuration.
    const fn new(process: Process, dir: TempDir) -> Self {
        Self { process, dir }
    }

    /// The process.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// The same, to end it.
    pub const fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The folder of its configuration.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Replaces its configuration by these tunnels, at once and whole as an editor or a tool does.
    pub fn write_tunnels(&self, local: &Local, tunnels: &str) {
        self.write_config(&local.config(tunnels));
    }

    /// Replaces its configuration.
    pub fn write_config(&self, text: &str) {
        let new = self.dir.path().join("agentd.toml.new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dir.path().join("agentd.toml")).unwrap();
    }

    /// Runs a command that asks this agent: its exit code and what it printed.
    #[must_use]
    pub fn ask(&self, command: &[&str]) -> (Option<i32>, String) {
        let socket = self.dir.path().join("control.sock");
        let arguments = [command, &["--control-socket", socket.to_str().unwrap()]].concat();
        let mut process = Process::start("agentd", &arguments, &[]);
        (process.wait(), process.printed())
    }
}

/// Bytes that look random and are the same in every run.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Repeats `check` until it holds; the state it asks for is reached without the test's doing.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !check().await {
        assert!(begun.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
