//! How many requests are let through, by address, visitor or tunnel. Pure: time is given.
//!
//! The generic cell rate algorithm: of each key one time is kept, that at which its requests would have come at
//! an even pace. What is kept is bounded, whoever asks from however many addresses.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::config::traffic::{LimitedBy, RateLimitRule};

/// No more keys than this are kept. One has some 100 bytes.
const MOST_KEYS: usize = 10_000;

/// Whose requests are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    All,
    Ip(IpAddr),
    /// The edge does not know the address: those share one.
    Unknown,
    User(String),
}

/// The limit of one tunnel and what was used of it.
pub(crate) struct RateLimit {
    rule: RateLimitRule,
    due: Mutex<HashMap<Key, Instant>>,
}

/// One request too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany {
    /// When the next one is let through.
    pub(crate) retry_after: Duration,
    pub(crate) rule: RateLimitRule,
}

impl RateLimit {
    pub(crate) fn new(rule: RateLimitRule) -> Self {
        Self { rule, due: Mutex::default() }
    }

    pub(crate) const fn rule(&self) -> &RateLimitRule {
        &self.rule
    }

    /// Counts a request, or says how long to wait for the next.
    pub(crate) fn take(
        &self,
        client: Option<IpAddr>,
        user: Option<&str>,
        now: Instant,
    ) -> Result<(), TooMany> {
        let address = || client.map_or(Key::Unknown, |ip| Key::Ip(network_of(ip)));
        let key = match self.rule.by {
            LimitedBy::Tunnel => Key::All,
            LimitedBy::Ip => address(),
            LimitedBy::User => user.map_or_else(address, |user| Key::User(user.to_owned())),
        };
        let pace = self.rule.per / self.rule.requests;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        if due.len() >= MOST_KEYS && !due.contains_key(&key) {
            due.retain(|_, due| *due > now);
            if due.len() >= MOST_KEYS {
                // Whoever has used least loses least.
                let least = due.iter().min_by_key(|(_, due)| **due).map(|(key, _)| key.clone());
                if let Some(least) = least {
                    due.remove(&least);
                }
            }
        }
        let entry = due.entry(key).or_insert(now);
        let next = (*entry).max(now) + pace;
        let ahead = next - now;
        if ahead > self.rule.per {
            return Err(TooMany { retry_after: ahead - self.rule.per, rule: self.rule });
        }
        *entry = next;
        Ok(())
    }
}

/// Who has one address of IPv6 has a whole /64.
fn network_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(requests: u32, per: u64, by: LimitedBy) -> RateLimit {
        RateLimit::new(RateLimitRule { requests, per: Duration::from_secs(per), by })
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn as_many_as_allowed_and_then_one_for_each_that_time_gives_back() {
        let (limit, now) = (limit(3, 30, LimitedBy::Ip), Instant::now());
        let at = |secs| limit.take(ip("192.0.2.1"), None, now + Duration::from_secs(secs));
        for _ in 0..3 {
            at(0).unwrap();
        }
        assert_eq!(at(0).unwrap_err().retry_after, Duration::from_secs(10));
        assert_eq!(at(4).unwrap_err().retry_after, Duration::from_secs(6));
        at(10).unwrap();
        assert_eq!(at(10).unwrap_err().retry_after, Duration::from_secs(10));
        for _ in 0..3 {
            at(60).unwrap();
        }
        at(60).unwrap_err();
    }

    #[test]
    fn each_address_visitor_or_tunnel_has_its_own() {
        let now = Instant::now();
        let by_ip = limit(1, 60, LimitedBy::Ip);
        for (client, passes) in [
            (ip("192.0.2.1"), true),
            (ip("::ffff:192.0.2.1"), false),
            (ip("192.0.2.2"), true),
            (ip("2001:db8::1"), true),
            (ip("2001:db8::ffff:1"), false),
            (ip("2001:db8:0:1::1"), true),
            (None, true),
            (None, false),
        ] {
            assert_eq!(by_ip.take(client, None, now).is_ok(), passes, "{client:?}");
        }
        let by_user = limit(1, 60, LimitedBy::User);
        for (user, passes) in
            [(Some("ann"), true), (Some("bob"), true), (Some("ann"), false), (None, true), (None, false)]
        {
            assert_eq!(by_user.take(ip("192.0.2.1"), user, now).is_ok(), passes, "{user:?}");
        }
        let by_tunnel = limit(1, 60, LimitedBy::Tunnel);
        by_tunnel.take(ip("192.0.2.1"), Some("ann"), now).unwrap();
        by_tunnel.take(ip("192.0.2.2"), Some("bob"), now).unwrap_err();
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_busiest_stay_limited() {
        let (limit, now) = (limit(2, 3600, LimitedBy::Ip), Instant::now());
        for _ in 0..2 {
            limit.take(ip("192.0.2.1"), None, now).unwrap();
        }
        for n in 0..u32::try_from(MOST_KEYS).unwrap() + 500 {
            limit.take(Some(IpAddr::V4(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n))), None, now).unwrap();
        }
        assert_eq!(limit.due.lock().unwrap().len(), MOST_KEYS);
        limit.take(ip("192.0.2.1"), None, now).unwrap_err();
        limit.take(ip("192.0.2.9"), None, now + Duration::from_secs(7200)).unwrap();
        assert_eq!(limit.due.lock().unwrap().len(), 1, "what has run out is forgotten");
    }
}
