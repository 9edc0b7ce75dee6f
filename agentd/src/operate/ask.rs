//! The commands that ask a running agent.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use rustix::process::Pid;

pub(super) use super::output::complain;
use super::{
    exit,
    output::{answer, print, stopped},
};
use crate::{
    control::client::{Agent, AskError},
    operate::background::{Process, STOP_MARGIN},
    report::status::{Status, list},
};

/// How often an agent that is not ready is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// How long an agent that does not answer is waited for, if nobody wants to wait longer.
const LOOK: Duration = Duration::from_secs(5);

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object, for programs.
    Json,
}

impl Format {
    pub(crate) const fn from_flag(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }

    /// Prints an answer that is there.
    fn print<T: serde::Serialize + ?Sized>(self, value: &T, text: impl FnOnce() -> String) -> ExitCode {
        let text = match self {
            Self::Json => format!("{}\n", json(value)),
            Self::Text => text(),
        };
        answer(&text, ExitCode::SUCCESS)
    }
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("texts, numbers and lists are JSON")
}

/// What `--json` says where there is no answer.
#[derive(serde::Serialize)]
struct NoAnswer {
    running: bool,
    error: String,
}

pub(super) fn no_answer(error: &AskError, format: Format) -> ExitCode {
    let running = !matches!(error, AskError::NotRunning(_));
    match format {
        Format::Json => {
            let said = json(&NoAnswer { running, error: error.to_string() });
            return answer(&format!("{said}\n"), ExitCode::FAILURE);
        }
        Format::Text => complain(error),
    }
    ExitCode::FAILURE
}

/// Runs one question to its end.
fn block_on<T>(future: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

pub(super) fn ask<T>(
    places: &[PathBuf],
    question: impl AsyncFnOnce(&mut Agent) -> Result<T, AskError>,
) -> Result<T, AskError> {
    block_on(async {
        let mut agent = Agent::find(places).await?;
        question(&mut agent).await
    })
    .unwrap_or_else(|source| Err(AskError::Broken { path: PathBuf::new(), source }))
}

/// The state of the agent at one of `places`.
pub(crate) fn find(places: &[PathBuf]) -> Result<Status, AskError> {
    ask(places, async |agent: &mut Agent| agent.status().await)
}

/// `agentd status`: code 0 if an agent runs.
pub(crate) fn status(places: &[PathBuf], format: Format) -> ExitCode {
    match find(places) {
        Ok(status) => format.print(&status, || status.to_text()),
        Err(AskError::NotRunning(_)) if format == Format::Text => answer("not running\n", ExitCode::FAILURE),
        Err(error) => no_answer(&error, format),
    }
}

/// `agentd tunnel list`
pub(crate) fn tunnel_list(places: &[PathBuf], format: Format) -> ExitCode {
    match find(places) {
        Ok(status) => format.print(&status.tunnels, || list(&status.tunnels)),
        Err(error) => no_answer(&error, format),
    }
}

/// `agentd tunnel info`
pub(crate) fn tunnel_info(places: &[PathBuf], name: &str, format: Format) -> ExitCode {
    let status = match find(places) {
        Ok(status) => status,
        Err(error) => return no_answer(&error, format),
    };
    match status.tunnels.iter().find(|tunnel| tunnel.name == name) {
        Some(tunnel) => format.print(tunnel, || tunnel.to_text()),
        None => {
            let names: Vec<&str> = status.tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
            let error = format!("the agent has no tunnel {name:?}; it has {}", names.join(", "));
            no_answer(&AskError::Refused(error), format)
        }
    }
}

/// `agentd reload`
pub(crate) fn reload(places: &[PathBuf], format: Format) -> ExitCode {
    match ask(places, async |agent: &mut Agent| agent.reload().await) {
        Ok(change) => format.print(&change, || format!("{}\n", change.to_text())),
        Err(AskError::Refused(error)) => {
            let error = AskError::Refused(format!("nothing was changed: {error}"));
            no_answer(&error, format);
            ExitCode::from(exit::BAD_CONFIG)
        }
        Err(error) => no_answer(&error, format),
    }
}

/// `agentd ready`: code 0 if every tunnel is open, within `patience`.
pub(crate) fn ready(places: &[PathBuf], patience: Duration) -> ExitCode {
    let begun = Instant::now();
    loop {
        let left = patience.saturating_sub(begun.elapsed()).max(LOOK);
        let reason = match ask(places, async |agent: &mut Agent| agent.status_within(left).await) {
            Ok(status) => match status.readiness() {
                Ok(()) => {
                    let said = format!("ready: {} tunnels are open\n", status.tunnels.len());
                    return answer(&said, ExitCode::SUCCESS);
                }
                Err(reason) => reason,
            },
            Err(error) => error.to_string(),
        };
        if begun.elapsed() >= patience {
            complain(format_args!("not ready: {reason}"));
            return ExitCode::FAILURE;
        }
        std::thread::sleep(ASK_AGAIN.min(patience.saturating_sub(begun.elapsed())));
    }
}

/// `agentd stop` for an agent that was not started into the background.
pub(crate) fn stop(places: &[PathBuf]) -> ExitCode {
    let stopping = ask(places, async |agent: &mut Agent| {
        let status = agent.status().await?;
        if status.systemd {
            let error = format!(
                "pid {} is looked after by systemd, which would start it again: use systemctl stop",
                status.pid
            );
            return Err(AskError::Refused(error));
        }
        // Opened before it ends, so that it cannot be mistaken for another.
        let pid = i32::try_from(status.pid).ok().and_then(Pid::from_raw);
        let process = pid.map(Process::open).transpose();
        Ok((process, agent.stop().await?))
    });
    let (process, stopping) = match stopping {
        Ok((Ok(Some(Some(process))), stopping)) => (process, stopping),
        Ok((Ok(None | Some(None)), _)) | Err(AskError::NotRunning(_)) => {
            return answer("not running\n", ExitCode::SUCCESS);
        }
        Ok((Err(error), _)) => {
            complain(error);
            return ExitCode::FAILURE;
        }
        Err(error) => {
            complain(error);
            return ExitCode::FAILURE;
        }
    };
    // What was asked for goes on whether or not this can be read; the last line says how it ended.
    let _ = print(&format!("stopping pid {}: {} requests in flight\n", stopping.pid, stopping.in_flight));
    match process.wait(Duration::from_millis(stopping.grace_ms) + STOP_MARGIN) {
        Ok(took) => stopped(took),
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}
