//! `agentd` in the background, without systemd.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use rustix::process::{Pid, Signal, kill_process};
use tests::{Local, client::Request, process::Process, upstream::Upstream};

struct Daemon {
    dir: tempfile::TempDir,
}

impl Daemon {
    fn run(&self, command: &str) -> (Option<i32>, String) {
        let state = self.dir.path().join("state");
        let config = self.dir.path().join("agentd.toml");
        let mut arguments = vec![command, "--state-dir", state.to_str().unwrap()];
        if command == "start" {
            arguments.extend(["--config", config.to_str().unwrap()]);
        }
        let mut process = Process::start("agentd", &arguments, &[]);
        (process.wait(), process.printed())
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
    let config = format!(
        "[edge]\nurl = \"{}\"\ntoken_file = \"{}\"\n[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n",
        local.agents,
        local.token.display(),
        upstream.address()
    );
    std::fs::write(daemon.dir.path().join("agentd.toml"), config).unwrap();
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
    let logs = std::fs::read_dir(daemon.dir.path().join("state/log")).unwrap();
    let logged: String = logs.map(|log| std::fs::read_to_string(log.unwrap().path()).unwrap()).collect();
    assert!(logged.contains("tunnel is open") && logged.contains("agent stopped"), "{logged}");
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
