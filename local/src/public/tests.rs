//! The front with a real `ingress` process: this test program executes itself as the function.

use std::{collections::BTreeMap, io};

use futures_util::{StreamExt, stream};
use lambda_runtime::{FunctionResponse, LambdaEvent, service_fn};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Notify, watch},
    time::timeout,
};

use super::*;
use crate::lambda::{FunctionConfig, LambdaConfig, Launcher, process};

type Chunks = stream::BoxStream<'static, Result<Bytes, io::Error>>;
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Answers with the event itself, or what the path asks for.
async fn ingress(event: LambdaEvent<Value>) -> Result<FunctionResponse<Value, Chunks>, Failure> {
    let path = event.payload["rawPath"].as_str().unwrap_or_default().to_owned();
    let mut prelude = lambda_runtime::MetadataPrelude::default();
    let mut set = |name: &'static str, value: &str| {
        prelude.headers.insert(name, HeaderValue::from_str(value).unwrap());
    };
    let once = |text: String| stream::iter([Ok(Bytes::from(text))]).boxed();
    let stream = match path.as_str() {
        "/length" => {
            set("content-length", "5");
            once("12345".to_owned())
        }
        "/short" => {
            set("content-length", "50");
            once("12345".to_owned())
        }
        "/long" => {
            set("content-length", "3");
            once("12345".to_owned())
        }
        "/head" | "/204" | "/304" => {
            set("content-length", "1234");
            set("date", "Thu, 01 Jan 1970 00:00:00 GMT");
            match path.as_str() {
                "/204" => prelude.status_code = StatusCode::NO_CONTENT,
                "/304" => prelude.status_code = StatusCode::NOT_MODIFIED,
                _ => {}
            }
            stream::empty().boxed()
        }
        "/broken" => stream::iter(0..2)
            .then(|number| async move {
                if number == 1 {
                    time::sleep(Duration::from_millis(30)).await;
                    std::process::exit(0);
                }
                Ok(Bytes::from_static(b"half"))
            })
            .boxed(),
        "/never" => {
            std::future::pending::<()>().await;
            stream::empty().boxed()
        }
        "/503" => {
            prelude.status_code = StatusCode::SERVICE_UNAVAILABLE;
            once(event.payload["headers"]["x-tunnel-host"].to_string())
        }
        "/informational" => {
            prelude.status_code = StatusCode::SWITCHING_PROTOCOLS;
            stream::empty().boxed()
        }
        "/gzip" => {
            set("content-encoding", "gzip");
            // "hello", packed.
            const PACKED: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xcb\x48\xcd\xc9\xc9\x07\x00\x86\xa6\x10\x36\x05\x00\x00\x00";
            stream::iter([Ok(Bytes::from_static(PACKED))]).boxed()
        }
        "/empty-gzip" | "/empty-br" => {
            set("content-encoding", path.strip_prefix("/empty-").unwrap());
            stream::empty().boxed()
        }
        "/205" => {
            prelude.status_code = StatusCode::RESET_CONTENT;
            set("content-length", "5");
            once("hello".to_owned())
        }
        "/401" => {
            prelude.status_code = StatusCode::UNAUTHORIZED;
            set("www-authenticate", "Basic realm=\"x\"");
            stream::empty().boxed()
        }
        // So many bytes of a field, or of a body.
        "/field" => {
            set("x-fill", &"x".repeat(number(&event)));
            once("field".to_owned())
        }
        "/body" => {
            let bytes = number(&event);
            let piece = Bytes::from(vec![b'x'; PIECE]);
            let pieces =
                (0..bytes.div_ceil(PIECE)).map(move |at| Ok(piece.slice(..PIECE.min(bytes - at * PIECE))));
            stream::iter(pieces).boxed()
        }
        "/cookies" => {
            prelude.cookies = vec!["a=1; Path=/".to_owned(), "b=2".to_owned()];
            once("cookies".to_owned())
        }
        _ => once(event.payload.to_string()),
    };
    Ok(FunctionResponse::StreamingResponse(lambda_runtime::StreamResponse {
        metadata_prelude: prelude,
        stream,
    }))
}

/// How much of a body is one piece.
const PIECE: usize = 1024 * 1024;

/// The number in the query.
fn number(event: &LambdaEvent<Value>) -> usize {
    event.payload["rawQueryString"].as_str().unwrap().parse().unwrap()
}

/// What an answer without a byte is made of: its head, and the delimiter that ends the head.
const NOTHING: (&str, [u8; 8]) = ("{\"statusCode\":204}", [0; 8]);

/// Answers without a byte: `/product` as the product's own runtime frames them, `/joined` as it would be without that,
/// head, delimiter and end in one write.
async fn without_a_byte() {
    let runtime = ingress::runtime::Runtime::from_env().unwrap();
    let api = std::env::var("AWS_LAMBDA_RUNTIME_API").unwrap();
    loop {
        let invocation = runtime.next().await.unwrap();
        let event: Value = serde_json::from_slice(&invocation.event).unwrap();
        let first = [NOTHING.0.as_bytes(), &NOTHING.1].concat();
        if event["rawPath"] == "/product" {
            let (answer, pieces) = ingress::runtime::Answer::new(first);
            let end = async { drop(pieces.send(exchange::public::Piece::End).await) };
            tokio::join!(runtime.respond(&invocation.aws_request_id, answer, None), end);
            continue;
        }
        let mut post = format!(
            "POST /2018-06-01/runtime/invocation/{}/response HTTP/1.1\r\nHost: {api}\r\nTransfer-Encoding: chunked\r\n\
             Lambda-Runtime-Function-Response-Mode: streaming\r\n\
             Content-Type: application/vnd.awslambda.http-integration-response\r\n\r\n{:x}\r\n",
            invocation.aws_request_id,
            first.len(),
        )
        .into_bytes();
        post.extend_from_slice(&first);
        post.extend_from_slice(b"\r\n0\r\n\r\n");
        let mut stream = TcpStream::connect(&api).await.unwrap();
        stream.write_all(&post).await.unwrap();
        stream.read_u8().await.unwrap();
    }
}

/// Not a test: the function, when a pool has started this program.
#[test]
fn function_process() {
    if std::env::var_os("AWS_LAMBDA_RUNTIME_API").is_none() {
        return;
    }
    process::end_with_parent().unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        if std::env::var_os(WITHOUT_A_BYTE).is_some() {
            return without_a_byte().await;
        }
        let _ = lambda_runtime::run(service_fn(ingress)).await;
    });
}

/// Has the function answer without a byte.
const WITHOUT_A_BYTE: &str = "TUNNEL_TEST_WITHOUT_A_BYTE";

/// No front of AWS.
fn direct() -> Shape {
    let function_time = Duration::from_secs(20);
    let imitation =
        Imitation::new(fronts::Kind::Direct, &[], crate::clock::Clock::default(), function_time).into();
    Shape { imitation, silence: None, first: None }
}

/// A relay on a raw socket: its answer is in the target, and it holds its connections.
async fn raw_relay() -> relayed::Relay {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, found) = watch::channel(Some(listener.local_addr().unwrap()));
    tokio::spawn(async move {
        let _address = address;
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer_as_relay(stream));
        }
    });
    relayed::Relay(found)
}

async fn answer_as_relay(mut stream: TcpStream) {
    let head = head_from(&mut stream).await;
    let target = head.split(' ').nth(1).unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, "0"));
    let number: usize = query.parse().unwrap();
    let begun = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\n\r\n4\r\nhalf\r\n"
        .to_owned();
    let answer = match path {
        // So many fields, all in all.
        "/fields" => {
            format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", "x: y\r\n".repeat(number - 1))
        }
        "/field" => format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\nx-fill: {}\r\n\
             transfer-encoding: chunked\r\n\r\n5\r\nfield\r\n0\r\n\r\n",
            "x".repeat(number)
        ),
        "/205" => "HTTP/1.1 205 Reset Content\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
        "/switch" => {
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".to_owned()
        }
        "/mute" => String::new(),
        "/broken" => begun,
        _ => "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345".to_owned(),
    };
    stream.write_all(answer.as_bytes()).await.unwrap();
    if path == "/broken" {
        return;
    }
    let mut rest = Vec::new();
    // The front closes, or resets what it has given up.
    let end = stream.read_to_end(&mut rest).await;
    if path == "/switch" {
        end.unwrap();
        stream.write_all(&rest).await.unwrap();
    }
}

/// Reads until a head has ended.
async fn head_from(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { break };
        head.push(byte);
    }
    String::from_utf8(head).unwrap()
}

struct Fixture {
    address: SocketAddr,
    lambda: Lambda,
    gone: Arc<(Mutex<Vec<String>>, Notify)>,
    arrivals: Arrivals,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Fixture {
    async fn start() -> Self {
        Self::behind(direct().imitation, cloudfront::distribution()).await
    }

    /// Behind a front that is imitated.
    async fn behind(imitation: Arc<Imitation>, distribution: &'static Distribution) -> Self {
        Self::with(imitation, distribution, 10, BTreeMap::new()).await
    }

    /// Behind a front that is imitated, a function that may run so often at the same time and has these variables.
    async fn with(
        imitation: Arc<Imitation>,
        distribution: &'static Distribution,
        concurrency: usize,
        environment: BTreeMap<String, String>,
    ) -> Self {
        let launcher = Launcher {
            program: std::env::current_exe().unwrap(),
            arguments: ["--exact", "public::tests::function_process", "--nocapture", "--quiet"]
                .map(str::to_owned)
                .to_vec(),
            share: None,
        };
        let function = FunctionConfig {
            name: FUNCTION,
            timeout: Duration::from_secs(20),
            memory_mb: 128,
            concurrency,
            executions: None,
            environment,
        };
        let config = LambdaConfig {
            launcher,
            aws_endpoint: String::new(),
            register: lambda::Register::default(),
            kill_chance: Arc::new(|| None),
        };
        let lambda = Lambda::start(vec![function], config).unwrap();
        let gone: Arc<(Mutex<Vec<String>>, Notify)> = Arc::default();
        let reported = gone.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let arrivals = Arrivals::default();
        let front = Front {
            latency: Latency::default(),
            lambda: lambda.clone(),
            secret: "s3cret".to_owned(),
            client_gone: Arc::new(move |key| {
                reported.0.lock().unwrap().push(key.to_owned());
                reported.1.notify_one();
            }),
            port: address.port(),
            arrivals: arrivals.clone(),
            relay: Some(raw_relay().await),
            imitation,
            distribution,
            errors: KeptErrors::default(),
        };
        let stop = CancellationToken::new();
        let served = tokio::spawn(serve(listener, Arc::new(front), stop.clone()));
        Self { address, lambda, gone, arrivals, stop, served }
    }

    /// Sends bytes and reads all there is; the flag says whether the end was clean.
    async fn exchange(&self, request: &[u8]) -> (String, bool) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        Self::rest(stream).await
    }

    /// The same by a client that closes its sending half when it has asked.
    async fn exchange_half_closed(&self, request: &[u8]) -> (String, bool) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        Self::rest(stream).await
    }

    async fn rest(mut stream: TcpStream) -> (String, bool) {
        let mut answer = Vec::new();
        let end = timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await.unwrap();
        (String::from_utf8_lossy(&answer).into_owned(), end.is_ok())
    }

    async fn event_of(&self, request: &[u8]) -> Value {
        let (answer, _) = self.exchange(request).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let (begin, end) = (answer.find('{').unwrap(), answer.rfind('}').unwrap());
        serde_json::from_str(&answer[begin..=end]).unwrap()
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(Duration::from_secs(10), self.served).await.unwrap().unwrap();
        self.lambda.close().await;
    }
}

/// CloudFront as it is where the distribution says nothing, but for its patience.
fn plain_distribution(read_timeout: Duration) -> &'static Distribution {
    Box::leak(Box::new(Distribution { attempts: 3, read_timeout, kept: BTreeMap::new() }))
}

fn imitated(kind: fronts::Kind) -> Arc<Imitation> {
    on_clock(kind, 1, &[])
}

/// A front whose seconds pass so many times faster, without some of what it does.
fn on_clock(kind: fronts::Kind, clock: u32, relaxed: &[&str]) -> Arc<Imitation> {
    let relaxed: Vec<_> = relaxed.iter().map(|&name| name.to_owned()).collect();
    Imitation::new(kind, &relaxed, crate::clock::Clock::new(clock), Duration::from_millis(500)).into()
}

fn get(host: &str, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").into_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_distribution_that_says_nothing_leaks_errors_and_asks_three_times() {
    let patient = plain_distribution(Duration::from_secs(20));
    let fixture = Fixture::behind(imitated(fronts::Kind::CloudFront), patient).await;
    for _ in 0..2 {
        let (answer, _) = fixture.exchange(&get("one.localhost", "/503")).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("one.localhost"), "{answer}");
    }
    let (answer, _) = fixture.exchange(&get("two.localhost", "/503")).await;
    assert!(answer.contains("one.localhost"), "the error of one tunnel answers for the other: {answer}");
    fixture.end().await;
    // Whether a process is ready in that time does not matter: what is asked is counted, not what is answered.
    let impatient = plain_distribution(Duration::from_millis(300));
    let fixture = Fixture::behind(imitated(fronts::Kind::CloudFront), impatient).await;
    let asked = || fixture.arrivals.0.lock().unwrap().len();
    let (answer, _) = fixture.exchange(&get("one.localhost", "/never")).await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(asked(), 3, "a GET is asked three times");
    let post =
        b"POST /never HTTP/1.1\r\nHost: one.localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let (answer, _) = fixture.exchange(post).await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(asked(), 4, "a POST once");
    fixture.end().await;
    // The distribution of this version.
    let fixture = Fixture::behind(imitated(fronts::Kind::CloudFront), cloudfront::distribution()).await;
    for host in ["one.localhost", "two.localhost"] {
        let (answer, _) = fixture.exchange(&get(host, "/503")).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains(host), "{answer}");
    }
    fixture.end().await;
}

/// Without the product's framing an answer without a byte hangs until the function's time is over; with it, it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_without_a_byte_hangs_unless_it_is_framed_as_the_product_does() {
    for kind in [fronts::Kind::None, fronts::Kind::CloudFront, fronts::Kind::HttpApi, fronts::Kind::Direct] {
        let imitation = imitated(kind);
        let without = BTreeMap::from([(WITHOUT_A_BYTE.to_owned(), String::new())]);
        let fixture = Fixture::with(imitation.clone(), cloudfront::distribution(), 10, without).await;
        for _ in 0..20 {
            let (answer, _) = fixture.exchange(&get("one.localhost", "/product")).await;
            assert!(answer.starts_with("HTTP/1.1 204"), "{kind:?}: {answer}");
        }
        assert!(!imitation.has_said(Does::EmptyHangs), "{kind:?}: what the product sends hangs");
        let begun = time::Instant::now();
        let (answer, _) = fixture.exchange(&get("one.localhost", "/joined")).await;
        let hangs = kind != fronts::Kind::Direct;
        assert_eq!(imitation.has_said(Does::EmptyHangs), hangs, "{kind:?}");
        assert_eq!(answer.starts_with("HTTP/1.1 204"), !hangs, "{kind:?}: {answer}");
        assert!(!hangs || begun.elapsed() >= imitation.function_time, "{kind:?}");
        fixture.end().await;
    }
}

/// A request with so many bytes of what is bounded.
type Asked = fn(usize) -> Vec<u8>;

/// A request's head of so many bytes, all its lines together.
fn head_of(bytes: usize) -> Vec<u8> {
    let empty = "GET /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Fill: \r\n".len();
    let fill = "x".repeat(bytes - empty);
    format!("GET /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Fill: {fill}\r\n\r\n").into_bytes()
}

/// A response's fields of so many bytes, with the type that `lambda_runtime` gives what has none.
fn field_of(bytes: usize) -> Vec<u8> {
    let empty = "content-type: application/octet-stream\r\nx-fill: \r\n".len();
    get("a", &format!("/field?{}", bytes - empty))
}

fn body_of(bytes: usize) -> Vec<u8> {
    get("a", &format!("/body?{bytes}"))
}

/// Every bound of a front: what is at it passes, and one byte more does not. `direct` has none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_at_a_bound_of_a_front_passes_and_one_byte_more_does_not() {
    use fronts::{API_HEAD_BYTES, BUFFERED_BYTES, EDGE_HEAD_BYTES, EDGE_URL_BYTES, Kind};
    let url = |bytes: usize| get("a", &format!("/{}", "x".repeat(bytes - "https://a/".len())));
    let direct = Fixture::behind(imitated(Kind::Direct), cloudfront::distribution()).await;
    let handshake = |bytes: usize| {
        let request = String::from_utf8(field_of(bytes)).unwrap();
        request.replace("Connection", "Sec-WebSocket-Key: x\r\nConnection").into_bytes()
    };
    let cases: [(Kind, Does, Asked, usize, &str); 10] = [
        (Kind::CloudFront, Does::EdgeHeads, head_of, EDGE_HEAD_BYTES, "413"),
        (Kind::CloudFront, Does::EdgeHeads, url, EDGE_URL_BYTES, "413"),
        (Kind::CloudFront, Does::EdgeHeads, field_of, EDGE_HEAD_BYTES, "502"),
        (Kind::CloudFront, Does::EdgeHeads, handshake, EDGE_HEAD_BYTES, "502"),
        (Kind::Relay, Does::EdgeHeads, head_of, EDGE_HEAD_BYTES, "413"),
        (Kind::Relay, Does::EdgeHeads, url, EDGE_URL_BYTES, "413"),
        (Kind::Relay, Does::EdgeHeads, field_of, EDGE_HEAD_BYTES, "502"),
        (Kind::HttpApi, Does::ApiHeads, head_of, API_HEAD_BYTES, "431"),
        (Kind::HttpApi, Does::ApiHeads, field_of, API_HEAD_BYTES, "500"),
        (Kind::HttpApi, Does::Buffer, body_of, BUFFERED_BYTES, "500"),
    ];
    for (kind, does, request, bound, status) in cases {
        let imitation = on_clock(kind, 1, &["response-rate"]);
        let fixture = Fixture::behind(imitation.clone(), cloudfront::distribution()).await;
        let (answer, _) = fixture.exchange(&request(bound)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{kind:?}: {bound}: {:.200}", answer);
        assert!(!imitation.has_said(does), "{kind:?}: {bound}");
        let (answer, _) = fixture.exchange(&request(bound + 1)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{kind:?}: {bound}: {:.200}", answer);
        // It is the front's own: nothing of ours stands in it.
        assert!(!answer.contains("x-tunnel-"), "{kind:?}: {:.300}", answer);
        assert!(imitation.has_said(does), "{kind:?}: {bound}");
        fixture.end().await;
        let (answer, _) = direct.exchange(&request(bound + 1)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{kind:?}: {bound}: {:.200}", answer);
    }
    direct.end().await;
}

/// A Function URL lets 200 MB of a streamed body through; a body that goes on ends there, as if it were whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_of_the_most_that_is_streamed_passes_and_one_byte_more_is_cut() {
    const MOST: usize = 200 * 1024 * 1024;
    let imitation = on_clock(fronts::Kind::None, 1, &["response-rate"]);
    let fixture = Fixture::behind(imitation.clone(), cloudfront::distribution()).await;
    for (bytes, is_cut) in [(MOST, false), (MOST + 1, true)] {
        let mut stream = TcpStream::connect(fixture.address).await.unwrap();
        stream.write_all(&body_of(bytes)).await.unwrap();
        // Only its two ends are looked at: chunks of 1 MiB come between them.
        let (mut came, mut end, mut buffer) = (0, Vec::new(), vec![0; 256 * 1024]);
        loop {
            let read = timeout(Duration::from_secs(60), stream.read(&mut buffer)).await.unwrap().unwrap();
            if read == 0 {
                break;
            }
            came += buffer[..read].iter().filter(|&&byte| byte == b'x').count();
            end.extend_from_slice(&buffer[read.saturating_sub(16)..read]);
            end = end.split_off(end.len().saturating_sub(16));
        }
        assert_eq!(came, MOST, "{bytes}");
        assert!(end.ends_with(b"\r\n0\r\n\r\n"), "{bytes}: it does not look whole");
        assert_eq!(imitation.has_said(Does::Cap), is_cut, "{bytes}");
    }
    fixture.end().await;
}

/// What a Function URL does to a head and a body, by kind: a name more or less, and unpacked bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packed_bodies_and_challenges_come_as_each_front_lets_them_through() {
    use fronts::Kind;
    for (kind, unpacks, renames) in [
        (Kind::None, true, true),
        (Kind::CloudFront, true, true),
        (Kind::HttpApi, true, false),
        (Kind::Direct, false, false),
    ] {
        let imitation = imitated(kind);
        let fixture = Fixture::behind(imitation.clone(), cloudfront::distribution()).await;
        let (answer, _) = fixture.exchange(&get("a", "/gzip")).await;
        assert_eq!(!answer.contains("content-encoding"), unpacks, "{kind:?}: {answer}");
        assert_eq!(answer.contains("hello"), unpacks, "{kind:?}: {answer}");
        let (answer, _) = fixture.exchange(&get("a", "/401")).await;
        assert_eq!(answer.contains("x-amzn-remapped-www-authenticate: Basic"), renames, "{kind:?}: {answer}");
        assert_eq!(answer.contains("\r\nwww-authenticate: Basic"), !renames, "{kind:?}: {answer}");
        assert_eq!(
            (imitation.has_said(Does::Decode), imitation.has_said(Does::RenameChallenge)),
            (unpacks, renames)
        );
        fixture.end().await;
    }
}

/// Of nothing, nothing is unpacked; and a 205 has the body that its upstream gave it, as its length says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_empty_ends_and_what_is_not_is_carried() {
    use fronts::Kind;
    for kind in [Kind::None, Kind::CloudFront, Kind::HttpApi, Kind::Relay, Kind::Direct] {
        let fixture = Fixture::behind(imitated(kind), cloudfront::distribution()).await;
        if kind != Kind::Relay {
            for path in ["/empty-gzip", "/empty-br"] {
                let (answer, is_clean) = fixture.exchange(&get("a", path)).await;
                assert!(is_clean && answer.starts_with("HTTP/1.1 200"), "{kind:?} {path}: {answer}");
                let is_whole = answer.ends_with("\r\n\r\n0\r\n\r\n")
                    || answer.contains("content-length: 0\r\n") && answer.ends_with("\r\n\r\n");
                assert!(is_whole, "{kind:?} {path}: {answer}");
                let head = String::from_utf8(get("a", path)).unwrap().replace("GET", "HEAD");
                let (answer, _) = fixture.exchange(head.as_bytes()).await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{kind:?} {path}: {answer}");
            }
        }
        let (answer, is_clean) = fixture.exchange(&get("a", "/205")).await;
        assert!(is_clean && answer.starts_with("HTTP/1.1 205"), "{kind:?}: {answer}");
        assert!(answer.contains("\r\nhello"), "{kind:?}: {answer}");
        fixture.end().await;
    }
}

/// A client that has sent all it has to say may close that half: behind a Function URL nobody notices, and it is
/// answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_its_sending_half_is_answered() {
    use fronts::Kind;
    for kind in [Kind::None, Kind::CloudFront, Kind::HttpApi] {
        let imitation = imitated(kind);
        let fixture = Fixture::behind(imitation.clone(), cloudfront::distribution()).await;
        let one = "GET /length HTTP/1.1\r\nHost: a\r\n\r\n";
        for (request, answers) in [
            (one.to_owned(), 1),
            (one.repeat(2), 2),
            ("GET /length HTTP/1.0\r\nHost: a\r\n\r\n".to_owned(), 1),
            (
                one.replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
                    .replace("GET", "POST"),
                1,
            ),
        ] {
            // Once the last answer is there, the connection ends: nobody waits for another request.
            let (answer, is_clean) = fixture.exchange_half_closed(request.as_bytes()).await;
            assert!(is_clean, "{kind:?} {request}: {answer}");
            assert_eq!(answer.matches(" 200 OK\r\n").count(), answers, "{kind:?} {request}: {answer}");
            assert_eq!(answer.matches("12345").count(), answers, "{kind:?} {request}: {answer}");
        }
        assert!(imitation.has_said(Does::Deaf), "{kind:?}");
        // What was not sent whole is not answered as if it had been.
        let half = "POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabc";
        let (answer, _) = fixture.exchange_half_closed(half.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{kind:?}: {answer}");
        fixture.end().await;
    }
}

/// A relay may send as many fields as an upstream and some of its own, and not one more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_sends_as_many_fields_as_an_upstream_may_and_its_own() {
    let fixture = Fixture::behind(imitated(fronts::Kind::Relay), cloudfront::distribution()).await;
    let most = limits::HEADER_FIELDS + 24;
    let (answer, _) = fixture.exchange(&get("a", &format!("/fields?{most}"))).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{:.300}", answer);
    assert_eq!(answer.matches("\r\nx: y").count(), most - 1);
    let (answer, _) = fixture.exchange(&get("a", &format!("/fields?{}", most + 1))).await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("edge_failed"), "{:.300}", answer);
    fixture.end().await;
}

/// What is no body is refused as the client's fault, also where it was on its way to a relay already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_breaks_off_on_its_way_to_a_relay_is_the_clients_fault() {
    let fixture = Fixture::behind(imitated(fronts::Kind::Relay), cloudfront::distribution()).await;
    let head = "POST /mute HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in ["zz\r\n", "3\r\nabcXX", "3\nabc\n0\n\n", "ffffffffffffffffff\r\n", "3\r\nab"] {
        let (answer, _) = fixture.exchange_half_closed(format!("{head}{body}").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{body:?}: {answer}");
        assert!(answer.contains("x-tunnel-error: bad_request\r\n"), "{body:?}: {answer}");
    }
    fixture.end().await;
}

/// A relay that says nothing is given up by CloudFront, whatever was asked of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cloudfront_gives_up_a_relay_that_says_nothing() {
    let impatient = plain_distribution(Duration::from_millis(300));
    let handshake = b"GET /mute HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: x\r\nConnection: close\r\n\r\n";
    for (kind, request) in
        [(fronts::Kind::Relay, &get("a", "/mute")[..]), (fronts::Kind::CloudFront, handshake)]
    {
        let imitation = imitated(kind);
        let fixture = Fixture::behind(imitation.clone(), impatient).await;
        let (answer, _) = fixture.exchange(request).await;
        assert!(answer.starts_with("HTTP/1.1 504") && !answer.contains("x-tunnel-"), "{kind:?}: {answer}");
        assert!(imitation.has_said(Does::Silence), "{kind:?}");
        fixture.end().await;
    }
}

/// What a relay breaks off is broken off, for a client too whose body ends with its connection; and its connection is not
/// the client's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_relay_breaks_off_never_looks_whole() {
    let fixture = Fixture::behind(imitated(fronts::Kind::Relay), cloudfront::distribution()).await;
    let (answer, _) = fixture.exchange(&get("a", "/broken")).await;
    assert!(answer.contains("half") && !answer.ends_with("0\r\n\r\n"), "{answer}");
    assert!(!answer.contains("keep-alive"), "{answer}");
    let (answer, is_clean) = fixture.exchange(b"GET /broken HTTP/1.0\r\nHost: a\r\n\r\n").await;
    assert!(!is_clean && !answer.contains("chunked"), "{answer}");
    fixture.end().await;
}

/// Behind every front a WebSocket's bytes go both ways to the end of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switched_connection_has_two_ends() {
    use fronts::Kind;
    for kind in [Kind::None, Kind::CloudFront, Kind::HttpApi, Kind::Relay, Kind::Direct] {
        let fixture = Fixture::behind(imitated(kind), cloudfront::distribution()).await;
        let mut stream = TcpStream::connect(fixture.address).await.unwrap();
        let handshake = b"GET /switch HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Key: x\r\n\r\n";
        stream.write_all(handshake).await.unwrap();
        let head = timeout(Duration::from_secs(20), head_from(&mut stream)).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket"), "{kind:?}: {head}");
        assert!(!head.contains("content-length"), "{kind:?}: {head}");
        stream.write_all(b"as it was sent").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(Fixture::rest(stream).await, ("as it was sent".to_owned(), true), "{kind:?}");
        fixture.end().await;
    }
}

/// Where no execution is free, Lambda answers by itself; so does an HTTP API whose integration takes too long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_account_and_a_late_answer_are_refused_without_a_word_of_ours() {
    for (kind, ours) in [(fronts::Kind::None, false), (fronts::Kind::Direct, true)] {
        let fixture = Fixture::with(imitated(kind), cloudfront::distribution(), 1, BTreeMap::new()).await;
        let mut taken = TcpStream::connect(fixture.address).await.unwrap();
        taken.write_all(&get("a", "/never")).await.unwrap();
        timeout(Duration::from_secs(20), async {
            while fixture.lambda.environments().iter().all(|environment| environment.invocations == 0) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        let (answer, _) = fixture.exchange(&get("a", "/length")).await;
        assert!(answer.starts_with("HTTP/1.1 429"), "{kind:?}: {answer}");
        assert_eq!(answer.contains("x-tunnel-error: edge_busy"), ours, "{kind:?}: {answer}");
        drop(taken);
        fixture.end().await;
    }
    // The 30 s are 300 ms here.
    let imitation = on_clock(fronts::Kind::HttpApi, 100, &[]);
    let fixture = Fixture::behind(imitation.clone(), cloudfront::distribution()).await;
    let begun = time::Instant::now();
    let (answer, _) = fixture.exchange(&get("a", "/never")).await;
    assert!(answer.starts_with("HTTP/1.1 503") && !answer.contains("x-tunnel-"), "{answer}");
    assert!(begun.elapsed() >= fronts::BUFFERED_TIME / 100 && imitation.has_said(Does::Buffer));
    fixture.end().await;
}

/// `lambda_runtime` writes delimiter and end apart from the head, so its answers without a byte end here too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_without_a_byte_ends_where_its_delimiter_is_a_write_of_its_own() {
    let fixture = Fixture::behind(imitated(fronts::Kind::None), cloudfront::distribution()).await;
    let (answer, _) = fixture.exchange(&get("one.localhost", "/204")).await;
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    let (answer, _) = fixture.exchange(&get("one.localhost", "/length")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("12345"), "{answer}");
    assert!(answer.contains("x-amzn-remapped-content-length: 5"), "{answer}");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_become_events_and_own_fields_cannot_be_forged() {
    let fixture = Fixture::start().await;
    let event = fixture
        .event_of(
            b"M-SEARCH /x?y HTTP/1.1\r\nHost: demo.localhost\r\nX-Tunnel-Host: evil\r\nx-tunnel-front: evil\r\n\
              x-tunnel-target: /evil\r\nX-Tunnel-Client: 9.9.9.9\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi",
        )
        .await;
    assert_eq!(event["requestContext"]["http"]["method"], "M-SEARCH");
    assert_eq!(event["headers"]["x-tunnel-host"], "demo.localhost");
    assert_eq!(event["headers"]["x-tunnel-front"], "s3cret");
    assert!(event["headers"].get("x-tunnel-target").is_none());
    assert!(event["headers"].get("x-tunnel-client").is_none());
    assert_eq!(event["body"], "aGk=");
    let absolute = fixture
        .event_of(b"GET http://web.localhost:80/a?#f HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n")
        .await;
    assert_eq!(absolute["headers"]["x-tunnel-host"], "web.localhost:80");
    assert_eq!(absolute["rawPath"], "/a");
    assert_eq!(absolute["rawQueryString"], "#f");
    let bare =
        fixture.event_of(b"GET http://web.localhost? HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n").await;
    assert_eq!((&bare["rawPath"], &bare["headers"]["x-tunnel-target"]), (&"/".into(), &"/?".into()));
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ambiguous_requests_are_refused_by_the_front() {
    let fixture = Fixture::start().await;
    for request in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
    ] {
        let (answer, _) = fixture.exchange(request).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{:?}: {answer}", String::from_utf8_lossy(request));
        // Whoever finds out, hyper or the front.
        for word in ["x-tunnel-error: bad_request\r\n", "x-tunnel-request-id: ", "\"code\""] {
            assert!(answer.contains(word), "{:?}: {answer}", String::from_utf8_lossy(request));
        }
    }
    // The first of two requests in one packet decides nothing about the second.
    let (answer, _) = fixture
        .exchange(
            b"GET /length HTTP/1.1\r\nHost: a\r\n\r\nPOST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n\
              GET /POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        )
        .await;
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 400").count(), 1, "{answer}");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn responses_keep_their_framing() {
    let fixture = Fixture::start().await;
    let get =
        |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").into_bytes();
    let (answer, _) = fixture.exchange(&get("/length")).await;
    assert!(answer.contains("content-length: 5\r\n") && answer.ends_with("\r\n\r\n12345"), "{answer}");
    assert!(!answer.contains("transfer-encoding"), "{answer}");
    let (answer, _) = fixture.exchange(&get("/cookies")).await;
    assert!(answer.contains("set-cookie: a=1; Path=/\r\nset-cookie: b=2\r\n"), "{answer}");
    assert!(
        answer.contains("transfer-encoding: chunked\r\n") && answer.ends_with("\r\n0\r\n\r\n"),
        "{answer}"
    );
    for path in ["/204", "/304"] {
        let (answer, _) = fixture.exchange(&get(path)).await;
        assert!(answer.contains("content-length: 1234\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
        assert_eq!(answer.matches("date: ").count(), 1, "{answer}");
    }
    let (answer, _) =
        fixture.exchange(b"HEAD /head HTTP/1.1\r\nHost: a\r\n\r\nHEAD /head HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert_eq!(answer.matches("content-length: 1234\r\n").count(), 2, "{answer}");
    assert_eq!(answer.matches("01 Jan 1970").count(), 2, "{answer}");
    let (answer, _) = fixture.exchange(&get("/informational")).await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert!(answer.contains("x-tunnel-error: edge_failed"), "{answer}");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_response_never_looks_complete() {
    let fixture = Fixture::start().await;
    let get = |path: &str, version| {
        format!("GET {path} HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n").into_bytes()
    };
    let (answer, _) = fixture.exchange(&get("/broken", "1.1")).await;
    assert!(answer.contains("half") && !answer.ends_with("0\r\n\r\n"), "{answer}");
    let (answer, _) = fixture.exchange(&get("/short", "1.1")).await;
    assert!(answer.contains("content-length: 50\r\n") && answer.ends_with("12345"), "{answer}");
    let (answer, _) = fixture.exchange(&get("/long", "1.1")).await;
    assert!(!answer.contains("12345"), "{answer}");
    // Without any framing only a reset tells.
    let (answer, is_clean) = fixture.exchange(&get("/broken", "1.0")).await;
    assert!(!is_clean && !answer.contains("chunked"), "{answer}");
    let (answer, is_clean) = fixture.exchange(&get("/cookies", "1.0")).await;
    assert!(is_clean && answer.ends_with("cookies"), "{answer}");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_over_the_ceiling_are_refused_without_an_invocation() {
    let fixture = Fixture::start().await;
    // Announced, and all of it sent at once.
    let mut request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 64000000\r\n\r\n".to_vec();
    request.resize(request.len() + 64_000_000, b'x');
    let (answer, is_clean) = fixture.exchange(&request).await;
    assert!(is_clean && answer.starts_with("HTTP/1.1 413"), "{answer}");
    // Announced, by a client that asks first.
    let (answer, _) = fixture
        .exchange(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 8000000\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    // Not announced.
    let mut request = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n7a1200\r\n".to_vec();
    request.resize(request.len() + 8_000_000, b'x');
    request.extend_from_slice(b"\r\n0\r\n\r\n");
    let (answer, is_clean) = fixture.exchange(&request).await;
    assert!(is_clean && answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(fixture.lambda.environments().is_empty());
    // Text that its escapes would make too large is told as base64.
    let mut request =
        b"POST /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 4000000\r\n\r\n"
            .to_vec();
    request.resize(request.len() + 4_000_000, b'"');
    let (answer, _) = fixture.exchange(&request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // The largest that fits.
    let mut request = format!(
        "POST /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        limits::REQUEST_BODY_BYTES
    )
    .into_bytes();
    request.resize(request.len() + limits::REQUEST_BODY_BYTES, b'x');
    let (answer, _) = fixture.exchange(&request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_reported_once() {
    let fixture = Fixture::start().await;
    let mut stream = TcpStream::connect(fixture.address).await.unwrap();
    stream.write_all(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    timeout(Duration::from_secs(10), async {
        while fixture.lambda.environments().iter().all(|environment| environment.invocations == 0) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    drop(stream);
    timeout(Duration::from_secs(5), fixture.gone.1.notified()).await.unwrap();
    let gone = fixture.gone.0.lock().unwrap().clone();
    assert_eq!(gone.len(), 1);
    assert!(gone[0].starts_with("LOCAL"));
    fixture.end().await;
}

#[tokio::test]
async fn a_function_whose_announced_length_is_sent_may_still_end_its_answer() {
    use http_body_util::BodyExt as _;
    let answer = |length: u32, body| {
        let prelude = format!("{{\"statusCode\":200,\"headers\":{{\"content-length\":\"{length}\"}}}}");
        respond(prelude.as_bytes(), body, &Method::GET, Version::HTTP_11, SharedNotes::default(), direct())
            .unwrap()
    };
    for (length, read, is_listened_to) in [(10, 2, true), (11, 2, false), (10, 1, false)] {
        let (body, listens) = StreamBody::unended(&["hello", "again"]);
        let mut response = answer(length, body);
        for _ in 0..read {
            response.body_mut().frame().await.unwrap().unwrap();
        }
        // As whoever writes it does when the length is reached, or the client has gone.
        drop(response);
        tokio::task::yield_now().await;
        assert_eq!(listens(), is_listened_to, "{read} of 2 pieces of a body of {length}");
    }
    let (body, listens) = StreamBody::unended(&[]);
    drop(answer(0, body));
    tokio::task::yield_now().await;
    assert!(listens());
}
