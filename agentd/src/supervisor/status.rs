//! The status of the whole agent, put together from what each part says of itself.

use std::collections::BTreeMap;

use proto::id::{AgentId, TunnelName};
use tokio::time::Instant;

use crate::{
    config::{Config, TunnelConfig},
    link::rotation::Rotation,
    report::{
        metrics::unix_now,
        status::{
            ConfigStatus, DeliveryStatus, EdgeStatus, HealthState, RemovedStatus, Status, TunnelStatus,
        },
    },
    serve::tunnel::Tunnels,
};

/// What never changes about an agent.
pub(super) struct Birth {
    agent: AgentId,
    systemd: bool,
    started: Instant,
    /// Unix seconds.
    started_at: u64,
}

impl Birth {
    /// Of an agent that starts now.
    pub(super) fn now(agent: AgentId, systemd: bool) -> Self {
        Self { agent, systemd, started: Instant::now(), started_at: unix_now().as_secs() }
    }

    /// The status of the agent.
    pub(super) fn status(
        &self,
        edge: EdgeStatus,
        config: ConfigStatus,
        tunnels: Vec<TunnelStatus>,
        removed: Vec<RemovedStatus>,
        inspector: Option<String>,
    ) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            agent_id: self.agent.to_string(),
            started_at: self.started_at,
            uptime_secs: self.started.elapsed().as_secs(),
            systemd: self.systemd,
            edge,
            config,
            inspector,
            tunnels,
            removed,
        }
    }
}

/// The tunnels in the order of the configuration, with the public addresses in `urls`.
pub(super) fn tunnels(
    config: &Config,
    tunnels: &Tunnels,
    links: &Rotation,
    urls: &BTreeMap<TunnelName, String>,
) -> Vec<TunnelStatus> {
    let describe = |config: &TunnelConfig| {
        let tunnel = tunnels.get(&config.name);
        TunnelStatus {
            name: config.name.to_string(),
            state: links.tunnel_state(&config.name),
            url: urls.get(&config.name).cloned(),
            upstream: config.upstream.as_ref().map(ToString::to_string),
            health: tunnel.as_ref().map_or(HealthState::Unchecked, |tunnel| tunnel.health()),
            routes: tunnel.as_ref().map(|tunnel| tunnel.route_health()).unwrap_or_default(),
            max_concurrent: config.max_concurrent,
            delivery: config.delivery.as_ref().map(|policy| {
                let notice = links.policy_notice(&config.name);
                DeliveryStatus::new(policy.mode, links.keeps_deliveries(), notice)
            }),
            figures: tunnel.map(|tunnel| tunnel.metrics().figures()).unwrap_or_default(),
        }
    };
    config.tunnels.iter().map(describe).collect()
}
