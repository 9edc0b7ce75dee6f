//! Other tunnels beside `agentd`: the same upstream, the same load, the same machine, taking turns.
//!
//! Enters: a file that names the peers, which somebody else has started (`bench/peers/run`). Leaves: two
//! tables, and the same as JSON. What a way is measured by came through its processes: who listens where
//! requests go, and who is connected to the upstream, is looked up before and after.

pub(crate) mod front;
mod processes;

use std::{
    cell::RefCell,
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::LocalSet,
    time::{sleep, timeout},
};

use crate::{
    agent::{self, AgentProcess},
    client::{Client, Target},
    delays,
    edge::Until,
    figures::{median, number, quantile},
    measure,
    peers::{
        front::Front,
        processes::{Socket, Tree},
    },
    upstream::{self, Upstream},
    usage,
};

/// How many clients a busy way has; the few are what fits the ten sockets that some peers allow themselves.
const MANY: usize = 64;
const FEW: usize = 8;

/// How many times the requests of an HTTP-aware tunnel `agentd` is to answer, and what part of the fastest relay's.
const TIMES_HTTP: f64 = 5.0;
const PART_OF_RELAY: f64 = 1.0 / 1.5;

/// How long an answer may take before it counts as an error.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client waits after an error, and how many errors it takes.
const PAUSE: Duration = Duration::from_millis(50);
const ERRORS: u64 = 20;

/// How long the processes may take to be ready.
const READY: Duration = Duration::from_secs(30);

/// What is measured, and how much of it.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The peers: a TOML file with a `[[peer]]` for each
    #[arg(long, value_name = "FILE", requires = "upstream")]
    peers: Option<PathBuf>,
    /// The port of the upstream that the peers lead to, a running `bench upstream`
    #[arg(long, value_name = "PORT")]
    upstream: Option<u16>,
    /// How often everything is measured; figures are medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// How long each load lasts, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(100..))]
    load: u64,
    /// Leave out the whole path through `local`
    #[arg(long)]
    no_path: bool,
    /// Write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a peer is, which decides what it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    /// The upstream itself.
    Direct,
    /// A reverse proxy with no tunnel.
    Proxy,
    /// Copies bytes, and knows no requests.
    Relay,
    /// Knows requests.
    Http,
}

impl Level {
    const fn text(self) -> &'static str {
        match self {
            Self::Direct => "no tunnel",
            Self::Proxy => "proxy, no tunnel",
            Self::Relay => "TCP relay",
            Self::Http => "HTTP-aware",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    peer: Vec<Peer>,
}

/// A peer that runs.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    /// Its name and version.
    name: String,
    level: Level,
    /// Where requests go.
    address: SocketAddr,
    /// The name they go to.
    #[serde(default = "localhost")]
    host: String,
    /// The process that is connected to the upstream, where that is another than the one that takes requests.
    agent: Option<u32>,
    /// The process that takes requests.
    server: u32,
}

fn localhost() -> String {
    "localhost".to_owned()
}

/// `agentd` with nothing but a front. The front ends first: it would complain of an agent that leaves.
#[derive(Debug)]
struct Alone {
    front: Front,
    agent: AgentProcess,
}

impl Alone {
    fn start(upstream: &Upstream) -> anyhow::Result<Self> {
        let front = Front::start()?;
        let program = ::tests::process::binary("agentd");
        let address = format!("127.0.0.1:{}", upstream.port);
        let agent = AgentProcess::start(&program, &[], &front.url, &address, false)?;
        Ok(Self { front, agent })
    }
}

/// One of the ways to the upstream.
#[derive(Debug)]
struct Way {
    name: String,
    level: Level,
    /// Whether an error here is a fault of ours.
    is_ours: bool,
    target: Target,
    agent: Option<Tree>,
    server: Option<Tree>,
    /// 10^6 bytes after the first, small request: agent, what of that is not shared, server.
    idle: [Option<f64>; 3],
    rounds: Vec<Round>,
}

/// What one round has found about one way. `None` where nothing came back.
#[derive(Debug, Default)]
struct Round {
    /// One client, p50, p95 and p99 in milliseconds.
    alone: Option<[f64; 3]>,
    /// Answers in a second.
    many: Option<f64>,
    few: Option<f64>,
    /// Microseconds of CPU for a request with many clients.
    agent_micros: Option<f64>,
    server_micros: Option<f64>,
    /// 10^6 bytes in a second.
    bodies: Option<f64>,
    /// p50 and p99 of the delay of events in milliseconds.
    events: Option<[f64; 2]>,
    errors: u64,
}

/// A way's figures: medians of the rounds.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    level: Level,
    requests_per_second_64: Option<f64>,
    /// The least and the most of the rounds.
    range_64: Option<(f64, f64)>,
    requests_per_second_8: Option<f64>,
    /// What one client waits longer than directly, µs.
    added_us: Option<[f64; 3]>,
    agent_cpu_us: Option<f64>,
    server_cpu_us: Option<f64>,
    errors: u64,
    bodies_mb_per_second: Option<f64>,
    event_delay_ms: Option<[f64; 2]>,
    agent_idle_mb: Option<f64>,
    agent_idle_not_shared_mb: Option<f64>,
    server_idle_mb: Option<f64>,
    agent_peak_mb: Option<f64>,
    server_peak_mb: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Json {
    machine: String,
    rounds: u16,
    load_ms: u64,
    rows: Vec<Row>,
}

/// Measures and prints; ends early, with everything it has started, when it is told to stop. Whether the goals of requests are
/// reached.
pub(crate) async fn run(options: &Options) -> anyhow::Result<bool> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        result = measure(options) => result,
        _ = terminate.recv() => bail!("stopped"),
        _ = interrupt.recv() => bail!("stopped"),
    }
}

async fn measure(options: &Options) -> anyhow::Result<bool> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures mean nothing");
    }
    let peers = options.peers.as_deref().map_or_else(|| Ok(Vec::new()), read)?;
    let upstream = options.upstream.map_or_else(Upstream::start, |port| Ok(Upstream::at(port)))?;
    let alone = Alone::start(&upstream)?;
    let path = (!options.no_path).then(|| measure::Stage::start(&upstream));

    let mut ways = vec![Way::new("direct", Level::Direct, true, upstream.direct(), None, None)];
    for Peer { name, level, address, host, agent, server } in peers {
        let target = Target { address, host };
        ways.push(Way::new(name, level, false, target, agent.map(Tree), Some(Tree(server))));
    }
    let target = Target { address: alone.front.public, host: "bench.localhost".to_owned() };
    let processes = (Some(Tree(alone.agent.id())), Some(Tree(alone.front.id())));
    ways.push(Way::new(ALONE, Level::Http, true, target, processes.0, processes.1));
    if let Some(path) = &path {
        let processes = (Some(Tree(path.agent.process().id())), Some(Tree(path.local.process().id())));
        let target = path.ways.tunnel.clone();
        ways.push(Way::new(WHOLE, Level::Http, true, target, processes.0, processes.1));
    }
    let mut left_out = Vec::new();
    let mut ready = Vec::with_capacity(ways.len());
    for mut way in ways {
        match way.ready(&upstream).await {
            Ok(()) => {
                way.idle = [
                    way.agent.map(Tree::resident),
                    way.agent.map(Tree::anonymous),
                    way.server.map(Tree::resident),
                ];
                ready.push(way);
            }
            Err(error) if way.is_ours => return Err(error.context(way.name)),
            Err(error) => left_out.push(format!("not measured: {}: {error:#}", way.name)),
        }
    }
    let mut ways = ready;

    let load = Duration::from_millis(options.load);
    for round in 1..=options.rounds {
        eprintln!("peers: round {round} of {}", options.rounds);
        // Back and forth, so that nobody is always measured after the same other.
        let mut order: Vec<_> = ways.iter_mut().collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for way in order {
            eprintln!("peers: {}", way.name);
            let mut found = way.measure(load).await;
            if let Err(error) = way.prove(&upstream).await {
                found.errors += 1;
                eprintln!("peers: {}: after the round: {error:#}", way.name);
            }
            way.rounds.push(found);
        }
    }

    let rows: Vec<_> = ways.iter().map(|way| way.row(&ways[0])).collect();
    let (verdicts, are_met) = verdicts(&rows);
    print!("{}", tables(options, &rows, &verdicts));
    for line in left_out {
        println!("{line}");
    }
    let faults: u64 =
        ways.iter().filter(|way| way.is_ours).flat_map(|way| &way.rounds).map(|r| r.errors).sum();
    if let Some(path) = &options.json {
        let json = Json { machine: usage::machine(), rounds: options.rounds, load_ms: options.load, rows };
        std::fs::write(path, serde_json::to_vec_pretty(&json)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    ensure!(faults == 0, "{faults} errors on ways of our own");
    Ok(are_met)
}

/// The names of our own rows.
const ALONE: &str = "`agentd` alone";
const WHOLE: &str = "whole path through `local`";

fn read(path: &Path) -> anyhow::Result<Vec<Peer>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let file: File = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    Ok(file.peer)
}

impl Way {
    fn new(
        name: impl Into<String>,
        level: Level,
        is_ours: bool,
        target: Target,
        agent: Option<Tree>,
        server: Option<Tree>,
    ) -> Self {
        let name = name.into();
        Self { name, level, is_ours, target, agent, server, idle: [None; 3], rounds: Vec::new() }
    }

    /// Returns when requests come through.
    async fn ready(&self, upstream: &Upstream) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            match self.trace(upstream).await {
                Ok(_) => return Ok(()),
                Err(error) if begun.elapsed() > READY => return Err(error),
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    /// Checks that requests come in at the server and leave from the agent.
    async fn trace(&self, upstream: &Upstream) -> anyhow::Result<Client> {
        let mut client =
            timeout(PATIENCE, Client::connect(&self.target)).await.context("no connection")??;
        let peer = timeout(PATIENCE, client.call("/peer", None)).await.context("no answer")??;
        let peer: SocketAddr = std::str::from_utf8(&peer)?.parse()?;
        if let Some(server) = self.server {
            let socket = Socket::Listening(self.target.address);
            ensure!(server.has(socket)?, "the server does not listen on {}", self.target.address);
        }
        if let Some(last) = self.agent.or(self.server) {
            let socket = Socket::Connected(peer, upstream.direct().address);
            ensure!(last.has(socket)?, "the request came to the upstream from somebody else: {peer}");
        }
        Ok(client)
    }

    /// Checks that, and that every byte of a large body comes.
    async fn prove(&self, upstream: &Upstream) -> anyhow::Result<()> {
        let mut client = self.trace(upstream).await?;
        let body =
            timeout(PATIENCE, client.call(agent::DOWNLOAD.target, None)).await.context("no body")??;
        ensure!(body == upstream::pattern()[..agent::MIB], "a wrong body");
        Ok(())
    }

    /// Measures one round.
    async fn measure(&self, time: Duration) -> Round {
        let mut round = Round::default();
        let small = agent::SMALL.target;
        let way = &self.target;

        load(way, small, 1, Until::Answers(50)).await;
        let mut alone = load(way, small, 1, Until::Time(time / 2)).await;
        round.alone = (!alone.delays.is_empty())
            .then(|| [0.5, 0.95, 0.99].map(|part| quantile(&mut alone.delays, part)));

        let warm = load(way, small, MANY, Until::Time(time / 3)).await;
        let cpu = |tree: Option<Tree>| tree.map(Tree::cpu);
        let before = (cpu(self.agent), cpu(self.server));
        let many = load(way, small, MANY, Until::Time(time)).await;
        let micros = |tree: Option<Tree>, before: Option<processes::Cpu>| {
            let used = tree?.cpu().since(&before?).as_secs_f64() * 1e6;
            (many.answers > 0).then(|| used / many.answers as f64)
        };
        round.agent_micros = micros(self.agent, before.0);
        round.server_micros = micros(self.server, before.1);
        round.many = many.rate();

        let few = load(way, small, FEW, Until::Time(time)).await;
        round.few = few.rate();

        let bodies = load(way, agent::DOWNLOAD.target, FEW, Until::Time(time)).await;
        round.bodies = bodies.rate().map(|rate| rate * agent::MIB as f64 / 1e6);

        // Somebody who loses them has an error, and no delays.
        let events =
            timeout(PATIENCE, delays::event_delays(way)).await.map_err(anyhow::Error::from).flatten();
        match events {
            Ok(mut delays) => round.events = Some([0.5, 0.99].map(|part| quantile(&mut delays, part))),
            Err(error) => {
                round.errors += 1;
                eprintln!("peers: {}: events: {error:#}", self.name);
            }
        }
        for part in [alone, warm, many, few, bodies] {
            round.errors += part.errors;
            if let Some(error) = part.last_error {
                eprintln!("peers: {}: {} errors, at last: {error:#}", self.name, part.errors);
            }
        }
        round
    }

    /// The medians; `direct` is what its delays are compared with, round by round.
    fn row(&self, direct: &Self) -> Row {
        let of = |get: fn(&Round) -> Option<f64>| {
            let all: Vec<_> = self.rounds.iter().filter_map(get).collect();
            (!all.is_empty()).then(|| median(all))
        };
        let many: Vec<_> = self.rounds.iter().filter_map(|round| round.many).collect();
        let added: Vec<[f64; 3]> = self
            .rounds
            .iter()
            .zip(&direct.rounds)
            .filter_map(|(round, direct)| {
                let (own, direct) = (round.alone?, direct.alone?);
                Some([0, 1, 2].map(|at| (own[at] - direct[at]) * 1e3))
            })
            .collect();
        Row {
            name: self.name.clone(),
            level: self.level,
            requests_per_second_64: of(|round| round.many),
            range_64: many.iter().copied().reduce(f64::min).zip(many.iter().copied().reduce(f64::max)),
            requests_per_second_8: of(|round| round.few),
            added_us: (!added.is_empty())
                .then(|| [0, 1, 2].map(|at| median(added.iter().map(|all| all[at]).collect()))),
            agent_cpu_us: of(|round| round.agent_micros),
            server_cpu_us: of(|round| round.server_micros),
            errors: self.rounds.iter().map(|round| round.errors).sum(),
            bodies_mb_per_second: of(|round| round.bodies),
            event_delay_ms: of(|round| round.events.map(|all| all[0]))
                .zip(of(|round| round.events.map(|all| all[1])))
                .map(|(half, most)| [half, most]),
            agent_idle_mb: self.idle[0],
            agent_idle_not_shared_mb: self.idle[1],
            server_idle_mb: self.idle[2],
            agent_peak_mb: self.agent.map(Tree::peak),
            server_peak_mb: self.server.map(Tree::peak),
        }
    }
}

/// What came of asking.
#[derive(Debug, Default)]
struct Loaded {
    answers: u64,
    errors: u64,
    last_error: Option<anyhow::Error>,
    /// Milliseconds.
    delays: Vec<f64>,
    time: Duration,
}

impl Loaded {
    /// Answers in a second, if there was one.
    fn rate(&self) -> Option<f64> {
        (self.answers > 0).then(|| self.answers as f64 / self.time.as_secs_f64())
    }
}

/// Has `clients` ask for `path` one time after the other, each on a connection of its own.
async fn load(way: &Target, path: &'static str, clients: usize, until: Until) -> Loaded {
    let loaded = Rc::new(RefCell::new(Loaded::default()));
    let begun = Instant::now();
    let set = LocalSet::new();
    for _ in 0..clients {
        let (way, loaded) = (way.clone(), Rc::clone(&loaded));
        set.spawn_local(async move {
            let mut connected = None;
            let mut errors = 0;
            loop {
                let is_over = match until {
                    Until::Answers(count) => loaded.borrow().delays.len() >= count,
                    Until::Time(time) => begun.elapsed() >= time,
                };
                if is_over || errors == ERRORS {
                    break;
                }
                let asked = Instant::now();
                let answer = timeout(PATIENCE, ask(&way, &mut connected, path)).await;
                match answer.context("no answer in time").flatten() {
                    Ok(()) => {
                        let mut loaded = loaded.borrow_mut();
                        loaded.answers += 1;
                        loaded.delays.push(asked.elapsed().as_secs_f64() * 1e3);
                    }
                    Err(error) => {
                        errors += 1;
                        connected = None;
                        {
                            let mut loaded = loaded.borrow_mut();
                            loaded.errors += 1;
                            loaded.last_error = Some(error);
                        }
                        sleep(PAUSE).await;
                    }
                }
            }
        });
    }
    set.await;
    let mut loaded = loaded.take();
    loaded.time = begun.elapsed();
    loaded
}

/// Asks once; the answer must be as long as it is to be, and a short one the right one.
async fn ask(way: &Target, connected: &mut Option<Client>, path: &'static str) -> anyhow::Result<()> {
    let client = match connected {
        Some(client) => client,
        None => connected.insert(Client::connect(way).await?),
    };
    if path == agent::SMALL.target {
        ensure!(client.call(path, None).await? == upstream::HELLO, "a wrong answer");
        return Ok(());
    }
    let mut body = client.begin(path, None).await?.into_body();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame?.data_ref().map_or(0, Bytes::len);
    }
    ensure!(Some(bytes) == agent::DOWNLOAD.expected, "{bytes} bytes came");
    Ok(())
}

/// Everything, for people.
fn tables(options: &Options, rows: &[Row], verdicts: &[String]) -> String {
    let mut text = format!(
        "{}; medians of {} rounds that took turns, {} ms for each load\n\n",
        usage::machine(),
        options.rounds,
        options.load
    );
    let figure = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), number);
    let whole = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.0}"));
    let _ = writeln!(
        text,
        "| | what it is | req/s, {MANY} clients (range) | req/s, {FEW} clients | one client, added p50 · p95 · p99 \
         | CPU a request: agent · server | errors |\n|---|---|---:|---:|---:|---:|---:|"
    );
    for row in rows {
        let range =
            row.range_64.map_or_else(String::new, |(least, most)| format!(" ({least:.0} … {most:.0})"));
        let added = match row.added_us {
            Some(_) if row.level == Level::Direct => "–".to_owned(),
            Some([half, most, nearly]) => format!("{half:.0} · {most:.0} · {nearly:.0} µs"),
            None => "–".to_owned(),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {}{range} | {} | {added} | {} · {} µs | {} |",
            row.name,
            row.level.text(),
            whole(row.requests_per_second_64),
            whole(row.requests_per_second_8),
            figure(row.agent_cpu_us),
            figure(row.server_cpu_us),
            row.errors
        );
    }
    let _ = writeln!(
        text,
        "\n| | 1 MiB bodies, {FEW} clients | event delay p50 · p99 | resident, idle: agent (not shared) · server \
         | peak: agent · server |\n|---|---:|---:|---:|---:|"
    );
    for row in rows {
        let events = row
            .event_delay_ms
            .map_or_else(|| "–".to_owned(), |[half, most]| format!("{half:.2} · {most:.2} ms"));
        let own = row.agent_idle_not_shared_mb.map_or_else(String::new, |own| format!(" ({})", number(own)));
        let _ = writeln!(
            text,
            "| {} | {} MB/s | {events} | {}{own} · {} MB | {} · {} MB |",
            row.name,
            whole(row.bodies_mb_per_second),
            figure(row.agent_idle_mb),
            figure(row.server_idle_mb),
            figure(row.agent_peak_mb),
            figure(row.server_peak_mb)
        );
    }
    text.push_str(
        "\nA relay copies the bytes of a connection and knows no requests, a proxy has no tunnel, and none of the peers \
         has a hop of AWS.\n`agentd` alone has a front of this benchmark for a server: HTTP in, its WebSocket out, \
         nothing of AWS.\n",
    );
    if rows.iter().any(|row| row.name == WHOLE) {
        text.push_str(
            "The whole path has `local` for a server, with six services of AWS and every function's process.\n",
        );
    }
    text.push('\n');
    for line in verdicts {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Whether the goals are reached, as far as the rows can tell: a line for each, and whether those of requests are.
fn verdicts(rows: &[Row]) -> (Vec<String>, bool) {
    let Some(own) = rows.iter().find(|row| row.name == ALONE) else { return (Vec::new(), true) };
    let mut are_met = true;
    let peers =
        |level| rows.iter().filter(move |row| row.level == level && row.name != ALONE && row.name != WHOLE);
    let mut lines = Vec::new();
    for peer in peers(Level::Http) {
        if let (Some(ours), Some(theirs)) = (own.requests_per_second_64, peer.requests_per_second_64) {
            let is_met = ours >= TIMES_HTTP * theirs;
            are_met &= is_met;
            lines.push(format!(
                "goal, {TIMES_HTTP} times the requests of an HTTP-aware tunnel: {:.1} times those of {}: {}",
                ours / theirs,
                peer.name,
                word(is_met)
            ));
        }
    }
    let rate = |row: &&Row| row.requests_per_second_64.unwrap_or_default();
    let fastest = peers(Level::Relay).max_by(|one, other| rate(one).total_cmp(&rate(other)));
    if let (Some(ours), Some(peer)) = (own.requests_per_second_64, fastest) {
        let part = ours / rate(&peer);
        let is_met = part >= PART_OF_RELAY;
        are_met &= is_met;
        lines.push(format!(
            "goal, {PART_OF_RELAY:.2} of the requests of the fastest relay: {part:.2} of those of {}: {}",
            peer.name,
            word(is_met)
        ));
    }
    for peer in peers(Level::Relay) {
        if let (Some(ours), Some(theirs)) = (own.agent_idle_mb, peer.agent_idle_mb) {
            let word = word(ours <= 2.0 * theirs);
            let own = own.agent_idle_not_shared_mb.zip(peer.agent_idle_not_shared_mb);
            let own = own.map_or_else(String::new, |(ours, theirs)| {
                format!(" (not shared: {:.2} times)", ours / theirs)
            });
            lines.push(format!(
                "goal, at most twice the memory of a relay's idle agent: {:.2} times that of {}: {word}{own}",
                ours / theirs,
                peer.name
            ));
        }
    }
    (lines, are_met)
}

const fn word(is_met: bool) -> &'static str {
    if is_met { "reached" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use ::tests::sockets::Port;

    use super::*;

    #[test]
    fn a_file_of_peers_is_read_and_a_wrong_word_in_it_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peers.toml");
        let text = "[[peer]]\nname = \"a 1.0\"\nlevel = \"relay\"\naddress = \"127.0.0.1:1\"\nserver = 7\n";
        std::fs::write(&path, text).unwrap();
        let expected = Peer {
            name: "a 1.0".to_owned(),
            level: Level::Relay,
            address: "127.0.0.1:1".parse().unwrap(),
            host: "localhost".to_owned(),
            agent: None,
            server: 7,
        };
        assert_eq!(read(&path).unwrap(), [expected]);
        std::fs::write(&path, text.replace("server", "sevrer")).unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("sevrer"));
    }

    fn row(name: &str, level: Level, rate: f64, idle: f64) -> Row {
        let mut way = Way::new(
            name,
            level,
            false,
            Target { address: ([127, 0, 0, 1], 1).into(), host: localhost() },
            None,
            None,
        );
        way.idle = [Some(idle), Some(1.0), None];
        way.rounds = vec![Round { many: Some(rate), alone: Some([1.0, 2.0, 3.0]), ..Round::default() }];
        way.row(&way)
    }

    #[test]
    fn goals_are_about_agents_of_the_same_kind() {
        let rows = [
            row("nginx", Level::Proxy, 9e9, 0.1),
            row("relay", Level::Relay, 75.0, 4.0),
            row("small relay", Level::Relay, 9.0, 3.9),
            row("slow", Level::Http, 10.0, 0.1),
            row(ALONE, Level::Http, 50.0, 8.0),
            row(WHOLE, Level::Http, 9e9, 0.1),
        ];
        let (lines, are_met) = verdicts(&rows);
        assert_eq!(lines.len(), 4, "{lines:?}");
        assert!(lines[0].contains("5.0 times those of slow: reached"), "{lines:?}");
        assert!(lines[1].contains("0.67 of those of relay: reached"), "{lines:?}");
        assert!(lines[2].contains("2.00 times that of relay: reached"), "{lines:?}");
        assert!(lines[3].contains("2.05 times that of small relay: missed"), "{lines:?}");
        assert!(are_met, "what memory is aimed at is only said");
        for (level, rate) in [(Level::Http, 10.1), (Level::Relay, 75.1)] {
            let rows = [row("peer", level, rate, 4.0), row(ALONE, Level::Http, 50.0, 8.0)];
            let (lines, are_met) = verdicts(&rows);
            assert!(!are_met && lines[0].ends_with("missed"), "{lines:?}");
        }
    }

    /// An upstream that knows `/peer` only.
    async fn upstream_of_peers() -> Upstream {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                let service = hyper::service::service_fn(move |_| async move {
                    anyhow::Ok(http::Response::new(http_body_util::Full::new(Bytes::from(peer.to_string()))))
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(hyper_util::rt::TokioIo::new(stream), service));
            }
        });
        Upstream::at(port)
    }

    #[tokio::test]
    async fn a_request_that_came_through_other_processes_is_noticed() {
        let upstream = upstream_of_peers().await;
        let way =
            |agent, server| Way::new("way", Level::Relay, false, upstream.direct(), agent, Some(server));
        let this = Tree(std::process::id());
        let mut other =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let cat = Tree(other.id());
        way(None, this).trace(&upstream).await.unwrap();
        let error = way(None, cat).trace(&upstream).await.unwrap_err();
        assert!(error.to_string().contains("does not listen"), "{error}");
        let error = way(Some(cat), this).trace(&upstream).await.unwrap_err();
        assert!(error.to_string().contains("from somebody else"), "{error}");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[tokio::test]
    async fn a_way_that_does_not_answer_counts_errors_and_has_no_figures() {
        let nobody = Port::take();
        let target = Target { address: nobody.address(), host: localhost() };
        let loaded = load(&target, agent::SMALL.target, 1, Until::Answers(1)).await;
        assert_eq!((loaded.answers, loaded.errors), (0, ERRORS));
        assert!(loaded.rate().is_none());
    }
}
