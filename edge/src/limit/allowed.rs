//! What is allowed, as a deployment says it.

use std::str::FromStr;

/// The most that any limit may be set to: a row that counts requests in flight stays far below
/// DynamoDB's 400 KB, and is cheap to write.
pub const LIMIT_MAX: u32 = 1000;

/// The most requests a minute that may be set.
pub const RATE_MAX: u32 = 1_000_000;

/// The most concurrent executions of an account that count as few: `ingress` limits itself there, in a row that is
/// written by each request. Whoever has more can reserve some for `response` instead.
pub const EXECUTIONS_FEW: u32 = 200;

/// How many public requests may hold so many executions at the same time. A quarter, and at least four, is left for
/// agents' messages, and for the request that is told that there is no place. `resources/settings.js` has the same.
#[must_use]
pub const fn edge_requests(executions: u32) -> u32 {
    let left = if executions / 4 > 4 { executions / 4 } else { 4 };
    executions.saturating_sub(left)
}

/// What is allowed; `None` where nothing is limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// One owner, over all their tunnels.
    pub owner: OwnerLimits,
    /// One tunnel, over all its connections.
    pub tunnel: TunnelLimits,
}

/// See [`Limits::owner`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnerLimits {
    /// Key `owner_connections`: connections that serve tunnels. An agent has two while it replaces one.
    pub connections: Option<usize>,
    /// Key `owner_tunnels`: tunnels that are open.
    pub tunnels: Option<usize>,
    /// Keys `owner_requests` and `owner_rate`.
    pub requests: RequestLimits,
}

/// See [`Limits::tunnel`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Key `tunnel_connections`: connections that serve the tunnel.
    pub connections: Option<usize>,
    /// Keys `tunnel_requests` and `tunnel_rate`.
    pub requests: RequestLimits,
}

/// Limits on public requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestLimits {
    /// How many are in flight at the same time.
    pub in_flight: Option<u32>,
    /// How many begin within one minute of the clock.
    pub per_minute: Option<u32>,
}

impl RequestLimits {
    pub(super) const fn is_any(self) -> bool {
        self.in_flight.is_some() || self.per_minute.is_some()
    }
}

impl FromStr for Limits {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut limits = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or("is not key=number,…")?;
            let max = if key.ends_with("_rate") { RATE_MAX } else { LIMIT_MAX };
            let value: u32 = value
                .parse()
                .ok()
                .filter(|value| (1..=max).contains(value))
                .ok_or("has a value out of range: 1 to 1000, and 1 to 1000000 for a rate")?;
            let (owner, tunnel) = (&mut limits.owner, &mut limits.tunnel);
            match key {
                "owner_connections" => owner.connections = Some(value as usize),
                "owner_tunnels" => owner.tunnels = Some(value as usize),
                "owner_requests" => owner.requests.in_flight = Some(value),
                "owner_rate" => owner.requests.per_minute = Some(value),
                "tunnel_connections" => tunnel.connections = Some(value as usize),
                "tunnel_requests" => tunnel.requests.in_flight = Some(value),
                "tunnel_rate" => tunnel.requests.per_minute = Some(value),
                _ => {
                    return Err("has an unknown key: use owner_connections, owner_tunnels, owner_requests, \
                                owner_rate, tunnel_connections, tunnel_requests or tunnel_rate");
                }
            }
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_nothing_is_limited_by_default() {
        assert_eq!("".parse::<Limits>(), Ok(Limits::default()));
        let all = "owner_connections=1,owner_tunnels=2, owner_requests=3,owner_rate=4,tunnel_connections=5,\
                   tunnel_requests=6,tunnel_rate=7";
        let expected = Limits {
            owner: OwnerLimits {
                connections: Some(1),
                tunnels: Some(2),
                requests: RequestLimits { in_flight: Some(3), per_minute: Some(4) },
            },
            tunnel: TunnelLimits {
                connections: Some(5),
                requests: RequestLimits { in_flight: Some(6), per_minute: Some(7) },
            },
        };
        assert_eq!(all.parse(), Ok(expected));
        assert!("tunnel_requests=1000,tunnel_rate=1000000".parse::<Limits>().is_ok());
        for bad in [
            "tunnel_requests=1001",
            "tunnel_rate=1000001",
            "tunnel_requests=0",
            "tunnel_requests=-1",
            "tunnel_requests",
            "tunnel_tunnels=1",
            "requests=1",
        ] {
            assert!(bad.parse::<Limits>().is_err(), "{bad}");
        }
    }
}
