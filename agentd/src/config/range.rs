//! Ranges of client addresses, as `allow_ips` and `deny_ips` name them.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net};

/// A range in CIDR form, or one address. IPv4 addresses in IPv6 form (`::ffff:192.0.2.1`) are IPv4 ones,
/// on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpRange(IpNet);

impl IpRange {
    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip.to_canonical())
    }
}

impl FromStr for IpRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no range of addresses: write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.7")
        };
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self(ip.to_canonical().into()));
        }
        let net: IpNet = text.parse().map_err(|_| wrong())?;
        let net = match net {
            IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.addr().to_ipv4_mapped() {
                Some(v4) => IpNet::V4(Ipv4Net::new(v4, v6.prefix_len() - 96).map_err(|_| wrong())?),
                None => net,
            },
            _ => net,
        };
        if net.trunc() != net {
            // One of the two was meant, and guessing opens a door or shuts it.
            return Err(format!(
                "{text:?} has bits behind its prefix: write {} for the range or {} for the one address",
                net.trunc(),
                net.addr()
            ));
        }
        Ok(Self(net))
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn range(text: &str) -> IpRange {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_in_a_range_in_whichever_form_either_is_written() {
        for (of, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.0.0.0/8", "::ffff:10.1.2.3", "::ffff:11.0.0.1"),
            ("::ffff:10.0.0.0/104", "10.1.2.3", "11.0.0.1"),
            ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.8"),
            ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.6"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("2001:db8::1", "2001:db8::1", "2001:db8::2"),
            ("0.0.0.0/0", "::ffff:1.2.3.4", "2001:db8::1"),
            ("::/0", "2001:db8::1", "1.2.3.4"),
        ] {
            assert!(range(of).contains(inside.parse().unwrap()), "{inside} in {of}");
            assert!(!range(of).contains(outside.parse().unwrap()), "{outside} not in {of}");
        }
    }

    #[test]
    fn what_is_no_range_is_refused_with_what_would_be() {
        for text in
            ["", "10", "10.0/16", "10.0.0.0/33", "::/129", "10.0.0.0/255.0.0.0", "fe80::%eth0/64", "a"]
        {
            assert!(text.parse::<IpRange>().unwrap_err().contains("write it as"), "{text}");
        }
        let message = "10.0.0.1/8".parse::<IpRange>().unwrap_err();
        assert!(message.contains("10.0.0.0/8 for the range or 10.0.0.1 for the one"), "{message}");
    }

    proptest! {
        #[test]
        fn a_range_holds_exactly_what_shares_its_prefix(
            base in any::<u32>(), other in any::<u32>(), prefix in 0u32..=32, mapped in any::<bool>()
        ) {
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            let range: IpRange = format!("{}/{prefix}", Ipv4Addr::from(base & mask)).parse().unwrap();
            for ip in [other, (base & mask) | (other & !mask)] {
                let v4 = Ipv4Addr::from(ip);
                let written = if mapped { v4.to_ipv6_mapped().into() } else { v4.into() };
                prop_assert_eq!(range.contains(written), ip & mask == base & mask);
            }
        }

        #[test]
        fn the_same_for_ipv6(base in any::<u128>(), other in any::<u128>(), prefix in 0u32..=128) {
            let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
            let range: IpRange = format!("{}/{prefix}", Ipv6Addr::from(base & mask)).parse().unwrap();
            for ip in [other, (base & mask) | (other & !mask)] {
                let v6 = Ipv6Addr::from(ip);
                let is_v4 = v6.to_ipv4_mapped().is_some();
                prop_assume!(!is_v4 && Ipv6Addr::from(base & mask).to_ipv4_mapped().is_none());
                prop_assert_eq!(range.contains(v6.into()), ip & mask == base & mask);
            }
        }
    }
}
