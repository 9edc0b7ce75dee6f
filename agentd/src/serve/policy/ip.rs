//! From where a tunnel may be used. Pure.

use std::net::IpAddr;

use crate::{
    config::{range::IpRange, visitors::IpRule},
    report::denial::DeniedBy,
};

/// Whether a client may use the tunnel. One whose address nobody knows may not.
pub(crate) fn lets_in(rule: &IpRule, client: Option<IpAddr>) -> bool {
    denied_by(rule, client).is_none()
}

/// The list that keeps a client out, if one does.
pub(crate) fn denied_by(rule: &IpRule, client: Option<IpAddr>) -> Option<DeniedBy> {
    let is_in =
        |ranges: &[IpRange]| client.is_some_and(|client| ranges.iter().any(|range| range.contains(client)));
    if is_in(&rule.deny) {
        Some(DeniedBy::DenyIps)
    } else if rule.allow.is_empty() {
        client.is_none().then_some(DeniedBy::DenyIps)
    } else {
        (!is_in(&rule.allow)).then_some(DeniedBy::AllowIps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_denied_or_not_allowed_or_unknown_stays_out() {
        let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let rule = |allow: &[&str], deny: &[&str]| IpRule {
            allow: ranges(allow),
            deny: ranges(deny),
            except: Vec::new(),
        };
        let office = rule(&["10.0.0.0/8", "2001:db8::/32"], &["10.6.6.0/24", "2001:db8:6::/48"]);
        let only_deny = rule(&[], &["192.0.2.0/24"]);
        for (rule, ip, lets) in [
            (&office, Some("10.1.2.3"), true),
            (&office, Some("::ffff:10.1.2.3"), true),
            (&office, Some("10.6.6.6"), false),
            (&office, Some("::ffff:10.6.6.6"), false),
            (&office, Some("11.0.0.1"), false),
            (&office, Some("2001:db8::1"), true),
            (&office, Some("2001:db8:6::1"), false),
            (&office, None, false),
            (&only_deny, Some("192.0.2.1"), false),
            (&only_deny, Some("::ffff:192.0.2.1"), false),
            (&only_deny, Some("192.0.3.1"), true),
            (&only_deny, None, false),
        ] {
            assert_eq!(lets_in(rule, ip.map(|ip| ip.parse().unwrap())), lets, "{ip:?}");
        }
    }
}
