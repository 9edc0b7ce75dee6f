//! Lambda: functions as processes that poll a Runtime API, one invocation at a time each.
//!
//! What enters are events for a function; what leaves are its answers, whole or as a stream. The
//! processes are real ones, started on demand, suspended between invocations as Lambda freezes an
//! execution environment, killed when an invocation takes too long, and ended when they have been
//! idle for long.

mod pool;
pub mod process;
mod runtime_api;
pub mod share;

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
    time::Duration,
};

use bytes::Bytes;
use proto::limits;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time,
};

pub use pool::EnvironmentInfo;
use pool::{Pool, Reply};
pub use process::Launcher;

/// The most bytes that a function may stream in one answer
/// (Lambda Developer Guide, "Response streaming": 200 MB).
const STREAM_BYTES: u64 = limits::RESPONSE_BYTES;

/// The most bytes of a buffered answer
/// (Lambda Developer Guide, "Lambda quotas": 6 MB).
const ANSWER_BYTES: usize = 6 * 1024 * 1024;

/// How many pieces of a stream wait for a public client that reads slowly.
const STREAM_PIECES: usize = 4;

/// How often idle processes are looked through.
const REAP_INTERVAL: Duration = Duration::from_secs(60);

/// How long killed processes have to be gone when the pools close.
const CLOSE_TIME: Duration = Duration::from_secs(5);

/// Is told of a new process: its access key, its function and its environment's name.
pub type Begun = Arc<dyn Fn(&str, &'static str, &str) + Send + Sync>;

/// Is told of a process that has ended: its access key.
pub type Ended = Arc<dyn Fn(&str) + Send + Sync>;

/// Is told of each line on a function's standard output; says whether it has taken it.
pub type Printed = Arc<dyn Fn(&'static str, &[u8]) -> bool + Send + Sync>;

/// Is told of each process.
#[derive(Clone)]
pub struct Register {
    /// When it is about to start.
    pub begun: Begun,
    /// When it is gone.
    pub ended: Ended,
    /// What it prints.
    pub printed: Printed,
}

impl Default for Register {
    /// Tells nobody.
    fn default() -> Self {
        Self { begun: Arc::new(|_, _, _| {}), ended: Arc::new(|_| {}), printed: Arc::new(|_, _| false) }
    }
}

/// Says for each invocation whether its process is to be lost in the middle of it, and how long
/// after its begin.
pub type KillChance = Arc<dyn Fn() -> Option<Duration> + Send + Sync>;

/// One function.
#[derive(Debug, Clone)]
pub struct FunctionConfig {
    /// Its name.
    pub name: &'static str,
    /// How long one invocation may take.
    pub timeout: Duration,
    /// Its memory, in MB. It is told so; nothing holds it to it, nor to the part of a core that it buys, but
    /// [`Launcher::share`].
    pub memory_mb: u32,
    /// How many invocations may run at the same time.
    pub concurrency: usize,
    /// The account's executions that its invocations take one of each, or those that are reserved for it. Without, they
    /// are not counted.
    pub executions: Option<Arc<Semaphore>>,
    /// Its own environment variables.
    pub environment: BTreeMap<String, String>,
}

/// What all functions have in common.
#[derive(Clone)]
pub struct LambdaConfig {
    /// How their processes are started.
    pub launcher: Launcher,
    /// Where their AWS clients send requests to.
    pub aws_endpoint: String,
    /// Is told of each process.
    pub register: Register,
    /// Injects lost processes.
    pub kill_chance: KillChance,
}

impl fmt::Debug for LambdaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LambdaConfig")
            .field("launcher", &self.launcher)
            .field("aws_endpoint", &self.aws_endpoint)
            .finish_non_exhaustive()
    }
}

/// Why an invocation has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// No function of this name.
    #[error("no such function")]
    NoSuchFunction,
    /// As many invocations run as may (`TooManyRequestsException`).
    #[error("as many invocations are running as may")]
    Throttled,
    /// The event is over the limit (`RequestTooLargeException`).
    #[error("the event of {0} bytes is over the limit")]
    EventTooLarge(usize),
    /// The answer is over the limit (`Function.ResponseSizeTooLarge`).
    #[error("the answer is over the limit of 6 MB")]
    AnswerTooLarge,
    /// The process could not be started, or did not poll in time.
    #[error("function did not start: {0}")]
    Init(String),
    /// The function's time was over.
    #[error("invocation timed out after {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    /// The process ended in the middle of the invocation.
    #[error("{0}")]
    Exited(String),
    /// The function answered with an error.
    #[error("function failed: {error_type}: {message}")]
    Function {
        /// Its `errorType`.
        error_type: String,
        /// Its `errorMessage`.
        message: String,
    },
    /// What begins a streamed answer is not what Lambda defines.
    #[error("the head of the streamed answer is not valid")]
    Prelude,
    /// No invocations are taken any more.
    #[error("shutting down")]
    ShuttingDown,
}

/// A stream that ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the streamed answer was broken off")]
pub struct Broken;

/// The beginning of a streamed answer, with the body to come.
#[derive(Debug)]
pub struct StreamingResponse {
    /// The JSON before the eight NUL bytes; empty when the function sent none.
    pub prelude: Bytes,
    /// The rest.
    pub body: StreamBody,
    /// Whether nothing of the body was there with the head, and the eight NUL bytes were not a chunk of their own: an
    /// answer without a byte does not end then, see `public::fronts`.
    pub may_hang: bool,
}

/// One step of a streamed body.
#[derive(Debug)]
enum Piece {
    Chunk(Bytes),
    End,
}

/// The body of a streamed answer, in order. Dropping it tells the function that nobody listens.
#[derive(Debug)]
pub struct StreamBody(mpsc::Receiver<Piece>);

impl StreamBody {
    /// An answer of these pieces which its function has not ended yet, and what tells whether anybody listens.
    #[cfg(test)]
    pub(crate) fn unended(pieces: &[&'static str]) -> (Self, impl Fn() -> bool + use<>) {
        let (sender, receiver) = mpsc::channel(pieces.len().max(1));
        for piece in pieces {
            sender.try_send(Piece::Chunk(Bytes::from_static(piece.as_bytes()))).expect("there is room");
        }
        (Self(receiver), move || !sender.is_closed())
    }

    /// The next piece; none at the end.
    ///
    /// # Errors
    ///
    /// When the function broke off, or its process ended: the body is not complete.
    ///
    /// # Cancel safety
    ///
    /// No piece is lost.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        Self::step(self.0.recv().await)
    }

    /// The same for a hand-written future.
    ///
    /// # Errors
    ///
    /// As for [`Self::next`].
    pub fn poll_next(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<Option<Bytes>, Broken>> {
        self.0.poll_recv(context).map(Self::step)
    }

    fn step(piece: Option<Piece>) -> Result<Option<Bytes>, Broken> {
        match piece {
            Some(Piece::Chunk(bytes)) => Ok(Some(bytes)),
            Some(Piece::End) => Ok(None),
            // A sender that goes away without a word has failed: a stream never ends by silence.
            None => Err(Broken),
        }
    }
}

/// A streamed invocation that has been submitted. Dropping it gives up on its answer.
#[derive(Debug)]
pub struct StreamingCall {
    access_key: Arc<OnceLock<Box<str>>>,
    head: oneshot::Receiver<Result<StreamingResponse, InvokeError>>,
}

impl StreamingCall {
    /// Where the access key of the serving process appears, once one serves.
    #[must_use]
    pub fn access_key(&self) -> Arc<OnceLock<Box<str>>> {
        self.access_key.clone()
    }

    /// Waits for the head of the answer.
    ///
    /// # Errors
    ///
    /// When there will be none.
    pub async fn head(self) -> Result<StreamingResponse, InvokeError> {
        self.head.await.unwrap_or_else(|_| Err(lost()))
    }
}

/// Every function's processes, and the Runtime API that they poll.
#[derive(Clone)]
pub struct Lambda {
    pools: Arc<BTreeMap<&'static str, Arc<Pool>>>,
    functions: Arc<Functions>,
}

/// The functions as they are configured, to be asked and changed while they run.
struct Functions {
    configs: Mutex<BTreeMap<&'static str, FunctionConfig>>,
    common: LambdaConfig,
}

/// A [`Lambda`] that does not keep it.
#[derive(Clone)]
pub struct WeakLambda {
    pools: Weak<BTreeMap<&'static str, Arc<Pool>>>,
    functions: Weak<Functions>,
}

impl fmt::Debug for WeakLambda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakLambda").finish_non_exhaustive()
    }
}

impl WeakLambda {
    /// The functions, while somebody keeps them.
    #[must_use]
    pub fn upgrade(&self) -> Option<Lambda> {
        Some(Lambda { pools: self.pools.upgrade()?, functions: self.functions.upgrade()? })
    }
}

impl fmt::Debug for Lambda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.pools.keys()).finish()
    }
}

impl Lambda {
    /// Makes an empty pool for each function. No process is started yet.
    ///
    /// # Errors
    ///
    /// When the thread that starts processes cannot be had.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(functions: Vec<FunctionConfig>, config: LambdaConfig) -> io::Result<Self> {
        let spawner = Arc::new(process::Spawner::start(
            config.launcher.clone(),
            config.register.printed.clone(),
            tokio::runtime::Handle::current(),
        )?);
        let configs = functions.iter().map(|function| (function.name, function.clone())).collect();
        let common = config.clone();
        let pools = functions
            .into_iter()
            .map(|function| {
                let environment = environment(&function, &config);
                let name = function.name;
                let pool = Pool::new(
                    function,
                    environment,
                    spawner.clone(),
                    config.register.clone(),
                    config.kill_chance.clone(),
                    runtime_api::start,
                );
                (name, pool)
            })
            .collect();
        let functions = Arc::new(Functions { configs: Mutex::new(configs), common });
        let lambda = Self { pools: Arc::new(pools), functions };
        tokio::spawn(reap(Arc::downgrade(&lambda.pools)));
        Ok(lambda)
    }

    /// The same without keeping it.
    #[must_use]
    pub fn downgrade(&self) -> WeakLambda {
        WeakLambda { pools: Arc::downgrade(&self.pools), functions: Arc::downgrade(&self.functions) }
    }

    /// The function's own environment variables; none where there is no such function.
    #[must_use]
    pub fn variables(&self, function: &str) -> Option<BTreeMap<String, String>> {
        self.configs().get(function).map(|config| config.environment.clone())
    }

    fn configs(&self) -> MutexGuard<'_, BTreeMap<&'static str, FunctionConfig>> {
        self.functions.configs.lock().expect("nothing panics under this lock")
    }

    /// Replaces the function's own environment variables: as after a deployment, what is being served is
    /// finished by the processes there are, and whatever comes next is served by new ones.
    ///
    /// # Errors
    ///
    /// When there is no such function.
    pub fn reconfigure(
        &self,
        function: &str,
        variables: BTreeMap<String, String>,
    ) -> Result<(), InvokeError> {
        let pool = self.pools.get(function).ok_or(InvokeError::NoSuchFunction)?;
        let mut configs = self.configs();
        let config = configs.get_mut(function).ok_or(InvokeError::NoSuchFunction)?;
        config.environment = variables;
        pool.reconfigure(environment(config, &self.functions.common));
        Ok(())
    }

    /// Starts processes ahead of need.
    pub fn warm(&self, function: &str, count: usize) {
        if let Some(pool) = self.pools.get(function) {
            pool.warm(count);
        }
    }

    /// Invokes a function and waits for its whole answer. The invocation runs to its end even when
    /// this future is dropped.
    ///
    /// # Errors
    ///
    /// When the function fails, its process is lost, its time is over, or a limit is met.
    pub async fn invoke(&self, function: &str, event: Bytes) -> Result<Bytes, InvokeError> {
        let pool = self.admit(function, &event)?;
        let (reply, answer) = oneshot::channel();
        pool.submit(event, Reply::Buffered(reply));
        answer.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Invokes a function whose answer is a stream.
    ///
    /// # Errors
    ///
    /// When the function does not exist or the event is over the limit; anything else is told by
    /// [`StreamingCall::head`].
    pub fn invoke_streaming(&self, function: &str, event: Bytes) -> Result<StreamingCall, InvokeError> {
        let pool = self.admit(function, &event)?;
        let (head, receiver) = oneshot::channel();
        let access_key = Arc::new(OnceLock::new());
        pool.submit(event, Reply::Streaming { head, access_key: access_key.clone() });
        Ok(StreamingCall { access_key, head: receiver })
    }

    fn admit(&self, function: &str, event: &Bytes) -> Result<&Arc<Pool>, InvokeError> {
        if event.len() > limits::EVENT_BYTES {
            return Err(InvokeError::EventTooLarge(event.len()));
        }
        self.pools.get(function).ok_or(InvokeError::NoSuchFunction)
    }

    /// What is known about each process.
    #[must_use]
    pub fn environments(&self) -> Vec<EnvironmentInfo> {
        self.pools.values().flat_map(|pool| pool.info()).collect()
    }

    /// Takes no more invocations, kills every process and waits until they are gone.
    pub async fn close(&self) {
        for pool in self.pools.values() {
            pool.close();
        }
        let gone = async {
            for pool in self.pools.values() {
                pool.gone().await;
            }
        };
        if time::timeout(CLOSE_TIME, gone).await.is_err() {
            tracing::warn!("killed processes did not end");
        }
    }
}

fn lost() -> InvokeError {
    InvokeError::Exited("the process ended before it had answered".to_owned())
}

/// Ends processes that have been idle for long, as long as there are pools.
async fn reap(pools: Weak<BTreeMap<&'static str, Arc<Pool>>>) {
    let mut interval = time::interval(REAP_INTERVAL);
    loop {
        interval.tick().await;
        let Some(pools) = pools.upgrade() else { return };
        for pool in pools.values() {
            pool.reap_idle();
        }
    }
}

/// The environment that Lambda gives a function, without what differs between its processes.
fn environment(function: &FunctionConfig, config: &LambdaConfig) -> BTreeMap<String, String> {
    let mut environment = function.environment.clone();
    let memory = function.memory_mb.to_string();
    let reserved = [
        ("_HANDLER", "bootstrap"),
        ("AWS_EXECUTION_ENV", "AWS_Lambda_provided.al2023"),
        ("AWS_LAMBDA_FUNCTION_NAME", function.name),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
        ("AWS_LAMBDA_LOG_GROUP_NAME", function.name),
        ("AWS_REGION", REGION),
        ("AWS_DEFAULT_REGION", REGION),
        ("LANG", "en_US.UTF-8"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("TZ", ":UTC"),
    ];
    for (name, value) in reserved {
        environment.insert(name.to_owned(), value.to_owned());
    }
    // Lambda leaves this one to the function.
    environment.entry("AWS_ENDPOINT_URL".to_owned()).or_insert_with(|| config.aws_endpoint.clone());
    environment.insert(process::ENV_PARENT.to_owned(), std::process::id().to_string());
    environment
}

/// The region that everything says it is in.
pub(crate) const REGION: &str = "local-1";

/// The account that everything says it belongs to.
pub(crate) const ACCOUNT: &str = "000000000000";

/// `N` random bytes as lower-case hexadecimal digits.
pub(crate) fn random_hex<const N: usize>() -> String {
    let mut text = String::with_capacity(N * 2);
    for byte in random_bytes::<N>() {
        text.push(char::from_digit(u32::from(byte >> 4), 16).expect("a nibble is a digit"));
        text.push(char::from_digit(u32::from(byte & 15), 16).expect("a nibble is a digit"));
    }
    text
}

/// A random UUID (version 4), as AWS names requests.
pub(crate) fn random_uuid() -> String {
    let hex = random_hex::<16>();
    [&hex[..8], "-", &hex[8..12], "-4", &hex[13..16], "-a", &hex[17..20], "-", &hex[20..]].concat()
}

/// `N` random bytes.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

#[cfg(test)]
pub(crate) mod tests;
