//! Answers as the services write them.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use proto::calendar::rfc3339;
use serde::{Deserialize, Serialize};

use crate::{
    connections::ConnectionInfo,
    lambda::InvokeError,
    sqs::{SqsError, SqsErrorKind},
    states::{RunResult, outcome::Outcome},
};

/// What an answer is made of.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) body: Bytes,
}

pub(super) const JSON_1_0: &str = "application/x-amz-json-1.0";
pub(super) const JSON: &str = "application/json";
pub(super) const ERROR_TYPE: HeaderName = HeaderName::from_static("x-amzn-errortype");
pub(super) const QUERY_ERROR: HeaderName = HeaderName::from_static("x-amzn-query-error");

#[derive(Serialize)]
pub(super) struct ErrorBody<'a> {
    #[serde(rename = "__type")]
    name: &'a str,
    message: &'a str,
}

impl Answer {
    pub(super) fn json(body: impl Into<Bytes>) -> Self {
        Self { status: StatusCode::OK, content_type: JSON_1_0, headers: Vec::new(), body: body.into() }
    }

    /// An error of the JSON protocols.
    pub(super) fn error(status: StatusCode, name: &str, message: &str) -> Self {
        let body = serde_json::to_vec(&ErrorBody { name, message }).unwrap_or_default();
        let short = name.rsplit('#').next().unwrap_or(name);
        let headers = HeaderValue::from_str(short).map(|name| vec![(ERROR_TYPE, name)]);
        Self { status, content_type: JSON_1_0, headers: headers.unwrap_or_default(), body: body.into() }
    }

    pub(super) fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.extend(self.headers);
        response
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SyncExecution<'a> {
    execution_arn: &'a str,
    state_machine_arn: &'a str,
    name: &'a str,
    start_date: f64,
    stop_date: f64,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<String>,
    output_details: Details,
    input_details: Details,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<&'a str>,
    billing_details: Billing,
}

#[derive(Serialize)]
struct Details {
    included: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Billing {
    billed_duration_in_milliseconds: u64,
    billed_memory_used_in_m_b: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Connection<'a> {
    connected_at: String,
    last_active_at: String,
    identity: ConnectionIdentity<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionIdentity<'a> {
    source_ip: &'a str,
    user_agent: &'a str,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Configuration {
    #[serde(default)]
    pub(super) function_name: String,
    pub(super) environment: Environment,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Environment {
    pub(super) variables: BTreeMap<String, String>,
}

pub(super) fn configuration(name: &str, variables: BTreeMap<String, String>) -> Answer {
    let body = Configuration { function_name: name.to_owned(), environment: Environment { variables } };
    Answer { content_type: JSON, ..Answer::json(serde_json::to_vec(&body).unwrap_or_default()) }
}

/// What an invoker gets of a function that failed: the call itself has succeeded.
pub(super) fn function_error(error: &InvokeError) -> Answer {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Body<'a> {
        error_type: &'a str,
        error_message: &'a str,
    }
    let text = error.to_string();
    let body = match error {
        InvokeError::Function { error_type, message } => Body { error_type, error_message: message },
        _ => Body { error_type: "Runtime.ExitError", error_message: &text },
    };
    let kind = HeaderName::from_static("x-amz-function-error");
    let headers = vec![(kind, HeaderValue::from_static("Unhandled"))];
    let body = serde_json::to_vec(&body).unwrap_or_default();
    Answer { content_type: JSON, headers, ..Answer::json(body) }
}

pub(super) fn unknown_operation() -> Answer {
    Answer::error(StatusCode::BAD_REQUEST, "UnknownOperationException", "The operation does not run here.")
}

pub(super) fn rest_error(status: StatusCode, name: &'static str, message: &str) -> Answer {
    Answer { content_type: JSON, ..Answer::error(status, name, message) }
}

pub(super) fn sqs_error(error: &SqsError) -> Answer {
    let status = match error.kind {
        SqsErrorKind::OverLimit | SqsErrorKind::RequestThrottled => StatusCode::FORBIDDEN,
        _ => StatusCode::BAD_REQUEST,
    };
    let name = format!("com.amazonaws.sqs#{}", error.kind.name());
    let mut answer = Answer::error(status, &name, &error.message);
    if let Ok(query) = HeaderValue::from_str(&format!("{};Sender", error.kind.query_name())) {
        answer.headers.push((QUERY_ERROR, query));
    }
    answer
}

pub(super) fn connection(info: &ConnectionInfo) -> Answer {
    let body = Connection {
        connected_at: rfc3339(info.connected_at_ms),
        last_active_at: rfc3339(info.last_active_at_ms),
        identity: ConnectionIdentity {
            source_ip: &info.identity.source_ip,
            user_agent: &info.identity.user_agent,
        },
    };
    Answer { content_type: JSON, ..Answer::json(serde_json::to_vec(&body).unwrap_or_default()) }
}

pub(super) fn sync_execution(machine_arn: &str, result: &RunResult) -> Answer {
    let (status, output, failure) = match &result.outcome {
        Outcome::Succeeded(output) => ("SUCCEEDED", Some(output.to_string()), None),
        Outcome::Failed(error) => ("FAILED", None, Some(error)),
        Outcome::TimedOut(error) => ("TIMED_OUT", None, Some(error)),
    };
    let elapsed_ms = ((result.stop_date - result.start_date) * 1000.0).max(0.0);
    // Billed in steps of 100 ms, and at least one.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "five minutes at most")]
    let steps = (elapsed_ms / 100.0).ceil().max(1.0) as u64;
    let body = SyncExecution {
        execution_arn: &result.execution_arn,
        state_machine_arn: machine_arn,
        name: &result.name,
        start_date: result.start_date,
        stop_date: result.stop_date,
        status,
        output,
        output_details: Details { included: true },
        input_details: Details { included: false },
        error: failure.map(|failure| &*failure.error),
        cause: failure.map(|failure| &*failure.cause),
        billing_details: Billing {
            billed_duration_in_milliseconds: steps * 100,
            billed_memory_used_in_m_b: 64,
        },
    };
    match serde_json::to_vec(&body) {
        Ok(body) => Answer::json(body),
        Err(error) => Answer::error(StatusCode::INTERNAL_SERVER_ERROR, "InternalFailure", &error.to_string()),
    }
}
