//! One run against one stack: the acceptance scenarios, then the points that only a live account settles, then
//! everything that was made is taken away. Enters a configuration, leaves a report.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::LocalBoxFuture};
use tests::{
    acceptance, eventually,
    stack::{Front, Stack},
    upstream::Upstream,
};
use tokio::time::timeout;

use crate::{
    account::Account,
    config::Config,
    fronts,
    points::{self, Found},
    report::Report,
    times::Measured,
};

/// The longest that one scenario or point may take.
const MOST: Duration = Duration::from_secs(15 * 60);

/// Runs everything that is wanted, until it is over or `interrupted` is, and cleans up in either case.
pub(crate) async fn run(config: Config, report: &Report<'_>, interrupted: impl Future<Output = ()>) {
    let account = Account::new(&config);
    let stack = &config.stack;
    let place = stack.place();
    report.say(format!(
        "deployed: the front is {:?}, agents connect to {}, the region is {}; names begin with {}",
        place.front, place.agents, config.region, config.prefix
    ));
    tokio::select! {
        () = everything(&config, &account, report).boxed_local() => {}
        () = interrupted => report.failed("the run", "it was broken off"),
    }
    let left = account.clean(stack).boxed_local().await;
    for what in &left {
        report.failed("cleaning up", what);
    }
    if left.is_empty() {
        report.say("deployed: nothing of this run is left in the account");
    }
    match &report.failures()[..] {
        [] => report.say("deployed: everything was as it has to be"),
        failures => report.say(format!("deployed: {} FAILED: {}", failures.len(), failures.join("; "))),
    }
}

async fn everything(config: &Config, account: &Account, report: &Report<'_>) {
    let stack = &config.stack;
    // What takes long and needs little goes on beside the rest; what measures does not.
    let long_receive = async {
        if config.wants(LONG_RECEIVE) {
            point(report, LONG_RECEIVE, points::long_receive(stack, account).boxed_local()).await;
        }
    };
    let rest = async {
        tokio::join!(scenarios(config, account, report).boxed_local(), long_receive);
        points_of(config, account, report).boxed_local().await;
    };
    let idle = async {
        match config.idle.filter(|_| config.wants(IDLE)) {
            Some(idle) => point(report, IDLE, points::idle_timer(stack, idle).boxed_local()).await,
            None if config.wants(IDLE) => {
                let why = "DEPLOYED_IDLE_SECS=600 tries it; that takes 12 minutes, beside the rest";
                report.point(IDLE, &Err(why.into()));
            }
            None => {}
        }
    };
    tokio::join!(rest.boxed_local(), idle.boxed_local());
    if config.wants(OTHERS) {
        let why = "a surcharge is on the bill only, and the stack has no REST API to be charged for";
        report.point(OTHERS, &Err(why.into()));
    }
}

const PINGS: &str = "1 answers to ping frames";
const IDLE: &str = "1 ping frames and the idle timer";
const CASES: &str = "2 case of the identity's field";
const LONG_RECEIVE: &str = "3 a receive of 20 s inside EXPRESS";
const QUEUES: &str = "4 making queues";
const MAILBOX: &str = "4 latency of a mailbox";
const SURGE: &str = "5 a surge of StartSyncExecution";
const POSTS: &str = "5 posts over one connection";
const FIELDS: &str = "6 fields of the 101";
const OTHERS: &str = "6 surcharge of REST streaming";
const LEAVES: &str = "a public client that leaves";
const HOPS: &str = "hop latencies";
const COMES_BACK: &str = "an agent whose connection is closed comes back by itself";

async fn scenarios(config: &Config, account: &Account, report: &Report<'_>) {
    let stack = &config.stack;
    for scenario in acceptance::ALL.iter().filter(|scenario| config.wants(scenario.name)) {
        match (scenario.inapplicable)(stack) {
            Some(why) => report.inapplicable(scenario.name, why),
            None => one(report, scenario.name, (scenario.run)(stack)).await,
        }
    }
    if config.wants(COMES_BACK) {
        let scenario = comes_back(stack, account).map(|()| None);
        one(report, COMES_BACK, scenario.boxed_local()).await;
    }
}

async fn points_of(config: &Config, account: &Account, report: &Report<'_>) {
    let (stack, calls) = (&config.stack, config.calls);
    let mut measured = Measured::default();
    let wants = |names: &[&str]| names.iter().any(|name| config.wants(name));
    if wants(&[MAILBOX, HOPS])
        && let Err(error) = points::ways(stack, &mut measured).await
    {
        report.failed(HOPS, &error.to_string());
        return;
    }
    if wants(&[PINGS]) {
        point(report, PINGS, points::pings(stack).boxed_local()).await;
    }
    if wants(&[CASES, FIELDS]) {
        let begun = AssertUnwindSafe(points::handshakes(stack).boxed_local()).catch_unwind().await;
        match begun {
            Ok((cases, fields)) => {
                report.point(CASES, &cases);
                report.point(FIELDS, &fields);
            }
            Err(panic) => report.failed(CASES, &said(panic)),
        }
    }
    if wants(&[QUEUES, MAILBOX, HOPS]) {
        match points::making_queues(account).await {
            Ok((found, queue)) => {
                report.point(QUEUES, &Ok(found));
                point(report, MAILBOX, points::mailbox(account, &queue, calls, &mut measured).boxed_local())
                    .await;
            }
            Err(why) => report.point(QUEUES, &Err(why)),
        }
    }
    if wants(&[SURGE]) {
        point(report, SURGE, points::surge(stack, account, calls).boxed_local()).await;
    }
    if wants(&[POSTS]) {
        point(report, POSTS, points::posts(stack, account, calls).boxed_local()).await;
    }
    if wants(&[LEAVES]) {
        point(report, LEAVES, points::client_leaves(stack).boxed_local()).await;
    }
    // `local` without a front's ways has nothing to settle.
    if stack.front() != Front::Local {
        for one in fronts::POINTS.iter().filter(|one| config.wants(one.name)) {
            if one.is_long && !config.long {
                report.point(one.name, &Err(fronts::LONG.into()));
            } else {
                point(report, one.name, (one.ask)(stack)).await;
            }
        }
    }
    if wants(&[HOPS]) {
        let done = AssertUnwindSafe(points::hops(stack, account, calls, &mut measured).boxed_local())
            .catch_unwind()
            .await;
        match done {
            Ok(Ok(())) => profile(config, &measured, report),
            Ok(Err(why)) => report.point(HOPS, &Err(why)),
            Err(panic) => report.failed(HOPS, &said(panic)),
        }
    }
}

/// Says the profile, as the file that `local --latency` takes.
fn profile(config: &Config, measured: &Measured, report: &Report<'_>) {
    let text = measured.profile(&config.region);
    report.point(HOPS, &Ok(format!("a small request takes {}, from here", measured.small_request)));
    report.say("--- a profile for local --latency FILE:");
    report.say(text.trim_end());
    report.say("---");
    if let Some(file) = &config.profile {
        match std::fs::write(file, &text) {
            Ok(()) => report.say(format!("deployed: the profile is in {}", file.display())),
            Err(error) => report.failed("the profile's file", &format!("{}: {error}", file.display())),
        }
    }
}

/// An agent whose connection the edge closes opens the next one, and its tunnel is there again.
async fn comes_back(stack: &Stack, account: &Account) {
    let upstream = Upstream::echo().await;
    let web = stack.tunnel("comes-back");
    let _agent = web.agent(&upstream.address());
    assert_eq!(web.get("/").await.status, 200);
    let before = account.connections(web.name()).await.unwrap();
    let [connection] = &before[..] else { panic!("one connection serves the tunnel: {before:?}") };
    account.close(connection).await.unwrap();
    eventually("another connection serves the tunnel", async || {
        let now = account.connections(web.name()).await.unwrap();
        now.iter().any(|own| own != connection)
    })
    .await;
    let answer = web.get("/").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Does one thing that has to be well.
async fn one(report: &Report<'_>, name: &str, scenario: LocalBoxFuture<'_, Option<&'static str>>) {
    let begun = Instant::now();
    match timeout(MOST, AssertUnwindSafe(scenario).catch_unwind()).await {
        Ok(Ok(behaviour)) => report.well(name, begun.elapsed(), behaviour),
        Ok(Err(panic)) => report.failed(name, &said(panic)),
        Err(_) => report.failed(name, "it does not end"),
    }
}

/// Settles one point, or not.
async fn point(report: &Report<'_>, name: &str, point: LocalBoxFuture<'_, Found>) {
    match timeout(MOST, AssertUnwindSafe(point).catch_unwind()).await {
        Ok(Ok(found)) => report.point(name, &found),
        Ok(Err(panic)) => report.failed(name, &said(panic)),
        Err(_) => report.failed(name, "it does not end"),
    }
}

/// What a panic said.
fn said(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
    // One line, and no more of an answer's page than tells what it is.
    let line: Vec<&str> = text.split_whitespace().collect();
    line.join(" ").chars().take(600).collect()
}
