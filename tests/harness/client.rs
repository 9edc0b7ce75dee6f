//! A public client that sends exactly the bytes it is told to and reads answers strictly.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::MaybeTlsStream;

use crate::{PATIENCE, sockets};

/// A request, to the byte.
#[derive(Debug, Clone)]
pub struct Request {
    method: String,
    target: String,
    fields: Vec<(String, Vec<u8>)>,
    body: Option<Vec<u8>>,
}

/// An answer as it came.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The fields in order, names as they were written.
    pub fields: Vec<(String, Vec<u8>)>,
    /// The body, transfer coding undone.
    pub body: Vec<u8>,
    /// Whether the framing says that this was all of the body.
    pub complete: bool,
}

impl Answer {
    /// The first value of a field.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<String> {
        self.all(name).into_iter().next()
    }

    /// Every value of a field.
    #[must_use]
    pub fn all(&self, name: &str) -> Vec<String> {
        let values = self.fields.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name));
        values.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Request {
    /// A request with a method and a target; `Host` must be added.
    #[must_use]
    pub fn new(method: &str, target: &str) -> Self {
        Self { method: method.to_owned(), target: target.to_owned(), fields: Vec::new(), body: None }
    }

    /// `GET`, with some `Host`.
    #[must_use]
    pub fn get(target: &str) -> Self {
        Self::new("GET", target).field("Host", "127.0.0.1")
    }

    /// A request to a tunnel by its host name.
    #[must_use]
    pub fn to(tunnel: &str, method: &str, target: &str) -> Self {
        Self::new(method, target).field("Host", &format!("{tunnel}.localhost"))
    }

    /// Adds a field.
    #[must_use]
    pub fn field(self, name: &str, value: &str) -> Self {
        self.raw_field(name, value.as_bytes())
    }

    /// Adds a field of any bytes.
    #[must_use]
    pub fn raw_field(mut self, name: &str, value: &[u8]) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the body and its length.
    #[must_use]
    pub fn body(mut self, body: Vec<u8>) -> Self {
        self.fields.push(("Content-Length".to_owned(), body.len().to_string().into_bytes()));
        self.body = Some(body);
        self
    }

    /// Sets what is sent behind the head, as it is.
    #[must_use]
    pub fn raw_body(mut self, bytes: Vec<u8>) -> Self {
        self.body = Some(bytes);
        self
    }

    /// The head as bytes.
    #[must_use]
    pub fn head(&self) -> Vec<u8> {
        let mut bytes = format!("{} {} HTTP/1.1\r\n", self.method, self.target).into_bytes();
        for (name, value) in &self.fields {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes
    }

    /// Sends it on a new connection and reads the whole answer.
    pub async fn send(&self, to: SocketAddr) -> Answer {
        Connection::open(to).await.exchange(self).await
    }
}

/// A connection to the public side.
#[derive(Debug)]
pub struct Connection {
    stream: MaybeTlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        sockets::hang_up(sockets::tcp(&self.stream));
    }
}

impl Connection {
    /// Opens it.
    pub async fn open(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(MaybeTlsStream::Plain(stream))
    }

    /// Speaks over a stream that is open already.
    #[must_use]
    pub const fn over(stream: MaybeTlsStream<TcpStream>) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Writes bytes.
    pub async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Sends a request and reads its answer. The connection may be used again if the answer was complete.
    pub async fn exchange(&mut self, request: &Request) -> Answer {
        self.begin(request).await;
        self.answer(&request.method).await
    }

    /// Sends a request.
    pub async fn begin(&mut self, request: &Request) {
        let mut bytes = request.head();
        bytes.extend_from_slice(request.body.as_deref().unwrap_or_default());
        // An edge that refuses a large body answers before it has read all of it.
        let (mut read, mut write) = tokio::io::split(&mut self.stream);
        let mut early = [0; 4096];
        let sent = async {
            if write.write_all(&bytes).await.is_ok() {
                drop(write.flush().await);
            }
        };
        tokio::select! {
            biased;
            read = read.read(&mut early) => if let Ok(count) = read {
                self.buffer.extend_from_slice(&early[..count]);
            },
            () = sent => {}
        }
    }

    /// Reads the next answer to its end.
    pub async fn answer(&mut self, method: &str) -> Answer {
        let mut answer = self.head().await;
        let length = answer.field("content-length").map(|length| length.parse::<usize>().unwrap());
        let chunked =
            answer.field("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
        if method == "HEAD" || matches!(answer.status, 204 | 304) {
            answer.complete = true;
        } else if chunked {
            (answer.body, answer.complete) = self.chunked().await;
        } else if let Some(length) = length {
            while self.buffer.len() < length && self.more().await {}
            answer.complete = self.buffer.len() >= length;
            answer.body = self.buffer.drain(..length.min(self.buffer.len())).collect();
        } else {
            while self.more().await {}
            answer.body = std::mem::take(&mut self.buffer);
        }
        answer
    }

    /// Reads a head; informational ones before it are skipped.
    pub async fn head(&mut self) -> Answer {
        loop {
            let answer = self.head_of_any_status().await;
            if answer.status >= 200 {
                return answer;
            }
        }
    }

    /// Reads a head, also an informational one.
    pub async fn head_of_any_status(&mut self) -> Answer {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(
                self.more().await,
                "the connection ended before a head: {:?}",
                String::from_utf8_lossy(&self.buffer)
            );
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let mut lines =
            head[..end - 4].split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let status_line = String::from_utf8_lossy(lines.next().unwrap()).into_owned();
        let status: u16 = status_line.split(' ').nth(1).unwrap().parse().unwrap();
        let fields = lines.map(|line| {
            let colon = line.iter().position(|&b| b == b':').unwrap();
            (String::from_utf8_lossy(&line[..colon]).into_owned(), line[colon + 1..].trim_ascii().to_owned())
        });
        Answer { status, fields: fields.collect(), body: Vec::new(), complete: false }
    }

    /// Reads a chunked body that must come to its proper end.
    pub async fn chunked_body(&mut self) -> Vec<u8> {
        let (body, complete) = self.chunked().await;
        assert!(complete, "the body broke off after {} bytes", body.len());
        body
    }

    async fn chunked(&mut self) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await {
            if chunk.is_empty() {
                return (body, true);
            }
            body.extend_from_slice(&chunk);
        }
        (body, false)
    }

    /// Reads one chunk: empty for the last one, `None` when the connection ends before that.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        let line_end = loop {
            if let Some(at) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                break at;
            }
            if !self.more().await {
                return None;
            }
        };
        let line = String::from_utf8_lossy(&self.buffer[..line_end]).into_owned();
        let size = usize::from_str_radix(line.split(';').next().unwrap(), 16).unwrap();
        while self.buffer.len() < line_end + 2 + size + 2 {
            if !self.more().await {
                return None;
            }
        }
        let whole: Vec<u8> = self.buffer.drain(..line_end + 2 + size + 2).collect();
        Some(whole[line_end + 2..line_end + 2 + size].to_owned())
    }

    /// Reads exactly that many bytes of a body without transfer coding; fewer at the connection's end.
    pub async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count && self.more().await {}
        self.buffer.drain(..count.min(self.buffer.len())).collect()
    }

    /// The body of an answer whose head has been read, whatever its framing.
    pub fn body(&mut self, head: &Answer) -> Body<'_> {
        let chunked = head.field("transfer-encoding").is_some_and(|own| own.eq_ignore_ascii_case("chunked"));
        let left = if chunked {
            None
        } else {
            Some(head.field("content-length").expect("a body has a framing").parse().unwrap())
        };
        Body { connection: self, left, decoded: Vec::new() }
    }

    /// Reads whatever comes; false at the end of the connection.
    async fn more(&mut self) -> bool {
        let mut bytes = vec![0; 64 * 1024];
        match timeout(PATIENCE, self.stream.read(&mut bytes)).await.expect("an answer in time") {
            Ok(0) | Err(_) => false,
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                true
            }
        }
    }
}

/// A body on its way. Fronts may cut it into other chunks than the upstream did.
#[derive(Debug)]
pub struct Body<'c> {
    connection: &'c mut Connection,
    /// How much of its length has not been read; `None` where it is chunked.
    left: Option<usize>,
    decoded: Vec<u8>,
}

impl Body<'_> {
    /// Reads exactly that many bytes; fewer where the body, or the connection, ends before.
    pub async fn take(&mut self, count: usize) -> Vec<u8> {
        if let Some(left) = &mut self.left {
            let bytes = self.connection.bytes(count.min(*left)).await;
            *left -= bytes.len();
            return bytes;
        }
        while self.decoded.len() < count {
            match self.connection.chunk().await {
                Some(chunk) if !chunk.is_empty() => self.decoded.extend_from_slice(&chunk),
                // The last chunk is for `rest`, which has to see it as well.
                Some(_) => {
                    self.left = Some(0);
                    break;
                }
                None => break,
            }
        }
        self.decoded.drain(..count.min(self.decoded.len())).collect()
    }

    /// Reads to the end, and says whether the framing says that this was all.
    pub async fn rest(mut self) -> (Vec<u8>, bool) {
        let mut all = Vec::new();
        loop {
            let more = self.take(64 * 1024).await;
            if more.is_empty() {
                return (all, self.left == Some(0));
            }
            all.extend_from_slice(&more);
        }
    }
}
