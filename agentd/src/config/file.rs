//! The configuration file and the files it includes.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use http::uri::PathAndQuery;
use proto::{id::TunnelName, limits};
use rustls::pki_types::ServerName;

use super::{
    Config, ConfigError, FileConfig, HealthCheck, Http2, LogConfig, Overrides, TunnelConfig,
    address::{Address, Scheme},
    beside, certificates, delivery, parse_bytes, parse_host, parse_host_header, parse_inspect_address,
    parse_log_level, parse_origin, parse_status_address, traffic,
    value::{Document, Table, duration_within, nonempty_path, socket_path},
    visitors,
};
use crate::{identity::private_file::PrivateFiles, regular_file};

const ROOT_KEYS: &[&str] = &[
    "control_socket",
    "edge",
    "grace_period",
    "include",
    "inspect_address",
    "inspect_memory",
    "inspect_redact",
    "log",
    "max_concurrent",
    "status_address",
    "tunnel",
];
const INCLUDED_KEYS: &[&str] = &["tunnel"];
const EDGE_KEYS: &[&str] = &["ca_file", "token_file", "url"];
const LOG_KEYS: &[&str] = &["dir", "format", "keep_days", "level"];
const HEALTH_CHECK_KEYS: &[&str] = &["expect_status", "host", "interval", "max_failed", "path", "timeout"];
const TUNNEL_KEYS: &[&str] = &[
    "allow_ips",
    "basic_auth",
    "bearer",
    "ca_file",
    "circuit_breaker",
    "cors",
    "delivery",
    "deny_ips",
    "durable",
    "error_page",
    "forwarded",
    "health_check",
    "host_header",
    "http2",
    "insecure_skip_verify",
    "inspect",
    "inspect_body",
    "ip_except",
    "keep_alive",
    "maintenance",
    "max_body",
    "max_concurrent",
    "max_websockets",
    "name",
    "oidc",
    "origin",
    "rate_limit",
    "request_headers",
    "request_timeout",
    "response_headers",
    "rewrite_location",
    "route",
    "server_name",
    "upstream",
    "verify",
    "via",
    "websocket_idle_timeout",
];

/// Every key there is, for whoever describes them.
#[cfg(test)]
pub(crate) const ALL_KEYS: &[&[&str]] = &[
    ROOT_KEYS,
    INCLUDED_KEYS,
    EDGE_KEYS,
    LOG_KEYS,
    HEALTH_CHECK_KEYS,
    TUNNEL_KEYS,
    visitors::BASIC_KEYS,
    visitors::BEARER_KEYS,
    visitors::OIDC_KEYS,
    visitors::VERIFY_KEYS,
    traffic::ROUTE_KEYS,
    traffic::RESPOND_KEYS,
    traffic::REDIRECT_KEYS,
    traffic::FIELDS_KEYS,
    traffic::CORS_KEYS,
    traffic::RATE_LIMIT_KEYS,
    traffic::CIRCUIT_BREAKER_KEYS,
    delivery::DURABLE_KEYS,
    delivery::BACKOFF_KEYS,
    delivery::ANSWER_KEYS,
];

/// Reads a configuration file and what it includes, under `overrides`.
///
/// # Errors
///
/// [`ConfigError`].
pub fn load(path: &Path, overrides: &Overrides) -> Result<Config, ConfigError> {
    let mut config = FileConfig::default();
    let (mut names, mut callbacks) = (BTreeMap::new(), Vec::new());
    let files = PrivateFiles { credentials: overrides.credentials.clone() };
    // It may come through a pipe at the start: a command's output, say.
    let text = fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
    let document = Document { path, text: &text };
    let root = document.parse()?;
    let root = Table::new(&document, root.get_ref(), root.span(), "the file", ROOT_KEYS)?;
    let edge = root.table("edge", EDGE_KEYS)?;
    if let Some(edge) = &edge {
        config.url = edge.text("url", str::parse)?;
        config.token_file = edge.text("token_file", |text| nonempty_path(path, text))?;
        config.ca_file = edge.text("ca_file", |text| nonempty_path(path, text))?;
    }
    config.grace_period = root.text("grace_period", |text| duration_within(text, "0s", "15m"))?;
    config.max_concurrent = root.integer("max_concurrent", 1..=10_000)?;
    config.control_socket = root.text("control_socket", |text| socket_path(path, text))?;
    config.status_address = root.text("status_address", parse_status_address)?;
    read_inspect(&document, &root, &mut config)?;
    if let Some(log) = root.table("log", LOG_KEYS)? {
        config.log = LogConfig {
            level: log.text("level", parse_log_level)?,
            format: log.text("format", str::parse)?,
            dir: log.text("dir", |text| nonempty_path(path, text))?,
            keep_days: log.integer("keep_days", 1..=3650)?,
        };
    }
    read_tunnels(&document, &root, &files, &mut config, &mut names, &mut callbacks)?;
    for (pattern, span) in root.texts("include")? {
        let included = expand(&beside(path, pattern)).map_err(|message| document.error(span, message))?;
        for included in included {
            let text =
                regular_file::read_to_string(&included).map_err(|error| unreadable(&included, &error))?;
            let document = Document { path: &included, text: &text };
            let root = document.parse()?;
            let root = Table::new(&document, root.get_ref(), root.span(), "an included file", INCLUDED_KEYS)?;
            read_tunnels(&document, &root, &files, &mut config, &mut names, &mut callbacks)?;
        }
    }
    if config.tunnels.is_empty() {
        return Err(document.error(0..0, "there is no tunnel: add a [[tunnel]] with name and upstream"));
    }
    name_callbacks(&mut config.tunnels, callbacks)?;
    let config = overrides.apply(config)?;
    if let (Some(edge), Some(ca_file), None) = (&edge, config.edge.trusted(), &overrides.ca_file) {
        certificates::read(edge, ca_file)?;
    }
    Ok(config)
}

/// A tunnel that another one names as its `callback_tunnel`, and what is said where there is none of that name.
type Callback = (TunnelName, ConfigError);

/// Tells the tunnels that others finish signing in at.
fn name_callbacks(tunnels: &mut [TunnelConfig], callbacks: Vec<Callback>) -> Result<(), ConfigError> {
    for (name, missing) in callbacks {
        let tunnel = tunnels.iter_mut().find(|tunnel| tunnel.name == name).ok_or(missing)?;
        tunnel.visitors.is_callback = true;
    }
    Ok(())
}

/// The `control_socket` that a configuration names, whatever else is in it: commands for a running agent
/// find it so. `None` where there is no such file or key.
#[must_use]
pub fn control_socket_named_in(path: &Path) -> Option<PathBuf> {
    let text = regular_file::read_to_string(path).ok()?;
    let root = toml::de::DeTable::parse(&text).ok()?;
    let socket = root.get_ref().get("control_socket")?.get_ref().as_str()?;
    nonempty_path(path, socket).ok()
}

fn unreadable(path: &Path, error: &io::Error) -> ConfigError {
    ConfigError::new(format!("cannot read the configuration {}: {error}", path.display()))
}

fn read_tunnels(
    document: &Document<'_>,
    root: &Table<'_>,
    files: &PrivateFiles,
    config: &mut FileConfig,
    names: &mut BTreeMap<TunnelName, PathBuf>,
    callbacks: &mut Vec<Callback>,
) -> Result<(), ConfigError> {
    for table in root.tables("tunnel", TUNNEL_KEYS)? {
        let tunnel = read_tunnel(document, &table, files)?;
        if let Some(earlier) = names.insert(tunnel.name.clone(), document.path.into()) {
            let message = format!("tunnel {:?} is already in {}", tunnel.name, earlier.display());
            return Err(document.error(table.span_of("name"), message));
        }
        if config.tunnels.len() >= limits::TUNNELS_PER_CONNECTION {
            let message =
                format!("one tunnel too many: an agent serves at most {}", limits::TUNNELS_PER_CONNECTION);
            return Err(document.error(table.span_of("name"), message));
        }
        let oidc = tunnel.visitors.oidc.as_ref();
        if let Some(name) = oidc.and_then(|oidc| oidc.callback_tunnel.clone())
            && let Some(table) = table.table("oidc", visitors::OIDC_KEYS)?
        {
            let missing = format!(
                "there is no tunnel {name} in this configuration: name the one whose address the provider knows"
            );
            callbacks.push((name, table.error_at("callback_tunnel", missing)));
        }
        config.tunnels.push(tunnel);
    }
    Ok(())
}

fn read_tunnel(
    document: &Document<'_>,
    table: &Table<'_>,
    files: &PrivateFiles,
) -> Result<TunnelConfig, ConfigError> {
    let path = document.path;
    let name = table.text("name", str::parse)?.ok_or_else(|| table.error("this tunnel has no name"))?;
    let upstream: Option<Address> = table.text_or_integer("upstream", str::parse)?;
    let mut tunnel = TunnelConfig::new(name, upstream);
    if let Some(host_header) = table.text("host_header", parse_host_header)? {
        tunnel.host_header = host_header;
    }
    if let Some(origin) = table.text("origin", parse_origin)? {
        tunnel.origin = origin;
    }
    tunnel.rewrite_location = table.flag("rewrite_location")?.unwrap_or(true);
    tunnel.via = table.flag("via")?.unwrap_or(true);
    if let Some(timeout) = table.text("request_timeout", |text| duration_within(text, "1ms", "15m"))? {
        tunnel.request_timeout = timeout;
    }
    if let Some(max_concurrent) = table.integer("max_concurrent", 1..=10_000)? {
        tunnel.max_concurrent = max_concurrent;
    }
    if let Some(max_websockets) = table.integer("max_websockets", 1..=limits::SOCKETS)? {
        tunnel.max_websockets = max_websockets;
    }
    tunnel.websocket_idle_timeout =
        table.text("websocket_idle_timeout", |text| duration_within(text, "1s", "24h"))?;
    tunnel.ca_file = table.text("ca_file", |text| nonempty_path(path, text))?;
    tunnel.server_name = table.text("server_name", |text| {
        ServerName::try_from(text.to_owned()).map_err(|_| format!("{text:?} is not a DNS name or address"))
    })?;
    tunnel.insecure_skip_verify = table.flag("insecure_skip_verify")?.unwrap_or(false);
    if let Some(http2) = table.text("http2", parse_http2)? {
        tunnel.http2 = http2;
    }
    if let Some(keep_alive) = table.text("keep_alive", parse_keep_alive)? {
        tunnel.keep_alive = keep_alive;
    }
    if let Some(check) = table.table("health_check", HEALTH_CHECK_KEYS)? {
        tunnel.health_check = Some(read_health_check(&check)?);
    }
    tunnel.visitors = visitors::read(table, files)?;
    tunnel.webhooks = visitors::read_webhooks(table, files)?;
    tunnel.inspect = table.flag("inspect")?.unwrap_or(false);
    if let Some(bytes) = table.text_or_integer("inspect_body", |text| bytes_within(text, "0", "16MiB"))? {
        tunnel.inspect_body = bytes;
    }
    tunnel.traffic = traffic::read(table, |table| {
        table.table("health_check", HEALTH_CHECK_KEYS)?.map(|check| read_health_check(&check)).transpose()
    })?;
    tunnel.delivery = delivery::read(table)?;
    if tunnel.upstream.is_none() {
        if tunnel.traffic.routes.is_empty() {
            return Err(table.error(format!(
                "tunnel {} leads nowhere: add upstream = \"127.0.0.1:3000\", or a [[tunnel.route]]",
                tunnel.name
            )));
        }
        if table.has("health_check") {
            let message = "\"health_check\" asks the tunnel's upstream, and it has none: put it into a route";
            return Err(document.error(table.span_of("health_check"), message));
        }
    }
    if tunnel.upstreams().all(|upstream| upstream.scheme() == Scheme::Http) {
        for key in ["ca_file", "server_name", "insecure_skip_verify"] {
            if table.has(key) {
                return Err(document.error(
                    table.span_of(key),
                    format!("{key:?} is about TLS, but no upstream of {} is https://", tunnel.name),
                ));
            }
        }
    }
    if let Some(ca_file) = tunnel.ca_file.as_deref().filter(|_| !tunnel.insecure_skip_verify) {
        certificates::read(table, ca_file)?;
    }
    Ok(tunnel)
}

fn read_inspect(
    document: &Document<'_>,
    root: &Table<'_>,
    config: &mut FileConfig,
) -> Result<(), ConfigError> {
    if let Some(address) = root.text("inspect_address", parse_inspect_address)? {
        config.inspect.address = address;
    }
    if let Some(bytes) = root.text_or_integer("inspect_memory", |text| bytes_within(text, "1MiB", "4GiB"))? {
        config.inspect.memory = bytes;
    }
    for (name, span) in root.texts("inspect_redact")? {
        let name: http::HeaderName = name
            .parse()
            .map_err(|_| document.error(span, format!("{name:?} is not the name of a header field")))?;
        config.inspect.redact.push(name.as_str().to_owned());
    }
    Ok(())
}

fn bytes_within(text: &str, least: &str, most: &str) -> Result<usize, String> {
    let bytes = parse_bytes(text)?;
    if (parse_bytes(least)?..=parse_bytes(most)?).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!("{text:?} must be from {least} to {most}"))
    }
}

fn read_health_check(table: &Table<'_>) -> Result<HealthCheck, ConfigError> {
    let path = table.text("path", |text| {
        let path = text.parse::<PathAndQuery>().ok().filter(|_| text.starts_with('/'));
        path.ok_or_else(|| format!("{text:?} is not a path: write it as \"/healthz\""))
    })?;
    let path = path.ok_or_else(|| table.error("this health_check has no path: add path = \"/healthz\""))?;
    let mut check = HealthCheck::new(path);
    check.host =
        table.text("host", |text| parse_host(text).ok_or_else(|| format!("{text:?} is not a host name")))?;
    if let Some(expected) = table.text_or_integer("expect_status", str::parse)? {
        check.expect_status = expected;
    }
    if let Some(interval) = table.text("interval", |text| duration_within(text, "100ms", "1h"))? {
        check.interval = interval;
    }
    if let Some(timeout) = table.text("timeout", |text| duration_within(text, "10ms", "1m"))? {
        check.timeout = timeout;
    }
    if let Some(max_failed) = table.integer("max_failed", 1..=100)? {
        check.max_failed = max_failed;
    }
    Ok(check)
}

fn parse_http2(text: &str) -> Result<Http2, String> {
    match text {
        "auto" => Ok(Http2::Auto),
        "always" => Ok(Http2::Always),
        "never" => Ok(Http2::Never),
        other => Err(format!("{other:?} is none of \"auto\", \"always\" and \"never\"")),
    }
}

fn parse_keep_alive(text: &str) -> Result<Option<std::time::Duration>, String> {
    match text {
        "off" => Ok(None),
        text => duration_within(text, "100ms", "1h")
            .map(Some)
            .map_err(|error| format!("{error}; \"off\" uses no connection twice")),
    }
}

/// The files a pattern names, in order: `*` stands for anything in the last part of the path. A pattern
/// with a star may name none; a plain name must exist.
fn expand(pattern: &Path) -> Result<Vec<PathBuf>, String> {
    let shown = pattern.display();
    let last = pattern.file_name().and_then(|name| name.to_str()).ok_or(format!("{shown} names no file"))?;
    let folder = pattern.parent().unwrap_or_else(|| Path::new("."));
    if folder.to_string_lossy().contains('*') {
        return Err(format!("{shown}: '*' may stand in the file name only"));
    }
    let Some((prefix, suffix)) = last.split_once('*') else {
        return if pattern.exists() {
            Ok(vec![pattern.into()])
        } else {
            Err(format!("{shown} does not exist"))
        };
    };
    if suffix.contains('*') {
        return Err(format!("{shown}: one '*' is enough"));
    }
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("cannot read {}: {error}", folder.display())),
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| {
            name.to_str().is_some_and(|name| {
                !name.starts_with('.')
                    && name.len() >= prefix.len() + suffix.len()
                    && name.starts_with(prefix)
                    && name.ends_with(suffix)
            })
        })
        .map(|name| folder.join(name))
        .collect();
    files.sort();
    Ok(files)
}
