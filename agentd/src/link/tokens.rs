//! The token as its source has it now: it may have been replaced since it was read. Its file may be on a mount that hangs,
//! for which nothing that is served waits, nor a connection for long.

use std::{pin::Pin, time::Duration};

use tokio::time::timeout;

use crate::{
    apart::{Apart, NotBegun},
    identity::credential::{Token, TokenSource},
};

/// How long the token may take: it is one line. A connection without which nothing is served may wait for it.
const READING: Duration = Duration::from_secs(2);

/// No more threads than this wait for a token that does not come.
const MAX_HANGING: usize = 3;

/// A token that is being read.
pub(super) type Reading = Pin<Box<dyn Future<Output = Result<Token, String>> + Send>>;

/// Reads the token again.
pub(super) struct Tokens {
    source: TokenSource,
    readings: Apart,
}

impl Tokens {
    pub(super) fn new(source: TokenSource) -> Self {
        Self { source, readings: Apart::new("token", MAX_HANGING) }
    }

    /// Where it comes from.
    pub(super) const fn source(&self) -> &TokenSource {
        &self.source
    }

    /// From now on it comes from there.
    pub(super) fn come_from(&mut self, source: TokenSource) {
        self.source = source;
    }

    /// Reads it. Why it could not be read is a sentence for the user.
    pub(super) fn read(&self) -> Reading {
        let source = self.source.clone();
        self.read_with(READING, move || source.read().map_err(|error| error.to_string()))
    }

    fn read_with(
        &self,
        within: Duration,
        read: impl FnOnce() -> Result<Token, String> + Send + 'static,
    ) -> Reading {
        let (begun, place) = (self.readings.begin(read), self.source.place());
        Box::pin(async move {
            let outcome = begun.map_err(|error| match error {
                NotBegun::Hanging => format!("{place} does not come, and earlier tries still wait for it"),
                NotBegun::System(error) => format!("cannot read {place}: {error}"),
            })?;
            match timeout(within, outcome).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(format!("reading {place} broke off")),
                Err(_) => Err(format!(
                    "{place} did not come within {} s: it is on a mount that hangs, or a pipe that nobody writes to",
                    within.as_secs()
                )),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_token_that_never_comes_is_not_waited_for() {
        let source = TokenSource::from_value("abc").unwrap();
        let token = source.read().unwrap();
        let mut tokens = Tokens::new(source);
        assert_eq!(tokens.read().await, Ok(token));
        tokens.come_from(TokenSource::File("/nowhere/token".into()));
        assert!(tokens.read().await.unwrap_err().starts_with("cannot read the token file /nowhere/token: "));
        let mut hung = Vec::new();
        for _ in 0..MAX_HANGING {
            let (let_go, hang) = mpsc::channel::<()>();
            hung.push(let_go);
            let reading = tokens.read_with(Duration::ZERO, move || {
                let _ = hang.recv();
                Err("it came too late".to_owned())
            });
            let why = reading.await.unwrap_err();
            assert!(why.starts_with("/nowhere/token did not come within 0 s: "), "{why}");
        }
        let why = tokens.read().await.unwrap_err();
        assert_eq!(why, "/nowhere/token does not come, and earlier tries still wait for it");
    }
}
