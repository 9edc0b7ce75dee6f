//! This design and the two it replaces under the latencies of AWS: how much each adds to a request, and how
//! many calls it pays for.
//!
//! The replaced ones exist here only, as what they would call and wait for, around a real agent and the real
//! upstream. Their own work costs nothing, so they look better than they would be.

use std::{
    cell::Cell,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use local::latency::{Hop, Latency, Profile};
use tests::Local;

use crate::{
    agent,
    client::{Client, Target},
    edge::{Ask, Line, Until},
    figures::{Report, Unit},
    measure,
    upstream::{self, Upstream},
};

/// How often whoever waits looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long the upstream takes: a name and milliseconds, from and below. Spread over one interval of polling, no
/// design is lucky with when it looks.
const ASKED: [(&str, u64, u64); 2] = [("at once", 0, 1), ("after 250 to 349 ms", 250, 350)];

/// What of one request the counters of `local` do not see: two invocations, one message of the agent, and
/// the public request itself.
const UNCOUNTED: f64 = 4.0;

/// A design that is no more.
#[derive(Debug, Clone, Copy)]
enum Replaced {
    /// A table of pending requests, polled.
    Table,
    /// A Standard workflow with a task token, polled with `DescribeExecution`.
    Standard,
}

impl Replaced {
    const fn name(self) -> &'static str {
        match self {
            Self::Table => "polled table",
            Self::Standard => "polled Standard run",
        }
    }
}

/// Measures one round of `count` requests for each design.
pub(crate) async fn measure(
    program: &Path,
    upstream: &Upstream,
    count: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let local = Local::start(&["--latency", "aws"]);
    let _agent = local.agent("bench", &format!("127.0.0.1:{}", upstream.port));
    let tunnel = Target { address: local.public, host: "bench.localhost".to_owned() };
    let mut bare = agent::Stage::start(program, &[], upstream).await?;
    let profile = Profile::find("aws")?.context("the profile is built in")?;
    let latency = Latency::new(Some(profile), Duration::ZERO);
    // The first ones start processes.
    measure::delays(&tunnel, 10).await?;
    for (when, from, below) in ASKED {
        let waits = || (0..count as u64).map(move |number| from + number * 37 % (below - from));
        let mut direct = delays(&upstream.direct(), waits()).await?;
        let before = calls(&local).await;
        let mut ours = delays(&tunnel, waits()).await?;
        let paid = (calls(&local).await - before) / count as f64 + UNCOUNTED;
        let name = format!("aws: this design, answer {when}");
        report.note_delays(&name, &mut direct.clone(), &mut ours, [None, Some(200.0), None]);
        report.note(format!("{name}, billed calls a request"), Unit::Count, None, None, paid);
        for design in [Replaced::Table, Replaced::Standard] {
            let calls = Cell::new(0);
            let mut delays = Vec::with_capacity(count);
            for wait in waits() {
                let begun = Instant::now();
                request(design, &latency, &mut bare.line, &format!("/wait/{wait}"), &calls).await?;
                delays.push(begun.elapsed().as_secs_f64() * 1e3 - wait as f64);
            }
            let name = format!("aws: {}, answer {when}", design.name());
            report.note_delays(&name, &mut direct, &mut delays, [None; 3]);
            let paid = f64::from(calls.get()) / count as f64;
            let name = format!("{name}, billed calls a request");
            report.note(name, Unit::Count, None, None, paid);
        }
    }
    Ok(())
}

/// How long each request took beside what the upstream took, in milliseconds.
async fn delays(way: &Target, waits: impl Iterator<Item = u64>) -> anyhow::Result<Vec<f64>> {
    let mut client = Client::connect(way).await?;
    let mut delays = Vec::new();
    for wait in waits {
        let begun = Instant::now();
        let answer = client.call(&format!("/wait/{wait}"), None).await?;
        delays.push(begun.elapsed().as_secs_f64() * 1e3 - wait as f64);
        ensure!(answer == upstream::HELLO, "a wrong answer");
    }
    Ok(delays)
}

/// How many calls `local` has counted so far.
async fn calls(local: &Local) -> f64 {
    local.counters().await.values().sum::<u64>() as f64
}

/// One request as the design would carry it.
async fn request(
    design: Replaced,
    latency: &Latency,
    line: &mut Line,
    target: &str,
    calls: &Cell<u32>,
) -> anyhow::Result<()> {
    let paid = async |hop| {
        calls.set(calls.get() + 1);
        latency.hop(hop).await;
    };
    // The public request and its function.
    paid(Hop::Front).await;
    calls.set(calls.get() + 1);
    let answered = Cell::new(false);
    let carry = async {
        match design {
            Replaced::Table => {
                // Who serves it; the pending row.
                paid(Hop::DynamoDb).await;
                paid(Hop::DynamoDb).await;
            }
            Replaced::Standard => {
                paid(Hop::StartRun).await;
                // A transition each: look up, dispatch and wait, end.
                calls.set(calls.get() + 3);
                paid(Hop::DynamoDb).await;
            }
        }
        paid(Hop::Connections).await;
        latency.hop(Hop::Link).await;
        line.load(&Ask { target, upload: 0, expected: None }, 1, Until::Answers(1)).await?;
        paid(Hop::Link).await;
        paid(Hop::Invoke).await;
        match design {
            // The row is complete.
            Replaced::Table => paid(Hop::DynamoDb).await,
            // SendTaskSuccess; the transition was counted.
            Replaced::Standard => latency.hop(Hop::StartRun).await,
        }
        answered.set(true);
        anyhow::Ok(())
    };
    let wait = async {
        while !answered.get() {
            tokio::time::sleep(POLL_INTERVAL).await;
            match design {
                Replaced::Table => paid(Hop::DynamoDb).await,
                // Not on the bill, but against a quota of 15 a second.
                Replaced::Standard => latency.hop(Hop::Describe).await,
            }
        }
        Ok(())
    };
    tokio::try_join!(carry, wait).map(|_| ())
}
