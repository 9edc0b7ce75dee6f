//! A connected socket that can be looked at while an HTTP connection owns it.

use std::{
    io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};

use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
    time::sleep,
};

use crate::{
    config::address::{Address, Host},
    resolver::Resolver,
};

/// A connected stream. The HTTP connection owns it; the pool keeps a [`Watch`] on it.
///
/// When the peer takes no more, what is written is thrown away and reading goes on: an upstream that answers
/// early and closes has said why before it did (RFC 9112 §9.5), and a failed write must not hide it. Whoever reads
/// comes to the end or to the error next.
#[derive(Debug)]
pub(super) struct Socket {
    stream: Stream,
    /// How writing failed: the peer takes no more. The system tells of a reset once, and whoever reads wants to know it too.
    gone: Option<io::ErrorKind>,
}

#[derive(Debug)]
enum Stream {
    Tcp(Arc<TcpStream>),
    Unix(Arc<UnixStream>),
}

/// How long one address may take before the next one is tried beside it: what curl does by default.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(200);

/// Both families in turns, the one that the resolver prefers first (RFC 8305 §4).
fn in_turns(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (preferred, other): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|ip| ip.is_ipv6() == first_is_v6);
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    let mut turn = false;
    std::iter::from_fn(move || {
        turn = !turn;
        if turn {
            preferred.next().or_else(|| other.next())
        } else {
            other.next().or_else(|| preferred.next())
        }
    })
}

/// Whether a name is `localhost` or below it.
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// The number of a zone: an interface's name, or the number itself (RFC 4007 §11).
fn scope_of(zone: &str) -> io::Result<u32> {
    if let Ok(number) = zone.parse() {
        return Ok(number);
    }
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::DGRAM, None)?;
    rustix::net::netdevice::name_to_index(socket, zone)
        .map_err(|error| io::Error::new(io::ErrorKind::NotFound, format!("no interface {zone:?}: {error}")))
}

/// Connects to the first address that answers: each next one is tried when the one before it has failed or is slow.
async fn connect_to_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut left = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut failure: Option<io::Error> = None;
    loop {
        if let Some(address) = left.next() {
            attempts.push(TcpStream::connect(address));
        }
        let next = async {
            if left.len() > 0 { sleep(NEXT_ADDRESS_AFTER).await } else { std::future::pending().await }
        };
        tokio::select! {
            attempt = attempts.next() => match attempt {
                Some(Ok(stream)) => return Ok(stream),
                // A refusal says more than anything else: the other family may just be off.
                Some(Err(error)) => {
                    if failure.is_none() || error.kind() == io::ErrorKind::ConnectionRefused {
                        failure = Some(error);
                    }
                }
                None => {
                    return Err(failure.unwrap_or_else(|| {
                        io::Error::new(io::ErrorKind::NotFound, "the name has no address")
                    }));
                }
            },
            () = next => {}
        }
    }
}

impl Socket {
    /// Connects to the configured address and to nothing else. The caller bounds how long it may take.
    pub(super) async fn connect(address: &Address) -> io::Result<Self> {
        let (host, port) = match address {
            Address::Unix(path) => {
                return Ok(Self {
                    stream: Stream::Unix(Arc::new(UnixStream::connect(path).await?)),
                    gone: None,
                });
            }
            Address::Tcp { host, port, .. } => (host, *port),
        };
        let addresses = match host {
            // RFC 6761 §6.3: such a name never leaves the machine.
            Host::Name(name) if is_localhost(name) => {
                Host::Localhost.literal().iter().map(|&ip| SocketAddr::new(ip, port)).collect()
            }
            Host::Name(name) => {
                let found = Resolver::shared().look_up(name).await?;
                in_turns(&found).map(|ip| SocketAddr::new(ip, port)).collect()
            }
            Host::Zoned(ip, zone) => vec![SocketAddr::V6(SocketAddrV6::new(*ip, port, 0, scope_of(zone)?))],
            Host::Ip(_) | Host::Localhost => {
                host.literal().iter().map(|&ip| SocketAddr::new(ip, port)).collect()
            }
        };
        let stream = connect_to_any(addresses).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: Stream::Tcp(Arc::new(stream)), gone: None })
    }

    /// A look at the connection that does not keep it open.
    pub(super) fn watch(&self) -> Watch {
        match &self.stream {
            Stream::Tcp(stream) => Watch::Tcp(Arc::downgrade(stream)),
            Stream::Unix(stream) => Watch::Unix(Arc::downgrade(stream)),
        }
    }
}

impl Socket {
    /// What a write came to; one that the peer does not take counts as done.
    fn unless_gone(
        &mut self,
        written: Poll<io::Result<usize>>,
        all: impl FnOnce() -> usize,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::ConnectionAborted
                ) =>
            {
                self.gone = Some(error.kind());
                Poll::Ready(Ok(all()))
            }
            other => other,
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

/// Reads from `$stream` once it is readable. Fewer bytes than there was room for were all of them, so the next read waits
/// for news and does not ask the system first; the tick that is cleared for it is the one from before the read.
macro_rules! read_when_ready {
    ($stream:expr, $cx:expr, $buf:expr) => {
        loop {
            ready!($stream.poll_read_ready($cx))?;
            let mut short = None;
            let read = $stream.try_io(Interest::READABLE, || {
                let bytes = $stream.try_read_buf($buf)?;
                if bytes == 0 || $buf.remaining() == 0 {
                    return Ok(bytes);
                }
                short = Some(bytes);
                Err(io::ErrorKind::WouldBlock.into())
            });
            match (short, read) {
                (Some(bytes), _) => break Poll::Ready(Ok(bytes)),
                (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                (None, read) => break Poll::Ready(read),
            }
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read: Poll<io::Result<usize>> = match &self.stream {
            Stream::Tcp(stream) => read_when_ready!(stream, cx, buf),
            Stream::Unix(stream) => read_when_ready!(stream, cx, buf),
        };
        match (ready!(read), self.gone) {
            // What ends with a reset has not come to its end. A broken pipe is what follows an end.
            (Ok(0), Some(kind)) if kind != io::ErrorKind::BrokenPipe => Poll::Ready(Err(kind.into())),
            (read, _) => Poll::Ready(read.map(|_| ())),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.gone.is_some() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = match &self.stream {
            Stream::Tcp(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write(bytes)),
            Stream::Unix(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write(bytes)),
        };
        self.unless_gone(written, || bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = || bufs.iter().map(|buf| buf.len()).sum();
        if self.gone.is_some() {
            return Poll::Ready(Ok(all()));
        }
        let written = match &self.stream {
            Stream::Tcp(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write_vectored(bufs)),
            Stream::Unix(stream) => when_ready!(stream.poll_write_ready(cx), stream.try_write_vectored(bufs)),
        };
        self.unless_gone(written, all)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = match &self.stream {
            Stream::Tcp(stream) => rustix::net::shutdown(&**stream, rustix::net::Shutdown::Write),
            Stream::Unix(stream) => rustix::net::shutdown(&**stream, rustix::net::Shutdown::Write),
        };
        Poll::Ready(done.map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn families_take_turns_and_the_resolvers_choice_begins() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        for (given, wanted) in [
            (
                &["::1", "::2", "::3", "1.1.1.1", "1.1.1.2"][..],
                &["::1", "1.1.1.1", "::2", "1.1.1.2", "::3"][..],
            ),
            (&["1.1.1.1", "1.1.1.2", "::1"], &["1.1.1.1", "::1", "1.1.1.2"]),
            (&["::1", "::2"], &["::1", "::2"]),
            (&[], &[]),
        ] {
            assert_eq!(in_turns(&ips(given)).collect::<Vec<_>>(), ips(wanted));
        }
    }

    #[test]
    fn names_of_localhost_are_told_from_others() {
        for name in ["localhost", "LOCALHOST.", "web.localhost", "a.b.Localhost."] {
            assert!(is_localhost(name), "{name}");
        }
        for name in ["localhost.example", "notlocalhost", "", "."] {
            assert!(!is_localhost(name), "{name}");
        }
    }

    #[test]
    fn a_zone_is_a_number_or_an_interface() {
        assert_eq!(scope_of("3").unwrap(), 3);
        assert_eq!(scope_of("lo").unwrap(), 1);
        assert!(scope_of("no-such-one").unwrap_err().to_string().contains("no interface \"no-such-one\""));
    }

    #[tokio::test]
    async fn what_comes_after_a_short_read_is_read_and_so_is_the_end() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let mut socket = Socket::connect(&address.parse().unwrap()).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        let mut room = [0; 8];
        for text in ["one", "three", "just as long, and longer"] {
            peer.write_all(text.as_bytes()).await.unwrap();
            let mut read = Vec::new();
            while read.len() < text.len() {
                let bytes = socket.read(&mut room).await.unwrap();
                read.extend_from_slice(&room[..bytes]);
            }
            assert_eq!(read, text.as_bytes());
        }
        peer.write_all(b"last").await.unwrap();
        drop(peer);
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"last");
    }

    #[tokio::test]
    async fn the_address_that_listens_is_found_and_a_refusal_is_what_is_said() {
        let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let refused = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = connect_to_any(vec![refused, listener.local_addr().unwrap()]).await.unwrap();
        assert!(stream.peer_addr().unwrap().is_ipv6());
        drop(listener);
        let error =
            connect_to_any(vec![refused, SocketAddr::from(([255, 255, 255, 255], port))]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect_to_any(Vec::new()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
