//! Sockets that end when a test lets go of them, and ports that are not left to chance.
//!
//! A process that is started has a copy of every descriptor until its program runs. So while one test starts an agent,
//! what another test has closed is still open: a connection has no end, and a listener takes connections.

use std::{
    fmt,
    net::{Ipv4Addr, Shutdown, SocketAddr},
};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::TcpStream;
use tokio_tungstenite::MaybeTlsStream;

/// What a stream goes over.
pub(crate) fn tcp(stream: &MaybeTlsStream<TcpStream>) -> &TcpStream {
    match stream {
        MaybeTlsStream::Rustls(tls) => tls.get_ref().0,
        MaybeTlsStream::Plain(tcp) => tcp,
        _ => unreachable!("there is one kind of TLS"),
    }
}

/// Ends a connection: its other side learns of it now.
pub(crate) fn hang_up<'s>(stream: impl Into<SockRef<'s>>) {
    // It may have ended already.
    let _ = stream.into().shutdown(Shutdown::Write);
}

/// Takes no more connections: who calls is refused from now on.
pub(crate) fn close<'s>(listener: impl Into<SockRef<'s>>) {
    listener.into().shutdown(Shutdown::Both).unwrap();
}

/// A port of 127.0.0.1 that is a test's as long as this lives: who connects is refused, and who asks for it by its number
/// may listen there.
///
/// A listener that is closed again is not enough for that: the system gives its port to the next one who wants any.
#[derive(Debug)]
pub struct Port(Socket);

impl Port {
    /// Takes one that is free.
    #[must_use]
    pub fn take() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // So that others, who say the same of theirs, may listen.
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        Self(socket)
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap().as_socket().unwrap()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{TcpListener, TcpStream},
    };

    use super::Port;

    #[test]
    fn nobody_answers_there_until_somebody_asks_for_it() {
        let port = Port::take();
        let refused = TcpStream::connect(port.address()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let listener = TcpListener::bind(port.address()).unwrap();
        let _caller = TcpStream::connect(port.address()).unwrap();
        listener.accept().unwrap();
    }
}
