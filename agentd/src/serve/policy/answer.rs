//! What the agent answers itself, in place of the upstream.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};
use proto::{error::ErrorCode, header::Headers, id::RequestId, problem};

use crate::{report::denial::DeniedBy, serve::policy::body::LocalBody};

/// A whole answer that is no upstream's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Why the request was refused, where it was.
    pub(crate) code: Option<ErrorCode>,
    /// The rule that refused it.
    pub(crate) denied_by: Option<DeniedBy>,
    pub(crate) status: StatusCode,
    /// Besides those that every answer has.
    pub(crate) fields: Vec<(HeaderName, HeaderValue)>,
    content: Content,
}

/// What an answer has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// The problem, where there is one.
    Problem,
    /// A page of one sentence, and of a button that posts to its own address.
    Sentence(&'static str, Option<&'static str>),
    /// A page of the tunnel's own, for browsers.
    Page(Bytes),
    /// All of the head, and a body.
    Whole(Headers, LocalBody),
}

impl Answer {
    /// A refusal.
    pub(crate) const fn refusal(code: ErrorCode) -> Self {
        Self {
            code: Some(code),
            denied_by: DeniedBy::of(code),
            status: code.status(),
            fields: Vec::new(),
            content: Content::Problem,
        }
    }

    /// By a rule that is not told by the code.
    pub(crate) const fn by(mut self, rule: DeniedBy) -> Self {
        self.denied_by = Some(rule);
        self
    }

    /// A status and nothing else.
    pub(crate) const fn empty(status: StatusCode) -> Self {
        Self { code: None, denied_by: None, status, fields: Vec::new(), content: Content::Problem }
    }

    /// Exactly this.
    pub(crate) const fn whole(status: StatusCode, headers: Headers, body: LocalBody) -> Self {
        Self {
            code: None,
            denied_by: None,
            status,
            fields: Vec::new(),
            content: Content::Whole(headers, body),
        }
    }

    /// With a page for browsers, in place of the problem's.
    pub(crate) fn with_page(mut self, page: &str) -> Self {
        self.content = Content::Page(Bytes::copy_from_slice(page.as_bytes()));
        self
    }

    /// Changes the fields that it has besides those that every answer has.
    pub(crate) fn edit(&mut self, edit: impl FnOnce(&mut Headers)) {
        if let Content::Whole(headers, _) = &mut self.content {
            edit(headers);
        } else {
            let mut headers: Headers = std::mem::take(&mut self.fields).into_iter().collect();
            edit(&mut headers);
            self.fields = headers.into_iter().collect();
        }
    }

    /// Leads elsewhere, with GET.
    pub(crate) fn redirect(location: &str) -> Self {
        match HeaderValue::try_from(location) {
            Ok(location) => Self {
                code: None,
                denied_by: None,
                status: StatusCode::SEE_OTHER,
                fields: vec![(header::LOCATION, location)],
                content: Content::Problem,
            },
            Err(_) => Self::refusal(ErrorCode::BadRequest),
        }
    }

    /// A page of one fixed sentence.
    pub(crate) const fn page(sentence: &'static str) -> Self {
        Self {
            code: None,
            denied_by: None,
            status: StatusCode::OK,
            fields: Vec::new(),
            content: Content::Sentence(sentence, None),
        }
    }

    /// A page that does nothing before its button is pressed, and that no other page can have in a frame.
    pub(crate) fn question(sentence: &'static str, button: &'static str) -> Self {
        let alone = HeaderValue::from_static("frame-ancestors 'none'");
        let page = Self { content: Content::Sentence(sentence, Some(button)), ..Self::page(sentence) };
        page.with(header::CONTENT_SECURITY_POLICY, Some(alone))
    }

    /// With one more field, if it can be said.
    pub(crate) fn with(mut self, name: HeaderName, value: Option<HeaderValue>) -> Self {
        self.fields.extend(value.map(|value| (name, value)));
        self
    }

    /// Head and body.
    pub(crate) fn into_parts(self, request_id: &RequestId, html: bool) -> (u16, Headers, LocalBody) {
        const HTML: Option<&str> = Some("text/html; charset=utf-8");
        let (kind, body) = match (self.content, self.code) {
            (Content::Whole(mut headers, body), _) => {
                for (name, value) in self.fields {
                    headers.push(name, value);
                }
                return (self.status.as_u16(), headers, body);
            }
            (Content::Page(page), _) if html => (HTML, page),
            (Content::Problem | Content::Page(_), Some(code)) => {
                let (kind, body) = problem::body(code, request_id, html);
                (Some(kind), body.into())
            }
            (Content::Sentence(sentence, button), _) => (
                HTML,
                format!(
                    "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
                     content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\"><title>{sentence}\
                     </title></head><body><p>{sentence}</p>{}</body></html>\n",
                    button
                        .map(|button| format!("<form method=\"post\"><button>{button}</button></form>"))
                        .unwrap_or_default()
                )
                .into(),
            ),
            (Content::Problem | Content::Page(_), None) => (None, Bytes::new()),
        };
        let mut headers = Headers::new();
        if let Some(kind) = kind {
            headers.push(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        if self.status != StatusCode::NO_CONTENT {
            headers.push(header::CONTENT_LENGTH, body.len().into());
        }
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
