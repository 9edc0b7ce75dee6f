//! The inspector's answers, see `docs/inspector-api.yaml`.
//!
//! Who asks over TCP is a program or a browser of this machine, and a browser shows foreign pages: so `Host` must name
//! loopback, no other origin may ask, nothing may come through a tunnel, and what changes something or tells a secret
//! wants the token that only the page's own document has.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use proto::delivery;
use tokio::{
    sync::{Semaphore, broadcast::error::RecvError},
    time::timeout,
};

use super::{
    curl,
    events::{self, Watch},
    filter::{Filter, parse_flag, parse_ids},
    har, page,
    redact::Redact,
    replay::{self, Edits, Refusal},
    shape::{self, Delivery, Detail, Error, Ids, List, State, Summary, TunnelState},
};
use crate::{
    capture::{
        fields::Fields,
        record::Record,
        ring::{Capture, Captured, Captures, Elsewhere, Found},
    },
    link::deliveries::{Desk, NoAnswer},
    loopback::is_for_this_machine,
    serve::{
        host::HostRule,
        tunnel::{Tunnel, Tunnels},
    },
};

/// What an answer's body is.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The field that the token comes back in.
const TOKEN: HeaderName = HeaderName::from_static("x-inspector-token");

/// How long a request to the inspector may be.
const BODY_BYTES: usize = 32 * 1024 * 1024;

/// How many times as long as all captured requests a file of them may be: bytes become base64, and texts are unpacked.
const IMPORT_TIMES: usize = 4;

/// How many rows a list has unless it is told.
const ROWS: usize = 100;

/// How many it may have.
const ROWS_MOST: usize = 1000;

/// How many may listen to what happens, whether they read it or not: fewer than there are connections.
const LISTENERS: usize = 32;

/// How somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// Over the control socket: whom its permissions let in.
    Socket,
    /// Over TCP: any program of this machine, a browser with foreign pages included.
    Loopback,
}

/// What is captured, and how it is shown.
#[derive(Clone)]
pub(crate) struct Inspector(Arc<Inner>);

struct Inner {
    captures: Arc<Captures>,
    tunnels: Arc<Tunnels>,
    desk: Desk,
    redact: Redact,
    token: String,
    listeners: Arc<Semaphore>,
}

/// A refusal: a status and a sentence.
struct Refused(StatusCode, String);

type Answer = Result<Response<Body>, Refused>;

fn refuse<T>(status: StatusCode, error: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(status, error.into()))
}

impl From<String> for Refused {
    fn from(error: String) -> Self {
        Self(StatusCode::BAD_REQUEST, error)
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::Impossible(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Refusal::Invalid(_) => StatusCode::BAD_REQUEST,
        };
        Self(status, refusal.to_string())
    }
}

/// The parameters of a query.
#[derive(Default)]
struct Query {
    filter: Filter,
    since: u64,
    before: Option<u64>,
    limit: Option<usize>,
    reveal: bool,
    wait: u64,
    ids: Option<BTreeSet<u64>>,
    watch: Watch,
    to_public: bool,
    tunnel: Option<String>,
}

impl Query {
    /// Reads those of `known` and, with `filters`, those of a filter.
    fn read(query: Option<&str>, filters: bool, known: &[&str]) -> Result<Self, String> {
        let mut read = Self::default();
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let number =
                || value.parse::<u64>().map_err(|_| format!("{name}={value:?} is not a whole number"));
            if filters && read.filter.take(&name, &value)? {
                continue;
            }
            if !known.contains(&&*name) {
                return Err(format!("there is no parameter {name:?} here"));
            }
            match &*name {
                "since" => read.since = number()?,
                "before" => read.before = Some(number()?),
                "limit" => match number()? {
                    limit @ 1..=1000 => read.limit = Some(limit as usize),
                    _ => return Err(format!("limit must be from 1 to {ROWS_MOST}")),
                },
                "reveal" => read.reveal = parse_flag(&name, &value)?,
                "wait" => match number()? {
                    wait @ 0..=60 => read.wait = wait,
                    _ => return Err("wait must be from 0 to 60".to_owned()),
                },
                "ids" => read.ids = Some(parse_ids(&value)?),
                "watch" => read.watch = Watch::parse(&value)?,
                "to" => match &*value {
                    "upstream" => read.to_public = false,
                    "public" => read.to_public = true,
                    _ => return Err(format!("to={value:?} is neither upstream nor public")),
                },
                "tunnel" => read.tunnel = Some(value.into_owned()),
                _ => {}
            }
        }
        Ok(read)
    }
}

impl Inspector {
    /// Shows what is in `captures`, and sends it again to `tunnels`. `token` is random.
    pub(crate) fn new(
        captures: Arc<Captures>,
        tunnels: Arc<Tunnels>,
        desk: Desk,
        redact: Redact,
        token: String,
    ) -> Self {
        let listeners = Arc::new(Semaphore::new(LISTENERS));
        Self(Arc::new(Inner { captures, tunnels, desk, redact, token, listeners }))
    }

    pub(crate) fn captures(&self) -> &Captures {
        &self.0.captures
    }

    pub(crate) fn redact(&self) -> &Redact {
        &self.0.redact
    }

    /// The newest requests, at most so many, newest first.
    pub(crate) fn newest(&self, most: usize) -> Vec<Summary> {
        let all = self.captures().all();
        all.iter().rev().take(most).map(|captured| summarised(captured)).collect()
    }

    /// One request in short, while it is kept.
    pub(crate) fn summary(&self, id: u64) -> Option<Summary> {
        self.captures().get(id).map(|captured| summarised(&captured))
    }

    /// Everything about one request, secrets masked, while it is kept.
    pub(crate) fn masked(&self, id: u64) -> Option<Detail> {
        self.captures().get(id).map(|captured| self.detail(&captured, false))
    }

    /// Sends a request again as it was; the id of the replay.
    ///
    /// # Errors
    ///
    /// A sentence for people, where nothing is sent.
    pub(crate) fn replay_unchanged(&self, id: u64) -> Result<u64, String> {
        let replayed = self.find(id).and_then(|captured| self.replay(&captured, &Edits::default()));
        let ids = replayed.map_err(|Refused(_, error)| error)?;
        ids.first().copied().ok_or_else(|| "it was not sent again".to_owned())
    }

    /// Answers a request.
    pub(crate) async fn answer(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
        let answer = self.try_answer(request, door).await;
        let mut answer = answer.unwrap_or_else(|Refused(status, error)| json(status, &Error { error }));
        let headers = answer.headers_mut();
        for (name, value) in [
            (header::CONTENT_SECURITY_POLICY, page::POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::X_FRAME_OPTIONS, "DENY"),
            (header::REFERRER_POLICY, "no-referrer"),
            (header::CACHE_CONTROL, "no-store"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        answer
    }

    async fn try_answer(&self, request: Request<Incoming>, door: Door) -> Answer {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        if door == Door::Loopback {
            check_origin(&head.method, path, &head.headers)?;
        }
        let method = if head.method == Method::HEAD { Method::GET } else { head.method.clone() };
        let query = head.uri.query();
        let is_trusted = door == Door::Socket || self.has_token(&head.headers);
        if method != Method::GET && !is_trusted {
            return refuse(
                StatusCode::FORBIDDEN,
                "this wants the token of the page in the field x-inspector-token",
            );
        }
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let id = |text: &str| {
            text.parse::<u64>()
                .map_err(|_| Refused(StatusCode::NOT_FOUND, format!("{text:?} is no request's id")))
        };
        match (&method, &segments[..]) {
            (&Method::GET, [""]) => Ok(content("text/html; charset=utf-8", page::document(&self.0.token))),
            (&Method::GET, ["api", "state"]) => Ok(json(StatusCode::OK, &self.state())),
            (&Method::GET, ["api", "requests"]) => {
                let query = Query::read(query, true, &["since", "before", "limit"])?;
                self.apart(move |this| Ok(json(StatusCode::OK, &this.list(&query)))).await
            }
            (&Method::DELETE, ["api", "requests"]) => {
                self.captures().clear();
                let mut answer = Response::new(Full::default().boxed_unsync());
                *answer.status_mut() = StatusCode::NO_CONTENT;
                Ok(answer)
            }
            (&Method::GET, ["api", "requests", number]) => {
                let query = Query::read(query, false, &["reveal", "wait"])?;
                let captured = self.find(id(number)?)?;
                self.may_reveal(query.reveal, is_trusted)?;
                self.wait_for(&captured, Duration::from_secs(query.wait)).await;
                self.apart(move |this| Ok(json(StatusCode::OK, &this.detail(&captured, query.reveal)))).await
            }
            (&Method::GET, ["api", "requests", number, "curl"]) => {
                let query = Query::read(query, false, &["reveal", "to"])?;
                let captured = self.find(id(number)?)?;
                self.may_reveal(query.reveal, is_trusted)?;
                self.apart(move |this| this.curl(&captured, &query)).await
            }
            (&Method::POST, ["api", "requests", number, "replay"]) => {
                let captured = self.find(id(number)?)?;
                let body = collect(body, BODY_BYTES).await?;
                let edits = Edits::read(&body)?;
                let ids = self.replay(&captured, &edits)?;
                Ok(json(StatusCode::ACCEPTED, &Ids { ids }))
            }
            (&Method::GET, ["api", "events"]) => {
                let query = Query::read(query, true, &["watch"])?;
                let Ok(place) = Arc::clone(&self.0.listeners).try_acquire_owned() else {
                    let error = format!(
                        "{LISTENERS} pages and programs listen already: close one that is not needed"
                    );
                    return refuse(StatusCode::SERVICE_UNAVAILABLE, error);
                };
                let events = events::stream(
                    Arc::clone(&self.0.captures),
                    self.0.redact.clone(),
                    query.filter,
                    query.watch,
                    place,
                );
                let mut answer = Response::new(StreamBody::new(events).boxed_unsync());
                let kind = HeaderValue::from_static("text/event-stream");
                answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                Ok(answer)
            }
            (&Method::GET, ["api", "har"]) => {
                let query = Query::read(query, true, &["ids", "reveal"])?;
                self.may_reveal(query.reveal, is_trusted)?;
                self.apart(move |this| this.har(&query)).await
            }
            (&Method::POST, ["api", "import"]) => {
                let query = Query::read(query, false, &["tunnel"])?;
                let is_har = head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
                    kind.as_bytes().to_ascii_lowercase().starts_with(b"application/json")
                });
                let most = BODY_BYTES.max(self.captures().figures().1.saturating_mul(IMPORT_TIMES));
                let body = collect(body, most).await?;
                self.apart(move |this| this.import(&body, is_har, query.tunnel.as_deref())).await
            }
            (&Method::POST, ["api", "deliveries"]) => {
                let query = Query::read(query, false, &["reveal"])?;
                self.may_reveal(query.reveal, is_trusted)?;
                let body = collect(body, BODY_BYTES).await?;
                let ask = serde_json::from_slice(&body)
                    .map_err(|error| Refused(StatusCode::BAD_REQUEST, format!("the question: {error}")))?;
                let redact = (!query.reveal).then_some(self.redact());
                let not_found = not_found(&ask);
                deliveries(self.0.desk.ask(ask).await, not_found, redact)
            }
            (&Method::GET, [_]) if let Some((kind, text)) = page::file(path) => Ok(content(kind, text)),
            (_, [""])
            | (_, ["api", "state" | "requests" | "events" | "har" | "import" | "deliveries"])
            | (_, ["api", "requests", _] | ["api", "requests", _, "curl" | "replay"]) => {
                refuse(StatusCode::METHOD_NOT_ALLOWED, "another method is wanted here")
            }
            _ => refuse(
                StatusCode::NOT_FOUND,
                "there is nothing here; docs/inspector-api.yaml says what there is",
            ),
        }
    }

    fn has_token(&self, headers: &HeaderMap) -> bool {
        let mut given = headers.get_all(TOKEN).iter();
        given.next().is_some_and(|given| {
            aws_lc_rs::constant_time::verify_slices_are_equal(given.as_bytes(), self.0.token.as_bytes())
                .is_ok()
        }) && given.next().is_none()
    }

    fn may_reveal(&self, wanted: bool, is_trusted: bool) -> Result<(), Refused> {
        if wanted && !is_trusted {
            return refuse(
                StatusCode::FORBIDDEN,
                "reveal wants the token of the page in the field x-inspector-token",
            );
        }
        Ok(())
    }

    /// Does what takes long where it holds nothing up.
    async fn apart(&self, work: impl FnOnce(&Self) -> Answer + Send + 'static) -> Answer {
        let this = self.clone();
        tokio::task::spawn_blocking(move || work(&this))
            .await
            .unwrap_or_else(|_| refuse(StatusCode::INTERNAL_SERVER_ERROR, "this could not be answered"))
    }

    fn find(&self, id: u64) -> Result<Arc<Captured>, Refused> {
        self.captures().get(id).ok_or_else(|| {
            Refused(StatusCode::NOT_FOUND, format!("request {id} is not kept, or not any more"))
        })
    }

    async fn wait_for(&self, captured: &Captured, patience: Duration) {
        if patience.is_zero() {
            return;
        }
        let mut events = self.captures().events();
        let ended = async {
            while captured.look(|record| record.outcome.is_none())
                && self.captures().get(captured.id).is_some()
            {
                if let Err(RecvError::Closed) = events.recv().await {
                    return;
                }
            }
        };
        let _ = timeout(patience, ended).await;
    }

    fn state(&self) -> State {
        let (memory_bytes, memory_limit_bytes, requests, evicted) = self.captures().figures();
        let tunnels = self.0.tunnels.names().into_iter().filter_map(|name| self.0.tunnels.get(&name));
        State {
            version: env!("CARGO_PKG_VERSION"),
            tunnels: tunnels
                .map(|tunnel| TunnelState {
                    name: tunnel.config().name.to_string(),
                    upstream: tunnel.config().leads_to(),
                    inspect: tunnel.config().inspect,
                    url: tunnel.public_url(),
                    delivery: tunnel.config().delivery.as_ref().map(|policy| policy.mode),
                })
                .collect(),
            memory_bytes,
            memory_limit_bytes,
            requests,
            evicted,
            masked: self.redact().names(),
        }
    }

    fn list(&self, query: &Query) -> List {
        let limit = query.limit.unwrap_or(ROWS);
        let mut requests = Vec::new();
        let mut more = false;
        for captured in self.captures().all().iter().rev() {
            if captured.id <= query.since {
                break;
            }
            if query.before.is_some_and(|before| captured.id >= before) {
                continue;
            }
            let record = captured.record();
            if query.filter.wants(captured.tunnel.as_str(), &record, self.redact()) {
                if requests.len() == limit {
                    more = true;
                    break;
                }
                requests.push(Summary::of(captured, &record));
            }
        }
        List { requests, more, evicted: self.captures().figures().3 }
    }

    fn detail(&self, captured: &Captured, reveal: bool) -> Detail {
        let record = captured.record();
        let original =
            record.replay_of.and_then(|id| self.captures().get(id)).map(|original| original.record());
        let all = self.captures().all();
        let replays = all.iter().filter(|other| other.look(|record| record.replay_of == Some(captured.id)));
        let replays = replays.map(|replay| replay.id).collect();
        let redact = (!reveal).then_some(self.redact());
        Detail::of(captured, &record, redact, original.as_ref(), replays)
    }

    fn curl(&self, captured: &Captured, query: &Query) -> Answer {
        let record = captured.record();
        if let Some(obstacle) = record.obstacle() {
            return refuse(StatusCode::UNPROCESSABLE_ENTITY, obstacle);
        }
        let mut request = replay::Request::of(&record);
        if !query.reveal {
            request = request.masked(self.redact());
        }
        let public = record.url();
        let public = public.as_deref().and_then(curl::split_origin);
        if request.method.eq_ignore_ascii_case("HEAD") && !request.body.is_empty() {
            return refuse(StatusCode::UNPROCESSABLE_ENTITY, "curl sends no body with HEAD");
        }
        let tunnel = self.0.tunnels.get(&captured.tunnel);
        let reach = match (query.to_public, public) {
            (false, _) if captured.upstream.is_empty() => {
                return refuse(StatusCode::UNPROCESSABLE_ENTITY, "it went to no upstream");
            }
            (false, _) => match &tunnel {
                Some(tunnel) => curl::Reach::as_of(tunnel.config(), &captured.upstream),
                None => curl::Reach::to(&captured.upstream),
            },
            (true, Some((origin, target))) => {
                target.clone_into(&mut request.target);
                // Whatever the upstream is called, the public address names itself.
                request
                    .fields
                    .retain(|(name, _)| !is_of_the_edge(name) && !name.eq_ignore_ascii_case("host"));
                curl::Reach::to(origin)
            }
            (true, None) => return refuse(StatusCode::UNPROCESSABLE_ENTITY, "it has no public address"),
        };
        Ok(content("text/plain; charset=utf-8", curl::command(&request, &reach)))
    }

    fn har(&self, query: &Query) -> Answer {
        let records: Vec<(Arc<Captured>, Record)> = match &query.ids {
            Some(ids) => {
                let captured = ids.iter().map(|&id| self.find(id)).collect::<Result<Vec<_>, _>>()?;
                captured.into_iter().map(|captured| (Arc::clone(&captured), captured.record())).collect()
            }
            None => self
                .captures()
                .all()
                .into_iter()
                .map(|captured| (Arc::clone(&captured), captured.record()))
                .filter(|(captured, record)| {
                    query.filter.wants(captured.tunnel.as_str(), record, self.redact())
                })
                .collect(),
        };
        let redact = (!query.reveal).then_some(self.redact());
        let file = har::write(records.iter().map(|(captured, record)| (&**captured, record.clone())), redact);
        let mut answer = content("application/json", file);
        let disposition = HeaderValue::from_static("attachment; filename=\"agentd.har\"");
        answer.headers_mut().insert(header::CONTENT_DISPOSITION, disposition);
        Ok(answer)
    }

    fn import(&self, body: &[u8], is_har: bool, tunnel: Option<&str>) -> Answer {
        let tunnel = self.tunnel_for(tunnel)?;
        let imported = if is_har {
            har::read(body)?
        } else {
            let text = std::str::from_utf8(body).map_err(|_| "the command line is not UTF-8".to_owned())?;
            vec![har::Imported::from(curl::parse(text)?)]
        };
        let mut ready = Vec::with_capacity(imported.len());
        for mut one in imported {
            let request = one.request;
            let named = request.fields.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
            let (_, rule) =
                tunnel.own.as_ref().ok_or_else(|| "the tunnel has no upstream of its own".to_owned())?;
            let host = match rule {
                HostRule::Fixed(value) => value.clone(),
                HostRule::Public => named
                    .and_then(|(_, host)| HeaderValue::from_bytes(host).ok())
                    .ok_or_else(|| "it names no host".to_owned())?,
            };
            let extent = if one.size.is_some() { replay::Extent::Beginning } else { replay::Extent::Whole };
            one.request = replay::adopt(request, &host, extent)?;
            ready.push(one);
        }
        let Some(lens) = tunnel.lens() else {
            return refuse(StatusCode::CONFLICT, "the tunnel is not inspected");
        };
        let packed = |fields: &[(String, Vec<u8>)]| {
            Fields::from_pairs(fields.iter().map(|(name, value)| (&**name, &**value)))
        };
        // Nothing is listed unless all of it can be.
        let list = |one: har::Imported| {
            lens.import(Elsewhere {
                kind: one.kind,
                asked: one.asked,
                method: &one.request.method,
                target: &one.request.target,
                fields: packed(&one.request.fields),
                body: Found { bytes: &one.request.body, size: one.size },
                answer: one.answer.as_ref().map(|answer| {
                    let body = Found { bytes: &answer.body, size: answer.size };
                    (answer.status, packed(&answer.fields), body)
                }),
                frames: one.frames,
                frames_dropped: one.frames_dropped,
            })
        };
        let ids = ready.into_iter().map(list).collect();
        Ok(json(StatusCode::CREATED, &Ids { ids }))
    }

    fn tunnel_for(&self, name: Option<&str>) -> Result<Arc<Tunnel>, Refused> {
        let tunnels = &self.0.tunnels;
        if let Some(name) = name {
            return self.inspected(name);
        }
        let names = tunnels.names();
        let inspected = names.iter().filter_map(|name| tunnels.get(name)).filter(|it| it.lens().is_some());
        match &inspected.collect::<Vec<_>>()[..] {
            [one] => Ok(Arc::clone(one)),
            [] => refuse(StatusCode::CONFLICT, "no tunnel is inspected"),
            _ => refuse(
                StatusCode::CONFLICT,
                "several tunnels are inspected: name one with --tunnel NAME (tunnel=NAME in a query)",
            ),
        }
    }

    fn inspected(&self, name: &str) -> Result<Arc<Tunnel>, Refused> {
        let tunnels = &self.0.tunnels;
        // One that a reload has removed may still serve what was dispatched before; it is gone all the same.
        let known = tunnels.names().into_iter().find(|known| known.as_str() == name);
        match known.and_then(|name| tunnels.get(&name)) {
            Some(tunnel) if tunnel.lens().is_some() => Ok(tunnel),
            Some(_) => refuse(StatusCode::CONFLICT, format!("the tunnel {name} is not inspected")),
            None => refuse(StatusCode::CONFLICT, format!("the tunnel {name} is gone; nothing was sent")),
        }
    }

    /// Sends a captured request again; the ids of the replays.
    fn replay(&self, captured: &Captured, edits: &Edits) -> Result<Vec<u64>, Refused> {
        let times = edits.times.unwrap_or(1);
        if !(1..=replay::TIMES).contains(&times) {
            return refuse(StatusCode::BAD_REQUEST, format!("times must be from 1 to {}", replay::TIMES));
        }
        let request = replay::Request::edited(&captured.record(), edits)?;
        let tunnel = self.inspected(captured.tunnel.as_str())?;
        let Some(upstream) = replay::upstream_of(&tunnel, captured) else {
            return refuse(
                StatusCode::CONFLICT,
                format!(
                    "it went to {}, and the tunnel {} leads there no more",
                    captured.upstream, captured.tunnel
                ),
            );
        };
        let request = request.marked(captured.id);
        let listed: Vec<_> = (0..times).filter_map(|_| replay::list(&tunnel, captured, &request)).collect();
        let ids = listed.iter().map(Capture::id).collect();
        tokio::spawn(async move {
            // One body is held for those that wait, and one for the one that is sent.
            for capture in listed {
                replay::send(&tunnel, &upstream, capture, request.clone()).await;
            }
        });
        Ok(ids)
    }
}

/// What is not there where the edge finds nothing.
const fn not_found(ask: &delivery::Ask) -> &'static str {
    use delivery::Ask;
    match ask {
        Ask::Show { .. } | Ask::Retry { .. } | Ask::Cancel { .. } => "there is no such delivery",
        Ask::List { tunnel: None, .. } => "the list has no such page",
        Ask::List { .. } | Ask::RetryDead { .. } | Ask::Pause { .. } | Ask::Resume { .. } => {
            "the edge knows no such tunnel of this agent's owner"
        }
    }
}

/// What the edge answers about deliveries; `not_found` where it finds nothing; with `redact` without what that hides.
fn deliveries(
    answer: Result<delivery::Answer<'static>, NoAnswer>,
    not_found: &str,
    redact: Option<&Redact>,
) -> Answer {
    match answer {
        Ok(delivery::Answer::Refused { reason }) => {
            let (status, why) = match reason {
                delivery::Refused::NotAllowed => {
                    (StatusCode::FORBIDDEN, "the token does not cover this tunnel")
                }
                delivery::Refused::NotFound => (StatusCode::NOT_FOUND, not_found),
                delivery::Refused::WrongState => {
                    (StatusCode::CONFLICT, "this cannot be done with a delivery in its state")
                }
                delivery::Refused::Busy => {
                    (StatusCode::SERVICE_UNAVAILABLE, "the edge is busy; try again in a moment")
                }
                delivery::Refused::Other => (StatusCode::CONFLICT, "the edge refuses it"),
            };
            refuse(status, why)
        }
        Ok(delivery::Answer::Delivery { summary, headers, body, more }) => {
            let headers = shape::head(&headers, redact);
            Ok(json(StatusCode::OK, &Delivery { summary, headers, body, more }))
        }
        Ok(answer) => Ok(json(StatusCode::OK, &answer)),
        Err(error @ (NoAnswer::NotConnected | NoAnswer::Lost)) => {
            refuse(StatusCode::BAD_GATEWAY, error.to_string())
        }
        Err(error @ NoAnswer::NotKept) => refuse(StatusCode::NOT_IMPLEMENTED, error.to_string()),
    }
}

fn summarised(captured: &Captured) -> Summary {
    captured.look(|record| Summary::of(captured, record))
}

/// Refuses who is no page or program of this machine.
fn check_origin(method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Refused> {
    if !is_for_this_machine(headers) {
        return refuse(StatusCode::FORBIDDEN, "the inspector answers to loopback names only");
    }
    if headers.keys().any(|name| is_of_the_edge(name.as_str())) {
        return refuse(
            StatusCode::FORBIDDEN,
            "the inspector is not for visitors: this came through a tunnel or a proxy",
        );
    }
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("unreadable"));
    if let Some(origin) = text(header::ORIGIN) {
        let host = text(header::HOST).unwrap_or_default();
        if origin.strip_prefix("http://") != Some(host) {
            return refuse(StatusCode::FORBIDDEN, "the inspector does not answer to pages of other origins");
        }
    }
    let site = text(HeaderName::from_static("sec-fetch-site"));
    let is_link = *method == Method::GET
        && path == "/"
        && text(HeaderName::from_static("sec-fetch-mode")) == Some("navigate");
    if !matches!(site, None | Some("same-origin" | "none")) && !is_link {
        return refuse(StatusCode::FORBIDDEN, "the inspector does not answer to pages of other origins");
    }
    Ok(())
}

/// Whether a field says that a request came through a proxy.
fn is_of_the_edge(name: &str) -> bool {
    // What was imported is written as it was.
    let name = &*name.to_ascii_lowercase();
    name.starts_with("x-forwarded-")
        || name.starts_with("x-tunnel-")
        || matches!(name, "forwarded" | "via" | "x-real-ip" | "traceparent" | "tracestate")
}

async fn collect(body: Incoming, most: usize) -> Result<Bytes, Refused> {
    match Limited::new(body, most).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            refuse(StatusCode::PAYLOAD_TOO_LARGE, format!("that is more than {most} bytes"))
        }
        Err(error) => refuse(StatusCode::BAD_REQUEST, format!("the body broke off: {error}")),
    }
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Response<Body> {
    let mut body = serde_json::to_string(value).expect("texts, numbers and lists are JSON");
    body.push('\n');
    let mut answer = content("application/json", body);
    *answer.status_mut() = status;
    answer
}

fn content(kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(Full::new(body.into()).boxed_unsync());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(method: &Method, path: &str, fields: &[(&'static str, &str)]) -> bool {
        let headers = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
        check_origin(method, path, &headers.collect()).is_ok()
    }

    #[test]
    fn only_this_machine_and_the_pages_own_origin_are_answered() {
        let host = ("host", "127.0.0.1:4040");
        for fields in [
            &[host][..],
            &[("host", "localhost:4040")],
            &[host, ("origin", "http://127.0.0.1:4040"), ("sec-fetch-site", "same-origin")],
            &[host, ("sec-fetch-site", "none")],
        ] {
            assert!(checked(&Method::GET, "/api/requests", fields), "{fields:?}");
        }
        for fields in [
            &[][..],
            &[("host", "evil.example")],
            &[("host", "evil.example"), ("origin", "http://evil.example")],
            &[host, ("origin", "http://evil.example")],
            &[host, ("origin", "null")],
            &[host, ("origin", "https://127.0.0.1:4040")],
            &[host, ("origin", "http://127.0.0.1:3000")],
            &[host, ("sec-fetch-site", "cross-site")],
            &[host, ("sec-fetch-site", "same-site"), ("sec-fetch-mode", "navigate")],
            &[host, ("x-forwarded-for", "192.0.2.1")],
            &[host, ("via", "1.1 tunnel")],
            &[host, ("forwarded", "for=192.0.2.1")],
        ] {
            assert!(!checked(&Method::GET, "/api/requests", fields), "{fields:?}");
        }
        let link = [host, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")];
        assert!(checked(&Method::GET, "/", &link) && !checked(&Method::POST, "/", &link));
    }

    #[test]
    fn parameters_are_known_or_refused() {
        let read = |query| Query::read(Some(query), true, &["since", "limit", "ids"]);
        let query = read("since=3&limit=10&ids=4,5&status=5xx&text=a%20b").ok().unwrap();
        assert_eq!((query.since, query.limit), (3, Some(10)));
        assert_eq!(query.ids, Some(BTreeSet::from([4, 5])));
        for bad in
            ["since=x", "limit=0", "limit=1001", "ids=", "ids=a", "nonsense=1", "status=x", "reveal=true"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
