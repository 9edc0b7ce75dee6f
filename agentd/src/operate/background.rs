//! The daemon in the background, where no systemd looks after it: `agentd start|stop|status`.
//!
//! A state folder holds the pid file and the logs. The running daemon keeps the pid file locked, so a
//! file that is not locked is stale, whatever it says: after a crash or a power cut nothing needs to be
//! cleaned up.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::{IntoRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use daemonize::{Daemonize, Outcome};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::config::DEFAULT_GRACE_PERIOD;

/// What the started daemon says once it runs. One that cannot says the code it ends with, a byte, and why.
const READY: &[u8] = b"ready";

/// How much longer than its grace period a daemon may take to stop.
pub(crate) const STOP_MARGIN: Duration = Duration::from_secs(5);

/// Why the daemon is not in the background.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A daemon with this state folder runs already.
    #[error("already running with pid {0}; `agentd stop` ends it")]
    Running(i32),
    /// It began and ended at once, and nobody knows why.
    #[error("it ended as soon as it was started; its log is in {0}")]
    Ended(PathBuf),
    /// It did not end in time.
    #[error("pid {pid} is still draining after {seconds} s; run `agentd stop` again, which ends it at once")]
    StillRunning { pid: i32, seconds: u64 },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    System { what: String, source: std::io::Error },
}

fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::System { what, source }
}

/// Where a daemon in the background keeps its pid file and logs.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// The folder that was asked for, or the usual one of this user: `/var/lib/agentd` for root,
    /// otherwise `agentd` under `XDG_STATE_HOME` or `~/.local/state`.
    pub(crate) fn find(
        asked: Option<PathBuf>,
        environment: impl Fn(&str) -> Option<PathBuf>,
        is_root: bool,
    ) -> Option<Self> {
        let home = || environment("HOME").map(|home| home.join(".local/state"));
        asked
            .or_else(|| is_root.then(|| "/var/lib/agentd".into()))
            .or_else(|| environment("XDG_STATE_HOME").or_else(home).map(|state| state.join("agentd")))
            .map(Self)
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn pid_file(&self) -> PathBuf {
        self.0.join("agentd.pid")
    }

    /// Says how long the daemon may take to stop: its grace period in milliseconds.
    fn grace_file(&self) -> PathBuf {
        self.0.join("agentd.grace")
    }

    fn grace_period(&self) -> Duration {
        let text = fs::read_to_string(self.grace_file()).ok();
        let ms = text.and_then(|text| text.trim().parse().ok());
        ms.map_or(DEFAULT_GRACE_PERIOD, Duration::from_millis)
    }

    /// Where the logs are: one file a day.
    pub(crate) fn log_dir(&self) -> PathBuf {
        self.0.join("log")
    }

    /// The daemon that keeps the pid file locked.
    pub(crate) fn running(&self) -> Result<Option<Pid>, Error> {
        let path = self.pid_file();
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(system(format!("{}", path.display()))(error)),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(None),
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => {}
            Err(error) => return Err(system(format!("{}", path.display()))(error.into())),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(system(format!("{}", path.display())))?;
        Ok(text.trim().parse().ok().and_then(Pid::from_raw))
    }
}

/// To be told once the daemon runs.
pub(crate) struct Starter(File);

impl Starter {
    /// The daemon runs.
    pub(crate) fn ready(mut self) {
        // Whoever started it may be gone; the daemon is not concerned.
        let _ = self.0.write_all(READY);
    }

    /// The daemon ends with `code`, for this reason.
    pub(crate) fn failed(mut self, code: u8, reason: &str) {
        let _ = self.0.write_all(&[&[code], reason.as_bytes()].concat());
        // It is closed by the end of this process, so that whoever waits for that finds it gone.
        let _ = self.0.into_raw_fd();
    }
}

/// What this process is after the fork.
pub(crate) enum Forked {
    /// The one that was asked to start a daemon; the daemon runs with this pid.
    Starter(Pid),
    /// The same, but the daemon could not begin, says why, and ends with this code.
    Failed { code: u8, reason: String },
    /// The daemon.
    Daemon(Starter),
}

/// Puts the rest of the program into the background; `grace_period` is how long its stop may take. No
/// thread may exist yet: a fork would leave it, and whatever lock it holds, behind.
pub(crate) fn start(state: &StateDir, grace_period: Duration) -> Result<Forked, Error> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        let source = std::io::Error::other(format!("{threads} threads exist already"));
        return Err(Error::System { what: "going into the background".into(), source });
    }
    if let Some(pid) = state.running()? {
        return Err(Error::Running(pid.as_raw_nonzero().get()));
    }
    for dir in [&state.0, &state.log_dir()] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(system(format!("{}", dir.display())))?;
    }
    let here = std::env::current_dir().map_err(system("the working directory"))?;
    let (reads, writes): (OwnedFd, OwnedFd) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| system("a pipe")(error.into()))?;
    let daemonize = Daemonize::new().pid_file(state.pid_file()).working_directory(here).umask(0o077);
    match daemonize.execute() {
        Outcome::Parent(Ok(_)) => {
            drop(writes);
            // Ends when the daemon has said something or is no more: nothing is guessed from time.
            let mut said = Vec::new();
            let heard = File::from(reads).read_to_end(&mut said);
            heard.map_err(system("waiting for the daemon"))?;
            if let Some((&code, reason)) = said.split_first().filter(|_| said != READY) {
                return Ok(Forked::Failed { code, reason: String::from_utf8_lossy(reason).into_owned() });
            }
            match state.running()? {
                Some(pid) if said == READY => Ok(Forked::Starter(pid)),
                // Another start was a moment earlier.
                Some(pid) => Err(Error::Running(pid.as_raw_nonzero().get())),
                None => Err(Error::Ended(state.log_dir())),
            }
        }
        Outcome::Child(Ok(_)) => {
            drop(reads);
            // Without the file a stop waits for as long as usual.
            let _ = fs::write(state.grace_file(), grace_period.as_millis().to_string());
            Ok(Forked::Daemon(Starter(writes.into())))
        }
        Outcome::Parent(Err(error)) | Outcome::Child(Err(error)) => Err(Error::System {
            what: "going into the background".into(),
            source: std::io::Error::other(error),
        }),
    }
}

/// Ends the daemon in an orderly way and waits for it: how long that took, or `None` where none runs.
pub(crate) fn stop(state: &StateDir) -> Result<Option<Duration>, Error> {
    let Some(pid) = state.running()? else { return Ok(None) };
    let begun = Instant::now();
    let Some(process) = Process::open(pid)? else { return Ok(Some(begun.elapsed())) };
    // Between reading the pid and opening the process another may have taken the number.
    if state.running()? != Some(pid) {
        return Ok(Some(begun.elapsed()));
    }
    pidfd_send_signal(&process.handle, Signal::TERM).map_err(|error| system("stopping it")(error.into()))?;
    process.wait(state.grace_period() + STOP_MARGIN).map(Some)
}

/// A process whose end can be waited for.
pub(crate) struct Process {
    handle: OwnedFd,
    pid: Pid,
}

impl Process {
    /// Opens it; `None` where there is no such process.
    pub(crate) fn open(pid: Pid) -> Result<Option<Self>, Error> {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => Ok(Some(Self { handle, pid })),
            Err(error) if error == rustix::io::Errno::SRCH => Ok(None),
            Err(error) => Err(system("the daemon's process")(error.into())),
        }
    }

    /// Waits for its end: how long that took.
    pub(crate) fn wait(&self, patience: Duration) -> Result<Duration, Error> {
        let begun = Instant::now();
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            let timeout =
                Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => {
                    return Err(Error::StillRunning {
                        pid: self.pid.as_raw_nonzero().get(),
                        seconds: patience.as_secs(),
                    });
                }
                Ok(_) => return Ok(begun.elapsed()),
                Err(error) if error == rustix::io::Errno::INTR => {}
                Err(error) => return Err(system("waiting for it")(error.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_folder_is_the_asked_one_or_the_users_own() {
        let environment = |name: &str| (name == "HOME").then(|| PathBuf::from("/h"));
        let find = |asked: Option<&str>, root| {
            StateDir::find(asked.map(PathBuf::from), environment, root).unwrap().0
        };
        assert_eq!(find(Some("/x"), true), Path::new("/x"));
        assert_eq!(find(None, true), Path::new("/var/lib/agentd"));
        assert_eq!(find(None, false), Path::new("/h/.local/state/agentd"));
        assert!(StateDir::find(None, |_| None, false).is_none());
    }

    #[test]
    fn a_pid_file_that_nobody_locks_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir(dir.path().to_owned());
        assert_eq!(state.running().unwrap(), None);
        fs::write(state.pid_file(), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(state.running().unwrap(), None, "this process runs, but is not the daemon");
        let held = File::open(state.pid_file()).unwrap();
        flock(&held, FlockOperation::LockExclusive).unwrap();
        assert_eq!(state.running().unwrap(), Pid::from_raw(std::process::id().cast_signed()));
    }
}
