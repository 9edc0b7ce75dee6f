//! HAR 1.2, written so that every reader takes it, and read as every writer writes it.
//!
//! Readers differ in what they insist on: everything that one of them misses is there, and what one of them does not
//! take is left out. Bodies are decoded, because that is what `content.text` means; the fields stay as they are.

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    decode,
    redact::{MASK, Redact},
    replay::Request,
    shape::{from_base64, to_base64},
};
use crate::capture::{
    fields::Fields,
    kept::Kept,
    record::{Answer, Asked, Direction, Frame, FrameKind, Kind, Record, in_address},
    ring::Captured,
};

#[derive(Serialize)]
struct File {
    log: Log,
}

#[derive(Serialize)]
struct Log {
    version: &'static str,
    creator: Creator,
    entries: Vec<Entry>,
}

#[derive(Serialize)]
struct Creator {
    name: &'static str,
    version: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    started_date_time: String,
    time: f64,
    request: RequestShape,
    response: ResponseShape,
    cache: Empty,
    timings: Timings,
    #[serde(rename = "_id")]
    id: u64,
    #[serde(rename = "_tunnel")]
    tunnel: String,
    #[serde(rename = "_upstream")]
    upstream: String,
    #[serde(rename = "_requestId", skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    #[serde(rename = "_replayOf", skip_serializing_if = "Option::is_none")]
    replay_of: Option<u64>,
    #[serde(rename = "_error", skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(rename = "_resourceType", skip_serializing_if = "Option::is_none")]
    resource_type: Option<&'static str>,
    #[serde(rename = "_webSocketMessages", skip_serializing_if = "Option::is_none")]
    messages: Option<Vec<SocketMessage>>,
    /// How many messages before these are not kept.
    #[serde(rename = "_webSocketMessagesDropped", skip_serializing_if = "Option::is_none")]
    messages_dropped: Option<u64>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Pair {
    name: String,
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RequestShape {
    method: String,
    url: String,
    /// What the upstream was asked for, where the address does not say so.
    #[serde(rename = "_target", skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    http_version: &'static str,
    cookies: Vec<Pair>,
    headers: Vec<Pair>,
    query_string: Vec<Pair>,
    #[serde(skip_serializing_if = "Option::is_none")]
    post_data: Option<PostData>,
    headers_size: i64,
    body_size: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PostData {
    mime_type: String,
    text: String,
    /// HAR has no encoding for the body of a request.
    #[serde(rename = "_base64", skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    #[serde(rename = "_cut", skip_serializing_if = "std::ops::Not::not")]
    cut: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResponseShape {
    status: u16,
    status_text: &'static str,
    http_version: &'static str,
    cookies: Vec<Pair>,
    headers: Vec<Pair>,
    content: Content,
    #[serde(rename = "redirectURL")]
    redirect_url: String,
    headers_size: i64,
    body_size: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    size: u64,
    mime_type: String,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
    #[serde(rename = "_cut", skip_serializing_if = "std::ops::Not::not")]
    cut: bool,
}

#[derive(Serialize)]
struct Timings {
    blocked: f64,
    dns: f64,
    connect: f64,
    send: f64,
    wait: f64,
    receive: f64,
    ssl: f64,
}

#[derive(Serialize)]
struct SocketMessage {
    #[serde(rename = "type")]
    direction: &'static str,
    time: f64,
    opcode: u8,
    data: String,
    #[serde(rename = "_cut", skip_serializing_if = "std::ops::Not::not")]
    cut: bool,
    /// In bytes, where it is cut.
    #[serde(rename = "_size", skip_serializing_if = "Option::is_none")]
    size: Option<usize>,
}

/// Writes records as one file; with `redact` without what that hides.
pub(crate) fn write<'a>(
    records: impl Iterator<Item = (&'a Captured, Record)>,
    redact: Option<&Redact>,
) -> String {
    let entries = records.map(|(captured, record)| entry(captured, &record, redact)).collect();
    let creator = Creator { name: "agentd", version: env!("CARGO_PKG_VERSION") };
    let file = File { log: Log { version: "1.2", creator, entries } };
    serde_json::to_string_pretty(&file).expect("texts, numbers and lists are JSON")
}

fn entry(captured: &Captured, record: &Record, redact: Option<&Redact>) -> Entry {
    let times = record.times;
    let ms = |us: Option<u64>| us.map_or(0.0, |us| us as f64 / 1000.0);
    let ended = ms(times.ended.or(times.last_byte).or(times.head));
    let head = ms(times.head).min(ended);
    let connect = times.connected.map_or(-1.0, |us| (us as f64 / 1000.0).min(head));
    let timings = Timings {
        blocked: -1.0,
        dns: -1.0,
        connect,
        send: 0.0,
        wait: head - connect.max(0.0),
        receive: ended - head,
        ssl: -1.0,
    };
    let url = record.url().unwrap_or_else(|| {
        let upstream = &*captured.upstream;
        // What is answered by the agent has none.
        let has_host = !upstream.is_empty() && !upstream.starts_with("unix:");
        let base = if has_host { upstream } else { "http://localhost" };
        format!("{}{}", base.trim_end_matches('/'), in_address(&record.target))
    });
    let is_socket = record.kind == Kind::Websocket;
    // As the date has it, so that who takes one from the other gets when a message came.
    let seconds = (captured.received_at / 1000) as f64 / 1e3;
    Entry {
        started_date_time: date(captured.received_at),
        time: ended,
        request: request(record, encoded(&url), redact),
        response: response(record.answer.as_ref(), redact),
        cache: Empty {},
        timings,
        id: captured.id,
        tunnel: captured.tunnel.to_string(),
        upstream: captured.upstream.to_string(),
        request_id: record.request_id.as_ref().map(ToString::to_string),
        replay_of: record.replay_of,
        error: match (record.error, record.answer.is_some()) {
            (Some(error), _) => Some(error.to_owned()),
            (None, true) => None,
            (None, false) => Some("there is no answer".to_owned()),
        },
        resource_type: is_socket.then_some("websocket"),
        messages: is_socket.then(|| {
            let frames = record.frames.iter().filter(|frame| frame.kind != FrameKind::Close);
            frames.map(|frame| message(frame, seconds)).collect()
        }),
        messages_dropped: Some(record.frames_total - record.frames.len() as u64)
            .filter(|&dropped| dropped > 0),
    }
}

/// A message of a WebSocket whose request came at `seconds` since 1970.
fn message(frame: &Frame, seconds: f64) -> SocketMessage {
    let cut = frame.first.len() < frame.size;
    // What is cut may end within a character.
    let whole = match std::str::from_utf8(&frame.first) {
        Err(error) if cut && error.error_len().is_none() => error.valid_up_to(),
        _ => frame.first.len(),
    };
    SocketMessage {
        direction: match frame.direction {
            Direction::ToUpstream => "send",
            Direction::ToClient => "receive",
        },
        time: seconds + frame.at_us as f64 / 1e6,
        opcode: if frame.kind == FrameKind::Text { 1 } else { 2 },
        data: match frame.kind {
            FrameKind::Text => String::from_utf8_lossy(&frame.first[..whole]).into_owned(),
            FrameKind::Binary | FrameKind::Close => to_base64(&frame.first),
        },
        cut,
        size: cut.then_some(frame.size),
    }
}

fn date(unix_us: u64) -> String {
    let nanos = i128::from(unix_us / 1000) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .and_then(|date| date.format(&Rfc3339).ok())
        .unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned())
}

/// An address with everything encoded that is not to be in one.
fn encoded(url: &str) -> String {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte);
    let (origin, target) =
        match url.find("://").and_then(|at| url[at + 3..].find('/').map(|end| at + 3 + end)) {
            Some(at) => url.split_at(at),
            None => (url, ""),
        };
    let mut text = origin.to_owned();
    let bytes = target.as_bytes();
    for (at, &byte) in bytes.iter().enumerate() {
        let is_escape = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
        let keep = match byte {
            b'%' => is_escape(at + 1) && is_escape(at + 2),
            // Only a host has brackets, and a target has no fragment.
            b'[' | b']' | b'#' => false,
            byte => allowed(byte),
        };
        if keep {
            text.push(byte as char);
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

fn value(name: &str, value: &[u8], redact: Option<&Redact>) -> String {
    if redact.is_some_and(|redact| redact.hides(name)) {
        return MASK.to_owned();
    }
    // Bytes that are not UTF-8 are taken for ISO-8859-1, as HTTP has them.
    std::str::from_utf8(value)
        .map_or_else(|_| value.iter().map(|&byte| byte as char).collect(), ToOwned::to_owned)
}

fn headers(fields: &Fields, redact: Option<&Redact>) -> Vec<Pair> {
    let pair =
        |(name, bytes): (&str, &[u8])| Pair { name: name.to_owned(), value: value(name, bytes, redact) };
    fields.iter().map(pair).collect()
}

fn cookies(fields: &Fields, name: &str, redact: Option<&Redact>) -> Vec<Pair> {
    let values = fields.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value);
    values
        .filter_map(|value| std::str::from_utf8(value).ok())
        .flat_map(|value| {
            // `set-cookie` has one, and attributes behind it.
            let most = if name == "cookie" { usize::MAX } else { 1 };
            value.split(';').take(most)
        })
        .filter_map(|part| part.trim().split_once('='))
        .map(|(own, value)| Pair {
            name: own.to_owned(),
            value: if redact.is_some_and(|redact| redact.hides(name)) {
                MASK.to_owned()
            } else {
                value.to_owned()
            },
        })
        .collect()
}

/// A body without its coding, where that is known, and whether it goes on.
fn plain(fields: &Fields, body: &Kept) -> (Vec<u8>, bool) {
    let bytes = body.to_vec();
    match decode::body(fields, &bytes) {
        Some(decoded) if decoded.error.is_none() || body.is_cut() => {
            (decoded.bytes, decoded.cut || body.is_cut())
        }
        _ => (bytes, body.is_cut()),
    }
}

/// The parameter of a media type.
fn parameter<'t>(kind: &'t str, name: &str) -> Option<&'t str> {
    kind.split(';')
        .filter_map(|parameter| parameter.trim().split_once('='))
        .find(|(own, _)| own.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim_matches('"'))
}

/// A body as text; the bytes where they are none, or are a text in another charset, which a file in UTF-8 would show as
/// something else.
fn text(bytes: Vec<u8>, kind: &str) -> Result<String, Vec<u8>> {
    let charset = parameter(kind, "charset").unwrap_or("utf-8").to_ascii_lowercase();
    let is_utf8 = matches!(&*charset, "utf-8" | "utf8" | "us-ascii" | "ascii");
    // In these ASCII is something else.
    let is_apart = ["utf-16", "utf-32", "utf-7", "ucs", "iso-2022", "iso-10646"];
    if is_utf8 || bytes.is_ascii() && !is_apart.iter().any(|begin| charset.starts_with(begin)) {
        String::from_utf8(bytes).map_err(std::string::FromUtf8Error::into_bytes)
    } else {
        Err(bytes)
    }
}

fn request(record: &Record, url: String, redact: Option<&Redact>) -> RequestShape {
    let query = record.target.split_once('?').map(|(_, query)| query).unwrap_or_default();
    let bytes = record.body.to_vec();
    let post_data = (record.body.size() > 0 || !record.is_whole).then(|| {
        let mime_type = record.fields.text("content-type").unwrap_or("application/octet-stream").to_owned();
        let cut = record.is_body_cut();
        match text(bytes, &mime_type) {
            Ok(text) => PostData { mime_type, text, base64: None, cut },
            Err(bytes) => PostData { mime_type, text: String::new(), base64: Some(to_base64(&bytes)), cut },
        }
    });
    RequestShape {
        method: record.method.to_string(),
        target: Some(record.target.to_string()).filter(|target| *target != super::curl::split_url(&url).1),
        url,
        http_version: "HTTP/1.1",
        cookies: cookies(&record.fields, "cookie", redact),
        headers: headers(&record.fields, redact),
        query_string: form_urlencoded::parse(query.as_bytes())
            .map(|(name, value)| Pair { name: name.into_owned(), value: value.into_owned() })
            .collect(),
        post_data,
        headers_size: -1,
        body_size: record.body.size(),
    }
}

fn response(answer: Option<&Answer>, redact: Option<&Redact>) -> ResponseShape {
    let none = (Fields::default(), Kept::default());
    let (fields, body) = answer.map_or((&none.0, &none.1), |answer| (&answer.fields, &answer.body));
    let (bytes, cut) = plain(fields, body);
    let size = if body.is_cut() { body.size() } else { bytes.len() as u64 };
    let mime_type = fields.text("content-type").unwrap_or("x-unknown").to_owned();
    let (text, encoding) = match text(bytes, &mime_type) {
        Ok(text) => (text, None),
        Err(bytes) => (to_base64(&bytes), Some("base64")),
    };
    let status = answer.map_or(0, |answer| answer.status);
    ResponseShape {
        status,
        status_text: http::StatusCode::from_u16(status)
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or_default(),
        http_version: "HTTP/1.1",
        cookies: cookies(fields, "set-cookie", redact),
        headers: headers(fields, redact),
        content: Content { size, mime_type, text, encoding, cut },
        redirect_url: fields.get("location").map(|it| value("location", it, redact)).unwrap_or_default(),
        headers_size: -1,
        body_size: if answer.is_some() { body.size() as i64 } else { -1 },
    }
}

/// What is read of a file: everything else is for others.
#[derive(Deserialize)]
struct Read {
    log: ReadLog,
}

#[derive(Deserialize)]
struct ReadLog {
    entries: Vec<ReadEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReadEntry {
    request: ReadRequest,
    #[serde(default)]
    response: Option<ReadResponse>,
    #[serde(default, rename = "_resourceType")]
    resource_type: Option<String>,
    #[serde(default)]
    started_date_time: Option<String>,
    #[serde(default, rename = "_webSocketMessages")]
    messages: Vec<ReadMessage>,
    #[serde(default, rename = "_webSocketMessagesDropped")]
    messages_dropped: u64,
}

#[derive(Deserialize)]
struct ReadMessage {
    #[serde(rename = "type")]
    direction: String,
    #[serde(default)]
    time: f64,
    opcode: i64,
    data: String,
    #[serde(default, rename = "_size")]
    size: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReadRequest {
    method: String,
    url: String,
    #[serde(default)]
    headers: Vec<ReadPair>,
    #[serde(default)]
    post_data: Option<ReadPostData>,
    #[serde(default)]
    body_size: Option<i64>,
    #[serde(default, rename = "_target")]
    target: Option<String>,
}

#[derive(Deserialize)]
struct ReadPair {
    name: String,
    #[serde(default)]
    value: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReadPostData {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    mime_type: Option<String>,
    #[serde(default)]
    params: Vec<ReadParam>,
    #[serde(default, rename = "_base64")]
    base64: Option<String>,
    #[serde(default, rename = "_cut")]
    cut: bool,
}

/// A field of a form.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReadParam {
    name: String,
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    file_name: Option<String>,
    #[serde(default)]
    content_type: Option<String>,
}

#[derive(Deserialize)]
struct ReadResponse {
    #[serde(default)]
    status: i64,
    #[serde(default)]
    headers: Vec<ReadPair>,
    #[serde(default)]
    content: Option<ReadContent>,
}

#[derive(Deserialize)]
struct ReadContent {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    encoding: Option<String>,
    #[serde(default)]
    size: Option<i64>,
    #[serde(default, rename = "_cut")]
    cut: bool,
}

/// One request of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Imported {
    pub(crate) kind: Kind,
    pub(crate) asked: Asked,
    pub(crate) request: Request,
    /// How long its body was, where not all of it is there; 0 where nobody knows.
    pub(crate) size: Option<u64>,
    /// What the file says that was answered.
    pub(crate) answer: Option<Answered>,
    pub(crate) frames: Vec<Frame>,
    /// How many messages were before those.
    pub(crate) frames_dropped: u64,
}

impl From<Request> for Imported {
    fn from(request: Request) -> Self {
        let (kind, asked, frames) = (Kind::Http, Asked::Target, Vec::new());
        Self { kind, asked, request, size: None, answer: None, frames, frames_dropped: 0 }
    }
}

/// What was answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) fields: Vec<(String, Vec<u8>)>,
    pub(crate) body: Vec<u8>,
    /// As that of the request.
    pub(crate) size: Option<u64>,
}

/// Reads a file.
///
/// # Errors
///
/// A sentence for the user: also for a request whose body is not all there, and not marked as cut.
pub(crate) fn read(text: &[u8]) -> Result<Vec<Imported>, String> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let read: Read =
        serde_json::from_slice(text).map_err(|error| format!("this is not a HAR file: {error}"))?;
    if read.log.entries.is_empty() {
        return Err("there is no request in this HAR file".to_owned());
    }
    read.log
        .entries
        .into_iter()
        .enumerate()
        .map(|(at, entry)| {
            imported(entry).map_err(|error| format!("entry {} of the HAR file: {error}", at + 1))
        })
        .collect()
}

fn imported(entry: ReadEntry) -> Result<Imported, String> {
    let pairs = |pairs: Vec<ReadPair>| -> Vec<(String, Vec<u8>)> {
        pairs.into_iter().map(|pair| (pair.name, pair.value.unwrap_or_default().into_bytes())).collect()
    };
    let known = |size: Option<i64>| size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default();
    let ReadRequest { method, url, headers, post_data, body_size, target } = entry.request;
    if !url.contains("://") {
        return Err(format!("{url:?} is not an address"));
    }
    let (host, path) = super::curl::split_url(&url);
    let (target, asked) = match target {
        Some(target) => (target, Asked::Path(path.into())),
        None => (path, Asked::Target),
    };
    let mut fields = pairs(headers);
    if !fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        fields.insert(0, ("host".to_owned(), host.into_bytes()));
    }
    let size = post_data.as_ref().filter(|data| data.cut).map(|_| known(body_size));
    let body = match post_data {
        None => Vec::new(),
        Some(ReadPostData { base64: Some(base64), .. }) => {
            from_base64(&base64).ok_or("its body is not base64")?
        }
        Some(ReadPostData { text: Some(text), params, .. }) if !text.is_empty() || params.is_empty() => {
            text.into_bytes()
        }
        Some(data) if let Some(kind) = multipart_type(&fields, data.mime_type.as_deref()) => {
            multipart(&kind, data.params)?
        }
        Some(data) => {
            let mut form = form_urlencoded::Serializer::new(String::new());
            for pair in data.params {
                form.append_pair(&pair.name, &pair.value.unwrap_or_default());
            }
            form.finish().into_bytes()
        }
    };
    let answer = entry.response.and_then(|response| {
        let status = u16::try_from(response.status).ok().filter(|status| (100..600).contains(status))?;
        let mut fields = pairs(response.headers);
        // The body stands there without its coding.
        fields.retain(|(name, _)| !name.eq_ignore_ascii_case("content-encoding"));
        let content = response.content;
        let size = content.as_ref().filter(|content| content.cut).map(|content| known(content.size));
        let body = content.and_then(|content| {
            let text = content.text?;
            if content.encoding.as_deref() == Some("base64") {
                from_base64(&text)
            } else {
                Some(text.into_bytes())
            }
        });
        Some(Answered { status, fields, body: body.unwrap_or_default(), size })
    });
    let is_socket = entry.resource_type.as_deref() == Some("websocket");
    let kind = if is_socket { Kind::Websocket } else { Kind::Http };
    let request = Request { method, target, fields, body };
    let began = entry.started_date_time.and_then(|text| OffsetDateTime::parse(&text, &Rfc3339).ok());
    let frames = frames(entry.messages, began)?;
    Ok(Imported { kind, asked, request, size, answer, frames, frames_dropped: entry.messages_dropped })
}

/// The messages of a WebSocket whose request came at `began`.
fn frames(messages: Vec<ReadMessage>, began: Option<OffsetDateTime>) -> Result<Vec<Frame>, String> {
    let began = began.map(|at| at.unix_timestamp_nanos() as f64 / 1e9);
    let frame = |message: ReadMessage| {
        let direction = match &*message.direction {
            "send" => Direction::ToUpstream,
            "receive" => Direction::ToClient,
            other => return Err(format!("{other:?} is no direction of a message: send or receive")),
        };
        let (kind, first) = if message.opcode == 1 {
            (FrameKind::Text, message.data.into_bytes())
        } else {
            (FrameKind::Binary, from_base64(&message.data).ok_or("a message in it is not base64")?)
        };
        let size = message.size.unwrap_or_default().max(first.len());
        let at_us = began.map_or(0.0, |began| (message.time - began) * 1e6).round() as u64;
        Ok(Frame { direction, kind, size, first: first.into(), code: None, at_us })
    };
    messages.into_iter().map(frame).collect()
}

/// The media type of a form whose fields are parts of their own.
fn multipart_type(fields: &[(String, Vec<u8>)], named: Option<&str>) -> Option<String> {
    let field = fields.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let kind = match field {
        Some((_, value)) => std::str::from_utf8(value).ok()?,
        None => named?,
    };
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("multipart/form-data").then(|| kind.to_owned())
}

/// The body of a form with these fields, as `multipart/form-data` (RFC 7578) has it.
///
/// # Errors
///
/// A sentence for the user, where something of it is not there.
fn multipart(kind: &str, params: Vec<ReadParam>) -> Result<Vec<u8>, String> {
    let boundary = parameter(kind, "boundary")
        .filter(|boundary| !boundary.is_empty())
        .ok_or("the parts of its form are there, and not what stands between them")?;
    // As browsers write a name.
    let quoted = |name: &str| name.replace('\n', "%0A").replace('\r', "%0D").replace('"', "%22");
    let mut body = String::new();
    for ReadParam { name, value, file_name, content_type } in params {
        let value = match (value, &file_name) {
            (None, Some(file)) => return Err(format!("the file {file:?} of its form is not in it")),
            (value, _) => value.unwrap_or_default(),
        };
        if value.contains(&format!("--{boundary}")) {
            return Err(format!("the part {name:?} of its form has in it what stands between the parts"));
        }
        body += &format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{}\"", quoted(&name));
        if let Some(file) = file_name {
            body += &format!("; filename=\"{}\"", quoted(&file));
        }
        if let Some(kind) = content_type.filter(|kind| !kind.is_empty() && !kind.contains(['\r', '\n'])) {
            body += &format!("\r\nContent-Type: {kind}");
        }
        body += &format!("\r\n\r\n{value}\r\n");
    }
    body += &format!("--{boundary}--\r\n");
    Ok(body.into_bytes())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::capture::ring::{Captures, Elsewhere, Found, Lens};

    use super::*;

    fn captured(method: &str, target: &str, fields: &[(&str, &[u8])], body: &[u8]) -> (Arc<Captures>, u64) {
        let captures = Arc::new(Captures::new(8 << 20));
        let lens = Lens::new(Arc::clone(&captures), "web".parse().unwrap(), "http://localhost:3000", 1000);
        let fields = Fields::from_pairs(fields.iter().copied());
        let reply: [(&str, &[u8]); 2] = [("content-type", b"text/plain"), ("set-cookie", b"s=1; Path=/")];
        let answer = (201, Fields::from_pairs(reply.into_iter()), Found { bytes: b"done", size: None });
        let id = lens.import(Elsewhere {
            kind: Kind::Http,
            asked: Asked::Target,
            method,
            target,
            fields,
            body: Found { bytes: body, size: None },
            answer: Some(answer),
            frames: Vec::new(),
            frames_dropped: 0,
        });
        (captures, id)
    }

    fn written(captures: &Captures, id: u64, redact: Option<&Redact>) -> String {
        let captured = captures.get(id).unwrap();
        write(std::iter::once((&*captured, captured.record())), redact)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let fields: [(&str, &[u8]); 5] = [
            ("host", b"localhost:3000"),
            ("x-forwarded-proto", b"https"),
            ("x-forwarded-host", b"web.example.com"),
            ("authorization", b"Bearer x"),
            ("empty", b""),
        ];
        for body in [&b""[..], b"text", b"\xff\0"] {
            let (captures, id) = captured("PUT", "/a%20b?c=d&c=%C3%A4", &fields, body);
            let text = written(&captures, id, None);
            let [imported] = &read(text.as_bytes()).unwrap()[..] else { panic!("one entry") };
            assert_eq!(imported.request, Request::of(&captures.get(id).unwrap().record()));
            let answer = imported.answer.as_ref().unwrap();
            assert_eq!((answer.status, answer.fields.len(), &answer.body[..]), (201, 2, &b"done"[..]));
            assert!(text.contains(r#""url": "https://web.example.com/a%20b?c=d&c=%C3%A4""#), "{text}");
            assert!(text.contains(r#""value": "ä""#), "{text}");
        }
    }

    #[test]
    fn what_is_hidden_is_not_exported() {
        let fields: [(&str, &[u8]); 3] =
            [("authorization", b"Bearer hunter2"), ("cookie", b"a=hunter2; b=hunter2"), ("x-plain", b"seen")];
        let (captures, id) = captured("GET", "/", &fields, b"");
        let text = written(&captures, id, Some(&Redact::default()));
        assert!(
            !text.contains("hunter2") && text.contains("seen") && text.matches(MASK).count() >= 4,
            "{text}"
        );
        assert!(written(&captures, id, None).contains("hunter2"));
    }

    #[test]
    fn what_is_not_whole_is_marked() {
        use std::io::Write as _;
        let (captures, id) = captured("GET", "/", &[], b"");
        let captured = captures.get(id).unwrap();
        let entry = |record: Record| {
            let file = write(std::iter::once((&*captured, record)), None);
            serde_json::from_str::<serde_json::Value>(&file).unwrap()["log"]["entries"][0].take()
        };
        let unpacked = |size: usize| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&vec![b'x'; size]).unwrap();
            let mut record = captured.record();
            let fields = Fields::from_pairs([("content-encoding", &b"gzip"[..])].into_iter());
            let body = Kept::whole(&gzip.finish().unwrap(), 1 << 20);
            record.answer = Some(Answer::new(200, fields, body));
            entry(record)["response"]["content"].take()
        };
        let (whole, cut) = (unpacked(1000), unpacked(5 << 20));
        assert_eq!((&whole["size"], whole.get("_cut")), (&1000.into(), None));
        assert_eq!((&cut["_cut"], cut["text"].as_str().unwrap().len()), (&true.into(), 2 << 20));

        let mut socket = captured.record();
        socket.kind = Kind::Websocket;
        let frame = |first: &'static [u8], size| Frame {
            direction: Direction::ToClient,
            kind: FrameKind::Text,
            size,
            first: first.into(),
            code: None,
            at_us: 0,
        };
        socket.frames = [frame("ä".as_bytes(), 2), frame(b"x\xc3", 3)].into();
        socket.frames_total = 5;
        let file = write(std::iter::once((&*captured, socket.clone())), None);
        let entry = entry(socket);
        let messages = &entry["_webSocketMessages"];
        assert_eq!((&messages[0]["data"], messages[0].get("_cut")), (&"ä".into(), None));
        assert_eq!((&messages[1]["data"], &messages[1]["_cut"]), (&"x".into(), &true.into()));
        assert_eq!(entry["_webSocketMessagesDropped"], 3);
        let read = read(file.as_bytes()).unwrap().remove(0);
        let kept = [frame("ä".as_bytes(), 2), frame(b"x", 3)];
        assert_eq!((read.kind, read.frames_dropped, &read.frames[..]), (Kind::Websocket, 3, &kept[..]));
    }

    #[test]
    fn what_was_cut_is_read_as_the_beginning_it_is() {
        let sizes = |post: &str, body: &str, content: &str| {
            let file = format!(
                r#"{{"log": {{"entries": [{{"request": {{"method": "POST", "url": "http://h/", "postData": {{"text": "abc"{post}}}{body}}},
                "response": {{"status": 200, "content": {{"text": "de"{content}}}}}}}]}}}}"#
            );
            let imported = read(file.as_bytes()).unwrap().remove(0);
            let answer = imported.answer.unwrap();
            assert_eq!((&imported.request.body[..], &answer.body[..]), (&b"abc"[..], &b"de"[..]));
            (imported.size, answer.size)
        };
        assert_eq!(sizes("", r#", "bodySize": 9"#, r#", "size": 9"#), (None, None));
        let cut = r#", "_cut": true"#;
        assert_eq!(sizes(cut, r#", "bodySize": 9"#, r#", "size": 8, "_cut": true"#), (Some(9), Some(8)));
        assert_eq!(sizes(cut, r#", "bodySize": -1"#, cut), (Some(0), Some(0)));
    }

    #[test]
    fn a_text_is_written_as_one_where_it_is_utf_8() {
        for (kind, bytes, wanted) in [
            ("text/plain", &b"\xc3\xa4"[..], true),
            ("text/plain; charset=\"UTF-8\"", b"\xc3\xa4", true),
            ("text/plain; charset=us-ascii", b"a", true),
            ("text/plain; charset=iso-8859-1", b"a", true),
            // Other letters than those it would be shown as.
            ("text/plain; Charset=iso-8859-1", b"\xc3\xa4", false),
            ("text/plain; charset=utf-16", b"h\0i\0", false),
            ("text/plain; charset=UTF-16BE", b"N-", false),
            ("text/plain; charset=iso-2022-jp", b"\x1b$BF|K\\\x1b(B", false),
            ("application/json", b"\xe4", false),
        ] {
            assert_eq!(text(bytes.to_vec(), kind).is_ok(), wanted, "{kind} {bytes:?}");
        }
    }

    #[test]
    fn addresses_are_encoded() {
        for (url, wanted) in [
            ("http://h:1/a b\"<>\\^`{|}", "http://h:1/a%20b%22%3C%3E%5C%5E%60%7B%7C%7D"),
            ("http://[::1]:1/[x]?a=[]#", "http://[::1]:1/%5Bx%5D?a=%5B%5D%23"),
            ("http://h/%41%4%zz%", "http://h/%41%254%25zz%25"),
            ("http://h/ä", "http://h/%C3%A4"),
            ("http://h", "http://h"),
        ] {
            assert_eq!(encoded(url), wanted);
        }
    }

    #[test]
    fn the_parts_of_a_form_are_put_together() {
        let form = |kind: &str, params: &str| {
            let file = format!(
                r#"{{"log": {{"entries": [{{"request": {{"method": "POST", "url": "http://h/",
                "headers": [{{"name": "Content-Type", "value": "{kind}"}}],
                "postData": {{"mimeType": "x", "params": [{params}]}}}}}}]}}}}"#
            );
            read(file.as_bytes()).map(|mut files| String::from_utf8(files.remove(0).request.body).unwrap())
        };
        let plain = r#"{"name": "a", "value": "1"}"#;
        let file = r#"{"name": "f\"", "fileName": "x.txt", "contentType": "text/plain", "value": "hi"}"#;
        for kind in ["multipart/form-data; boundary=B", "Multipart/Form-Data;charset=x; Boundary=\\\"B\\\""] {
            assert_eq!(
                form(kind, &format!("{plain}, {file}")).unwrap(),
                "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--B\r\nContent-Disposition: form-data; \
                 name=\"f%22\"; filename=\"x.txt\"\r\nContent-Type: text/plain\r\n\r\nhi\r\n--B--\r\n"
            );
        }
        let boundary = "multipart/form-data; boundary=B";
        for (kind, params) in [
            ("multipart/form-data", plain),
            (boundary, r#"{"name": "f", "fileName": "x.txt"}"#),
            (boundary, r#"{"name": "f", "value": "\r\n--B--"}"#),
        ] {
            assert!(form(kind, params).is_err(), "{kind} {params}");
        }
    }

    #[test]
    fn files_of_others_are_read() {
        let file = r#"{"log": {"version": "1.2", "entries": [
            {"request": {"method": "GET", "url": "https://h.example/x?y#z", "headers": [{"name": ":path", "value": "/x"}]}},
            {"request": {"method": "POST", "url": "http://h:1", "headers": [],
                "postData": {"mimeType": "application/x-www-form-urlencoded", "params": [{"name": "a b", "value": "ä"}]}},
             "response": {"status": 200, "headers": [{"name": "content-encoding", "value": "gzip"}],
                "content": {"text": "AP8=", "encoding": "base64"}}},
            {"request": {"method": "GET", "url": "http://h/"}, "response": {"status": 0, "headers": [], "content": {}}}
        ]}}"#;
        let files = read(file.as_bytes()).unwrap();
        assert_eq!(
            (&*files[0].request.target, &files[0].request.fields[0].1[..]),
            ("/x?y", &b"h.example"[..])
        );
        assert_eq!((&*files[1].request.target, &files[1].request.body[..]), ("/", &b"a+b=%C3%A4"[..]));
        let answer = Answered { status: 200, fields: Vec::new(), body: vec![0, 0xff], size: None };
        assert_eq!(files[1].answer, Some(answer));
        assert_eq!(files[2].answer, None);
        for bad in [
            "",
            "{}",
            r#"{"log": {"entries": []}}"#,
            r#"{"log": {"entries": [{"request": {"method": "GET", "url": "/relative"}}]}}"#,
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
