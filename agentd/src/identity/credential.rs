//! The agent's token: where it comes from, and that nobody else can read it.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use proto::id::TunnelPatterns;
use serde::Deserialize;

use super::private_file::{exposure, without_mark};

/// The variable that may hold the token itself.
pub const ENV_TOKEN: &str = "AGENTD_TOKEN";

/// The variable in which systemd names the folder of a unit's credentials.
pub const ENV_CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// The name of the systemd credential that holds the token.
pub const CREDENTIAL: &str = "token";

/// No token is longer than this.
const MOST_BYTES: u64 = 8 * 1024;

/// A token. It is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Arc<str>);

impl Token {
    /// The value of `authorization`.
    #[must_use]
    pub(crate) fn authorization(&self) -> Option<http::HeaderValue> {
        let mut value = http::HeaderValue::from_str(&format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Writes it to a new file that only its owner may read.
    pub(crate) fn write_to_new(&self, path: &Path) -> io::Result<()> {
        use io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(self.0.as_bytes())?;
        file.write_all(b"\n")
    }

    /// What the token says of itself, unchecked: good for advice and for nothing else.
    #[must_use]
    pub(crate) fn says(&self) -> Option<Says> {
        let (_, rest) = self.0.split_once('.')?;
        let (claims, _) = rest.split_once('.')?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
    }
}

/// Some claims of a token.
#[derive(Debug, Deserialize)]
pub(crate) struct Says {
    /// When it ends, in Unix time.
    pub(crate) exp: Option<u64>,
    #[serde(default)]
    tunnels: Vec<String>,
}

impl Says {
    /// Which tunnels it may open; empty where that cannot be told.
    pub(crate) fn may_open(&self) -> TunnelPatterns {
        TunnelPatterns(self.tunnels.iter().filter_map(|pattern| pattern.parse().ok()).collect())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where the token comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// A file that only its owner may read, or root's that a group may read as well; or a pipe, which is read once.
    File(PathBuf),
    /// A systemd credential, which systemd guards.
    Credential(PathBuf),
    /// A value from the environment.
    Value(Token),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner may read the file.
    #[error("the token file {path} can be read by others (mode {mode:03o}): {remedy}")]
    Exposed {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
        /// What helps where the file is.
        remedy: String,
    },
    /// Not a single line of visible characters.
    #[error("{0} does not hold a token: one line of visible characters is wanted")]
    Malformed(String),
}

impl TokenSource {
    /// The file or the variable, for people.
    pub(crate) fn place(&self) -> String {
        match self {
            Self::File(path) | Self::Credential(path) => path.display().to_string(),
            Self::Value(_) => ENV_TOKEN.to_owned(),
        }
    }

    /// The token as it is now.
    ///
    /// # Errors
    ///
    /// [`TokenError`] when it cannot be read, or could be read by others.
    pub fn read(&self) -> Result<Token, TokenError> {
        match self {
            Self::Value(token) => Ok(token.clone()),
            Self::File(path) => {
                check_mode(path)?;
                read_file(path)
            }
            Self::Credential(path) => read_file(path),
        }
    }

    /// A token from the environment.
    ///
    /// # Errors
    ///
    /// [`TokenError::Malformed`].
    pub fn from_value(text: &str) -> Result<Self, TokenError> {
        parse(text).map(Self::Value).ok_or_else(|| TokenError::Malformed(ENV_TOKEN.to_owned()))
    }
}

fn read_error(path: &Path, source: io::Error) -> TokenError {
    TokenError::Read { path: path.display().to_string(), source }
}

/// Refuses a file that others may read.
fn check_mode(path: &Path) -> Result<(), TokenError> {
    let metadata = fs::metadata(path).map_err(|source| read_error(path, source))?;
    match exposure(path, &metadata) {
        Some((mode, remedy)) => Err(TokenError::Exposed { path: path.display().to_string(), mode, remedy }),
        None => Ok(()),
    }
}

/// What pipes have held: they can be read once, and the token is wanted for each connection.
static PIPED: Mutex<BTreeMap<PathBuf, Token>> = Mutex::new(BTreeMap::new());

fn read_file(path: &Path) -> Result<Token, TokenError> {
    use io::Read as _;
    // Never held while something is read, which may take its time: who dials asks here, too.
    let piped = || PIPED.lock().unwrap_or_else(PoisonError::into_inner);
    let is_file = fs::metadata(path).map_err(|source| read_error(path, source))?.is_file();
    if !is_file && let Some(token) = piped().get(path) {
        return Ok(token.clone());
    }
    let mut text = String::new();
    fs::File::open(path)
        .and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text))
        .map_err(|source| read_error(path, source))?;
    let token = parse(&text).ok_or_else(|| TokenError::Malformed(path.display().to_string()))?;
    if !is_file {
        piped().insert(path.to_owned(), token.clone());
    }
    Ok(token)
}

fn parse(text: &str) -> Option<Token> {
    let text = without_mark(text).trim();
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())).then(|| Token(text.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, TokenSource) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("the token");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, TokenSource::File(path))
    }

    #[test]
    fn a_private_file_of_one_line_is_a_token() {
        let (_dir, source) = file("\u{feff}abc.DEF\r\n", 0o600);
        assert_eq!(source.read().unwrap(), Token("abc.DEF".into()));
        let (_dir, source) = file("abc.DEF\n", 0o600);
        assert_eq!(source.read().unwrap(), Token("abc.DEF".into()));
        assert_eq!(format!("{:?}", source.read().unwrap()), "Token(…)");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_the_command() {
        for mode in [0o620, 0o604, 0o644] {
            let (dir, source) = file("abc", mode);
            let message = source.read().unwrap_err().to_string();
            assert!(
                message.ends_with(&format!("run chmod 600 '{}/the token'", dir.path().display())),
                "{message}"
            );
        }
    }

    #[test]
    fn a_pipe_is_read_once_and_its_token_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        let writer = std::thread::spawn({
            let path = path.clone();
            move || fs::write(path, "abc.DEF\n").unwrap()
        });
        let source = TokenSource::File(path);
        for _ in 0..3 {
            assert_eq!(source.read().unwrap(), Token("abc.DEF".into()));
        }
        writer.join().unwrap();
    }

    #[test]
    fn anything_else_is_not_a_token() {
        for text in ["", "\n", "a b", "a\nb", "ä"] {
            assert!(matches!(
                file(text, 0o600).1.read(),
                Err(TokenError::Malformed(_) | TokenError::Read { .. })
            ));
        }
        assert!(TokenSource::from_value("a b").is_err());
    }
}
