//! `agentd config explain`: which route and rules a request would meet, without sending it.

use std::{net::IpAddr, process::ExitCode};

use http::{Method, Uri};
use proto::delivery::{DeliveryPolicy, Mode};

use super::{
    exit,
    output::{answer, complain},
};
use crate::{
    config::{
        Config, ConfigError, TunnelConfig,
        paths::PathPattern,
        traffic::{Choice, LimitedBy, RouteRule, RouteTarget},
    },
    serve::policy::lets_in,
};

/// A request that is thought of.
pub(crate) struct Thought {
    pub(crate) url: Uri,
    pub(crate) method: Method,
    /// The public client's address.
    pub(crate) ip: Option<IpAddr>,
}

/// Prints what would become of a request. Fails if the configuration is not valid or knows no such tunnel.
pub(crate) fn run(config: &Result<Config, ConfigError>, thought: &Thought) -> ExitCode {
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            complain(error);
            return ExitCode::from(exit::BAD_CONFIG);
        }
    };
    match explain(&config.tunnels, thought) {
        Ok(lines) => {
            let said: String = lines.iter().map(|(what, says)| format!("{what:<12} {says}\n")).collect();
            answer(&said, ExitCode::SUCCESS)
        }
        Err(message) => {
            complain(message);
            ExitCode::from(exit::RUNTIME)
        }
    }
}

/// The tunnel that a host or, in path mode, the first segment of the path names; and the path for it.
fn find<'a>(tunnels: &'a [TunnelConfig], url: &Uri) -> Option<(&'a TunnelConfig, String)> {
    let whole = url.path_and_query().map_or("/", |target| target.as_str());
    let named = |name: &str| tunnels.iter().find(|tunnel| tunnel.name.as_str().eq_ignore_ascii_case(name));
    let label = url.host().and_then(|host| host.split('.').next());
    if let Some(tunnel) = label.and_then(named) {
        return Some((tunnel, whole.to_owned()));
    }
    let (segment, rest) = match whole.get(1..)?.find(['/', '?']) {
        Some(end) => whole[1..].split_at(end),
        None => (&whole[1..], ""),
    };
    let slash = if rest.starts_with('/') { "" } else { "/" };
    named(segment).map(|tunnel| (tunnel, format!("{slash}{rest}")))
}

fn explain(tunnels: &[TunnelConfig], thought: &Thought) -> Result<Vec<(&'static str, String)>, String> {
    let (tunnel, target) = find(tunnels, &thought.url).ok_or_else(|| {
        let names: Vec<_> = tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
        format!("{} names none of the tunnels in this configuration: {}", thought.url, names.join(", "))
    })?;
    let path = target.split('?').next().unwrap_or_default();
    let rules = &tunnel.traffic;
    let mut lines =
        vec![("tunnel", tunnel.name.to_string()), ("request", format!("{} {target}", thought.method))];
    if let Some(rule) = &tunnel.visitors.ips {
        let says = match thought.ip {
            _ if is_excepted(&rule.except, path) => "not looked at here (ip_except)".to_owned(),
            None => "looked at; say --ip to know more".to_owned(),
            Some(ip) if lets_in(rule, Some(ip)) => format!("{ip} passes"),
            Some(ip) => {
                lines.push(("addresses", format!("{ip} is refused: 403 address_refused")));
                return Ok(lines);
            }
        };
        lines.push(("addresses", says));
    }
    if rules.maintenance {
        lines.push(("maintenance", "every request is answered with 503 maintenance".to_owned()));
        return Ok(lines);
    }
    if let Some(rule) = &rules.rate_limit {
        let by = match rule.by {
            LimitedBy::Ip => "of each address",
            LimitedBy::User => "of each visitor",
            LimitedBy::Tunnel => "of all together",
        };
        lines.push(("rate_limit", format!("{} requests within {:?} {by}", rule.requests, rule.per)));
    }
    if let Some(policy) = &tunnel.delivery {
        lines.push(("delivery", kept(policy, &thought.method, path)));
    }
    let choice = rules.choose(&thought.method, thought.url.host(), path);
    let route = match choice {
        Choice::Ambiguous => {
            lines.push(("route", "none: dot segments are answered with 400 bad_request".to_owned()));
            return Ok(lines);
        }
        Choice::Tunnel => None,
        Choice::Route(_, route) => Some(route),
    };
    let none = || match &tunnel.upstream {
        Some(_) => "none: the tunnel's upstream".to_owned(),
        None => "none, and the tunnel has no upstream: 404 no_route".to_owned(),
    };
    lines.push(("route", route.map_or_else(none, described)));
    if route.is_none() && tunnel.upstream.is_none() {
        return Ok(lines);
    }
    if let Some(rule) = &rules.cors {
        lines.push(("cors", format!("pages of {}", rule.origins.join(", "))));
    }
    let visitors = &tunnel.visitors;
    let ways: Vec<&str> = [
        ("basic_auth", visitors.basic.as_ref().map(|rule| &rule.except)),
        ("bearer", visitors.bearer.as_ref().map(|rule| &rule.except)),
        ("oidc", visitors.oidc.as_ref().map(|rule| &rule.except)),
    ]
    .into_iter()
    .filter_map(|(way, except)| except.filter(|except| !is_excepted(except, path)).map(|_| way))
    .collect();
    lines.push(("visitors", if ways.is_empty() { "anybody".to_owned() } else { ways.join(" or ") }));
    let signed = tunnel
        .webhooks
        .iter()
        .find(|rule| rule.paths.is_empty() || rule.paths.iter().any(|pattern| pattern.could_be(path)));
    if let Some(rule) = signed {
        lines.push(("verify", format!("{:?}, one of {} secrets", rule.scheme, rule.secrets.len())));
    }
    if let Some(most) = route.and_then(|route| route.max_body).or(rules.max_body) {
        lines.push(("max_body", format!("{most} bytes")));
    }
    lines.push((
        "leads to",
        match route.map(|route| &route.target) {
            None => tunnel.leads_to(),
            Some(RouteTarget::Upstreams(upstreams, _)) => {
                upstreams.iter().map(ToString::to_string).collect::<Vec<_>>().join(", or in turn ")
            }
            Some(RouteTarget::Files(folder)) => format!("the files of {}", folder.display()),
            Some(RouteTarget::Respond { status, .. }) => format!("an answer with {status}"),
            Some(RouteTarget::Redirect { status, .. }) => format!("a redirect with {status}"),
        },
    ));
    if let Some(route) = route.filter(|route| route.strip > 0 || !route.add.is_empty()) {
        let (off, on) = (route.path.first(route.strip), &route.add);
        lines.push(("path", format!("without {off:?}, below {on:?}")));
    }
    for (what, edits) in [("request", &rules.request), ("response", &rules.response)] {
        let names = edits
            .remove
            .iter()
            .map(|name| format!("-{name}"))
            .chain(edits.set.iter().map(|(name, _)| format!("={name}")))
            .chain(edits.add.iter().map(|(name, _)| format!("+{name}")));
        let names: Vec<_> = names.collect();
        if !names.is_empty() {
            lines.push(("fields", format!("of the {what}: {}", names.join(" "))));
        }
    }
    Ok(lines)
}

/// What becomes of a request where it cannot be served now.
fn kept(policy: &DeliveryPolicy, method: &Method, path: &str) -> String {
    if !policy.covers(method.as_str(), path) {
        return format!("{}, but not this method or path: live", policy.mode);
    }
    let age = policy.max_age_s;
    match policy.mode {
        Mode::Auto => format!("auto: live while an agent is connected, else kept for up to {age} s"),
        Mode::Durable => format!(
            "durable: answered with {} at once, and delivered within {age} s; {} tries",
            policy.answer.status, policy.attempts
        ),
    }
}

fn is_excepted(except: &[PathPattern], path: &str) -> bool {
    except.iter().any(|pattern| pattern.surely_is(path))
}

fn described(route: &RouteRule) -> String {
    let mut text = route.path.to_string();
    if !route.methods.is_empty() {
        let methods: Vec<_> = route.methods.iter().map(Method::as_str).collect();
        text.push_str(&format!(" ({})", methods.join(", ")));
    }
    if let Some(host) = &route.host {
        text.push_str(&format!(" of {host}"));
    }
    text
}
