//! The environment enters, keys and rules leave. There is no default key: without one, nobody gets in.

use std::{io, path::Path};

use edge::config::Env;

use crate::{
    key::{JWKS_BYTES, KeyError, KeySet},
    remote::{Remote, RemoteError},
    verify::{Revoked, Rules},
};

/// A JWK set as text.
pub const ENV_JWKS: &str = "TUNNEL_JWKS";
/// The path of a JWK set; relative to the function's folder.
pub const ENV_JWKS_FILE: &str = "TUNNEL_JWKS_FILE";
/// The `https` address of an identity provider's JWK set.
pub const ENV_JWKS_URL: &str = "TUNNEL_JWKS_URL";
/// A shared secret in base64, of at least 32 bytes.
pub const ENV_HS256_SECRET: &str = "TUNNEL_HS256_SECRET";
/// The claim `iss` of every token.
pub const ENV_TOKEN_ISSUER: &str = "TUNNEL_TOKEN_ISSUER";
/// The claim `aud` of every token.
pub const ENV_TOKEN_AUDIENCE: &str = "TUNNEL_TOKEN_AUDIENCE";
/// The name of the claim that holds the owner.
pub const ENV_OWNER_CLAIM: &str = "TUNNEL_OWNER_CLAIM";
/// Whom to refuse, as JSON: `{"token_ids": […], "owners": […]}`.
pub const ENV_REVOKED: &str = "TUNNEL_REVOKED";
/// Where Lambda puts the function's folder.
const ENV_TASK_ROOT: &str = "LAMBDA_TASK_ROOT";

/// Tokens are issued by `agentd token issue`, which writes the same.
pub const DEFAULT_TOKEN_ISSUER: &str = "agentd";
/// What the tokens are for.
pub const DEFAULT_TOKEN_AUDIENCE: &str = "tunnel";
/// The subject of a token is the owner.
pub const DEFAULT_OWNER_CLAIM: &str = "sub";

/// Why the configuration cannot be used. No variant holds a value: one of them is a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is nothing to verify a token with.
    #[error("no key is configured: set {ENV_JWKS}, {ENV_JWKS_FILE}, {ENV_JWKS_URL} or {ENV_HS256_SECRET}")]
    NoKey,
    /// More than one JWK set.
    #[error("set only one of {ENV_JWKS}, {ENV_JWKS_FILE} and {ENV_JWKS_URL}")]
    SeveralSets,
    /// The keys of a variable are refused.
    #[error("{0} is refused")]
    Key(&'static str, #[source] KeyError),
    /// The file cannot be read.
    #[error("{ENV_JWKS_FILE} cannot be read")]
    File(#[source] io::Error),
    /// The address cannot be used.
    #[error("{ENV_JWKS_URL} is refused")]
    Url(#[source] RemoteError),
    /// The list is not what it has to be.
    #[error("{ENV_REVOKED} is not JSON of the form {{\"token_ids\": [], \"owners\": []}}")]
    Revoked,
}

/// Where keys come from.
#[derive(Debug)]
pub(crate) enum KeySource {
    /// They are known once and for all.
    Fixed(KeySet),
    /// They are an identity provider's, and change.
    Remote(Remote),
}

/// All that the environment says.
#[derive(Debug)]
pub struct Config {
    pub(crate) keys: KeySource,
    pub(crate) rules: Rules,
}

impl Config {
    /// Reads the configuration. A variable that is empty counts as absent, as everywhere in the edge.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], after which nothing may be accepted.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let or = |name, default: &str| env.optional(name).unwrap_or_else(|| default.into());
        let revoked = match env.optional(ENV_REVOKED) {
            None => Revoked::default(),
            // An array would be read as the fields in their order.
            Some(json) if !json.trim_start().starts_with('{') => return Err(ConfigError::Revoked),
            Some(json) => serde_json::from_str(&json).map_err(|_| ConfigError::Revoked)?,
        };
        let rules = Rules {
            issuer: or(ENV_TOKEN_ISSUER, DEFAULT_TOKEN_ISSUER),
            audience: or(ENV_TOKEN_AUDIENCE, DEFAULT_TOKEN_AUDIENCE),
            owner_claim: or(ENV_OWNER_CLAIM, DEFAULT_OWNER_CLAIM),
            revoked,
        };

        let mut secret = KeySet::default();
        if let Some(text) = env.optional(ENV_HS256_SECRET) {
            secret.add_secret(&text).map_err(|error| ConfigError::Key(ENV_HS256_SECRET, error))?;
        }
        let fixed = |name, jwks: &[u8]| {
            let keys = KeySet::from_jwks(jwks).and_then(|keys| keys.merged(&secret));
            keys.map(KeySource::Fixed).map_err(|error| ConfigError::Key(name, error))
        };
        let keys = match (env.optional(ENV_JWKS), env.optional(ENV_JWKS_FILE), env.optional(ENV_JWKS_URL)) {
            (Some(jwks), None, None) => fixed(ENV_JWKS, jwks.as_bytes())?,
            (None, Some(path), None) => {
                let root = env.optional(ENV_TASK_ROOT).unwrap_or_default();
                fixed(ENV_JWKS_FILE, &read(&Path::new(&root).join(path)).map_err(ConfigError::File)?)?
            }
            (None, None, Some(url)) => {
                KeySource::Remote(Remote::new(&url, secret).map_err(ConfigError::Url)?)
            }
            (None, None, None) if secret.is_empty() => return Err(ConfigError::NoKey),
            (None, None, None) => KeySource::Fixed(secret),
            _ => return Err(ConfigError::SeveralSets),
        };
        Ok(Self { keys, rules })
    }
}

/// Reads a file, but no more of it than shows that it is too large.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(JWKS_BYTES + 1).unwrap_or(u64::MAX);
    io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path)?, limit), &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    const JWKS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
    const SECRET: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn config(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let lookup =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Config::from_env(&Env::new(&lookup))
    }

    #[test]
    fn without_a_key_there_is_no_configuration() {
        assert!(matches!(config(&[]), Err(ConfigError::NoKey)));
        assert!(matches!(config(&[(ENV_TOKEN_ISSUER, "x")]), Err(ConfigError::NoKey)));
        for name in [ENV_JWKS, ENV_JWKS_FILE, ENV_JWKS_URL, ENV_HS256_SECRET] {
            assert!(matches!(config(&[(name, "")]), Err(ConfigError::NoKey)));
            assert!(config(&[(name, " ")]).is_err());
        }
    }

    #[test]
    fn defaults_are_those_of_the_issuing_command() {
        let rules = config(&[(ENV_JWKS, JWKS)]).unwrap().rules;
        let expected = ("agentd", "tunnel", "sub", Revoked::default());
        assert_eq!((&*rules.issuer, &*rules.audience, &*rules.owner_claim, rules.revoked), expected);
    }

    #[test]
    fn sets_and_a_secret_go_together_and_two_sets_do_not() {
        let keys = config(&[(ENV_JWKS, JWKS), (ENV_HS256_SECRET, SECRET)]).unwrap().keys;
        assert!(matches!(keys, KeySource::Fixed(keys) if keys.len() == 2));
        assert!(
            matches!(config(&[(ENV_HS256_SECRET, SECRET)]).unwrap().keys, KeySource::Fixed(keys) if keys.len() == 1)
        );
        let both = config(&[(ENV_JWKS, JWKS), (ENV_JWKS_URL, "https://id.example.com/jwks")]);
        assert!(matches!(both, Err(ConfigError::SeveralSets)));
    }

    #[test]
    fn a_file_is_looked_for_beside_the_function() {
        let dir = std::env::temp_dir().join(format!("authorizer-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("jwks.json"), JWKS).unwrap();
        let root = dir.to_str().unwrap();
        let keys = config(&[(ENV_TASK_ROOT, root), (ENV_JWKS_FILE, "jwks.json")]).map(|config| config.keys);
        let absent = config(&[(ENV_TASK_ROOT, root), (ENV_JWKS_FILE, "other.json")]);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(matches!(keys, Ok(KeySource::Fixed(keys)) if keys.len() == 1));
        assert!(matches!(absent, Err(ConfigError::File(_))));
    }

    #[test]
    fn errors_hold_no_value() {
        for (name, value) in
            [(ENV_JWKS, "{secret}"), (ENV_HS256_SECRET, "secret!"), (ENV_JWKS_URL, "http://secret/")]
        {
            let error = config(&[(name, value)]).unwrap_err();
            let text =
                format!("{error} {error:?} {}", error.source().map(ToString::to_string).unwrap_or_default());
            assert!(
                !text.contains("secret!") && !text.contains("//secret") && !text.contains("{secret}"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_list_of_revoked_is_exact() {
        let list =
            |json: &str| config(&[(ENV_JWKS, JWKS), (ENV_REVOKED, json)]).map(|config| config.rules.revoked);
        let revoked = list(r#"{"token_ids":["t1"],"owners":["acme"]}"#).unwrap();
        assert!(revoked.token_ids.contains("t1") && revoked.owners.contains(&"acme".parse().unwrap()));
        assert!(list(r#"{"owners":["acme"]}"#).is_ok());
        for bad in ["[]", "{}x", "t1", r#"{"owner":["acme"]}"#, r#"{"owners":"acme"}"#, r#"{"owners":[""]}"#]
        {
            assert!(matches!(list(bad), Err(ConfigError::Revoked)), "{bad}");
        }
    }
}
