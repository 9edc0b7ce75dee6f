//! Processes of functions: started, frozen, thawed, ended, and their output forwarded.
//!
//! What enters is a `Launch`; what leaves is a running [`Child`] in a process group of its own,
//! whose output goes to this process's standard error, line by line.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
        mpsc,
    },
    thread,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child, Command},
    runtime::Handle,
};

use super::{
    Printed,
    share::{Group, Share},
};

/// The most bytes of one line of a function's output; the rest of a longer one is a line of its own.
const LINE_BYTES: u64 = 16 * 1024;

/// How much of what a process prints is read at a time: a line of the log, or a few. There are hundreds of processes, each
/// with two pipes.
const READ_BYTES: usize = 1024;

/// The functions that nobody waits for. In AWS each process of a function has processors of its own; here they share the
/// machine's, and what is delivered later must not slow down what somebody waits for.
const BACKGROUND: &[&str] = &["deliver", "sweep"];

/// How nice a process of [`BACKGROUND`] is: beside the others it gets a tenth of what one of them gets.
const NICE: i32 = 10;

/// How to start a process of a function: a program and its leading arguments.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments; the function's name is added at the end.
    pub arguments: Vec<String>,
    /// The part of a core that each process gets; all of it without.
    pub share: Option<Arc<Share>>,
}

impl Launcher {
    /// This very program with its hidden subcommand `function`.
    ///
    /// # Errors
    ///
    /// When the path of the running program cannot be found out.
    pub fn current_program() -> io::Result<Self> {
        Ok(Self { program: std::env::current_exe()?, arguments: vec!["function".to_owned()], share: None })
    }
}

/// A process that has been started.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) child: Child,
    pub(super) pid: Pid,
    /// What gives it its part of a core; to be dropped when it has ended.
    pub(super) group: Option<Group>,
}

/// What becomes of a launch.
type Launched = io::Result<Running>;

/// One process to start.
pub(super) struct Launch {
    /// The function's name: the last argument, and what its output is marked with.
    pub(super) function: &'static str,
    /// The whole environment; nothing is inherited.
    pub(super) environment: BTreeMap<String, String>,
    /// Is given the running process, or why there is none.
    pub(super) started: Box<dyn FnOnce(Launched) + Send>,
}

/// Starts processes on a thread of its own.
///
/// A function asks the kernel to end it with its parent, and the kernel takes the *thread* that
/// started it for the parent. So the thread must live as long as the pool does; tokio's do not
/// promise that.
#[derive(Debug)]
pub(super) struct Spawner {
    launches: mpsc::Sender<Launch>,
}

impl Spawner {
    /// Starts the thread. It ends when the spawner is dropped.
    pub(super) fn start(launcher: Launcher, printed: Printed, runtime: Handle) -> io::Result<Self> {
        let (launches, inbox) = mpsc::channel::<Launch>();
        thread::Builder::new().name("spawn".to_owned()).spawn(move || {
            let _runtime = runtime.enter();
            while let Ok(launch) = inbox.recv() {
                let Launch { function, environment, started } = launch;
                started(spawn(&launcher, function, environment, printed.clone()));
            }
        })?;
        Ok(Self { launches })
    }

    /// Hands a launch to the thread.
    pub(super) fn launch(&self, launch: Launch) {
        if let Err(mpsc::SendError(launch)) = self.launches.send(launch) {
            (launch.started)(Err(io::Error::other("no more processes are started")));
        }
    }
}

fn spawn(
    launcher: &Launcher,
    function: &'static str,
    environment: BTreeMap<String, String>,
    printed: Printed,
) -> Launched {
    let mut child = Command::new(&launcher.program)
        .args(&launcher.arguments)
        .arg(function)
        .env_clear()
        .envs(environment)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    forward_output(function, &mut child, Some(printed));
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the process ended at once"))?;
    if BACKGROUND.contains(&function) {
        rustix::process::setpriority_process(Some(pid), NICE)?;
    }
    // Where that fails the child is dropped here and killed by it: a process with more than its part is none.
    let group = launcher.share.as_ref().map(|share| share.give(pid)).transpose().map_err(io::Error::other)?;
    Ok(Running { child, pid, group })
}

/// Has what a child writes appear on standard error, each line marked with `name`, but for the lines of
/// its standard output that `taken` takes.
pub(crate) fn forward_output(name: &'static str, child: &mut Child, taken: Option<Printed>) {
    if let Some(output) = child.stdout.take() {
        tokio::spawn(forward_lines(name, output, taken));
    }
    if let Some(output) = child.stderr.take() {
        tokio::spawn(forward_lines(name, output, None));
    }
}

async fn forward_lines(name: &'static str, output: impl AsyncRead + Unpin, taken: Option<Printed>) {
    let mut reader = BufReader::with_capacity(READ_BYTES, output);
    let mut line = Vec::with_capacity(256);
    loop {
        line.clear();
        line.extend_from_slice(name.as_bytes());
        line.extend_from_slice(b": ");
        match (&mut reader).take(LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if taken.as_ref().is_some_and(|taken| taken(name, &line[name.len() + 2..])) {
                    continue;
                }
                if line.last() != Some(&b'\n') {
                    line.push(b'\n');
                }
                // One write for each line, so that lines of several processes do not mix.
                let _ = io::Write::write_all(&mut io::stderr().lock(), &line);
            }
        }
    }
}

/// Whether a process is suspended.
///
/// What is for it is written first and lets it go on then: woken before, it would look for it, find nothing and sleep again.
#[derive(Debug, Default)]
pub(super) struct Freezer {
    /// The process while it is suspended, else 0.
    frozen: AtomicI32,
}

impl Freezer {
    /// Suspends the process with everything it has started.
    pub(super) fn freeze(&self, pid: Pid) {
        self.frozen.store(pid.as_raw_nonzero().get(), Ordering::SeqCst);
        let _ = kill_process_group(pid, Signal::STOP);
    }

    /// Lets the process go on if it is suspended.
    pub(super) fn thaw(&self) {
        if let Some(pid) = Pid::from_raw(self.frozen.swap(0, Ordering::SeqCst)) {
            let _ = kill_process_group(pid, Signal::CONT);
        }
    }
}

/// Ends a process at once, suspended or not.
pub(super) fn kill(pid: Pid) {
    let _ = kill_process_group(pid, Signal::KILL);
}

/// The most memory a process has had resident so far, in bytes.
pub(super) fn peak_rss_bytes(pid: Pid) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(kilobytes.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Where a process finds the id of the process that started it.
pub const ENV_PARENT: &str = "LOCAL_PARENT";

/// Called first by a process that this program has started: has the kernel end it with its parent.
///
/// # Errors
///
/// When the kernel refuses, or when the parent is gone already.
pub fn end_with_parent() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    let expected = std::env::var(ENV_PARENT).ok().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    if expected.is_none() || rustix::process::getppid() == expected {
        Ok(())
    } else {
        Err(io::Error::other("the parent has ended"))
    }
}
