//! Cold starts: enters a fresh `local`, in which everything happens for the first time; leaves how long each
//! function's process took until it asked for its first event and until it had answered it, and what a
//! process weighs.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, ensure};
use serde_json::json;
use tests::{Local, process::binary};

use crate::{
    client::{Client, Target},
    figures::{Goal, Report, Unit, quantile},
    scale,
    upstream::{HELLO, Upstream},
};

/// Every function.
const FUNCTIONS: [&str; 7] =
    ["authorizer", "connect", "ingress", "response", "disconnect", "revoke", "sweep"];

/// The start of `ingress` that counts.
const INGRESS_STARTS: usize = 2;

/// How often a process that does nothing is started.
const EMPTY_STARTS: usize = 20;

/// Starts each function once.
pub(crate) async fn measure(upstream: &Upstream, report: &mut Report) -> anyhow::Result<()> {
    empty(report)?;
    let local = Local::start(&["--log-level", "debug"]);
    let agent = local.agent("bench", &format!("127.0.0.1:{}", upstream.port));
    let tunnel = Target { address: local.public, host: "bench.localhost".to_owned() };
    let mut client = Client::connect(&tunnel).await?;
    // The first `ingress` of all waits for its mailbox to be made, which is a deployment's time and no start's.
    for start in 1..=INGRESS_STARTS {
        let answer = client.call("/hello", None).await?;
        ensure!(answer == HELLO, "a wrong answer");
        if start < INGRESS_STARTS {
            let variables = local.variables("ingress").await;
            local.deploy("ingress", &variables).await;
        }
    }
    let closed = local.revoke(json!({"owner": "nobody"})).await;
    ensure!(closed == 0, "{closed} connections of nobody were closed");
    let swept = local.invoke("sweep", &json!({})).await;
    ensure!(swept.status == 200, "sweep: {}", swept.text());
    // With its agent ends a connection.
    drop(agent);
    let times: Vec<_> = FUNCTIONS.iter().map(|function| first(&local, function)).collect::<Result<_, _>>()?;
    let mut memory = BTreeMap::<String, (f64, f64)>::new();
    for (function, pid) in local.function_processes() {
        memory.insert(function, (scale::resident(pid), scale::unshared(pid)));
    }
    for (function, (ready, answered)) in FUNCTIONS.iter().zip(times) {
        let mut note = |what: &str, unit, goal, value| {
            report.note(format!("start: {function}, {what}"), unit, goal, None, value);
        };
        note("spawned to ready", Unit::Millis, Some(Goal::AtMost(25.0)), ready);
        note("its first event to its answer", Unit::Millis, None, answered);
        note("spawned to answered", Unit::Millis, None, ready + answered);
        let (resident, own) = memory.get(*function).with_context(|| format!("no process of {function}"))?;
        note("resident then", Unit::Memory, None, *resident);
        note("of it shared with nobody", Unit::Memory, None, *own);
    }
    // What is not built here is not shown: `local` has the functions in itself.
    for name in ["agentd", "local"].iter().chain(&FUNCTIONS) {
        if let Ok(file) = std::fs::metadata(binary("local").with_file_name(name)) {
            let megabytes = file.len() as f64 / 1e6;
            report.note(format!("start: size of the program {name}"), Unit::Memory, None, None, megabytes);
        }
    }
    Ok(())
}

/// How long a function's process took to be ready, and its first event to its answer, in milliseconds.
fn first(local: &Local, function: &str) -> anyhow::Result<(f64, f64)> {
    let name = format!("function=\"{function}\"");
    let starts = if function == "ingress" { INGRESS_STARTS } else { 1 };
    let value = |what: &str, field: &str| {
        let lines =
            local.process().wait_for_lines(starts, |line| line.contains(what) && line.contains(&name));
        let line = lines.last().context("no line")?;
        let micros = line.split(field).nth(1).and_then(|rest| rest.split_whitespace().next());
        let micros = micros.and_then(|micros| micros.parse::<f64>().ok()).context("no time in the line");
        micros.map(|micros| micros / 1e3)
    };
    Ok((value("process is ready", "init_us=")?, value("first event is answered", "answer_us=")?))
}

/// How long the same program takes to do nothing: what of a start is the kernel's and the loader's.
fn empty(report: &mut Report) -> anyhow::Result<()> {
    let program = binary("local");
    let mut taken = Vec::with_capacity(EMPTY_STARTS);
    for _ in 0..EMPTY_STARTS {
        let begun = Instant::now();
        let status = Command::new(&program).arg("--version").stdout(Stdio::null()).status()?;
        taken.push(begun.elapsed().as_secs_f64() * 1e3);
        ensure!(status.success(), "local --version: {status}");
    }
    let name = "start: `local --version`, spawned to ended";
    report.note(name, Unit::Millis, None, None, quantile(&mut taken, 0.5));
    Ok(())
}
