//! Where the requests of a tunnel go and what is changed on the way, as the configuration says it.

use std::{fs, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};

use super::{
    ConfigError, HealthCheck,
    address::Address,
    paths::MOST_DECODINGS,
    template::Template,
    value::{Table, duration_within, nonempty_path},
};
use crate::regular_file;

pub(super) const ROUTE_KEYS: &[&str] = &[
    "add_prefix",
    "files",
    "health_check",
    "host",
    "max_body",
    "methods",
    "path",
    "redirect",
    "respond",
    "strip_prefix",
    "upstream",
];
pub(super) const RESPOND_KEYS: &[&str] = &["body", "headers", "status"];
pub(super) const REDIRECT_KEYS: &[&str] = &["status", "to"];
pub(super) const FIELDS_KEYS: &[&str] = &["add", "remove", "set"];
pub(super) const CORS_KEYS: &[&str] =
    &["credentials", "expose_headers", "headers", "max_age", "methods", "origins"];
pub(super) const RATE_LIMIT_KEYS: &[&str] = &["by", "per", "requests"];
pub(super) const CIRCUIT_BREAKER_KEYS: &[&str] = &["open_after", "retry_after"];

/// The longest `error_page` and body of `respond`.
const PAGE_BYTES: usize = 64 * 1024;

/// What is done with the requests of one tunnel, once their visitors are let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrafficRules {
    /// Where requests go; what none of them takes goes to the tunnel's upstream. Longest path first.
    pub routes: Vec<RouteRule>,
    /// Changes to what the upstream is sent.
    pub request: FieldEdits,
    /// Changes to what the public client is sent.
    pub response: FieldEdits,
    /// What pages of other origins may do.
    pub cors: Option<CorsRule>,
    /// Which forwarding fields reach the upstream.
    pub forwarded: ForwardedFields,
    /// How many requests are let through.
    pub rate_limit: Option<RateLimitRule>,
    /// The longest body of a request, in bytes.
    pub max_body: Option<u64>,
    /// When an upstream that fails is left alone for a while.
    pub breaker: Option<BreakerRule>,
    /// The page that browsers get for 502, 503 and 504.
    pub error_page: Option<String>,
    /// Whether every request is answered with 503.
    pub maintenance: bool,
}

/// One `[[tunnel.route]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteRule {
    /// Where it holds.
    pub path: RoutePath,
    /// The methods it holds for; all if empty.
    pub methods: Vec<Method>,
    /// The public host it holds for, in lower case and without a port; any if `None`.
    pub host: Option<String>,
    /// How many segments of the path are taken off before the request goes on.
    pub strip: usize,
    /// What is put before the path then, such as `/v1`; else empty.
    pub add: String,
    /// The longest body of a request, in bytes.
    pub max_body: Option<u64>,
    /// Where it leads.
    pub target: RouteTarget,
}

impl RouteRule {
    /// What tells it from the other routes of its tunnel: `/api`, `PUT,POST admin.example.com/api`.
    #[must_use]
    pub fn name(&self) -> String {
        let methods: Vec<_> = self.methods.iter().map(Method::as_str).collect();
        let space = if methods.is_empty() { "" } else { " " };
        format!("{}{space}{}{}", methods.join(","), self.host.as_deref().unwrap_or_default(), self.path)
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// To one of these in turns.
    Upstreams(Vec<Address>, Option<HealthCheck>),
    /// To the files of a folder.
    Files(PathBuf),
    /// To an answer that is always the same.
    Respond {
        /// Its status.
        status: StatusCode,
        /// Its fields.
        headers: Vec<(HeaderName, HeaderValue)>,
        /// Its body.
        body: String,
    },
    /// Elsewhere.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: StatusCode,
        /// What `Location` says.
        to: Template,
    },
}

/// A path of whole segments: `/api` is `/api` and everything below it, never `/apix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutePath(Vec<String>);

impl RoutePath {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let inner = text
            .strip_prefix('/')
            .filter(|_| !text.contains("//"))
            .map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        let segments: Vec<String> = match inner {
            Some("") => Vec::new(),
            Some(inner) => inner.split('/').map(str::to_owned).collect(),
            None => return Err(format!("{text:?} is no path: write it as \"/api\"")),
        };
        let is_plain = |segment: &String| {
            !matches!(&**segment, "" | "." | "..")
                && !segment.contains(['*', '?', '#', '\\', '%'])
                && segment.chars().all(|c| !c.is_control() && c != ' ')
        };
        if !segments.iter().all(is_plain) {
            return Err(format!(
                "{text:?} is no path of a route: whole segments such as \"/api/v1\", without escapes or stars; \
                 what is below it belongs to it"
            ));
        }
        Ok(Self(segments))
    }

    /// Whether a request's path is this one or below it. Its segments are compared after decoding, with their case;
    /// an escaped slash is a character of its segment, and an empty segment is one.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        let mut segments = path.split('/').skip(1);
        self.0.iter().all(|own| segments.next().is_some_and(|segment| is_same(segment, own)))
    }

    /// How many segments it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is `/`.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first `count` segments as a path; empty for none.
    #[must_use]
    pub fn first(&self, count: usize) -> String {
        self.0.iter().take(count).flat_map(|segment| ["/", segment]).collect()
    }
}

impl std::fmt::Display for RoutePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { f.write_str("/") } else { f.write_str(&self.first(self.len())) }
    }
}

fn is_same(segment: &str, own: &str) -> bool {
    segment == own || percent_encoding::percent_decode_str(segment).eq(own.bytes())
}

/// Whether a path leads to another place than it says, when a server resolves it: `.` and `..` in whatever way and
/// however often they are escaped, also behind an escaped slash or backslash, and before a `;`.
#[must_use]
pub fn has_dot_segments(path: &str) -> bool {
    let mut path = path.as_bytes().to_vec();
    for _ in 0..=MOST_DECODINGS {
        let mut segments = path.split(|b| matches!(b, b'/' | b'\\'));
        let is_dots = |segment: &[u8]| matches!(segment.split(|&b| b == b';').next(), Some(b"." | b".."));
        if segments.any(is_dots) {
            return true;
        }
        let decoded: Vec<u8> = percent_encoding::percent_decode(&path).collect();
        if decoded.len() == path.len() {
            return false;
        }
        path = decoded;
    }
    // Nobody writes a path like this who means only one place.
    true
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<'a> {
    /// To this route.
    Route(usize, &'a RouteRule),
    /// To the tunnel's own upstream: no route takes it.
    Tunnel,
    /// Nowhere: it has dot segments, which routes and upstreams would read in different ways.
    Ambiguous,
}

impl TrafficRules {
    /// Everything to the tunnel's upstream, as it is.
    pub const NOTHING: Self = Self {
        routes: Vec::new(),
        request: FieldEdits::NONE,
        response: FieldEdits::NONE,
        cors: None,
        forwarded: ForwardedFields::Both,
        rate_limit: None,
        max_body: None,
        breaker: None,
        error_page: None,
        maintenance: false,
    };

    /// Finds the route of a request. `host` is the public one, with or without a port.
    #[must_use]
    pub fn choose(&self, method: &Method, host: Option<&str>, path: &str) -> Choice<'_> {
        if self.routes.is_empty() {
            return Choice::Tunnel;
        }
        if has_dot_segments(path) {
            return Choice::Ambiguous;
        }
        let host = host.map(|host| name_of(host).to_ascii_lowercase());
        let takes = |route: &RouteRule| {
            (route.methods.is_empty() || route.methods.contains(method))
                && route.host.as_ref().is_none_or(|own| host.as_ref() == Some(own))
                && route.path.covers(path)
        };
        let found = self.routes.iter().enumerate().find(|(_, route)| takes(route));
        found.map_or(Choice::Tunnel, |(index, route)| Choice::Route(index, route))
    }
}

/// A host without its port and the dot at its end.
fn name_of(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}

/// Changes to header fields: first those of `remove` go, then `set` replaces, then `add` adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldEdits {
    /// Fields that go.
    pub remove: Vec<HeaderName>,
    /// Fields that have this value alone.
    pub set: Vec<(HeaderName, Template)>,
    /// Values besides those that are there.
    pub add: Vec<(HeaderName, Template)>,
}

impl FieldEdits {
    /// None.
    pub const NONE: Self = Self { remove: Vec::new(), set: Vec::new(), add: Vec::new() };
}

/// What pages of other origins may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsRule {
    /// Whose pages: `https://app.example.com`, `https://*.example.com`, or `*` for all.
    pub origins: Vec<String>,
    /// With which methods.
    pub methods: Vec<Method>,
    /// With which fields; those that are asked for if empty.
    pub headers: Vec<HeaderName>,
    /// Which fields of a response they may read.
    pub expose: Vec<HeaderName>,
    /// Whether with cookies and passwords.
    pub credentials: bool,
    /// How long a browser may remember it.
    pub max_age: Option<Duration>,
}

/// Which fields tell the upstream how the public client asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForwardedFields {
    /// Both kinds.
    #[default]
    Both,
    /// `X-Forwarded-…`.
    X,
    /// `Forwarded` (RFC 7239).
    Rfc7239,
    /// Neither.
    None,
}

/// How many requests are let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimitRule {
    /// This many …
    pub requests: u32,
    /// … within this time …
    pub per: Duration,
    /// … of each of these.
    pub by: LimitedBy,
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitedBy {
    /// Those of a client address; of an IPv6 one those of its /64.
    Ip,
    /// Those of a visitor that is known, else those of the address.
    User,
    /// All.
    Tunnel,
}

/// When an upstream that fails is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerRule {
    /// After this many failures in a row.
    pub open_after: u32,
    /// For this long; then one request tries it.
    pub retry_after: Duration,
}

/// Reads what a tunnel says of its traffic.
pub(super) fn read(
    table: &Table<'_>,
    health_check: impl Fn(&Table<'_>) -> Result<Option<HealthCheck>, ConfigError>,
) -> Result<TrafficRules, ConfigError> {
    let mut routes: Vec<RouteRule> = Vec::new();
    for table in table.tables("route", ROUTE_KEYS)? {
        let route = read_route(&table, &health_check)?;
        let same = |other: &RouteRule| {
            other.path == route.path && other.methods == route.methods && other.host == route.host
        };
        if routes.iter().any(same) {
            return Err(table.error_at("path", format!("another route has the path {} already", route.path)));
        }
        routes.push(route);
    }
    // A stable order: of two routes with the same path, the one that asks for more comes first.
    routes.sort_by_key(|route| {
        (std::cmp::Reverse(route.path.len()), route.host.is_none(), route.methods.is_empty())
    });
    Ok(TrafficRules {
        routes,
        request: read_edits(table, "request_headers", &OF_REQUEST)?,
        response: read_edits(table, "response_headers", &OF_RESPONSE)?,
        cors: table.table("cors", CORS_KEYS)?.map(|table| read_cors(&table)).transpose()?,
        forwarded: table
            .text("forwarded", |text| match text {
                "both" => Ok(ForwardedFields::Both),
                "x" => Ok(ForwardedFields::X),
                "rfc7239" => Ok(ForwardedFields::Rfc7239),
                "none" => Ok(ForwardedFields::None),
                other => Err(format!("{other:?} is none of \"both\", \"x\", \"rfc7239\" and \"none\"")),
            })?
            .unwrap_or_default(),
        rate_limit: table
            .table("rate_limit", RATE_LIMIT_KEYS)?
            .map(|table| read_rate_limit(&table))
            .transpose()?,
        max_body: max_body(table)?,
        breaker: table
            .table("circuit_breaker", CIRCUIT_BREAKER_KEYS)?
            .map(|table| read_breaker(&table))
            .transpose()?,
        error_page: table.text("error_page", |text| {
            let path = nonempty_path(table.document().path, text)?;
            let page = regular_file::read_to_string(&path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            if page.len() > PAGE_BYTES {
                return Err(format!("{} is over {PAGE_BYTES} bytes", path.display()));
            }
            Ok(page)
        })?,
        maintenance: table.flag("maintenance")?.unwrap_or(false),
    })
}

fn read_route(
    table: &Table<'_>,
    health_check: impl Fn(&Table<'_>) -> Result<Option<HealthCheck>, ConfigError>,
) -> Result<RouteRule, ConfigError> {
    let path = table
        .text("path", RoutePath::parse)?
        .ok_or_else(|| table.error("this route has no path: add path = \"/api\", or \"/\" for the rest"))?;
    let target = read_target(table, health_check)?;
    let leads_on = matches!(target, RouteTarget::Upstreams(..) | RouteTarget::Files(_));
    for key in ["strip_prefix", "add_prefix"] {
        if table.has(key) && !leads_on {
            return Err(table.error_at(key, format!("{key:?} is for routes to upstream or files")));
        }
    }
    let strip = if table.is_text("strip_prefix") {
        table.text("strip_prefix", |text| {
            let prefix = RoutePath::parse(text)?;
            if path.0.starts_with(&prefix.0) {
                Ok(prefix.len())
            } else {
                Err(format!("{text:?} is no beginning of the route's path, {path}"))
            }
        })?
    } else {
        table.flag("strip_prefix")?.map(|strips| if strips { path.len() } else { 0 })
    };
    let add = table.text("add_prefix", RoutePath::parse)?;
    Ok(RouteRule {
        methods: list(table, "methods", method)?,
        host: table.text("host", |text| {
            // A star would be a name of its own, which no request has.
            let is_host =
                text.parse::<http::uri::Authority>().is_ok_and(|host| !host.as_str().contains(['@', '*']));
            if is_host && name_of(text) == text {
                Ok(text.to_ascii_lowercase())
            } else {
                Err(format!("{text:?} is no host name: write it as app.example.com, without a port"))
            }
        })?,
        strip: strip.unwrap_or(0),
        add: add.map(|add| add.first(add.len())).unwrap_or_default(),
        max_body: max_body(table)?,
        target,
        path,
    })
}

fn read_target(
    table: &Table<'_>,
    health_check: impl Fn(&Table<'_>) -> Result<Option<HealthCheck>, ConfigError>,
) -> Result<RouteTarget, ConfigError> {
    const TARGETS: [&str; 4] = ["upstream", "files", "respond", "redirect"];
    let mut named = TARGETS.into_iter().filter(|key| table.has(key));
    let (Some(key), None) = (named.next(), named.next()) else {
        return Err(table.error("a route leads to one of upstream, files, respond and redirect"));
    };
    if key != "upstream" && table.has("health_check") {
        return Err(table.error_at("health_check", "\"health_check\" is for routes to upstream"));
    }
    match key {
        "upstream" => {
            let upstreams: Vec<Address> = if table.is_list("upstream") {
                list(table, "upstream", |text| text.parse::<Address>().map_err(|error| error.to_string()))?
            } else {
                table.text_or_integer("upstream", str::parse)?.into_iter().collect()
            };
            if upstreams.is_empty() {
                return Err(table.error_at("upstream", "a list of upstreams must not be empty"));
            }
            Ok(RouteTarget::Upstreams(upstreams, health_check(table)?))
        }
        "files" => {
            let folder = table.text("files", |text| {
                let path = nonempty_path(table.document().path, text)?;
                match fs::metadata(&path) {
                    Ok(found) if found.is_dir() => Ok(path),
                    Ok(_) => Err(format!("{} is no folder", path.display())),
                    Err(error) => Err(format!("cannot read {}: {error}", path.display())),
                }
            })?;
            Ok(RouteTarget::Files(folder.unwrap_or_default()))
        }
        "respond" => {
            let table = table.table("respond", RESPOND_KEYS)?.expect("it is there");
            let status = table.integer("status", 200..=599)?.unwrap_or(200);
            let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
            let mut headers = Vec::new();
            for (name, values) in table.choices("headers")? {
                let name = field_name(&name, &OF_RESPONSE).map_err(|text| table.error_at("headers", text))?;
                for value in values {
                    let value = HeaderValue::from_str(&value)
                        .map_err(|_| table.error_at("headers", format!("{value:?} is no field's value")))?;
                    headers.push((name.clone(), value));
                }
            }
            let body = table.text("body", |text| {
                if text.len() > PAGE_BYTES {
                    Err("this body is too long: use files")
                } else {
                    Ok(text.to_owned())
                }
            })?;
            let body = body.unwrap_or_default();
            let status = status.unwrap_or(StatusCode::OK);
            if !body.is_empty() && matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
                return Err(table.error_at("body", format!("an answer with {} has no body", status.as_u16())));
            }
            Ok(RouteTarget::Respond { status, headers, body })
        }
        _ => {
            let place = |text: &str| {
                let leads =
                    text.starts_with('/') || text.starts_with("http://") || text.starts_with("https://");
                if leads {
                    Template::parse(text)
                } else {
                    Err(format!("{text:?} leads nowhere: write it as /new or https://example.com${{target}}"))
                }
            };
            if table.is_text("redirect") {
                let to = table.text("redirect", place)?.expect("it is there");
                return Ok(RouteTarget::Redirect { status: StatusCode::FOUND, to });
            }
            let table = table.table("redirect", REDIRECT_KEYS)?.expect("it is there");
            let to = table.text("to", place)?.ok_or_else(|| table.error("this redirect has no \"to\""))?;
            let status = match table.integer("status", 300..=399)?.unwrap_or(302) {
                301 => StatusCode::MOVED_PERMANENTLY,
                302 => StatusCode::FOUND,
                303 => StatusCode::SEE_OTHER,
                307 => StatusCode::TEMPORARY_REDIRECT,
                308 => StatusCode::PERMANENT_REDIRECT,
                _ => return Err(table.error_at("status", "a redirect is 301, 302, 303, 307 or 308")),
            };
            Ok(RouteTarget::Redirect { status, to })
        }
    }
}

/// Every text of a list, parsed.
pub(super) fn list<T>(
    table: &Table<'_>,
    key: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, ConfigError> {
    let read = |(text, span)| parse(text).map_err(|message| table.document().error(span, message));
    table.texts(key)?.into_iter().map(read).collect()
}

pub(super) fn method(text: &str) -> Result<Method, String> {
    let known = text.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
    text.parse().ok().filter(|_| known).ok_or_else(|| format!("{text:?} is no method: write it as GET"))
}

/// Fields that belong to one connection, or that are made from what is sent.
const FRAMING: [HeaderName; 10] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::SEC_WEBSOCKET_KEY,
];
/// What else no rule changes in a request.
const OF_REQUEST: [HeaderName; 1] = [header::HOST];
/// What else no rule changes in a response.
const OF_RESPONSE: [HeaderName; 5] = [
    proto::forwarded::ERROR,
    header::SEC_WEBSOCKET_ACCEPT,
    header::SEC_WEBSOCKET_EXTENSIONS,
    header::SEC_WEBSOCKET_PROTOCOL,
    header::SEC_WEBSOCKET_VERSION,
];

fn field_name(text: &str, own: &[HeaderName]) -> Result<HeaderName, String> {
    let name: HeaderName = text.parse().map_err(|_| format!("{text:?} is no field's name"))?;
    if name == header::HOST && own.contains(&name) {
        return Err("host is set by \"host_header\"".to_owned());
    }
    let reserved =
        matches!(name.as_str(), "keep-alive" | "proxy-connection" | "x-tunnel-request-id" | "x-tunnel-user");
    if reserved || FRAMING.contains(&name) || own.contains(&name) {
        return Err(format!("{text:?} is the tunnel's own affair"));
    }
    Ok(name)
}

fn read_edits(table: &Table<'_>, key: &str, own: &[HeaderName]) -> Result<FieldEdits, ConfigError> {
    let Some(table) = table.table(key, FIELDS_KEYS)? else { return Ok(FieldEdits::NONE) };
    let pairs = |key: &str| -> Result<Vec<(HeaderName, Template)>, ConfigError> {
        let mut pairs = Vec::new();
        for (name, values) in table.choices(key)? {
            let name = field_name(&name, own).map_err(|text| table.error_at(key, text))?;
            if key == "set" && values.len() != 1 {
                return Err(
                    table.error_at(key, format!("{name} is set to one value: further ones go into \"add\""))
                );
            }
            for value in values {
                let value = Template::parse(&value).map_err(|text| table.error_at(key, text))?;
                pairs.push((name.clone(), value));
            }
        }
        Ok(pairs)
    };
    Ok(FieldEdits {
        remove: list(&table, "remove", |text| field_name(text, own))?,
        set: pairs("set")?,
        add: pairs("add")?,
    })
}

fn read_cors(table: &Table<'_>) -> Result<CorsRule, ConfigError> {
    let origins = list(table, "origins", origin)?;
    if origins.is_empty() {
        return Err(table.error("this cors has no origins: add origins = [\"https://app.example.com\"]"));
    }
    let credentials = table.flag("credentials")?.unwrap_or(false);
    // Any page can open one whose origin is null: in a sandboxed frame.
    if credentials && origins.iter().any(|origin| matches!(&**origin, "*" | "null")) {
        return Err(table
            .error_at("credentials", "pages of every origin would act as your visitors: name the origins"));
    }
    let name = |text: &str| text.parse::<HeaderName>().map_err(|_| format!("{text:?} is no field's name"));
    let methods = list(table, "methods", method)?;
    Ok(CorsRule {
        origins,
        methods: if methods.is_empty() {
            vec![Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE]
        } else {
            methods
        },
        headers: list(table, "headers", name)?,
        expose: list(table, "expose_headers", name)?,
        credentials,
        max_age: table.text("max_age", |text| duration_within(text, "0s", "24h"))?,
    })
}

fn origin(text: &str) -> Result<String, String> {
    let wrong =
        || format!("{text:?} is no origin: write it as https://app.example.com, https://*.example.com or *");
    if matches!(text, "*" | "null") {
        return Ok(text.to_owned());
    }
    let (scheme, host) = text.split_once("://").ok_or_else(wrong)?;
    let plain = host.strip_prefix("*.").unwrap_or(host);
    // Browsers leave out the port that the scheme has anyway, so it would never be asked for.
    let usual_port = if scheme == "https" { ":443" } else { ":80" };
    if let Some(host) = host.strip_suffix(usual_port) {
        return Err(format!("browsers say this origin without its port: write it as {scheme}://{host}"));
    }
    let is_origin = matches!(scheme, "http" | "https")
        && plain.parse::<http::uri::Authority>().is_ok_and(|host| !host.as_str().contains('@'))
        && !plain.contains(['*', '/'])
        && text == text.to_ascii_lowercase();
    if is_origin { Ok(text.to_owned()) } else { Err(wrong()) }
}

fn read_rate_limit(table: &Table<'_>) -> Result<RateLimitRule, ConfigError> {
    let requests = table
        .integer("requests", 1..=1_000_000)?
        .ok_or_else(|| table.error("this rate_limit has no requests: add requests = 100"))?;
    let by = table.text("by", |text| match text {
        "ip" => Ok(LimitedBy::Ip),
        "user" => Ok(LimitedBy::User),
        "tunnel" => Ok(LimitedBy::Tunnel),
        other => Err(format!("{other:?} is none of \"ip\", \"user\" and \"tunnel\"")),
    })?;
    Ok(RateLimitRule {
        requests,
        per: table.text("per", |text| duration_within(text, "1s", "24h"))?.unwrap_or(Duration::from_secs(60)),
        by: by.unwrap_or(LimitedBy::Ip),
    })
}

fn read_breaker(table: &Table<'_>) -> Result<BreakerRule, ConfigError> {
    Ok(BreakerRule {
        open_after: table.integer("open_after", 1..=1000)?.unwrap_or(5),
        retry_after: table
            .text("retry_after", |text| duration_within(text, "100ms", "1h"))?
            .unwrap_or(Duration::from_secs(10)),
    })
}

fn max_body(table: &Table<'_>) -> Result<Option<u64>, ConfigError> {
    table.text_or_integer("max_body", |text| {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim_start() {
            "" | "B" => Some(1),
            "KiB" => Some(1 << 10),
            "MiB" => Some(1 << 20),
            "KB" => Some(1_000),
            "MB" => Some(1_000_000),
            _ => None,
        };
        let bytes = unit.and_then(|unit: u64| number.parse::<u64>().ok()?.checked_mul(unit));
        bytes.ok_or_else(|| format!("{text:?} is no size: write it as 65536, \"512KiB\" or \"1MB\""))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(text: &str) -> RoutePath {
        RoutePath::parse(text).unwrap()
    }

    #[test]
    fn a_path_is_whole_segments() {
        for (own, asked, is_covered) in [
            ("/", "/", true),
            ("/", "/x", true),
            ("/", "//", true),
            ("/api", "/api", true),
            ("/api", "/api/", true),
            ("/api", "/api/x", true),
            ("/api", "/api//x", true),
            ("/api/", "/api", true),
            ("/api", "/apix", false),
            ("/api", "/ap", false),
            ("/api", "/", false),
            ("/api", "/API", false),
            ("/api", "/Api/x", false),
            ("/api", "//api", false),
            ("/api", "/x/api", false),
            ("/api", "/%61pi/x", true),
            ("/api", "/%61%70%69", true),
            ("/api", "/%41pi", false),
            ("/api", "/api%2Fx", false),
            ("/api", "/api%2f", false),
            ("/api", "/%2fapi", false),
            ("/api", "/api%00", false),
            ("/api", "/api;x", false),
            ("/api", "/%2561pi", false),
            ("/api/v1", "/api/v1/x", true),
            ("/api/v1", "/api%2Fv1/x", false),
            ("/api/v1", "/api/v10", false),
            ("/api/v1", "/api//v1", false),
            ("/größe", "/gr%C3%B6%C3%9Fe", true),
            ("/a+b", "/a+b", true),
            ("/a+b", "/a%2Bb", true),
            ("/a+b", "/a%20b", false),
        ] {
            assert_eq!(path(own).covers(asked), is_covered, "{own} {asked}");
        }
        for text in
            ["", "api", "/a//b", "//", "/a/../b", "/.", "/a*", "/a?b", "/a#b", "/a%20b", "/a b", "/a\\b", "*"]
        {
            assert!(RoutePath::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn dot_segments_are_seen_in_every_spelling() {
        for asked in [
            "/..",
            "/../x",
            "/a/..",
            "/a/../b",
            "/.",
            "/a/./b",
            "/%2e%2e/x",
            "/%2E%2e/x",
            "/.%2e/x",
            "/%2e/x",
            "/a%2f..%2fb",
            "/a%2F%2e%2e/b",
            "/..%5cb",
            "/a\\..\\b",
            "/..%2f",
            "/%252e%252e/x",
            "/%25252e/x",
            "/a/..;/x",
            "/a/%2e%2e%3bv/x",
            "/a/.;v",
            "/%25%32%35%32%35%32%35%32%35%32%35%32%35",
        ] {
            assert!(has_dot_segments(asked), "{asked}");
        }
        for asked in [
            "/",
            "//",
            "/...",
            "/a..b",
            "/..a",
            "/a.",
            "/.a",
            "/%2e%2e%2e",
            "/%252e%252e%252e",
            "/a;../x",
            "/;/x",
            "/a%2Fb",
            "/a?",
        ] {
            assert!(!has_dot_segments(asked), "{asked}");
        }
    }

    proptest! {
        /// A route never takes what only begins like it, however both are spelt.
        #[test]
        fn never_a_prefix_inside_a_segment(own in "/[a-z]{1,6}(/[a-z]{1,4})?", more in "[a-zA-Z0-9._~;%2F-]{1,6}") {
            prop_assume!(!more.starts_with('/'));
            let asked = format!("{own}{more}");
            prop_assert!(!path(&own).covers(&asked), "{} {}", own, asked);
        }

        /// What is below a route belongs to it, escaped or not.
        #[test]
        fn everything_below_belongs_to_it(own in "(/[a-z]{1,6}){1,3}", rest in "(/[a-zA-Z0-9%.~-]{0,6}){0,3}") {
            let asked = format!("{own}{rest}");
            prop_assert!(path(&own).covers(&asked));
            let escaped: String =
                own.split('/').skip(1).map(|s| s.bytes().map(|b| format!("%{b:02x}")).collect::<String>())
                    .map(|s| format!("/{s}")).collect();
            let escaped = format!("{escaped}{rest}");
            prop_assert!(path(&own).covers(&escaped));
            prop_assert!(!path(&own).covers(&asked.to_uppercase()) || own == own.to_uppercase());
        }
    }
}
