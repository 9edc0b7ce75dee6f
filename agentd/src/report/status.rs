//! What the running agent says of itself: the model of `status`, and how people read it. No IO.

use std::fmt::Write as _;

use proto::delivery::{Holds, Mode, NOTICE_CHARS, PolicyNotice};

use super::metrics::{self, Figures};

/// The state of the agent.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// How it names itself to the edge.
    pub(crate) agent_id: String,
    /// Unix seconds.
    pub(crate) started_at: u64,
    pub(crate) uptime_secs: u64,
    /// Whether systemd looks after it.
    pub(crate) systemd: bool,
    pub(crate) edge: EdgeStatus,
    pub(crate) config: ConfigStatus,
    /// Where the inspector's page is, while something is inspected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) inspector: Option<String>,
    pub(crate) tunnels: Vec<TunnelStatus>,
    /// What the configuration does not name any more and is not at its end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) removed: Vec<RemovedStatus>,
}

/// A tunnel that a reload has removed, while something of it is in flight.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct RemovedStatus {
    pub(crate) name: String,
    /// Requests that are being served.
    pub(crate) in_flight: u64,
    /// WebSockets that are open.
    pub(crate) websockets: u64,
}

/// The state of the link.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct EdgeStatus {
    pub(crate) url: String,
    pub(crate) state: LinkState,
    /// All connections, the newest first.
    pub(crate) connections: Vec<ConnectionStatus>,
    /// How many times in a row it failed to open the connection that is wanted now.
    pub(crate) failures: u32,
    /// When it tries again.
    pub(crate) next_try_ms: Option<u64>,
    /// Why the last try failed or the last connection ended.
    pub(crate) last_error: Option<String>,
}

/// Whether public requests reach the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LinkState {
    /// No connection is in service.
    Connecting,
    /// A connection is in service.
    Connected,
    /// The agent finishes what is in flight.
    Stopping,
}

impl LinkState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Stopping => "stopping",
        }
    }
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ConnectionStatus {
    /// Where it leads: another address than the edge's after a reload, until it is replaced.
    #[serde(default)]
    pub(crate) url: Option<String>,
    /// The edge's name for it, once it has said so.
    pub(crate) connection_id: Option<String>,
    pub(crate) state: ConnectionState,
    pub(crate) age_secs: u64,
    pub(crate) tunnels_open: usize,
    /// Once the edge has shown which it answers.
    #[serde(default)]
    pub(crate) watched_by: Option<WatchedBy>,
}

/// How a connection is watched while nothing goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WatchedBy {
    /// WebSocket pings, and a heartbeat every five minutes.
    Pings,
    /// A heartbeat every 25 seconds.
    Heartbeats,
}

impl WatchedBy {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Pings => "pings",
            Self::Heartbeats => "heartbeats",
        }
    }
}

/// What a connection is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ConnectionState {
    /// `hello` is not answered yet.
    Greeting,
    /// New requests come here.
    Serving,
    /// It serves until the next one does.
    BeingReplaced,
    /// It finishes what is in flight.
    Retiring,
}

/// Where the configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ConfigStatus {
    /// None for `agentd http`.
    pub(crate) file: Option<String>,
    /// Unix seconds.
    pub(crate) loaded_at: u64,
    pub(crate) reloads: u64,
    /// Why the last reload changed nothing, if it failed.
    pub(crate) last_error: Option<String>,
}

/// What of a tunnel is delivered later.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct DeliveryStatus {
    pub(crate) mode: Mode,
    /// Whether this edge keeps deliveries of the tunnel, once a connection is in service.
    pub(crate) kept: Option<bool>,
    /// What does not hold as the configuration says it, and what holds instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) notice: Option<String>,
}

impl DeliveryStatus {
    /// Of a tunnel at an edge that does or does not keep deliveries, and says this about the tunnel's.
    pub(crate) fn new(mode: Mode, kept: Option<bool>, notice: Option<&PolicyNotice>) -> Self {
        let is_live = notice.is_some_and(|notice| notice.holds == Holds::Live);
        Self { mode, kept: kept.map(|kept| kept && !is_live), notice: notice.map(noticed) }
    }

    fn described(&self) -> String {
        let kept = match (self.kept, &self.notice) {
            (_, Some(notice)) => format!(", but {notice}"),
            (Some(true), None) => String::new(),
            (Some(false), None) => ", but this edge keeps none: upgrade it".to_owned(),
            (None, None) => ", if the edge keeps any".to_owned(),
        };
        format!("{}{kept}", self.mode)
    }
}

/// What an edge says about a policy, in words. They are shown as text whatever the edge says.
pub(crate) fn noticed(notice: &PolicyNotice) -> String {
    let why: String = notice.why.chars().filter(|c| !c.is_control()).take(NOTICE_CHARS).collect();
    match notice.holds {
        Holds::Live => {
            format!("the edge does not take these settings, so nothing is kept (as with \"live\"): {why}")
        }
        Holds::Bounds => format!("the edge takes the nearest settings that it allows: {why}"),
        Holds::Other => format!("the edge does not take all of these settings: {why}"),
    }
}

/// One tunnel.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct TunnelStatus {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) state: TunnelState,
    /// The public address, once the edge has said so.
    pub(crate) url: Option<String>,
    /// None where routes lead everywhere.
    pub(crate) upstream: Option<String>,
    pub(crate) health: HealthState,
    /// The upstreams of its routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) routes: Vec<RouteStatus>,
    pub(crate) max_concurrent: u32,
    /// None for a tunnel that is only live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) delivery: Option<DeliveryStatus>,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

/// One upstream of a route.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct RouteStatus {
    /// Which route.
    pub(crate) route: String,
    pub(crate) upstream: String,
    pub(crate) health: HealthState,
}

/// Whether public requests reach a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum TunnelState {
    /// They do.
    Open,
    /// The edge has not said yet.
    Opening,
    /// The edge has said no.
    Refused {
        /// Why.
        reason: String,
    },
}

/// What the health checks of an upstream have come to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum HealthState {
    /// Nobody checks.
    Unchecked,
    /// The last check passed, or too few have failed in a row to say otherwise.
    Up,
    /// Too many checks in a row have failed.
    Down {
        /// Why the last one did.
        reason: String,
    },
}

impl Status {
    /// Whether every tunnel is open, and if not, why.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        match self.edge.state {
            LinkState::Stopping => return Err("the agent is stopping".to_owned()),
            LinkState::Connecting => {
                let why = self.edge.last_error.as_deref().map(|error| format!(": {error}"));
                return Err(format!("not connected to the edge{}", why.unwrap_or_default()));
            }
            LinkState::Connected => {}
        }
        if let Some(before) = self.edge.served_elsewhere() {
            let why = self.edge.last_error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            return Err(format!("still connected to {before}, not to {}{why}", self.edge.url));
        }
        let closed: Vec<&str> = self
            .tunnels
            .iter()
            .filter(|tunnel| tunnel.state != TunnelState::Open)
            .map(|tunnel| tunnel.name.as_str())
            .collect();
        if closed.is_empty() { Ok(()) } else { Err(format!("not open: {}", closed.join(", "))) }
    }

    /// How many tunnels are open.
    pub(crate) fn open(&self) -> usize {
        self.tunnels.iter().filter(|tunnel| tunnel.state == TunnelState::Open).count()
    }

    /// For people.
    pub(crate) fn to_text(&self) -> String {
        let mut text = format!(
            "agentd {} is running with pid {}{}, up {}\n",
            self.version,
            self.pid,
            if self.systemd { " under systemd" } else { "" },
            span(self.uptime_secs)
        );
        let _ = write!(text, "edge    {}  {}", self.edge.url, self.edge.state.as_str());
        let connection = self.edge.in_use();
        if let Some(connection) = connection
            && let Some(id) = &connection.connection_id
        {
            let _ = write!(text, ", connection {id}");
            if let Some(before) = self.edge.served_elsewhere() {
                let _ = write!(text, " to {before}");
            }
            let _ = write!(text, " for {}", span(connection.age_secs));
            if let Some(watched_by) = connection.watched_by {
                let _ = write!(text, ", watched by {}", watched_by.as_str());
            }
        }
        let is_replaced =
            connection.is_some_and(|connection| connection.state == ConnectionState::BeingReplaced);
        if is_replaced {
            text.push_str(", being replaced");
        }
        text.push('\n');
        if (self.edge.state == LinkState::Connecting || is_replaced)
            && let Some(error) = &self.edge.last_error
        {
            let next = self.edge.next_try_ms.map(|ms| format!(", next try in {:.1} s", ms as f64 / 1000.0));
            let _ = writeln!(
                text,
                "        failed {} times{}: {error}",
                self.edge.failures,
                next.unwrap_or_default()
            );
        }
        if let Some(file) = &self.config.file {
            let _ = writeln!(text, "config  {file}, {} reloads", self.config.reloads);
        }
        if let Some(error) = &self.config.last_error {
            let _ = writeln!(text, "        the last reload changed nothing: {error}");
        }
        if let Some(url) = &self.inspector {
            let _ = writeln!(text, "inspect {url}");
        }
        text.push('\n');
        text.push_str(&list(&self.tunnels));
        for RemovedStatus { name, in_flight, websockets } in &self.removed {
            let _ = writeln!(
                text,
                "\n{name} was removed by a reload; in flight: {in_flight} requests, {websockets} WebSockets"
            );
        }
        text
    }
}

impl EdgeStatus {
    /// The newest connection that is not taken out of service.
    fn in_use(&self) -> Option<&ConnectionStatus> {
        self.connections.iter().find(|connection| connection.state != ConnectionState::Retiring)
    }

    /// The address that is served where it is not the one that is wanted.
    fn served_elsewhere(&self) -> Option<&str> {
        use ConnectionState::{BeingReplaced, Serving};
        let serves = |connection: &&ConnectionStatus| matches!(connection.state, Serving | BeingReplaced);
        let url = self.connections.iter().find(serves)?.url.as_deref()?;
        (url != self.url).then_some(url)
    }
}

/// The tunnels as a table.
pub(crate) fn list(tunnels: &[TunnelStatus]) -> String {
    let mut rows = vec![
        [
            "NAME",
            "STATE",
            "PUBLIC URL",
            "UPSTREAM",
            "HEALTH",
            "IN FLIGHT",
            "WEBSOCKETS",
            "REQUESTS",
            "ERRORS",
        ]
        .map(str::to_owned),
    ];
    rows.extend(tunnels.iter().map(|tunnel| {
        [
            tunnel.name.clone(),
            tunnel.state.word().to_owned(),
            tunnel.url.clone().unwrap_or_else(|| "-".to_owned()),
            tunnel.upstream.clone().unwrap_or_else(|| "-".to_owned()),
            tunnel.health_word(),
            tunnel.figures.in_flight.to_string(),
            tunnel.figures.websockets.to_string(),
            tunnel.figures.requests.to_string(),
            tunnel.figures.errors.to_string(),
        ]
    }));
    let mut widths = [0; 9];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

impl TunnelState {
    const fn word(&self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Opening => "opening",
            Self::Refused { .. } => "refused",
        }
    }
}

impl HealthState {
    fn described(&self) -> String {
        match self {
            Self::Unchecked => "not checked".to_owned(),
            Self::Up => "up".to_owned(),
            Self::Down { reason } => format!("down: {reason}"),
        }
    }
}

const fn word_of(health: &HealthState) -> &'static str {
    match health {
        HealthState::Unchecked => "-",
        HealthState::Up => "up",
        HealthState::Down { .. } => "down",
    }
}

impl TunnelStatus {
    /// How its upstream is, or how many of those that are checked are well.
    fn health_word(&self) -> String {
        let routed = self.routes.iter().map(|route| &route.health);
        let checked: Vec<_> =
            routed.chain([&self.health]).filter(|health| **health != HealthState::Unchecked).collect();
        if self.routes.is_empty() || checked.is_empty() {
            return word_of(&self.health).to_owned();
        }
        let up = checked.iter().filter(|health| ***health == HealthState::Up).count();
        format!("{up} of {} up", checked.len())
    }

    /// Everything about one tunnel, for people.
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<15} {value}");
        };
        line("name", self.name.clone());
        line(
            "state",
            match &self.state {
                TunnelState::Refused { reason } => format!("refused: {reason}"),
                other => other.word().to_owned(),
            },
        );
        line("public url", self.url.clone().unwrap_or_else(|| "-".to_owned()));
        if let Some(upstream) = &self.upstream {
            line("upstream", upstream.clone());
            line(
                "health",
                match &self.health {
                    HealthState::Unchecked => "not checked: add a health_check to the tunnel".to_owned(),
                    checked => checked.described(),
                },
            );
        }
        for RouteStatus { route, upstream, health } in &self.routes {
            line("route", format!("{route}  {upstream}  {}", health.described()));
        }
        if let Some(delivery) = &self.delivery {
            line("delivery", delivery.described());
        }
        let figures = &self.figures;
        line("in flight", format!("{} of {}", figures.in_flight, self.max_concurrent));
        line("websockets", figures.websockets.to_string());
        line("requests", figures.requests.to_string());
        line("errors", figures.errors.to_string());
        line("request bytes", figures.request_bytes.to_string());
        line("response bytes", figures.response_bytes.to_string());
        let now = metrics::unix_now().as_secs();
        let ago = |at: u64| format!("{} ago", span(now.saturating_sub(at)));
        line("last delivery", figures.last_delivery_at.map_or_else(|| "never".to_owned(), ago));
        text
    }
}

/// A span of time for people: its two largest units.
fn span(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs} s"),
        60..3_600 => format!("{} min {} s", secs / 60, secs % 60),
        3_600..86_400 => format!("{} h {} min", secs / 3_600, secs / 60 % 60),
        _ => format!("{} d {} h", secs / 86_400, secs / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let tunnel = |name: &str, state| TunnelStatus {
            name: name.into(),
            state,
            url: (name == "web").then(|| "https://web.example.com".into()),
            upstream: Some("http://localhost:3000".into()),
            health: HealthState::Unchecked,
            routes: Vec::new(),
            max_concurrent: 64,
            delivery: None,
            figures: Figures { requests: 12, ..Figures::default() },
        };
        Status {
            version: "1.2.3".into(),
            pid: 7,
            agent_id: "agent-1".into(),
            started_at: 1,
            uptime_secs: 75,
            systemd: false,
            edge: EdgeStatus {
                url: "wss://edge/".into(),
                state: LinkState::Connected,
                connections: vec![ConnectionStatus {
                    url: Some("wss://edge/".into()),
                    connection_id: Some("abc=".into()),
                    state: ConnectionState::Serving,
                    age_secs: 3_700,
                    tunnels_open: 1,
                    watched_by: Some(WatchedBy::Pings),
                }],
                failures: 0,
                next_try_ms: None,
                last_error: None,
            },
            config: ConfigStatus { file: Some("/a.toml".into()), loaded_at: 1, reloads: 2, last_error: None },
            inspector: None,
            tunnels: vec![
                tunnel("web", TunnelState::Open),
                tunnel("longer-name", TunnelState::Refused { reason: "taken".into() }),
            ],
            removed: Vec::new(),
        }
    }

    #[test]
    fn what_is_in_flight_of_a_removed_tunnel_is_said() {
        let before = status().to_text();
        let removed = vec![RemovedStatus { name: "old".into(), in_flight: 2, websockets: 1 }];
        let text = Status { removed, ..status() }.to_text();
        let wanted = "\nold was removed by a reload; in flight: 2 requests, 1 WebSockets\n";
        assert_eq!(text.strip_prefix(&before), Some(wanted), "{text}");
    }

    #[test]
    fn people_read_a_table() {
        let text = status().to_text();
        let wanted = "agentd 1.2.3 is running with pid 7, up 1 min 15 s
edge    wss://edge/  connected, connection abc= for 1 h 1 min, watched by pings
config  /a.toml, 2 reloads

NAME         STATE    PUBLIC URL               UPSTREAM               HEALTH  IN FLIGHT  WEBSOCKETS  REQUESTS  ERRORS
web          open     https://web.example.com  http://localhost:3000  -       0          0           12        0
longer-name  refused  -                        http://localhost:3000  -       0          0           12        0
";
        assert_eq!(text, wanted);
    }

    #[test]
    fn an_agent_is_ready_when_all_of_its_tunnels_are_open() {
        let mut status = status();
        assert_eq!(status.readiness(), Err("not open: longer-name".into()));
        status.tunnels.pop();
        assert_eq!(status.readiness(), Ok(()));
        status.edge.state = LinkState::Connecting;
        status.edge.last_error = Some("refused".into());
        assert_eq!(status.readiness(), Err("not connected to the edge: refused".into()));
        status.edge.state = LinkState::Stopping;
        assert_eq!(status.readiness(), Err("the agent is stopping".into()));
    }

    #[test]
    fn a_connection_that_cannot_be_replaced_is_told_from_one_that_serves_as_configured() {
        let mut status = status();
        status.tunnels.pop();
        status.edge.connections[0].state = ConnectionState::BeingReplaced;
        let line = |status: &Status| status.to_text().lines().skip(1).take(2).collect::<Vec<_>>().join("\n");
        let of_an_hour = "edge    wss://edge/  connected, connection abc= for 1 h 1 min, watched by pings";
        assert_eq!(line(&status), format!("{of_an_hour}, being replaced\nconfig  /a.toml, 2 reloads"));
        assert_eq!(status.readiness(), Ok(()), "it is an hour old, and leads where it should");

        status.edge.url = "wss://new/".into();
        (status.edge.failures, status.edge.next_try_ms) = (3, Some(1_500));
        status.edge.last_error = Some("refused".into());
        assert_eq!(
            line(&status),
            "edge    wss://new/  connected, connection abc= to wss://edge/ for 1 h 1 min, watched by pings, being replaced
        failed 3 times, next try in 1.5 s: refused"
        );
        let why = "still connected to wss://edge/, not to wss://new/: refused";
        assert_eq!(status.readiness(), Err(why.into()));
    }

    #[test]
    fn upstreams_of_routes_are_counted_and_told_apart() {
        let down = HealthState::Down { reason: "refused".into() };
        let route = |upstream: &str, health: &HealthState| RouteStatus {
            route: "/api".into(),
            upstream: upstream.into(),
            health: health.clone(),
        };
        let mut tunnel = status().tunnels.remove(0);
        tunnel.routes = vec![route("http://localhost:1", &HealthState::Unchecked)];
        assert_eq!(tunnel.health_word(), "-");
        tunnel
            .routes
            .extend([route("http://localhost:2", &down), route("http://localhost:3", &HealthState::Up)]);
        assert_eq!(tunnel.health_word(), "1 of 2 up");
        tunnel.health = HealthState::Up;
        assert_eq!(tunnel.health_word(), "2 of 3 up");
        let text = tunnel.to_text();
        for line in [
            "health          up\n",
            "route           /api  http://localhost:1  not checked\n",
            "route           /api  http://localhost:2  down: refused\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        tunnel.upstream = None;
        assert!(
            !tunnel.to_text().contains("upstream") && list(&[tunnel]).contains("  -         2 of 3 up  ")
        );
    }

    #[test]
    fn programs_read_what_was_written() {
        let text = serde_json::to_string(&status()).unwrap();
        assert!(text.contains(r#""name":"longer-name","state":"refused","reason":"taken""#), "{text}");
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status());
    }
}
