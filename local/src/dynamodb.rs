//! DynamoDB in memory, around an existing emulation of it: enters an operation as JSON, leaves
//! status and JSON. What the emulation lacks is added here: conditional writes are atomic.

use std::{borrow::Cow, path::Path, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use winterbaume_core::{MockRequest, MockService, StatefulService, default_account_id};
use winterbaume_dynamodb::{DynamoDbService, DynamodbStateView};

use crate::{
    chaos::{Chaos, Fault},
    store::{Filling, Kept, Service, Store},
};

mod order;
mod reserved;
mod storage;

use storage::Storage;

/// The region whose tables these are; the emulation keeps one set of tables for each.
const REGION: &str = "us-east-1";

/// The most bytes of a request (DynamoDB: 16 MB in a batch).
const REQUEST_BYTES: usize = 16 * 1024 * 1024;

/// The operations that read, and so need not wait for a write.
const READS: &[&str] = &["BatchGetItem", "DescribeTable", "GetItem", "ListTables", "Query", "Scan"];

/// The operations that run here beside [`READS`].
const WRITES: &[&str] = &[
    "BatchWriteItem",
    "CreateTable",
    "DeleteItem",
    "DeleteTable",
    "DescribeTimeToLive",
    "PutItem",
    "TransactGetItems",
    "TransactWriteItems",
    "UpdateItem",
    "UpdateTimeToLive",
];

/// The service.
pub struct Dynamodb {
    service: DynamoDbService,
    storage: Arc<Storage>,
    chaos: Arc<Chaos>,
    /// The emulation looks at a condition and then writes, in two steps: one write at a time.
    writing: tokio::sync::Mutex<()>,
    kept: Kept,
}

/// The operations among [`WRITES`] that change nothing.
const LOOKS: &[&str] = &["DescribeTimeToLive", "TransactGetItems"];

/// A change of the tables, as the store has it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record<'a> {
    /// All of them.
    All(#[serde(borrow)] Cow<'a, RawValue>),
    /// An operation that was carried out. In the same order it does the same again.
    Call { operation: Cow<'a, str>, body: Box<RawValue> },
}

impl std::fmt::Debug for Dynamodb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dynamodb").finish_non_exhaustive()
    }
}

/// What an operation answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// JSON: the operation's output, or an error with its `__type`.
    pub body: Bytes,
}

impl Answer {
    fn error(name: &str, message: &str) -> Self {
        let body = serde_json::json!({
            "__type": format!("com.amazonaws.dynamodb.v20120810#{name}"),
            "message": message,
        });
        Self { status: 400, body: body.to_string().into() }
    }

    /// The short name of the error, where it is one.
    #[must_use]
    pub fn error_name(&self) -> Option<String> {
        #[derive(serde::Deserialize)]
        struct Error<'a> {
            #[serde(rename = "__type", borrow)]
            name: Cow<'a, str>,
        }
        if self.status < 300 {
            return None;
        }
        let error: Option<Error<'_>> = serde_json::from_slice(&self.body).ok();
        Some(error.map_or_else(
            || "InternalServerError".to_owned(),
            |error| error.name.rsplit('#').next().unwrap_or_default().to_owned(),
        ))
    }
}

/// A table to be created. Its keys are strings.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    /// Its name.
    pub name: &'a str,
    /// The attribute that is the partition key.
    pub partition_key: &'a str,
    /// The attribute that is the sort key.
    pub sort_key: Option<&'a str>,
    /// The attribute that says when an item expires, in epoch seconds.
    pub expiry: Option<&'a str>,
}

/// Why tables were not created, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum DynamodbError {
    /// A table was refused.
    #[error("the table {table} was refused: {answer}")]
    Refused {
        /// The table.
        table: String,
        /// The service's answer.
        answer: String,
    },
    /// The file could not be read or written.
    #[error("cannot read or write the tables' file")]
    File(#[from] std::io::Error),
    /// The file holds something else.
    #[error("the tables' file is not valid")]
    Format(#[from] serde_json::Error),
    /// The emulation did not take the file's tables.
    #[error("the tables' file was refused: {0}")]
    State(winterbaume_core::StateViewError),
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CreateTable<'a> {
    table_name: &'a str,
    billing_mode: &'static str,
    key_schema: Vec<KeyPart<'a>>,
    attribute_definitions: Vec<AttributeDefinition<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct KeyPart<'a> {
    attribute_name: &'a str,
    key_type: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct AttributeDefinition<'a> {
    attribute_name: &'a str,
    attribute_type: &'static str,
}

impl Dynamodb {
    /// A service without tables.
    #[must_use]
    pub fn new(chaos: Arc<Chaos>) -> Self {
        let storage = Arc::new(Storage::default());
        Self {
            service: DynamoDbService::with_backend(Arc::clone(&storage) as _),
            storage,
            chaos,
            writing: tokio::sync::Mutex::default(),
            kept: Kept::new(),
        }
    }

    /// Carries out one operation.
    ///
    /// # Cancel safety
    ///
    /// A write that has begun is finished or not begun at all: the emulation never waits inside.
    pub async fn call(&self, operation: &str, body: Bytes) -> Answer {
        if body.len() > REQUEST_BYTES {
            return Answer::error("ValidationException", "the request is too large");
        }
        if let Some(word) = reserved::misused(&body) {
            let problem = format!("Attribute name is a reserved keyword; reserved keyword: {word}");
            return Answer::error("ValidationException", &problem);
        }
        if self.chaos.strikes(Fault::Throttle) {
            return Answer::error(
                "ProvisionedThroughputExceededException",
                "The level of configured provisioned throughput for the table was exceeded.",
            );
        }
        if READS.contains(&operation) {
            self.handle(operation, body).await
        } else if WRITES.contains(&operation) {
            let _one_at_a_time = self.writing.lock().await;
            let before = if operation == "UpdateItem" { self.before(&body).await } else { None };
            let mut answer = self.handle(operation, body.clone()).await;
            if answer.error_name().is_some() {
                return answer;
            }
            if let Some(before) = before {
                answer.body = before;
            }
            if let Some(store) = self.kept.get().filter(|_| !LOOKS.contains(&operation)) {
                store.append(
                    Service::Tables,
                    &Record::Call { operation: operation.into(), body: one_line(&body) },
                );
            }
            answer
        } else {
            Answer::error("UnknownOperationException", "the operation does not run here")
        }
    }

    /// What an update answers that wants `ALL_OLD`, which the emulation knows of puts and deletes alone.
    async fn before(&self, body: &[u8]) -> Option<Bytes> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Update<'a> {
            #[serde(borrow)]
            table_name: Cow<'a, str>,
            #[serde(borrow)]
            key: &'a RawValue,
            #[serde(default, borrow)]
            return_values: Cow<'a, str>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Found<'a> {
            #[serde(default, borrow)]
            item: Option<&'a RawValue>,
        }
        let update: Update<'_> = serde_json::from_slice(body).ok()?;
        if update.return_values != "ALL_OLD" {
            return None;
        }
        let get =
            serde_json::json!({ "TableName": update.table_name, "Key": update.key, "ConsistentRead": true });
        let found = self.handle("GetItem", get.to_string().into()).await;
        let found: Found<'_> = serde_json::from_slice(&found.body).ok()?;
        Some(found.item.map_or_else(|| "{}".into(), |item| format!(r#"{{"Attributes":{item}}}"#).into()))
    }

    async fn handle(&self, operation: &str, body: Bytes) -> Answer {
        let mut headers = HeaderMap::new();
        if let Ok(target) = HeaderValue::try_from(format!("DynamoDB_20120810.{operation}")) {
            headers.insert("x-amz-target", target);
        }
        headers.insert(
            header::AUTHORIZATION,
            HeaderValue::from_static("AWS4-HMAC-SHA256 Credential=local/0/us-east-1/dynamodb/aws4_request"),
        );
        let request = MockRequest {
            method: "POST".to_owned(),
            uri: "https://dynamodb.us-east-1.amazonaws.com/".to_owned(),
            headers,
            body,
        };
        let response = self.service.handle(request).await;
        Answer { status: response.status, body: response.body }
    }

    /// Creates a table, unless it was loaded already.
    ///
    /// # Errors
    ///
    /// The definition was refused.
    pub async fn create_table(&self, table: Table<'_>) -> Result<(), DynamodbError> {
        let keys: Vec<(&str, &'static str)> = [Some((table.partition_key, "HASH"))]
            .into_iter()
            .chain([table.sort_key.map(|key| (key, "RANGE"))])
            .flatten()
            .collect();
        let request = CreateTable {
            table_name: table.name,
            billing_mode: "PAY_PER_REQUEST",
            key_schema: keys
                .iter()
                .map(|&(attribute_name, key_type)| KeyPart { attribute_name, key_type })
                .collect(),
            attribute_definitions: keys
                .iter()
                .map(|&(attribute_name, _)| AttributeDefinition { attribute_name, attribute_type: "S" })
                .collect(),
        };
        let answer = self.handle("CreateTable", serde_json::to_vec(&request)?.into()).await;
        match answer.error_name().as_deref() {
            Some("ResourceInUseException") => return Ok(()),
            Some(_) => return Err(refused(&table, &answer)),
            None => {}
        }
        if let Some(expiry) = table.expiry {
            let request = serde_json::json!({
                "TableName": table.name,
                "TimeToLiveSpecification": { "AttributeName": expiry, "Enabled": true },
            });
            let answer = self.handle("UpdateTimeToLive", request.to_string().into()).await;
            if answer.error_name().is_some() {
                return Err(refused(&table, &answer));
            }
        }
        Ok(())
    }

    /// Takes over the tables of a file that earlier releases left, whole. A file that is not there has none.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or holds something else.
    pub async fn load(&self, path: &Path) -> Result<(), DynamodbError> {
        let text = match tokio::fs::read(path).await {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.restore(serde_json::from_slice(&text)?).await
    }

    async fn restore(&self, view: DynamodbStateView) -> Result<(), DynamodbError> {
        let _one_at_a_time = self.writing.lock().await;
        self.service.restore(default_account_id(), REGION, view).await.map_err(DynamodbError::State)
    }

    /// Takes over the tables of an earlier process, whose changes these are.
    ///
    /// # Errors
    ///
    /// A change is none of DynamoDB's.
    pub async fn take_over(&self, changes: impl Iterator<Item = &str>) -> Result<(), DynamodbError> {
        for change in changes {
            match serde_json::from_str(change)? {
                Record::All(view) => self.restore(serde_json::from_str(view.get())?).await?,
                Record::Call { operation, body } => {
                    let body = String::from(Box::<str>::from(body));
                    let answer = self.handle(&operation, body.into()).await;
                    if let Some(error) = answer.error_name() {
                        tracing::warn!(%operation, error, "a change of the tables in --state-dir is lost");
                    }
                }
            }
        }
        Ok(())
    }

    /// A copy of all tables, for [`Dynamodb::fill`].
    ///
    /// # Errors
    ///
    /// They cannot be written as JSON.
    pub async fn copy(&self) -> Result<Box<RawValue>, DynamodbError> {
        let _one_at_a_time = self.writing.lock().await;
        let view = self.storage.copy(default_account_id(), REGION).await;
        Ok(serde_json::value::to_raw_value(&view)?)
    }

    /// Writes down all tables.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn fill(copy: &RawValue, file: &mut Filling) -> std::io::Result<()> {
        file.add(Service::Tables, &Record::All(Cow::Borrowed(copy)))
    }

    /// Keeps every change from here on.
    pub fn keep(&self, store: Arc<Store>) {
        // There is one store.
        drop(self.kept.set(store));
    }
}

/// JSON of an operation without line breaks.
fn one_line(body: &[u8]) -> Box<RawValue> {
    let has_breaks = body.contains(&b'\n') || body.contains(&b'\r');
    let text = std::str::from_utf8(body).unwrap_or_default();
    let text = if has_breaks {
        serde_json::from_str::<serde_json::Value>(text).unwrap_or_default().to_string()
    } else {
        text.to_owned()
    };
    // It was carried out, so it is JSON.
    RawValue::from_string(text).unwrap_or_default()
}

fn refused(table: &Table<'_>, answer: &Answer) -> DynamodbError {
    DynamodbError::Refused {
        table: table.name.to_owned(),
        answer: String::from_utf8_lossy(&answer.body).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::chaos::ChaosConfig;

    const TABLE: Table<'_> = Table {
        name: "connections",
        partition_key: "tunnel",
        sort_key: Some("connection_id"),
        expiry: Some("expires_at"),
    };

    async fn service() -> Dynamodb {
        let service = Dynamodb::new(Arc::default());
        service.create_table(TABLE).await.unwrap();
        service
    }

    async fn call(service: &Dynamodb, operation: &str, request: Value) -> Value {
        let answer = service.call(operation, request.to_string().into()).await;
        serde_json::from_slice(&answer.body).unwrap()
    }

    fn row(connection: &str, expires: u64) -> Value {
        json!({ "TableName": "connections", "Item": {
            "tunnel": { "S": "web" }, "connection_id": { "S": connection }, "owner": { "S": "o" },
            "expires_at": { "N": expires.to_string() } } })
    }

    #[tokio::test]
    async fn an_update_says_what_was_there_before_where_it_is_asked() {
        let service = service().await;
        let update = |owner: &str, wanted: &str| {
            json!({ "TableName": "connections", "ReturnValues": wanted, "UpdateExpression": "SET #owner = :owner",
                "Key": { "tunnel": { "S": "web" }, "connection_id": { "S": "#name" } },
                "ConditionExpression": "attribute_not_exists(#owner) OR #owner <> :owner",
                "ExpressionAttributeNames": { "#owner": "owner" },
                "ExpressionAttributeValues": { ":owner": { "S": owner } } })
        };
        assert_eq!(call(&service, "UpdateItem", update("a", "ALL_OLD")).await, json!({}));
        let before = call(&service, "UpdateItem", update("b", "ALL_OLD")).await;
        assert_eq!(
            before,
            json!({ "Attributes": { "tunnel": { "S": "web" }, "connection_id": { "S": "#name" }, "owner": { "S": "a" } } })
        );
        // One whose condition does not hold is refused as ever.
        let refused = call(&service, "UpdateItem", update("b", "ALL_OLD")).await;
        assert!(
            refused["__type"].as_str().unwrap().ends_with("ConditionalCheckFailedException"),
            "{refused}"
        );
        let after = call(&service, "UpdateItem", update("c", "ALL_NEW")).await;
        assert_eq!(after["Attributes"]["owner"], json!({ "S": "c" }));
    }

    #[tokio::test]
    async fn finds_the_live_rows_of_a_tunnel() {
        let service = service().await;
        for (connection, expires) in [("b=", 2000), ("#name", 3000), ("a=", 500)] {
            assert_eq!(call(&service, "PutItem", row(connection, expires)).await, json!({}));
        }
        let found = call(
            &service,
            "Query",
            json!({
                "TableName": "connections", "ConsistentRead": true,
                "KeyConditionExpression": "tunnel = :tunnel", "FilterExpression": "expires_at > :now",
                "ProjectionExpression": "connection_id",
                "ExpressionAttributeValues": { ":tunnel": { "S": "web" }, ":now": { "N": "1000" } },
            }),
        )
        .await;
        assert_eq!(
            found["Items"],
            json!([{ "connection_id": { "S": "#name" } }, { "connection_id": { "S": "b=" } }])
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn only_one_of_many_conditional_writes_wins() {
        let service = Arc::new(service().await);
        let writers: Vec<_> = (0..32)
            .map(|writer| {
                let service = Arc::clone(&service);
                tokio::spawn(async move {
                    let mut request = row("#name", writer);
                    request["ConditionExpression"] = "attribute_not_exists(tunnel)".into();
                    service.call("PutItem", request.to_string().into()).await
                })
            })
            .collect();
        let mut won = 0;
        for writer in writers {
            match writer.await.unwrap().error_name().as_deref() {
                None => won += 1,
                Some(name) => assert_eq!(name, "ConditionalCheckFailedException"),
            }
        }
        assert_eq!(won, 1);
    }

    #[tokio::test]
    async fn tables_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let changes = || {
            let changes = crate::store::read(&path).unwrap();
            changes.into_iter().map(|change| change.record).collect::<Vec<_>>()
        };
        let first = service().await;
        call(&first, "PutItem", row("a=", 1)).await;
        let copy = first.copy().await.unwrap();
        first.keep(Store::create(&path, |file| Dynamodb::fill(&copy, file)).unwrap());
        call(&first, "PutItem", row("#name", 9)).await;
        let key = |id: &str| json!({ "tunnel": { "S": "web" }, "connection_id": { "S": id } });
        let mut update = json!({ "TableName": "connections", "Key": key("#name"), "UpdateExpression": "ADD n :one",
            "ExpressionAttributeValues": { ":one": { "N": "1" } } });
        call(&first, "UpdateItem", update.clone()).await;
        // With line breaks, as a person writes it.
        let pretty = serde_json::to_vec_pretty(&update).unwrap();
        assert_eq!(first.call("UpdateItem", pretty.into()).await.status, 200);
        update["ConditionExpression"] = "n > :one AND attribute_not_exists(tunnel)".into();
        let refused = first.call("UpdateItem", update.to_string().into()).await;
        assert_eq!(refused.error_name().as_deref(), Some("ConditionalCheckFailedException"));
        call(&first, "DeleteItem", json!({ "TableName": "connections", "Key": key("a=") })).await;
        // All at once, and four changes: what was refused is none.
        assert_eq!(changes().len(), 5);

        // The process is gone without a word. Twice: what was written anew is as good.
        for _ in 0..2 {
            let second = Dynamodb::new(Arc::default());
            second.take_over(changes().iter().map(|change| &**change)).await.unwrap();
            second.create_table(TABLE).await.unwrap();
            let get = |id: &str| json!({ "TableName": "connections", "Key": key(id) });
            let found = call(&second, "GetItem", get("#name")).await;
            assert_eq!(found["Item"]["expires_at"], json!({ "N": "9" }));
            assert_eq!(found["Item"]["n"], json!({ "N": "2" }));
            assert_eq!(call(&second, "GetItem", get("a=")).await, json!({}));
            let copy = second.copy().await.unwrap();
            second.keep(Store::create(&path, |file| Dynamodb::fill(&copy, file)).unwrap());
            assert_eq!(changes().len(), 1);
        }
        assert!(matches!(service().await.take_over(["{}"].into_iter()).await, Err(DynamodbError::Format(_))));
    }

    #[tokio::test]
    async fn errors_have_their_names() {
        let service = service().await;
        let answer = service
            .call("GetItem", Bytes::from_static(b"{\"TableName\":\"none\",\"Key\":{\"a\":{\"S\":\"b\"}}}"))
            .await;
        assert_eq!(answer.error_name().as_deref(), Some("ResourceNotFoundException"));
        let answer = service.call("CreateBackup", Bytes::from_static(b"{}")).await;
        assert_eq!(answer.error_name().as_deref(), Some("UnknownOperationException"));
        let throttled = ChaosConfig::default().with(Fault::Throttle, 1.0);
        let service = Dynamodb::new(Arc::new(Chaos::new(throttled)));
        let answer = service.call("Query", Bytes::from_static(b"{}")).await;
        assert_eq!(answer.error_name().as_deref(), Some("ProvisionedThroughputExceededException"));
    }
}
