//! Sending a captured request again, as it was or edited.
//!
//! Enters: a record and what is to be another. Leaves: the request for the upstream, or why there is none; its answer
//! goes into the ring like any other.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use proto::{error::ErrorCode, header::Headers, limits, target::Target};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::{redact::Redact, shape::Value};
use crate::{
    capture::{
        fields::Fields,
        record::Record,
        ring::{Capture, Captured},
    },
    serve::{
        exchange::{check_head, origin_form},
        tunnel::Tunnel,
        upstream::{Dialled, RequestBody, Upstream, UpstreamError},
    },
};

/// The field that marks a replay; its value is the number of the original.
const MARK: HeaderName = HeaderName::from_static("x-tunnel-replay");

/// How often a request may be sent again in one go.
pub(crate) const TIMES: u32 = 100;

/// A request in the terms of HTTP/1.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) fields: Vec<(String, Vec<u8>)>,
    pub(crate) body: Vec<u8>,
}

/// What is to be another.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Edits {
    pub(crate) method: Option<String>,
    pub(crate) target: Option<String>,
    /// All fields.
    pub(crate) fields: Option<Vec<(String, Value)>>,
    /// Each instead of all of its name.
    pub(crate) set: Vec<(String, Value)>,
    pub(crate) remove: Vec<String>,
    pub(crate) body: Option<NewBody>,
    pub(crate) times: Option<u32>,
}

impl Edits {
    /// Reads them; nothing at all is none.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`] for what is no object of edits.
    pub(crate) fn read(json: &[u8]) -> Result<Self, Refusal> {
        if json.is_empty() {
            return Ok(Self::default());
        }
        // A list would be taken for the values of the fields in order.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(json).map_err(amiss)?;
        serde_json::from_value(object.into()).map_err(amiss)
    }
}

fn amiss(error: serde_json::Error) -> Refusal {
    Refusal::Invalid(format!("the edits: {error}"))
}

/// Another body.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NewBody {
    Base64(String),
    Text(String),
}

/// How much of a body is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    Whole,
    Beginning,
}

/// Why nothing is sent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// What was captured is not enough.
    #[error("{0}")]
    Impossible(String),
    /// What is to be another is no HTTP.
    #[error("{0}")]
    Invalid(String),
}

impl Request {
    /// What was captured.
    pub(crate) fn of(record: &Record) -> Self {
        Self {
            method: record.method.to_string(),
            target: record.target.to_string(),
            fields: record.fields.iter().map(|(name, value)| (name.to_owned(), value.to_vec())).collect(),
            body: record.body.to_vec(),
        }
    }

    /// Hides what is not to be exported.
    pub(crate) fn masked(mut self, redact: &Redact) -> Self {
        for (name, value) in &mut self.fields {
            if redact.hides(name) {
                *value = super::redact::MASK.as_bytes().to_vec();
            }
        }
        self
    }

    /// What is to be sent for a record.
    ///
    /// # Errors
    ///
    /// [`Refusal`].
    pub(crate) fn edited(record: &Record, edits: &Edits) -> Result<Self, Refusal> {
        match record.obstacle() {
            Some(obstacle) if edits.body.is_none() || !record.lacks_only_a_body() => {
                return Err(Refusal::Impossible(obstacle));
            }
            _ => {}
        }
        let captured = Self::of(record);
        let mut request = captured.clone();
        if let Some(method) = &edits.method {
            request.method.clone_from(method);
        }
        if let Some(target) = &edits.target {
            request.target.clone_from(target);
        }
        if let Some(fields) = &edits.fields {
            request.fields = values(&captured.fields, fields)?;
        }
        for name in &edits.remove {
            request.fields.retain(|(own, _)| !own.eq_ignore_ascii_case(name));
        }
        for (name, value) in values(&captured.fields, &edits.set)? {
            let at = request.fields.iter().position(|(own, _)| own.eq_ignore_ascii_case(&name));
            match at {
                Some(at) => {
                    request.fields[at].1 = value;
                    let mut first = true;
                    request
                        .fields
                        .retain(|(own, _)| !own.eq_ignore_ascii_case(&name) || std::mem::take(&mut first));
                }
                None => request.fields.push((name, value)),
            }
        }
        if let Some(body) = &edits.body {
            request.body = match body {
                NewBody::Text(text) => text.clone().into_bytes(),
                NewBody::Base64(text) => super::shape::from_base64(text)
                    .ok_or_else(|| Refusal::Invalid("the body is not base64".to_owned()))?,
            };
        }
        // Whatever was captured, and whatever is said: a body of another length would never end, or be cut short.
        request.set_length();
        request.check()?;
        if request.body.len() > limits::REQUEST_BODY_BYTES {
            let most = limits::REQUEST_BODY_BYTES;
            return Err(Refusal::Invalid(format!("the body is over the limit of {most} bytes")));
        }
        Ok(request)
    }

    /// The same as a replay of that request says that it is one.
    pub(crate) fn marked(mut self, of: u64) -> Self {
        self.fields.retain(|(name, _)| !name.eq_ignore_ascii_case(MARK.as_str()));
        self.fields.push((MARK.as_str().to_owned(), of.to_string().into_bytes()));
        self
    }

    /// Makes `content-length` say how long the body is: at its place, or at the end where one is needed.
    pub(crate) fn set_length(&mut self) {
        let length = self.body.len().to_string().into_bytes();
        let mut placed = false;
        self.fields.retain_mut(|(name, value)| {
            if !name.eq_ignore_ascii_case("content-length") {
                return true;
            }
            value.clone_from(&length);
            !std::mem::replace(&mut placed, true)
        });
        let expected = matches!(&*self.method, "POST" | "PUT" | "PATCH");
        if !placed && (expected || !self.body.is_empty()) {
            self.fields.push(("content-length".to_owned(), length));
        }
    }

    /// Whether it can be sent as it is.
    fn check(&self) -> Result<(), Refusal> {
        let invalid = |message: String| Err(Refusal::Invalid(message));
        if self.method.parse::<Method>().is_err() || self.method == "CONNECT" {
            return invalid(format!("{:?} is no method to replay with", self.method));
        }
        match Target::parse(&self.target) {
            Ok(target) if origin_form(&target).is_some() => {}
            _ => {
                return invalid(format!(
                    "{:?} is no target: it begins with / and has no blank in it",
                    self.target
                ));
            }
        }
        let mut head = Headers::new();
        for (name, value) in &self.fields {
            let Ok(field) = name.parse::<HeaderName>() else {
                return invalid(format!("{name:?} is not the name of a header field"));
            };
            let Ok(value) = HeaderValue::from_bytes(value) else {
                return invalid(format!(
                    "the value of {name} has a line break or another control character in it"
                ));
            };
            head.push(field, value);
            if ["connection", "transfer-encoding", "upgrade", "expect", "keep-alive", "te", "trailer"]
                .iter()
                .any(|hop| name.eq_ignore_ascii_case(hop))
            {
                return invalid(format!(
                    "{name} belongs to a connection, and the agent has its own with the upstream"
                ));
            }
        }
        if !head.is_within_limits() {
            return invalid(format!(
                "the header fields are over the limit of {} or of {} bytes together",
                limits::HEADER_FIELDS,
                limits::HEAD_BYTES
            ));
        }
        Ok(())
    }

    /// Its fields as they go to the upstream: names in lower case, repetitions behind each other. `None` where one of
    /// them is none of HTTP.
    fn headers(&self) -> Option<HeaderMap> {
        let mut headers = HeaderMap::with_capacity(self.fields.len());
        for (name, value) in &self.fields {
            headers.append(name.parse::<HeaderName>().ok()?, HeaderValue::from_bytes(value).ok()?);
        }
        Some(headers)
    }

    /// For the upstream. Every part has been checked.
    fn into_http(self) -> Option<http::Request<RequestBody>> {
        let target = Target::parse(&self.target).ok()?;
        let headers = self.headers()?;
        let body =
            if self.body.is_empty() { RequestBody::Empty } else { RequestBody::Whole(self.body.into()) };
        let mut request = http::Request::new(body);
        *request.method_mut() = self.method.parse().ok()?;
        *request.uri_mut() = origin_form(&target)?;
        *request.headers_mut() = headers;
        Some(request)
    }
}

/// The values of fields that came from outside; a mask stands for the captured value that it names, else for
/// the one at the same place among those of its name.
fn values(
    captured: &[(String, Vec<u8>)],
    fields: &[(String, Value)],
) -> Result<Vec<(String, Vec<u8>)>, Refusal> {
    let mut values: Vec<(String, Vec<u8>)> = Vec::with_capacity(fields.len());
    for (name, value) in fields {
        let nth = values.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name)).count();
        let bytes = match value {
            Value::Text(text) => text.clone().into_bytes(),
            Value::Base64 { base64 } => super::shape::from_base64(base64)
                .ok_or_else(|| Refusal::Invalid(format!("the value of {name} is not base64")))?,
            Value::Masked { at, .. } => captured
                .iter()
                .enumerate()
                .filter(|(_, (own, _))| own.eq_ignore_ascii_case(name))
                .map(|(place, field)| (Some(place), field))
                .enumerate()
                .find(|(number, (place, _))| if at.is_some() { at == place } else { *number == nth })
                .map(|(_, (_, field))| field)
                .map(|(_, value)| value.clone())
                .ok_or_else(|| {
                    Refusal::Invalid(format!("{name} is masked, and there is no captured value for it"))
                })?,
        };
        values.push((name.clone(), bytes));
    }
    Ok(values)
}

/// Lists a replay of a [marked](Request::marked) request, which is then to be [sent](send).
pub(crate) fn list(tunnel: &Tunnel, original: &Captured, request: &Request) -> Option<Capture> {
    let fields = Fields::copy(request.headers()?.iter());
    Some(tunnel.lens()?.replay(original, &request.method, &request.target, fields, &request.body))
}

/// Where a captured request went, while the tunnel still leads there.
pub(crate) fn upstream_of(tunnel: &Tunnel, captured: &Captured) -> Option<Arc<Upstream>> {
    if let Some((own, _)) = &tunnel.own
        && *captured.upstream == *own.address().to_string()
    {
        return Some(Arc::clone(own));
    }
    let address = captured.upstream.parse().ok()?;
    tunnel.policy()?.traffic().upstream_at(&address).cloned()
}

/// Sends a listed replay and takes its answer in. Redirects are not followed.
pub(crate) async fn send(tunnel: &Tunnel, upstream: &Upstream, capture: Capture, request: Request) {
    match exchange(tunnel, upstream, &capture, request).await {
        Ok(()) => capture.complete(),
        Err(code) => capture.failed(code),
    }
}

async fn exchange(
    tunnel: &Tunnel,
    upstream: &Upstream,
    capture: &Capture,
    request: Request,
) -> Result<(), ErrorCode> {
    let tap = capture.tap();
    tap.sent();
    let began = Instant::now();
    let request = request.into_http().ok_or(ErrorCode::BadRequest)?;
    let failed = |error: UpstreamError| error.code();
    let response = timeout_at(began + tunnel.request_timeout, upstream.send(request))
        .await
        .map_err(|_| ErrorCode::UpstreamTimedOut)?
        .map_err(failed)?;
    let dialled = response.extensions().get::<Dialled>().map(|at| at.0);
    let (status, headers, mut body) = check_head(response).map_err(failed)?;
    tap.answer(status, headers.iter(), dialled);
    let all = async {
        while !body.is_end() {
            match body.next().await {
                Some(Ok(bytes)) => tap.answer_piece(&bytes),
                Some(Err(error)) => return Err(failed(error)),
                None => break,
            }
        }
        Ok(())
    };
    timeout_at(began + limits::RESPONSE_DURATION, all).await.map_err(|_| ErrorCode::UpstreamTimedOut)??;
    body.finish();
    Ok(())
}

/// What an import is made of: fields that belong to a connection are taken off, `host` is by the tunnel's rule, and
/// `content-length` stays what it was where the body is only the beginning of one.
pub(crate) fn adopt(mut request: Request, host: &HeaderValue, body: Extent) -> Result<Request, Refusal> {
    let hop = ["connection", "transfer-encoding", "upgrade", "expect", "keep-alive", "te", "trailer", "host"];
    request.fields.retain(|(name, _)| {
        // HTTP/2 writes its request line as fields.
        !name.starts_with(':') && !hop.iter().any(|hop| name.eq_ignore_ascii_case(hop))
    });
    request.fields.insert(0, (header::HOST.as_str().to_owned(), host.as_bytes().to_vec()));
    if body == Extent::Whole {
        request.set_length();
    }
    request.check()?;
    Ok(request)
}

#[cfg(test)]
mod tests {
    use crate::capture::{
        kept::Kept,
        record::{Kind, Source},
    };

    use super::*;

    fn record() -> Record {
        let mut record = Record::new(Source::Edge, Kind::Http, "POST".into(), "/hook?a=1".into());
        record.fields = Fields::from_pairs(
            [
                ("host", &b"localhost"[..]),
                ("cookie", b"a=1"),
                ("x", b"1"),
                ("cookie", b"b=2"),
                ("content-length", b"3"),
            ]
            .into_iter(),
        );
        record.body = Kept::whole(b"abc", 100);
        record
    }

    fn edited(json: &str) -> Result<Request, Refusal> {
        let edits: Edits =
            serde_json::from_str(json).map_err(|error| Refusal::Impossible(error.to_string()))?;
        Request::edited(&record(), &edits)
    }

    fn fields(request: &Request) -> Vec<(&str, &str)> {
        request.fields.iter().map(|(name, value)| (&**name, std::str::from_utf8(value).unwrap())).collect()
    }

    #[test]
    fn without_edits_it_is_what_was_captured() {
        assert_eq!(edited("{}").unwrap(), Request::of(&record()));
    }

    #[test]
    fn an_edit_changes_what_it_names_and_nothing_else() {
        let request =
            edited(r#"{"method": "PUT", "target": "/other", "set": [["X", "2"], ["new", "n"]]}"#).unwrap();
        assert_eq!((&*request.method, &*request.target, &*request.body), ("PUT", "/other", &b"abc"[..]));
        let wanted = [
            ("host", "localhost"),
            ("cookie", "a=1"),
            ("x", "2"),
            ("cookie", "b=2"),
            ("content-length", "3"),
            ("new", "n"),
        ];
        assert_eq!(fields(&request), wanted);

        let request = edited(r#"{"body": {"text": "longer"}, "remove": ["Cookie"]}"#).unwrap();
        assert_eq!(fields(&request), [("host", "localhost"), ("x", "1"), ("content-length", "6")]);
        assert_eq!(edited(r#"{"body": {"base64": "AP8="}}"#).unwrap().body, [0, 0xff]);
        assert_eq!(
            fields(&edited(r#"{"set": [["cookie", "c"]]}"#).unwrap())[1..3],
            [("cookie", "c"), ("x", "1")]
        );
    }

    #[test]
    fn edits_are_an_object_or_nothing() {
        assert!(Edits::read(b"").unwrap().set.is_empty());
        assert_eq!(Edits::read(br#" {"times": 3}"#).unwrap().times, Some(3));
        for bad in ["[]", "[null, \"/x\"]", "null", "\"x\"", "{", r#"{"mehtod": "GET"}"#] {
            assert!(matches!(Edits::read(bad.as_bytes()), Err(Refusal::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn a_replay_is_listed_as_it_is_sent() {
        let request = edited(r#"{"set": [["X-New", "n"]], "body": {"text": "abc"}}"#).unwrap();
        let listed = request.headers().unwrap();
        let listed: Vec<_> = listed.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let wanted: [(&str, &[u8]); 6] = [
            ("host", b"localhost"),
            ("cookie", b"a=1"),
            ("cookie", b"b=2"),
            ("x", b"1"),
            ("content-length", b"3"),
            ("x-new", b"n"),
        ];
        assert_eq!(listed, wanted);
    }

    #[test]
    fn the_length_is_always_that_of_the_body() {
        let length = |request: Request| {
            let all =
                request.fields.into_iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            all.map(|(_, value)| String::from_utf8(value).unwrap()).collect::<Vec<_>>()
        };
        for json in [
            r#"{"set": [["Content-Length", "99"]]}"#,
            r#"{"remove": ["content-length"]}"#,
            r#"{"fields": [["content-length", "1"], ["content-length", "99"]]}"#,
        ] {
            assert_eq!(length(edited(json).unwrap()), ["3"], "{json}");
        }
    }

    #[test]
    fn a_mask_stands_for_what_was_captured() {
        let mask = r#"{"masked": true, "length": 3}"#;
        let request = edited(&format!(
            r#"{{"fields": [["host", "h"], ["cookie", {mask}], ["cookie", {mask}], ["obs", {{"base64": "/w=="}}]]}}"#
        ))
        .unwrap();
        let values: Vec<_> = request.fields.iter().map(|(_, value)| &**value).collect();
        assert_eq!(values, [&b"h"[..], b"a=1", b"b=2", b"\xff", b"3"]);
        let third = edited(&format!(r#"{{"set": [["authorization", {mask}]]}}"#));
        assert!(matches!(third, Err(Refusal::Invalid(_))));
        // One that says for which it stands is that one, whatever is left of the others.
        let named = |name: &str, at: usize| {
            let mask = format!(r#"{{"masked": true, "length": 3, "at": {at}}}"#);
            edited(&format!(r#"{{"fields": [["{name}", {mask}]]}}"#))
        };
        assert_eq!(named("Cookie", 3).unwrap().fields[0].1, b"b=2");
        assert_eq!(named("cookie", 1).unwrap().fields[0].1, b"a=1");
        for (name, at) in [("x", 3), ("cookie", 2), ("cookie", 9)] {
            assert!(matches!(named(name, at), Err(Refusal::Invalid(_))), "{name} {at}");
        }
    }

    #[test]
    fn what_is_no_http_is_refused() {
        for json in [
            r#"{"method": "NO SPACE"}"#,
            r#"{"method": "CONNECT"}"#,
            r#"{"method": ""}"#,
            r#"{"target": ""}"#,
            r#"{"target": "/a b"}"#,
            r#"{"target": "/a\r\nx: y"}"#,
            r#"{"target": "http://other/"}"#,
            r#"{"set": [["a b", "x"]]}"#,
            r#"{"set": [["a", "x\r\nb: y"]]}"#,
            r#"{"set": [["a", "x\u0000"]]}"#,
            r#"{"set": [["Transfer-Encoding", "chunked"]]}"#,
            r#"{"body": {"base64": "%"}}"#,
        ] {
            assert!(matches!(edited(json), Err(Refusal::Invalid(_))), "{json}");
        }
        assert!(serde_json::from_str::<Edits>(r#"{"mehtod": "GET"}"#).is_err());
    }

    #[test]
    fn a_head_is_sent_up_to_the_limits_of_the_tunnel() {
        let with = |count: usize, bytes: usize| {
            let mut request = Request::edited(&record(), &Edits::default()).unwrap();
            let size = request.fields.iter().map(|(name, value)| name.len() + value.len() + 4).sum::<usize>();
            request.fields.resize(count - 1, ("a".to_owned(), Vec::new()));
            let filled = size + 5 * (count - 1 - record().fields.iter().count());
            request.fields.push(("b".to_owned(), vec![b'x'; bytes - filled - 5]));
            request.check().is_ok()
        };
        assert!(with(limits::HEADER_FIELDS, limits::HEAD_BYTES));
        assert!(!with(limits::HEADER_FIELDS + 1, limits::HEAD_BYTES));
        assert!(!with(limits::HEADER_FIELDS, limits::HEAD_BYTES + 1));
    }

    #[test]
    fn what_was_cut_is_not_sent_unless_there_is_another_body() {
        let mut cut = record();
        cut.body = Kept::whole(b"abcdef", 3);
        let Err(Refusal::Impossible(why)) = Request::edited(&cut, &Edits::default()) else {
            panic!("it is cut")
        };
        assert!(why.contains("3 of 6 bytes"), "{why}");
        let edits = Edits { body: Some(NewBody::Text("whole".to_owned())), ..Edits::default() };
        assert_eq!(Request::edited(&cut, &edits).unwrap().body, b"whole");
        cut.fields = Fields::from_pairs([("content-length", &b"6"[..])].into_iter());
        let edits = Edits { body: Some(NewBody::Text("abc".to_owned())), ..Edits::default() };
        let part = Request::edited(&cut, &edits).unwrap();
        assert!(part.fields.contains(&("content-length".to_owned(), b"3".to_vec())), "{:?}", part.fields);
        let mut socket = record();
        socket.kind = Kind::Websocket;
        assert!(matches!(Request::edited(&socket, &edits), Err(Refusal::Impossible(_))));
    }

    #[test]
    fn an_import_gets_host_and_length_of_its_own() {
        let request = Request {
            method: "POST".into(),
            target: "/x".into(),
            fields: [
                (":authority", "h"),
                ("Host", "far.example"),
                ("Connection", "close"),
                ("A", "1"),
                ("Content-Length", "99"),
            ]
            .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
            .to_vec(),
            body: b"12345".to_vec(),
        };
        let host = HeaderValue::from_static("localhost:3000");
        for (extent, length) in [(Extent::Whole, "5"), (Extent::Beginning, "99")] {
            let adopted = adopt(request.clone(), &host, extent).unwrap();
            assert_eq!(
                fields(&adopted),
                [("host", "localhost:3000"), ("A", "1"), ("Content-Length", length)]
            );
        }
    }
}
