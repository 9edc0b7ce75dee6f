//! What only a live account can say about AWS: each point enters the stack and its account, leaves a sentence
//! that settles it, or why it does not. Points that measure also fill in [`Measured`].

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proto::message::{AgentMessage, EdgeMessage, Heartbeat};
use tests::{
    acceptance::chunked,
    client::{Connection, Request},
    raw_agent::RawAgent,
    stack::{Stack, Tunnel},
    upstream::{Conn, Upstream},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    account::{Account, Failed, random_id},
    times::{Measured, Times},
};

/// What a point leaves.
pub(crate) type Found = Result<String, String>;

/// The longest that the answer to a ping is waited for.
const PONG: Duration = Duration::from_secs(10);

/// For how long a run waits in silence, which takes more than one receive of 20 s; and after what time another
/// one is answered, which is late in the first.
const SILENCE: Duration = Duration::from_secs(24);
const LATE_ANSWER: Duration = Duration::from_secs(18);

/// How long it may take until somebody notices that a public client has left.
const NOTICED: Duration = Duration::from_secs(60);

/// How many queues are made to see how long that takes.
const QUEUES: usize = 5;

/// How many calls are under way at the same time, where it is not all of them.
const PARALLEL: usize = 16;

fn text(failed: Failed) -> String {
    failed.to_string()
}

/// Whether ping frames are answered.
pub(crate) async fn pings(stack: &Stack) -> Found {
    let mut agent = RawAgent::with(stack, &stack.token()).await;
    Ok(match agent.ping(PONG).await {
        Some(took) => format!("they are answered (after {:.1} ms)", took.as_secs_f64() * 1e3),
        None => format!("they are not answered within {} s", PONG.as_secs()),
    })
}

/// Whether ping frames keep a connection from idling.
pub(crate) async fn idle_timer(stack: &Stack, idle: Duration) -> Found {
    let most = idle + idle / 5 + Duration::from_secs(1);
    let (mut pinging, mut silent) =
        (RawAgent::with(stack, &stack.token()).await, RawAgent::with(stack, &stack.token()).await);
    let (pinging, silent) = tokio::join!(pinging.lasts(most, Some(idle / 10)), silent.lasts(most, None));
    let after = |end: Option<Duration>| match end {
        Some(end) => format!("closed after {:.0} s", end.as_secs_f64()),
        None => format!("open after {:.0} s", most.as_secs_f64()),
    };
    let seen = format!("with pings {}, without {}", after(pinging), after(silent));
    match (pinging, silent) {
        (None, Some(_)) => Ok(format!("pings reset the idle timer: {seen}")),
        (Some(_), Some(_)) => Ok(format!("pings do not reset the idle timer: {seen}")),
        (_, None) => Err(format!("the idle timer did not strike: {seen}")),
    }
}

/// Whether the token is found whatever the case of its field's name; and what fields the 101 has.
pub(crate) async fn handshakes(stack: &Stack) -> (Found, Found) {
    let mut statuses = Vec::new();
    let mut fields = Vec::new();
    for name in ["Authorization", "authorization", "AUTHORIZATION"] {
        let url = stack.agents().to_string();
        let (_, rest) = url.split_once("://").expect("it is a URL");
        let path = rest.find('/').map_or("/", |at| &rest[at..]);
        let request = Request::new("GET", path)
            .field("Host", stack.agents().authority())
            .field("Connection", "Upgrade")
            .field("Upgrade", "websocket")
            .field("Sec-WebSocket-Version", "13")
            .field("Sec-WebSocket-Key", &STANDARD.encode(&random_id().as_str()[..16]))
            .field(name, &format!("Bearer {}", stack.token()));
        let stream = match stack.dial_agents().await {
            Ok(stream) => stream,
            Err(error) => return (Err(error.to_string()), Err(error.to_string())),
        };
        let mut connection = Connection::over(stream);
        connection.begin(&request).await;
        let answer = connection.head_of_any_status().await;
        statuses.push(format!("{name} {}", answer.status));
        if answer.status == 101 {
            fields = answer.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
        }
    }
    let all = statuses.iter().all(|status| status.ends_with(" 101"));
    let does = if all { "the token is found in any case" } else { "NOT in every case" };
    let cases = format!(
        "{does} ({}); the stack's authorizer names no identity source, so it does not depend on theirs",
        statuses.join(", ")
    );
    let fields = if fields.is_empty() {
        Err("no handshake succeeded".to_owned())
    } else {
        Ok(format!(
            "it has {}; whether $connect could add some is not tried, because the stack's does not",
            fields.join(", ")
        ))
    };
    (Ok(cases), fields)
}

/// Whether a receive of 20 s is left alone inside an Express run, with and without an answer.
pub(crate) async fn long_receive(stack: &Stack, account: &Account) -> Found {
    let silent = stack.tunnel("long-receive");
    // It reads nothing, and answers nothing.
    let _agent = RawAgent::open(stack, &[silent.name()]).await;
    let (quiet, answered) =
        (account.make_queue().await.map_err(text)?, account.make_queue().await.map_err(text)?);
    for (queue, _) in [&quiet, &answered] {
        account.usable(queue).await;
    }
    let (one, two) = (random_id(), random_id());
    let late = async {
        tokio::time::sleep(LATE_ANSWER).await;
        account.send(&answered.0, "{}", Some(&two)).await
    };
    let (quiet, answered, sent) = tokio::join!(
        account.run(&one, silent.name(), &quiet.0, SILENCE),
        account.run(&two, silent.name(), &answered.0, SILENCE),
        late
    );
    sent.map_err(text)?;
    let mut said = Vec::new();
    let mut well = true;
    for (what, run, expected, least) in [
        ("in silence", quiet.map_err(text)?, "UpstreamTimedOut", SILENCE - Duration::from_secs(1)),
        ("answered late", answered.map_err(text)?, "Replied", LATE_ANSWER),
    ] {
        well &= run.status == "SUCCEEDED" && run.outcome == expected && run.took >= least;
        said.push(format!(
            "{what}: {} {}{} after {:.1} s, {:.1} s billed",
            run.status,
            run.outcome,
            run.error,
            run.took.as_secs_f64(),
            run.billed.as_secs_f64()
        ));
    }
    let does = if well { "it is left alone" } else { "it is NOT left alone" };
    Ok(format!("{does} ({})", said.join("; ")))
}

/// How long it takes to make a queue, and until it can be used.
pub(crate) async fn making_queues(account: &Account) -> Result<(String, String), String> {
    let mut made = Times::default();
    let mut first = None;
    for _ in 0..QUEUES {
        let (queue, took) = account.make_queue().await.map_err(text)?;
        made.add(took);
        first.get_or_insert(queue);
    }
    let queue = first.expect("some were made");
    let (begun_with, _) = account.make_queue().await.map_err(text)?;
    let usable = account.usable(&begun_with).await;
    account.usable(&queue).await;
    let found = format!(
        "CreateQueue takes {made}, none was throttled; a new queue can be used after {:.2} s",
        usable.as_secs_f64()
    );
    Ok((found, queue))
}

/// How long a message takes through a mailbox that somebody waits at.
pub(crate) async fn mailbox(account: &Account, queue: &str, calls: usize, measured: &mut Measured) -> Found {
    let (begin, mut begins) = mpsc::channel::<oneshot::Sender<Instant>>(1);
    let receiver = {
        let (account, queue) = (account.clone(), queue.to_owned());
        tokio::spawn(async move {
            while let Some(came) = begins.recv().await {
                let receipt = loop {
                    match account.receive(&queue).await.map_err(text)? {
                        Some((body, receipt)) if body == "measured" => break receipt,
                        Some((_, receipt)) => account.delete(&queue, &receipt).await.map_err(text)?,
                        None => {}
                    }
                };
                let at = Instant::now();
                // Who asked has gone where sending has failed.
                let _ = came.send(at);
                account.delete(&queue, &receipt).await.map_err(text)?;
            }
            Ok::<(), String>(())
        })
    };
    for _ in 0..calls {
        let (came, comes) = oneshot::channel();
        if begin.send(came).await.is_err() {
            break;
        }
        // Nothing tells when the poll waits, as a run's does when the answer comes: it has had time to.
        tokio::time::sleep(twice_the_way(measured)).await;
        let sending = Instant::now();
        account.send(queue, "measured", None).await.map_err(text)?;
        measured.send.add(sending.elapsed());
        let Ok(Ok(at)) = timeout(Duration::from_secs(30), comes).await else { break };
        measured.delivered.add(at.saturating_duration_since(sending));
    }
    drop(begin);
    receiver.await.expect("it does not panic")?;
    if measured.delivered.len() < calls {
        return Err(format!("{} of {calls} messages came", measured.delivered.len()));
    }
    let away = measured.to_region.quantile(0.5);
    Ok(format!(
        "from the send to the receive {}; SendMessage itself {}; {away:.1} ms of each are the way there and back",
        measured.delivered, measured.send
    ))
}

/// Longer than a poll takes to be there.
fn twice_the_way(measured: &Measured) -> Duration {
    Duration::from_secs_f64(measured.to_region.quantile(0.95).max(1.0) * 2.0 / 1e3)
}

/// What becomes of many runs that start at once.
pub(crate) async fn surge(stack: &Stack, account: &Account, calls: usize) -> Found {
    let nobody = stack.tunnel("nobody");
    let mut runs = JoinSet::new();
    let begun = Instant::now();
    for _ in 0..calls {
        let (account, name) = (account.clone(), nobody.name().to_owned());
        runs.spawn(async move { account.run(&random_id(), &name, "none", Duration::from_secs(10)).await });
    }
    let mut times = Times::default();
    let (mut throttled, mut others) = (0, Vec::new());
    while let Some(run) = runs.join_next().await {
        match run.expect("it does not panic") {
            Ok(run) if run.outcome == "NoSuchTunnel" => times.add(run.took),
            Ok(run) => others.push(format!("{} {}", run.status, run.error)),
            Err(error) if error.is_throttled() => throttled += 1,
            Err(error) => others.push(error.to_string()),
        }
    }
    if let Some(other) = others.first() {
        return Err(format!("{} of {calls} runs failed, such as: {other}", others.len()));
    }
    Ok(format!(
        "of {calls} runs at once {throttled} were throttled; the others took {times}; all were over after {:.1} s",
        begun.elapsed().as_secs_f64()
    ))
}

/// How fast one connection takes posts.
pub(crate) async fn posts(stack: &Stack, account: &Account, calls: usize) -> Found {
    let tunnel = stack.tunnel("posts");
    let mut agent = RawAgent::with(stack, &stack.token()).await;
    let connection = agent.ask_for(&[tunnel.name()]).await.connection_id;
    let (heard, mut hears) = mpsc::unbounded_channel();
    let listening = tokio::spawn(async move {
        while let EdgeMessage::Heartbeat(_) = EdgeMessage::decode(&agent.hear().await).expect("it is one") {
            if heard.send(()).is_err() {
                return;
            }
        }
    });
    let message: Arc<str> = EdgeMessage::Heartbeat(Heartbeat { seq: 1 }).encode().into();
    let places = Arc::new(Semaphore::new(PARALLEL));
    let mut posting = JoinSet::new();
    let begun = Instant::now();
    for _ in 0..calls {
        let place = Arc::clone(&places).acquire_owned().await.expect("nobody closes it");
        let (account, connection, message) = (account.clone(), connection.clone(), Arc::clone(&message));
        posting.spawn(async move {
            let posted = account.post(&connection, &message).await;
            drop(place);
            posted
        });
    }
    let (mut taken, mut throttled, mut others) = (0, 0, Vec::new());
    while let Some(posted) = posting.join_next().await {
        match posted.expect("it does not panic") {
            Ok(()) => taken += 1,
            Err(error) if error.is_throttled() => throttled += 1,
            Err(error) => others.push(error.to_string()),
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let mut came = 0;
    while came < taken && timeout(PONG, hears.recv()).await.is_ok_and(|heard| heard.is_some()) {
        came += 1;
    }
    listening.abort();
    if let Some(other) = others.first() {
        return Err(format!("{} of {calls} posts failed, such as: {other}", others.len()));
    }
    #[expect(clippy::cast_precision_loss, reason = "thousands at most")]
    let rate = calls as f64 / took;
    Ok(format!(
        "{rate:.0} posts a second were tried over one connection, {PARALLEL} at a time: {taken} of {calls} were \
         taken, {throttled} refused with 429, and {came} came"
    ))
}

/// When the upstream hears that a public client has left in the middle of a response.
pub(crate) async fn client_leaves(stack: &Stack) -> Found {
    if !stack.front().streams() {
        return Err("this front passes a response on when it is whole".into());
    }
    let (closed, mut closes) = mpsc::unbounded_channel();
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let closed = closed.clone();
        async move {
            assert!(conn.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await);
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            loop {
                tokio::select! {
                    () = conn.closed() => break,
                    _ = tick.tick() => {}
                }
                if !conn.write(chunked(b"tick")).await {
                    break;
                }
            }
            // Nobody asks where the run is over.
            let _ = closed.send(Instant::now());
            None
        }
    })
    .await;
    let web = stack.tunnel("leaves");
    let _agent = web.agent(&upstream.address());
    let mut connection = web.open().await;
    connection.begin(&web.request("GET", "/")).await;
    let head = connection.head().await;
    if connection.body(&head).take(4).await != b"tick" {
        return Err(format!("no response to leave: {}", head.status));
    }
    drop(connection);
    let left = Instant::now();
    Ok(match timeout(NOTICED, closes.recv()).await {
        Ok(Some(at)) => {
            format!("the upstream's connection ends {:.2} s later", (at - left).as_secs_f64())
        }
        _ => format!("nobody notices within {} s: the response goes on to its end", NOTICED.as_secs()),
    })
}

/// Measures what is left of a profile, one call after the other.
pub(crate) async fn hops(
    stack: &Stack,
    account: &Account,
    calls: usize,
    measured: &mut Measured,
) -> Result<(), String> {
    // `ingress` refuses a reserved name before it calls anybody.
    measured.refused = public(&stack.named("www"), calls, 404).await?;
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("small");
    let agent = web.agent(&upstream.address());
    measured.small_request = public(&web, calls, 200).await?;
    drop(agent);
    let nobody = stack.tunnel("nobody");
    let tunnel = stack.tunnel("hops");
    let mut agent = RawAgent::with(stack, &stack.token()).await;
    let connection = agent.ask_for(&[tunnel.name()]).await.connection_id;
    for call in 0..calls {
        let begun = Instant::now();
        account.rows(nobody.name()).await.map_err(text)?;
        measured.query.add(begun.elapsed());
        let run = account.run(&random_id(), nobody.name(), "none", Duration::from_secs(10)).await;
        let run = run.map_err(text)?;
        if run.outcome != "NoSuchTunnel" {
            return Err(format!("a run to nobody: {} {} {}", run.status, run.outcome, run.error));
        }
        measured.run.add(run.took);
        let begun = Instant::now();
        account.look_at(&connection).await.map_err(text)?;
        measured.connection.add(begun.elapsed());
        let begun = Instant::now();
        let seq = u32::try_from(call).expect("thousands at most");
        agent.say(AgentMessage::Heartbeat(Heartbeat { seq })).await;
        let expected = EdgeMessage::Heartbeat(Heartbeat { seq }).encode();
        let heard = agent.hear().await;
        if heard != expected {
            return Err(format!("a heartbeat was answered with {heard}"));
        }
        measured.heartbeat.add(begun.elapsed());
    }
    Ok(())
}

/// How long the ways take.
pub(crate) async fn ways(stack: &Stack, measured: &mut Measured) -> std::io::Result<()> {
    let web = stack.named("www");
    for _ in 0..20 {
        measured.to_front.add(web.reach().await?);
        measured.to_region.add(stack.reach_agents().await?);
    }
    Ok(())
}

/// Asks a tunnel again and again, over as few connections as the front allows.
async fn public(tunnel: &Tunnel<'_>, calls: usize, status: u16) -> Result<Times, String> {
    /// Until everything on the way is warm.
    const FIRST: usize = 3;
    let mut times = Times::default();
    let mut connection = tunnel.open().await;
    for call in 0..calls + FIRST {
        let begun = Instant::now();
        let answer = connection.exchange(&tunnel.request("GET", "/")).await;
        if answer.status != status {
            return Err(format!("{} in place of {status}: {}", answer.status, answer.text()));
        }
        if call >= FIRST {
            times.add(begun.elapsed());
        }
        if answer.field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            connection = tunnel.open().await;
        }
    }
    Ok(times)
}
