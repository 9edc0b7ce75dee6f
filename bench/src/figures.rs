//! Figures of several rounds: enter one by one, leave as medians in a table or as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::usage;

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
    /// A number of things.
    #[serde(rename = "")]
    Count,
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
            Self::Count => "",
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

/// One line of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    name: String,
    unit: Unit,
    direct: Option<f64>,
    tunnel: f64,
    /// Tunnel less direct, for what takes time.
    added: Option<f64>,
    /// Tunnel by direct, for what is a rate.
    ratio: Option<f64>,
    /// The least and the most of the rounds, of the figure the goal is about.
    range: (f64, f64),
    goal: Option<Goal>,
    met: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Json {
    machine: String,
    rounds: usize,
    rows: Vec<Row>,
}

/// Every figure.
#[derive(Debug)]
pub(crate) struct Report {
    rounds: usize,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) const fn new(rounds: usize) -> Self {
        Self { rounds, lines: Vec::new() }
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
    pub(crate) fn json(&self) -> Json {
        Json { machine: usage::machine(), rounds: self.rounds, rows: self.rows() }
    }

    /// Everything, for people.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("{}; medians of {} rounds\n\n", usage::machine(), self.rounds);
        text.push_str("| | unit | direct | tunnel | compared | range of rounds | goal | |\n");
        text.push_str("|---|---|---:|---:|---:|---:|---|---|\n");
        for row in self.rows() {
            let compared = match (row.added, row.ratio) {
                (Some(added), _) if added < 0.0 => number(added),
                (Some(added), _) => format!("+{}", number(added)),
                (None, Some(ratio)) => format!("× {ratio:.3}"),
                (None, None) => String::new(),
            };
            let goal = match row.goal {
                Some(Goal::AtMost(most)) => format!("≤ {most}"),
                Some(Goal::AtLeast(least)) => format!("≥ {least}"),
                None => String::new(),
            };
            let met = row.met.map_or("", |met| if met { "met" } else { "missed" });
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {compared} | {} … {} | {goal} | {met} |",
                row.name,
                row.unit.text(),
                row.direct.map(number).unwrap_or_default(),
                number(row.tunnel),
                number(row.range.0),
                number(row.range.1),
            );
        }
        text
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
        Row {
            name: self.name.clone(),
            unit: self.unit,
            direct: (!direct.is_empty()).then(|| median(direct)),
            tunnel: median(tunnel),
            added: added.map(median),
            ratio: ratio.map(median),
            range: (least, most),
            goal: self.goal,
            met,
        }
    }
}

/// Three digits that count.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    quantile(&mut all, 0.5)
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
    }

    #[test]
    fn a_goal_is_about_what_is_added_or_about_the_rate() {
        let mut report = Report::new(1);
        report.note("delay", Unit::Millis, Some(Goal::AtMost(2.0)), Some(1.0), 2.5);
        report.note("rate", Unit::PerSecond, Some(Goal::AtLeast(10.0)), Some(100.0), 9.0);
        let rows = report.rows();
        assert_eq!((rows[0].added, rows[0].met), (Some(1.5), Some(true)));
        assert_eq!((rows[1].ratio, rows[1].met), (Some(0.09), Some(false)));
    }
}
