//! A TCP proxy between an agent and its edge that can do to them what networks do: fall silent, or break
//! every connection and take no other. It can also make the edge one that answers no WebSocket pings.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// What happens to what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It arrives.
    Open,
    /// It does not arrive, and nobody is told.
    Silent,
    /// Connections are reset.
    Broken,
}

/// The proxy. It ends with this value.
#[derive(Debug)]
pub struct Proxy {
    /// Where agents connect.
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    refused: Arc<AtomicUsize>,
    accepted: Arc<Mutex<Vec<Instant>>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts forwarding to `target`.
    pub async fn start(target: SocketAddr) -> Self {
        Self::start_as(target, None).await
    }

    /// Starts forwarding to `target`, all but the pongs of its WebSockets.
    pub async fn without_pongs(target: SocketAddr) -> Self {
        Self::start_as(target, Some(Pongless::Head(Vec::new()))).await
    }

    async fn start_as(target: SocketAddr, filter: Option<Pongless>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Open);
        let refused = Arc::new(AtomicUsize::new(0));
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let (refusals, acceptances) = (Arc::clone(&refused), Arc::clone(&accepted));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let modes = modes.clone();
                if *modes.borrow() == Mode::Broken {
                    refusals.fetch_add(1, Ordering::Relaxed);
                    reset(&stream);
                    continue;
                }
                acceptances.lock().unwrap().push(Instant::now());
                tokio::spawn(forward(stream, target, modes, filter.clone()));
            }
        });
        Self { address, mode, refused, accepted, task }
    }

    /// Lets everything through, also what has waited.
    pub fn open(&self) {
        self.mode.send_replace(Mode::Open);
    }

    /// Lets nothing through any more and closes nothing.
    pub fn silence(&self) {
        self.mode.send_replace(Mode::Silent);
    }

    /// Resets every connection and each that comes.
    pub fn break_all(&self) {
        self.mode.send_replace(Mode::Broken);
    }

    /// How many connections were reset as they came.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// When each connection since `begin` was accepted, counted from then.
    #[must_use]
    pub fn accepted_since(&self, begin: Instant) -> Vec<Duration> {
        let accepted = self.accepted.lock().unwrap();
        accepted.iter().filter_map(|at| at.checked_duration_since(begin)).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

async fn forward(
    agent: TcpStream,
    target: SocketAddr,
    mut modes: watch::Receiver<Mode>,
    filter: Option<Pongless>,
) {
    let Ok(edge) = TcpStream::connect(target).await else { return reset(&agent) };
    for stream in [&agent, &edge] {
        let _ = stream.set_nodelay(true);
        // However a connection ends here, it ends with a reset.
        reset(stream);
    }
    let (from_agent, to_agent) = agent.into_split();
    let (from_edge, to_edge) = edge.into_split();
    let other = modes.clone();
    let broken = async {
        let _ = modes.wait_for(|mode| *mode == Mode::Broken).await;
    };
    tokio::select! {
        () = copy(from_agent, to_edge, other.clone(), None) => {}
        () = copy(from_edge, to_agent, other, filter) => {}
        () = broken => {}
    }
}

/// Copies while the proxy is open.
async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
    mut filter: Option<Pongless>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        if modes.wait_for(|mode| *mode == Mode::Open).await.is_err() {
            return;
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            _ = modes.changed() => continue,
        };
        let bytes = match read {
            Ok(count) if count > 0 => &buffer[..count],
            _ => return,
        };
        let written = match &mut filter {
            None => to.write_all(bytes).await,
            Some(filter) => to.write_all(&filter.pass(bytes)).await,
        };
        if written.is_err() {
            return;
        }
    }
}

/// Takes the pongs out of what a WebSocket's server sends.
#[derive(Debug, Clone)]
enum Pongless {
    /// So much of the handshake's answer has come.
    Head(Vec<u8>),
    /// So much of a frame's head has come.
    Frame(Vec<u8>),
    /// So many bytes of a frame are to come, which passes or does not.
    Payload(u64, bool),
}

impl Pongless {
    fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut passed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match self {
                Self::Head(head) => {
                    passed.push(byte);
                    head.push(byte);
                    if head.ends_with(b"\r\n\r\n") {
                        *self = Self::Frame(Vec::new());
                    }
                }
                Self::Frame(head) => {
                    head.push(byte);
                    let Some(length) = payload_length(head) else { continue };
                    let passes = head[0] & 0x0f != 0xa;
                    if passes {
                        passed.extend_from_slice(head);
                    }
                    *self = if length == 0 { Self::Frame(Vec::new()) } else { Self::Payload(length, passes) };
                }
                Self::Payload(left, passes) => {
                    if *passes {
                        passed.push(byte);
                    }
                    *left -= 1;
                    if *left == 0 {
                        *self = Self::Frame(Vec::new());
                    }
                }
            }
        }
        passed
    }
}

/// The length of a frame's payload, once its head is whole: a server's is not masked (RFC 6455 §5.2).
fn payload_length(head: &[u8]) -> Option<u64> {
    match (*head.get(1)?, &head[2..]) {
        (126, &[a, b]) => Some(u16::from_be_bytes([a, b]).into()),
        (127, &[a, b, c, d, e, f, g, h]) => Some(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
        (126 | 127, _) => None,
        (length, _) => Some(length.into()),
    }
}
