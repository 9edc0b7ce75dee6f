//! The control socket's file: where it is, who may open it, and that one agent owns it.
//!
//! The owner keeps a lock beside the socket. So a socket without a lock is stale, whatever left it there,
//! and nobody takes the socket of a running agent away.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tokio::net::{UnixListener, UnixStream};

/// The socket's name in its folder.
const FILE: &str = "control.sock";

/// Owner and group may ask and tell, nobody else.
const MODE: u32 = 0o660;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Another agent has it.
    #[error("another agent answers at {0}; name another place with --control-socket or control_socket")]
    Taken(PathBuf),
    /// The system refuses.
    #[error("the control socket {path}: {source}")]
    System {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The socket of this agent, removed when it is dropped.
pub(crate) struct ControlSocket {
    path: PathBuf,
    listener: UnixListener,
    _lock: File,
    /// Nobody else ever takes this place.
    own: bool,
}

impl ControlSocket {
    /// Takes a place and begins to listen there.
    ///
    /// # Errors
    ///
    /// [`SocketError`].
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::System { path: path.into(), source };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::DirBuilder::new().recursive(true).mode(0o750).create(folder).map_err(failed)?;
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.with_extension("lock"))
            .map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
                return Err(SocketError::Taken(path.into()));
            }
            Err(error) => return Err(failed(error.into())),
        }
        // Whoever looks finds either no socket or one with the right mode.
        let early = path.with_extension("new");
        let _ = fs::remove_file(&early);
        let listener = UnixListener::bind(&early).map_err(failed)?;
        fs::set_permissions(&early, fs::Permissions::from_mode(MODE)).map_err(failed)?;
        fs::rename(&early, path).map_err(failed)?;
        let own =
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("http-"));
        Ok(Self { path: path.into(), listener, _lock: lock, own })
    }

    /// The next who asks.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // The lock's file stays: removing it would let two agents hold "the" lock.
        let _ = fs::remove_file(&self.path);
        if self.own {
            let _ = fs::remove_file(self.path.with_extension("lock"));
        }
    }
}

/// Where `agentd http` listens: a place of its process, so that several can run.
pub(crate) fn place_for_people(environment: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let folder = environment("XDG_RUNTIME_DIR").filter(|folder| folder.is_dir())?.join("agentd");
    Some(folder.join(format!("http-{}.sock", std::process::id())))
}

/// Where a service listens unless it is told: the folder systemd made for it, or the usual one of its user.
pub(crate) fn place_for_service(
    environment: impl Fn(&str) -> Option<PathBuf>,
    is_root: bool,
) -> Option<PathBuf> {
    usual_places(environment, is_root).into_iter().next()
}

/// Where a running agent may be found, likeliest first.
pub(super) fn usual_places(environment: impl Fn(&str) -> Option<PathBuf>, is_root: bool) -> Vec<PathBuf> {
    let given = environment("RUNTIME_DIRECTORY").and_then(|folders| {
        // systemd separates several by colons.
        let first = folders.to_str()?.split(':').next()?.to_owned();
        (!first.is_empty()).then(|| PathBuf::from(first))
    });
    let of_user = environment("XDG_RUNTIME_DIR").map(|folder| folder.join("agentd"));
    let of_system = Some(PathBuf::from("/run/agentd"));
    let ordered = if is_root { [given, of_system, of_user] } else { [given, of_user, of_system] };
    ordered.into_iter().flatten().map(|folder| folder.join(FILE)).collect()
}

/// Where an agent in the background listens.
pub(crate) fn in_folder(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_agent_has_the_socket_and_a_stale_one_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/control.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::Taken(_))));
        let (asking, _) = tokio::join!(UnixStream::connect(&path), socket.accept());
        asking.unwrap();
        drop(socket);
        assert!(!path.exists());
        // What a crash leaves behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        ControlSocket::bind(&path).unwrap();
    }

    #[test]
    fn the_place_is_systemds_or_the_users_own() {
        let environment = |set: &'static [(&str, &str)]| {
            move |name: &str| set.iter().find(|(own, _)| *own == name).map(|(_, value)| PathBuf::from(value))
        };
        let place = |set, root| place_for_service(environment(set), root).unwrap();
        assert_eq!(place(&[("RUNTIME_DIRECTORY", "/run/x:/run/y")], false), Path::new("/run/x/control.sock"));
        assert_eq!(
            place(&[("XDG_RUNTIME_DIR", "/run/user/5")], false),
            Path::new("/run/user/5/agentd/control.sock")
        );
        assert_eq!(place(&[("XDG_RUNTIME_DIR", "/run/user/0")], true), Path::new("/run/agentd/control.sock"));
    }
}
