//! Peers that mean no good: agents that break the protocol or answer for others, public clients that try
//! to have one request taken for two.
//!
//! That a state machine with `.waitForTaskToken` is refused in an EXPRESS workflow, as AWS refuses it, is
//! shown beside the reader of state machines in `local`.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

mod agents;
mod messages;
mod requests;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use proto::{
    header::Headers,
    limits,
    message::{AgentMessage, Refusal, Reply, VERSION},
};
use tests::{
    Local, PATIENCE,
    client::{Answer, Connection, Request},
    raw_agent::{Call, RawAgent},
    upstream::Upstream,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{http::StatusCode, protocol::frame::coding::Data};

/// Sends a request whose answer is awaited elsewhere.
fn ask(local: &Local, tunnel: &str, target: &str) -> JoinHandle<Answer> {
    let (request, public) = (Request::to(tunnel, "GET", target), local.public);
    tokio::spawn(async move { request.send(public).await })
}

/// A tenant of its own that sends good traffic until it is told to stop; how many requests it has made.
fn good_traffic(local: &Local, tunnel: &'static str) -> (Arc<AtomicBool>, JoinHandle<usize>) {
    let (public, stop) = (local.public, Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let task = tokio::spawn(async move {
        let mut done = 0;
        while !stopped.load(Ordering::Relaxed) {
            let body = format!("undisturbed-{done}").into_bytes();
            let answer =
                Request::to(tunnel, "POST", &format!("/{done}")).body(body.clone()).send(public).await;
            assert_eq!((answer.status, &answer.body), (200, &body), "request {done}: {}", answer.text());
            assert_eq!(answer.field("x-evil"), None);
            done += 1;
        }
        done
    });
    (stop, task)
}

#[tokio::test]
async fn nothing_that_any_process_prints_is_secret() {
    let upstream = Upstream::start(|_, mut conn| async move {
        let fields = "Set-Cookie: session=COOKIE-OUT\r\nX-Secret: FIELD-OUT\r\nContent-Type: text/plain\r\n";
        conn.answer("200 OK", fields, b"BODY-OUT").await.then_some(conn)
    })
    .await;
    let local = Local::start(&["--log-level", "debug"]);
    let token = local.issue("alice", &["web", "raw"]);
    let tunnel = format!("[[tunnel]]\nname = \"web\"\nupstream = \"{}\"\n", upstream.address());
    let level = [("AGENTD_LOG_LEVEL", "debug")];
    let agent = local.agent_of(&local.token_file(&token), &level, &tunnel, &["web"]);
    let mut raw_agent = RawAgent::with(&local, &token).await;
    raw_agent.hello(&["raw"]).await;
    let request = |tunnel: &str| {
        Request::to(tunnel, "POST", "/path?query=QUERY-IN")
            .field("Cookie", "session=COOKIE-IN")
            .field("Authorization", "Bearer FIELD-IN")
            .field("X-Secret", "FIELD-IN")
            .body(b"BODY-IN".to_vec())
    };
    assert_eq!(request("web").send(local.public).await.status, 200);
    // Also where things go wrong: an unknown tunnel, answers that are wrong, forged or late.
    assert_eq!(request("nobody").send(local.public).await.status, 404);
    let (asked, public) = (request("raw"), local.public);
    let asked = tokio::spawn(async move { asked.send(public).await });
    let call = raw_agent.request().await;
    let forged = format!("{}A", call.token);
    raw_agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{forged}","status":200,"headers":[["x-secret","FIELD-OUT"]],"body":{{"text":"BODY-OUT"}},"end":true}}"#
        ))
        .await;
    raw_agent.say_text("BODY-OUT, and no message").await;
    raw_agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[["x secret","FIELD-OUT"]],"body":{{"text":"BODY-OUT"}},"end":true}}"#,
            call.token
        ))
        .await;
    assert_eq!(asked.await.unwrap().status, 502);
    raw_agent.say_text(r#"{"type":"hello","seq":"BODY-OUT","version":1}"#).await;
    let upgrade = request("web").field("Upgrade", "websocket").send(local.public).await;
    assert_eq!(upgrade.status, 501);
    assert_eq!(local.revoke(serde_json::json!({"owner": "alice"})).await, 2);
    assert_eq!(raw_agent.closed().await, Some(1000));
    tests::eventually("what was invalid has been logged", async || {
        let printed = local.process().printed();
        printed.contains("agent's answer is invalid") && printed.contains("agent's message was dropped")
    })
    .await;
    let printed = local.process().printed() + &agent.process().printed();
    let front = local.variables("ingress").await["TUNNEL_FRONT_SECRET"].as_str().unwrap().to_owned();
    let keys = local.variables("response").await["TUNNEL_TOKEN_KEYS"].as_str().unwrap().to_owned();
    let parts = token.split('.').map(|part| part[..24].to_owned());
    let secrets = ["QUERY-IN", "COOKIE-IN", "FIELD-IN", "BODY-IN", "COOKIE-OUT", "FIELD-OUT", "BODY-OUT"]
        .map(str::to_owned)
        .into_iter()
        .chain(parts)
        .chain([call.token[..24].to_owned(), call.token[call.token.len() - 24..].to_owned(), front, keys]);
    for secret in secrets {
        let line = printed.lines().find(|line| line.contains(&secret));
        assert!(line.is_none(), "{secret} was printed: {line:?}");
    }
    assert!(printed.lines().count() > 20, "there was something to look at");
}
