//! The acceptance run against a stack in an account, where the environment names one; and the same run against
//! `local`, always.
//!
//! Against an account it also settles, and prints, what only a live account can say about AWS. What it needs,
//! does and costs is in docs/deploy.md, "Trying a deployed stack".

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

mod account;
mod config;
mod fronts;
mod points;
mod report;
mod run;
mod times;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::Path,
};

use config::{Config, OF_THE_STACK, SKIPPED};
use edge::config::{Env, env};
use local::latency::Profile;
use report::Report;
use serde_json::json;
use tests::{
    Local,
    sockets::Port,
    tls::{acceptor, fixture},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};

/// What `local` answers a client with that gets no answer.
const REPLY_TIMEOUT_SECS: &str = "3";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_stack_that_the_environment_names() {
    // Past the test runner, which shows what a test prints only when it has failed.
    let mut out = std::io::stderr();
    let config = match Config::find(&Env::process()) {
        Ok(Some(config)) => config,
        Ok(None) => {
            out.write_all(SKIPPED.as_bytes()).unwrap();
            return;
        }
        Err(problem) => panic!("deployed: {problem}"),
    };
    let mut ends = [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| signal(kind).unwrap());
    let [interrupt, terminate] = &mut ends;
    let interrupted = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let report = Report::new(&mut out);
    run::run(config, &report, interrupted).await;
    assert_eq!(report.failures(), Vec::<String>::new());
}

/// `local` as an account: what the environment of a run against it is.
struct Target {
    local: Local,
    variables: BTreeMap<String, String>,
}

impl Target {
    /// `local`, with more arguments, and more variables or others.
    async fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let local = Local::start_in(
            &[(env::REPLY_TIMEOUT_SECS, REPLY_TIMEOUT_SECS)],
            &[&["--no-agent"], arguments].concat(),
        );
        // What the stack's own outputs say: it is the functions' environment.
        let deployed = local.variables("ingress").await;
        let of = |name: &str| deployed[name].as_str().unwrap().to_owned();
        let operator = std::fs::read_to_string(local.state_dir().join("operator")).unwrap();
        let mut own = BTreeMap::from([
            (env::PUBLIC_URL, format!("http://{{name}}.localhost:{}", local.public.port())),
            ("TUNNEL_FRONT", "local".to_owned()),
            (env::REPLY_TIMEOUT_SECS, REPLY_TIMEOUT_SECS.to_owned()),
            ("AGENTD_EDGE", local.agents.clone()),
            ("AGENTD_TOKEN_FILE", local.token.to_str().unwrap().to_owned()),
            ("AWS_REGION", "local-1".to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://{}", local.endpoint)),
            ("AWS_ACCESS_KEY_ID", operator.trim().to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-prints".to_owned()),
            ("DEPLOYED_CALLS", "50".to_owned()),
            ("DEPLOYED_DOWNLOAD_MIB", "8".to_owned()),
        ]);
        for name in
            [env::CONNECTIONS_TABLE, env::STATE_MACHINE_ARN, env::MAILBOX_URL_PREFIX, env::AGENT_ENDPOINT]
        {
            own.insert(name, of(name));
        }
        own.extend(variables.iter().map(|&(name, value)| (name, value.to_owned())));
        let variables = own.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { local, variables }
    }

    fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    fn config(&self) -> Result<Option<Config>, String> {
        Config::find(&Env::new(&|name| self.variables.get(name).cloned()))
    }

    /// Runs, until `interrupted` at most: what it said, and what was not well.
    async fn run(&self, interrupted: impl Future<Output = ()>) -> (String, Vec<String>) {
        let config = self.config().unwrap().expect("a stack is named");
        let mut said = Vec::new();
        let report = Report::new(&mut said);
        run::run(config, &report, interrupted).await;
        let failures = report.failures();
        drop(report);
        let said = String::from_utf8(said).unwrap();
        println!("{said}");
        self.assert_nothing_is_told_or_left(&said).await;
        (said, failures)
    }

    /// No secret has been said, and nothing that a run made is there any more.
    async fn assert_nothing_is_told_or_left(&self, said: &str) {
        let token = std::fs::read_to_string(&self.local.token).unwrap();
        for secret in
            [token.trim(), &self.variables["AWS_SECRET_ACCESS_KEY"], &self.variables["AWS_ACCESS_KEY_ID"]]
        {
            assert!(!said.contains(secret), "a secret was said");
        }
        assert_eq!(self.rows_left().await, Vec::<String>::new());
        self.eventually_strays("no queue is left", |strays| strays == 0).await;
    }

    /// Waits until so many queues are no mailboxes of the pool, whose rows are written after their queues.
    async fn eventually_strays(&self, what: &str, so_many: impl Fn(usize) -> bool) {
        let prefix = self.variables[env::MAILBOX_URL_PREFIX].rsplit('/').next().unwrap();
        tests::eventually(what, async || {
            let listed = self.local.sqs("ListQueues", json!({"QueueNamePrefix": prefix})).await;
            let pool = self.local.dynamodb("Scan", json!({"TableName": "mailboxes"})).await;
            let known: BTreeSet<&str> = pool["Items"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|row| row["mailbox"]["S"].as_str())
                .collect();
            let queues = listed["QueueUrls"].as_array().into_iter().flatten().filter_map(|url| url.as_str());
            let strays = queues.filter(|url| !known.contains(&url[url.len() - 24..]));
            !known.is_empty() && so_many(strays.count())
        })
        .await;
    }

    async fn rows_left(&self) -> Vec<String> {
        let scanned = self.local.dynamodb("Scan", json!({"TableName": "connections"})).await;
        let rows = scanned["Items"].as_array().unwrap().iter();
        let rows = rows.map(|row| format!("{} {}", row["tunnel"]["S"], row["connection_id"]["S"]));
        rows.filter(|row| row.contains("deployed-")).collect()
    }
}

fn never() -> impl Future<Output = ()> {
    std::future::pending()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_run_against_local() {
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("measured.toml");
    let profile = profile.to_str().unwrap();
    let target = Target::start(&[], &[("DEPLOYED_PROFILE", profile)]).await;
    let (said, failures) = target.run(never()).await;
    assert_eq!(failures, Vec::<String>::new());
    let lines = |begin: &str| said.lines().filter(|line| line.starts_with(begin)).count();
    // All but path mode, and the one that needs the account.
    assert_eq!(lines("ok "), tests::acceptance::ALL.len());
    assert_eq!(lines("not run "), 1);
    // All but the idle timer, which is opt-in, and what this stack does not have.
    assert_eq!((lines("settled "), lines("not settled ")), (10, 2));
    for expected in [
        "1 answers to ping frames: they are answered",
        "2 case of the identity's field: the token is found in any case",
        "3 a receive of 20 s inside EXPRESS: it is left alone (in silence: SUCCEEDED UpstreamTimedOut after 2",
        "answered late: SUCCEEDED Replied after 18.",
        "none was throttled",
        "ms of 50; SendMessage itself p50",
        "of 50 runs at once 0 were throttled",
        "50 of 50 were taken, 0 refused with 429, and 50 came",
        "it has connection, upgrade, sec-websocket-accept",
        "a public client that leaves: the upstream's connection ends 0.",
        "hop latencies: a small request takes p50",
    ] {
        assert!(said.contains(expected), "{expected}");
    }
    let printed = said.split("---").nth(1).unwrap();
    let written = std::fs::read_to_string(profile).unwrap();
    assert_eq!(printed.split_once('\n').unwrap().1, written, "what is printed is the file");
    assert!(Profile::find(profile).unwrap().is_some());
    for line in written.lines().filter(|line| line.contains('=')) {
        assert!(line.contains("source = \"measured") || line.starts_with("describe"), "{line}");
    }
}

/// The points of the fronts, asked of what `local` imitates: each finds what the table says.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_points_of_the_fronts_find_what_is_imitated() {
    let asked = "empty_, compressed_, content_, killed, small_, cached_, ranges, challenges, targets, methods, heads, buffered";
    let variables = [("DEPLOYED_ONLY", asked), ("TUNNEL_FRONT", "cloudfront")];
    let target = Target::start(&["--front", "cloudfront"], &variables).await;
    let (said, failures) = target.run(never()).await;
    assert_eq!(failures, Vec::<String>::new(), "{said}");
    for expected in [
        "empty_answers: each ends at once",
        "compressed_bodies: /gzip is unpacked and its field is gone; /br is unpacked and its field is gone",
        "content_length: content-length is absent, x-amzn-remapped-content-length is 5, x-tunnel-length is 5",
        "agent_killed: it looks whole",
        "small_pieces: each comes by itself",
        "cached_errors: it does not",
        "ranges: 206 with 4 bytes, bytes 0-3/10",
        "x-amzn-remapped-www-authenticate",
        "targets: //a%2Fb%3Fc arrives as //a%2Fb%3Fc",
        "PROPFIND 403, QUERY 403, GET with a body 403",
        "large_heads: 4 KiB 200, 8 KiB 200, 12 KiB 200, 24 KiB 413, a URL of 8 KiB 413",
        "buffered: it goes on as it comes",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

/// Everything that is imitated has a point that settles it, and the page for people names it.
#[test]
fn every_assumption_has_its_point() {
    let names: BTreeSet<_> = fronts::POINTS.iter().map(|point| point.name).collect();
    assert_eq!(names.len(), fronts::POINTS.len());
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/aws-fronts.md")).unwrap();
    for name in &names {
        assert!(page.contains(&format!("`{name}`")), "docs/aws-fronts.md does not name {name}");
    }
    for line in local::public::fronts::TABLE {
        assert!(names.contains(line.point), "{} has no point {}", line.name, line.point);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn by_path_and_over_tls() {
    let mut target = Target::start(&[], &[]).await;
    let agents = target.local.agents.trim_start_matches("ws://").to_owned();
    let public = tls_before(target.local.public.to_string()).await;
    let agents = tls_before(agents).await;
    target.set(env::PUBLIC_URL, &format!("https://localhost:{}/{{name}}/", public.0));
    target.set("AGENTD_EDGE", &format!("wss://localhost:{}", agents.0));
    target.set("SSL_CERT_FILE", fixture("ca.pem").to_str().unwrap());
    target.set("DEPLOYED_ONLY", "target, prefix, ceiling, flush, 503, none, ping, case, hop");
    let (said, failures) = target.run(never()).await;
    assert_eq!(failures, Vec::<String>::new());
    for expected in
        ["a path's prefix is taken off and put back", "each flush arrives", "a token that is none"]
    {
        assert!(said.lines().any(|line| line.starts_with("ok ") && line.contains(expected)), "{expected}");
    }
    assert!(said.contains("they are answered") && said.contains("in any case"));
    // Only what was asked for.
    assert!(!said.contains("is 429") && !said.contains("surge"), "{said}");

    // Somebody whom nobody vouches for is not believed.
    target.variables.remove("SSL_CERT_FILE");
    target.set("DEPLOYED_ONLY", "503");
    let (said, failures) = target.run(never()).await;
    assert_eq!(failures.len(), 1, "{said}");
    public.1.abort();
    agents.1.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pings_and_the_idle_timer() {
    // The ten minutes are three seconds here.
    let variables = [("DEPLOYED_IDLE_SECS", "3"), ("DEPLOYED_ONLY", "idle timer")];
    let target = Target::start(&["--chaos", "clock=200"], &variables).await;
    let (said, failures) = target.run(never()).await;
    assert_eq!(failures, Vec::<String>::new());
    assert!(
        said.contains("settled               1 ping frames and the idle timer: pings do not reset"),
        "{said}"
    );
    assert!(said.contains("with pings closed after 3 s, without closed after 3 s"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_not_well_is_told_and_nothing_stays() {
    let mut target = Target::start(&[], &[]).await;
    let closed = Port::take();
    let nobody = closed.address().port();
    target.set(env::PUBLIC_URL, &format!("http://{{name}}.localhost:{nobody}"));
    target.set("DEPLOYED_ONLY", "ceiling, 502, queues, posts");
    let (said, failures) = target.run(never()).await;
    assert_eq!(
        failures,
        [
            "a body of the ceiling passes, one byte more is 413",
            "an upstream that is down is 502, its own 500 passes"
        ]
    );
    assert!(said.contains("FAILED                a body of the ceiling"), "{said}");
    assert!(said.contains(&nobody.to_string()) && said.contains("deployed: 2 FAILED"), "{said}");
    // What does not need the public side is settled all the same.
    assert!(said.contains("settled               5 posts over one connection"), "{said}");

    // Credentials that are none settle nothing, and say so.
    target.set("AWS_ACCESS_KEY_ID", "AKNOBODY");
    target.set("DEPLOYED_ONLY", "surge");
    let config = target.config().unwrap().unwrap();
    let mut said = Vec::new();
    run::run(config, &Report::new(&mut said), never()).await;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("not settled           5 a surge") && said.contains("UnrecognizedClient"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_that_is_broken_off_leaves_nothing_behind() {
    let target = Target::start(&[], &[("DEPLOYED_ONLY", "inside EXPRESS, large download")]).await;
    target.eventually_strays("the pool is made", |strays| strays == 0).await;
    let under_way = async {
        target.eventually_strays("the run has made its queues", |strays| strays >= 2).await;
        tests::eventually("and its tunnels", async || target.rows_left().await.len() >= 4).await;
    };
    let (said, failures) = target.run(under_way).await;
    assert_eq!(failures, ["the run"], "{said}");
    assert!(said.contains("it was broken off") && said.contains("nothing of this run is left"), "{said}");
}

#[tokio::test]
async fn the_environment_is_read_whole_or_not_at_all() {
    let find = |variables: &[(&str, &str)]| {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Config::find(&Env::new(&|name| variables.get(name).map(|&value| value.to_owned()))).err()
    };
    // Credentials or an agent's settings alone name no stack.
    assert!(matches!(Config::find(&Env::new(&|name| (name == "AWS_REGION").then(|| "x".into()))), Ok(None)));
    assert_eq!(SKIPPED.lines().count(), 2);
    assert!(SKIPPED.contains("SKIPPED") && SKIPPED.contains(env::PUBLIC_URL));
    let problem = find(&[(env::PUBLIC_URL, "https://{name}.example.com")]).unwrap();
    for name in OF_THE_STACK[1..].iter().chain(&["AGENTD_TOKEN_FILE", "AWS_SECRET_ACCESS_KEY"]) {
        assert!(problem.contains(name), "{name}: {problem}");
    }
    let mut target = Target::start(&[], &[]).await;
    assert!(target.config().unwrap().is_some());
    for (name, value, expected) in [
        (env::PUBLIC_URL, "https://example.com/", "neither https://{name}"),
        (env::PUBLIC_URL, "https://{name}.example.com/{name}/", "neither https://{name}"),
        (env::PUBLIC_URL, "ftp://{name}.example.com", "neither https://"),
        ("TUNNEL_FRONT", "nginx", "none of none, cloudfront, httpapi"),
        ("AGENTD_EDGE", "https://example.com", "AGENTD_EDGE"),
        ("AGENTD_TOKEN_FILE", "/nowhere", "AGENTD_TOKEN_FILE names no file"),
        (env::REPLY_TIMEOUT_SECS, "0", env::REPLY_TIMEOUT_SECS),
        ("DEPLOYED_CLIENTS", "many", "DEPLOYED_CLIENTS"),
        ("DEPLOYED_IDLE_SECS", "0", "DEPLOYED_IDLE_SECS"),
    ] {
        let good = target.variables.insert(name.to_owned(), value.to_owned());
        let problem = target.config().err().unwrap_or_default();
        assert!(problem.contains(expected), "{name}={value}: {problem}");
        match good {
            Some(good) => target.set(name, &good),
            None => drop(target.variables.remove(name)),
        }
    }
}

/// What the stack says about itself after a deployment is what a run needs to know of it.
#[test]
fn the_output_of_the_stack_sets_what_a_run_needs() {
    let file =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../serverless.yml")).unwrap();
    let output = file.split("\n      Acceptance:\n").nth(1).unwrap();
    let lines = output.lines().take_while(|line| line.starts_with("        "));
    let words = lines.flat_map(|line| line.split(['[', '\'', ' ', ',']).collect::<Vec<_>>());
    let set: Vec<&str> = words.filter_map(|word| word.split_once('=').map(|(name, _)| name)).collect();
    assert_eq!(set, OF_THE_STACK);
}

/// TLS before something that speaks none, as every front of AWS is; the port, and the task that does it.
async fn tls_before(address: String) -> (u16, JoinHandle<()>) {
    let acceptor = acceptor(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, address) = (acceptor.clone(), address.clone());
            tokio::spawn(async move {
                // Who does not believe the certificate goes away.
                let Ok(mut secure) = acceptor.accept(stream).await else { return };
                let mut plain = TcpStream::connect(address).await.unwrap();
                drop(copy_bidirectional(&mut secure, &mut plain).await);
            });
        }
    });
    (port, task)
}
