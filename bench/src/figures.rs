//! Figures of several rounds: enter one by one, leave as medians in tables or as JSON.
//!
//! The name of a figure begins with the part it belongs to: `latency: …`.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use crate::{parts, usage};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Milliseconds.
    #[serde(rename = "ms")]
    Millis,
    /// Microseconds.
    #[serde(rename = "µs")]
    Micros,
    /// Requests in a second.
    #[serde(rename = "req/s")]
    PerSecond,
    /// 10^6 bytes in a second.
    #[serde(rename = "MB/s")]
    Throughput,
    /// 10^6 bytes.
    #[serde(rename = "MB")]
    Memory,
    /// Bytes.
    #[serde(rename = "B")]
    Bytes,
    /// 1000 bytes.
    #[serde(rename = "KB")]
    Kilobytes,
    /// A number of things.
    #[serde(rename = "count")]
    Count,
    /// Requests without their own, whole answer. One of them makes the run fail.
    #[serde(rename = "errors")]
    Errors,
    /// What HTTP says of a request.
    #[serde(rename = "status")]
    Status,
}

impl Unit {
    const fn text(self) -> &'static str {
        match self {
            Self::Millis => "ms",
            Self::Micros => "µs",
            Self::PerSecond => "req/s",
            Self::Throughput => "MB/s",
            Self::Memory => "MB",
            Self::Bytes => "B",
            Self::Kilobytes => "KB",
            Self::Count => "",
            Self::Errors => "errors",
            Self::Status => "status",
        }
    }
}

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// No more than that: of what the tunnel adds, where there is a direct figure.
    AtMost(f64),
    /// No less than that.
    AtLeast(f64),
}

/// One line of the table, before medians.
#[derive(Debug)]
struct Line {
    name: String,
    unit: Unit,
    goal: Option<Goal>,
    /// (direct, through the tunnel), once for each round.
    rounds: Vec<(Option<f64>, f64)>,
}

/// One line of a table.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    part: String,
    name: String,
    unit: Unit,
    /// The same without the tunnel, where that can be had.
    direct: Option<f64>,
    measured: f64,
    /// Measured less direct, for what takes time.
    added: Option<f64>,
    /// Measured by direct, for what is a rate.
    ratio: Option<f64>,
    /// The least and the most of the rounds, of the figure the goal is about.
    range: (f64, f64),
    goal: Option<Goal>,
    met: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Json<'r> {
    machine: String,
    date: String,
    version: &'static str,
    size: &'r str,
    rounds: usize,
    method: &'static str,
    /// What each part measures.
    parts: BTreeMap<String, &'static str>,
    rows: Vec<Row>,
}

/// What is true of every figure.
const METHOD: &str = "The real binaries over loopback (`local --front direct`: nothing of AWS's fronts is in it), beside an upstream in \
a process of its own; load generator, upstream and everything else share the machine. A figure is the median of the rounds, with their range; what takes time is also given as what is \
added to the direct way, which takes turns with the tunnel. Every answer is checked.";

/// Every figure.
#[derive(Debug)]
pub(crate) struct Report {
    /// How much is measured: `quick` or `full`.
    size: &'static str,
    rounds: usize,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) const fn new(size: &'static str, rounds: usize) -> Self {
        Self { size, rounds, lines: Vec::new() }
    }

    /// Counts requests that failed; there must be none.
    pub(crate) fn note_errors(&mut self, name: impl Into<String>, errors: u64) {
        // Counts are whole numbers far below what a float holds.
        self.note(name, Unit::Errors, Some(Goal::AtMost(0.0)), None, errors as f64);
    }

    /// Whether any request has failed, in any round.
    pub(crate) fn has_errors(&self) -> bool {
        let errors = self.lines.iter().filter(|line| line.unit == Unit::Errors);
        errors.flat_map(|line| &line.rounds).any(|round| round.1 > 0.0)
    }

    /// Adds what one round has found.
    pub(crate) fn note(
        &mut self,
        name: impl Into<String>,
        unit: Unit,
        goal: Option<Goal>,
        direct: Option<f64>,
        tunnel: f64,
    ) {
        let name = name.into();
        match self.lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.rounds.push((direct, tunnel)),
            None => self.lines.push(Line { name, unit, goal, rounds: vec![(direct, tunnel)] }),
        }
    }

    /// Adds the three quantiles of two sets of durations in milliseconds; `goals` are for p50 and p95.
    pub(crate) fn note_delays(
        &mut self,
        name: &str,
        direct: &mut [f64],
        tunnel: &mut [f64],
        goals: [Option<f64>; 3],
    ) {
        for (percent, goal) in [50, 95, 99].into_iter().zip(goals) {
            let at = |all: &mut [f64]| quantile(all, f64::from(percent) / 100.0);
            self.note(
                format!("{name} p{percent}"),
                Unit::Millis,
                goal.map(Goal::AtMost),
                Some(at(direct)),
                at(tunnel),
            );
        }
    }

    fn rows(&self) -> Vec<Row> {
        self.lines.iter().map(Line::row).collect()
    }

    /// Everything, for programs.
    pub(crate) fn json(&self) -> Json<'_> {
        let rows = self.rows();
        Json {
            machine: usage::machine(),
            date: usage::date(),
            version: env!("CARGO_PKG_VERSION"),
            size: self.size,
            rounds: self.rounds,
            method: METHOD,
            parts: rows.iter().map(|row| (row.part.clone(), parts::method_of(&row.part))).collect(),
            rows,
        }
    }

    /// Everything, for people: a table for each part.
    pub(crate) fn table(&self) -> String {
        let rows = self.rows();
        let mut text = format!(
            "{}; {}; {}, medians of {} round(s)\n\n{METHOD}\n",
            usage::machine(),
            usage::date(),
            self.size,
            self.rounds
        );
        for part in rows.chunk_by(|one, other| one.part == other.part) {
            let _ = writeln!(text, "\n## {}\n\n{}\n", part[0].part, parts::method_of(&part[0].part));
            let is_compared = part.iter().any(|row| row.direct.is_some());
            text.push_str(if is_compared {
                "| | unit | direct | tunnel | added, or by direct | of the rounds | goal | |\n\
                 |---|---|---:|---:|---:|---:|---|---|\n"
            } else {
                "| | unit | measured | of the rounds | goal | |\n|---|---|---:|---:|---|---|\n"
            });
            for row in part {
                let _ = writeln!(text, "{}", row.line(is_compared));
            }
        }
        text
    }
}

impl Row {
    fn line(&self, is_compared: bool) -> String {
        let compared = match (self.added, self.ratio) {
            (Some(added), _) if added < 0.0 => number(added),
            (Some(added), _) => format!("+{}", number(added)),
            (None, Some(ratio)) => format!("× {ratio:.3}"),
            (None, None) => String::new(),
        };
        let goal = match self.goal {
            Some(Goal::AtMost(most)) => format!("≤ {most}"),
            Some(Goal::AtLeast(least)) => format!("≥ {least}"),
            None => String::new(),
        };
        let range = match self.range {
            (least, most) if least < most => format!("{} … {}", number(least), number(most)),
            _ => String::new(),
        };
        let met = self.met.map_or("", |met| if met { "met" } else { "**missed**" });
        let (name, unit, measured) = (&self.name, self.unit.text(), number(self.measured));
        if is_compared {
            let direct = self.direct.map(number).unwrap_or_default();
            format!("| {name} | {unit} | {direct} | {measured} | {compared} | {range} | {goal} | {met} |")
        } else {
            format!("| {name} | {unit} | {measured} | {range} | {goal} | {met} |")
        }
    }
}

impl Line {
    fn row(&self) -> Row {
        let is_time = matches!(self.unit, Unit::Millis | Unit::Micros);
        let direct: Vec<f64> = self.rounds.iter().filter_map(|round| round.0).collect();
        let tunnel: Vec<f64> = self.rounds.iter().map(|round| round.1).collect();
        let paired = |of: fn(f64, f64) -> f64| -> Option<Vec<f64>> {
            self.rounds.iter().map(|&(direct, tunnel)| direct.map(|direct| of(tunnel, direct))).collect()
        };
        let added = if is_time { paired(|tunnel, direct| tunnel - direct) } else { None };
        let ratio = if is_time { None } else { paired(|tunnel, direct| tunnel / direct) };
        let judged = added.as_ref().unwrap_or(&tunnel).clone();
        let value = median(judged.clone());
        let met = self.goal.map(|goal| match goal {
            Goal::AtMost(most) => value <= most,
            Goal::AtLeast(least) => value >= least,
        });
        let least = judged.iter().copied().fold(f64::INFINITY, f64::min);
        let most = judged.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (part, name) = self.name.split_once(": ").unwrap_or(("", &self.name));
        Row {
            part: part.to_owned(),
            name: name.to_owned(),
            unit: self.unit,
            direct: (!direct.is_empty()).then(|| median(direct)),
            measured: median(tunnel),
            added: added.map(median),
            ratio: ratio.map(median),
            range: (least, most),
            goal: self.goal,
            met,
        }
    }
}

/// Three digits that count; whole numbers as they are.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The value in the middle, or between the two there; 0 for none at all.
pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    let half = all.len() / 2;
    match all.len() {
        0 => 0.0,
        count if count.is_multiple_of(2) => f64::midpoint(all[half - 1], all[half]),
        _ => all[half],
    }
}

/// The value below which `part` of all values are; 0 for none at all.
pub(crate) fn quantile(all: &mut [f64], part: f64) -> f64 {
    all.sort_by(f64::total_cmp);
    let last = all.len().saturating_sub(1);
    // Figures are few enough for a float to count them.
    all.get((last as f64 * part).round() as usize).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_medians() {
        let mut all: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut all, 0.5), 50.0);
        assert_eq!(quantile(&mut all, 0.95), 95.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn a_goal_is_about_what_is_added_or_about_the_rate() {
        let mut report = Report::new("quick", 1);
        report.note("delay", Unit::Millis, Some(Goal::AtMost(2.0)), Some(1.0), 2.5);
        report.note("rate", Unit::PerSecond, Some(Goal::AtLeast(10.0)), Some(100.0), 9.0);
        let rows = report.rows();
        assert_eq!((rows[0].added, rows[0].met), (Some(1.5), Some(true)));
        assert_eq!((rows[1].ratio, rows[1].met), (Some(0.09), Some(false)));
    }

    #[test]
    fn one_error_in_any_round_is_an_error() {
        let mut report = Report::new("quick", 3);
        for errors in [0, 0, 1] {
            assert!(!report.has_errors());
            report.note_errors("load: errors", errors);
        }
        assert!(report.has_errors());
    }

    #[test]
    fn a_table_for_each_part_says_what_it_measures() {
        let mut report = Report::new("quick", 1);
        report.note("latency: p50", Unit::Millis, None, Some(1.0), 2.5);
        report.note("start: ready", Unit::Millis, Some(Goal::AtMost(25.0)), None, 30.0);
        let table = report.table();
        assert!(table.contains("| p50 | ms | 1 | 2.50 | +1.50 |  |  |  |"), "{table}");
        assert!(table.contains("| ready | ms | 30 |  | ≤ 25 | **missed** |"), "{table}");
        assert_eq!(table.matches("\n## ").count(), 2);
        let json = report.json();
        assert_eq!(json.parts.len(), 2);
        assert!(json.parts.values().all(|method| !method.is_empty()));
    }
}
