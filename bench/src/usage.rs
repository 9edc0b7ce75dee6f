//! What processes use, as the kernel counts it: enters a process id, leaves CPU time or memory.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use tests::{Agent, Local};

/// The CPU time that a process has used so far, all threads, those that have ended too.
pub(crate) fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_micros(ticks * 1_000_000 / rustix::param::clock_ticks_per_second()))
}

/// The CPU time of everything that takes part, by what it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cpu(BTreeMap<(String, u32), Duration>);

impl Cpu {
    /// As it stands now.
    pub(crate) fn now(local: &Local, agent: &Agent) -> Self {
        let mut all = local.function_processes();
        all.push(("local".to_owned(), local.process().id()));
        all.push(("agentd".to_owned(), agent.process().id()));
        Self(all.into_iter().filter_map(|process| cpu_time(process.1).map(|time| (process, time))).collect())
    }

    /// What was used since `before`, by name. What a process used that has ended is not known.
    pub(crate) fn since(&self, before: &Self) -> BTreeMap<String, Duration> {
        let mut used = BTreeMap::new();
        for (process, time) in &self.0 {
            let before = before.0.get(process).copied().unwrap_or_default();
            *used.entry(process.0.clone()).or_default() += time.saturating_sub(before);
        }
        used
    }
}

/// The resident memory of everything that takes part, in 10^6 bytes; of several processes of one function,
/// the largest.
pub(crate) fn memory(local: &Local, agent: &Agent) -> BTreeMap<String, f64> {
    let mut all = local.function_processes();
    all.push(("local".to_owned(), local.process().id()));
    all.push(("agentd".to_owned(), agent.process().id()));
    let mut found = BTreeMap::<String, f64>::new();
    for (name, pid) in all {
        let bytes = tests::resident_bytes(pid).unwrap_or_default() as f64 / 1e6;
        let most = found.entry(name).or_default();
        *most = most.max(bytes);
    }
    found
}

/// The CPU time of all of these together, in seconds.
pub(crate) fn cpu_seconds(pids: impl IntoIterator<Item = u32>) -> f64 {
    pids.into_iter().filter_map(cpu_time).sum::<Duration>().as_secs_f64()
}

/// Now, as HTTP writes it.
pub(crate) fn date() -> String {
    httpdate::fmt_http_date(SystemTime::now())
}

/// Processor, cores and kernel, in one line.
pub(crate) fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let model = model.trim_start_matches([' ', '\t', ':']).to_owned();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cores} cores, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}
