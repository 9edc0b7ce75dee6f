//! What it would cost to read the keys at a start: enters a `local` that is this program, whose functions read a secret with
//! the SDK before they do anything else where their variables tell them to; leaves how much later their first event is
//! answered, and whether that is under the bound.
//!
//! What stands for Secrets Manager speaks TLS on loopback and takes as long as a service of the profile `aws`. It is asked
//! through the SDK's client of DynamoDB: the same protocol of JSON, signatures and connections, in a crate that is there.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use aws_credential_types::Credentials;
use aws_sdk_dynamodb::{
    config::{BehaviorVersion, Region},
    types::AttributeValue,
};
use aws_smithy_http_client::tls::{self, TlsContext, TrustStore};
use clap::Args;
use local::latency::{Hop, Latency, Profile};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tests::{Local, noise};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    client::{Client, Target},
    figures::quantile,
    upstream::{HELLO, Upstream},
};

/// How much later, in milliseconds at the median, a function may answer its first event for keys that it reads itself.
const BOUND_MS: f64 = 15.0;

/// The functions that have the keys.
const FUNCTIONS: [&str; 2] = ["ingress", "response"];

/// The variable that tells a function where the secret is.
const ENDPOINT: &str = "BENCH_SECRET_ENDPOINT";

/// The words this program is started with as `local`, and as one of its functions.
const EDGE: &str = "edge";
const FUNCTION: &str = "function";

/// The authority of the certificate below, and who is `localhost`.
const ROOT: &[u8] = include_bytes!("../../agentd/tests/fixtures/ca.pem");
const CERTIFICATE: &[u8] = include_bytes!("../../agentd/tests/fixtures/localhost.pem");
const KEY: &[u8] = include_bytes!("../../agentd/tests/fixtures/localhost.key");

/// What is measured, and how much of it.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each function is started each way; figures are medians
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Give each process the part of a core that so much memory buys in Lambda
    #[arg(long, value_name = "MB")]
    cpu: Option<u32>,
}

/// How a function comes by its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Variables,
    ReadAtOnce,
    ReadAsFromAws,
}

const WAYS: [(Way, &str); 3] = [
    (Way::Variables, "in variables"),
    (Way::ReadAtOnce, "read, the service takes no time"),
    (Way::ReadAsFromAws, "read, the service takes 8 ms (p50)"),
];

/// Is `local` or one of its functions, when it is started as that.
pub(crate) fn stand_in() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let program = arguments.next()?;
    let first = arguments.next()?;
    if first == EDGE {
        return Some(local::main_with_args(std::iter::once(program).chain(arguments)));
    }
    if first != FUNCTION {
        return None;
    }
    if let Ok(endpoint) = std::env::var(ENDPOINT)
        && let Err(error) = read_at_start(&endpoint)
    {
        eprintln!("no secret: {error:#}");
        return Some(ExitCode::FAILURE);
    }
    Some(local::main_with_args(std::env::args_os()))
}

/// Reads the secret as a function would that has nothing else to do before it has its keys.
fn read_at_start(endpoint: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // The roots of trust are read once for all clients of a process, so what reads them is no part of this.
        let trusted = TrustStore::empty().with_pem_certificate(ROOT);
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc))
            .tls_context(TlsContext::builder().with_trust_store(trusted).build()?)
            .build_https();
        let config = aws_sdk_dynamodb::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("local-1"))
            .credentials_provider(Credentials::new("bench", "bench", None, None, "bench"))
            .endpoint_url(endpoint)
            .http_client(http)
            .build();
        let client = aws_sdk_dynamodb::Client::from_conf(config);
        let id = AttributeValue::S("keys".to_owned());
        let answer = client.get_item().table_name("secrets").key("id", id).send().await?;
        ensure!(answer.item.is_some_and(|item| item.contains_key("secret")), "no secret came");
        Ok(())
    })
}

/// Measures, prints and decides.
pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures mean nothing");
    }
    let upstream = Upstream::start()?;
    let at_once = serve(Latency::default()).await?;
    let as_from_aws = serve(Latency::new(Profile::find("aws")?, Duration::ZERO)).await?;
    let latency = options.cpu.map_or_else(|| "none".to_owned(), |mb| format!("none,cpu={mb}"));
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.arg(EDGE);
    let more = ["--no-agent", "--log-level", "debug", "--latency", &latency];
    let local = Local::start_as(command, &[], &more);
    let _agent = local.agent("bench", &format!("127.0.0.1:{}", upstream.port));
    let tunnel = Target { address: local.public, host: "bench.localhost".to_owned() };
    let mut client = Client::connect(&tunnel).await?;
    ensure!(client.call("/hello", None).await? == HELLO, "a wrong answer");

    println!(
        "| a cold start until the first event is answered, p50 | {} |",
        WAYS.map(|way| way.1).join(" | ")
    );
    println!("|---|---:|---:|---:|");
    let mut most: f64 = 0.0;
    for function in FUNCTIONS {
        let own = local.variables(function).await;
        let mut taken: [Vec<f64>; WAYS.len()] = Default::default();
        let mut starts = count(&local, function);
        for round in 0..options.rounds {
            eprintln!("keys: {function}: {} of {}", round + 1, options.rounds);
            for ((way, _), taken) in WAYS.into_iter().zip(&mut taken) {
                let mut variables = own.clone();
                let endpoint = match way {
                    Way::Variables => None,
                    Way::ReadAtOnce => Some(&at_once),
                    Way::ReadAsFromAws => Some(&as_from_aws),
                };
                if let Some(endpoint) = endpoint {
                    variables[ENDPOINT] = Value::from(endpoint.as_str());
                }
                local.deploy(function, &variables).await;
                ensure!(client.call("/hello", None).await? == HELLO, "a wrong answer");
                starts += 1;
                taken.push(started(&local, function, starts)?);
            }
        }
        local.deploy(function, &own).await;
        let [variables, at_once, as_from_aws] = taken.map(|mut taken| quantile(&mut taken, 0.5));
        let added = as_from_aws - variables;
        most = most.max(added);
        println!(
            "| `{function}` | {variables:.1} ms | {at_once:.1} ms (+ {:.1}) | {as_from_aws:.1} ms (+ {added:.1}) |",
            at_once - variables
        );
    }
    let word = if most < BOUND_MS { "under" } else { "not under" };
    println!("\nReading the keys at the start adds up to {most:.1} ms at p50: {word} {BOUND_MS} ms.");
    Ok(())
}

/// How many starts of a function have been told so far.
fn count(local: &Local, function: &str) -> usize {
    local.process().printed().lines().filter(|line| is_of(line, "first event is answered", function)).count()
}

fn is_of(line: &str, what: &str, function: &str) -> bool {
    line.contains(what) && line.contains(&format!("function=\"{function}\""))
}

/// How long the last start of a function took, its first event included, in milliseconds; it is the one with that number.
fn started(local: &Local, function: &str, number: usize) -> anyhow::Result<f64> {
    let answered =
        local.process().wait_for_lines(number, |line| is_of(line, "first event is answered", function));
    let printed = local.process().printed();
    let ready =
        printed.lines().rfind(|line| is_of(line, "process is ready", function)).context("no start")?;
    let millis = |line: &str, field: &str| {
        let micros = line.split(field).nth(1).and_then(|rest| rest.split_whitespace().next());
        let micros = micros.and_then(|micros| micros.parse::<f64>().ok());
        micros.map(|micros| micros / 1e3).context("no time in the line")
    };
    let answered = answered.last().context("no answer")?;
    Ok(millis(ready, "init_us=")? + millis(answered, "answer_us=")?)
}

/// Serves the secret; gives its endpoint.
async fn serve(latency: Latency) -> anyhow::Result<String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_slice_iter(CERTIFICATE).collect::<Result<_, _>>()?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(KEY)?)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("https://localhost:{}", listener.local_addr()?.port());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, latency) = (acceptor.clone(), latency.clone());
            tokio::spawn(async move {
                if let Err(error) = answer(acceptor, stream, &latency).await {
                    eprintln!("keys: the secret was not told: {error:#}");
                }
            });
        }
    });
    Ok(endpoint)
}

/// Answers the one question that a process has.
async fn answer(acceptor: TlsAcceptor, stream: TcpStream, latency: &Latency) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream: TlsStream<TcpStream> = acceptor.accept(stream).await?;
    let mut came = Vec::new();
    // Its input is one object and the last thing of it.
    while !came.ends_with(b"}}") {
        ensure!(stream.read_buf(&mut came).await? > 0, "no question came");
    }
    latency.hop(Hop::Sqs).await;
    let secret = noise(1, 32).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let body = json!({"Item": {"secret": {"S": secret}}}).to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.0\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await?;
    stream.shutdown().await?;
    Ok(())
}
