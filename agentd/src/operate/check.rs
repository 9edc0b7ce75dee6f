//! `agentd config check`.

use std::process::ExitCode;

use super::exit;
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
        let answer = match config {
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
        println!("{}", serde_json::to_string(&answer).expect("texts and numbers are JSON"));
    }
    match config {
        Ok(config) if !json => {
            println!("the configuration is valid: {} tunnels to {}", config.tunnels.len(), config.edge.url);
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(_) if json => ExitCode::from(exit::BAD_CONFIG),
        Err(error) => {
            eprintln!("agentd: {error}");
            ExitCode::from(exit::BAD_CONFIG)
        }
    }
}
