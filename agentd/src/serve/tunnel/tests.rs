//! What a reload does to tunnels while something of them is in flight.

use std::net::TcpListener;

use proto::delivery::{DeliveryPolicy, Mode};

use super::*;
use crate::report::metrics::Format;

/// An address at which nobody answers: its connections are refused.
struct Nobody {
    address: Address,
    _bound: std::os::fd::OwnedFd,
}

impl Nobody {
    fn new() -> Self {
        // Bound and not listening, so that nobody else gets the port.
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&socket, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let bound = std::net::SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
        Self { address: bound.to_string().parse().unwrap(), _bound: socket }
    }
}

struct Stage {
    tunnels: Tunnels,
    metrics: Arc<Metrics>,
    name: TunnelName,
}

impl Stage {
    fn new(configs: &[TunnelConfig]) -> Self {
        let metrics = Arc::new(Metrics::new());
        let captures = Arc::new(Captures::new(0));
        let tunnels = Tunnels::new(configs, 10, Arc::clone(&metrics), captures).unwrap();
        Self { tunnels, metrics, name: configs[0].name.clone() }
    }

    fn reload(&self, configs: &[TunnelConfig]) {
        self.tunnels.replace(self.tunnels.prepare(configs, 10).unwrap());
    }

    fn tunnel(&self) -> Arc<Tunnel> {
        self.tunnels.get(&self.name).unwrap()
    }

    /// The samples of a metric.
    fn samples(&self, metric: &str) -> Vec<String> {
        let text = self.metrics.in_format(Format::Prometheus);
        let is_of = |line: &&str| line.strip_prefix(metric).is_some_and(|rest| rest.starts_with('{'));
        let mut samples: Vec<_> = text.lines().filter(is_of).map(str::to_owned).collect();
        samples.sort();
        samples
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited).await.unwrap_or_else(|_| panic!("{what}: never"));
}

fn checked(upstream: &Address) -> TunnelConfig {
    let mut config = TunnelConfig::new("web".parse().unwrap(), Some(upstream.clone()));
    let check = HealthCheck::new("/healthz".parse().unwrap());
    config.health_check = Some(HealthCheck { max_failed: 1, interval: Duration::from_millis(50), ..check });
    config
}

const DOWN: &str = "agentd_upstream_healthy{tunnel=\"web\"} 0";
const UP: &str = "agentd_upstream_healthy{tunnel=\"web\"} 1";

#[tokio::test]
async fn health_is_that_of_the_upstream_that_is_served_and_of_no_other() {
    let (nobody, silent) = (Nobody::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let silent: Address = silent.local_addr().unwrap().to_string().parse().unwrap();
    let config = checked(&nobody.address);
    let stage = Stage::new(std::slice::from_ref(&config));
    assert_eq!(stage.samples("agentd_upstream_healthy"), [UP]);
    until("it is down", || matches!(stage.tunnel().health(), HealthState::Down { .. })).await;
    assert_eq!(stage.samples("agentd_upstream_healthy"), [DOWN]);

    // Another setting: it is known still, before anybody has asked again.
    let before = stage.tunnel();
    stage.reload(&[TunnelConfig { max_concurrent: 7, ..config.clone() }]);
    assert!(!Arc::ptr_eq(&before, &stage.tunnel()) && stage.tunnel().config.max_concurrent == 7);
    assert!(matches!(stage.tunnel().health(), HealthState::Down { .. }));
    assert_eq!(stage.tunnels.enter(&stage.tunnel(), true).err(), Some(ErrorCode::UpstreamUnhealthy));
    assert_eq!(stage.samples("agentd_upstream_healthy"), [DOWN]);

    // Another upstream: nothing is known, and the checks of the one before end, though a request is still there.
    stage.reload(&[checked(&silent)]);
    assert_eq!(stage.tunnel().health(), HealthState::Up);
    assert_eq!(stage.samples("agentd_upstream_healthy"), [UP]);
    let (upstream, _) = before.own.as_ref().unwrap();
    until("nobody checks the one before", || Arc::strong_count(upstream) == 1).await;

    // What fails to be set up changes nothing.
    let broken = TunnelConfig {
        upstream: Some("https://127.0.0.1:1".parse().unwrap()),
        ca_file: Some("/nowhere/ca.pem".into()),
        ..config.clone()
    };
    let other = TunnelConfig { name: "other".parse().unwrap(), ..config.clone() };
    assert!(stage.tunnels.prepare(&[config.clone(), other, broken], 10).is_err());
    assert_eq!(stage.samples("agentd_upstream_healthy"), [UP]);
    assert!(!stage.metrics.in_format(Format::Prometheus).contains("other"));

    // Nobody checks any more, or there is no tunnel.
    stage.reload(&[TunnelConfig { health_check: None, ..config.clone() }]);
    assert_eq!(stage.samples("agentd_upstream_healthy"), [""; 0]);
    stage.reload(std::slice::from_ref(&config));
    assert_eq!(stage.samples("agentd_upstream_healthy"), [UP]);
    stage.reload(&[]);
    assert_eq!(stage.samples("agentd_upstream_healthy"), [""; 0]);
}

#[tokio::test]
async fn places_that_are_taken_count_until_they_are_given_back_whatever_the_configuration_says() {
    let address: Address = "127.0.0.1:1".parse().unwrap();
    let mut policy = DeliveryPolicy::new(Mode::Durable);
    policy.max_concurrent = 1;
    let config = TunnelConfig {
        delivery: Some(policy),
        max_websockets: 1,
        max_concurrent: 1,
        ..TunnelConfig::new("web".parse().unwrap(), Some(address))
    };
    let changed = TunnelConfig { via: false, ..config.clone() };
    let stage = Stage::new(std::slice::from_ref(&config));
    let (tunnels, tunnel) = (&stage.tunnels, stage.tunnel());
    let delivery = tunnel.enter_delivery().unwrap();
    let socket = tunnels.enter_socket(&tunnel, true, 0).unwrap();
    let place = tunnels.enter(&tunnel, true).unwrap();
    drop(tunnel);
    let is_full = || {
        let tunnel = stage.tunnel();
        assert_eq!(tunnel.enter_delivery().err(), Some(ErrorCode::AgentBusy));
        assert_eq!(tunnels.enter_socket(&tunnel, true, 0).err(), Some(ErrorCode::TooManyRequests));
        assert_eq!(tunnels.enter(&tunnel, true).err(), Some(ErrorCode::TooManyRequests));
    };
    is_full();
    stage.reload(&[changed]);
    is_full();
    assert_eq!(tunnels.removed(), []);

    // It is removed, and what is in flight is seen until it ends.
    stage.reload(&[]);
    tunnels.forget();
    assert!(tunnels.get(&stage.name).is_none());
    let removed = RemovedStatus { name: "web".into(), in_flight: 1, websockets: 1 };
    assert_eq!((tunnels.removed(), tunnels.in_flight()), (vec![removed], 1));
    assert_eq!(stage.samples("agentd_websockets_open"), ["agentd_websockets_open{tunnel=\"web\"} 1"]);
    // It comes back meanwhile.
    stage.reload(&[config]);
    is_full();
    assert_eq!(tunnels.removed(), []);
    stage.reload(&[]);
    tunnels.forget();
    drop((place, delivery));
    assert_eq!(stage.samples("agentd_websockets_open"), ["agentd_websockets_open{tunnel=\"web\"} 1"]);
    drop(socket);
    assert_eq!((tunnels.removed(), stage.samples("agentd_websockets_open")), (vec![], vec![]));
    assert!(!stage.metrics.in_format(Format::Prometheus).contains("web\""));
}
