//! The process that outlives the one which serves, to tell agents that it is gone.
//!
//! `relay` is two processes. The first one starts the second, which serves, and is told by it through a socket which
//! WebSockets it holds and over which connections. If the second dies without having closed them (killed, out of memory),
//! the first one has each agent close its upstream's end at once; otherwise an agent would learn it only from
//! its own questions, after up to eleven minutes. Then it ends as well: whoever started it starts it again. If the first dies,
//! the second drains. Nothing of this is a call to AWS while both live.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    os::unix::net::UnixStream as StdStream,
    process::{ExitCode, ExitStatus, Stdio},
};

use anyhow::Context as _;
use edge::{agent_link::AgentLink, aws::Aws, config::Env};
use exchange::socket::Holding;
use futures_util::{StreamExt as _, stream};
use proto::{
    id::{ConnectionId, RequestId},
    message::{Cancel, EdgeMessage},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

/// Set for the process that serves, whose standard input is the socket to the first one.
pub const ENV_SERVES: &str = "TUNNEL_RELAY_SERVES";

/// How many agents are told at the same time.
const PARALLEL: usize = 20;

/// Starts the process that serves, and looks after what it leaves behind.
///
/// # Errors
///
/// When it cannot be started, or the environment is wrong.
pub async fn run(env: &Env<'_>) -> anyhow::Result<ExitCode> {
    let link = AgentLink::from_env(&Aws::from_env(env)?, env)?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for signals")?;
    let (mut child, ledger) = start()?;
    let reading = read(ledger);
    let mut reading = std::pin::pin!(reading);
    let mut held = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.context("waiting for the process that serves")?,
            left = &mut reading, if held.is_none() => held = Some(left),
            _ = terminate.recv() => end(&child),
            _ = interrupt.recv() => end(&child),
        }
    };
    // Everything it said before its end is there to be read.
    let held = match held {
        Some(held) => held,
        None => reading.await,
    };
    if !held.is_empty() {
        tracing::error!(%status, sockets = held.len(), "relay died; agents are told");
        tell(&link, held).await;
    }
    Ok(code(status))
}

fn start() -> anyhow::Result<(Child, UnixStream)> {
    let (own, theirs) = StdStream::pair().context("making a socket")?;
    own.set_nonblocking(true).context("making a socket")?;
    let child = Command::new(std::env::current_exe().context("finding this program")?)
        .args(std::env::args_os().skip(1))
        .env(ENV_SERVES, "true")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .kill_on_drop(true)
        .spawn()
        .context("starting the process that serves")?;
    Ok((child, UnixStream::from_std(own).context("making a socket")?))
}

fn end(child: &Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Follows what the other process holds until it ends, and leaves what it held then.
async fn read(ledger: UnixStream) -> HashMap<String, String> {
    let mut held = HashMap::new();
    let mut lines = BufReader::new(ledger).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        enter(&mut held, &line);
    }
    held
}

/// A line is a request and the connection to its agent, or a request alone that is over.
fn enter(held: &mut HashMap<String, String>, line: &str) {
    match line.split_once(' ') {
        Some((request, connection)) => {
            held.insert(request.to_owned(), connection.to_owned());
        }
        None => {
            held.remove(line);
        }
    }
}

async fn tell(link: &AgentLink, held: HashMap<String, String>) {
    let parsed = held.into_iter().filter_map(|(request, connection)| {
        Some((request.parse::<RequestId>().ok()?, connection.parse::<ConnectionId>().ok()?))
    });
    stream::iter(parsed)
        .for_each_concurrent(PARALLEL, async |(request_id, connection)| {
            let cancel = EdgeMessage::Cancel(Cancel { request_id: request_id.clone() });
            if let Err(error) = link.post(&connection, &cancel).await {
                tracing::warn!(%request_id, %error, "agent was not told");
            }
        })
        .await;
}

/// In the process that serves: tells the first one what it holds, and drains once that one is gone.
///
/// # Errors
///
/// When standard input is not the socket.
pub fn report(
    mut holdings: mpsc::UnboundedReceiver<Holding>,
    drain: CancellationToken,
) -> anyhow::Result<()> {
    let fd = rustix::io::dup(std::io::stdin()).context("taking the socket")?;
    let stream = StdStream::from(fd);
    stream.set_nonblocking(true).context("taking the socket")?;
    let (mut ended, mut ledger) = UnixStream::from_std(stream).context("taking the socket")?.into_split();
    tokio::task::spawn_local(async move {
        while let Some(holding) = holdings.recv().await {
            let line = match holding {
                Holding::Held(request, connection) => format!("{request} {connection}\n"),
                Holding::Over(request) => format!("{request}\n"),
            };
            if ledger.write_all(line.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    tokio::task::spawn_local(async move {
        // Nothing is ever said: it becomes readable at the end.
        let _ = tokio::io::AsyncReadExt::read(&mut ended, &mut [0]).await;
        // Before it is said: who read the log may be gone with it, and then saying so is the end of this task.
        drain.cancel();
        tracing::error!("the first process of relay is gone");
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_held_at_the_end_is_what_was_not_said_to_be_over() {
        let (own, mut theirs) = UnixStream::pair().unwrap();
        let held = tokio::spawn(read(own));
        theirs.write_all(b"a c1=\nb c1=\nc c2=\na\nb c3=\nd\ncut").await.unwrap();
        drop(theirs);
        let held = held.await.unwrap();
        // A line that was cut off names nothing that is held.
        assert_eq!(held, HashMap::from([("b".into(), "c3=".into()), ("c".into(), "c2=".into())]));
    }
}
