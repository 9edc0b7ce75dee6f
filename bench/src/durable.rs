//! What durable delivery costs: how long it takes to be told that a webhook is kept, how fast those that wait are delivered,
//! what each takes while it waits, and whether live requests feel it.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};
use tests::{
    Agent, Local,
    client::{Connection, Request},
    upstream::{Conn, Upstream},
};

use crate::figures::quantile;

/// How long a sender waits for its 202, median, in milliseconds: on one machine, and with the delays of AWS.
const ACCEPTED_MS: f64 = 6.0;
const ACCEPTED_AWS_MS: f64 = 60.0;

/// How many are delivered in a second, at least.
const DRAINED: f64 = 200.0;

/// How many times its p95 before a live request's p95 may be while a flood is delivered.
const SLOWER: f64 = 2.0;

/// How long a webhook's body is.
const BODY_BYTES: usize = 1024;

/// How many connections send what is to wait.
const SENDERS: usize = 16;

/// How many live requests are made before the flood; with the delays of AWS each takes a tenth of a second.
const SAMPLES: usize = 2000;
const SAMPLES_AWS: usize = 400;

/// How long everything may take to be delivered.
const PATIENCE: Duration = Duration::from_secs(600);

const TUNNEL: &str = "hooks";

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many webhooks are sent one after the other
    #[arg(long, default_value_t = 300)]
    webhooks: usize,
    /// How many wait when their agent comes back
    #[arg(long, default_value_t = 10_000)]
    flood: usize,
    /// How many of them may be under way at a time. Default: what a tunnel has that says nothing
    #[arg(long, value_name = "N", default_value_t = proto::delivery::DeliveryPolicy::new(proto::delivery::Mode::Auto).max_concurrent)]
    at_a_time: u32,
    /// Write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A row of the table, and whether its bound is kept.
struct Row {
    what: String,
    value: f64,
    bound: Option<(f64, bool)>,
    unit: &'static str,
}

impl Row {
    fn is_kept(&self) -> bool {
        match self.bound {
            None => true,
            Some((most, true)) => self.value <= most,
            Some((least, false)) => self.value >= least,
        }
    }
}

/// Measures everything, prints a table, and says whether each bound is kept.
pub(crate) async fn run(options: &Options) -> anyhow::Result<bool> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures mean nothing");
    }
    let mut rows = Vec::new();
    for (name, flags, most) in
        [("local", &[][..], ACCEPTED_MS), ("local --latency aws", &["--latency", "aws"], ACCEPTED_AWS_MS)]
    {
        eprintln!("durable: accepting, {name}");
        let (added, p95) = accepting(flags, options.webhooks).await?;
        rows.push(Row {
            what: format!("POST to 202, added p50, {name}"),
            value: added,
            bound: Some((most, true)),
            unit: "ms",
        });
        rows.push(Row {
            what: format!("POST to 202, added p95, {name}"),
            value: p95,
            bound: None,
            unit: "ms",
        });
    }
    for (name, flags, samples) in
        [("local", &[][..], SAMPLES), ("local --latency aws", &["--latency", "aws"], SAMPLES_AWS)]
    {
        flooding(name, flags, samples, options, &mut rows).await?;
    }
    println!("| durable delivery | | bound | |\n|---|---:|---:|---|");
    for row in &rows {
        let (bound, verdict) = match row.bound {
            None => (String::new(), ""),
            Some((bound, is_most)) => {
                let sign = if is_most { "≤" } else { "≥" };
                (format!("{sign} {bound}"), if row.is_kept() { "kept" } else { "NOT KEPT" })
            }
        };
        println!("| {} | {:.2} {} | {bound} | {verdict} |", row.what, row.value, row.unit);
    }
    if let Some(path) = &options.json {
        let figures: serde_json::Map<_, _> =
            rows.iter().map(|row| (row.what.clone(), Value::from(row.value))).collect();
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(rows.iter().all(Row::is_kept))
}

fn tunnels(upstream: &Upstream, mode: &str, at_a_time: u32) -> String {
    format!(
        "[[tunnel]]\nname = \"{TUNNEL}\"\nupstream = \"{}\"\ndelivery = \"{mode}\"\nmax_concurrent = 256\n\
         durable = {{ max_concurrent = {at_a_time} }}\n",
        upstream.address()
    )
}

/// A service that counts what it was delivered.
async fn service() -> (Upstream, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let counted = Arc::clone(&counted);
        async move {
            if !request.all("x-tunnel-delivery-id").is_empty() {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            conn.answer("200 OK", "", b"ok").await.then_some(conn)
        }
    })
    .await;
    (upstream, count)
}

fn webhook(number: usize) -> Request {
    Request::to(TUNNEL, "POST", &format!("/hook/{number}"))
        .field("content-type", "application/json")
        .body(tests::noise(number as u64, BODY_BYTES))
}

/// What it takes to be told that a webhook is kept, beyond what the service itself takes to answer it: p50 and p95.
async fn accepting(flags: &[&str], webhooks: usize) -> anyhow::Result<(f64, f64)> {
    let local = Local::start(flags);
    let (upstream, _) = service().await;
    let _agent = local.agent_with(&tunnels(&upstream, "durable", 1), &[TUNNEL]);
    let mut direct = Connection::open(upstream.address().parse()?).await;
    let mut through = Connection::open(local.public).await;
    let (mut own, mut kept) = (Vec::new(), Vec::new());
    for number in 0..webhooks + 20 {
        let request = webhook(number);
        let begun = Instant::now();
        ensure!(direct.exchange(&request).await.status == 200, "the service failed");
        let service = begun.elapsed();
        let begun = Instant::now();
        let answer = through.exchange(&request).await;
        let took = begun.elapsed();
        ensure!(answer.status == 202, "not kept: {} {}", answer.status, answer.text());
        // The first ones start processes.
        if number >= 20 {
            own.push(service.as_secs_f64() * 1e3);
            kept.push(took.as_secs_f64() * 1e3);
        }
    }
    Ok((
        quantile(&mut kept.clone(), 0.5) - quantile(&mut own.clone(), 0.5),
        quantile(&mut kept, 0.95) - quantile(&mut own, 0.95),
    ))
}

async fn live_p95(local: &Local, mut goes_on: impl FnMut(usize) -> bool) -> anyhow::Result<f64> {
    let mut connection = Connection::open(local.public).await;
    let mut delays = Vec::new();
    while goes_on(delays.len()) {
        let begun = Instant::now();
        let answer = connection.exchange(&Request::to(TUNNEL, "GET", "/live")).await;
        ensure!(answer.status == 200, "a live request failed: {}", answer.status);
        delays.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(quantile(&mut delays, 0.95))
}

/// Lets many wait, then has their agent come back while live requests are made.
///
/// Without delays the senders, the edge, the agent and the service have all of the machine's processors busy, and what is
/// measured of live requests is how these are shared; with those of AWS it is what the agent and its link make of it, so
/// there is a bound for that.
async fn flooding(
    name: &str,
    flags: &[&str],
    samples: usize,
    options: &Options,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let flood = options.flood;
    let local = Local::start(flags);
    let (upstream, count) = service().await;
    let config = tunnels(&upstream, "auto", options.at_a_time);
    let mut agent = local.agent_with(&config, &[TUNNEL]);
    // Warm, and measured as often as it will be.
    live_p95(&local, |asked| asked < samples / 10).await?;
    let before = live_p95(&local, |asked| asked < samples).await?;
    stop(&mut agent);
    let resident = || tests::resident_bytes(local.process().id()).unwrap_or_default() as f64;
    let empty = resident();
    eprintln!("durable: {flood} come while nobody is there, {name}");
    let begun = Instant::now();
    let senders = (0..SENDERS).map(|sender| {
        let local = &local;
        async move {
            let mut connection = Connection::open(local.public).await;
            for number in (sender..flood).step_by(SENDERS) {
                let answer = connection.exchange(&webhook(number)).await;
                ensure!(answer.status == 202, "not kept: {} {}", answer.status, answer.text());
            }
            Ok(())
        }
    });
    futures_util::future::try_join_all(senders).await?;
    let accepted = flood as f64 / begun.elapsed().as_secs_f64();
    let stored = stored_bytes(&local).await as f64 / flood as f64;
    let memory = (resident() - empty) / flood as f64;
    eprintln!("durable: they are delivered");
    let begun = Instant::now();
    let _agent = local.agent_with(&config, &[TUNNEL]);
    let done = |_: usize| count.load(Ordering::Relaxed) < flood && begun.elapsed() < PATIENCE;
    let during = live_p95(&local, done).await?;
    let delivered = count.load(Ordering::Relaxed);
    let drained = delivered as f64 / begun.elapsed().as_secs_f64();
    ensure!(delivered >= flood, "{delivered} of {flood} were delivered within {PATIENCE:?}");
    let row = |what: &str, value, bound, unit| Row { what: format!("{what}, {name}"), value, bound, unit };
    rows.push(row("accepted in a second, 16 senders", accepted, None, "1/s"));
    let drained_at_least = flags.is_empty().then_some((DRAINED, false));
    rows.push(row("delivered in a second, of a flood", drained, drained_at_least, "1/s"));
    if flags.is_empty() {
        rows.push(row("kept for each that waits, 1 KiB of body, in the table", stored, None, "bytes"));
        rows.push(row("the same in the memory of the program", memory, None, "bytes"));
    }
    rows.push(row("a live request's p95 before", before, None, "ms"));
    rows.push(row("a live request's p95 during the flood", during, None, "ms"));
    let slower_at_most = (!flags.is_empty()).then_some((SLOWER, true));
    rows.push(row("during / before", during / before, slower_at_most, "x"));
    Ok(())
}

fn stop(agent: &mut Agent) {
    agent.process().signal(rustix::process::Signal::TERM);
    agent.process_mut().wait();
}

/// What DynamoDB would bill as stored: names and values of every item, and 100 bytes each.
async fn stored_bytes(local: &Local) -> u64 {
    let mut bytes = 0;
    let mut from = Value::Null;
    loop {
        let mut scan = json!({ "TableName": "deliveries" });
        if !from.is_null() {
            scan["ExclusiveStartKey"] = from;
        }
        let page = local.dynamodb("Scan", scan).await;
        for item in page["Items"].as_array().into_iter().flatten().filter_map(Value::as_object) {
            bytes += 100;
            for (name, value) in item {
                let size =
                    value.as_object().and_then(|value| value.iter().next()).map_or(0, |(kind, value)| {
                        let text = value.as_str().unwrap_or_default().len();
                        if kind == "B" { text / 4 * 3 } else { text }
                    });
                bytes += (name.len() + size) as u64;
            }
        }
        from = page["LastEvaluatedKey"].clone();
        if from.is_null() {
            return bytes;
        }
    }
}
