//! What whoever runs the edge sees of it: metrics, one request id everywhere, a pool of mailboxes that
//! is looked after.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tests::{
    Local,
    client::{Connection, Request},
    eventually, noise,
    raw_agent::RawAgent,
    upstream::Upstream,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    time::timeout,
};

/// Opens the agents' address with a token, and returns the status line.
async fn knock(local: &Local, token: &str) -> String {
    let address = local.agents.strip_prefix("ws://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 1024];
    let read = timeout(tests::PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer[..read]).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn metrics_say_how_requests_ended_and_one_id_is_found_everywhere() {
    let upstream = Upstream::echo().await;
    // The clock makes `sweep` run, which counts the agents.
    let local = Local::start(&["--chaos", "clock=100"]);
    let agent = local.agent("web", &upstream.address());
    let answered = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!(answered.status, 200);
    assert_eq!(Request::to("nobody", "GET", "/").send(local.public).await.status, 404);
    assert!(knock(&local, "not.a.token").await.contains("403"));
    eventually("everything that happened is in the metrics", async || {
        let metrics = local.metrics().await;
        let sum = |name: &str| metrics.get(name).map_or(0.0, |series| series.sum);
        sum("Requests Outcome=answered") == 1.0
            && sum("Requests Outcome=no_such_tunnel") == 1.0
            && sum("TokensRefused") == 1.0
            && metrics.get("AgentsConnected").is_some_and(|series| series.last == 1.0)
            && metrics.contains_key("MailboxesFree")
    })
    .await;
    let metrics = local.metrics().await;
    assert_eq!(metrics["Latency"].count, 1, "only what was answered has one");
    assert!(metrics["Latency"].sum > 0.0 && metrics["Latency"].sum < 60_000.0);
    // `authorizer`, `connect`, `response`, `ingress` and `sweep` at least.
    assert!(metrics["ColdStarts"].sum >= 5.0, "{metrics:?}");
    assert!(!metrics.contains_key("RunFailures") && !metrics.contains_key("Throttles"), "{metrics:?}");
    assert!(!metrics.contains_key("OldestMessage"), "{metrics:?}");

    let id = answered.field("x-tunnel-request-id").unwrap();
    agent.process().wait_for_line(|line| line.contains(&id));
    let run = local.own(&format!("traces/{id}")).await;
    assert!(run.contains("AwaitReply"), "the run goes by the request's id: {run}");
    assert_eq!(upstream.recorded()[0].all("x-tunnel-request-id"), [id]);
}

#[tokio::test]
async fn a_request_that_the_agent_breaks_off_is_counted_as_broken() {
    let upstream = Upstream::start(|_, mut conn| async move {
        conn.write("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n").await;
        conn.write(noise(1, 500_000)).await;
        None
    })
    .await;
    let local = Local::start(&[]);
    let _agent = local.agent("web", &upstream.address());
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert!(answer.status == 200 && !answer.complete, "{}", answer.status);
    eventually("it is counted", async || local.metrics().await.contains_key("Requests Outcome=broken")).await;
}

#[tokio::test]
async fn a_message_that_lies_in_its_mailbox_while_it_is_waited_for_is_told_about() {
    /// How long `ingress` stands still while a message lies there for it.
    const STILL: Duration = Duration::from_millis(1500);
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let mut connection = Connection::open(local.public).await;
    connection.begin(&Request::to("web", "GET", "/")).await;
    let call = agent.request().await;
    agent.say(call.reply("begun, ", false)).await;
    assert_eq!(connection.head().await.status, 200);
    let processes = local.function_processes();
    let [(_, ingress)] = &processes.iter().filter(|(name, _)| name == "ingress").collect::<Vec<_>>()[..]
    else {
        panic!("one request, one process: {processes:?}");
    };
    let ingress = Pid::from_raw(i32::try_from(*ingress).unwrap()).unwrap();
    kill_process(ingress, Signal::STOP).unwrap();
    agent.say(call.chunk(1, "done", true)).await;
    // The age is what is tested, so it has to pass.
    tokio::time::sleep(STILL).await;
    kill_process(ingress, Signal::CONT).unwrap();
    assert_eq!(connection.chunked_body().await, b"begun, done");
    eventually("it is told", async || local.metrics().await.contains_key("OldestMessage")).await;
    let oldest = &local.metrics().await["OldestMessage"];
    assert!(oldest.count == 1 && oldest.max >= 1.0 && oldest.max < 20.0, "{oldest:?}");
}

#[tokio::test]
async fn the_first_mailboxes_are_there_before_a_sweep_looks_for_strays() {
    // A sweep each tenth of a second, and a queue that no row names is deleted after one.
    let local = Local::start(&["--chaos", "clock=3600"]);
    let count = async |call: &str| local.counters().await.get(call).copied().unwrap_or(0);
    eventually("there were three sweeps", async || count("sqs:ListQueues").await >= 3).await;
    // Only such a queue is asked for its age.
    assert_eq!(count("sqs:GetQueueAttributes").await, 0);
    // One may be leased by then, and replaced.
    assert!(count("sqs:CreateQueue").await < 10);
}

#[tokio::test]
async fn surplus_mailboxes_are_deleted_and_no_request_notices() {
    const BURST: usize = 10;
    const KEPT: &str = "2";
    let gate = Arc::new(Semaphore::new(0));
    let arrived = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let upstream = Upstream::start({
        let (gate, arrived) = (Arc::clone(&gate), Arc::clone(&arrived));
        move |recorded, mut conn| {
            let (gate, arrived) = (Arc::clone(&gate), Arc::clone(&arrived));
            async move {
                if recorded.target() == "/burst" {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                }
                conn.answer("200 OK", "", b"done").await.then_some(conn)
            }
        }
    })
    .await;
    // A sweep each half second, leases of four, and surplus after six.
    let local = Local::start(&["--chaos", "clock=600", "--mailboxes", KEPT]);
    let _agent = local.agent("web", &upstream.address());
    let mut burst = tokio::task::JoinSet::new();
    for _ in 0..BURST {
        let public = local.public;
        burst.spawn(async move { Request::to("web", "GET", "/burst").send(public).await.status });
    }
    eventually("all of the burst is under way", async || arrived.load(Ordering::SeqCst) == BURST).await;
    gate.add_permits(BURST);
    while let Some(status) = burst.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    let count = async |call: &str| local.counters().await.get(call).copied().unwrap_or(0);
    assert!(count("sqs:CreateQueue").await >= BURST as u64 - 2, "each process has a mailbox of its own");
    // Whoever serves meanwhile keeps its mailbox, or gets another one.
    eventually("the surplus is gone", async || {
        assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 200);
        let (made, deleted) = (count("sqs:CreateQueue").await, count("sqs:DeleteQueue").await);
        deleted >= BURST as u64 / 2 && made + 2 <= deleted + 5
    })
    .await;
    let metrics = local.metrics().await;
    assert!(metrics["MailboxesFree"].max >= BURST as f64 / 2.0, "{metrics:?}");
    assert!(metrics["MailboxesFree"].last >= 1.0, "{metrics:?}");
}

/// However many deliveries wait: what takes long comes after what is soon done and what others wait for.
#[tokio::test]
async fn a_sweep_looks_after_mailboxes_before_deliveries() {
    let aws = Upstream::start(|call, mut conn| async move {
        let is_query = call.all("x-amz-target").iter().any(|target| target.ends_with(".Query"));
        let empty: &[u8] = if is_query { br#"{"Items":[],"Count":0,"ScannedCount":0}"# } else { b"{}" };
        conn.answer("200 OK", "", empty).await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let mut variables = local.variables("sweep").await;
    variables["AWS_ENDPOINT_URL"] = format!("http://{}", aws.address()).into();
    local.deploy("sweep", &variables).await;
    let swept = local.invoke("sweep", &serde_json::json!({})).await;
    assert_eq!((swept.status, swept.field("x-amz-function-error")), (200, None), "{}", swept.text());
    let calls: Vec<_> = aws.recorded().iter().flat_map(|call| call.all("x-amz-target")).collect();
    let first = |operation: &str| {
        let found = calls.iter().position(|call| call.ends_with(operation));
        found.unwrap_or_else(|| panic!("no {operation} among {calls:?}"))
    };
    // The list of queues is asked for the mailboxes' sake, and dead letters for the deliveries'.
    assert!(first(".ListQueues") < first(".ReceiveMessage"), "{calls:?}");
}

/// CloudFormation is told once how it went, a failure too, and the invocation succeeds then: Lambda would play a failed one
/// again, after the stack has been rolled back. Where it could not be told, playing it again is what is wanted.
#[tokio::test]
async fn the_stack_is_told_once_and_only_an_untold_answer_is_tried_again() {
    let formation = Upstream::start(|request, mut conn| async move {
        let status = if request.target() == "/deaf" { "503 Service Unavailable" } else { "200 OK" };
        conn.answer(status, "", b"").await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    let event = |kind: &str, path: &str| {
        serde_json::json!({
            "RequestType": kind,
            "ResponseURL": format!("http://{}{path}", formation.address()),
            "StackId": "stack",
            "RequestId": "request",
            "LogicalResourceId": "Mailboxes",
            "ResourceType": "Custom::Mailboxes",
        })
    };
    let told = || -> Vec<serde_json::Value> {
        formation.recorded().iter().map(|put| serde_json::from_slice(&put.body).unwrap()).collect()
    };
    let made = local.invoke("sweep", &event("Create", "/made")).await;
    assert_eq!((made.status, made.field("x-amz-function-error")), (200, None), "{}", made.text());
    // It may not read what it is told to look after.
    let mut variables = local.variables("sweep").await;
    variables["TUNNEL_MAILBOXES_TABLE"] = "somebody-elses".into();
    local.deploy("sweep", &variables).await;
    let failed = local.invoke("sweep", &event("Create", "/failed")).await;
    assert_eq!((failed.status, failed.field("x-amz-function-error")), (200, None), "{}", failed.text());
    let statuses: Vec<_> = told().iter().map(|answer| answer["Status"].clone()).collect();
    assert_eq!(statuses, ["SUCCESS", "FAILED"]);
    let untold = local.invoke("sweep", &event("Create", "/deaf")).await;
    assert!(untold.field("x-amz-function-error").is_some(), "{}", untold.text());
    assert_eq!(told().len(), 3, "one answer each");
}
