//! What the agent is asked by signals.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask for something.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    /// Where nothing can be read again, a hangup ends the agent as it ends every program.
    pub(super) fn new(reloads: bool) -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: if reloads { Some(signal(SignalKind::hangup())?) } else { None },
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
            () = hangup => Asked::Reload,
        }
    }
}

/// What a signal asks for.
pub(super) enum Asked {
    /// To stop.
    Stop,
    /// To read the configuration again.
    Reload,
}
