//! Two builds of the project beside each other: enter a checkout of an earlier one, leave the ratios of its figures and
//! of this one's, medians of rounds in which both take turns.
//!
//! Each side measures itself with its own `bench`, so that each runs what it was made with; what only one of them
//! measures is left out.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Deserialize;

use crate::figures::median;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A checkout of the earlier one; it is built there
    #[arg(long, value_name = "FOLDER")]
    before: PathBuf,
    /// How often each is measured; both take turns
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure only these parts
    #[arg(
        long,
        value_name = "PART",
        value_delimiter = ',',
        default_value = "latency,load,events,download,upload,memory,agent"
    )]
    only: Vec<String>,
    /// Take what is built there in this profile, and build nothing
    #[arg(long, value_name = "PROFILE")]
    built: Option<String>,
}

/// What a figure is to be.
#[derive(Debug, Clone, Copy)]
enum Bound {
    /// No more than so many times what it was.
    Most(f64),
    /// At least so many times what it was.
    Least(f64),
    /// No more than that.
    Below(f64),
}

/// What is aimed at: how the name of a figure begins.
const BOUNDS: [(&str, Bound); 8] = [
    ("latency: 13 B, one after the other p50", Bound::Most(0.7)),
    ("load: 32 clients", Bound::Least(2.0)),
    ("memory: local, idle at the end", Bound::Most(0.6)),
    // After a download of 100 MiB.
    ("memory: ingress, idle at the end", Bound::Below(20.0)),
    ("agent: memory for an open stream", Bound::Below(16.0)),
    ("agent: memory, connected", Bound::Below(7.0)),
    ("download: 10 MiB", Bound::Least(1.5)),
    ("upload: 4.", Bound::Least(1.3)),
];

impl Bound {
    fn of(name: &str) -> Option<Self> {
        BOUNDS.iter().find(|(begin, _)| name.starts_with(begin)).map(|(_, bound)| *bound)
    }

    fn is_met(self, was: f64, is: f64) -> bool {
        match self {
            Self::Most(part) => is <= was * part,
            Self::Least(part) => is >= was * part,
            Self::Below(most) => is <= most,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Most(part) => format!("≤ × {part}"),
            Self::Least(part) => format!("≥ × {part}"),
            Self::Below(most) => format!("≤ {most}"),
        }
    }
}

/// What `--json` writes, as far as it is looked at.
#[derive(Debug, Deserialize)]
struct Figures {
    rows: Vec<Figure>,
}

#[derive(Debug, Deserialize)]
struct Figure {
    part: String,
    name: String,
    unit: String,
    measured: f64,
    added: Option<f64>,
}

/// Figures by name and unit, one for each round.
type Rounds = BTreeMap<(String, String), Vec<f64>>;

/// Builds, measures and prints. False where a bound is not met.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the project has no folder")?;
    let before = bench(&options.before, options)?;
    let after = bench(here, options)?;
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("figures.json");
    let mut sides = [(before, Rounds::new()), (after, Rounds::new())];
    for round in 0..options.rounds {
        // Forth and back, so that neither is always the one that comes to a warm machine.
        for turn in 0..2 {
            let (bench, rounds) = &mut sides[(round + turn) % 2];
            eprintln!("bench: round {} of {}: {}", round + 1, options.rounds, bench.display());
            let mut command = Command::new(&*bench);
            command.args(["--quick", "--only", &options.only.join(",")]).arg("--json").arg(&json);
            let output = command.output().with_context(|| format!("starting {}", bench.display()))?;
            ensure!(
                output.status.success(),
                "{}: {}",
                bench.display(),
                String::from_utf8_lossy(&output.stderr)
            );
            let text = std::fs::read(&json).context("reading the figures")?;
            add(rounds, serde_json::from_slice(&text).context("reading the figures")?);
        }
    }
    let [(_, before), (_, after)] = &sides;
    let (table, is_met) = table(before, after);
    print!("{table}");
    Ok(is_met)
}

/// The `bench` of a checkout, built as that one ships.
fn bench(folder: &Path, options: &Options) -> anyhow::Result<PathBuf> {
    let manifest = folder.join("Cargo.toml");
    let text =
        std::fs::read_to_string(&manifest).with_context(|| format!("reading {}", manifest.display()))?;
    // Before there was a profile of its own, `release` was what shipped.
    let ships = if text.contains("\n[profile.dist]") { "dist" } else { "release" };
    let profile = options.built.as_deref().unwrap_or(ships);
    let target = folder.join("target");
    if options.built.is_none() {
        // In two steps, as the benchmark itself would do it.
        for packages in [&["local", "agentd"][..], &["bench"]] {
            let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            build.current_dir(folder).args(["build", "--quiet", "--locked", "--profile", profile]);
            build.arg("--target-dir").arg(&target);
            build.args(packages.iter().flat_map(|package| ["--package", package]));
            ensure!(
                build.status().context("starting cargo")?.success(),
                "{} does not build",
                folder.display()
            );
        }
    }
    let profile = if profile == "dev" { "debug" } else { profile };
    Ok(target.join(profile).join("bench"))
}

fn add(rounds: &mut Rounds, figures: Figures) {
    for Figure { part, name, unit, measured, added } in figures.rows {
        // What takes time is compared by what the tunnel adds.
        rounds.entry((format!("{part}: {name}"), unit)).or_default().push(added.unwrap_or(measured));
    }
}

fn table(before: &Rounds, after: &Rounds) -> (String, bool) {
    let mut text = String::from(
        "| | unit | before | after | after by before | bound | |\n|---|---|---:|---:|---:|---:|---|\n",
    );
    let mut all_met = true;
    for ((name, unit), rounds) in before {
        let Some(now) = after.get(&(name.clone(), unit.clone())) else { continue };
        let (was, is) = (median(rounds.clone()), median(now.clone()));
        // Of nothing, as errors should be, there is no ratio.
        let ratio = if was > 0.0 { format!("× {:.2}", is / was) } else { String::new() };
        let (bound, verdict) = match Bound::of(name) {
            None => (String::new(), ""),
            Some(bound) => {
                let is_met = bound.is_met(was, is);
                all_met &= is_met;
                (bound.text(), if is_met { "within" } else { "EXCEEDED" })
            }
        };
        let _ = writeln!(text, "| {name} | {unit} | {was:.3} | {is:.3} | {ratio} | {bound} | {verdict} |");
    }
    (text, all_met)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(measured: f64, added: Option<f64>) -> Figures {
        let figure = |part: &str, measured, added| Figure {
            part: part.into(),
            name: "x".into(),
            unit: "ms".into(),
            measured,
            added,
        };
        Figures { rows: vec![figure("latency", measured, added), figure("load", measured * 10.0, None)] }
    }

    #[test]
    fn ratios_are_of_medians_and_of_what_is_added() {
        let (mut before, mut after) = (Rounds::new(), Rounds::new());
        for measured in [5.0, 100.0, 6.0] {
            add(&mut before, figures(measured, Some(measured - 2.0)));
        }
        for measured in [4.0, 3.0] {
            add(&mut after, figures(measured, Some(measured - 2.0)));
        }
        after.insert(("latency: new".into(), "ms".into()), vec![1.0]);
        let (table, is_met) = table(&before, &after);
        assert!(is_met && table.contains("| latency: x | ms | 4.000 | 1.500 | × 0.38 |"), "{table}");
        assert!(table.contains("| load: x | ms | 60.000 | 35.000 | × 0.58 |"), "{table}");
        assert!(!table.contains("new"), "{table}");
    }

    #[test]
    fn of_nothing_there_is_no_ratio() {
        let none = BTreeMap::from([(("load: errors".to_owned(), "errors".to_owned()), vec![0.0])]);
        assert!(table(&none, &none).0.ends_with("| load: errors | errors | 0.000 | 0.000 |  |  |  |\n"));
    }

    #[test]
    fn a_bound_is_met_at_it_and_not_past_it() {
        for (name, was, met, missed) in [
            ("memory: local, idle at the end", 10.0, 6.0, 6.01),
            ("load: 32 clients", 10.0, 20.0, 19.9),
            ("memory: ingress, idle at the end", 1.0, 20.0, 20.1),
        ] {
            let one = |value| Rounds::from([((name.to_owned(), "x".to_owned()), vec![value])]);
            for (now, is_met) in [(met, true), (missed, false)] {
                let (table, verdict) = table(&one(was), &one(now));
                assert_eq!((verdict, table.contains("EXCEEDED")), (is_met, !is_met), "{table}");
            }
        }
    }
}
