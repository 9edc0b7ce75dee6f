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

use anyhow::Context;
use local::latency::{Hop, Latency, Profile};
use tests::Local;

use crate::{
    agent,
    client::Target,
    edge::{Ask, Line, Until},
    figures::{Report, Unit},
    measure,
    upstream::Upstream,
};

/// How often whoever waits looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What is asked for: when the upstream answers, and the target.
const ASKED: [(&str, &str); 2] = [("at once", "/hello"), ("after 300 ms", "/wait/300")];

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
    measure::delays_of(&tunnel, "/hello", 10).await?;
    for (when, target) in ASKED {
        let mut direct = measure::delays_of(&upstream.direct(), target, count).await?;
        let before = calls(&local).await;
        let mut ours = measure::delays_of(&tunnel, target, count).await?;
        let asked = (count + count / 10) as f64;
        let paid = (calls(&local).await - before) / asked + UNCOUNTED;
        let name = format!("aws: this design, answer {when}");
        report.note_delays(&name, &mut direct.clone(), &mut ours, [None, Some(200.0), None]);
        report.note(format!("{name}, billed calls a request"), Unit::Count, None, None, paid);
        for design in [Replaced::Table, Replaced::Standard] {
            let calls = Cell::new(0);
            let mut delays = Vec::with_capacity(count);
            for _ in 0..count {
                let begun = Instant::now();
                request(design, &latency, &mut bare.line, target, &calls).await?;
                delays.push(begun.elapsed().as_secs_f64() * 1e3);
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
