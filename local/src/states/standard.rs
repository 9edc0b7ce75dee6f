//! STANDARD runs, from their start to their end: names, tokens, times, history, stopping and redriving.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use proto::limits;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    StartError, States,
    definition::{Definition, MachineType},
    executions::{CLOSED, RunError, StandardRun},
    journal::EVENTS,
    outcome::{Status, TaskError},
    tokens::AnswerError,
};
use crate::{
    chaos::ChaosConfig,
    clock::Clock,
    dynamodb::{Dynamodb, Table},
    latency::Latency,
    services::Services,
    sqs::{QueueAttributes, ReceiveRequest},
    store::{self, Change, Service, Store},
};

const TABLE: Table<'_> = Table { name: "parked", partition_key: "tunnel", sort_key: None, expiry: None };

/// A service with one table, one queue and one machine of these states.
async fn service(states: Value) -> (States, Arc<str>) {
    service_with(states, Clock::default(), &[]).await
}

/// The same as far as these changes of an earlier one had brought its tables and queues, on a clock.
async fn service_with(states: Value, clock: Clock, changes: &[Change]) -> (States, Arc<str>) {
    let of = |service| {
        changes.iter().filter(move |change| change.service == service).map(|change| &*change.record)
    };
    let chaos = Arc::new(crate::chaos::Chaos::new(ChaosConfig::default()));
    let services = Services::new("http://localhost", chaos, Latency::default());
    services.dynamodb.take_over(of(Service::Tables)).await.unwrap();
    services.dynamodb.create_table(TABLE).await.unwrap();
    services.sqs.create_kept("queue", QueueAttributes::default()).unwrap();
    services.sqs.take_over(of(Service::Queues)).unwrap();
    let start = states.as_object().unwrap().keys().next().unwrap().clone();
    let machine = json!({ "QueryLanguage": "JSONata", "StartAt": start, "States": states }).to_string();
    let definition = Definition::parse_as(MachineType::Standard, &machine, &BTreeMap::new()).unwrap();
    let service = States::new(Arc::new(services), clock);
    let arn = service.create("delivery", definition);
    (service, arn)
}

/// A state that parks the run's token in the table, with more of its fields.
fn park(more: Value) -> Value {
    let mut state = json!({
        "Type": "Task", "Resource": "arn:aws:states:::aws-sdk:dynamodb:putItem.waitForTaskToken",
        "Arguments": { "TableName": "parked", "Item": {
            "tunnel": { "S": "web" }, "token": { "S": "{% $states.context.Task.Token %}" } } },
        "TimeoutSeconds": 100, "End": true,
    });
    state.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    state
}

async fn start(service: &States, arn: &str, name: &str, input: &str) -> Arc<StandardRun> {
    service.start("operator", arn, Some(name), input).await.unwrap()
}

/// Lets runs go on until one has as many events.
async fn events(run: &StandardRun, count: usize) {
    while run.journal().len() < count {
        tokio::task::yield_now().await;
    }
}

/// Lets a run go on until it ends; its times pass at once.
async fn ended(run: &StandardRun) -> Status {
    loop {
        match run.standing().status {
            // The clock of these tests stands still but for sleepers.
            Status::Running => tokio::time::sleep(Duration::from_millis(20)).await,
            status => return status,
        }
    }
}

async fn parked_token(service: &States) -> String {
    let request = json!({ "TableName": "parked", "Key": { "tunnel": { "S": "web" } } });
    let answer = service.services.dynamodb.call("GetItem", request.to_string().into()).await;
    let row: Value = serde_json::from_slice(&answer.body).unwrap();
    row["Item"]["token"]["S"].as_str().unwrap().to_owned()
}

fn kinds(run: &StandardRun) -> Vec<String> {
    run.journal()
        .page(0..run.journal().len())
        .iter()
        .map(|event| event["type"].as_str().unwrap().into())
        .collect()
}

/// `ExecutionStarted`, `TaskStateEntered`, `TaskScheduled`, `TaskStarted`, `TaskSubmitted`.
const WAITING: usize = 5;

#[tokio::test(start_paused = true)]
async fn a_parked_run_goes_on_with_its_token_once() {
    let (service, arn) =
        service(json!({ "Park": park(json!({ "Output": "{% $states.result.by %}" })) })).await;
    let run = start(&service, &arn, "d1", "{\"n\":1}").await;
    events(&run, WAITING).await;
    let token = parked_token(&service).await;
    service.tokens().succeed(&token, "{\"by\":\"hello\"}").unwrap();
    assert_eq!(ended(&run).await, Status::Succeeded(json!("hello")));
    assert_eq!(service.tokens().succeed(&token, "1"), Err(AnswerError::TaskTimedOut));
    let wanted = [
        "ExecutionStarted",
        "TaskStateEntered",
        "TaskScheduled",
        "TaskStarted",
        "TaskSubmitted",
        "TaskSucceeded",
        "TaskStateExited",
        "ExecutionSucceeded",
    ];
    assert_eq!(kinds(&run), wanted);
    let scheduled = &run.journal().page(2..3)[0]["taskScheduledEventDetails"];
    assert_eq!(scheduled["resourceType"], "aws-sdk:dynamodb");
    assert_eq!(scheduled["resource"], "putItem.waitForTaskToken");
    assert!(scheduled["parameters"].as_str().unwrap().contains(&token));
}

#[tokio::test(start_paused = true)]
async fn a_name_starts_one_run() {
    let (service, arn) = service(json!({ "Park": park(json!({})) })).await;
    let first = start(&service, &arn, "d1", "{\"n\":1}").await;
    let again = start(&service, &arn, "d1", "{\"n\":1}").await;
    assert!(Arc::ptr_eq(&first, &again));
    let taken = |result: Result<_, StartError>| matches!(result, Err(StartError::ExecutionAlreadyExists(_)));
    assert!(taken(service.start("operator", &arn, Some("d1"), "{\"n\":2}").await));
    events(&first, WAITING).await;
    service.tokens().succeed(&parked_token(&service).await, "1").unwrap();
    ended(&first).await;
    assert!(taken(service.start("operator", &arn, Some("d1"), "{\"n\":1}").await));
    let input = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    start(&service, &arn, &"n".repeat(80), &input(limits::STATE_BYTES)).await;
    for (name, input, wanted) in [
        ("n".repeat(81), "{}".to_owned(), "InvalidName"),
        ("a/b".to_owned(), "{}".to_owned(), "InvalidName"),
        ("d2".to_owned(), input(limits::STATE_BYTES + 1), "ValidationException"),
        ("d2".to_owned(), "{".to_owned(), "InvalidExecutionInput"),
    ] {
        let refused = service.start("operator", &arn, Some(&name), &input).await.unwrap_err();
        assert_eq!(refused.name(), wanted);
    }
    // Each type is started in its own way.
    assert_eq!(service.accept(&arn, None, "{}").unwrap_err(), StartError::StateMachineTypeNotSupported);
    let names: BTreeSet<_> = service.executions(&arn).iter().map(|run| run.execution().name.len()).collect();
    assert_eq!(names, BTreeSet::from([2, 80]));
}

#[tokio::test(start_paused = true)]
async fn heartbeats_hold_a_task_up_to_its_timeout() {
    let catch = |error: &str| json!({ "HeartbeatSeconds": 10, "Catch": [{ "ErrorEquals": [error], "Output": "{% $states.errorOutput.Error %}", "Next": "Caught" }] });
    for (caught, beats, seconds, wanted) in [
        ("States.HeartbeatTimeout", 0, 10, "States.HeartbeatTimeout"),
        ("States.Timeout", 2, 26, "States.HeartbeatTimeout"),
        ("States.Timeout", 20, 100, "States.Timeout"),
    ] {
        let caught = json!({ "Park": park(catch(caught)), "Caught": { "Type": "Succeed" } });
        let (service, arn) = service(caught).await;
        let began = Instant::now();
        let run = start(&service, &arn, "d1", "{}").await;
        events(&run, WAITING).await;
        let token = parked_token(&service).await;
        for _ in 0..beats {
            tokio::time::sleep(Duration::from_secs(8)).await;
            if service.tokens().beat(&token).is_err() {
                break;
            }
        }
        assert_eq!(ended(&run).await, Status::Succeeded(json!(wanted)));
        let took = if beats == 20 { Duration::from_secs(seconds) } else { began.elapsed() };
        assert_eq!(took.as_secs(), seconds, "{wanted} after {beats}");
        assert_eq!(service.tokens().succeed(&token, "1"), Err(AnswerError::TaskTimedOut));
        assert!(kinds(&run).contains(&"TaskTimedOut".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn each_attempt_has_its_own_token() {
    let retry = json!({ "Retry": [{ "ErrorEquals": ["Busy"], "IntervalSeconds": 5, "MaxAttempts": 1 }] });
    let (service, arn) = service(json!({ "Park": park(retry) })).await;
    let run = start(&service, &arn, "d1", "{}").await;
    events(&run, WAITING).await;
    let first = parked_token(&service).await;
    service.tokens().fail(&first, "Busy", "later").unwrap();
    // `TaskFailed`, and the second attempt's three.
    while run.journal().len() < WAITING + 4 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let second = parked_token(&service).await;
    assert_ne!(first, second);
    assert_eq!(service.tokens().succeed(&first, "1"), Err(AnswerError::TaskTimedOut));
    service.tokens().fail(&second, "Busy", "again").unwrap();
    assert_eq!(ended(&run).await, Status::Failed(TaskError::new("Busy", "again")));
}

#[tokio::test(start_paused = true)]
async fn a_stopped_run_goes_on_where_it_was_when_redriven() {
    let states = json!({
        "First": { "Type": "Pass", "Assign": { "kept": "{% $states.input.n + 1 %}" }, "Next": "Park" },
        "Park": park(json!({ "Output": "{% $kept %}" })),
    });
    let (service, arn) = service(states).await;
    let run = start(&service, &arn, "d1", "{\"n\":1}").await;
    let execution = run.execution().arn.to_string();
    assert_eq!(service.redrive(&execution), Err(RunError::ExecutionNotRedrivable));
    // Two more for `First`.
    events(&run, WAITING + 2).await;
    let token = parked_token(&service).await;
    service.stop(&execution, TaskError::new("Tired", "of it")).await.unwrap();
    assert_eq!(run.standing().status, Status::Aborted(TaskError::new("Tired", "of it")));
    assert_eq!(service.tokens().succeed(&token, "1"), Err(AnswerError::TaskTimedOut));
    service.redrive(&execution).unwrap();
    // `ExecutionAborted`, `ExecutionRedriven` and the state once more.
    events(&run, WAITING + 2 + 2 + 4).await;
    service.tokens().succeed(&parked_token(&service).await, "1").unwrap();
    assert_eq!(ended(&run).await, Status::Succeeded(json!(2)));
    assert_eq!(run.standing().redrives, 1);
    assert_eq!(kinds(&run).iter().filter(|kind| *kind == "PassStateEntered").count(), 1);
    assert_eq!(service.redrive(&execution), Err(RunError::ExecutionNotRedrivable));
    assert_eq!(service.redrive("arn:none"), Err(RunError::ExecutionDoesNotExist));
    assert_eq!(service.stop("arn:none", TaskError::new("", "")).await, Err(RunError::ExecutionDoesNotExist));
}

#[tokio::test(start_paused = true)]
async fn a_run_waits_for_months_and_not_for_ever() {
    let day = 24 * 60 * 60;
    let states = json!({ "Wait": { "Type": "Wait", "Seconds": 364 * day, "Next": "Again" }, "Again": { "Type": "Wait", "Seconds": 2 * day, "End": true } });
    let (service, arn) = service(states).await;
    let began = Instant::now();
    let run = start(&service, &arn, "d1", "{}").await;
    while run.standing().status == Status::Running {
        tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    }
    assert!(matches!(run.standing().status, Status::TimedOut(_)));
    assert!(began.elapsed() >= Duration::from_secs(365 * day));
}

#[tokio::test(start_paused = true)]
async fn a_full_history_ends_a_run() {
    let states =
        json!({ "A": { "Type": "Pass", "Next": "B" }, "B": { "Type": "Wait", "Seconds": 1, "Next": "A" } });
    let (service, arn) = service(states).await;
    let run = start(&service, &arn, "d1", "{}").await;
    while run.standing().status == Status::Running {
        tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    }
    let Status::Failed(error) = run.standing().status else { panic!("{:?}", run.standing()) };
    assert_eq!(error.error, "States.Runtime");
    assert!(error.cause.contains("maximum number of history events"), "{}", error.cause);
    assert_eq!(run.journal().len(), EVENTS);
    // There is no room for what a redriven run would do.
    assert_eq!(service.redrive(&run.execution().arn), Err(RunError::ExecutionNotRedrivable));
}

/// Keeps a service's state in a file, after it has taken over what these changes say about runs.
async fn keep(service: &States, path: &Path, changes: &[Change]) {
    let runs = changes.iter().filter(|change| change.service == Service::Runs);
    service.take_over(runs.map(|change| &*change.record)).unwrap();
    let tables = service.services.dynamodb.copy().await.unwrap();
    let store = Store::create(path, |file| {
        Dynamodb::fill(&tables, file)?;
        service.services.sqs.fill(file)?;
        service.fill(file)
    });
    let store = store.unwrap();
    service.services.dynamodb.keep(Arc::clone(&store));
    service.services.sqs.keep(Arc::clone(&store));
    service.keep(store);
}

/// Answers whatever the run waits for until it ends.
async fn answered(service: &States, run: &StandardRun) -> Status {
    loop {
        if let Status::Running = run.standing().status {
            let request = json!({ "TableName": "parked", "Key": { "tunnel": { "S": "web" } } });
            let answer = service.services.dynamodb.call("GetItem", request.to_string().into()).await;
            let row: Value = serde_json::from_slice(&answer.body).unwrap();
            if let Some(token) = row["Item"]["token"]["S"].as_str() {
                // The one that is there may be used already.
                let _ = service.tokens().succeed(token, "{\"by\":\"hello\"}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        } else {
            return run.standing().status;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_goes_on_wherever_its_process_was_killed() {
    let mut states = json!({
        "First": { "Type": "Pass", "Assign": { "kept": "{% $states.input.n + 1 %}" }, "Next": "Send" },
        "Send": { "Type": "Task", "Resource": "arn:aws:states:::sqs:sendMessage", "TimeoutSeconds": 5,
            "Arguments": { "QueueUrl": "http://localhost/000000000000/queue", "MessageBody": "{% $states.context.Execution.Name %}" },
            "Next": "Park" },
        "Park": park(json!({ "Next": "Pause", "Assign": { "by": "{% $states.result.by %}" },
            "Retry": [{ "ErrorEquals": ["States.ALL"], "IntervalSeconds": 3, "MaxAttempts": 2 }] })),
        "Pause": { "Type": "Wait", "Seconds": 5, "Next": "Last" },
        "Last": { "Type": "Succeed", "Output": { "by": "{% $by %}", "kept": "{% $kept %}" } },
    });
    states["Park"].as_object_mut().unwrap().remove("End");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (first, arn) = service_with(states.clone(), Clock::default(), &[]).await;
    keep(&first, &path, &[]).await;
    let begun = store::read(&path).unwrap().len();
    let run = start(&first, &arn, "d1", "{\"n\":1}").await;
    let wanted = Status::Succeeded(json!({ "by": "hello", "kept": 2 }));
    assert_eq!(answered(&first, &run).await, wanted);
    let whole = store::read(&path).unwrap();
    let history = kinds(&run);
    assert!(whole.len() > begun + 20, "{}", whole.len());

    // Killed after each change, from the start of the run on.
    for cut in begun + 1..=whole.len() {
        let changes = &whole[..cut];
        let (second, _) = service_with(states.clone(), Clock::default(), changes).await;
        keep(&second, &path, changes).await;
        let run = second.execution(&run.execution().arn).unwrap();
        assert_eq!(second.resume(), usize::from(cut < whole.len()), "{cut}");
        assert_eq!(answered(&second, &run).await, wanted, "killed after {:?}", whole[cut - 1]);
        // The history tells what was being done once more, at most the end of one state and the entrance of the next, or not at all.
        let again = kinds(&run).len();
        assert!((history.len() - 1..=history.len() + 4).contains(&again), "{cut}: {:?}", kinds(&run));
        let request = ReceiveRequest { max: 10, ..ReceiveRequest::default() };
        let sent = second.services.sqs.receive("http://localhost/000000000000/queue", request).await.unwrap();
        assert!(matches!(sent.len(), 1 | 2), "{cut}: {}", sent.len());
        // What was written anew leads to the same.
        let changes = store::read(&path).unwrap();
        let (third, _) = service_with(states.clone(), Clock::default(), &changes).await;
        keep(&third, &path, &changes).await;
        let run = third.execution(&run.execution().arn).unwrap();
        assert_eq!((run.standing().status, kinds(&run).len()), (wanted.clone(), again));
        assert_eq!(third.resume(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_outlives_the_process_and_stays_worth_nothing_once_used() {
    let states = json!({ "Park": park(json!({ "HeartbeatSeconds": 50 })) });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (first, arn) = service(states.clone()).await;
    keep(&first, &path, &[]).await;
    for name in ["d1", "d2"] {
        let run = start(&first, &arn, name, "{}").await;
        events(&run, WAITING).await;
    }
    // That of `d2`, which overwrote the other in the table.
    let token = parked_token(&first).await;
    let run = first.execution(&format!("{}:d2", arn.replace("stateMachine", "execution"))).unwrap();
    let changes = store::read(&path).unwrap();
    let (second, _) = service_with(states.clone(), Clock::default(), &changes).await;
    keep(&second, &path, &changes).await;
    assert_eq!(second.resume(), 2);
    let again = second.execution(&run.execution().arn).unwrap();
    assert_eq!(kinds(&again).len(), WAITING);
    second.tokens().beat(&token).unwrap();
    second.tokens().succeed(&token, "1").unwrap();
    // Killed before the run has seen it: the answer was taken, and counts.
    let changes = store::read(&path).unwrap();
    let (third, _) = service_with(states, Clock::default(), &changes).await;
    keep(&third, &path, &changes).await;
    assert_eq!(third.tokens().succeed(&token, "2"), Err(AnswerError::TaskTimedOut));
    third.resume();
    let run = third.execution(&run.execution().arn).unwrap();
    assert_eq!(ended(&run).await, Status::Succeeded(json!(1)));
    // Nobody answered the other one.
    let other = third.execution(&format!("{}:d1", arn.replace("stateMachine", "execution"))).unwrap();
    assert!(matches!(ended(&other).await, Status::Failed(error) if error.error == "States.HeartbeatTimeout"));
}

#[tokio::test(start_paused = true)]
async fn a_function_that_was_cut_off_may_have_run() {
    let caught = |name: &str| json!({ "Type": "Succeed", "Output": name });
    let states = json!({
        "Call": { "Type": "Task", "Resource": "arn:aws:states:::lambda:invoke", "TimeoutSeconds": 5,
            "Arguments": { "FunctionName": "f", "Payload": {} }, "End": true,
            "Catch": [
                { "ErrorEquals": ["Runtime.ExitError"], "Next": "Lost" },
                { "ErrorEquals": ["Lambda.ResourceNotFoundException"], "Next": "None" },
            ] },
        "Lost": caught("lost"), "None": caught("none"),
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (first, arn) = service(states.clone()).await;
    keep(&first, &path, &[]).await;
    let run = start(&first, &arn, "d1", "{}").await;
    assert_eq!(ended(&run).await, Status::Succeeded(json!("none")));
    let whole = store::read(&path).unwrap();
    let is_call = |change: &Change| change.record.contains("\"begun\":{") && change.record.contains("\"at\"");
    let at = whole.iter().position(is_call).unwrap();
    for (cut, wanted) in [(at, "none"), (at + 1, "lost"), (at + 2, "none")] {
        let (second, _) = service_with(states.clone(), Clock::default(), &whole[..cut]).await;
        keep(&second, &path, &whole[..cut]).await;
        second.resume();
        let run = second.execution(&run.execution().arn).unwrap();
        assert_eq!(ended(&run).await, Status::Succeeded(json!(wanted)), "{cut}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_calls_functions_in_their_own_processes() {
    let call = |more: Value| {
        let mut state = json!({
            "Type": "Task", "Resource": "arn:aws:states:::lambda:invoke", "TimeoutSeconds": 60, "End": true,
            "Arguments": { "FunctionName": "arn:aws:lambda:local:000000000000:function:obedient", "Payload": "{% $states.input.order %}" },
            "Output": "{% $states.result.Payload %}",
        });
        state.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "Call": state })
    };
    let lambda = crate::lambda::tests::start(1, Duration::from_secs(5));
    let outcome = async |states: Value, order: Value| {
        let (service, arn) = service(states).await;
        service.serve_functions(lambda.downgrade());
        let run = start(&service, &arn, "d1", &json!({ "order": order }).to_string()).await;
        ended(&run).await
    };
    let failed = |status| match status {
        Status::Failed(error) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(outcome(call(json!({})), json!({ "Echo": "x" })).await, Status::Succeeded(json!("x")));
    // What a function says of its failure has its name, and all of it is the cause.
    let error = failed(outcome(call(json!({})), json!("Fail")).await);
    let cause: Value = serde_json::from_str(&error.cause).unwrap();
    assert_eq!(
        (cause["errorMessage"].as_str(), cause["errorType"].as_str()),
        (Some("on purpose"), Some(&*error.error))
    );
    for (order, wanted) in
        [(json!("Exit"), "Runtime.ExitError"), (json!({ "Sleep": { "ms": 60_000 } }), "Sandbox.Timedout")]
    {
        assert_eq!(failed(outcome(call(json!({})), order).await).error, wanted);
    }
    let unknown = call(json!({ "Arguments": { "FunctionName": "nobody", "Payload": {} } }));
    assert_eq!(failed(outcome(unknown, json!({})).await).error, "Lambda.ResourceNotFoundException");
    let caught = json!({ "Catch": [{ "ErrorEquals": ["Runtime.ExitError"], "Next": "Caught" }] });
    let mut states = call(caught);
    states["Caught"] = json!({ "Type": "Succeed", "Output": "caught" });
    assert_eq!(outcome(states, json!("Exit")).await, Status::Succeeded(json!("caught")));

    // One that waits for its token: the function gets it, and what it answers is not the task's result.
    let waiting = json!({ "Wait": {
        "Type": "Task", "Resource": "arn:aws:states:::lambda:invoke.waitForTaskToken", "End": true,
        "Arguments": { "FunctionName": "obedient", "Payload": { "Echo": "{% $states.context.Task.Token %}" } },
        "TimeoutSeconds": "{% $states.input.seconds + 15 %}", "HeartbeatSeconds": "{% $min([40, $states.input.seconds]) %}",
    } });
    let (service, arn) = service(waiting).await;
    service.serve_functions(lambda.downgrade());
    let run = start(&service, &arn, "d1", "{\"seconds\":30}").await;
    while run.journal().len() < WAITING {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let submitted = run.journal().page(WAITING - 1..WAITING).remove(0);
    let output = submitted["taskSubmittedEventDetails"]["output"].as_str().unwrap();
    let token = serde_json::from_str::<Value>(output).unwrap()["Payload"].as_str().unwrap().to_owned();
    service.tokens().beat(&token).unwrap();
    service.tokens().fail(&token, "Tunnel.agent_busy", "c").unwrap();
    assert_eq!(failed(ended(&run).await), TaskError::new("Tunnel.agent_busy", "c"));
    assert_eq!(service.tokens().succeed(&token, "1"), Err(AnswerError::TaskTimedOut));
    lambda.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_takes_as_much_as_a_state_may_hold() {
    let (service, arn) = service(json!({ "Only": { "Type": "Succeed" } })).await;
    let input = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    let run = start(&service, &arn, "d1", &input(limits::STATE_BYTES)).await;
    assert!(matches!(ended(&run).await, Status::Succeeded(_)));
    let over = service.start("operator", &arn, Some("d2"), &input(limits::STATE_BYTES + 1)).await;
    assert!(matches!(over, Err(StartError::InputTooLarge(bytes)) if bytes == limits::STATE_BYTES + 1));
}

#[tokio::test(start_paused = true)]
async fn a_fast_clock_shortens_pauses_and_long_times_only() {
    for (state, seconds) in [
        (json!({ "Type": "Wait", "Seconds": 8 * 60 * 60, "End": true }), 8),
        (park(json!({ "TimeoutSeconds": 24 * 60 * 60 })), 24),
        (park(json!({ "TimeoutSeconds": 24 * 60 * 60, "HeartbeatSeconds": 60 * 60 })), 1),
        // What is done here takes the time that it takes.
        (park(json!({ "TimeoutSeconds": 300 })), 300),
        (park(json!({ "TimeoutSeconds": 3600, "HeartbeatSeconds": 300 })), 1),
        (
            park(json!({ "TimeoutSeconds": 10, "Retry": [
                { "ErrorEquals": ["States.Timeout"], "IntervalSeconds": 3600, "MaxAttempts": 1 }] })),
            21,
        ),
    ] {
        let (service, arn) = service_with(json!({ "Only": state }), Clock::new(3600), &[]).await;
        let began = Instant::now();
        let run = start(&service, &arn, "d1", "{}").await;
        ended(&run).await;
        assert_eq!(began.elapsed().as_secs(), seconds, "{state}");
    }
}

#[tokio::test]
async fn a_run_may_be_redriven_for_two_weeks() {
    let states = json!({ "Only": { "Type": "Fail", "Error": "E" } });
    // Two weeks are 12 ms.
    for (pause, is_late) in [(0, false), (100, true)] {
        let (service, arn) = service_with(states.clone(), Clock::new(100_000_000), &[]).await;
        let run = start(&service, &arn, "d1", "{}").await;
        ended(&run).await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let redriven = service.redrive(&run.execution().arn);
        if is_late {
            assert_eq!(redriven, Err(RunError::ExecutionNotRedrivable));
        } else if redriven.is_ok() {
            assert_eq!(run.standing().redrives, 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_oldest_of_more_than_ten_thousand_closed_runs_are_forgotten() {
    let (service, arn) = service(json!({ "Only": { "Type": "Fail", "Error": "E" } })).await;
    let name = |at: usize| format!("d{at}");
    let mut last = None;
    for at in 0..CLOSED + 2 {
        let run = start(&service, &arn, &name(at), "{}").await;
        while run.standing().status == Status::Running {
            tokio::task::yield_now().await;
        }
        if at == CLOSED - 1 {
            assert_eq!(service.executions(&arn).len(), CLOSED);
            // It is closed last of all from here on.
            let first = service.executions(&arn).pop().unwrap();
            service.redrive(&first.execution().arn).unwrap();
            while first.standing().status == Status::Running {
                tokio::task::yield_now().await;
            }
        }
        last = Some(run);
    }
    assert_eq!(service.executions(&arn).len(), CLOSED);
    let prefix = last.unwrap().execution().arn.rsplit_once(':').unwrap().0.to_owned();
    let is_there = |at: usize| service.execution(&format!("{prefix}:{}", name(at))).is_some();
    assert_eq!([1, 2, 3, CLOSED + 1].map(is_there), [false, false, true, true]);
    // A forgotten name is free, and a remembered one is not.
    start(&service, &arn, &name(1), "{}").await;
    let again = service.start("operator", &arn, Some(&name(3)), "{}").await;
    assert!(matches!(again, Err(StartError::ExecutionAlreadyExists(_))));
}
