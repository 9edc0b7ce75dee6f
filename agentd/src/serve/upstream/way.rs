//! How the upstreams of a tunnel are spoken to: all in the same way.

use std::net::IpAddr;

use rustls::pki_types::ServerName;

use super::{Tls, Upstream};
use crate::{
    config::{
        Http2, TunnelConfig,
        address::{Address, Host, Scheme},
    },
    tls::{Certificates, TlsError, Trust, client_config},
};

/// How the upstreams of one tunnel are spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Way {
    /// Those trusted beside the system's. Compared by what they are: their file may be another under the same name.
    certificates: Option<Certificates>,
    server_name: Option<ServerName<'static>>,
    insecure_skip_verify: bool,
    http2: Http2,
    keep_alive: Option<std::time::Duration>,
}

impl Way {
    /// That of a tunnel. Certificates are read where they are of use.
    ///
    /// # Errors
    ///
    /// [`TlsError`] when they cannot be.
    pub(crate) fn of(config: &TunnelConfig) -> Result<Self, TlsError> {
        let is_used = !config.insecure_skip_verify
            && config.upstreams().any(|upstream| upstream.scheme() == Scheme::Https);
        let file = config.ca_file.as_deref().filter(|_| is_used);
        Ok(Self {
            certificates: file.map(Certificates::read).transpose()?,
            server_name: config.server_name.clone(),
            insecure_skip_verify: config.insecure_skip_verify,
            http2: config.http2,
            keep_alive: config.keep_alive,
        })
    }

    /// The upstream at an address.
    ///
    /// # Errors
    ///
    /// [`TlsError`] when TLS cannot be set up for it.
    pub(crate) fn to(&self, address: &Address) -> Result<Upstream, TlsError> {
        Ok(Upstream::new(address.clone(), self.tls_for(address)?, self.http2, self.keep_alive))
    }

    fn tls_for(&self, address: &Address) -> Result<Option<Tls>, TlsError> {
        let Address::Tcp { host, scheme: Scheme::Https, .. } = address else { return Ok(None) };
        let trust = match (&self.certificates, self.insecure_skip_verify) {
            (_, true) => Trust::Anybody,
            (Some(certificates), false) => Trust::SystemAnd(certificates),
            (None, false) => Trust::System,
        };
        let alpn: &[&[u8]] = match self.http2 {
            Http2::Auto => &[b"h2", b"http/1.1"],
            Http2::Always => &[b"h2"],
            Http2::Never => &[b"http/1.1"],
        };
        let server_name = match &self.server_name {
            Some(name) => name.clone(),
            None => match host {
                Host::Ip(ip) => (*ip).into(),
                Host::Zoned(ip, _) => IpAddr::V6(*ip).into(),
                Host::Localhost | Host::Name(_) => {
                    // Certificates and SNI know no trailing dot (RFC 6066 §3).
                    let name = host.to_string();
                    let name = name.strip_suffix('.').unwrap_or(&name).to_owned();
                    ServerName::try_from(name).map_err(|_| TlsError::NotAName(host.to_string()))?
                }
            },
        };
        Ok(Some(Tls { config: client_config(trust, alpn)?, server_name }))
    }
}
