//! Who an agent is: signing keys and the tokens made with them.
//!
//! Enters: the subcommands `agentd keys` and `agentd token`. Leaves: a private key and a JWK set in
//! files, a token on standard output. The edge's authorizer verifies with the JWK set what is issued
//! here; neither the key nor a token is ever printed where it was not asked for.

use std::{
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use proto::id::{Owner, TunnelPattern, TunnelPatterns};

pub mod credential;
mod keys;
pub(crate) mod name;
pub mod private_file;
pub(crate) mod public_keys;
mod token;

pub use keys::{Algorithm, JWKS_FILE, KEY_FILE, KeyError, Keys};
pub(crate) use token::utc;
pub use token::{Claims, DEFAULT_AUDIENCE, DEFAULT_ISSUER, IssueError, LIFETIME};

/// The subcommands about identity.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Signing keys of the tokens that agents show
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Tokens that agents show
    #[command(subcommand)]
    Token(TokenCommand),
}

/// `agentd keys`
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a signing key: a private one that stays here and a JWK set for the edge
    New(NewKey),
}

/// `agentd keys new`
#[derive(Debug, Args)]
pub struct NewKey {
    /// What the key signs with
    #[arg(long, value_enum, default_value_t)]
    alg: Algorithm,
    /// Where `signing-key.pem` and `jwks.json` go; neither may exist
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// `agentd token`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Sign a token and print it
    Issue(IssueToken),
    /// Show what a token says, without the token itself. Its signature is not checked
    Show {
        /// The file that holds the token, or `-` for standard input. Default: that of --token-file, else
        /// standard input
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
}

/// `agentd token issue`
#[derive(Debug, Args)]
pub struct IssueToken {
    /// The private key, as `agentd keys new` made it
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Who the tunnels belong to
    #[arg(long, value_name = "NAME")]
    owner: Owner,
    /// A tunnel the token may open: a name, `prefix-*`, or `*`; may be repeated
    #[arg(long = "tunnel", value_name = "NAME", required = true)]
    tunnels: Vec<TunnelPattern>,
    /// How long the token is valid: a number with s, m, h, d or w
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    expires: Duration,
    /// The issuer that the edge expects
    #[arg(long, default_value = DEFAULT_ISSUER)]
    issuer: String,
    /// The audience that the edge expects
    #[arg(long, default_value = DEFAULT_AUDIENCE)]
    audience: String,
}

/// Carries a subcommand out and says on standard error why it could not. `token_file` is where the agent's own token is,
/// if that was said.
#[must_use]
pub fn run(command: Command, token_file: Option<&Path>) -> ExitCode {
    let result = match command {
        Command::Keys(KeysCommand::New(NewKey { alg, out })) => new_key(alg, &out),
        Command::Token(TokenCommand::Issue(arguments)) => issue_token(arguments),
        Command::Token(TokenCommand::Show { file }) => show_token(file.as_deref().or(token_file)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("agentd: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Makes an Ed25519 key and writes [`KEY_FILE`] and [`JWKS_FILE`] into `dir`.
///
/// # Errors
///
/// [`KeyError`]; a file that exists is never overwritten.
pub fn generate(dir: &Path) -> Result<Keys, KeyError> {
    let keys = Keys::generate(Algorithm::Eddsa)?;
    keys.write(dir)?;
    Ok(keys)
}

/// Signs a token for the edge's default issuer and audience, which ends `expires` from now.
///
/// # Errors
///
/// [`IssueError`] when it would open nothing or live too long.
pub fn issue(
    keys: &Keys,
    owner: &Owner,
    tunnels: &TunnelPatterns,
    expires: Duration,
) -> Result<String, IssueError> {
    Claims::new(owner, tunnels, now(), expires)?.sign(keys)
}

fn new_key(algorithm: Algorithm, dir: &Path) -> anyhow::Result<()> {
    let keys = Keys::generate(algorithm)?;
    keys.write(dir)?;
    print(&format!(
        "key   {}\njwks  {}\nkid   {}\n",
        dir.join(KEY_FILE).display(),
        dir.join(JWKS_FILE).display(),
        keys.id(),
    ))
}

fn issue_token(arguments: IssueToken) -> anyhow::Result<()> {
    let IssueToken { key, owner, tunnels, expires, issuer, audience } = arguments;
    let keys = Keys::load(&key).with_context(|| format!("reading the key {}", key.display()))?;
    let mut claims = Claims::new(&owner, &TunnelPatterns(tunnels), now(), expires)?;
    claims.iss = issuer;
    claims.aud = audience;
    let token = claims.sign(&keys)?;
    // What is needed to revoke it, beside the token and not in its way.
    note(&format!("agentd: token {} of {owner} ends {}", claims.jti, utc(claims.exp)));
    print(&format!("{token}\n"))
}

/// Describes the token in `file`; on standard input where that is `-` or none.
fn show_token(file: Option<&Path>) -> anyhow::Result<()> {
    // Far more than a token; the rest of a wrong file is not worth reading.
    const LIMIT: u64 = 64 * 1024;
    let mut text = String::new();
    if let Some(file) = file.filter(|file| *file != Path::new("-")) {
        let open = std::fs::File::open(file).and_then(|file| file.take(LIMIT).read_to_string(&mut text));
        open.with_context(|| format!("reading {}", file.display()))?;
    } else {
        io::stdin().lock().take(LIMIT).read_to_string(&mut text).context("reading standard input")?;
    }
    print(&token::describe(text.trim(), now())?)
}

/// A number of seconds, minutes, hours, days or weeks, such as `90d`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a number with s, m, h, d or w, such as 90d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let secs: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        'w' => 7 * 24 * 60 * 60,
        _ => return Err(wrong()),
    };
    let number = text.strip_suffix(unit).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let total =
        number.and_then(|digits| digits.parse::<u64>().ok()).and_then(|number| number.checked_mul(secs));
    total.filter(|secs| *secs > 0).map(Duration::from_secs).ok_or_else(wrong)
}

pub(crate) fn now() -> u64 {
    // A clock before 1970 issues tokens that have already ended.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

fn print(text: &str) -> anyhow::Result<()> {
    io::stdout().lock().write_all(text.as_bytes()).context("writing to standard output")
}

/// Tells the person who called; there is nobody else to tell if that fails.
fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
    }

    fn parse(arguments: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(std::iter::once("agentd").chain(arguments.split(' '))).map(|cli| cli.command)
    }

    #[test]
    fn durations_are_a_number_and_a_unit() {
        for (text, secs) in [("1s", 1), ("2m", 120), ("3h", 10_800), ("90d", 7_776_000), ("2w", 1_209_600)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(secs)), "{text}");
        }
        for text in [
            "",
            "90",
            "d",
            "0d",
            "-1d",
            "1.5d",
            "+1d",
            "1y",
            "90 d",
            "1d1h",
            "99999999999999999999d",
            "9999999999999999w",
            "9€",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_is_checked_before_a_key_is_touched() {
        assert!(parse("keys new --alg es256 --out /tmp/x").is_ok());
        assert!(parse("token issue --key k --owner acme --tunnel web --tunnel pr-* --expires 90d").is_ok());
        assert!(parse("token show").is_ok() && parse("token show FILE").is_ok());
        for bad in [
            "keys new --alg rs256",
            "token issue --key k --owner acme --expires 90d",
            "token issue --key k --owner acme --tunnel Web --expires 90d",
            "token issue --key k --owner acme --tunnel www --expires 90d",
            "token issue --key k --owner ac/\u{e9}me --tunnel web --expires 90d",
            "token issue --key k --owner acme --tunnel web",
            "token issue --key k --tunnel web --expires 90d",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_generated_signs_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let keys = generate(dir.path()).unwrap();
        let token =
            issue(&keys, &"acme".parse().unwrap(), &"web".parse().unwrap(), Duration::from_secs(60)).unwrap();
        assert_eq!(token.split('.').count(), 3);
        assert!(matches!(generate(dir.path()), Err(KeyError::Exists(_))));
        assert_eq!(Keys::load(&dir.path().join(KEY_FILE)).unwrap().id(), keys.id());
    }
}
