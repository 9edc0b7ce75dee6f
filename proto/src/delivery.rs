//! Durable delivery: a request that is accepted now and brought to its upstream when that can be had.
//!
//! A tunnel's [`DeliveryPolicy`] is written by its agent, travels in `hello` and is kept at the edge, so that it holds while
//! no agent is there. What the edge keeps is asked for and acted on by [`Ask`] and [`Answer`]. Who else's deliveries they
//! are is never told: what may not be seen is `not_found`.

use std::collections::BTreeMap;

use http::{HeaderName, HeaderValue, Method};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    body::Body,
    header::Headers,
    id::{DeliveryId, TunnelName},
};

/// The field that names a delivery: to its sender, and to the upstream at each attempt.
pub const ID: HeaderName = HeaderName::from_static("x-tunnel-delivery-id");

/// The field that says to the upstream which attempt this is, from 1.
pub const ATTEMPT: HeaderName = HeaderName::from_static("x-tunnel-delivery-attempt");

/// The field that says to the upstream when the request was accepted (RFC 3339, UTC).
pub const RECEIVED: HeaderName = HeaderName::from_static("x-tunnel-received");

/// Every number of a policy, with its bound.
pub mod bounds {
    use std::ops::RangeInclusive;

    /// How long a delivery is kept, in seconds: 14 days, as long as SQS keeps anything
    /// (SQS Developer Guide, "Message quotas": message retention).
    pub const MAX_AGE_S: RangeInclusive<u64> = 60..=1_209_600;
    /// How many attempts there are.
    pub const ATTEMPTS: RangeInclusive<u32> = 1..=50;
    /// How long an upstream may take, in seconds.
    pub const TIMEOUT_S: RangeInclusive<u32> = 1..=290;
    /// The first pause between attempts, in seconds.
    pub const BACKOFF_BASE_S: RangeInclusive<u32> = 1..=3_600;
    /// The longest pause between attempts, in seconds.
    pub const BACKOFF_MAX_S: RangeInclusive<u32> = 1..=86_400;
    /// How many deliveries of a tunnel are under way at the same time.
    pub const MAX_CONCURRENT: RangeInclusive<u32> = 1..=64;
    /// The status that a sender is answered with.
    pub const ANSWER_STATUS: RangeInclusive<u16> = 200..=299;
    /// The longest body that a sender is answered with, in bytes (Hookdeck allows 1,000 characters).
    pub const ANSWER_BYTES: usize = 1_000;
    /// How many methods, path prefixes and statuses a policy names, each.
    pub const ENTRIES: usize = 32;
    /// The longest of its paths, media types and field names, in bytes.
    pub const TEXT_BYTES: usize = 256;
    /// The longest policy as JSON, in bytes: it is kept in a row that each live request reads.
    pub const POLICY_BYTES: usize = 4_096;
}

/// How long `Retry-After` of an upstream is obeyed at most, in seconds.
pub const RETRY_AFTER_MAX_S: u64 = 3_600;

/// What a run is told whose upstream has answered with another status than 2xx, and wants to be left alone for so many
/// seconds: the name of an error, which [`answered`] reads.
#[must_use]
pub fn answer_name(status: u16, retry_after_s: u64) -> String {
    format!("Upstream.{status}.{retry_after_s}")
}

/// Status and seconds of an [`answer_name`].
#[must_use]
pub fn answered(name: &str) -> Option<(u16, u64)> {
    let (status, retry_after_s) = name.strip_prefix("Upstream.")?.split_once('.')?;
    Some((status.parse().ok()?, retry_after_s.parse().ok()?))
}

/// The methods that are accepted unless configured otherwise.
pub const METHODS: [&str; 4] = ["POST", "PUT", "PATCH", "DELETE"];

/// When a request is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// When no agent serves the tunnel; live otherwise.
    Auto,
    /// Always, at once.
    Durable,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Durable => "durable",
        })
    }
}

/// Whether a tunnel keeps requests, which, and how they are delivered. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryPolicy {
    /// When a request is accepted.
    pub mode: Mode,
    /// The methods that are; see [`METHODS`].
    #[serde(default = "default_methods")]
    pub methods: Vec<String>,
    /// The paths that are, as prefixes by whole segments; none for all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// How long it is tried.
    #[serde(default = "default_max_age")]
    pub max_age_s: u64,
    /// How often it is tried.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
    /// How long the upstream may take for one attempt.
    #[serde(default = "default_timeout")]
    pub timeout_s: u32,
    /// What is tried again.
    #[serde(default)]
    pub retry_on: RetryOn,
    /// Whether an attempt of which nobody knows what became is made again.
    #[serde(default = "yes")]
    pub retry_unknown: bool,
    /// The pauses between attempts.
    #[serde(default)]
    pub backoff: Pauses,
    /// What is delivered one after the other.
    #[serde(default)]
    pub order_by: OrderBy,
    /// By what a sender's repetition is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dedupe_by: Option<Field>,
    /// How many are under way at the same time.
    #[serde(default = "default_concurrent")]
    pub max_concurrent: u32,
    /// What the sender is answered.
    #[serde(default)]
    pub answer: SenderAnswer,
}

/// See [`DeliveryPolicy::retry_on`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryOn {
    /// Whether an upstream that could not be reached, or gave no answer, is called again.
    #[serde(default = "yes")]
    pub no_connection: bool,
    /// The statuses after which it is called again.
    #[serde(default = "default_statuses")]
    pub statuses: Vec<StatusRule>,
}

/// One status, or a class of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusRule {
    /// Exactly this one.
    Exact(u16),
    /// All from this hundred: 4 for `4xx`, 5 for `5xx`.
    Class(u16),
}

/// See [`DeliveryPolicy::backoff`]: full jitter below `base_s` doubled with each attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pauses {
    /// The upper bound of the first.
    #[serde(default = "default_base")]
    pub base_s: u32,
    /// The upper bound of any.
    #[serde(default = "default_max")]
    pub max_s: u32,
}

/// See [`DeliveryPolicy::order_by`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderBy {
    /// Nothing waits for anything.
    #[default]
    None,
    /// All of the tunnel, in the order it came.
    Tunnel,
    /// What goes to the same path.
    Path,
    /// What has the same value in this field; what has none waits for nothing.
    Header(String),
}

/// Something of a request, by which it is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// The value of this field.
    Header(String),
}

/// See [`DeliveryPolicy::answer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SenderAnswer {
    /// Its status.
    #[serde(default = "default_status")]
    pub status: u16,
    /// Its body; without one, the delivery's id and state as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// The media type of `body`; `text/plain; charset=utf-8` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
}

/// What is wrong with a policy, and which values are right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A number outside its bounds.
    #[error("{key} must be from {least} to {most}, not {given}")]
    OutOfRange {
        /// Which, as in the configuration.
        key: &'static str,
        /// The least that it may be.
        least: u64,
        /// The most that it may be.
        most: u64,
        /// What it is.
        given: u64,
    },
    /// Too many entries, or too long a text.
    #[error("{key} may have at most {most} {unit}, not {given}")]
    TooLong {
        /// Which.
        key: &'static str,
        /// The most that it may have.
        most: usize,
        /// Of what.
        unit: &'static str,
        /// How many it has.
        given: usize,
    },
    /// A value of another form.
    #[error("{key}: {value:?} is not {expected}")]
    Malformed {
        /// Which.
        key: &'static str,
        /// The value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

fn default_methods() -> Vec<String> {
    METHODS.map(str::to_owned).to_vec()
}

fn default_statuses() -> Vec<StatusRule> {
    vec![StatusRule::Exact(408), StatusRule::Exact(425), StatusRule::Exact(429), StatusRule::Class(5)]
}

const fn default_max_age() -> u64 {
    3 * 24 * 60 * 60
}

const fn default_attempts() -> u32 {
    10
}

const fn default_timeout() -> u32 {
    30
}

const fn default_concurrent() -> u32 {
    4
}

const fn default_base() -> u32 {
    5
}

const fn default_max() -> u32 {
    3_600
}

const fn default_status() -> u16 {
    202
}

const fn yes() -> bool {
    true
}

impl Default for RetryOn {
    fn default() -> Self {
        Self { no_connection: true, statuses: default_statuses() }
    }
}

impl Default for Pauses {
    fn default() -> Self {
        Self { base_s: default_base(), max_s: default_max() }
    }
}

impl Default for SenderAnswer {
    fn default() -> Self {
        Self { status: default_status(), body: None, content_type: None }
    }
}

impl StatusRule {
    /// Whether the rule is about `status`.
    #[must_use]
    pub const fn covers(self, status: u16) -> bool {
        match self {
            Self::Exact(exact) => exact == status,
            Self::Class(class) => status / 100 == class,
        }
    }
}

impl std::str::FromStr for StatusRule {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let rule = match text {
            "4xx" => Some(Self::Class(4)),
            "5xx" => Some(Self::Class(5)),
            exact => exact.parse().ok().filter(|status| (300..=599).contains(status)).map(Self::Exact),
        };
        rule.ok_or_else(|| PolicyError::Malformed {
            key: "retry_on",
            value: text.chars().take(32).collect(),
            expected: "a status from 300 to 599, 4xx or 5xx",
        })
    }
}

impl Serialize for StatusRule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Exact(status) => serializer.serialize_u16(status),
            Self::Class(class) => serializer.collect_str(&format_args!("{class}xx")),
        }
    }
}

impl<'de> Deserialize<'de> for StatusRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u16),
            Text(String),
        }
        let text = match Either::deserialize(deserializer)? {
            Either::Number(status) => status.to_string(),
            Either::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl DeliveryPolicy {
    /// The policy of a tunnel that says no more than its mode.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            methods: default_methods(),
            paths: Vec::new(),
            max_age_s: default_max_age(),
            attempts: default_attempts(),
            timeout_s: default_timeout(),
            retry_on: RetryOn::default(),
            retry_unknown: true,
            backoff: Pauses::default(),
            order_by: OrderBy::None,
            dedupe_by: None,
            max_concurrent: default_concurrent(),
            answer: SenderAnswer::default(),
        }
    }

    /// Checks every value against its [`bounds`].
    ///
    /// # Errors
    ///
    /// The first one that is not within them.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.check_numbers()?;
        entries("methods", self.methods.len())?;
        for method in &self.methods {
            let known = Method::from_bytes(method.as_bytes()).is_ok_and(|known| known != Method::CONNECT);
            if method.len() > 32 || !known || method.bytes().any(|byte| byte.is_ascii_lowercase()) {
                return Err(malformed("methods", method, "a method in upper case, such as POST"));
            }
        }
        entries("paths", self.paths.len())?;
        for path in &self.paths {
            length("paths", path.len())?;
            if !path.starts_with('/') || path.contains(['?', '#']) || !path.is_ascii() {
                return Err(malformed("paths", path, "a path that begins with / and has no query"));
            }
        }
        entries("retry_on", self.retry_on.statuses.len())?;
        if let OrderBy::Header(name) = &self.order_by {
            field_name("order_by", name)?;
        }
        if let Some(Field::Header(name)) = &self.dedupe_by {
            field_name("dedupe_by", name)?;
        }
        if let Some(body) = &self.answer.body
            && body.len() > bounds::ANSWER_BYTES
        {
            let (most, given) = (bounds::ANSWER_BYTES, body.len());
            return Err(PolicyError::TooLong { key: "answer.body", most, unit: "bytes", given });
        }
        if let Some(media_type) = &self.answer.content_type {
            length("answer.content_type", media_type.len())?;
            if media_type.is_empty() || HeaderValue::from_str(media_type).is_err() {
                return Err(malformed("answer.content_type", media_type, "a media type"));
            }
        }
        let given = serde_json::to_string(self).map_or(usize::MAX, |text| text.len());
        if given > bounds::POLICY_BYTES {
            let most = bounds::POLICY_BYTES;
            return Err(PolicyError::TooLong { key: "the whole of it", most, unit: "bytes as JSON", given });
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), PolicyError> {
        let within = |key, given: u64, (least, most): (u64, u64)| {
            if (least..=most).contains(&given) {
                return Ok(());
            }
            Err(PolicyError::OutOfRange { key, least, most, given })
        };
        let wide =
            |range: std::ops::RangeInclusive<u32>| (u64::from(*range.start()), u64::from(*range.end()));
        within("max_age", self.max_age_s, (*bounds::MAX_AGE_S.start(), *bounds::MAX_AGE_S.end()))?;
        within("attempts", self.attempts.into(), wide(bounds::ATTEMPTS))?;
        within("timeout", self.timeout_s.into(), wide(bounds::TIMEOUT_S))?;
        within("backoff.base", self.backoff.base_s.into(), wide(bounds::BACKOFF_BASE_S))?;
        within("backoff.max", self.backoff.max_s.into(), wide(bounds::BACKOFF_MAX_S))?;
        within("max_concurrent", self.max_concurrent.into(), wide(bounds::MAX_CONCURRENT))?;
        let statuses = bounds::ANSWER_STATUS;
        within(
            "answer.status",
            self.answer.status.into(),
            ((*statuses.start()).into(), (*statuses.end()).into()),
        )
    }

    /// The policy with each number within its [`bounds`]. For the edge, whose agents may be later or hostile.
    ///
    /// # Errors
    ///
    /// Something else is wrong with it, so that the tunnel keeps nothing.
    pub fn clamped(mut self) -> Result<Self, PolicyError> {
        let clamp = |value: &mut u32, range: std::ops::RangeInclusive<u32>| {
            *value = (*value).clamp(*range.start(), *range.end());
        };
        self.max_age_s = self.max_age_s.clamp(*bounds::MAX_AGE_S.start(), *bounds::MAX_AGE_S.end());
        clamp(&mut self.attempts, bounds::ATTEMPTS);
        clamp(&mut self.timeout_s, bounds::TIMEOUT_S);
        clamp(&mut self.backoff.base_s, bounds::BACKOFF_BASE_S);
        clamp(&mut self.backoff.max_s, bounds::BACKOFF_MAX_S);
        clamp(&mut self.max_concurrent, bounds::MAX_CONCURRENT);
        self.answer.status =
            self.answer.status.clamp(*bounds::ANSWER_STATUS.start(), *bounds::ANSWER_STATUS.end());
        self.check().map(|()| self)
    }

    /// Whether requests with this method and path are kept. The path is compared as it was sent.
    #[must_use]
    pub fn covers(&self, method: &str, path: &str) -> bool {
        self.methods.iter().any(|covered| covered == method)
            && (self.paths.is_empty() || self.paths.iter().any(|prefix| is_below(path, prefix)))
    }

    /// What a request is ordered by: deliveries with the same key are made one after the other.
    #[must_use]
    pub fn order_key(&self, path: &str, headers: &Headers) -> Option<Vec<u8>> {
        match &self.order_by {
            OrderBy::None => None,
            OrderBy::Tunnel => Some(b"tunnel".to_vec()),
            OrderBy::Path => Some([b"path:", path.as_bytes()].concat()),
            OrderBy::Header(name) => {
                value_of(headers, name).map(|value| [b"header:", value.as_bytes()].concat())
            }
        }
    }

    /// What a sender's repetition is known by; `None` where the policy or the request has no such thing.
    #[must_use]
    pub fn dedupe_key<'h>(&self, headers: &'h Headers) -> Option<&'h [u8]> {
        let Field::Header(name) = self.dedupe_by.as_ref()?;
        value_of(headers, name).map(HeaderValue::as_bytes).filter(|value| !value.is_empty())
    }
}

/// The first value of a field, whatever the case its name is written in.
fn value_of<'h>(headers: &'h Headers, name: &str) -> Option<&'h HeaderValue> {
    HeaderName::from_bytes(name.as_bytes()).ok().and_then(|name| headers.get(name))
}

/// Whether `path` is `prefix` or below it, by whole segments.
fn is_below(path: &str, prefix: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn entries(key: &'static str, given: usize) -> Result<(), PolicyError> {
    if given <= bounds::ENTRIES {
        return Ok(());
    }
    Err(PolicyError::TooLong { key, most: bounds::ENTRIES, unit: "entries", given })
}

fn length(key: &'static str, given: usize) -> Result<(), PolicyError> {
    if given <= bounds::TEXT_BYTES {
        return Ok(());
    }
    Err(PolicyError::TooLong { key, most: bounds::TEXT_BYTES, unit: "bytes", given })
}

fn field_name(key: &'static str, name: &str) -> Result<(), PolicyError> {
    length(key, name.len())?;
    if HeaderName::from_bytes(name.as_bytes()).is_err() {
        return Err(malformed(key, name, "the name of a header field"));
    }
    Ok(())
}

fn malformed(key: &'static str, value: &str, expected: &'static str) -> PolicyError {
    PolicyError::Malformed { key, value: value.chars().take(64).collect(), expected }
}

/// What a `hello` says about the deliveries of a tunnel, as far as this version understands it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaidPolicy {
    /// It does.
    Policy(DeliveryPolicy),
    /// It does not, and why. The tunnel keeps nothing, and the others are not harmed.
    Unreadable(String),
}

impl From<DeliveryPolicy> for SaidPolicy {
    fn from(policy: DeliveryPolicy) -> Self {
        Self::Policy(policy)
    }
}

impl<'de> Deserialize<'de> for SaidPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Ok(match DeliveryPolicy::deserialize(value) {
            Ok(policy) => Self::Policy(policy),
            Err(error) => Self::Unreadable(error.to_string()),
        })
    }
}

/// Writes the policies of a `hello`: those that are one.
pub(crate) fn write_policies<S: serde::Serializer>(
    policies: &BTreeMap<String, SaidPolicy>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(policies.iter().filter_map(|(name, said)| match said {
        SaidPolicy::Policy(policy) => Some((name, policy)),
        SaidPolicy::Unreadable(_) => None,
    }))
}

/// The longest reason of a [`PolicyNotice`], in characters.
pub const NOTICE_CHARS: usize = 200;

/// A policy of a `hello` that does not hold as it was said. [`crate::message::Welcome::policies`] tells it, which earlier
/// agents do not read; earlier edges tell nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyNotice {
    /// The tunnel, as the agent gave it.
    pub name: String,
    /// What holds instead.
    pub holds: Holds,
    /// What is wrong with it, for people: at most [`NOTICE_CHARS`].
    pub why: String,
}

impl PolicyNotice {
    /// One with a reason of any length.
    #[must_use]
    pub fn new(name: &str, holds: Holds, why: &str) -> Self {
        Self { name: name.to_owned(), holds, why: why.chars().take(NOTICE_CHARS).collect() }
    }
}

/// See [`PolicyNotice::holds`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holds {
    /// The tunnel is live: nothing is kept.
    Live,
    /// The policy with its numbers at their nearest bounds.
    Bounds,
    /// What a later edge says.
    #[serde(other)]
    Other,
}

/// What makes a `request` message a delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The delivery.
    pub id: DeliveryId,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// When the request was accepted, in milliseconds since 1970.
    pub received_ms: u64,
}

/// How far a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It waits for an agent, for its turn or for the next attempt.
    Waiting,
    /// It is with an agent.
    Delivering,
    /// The upstream has taken it.
    Delivered,
    /// It was given up.
    Dead,
    /// Its owner has called it off.
    Cancelled,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Waiting, Self::Delivering, Self::Delivered, Self::Dead, Self::Cancelled];

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Delivering => "delivering",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens by itself.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Delivered | Self::Dead | Self::Cancelled)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for State {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| malformed("state", text, "waiting, delivering, delivered, dead or cancelled"))
    }
}

/// What became of the last attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Last {
    /// Which it was.
    pub attempt: u32,
    /// When it ended, in milliseconds since 1970.
    pub at_ms: u64,
    /// The upstream's status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The same, for people.
    pub reason: String,
}

/// A delivery as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Its name.
    pub id: DeliveryId,
    /// The tunnel it came in by.
    pub tunnel: TunnelName,
    /// How far it is.
    pub state: State,
    /// When it was accepted, in milliseconds since 1970.
    pub received_ms: u64,
    /// Until when it is kept, in seconds since 1970.
    pub expires_at: u64,
    /// How many attempts have begun.
    pub attempt: u32,
    /// The request's method.
    pub method: String,
    /// The request's target.
    pub target: String,
    /// The length of its body.
    pub body_bytes: u64,
    /// The name of its run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// What became of the last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Last>,
}

/// What an agent asks about its owner's deliveries. `cursor` is what the page before gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Ask {
    /// Which there are, newest first.
    List {
        /// Of one tunnel; all of the owner's that the connection serves otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tunnel: Option<TunnelName>,
        /// In this state.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<State>,
        /// Only those that have not ended. An edge of an earlier release gives the others as well.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        open: bool,
        /// Accepted then or later, in milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since_ms: Option<u64>,
        /// Where the page before ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cursor: Option<String>,
    },
    /// One of them, with its head and some of its body.
    Show {
        /// Its tunnel.
        tunnel: TunnelName,
        /// Its name.
        id: DeliveryId,
        /// From which byte on its body is wanted; without it, none is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        body_from: Option<u64>,
    },
    /// Delivers one that has ended once more.
    Retry {
        /// Its tunnel.
        tunnel: TunnelName,
        /// Its name.
        id: DeliveryId,
    },
    /// Delivers a page of those that are dead once more.
    RetryDead {
        /// Their tunnel.
        tunnel: TunnelName,
        /// Where the page before ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cursor: Option<String>,
    },
    /// Calls one off that has not ended.
    Cancel {
        /// Its tunnel.
        tunnel: TunnelName,
        /// Its name.
        id: DeliveryId,
    },
    /// Holds the deliveries of a tunnel.
    Pause {
        /// Which.
        tunnel: TunnelName,
    },
    /// Lets them go on.
    Resume {
        /// Which.
        tunnel: TunnelName,
    },
}

/// What the edge answers to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Answer<'a> {
    /// A page of a list.
    Deliveries {
        /// The page.
        list: Vec<Summary>,
        /// Where the next one begins, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cursor: Option<String>,
    },
    /// One delivery.
    Delivery {
        /// What it is.
        summary: Box<Summary>,
        /// The fields of its head.
        headers: Headers,
        /// Some of its body, where it was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
        body: Option<Body<'a>>,
        /// At which byte the rest of it begins.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        more: Option<u64>,
    },
    /// It was done.
    Done {
        /// To so many.
        count: u32,
        /// Where the next page begins, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cursor: Option<String>,
    },
    /// It was not.
    Refused {
        /// Why.
        reason: Refused,
    },
}

impl Answer<'_> {
    /// The same, for longer than the message it came in.
    #[must_use]
    pub fn into_owned(self) -> Answer<'static> {
        match self {
            Self::Deliveries { list, cursor } => Answer::Deliveries { list, cursor },
            Self::Delivery { summary, headers, body, more } => {
                Answer::Delivery { summary, headers, body: body.map(Body::into_owned), more }
            }
            Self::Done { count, cursor } => Answer::Done { count, cursor },
            Self::Refused { reason } => Answer::Refused { reason },
        }
    }
}

/// Why an [`Ask`] was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refused {
    /// The connection may not ask that.
    NotAllowed,
    /// There is none, or none of this owner's.
    NotFound,
    /// It is too far, or not far enough, for that.
    WrongState,
    /// The edge could not do it now; worth another try.
    Busy,
    /// A reason that this version does not know.
    #[serde(other)]
    Other,
}

/// See [`crate::message::AgentMessage::Deliveries`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveriesAsk {
    /// Comes back with the answer.
    pub seq: u32,
    /// The question.
    pub ask: Ask,
}

/// See [`crate::message::EdgeMessage::Deliveries`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveriesAnswer<'a> {
    /// Of the question.
    pub seq: u32,
    /// The answer.
    #[serde(borrow)]
    pub answer: Answer<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> DeliveryPolicy {
        DeliveryPolicy::new(Mode::Auto)
    }

    fn fails(change: impl FnOnce(&mut DeliveryPolicy)) -> String {
        let mut changed = policy();
        change(&mut changed);
        changed.check().unwrap_err().to_string()
    }

    fn holds(change: impl FnOnce(&mut DeliveryPolicy)) {
        let mut changed = policy();
        change(&mut changed);
        assert_eq!(changed.check(), Ok(()), "{changed:?}");
        assert_eq!(changed.clone().clamped(), Ok(changed.clone()));
        let text = serde_json::to_string(&changed).unwrap();
        assert_eq!(serde_json::from_str::<DeliveryPolicy>(&text).unwrap(), changed);
    }

    #[test]
    fn the_name_of_an_answer_says_what_it_was() {
        for (status, retry_after_s) in [(100, 0), (302, 1), (503, u64::MAX)] {
            let name = answer_name(status, retry_after_s);
            // An error of a run has a name of at most 256 bytes.
            assert!(name.len() <= 256);
            assert_eq!(answered(&name), Some((status, retry_after_s)));
        }
        for other in ["Upstream.", "Upstream.503", "Upstream.503.", "Upstream.x.0", "Tunnel.agent_lost", ""] {
            assert_eq!(answered(other), None, "{other}");
        }
    }

    #[test]
    fn what_a_policy_does_not_say_is_the_default() {
        let short: DeliveryPolicy = serde_json::from_str(r#"{"mode":"auto"}"#).unwrap();
        assert_eq!(short, policy());
        assert_eq!(short.check(), Ok(()));
        assert_eq!(short.max_age_s, 3 * 86_400);
        let statuses: Vec<bool> =
            [408, 425, 429, 500, 503, 599, 400, 404, 410, 302].map(|s| retries(&short, s)).to_vec();
        assert_eq!(statuses, [true, true, true, true, true, true, false, false, false, false]);
    }

    fn retries(policy: &DeliveryPolicy, status: u16) -> bool {
        policy.retry_on.statuses.iter().any(|rule| rule.covers(status))
    }

    #[test]
    fn each_number_is_allowed_at_its_bound_and_refused_past_it() {
        holds(|policy| policy.max_age_s = 1_209_600);
        assert_eq!(
            fails(|policy| policy.max_age_s = 1_209_601),
            "max_age must be from 60 to 1209600, not 1209601"
        );
        holds(|policy| policy.max_age_s = 60);
        assert!(fails(|policy| policy.max_age_s = 59).starts_with("max_age"));
        holds(|policy| policy.attempts = 1);
        holds(|policy| policy.attempts = 50);
        for attempts in [0, 51] {
            assert!(fails(|policy| policy.attempts = attempts).starts_with("attempts must be from 1 to 50"));
        }
        holds(|policy| policy.timeout_s = 1);
        holds(|policy| policy.timeout_s = 290);
        for timeout in [0, 291] {
            assert!(fails(|policy| policy.timeout_s = timeout).starts_with("timeout must be from 1 to 290"));
        }
        holds(|policy| policy.backoff = Pauses { base_s: 3_600, max_s: 86_400 });
        holds(|policy| policy.backoff = Pauses { base_s: 1, max_s: 1 });
        for base_s in [0, 3_601] {
            assert!(fails(|policy| policy.backoff.base_s = base_s).starts_with("backoff.base"));
        }
        for max_s in [0, 86_401] {
            assert!(fails(|policy| policy.backoff.max_s = max_s).starts_with("backoff.max"));
        }
        holds(|policy| policy.max_concurrent = 1);
        holds(|policy| policy.max_concurrent = 64);
        for concurrent in [0, 65] {
            assert!(fails(|policy| policy.max_concurrent = concurrent).starts_with("max_concurrent"));
        }
        holds(|policy| policy.answer.status = 200);
        holds(|policy| policy.answer.status = 299);
        for status in [199, 300] {
            assert!(fails(|policy| policy.answer.status = status).starts_with("answer.status"));
        }
    }

    #[test]
    fn each_list_and_text_is_allowed_at_its_bound_and_refused_past_it() {
        let many = |count: usize, text: &str| vec![text.to_owned(); count];
        holds(|policy| policy.methods = many(32, "POST"));
        assert!(fails(|policy| policy.methods = many(33, "POST")).contains("at most 32 entries, not 33"));
        for method in ["post", "", "P OST", "CONNECT"] {
            assert!(fails(|policy| policy.methods = many(1, method)).starts_with("methods: "), "{method}");
        }
        holds(|policy| policy.paths = many(32, "/hooks"));
        assert!(fails(|policy| policy.paths = many(33, "/hooks")).contains("at most 32 entries"));
        holds(|policy| policy.paths = vec![format!("/{}", "x".repeat(255))]);
        assert!(fails(|policy| policy.paths = vec![format!("/{}", "x".repeat(256))]).contains("256 bytes"));
        for path in ["", "hooks", "/a?b", "/a#b", "/ä"] {
            assert!(fails(|policy| policy.paths = many(1, path)).starts_with("paths: "), "{path}");
        }
        holds(|policy| policy.retry_on.statuses = vec![StatusRule::Class(4); 32]);
        assert!(
            fails(|policy| policy.retry_on.statuses = vec![StatusRule::Class(4); 33]).contains("retry_on")
        );
        holds(|policy| policy.order_by = OrderBy::Header("x".repeat(256)));
        for name in ["x".repeat(257), String::new(), "a b".into()] {
            assert!(fails(|policy| policy.order_by = OrderBy::Header(name.clone())).starts_with("order_by"));
            assert!(fails(|policy| policy.dedupe_by = Some(Field::Header(name))).starts_with("dedupe_by"));
        }
        holds(|policy| policy.answer.body = Some("x".repeat(1_000)));
        assert!(
            fails(|policy| policy.answer.body = Some("x".repeat(1_001))).contains("1000 bytes, not 1001")
        );
        holds(|policy| policy.answer.content_type = Some("application/json".into()));
        for media_type in ["", "a\nb"] {
            let message = fails(|policy| policy.answer.content_type = Some(media_type.into()));
            assert!(message.starts_with("answer.content_type"), "{message}");
        }
        let long = format!("/{}", "x".repeat(200));
        assert!(fails(|policy| policy.paths = many(20, &long)).contains("4096 bytes as JSON"));
    }

    #[test]
    fn statuses_are_numbers_or_classes() {
        for (text, rule) in
            [("300", StatusRule::Exact(300)), ("599", StatusRule::Exact(599)), ("4xx", StatusRule::Class(4))]
        {
            assert_eq!(text.parse(), Ok(rule));
            assert_eq!(
                serde_json::from_str::<StatusRule>(&serde_json::to_string(&rule).unwrap()).unwrap(),
                rule
            );
        }
        for text in ["299", "600", "3xx", "xx", "", "-1"] {
            assert!(text.parse::<StatusRule>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_edge_clamps_numbers_and_drops_what_it_does_not_understand() {
        let mut wild = policy();
        (wild.max_age_s, wild.attempts, wild.max_concurrent) = (u64::MAX, 0, 9_999);
        wild.answer.status = 500;
        let tamed = wild.clamped().unwrap();
        assert_eq!((tamed.max_age_s, tamed.attempts, tamed.max_concurrent), (1_209_600, 1, 64));
        assert_eq!(tamed.answer.status, 299);
        let mut broken = policy();
        broken.paths = vec!["x".into()];
        let why = broken.clamped().unwrap_err().to_string();
        assert_eq!(why, "paths: \"x\" is not a path that begins with / and has no query");
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_told_from_one_that_can() {
        let said = |text: &str| serde_json::from_str::<SaidPolicy>(text).unwrap();
        assert_eq!(said(r#"{"mode":"auto","later":[{}]}"#), policy().into());
        for (text, why) in [
            (r#"{"mode":"twice"}"#, "twice"),
            (r#"{"mode":"auto","order_by":"sender"}"#, "sender"),
            (r#"{"mode":"auto","attempts":-1}"#, "-1"),
            ("{}", "mode"),
            ("null", "null"),
            ("[7]", "7"),
        ] {
            let SaidPolicy::Unreadable(reason) = said(text) else { panic!("{text}") };
            assert!(reason.contains(why), "{text}: {reason}");
        }
        assert_eq!(PolicyNotice::new("web", Holds::Live, &"ä".repeat(201)).why, "ä".repeat(200));
        let later: PolicyNotice = serde_json::from_str(r#"{"name":"x","holds":"later","why":""}"#).unwrap();
        assert_eq!(later.holds, Holds::Other);
    }

    #[test]
    fn paths_cover_whole_segments() {
        let mut some = policy();
        some.paths = vec!["/hooks".into(), "/a/b/".into()];
        for (method, path, covered) in [
            ("POST", "/hooks", true),
            ("POST", "/hooks/x", true),
            ("POST", "/hooksx", false),
            ("POST", "/a/b", true),
            ("POST", "/a/b/", true),
            ("POST", "/a", false),
            ("GET", "/hooks", false),
            ("post", "/hooks", false),
        ] {
            assert_eq!(some.covers(method, path), covered, "{method} {path}");
        }
        some.paths = vec!["/".into()];
        assert!(some.covers("DELETE", "/any"));
        some.paths.clear();
        assert!(some.covers("PATCH", "/") && !some.covers("OPTIONS", "/"));
    }

    #[test]
    fn keys_are_what_the_policy_names() {
        let headers: Headers = [(HeaderName::from_static("webhook-id"), HeaderValue::from_static("msg_1"))]
            .into_iter()
            .collect();
        let mut some = policy();
        assert_eq!((some.order_key("/a", &headers), some.dedupe_key(&headers)), (None, None));
        some.dedupe_by = Some(Field::Header("Webhook-Id".into()));
        assert_eq!(some.dedupe_key(&headers), Some(&b"msg_1"[..]));
        some.order_by = OrderBy::Path;
        let by_path = some.order_key("/a", &headers);
        some.order_by = OrderBy::Tunnel;
        assert_ne!(some.order_key("/a", &headers), by_path);
        some.order_by = OrderBy::Header("x".into());
        assert_eq!(some.order_key("/a", &headers), None);
        some.order_by = OrderBy::Header("webhook-id".into());
        assert_eq!(some.order_key("/a", &headers), Some(b"header:msg_1".to_vec()));
    }
}
