//! SQS over HTTP, in its JSON protocol: enters an action's name and body, leaves status and body.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use proto::json::{push_field, push_string};
use serde::{Deserialize, Serialize};

use super::{
    Attribute, AttributeValue, BATCH, DeadLetters, Message, NewMessage, QueueAttributes, ReceiveRequest,
    Received, Sqs, SqsError, SqsErrorKind,
};

type Result<T> = std::result::Result<T, SqsError>;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateQueue<'a> {
    #[serde(borrow)]
    queue_name: Cow<'a, str>,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GetQueueUrl<'a> {
    #[serde(borrow)]
    queue_name: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListQueues<'a> {
    #[serde(borrow, default)]
    queue_name_prefix: Cow<'a, str>,
    #[serde(borrow)]
    next_token: Option<Cow<'a, str>>,
    max_results: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct OneQueue<'a> {
    #[serde(borrow)]
    queue_url: Cow<'a, str>,
    #[serde(default)]
    attribute_names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StartMessageMoveTask<'a> {
    #[serde(borrow)]
    source_arn: Cow<'a, str>,
    #[serde(borrow)]
    destination_arn: Option<Cow<'a, str>>,
    max_number_of_messages_per_second: Option<u32>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct MessageMoveTask {
    task_handle: String,
}

/// Calls with several entries.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Batch<'a, E> {
    #[serde(borrow)]
    queue_url: Cow<'a, str>,
    entries: Vec<E>,
}

/// A message to send: by itself with a queue, in a batch with an id.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SendMessage<'a> {
    #[serde(borrow, default)]
    queue_url: Cow<'a, str>,
    #[serde(borrow, default)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    message_body: Cow<'a, str>,
    #[serde(default)]
    message_attributes: BTreeMap<Box<str>, WireAttribute>,
    #[serde(default)]
    delay_seconds: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ReceiveMessage<'a> {
    #[serde(borrow)]
    queue_url: Cow<'a, str>,
    max_number_of_messages: Option<usize>,
    visibility_timeout: Option<u64>,
    wait_time_seconds: Option<u64>,
    #[serde(default)]
    message_attribute_names: Vec<String>,
    #[serde(default)]
    message_system_attribute_names: Vec<String>,
    #[serde(default)]
    attribute_names: Vec<String>,
}

/// A message to delete, or to hide for longer: by itself with a queue, in a batch with an id.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteMessage<'a> {
    #[serde(borrow, default)]
    queue_url: Cow<'a, str>,
    #[serde(borrow, default)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    receipt_handle: Cow<'a, str>,
    #[serde(default)]
    visibility_timeout: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireAttribute {
    data_type: Box<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    string_value: Option<Box<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    binary_value: Option<Box<str>>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct QueueUrl {
    queue_url: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct QueueUrls {
    queue_urls: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_token: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Attributes {
    attributes: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct BatchResult<T> {
    successful: Vec<T>,
    failed: Vec<BatchFailure>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct BatchFailure {
    id: String,
    code: &'static str,
    message: String,
    sender_fault: bool,
}

#[derive(Serialize)]
struct SentEntry {
    #[serde(rename = "Id")]
    id: String,
    #[serde(flatten)]
    sent: Sent,
}

#[derive(Serialize)]
struct Sent {
    #[serde(rename = "MessageId")]
    message_id: Box<str>,
    #[serde(rename = "MD5OfMessageBody")]
    body_md5: Box<str>,
    #[serde(rename = "MD5OfMessageAttributes", skip_serializing_if = "Option::is_none")]
    attributes_md5: Option<Box<str>>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DeletedEntry {
    id: String,
}

/// A message as it is received, but for its body.
#[derive(Serialize)]
struct WireMessage<'a> {
    #[serde(rename = "MessageId")]
    message_id: &'a str,
    #[serde(rename = "ReceiptHandle")]
    receipt_handle: &'a str,
    #[serde(rename = "MD5OfBody")]
    body_md5: &'a str,
    #[serde(rename = "Attributes", skip_serializing_if = "BTreeMap::is_empty")]
    attributes: BTreeMap<&'static str, String>,
    #[serde(rename = "MD5OfMessageAttributes", skip_serializing_if = "Option::is_none")]
    attributes_md5: Option<Box<str>>,
    #[serde(rename = "MessageAttributes", skip_serializing_if = "BTreeMap::is_empty")]
    message_attributes: BTreeMap<&'a str, WireAttribute>,
}

#[derive(Serialize)]
struct Nothing {}

impl Sqs {
    /// Handles one action of the JSON protocol.
    ///
    /// # Errors
    ///
    /// The service's error, for the caller to put into an answer.
    ///
    /// # Cancel safety
    ///
    /// As [`Sqs::receive`]: a call that is dropped while it waits took no message.
    pub async fn handle(&self, action: &str, body: &[u8]) -> Result<Vec<u8>> {
        match action {
            "ReceiveMessage" => {
                let call: ReceiveMessage<'_> = read(body)?;
                let request = ReceiveRequest {
                    max: call.max_number_of_messages.unwrap_or(1),
                    wait: call.wait_time_seconds.map(Duration::from_secs),
                    visibility: call.visibility_timeout.map(Duration::from_secs),
                };
                let received = self.receive(&call.queue_url, request).await?;
                write_messages(&received, &call)
            }
            "SendMessage" => {
                let call: SendMessage<'_> = read(body)?;
                let new = new_message(call.message_body, &call.message_attributes, call.delay_seconds)?;
                write(&sent(&*self.send(&call.queue_url, new)?))
            }
            "SendMessageBatch" => self.send_batch(read(body)?),
            "DeleteMessage" => {
                let call: DeleteMessage<'_> = read(body)?;
                self.delete(&call.queue_url, &call.receipt_handle)?;
                write(&Nothing {})
            }
            "DeleteMessageBatch" => self.delete_batch(&read(body)?),
            "ChangeMessageVisibility" => {
                let call: DeleteMessage<'_> = read(body)?;
                let visibility = Duration::from_secs(call.visibility_timeout);
                self.change_visibility(&call.queue_url, &call.receipt_handle, visibility)?;
                write(&Nothing {})
            }
            "CreateQueue" => {
                let call: CreateQueue<'_> = read(body)?;
                let queue_url = self.create(&call.queue_name, queue_attributes(&call.attributes)?)?;
                write(&QueueUrl { queue_url })
            }
            "DeleteQueue" => {
                let call: OneQueue<'_> = read(body)?;
                self.delete_queue(&call.queue_url)?;
                write(&Nothing {})
            }
            "PurgeQueue" => {
                let call: OneQueue<'_> = read(body)?;
                self.purge(&call.queue_url)?;
                write(&Nothing {})
            }
            "StartMessageMoveTask" => {
                let call: StartMessageMoveTask<'_> = read(body)?;
                // All are moved at once; the rate is only looked at (SQS API Reference: 1 to 500).
                if call.max_number_of_messages_per_second.is_some_and(|rate| !(1..=500).contains(&rate)) {
                    return Err(SqsError::new(
                        SqsErrorKind::InvalidParameterValue,
                        "Value for parameter MaxNumberOfMessagesPerSecond is invalid. Reason: Must be between 1 and 500.",
                    ));
                }
                let name = |arn: &str| arn.rsplit(':').next().unwrap_or_default().to_owned();
                let to = call.destination_arn.as_deref().map(name);
                self.move_dead_letters(&name(&call.source_arn), to.as_deref())?;
                let source = &call.source_arn;
                let task =
                    serde_json::json!({ "taskId": self.message_id(), "sourceArn": source }).to_string();
                write(&MessageMoveTask { task_handle: BASE64.encode(task) })
            }
            "GetQueueUrl" => {
                let call: GetQueueUrl<'_> = read(body)?;
                let queue_url = self.url(&call.queue_name);
                self.queue_of_any_age(&queue_url)?;
                write(&QueueUrl { queue_url })
            }
            "GetQueueAttributes" => {
                let call: OneQueue<'_> = read(body)?;
                self.queue_attributes(&call)
            }
            "ListQueues" => {
                let call: ListQueues<'_> = read(body)?;
                let max = call.max_results.unwrap_or(1000).clamp(1, 1000);
                let queue_urls = self.list(&call.queue_name_prefix, call.next_token.as_deref(), max)?;
                // Only a caller that asked for pages gets a token, as from the service.
                let next_token = (call.max_results.is_some() && queue_urls.len() == max)
                    .then(|| queue_urls.last().and_then(|url| url.rsplit('/').next()).map(str::to_owned))
                    .flatten();
                write(&QueueUrls { queue_urls, next_token })
            }
            other => Err(SqsError::new(
                SqsErrorKind::UnsupportedOperation,
                format!("the action {other} does not run here"),
            )),
        }
    }

    fn send_batch(&self, call: Batch<'_, SendMessage<'_>>) -> Result<Vec<u8>> {
        check_batch(call.entries.iter().map(|entry| &*entry.id))?;
        // The queue's own limit holds for the whole batch.
        let bytes: usize = call.entries.iter().map(|entry| entry.message_body.len()).sum();
        if bytes > proto::limits::MAILBOX_MESSAGE_BYTES {
            return Err(SqsError::new(
                SqsErrorKind::BatchRequestTooLong,
                "Batch requests cannot be longer than 1048576 bytes.",
            ));
        }
        self.queue(&call.queue_url)?;
        let mut result = BatchResult { successful: Vec::new(), failed: Vec::new() };
        for entry in call.entries {
            let id = entry.id.into_owned();
            let message = new_message(entry.message_body, &entry.message_attributes, entry.delay_seconds)
                .and_then(|new| self.send(&call.queue_url, new));
            match message {
                Ok(message) => result.successful.push(SentEntry { id, sent: sent(&message) }),
                Err(error) => result.failed.push(failure(id, error)),
            }
        }
        write(&result)
    }

    fn delete_batch(&self, call: &Batch<'_, DeleteMessage<'_>>) -> Result<Vec<u8>> {
        check_batch(call.entries.iter().map(|entry| &*entry.id))?;
        self.queue(&call.queue_url)?;
        let mut result = BatchResult { successful: Vec::new(), failed: Vec::new() };
        for entry in &call.entries {
            let id = entry.id.clone().into_owned();
            match self.delete(&call.queue_url, &entry.receipt_handle) {
                Ok(()) => result.successful.push(DeletedEntry { id }),
                Err(error) => result.failed.push(failure(id, error)),
            }
        }
        write(&result)
    }

    fn queue_attributes(&self, call: &OneQueue<'_>) -> Result<Vec<u8>> {
        let queue = self.queue(&call.queue_url)?;
        let mut stock = queue.stock();
        stock.refresh(tokio::time::Instant::now());
        let seconds = |duration: Duration| duration.as_secs().to_string();
        let mut attributes = BTreeMap::from([
            ("ApproximateNumberOfMessages", stock.ready.len().to_string()),
            ("ApproximateNumberOfMessagesDelayed", "0".to_owned()),
            ("ApproximateNumberOfMessagesNotVisible", stock.hidden.len().to_string()),
            ("CreatedTimestamp", (queue.created_ms / 1000).to_string()),
            ("DelaySeconds", "0".to_owned()),
            ("MaximumMessageSize", queue.attributes.message_bytes.to_string()),
            ("MessageRetentionPeriod", seconds(queue.attributes.retention)),
            ("QueueArn", format!("arn:aws:sqs:local:000000000000:{}", queue.name)),
            ("ReceiveMessageWaitTimeSeconds", seconds(queue.attributes.wait)),
            ("VisibilityTimeout", seconds(queue.attributes.visibility)),
        ]);
        drop(stock);
        if let Some(unknown) =
            call.attribute_names.iter().find(|name| *name != "All" && !attributes.contains_key(&***name))
        {
            return Err(SqsError::new(
                SqsErrorKind::InvalidAttributeName,
                format!("Unknown Attribute {unknown}."),
            ));
        }
        if !call.attribute_names.iter().any(|name| name == "All") {
            attributes.retain(|name, _| call.attribute_names.iter().any(|wanted| wanted == name));
        }
        write(&Attributes { attributes })
    }
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T> {
    let not_json = || SqsError::new(SqsErrorKind::SerializationException, "the body is not JSON");
    // As a whole: of bytes each string would be looked at once more.
    let body = std::str::from_utf8(body).map_err(|_| not_json())?;
    serde_json::from_str(body).map_err(|error| {
        if error.is_data() {
            SqsError::new(SqsErrorKind::MissingParameter, error.to_string())
        } else {
            not_json()
        }
    })
}

fn write(answer: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(answer)
        .map_err(|error| SqsError::new(SqsErrorKind::SerializationException, error.to_string()))
}

fn new_message(
    body: Cow<'_, str>,
    attributes: &BTreeMap<Box<str>, WireAttribute>,
    delay_seconds: u64,
) -> Result<NewMessage> {
    Ok(NewMessage {
        body: body.into(),
        attributes: read_attributes(attributes)?,
        delay: Duration::from_secs(delay_seconds),
    })
}

fn read_attributes(wire: &BTreeMap<Box<str>, WireAttribute>) -> Result<BTreeMap<Box<str>, Attribute>> {
    let invalid = |name: &str| {
        SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            format!("The message attribute '{name}' must contain a non-empty value of its type."),
        )
    };
    wire.iter()
        .map(|(name, attribute)| {
            let value = match (&attribute.string_value, &attribute.binary_value) {
                (Some(text), None) => AttributeValue::Text(text.clone()),
                (None, Some(encoded)) => {
                    let bytes = BASE64.decode(&**encoded).map_err(|_| invalid(name))?;
                    AttributeValue::Binary(bytes.into())
                }
                _ => return Err(invalid(name)),
            };
            Ok((name.clone(), Attribute { data_type: attribute.data_type.clone(), value }))
        })
        .collect()
}

fn sent(message: &Message) -> Sent {
    Sent {
        message_id: message.id.clone(),
        body_md5: message.body_md5.clone(),
        attributes_md5: message.attributes_md5.clone(),
    }
}

fn failure(id: String, error: SqsError) -> BatchFailure {
    let sender_fault = error.kind != SqsErrorKind::RequestThrottled;
    BatchFailure { id, code: error.kind.name(), message: error.message, sender_fault }
}

/// Bodies are most of it, so they are no fields of a type that serde_json writes: it would look at each byte.
fn write_messages(received: &[Received], call: &ReceiveMessage<'_>) -> Result<Vec<u8>> {
    // The service leaves the key out where there is nothing.
    if received.is_empty() {
        return write(&Nothing {});
    }
    let bytes = received.iter().map(|received| received.message.body.len() + 1024).sum();
    let mut json = Vec::with_capacity(bytes);
    json.extend_from_slice(b"{\"Messages\":");
    for (index, received) in received.iter().enumerate() {
        json.push(if index == 0 { b'[' } else { b',' });
        json.append(&mut write(&wire_message(received, call))?);
        push_field(&mut json, "Body", |json| push_string(json, &received.message.body));
    }
    json.extend_from_slice(b"]}");
    Ok(json)
}

fn wire_message<'m>(received: &'m Received, call: &ReceiveMessage<'_>) -> WireMessage<'m> {
    let message = &*received.message;
    // The newer name and the older one.
    let system = [&call.message_system_attribute_names, &call.attribute_names];
    let attributes = system
        .into_iter()
        .flat_map(|names| received.system_attributes(names))
        .map(|(name, value)| (name, value.to_string()))
        .collect();
    let wanted: BTreeMap<Box<str>, Attribute> = message
        .attributes
        .iter()
        .filter(|(name, _)| is_wanted(name, &call.message_attribute_names))
        .map(|(name, attribute)| (name.clone(), attribute.clone()))
        .collect();
    WireMessage {
        message_id: &message.id,
        receipt_handle: &received.receipt,
        body_md5: &message.body_md5,
        attributes,
        attributes_md5: super::message::attributes_md5(&wanted),
        message_attributes: message
            .attributes
            .iter()
            .filter(|(name, _)| wanted.contains_key(*name))
            .map(|(name, attribute)| (&**name, wire_attribute(attribute)))
            .collect(),
    }
}

fn wire_attribute(attribute: &Attribute) -> WireAttribute {
    let (string_value, binary_value) = match &attribute.value {
        AttributeValue::Text(text) => (Some(text.clone()), None),
        AttributeValue::Binary(bytes) => (None, Some(BASE64.encode(bytes).into())),
    };
    WireAttribute { data_type: attribute.data_type.clone(), string_value, binary_value }
}

/// Whether a receive that names `wanted` gets the attribute `name`.
pub(crate) fn is_wanted(name: &str, wanted: &[String]) -> bool {
    wanted.iter().any(|wanted| {
        wanted == "All"
            || wanted == ".*"
            || wanted == name
            || wanted.strip_suffix(".*").is_some_and(|prefix| name.starts_with(prefix))
    })
}

fn check_batch<'a>(ids: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
    let count = ids.clone().count();
    if count == 0 {
        return Err(SqsError::new(
            SqsErrorKind::EmptyBatchRequest,
            "There should be at least one entry in the request.",
        ));
    }
    if count > BATCH {
        return Err(SqsError::new(
            SqsErrorKind::TooManyEntriesInBatchRequest,
            format!("Maximum number of entries per request are 10. You have sent {count}."),
        ));
    }
    let is_id = |id: &str| {
        !id.is_empty()
            && id.len() <= 80
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if !ids.clone().all(is_id) {
        return Err(SqsError::new(
            SqsErrorKind::InvalidBatchEntryId,
            "A batch entry id can only contain alphanumeric characters, hyphens and underscores. It can be at most 80 letters long.",
        ));
    }
    if ids.collect::<std::collections::BTreeSet<_>>().len() < count {
        return Err(SqsError::new(SqsErrorKind::BatchEntryIdsNotDistinct, "Two entries have the same Id."));
    }
    Ok(())
}

fn queue_attributes(wire: &BTreeMap<String, String>) -> Result<QueueAttributes> {
    let mut attributes = QueueAttributes::default();
    for (name, value) in wire {
        let number = |range: std::ops::RangeInclusive<u64>| {
            value.parse::<u64>().ok().filter(|number| range.contains(number)).ok_or_else(|| {
                SqsError::new(
                    SqsErrorKind::InvalidAttributeValue,
                    format!("Invalid value for the parameter {name}."),
                )
            })
        };
        match name.as_str() {
            "VisibilityTimeout" => attributes.visibility = Duration::from_secs(number(0..=43_200)?),
            "MessageRetentionPeriod" => attributes.retention = Duration::from_secs(number(60..=1_209_600)?),
            "ReceiveMessageWaitTimeSeconds" => attributes.wait = Duration::from_secs(number(0..=20)?),
            "MaximumMessageSize" => {
                attributes.message_bytes =
                    usize::try_from(number(1024..=1_048_576)?).unwrap_or(attributes.message_bytes);
            }
            "DelaySeconds" => drop(number(0..=0)?),
            "RedrivePolicy" => {
                let policy: Option<serde_json::Value> = serde_json::from_str(value).ok();
                let part = |name: &str| policy.as_ref()?.get(name).cloned();
                let queue = part("deadLetterTargetArn");
                let queue = queue.as_ref().and_then(|arn| arn.as_str()?.rsplit(':').next());
                // A number, or one as text.
                let count = part("maxReceiveCount").and_then(|count| {
                    count
                        .as_u64()
                        .or_else(|| count.as_str()?.parse().ok())
                        .filter(|count| (1..=1000).contains(count))
                });
                let (Some(queue), Some(count)) = (queue, count.and_then(|count| u32::try_from(count).ok()))
                else {
                    return Err(SqsError::new(
                        SqsErrorKind::InvalidParameterValue,
                        "Value for parameter RedrivePolicy is invalid.",
                    ));
                };
                attributes.dead_letters = Some(DeadLetters { queue: queue.into(), max_receives: count });
            }
            "SqsManagedSseEnabled" => {}
            _ => {
                return Err(SqsError::new(
                    SqsErrorKind::InvalidAttributeName,
                    format!("Unknown Attribute {name}."),
                ));
            }
        }
    }
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    async fn call(sqs: &Sqs, action: &str, body: Value) -> std::result::Result<Value, SqsErrorKind> {
        match sqs.handle(action, body.to_string().as_bytes()).await {
            Ok(answer) => Ok(serde_json::from_slice(&answer).unwrap()),
            Err(error) => Err(error.kind),
        }
    }

    async fn queue() -> (Sqs, String) {
        let sqs = Sqs::new("http://127.0.0.1:1", Arc::default());
        let created = json!({ "QueueName": "m", "Attributes": { "MessageRetentionPeriod": "60" } });
        let answer = call(&sqs, "CreateQueue", created).await.unwrap();
        tokio::time::advance(proto::limits::MAILBOX_WARM_UP).await;
        (sqs, answer["QueueUrl"].as_str().unwrap().to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_goes_through_with_its_attributes() {
        let (sqs, url) = queue().await;
        let sent = call(
            &sqs,
            "SendMessage",
            json!({
                "QueueUrl": url, "MessageBody": "{\"a\":\"\u{e9}\"}",
                "MessageAttributes": {
                    "request_id": { "DataType": "String", "StringValue": "r" },
                    "bytes": { "DataType": "Binary", "BinaryValue": "AAE=" },
                },
            }),
        )
        .await
        .unwrap();
        let received = call(
            &sqs,
            "ReceiveMessage",
            json!({ "QueueUrl": url, "MessageAttributeNames": ["All"], "MessageSystemAttributeNames": ["All"] }),
        )
        .await
        .unwrap();
        let message = &received["Messages"][0];
        assert_eq!(message["Body"], "{\"a\":\"\u{e9}\"}");
        assert_eq!(message["MessageId"], sent["MessageId"]);
        assert_eq!(message["MD5OfBody"], sent["MD5OfMessageBody"]);
        assert_eq!(message["MD5OfMessageAttributes"], sent["MD5OfMessageAttributes"]);
        assert_eq!(
            message["MessageAttributes"]["bytes"],
            json!({ "DataType": "Binary", "BinaryValue": "AAE=" })
        );
        assert_eq!(message["Attributes"]["ApproximateReceiveCount"], "1");
        // Nothing there: no key.
        assert_eq!(call(&sqs, "ReceiveMessage", json!({ "QueueUrl": url })).await, Ok(json!({})));
        let receipt = message["ReceiptHandle"].clone();
        let deleted = call(&sqs, "DeleteMessage", json!({ "QueueUrl": url, "ReceiptHandle": receipt })).await;
        assert_eq!(deleted, Ok(json!({})));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_has_an_outcome_for_each_entry() {
        let (sqs, url) = queue().await;
        let entry = |id: &str, body: &str| json!({ "Id": id, "MessageBody": body });
        let sent = call(
            &sqs,
            "SendMessageBatch",
            json!({ "QueueUrl": url, "Entries": [entry("0", "a"), entry("1", "\u{1}"), entry("2", "b")] }),
        )
        .await
        .unwrap();
        assert_eq!(sent["Successful"][1]["Id"], "2");
        assert_eq!(sent["Failed"][0]["Code"], "InvalidMessageContents");
        let received =
            call(&sqs, "ReceiveMessage", json!({ "QueueUrl": url, "MaxNumberOfMessages": 10 })).await;
        let received = received.unwrap();
        let entries: Vec<Value> = received["Messages"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
            .map(|(id, message)| json!({ "Id": id.to_string(), "ReceiptHandle": message["ReceiptHandle"] }))
            .collect();
        let deleted = call(&sqs, "DeleteMessageBatch", json!({ "QueueUrl": url, "Entries": entries })).await;
        assert_eq!(deleted.unwrap(), json!({ "Successful": [{ "Id": "0" }, { "Id": "1" }], "Failed": [] }));

        let many: Vec<Value> = (0..11).map(|id| entry(&id.to_string(), "a")).collect();
        for (entries, wanted) in [
            (many, SqsErrorKind::TooManyEntriesInBatchRequest),
            (vec![], SqsErrorKind::EmptyBatchRequest),
            (vec![entry("a", "x"), entry("a", "y")], SqsErrorKind::BatchEntryIdsNotDistinct),
            (vec![entry("a b", "x")], SqsErrorKind::InvalidBatchEntryId),
            (
                vec![entry("a", &"x".repeat(600_000)), entry("b", &"x".repeat(600_000))],
                SqsErrorKind::BatchRequestTooLong,
            ),
        ] {
            let result = call(&sqs, "SendMessageBatch", json!({ "QueueUrl": url, "Entries": entries })).await;
            assert_eq!(result, Err(wanted));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn queues_can_be_found_and_described() {
        let (sqs, url) = queue().await;
        assert_eq!(
            call(&sqs, "GetQueueUrl", json!({ "QueueName": "m" })).await,
            Ok(json!({ "QueueUrl": url }))
        );
        assert_eq!(
            call(&sqs, "GetQueueUrl", json!({ "QueueName": "x" })).await,
            Err(SqsErrorKind::QueueDoesNotExist)
        );
        let listed = call(&sqs, "ListQueues", json!({ "QueueNamePrefix": "m" })).await.unwrap();
        assert_eq!(listed, json!({ "QueueUrls": [url] }));
        let names = json!(["MessageRetentionPeriod", "ApproximateNumberOfMessages"]);
        let described =
            call(&sqs, "GetQueueAttributes", json!({ "QueueUrl": url, "AttributeNames": names })).await;
        assert_eq!(
            described.unwrap()["Attributes"],
            json!({ "ApproximateNumberOfMessages": "0", "MessageRetentionPeriod": "60" })
        );
        call(&sqs, "SendMessage", json!({ "QueueUrl": url, "MessageBody": "a" })).await.unwrap();
        call(&sqs, "PurgeQueue", json!({ "QueueUrl": url })).await.unwrap();
        assert_eq!(call(&sqs, "ReceiveMessage", json!({ "QueueUrl": url })).await, Ok(json!({})));
        assert_eq!(
            call(&sqs, "CreateQueue", json!({ "QueueName": "n", "Attributes": { "FifoQueue": "true" } }))
                .await,
            Err(SqsErrorKind::InvalidAttributeName)
        );
        assert_eq!(
            call(
                &sqs,
                "CreateQueue",
                json!({ "QueueName": "n", "Attributes": { "MessageRetentionPeriod": "59" } })
            )
            .await,
            Err(SqsErrorKind::InvalidAttributeValue)
        );
        assert_eq!(call(&sqs, "TagQueue", json!({})).await, Err(SqsErrorKind::UnsupportedOperation));
        assert_eq!(call(&sqs, "SendMessage", json!({})).await, Err(SqsErrorKind::MissingParameter));
    }
}
