//! An upstream on a raw socket: it records every byte it gets and answers with every byte it is told to.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::sockets;

/// What an upstream got.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The request line.
    pub line: String,
    /// The fields in order, to the byte.
    pub fields: Vec<(String, Vec<u8>)>,
    /// The body, by its Content-Length.
    pub body: Vec<u8>,
}

impl Recorded {
    /// Every value of a field.
    #[must_use]
    pub fn all(&self, name: &str) -> Vec<String> {
        let values = self.fields.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name));
        values.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
    }

    /// The request-target.
    #[must_use]
    pub fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap()
    }
}

/// A connection that the agent opened.
#[derive(Debug)]
pub struct Conn {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Conn {
    /// Reads one request; `None` when the agent has closed.
    pub async fn request(&mut self) -> Option<Recorded> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.more().await?;
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let mut lines =
            head[..end - 4].split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let line = String::from_utf8_lossy(lines.next().unwrap()).into_owned();
        let fields: Vec<(String, Vec<u8>)> = lines
            .map(|line| {
                let colon = line.iter().position(|&b| b == b':').unwrap();
                (
                    String::from_utf8_lossy(&line[..colon]).into_owned(),
                    line[colon + 1..].trim_ascii_start().to_owned(),
                )
            })
            .collect();
        let mut recorded = Recorded { line, fields, body: Vec::new() };
        assert!(recorded.all("transfer-encoding").is_empty(), "the agent knows every length");
        let length: usize =
            recorded.all("content-length").first().map_or(0, |length| length.parse().unwrap());
        while self.buffer.len() < length {
            self.more().await?;
        }
        recorded.body = self.buffer.drain(..length).collect();
        Some(recorded)
    }

    /// Writes bytes at once. Fails silently where the agent has closed.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).await.is_ok() && self.stream.flush().await.is_ok()
    }

    /// A whole answer with a length.
    pub async fn answer(&mut self, status: &str, fields: &str, body: &[u8]) -> bool {
        let mut bytes =
            format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend_from_slice(body);
        self.write(bytes).await
    }

    /// Waits until the agent closes its side.
    pub async fn closed(&mut self) {
        while self.more().await.is_some() {}
    }

    /// Ends the connection with a reset.
    pub fn reset(self) {
        // It may have ended already.
        let _ = rustix::net::connect_unspec(&self.stream);
    }

    async fn more(&mut self) -> Option<()> {
        let mut bytes = vec![0; 64 * 1024];
        match self.stream.read(&mut bytes).await {
            Ok(0) | Err(_) => None,
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Some(())
            }
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        sockets::hang_up(&self.stream);
    }
}

/// A running upstream.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    recorded: Arc<(Mutex<Vec<Recorded>>, Notify)>,
    listener: Arc<TcpListener>,
}

impl Upstream {
    /// Starts one whose every request goes to `handle`, which may also take the connection over.
    pub async fn start<H, F>(handle: H) -> Self
    where
        H: Fn(Recorded, Conn) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Option<Conn>> + Send + 'static,
    {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let recorded = Arc::new((Mutex::new(Vec::new()), Notify::new()));
        let (records, accepting) = (Arc::clone(&recorded), Arc::clone(&listener));
        // Until it is closed.
        tokio::spawn(async move {
            while let Ok((stream, _)) = accepting.accept().await {
                stream.set_nodelay(true).unwrap();
                let (handle, records) = (handle.clone(), Arc::clone(&records));
                tokio::spawn(async move {
                    let mut conn = Conn { stream, buffer: Vec::new() };
                    while let Some(request) = conn.request().await {
                        records.0.lock().unwrap().push(request.clone());
                        records.1.notify_waiters();
                        match handle(request, conn).await {
                            Some(back) => conn = back,
                            None => return,
                        }
                    }
                });
            }
        });
        Self { address, recorded, listener }
    }

    /// One that answers every request with its own body, its digest of lines in `x-line`.
    pub async fn echo() -> Self {
        Self::start(|request, mut conn| async move {
            let fields = format!("x-line: {}\r\nContent-Type: application/octet-stream\r\n", request.line);
            conn.answer("200 OK", &fields, &request.body).await.then_some(conn)
        })
        .await
    }

    /// One that answers every request but those for `target`, which it keeps until the agent closes.
    pub async fn hanging_at(target: &'static str) -> Self {
        Self::start(move |request, mut conn: Conn| async move {
            if request.target() == target {
                conn.closed().await;
                return None;
            }
            conn.answer("200 OK", "", b"ok").await.then_some(conn)
        })
        .await
    }

    /// Its address, as an agent's configuration wants it.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Looks at what it got so far, without a copy.
    pub fn look<T>(&self, look: impl FnOnce(&[Recorded]) -> T) -> T {
        look(&self.recorded.0.lock().unwrap())
    }

    /// What it got so far.
    #[must_use]
    pub fn recorded(&self) -> Vec<Recorded> {
        self.recorded.0.lock().unwrap().clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        sockets::close(&*self.listener);
    }
}
