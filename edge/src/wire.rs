//! The two calls of every public request as they are on the wire: what is asked as JSON, and what is read of the answer.
//! Enters: the input of a call, the body of an answer. Leaves: the body of a request, and the output. Pure.
//!
//! The SDK's own writes and reads text byte by byte, and keeps all that an answer says: the input of a run, which comes back
//! with its output, was read twice. What is written here is held against what a client of the SDK asks (`aws`, tests).

use std::sync::Arc;

use proto::message::notice;
use serde::{Deserialize, Serialize};

/// How an operation's calls look, whose input is `I` and whose output is `O`.
#[derive(Debug)]
pub(crate) struct Form<I, O> {
    /// The operation's name in `x-amz-target`, its service's before it.
    pub(crate) target: &'static str,
    /// What else stands in a request's head.
    pub(crate) fields: &'static [(&'static str, &'static str)],
    pub(crate) write: fn(&I) -> serde_json::Result<Vec<u8>>,
    pub(crate) read: fn(&str) -> serde_json::Result<O>,
}

/// The input of `SendMessage`: an agent's message for whoever waits at a mailbox.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Message {
    pub(crate) queue_url: String,
    pub(crate) message_body: String,
    pub(crate) message_attributes: Attributes,
}

/// Who a message is for, and which connection it came over.
#[derive(Debug, Clone)]
pub(crate) struct Attributes {
    pub(crate) request_id: String,
    pub(crate) connection_id: String,
}

impl Serialize for Attributes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Attribute<'a> {
            string_value: &'a str,
            data_type: &'static str,
        }
        let text = |string_value| Attribute { string_value, data_type: "String" };
        serializer.collect_map([
            (notice::REQUEST_ID, text(&self.request_id)),
            (notice::CONNECTION_ID, text(&self.connection_id)),
        ])
    }
}

/// What is known of a message that was sent: that it was.
#[derive(Debug, Deserialize)]
pub(crate) struct Sent {}

pub(crate) const SEND_MESSAGE: Form<Message, Sent> = Form {
    target: "AmazonSQS.SendMessage",
    fields: &[("x-amzn-query-mode", "true")],
    write: |message| {
        let text = message.message_body.len();
        // Agents' messages are JSON with a body in base64: what is escaped in them are the quotes of their head.
        written(message, text + text / 64 + 512)
    },
    read: |text| serde_json::from_str(text),
};

/// The input of `StartSyncExecution`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Start {
    pub(crate) state_machine_arn: Arc<str>,
    pub(crate) name: String,
    pub(crate) input: String,
}

/// How a run ended.
#[derive(Debug, Deserialize)]
pub(crate) struct Ended {
    /// `SUCCEEDED`, `FAILED` or `TIMED_OUT`.
    pub(crate) status: String,
    /// Where it succeeded.
    #[serde(default)]
    pub(crate) output: Option<String>,
    /// The name of what it failed with.
    #[serde(default)]
    pub(crate) error: Option<String>,
    /// The same in words.
    #[serde(default)]
    pub(crate) cause: Option<String>,
}

pub(crate) const START_SYNC_EXECUTION: Form<Start, Ended> = Form {
    target: "AWSStepFunctions.StartSyncExecution",
    fields: &[],
    // Each quote of the input is escaped; there are many.
    write: |start| written(start, start.input.len() + start.input.len() / 4 + 256),
    read: |text| serde_json::from_str(text),
};

fn written(input: &impl Serialize, room: usize) -> serde_json::Result<Vec<u8>> {
    let mut body = Vec::with_capacity(room);
    serde_json::to_writer(&mut body, input)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_came_to_is_read_whatever_else_is_said() {
        let ended = |text| (START_SYNC_EXECUTION.read)(text);
        let whole = r#"{"billingDetails":{"billedMemoryUsedInMB":64},"executionArn":"a","input":"{\"x\":[1]}",
            "inputDetails":{"included":true},"name":"n","output":"{\"outcome\":\"\u00e9\"}","startDate":1.7E9,
            "status":"SUCCEEDED","stopDate":1.7E9,"traceHeader":"t"}"#;
        let whole = ended(whole).unwrap();
        assert_eq!(
            (&*whole.status, whole.output.as_deref()),
            ("SUCCEEDED", Some("{\"outcome\":\"\u{e9}\"}"))
        );
        let failed = ended(r#"{"status":"FAILED","error":"E","cause":"c","output":null}"#).unwrap();
        assert_eq!((failed.error.as_deref(), failed.cause.as_deref()), (Some("E"), Some("c")));
        for wrong in ["", "{}", "[]", r#"{"status":1}"#, r#"{"status":"FAILED"} x"#] {
            ended(wrong).unwrap_err();
        }
        (SEND_MESSAGE.read)(r#"{"MessageId":"m","MD5OfMessageBody":"x"}"#).unwrap();
        (SEND_MESSAGE.read)("").unwrap_err();
    }
}
