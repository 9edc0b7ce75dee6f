//! The stack against the code: `serverless.yml` and `resources/` say the same as the functions, the state
//! machine and the limits. What only the packaged stack shows is looked at where `TUNNEL_TEMPLATES` names a
//! folder of templates, as `resources/check` makes them.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use edge::{
    config::{Env, env},
    metrics::{Metric, OUTCOME},
};
use local::{
    stack::{Permission, Resource, Rows, stack},
    states::definition::{Definition, MachineType},
};
use proto::limits;
use serde_json::Value;

const MACHINE: &str = include_str!("../statemachines/public_request.asl.json");
const DELIVERY: &str = include_str!("../statemachines/delivery.asl.json");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// The names in a folder.
fn names(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_folder_of_functions_is_deployed_and_nothing_else() {
    let deployed: Vec<_> = stack().functions.keys().cloned().collect();
    assert_eq!(names("functions"), deployed);
}

/// A value that a variable could have.
fn value(name: &str) -> String {
    match name {
        env::TOKEN_KEYS => STANDARD.encode([1; 48]),
        env::AGENT_ENDPOINT => "https://example.com/dev".into(),
        env::FRONT_ONLY | env::WEBSOCKETS | env::RELAY_FRONT => "true".into(),
        env::RELAY_TASKS => "4".into(),
        env::REPLY_TIMEOUT_SECS | env::STREAM_IDLE_SECS => "60".into(),
        env::ACCEPT_ENCODING => "identity".into(),
        authorizer::config::ENV_JWKS_FILE => {
            root().join("functions/authorizer/tests/fixtures/agentd-ed.jwks.json").to_str().unwrap().into()
        }
        authorizer::config::ENV_JWKS_URL => String::new(),
        authorizer::config::ENV_REVOKED => r#"{"token_ids": ["t1"], "owners": ["alice"]}"#.into(),
        env::MAILBOXES_KEPT => limits::MAILBOXES_KEPT.to_string(),
        env::LIMITS => "tunnel_requests=50".into(),
        env::EDGE_REQUESTS => "6".into(),
        env::UNKNOWN_LENGTH => "hold".into(),
        _ => "x".into(),
    }
}

/// Reads a function's configuration from its deployed variables; returns what it asked for.
fn asked(function: &str) -> BTreeSet<String> {
    let deployed = match stack().functions.get(function) {
        Some(function) => &function.variables,
        None => &stack().relay.variables,
    };
    let asked = RefCell::new(BTreeSet::new());
    let lookup = |name: &str| {
        asked.borrow_mut().insert(name.to_owned());
        if name == "AWS_REGION" {
            return Some("eu-central-1".to_owned());
        }
        deployed.contains(name).then(|| value(name))
    };
    let env = Env::new(&lookup);
    let read = match function {
        "authorizer" => {
            authorizer::config::Config::from_env(&env).map(drop).map_err(|error| error.to_string())
        }
        "connect" => connect::Connect::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "deliver" => deliver::Deliver::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "deliveries" => deliveries::Deliveries::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "disconnect" => disconnect::Disconnect::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "ingress" => ingress::Ingress::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "response" => response::Response::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "revoke" => revoke::Revoke::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "relay" => exchange::Services::from_env(&env).map(drop).map_err(|error| error.to_string()),
        "sweep" => sweep::Sweep::from_env(&env).map(drop).map_err(|error| error.to_string()),
        other => Err(format!("{other} is not known to this test")),
    };
    assert_eq!(read, Ok(()), "{function} with the variables of its deployment");
    asked.into_inner()
}

#[test]
fn a_function_is_deployed_with_the_variables_that_it_reads() {
    for (name, function) in &stack().functions {
        let mut read = asked(name);
        // Read by `edge::telemetry`, for every function.
        read.insert(env::METRICS_NAMESPACE.to_owned());
        let surplus: Vec<_> = function.variables.difference(&read).collect();
        assert!(surplus.is_empty(), "{name} does not read {surplus:?}");
        assert!(function.variables.contains(env::METRICS_NAMESPACE), "{name} writes no metrics");
    }
}

#[test]
fn authorizer_is_told_all_that_it_asks_for() {
    use authorizer::config::{ENV_HS256_SECRET, ENV_JWKS};
    let asked = asked("authorizer");
    let missing = asked.difference(&stack().functions["authorizer"].variables);
    // The stack hands keys over as a file or an address, and Lambda says where the file is.
    let otherwise = [ENV_JWKS, ENV_HS256_SECRET, "LAMBDA_TASK_ROOT"];
    let missing: Vec<_> = missing.filter(|name| !otherwise.contains(&name.as_str())).collect();
    assert!(missing.is_empty(), "no deployment can set {missing:?}");
}

/// What no stack sets, and the words of the page that names it which say so.
const NOT_DEPLOYED: [(&str, &str); 4] = [
    (authorizer::config::ENV_HS256_SECRET, "The stack has no parameter for it"),
    (env::RELAY_LISTEN, "no parameter changes them"),
    (env::RELAY_CONNECTIONS, "no parameter changes them"),
    (env::RELAY_MESSAGE_BYTES, "no parameter changes them"),
];

#[test]
fn a_variable_that_a_page_names_is_one_of_the_stack() {
    let functions = stack().functions.values().map(|function| &function.variables);
    let deployed: BTreeSet<_> = functions.chain([&stack().relay.variables]).flatten().collect();
    let pages = names("docs").into_iter().map(|name| format!("docs/{name}"));
    let pages = pages.chain(["README.md", "ARCHITECTURE.md", "SECURITY.md"].map(str::to_owned));
    let mut found = 0;
    for page in pages.filter(|page| page.ends_with(".md")) {
        let text = read(&page);
        for (at, _) in text.match_indices("TUNNEL_") {
            let is_part = |c: &char| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == '_';
            let name: String = text[at..].chars().take_while(is_part).collect();
            let is_said = NOT_DEPLOYED.iter().any(|(other, words)| *other == name && text.contains(words));
            assert!(is_said || deployed.contains(&name), "{page} names {name}, which no deployment sets");
            found += 1;
        }
    }
    assert!(found > 20, "{found}");
}

/// What a parameter is by default is what the code takes where nothing is said.
#[test]
fn as_many_mailboxes_are_kept_as_limits_says() {
    let declared = format!("mailboxesKept: '{}'\n", limits::MAILBOXES_KEPT);
    assert!(read("serverless.yml").contains(&declared), "{declared}");
}

#[test]
fn relay_is_deployed_with_the_variables_that_it_and_its_start_read() {
    let mut read = asked("relay");
    // Read by `relay` itself, once it runs.
    read.extend([env::METRICS_NAMESPACE, env::RELAY_DRAIN_SECS, env::RELAY_BUFFER_BYTES].map(str::to_owned));
    let text = self::read("resources/relay.yml");
    let (_, script) = text.split_once("Command:").unwrap();
    let (script, _) = script.split_once("PortMappings").unwrap();
    for variable in &stack().relay.variables {
        let is_known = read.contains(variable)
            || script.contains(&format!("${variable}"))
            // For the AWS command line, and for CloudFormation.
            || ["HOME", "AWS_REGION", "GENERATIONS"].contains(&variable.as_str());
        assert!(is_known, "nothing reads {variable}");
    }
    // What `ingress` is told, relay is told.
    let missing = stack().functions["ingress"].variables.difference(&stack().relay.variables);
    // What Lambda alone makes necessary: executions are few there, bodies are unpacked, a break is not seen, and a stream
    // holds its function.
    let of_lambda = [env::EDGE_REQUESTS, env::ACCEPT_ENCODING, env::STREAM_IDLE_SECS, env::UNKNOWN_LENGTH];
    let missing: Vec<_> = missing.filter(|name| !of_lambda.contains(&name.as_str())).collect();
    assert!(missing.is_empty(), "relay is not told {missing:?}");
}

/// A function of `edge`: which other ones and which actions of AWS stand in it.
struct Code {
    module: String,
    is_public: bool,
    body: String,
}

/// Operations of the SDKs, as a call begins one.
const OPERATIONS: &[(&str, &str)] = &[
    ("get_item", "dynamodb:GetItem"),
    ("put_item", "dynamodb:PutItem"),
    ("update_item", "dynamodb:UpdateItem"),
    ("delete_item", "dynamodb:DeleteItem"),
    ("query", "dynamodb:Query"),
    ("scan", "dynamodb:Scan"),
    ("send_message", "sqs:SendMessage"),
    ("send_message_batch", "sqs:SendMessage"),
    ("receive_message", "sqs:ReceiveMessage"),
    ("delete_message", "sqs:DeleteMessage"),
    ("delete_message_batch", "sqs:DeleteMessage"),
    ("create_queue", "sqs:CreateQueue"),
    ("delete_queue", "sqs:DeleteQueue"),
    ("list_queues", "sqs:ListQueues"),
    ("get_queue_attributes", "sqs:GetQueueAttributes"),
    ("start_execution", "states:StartExecution"),
    ("describe_execution", "states:DescribeExecution"),
    ("stop_execution", "states:StopExecution"),
    ("list_executions", "states:ListExecutions"),
    ("send_task_success", "states:SendTaskSuccess"),
    ("send_task_failure", "states:SendTaskFailure"),
    ("send_task_heartbeat", "states:SendTaskHeartbeat"),
    ("start_sync_execution", "states:StartSyncExecution"),
    ("post_to_connection", "POST"),
    ("get_connection", "GET"),
    ("delete_connection", "DELETE"),
    ("register_scalable_target", "application-autoscaling:RegisterScalableTarget"),
];

/// The text without its tests and its comments.
fn shipped(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Every `name(` in `text` that is a call, with whether it is called on `self`.
fn calls(text: &str) -> BTreeSet<(bool, String)> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices('(') {
        let name: String = text[..at]
            .chars()
            .rev()
            .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_')
            .collect();
        let before = &text[..at - name.len()];
        if !name.is_empty() && !before.ends_with("fn ") {
            found.insert((before.ends_with("self."), name.chars().rev().collect()));
        }
    }
    found
}

/// The functions of `edge`, by name.
fn code_of_edge() -> BTreeMap<String, Vec<Code>> {
    let mut code: BTreeMap<String, Vec<Code>> = BTreeMap::new();
    let own = |folder: &str, within: &str| -> Vec<String> {
        names(folder).into_iter().map(|name| format!("{within}{name}")).collect()
    };
    let mut files = own("edge/src", "");
    // A module's own files count as the module.
    for folder in files.clone().iter().filter(|name| !name.ends_with(".rs")) {
        files.extend(own(&format!("edge/src/{folder}"), &format!("{folder}/")));
    }
    for file in files.into_iter().filter(|name| name.ends_with(".rs")) {
        let text = shipped(&read(&format!("edge/src/{file}")));
        let mut starts: Vec<_> = text.match_indices("fn ").map(|(at, _)| at).collect();
        starts.push(text.len());
        for pair in starts.windows(2) {
            let body = &text[pair[0] + 3..pair[1]];
            let name: String = body.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            let line = text[..pair[0]].rsplit('\n').next().unwrap_or_default();
            let is_public = line.trim_start().starts_with("pub ") || line.contains("pub(crate)");
            code.entry(name).or_default().push(Code {
                module: file
                    .split_once('/')
                    .map_or_else(|| file.clone(), |(folder, _)| format!("{folder}.rs")),
                is_public,
                body: body.to_owned(),
            });
        }
    }
    code
}

fn folder_of(function: &str) -> String {
    if function == "relay" { function.to_owned() } else { format!("functions/{function}") }
}

/// What a function ships with, by its manifest.
fn packages_of(function: &str) -> String {
    read(&format!("{}/Cargo.toml", folder_of(function)))
        .split("[dev-dependencies]")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// What a function's code can call of AWS through `edge`. Names decide, so it may be more than is called.
fn reachable(function: &str, code: &BTreeMap<String, Vec<Code>>) -> BTreeSet<Permission> {
    let mut folders = vec![format!("{}/src", folder_of(function))];
    if packages_of(function).contains("exchange") {
        folders.push("exchange/src".to_owned());
    }
    let own: String = folders
        .iter()
        .flat_map(|folder| names(folder).into_iter().map(move |name| format!("{folder}/{name}")))
        .filter(|path| path.ends_with(".rs"))
        .map(|path| shipped(&read(&path)))
        .collect();
    let mut open: Vec<(&str, &str)> = Vec::new();
    for (_, name) in calls(&own) {
        for one in code.get(&name).into_iter().flatten().filter(|one| one.is_public) {
            open.push((&one.module, &one.body));
        }
    }
    let mut seen = BTreeSet::new();
    let mut found = BTreeSet::new();
    while let Some((module, body)) = open.pop() {
        if !seen.insert((module, body)) {
            continue;
        }
        for (on_self, name) in calls(body) {
            if body.contains(&format!(".{name}()"))
                && let Some((_, action)) = OPERATIONS.iter().find(|(call, _)| *call == name)
            {
                let resource = match (action.split(':').next().unwrap(), module) {
                    ("dynamodb", "mailbox.rs" | "caretaker.rs") => Resource::Mailboxes,
                    ("dynamodb", "deliveries.rs") => Resource::Deliveries,
                    ("dynamodb", _) => Resource::Connections,
                    ("sqs", _) if *action == "sqs:ListQueues" => Resource::Any,
                    ("sqs", "deliveries.rs") if body.contains("self.dead_letters") => Resource::DeadLetters,
                    ("sqs", "deliveries.rs") => Resource::Redeliveries,
                    ("sqs", _) => Resource::Queues,
                    ("states", "deliveries.rs") if action.ends_with("eExecution") => Resource::DeliveryRuns,
                    ("states", "deliveries.rs") if *action == "states:StopExecution" => {
                        Resource::DeliveryRuns
                    }
                    ("states", "deliveries.rs") => Resource::Delivery,
                    ("states", _) => Resource::PublicRequest,
                    ("application-autoscaling", _) => Resource::Tasks,
                    (method, _) => Resource::Link(method.to_owned()),
                };
                let action = match resource {
                    Resource::Link(_) => "execute-api:ManageConnections",
                    _ => action,
                };
                found.insert(allowed(action.to_owned(), resource));
            }
            for one in code.get(&name).into_iter().flatten() {
                // What is called on oneself is in the same module.
                if one.module == module || (!on_self && one.is_public) {
                    open.push((&one.module, &one.body));
                }
            }
        }
    }
    found
}

/// That a role has all it needs is shown by every other test: `local` enforces it.
#[test]
fn a_role_allows_nothing_that_its_function_cannot_call() {
    let code = code_of_edge();
    let functions = stack().functions.iter().map(|(name, function)| (name.as_str(), &function.permissions));
    for (name, permissions) in functions.chain([("relay", &stack().relay.permissions)]) {
        let reachable = reachable(name, &code);
        for permission in permissions {
            let scales = reachable.iter().any(|one| one.resource == Resource::Tasks);
            let is_own = match (&permission.resource, permission.action.as_str()) {
                (Resource::Log(log), "logs:CreateLogStream" | "logs:PutLogEvents") => log == name,
                // AWS asks this of who registers bounds.
                (Resource::RelayService, "ecs:DescribeServices" | "ecs:UpdateService") => scales,
                // Fetched before it is started.
                (Resource::RelayProgram, "s3:GetObject") => name == "relay",
                (Resource::Any, "xray:PutTraceSegments" | "xray:PutTelemetryRecords") => true,
                _ => reachable.contains(&Permission { rows: Rows::Any, ..permission.clone() }),
            };
            assert!(is_own, "{name} cannot call {permission:?}, only {reachable:?}");
        }
    }
    // The test itself: what it finds is not simply everything.
    let response = reachable("response", &code);
    assert!(response.iter().any(|permission| permission.action == "sqs:SendMessage"));
    assert!(response.iter().all(|permission| permission.action != "sqs:CreateQueue"), "{response:?}");
}

fn allowed(action: String, resource: Resource) -> Permission {
    Permission { action, resource, rows: Rows::Any }
}

/// What a task of the state machine needs.
fn needed(task: &Value) -> Permission {
    let arguments = &task["Arguments"];
    let resource = task["Resource"].as_str().unwrap();
    let resource = resource.trim_end_matches(".waitForTaskToken");
    let (service, operation) = resource.trim_start_matches("arn:aws:states:::").rsplit_once(':').unwrap();
    let operation = format!("{}{}", operation[..1].to_uppercase(), &operation[1..]);
    match service.trim_start_matches("aws-sdk:") {
        "dynamodb" => {
            let table = match arguments["TableName"].as_str().unwrap() {
                "${ConnectionsTable}" => Resource::Connections,
                "${DeliveriesTable}" => Resource::Deliveries,
                other => panic!("{other} is no table"),
            };
            allowed(format!("dynamodb:{operation}"), table)
        }
        "lambda" => {
            assert_eq!(arguments["FunctionName"], "${DeliverFunction}");
            allowed("lambda:InvokeFunction".into(), Resource::Function("deliver".into()))
        }
        "sqs" => allowed(format!("sqs:{operation}"), Resource::Queues),
        "apigateway" => allowed(
            "execute-api:ManageConnections".into(),
            Resource::Link(arguments["Method"].as_str().unwrap().into()),
        ),
        other => panic!("{other} is not known to this test"),
    }
}

fn machine() -> Value {
    serde_json::from_str(MACHINE).unwrap()
}

fn delivery() -> Value {
    serde_json::from_str(DELIVERY).unwrap()
}

fn tasks(machine: &Value) -> impl Iterator<Item = (&String, &Value)> {
    machine["States"].as_object().unwrap().iter().filter(|(_, state)| state["Type"] == "Task")
}

#[test]
fn the_state_machines_may_do_what_their_tasks_do() {
    for (machine, deployed) in [(machine(), &stack().workflow), (delivery(), &stack().delivery)] {
        let needed: BTreeSet<_> = tasks(&machine).map(|(_, task)| needed(task)).collect();
        let any_row = |one: &Permission| Permission { rows: Rows::Any, ..one.clone() };
        let allowed: BTreeSet<_> = deployed.permissions.iter().map(any_row).collect();
        let own = |permission: &&Permission| permission.resource != Resource::Any;
        assert_eq!(allowed.iter().filter(own).cloned().collect::<BTreeSet<_>>(), needed);
        let any = allowed.iter().filter(|permission| permission.resource == Resource::Any);
        for permission in any {
            let service = permission.action.split(':').next();
            assert!(matches!(service, Some("logs" | "xray")), "{permission:?}");
        }
    }
}

/// How many transitions a delivery takes that is delivered at the first try, what it takes more for each wait, and for each
/// further try. docs/cost.md says what they cost.
const FIRST_TRY: usize = 2;
const WAIT: usize = 2;
const FURTHER_TRY: usize = 3;

#[test]
fn a_delivery_runs_as_long_as_it_has_to_and_keeps_nothing_of_the_request() {
    let supplied: BTreeMap<_, _> =
        stack().delivery.substitutions.iter().map(|name| (name.clone(), "x".to_owned())).collect();
    for name in supplied.keys() {
        assert!(DELIVERY.contains(&format!("${{{name}}}")), "{name} is supplied for nothing");
    }
    Definition::parse_as(MachineType::Standard, DELIVERY, &supplied).unwrap();
    assert_eq!(stack().delivery.kind, "STANDARD");
    let machine = delivery();
    // A delivery lasts up to 14 days: a machine's own time-out would end it unseen, a task's is judged.
    assert!(machine["TimeoutSeconds"].is_null());
    for (name, task) in tasks(&machine) {
        assert!(!task["TimeoutSeconds"].is_null(), "{name} could hang for a year");
        // Its function ends before its task does.
        if let Some(secs) = task["TimeoutSeconds"].as_u64()
            && task["Resource"].as_str().unwrap().contains("lambda")
        {
            assert!(Duration::from_secs(secs) > stack().functions["deliver"].timeout, "{name}");
        }
        // No state hands on what a task was answered as it is.
        assert!(!task["Output"].is_null(), "{name}");
    }
    // The history keeps what tasks are given and give for 90 days.
    for word in ["head", "body", "headers", "target"] {
        assert!(!DELIVERY.contains(&format!("\"{word}\"")), "{word}");
    }
    // Each state that a run enters is paid for.
    let states = &machine["States"];
    let way = |from: &str, to: &str| {
        let mut way = vec![from.to_owned()];
        while way.last().unwrap() != to {
            let at = &states[way.last().unwrap()];
            way.push(at["Next"].as_str().unwrap_or_else(|| panic!("{way:?}")).to_owned());
        }
        way.len()
    };
    assert_eq!(machine["StartAt"], "Deliver");
    assert_eq!(states["Settle"]["End"], true);
    assert_eq!(way("Deliver", "Settle"), FIRST_TRY);
    let catches = states["Deliver"]["Catch"].as_array().unwrap();
    let caught =
        |name: &str| catches.iter().find(|one| one["ErrorEquals"][0] == name).unwrap()["Next"].clone();
    // Another `Deliver`, and what stands before it.
    assert_eq!(way(caught("NoAgent").as_str().unwrap(), "Deliver"), WAIT);
    assert_eq!(way(caught("NotItsTurn").as_str().unwrap(), "Deliver"), WAIT);
    assert_eq!(way(caught("States.ALL").as_str().unwrap(), "Deliver"), FURTHER_TRY);
}

#[test]
fn every_substitution_is_supplied_and_the_machine_is_one_that_express_takes() {
    let supplied: BTreeMap<_, _> =
        stack().workflow.substitutions.iter().map(|name| (name.clone(), "x".to_owned())).collect();
    for name in supplied.keys() {
        assert!(MACHINE.contains(&format!("${{{name}}}")), "{name} is supplied for nothing");
    }
    Definition::parse(MACHINE, &supplied).unwrap();
    assert_eq!(stack().workflow.kind, "EXPRESS");
    // The names of Step Functions' own tasks, and of nobody's account or region.
    for text in [MACHINE, DELIVERY] {
        assert_eq!(text.matches("arn:").count(), text.matches("arn:aws:states:::").count());
    }
    // `Definition` refuses them by not knowing them; this is what a deployment would refuse.
    for illegal in [".waitForTaskToken", ".sync", ":activity:"] {
        assert!(!MACHINE.contains(illegal), "{illegal}");
    }
}

/// The longest that a task takes, with every retry and every wait between.
fn longest(task: &Value) -> u64 {
    let timeout = task["TimeoutSeconds"].as_u64().unwrap();
    let retries = task["Retry"].as_array().into_iter().flatten().map(|retry| {
        let number = |key: &str, default| retry[key].as_f64().unwrap_or(default);
        let most = number("MaxDelaySeconds", f64::MAX);
        let waits = (0..retry["MaxAttempts"].as_u64().unwrap_or(3)).map(|attempt| {
            let delay = number("IntervalSeconds", 1.0)
                * number("BackoffRate", 2.0).powi(i32::try_from(attempt).unwrap());
            delay.min(most).ceil() as u64 + timeout
        });
        waits.sum::<u64>()
    });
    timeout + retries.sum::<u64>()
}

#[test]
fn the_longest_way_through_a_run_fits_its_time_and_a_run_fits_ingress() {
    let machine = machine();
    let longest = |name: &str| longest(&machine["States"][name]);
    let run = Duration::from_secs(machine["TimeoutSeconds"].as_u64().unwrap());
    // To the dispatch: the lookup and three connections, two of which are gone.
    let dispatch =
        longest("LookUpConnections") + 3 * longest("DispatchRequest") + 2 * longest("ForgetConnection");
    // After the deadline: the shortest poll and one check.
    let end = limits::MAILBOX_WAIT;
    assert!(Duration::from_secs(dispatch) + end <= run, "{dispatch} s to the dispatch");
    assert!(limits::REPLY_TIMEOUT_MAX + end <= run);
    assert!(run <= limits::RUN_DURATION);
    assert!(limits::REPLY_TIMEOUT_MAX < stack().functions["ingress"].timeout);
    // A poll ends before its task does.
    let poll = machine["States"]["AwaitReply"]["TimeoutSeconds"].as_u64().unwrap();
    assert!(limits::MAILBOX_WAIT < Duration::from_secs(poll));
    assert!(stack().functions["ingress"].timeout <= limits::RESPONSE_DURATION);
}

#[test]
fn every_state_is_below_the_limit_by_construction() {
    let machine = machine();
    let states = &machine["States"];
    // The run's input is one message and a few names. No state hands it on: each names its output.
    for (name, state) in states.as_object().unwrap() {
        let hands_on_its_result = ["AwaitReply", "DiscardStale"].contains(&name.as_str());
        let ends = ["Choice", "Fail"].contains(&state["Type"].as_str().unwrap());
        assert!(
            hands_on_its_result || ends || !state["Output"].is_null(),
            "{name} hands on what it was given"
        );
        assert!(!state["Output"].to_string().contains("Execution.Input"), "{name} hands on the input");
        assert!(!state["Assign"].to_string().contains("message"), "{name} keeps the message");
    }
    // One message of a mailbox at a time; with it the request is not kept.
    assert_eq!(states["AwaitReply"]["Arguments"]["MaxNumberOfMessages"], 1);
    const { assert!(limits::MESSAGE_BYTES * 2 <= limits::STATE_BYTES) };
}

#[test]
fn fronts_wait_longer_than_the_edge_and_an_alarm_exists_for_each_thing() {
    let settings = read("resources/settings.js");
    assert!(settings.contains(
        "const REPLY_SECS = { none: [60, 270], cloudfront: [55, 115], httpapi: [27, 27], relay: [55, 115] };"
    ));
    assert!(settings.contains("readTimeoutSecs: reply + READ_MARGIN_SECS"));
    for (front, limit) in [
        ("cloudfront", "OriginReadTimeout: ${self:custom.settings.readTimeoutSecs}"),
        ("httpapi", "TimeoutInMillis: 30000"),
    ] {
        let text = read(&format!("resources/fronts/{front}.yml"));
        assert!(text.contains("replyTimeoutSecs: ${self:custom.settings.replyTimeoutSecs}"), "{front}");
        assert!(text.contains(limit), "{front}");
        for field in ["x-tunnel-host", "x-tunnel-client", "x-tunnel-target", "x-tunnel-front"] {
            assert!(text.contains(field), "{front} lets clients send {field}");
        }
        assert!(text.contains("only: 'true'"), "{front}");
    }
}

/// The grammar of limits is written twice, for functions and for packaging: one list holds both.
#[test]
fn limits_are_read_as_settings_checks_them() {
    let golden: Value = serde_json::from_str(&read("resources/limits.json")).unwrap();
    for (key, is_right) in [("accepted", true), ("refused", false)] {
        for text in golden[key].as_array().unwrap() {
            let text = text.as_str().unwrap();
            assert_eq!(text.parse::<edge::limit::Limits>().is_ok(), is_right, "{text}");
        }
    }
    let pairs: Vec<(u32, u32)> = serde_json::from_value(golden["executions"].clone()).unwrap();
    assert!(pairs.len() > 3);
    for (executions, requests) in pairs {
        assert_eq!(edge::limit::edge_requests(executions), requests, "{executions}");
    }
    let few = format!("const FEW_EXECUTIONS = {};", edge::limit::EXECUTIONS_FEW);
    assert!(read("resources/settings.js").contains(&few));
}

/// The templates that `resources/check` has packaged.
fn templates() -> Vec<(String, Value)> {
    let Some(folder) = std::env::var_os("TUNNEL_TEMPLATES") else {
        println!("skipped: TUNNEL_TEMPLATES is not set; resources/check packages the stack and sets it");
        return Vec::new();
    };
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let read = files.map(|path| {
        let template = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        (path.file_stem().unwrap().to_string_lossy().into_owned(), template)
    });
    let templates: Vec<_> = read.collect();
    assert!(!templates.is_empty(), "there are no templates");
    templates
}

fn of_type<'a>(template: &'a Value, kind: &'a str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    let resources = template["Resources"].as_object().unwrap().iter();
    resources.filter(move |(_, one)| one["Type"] == kind).map(|(name, one)| (name, &one["Properties"]))
}

fn names_in(object: &Value) -> BTreeSet<String> {
    object.as_object().unwrap().keys().cloned().collect()
}

#[test]
fn the_packaged_stack_is_the_one_that_local_imitates() {
    for (name, template) in templates() {
        let mut roles = BTreeSet::new();
        let mut found = 0;
        for (id, function) in of_type(&template, "AWS::Lambda::Function") {
            let own = id.trim_end_matches("LambdaFunction").to_lowercase();
            let expected = &stack().functions[&own];
            assert_eq!(function["Runtime"], "provided.al2023");
            assert_eq!(function["Timeout"], expected.timeout.as_secs(), "{name}: {own}");
            assert_eq!(function["MemorySize"], expected.memory_mb, "{name}: {own}");
            assert_eq!(names_in(&function["Environment"]["Variables"]), expected.variables, "{name}: {own}");
            assert_eq!(function["LoggingConfig"]["LogFormat"], "JSON");
            assert!(roles.insert(function["Role"].to_string()), "{own} shares its role");
            if let Some(keys) = function["Environment"]["Variables"].get(env::TOKEN_KEYS) {
                // It comes from the secret and from nowhere else.
                assert!(keys["Fn::If"][1]["Fn::Sub"].as_str().unwrap().ends_with("AWSPREVIOUS}}"), "{keys}");
                assert_eq!(
                    keys["Fn::If"][2]["Fn::Sub"],
                    "{{resolve:secretsmanager:${TokenKey}:SecretString::AWSCURRENT}}"
                );
            }
            found += 1;
        }
        assert_eq!(found, stack().functions.len(), "{name}");
        for (id, group) in of_type(&template, "AWS::Logs::LogGroup") {
            assert!(group["RetentionInDays"].as_u64().is_some(), "{name}: {id} is kept for ever");
        }
    }
}

/// What an operator says of tokens reaches `authorizer`, to the letter.
#[test]
fn what_tokens_have_to_say_is_packaged_as_it_was_given() {
    for (name, template) in templates() {
        let resources = &template["Resources"];
        let variables = &resources["AuthorizerLambdaFunction"]["Properties"]["Environment"]["Variables"];
        let given = [
            (authorizer::config::ENV_JWKS_URL, "https://id.example.com/jwks"),
            (authorizer::config::ENV_TOKEN_ISSUER, "https://id.example.com/"),
            (authorizer::config::ENV_TOKEN_AUDIENCE, "edge"),
            (authorizer::config::ENV_OWNER_CLAIM, "team"),
            (authorizer::config::ENV_REVOKED, r#"{"token_ids": ["t1"], "owners": ["alice"]}"#),
        ];
        // As `resources/check` packages it.
        for (variable, value) in given {
            assert_eq!(variables[variable], if name == "relayed" { value } else { "" }, "{name}: {variable}");
        }
        let lookup = |name: &str| variables[name].as_str().map(str::to_owned);
        if name == "relayed" {
            authorizer::config::Config::from_env(&Env::new(&lookup)).unwrap();
        }
        let kept = &resources["SweepLambdaFunction"]["Properties"]["Environment"]["Variables"];
        let expected = if name == "relayed" { 100 } else { limits::MAILBOXES_KEPT };
        assert_eq!(kept[env::MAILBOXES_KEPT], expected.to_string(), "{name}");
    }
}

/// Who reads which key, by what is packaged: SECURITY.md says it in words.
#[test]
fn the_keys_are_read_by_those_alone_who_need_them() {
    for (name, template) in templates() {
        let resources = template["Resources"].as_object().unwrap();
        // As `resources/check` packages it.
        let is_own = name != "httpapi";
        let key = &resources.get("VariablesKey");
        assert_eq!(key.is_some(), is_own, "{name}");
        if let Some(key) = key {
            let statements = key["Properties"]["KeyPolicy"]["Statement"].as_array().unwrap();
            assert_eq!(statements.len(), 2, "{name}");
            assert!(
                statements[0]["Principal"]["AWS"].to_string().contains(":root"),
                "{name}: IAM says who else may"
            );
            let decrypts = ["IngressRole", "ResponseRole", "DeliverRole"];
            let decrypts = decrypts.map(|role| serde_json::json!({"Fn::GetAtt": [role, "Arn"]})).to_vec();
            assert_eq!(statements[1]["Principal"]["AWS"], Value::from(decrypts), "{name}");
            assert_eq!(statements[1]["Action"], "kms:Decrypt", "{name}");
        }
        // Every variable that holds a key is encrypted with it.
        for (id, function) in of_type(&template, "AWS::Lambda::Function") {
            let variables = function["Environment"]["Variables"].to_string();
            let holds = variables.contains("{{resolve:secretsmanager");
            assert_eq!(
                holds,
                ["DeliverLambdaFunction", "IngressLambdaFunction", "ResponseLambdaFunction"]
                    .contains(&id.as_str()),
                "{name}: {id}"
            );
            let own = serde_json::json!({"Fn::GetAtt": ["VariablesKey", "Arn"]});
            assert_eq!(function["KmsKeyArn"] == own, holds && is_own, "{name}: {id}");
        }
        // No definition of a task holds one.
        for (id, task) in of_type(&template, "AWS::ECS::TaskDefinition") {
            assert!(!task.to_string().contains("{{resolve:"), "{name}: {id}");
        }
        // And no role but the one that starts relay reads a secret, nor does any use a key.
        for (id, role) in of_type(&template, "AWS::IAM::Role") {
            let role = role.to_string();
            assert!(!role.contains("kms:"), "{name}: {id}");
            let reads: Vec<_> = role.match_indices("secretsmanager:").collect();
            assert_eq!(reads.len(), usize::from(id == "RelayExecutionRole"), "{name}: {id}");
        }
    }
}

/// A new secret of the front reaches both ends in one deployment: the generation stands in both, so that CloudFormation reads
/// it anew in both, and `ingress` takes the one before as well until then.
#[test]
fn a_new_secret_of_the_front_reaches_both_ends() {
    let mut rotated = 0;
    for (name, template) in templates() {
        let resources = &template["Resources"];
        let description = resources["IngressLambdaFunction"]["Properties"]["Description"].as_str().unwrap();
        let ends = [("FrontDistribution", "Comment"), ("FrontIntegration", "Description")];
        let generation = description.rsplit("front ").next().unwrap().trim_end_matches(").");
        for (id, field) in ends {
            let front = &resources[id]["Properties"];
            let own =
                if id == "FrontDistribution" { &front["DistributionConfig"][field] } else { &front[field] };
            if front.is_null() {
                continue;
            }
            assert!(
                own.as_str().unwrap().trim_end_matches(')').ends_with(&format!("front {generation}")),
                "{name}: {own}, {description}"
            );
            rotated += usize::from(generation != "0");
            let secret = resources["IngressLambdaFunction"]["Properties"]["Environment"]["Variables"]
                ["TUNNEL_FRONT_SECRET"]
                .to_string();
            assert!(secret.contains("AWSCURRENT") && secret.contains("AWSPREVIOUS"), "{name}: {secret}");
        }
        // It is sent once it is believed, by everything that it is sent to; `FrontIntegration` names `ingress` itself.
        if let Some(front) = resources.get("FrontDistribution") {
            let mut takers = vec!["IngressLambdaFunction"];
            takers.extend(has_relay(&template).then_some("RelayService"));
            assert_eq!(front["DependsOn"], serde_json::json!(takers), "{name}");
        }
        // And a key signs once it is accepted, also in a task that starts in the middle of a deployment.
        if let Some(keys) = resources.get("RelayKeys") {
            assert_eq!(keys["DependsOn"], serde_json::json!(["ResponseLambdaFunction"]), "{name}");
        }
    }
    assert!(rotated > 0 || templates().is_empty(), "no new secret was packaged");
}

/// CloudFormation refuses to make a resource of one type out of another, so no name may have two types, whatever is packaged:
/// one front follows another on a stack that runs. Both fronts want the same records, so between them comes `none`, which
/// has nothing of either.
#[test]
fn one_front_can_follow_another_by_way_of_none() {
    let templates = templates();
    let mut types: BTreeMap<String, (String, String)> = BTreeMap::new();
    for (name, template) in &templates {
        for (id, resource) in template["Resources"].as_object().unwrap() {
            let kind = resource["Type"].as_str().unwrap().to_owned();
            let (first, known) = types.entry(id.clone()).or_insert_with(|| (name.clone(), kind.clone()));
            assert_eq!(*known, kind, "{id} is of one type in {first} and of another in {name}");
            if name == "none" {
                assert!(!id.starts_with("Front"), "{id} stays between two fronts");
                // The agents' name is another one.
                let is_record = kind.starts_with("AWS::Route53::") && id != "AgentsRecord";
                assert!(!is_record, "{id} keeps the next front's records from being made");
            }
        }
    }
    if !templates.is_empty() {
        let all: Vec<_> = templates.iter().map(|(name, _)| name.as_str()).collect();
        for front in ["none", "cloudfront", "httpapi", "relayed"] {
            assert!(all.contains(&front), "{front} was not packaged: {all:?}");
        }
    }
}

/// An HTTP API takes no mapping to or from a name that AWS keeps for itself (API Gateway guide, reserved headers).
#[test]
fn the_http_api_maps_no_reserved_name() {
    const RESERVED: [&str; 12] = [
        "access-control-",
        "apigw-",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-location",
        "forwarded",
        "keep-alive",
        "origin",
        "x-amz-",
        "x-amzn-",
    ];
    let text = read("resources/fronts/httpapi.yml");
    let mut found = 0;
    for part in text.split("header.").skip(1) {
        let name: String = part.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        assert!(
            !RESERVED.iter().any(|reserved| name.to_lowercase().starts_with(reserved)),
            "{name} is reserved"
        );
        found += 1;
    }
    assert!(found >= 6, "{found}");
}

#[test]
fn a_packaged_firewall_stands_before_the_distribution_that_asked_for_it() {
    let templates = templates();
    let mut found = 0;
    for (name, template) in &templates {
        for (_, front) in of_type(template, "AWS::CloudFront::Distribution") {
            let acl = front["DistributionConfig"]["WebACLId"].as_str().unwrap_or_default();
            assert!(acl.contains(":global/webacl/"), "{name}: {acl}");
            found += 1;
        }
    }
    assert!(found > 0 || templates.is_empty(), "no distribution was packaged");
}

#[test]
fn the_packaged_function_url_streams_and_may_be_called() {
    for (name, template) in templates() {
        let urls: Vec<_> = of_type(&template, "AWS::Lambda::Url").collect();
        assert_eq!(urls.len(), 1, "{name}");
        assert_eq!(urls[0].1["InvokeMode"], "RESPONSE_STREAM", "{name}");
        assert_eq!(urls[0].1["AuthType"], "NONE", "{name}");
        let open: Vec<_> = of_type(&template, "AWS::Lambda::Permission")
            .filter(|(_, one)| one["Principal"] == "*")
            .collect();
        // Both are needed, and each is for calls through the URL alone.
        assert_eq!(open.len(), 2, "{name}");
        for (id, permission) in open {
            let target = &permission["FunctionName"]["Fn::GetAtt"][0];
            assert_eq!(target, "IngressLambdaFunction", "{name}: {id}");
            let by_url = match permission["Action"].as_str() {
                Some("lambda:InvokeFunctionUrl") => permission["FunctionUrlAuthType"] == "NONE",
                Some("lambda:InvokeFunction") => permission["InvokedViaFunctionUrl"] == true,
                _ => false,
            };
            assert!(by_url, "{name}: {permission}");
        }
        let closed = of_type(&template, "AWS::Lambda::Permission").filter(|(_, one)| one["Principal"] != "*");
        for (id, permission) in closed {
            assert!(!permission["SourceArn"].is_null(), "{name}: {id} lets any API in");
        }
    }
}

#[test]
fn the_packaged_state_machine_is_the_file() {
    for (name, template) in templates() {
        let machines: BTreeMap<_, _> = of_type(&template, "AWS::StepFunctions::StateMachine").collect();
        assert_eq!(machines.len(), 2, "{name}");
        for (id, text, deployed) in
            [("PublicRequest", MACHINE, &stack().workflow), ("Delivery", DELIVERY, &stack().delivery)]
        {
            let packaged = machines[&id.to_owned()];
            assert_eq!(packaged["StateMachineType"], *deployed.kind, "{name}");
            // Byte for byte: osls drops every `null` of an object, and a run would fail for want of it.
            assert!(packaged["DefinitionString"] == text, "{name}: osls changed the definition of {id}");
            assert_eq!(names_in(&packaged["DefinitionSubstitutions"]), deployed.substitutions);
            let logging = &packaged["LoggingConfiguration"];
            let expected = (&"ERROR".into(), &false.into());
            assert_eq!((&logging["Level"], &logging["IncludeExecutionData"]), expected);
        }
        // Whoever stops a run of a delivery is heard of, and nobody else's.
        let rules: BTreeMap<_, _> = of_type(&template, "AWS::Events::Rule").collect();
        let stopped = rules[&"StoppedDeliveries".to_owned()];
        let pattern = serde_json::json!({
            "source": ["aws.states"],
            "detail-type": ["Step Functions Execution Status Change"],
            "detail": { "stateMachineArn": [{ "Ref": "Delivery" }], "status": ["ABORTED", "TIMED_OUT"] },
        });
        assert_eq!(stopped["EventPattern"], pattern, "{name}");
        for id in rules.keys() {
            let source = serde_json::json!({ "Fn::GetAtt": [id, "Arn"] });
            let mut permissions = of_type(&template, "AWS::Lambda::Permission");
            let may = permissions.find(|(_, one)| one["SourceArn"] == source).expect("a permission").1;
            assert_eq!(rules[id]["Targets"][0]["Arn"], may["FunctionName"], "{name}: {id}");
        }
    }
}

#[test]
fn packaged_roles_name_what_they_allow() {
    const WITHOUT_RESOURCES: &[&str] = &[
        "logs:CreateLogDelivery",
        "logs:DeleteLogDelivery",
        "logs:DescribeLogGroups",
        "logs:DescribeResourcePolicies",
        "logs:GetLogDelivery",
        "logs:ListLogDeliveries",
        "logs:PutResourcePolicy",
        "logs:UpdateLogDelivery",
        "sqs:ListQueues",
        "xray:GetSamplingRules",
        "xray:GetSamplingTargets",
        "xray:PutTelemetryRecords",
        "xray:PutTraceSegments",
    ];
    let list = |value: &Value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    for (name, template) in templates() {
        let mut roles = 0;
        for (id, role) in of_type(&template, "AWS::IAM::Role") {
            assert!(role["ManagedPolicyArns"].is_null(), "{name}: {id}");
            let added = of_type(&template, "AWS::IAM::RolePolicy").map(|(_, policy)| policy);
            let added: Vec<_> = added.filter(|policy| policy["RoleName"]["Ref"] == *id).collect();
            for policy in role["Policies"].as_array().unwrap().iter().chain(added) {
                for statement in list(&policy["PolicyDocument"]["Statement"]) {
                    for action in list(&statement["Action"]) {
                        let action = action.as_str().unwrap();
                        assert!(!action.contains('*'), "{name}: {id} allows {action}");
                        let any = list(&statement["Resource"]).iter().any(|resource| resource == "*");
                        assert!(
                            !any || WITHOUT_RESOURCES.contains(&action),
                            "{name}: {id} allows {action} on *"
                        );
                    }
                }
            }
            roles += 1;
        }
        let relay = if has_relay(&template) { 2 } else { 0 };
        assert_eq!(
            roles,
            stack().functions.len() + 2 + relay,
            "{name}: a role each, and the state machines'"
        );
    }
}

fn has_relay(template: &Value) -> bool {
    of_type(template, "AWS::ECS::Service").next().is_some()
}

/// What linters let through and AWS refuses, or takes and does not do.
#[test]
fn a_packaged_relay_is_one_that_starts_and_is_reached() {
    let templates = templates();
    let mut found = 0;
    for (name, template) in &templates {
        let one = |kind: &'static str| of_type(template, kind).next().map(|(_, properties)| properties);
        for (id, front) in of_type(template, "AWS::CloudFront::Distribution") {
            let origins = front["DistributionConfig"]["Origins"].as_array().unwrap();
            for origin in origins.iter().filter(|origin| origin["Ref"].is_null()) {
                let (custom, vpc) = (&origin["CustomOriginConfig"], &origin["VpcOriginConfig"]);
                // Exactly one, and times that CloudFront takes.
                assert_ne!(custom.is_null(), vpc.is_null(), "{name}: {id}: {origin}");
                let of = if custom.is_null() { vpc } else { custom };
                assert!((1..=120).contains(&of["OriginReadTimeout"].as_u64().unwrap()), "{name}: {of}");
                assert!((1..=300).contains(&of["OriginKeepaliveTimeout"].as_u64().unwrap()), "{name}: {of}");
                assert_eq!(origin["OriginCustomHeaders"][0]["HeaderName"], "x-tunnel-front", "{name}");
                assert_eq!(origin["ConnectionAttempts"], 1, "{name}");
            }
            let behaviour = &front["DistributionConfig"]["DefaultCacheBehavior"];
            // CloudFront takes three sets of methods, and a behaviour without a policy caches as it likes.
            assert_eq!(behaviour["AllowedMethods"].as_array().unwrap().len(), 7, "{name}");
            assert!(
                behaviour["CachePolicyId"].is_string() && behaviour["ForwardedValues"].is_null(),
                "{name}"
            );
            let code = of_type(template, "AWS::CloudFront::Function").next().unwrap().1["FunctionCode"]
                .as_str()
                .unwrap();
            let ids: Vec<_> = origins.iter().filter_map(|origin| origin["Id"].as_str()).collect();
            let taken = code.split("if (").nth(1).unwrap().split(") cf.").next().unwrap();
            let expected = match name.as_str() {
                "relay" => "'sec-websocket-key' in request.headers",
                "relayed" => "true",
                _ => "false",
            };
            assert_eq!((ids.contains(&"relay"), taken), (has_relay(template), expected), "{name}");
        }
        let connect =
            &template["Resources"]["ConnectLambdaFunction"]["Properties"]["Environment"]["Variables"];
        assert_eq!(connect[env::WEBSOCKETS], has_relay(template).to_string(), "{name}");
        let Some(service) = one("AWS::ECS::Service") else { continue };
        found += 1;
        let task = one("AWS::ECS::TaskDefinition").unwrap();
        let container = &task["ContainerDefinitions"][0];
        let balanced = &service["LoadBalancers"][0];
        assert_eq!(balanced["ContainerName"], container["Name"], "{name}");
        assert_eq!(balanced["ContainerPort"], container["PortMappings"][0]["ContainerPort"], "{name}");
        assert!(!task["ExecutionRoleArn"].is_null() && !task["TaskRoleArn"].is_null(), "{name}");
        // A number here would wake or end it with each deployment.
        assert!(service["DesiredCount"].is_null(), "{name}");
        assert!(
            service["CapacityProviderStrategy"].is_null() && service["LaunchType"] == "FARGATE",
            "{name}"
        );
        let rolling = &service["DeploymentConfiguration"];
        assert!(rolling["MaximumPercent"].as_u64().unwrap() > 100 && rolling["MinimumHealthyPercent"] == 100);
        let depends = template["Resources"]["RelayService"]["DependsOn"].to_string();
        for other in ["RelayListener", "RelayRoute", "ResponseLambdaFunction", "Mailboxes"] {
            assert!(
                depends.contains(&format!("\"{other}\"")),
                "{name}: the service does not wait for {other}"
            );
        }
        let targets = one("AWS::ElasticLoadBalancingV2::TargetGroup").unwrap();
        assert_eq!(
            (&targets["TargetType"], &targets["Port"]),
            (&"ip".into(), &balanced["ContainerPort"]),
            "{name}"
        );
        assert!(
            targets["HealthCheckTimeoutSeconds"].as_u64() < targets["HealthCheckIntervalSeconds"].as_u64()
        );
        let attribute = |of: &Value, list: &str, key: &str| {
            let found = of[list].as_array().unwrap().iter().find(|one| one["Key"] == key);
            found.unwrap()["Value"].as_str().unwrap().parse::<u64>().unwrap()
        };
        let balancer = one("AWS::ElasticLoadBalancingV2::LoadBalancer").unwrap();
        // One of the two has the longest stage that a relay takes.
        for of in [balancer, targets] {
            let letters = of["Name"].as_str().unwrap().len();
            assert!(letters <= 32 && (letters == 32) == (name == "relayed"), "{name}: {letters}");
        }
        let idle = attribute(balancer, "LoadBalancerAttributes", "idle_timeout.timeout_seconds");
        let latest = settings_number("relay: [55, ");
        // Longer than a late head, shorter than relay keeps an idle connection.
        assert!(
            idle > latest + 5 && Duration::from_secs(idle) < relay::public::HEAD_TIME,
            "{name}: {idle} s"
        );
        assert_eq!(balancer["Scheme"], "internal", "{name}");
        // Told to end, it closes WebSockets and finishes requests before ECS kills it.
        let variables = container["Environment"].as_array().unwrap();
        let variable = |key: &str| variables.iter().find(|one| one["Name"] == key).unwrap()["Value"].clone();
        let drain = variable(env::RELAY_DRAIN_SECS).as_str().unwrap().parse::<u64>().unwrap();
        let stop = container["StopTimeout"].as_u64().unwrap();
        assert!(drain < stop && stop <= 120, "{name}: Fargate waits 120 s at most");
        assert!(container["Privileged"].is_null() && container["ReadonlyRootFilesystem"] == true, "{name}");
        // The program is the one that was packaged, by its hash.
        let hash = variable("PROGRAM_SHA256");
        let hash = hash.as_str().unwrap();
        assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}: {hash}");
        let key = variable("PROGRAM_KEY");
        assert!(key.as_str().unwrap().ends_with(&format!("/relay/{hash}")), "{name}: {key}");
        let script = container["Command"][0].as_str().unwrap();
        let at = |word: &str| script.find(word).unwrap();
        assert!(at("sha256sum --check") < at("chmod") && at("chmod") < at("exec"), "{name}");
        // The names that `connect` and `sweep` are told are those of the cluster and the service.
        let cluster = one("AWS::ECS::Cluster").unwrap()["ClusterName"].as_str().unwrap();
        let expected = format!("service/{cluster}/{}", service["ServiceName"].as_str().unwrap());
        assert_eq!(connect[env::RELAY_SERVICE], *expected, "{name}");
        let bounds = one("AWS::ApplicationAutoScaling::ScalableTarget").unwrap();
        assert_eq!(bounds["MaxCapacity"].to_string().trim_matches('"'), connect[env::RELAY_TASKS], "{name}");
        let origin = one("AWS::CloudFront::VpcOrigin").unwrap();
        let ingress = &template["Resources"]["RelayBalancerGroup"]["Properties"]["SecurityGroupIngress"];
        for rule in ingress.as_array().unwrap() {
            assert_eq!(rule["FromPort"], origin["VpcOriginEndpointConfig"]["HTTPPort"], "{name}");
            assert_ne!(rule["CidrIp"], "0.0.0.0/0", "{name}");
        }
    }
    assert!(found == 2 || templates.is_empty(), "{found} relays were packaged");
}

/// The number behind some words of `resources/settings.js`.
fn settings_number(words: &str) -> u64 {
    let settings = read("resources/settings.js");
    let (_, number) = settings.split_once(words).unwrap();
    number.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

#[test]
fn packaged_alarms_and_dashboard_go_by_metrics_that_exist() {
    for (name, template) in templates() {
        let alarms: BTreeMap<_, _> = of_type(&template, "AWS::CloudWatch::Alarm").collect();
        let threshold = |alarm: &str| alarms[&alarm.to_owned()]["Threshold"].as_u64();
        assert_eq!(threshold("FunctionErrors"), Some(10), "{name}");
        assert_eq!(threshold("TableThrottles"), Some(5), "{name}");
        assert_eq!(threshold("ServerErrors"), Some(10), "{name}");
        assert!(alarms.contains_key(&"RunFailures".to_owned()), "{name}");
        assert_eq!(threshold("OldestMessage"), Some(limits::MAILBOX_WAIT.as_secs()), "{name}");
        for (id, alarm) in &alarms {
            for metric in alarm["Metrics"].as_array().into_iter().flatten() {
                let period = &metric["MetricStat"]["Period"];
                assert!(period.is_null() || period == 300, "{name}: {id}");
            }
            // CloudWatch refuses an alarm that searches.
            assert!(!alarm.to_string().contains("SEARCH("), "{name}: {id}");
            // Quiet is good, and both ways are told.
            assert_eq!(alarm["TreatMissingData"], "notBreaching", "{name}: {id}");
            assert_eq!(alarm["AlarmActions"], alarm["OKActions"], "{name}: {id}");
        }
        let own = alarms[&"OldestMessage".to_owned()];
        let metric = Metric::ALL.iter().find(|metric| own["MetricName"] == metric.name()).unwrap();
        assert_eq!(
            (metric.dimension(), &own["Dimensions"], &own["Period"]),
            (None, &Value::Null, &300.into())
        );
        // The functions write where the alarm looks.
        let ingress = &template["Resources"]["IngressLambdaFunction"]["Properties"];
        assert_eq!(own["Namespace"], ingress["Environment"]["Variables"][env::METRICS_NAMESPACE], "{name}");
        let watched = |alarm: &str| -> BTreeSet<String> {
            let metrics = alarms[&alarm.to_owned()]["Metrics"].as_array().unwrap();
            // An alarm takes so many metrics (CloudWatch User Guide, "Create a CloudWatch alarm based on a metric math expression").
            assert!(metrics.len() - 1 <= 10, "{name}: {alarm}");
            let value = |metric: &Value| {
                metric["MetricStat"]["Metric"]["Dimensions"][0]["Value"]["Ref"].as_str().map(str::to_owned)
            };
            metrics.iter().filter_map(value).collect()
        };
        let all = |kind: &str, but: &[&str]| -> BTreeSet<String> {
            of_type(&template, kind)
                .map(|(id, _)| id.clone())
                .filter(|id| !but.contains(&id.as_str()))
                .collect()
        };
        let functions = all("AWS::Lambda::Function", &[]);
        // It refuses by failing: strangers would ring.
        let fail = all("AWS::Lambda::Function", &["AuthorizerLambdaFunction"]);
        assert_eq!(watched("FunctionErrors"), fail, "{name}: every function's errors are watched");
        let mut throttled = all("AWS::Lambda::Function", &["RevokeLambdaFunction", "SweepLambdaFunction"]);
        throttled.insert("PublicRequest".to_owned());
        assert_eq!(watched("Throttles"), throttled, "{name}: whatever has to start at once is watched");
        let tables = all("AWS::DynamoDB::Table", &[]);
        assert_eq!(watched("TableThrottles"), tables, "{name}: every table is watched");
        assert_eq!(threshold("Throttles"), Some(5), "{name}");
        // Whatever answers public requests: `ingress`, and `relay` where there is one.
        assert_eq!(watched("ServerErrors"), BTreeSet::from(["IngressLambdaFunction".to_owned()]), "{name}");
        if has_relay(&template) {
            let alarm = alarms[&"RelayServerErrors".to_owned()];
            assert_eq!(alarm["MetricName"], "HTTPCode_Target_5XX_Count", "{name}");
            assert_eq!(alarm["Threshold"], alarms[&"ServerErrors".to_owned()]["Threshold"], "{name}");
        }
        // Near the end of what a response may last.
        let longest = stack().functions["ingress"].timeout.as_secs() * 1000;
        assert_eq!(threshold("LongResponses"), Some(longest / 100 * 95), "{name}");
        assert_eq!(alarms[&"LongResponses".to_owned()]["MetricName"], "Duration", "{name}");
        let guide = read("docs/operations.md");
        let (_, table) = guide.split_once("| alarm | when | then |").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let rows = table.lines().skip(2).map(|row| row.split('`').nth(1).unwrap().to_owned());
        let ids: BTreeSet<String> = alarms.keys().map(|&id| id.clone()).collect();
        let mut rows: BTreeSet<String> = rows.collect();
        if !has_relay(&template) {
            rows.retain(|row| !row.starts_with("Relay") && row != "SocketsLost");
        }
        assert_eq!(rows, ids, "{name}: docs/operations.md has every alarm");
        let dashboards: Vec<_> = of_type(&template, "AWS::CloudWatch::Dashboard").collect();
        let body = dashboards[0].1["DashboardBody"]["Fn::Sub"].as_str().unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        // The dashboard shows what the alarms go by.
        let shown = |metric: &str| -> BTreeSet<String> {
            let widgets = body["widgets"].as_array().unwrap().iter();
            let metrics =
                widgets.flat_map(|one| one["properties"]["metrics"].as_array().into_iter().flatten());
            let metrics =
                metrics.filter(|one| one[1] == *metric && one[0].as_str().unwrap().starts_with("AWS/"));
            let names = metrics.map(|one| one[3].as_str().unwrap().trim_matches(['$', '{', '}']).to_owned());
            names.collect()
        };
        assert_eq!(shown("Errors"), functions, "{name}");
        throttled.remove("PublicRequest");
        assert_eq!(shown("Throttles"), throttled, "{name}");
        for metric in ["ReadThrottleEvents", "WriteThrottleEvents"] {
            assert_eq!(shown(metric), tables, "{name}: {metric}");
        }
        let mut own = 0;
        for widget in body["widgets"].as_array().unwrap() {
            if widget["type"] == "log" {
                // What it looks for is what `sweep` writes.
                let query = widget["properties"]["query"].as_str().unwrap();
                let line = read("functions/sweep/src/lib.rs");
                let written = r#"tunnel_id = %tunnel, parked = backlog.parked, "deliveries wait""#;
                assert!(query.contains("'deliveries wait'") && line.contains(written), "{name}: {query}");
                assert!(
                    query.contains("latest(parked)") && query.contains("by tunnel_id"),
                    "{name}: {query}"
                );
                continue;
            }
            for metric in widget["properties"]["metrics"].as_array().unwrap() {
                let namespace = metric[0].as_str().unwrap_or_default();
                if namespace.starts_with("tunnel/") {
                    let found = Metric::ALL.iter().find(|one| metric[1] == one.name());
                    assert!(found.is_some_and(|one| one.dimension().is_none()), "{name}: {metric}");
                    own += 1;
                }
            }
        }
        assert!(own >= 5, "{name}");
        let text = body.to_string();
        assert!(text.contains(&format!(",{OUTCOME}}}")) && text.contains(Metric::Requests.name()), "{name}");
    }
}
