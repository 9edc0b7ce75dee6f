//! What whoever runs the edge can do: issue tokens, call the services as in an account, revoke.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use agentd::identity::{Claims, Keys};
use serde_json::{Value, json};

use crate::{
    Local,
    client::{Answer, Request},
    process::binary,
};

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs()
}

impl Local {
    /// A token as the command makes it.
    #[must_use]
    pub fn issue(&self, owner: &str, tunnels: &[&str]) -> String {
        let key = self.key.to_str().unwrap();
        let mut command = Command::new(binary("agentd"));
        command.args(["token", "issue", "--key", key, "--owner", owner, "--expires", "1d"]);
        for tunnel in tunnels {
            command.args(["--tunnel", tunnel]);
        }
        let issued = command.output().unwrap();
        assert!(issued.status.success(), "{}", String::from_utf8_lossy(&issued.stderr));
        String::from_utf8(issued.stdout).unwrap().trim().to_owned()
    }

    /// The claims of a token, to be changed before it is signed.
    #[must_use]
    pub fn claims(&self, owner: &str, tunnels: &str) -> Claims {
        let (owner, tunnels) = (owner.parse().unwrap(), tunnels.parse().unwrap());
        Claims::new(&owner, &tunnels, unix_now(), std::time::Duration::from_secs(3600)).unwrap()
    }

    /// A token with these claims, signed with the run's own key.
    #[must_use]
    pub fn sign(&self, claims: &Claims) -> String {
        claims.sign(&Keys::load(&self.key).unwrap()).unwrap()
    }

    /// A token in a file of its own, which is there as long as the state folder is.
    #[must_use]
    pub fn token_file(&self, token: &str) -> PathBuf {
        let file = tempfile::Builder::new().prefix("token-").tempfile_in(self.state_dir()).unwrap();
        let (_, path) = file.keep().unwrap();
        std::fs::write(&path, token).unwrap();
        path
    }

    /// Calls DynamoDB.
    pub async fn dynamodb(&self, operation: &str, request: Value) -> Value {
        let target = format!("DynamoDB_20120810.{operation}");
        let answer = self.call("POST", "/", &[("X-Amz-Target", &target)], &request.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// Calls Step Functions.
    pub async fn states(&self, operation: &str, request: Value) -> Value {
        let target = format!("AWSStepFunctions.{operation}");
        let answer = self.call("POST", "/", &[("X-Amz-Target", &target)], &request.to_string()).await;
        assert_eq!(answer.status, 200, "{operation}: {}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// Whoever runs it, as of now: for calls that go on while it is killed.
    #[must_use]
    pub fn operator(&self) -> Operator {
        let key = std::fs::read_to_string(self.state_dir().join("operator")).unwrap();
        Operator { endpoint: self.endpoint, key }
    }

    /// Calls SQS.
    pub async fn sqs(&self, operation: &str, request: Value) -> Value {
        let target = format!("AmazonSQS.{operation}");
        let answer = self.call("POST", "/", &[("X-Amz-Target", &target)], &request.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// One row of the connections table.
    pub async fn row(&self, tunnel: &str, connection: &str) -> Option<Value> {
        let key = json!({"tunnel": {"S": tunnel}, "connection_id": {"S": connection}});
        let got = self.dynamodb("GetItem", json!({"TableName": "connections", "Key": key})).await;
        got.get("Item").cloned()
    }

    /// The rows of an owner's connections.
    pub async fn connections_of(&self, owner: &str) -> Vec<Value> {
        let query = json!({"TableName": "connections", "KeyConditionExpression": "tunnel = :t",
            "ExpressionAttributeValues": {":t": {"S": format!("#owner#{owner}")}}});
        let mut found = self.dynamodb("Query", query).await;
        serde_json::from_value(found["Items"].take()).unwrap()
    }

    /// Takes away the row of the owner's one connection that has not said `hello`.
    pub async fn forget_silent(&self, owner: &str) {
        let rows = self.connections_of(owner).await;
        let silent: Vec<_> = rows.iter().filter(|row| row.get("agent").is_none()).collect();
        let [row] = silent[..] else { panic!("not one: {rows:?}") };
        let key = json!({"tunnel": row["tunnel"], "connection_id": row["connection_id"]});
        self.dynamodb("DeleteItem", json!({"TableName": "connections", "Key": key})).await;
    }

    /// Invokes a function and gives what it answered.
    pub async fn invoke(&self, function: &str, event: &Value) -> Answer {
        let path = format!("/2015-03-31/functions/{function}/invocations");
        self.call("POST", &path, &[], &event.to_string()).await
    }

    /// Invokes `revoke`; how many connections it closed.
    pub async fn revoke(&self, event: Value) -> u64 {
        let answer = self.invoke("revoke", &event).await;
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        body["closed"].as_u64().unwrap_or_else(|| panic!("{event}: {body}"))
    }

    /// The environment variables of a function.
    pub async fn variables(&self, function: &str) -> Value {
        let path = format!("/2015-03-31/functions/{function}/configuration");
        let answer = self.call("GET", &path, &[], "").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        body["Environment"]["Variables"].clone()
    }

    /// Gives a function other environment variables, as a deployment does.
    pub async fn deploy(&self, function: &str, variables: &Value) {
        let path = format!("/2015-03-31/functions/{function}/configuration");
        let body = json!({"Environment": {"Variables": variables}}).to_string();
        let answer = self.call("PUT", &path, &[], &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// Closes a connection.
    pub async fn close(&self, connection: &str) {
        let answer = self.try_close(connection).await;
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    /// The same for one that may have gone already.
    pub async fn try_close(&self, connection: &str) -> Answer {
        let path = format!("/local/@connections/{}", connection.replace('=', "%3D"));
        self.call("DELETE", &path, &[], "").await
    }

    async fn call(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Answer {
        self.operator().call(method, path, fields, body).await
    }
}

/// Whoever runs the edge.
#[derive(Debug, Clone)]
pub struct Operator {
    endpoint: SocketAddr,
    key: String,
}

impl Operator {
    /// Calls a service by the name of an operation. Whether it was carried out; not where the edge is killed meanwhile.
    pub async fn acknowledged(&self, target: &str, request: &Value) -> bool {
        let (own, target, body) = (self.clone(), target.to_owned(), request.to_string());
        // A connection that breaks is a panic there.
        let call = async move { own.call("POST", "/", &[("X-Amz-Target", &target)], &body).await };
        tokio::spawn(call).await.is_ok_and(|answer| answer.status == 200 && answer.complete)
    }

    async fn call(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Answer {
        let signature = format!(
            "AWS4-HMAC-SHA256 Credential={}/20260101/local-1/service/aws4_request, SignedHeaders=host, Signature=0",
            self.key
        );
        let mut request = Request::new(method, path)
            .field("Host", &self.endpoint.to_string())
            .field("Authorization", &signature);
        for (name, value) in fields {
            request = request.field(name, value);
        }
        request.body(body.as_bytes().to_vec()).send(self.endpoint).await
    }
}
