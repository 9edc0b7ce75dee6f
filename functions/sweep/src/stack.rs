//! CloudFormation's custom resource: its event, and the answer that it waits for.

use std::time::Duration;

use bytes::Bytes;
use edge::{
    Error,
    connections::{Bounds, Connections},
};
use http::{Uri, uri::Scheme};
use http_body_util::Full;
use serde::{Deserialize, Serialize};

use crate::Report;

/// How long handing over the answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The most bytes of what is said to the answer: an error of S3.
const ANSWER_BYTES: usize = 64 * 1024;

/// What CloudFormation does with the resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Request {
    /// The stack is being made.
    Create,
    /// The resource's properties have changed.
    Update,
    /// The stack is being deleted.
    Delete,
}

/// An event of CloudFormation.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Event {
    /// What is done.
    #[serde(rename = "RequestType")]
    pub request: Request,
    /// Where the answer goes. Whoever has it can answer, so it is never logged.
    #[serde(rename = "ResponseURL")]
    response_url: String,
    stack_id: String,
    request_id: String,
    logical_resource_id: String,
    #[serde(default)]
    physical_resource_id: Option<String>,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("request", &self.request).finish_non_exhaustive()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Answer<'a> {
    status: &'static str,
    reason: String,
    physical_resource_id: &'a str,
    stack_id: &'a str,
    request_id: &'a str,
    logical_resource_id: &'a str,
}

/// Tells CloudFormation how it went.
///
/// # Errors
///
/// When it cannot be told; it waits for an hour then and gives up by itself.
pub(crate) async fn answer(event: &Event, done: &Result<Report, Error>) -> Result<(), Error> {
    let failed = |text: String| Error::Failed { call: "answer to CloudFormation", source: text.into() };
    let body = serde_json::to_vec(&answer_to(event, done)).map_err(|error| failed(error.to_string()))?;
    // No error quotes the URL: that would give its signature away.
    let url: Uri = event.response_url.parse().map_err(|_| failed("its URL is none".to_owned()))?;
    let connections = Connections::new(url.scheme() == Some(&Scheme::HTTP));
    let request = http::Request::put(url).body(Full::<Bytes>::from(body));
    let request = request.map_err(|error| failed(error.to_string()))?;
    let bounds = Bounds { connect: None, answer: Some(TIMEOUT), bytes: ANSWER_BYTES };
    let sent = connections.send(request, bounds).await;
    let status = sent.map_err(|error| failed(error.to_string()))?.status();
    if status.is_success() { Ok(()) } else { Err(failed(format!("it was answered with {status}"))) }
}

fn answer_to<'a>(event: &'a Event, done: &Result<Report, Error>) -> Answer<'a> {
    Answer {
        status: if done.is_ok() { "SUCCESS" } else { "FAILED" },
        reason: match done {
            Ok(report) => format!("{} mailboxes made, {} deleted", report.made, report.deleted),
            Err(error) => error.to_string(),
        },
        // There is one pool, whatever its properties: an update never replaces it.
        physical_resource_id: event.physical_resource_id.as_deref().unwrap_or("mailboxes"),
        stack_id: &event.stack_id,
        request_id: &event.request_id,
        logical_resource_id: &event.logical_resource_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(physical: Option<&str>) -> Event {
        Event {
            request: Request::Create,
            response_url: "https://secret.example/?signature=s3cret".into(),
            stack_id: "s".into(),
            request_id: "r".into(),
            logical_resource_id: "l".into(),
            physical_resource_id: physical.map(str::to_owned),
        }
    }

    #[test]
    fn the_answer_says_how_it_went() {
        let answer =
            serde_json::to_string(&answer_to(&event(None), &Ok(Report { made: 3, ..Report::default() })));
        assert_eq!(
            answer.unwrap(),
            r#"{"Status":"SUCCESS","Reason":"3 mailboxes made, 0 deleted","PhysicalResourceId":"mailboxes","StackId":"s","RequestId":"r","LogicalResourceId":"l"}"#
        );
        let failed = answer_to(&event(Some("own")), &Err(Error::Throttled { call: "Query" })).status;
        assert_eq!(failed, "FAILED");
        assert_eq!(answer_to(&event(Some("own")), &Ok(Report::default())).physical_resource_id, "own");
    }

    #[test]
    fn the_url_is_not_shown() {
        assert!(!format!("{:?}", event(None)).contains("s3cret"));
    }
}
