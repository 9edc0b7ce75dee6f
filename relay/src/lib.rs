//! `relay` holds public connections: WebSockets, which no Lambda function can, and ordinary requests of any length.
//!
//! It stands where `ingress` stands, with the same exchange behind it, but serves many at a time: each request starts
//! the run that brings it to an agent, and all answers come to one mailbox ([`mailbox`]), long-polled by this
//! process and shared out by request id. So what an idle WebSocket costs does not grow with their number. [`public`] is the HTTP
//! side, [`websocket`] the public end of a WebSocket.
//!
//! Everything runs on one thread: what is done for a message is little, and more processes serve more of them. The process is told
//! what it needs by its environment (`edge::config::env`), and knows nothing of who started it: `TUNNEL_RELAY_LISTEN`
//! (default `0.0.0.0:8080`), the variables of `ingress`, and the AWS SDK's own for region and credentials. `GET
//! /_relay/health` answers 200 while it takes requests and 503 once it is told to end (SIGTERM): then WebSockets are closed
//! with 1012, requests are finished, and it ends within `TUNNEL_RELAY_DRAIN_SECS`.
//!
//! It is two processes, see [`guard`].
//!
//! Permissions it needs: those of an exchange.

pub mod guard;
pub mod mailbox;
pub mod meter;
pub mod public;
pub mod refused;
pub mod websocket;

use std::{net::SocketAddr, process::ExitCode, rc::Rc, time::Duration};

use anyhow::Context as _;
use edge::{
    config::{Env, env},
    metrics::{Line, Metric},
};
use exchange::Services;
use tokio::{
    net::TcpListener,
    runtime::{Builder, LocalOptions},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{mailbox::Postbox, meter::Meter, public::Relay};

/// Where it listens unless told otherwise.
const LISTEN: &str = "0.0.0.0:8080";

/// How many public connections it holds at the same time unless told otherwise.
const CONNECTIONS: usize = 10_000;

/// How many bytes of unfinished messages of WebSockets, and of bodies that may be kept for later, it holds together unless
/// told otherwise.
const BUFFER_BYTES: usize = 256 * 1024 * 1024;

/// How often it says how many WebSockets are open: what more or fewer tasks go by.
const COUNT_EVERY: Duration = Duration::from_secs(60);

/// How long it waits for its exchanges at the end unless told otherwise: less than ECS gives a task (30 s).
const DRAIN: Duration = Duration::from_secs(25);

/// The longest that [`DRAIN`] may be configured to.
const DRAIN_MAX: Duration = Duration::from_secs(15 * 60);

/// Runs until it is told to end.
#[must_use]
pub fn run() -> ExitCode {
    edge::telemetry::init();
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "relay could not start");
            return ExitCode::FAILURE;
        }
    };
    let env = Env::process();
    let ended = if env.optional(guard::ENV_SERVES).is_some() {
        runtime.block_on(serve(&env)).map(|()| ExitCode::SUCCESS)
    } else {
        runtime.block_on(guard::run(&env))
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("relay ended: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(env: &Env<'_>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for signals")?;
    let draining = CancellationToken::new();
    let (holdings, held) = mpsc::unbounded_channel();
    guard::report(held, draining.clone())?;
    let services = Rc::new(Services { holdings: Some(holdings), ..Services::from_env(env)? });
    let listen = env.optional(env::RELAY_LISTEN).unwrap_or_else(|| LISTEN.to_owned());
    let address: SocketAddr = listen.parse().context("TUNNEL_RELAY_LISTEN is not an address with a port")?;
    let connections = env.count(env::RELAY_CONNECTIONS, CONNECTIONS, 1_000_000)?;
    let drain = env.secs(env::RELAY_DRAIN_SECS, DRAIN, DRAIN_MAX)?;
    let buffer = env.count(env::RELAY_BUFFER_BYTES, BUFFER_BYTES, usize::MAX)?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
    let lease = services.pool.lease(&holder(), random()?).await.context("leasing a mailbox")?;
    let postbox = Postbox::new(Rc::clone(&services), lease);
    let end = CancellationToken::new();
    let polling = tokio::task::spawn_local(Rc::clone(&postbox).run(end.clone()));
    tracing::info!(address = %listener.local_addr()?, "relay listens");
    let meter = Meter::new(buffer);
    let counting = tokio::task::spawn_local(count(Rc::clone(&meter)));
    let relay = Rc::new(Relay { services, postbox, draining: draining.clone(), connections, meter });
    let serving = tokio::task::spawn_local(public::serve(listener, relay));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = draining.cancelled() => {}
    }
    counting.abort();
    tracing::info!("relay drains");
    draining.cancel();
    if tokio::time::timeout(drain, serving).await.is_err() {
        tracing::warn!("requests in flight were broken off");
    }
    end.cancel();
    // A receive that was begun is awaited: abandoned, it would take a message along.
    let _ = tokio::time::timeout(Duration::from_secs(1), polling).await;
    Ok(())
}

/// Says again and again how many WebSockets are open.
async fn count(meter: Rc<Meter>) {
    let mut ticks = tokio::time::interval(COUNT_EVERY);
    loop {
        ticks.tick().await;
        let mut line = Line::begin();
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        line.add(Metric::SocketsOpen, meter.open() as f64);
        line.write();
    }
}

/// How this process signs its lease, for whoever reads the table.
fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("relay-{}-{}", host.trim(), std::process::id())
}

pub(crate) fn random() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
