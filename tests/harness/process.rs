//! A binary of this workspace as a child process whose lines can be waited for.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};

use crate::PATIENCE;

/// Everything a process has printed, and whether it may print more.
#[derive(Debug, Default)]
struct Output {
    lines: Mutex<(Vec<String>, usize)>,
    news: Condvar,
}

impl Output {
    /// Also after a test failed while it waited for a line: what was printed is shown then.
    fn lock(&self) -> MutexGuard<'_, (Vec<String>, usize)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running process. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    output: Arc<Output>,
}

impl Process {
    /// Starts `name`, a binary of this workspace, with its output read line by line.
    #[must_use]
    pub fn start(name: &'static str, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_as(name, Command::new(binary(name)), arguments, environment)
    }

    /// Starts `command`, which has the program's name for its last word so far: another build of `name`, or under
    /// a program that watches it.
    #[must_use]
    pub fn start_as(
        name: &'static str,
        mut command: Command,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        // What the tests were started with is about another edge, if about any.
        for (variable, _) in std::env::vars_os() {
            let about = |prefix: &str| variable.as_encoded_bytes().starts_with(prefix.as_bytes());
            if about("AGENTD_") || about("TUNNEL_") || about("AWS_") {
                command.env_remove(variable);
            }
        }
        let mut child = command
            .args(arguments)
            .envs(environment.iter().copied())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = Arc::new(Output::default());
        output.lock().1 = 2;
        let stdout: Box<dyn Read + Send> = Box::new(child.stdout.take().unwrap());
        let stderr: Box<dyn Read + Send> = Box::new(child.stderr.take().unwrap());
        for pipe in [stdout, stderr] {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                    output.lock().0.push(String::from_utf8_lossy(&line).into_owned());
                    output.news.notify_all();
                }
                output.lock().1 -= 1;
                output.news.notify_all();
            });
        }
        Self { name, child, output }
    }

    /// Waits until it has printed a line like that, and returns the first one.
    pub fn wait_for_line(&self, like: impl Fn(&str) -> bool) -> String {
        self.wait_for_lines(1, like).pop().unwrap()
    }

    /// Waits until it has printed `count` lines like that; patience begins anew with each of them.
    pub fn wait_for_lines(&self, count: usize, like: impl Fn(&str) -> bool) -> Vec<String> {
        let mut last = Instant::now();
        let (mut found, mut read) = (Vec::new(), 0);
        let mut output = self.output.lock();
        loop {
            let wanted = count - found.len();
            let before = found.len();
            found.extend(output.0[read..].iter().filter(|line| like(line)).take(wanted).cloned());
            read = output.0.len();
            if found.len() == count {
                return found;
            }
            if found.len() > before {
                last = Instant::now();
            }
            let left = PATIENCE.saturating_sub(last.elapsed());
            assert!(
                output.1 > 0 && !left.is_zero(),
                "{} printed {} of {count} such lines; all it printed:\n{}",
                self.name,
                found.len(),
                output.0.join("\n")
            );
            output = self.output.news.wait_timeout(output, left).unwrap().0;
        }
    }

    /// Everything it has printed so far.
    #[must_use]
    pub fn printed(&self) -> String {
        self.output.lock().0.join("\n")
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end and returns the exit code, `None` after a signal.
    pub fn wait(&mut self) -> Option<i32> {
        let begun = Instant::now();
        if self.child.try_wait().unwrap().is_none() {
            // Readable once the process has ended.
            let end = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
            let patience = PATIENCE.try_into().unwrap();
            let ended = retry_on_intr(|| poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&patience)));
            assert!(ended.unwrap() == 1, "{} did not end; it printed:\n{}", self.name, self.printed());
        }
        // The pipes end with the last process that holds them.
        let mut output = self.output.lock();
        while output.1 > 0 && begun.elapsed() < PATIENCE {
            output = self.output.news.wait_timeout(output, PATIENCE).unwrap().0;
        }
        drop(output);
        self.child.wait().unwrap().code()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
        if std::thread::panicking() {
            let printed = self.printed();
            let from = printed.char_indices().rev().nth(6000).map_or(0, |(at, _)| at);
            eprintln!("--- {} printed at last:\n{}", self.name, &printed[from..]);
        }
    }
}

/// The path of a binary of this workspace, built in the profile of the tests.
///
/// The tests' own build does not make the binaries of other packages, so the first caller does.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        // target/PROFILE/deps/this-test, or target/PROFILE/this-program
        let mut folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        if folder.file_name().unwrap() == "deps" {
            folder.pop();
        }
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.current_dir(env!("CARGO_MANIFEST_DIR"));
        build.args(["build", "--quiet", "--locked"]).arg("--target-dir").arg(folder.parent().unwrap());
        match folder.file_name().unwrap().to_str().unwrap() {
            // Cargo unites the features of what it builds together. The whole workspace and a test
            // make the same union as `cargo test --workspace`, so that nothing is built a second time.
            "debug" => {
                build.args(["--workspace", "--bin", "local", "--bin", "agentd", "--test", "round_trip"])
            }
            profile => build.args(["--profile", profile, "--package", "local", "--package", "agentd"]),
        };
        assert!(build.status().unwrap().success(), "local and agentd do not build");
        folder
    });
    folder.join(name)
}
