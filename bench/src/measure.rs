//! The measurements: enter a plan and a report, leave figures in the report.

use std::{
    cell::Cell,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use http::StatusCode;
use http_body_util::BodyExt;
use proto::limits;
use tests::{Agent, Local};
use tokio::task::LocalSet;

use crate::{
    agent,
    client::{Client, Target},
    compression,
    delays::{delays, event_delays, millis},
    designs,
    figures::{Goal, Report, Unit},
    hops,
    pace::{self, Pace},
    parts::PARTS,
    scale, start,
    upstream::{self, Upstream},
    usage::{self, Cpu},
};

const MIB: usize = 1 << 20;

/// How much is measured.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    /// Requests one after the other.
    requests: usize,
    /// For how long requests come at a constant rate, each way.
    paced: Duration,
    /// How long a load lasts.
    load: Duration,
    /// Clients at the same time, beside 32.
    steps: &'static [usize],
    /// How often the first byte is waited for.
    first_bytes: usize,
    /// Size and how often.
    downloads: &'static [(usize, usize)],
    uploads: &'static [(usize, usize)],
    agent: agent::Plan,
    /// Tenths of the requests that each kind in `designs` has, for each design.
    aws: usize,
    /// How often each function's process is started.
    starts: usize,
    scale: scale::Plan,
}

impl Plan {
    pub(crate) const fn full(rounds: usize) -> Self {
        Self {
            rounds,
            requests: 1500,
            paced: Duration::from_secs(12),
            load: Duration::from_secs(5),
            steps: &[1, 4, 8, 16, 64, 128],
            first_bytes: 20,
            downloads: &[(MIB, 10), (10 * MIB, 4), (100 * MIB, 1)],
            uploads: &[(MIB, 8), (limits::REQUEST_BODY_BYTES, 5), (10 * MIB, 2), (100 * MIB, 1)],
            agent: agent::Plan { load: Duration::from_secs(3), requests: 2000 },
            aws: 20,
            starts: 5,
            scale: scale::Plan { agents: &[1, 10, 50, 100, 200, 500], in_flight: &[1, 10, 100, 300, 1000] },
        }
    }

    pub(crate) const fn quick() -> Self {
        Self {
            rounds: 1,
            requests: 500,
            paced: Duration::from_secs(6),
            load: Duration::from_secs(3),
            steps: &[64],
            first_bytes: 10,
            downloads: &[(MIB, 5), (10 * MIB, 2), (100 * MIB, 1)],
            uploads: &[(MIB, 4), (limits::REQUEST_BODY_BYTES, 3), (10 * MIB, 1), (100 * MIB, 1)],
            agent: agent::Plan { load: Duration::from_secs(2), requests: 1000 },
            aws: 10,
            starts: 3,
            scale: scale::Plan { agents: &[1, 10, 100], in_flight: &[1, 10, 100, 300] },
        }
    }
}

/// The two ways to the same upstream.
pub(crate) struct Ways {
    pub(crate) direct: Target,
    pub(crate) tunnel: Target,
}

/// Everything that runs where the whole path is measured.
pub(crate) struct Stage {
    pub(crate) local: Local,
    pub(crate) agent: Agent,
    pub(crate) ways: Ways,
}

impl Stage {
    pub(crate) fn start(upstream: &Upstream) -> Self {
        let local = Local::start(&[]);
        let agent = local.agent_with(
            &format!(
                "[[tunnel]]\nname = \"bench\"\nupstream = \"127.0.0.1:{}\"\nmax_concurrent = 256\n",
                upstream.port
            ),
            &["bench"],
        );
        let tunnel = Target { address: local.public, host: "bench.localhost".to_owned() };
        Self { local, agent, ways: Ways { direct: upstream.direct(), tunnel } }
    }
}

/// The parts that need the whole path.
const PATH: [&str; 7] = ["latency", "load", "events", "first-byte", "download", "upload", "memory"];

/// Measures everything, or what is named in `only`; `agentd` is what is measured alone.
pub(crate) async fn run(
    plan: &Plan,
    only: &[String],
    agentd: Option<&Path>,
    picture: Option<&Path>,
    cpu: Option<u32>,
    report: &mut Report,
) -> anyhow::Result<()> {
    if let Some(unknown) = only.iter().find(|only| PARTS.iter().all(|part| part.0 != **only)) {
        let all: Vec<_> = PARTS.iter().map(|part| part.0).collect();
        anyhow::bail!("there is no part {unknown:?}; there are {}", all.join(", "));
    }
    let wanted = |part: &str| only.is_empty() || only.iter().any(|only| part == only);
    let upstream = Upstream::start()?;
    if PATH.into_iter().any(wanted) {
        path(plan, &wanted, &upstream, report).await?;
    }
    let program = agentd.map_or_else(|| tests::process::binary("agentd"), Path::to_owned);
    if wanted("agent") {
        for round in 1..=plan.rounds {
            eprintln!("agent: round {round} of {}", plan.rounds);
            agent::measure(&program, &upstream, &plan.agent, report).await?;
        }
    }
    if wanted("aws") {
        for round in 1..=plan.rounds {
            eprintln!("aws: round {round} of {}", plan.rounds);
            designs::measure(&program, &upstream, plan.aws, cpu, report).await?;
        }
    }
    if wanted("scale") {
        scale::measure(&upstream, &plan.scale, report).await?;
    }
    if wanted("hops") {
        hops::measure(&upstream, picture, report).await?;
    }
    if wanted("start") {
        for number in 1..=plan.starts {
            eprintln!("start: {number} of {}", plan.starts);
            start::measure(&upstream, report).await?;
        }
    }
    if wanted("compression") {
        for _ in 0..plan.rounds {
            compression::measure(report)?;
        }
    }
    Ok(())
}

/// Measures the whole path.
async fn path(
    plan: &Plan,
    wanted: &impl Fn(&str) -> bool,
    upstream: &Upstream,
    report: &mut Report,
) -> anyhow::Result<()> {
    let stage = Stage::start(upstream);
    let (direct, tunnel) = (&stage.ways.direct, &stage.ways.tunnel);
    // The first requests start processes; that is measured by itself.
    for way in [direct, tunnel] {
        delays(way, 200).await?;
    }
    let mut fresh = Some(usage::memory(&stage.local, &stage.agent));
    for round in 1..=plan.rounds {
        eprintln!("path: round {round} of {}", plan.rounds);
        if wanted("latency") {
            let mut by_way = (delays(direct, plan.requests).await?, delays(tunnel, plan.requests).await?);
            report.note_delays(
                "latency: 13 B, one after the other",
                &mut by_way.0,
                &mut by_way.1,
                [Some(2.5), Some(5.0), None],
            );
            paced(&stage, plan, report).await?;
        }
        if wanted("load") {
            load(&stage, plan, report).await?;
        }
        if wanted("events") {
            let mut by_way = (event_delays(direct).await?, event_delays(tunnel).await?);
            let name = format!("events: delay of {} events, 10 ms apart", upstream::EVENTS);
            report.note_delays(&name, &mut by_way.0, &mut by_way.1, [None, Some(10.0), None]);
        }
        if wanted("first-byte") {
            let mut by_way =
                (first_bytes(direct, plan.first_bytes).await?, first_bytes(tunnel, plan.first_bytes).await?);
            let goals = [Some(10.0), None, None];
            report.note_delays("first-byte: of a trickling body", &mut by_way.0, &mut by_way.1, goals);
        }
        if wanted("download") {
            for &(bytes, times) in plan.downloads {
                let rates = (download(direct, bytes, times).await?, download(tunnel, bytes, times).await?);
                let goal = (bytes == 10 * MIB).then_some(Goal::AtLeast(40.0));
                let name = format!("download: {} MiB", bytes / MIB);
                report.note(name, Unit::Throughput, goal, Some(rates.0), rates.1);
            }
        }
        if wanted("upload") {
            for &(bytes, times) in plan.uploads {
                let name = format!("upload: {:.3} MB", bytes as f64 / 1e6);
                let direct_rate = upload(direct, bytes, times).await?;
                if bytes > limits::REQUEST_BODY_BYTES {
                    let status = upload_status(tunnel, bytes).await?;
                    let name = format!("{name}, above the ceiling");
                    report.note(name, Unit::Status, None, None, f64::from(status.as_u16()));
                } else {
                    let goal = (bytes > MIB).then_some(Goal::AtLeast(25.0));
                    let rate = upload(tunnel, bytes, times).await?;
                    report.note(name, Unit::Throughput, goal, Some(direct_rate), rate);
                }
            }
        }
        if let (true, Some(fresh)) = (wanted("memory"), fresh.take()) {
            for (name, megabytes) in fresh {
                let goal = match name.as_str() {
                    "local" => None,
                    "agentd" => Some(Goal::AtMost(10.0)),
                    _ => Some(Goal::AtMost(25.0)),
                };
                let name = format!("memory: {name}, idle after 200 requests");
                report.note(name, Unit::Memory, goal, None, megabytes);
            }
        }
    }
    if wanted("memory") {
        for (name, megabytes) in usage::memory(&stage.local, &stage.agent) {
            report.note(format!("memory: {name}, idle at the end"), Unit::Memory, None, None, megabytes);
        }
    }
    Ok(())
}

/// What a load came to.
#[derive(Debug, Default)]
struct Loaded {
    answered: Cell<u64>,
    errors: Cell<u64>,
}

/// Has `clients` send one request after the other for as long as `time`; every answer must be its own.
async fn flood(way: &Target, clients: usize, time: Duration) -> (f64, u64) {
    let loaded = Rc::new(Loaded::default());
    let begun = Instant::now();
    let set = LocalSet::new();
    for client in 0..clients {
        let (way, loaded) = (way.clone(), Rc::clone(&loaded));
        set.spawn_local(async move {
            let mut connected = None;
            let mut number = 0_u64;
            while begun.elapsed() < time {
                number += 1;
                let own = Bytes::from(format!("client {client}, request {number}"));
                match ask(&way, &mut connected, &own).await {
                    Ok(()) => loaded.answered.set(loaded.answered.get() + 1),
                    Err(error) => {
                        loaded.errors.set(loaded.errors.get() + 1);
                        eprintln!("error: {error:#}");
                        connected = None;
                    }
                }
            }
        });
    }
    set.await;
    (loaded.answered.get() as f64 / begun.elapsed().as_secs_f64(), loaded.errors.get())
}

async fn ask(way: &Target, connected: &mut Option<Client>, own: &Bytes) -> anyhow::Result<()> {
    let client = match connected {
        Some(client) => client,
        None => connected.insert(Client::connect(way).await?),
    };
    let answer = client.call("/echo", Some(own.clone())).await?;
    anyhow::ensure!(answer == own, "somebody else's answer");
    Ok(())
}

async fn load(stage: &Stage, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (direct, tunnel) = (&stage.ways.direct, &stage.ways.tunnel);
    // Processes for that many clients are there before it counts.
    flood(tunnel, 32, plan.load / 3).await;
    let direct_rate = flood(direct, 32, plan.load / 3).await.0;
    let before = Cpu::now(&stage.local, &stage.agent);
    let (rate, mut errors) = flood(tunnel, 32, plan.load).await;
    let used = Cpu::now(&stage.local, &stage.agent).since(&before);
    report.note("load: 32 clients", Unit::PerSecond, Some(Goal::AtLeast(1000.0)), Some(direct_rate), rate);
    let answered = rate * plan.load.as_secs_f64();
    let mut total = 0.0;
    for (name, time) in used {
        let micros = time.as_secs_f64() * 1e6 / answered;
        total += micros;
        if micros >= 1.0 {
            report.note(format!("load: CPU for a request, {name}"), Unit::Micros, None, None, micros);
        }
    }
    report.note("load: CPU for a request, all of it", Unit::Micros, None, None, total);
    for &clients in plan.steps {
        let time = plan.load / 2;
        flood(tunnel, clients, time / 3).await;
        let direct_rate = flood(direct, clients, time / 3).await.0;
        let (rate, failed) = flood(tunnel, clients, time).await;
        errors += failed;
        report.note(format!("load: {clients} clients"), Unit::PerSecond, None, Some(direct_rate), rate);
    }
    report.note_errors("load: errors and wrong answers", errors);
    Ok(())
}

/// At a constant rate, far below saturation, from one client and from 32.
async fn paced(stage: &Stage, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (direct, tunnel) = (&stage.ways.direct, &stage.ways.tunnel);
    let mut errors = 0;
    for (clients, rate) in [(1, 100), (32, 400)] {
        // Processes for that many clients are there before it counts.
        errors += flood(tunnel, clients, plan.load / 3).await.1;
        let pace = Pace { clients, rate, time: plan.paced };
        let (mut direct, mut tunnel) = pace::both(direct, tunnel, pace).await?;
        errors += direct.errors + tunnel.errors;
        let name = format!("latency: 13 B, {rate} a second over {clients} connection(s)");
        let goals = if clients == 1 { [Some(2.5), Some(5.0), None] } else { [None; 3] };
        report.note_delays(&name, &mut direct.delays, &mut tunnel.delays, goals);
    }
    report.note_errors("latency: errors and wrong answers", errors);
    Ok(())
}

/// How long the first byte of the body took, in milliseconds.
async fn first_bytes(way: &Target, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut client = Client::connect(way).await?;
    let mut delays = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        let mut body = client.begin("/trickle", None).await?.into_body();
        body.frame().await.context("no body")??;
        delays.push(millis(begun.elapsed()));
        body.collect().await?;
    }
    Ok(delays)
}

/// 10^6 bytes in a second; every byte is checked.
async fn download(way: &Target, bytes: usize, times: usize) -> anyhow::Result<f64> {
    let pattern = upstream::pattern();
    let mut client = Client::connect(way).await?;
    let path = format!("/body/{bytes}");
    let begun = Instant::now();
    for _ in 0..times {
        let mut body = client.begin(&path, None).await?.into_body();
        let mut got = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            let mut data = &frame.data_ref().context("no data")?[..];
            while !data.is_empty() {
                let at = got % pattern.len();
                let (now, later) = data.split_at(data.len().min(pattern.len() - at));
                anyhow::ensure!(pattern[at..at + now.len()] == *now, "a wrong byte after {got}");
                got += now.len();
                data = later;
            }
        }
        anyhow::ensure!(got == bytes, "{got} bytes of {bytes} came");
    }
    Ok((bytes * times) as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

/// 10^6 bytes in a second.
async fn upload(way: &Target, bytes: usize, times: usize) -> anyhow::Result<f64> {
    let body = Bytes::from(tests::noise(2, bytes));
    let mut client = Client::connect(way).await?;
    let begun = Instant::now();
    for _ in 0..times {
        let answer = client.call("/sink", Some(body.clone())).await?;
        anyhow::ensure!(answer == bytes.to_string(), "{answer:?} bytes of {bytes} came");
    }
    Ok((bytes * times) as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

/// What is answered to a body of that size, which may be before all of it is sent.
async fn upload_status(way: &Target, bytes: usize) -> anyhow::Result<StatusCode> {
    let body = Bytes::from(tests::noise(2, bytes));
    let mut client = Client::connect(way).await?;
    Ok(client.answer("/sink", Some(body)).await?.status())
}
