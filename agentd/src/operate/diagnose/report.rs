//! What a diagnosis found, in grouped lines. No IO of its own.

use std::fmt;

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Warn,
    /// Public requests do not get through because of it.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "[ OK ]",
            Self::Warn => "[WARN]",
            Self::Fail => "[FAIL]",
        })
    }
}

/// The lines so far. Each is shown at once, since the next step may take its time.
pub(super) struct Report {
    show: fn(&str),
    text: String,
    warnings: usize,
    failures: usize,
}

impl Report {
    pub(super) fn new(show: fn(&str)) -> Self {
        let mut report = Self { show, text: String::new(), warnings: 0, failures: 0 };
        report.push(format!("agentd {}", env!("CARGO_PKG_VERSION")));
        report
    }

    fn push(&mut self, line: String) {
        (self.show)(&line);
        self.text.push_str(&line);
        self.text.push('\n');
    }

    /// Begins a group of lines.
    pub(super) fn group(&mut self, title: &str) {
        self.push(format!("\n{title}"));
    }

    /// Adds the result of one step.
    pub(super) fn line(&mut self, verdict: Verdict, what: String) {
        match verdict {
            Verdict::Ok => {}
            Verdict::Warn => self.warnings += 1,
            Verdict::Fail => self.failures += 1,
        }
        // What a peer said may hold anything.
        let what: String = what.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.push(format!("  {verdict} {what}"));
    }

    /// Whether any step failed.
    pub(super) const fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// Everything in one sentence.
    pub(super) fn summary(&self) -> String {
        match (self.failures, self.warnings) {
            (0, 0) => "All is well.".to_owned(),
            (0, warnings) => format!("It works; warnings: {warnings}."),
            (failures, warnings) => format!("It does not work; failures: {failures}, warnings: {warnings}."),
        }
    }

    /// All lines.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_grouped_and_summed_up() {
        let mut report = Report::new(|_| {});
        report.group("Edge");
        report.line(Verdict::Ok, "DNS".into());
        assert_eq!(report.summary(), "All is well.");
        report.line(Verdict::Warn, "slow\nline".into());
        assert_eq!(report.summary(), "It works; warnings: 1.");
        report.line(Verdict::Fail, "TCP".into());
        assert!(report.has_failed());
        assert_eq!(report.summary(), "It does not work; failures: 1, warnings: 1.");
        let lines: Vec<_> = report.text().lines().skip(1).collect();
        assert_eq!(lines, ["", "Edge", "  [ OK ] DNS", "  [WARN] slow line", "  [FAIL] TCP"]);
    }
}
