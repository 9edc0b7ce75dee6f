//! What a deployment consists of, read from the files that deploy it: `local` gives each function the
//! time, the memory, the variables and the permissions that it has in AWS, and the tables their keys.
//!
//! Enters the text of `serverless.yml` and of files under `resources/`, at compile time. Leaves typed
//! values, or a panic that says what is missing: the files are a part of this program.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
    time::Duration,
};

use saphyr::{LoadableYamlNode as _, Scalar, Yaml};
use serde_json::{Map, Value};

/// The files, `serverless.yml` first.
const FILES: [&str; 6] = [
    include_str!("../../serverless.yml"),
    include_str!("../../resources/tables.yml"),
    include_str!("../../resources/roles.yml"),
    include_str!("../../resources/workflow.yml"),
    include_str!("../../resources/delivery.yml"),
    include_str!("../../resources/relay.yml"),
];

static STACK: LazyLock<Stack> =
    LazyLock::new(|| Stack::parse(FILES).unwrap_or_else(|error| panic!("{error}")));

/// The stack of this version.
#[must_use]
pub fn stack() -> &'static Stack {
    &STACK
}

/// What is wrong with the files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stack's files: {0}")]
pub struct StackError(String);

/// What is deployed, as far as `local` imitates it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    /// The functions.
    pub functions: BTreeMap<String, Function>,
    /// Key and time to live of the table of connections.
    pub connections: Keys,
    /// Key of the table of mailboxes.
    pub mailboxes: Keys,
    /// Key and time to live of the table of deliveries.
    pub deliveries: Keys,
    /// The queue that names the deliveries that are dead.
    pub dead_letters: Queue,
    /// The queue that names deliveries to be made once more.
    pub redeliveries: Queue,
    /// The state machine of a public request.
    pub workflow: Workflow,
    /// The state machine of a delivery.
    pub delivery: Workflow,
    /// The task of `relay`.
    pub relay: Task,
}

/// One function.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// How long one invocation may take.
    pub timeout: Duration,
    /// Its memory, in MB.
    pub memory_mb: u32,
    /// The names of its environment variables.
    pub variables: BTreeSet<String>,
    /// What its role allows.
    pub permissions: Vec<Permission>,
}

/// The task of `relay`, which is no function.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// The names of its environment variables, those of what starts the program among them.
    pub variables: BTreeSet<String>,
    /// What its role allows.
    pub permissions: Vec<Permission>,
}

/// The state machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Workflow {
    /// `EXPRESS` or `STANDARD`.
    pub kind: String,
    /// The names that the definition leaves open.
    pub substitutions: BTreeSet<String>,
    /// What its role allows.
    pub permissions: Vec<Permission>,
}

/// The keys of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The partition key.
    pub partition: String,
    /// The sort key.
    pub sort: String,
    /// The attribute that holds when an item expires.
    pub expiry: Option<String>,
}

/// A queue, as far as it differs from one that nothing is said of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// How long it keeps a message.
    pub retention: Option<Duration>,
    /// How long a received message stays hidden.
    pub visibility: Option<Duration>,
    /// How often a message is received before it is a dead letter.
    pub max_receives: Option<u32>,
}

/// One action on one resource that a role allows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Permission {
    /// `service:Operation`.
    pub action: String,
    /// On what.
    pub resource: Resource,
    /// On which rows of a table.
    pub rows: Rows,
}

/// Which rows of a table a role allows something on, by their partition keys. A pattern is a key, or how
/// one begins and `*`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rows {
    /// All of them; and whatever is no table.
    Any,
    /// Those like one of these.
    Like(Vec<String>),
    /// Those like none of these.
    NotLike(Vec<String>),
}

impl Rows {
    /// Whether the row with this partition key is one of them. A call that names none is refused where it matters,
    /// which AWS does not do.
    #[must_use]
    pub fn have(&self, key: Option<&str>) -> bool {
        let is_like = |key: &str, patterns: &[String]| {
            patterns.iter().any(|pattern| {
                pattern.strip_suffix('*').map_or(pattern == key, |beginning| key.starts_with(beginning))
            })
        };
        match self {
            Self::Any => true,
            Self::Like(patterns) => key.is_some_and(|key| is_like(key, patterns)),
            Self::NotLike(patterns) => key.is_some_and(|key| !is_like(key, patterns)),
        }
    }
}

/// The operations that name one partition key: that of one row, or a query's.
const IN_ONE_PARTITION: [&str; 5] =
    ["dynamodb:DeleteItem", "dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:Query", "dynamodb:UpdateItem"];

/// A resource that a role names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// The table of connections.
    Connections,
    /// The table of mailboxes.
    Mailboxes,
    /// The table of deliveries.
    Deliveries,
    /// Every mailbox's queue.
    Queues,
    /// The queue that names the deliveries that are dead.
    DeadLetters,
    /// The queue that names deliveries to be made once more.
    Redeliveries,
    /// The state machine of a public request.
    PublicRequest,
    /// The state machine of a delivery.
    Delivery,
    /// Its runs.
    DeliveryRuns,
    /// This function.
    Function(String),
    /// A method of `@connections`.
    Link(String),
    /// The log of this function.
    Log(String),
    /// How many tasks run of services on ECS.
    Tasks,
    /// The service on ECS that runs `relay`.
    RelayService,
    /// The program of `relay`.
    RelayProgram,
    /// Everything.
    Any,
}

impl Stack {
    /// Reads the files, `serverless.yml` first.
    ///
    /// # Errors
    ///
    /// When something that `local` needs is missing, or a role names a resource that is not known here.
    pub fn parse<'a>(files: impl IntoIterator<Item = &'a str>) -> Result<Self, StackError> {
        let mut files = files.into_iter().map(read);
        let serverless = files.next().ok_or_else(|| StackError("there are none".into()))??;
        let mut resources = Map::new();
        for file in files {
            resources.extend(object(&file?, "Resources")?.clone());
        }
        let resource = |name: &str, kind: &str| {
            let found = resources.get(name).filter(|resource| resource["Type"] == kind);
            found.map(|found| &found["Properties"]).ok_or_else(|| StackError(format!("no {kind} {name}")))
        };
        let permissions = |role: &str| {
            let mut all = permissions(resource(role, "AWS::IAM::Role")?, role)?;
            // What another file adds to it.
            for added in resources.values().filter(|one| one["Type"] == "AWS::IAM::RolePolicy") {
                if added["Properties"]["RoleName"]["Ref"] == role {
                    all.extend(statements(&added["Properties"]["PolicyDocument"], role)?);
                }
            }
            Ok(all)
        };
        let mut functions = BTreeMap::new();
        for (name, function) in object(&serverless, "functions")? {
            let number = |key: &str| {
                // A setting is here what its parameter is by default.
                let setting = function[key].as_str().and_then(|text| {
                    let name = text.strip_prefix("${self:custom.settings.")?.strip_suffix('}')?;
                    serverless["params"]["default"][name].as_str()?.parse().ok()
                });
                let number = function[key].as_u64().or(setting).and_then(|number| u32::try_from(number).ok());
                number.ok_or_else(|| StackError(format!("function {name} has no {key}")))
            };
            let parsed = Function {
                timeout: Duration::from_secs(u64::from(number("timeout")?)),
                memory_mb: number("memorySize")?,
                variables: object(function, "environment")?.keys().cloned().collect(),
                permissions: permissions(&text(function, "role")?)?,
            };
            functions.insert(name.clone(), parsed);
        }
        let table = |name: &str| keys(resource(name, "AWS::DynamoDB::Table")?, name);
        let task = resource("RelayTask", "AWS::ECS::TaskDefinition")?;
        let container = &task["ContainerDefinitions"][0];
        let environment = list(&container["Environment"]).iter().chain(list(&container["Secrets"]));
        let workflow = |name: &str, role: &str| {
            let machine = resource(name, "AWS::StepFunctions::StateMachine")?;
            Ok(Workflow {
                kind: text(machine, "StateMachineType")?,
                substitutions: object(machine, "DefinitionSubstitutions")?.keys().cloned().collect(),
                permissions: permissions(role)?,
            })
        };
        let queue = |name: &str| {
            let queue = resource(name, "AWS::SQS::Queue")?;
            let seconds = |key: &str| queue[key].as_u64().map(Duration::from_secs);
            let max_receives = queue["RedrivePolicy"]["maxReceiveCount"].as_u64();
            Ok(Queue {
                retention: seconds("MessageRetentionPeriod"),
                visibility: seconds("VisibilityTimeout"),
                max_receives: max_receives.and_then(|most| u32::try_from(most).ok()),
            })
        };
        Ok(Self {
            functions,
            dead_letters: queue("DeadLetters")?,
            redeliveries: queue("Redeliveries")?,
            connections: table("ConnectionsTable")?,
            mailboxes: table("MailboxesTable")?,
            deliveries: table("DeliveriesTable")?,
            workflow: workflow("PublicRequest", "PublicRequestRole")?,
            delivery: workflow("Delivery", "DeliveryRole")?,
            relay: Task {
                variables: environment.map(|one| text(one, "Name")).collect::<Result<_, _>>()?,
                permissions: permissions("RelayRole")?,
            },
        })
    }
}

fn keys(table: &Value, name: &str) -> Result<Keys, StackError> {
    let key = |kind: &str| {
        let all = table["KeySchema"].as_array().into_iter().flatten();
        let found = all.filter(|key| key["KeyType"] == kind).find_map(|key| key["AttributeName"].as_str());
        found.map(str::to_owned).ok_or_else(|| StackError(format!("{name} has no {kind} key")))
    };
    let expiry = &table["TimeToLiveSpecification"];
    let expiry = expiry["AttributeName"].as_str().filter(|_| expiry["Enabled"] == true).map(str::to_owned);
    Ok(Keys { partition: key("HASH")?, sort: key("RANGE")?, expiry })
}

fn permissions(role: &Value, name: &str) -> Result<Vec<Permission>, StackError> {
    let mut permissions = Vec::new();
    for policy in list(&role["Policies"]) {
        permissions.extend(statements(&policy["PolicyDocument"], name)?);
    }
    Ok(permissions)
}

fn statements(policy: &Value, name: &str) -> Result<Vec<Permission>, StackError> {
    let mut permissions = Vec::new();
    for statement in list(&policy["Statement"]) {
        if statement["Effect"] != "Allow" {
            return Err(StackError(format!("{name} has a statement that is no Allow")));
        }
        let condition = statement.get("Condition").filter(|condition| **condition != services_alone());
        let rows = rows(condition)
            .ok_or_else(|| StackError(format!("{name} has a condition that is not understood")))?;
        for action in list(&statement["Action"]) {
            let action = action.as_str().unwrap_or_default();
            for resource in list(&statement["Resource"]) {
                let resource = named(resource)
                    .ok_or_else(|| StackError(format!("{name} names the unknown resource {resource}")))?;
                let is_table =
                    matches!(resource, Resource::Connections | Resource::Mailboxes | Resource::Deliveries);
                if rows != Rows::Any && !(is_table && IN_ONE_PARTITION.contains(&action)) {
                    return Err(StackError(format!("{name} has rows for {action}, which names none")));
                }
                // Their names are not known beforehand: what they are of has to be.
                if (resource == Resource::Tasks) != (statement.get("Condition") == Some(&services_alone())) {
                    return Err(StackError(format!("{name} has {action} on whatever can be scaled")));
                }
                permissions.push(Permission { action: action.to_owned(), resource, rows: rows.clone() });
            }
        }
    }
    Ok(permissions)
}

/// The condition under which bounds are registered for services of ECS and nothing else.
fn services_alone() -> Value {
    serde_json::json!({"StringEquals": {
        "application-autoscaling:service-namespace": "ecs",
        "application-autoscaling:scalable-dimension": "ecs:service:DesiredCount",
    }})
}

/// The rows that a statement's condition leaves. Only what the roles use is understood.
fn rows(condition: Option<&Value>) -> Option<Rows> {
    let Some(condition) = condition else { return Some(Rows::Any) };
    let (operator, keys) = only(condition)?;
    let (key, patterns) = only(keys)?;
    let patterns: Vec<String> =
        list(patterns).iter().map(|pattern| pattern.as_str().map(str::to_owned)).collect::<Option<_>>()?;
    let is_simple = |pattern: &String| {
        !pattern.contains('?') && !pattern.strip_suffix('*').unwrap_or(pattern).contains(['*', '$'])
    };
    if key != "dynamodb:LeadingKeys" || patterns.is_empty() || !patterns.iter().all(is_simple) {
        return None;
    }
    match operator.as_str() {
        "ForAllValues:StringLike" => Some(Rows::Like(patterns)),
        "ForAllValues:StringNotLike" => Some(Rows::NotLike(patterns)),
        _ => None,
    }
}

/// The one member of an object that has no other.
fn only(object: &Value) -> Option<(&String, &Value)> {
    let mut members = object.as_object()?.iter();
    members.next().filter(|_| members.next().is_none())
}

/// The resource that an expression of a role stands for.
fn named(expression: &Value) -> Option<Resource> {
    if expression == "*" {
        return Some(Resource::Any);
    }
    if expression["Ref"] == "PublicRequest" {
        return Some(Resource::PublicRequest);
    }
    if expression["Ref"] == "RelayService" {
        return Some(Resource::RelayService);
    }
    if let Some(attribute) = expression["Fn::GetAtt"].as_str() {
        return match attribute.strip_suffix(".Arn")? {
            "ConnectionsTable" => Some(Resource::Connections),
            "MailboxesTable" => Some(Resource::Mailboxes),
            "DeliveriesTable" => Some(Resource::Deliveries),
            "DeadLetters" => Some(Resource::DeadLetters),
            "Redeliveries" => Some(Resource::Redeliveries),
            other => match other.strip_suffix("LambdaFunction") {
                Some(function) => Some(Resource::Function(function.to_lowercase())),
                None => other.strip_suffix("LogGroup").map(|function| Resource::Log(function.to_lowercase())),
            },
        };
    }
    let arn = expression["Fn::Sub"].as_str()?;
    let arn = arn.strip_prefix("arn:${AWS::Partition}:")?;
    match arn.strip_prefix("states:${AWS::Region}:${AWS::AccountId}:") {
        Some("stateMachine:${self:custom.names.delivery}") => return Some(Resource::Delivery),
        Some("execution:${self:custom.names.delivery}:*") => return Some(Resource::DeliveryRuns),
        _ => {}
    }
    if let Some(queue) = arn.strip_prefix("sqs:${AWS::Region}:${AWS::AccountId}:") {
        return (queue == "${self:custom.names.mailboxes}*").then_some(Resource::Queues);
    }
    if arn == "application-autoscaling:${AWS::Region}:${AWS::AccountId}:scalable-target/*" {
        return Some(Resource::Tasks);
    }
    if arn == "s3:::${ServerlessDeploymentBucket}/serverless/${self:service}/${sls:stage}/relay/*" {
        return Some(Resource::RelayProgram);
    }
    let path = arn.strip_prefix("execute-api:${AWS::Region}:${AWS::AccountId}:${AgentsApi}/${sls:stage}/")?;
    path.strip_suffix("/@connections/*").map(|method| Resource::Link(method.to_owned()))
}

/// A list, or the one thing that stands where a list may.
fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(all) => all,
        Value::Null => &[],
        one => std::slice::from_ref(one),
    }
}

fn object<'a>(value: &'a Value, key: &str) -> Result<&'a Map<String, Value>, StackError> {
    value.get(key).and_then(Value::as_object).ok_or_else(|| StackError(format!("no {key}")))
}

fn text(value: &Value, key: &str) -> Result<String, StackError> {
    value[key].as_str().map(str::to_owned).ok_or_else(|| StackError(format!("no {key}")))
}

/// Reads YAML with CloudFormation's short forms; what they stand for is `{"Fn::Name": …}`.
/// A file with CloudFormation's tags as JSON.
pub(crate) fn read(text: &str) -> Result<Value, StackError> {
    let documents = Yaml::load_from_str(text).map_err(|error| StackError(error.to_string()))?;
    documents.first().map(json).ok_or_else(|| StackError("an empty file".into()))
}

fn json(node: &Yaml<'_>) -> Value {
    match node {
        Yaml::Value(Scalar::Boolean(value)) => Value::from(*value),
        Yaml::Value(Scalar::Integer(value)) => Value::from(*value),
        Yaml::Value(Scalar::FloatingPoint(value)) => Value::from(value.into_inner()),
        Yaml::Value(Scalar::String(value)) => Value::from(value.as_ref()),
        Yaml::Sequence(all) => all.iter().map(json).collect(),
        Yaml::Mapping(all) => all
            .iter()
            .map(|(key, value)| (key.as_str().unwrap_or_default().to_owned(), json(value)))
            .collect(),
        Yaml::Tagged(tag, inner) => {
            let name = match tag.suffix.as_str() {
                name @ ("Ref" | "Condition") => name.to_owned(),
                name => format!("Fn::{name}"),
            };
            Value::Object(Map::from_iter([(name, json(inner))]))
        }
        Yaml::Value(Scalar::Null) | Yaml::Representation(..) | Yaml::Alias(_) | Yaml::BadValue => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_files_of_this_version() {
        let stack = stack();
        let ingress = &stack.functions["ingress"];
        assert_eq!(ingress.timeout, Duration::from_secs(300));
        assert!(ingress.variables.contains("TUNNEL_TOKEN_KEYS"));
        let starts = Permission {
            action: "states:StartSyncExecution".into(),
            resource: Resource::PublicRequest,
            rows: Rows::Any,
        };
        assert!(ingress.permissions.contains(&starts));
        let counts = Permission {
            action: "dynamodb:UpdateItem".into(),
            resource: Resource::Connections,
            rows: Rows::Like(vec!["#use#*".into()]),
        };
        assert!(ingress.permissions.contains(&counts), "{:?}", ingress.permissions);
        assert_eq!(stack.connections.partition, "tunnel");
        assert_eq!(stack.connections.expiry.as_deref(), Some("expires_at"));
        assert_eq!(stack.mailboxes.expiry, None);
        assert_eq!(stack.workflow.kind, "EXPRESS");
    }

    fn replaced(from: &str, to: &str) -> Result<Stack, StackError> {
        assert!(FILES.iter().any(|file| file.contains(from)), "{from}");
        let files: Vec<String> = FILES.iter().map(|file| file.replace(from, to)).collect();
        Stack::parse(files.iter().map(String::as_str))
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (from, to) in [
            ("timeout: 120", "timeout: long"),
            ("role: IngressRole", "role: NoRole"),
            ("Effect: Allow", "Effect: Deny"),
            ("!GetAtt MailboxesTable.Arn", "!GetAtt OtherTable.Name"),
            ("GET/@connections/*", "GET/*"),
            ("KeyType: RANGE", "KeyType: OTHER"),
            ("ForAllValues:StringLike", "ForAnyValue:StringLike"),
            ("dynamodb:LeadingKeys", "dynamodb:Attributes"),
            ("'#use#*'", "'#*use'"),
            ("'#use#*'", "'#us?#'"),
            ("'#use#*'", "['#use#*', !Ref X]"),
            ("dynamodb:LeadingKeys: '#use#*'", "dynamodb:LeadingKeys: []"),
            ("dynamodb:LeadingKeys: '#use#*'", "{dynamodb:LeadingKeys: '#use#*', dynamodb:Select: X}"),
            // It names no row, so the condition would hold.
            ("Action: dynamodb:UpdateItem", "Action: [dynamodb:UpdateItem, dynamodb:Scan]"),
            ("scalable-target/*", "scalable-target/1"),
            (
                "application-autoscaling:service-namespace: ecs",
                "application-autoscaling:service-namespace: rds",
            ),
            ("/relay/*", "/*"),
            ("functions:", "others:"),
        ] {
            assert!(replaced(from, to).is_err(), "{from} as {to}");
        }
    }

    #[test]
    fn rows_are_those_that_are_like_a_pattern_or_like_none() {
        let patterns = || vec!["#revoked".to_owned(), "#use#*".to_owned()];
        for (key, is_like) in [
            ("#revoked", true),
            ("#revoked1", false),
            ("#use#", true),
            ("#use#tunnel#web", true),
            ("#use", false),
            ("web", false),
        ] {
            assert_eq!(Rows::Like(patterns()).have(Some(key)), is_like, "{key}");
            assert_eq!(Rows::NotLike(patterns()).have(Some(key)), !is_like, "{key}");
            assert!(Rows::Any.have(Some(key)));
        }
        assert!(
            Rows::Any.have(None)
                && !Rows::Like(patterns()).have(None)
                && !Rows::NotLike(patterns()).have(None)
        );
    }

    #[test]
    fn an_anchor_and_a_short_form_are_what_they_stand_for() {
        let value = read("a: &a {b: !Ref X}\nc: *a\nd: !GetAtt Y.Arn\ne: ['*', 1, true, ~]").unwrap();
        let expected = serde_json::json!({
            "a": {"b": {"Ref": "X"}}, "c": {"b": {"Ref": "X"}}, "d": {"Fn::GetAtt": "Y.Arn"},
            "e": ["*", 1, true, null],
        });
        assert_eq!(value, expected);
    }
}
