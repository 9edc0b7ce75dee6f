//! STANDARD runs, from their start to their end: names, tokens, times, history, stopping and redriving.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use proto::limits;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    StartError, States,
    definition::{Definition, MachineType},
    executions::{RunError, StandardRun, Status},
    interpreter::TaskError,
    journal::EVENTS,
    tokens::AnswerError,
};
use crate::{chaos::ChaosConfig, dynamodb::Table, latency::Latency, services::Services};

const TABLE: Table<'_> = Table { name: "parked", partition_key: "tunnel", sort_key: None, expiry: None };

/// A service with one table and one machine of these states.
async fn service(states: Value) -> (States, Arc<str>) {
    let chaos = Arc::new(crate::chaos::Chaos::new(ChaosConfig::default()));
    let services = Services::new("http://localhost", chaos, Latency::default());
    services.dynamodb.create_table(TABLE).await.unwrap();
    let start = states.as_object().unwrap().keys().next().unwrap().clone();
    let machine = json!({ "QueryLanguage": "JSONata", "StartAt": start, "States": states }).to_string();
    let definition = Definition::parse_as(MachineType::Standard, &machine, &BTreeMap::new()).unwrap();
    let service = States::new(Arc::new(services));
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
            Status::Running => tokio::time::sleep(Duration::from_millis(1)).await,
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
