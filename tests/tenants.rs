//! Limits of owners and tunnels: who exceeds one is refused, and nobody else notices.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use proto::message::Refusal;
use tests::{
    Local,
    client::{Answer, Connection, Request},
    operator::unix_now,
    raw_agent::RawAgent,
    upstream::Upstream,
};

fn is_refused(answer: &Answer) {
    let seen = (answer.status, answer.field("x-tunnel-error"));
    assert_eq!(seen, (429, Some("too_many_requests".into())), "{}", answer.text());
    assert!(answer.field("retry-after").is_some());
}

async fn get(local: &Local, tunnel: &str) -> Answer {
    Request::to(tunnel, "GET", "/").send(local.public).await
}

/// Agents with one upstream: `one` and `two` are alice's, `shop` is bob's.
async fn two_owners(limits: &str) -> (Local, Upstream, [tests::Agent; 2]) {
    let upstream = Upstream::hanging_at("/hang").await;
    let local = Local::start(&["--limits", limits]);
    let tunnel =
        |name: &str| format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n", upstream.address());
    let alice = local.token_file(&local.issue("alice", &["one", "two"]));
    let bob = local.token_file(&local.issue("bob", &["shop"]));
    let alice = local.agent_of(&alice, &[], &(tunnel("one") + &tunnel("two")), &["one", "two"]);
    let bob = local.agent_of(&bob, &[], &tunnel("shop"), &["shop"]);
    (local, upstream, [alice, bob])
}

/// Requests that stay in flight until they are dropped.
async fn hang(local: &Local, upstream: &Upstream, tunnels: &[&str]) -> Vec<Connection> {
    let mut hanging = Vec::new();
    for tunnel in tunnels {
        let before = upstream.recorded().len();
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to(tunnel, "GET", "/hang")).await;
        hanging.push(connection);
        tests::eventually("it is at the upstream", async || upstream.recorded().len() > before).await;
    }
    hanging
}

#[tokio::test]
async fn requests_in_flight_are_limited_by_tunnel() {
    let (local, upstream, _agents) = two_owners("tunnel_requests=2").await;
    let first = hang(&local, &upstream, &["one"]).await;
    assert_eq!(get(&local, "one").await.status, 200, "the second of two");
    let second = hang(&local, &upstream, &["one"]).await;
    let seen = upstream.recorded().len();
    is_refused(&get(&local, "one").await);
    assert_eq!(upstream.recorded().len(), seen, "it was not dispatched");
    assert_eq!(get(&local, "two").await.status, 200);
    assert_eq!(get(&local, "shop").await.status, 200);
    drop(first);
    tests::eventually("a place is free again", async || get(&local, "one").await.status == 200).await;
    drop(second);
}

#[tokio::test]
async fn requests_in_flight_are_limited_by_owner() {
    let (local, upstream, _agents) = two_owners("owner_requests=2,tunnel_requests=2").await;
    let hanging = hang(&local, &upstream, &["one", "two"]).await;
    is_refused(&get(&local, "one").await);
    is_refused(&get(&local, "two").await);
    let _bobs = hang(&local, &upstream, &["shop"]).await;
    assert_eq!(get(&local, "shop").await.status, 200);
    drop(hanging);
    // What the owner's limit refused took no place of the tunnel's.
    tests::eventually("both are free again", async || {
        get(&local, "one").await.status == 200 && get(&local, "two").await.status == 200
    })
    .await;
}

#[tokio::test]
async fn requests_a_minute_are_limited_by_tunnel_and_owner() {
    for (limits, tunnels) in [("tunnel_rate=5", ["one", "one"]), ("owner_rate=5", ["one", "two"])] {
        // A minute may turn meanwhile, with five more: then all of it is done once more.
        let (alice, bob, at_upstream) = loop {
            let (local, upstream, _agents) = two_owners(limits).await;
            let (mut alice, mut bob, minute) = (Vec::new(), Vec::new(), unix_now() / 60);
            for round in 0..20 {
                alice.push(get(&local, tunnels[round % 2]).await);
                bob.push(get(&local, "shop").await);
            }
            if unix_now() / 60 == minute {
                break (alice, bob, upstream.recorded().len());
            }
        };
        for (alice, bob) in alice.iter().zip(&bob).take(5) {
            assert_eq!((alice.status, bob.status), (200, 200), "{limits}: bob has five of his own");
        }
        for refused in alice[5..].iter().chain(&bob[5..]) {
            is_refused(refused);
        }
        assert_eq!(at_upstream, 10, "{limits}");
    }
}

#[tokio::test]
async fn what_is_not_limited_is_not_counted() {
    let (local, _upstream, _agents) = two_owners("").await;
    assert_eq!(get(&local, "one").await.status, 200);
    let before = local.counters().await;
    assert_eq!(get(&local, "one").await.status, 200);
    let after = local.counters().await;
    assert_eq!(before.get("dynamodb:UpdateItem"), after.get("dynamodb:UpdateItem"));
    assert_eq!(before.get("dynamodb:GetItem"), after.get("dynamodb:GetItem"));
}

#[tokio::test]
async fn connections_are_limited_by_owner() {
    let local = Local::start(&["--limits", "owner_connections=2"]);
    let token = local.issue("alice", &["*"]);
    let agent = async |id: &str| {
        let mut agent = RawAgent::with(&local, &token).await;
        agent.called(id);
        agent
    };
    let (mut a, mut b, mut c) = (agent("a").await, agent("b").await, agent("c").await);
    a.hello(&["one"]).await;
    b.hello(&["two"]).await;
    let welcome = c.ask_for(&["three", "four"]).await;
    assert!(welcome.tunnels.is_empty());
    assert!(
        welcome.refused.iter().all(|refused| refused.reason == Refusal::TooManyConnections),
        "{welcome:?}"
    );
    // Those who were there stay, and an agent may have its next connection before the last one ends.
    a.hello(&["one"]).await;
    let mut next = agent("a").await;
    next.hello(&["one"]).await;
    let mut bob = RawAgent::with(&local, &local.issue("bob", &["*"])).await;
    bob.hello(&["five"]).await;
    drop(b);
    tests::eventually("a place is free", async || c.ask_for(&["three"]).await.tunnels.len() == 1).await;
}

#[tokio::test]
async fn open_tunnels_are_limited_by_owner() {
    let local = Local::start(&["--limits", "owner_tunnels=3"]);
    let token = local.issue("alice", &["*"]);
    let mut a = RawAgent::with(&local, &token).await;
    a.hello(&["one", "two"]).await;
    let mut b = RawAgent::with(&local, &token).await;
    let welcome = b.ask_for(&["four", "one", "three"]).await;
    let open: Vec<_> = welcome.tunnels.iter().map(|tunnel| tunnel.name.as_str()).collect();
    assert_eq!(open, ["four", "one"], "a name that is open already counts once");
    assert_eq!(welcome.refused.len(), 1);
    assert_eq!((&*welcome.refused[0].name, welcome.refused[0].reason), ("three", Refusal::TooManyTunnels));
    a.hello(&["one", "two"]).await;
    a.hello(&["one"]).await;
    b.hello(&["four", "one", "three"]).await;
}

#[tokio::test]
async fn connections_are_limited_by_tunnel() {
    let local = Local::start(&["--limits", "tunnel_connections=1"]);
    let token = local.issue("alice", &["*"]);
    let agent = async |id: &str| {
        let mut agent = RawAgent::with(&local, &token).await;
        agent.called(id);
        agent
    };
    let (mut a, mut b) = (agent("a").await, agent("b").await);
    a.hello(&["one"]).await;
    let welcome = b.ask_for(&["one", "two"]).await;
    assert_eq!(welcome.tunnels[0].name.as_str(), "two");
    assert_eq!((&*welcome.refused[0].name, welcome.refused[0].reason), ("one", Refusal::TooManyConnections));
    a.hello(&["one"]).await;
    let mut next = agent("a").await;
    next.hello(&["one"]).await;
}
