//! What a public client is told when its request was not answered by the upstream: a page for people, a problem
//! document for programs. Edge and agent say it in the same words.

use serde::Serialize;

use crate::{error::ErrorCode, id::RequestId};

/// The content type and the text for `code`.
#[must_use]
pub fn body(code: ErrorCode, request_id: &RequestId, html: bool) -> (&'static str, String) {
    if html {
        ("text/html; charset=utf-8", page(code, request_id))
    } else {
        ("application/problem+json", document(code, request_id))
    }
}

/// RFC 9457.
fn document(code: ErrorCode, request_id: &RequestId) -> String {
    #[derive(Serialize)]
    struct Problem<'a> {
        r#type: &'a str,
        title: &'a str,
        status: u16,
        detail: &'a str,
        code: &'a str,
        request_id: &'a str,
    }
    let status = code.status();
    let problem = Problem {
        r#type: "about:blank",
        title: status.canonical_reason().unwrap_or_default(),
        status: status.as_u16(),
        detail: code.sentence(),
        code: code.as_str(),
        request_id: request_id.as_str(),
    };
    let mut text = serde_json::to_string_pretty(&problem).expect("a problem has string keys");
    text.push('\n');
    text
}

fn page(code: ErrorCode, request_id: &RequestId) -> String {
    let status = code.status();
    let title = status.canonical_reason().unwrap_or_default();
    // Nothing of the request stands here: every part is a fixed text or a number of our own.
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\"><title>{number} {title}</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1.5rem}}\
         h1{{font-size:1.5rem}}code{{font-size:.9em}}p.id{{opacity:.7;font-size:.85rem}}</style></head>\
         <body><h1>{number} {title}</h1><p>{sentence}</p><p class=\"id\"><code>{code}</code> · request \
         <code>{request_id}</code></p></body></html>\n",
        number = status.as_u16(),
        sentence = code.sentence(),
    )
}
