//! Instructions for a request, counted by callgrind: the one measure that is the same on a busy machine
//! and in every run. Enters: a program. Leaves: counts, and whether they are within the budget.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use serde::Deserialize;

use crate::{
    agent::{self, DOWNLOAD, SMALL, UPLOAD},
    edge::{Ask, Until},
    upstream::Upstream,
};

/// How much more than its budget a count may be, in percent.
const TOLERANCE: u64 = 5;

/// What is counted: name, request, how often before it counts, how often then.
const PHASES: [(&str, Ask<'_>, usize, usize); 3] =
    [("small_request", SMALL, 100, 400), ("response_1mib", DOWNLOAD, 2, 8), ("request_1mib", UPLOAD, 2, 8)];

/// What the budget file holds: program, what is counted, instructions for one of it.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
struct Budget(BTreeMap<String, BTreeMap<String, u64>>);

/// Counts, prints and judges. False where a budget is exceeded.
pub(crate) async fn check(
    program: &Path,
    budget: &Path,
    is_new: bool,
    profiles: Option<&Path>,
) -> anyhow::Result<bool> {
    let folder = tempfile::tempdir()?;
    let folder = profiles.unwrap_or(folder.path());
    std::fs::create_dir_all(folder)?;
    let counts = agentd(program, folder).await?;
    if is_new {
        let text = written(&[("agentd", &counts)]);
        std::fs::write(budget, &text).with_context(|| format!("writing {}", budget.display()))?;
        print!("{text}");
        return Ok(true);
    }
    let text = std::fs::read_to_string(budget).with_context(|| format!("reading {}", budget.display()))?;
    let budget: Budget = toml::from_str(&text).with_context(|| format!("reading {}", budget.display()))?;
    let (table, is_met) = judged("agentd", &counts, &budget);
    print!("{table}");
    Ok(is_met)
}

/// Instructions of `agentd` for one of each.
async fn agentd(program: &Path, folder: &Path) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let upstream = Upstream::start()?;
    let out = folder.join("callgrind.agentd");
    // Its pipes stand here too, so that nothing of it outlives a run.
    let control = folder.join("vgdb");
    let wrapper = vec![
        "valgrind".to_owned(),
        "--quiet".to_owned(),
        "--tool=callgrind".to_owned(),
        format!("--vgdb-prefix={}", control.display()),
        format!("--callgrind-out-file={}", out.display()),
    ];
    let mut stage = agent::Stage::start(program, &wrapper, &upstream).await?;
    let pid = stage.process.id();
    let mut counts = BTreeMap::new();
    for (number, (name, ask, before, count)) in (1..).zip(PHASES) {
        stage.line.load(&ask, 1, Until::Answers(before)).await?;
        tell(&control, pid, "zero")?;
        stage.line.load(&ask, 1, Until::Answers(count)).await?;
        tell(&control, pid, "dump")?;
        let dump = PathBuf::from(format!("{}.{number}", out.display()));
        counts.insert(name, total(&dump)? / count as u64);
        std::fs::rename(&dump, folder.join(format!("callgrind.agentd.{name}")))?;
    }
    Ok(counts)
}

/// Gives a command to the callgrind that runs `pid`.
fn tell(control: &Path, pid: u32, command: &str) -> anyhow::Result<()> {
    let output = Command::new("vgdb")
        .arg(format!("--vgdb-prefix={}", control.display()))
        .arg(format!("--pid={pid}"))
        .arg(command)
        .stdin(Stdio::null())
        .output()
        .context("starting vgdb, which comes with valgrind")?;
    ensure!(output.status.success(), "vgdb {command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The sum in a file of callgrind's.
fn total(dump: &Path) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(dump).with_context(|| format!("reading {}", dump.display()))?;
    let total = text.lines().rev().find_map(|line| line.strip_prefix("totals:"));
    Ok(total.context("callgrind's file has no total")?.trim().parse()?)
}

fn written(programs: &[(&str, &BTreeMap<&str, u64>)]) -> String {
    let mut text = String::from(
        "# Instructions for one of each, counted by callgrind in a release build on x86-64 with AVX2.\n\
         # `bench budget` fails when a count is more than 5 % above; `bench budget --write` makes this file.\n",
    );
    for (program, counts) in programs {
        let _ = writeln!(text, "\n[{program}]");
        for (name, count) in *counts {
            let _ = writeln!(text, "{name} = {count}");
        }
    }
    text
}

fn judged(program: &str, counts: &BTreeMap<&str, u64>, budget: &Budget) -> (String, bool) {
    let mut table = String::from("| | instructions | budget | | |\n|---|---:|---:|---:|---|\n");
    let mut is_met = true;
    for (name, &count) in counts {
        let Some(&allowed) = budget.0.get(program).and_then(|all| all.get(*name)) else {
            let _ = writeln!(table, "| {program}: {name} | {count} | none | | missing |");
            is_met = false;
            continue;
        };
        let within = count * 100 <= allowed * (100 + TOLERANCE);
        is_met &= within;
        let change = (count as f64 / allowed as f64 - 1.0) * 100.0;
        let verdict = if within { "within" } else { "EXCEEDED" };
        let _ = writeln!(table, "| {program}: {name} | {count} | {allowed} | {change:+.1} % | {verdict} |");
    }
    (table, is_met)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_percent_more_is_within_and_a_little_more_is_not() {
        let budget: Budget = toml::from_str("[agentd]\nsmall_request = 1000\n").unwrap();
        for (count, within) in [(900, true), (1050, true), (1051, false)] {
            assert_eq!(judged("agentd", &BTreeMap::from([("small_request", count)]), &budget).1, within);
        }
        let unknown = judged("agentd", &BTreeMap::from([("other", 1)]), &budget);
        assert!(!unknown.1 && unknown.0.contains("missing"), "{}", unknown.0);
    }

    #[test]
    fn what_is_written_can_be_read() {
        let counts = BTreeMap::from([("a", 1), ("b", 2)]);
        let budget: Budget = toml::from_str(&written(&[("agentd", &counts)])).unwrap();
        assert!(judged("agentd", &counts, &budget).1);
    }
}
