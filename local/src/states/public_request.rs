//! The graph of `statemachines/public_request.asl.json`, walked with scripted answers: every state,
//! every way out of it, every catcher.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use proto::error::{ErrorCode, OUTCOME_ACCEPTED, OUTCOME_DISPATCHED, OUTCOME_REPLIED};
use serde_json::{Value, json};

use super::{
    definition::Definition,
    interpreter::{Call, Execution, Tasks, run},
    outcome::{Outcome, TaskError},
    trace::Traces,
};
use crate::clock;

const SOURCE: &str = include_str!("../../../statemachines/public_request.asl.json");

fn definition() -> Definition {
    let substitutions = ["ConnectionsTable", "AgentApiEndpoint", "AgentApiStage"]
        .map(|name| (name.to_owned(), name.to_lowercase()));
    Definition::parse(SOURCE, &BTreeMap::from(substitutions)).unwrap()
}

/// What a task answers, by its state's name and how often it was called before.
type Answers<'a> = dyn Fn(&str, usize) -> Result<Value, TaskError> + Sync + 'a;

struct Script<'a> {
    answers: &'a Answers<'a>,
    calls: Mutex<Vec<(String, Value)>>,
}

impl Tasks for Script<'_> {
    async fn call(&self, call: Call<'_>) -> Result<Value, TaskError> {
        let before = {
            let mut calls = self.calls.lock().unwrap();
            let before = calls.iter().filter(|(state, _)| state == call.state).count();
            calls.push((call.state.to_owned(), serde_json::to_value(&call.arguments).unwrap()));
            before
        };
        (self.answers)(call.state, before)
    }
}

/// What a run did.
struct Walk {
    outcome: Outcome,
    states: Vec<String>,
    calls: Vec<(String, Value)>,
}

impl Walk {
    fn output(&self) -> &Value {
        match &self.outcome {
            Outcome::Succeeded(output) => output,
            other => panic!("{other:?} after {:?}", self.states),
        }
    }

    fn arguments(&self, state: &str) -> Vec<&Value> {
        self.calls.iter().filter(|(name, _)| name == state).map(|(_, arguments)| arguments).collect()
    }
}

async fn walk(input: Value, answers: &Answers<'_>) -> Walk {
    let definition = definition();
    let script = Script { answers, calls: Mutex::default() };
    let execution = Execution {
        machine_arn: "arn".into(),
        machine_name: "public_request".into(),
        arn: "arn:run".into(),
        name: "run".into(),
        started_ms: 0,
    };
    let traces = Traces::default();
    let trace = traces.begin("run".into());
    let outcome = run(&definition, &execution, input, &script, &trace).await;
    let states = trace.snapshot().states.iter().map(|span| span.state.to_string()).collect();
    Walk { outcome, states, calls: script.calls.into_inner().unwrap() }
}

fn input() -> Value {
    json!({
        "request_id": "r1", "tunnel": "web", "deadline_ms": clock::epoch_ms() + 60_000,
        "mailbox": "http://queue", "pick": 0.0, "message": { "type": "request", "z": 1, "a": 2 },
    })
}

fn rows(connections: &[&str]) -> Value {
    let items: Vec<Value> = connections.iter().map(|id| json!({ "connection_id": { "S": id } })).collect();
    json!({ "Count": items.len(), "Items": items, "ScannedCount": items.len() })
}

fn message(attribute: &str, value: &str) -> Value {
    json!({ "Messages": [{
        "Body": "{\"type\":\"reply\"}", "ReceiptHandle": "receipt", "MessageId": "m",
        "Attributes": { "SentTimestamp": "1790000000123" },
        "MessageAttributes": { attribute: { "DataType": "String", "StringValue": value } },
    }] })
}

/// A reply to the request over `connection`.
fn reply_over(connection: &str) -> Value {
    let mut message = message("request_id", "r1");
    message["Messages"][0]["MessageAttributes"]["connection_id"] =
        json!({ "DataType": "String", "StringValue": connection });
    message
}

fn error(name: &str) -> TaskError {
    TaskError::new(name.to_owned(), "words")
}

fn dispatched() -> Value {
    json!({ "StatusCode": 200, "ResponseBody": "" })
}

/// The answers of a run in which everything goes well.
fn well(state: &str, _before: usize) -> Result<Value, TaskError> {
    match state {
        "LookUpConnections" => Ok(rows(&["#name", "a="])),
        "AwaitReply" => Ok(message("request_id", "r1")),
        _ => Ok(dispatched()),
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_without_a_mailbox_ends_once_the_request_is_dispatched() {
    let mut input = input();
    input["mailbox"] = json!("");
    let walk = walk(input, &well).await;
    assert_eq!(
        walk.output(),
        &json!({ "outcome": OUTCOME_DISPATCHED, "connection_id": "a=", "reply": null, "receipt": null, "sent_ms": null, "policy": [] })
    );
    assert_eq!(
        walk.states,
        ["LookUpConnections", "ChooseConnection", "DispatchRequest", "ChooseWait", "Dispatched"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_reply_ends_the_run() {
    let walk = walk(input(), &well).await;
    assert_eq!(
        walk.output(),
        &json!({ "outcome": OUTCOME_REPLIED, "connection_id": "a=", "reply": "{\"type\":\"reply\"}", "receipt": "receipt", "sent_ms": ["1790000000123"] })
    );
    assert_eq!(
        walk.states,
        [
            "LookUpConnections",
            "ChooseConnection",
            "DispatchRequest",
            "ChooseWait",
            "AwaitReply",
            "InspectMessage",
            "Replied"
        ]
    );
    let look_up = walk.arguments("LookUpConnections")[0];
    assert_eq!(look_up["TableName"], "connectionstable");
    assert_eq!(look_up["ConsistentRead"], true);
    assert_eq!(look_up["ExpressionAttributeValues"][":tunnel"], json!({ "S": "web" }));
    let now: u64 = look_up["ExpressionAttributeValues"][":now"]["N"].as_str().unwrap().parse().unwrap();
    assert!(now.abs_diff(clock::epoch_ms() / 1000) < 5);
    let dispatch = walk.arguments("DispatchRequest")[0];
    assert_eq!(dispatch["Path"], "/@connections/a=");
    // The message goes out as it came in, in the same order.
    assert_eq!(dispatch["RequestBody"].to_string(), r#"{"type":"request","z":1,"a":2}"#);
    let receive = walk.arguments("AwaitReply")[0];
    assert_eq!(receive["WaitTimeSeconds"], 20);
    assert_eq!(receive["VisibilityTimeout"], 30);
    assert_eq!(receive["AttributeNames"], json!(["SentTimestamp"]));
}

#[tokio::test(start_paused = true)]
async fn a_reply_without_its_time_is_a_reply() {
    let walk = walk(input(), &|state, before| {
        let mut answer = well(state, before)?;
        if state == "AwaitReply" {
            answer["Messages"][0].as_object_mut().unwrap().remove("Attributes");
        }
        Ok(answer)
    })
    .await;
    assert_eq!((&walk.output()["outcome"], &walk.output()["sent_ms"]), (&OUTCOME_REPLIED.into(), &json!([])));
}

/// A run's input for a request with this method.
fn sent(method: &str) -> Value {
    let mut input = input();
    input["method"] = json!(method);
    input
}

/// The rows of a tunnel with an agent that always keeps requests with these methods.
fn keeping(methods: &[&str]) -> Value {
    let mut rows = rows(&["#name", "a="]);
    rows["Items"][0]["delivery"] = json!({ "S": "{}" });
    if !methods.is_empty() {
        rows["Items"][0]["durable"] = json!({ "SS": methods });
    }
    rows
}

#[tokio::test(start_paused = true)]
async fn what_is_always_kept_reaches_no_agent_and_all_else_does() {
    for (methods, method, is_kept) in [
        (&["DELETE", "POST"][..], "POST", true),
        (&["POST"], "POST", true),
        (&["POST"], "GET", false),
        (&["POST"], "", false),
        (&[], "POST", false),
    ] {
        let walk = walk(sent(method), &|state, before| match state {
            "LookUpConnections" => Ok(keeping(methods)),
            _ => well(state, before),
        })
        .await;
        let outcome = if is_kept { OUTCOME_ACCEPTED } else { OUTCOME_REPLIED };
        assert_eq!(walk.output()["outcome"], outcome, "{methods:?} {method}");
        if is_kept {
            assert_eq!(walk.states, ["LookUpConnections", "ChooseConnection", "Accepted"]);
            assert_eq!(walk.output()["policy"], json!(["{}"]));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_name_row_tells_offline_from_unknown() {
    for (found, wanted) in
        [(rows(&[]), ErrorCode::NoSuchTunnel), (rows(&["#name"]), ErrorCode::TunnelOffline)]
    {
        let walk = walk(input(), &|_, _| Ok(found.clone())).await;
        let mut expected = json!({ "outcome": wanted.outcome(), "connection_id": null, "reply": null, "receipt": null, "sent_ms": null });
        if wanted == ErrorCode::TunnelOffline {
            expected["policy"] = json!([]);
        }
        assert_eq!(walk.output(), &expected);
    }
    // A connection whose name row is gone is as good as any.
    let walk = walk(input(), &|state, before| match state {
        "LookUpConnections" => Ok(rows(&["a="])),
        _ => well(state, before),
    })
    .await;
    assert_eq!(walk.output()["outcome"], OUTCOME_REPLIED);
}

#[tokio::test(start_paused = true)]
async fn several_connections_share_the_load_and_stand_in_for_each_other() {
    let four = |state: &str, before| match state {
        "LookUpConnections" => Ok(rows(&["#name", "a=", "b=", "c=", "d="])),
        _ => well(state, before),
    };
    for (pick, wanted) in [(0.0, "a="), (0.25, "b="), (0.74, "c="), (0.999_999_999, "d=")] {
        let mut input = input();
        input["pick"] = pick.into();
        assert_eq!(walk(input, &four).await.output()["connection_id"], wanted, "{pick}");
    }
    let gone = |times: usize| {
        move |state: &str, before: usize| match state {
            "DispatchRequest" if before < times => Err(error("ApiGateway.410")),
            _ => four(state, before),
        }
    };
    let mut late = input();
    late["pick"] = 0.5.into();
    let walk_two = walk(late.clone(), &gone(2)).await;
    assert_eq!(walk_two.output()["connection_id"], "a=");
    let forgotten: Vec<&Value> = walk_two
        .arguments("ForgetConnection")
        .iter()
        .map(|arguments| &arguments["Key"]["connection_id"]["S"])
        .collect();
    assert_eq!(forgotten, ["c=", "d="]);
    // The fourth is not tried.
    let walk_all = walk(late, &gone(9)).await;
    assert_eq!(walk_all.output()["outcome"], ErrorCode::TunnelOffline.outcome());
    assert_eq!(walk_all.arguments("DispatchRequest").len(), 3);
}

#[tokio::test(start_paused = true)]
async fn nothing_that_may_have_arrived_is_posted_twice() {
    for name in ["ApiGateway.500", "ApiGateway.413", "ApiGateway.403", "States.Timeout", "ApiGateway.504"] {
        let walk = walk(input(), &|state, before| match state {
            "DispatchRequest" => Err(error(name)),
            _ => well(state, before),
        })
        .await;
        assert_eq!(walk.arguments("DispatchRequest").len(), 1, "{name}");
        let Outcome::Failed(failure) = &walk.outcome else { panic!("{name}: {:?}", walk.outcome) };
        assert_eq!((&*failure.error, &*failure.cause), ("EdgeFailed", name));
        assert_eq!(failure.error, ErrorCode::EdgeFailed.outcome());
    }
    let walk = walk(input(), &|state, before| match state {
        "DispatchRequest" if before < 3 => Err(error("ApiGateway.429")),
        _ => well(state, before),
    })
    .await;
    assert_eq!(walk.output()["outcome"], OUTCOME_REPLIED);
    assert_eq!(walk.arguments("DispatchRequest").len(), 4);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_for_this_request_is_discarded() {
    let stale = [
        message("request_id", "r0"),
        message("lost_connection", "other="),
        // Whoever learns a token still has another connection.
        reply_over("other="),
        json!({ "Messages": [{ "Body": "x", "ReceiptHandle": "receipt" }] }),
    ];
    let walk = walk(input(), &|state, before| match state {
        "AwaitReply" if before < 4 => Ok(stale[before].clone()),
        "AwaitReply" => Ok(reply_over("a=")),
        _ => well(state, before),
    })
    .await;
    assert_eq!(walk.output()["outcome"], OUTCOME_REPLIED);
    assert_eq!(
        walk.arguments("DiscardStale"),
        [&json!({ "QueueUrl": "http://queue", "ReceiptHandle": "receipt" }); 4]
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_ends_the_wait() {
    let told = walk(input(), &|state, before| match state {
        "AwaitReply" => Ok(message("lost_connection", "a=")),
        _ => well(state, before),
    })
    .await;
    assert_eq!(
        told.output(),
        &json!({ "outcome": ErrorCode::AgentLost.outcome(), "connection_id": "a=", "reply": null, "receipt": "receipt", "sent_ms": null, "policy": [] })
    );
    let asked = walk(input(), &|state, before| match state {
        "AwaitReply" => Ok(json!({})),
        "CheckConnection" if before == 1 => Err(error("ApiGateway.410")),
        _ => well(state, before),
    })
    .await;
    assert_eq!(
        asked.output(),
        &json!({ "outcome": ErrorCode::AgentLost.outcome(), "connection_id": "a=", "reply": null, "receipt": null, "sent_ms": null, "policy": [] })
    );
    assert_eq!(asked.arguments("CheckConnection")[1]["Method"], "GET");
    assert_eq!(asked.arguments("AwaitReply").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_the_wait() {
    for empty in [json!({}), json!({ "Messages": [] })] {
        let mut late = input();
        late["deadline_ms"] = (clock::epoch_ms() - 1).into();
        let walk = walk(late, &|state, before| match state {
            "AwaitReply" => Ok(empty.clone()),
            _ => well(state, before),
        })
        .await;
        assert_eq!(
            walk.output(),
            &json!({ "outcome": ErrorCode::UpstreamTimedOut.outcome(), "connection_id": "a=", "reply": null, "receipt": null, "sent_ms": null })
        );
        assert_eq!(walk.arguments("AwaitReply")[0]["WaitTimeSeconds"], 1);
    }
    let mut soon = input();
    soon["deadline_ms"] = (clock::epoch_ms() + 7_900).into();
    let walk = walk(soon, &well).await;
    assert_eq!(walk.arguments("AwaitReply")[0]["WaitTimeSeconds"], 7);
}

/// The answers that lead to a state.
fn towards(target: &str, state: &str, before: usize) -> Result<Value, TaskError> {
    match (target, state) {
        ("ForgetConnection", "DispatchRequest") if before == 0 => Err(error("ApiGateway.410")),
        ("ForgetConnection", "LookUpConnections") => Ok(rows(&["#name", "a=", "b="])),
        ("DiscardStale", "AwaitReply") if before == 0 => Ok(message("request_id", "r0")),
        ("CheckConnection", "AwaitReply") if before == 0 => Ok(json!({})),
        _ => well(state, before),
    }
}

#[tokio::test(start_paused = true)]
async fn every_catcher_leads_where_it_says() {
    let machine: Value = serde_json::from_str(SOURCE).unwrap();
    let mut checked = 0;
    for (name, state) in machine["States"].as_object().unwrap() {
        let catchers = state["Catch"].as_array().cloned().unwrap_or_default();
        let named: BTreeSet<&str> = catchers
            .iter()
            .flat_map(|catcher| catcher["ErrorEquals"].as_array().unwrap())
            .map(|name| name.as_str().unwrap())
            .collect();
        if state["Type"] == "Task" {
            assert!(named.contains("States.ALL"), "{name} leaves errors to the machine");
        }
        for catcher in &catchers {
            for wanted in catcher["ErrorEquals"].as_array().unwrap() {
                let thrown = match wanted.as_str().unwrap() {
                    "States.ALL" => vec!["Some.Other", "States.Timeout", "States.TaskFailed"],
                    one => vec![one],
                };
                for thrown in thrown {
                    let walk = walk(input(), &|state, before| {
                        if state == name { Err(error(thrown)) } else { towards(name, state, before) }
                    })
                    .await;
                    let at = walk.states.iter().position(|state| state == name).unwrap();
                    assert_eq!(walk.states[at + 1], catcher["Next"].as_str().unwrap(), "{name}: {thrown}");
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 20, "{checked}");
}

#[tokio::test(start_paused = true)]
async fn every_state_is_reached_and_every_outcome_is_known() {
    let mut reached = BTreeSet::new();
    let mut outcomes = BTreeSet::new();
    for target in ["ForgetConnection", "DiscardStale", "CheckConnection"] {
        reached.extend(walk(input(), &|state, before| towards(target, state, before)).await.states);
    }
    for (state, thrown) in [
        ("LookUpConnections", "DynamoDb.ThrottlingException"),
        ("LookUpConnections", "DynamoDb.ResourceNotFoundException"),
        ("AwaitReply", "Sqs.RequestThrottledException"),
        ("CheckConnection", "ApiGateway.410"),
    ] {
        let walk = walk(input(), &|name, before| {
            if name == state { Err(error(thrown)) } else { towards(state, name, before) }
        })
        .await;
        reached.extend(walk.states.iter().cloned());
    }
    for found in [rows(&[]), rows(&["#name"])] {
        reached.extend(walk(input(), &|_, _| Ok(found.clone())).await.states);
    }
    let mut unawaited = input();
    unawaited["mailbox"] = json!("");
    reached.extend(walk(unawaited, &well).await.states);
    reached.extend(walk(sent("POST"), &|_, _| Ok(keeping(&["POST"]))).await.states);
    let definition = definition();
    assert_eq!(reached, definition.state_names().map(str::to_owned).collect());

    let machine: Value = serde_json::from_str(SOURCE).unwrap();
    for (name, state) in machine["States"].as_object().unwrap() {
        assert!(state["Comment"].is_string(), "{name} has no comment");
        if state["Type"] == "Succeed" {
            let output = state["Output"].as_object().unwrap();
            let mut expected = vec!["outcome", "connection_id", "reply", "receipt", "sent_ms"];
            if ["Accepted", "Dispatched", "TunnelOffline", "AgentLost"].contains(&name.as_str()) {
                expected.push("policy");
            }
            assert_eq!(output.keys().collect::<Vec<_>>(), expected, "{name}");
            outcomes.insert(output["outcome"].as_str().unwrap().to_owned());
            assert_eq!(output["outcome"], name.as_str());
        }
    }
    for outcome in &outcomes {
        let is_known = [OUTCOME_ACCEPTED, OUTCOME_REPLIED, OUTCOME_DISPATCHED].contains(&outcome.as_str())
            || ErrorCode::from_outcome(outcome).is_some();
        assert!(is_known, "{outcome}");
    }
    assert_eq!(machine["States"]["EdgeFailed"]["Error"], ErrorCode::EdgeFailed.outcome());
}

#[tokio::test(start_paused = true)]
async fn faults_of_the_input_are_faults_of_the_edge() {
    for field in ["tunnel", "mailbox", "deadline_ms", "message", "pick"] {
        let mut input = input();
        input.as_object_mut().unwrap().shift_remove(field);
        assert!(!matches!(walk(input, &well).await.outcome, Outcome::Succeeded(_)), "{field}");
    }
}

#[test]
fn the_machine_outlives_the_longest_wait() {
    let machine: Value = serde_json::from_str(SOURCE).unwrap();
    let timeout = machine["TimeoutSeconds"].as_u64().unwrap();
    assert!(timeout < proto::limits::RUN_DURATION.as_secs());
    let before_the_wait = 20;
    assert!(proto::limits::REPLY_TIMEOUT_MAX.as_secs() + before_the_wait <= timeout);
    let await_reply = &machine["States"]["AwaitReply"];
    assert!(await_reply["TimeoutSeconds"].as_u64().unwrap() > proto::limits::MAILBOX_WAIT.as_secs());
    assert_eq!(
        await_reply["Arguments"]["VisibilityTimeout"].as_u64(),
        Some(proto::limits::MAILBOX_VISIBILITY.as_secs())
    );
}
