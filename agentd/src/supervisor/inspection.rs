//! Whether the inspector listens, and where.

use std::{net::SocketAddr, sync::Arc};

use tokio_util::task::AbortOnDropHandle;

use crate::{
    capture::ring::Captures,
    config::{Config, TunnelConfig},
    inspect::{api::Inspector, redact::Redact, server},
    link::deliveries::Desk,
    serve::tunnel::Tunnels,
};

/// The inspector, and its listener while something is inspected.
pub(super) struct Inspection {
    inspector: Inspector,
    wanted: SocketAddr,
    listener: Option<(SocketAddr, AbortOnDropHandle<()>)>,
}

impl Inspection {
    /// Not listening yet.
    ///
    /// # Errors
    ///
    /// When the system gives no random numbers.
    pub(super) fn new(
        captures: Arc<Captures>,
        tunnels: Arc<Tunnels>,
        desk: Desk,
        config: &Config,
    ) -> std::io::Result<Self> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let token = base64::Engine::encode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, random);
        let redact = Redact::new(config.inspect.redact.clone());
        let inspector = Inspector::new(captures, tunnels, desk, redact, token);
        Ok(Self { inspector, wanted: config.inspect.address, listener: None })
    }

    pub(super) const fn inspector(&self) -> &Inspector {
        &self.inspector
    }

    /// Where the page is.
    pub(super) fn url(&self) -> Option<String> {
        self.listener.as_ref().map(|(address, _)| format!("http://{address}"))
    }

    /// Whether a configuration can be had: no tunnel may lead to the inspector.
    ///
    /// # Errors
    ///
    /// A sentence for the user.
    pub(super) fn check(&self, config: &Config) -> Result<(), String> {
        let Some((address, _)) = &self.listener else { return Ok(()) };
        let leads =
            |tunnel: &TunnelConfig| tunnel.upstreams().any(|upstream| server::is_at(upstream, *address));
        let exposed = config.tunnels.iter().find(|tunnel| leads(tunnel));
        exposed.map_or(Ok(()), |tunnel| {
            Err(format!(
                "the upstream of {} is this agent's own inspector, which is not for visitors",
                tunnel.name
            ))
        })
    }

    /// Begins or ends to listen, as the configuration wants it. The address, if it is new.
    pub(super) fn align(&mut self, config: &Config) -> Option<SocketAddr> {
        if !config.tunnels.iter().any(|tunnel| tunnel.inspect) {
            self.listener = None;
            return None;
        }
        if self.listener.is_some() {
            return None;
        }
        match server::listen(self.wanted, config.tunnels.iter().flat_map(TunnelConfig::upstreams)) {
            Ok((listener, address)) => {
                let served = tokio::spawn(server::serve(self.inspector.clone(), listener));
                self.listener = Some((address, AbortOnDropHandle::new(served)));
                Some(address)
            }
            Err(error) => {
                // Whoever looks at requests must not end what serves them.
                tracing::error!(
                    "inspect_address {}: {error}; the agent goes on without the page: name another address, or \
                     restart it when this one is free",
                    self.wanted
                );
                None
            }
        }
    }
}
