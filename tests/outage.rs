//! The agent or its network goes, and comes back.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::json;
use tests::{
    Local,
    client::{Connection, Request},
    proxy::Proxy,
    upstream::Upstream,
};
use tokio::sync::Mutex;

/// The tests that need the machine take turns.
static MACHINE: Mutex<()> = Mutex::const_new(());

fn agents_address(local: &Local) -> SocketAddr {
    local.agents.trim_start_matches("ws://").parse().unwrap()
}

fn tunnel(name: &str, upstream: &str) -> String {
    format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{upstream}\"\n")
}

async fn status(local: &Local, name: &str) -> u16 {
    Request::to(name, "GET", "/").send(local.public).await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_ends_fifty_requests_honestly_and_is_served_again_soon() {
    const IN_FLIGHT: usize = 50;
    let _machine = MACHINE.lock().await;
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&[]);
    let mut agent = local.agent("web", &upstream.address());
    let mut hanging = Vec::new();
    for _ in 0..IN_FLIGHT {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", "/hang")).await;
        hanging.push(connection);
    }
    tests::eventually("all are at the upstream", async || upstream.recorded().len() == IN_FLIGHT).await;
    let killed = Instant::now();
    agent.process().signal(Signal::KILL);
    assert_eq!(agent.process_mut().wait(), None);
    // The edge notices at once: the kernel closes the killed process's socket.
    let answers: Vec<_> = hanging
        .into_iter()
        .map(|mut connection| {
            tokio::spawn(async move {
                let answer = connection.answer("GET").await;
                (answer.status, answer.field("x-tunnel-error"), answer.complete, killed.elapsed())
            })
        })
        .collect();
    let mut last = Duration::ZERO;
    for answer in answers {
        let (status, code, complete, after) = answer.await.unwrap();
        let honest = [(502, "agent_lost"), (503, "tunnel_offline")];
        assert!(honest.contains(&(status, code.as_deref().unwrap_or(""))) && complete, "{status} {code:?}");
        last = last.max(after);
    }
    println!("{IN_FLIGHT} requests ended within {last:?} of the kill");
    assert!(last <= Duration::from_secs(2), "the last request ended {last:?} after the kill");

    let back = Instant::now();
    let _again = local.agent_with(&tunnel("web", &upstream.address()), &[]);
    tests::eventually("the tunnel is served again", async || status(&local, "web").await == 200).await;
    println!("served {:?} after the process was started again", back.elapsed());
    assert!(back.elapsed() <= Duration::from_secs(3), "served again after {:?}", back.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_partition_is_noticed_at_every_rhythm_and_healed_without_a_restart() {
    let upstream = Upstream::echo().await;
    // As it is, before anything is known of the edge; then an edge that answers pings and one that does not, with what comes in
    // 25 s come in 5 s.
    let locals = [&[][..], &["--chaos", "clock=5"], &["--chaos", "clock=5"]].map(Local::start);
    let proxies = [
        Proxy::start(agents_address(&locals[0])).await,
        Proxy::start(agents_address(&locals[1])).await,
        Proxy::without_pongs(agents_address(&locals[2])).await,
    ];
    let web = tunnel("web", &upstream.address());
    let agents = [0, 1, 2].map(|at| {
        let edge = format!("ws://{}", proxies[at].address);
        locals[at].agent_in(&[("AGENTD_EDGE", &edge)], &web, &["web"])
    });
    for local in &locals {
        assert_eq!(status(local, "web").await, 200);
    }
    for (agent, rhythm) in [(&agents[1], "watched by pings"), (&agents[2], "watched by heartbeats")] {
        tests::eventually(rhythm, async || agent.ask(&["status"]).1.contains(rhythm)).await;
    }

    let cut = Instant::now();
    for proxy in &proxies {
        proxy.silence();
    }
    // 25, 5 or 5 s until the next sign of life, 5 s for a ping's answer where pings are sent, 10 s for a heartbeat's; and
    // as much again for a busy machine, where there is room.
    for (at, most) in [(2, 30), (1, 40), (0, 40)] {
        let _ = agents[at].process().wait_for_line(|line| line.contains("connection lost"));
        println!("noticed after {:?}", cut.elapsed());
        assert!(cut.elapsed() <= Duration::from_secs(most), "{at}: noticed after {:?}", cut.elapsed());
    }

    for ((local, proxy), agent) in locals.iter().zip(&proxies).zip(&agents) {
        proxy.open();
        let _ = agent.process().wait_for_lines(2, |line| line.contains("\"connected\""));
        tests::eventually("the tunnel is served again", async || status(local, "web").await == 200).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_agents_that_lose_the_edge_come_back_spread_out() {
    const AGENTS: usize = 200;
    /// By then the delays have grown: most agents wait for up to 16 s.
    const TRIES: usize = 5;
    let _machine = MACHINE.lock().await;
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let proxy = Proxy::start(agents_address(&local)).await;
    let edge = format!("ws://{}", proxy.address);
    let names: Vec<String> = (0..AGENTS).map(|number| format!("agent{number}")).collect();
    let mut agents = Vec::new();
    for batch in names.chunks(10) {
        for name in batch {
            let tunnel = tunnel(name, &upstream.address());
            agents.push(local.agent_in(&[("AGENTD_EDGE", &edge)], &tunnel, &[]));
        }
        for agent in &agents[agents.len() - batch.len()..] {
            let _ = agent.process().wait_for_line(|line| line.contains("tunnel is open"));
        }
    }

    proxy.break_all();
    tests::eventually("every agent has tried", async || proxy.refused() >= TRIES * AGENTS).await;
    proxy.open();
    let back = Instant::now();
    for agent in &agents {
        let _ = agent.process().wait_for_lines(2, |line| line.contains("\"connected\""));
    }
    let took = back.elapsed();
    let mut arrivals = proxy.accepted_since(back);
    arrivals.sort_unstable();
    // The most that come within any one second.
    let within_a_second = |from: &Duration| {
        arrivals.iter().filter(|at| **at >= *from && **at < *from + Duration::from_secs(1)).count()
    };
    let peak = arrivals.iter().map(within_a_second).max().unwrap();
    println!("{AGENTS} agents were back after {took:?}; at most {peak} came within a second");
    assert!(took <= Duration::from_secs(60), "the last was back after {took:?}");
    assert!(arrivals.len() >= AGENTS && peak <= AGENTS / 4, "{peak} of {} at once", arrivals.len());
    assert_eq!(status(&local, &names[AGENTS - 1]).await, 200);
}

/// Each round writes rows from several callers at once and kills the edge in the middle, at a moment that is drawn: what
/// was answered is there after it, and what was there stays.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_edge_has_answered_is_there_when_it_is_back() {
    const ROUNDS: u64 = 4;
    let _machine = MACHINE.lock().await;
    let mut local = Local::start(&[]);
    let mut answered: Vec<String> = Vec::new();
    for round in 0..ROUNDS {
        let operator = local.operator();
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let operator = operator.clone();
                tokio::spawn(async move {
                    let mut answered = Vec::new();
                    for number in 0.. {
                        let row = format!("{round}-{writer}-{number}");
                        let item = json!({"tunnel": {"S": "kept"}, "connection_id": {"S": row}, "text": {"S": "x".repeat(500)}});
                        let put = json!({"TableName": "connections", "Item": item});
                        if !operator.acknowledged("DynamoDB_20120810.PutItem", &put).await {
                            return answered;
                        }
                        answered.push(row);
                    }
                    answered
                })
            })
            .collect();
        let before = getrandom::u64().unwrap() % 300;
        tokio::time::sleep(Duration::from_millis(before)).await;
        local.kill_and_start_again(&["--no-agent"]);
        let mut count = 0;
        for writer in writers {
            let rows = writer.await.unwrap();
            count += rows.len();
            answered.extend(rows);
        }
        println!("killed after {before} ms and {count} answers");
        let mut there = std::collections::BTreeSet::new();
        let mut query = json!({
            "TableName": "connections", "KeyConditionExpression": "tunnel = :tunnel",
            "ExpressionAttributeValues": {":tunnel": {"S": "kept"}}, "ProjectionExpression": "connection_id",
        });
        loop {
            let page = local.dynamodb("Query", query.clone()).await;
            let ids = page["Items"].as_array().unwrap().iter();
            there.extend(ids.map(|item| item["connection_id"]["S"].as_str().unwrap().to_owned()));
            match page.get("LastEvaluatedKey") {
                Some(key) => query["ExclusiveStartKey"] = key.clone(),
                None => break,
            }
        }
        let lost: Vec<_> = answered.iter().filter(|row| !there.contains(*row)).collect();
        assert!(lost.is_empty(), "lost {lost:?} of {}", answered.len());
    }
    assert!(!answered.is_empty());
}
