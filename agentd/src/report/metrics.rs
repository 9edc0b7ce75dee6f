//! What is counted, and how it is named for Prometheus.
//!
//! Enters: what requests, connections and reloads come to. Leaves: OpenMetrics text. A request costs a
//! few atomic additions: the handles of a tunnel are looked up once, when it is set up. Every label has a
//! bounded set of values; series of a tunnel that was removed go with the last request that is in flight there.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use proto::{error::ErrorCode, id::TunnelName};

use crate::report::{denial::DeniedBy, telemetry};

/// Upper bounds of the latency buckets, in seconds: from a local answer to the longest wait for a head.
const LATENCY_BUCKETS: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0];

/// How the metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// What every reader understands, and whoever does not ask gets.
    Prometheus,
    /// For those that ask for it.
    OpenMetrics,
}

impl Format {
    /// What an `accept` field prefers.
    pub(crate) fn wanted(accept: &str) -> Self {
        let weight = |kinds: &[&str]| {
            let ranges = accept.split(',').filter_map(|range| {
                let mut parts = range.split(';').map(str::trim);
                let kind = parts.next()?;
                let quality = parts.filter_map(|part| part.strip_prefix("q=")).next();
                let quality = quality.map_or(Some(1.0), |quality| quality.parse::<f64>().ok())?;
                kinds.iter().any(|wanted| kind.eq_ignore_ascii_case(wanted)).then_some(quality)
            });
            ranges.fold(0.0, f64::max)
        };
        let open = weight(&["application/openmetrics-text"]);
        if open > 0.0 && open >= weight(&["text/plain"]) { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// The media type.
    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// OpenMetrics text in the words of the older format, which names the samples of counters and infos where the newer
/// one names their families, and has no units and no end.
fn to_prometheus(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut help: Option<(&str, &str)> = None;
    for line in open.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(of, _)| *of == name) {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTunnel {
    tunnel: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStatus {
    tunnel: String,
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCode {
    tunnel: String,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRule {
    tunnel: String,
    denied_by: &'static str,
}

/// One of the upstreams of a route, where health checks say how it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfRoute {
    pub(crate) tunnel: String,
    pub(crate) route: String,
    pub(crate) upstream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Because {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Came {
    result: &'static str,
}

type LatencyFamily = Family<OfTunnel, Histogram, fn() -> Histogram>;

fn latency() -> Histogram {
    Histogram::new(LATENCY_BUCKETS)
}

/// The series of tunnels.
struct Series {
    /// The handles that somebody has.
    live: Mutex<BTreeMap<String, Weak<TunnelMetrics>>>,
    requests: Family<OfStatus, Counter>,
    errors: Family<OfCode, Counter>,
    denied: Family<OfRule, Counter>,
    in_flight: Family<OfTunnel, Gauge>,
    websockets: Family<OfTunnel, Gauge>,
    duration: LatencyFamily,
    head: LatencyFamily,
    request_bytes: Family<OfTunnel, Counter>,
    response_bytes: Family<OfTunnel, Counter>,
    last_delivery: Family<OfTunnel, Gauge<f64, AtomicU64>>,
}

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Registry,
    series: Arc<Series>,
    health: Arc<Health>,
    connections: Gauge,
    tunnels_open: Gauge,
    reconnects: Family<Because, Counter>,
    dial_failures: Family<Because, Counter>,
    reloads: Family<Came, Counter>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("agentd");
        let series = Series {
            live: Mutex::default(),
            requests: Family::default(),
            errors: Family::default(),
            denied: Family::default(),
            in_flight: Family::default(),
            websockets: Family::default(),
            duration: Family::new_with_constructor(latency),
            head: Family::new_with_constructor(latency),
            request_bytes: Family::default(),
            response_bytes: Family::default(),
            last_delivery: Family::default(),
        };
        let metrics = Self {
            series: Arc::new(series),
            health: Arc::default(),
            connections: Gauge::default(),
            tunnels_open: Gauge::default(),
            reconnects: Family::default(),
            dial_failures: Family::default(),
            reloads: Family::default(),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Public requests that ended, by status class",
            metrics.series.requests.clone(),
        );
        registry.register(
            "request_errors",
            "Public requests that the upstream did not answer whole, by error code",
            metrics.series.errors.clone(),
        );
        registry.register(
            "requests_denied",
            "Public requests that a rule of their tunnel refused, by the rule",
            metrics.series.denied.clone(),
        );
        registry.register(
            "requests_in_flight",
            "Public requests being served",
            metrics.series.in_flight.clone(),
        );
        registry.register(
            "websockets_open",
            "Public WebSockets that are open",
            metrics.series.websockets.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "From a request's arrival to the last byte of its response",
            Unit::Seconds,
            metrics.series.duration.clone(),
        );
        registry.register_with_unit(
            "upstream_head",
            "From a request's arrival to the head of the upstream's response",
            Unit::Seconds,
            metrics.series.head.clone(),
        );
        registry.register_with_unit(
            "request_body",
            "Bytes of request bodies",
            Unit::Bytes,
            metrics.series.request_bytes.clone(),
        );
        registry.register_with_unit(
            "response_body",
            "Bytes of response bodies",
            Unit::Bytes,
            metrics.series.response_bytes.clone(),
        );
        registry.register_with_unit(
            "last_delivery_timestamp",
            "When the upstream's answer to a request was last delivered whole, Unix time",
            Unit::Seconds,
            metrics.series.last_delivery.clone(),
        );
        registry.register_collector(Box::new(ShownHealth(Arc::clone(&metrics.health))));
        registry.register("connections", "Connections in service", metrics.connections.clone());
        registry.register("tunnels_open", "Tunnels that the edge has opened", metrics.tunnels_open.clone());
        registry.register(
            "reconnects",
            "Connections that were replaced or lost, by reason",
            metrics.reconnects.clone(),
        );
        registry.register(
            "dial_failures",
            "Connections that could not be opened, by reason",
            metrics.dial_failures.clone(),
        );
        registry.register("reloads", "Reloads of the configuration, by result", metrics.reloads.clone());
        registry.register_collector(Box::new(LostLines));
        let started = Gauge::<f64, AtomicU64>::default();
        started.set(unix_now().as_secs_f64());
        registry.register_with_unit(
            "start_time",
            "When the agent started, Unix time",
            Unit::Seconds,
            started,
        );
        let build = prometheus_client::metrics::info::Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", build);
        Self { registry, ..metrics }
    }

    /// Everything in a format.
    pub(crate) fn in_format(&self, format: Format) -> String {
        match format {
            Format::OpenMetrics => self.text(),
            Format::Prometheus => to_prometheus(&self.text()),
        }
    }

    /// Everything as OpenMetrics text.
    fn text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing into memory does not fail");
        text
    }

    /// The handles of one tunnel. The same name gets the same ones while anybody has them, so that counts outlive a change.
    pub(crate) fn tunnel(&self, name: &TunnelName) -> Arc<TunnelMetrics> {
        let tunnel = name.to_string();
        let mut live = lock(&self.series.live);
        if let Some(known) = live.get(&tunnel).and_then(Weak::upgrade) {
            return known;
        }
        let of = OfTunnel { tunnel: tunnel.clone() };
        let series = &self.series;
        let requests = STATUS_CLASSES
            .map(|status| series.requests.get_or_create_owned(&OfStatus { tunnel: tunnel.clone(), status }));
        let new = Arc::new(TunnelMetrics {
            requests,
            in_flight: series.in_flight.get_or_create_owned(&of),
            websockets: series.websockets.get_or_create_owned(&of),
            duration: series.duration.get_or_create_owned(&of),
            head: series.head.get_or_create_owned(&of),
            request_bytes: series.request_bytes.get_or_create_owned(&of),
            response_bytes: series.response_bytes.get_or_create_owned(&of),
            last_delivery: series.last_delivery.get_or_create_owned(&of),
            series: Arc::clone(series),
            tunnel,
        });
        live.insert(of.tunnel, Arc::downgrade(&new));
        new
    }

    /// Every tunnel whose handles somebody has, and its figures.
    pub(crate) fn tunnels(&self) -> Vec<(String, Figures)> {
        let live: Vec<_> = lock(&self.series.live).values().filter_map(Weak::upgrade).collect();
        live.iter().map(|tunnel| (tunnel.tunnel.clone(), tunnel.figures())).collect()
    }

    /// From now on shows the health of these upstreams, and of no others: 1 for one that passes its checks.
    pub(crate) fn show_health(&self, checked: impl Iterator<Item = (Checked, Gauge)>) {
        *lock(&self.health) = checked.collect();
    }

    /// Counts a connection that was replaced or lost.
    pub(crate) fn reconnected(&self, reason: &'static str) {
        self.reconnects.get_or_create(&Because { reason }).inc();
    }

    /// Counts a connection that could not be opened.
    pub(crate) fn dial_failed(&self, reason: &'static str) {
        self.dial_failures.get_or_create(&Because { reason }).inc();
    }

    /// Counts a reload.
    pub(crate) fn reloaded(&self, result: &'static str) {
        self.reloads.get_or_create(&Came { result }).inc();
    }

    /// Notes what is in service now.
    pub(crate) fn in_service(&self, connections: usize, tunnels_open: usize) {
        self.connections.set(connections as i64);
        self.tunnels_open.set(tunnels_open as i64);
    }
}

impl Series {
    /// Forgets those of a tunnel that is no more.
    fn forget(&self, tunnel: &str) {
        for status in STATUS_CLASSES {
            self.requests.remove(&OfStatus { tunnel: tunnel.to_owned(), status });
        }
        for code in ErrorCode::ALL.iter().map(|code| code.as_str()) {
            self.errors.remove(&OfCode { tunnel: tunnel.to_owned(), code });
        }
        for rule in DeniedBy::ALL {
            self.denied.remove(&OfRule { tunnel: tunnel.to_owned(), denied_by: rule.as_str() });
        }
        let of = OfTunnel { tunnel: tunnel.to_owned() };
        self.in_flight.remove(&of);
        self.websockets.remove(&of);
        self.duration.remove(&of);
        self.head.remove(&of);
        self.request_bytes.remove(&of);
        self.response_bytes.remove(&of);
        self.last_delivery.remove(&of);
    }
}

impl Drop for TunnelMetrics {
    fn drop(&mut self) {
        let mut live = lock(&self.series.live);
        // Somebody may have asked for the same name meanwhile.
        if live.get(&self.tunnel).is_some_and(|known| known.strong_count() == 0) {
            live.remove(&self.tunnel);
            self.series.forget(&self.tunnel);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An upstream that is checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Checked {
    /// The tunnel's own.
    Tunnel(TunnelName),
    /// One of a route.
    Route(OfRoute),
}

/// What the upstreams that are checked now are, and how they are.
type Health = Mutex<HashMap<Checked, Gauge>>;

/// The health of what is served when somebody asks: no check writes anything here.
#[derive(Debug)]
struct ShownHealth(Arc<Health>);

impl Collector for ShownHealth {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (tunnels, routes) = (Family::<OfTunnel, Gauge>::default(), Family::<OfRoute, Gauge>::default());
        for (of, healthy) in &*lock(&self.0) {
            match of {
                Checked::Tunnel(name) => {
                    tunnels.get_or_create(&OfTunnel { tunnel: name.to_string() }).set(healthy.get());
                }
                Checked::Route(of) => {
                    routes.get_or_create(of).set(healthy.get());
                }
            }
        }
        if !tunnels.is_empty() {
            let help = "Whether the upstream passes its health check; only for tunnels that have one.";
            let metric = encoder.encode_descriptor("upstream_healthy", help, None, tunnels.metric_type())?;
            tunnels.encode(metric)?;
        }
        if !routes.is_empty() {
            let help = "Whether an upstream of a route passes the route's health check; only for routes that have one.";
            let metric =
                encoder.encode_descriptor("route_upstream_healthy", help, None, routes.metric_type())?;
            routes.encode(metric)?;
        }
        Ok(())
    }
}

/// What the log itself counts.
#[derive(Debug)]
struct LostLines;

impl Collector for LostLines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let lost = ConstCounter::new(telemetry::lost_lines());
        let help = "Lines of log and output that were lost because their reader is slow or they could not be written";
        let metric = encoder.encode_descriptor("log_lines_lost", help, None, lost.metric_type())?;
        lost.encode(metric)
    }
}

/// 499, a public client that left, is among the third.
const STATUS_CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// The handles of one tunnel.
pub(crate) struct TunnelMetrics {
    tunnel: String,
    series: Arc<Series>,
    requests: [Counter; 4],
    /// Also what `max_concurrent` is compared with.
    pub(crate) in_flight: Gauge,
    /// Also what `max_websockets` is compared with.
    pub(crate) websockets: Gauge,
    duration: Histogram,
    head: Histogram,
    request_bytes: Counter,
    response_bytes: Counter,
    last_delivery: Gauge<f64, AtomicU64>,
}

/// What a request came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) status: u16,
    pub(crate) error: Option<&'static str>,
    pub(crate) denied_by: Option<DeniedBy>,
    pub(crate) duration: Duration,
    pub(crate) head: Option<Duration>,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
}

impl TunnelMetrics {
    /// Counts a request.
    pub(crate) fn ended(&self, ended: &Ended) {
        let class = usize::from(ended.status / 100).clamp(2, 5) - 2;
        self.requests[class].inc();
        self.duration.observe(ended.duration.as_secs_f64());
        if let Some(head) = ended.head {
            self.head.observe(head.as_secs_f64());
        }
        self.request_bytes.inc_by(ended.request_bytes);
        self.response_bytes.inc_by(ended.response_bytes);
        if let Some(rule) = ended.denied_by {
            let of = OfRule { tunnel: self.tunnel.clone(), denied_by: rule.as_str() };
            self.series.denied.get_or_create(&of).inc();
        }
        match ended.error {
            None => {
                self.last_delivery.set(unix_now().as_secs_f64());
            }
            Some(code) => {
                self.series.errors.get_or_create(&OfCode { tunnel: self.tunnel.clone(), code }).inc();
            }
        }
    }

    fn errors_with(&self, code: &'static str) -> Option<u64> {
        self.series.errors.get(&OfCode { tunnel: self.tunnel.clone(), code }).map(|counter| counter.get())
    }

    /// The figures for `status`.
    pub(crate) fn figures(&self) -> Figures {
        let last = self.last_delivery.get();
        Figures {
            in_flight: u64::try_from(self.in_flight.get()).unwrap_or(0),
            websockets: u64::try_from(self.websockets.get()).unwrap_or(0),
            requests: self.requests.iter().map(Counter::get).sum(),
            errors: ErrorCode::ALL.iter().filter_map(|code| self.errors_with(code.as_str())).sum(),
            request_bytes: self.request_bytes.get(),
            response_bytes: self.response_bytes.get(),
            last_delivery_at: (last > 0.0).then_some(last as u64),
        }
    }
}

/// What `status` says of a tunnel's requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Figures {
    /// Being served.
    pub(crate) in_flight: u64,
    /// WebSockets that are open.
    #[serde(default)]
    pub(crate) websockets: u64,
    /// Ended so far.
    pub(crate) requests: u64,
    /// Of those, not answered whole by the upstream.
    pub(crate) errors: u64,
    /// Bytes of request bodies.
    pub(crate) request_bytes: u64,
    /// Bytes of response bodies.
    pub(crate) response_bytes: u64,
    /// When an answer was last delivered whole, Unix seconds.
    pub(crate) last_delivery_at: Option<u64>,
}

pub(crate) fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: u16, error: Option<&'static str>) -> Ended {
        Ended {
            status,
            error,
            denied_by: None,
            duration: Duration::from_millis(3),
            head: Some(Duration::from_millis(2)),
            request_bytes: 5,
            response_bytes: 7,
        }
    }

    #[test]
    fn openmetrics_is_for_those_who_ask() {
        for (accept, wanted) in [
            ("", Format::Prometheus),
            ("*/*", Format::Prometheus),
            ("text/plain;version=0.0.4", Format::Prometheus),
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.8",
                Format::Prometheus,
            ),
            ("application/openmetrics-text;q=0", Format::Prometheus),
            ("application/openmetrics-text", Format::OpenMetrics),
            (
                "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
        ] {
            assert_eq!(Format::wanted(accept), wanted, "{accept}");
        }
    }

    #[test]
    fn the_older_format_names_samples_and_has_a_help_and_a_type_for_each() {
        let metrics = Metrics::new();
        let web = metrics.tunnel(&"web".parse().unwrap());
        web.ended(&ended(200, None));
        let text = metrics.in_format(Format::Prometheus);
        for line in [
            "# TYPE agentd_requests_total counter",
            "agentd_requests_total{tunnel=\"web\",status=\"2xx\"} 1",
            "# TYPE agentd_build_info gauge",
            "# TYPE agentd_request_duration_seconds histogram",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("# EOF") && !text.contains("# UNIT") && !text.contains(" info\n"), "{text}");
        let named = |kind: &str| text.lines().filter(|line| line.starts_with(kind)).count();
        assert_eq!(named("# HELP "), named("# TYPE "));
    }

    #[test]
    fn requests_are_counted_by_class_and_code_and_forgotten_with_their_tunnel() {
        let metrics = Metrics::new();
        let name: TunnelName = "web".parse().unwrap();
        let web = metrics.tunnel(&name);
        web.ended(&ended(200, None));
        web.ended(&ended(302, None));
        web.ended(&ended(499, Some("cancelled")));
        web.ended(&ended(502, Some("upstream_reset")));
        web.ended(&Ended { denied_by: Some(DeniedBy::MaxBody), ..ended(413, Some("body_too_large")) });
        let text = metrics.text();
        for line in [
            "agentd_requests_total{tunnel=\"web\",status=\"2xx\"} 1",
            "agentd_requests_total{tunnel=\"web\",status=\"4xx\"} 2",
            "agentd_requests_denied_total{tunnel=\"web\",denied_by=\"max_body\"} 1",
            "agentd_request_errors_total{tunnel=\"web\",code=\"upstream_reset\"} 1",
            "agentd_request_duration_seconds_bucket{le=\"0.0025\",tunnel=\"web\"} 0",
            "agentd_request_duration_seconds_bucket{le=\"0.005\",tunnel=\"web\"} 5",
            "agentd_request_body_bytes_total{tunnel=\"web\"} 25",
            "agentd_response_body_bytes_total{tunnel=\"web\"} 35",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        let figures = metrics.tunnel(&name).figures();
        assert_eq!((figures.requests, figures.errors), (5, 3), "the counts outlive a change");
        drop(web);
        assert!(!metrics.text().contains("web"), "{}", metrics.text());
    }
}
