//! Task tokens: enters who waits, leaves a token that only its holder can answer with, once.
//!
//! A token is signed, so that one that was given out and is used or late can be told from one that never was,
//! without a list of all there ever were.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use proto::limits;
use serde_json::Value;
use sha2::Sha256;
use tokio::sync::{Notify, oneshot};

use super::{journal::Record, outcome::TaskError};
use crate::store::{Kept, Service};

/// The bytes of a token that are random. With the signature they make 712 characters, as many as a token of AWS has.
const RANDOM_BYTES: usize = 502;

/// The bytes of a token that sign the rest.
const SIGNATURE_BYTES: usize = 32;

/// How many of a token's last characters only its signature makes: they name it.
const TAIL_CHARS: usize = 42;

/// The most characters of a token (Step Functions API Reference, "SendTaskSuccess").
const TOKEN_CHARS: usize = 2048;

/// The most characters of a failure's name (Step Functions API Reference, "SendTaskFailure").
const ERROR_CHARS: usize = 256;

/// The most characters of a failure's words (Step Functions API Reference, "SendTaskFailure").
const CAUSE_CHARS: usize = 32_768;

/// Why an answer was not taken, under the names of Step Functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// No such token was ever given out.
    #[error("Invalid Token: 'Invalid token'")]
    InvalidToken,
    /// The token was used, or its task or run has ended.
    #[error("Task Timed Out: 'Provided task does not exist anymore'")]
    TaskTimedOut,
    /// The output is not JSON, or is over [`limits::STATE_BYTES`].
    #[error("Invalid Output: it is not JSON of at most 262144 bytes")]
    InvalidOutput,
    /// The failure's name or words are too long.
    #[error("the error has at most 256 characters, the cause 32768")]
    TooLong,
}

impl AnswerError {
    /// The error's name in the JSON protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidToken => "InvalidToken",
            Self::TaskTimedOut => "TaskTimedOut",
            Self::InvalidOutput => "InvalidOutput",
            Self::TooLong => "ValidationException",
        }
    }
}

/// The tokens of one service.
#[derive(Debug, Default)]
pub struct TaskTokens {
    /// Made with the first token. Those of another service are worth nothing here.
    key: OnceLock<[u8; 32]>,
    waiting: Mutex<HashMap<Box<str>, Waiting>>,
    /// Those of an earlier process, until their runs go on.
    reserved: Mutex<HashMap<Box<str>, PendingTask>>,
    kept: Arc<Kept>,
}

/// What names a token to whoever gave it out.
pub(super) fn tail(token: &str) -> &str {
    token.get(token.len().saturating_sub(TAIL_CHARS)..).unwrap_or_default()
}

#[derive(Debug)]
struct Waiting {
    answer: oneshot::Sender<Result<Value, TaskError>>,
    heartbeat: Arc<Notify>,
}

/// One who waits for an answer. The token is worth nothing any more when this is dropped.
#[derive(Debug)]
pub struct PendingTask {
    tokens: Arc<TaskTokens>,
    token: Box<str>,
    answer: oneshot::Receiver<Result<Value, TaskError>>,
    heartbeat: Arc<Notify>,
}

impl Drop for PendingTask {
    fn drop(&mut self) {
        self.tokens.take(&self.token);
    }
}

impl PendingTask {
    /// What an answer is sent with.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Waits for the answer, or the next sign of life: `None`.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Value, TaskError>> {
        tokio::select! {
            biased;
            // The sender is dropped only together with this.
            answer = &mut self.answer => answer.ok(),
            () = self.heartbeat.notified() => None,
        }
    }
}

impl TaskTokens {
    /// Tokens whose answers are kept.
    pub(super) fn new(kept: Arc<Kept>) -> Self {
        Self { kept, ..Self::default() }
    }

    /// Goes on with the key of an earlier process, so that its tokens are worth what they were. A key that is none is
    /// left alone.
    pub(super) fn set_key(&self, key: &str) {
        if let Some(key) = STANDARD.decode(key).ok().and_then(|key| key.try_into().ok()) {
            // A second call changes nothing.
            let _ = self.key.set(key);
        }
    }

    /// The key, for the next process.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub(super) fn key(&self) -> Result<String, getrandom::Error> {
        self.made_key().map(|key| STANDARD.encode(key))
    }

    fn made_key(&self) -> Result<&[u8; 32], getrandom::Error> {
        let mut key = [0; 32];
        if self.key.get().is_none() {
            getrandom::fill(&mut key)?;
        }
        Ok(self.key.get_or_init(|| key))
    }

    /// Gives out a token.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn issue(self: &Arc<Self>) -> Result<PendingTask, getrandom::Error> {
        let key = self.made_key()?;
        let mut bytes = [0; RANDOM_BYTES + SIGNATURE_BYTES];
        getrandom::fill(&mut bytes[..RANDOM_BYTES])?;
        let signature = signature(key, &bytes[..RANDOM_BYTES]).finalize().into_bytes();
        bytes[RANDOM_BYTES..].copy_from_slice(&signature);
        Ok(self.wait_for(STANDARD.encode(bytes).into()))
    }

    /// Takes answers to a token that was given out by an earlier process, for a run that will go on. A token of somebody
    /// else is left alone.
    pub(super) fn reserve(self: &Arc<Self>, token: &str) {
        if self.check(token).is_ok() {
            let pending = self.wait_for(token.into());
            self.reserved.lock().unwrap_or_else(PoisonError::into_inner).insert(token.into(), pending);
        }
    }

    /// Waits for the answer to a token that was reserved.
    pub(super) fn take_up(&self, token: &str) -> Option<PendingTask> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).remove(token)
    }

    fn wait_for(self: &Arc<Self>, token: Box<str>) -> PendingTask {
        let (sender, answer) = oneshot::channel();
        let heartbeat = Arc::new(Notify::new());
        let waiting = Waiting { answer: sender, heartbeat: Arc::clone(&heartbeat) };
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(token.clone(), waiting);
        PendingTask { tokens: Arc::clone(self), token, answer, heartbeat }
    }

    /// Ends a task with an output, which is JSON.
    ///
    /// # Errors
    ///
    /// Those of `SendTaskSuccess`.
    pub fn succeed(&self, token: &str, output: &str) -> Result<(), AnswerError> {
        self.check(token)?;
        if output.len() > limits::STATE_BYTES {
            return Err(AnswerError::InvalidOutput);
        }
        let output = serde_json::from_str(output).map_err(|_| AnswerError::InvalidOutput)?;
        self.answer(token, Ok(output))
    }

    /// Ends a task with an error.
    ///
    /// # Errors
    ///
    /// Those of `SendTaskFailure`.
    pub fn fail(&self, token: &str, error: &str, cause: &str) -> Result<(), AnswerError> {
        self.check(token)?;
        if error.chars().count() > ERROR_CHARS || cause.chars().count() > CAUSE_CHARS {
            return Err(AnswerError::TooLong);
        }
        self.answer(token, Err(TaskError::new(error.to_owned(), cause)))
    }

    /// Says that somebody still works on a task.
    ///
    /// # Errors
    ///
    /// Those of `SendTaskHeartbeat`.
    pub fn beat(&self, token: &str) -> Result<(), AnswerError> {
        self.check(token)?;
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.get(token).ok_or(AnswerError::TaskTimedOut)?.heartbeat.notify_one();
        Ok(())
    }

    fn answer(&self, token: &str, answer: Result<Value, TaskError>) -> Result<(), AnswerError> {
        let waiting = self.take(token).ok_or(AnswerError::TaskTimedOut)?;
        if let Some(store) = self.kept.get() {
            let record = Record::Answered { token: tail(token).into(), answer: Cow::Borrowed(&answer) };
            store.append(Service::Runs, &record);
        }
        waiting.answer.send(answer).map_err(|_| AnswerError::TaskTimedOut)
    }

    fn take(&self, token: &str) -> Option<Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(token)
    }

    /// Whether this service has given out the token.
    fn check(&self, token: &str) -> Result<(), AnswerError> {
        let bytes = if token.len() <= TOKEN_CHARS { STANDARD.decode(token).ok() } else { None };
        let (random, signed) = bytes
            .as_deref()
            .and_then(|bytes| bytes.split_at_checked(RANDOM_BYTES))
            .ok_or(AnswerError::InvalidToken)?;
        let key = self.key.get().ok_or(AnswerError::InvalidToken)?;
        signature(key, random).verify_slice(signed).map_err(|_| AnswerError::InvalidToken)
    }
}

fn signature(key: &[u8; 32], random: &[u8]) -> Hmac<Sha256> {
    let key = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    key.chain_update(random)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokens() -> Arc<TaskTokens> {
        Arc::default()
    }

    #[tokio::test]
    async fn a_token_is_answered_once() {
        let tokens = tokens();
        let mut first = tokens.issue().unwrap();
        let mut second = tokens.issue().unwrap();
        assert_eq!(first.token().len(), 712);
        tokens.beat(first.token()).unwrap();
        assert_eq!(first.next().await, None);
        tokens.succeed(first.token(), "[1]").unwrap();
        assert_eq!(first.next().await, Some(Ok(json!([1]))));
        for late in [
            tokens.succeed(first.token(), "1"),
            tokens.fail(first.token(), "E", "c"),
            tokens.beat(first.token()),
        ] {
            assert_eq!(late, Err(AnswerError::TaskTimedOut));
        }
        tokens.fail(second.token(), "E", "c").unwrap();
        assert_eq!(second.next().await, Some(Err(TaskError::new("E", "c"))));
    }

    #[tokio::test]
    async fn nobody_makes_a_token() {
        let tokens = tokens();
        let pending = tokens.issue().unwrap();
        let mut bytes = STANDARD.decode(pending.token()).unwrap();
        bytes[0] ^= 1;
        let others = self::tokens().issue().unwrap();
        let long = "A".repeat(TOKEN_CHARS + 4);
        for token in ["", "no base64", "AAAA", &long, others.token(), &STANDARD.encode(bytes)] {
            assert_eq!(tokens.succeed(token, "1"), Err(AnswerError::InvalidToken), "{token}");
        }
        let token = pending.token().to_owned();
        drop(pending);
        assert_eq!(tokens.succeed(&token, "1"), Err(AnswerError::TaskTimedOut));
        assert!(tokens.waiting.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn answers_keep_to_their_limits() {
        let tokens = tokens();
        let mut pending = tokens.issue().unwrap();
        let output = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
        let token = pending.token().to_owned();
        for output in ["{", &output(limits::STATE_BYTES + 1)] {
            assert_eq!(tokens.succeed(&token, output), Err(AnswerError::InvalidOutput));
        }
        for (error, cause) in [(ERROR_CHARS + 1, 0), (0, CAUSE_CHARS + 1)] {
            let answer = tokens.fail(&token, &"e".repeat(error), &"c".repeat(cause));
            assert_eq!(answer, Err(AnswerError::TooLong));
        }
        // What was refused has not used the token up.
        tokens.succeed(&token, &output(limits::STATE_BYTES)).unwrap();
        assert!(pending.next().await.unwrap().is_ok());
        let mut pending = tokens.issue().unwrap();
        tokens.fail(pending.token(), &"e".repeat(ERROR_CHARS), &"c".repeat(CAUSE_CHARS)).unwrap();
        assert!(pending.next().await.unwrap().is_err());
    }
}
