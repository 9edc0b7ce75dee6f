//! A fault campaign: seeded runs of a load, a fault and a moment against the real binaries, with one oracle.
//! Every answer is right, or says honestly what failed, or is visibly broken off; none is another's, silently
//! short, or twice at the upstream; and afterwards everything works again and nothing is left.
//!
//! A run that fails prints the line that repeats it, and a smaller one that fails too.

mod durable;
mod load;
mod oracle;
mod run;
mod scenario;
mod stage;
mod upstream;

use std::{
    collections::{BTreeMap, VecDeque},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use clap::{Parser, builder::RangedU64ValueParser};
use tokio::task::JoinSet;

use crate::{
    oracle::Tally,
    run::{Outcome, run},
    scenario::Scenario,
};

/// How many runs a failure may cost to be made smaller.
const SHRINKING: usize = 24;

#[derive(Debug, Parser)]
#[command(about = "Seeded faults against the real binaries, and one oracle")]
struct Options {
    /// How many runs
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// The seed of the first run; each further one takes the next
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=1 << 53))]
    seed: u64,
    /// About how many requests a run has
    #[arg(long, default_value_t = 1000, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    requests: usize,
    /// Begin no further run after so many seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// How many runs at the same time
    #[arg(long, default_value_t = 2, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    jobs: usize,
    /// One run, by the line that it printed
    #[arg(long, value_name = "LINE")]
    replay: Option<Scenario>,
    /// Show what the processes of a failed run have said at last
    #[arg(long)]
    printed: bool,
    /// Webhooks that wait, in place of requests: so many in each run
    #[arg(long, value_name = "WEBHOOKS", num_args = 0..=1, default_missing_value = "60", conflicts_with = "replay", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    durable: Option<usize>,
    /// Do not look for a smaller run that fails too
    #[arg(long)]
    no_shrink: bool,
}

/// What the runs with one fault came to.
#[derive(Debug, Default)]
struct Row {
    runs: u64,
    tally: Tally,
    failed: u64,
    slowest: Duration,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    if stage::clock_library().is_none() {
        println!(
            "skipped: a clock that jumps needs libfaketime (Debian: apt-get install faketime); those runs have no fault"
        );
    }
    let begun = Instant::now();
    if let Some(webhooks) = options.durable {
        return deliveries(&options, webhooks).await;
    }
    let scenarios: VecDeque<Scenario> = match &options.replay {
        Some(scenario) => [scenario.clone()].into(),
        None => (options.seed..options.seed + options.runs)
            .map(|seed| Scenario::of_seed(seed, options.requests))
            .collect(),
    };
    let scenarios = Arc::new(Mutex::new(scenarios));
    let rows = Arc::new(Mutex::new(BTreeMap::<String, Row>::new()));
    let failures = Arc::new(Mutex::new(Vec::new()));
    let mut workers = JoinSet::new();
    for _ in 0..options.jobs {
        let (scenarios, rows, failures) = (Arc::clone(&scenarios), Arc::clone(&rows), Arc::clone(&failures));
        let (seconds, show) = (options.seconds, options.printed || options.replay.is_some());
        workers.spawn(async move {
            while seconds.is_none_or(|seconds| begun.elapsed().as_secs() < seconds) {
                let next = scenarios.lock().expect("nothing panics under this lock").pop_front();
                let Some(scenario) = next else { return };
                let outcome = guarded(of(scenario.clone())).await;
                let mut rows = rows.lock().expect("nothing panics under this lock");
                let row = rows.entry(scenario.fault.to_string()).or_default();
                row.runs += 1;
                row.failed += u64::from(outcome.failure.is_some());
                row.slowest = row.slowest.max(outcome.took);
                row.tally += outcome.tally;
                let done: u64 = rows.values().map(|row| row.runs).sum();
                if let Some((why, printed)) = outcome.failure {
                    println!("FAILED campaign --replay '{scenario}'\n{why}");
                    if show {
                        println!("{printed}");
                    }
                    failures.lock().expect("nothing panics under this lock").push(scenario);
                } else if done.is_multiple_of(25) {
                    let requests: u64 = rows.values().map(|row| row.tally.requests).sum();
                    println!("{done} runs, {requests} requests, {:.0} s", begun.elapsed().as_secs_f64());
                }
            }
        });
    }
    workers.join_all().await;
    let failures = std::mem::take(&mut *failures.lock().expect("nothing panics under this lock"));
    print!("{}", table(&rows.lock().expect("nothing panics under this lock"), begun.elapsed()));
    if options.replay.is_none() && !options.no_shrink {
        for scenario in failures.iter().take(3) {
            let smaller = shrink(scenario.clone()).await;
            println!("smaller: campaign --replay '{smaller}'");
        }
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs about deliveries.
async fn deliveries(options: &Options, webhooks: usize) -> ExitCode {
    let begun = Instant::now();
    let seeds = Arc::new(Mutex::new((options.seed..options.seed + options.runs).collect::<VecDeque<_>>()));
    let all = Arc::new(Mutex::new(Row::default()));
    let mut workers = JoinSet::new();
    for _ in 0..options.jobs {
        let (seeds, all, seconds, show) =
            (Arc::clone(&seeds), Arc::clone(&all), options.seconds, options.printed);
        workers.spawn(async move {
            while seconds.is_none_or(|seconds| begun.elapsed().as_secs() < seconds) {
                let Some(seed) = seeds.lock().expect("nothing panics under this lock").pop_front() else {
                    return;
                };
                let outcome = guarded(durable::run(seed, webhooks)).await;
                if let Some((why, printed)) = &outcome.failure {
                    println!("FAILED campaign --durable {webhooks} --runs 1 --seed {seed}\n{why}");
                    if show {
                        println!("{printed}");
                    }
                }
                let mut all = all.lock().expect("nothing panics under this lock");
                all.runs += 1;
                all.failed += u64::from(outcome.failure.is_some());
                all.slowest = all.slowest.max(outcome.took);
                all.tally += outcome.tally;
                if all.runs.is_multiple_of(25) {
                    println!("{} runs, {:.0} s", all.runs, begun.elapsed().as_secs_f64());
                }
            }
        });
    }
    workers.join_all().await;
    let all = std::mem::take(&mut *all.lock().expect("nothing panics under this lock"));
    println!(
        "{} runs, {} accepted and kept, {} of them delivered, {} further attempts, {} failed runs, the slowest {:.1} s; {:.0} s in all",
        all.runs,
        all.tally.requests,
        all.tally.right,
        all.tally.repeated,
        all.failed,
        all.slowest.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    );
    if all.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A run whose own mistakes, a harness that gave up waiting among them, are failures like others.
async fn guarded(run: impl Future<Output = Outcome> + Send + 'static) -> Outcome {
    match tokio::spawn(run).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome {
            tally: Tally::default(),
            failure: Some((format!("the run ended early: {error}"), String::new())),
            took: Duration::ZERO,
        },
    }
}

async fn of(scenario: Scenario) -> Outcome {
    run(&scenario).await
}

/// The smallest run found that fails as well. What fails now and then gets two tries.
async fn shrink(mut scenario: Scenario) -> Scenario {
    let mut left = SHRINKING;
    'smaller: loop {
        for simpler in scenario.simpler() {
            for _ in 0..2 {
                if left == 0 {
                    return scenario;
                }
                left -= 1;
                if guarded(of(simpler.clone())).await.failure.is_some() {
                    scenario = simpler;
                    continue 'smaller;
                }
            }
        }
        return scenario;
    }
}

fn table(rows: &BTreeMap<String, Row>, took: Duration) -> String {
    let mut text = String::from(
        "| fault | runs | requests | right | honest errors | broken off | repeated GETs | failed runs | slowest run |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let mut all = Row::default();
    let mut line = |name: &str, row: &Row| {
        let tally = &row.tally;
        let honest: u64 = tally.honest.values().sum();
        text.push_str(&format!(
            "| {name} | {} | {} | {} | {honest} | {} | {} | {} | {:.1} s |\n",
            row.runs,
            tally.requests,
            tally.right,
            tally.broken,
            tally.repeated,
            row.failed,
            row.slowest.as_secs_f64()
        ));
    };
    for (name, row) in rows {
        line(name, row);
        all.runs += row.runs;
        all.failed += row.failed;
        all.slowest = all.slowest.max(row.slowest);
        all.tally += row.tally.clone();
    }
    line("all", &all);
    let codes: Vec<_> = all.tally.honest.iter().map(|(code, count)| format!("{code}: {count}")).collect();
    text.push_str(&format!("\nhonest errors: {}\n{:.0} s in all\n", codes.join(", "), took.as_secs_f64()));
    text
}
