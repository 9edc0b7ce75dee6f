//! Measures the product on this machine: the real `local` and `agentd` over loopback, beside the same
//! upstream asked directly.
//!
//! Enters: a few options. Leaves: a table on standard output and, if asked for, the same as JSON. Every
//! figure is the median of several rounds of one run, in which the direct way and the tunnel take turns;
//! no figure stands alone where a ratio or a difference can be had.

mod agent;
mod callgrind;
mod client;
mod compare;
mod compression;
mod delays;
mod designs;
mod durable;
mod edge;
mod figures;
mod hops;
mod inspect;
mod keys;
mod measure;
mod pace;
mod parts;
mod peers;
mod scale;
mod start;
mod tokens;
mod upstream;
mod usage;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::{figures::Report, measure::Plan};

/// Measures the tunnel against its own upstream.
#[derive(Debug, Parser)]
#[command(name = "bench", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Options {
    /// How often everything is measured; figures are medians
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Less of everything, one round: some eight minutes
    #[arg(long)]
    quick: bool,
    /// Measure only that: latency, load, events, first-byte, download, upload, memory, start, agent, aws,
    /// scale, hops, compression
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<String>,
    /// Write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw where the time of one request goes into this SVG file
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Give each process of a function the part of a core that so much memory buys in Lambda, in the part `aws`
    #[arg(long, value_name = "MB")]
    cpu: Option<u32>,
    /// The `agentd` to measure alone, instead of the one of this build
    #[arg(long, value_name = "FILE")]
    agentd: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Counts the instructions for a request and compares them with the budget; needs valgrind
    Budget {
        /// The `agentd` to count
        #[arg(long, value_name = "FILE")]
        agentd: PathBuf,
        /// The `local` to count, and the functions in it
        #[arg(long, value_name = "FILE")]
        local: PathBuf,
        /// The budget
        #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/budget.toml"))]
        budget: PathBuf,
        /// Make what is counted now the budget
        #[arg(long)]
        write: bool,
        /// Keep callgrind's files here, for callgrind_annotate
        #[arg(long, value_name = "FOLDER")]
        profiles: Option<PathBuf>,
    },
    /// Measures an earlier build of this project and this one in turns, prints the ratios and holds them against what is
    /// aimed at
    Compare(compare::Options),
    /// Measures what the inspector costs a long download and an endless stream, and whether memory grows; an agent with
    /// it and one without take turns
    Inspect {
        /// The `agentd` to measure
        #[arg(long, value_name = "FILE")]
        agentd: PathBuf,
        /// How often each is measured; figures are medians
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// How long each download and each part of the stream is
        #[arg(long, value_name = "MIB", default_value_t = 1024)]
        mib: usize,
        /// Count the instructions of a small request with and without it instead; needs valgrind, but no quiet machine
        #[arg(long)]
        instructions: bool,
    },
    /// Measures what a language model's answer costs under the latencies of AWS, before and now in turns: calls, and how late
    /// its tokens come
    Tokens {
        /// The `local` to measure
        #[arg(long, value_name = "FILE")]
        local: PathBuf,
        /// The `local` of an earlier build
        #[arg(long, value_name = "FILE")]
        before: PathBuf,
        /// How often each is measured; figures are medians
        #[arg(long, default_value_t = 3)]
        rounds: usize,
    },
    /// Measures what a start would take longer if functions read their keys themselves instead of having them in variables
    Keys(keys::Options),
    /// Measures durable delivery and says whether its bounds are kept: how soon a webhook is kept, how fast those that wait are
    /// delivered, what each takes, and whether live requests feel it
    Durable(durable::Options),
    /// Measures `agentd` beside other tunnels, in the same rounds, and says whether it answers as many requests as is aimed
    /// at; `bench/peers/run` starts them
    Peers(peers::Options),
    /// The front of `agentd` alone: prints its ports and serves until its input ends
    #[command(hide = true)]
    Front,
    /// The upstream: prints its port and serves until its input ends
    #[command(hide = true)]
    Upstream,
}

fn main() -> ExitCode {
    // As `local` and its functions, for `bench keys`.
    if let Some(code) = keys::stand_in() {
        return code;
    }
    let cli = Cli::parse();
    // One thread: whoever measures leaves the cores to what is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.context("starting").and_then(|runtime| {
        runtime.block_on(async {
            match cli.command {
                Some(Command::Upstream) => upstream::serve().await.map(|()| true),
                Some(Command::Front) => peers::front::serve().await.map(|()| true),
                Some(Command::Compare(options)) => compare::run(&options),
                Some(Command::Keys(options)) => keys::run(&options).await.map(|()| true),
                Some(Command::Durable(options)) => durable::run(&options).await,
                Some(Command::Peers(options)) => {
                    let is_met = peers::run(&options).await?;
                    if !is_met {
                        eprintln!("bench: `agentd` answers fewer requests than is aimed at");
                    }
                    Ok(is_met)
                }
                Some(Command::Budget { agentd, local, budget, write, profiles }) => {
                    let programs = callgrind::Programs { agentd: &agentd, local: &local };
                    let is_met = callgrind::check(&programs, &budget, write, profiles.as_deref()).await?;
                    if !is_met {
                        eprintln!("bench: over the budget; make it cheaper, or say why with a new budget");
                    }
                    Ok(is_met)
                }
                Some(Command::Inspect { agentd, rounds, mib, instructions }) => {
                    let is_met = if instructions {
                        callgrind::inspection(&agentd).await?
                    } else {
                        inspect::run(&agentd, rounds, mib).await?
                    };
                    if !is_met {
                        eprintln!("bench: the inspector costs more than it may");
                    }
                    Ok(is_met)
                }
                Some(Command::Tokens { local, before, rounds }) => {
                    let is_met = tokens::run(&local, &before, rounds).await?;
                    if !is_met {
                        eprintln!("bench: tokens cost more or come later than they may");
                    }
                    Ok(is_met)
                }
                None => run(&cli.options).await,
            }
        })
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether it went without an error.
async fn run(options: &Options) -> anyhow::Result<bool> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures mean nothing");
    }
    let (size, plan) =
        if options.quick { ("quick", Plan::quick()) } else { ("full", Plan::full(options.rounds)) };
    let mut report = Report::new(size, plan.rounds);
    let (agentd, picture) = (options.agentd.as_deref(), options.picture.as_deref());
    measure::run(&plan, &options.only, agentd, picture, options.cpu, &mut report).await?;
    print!("{}", report.table());
    if let Some(path) = &options.json {
        let json = serde_json::to_vec_pretty(&report.json())?;
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    if report.has_errors() {
        eprintln!("bench: requests have failed; the figures are worth nothing");
    }
    Ok(!report.has_errors())
}
