//! Counts calls: runs `local` with an agent and an upstream, and leaves how often which call of AWS was made.

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::{Local, client::Request, eventually, noise, upstream::Upstream};

use crate::{Calls, Measured};

/// How many small requests are counted.
const REQUESTS: u32 = 100;

/// How long the response is whose calls are counted.
const DOWNLOAD: usize = 32 * 1024 * 1024;

/// Counts everything once.
pub async fn measure() -> Measured {
    let upstream = Upstream::start(|request, mut conn| async move {
        let body = if request.target() == "/download" { noise(1, DOWNLOAD) } else { b"hello".to_vec() };
        conn.answer("200 OK", "Content-Type: application/octet-stream\r\n", &body).await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);

    let before = settled(&local).await;
    let mut agent = local.agent("web", &upstream.address());
    let connect = since(&before, &settled(&local).await, 1.0);

    // The first request may start a process, which leases its mailbox.
    get(&local, "/").await;
    let before = settled(&local).await;
    for _ in 0..REQUESTS {
        get(&local, "/").await;
    }
    let small_request = since(&before, &settled(&local).await, f64::from(REQUESTS));

    let before = settled(&local).await;
    get(&local, "/download").await;
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    let gigabytes = DOWNLOAD as f64 / 1e9;
    // Without the request itself, which a longer response makes only once.
    let mut download_gb = since(&before, &settled(&local).await, gigabytes);
    for (call, count) in &mut download_gb {
        *count = (*count - small_request.get(call).copied().unwrap_or_default() / gigabytes).max(0.0).round();
    }
    download_gb.retain(|_, count| *count > 0.0);

    let before = settled(&local).await;
    agent.process().signal(Signal::TERM);
    agent.process_mut().wait();
    eventually("the connection's rows are gone", async || {
        local.counters().await.get("dynamodb:DeleteItem") > before.get("dynamodb:DeleteItem")
    })
    .await;
    let disconnect = since(&before, &settled(&local).await, 1.0);
    drop(local);

    let [delivery, parked, retry] = deliveries().await;
    Measured {
        small_request,
        download_gb,
        connect,
        disconnect,
        sweep: sweep().await,
        delivery,
        parked,
        retry,
    }
}

/// Among the calls: a state that a STANDARD run has entered.
pub const TRANSITION: &str = "states:transition";

/// What a small webhook calls that is kept and delivered at once, what it calls more that waits for its agent, and what each
/// further attempt calls.
async fn deliveries() -> [Calls; 3] {
    const COUNT: u32 = 10;
    let upstream = Upstream::start(|request, mut conn| async move {
        let is_first = request.all("x-tunnel-delivery-attempt") == ["1"];
        let fails = is_first && request.target() == "/twice";
        let status = if fails { "503 Busy" } else { "200 OK" };
        conn.answer(status, "", b"").await.then_some(conn)
    })
    .await;
    let local = Local::start(&[]);
    // None is refused for want of a place: that would be an attempt more.
    let tunnel = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ max_concurrent = {COUNT}, backoff = {{ base = \"1s\", max = \"1s\" }} }}\n",
        upstream.address()
    );
    let send = async |target: &str| {
        for _ in 0..COUNT {
            let webhook = Request::to("hooks", "POST", target).body(noise(1, 1000));
            assert_eq!(webhook.send(local.public).await.status, 202);
        }
    };
    let delivered = async |times: u32| {
        let count = (times * COUNT) as usize;
        eventually("all are delivered", async || upstream.look(<[_]>::len) >= count).await;
        eventually("their runs have ended", async || {
            runs(&local).await.iter().all(|run| run["status"] != "RUNNING")
        })
        .await;
        counted(&local).await
    };
    let mut agent = local.agent_with(&tunnel, &["hooks"]);
    // The first ones start processes; and an agent says `hello` once more after two seconds, which is no part of a delivery.
    send("/once").await;
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let before = delivered(1).await;
    send("/once").await;
    let once = delivered(2).await;
    let delivery = since(&before, &once, f64::from(COUNT));
    send("/twice").await;
    let twice = delivered(4).await;
    let retry = more(&since(&once, &twice, f64::from(COUNT)), &delivery);
    agent.process().signal(Signal::TERM);
    agent.process_mut().wait();
    let before = counted(&local).await;
    send("/once").await;
    counted(&local).await;
    let _agent = local.agent_with(&tunnel, &["hooks"]);
    let parked = since(&before, &delivered(5).await, f64::from(COUNT));
    // An agent's coming is counted apart; it is spread over a few here.
    [delivery.clone(), more(&parked, &delivery), retry]
}

async fn runs(local: &Local) -> Vec<Value> {
    let machine = local.variables("ingress").await["TUNNEL_DELIVERY_MACHINE_ARN"].clone();
    let asked = json!({"stateMachineArn": machine});
    let listed = local.states("ListExecutions", asked).await;
    listed["executions"].as_array().cloned().unwrap_or_default()
}

/// What has been called once nothing goes on any more, and the states that runs have entered.
async fn counted(local: &Local) -> std::collections::BTreeMap<String, u64> {
    let mut counts = settled(local).await;
    let mut entered = 0;
    for run in runs(local).await {
        let asked = json!({"executionArn": run["executionArn"], "maxResults": 1000});
        let history = local.states("GetExecutionHistory", asked).await;
        let is_entered =
            |event: &&Value| event["type"].as_str().is_some_and(|kind| kind.ends_with("StateEntered"));
        entered += history["events"].as_array().into_iter().flatten().filter(is_entered).count() as u64;
    }
    counts.insert(TRANSITION.to_owned(), entered);
    counts.retain(|call, _| !["states:ListExecutions", "states:GetExecutionHistory"].contains(&&**call));
    counts
}

/// By how much each count is larger.
fn more(all: &Calls, less: &Calls) -> Calls {
    let grown =
        all.iter().map(|(call, count)| (call.clone(), count - less.get(call).copied().unwrap_or(0.0)));
    grown
        .filter(|(_, count)| *count > 0.005)
        .map(|(call, count)| (call, (count * 100.0).round() / 100.0))
        .collect()
}

/// What a sweep calls that has nothing to do.
async fn sweep() -> Calls {
    // A sweep each half second. Nothing else calls anything.
    let local = Local::start(&["--chaos", "clock=600", "--mailboxes", "1"]);
    let swept = async || local.metrics().await.get("MailboxesFree").map_or(0, |series| series.count);
    eventually("a sweep has found the pool as it should be", async || swept().await >= 3).await;
    let made = |calls: &Counters| calls.get("sqs:CreateQueue").copied();
    // A process that starts meanwhile takes a mailbox, and the next sweep makes another: that is no sweep without work.
    let (before, calls) = loop {
        let (from, before) = (swept().await, local.counters().await);
        eventually("more sweeps", async || swept().await >= from + 8).await;
        let calls = local.counters().await;
        if made(&calls) == made(&before) {
            break (before, calls);
        }
    };
    // One may be under way at either end: of eight it rounds away.
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let sweeps = (calls["sqs:ListQueues"] - before["sqs:ListQueues"]) as f64;
    let each = since(&before, &calls, sweeps).into_iter().map(|(call, count)| (call, count.round()));
    each.filter(|(_, count)| *count > 0.0).collect()
}

async fn get(local: &Local, target: &str) {
    let answer = Request::to("web", "GET", target).send(local.public).await;
    assert!(answer.status == 200 && answer.complete, "{target}: {}", answer.status);
}

type Counters = std::collections::BTreeMap<String, u64>;

/// The counters, once nothing moves any more.
async fn settled(local: &Local) -> Counters {
    let mut last = local.counters().await;
    eventually("the calls are over", async || {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let now = local.counters().await;
        let same = now == last;
        last = now;
        same
    })
    .await;
    last
}

fn since(before: &Counters, after: &Counters, divisor: f64) -> Calls {
    let count = |call: &String, count: u64| {
        let made = count - before.get(call).copied().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        let each = made as f64 / divisor;
        (made > 0).then(|| (call.clone(), (each * 100.0).round() / 100.0))
    };
    after.iter().filter_map(|(call, &number)| count(call, number)).collect()
}
