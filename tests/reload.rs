//! A running agent that is given another configuration, another token or another connection while
//! requests are in flight: none of them may notice.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::process::Signal;
use tests::{
    Agent, Local,
    client::{Connection, Request},
    upstream::{Conn, Upstream},
};
use tokio::task::JoinHandle;

/// Clients that ask one tunnel again and again, each on its own connection.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn on(public: SocketAddr, tunnel: &str, clients: usize) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |number: usize| {
            let (stop, served, tunnel) = (Arc::clone(&stop), Arc::clone(&served), tunnel.to_owned());
            tokio::spawn(async move {
                let mut failures = Vec::new();
                let mut connection = Connection::open(public).await;
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let body = format!("{tunnel} {number} {round}").into_bytes();
                    let request = Request::to(&tunnel, "POST", "/").body(body.clone());
                    let answer = connection.exchange(&request).await;
                    if answer.status == 200 && answer.body == body && answer.complete {
                        served.fetch_add(1, Ordering::Relaxed);
                    } else {
                        failures.push(format!("{} {}", answer.status, answer.text()));
                        connection = Connection::open(public).await;
                    }
                }
                failures
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, served, clients }
    }

    /// Waits until so many more requests were served.
    async fn serves(&self, more: usize) {
        let wanted = self.served.load(Ordering::Relaxed) + more;
        tests::eventually("the load goes on", async || self.served.load(Ordering::Relaxed) >= wanted).await;
    }

    /// Ends it: how many requests were served, and every failure.
    async fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for client in self.clients {
            failures.extend(client.await.unwrap());
        }
        (self.served.load(Ordering::Relaxed), failures)
    }
}

fn tunnel(name: &str, upstream: &Upstream) -> String {
    format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n", upstream.address())
}

/// A token of its own for each agent, so that it can be replaced.
fn with_own_token(local: &Local, agent: &Agent, tunnels: &str) -> String {
    let token = agent.dir().join("token");
    local.config(tunnels).replace(local.token.to_str().unwrap(), token.to_str().unwrap())
}

fn issue(local: &Local, agent: &Agent) {
    let key = local.key.to_str().unwrap();
    let arguments =
        ["token", "issue", "--key", key, "--owner", "developer", "--tunnel", "*", "--expires", "1h"];
    let mut process = tests::process::Process::start("agentd", &arguments, &[]);
    assert_eq!(process.wait(), Some(0), "{}", process.printed());
    let token = process.printed().lines().find(|line| line.matches('.').count() == 2).unwrap().to_owned();
    let new = agent.dir().join("token.new");
    std::fs::write(&new, token).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(new, agent.dir().join("token")).unwrap();
}

async fn status_of(local: &Local, tunnel: &str) -> u16 {
    Request::to(tunnel, "GET", "/").send(local.public).await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_reloads_under_load_fail_no_request() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    let web = tunnel("web", &upstream);
    issue(&local, &agent);
    let load = Load::on(local.public, "web", 4);
    for round in 0..100 {
        let mut tunnels = web.clone();
        match round % 4 {
            // Another one comes, is changed, and goes; then the one under load is changed itself.
            0 => tunnels += &tunnel("other", &upstream),
            1 => tunnels += &format!("{}max_concurrent = 5\n", tunnel("other", &upstream)),
            2 => {}
            _ => tunnels += &format!("request_timeout = \"{}s\"\n", 30 + round),
        }
        if round % 10 == 5 {
            issue(&local, &agent);
        }
        agent.write_config(&with_own_token(&local, &agent, &tunnels));
        let (code, printed) = agent.ask(&["reload", "--json"]);
        assert_eq!(code, Some(0), "{printed}");
        assert!(printed.contains("\"confirmed\":true"), "round {round}: {printed}");
        load.serves(3).await;
    }
    let (served, failures) = load.end().await;
    assert_eq!(failures, Vec::<String>::new(), "of {served}");
    println!("100 reloads, {served} requests, 0 failed");
    let (_, status) = agent.ask(&["status", "--json"]);
    assert!(status.contains("\"reloads\":100"), "{status}");
}

#[tokio::test]
async fn tunnels_come_change_and_go_without_touching_what_is_in_flight() {
    let release = Arc::new(tokio::sync::Notify::new());
    let released = Arc::clone(&release);
    let slow = Upstream::start(move |_, mut conn: Conn| {
        let released = Arc::clone(&released);
        async move {
            conn.write("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf").await;
            released.notified().await;
            conn.write("half").await.then_some(conn)
        }
    })
    .await;
    let (one, two) = (Upstream::echo().await, Upstream::echo().await);
    let local = Local::start(&[]);
    let agent = local.agent_with(&(tunnel("slow", &slow) + &tunnel("web", &one)), &["slow", "web"]);
    let mut halves = Vec::new();
    for _ in 0..3 {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("slow", "GET", "/")).await;
        halves.push(connection);
    }
    tests::eventually("all are at the upstream", async || slow.recorded().len() == 3).await;

    // `web` leads elsewhere, `new` comes.
    agent.write_tunnels(&local, &(tunnel("slow", &slow) + &tunnel("web", &two) + &tunnel("new", &one)));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!((code, printed.as_str()), (Some(0), "reloaded: added new; changed web; 1 unchanged"));
    assert_eq!((status_of(&local, "web").await, status_of(&local, "new").await), (200, 200));
    assert_eq!((one.recorded().len(), two.recorded().len()), (1, 1));

    // `slow` goes while three of its requests are in flight: they stay.
    agent.write_tunnels(&local, &tunnel("web", &two));
    let (code, printed) = agent.ask(&["reload", "--json"]);
    assert!(code == Some(0) && printed.contains("\"confirmed\":true"), "{printed}");
    assert_eq!(status_of(&local, "slow").await, 503);
    assert_eq!(status_of(&local, "web").await, 200);
    release.notify_waiters();
    for connection in &mut halves {
        let answer = connection.answer("GET").await;
        assert_eq!((answer.status, answer.text().as_str(), answer.complete), (200, "halfhalf", true));
    }
    let (_, list) = agent.ask(&["tunnel", "list"]);
    assert!(list.contains("web") && !list.contains("slow"), "{list}");
}

#[tokio::test]
async fn a_bad_file_keeps_the_old_configuration_and_says_why() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    agent.write_config(&local.config(&tunnel("web", &upstream).replace("upstream", "upstraem")));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!(code, Some(78), "{printed}");
    assert!(
        printed.contains("nothing was changed") && printed.contains("did you mean \"upstream\"?"),
        "{printed}"
    );
    agent.process().signal(Signal::HUP);
    agent.process().wait_for_lines(2, |line| {
        line.contains("the reload failed and changed nothing") && line.contains("agentd.toml")
    });
    assert_eq!(status_of(&local, "web").await, 200);
    let (_, status) = agent.ask(&["status"]);
    assert!(status.contains("the last reload changed nothing"), "{status}");

    // A token that others may read is refused in the same way, and the old one stays.
    issue(&local, &agent);
    let token = agent.dir().join("token");
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    agent.write_config(&with_own_token(&local, &agent, &tunnel("web", &upstream)));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("chmod 600"), "{printed}");

    // A token that the edge refuses does not take the connection that is open out of service.
    std::fs::write(&token, "not.a.token").unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let (code, printed) = agent.ask(&["reload", "--json"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("\"reconnects\":true") && printed.contains("\"confirmed\":false"), "{printed}");
    agent.process().wait_for_line(|line| line.contains("stays in use"));
    assert_eq!(status_of(&local, "web").await, 200);
    issue(&local, &agent);
    let (code, printed) = agent.ask(&["reload", "--json"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("\"confirmed\":true"), "{printed}");
    assert_eq!(status_of(&local, "web").await, 200);
}
