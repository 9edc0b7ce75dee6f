//! Who may ask over TCP on loopback: a page of a foreign site must not, by having its name point here (DNS rebinding).

use http::{HeaderMap, header};

/// Whether `host` names this machine's loopback.
pub(crate) fn is_for_this_machine(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(host) = host.as_bytes().try_into() else { return false };
    let host: http::uri::Authority = host;
    let name = host.host();
    let literal = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    !host.as_str().contains('@')
        && (name.eq_ignore_ascii_case("localhost")
            || literal.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_loopback_names_are_answered() {
        let asked = |hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, HeaderValue::from_str(host).unwrap());
            }
            is_for_this_machine(&headers)
        };
        for host in ["localhost", "LOCALHOST:4041", "127.0.0.1", "127.0.0.1:1", "127.9.9.9", "[::1]:4041"] {
            assert!(asked(&[host]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "192.0.2.1:4041", "u@localhost", "", "a b"] {
            assert!(!asked(&[host]), "{host}");
        }
        assert!(!asked(&[]) && !asked(&["localhost", "localhost"]));
    }
}
