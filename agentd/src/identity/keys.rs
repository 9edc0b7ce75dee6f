//! Signing keys: randomness enters, or a PEM file; a key that signs and its public half leave.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    digest,
    error::Unspecified,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::Serialize;

use super::private_file::exposure;

/// The private key's file.
pub const KEY_FILE: &str = "signing-key.pem";

/// The public key's file, for the edge.
pub const JWKS_FILE: &str = "jwks.json";

/// The longest line of PEM (RFC 7468 §2).
const PEM_LINE_BYTES: usize = 64;

/// The most bytes of a key file that are read: many times a key of either kind.
const KEY_FILE_BYTES: u64 = 16 * 1024;

/// What a key signs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Algorithm {
    /// Ed25519: small, fast, and nothing to choose.
    #[default]
    Eddsa,
    /// ECDSA with P-256 and SHA-256, for what does not know Ed25519.
    Es256,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file is already there.
    #[error("{} exists and is not overwritten", .0.display())]
    Exists(PathBuf),
    /// A file cannot be written.
    #[error("{} cannot be written", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// Others than the owner may read the file.
    #[error("the file can be read by others (mode {mode:03o}): {remedy}")]
    Exposed {
        /// Its permission bits.
        mode: u32,
        /// What helps where the file is.
        remedy: String,
    },
    /// The file holds something else.
    #[error("the file is not an Ed25519 or P-256 private key (PKCS #8, PEM)")]
    NotAKey,
    /// The cryptography failed, as without a source of randomness.
    #[error("the key could not be made")]
    Crypto,
}

impl From<Unspecified> for KeyError {
    fn from(_: Unspecified) -> Self {
        Self::Crypto
    }
}

enum Pair {
    Eddsa(Ed25519KeyPair),
    Es256(EcdsaKeyPair),
}

/// A key that signs tokens.
pub struct Keys {
    pair: Pair,
    jwk: Jwk,
}

/// The public half (RFC 7517, RFC 8037). Without `use`, `alg` and `kid`, and in this order, its JSON
/// is what RFC 7638 hashes.
#[derive(Debug, Clone, Serialize)]
struct Jwk {
    crv: &'static str,
    kty: &'static str,
    x: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    y: Option<String>,
    #[serde(rename = "use", skip_serializing_if = "Option::is_none")]
    purpose: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alg: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
}

impl Keys {
    /// Makes a key.
    ///
    /// # Errors
    ///
    /// [`KeyError::Crypto`] when the system has no randomness to give.
    pub fn generate(algorithm: Algorithm) -> Result<Self, KeyError> {
        let pair = match algorithm {
            Algorithm::Eddsa => Pair::Eddsa(Ed25519KeyPair::generate()?),
            Algorithm::Es256 => Pair::Es256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?),
        };
        Ok(Self::new(pair))
    }

    /// Reads a private key in PKCS #8 and PEM. A pipe will do: keys come out of vaults.
    ///
    /// # Errors
    ///
    /// [`KeyError`] when the file cannot be read, could be read by others, or holds no such key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let mut text = Vec::new();
        let file = File::open(path).map_err(KeyError::Read)?;
        if let Some((mode, remedy)) = exposure(path, &file.metadata().map_err(KeyError::Read)?) {
            return Err(KeyError::Exposed { mode, remedy });
        }
        file.take(KEY_FILE_BYTES).read_to_end(&mut text).map_err(KeyError::Read)?;
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| KeyError::NotAKey)?;
        let der = pkcs8.secret_pkcs8_der();
        let eddsa = Ed25519KeyPair::from_pkcs8(der).map(Pair::Eddsa);
        let es256 = || EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der).map(Pair::Es256);
        eddsa.or_else(|_| es256()).map(Self::new).map_err(|_| KeyError::NotAKey)
    }

    /// Writes the private key, for its owner's eyes only, and the JWK set into `dir`, which is made
    /// if it does not exist.
    ///
    /// # Errors
    ///
    /// [`KeyError`]; when either file exists, both stay as they are.
    pub fn write(&self, dir: &Path) -> Result<(), KeyError> {
        let (key_path, jwks_path) = (dir.join(KEY_FILE), dir.join(JWKS_FILE));
        if let Some(path) =
            [&key_path, &jwks_path].into_iter().find(|path| fs::symlink_metadata(path).is_ok())
        {
            return Err(KeyError::Exists(path.clone()));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| KeyError::Write(dir.into(), error))?;
        create(&key_path, 0o600, &self.pem()?)?;
        let jwks = create(&jwks_path, 0o644, &self.jwks());
        if jwks.is_err() {
            // A key that nobody can be told about is of no use; the next attempt may have the name.
            let _ = fs::remove_file(&key_path);
        }
        jwks
    }

    /// The key's id: its thumbprint (RFC 7638).
    #[must_use]
    pub fn id(&self) -> &str {
        self.jwk.kid.as_deref().expect("set when the key is made")
    }

    /// The JWK set that holds the public half.
    #[must_use]
    pub fn jwks(&self) -> String {
        #[derive(Serialize)]
        struct Set<'a> {
            keys: [&'a Jwk; 1],
        }
        let mut text = serde_json::to_string_pretty(&Set { keys: [&self.jwk] }).expect("strings are JSON");
        text.push('\n');
        text
    }

    /// The name that a token's header gives to what this key does (RFC 7518 §3.1, RFC 8037 §3.1).
    pub(super) fn algorithm(&self) -> &'static str {
        match self.pair {
            Pair::Eddsa(_) => "EdDSA",
            Pair::Es256(_) => "ES256",
        }
    }

    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let signature = match &self.pair {
            Pair::Eddsa(pair) => pair.try_sign(message)?,
            Pair::Es256(pair) => pair.sign(&SystemRandom::new(), message)?,
        };
        Ok(signature.as_ref().to_vec())
    }

    fn new(pair: Pair) -> Self {
        let (crv, kty, x, y) = match &pair {
            Pair::Eddsa(pair) => ("Ed25519", "OKP", pair.public_key().as_ref(), None),
            Pair::Es256(pair) => {
                // An uncompressed point: 4, x, y (SEC 1 §2.3.3).
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                ("P-256", "EC", x, Some(y))
            }
        };
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let mut jwk = Jwk { crv, kty, x: encode(x), y: y.map(encode), purpose: None, alg: None, kid: None };
        let hashed = serde_json::to_vec(&jwk).expect("strings are JSON");
        jwk.kid = Some(encode(digest::digest(&digest::SHA256, &hashed).as_ref()));
        let mut keys = Self { pair, jwk };
        keys.jwk.purpose = Some("sig");
        keys.jwk.alg = Some(keys.algorithm());
        keys
    }

    pub(super) fn pem(&self) -> Result<String, KeyError> {
        // Version 1, which every tool reads.
        let document = match &self.pair {
            Pair::Eddsa(pair) => pair.to_pkcs8v1()?,
            Pair::Es256(pair) => pair.to_pkcs8v1()?,
        };
        let text = STANDARD.encode(document.as_ref());
        let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
        for line in text.as_bytes().chunks(PEM_LINE_BYTES) {
            pem.extend(line.iter().copied().map(char::from));
            pem.push('\n');
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        Ok(pem)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// Writes a file that must not exist, with no moment in which it has another mode.
fn create(path: &Path, mode: u32, text: &str) -> Result<(), KeyError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::AlreadyExists => KeyError::Exists(path.into()),
            _ => KeyError::Write(path.into(), error),
        })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|error| KeyError::Write(path.into(), error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_id_is_the_thumbprint() {
        // RFC 8037, appendix A.1 and A.3.
        let seed = URL_SAFE_NO_PAD.decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").unwrap();
        let keys = Keys::new(Pair::Eddsa(Ed25519KeyPair::from_seed_unchecked(&seed).unwrap()));
        assert_eq!(keys.jwk.x, "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        assert_eq!(keys.id(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn files_are_private_where_they_must_be_and_read_back() {
        for algorithm in [Algorithm::Eddsa, Algorithm::Es256] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().join("new");
            let keys = Keys::generate(algorithm).unwrap();
            keys.write(&dir).unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&dir), mode(&dir.join(KEY_FILE))), (0o700, 0o600));
            let loaded = Keys::load(&dir.join(KEY_FILE)).unwrap();
            assert_eq!(
                (loaded.id(), loaded.algorithm(), loaded.jwks()),
                (keys.id(), keys.algorithm(), keys.jwks())
            );
            fs::set_permissions(dir.join(KEY_FILE), fs::Permissions::from_mode(0o644)).unwrap();
            let refused = Keys::load(&dir.join(KEY_FILE)).unwrap_err().to_string();
            assert!(
                refused.starts_with("the file can be read by others (mode 644): run chmod 600 "),
                "{refused}"
            );
            let jwks = fs::read_to_string(dir.join(JWKS_FILE)).unwrap();
            assert!(jwks.contains(keys.id()) && !jwks.contains("\"d\""), "{jwks}");
        }
    }

    #[test]
    fn neither_file_is_overwritten() {
        for name in [KEY_FILE, JWKS_FILE] {
            let dir = tempfile::tempdir().unwrap();
            // A link that leads nowhere is something, too.
            std::os::unix::fs::symlink("/nonexistent", dir.path().join(name)).unwrap();
            let result = Keys::generate(Algorithm::Eddsa).unwrap().write(dir.path());
            assert!(matches!(result, Err(KeyError::Exists(path)) if path.ends_with(name)));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(matches!(Keys::load(&path), Err(KeyError::Read(_))));
        for text in ["", "secret", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(Keys::load(&path), Err(KeyError::NotAKey)), "{text}");
        }
    }

    #[test]
    fn debug_shows_the_id_and_nothing_else() {
        let keys = Keys::generate(Algorithm::Eddsa).unwrap();
        assert_eq!(format!("{keys:?}"), format!("Keys {{ id: {:?}, .. }}", keys.id()));
    }
}
