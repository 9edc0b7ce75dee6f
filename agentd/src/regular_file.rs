//! Files that a configuration names. They are read again at each reload, so what can be read once, or never comes to an
//! end, is refused before it is opened: a pipe that nobody writes to would be waited for.

use std::{
    fs::{self, File, FileType},
    io::{self, Read as _},
    os::unix::fs::FileTypeExt as _,
    path::Path,
};

/// Opens a regular file.
///
/// # Errors
///
/// The system's, and one that says what it is instead.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    match other_kind(fs::metadata(path)?.file_type()) {
        None => File::open(path),
        Some(kind) => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {kind}, not a regular file")))
        }
    }
}

/// The bytes of a regular file.
///
/// # Errors
///
/// As [`open`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a regular file.
///
/// # Errors
///
/// As [`open`], and where it is no text.
pub(crate) fn read_to_string(path: &Path) -> io::Result<String> {
    io::read_to_string(open(path)?)
}

/// What is no regular file, for people.
fn other_kind(file_type: FileType) -> Option<&'static str> {
    if file_type.is_file() {
        None
    } else if file_type.is_dir() {
        Some("a folder")
    } else if file_type.is_fifo() {
        Some("a pipe")
    } else if file_type.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_refused_before_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "text").unwrap();
        symlink("file", path("link")).unwrap();
        fs::create_dir(path("folder")).unwrap();
        mknodat(CWD, path("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        symlink("/dev/zero", path("device")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read_to_string(&path(name)).unwrap(), "text");
            assert_eq!(read(&path(name)).unwrap(), b"text");
        }
        for name in ["folder", "pipe", "socket", "device"] {
            let error = read_to_string(&path(name)).unwrap_err().to_string();
            assert_eq!(error, format!("it is a {name}, not a regular file"));
            assert_eq!(read(&path(name)).unwrap_err().to_string(), error);
        }
        assert_eq!(open(&path("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
