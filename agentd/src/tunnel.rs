//! The tunnels of this agent as they run: each with its upstream, its rules and its limit.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::HeaderValue;
use proto::{id::TunnelName, limits};
use rustls::pki_types::ServerName;
use tokio::sync::Semaphore;

use crate::{
    config::{HostHeader, TunnelConfig},
    upstream::{
        Http2, Tls, Upstream,
        address::{Address, Host, Scheme},
        tls::{TlsError, Trust, client_config},
    },
};

/// How many bytes of announced request bodies may be held at a time, for all tunnels together.
/// A body waits for its share before it is asked for.
const UPLOAD_BUDGET_BYTES: usize = 32 * 1024 * 1024;

/// The budget is counted in units of this many bytes.
const BUDGET_UNIT_BYTES: usize = 1024;

/// What `host` says to the upstream.
#[derive(Debug, Clone)]
pub(crate) enum HostRule {
    /// As configured.
    Fixed(HeaderValue),
    /// What the public client asked for.
    Public,
}

/// One tunnel as it runs.
pub(crate) struct Tunnel {
    pub(crate) upstream: Upstream,
    pub(crate) host: HostRule,
    pub(crate) request_timeout: Duration,
    pub(crate) slots: Arc<Semaphore>,
}

/// All tunnels of this process, and what they share.
pub(crate) struct Tunnels {
    by_name: BTreeMap<TunnelName, Arc<Tunnel>>,
    uploads: Arc<Semaphore>,
}

impl Tunnels {
    /// Sets up each configured tunnel. Nothing is dialled.
    pub(crate) fn new(configs: &[TunnelConfig]) -> Result<Self, TlsError> {
        let mut by_name = BTreeMap::new();
        for config in configs {
            by_name.insert(config.name.clone(), Arc::new(Tunnel::new(config)?));
        }
        Ok(Self { by_name, uploads: Arc::new(Semaphore::new(UPLOAD_BUDGET_BYTES / BUDGET_UNIT_BYTES)) })
    }

    pub(crate) fn get(&self, name: &TunnelName) -> Option<&Arc<Tunnel>> {
        self.by_name.get(name)
    }

    pub(crate) fn names(&self) -> Vec<TunnelName> {
        self.by_name.keys().cloned().collect()
    }

    /// A share of the memory for announced bodies.
    pub(crate) async fn reserve_upload(&self, bytes: u64) -> Option<tokio::sync::OwnedSemaphorePermit> {
        if bytes > limits::REQUEST_BODY_BYTES as u64 {
            return None;
        }
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES as u64)).ok()?;
        Arc::clone(&self.uploads).acquire_many_owned(units).await.ok()
    }
}

impl Tunnel {
    fn new(config: &TunnelConfig) -> Result<Self, TlsError> {
        let tls = tls_for(config)?;
        let upstream = Upstream::new(config.upstream.clone(), tls, config.http2);
        let host = match &config.host_header {
            HostHeader::Preserve => HostRule::Public,
            HostHeader::Value(value) => HostRule::Fixed(value.clone()),
            HostHeader::Upstream => HostRule::Fixed(upstream.authority().clone()),
        };
        Ok(Self {
            upstream,
            host,
            request_timeout: config.request_timeout,
            slots: Arc::new(Semaphore::new(config.max_concurrent as usize)),
        })
    }
}

fn tls_for(config: &TunnelConfig) -> Result<Option<Tls>, TlsError> {
    let Address::Tcp { host, scheme: Scheme::Https, .. } = &config.upstream else { return Ok(None) };
    let trust = match (&config.ca_file, config.insecure_skip_verify) {
        (_, true) => Trust::Anybody,
        (Some(path), false) => Trust::SystemAnd(path),
        (None, false) => Trust::System,
    };
    let alpn: &[&[u8]] = match config.http2 {
        Http2::Auto => &[b"h2", b"http/1.1"],
        Http2::Always => &[b"h2"],
        Http2::Never => &[b"http/1.1"],
    };
    let server_name = match &config.server_name {
        Some(name) => name.clone(),
        None => match host {
            Host::Ip(ip) => (*ip).into(),
            Host::Localhost | Host::Name(_) => {
                ServerName::try_from(host.to_string()).map_err(|_| TlsError::NotAName(host.to_string()))?
            }
        },
    };
    Ok(Some(Tls { config: client_config(trust, alpn)?, server_name }))
}
