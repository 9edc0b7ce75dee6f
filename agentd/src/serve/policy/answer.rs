//! What the agent answers itself, in place of the upstream.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};
use proto::{error::ErrorCode, header::Headers, id::RequestId, problem};

/// A whole answer that is no upstream's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Why the request was refused, where it was.
    pub(crate) code: Option<ErrorCode>,
    pub(crate) status: StatusCode,
    /// Besides those that every answer has.
    pub(crate) fields: Vec<(HeaderName, HeaderValue)>,
    /// A page, where it is no problem's.
    page: Option<&'static str>,
}

impl Answer {
    /// A refusal.
    pub(crate) const fn refusal(code: ErrorCode) -> Self {
        Self { code: Some(code), status: code.status(), fields: Vec::new(), page: None }
    }

    /// Leads elsewhere, with GET.
    pub(crate) fn redirect(location: &str) -> Self {
        match HeaderValue::try_from(location) {
            Ok(location) => Self {
                code: None,
                status: StatusCode::SEE_OTHER,
                fields: vec![(header::LOCATION, location)],
                page: None,
            },
            Err(_) => Self::refusal(ErrorCode::BadRequest),
        }
    }

    /// A page of one fixed sentence.
    pub(crate) const fn page(sentence: &'static str) -> Self {
        Self { code: None, status: StatusCode::OK, fields: Vec::new(), page: Some(sentence) }
    }

    /// With one more field, if it can be said.
    pub(crate) fn with(mut self, name: HeaderName, value: Option<HeaderValue>) -> Self {
        self.fields.extend(value.map(|value| (name, value)));
        self
    }

    /// Head and body.
    pub(crate) fn into_parts(self, request_id: &RequestId, html: bool) -> (u16, Headers, Bytes) {
        let (kind, body) = match (self.code, self.page) {
            (Some(code), _) => {
                let (kind, body) = problem::body(code, request_id, html);
                (Some(kind), body)
            }
            (None, Some(sentence)) => (
                Some("text/html; charset=utf-8"),
                format!(
                    "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
                     content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\"><title>{sentence}\
                     </title></head><body><p>{sentence}</p></body></html>\n"
                ),
            ),
            (None, None) => (None, String::new()),
        };
        let mut headers = Headers::new();
        if let Some(kind) = kind {
            headers.push(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        headers.push(header::CONTENT_LENGTH, body.len().into());
        headers.push(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(code) = self.code {
            headers.push(proto::forwarded::ERROR, HeaderValue::from_static(code.as_str()));
        }
        for (name, value) in self.fields {
            headers.push(name, value);
        }
        (self.status.as_u16(), headers, body.into())
    }
}
