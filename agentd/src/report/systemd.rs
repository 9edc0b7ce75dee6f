//! What systemd is told, where it started this process. Elsewhere nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

/// Speaks to the service manager.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notifier {
    watchdog: Option<Duration>,
    managed: bool,
}

impl Notifier {
    /// Reads what the service manager asked for.
    pub(crate) fn from_env() -> Self {
        // Twice as often as asked, so that one late turn of the loop is no emergency.
        Self {
            watchdog: sd_notify::watchdog_enabled().map(|interval| interval / 2),
            managed: std::env::var_os("NOTIFY_SOCKET").is_some(),
        }
    }

    /// Whether a service manager looks after this process.
    pub(crate) const fn is_managed(self) -> bool {
        self.managed
    }

    /// How often [`Self::alive`] must be said, if at all.
    pub(crate) const fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The configuration is valid and the agent is at work, connected or not.
    pub(crate) fn ready(self) {
        self.send(&[NotifyState::Ready]);
    }

    /// The configuration is read again; [`Self::ready`] says when that is done.
    pub(crate) fn reloading(self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!(%error, "the service manager was not told of the reload"),
        }
    }

    /// The state of the link, for people.
    pub(crate) fn status(self, text: &str) {
        self.send(&[NotifyState::Status(text)]);
    }

    /// The supervisor and the loops of all its connections turn.
    pub(crate) fn alive(self) {
        self.send(&[NotifyState::Watchdog]);
    }

    /// The agent drains and will be gone within `grace_period`.
    pub(crate) fn stopping(self, grace_period: Duration) {
        let usec = u32::try_from((grace_period + Duration::from_secs(5)).as_micros()).unwrap_or(u32::MAX);
        self.send(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(usec)]);
    }

    fn send(self, state: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(state) {
            tracing::debug!(%error, "the service manager was not reached");
        }
    }
}
