//! `agentd config check`.

use std::process::ExitCode;

use super::{
    exit,
    output::{answer, complain},
};
use crate::config::{Config, ConfigError};

/// What `config check --json` answers.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Checked<'a> {
    Valid { ok: bool, edge: String, tunnels: Vec<CheckedTunnel> },
    Invalid { ok: bool, error: &'a ConfigError },
}

#[derive(serde::Serialize)]
struct CheckedTunnel {
    name: String,
    upstream: Option<String>,
}

/// Prints whether the configuration is valid, and what is wrong if not.
pub(crate) fn run(config: &Result<Config, ConfigError>, json: bool) -> ExitCode {
    if json {
        let checked = match config {
            Ok(config) => Checked::Valid {
                ok: true,
                edge: config.edge.url.to_string(),
                tunnels: config
                    .tunnels
                    .iter()
                    .map(|tunnel| CheckedTunnel {
                        name: tunnel.name.to_string(),
                        upstream: tunnel.upstream.as_ref().map(ToString::to_string),
                    })
                    .collect(),
            },
            Err(error) => Checked::Invalid { ok: false, error },
        };
        let said = serde_json::to_string(&checked).expect("texts and numbers are JSON");
        let code = if config.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(exit::BAD_CONFIG) };
        return answer(&format!("{said}\n"), code);
    }
    match config {
        Ok(config) => {
            let said = format!(
                "the configuration is valid: {} tunnels to {}\n",
                config.tunnels.len(),
                config.edge.url
            );
            answer(&said, ExitCode::SUCCESS)
        }
        Err(error) => {
            complain(error);
            ExitCode::from(exit::BAD_CONFIG)
        }
    }
}
