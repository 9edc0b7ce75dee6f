//! The API with real function processes and real WebSocket clients: this test program executes itself
//! as each function.

use std::{collections::BTreeMap, sync::Mutex};

use lambda_runtime::{LambdaEvent, service_fn};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::{connect_async, tungstenite::client::IntoClientRequest};

use super::*;
use crate::lambda::{FunctionConfig, LambdaConfig, Launcher, process};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Client = WebSocketStream<tokio_tungstenite::MaybeTlsStream<TcpStream>>;

async fn function(event: LambdaEvent<Value>) -> Result<Value, Failure> {
    let name = std::env::var("AWS_LAMBDA_FUNCTION_NAME")?;
    let event = event.payload;
    let context = &event["requestContext"];
    Ok(match name.as_str() {
        "authorizer" => {
            let token = event["headers"]["authorization"]
                .as_str()
                .or_else(|| event["queryStringParameters"]["token"].as_str())
                .unwrap_or_default();
            match token {
                "fail" => return Err("broken".into()),
                "401" => return Err("Unauthorized".into()),
                _ => json!({
                    "principalId": token,
                    "policyDocument": {"Version": "2012-10-17", "Statement": [{
                        "Action": "execute-api:Invoke",
                        "Effect": if token == "deny" { "Deny" } else { "Allow" },
                        "Resource": event["methodArn"],
                    }]},
                    "context": {"owner": token, "number": 7},
                }),
            }
        }
        "connect" if context["routeKey"] == "$connect" => {
            let owner = context["authorizer"]["owner"].as_str().unwrap_or_default();
            json!({"statusCode": if owner == "refuse" { 403 } else { 200 }})
        }
        "connect" => json!({"statusCode": 200, "body": context.to_string()}),
        "response" => match event["body"].as_str().unwrap_or_default() {
            body if body.contains("\"fail\"") => return Err("broken".into()),
            body if body.contains("\"refuse\"") => json!({"statusCode": 500, "body": "no"}),
            _ => json!({"statusCode": 200, "body": format!("to {}", context["routeKey"])}),
        },
        "disconnect" => {
            // The lines that functions write are not seen here; the file is.
            let mut line = format!("{} {}\n", context["disconnectStatusCode"], context["disconnectReason"]);
            line.insert_str(0, &format!("{} ", context["connectionId"]));
            std::fs::write(std::env::var("TUNNEL_TEST_FILE")?, line)?;
            json!({"statusCode": 200})
        }
        _ => Value::Null,
    })
}

/// Not a test: the functions, when a pool has started this program.
#[test]
fn function_process() {
    if std::env::var_os("AWS_LAMBDA_RUNTIME_API").is_none() {
        return;
    }
    process::end_with_parent().unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let _ = lambda_runtime::run(service_fn(function)).await;
    });
}

struct Fixture {
    url: String,
    api: Arc<AgentApi>,
    stop: CancellationToken,
    served: Mutex<Option<tokio::task::JoinHandle<()>>>,
    folder: tempfile::TempDir,
}

impl Fixture {
    async fn start(clock: u32, chaos: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launcher = Launcher {
            program: std::env::current_exe().unwrap(),
            arguments: ["--exact", "agents::tests::function_process", "--nocapture", "--quiet"]
                .map(str::to_owned)
                .to_vec(),
            share: None,
        };
        let file = folder.path().join("disconnected").to_str().unwrap().to_owned();
        let functions = ["authorizer", "connect", "response", "disconnect"].map(|name| FunctionConfig {
            name,
            timeout: Duration::from_secs(10),
            memory_mb: 128,
            concurrency: 100,
            executions: None,
            environment: BTreeMap::from([("TUNNEL_TEST_FILE".to_owned(), file.clone())]),
        });
        let config = LambdaConfig {
            launcher,
            aws_endpoint: String::new(),
            register: crate::lambda::Register::default(),
            kill_chance: Arc::new(|| None),
        };
        let lambda = Lambda::start(functions.to_vec(), config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let domain = listener.local_addr().unwrap().to_string();
        let api = Arc::new(AgentApi {
            latency: Latency::default(),
            lambda,
            connections: Connections::default(),
            clock: Clock::new(clock),
            chaos: Arc::new(Chaos::new(chaos.parse().unwrap())),
            domain: domain.clone(),
            write_timeout: Duration::from_secs(5),
        });
        let stop = CancellationToken::new();
        let served = tokio::spawn(serve(listener, api.clone(), stop.clone()));
        Self { url: format!("ws://{domain}/any/path"), api, stop, served: Mutex::new(Some(served)), folder }
    }

    async fn connect(&self, token: &str) -> Result<Client, u16> {
        let mut request = self.url.as_str().into_client_request().unwrap();
        request.headers_mut().insert("Authorization", token.parse().unwrap());
        self.open(request).await
    }

    async fn open(&self, request: Request<()>) -> Result<Client, u16> {
        match timeout(Duration::from_secs(20), connect_async(request)).await.unwrap() {
            Ok((client, _)) => Ok(client),
            Err(tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Ends everything; gives what the last `disconnect` was told.
    async fn end(self) -> String {
        self.stop.cancel();
        let served = self.served.lock().unwrap().take().unwrap();
        timeout(Duration::from_secs(20), served).await.unwrap().unwrap();
        self.api.lambda.close().await;
        std::fs::read_to_string(self.folder.path().join("disconnected")).unwrap_or_default()
    }
}

async fn receive(client: &mut Client) -> Message {
    timeout(Duration::from_secs(20), client.next()).await.unwrap().unwrap().unwrap()
}

async fn close_code(client: &mut Client) -> u16 {
    loop {
        match receive(client).await {
            Message::Close(Some(close)) => return close.code.into(),
            Message::Close(None) => return 1005,
            _ => {}
        }
    }
}

fn text(message: &str) -> Message {
    Message::Text(message.into())
}

/// A text message in frames as the API wants them.
fn framed(message: &str) -> Vec<Message> {
    frames(Bytes::copy_from_slice(message.as_bytes())).map(Message::Frame).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_is_let_in_connects() {
    let fixture = Fixture::start(1, "").await;
    let plain = fixture.url.as_str().into_client_request().unwrap();
    assert_eq!(fixture.open(plain).await.err(), Some(401));
    assert!(fixture.api.lambda.environments().is_empty());
    for (token, status) in [("fail", 500), ("401", 401), ("deny", 403), ("refuse", 403)] {
        assert_eq!(fixture.connect(token).await.err(), Some(status), "{token}");
    }
    let with_query = format!("{}?token=alice", fixture.url).into_client_request().unwrap();
    let mut client = fixture.open(with_query).await.unwrap();
    client.send(text(r#"{"type":"hello"}"#)).await.unwrap();
    let Message::Text(context) = receive(&mut client).await else { panic!() };
    let context: Value = serde_json::from_str(&context).unwrap();
    assert_eq!(context["authorizer"]["principalId"], "alice");
    assert_eq!(context["authorizer"]["number"], "7");
    assert_eq!(context["routeKey"], "hello");
    assert_eq!(context["eventType"], "MESSAGE");
    assert_eq!(context["connectedAt"].as_u64().map(|at| at > 1_700_000_000_000), Some(true));
    let status = reqwest_like_get(&fixture.api.domain).await;
    assert!(status.starts_with("HTTP/1.1 426"), "{status}");
    client.close(None).await.unwrap();
    while let Some(Ok(_)) = timeout(Duration::from_secs(10), client.next()).await.unwrap() {}
    let told = fixture.end().await;
    assert!(told.contains("1005 \"Client-side close frame status not set\""), "{told}");
}

/// A plain GET; the head of its answer.
async fn reqwest_like_get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_answer_or_stay_silent() {
    let fixture = Fixture::start(1, "").await;
    let mut client = fixture.connect("alice").await.unwrap();
    client.send(text(r#"{"type":"heartbeat"}"#)).await.unwrap();
    assert_eq!(receive(&mut client).await, text("to \"heartbeat\""));
    // One-way: what the function answers goes nowhere, so the next thing heard is the heartbeat's answer.
    client.send(text(r#"{"type":"reply"}"#)).await.unwrap();
    client.send(text("not json")).await.unwrap();
    client.send(text(r#"{"type":"heartbeat"}"#)).await.unwrap();
    assert_eq!(receive(&mut client).await, text("to \"heartbeat\""));
    for failing in [r#"{"type":"heartbeat","x":"fail"}"#, r#"{"type":"heartbeat","x":"refuse"}"#] {
        client.send(text(failing)).await.unwrap();
        let Message::Text(failure) = receive(&mut client).await else { panic!() };
        let failure: Value = serde_json::from_str(&failure).unwrap();
        assert_eq!(failure["message"], "Internal server error");
        assert!(failure["connectionId"].as_str().unwrap().ends_with('='));
        assert!(failure["requestId"].is_string());
    }
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_over_a_quota_close_with_their_code() {
    let fixture = Fixture::start(1, "").await;
    // The largest that is allowed.
    let mut client = fixture.connect("alice").await.unwrap();
    let largest = format!("{{\"type\":\"heartbeat\",\"x\":\"{}\"}}", "x".repeat(limits::MESSAGE_BYTES - 27));
    assert_eq!(largest.len(), limits::MESSAGE_BYTES);
    for frame in framed(&largest) {
        client.send(frame).await.unwrap();
    }
    assert_eq!(receive(&mut client).await, text("to \"heartbeat\""));
    // One byte more, in legal frames.
    for frame in framed(&format!("{largest} ")) {
        // The close frame may come while this is still sending.
        let _ = client.send(frame).await;
    }
    assert_eq!(close_code(&mut client).await, 1009);
    // A frame that is one byte too long, with much more behind it that the edge never asked for.
    let mut client = fixture.connect("alice").await.unwrap();
    client.feed(text(&"x".repeat(limits::FRAME_BYTES + 1))).await.unwrap();
    for _ in 0..20 {
        let _ = client.feed(text(&"x".repeat(limits::FRAME_BYTES))).await;
    }
    let _ = client.flush().await;
    assert_eq!(close_code(&mut client).await, 1009);
    let mut client = fixture.connect("alice").await.unwrap();
    client.send(Message::Binary(Bytes::from_static(b"x"))).await.unwrap();
    assert_eq!(close_code(&mut client).await, 1003);
    drop(client);
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn posts_arrive_in_legal_frames_until_the_connection_ends() {
    let fixture = Fixture::start(1, "").await;
    let mut client = fixture.connect("alice").await.unwrap();
    client.send(text(r#"{"type":"hello"}"#)).await.unwrap();
    let Message::Text(context) = receive(&mut client).await else { panic!() };
    let context: Value = serde_json::from_str(&context).unwrap();
    let connection = context["connectionId"].as_str().unwrap().parse().unwrap();
    client.get_mut();
    let long = "ä".repeat(limits::MESSAGE_BYTES / 2);
    for message in ["short", &long] {
        let posted = fixture.api.connections.post(&connection, Bytes::copy_from_slice(message.as_bytes()));
        assert_eq!(posted, crate::connections::PostOutcome::Accepted);
        assert_eq!(receive(&mut client).await, text(message));
    }
    fixture.stop.cancel();
    assert_eq!(close_code(&mut client).await, 1001);
    drop(client);
    assert!(fixture.api.connections.is_empty());
    let told = fixture.end().await;
    assert!(told.contains("1001 \"Going away\"") && told.contains(&*connection.to_string()), "{told}");
}

#[test]
fn every_frame_is_within_the_quota() {
    for length in [0, 1, limits::FRAME_BYTES, limits::FRAME_BYTES + 1, limits::MESSAGE_BYTES] {
        let frames: Vec<Frame> = frames(Bytes::from(vec![b'x'; length])).collect();
        assert_eq!(frames.iter().map(|frame| frame.payload().len()).sum::<usize>(), length);
        assert!(frames.iter().all(|frame| frame.payload().len() <= limits::FRAME_BYTES));
        assert_eq!(frames.iter().filter(|frame| frame.header().is_final).count(), 1);
        assert!(frames.last().unwrap().header().is_final);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_and_an_old_one_are_closed() {
    // Ten minutes pass in 0.6 s, two hours in 7.2 s.
    let fixture = Fixture::start(1000, "").await;
    let mut client = fixture.connect("alice").await.unwrap();
    let begun = std::time::Instant::now();
    // Pings do not count as traffic.
    client.send(Message::Ping(Bytes::new())).await.unwrap();
    assert_eq!(close_code(&mut client).await, 1001);
    assert!(begun.elapsed() >= Duration::from_millis(590), "{:?}", begun.elapsed());
    // Messages keep it open, but not for ever.
    let mut client = fixture.connect("alice").await.unwrap();
    let begun = std::time::Instant::now();
    let code = loop {
        if client.send(text(r#"{"type":"heartbeat"}"#)).await.is_err() {
            break close_code(&mut client).await;
        }
        match receive(&mut client).await {
            Message::Close(close) => break close.map_or(1005, |close| close.code.into()),
            _ => time::sleep(Duration::from_millis(100)).await,
        }
    };
    assert_eq!(code, 1001);
    assert!(begun.elapsed() >= Duration::from_millis(7190), "{:?}", begun.elapsed());
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_can_be_cut_on_purpose() {
    let fixture = Fixture::start(1, "drop_link=1").await;
    let mut client = fixture.connect("alice").await.unwrap();
    client.send(text(r#"{"type":"heartbeat"}"#)).await.unwrap();
    let end = timeout(Duration::from_secs(10), client.next()).await.unwrap();
    assert!(matches!(end, Some(Err(_)) | None), "{end:?}");
    let told = fixture.end().await;
    assert!(told.contains("1006"), "{told}");
}
