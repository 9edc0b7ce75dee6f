//! Instructions for a request, counted by callgrind: the one measure that is the same on a busy machine
//! and in every run. Enters: a program. Leaves: counts, and whether they are within the budget.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use ::tests::Local;
use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal};
use serde::Deserialize;

use crate::{
    agent::{self, DOWNLOAD, SMALL, UPLOAD},
    client::{Client, Target},
    edge::{Ask, Until},
    upstream::{self, Upstream},
};

/// How much more than its budget a count may be, in percent.
const TOLERANCE: u64 = 5;

/// What is counted: name, request, how often before it counts, how often then.
const PHASES: [(&str, Ask<'_>, usize, usize); 3] =
    [("small_request", SMALL, 100, 400), ("response_1mib", DOWNLOAD, 2, 8), ("request_1mib", UPLOAD, 2, 8)];

/// The first of [`PHASES`] again, with the inspector on. What it may cost goes by what it costs without.
const INSPECTED: &str = "small_request_inspected";

/// How much more than without it that may be, in percent.
const INSPECTION: u64 = 10;

/// How many small requests go through the whole path before it counts, and how many then.
const WHOLE_PATH: (usize, usize) = (60, 300);

/// The functions on the way of a small request, and what they run in.
const COUNTED: [&str; 3] = ["ingress", "response", LOCAL];

const LOCAL: &str = "local";

/// What was counted: program, what, instructions for one of it.
type Counts = BTreeMap<&'static str, BTreeMap<&'static str, u64>>;

/// The programs that are counted.
#[derive(Debug)]
pub(crate) struct Programs<'a> {
    pub(crate) agentd: &'a Path,
    /// With the functions in it.
    pub(crate) local: &'a Path,
}

/// What the budget file holds: program, what is counted, instructions for one of it.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
struct Budget(BTreeMap<String, BTreeMap<String, u64>>);

/// Counts, prints and judges. False where a budget is exceeded.
pub(crate) async fn check(
    programs: &Programs<'_>,
    budget: &Path,
    is_new: bool,
    profiles: Option<&Path>,
) -> anyhow::Result<bool> {
    let folder = tempfile::tempdir()?;
    let folder = profiles.unwrap_or(folder.path());
    std::fs::create_dir_all(folder)?;
    let mut counts = whole_path(programs.local, folder).await?;
    counts.insert("agentd", agentd(programs.agentd, folder).await?);
    if is_new {
        let text = written(&counts);
        std::fs::write(budget, &text).with_context(|| format!("writing {}", budget.display()))?;
        print!("{text}");
        return Ok(true);
    }
    let text = std::fs::read_to_string(budget).with_context(|| format!("reading {}", budget.display()))?;
    let budget: Budget = toml::from_str(&text).with_context(|| format!("reading {}", budget.display()))?;
    let (table, is_met) = judged(&counts, &budget);
    print!("{table}");
    Ok(is_met)
}

/// Instructions of `agentd` for one of each.
async fn agentd(program: &Path, folder: &Path) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let upstream = Upstream::start()?;
    let out = folder.join("callgrind.agentd");
    // Its pipes stand here too, so that nothing of it outlives a run.
    let control = folder.join("vgdb");
    let mut stage = agent::Stage::start(program, &valgrind(&control, &out), &upstream).await?;
    let mut counts = BTreeMap::new();
    for (number, phase) in (1..).zip(PHASES) {
        counts.insert(phase.0, phase_count(&mut stage, &control, &out, number, phase).await?);
    }
    drop(stage);
    counts.insert(INSPECTED, inspected(program, folder, &upstream).await?);
    Ok(counts)
}

/// Instructions of `agentd` for a small request with the inspector on.
async fn inspected(program: &Path, folder: &Path, upstream: &Upstream) -> anyhow::Result<u64> {
    let (control, out) = (folder.join("vgdb"), folder.join("callgrind.agentd.inspected"));
    let mut stage = agent::Stage::inspected(program, &valgrind(&control, &out), upstream).await?;
    let [(_, ask, before, count), ..] = PHASES;
    phase_count(&mut stage, &control, &out, 1, (INSPECTED, ask, before, count)).await
}

/// Counts, prints and judges what the inspector alone adds to a small request.
pub(crate) async fn inspection(program: &Path) -> anyhow::Result<bool> {
    let folder = tempfile::tempdir()?;
    let (folder, upstream) = (folder.path(), Upstream::start()?);
    let on = inspected(program, folder, &upstream).await?;
    let (control, out) = (folder.join("vgdb"), folder.join("callgrind.agentd"));
    let mut stage = agent::Stage::start(program, &valgrind(&control, &out), &upstream).await?;
    let off = phase_count(&mut stage, &control, &out, 1, PHASES[0]).await?;
    let (text, is_met) = added(off, on);
    println!("{off} instructions without, {on} with. {text}");
    Ok(is_met)
}

/// What the inspector adds, in words, and whether it may.
fn added(off: u64, on: u64) -> (String, bool) {
    let within = on * 100 <= off * (100 + INSPECTION);
    let change = (on as f64 / off as f64 - 1.0) * 100.0;
    let verdict = if within { "within" } else { "EXCEEDED" };
    let text = format!(
        "The inspector adds {change:.1} % to a small request, {INSPECTION} % are allowed: {verdict}."
    );
    (text, within)
}

/// Instructions for one of a phase, the `number`-th of this process.
async fn phase_count(
    stage: &mut agent::Stage,
    control: &Path,
    out: &Path,
    number: u32,
    (name, ask, before, count): (&str, Ask<'_>, usize, usize),
) -> anyhow::Result<u64> {
    let pid = stage.process.id();
    stage.line.load(&ask, 1, Until::Answers(before)).await?;
    tell(control, pid, "zero")?;
    stage.line.load(&ask, 1, Until::Answers(count)).await?;
    tell(control, pid, "dump")?;
    let dump = PathBuf::from(format!("{}.{number}", out.display()));
    let counted = total(&dump)? / count as u64;
    std::fs::rename(&dump, out.with_file_name(format!("callgrind.agentd.{name}")))?;
    Ok(counted)
}

/// Instructions of `local` and of each function for a small request through all of them.
async fn whole_path(program: &Path, folder: &Path) -> anyhow::Result<Counts> {
    let upstream = Upstream::start()?;
    let control = folder.join("vgdb");
    let wrapper = valgrind(&control, &folder.join("callgrind.%p"));
    let mut command = Command::new(&wrapper[0]);
    // The functions' processes as well, which `local` starts.
    command.args(&wrapper[1..]).arg("--trace-children=yes").arg(program);
    let local = Local::start_as(command, &[], &["--no-agent"]);
    let _agent = local.agent("bench", &format!("127.0.0.1:{}", upstream.port));
    let mut client =
        Client::connect(&Target { address: local.public, host: "bench.localhost".to_owned() }).await?;
    let (before, count) = WHOLE_PATH;
    ask(&mut client, before).await?;
    let processes = || {
        let mut all = local.function_processes();
        all.push((LOCAL.to_owned(), local.process().id()));
        all.sort();
        all
    };
    let all = processes();
    let counted: Vec<_> = all
        .iter()
        .filter_map(|(name, pid)| COUNTED.into_iter().find(|one| one == name).zip(Some(*pid)))
        .collect();
    for &(name, pid) in &counted {
        thaw(name, pid).await?;
        tell(&control, pid, "zero")?;
    }
    ask(&mut client, count).await?;
    // The start of a process would count for requests.
    ensure!(processes() == all, "a process of a function has started or ended meanwhile");
    let mut counts = Counts::new();
    for (name, pid) in counted {
        thaw(name, pid).await?;
        tell(&control, pid, "dump")?;
        let dump = folder.join(format!("callgrind.{pid}.1"));
        *counts.entry(name).or_default().entry("small_request").or_default() += total(&dump)? / count as u64;
        std::fs::rename(&dump, folder.join(format!("callgrind.{name}.{pid}")))?;
    }
    Ok(counts)
}

/// Sends small requests, one after the other.
async fn ask(client: &mut Client, count: usize) -> anyhow::Result<()> {
    for _ in 0..count {
        ensure!(client.call("/hello", None).await? == upstream::HELLO, "a wrong answer");
    }
    Ok(())
}

/// Lets a process go on that `local` has frozen, as it does with a function's after each event: it could not
/// answer. It then asks for its next event and does nothing until there is one.
async fn thaw(name: &str, pid: u32) -> anyhow::Result<()> {
    if name == LOCAL {
        return Ok(());
    }
    let stat = format!("/proc/{pid}/stat");
    let frozen = async || {
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    ::tests::eventually("the process is frozen", frozen).await;
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no pid")?;
    rustix::process::kill_process(pid, Signal::CONT).context("letting a process go on")
}

/// How a program is started under callgrind; its pipes are at `control`.
fn valgrind(control: &Path, out: &Path) -> Vec<String> {
    vec![
        "valgrind".to_owned(),
        "--quiet".to_owned(),
        "--tool=callgrind".to_owned(),
        format!("--vgdb-prefix={}", control.display()),
        format!("--callgrind-out-file={}", out.display()),
    ]
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

fn written(programs: &Counts) -> String {
    let mut text = String::from(
        "# Instructions for one of each, counted by callgrind in a build as it ships on x86-64 with AVX2.\n\
         # `bench budget` fails when a count is more than 5 % above; `bench budget --write` makes this file.\n",
    );
    for (program, counts) in programs {
        let _ = writeln!(text, "\n[{program}]");
        for (name, count) in counts.iter().filter(|(name, _)| **name != INSPECTED) {
            let _ = writeln!(text, "{name} = {count}");
        }
    }
    text
}

fn judged(programs: &Counts, budget: &Budget) -> (String, bool) {
    let mut table = String::from("| | instructions | budget | | |\n|---|---:|---:|---:|---|\n");
    let mut is_met = true;
    let all = programs.iter().flat_map(|(program, counts)| counts.iter().map(move |count| (program, count)));
    for (program, (name, &count)) in all.filter(|(_, (name, _))| **name != INSPECTED) {
        let Some(&allowed) = budget.0.get(*program).and_then(|all| all.get(*name)) else {
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
    let of_agentd = |name| programs.get("agentd").and_then(|counts| counts.get(name)).copied();
    if let (Some(off), Some(on)) = (of_agentd(PHASES[0].0), of_agentd(INSPECTED)) {
        let (text, within) = added(off, on);
        is_met &= within;
        let _ = writeln!(table, "\n{text}");
    }
    (table, is_met)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_agentd<const N: usize>(counts: [(&'static str, u64); N]) -> Counts {
        Counts::from([("agentd", BTreeMap::from(counts))])
    }

    #[test]
    fn five_percent_more_is_within_and_a_little_more_is_not() {
        let budget: Budget = toml::from_str("[agentd]\nsmall_request = 1000\n").unwrap();
        for (count, within) in [(900, true), (1050, true), (1051, false)] {
            assert_eq!(judged(&of_agentd([("small_request", count)]), &budget).1, within);
        }
        let unknown = judged(&of_agentd([("other", 1)]), &budget);
        assert!(!unknown.1 && unknown.0.contains("missing"), "{}", unknown.0);
    }

    #[test]
    fn the_inspector_may_add_a_tenth_and_no_more() {
        let budget: Budget = toml::from_str("[agentd]\nsmall_request = 1000\n").unwrap();
        for (on, within) in [(1100, true), (1101, false)] {
            let (table, is_met) =
                judged(&of_agentd([("small_request", 1000), ("small_request_inspected", on)]), &budget);
            assert_eq!(is_met, within, "{table}");
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut counts = of_agentd([("a", 1), ("b", 2)]);
        counts.insert("local", BTreeMap::from([("a", 3)]));
        let budget: Budget = toml::from_str(&written(&counts)).unwrap();
        assert!(judged(&counts, &budget).1);
    }
}
