//! What a language model's answer costs under the latencies of AWS: enter `local` of this build and of an earlier one, leave
//! calls and delays of its tokens, and of events that come alone. Both take turns.

use std::{path::Path, process::Command};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use http_body_util::BodyExt as _;
use tests::Local;

use crate::{
    client::{Client, Target},
    designs::counted,
    figures::{median, quantile},
    upstream::{Events, Upstream},
};

/// A model that writes 50 tokens a second.
const TOKENS: Stream = Stream { target: "/every/20/250", count: 250 };

/// Events that come alone.
const RARE: Stream = Stream { target: "/every/400/12", count: 12 };

/// Which part of the calls before may be left.
const CALLS: f64 = 0.4;

/// How much later a token may come than before, and an event that comes alone, in milliseconds at the 95th percentile. The
/// second is what two runs of one build differ by.
const LATER: f64 = 25.0;
const SAME: f64 = 5.0;

/// How many of them go on at once. Fewer than cores have to do with: figures are to be of waiting, not of work.
const AT_ONCE: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Stream {
    target: &'static str,
    count: usize,
}

/// A build of `local` that runs, its own agent at the upstream.
struct Side {
    local: Local,
    target: Target,
    rounds: Vec<Round>,
}

/// Billed calls of one stream, and the 95th percentiles of delays in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Round {
    calls: f64,
    token: f64,
    rare: f64,
}

impl Side {
    async fn start(program: &Path, upstream: &Upstream) -> anyhow::Result<Self> {
        let port = upstream.port.to_string();
        let local = Local::start_as(Command::new(program), &[], &["--upstream", &port, "--latency", "aws"]);
        let target = Target { address: local.public, host: "demo.localhost".to_owned() };
        let side = Self { local, target, rounds: Vec::new() };
        // The agent connects, and what comes first starts processes.
        tests::eventually("the tunnel is open", async || {
            let Ok(mut client) = Client::connect(&side.target).await else { return false };
            client.call("/hello", None).await.is_ok()
        })
        .await;
        side.delays(TOKENS).await?;
        side.delays(RARE).await?;
        Ok(side)
    }

    /// The delays of all events of a few streams at once.
    async fn delays(&self, stream: Stream) -> anyhow::Result<Vec<f64>> {
        let all = try_join_all((0..AT_ONCE).map(|_| async {
            let mut client = Client::connect(&self.target).await?;
            let mut body = client.begin(stream.target, None).await?.into_body();
            let mut events = Events::default();
            while let Some(frame) = body.frame().await {
                events.take(frame?.data_ref().context("no data")?)?;
            }
            events.finish(stream.count)
        }));
        Ok(all.await?.concat())
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        let before = counted(&self.local).await?;
        let mut tokens = self.delays(TOKENS).await?;
        let calls = counted(&self.local).await? - before;
        let mut rare = self.delays(RARE).await?;
        // The invocation of `ingress` is not counted there.
        let calls = calls as f64 / AT_ONCE as f64 + 1.0;
        let round = Round { calls, token: quantile(&mut tokens, 0.95), rare: quantile(&mut rare, 0.95) };
        eprintln!("bench: {round:?}");
        self.rounds.push(round);
        Ok(())
    }

    fn median(&self, figure: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(figure).collect())
    }
}

/// Measures, prints a table, and says whether the bounds are kept.
pub(crate) async fn run(now: &Path, before: &Path, rounds: usize) -> anyhow::Result<bool> {
    let upstream = Upstream::start()?;
    let mut sides = [Side::start(before, &upstream).await?, Side::start(now, &upstream).await?];
    for round in 0..rounds {
        for turn in 0..2 {
            sides[(round + turn) % 2].round().await?;
        }
    }
    let [before, now] = &sides;
    println!("| | before | now | bound | |\n|---|---:|---:|---:|---|");
    let mut is_kept = true;
    let mut line = |name: &str, figure: fn(&Round) -> f64, bound: &dyn Fn(f64) -> f64| {
        let (was, is) = (before.median(figure), now.median(figure));
        let bound = bound(was);
        let verdict = if is <= bound { "within" } else { "EXCEEDED" };
        is_kept &= is <= bound;
        println!("| {name} | {was:.1} | {is:.1} | {bound:.1} | {verdict} |");
    };
    line("billed calls of 250 tokens, 20 ms apart", |round| round.calls, &|was| was * CALLS);
    line("delay of a token, p95, ms", |round| round.token, &|was| was + LATER);
    line("delay of an event that comes alone, p95, ms", |round| round.rare, &|was| was + SAME);
    Ok(is_kept)
}
