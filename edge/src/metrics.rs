//! What the dashboard and the alarms show: metrics in CloudWatch's embedded format, one line of JSON on
//! standard output, which Lambda hands to CloudWatch by itself. Nothing is called for it.
//!
//! A line is written at the end of an invocation that has something to say, and carries what a reader of
//! the log looks for as well (`request_id`, `tunnel_id`), so that it is the access log too. Without
//! [`env::METRICS_NAMESPACE`] nothing is written.
//!
//! Each name, and each value of its dimension, is a metric that CloudWatch charges for while it has
//! data: hence one dimension in all, and no zeros.

use std::{
    fmt::Write as _,
    io::Write as _,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{config::env, unix_now_ms};

macro_rules! metrics {
    ($( $(#[$doc:meta])* $variant:ident, $name:literal, $unit:literal, $dimension:expr; )+) => {
        /// A metric. Dashboards and alarms go by its name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Metric { $( $(#[$doc])* $variant, )+ }

        impl Metric {
            /// Every metric.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in CloudWatch.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Its unit in CloudWatch.
            #[must_use]
            pub const fn unit(self) -> &'static str {
                match self { $(Self::$variant => $unit),+ }
            }

            /// Its dimension, where it has one.
            #[must_use]
            pub const fn dimension(self) -> Option<&'static str> {
                match self { $(Self::$variant => $dimension),+ }
            }
        }
    };
}

metrics! {
    /// A public request, by how it ended: `answered`, `accepted` (kept, to be delivered later), `broken` (the response ended before its end),
    /// `client_gone`, or the code in `x-tunnel-error`. Written by `ingress`.
    Requests, "Requests", "Count", Some(OUTCOME);
    /// From the event to the head of the upstream's response. Written by `ingress`.
    Latency, "Latency", "Milliseconds", None;
    /// How long a message of an agent lay in its mailbox before the request that it was for took it, or went
    /// without it: the longest of one request. Written by `ingress` where that is long.
    OldestMessage, "OldestMessage", "Seconds", None;
    /// A public WebSocket that was opened. Written by `relay`.
    SocketsOpened, "SocketsOpened", "Count", None;
    /// How many public WebSockets are open. Written by each `relay` once a minute.
    SocketsOpen, "SocketsOpen", "Count", None;
    /// A public WebSocket that was interrupted, because a message or its agent was lost. Written by `relay`.
    SocketsLost, "SocketsLost", "Count", None;
    /// How long a public WebSocket was open. Written by `relay` at its end.
    SocketSeconds, "SocketSeconds", "Seconds", None;
    /// How many messages a public WebSocket carried, both ways. Written by `relay` at its end.
    SocketMessages, "SocketMessages", "Count", None;
    /// A run that failed, timed out or could not be started. Written by `ingress`.
    RunFailures, "RunFailures", "Count", None;
    /// A token that was refused: an agent's by `authorizer`, a task's by `response`.
    TokensRefused, "TokensRefused", "Count", None;
    /// A call that AWS still throttled after the SDK had tried it again. Written by any function.
    Throttles, "Throttles", "Count", None;
    /// A process of a function that was started. Written by any function.
    ColdStarts, "ColdStarts", "Count", None;
    /// How many agents serve a tunnel now. Written by `sweep`, each time it runs.
    AgentsConnected, "AgentsConnected", "Count", None;
    /// How many deliveries wait for an agent, up to 1,000 of each tunnel. Written by `sweep` where there are any.
    DeliveriesWaiting, "DeliveriesWaiting", "Count", None;
    /// How long the oldest delivery has waited for an agent. Written by `sweep` where there is one.
    OldestDelivery, "OldestDelivery", "Seconds", None;
    /// How many mailboxes nobody has leased. Written by `sweep`, each time it runs.
    MailboxesFree, "MailboxesFree", "Count", None;
}

/// The dimension of [`Metric::Requests`].
pub const OUTCOME: &str = "Outcome";

/// Outcomes of a request that are no error codes.
pub mod outcome {
    /// The upstream's response was delivered.
    pub const ANSWERED: &str = "answered";
    /// The request was kept, to be delivered later.
    pub const ACCEPTED: &str = "accepted";
    /// The response ended before its end.
    pub const BROKEN: &str = "broken";
    /// The public client went away before the response's end.
    pub const CLIENT_GONE: &str = "client_gone";
}

/// What is counted wherever it happens and written with the next line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// [`Metric::RunFailures`].
    RunFailures,
    /// [`Metric::TokensRefused`].
    TokensRefused,
    /// [`Metric::Throttles`].
    Throttles,
}

static RUN_FAILURES: AtomicU64 = AtomicU64::new(0);
static TOKENS_REFUSED: AtomicU64 = AtomicU64::new(0);
static THROTTLES: AtomicU64 = AtomicU64::new(0);

impl Counted {
    const ALL: [Self; 3] = [Self::RunFailures, Self::TokensRefused, Self::Throttles];

    const fn metric(self) -> Metric {
        match self {
            Self::RunFailures => Metric::RunFailures,
            Self::TokensRefused => Metric::TokensRefused,
            Self::Throttles => Metric::Throttles,
        }
    }

    fn total(self) -> &'static AtomicU64 {
        match self {
            Self::RunFailures => &RUN_FAILURES,
            Self::TokensRefused => &TOKENS_REFUSED,
            Self::Throttles => &THROTTLES,
        }
    }
}

/// Counts one. It is written by [`flush`], or with the function's own line before that.
pub fn count(what: Counted) {
    what.total().fetch_add(1, Ordering::Relaxed);
}

/// Where this process's metrics go; none before [`init`].
static NAMESPACE: OnceLock<Option<Box<str>>> = OnceLock::new();

/// Reads the environment, once. A second call changes nothing.
pub(crate) fn init() {
    NAMESPACE.get_or_init(|| {
        let namespace = std::env::var(env::METRICS_NAMESPACE).unwrap_or_default();
        (!namespace.is_empty()).then(|| namespace.into())
    });
}

/// Writes that this process was started.
pub fn cold_start() {
    let mut line = Line::begin();
    line.add(Metric::ColdStarts, 1.0);
    line.write();
}

/// Writes what was counted since, if anything was.
pub fn flush() {
    let counted = Counted::ALL.iter().any(|what| what.total().load(Ordering::Relaxed) > 0);
    if counted {
        Line::begin().write();
    }
}

/// One line, being put together.
#[derive(Debug)]
pub struct Line {
    namespace: Option<&'static str>,
    values: Vec<(Metric, f64)>,
    members: String,
}

impl Line {
    /// An empty line.
    #[must_use]
    pub fn begin() -> Self {
        Self::of(NAMESPACE.get().and_then(Option::as_deref))
    }

    fn of(namespace: Option<&'static str>) -> Self {
        Self { namespace, values: Vec::new(), members: String::new() }
    }

    /// Adds the value of a metric.
    pub fn add(&mut self, metric: Metric, value: f64) {
        if self.namespace.is_some() {
            self.values.push((metric, value));
        }
    }

    /// Adds a member that is no metric: the value of a dimension, or what a reader looks for.
    pub fn member(&mut self, name: &'static str, value: &str) {
        if self.namespace.is_some() {
            let value = serde_json::to_string(value).unwrap_or_default();
            // Writing to a string cannot fail.
            let _ = write!(self.members, ",\"{name}\":{value}");
        }
    }

    /// Writes it to standard output, together with what was counted. Without metrics nothing is written.
    pub fn write(mut self) {
        if self.namespace.is_none() {
            return;
        }
        for what in Counted::ALL {
            let total = what.total().swap(0, Ordering::Relaxed);
            if total > 0 {
                #[expect(clippy::cast_precision_loss, reason = "what one invocation counts is small")]
                self.values.push((what.metric(), total as f64));
            }
        }
        if let Some(text) = self.text(unix_now_ms()) {
            // Once for the whole line, so that lines do not mix. Who cannot log goes on working.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
        }
    }

    fn text(&self, now_ms: u64) -> Option<String> {
        let namespace = self.namespace?;
        if self.values.is_empty() {
            return None;
        }
        let mut text = String::with_capacity(512);
        let namespace = serde_json::to_string(namespace).unwrap_or_default();
        let _ = write!(text, "{{\"_aws\":{{\"Timestamp\":{now_ms},\"CloudWatchMetrics\":[");
        let mut sets = 0;
        for dimension in [None, Some(OUTCOME)] {
            let mut names = 0;
            for (metric, _) in self.values.iter().filter(|(metric, _)| metric.dimension() == dimension) {
                let between = match (names, sets) {
                    (0, 0) => "",
                    _ => ",",
                };
                if names == 0 {
                    let keys = dimension.map_or_else(String::new, |name| format!("\"{name}\""));
                    let _ = write!(
                        text,
                        "{between}{{\"Namespace\":{namespace},\"Dimensions\":[[{keys}]],\"Metrics\":["
                    );
                } else {
                    text.push_str(between);
                }
                let _ = write!(text, "{{\"Name\":\"{}\",\"Unit\":\"{}\"}}", metric.name(), metric.unit());
                names += 1;
            }
            if names > 0 {
                text.push_str("]}");
                sets += 1;
            }
        }
        text.push_str("]}");
        for (metric, value) in &self.values {
            let _ = write!(text, ",\"{}\":{value}", metric.name());
        }
        text.push_str(&self.members);
        text.push_str("}\n");
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_what_cloudwatch_reads() {
        let mut line = Line::of(Some("tunnel/dev"));
        line.add(Metric::Requests, 1.0);
        line.add(Metric::Latency, 12.5);
        line.add(Metric::Throttles, 2.0);
        line.member(OUTCOME, outcome::ANSWERED);
        line.member("request_id", "a\"\n");
        let text = line.text(1_790_000_000_123).unwrap();
        let expected = serde_json::json!({
            "_aws": {"Timestamp": 1_790_000_000_123_u64, "CloudWatchMetrics": [
                {"Namespace": "tunnel/dev", "Dimensions": [[]], "Metrics": [
                    {"Name": "Latency", "Unit": "Milliseconds"}, {"Name": "Throttles", "Unit": "Count"}]},
                {"Namespace": "tunnel/dev", "Dimensions": [["Outcome"]], "Metrics": [
                    {"Name": "Requests", "Unit": "Count"}]}]},
            "Requests": 1.0, "Latency": 12.5, "Throttles": 2.0, "Outcome": "answered", "request_id": "a\"\n",
        });
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        // Numbers are compared as numbers: 1 is 1.0.
        assert_eq!(read["Requests"].as_f64(), Some(1.0));
        assert_eq!(read["_aws"], expected["_aws"]);
        assert_eq!((&read["Outcome"], &read["request_id"]), (&expected["Outcome"], &expected["request_id"]));
        assert_eq!((read["Latency"].as_f64(), read["Throttles"].as_f64()), (Some(12.5), Some(2.0)));
        assert!(text.ends_with("}\n") && !text.trim_end().contains('\n'), "one line: {text}");
    }

    #[test]
    fn the_guide_has_every_metric_and_no_other() {
        let guide = include_str!("../../docs/operations.md");
        let (_, table) = guide.split_once("| metric | unit | dimension |").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .skip(2)
            .map(|row| row.split('|').map(|cell| cell.trim().trim_matches('`')).take(4).collect())
            .collect();
        let expected: Vec<Vec<&str>> = Metric::ALL
            .iter()
            .map(|metric| vec!["", metric.name(), metric.unit(), metric.dimension().unwrap_or_default()])
            .collect();
        assert_eq!(rows, expected);
    }

    #[test]
    fn each_kind_of_metric_alone_makes_a_whole_line() {
        for &metric in Metric::ALL {
            let mut line = Line::of(Some("t"));
            line.add(metric, 0.0);
            line.member(OUTCOME, "x");
            let read: serde_json::Value = serde_json::from_str(&line.text(0).unwrap()).unwrap();
            assert_eq!(read["_aws"]["CloudWatchMetrics"][0]["Metrics"][0]["Name"], metric.name());
            assert_eq!(read[metric.name()].as_f64(), Some(0.0));
        }
    }

    #[test]
    fn without_a_namespace_or_a_metric_there_is_no_line() {
        let mut line = Line::of(None);
        line.add(Metric::Requests, 1.0);
        line.member("request_id", "a");
        assert_eq!(line.text(0), None);
        let mut line = Line::of(Some("t"));
        line.member("request_id", "a");
        assert_eq!(line.text(0), None);
    }
}
