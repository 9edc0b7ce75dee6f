//! Who may open tunnels on this edge: a signing key and a token, made on the spot.
//!
//! What enters is a folder; what leaves are the files in it that a user needs, and what `authorizer`
//! has to know. Nothing is built in: every folder has a key of its own.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use agentd::identity::{self, KEY_FILE, Keys};
use anyhow::{Context, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::lambda::random_bytes;

/// The name of the token's file.
const TOKEN_FILE: &str = "token";

/// The name of the file with the key of what agents answer with.
const TOKEN_KEY_FILE: &str = "token-key";

/// How long that key is.
const TOKEN_KEY_BYTES: usize = 32;

/// For how long the token can be used; each start makes a new one.
const TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Who the token belongs to.
const OWNER: &str = "developer";

/// What the token may open: everything.
const TUNNELS: &str = "*";

/// Key and token of this edge.
#[derive(Debug)]
pub struct Identity {
    /// The token, readable for its owner only.
    pub token_file: PathBuf,
    /// The key that signs further tokens, readable for its owner only.
    pub key_file: PathBuf,
    /// The public half of the key, as `authorizer` takes it.
    pub jwks: String,
}

/// Loads the folder's key or makes one, and makes a token with it.
///
/// # Errors
///
/// When a file cannot be read or written, or the key is none.
pub fn prepare(folder: &Path) -> anyhow::Result<Identity> {
    let key_file = folder.join(KEY_FILE);
    let keys = if key_file.exists() {
        Keys::load(&key_file).with_context(|| format!("reading the key {}", key_file.display()))?
    } else {
        identity::generate(folder).with_context(|| format!("making a key in {}", folder.display()))?
    };
    let owner = OWNER.parse().context("naming the token's owner")?;
    let tunnels = TUNNELS.parse().context("naming the token's tunnels")?;
    let token = identity::issue(&keys, &owner, &tunnels, TOKEN_LIFETIME).context("making a token")?;
    let token_file = folder.join(TOKEN_FILE);
    write_private(&token_file, token.as_bytes())?;
    Ok(Identity { token_file, key_file, jwks: keys.jwks() })
}

/// The key of the tokens that go to agents with their requests, as base64: the folder's, so that an agent can still
/// answer after a restart, or a new one.
///
/// # Errors
///
/// When the file cannot be read or written, or has no key.
pub fn token_key(folder: &Path) -> anyhow::Result<String> {
    let file = folder.join(TOKEN_KEY_FILE);
    if file.exists() {
        let key = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let key = key.trim();
        if !STANDARD.decode(key).is_ok_and(|bytes| bytes.len() >= TOKEN_KEY_BYTES) {
            bail!(
                "{} has no key of {TOKEN_KEY_BYTES} bytes in base64; remove the file, and a new one is made",
                file.display()
            );
        }
        return Ok(key.to_owned());
    }
    let key = STANDARD.encode(random_bytes::<TOKEN_KEY_BYTES>());
    write_private(&file, key.as_bytes())?;
    Ok(key)
}

/// Writes a file that only its owner can read; there is never half of one.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let write = || {
        // Its mode is 0600 from the beginning.
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(content)?;
        // Or a power cut may leave the name without the content.
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_keeps_its_key_and_gets_new_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("state");
        std::fs::create_dir(&folder).unwrap();
        let first = prepare(&folder).unwrap();
        let second = prepare(&folder).unwrap();
        assert_eq!(first.jwks, second.jwks);
        assert_eq!(token_key(&folder).unwrap(), token_key(&folder).unwrap());
        for file in [&second.token_file, &second.key_file] {
            assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let token = std::fs::read_to_string(&second.token_file).unwrap();
        assert_eq!(token.split('.').count(), 3);
        std::fs::write(&second.key_file, "no key").unwrap();
        assert!(prepare(&folder).is_err());
        for none in ["", "no key", &STANDARD.encode([1; 31])] {
            std::fs::write(folder.join(TOKEN_KEY_FILE), none).unwrap();
            let error = token_key(&folder).unwrap_err().to_string();
            assert!(error.contains("token-key has no key"), "{error}");
        }
        let kept = STANDARD.encode([1; 32]);
        std::fs::write(folder.join(TOKEN_KEY_FILE), format!("{kept}\n")).unwrap();
        assert_eq!(token_key(&folder).unwrap(), kept);
    }
}
