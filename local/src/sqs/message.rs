//! Messages, and what the service makes of one before it takes it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use md5::{Digest as _, Md5};
use serde::{Deserialize, Serialize};

use super::error::{Result, SqsError, SqsErrorKind};

/// The most attributes of one message (SQS: 10).
const ATTRIBUTES: usize = 10;

/// One attribute of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    /// `String`, `Number` or `Binary`, perhaps with a label after a dot.
    pub data_type: Box<str>,
    /// Its value.
    pub value: AttributeValue,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttributeValue {
    /// Text, also of a number.
    Text(Box<str>),
    /// Bytes.
    Binary(Box<[u8]>),
}

impl Attribute {
    /// An attribute of type `String`.
    #[must_use]
    pub fn text(value: &str) -> Self {
        Self { data_type: "String".into(), value: AttributeValue::Text(value.into()) }
    }

    /// The value, where it is text.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            AttributeValue::Text(text) => Some(text),
            AttributeValue::Binary(_) => None,
        }
    }
}

/// A message to be sent.
#[derive(Debug, Clone, Default)]
pub struct NewMessage {
    /// The body.
    pub body: Box<str>,
    /// The attributes, by name.
    pub attributes: BTreeMap<Box<str>, Attribute>,
    /// For how long nobody receives it.
    pub delay: Duration,
}

/// A message as it was sent.
#[derive(Debug, Clone)]
pub struct Message {
    /// The id that the sender was told.
    pub id: Box<str>,
    /// The body.
    pub body: Box<str>,
    /// The body's MD5, in hexadecimal digits.
    pub body_md5: Box<str>,
    /// The attributes, by name.
    pub attributes: BTreeMap<Box<str>, Attribute>,
    /// The attributes' MD5; nothing where there are none.
    pub attributes_md5: Option<Box<str>>,
    /// When it was sent, in epoch milliseconds.
    pub sent_ms: u64,
    /// The queue that it was moved from as a dead letter; nothing where it was sent to the queue that it is in.
    pub dead_letter_of: Option<Box<str>>,
}

impl Message {
    pub(super) fn new(
        id: Box<str>,
        body: Box<str>,
        attributes: BTreeMap<Box<str>, Attribute>,
        sent_ms: u64,
    ) -> Self {
        Self {
            id,
            body_md5: hex(&Md5::digest(body.as_bytes())),
            attributes_md5: attributes_md5(&attributes),
            body,
            attributes,
            sent_ms,
            dead_letter_of: None,
        }
    }

    /// The same message, once it has become a dead letter of `queue`.
    pub(super) fn into_dead_letter(message: Arc<Self>, queue: &str) -> Self {
        let dead_letter_of = Some(queue.into());
        match Arc::try_unwrap(message) {
            Ok(message) => Self { dead_letter_of, ..message },
            // Whoever has received it looks at it still.
            Err(message) => Self { dead_letter_of, ..(*message).clone() },
        }
    }
}

/// A message as it was received.
#[derive(Debug, Clone)]
pub struct Received {
    /// The message.
    pub message: Arc<Message>,
    /// What deletes it.
    pub receipt: Box<str>,
    /// How often it was received, this time included.
    pub receives: u32,
    /// When it was first received, in epoch milliseconds.
    pub first_received_ms: u64,
}

impl Received {
    /// What the service itself says about the message, as far as a receive that names `wanted` is told.
    pub(crate) fn system_attributes(&self, wanted: &[String]) -> Vec<(&'static str, u64)> {
        let mut attributes = vec![
            ("ApproximateFirstReceiveTimestamp", self.first_received_ms),
            ("ApproximateReceiveCount", self.receives.into()),
            ("SentTimestamp", self.message.sent_ms),
        ];
        attributes.retain(|(name, _)| wanted.iter().any(|wanted| wanted == "All" || wanted == name));
        attributes
    }
}

pub(super) fn check_message(
    body: &str,
    attributes: &BTreeMap<Box<str>, Attribute>,
    limit: usize,
) -> Result<()> {
    if body.is_empty() {
        return Err(SqsError::new(
            SqsErrorKind::MissingParameter,
            "The request must contain the parameter MessageBody.",
        ));
    }
    if attributes.len() > ATTRIBUTES {
        return Err(SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            "Number of message attributes exceeds the allowed maximum 10.",
        ));
    }
    let mut bytes = body.len();
    let mut carried = is_carried(body);
    for (name, attribute) in attributes {
        let is_name = !name.is_empty()
            && name.len() <= 256
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        let base = attribute.data_type.split('.').next().unwrap_or_default();
        let (value_bytes, fits) = match &attribute.value {
            AttributeValue::Text(text) => {
                carried &= is_carried(text);
                (text.len(), base == "String" || base == "Number")
            }
            AttributeValue::Binary(bytes) => (bytes.len(), base == "Binary"),
        };
        if !is_name || !fits || value_bytes == 0 {
            return Err(SqsError::new(
                SqsErrorKind::InvalidParameterValue,
                format!("The message attribute '{name}' has an invalid name, type or value."),
            ));
        }
        bytes += name.len() + attribute.data_type.len() + value_bytes;
    }
    if bytes > limit {
        return Err(SqsError::new(
            SqsErrorKind::InvalidParameterValue,
            format!(
                "One or more parameters are invalid. Reason: Message must be shorter than {limit} bytes."
            ),
        ));
    }
    if !carried {
        return Err(SqsError::new(
            SqsErrorKind::InvalidMessageContents,
            "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF.",
        ));
    }
    Ok(())
}

/// Whether every character is one that SQS carries.
fn is_carried(text: &str) -> bool {
    let is_refused = |byte: u8| (byte < 0x20) & (byte != b'\t') & (byte != b'\n') & (byte != b'\r');
    // Two passes that use vector instructions: control characters, and what both others begin with, which is rare.
    let (pieces, rest) = text.as_bytes().as_chunks::<64>();
    let refuses = |piece: &[u8]| piece.iter().fold(false, |refused, &byte| refused | is_refused(byte));
    let controls = pieces.iter().any(|piece| refuses(piece)) || refuses(rest);
    let others = text.as_bytes().contains(&0xef) && text.contains(['\u{fffe}', '\u{ffff}']);
    !controls && !others
}

pub(super) fn attributes_md5(attributes: &BTreeMap<Box<str>, Attribute>) -> Option<Box<str>> {
    if attributes.is_empty() {
        return None;
    }
    // By name, in the order of the names' bytes: length and text of name and type, one byte for
    // the kind of value, length and value (SQS Developer Guide, "message attributes").
    let mut md5 = Md5::new();
    let add = |md5: &mut Md5, bytes: &[u8]| {
        md5.update(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        md5.update(bytes);
    };
    for (name, attribute) in attributes {
        add(&mut md5, name.as_bytes());
        add(&mut md5, attribute.data_type.as_bytes());
        match &attribute.value {
            AttributeValue::Text(text) => {
                md5.update([1]);
                add(&mut md5, text.as_bytes());
            }
            AttributeValue::Binary(bytes) => {
                md5.update([2]);
                add(&mut md5, bytes);
            }
        }
    }
    Some(hex(&md5.finalize()))
}

pub(super) fn hex(bytes: &[u8]) -> Box<str> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_service() {
        // The example of RFC 1321, and an attribute digest computed by hand from its definition.
        assert_eq!(&*hex(&Md5::digest(b"message digest")), "f96b697d7cb7938d525a2f31aaf161d0");
        let attributes = BTreeMap::from([("a".into(), Attribute::text("b"))]);
        let by_hand = b"\0\0\0\x01a\0\0\0\x06String\x01\0\0\0\x01b";
        assert_eq!(attributes_md5(&attributes), Some(hex(&Md5::digest(by_hand))));
        assert_eq!(attributes_md5(&BTreeMap::new()), None);
    }
}
