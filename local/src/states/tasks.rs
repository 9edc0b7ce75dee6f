//! The service integrations that a run calls: enters a task's call, leaves its result under the
//! names of Step Functions. Everything runs in this process.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use proto::id::ConnectionId;
use serde_json::{Map, Value, json};

use super::{
    definition::Resource,
    interpreter::{Arguments, Call, Tasks},
    outcome::{TaskError, error_name},
    tokens::{PendingTask, TaskTokens},
};
use crate::{
    connections::PostOutcome,
    lambda::{InvokeError, WeakLambda},
    services::{Post, STATES, Services},
    sqs::{Attribute, AttributeValue, NewMessage, ReceiveRequest, Received, SqsError, wire::is_wanted},
};

/// Calls the services of this process.
#[derive(Debug, Clone)]
pub struct ServiceTasks {
    services: Arc<Services>,
    /// What STANDARD runs have beside the services.
    standard: Option<Standard>,
}

/// What only STANDARD runs call.
#[derive(Debug, Clone)]
pub(super) struct Standard {
    pub(super) tokens: Arc<TaskTokens>,
    pub(super) lambda: Option<WeakLambda>,
}

impl ServiceTasks {
    /// Calls these services.
    #[must_use]
    pub fn new(services: Arc<Services>) -> Self {
        Self { services, standard: None }
    }

    /// Calls these services for a STANDARD run.
    pub(super) fn standard(services: Arc<Services>, standard: Standard) -> Self {
        Self { services, standard: Some(standard) }
    }
}

type Result<T> = std::result::Result<T, TaskError>;

impl Tasks for ServiceTasks {
    async fn call(&self, call: Call<'_>) -> Result<Value> {
        let arguments = &call.arguments;
        match call.resource {
            Resource::DynamoDbQuery => self.dynamodb("Query", "DynamoDb", arguments).await,
            Resource::DynamoDbGetItem => self.dynamodb("GetItem", "DynamoDB", arguments).await,
            Resource::DynamoDbSdkPutItem => self.dynamodb("PutItem", "DynamoDb", arguments).await,
            Resource::DynamoDbPutItem => self.dynamodb("PutItem", "DynamoDB", arguments).await,
            Resource::DynamoDbUpdateItem => self.dynamodb("UpdateItem", "DynamoDB", arguments).await,
            Resource::DynamoDbDeleteItem => self.dynamodb("DeleteItem", "DynamoDB", arguments).await,
            Resource::SqsReceiveMessage => self.receive(arguments).await,
            Resource::SqsDeleteMessage => {
                self.services.begin_sqs(STATES, "DeleteMessage").await;
                let (url, receipt) = (text(arguments, "QueueUrl")?, text(arguments, "ReceiptHandle")?);
                self.services.sqs.delete(url, receipt).map_err(|error| sqs_error("Sqs", error))?;
                Ok(json!({}))
            }
            Resource::SqsSendMessage => self.send(arguments).await,
            Resource::ApiGatewayInvoke => self.invoke(arguments).await,
            Resource::LambdaInvoke => self.invoke_function(arguments).await,
        }
    }

    fn issue_token(&self) -> Option<PendingTask> {
        self.standard.as_ref()?.tokens.issue().ok()
    }

    fn take_up_token(&self, token: &str) -> Option<PendingTask> {
        self.standard.as_ref()?.tokens.take_up(token)
    }
}

impl ServiceTasks {
    async fn dynamodb(&self, operation: &str, prefix: &str, arguments: &Arguments<'_>) -> Result<Value> {
        let body = serde_json::to_vec(arguments).map_err(|error| not_valid(&error.to_string()))?;
        let answer = self.services.dynamodb(STATES, operation, body.into()).await;
        if let Some(name) = answer.error_name() {
            // Without its message: it may quote values of the item.
            return Err(TaskError::new(format!("{prefix}.{name}"), format!("DynamoDB answered {name}")));
        }
        let answer = std::str::from_utf8(&answer.body).map_err(|error| not_valid(&error.to_string()))?;
        serde_json::from_str(answer).map_err(|error| not_valid(&error.to_string()))
    }

    async fn receive(&self, arguments: &Arguments<'_>) -> Result<Value> {
        self.services.begin_sqs(STATES, "ReceiveMessage").await;
        let seconds = |name| Ok(whole(arguments, name)?.map(Duration::from_secs));
        let request = ReceiveRequest {
            max: whole(arguments, "MaxNumberOfMessages")?
                .map_or(1, |max| usize::try_from(max).unwrap_or(usize::MAX)),
            wait: seconds("WaitTimeSeconds")?,
            visibility: seconds("VisibilityTimeout")?,
        };
        let (system, wanted) =
            (names(arguments, "AttributeNames")?, names(arguments, "MessageAttributeNames")?);
        let url = text(arguments, "QueueUrl")?;
        let received =
            self.services.sqs.receive(url, request).await.map_err(|error| sqs_error("Sqs", error))?;
        let mut result = Map::new();
        if !received.is_empty() {
            let messages = received.iter().map(|received| message(received, &system, &wanted)).collect();
            result.insert("Messages".to_owned(), Value::Array(messages));
        }
        Ok(Value::Object(result))
    }

    async fn send(&self, arguments: &Arguments<'_>) -> Result<Value> {
        self.services.begin_sqs(STATES, "SendMessage").await;
        let body = match arguments.get("MessageBody") {
            Some(Value::String(text)) => Cow::Borrowed(text.as_str()),
            Some(value) => Cow::Owned(value.to_string()),
            None => return Err(not_valid("there is no MessageBody")),
        };
        let attributes = match arguments.get("MessageAttributes") {
            None => BTreeMap::new(),
            Some(Value::Object(attributes)) => attributes
                .iter()
                .map(|(name, attribute)| {
                    let part = |key| attribute.get(key).and_then(Value::as_str);
                    let (Some(data_type), Some(value)) = (part("DataType"), part("StringValue")) else {
                        return Err(not_valid("a message attribute has DataType and StringValue"));
                    };
                    let value = AttributeValue::Text(value.into());
                    Ok((name.as_str().into(), Attribute { data_type: data_type.into(), value }))
                })
                .collect::<Result<_>>()?,
            Some(_) => return Err(not_valid("MessageAttributes is an object")),
        };
        let sent = self
            .services
            .sqs
            .send(
                text(arguments, "QueueUrl")?,
                NewMessage { body: body.into(), attributes, delay: Duration::ZERO },
            )
            .map_err(|error| sqs_error("SQS", error))?;
        Ok(json!({ "MessageId": &*sent.id, "MD5OfMessageBody": &*sent.body_md5 }))
    }

    async fn invoke_function(&self, arguments: &Arguments<'_>) -> Result<Value> {
        self.services.counters.record(STATES, "lambda", "Invoke");
        let name = text(arguments, "FunctionName")?;
        // The name itself, or an ARN that ends with it.
        let name = name.rsplit(':').next().unwrap_or(name);
        let event = arguments.get("Payload").map_or_else(|| "{}".to_owned(), Value::to_string);
        let lambda = self.standard.as_ref().and_then(|standard| standard.lambda.as_ref());
        let lambda = lambda.and_then(WeakLambda::upgrade).ok_or(InvokeError::NoSuchFunction);
        let answer = match lambda {
            Ok(lambda) => lambda.invoke(name, event.into()).await,
            Err(error) => Err(error),
        };
        let answer = answer.map_err(|error| match error {
            // The cause is the whole answer of the function.
            InvokeError::Function { error_type, message } => function_failed(error_type, &message),
            InvokeError::TimedOut(_) => function_failed("Sandbox.Timedout", &error.to_string()),
            InvokeError::Exited(_) | InvokeError::Init(_) => {
                function_failed("Runtime.ExitError", &error.to_string())
            }
            InvokeError::AnswerTooLarge => {
                function_failed("Function.ResponseSizeTooLarge", &error.to_string())
            }
            InvokeError::EventTooLarge(_) => {
                TaskError::new("Lambda.RequestTooLargeException", error.to_string())
            }
            InvokeError::NoSuchFunction => {
                TaskError::new("Lambda.ResourceNotFoundException", format!("Function not found: {name}"))
            }
            InvokeError::Throttled => TaskError::new("Lambda.TooManyRequestsException", "Rate Exceeded."),
            // Nobody knows whether it has run.
            InvokeError::ShuttingDown => TaskError::new("Lambda.SdkClientException", error.to_string()),
            InvokeError::Prelude => TaskError::new("Lambda.Unknown", error.to_string()),
        })?;
        let payload: Value =
            serde_json::from_slice(&answer).map_err(|error| not_valid(&error.to_string()))?;
        Ok(json!({ "ExecutedVersion": "$LATEST", "Payload": payload, "StatusCode": 200 }))
    }

    async fn invoke(&self, arguments: &Arguments<'_>) -> Result<Value> {
        let path = text(arguments, "Path")?;
        let method = text(arguments, "Method")?;
        let id = connection(path).ok_or_else(|| gateway_error(403))?;
        let ok = |status: u16, body: Value| {
            Ok(json!({ "StatusCode": status, "StatusText": "OK", "Headers": {}, "ResponseBody": body }))
        };
        match method {
            "POST" => {
                let body = match arguments.get("RequestBody") {
                    Some(Value::String(text)) => Bytes::copy_from_slice(text.as_bytes()),
                    Some(value) => serde_json::to_vec(value)
                        .map(Bytes::from)
                        .map_err(|error| not_valid(&error.to_string()))?,
                    None => Bytes::new(),
                };
                match self.services.post(STATES, &id, body).await {
                    Post::Done(PostOutcome::Accepted) => ok(200, Value::String(String::new())),
                    Post::Done(PostOutcome::Gone) => Err(gateway_error(410)),
                    Post::Done(PostOutcome::TooLarge) => Err(gateway_error(413)),
                    Post::Done(PostOutcome::BufferFull) | Post::Throttled => Err(gateway_error(429)),
                }
            }
            "GET" => match self.services.connection(STATES, &id).await {
                Some(info) => ok(
                    200,
                    json!({
                        "connectedAt": info.connected_at_ms,
                        "lastActiveAt": info.last_active_at_ms,
                        "identity": {
                            "sourceIp": info.identity.source_ip,
                            "userAgent": info.identity.user_agent,
                        },
                    }),
                ),
                None => Err(gateway_error(410)),
            },
            "DELETE" => {
                if self.services.close(STATES, &id).await {
                    ok(204, Value::String(String::new()))
                } else {
                    Err(gateway_error(410))
                }
            }
            _ => Err(gateway_error(403)),
        }
    }
}

/// What a function says about its failure, under the name that it gives it.
fn function_failed(error_type: impl Into<Cow<'static, str>>, message: &str) -> TaskError {
    let error_type = error_type.into();
    let cause = json!({ "errorType": error_type, "errorMessage": message }).to_string();
    TaskError::new(error_type, cause)
}

/// The connection that a path names.
fn connection(path: &str) -> Option<ConnectionId> {
    let id = path.strip_prefix("/@connections/")?;
    crate::services::percent_decode(id)?.parse().ok()
}

/// An argument that is a list of names.
fn names(arguments: &Arguments<'_>, name: &str) -> Result<Vec<String>> {
    let names = arguments.get(name).map(|names| serde_json::from_value(names.clone()));
    names
        .transpose()
        .map(Option::unwrap_or_default)
        .map_err(|_| not_valid(&format!("{name} is a list of names")))
}

fn message(received: &Received, system: &[String], wanted: &[String]) -> Value {
    let message = &received.message;
    let mut fields = Map::with_capacity(6);
    let system = received.system_attributes(system);
    if !system.is_empty() {
        let attributes = system.into_iter().map(|(name, value)| (name.to_owned(), value.to_string().into()));
        fields.insert("Attributes".to_owned(), Value::Object(attributes.collect()));
    }
    fields.insert("Body".to_owned(), Value::String(message.body.clone().into_string()));
    fields.insert("Md5OfBody".to_owned(), message.body_md5.to_string().into());
    fields.insert("MessageId".to_owned(), message.id.to_string().into());
    fields.insert("ReceiptHandle".to_owned(), received.receipt.to_string().into());
    let attributes: Map<String, Value> = message
        .attributes
        .iter()
        .filter(|(name, _)| is_wanted(name, wanted))
        .filter_map(|(name, attribute)| {
            let value = json!({ "DataType": &*attribute.data_type, "StringValue": attribute.as_text()? });
            Some((name.to_string(), value))
        })
        .collect();
    if !attributes.is_empty() {
        fields.insert("MessageAttributes".to_owned(), Value::Object(attributes));
    }
    Value::Object(fields)
}

fn text<'a>(arguments: &'a Arguments<'_>, name: &str) -> Result<&'a str> {
    arguments.text(name).ok_or_else(|| not_valid(&format!("{name} is a string")))
}

/// An argument that is a whole number, however JSONata wrote it.
fn whole(arguments: &Arguments<'_>, name: &str) -> Result<Option<u64>> {
    let Some(value) = arguments.get(name) else { return Ok(None) };
    value.as_u64().map(Some).ok_or_else(|| not_valid(&format!("{name} is a whole number")))
}

/// The arguments do not fit the call: Step Functions fails the run.
fn not_valid(what: &str) -> TaskError {
    TaskError::new(error_name::RUNTIME, format!("the arguments are not valid: {what}"))
}

fn sqs_error(prefix: &str, error: SqsError) -> TaskError {
    TaskError::new(format!("{prefix}.{}Exception", error.kind.name()), error.message)
}

fn gateway_error(status: u16) -> TaskError {
    TaskError::new(format!("ApiGateway.{status}"), format!("API Gateway answered {status}"))
}
