//! How a function logs: one line an event on standard error, JSON where Lambda asks for it.

use tracing_subscriber::{EnvFilter, fmt};

/// Installs the subscriber of this process, and reads where its metrics go.
///
/// `AWS_LAMBDA_LOG_FORMAT=JSON` and `AWS_LAMBDA_LOG_LEVEL` are set by Lambda's advanced logging
/// controls; without them lines are text at the level `info`. A second call changes nothing.
pub fn init() {
    crate::metrics::init();
    let level = std::env::var("AWS_LAMBDA_LOG_LEVEL").unwrap_or_default();
    let level = if level.is_empty() { "info".to_owned() } else { level.to_lowercase() };
    // Below `info` these print whole events and header fields, and with them tokens.
    let quiet =
        ["lambda_runtime", "lambda_runtime_api_client", "hyper", "h2", "aws_config", "aws_smithy_runtime"];
    let directives = quiet.iter().fold(level, |all, target| format!("{all},{target}=info"));
    let filter = EnvFilter::try_new(directives);
    let subscriber = fmt()
        .with_env_filter(filter.unwrap_or_else(|_| EnvFilter::new("info")))
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    let json = std::env::var("AWS_LAMBDA_LOG_FORMAT").is_ok_and(|format| format.eq_ignore_ascii_case("json"));
    let result = if json {
        // With the time: Lambda takes a line without one for level `INFO`, whatever it says.
        subscriber.json().flatten_event(true).try_init()
    } else {
        // Whoever reads the pipe stamps the time.
        subscriber.without_time().try_init()
    };
    // Only a second call fails; the first subscriber stays.
    drop(result);
}
