//! The services behind every caller, in process or over HTTP: one place that counts a call, lets
//! its latency pass and lets it fail when that was asked for.

use std::sync::Arc;

use bytes::Bytes;
use proto::id::ConnectionId;

use crate::{
    chaos::{Chaos, Fault},
    connections::{ConnectionInfo, Connections, PostOutcome},
    counters::Counters,
    dynamodb::{Answer, Dynamodb},
    latency::{Hop, Latency},
    metrics::Metrics,
    sqs::Sqs,
};

/// The caller that is the state machine.
pub const STATES: &str = "states";

/// Everything that stands for AWS, but for what runs the code.
#[derive(Debug)]
pub struct Services {
    /// The queues.
    pub sqs: Sqs,
    /// The tables.
    pub dynamodb: Dynamodb,
    /// The open connections of agents.
    pub connections: Connections,
    /// How often what was called.
    pub counters: Counters,
    /// What functions say about themselves.
    pub metrics: Metrics,
    /// What goes wrong.
    pub chaos: Arc<Chaos>,
    /// How long calls take.
    pub latency: Latency,
}

/// What became of a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Post {
    /// The connection's own answer.
    Done(PostOutcome),
    /// Too many posts (429).
    Throttled,
}

impl Services {
    /// Services without queues, tables and connections.
    #[must_use]
    pub fn new(base_url: &str, chaos: Arc<Chaos>, latency: Latency) -> Self {
        Self {
            sqs: Sqs::new(base_url, Arc::clone(&chaos)),
            dynamodb: Dynamodb::new(Arc::clone(&chaos)),
            connections: Connections::default(),
            counters: Counters::default(),
            metrics: Metrics::default(),
            chaos,
            latency,
        }
    }

    /// Counts a call to SQS and lets its latency pass.
    pub async fn begin_sqs(&self, caller: &str, action: &'static str) {
        self.counters.record(caller, "sqs", action);
        self.latency.hop(Hop::Sqs).await;
        if action == "SendMessage" {
            self.latency.hop(Hop::Delivery).await;
        }
    }

    /// Carries out an operation of DynamoDB.
    pub async fn dynamodb(&self, caller: &str, operation: &str, body: Bytes) -> Answer {
        self.counters.record(caller, "dynamodb", operation);
        self.latency.hop(Hop::DynamoDb).await;
        self.dynamodb.call(operation, body).await
    }

    /// Posts a message to a connection.
    pub async fn post(&self, caller: &str, id: &ConnectionId, message: Bytes) -> Post {
        self.begin_connections(caller, "POST").await;
        self.latency.hop(Hop::Link).await;
        if self.chaos.strikes(Fault::Throttle) {
            return Post::Throttled;
        }
        if self.chaos.strikes(Fault::Gone) {
            // What is answered with 410 is gone for good: the agent is to notice it as well.
            self.connections.close(id);
        }
        Post::Done(self.connections.post(id, message))
    }

    /// Asks about a connection.
    pub async fn connection(&self, caller: &str, id: &ConnectionId) -> Option<ConnectionInfo> {
        self.begin_connections(caller, "GET").await;
        self.connections.info(id)
    }

    /// Closes a connection. Returns whether there was one.
    pub async fn close(&self, caller: &str, id: &ConnectionId) -> bool {
        self.begin_connections(caller, "DELETE").await;
        self.connections.close(id)
    }

    async fn begin_connections(&self, caller: &str, method: &'static str) {
        let service = if caller == STATES { "apigateway:invoke" } else { "execute-api" };
        self.counters.record(caller, service, method);
        self.latency.hop(Hop::Connections).await;
    }
}

/// Decodes `%XX`; nothing where that is malformed or not UTF-8.
#[must_use]
pub fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            let value = digit()? * 16 + digit()?;
            bytes.push(u8::try_from(value).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{chaos::ChaosConfig, connections::Identity};

    fn services(config: ChaosConfig) -> Services {
        Services::new("http://localhost", Arc::new(Chaos::new(config)), Latency::default())
    }

    #[tokio::test]
    async fn a_fault_of_gone_ends_the_connection() {
        let services = services(ChaosConfig::default().with(Fault::Gone, 1.0));
        let id: ConnectionId = "a=".parse().unwrap();
        let (_handle, mut outgoing) = services.connections.open(id.clone(), Identity::default(), 1);
        assert_eq!(services.post(STATES, &id, Bytes::new()).await, Post::Done(PostOutcome::Gone));
        assert_eq!(outgoing.recv().await, Some(crate::connections::Outgoing::Close));
        assert_eq!(services.counters.snapshot().actions["apigateway:invoke POST"], 1);
    }

    #[tokio::test]
    async fn a_throttled_post_reaches_nobody() {
        let services = services(ChaosConfig::default().with(Fault::Throttle, 1.0));
        let id: ConnectionId = "a=".parse().unwrap();
        let (_handle, mut outgoing) = services.connections.open(id.clone(), Identity::default(), 1);
        assert_eq!(services.post("ingress", &id, Bytes::new()).await, Post::Throttled);
        assert!(outgoing.try_recv().is_err());
        assert_eq!(services.counters.snapshot().callers["ingress"]["execute-api POST"], 1);
    }

    #[test]
    fn decodes_percent_escapes() {
        assert_eq!(percent_decode("%40connections/a%3D").as_deref(), Some("@connections/a="));
        assert_eq!(percent_decode("a+b").as_deref(), Some("a+b"));
        for bad in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(percent_decode(bad), None, "{bad}");
        }
    }
}
