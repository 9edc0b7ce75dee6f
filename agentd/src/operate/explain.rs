//! `agentd config explain`: which route and rules a request would meet, without sending it.

use std::{net::IpAddr, process::ExitCode};

use http::{HeaderName, Method, Uri};
use proto::delivery::{DeliveryPolicy, Mode};

use super::{
    exit,
    output::{answer, complain},
};
use crate::{
    config::{
        Config, ConfigError, HostHeader, TunnelConfig,
        paths::PathPattern,
        range::IpRange,
        traffic::{Choice, CorsRule, FieldEdits, ForwardedFields, LimitedBy, RouteRule, RouteTarget},
        visitors::{
            ALGORITHMS, BearerRule, Digest, Encoding, IpRule, KeySource, OidcRule, Scheme, VisitorRules,
            WebhookRule,
        },
        write_duration,
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
            let said: String = lines.iter().map(|(what, says)| format!("{what:<16} {says}\n")).collect();
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

type Lines = Vec<(&'static str, String)>;

fn explain(tunnels: &[TunnelConfig], thought: &Thought) -> Result<Lines, String> {
    let (tunnel, target) = find(tunnels, &thought.url).ok_or_else(|| {
        let names: Vec<_> = tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
        format!("{} names none of the tunnels in this configuration: {}", thought.url, names.join(", "))
    })?;
    let path = target.split('?').next().unwrap_or_default();
    let rules = &tunnel.traffic;
    let mut lines =
        vec![("tunnel", tunnel.name.to_string()), ("request", format!("{} {target}", thought.method))];
    if let Some(rule) = &tunnel.visitors.ips
        && !addresses(rule, thought.ip, path, &mut lines)
    {
        return Ok(lines);
    }
    if rules.maintenance {
        lines.push(("maintenance", "true: every request is answered with 503 maintenance".to_owned()));
        return Ok(lines);
    }
    if let Some(rule) = &rules.rate_limit {
        let by = match rule.by {
            LimitedBy::Ip => "ip",
            LimitedBy::User => "user",
            LimitedBy::Tunnel => "tunnel",
        };
        lines.push((
            "rate_limit",
            format!(
                "requests = {}, per = \"{}\", by = \"{by}\": one too many is answered with 429 rate_limited",
                rule.requests,
                write_duration(rule.per)
            ),
        ));
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
    if let Some(rule) = &rules.cors {
        lines.push(("cors", cors(rule)));
    }
    visitors(tunnel, &thought.method, path, &mut lines);
    let none = || match &tunnel.upstream {
        Some(_) => "none: the tunnel's upstream".to_owned(),
        None => "none, and the tunnel has no upstream: 404 no_route".to_owned(),
    };
    lines.push(("route", route.map_or_else(none, described)));
    if route.is_none() && tunnel.upstream.is_none() {
        return Ok(lines);
    }
    if let Some(most) = route.and_then(|route| route.max_body).or(rules.max_body) {
        lines.push(("max_body", format!("{most} bytes: a longer one is answered with 413 body_too_large")));
    }
    let signed = tunnel
        .webhooks
        .iter()
        .find(|rule| rule.paths.is_empty() || rule.paths.iter().any(|pattern| pattern.could_be(path)));
    let leads_on = route.is_none_or(|route| matches!(route.target, RouteTarget::Upstreams(..)));
    if let Some(rule) = signed {
        lines.push(("verify", verify(rule)));
        if !leads_on {
            lines.push(("", "401 webhook_refused: with verify a route must lead to an upstream".to_owned()));
            return Ok(lines);
        }
    }
    leads(tunnel, route, &mut lines);
    if leads_on {
        towards(tunnel, &mut lines);
    }
    let response = edits(&rules.response);
    if !response.is_empty() {
        lines.push(("response_headers", response));
    }
    Ok(lines)
}

/// Says what becomes of an address. Whether it goes on.
fn addresses(rule: &IpRule, ip: Option<IpAddr>, path: &str, lines: &mut Lines) -> bool {
    let ranges = |ranges: &[IpRange]| join(ranges.iter().map(ToString::to_string));
    for (key, list) in [("allow_ips", &rule.allow), ("deny_ips", &rule.deny)] {
        if !list.is_empty() {
            lines.push((key, ranges(list)));
        }
    }
    if is_excepted(&rule.except, path) {
        lines.push(("ip_except", "holds here: addresses are not looked at".to_owned()));
        return true;
    }
    let (says, passes) = match ip {
        None => ("say --ip to know which of these it meets; others get 403 address_refused".to_owned(), true),
        Some(ip) if lets_in(rule, Some(ip)) => (format!("{ip} passes"), true),
        Some(ip) => (format!("{ip} is refused: 403 address_refused"), false),
    };
    lines.push(("", says));
    passes
}

/// Says who may come in, and how they show it.
fn visitors(tunnel: &TunnelConfig, method: &Method, path: &str, lines: &mut Lines) {
    let VisitorRules { basic, bearer, oidc, .. } = &tunnel.visitors;
    let basic = basic.as_ref().filter(|rule| !is_excepted(&rule.except, path));
    let bearer = bearer.as_ref().filter(|rule| !is_excepted(&rule.except, path));
    let oidc = oidc.as_ref().filter(|rule| !is_excepted(&rule.except, path));
    let ways = [basic.map(|_| "basic_auth"), bearer.map(|_| "bearer"), oidc.map(|_| "oidc")];
    let ways: Vec<_> = ways.into_iter().flatten().collect();
    let all = if ways.is_empty() { "anybody".to_owned() } else { format!("by {}", ways.join(" or ")) };
    lines.push(("visitors", all));
    if let Some(rule) = basic {
        let count = rule.users.count();
        lines.push((
            "basic_auth",
            format!("{count} {}, realm = {}", if count == 1 { "user" } else { "users" }, quoted(&rule.realm)),
        ));
    }
    if let Some(rule) = bearer {
        lines.push(("bearer", tokens(rule)));
    }
    if let Some(rule) = oidc {
        lines.push(("oidc", signing_in(rule)));
    }
    if !method.is_safe() && (basic.is_some() || oidc.is_some()) {
        let others = if tunnel.traffic.cors.is_some() { "that cors does not name " } else { "" };
        lines.push((
            "",
            format!("pages of other origins {others}get 403 origin_refused: passwords and sessions are not theirs to use"),
        ));
    }
}

fn tokens(rule: &BearerRule) -> String {
    let mut said = vec![match &rule.keys {
        KeySource::Set(_) => "jwks_file".to_owned(),
        KeySource::Url { url, .. } => format!("jwks_url = {}", quoted(url.as_str())),
    }];
    said.extend(rule.issuer.as_ref().map(|issuer| format!("issuer = {}", quoted(issuer))));
    said.push(format!("audience = {}", list(&rule.audience)));
    if rule.algorithms.len() < ALGORITHMS.len() {
        let names = ALGORITHMS.iter().filter(|(_, algorithm)| rule.algorithms.contains(algorithm));
        said.push(format!("algorithms = {}", list(names.map(|(name, _)| name))));
    }
    for (name, values) in &rule.claims {
        said.push(format!("claims.{} = {}", quoted(name), list(values)));
    }
    said.push(format!("user_claim = {}", quoted(&rule.user_claim)));
    said.join(", ")
}

fn signing_in(rule: &OidcRule) -> String {
    let allow = &rule.allow;
    let mut said = vec![
        format!("issuer = {}", quoted(rule.issuer.as_str())),
        format!("client_id = {}", quoted(&rule.client_id)),
    ];
    if allow.anyone {
        said.push("allow_anyone = true".to_owned());
    }
    for (key, allowed) in
        [("allow_emails", &allow.emails), ("allow_domains", &allow.domains), ("allow_groups", &allow.groups)]
    {
        if !allowed.is_empty() {
            said.push(format!("{key} = {}", list(allowed)));
        }
    }
    if !allow.groups.is_empty() {
        said.push(format!("groups_claim = {}", quoted(&allow.groups_claim)));
    }
    if !allow.verified_email {
        said.push("require_verified_email = false".to_owned());
    }
    said.extend(rule.callback_tunnel.as_ref().map(|name| format!("callback_tunnel = \"{name}\"")));
    said.push(format!("session = \"{}\"", write_duration(rule.session)));
    said.join(", ")
}

fn cors(rule: &CorsRule) -> String {
    let mut said = vec![
        format!("origins = {}", list(&rule.origins)),
        format!("methods = {}", list(rule.methods.iter().map(Method::as_str))),
    ];
    if !rule.headers.is_empty() {
        said.push(format!("headers = {}", list(rule.headers.iter().map(HeaderName::as_str))));
    }
    if rule.credentials {
        said.push("credentials = true".to_owned());
    }
    said.join(", ") + ": a preflight is answered here, of others with 403 origin_refused"
}

fn verify(rule: &WebhookRule) -> String {
    let (name, has_time) = match &rule.scheme {
        Scheme::Github => ("github", false),
        Scheme::Stripe => ("stripe", true),
        Scheme::Slack => ("slack", true),
        Scheme::Standard => ("standard", true),
        Scheme::Shopify => ("shopify", false),
        Scheme::Twilio => ("twilio", false),
        Scheme::Hmac(_) => ("hmac", false),
    };
    let mut said = vec![format!("scheme = \"{name}\"")];
    if let Scheme::Hmac(form) = &rule.scheme {
        let digest = match form.digest {
            Digest::Sha1 => "sha1",
            Digest::Sha256 => "sha256",
            Digest::Sha512 => "sha512",
        };
        let encoding = match form.encoding {
            Encoding::Hex => "hex",
            Encoding::Base64 => "base64",
        };
        said.push(format!("header = {}", quoted(&form.header)));
        if !form.prefix.is_empty() {
            said.push(format!("prefix = {}", quoted(&form.prefix)));
        }
        said.push(format!("digest = \"{digest}\", encoding = \"{encoding}\""));
    }
    if has_time {
        said.push(format!("tolerance = \"{}\"", write_duration(rule.tolerance)));
    }
    if !rule.paths.is_empty() {
        said.push(format!("paths = {}", list(rule.paths.iter().map(ToString::to_string))));
    }
    said.push(match rule.secrets.len() {
        1 => "one secret".to_owned(),
        count => format!("one of {count} secrets"),
    });
    said.join(", ")
        + ": without that signature 401 webhook_refused, with over 1 MiB of body 413 webhook_too_large"
}

/// Says where a request goes, and with which path.
fn leads(tunnel: &TunnelConfig, route: Option<&RouteRule>, lines: &mut Lines) {
    lines.push(match route.map(|route| &route.target) {
        None => ("upstream", tunnel.leads_to()),
        Some(RouteTarget::Upstreams(upstreams, check)) => {
            let upstreams: Vec<_> = upstreams.iter().map(ToString::to_string).collect();
            let well = if check.is_some() { ", of those that its health_check finds well" } else { "" };
            ("upstream", format!("{}{well}", upstreams.join(", or in turn ")))
        }
        Some(RouteTarget::Files(folder)) => ("files", quoted(&folder.display().to_string())),
        Some(RouteTarget::Respond { status, .. }) => ("respond", format!("status = {}", status.as_u16())),
        Some(RouteTarget::Redirect { status, to }) => {
            ("redirect", format!("to = {}, status = {}", quoted(&to.to_string()), status.as_u16()))
        }
    });
    if let Some(route) = route {
        if route.strip > 0 {
            lines.push(("strip_prefix", quoted(&route.path.first(route.strip))));
        }
        if !route.add.is_empty() {
            lines.push(("add_prefix", quoted(&route.add)));
        }
    }
}

/// Says what else holds for requests to an upstream.
fn towards(tunnel: &TunnelConfig, lines: &mut Lines) {
    let rules = &tunnel.traffic;
    if let Some(rule) = rules.breaker {
        let after = write_duration(rule.retry_after);
        lines.push((
            "circuit_breaker",
            format!(
                "open_after = {}, retry_after = \"{after}\": meanwhile 503 circuit_open",
                rule.open_after
            ),
        ));
    }
    lines.push((
        "request_timeout",
        format!("\"{}\": then 504 upstream_timed_out", write_duration(tunnel.request_timeout)),
    ));
    match &tunnel.host_header {
        HostHeader::Upstream => {}
        HostHeader::Preserve => lines.push(("host_header", "\"preserve\"".to_owned())),
        HostHeader::Value(value) => {
            lines.push(("host_header", quoted(&String::from_utf8_lossy(value.as_bytes()))));
        }
    }
    let forwarded = match rules.forwarded {
        ForwardedFields::Both => None,
        ForwardedFields::X => Some("\"x\""),
        ForwardedFields::Rfc7239 => Some("\"rfc7239\""),
        ForwardedFields::None => Some("\"none\""),
    };
    lines.extend(forwarded.map(|which| ("forwarded", which.to_owned())));
    let request = edits(&rules.request);
    if !request.is_empty() {
        lines.push(("request_headers", request));
    }
    if rules.error_page.is_some() {
        lines.push(("error_page", "browsers get it with 502, 503 and 504".to_owned()));
    }
}

fn edits(edits: &FieldEdits) -> String {
    let mut said = Vec::new();
    if !edits.remove.is_empty() {
        said.push(format!("remove = {}", list(edits.remove.iter().map(HeaderName::as_str))));
    }
    for (key, pairs) in [("set", &edits.set), ("add", &edits.add)] {
        let pairs = pairs.iter().map(|(name, value)| format!("{name} = {}", quoted(&value.to_string())));
        let pairs = join(pairs);
        if !pairs.is_empty() {
            said.push(format!("{key} = {{ {pairs} }}"));
        }
    }
    said.join(", ")
}

/// A text as it stands in the configuration.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Texts as they stand in the configuration.
fn list(texts: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    format!("[{}]", join(texts.into_iter().map(|text| quoted(text.as_ref()))))
}

fn join(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join(", ")
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
        text.push_str(&format!(", methods = {}", list(route.methods.iter().map(Method::as_str))));
    }
    if let Some(host) = &route.host {
        text.push_str(&format!(", host = {}", quoted(host)));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::config;

    /// What is said of a request to the tunnel `web` with these rules.
    fn said(rules: &str, request: &str, ip: Option<&str>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let private = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        private("users", "ann:$2y$04$DWi7TdQmTGO1gNKxlEd7jeW8k8hyJKPvQTNt9V/Yz9gNCc4xOMRY2\n");
        private("secret", "old\nnew\n");
        let file = folder.path().join("agentd.toml");
        let text = format!(
            "[edge]\nurl = \"ws://127.0.0.1:1\"\n[[tunnel]]\nname = \"web\"\nupstream = 3000\n{rules}\n"
        );
        fs::write(&file, text).unwrap();
        let overrides = config::Overrides { token: Some("t".into()), ..config::Overrides::default() };
        let config = config::load(&file, &overrides).unwrap();
        let (method, target) = request.split_once(' ').unwrap();
        let thought = Thought {
            url: format!("https://web.example.com{target}").parse().unwrap(),
            method: method.parse().unwrap(),
            ip: ip.map(|ip| ip.parse().unwrap()),
        };
        explain(&config.tunnels, &thought)
            .unwrap()
            .iter()
            .map(|(what, says)| format!("{what}: {says}\n"))
            .collect()
    }

    const ALL: &str = r#"
        allow_ips = ["10.0.0.0/8"]
        deny_ips = ["10.6.6.6"]
        ip_except = ["/open"]
        basic_auth = { file = "users", realm = "team", except = ["/open", "/hooks/*"] }
        rate_limit = { requests = 20, per = "90s", by = "user" }
        max_body = "1KiB"
        circuit_breaker = { open_after = 2, retry_after = "5m" }
        request_timeout = "1500ms"
        forwarded = "x"
        request_headers = { remove = ["x-a"], set = { x-b = "a \"b\" ${client_ip}" } }
        response_headers = { add = { x-c = "c" } }
        cors = { origins = ["https://app.example"], methods = ["PUT"], credentials = true }
        [tunnel.bearer]
        jwks_url = "https://login.example/keys"
        issuer = "https://login.example"
        audience = ["web", "api"]
        algorithms = ["ES256"]
        claims = { scope = ["read", "write"] }
        [tunnel.oidc]
        issuer = "https://login.example"
        client_id = "web"
        allow_emails = ["ann@example.com"]
        allow_groups = ["ops"]
        session = "2h"
        except = ["/hooks/*"]
        [[tunnel.verify]]
        scheme = "stripe"
        secret_file = "secret"
        paths = ["/hooks/stripe"]
        [[tunnel.verify]]
        scheme = "hmac"
        secret_file = "secret"
        header = "x-signature"
        prefix = "v1="
        paths = ["/hooks/*"]
        [[tunnel.route]]
        path = "/api"
        methods = ["GET", "POST"]
        host = "web.example.com"
        strip_prefix = true
        add_prefix = "/v1"
        upstream = ["127.0.0.1:1", "127.0.0.1:2"]
        health_check = { path = "/" }
        [[tunnel.route]]
        path = "/old"
        redirect = { to = "https://new.example${target}", status = 308 }
        [[tunnel.route]]
        path = "/hooks/none"
        respond = { status = 204 }
    "#;

    #[test]
    fn everything_that_decides_about_a_request_is_said_as_it_is_configured() {
        assert_eq!(
            said(ALL, "POST /api/x?y", Some("10.0.0.1")),
            r#"tunnel: web
request: POST /api/x?y
allow_ips: 10.0.0.0/8
deny_ips: 10.6.6.6/32
: 10.0.0.1 passes
rate_limit: requests = 20, per = "90s", by = "user": one too many is answered with 429 rate_limited
cors: origins = ["https://app.example"], methods = ["PUT"], credentials = true: a preflight is answered here, of others with 403 origin_refused
visitors: by basic_auth or bearer or oidc
basic_auth: 1 user, realm = "team"
bearer: jwks_url = "https://login.example/keys", issuer = "https://login.example", audience = ["web", "api"], algorithms = ["ES256"], claims."scope" = ["read", "write"], user_claim = "sub"
oidc: issuer = "https://login.example", client_id = "web", allow_emails = ["ann@example.com"], allow_groups = ["ops"], groups_claim = "groups", session = "2h"
: pages of other origins that cors does not name get 403 origin_refused: passwords and sessions are not theirs to use
route: /api, methods = ["GET", "POST"], host = "web.example.com"
max_body: 1024 bytes: a longer one is answered with 413 body_too_large
upstream: http://127.0.0.1:1, or in turn http://127.0.0.1:2, of those that its health_check finds well
strip_prefix: "/api"
add_prefix: "/v1"
circuit_breaker: open_after = 2, retry_after = "5m": meanwhile 503 circuit_open
request_timeout: "1500ms": then 504 upstream_timed_out
forwarded: "x"
request_headers: remove = ["x-a"], set = { x-b = "a \"b\" ${client_ip}" }
response_headers: add = { x-c = "c" }
"#
        );
        for (request, ip, lines) in [
            ("GET /", Some("10.6.6.6"), &[": 10.6.6.6 is refused: 403 address_refused"][..]),
            ("GET /", None, &[": say --ip to know which"]),
            ("GET /open", Some("192.0.2.1"), &["ip_except: holds here", "visitors: by bearer or oidc"]),
            (
                "POST /hooks/stripe",
                Some("10.0.0.1"),
                &[
                    "visitors: by bearer\n",
                    "verify: scheme = \"stripe\", tolerance = \"5m\", paths = [\"/hooks/stripe\"], one of 2 secrets: without",
                    "upstream: http://localhost:3000",
                ],
            ),
            (
                "POST /hooks/none",
                Some("10.0.0.1"),
                &[
                    "verify: scheme = \"hmac\", header = \"x-signature\", prefix = \"v1=\", digest = \"sha256\", encoding = \"hex\", paths = [\"/hooks/*\"], one of 2",
                    ": 401 webhook_refused: with verify",
                ],
            ),
            (
                "GET /old/x",
                Some("10.0.0.1"),
                &["redirect: to = \"https://new.example${target}\", status = 308"],
            ),
            ("GET /api/%2e%2e/x", Some("10.0.0.1"), &["route: none: dot segments"]),
        ] {
            let said = said(ALL, request, ip);
            for line in lines {
                assert!(said.contains(&format!("\n{line}")), "{line}\n{said}");
            }
        }
        let bare = said("", "GET /", None);
        assert_eq!(
            bare,
            "tunnel: web\nrequest: GET /\nvisitors: anybody\nroute: none: the tunnel's upstream\n\
             upstream: http://localhost:3000\nrequest_timeout: \"1m\": then 504 upstream_timed_out\n"
        );
        assert!(
            said("maintenance = true", "GET /", None)
                .ends_with("\nmaintenance: true: every request is answered with 503 maintenance\n")
        );
    }
}
