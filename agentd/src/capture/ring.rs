//! The ring of all records: bounded by memory, the oldest whole ones leave first.
//!
//! A record's lock is held only for copying pieces in, and for cloning it, which shares the bodies. So a tap never waits
//! for somebody who reads.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use http::{HeaderName, HeaderValue};
use proto::{
    error::ErrorCode,
    id::{RequestId, TunnelName},
    socket::Message,
};
use tokio::sync::broadcast;

use super::{
    fields::Fields,
    kept::Kept,
    record::{Answer, Asked, Direction, Frame, Kind, Outcome, Record, Source, since},
};

/// How many events may wait for somebody who listens.
const EVENTS: usize = 4096;

/// One record may weigh this part of all at most, so that it does not push all others out.
const SHARE: usize = 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has happened. It holds nothing that passed: whoever wants to know looks at the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// There is a new one.
    Added(u64),
    /// Its answer has begun, or a message of a WebSocket has passed.
    Changed(u64),
    /// It has ended.
    Ended(u64),
    /// It has left to make room.
    Removed(u64),
    /// All have been forgotten.
    Cleared,
    /// A piece of a body has passed.
    Piece { id: u64, direction: Direction, offset: u64, len: usize, at_us: u64 },
    /// The message with this number, from 0, has passed.
    Frame { id: u64, number: u64 },
}

/// One request and what never changes about it.
#[derive(Debug)]
pub(crate) struct Captured {
    /// Its number in this process, from 1.
    pub(crate) id: u64,
    pub(crate) tunnel: TunnelName,
    pub(crate) upstream: Arc<str>,
    /// Unix time in microseconds.
    pub(crate) received_at: u64,
    began: Instant,
    record: Mutex<Record>,
    /// What the ring counts for it.
    weight: AtomicUsize,
}

impl Captured {
    /// Lets go of what is kept. Whatever still passes is not kept either.
    fn empty(&self) {
        let mut record = lock(&self.record);
        let (source, kind) = (record.source, record.kind);
        let emptied = std::mem::replace(&mut *record, Record::new(source, kind, "".into(), "".into()));
        record.evicted = true;
        drop(record);
        drop(emptied);
    }

    /// What is known of it now.
    pub(crate) fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// Looks at what is known of it, without copying; `look` is short.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Record) -> T) -> T {
        look(&lock(&self.record))
    }
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<Arc<Captured>>,
    weight: usize,
    last_id: u64,
    evicted: u64,
}

/// All records of this process.
#[derive(Debug)]
pub(crate) struct Captures {
    ring: Mutex<Ring>,
    limit: usize,
    /// Made when somebody listens for the first time: all of its places are in memory from then on.
    events: OnceLock<broadcast::Sender<Event>>,
}

impl Captures {
    /// None yet; all together may weigh `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { ring: Mutex::default(), limit, events: OnceLock::new() }
    }

    /// The records, oldest first.
    pub(crate) fn all(&self) -> Vec<Arc<Captured>> {
        lock(&self.ring).kept.iter().cloned().collect()
    }

    /// The record of that number, while it is kept.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<Captured>> {
        let ring = lock(&self.ring);
        let at = ring.kept.binary_search_by_key(&id, |captured| captured.id).ok()?;
        ring.kept.get(at).cloned()
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        let forgotten = {
            let mut ring = lock(&self.ring);
            ring.weight = 0;
            std::mem::take(&mut ring.kept)
        };
        forgotten.iter().for_each(|captured| captured.empty());
        self.say(Event::Cleared);
    }

    /// How much they weigh, how much they may, how many there are, and how many have left.
    pub(crate) fn figures(&self) -> (usize, usize, usize, u64) {
        let ring = lock(&self.ring);
        (ring.weight, self.limit, ring.kept.len(), ring.evicted)
    }

    /// What happens from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.get_or_init(|| broadcast::Sender::new(EVENTS)).subscribe()
    }

    fn say(&self, event: Event) {
        // Only somebody who listens costs anything.
        if let Some(events) = self.events.get().filter(|events| events.receiver_count() > 0) {
            let _ = events.send(event);
        }
    }

    /// Takes in a record of a request that was received `at`.
    fn add(&self, lens: &Lens, record: Record, upstream: Option<Arc<str>>) -> Arc<Captured> {
        let received = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let weight = record.weight();
        let mut ring = lock(&self.ring);
        ring.last_id += 1;
        let captured = Arc::new(Captured {
            id: ring.last_id,
            tunnel: lens.tunnel.clone(),
            upstream: upstream.unwrap_or_else(|| Arc::clone(&lens.upstream)),
            received_at: received.as_micros() as u64,
            began: Instant::now(),
            record: Mutex::new(record),
            weight: AtomicUsize::new(weight),
        });
        ring.kept.push_back(Arc::clone(&captured));
        ring.weight += weight;
        let left = self.make_room(&mut ring);
        drop(ring);
        self.say(Event::Added(captured.id));
        self.forget(left);
        captured
    }

    /// Counts what a record weighs by now. Records that leave are given back, so that they are freed without the lock.
    fn weigh(&self, captured: &Captured, weight: usize) {
        if captured.weight.load(Ordering::Relaxed) == weight {
            return;
        }
        let mut ring = lock(&self.ring);
        // One that has left is not counted any more.
        if ring.kept.front().is_none_or(|oldest| oldest.id > captured.id) {
            return;
        }
        let before = captured.weight.swap(weight, Ordering::Relaxed);
        ring.weight = (ring.weight + weight).saturating_sub(before);
        let left = self.make_room(&mut ring);
        drop(ring);
        self.forget(left);
    }

    fn make_room(&self, ring: &mut Ring) -> Vec<Arc<Captured>> {
        let mut left = Vec::new();
        while ring.weight > self.limit {
            let Some(oldest) = ring.kept.pop_front() else { break };
            ring.weight = ring.weight.saturating_sub(oldest.weight.load(Ordering::Relaxed));
            ring.evicted += 1;
            left.push(oldest);
        }
        left
    }

    fn forget(&self, left: Vec<Arc<Captured>>) {
        for captured in left {
            captured.empty();
            self.say(Event::Removed(captured.id));
        }
    }
}

/// What a tunnel that is inspected makes taps with.
#[derive(Debug)]
pub(crate) struct Lens {
    captures: Arc<Captures>,
    tunnel: TunnelName,
    upstream: Arc<str>,
    body_bytes: usize,
}

impl Lens {
    /// For one tunnel; of each body `body_bytes` are kept.
    pub(crate) fn new(
        captures: Arc<Captures>,
        tunnel: TunnelName,
        upstream: &str,
        body_bytes: usize,
    ) -> Self {
        let body_bytes = body_bytes.min(captures.limit / SHARE / 2);
        Self { captures, tunnel, upstream: upstream.into(), body_bytes }
    }

    /// A request has come from the edge, which `upstream` is asked for as `target`. Without one it is the tunnel's own; an
    /// empty one says that there is none.
    pub(crate) fn request(
        &self,
        id: &RequestId,
        kind: Kind,
        method: &str,
        target: &str,
        asked: Asked,
        upstream: Option<String>,
    ) -> Capture {
        let mut record = Record::new(Source::Edge, kind, method.into(), target.into());
        record.request_id = Some(id.clone());
        record.asked = asked;
        record.is_whole = false;
        self.begin(record, upstream.map(Arc::from))
    }

    /// A request is about to be sent again, to where it went.
    pub(crate) fn replay(
        &self,
        of: &Captured,
        method: &str,
        target: &str,
        fields: Fields,
        body: &[u8],
    ) -> Capture {
        let mut record = Record::new(Source::Replay, Kind::Http, method.into(), target.into());
        record.replay_of = Some(of.id);
        record.asked = of.look(|of| match &of.asked {
            Asked::Path(_) if *of.target != *target => Asked::Unknown,
            asked => asked.clone(),
        });
        record.fields = fields;
        record.body = Kept::whole(body, self.body_bytes);
        self.begin(record, Some(Arc::clone(&of.upstream)))
    }

    /// Puts a request from elsewhere into the list; its number.
    pub(crate) fn import(&self, found: Elsewhere<'_>) -> u64 {
        let mut record = Record::new(Source::Import, found.kind, found.method.into(), found.target.into());
        record.asked = found.asked;
        record.fields = found.fields;
        record.body = found.body.keep(self.body_bytes);
        // How much is missing may be unknown.
        record.is_whole = found.body.size.is_none_or(|size| size > found.body.bytes.len() as u64);
        record.answer = found
            .answer
            .map(|(status, fields, body)| Answer::new(status, fields, body.keep(self.body_bytes)));
        record.frames_of_elsewhere(found.frames, found.frames_dropped, self.body_bytes);
        record.outcome = Some(Outcome::Complete);
        let mut capture = self.begin(record, None);
        capture.ended = true;
        capture.tap.captured.id
    }

    fn begin(&self, mut record: Record, upstream: Option<Arc<str>>) -> Capture {
        record.leads_nowhere = upstream.as_ref().unwrap_or(&self.upstream).is_empty();
        let captured = self.captures.add(self, record, upstream);
        let tap = Tap { captures: Arc::clone(&self.captures), captured, body_bytes: self.body_bytes };
        Capture { tap, ended: false }
    }
}

/// A request that was captured elsewhere, or never sent.
#[derive(Debug)]
pub(crate) struct Elsewhere<'a> {
    pub(crate) kind: Kind,
    pub(crate) asked: Asked,
    pub(crate) method: &'a str,
    pub(crate) target: &'a str,
    pub(crate) fields: Fields,
    pub(crate) body: Found<'a>,
    pub(crate) answer: Option<(u16, Fields, Found<'a>)>,
    pub(crate) frames: Vec<Frame>,
    /// How many messages were before those.
    pub(crate) frames_dropped: u64,
}

/// What somebody else kept of a body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found<'a> {
    pub(crate) bytes: &'a [u8],
    /// How long it was, where these are not all of it; no more than they are where nobody knows.
    pub(crate) size: Option<u64>,
}

impl Found<'_> {
    fn keep(self, limit: usize) -> Kept {
        match self.size {
            None => Kept::whole(self.bytes, limit),
            Some(size) => Kept::beginning(self.bytes, size, limit),
        }
    }
}

/// A request that is being captured. Dropped before its end, it counts as cancelled.
#[derive(Debug)]
pub(crate) struct Capture {
    tap: Tap,
    ended: bool,
}

/// Where something of a request passes.
#[derive(Debug, Clone)]
pub(crate) struct Tap {
    captures: Arc<Captures>,
    captured: Arc<Captured>,
    body_bytes: usize,
}

impl Capture {
    pub(crate) const fn tap(&self) -> &Tap {
        &self.tap
    }

    pub(crate) fn id(&self) -> u64 {
        self.tap.captured.id
    }

    /// All of the answer has passed.
    pub(crate) fn complete(self) {
        self.end(Outcome::Complete, None);
    }

    /// There is no whole answer.
    pub(crate) fn failed(self, code: ErrorCode) {
        self.end(Outcome::Failed, Some(code.as_str()));
    }

    fn end(mut self, outcome: Outcome, error: Option<&'static str>) {
        self.ended = true;
        self.tap.end(outcome, error);
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.ended {
            self.tap.end(Outcome::Cancelled, None);
        }
    }
}

impl Tap {
    /// Notes something, unless the record has left.
    fn note<T>(&self, note: impl FnOnce(&mut Record, u64) -> T) -> Option<T> {
        let mut record = lock(&self.captured.record);
        if record.evicted {
            return None;
        }
        let at_us = since(self.captured.began) - record.waited;
        let noted = note(&mut record, at_us);
        let weight = record.weight();
        drop(record);
        self.captures.weigh(&self.captured, weight);
        Some(noted)
    }

    fn say(&self, event: impl FnOnce(u64) -> Event) {
        self.captures.say(event(self.captured.id));
    }

    /// It is sent now, whenever it was listed.
    pub(crate) fn sent(&self) {
        self.note(|record, at_us| record.waited += at_us);
    }

    /// The head of the request, as it goes to the upstream, and its whole body if that is there.
    pub(crate) fn request<'a>(
        &self,
        fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>,
        body: Option<&[u8]>,
    ) {
        self.note(|record, _| {
            record.fields = Fields::copy(fields);
            if let Some(body) = body {
                record.body = Kept::whole(body, self.body_bytes);
                record.is_whole = true;
            }
        });
    }

    /// The request's body has ended as it should.
    pub(crate) fn request_ended(&self) {
        self.note(|record, _| record.is_whole = true);
    }

    /// A piece of the request's body.
    pub(crate) fn request_piece(&self, piece: &[u8]) {
        let offset = self.note(|record, at_us| {
            let offset = record.body.size();
            record.body.push(piece, self.body_bytes);
            (offset, at_us)
        });
        if let Some((offset, at_us)) = offset {
            let direction = Direction::ToUpstream;
            self.say(|id| Event::Piece { id, direction, offset, len: piece.len(), at_us });
        }
    }

    /// The head of the answer. `connected` is when a connection was opened for it.
    pub(crate) fn answer<'a>(
        &self,
        status: u16,
        fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>,
        connected: Option<Instant>,
    ) {
        let began = self.captured.began;
        self.note(|record, at_us| {
            record.times.head = Some(at_us);
            record.times.connected = connected.map(|at| {
                (at.saturating_duration_since(began).as_micros() as u64).saturating_sub(record.waited)
            });
            record.answer = Some(Answer::new(status, Fields::copy(fields), Kept::EMPTY));
        });
        self.say(Event::Changed);
    }

    /// The head of an answer that is the agent's own.
    pub(crate) fn own_answer<'a>(
        &self,
        status: u16,
        fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>,
    ) {
        self.note(|record, at_us| {
            record.times.head = Some(at_us);
            record.answer = Some(Answer::new(status, Fields::copy(fields), Kept::EMPTY).own());
        });
        self.say(Event::Changed);
    }

    /// A piece of the answer's body.
    pub(crate) fn answer_piece(&self, piece: &[u8]) {
        let limit = self.body_bytes;
        let noted = self.note(|record, at_us| (record.answer_piece(piece, limit, at_us), at_us));
        if let Some((offset, at_us)) = noted {
            let direction = Direction::ToClient;
            self.say(|id| Event::Piece { id, direction, offset, len: piece.len(), at_us });
        }
    }

    /// A message of a WebSocket.
    pub(crate) fn frame(&self, direction: Direction, message: &Message) {
        let limit = self.body_bytes;
        let number = self.note(|record, at_us| {
            record.frame(direction, message, limit, at_us);
            record.frames_total - 1
        });
        if let Some(number) = number {
            self.say(|id| Event::Frame { id, number });
        }
    }

    fn end(&self, outcome: Outcome, error: Option<&'static str>) {
        self.note(|record, at_us| {
            record.times.ended = Some(at_us);
            record.outcome = Some(outcome);
            record.error = error;
        });
        self.say(Event::Ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(captures: &Arc<Captures>, body_bytes: usize) -> Lens {
        Lens::new(Arc::clone(captures), "web".parse().unwrap(), "http://localhost:1", body_bytes)
    }

    fn request(lens: &Lens, body: &[u8]) -> Capture {
        let id = RequestId::from_random([1; 16]);
        let capture = lens.request(&id, Kind::Http, "POST", "/x", Asked::Target, None);
        capture.tap().request(std::iter::empty(), Some(body));
        capture
    }

    #[test]
    fn the_oldest_leave_when_there_is_no_room() {
        let captures = Arc::new(Captures::new(1 << 20));
        let lens = lens(&captures, 64 << 10);
        for _ in 0..100 {
            let capture = request(&lens, &[7; 50_000]);
            capture.tap().answer(200, std::iter::empty(), None);
            capture.tap().answer_piece(&[8; 100_000]);
            capture.complete();
            let (weight, limit, _, _) = captures.figures();
            assert!(weight <= limit, "{weight}");
        }
        let (weight, _, count, evicted) = captures.figures();
        let all = captures.all();
        assert_eq!((count as u64 + evicted, all.len()), (100, count));
        assert_eq!(all.iter().map(|one| one.id).collect::<Vec<_>>(), (evicted + 1..=100).collect::<Vec<_>>());
        assert_eq!(weight, all.iter().map(|one| one.look(Record::weight)).sum::<usize>());
        assert!(captures.get(1).is_none() && captures.get(100).is_some());
        let record = captures.get(100).unwrap().record();
        assert_eq!((record.body.to_vec(), record.body.is_cut()), (vec![7; 50_000], false));
        let answer = record.answer.unwrap().body;
        assert_eq!((answer.size(), answer.len(), answer.is_cut()), (100_000, 64 << 10, true));
    }

    #[test]
    fn a_request_without_an_upstream_leads_nowhere() {
        let captures = Arc::new(Captures::new(1 << 20));
        let leads_nowhere = |own: &str, upstream: Option<&str>| {
            let lens = Lens::new(Arc::clone(&captures), "web".parse().unwrap(), own, 10);
            let id = RequestId::from_random([1; 16]);
            let capture =
                lens.request(&id, Kind::Http, "GET", "/", Asked::Target, upstream.map(ToOwned::to_owned));
            captures.get(capture.id()).unwrap().look(|record| record.leads_nowhere)
        };
        assert!(leads_nowhere("", None) && leads_nowhere("http://localhost:1", Some("")));
        assert!(!leads_nowhere("http://localhost:1", None) && !leads_nowhere("", Some("http://localhost:2")));
    }

    #[test]
    fn one_that_has_left_keeps_nothing_more() {
        let captures = Arc::new(Captures::new(1 << 20));
        let lens = lens(&captures, 64 << 10);
        let long = request(&lens, b"x");
        long.tap().answer(200, std::iter::empty(), None);
        for _ in 0..50 {
            request(&lens, &[7; 60_000]).complete();
        }
        assert!(captures.get(long.id()).is_none());
        let (weight, ..) = captures.figures();
        long.tap().answer_piece(&[1; 10_000]);
        assert_eq!(captures.figures().0, weight);
        assert!(long.tap.captured.record().answer.is_none());
        long.complete();

        let cleared = request(&lens, b"x");
        cleared.tap().answer(200, std::iter::empty(), None);
        captures.clear();
        cleared.tap().answer_piece(&[1; 10_000]);
        assert!(captures.get(cleared.id()).is_none() && cleared.tap.captured.record().answer.is_none());
        cleared.complete();
    }

    #[test]
    fn what_waited_for_others_is_timed_from_when_it_was_sent() {
        let captures = Arc::new(Captures::new(1 << 20));
        let capture = request(&lens(&captures, 10), b"");
        while capture.tap.captured.began.elapsed() < std::time::Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        let before = Instant::now();
        capture.tap().sent();
        capture.tap().answer(200, std::iter::empty(), Some(Instant::now()));
        let most = since(before);
        let times = capture.tap.captured.record().times;
        assert!(times.connected <= times.head && times.head <= Some(most), "{times:?} {most}");
        capture.complete();
    }

    #[test]
    fn one_record_does_not_push_out_all_others() {
        let captures = Arc::new(Captures::new(1 << 20));
        let lens = lens(&captures, 1 << 30);
        request(&lens, b"small").complete();
        let large = request(&lens, &[1; 4 << 20]);
        large.tap().answer(200, std::iter::empty(), None);
        large.tap().answer_piece(&[2; 4 << 20]);
        assert_eq!(captures.all().len(), 2);
        assert!(captures.figures().0 <= ((1 << 20) / SHARE + 8192) * 4 / 3);
    }

    #[test]
    fn who_listens_hears_what_happens_and_a_dropped_one_is_cancelled() {
        let captures = Arc::new(Captures::new(1 << 20));
        let lens = lens(&captures, 10);
        request(&lens, b"nobody listens").complete();
        let mut events = captures.events();
        let capture = request(&lens, b"");
        capture.tap().answer(200, std::iter::empty(), None);
        capture.tap().answer_piece(b"abc");
        capture.tap().frame(Direction::ToClient, &Message::Text("hi".into()));
        drop(capture);
        captures.clear();
        let mut heard = Vec::new();
        while let Ok(event) = events.try_recv() {
            heard.push(match event {
                Event::Piece { id, direction, offset, len, .. } => {
                    Event::Piece { id, direction, offset, len, at_us: 0 }
                }
                other => other,
            });
        }
        let piece = Event::Piece { id: 2, direction: Direction::ToClient, offset: 0, len: 3, at_us: 0 };
        let wanted = [
            Event::Added(2),
            Event::Changed(2),
            piece,
            Event::Frame { id: 2, number: 0 },
            Event::Ended(2),
            Event::Cleared,
        ];
        assert_eq!(heard, wanted);
        assert_eq!((captures.all().len(), captures.figures().0), (0, 0));
    }

    #[test]
    fn only_the_last_messages_are_kept() {
        let captures = Arc::new(Captures::new(8 << 20));
        let lens = lens(&captures, 256 << 10);
        let capture = request(&lens, b"");
        for number in 0..2000 {
            capture.tap().frame(Direction::ToUpstream, &Message::Text(number.to_string()));
        }
        capture.tap().frame(Direction::ToClient, &Message::Binary(vec![1; 10_000].into()));
        let record = capture.tap.captured.record();
        assert_eq!((record.frames.len(), record.frames_total), (1000, 2001));
        let last = record.frames.back().unwrap();
        assert_eq!(
            (last.size, last.first.len(), last.kind),
            (10_000, 4096, super::super::record::FrameKind::Binary)
        );
        for _ in 0..200 {
            capture.tap().frame(Direction::ToClient, &Message::Binary(vec![1; 10_000].into()));
        }
        assert!(capture.tap.captured.record().frames.len() < 70, "within the size of a body");
    }
}
