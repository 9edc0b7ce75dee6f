//! A running agent that is given another configuration, another token or another connection while
//! requests are in flight: none of them may notice.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use agentd::identity::{Algorithm, KEY_FILE, Keys};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{EncodingKey, Header, encode};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat, open},
    process::Signal,
};
use tests::{
    Agent, Local,
    client::{Connection, Request},
    process::Process,
    sockets::Port,
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

/// Puts another token of the same owner into the agent's place.
fn issue(local: &Local, agent: &Agent) {
    let new = agent.dir().join("token.new");
    std::fs::write(&new, local.issue("developer", &["*"])).unwrap();
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

fn pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// The writing end of a pipe, once somebody waits at the other one.
async fn writing_end(pipe: &Path) -> std::fs::File {
    let mut end = None;
    tests::eventually("the pipe is read", async || {
        end = open(pipe, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok();
        end.is_some()
    })
    .await;
    end.unwrap().into()
}

#[tokio::test]
async fn a_file_that_does_not_come_holds_up_nothing_but_its_reload() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let mut agent = local.agent("web", &upstream.address());
    let web = tunnel("web", &upstream);

    // What is included must be a file: nobody waits for a pipe.
    pipe(&agent.dir().join("more.toml"));
    agent.write_config(&format!("include = [\"more.toml\"]\n{}", local.config(&web)));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!(code, Some(78), "{printed}");
    assert!(
        printed.contains("nothing was changed: ") && printed.contains("more.toml: it is a pipe"),
        "{printed}"
    );
    let config = agent.dir().join("agentd.toml");
    let mut check = Process::start("agentd", &["config", "check", "--config", config.to_str().unwrap()], &[]);
    assert_eq!(check.wait(), Some(78));
    assert!(check.printed().contains("more.toml: it is a pipe"), "{}", check.printed());
    assert_eq!(status_of(&local, "web").await, 200);

    // A token may come through a pipe. Until it does all else goes on, and one more reload waits for its turn.
    let socket = agent.dir().join("control.sock");
    let reload = || Process::start("agentd", &["reload", "--control-socket", socket.to_str().unwrap()], &[]);
    pipe(&agent.dir().join("token"));
    agent.write_config(&with_own_token(&local, &agent, &(web.clone() + &tunnel("new", &upstream))));
    let mut first = reload();
    let mut end = writing_end(&agent.dir().join("token")).await;
    assert_eq!(status_of(&local, "web").await, 200);
    let (code, status) = agent.ask(&["status"]);
    assert!(code == Some(0) && !status.contains("new"), "{status}");
    let mut second = reload();
    end.write_all(local.issue("developer", &["*"]).as_bytes()).unwrap();
    drop(end);
    assert_eq!(first.wait(), Some(0), "{}", first.printed());
    assert!(first.printed().starts_with("reloaded: added new; 1 unchanged"), "{}", first.printed());
    assert_eq!(second.wait(), Some(0), "{}", second.printed());
    assert_eq!((status_of(&local, "web").await, status_of(&local, "new").await), (200, 200));

    // Nor does an agent that is told to stop wait for it.
    pipe(&agent.dir().join("later"));
    agent.write_config(&with_own_token(&local, &agent, &web).replace("/token\"", "/later\""));
    let mut reload = reload();
    let _end = writing_end(&agent.dir().join("later")).await;
    agent.process().signal(Signal::TERM);
    assert_eq!(agent.process_mut().wait(), Some(0));
    assert_eq!(reload.wait(), Some(78), "{}", reload.printed());
    assert!(reload.printed().contains("the agent is stopping"), "{}", reload.printed());
}

/// The two hours of a connection pass in half a minute; the agents are many so that a hundred
/// rotations fit into a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_planned_rotations_under_load_fail_no_request() {
    const AGENTS: usize = 50;
    let upstream = Upstream::echo().await;
    let local = Local::start(&["--chaos", "clock=240"]);
    let names: Vec<String> = (0..AGENTS).map(|number| format!("web-{number}")).collect();
    let agents: Vec<Agent> = names.iter().map(|name| local.agent(name, &upstream.address())).collect();
    let stop = Arc::new(AtomicBool::new(false));
    // Every tunnel in turn, on two connections: a few requests to each of them a second, all the time.
    let client = |half: usize| {
        let (stop, names, public) = (Arc::clone(&stop), names.clone(), local.public);
        tokio::spawn(async move {
            let (mut served, mut failures) = (0, Vec::new());
            let mut connection = Connection::open(public).await;
            for name in names.iter().cycle().skip(half * AGENTS / 2) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let answer = connection.exchange(&Request::to(name, "POST", "/").body(b"x".to_vec())).await;
                if answer.status == 200 && answer.text() == "x" {
                    served += 1;
                } else {
                    failures.push(format!("{name}: {} {}", answer.status, answer.text()));
                    connection = Connection::open(public).await;
                }
            }
            (served, failures)
        })
    };
    let clients = [client(0), client(1)];
    // Two for each agent, on its own clock.
    for rotations in 1..=2 {
        for agent in &agents {
            agent.process().wait_for_lines(rotations, |line| line.contains("a connection was retired"));
        }
    }
    stop.store(true, Ordering::Relaxed);
    let (mut served, mut failures) = (0, Vec::new());
    for client in clients {
        let (own, failed) = client.await.unwrap();
        served += own;
        failures.extend(failed);
    }
    assert_eq!(failures, Vec::<String>::new(), "of {served}");
    assert!(served > 10 * AGENTS, "a load: {served}");
    for agent in &agents {
        let printed = agent.process().printed();
        assert!(!printed.contains("connection lost"), "{printed}");
    }
    println!("{} rotations, {served} requests, 0 failed", 2 * AGENTS);
}

#[tokio::test]
async fn an_edge_that_cannot_be_reached_is_not_called_connected() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    let good = local.config(&tunnel("web", &upstream));
    let nobody = Port::take();
    let nowhere = format!("ws://{nobody}");
    agent.write_config(&good.replace(&local.agents, &nowhere));
    let (code, printed) = agent.ask(&["reload"]);
    assert_eq!(code, Some(0), "{printed}");
    let status = async || agent.ask(&["status"]).1;
    tests::eventually("the failure is shown", async || status().await.contains("failed ")).await;
    let shown = status().await;
    let before = local.agents.trim_end_matches('/');
    for wanted in [&*nowhere, &format!(" to {before}"), ", being replaced", "Connection refused"] {
        assert!(shown.contains(wanted), "{wanted} is not in {shown}");
    }
    let (code, printed) = agent.ask(&["ready"]);
    assert!(code == Some(1) && printed.contains("still connected to"), "{printed}");
    assert_eq!(status_of(&local, "web").await, 200, "what is open stays in use");

    agent.write_config(&good);
    assert_eq!(agent.ask(&["reload"]).0, Some(0));
    let (code, printed) = agent.ask(&["ready", "--wait", "20s"]);
    assert_eq!(code, Some(0), "{printed}");
    let shown = status().await;
    assert!(!shown.contains("being replaced") && !shown.contains("failed "), "{shown}");
}

#[tokio::test]
async fn a_tunnel_that_is_refused_has_no_public_address() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    issue(&local, &agent);
    let tunnels = tunnel("web", &upstream) + &tunnel("other", &upstream);
    agent.write_config(&with_own_token(&local, &agent, &tunnels));
    assert_eq!(agent.ask(&["reload"]).0, Some(0));
    assert_eq!(agent.ask(&["ready", "--wait", "20s"]).0, Some(0));
    let address = |name: &str| {
        let info = agent.ask(&["tunnel", "info", name, "--json"]).1;
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        (info["state"].as_str().unwrap().to_owned(), info["url"].as_str().map(str::to_owned))
    };
    assert!(matches!(address("other"), (state, Some(_)) if state == "open"));

    let token = agent.dir().join("token");
    std::fs::write(&token, local.issue("developer", &["web"])).unwrap();
    assert_eq!(agent.ask(&["reload"]).0, Some(0));
    tests::eventually("it is refused", async || address("other").0 == "refused").await;
    assert_eq!(address("other").1, None);
    assert!(address("web").1.is_some());
}

#[tokio::test]
async fn what_is_known_of_upstreams_visitors_and_providers_outlives_a_reload_of_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let secret = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        file.display().to_string()
    };
    let hash = bcrypt::hash("secret", 4).unwrap();
    let users = secret("users", &format!("ann:{hash}\n"));
    let keys = Keys::generate(Algorithm::Es256).unwrap();
    keys.write(dir.path()).unwrap();
    let key = EncodingKey::from_ec_pem(&std::fs::read(dir.path().join(KEY_FILE)).unwrap()).unwrap();
    let header = Header { kid: Some(keys.id().to_owned()), ..Header::new(jsonwebtoken::Algorithm::ES256) };
    let claims = serde_json::json!({ "aud": "me", "sub": "ann", "exp": 4_000_000_000_u64 });
    let token = format!("Bearer {}", encode(&header, &claims, &key).unwrap());

    // The issuer gives its keys once, and is down from then on.
    let jwks = keys.jwks();
    let given = Arc::new(AtomicBool::new(false));
    let issuer = Upstream::start(move |_, mut conn: Conn| {
        let (jwks, was_given) = (jwks.clone(), given.swap(true, Ordering::Relaxed));
        async move {
            let (status, body) = if was_given { ("503 No", "") } else { ("200 OK", &*jwks) };
            conn.answer(status, "", body.as_bytes()).await.then_some(conn)
        }
    })
    .await;
    let (web, sick) = (Upstream::echo().await, Port::take());
    let local = Local::start(&[]);
    let port = Port::take();
    let tunnels = |more: &str| {
        format!(
            "status_address = \"{port}\"\n\
             [[tunnel]]\nname = \"sick\"\nupstream = \"{sick}\"\n{more}\
             health_check = {{ path = \"/\", interval = \"1s\", max_failed = 1 }}\n\
             [[tunnel]]\nname = \"list\"\nupstream = \"{web}\"\n{more}basic_auth = \"{users}\"\n\
             [[tunnel]]\nname = \"token\"\nupstream = \"{web}\"\n{more}\
             [tunnel.bearer]\njwks_url = \"http://{issuer}/keys\"\naudience = \"me\"\n",
            web = web.address(),
            issuer = issuer.address(),
        )
    };
    let agent = local.agent_with(&tunnels(""), &["sick", "list", "token"]);
    let code = async |name: &str, authorization: Option<&str>| {
        let mut request = Request::to(name, "GET", "/");
        if let Some(authorization) = authorization {
            request = request.field("authorization", authorization);
        }
        let answer = request.send(local.public).await;
        (answer.status, answer.field("x-tunnel-error").unwrap_or_default())
    };
    let unhealthy = (502, "upstream_unhealthy".to_owned());
    tests::eventually("it is down", async || code("sick", None).await == unhealthy).await;
    assert_eq!(code("token", Some(&token)).await.0, 200);
    let as_ann = |password: &str| format!("Basic {}", STANDARD.encode(format!("ann:{password}")));
    for guess in 0..10 {
        assert_eq!(code("list", Some(&as_ann(&guess.to_string()))).await.0, 401);
    }

    agent.write_tunnels(&local, &tunnels("request_timeout = \"45s\"\n"));
    let (exit, printed) = agent.ask(&["reload"]);
    assert_eq!((exit, printed.as_str()), (Some(0), "reloaded: changed list, sick, token; 0 unchanged"));
    let metrics = Request::new("GET", "/metrics").field("Host", &port.to_string()).send(port.address()).await;
    let metrics = metrics.text();
    assert!(metrics.contains("agentd_upstream_healthy{tunnel=\"sick\"} 0\n"), "{metrics}");
    assert_eq!(code("sick", None).await, unhealthy);
    assert_eq!(code("list", Some(&as_ann("secret"))).await, (429, "too_many_guesses".to_owned()));
    assert_eq!(code("token", Some(&token)).await.0, 200);
    assert_eq!(issuer.recorded().len(), 1);
}
