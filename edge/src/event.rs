//! What API Gateway hands to the functions behind the agents' WebSocket API.
//!
//! Only the fields that are used are read: the body of a message is up to 128 KB, and this is the
//! hot path of every answer. A test holds the struct against the full event type.

use proto::{
    id::{ConnectionId, Owner, TunnelPatterns},
    limits,
};
use serde::{Deserialize, Deserializer, de};

/// One event of the agents' WebSocket API. `B` is how the message is read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentEvent<B = String> {
    /// Where it comes from.
    pub request_context: AgentContext,
    /// The message, where the event is one.
    pub body: Option<B>,
}

/// Where an event comes from.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentContext {
    /// `$connect`, `$disconnect`, or the route that the message took.
    pub route_key: String,
    /// The connection.
    pub connection_id: ConnectionId,
    /// What the authorizer said when the connection was opened.
    #[serde(default)]
    pub authorizer: Option<Authorized>,
    /// When the connection was opened, in milliseconds since 1970.
    #[serde(default)]
    pub connected_at: u64,
}

/// What the authorizer said about a connection.
#[derive(Debug, Clone, Deserialize)]
pub struct Authorized {
    /// Whose connection it is.
    pub owner: Owner,
    /// Which tunnels it may serve.
    #[serde(deserialize_with = "patterns")]
    pub tunnels: TunnelPatterns,
    /// When the identity behind it ends, in seconds since 1970.
    #[serde(default, deserialize_with = "number")]
    pub token_expires: Option<u64>,
    /// The id of the token, by which it can be revoked.
    #[serde(default)]
    pub token_id: Option<String>,
}

impl Authorized {
    /// When the identity is certainly over, in seconds since 1970: what the clocks may be apart is granted
    /// here as it is when a connection is opened, so that both agree on the second.
    #[must_use]
    pub fn ends_at(&self) -> Option<u64> {
        self.token_expires.map(|expires| expires.saturating_add(limits::CLOCK_SKEW.as_secs()))
    }

    /// Whether the identity is over at the Unix time `now`, in seconds.
    #[must_use]
    pub fn is_over(&self, now: u64) -> bool {
        self.ends_at().is_some_and(|end| now >= end)
    }

    /// How long it lasts from the Unix time `now_ms` on, both in milliseconds. Whole seconds would promise
    /// up to one too many, and an agent would look for another token only when this one is over.
    #[must_use]
    pub fn left_ms(&self, now_ms: u64) -> Option<u64> {
        self.ends_at().map(|end| end.saturating_mul(1000).saturating_sub(now_ms))
    }
}

fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TunnelPatterns, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(de::Error::custom)
}

/// API Gateway turns every context value into a string on its way.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Number(u64),
        Text(String),
    }
    match Option::<Number>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Number::Number(number)) => Ok(Some(number)),
        Some(Number::Text(text)) => text.parse().map(Some).map_err(de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;

    use super::*;

    const MESSAGE: &str = r#"{
        "requestContext": {"routeKey": "$default", "authorizer": {"principalId": "alice", "owner": "alice",
            "tunnels": "web,pr-*", "token_expires": "1790000000", "token_id": "t1", "integrationLatency": 3},
            "messageId": "L0SM9cOFvHcCIhw=", "eventType": "MESSAGE", "extendedRequestId": "L0SM9GH3oAMF4nw=",
            "requestTime": "09/Apr/2026:18:23:28 +0000", "messageDirection": "IN", "stage": "dev",
            "connectedAt": 1790000000123, "requestTimeEpoch": 1790000000456, "identity": {"sourceIp": "198.51.100.7"},
            "requestId": "L0SM9GH3oAMF4nw=", "domainName": "abc.execute-api.eu-central-1.amazonaws.com",
            "connectionId": "L0SM9cOFvHcCIhw=", "apiId": "abc"},
        "body": "{\"type\":\"heartbeat\",\"seq\":1}", "isBase64Encoded": false}"#;

    #[test]
    fn reads_what_the_full_event_type_reads() {
        let event: AgentEvent = serde_json::from_str(MESSAGE).unwrap();
        let full: ApiGatewayWebsocketProxyRequest = serde_json::from_str(MESSAGE).unwrap();
        let context = full.request_context;
        assert_eq!(Some(event.request_context.route_key), context.route_key);
        assert_eq!(Some(event.request_context.connection_id.as_str()), context.connection_id.as_deref());
        assert_eq!(event.request_context.connected_at, u64::try_from(context.connected_at).unwrap());
        assert_eq!(event.body, full.body);
        let authorized = event.request_context.authorizer.unwrap();
        assert_eq!(authorized.token_expires, Some(1_790_000_000));
        assert!(!authorized.is_over(1_790_000_029) && authorized.is_over(1_790_000_030));
        let left = [1_790_000_029_000, 1_790_000_029_999, 1_790_000_030_000, 1_790_000_031_000];
        assert_eq!(left.map(|now_ms| authorized.left_ms(now_ms)), [1000, 1, 0, 0].map(Some));
        assert_eq!(authorized.token_id.as_deref(), Some("t1"));
        assert_eq!(
            (authorized.owner.as_str(), authorized.tunnels.to_string().as_str()),
            ("alice", "web,pr-*")
        );
    }

    #[test]
    fn an_event_without_identity_has_none() {
        let text = r#"{"requestContext": {"routeKey": "$connect", "connectionId": "a="}}"#;
        let event: AgentEvent = serde_json::from_str(text).unwrap();
        assert!(event.request_context.authorizer.is_none());
    }
}
