//! Where the inspector listens.

use std::{
    convert::Infallible,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener as Bound},
    sync::Arc,
    time::Duration,
};

use http::Request;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

use super::api::{Door, Inspector};
use crate::config::address::{Address, Host};

/// How many ports are tried.
const PORTS: u16 = 50;

/// How many connections are served at a time; a browser opens six. Streams of events may not have all of them.
const CONNECTIONS: usize = 64;

/// How long a head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Listens at `address`, or at the next free port that is none of `upstreams`: an upstream that is not running must not
/// find the inspector at its place.
///
/// # Errors
///
/// When none is free, or the address is not this machine's.
pub(crate) fn listen<'a>(
    address: SocketAddr,
    upstreams: impl Iterator<Item = &'a Address> + Clone,
) -> io::Result<(TcpListener, SocketAddr)> {
    let last = if address.port() == 0 { 0 } else { address.port().saturating_add(PORTS) };
    for port in address.port()..=last {
        let wanted = SocketAddr::new(address.ip(), port);
        if upstreams.clone().any(|upstream| is_at(upstream, wanted)) {
            continue;
        }
        match Bound::bind(wanted) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                let found = listener.local_addr()?;
                return Ok((listener, found));
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(ErrorKind::AddrInUse, format!("no port from {} to {last} is free", address.port())))
}

/// Whether an upstream is at an address of this machine's loopback.
pub(crate) fn is_at(upstream: &Address, address: SocketAddr) -> bool {
    let Address::Tcp { host, port, .. } = upstream else { return false };
    *port == address.port()
        && match host {
            Host::Ip(ip) => ip.is_loopback() || ip.is_unspecified(),
            Host::Localhost => true,
            Host::Zoned(..) => false,
            Host::Name(name) => name.ends_with(".localhost"),
        }
}

/// Serves for ever.
pub(crate) async fn serve(inspector: Inspector, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most often there are no file descriptors left, which passes.
                tracing::warn!(%error, "a connection to the inspector was not accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let inspector = inspector.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(|request: Request<Incoming>| async {
                Ok::<_, Infallible>(inspector.answer(request, Door::Loopback).await)
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection to the inspector broke off");
            }
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_next_free_port_is_taken_and_never_an_upstreams() {
        let taken = Bound::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let upstream: Address = (address.port() + 1).to_string().parse().unwrap();
        let (_listener, found) = listen(address, std::iter::once(&upstream)).unwrap();
        assert!(found.port() > address.port() + 1, "{found}");
        assert!(listen("192.0.2.1:4040".parse().unwrap(), std::iter::empty()).is_err());
    }

    #[test]
    fn an_upstream_at_the_inspectors_address_is_recognised() {
        let at = |upstream: &str| is_at(&upstream.parse().unwrap(), "127.0.0.1:4040".parse().unwrap());
        for upstream in [
            "4040",
            "127.0.0.1:4040",
            "http://localhost:4040",
            "http://[::1]:4040",
            "127.0.0.9:4040",
            "0.0.0.0:4040",
            "http://x.localhost:4040",
        ] {
            assert!(at(upstream), "{upstream}");
        }
        for upstream in ["4041", "http://192.0.2.1:4040", "unix:/run/4040", "http://example.com:4040"] {
            assert!(!at(upstream), "{upstream}");
        }
    }
}
