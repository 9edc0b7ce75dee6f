//! The pool with real processes: this test program executes itself as the function.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use futures_util::{StreamExt, stream};
use lambda_runtime::{FunctionResponse, LambdaEvent, MetadataPrelude, StreamResponse, service_fn};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::*;

/// What the function of these tests can be told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Order {
    Echo(String),
    Sleep {
        ms: u64,
    },
    /// Answers how many milliseconds it took.
    Work {
        cpu_ms: u64,
    },
    Fail,
    Exit,
    Stream {
        pieces: u32,
        gap_ms: u64,
    },
    StreamAndExit,
    Endless,
}

type Chunks = stream::BoxStream<'static, Result<Bytes, io::Error>>;
type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn obey(event: LambdaEvent<Order>) -> Result<FunctionResponse<String, Chunks>, Failure> {
    let streaming = |chunks: Chunks| {
        FunctionResponse::StreamingResponse(StreamResponse {
            metadata_prelude: MetadataPrelude {
                status_code: http::StatusCode::CREATED,
                ..Default::default()
            },
            stream: chunks,
        })
    };
    Ok(match event.payload {
        Order::Echo(text) => FunctionResponse::BufferedResponse(text),
        Order::Sleep { ms } => {
            time::sleep(Duration::from_millis(ms)).await;
            FunctionResponse::BufferedResponse("slept".to_owned())
        }
        Order::Work { cpu_ms } => {
            // Nanoseconds of a core, the first of three numbers (proc(5)).
            let used = || {
                let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
                Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
            };
            let (begun, before) = (Instant::now(), used());
            while used() - before < Duration::from_millis(cpu_ms) {}
            FunctionResponse::BufferedResponse(begun.elapsed().as_millis().to_string())
        }
        Order::Fail => return Err("on purpose".into()),
        Order::Exit => std::process::exit(3),
        Order::Stream { pieces, gap_ms } => streaming(
            stream::iter(0..pieces)
                .then(move |number| async move {
                    time::sleep(Duration::from_millis(gap_ms)).await;
                    Ok(Bytes::from(format!("{number};")))
                })
                .boxed(),
        ),
        Order::StreamAndExit => streaming(
            stream::iter(0..2)
                .then(|number| async move {
                    if number == 1 {
                        time::sleep(Duration::from_millis(20)).await;
                        std::process::exit(0);
                    }
                    Ok(Bytes::from_static(b"half"))
                })
                .boxed(),
        ),
        Order::Endless => streaming(stream::repeat_with(|| Ok(Bytes::from(vec![b'x'; 64 * 1024]))).boxed()),
    })
}

/// How long the function waits before it asks for its first event.
const START_WAIT_MS: &str = "START_WAIT_MS";

/// Not a test: the function, when a pool has started this program.
#[test]
fn function_process() {
    if std::env::var_os("AWS_LAMBDA_RUNTIME_API").is_none() {
        return;
    }
    process::end_with_parent().unwrap();
    if let Ok(ms) = std::env::var(START_WAIT_MS) {
        std::thread::sleep(Duration::from_millis(ms.parse().unwrap()));
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        // The client gives up on a connection that was closed under it; so does this process.
        let _ = lambda_runtime::run(service_fn(obey)).await;
    });
}

pub(crate) fn start(concurrency: usize, limit: Duration) -> Lambda {
    start_with(concurrency, limit, BTreeMap::new())
}

fn start_with(concurrency: usize, limit: Duration, environment: BTreeMap<String, String>) -> Lambda {
    start_in(concurrency, limit, environment, None)
}

fn start_in(
    concurrency: usize,
    limit: Duration,
    environment: BTreeMap<String, String>,
    share: Option<Arc<share::Share>>,
) -> Lambda {
    let launcher = Launcher {
        program: std::env::current_exe().unwrap(),
        arguments: ["--exact", "lambda::tests::function_process", "--nocapture", "--quiet"]
            .map(str::to_owned)
            .to_vec(),
        share,
    };
    let function = FunctionConfig {
        name: "obedient",
        timeout: limit,
        memory_mb: 128,
        concurrency,
        executions: None,
        environment,
    };
    let config = LambdaConfig {
        launcher,
        aws_endpoint: "http://127.0.0.1:1".to_owned(),
        register: Register::default(),
        kill_chance: Arc::new(|| None),
    };
    Lambda::start(vec![function], config).unwrap()
}

fn event(order: &Order) -> Bytes {
    serde_json::to_vec(order).unwrap().into()
}

async fn invoke(lambda: &Lambda, order: Order) -> Result<Bytes, InvokeError> {
    timeout(Duration::from_secs(20), lambda.invoke("obedient", event(&order))).await.unwrap()
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_and_freezes_between_invocations() {
    let lambda = start(10, Duration::from_secs(10));
    for text in ["a", "b"] {
        let answer = invoke(&lambda, Order::Echo(text.to_owned())).await.unwrap();
        assert_eq!(answer, format!("\"{text}\""));
    }
    let environments = lambda.environments();
    assert_eq!(environments.len(), 1);
    assert_eq!(environments[0].invocations, 2);
    assert!(environments[0].peak_rss_bytes.unwrap() > 0);
    let pid = environments[0].pid;
    // The process polls right after its answer; nothing tells us when, so this looks until it has.
    timeout(Duration::from_secs(5), async {
        while !is_stopped(pid) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    lambda.close().await;
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(invoke(&lambda, Order::Fail).await, Err(InvokeError::ShuttingDown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_gets_the_part_of_a_core_that_its_memory_buys() {
    let share = match share::Share::of(128) {
        Ok(share) => Arc::new(share),
        Err(error) => {
            // Past what the tests' harness keeps to itself.
            let said = format!("SKIPPED: NO PART OF A CORE CAN BE SET ON THIS MACHINE: {error}\n");
            return io::Write::write_all(&mut io::stderr(), said.as_bytes()).unwrap();
        }
    };
    let lambda = start_in(1, Duration::from_secs(10), BTreeMap::new(), Some(share));
    let took = invoke(&lambda, Order::Work { cpu_ms: 40 }).await.unwrap();
    let took: u64 = String::from_utf8_lossy(&took).trim_matches('"').parse().unwrap();
    // 128 MB have 1.4 of 20 ms: without the group it would be 40 ms, with it 550 ms, some of which was saved up.
    assert!(took >= 200, "{took} ms");
    let pid = lambda.environments()[0].pid;
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = format!("/local-{}/", std::process::id());
    assert!(groups.contains(&own), "{groups}");
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_invocation_at_a_time_and_no_more_than_the_cap() {
    let lambda = start(3, Duration::from_secs(10));
    let sleeping: Vec<_> = (0..3)
        .map(|_| {
            let lambda = lambda.clone();
            tokio::spawn(async move { invoke(&lambda, Order::Sleep { ms: 300 }).await })
        })
        .collect();
    timeout(Duration::from_secs(10), async {
        while lambda.environments().iter().filter(|environment| environment.invocations == 1).count() < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(invoke(&lambda, Order::Echo(String::new())).await, Err(InvokeError::Throttled));
    for task in sleeping {
        assert_eq!(task.await.unwrap().unwrap(), "\"slept\"");
    }
    assert_eq!(invoke(&lambda, Order::Echo("again".to_owned())).await.unwrap(), "\"again\"");
    assert_eq!(lambda.environments().len(), 3);
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_waits_keeps_no_other_from_beginning() {
    const WAIT: Duration = Duration::from_secs(1);
    let environment = BTreeMap::from([(START_WAIT_MS.to_owned(), WAIT.as_millis().to_string())]);
    // Four times as many as may begin at once.
    let count = std::thread::available_parallelism().unwrap().get() * 2 * 4;
    let lambda = start_with(count, Duration::from_secs(10), environment);
    let begun = Instant::now();
    let sleeping: Vec<_> = (0..count)
        .map(|_| {
            let lambda = lambda.clone();
            tokio::spawn(async move { invoke(&lambda, Order::Sleep { ms: 5000 }).await })
        })
        .collect();
    timeout(Duration::from_secs(10), async {
        while lambda.environments().iter().filter(|environment| environment.invocations == 1).count() < count
        {
            time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    let took = begun.elapsed();
    assert!(took >= WAIT && took < 3 * WAIT, "one after the other it would be four times as long: {took:?}");
    for task in sleeping {
        task.abort();
    }
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tells_failures_apart() {
    let lambda = start(10, Duration::from_millis(500));
    assert!(matches!(
        invoke(&lambda, Order::Fail).await,
        Err(InvokeError::Function { message, .. }) if message == "on purpose"
    ));
    assert!(
        matches!(invoke(&lambda, Order::Exit).await, Err(InvokeError::Exited(how)) if how.contains("exit status: 3"))
    );
    assert_eq!(
        invoke(&lambda, Order::Sleep { ms: 60_000 }).await,
        Err(InvokeError::TimedOut(Duration::from_millis(500)))
    );
    assert_eq!(
        invoke(&lambda, Order::Echo("x".repeat(limits::EVENT_BYTES))).await,
        Err(InvokeError::EventTooLarge(limits::EVENT_BYTES + 11))
    );
    assert_eq!(lambda.invoke("nobody", Bytes::new()).await, Err(InvokeError::NoSuchFunction));
    assert_eq!(invoke(&lambda, Order::Echo("alive".to_owned())).await.unwrap(), "\"alive\"");
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_function_that_cannot_start_fails_its_invoker() {
    let function = FunctionConfig {
        name: "broken",
        timeout: Duration::from_secs(1),
        memory_mb: 128,
        concurrency: 1,
        executions: None,
        environment: BTreeMap::new(),
    };
    let config = LambdaConfig {
        launcher: Launcher { program: "/bin/false".into(), arguments: Vec::new(), share: None },
        aws_endpoint: String::new(),
        register: Register::default(),
        kill_chance: Arc::new(|| None),
    };
    let lambda = Lambda::start(vec![function], config).unwrap();
    let answer = timeout(Duration::from_secs(5), lambda.invoke("broken", Bytes::new())).await.unwrap();
    assert!(matches!(answer, Err(InvokeError::Init(_))), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_each_piece_at_once() {
    let lambda = start(10, Duration::from_secs(10));
    let order = event(&Order::Stream { pieces: 30, gap_ms: 2 });
    let call = lambda.invoke_streaming("obedient", order).unwrap();
    let access_key = call.access_key();
    let StreamingResponse { prelude, mut body, .. } = call.head().await.unwrap();
    assert!(prelude.starts_with(b"{\"statusCode\":201"));
    assert!(access_key.get().unwrap().starts_with("LOCAL"));
    let mut text = Vec::new();
    let mut gaps = Vec::new();
    let mut last = Instant::now();
    while let Some(piece) = body.next().await.unwrap() {
        text.extend_from_slice(&piece);
        gaps.push(last.elapsed());
        last = Instant::now();
    }
    let expected: String = (0..30).map(|number| format!("{number};")).collect();
    assert_eq!(text, expected.as_bytes());
    // Nagle's algorithm against a delayed acknowledgement would show as 40 ms in most of them; a busy machine shows in a few.
    gaps.sort_unstable();
    assert!(gaps[gaps.len() / 2] < Duration::from_millis(35), "{gaps:?}");
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_process_ends_is_broken_not_complete() {
    let lambda = start(10, Duration::from_secs(10));
    let call = lambda.invoke_streaming("obedient", event(&Order::StreamAndExit)).unwrap();
    let mut body = call.head().await.unwrap().body;
    assert_eq!(body.next().await, Ok(Some(Bytes::from_static(b"half"))));
    assert_eq!(timeout(Duration::from_secs(5), body.next()).await.unwrap(), Err(Broken));
    let call = lambda.invoke_streaming("obedient", event(&Order::Exit)).unwrap();
    assert!(matches!(call.head().await, Err(InvokeError::Exited(_))));
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_holds_the_function_back_and_one_that_goes_frees_it() {
    let lambda = start(1, Duration::from_secs(30));
    let call = lambda.invoke_streaming("obedient", event(&Order::Endless)).unwrap();
    let mut body = call.head().await.unwrap().body;
    assert!(body.next().await.unwrap().is_some());
    let pid = lambda.environments()[0].pid;
    // Nothing is read for a while: the function must stop producing, so its memory stays small.
    time::sleep(Duration::from_millis(300)).await;
    let rss = lambda.environments()[0].peak_rss_bytes.unwrap();
    assert!(rss < 100 * 1024 * 1024, "{rss}");
    drop(body);
    // The only process notices, ends its answer and takes the next invocation.
    timeout(Duration::from_secs(5), async {
        loop {
            match invoke(&lambda, Order::Echo("free".to_owned())).await {
                Ok(answer) => break assert_eq!(answer, "\"free\""),
                Err(InvokeError::Throttled) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
    .unwrap();
    assert_eq!(lambda.environments()[0].pid, pid);
    lambda.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_processes_can_be_injected() {
    let chances = Arc::new(AtomicU32::new(0));
    let counted = chances.clone();
    let function = FunctionConfig {
        name: "obedient",
        timeout: Duration::from_secs(5),
        memory_mb: 128,
        concurrency: 4,
        executions: None,
        environment: BTreeMap::new(),
    };
    let config = LambdaConfig {
        launcher: Launcher {
            program: std::env::current_exe().unwrap(),
            arguments: ["--exact", "lambda::tests::function_process", "--quiet"].map(str::to_owned).to_vec(),
            share: None,
        },
        aws_endpoint: String::new(),
        register: Register::default(),
        kill_chance: Arc::new(move || {
            (counted.fetch_add(1, Ordering::Relaxed) == 0).then_some(Duration::from_millis(5))
        }),
    };
    let lambda_with_faults = Lambda::start(vec![function], config).unwrap();
    let lost = invoke(&lambda_with_faults, Order::Sleep { ms: 2000 }).await;
    assert_eq!(lost, Err(InvokeError::Exited("killed on purpose".to_owned())));
    assert!(invoke(&lambda_with_faults, Order::Echo("ok".to_owned())).await.is_ok());
    lambda_with_faults.close().await;
}

/// Prints what the pool costs; run it by name with `--ignored --nocapture`, optimised.
#[ignore = "a measurement"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cost_of_an_invocation() {
    let lambda = start(4, Duration::from_secs(10));
    invoke(&lambda, Order::Echo("warm".to_owned())).await.unwrap();
    for idle_us in [0, 1000] {
        let mut times = Vec::new();
        for _ in 0..1000 {
            if idle_us > 0 {
                time::sleep(Duration::from_micros(idle_us)).await;
            }
            let begun = Instant::now();
            invoke(&lambda, Order::Echo("x".to_owned())).await.unwrap();
            times.push(begun.elapsed());
        }
        times.sort();
        eprintln!("idle {idle_us} us: p50 {:?} p90 {:?} p99 {:?}", times[500], times[900], times[990]);
    }
    let inits: Vec<_> = lambda.environments().iter().map(|environment| environment.init).collect();
    eprintln!("init {inits:?}");
    lambda.close().await;
}
