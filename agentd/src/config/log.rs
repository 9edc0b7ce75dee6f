//! What is logged, how and where: the settings.

use std::path::PathBuf;

use tracing_subscriber::filter::{LevelFilter, Targets};

/// How many days of log files are kept, unless configured otherwise.
pub const DEFAULT_LOG_DAYS: u32 = 14;

/// What is logged, how and where.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogConfig {
    /// What is logged.
    pub level: Option<Targets>,
    /// How lines look.
    pub format: Option<LogFormat>,
    /// The folder of the log files; standard error or the journal without one.
    pub dir: Option<PathBuf>,
    /// How many days of log files are kept.
    pub keep_days: Option<u32>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Short lines for people.
    Human,
    /// One JSON object for each event.
    Json,
    /// Entries of the systemd journal, with their fields.
    Journal,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        <Self as clap::ValueEnum>::from_str(text, false)
            .map_err(|_| format!("{text:?} is none of \"human\", \"json\" and \"journal\""))
    }
}

/// Reads what is logged: a level for everything, `target=level` for a part, or both with commas.
///
/// # Errors
///
/// A sentence for the user. A lone word that is no level is one: it would be taken for a target, and
/// silence everything else. So is nothing at all, which would silence everything.
pub fn parse_log_level(text: &str) -> Result<Targets, String> {
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    let is_known = |part: &str| part.contains('=') || is_level(part.trim());
    let targets = text.split(',').all(is_known).then(|| text.parse().ok()).flatten();
    targets.ok_or_else(|| {
        format!("{text:?} is not a level: use error, warn, info, debug or trace, or target=level")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_silence_the_log_is_no_level() {
        for text in ["", " ", ",", "info,", "nonsense", "agentd=debug,"] {
            assert!(parse_log_level(text).is_err(), "{text:?}");
        }
        for text in ["info", "off", "WARN", "agentd=debug,info", "info, agentd=trace"] {
            assert!(parse_log_level(text).is_ok(), "{text:?}");
        }
    }
}
