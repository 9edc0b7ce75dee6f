//! Requests that the edge has kept: only their outcome goes back.

use std::sync::Mutex;

use proto::{
    body::Body,
    delivery::{
        Answer, Ask, Attempt, DeliveriesAnswer, Holds, PolicyNotice, Refused, State, Summary, bounds,
    },
    error::ErrorCode,
    header::Headers,
    id::DeliveryId,
    limits,
    message::{AgentMessage, EdgeMessage, Request},
};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::inspector::{Inspected, run_at};
use crate::page::Shelf;
use crate::stage::{
    Line, Manners, OK, Sent, connected, connected_with, get, noise, request, with_body, with_header,
};

fn kept(mut request: Request<'static>) -> Request<'static> {
    let delivery = Attempt { id: request.request_id.as_str().parse().unwrap(), attempt: 1, received_ms: 1 };
    request.delivery = Some(delivery);
    request
}

#[tokio::test]
async fn only_the_outcome_of_a_delivery_goes_back() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let sent = kept(with_header(with_body(request("POST", "/in?a=%2F"), b"\x00hook"), "x-sig", b"a, b"));
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    let head = peer.head().await;
    assert!(head.starts_with("POST /in?a=%2F HTTP/1.1\r\n") && head.contains("\r\nx-sig: a, b"), "{head}");
    let mut body = [0; 5];
    peer.stream.read_exact(&mut body).await.unwrap();
    assert_eq!(&body, b"\x00hook");
    let answer = "HTTP/1.1 429 Later\r\nretry-after: 7\r\nx-secret: s\r\nset-cookie: a=b\r\ncontent-length: 4\r\n\r\nbody";
    peer.write(answer.as_bytes()).await;
    let Sent::Reply { token, status, headers, body, end } = line.answer().await else { panic!("a reply") };
    assert_eq!((&*token, status, &body[..], end), (&*sent.token, 429, &b""[..], true));
    assert_eq!(headers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["retry-after"]);
    // Its connection is used again, and nothing else was said.
    line.request(&kept(request("POST", "/2"))).await;
    assert!(peer.head().await.starts_with("POST /2 "));
    peer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, end: true, .. }));
    // What no upstream has answered is a failure, as ever. (Over a connection that was kept it would be broken off.)
    drop((peer, upstream));
    line.request(&kept(request("POST", "/3"))).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamUnreachable));
}

#[tokio::test]
async fn the_body_of_a_delivery_comes_unasked_and_what_there_is_no_room_for_is_refused() {
    let (_edge, mut line, upstream, _agent) = connected().await;
    let body = noise(limits::REQUEST_BODY_BYTES);
    let announced = || {
        let mut sent = kept(request("POST", "/"));
        sent.announced = Some(body.len() as u64);
        sent
    };
    let first = announced();
    let pieces: Vec<&[u8]> = body.chunks(limits::CHUNK_BYTES).collect();
    // Nothing promises that the request comes before its first piece.
    line.piece(&first, 1, pieces[0], false).await;
    line.request(&first).await;
    for (number, piece) in pieces.iter().enumerate().skip(1) {
        line.piece(&first, number as u32 + 1, piece, number + 1 == pieces.len()).await;
    }
    let mut peer = upstream.accept().await;
    peer.head().await;
    let mut read = vec![0; body.len()];
    peer.stream.read_exact(&mut read).await.unwrap();
    assert!(read == body);
    peer.write(OK).await;
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, end: true, .. }));
    // All of the memory for bodies is promised to these.
    let all = 32 * 1024 * 1024 / body.len();
    let held: Vec<_> = (0..all).map(|_| announced()).collect();
    for sent in &held {
        line.request(sent).await;
    }
    line.request(&announced()).await;
    assert_eq!(line.failure().await, (0, ErrorCode::AgentBusy));
    for sent in &held {
        line.cancel(sent).await;
        line.failure().await;
    }
    line.request(&kept(with_body(request("POST", "/after"), b"x"))).await;
    // Those that were cancelled had called already.
    loop {
        let mut peer = upstream.accept().await;
        if peer.head().await.starts_with("POST /after ") {
            peer.write(OK).await;
            break;
        }
    }
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, .. }));
}

#[tokio::test]
async fn no_more_deliveries_than_there_may_be_reach_the_service_and_live_requests_pass_them() {
    // Nothing is said of deliveries here, so the most that any tunnel may have holds.
    let (_edge, mut line, upstream, _agent) =
        connected_with(Manners::default(), &["--max-concurrent", "100"]).await;
    let most = *bounds::MAX_CONCURRENT.end();
    let mut peers = Vec::new();
    for _ in 0..most {
        line.request(&kept(request("POST", "/held"))).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peers.push(peer);
    }
    line.request(&kept(request("POST", "/more"))).await;
    assert_eq!(line.failure().await, (0, ErrorCode::AgentBusy));
    line.request(&get("/live")).await;
    assert!(upstream.answer(OK).await.1.starts_with("GET /live "));
    assert!(line.answer().await.is_end());
    peers[0].write(OK).await;
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, end: true, .. }));
    line.request(&kept(request("POST", "/more"))).await;
    // On the connection that has become free, or a new one where it comes before that is so.
    let more = tokio::select! {
        Some(head) = peers[0].head_or_end() => head,
        (_, head) = upstream.answer(OK) => head,
    };
    assert!(more.starts_with("POST /more "), "{more}");
}

#[tokio::test]
async fn what_an_edge_does_not_take_of_a_tunnels_deliveries_is_said_and_breaks_nothing() {
    // An edge of an earlier release says nothing about policies, and one before that keeps no deliveries.
    for (deliveries, told, kept, notice) in [
        (true, None, true, None),
        (false, None, false, None),
        (
            true,
            Some((Holds::Live, "unknown variant `sender`\u{1b}[31m")),
            false,
            Some(
                "the edge does not take these settings, so nothing is kept (as with \"live\"): unknown variant `sender`[31m",
            ),
        ),
        (
            true,
            Some((Holds::Bounds, "attempts must be from 1 to 5, not 10")),
            true,
            Some("the edge takes the nearest settings that it allows: attempts must be from 1 to 5, not 10"),
        ),
        (
            true,
            Some((Holds::Other, "later")),
            true,
            Some("the edge does not take all of these settings: later"),
        ),
    ] {
        let policies: Vec<_> = told
            .map(|(holds, why)| PolicyNotice::new("web", holds, why))
            .into_iter()
            // Of a tunnel that is not ours.
            .chain([PolicyNotice::new("foreign", Holds::Live, "no")])
            .collect();
        let manners = Manners { deliveries, policies, ..Manners::default() };
        let mut stage = Inspected::daemon_at("delivery = \"auto\"", manners).await;
        let delivery = stage.status().await["tunnels"][0]["delivery"].clone();
        assert_eq!((&delivery["mode"], &delivery["kept"]), (&"auto".into(), &kept.into()), "{delivery}");
        assert_eq!(delivery["notice"].as_str(), notice, "{delivery}");
        if let Some(notice) = notice {
            // As it is quoted in a line of JSON.
            let quoted = serde_json::to_string(notice).unwrap();
            stage.agent.says(quoted.trim_matches('"')).await;
        }
        // The tunnel works whatever was said.
        stage.line.request(&get("/")).await;
        let mut peer = stage.upstream.accept().await;
        peer.head().await;
        peer.write(OK).await;
        assert!(matches!(stage.line.answer().await, Sent::Reply { status: 200, .. }));
        assert!(!stage.agent.log().contains("foreign"));
    }
}

#[tokio::test]
async fn what_is_secret_in_a_delivery_is_masked_unless_it_is_revealed() {
    let mut stage = Inspected::daemon("delivery = \"durable\"").await;
    let mut shelf = Shelf::default();
    shelf.put(State::Dead, "/dead", b"\xe4\xff", b"body");
    let id = shelf.kept[0].0.id.to_string();
    let shelf = Mutex::new(shelf);
    let socket = stage.socket();
    let shown = async {
        let (code, text, error) = run_at(&socket, &["delivery", "show", &id]).await;
        assert!(code == 0 && text.contains("authorization: *** (14 bytes"), "{text}{error}");
        assert!(text.contains("x-hostile: \\xe4\\xff") && !text.contains("hunter2"), "{text}");
        let (_, text, _) = run_at(&socket, &["delivery", "show", &id, "--json"]).await;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let masked = json!({"masked": true, "length": 14});
        assert_eq!(json["headers"], json!([["x-hostile", {"base64": "5P8="}], ["authorization", masked]]));
        let (_, text, _) = run_at(&socket, &["delivery", "show", &id, "--reveal"]).await;
        assert!(text.contains("authorization: Bearer hunter2"), "{text}");
        assert_eq!(run_at(&socket, &["delivery", "show", &id, "--body"]).await.1, "body");
    };
    tokio::select! {
        () = Shelf::serve(&shelf, &mut stage.line) => {}
        () = shown => {}
    }
}

#[tokio::test]
async fn a_delivery_may_take_as_long_as_its_own_settings_say() {
    let (_edge, mut line, upstream, _agent) =
        connected_with(Manners::default(), &["--request-timeout", "200ms"]).await;
    line.request(&kept(request("POST", "/report"))).await;
    let mut peer = upstream.accept().await;
    assert!(peer.head().await.starts_with("POST /report "));
    // A live request that came later has timed out, so the delivery would have, too.
    line.request(&get("/live")).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTimedOut));
    peer.write(OK).await;
    assert!(matches!(line.answer().await, Sent::Reply { status: 200, end: true, .. }));
    // Its own bound holds.
    let mut brief = kept(request("POST", "/brief"));
    brief.timeout_ms = 50;
    line.request(&brief).await;
    assert_eq!(line.failure().await, (0, ErrorCode::UpstreamTimedOut));
}

/// Answers what the agent asks about deliveries, one after the other; what it has asked.
async fn tell(line: &mut Line, answers: Vec<Answer<'static>>) -> Vec<Ask> {
    let mut asked = Vec::new();
    for answer in answers {
        loop {
            let text = line.text().await.expect("a question before the end");
            let AgentMessage::Deliveries(question) = AgentMessage::decode(&text).unwrap() else {
                line.control(&text).await;
                continue;
            };
            asked.push(question.ask);
            line.send(&EdgeMessage::Deliveries(DeliveriesAnswer { seq: question.seq, answer })).await;
            break;
        }
    }
    asked
}

fn listed(state: State) -> Summary {
    Summary {
        id: DeliveryId::new(1_790_000_000_000, [1; 10]),
        tunnel: "web".parse().unwrap(),
        state,
        received_ms: 1_790_000_000_000,
        expires_at: 1_790_300_000,
        attempt: 1,
        method: "POST".into(),
        target: "/".into(),
        body_bytes: 4,
        run: None,
        last: None,
    }
}

#[tokio::test]
async fn what_is_waited_for_is_asked_in_one_question_until_the_edge_says_that_nothing_is_left() {
    let mut stage = Inspected::daemon("delivery = \"auto\"").await;
    let socket = stage.socket();
    let page = |list: &[State], cursor: Option<&str>| Answer::Deliveries {
        list: list.iter().copied().map(listed).collect(),
        cursor: cursor.map(str::to_owned),
    };
    let busy = || Answer::Refused { reason: Refused::Busy };
    // An edge of an earlier release lists what has ended, too.
    let answers = vec![
        page(&[State::Delivered, State::Waiting], None),
        busy(),
        page(&[State::Dead], Some("next")),
        page(&[State::Delivering], Some("more")),
        page(&[State::Delivered, State::Cancelled], Some("next")),
        page(&[], None),
    ];
    let waits = ["delivery", "drain", "--wait", "60s"];
    let ((code, said, error), asked) = tokio::join!(run_at(&socket, &waits), tell(&mut stage.line, answers));
    assert_eq!((code, said.trim_end()), (0, "nothing waits"), "{error}");
    let cursors: Vec<_> = asked
        .iter()
        .map(|ask| match ask {
            Ask::List { tunnel: None, state: None, open: true, since_ms: None, cursor } => cursor.as_deref(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(cursors, [None, None, None, Some("next"), None, Some("next")]);
    // Who does not wait is told at once, and so is what another try does not change.
    for (refused, args) in [
        (busy(), &["delivery", "drain"][..]),
        (Answer::Refused { reason: Refused::NotFound }, &["delivery", "drain", "--tunnel", "x", "--wait"]),
    ] {
        let ((code, said, _), _) = tokio::join!(run_at(&socket, args), tell(&mut stage.line, vec![refused]));
        assert_eq!((code, &*said), (1, ""), "{args:?}");
    }
}

#[tokio::test]
async fn what_a_tunnel_kept_before_it_became_live_is_found_and_a_body_that_is_gone_is_said_to_be() {
    let mut stage = Inspected::daemon("").await;
    let socket = stage.socket();
    let id = listed(State::Delivered).id.to_string();
    let shown = |state: State, body: &[u8]| Answer::Delivery {
        summary: Box::new(listed(state)),
        headers: Headers::new(),
        body: Some(Body::encode(body).into_owned()),
        more: None,
    };
    for (state, body, args, wanted, printed) in [
        (State::Dead, &b"body"[..], &["--body"][..], 0, "body"),
        (State::Delivered, b"", &["--body"], 1, ""),
        (State::Delivered, b"", &["--body", "--json"], 1, "{"),
        (State::Dead, b"body", &["--body", "--json"], 0, "{"),
    ] {
        let args = [&["delivery", "show", &id], args].concat();
        let answers = vec![shown(state, body)];
        let ((code, said, error), asked) =
            tokio::join!(run_at(&socket, &args), tell(&mut stage.line, answers));
        assert!(matches!(&asked[..], [Ask::Show { tunnel, .. }] if tunnel.as_str() == "web"), "{asked:?}");
        assert_eq!((code, said.is_empty()), (wanted, printed.is_empty()), "{args:?}: {said}{error}");
        assert!(said.starts_with(printed), "{said}");
        assert_eq!(said.contains("\"body\":"), printed == "{" && !body.is_empty(), "{said}");
        assert_eq!(error.contains("its body is kept no more"), body.is_empty(), "{error}");
    }
    // Where there may be several, one that the edge has not given to the agent keeps nobody from the others.
    let answers = vec![Answer::Refused { reason: Refused::NotFound }];
    let retry = ["delivery", "retry", "--dead", "--json"];
    let ((code, said, _), _) = tokio::join!(run_at(&socket, &retry), tell(&mut stage.line, answers));
    assert_eq!((code, said.trim_end()), (0, "{\"done\":0}"));
}
