//! Lambda `sweep`: looks after the mailboxes and the deliveries that wait, counts the agents, and puts `relay` to sleep.
//!
//! Enters, on a schedule, any event: the pool gets what it lacks, loses its surplus, and agrees with
//! the queues there are; the numbers go to the dashboard. Enters, when the stack is made or deleted, an event
//! of CloudFormation, whose custom resource this function is: the pool is filled before the first
//! request, and nothing is left of it after the last, whoever made the queues.
//!
//! Nothing here is needed for a request: a pool that is not looked after grows when it has to, and a lease
//! that nobody renews ends by itself.
//!
//! Permissions it needs: read the connections table; read, write and delete rows of the mailboxes table;
//! list queues, make and delete mailboxes and ask when one was made; read and write the table of deliveries, start their runs,
//! answer them and ask whether there is one, receive from the queues of redeliveries and dead letters; where there is a `relay`, write its row of the
//! connections table and register how many of it run.

mod stack;

use std::{
    collections::BTreeSet,
    process::ExitCode,
    time::{Duration, Instant},
};

use edge::{
    Error,
    aws::Aws,
    caretaker::{Caretaker, Row},
    config::{ConfigError, Env, env},
    deliveries::{Deliveries, Lane},
    fleet::Fleet,
    metrics::{Line, Metric},
    registry::{Agents, Registry},
    unix_now,
};
use futures_util::{StreamExt as _, stream};
use proto::{
    id::{DeliveryId, MailboxId, TunnelName},
    limits,
};
use serde::{Deserialize, Serialize};

/// How many calls are under way at the same time: enough to be quick, few enough not to be throttled.
const PARALLEL: usize = 10;

/// The most mailboxes made, and the most deleted, in one sweep. The rest is for the next one.
const MOST: usize = 200;

/// How many batches of deliveries that were moved back are started in one sweep, and how many of dead letters are looked at.
const MOST_BATCHES: usize = 10;

/// How long runs are stopped when the stack goes: mailboxes are to be deleted in the rest of the function's time.
const STOPPING: Duration = Duration::from_secs(80);

/// How long after its beginning a sweep begins with another tunnel whose deliveries wait: what it has found is to be written
/// in the rest of the function's time.
const LOOKING: Duration = Duration::from_secs(80);

/// Up to how many deliveries of a tunnel are counted.
pub const MOST_COUNTED: usize = 1000;

/// Everything a sweep needs.
#[derive(Debug)]
pub struct Sweep {
    caretaker: Caretaker,
    registry: Registry,
    rules: Rules,
    fleet: Option<Fleet>,
    deliveries: Option<Deliveries>,
}

/// What the pool should look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// How many free mailboxes there should be.
    pub kept: usize,
    /// How long a mailbox has been free before it may go.
    pub idle: Duration,
}

/// What is to be done about the pool.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// How many mailboxes to make.
    pub make: usize,
    /// Surplus: free for long, and more than are kept.
    pub retire: Vec<Row>,
    /// Rows without a queue: whoever leased such a mailbox could not use it.
    pub broken: Vec<Row>,
    /// What an earlier sweep has begun to delete.
    pub finish: Vec<MailboxId>,
    /// Queues without a row. The process that made one may be about to write it: only an old queue goes.
    pub strays: Vec<MailboxId>,
    /// How many mailboxes nobody has leased.
    pub free: usize,
}

/// What calls the function.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Event {
    /// CloudFormation, about the custom resource.
    Stack(stack::Event),
    /// EventBridge, about a run of a delivery that was stopped from outside.
    Stopped(Stopped),
    /// Anything else: the schedule.
    Schedule(serde::de::IgnoredAny),
}

/// EventBridge's "Step Functions Execution Status Change", as far as it is read (Step Functions Developer Guide, "Automating
/// Step Functions event delivery with EventBridge").
#[derive(Debug, Deserialize)]
pub struct Stopped {
    detail: StoppedRun,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoppedRun {
    execution_arn: String,
    /// What the run was started with, as JSON. It is far shorter than what an event would leave out.
    input: String,
}

/// What names a delivery in the input of its run.
#[derive(Debug, Deserialize)]
struct Named {
    delivery: DeliveryId,
    tunnel: TunnelName,
}

/// What the function says to whoever invoked it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How many agents serve a tunnel.
    pub agents: usize,
    /// How many mailboxes nobody had leased.
    pub free: usize,
    /// How many mailboxes were made.
    pub made: usize,
    /// How many were deleted.
    pub deleted: usize,
    /// How many deliveries wait for an agent, up to [`MOST_COUNTED`] of each tunnel.
    pub waiting: usize,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Sweep::from_env, |event, sweep| async move { handle(event, &sweep).await })
}

impl Sweep {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        Ok(Self {
            caretaker: Caretaker::from_env(&aws, env)?,
            registry: Registry::from_env(&aws, env)?,
            fleet: Fleet::from_env(&aws, env)?,
            deliveries: Deliveries::from_env(&aws, env),
            rules: Rules {
                kept: env.count(env::MAILBOXES_KEPT, limits::MAILBOXES_KEPT, MOST)?,
                idle: env.secs(
                    env::MAILBOX_IDLE_SECS,
                    limits::MAILBOX_IDLE,
                    Duration::from_secs(7 * 24 * 60 * 60),
                )?,
            },
        })
    }
}

/// Handles one event.
///
/// # Errors
///
/// When the tables or the list of queues cannot be read, or CloudFormation cannot be told; a single
/// mailbox that cannot be made or deleted is for the next sweep.
pub async fn handle(event: Event, sweep: &Sweep) -> Result<Report, Error> {
    match event {
        Event::Schedule(_) => {
            let begun = Instant::now();
            // First what is soon done: however many deliveries wait, mailboxes and `relay` do not wait for them.
            let tidied = tidy(sweep).await;
            if let (Ok((_, agents)), Some(fleet)) = (&tidied, &sweep.fleet) {
                look_after(fleet, *agents).await;
            }
            let waiting = match &sweep.deliveries {
                Some(deliveries) => Box::pin(see_to(deliveries, &sweep.registry, begun)).await,
                None => 0,
            };
            let (report, _) = tidied?;
            Ok(Report { waiting, ..report })
        }
        Event::Stopped(Stopped { detail }) => {
            let named: Named = serde_json::from_str(&detail.input)
                .map_err(|error| Error::Refused { call: "an event", source: error.into() })?;
            if let Some(deliveries) = &sweep.deliveries {
                deliveries.run_was_stopped(&named.tunnel, &named.delivery).await?;
            }
            tracing::info!(run = detail.execution_arn, delivery_id = %named.delivery, "run was stopped");
            Ok(Report::default())
        }
        Event::Stack(event) => {
            let done = match event.request {
                stack::Request::Create | stack::Request::Update => {
                    tidy(sweep).await.map(|(report, _)| report)
                }
                stack::Request::Delete => clear(sweep).await,
            };
            // CloudFormation knows now. An error on top would have Lambda play the event again, after its answer.
            stack::answer(&event, &done).await?;
            Ok(done.unwrap_or_else(|error| {
                tracing::error!(%error, "the stack's mailboxes were not looked after");
                Report::default()
            }))
        }
    }
}

/// Lets deliveries go on whose agent is there, which `connect` did not see or whose turn was lost, and those that have no
/// run; starts what operators have moved back; says how much waits. What does not work, or takes longer than [`LOOKING`], is
/// for the next sweep.
async fn see_to(deliveries: &Deliveries, registry: &Registry, begun: Instant) -> usize {
    let now = unix_now();
    in_batches("dead letters were not looked at", async || deliveries.clear_dead_letters().await).await;
    in_batches("deliveries were not made again", async || deliveries.redeliver().await).await;
    let mut tunnels = match deliveries.waiting(now).await {
        Ok(tunnels) => tunnels,
        Err(error) => {
            tracing::warn!(%error, "deliveries were not looked after");
            return 0;
        }
    };
    // Not always the same ones first: each has its turn, also where one sweep does not reach all.
    let [one, two, ..] = random();
    let first = usize::from(u16::from_be_bytes([one, two])) % tunnels.len().max(1);
    tunnels.rotate_left(first);
    let (mut parked, mut oldest_ms) = (0, None::<u64>);
    for (looked_at, tunnel) in tunnels.iter().enumerate() {
        if begun.elapsed() > LOOKING {
            tracing::warn!(
                looked_at,
                tunnels = tunnels.len(),
                "there was no time for the deliveries of every tunnel"
            );
            break;
        }
        let looked = async {
            deliveries.mend_recent(tunnel).await?;
            if !registry.takers(tunnel, now).await?.connections.is_empty() {
                deliveries.wake(tunnel, &[Lane::FIRST]).await?;
            }
            deliveries.backlog(tunnel, MOST_COUNTED).await
        };
        match Box::pin(looked).await {
            Ok(backlog) => {
                if backlog.parked > 0 {
                    tracing::info!(tunnel_id = %tunnel, parked = backlog.parked, "deliveries wait");
                }
                parked += backlog.parked;
                oldest_ms = oldest_ms.into_iter().chain(backlog.oldest_ms).min();
            }
            Err(error) => tracing::warn!(tunnel_id = %tunnel, %error, "deliveries were not looked after"),
        }
    }
    if let Some(oldest_ms) = oldest_ms {
        let mut line = Line::begin();
        let age_ms = (now * 1000).saturating_sub(oldest_ms);
        #[expect(clippy::cast_precision_loss, reason = "thousands of deliveries and days at most")]
        for (metric, value) in
            [(Metric::DeliveriesWaiting, parked as f64), (Metric::OldestDelivery, age_ms as f64 / 1000.0)]
        {
            line.add(metric, value);
        }
        line.write();
    }
    parked
}

/// Goes through a queue until a batch is empty. `failed` is said where one could not be gone through; the rest is for the
/// next sweep.
async fn in_batches(failed: &str, next: impl AsyncFn() -> Result<usize, Error>) {
    for _ in 0..MOST_BATCHES {
        match next().await {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "{failed}");
                return;
            }
        }
    }
}

/// Has `relay` run as long as an agent wants it, and sleep once none has for a while.
async fn look_after(fleet: &Fleet, agents: Agents) {
    let now = unix_now();
    let is_wanted = (agents.websockets > 0 && fleet.is_for(true)) || (agents.all > 0 && fleet.is_for(false));
    let done = if is_wanted {
        fleet.keep_awake(now).await
    } else {
        fleet.rest(now).await.map(|sleeps| tracing::info!(sleeps, "no agent wants relay"))
    };
    if let Err(error) = done {
        // Mailboxes are looked after nevertheless.
        tracing::warn!(%error, is_wanted, "relay was not looked after");
    }
}

async fn tidy(sweep: &Sweep) -> Result<(Report, Agents), Error> {
    let now = unix_now();
    let (rows, queues, agents) =
        (sweep.caretaker.rows().await?, sweep.caretaker.queues().await?, sweep.registry.agents(now).await?);
    let plan = decide(&rows, &queues.into_iter().collect(), sweep.rules, now);
    let mut line = Line::begin();
    #[expect(clippy::cast_precision_loss, reason = "thousands at most")]
    for (metric, value) in
        [(Metric::AgentsConnected, agents.all as f64), (Metric::MailboxesFree, plan.free as f64)]
    {
        line.add(metric, value);
    }
    line.write();
    let free = plan.free;
    let (made, deleted) = act(&sweep.caretaker, plan, sweep.rules, now).await;
    tracing::info!(agents = agents.all, free, made, deleted, "mailboxes were swept");
    Ok((Report { agents: agents.all, free, made, deleted, waiting: 0 }, agents))
}

/// Decides what to do about the pool. Pure.
#[must_use]
pub fn decide(rows: &[Row], queues: &BTreeSet<MailboxId>, rules: Rules, now: u64) -> Plan {
    let mut plan = Plan::default();
    let mut free = Vec::new();
    let mut known = BTreeSet::new();
    for row in rows {
        known.insert(&row.mailbox);
        let idle = row.leased_until.saturating_add(rules.idle.as_secs()) <= now;
        if row.retired {
            plan.finish.push(row.mailbox.clone());
        } else if row.leased_until > now {
            // Somebody's.
        } else if idle && !queues.contains(&row.mailbox) {
            // A list of queues is not up to date for a minute; this one has been there for much longer.
            plan.broken.push(row.clone());
        } else {
            free.push((row, idle));
        }
    }
    plan.free = free.len();
    plan.make = rules.kept.saturating_sub(free.len()).min(MOST);
    // What has been free for longest goes first.
    free.sort_by_key(|(row, _)| (row.leased_until, row.mailbox.clone()));
    let surplus = free.len().saturating_sub(rules.kept).min(MOST);
    plan.retire =
        free.iter().take(surplus).filter(|(_, idle)| *idle).map(|(row, _)| (*row).clone()).collect();
    plan.strays = queues.iter().filter(|queue| !known.contains(queue)).take(MOST).cloned().collect();
    plan
}

/// Carries a plan out. Returns how many mailboxes were made and how many deleted.
async fn act(caretaker: &Caretaker, plan: Plan, rules: Rules, now: u64) -> (usize, usize) {
    let made = each(std::iter::repeat_n((), plan.make), |()| async {
        caretaker.make(random()).await.map(|()| true)
    });
    let retired = each(plan.retire.iter().chain(&plan.broken), |row| caretaker.retire(row));
    let finished = each(&plan.finish, |mailbox| async { caretaker.finish(mailbox).await.map(|()| true) });
    let strays = each(&plan.strays, |mailbox| async {
        let old = caretaker.created_at(mailbox).await?.is_some_and(|at| at + rules.idle.as_secs() <= now);
        if old {
            caretaker.delete_queue(mailbox).await?;
        }
        Ok(old)
    });
    let made = made.await;
    (made, retired.await + finished.await + strays.await)
}

/// Stops every run of a delivery. A state machine is deleted only once its runs have ended, which those that wait for an
/// agent do after days (AWS re:Post, "Why is my Step Functions state machine stuck in the DELETING status?").
async fn stop_all(deliveries: &Deliveries) -> Result<(), Error> {
    let begun = Instant::now();
    let mut stopped = BTreeSet::new();
    loop {
        let runs: Vec<String> =
            deliveries.runs().await?.into_iter().filter(|run| !stopped.contains(run)).collect();
        if runs.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > STOPPING {
            let text = format!("at least {} runs of deliveries go on: delete the stack again", runs.len());
            return Err(Error::Failed { call: "StopExecution", source: text.into() });
        }
        // One that could not be stopped is listed again.
        let each = stream::iter(runs)
            .map(async |run| deliveries.stop_run(&run).await.map(|()| run))
            .buffer_unordered(PARALLEL)
            .collect::<Vec<_>>();
        for run in each.await {
            match run {
                Ok(run) => drop(stopped.insert(run)),
                Err(error) => tracing::warn!(%error, "a run was not stopped"),
            }
        }
        tracing::info!(stopped = stopped.len(), "runs were stopped with their stack");
    }
}

/// Stops the runs of deliveries and deletes every mailbox's queue, leased or not. The rows go with their tables.
async fn clear(sweep: &Sweep) -> Result<Report, Error> {
    if let Some(deliveries) = &sweep.deliveries {
        stop_all(deliveries).await?;
    }
    let mut seen = BTreeSet::new();
    let mut deleted = 0;
    // A process that is just ending may make one more; and a list shows for a minute what is gone.
    loop {
        let queues = sweep.caretaker.queues().await?;
        let new: Vec<MailboxId> = queues.into_iter().filter(|queue| seen.insert(queue.clone())).collect();
        if new.is_empty() {
            break;
        }
        deleted +=
            each(&new, |mailbox| async { sweep.caretaker.delete_queue(mailbox).await.map(|()| true) }).await;
    }
    let all = seen.len();
    tracing::info!(deleted, all, "mailboxes were deleted with their stack");
    if deleted < all {
        // Whoever deletes the stack is told, and can try again.
        let text = format!("{} of {all} queues could not be deleted", all - deleted);
        return Err(Error::Failed { call: "DeleteQueue", source: text.into() });
    }
    Ok(Report { deleted, ..Report::default() })
}

/// Does something to each, several at a time, and counts for how many it was done.
async fn each<I, F, O>(items: I, act: F) -> usize
where
    I: IntoIterator,
    F: Fn(I::Item) -> O,
    O: Future<Output = Result<bool, Error>>,
{
    stream::iter(items)
        .map(act)
        .buffer_unordered(PARALLEL)
        .fold(0, async |done, result| match result {
            Ok(true) => done + 1,
            Ok(false) => done,
            Err(error) => {
                tracing::warn!(%error, "a mailbox is left for the next sweep");
                done
            }
        })
        .await
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { kept: 2, idle: Duration::from_secs(100) };
    const NOW: u64 = 10_000;

    fn id(name: &str) -> MailboxId {
        name.parse().unwrap()
    }

    fn row(name: &str, leased_until: u64) -> Row {
        Row { mailbox: id(name), leased_until, retired: false }
    }

    fn queues(names: &[&str]) -> BTreeSet<MailboxId> {
        names.iter().map(|name| id(name)).collect()
    }

    #[test]
    fn a_pool_that_is_as_it_should_be_is_left_alone() {
        let rows = [row("a", 0), row("b", NOW), row("c", NOW + 1)];
        let plan = decide(&rows, &queues(&["a", "b", "c"]), RULES, NOW);
        assert_eq!(plan, Plan { free: 2, ..Plan::default() });
    }

    #[test]
    fn what_is_lacking_is_made_up_to_the_most() {
        assert_eq!(decide(&[row("a", NOW + 1)], &queues(&["a"]), RULES, NOW).make, 2);
        assert_eq!(decide(&[row("a", NOW)], &queues(&["a"]), RULES, NOW).make, 1);
        let many = Rules { kept: MOST + 1, ..RULES };
        assert_eq!(decide(&[], &BTreeSet::new(), many, NOW).make, MOST);
    }

    #[test]
    fn surplus_goes_the_longest_free_first_and_never_what_is_leased_or_was_until_lately() {
        let all = queues(&["a", "b", "c", "d", "e"]);
        let rows = [row("a", 7), row("b", 5), row("c", 6), row("d", NOW + 1), row("e", NOW - 99)];
        let plan = decide(&rows, &all, RULES, NOW);
        assert_eq!((plan.retire, plan.free), (vec![row("b", 5), row("c", 6)], 4));
        // At the idle time it goes, a second before it does not.
        let rows = [row("a", NOW - 99), row("b", NOW - 99), row("c", NOW - 100)];
        assert_eq!(decide(&rows, &all, RULES, NOW).retire, [row("c", NOW - 100)]);
        let rows = [row("a", NOW - 99), row("b", NOW - 99), row("c", NOW - 99)];
        assert!(decide(&rows, &all, RULES, NOW).retire.is_empty());
    }

    #[test]
    fn table_and_queues_are_brought_to_agree() {
        let marked = Row { retired: true, ..row("b", u64::MAX) };
        let rows = [row("a", 5), marked, row("c", NOW + 1), row("d", NOW - 1), row("e", 1), row("f", 2)];
        let plan = decide(&rows, &queues(&["b", "e", "f", "x"]), RULES, NOW);
        assert_eq!(plan.broken, [row("a", 5)], "its queue is gone, and it would be leased");
        assert_eq!(plan.finish, [id("b")], "a sweep was cut off");
        assert_eq!(plan.strays, [id("x")], "its row was never written");
        assert_eq!(plan.free, 3, "the list may not show the queue of `d` yet");
        assert!(plan.make == 0 && plan.retire == [row("e", 1)], "{plan:?}");
    }

    #[test]
    fn an_event_is_the_stacks_or_the_schedules() {
        let scheduled: Event =
            serde_json::from_str(r#"{"source":"aws.events","detail-type":"Scheduled Event"}"#).unwrap();
        assert!(matches!(scheduled, Event::Schedule(_)));
        assert!(matches!(serde_json::from_str("{}").unwrap(), Event::Schedule(_)));
        let text = r#"{"source":"aws.states","detail-type":"Step Functions Execution Status Change","detail":{
            "executionArn":"a:b","stateMachineArn":"a","name":"b","status":"ABORTED","startDate":1,"stopDate":2,
            "input":"{\"delivery\":\"00000000000101010101010101010101\",\"tunnel\":\"web\",\"turn\":true}",
            "inputDetails":{"included":true},"output":null,"outputDetails":null}}"#;
        let Event::Stopped(Stopped { detail }) = serde_json::from_str(text).unwrap() else { panic!() };
        let named: Named = serde_json::from_str(&detail.input).unwrap();
        assert_eq!((named.tunnel.as_str(), named.delivery.received_ms()), ("web", 1));
        let text = r#"{"RequestType":"Delete","ResponseURL":"https://x.example/y","StackId":"s","RequestId":"r",
            "LogicalResourceId":"l","PhysicalResourceId":"p","ResourceType":"Custom::Mailboxes",
            "ResourceProperties":{"ServiceToken":"t"}}"#;
        let Event::Stack(event) = serde_json::from_str(text).unwrap() else { panic!() };
        assert!(matches!(event.request, stack::Request::Delete));
    }
}
