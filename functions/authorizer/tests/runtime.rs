//! The function as Lambda runs it: a process that fetches events from the Runtime API and posts its
//! answers there. Everything it prints is looked at for the token.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

const ARN: &str = "arn:aws:execute-api:eu-central-1:123456789012:abcdef1234/dev/$connect";

/// One request of the function: its first line and its body.
fn request(stream: &mut BufReader<TcpStream>) -> Option<(String, String)> {
    let mut line = String::new();
    let mut length = 0;
    if stream.read_line(&mut line).unwrap() == 0 {
        return None;
    }
    loop {
        let mut field = String::new();
        stream.read_line(&mut field).unwrap();
        let Some((name, value)) = field.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    Some((line, String::from_utf8(body).unwrap()))
}

/// Runs the function until it has answered all events: what it answered, and all that it printed.
fn run(environment: &[(&str, &str)], events: &[String]) -> (Vec<(String, Value)>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut function = Command::new(env!("CARGO_BIN_EXE_authorizer"))
        .env_clear()
        .envs([
            ("AWS_LAMBDA_FUNCTION_NAME", "authorizer"),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "128"),
            ("AWS_LAMBDA_FUNCTION_VERSION", "1"),
            ("AWS_LAMBDA_LOG_LEVEL", "DEBUG"),
            ("AWS_LAMBDA_LOG_FORMAT", "JSON"),
        ])
        .env("AWS_LAMBDA_RUNTIME_API", listener.local_addr().unwrap().to_string())
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = Vec::new();
    let mut waiting = events.iter();
    'serve: loop {
        let (stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut stream = BufReader::new(stream);
        while let Some((line, body)) = request(&mut stream) {
            let answer = if line.starts_with("GET /2018-06-01/runtime/invocation/next ") {
                let Some(event) = waiting.next() else { break 'serve };
                format!(
                    "HTTP/1.1 200 OK\r\nlambda-runtime-aws-request-id: r1\r\nlambda-runtime-deadline-ms: 99999999999999\r\n\
                     lambda-runtime-invoked-function-arn: arn:aws:lambda:x\r\ncontent-length: {}\r\n\r\n{event}",
                    event.len(),
                )
            } else {
                let kind =
                    line.split([' ', '/']).rev().find(|part| ["response", "error"].contains(part)).unwrap();
                answers.push((kind.to_owned(), serde_json::from_str(&body).unwrap()));
                "HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n".into()
            };
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
        }
    }
    function.kill().unwrap();
    let output = function.wait_with_output().unwrap();
    let printed = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (answers, printed)
}

fn event(authorization: &str) -> String {
    let mut event = json!({
        "type": "REQUEST", "methodArn": ARN,
        "headers": {}, "multiValueHeaders": {},
        "requestContext": {"connectionId": "L0SM9cOFvHcCIhw=", "eventType": "CONNECT", "routeKey": "$connect"},
    });
    if !authorization.is_empty() {
        event["headers"]["Authorization"] = json!(authorization);
        event["multiValueHeaders"]["Authorization"] = json!([authorization]);
    }
    event.to_string()
}

fn sign(key: &Ed25519KeyPair, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(&json!({"alg": "EdDSA", "kid": "key-1"})), part(claims));
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(key.sign(message.as_bytes())))
}

#[test]
fn answers_under_the_runtime_api_and_prints_nothing_of_a_token() {
    let key = Ed25519KeyPair::generate().unwrap();
    let x = URL_SAFE_NO_PAD.encode(key.public_key());
    let jwks = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "key-1", "x": x}]}).to_string();
    let claims = json!({
        "iss": "agentd", "aud": "tunnel", "sub": "acme", "tunnels": ["web"],
        "exp": edge::unix_now() + 60, "jti": "id-of-the-token",
    });
    let good = sign(&key, &claims);
    let mut expired = claims.clone();
    expired["exp"] = json!(1000);
    let expired = sign(&key, &expired);
    let forged = sign(&Ed25519KeyPair::generate().unwrap(), &claims);
    let events = [
        event(&format!("Bearer {good}")),
        event(&format!("Bearer {expired}")),
        event(&format!("Bearer {forged}")),
        event(&format!("Basic {good}")),
        // A header value that no HTTP library takes: the runtime would show it if it read the event.
        event(&format!("Bearer \u{1}{good}")),
        event(""),
    ];
    let (answers, printed) = run(&[("TUNNEL_JWKS", &jwks)], &events);

    let effects: Vec<_> = answers
        .iter()
        .map(|(kind, answer)| {
            (
                kind.as_str(),
                answer["policyDocument"]["Statement"][0]["Effect"].as_str(),
                answer["errorMessage"].as_str(),
            )
        })
        .collect();
    let denied = ("response", Some("Deny"), None);
    assert_eq!(
        effects,
        [
            ("response", Some("Allow"), None),
            denied,
            denied,
            denied,
            denied,
            ("error", None, Some("Unauthorized"))
        ]
    );
    assert_eq!(answers[0].1["context"]["tunnels"], "web");
    assert_eq!(answers[1], answers[2]);

    for reason in [
        "the token has expired",
        "signature is wrong",
        "not a bearer token",
        "event is malformed",
        "key-1",
        "acme",
    ] {
        assert!(printed.contains(reason), "{reason} is not in:\n{printed}");
    }
    for token in [&good, &expired, &forged] {
        for part in token.split('.').skip(1) {
            assert!(!printed.contains(&part[..16]), "a part of a token is in:\n{printed}");
        }
    }
    assert!(!printed.contains("id-of-the-token") && !printed.contains("Bearer"), "{printed}");
}

#[test]
fn refuses_everything_without_a_key_and_says_so() {
    let (answers, printed) = run(&[], &[event("Bearer a.b.c")]);
    assert_eq!(answers[0].1["policyDocument"]["Statement"][0]["Effect"], "Deny");
    assert!(printed.contains("no key is configured") && printed.contains("TUNNEL_JWKS"), "{printed}");
}
