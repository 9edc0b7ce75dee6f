//! Who may open which tunnel, for how long, and what becomes of those who may not.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::time::{Duration, Instant};

use proto::{
    limits,
    message::{Refusal, Welcome},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::{
    Local,
    client::{Answer, Connection, Request},
    operator::unix_now,
    process::Process,
    raw_agent::RawAgent,
    upstream::Upstream,
};
use tokio_tungstenite::tungstenite::http::StatusCode;

/// What a refused handshake is answered with.
async fn handshake(local: &Local, query: &str, authorization: Option<&str>) -> Answer {
    let agents = local.agents.trim_start_matches("ws://").parse().unwrap();
    let mut request = Request::new("GET", &format!("/{query}"))
        .field("Host", "agents")
        .field("Connection", "Upgrade")
        .field("Upgrade", "websocket")
        .field("Sec-WebSocket-Version", "13")
        .field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    if let Some(value) = authorization {
        request = request.field("Authorization", value);
    }
    let mut connection = Connection::open(agents).await;
    connection.begin(&request).await;
    let mut answer = connection.head_of_any_status().await;
    if answer.status != 101 {
        let length = answer.field("content-length").unwrap().parse().unwrap();
        answer.body = connection.bytes(length).await;
    }
    answer
}

fn reason(welcome: &Welcome, name: &str) -> Option<Refusal> {
    welcome.refused.iter().find(|refused| refused.name == name).map(|refused| refused.reason)
}

#[tokio::test]
async fn a_refusal_says_the_same_whatever_the_reason() {
    let local = Local::start(&[]);
    let good = local.issue("alice", &["web"]);
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let changed = |change: &dyn Fn(&mut agentd::identity::Claims)| {
        let mut claims = local.claims("alice", "web");
        change(&mut claims);
        local.sign(&claims)
    };
    let refused = [
        "x".to_owned(),
        "a.b.c".to_owned(),
        format!("{signed}."),
        format!("{signed}.{}A", &signature[1..]),
        changed(&|claims| claims.exp = unix_now() - 31),
        changed(&|claims| claims.exp = u64::MAX / 2),
        changed(&|claims| claims.iss = "other".into()),
        changed(&|claims| claims.aud = "other".into()),
        changed(&|claims| claims.iat = unix_now() + 3600),
        changed(&|claims| claims.tunnels = vec!["*.*".into()]),
        changed(&|claims| claims.tunnels = Vec::new()),
        changed(&|claims| claims.jti = String::new()),
        "x".repeat(4097),
    ];
    let mut bodies = Vec::new();
    for token in &refused {
        let answer = handshake(&local, "", Some(&format!("Bearer {token}"))).await;
        assert_eq!(answer.status, 403, "{token}");
        bodies.push(answer.body);
    }
    // Revoked: refused one step later, and nobody can tell.
    assert_eq!(local.revoke(json!({"owner": "alice"})).await, 0);
    let answer = handshake(&local, "", Some(&format!("Bearer {good}"))).await;
    assert_eq!(answer.status, 403);
    bodies.push(answer.body);
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    assert_eq!(handshake(&local, "", None).await.status, 401);
    assert_eq!(handshake(&local, "?x=1", None).await.status, 401);
    for secret in refused.iter().filter(|token| token.len() > 20) {
        assert!(!local.process().printed().contains(&secret[..20]), "{secret} was printed");
    }
}

#[tokio::test]
async fn the_header_goes_before_the_query_and_neither_is_printed() {
    let local = Local::start(&["--log-level", "debug"]);
    let good = local.issue("alice", &["web"]);
    let bearer = format!("Bearer {good}");
    for (query, authorization, status) in [
        (format!("?token={good}"), None, 101),
        (format!("?a=b&token={good}&c"), None, 101),
        ("?token=bad".to_owned(), Some(&*bearer), 101),
        (format!("?token={good}"), Some("Bearer bad"), 403),
        (format!("?token={good}"), Some("Basic bad"), 403),
        (format!("?token={good}&token={good}"), None, 403),
        (format!("?token={good}&token=bad"), None, 403),
        ("?token=".to_owned(), None, 401),
        (format!("?Token={good}"), None, 401),
    ] {
        let answer = handshake(&local, &query, authorization).await;
        assert_eq!(answer.status, status, "{query} {authorization:?}");
    }
    // The last word of the last of them is behind everything they have caused.
    let mut agent = RawAgent::with(&local, &good).await;
    agent.hello(&["web"]).await;
    let printed = local.process().printed();
    assert!(printed.contains("agent connection allowed"), "{printed}");
    for part in good.split('.') {
        assert!(!printed.contains(&part[..16]), "a part of a token was printed");
    }
}

#[tokio::test]
async fn a_welcome_says_what_the_token_may_open() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::with(&local, &local.issue("alice", &["web", "pr-*"])).await;
    let asked = ["web", "pr-1", "shop", "www", "_dmarc", "xn--bcher-kva", "A", "pr-"];
    let welcome = agent.ask_for(&asked).await;
    assert_eq!(welcome.owner.as_ref().unwrap().as_str(), "alice");
    assert_eq!(welcome.may_open, ["web", "pr-*"]);
    assert!((1..=86_400_000 + 30_000).contains(&welcome.identity_ms.unwrap()));
    let open: Vec<_> = welcome.tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
    assert_eq!(open, ["pr-1", "web"]);
    for (name, expected) in [
        ("shop", Refusal::NotAllowed),
        ("www", Refusal::ReservedName),
        ("_dmarc", Refusal::ReservedName),
        ("xn--bcher-kva", Refusal::ReservedName),
        ("A", Refusal::InvalidName),
        ("pr-", Refusal::InvalidName),
    ] {
        assert_eq!(reason(&welcome, name), Some(expected), "{name}");
    }
}

#[tokio::test]
async fn a_name_stays_its_owners_while_the_owner_is_up_reconnecting_and_just_gone() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let alice = local.token_file(&local.issue("alice", &["web"]));
    let tunnels = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let mut agent = local.agent_of(&alice, &[], &tunnels, &["web"]);
    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["*"])).await;
    let mut is_refused = async |state: &str| {
        let welcome = mallory.ask_for(&["web"]).await;
        assert_eq!(reason(&welcome, "web"), Some(Refusal::NameTaken), "{state}");
        assert!(welcome.tunnels.is_empty(), "{state}");
    };
    is_refused("up").await;

    let connected =
        agent.process().wait_for_line(|line| line.contains("connected") && line.contains("connection_id"));
    let id = connected.split("\"connection_id\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    local.close(&id).await;
    agent.process().wait_for_line(|line| line.contains("reconnecting"));
    is_refused("reconnecting").await;
    tests::eventually("it is back", async || {
        Request::to("web", "GET", "/").send(local.public).await.status == 200
    })
    .await;
    is_refused("back").await;

    agent.process().signal(Signal::KILL);
    is_refused("killed a moment ago").await;
    agent.process_mut().wait();
    tests::eventually("its connection is known to be gone", async || {
        Request::to("web", "GET", "/").send(local.public).await.status == 503
    })
    .await;
    is_refused("gone").await;

    let mut agent = local.agent_of(&alice, &[], &tunnels, &["web"]);
    agent.process().signal(Signal::TERM);
    assert_eq!(agent.process_mut().wait(), Some(0));
    is_refused("stopped in order").await;
    let _agent = local.agent_of(&alice, &[], &tunnels, &["web"]);
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
}

#[tokio::test]
async fn a_name_is_held_back_to_the_second_and_free_from_then_on() {
    let local = Local::start(&[]);
    let mut alice = RawAgent::with(&local, &local.issue("alice", &["web"])).await;
    alice.hello(&["web"]).await;
    let number = |row: &Value, name: &str| -> u64 { row[name]["N"].as_str().unwrap().parse().unwrap() };
    let row = local.row("web", "#name").await.unwrap();
    assert_eq!(row["owner"]["S"], "alice");
    let connection_ends = number(&local.connections_of("alice").await[0], "expires_at");
    assert_eq!(number(&row, "expires_at"), connection_ends + limits::NAME_HELD.as_secs());
    drop(alice);

    // The same row, with the end of its time in sight.
    let free_at = unix_now() + 3;
    let mut near = row.clone();
    near["expires_at"] = json!({"N": free_at.to_string()});
    local.dynamodb("PutItem", json!({"TableName": "connections", "Item": near})).await;
    let mut bob = RawAgent::with(&local, &local.issue("bob", &["web"])).await;
    let mut refused_in_the_last_second = false;
    loop {
        let before = unix_now();
        let welcome = bob.ask_for(&["web"]).await;
        if welcome.tunnels.is_empty() {
            assert_eq!(reason(&welcome, "web"), Some(Refusal::NameTaken));
            assert!(before < free_at, "refused after the end");
            refused_in_the_last_second |= unix_now() == free_at - 1;
        } else {
            assert!(unix_now() >= free_at, "given away before the end");
            break;
        }
    }
    assert!(refused_in_the_last_second);
    assert_eq!(local.row("web", "#name").await.unwrap()["owner"]["S"], "bob");
}

#[tokio::test]
async fn agents_of_one_owner_share_a_tunnel() {
    let (one, two) = (Upstream::echo().await, Upstream::echo().await);
    let local = Local::start(&[]);
    let token = local.token_file(&local.issue("alice", &["web"]));
    let tunnel =
        |upstream: &Upstream| format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let mut first = local.agent_of(&token, &[], &tunnel(&one), &["web"]);
    let _second = local.agent_of(&token, &[], &tunnel(&two), &["web"]);
    for _ in 0..40 {
        assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    }
    // Each is chosen by a coin; that one of them is never is one in 2^39.
    let counts = (one.recorded().len(), two.recorded().len());
    assert!(counts.0 > 0 && counts.1 > 0 && counts.0 + counts.1 == 40, "{counts:?}");
    first.process().signal(Signal::TERM);
    assert_eq!(first.process_mut().wait(), Some(0));
    for _ in 0..5 {
        assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    }
}

#[tokio::test]
async fn a_random_name_is_one_that_the_token_opens() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let token = local.token_file(&local.issue("alice", &["web", "pr-*"]));
    let http = |token: &std::path::Path| {
        let token = token.to_str().unwrap().to_owned();
        let address = upstream.address();
        Process::start("agentd", &["http", &address, "--edge", &local.agents, "--token-file", &token], &[])
    };
    let agent = http(&token);
    let line = agent.wait_for_line(|line| line.contains("http://pr-"));
    let name = line.split("http://").nth(1).unwrap().split('.').next().unwrap();
    assert_eq!(name.split('-').count(), 4, "pr, two words and a number: {name}");
    assert_eq!(Request::to(name, "GET", "/").send(local.public).await.status, 200);

    let exact = local.token_file(&local.issue("alice", &["web"]));
    let mut agent = http(&exact);
    assert_eq!(agent.wait(), Some(78));
    assert!(agent.printed().contains("give --name, one of web"), "{}", agent.printed());
}

#[tokio::test]
async fn a_revoked_owner_is_cut_at_once_and_nobody_else_is() {
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&[]);
    let tunnel =
        |name: &str| format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n", upstream.address());
    let alice_token = local.token_file(&local.issue("alice", &["web"]));
    let bob_token = local.token_file(&local.issue("bob", &["shop"]));
    let mut alice = local.agent_of(&alice_token, &[], &tunnel("web"), &["web"]);
    let _bob = local.agent_of(&bob_token, &[], &tunnel("shop"), &["shop"]);
    // One that never says a word of its own accord.
    let mut silent = RawAgent::with(&local, &local.issue("alice", &["web"])).await;
    let mut hanging = Connection::open(local.public).await;
    hanging.begin(&Request::to("web", "GET", "/hang")).await;
    tests::eventually("it is at the upstream", async || !upstream.recorded().is_empty()).await;
    silent.hello(&[]).await;

    let begun = Instant::now();
    assert_eq!(local.revoke(json!({"owner": "alice"})).await, 2, "also the one that serves nothing");
    assert_eq!(silent.closed().await, Some(1000));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let cut = hanging.answer("GET").await;
    assert_eq!((cut.status, cut.field("x-tunnel-error").as_deref()), (502, Some("agent_lost")));
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 503);
    assert_eq!(alice.process_mut().wait(), Some(77));
    let printed = alice.process().printed();
    assert!(printed.contains("may be revoked") && printed.contains("agentd token show"), "{printed}");
    let again = RawAgent::dial(&local, Some(&format!("Bearer {}", local.issue("alice", &["web"])))).await;
    assert_eq!(again.unwrap_err(), StatusCode::FORBIDDEN, "also with a new token");
    assert_eq!(Request::to("shop", "GET", "/").send(local.public).await.status, 200);

    local.revoke(json!({"owner": "alice", "action": "lift"})).await;
    let _alice = local.agent_of(&alice_token, &[], &tunnel("web"), &["web"]);
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    let wrong = local.invoke("revoke", &json!({"ownr": "alice"})).await;
    assert_eq!(wrong.field("x-amz-function-error").as_deref(), Some("Unhandled"), "a mistake revokes nobody");
}

#[tokio::test]
async fn a_revoked_token_is_cut_and_the_owners_others_are_not() {
    let local = Local::start(&[]);
    let (claims, other) = (local.claims("alice", "*"), local.issue("alice", &["*"]));
    let mut lost = RawAgent::with(&local, &local.sign(&claims)).await;
    lost.hello(&["one"]).await;
    let mut kept = RawAgent::with(&local, &other).await;
    kept.hello(&["two"]).await;
    // One that is opened in the very moment may not be found yet: it is not let in later.
    let mut late = RawAgent::with(&local, &local.sign(&claims)).await;
    local.forget_silent("alice").await;
    // Accepted before, but it has not said what it serves.
    let mut silent = RawAgent::with(&local, &local.sign(&claims)).await;
    let event = json!({"owner": "alice", "token_id": claims.jti});
    assert_eq!(local.revoke(event.clone()).await, 2);
    assert_eq!(lost.closed().await, Some(1000));
    assert_eq!(silent.closed().await, Some(1000));
    late.say_text(r#"{"type":"hello","seq":1,"version":1,"agent":"raw","tunnels":["one"]}"#).await;
    assert_eq!(late.closed().await, Some(1000));
    assert_eq!(Request::to("one", "GET", "/").send(local.public).await.status, 503);
    assert_eq!(local.revoke(event).await, 0, "it may be repeated");
    kept.say_text(r#"{"type":"heartbeat","seq":3}"#).await;
    assert!(kept.hear().await.contains("heartbeat"));
}

#[tokio::test]
async fn a_connection_that_a_limit_refused_is_cut_and_one_that_says_nothing_counts_towards_none() {
    let local = Local::start(&["--limits", "owner_connections=1"]);
    let token = local.issue("alice", &["*"]);
    let mut silent = RawAgent::with(&local, &token).await;
    let mut first = RawAgent::with(&local, &token).await;
    first.called("first");
    first.hello(&["one"]).await;
    let mut refused = RawAgent::with(&local, &token).await;
    refused.called("refused");
    for _ in 0..2 {
        let welcome = refused.ask_for(&["two"]).await;
        assert_eq!(reason(&welcome, "two"), Some(Refusal::TooManyConnections));
    }
    // Nor does one that was refused.
    first.hello(&["one", "two"]).await;
    assert_eq!(local.revoke(json!({"owner": "alice"})).await, 3);
    for agent in [&mut silent, &mut first, &mut refused] {
        assert_eq!(agent.closed().await, Some(1000));
    }
}

#[tokio::test]
async fn a_connection_that_is_refused_or_has_ended_leaves_no_row() {
    let local = Local::start(&[]);
    let token = local.issue("alice", &["web"]);
    drop(RawAgent::with(&local, &token).await);
    let rows = async || local.connections_of("alice").await.len();
    tests::eventually("its row is gone", async || rows().await == 0).await;
    local.revoke(json!({"owner": "alice"})).await;
    let refused = RawAgent::dial(&local, Some(&format!("Bearer {token}"))).await;
    assert_eq!(refused.unwrap_err(), StatusCode::FORBIDDEN);
    assert_eq!(rows().await, 0);
}

#[tokio::test]
async fn a_connection_ends_with_its_token() {
    let upstream = Upstream::echo().await;
    // Heartbeats every 2.5 seconds, so that the end is noticed sooner.
    let local = Local::start(&["--chaos", "clock=10"]);
    let mut claims = local.claims("alice", "web");
    let ends_at = unix_now() + 8;
    claims.exp = ends_at - limits::CLOCK_SKEW.as_secs();
    let token = local.sign(&claims);
    let tunnel = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let mut agent = local.agent_of(&local.token_file(&token), &[], &tunnel, &["web"]);
    let mut claims = local.claims("mallory", "other");
    claims.exp = ends_at - limits::CLOCK_SKEW.as_secs();
    let mut raw = RawAgent::with(&local, &local.sign(&claims)).await;
    raw.hello(&["other"]).await;
    let asked = {
        let (request, public) = (Request::to("other", "GET", "/"), local.public);
        tokio::spawn(async move { request.send(public).await })
    };
    let call = raw.request().await;
    // Served until the second of the end, and not one request longer.
    loop {
        let (before, answer) = (unix_now(), Request::to("web", "GET", "/").send(local.public).await);
        match answer.status {
            200 => assert!(before < ends_at, "served after the end"),
            503 => {
                assert!(unix_now() >= ends_at, "refused before the end");
                break;
            }
            // In flight in that very second: its answer came too late.
            502 if unix_now() >= ends_at => {}
            other => panic!("{other}: {}", answer.text()),
        }
    }
    raw.say(call.reply("too late", true)).await;
    assert_eq!(raw.closed().await, Some(1000));
    assert_eq!(asked.await.unwrap().field("x-tunnel-error").as_deref(), Some("agent_lost"));
    assert_eq!(agent.process_mut().wait(), Some(77));
    assert!(unix_now() <= ends_at + 30, "noticed with the next heartbeat");
    let printed = agent.process().printed();
    assert!(printed.contains("the token ends soon") && printed.contains("the token ended"), "{printed}");
    assert!(printed.contains("agentd token issue"), "{printed}");
}

#[tokio::test]
async fn a_token_that_is_renewed_in_its_file_costs_no_request() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let mut claims = local.claims("alice", "web");
    // An eighth of it is left for the move.
    let ends_at = unix_now() + 20;
    claims.exp = ends_at - limits::CLOCK_SKEW.as_secs();
    let file = local.token_file(&local.sign(&claims));
    let tunnel = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let agent = local.agent_of(&file, &[], &tunnel, &["web"]);
    std::fs::write(&file, local.issue("alice", &["web"])).unwrap();
    while unix_now() <= ends_at + 1 {
        let answer = Request::to("web", "GET", "/").send(local.public).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert!(agent.process().printed().contains("the token was renewed"));
}

#[tokio::test]
async fn the_keys_of_task_tokens_are_replaced_without_a_failed_request() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..4 {
        let (public, stop) = (local.public, stop.clone());
        clients.spawn(async move {
            let mut done = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let body = format!("{client}-{done}").into_bytes();
                let answer = Request::to("web", "POST", "/").body(body.clone()).send(public).await;
                assert_eq!((answer.status, &answer.body), (200, &body), "{}", answer.text());
                done += 1;
            }
            done
        });
    }
    let served = async |more: usize| {
        let from = upstream.recorded().len();
        tests::eventually("requests go on", async || upstream.recorded().len() >= from + more).await;
    };
    served(20).await;
    let old = local.variables("ingress").await["TUNNEL_TOKEN_KEYS"].as_str().unwrap().to_owned();
    let new = {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        STANDARD.encode(tests::noise(7, 32))
    };
    let set = async |function: &str, keys: &str| {
        let mut variables = local.variables(function).await;
        variables["TUNNEL_TOKEN_KEYS"] = keys.into();
        local.deploy(function, &variables).await;
        served(20).await;
    };
    // First who checks, then who signs; then the old key goes, in the other order.
    set("response", &format!("{new},{old}")).await;
    set("ingress", &format!("{new},{old}")).await;
    set("ingress", &new).await;
    set("response", &new).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let done: usize = clients.join_all().await.into_iter().sum();
    assert!(done >= 100, "{done}");

    // That it was the keys: with `ingress` back at the old one, nothing it signs is taken.
    let mut variables = local.variables("ingress").await;
    variables["TUNNEL_TOKEN_KEYS"] = old.into();
    variables["TUNNEL_REPLY_TIMEOUT_SECS"] = "2".into();
    local.deploy("ingress", &variables).await;
    let sent = local.counters().await["sqs:SendMessage"];
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 504);
    assert_eq!(local.counters().await["sqs:SendMessage"], sent, "nothing was written");
    let printed = local.process().printed();
    assert!(printed.contains("token is not signed by a valid key"), "{printed}");
}
