//! Logs: for people on a terminal, one JSON object a line elsewhere. They go to standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Short lines for people.
    Human,
    /// One JSON object for each event.
    Json,
}

/// Starts logging. A process that already logs goes on as it does.
pub(crate) fn start(format: Option<LogFormat>, level: Targets) {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Human } else { LogFormat::Json });
    let registry = tracing_subscriber::registry().with(level);
    // An error means that somebody in this process logs already.
    let _ = match format {
        LogFormat::Human => registry
            .with(fmt::layer().with_writer(std::io::stderr).with_ansi(terminal).with_target(false))
            .try_init(),
        LogFormat::Json => {
            registry.with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
        }
    };
}
