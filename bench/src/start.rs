//! Cold starts: enters a fresh `local`, in which everything happens for the first time; leaves how long each
//! function's process took until it asked for its first event and until it had answered it, and what a
//! process weighs.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use edge::config::env;
use serde_json::json;
use tests::{Local, process::binary};
use tokio::{io::AsyncReadExt, net::TcpListener};

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

/// How often a process is started to find out what its start consists of.
const STARTS: usize = 20;

/// How many agents ask to be let in, one after the other.
const DECISIONS: usize = 1000;

/// Starts each function once.
pub(crate) async fn measure(upstream: &Upstream, report: &mut Report) -> anyhow::Result<()> {
    contributors(report).await?;
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
    decisions(&local, report).await?;
    // What is not built here is not shown: `local` has the functions in itself.
    for name in ["agentd", "local"].iter().chain(&FUNCTIONS) {
        if let Ok(file) = std::fs::metadata(binary("local").with_file_name(name)) {
            let megabytes = file.len() as f64 / 1e6;
            report.note(format!("start: size of the program {name}"), Unit::Memory, None, None, megabytes);
        }
    }
    Ok(())
}

/// How long `authorizer` takes to let an agent in, from the event to the answer and with `local` in between.
async fn decisions(local: &Local, report: &mut Report) -> anyhow::Result<()> {
    let authorization = format!("Bearer {}", local.as_ref().token());
    let event = json!({
        "type": "REQUEST",
        "methodArn": "arn:aws:execute-api:local-1:000000000000:local/dev/$connect",
        "headers": {"Authorization": authorization},
        "multiValueHeaders": {"Authorization": [authorization]},
        "requestContext": {"connectionId": "L0SM9cOFvHcCIhw=", "eventType": "CONNECT", "routeKey": "$connect"},
    });
    let mut taken = Vec::with_capacity(DECISIONS);
    for _ in 0..DECISIONS {
        let begun = Instant::now();
        let answer = local.invoke("authorizer", &event).await;
        taken.push(begun.elapsed().as_secs_f64() * 1e3);
        ensure!(answer.text().contains(r#""Effect":"Allow""#), "authorizer: {}", answer.text());
    }
    for (name, rank, goal) in [("p50", 0.5, None), ("p99", 0.99, Some(Goal::AtMost(2.0)))] {
        let name = format!("start: authorizer, letting an agent in, {name}");
        report.note(name, Unit::Millis, goal, None, quantile(&mut taken, rank));
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

/// What a start consists of, by what it takes without: the kernel and the loader are what the same program
/// takes to do nothing, its own work is what `response` takes beyond that until it asks for its first event,
/// and the roots of trust are what that takes longer where AWS is spoken to over TLS.
async fn contributors(report: &mut Report) -> anyhow::Result<()> {
    let mut taken: [Vec<f64>; 3] = Default::default();
    for _ in 0..STARTS {
        let begun = Instant::now();
        let status = Command::new(binary("local")).arg("--version").stdout(Stdio::null()).status()?;
        taken[0].push(begun.elapsed().as_secs_f64() * 1e3);
        ensure!(status.success(), "local --version: {status}");
        taken[1].push(until_first_poll(Some("http://127.0.0.1:1")).await?);
        taken[2].push(until_first_poll(None).await?);
    }
    let [nothing, plain, tls] = taken.map(|mut taken| quantile(&mut taken, 0.5));
    let mut note = |what: &str, value| {
        report.note(format!("start: of a start alone, {what}"), Unit::Millis, None, None, value);
    };
    note("kernel and loader (`local --version`)", nothing);
    note("the function itself (`response`, without TLS)", plain - nothing);
    note("reading the roots of trust, with TLS", tls - plain);
    Ok(())
}

/// Starts `response` and takes the place of the Runtime API: the milliseconds until it asks for an event.
async fn until_first_poll(endpoint: Option<&str>) -> anyhow::Result<f64> {
    let runtime_api = TcpListener::bind("127.0.0.1:0").await?;
    let mut command = tokio::process::Command::new(binary("local"));
    command
        .args(["function", "response"])
        .env_clear()
        .env("AWS_LAMBDA_RUNTIME_API", runtime_api.local_addr()?.to_string())
        .env("AWS_LAMBDA_FUNCTION_NAME", "response")
        .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "512")
        .env("AWS_LAMBDA_FUNCTION_VERSION", "1")
        .env("AWS_LAMBDA_LOG_GROUP_NAME", "response")
        .env("AWS_LAMBDA_LOG_STREAM_NAME", "response")
        .env("AWS_REGION", "local-1")
        .envs(endpoint.map(|endpoint| ("AWS_ENDPOINT_URL", endpoint)))
        .env(env::METRICS_NAMESPACE, "bench")
        .env(env::TOKEN_KEYS, "0".repeat(64))
        .env(env::AGENT_ENDPOINT, "https://127.0.0.1:1/dev")
        .env(env::MAILBOX_URL_PREFIX, "https://127.0.0.1:1/mailbox-")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let begun = Instant::now();
    let mut child = command.spawn()?;
    let mut poll = tokio::select! {
        accepted = runtime_api.accept() => accepted?.0,
        status = child.wait() => bail!("`response` did not ask for an event: {}", status?),
    };
    poll.read_exact(&mut [0; 4]).await.context("`response` did not ask for an event")?;
    let taken = begun.elapsed().as_secs_f64() * 1e3;
    child.kill().await?;
    Ok(taken)
}
