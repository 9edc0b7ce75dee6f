//! `agentd` alone, between a bare edge and the upstream: what is ours alone, without any hop of AWS.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::{
    client::Target,
    delays,
    edge::{Ask, BareEdge, Line, TUNNEL, Until},
    figures::{Goal, Report, Unit},
    upstream::{self, Upstream},
    usage,
};

pub(crate) const MIB: usize = 1 << 20;

/// A small request and its answer.
pub(crate) const SMALL: Ask<'_> = Ask { target: "/hello", upload: 0, expected: Some(upstream::HELLO.len()) };

/// A response of 1 MiB.
pub(crate) const DOWNLOAD: Ask<'_> = Ask { target: "/body/1048576", upload: 0, expected: Some(MIB) };

/// A request of 1 MiB.
pub(crate) const UPLOAD: Ask<'_> = Ask { target: "/sink", upload: MIB, expected: None };

/// How many requests are under way when the agent is to be kept busy.
const BUSY: usize = 64;

/// How many bodies are under way at the same time.
const BODIES: usize = 8;

/// How many responses are open at the same time.
const STREAMS: usize = 1000;

/// How many pieces each of them sends before it counts as one that flows.
const STREAM_PIECES: u32 = 3;

/// How much is measured.
#[derive(Debug)]
pub(crate) struct Plan {
    /// How long a load lasts.
    pub(crate) load: Duration,
    /// How many requests are sent one after the other.
    pub(crate) requests: usize,
}

/// A running `agentd`. Killed when dropped.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    child: Child,
    folder: TempDir,
}

impl AgentProcess {
    /// Starts `program`, under `wrapper` if that is not empty, for one tunnel to `upstream`, inspected or not.
    pub(crate) fn start(
        program: &Path,
        wrapper: &[String],
        edge: &str,
        upstream: &str,
        is_inspected: bool,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let token = folder.path().join("token");
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&token)?;
        file.write_all(b"a-token-that-nobody-checks")?;
        let config = folder.path().join("agentd.toml");
        let text = format!(
            "inspect_address = \"127.0.0.1:0\"\n[edge]\nurl = \"{edge}\"\ntoken_file = \"{}\"\n\n[[tunnel]]\nname = \"{TUNNEL}\"\n\
             upstream = \"{upstream}\"\nmax_concurrent = 2000\ninspect = {is_inspected}\n",
            token.display()
        );
        std::fs::write(&config, text)?;
        let mut command = match wrapper {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        let child = command
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("log"))?)
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Self { child, folder })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Takes its connection, or says what it printed instead.
    pub(crate) async fn connect(&self, edge: &BareEdge) -> anyhow::Result<Line> {
        edge.accept().await.with_context(|| {
            let mut printed = String::new();
            let log = File::open(self.folder.path().join("log"));
            let _ = log.and_then(|mut log| log.read_to_string(&mut printed));
            format!("agentd does not connect; it printed:\n{printed}")
        })
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A fresh agent with its connection, so that nothing is left of what was measured before.
pub(crate) struct Stage {
    pub(crate) line: Line,
    pub(crate) process: AgentProcess,
}

impl Stage {
    pub(crate) async fn start(
        program: &Path,
        wrapper: &[String],
        upstream: &Upstream,
    ) -> anyhow::Result<Self> {
        Self::of(program, wrapper, upstream, false).await
    }

    /// One whose tunnel is inspected.
    pub(crate) async fn inspected(
        program: &Path,
        wrapper: &[String],
        upstream: &Upstream,
    ) -> anyhow::Result<Self> {
        Self::of(program, wrapper, upstream, true).await
    }

    async fn of(
        program: &Path,
        wrapper: &[String],
        upstream: &Upstream,
        is_inspected: bool,
    ) -> anyhow::Result<Self> {
        let edge = BareEdge::bind().await?;
        let address = format!("127.0.0.1:{}", upstream.port);
        let process = AgentProcess::start(program, wrapper, &edge.url, &address, is_inspected)?;
        let line = process.connect(&edge).await?;
        Ok(Self { line, process })
    }

    /// CPU time used by the agent so far, in seconds.
    fn cpu(&self) -> f64 {
        usage::cpu_time(self.process.id()).unwrap_or_default().as_secs_f64()
    }

    /// 10^6 bytes that the agent has resident.
    pub(crate) fn memory(&self) -> f64 {
        tests::resident_bytes(self.process.id()).unwrap_or_default() as f64 / 1e6
    }

    fn peak_memory(&self) -> f64 {
        tests::peak_resident_bytes(self.process.id()).unwrap_or_default() as f64 / 1e6
    }
}

/// Measures one round.
pub(crate) async fn measure(
    program: &Path,
    upstream: &Upstream,
    plan: &Plan,
    report: &mut Report,
) -> anyhow::Result<()> {
    let direct = &upstream.direct();
    let start = || Stage::start(program, &[], upstream);
    small(start().await?, direct, plan, report).await?;
    bodies(start().await?, DOWNLOAD, "response", plan, report).await?;
    bodies(start().await?, UPLOAD, "request", plan, report).await?;
    events(start().await?, direct, report).await?;
    streams(start().await?, report).await
}

async fn small(mut stage: Stage, direct: &Target, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    report.note("agent: memory, connected", Unit::Memory, Some(Goal::AtMost(8.0)), None, stage.memory());
    let answer = stage.line.whole(SMALL.target).await?;
    ensure!(answer == upstream::HELLO.as_bytes(), "a wrong answer");
    stage.line.load(&SMALL, 1, Until::Answers(plan.requests / 4)).await?;
    let before = stage.cpu();
    let mut alone = stage.line.load(&SMALL, 1, Until::Answers(plan.requests)).await?;
    let micros = (stage.cpu() - before) * 1e6 / alone.answers as f64;
    let mut direct = delays::delays(direct, plan.requests).await?;
    let name = "agent: 13 B, one at a time";
    report.note_delays(name, &mut direct, &mut alone.delays, [None; 3]);
    report.note("agent: CPU a request, one at a time", Unit::Micros, None, None, micros);

    stage.line.load(&SMALL, BUSY, Until::Time(plan.load / 4)).await?;
    let before = stage.cpu();
    let busy = stage.line.load(&SMALL, BUSY, Until::Time(plan.load)).await?;
    let micros = (stage.cpu() - before) * 1e6 / busy.answers as f64;
    let rate = busy.answers as f64 / busy.time.as_secs_f64();
    report.note(
        format!("agent: 13 B, {BUSY} at a time on one connection"),
        Unit::PerSecond,
        Some(Goal::AtLeast(8000.0)),
        None,
        rate,
    );
    let goal = Some(Goal::AtMost(60.0));
    report.note(format!("agent: CPU a request, {BUSY} at a time"), Unit::Micros, goal, None, micros);
    report.note("agent: peak memory after that", Unit::Memory, None, None, stage.peak_memory());
    Ok(())
}

async fn bodies(
    mut stage: Stage,
    ask: Ask<'_>,
    what: &str,
    plan: &Plan,
    report: &mut Report,
) -> anyhow::Result<()> {
    if ask.upload == 0 {
        // Every byte is looked at once; from then on lengths are enough.
        let body = stage.line.whole(ask.target).await?;
        ensure!(body == upstream::pattern()[..MIB], "a wrong body");
    }
    stage.line.load(&ask, BODIES, Until::Time(plan.load / 4)).await?;
    let before = stage.cpu();
    let load = stage.line.load(&ask, BODIES, Until::Time(plan.load)).await?;
    let bytes = load.bytes as f64;
    let name = format!("agent: {what} bodies of 1 MiB, {BODIES} at a time");
    let goal = (ask.upload == 0).then_some(Goal::AtLeast(143.0));
    report.note(name, Unit::Throughput, goal, None, bytes / 1e6 / load.time.as_secs_f64());
    let name = format!("agent: CPU for a GB of {what} bodies");
    report.note(name, Unit::Millis, None, None, (stage.cpu() - before) * 1e3 / (bytes / 1e9));
    let goal = (ask.upload == 0).then_some(Goal::AtMost(30.0));
    let name = format!("agent: peak memory under {what} bodies");
    report.note(name, Unit::Memory, goal, None, stage.peak_memory());
    Ok(())
}

async fn events(mut stage: Stage, direct: &Target, report: &mut Report) -> anyhow::Result<()> {
    let mut direct = delays::event_delays(direct).await?;
    let mut events = upstream::Events::default();
    stage.line.each_piece("/events", |piece| events.take(piece)).await?;
    let name = format!("agent: delay of {} events, 10 ms apart", upstream::EVENTS);
    report.note_delays(&name, &mut direct, &mut events.finish(upstream::EVENTS)?, [None, None, Some(6.0)]);
    Ok(())
}

async fn streams(mut stage: Stage, report: &mut Report) -> anyhow::Result<()> {
    stage.line.load(&SMALL, 1, Until::Answers(100)).await?;
    let before = stage.memory();
    let begun = Instant::now();
    let held = stage.line.hold("/hold", STREAMS, STREAM_PIECES).await?;
    let time = begun.elapsed();
    let open = stage.memory();
    stage.line.release(held).await?;
    // Whoever served a thousand is to serve one more.
    stage.line.load(&SMALL, 1, Until::Answers(10)).await?;
    let goal = Some(Goal::AtLeast(STREAMS as f64));
    report.note("agent: streams open at once, all flowing", Unit::Count, goal, None, STREAMS as f64);
    report.note(
        format!("agent: time until {STREAMS} streams have sent {STREAM_PIECES} events, 1 s apart"),
        Unit::Millis,
        None,
        None,
        time.as_secs_f64() * 1e3,
    );
    report.note(format!("agent: memory with {STREAMS} streams"), Unit::Memory, None, None, open);
    let name = "agent: memory for an open stream";
    report.note(name, Unit::Kilobytes, None, None, (open - before) * 1e3 / STREAMS as f64);
    report.note("agent: memory after them", Unit::Memory, None, None, stage.memory());
    Ok(())
}
