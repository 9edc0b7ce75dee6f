//! Agents that break the protocol, or answer for others.

use super::*;

/// A heartbeat that is exactly so long.
fn heartbeat_of(bytes: usize) -> String {
    let (front, back) = (r#"{"type":"heartbeat","seq":7,"padding":""#, r#""}"#);
    format!("{front}{}{back}", "x".repeat(bytes - front.len() - back.len()))
}

#[tokio::test]
async fn an_agent_without_a_valid_token_is_not_let_in() {
    let local = Local::start(&[]);
    assert_eq!(RawAgent::dial(&local, None).await.unwrap_err(), StatusCode::UNAUTHORIZED);
    let token = std::fs::read_to_string(&local.token).unwrap();
    let (signed, signature) = token.trim().rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    for bad in [
        "Bearer x".to_owned(),
        "Bearer a.b.c".to_owned(),
        format!("Bearer {signed}."),
        format!("Bearer {signed}.{other}{}", &signature[1..]),
    ] {
        let refused = RawAgent::dial(&local, Some(&bad)).await.unwrap_err();
        assert!([StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED].contains(&refused), "{bad}: {refused}");
    }
    let forged = format!("Bearer {signed}.{other}{}", &signature[1..]);
    assert_eq!(RawAgent::dial(&local, Some(&forged)).await.unwrap_err(), StatusCode::FORBIDDEN);
    RawAgent::open(&local, &["web"]).await;
}

#[tokio::test]
async fn frames_and_messages_have_the_lengths_of_the_real_service() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let frame = heartbeat_of(limits::FRAME_BYTES);
    agent.say_frame(Data::Text, frame.as_bytes(), true).await;
    assert_eq!(agent.hear().await, r#"{"type":"heartbeat","seq":7}"#, "32 KB in one frame pass");
    agent.say_text(&heartbeat_of(limits::MESSAGE_BYTES)).await;
    assert_eq!(agent.hear().await, r#"{"type":"heartbeat","seq":7}"#, "128 KB in frames pass");

    agent.say_frame(Data::Text, heartbeat_of(limits::FRAME_BYTES + 1).as_bytes(), true).await;
    assert_eq!(agent.closed().await, Some(1009), "a frame of one byte more");

    let mut agent = RawAgent::open(&local, &["web"]).await;
    agent.say_text(&heartbeat_of(limits::MESSAGE_BYTES + 1)).await;
    assert_eq!(agent.closed().await, Some(1009), "a message of one byte more");

    let mut agent = RawAgent::open(&local, &["web"]).await;
    agent.say_frame(Data::Binary, b"{}", true).await;
    assert_eq!(agent.closed().await, Some(1003), "a binary frame");
}

#[tokio::test]
async fn an_agent_of_another_version_is_told_so_and_one_that_says_less_or_more_is_served() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::with(&local, &local.as_ref().token()).await;
    for version in [0, VERSION + 1, u32::MAX] {
        agent
            .say_text(&format!(
                r#"{{"type":"hello","seq":{version},"version":{version},"agent":"a","tunnels":["web","a b"]}}"#
            ))
            .await;
        let welcome = agent.welcome().await;
        assert_eq!((welcome.seq, welcome.version, welcome.tunnels.len()), (version, VERSION, 0));
        let refused: Vec<_> = welcome.refused.iter().map(|one| (&*one.name, one.reason)).collect();
        assert_eq!(refused, [("web", Refusal::OtherVersion), ("a b", Refusal::OtherVersion)]);
    }
    assert_eq!(Request::to("web", "GET", "/").send(local.public).await.status, 404, "it serves nothing");
    // What the first agents said, and what later ones may say.
    for hello in [
        r#"{"type":"hello","seq":1,"version":1,"agent":"a","tunnels":["web"]}"#,
        r#"{"later":[{}],"type":"hello","seq":2,"version":1,"agent":"a","tunnels":["web"],"codecs":["later"],"software":""}"#,
    ] {
        agent.say_text(hello).await;
        let welcome = agent.welcome().await;
        assert_eq!(welcome.tunnels.len(), 1, "{hello}");
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        agent.say_text(r#"{"type":"later","seq":1}"#).await;
        let reply = format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[],"body":{{"text":"ok"}},"end":true,"later":1}}"#,
            call.token
        );
        agent.say_text(&reply).await;
        assert_eq!(asked.await.unwrap().text(), "ok");
    }
}

#[tokio::test]
async fn a_connection_that_is_gone_is_forgotten_by_the_run_that_notices() {
    let upstream = Upstream::echo().await;
    // Each post finds the connection gone, as it is when an agent's machine lost its power.
    let local = Local::start(&["--chaos", "seed=1,gone=1"]);
    let _agent = local.agent("web", &upstream.address());
    let before = local.counters().await;
    let answer = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!((answer.status, answer.field("x-tunnel-error").as_deref()), (503, Some("tunnel_offline")));
    let after = local.counters().await;
    let made = |call: &str| after.get(call).copied().unwrap_or(0) - before.get(call).copied().unwrap_or(0);
    assert_eq!((made("apigateway:invoke POST"), made("dynamodb:DeleteItem")), (1, 1), "{after:?}");
    let again = Request::to("web", "GET", "/").send(local.public).await;
    assert_eq!(again.status, 503);
    let last = local.counters().await;
    assert_eq!(last["apigateway:invoke POST"], after["apigateway:invoke POST"], "it is not asked again");
    assert!(upstream.recorded().is_empty());
}

#[tokio::test]
async fn late_double_stale_and_forged_answers_reach_nobody() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    let mut stale: Vec<Call> = Vec::new();
    for round in 0..12 {
        // Every fourth client leaves; its answer comes after that.
        let leaves = round % 4 == 3;
        let mut connection = Connection::open(local.public).await;
        let request = Request::to("web", "GET", &format!("/{round}"));
        connection.begin(&request).await;
        let call = agent.request().await;
        assert_eq!(call.target, format!("/{round}"));
        if leaves {
            drop(connection);
            agent.cancelled(&call).await;
            agent.say(call.reply("LATE", true)).await;
            stale.push(call);
            continue;
        }
        for old in &stale {
            agent.say(old.reply("STALE", true)).await;
            agent.say(old.chunk(1, "STALE", true)).await;
        }
        for forged in forgeries(&call, stale.last()) {
            agent.say(forged.reply("FORGED", true)).await;
        }
        let own = format!("own-{round}");
        agent.say(call.reply(&own, true)).await;
        agent.say(call.reply(&own, true)).await;
        agent.say(call.chunk(1, "MORE", true)).await;
        let answer = connection.answer("GET").await;
        assert_eq!((answer.status, answer.text(), answer.complete), (200, own, true));
        stale.push(call);
        stale.drain(..stale.len().saturating_sub(3));
    }
}

/// Tokens that look much like the one of `call`.
fn forgeries(call: &Call, other: Option<&Call>) -> Vec<Call> {
    let with = |token: String| Call { token, ..call.clone() };
    let flip = |at: usize| {
        let mut bytes = call.token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        with(String::from_utf8(bytes).unwrap())
    };
    let last = call.token.len() - 2;
    let mut list = vec![
        with(String::new()),
        with("x".into()),
        with("A".repeat(call.token.len())),
        with(format!("{}A", call.token)),
        with(call.token[..last].to_owned()),
        flip(12),
        flip(30),
        flip(last),
    ];
    if let Some(other) = other {
        // What one token says with what another is signed by.
        let half = call.token.len() - 44;
        list.push(with(format!("{}{}", &call.token[..half], &other.token[other.token.len() - 44..])));
    }
    list
}

#[tokio::test]
async fn pieces_in_any_order_and_number_make_the_one_body() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        for _ in 0..2 {
            for seq in order {
                let text = format!("[{seq}]");
                match seq {
                    0 => agent.say(call.reply(&text, false)).await,
                    _ => agent.say(call.chunk(seq, &text, seq == 3)).await,
                }
            }
        }
        let answer = asked.await.unwrap();
        assert_eq!((answer.text().as_str(), answer.complete), ("[0][1][2][3]", true), "{order:?}");
    }
}

/// Answers that the protocol does not allow, with what is wrong with each.
fn invalid_answers(token: &str) -> Vec<(&'static str, String)> {
    let reply = |rest: &str| format!(r#"{{"type":"reply","token":"{token}",{rest}}}"#);
    let status = |status: &str| reply(&format!(r#""status":{status},"headers":[],"end":true"#));
    let fields = |list: &str| reply(&format!(r#""status":200,"headers":[{list}],"end":true"#));
    let body = |body: &str| reply(&format!(r#""status":200,"headers":[],"body":{body},"end":true"#));
    let many = vec![r#"["a","b"]"#; limits::HEADER_FIELDS + 1].join(",");
    let long = format!(r#"["a","{}"]"#, "x".repeat(limits::HEAD_BYTES));
    vec![
        ("status 999", status("999")),
        ("status 0", status("0")),
        ("status -1", status("-1")),
        ("status 101", status("101")),
        ("status 70000", status("70000")),
        ("a status that is a text", status("\"200\"")),
        ("a line end in a value", fields(r#"["a","x\r\nSet-Cookie: evil=1"]"#)),
        ("a bare line feed in a value", fields(r#"["a","x\ny"]"#)),
        ("a null byte in a value", fields(r#"["a","x\u0000"]"#)),
        ("a space in a name", fields(r#"["a b","x"]"#)),
        ("a line end in a name", fields(r#"["a\r\nb","x"]"#)),
        ("an empty name", fields(r#"["","x"]"#)),
        ("1001 fields", fields(&many)),
        ("a head over its limit", fields(&long)),
        ("broken base64", body(r#"{"base64":"%%%"}"#)),
        ("base64 without padding", body(r#"{"base64":"eA"}"#)),
        ("what is not zstd", body(r#"{"zstd":"AAAA"}"#)),
        // Three blocks of 128 KiB, all of one byte.
        ("zstd that unfolds to more than it may", body(r#"{"zstd":"KLUv/aAAAAYAAgAQAAIAEAADABAA"}"#)),
        ("a body of an unknown form", body(r#"{"brotli":"AAAA"}"#)),
        ("chunk 0", format!(r#"{{"type":"chunk","token":"{token}","seq":0,"end":true}}"#)),
        (
            "a chunk beyond the window",
            format!(r#"{{"type":"chunk","token":"{token}","seq":{},"end":true}}"#, limits::CHUNK_WINDOW * 4),
        ),
        (
            "a failure of an unknown kind",
            format!(r#"{{"type":"failed","token":"{token}","seq":0,"code":"x"}}"#),
        ),
        ("a reply of nothing", format!(r#"{{"type":"reply","token":"{token}"}}"#)),
    ]
}

#[tokio::test]
async fn an_agents_invalid_answer_is_502_for_its_own_client_and_for_nobody_else() {
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let _good = local.agent("good", &upstream.address());
    let mut agent = RawAgent::open(&local, &["bad"]).await;
    let count = invalid_answers("").len();
    for index in 0..count {
        let asked = ask(&local, "bad", "/");
        let call = agent.request().await;
        let (what, text) = invalid_answers(&call.token).swap_remove(index);
        agent.say_text(&text).await;
        let answer = asked.await.unwrap();
        let seen = (answer.status, answer.field("x-tunnel-error"));
        assert_eq!(seen, (502, Some("agent_invalid".into())), "{what}: {}", answer.text());
        assert_eq!(answer.field("set-cookie"), None, "{what}");
        let good = Request::to("good", "POST", "/").body(b"undisturbed".to_vec()).send(local.public).await;
        assert_eq!((good.status, good.text().as_str()), (200, "undisturbed"), "after {what}");
        // The agent says its last word, as one that is cancelled does.
        agent
            .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"cancelled"}}"#, call.token))
            .await;
    }
    let asked = ask(&local, "bad", "/");
    let call = agent.request().await;
    agent.say_text(r#"{"type":"dance"}"#).await;
    agent.say_text("not even JSON").await;
    agent.say_text(&format!(r#"{{"type":"dance","token":"{}"}}"#, call.token)).await;
    agent.say(call.reply("better now", true)).await;
    assert_eq!(asked.await.unwrap().text(), "better now", "what has no meaning is dropped");
}

#[tokio::test]
async fn a_body_that_turns_invalid_or_contradicts_its_length_is_broken_off() {
    let local = Local::start(&[]);
    let mut agent = RawAgent::open(&local, &["web"]).await;
    for (what, rest) in [
        ("broken base64", r#""seq":1,"body":{"base64":"%"},"end":true"#),
        ("beyond the window", r#""seq":4000,"end":true"#),
        ("chunk 0", r#""seq":0,"end":true"#),
    ] {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", "/")).await;
        let call = agent.request().await;
        agent.say(call.reply("half", false)).await;
        assert_eq!(connection.head().await.status, 200);
        assert_eq!(connection.chunk().await.unwrap(), b"half");
        agent.say_text(&format!(r#"{{"type":"chunk","token":"{}",{rest}}}"#, call.token)).await;
        assert_eq!(connection.chunk().await, None, "{what}: no last chunk");
        agent.cancelled(&call).await;
        agent
            .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":1,"code":"cancelled"}}"#, call.token))
            .await;
    }
    // A last word under a number that was used before ends nothing.
    let mut connection = Connection::open(local.public).await;
    connection.begin(&Request::to("web", "GET", "/")).await;
    let call = agent.request().await;
    agent.say(call.reply("half", false)).await;
    assert_eq!(connection.head().await.status, 200);
    agent
        .say_text(&format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"upstream_reset"}}"#, call.token))
        .await;
    agent.say(call.chunk(1, "+half", false)).await;
    agent.say(call.chunk(2, "", true)).await;
    assert_eq!(connection.chunked_body().await, b"half+half");

    for (length, body) in [("8", "half"), ("4", "too long")] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        let mut headers = Headers::new();
        headers.push("content-length".parse().unwrap(), length.parse().unwrap());
        let reply = Reply {
            token: call.token.as_str().into(),
            status: 200,
            headers,
            body: Some(proto::body::Body::Text(body.into())),
            end: true,
        };
        agent.say(AgentMessage::Reply(reply)).await;
        let answer = asked.await.unwrap();
        assert!(!answer.complete, "{length}: {:?}", answer.text());
    }
    for fields in [
        r#"["content-length","4"],["content-length","5"]"#,
        r#"["content-length","-4"]"#,
        r#"["content-length","0x4"]"#,
    ] {
        let asked = ask(&local, "web", "/");
        let call = agent.request().await;
        agent
            .say_text(&format!(
                r#"{{"type":"reply","token":"{}","status":200,"headers":[{fields}],"body":{{"text":"body"}},"end":true}}"#,
                call.token
            ))
            .await;
        assert_eq!(asked.await.unwrap().status, 502, "{fields}");
    }
    let asked = ask(&local, "web", "/");
    let call = agent.request().await;
    agent
        .say_text(&format!(
            r#"{{"type":"reply","token":"{}","status":200,"headers":[["transfer-encoding","chunked"],["connection","x"],["content-length","4"]],"body":{{"text":"body"}},"end":true}}"#,
            call.token
        ))
        .await;
    let answer = asked.await.unwrap();
    assert_eq!((answer.text().as_str(), answer.complete), ("body", true));
    assert_eq!(answer.field("transfer-encoding"), None);
}

#[tokio::test]
async fn nobody_opens_or_answers_for_the_tunnel_of_another_owner() {
    let local = Local::start(&[]);
    let alice = format!("Bearer {}", local.issue("alice", &["web"]));
    let mallory = format!("Bearer {}", local.issue("mallory", &["other"]));
    let greedy = format!("Bearer {}", local.issue("greedy", &["web"]));
    let mut alice = RawAgent::dial(&local, Some(&alice)).await.unwrap();
    alice.hello(&["web"]).await;
    let mut mallory = RawAgent::dial(&local, Some(&mallory)).await.unwrap();
    mallory.hello(&["other"]).await;
    for (authorization, agent) in [(None, Some(&mut mallory)), (Some(greedy), None)] {
        let mut own;
        let agent = match (agent, authorization) {
            (Some(agent), _) => agent,
            (None, authorization) => {
                own = RawAgent::dial(&local, authorization.as_deref()).await.unwrap();
                &mut own
            }
        };
        agent
            .say_text(r#"{"type":"hello","seq":9,"version":1,"agent":"raw","tunnels":["web"],"codecs":[]}"#)
            .await;
        let welcome = agent.hear().await;
        assert!(welcome.contains(r#""refused":[{"name":"web""#), "{welcome}");
        assert!(welcome.contains(r#""tunnels":[]"#), "{welcome}");
    }
    let asked = ask(&local, "web", "/");
    let call = alice.request().await;
    // The token has leaked to somebody with a connection of his own.
    mallory.say(call.reply("EVIL", true)).await;
    mallory.say_text(r#"{"type":"heartbeat","seq":3}"#).await;
    assert!(mallory.hear().await.contains("heartbeat"), "his message is behind him");
    alice.say(call.reply("own", true)).await;
    let answer = asked.await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "own"));
    tests::eventually("the message is seen and dropped", async || {
        local.process().printed().contains("agent's message was dropped")
    })
    .await;
}

#[tokio::test]
async fn a_foreign_agent_with_a_live_token_answers_nothing() {
    let local = Local::start(&[]);
    let mut alice = RawAgent::with(&local, &local.issue("alice", &["web"])).await;
    alice.hello(&["web"]).await;
    // A token that opens everything: what it may open is not what is asked of it.
    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["*"])).await;
    mallory.hello(&["other"]).await;
    let mut stale: Option<Call> = None;
    for round in 0..6 {
        let mut connection = Connection::open(local.public).await;
        connection.begin(&Request::to("web", "GET", "/")).await;
        let call = alice.request().await;
        for known in stale.iter().chain([&call]) {
            mallory.say(known.reply("EVIL", round % 2 == 0)).await;
            mallory.say(known.chunk(1, "EVIL", true)).await;
            let failed =
                format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"upstream_reset"}}"#, known.token);
            mallory.say_text(&failed).await;
        }
        mallory.say_text(r#"{"type":"heartbeat","seq":3}"#).await;
        assert!(mallory.hear().await.contains("heartbeat"), "the messages are behind it");
        alice.say(call.reply("own", false)).await;
        assert_eq!(connection.head().await.status, 200);
        mallory.say(call.chunk(1, "EVIL", true)).await;
        alice.say(call.chunk(1, "-own", true)).await;
        assert_eq!(connection.chunked_body().await, b"own-own", "round {round}");
        stale = Some(call);
    }
}
