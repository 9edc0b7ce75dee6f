//! Why requests fail, said in the default log when it changes, and no more often than is of use.
//!
//! Enters: errors of a tunnel's upstream, and that it answers. Leaves: what is worth a line.

use std::{
    error::Error as StdError,
    fmt::Write as _,
    io,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::io::Errno;
use tokio::time::Instant;

use crate::{config::address::Address, tls};

/// A cause that goes on is said again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(5 * 60);

/// So many lines may be said at once…
const LINES: u32 = 5;

/// …and one more each time this has passed.
const LINE_EACH: Duration = Duration::from_secs(12);

/// The causes of one tunnel's failures.
#[derive(Debug, Default)]
pub(crate) struct Causes {
    /// Whether there is anything in `standing`: what a request that succeeds looks at.
    failing: AtomicBool,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    /// The last cause that was said, and when, while it goes on.
    standing: Option<(String, Instant)>,
    /// How many lines have been said since `since`.
    lines: u32,
    since: Option<Instant>,
    /// How many failures have not been said.
    unsaid: u64,
}

impl Causes {
    /// Notes a failure. Leaves how many were kept silent before it, if this one is to be said.
    pub(crate) fn failed(&self, cause: &str, now: Instant) -> Option<u64> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        self.failing.store(true, Ordering::Relaxed);
        let goes_on = said.standing.as_ref().is_some_and(|(standing, at)| {
            standing == cause && now.saturating_duration_since(*at) < AGAIN_AFTER
        });
        if goes_on || !said.may_say(now) {
            said.unsaid += 1;
            return None;
        }
        said.standing = Some((cause.to_owned(), now));
        Some(std::mem::take(&mut said.unsaid))
    }

    /// Notes that the upstream answers. True if it did not before, and that was said.
    pub(crate) fn answered(&self) -> bool {
        if !self.failing.load(Ordering::Relaxed) || !self.failing.swap(false, Ordering::Relaxed) {
            return false;
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.standing.take().is_some()
    }
}

impl Said {
    fn may_say(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_secs() / LINE_EACH.as_secs();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned > 0 {
            self.lines = self.lines.saturating_sub(earned);
            self.since = Some(now);
        }
        let may = self.lines < LINES;
        self.lines += u32::from(may);
        may
    }
}

/// An error with everything that caused it, each once, and what to do about it where that is known.
pub(crate) fn explain(upstream: &Address, error: &(dyn StdError + 'static)) -> String {
    let mut text = format!("{upstream}: {error}");
    let mut cause = error.source();
    let mut io = error.downcast_ref::<io::Error>();
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        io = io.or_else(|| inner.downcast_ref::<io::Error>());
        cause = inner.source();
    }
    if io.is_some_and(|io| matches!(Errno::from_io_error(io), Some(Errno::MFILE | Errno::NFILE))) {
        text.push_str("; it is agentd that may open no more files: raise LimitNOFILE= of its unit, or lower max_concurrent");
    }
    let tls = io.and_then(|io| io.get_ref()?.downcast_ref::<rustls::Error>());
    if let Some(advice) = tls.and_then(tls::advice) {
        let _ = write!(text, "; {advice}");
    }
    if let (Address::Unix(path), Some(io)) = (upstream, io)
        && let Some(advice) = socket_advice(path, io.kind())
    {
        let _ = write!(text, "; {advice}");
    }
    text
}

/// Why a socket that is there may not be there for the unit.
fn socket_advice(path: &Path, kind: io::ErrorKind) -> Option<&'static str> {
    let under = |folders: &[&str]| folders.iter().any(|folder| path.starts_with(folder));
    match kind {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied if under(&["/tmp", "/var/tmp"]) => {
            Some("agentd's unit has a /tmp of its own (PrivateTmp=yes): put the socket under /run")
        }
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            if under(&["/home", "/root", "/run/user"]) =>
        {
            Some("agentd's unit does not see homes (ProtectHome=yes): put the socket under /run")
        }
        io::ErrorKind::PermissionDenied => Some(
            "agentd's user may not write to it: give the socket a group, and the unit SupplementaryGroups= of it",
        ),
        io::ErrorKind::ConnectionRefused => Some("the socket is there, but nobody listens"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once_until_it_changes() {
        let (causes, now) = (Causes::default(), Instant::now());
        assert!(!causes.answered());
        assert_eq!(causes.failed("a", now), Some(0));
        assert_eq!(causes.failed("a", now), None);
        assert_eq!(causes.failed("a", now), None);
        assert_eq!(causes.failed("b", now), Some(2), "and says how many went before");
        assert!(causes.answered() && !causes.answered());
        assert_eq!(causes.failed("b", now), Some(0), "it is news again");
        assert_eq!(causes.failed("b", now + AGAIN_AFTER - Duration::from_secs(1)), None);
        assert_eq!(causes.failed("b", now + AGAIN_AFTER), Some(1), "and after a while");
    }

    #[test]
    fn causes_that_alternate_do_not_fill_the_log() {
        let (causes, start) = (Causes::default(), Instant::now());
        let mut said = 0;
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            for cause in ["a", "b"] {
                said += u64::from(causes.failed(cause, now).is_some());
                causes.answered();
            }
        }
        let most = u64::from(LINES) + 600 / LINE_EACH.as_secs();
        assert!((most - 2..=most).contains(&said), "{said}");
    }

    #[test]
    fn an_explanation_has_the_address_the_errno_and_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("the upstream cannot be reached: {0}")]
        struct Unreachable(#[source] io::Error);
        let refused = || Unreachable(io::Error::from_raw_os_error(111));
        let text = explain(&"3000".parse().unwrap(), &refused());
        assert_eq!(
            text,
            "http://localhost:3000: the upstream cannot be reached: Connection refused (os error 111)"
        );
        for (path, errno, advice) in [
            ("/tmp/app.sock", 2, "PrivateTmp"),
            ("/home/me/app.sock", 2, "ProtectHome"),
            ("/run/user/1000/app.sock", 13, "ProtectHome"),
            ("/run/app.sock", 13, "SupplementaryGroups"),
            ("/run/app.sock", 111, "nobody listens"),
        ] {
            let error = Unreachable(io::Error::from_raw_os_error(errno));
            let text = explain(&format!("unix:{path}").parse().unwrap(), &error);
            assert!(text.contains(advice) && text.contains("os error"), "{text}");
        }
        let plain =
            explain(&"unix:/run/app.sock".parse().unwrap(), &Unreachable(io::Error::from_raw_os_error(2)));
        assert!(plain.ends_with("No such file or directory (os error 2)"), "{plain}");
    }
}
