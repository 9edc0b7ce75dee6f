//! What of a tunnel is delivered later where it cannot be delivered now, as the configuration says it.

use http::{HeaderName, HeaderValue, Method};
use proto::delivery::{DeliveryPolicy, Field, Mode, OrderBy, RetryOn, SenderAnswer, bounds};

use super::{
    ConfigError,
    traffic::{self, RoutePath},
    value::{Table, duration_within},
};

pub(super) const DURABLE_KEYS: &[&str] = &[
    "answer",
    "attempts",
    "backoff",
    "dedupe_by",
    "max_age",
    "max_concurrent",
    "methods",
    "order_by",
    "paths",
    "retry_on",
    "retry_unknown",
    "timeout",
];

pub(super) const BACKOFF_KEYS: &[&str] = &["base", "max"];
pub(super) const ANSWER_KEYS: &[&str] = &["body", "content_type", "status"];

/// Reads `delivery` and `[tunnel.durable]`; `None` for what is only delivered while an agent is there.
pub(super) fn read(table: &Table<'_>) -> Result<Option<DeliveryPolicy>, ConfigError> {
    let mode = table.text("delivery", |text| match text {
        "live" => Ok(None),
        "auto" => Ok(Some(Mode::Auto)),
        "durable" => Ok(Some(Mode::Durable)),
        other => Err(format!("{other:?} is none of \"live\", \"auto\" and \"durable\"")),
    })?;
    let durable = table.table("durable", DURABLE_KEYS)?;
    let Some(mode) = mode.flatten() else {
        return match durable {
            Some(durable) => Err(durable.error(
                "[tunnel.durable] is about what is kept, and nothing is: add delivery = \"auto\" or \"durable\"",
            )),
            None => Ok(None),
        };
    };
    let mut policy = DeliveryPolicy::new(mode);
    if let Some(durable) = &durable {
        read_durable(durable, &mut policy)?;
        // What is right by itself may be too much together.
        policy.check().map_err(|error| durable.error(format!("[tunnel.durable]: {error}")))?;
    }
    Ok(Some(policy))
}

fn read_durable(table: &Table<'_>, policy: &mut DeliveryPolicy) -> Result<(), ConfigError> {
    if table.has("methods") {
        policy.methods = traffic::list(table, "methods", kept_method)?;
        if policy.methods.is_empty() {
            return Err(table.error_at("methods", "a list of methods must not be empty"));
        }
    }
    policy.paths = traffic::list(table, "paths", |text| RoutePath::parse(text).map(|path| path.to_string()))?;
    if let Some(age) = table.text("max_age", |text| whole_seconds(text, "1m", "14d"))? {
        policy.max_age_s = age.into();
    }
    if let Some(timeout) = table.text("timeout", |text| whole_seconds(text, "1s", "290s"))? {
        policy.timeout_s = timeout;
    }
    if let Some(attempts) = table.integer("attempts", bounds::ATTEMPTS)? {
        policy.attempts = attempts;
    }
    if let Some(most) = table.integer("max_concurrent", bounds::MAX_CONCURRENT)? {
        policy.max_concurrent = most;
    }
    if let Some(backoff) = table.table("backoff", BACKOFF_KEYS)? {
        if let Some(base) = backoff.text("base", |text| whole_seconds(text, "1s", "1h"))? {
            policy.backoff.base_s = base;
        }
        if let Some(max) = backoff.text("max", |text| whole_seconds(text, "1s", "24h"))? {
            policy.backoff.max_s = max;
        }
        if policy.backoff.max_s < policy.backoff.base_s {
            return Err(backoff.error("\"max\" of backoff must not be below its \"base\""));
        }
    }
    if table.has("retry_on") {
        policy.retry_on = read_retry_on(table)?;
    }
    policy.retry_unknown = table.flag("retry_unknown")?.unwrap_or(true);
    if let Some(order) = table.text("order_by", |text| match text {
        "none" => Ok(OrderBy::None),
        "tunnel" => Ok(OrderBy::Tunnel),
        "path" => Ok(OrderBy::Path),
        other => field(other)
            .map(OrderBy::Header)
            .map_err(|_| format!("{other:?} is none of \"none\", \"tunnel\", \"path\" and \"header:NAME\"")),
    })? {
        policy.order_by = order;
    }
    policy.dedupe_by = table.text("dedupe_by", |text| {
        field(text).map(Field::Header).map_err(|_| {
            format!("{text:?} names no field that tells deliveries apart: write it as \"header:webhook-id\"")
        })
    })?;
    if let Some(answer) = table.table("answer", ANSWER_KEYS)? {
        policy.answer = read_answer(&answer)?;
    }
    Ok(())
}

fn read_retry_on(table: &Table<'_>) -> Result<RetryOn, ConfigError> {
    let mut retry_on = RetryOn { no_connection: false, statuses: Vec::new() };
    for (word, span) in table.texts_or_integers("retry_on")? {
        if word == "no_connection" {
            retry_on.no_connection = true;
            continue;
        }
        let rule = word.parse().map_err(|_| {
            let message = format!(
                "{word:?} is none of \"no_connection\", \"4xx\", \"5xx\" and a status from 300 to 599"
            );
            table.document().error(span, message)
        });
        retry_on.statuses.push(rule?);
    }
    Ok(retry_on)
}

fn read_answer(table: &Table<'_>) -> Result<SenderAnswer, ConfigError> {
    let status = match table.integer("status", 200..=299)? {
        Some(204 | 205) if table.has("body") => {
            return Err(table.error_at("body", "an answer with this status has no body"));
        }
        Some(status) => u16::try_from(status).unwrap_or(202),
        None => 202,
    };
    let content_type = table.text("content_type", |text| {
        let is_value = text.contains('/') && HeaderValue::from_str(text).is_ok();
        if is_value {
            Ok(text.to_owned())
        } else {
            Err(format!("{text:?} is no media type: write it as text/plain"))
        }
    })?;
    let body = table.text("body", |text| {
        if text.len() > bounds::ANSWER_BYTES {
            Err(format!("this body is longer than {} bytes", bounds::ANSWER_BYTES))
        } else {
            Ok(text.to_owned())
        }
    })?;
    if content_type.is_some() && body.is_none() {
        return Err(
            table.error_at("content_type", "\"content_type\" is that of a \"body\", and there is none")
        );
    }
    Ok(SenderAnswer { status, body, content_type })
}

/// A method whose requests may be kept: one that asks for something is answered by somebody, or not at all.
fn kept_method(text: &str) -> Result<String, String> {
    let method = traffic::method(text)?;
    if matches!(method, Method::GET | Method::HEAD | Method::OPTIONS | Method::CONNECT | Method::TRACE) {
        return Err(format!("{text} asks for an answer, which nobody could give later: it is always live"));
    }
    Ok(method.to_string())
}

/// The name in `header:NAME`, in lower case.
fn field(text: &str) -> Result<String, ()> {
    let name = text.strip_prefix("header:").ok_or(())?;
    name.parse::<HeaderName>().map(|name| name.as_str().to_owned()).map_err(|_| ())
}

fn whole_seconds(text: &str, least: &str, most: &str) -> Result<u32, String> {
    let duration = duration_within(text, least, most)?;
    if duration.subsec_nanos() > 0 {
        return Err(format!("{text:?} must be whole seconds"));
    }
    Ok(u32::try_from(duration.as_secs()).unwrap_or(u32::MAX))
}
