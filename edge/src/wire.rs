//! The calls that carry public requests as they are on the wire: what is asked as JSON, and what is read of the answer.
//! Enters: the input of a call, the body of an answer. Leaves: the body of a request, and the output. Pure.
//!
//! The SDK's own writes and reads text byte by byte, which for a body is most of its way, and keeps all that an answer says:
//! the input of a run, which comes back with its output, was read twice. What is written here is held against what a client of the SDK asks (`aws`, tests).

use std::sync::Arc;

use proto::message::notice;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

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
    /// As a string in JSON: it came as one.
    pub(crate) message_body: Box<RawValue>,
    pub(crate) message_attributes: Attributes,
}

/// Who a message is for, which connection it came over, and whose that is.
#[derive(Debug, Clone)]
pub(crate) struct Attributes {
    pub(crate) request_id: String,
    pub(crate) connection_id: String,
    pub(crate) owner: Option<String>,
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
        let every = [
            (notice::REQUEST_ID, text(&self.request_id)),
            (notice::CONNECTION_ID, text(&self.connection_id)),
        ];
        let owner = self.owner.as_deref().map(|owner| (notice::OWNER, text(owner)));
        serializer.collect_map(every.into_iter().chain(owner))
    }
}

/// What is known of a message that was sent: that it was.
#[derive(Debug, Deserialize)]
pub(crate) struct Sent {}

pub(crate) const SEND_MESSAGE: Form<Message, Sent> = Form {
    target: "AmazonSQS.SendMessage",
    fields: &[("x-amzn-query-mode", "true")],
    write: |message| written(message, message.message_body.get().len() + 512),
    read: |text| serde_json::from_str(text),
};

/// The input of `ReceiveMessage`: what is asked of a mailbox.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Receive {
    pub(crate) queue_url: String,
    pub(crate) message_system_attribute_names: [&'static str; 1],
    pub(crate) message_attribute_names: [&'static str; 1],
    pub(crate) max_number_of_messages: u32,
    /// In seconds.
    pub(crate) visibility_timeout: u32,
    /// In seconds.
    pub(crate) wait_time_seconds: u32,
}

/// One message out of a mailbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// To delete it with.
    pub receipt: String,
    /// The request it is for.
    pub request_id: Option<String>,
    /// The agent connection it came over.
    pub connection_id: Option<String>,
    /// The mark of that connection's owner.
    pub owner: Option<String>,
    /// The agent connection whose end it reports.
    pub lost_connection: Option<String>,
    /// When it was put into the mailbox, in milliseconds since 1970.
    pub sent_ms: Option<u64>,
    /// What it says.
    pub body: String,
}

/// What was in a mailbox.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Received {
    #[serde(default)]
    pub(crate) messages: Option<Vec<Letter>>,
}

impl<'de> Deserialize<'de> for Letter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Own {
            #[serde(default)]
            receipt_handle: String,
            #[serde(default)]
            body: String,
            #[serde(default)]
            attributes: System,
            #[serde(default)]
            message_attributes: Told,
        }
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct System {
            sent_timestamp: Option<String>,
        }
        /// Named as in [`notice`].
        #[derive(Default, Deserialize)]
        struct Told {
            request_id: Option<Text>,
            connection_id: Option<Text>,
            owner: Option<Text>,
            lost_connection: Option<Text>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Text {
            string_value: Option<String>,
        }
        let Own { receipt_handle, body, attributes, message_attributes } = Own::deserialize(deserializer)?;
        let text = |value: Option<Text>| value.and_then(|value| value.string_value);
        Ok(Self {
            receipt: receipt_handle,
            request_id: text(message_attributes.request_id),
            connection_id: text(message_attributes.connection_id),
            owner: text(message_attributes.owner),
            lost_connection: text(message_attributes.lost_connection),
            sent_ms: attributes.sent_timestamp.and_then(|sent| sent.parse().ok()),
            body,
        })
    }
}

pub(crate) const RECEIVE_MESSAGE: Form<Receive, Received> = Form {
    target: "AmazonSQS.ReceiveMessage",
    fields: &[("x-amzn-query-mode", "true")],
    write: |receive| written(receive, 384),
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

    #[test]
    fn letters_are_read_with_what_their_senders_said() {
        let received = |text| (RECEIVE_MESSAGE.read)(text).unwrap().messages.unwrap_or_default();
        for nothing in ["{}", r#"{"Messages":null}"#, r#"{"Messages":[]}"#] {
            assert!(received(nothing).is_empty(), "{nothing}");
        }
        let letters = received(
            r#"{"Messages":[{"MessageId":"m","ReceiptHandle":"h","MD5OfBody":"x","Body":"{\"a\":\"\u00e9\"}",
            "Attributes":{"SentTimestamp":"1790000000123","SenderId":"s"},"MD5OfMessageAttributes":"y",
            "MessageAttributes":{"request_id":{"StringValue":"r","DataType":"String"},
            "connection_id":{"DataType":"String","StringValue":"c="},
            "owner":{"DataType":"String","StringValue":"0a"},"other":{"BinaryValue":"AA==","DataType":"Binary"}}},
            {"Body":"{}","ReceiptHandle":"g","MessageAttributes":{"lost_connection":{"StringValue":"d="}}}]}"#,
        );
        let whole = Letter {
            receipt: "h".into(),
            request_id: Some("r".into()),
            connection_id: Some("c=".into()),
            owner: Some("0a".into()),
            lost_connection: None,
            sent_ms: Some(1_790_000_000_123),
            body: "{\"a\":\"\u{e9}\"}".into(),
        };
        let lost = Letter {
            receipt: "g".into(),
            request_id: None,
            connection_id: None,
            owner: None,
            lost_connection: Some("d=".into()),
            sent_ms: None,
            body: "{}".into(),
        };
        assert_eq!(letters, [whole, lost]);
        (RECEIVE_MESSAGE.read)("<html>").unwrap_err();
    }
}
