//! A public request through the whole designed path and back: `local`, its functions, `agentd`, an
//! upstream.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::time::Instant;

use proto::limits;
use tests::{Local, acceptance, client::Request, noise, upstream::Upstream};

#[tokio::test]
async fn the_demo_answers_by_host_and_by_path() {
    let local = Local::start_with(&[]);
    let _ = local.process().wait_for_line(|line| line.contains("tunnel is open"));
    for request in [
        Request::new("GET", "/").field("Host", "demo.localhost").field("Accept", "text/html"),
        Request::new("GET", "/demo/").field("Host", "127.0.0.1").field("Accept", "text/html"),
    ] {
        let answer = request.send(local.public).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.field("content-type").unwrap().starts_with("text/html"));
        assert!(answer.text().contains("--name web"), "says what to type next");
        assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
        let id = answer.field("x-tunnel-request-id").unwrap();
        assert!(answer.text().contains(&id), "shows how this very request travelled");
    }
}

#[tokio::test]
async fn method_target_fields_and_status_are_carried_as_they_are() {
    acceptance::carries_everything_of_a_head(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn bodies_of_every_awkward_size_pass_both_ways() {
    acceptance::bodies_of_every_awkward_size(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn a_body_over_the_ceiling_is_refused_before_the_upstream_is_called() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let over = limits::REQUEST_BODY_BYTES + 1;
    for size in [over, 8 * 1024 * 1024] {
        let answer = Request::to("web", "POST", "/").body(noise(1, size)).send(local.public).await;
        assert_eq!(answer.status, 413, "{size}");
        assert_eq!(answer.field("x-tunnel-error").unwrap(), "request_too_large");
        assert_eq!(answer.field("x-tunnel-request-id").unwrap().len(), 32);
        assert!(answer.text().contains("4715520"), "names the limit: {}", answer.text());
    }
    assert!(upstream.recorded().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_clients_get_their_own_answers() {
    acceptance::many_clients(Local::start(&[]).stack()).await;
}

#[tokio::test]
async fn a_small_request_makes_the_designed_calls_and_no_other() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    // The first request may start processes, which lease their mailboxes.
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    let settled = async || {
        let mut before = local.counters().await;
        tests::eventually("the calls of the last request are over", async || {
            let now = local.counters().await;
            let same = now == before;
            before = now;
            same
        })
        .await;
        before
    };
    let before = settled().await;
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
    let after = settled().await;
    let made: Vec<(String, u64)> = after
        .iter()
        .map(|(call, count)| (call.clone(), count - before.get(call).copied().unwrap_or(0)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let count = |call: &str| made.iter().find(|(own, _)| own == call).map_or(0, |(_, count)| *count);
    assert_eq!(count("states:StartSyncExecution"), 1, "{made:?}");
    assert_eq!(count("dynamodb:Query"), 1, "{made:?}");
    assert_eq!(count("apigateway:invoke POST"), 1, "{made:?}");
    assert_eq!(count("sqs:SendMessage"), 1, "{made:?}");
    assert!((1..=2).contains(&count("sqs:ReceiveMessage")), "{made:?}");
    assert_eq!(made.len(), 5, "and nothing else, its message is deleted later: {made:?}");
}

#[tokio::test]
async fn the_messages_of_ten_requests_are_deleted_by_one_call() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let count = async |call: &str| local.counters().await.get(call).copied().unwrap_or_default();
    let begun = Instant::now();
    let mut sent = 0;
    // Each process of `ingress` keeps up to nine.
    while count("sqs:DeleteMessageBatch").await < 3 {
        assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
        sent += 1;
        let processes = local.function_processes();
        let processes = processes.iter().filter(|(function, _)| function == "ingress").count();
        assert!(sent <= 30 + 9 * processes, "{sent} requests, {processes} processes");
    }
    assert!(sent >= 30, "{sent} requests");
    let alone = count("sqs:DeleteMessage").await;
    assert!(alone == 0 || begun.elapsed() > limits::MAILBOX_DELETE_AFTER, "{alone} were deleted alone");
}

#[tokio::test]
async fn path_mode_moves_what_the_upstream_says_about_its_paths() {
    acceptance::path_mode(&Local::start(&[]).stack_by_path()).await;
}
