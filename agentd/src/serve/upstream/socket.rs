//! A connected socket that can be looked at while an HTTP connection owns it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
};

use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use crate::config::address::{Address, Host};

/// A connected stream. The HTTP connection owns it; the pool keeps a [`Watch`] on it.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(Arc<TcpStream>),
    Unix(Arc<UnixStream>),
}

impl Socket {
    /// Connects to the configured address and to nothing else.
    pub(super) async fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(Arc::new(UnixStream::connect(path).await?))),
            Address::Tcp { host: Host::Name(name), port, .. } => {
                let stream = TcpStream::connect((&**name, *port)).await?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(Arc::new(stream)))
            }
            Address::Tcp { host, port, .. } => {
                let mut last = None;
                for &ip in host.literal() {
                    match Self::connect_to(ip, *port).await {
                        Ok(socket) => return Ok(socket),
                        // The first refusal says more than the second: IPv6 may just be off.
                        Err(error) => last = last.or(Some(error)),
                    }
                }
                Err(last.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
            }
        }
    }

    async fn connect_to(ip: IpAddr, port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(SocketAddr::new(ip, port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(Arc::new(stream)))
    }

    /// A look at the connection that does not keep it open.
    pub(super) fn watch(&self) -> Watch {
        match self {
            Self::Tcp(stream) => Watch::Tcp(Arc::downgrade(stream)),
            Self::Unix(stream) => Watch::Unix(Arc::downgrade(stream)),
        }
    }
}

/// Sees whether a connection that somebody else owns is still of use.
#[derive(Debug)]
pub(super) enum Watch {
    Tcp(Weak<TcpStream>),
    Unix(Weak<UnixStream>),
}

impl Watch {
    /// Whether the connection is open and nothing has arrived on it.
    ///
    /// On an idle connection anything else means that it is of no more use: the end of the stream,
    /// an error, or bytes that nobody asked for and that must never answer the next request.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let seen = match self {
            Self::Tcp(stream) => stream.upgrade().map(|stream| rustix::net::recv(&*stream, &mut byte, flags)),
            Self::Unix(stream) => {
                stream.upgrade().map(|stream| rustix::net::recv(&*stream, &mut byte, flags))
            }
        };
        matches!(seen, Some(Err(rustix::io::Errno::AGAIN)))
    }
}

/// Calls `$ready` until `$attempt` does something other than ask for more patience.
macro_rules! when_ready {
    ($ready:expr, $attempt:expr) => {
        loop {
            ready!($ready)?;
            match $attempt {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => break Poll::Ready(done),
            }
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read: Poll<io::Result<usize>> = match &*self {
            Self::Tcp(stream) => when_ready!(stream.poll_read_ready(cx), stream.try_read_buf(buf)),
            Self::Unix(stream) => when_ready!(stream.poll_read_ready(cx), stream.try_read_buf(buf)),
        };
        read.map_ok(|_| ())
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &*self {
            Self::Tcp(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write(bytes)),
            Self::Unix(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write(bytes)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &*self {
            Self::Tcp(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write_vectored(bufs)),
            Self::Unix(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write_vectored(bufs)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = match &*self {
            Self::Tcp(stream) => rustix::net::shutdown(&**stream, rustix::net::Shutdown::Write),
            Self::Unix(stream) => rustix::net::shutdown(&**stream, rustix::net::Shutdown::Write),
        };
        Poll::Ready(done.map_err(io::Error::from))
    }
}
