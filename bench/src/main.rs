//! Measures the product on this machine: the real `local` and `agentd` over loopback, beside the same
//! upstream asked directly.
//!
//! Enters: a few options. Leaves: a table on standard output and, if asked for, the same as JSON. Every
//! figure is the median of several rounds of one run, in which the direct way and the tunnel take turns;
//! no figure stands alone where a ratio or a difference can be had.

mod client;
mod compression;
mod figures;
mod measure;
mod upstream;
mod usage;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::{figures::Report, measure::Plan};

/// Measures the tunnel against its own upstream.
#[derive(Debug, Parser)]
#[command(name = "bench", args_conflicts_with_subcommands = true)]
struct Cli {
    /// How often everything is measured; figures are medians
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Less of everything, one round: under a minute
    #[arg(long)]
    quick: bool,
    /// Measure only what has this in its name: latency, load, events, first-byte, download, upload, start,
    /// memory, compression
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    hidden: Option<Hidden>,
}

/// What this program starts itself as.
#[derive(Debug, Subcommand)]
enum Hidden {
    /// The upstream: prints its port and serves until its input ends
    #[command(hide = true)]
    Upstream,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread: whoever measures leaves the cores to what is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.context("starting").and_then(|runtime| {
        runtime.block_on(async {
            match cli.hidden {
                Some(Hidden::Upstream) => upstream::serve().await,
                None => run(&cli).await,
            }
        })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures mean nothing");
    }
    let plan = if cli.quick { Plan::quick() } else { Plan::full(cli.rounds) };
    let mut report = Report::new(plan.rounds);
    measure::run(&plan, &cli.only, &mut report).await?;
    print!("{}", report.table());
    if let Some(path) = &cli.json {
        let json = serde_json::to_vec_pretty(&report.json())?;
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
