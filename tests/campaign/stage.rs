//! Everything that runs during one scenario, and what is done to it.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    Local,
    process::{Process, binary},
    proxy::Proxy,
};
use tokio::time::sleep;

use crate::{
    load::{Client, TUNNEL},
    oracle::{Ask, Kind, Seen, Verdict, judge},
    scenario::{Fault, Scenario, Strictness},
    upstream::Upstream,
};

/// How long something is stopped: longer than a turn of a queue, shorter than what counts as dead.
const STOPPED: Duration = Duration::from_secs(2);

/// How long a function may outlive its edge.
const ENDED: Duration = Duration::from_secs(2);

/// How long everything may take to be well again: a dead link is noticed in 40 s at the latest.
const RECOVERY: Duration = Duration::from_secs(60);

/// Whose the tunnel is: the owner that `local` writes into its token.
const OWNER: &str = "developer";

/// The request that asks whether everything is well; its number is none of a load's.
const PROBE: u64 = u64::MAX >> 1;

/// An agent, and how it is started.
#[derive(Debug)]
struct Agent {
    process: Process,
    dir: TempDir,
    edge: String,
    preload: Option<(PathBuf, PathBuf)>,
    log_full: bool,
}

impl Agent {
    fn start(edge: &str, config: &str, preload: Option<PathBuf>, log_full: bool) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("agentd.toml"), config)?;
        let offset = dir.path().join("offset");
        std::fs::write(&offset, "+0\n")?;
        let preload = preload.map(|library| (library, offset));
        let process = Self::launch(dir.path(), edge, preload.as_ref(), log_full);
        Ok(Self { process, dir, edge: edge.to_owned(), preload, log_full })
    }

    fn launch(dir: &Path, edge: &str, preload: Option<&(PathBuf, PathBuf)>, log_full: bool) -> Process {
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (config, socket) = (path("agentd.toml"), path("control.sock"));
        let mut environment = vec![("AGENTD_CONTROL_SOCKET", socket.as_str()), ("AGENTD_EDGE", edge)];
        let (library, offset);
        if let Some(preload) = preload {
            library = preload.0.to_string_lossy().into_owned();
            offset = preload.1.to_string_lossy().into_owned();
            environment.extend([
                ("LD_PRELOAD", library.as_str()),
                ("FAKETIME_TIMESTAMP_FILE", offset.as_str()),
                ("FAKETIME_NO_CACHE", "1"),
                // The monotonic clock does not jump when somebody sets the time.
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ]);
        }
        let command = if log_full {
            let mut shell = Command::new("sh");
            shell.args(["-c", "exec \"$0\" \"$@\" >/dev/full 2>&1"]).arg(binary("agentd"));
            shell
        } else {
            Command::new(binary("agentd"))
        };
        Process::start_as("agentd", command, &["run", "--config", &config], &environment)
    }

    fn again(&mut self) {
        self.process = Self::launch(self.dir.path(), &self.edge, self.preload.as_ref(), self.log_full);
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        Pid::from_raw(i32::try_from(self.process.id())?).context("no process")
    }

    fn write_config(&self, text: &str) -> anyhow::Result<()> {
        let new = self.dir.path().join("agentd.toml.new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, self.dir.path().join("agentd.toml"))?;
        self.process.signal(Signal::HUP);
        Ok(())
    }

    /// How far the clock that it reads is off.
    fn set_clock(&self, offset: &str) -> anyhow::Result<()> {
        let (_, file) = self.preload.as_ref().context("no clock to set")?;
        std::fs::write(file, format!("{offset}\n"))?;
        Ok(())
    }

    /// What it says about itself.
    fn status(&self) -> anyhow::Result<Value> {
        let socket = self.dir.path().join("control.sock");
        let asked = Command::new(binary("agentd"))
            .args(["status", "--json", "--control-socket"])
            .arg(socket)
            .output()?;
        Ok(serde_json::from_slice(&asked.stdout)?)
    }
}

/// Where the library lies that gives a process a clock of its own, if it is installed (Debian: `faketime`).
pub(crate) fn clock_library() -> Option<PathBuf> {
    let folders = ["/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime"];
    folders.iter().map(|folder| Path::new(folder).join("libfaketime.so.1")).find(|file| file.exists())
}

/// The system of one run.
#[derive(Debug)]
pub(crate) struct Stage {
    local: Local,
    chaos: String,
    agents: Vec<Agent>,
    pub(crate) upstream: Upstream,
    /// Between the agents and the edge, where the fault is there.
    proxy: Option<Proxy>,
    config: String,
    is_chaotic: bool,
    /// How many descriptors the first agent had when it was well.
    descriptors: usize,
}

impl Stage {
    pub(crate) async fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        let upstream = Upstream::start().await?;
        let chaos = scenario.chaos();
        let local = Local::start(&["--chaos", &chaos]);
        let link = matches!(scenario.fault, Fault::LinkReset | Fault::LinkSilence);
        let edge: SocketAddr = local.agents.trim_start_matches("ws://").parse()?;
        let proxy = if link { Some(Proxy::start(edge).await) } else { None };
        let edge =
            proxy.as_ref().map_or_else(|| local.agents.clone(), |proxy| format!("ws://{}", proxy.address));
        let config = local.config(&format!(
            "[[tunnel]]\nname = \"{TUNNEL}\"\nupstream = \"{}\"\nmax_concurrent = 64\n",
            upstream.address
        ));
        let preload = if matches!(scenario.fault, Fault::AgentClockBack | Fault::AgentClockAhead) {
            clock_library()
        } else {
            None
        };
        let log_full = scenario.fault == Fault::LogFull;
        let agents = (0..scenario.agents)
            .map(|_| Agent::start(&edge, &config, preload.clone(), log_full))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let is_chaotic = !scenario.legs.is_empty();
        let mut stage = Self { local, chaos, agents, upstream, proxy, config, is_chaotic, descriptors: 0 };
        stage.is_well().await.context("before the load")?;
        stage.descriptors = stage.open_descriptors()?;
        Ok(stage)
    }

    pub(crate) fn public(&self) -> SocketAddr {
        self.local.public
    }

    /// Does what the scenario says, and takes it back again.
    pub(crate) async fn inject(&mut self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::None | Fault::LogFull => {}
            Fault::AgentKill => {
                self.agents[0].process.signal(Signal::KILL);
                self.agents[0].process.wait();
                self.agents[0].again();
            }
            Fault::AgentEnd => {
                self.agents[0].process.signal(Signal::TERM);
                let code = self.agents[0].process.wait();
                ensure!(code == Some(0), "the agent ended with {code:?}");
                self.agents[0].again();
            }
            Fault::AgentStop => {
                for agent in &self.agents {
                    agent.process.signal(Signal::STOP);
                }
                sleep(STOPPED).await;
                for agent in &self.agents {
                    agent.process.signal(Signal::CONT);
                }
            }
            Fault::AgentDescriptors => {
                let pid = self.agents[0].pid()?;
                let most = u64::try_from(self.open_descriptors()? + 2)?;
                let before = rustix::process::getrlimit(Resource::Nofile);
                let tight = Rlimit { current: Some(most), maximum: before.maximum };
                let before = rustix::process::prlimit(Some(pid), Resource::Nofile, tight)?;
                sleep(STOPPED).await;
                rustix::process::prlimit(Some(pid), Resource::Nofile, before)?;
            }
            Fault::AgentReload => {
                for agent in &self.agents {
                    agent.write_config(&self.config.replace("max_concurrent = 64", "max_concurrent = 65"))?;
                }
                for agent in &self.agents {
                    let is_read = || agent.status().is_ok_and(|status| status["config"]["reloads"] != 0);
                    ensure!(comes_true(RECOVERY, is_read).await, "the configuration is not read again");
                    agent.write_config(&self.config)?;
                }
            }
            Fault::AgentToken => {
                let token = self.local.token_file(&self.local.issue(OWNER, &[TUNNEL]));
                let before = self.local.token.display().to_string();
                for agent in &self.agents {
                    agent.write_config(&self.config.replace(&before, &token.display().to_string()))?;
                }
            }
            Fault::AgentClockBack | Fault::AgentClockAhead => {
                let offset = if fault == Fault::AgentClockBack { "-3600" } else { "+3600" };
                if self.agents[0].preload.is_some() {
                    self.agents.iter().try_for_each(|agent| agent.set_clock(offset))?;
                    sleep(STOPPED).await;
                    self.agents.iter().try_for_each(|agent| agent.set_clock("+0"))?;
                }
            }
            Fault::EdgeKill => {
                let children: Vec<_> = self.local.function_processes();
                self.local.kill_and_start_again(&["--no-agent", "--chaos", &self.chaos]);
                for (function, pid) in children {
                    let program = format!("/proc/{pid}/exe");
                    let is_gone = || !Path::new(&program).exists();
                    ensure!(comes_true(ENDED, is_gone).await, "{function} outlives the edge that was killed");
                }
            }
            Fault::EdgeStop => {
                self.local.process().signal(Signal::STOP);
                sleep(STOPPED).await;
                self.local.process().signal(Signal::CONT);
            }
            Fault::FunctionKill(function) => {
                for _ in 0..5 {
                    self.signal(function, Signal::KILL);
                    sleep(Duration::from_millis(100)).await;
                }
            }
            Fault::FunctionStop(function) => {
                let stopped = self.signal(function, Signal::STOP);
                sleep(STOPPED).await;
                for pid in stopped {
                    let _ = rustix::process::kill_process(pid, Signal::CONT);
                }
            }
            Fault::Deploy(function) => {
                let mut variables = self.local.variables(function).await;
                variables["CAMPAIGN"] = json!("2");
                self.local.deploy(function, &variables).await;
            }
            Fault::LinkReset => {
                let proxy = self.proxy.as_ref().context("no proxy")?;
                proxy.break_all();
                sleep(Duration::from_millis(500)).await;
                proxy.open();
            }
            Fault::LinkSilence => {
                let proxy = self.proxy.as_ref().context("no proxy")?;
                proxy.silence();
                sleep(Duration::from_secs(3)).await;
                proxy.open();
            }
            Fault::LinkClose => {
                for connection in self.connections().await? {
                    // It may have gone in the meantime.
                    self.local.try_close(&connection).await;
                }
            }
            Fault::UpstreamDown => {
                self.upstream.set_down(true);
                sleep(Duration::from_secs(1)).await;
                self.upstream.set_down(false);
            }
            Fault::UpstreamStall => {
                self.upstream.set_stalled(true);
                sleep(STOPPED).await;
                self.upstream.set_stalled(false);
            }
        }
        Ok(())
    }

    fn signal(&self, function: &str, signal: Signal) -> Vec<Pid> {
        let all = self.local.function_processes().into_iter().filter(|(name, _)| name == function);
        let pids = all.filter_map(|(_, pid)| Pid::from_raw(i32::try_from(pid).ok()?));
        // It may end by itself at any time.
        pids.filter(|pid| rustix::process::kill_process(*pid, signal).is_ok()).collect()
    }

    /// The connections that serve the tunnel, as the table has them.
    async fn connections(&self) -> anyhow::Result<BTreeSet<String>> {
        let query = json!({
            "TableName": "connections",
            "KeyConditionExpression": "tunnel = :t",
            "ExpressionAttributeValues": {":t": {"S": TUNNEL}},
        });
        let rows = self.local.dynamodb("Query", query).await;
        let ids = rows["Items"].as_array().context("no rows")?.iter();
        let ids = ids.filter_map(|row| row["connection_id"]["S"].as_str().map(str::to_owned));
        // The name's own row, and counters, begin with a sign.
        Ok(ids.filter(|id| !id.starts_with('#')).collect())
    }

    fn open_descriptors(&self) -> anyhow::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.agents[0].process.id()))?.count())
    }

    /// Waits until a request is answered rightly.
    pub(crate) async fn is_well(&self) -> anyhow::Result<()> {
        let begun = std::time::Instant::now();
        let probe = Ask { id: PROBE, kind: Kind::Echo, sent: None, back: 16 };
        loop {
            let seen = Client::new(self.public()).ask(&probe).await;
            match judge(&probe, &seen, Strictness::Honest) {
                Verdict::Right => return Ok(()),
                Verdict::Wrong(what) if !is_unknown(&seen) => anyhow::bail!(what),
                _ if begun.elapsed() > RECOVERY => anyhow::bail!("not well after {RECOVERY:?}: {seen:?}"),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until nothing is left of what has been: descriptors, requests, rows. What it says is what stays.
    pub(crate) async fn leaves_nothing(&self, clients: usize) -> anyhow::Result<()> {
        let begun = std::time::Instant::now();
        loop {
            let Err(left) = self.left(clients).await else { return Ok(()) };
            ensure!(begun.elapsed() < RECOVERY, "{left}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn left(&self, clients: usize) -> anyhow::Result<()> {
        let mut live = BTreeSet::new();
        for agent in &self.agents {
            let status = agent.status().context("the agent does not answer")?;
            let text = status.to_string();
            for tunnel in status["tunnels"].as_array().with_context(|| text.clone())? {
                ensure!(tunnel["in_flight"] == 0, "requests stay in flight at the agent: {tunnel}");
            }
            let connections = status["edge"]["connections"].as_array().with_context(|| text.clone())?;
            live.extend(
                connections.iter().filter_map(|one| one["connection_id"].as_str().map(str::to_owned)),
            );
            let resident = tests::resident_bytes(agent.process.id()).unwrap_or_default();
            ensure!(resident < 96 << 20, "the agent keeps {resident} bytes");
        }
        // Idle connections to the upstream are kept for the next request.
        let (open, most) = (self.open_descriptors()?, self.descriptors + 64.min(clients) + 8);
        ensure!(open <= most, "the agent keeps {open} descriptors, {most} are its own");
        // A refused or lost call leaves a row to the caretaker, which comes by the minute.
        if !self.is_chaotic {
            let rows = self.connections().await?;
            let dead: Vec<_> = rows.difference(&live).collect();
            ensure!(dead.is_empty(), "rows of connections that are gone: {dead:?}");
        }
        let resident = tests::resident_bytes(self.local.process().id()).unwrap_or_default();
        ensure!(resident < 384 << 20, "the edge keeps {resident} bytes");
        Ok(())
    }

    /// What the processes have said at last.
    pub(crate) fn printed(&self) -> String {
        let tail = |text: String| {
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        };
        let agents: String = self
            .agents
            .iter()
            .map(|agent| format!("--- agentd\n{}\n", tail(agent.process.printed())))
            .collect();
        format!("{agents}--- local\n{}\n", tail(self.local.process().printed()))
    }
}

/// Before the first `hello`, and while the edge starts, nobody knows the name.
fn is_unknown(seen: &Seen) -> bool {
    matches!(seen, Seen::Answer { status: 404, code: Some(_), .. })
}

/// Whether something is so within a time.
async fn comes_true(within: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let begun = std::time::Instant::now();
    while !is_so() {
        if begun.elapsed() > within {
            return false;
        }
        sleep(Duration::from_millis(10)).await;
    }
    true
}
