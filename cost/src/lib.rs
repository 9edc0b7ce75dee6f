//! What the edge costs: enter the calls that `local` counted (`calls.toml`) and list prices (`prices.toml`),
//! leaves `docs/cost.md`.
//!
//! What `local` cannot count is said here: how long functions run in AWS ([`ASSUMED`]) and how calls are
//! metered (messages by 32 KB, queue requests by 64 KB, runs by 100 ms). Free tiers are left out.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use anyhow::{Context as _, ensure};
use edge::metrics::Metric;
use proto::limits;
use serde::{Deserialize, Serialize};

pub mod measure;

/// The prices of this version.
pub const PRICES: &str = include_str!("../prices.toml");

/// The calls of this version.
pub const CALLS: &str = include_str!("../calls.toml");

const SERVERLESS: &str = include_str!("../../serverless.yml");

const RELAY: &str = include_str!("../../resources/relay.yml");

/// The calls of AWS by name, as `local` counts them: for one of something.
pub type Calls = BTreeMap<String, f64>;

/// What `local` counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// One small request, answered by one message.
    pub small_request: Calls,
    /// One gigabyte (10^9 bytes) of a response that does not compress.
    pub download_gb: Calls,
    /// One agent that connects with one tunnel.
    pub connect: Calls,
    /// One that leaves.
    pub disconnect: Calls,
    /// One sweep with nothing to do.
    pub sweep: Calls,
    /// One small webhook that is kept and delivered while its agent is there.
    pub delivery: Calls,
    /// What it takes more to wait for an agent, however long.
    pub parked: Calls,
    /// What each further attempt takes.
    pub retry: Calls,
}

/// One list price.
#[derive(Debug, Clone, Deserialize)]
pub struct Price {
    usd: f64,
    per: f64,
    unit: String,
    source: String,
}

/// How long things take in AWS. Not measured there.
pub struct Assumed {
    /// What the upstream takes.
    pub upstream_ms: f64,
    /// What the way there and back takes, with 8 ms for each call inside a region.
    pub way_ms: f64,
    /// What one invocation of another function takes.
    pub function_ms: f64,
    /// How far the tokens of a language model's answer are apart.
    pub token_ms: f64,
    /// How fast a public client takes a download, in bytes a second.
    pub download_rate: f64,
    /// The line that `ingress` writes about a request, with what CloudWatch adds to each.
    pub log_bytes: f64,
}

/// The assumptions, in one place.
pub const ASSUMED: Assumed = Assumed {
    upstream_ms: 100.0,
    way_ms: 60.0,
    function_ms: 15.0,
    token_ms: 20.0,
    download_rate: 2e6,
    log_bytes: 450.0,
};

const MONTH_DAYS: f64 = 30.0;
const MONTH_SECONDS: f64 = MONTH_DAYS * 24.0 * 60.0 * 60.0;

/// What a delivery's row is written as, with a body of 2 KB in it: 4 KB.
const DELIVERY_WRITE_UNITS: f64 = 4.0;

/// What the row of a run that waits is written as: 2 KB.
const PARKED_WRITE_UNITS: f64 = 2.0;

/// How many bytes a waiting delivery takes in the table.
const DELIVERY_BYTES: f64 = 4_000.0;

/// What the sweeps read of one delivery's row, of 4 KB: each looks through what was accepted in the last quarter of an hour, so
/// three of them meet it, and half a unit reads 4 KB.
const SWEPT_READ_UNITS: f64 = 3.0 * 0.5 * 4.0 / 4.0;

/// What a sweep reads of a tunnel that has anything waiting, whatever that is: whether something is new, whether an agent is
/// there, and how much waits.
const WAITING_TUNNEL_READ_UNITS: f64 = 0.5 + 0.5 + 1.0;

/// What it reads of each that waits, up to a thousand: its token and names, of 1,200 bytes.
const COUNTED_READ_UNITS: f64 = 1.2 / 4.0;

/// How many are counted (`sweep`).
const MOST_COUNTED: f64 = 1_000.0;

const SWEEPS_A_DAY: f64 = 24.0 * 60.0 / 5.0;

/// How public requests come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// The Function URL itself.
    None,
    /// CloudFront.
    CloudFront,
    /// API Gateway HTTP API.
    HttpApi,
}

impl Front {
    /// Every front.
    pub const ALL: [Self; 3] = [Self::None, Self::CloudFront, Self::HttpApi];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::CloudFront => "cloudfront",
            Self::HttpApi => "httpapi",
        }
    }
}

/// How much of what is used, by the name of its price.
#[derive(Debug, Default, Clone)]
struct Usage(BTreeMap<&'static str, f64>);

impl Usage {
    fn add(&mut self, price: &'static str, quantity: f64) {
        *self.0.entry(price).or_default() += quantity;
    }

    fn add_all(&mut self, other: &Self, times: f64) {
        for (price, quantity) in &other.0 {
            self.add(price, quantity * times);
        }
    }
}

/// Which part of a month has working hours: 22 days of 8.
const WORKING: f64 = 22.0 * 8.0 / (MONTH_DAYS * 24.0);

/// Prices, calls and the settings of the deployment.
pub struct Model {
    prices: BTreeMap<String, Price>,
    measured: Measured,
    /// In GB, by function.
    memory: BTreeMap<String, f64>,
    /// Processors and GB of a task of `relay`.
    task: (f64, f64),
}

impl Model {
    /// Reads everything that is part of this version.
    ///
    /// # Errors
    ///
    /// When a file is not what it should be.
    pub fn load() -> anyhow::Result<Self> {
        Ok(Self {
            prices: toml::from_str(PRICES).context("prices.toml")?,
            measured: toml::from_str(CALLS).context("calls.toml")?,
            memory: memory(SERVERLESS)?,
            task: task(RELAY)?,
        })
    }

    fn usd(&self, usage: &Usage) -> f64 {
        usage.0.iter().map(|(price, quantity)| quantity * self.unit_price(price)).sum()
    }

    fn unit_price(&self, name: &str) -> f64 {
        let price = self.prices.get(name).unwrap_or_else(|| panic!("prices.toml has no {name}"));
        price.usd / price.per
    }

    fn invocation(&self, usage: &mut Usage, function: &str, times: f64, ms: f64) {
        usage.add("lambda_request", times);
        usage.add("lambda_gb_second", times * self.memory[function] * ms / 1000.0);
    }

    /// What the tables, queues and agents' connections of some calls are metered as. `sqs_units` is how many
    /// 64 KB a queue's message has, `post_units` how many 32 KB a message to an agent.
    fn calls(&self, calls: &Calls, sqs_units: f64, post_units: f64) -> Usage {
        let mut usage = Usage::default();
        for (call, &count) in calls {
            match call.as_str() {
                // Strongly consistent, and less than 4 KB.
                "dynamodb:Query" | "dynamodb:GetItem" | "dynamodb:Scan" => usage.add("dynamodb_read", count),
                "dynamodb:PutItem" | "dynamodb:UpdateItem" | "dynamodb:DeleteItem" => {
                    usage.add("dynamodb_write", count);
                }
                "sqs:SendMessage" => usage.add("sqs_request", count * sqs_units),
                call if call.starts_with("sqs:") => usage.add("sqs_request", count),
                "apigateway:invoke POST" | "execute-api POST" => {
                    usage.add("websocket_message", count * post_units);
                }
                // Asking for a connection is not metered as a message.
                "apigateway:invoke GET" | "execute-api GET" => {}
                "states:StartSyncExecution" => usage.add("express_request", count),
                measure::TRANSITION => usage.add("standard_transition", count),
                // The runs are paid for by their transitions.
                call if call.starts_with("states:") => {}
                call if call.starts_with("lambda:") => {
                    self.invocation(&mut usage, "deliver", count, ASSUMED.function_ms)
                }
                other => panic!("calls.toml has {other}, which has no price here"),
            }
        }
        usage
    }

    /// How many calls delete the message of a small request, where one request follows the other.
    fn deletions(&self) -> f64 {
        let calls = self.measured.small_request.iter();
        calls.filter(|(call, _)| call.starts_with("sqs:DeleteMessage")).map(|(_, count)| count).sum()
    }

    fn small_request(&self, front: Front) -> Usage {
        let calls = &self.measured.small_request;
        let ms = ASSUMED.upstream_ms + ASSUMED.way_ms;
        let mut usage = self.calls(calls, 1.0, 1.0);
        self.invocation(&mut usage, "ingress", 1.0, ms);
        // Each message of the agent is one that API Gateway meters and one invocation.
        let replies = calls.get("sqs:SendMessage").copied().unwrap_or_default();
        usage.add("websocket_message", replies);
        self.invocation(&mut usage, "response", replies, ASSUMED.function_ms);
        usage.add("express_gb_second", (ms / 100.0).ceil() * 0.1 * 64.0 / 1024.0);
        usage.add("logs_gb", ASSUMED.log_bytes / 1e9);
        match front {
            Front::None => {}
            Front::CloudFront => {
                usage.add("cloudfront_request", 1.0);
                usage.add("cloudfront_function", 1.0);
            }
            Front::HttpApi => usage.add("httpapi_request", 1.0),
        }
        usage
    }

    /// What the calls of a delivery are metered as: rows that are written as so many units, and an answer of the agent for each
    /// attempt.
    fn of_delivery(&self, calls: &Calls, attempts: f64, write_units: f64) -> Usage {
        let metered = self.calls(calls, 1.0, 1.0);
        let mut usage = Usage::default();
        for (price, quantity) in metered.0 {
            let units = if price == "dynamodb_write" { write_units } else { 1.0 };
            usage.add(price, quantity * units);
        }
        usage.add("websocket_message", attempts);
        self.invocation(&mut usage, "response", attempts, ASSUMED.function_ms);
        usage
    }

    /// One small webhook that is kept and delivered at the first try.
    fn delivery(&self) -> Usage {
        let mut usage = self.of_delivery(&self.measured.delivery, 1.0, DELIVERY_WRITE_UNITS);
        self.invocation(&mut usage, "ingress", 1.0, ASSUMED.way_ms);
        // Only the first request that a process of `ingress` keeps for a tunnel has a run.
        let runs = self.measured.delivery.get("states:StartSyncExecution").copied().unwrap_or(0.0);
        if runs > 0.0 {
            usage.add("express_gb_second", runs * (ASSUMED.way_ms / 100.0).ceil() * 0.1 * 64.0 / 1024.0);
        }
        usage.add("logs_gb", 3.0 * ASSUMED.log_bytes / 1e9);
        usage.add("dynamodb_read", SWEPT_READ_UNITS);
        usage
    }

    /// A day of a tunnel in which so many deliveries wait, apart from their storage.
    fn waiting_tunnel(waiting: f64) -> Usage {
        let mut usage = Usage::default();
        let each = WAITING_TUNNEL_READ_UNITS + (waiting * COUNTED_READ_UNITS).max(1.0) - 1.0;
        usage.add("dynamodb_read", SWEEPS_A_DAY * each);
        usage
    }

    /// The same, after it has waited for an agent for some hours.
    fn delivery_after(&self, hours: f64) -> Usage {
        let mut usage = self.delivery();
        usage.add_all(&self.of_delivery(&self.measured.parked, 0.0, PARKED_WRITE_UNITS), 1.0);
        usage.add_all(&Self::waiting(hours), 1.0);
        usage
    }

    /// The same, with further attempts.
    fn delivery_with(&self, retries: f64) -> Usage {
        let mut usage = self.delivery();
        usage.add_all(&self.of_delivery(&self.measured.retry, 1.0, DELIVERY_WRITE_UNITS), retries);
        usage
    }

    /// One delivery that waits.
    fn waiting(hours: f64) -> Usage {
        let mut usage = Usage::default();
        usage.add("dynamodb_gb_month", DELIVERY_BYTES / 1e9 * hours / (MONTH_DAYS * 24.0));
        usage
    }

    /// One GB of one long response; over a front with a limit, of as many as it takes.
    fn download_gb(&self, front: Front) -> Usage {
        let calls = &self.measured.download_gb;
        let message = (limits::CHUNK_BYTES / 3 * 4 + limits::ENVELOPE_BYTES / 2) as f64;
        // Credit is small; the rest of what goes to the agent is one request.
        let messages = calls.get("sqs:SendMessage").copied().unwrap_or_default();
        let mut others = calls.clone();
        // Metered by what it brings, below.
        others.remove("sqs:ReceiveMessage");
        let mut usage = self.calls(&others, (message / 65_536.0).ceil(), 1.0);
        usage.add("websocket_message", messages * (message / 32_768.0).ceil());
        self.invocation(&mut usage, "response", messages, ASSUMED.function_ms);
        usage.add("sqs_request", messages * (message / 65_536.0).ceil());
        usage.add("lambda_gb_second", self.memory["ingress"] * 1e9 / ASSUMED.download_rate);
        match front {
            Front::None => {
                usage.add("lambda_streamed_gb", 1.0);
                usage.add("internet_gb", 1.0);
            }
            Front::CloudFront => {
                usage.add("lambda_streamed_gb", 1.0);
                usage.add("cloudfront_gb", 1.0);
            }
            Front::HttpApi => {
                // In responses of 10 MB, the most it carries: metered by 512 KB, and each a request of its own.
                usage.add("httpapi_request", 1e9 / 524_288.0 - 100.0);
                usage.add_all(&self.small_request(front), 100.0);
                usage.add("lambda_streamed_gb", 0.4);
                usage.add("internet_gb", 1.0);
            }
        }
        usage
    }

    /// How many tokens of a language model go in one message: those that come while the first of them waits.
    fn tokens_gathered() -> f64 {
        (limits::CHUNK_GATHER.as_secs_f64() * 1e3 / ASSUMED.token_ms).floor() + 1.0
    }

    /// One token of a language model in a long answer, where a message has so many.
    fn token(&self, gathered: f64) -> Usage {
        let mut usage = Usage::default();
        let messages = 1.0 / gathered;
        // One of the agent, into the mailbox and out of it; then its deletion and its credit, with those of others.
        usage.add("websocket_message", messages * (1.0 + 1.0 / f64::from(limits::CREDIT_EVERY)));
        usage.add("sqs_request", messages * (2.0 + self.deletions()));
        self.invocation(&mut usage, "response", messages, ASSUMED.function_ms);
        usage.add("lambda_gb_second", self.memory["ingress"] * ASSUMED.token_ms / 1000.0);
        usage
    }

    /// An agent that stays connected for a month and serves nobody, where the edge answers pings.
    fn idle_agent(&self) -> Usage {
        self.idle_agent_with(limits::HEARTBEAT_INTERVAL * limits::PINGS_A_HEARTBEAT)
    }

    /// The same with a heartbeat in `interval`.
    fn idle_agent_with(&self, interval: Duration) -> Usage {
        let mut usage = Usage::default();
        usage.add("websocket_minute", MONTH_SECONDS / 60.0);
        let beats = MONTH_SECONDS / interval.as_secs_f64();
        // A heartbeat and its answer.
        usage.add("websocket_message", beats * 2.0);
        self.invocation(&mut usage, "response", beats, 2.0);
        let life = (limits::CONNECTION_LIFETIME - limits::REPLACE_AHEAD).as_secs_f64();
        let connections = MONTH_SECONDS / life;
        usage.add_all(&self.calls(&self.measured.connect, 1.0, 1.0), connections);
        usage.add_all(&self.calls(&self.measured.disconnect, 1.0, 1.0), connections);
        // `hello` and `welcome`, when it comes and when it leaves service.
        usage.add("websocket_message", connections * 4.0);
        self.invocation(&mut usage, "authorizer", connections, ASSUMED.function_ms);
        self.invocation(&mut usage, "connect", connections * 3.0, ASSUMED.function_ms);
        self.invocation(&mut usage, "disconnect", connections, ASSUMED.function_ms);
        usage
    }

    /// What there is every month without any agent and request.
    fn standing(&self, front: Front) -> Usage {
        let mut usage = Usage::default();
        let sweeps = MONTH_SECONDS / limits::SWEEP_INTERVAL.as_secs_f64();
        usage.add_all(&self.calls(&self.measured.sweep, 1.0, 1.0), sweeps);
        self.invocation(&mut usage, "sweep", sweeps, 50.0);
        usage.add("logs_gb", sweeps * 2.0 * ASSUMED.log_bytes / 1e9);
        usage.add("secret_month", if front == Front::None { 1.0 } else { 2.0 });
        usage.add("key_month", 1.0);
        usage
    }

    /// What `relay` adds every month while it sleeps: its balancer, and a secret.
    fn asleep(&self) -> Usage {
        let mut usage = Usage::default();
        usage.add("balancer_hour", MONTH_SECONDS / 3600.0);
        // What its tasks are given.
        usage.add("secret_month", 1.0);
        usage
    }

    /// What `relay` adds every month while one task of it runs, which nobody uses.
    fn awake(&self) -> Usage {
        let hours = MONTH_SECONDS / 3600.0;
        let mut usage = self.asleep();
        usage.add("fargate_vcpu_hour", hours * self.task.0);
        usage.add("fargate_gb_hour", hours * self.task.1);
        usage.add("address_hour", hours);
        // Its mailbox is polled all the time, and it writes a line a minute.
        usage.add("sqs_request", MONTH_SECONDS / limits::MAILBOX_WAIT.as_secs_f64());
        usage.add("logs_gb", MONTH_SECONDS / 60.0 * ASSUMED.log_bytes / 1e9);
        // Once in five minutes it is noted that it is wanted.
        usage.add("dynamodb_write", MONTH_SECONDS / limits::SWEEP_INTERVAL.as_secs_f64());
        usage
    }

    /// As [`Model::awake`], with one capacity unit of the balancer in use all the time.
    fn busy(&self) -> Usage {
        let mut usage = self.awake();
        usage.add("balancer_unit_hour", MONTH_SECONDS / 3600.0);
        usage
    }

    fn scenario(&self, front: Front, agents: f64, requests: f64, bytes: f64) -> f64 {
        let mut usage = self.standing(front);
        usage.add_all(&self.idle_agent(), agents);
        usage.add_all(&self.small_request(front), requests);
        // So rare that no two requests share a deletion.
        usage.add("sqs_request", requests * (1.0 - self.deletions()));
        let out = if front == Front::CloudFront { "cloudfront_gb" } else { "internet_gb" };
        usage.add(out, requests * bytes / 1e9);
        self.usd(&usage)
    }
}

/// How many alarms the stack has, and how many metrics they look at: each of those is paid for.
fn alarms() -> (usize, usize) {
    let stack = include_str!("../../resources/operations.yml");
    (stack.matches("Type: AWS::CloudWatch::Alarm").count(), stack.matches("MetricName: ").count())
}

/// How many metrics have data in a month: every one, and of the requests those of four outcomes.
fn metrics() -> usize {
    Metric::ALL.len() + 3
}

/// The memory of each function, out of `serverless.yml`, in GB.
fn memory(text: &str) -> anyhow::Result<BTreeMap<String, f64>> {
    let (_, functions) = text.split_once("\nfunctions:\n").context("serverless.yml has no functions")?;
    let functions = functions.split("\nresources:").next().unwrap_or_default();
    let mut memory = BTreeMap::new();
    let mut function = "";
    for line in functions.lines() {
        if let Some(name) = line.strip_prefix("  ").and_then(|line| line.strip_suffix(':'))
            && !name.starts_with(' ')
        {
            function = name;
        } else if let Some(mb) = line.trim().strip_prefix("memorySize: ") {
            memory.insert(function.to_owned(), mb.trim().parse::<f64>()? / 1024.0);
        }
    }
    ensure!(memory.len() == 9, "serverless.yml says the memory of {} functions", memory.len());
    Ok(memory)
}

/// Processors and GB of a task, out of `resources/relay.yml`.
fn task(text: &str) -> anyhow::Result<(f64, f64)> {
    let number = |key: &str| {
        let found = text.lines().find_map(|line| line.trim().strip_prefix(key));
        let quoted = found.with_context(|| format!("resources/relay.yml has no {key}"))?;
        anyhow::Ok(quoted.trim().trim_matches('\'').parse::<f64>()? / 1024.0)
    };
    Ok((number("Cpu:")?, number("Memory:")?))
}

/// Makes `docs/cost.md`.
///
/// # Errors
///
/// When one of the files is not what it should be.
pub fn page() -> anyhow::Result<String> {
    let model = Model::load()?;
    let mut page = String::new();
    let out = &mut page;
    writeln!(
        out,
        "# What it costs\n\n\
         Computed by `cargo run -p cost` from the calls that `local` counts (`cost/calls.toml`) and AWS's list prices\n\
         (`cost/prices.toml`); a test keeps this page equal to what the program prints. US dollars, region us-east-1, no free\n\
         tier, no taxes. Nothing was measured on a bill.\n"
    )?;
    writeln!(
        out,
        "Assumed where AWS alone could tell: the upstream takes {} ms and the way there and back {} ms; another function runs\n\
         for {} ms; a download is taken at {} MB/s, Lambda's own\n\
         rate after the first 6 MB, and does not compress; the line written about a request has {} bytes.\n",
        ASSUMED.upstream_ms,
        ASSUMED.way_ms,
        ASSUMED.function_ms,
        ASSUMED.download_rate / 1e6,
        ASSUMED.log_bytes
    )?;
    writeln!(out, "## In one table\n")?;
    writeln!(out, "| front | a million small requests | a GB downloaded |\n|---|---:|---:|")?;
    for front in Front::ALL {
        let million = model.usd(&model.small_request(front)) * 1e6;
        let gb = model.usd(&model.download_gb(front));
        writeln!(out, "| `{}` | ${million:.2} | ${gb:.3} |", front.name())?;
    }
    writeln!(
        out,
        "\nThe messages of ten requests are deleted by one call where they follow each other within {} s in one process of `ingress`. A\n\
         request that comes alone makes one of its own: up to ${:.2} more for a million, counted in the two scenarios below.",
        limits::MAILBOX_DELETE_AFTER.as_secs(),
        (1.0 - model.deletions()) * model.unit_price("sqs_request") * 1e6
    )?;
    writeln!(
        out,
        "\nA million tokens of a language model, {} ms apart in long answers: **${:.2}**. While one is on its way the next wait for\n\
         each other, {} ms at most, and {} make a message. One by one they would be ${:.2}.",
        ASSUMED.token_ms,
        model.usd(&model.token(Model::tokens_gathered())) * 1e6,
        limits::CHUNK_GATHER.as_millis(),
        Model::tokens_gathered(),
        model.usd(&model.token(1.0)) * 1e6,
    )?;
    writeln!(
        out,
        "\nAn agent that is connected for a month and serves nobody: **${:.3}**. It watches its link by WebSocket pings, which are\n\
         not billed, and sends a heartbeat in {} s. Where pings are not answered (`agentd status` says which) heartbeats come in\n\
         {} s: **${:.2}**. Whether API Gateway answers pings is not documented; the agent tries it on each connection.\n",
        model.usd(&model.idle_agent()),
        (limits::HEARTBEAT_INTERVAL * limits::PINGS_A_HEARTBEAT).as_secs(),
        limits::HEARTBEAT_INTERVAL.as_secs(),
        model.usd(&model.idle_agent_with(limits::HEARTBEAT_INTERVAL))
    )?;
    writeln!(
        out,
        "Every month, with no agent and no request: **${:.2}** (the key of the task tokens in Secrets Manager, a KMS key\n\
         for the variables that hold it, ${:.0} of it, which `variablesKey=aws` saves, and a sweep every {} minutes), with a front of\n\
         your own domain ${:.2} (its secret). Watching costs more at list price:\n\
         the dashboard ${:.2}, {} metrics while they have data ${:.2}, {} alarms ${:.2} (they look at {} metrics, and each of those is\n\
         charged as one alarm); CloudWatch's free tier covers three dashboards, ten metrics and ten of these. Tracing (`tracing`, X-Ray) adds up to ${:.2} for a million requests, since it records the first\n\
         request of each second and one in twenty of the others.\n",
        model.usd(&model.standing(Front::None)),
        model.unit_price("key_month"),
        limits::SWEEP_INTERVAL.as_secs() / 60,
        model.usd(&model.standing(Front::CloudFront)),
        model.unit_price("dashboard_month"),
        metrics(),
        metrics() as f64 * model.unit_price("metric_month"),
        alarms().0,
        alarms().1 as f64 * model.unit_price("alarm_month"),
        alarms().1,
        model.unit_price("trace") * 1e6
    )?;
    writeln!(
        out,
        "Public WebSockets (`websockets=relay`) add a balancer and a secret, which cost **${:.2}** a month while `relay` sleeps, and **${:.2}** in all while one task\n\
         runs: a month of working days, eight hours each, with somebody there is ${:.2}. A task that is in use all the time takes up to a\n\
         capacity unit of the balancer, ${:.2} in all.\n",
        model.usd(&model.asleep()),
        model.usd(&model.awake()),
        model.usd(&model.asleep()) + (model.usd(&model.awake()) - model.usd(&model.asleep())) * WORKING,
        model.usd(&model.busy())
    )?;
    writeln!(
        out,
        "A stream whose client has left runs on for `responseDurationSecs`, because AWS does not say that it has: 1,000 of them for\n\
         300 s cost **${:.2}**. `wwwAuthenticateArn` adds Lambda@Edge, ${:.2} for a million answers and what they run. A stack with\n\
         `executions` counts requests: up to ${:.2} more for a million.\n",
        model.memory["ingress"] * 300.0 * 1000.0 * model.unit_price("lambda_gb_second"),
        model.unit_price("lambda_edge_request") * 1e6,
        model.unit_price("dynamodb_write") * 2e6
    )?;
    writeln!(
        out,
        "A million durable deliveries ([durable.md](durable.md)), each a small webhook, front `none`: **${:.2}** delivered at the first\n\
         try, ${:.2} after eight hours without an agent, ${:.2} with three further attempts each. Each state that a Standard run enters\n\
         is paid for: {} at the first try, {} more for each wait for an agent, however long, {} for each further attempt. One that waits makes no call: ${:.2} a\n\
         day for a million of {} bytes in the table, and ${:.6} once for being parked and woken. Each sweep looks at a tunnel in which\n\
         anything waits and counts that, up to a thousand: ${:.5} a day for such a tunnel with one, ${:.2} with a thousand or more.\n",
        model.usd(&model.delivery()) * 1e6,
        model.usd(&model.delivery_after(8.0)) * 1e6,
        model.usd(&model.delivery_with(3.0)) * 1e6,
        model.measured.delivery[measure::TRANSITION],
        model.measured.parked[measure::TRANSITION],
        model.measured.retry[measure::TRANSITION],
        model.usd(&Model::waiting(24.0)) * 1e6,
        DELIVERY_BYTES,
        model.usd(&model.of_delivery(&model.measured.parked, 0.0, PARKED_WRITE_UNITS)),
        model.usd(&Model::waiting_tunnel(1.0)),
        model.usd(&Model::waiting_tunnel(MOST_COUNTED))
    )?;
    for front in Front::ALL {
        let title = format!("A million small requests, front `{}`", front.name());
        breakdown(out, &model, &title, &model.small_request(front), 1e6)?;
    }
    breakdown(out, &model, "A GB downloaded, front `none`", &model.download_gb(Front::None), 1.0)?;
    let tokens = model.token(Model::tokens_gathered());
    breakdown(out, &model, "A million tokens of a language model", &tokens, 1e6)?;
    breakdown(
        out,
        &model,
        "A million durable deliveries at the first try, front `none`",
        &model.delivery(),
        1e6,
    )?;
    breakdown(out, &model, "An idle agent, for a month", &model.idle_agent(), 1.0)?;
    breakdown(out, &model, "`relay` asleep, for a month", &model.asleep(), 1.0)?;
    breakdown(out, &model, "`relay` awake and unused, for a month", &model.awake(), 1.0)?;

    writeln!(
        out,
        "## The two scenarios of the specification\n\n\
         A month, answers of 20 KB, agents connected all the time, at list price without watching.\n"
    )?;
    writeln!(out, "| | estimated there | `none` | `cloudfront` | `httpapi` |\n|---|---:|---:|---:|---:|")?;
    for (name, estimate, agents, requests) in [
        ("development: one tunnel, 1,000 requests a day", "$1 to 8", 1.0, 1000.0 * MONTH_DAYS),
        (
            "10 tunnels with 1,000 requests a day each, an agent each",
            "$75 to 150",
            10.0,
            10_000.0 * MONTH_DAYS,
        ),
    ] {
        write!(out, "| {name} | {estimate} |")?;
        for front in Front::ALL {
            write!(out, " ${:.2} |", model.scenario(front, agents, requests, 20e3))?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "\nWith one agent for all ten tunnels the second is ${:.2} with `none`: an agent serves up to {} tunnels.\n",
        model.scenario(Front::None, 1.0, 10_000.0 * MONTH_DAYS, 20e3),
        limits::TUNNELS_PER_CONNECTION
    )?;
    writeln!(out, "## Prices\n\n| | price | for | source |\n|---|---:|---|---|")?;
    for (name, price) in &model.prices {
        let per = if price.per == 1.0 { "1".to_owned() } else { format!("{:.0} M", price.per / 1e6) };
        writeln!(out, "| {name} | ${} | {per} {} | {} |", price.usd, price.unit, price.source)?;
    }
    Ok(page)
}

fn breakdown(out: &mut String, model: &Model, title: &str, usage: &Usage, times: f64) -> anyhow::Result<()> {
    writeln!(out, "## {title}\n\n| what | how much | cost |\n|---|---:|---:|")?;
    for (name, quantity) in &usage.0 {
        let unit = &model.prices[*name].unit;
        let (quantity, usd) = (quantity * times, quantity * times * model.unit_price(name));
        writeln!(out, "| {unit} | {} | ${usd:.3} |", readable(quantity))?;
    }
    writeln!(out, "| **together** | | **${:.2}** |\n", model.usd(usage) * times)?;
    Ok(())
}

/// Thousands and millions for people.
fn readable(quantity: f64) -> String {
    match quantity {
        large if large >= 1e6 => format!("{:.2} M", large / 1e6),
        middle if middle >= 1e4 => format!("{:.1} k", middle / 1e3),
        small if small >= 10.0 => format!("{small:.0}"),
        tiny => format!("{tiny:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_what_the_program_prints() {
        let page = page().unwrap();
        let kept = include_str!("../../docs/cost.md");
        assert!(page == kept, "docs/cost.md is not up to date: cargo run -p cost > docs/cost.md");
    }

    #[test]
    fn every_price_has_a_source_and_is_used() {
        let model = Model::load().unwrap();
        let mut used = Usage::default();
        for front in Front::ALL {
            for usage in [model.small_request(front), model.download_gb(front), model.standing(front)] {
                used.add_all(&usage, 1.0);
            }
        }
        used.add_all(&model.idle_agent(), 1.0);
        used.add_all(&model.busy(), 1.0);
        used.add_all(&model.delivery_after(8.0), 1.0);
        for named in ["lambda_edge_request", "dashboard_month", "metric_month", "alarm_month", "trace"] {
            used.add(named, 1.0);
        }
        for (name, price) in &model.prices {
            assert!(used.0.contains_key(name.as_str()), "{name} is a price of nothing");
            assert!(price.usd > 0.0 && price.per >= 1.0 && price.source.len() > 10, "{name}");
        }
        assert!(model.usd(&used).is_finite());
    }

    #[test]
    fn sleep_is_cheaper_than_being_awake_and_costs_the_balancer_alone() {
        let model = Model::load().unwrap();
        let (asleep, awake) = (model.usd(&model.asleep()), model.usd(&model.awake()));
        assert!((16.0..17.0).contains(&asleep), "{asleep}");
        assert!((asleep + 5.0..asleep + 15.0).contains(&awake), "{awake}");
        assert!(task("Cpu: '256'").is_err());
    }

    #[test]
    fn a_million_deliveries_are_within_their_budget_and_waiting_costs_next_to_nothing() {
        let model = Model::load().unwrap();
        let million = |usage: &Usage| model.usd(usage) * 1e6;
        let at_once = million(&model.delivery());
        assert!(at_once <= 150.0, "{at_once}");
        assert!(model.usd(&model.delivery_after(14.0 * 24.0)) - model.usd(&model.delivery()) <= 1e-4);
        assert!(model.usd(&Model::waiting(24.0)) <= 1e-4);
        // What the sweeps read is a part of the first sum, and of a tunnel that waits for a day not more than a parked delivery.
        assert!(model.usd(&Model::waiting_tunnel(1.0)) <= 1e-4);
        assert!(model.usd(&Model::waiting_tunnel(MOST_COUNTED)) / MOST_COUNTED <= 2e-5);
    }

    #[test]
    fn the_estimates_of_the_specification_are_beaten() {
        let model = Model::load().unwrap();
        for front in Front::ALL {
            assert!(model.scenario(front, 1.0, 30_000.0, 20e3) < 8.0);
            assert!(model.scenario(front, 10.0, 300_000.0, 20e3) < 75.0);
        }
    }
}
