//! How cost grows: agents on one `local`, and requests in flight.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use tests::{Agent, Local};
use tokio::task::LocalSet;

use crate::{
    client::{Client, Target},
    figures::{Report, Unit, quantile},
    upstream::{HELLO, Upstream},
    usage,
};

/// How many requests are sent one after the other at each step, to one agent after the other.
const REQUESTS: usize = 200;

/// How long the upstream takes where requests are to be in flight together.
const HELD_MS: u64 = 2000;

/// What many agents are asked at the same time: so many agents, so many requests each.
const TOGETHER: (usize, usize) = (100, 10);

/// The steps.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) agents: &'static [usize],
    pub(crate) in_flight: &'static [usize],
}

/// Measures every step once.
pub(crate) async fn measure(upstream: &Upstream, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let local = Local::start(&[]);
    let mut agents: Vec<Agent> = Vec::new();
    // The first step, and the memory of `local` then.
    let mut least: Option<(usize, f64)> = None;
    for &step in plan.agents {
        while agents.len() < step {
            let name = format!("a{}", agents.len());
            let tunnel = format!(
                "[[tunnel]]\nname = \"{name}\"\nupstream = \"127.0.0.1:{}\"\nmax_concurrent = 1000\n",
                upstream.port
            );
            agents.push(local.agent_with(&tunnel, &[&name]));
        }
        eprintln!("scale: {step} agents");
        // What is new is new only once.
        for number in 0..step.min(REQUESTS) {
            ask(&target(&local, number), "/hello").await?;
        }
        let before = cpu(&local, &agents);
        let mut delays = Vec::with_capacity(REQUESTS);
        for number in 0..REQUESTS {
            let begun = Instant::now();
            ask(&target(&local, number % step), "/hello").await?;
            delays.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        let used = cpu(&local, &agents) - before;
        let name = format!("scale: {step} agent(s)");
        let mut note =
            |what: &str, unit, value| report.note(format!("{name}, {what}"), unit, None, None, value);
        note("a new connection and request, p50", Unit::Millis, quantile(&mut delays, 0.5));
        note("p95", Unit::Millis, quantile(&mut delays, 0.95));
        note("CPU of a request, all processes", Unit::Micros, used * 1e6 / REQUESTS as f64);
        let memory = resident(local.process().id());
        note("memory of local", Unit::Memory, memory);
        if let Some((fewer, less)) = least.filter(|least| least.0 < step) {
            let each = (memory - less) * 1e3 / (step - fewer) as f64;
            note("memory of local, for each further agent", Unit::Kilobytes, each);
        }
        least.get_or_insert((step, memory));
        let own: f64 = agents.iter().map(|agent| unshared(agent.process().id())).sum();
        note("memory of an agent that it does not share", Unit::Memory, own / step as f64);
    }
    for &step in plan.in_flight {
        eprintln!("scale: {step} in flight");
        let targets = vec![target(&local, 0); step];
        together(&local, &format!("scale: {step} in flight at one agent"), targets, report).await?;
    }
    let (many, each) = TOGETHER;
    if agents.len() >= many {
        eprintln!("scale: {each} in flight at each of {many} agents");
        let targets = (0..many * each).map(|number| target(&local, number % many)).collect();
        together(&local, &format!("scale: {each} in flight at each of {many} agents"), targets, report)
            .await?;
    }
    Ok(())
}

/// The CPU time of everything but the load generator and the upstream, in seconds.
fn cpu(local: &Local, agents: &[Agent]) -> f64 {
    let functions = local.function_processes().into_iter().map(|process| process.1);
    let agents = agents.iter().map(|agent| agent.process().id());
    usage::cpu_seconds(functions.chain(agents).chain([local.process().id()]))
}

fn target(local: &Local, agent: usize) -> Target {
    Target { address: local.public, host: format!("a{agent}.localhost") }
}

async fn ask(target: &Target, path: &str) -> anyhow::Result<()> {
    let answer = Client::connect(target).await?.call(path, None).await?;
    ensure!(answer == HELLO, "a wrong answer");
    Ok(())
}

/// Sends one request to each target at the same time.
async fn together(
    local: &Local,
    name: &str,
    targets: Vec<Target>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let count = targets.len();
    // The first time, processes start.
    for name in [format!("{name} for the first time"), name.to_owned()] {
        let set = LocalSet::new();
        let path: Rc<str> = format!("/wait/{HELD_MS}").into();
        let tasks: Vec<_> = targets
            .iter()
            .cloned()
            .map(|target| {
                let path = Rc::clone(&path);
                set.spawn_local(async move {
                    let begun = Instant::now();
                    ask(&target, &path).await.map(|()| begun.elapsed())
                })
            })
            .collect();
        set.await;
        let mut added = Vec::with_capacity(count);
        let mut errors = 0;
        for task in tasks {
            match task.await? {
                Ok(time) => {
                    added.push(time.saturating_sub(Duration::from_millis(HELD_MS)).as_secs_f64() * 1e3);
                }
                Err(error) => {
                    errors += 1;
                    eprintln!("error: {error:#}");
                }
            }
        }
        report.note_errors(format!("{name}, errors"), errors);
        let mut note =
            |what: &str, unit, value| report.note(format!("{name}, {what}"), unit, None, None, value);
        note("added p50", Unit::Millis, quantile(&mut added, 0.5));
        note("added p95", Unit::Millis, quantile(&mut added, 0.95));
    }
    let mut note = |what: &str, unit, value| report.note(format!("{name}, {what}"), unit, None, None, value);
    let functions = local.function_processes();
    note("function processes", Unit::Count, functions.len() as f64);
    let own: f64 = functions.iter().map(|process| unshared(process.1)).sum();
    note("their memory, not shared", Unit::Memory, own);
    note("memory of local", Unit::Memory, resident(local.process().id()));
    Ok(())
}

pub(crate) fn resident(pid: u32) -> f64 {
    tests::resident_bytes(pid).unwrap_or_default() as f64 / 1e6
}

/// The memory that a process shares with nobody, in 10^6 bytes.
pub(crate) fn unshared(pid: u32) -> f64 {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { return 0.0 };
    let kib: u64 = text
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    kib as f64 * 1024.0 / 1e6
}
