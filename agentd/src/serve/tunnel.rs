//! The tunnels of this agent as they run: each with its upstream, its rules, its limit and its health.
//!
//! Enters: configurations, the first one and those of reloads. Leaves: the tunnel of a request, and a
//! [`Place`] for it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
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
use rustls::pki_types::ServerName;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    capture::ring::{Captures, Lens},
    config::{
        HostHeader, Http2, TunnelConfig,
        address::{Address, Host, Scheme},
        traffic::{RouteRule, RouteTarget},
    },
    report::cause::Causes,
    report::metrics::{Metrics, OfRoute, TunnelMetrics},
    report::status::{HealthState, RouteStatus},
    serve::health::{self, Health},
    serve::hint::{self, Given, Hint, Refusal},
    serve::host::HostRule,
    serve::origin::Rewrites,
    serve::policy::{Policy, traffic::Member},
    serve::upstream::{Tls, Upstream},
    tls::{TlsError, Trust, client_config},
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
    causes: Causes,
    hints: Arc<Given>,
    policy: Option<Policy>,
    /// Whether it was said that the edge waits less long.
    told_less: AtomicBool,
    /// What makes its requests visible to the inspector.
    lens: Option<Lens>,
    /// The public address, once the edge has said it: what checks of a tunnel that preserves its name wait for.
    public: watch::Sender<Option<String>>,
    _check: Option<AbortOnDropHandle<()>>,
}

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
    by_name: Mutex<BTreeMap<TunnelName, Arc<Tunnel>>>,
    /// Out of the configuration, but still served while requests that were dispatched just before arrive.
    leaving: Mutex<BTreeMap<TunnelName, Arc<Tunnel>>>,
    in_flight: Arc<AtomicU32>,
    max_concurrent: AtomicU32,
    uploads: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    captures: Arc<Captures>,
}

/// Tunnels that are set up and not yet served.
pub(crate) struct Prepared {
    by_name: BTreeMap<TunnelName, Arc<Tunnel>>,
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

    /// Sets up what another configuration wants; what has not changed is taken over as it runs. Until
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
            let before = self.get(&config.name);
            // Certificates are read again, whether or not the name of their file has changed.
            let tunnel = match before {
                Some(before) if before.config == *config && config.ca_file.is_none() => before,
                before => Arc::new(Tunnel::new(config, before.as_deref(), &self.metrics, &self.captures)?),
            };
            by_name.insert(config.name.clone(), tunnel);
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
        let before_routes: Vec<_> = before.values().flat_map(|tunnel| tunnel.checked_routes()).collect();
        let now = lock(&self.by_name);
        leaving.extend(before.into_iter().filter(|(name, _)| !now.contains_key(name)));
        for (name, tunnel) in &*now {
            if tunnel.config.health_check.is_none() {
                self.metrics.forget_health(name);
            }
        }
        for gone in before_routes {
            if !now.values().any(|tunnel| tunnel.checked_routes().any(|of| of == gone)) {
                self.metrics.forget_route(&gone);
            }
        }
    }

    /// Ends the service for tunnels that are gone.
    pub(crate) fn forget(&self) {
        for (name, _) in std::mem::take(&mut *lock(&self.leaving)) {
            self.metrics.forget(&name);
        }
    }

    pub(crate) fn get(&self, name: &TunnelName) -> Option<Arc<Tunnel>> {
        let served = lock(&self.by_name).get(name).cloned();
        served.or_else(|| lock(&self.leaving).get(name).cloned())
    }

    /// The tunnels to be served, and what the edge shall keep for them.
    pub(crate) fn service(&self) -> Service {
        let tunnels = lock(&self.by_name);
        let kept = |(name, tunnel): (&TunnelName, &Arc<Tunnel>)| {
            Some((name.to_string(), tunnel.config.delivery.clone()?))
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
    fn new(
        config: &TunnelConfig,
        before: Option<&Self>,
        metrics: &Arc<Metrics>,
        captures: &Arc<Captures>,
    ) -> Result<Self, TlsError> {
        let own = match (&config.upstream, before.and_then(|before| before.own.as_ref().zip(Some(before)))) {
            (None, _) => None,
            // Its idle connections are as good as before.
            (Some(_), Some(((upstream, _), before)))
                if before.config.has_upstream_of(config) && config.ca_file.is_none() =>
            {
                Some(Arc::clone(upstream))
            }
            (Some(address), _) => Some(Arc::new(Self::upstream_at(config, address)?)),
        };
        let own = own.map(|upstream| {
            let host = host_rule(config, &upstream);
            (upstream, host)
        });
        let health = Arc::new(Health::new(config.health_check.as_ref().map(|check| check.max_failed)));
        let public = watch::Sender::new(before.and_then(|before| before.public.borrow().clone()));
        let check = config.health_check.clone().zip(own.as_ref()).map(|(settings, (upstream, rule))| {
            let host = settings.host.clone().map_or_else(|| rule.clone(), HostRule::Fixed);
            metrics.set_healthy(&config.name, true);
            let (name, metrics) = (config.name.clone(), Arc::clone(metrics));
            let changed = move |state: &HealthState| {
                metrics.set_healthy(&name, *state == HealthState::Up);
                match state {
                    HealthState::Down { reason } => {
                        tracing::warn!(tunnel_id = %name, "the upstream of {name} is down: {reason}");
                    }
                    HealthState::Up | HealthState::Unchecked => {
                        tracing::info!(tunnel_id = %name, "the upstream of {name} is up again");
                    }
                }
            };
            let check = health::check(
                settings,
                health::Asked { host, public: public.subscribe(), upstream: Arc::clone(upstream) },
                Arc::clone(&health),
                changed,
            );
            AbortOnDropHandle::new(tokio::spawn(check))
        });
        let policy_before = before.and_then(|before| before.policy.as_ref());
        let is_same_way = before.is_some_and(|before| before.config.speaks_as(config));
        let policy = Policy::new(config, policy_before, |address, route| {
            let runs = policy_before.filter(|_| is_same_way && config.ca_file.is_none());
            let upstream = match runs.and_then(|before| before.traffic().upstream_at(address)) {
                Some(upstream) => Arc::clone(upstream),
                None => Arc::new(Self::upstream_at(config, address)?),
            };
            Ok::<_, TlsError>(Self::member(config, route, upstream, public.subscribe(), metrics))
        })?;
        Ok(Self {
            config: config.clone(),
            own,
            request_timeout: config.request_timeout,
            health,
            metrics: metrics.tunnel(&config.name),
            deliveries: Arc::default(),
            causes: Causes::default(),
            hints: Arc::default(),
            policy,
            told_less: AtomicBool::new(false),
            lens: config.inspect.then(|| {
                let upstream = config.upstream.as_ref().map(ToString::to_string).unwrap_or_default();
                Lens::new(Arc::clone(captures), config.name.clone(), &upstream, config.inspect_body)
            }),
            public,
            _check: check,
        })
    }

    /// The policy of a tunnel, apart from the tunnel.
    #[cfg(test)]
    pub(crate) fn policy_of(config: &TunnelConfig) -> Result<Option<Policy>, TlsError> {
        Policy::new(config, None, |address, route| {
            let upstream = Arc::new(Self::upstream_at(config, address)?);
            let public = watch::Sender::new(None).subscribe();
            Ok::<_, TlsError>(Self::member(config, route, upstream, public, &Arc::new(Metrics::new())))
        })
    }

    /// An upstream of a tunnel, its own or that of a route; all are spoken to in the same way.
    pub(crate) fn upstream_at(config: &TunnelConfig, address: &Address) -> Result<Upstream, TlsError> {
        Ok(Upstream::new(address.clone(), tls_for(config, address)?, config.http2, config.keep_alive))
    }

    /// An upstream of a route with its health.
    fn member(
        config: &TunnelConfig,
        route: &RouteRule,
        upstream: Arc<Upstream>,
        public: watch::Receiver<Option<String>>,
        metrics: &Arc<Metrics>,
    ) -> Member {
        let host = host_rule(config, &upstream);
        let check = match &route.target {
            RouteTarget::Upstreams(_, check) => check.clone(),
            _ => None,
        };
        let health = Arc::new(Health::new(check.as_ref().map(|check| check.max_failed)));
        let check = check.map(|settings| {
            let host = settings.host.clone().map_or_else(|| host.clone(), HostRule::Fixed);
            let of = OfRoute {
                tunnel: config.name.to_string(),
                route: route.name(),
                upstream: upstream.address().to_string(),
            };
            let metrics = Arc::clone(metrics);
            metrics.set_route_healthy(&of, true);
            let changed = move |state: &HealthState| {
                metrics.set_route_healthy(&of, *state == HealthState::Up);
                let OfRoute { tunnel, upstream, .. } = &of;
                match state {
                    HealthState::Down { reason } => {
                        tracing::warn!(tunnel_id = %tunnel, "{upstream}, an upstream of {tunnel}, is down: {reason}");
                    }
                    HealthState::Up | HealthState::Unchecked => {
                        tracing::info!(tunnel_id = %tunnel, "{upstream}, an upstream of {tunnel}, is up again");
                    }
                }
            };
            let asked = health::Asked { host, public, upstream: Arc::clone(&upstream) };
            AbortOnDropHandle::new(tokio::spawn(health::check(settings, asked, Arc::clone(&health), changed)))
        });
        Member { upstream, host, health, _check: check }
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

    /// The upstreams of its routes that are checked, as the metrics know them.
    fn checked_routes(&self) -> impl Iterator<Item = OfRoute> {
        let members = self.policy.iter().flat_map(|policy| policy.traffic().upstreams());
        members.filter(|(_, member)| member.health.state() != HealthState::Unchecked).map(
            |(route, member)| OfRoute {
                tunnel: self.config.name.to_string(),
                route: route.name(),
                upstream: member.upstream.address().to_string(),
            },
        )
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

fn tls_for(config: &TunnelConfig, address: &Address) -> Result<Option<Tls>, TlsError> {
    let Address::Tcp { host, scheme: Scheme::Https, .. } = address else { return Ok(None) };
    let trust = match (&config.ca_file, config.insecure_skip_verify) {
        (_, true) => Trust::Anybody,
        (Some(path), false) => Trust::SystemAnd(path),
        (None, false) => Trust::System,
    };
    let alpn: &[&[u8]] = match config.http2 {
        Http2::Auto => &[b"h2", b"http/1.1"],
        Http2::Always => &[b"h2"],
        Http2::Never => &[b"http/1.1"],
    };
    let server_name = match &config.server_name {
        Some(name) => name.clone(),
        None => match host {
            Host::Ip(ip) => (*ip).into(),
            Host::Zoned(ip, _) => IpAddr::V6(*ip).into(),
            Host::Localhost | Host::Name(_) => {
                // Certificates and SNI know no trailing dot (RFC 6066 §3).
                let name = host.to_string();
                let name = name.strip_suffix('.').unwrap_or(&name).to_owned();
                ServerName::try_from(name).map_err(|_| TlsError::NotAName(host.to_string()))?
            }
        },
    };
    Ok(Some(Tls { config: client_config(trust, alpn)?, server_name }))
}
