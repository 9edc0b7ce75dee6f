//! One line for each request: who asked what of which tunnel, and what came of it.
//!
//! No header value, query, body or token is ever in it; the cause of a failure is the system's, the TLS library's or a
//! text of ours, with the configured address.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    report::denial::DeniedBy,
    report::metrics::{Ended, TunnelMetrics},
    report::telemetry::Terminal,
    serve::{hint::Hint, upload::UploadProgress},
};

use http::Method;
use proto::{error::ErrorCode, id::RequestId, id::TunnelName, socket::Message, target::Target};

/// No more of a cause than this stands in a line: address, error and advice fit.
const CAUSE_CHARS: usize = 400;

/// Where the lines go.
#[derive(Debug, Clone)]
pub(crate) enum AccessLog {
    /// To the log, as fields.
    Log,
    /// To standard output, for people.
    People(Terminal),
}

impl AccessLog {
    fn hint(&self, tunnel: &TunnelName, request_id: &RequestId, status: u16, hint: Hint) {
        let Hint { refusal, advice } = hint;
        match self {
            Self::Log => tracing::warn!(
                tunnel_id = tunnel.as_str(),
                request_id = request_id.as_str(),
                status,
                "hint for {tunnel}: {refusal}; what helps: {advice}"
            ),
            Self::People(terminal) => {
                terminal.line(format!("hint      {refusal}; what helps: {advice}"));
            }
        }
    }
}

/// How a request ended without a whole response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The response was sent.
    Complete,
    /// There was none, or no more of it.
    Failed(ErrorCode),
}

/// The line of one request. It is written when it is dropped, so that no request goes without.
pub(crate) struct AccessLine {
    log: AccessLog,
    request_id: RequestId,
    tunnel: TunnelName,
    method: Method,
    path: Box<str>,
    began: Instant,
    status: Option<u16>,
    /// How long the head took.
    head: Option<Duration>,
    request_bytes: u64,
    /// Where a body is counted that streams.
    upload: Option<UploadProgress>,
    bytes: u64,
    ending: Option<Ending>,
    denied_by: Option<DeniedBy>,
    /// Why the upstream gave no whole response.
    cause: Option<Box<str>>,
    metrics: Option<Arc<TunnelMetrics>>,
}

impl AccessLine {
    pub(crate) fn begin(
        log: AccessLog,
        request_id: RequestId,
        tunnel: TunnelName,
        method: &Method,
        target: &Target,
    ) -> Self {
        Self {
            log,
            request_id,
            tunnel,
            method: method.clone(),
            path: target.path().into(),
            began: Instant::now(),
            status: None,
            head: None,
            request_bytes: 0,
            upload: None,
            bytes: 0,
            ending: None,
            denied_by: None,
            cause: None,
            metrics: None,
        }
    }

    /// Notes whose request it is.
    pub(crate) fn counted_by(&mut self, metrics: &Arc<TunnelMetrics>) {
        self.metrics = Some(Arc::clone(metrics));
    }

    /// Says what would help, to whoever reads the lines.
    pub(crate) fn hint(&self, status: u16, hint: Hint) {
        self.log.hint(&self.tunnel, &self.request_id, status, hint);
    }

    /// Notes which rule refused it, if one did.
    pub(crate) const fn denied_by(&mut self, rule: Option<DeniedBy>) {
        self.denied_by = rule;
    }

    pub(crate) const fn request_body(&mut self, bytes: u64) {
        self.request_bytes = bytes;
    }

    /// Notes a body that streams: what counts of it is what the upstream has taken by the end, however that comes.
    pub(crate) fn request_upload(&mut self, upload: UploadProgress) {
        self.upload = Some(upload);
    }

    fn request_bytes(&self) -> u64 {
        self.upload.as_ref().map_or(self.request_bytes, UploadProgress::passed_on)
    }

    pub(crate) fn head(&mut self, status: u16) {
        self.status = Some(status);
        self.head = Some(self.began.elapsed());
    }

    /// Takes a head back that was noted and never sent.
    pub(crate) const fn withdraw_head(&mut self) {
        self.status = None;
    }

    pub(crate) const fn body(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub(crate) const fn end(&mut self, ending: Ending) {
        self.ending = Some(ending);
    }

    /// Notes why the upstream gave no whole response, as far as a line has room.
    pub(crate) fn cause(&mut self, cause: &str) {
        let end = cause.char_indices().nth(CAUSE_CHARS).map_or(cause.len(), |(at, _)| at);
        self.cause = Some(cause[..end].replace(char::is_control, " ").into());
    }

    fn status(&self) -> u16 {
        match (self.status, self.ending) {
            (Some(status), _) => status,
            (None, Some(Ending::Failed(code))) => code.status().as_u16(),
            // What servers log for a client that has gone.
            (None, _) => 499,
        }
    }

    const fn error_code(&self) -> Option<&'static str> {
        match self.ending {
            Some(Ending::Complete) => None,
            Some(Ending::Failed(code)) => Some(code.as_str()),
            None => Some("cancelled"),
        }
    }
}

impl Drop for AccessLine {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        if let Some(metrics) = &self.metrics {
            metrics.ended(&Ended {
                status: self.status(),
                error: self.error_code(),
                denied_by: self.denied_by,
                duration: elapsed,
                head: self.head,
                request_bytes: self.request_bytes(),
                response_bytes: self.bytes,
            });
        }
        match &self.log {
            AccessLog::Log => tracing::info!(
                target: "agentd::access",
                request_id = self.request_id.as_str(),
                tunnel_id = self.tunnel.as_str(),
                method = self.method.as_str(),
                path = &*self.path,
                status = self.status(),
                request_bytes = self.request_bytes(),
                bytes = self.bytes,
                head_ms = self.head.map(readable_ms),
                elapsed_ms = readable_ms(elapsed),
                error_code = self.error_code(),
                denied_by = self.denied_by.map(DeniedBy::as_str),
                cause = self.cause.as_deref(),
                // The journal shows people this text alone.
                "{} {} {}",
                self.method,
                self.path,
                self.status()
            ),
            AccessLog::People(terminal) => terminal.request_line(|| {
                format!(
                    "{}  {}  {} {}  {}  {}{}{}{}{}",
                    time_of_day(),
                    self.status(),
                    self.method,
                    self.path,
                    readable_bytes(self.bytes),
                    readable_duration(elapsed),
                    if self.error_code().is_some() { "  " } else { "" },
                    self.error_code().unwrap_or_default(),
                    if self.cause.is_some() { "  " } else { "" },
                    self.cause.as_deref().unwrap_or_default(),
                )
            }),
        }
    }
}

/// The line about a WebSocket's end: one about its beginning was written when it was answered. Written when it is
/// dropped.
pub(crate) struct SocketLine {
    log: AccessLog,
    request_id: RequestId,
    tunnel: TunnelName,
    path: Box<str>,
    began: Instant,
    code: Option<u16>,
    messages_in: u64,
    bytes_in: u64,
    messages_out: u64,
    bytes_out: u64,
}

impl SocketLine {
    pub(crate) fn begin(log: AccessLog, request_id: RequestId, tunnel: &TunnelName, target: &Target) -> Self {
        Self {
            log,
            request_id,
            tunnel: tunnel.clone(),
            path: target.path().into(),
            began: Instant::now(),
            code: None,
            messages_in: 0,
            bytes_in: 0,
            messages_out: 0,
            bytes_out: 0,
        }
    }

    pub(crate) fn client_sent(&mut self, message: &Message) {
        if !matches!(message, Message::Close(_)) {
            self.messages_in += 1;
            self.bytes_in += message.len() as u64;
        }
    }

    pub(crate) fn upstream_sent(&mut self, message: &Message) {
        if !matches!(message, Message::Close(_)) {
            self.messages_out += 1;
            self.bytes_out += message.len() as u64;
        }
    }

    /// How many messages the upstream has sent.
    pub(crate) const fn upstream_messages(&self) -> u64 {
        self.messages_out
    }

    /// Says what would help, to whoever reads the lines.
    pub(crate) fn hint(&self, hint: Hint) {
        self.log.hint(&self.tunnel, &self.request_id, 101, hint);
    }

    /// Notes the code of a close; the first one says why.
    pub(crate) const fn code(&mut self, code: Option<u16>) {
        if self.code.is_none() {
            self.code = code;
        }
    }
}

impl Drop for SocketLine {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        match &self.log {
            AccessLog::Log => tracing::info!(
                target: "agentd::access",
                request_id = self.request_id.as_str(),
                tunnel_id = self.tunnel.as_str(),
                path = &*self.path,
                code = self.code,
                messages_in = self.messages_in,
                bytes_in = self.bytes_in,
                messages_out = self.messages_out,
                bytes_out = self.bytes_out,
                elapsed_ms = readable_ms(elapsed),
                "WebSocket {} closed",
                self.path,
            ),
            AccessLog::People(terminal) => terminal.request_line(|| {
                format!(
                    "{}  {}  WebSocket {} closed  {} in, {} out  {}",
                    time_of_day(),
                    self.code.map_or_else(|| "-".to_owned(), |code| code.to_string()),
                    self.path,
                    readable_bytes(self.bytes_in),
                    readable_bytes(self.bytes_out),
                    readable_duration(elapsed),
                )
            }),
        }
    }
}

fn readable_ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

fn time_of_day() -> String {
    time_of_day_at(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The time of day in UTC, from the time since 1970.
pub(crate) fn time_of_day_at(at: Duration) -> String {
    let secs = at.as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}Z", secs / 3600, secs / 60 % 60, secs % 60)
}

/// A size for people.
pub(crate) fn readable_bytes(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{} KB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}

/// A duration for people.
pub(crate) fn readable_duration(duration: Duration) -> String {
    match duration.as_micros() {
        0..10_000 => format!("{:.1} ms", duration.as_secs_f64() * 1000.0),
        10_000..10_000_000 => format!("{} ms", duration.as_millis()),
        _ => format!("{} s", duration.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use proto::limits;

    use super::*;
    use crate::serve::upload;

    fn a_line() -> AccessLine {
        AccessLine::begin(
            AccessLog::Log,
            RequestId::from_random([1; 16]),
            "web".parse().unwrap(),
            &Method::POST,
            &Target::parse("/").unwrap(),
        )
    }

    #[test]
    fn of_a_body_that_streams_only_what_was_taken_counts() {
        let (_upload, _body, progress) = upload::new(limits::UNKNOWN_LENGTH, true);
        let mut line = a_line();
        line.request_upload(progress);
        assert_eq!(line.request_bytes(), 0, "its client may leave at any time");
    }

    #[test]
    fn the_status_is_what_the_visitor_got() {
        let mut line = a_line();
        assert_eq!(line.status(), 499);
        line.head(200);
        line.end(Ending::Failed(ErrorCode::UpstreamReset));
        assert_eq!(line.status(), 200, "and then it broke off");
        line.withdraw_head();
        assert_eq!(line.status(), 502);
    }

    #[test]
    fn numbers_are_short_for_people() {
        assert_eq!(readable_bytes(9_999), "9999 B");
        assert_eq!(readable_bytes(10_000), "10 KB");
        assert_eq!(readable_bytes(104_857_600), "104 MB");
        assert_eq!(readable_duration(Duration::from_micros(1_240)), "1.2 ms");
        assert_eq!(readable_duration(Duration::from_secs(75)), "75 s");
    }
}
