//! What happens, as server-sent events.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http_body::Frame;
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        broadcast::{Receiver, error::RecvError},
    },
    time::timeout,
};

use super::{
    filter::{Filter, parse_ids},
    redact::Redact,
    shape::{self, BodyEvent, FrameEvent, LaggedEvent, RequestEvent, Summary},
};
use crate::capture::{
    record::Direction,
    ring::{Captured, Captures, Event},
};

/// How long nothing is said, so that a connection whose other end has vanished is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Whose bodies and frames are wanted.
#[derive(Debug, Clone, Default)]
pub(crate) enum Watch {
    #[default]
    None,
    All,
    Of(BTreeSet<u64>),
}

impl Watch {
    /// Reads the parameter.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" => Ok(Self::None),
            "all" => Ok(Self::All),
            ids => parse_ids(ids).map(Self::Of),
        }
    }

    fn wants(&self, id: u64) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Of(ids) => ids.contains(&id),
        }
    }
}

/// The events from now on, for whoever wants those and has a place until they end.
pub(crate) fn stream(
    captures: Arc<Captures>,
    redact: Redact,
    filter: Filter,
    watch: Watch,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
    let receiver = captures.events();
    let listener = Listener { captures, redact, filter, watch, receiver, _place: place };
    // The first words make the head go out.
    stream::unfold((listener, Some(": here\nretry: 1000\n\n".to_owned())), async |(mut listener, first)| {
        let text = match first {
            Some(first) => first,
            None => listener.next().await?,
        };
        Some((Ok(Frame::data(Bytes::from(text))), (listener, None)))
    })
}

struct Listener {
    captures: Arc<Captures>,
    redact: Redact,
    filter: Filter,
    watch: Watch,
    receiver: Receiver<Event>,
    _place: OwnedSemaphorePermit,
}

impl Listener {
    async fn next(&mut self) -> Option<String> {
        loop {
            match timeout(KEEP_ALIVE, self.receiver.recv()).await {
                Err(_) => return Some(":\n\n".to_owned()),
                Ok(Err(RecvError::Closed)) => return None,
                Ok(Err(RecvError::Lagged(missed))) => return Some(event("lagged", &LaggedEvent { missed })),
                Ok(Ok(happened)) => {
                    if let Some(text) = self.say(happened).await {
                        return Some(text);
                    }
                }
            }
        }
    }

    async fn say(&mut self, happened: Event) -> Option<String> {
        match happened {
            Event::Added(id) => self.changed(id, "added").await,
            Event::Changed(id) => self.changed(id, "changed").await,
            Event::Ended(id) => self.changed(id, "ended").await,
            Event::Removed(id) => {
                Some(event("request", &RequestEvent { change: "removed".to_owned(), id, request: None }))
            }
            Event::Cleared => Some("event: cleared\ndata: {}\n\n".to_owned()),
            Event::Piece { id, direction, offset, len, at_us } => {
                let captured = self.watched(id)?;
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let bytes = captured.look(|record| {
                    let part = from..from.saturating_add(len);
                    match direction {
                        Direction::ToUpstream => record.body.range(part),
                        Direction::ToClient => {
                            record.answer.as_ref().map(|answer| answer.body.range(part)).unwrap_or_default()
                        }
                    }
                });
                let base64 = shape::to_base64(&bytes);
                Some(event("body", &BodyEvent { id, direction, offset, size: len, base64, at_us }))
            }
            Event::Frame { id, number } => {
                let captured = self.watched(id)?;
                let frame = captured.look(|record| {
                    let oldest = record.frames_total - record.frames.len() as u64;
                    let at = usize::try_from(number.checked_sub(oldest)?).ok()?;
                    record.frames.get(at).cloned()
                })?;
                Some(event("frame", &FrameEvent { id, frame: shape::Frame::of(&frame) }))
            }
        }
    }

    fn watched(&self, id: u64) -> Option<Arc<Captured>> {
        // Most of what passes is watched by nobody.
        if !self.watch.wants(id) {
            return None;
        }
        self.captures.get(id)
    }

    async fn changed(&mut self, id: u64, change: &str) -> Option<String> {
        let captured = self.captures.get(id)?;
        let record = captured.record();
        let wanted = if self.filter.is_search() {
            let (filter, redact) = (self.filter.clone(), self.redact.clone());
            let (tunnel, record) = (captured.tunnel.clone(), record.clone());
            // It may unpack bodies: on a thread where that holds nothing up.
            let search = move || filter.wants(tunnel.as_str(), &record, &redact);
            tokio::task::spawn_blocking(search).await.unwrap_or(false)
        } else {
            self.filter.wants(captured.tunnel.as_str(), &record, &self.redact)
        };
        wanted.then(|| {
            let request = Some(Summary::of(&captured, &record));
            event("request", &RequestEvent { change: change.to_owned(), id, request })
        })
    }
}

/// JSON has no line break in it, so one line is enough.
fn event(name: &str, data: &impl serde::Serialize) -> String {
    let data = serde_json::to_string(data).expect("texts, numbers and lists are JSON");
    format!("event: {name}\ndata: {data}\n\n")
}
