//! What the public client sees when something is missing, broken or over a limit: each row of the error
//! table, provoked for real.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{sync::Arc, time::Duration};

use rustix::process::Signal;
use serde_json::json;
use tests::{
    Local,
    acceptance::{self, assert_problem},
    calls::{Calls, Fate, Held},
    client::{Connection, Request},
    raw_agent::RawAgent,
    upstream::Upstream,
};

#[tokio::test]
async fn an_unknown_tunnel_is_404_and_a_known_one_without_agent_503() {
    let local = Local::start(&[]);
    for request in [Request::to("not_a_label", "GET", "/"), Request::get("/nobody/x"), Request::get("/")] {
        assert_problem(&request.send(local.public).await, 404, "no_such_tunnel");
    }
    acceptance::unknown_and_offline(local.stack()).await;
}

#[tokio::test]
async fn an_upstream_that_is_down_is_502_at_once_and_its_own_500_passes() {
    acceptance::an_upstream_that_is_down(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn a_slow_upstream_is_504_and_its_connection_is_closed_within_a_second() {
    let local = Local::start_in(&[("TUNNEL_REPLY_TIMEOUT_SECS", "3")], &["--no-agent"]);
    let stack = local.stack().clone().with_reply_timeout(Duration::from_secs(3));
    acceptance::a_slow_upstream(&stack).await;
}

#[tokio::test]
async fn a_body_of_the_ceiling_passes_and_one_byte_more_is_413_with_the_limit() {
    acceptance::a_body_of_the_ceiling(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn a_tunnel_past_its_concurrency_is_429_and_others_notice_nothing() {
    let local = Local::start(&[]);
    acceptance::past_its_concurrency(local.stack()).await;

    // A client that leaves frees its place as well.
    let upstream = Upstream::hanging_at("/hang").await;
    let one = local.stack().tunnel("one");
    let table = one.table(&upstream.address(), "max_concurrent = 1");
    let _agent = local.agent_with(&table, &["one"]);
    let mut hanging = one.open().await;
    hanging.begin(&one.request("GET", "/hang")).await;
    tests::eventually("the first request is at the upstream", async || !upstream.recorded().is_empty()).await;
    assert_problem(&one.get("/").await, 429, "too_many_requests");
    drop(hanging);
    tests::eventually("the place is free again", async || one.get("/").await.status == 200).await;
}

#[tokio::test]
async fn a_run_that_its_caller_has_lost_takes_no_answer_of_a_later_request() {
    let local = Local::start(&[]);
    let upstream = Upstream::hanging_at("/hang").await;
    let _agent = local.agent("web", &upstream.address());
    let calls = Calls::of(&local, "ingress").await;
    let status = async |target: &str| Request::to("web", "GET", target).send(local.public).await;
    assert_eq!(status("/").await.status, 200);

    let lost = Arc::new(Held::default());
    let fate = Arc::clone(&lost);
    calls.decide(move |operation, body| match operation {
        "StartSyncExecution" if body.contains("/hang") => Fate::Lost(Arc::clone(&fate)),
        _ => Fate::Done,
    });
    let hanging = status("/hang");
    let lose = async {
        tests::eventually("it is at the upstream", async || {
            upstream.recorded().iter().any(|request| request.target() == "/hang")
        })
        .await;
        lost.go_on.add_permits(1);
    };
    assert_problem(&tokio::join!(hanging, lose).0, 500, "edge_failed");
    // The run still waits, and the process that had begun it is asked again.
    for _ in 0..3 {
        assert_eq!(status("/").await.status, 200);
    }
    assert_eq!(calls.count(|operation, _| operation == "StartSyncExecution"), 5, "each by that one process");
}

#[tokio::test]
async fn the_end_of_a_connection_that_served_nothing_is_announced_to_nobody() {
    let local = Local::start(&[]);
    let upstream = Upstream::hanging_at("/hang").await;
    let agent = local.agent("web", &upstream.address());
    let calls = Calls::of(&local, "disconnect").await;
    // What a notice is about is its only attribute.
    let notices = || calls.count(|operation, _| operation == "SendMessageBatch");
    let ended = || calls.count(|operation, body| operation == "GetItem" && body.contains("#tunnels"));
    let token = local.issue("alice", &["web"]);
    for round in 1..=20 {
        drop(RawAgent::with(&local, &token).await);
        tests::eventually("its end is seen", async || ended() == round).await;
    }
    let mut hanging = Connection::open(local.public).await;
    hanging.begin(&Request::to("web", "GET", "/hang")).await;
    tests::eventually("it is at the upstream", async || !upstream.recorded().is_empty()).await;
    agent.process().signal(Signal::KILL);
    assert_problem(&hanging.answer("GET").await, 502, "agent_lost");
    let leased = local.dynamodb("Scan", json!({"TableName": "mailboxes"})).await;
    let leased = leased["Items"].as_array().unwrap().iter().filter(|row| row.get("holder").is_some()).count();
    tests::eventually("all are told", async || notices() >= leased).await;
    assert_eq!(notices(), leased, "of one connection");
}

#[tokio::test]
async fn a_websocket_handshake_is_refused_in_a_clean_way() {
    acceptance::a_websocket_handshake(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn what_fails_in_the_edge_itself_is_500() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let web = local.stack().tunnel("web");
    let _agent = web.agent(&upstream.address());
    // A machine that it may not start.
    let mut variables = local.variables("ingress").await;
    variables["TUNNEL_STATE_MACHINE_ARN"] = "arn:aws:states:local-1:000000000000:stateMachine:another".into();
    local.deploy("ingress", &variables).await;
    assert_problem(&web.get("/").await, 500, "edge_failed");
    assert!(upstream.recorded().is_empty());
}

#[tokio::test]
async fn ctrl_c_ends_every_child_and_the_ports_are_free_again() {
    let mut local = Local::start_with(&[]);
    let _ = local.process().wait_for_line(|line| line.contains("tunnel is open"));
    assert_eq!(Request::to("demo", "GET", "/").send(local.public).await.status, 200);
    let children = local.function_processes();
    assert!(children.iter().any(|(function, _)| function == "ingress"), "{children:?}");
    assert_eq!(local.stop(), Some(0), "{}", local.process().printed());
    for (function, pid) in children {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{function} lives on");
    }
    let public = local.public.to_string();
    let again =
        tests::process::Process::start("local", &["--public", &public, "--agents", "127.0.0.1:0"], &[]);
    let _ = again.wait_for_line(|line| line.starts_with("public"));

    let mut second =
        tests::process::Process::start("local", &["--public", &public, "--agents", "127.0.0.1:0"], &[]);
    assert_eq!(second.wait(), Some(1));
    let printed = second.printed();
    let port = local.public.port().to_string();
    assert!(
        printed.lines().count() == 1 && printed.contains(&port) && printed.contains("--public"),
        "{printed}"
    );
}
