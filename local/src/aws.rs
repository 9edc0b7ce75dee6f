//! AWS's APIs on one loopback port: enter requests of unmodified AWS SDK clients, leave the answers
//! of the real services, or what the real services refuse with.
//!
//! Signatures are not verified: the access key in the `Authorization` header says who calls, and
//! [`policy`] says what that function may do.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{id::ConnectionId, message::notice};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    chaos::{Chaos, ChaosConfig},
    clock::Clock,
    connections::PostOutcome,
    lambda::{InvokeError, Lambda, WeakLambda},
    latency::{Latency, Profile},
    listener,
    services::{Post, Services, percent_decode},
    sqs::{Attribute, NewMessage},
    stack::stack,
    states::States,
};

mod answer;
pub mod policy;
mod standard;
mod waiting;

use answer::{
    Answer, Configuration, JSON, configuration, connection, function_error, rest_error, sqs_error,
    sync_execution, unknown_operation,
};
use policy::{Action, Table};
use waiting::WaitingRuns;

/// The most bytes of a request's body: the largest is a batch to DynamoDB (16 MB).
const BODY_BYTES: usize = 16 * 1024 * 1024;

/// The name of the stage in the paths of `@connections`.
pub const STAGE: &str = "local";

/// The service on ECS that `relay` is here.
pub const RELAY_SERVICE: &str = "service/tunnel-local-relay/relay";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RegisterScalableTarget<'a> {
    service_namespace: &'a str,
    scalable_dimension: &'a str,
    resource_id: &'a str,
    min_capacity: u32,
    max_capacity: u32,
}

/// A function's process, as its access key names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The function's name, which its policy goes by.
    pub function: Arc<str>,
    /// The process.
    pub environment: Arc<str>,
}

/// Whose access key is whose.
#[derive(Debug, Default)]
pub struct Callers {
    by_key: RwLock<HashMap<Box<str>, Caller>>,
}

impl Callers {
    /// Makes an access key known.
    pub fn register(&self, access_key: &str, function: &str, environment: &str) {
        let caller = Caller { function: function.into(), environment: environment.into() };
        self.by_key.write().unwrap_or_else(PoisonError::into_inner).insert(access_key.into(), caller);
    }

    /// Forgets an access key: its process is gone.
    pub fn forget(&self, access_key: &str) {
        self.by_key.write().unwrap_or_else(PoisonError::into_inner).remove(access_key);
    }

    /// Who has this access key.
    #[must_use]
    pub fn find(&self, access_key: &str) -> Option<Caller> {
        self.by_key.read().unwrap_or_else(PoisonError::into_inner).get(access_key).cloned()
    }
}

/// With what the server starts.
#[derive(Debug, Default)]
pub struct Options {
    /// What goes wrong.
    pub chaos: ChaosConfig,
    /// How long hops take.
    pub latency: Option<Profile>,
    /// The name of the table of connections.
    pub connections_table: String,
    /// The name of the table of mailboxes.
    pub mailboxes_table: String,
    /// The name of the table of deliveries.
    pub deliveries_table: String,
}

/// The services with their server. The server stops when this is dropped.
#[derive(Debug)]
pub struct Aws {
    shared: Arc<Shared>,
    address: SocketAddr,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Shared {
    services: Arc<Services>,
    states: States,
    callers: Callers,
    waiting: WaitingRuns,
    clock: Clock,
    port: u16,
    connections_table: String,
    mailboxes_table: String,
    deliveries_table: String,
    lambda: OnceLock<WeakLambda>,
    tasks: watch::Sender<u32>,
}

impl Aws {
    /// Starts the services on a free port of the loopback interface.
    ///
    /// # Errors
    ///
    /// No port could be opened.
    pub async fn start(options: Options) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let clock = Clock::new(options.chaos.clock);
        let latency = Latency::new(options.latency, options.chaos.delay);
        let chaos = Arc::new(Chaos::new(options.chaos));
        let services = Arc::new(Services::new(&format!("http://{address}"), chaos, latency));
        let shared = Arc::new(Shared {
            states: States::new(Arc::clone(&services), clock),
            services,
            callers: Callers::default(),
            waiting: WaitingRuns::default(),
            clock,
            port: address.port(),
            connections_table: options.connections_table,
            mailboxes_table: options.mailboxes_table,
            deliveries_table: options.deliveries_table,
            lambda: OnceLock::new(),
            // As ECS makes a service of which nobody says how many tasks it has.
            tasks: watch::Sender::new(1),
        });
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, Arc::clone(&shared), stop.clone()));
        Ok(Self { shared, address, _stop: stop.drop_guard() })
    }

    /// The URL that an SDK takes as its endpoint.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The URL that the client of `@connections` takes as its endpoint.
    #[must_use]
    pub fn connections_endpoint(&self) -> String {
        format!("http://{}/{STAGE}", self.address)
    }

    /// The services behind the server.
    #[must_use]
    pub fn services(&self) -> &Arc<Services> {
        &self.shared.services
    }

    /// The state machines.
    #[must_use]
    pub fn states(&self) -> &States {
        &self.shared.states
    }

    /// Who may call.
    #[must_use]
    pub fn callers(&self) -> &Callers {
        &self.shared.callers
    }

    /// How many tasks of `relay` are to run.
    #[must_use]
    pub fn relay_tasks(&self) -> watch::Receiver<u32> {
        self.shared.tasks.subscribe()
    }

    /// Where a task of ECS with this access key finds its credentials.
    #[must_use]
    pub fn credentials_of(&self, access_key: &str) -> String {
        format!("{}/_local/credentials/{access_key}", self.endpoint())
    }

    /// Takes the functions, so that an operator can invoke and configure them.
    pub fn serve_functions(&self, lambda: &Lambda) {
        // A second call changes nothing: there is one set of functions.
        drop(self.shared.lambda.set(lambda.downgrade()));
        self.shared.states.serve_functions(lambda.downgrade());
    }

    /// How fast the long times pass.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// Tells the runs that the process with this access key waits for that the public client is
    /// gone. Returns how many were told.
    pub fn client_gone(&self, access_key: &str) -> usize {
        let runs = self.shared.waiting.of(access_key);
        runs.iter()
            .filter(|run| {
                let news = NewMessage {
                    body: notice::CLIENT_GONE.into(),
                    attributes: BTreeMap::from([(
                        notice::REQUEST_ID.into(),
                        Attribute::text(&run.request_id),
                    )]),
                    ..NewMessage::default()
                };
                let sent = self.shared.services.sqs.send(&run.mailbox, news);
                if let Err(error) = &sent {
                    tracing::debug!(%error, request_id = run.request_id, "could not tell a run that its client is gone");
                }
                sent.is_ok()
            })
            .count()
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener::accept(&listener, "a client of AWS") => accepted,
        };
        tokio::spawn(serve_connection(accepted.0, Arc::clone(&shared), stop.clone()));
    }
}

async fn serve_connection(stream: TcpStream, shared: Arc<Shared>, stop: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "could not set TCP_NODELAY");
    }
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(request).await) }
    });
    // Without half-close: a caller that hangs up drops the future of its request, and with it a
    // waiting receive or a run.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .half_close(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        () = stop.cancelled() => {}
        result = connection => {
            if let Err(error) = result {
                tracing::debug!(%error, "the connection of an AWS client ended");
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamesTable<'a> {
    #[serde(borrow, default)]
    table_name: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StartSyncExecution<'a> {
    #[serde(borrow)]
    state_machine_arn: Cow<'a, str>,
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    input: Option<Cow<'a, str>>,
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let body = match Limited::new(body, BODY_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => {
                return Answer::error(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "RequestEntityTooLargeException",
                    "the body is too large",
                )
                .into_response();
            }
        };
        let path = head.uri.path();
        let answer = if let Some(rest) = path.strip_prefix("/_local/") {
            self.own(&head.method, rest, &head.headers)
        } else if let Some(target) = head.headers.get("x-amz-target").and_then(|value| value.to_str().ok()) {
            self.target(target, &head.headers, body).await
        } else {
            self.rest(&head.method, path, &head.headers, body).await
        };
        answer.into_response()
    }

    /// What the AWS of this process tells about itself.
    fn own(&self, method: &Method, path: &str, headers: &HeaderMap) -> Answer {
        // Under no other name, so that no page of another site can ask under a name of its own.
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if ![format!("127.0.0.1:{}", self.port), format!("localhost:{}", self.port)]
            .contains(&host.to_owned())
        {
            return Answer::error(StatusCode::FORBIDDEN, "ForbiddenException", "ask 127.0.0.1");
        }
        let json = |value: serde_json::Result<Vec<u8>>| match value {
            Ok(body) => Answer { content_type: JSON, ..Answer::json(body) },
            Err(error) => {
                Answer::error(StatusCode::INTERNAL_SERVER_ERROR, "InternalFailure", &error.to_string())
            }
        };
        match (method, path) {
            (&Method::GET, "counters") => json(serde_json::to_vec(&self.services.counters.snapshot())),
            // Who knows the path knows what there is to know.
            (&Method::GET, _) if path.starts_with("credentials/") => {
                let access_key = &path["credentials/".len()..];
                if self.callers.find(access_key).is_none() {
                    return Answer::error(StatusCode::NOT_FOUND, "NotFoundException", "no such task");
                }
                json(serde_json::to_vec(&serde_json::json!({
                    "AccessKeyId": access_key, "SecretAccessKey": "local", "Token": "local",
                    "Expiration": "2099-01-01T00:00:00Z",
                })))
            }
            (&Method::GET, "hops") => json(serde_json::to_vec(&self.services.latency.passed())),
            (&Method::POST, "counters/reset") => {
                self.services.counters.reset();
                json(Ok(b"{}".to_vec()))
            }
            (&Method::GET, "metrics") => json(serde_json::to_vec(&self.services.metrics.snapshot())),
            (&Method::GET, "traces") => json(serde_json::to_vec(&self.states.traces())),
            (&Method::GET, _) if path.starts_with("traces/") => {
                match self.states.trace(&path["traces/".len()..]) {
                    Some(trace) => json(serde_json::to_vec(&trace)),
                    None => Answer::error(StatusCode::NOT_FOUND, "NotFoundException", "no such run"),
                }
            }
            _ => Answer::error(StatusCode::NOT_FOUND, "NotFoundException", "nothing is here"),
        }
    }

    /// The services with a JSON protocol.
    async fn target(&self, target: &str, headers: &HeaderMap, body: Bytes) -> Answer {
        let (access_key, caller) = match self.caller(headers) {
            Ok(caller) => caller,
            Err(problem) => return problem.json(),
        };
        let function = &*caller.function;
        let Some((service, operation)) = target.split_once('.') else { return unknown_operation() };
        match service {
            "AmazonSQS" => {
                if let Err(denied) = allow(function, Action::Sqs(operation)) {
                    return denied.json();
                }
                self.sqs(function, operation, &body).await
            }
            "DynamoDB_20120810" => {
                let table = self.table(&body);
                let action = Action::DynamoDb(operation, table);
                if let Err(denied) =
                    refusal(function, action, policy::allows_on(function, action, || row(table, &body)))
                {
                    return denied.json();
                }
                let answer = self.services.dynamodb(function, operation, body).await;
                let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
                Answer { status, ..Answer::json(answer.body) }
            }
            "AWSStepFunctions" => {
                if let Err(denied) = allow(function, Action::States(operation)) {
                    return denied.json();
                }
                if operation == "StartSyncExecution" {
                    self.start_sync_execution(function, access_key, &body).await
                } else {
                    standard::answer(&self.states, function, operation, &body).await
                }
            }
            "AnyScaleFrontendService" => {
                if let Err(denied) = allow(function, Action::Scaling(operation)) {
                    return denied.json();
                }
                if operation == "RegisterScalableTarget" {
                    self.register_scalable_target(function, &body)
                } else {
                    unknown_operation()
                }
            }
            _ => unknown_operation(),
        }
    }

    /// Application Auto Scaling, for the one service there is.
    fn register_scalable_target(&self, function: &str, body: &[u8]) -> Answer {
        self.services.counters.record(function, "application-autoscaling", "RegisterScalableTarget");
        let bounds = serde_json::from_slice::<RegisterScalableTarget<'_>>(body).ok().filter(|bounds| {
            bounds.service_namespace == "ecs"
                && bounds.scalable_dimension == "ecs:service:DesiredCount"
                && bounds.resource_id == RELAY_SERVICE
                && bounds.min_capacity <= bounds.max_capacity
        });
        let Some(bounds) = bounds else {
            return Answer::error(
                StatusCode::BAD_REQUEST,
                "ValidationException",
                "no such service, or no such bounds",
            );
        };
        self.tasks.send_if_modified(|tasks| {
            let bounded = (*tasks).clamp(bounds.min_capacity, bounds.max_capacity);
            std::mem::replace(tasks, bounded) != bounded
        });
        Answer::json(
            br#"{"ScalableTargetARN":"arn:aws:application-autoscaling:local:0:scalable-target/relay"}"#
                .to_vec(),
        )
    }

    fn table(&self, body: &[u8]) -> Table {
        let named: Option<NamesTable<'_>> = serde_json::from_slice(body).ok();
        match named {
            Some(named) if named.table_name == *self.connections_table => Table::Connections,
            Some(named) if named.table_name == *self.mailboxes_table => Table::Mailboxes,
            Some(named) if named.table_name == *self.deliveries_table => Table::Deliveries,
            _ => Table::Other,
        }
    }

    async fn sqs(&self, function: &str, operation: &str, body: &[u8]) -> Answer {
        let Some(action) = policy::sqs_action(operation) else { return unknown_operation() };
        self.services.begin_sqs(function, action).await;
        match self.services.sqs.handle(action, body).await {
            Ok(body) => Answer::json(body),
            Err(error) => sqs_error(&error),
        }
    }

    async fn start_sync_execution(&self, function: &str, access_key: &str, body: &[u8]) -> Answer {
        let call = std::str::from_utf8(body).ok().map(serde_json::from_str::<StartSyncExecution<'_>>);
        let Some(Ok(call)) = call else {
            return Answer::error(StatusCode::BAD_REQUEST, "ValidationException", "the request is not valid");
        };
        let input = call.input.as_deref().unwrap_or("{}");
        let run = match self.states.accept(&call.state_machine_arn, call.name.as_deref(), input) {
            Ok(run) => run,
            Err(error) => return Answer::error(StatusCode::BAD_REQUEST, error.name(), &error.to_string()),
        };
        let _waiting = self.waiting.begin(access_key, &run);
        let result = self.states.run(function, run).await;
        sync_execution(&call.state_machine_arn, &result)
    }

    /// The management API of WebSocket connections.
    async fn rest(&self, method: &Method, path: &str, headers: &HeaderMap, body: Bytes) -> Answer {
        let caller = match self.caller(headers) {
            Ok((_, caller)) => caller,
            Err(problem) => return problem.rest(),
        };
        let function = &*caller.function;
        if let Some(path) = path.strip_prefix("/2015-03-31/functions/") {
            return self.functions(function, method, path, body).await;
        }
        let path = percent_decode(path).unwrap_or_default();
        let path = path.strip_prefix(&format!("/{STAGE}")).unwrap_or(&path);
        let Some(id) = path.strip_prefix("/@connections/") else {
            return rest_error(StatusCode::FORBIDDEN, "ForbiddenException", "Forbidden");
        };
        if let Err(denied) = allow(function, Action::ManageConnections(method.as_str())) {
            return denied.rest();
        }
        let Ok(id) = id.parse::<ConnectionId>() else {
            return rest_error(StatusCode::BAD_REQUEST, "BadRequestException", "Invalid connectionId");
        };
        let gone = || rest_error(StatusCode::GONE, "GoneException", "Gone");
        match *method {
            Method::POST => match self.services.post(function, &id, body).await {
                Post::Done(PostOutcome::Accepted) => Answer { content_type: JSON, ..Answer::json("") },
                Post::Done(PostOutcome::Gone) => gone(),
                Post::Done(PostOutcome::TooLarge) => {
                    rest_error(StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLargeException", "Message too long")
                }
                Post::Done(PostOutcome::BufferFull) | Post::Throttled => {
                    rest_error(StatusCode::TOO_MANY_REQUESTS, "LimitExceededException", "Limit exceeded")
                }
            },
            Method::GET => match self.services.connection(function, &id).await {
                Some(info) => connection(&info),
                None => gone(),
            },
            Method::DELETE => {
                if self.services.close(function, &id).await {
                    Answer { status: StatusCode::NO_CONTENT, content_type: JSON, ..Answer::json("") }
                } else {
                    gone()
                }
            }
            _ => rest_error(StatusCode::FORBIDDEN, "MissingAuthenticationTokenException", "Forbidden"),
        }
    }

    /// Lambda: invoking a function, and its environment variables.
    async fn functions(&self, caller: &str, method: &Method, path: &str, body: Bytes) -> Answer {
        let (name, operation) = path.split_once('/').unwrap_or((path, ""));
        let action = match (method, operation) {
            (&Method::POST, "invocations") => "InvokeFunction",
            (&Method::GET, "configuration") => "GetFunctionConfiguration",
            (&Method::PUT, "configuration") => "UpdateFunctionConfiguration",
            _ => return rest_error(StatusCode::NOT_FOUND, "UnknownOperationException", "nothing is here"),
        };
        if let Err(denied) = allow(caller, Action::Lambda(action)) {
            return denied.rest();
        }
        let missing = || rest_error(StatusCode::NOT_FOUND, "ResourceNotFoundException", "Function not found");
        let Some(lambda) = self.lambda.get().and_then(WeakLambda::upgrade) else { return missing() };
        match action {
            "InvokeFunction" => match lambda.invoke(name, body).await {
                Ok(answer) => Answer { content_type: JSON, ..Answer::json(answer) },
                Err(InvokeError::NoSuchFunction) => missing(),
                Err(InvokeError::Throttled) => {
                    rest_error(StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsException", "Rate Exceeded.")
                }
                Err(error) => function_error(&error),
            },
            "GetFunctionConfiguration" => match lambda.variables(name) {
                Some(variables) => configuration(name, variables),
                None => missing(),
            },
            _ => {
                let Ok(Configuration { environment, .. }) = serde_json::from_slice(&body) else {
                    return rest_error(
                        StatusCode::BAD_REQUEST,
                        "InvalidRequestContentException",
                        "not valid",
                    );
                };
                match lambda.reconfigure(name, environment.variables.clone()) {
                    Ok(()) => configuration(name, environment.variables),
                    Err(_) => missing(),
                }
            }
        }
    }

    fn caller<'h>(&self, headers: &'h HeaderMap) -> Result<(&'h str, Caller), Refusal> {
        let access_key = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(access_key)
            .ok_or_else(|| Refusal {
                name: "MissingAuthenticationTokenException",
                message: "Request is missing Authentication Token".to_owned(),
            })?;
        let caller = self.callers.find(access_key).ok_or_else(|| Refusal {
            name: "UnrecognizedClientException",
            message: "The security token included in the request is invalid.".to_owned(),
        })?;
        Ok((access_key, caller))
    }
}

/// Why a caller was turned away.
struct Refusal {
    name: &'static str,
    message: String,
}

impl Refusal {
    fn json(&self) -> Answer {
        Answer::error(StatusCode::BAD_REQUEST, self.name, &self.message)
    }

    fn rest(&self) -> Answer {
        rest_error(StatusCode::FORBIDDEN, self.name, &self.message)
    }
}

fn allow(function: &str, action: Action<'_>) -> Result<(), Refusal> {
    refusal(function, action, policy::allows(function, action))
}

fn refusal(function: &str, action: Action<'_>, allowed: bool) -> Result<(), Refusal> {
    if allowed {
        return Ok(());
    }
    tracing::warn!(function, %action, "a function called what it may not");
    Err(Refusal {
        name: "AccessDeniedException",
        message: format!(
            "User: arn:aws:sts::000000000000:assumed-role/{function} is not authorized to perform: {action}"
        ),
    })
}

/// The one partition key of a table that a call is about: that of its row, or of its query.
fn row(table: Table, body: &[u8]) -> Option<String> {
    let keys = match table {
        Table::Connections => &stack().connections,
        Table::Mailboxes => &stack().mailboxes,
        Table::Deliveries => &stack().deliveries,
        Table::Other => return None,
    };
    let call: Value = serde_json::from_slice(body).ok()?;
    let value = match call.get("Key").or_else(|| call.get("Item")) {
        Some(key) => &key[&keys.partition],
        None => {
            let terms = call["KeyConditionExpression"].as_str()?.split(" AND ");
            let mut equal = terms.filter_map(|term| term.split_once(" = "));
            let (_, value) = equal.find(|(name, _)| *name == keys.partition)?;
            &call["ExpressionAttributeValues"][value]
        }
    };
    value["S"].as_str().map(str::to_owned)
}

/// The access key in an `Authorization` header of AWS.
fn access_key(authorization: &str) -> Option<&str> {
    let (_, credential) = authorization.strip_prefix("AWS4-")?.split_once("Credential=")?;
    let (key, _) = credential.split_once('/')?;
    (!key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests;
