//! DynamoDB in memory, around an existing emulation of it: enters an operation as JSON, leaves
//! status and JSON. What the emulation lacks is added here: conditional writes are atomic.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde::Serialize;
use winterbaume_core::{MockRequest, MockService, StatefulService, default_account_id};
use winterbaume_dynamodb::{DynamoDbService, DynamodbStateView};

use crate::chaos::{Chaos, Fault};

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
    /// One save at a time, so that an older state never replaces a newer one.
    saving: Mutex<()>,
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
            name: std::borrow::Cow<'a, str>,
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
            saving: Mutex::default(),
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
            self.handle(operation, body).await
        } else {
            Answer::error("UnknownOperationException", "the operation does not run here")
        }
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

    /// Takes over the tables of an earlier [`Dynamodb::save`]. A file that is not there is none.
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
        let view: DynamodbStateView = serde_json::from_slice(&text)?;
        let _one_at_a_time = self.writing.lock().await;
        self.service.restore(default_account_id(), REGION, view).await.map_err(DynamodbError::State)
    }

    /// Writes all tables to a file that only its owner can read.
    ///
    /// # Errors
    ///
    /// The file cannot be written; an older one is left as it was.
    pub async fn save(&self, path: &Path) -> Result<(), DynamodbError> {
        let view = {
            let _one_at_a_time = self.writing.lock().await;
            self.storage.copy(default_account_id(), REGION).await
        };
        let text = serde_json::to_vec_pretty(&view)?;
        let _one_save = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        std::io::Write::write_all(&mut file, &text)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
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
        let file = folder.path().join("tables.json");
        let first = service().await;
        first.load(&file).await.unwrap();
        call(&first, "PutItem", row("#name", 9)).await;
        first.save(&file).await.unwrap();

        let second = Dynamodb::new(Arc::default());
        second.load(&file).await.unwrap();
        second.create_table(TABLE).await.unwrap();
        let key = json!({ "tunnel": { "S": "web" }, "connection_id": { "S": "#name" } });
        let found = call(&second, "GetItem", json!({ "TableName": "connections", "Key": key })).await;
        assert_eq!(found["Item"]["expires_at"], json!({ "N": "9" }));

        std::fs::write(&file, "not json").unwrap();
        assert!(matches!(second.load(&file).await, Err(DynamodbError::Format(_))));
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
