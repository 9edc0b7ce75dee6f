//! `agentd` as a daemon: in the background without systemd, and what it tells systemd.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tests::{
    Local, PATIENCE,
    client::{Connection, Request},
    process::Process,
    upstream::Upstream,
};
use tokio::{net::UnixDatagram, sync::Notify, time::timeout};

struct Daemon {
    dir: tempfile::TempDir,
}

impl Daemon {
    fn run(&self, command: &str) -> (Option<i32>, String) {
        let state = self.dir.path().join("state");
        let config = self.dir.path().join("agentd.toml");
        let mut arguments = vec![command, "--state-dir", state.to_str().unwrap()];
        if matches!(command, "start" | "restart") {
            arguments.extend(["--config", config.to_str().unwrap()]);
        }
        let mut process = Process::start("agentd", &arguments, &[]);
        (process.wait(), process.printed())
    }

    fn write_config(&self, local: &Local, upstream: &Upstream, more: &str) {
        let config = format!(
            "{more}\n[edge]\nurl = \"{}\"\ntoken_file = \"{}\"\n[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n",
            local.agents,
            local.token.display(),
            upstream.address()
        );
        std::fs::write(self.dir.path().join("agentd.toml"), config).unwrap();
    }

    fn log(&self) -> String {
        let logs = std::fs::read_dir(self.dir.path().join("state/log")).unwrap();
        logs.map(|log| std::fs::read_to_string(log.unwrap().path()).unwrap()).collect()
    }

    fn pid(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.dir.path().join("state/agentd.pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(pid) = self.pid()
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[tokio::test]
async fn a_daemon_is_started_once_survives_its_shell_and_is_stopped_after_its_work() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let daemon = Daemon { dir: tempfile::tempdir().unwrap() };
    daemon.write_config(&local, &upstream, "");
    let served = async || {
        tests::eventually("the tunnel is served", async || {
            Request::to("web", "GET", "/").send(local.public).await.status == 200
        })
        .await;
    };

    assert_eq!(daemon.run("status"), (Some(1), "not running".into()));
    assert_eq!(daemon.run("stop"), (Some(0), "not running".into()));
    let (code, printed) = daemon.run("start");
    assert!(code == Some(0) && printed.starts_with("started with pid "), "{printed}");
    let pid = daemon.pid().unwrap();
    assert!(printed.contains(&pid.as_raw_nonzero().to_string()), "{printed}");
    served().await;
    // Neither the shell's terminal nor the end of its session reaches it. Read from /proc: a session
    // begun outside of this PID namespace has the number 0, which no call for a PID can return.
    let stat = |process: &str| -> Vec<String> {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().split_whitespace().map(str::to_owned).collect()
    };
    let (own, its) = (stat("self"), stat(&pid.as_raw_nonzero().to_string()));
    let [parent, session, terminal] = [1, 3, 4].map(|field| its[field].as_str());
    assert!(parent != std::process::id().to_string() && session != own[3] && terminal == "0", "{its:?}");

    let (code, printed) = daemon.run("start");
    assert_eq!(code, Some(1));
    assert!(printed.contains(&format!("already running with pid {}", pid.as_raw_nonzero())), "{printed}");
    assert_eq!(daemon.run("status").0, Some(0));

    // A crash leaves the file behind; it does not stand in the way.
    kill_process(pid, Signal::KILL).unwrap();
    tests::eventually("the crash is seen", async || daemon.run("status").0 == Some(1)).await;
    let (code, printed) = daemon.run("start");
    assert_eq!(code, Some(0), "{printed}");
    served().await;

    let (code, printed) = daemon.run("stop");
    assert!(code == Some(0) && printed.starts_with("stopped after "), "{printed}");
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 503);
    let logged = daemon.log();
    assert!(logged.contains("tunnel is open") && logged.contains("agent stopped"), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_what_is_in_flight_and_a_restart_keeps_what_runs_when_it_cannot_succeed() {
    let finish = Arc::new(Notify::new());
    let may_finish = Arc::clone(&finish);
    let upstream = Upstream::start(move |request, mut conn| {
        let may_finish = Arc::clone(&may_finish);
        async move {
            if request.target() == "/slow" {
                may_finish.notified().await;
            }
            conn.answer("200 OK", "", b"done").await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let daemon = Arc::new(Daemon { dir: tempfile::tempdir().unwrap() });
    daemon.write_config(&local, &upstream, "");
    assert_eq!(daemon.run("restart").0, Some(0), "also where none runs");
    let first = daemon.pid().unwrap();
    let served = async || {
        tests::eventually("the tunnel is served", async || {
            Request::to("web", "GET", "/").send(local.public).await.status == 200
        })
        .await;
    };
    served().await;

    daemon.write_config(&local, &upstream, "nonsense = 1");
    let (code, printed) = daemon.run("restart");
    assert!(code == Some(78) && printed.contains("nonsense"), "{printed}");
    assert!(daemon.run("status").0 == Some(0) && daemon.pid() == Some(first));

    daemon.write_config(&local, &upstream, "grace_period = \"50s\"");
    let mut slow = Connection::open(local.public).await;
    slow.begin(&Request::to("web", "GET", "/slow")).await;
    tests::eventually("the slow request is at the upstream", async || {
        upstream.recorded().iter().any(|request| request.target() == "/slow")
    })
    .await;
    let restarting = tokio::task::spawn_blocking({
        let daemon = Arc::clone(&daemon);
        move || daemon.run("restart")
    });
    tests::eventually("it is stopping", async || daemon.log().contains("stopping")).await;
    assert!(!restarting.is_finished());
    finish.notify_one();
    let answer = slow.answer("GET").await;
    assert_eq!((answer.status, answer.text().as_str(), answer.complete), (200, "done", true));
    let (code, printed) = restarting.await.unwrap();
    assert!(
        code == Some(0) && printed.contains("stopped after") && printed.contains("started with"),
        "{printed}"
    );
    assert_ne!(daemon.pid(), Some(first));
    served().await;
    assert_eq!(daemon.run("stop").0, Some(0));
}

#[test]
fn a_daemon_with_a_bad_configuration_is_not_started() {
    let daemon = Daemon { dir: tempfile::tempdir().unwrap() };
    std::fs::write(daemon.dir.path().join("agentd.toml"), "[edge]\nurll = \"x\"\n").unwrap();
    let (code, printed) = daemon.run("start");
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("url") && printed.contains("agentd.toml:2"), "{printed}");
    assert_eq!(daemon.run("status").0, Some(1));
}

#[tokio::test]
async fn a_daemon_that_cannot_begin_is_not_called_started_and_a_restart_with_it_ends_nothing() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let daemon = Daemon { dir: tempfile::tempdir().unwrap() };
    let socket = daemon.dir.path().join("control.sock");
    let named = format!("control_socket = \"{}\"", socket.display());
    daemon.write_config(&local, &upstream, "");
    assert_eq!(daemon.run("start").0, Some(0));
    let first = daemon.pid().unwrap();

    // What a start would fail for is found before anything is stopped.
    let path = daemon.dir.path().join("agentd.toml");
    let good = std::fs::read_to_string(&path).unwrap();
    let secure = good.replace("upstream = \"", "ca_file = \"missing.pem\"\nupstream = \"https://");
    std::fs::write(&path, secure).unwrap();
    let (code, printed) = daemon.run("restart");
    assert!(code == Some(78) && printed.contains("cannot read certificates from"), "{printed}");
    assert!(daemon.run("status").0 == Some(0) && daemon.pid() == Some(first));
    assert_eq!(daemon.run("stop").0, Some(0));

    // What can be found by starting only is said by whoever started it, and in the log.
    daemon.write_config(&local, &upstream, &named);
    let lock = std::fs::File::create(socket.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    for command in ["start", "restart"] {
        let (code, printed) = daemon.run(command);
        assert!(code == Some(1) && printed.contains("another agent answers at"), "{printed}");
        assert!(!printed.contains("started with"), "{printed}");
        let gone = (Some(0), "not running".to_owned());
        tests::eventually("it is gone", async || daemon.run("stop") == gone).await;
    }
    assert_eq!(daemon.log().matches("another agent answers at").count(), 2, "{}", daemon.log());
    lock.unlock().unwrap();
    let (code, printed) = daemon.run("start");
    assert!(code == Some(0) && printed.starts_with("started with pid "), "{printed}");
    assert_eq!(daemon.run("stop").0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_hears_that_it_is_ready_alive_and_stopping() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let heard = async |wanted: &[&str]| {
        loop {
            let mut bytes = [0; 4096];
            let count = timeout(PATIENCE, socket.recv(&mut bytes)).await.expect("it says so").unwrap();
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            if wanted.iter().all(|wanted| text.lines().any(|line| line == *wanted)) {
                return;
            }
        }
    };
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "200000")];
    let tunnel = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let mut agent = local.agent_in(&environment, &tunnel, &["web"]);
    heard(&["READY=1"]).await;
    heard(&["STATUS=connected, 1 of 1 tunnels open"]).await;
    let begun = Instant::now();
    for _ in 0..5 {
        heard(&["WATCHDOG=1"]).await;
    }
    // Each half of the time that was asked for; the first one may be early.
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    agent.process().signal(Signal::TERM);
    heard(&["STOPPING=1", "EXTEND_TIMEOUT_USEC=35000000"]).await;
    assert_eq!(agent.process_mut().wait(), Some(0));
}
