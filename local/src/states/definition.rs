//! The definition of a state machine: enters Amazon States Language and the machine's type, leaves states
//! that were checked, or one sentence about what is wrong. What is not built here is refused here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use proto::limits;
use serde_json::{Map, Value};

use super::jsonata::Expression;

/// Why a definition was refused, in the words of Step Functions where it would refuse it too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Invalid State Machine Definition: '{code}: {problem} at {path}'")]
pub struct DefinitionError {
    code: &'static str,
    problem: String,
    path: String,
}

impl DefinitionError {
    fn schema(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { code: "SCHEMA_VALIDATION_FAILED", problem: problem.into(), path: path.into() }
    }
}

type Result<T> = std::result::Result<T, DefinitionError>;

/// The type of a machine, which says how its runs are started and what they may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineType {
    /// Runs last five minutes at most; their caller waits for them.
    Express,
    /// Runs last up to a year, keep a history and may wait for task tokens.
    Standard,
}

/// A checked state machine.
#[derive(Debug, Clone)]
pub struct Definition {
    pub(super) machine_type: MachineType,
    pub(super) start: usize,
    pub(super) timeout: Duration,
    pub(super) states: Vec<State>,
}

/// One state.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) name: Arc<str>,
    pub(super) kind: Kind,
    pub(super) assign: Assign,
    pub(super) output: Option<Template>,
}

/// The variables that a state, a rule or a catcher assigns.
pub(super) type Assign = Vec<(Arc<str>, Template)>;

/// What a state does.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    Task(Box<Task>),
    Choice { rules: Vec<Rule>, default: Option<usize> },
    Pass(Next),
    Wait { seconds: Template, next: Next },
    Succeed,
    Fail { error: Option<Template>, cause: Option<Template> },
}

/// Where a run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    State(usize),
    End,
}

#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) resource: Resource,
    /// Whether the task ends with its call, or when somebody answers with the task's token.
    pub(super) waits_for_token: bool,
    pub(super) arguments: Vec<(Box<str>, Template)>,
    pub(super) timeout: Period,
    pub(super) heartbeat: Option<Period>,
    pub(super) retry: Vec<Retrier>,
    pub(super) catch: Vec<Catcher>,
    pub(super) next: Next,
}

/// A time of a task.
#[derive(Debug, Clone)]
pub(super) enum Period {
    Fixed(Duration),
    /// A number of seconds, evaluated when the task begins.
    Computed(Expression),
}

#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) condition: Expression,
    pub(super) assign: Assign,
    pub(super) output: Option<Template>,
    pub(super) next: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Retrier {
    pub(super) errors: Vec<Box<str>>,
    pub(super) interval: Duration,
    pub(super) backoff_rate: f64,
    pub(super) max_attempts: u32,
    pub(super) max_delay: Option<Duration>,
    pub(super) jitter: Jitter,
}

/// Whether a retrier waits exactly its interval or any time up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Jitter {
    None,
    Full,
}

#[derive(Debug, Clone)]
pub(super) struct Catcher {
    pub(super) errors: Vec<Box<str>>,
    pub(super) assign: Assign,
    pub(super) output: Option<Template>,
    pub(super) next: usize,
}

/// A JSON value in which strings may be expressions.
#[derive(Debug, Clone)]
pub(super) enum Template {
    Literal(Value),
    Expression(Expression),
    Array(Vec<Self>),
    Object(Vec<(Box<str>, Self)>),
}

/// A service integration that runs here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// `arn:aws:states:::aws-sdk:dynamodb:query`
    DynamoDbQuery,
    /// `arn:aws:states:::dynamodb:getItem`
    DynamoDbGetItem,
    /// `arn:aws:states:::dynamodb:putItem`
    DynamoDbPutItem,
    /// `arn:aws:states:::aws-sdk:dynamodb:putItem`
    DynamoDbSdkPutItem,
    /// `arn:aws:states:::dynamodb:updateItem`
    DynamoDbUpdateItem,
    /// `arn:aws:states:::dynamodb:deleteItem`
    DynamoDbDeleteItem,
    /// `arn:aws:states:::aws-sdk:sqs:receiveMessage`
    SqsReceiveMessage,
    /// `arn:aws:states:::aws-sdk:sqs:deleteMessage`
    SqsDeleteMessage,
    /// `arn:aws:states:::sqs:sendMessage`
    SqsSendMessage,
    /// `arn:aws:states:::apigateway:invoke`
    ApiGatewayInvoke,
    /// `arn:aws:states:::lambda:invoke`
    LambdaInvoke,
}

/// What follows the name of a resource whose task waits for its token.
pub(super) const WAIT_FOR_TASK_TOKEN: &str = ".waitForTaskToken";

/// The longest run of a STANDARD machine (Step Functions Developer Guide, "Service quotas": one year, hard).
const STANDARD_RUN_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The longest time that a field in seconds may give.
pub(super) const SECONDS_MAX: u64 = 99_999_999;

/// What `PutItem` takes, whichever way it is called.
const PUT_ITEM: &[&str] = &[
    "TableName",
    "Item",
    "ConditionExpression",
    "ExpressionAttributeNames",
    "ExpressionAttributeValues",
    "ReturnValues",
];

const RESOURCES: &[(&str, Resource, &[&str])] = &[
    (
        "arn:aws:states:::aws-sdk:dynamodb:query",
        Resource::DynamoDbQuery,
        &[
            "TableName",
            "IndexName",
            "KeyConditionExpression",
            "FilterExpression",
            "ProjectionExpression",
            "ExpressionAttributeNames",
            "ExpressionAttributeValues",
            "ConsistentRead",
            "ScanIndexForward",
            "Limit",
            "Select",
        ],
    ),
    (
        "arn:aws:states:::dynamodb:getItem",
        Resource::DynamoDbGetItem,
        &["TableName", "Key", "ConsistentRead", "ProjectionExpression", "ExpressionAttributeNames"],
    ),
    ("arn:aws:states:::dynamodb:putItem", Resource::DynamoDbPutItem, PUT_ITEM),
    ("arn:aws:states:::aws-sdk:dynamodb:putItem", Resource::DynamoDbSdkPutItem, PUT_ITEM),
    (
        "arn:aws:states:::dynamodb:updateItem",
        Resource::DynamoDbUpdateItem,
        &[
            "TableName",
            "Key",
            "UpdateExpression",
            "ConditionExpression",
            "ExpressionAttributeNames",
            "ExpressionAttributeValues",
            "ReturnValues",
        ],
    ),
    (
        "arn:aws:states:::dynamodb:deleteItem",
        Resource::DynamoDbDeleteItem,
        &[
            "TableName",
            "Key",
            "ConditionExpression",
            "ExpressionAttributeNames",
            "ExpressionAttributeValues",
            "ReturnValues",
        ],
    ),
    (
        "arn:aws:states:::aws-sdk:sqs:receiveMessage",
        Resource::SqsReceiveMessage,
        &[
            "QueueUrl",
            "MaxNumberOfMessages",
            "VisibilityTimeout",
            "WaitTimeSeconds",
            "AttributeNames",
            "MessageAttributeNames",
        ],
    ),
    (
        "arn:aws:states:::aws-sdk:sqs:deleteMessage",
        Resource::SqsDeleteMessage,
        &["QueueUrl", "ReceiptHandle"],
    ),
    (
        "arn:aws:states:::sqs:sendMessage",
        Resource::SqsSendMessage,
        &["QueueUrl", "MessageBody", "MessageAttributes"],
    ),
    (
        "arn:aws:states:::apigateway:invoke",
        Resource::ApiGatewayInvoke,
        &["ApiEndpoint", "Method", "Stage", "Path", "RequestBody", "AuthType", "Headers"],
    ),
    ("arn:aws:states:::lambda:invoke", Resource::LambdaInvoke, &["FunctionName", "Payload"]),
];

impl Resource {
    /// The resource as a state machine names it.
    #[must_use]
    pub fn arn(self) -> &'static str {
        RESOURCES.iter().find(|(_, resource, _)| *resource == self).map_or("", |(arn, _, _)| arn)
    }

    /// Whether a task may wait for its token after this call. The optimised integrations of DynamoDB do not.
    const fn takes_token(self) -> bool {
        matches!(self, Self::DynamoDbSdkPutItem | Self::LambdaInvoke | Self::SqsSendMessage)
    }
}

impl Definition {
    /// Reads the definition of an EXPRESS machine, as [`Definition::parse_as`] does.
    ///
    /// # Errors
    ///
    /// Those of [`Definition::parse_as`].
    pub fn parse(text: &str, substitutions: &BTreeMap<String, String>) -> Result<Self> {
        Self::parse_as(MachineType::Express, text, substitutions)
    }

    /// Reads a definition in which every `${Name}` is replaced by the substitution of that name.
    ///
    /// # Errors
    ///
    /// What Step Functions refuses for a machine of this type, what does not run here, and a task without a
    /// timeout.
    pub fn parse_as(
        machine_type: MachineType,
        text: &str,
        substitutions: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let text = substitute(text, substitutions)?;
        let machine: Value = serde_json::from_str(&text).map_err(|error| DefinitionError {
            code: "INVALID_JSON_DESCRIPTION",
            problem: error.to_string(),
            path: "/".to_owned(),
        })?;
        let machine = object(&machine, "/")?;
        known(machine, "", &["Comment", "QueryLanguage", "Version", "StartAt", "TimeoutSeconds", "States"])?;
        if machine.get("QueryLanguage").and_then(Value::as_str) != Some("JSONata") {
            return Err(DefinitionError::schema("/QueryLanguage", "only machines with JSONata run here"));
        }
        let longest = match machine_type {
            MachineType::Express => limits::RUN_DURATION,
            MachineType::Standard => STANDARD_RUN_DURATION,
        };
        let timeout = match machine.get("TimeoutSeconds") {
            None => longest,
            Some(value) => seconds(value, "/TimeoutSeconds")?.min(longest),
        };
        let states = object(machine.get("States").unwrap_or(&Value::Null), "/States")?;
        let reader = Reader {
            machine_type,
            index: states.keys().enumerate().map(|(index, name)| (name.as_str(), index)).collect(),
            assigned: assigned_names(&Value::Object(states.clone())),
        };
        let start = reader.target(machine.get("StartAt"), "/StartAt")?;
        let parsed =
            states.iter().map(|(name, state)| reader.state(name, state)).collect::<Result<Vec<_>>>()?;
        let definition = Self { machine_type, start, timeout, states: parsed };
        if let Some(name) = definition.unreachable() {
            return Err(DefinitionError::schema(format!("/States/{name}"), "the state is never reached"));
        }
        Ok(definition)
    }

    /// What runs of this machine may do.
    #[must_use]
    pub fn machine_type(&self) -> MachineType {
        self.machine_type
    }

    /// The names of all states, in the order of the file.
    pub fn state_names(&self) -> impl Iterator<Item = &str> {
        self.states.iter().map(|state| &*state.name)
    }

    /// The place of a state.
    pub(super) fn state(&self, name: &str) -> Option<usize> {
        self.states.iter().position(|state| &*state.name == name)
    }

    fn unreachable(&self) -> Option<&str> {
        let mut reached = vec![false; self.states.len()];
        let mut open = vec![self.start];
        while let Some(index) = open.pop() {
            if std::mem::replace(&mut reached[index], true) {
                continue;
            }
            let mut go_on = |next: Next| {
                if let Next::State(next) = next {
                    open.push(next);
                }
            };
            match &self.states[index].kind {
                Kind::Task(task) => {
                    go_on(task.next);
                    open.extend(task.catch.iter().map(|catcher| catcher.next));
                }
                Kind::Choice { rules, default } => {
                    open.extend(rules.iter().map(|rule| rule.next).chain(*default));
                }
                Kind::Pass(next) | Kind::Wait { next, .. } => go_on(*next),
                Kind::Succeed | Kind::Fail { .. } => {}
            }
        }
        reached.iter().position(|reached| !reached).map(|index| &*self.states[index].name)
    }
}

/// Replaces every `${Name}`. The value is written as the inside of a JSON string.
fn substitute(text: &str, substitutions: &BTreeMap<String, String>) -> Result<String> {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = rest.split_at(at);
        replaced.push_str(before);
        let Some(end) = after.find('}') else {
            return Err(DefinitionError::schema("/", "a substitution is not closed"));
        };
        let name = &after[2..end];
        let is_pascal_case = name.starts_with(|c: char| c.is_ascii_uppercase())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !is_pascal_case {
            return Err(DefinitionError::schema("/", format!("${{{name}}} is not a name in PascalCase")));
        }
        let value = substitutions
            .get(name)
            .ok_or_else(|| DefinitionError::schema("/", format!("nothing was supplied for ${{{name}}}")))?;
        let quoted = Value::String(value.clone()).to_string();
        replaced.push_str(&quoted[1..quoted.len() - 1]);
        rest = &after[end + 1..];
    }
    replaced.push_str(rest);
    Ok(replaced)
}

/// Every name that any `Assign` gives a value.
fn assigned_names(value: &Value) -> BTreeSet<Box<str>> {
    fn visit(value: &Value, names: &mut BTreeSet<Box<str>>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    if name == "Assign"
                        && let Value::Object(variables) = field
                    {
                        names.extend(variables.keys().map(|name| name.as_str().into()));
                    }
                    visit(field, names);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| visit(item, names)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut names = BTreeSet::new();
    visit(value, &mut names);
    names
}

struct Reader<'t> {
    machine_type: MachineType,
    index: BTreeMap<&'t str, usize>,
    assigned: BTreeSet<Box<str>>,
}

impl Reader<'_> {
    fn state(&self, name: &str, state: &Value) -> Result<State> {
        let path = format!("/States/{name}");
        if name.chars().count() > 80 {
            return Err(DefinitionError::schema(path, "a state's name may have 80 characters"));
        }
        let fields = object(state, &path)?;
        if let Some(language) = fields.get("QueryLanguage")
            && language.as_str() != Some("JSONata")
        {
            return Err(DefinitionError::schema(
                format!("{path}/QueryLanguage"),
                "only machines with JSONata run here",
            ));
        }
        let common = ["Type", "Comment", "QueryLanguage"];
        let allow = |more: &[&str]| known(fields, &path, &[&common[..], more].concat());
        let kind = match text(fields.get("Type"), &format!("{path}/Type"))? {
            "Task" => {
                allow(&[
                    "Resource",
                    "Arguments",
                    "TimeoutSeconds",
                    "HeartbeatSeconds",
                    "Retry",
                    "Catch",
                    "Assign",
                    "Output",
                    "Next",
                    "End",
                ])?;
                Kind::Task(Box::new(self.task(fields, &path)?))
            }
            "Choice" => {
                allow(&["Choices", "Default", "Assign", "Output"])?;
                let rules = array(fields.get("Choices"), &format!("{path}/Choices"))?
                    .iter()
                    .enumerate()
                    .map(|(at, rule)| self.rule(rule, &format!("{path}/Choices[{at}]")))
                    .collect::<Result<Vec<_>>>()?;
                if rules.is_empty() {
                    return Err(DefinitionError::schema(format!("{path}/Choices"), "there is no choice"));
                }
                let default = fields
                    .get("Default")
                    .map(|target| self.target(Some(target), &format!("{path}/Default")))
                    .transpose()?;
                Kind::Choice { rules, default }
            }
            "Pass" => {
                allow(&["Assign", "Output", "Next", "End"])?;
                Kind::Pass(self.next(fields, &path)?)
            }
            "Wait" => {
                allow(&["Seconds", "Assign", "Output", "Next", "End"])?;
                let seconds = fields
                    .get("Seconds")
                    .ok_or_else(|| DefinitionError::schema(&path, "only a Wait for Seconds runs here"))?;
                Kind::Wait {
                    seconds: self.template(seconds, &format!("{path}/Seconds"))?,
                    next: self.next(fields, &path)?,
                }
            }
            "Succeed" => {
                allow(&["Output"])?;
                Kind::Succeed
            }
            "Fail" => {
                allow(&["Error", "Cause"])?;
                let part = |name: &str| {
                    fields.get(name).map(|value| self.template(value, &format!("{path}/{name}"))).transpose()
                };
                Kind::Fail { error: part("Error")?, cause: part("Cause")? }
            }
            other => {
                return Err(DefinitionError::schema(
                    format!("{path}/Type"),
                    format!("states of type {other} do not run here"),
                ));
            }
        };
        Ok(State {
            name: name.into(),
            kind,
            assign: self.assign(fields, &path)?,
            output: self.output(fields, &path)?,
        })
    }

    fn task(&self, fields: &Map<String, Value>, path: &str) -> Result<Task> {
        let at_resource = format!("{path}/Resource");
        let arn = text(fields.get("Resource"), &at_resource)?;
        if self.machine_type == MachineType::Express {
            // The second blank belongs to Step Functions' own message.
            for pattern in [WAIT_FOR_TASK_TOKEN, ".sync"] {
                if arn.contains(pattern) {
                    return Err(DefinitionError::schema(
                        at_resource,
                        format!("Express state machine does not support '{pattern}' service integration "),
                    ));
                }
            }
            if arn.contains(":activity:") {
                return Err(DefinitionError::schema(
                    at_resource,
                    "Express state machine does not support Activity ARN",
                ));
            }
        }
        let (called, waits_for_token) =
            arn.strip_suffix(WAIT_FOR_TASK_TOKEN).map_or((arn, false), |called| (called, true));
        let found = RESOURCES
            .iter()
            .find(|(name, resource, _)| *name == called && (!waits_for_token || resource.takes_token()));
        let Some((_, resource, allowed)) = found else {
            return Err(DefinitionError::schema(
                at_resource,
                format!("the resource {arn} does not run here"),
            ));
        };
        let at_arguments = format!("{path}/Arguments");
        let arguments = match fields.get("Arguments") {
            Some(value) => object(value, &at_arguments)?,
            None => return Err(DefinitionError::schema(at_arguments, "there are no arguments")),
        };
        known(arguments, &at_arguments, allowed)?;
        if *resource == Resource::ApiGatewayInvoke
            && arguments.get("AuthType").and_then(Value::as_str) != Some("IAM_ROLE")
        {
            return Err(DefinitionError::schema(
                format!("{at_arguments}/AuthType"),
                "posting to a connection takes AuthType IAM_ROLE",
            ));
        }
        if waits_for_token && !mentions(arguments.values(), "$states.context.Task.Token") {
            return Err(DefinitionError::schema(
                at_arguments,
                "nobody is given $states.context.Task.Token, so nobody could answer",
            ));
        }
        let arguments = arguments
            .iter()
            .map(|(name, value)| {
                Ok((name.as_str().into(), self.template(value, &format!("{at_arguments}/{name}"))?))
            })
            .collect::<Result<Vec<_>>>()?;
        let timeout = match fields.get("TimeoutSeconds") {
            Some(value) => self.period(value, &format!("{path}/TimeoutSeconds"))?,
            None => return Err(DefinitionError::schema(path, "every Task has TimeoutSeconds here")),
        };
        let at_heartbeat = format!("{path}/HeartbeatSeconds");
        let heartbeat = match fields.get("HeartbeatSeconds") {
            None => None,
            Some(_) if !waits_for_token => {
                return Err(DefinitionError::schema(
                    at_heartbeat,
                    "only a task that waits for its token has it",
                ));
            }
            Some(value) => Some(self.period(value, &at_heartbeat)?),
        };
        if let (Some(Period::Fixed(heartbeat)), Period::Fixed(timeout)) = (&heartbeat, &timeout)
            && heartbeat >= timeout
        {
            return Err(DefinitionError::schema(at_heartbeat, "is not less than TimeoutSeconds"));
        }
        let list = |name: &str| match fields.get(name) {
            None => Ok(&[][..]),
            Some(value) => array(Some(value), &format!("{path}/{name}")).map(Vec::as_slice),
        };
        let retry = list("Retry")?
            .iter()
            .enumerate()
            .map(|(at, retrier)| self.retrier(retrier, &format!("{path}/Retry[{at}]")))
            .collect::<Result<Vec<_>>>()?;
        let catch = list("Catch")?
            .iter()
            .enumerate()
            .map(|(at, catcher)| self.catcher(catcher, &format!("{path}/Catch[{at}]")))
            .collect::<Result<Vec<_>>>()?;
        last_catches_all(retry.iter().map(|retrier| &retrier.errors[..]), &format!("{path}/Retry"))?;
        last_catches_all(catch.iter().map(|catcher| &catcher.errors[..]), &format!("{path}/Catch"))?;
        let next = self.next(fields, path)?;
        Ok(Task { resource: *resource, waits_for_token, arguments, timeout, heartbeat, retry, catch, next })
    }

    /// A number of seconds, or an expression that gives one.
    fn period(&self, value: &Value, path: &str) -> Result<Period> {
        match self.template(value, path)? {
            Template::Expression(expression) => Ok(Period::Computed(expression)),
            Template::Literal(value) => seconds(&value, path).map(Period::Fixed),
            Template::Array(_) | Template::Object(_) => {
                Err(DefinitionError::schema(path, "is not a whole number of seconds"))
            }
        }
    }

    fn rule(&self, rule: &Value, path: &str) -> Result<Rule> {
        let fields = object(rule, path)?;
        known(fields, path, &["Comment", "Condition", "Assign", "Output", "Next"])?;
        let at_condition = format!("{path}/Condition");
        let condition = match self.template(fields.get("Condition").unwrap_or(&Value::Null), &at_condition)? {
            Template::Expression(expression) => expression,
            Template::Literal(_) | Template::Array(_) | Template::Object(_) => {
                return Err(DefinitionError::schema(at_condition, "a condition is one expression"));
            }
        };
        Ok(Rule {
            condition,
            assign: self.assign(fields, path)?,
            output: self.output(fields, path)?,
            next: self.target(fields.get("Next"), &format!("{path}/Next"))?,
        })
    }

    fn retrier(&self, retrier: &Value, path: &str) -> Result<Retrier> {
        let fields = object(retrier, path)?;
        known(
            fields,
            path,
            &[
                "Comment",
                "ErrorEquals",
                "IntervalSeconds",
                "BackoffRate",
                "MaxAttempts",
                "MaxDelaySeconds",
                "JitterStrategy",
            ],
        )?;
        let backoff_rate = match fields.get("BackoffRate") {
            None => 2.0,
            Some(rate) => rate.as_f64().filter(|rate| *rate >= 1.0).ok_or_else(|| {
                DefinitionError::schema(format!("{path}/BackoffRate"), "is not a number of at least 1")
            })?,
        };
        let max_attempts = match fields.get("MaxAttempts") {
            None => 3,
            Some(attempts) => {
                attempts.as_u64().and_then(|attempts| u32::try_from(attempts).ok()).ok_or_else(|| {
                    DefinitionError::schema(format!("{path}/MaxAttempts"), "is not a whole number")
                })?
            }
        };
        let jitter = match fields.get("JitterStrategy").map(|strategy| strategy.as_str()) {
            None | Some(Some("NONE")) => Jitter::None,
            Some(Some("FULL")) => Jitter::Full,
            Some(_) => {
                return Err(DefinitionError::schema(
                    format!("{path}/JitterStrategy"),
                    "is neither FULL nor NONE",
                ));
            }
        };
        let duration =
            |name: &str| fields.get(name).map(|value| seconds(value, &format!("{path}/{name}"))).transpose();
        Ok(Retrier {
            errors: errors(fields, path)?,
            interval: duration("IntervalSeconds")?.unwrap_or(Duration::from_secs(1)),
            backoff_rate,
            max_attempts,
            max_delay: duration("MaxDelaySeconds")?,
            jitter,
        })
    }

    fn catcher(&self, catcher: &Value, path: &str) -> Result<Catcher> {
        let fields = object(catcher, path)?;
        known(fields, path, &["Comment", "ErrorEquals", "Assign", "Output", "Next"])?;
        Ok(Catcher {
            errors: errors(fields, path)?,
            assign: self.assign(fields, path)?,
            output: self.output(fields, path)?,
            next: self.target(fields.get("Next"), &format!("{path}/Next"))?,
        })
    }

    fn assign(&self, fields: &Map<String, Value>, path: &str) -> Result<Assign> {
        let Some(assign) = fields.get("Assign") else { return Ok(Vec::new()) };
        let path = format!("{path}/Assign");
        object(assign, &path)?
            .iter()
            .map(|(name, value)| {
                if name == "states" || name.is_empty() || name.chars().count() > 80 {
                    return Err(DefinitionError::schema(format!("{path}/{name}"), "is no variable's name"));
                }
                Ok((name.as_str().into(), self.template(value, &format!("{path}/{name}"))?))
            })
            .collect()
    }

    fn output(&self, fields: &Map<String, Value>, path: &str) -> Result<Option<Template>> {
        fields.get("Output").map(|value| self.template(value, &format!("{path}/Output"))).transpose()
    }

    fn template(&self, value: &Value, path: &str) -> Result<Template> {
        Ok(match value {
            Value::String(text) => match text.strip_prefix("{%").and_then(|text| text.strip_suffix("%}")) {
                None if text.starts_with("{%") || text.ends_with("%}") => {
                    return Err(DefinitionError::schema(
                        path,
                        "an expression is the whole string, from {% to %}",
                    ));
                }
                None => Template::Literal(value.clone()),
                Some(source) => Template::Expression(
                    Expression::proven(source, &self.assigned)
                        .map_err(|error| DefinitionError::schema(path, error.to_string()))?,
                ),
            },
            Value::Array(items) => {
                let items = items
                    .iter()
                    .enumerate()
                    .map(|(at, item)| self.template(item, &format!("{path}[{at}]")))
                    .collect::<Result<Vec<_>>>()?;
                if items.iter().all(|item| matches!(item, Template::Literal(_))) {
                    Template::Literal(value.clone())
                } else {
                    Template::Array(items)
                }
            }
            Value::Object(fields) => {
                let parsed = fields
                    .iter()
                    .map(|(name, field)| {
                        if name.ends_with(".$") {
                            return Err(DefinitionError::schema(
                                format!("{path}/{name}"),
                                "JSONPath is not used in machines with JSONata",
                            ));
                        }
                        Ok((name.as_str().into(), self.template(field, &format!("{path}/{name}"))?))
                    })
                    .collect::<Result<Vec<(Box<str>, _)>>>()?;
                if parsed.iter().all(|(_, field)| matches!(field, Template::Literal(_))) {
                    Template::Literal(value.clone())
                } else {
                    Template::Object(parsed)
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => Template::Literal(value.clone()),
        })
    }

    fn next(&self, fields: &Map<String, Value>, path: &str) -> Result<Next> {
        match (fields.get("Next"), fields.get("End")) {
            (Some(next), None) => self.target(Some(next), &format!("{path}/Next")).map(Next::State),
            (None, Some(Value::Bool(true))) => Ok(Next::End),
            _ => Err(DefinitionError::schema(path, "takes either Next or \"End\": true")),
        }
    }

    fn target(&self, name: Option<&Value>, path: &str) -> Result<usize> {
        let name = text(name, path)?;
        self.index.get(name).copied().ok_or_else(|| DefinitionError {
            code: "MISSING_TRANSITION_TARGET",
            problem: format!("there is no state {name:?}"),
            path: path.to_owned(),
        })
    }
}

fn errors(fields: &Map<String, Value>, path: &str) -> Result<Vec<Box<str>>> {
    let path = format!("{path}/ErrorEquals");
    let errors = array(fields.get("ErrorEquals"), &path)?
        .iter()
        .map(|name| text(Some(name), &path).map(Into::into))
        .collect::<Result<Vec<Box<str>>>>()?;
    if errors.is_empty() {
        return Err(DefinitionError::schema(path, "names no error"));
    }
    Ok(errors)
}

/// `States.ALL` stands alone, and last.
fn last_catches_all<'e>(lists: impl ExactSizeIterator<Item = &'e [Box<str>]>, path: &str) -> Result<()> {
    let count = lists.len();
    for (at, errors) in lists.enumerate() {
        let catches_all = errors.iter().any(|name| &**name == "States.ALL");
        if catches_all && (errors.len() > 1 || at + 1 < count) {
            return Err(DefinitionError::schema(
                format!("{path}[{at}]/ErrorEquals"),
                "States.ALL stands alone and last",
            ));
        }
    }
    Ok(())
}

/// Whether a text in these values has the words.
fn mentions<'v>(values: impl IntoIterator<Item = &'v Value>, words: &str) -> bool {
    values.into_iter().any(|value| match value {
        Value::String(text) => text.contains(words),
        Value::Array(items) => mentions(items, words),
        Value::Object(fields) => mentions(fields.values(), words),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    })
}

fn known(fields: &Map<String, Value>, path: &str, names: &[&str]) -> Result<()> {
    match fields.keys().find(|name| !names.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(DefinitionError::schema(
            format!("{path}/{name}"),
            "the field does not exist, or is not one that runs here,",
        )),
    }
}

fn object<'v>(value: &'v Value, path: &str) -> Result<&'v Map<String, Value>> {
    value.as_object().ok_or_else(|| DefinitionError::schema(path, "is not an object"))
}

fn array<'v>(value: Option<&'v Value>, path: &str) -> Result<&'v Vec<Value>> {
    value.and_then(Value::as_array).ok_or_else(|| DefinitionError::schema(path, "is not an array"))
}

fn text<'v>(value: Option<&'v Value>, path: &str) -> Result<&'v str> {
    value.and_then(Value::as_str).ok_or_else(|| DefinitionError::schema(path, "is missing or not a string"))
}

fn seconds(value: &Value, path: &str) -> Result<Duration> {
    value
        .as_u64()
        .filter(|seconds| (1..=SECONDS_MAX).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| DefinitionError::schema(path, "is not a whole number of seconds"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(machine: &Value) -> std::result::Result<Definition, String> {
        Definition::parse(&machine.to_string(), &BTreeMap::new()).map_err(|error| error.to_string())
    }

    fn parse_standard(machine: &Value) -> std::result::Result<Definition, String> {
        Definition::parse_as(MachineType::Standard, &machine.to_string(), &BTreeMap::new())
            .map_err(|error| error.to_string())
    }

    fn with_task(change: impl FnOnce(&mut Value)) -> Value {
        let mut task = json!({
            "Type": "Task",
            "Resource": "arn:aws:states:::aws-sdk:sqs:deleteMessage",
            "Arguments": { "QueueUrl": "{% $states.input.q %}", "ReceiptHandle": "r" },
            "TimeoutSeconds": 5,
            "End": true
        });
        change(&mut task);
        json!({ "QueryLanguage": "JSONata", "StartAt": "Publish", "States": { "Publish": task } })
    }

    #[test]
    fn takes_a_machine_that_aws_takes() {
        let definition = parse(&with_task(|_| {})).unwrap();
        assert_eq!(definition.state_names().collect::<Vec<_>>(), ["Publish"]);
        assert_eq!(definition.timeout, limits::RUN_DURATION);
    }

    #[test]
    fn refuses_what_express_refuses_in_its_words() {
        let with_resource = |arn: &str| parse(&with_task(|task| task["Resource"] = arn.into())).unwrap_err();
        assert_eq!(
            with_resource("arn:aws:states:::sqs:sendMessage.waitForTaskToken"),
            "Invalid State Machine Definition: 'SCHEMA_VALIDATION_FAILED: Express state machine does not \
             support '.waitForTaskToken' service integration  at /States/Publish/Resource'"
        );
        assert_eq!(
            with_resource("arn:aws:states:::states:startExecution.sync:2"),
            "Invalid State Machine Definition: 'SCHEMA_VALIDATION_FAILED: Express state machine does not \
             support '.sync' service integration  at /States/Publish/Resource'"
        );
        assert_eq!(
            with_resource("arn:aws:states:eu-central-1:000000000000:activity:wait"),
            "Invalid State Machine Definition: 'SCHEMA_VALIDATION_FAILED: Express state machine does not \
             support Activity ARN at /States/Publish/Resource'"
        );
    }

    #[test]
    fn takes_task_tokens_in_a_standard_machine() {
        let waiting = |change: fn(&mut Value)| {
            parse_standard(&with_task(|task| {
                task["Resource"] = "arn:aws:states:::lambda:invoke.waitForTaskToken".into();
                task["Arguments"] = json!({ "FunctionName": "f", "Payload": { "token": "{% $states.context.Task.Token %}" } });
                change(task);
            }))
        };
        let definition = waiting(|task| task["HeartbeatSeconds"] = 4.into()).unwrap();
        assert_eq!(
            (definition.machine_type(), definition.timeout),
            (MachineType::Standard, STANDARD_RUN_DURATION)
        );
        waiting(|task| task["TimeoutSeconds"] = "{% $states.input.seconds %}".into()).unwrap();
        for (change, wanted) in [
            (
                (|task| task["HeartbeatSeconds"] = 5.into()) as fn(&mut Value),
                "is not less than TimeoutSeconds at /States/Publish/HeartbeatSeconds",
            ),
            (|task| task["HeartbeatSeconds"] = 0.into(), "is not a whole number of seconds"),
            (|task| task["TimeoutSeconds"] = 100_000_000.into(), "is not a whole number of seconds"),
            (|task| task["TimeoutSeconds"] = json!([1]), "is not a whole number of seconds"),
            (
                |task| drop(task.as_object_mut().unwrap().remove("TimeoutSeconds")),
                "every Task has TimeoutSeconds",
            ),
            (
                |task| task["Arguments"]["Payload"] = json!({}),
                "nobody could answer at /States/Publish/Arguments",
            ),
            (
                |task| task["Resource"] = "arn:aws:states:::dynamodb:putItem.waitForTaskToken".into(),
                "does not run here at /States/Publish/Resource",
            ),
            (|task| task["Resource"] = "arn:aws:states:::lambda:invoke.sync:2".into(), "does not run here"),
        ] {
            let message = waiting(change).unwrap_err();
            assert!(message.contains(wanted), "{message}\n  wanted: {wanted}");
        }
        let with_heartbeat = with_task(|task| task["HeartbeatSeconds"] = 1.into());
        assert!(
            parse_standard(&with_heartbeat).unwrap_err().contains("only a task that waits for its token")
        );
    }

    #[test]
    fn refuses_with_the_place_of_the_fault() {
        let refusal = |change: fn(&mut Value)| parse(&with_task(change)).unwrap_err();
        for (change, wanted) in [
            (
                (|task| task["Resource"] = "arn:aws:states:::sns:publish".into()) as fn(&mut Value),
                "does not run here at /States/Publish/Resource",
            ),
            (
                |task| drop(task.as_object_mut().unwrap().remove("TimeoutSeconds")),
                "every Task has TimeoutSeconds here at /States/Publish'",
            ),
            (|task| task["Arguments"]["Delay"] = 1.into(), "at /States/Publish/Arguments/Delay"),
            (|task| task["Next"] = "Publish".into(), "takes either Next or \"End\": true"),
            (|task| task["End"] = false.into(), "takes either Next or \"End\": true"),
            (|task| task["ResultPath"] = "$".into(), "at /States/Publish/ResultPath"),
            (|task| task["Type"] = "Map".into(), "states of type Map do not run here"),
            (|task| task["Arguments"]["QueueUrl"] = "{% $a. %}".into(), "cannot be parsed"),
            (|task| task["Arguments"]["QueueUrl"] = "x {% $a %}".into(), "an expression is the whole string"),
            (
                |task| task["Catch"] = json!([{ "ErrorEquals": ["A", "States.ALL"], "Next": "Publish" }]),
                "States.ALL stands alone and last",
            ),
            (
                |task| task["Catch"] = json!([{ "ErrorEquals": ["A"], "Next": "Nowhere" }]),
                "there is no state \"Nowhere\"",
            ),
            (
                |task| task["Retry"] = json!([{ "ErrorEquals": ["A"], "JitterStrategy": "SOME" }]),
                "is neither FULL nor NONE",
            ),
        ] {
            let message = refusal(change);
            assert!(message.contains(wanted), "{message}\n  wanted: {wanted}");
        }
    }

    #[test]
    fn refuses_a_machine_without_its_parts() {
        let mut machine = with_task(|_| {});
        machine["StartAt"] = "Elsewhere".into();
        assert!(parse(&machine).unwrap_err().contains("MISSING_TRANSITION_TARGET"));
        machine.as_object_mut().unwrap().remove("StartAt");
        assert!(parse(&machine).unwrap_err().contains("at /StartAt"));
        let mut machine = with_task(|_| {});
        machine["States"]["Island"] = json!({ "Type": "Succeed" });
        assert!(parse(&machine).unwrap_err().contains("never reached at /States/Island"));
        let mut machine = with_task(|_| {});
        machine["QueryLanguage"] = "JSONPath".into();
        assert!(parse(&machine).unwrap_err().contains("only machines with JSONata"));
        assert!(Definition::parse("{", &BTreeMap::new()).unwrap_err().to_string().contains("INVALID_JSON"));
    }

    #[test]
    fn substitutes_names_in_pascal_case() {
        let text = with_task(|task| task["Arguments"]["ReceiptHandle"] = "${Table}".into()).to_string();
        assert!(Definition::parse(&text, &BTreeMap::from([("Table".into(), "a\"b".into())])).is_ok());
        let error = Definition::parse(&text, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("nothing was supplied for ${Table}"), "{error}");
        let error = substitute("${self:x}", &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("not a name in PascalCase"), "{error}");
    }
}
