//! What hyper does not tell about a request: its request-target byte for byte, and whether it had
//! both of the fields that say how long its body is.
//!
//! A [`Watched`] socket looks at what is read from it and notes one [`Head`] for each request, in
//! order. It never changes a byte. Where it cannot follow, it notes nothing more, and the front
//! then refuses the request.
//!
//! Behind a front that does not notice a client's departure, it keeps the end of what a client sends to itself until
//! what was asked is answered: hyper would give the answer up, and a client that has closed its sending half still
//! waits for it.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use http_body::{Body, Frame, SizeHint};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::fronts::{Does, Imitation};

/// The most bytes of a head that are followed: more than the HTTP parser accepts.
const HEAD_BYTES: usize = 512 * 1024;

/// The most bytes of a line between chunks.
const CHUNK_LINE_BYTES: usize = 16 * 1024;

/// What is noted of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    /// The request-target as it was sent.
    pub(super) target: Vec<u8>,
    /// Whether `Content-Length` and `Transfer-Encoding` were both there.
    pub(super) has_two_lengths: bool,
}

/// What the socket and the service of one connection share.
#[derive(Debug, Default)]
pub(super) struct Notes {
    heads: VecDeque<Head>,
    /// Whether the connection ends with a reset: where the end of the connection is the end of the
    /// body, that alone shows that the body is not complete.
    ends_with_reset: bool,
    /// How many requests are being answered.
    answering: usize,
    /// Who is told of the end of what the client sends, once nothing is being answered.
    end: Option<Waker>,
    /// Whether it is told at once.
    tells_end: bool,
}

/// Shared [`Notes`].
pub(super) type SharedNotes = Arc<Mutex<Notes>>;

/// Takes the note about the oldest request that has not been taken.
pub(super) fn take_head(notes: &SharedNotes) -> Option<Head> {
    notes.lock().unwrap_or_else(PoisonError::into_inner).heads.pop_front()
}

/// Has the connection end with a reset.
pub(super) fn end_with_reset(notes: &SharedNotes) {
    notes.lock().unwrap_or_else(PoisonError::into_inner).ends_with_reset = true;
}

/// Has nobody wait any longer for the answer to a client that may have gone: this program is to end.
pub(super) fn tell_end(notes: &SharedNotes) {
    let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
    notes.tells_end = true;
    if let Some(end) = notes.end.take() {
        end.wake();
    }
}

/// Notes that a request is being answered, until what is returned is dropped.
pub(super) fn answering(notes: &SharedNotes) -> Answering<()> {
    notes.lock().unwrap_or_else(PoisonError::into_inner).answering += 1;
    Answering { body: (), call: Call(notes.clone()) }
}

/// A request that is being answered, and the body that goes out last.
#[derive(Debug)]
pub(super) struct Answering<B> {
    body: B,
    call: Call,
}

impl Answering<()> {
    /// Has the request count as being answered until `body` has been handed over.
    pub(super) fn until_end_of<B>(self, body: B) -> Answering<B> {
        Answering { body, call: self.call }
    }
}

#[derive(Debug)]
struct Call(SharedNotes);

impl Drop for Call {
    fn drop(&mut self) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.answering -= 1;
        if notes.answering == 0
            && let Some(end) = notes.end.take()
        {
            end.wake();
        }
    }
}

impl<B: Body + Unpin> Body for Answering<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Where in a connection's bytes the scanner is.
#[derive(Debug)]
enum Place {
    /// In a head; the bytes of it so far.
    Head(Vec<u8>),
    /// In a body of known length.
    Body(u64),
    /// In a line with a chunk's size.
    ChunkSize(Vec<u8>),
    /// In a chunk, its line end included.
    Chunk(u64),
    /// In a line after the last chunk; its length so far.
    Trailer(usize),
    /// Lost.
    Unknown,
}

#[derive(Debug)]
struct Scanner {
    place: Place,
}

impl Scanner {
    const fn new() -> Self {
        Self { place: Place::Head(Vec::new()) }
    }

    /// Whether every request that was begun is here to its end.
    fn is_between(&self) -> bool {
        matches!(&self.place, Place::Head(head) if head.is_empty())
    }

    fn feed(&mut self, mut bytes: &[u8], mut note: impl FnMut(Head)) {
        while !bytes.is_empty() {
            let place = std::mem::replace(&mut self.place, Place::Unknown);
            self.place = match place {
                Place::Head(mut head) => {
                    let (line, ended) = take_line(&mut bytes);
                    head.extend_from_slice(line);
                    if !ended {
                        if head.len() > HEAD_BYTES { Place::Unknown } else { Place::Head(head) }
                    } else if is_blank_line(last_line(&head)) {
                        if head.iter().all(|byte| matches!(byte, b'\r' | b'\n')) {
                            // Blank lines before a request are skipped.
                            Place::Head(Vec::new())
                        } else {
                            read_head(&head).map_or(Place::Unknown, |(head, next)| {
                                note(head);
                                next
                            })
                        }
                    } else {
                        Place::Head(head)
                    }
                }
                Place::Body(left) => match skip(&mut bytes, left) {
                    0 => Place::Head(Vec::new()),
                    left => Place::Body(left),
                },
                Place::ChunkSize(mut line) => {
                    let (more, ended) = take_line(&mut bytes);
                    line.extend_from_slice(more);
                    match (ended, chunk_size(&line)) {
                        (false, _) if line.len() <= CHUNK_LINE_BYTES => Place::ChunkSize(line),
                        (true, Some(0)) => Place::Trailer(0),
                        (true, Some(size)) => Place::Chunk(size.saturating_add(2)),
                        _ => Place::Unknown,
                    }
                }
                Place::Chunk(left) => match skip(&mut bytes, left) {
                    0 => Place::ChunkSize(Vec::new()),
                    left => Place::Chunk(left),
                },
                Place::Trailer(length) => {
                    let (more, ended) = take_line(&mut bytes);
                    let blank = length == 0 && is_blank_line(more) || length == 1 && more == b"\n";
                    match ended {
                        true if blank => Place::Head(Vec::new()),
                        true => Place::Trailer(0),
                        false => Place::Trailer(length + more.len()),
                    }
                }
                Place::Unknown => return,
            };
        }
    }
}

/// Takes bytes up to and with the next line feed; says whether there was one.
fn take_line<'a>(bytes: &mut &'a [u8]) -> (&'a [u8], bool) {
    let (end, ended) = match bytes.iter().position(|&byte| byte == b'\n') {
        Some(at) => (at + 1, true),
        None => (bytes.len(), false),
    };
    let (line, rest) = bytes.split_at(end);
    *bytes = rest;
    (line, ended)
}

fn skip(bytes: &mut &[u8], left: u64) -> u64 {
    let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    *bytes = &bytes[take..];
    left - take as u64
}

/// The last line of what ends with a line feed.
fn last_line(head: &[u8]) -> &[u8] {
    let before = &head[..head.len().saturating_sub(1)];
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    &head[start..]
}

fn is_blank_line(line: &[u8]) -> bool {
    matches!(line, b"\n" | b"\r\n")
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| matches!(byte, b';' | b'\r' | b'\n' | b' ' | b'\t')).next()?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Reads a whole head: what is noted of it, and what follows it.
fn read_head(head: &[u8]) -> Option<(Head, Place)> {
    let mut lines = head
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .skip_while(|line| line.is_empty());
    let request_line = lines.next()?;
    let mut words = request_line.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let (_method, target) = (words.next()?, words.next()?.to_vec());
    let mut length = None;
    let mut is_chunked = false;
    for line in lines {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let (name, value) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            length = Some(std::str::from_utf8(value).ok()?.parse::<u64>().ok()?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            is_chunked = true;
        }
    }
    let next = match (is_chunked, length) {
        (true, _) => Place::ChunkSize(Vec::new()),
        (false, Some(length)) if length > 0 => Place::Body(length),
        (false, _) => Place::Head(Vec::new()),
    };
    Some((Head { target, has_two_lengths: is_chunked && length.is_some() }, next))
}

/// A public client's socket.
#[derive(Debug)]
pub(super) struct Watched {
    stream: TcpStream,
    scanner: Scanner,
    notes: SharedNotes,
    imitation: Arc<Imitation>,
}

impl Watched {
    pub(super) fn new(stream: TcpStream, imitation: Arc<Imitation>) -> (Self, SharedNotes) {
        let notes = SharedNotes::default();
        (Self { stream, scanner: Scanner::new(), notes: notes.clone(), imitation }, notes)
    }

    /// Whether the end of what the client sends waits until what it asked is answered.
    fn keeps_end(&self, context: &Context<'_>) -> bool {
        if !self.imitation.does(Does::Deaf) || !self.scanner.is_between() {
            return false;
        }
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let keeps = notes.answering > 0 && !notes.tells_end;
        if keeps {
            self.imitation.say(Does::Deaf);
            notes.end = Some(context.waker().clone());
        }
        keeps
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.notes.lock().unwrap_or_else(PoisonError::into_inner).ends_with_reset {
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        let read = &buffer.filled()[before..];
        if read.is_empty() && this.keeps_end(context) {
            return Poll::Pending;
        }
        let Self { scanner, notes, .. } = this;
        scanner.feed(read, |head| {
            notes.lock().unwrap_or_else(PoisonError::into_inner).heads.push_back(head);
        });
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.notes.lock().unwrap_or_else(PoisonError::into_inner).ends_with_reset {
            // A clean end must not be sent before the reset.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(bytes: &[u8], step: usize) -> Vec<(String, bool)> {
        let mut scanner = Scanner::new();
        let mut heads = Vec::new();
        for piece in bytes.chunks(step) {
            scanner.feed(piece, |head| {
                heads.push((String::from_utf8(head.target).unwrap(), head.has_two_lengths));
            });
        }
        heads
    }

    #[test]
    fn follows_requests_of_every_framing_however_they_are_cut() {
        let bytes = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n\
            \r\nPOST /b?# HTTP/1.1\r\nContent-Length: 12\r\n\r\nGET /no HTTP\
            POST /c HTTP/1.1\nTransfer-Encoding: chunked\n\n5;x=y\r\nGET /\r\n3\r\n/no\r\n0\r\nT: v\r\n\r\n\
            POST http://h/d HTTP/1.1\r\ncontent-length : 0\r\nTRANSFER-ENCODING: chunked\r\n\r\n0\r\n\r\n\
            PUT * HTTP/1.1\r\ncontent-length:0\r\n\r\n";
        let expected: Vec<_> =
            [("/a", false), ("/b?#", false), ("/c", false), ("http://h/d", true), ("*", false)]
                .map(|(target, two)| (target.to_owned(), two))
                .to_vec();
        for step in 1..40 {
            assert_eq!(scan(bytes, step), expected, "{step}");
        }
        assert_eq!(scan(bytes, bytes.len()), expected);
    }

    #[test]
    fn notes_nothing_after_what_it_cannot_follow() {
        assert!(scan(b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\nGET / HTTP/1.1\r\n\r\n", 7).is_empty());
        let heads = scan(
            b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nGET /b HTTP/1.1\r\n\r\n",
            1000,
        );
        assert_eq!(heads.len(), 1);
        assert!(scan(&vec![b'a'; HEAD_BYTES * 2], 1000).is_empty());
    }
}
