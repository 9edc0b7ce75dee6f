//! The execution environments of one function: which are idle, which serve, what waits for one.
//!
//! What enters are invocations and what the Runtime API hears from each process; what leaves are
//! events for processes, and answers for invokers. One lock guards all of it, and nothing is
//! awaited under it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use rustix::process::Pid;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, oneshot},
    task::AbortHandle,
    time,
};

use super::{
    FunctionConfig, InvokeError, StreamingResponse,
    process::{self, Freezer, Launch, Running, Spawner},
};

/// How long a process may take from its start to its first poll
/// (Lambda Developer Guide, "Lambda execution environment lifecycle": the init phase is limited to 10 seconds).
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a start may keep others from beginning. One that takes longer waits for something else than a
/// core: `ingress` may have to wait for a new mailbox.
const START_TIME: Duration = Duration::from_millis(50);

/// How long an idle process is kept when there are more than [`KEPT_IDLE`].
const IDLE_TIME: Duration = Duration::from_secs(3 * 60);

/// How many idle processes are kept whatever their age.
const KEPT_IDLE: usize = 2;

/// The name of one execution environment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EnvironmentId(Arc<str>);

impl EnvironmentId {
    fn random(function: &str) -> Self {
        Self(format!("{function}-{}", super::random_hex::<12>()).into())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EnvironmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The port that one process polls. It is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) address: SocketAddr,
    pub(super) server: AbortHandle,
    /// Whether its process is suspended.
    pub(super) freezer: Arc<Freezer>,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Opens a port for the process of one environment. A pool knows who polls it, not in what words.
pub(super) type Listen = fn(&Arc<Pool>, EnvironmentId) -> io::Result<Port>;

/// Where an invocation's answer goes.
pub(super) enum Reply {
    /// The whole answer at once.
    Buffered(oneshot::Sender<Result<Bytes, InvokeError>>),
    /// A head, then a body piece by piece.
    Streaming {
        /// Takes the head with the rest to come.
        head: oneshot::Sender<Result<StreamingResponse, InvokeError>>,
        /// Is set to the access key of the process that serves the invocation.
        access_key: Arc<OnceLock<Box<str>>>,
    },
}

impl Reply {
    pub(super) fn fail(self, error: InvokeError) {
        match self {
            Self::Buffered(reply) => drop(reply.send(Err(error))),
            Self::Streaming { head, .. } => drop(head.send(Err(error))),
        }
    }

    /// Whether nobody wants it any more, and it has not begun.
    fn is_abandoned(&self) -> bool {
        match self {
            // Lambda finishes a buffered invocation whoever has gone.
            Self::Buffered(_) => false,
            Self::Streaming { head, .. } => head.is_closed(),
        }
    }
}

/// What a process gets when it polls.
pub(super) struct Event {
    pub(super) aws_request_id: Arc<str>,
    pub(super) deadline_ms: u128,
    pub(super) payload: Bytes,
}

/// The result of a poll.
pub(super) enum Poll {
    /// An event that was waiting.
    Ready(Event),
    /// The process is idle now, and frozen.
    Parked(oneshot::Receiver<Event>),
}

/// Why the Runtime API refuses what a process says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// No such environment.
    UnknownEnvironment,
    /// The environment does not serve that invocation now.
    UnknownInvocation,
}

struct Waiting {
    payload: Bytes,
    reply: Reply,
    since: Instant,
    /// One of the account's executions, where those are counted.
    execution: Option<OwnedSemaphorePermit>,
}

enum Phase {
    Starting,
    Idle {
        parked: oneshot::Sender<Event>,
        since: Instant,
    },
    Busy {
        aws_request_id: Arc<str>,
        /// `None` once the process has begun to answer.
        reply: Option<Reply>,
        /// Whether it has answered, and is about to poll.
        is_answered: bool,
        begun: Instant,
        /// Given back when the process polls again, or ends.
        execution: Option<OwnedSemaphorePermit>,
    },
}

struct Environment {
    phase: Phase,
    pid: Option<Pid>,
    access_key: Box<str>,
    spawned: Instant,
    init: Option<Duration>,
    invocations: u64,
    /// When the process is killed unless it has polled by then; none while it is idle.
    deadline: Option<Instant>,
    /// When the supervisor looks at `deadline` by itself.
    armed: Option<Instant>,
    /// Whether the function's configuration has changed since its start.
    is_outdated: bool,
    /// Why it is being killed.
    killed: Option<InvokeError>,
    wake: Arc<Notify>,
    port: Port,
}

#[derive(Default)]
struct State {
    environments: BTreeMap<EnvironmentId, Environment>,
    /// The most recently used one is the last.
    idle: Vec<EnvironmentId>,
    starting: usize,
    /// When those began that have been starting for less than [`START_TIME`].
    recent_starts: VecDeque<Instant>,
    /// How many have answered and are about to poll.
    answered: usize,
    waiting: VecDeque<Waiting>,
    /// From an event to the next poll, and from a start to the first one, as of late.
    service_time: Mean,
    start_time: Mean,
    /// Whether the queue is going to be looked at again by itself.
    is_watched: bool,
    closed: bool,
}

/// A mean in which what is recent counts most.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(Option<Duration>);

impl Mean {
    fn note(&mut self, duration: Duration) {
        self.0 = Some(self.0.map_or(duration, |mean| (mean * 7 + duration) / 8));
    }
}

impl State {
    /// Whether the processes there are will probably have taken all that waits before another one
    /// could have started.
    fn is_soon_served(&self) -> bool {
        let (Some(service), Some(start)) = (self.service_time.0, self.start_time.0) else { return false };
        // Idle ones there are none while something waits.
        let serving = self.environments.len();
        let queue = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        serving > self.starting
            && service.saturating_mul(queue)
                < start.saturating_mul(u32::try_from(serving).unwrap_or(u32::MAX))
            && self.waiting.front().is_none_or(|first| first.since.elapsed() < start)
    }
}

/// What is known about one process.
#[derive(Debug, Clone)]
pub struct EnvironmentInfo {
    /// The function that it runs.
    pub function: &'static str,
    /// Its process id.
    pub pid: i32,
    /// From its start to its first poll; none while it starts.
    pub init: Option<Duration>,
    /// How many invocations it has been given.
    pub invocations: u64,
    /// The most memory that it has had resident.
    pub peak_rss_bytes: Option<u64>,
}

/// The environments of one function.
pub(super) struct Pool {
    config: FunctionConfig,
    /// How many processes may have begun to start within [`START_TIME`]: more would only slow each other down.
    parallel_starts: usize,
    /// What the next process starts with.
    environment: Mutex<BTreeMap<String, String>>,
    spawner: Arc<Spawner>,
    register: super::Register,
    kill_chance: super::KillChance,
    listen: Listen,
    state: Mutex<State>,
    emptied: Notify,
    me: Weak<Self>,
}

impl Pool {
    pub(super) fn new(
        config: FunctionConfig,
        environment: BTreeMap<String, String>,
        spawner: Arc<Spawner>,
        register: super::Register,
        kill_chance: super::KillChance,
        listen: Listen,
    ) -> Arc<Self> {
        let parallel_starts = std::thread::available_parallelism().map_or(2, usize::from) * 2;
        Arc::new_cyclic(|me| Self {
            config,
            parallel_starts,
            environment: Mutex::new(environment),
            spawner,
            register,
            kill_chance,
            listen,
            state: Mutex::default(),
            emptied: Notify::new(),
            me: me.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under the pool's lock")
    }

    /// The function's name.
    pub(super) fn function(&self) -> &'static str {
        self.config.name
    }

    /// Hands an event to an idle process, or has it wait for one.
    pub(super) fn submit(&self, payload: Bytes, reply: Reply) {
        let mut state = self.lock();
        if state.closed {
            drop(state);
            return reply.fail(InvokeError::ShuttingDown);
        }
        let execution = match &self.config.executions {
            None => None,
            Some(all) => match Arc::clone(all).try_acquire_owned() {
                Ok(one) => Some(one),
                Err(_) => {
                    drop(state);
                    return reply.fail(InvokeError::Throttled);
                }
            },
        };
        let mut waiting = Waiting { payload, reply, since: Instant::now(), execution };
        while let Some(id) = state.idle.pop() {
            let Some(environment) = state.environments.get_mut(&id) else { continue };
            if !matches!(&environment.phase, Phase::Idle { parked, .. } if !parked.is_closed()) {
                // Its poll is gone: the process is dying, and its supervisor will say so.
                continue;
            }
            let (event, phase) = self.begin(environment, waiting);
            let Phase::Idle { parked, .. } = std::mem::replace(&mut environment.phase, phase) else {
                unreachable!("the phase was just looked at, under the lock")
            };
            match parked.send(event) {
                Ok(()) => return self.maybe_kill(&id, environment),
                Err(event) => {
                    let Phase::Busy { reply: Some(reply), execution, .. } =
                        std::mem::replace(&mut environment.phase, Phase::Starting)
                    else {
                        unreachable!("the phase was just set, under the lock")
                    };
                    environment.deadline = None;
                    self.kill(environment, InvokeError::Exited("its poll ended".to_owned()));
                    state.starting += 1;
                    waiting = Waiting { payload: event.payload, reply, since: Instant::now(), execution };
                }
            }
        }
        let in_use = state.environments.len() - state.starting - state.answered + state.waiting.len();
        if in_use >= self.config.concurrency {
            drop(state);
            return waiting.reply.fail(InvokeError::Throttled);
        }
        state.waiting.push_back(waiting);
        self.grow(&mut state);
    }

    /// Starts processes ahead of need, for the first invocations.
    pub(super) fn warm(&self, count: usize) {
        let mut state = self.lock();
        for _ in state.environments.len()..count.min(self.config.concurrency) {
            self.start_environment(&mut state);
        }
    }

    /// A process asks for its next event.
    pub(super) fn next(&self, id: &EnvironmentId) -> Result<Poll, Refused> {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(environment) = state.environments.get_mut(id) else {
            return Err(Refused::UnknownEnvironment);
        };
        environment.deadline = None;
        match &mut environment.phase {
            Phase::Starting => {
                state.starting -= 1;
                let init = *environment.init.get_or_insert_with(|| environment.spawned.elapsed());
                state.start_time.note(init.min(START_TIME));
                state.recent_starts.retain(|begun| *begun != environment.spawned);
                tracing::debug!(function = self.config.name, init_us = init.as_micros(), "process is ready");
            }
            Phase::Idle { .. } => state.idle.retain(|idle| idle != id),
            Phase::Busy { reply, is_answered, begun, .. } => {
                state.answered -= usize::from(*is_answered);
                state.service_time.note(begun.elapsed());
                if let Some(reply) = reply.take() {
                    reply.fail(InvokeError::Exited(
                        "the process asked for the next event without an answer".into(),
                    ));
                }
            }
        }
        if environment.is_outdated {
            // It never gets an answer: the process is gone before.
            let (parked, poll) = oneshot::channel();
            environment.phase = Phase::Idle { parked, since: Instant::now() };
            self.kill(environment, InvokeError::ShuttingDown);
            return Ok(Poll::Parked(poll));
        }
        while let Some(waiting) = state.waiting.pop_front() {
            if waiting.reply.is_abandoned() {
                continue;
            }
            let (event, phase) = self.begin(environment, waiting);
            environment.phase = phase;
            self.maybe_kill(id, environment);
            self.grow(state);
            return Ok(Poll::Ready(event));
        }
        let (parked, poll) = oneshot::channel();
        environment.phase = Phase::Idle { parked, since: Instant::now() };
        // Under the lock: an invocation can only find the process, and what is written for it thaw it, after this.
        if let Some(pid) = environment.pid {
            environment.port.freezer.freeze(pid);
        }
        state.idle.push(id.clone());
        Ok(Poll::Parked(poll))
    }

    /// A process begins to answer: takes out whom the answer is for.
    pub(super) fn take_reply(&self, id: &EnvironmentId, aws_request_id: &str) -> Result<Reply, Refused> {
        let mut state = self.lock();
        let environment = state.environments.get_mut(id).ok_or(Refused::UnknownEnvironment)?;
        match &mut environment.phase {
            Phase::Busy { aws_request_id: own, reply, .. } if **own == *aws_request_id => {
                reply.take().ok_or(Refused::UnknownInvocation)
            }
            Phase::Starting | Phase::Idle { .. } | Phase::Busy { .. } => Err(Refused::UnknownInvocation),
        }
    }

    /// A process has answered completely: what comes next may wait for it instead of a new one.
    pub(super) fn answered(&self, id: &EnvironmentId) {
        let mut state = self.lock();
        if let Some(Environment { phase: Phase::Busy { is_answered, begun, .. }, invocations, .. }) =
            state.environments.get_mut(id)
            && !std::mem::replace(is_answered, true)
        {
            if *invocations == 1 {
                let answer_us = begun.elapsed().as_micros();
                tracing::debug!(function = self.config.name, answer_us, "first event is answered");
            }
            state.answered += 1;
        }
    }

    /// A process says that it cannot start.
    pub(super) fn init_failed(&self, id: &EnvironmentId, error: InvokeError) -> Result<(), Refused> {
        let mut state = self.lock();
        let environment = state.environments.get_mut(id).ok_or(Refused::UnknownEnvironment)?;
        self.kill(environment, error);
        Ok(())
    }

    /// Takes another environment: what is idle or starting ends, what serves ends after that, and whatever
    /// comes next is served by new processes.
    pub(super) fn reconfigure(&self, environment: BTreeMap<String, String>) {
        *self.environment.lock().expect("nothing panics under this lock") = environment;
        let mut state = self.lock();
        let state = &mut *state;
        state.idle.clear();
        for environment in state.environments.values_mut() {
            environment.is_outdated = true;
            if !matches!(environment.phase, Phase::Busy { .. }) {
                self.kill(environment, InvokeError::ShuttingDown);
            }
        }
    }

    /// Has every idle process end that has been idle for long, except a few.
    pub(super) fn reap_idle(&self) {
        let mut state = self.lock();
        let state = &mut *state;
        let spare = state.idle.len().saturating_sub(KEPT_IDLE);
        // The least recently used ones are the first.
        for id in &state.idle[..spare] {
            if let Some(environment) = state.environments.get_mut(id)
                && matches!(&environment.phase, Phase::Idle { since, .. } if since.elapsed() >= IDLE_TIME)
            {
                self.kill(environment, InvokeError::ShuttingDown);
            }
        }
        let environments = &state.environments;
        state.idle.retain(|id| environments.get(id).is_some_and(|environment| environment.killed.is_none()));
    }

    /// Takes no more invocations and ends every process.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for waiting in std::mem::take(&mut state.waiting) {
            waiting.reply.fail(InvokeError::ShuttingDown);
        }
        state.idle.clear();
        for environment in state.environments.values_mut() {
            self.kill(environment, InvokeError::ShuttingDown);
        }
    }

    /// Waits until there is no process.
    pub(super) async fn gone(&self) {
        loop {
            let mut emptied = pin!(self.emptied.notified());
            emptied.as_mut().enable();
            if self.lock().environments.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// What is known about each process.
    pub(super) fn info(&self) -> Vec<EnvironmentInfo> {
        self.lock()
            .environments
            .values()
            .filter_map(|environment| {
                let pid = environment.pid?;
                Some(EnvironmentInfo {
                    function: self.config.name,
                    pid: pid.as_raw_nonzero().get(),
                    init: environment.init,
                    invocations: environment.invocations,
                    peak_rss_bytes: process::peak_rss_bytes(pid),
                })
            })
            .collect()
    }

    /// Makes an event of what waits and the phase of the process that serves it.
    fn begin(&self, environment: &mut Environment, waiting: Waiting) -> (Event, Phase) {
        let Waiting { payload, reply, since: _, execution } = waiting;
        if let Reply::Streaming { access_key, .. } = &reply {
            let _ = access_key.set(environment.access_key.clone());
        }
        let aws_request_id: Arc<str> = super::random_uuid().into();
        environment.invocations += 1;
        let deadline = Instant::now() + self.config.timeout;
        environment.deadline = Some(deadline);
        if environment.armed.is_none_or(|armed| armed > deadline) {
            environment.armed = Some(deadline);
            environment.wake.notify_one();
        }
        let deadline_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + self.config.timeout;
        let event =
            Event { aws_request_id: aws_request_id.clone(), deadline_ms: deadline_ms.as_millis(), payload };
        let begun = Instant::now();
        (event, Phase::Busy { aws_request_id, reply: Some(reply), is_answered: false, begun, execution })
    }

    /// Injected fault: the process is lost somewhere in the middle of an invocation.
    fn maybe_kill(&self, id: &EnvironmentId, environment: &Environment) {
        let Some(delay) = (self.kill_chance)() else { return };
        let (Some(me), id, invocation) = (self.me.upgrade(), id.clone(), environment.invocations) else {
            return;
        };
        tokio::spawn(async move {
            time::sleep(delay).await;
            if let Some(environment) = me.lock().environments.get_mut(&id)
                && environment.invocations == invocation
                && matches!(environment.phase, Phase::Busy { .. })
            {
                me.kill(environment, InvokeError::Exited("killed on purpose".to_owned()));
            }
        });
    }

    fn kill(&self, environment: &mut Environment, why: InvokeError) {
        environment.killed.get_or_insert(why);
        if let Some(pid) = environment.pid {
            process::kill(pid);
        }
    }

    /// Starts processes while what waits would otherwise wait longer than a start takes.
    fn grow(&self, state: &mut State) {
        let now = Instant::now();
        state.recent_starts.retain(|begun| now.saturating_duration_since(*begun) < START_TIME);
        while !state.closed
            && state.starting + state.answered < state.waiting.len()
            && state.environments.len() < self.config.concurrency
        {
            if state.recent_starts.len() >= self.parallel_starts || state.is_soon_served() {
                return self.watch(state);
            }
            let starting = state.starting;
            self.start_environment(state);
            if state.starting == starting {
                return;
            }
        }
    }

    /// Has the queue looked at again after the time that a start takes: means tell nothing about a
    /// process that is stuck.
    fn watch(&self, state: &mut State) {
        let Some(me) = self.me.upgrade() else { return };
        let patience = state.start_time.0.unwrap_or(START_TIME);
        if std::mem::replace(&mut state.is_watched, true) {
            return;
        }
        tokio::spawn(async move {
            time::sleep(patience).await;
            let mut state = me.lock();
            state.is_watched = false;
            me.grow(&mut state);
        });
    }

    fn start_environment(&self, state: &mut State) {
        let Some(me) = self.me.upgrade() else { return };
        let id = EnvironmentId::random(self.config.name);
        let port = match (self.listen)(&me, id.clone()) {
            Ok(port) => port,
            Err(error) => {
                tracing::error!(function = self.config.name, %error, "no port for a process");
                if let Some(waiting) = state.waiting.pop_front() {
                    waiting.reply.fail(InvokeError::Init(error.to_string()));
                }
                return;
            }
        };
        let access_key = format!("LOCAL{}", super::random_hex::<10>().to_ascii_uppercase());
        (self.register.begun)(&access_key, self.config.name, id.as_str());
        let mut environment = self.environment.lock().expect("nothing panics under this lock").clone();
        environment.insert("AWS_ACCESS_KEY_ID".into(), access_key.clone());
        environment.insert("AWS_SECRET_ACCESS_KEY".into(), super::random_hex::<20>());
        environment.insert("AWS_LAMBDA_LOG_STREAM_NAME".into(), id.to_string());
        environment.insert("AWS_LAMBDA_RUNTIME_API".into(), port.address.to_string());
        let wake = Arc::new(Notify::new());
        let now = Instant::now();
        state.starting += 1;
        state.recent_starts.push_back(now);
        state.environments.insert(
            id.clone(),
            Environment {
                phase: Phase::Starting,
                pid: None,
                access_key: access_key.into(),
                spawned: now,
                init: None,
                invocations: 0,
                deadline: Some(now + INIT_TIMEOUT),
                armed: Some(now + INIT_TIMEOUT),
                is_outdated: false,
                killed: None,
                wake: wake.clone(),
                port,
            },
        );
        self.spawner.launch(Launch {
            function: self.config.name,
            environment,
            started: Box::new(move |result| match result {
                Ok(running) => {
                    me.started(&id, running.pid);
                    tokio::spawn(supervise(me, id, running, wake));
                }
                Err(error) => me.ended(&id, &format!("not started: {error}")),
            }),
        });
    }

    fn started(&self, id: &EnvironmentId, pid: Pid) {
        let mut state = self.lock();
        let Some(environment) = state.environments.get_mut(id) else { return process::kill(pid) };
        environment.pid = Some(pid);
        if environment.killed.is_some() {
            process::kill(pid);
        } else if matches!(environment.phase, Phase::Idle { .. }) {
            // It polled before its process id was known.
            environment.port.freezer.freeze(pid);
        }
    }

    /// Forgets a process that has ended, and fails what it was serving.
    fn ended(&self, id: &EnvironmentId, how: &str) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(environment) = state.environments.remove(id) else { return };
        state.idle.retain(|idle| idle != id);
        (self.register.ended)(&environment.access_key);
        let error = environment.killed.clone();
        match environment.phase {
            Phase::Starting => {
                state.starting -= 1;
                state.recent_starts.retain(|begun| *begun != environment.spawned);
                // Whoever waits longest hears of it: a function that cannot start must not keep its
                // invokers waiting while it is started again and again.
                if environment.init.is_none() && !state.closed && !environment.is_outdated {
                    let error = error.unwrap_or_else(|| InvokeError::Init(how.to_owned()));
                    tracing::error!(function = self.config.name, %error, "function did not start");
                    if let Some(waiting) = state.waiting.pop_front() {
                        waiting.reply.fail(error);
                    }
                }
            }
            Phase::Idle { .. } => {}
            Phase::Busy { reply, is_answered, .. } => {
                state.answered -= usize::from(is_answered);
                let error = error.unwrap_or_else(|| InvokeError::Exited(how.to_owned()));
                if !state.closed && !is_answered {
                    tracing::warn!(function = self.config.name, %error, "process ended in an invocation");
                }
                if let Some(reply) = reply {
                    reply.fail(error);
                }
            }
        }
        self.grow(state);
        if state.environments.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// When the supervisor has to look again; kills the process when its time is over.
    fn check_deadline(&self, id: &EnvironmentId) -> Option<Instant> {
        let mut state = self.lock();
        let environment = state.environments.get_mut(id)?;
        match environment.deadline {
            Some(deadline) if deadline <= Instant::now() => {
                environment.deadline = None;
                environment.armed = None;
                let error = match environment.phase {
                    Phase::Starting => InvokeError::Init("no poll within 10 seconds".to_owned()),
                    Phase::Idle { .. } | Phase::Busy { .. } => InvokeError::TimedOut(self.config.timeout),
                };
                self.kill(environment, error);
                None
            }
            deadline => {
                environment.armed = deadline;
                deadline
            }
        }
    }
}

/// Waits for the end of a process and keeps its deadlines.
///
/// A deadline costs nothing while invocations end in time: the supervisor sleeps until the one it
/// knows of, looks whether it still holds, and is woken only when it knows of none.
async fn supervise(pool: Arc<Pool>, id: EnvironmentId, running: Running, wake: Arc<Notify>) {
    let Running { mut child, pid: _, group } = running;
    let mut deadline = pool.check_deadline(&id);
    let mut exit = pin!(child.wait());
    let how = loop {
        let until = deadline.map(time::Instant::from_std);
        tokio::select! {
            // Each look at a process takes longer than the rest, and most often it is not that.
            biased;
            () = wake.notified() => deadline = pool.check_deadline(&id),
            status = &mut exit => break describe(status),
            () = sleep_until(until), if until.is_some() => deadline = pool.check_deadline(&id),
        }
    };
    drop(group);
    pool.ended(&id, &how);
}

async fn sleep_until(deadline: Option<time::Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn describe(status: io::Result<std::process::ExitStatus>) -> String {
    match status {
        Ok(status) => format!("process ended: {status}"),
        Err(error) => format!("process lost: {error}"),
    }
}
