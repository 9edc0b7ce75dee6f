//! Counts calls: runs `local` with an agent and an upstream, and leaves how often which call of AWS was made.

use rustix::process::Signal;
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

    Measured { small_request, download_gb, connect, disconnect, sweep: sweep().await }
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
        eventually("more sweeps", async || swept().await >= from + 4).await;
        let calls = local.counters().await;
        if made(&calls) == made(&before) {
            break (before, calls);
        }
    };
    // One may be under way at either end.
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
