//! The process of `relay`: started, watched, started again, and told to end.
//!
//! It is given what its task is given on ECS, and runs while one is to run. Leaves: where it listens.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::watch,
    time,
};
use tokio_util::sync::CancellationToken;

use crate::lambda::{Printed, process};

/// How long after its end it is started again.
const RESTART: Duration = Duration::from_millis(200);

/// How long it may take to listen.
const START_TIME: Duration = Duration::from_secs(15);

/// How often it is looked whether it listens.
const LOOK: Duration = Duration::from_millis(20);

/// How long it has for its end.
const END_TIME: Duration = Duration::from_secs(5);

/// The variable that says where to listen.
pub const ENV_LISTEN: &str = edge::config::env::RELAY_LISTEN;

/// Keeps a relay running until `stop`, while there is a task to run, and says where it is. `printed` is told of each line
/// on its standard output.
pub async fn keep(
    environment: BTreeMap<String, String>,
    printed: Printed,
    mut tasks: watch::Receiver<u32>,
    address: watch::Sender<Option<SocketAddr>>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            awake = tasks.wait_for(|&tasks| tasks > 0) => if awake.is_err() { return },
            () = stop.cancelled() => return,
        }
        match start(&environment, &printed).await {
            Ok((mut child, at)) => {
                let up = listens(at);
                tokio::select! {
                    is_up = up => if is_up { let _ = address.send(Some(at)); },
                    _ = child.wait() => {}
                    () = stop.cancelled() => {}
                }
                tokio::select! {
                    status = child.wait() => {
                        tracing::warn!(status = ?status.ok(), "relay ended and is started again");
                    }
                    _ = tasks.wait_for(|&tasks| tasks == 0) => {
                        tracing::info!("relay is put to sleep");
                        let _ = address.send(None);
                        end(child).await;
                        continue;
                    }
                    () = stop.cancelled() => {
                        let _ = address.send(None);
                        end(child).await;
                        return;
                    }
                }
                let _ = address.send(None);
            }
            Err(error) => tracing::error!("relay was not started: {error:#}"),
        }
        tokio::select! {
            () = time::sleep(RESTART) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn start(
    environment: &BTreeMap<String, String>,
    printed: &Printed,
) -> anyhow::Result<(Child, SocketAddr)> {
    // Free now; if somebody else is faster, the relay ends and the next try takes another one.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("finding a port")?;
    let at = listener.local_addr()?;
    drop(listener);
    let mut child = Command::new(std::env::current_exe().context("finding this program")?)
        .arg("relay")
        .env_clear()
        .envs(environment)
        .env(ENV_LISTEN, at.to_string())
        .env(process::ENV_PARENT, std::process::id().to_string())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting it")?;
    process::forward_output("relay", &mut child, Some(printed.clone()));
    Ok((child, at))
}

async fn listens(at: SocketAddr) -> bool {
    let up = async {
        while TcpStream::connect(at).await.is_err() {
            time::sleep(LOOK).await;
        }
    };
    time::timeout(START_TIME, up).await.is_ok()
}

async fn end(mut child: Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
    if time::timeout(END_TIME, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}
