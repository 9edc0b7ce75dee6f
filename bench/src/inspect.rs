//! What the inspector costs a stream: two agents, one inspected, take turns in one run.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;

use crate::{
    agent::{MIB, Stage},
    edge::{Ask, Until},
    figures::median,
    upstream::Upstream,
};

/// The least of the throughput that is to be left with the inspector on.
const LEFT: f64 = 0.95;

/// How much more an inspected agent may grow while something goes on, in 10^6 bytes: bodies are cut long before.
const GROWTH_MB: f64 = 4.0;

/// Two agents beside each other.
struct Pair {
    off: Stage,
    on: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Download,
    Events,
}

impl What {
    const ALL: [Self; 2] = [Self::Download, Self::Events];

    const fn name(self) -> &'static str {
        match self {
            Self::Download => "one download",
            Self::Events => "a stream of events without end",
        }
    }

    /// How many 10^6 bytes a second come over `stage`.
    async fn rate(self, stage: &mut Stage, bytes: usize) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let came = match self {
            Self::Download => {
                let target = format!("/body/{bytes}");
                let ask = Ask { target: &target, upload: 0, expected: Some(bytes) };
                stage.line.load(&ask, 1, Until::Answers(1)).await?.bytes
            }
            Self::Events => stage.line.part("/flood", bytes).await?,
        };
        Ok(came as f64 / 1e6 / begun.elapsed().max(Duration::from_micros(1)).as_secs_f64())
    }
}

/// Measures, prints a table, and says whether both bounds are kept.
pub(crate) async fn run(program: &Path, rounds: usize, mib: usize) -> anyhow::Result<bool> {
    ensure!(rounds > 0 && mib > 0, "nothing to measure");
    let upstream = Upstream::start()?;
    let mut pair = Pair {
        off: Stage::start(program, &[], &upstream).await?,
        on: Stage::inspected(program, &[], &upstream).await?,
    };
    let bytes = mib * MIB;
    let mut is_kept = true;
    println!(
        "| {mib} MiB, {rounds} rounds in turns | off, MB/s | on, MB/s | on / off | |\n|---|---:|---:|---:|---|"
    );
    let mut sizes = String::new();
    for what in What::ALL {
        for stage in [&mut pair.off, &mut pair.on] {
            what.rate(stage, bytes.min(64 * MIB)).await?;
        }
        let before = (pair.off.memory(), pair.on.memory());
        let mut rates = Vec::with_capacity(rounds);
        for round in 0..rounds {
            let (off, on);
            // Whoever comes second may find the machine busier.
            if round % 2 == 0 {
                off = what.rate(&mut pair.off, bytes).await?;
                on = what.rate(&mut pair.on, bytes).await?;
            } else {
                on = what.rate(&mut pair.on, bytes).await?;
                off = what.rate(&mut pair.off, bytes).await?;
            }
            eprintln!("{}: off {off:.0} MB/s, on {on:.0} MB/s", what.name());
            rates.push((off, on));
        }
        let left = median(rates.iter().map(|(off, on)| on / off).collect());
        let (off, on): (Vec<_>, Vec<_>) = rates.into_iter().unzip();
        let (off, on) = (median(off), median(on));
        let is_enough = left >= LEFT;
        is_kept &= is_enough;
        println!("| {} | {off:.0} | {on:.0} | {left:.3} | {} |", what.name(), verdict(is_enough));
        let after = (pair.off.memory(), pair.on.memory());
        let is_steady = after.1 - before.1 <= (after.0 - before.0).max(0.0) + GROWTH_MB;
        is_kept &= is_steady;
        sizes.push_str(&format!(
            "\n{}: resident {:.1} MB became {:.1} MB without the inspector, {:.1} MB became {:.1} MB with it: {}\n",
            what.name(),
            before.0,
            after.0,
            before.1,
            after.1,
            verdict(is_steady)
        ));
    }
    print!("{sizes}");
    Ok(is_kept)
}

const fn verdict(is_met: bool) -> &'static str {
    if is_met { "within" } else { "EXCEEDED" }
}
