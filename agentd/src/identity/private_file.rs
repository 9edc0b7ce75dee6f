//! Files that hold secrets: read only where nobody else can read them.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use crate::regular_file;

/// Secrets in base64 come with and without padding.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// No file with secrets is longer.
const MOST_BYTES: u64 = 1024 * 1024;

/// Something that is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// The bytes of the secret.
    #[must_use]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key that a secret of Standard Webhooks stands for: base64, whether or not `whsec_` stands before it.
    /// `None` where it is no base64.
    #[must_use]
    pub(crate) fn decoded(&self) -> Option<Vec<u8>> {
        let text = self.bytes();
        LENIENT.decode(text.strip_prefix(b"whsec_").unwrap_or(text)).ok().filter(|key| !key.is_empty())
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Why a file with secrets was not read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// It cannot be read, or is no text.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner may read it.
    #[error("{path} can be read by others (mode {mode:03o}): {remedy}")]
    Exposed {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
        /// What helps where the file is.
        remedy: String,
    },
    /// It is over the limit of 1 MiB.
    #[error("{0} is over 1 MiB: is it the right file?")]
    TooLong(String),
}

/// Where files with secrets may be.
#[derive(Debug, Clone, Default)]
pub struct PrivateFiles {
    /// The folder of systemd credentials: systemd guards it itself, and its permission bits say something else.
    pub credentials: Option<PathBuf>,
}

/// A file's text without the byte order mark that editors on Windows put before it.
pub(super) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

impl PrivateFiles {
    /// The text of a file that only its owner may read, without a byte order mark.
    ///
    /// # Errors
    ///
    /// [`PrivateFileError`].
    pub(crate) fn read(&self, path: &Path) -> Result<String, PrivateFileError> {
        let shown = || path.display().to_string();
        let error = |source| PrivateFileError::Read { path: shown(), source };
        let file = regular_file::open(path).map_err(error)?;
        let metadata = file.metadata().map_err(error)?;
        let guarded = self.credentials.as_deref().is_some_and(|dir| path.starts_with(dir));
        if let Some((mode, remedy)) = exposure(path, &metadata).filter(|_| !guarded) {
            return Err(PrivateFileError::Exposed { path: shown(), mode, remedy });
        }
        let mut text = String::new();
        file.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(error)?;
        if text.len() as u64 > MOST_BYTES {
            return Err(PrivateFileError::TooLong(shown()));
        }
        Ok(without_mark(&text).to_owned())
    }

    /// The secrets of a file: one on each line, however the lines end.
    ///
    /// # Errors
    ///
    /// A sentence for the user: also where there is none.
    pub(crate) fn secrets(&self, path: &Path) -> Result<Vec<Secret>, String> {
        let text = self.read(path).map_err(|error| error.to_string())?;
        let secrets: Vec<Secret> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(Secret::from).collect();
        if secrets.is_empty() {
            return Err(format!("{} is empty: a secret on each line is wanted", path.display()));
        }
        Ok(secrets)
    }
}

/// The mode of a file that others may read, and what helps. What is no file, such as a pipe, is nobody else's to read.
pub(super) fn exposure(path: &Path, metadata: &fs::Metadata) -> Option<(u32, String)> {
    let mode = metadata.mode() & 0o777;
    if !metadata.is_file() || !is_exposed(metadata.uid(), mode) {
        return None;
    }
    let me = rustix::process::geteuid();
    let is_read_only = rustix::fs::statvfs(path)
        .is_ok_and(|system| system.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    let may_change = (me.is_root() || metadata.uid() == me.as_raw()) && !is_read_only;
    let chmod = || format!("run chmod 600 {}", quoted(&path.display().to_string()));
    Some((mode, if may_change { chmod() } else { MOUNTED.to_owned() }))
}

/// Whether somebody may read a file who should not: anybody but its owner, and but the group of a file of root's, which
/// is how administrators and Kubernetes (`fsGroup`) hand a secret to one service.
const fn is_exposed(owner: u32, mode: u32) -> bool {
    let allowed = if owner == 0 { 0o740 } else { 0o700 };
    mode & 0o777 & !allowed != 0
}

/// What helps where the agent cannot change the mode.
const MOUNTED: &str = "mount it with mode 0400 or 0440 (Kubernetes: defaultMode 0440 and fsGroup; Docker: mode 0400 and the \
                       agent's uid)";

/// A path as a shell takes it.
fn quoted(path: &str) -> String {
    let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+".contains(&b));
    if plain { path.to_owned() } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_group_may_read_what_is_roots() {
        for (owner, mode, exposed) in [
            // Kubernetes with fsGroup, Docker with a mode, administrators.
            (0, 0o440, false),
            (0, 0o640, false),
            (0, 0o400, false),
            (1000, 0o400, false),
            (1000, 0o700, false),
            // Kubernetes and Docker by default.
            (0, 0o644, true),
            (0, 0o444, true),
            (0, 0o660, true),
            (0, 0o450, true),
            // Somebody's own group is nobody's choice.
            (1000, 0o440, true),
            (1000, 0o640, true),
            (1000, 0o604, true),
        ] {
            assert_eq!(is_exposed(owner, mode), exposed, "{owner} {mode:03o}");
        }
    }

    #[test]
    fn only_files_of_the_owner_alone_are_read_but_for_systemds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a secret");
        fs::write(&path, "one\n\n two \n").unwrap();
        for mode in [0o620, 0o604, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let message = PrivateFiles::default().secrets(&path).unwrap_err();
            assert!(message.ends_with(&format!("run chmod 600 '{}'", path.display())), "{message}");
            let files = PrivateFiles { credentials: Some(dir.path().into()) };
            assert_eq!(files.secrets(&path).unwrap(), [Secret::from("one"), Secret::from("two")]);
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(PrivateFiles::default().secrets(&path).unwrap().len(), 2);
        assert_eq!(format!("{:?}", Secret::from("x")), "Secret(…)");
        fs::write(&path, "\u{feff}one\r\ntwo\r\n").unwrap();
        assert_eq!(
            PrivateFiles::default().secrets(&path).unwrap(),
            [Secret::from("one"), Secret::from("two")]
        );
        assert_eq!(PrivateFiles::default().read(&path).unwrap(), "one\r\ntwo\r\n");
        fs::write(&path, "\u{feff}").unwrap();
        assert!(PrivateFiles::default().secrets(&path).unwrap_err().ends_with("is wanted"));
        fs::write(&path, " \n").unwrap();
        assert!(PrivateFiles::default().secrets(&path).unwrap_err().ends_with("is wanted"));
        fs::write(&path, vec![b'x'; MOST_BYTES as usize]).unwrap();
        assert!(PrivateFiles::default().secrets(&path).is_ok());
        fs::write(&path, vec![b'x'; MOST_BYTES as usize + 1]).unwrap();
        assert!(PrivateFiles::default().secrets(&path).unwrap_err().contains("over 1 MiB"));
        assert!(
            PrivateFiles::default().secrets(&dir.path().join("none")).unwrap_err().contains("cannot read")
        );
    }
}
