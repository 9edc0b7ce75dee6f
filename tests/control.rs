//! A running agent that is asked how it is and told what to do, and what it writes about its work.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tests::{
    Agent, Local,
    client::{Answer, Connection, Request},
    process::Process,
    sockets::Port,
    upstream::Upstream,
};

fn tunnel(name: &str, upstream: &str) -> String {
    format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{upstream}\"\n")
}

fn json(agent: &Agent, command: &[&str]) -> Value {
    let (code, printed) = agent.ask(&[command, &["--json"]].concat());
    assert_eq!(code, Some(0), "{printed}");
    serde_json::from_str(&printed).unwrap()
}

async fn get(address: SocketAddr, host: &str, path: &str) -> Answer {
    Request::new("GET", path).field("Host", host).send(address).await
}

#[tokio::test]
async fn an_agent_says_how_it_is_and_stops_when_it_is_told() {
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&[]);
    let token = local.issue("developer", &["web"]);
    let both = tunnel("web", &upstream.address()) + &tunnel("other", &upstream.address());
    let mut agent = local.agent_in(&[("AGENTD_TOKEN", &token)], &both, &["web"]);
    let socket = agent.dir().join("control.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    for target in ["/a", "/b", "/c"] {
        assert_eq!(Request::to("web", "GET", target).send(local.public).await.status, 200);
    }
    let mut hanging = Connection::open(local.public).await;
    hanging.begin(&Request::to("web", "GET", "/hang")).await;
    tests::eventually("it is at the upstream", async || upstream.recorded().len() == 4).await;

    let status = json(&agent, &["status"]);
    assert_eq!(status["pid"], agent.process().id());
    assert_eq!(status["edge"]["state"], "connected");
    assert_eq!(status["edge"]["connections"][0]["tunnels_open"], 1);
    let [web, refused] = &status["tunnels"].as_array().unwrap()[..] else { panic!("{status}") };
    assert_eq!((&web["state"], &web["in_flight"], &web["requests"]), (&"open".into(), &1.into(), &3.into()));
    assert!(web["url"].as_str().unwrap().contains("web.localhost"), "{web}");
    assert_eq!(refused["state"], "refused");
    assert!(refused["reason"].as_str().unwrap().contains("does not cover"), "{refused}");
    assert_eq!(json(&agent, &["tunnel", "list"]), status["tunnels"]);
    assert_eq!(json(&agent, &["tunnel", "info", "web"])["name"], "web");
    let (code, printed) = agent.ask(&["tunnel", "info", "nobody"]);
    assert!(code == Some(1) && printed.contains("it has web, other"), "{printed}");

    // One tunnel is not open, so the agent is not ready; without it, it is.
    let (code, printed) = agent.ask(&["ready"]);
    assert!(code == Some(1) && printed.contains("not open: other"), "{printed}");
    agent.write_tunnels(&local, &tunnel("web", &upstream.address()));
    assert_eq!(json(&agent, &["reload"])["removed"][0], "other");
    let (code, printed) = agent.ask(&["ready"]);
    assert_eq!((code, printed.as_str()), (Some(0), "ready: 1 tunnels are open"));

    // A stop waits for what is in flight.
    let dir = agent.dir().to_owned();
    let stopping = Process::start(
        "agentd",
        &["stop", "--control-socket", socket.to_str().unwrap(), "--state-dir", dir.to_str().unwrap()],
        &[],
    );
    stopping.wait_for_line(|line| line.contains("1 requests in flight"));
    let (_, printed) = agent.ask(&["ready"]);
    assert!(printed.contains("the agent is stopping"), "{printed}");
    drop(hanging);
    assert_eq!(agent.process_mut().wait(), Some(0));
    stopping.wait_for_line(|line| line.starts_with("stopped after "));
    assert!(!socket.exists());
    assert_eq!(agent.ask(&["status"]), (Some(1), "not running".into()));
    let (code, printed) = agent.ask(&["status", "--json"]);
    assert!(code == Some(1) && printed.contains("\"running\":false"), "{printed}");
}

#[tokio::test]
async fn an_agent_without_an_edge_is_healthy_and_not_ready() {
    let local = Local::start(&[]);
    let port = Port::take();
    let text = format!("status_address = \"{port}\"\n{}", tunnel("web", "127.0.0.1:1"));
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agentd.toml");
    let closed = Port::take();
    let nowhere = format!("ws://{closed}");
    std::fs::write(&config, local.config(&text).replace(&local.agents, &nowhere)).unwrap();
    let socket = dir.path().join("control.sock");
    let agent = Process::start(
        "agentd",
        &["run", "--config", config.to_str().unwrap()],
        &[("AGENTD_CONTROL_SOCKET", socket.to_str().unwrap())],
    );
    agent.wait_for_line(|line| line.contains("cannot connect"));
    let address = port.address();
    assert_eq!(get(address, "localhost", "/healthz").await.status, 200);
    let ready = get(address, "localhost", "/ready").await;
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("not connected to the edge"), "{}", ready.text());
    let metrics = get(address, "localhost", "/metrics").await.text();
    assert!(metrics.contains("agentd_dial_failures_total{reason=\"unreachable\"}"), "{metrics}");

    // A second agent may have neither the socket nor the address. Who starts it by hand is told so; under systemd,
    // which would start it for ever, it is without both until the first is gone.
    let run = ["run", "--config", config.to_str().unwrap()];
    let mut second = Process::start("agentd", &run, &[("AGENTD_CONTROL_SOCKET", socket.to_str().unwrap())]);
    assert_eq!(second.wait(), Some(1));
    assert!(second.printed().contains("another agent answers at"), "{}", second.printed());
    let systemd = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify")).unwrap();
    let second = Process::start(
        "agentd",
        &run,
        &[
            ("AGENTD_CONTROL_SOCKET", socket.to_str().unwrap()),
            ("NOTIFY_SOCKET", dir.path().join("notify").to_str().unwrap()),
        ],
    );
    second.wait_for_line(|line| line.contains("another agent answers at"));
    second.wait_for_line(|line| line.contains(&format!("status_address {address}: ")));
    drop(agent);
    second.wait_for_line(|line| line.contains("control.sock is free and taken"));
    second.wait_for_line(|line| line.contains(&format!("status_address {address} is free and taken")));
    assert_eq!(get(address, "localhost", "/healthz").await.status, 200);
    let mut asking = Process::start("agentd", &["status", "--control-socket", socket.to_str().unwrap()], &[]);
    assert_eq!(asking.wait(), Some(0), "{}", asking.printed());
    drop(systemd);
}

#[tokio::test]
async fn a_token_comes_through_a_pipe_with_a_name_and_without() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    for (number, name) in [Some("piped-one"), None].into_iter().enumerate() {
        let pipe = dir.path().join(format!("pipe-{number}"));
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let writer = std::thread::spawn({
            let (pipe, token) = (pipe.clone(), local.issue("developer", &["piped-*"]));
            move || std::fs::write(pipe, token + "\n").unwrap()
        });
        let address = upstream.address();
        let mut arguments = vec!["http", &address, "--edge", &local.agents];
        arguments.extend(["--token-file", pipe.to_str().unwrap()]);
        arguments.extend(name.iter().flat_map(|name| ["--name", name]));
        let agent = Process::start("agentd", &arguments, &[]);
        let told = agent.wait_for_line(|line| line.contains("//piped-"));
        writer.join().unwrap();
        let tunnel = told.split("//").nth(1).unwrap().split('.').next().unwrap();
        assert_eq!(Request::to(tunnel, "GET", "/").send(local.public).await.status, 200);
    }
}

#[tokio::test]
async fn monitoring_reads_over_loopback_and_nothing_else_does_or_tells() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let port = Port::take();
    let text = format!("status_address = \"{port}\"\n{}", tunnel("web", &upstream.address()));
    let _agent = local.agent_with(&text, &["web"]);
    let body = vec![b'x'; 1000];
    for _ in 0..3 {
        let answer = Request::to("web", "POST", "/").body(body.clone()).send(local.public).await;
        assert_eq!(answer.status, 200);
    }
    let address = port.address();
    let own = port.to_string();
    assert_eq!(get(address, &own, "/ready").await.status, 200);
    let metrics = get(address, &own, "/metrics").await;
    assert!(metrics.field("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let text = metrics.text();
    for line in [
        "agentd_requests_total{tunnel=\"web\",status=\"2xx\"} 3",
        "agentd_request_duration_seconds_count{tunnel=\"web\"} 3",
        "agentd_request_body_bytes_total{tunnel=\"web\"} 3000",
        "agentd_response_body_bytes_total{tunnel=\"web\"} 3000",
        "agentd_requests_in_flight{tunnel=\"web\"} 0",
        "agentd_connections 1",
        "agentd_tunnels_open 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    // What Prometheus itself makes of it, where that is installed; CI says so where it is not.
    if let Ok(mut promtool) = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
    {
        std::io::Write::write_all(&mut promtool.stdin.take().unwrap(), text.as_bytes()).unwrap();
        let said = promtool.wait_with_output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }
    // Every name is documented, whole.
    let guide = include_str!("../docs/operations.md");
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = line.split(' ').next().unwrap();
        assert!(guide.contains(&format!("`{name}")), "{name} is not documented");
    }
    // What a page of a foreign site can send, and what only the socket answers.
    for host in ["evil.example", "localhost.evil.example", "192.0.2.1"] {
        assert_eq!(get(address, host, "/metrics").await.status, 403, "{host}");
    }
    for path in ["/status", "/reload", "/stop", "/", "/metrics/x"] {
        let post = Request::new("POST", path).field("Host", &own).body(Vec::new());
        assert_eq!(post.send(address).await.status, 404, "{path}");
        assert_eq!(get(address, &own, path).await.status, 404, "{path}");
    }
    let post = Request::new("POST", "/metrics").field("Host", &own).body(Vec::new()).send(address).await;
    assert_eq!((post.status, post.field("allow").as_deref()), (405, Some("GET")));
}

#[tokio::test]
async fn an_upstream_that_fails_its_check_is_502_and_no_agent_is_503() {
    let well = Arc::new(AtomicBool::new(true));
    let is_well = Arc::clone(&well);
    let upstream = Upstream::start(move |request, mut conn| {
        let is_well = Arc::clone(&is_well);
        async move {
            let status = match request.target() {
                "/healthz" if !is_well.load(Ordering::Relaxed) => "500 Ill",
                _ => "200 OK",
            };
            conn.answer(status, "", b"ok").await.then_some(conn)
        }
    })
    .await;
    let local = Local::start(&[]);
    let check = "health_check = { path = \"/healthz\", interval = \"100ms\", max_failed = 2 }\n";
    let mut agent = local.agent_with(
        &(tunnel("web", &upstream.address()) + check + &tunnel("other", &upstream.address())),
        &["web", "other"],
    );
    let code = async |name: &str| {
        let answer = Request::to(name, "GET", "/").send(local.public).await;
        (answer.status, answer.field("x-tunnel-error"))
    };
    assert_eq!(code("web").await, (200, None));
    let asked = |target: &str| upstream.recorded().iter().filter(|one| one.target() == target).count();
    tests::eventually("it is asked again and again", async || asked("/healthz") > 2).await;
    well.store(false, Ordering::Relaxed);
    // The upstream lives in this very thread: it must not be blocked.
    let says = async |text: &str| {
        tests::eventually(text, async || agent.process().printed().contains(text)).await;
    };
    says("the upstream of web is down: the upstream answered 500").await;
    let before = asked("/");
    assert_eq!(code("web").await, (502, Some("upstream_unhealthy".into())));
    assert_eq!(asked("/"), before, "it is not called");
    assert_eq!(code("other").await, (200, None), "other tunnels do not notice");
    let (_, info) = agent.ask(&["tunnel", "info", "web"]);
    assert!(info.contains("down: the upstream answered 500"), "{info}");
    assert_eq!(agent.ask(&["ready"]).0, Some(0), "the agent itself is well");
    well.store(true, Ordering::Relaxed);
    says("the upstream of web is up again").await;
    assert_eq!(code("web").await, (200, None));

    agent.process().signal(rustix::process::Signal::TERM);
    assert_eq!(agent.process_mut().wait(), Some(0));
    assert_eq!(code("web").await, (503, Some("tunnel_offline".into())));
}

#[tokio::test]
async fn all_tunnels_together_are_bounded_too() {
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&[]);
    let tunnels = tunnel("one", &upstream.address()) + &tunnel("two", &upstream.address());
    let agent = local.agent_with(&format!("max_concurrent = 2\n{tunnels}"), &["one", "two"]);
    let mut hanging = Vec::new();
    for name in ["one", "two"] {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to(name, "GET", "/hang")).await;
        hanging.push(connection);
    }
    tests::eventually("both are at the upstream", async || upstream.recorded().len() == 2).await;
    let answer = Request::to("one", "GET", "/").send(local.public).await;
    assert_eq!((answer.status, answer.field("x-tunnel-error").as_deref()), (429, Some("too_many_requests")));
    // A reload raises the bound while both are still in flight.
    agent.write_config(&local.config(&format!("max_concurrent = 3\n{tunnels}")));
    assert_eq!(agent.ask(&["reload"]).0, Some(0));
    assert_eq!(Request::to("one", "GET", "/").send(local.public).await.status, 200);
    hanging.pop();
    tests::eventually("a place is free again", async || {
        json(&agent, &["status"])["tunnels"][1]["in_flight"] == 0
    })
    .await;
}

#[tokio::test]
async fn a_request_is_one_line_with_all_about_it_and_nothing_that_is_secret() {
    let upstream = Upstream::start(|_, mut conn| async move {
        conn.answer("201 Created", "Set-Cookie: reply-secret\r\n", b"body-secret").await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agentd.toml");
    let log = "[log]\ndir = \"log\"\nformat = \"json\"\nlevel = \"trace\"\n";
    let text = format!("{log}{}", tunnel("web", &upstream.address()));
    std::fs::write(&config, local.config(&text)).unwrap();
    let mut agent = Process::start(
        "agentd",
        &["run", "--config", config.to_str().unwrap()],
        &[("AGENTD_CONTROL_SOCKET", dir.path().join("c.sock").to_str().unwrap())],
    );
    let request = Request::to("web", "POST", "/path%20x?query-secret=1")
        .field("Cookie", "field-secret")
        .field("Authorization", "Bearer credential-secret")
        .body(b"upload-secret".to_vec());
    tests::eventually("the tunnel is served", async || request.send(local.public).await.status == 201).await;
    agent.signal(rustix::process::Signal::TERM);
    assert_eq!(agent.wait(), Some(0));

    let files: Vec<_> =
        std::fs::read_dir(dir.path().join("log")).unwrap().map(|file| file.unwrap()).collect();
    assert_eq!(files.len(), 1, "one a day");
    let logged = std::fs::read_to_string(files[0].path()).unwrap() + &agent.printed();
    let lines: Vec<Value> = logged
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| line["target"] == "agentd::access")
        .collect();
    let [line] = &lines[..] else { panic!("one line is wanted: {lines:?}") };
    assert_eq!(line["request_id"].as_str().unwrap().len(), 32);
    for (field, value) in [
        ("tunnel_id", Value::from("web")),
        ("message", "POST /path%20x 201".into()),
        ("method", "POST".into()),
        ("path", "/path%20x".into()),
        ("status", 201.into()),
        ("request_bytes", 13.into()),
        ("bytes", 11.into()),
    ] {
        assert_eq!(line[field], value, "{line}");
    }
    assert!(line["head_ms"].as_f64().unwrap() <= line["elapsed_ms"].as_f64().unwrap(), "{line}");
    assert!(line.get("error_code").is_none(), "{line}");
    let token = std::fs::read_to_string(&local.token).unwrap();
    assert!(!logged.contains(token.trim()) && !logged.contains("secret"), "{logged}");
}

/// CPU time of all threads of a process so far.
fn cpu(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanos = threads
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap())
        .map(|stat| stat.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    Duration::from_nanos(nanos)
}

/// The program's own pages are a matter of its build, and a test's is several times as large; what it allocates is not.
#[tokio::test]
async fn an_idle_agent_costs_next_to_nothing() {
    const MIB: u64 = 1024 * 1024;
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    for (count, most) in [(1, 4 * MIB), (20, 6 * MIB)] {
        let names: Vec<String> = (0..count).map(|number| format!("idle-{count}-{number}")).collect();
        let tunnels: String = names.iter().map(|name| tunnel(name, &upstream.address())).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let port = Port::take();
        let text = format!("status_address = \"{port}\"\n{tunnels}");
        let agent = local.agent_with(&text, &names);
        for name in &names {
            assert_eq!(Request::to(name, "GET", "/").send(local.public).await.status, 200);
        }
        let pid = agent.process().id();
        // A span of doing nothing is what is measured.
        let (before, span) = (cpu(pid), Duration::from_secs(2));
        tokio::time::sleep(span).await;
        let used = cpu(pid) - before;
        let resident = tests::resident_bytes(pid).unwrap();
        let own = tests::anonymous_bytes(pid).unwrap();
        println!(
            "{count} tunnels: {} KiB resident, {} its own, {used:?} of CPU in {span:?}",
            resident / 1024,
            own / 1024
        );
        assert!(own <= most, "{count} tunnels: {own} bytes");
        assert!(resident <= 24 * MIB, "{count} tunnels: {resident} bytes");
        assert!(used < span / 200, "{used:?}");
    }
}

#[test]
fn a_value_of_the_environment_that_is_wrong_is_a_bad_configuration() {
    let run = |environment: &[(&str, &str)], arguments: &[&str]| {
        let mut process = Process::start("agentd", arguments, environment);
        (process.wait(), process.printed())
    };
    let (code, printed) = run(&[("AGENTD_GRACE_PERIOD", "soon")], &["run"]);
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("AGENTD_GRACE_PERIOD") && printed.contains("60s"), "{printed}");
    assert_eq!(printed.lines().count(), 1, "{printed}");
    // The same as a flag is wrong usage, whatever the environment says.
    let (code, printed) = run(&[("AGENTD_GRACE_PERIOD", "1s")], &["run", "--grace-period", "soon"]);
    assert_eq!(code, Some(2), "{printed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diagnosis_says_where_the_way_ends() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let agent = local.agent("web", &upstream.address());
    let config = agent.dir().join("agentd.toml");
    let written = agent.dir().join("report.txt");
    let config = ["--config", config.to_str().unwrap(), "-w", written.to_str().unwrap()];
    let diagnose = || agent.ask(&[&["diagnose"][..], &config].concat());

    // With the agent running.
    let (code, printed) = diagnose();
    assert_eq!(code, Some(0), "{printed}");
    for line in ["  [ OK ] DNS: ", "  [ OK ] TCP: ", "  [ OK ] token accepted", "  [ OK ] hello answered"] {
        assert!(printed.contains(line), "{line} is not in\n{printed}");
    }
    let public = format!("  [ OK ] public http://web.localhost:{} answers 200", local.public.port());
    assert!(printed.contains(&public) && printed.contains("every tunnel is open"), "{printed}");
    assert!(printed.ends_with("All is well."), "{printed}");
    assert_eq!(std::fs::read_to_string(&written).unwrap().trim(), printed);
    let token = std::fs::read_to_string(&local.token).unwrap();
    assert!(!printed.contains(token.trim()));
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200, "the agent serves on");

    // With another's configuration, which it has not been asked to serve.
    let second = agent.dir().join("second.toml");
    std::fs::write(&second, local.config(&tunnel("second", &upstream.address()))).unwrap();
    let (code, printed) = agent.ask(&["diagnose", "--config", second.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(
        printed.contains("[FAIL] the agent that runs (pid ")
            && printed.contains("agentd.toml) does not serve it: ")
    );

    // Without one, and the app down.
    drop(upstream);
    agent.process().signal(rustix::process::Signal::TERM);
    tests::eventually("the agent is gone", async || agent.ask(&["status"]).0 == Some(1)).await;
    let (code, printed) = diagnose();
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("this program is the agent for the moment"), "{printed}");
    assert!(printed.contains("[FAIL] public ") && printed.contains("upstream_unreachable"), "{printed}");
    assert!(printed.contains("Connection refused"), "{printed}");
    assert!(printed.ends_with("It does not work; failures: 2, warnings: 1."), "{printed}");
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 503, "it is gone again");

    // A token that is not known here, and an edge that is not there.
    let text = local.config(&tunnel("web", "127.0.0.1:1"));
    std::fs::write(agent.dir().join("other"), "not.a.token").unwrap();
    std::fs::set_permissions(agent.dir().join("other"), std::fs::Permissions::from_mode(0o600)).unwrap();
    agent.write_config(&text.replace(local.token.to_str().unwrap(), "other"));
    let (code, printed) = diagnose();
    assert!(code == Some(77) && printed.contains("[FAIL] the edge refused the token"), "{printed}");
    // One that is known, and not for this tunnel: none is opened.
    std::fs::write(agent.dir().join("other"), local.issue("alice", &["other"])).unwrap();
    let (code, printed) = diagnose();
    assert!(code == Some(77) && printed.contains("[FAIL] web is not open"), "{printed}");
    let closed = Port::take();
    agent.write_config(&text.replace(&local.agents, &format!("ws://{closed}")));
    let (code, printed) = diagnose();
    assert!(code == Some(69) && printed.contains("[FAIL] TCP: "), "{printed}");
    agent.write_config("nonsense");
    let (code, printed) = diagnose();
    assert!(
        code == Some(78) && printed.contains("[FAIL] ") && printed.contains("agentd.toml:1"),
        "{printed}"
    );
}
