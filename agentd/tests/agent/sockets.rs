//! Sockets that end when they are dropped, and ports that stay nobody's.
//!
//! A process that is started has a copy of every descriptor until its program runs. So while one test starts an agent,
//! what another test has closed is still open: a connection has no end, and a listener takes connections.

use std::{
    io,
    net::{Ipv4Addr, Shutdown},
    pin::Pin,
    task::{Context, Poll},
};

use socket2::{Domain, SockRef, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

/// A connection. When it is dropped, the other side learns of its end.
pub(crate) struct Socket(TcpStream);

impl Socket {
    /// Makes its end a reset.
    pub(crate) fn reset(self) {
        // Whoever else has it open: it is not connected any more, and the other side is told so.
        rustix::net::connect_unspec(&self.0).unwrap();
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = SockRef::from(&self.0).shutdown(Shutdown::Write);
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A listener on a port of its own. When it is dropped, who connects is refused.
pub(crate) struct Listener(TcpListener);

impl Listener {
    pub(crate) async fn bind() -> Self {
        Self(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap())
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    pub(crate) async fn accept(&self) -> io::Result<Socket> {
        let (stream, _) = self.0.accept().await?;
        stream.set_nodelay(true)?;
        Ok(Socket(stream))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        SockRef::from(&self.0).shutdown(Shutdown::Both).unwrap();
    }
}

/// A port where nobody listens: it is taken as long as this lives.
pub(crate) struct ClosedPort(socket2::Socket);

impl ClosedPort {
    pub(crate) fn bind() -> Self {
        let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        Self(socket)
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.local_addr().unwrap().as_socket().unwrap().port()
    }
}
