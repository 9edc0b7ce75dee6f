//! This design and the two it replaces under the latencies of AWS: how much each adds to a request, and how
//! many calls it pays for.
//!
//! The replaced ones exist here only. Their tables are tables of the running `local`, asked through the SDK;
//! agent and upstream are the real ones; every hop that `local` lets this design wait for, they wait for as
//! well, drawn from the same profile. What is left out flatters them: no process is started or resumed for
//! their functions, no message is signed or checked, and a Standard run takes no longer from state to state
//! than an Express one.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use aws_credential_types::{Credentials, provider::SharedCredentialsProvider};
use aws_sdk_dynamodb::{
    Client as Tables,
    config::{BehaviorVersion, Region},
    types::{
        AttributeDefinition, AttributeValue, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType,
    },
};
use http_body_util::BodyExt;
use local::latency::{Hop, Latency, Profile};
use serde::Deserialize;
use tests::Local;
use tokio::task::LocalSet;

use crate::{
    agent,
    client::{Client, Target},
    edge::Line,
    figures::{Report, Unit},
    upstream::{self, Upstream},
};

/// How often whoever waits looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Requests that are under way together, each from a client of its own.
const CLIENTS: usize = 8;

/// The table of requests that wait for their answer.
const PENDING: &str = "pending";

/// For how long a row of it is kept, in seconds.
const PENDING_SECS: u64 = 30;

/// States that a Standard run enters: those of this design, with one that posts and waits in place of two.
const STANDARD_STATES: u32 = 4;

/// What the upstream does.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    /// Milliseconds until it answers, or for which its answer flows: from and below. Spread over an interval
    /// of polling, so that no design is lucky with when it looks.
    millis: (u64, u64),
    flows: bool,
    /// How many of ten times the plan's count.
    share: usize,
}

/// The mix: most answers come within half a second, some take longer, a few flow like a language model's.
const KINDS: [Kind; 5] = [
    Kind { name: "answer at once", millis: (0, 1), flows: false, share: 40 },
    Kind { name: "answer after 50 to 149 ms", millis: (50, 150), flows: false, share: 40 },
    Kind { name: "answer after 250 to 349 ms", millis: (250, 350), flows: false, share: 40 },
    Kind { name: "answer after 1 to 2 s", millis: (1000, 2000), flows: false, share: 20 },
    Kind { name: "answer that flows for 5 s", millis: (5000, 5001), flows: true, share: 8 },
];

impl Kind {
    /// The upstream's times of all requests of this kind.
    fn times(self, tenths: usize) -> Vec<u64> {
        let (from, below) = self.millis;
        let count = (self.share * tenths / 10) as u64;
        (0..count).map(|number| from + number * 37 % (below - from)).collect()
    }

    fn target(self, millis: u64) -> String {
        if self.flows { format!("/talk/{millis}") } else { format!("/wait/{millis}") }
    }
}

/// A way for a request to be carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Design {
    /// None at all.
    Direct,
    /// An Express run that waits at a mailbox.
    Ours,
    /// A table of pending requests, polled.
    Table,
    /// A Standard run with a task token, polled with `DescribeExecution`.
    Standard,
}

const DESIGNS: [Design; 4] = [Design::Direct, Design::Ours, Design::Table, Design::Standard];

impl Design {
    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ours => "this design",
            Self::Table => "polled table",
            Self::Standard => "polled Standard run",
        }
    }
}

/// What one design took for requests of one kind, in milliseconds beyond the upstream's own time.
#[derive(Debug, Default)]
struct Taken {
    whole: Vec<f64>,
    first_byte: Vec<f64>,
}

/// Whoever asks, one for each request under way: a connection of its own each way, and for the replaced
/// designs an agent of its own.
struct Asker {
    direct: Client,
    tunnel: Client,
    replaced: Replaced,
}

/// Measures one round, `tenths` of ten times as much as each kind's share. With `cpu` megabytes each process of a function
/// gets the part of a core that they buy; the replaced designs have no such processes, and are left out then.
pub(crate) async fn measure(
    program: &Path,
    upstream: &Upstream,
    tenths: usize,
    cpu: Option<u32>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let latency = cpu.map_or_else(|| "aws".to_owned(), |mb| format!("aws,cpu={mb}"));
    let local = Local::start(&["--latency", &latency]);
    let _agent = local.agent("bench", &format!("127.0.0.1:{}", upstream.port));
    let tunnel = Target { address: local.public, host: "bench.localhost".to_owned() };
    let tables = tables(&local)?;
    create_pending(&tables).await?;
    let profile = Profile::find("aws")?.context("the profile is built in")?;
    let latency = Latency::new(Some(profile), Duration::ZERO);
    let aws = Aws { tables, latency, paid: Rc::default(), requests: Rc::default() };
    let mut askers = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        askers.push(Asker {
            direct: Client::connect(&upstream.direct()).await?,
            tunnel: Client::connect(&tunnel).await?,
            replaced: Replaced {
                stage: agent::Stage::start(program, &[], upstream).await?,
                aws: aws.clone(),
            },
        });
    }
    let designs = if cpu.is_some() { &DESIGNS[..2] } else { &DESIGNS[..] };
    let ours = cpu.map_or_else(String::new, |mb| format!(" on {mb} MB"));
    // The first ones start processes and open connections.
    for &design in designs {
        ask_all(&mut askers, design, KINDS[0], &[0; CLIENTS * 3]).await?;
    }
    let mut mixed: [Vec<f64>; DESIGNS.len()] = Default::default();
    for kind in KINDS {
        let times = kind.times(tenths);
        let mut direct = Taken::default();
        for (&design, mixed) in designs.iter().zip(&mut mixed) {
            aws.paid.set(0);
            let before = counted(&local).await?;
            let mut taken = ask_all(&mut askers, design, kind, &times).await?;
            let calls = match design {
                Design::Direct => 0.0,
                Design::Ours => (counted(&local).await? - before) as f64 + times.len() as f64,
                Design::Table | Design::Standard => f64::from(aws.paid.get()),
            };
            mixed.extend_from_slice(&taken.whole);
            if design == Design::Direct {
                direct = taken;
                continue;
            }
            let name = |what: &str| format!("aws: {what}, {}{ours}", design.name());
            let goals = [None, (design == Design::Ours).then_some(200.0), None];
            report.note_delays(&name(kind.name), &mut direct.whole, &mut taken.whole, goals);
            if kind.flows {
                let name = name(&format!("first byte of an {}", kind.name));
                report.note_delays(&name, &mut direct.first_byte, &mut taken.first_byte, goals);
            }
            let name = name(&format!("billed calls a request, {}", kind.name));
            report.note(name, Unit::Count, None, None, calls / times.len() as f64);
        }
    }
    let [direct, replaced @ ..] = &mut mixed;
    for (design, taken) in designs[1..].iter().zip(replaced) {
        let name = format!("aws: all of these, {}{ours}", design.name());
        let goals = [None, (*design == Design::Ours).then_some(200.0), None];
        report.note_delays(&name, direct, taken, goals);
    }
    Ok(())
}

/// Has the askers ask for all of it, each the next one as soon as it has its answer.
async fn ask_all(
    askers: &mut Vec<Asker>,
    design: Design,
    kind: Kind,
    times: &[u64],
) -> anyhow::Result<Taken> {
    let left = Rc::new(RefCell::new(times.to_vec()));
    let set = LocalSet::new();
    let tasks: Vec<_> = askers
        .drain(..)
        .map(|mut asker| {
            let left = Rc::clone(&left);
            set.spawn_local(async move {
                let mut taken = Taken::default();
                loop {
                    let next = left.borrow_mut().pop();
                    let Some(millis) = next else { return anyhow::Ok((asker, taken)) };
                    let target = kind.target(millis);
                    let begun = Instant::now();
                    let first = match design {
                        Design::Direct => answer(&mut asker.direct, &target, kind).await?,
                        Design::Ours => answer(&mut asker.tunnel, &target, kind).await?,
                        Design::Table => asker.replaced.by_table(&target).await?,
                        Design::Standard => asker.replaced.by_standard_run(&target).await?,
                    };
                    let beyond = |now: Instant, own: u64| (now - begun).as_secs_f64() * 1e3 - own as f64;
                    taken.whole.push(beyond(Instant::now(), millis));
                    taken.first_byte.push(beyond(first, if kind.flows { 0 } else { millis }));
                }
            })
        })
        .collect();
    set.await;
    let mut all = Taken::default();
    for task in tasks {
        let (asker, taken) = task.await??;
        askers.push(asker);
        all.whole.extend(taken.whole);
        all.first_byte.extend(taken.first_byte);
    }
    Ok(all)
}

/// Asks, and gives when the first byte of the body was there.
async fn answer(client: &mut Client, target: &str, kind: Kind) -> anyhow::Result<Instant> {
    let mut body = client.begin(target, None).await?.into_body();
    let first = body.frame().await.context("no body")??;
    let begun = Instant::now();
    let rest = body.collect().await?.to_bytes();
    let is_right =
        kind.flows || (rest.is_empty() && first.data_ref().is_some_and(|data| data == upstream::HELLO));
    ensure!(is_right, "a wrong answer");
    Ok(begun)
}

/// What `local` counts by caller.
#[derive(Debug, Deserialize)]
struct Counts {
    callers: BTreeMap<String, BTreeMap<String, u64>>,
}

/// How many calls this design has paid for so far: those of the run and of both functions, and for each
/// message of an agent that message and its invocation. The invocation of `ingress` is not in it.
pub(crate) async fn counted(local: &Local) -> anyhow::Result<u64> {
    let counts: Counts = serde_json::from_str(&local.own("counters").await)?;
    let of = |caller: &str| counts.callers.get(caller);
    let all = ["ingress", "response", local::services::STATES].into_iter().filter_map(of);
    let calls: u64 = all.flat_map(BTreeMap::values).sum();
    let messages = of("response").and_then(|actions| actions.get("sqs:SendMessage"));
    Ok(calls + 2 * messages.copied().unwrap_or_default())
}

/// A client of the running `local`'s tables.
fn tables(local: &Local) -> anyhow::Result<Tables> {
    let key = std::fs::read_to_string(local.state_dir().join("operator")).context("the operator's key")?;
    let credentials =
        Credentials::builder().access_key_id(key).secret_access_key("none").provider_name("bench");
    let config = aws_sdk_dynamodb::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("local-1"))
        .endpoint_url(format!("http://{}", local.endpoint))
        .credentials_provider(SharedCredentialsProvider::new(credentials.build()))
        .http_client(aws_smithy_http_client::Builder::new().build_http());
    Ok(Tables::from_conf(config.build()))
}

async fn create_pending(tables: &Tables) -> anyhow::Result<()> {
    let key = KeySchemaElement::builder().attribute_name("request_id").key_type(KeyType::Hash);
    let attribute =
        AttributeDefinition::builder().attribute_name("request_id").attribute_type(ScalarAttributeType::S);
    tables
        .create_table()
        .table_name(PENDING)
        .key_schema(key.build()?)
        .attribute_definitions(attribute.build()?)
        .billing_mode(BillingMode::PayPerRequest)
        .send()
        .await?;
    Ok(())
}

fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

/// The designs that are no more.
struct Replaced {
    stage: agent::Stage,
    aws: Aws,
}

/// What they call.
#[derive(Clone)]
struct Aws {
    tables: Tables,
    latency: Latency,
    paid: Rc<Cell<u32>>,
    requests: Rc<Cell<u64>>,
}

impl Replaced {
    /// A table of pending requests, polled by the function that has the public client.
    ///
    /// Each step waits for the one before, as in one function. The first look comes an interval after the
    /// post: a look at once would be one more call, which never finds anything.
    async fn by_table(&mut self, target: &str) -> anyhow::Result<Instant> {
        let Self { stage, aws } = self;
        // The invocation of the public client's function.
        aws.pay(1);
        aws.latency.hop(Hop::Front).await;
        aws.look_up_connection().await?;
        let request_id = aws.put_pending().await?;
        aws.post().await;
        let answered = async {
            let answer = aws.bring_back(&mut stage.line, target).await?;
            aws.complete(&request_id, answer).await
        };
        let looking = async {
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                if aws.is_complete(&request_id).await? {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::try_join!(answered, looking)?;
        Ok(Instant::now())
    }

    /// A Standard workflow whose token comes back with `SendTaskSuccess`, awaited with `DescribeExecution`.
    async fn by_standard_run(&mut self, target: &str) -> anyhow::Result<Instant> {
        let Self { stage, aws } = self;
        aws.pay(1 + STANDARD_STATES);
        aws.latency.hop(Hop::Front).await;
        aws.latency.hop(Hop::StartRun).await;
        let is_over = Cell::new(false);
        let run = async {
            aws.look_up_connection().await?;
            aws.post().await;
            aws.bring_back(&mut stage.line, target).await?;
            // SendTaskSuccess, which nobody pays for, and the rest of the run.
            aws.latency.hop(Hop::StartRun).await;
            is_over.set(true);
            anyhow::Ok(())
        };
        let looking = async {
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                // Not on the bill, but against a quota of 15 a second.
                aws.latency.hop(Hop::Describe).await;
                if is_over.get() {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::try_join!(run, looking)?;
        Ok(Instant::now())
    }
}

impl Aws {
    /// Counts calls that are paid for.
    fn pay(&self, calls: u32) {
        self.paid.set(self.paid.get() + calls);
    }

    /// Who serves the tunnel: the rows of the agent that serves this design's.
    async fn look_up_connection(&self) -> anyhow::Result<()> {
        self.pay(1);
        let found = self
            .tables
            .query()
            .table_name("connections")
            .consistent_read(true)
            .key_condition_expression("tunnel = :tunnel")
            .expression_attribute_values(":tunnel", text("bench"))
            .projection_expression("connection_id")
            .send()
            .await?;
        ensure!(found.count() == 2, "{} rows where the name and one connection are", found.count());
        Ok(())
    }

    async fn put_pending(&self) -> anyhow::Result<String> {
        self.pay(1);
        self.requests.set(self.requests.get() + 1);
        let request_id = format!("request-{}", self.requests.get());
        let expires_at = tests::operator::unix_now() + PENDING_SECS;
        self.tables
            .put_item()
            .table_name(PENDING)
            .item("request_id", text(&*request_id))
            .item("status", text("pending"))
            .item("expires_at", AttributeValue::N(expires_at.to_string()))
            .condition_expression("attribute_not_exists(request_id)")
            .send()
            .await?;
        Ok(request_id)
    }

    async fn complete(&self, request_id: &str, answer: String) -> anyhow::Result<()> {
        self.pay(1);
        self.tables
            .update_item()
            .table_name(PENDING)
            .key("request_id", text(request_id))
            .update_expression("SET #status = :complete, answer = :answer")
            .condition_expression("#status = :pending")
            .expression_attribute_names("#status", "status")
            .expression_attribute_values(":complete", text("complete"))
            .expression_attribute_values(":pending", text("pending"))
            .expression_attribute_values(":answer", text(answer))
            .send()
            .await?;
        Ok(())
    }

    async fn is_complete(&self, request_id: &str) -> anyhow::Result<bool> {
        self.pay(1);
        let got = self
            .tables
            .get_item()
            .table_name(PENDING)
            .key("request_id", text(request_id))
            .consistent_read(true)
            .send()
            .await?;
        let row = got.item.context("the pending row is gone")?;
        let is_complete = row.get("status") == Some(&text("complete"));
        ensure!(is_complete == row.contains_key("answer"), "an answer that is not complete");
        Ok(is_complete)
    }

    /// Posts the request to the agent: it is there when this returns.
    async fn post(&self) {
        self.pay(1);
        self.latency.hop(Hop::Connections).await;
        self.latency.hop(Hop::Link).await;
    }

    /// The agent asks the upstream; its answer, as one message, reaches the function that takes answers.
    async fn bring_back(&self, line: &mut Line, target: &str) -> anyhow::Result<String> {
        let body = line.whole(target).await?;
        self.latency.hop(Hop::Link).await;
        self.latency.hop(Hop::Invoke).await;
        self.pay(2);
        Ok(String::from_utf8(body)?)
    }
}
