//! The events of a WebSocket API, and what its functions answer.
//!
//! What enters is one connection's handshake or one of its messages; what leaves is the JSON that
//! `authorizer`, `connect`, `disconnect` and `response` are invoked with.

use std::{
    fmt::Write as _,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE};
use bytes::Bytes;
use http::{HeaderMap, Uri, header};
use proto::{header::value_to_text, id::ConnectionId, json::push_string};
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};
use serde_json::{Value, value::RawValue};

use crate::{
    calendar::common_log_time,
    lambda::{self, ACCOUNT, REGION},
};

/// The name of the API.
const API_ID: &str = "localagent";

/// The one stage of the API.
pub const STAGE: &str = "local";

/// The most bytes of an authorizer's answer
/// (API Gateway Developer Guide, "WebSocket quotas": authorizer result size 8 KB).
const AUTHORIZATION_BYTES: usize = 8 * 1024;

/// A name as API Gateway gives them to connections, messages and requests.
pub(super) fn random_name() -> String {
    URL_SAFE.encode(lambda::random_bytes::<11>())
}

/// The name of a new connection.
pub(super) fn random_connection() -> ConnectionId {
    random_name().parse().expect("base64 is what connection ids are made of")
}

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Hello,
    Heartbeat,
    Deliveries,
    Default,
}

impl Route {
    const fn key(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Heartbeat => "heartbeat",
            Self::Deliveries => "deliveries",
            Self::Default => "$default",
        }
    }

    /// The function behind the route.
    pub(super) const fn function(self) -> &'static str {
        match self {
            Self::Hello => "connect",
            Self::Deliveries => "deliveries",
            Self::Heartbeat | Self::Default => "response",
        }
    }

    /// Whether what the function answers is sent back.
    pub(super) const fn is_two_way(self) -> bool {
        match self {
            Self::Hello | Self::Heartbeat | Self::Deliveries => true,
            Self::Default => false,
        }
    }

    /// Selects by `$request.body.type`.
    pub(super) fn of(message: &str) -> Self {
        #[derive(Deserialize)]
        struct Tag<'a> {
            #[serde(rename = "type", borrow)]
            kind: Option<std::borrow::Cow<'a, str>>,
        }
        // Almost every message is an answer whose tag comes first. That it goes to `$default` is then
        // known without reading the other 128 KB: a second tag would not be valid, and goes there too.
        if let Some(rest) = message.strip_prefix("{\"type\":\"")
            && let Some(end) = rest.find(['"', '\\'])
            && rest.as_bytes()[end] == b'"'
            && !matches!(&rest[..end], "hello" | "heartbeat" | "deliveries")
        {
            return Self::Default;
        }
        match serde_json::from_str::<Tag<'_>>(message) {
            Ok(Tag { kind: Some(kind) }) if kind == "hello" => Self::Hello,
            Ok(Tag { kind: Some(kind) }) if kind == "heartbeat" => Self::Heartbeat,
            Ok(Tag { kind: Some(kind) }) if kind == "deliveries" => Self::Deliveries,
            Ok(_) | Err(_) => Self::Default,
        }
    }
}

/// What is the same in every event of one connection.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) connection: ConnectionId,
    pub(super) connected_at_ms: u64,
    pub(super) source_ip: IpAddr,
    pub(super) user_agent: String,
    domain: String,
    /// `"authorizer":{…},`, or nothing.
    authorizer: String,
}

impl Context {
    /// Begins a connection.
    pub(super) fn new(source_ip: IpAddr, user_agent: String, domain: String) -> Self {
        Self {
            connection: random_connection(),
            connected_at_ms: epoch_ms(),
            source_ip: source_ip.to_canonical(),
            user_agent,
            domain,
            authorizer: String::new(),
        }
    }

    /// Takes over what the authorizer said.
    pub(super) fn authorize(&mut self, authorizer: &AuthorizerContext) {
        let json = serde_json::to_string(authorizer).expect("the context has string keys");
        self.authorizer = format!("\"authorizer\":{json},");
    }

    /// What is asked of: `$connect` of this API's stage.
    pub(super) fn method_arn() -> String {
        format!("arn:aws:execute-api:{REGION}:{ACCOUNT}:{API_ID}/{STAGE}/$connect")
    }

    /// Writes `"requestContext":{…}`.
    fn write(&self, json: &mut String, route_key: &str, event_type: &str, request: &str, more: &str) {
        let now = epoch_ms();
        let identity = Identity { source_ip: self.source_ip, user_agent: &self.user_agent };
        let identity = serde_json::to_string(&identity).expect("the identity is two strings");
        write!(
            json,
            "\"requestContext\":{{\"routeKey\":\"{route_key}\",{authorizer}{more}\"eventType\":\"{event_type}\",\
             \"extendedRequestId\":\"{request}\",\"requestTime\":\"{time}\",\"messageDirection\":\"IN\",\
             \"stage\":\"{STAGE}\",\"connectedAt\":{connected_at},\"requestTimeEpoch\":{now},\
             \"identity\":{identity},\"requestId\":\"{request}\",\"domainName\":\"{domain}\",\
             \"connectionId\":\"{connection}\",\"apiId\":\"{API_ID}\"}}",
            authorizer = self.authorizer,
            time = common_log_time(now / 1000),
            connected_at = self.connected_at_ms,
            domain = self.domain,
            connection = self.connection,
        )
        .expect("writing to memory does not fail");
    }

    /// The event of a message.
    pub(super) fn message(&self, route: Route, request: &str, message: &str) -> Bytes {
        let mut json = String::with_capacity(1024 + self.authorizer.len() + message.len() / 8 * 9);
        json.push('{');
        let message_id = format!("\"messageId\":\"{request}\",");
        self.write(&mut json, route.key(), "MESSAGE", request, &message_id);
        json.push_str(",\"body\":");
        let mut json = json.into_bytes();
        push_string(&mut json, message);
        json.extend_from_slice(b",\"isBase64Encoded\":false}");
        json.into()
    }

    /// The event of a handshake; with a method's ARN it is the authorizer's.
    pub(super) fn connect(&self, headers: &HeaderMap, uri: &Uri, method_arn: Option<&str>) -> Bytes {
        let mut json = String::with_capacity(4096);
        json.push('{');
        if let Some(arn) = method_arn {
            write!(json, "\"type\":\"REQUEST\",\"methodArn\":\"{arn}\",")
                .expect("writing to memory does not fail");
        }
        let query: Vec<(String, String)> = query_parameters(uri.query().unwrap_or_default());
        let parts = Handshake {
            headers: Last(headers_of(headers)),
            multi_value_headers: All(headers_of(headers)),
            query_string_parameters: (!query.is_empty()).then(|| Last(query.clone())),
            multi_value_query_string_parameters: (!query.is_empty()).then_some(All(query)),
        };
        let parts = serde_json::to_string(&parts).expect("the fields have string keys");
        json.push_str(parts[1..parts.len() - 1].trim());
        json.push(',');
        self.write(&mut json, "$connect", "CONNECT", &random_name(), "");
        json.push_str(",\"isBase64Encoded\":false}");
        json.into()
    }

    /// The event of the end of a connection.
    pub(super) fn disconnect(&self, status: u16, reason: &str) -> Bytes {
        let mut json = String::with_capacity(1024);
        json.push('{');
        let reason = serde_json::to_string(reason).expect("a string is written to memory");
        let more = format!("\"disconnectStatusCode\":{status},\"disconnectReason\":{reason},");
        self.write(&mut json, "$disconnect", "DISCONNECT", &random_name(), &more);
        json.push_str(",\"isBase64Encoded\":false}");
        json.into()
    }

    /// What the agent is sent when a function has failed.
    pub(super) fn failure(&self, request: &str) -> Bytes {
        format!(
            "{{\"message\": \"Internal server error\", \"connectionId\":\"{}\", \"requestId\":\"{request}\"}}",
            self.connection
        )
        .into()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Identity<'a> {
    source_ip: IpAddr,
    #[serde(skip_serializing_if = "str::is_empty")]
    user_agent: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Handshake {
    headers: Last,
    multi_value_headers: All,
    #[serde(skip_serializing_if = "Option::is_none")]
    query_string_parameters: Option<Last>,
    #[serde(skip_serializing_if = "Option::is_none")]
    multi_value_query_string_parameters: Option<All>,
}

/// Names with their last values.
struct Last(Vec<(String, String)>);

impl Serialize for Last {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (index, (name, value)) in self.0.iter().enumerate() {
            if !self.0[index + 1..].iter().any(|(later, _)| later == name) {
                map.serialize_entry(name, value)?;
            }
        }
        map.end()
    }
}

/// Names with all their values.
struct All(Vec<(String, String)>);

impl Serialize for All {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (index, (name, _)) in self.0.iter().enumerate() {
            if !self.0[..index].iter().any(|(earlier, _)| earlier == name) {
                let values: Vec<&str> = self
                    .0
                    .iter()
                    .filter(|(other, _)| other == name)
                    .map(|(_, value)| value.as_str())
                    .collect();
                map.serialize_entry(name, &values)?;
            }
        }
        map.end()
    }
}

fn headers_of(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), value_to_text(value).into_owned()))
        .collect()
}

/// Names and values of a query, decoded.
fn query_parameters(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decoded(name), percent_decoded(value))
        })
        .collect()
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|&byte| char::from(byte).to_digit(16));
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(u8::try_from(high * 16 + low).expect("two hexadecimal digits are a byte"));
                at += 3;
            }
            (b'+', ..) => {
                decoded.push(b' ');
                at += 1;
            }
            (byte, ..) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Whether a handshake has one of the authorizer's identity sources.
pub(super) fn has_credentials(headers: &HeaderMap, uri: &Uri) -> bool {
    headers.get(header::AUTHORIZATION).is_some_and(|value| !value.is_empty())
        || query_parameters(uri.query().unwrap_or_default())
            .iter()
            .any(|(name, value)| name == "token" && !value.is_empty())
}

/// What later events say under `authorizer`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AuthorizerContext(Vec<(String, String)>);

impl Serialize for AuthorizerContext {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// What the authorizer decided.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Authorization {
    Allowed(AuthorizerContext),
    Denied,
    /// What it answered is not what API Gateway defines.
    Invalid,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthorizerAnswer {
    principal_id: Option<String>,
    policy_document: Option<PolicyDocument>,
    #[serde(default)]
    context: Option<serde_json::Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PolicyDocument {
    #[serde(default)]
    statement: Vec<Statement>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Statement {
    effect: String,
    action: OneOrMany,
    resource: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn any_matches(&self, text: &str) -> bool {
        match self {
            Self::One(pattern) => is_match(pattern, text),
            Self::Many(patterns) => patterns.iter().any(|pattern| is_match(pattern, text)),
        }
    }
}

/// Whether a policy's pattern with `*` and `?` covers `text`.
fn is_match(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => {
            pattern.len() == text.len() && pattern.bytes().zip(text.bytes()).all(|(p, t)| p == b'?' || p == t)
        }
        Some((before, rest)) => {
            text.get(..before.len()).is_some_and(|start| is_match(before, start))
                && (before.len()..=text.len())
                    .any(|at| text.get(at..).is_some_and(|remaining| is_match(rest, remaining)))
        }
    }
}

/// Reads the authorizer's answer.
pub(super) fn read_authorization(answer: &[u8]) -> Authorization {
    if answer.len() > AUTHORIZATION_BYTES {
        return Authorization::Invalid;
    }
    let Ok(answer) = serde_json::from_slice::<AuthorizerAnswer>(answer) else {
        return Authorization::Invalid;
    };
    let Some(principal) = answer.principal_id else { return Authorization::Invalid };
    let arn = Context::method_arn();
    let statements = answer.policy_document.map(|policy| policy.statement).unwrap_or_default();
    let covers = |effect: &str| {
        statements.iter().any(|statement| {
            statement.effect == effect
                && statement.action.any_matches("execute-api:Invoke")
                && statement.resource.any_matches(&arn)
        })
    };
    if !covers("Allow") || covers("Deny") {
        return Authorization::Denied;
    }
    let mut context = vec![("principalId".to_owned(), principal)];
    for (name, value) in answer.context.into_iter().flatten() {
        // API Gateway hands every value on as text, and refuses what has structure.
        let value = match value {
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::Null => continue,
            Value::Array(_) | Value::Object(_) => return Authorization::Invalid,
        };
        context.push((name, value));
    }
    Authorization::Allowed(AuthorizerContext(context))
}

/// What a function behind a route answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RouteAnswer {
    /// It is content; what is to be sent back, if anything.
    Done(Option<String>),
    /// It is not, or what it answered is not what API Gateway defines.
    Failed,
}

/// Reads the answer of `connect`, `response` or `disconnect`.
pub(super) fn read_answer(answer: &[u8]) -> RouteAnswer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        status_code: Option<u16>,
        #[serde(default, borrow)]
        body: Option<&'a RawValue>,
    }
    match serde_json::from_slice::<Answer<'_>>(answer) {
        Ok(Answer { status_code: Some(200..=299), body }) => {
            let body =
                body.and_then(|body| serde_json::from_str::<Option<String>>(body.get()).ok().flatten());
            RouteAnswer::Done(body.filter(|body| !body.is_empty()))
        }
        Ok(_) | Err(_) => RouteAnswer::Failed,
    }
}

/// Milliseconds since 1970.
fn epoch_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        let mut context =
            Context::new("127.0.0.1".parse().unwrap(), "agentd".to_owned(), "127.0.0.1:8081".to_owned());
        context.authorize(&AuthorizerContext(vec![
            ("principalId".to_owned(), "alice".to_owned()),
            ("tunnels".to_owned(), "web,\"x\"".to_owned()),
        ]));
        context
    }

    fn json(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn messages_are_routed_by_their_type() {
        for (message, route) in [
            (r#"{"type":"hello"}"#, Route::Hello),
            (r#"{"type":"deliveries","seq":1}"#, Route::Deliveries),
            (r#" { "x" : [1], "type" : "heartbeat" } "#, Route::Heartbeat),
            (r#"{"type":"he\u006clo"}"#, Route::Hello),
            (r#"{"type":"reply","type":"hello"}"#, Route::Default),
            (r#"{"type":"reply""#, Route::Default),
            (r#"{"type":"hello""#, Route::Default),
            (r#"{"type":1}"#, Route::Default),
            (r#"{"type":null}"#, Route::Default),
            ("hello", Route::Default),
            ("", Route::Default),
        ] {
            assert_eq!(Route::of(message), route, "{message}");
        }
        assert!(Route::Hello.is_two_way() && Route::Heartbeat.is_two_way() && !Route::Default.is_two_way());
    }

    #[test]
    fn a_message_event_has_what_functions_read() {
        let context = context();
        let body = "{\"type\":\"reply\",\"x\":\"\\u0000ä\\n\"}";
        let event = json(&context.message(Route::Default, "id=", body));
        assert_eq!(event["body"], body);
        assert_eq!(event["isBase64Encoded"], false);
        let request = &event["requestContext"];
        assert_eq!(request["routeKey"], "$default");
        assert_eq!(request["eventType"], "MESSAGE");
        assert_eq!(request["connectionId"], context.connection.as_str());
        assert_eq!(request["authorizer"]["tunnels"], "web,\"x\"");
        assert_eq!(request["domainName"], "127.0.0.1:8081");
        assert_eq!(request["stage"], "local");
        assert_eq!(request["identity"]["sourceIp"], "127.0.0.1");
        assert_eq!((&request["messageId"], &request["requestId"]), (&"id=".into(), &"id=".into()));
        assert!(context.connection.as_str().len() == 16 && context.connection.as_str().ends_with('='));
    }

    #[test]
    fn a_handshake_event_has_headers_and_query() {
        let mut headers = HeaderMap::new();
        headers.append("authorization", "Bearer x".parse().unwrap());
        headers.append("x-many", "1".parse().unwrap());
        headers.append("x-many", "2".parse().unwrap());
        let uri: Uri = "/?a=1&a=%32+x&b".parse().unwrap();
        let context = Context::new("::1".parse().unwrap(), String::new(), "127.0.0.1:8081".to_owned());
        let event = json(&context.connect(&headers, &uri, Some(&Context::method_arn())));
        assert_eq!(event["type"], "REQUEST");
        assert_eq!(event["methodArn"], "arn:aws:execute-api:local-1:000000000000:localagent/local/$connect");
        assert_eq!(event["headers"]["x-many"], "2");
        assert_eq!(event["multiValueHeaders"]["x-many"], serde_json::json!(["1", "2"]));
        assert_eq!(event["queryStringParameters"], serde_json::json!({"a": "2 x", "b": ""}));
        assert_eq!(event["multiValueQueryStringParameters"]["a"], serde_json::json!(["1", "2 x"]));
        assert_eq!(event["requestContext"]["eventType"], "CONNECT");
        assert!(event["requestContext"].get("authorizer").is_none());
        let plain = json(&context.connect(&headers, &"/".parse().unwrap(), None));
        assert!(plain.get("type").is_none() && plain.get("queryStringParameters").is_none());
        let end = json(&context.disconnect(1005, "no \"status\""));
        assert_eq!(end["requestContext"]["disconnectStatusCode"], 1005);
        assert_eq!(end["requestContext"]["disconnectReason"], "no \"status\"");
    }

    #[test]
    fn credentials_are_a_header_or_a_parameter() {
        let mut headers = HeaderMap::new();
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        assert!(!has_credentials(&headers, &uri("/?x=1&token=")));
        assert!(has_credentials(&headers, &uri("/?x=1&token=a")));
        headers.insert("Authorization", "Bearer a".parse().unwrap());
        assert!(has_credentials(&headers, &uri("/")));
    }

    #[test]
    fn only_a_policy_that_allows_lets_in() {
        let answer = |effect: &str, resource: &str| {
            format!(
                r#"{{"principalId":"alice","policyDocument":{{"Version":"2012-10-17","Statement":[{{"Action":
                ["execute-api:Invoke"],"Effect":"{effect}","Resource":"{resource}"}}]}},
                "context":{{"owner":"alice","token_expires":1790000000,"ok":true,"none":null}}}}"#
            )
        };
        let Authorization::Allowed(context) = read_authorization(answer("Allow", "*").as_bytes()) else {
            panic!("not allowed");
        };
        assert_eq!(
            serde_json::to_string(&context).unwrap(),
            r#"{"principalId":"alice","owner":"alice","token_expires":"1790000000","ok":"true"}"#
        );
        assert_eq!(read_authorization(answer("Deny", "*").as_bytes()), Authorization::Denied);
        assert_eq!(read_authorization(answer("Allow", "arn:aws:x").as_bytes()), Authorization::Denied);
        assert!(matches!(
            read_authorization(answer("Allow", &Context::method_arn()).as_bytes()),
            Authorization::Allowed(_)
        ));
        assert_eq!(read_authorization(br#"{"principalId":"a"}"#), Authorization::Denied);
        assert_eq!(read_authorization(b"null"), Authorization::Invalid);
        assert_eq!(read_authorization(&vec![b' '; AUTHORIZATION_BYTES + 1]), Authorization::Invalid);
        let nested = br#"{"principalId":"a","policyDocument":{"Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]},"context":{"x":{}}}"#;
        assert_eq!(read_authorization(nested), Authorization::Invalid);
    }

    #[test]
    fn patterns_of_policies() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbcd", false),
            ("a?c*", "abc", true),
            ("a?c", "ac", false),
            ("execute-api:*", "execute-api:Invoke", true),
        ] {
            assert_eq!(is_match(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn answers_of_routes() {
        let done = |body: &str| RouteAnswer::Done(Some(body.to_owned()));
        assert_eq!(read_answer(br#"{"statusCode":200,"body":"x\n","isBase64Encoded":false}"#), done("x\n"));
        assert_eq!(read_answer(br#"{"statusCode":204,"body":null}"#), RouteAnswer::Done(None));
        assert_eq!(read_answer(br#"{"statusCode":200,"body":""}"#), RouteAnswer::Done(None));
        assert_eq!(read_answer(br#"{"statusCode":200}"#), RouteAnswer::Done(None));
        assert_eq!(read_answer(br#"{"statusCode":403}"#), RouteAnswer::Failed);
        assert_eq!(read_answer(b"null"), RouteAnswer::Failed);
        assert_eq!(read_answer(b"{}"), RouteAnswer::Failed);
    }
}
