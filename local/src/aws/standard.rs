//! The operations of Step Functions on STANDARD runs: enters a call of an SDK, leaves its answer.

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Answer, unknown_operation};
use crate::{
    clock,
    states::{
        States,
        executions::StandardRun,
        outcome::{Status, TaskError},
        tokens::AnswerError,
    },
};

/// How many entries a page has unless asked for more, and at most
/// (Step Functions API Reference, "GetExecutionHistory" and "ListExecutions").
const PAGE: (usize, usize) = (100, 1000);

/// The operations that are counted as they come.
const COUNTED: &[&str] = &[
    "DescribeExecution",
    "GetExecutionHistory",
    "ListExecutions",
    "RedriveExecution",
    "SendTaskFailure",
    "SendTaskHeartbeat",
    "SendTaskSuccess",
    "StopExecution",
];

/// The fields of all operations; each takes its own.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Fields {
    state_machine_arn: String,
    execution_arn: String,
    name: Option<String>,
    input: Option<String>,
    task_token: String,
    output: String,
    error: Option<String>,
    cause: Option<String>,
    max_results: usize,
    next_token: Option<String>,
    reverse_order: bool,
    status_filter: Option<String>,
}

/// Carries out one operation for a caller who may.
pub(super) async fn answer(states: &States, caller: &str, operation: &str, body: &[u8]) -> Answer {
    let Ok(call) = serde_json::from_slice::<Fields>(body) else {
        return refused("ValidationException", "the request is not valid");
    };
    // A start counts itself, wherever it comes from.
    if COUNTED.contains(&operation) {
        states.count(caller, operation);
    }
    match operation {
        "StartExecution" => {
            let input = call.input.as_deref().unwrap_or("{}");
            match states.start(caller, &call.state_machine_arn, call.name.as_deref(), input).await {
                Ok(run) => done(json!({
                    "executionArn": &*run.execution().arn, "startDate": run.standing().started,
                })),
                Err(error) => refused(error.name(), &error.to_string()),
            }
        }
        "SendTaskSuccess" => taken(states.tokens().succeed(&call.task_token, &call.output)),
        "SendTaskFailure" => {
            let (error, cause) = (call.error.unwrap_or_default(), call.cause.unwrap_or_default());
            taken(states.tokens().fail(&call.task_token, &error, &cause))
        }
        "SendTaskHeartbeat" => taken(states.tokens().beat(&call.task_token)),
        "StopExecution" => {
            let reason = TaskError::new(call.error.unwrap_or_default(), call.cause.unwrap_or_default());
            match states.stop(&call.execution_arn, reason).await {
                Ok(at) => done(json!({ "stopDate": at })),
                Err(error) => refused(error.name(), &error.to_string()),
            }
        }
        "RedriveExecution" => match states.redrive(&call.execution_arn) {
            Ok(()) => done(json!({ "redriveDate": clock::epoch_seconds() })),
            Err(error) => refused(error.name(), &error.to_string()),
        },
        "DescribeExecution" => match states.execution(&call.execution_arn) {
            Some(run) => done(describe(&run)),
            None => no_run(),
        },
        "GetExecutionHistory" => match states.execution(&call.execution_arn) {
            Some(run) => history(&run, &call),
            None => no_run(),
        },
        "ListExecutions" => list(states, &call),
        _ => unknown_operation(),
    }
}

fn describe(run: &StandardRun) -> Value {
    let mut fields = summary(run);
    fields.insert("input".into(), run.input().into());
    match run.standing().status {
        Status::Running => {}
        Status::Succeeded(output) => drop(fields.insert("output".into(), output.to_string().into())),
        Status::Failed(error) | Status::TimedOut(error) | Status::Aborted(error) => {
            fields.insert("error".into(), error.error.into_owned().into());
            fields.insert("cause".into(), error.cause.into());
        }
    }
    Value::Object(fields)
}

fn summary(run: &StandardRun) -> Map<String, Value> {
    let (execution, standing) = (run.execution(), run.standing());
    let mut fields = Map::with_capacity(9);
    fields.insert("executionArn".into(), (&*execution.arn).into());
    fields.insert("stateMachineArn".into(), (&*execution.machine_arn).into());
    fields.insert("name".into(), (&*execution.name).into());
    fields.insert("status".into(), standing.status.name().into());
    fields.insert("startDate".into(), standing.started.into());
    if let Some(stopped) = standing.stopped {
        fields.insert("stopDate".into(), stopped.into());
    }
    fields.insert("redriveCount".into(), standing.redrives.into());
    fields
}

/// The positions of one page of `count` entries, and where the next one begins.
fn page(call: &Fields, count: usize) -> Option<(std::ops::Range<usize>, Option<String>)> {
    let start = call.next_token.as_deref().map_or(Ok(0), str::parse).ok()?;
    let size = if call.max_results == 0 { PAGE.0 } else { call.max_results.min(PAGE.1) };
    let end = count.min(start + size);
    Some((start.min(end)..end, (end < count).then(|| end.to_string())))
}

fn history(run: &StandardRun, call: &Fields) -> Answer {
    let count = run.journal().len();
    let Some((positions, next)) = page(call, count) else { return invalid_token() };
    let events = if call.reverse_order {
        run.journal().page(positions.map(|at| count - 1 - at))
    } else {
        run.journal().page(positions)
    };
    done(json!({ "events": events, "nextToken": next }))
}

fn list(states: &States, call: &Fields) -> Answer {
    let mut runs = states.executions(&call.state_machine_arn);
    if let Some(wanted) = &call.status_filter {
        runs.retain(|run| run.standing().status.name() == wanted);
    }
    let Some((positions, next)) = page(call, runs.len()) else { return invalid_token() };
    let executions: Vec<_> = runs[positions].iter().map(|run| Value::Object(summary(run))).collect();
    done(json!({ "executions": executions, "nextToken": next }))
}

fn done(body: Value) -> Answer {
    Answer::json(body.to_string())
}

fn taken(answer: Result<(), AnswerError>) -> Answer {
    match answer {
        Ok(()) => done(json!({})),
        Err(error) => refused(error.name(), &error.to_string()),
    }
}

fn refused(name: &str, message: &str) -> Answer {
    Answer::error(StatusCode::BAD_REQUEST, name, message)
}

fn no_run() -> Answer {
    refused("ExecutionDoesNotExist", "Execution Does Not Exist")
}

fn invalid_token() -> Answer {
    refused("InvalidToken", "Invalid Token: 'the next token is not one of these'")
}
