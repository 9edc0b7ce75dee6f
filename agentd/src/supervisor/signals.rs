//! What the agent is asked by signals.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask for something.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
    reloads: bool,
}

impl Signals {
    /// Where nothing can be read again, a hangup says that the terminal is gone. Whoever has it ignored, as `nohup` does,
    /// stays without.
    pub(super) fn new(reloads: bool) -> std::io::Result<Self> {
        let is_heard =
            reloads || !std::fs::read_to_string("/proc/self/status").is_ok_and(|it| ignores_hangup(&it));
        Ok(Self {
            reloads,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: if is_heard { Some(signal(SignalKind::hangup())?) } else { None },
        })
    }

    /// Waits for the next one.
    ///
    /// # Cancel safety
    ///
    /// None is lost.
    pub(super) async fn next(&mut self) -> Asked {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => {
                    hangup.recv().await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            () = hangup => if self.reloads { Asked::Reload } else { Asked::Leave },
        }
    }
}

/// What a signal asks for.
pub(super) enum Asked {
    /// To stop.
    Stop,
    /// To stop, because nobody sits here any more: a terminal that closes says so more than once.
    Leave,
    /// To read the configuration again.
    Reload,
}

/// Whether a process with this `/proc/PID/status` has SIGHUP, the first signal, ignored.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ignores_a_hangup_is_told_by_the_kernel() {
        let status =
            |mask: &str| format!("Name:\tagentd\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\nSigCgt:\t1\n");
        assert!(ignores_hangup(&status("0000000000001001")));
        assert!(!ignores_hangup(&status("0000000000001000")));
        assert!(!ignores_hangup("Name:\tagentd\n") && !ignores_hangup(&status("x")));
    }
}
