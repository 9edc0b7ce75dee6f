//! Who may use a tunnel, as the configuration says it. Files that it names are read here, so that `agentd check`
//! and a reload meet the same errors and the same contents as the start.

use std::{path::PathBuf, time::Duration};

use jsonwebtoken::Algorithm;
use proto::id::TunnelName;

use super::{
    ConfigError, certificates,
    htpasswd::Users,
    http_url::HttpUrl,
    parse_duration,
    paths::PathPattern,
    range::IpRange,
    traffic::list,
    value::{Table, duration_within, nonempty_path},
};
use crate::{
    identity::private_file::{PrivateFiles, Secret},
    regular_file,
    tls::Certificates,
};

pub(super) const BASIC_KEYS: &[&str] = &["except", "file", "realm"];
pub(super) const BEARER_KEYS: &[&str] = &[
    "algorithms",
    "audience",
    "ca_file",
    "claims",
    "except",
    "issuer",
    "jwks_file",
    "jwks_url",
    "user_claim",
];
pub(super) const OIDC_KEYS: &[&str] = &[
    "allow_anyone",
    "allow_domains",
    "allow_emails",
    "allow_groups",
    "ca_file",
    "callback_tunnel",
    "client_id",
    "client_secret_file",
    "except",
    "groups_claim",
    "issuer",
    "require_verified_email",
    "scopes",
    "session",
    "session_key_file",
];
pub(super) const VERIFY_KEYS: &[&str] =
    &["digest", "encoding", "header", "paths", "prefix", "scheme", "secret_file", "tolerance"];

/// Signatures that a public key verifies. Never `none`, and none whose key would have to be secret.
pub(crate) const ALGORITHMS: &[(&str, Algorithm)] = &[
    ("RS256", Algorithm::RS256),
    ("RS384", Algorithm::RS384),
    ("RS512", Algorithm::RS512),
    ("PS256", Algorithm::PS256),
    ("PS384", Algorithm::PS384),
    ("PS512", Algorithm::PS512),
    ("ES256", Algorithm::ES256),
    ("ES384", Algorithm::ES384),
    ("EdDSA", Algorithm::EdDSA),
];

/// Who may use a tunnel. Addresses are looked at first; then one of the other ways is enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitorRules {
    /// From where.
    pub ips: Option<IpRule>,
    /// With a password.
    pub basic: Option<BasicRule>,
    /// With a token.
    pub bearer: Option<BearerRule>,
    /// Signed in with a provider.
    pub oidc: Option<OidcRule>,
    /// The tunnels that are sent here to finish signing in, because providers know one address only.
    pub is_callback: bool,
}

impl VisitorRules {
    /// Anybody.
    pub const ANYBODY: Self = Self { ips: None, basic: None, bearer: None, oidc: None, is_callback: false };
}

/// `allow_ips` and `deny_ips`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpRule {
    /// Only these, if there are any.
    pub allow: Vec<IpRange>,
    /// Never these.
    pub deny: Vec<IpRange>,
    /// Where it does not hold.
    pub except: Vec<PathPattern>,
}

/// `basic_auth`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasicRule {
    /// Their names and passwords.
    pub users: Users,
    /// What browsers show.
    pub realm: String,
    /// Where it does not hold.
    pub except: Vec<PathPattern>,
}

/// `[tunnel.bearer]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BearerRule {
    /// The keys of the tokens.
    pub keys: KeySource,
    /// What `iss` must say.
    pub issuer: Option<String>,
    /// One of these must be in `aud`.
    pub audience: Vec<String>,
    /// The signatures that are taken.
    pub algorithms: Vec<Algorithm>,
    /// Claims that must have one of these values.
    pub claims: Vec<(String, Vec<String>)>,
    /// The claim that names the user.
    pub user_claim: String,
    /// Where it does not hold.
    pub except: Vec<PathPattern>,
}

/// Where keys come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A JWK set, as it was in its file.
    Set(String),
    /// A JWK set to be fetched.
    Url {
        /// From here.
        url: HttpUrl,
        /// Certificates to trust beside the system's.
        certificates: Option<Certificates>,
    },
}

/// `[tunnel.oidc]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OidcRule {
    /// The provider.
    pub issuer: HttpUrl,
    /// Who we are to it.
    pub client_id: String,
    /// How we show that; `None` for a public client, which PKCE alone protects.
    pub client_secret: Option<Secret>,
    /// What is asked for.
    pub scopes: String,
    /// Who is let in.
    pub allow: Allowed,
    /// The tunnel whose address the provider knows; `None` for this one's own.
    pub callback_tunnel: Option<TunnelName>,
    /// How long one stays signed in.
    pub session: Duration,
    /// What seals sessions; `None` for a key that this process makes.
    pub session_key: Option<Secret>,
    /// Certificates to trust beside the system's.
    pub certificates: Option<Certificates>,
    /// Where it does not hold.
    pub except: Vec<PathPattern>,
}

/// Who of a provider's users is let in: whom one of the lists names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Everybody.
    pub anyone: bool,
    /// In lower case.
    pub emails: Vec<String>,
    /// In lower case, without `@`.
    pub domains: Vec<String>,
    /// As the provider writes them.
    pub groups: Vec<String>,
    /// The claim that holds the groups.
    pub groups_claim: String,
    /// Whether an email counts only where the provider says that it has been verified.
    pub verified_email: bool,
}

/// One `[[tunnel.verify]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookRule {
    /// Who signs, and how.
    pub scheme: Scheme,
    /// With one of these.
    pub secrets: Vec<Secret>,
    /// How far the sender's clock may be from ours.
    pub tolerance: Duration,
    /// Where it holds; everywhere if empty.
    pub paths: Vec<PathPattern>,
}

/// Who signs a webhook, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scheme {
    /// GitHub.
    Github,
    /// Stripe.
    Stripe,
    /// Slack.
    Slack,
    /// Standard Webhooks, and Svix.
    Standard,
    /// Shopify.
    Shopify,
    /// Twilio.
    Twilio,
    /// Anybody else who signs the body alone.
    Hmac(HmacForm),
}

/// Where and how a signature is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HmacForm {
    /// The field, in lower case.
    pub header: String,
    /// What stands before it there.
    pub prefix: String,
    /// The hash.
    pub digest: Digest,
    /// How it is written.
    pub encoding: Encoding,
}

/// The hash of a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digest {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

/// How a signature is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Lower-case hexadecimal.
    Hex,
    /// Base64 with padding.
    Base64,
}

/// Reads what a tunnel says of its visitors.
pub(super) fn read(table: &Table<'_>, files: &PrivateFiles) -> Result<VisitorRules, ConfigError> {
    Ok(VisitorRules {
        ips: read_ips(table)?,
        basic: read_basic(table, files)?,
        bearer: table.table("bearer", BEARER_KEYS)?.map(|table| read_bearer(&table)).transpose()?,
        oidc: table.table("oidc", OIDC_KEYS)?.map(|table| read_oidc(&table, files)).transpose()?,
        is_callback: false,
    })
}

/// A text or a list of them.
fn text_or_list(table: &Table<'_>, key: &str) -> Result<Vec<String>, ConfigError> {
    let nonempty = |text: &str| {
        if text.is_empty() { Err("this must not be empty".to_owned()) } else { Ok(text.to_owned()) }
    };
    if table.is_text(key) {
        Ok(table.text(key, nonempty)?.into_iter().collect())
    } else {
        list(table, key, nonempty)
    }
}

fn nonempty(text: &str) -> Result<String, &'static str> {
    if text.is_empty() { Err("this must not be empty") } else { Ok(text.to_owned()) }
}

fn except(table: &Table<'_>) -> Result<Vec<PathPattern>, ConfigError> {
    list(table, "except", str::parse)
}

fn file(table: &Table<'_>, key: &str) -> Result<Option<PathBuf>, ConfigError> {
    table.text(key, |text| nonempty_path(table.document().path, text))
}

/// What is in the file that `ca_file` names.
fn certificates(table: &Table<'_>) -> Result<Option<Certificates>, ConfigError> {
    file(table, "ca_file")?.map(|path| certificates::read(table, &path)).transpose()
}

fn read_ips(table: &Table<'_>) -> Result<Option<IpRule>, ConfigError> {
    let rule = IpRule {
        allow: list(table, "allow_ips", str::parse)?,
        deny: list(table, "deny_ips", str::parse)?,
        except: list(table, "ip_except", str::parse)?,
    };
    if table.has("allow_ips") && rule.allow.is_empty() {
        return Err(table.error_at(
            "allow_ips",
            "\"allow_ips\" is empty, which nobody would pass: name a range or leave it out",
        ));
    }
    if rule.allow.is_empty() && rule.deny.is_empty() {
        if table.has("ip_except") {
            return Err(table.error_at("ip_except", "\"ip_except\" needs \"allow_ips\" or \"deny_ips\""));
        }
        return Ok(None);
    }
    Ok(Some(rule))
}

fn read_basic(table: &Table<'_>, files: &PrivateFiles) -> Result<Option<BasicRule>, ConfigError> {
    let read = |table: &Table<'_>, key: &str| -> Result<Option<Users>, ConfigError> {
        table.text(key, |text| {
            let path = nonempty_path(table.document().path, text)?;
            let text = files.read(&path).map_err(|error| error.to_string())?;
            Users::parse(&text).map_err(|message| format!("{}: {message}", path.display()))
        })
    };
    if !table.has("basic_auth") {
        return Ok(None);
    }
    if table.is_text("basic_auth") {
        let users = read(table, "basic_auth")?;
        return Ok(users.map(|users| BasicRule { users, realm: "tunnel".to_owned(), except: Vec::new() }));
    }
    let Some(table) = table.table("basic_auth", BASIC_KEYS)? else { return Ok(None) };
    let users = read(&table, "file")?
        .ok_or_else(|| table.error("this basic_auth has no file: add file = \"/etc/agentd/web.htpasswd\""))?;
    let realm = table.text("realm", |text| {
        let plain = !text.is_empty()
            && text.len() <= 200
            && text.bytes().all(|b| (b == b' ' || b.is_ascii_graphic()) && !b"\"\\".contains(&b));
        if plain { Ok(text.to_owned()) } else { Err("a realm is plain ASCII text without quotes") }
    })?;
    Ok(Some(BasicRule {
        users,
        realm: realm.unwrap_or_else(|| "tunnel".to_owned()),
        except: except(&table)?,
    }))
}

fn read_bearer(table: &Table<'_>) -> Result<BearerRule, ConfigError> {
    let jwks = table.text("jwks_file", |text| {
        let path = nonempty_path(table.document().path, text)?;
        let text = regular_file::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        crate::identity::public_keys::PublicKeys::parse(text.as_bytes())
            .map_err(|message| format!("{}: {message}", path.display()))?;
        Ok::<_, String>(text)
    })?;
    let url = table.text("jwks_url", str::parse::<HttpUrl>)?;
    let certificates = certificates(table)?;
    let keys = match (jwks, url) {
        (Some(set), None) => KeySource::Set(set),
        (None, Some(url)) => KeySource::Url { url, certificates },
        _ => return Err(table.error("this bearer needs one of jwks_file and jwks_url, where its keys are")),
    };
    let algorithms = list(table, "algorithms", |text| {
        let known = ALGORITHMS.iter().find(|(name, _)| *name == text).map(|(_, algorithm)| *algorithm);
        known.ok_or_else(|| {
            let names: Vec<_> = ALGORITHMS.iter().map(|(name, _)| *name).collect();
            format!("{text:?} is no signature that is taken here: those are {}", names.join(", "))
        })
    })?;
    let issuer = table.text("issuer", nonempty)?;
    let audience = text_or_list(table, "audience")?;
    if audience.is_empty() {
        return Err(table.error(
            "this bearer has no audience: add audience = \"…\", or a token made for another service opens this one",
        ));
    }
    let claims = table.choices("claims")?;
    Ok(BearerRule {
        keys,
        issuer,
        audience,
        algorithms: if algorithms.is_empty() {
            ALGORITHMS.iter().map(|(_, algorithm)| *algorithm).collect()
        } else {
            algorithms
        },
        claims,
        user_claim: table.text("user_claim", nonempty)?.unwrap_or_else(|| "sub".to_owned()),
        except: except(table)?,
    })
}

fn read_oidc(table: &Table<'_>, files: &PrivateFiles) -> Result<OidcRule, ConfigError> {
    let needs = |what: &str| table.error(format!("this oidc has no {what}"));
    let secret = |key: &str| -> Result<Option<Secret>, ConfigError> {
        let Some(path) = file(table, key)? else { return Ok(None) };
        let secrets = files.secrets(&path).map_err(|message| table.error_at(key, message))?;
        match <[Secret; 1]>::try_from(secrets) {
            Ok([secret]) => Ok(Some(secret)),
            Err(_) => Err(table.error_at(key, format!("{} must hold one line", path.display()))),
        }
    };
    let lower = |text: &str| -> Result<String, String> { Ok(text.to_lowercase()) };
    let allow = Allowed {
        anyone: table.flag("allow_anyone")?.unwrap_or(false),
        emails: list(table, "allow_emails", |text| {
            if text.split_once('@').is_some_and(|(name, domain)| !name.is_empty() && !domain.is_empty()) {
                lower(text)
            } else {
                Err(format!("{text:?} is no email: write it as ann@example.com"))
            }
        })?,
        domains: list(table, "allow_domains", |text| {
            let domain = text.strip_prefix('@').unwrap_or(text);
            if domain.is_empty() || domain.contains(['@', '*', '/', ' ']) {
                Err(format!("{text:?} is no domain: write it as example.com"))
            } else {
                lower(domain)
            }
        })?,
        groups: list(table, "allow_groups", |text| nonempty(text).map_err(str::to_owned))?,
        groups_claim: table.text("groups_claim", nonempty)?.unwrap_or_else(|| "groups".to_owned()),
        verified_email: table.flag("require_verified_email")?.unwrap_or(true),
    };
    let names_nobody = allow.emails.is_empty() && allow.domains.is_empty() && allow.groups.is_empty();
    if names_nobody != allow.anyone {
        return Err(table.error(
            "this oidc must say who is let in: allow_emails, allow_domains, allow_groups, or else allow_anyone = true \
             for everybody with an account at the provider",
        ));
    }
    let scopes = list(table, "scopes", |text| {
        let is_scope =
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !b"\"\\".contains(&b));
        if is_scope { Ok(text.to_owned()) } else { Err(format!("{text:?} is no scope")) }
    })?;
    let scopes = match &scopes[..] {
        [] => "openid email profile".to_owned(),
        scopes if scopes.iter().any(|scope| scope == "openid") => scopes.join(" "),
        scopes => format!("openid {}", scopes.join(" ")),
    };
    let session_key = secret("session_key_file")?;
    if session_key.as_ref().is_some_and(|key| key.bytes().len() < 32) {
        return Err(table.error_at(
            "session_key_file",
            "the key must have 32 characters or more: make it with openssl rand -base64 48",
        ));
    }
    Ok(OidcRule {
        issuer: table
            .text("issuer", str::parse)?
            .ok_or_else(|| needs("issuer: add issuer = \"https://…\""))?,
        client_id: table.text("client_id", nonempty)?.ok_or_else(|| needs("client_id"))?,
        client_secret: secret("client_secret_file")?,
        scopes,
        allow,
        callback_tunnel: table.text("callback_tunnel", str::parse)?,
        session: table
            .text("session", |text| duration_within(text, "1s", "720h"))?
            .unwrap_or(Duration::from_secs(8 * 60 * 60)),
        session_key,
        certificates: certificates(table)?,
        except: except(table)?,
    })
}

/// Reads the signatures that a tunnel's webhooks must have: `verify`, one table or several.
pub(super) fn read_webhooks(
    table: &Table<'_>,
    files: &PrivateFiles,
) -> Result<Vec<WebhookRule>, ConfigError> {
    table.table_or_tables("verify", VERIFY_KEYS)?.iter().map(|table| read_webhook(table, files)).collect()
}

fn read_webhook(table: &Table<'_>, files: &PrivateFiles) -> Result<WebhookRule, ConfigError> {
    const SCHEMES: &str = "github, stripe, slack, standard, shopify, twilio and hmac";
    let name = table.text("scheme", nonempty)?;
    let name =
        name.ok_or_else(|| table.error(format!("this verify has no scheme: it is one of {SCHEMES}")))?;
    let scheme = match &*name {
        "github" => Scheme::Github,
        "stripe" => Scheme::Stripe,
        "slack" => Scheme::Slack,
        "standard" => Scheme::Standard,
        "shopify" => Scheme::Shopify,
        "twilio" => Scheme::Twilio,
        "hmac" => Scheme::Hmac(read_hmac(table)?),
        other => return Err(table.error_at("scheme", format!("{other:?} is none of {SCHEMES}"))),
    };
    if !matches!(scheme, Scheme::Hmac(_)) {
        for key in ["digest", "encoding", "header", "prefix"] {
            if table.has(key) {
                return Err(
                    table.error_at(key, format!("{key:?} is for scheme = \"hmac\" only: {name} has its own"))
                );
            }
        }
    }
    let path = file(table, "secret_file")?
        .ok_or_else(|| table.error("this verify has no secret_file: a file with a secret on each line"))?;
    let secrets = files.secrets(&path).map_err(|message| table.error_at("secret_file", message))?;
    if scheme == Scheme::Standard && secrets.iter().any(|secret| secret.decoded().is_none()) {
        return Err(table.error_at("secret_file", "a secret of Standard Webhooks is base64, after whsec_"));
    }
    let has_time = matches!(scheme, Scheme::Stripe | Scheme::Slack | Scheme::Standard);
    let tolerance = table.text("tolerance", |text| {
        if has_time {
            duration_within(text, "1s", "1h")
        } else {
            parse_duration(text)?;
            Err(format!("{name} signs no time that could be far from ours: leave it out"))
        }
    })?;
    Ok(WebhookRule {
        scheme,
        secrets,
        tolerance: tolerance.unwrap_or(Duration::from_secs(300)),
        paths: list(table, "paths", str::parse)?,
    })
}

fn read_hmac(table: &Table<'_>) -> Result<HmacForm, ConfigError> {
    let header = table.text("header", |text| {
        let name = text.parse::<http::HeaderName>();
        name.map(|name| name.as_str().to_owned()).map_err(|_| format!("{text:?} is no field's name"))
    })?;
    Ok(HmacForm {
        header: header.ok_or_else(|| {
            table.error(
                "scheme = \"hmac\" needs header, the field with the signature: header = \"x-signature\"",
            )
        })?,
        prefix: table.text("prefix", |text| Ok::<_, String>(text.to_owned()))?.unwrap_or_default(),
        digest: table
            .text("digest", |text| match text {
                "sha1" => Ok(Digest::Sha1),
                "sha256" => Ok(Digest::Sha256),
                "sha512" => Ok(Digest::Sha512),
                other => Err(format!("{other:?} is none of \"sha1\", \"sha256\" and \"sha512\"")),
            })?
            .unwrap_or(Digest::Sha256),
        encoding: table
            .text("encoding", |text| match text {
                "hex" => Ok(Encoding::Hex),
                "base64" => Ok(Encoding::Base64),
                other => Err(format!("{other:?} is neither \"hex\" nor \"base64\"")),
            })?
            .unwrap_or(Encoding::Hex),
    })
}
