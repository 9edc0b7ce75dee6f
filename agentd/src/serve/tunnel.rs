//! The tunnels of this agent as they run: each with its upstream, its rules, its limit and its health.
//!
//! Enters: configurations, the first one and those of reloads. Leaves: the tunnel of a request, and a
//! [`Place`] for it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use proto::{
    delivery::bounds,
    error::ErrorCode,
    id::{RequestId, TunnelName},
    limits,
    session::Service,
};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use crate::{
    capture::ring::{Captures, Lens},
    config::{
        HealthCheck, HostHeader, TunnelConfig,
        address::Address,
        traffic::{RouteRule, RouteTarget},
    },
    report::cause::Causes,
    report::metrics::{self, Metrics, OfRoute, TunnelMetrics},
    report::status::{HealthState, RemovedStatus, RouteStatus},
    serve::carried::{Carried, OfTunnel},
    serve::health::{Asked, Check, Checked, Health},
    serve::hint::{self, Given, Hint, Refusal},
    serve::host::HostRule,
    serve::origin::Rewrites,
    serve::policy::{Policy, traffic::Member},
    serve::upstream::{Upstream, Way},
    tls::TlsError,
};

/// How many bytes of announced request bodies may be held at a time, for all tunnels together.
/// A body waits for its share before it is asked for.
const UPLOAD_BUDGET_BYTES: usize = 32 * 1024 * 1024;

/// How much of the time may have passed that the edge still waits, when a request has come.
const EDGE_WAITS_LESS: Duration = Duration::from_secs(10);

/// The budget is counted in units of this many bytes.
const BUDGET_UNIT_BYTES: usize = 1024;

/// One tunnel as it runs.
pub(crate) struct Tunnel {
    config: TunnelConfig,
    /// Where requests go that no route takes, and what `host` says there.
    pub(crate) own: Option<(Arc<Upstream>, HostRule)>,
    pub(crate) request_timeout: Duration,
    health: Arc<Health>,
    metrics: Arc<TunnelMetrics>,
    /// How many deliveries are served now.
    deliveries: Arc<AtomicU32>,
    causes: Arc<Causes>,
    hints: Arc<Given>,
    policy: Option<Policy>,
    /// Whether it was said that the edge waits less long.
    told_less: Arc<AtomicBool>,
    /// What makes its requests visible to the inspector.
    lens: Option<Lens>,
    /// The public address, once the edge has said it: what checks of a tunnel that preserves its name wait for.
    public: Arc<watch::Sender<Option<String>>>,
}

/// A tunnel that is served, with the checks of its upstreams: they end with the service and not with the last request that
/// is in flight.
struct Served {
    tunnel: Arc<Tunnel>,
    checks: Checks,
}

/// Checks, each of a tunnel's own upstream or of one of a route.
type Checks = Vec<(Option<OfRoute>, Arc<Check>)>;

/// The settings of what depends on none but the tunnel's name.
#[derive(PartialEq)]
struct NameAlone;

/// A request's place at its tunnel, given back when it is dropped.
pub(crate) struct Place {
    of_tunnel: Arc<TunnelMetrics>,
    of_all: Arc<AtomicU32>,
}

/// A delivery's place at its tunnel, given back when it is dropped.
pub(crate) struct DeliveryPlace(Arc<AtomicU32>);

impl Drop for DeliveryPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A WebSocket's place at its tunnel, given back when it is dropped.
pub(crate) struct SocketPlace(Arc<TunnelMetrics>);

impl Drop for SocketPlace {
    fn drop(&mut self) {
        self.0.websockets.dec();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of_tunnel.in_flight.dec();
        self.of_all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All tunnels of this process, and what they share.
pub(crate) struct Tunnels {
    by_name: Mutex<BTreeMap<TunnelName, Served>>,
    /// Out of the configuration, but still served while requests that were dispatched just before arrive.
    leaving: Mutex<BTreeMap<TunnelName, Served>>,
    carried: Carried,
    in_flight: Arc<AtomicU32>,
    max_concurrent: AtomicU32,
    uploads: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    captures: Arc<Captures>,
}

/// Tunnels that are set up and not yet served.
pub(crate) struct Prepared {
    by_name: BTreeMap<TunnelName, Served>,
    max_concurrent: u32,
}

impl Tunnels {
    /// Sets up each configured tunnel. Nothing is dialled but by health checks.
    pub(crate) fn new(
        configs: &[TunnelConfig],
        max_concurrent: u32,
        metrics: Arc<Metrics>,
        captures: Arc<Captures>,
    ) -> Result<Self, TlsError> {
        let tunnels = Self {
            by_name: Mutex::default(),
            leaving: Mutex::default(),
            carried: Carried::default(),
            in_flight: Arc::default(),
            max_concurrent: AtomicU32::new(max_concurrent),
            uploads: Arc::new(Semaphore::new(UPLOAD_BUDGET_BYTES / BUDGET_UNIT_BYTES)),
            metrics,
            captures,
        };
        let prepared = tunnels.prepare(configs, max_concurrent)?;
        tunnels.replace(prepared);
        Ok(tunnels)
    }

    /// Sets up what another configuration wants; what its unchanged settings have come to is carried over. Until
    /// [`Self::replace`] nobody notices.
    ///
    /// # Errors
    ///
    /// [`TlsError`] when one of the tunnels cannot be set up.
    pub(crate) fn prepare(
        &self,
        configs: &[TunnelConfig],
        max_concurrent: u32,
    ) -> Result<Prepared, TlsError> {
        let mut by_name = BTreeMap::new();
        for config in configs {
            let carried = self.carried.of(&config.name);
            let served = Tunnel::served(config, carried, &self.metrics, &self.captures)?;
            by_name.insert(config.name.clone(), served);
        }
        Ok(Prepared { by_name, max_concurrent })
    }

    /// Serves exactly what was prepared. Requests in flight go on with the tunnel they began with, and
    /// those for a tunnel that is gone are served until [`Self::forget`].
    pub(crate) fn replace(&self, prepared: Prepared) {
        let Prepared { by_name, max_concurrent } = prepared;
        self.max_concurrent.store(max_concurrent, Ordering::Relaxed);
        let mut leaving = lock(&self.leaving);
        leaving.retain(|name, _| !by_name.contains_key(name));
        let before = std::mem::replace(&mut *lock(&self.by_name), by_name);
        let now = lock(&self.by_name);
        leaving.extend(before.into_iter().filter(|(name, _)| !now.contains_key(name)));
        let checks =
            now.iter().flat_map(|(name, served)| served.checks.iter().map(move |check| (name, check)));
        self.metrics.show_health(checks.map(|(name, (route, check))| {
            let of =
                route.clone().map_or_else(|| metrics::Checked::Tunnel(name.clone()), metrics::Checked::Route);
            (of, check.health().shown().clone())
        }));
        self.carried.tidy();
    }

    /// Ends the service for tunnels that are gone.
    pub(crate) fn forget(&self) {
        drop(std::mem::take(&mut *lock(&self.leaving)));
        self.carried.tidy();
    }

    pub(crate) fn get(&self, name: &TunnelName) -> Option<Arc<Tunnel>> {
        let of = |served: &Mutex<BTreeMap<TunnelName, Served>>| {
            lock(served).get(name).map(|served| Arc::clone(&served.tunnel))
        };
        of(&self.by_name).or_else(|| of(&self.leaving))
    }

    /// How many requests are served now, those for tunnels that are gone included.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Tunnels that no configuration names any more while something of them is in flight: how many requests and
    /// WebSockets.
    pub(crate) fn removed(&self) -> Vec<RemovedStatus> {
        let served = lock(&self.by_name);
        let is_served = |name: &str| served.keys().any(|known| known.as_str() == name);
        let gone = self.metrics.tunnels().into_iter().filter(|(name, _)| !is_served(name));
        let removed = gone.map(|(name, figures)| RemovedStatus {
            name,
            in_flight: figures.in_flight,
            websockets: figures.websockets,
        });
        removed.filter(|removed| removed.in_flight + removed.websockets > 0).collect()
    }

    /// The tunnels to be served, and what the edge shall keep for them.
    pub(crate) fn service(&self) -> Service {
        let tunnels = lock(&self.by_name);
        let kept = |(name, served): (&TunnelName, &Served)| {
            Some((name.to_string(), served.tunnel.config.delivery.clone()?))
        };
        Service {
            tunnels: tunnels.keys().cloned().collect(),
            deliveries: tunnels.iter().filter_map(kept).collect(),
        }
    }

    /// The tunnels to be served, in the order of their names.
    pub(crate) fn names(&self) -> Vec<TunnelName> {
        lock(&self.by_name).keys().cloned().collect()
    }

    /// A place for one more request at `tunnel`.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::TooManyRequests`] when this tunnel or all together serve as many as they may, and
    /// [`ErrorCode::UpstreamUnhealthy`].
    ///
    /// `is_own` for a request to the tunnel's own upstream.
    pub(crate) fn enter(&self, tunnel: &Tunnel, is_own: bool) -> Result<Place, ErrorCode> {
        let before = tunnel.metrics.in_flight.inc();
        let before_all = self.in_flight.fetch_add(1, Ordering::Relaxed);
        // From here on both are given back, whatever follows.
        let place = Place { of_tunnel: Arc::clone(&tunnel.metrics), of_all: Arc::clone(&self.in_flight) };
        if before >= i64::from(tunnel.config.max_concurrent)
            || before_all >= self.max_concurrent.load(Ordering::Relaxed)
        {
            return Err(ErrorCode::TooManyRequests);
        }
        if is_own && tunnel.health.is_down() {
            return Err(ErrorCode::UpstreamUnhealthy);
        }
        Ok(place)
    }

    /// A place for one more WebSocket at `tunnel`; `open` is how many there are at all tunnels.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::TooManyRequests`] when this tunnel or all together have as many as they may, and
    /// [`ErrorCode::UpstreamUnhealthy`].
    pub(crate) fn enter_socket(
        &self,
        tunnel: &Tunnel,
        is_own: bool,
        open: usize,
    ) -> Result<SocketPlace, ErrorCode> {
        let before = tunnel.metrics.websockets.inc();
        let place = SocketPlace(Arc::clone(&tunnel.metrics));
        if before >= i64::from(tunnel.config.max_websockets) || open >= limits::SOCKETS as usize {
            return Err(ErrorCode::TooManyRequests);
        }
        if is_own && tunnel.health.is_down() {
            return Err(ErrorCode::UpstreamUnhealthy);
        }
        Ok(place)
    }

    /// A share of the memory for announced bodies; none where no body may have so many bytes at once.
    pub(crate) async fn reserve_upload(&self, bytes: u64) -> Option<tokio::sync::OwnedSemaphorePermit> {
        if bytes > limits::REQUEST_BODY_BYTES as u64 {
            return None;
        }
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES as u64)).ok()?;
        Arc::clone(&self.uploads).acquire_many_owned(units).await.ok()
    }

    /// The same for a body that is on its way and cannot be told to wait; `None` where there is no room now.
    pub(crate) fn try_reserve_upload(&self, bytes: u64) -> Option<tokio::sync::OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES as u64)).ok()?;
        Arc::clone(&self.uploads).try_acquire_many_owned(units).ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tunnel {
    fn served(
        config: &TunnelConfig,
        carried: OfTunnel<'_>,
        metrics: &Metrics,
        captures: &Arc<Captures>,
    ) -> Result<Served, TlsError> {
        let name = &config.name;
        let way = Way::of(config)?;
        let public = carried.state(NameAlone, |_| watch::Sender::new(None));
        let mut checks = Checks::new();
        let mut own = None;
        let mut health = Arc::new(Health::new(None));
        if let Some(address) = &config.upstream {
            let upstream = upstream_at(None, address, &way, carried)?;
            let host = host_rule(config, &upstream);
            if let Some(settings) = &config.health_check {
                let is_said = format!("the upstream of {name} is");
                let check =
                    check_of(name, None, &upstream, (&way, &host, settings), &public, carried, is_said);
                health = Arc::clone(check.health());
                checks.push((None, check));
            }
            own = Some((upstream, host));
        }
        let policy = Policy::new(config, &way, carried, |address, route| {
            Self::member(config, (address, route), &way, &public, carried, &mut checks)
        })?;
        let tunnel = Self {
            config: config.clone(),
            own,
            request_timeout: config.request_timeout,
            health,
            metrics: metrics.tunnel(name),
            deliveries: carried.state(NameAlone, |_| AtomicU32::default()),
            causes: carried.state(NameAlone, |_| Causes::default()),
            hints: carried.state(NameAlone, |_| Given::default()),
            policy,
            told_less: carried.state(config.request_timeout, |_| AtomicBool::new(false)),
            lens: config.inspect.then(|| {
                let upstream = config.upstream.as_ref().map(ToString::to_string).unwrap_or_default();
                Lens::new(Arc::clone(captures), name.clone(), &upstream, config.inspect_body)
            }),
            public,
        };
        Ok(Served { tunnel: Arc::new(tunnel), checks })
    }

    /// The policy of a tunnel, apart from the tunnel.
    #[cfg(test)]
    pub(crate) fn policy_of(
        config: &TunnelConfig,
        carried: OfTunnel<'_>,
    ) -> Result<Option<Policy>, TlsError> {
        let way = Way::of(config)?;
        let public = Arc::new(watch::Sender::new(None));
        Policy::new(config, &way, carried, |address, route| {
            Self::member(config, (address, route), &way, &public, carried, &mut Checks::new())
        })
    }

    /// An upstream of a route; what checks it goes to `checks`.
    fn member(
        config: &TunnelConfig,
        (address, route): (&Address, &RouteRule),
        way: &Way,
        public: &Arc<watch::Sender<Option<String>>>,
        carried: OfTunnel<'_>,
        checks: &mut Checks,
    ) -> Result<Member, TlsError> {
        let name = &config.name;
        let upstream = upstream_at(Some(route.name()), address, way, carried)?;
        let host = host_rule(config, &upstream);
        let RouteTarget::Upstreams(_, Some(settings)) = &route.target else {
            return Ok(Member { upstream, host, health: Arc::new(Health::new(None)) });
        };
        let is_said = format!("{address}, an upstream of {name}, is");
        let checked = (way, &host, settings);
        let check = check_of(name, Some(route.name()), &upstream, checked, public, carried, is_said);
        let of = OfRoute { tunnel: name.to_string(), route: route.name(), upstream: address.to_string() };
        let health = Arc::clone(check.health());
        checks.push((Some(of), check));
        Ok(Member { upstream, host, health })
    }

    /// A place for one more delivery, so that however many the edge has woken the service meets no more than it was to.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::AgentBusy`] when there are as many as there may be; the edge tries again soon, and does not count it.
    pub(crate) fn enter_delivery(&self) -> Result<DeliveryPlace, ErrorCode> {
        let before = self.deliveries.fetch_add(1, Ordering::Relaxed);
        let place = DeliveryPlace(Arc::clone(&self.deliveries));
        let most = self
            .config
            .delivery
            .as_ref()
            .map_or(*bounds::MAX_CONCURRENT.end(), |policy| policy.max_concurrent);
        if before >= most { Err(ErrorCode::AgentBusy) } else { Ok(place) }
    }

    /// Where this tunnel's requests are counted.
    pub(crate) const fn metrics(&self) -> &Arc<TunnelMetrics> {
        &self.metrics
    }

    /// What makes its requests visible to the inspector, if they are to be.
    pub(crate) const fn lens(&self) -> Option<&Lens> {
        self.lens.as_ref()
    }

    /// Its settings.
    pub(crate) const fn config(&self) -> &TunnelConfig {
        &self.config
    }

    /// The address that the edge has opened it at, once that is known.
    pub(crate) fn public_url(&self) -> Option<String> {
        self.public.borrow().clone()
    }

    /// Notes the address that the edge has opened it at.
    pub(crate) fn opened_at(&self, url: &str) {
        self.public.send_if_modified(|known| {
            let news = known.as_deref() != Some(url);
            if news {
                *known = Some(url.to_owned());
            }
            news
        });
    }

    /// Says in the log why a request failed, if that is news.
    pub(crate) fn failed(&self, request_id: &RequestId, cause: &str) {
        if let Some(unsaid) = self.causes.failed(cause, Instant::now()) {
            let name = &self.config.name;
            tracing::warn!(
                tunnel_id = %name,
                request_id = %request_id,
                unsaid = (unsaid > 0).then_some(unsaid),
                "a request to {name} failed: {cause}"
            );
        }
    }

    /// Says so, as [`Self::edge_waits`] does, where an edge does it with each request only: some of the time may have
    /// passed by then.
    pub(crate) fn waited_for(&self, left: Duration) {
        if left + EDGE_WAITS_LESS < self.request_timeout {
            self.edge_waits(left);
        }
    }

    /// Says in the log, once, that the edge waits for less long than this tunnel would.
    pub(crate) fn edge_waits(&self, edge: Duration) {
        // Nobody asked for the default.
        if self.request_timeout != limits::REPLY_TIMEOUT
            && edge < self.request_timeout
            && !self.told_less.swap(true, Ordering::Relaxed)
        {
            let name = &self.config.name;
            tracing::warn!(
                tunnel_id = %name,
                "request_timeout of {name} is {:?}, but the edge waits about {} s for a head: raise replyTimeoutSecs of the edge, \
                 as far as its front allows",
                self.request_timeout,
                edge.as_secs_f64().round()
            );
        }
    }

    /// Says in the log that the upstream answers, if that is news.
    pub(crate) fn answered(&self) {
        if self.causes.answered() {
            tracing::info!(tunnel_id = %self.config.name, "the upstream of {} answers again", self.config.name);
        }
    }

    /// What would have helped against a refusal, if it is a known one and was not said before.
    pub(crate) fn hint(&self, refusal: &Refusal<'_>) -> Option<Hint> {
        hint::recognise(refusal).filter(|(place, _)| self.hints.first(*place)).map(|(_, hint)| hint)
    }

    /// Which hints its owner has been given.
    pub(crate) fn hints(&self) -> Arc<Given> {
        Arc::clone(&self.hints)
    }

    /// Whether addresses of the upstream in a response become public ones.
    pub(crate) const fn rewrites_location(&self) -> bool {
        self.config.rewrite_location
    }

    /// What of a request is said in the upstream's terms; `upgrade` for one that asks for another protocol.
    pub(crate) const fn rewrites(&self, upgrade: bool) -> Rewrites {
        Rewrites::of(self.config.rewrite_location, self.config.origin, upgrade)
    }

    /// How long a WebSocket may be silent.
    pub(crate) const fn websocket_idle_timeout(&self) -> Option<Duration> {
        self.config.websocket_idle_timeout
    }

    /// Whether the edge's entry in `Via` reaches the upstream.
    pub(crate) const fn says_via(&self) -> bool {
        self.config.via
    }

    /// What it asks of requests, if anything.
    pub(crate) const fn policy(&self) -> Option<&Policy> {
        self.policy.as_ref()
    }

    /// The upstreams of its routes.
    pub(crate) fn route_health(&self) -> Vec<RouteStatus> {
        let members = self.policy.iter().flat_map(|policy| policy.traffic().upstreams());
        let status = |(route, member): (&RouteRule, &Member)| RouteStatus {
            route: route.name(),
            upstream: member.upstream.address().to_string(),
            health: member.health.state(),
        };
        members.map(status).collect()
    }

    /// Whether the upstream is well.
    pub(crate) fn health(&self) -> HealthState {
        self.health.state()
    }
}

/// What `host` says to an upstream of a tunnel.
fn host_rule(config: &TunnelConfig, upstream: &Upstream) -> HostRule {
    match &config.host_header {
        HostHeader::Preserve => HostRule::Public,
        HostHeader::Value(value) => HostRule::Fixed(value.clone()),
        HostHeader::Upstream => HostRule::Fixed(upstream.authority().clone()),
    }
}

/// The upstream at an address: a tunnel's own, or that of a `route`. Its idle connections are as good as they were while it is
/// spoken to in the same way.
fn upstream_at(
    route: Option<String>,
    address: &Address,
    way: &Way,
    carried: OfTunnel<'_>,
) -> Result<Arc<Upstream>, TlsError> {
    carried.try_state((route, address.clone(), way.clone()), |(_, address, way)| way.to(address))
}

/// The checks of an upstream: of a tunnel's own, or of that of a `route`. `is_said` begins what the log says of it.
fn check_of(
    tunnel: &TunnelName,
    route: Option<String>,
    upstream: &Arc<Upstream>,
    (way, host, settings): (&Way, &HostRule, &HealthCheck),
    public: &Arc<watch::Sender<Option<String>>>,
    carried: OfTunnel<'_>,
    is_said: String,
) -> Arc<Check> {
    let checked = Checked {
        route,
        address: upstream.address().clone(),
        way: way.clone(),
        host: settings.host.clone().map_or_else(|| host.clone(), HostRule::Fixed),
        settings: settings.clone(),
    };
    carried.state(checked, |Checked { host, settings, .. }| {
        let tunnel = tunnel.clone();
        let changed = move |state: &HealthState| match state {
            HealthState::Down { reason } => {
                tracing::warn!(tunnel_id = %tunnel, "{is_said} down: {reason}");
            }
            HealthState::Up | HealthState::Unchecked => {
                tracing::info!(tunnel_id = %tunnel, "{is_said} up again");
            }
        };
        let (host, public, upstream) = (host.clone(), public.subscribe(), Arc::clone(upstream));
        Check::start(settings, Asked { host, public, upstream }, changed)
    })
}

#[cfg(test)]
mod tests;
