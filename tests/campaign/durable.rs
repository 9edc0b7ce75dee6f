//! Runs about deliveries: webhooks come while agents and every part of the edge are killed and its legs misbehave. None that
//! was accepted may be lost, come twice without saying so, or overtake one of its key.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ::tests::{
    Agent, Local,
    client::Request,
    upstream::{Conn, Recorded, Upstream},
};
use anyhow::{Context, ensure};
use fastrand::Rng;
use rustix::process::{Pid, Signal};
use tokio::{sync::watch, task::JoinSet, time::sleep};

use crate::{
    oracle::Tally,
    run::Outcome,
    scenario::{LEGS, LOSE},
};

const TUNNEL: &str = "hooks";

/// How many keys there are: what has the same one is ordered.
const KEYS: usize = 6;

/// How long a sender tries one webhook.
const SENDER: Duration = Duration::from_secs(90);

/// How many times faster pauses and the times between sweeps pass. What the bounds of a task are for stays as long as it is.
const CLOCK: u32 = 10;

/// How long the edge may take to deliver what it has, once everything is there again. A parked run that nobody woke is found by
/// the next sweep, half a minute away on this clock, and a lost answer by the task's time-out.
const DELIVERED: Duration = Duration::from_secs(120);

/// A webhook as it came to the service.
#[derive(Debug, Clone)]
struct Came {
    key: usize,
    number: u64,
    attempt: u32,
}

/// What is wrong with what came, in the order in which it came. Pure.
fn judge(accepted: &BTreeSet<u64>, came: &[Came]) -> Vec<String> {
    let mut wrong = Vec::new();
    let seen: BTreeSet<u64> = came.iter().map(|one| one.number).collect();
    let lost: Vec<_> = accepted.difference(&seen).take(5).collect();
    if !lost.is_empty() {
        wrong.push(format!("accepted and never delivered: {lost:?}"));
    }
    let mut attempts = BTreeSet::new();
    let mut last: BTreeMap<usize, u64> = BTreeMap::new();
    for Came { key, number, attempt } in came {
        if !attempts.insert((number, attempt)) {
            wrong.push(format!("{number} came twice as attempt {attempt}"));
        }
        let before = last.insert(*key, *number);
        if let Some(before) = before.filter(|before| before > number) {
            wrong.push(format!("{number} came after {before} of the same key"));
        }
    }
    wrong
}

/// What is done to the edge and to the agent meanwhile.
#[derive(Debug, Clone, Copy)]
enum Blow {
    Function(&'static str),
    Local,
    Agent,
}

impl Blow {
    const ALL: [Self; 9] = [
        Self::Function("ingress"),
        Self::Function("ingress"),
        Self::Function("response"),
        Self::Function("response"),
        Self::Function("connect"),
        Self::Function("deliver"),
        Self::Function("deliver"),
        Self::Local,
        Self::Agent,
    ];
}

/// Runs one seed.
pub(crate) async fn run(seed: u64, webhooks: usize) -> Outcome {
    let begun = Instant::now();
    let mut tally = Tally::default();
    let mut printed = String::new();
    let ended = stage(seed, webhooks, &mut tally, &mut printed).await;
    let mut problems = tally.wrong.clone();
    problems.truncate(8);
    problems.extend(ended.err().map(|error| format!("{error:#}")));
    let failure = (!problems.is_empty()).then(|| (problems.join("\n"), printed));
    Outcome { tally, failure, took: begun.elapsed() }
}

/// What goes wrong on the legs; a third of the runs has legs that hold.
fn legs(random: &mut Rng, seed: u64) -> Vec<String> {
    let holds = random.u8(..3) == 0;
    let mut text = format!("seed={seed},clock={CLOCK}");
    for (name, most) in LEGS.iter().chain([&LOSE]) {
        if !holds && random.bool() {
            text.push_str(&format!(",{name}={:.4}", random.f64() * most));
        }
    }
    vec!["--chaos".to_owned(), text]
}

async fn stage(seed: u64, webhooks: usize, tally: &mut Tally, printed: &mut String) -> anyhow::Result<()> {
    let mut random = Rng::with_seed(seed);
    let flags = [vec!["--no-agent".to_owned()], legs(&mut random, seed)].concat();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut local = Local::start_with(&flags);
    let failing = random.f64() * 0.2;
    let upstream = upstream(seed, failing).await;
    // As often as not nobody is there while they come.
    let is_away = random.bool();
    let mode = if is_away { "auto" } else { "durable" };
    let tunnels = format!(
        "[[tunnel]]\nname = \"{TUNNEL}\"\nupstream = \"{}\"\ndelivery = \"{mode}\"\n\
         durable = {{ order_by = \"header:x-key\", dedupe_by = \"header:x-id\", attempts = 50, timeout = \"5s\", \
         max_concurrent = {}, backoff = {{ base = \"1s\", max = \"1s\" }} }}\n",
        upstream.address(),
        random.u32(1..=16)
    );
    let mut agent = Some(local.agent_with(&tunnels, &[TUNNEL]));
    if is_away {
        stop(&mut agent);
    }
    let (left, mut remaining) = watch::channel(webhooks as u64);
    let left = Arc::new(left);
    let mut senders = JoinSet::new();
    for key in 0..KEYS {
        senders.spawn(send(local.public, seed, key, webhooks, Arc::clone(&left)));
    }
    drop(left);
    let blows: Vec<(u64, Blow)> = (0..random.usize(1..=6))
        .map(|_| (random.u64(..webhooks as u64), Blow::ALL[random.usize(..Blow::ALL.len())]))
        .collect();
    let mut blows = blows;
    blows.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    let mut accepted = BTreeSet::new();
    let mut failed = None;
    for (at, blow) in blows {
        // Webhooks go on to come while it is made; where they are over, it is made to what is delivered.
        let _ = remaining.wait_for(|left| *left <= at).await;
        make(blow, &mut local, &mut agent, &flags, &tunnels);
    }
    while let Some(ended) = senders.join_next().await {
        match ended.context("a sender ended early")? {
            Ok(numbers) => accepted.extend(numbers),
            Err(error) => failed = Some(error),
        }
    }
    if agent.is_none() {
        agent = Some(local.agent_with(&tunnels, &[TUNNEL]));
    }
    // Once more, while they are delivered.
    sleep(Duration::from_millis(random.u64(..400))).await;
    make(Blow::ALL[random.usize(..Blow::ALL.len())], &mut local, &mut agent, &flags, &tunnels);
    if agent.is_none() {
        agent = Some(local.agent_with(&tunnels, &[TUNNEL]));
    }
    tally.requests = accepted.len() as u64;
    if accepted.is_empty() {
        tally.wrong.push("no webhook was kept, so the run shows nothing".to_owned());
    }
    let agent = agent.context("an agent")?;
    let drained = drained(&agent, &upstream, &accepted).await;
    let came: Vec<Came> = upstream.recorded().iter().filter_map(came).collect();
    tally.wrong.extend(judge(&accepted, &came));
    let seen: BTreeSet<u64> = came.iter().map(|one| one.number).collect();
    tally.right = accepted.intersection(&seen).count() as u64;
    tally.repeated = came.iter().filter(|one| one.attempt > 1).count() as u64;
    if failed.is_some() || drained.is_err() || !tally.wrong.is_empty() {
        let tail = |text: String| {
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(60)..].join("\n")
        };
        let list = agent.ask(&["delivery", "list", "--limit", "1000"]).1;
        *printed = format!(
            "--- deliveries\n{list}\n--- agentd\n{}\n--- local\n{}\n",
            tail(agent.process().printed()),
            tail(local.process().printed())
        );
    }
    drained?;
    failed.map_or(Ok(()), Err)
}

/// A service that fails now and then, at first.
async fn upstream(seed: u64, failing: f64) -> Upstream {
    Upstream::start(move |request: Recorded, mut conn: Conn| async move {
        let Some(Came { number, attempt, .. }) = came(&request) else {
            return conn.answer("200 OK", "", b"live").await.then_some(conn);
        };
        let mut random = Rng::with_seed(seed ^ (number << 8) ^ u64::from(attempt));
        if attempt < 4 && random.f64() < failing {
            let status = ["503 Busy", "500 Broken", "429 Later"][random.usize(..3)];
            return conn.answer(status, "", b"").await.then_some(conn);
        }
        sleep(Duration::from_millis(random.u64(..8))).await;
        conn.answer("200 OK", "", b"").await.then_some(conn)
    })
    .await
}

/// What a request says of itself; nothing of one that was no delivery.
fn came(request: &Recorded) -> Option<Came> {
    let number = |name: &str| request.all(name).first().and_then(|text| text.parse::<u64>().ok());
    Some(Came {
        key: usize::try_from(number("x-key")?).ok()?,
        number: number("x-id")?,
        attempt: u32::try_from(number("x-tunnel-delivery-attempt")?).ok()?,
    })
}

/// Sends the webhooks of one key, each until it is accepted. The numbers of those that the edge keeps: what was answered live is
/// done.
async fn send(
    to: SocketAddr,
    seed: u64,
    key: usize,
    webhooks: usize,
    left: Arc<watch::Sender<u64>>,
) -> anyhow::Result<Vec<u64>> {
    let mut kept = Vec::new();
    for number in (key..webhooks).step_by(KEYS) {
        let body = ::tests::noise(seed ^ number as u64, number % 5 * 40_000);
        let request = Request::to(TUNNEL, "POST", "/hook")
            .field("x-key", &key.to_string())
            .field("x-id", &number.to_string())
            .body(body);
        let begun = Instant::now();
        loop {
            // A sender gives up on an answer in time, and tries again; so does one whose connection ends.
            let tried = tokio::spawn({
                let request = request.clone();
                async move { request.send(to).await }
            });
            let answer = tokio::time::timeout(Duration::from_secs(35), tried).await;
            match answer.ok().and_then(Result::ok).map(|answer| answer.status) {
                Some(202) => {
                    kept.push(number as u64);
                    break;
                }
                Some(200) => break,
                _ => ensure!(begun.elapsed() < SENDER, "webhook {number} was not taken in {SENDER:?}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
        left.send_modify(|left| *left -= 1);
    }
    Ok(kept)
}

fn stop(agent: &mut Option<Agent>) {
    if let Some(agent) = agent.as_mut() {
        agent.process().signal(Signal::TERM);
        agent.process_mut().wait();
    }
    *agent = None;
}

/// Kills something as a power cut does. What is killed of the edge starts again by itself, as AWS would start it.
fn make(blow: Blow, local: &mut Local, agent: &mut Option<Agent>, flags: &[&str], tunnels: &str) {
    match blow {
        Blow::Function(name) => {
            for (of, pid) in local.function_processes() {
                if of == name
                    && let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
                {
                    // One that ended meanwhile need not be killed.
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
        }
        Blow::Local => local.kill_and_start_again(flags),
        Blow::Agent => {
            if let Some(agent) = agent.as_mut() {
                agent.process().signal(Signal::KILL);
                agent.process_mut().wait();
            }
            *agent = Some(local.agent_with(tunnels, &[]));
        }
    }
}

/// Waits until the service has had everything that was accepted and the edge says that nothing waits.
async fn drained(agent: &Agent, upstream: &Upstream, accepted: &BTreeSet<u64>) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let seen: BTreeSet<u64> = upstream.recorded().iter().filter_map(came).map(|one| one.number).collect();
        if accepted.is_subset(&seen) && agent.ask(&["delivery", "drain"]).0 == Some(0) {
            return Ok(());
        }
        let missing = accepted.difference(&seen).count();
        ensure!(begun.elapsed() < DELIVERED, "not drained after {DELIVERED:?}: {missing} have not come");
        sleep(Duration::from_millis(400)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_doubled_or_overtaken_is_seen() {
        let came = |all: &[(usize, u64, u32)]| -> Vec<Came> {
            all.iter().map(|&(key, number, attempt)| Came { key, number, attempt }).collect()
        };
        let accepted = BTreeSet::from([0, 1, 6]);
        let good = came(&[(1, 1, 1), (0, 0, 1), (0, 0, 2), (0, 6, 1)]);
        assert_eq!(judge(&accepted, &good), Vec::<String>::new());
        for (all, what) in [
            (&[(0, 0, 1), (0, 6, 1)][..], "never delivered: [1]"),
            (&[(1, 1, 1), (0, 0, 1), (0, 0, 1), (0, 6, 1)], "0 came twice as attempt 1"),
            (&[(1, 1, 1), (0, 6, 1), (0, 0, 1)], "0 came after 6"),
            (&[(1, 1, 1), (0, 0, 1), (0, 6, 1), (0, 0, 2)], "0 came after 6"),
        ] {
            let wrong = judge(&accepted, &came(all));
            assert!(wrong.len() == 1 && wrong[0].contains(what), "{wrong:?}");
        }
    }
}
