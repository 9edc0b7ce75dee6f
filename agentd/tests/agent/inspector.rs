//! The inspector: what it keeps of what passes, how it shows it, and what it sends again.

use std::path::Path;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use proto::error::ErrorCode;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};

use crate::stage::{
    Agent, Edge, Line, Manners, OK, Sent, TOKEN, Upstream, agentd, get, noise, patiently, private_file,
    request, with_body, with_header,
};

/// An agent that is inspected, and how to ask it.
pub(crate) struct Inspected {
    edge: Edge,
    pub(crate) line: Line,
    pub(crate) upstream: Upstream,
    pub(crate) agent: Agent,
    folder: tempfile::TempDir,
    pub(crate) address: String,
    token: String,
}

/// What was answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }
}

async fn exchange<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(
    mut stream: S,
    method: &str,
    target: &str,
    fields: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut head = format!("{method} {target} HTTP/1.1\r\nconnection: close\r\n");
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    patiently("an answer of the inspector", stream.read_to_end(&mut answer)).await.unwrap();
    let at = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a whole head");
    let head = String::from_utf8(answer[..at].to_vec()).unwrap();
    Answer { status: head[9..12].parse().unwrap(), head, body: answer[at + 4..].to_vec() }
}

impl Inspected {
    pub(crate) async fn start(more: &[&str]) -> Self {
        let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
        let folder = tempfile::tempdir().unwrap();
        let mut command = agentd();
        command.env("AGENTD_TOKEN", TOKEN).env("AGENTD_LOG_LEVEL", "debug");
        command.env("AGENTD_CONTROL_SOCKET", folder.path().join("control.sock"));
        command.args(["http", &upstream.port.to_string(), "--name", "web", "--edge", &edge.url]);
        command.args(["--inspect-address", "127.0.0.1:0"]).args(more);
        Self::of(edge, upstream, folder, Agent::spawn(command), Manners::default()).await
    }

    /// The daemon with a configuration; `{upstream}` in it is the upstream's port.
    pub(crate) async fn daemon(more: &str) -> Self {
        Self::daemon_at(more, Manners::default()).await
    }

    /// The same at an edge with these manners.
    pub(crate) async fn daemon_at(more: &str, manners: Manners) -> Self {
        let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
        let folder = tempfile::tempdir().unwrap();
        configure(&edge, &upstream, folder.path(), more);
        let agent = Agent::run(&folder.path().join("agentd.toml"));
        Self::of(edge, upstream, folder, agent, manners).await
    }

    async fn of(
        edge: Edge,
        upstream: Upstream,
        folder: tempfile::TempDir,
        agent: Agent,
        manners: Manners,
    ) -> Self {
        let line = edge.welcome_with(manners).await;
        let mut inspected =
            Self { edge, line, upstream, agent, folder, address: String::new(), token: String::new() };
        let url = inspected.status().await["inspector"].as_str().unwrap_or_default().to_owned();
        if let Some(address) = url.strip_prefix("http://") {
            inspected.address = address.to_owned();
            let page = inspected.call("GET", "/", &[], b"").await.text();
            let (_, rest) = page.split_once("name=\"token\" content=\"").expect("a token in the page");
            inspected.token = rest.split_once('"').unwrap().0.to_owned();
        }
        inspected
    }

    /// Kills the daemon, and starts it anew with its inspector where it was.
    pub(crate) async fn restart(&mut self) {
        self.agent.child.kill().await.unwrap();
        let config = self.folder.path().join("agentd.toml");
        let text = std::fs::read_to_string(&config).unwrap().replace("127.0.0.1:0", &self.address);
        private_file(self.folder.path(), "agentd.toml", &text).unwrap();
        self.agent = Agent::run(&config);
        self.line = self.edge.welcome_with(Manners::default()).await;
    }

    pub(crate) fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("control.sock")
    }

    /// Asks over the control socket.
    async fn control(&self, method: &str, target: &str, body: &[u8]) -> Answer {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        exchange(stream, method, target, &[("host", "localhost")], body).await
    }

    pub(crate) async fn status(&self) -> Value {
        self.control("GET", "/status", b"").await.json()
    }

    /// Asks over TCP with these fields behind `host`.
    async fn call(&self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        let fields = [&[("host", &*self.address)], fields].concat();
        self.call_as(method, target, &fields, body).await
    }

    async fn call_as(&self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        let stream = TcpStream::connect(&self.address).await.unwrap();
        exchange(stream, method, target, fields, body).await
    }

    pub(crate) async fn get(&self, target: &str) -> Value {
        let answer = self.call("GET", target, &[], b"").await;
        assert_eq!(answer.status, 200, "{target}: {answer:?}");
        answer.json()
    }

    async fn ids(&self, query: &str) -> Vec<u64> {
        let list = self.get(&format!("/api/requests?{query}")).await;
        list["requests"].as_array().unwrap().iter().map(|row| row["id"].as_u64().unwrap()).collect()
    }

    async fn replay(&self, id: u64, edits: &Value) -> Answer {
        let target = format!("/api/requests/{id}/replay");
        let fields = [("x-inspector-token", &*self.token)];
        self.call("POST", &target, &fields, edits.to_string().as_bytes()).await
    }

    /// Sends a request through the tunnel and answers it; what the upstream got.
    pub(crate) async fn pass(
        &mut self,
        request: proto::message::Request<'static>,
        response: &[u8],
    ) -> (String, Vec<u8>) {
        let body = request.body.clone().map(|body| body.decode().unwrap()).unwrap_or_default();
        self.line.request(&request).await;
        let mut peer = self.upstream.accept().await;
        let head = peer.head().await;
        let got = peer.bytes(body.len()).await;
        peer.write(response).await;
        drop(peer);
        self.line.whole(&request).await;
        (head, got)
    }
}

fn configure(edge: &Edge, upstream: &Upstream, folder: &Path, more: &str) {
    private_file(folder, "token", TOKEN).unwrap();
    let text = format!(
        "inspect_address = \"127.0.0.1:0\"\n{}\n[edge]\nurl = \"{}\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = {}\n{}\n",
        "",
        edge.url,
        upstream.port,
        more.replace("{upstream}", &upstream.port.to_string())
    );
    private_file(folder, "agentd.toml", &text).unwrap();
    std::fs::create_dir_all(folder.join("site")).unwrap();
    std::fs::write(folder.join("site/a.txt"), "a file").unwrap();
}

#[tokio::test]
async fn what_passes_is_kept_and_what_is_secret_is_masked() {
    let mut stage = Inspected::start(&[]).await;
    let mut sent = with_body(request("POST", "/hook?a=1&a=2"), b"{\"k\": \"needle\"}");
    for (name, value) in [
        ("b", &b"1"[..]),
        ("authorization", b"Bearer hunter2"),
        ("obs", b"\xe4\xff"),
        ("x-forwarded-proto", b"https"),
        ("x-forwarded-host", b"web.example.com"),
        ("webhook-signature", b"v1,x"),
        ("webhook-timestamp", b"1000000000"),
    ] {
        sent = with_header(sent, name, value);
    }
    let id = sent.request_id.to_string();
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH\xcd\xc9\xc9W(\xcf/\xcaI\x01\0\x85\x11J\r\x0b\0\0\0";
    let mut response =
        format!("HTTP/1.1 201 Created\r\nSet-Cookie: a=hunter2\r\nset-cookie: b\r\ncontent-encoding: gzip\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", gzip.len())
            .into_bytes();
    response.extend(gzip);
    stage.pass(sent, &response).await;

    let list = stage.get("/api/requests").await;
    let row = &list["requests"][0];
    for (key, wanted) in [
        ("id", json!(1)),
        ("tunnel", json!("web")),
        ("source", json!("edge")),
        ("request_id", json!(id)),
        ("method", json!("POST")),
        ("target", json!("/hook?a=1&a=2")),
        ("url", json!("https://web.example.com/hook?a=1&a=2")),
        ("status", json!(201)),
        ("state", json!("ended")),
        ("outcome", json!("complete")),
        ("error", Value::Null),
        ("request_bytes", json!(15)),
        ("response_bytes", json!(gzip.len())),
        ("content_type", json!("text/plain")),
    ] {
        assert_eq!(row[key], wanted, "{key} of {row}");
    }
    let detail = stage.get("/api/requests/1").await;
    let masked = |length: usize| json!({"masked": true, "length": length});
    let fields: Vec<(String, Value)> = serde_json::from_value(detail["request"]["fields"].clone()).unwrap();
    let names: Vec<_> = fields.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names[..4], ["host", "b", "authorization", "obs"]);
    assert_eq!(fields[2].1, masked(14));
    assert_eq!(fields[3].1, json!({"base64": "5P8="}));
    let answered = &detail["response"]["fields"];
    assert_eq!(answered[0], json!(["set-cookie", masked(9)]));
    assert_eq!(detail["request"]["body"]["base64"], "eyJrIjogIm5lZWRsZSJ9");
    assert_eq!(detail["response"]["body"]["decoded"]["base64"], "aGVsbG8gd29ybGQ=", "{detail}");
    assert_eq!(detail["signature"]["too_old"], true);
    assert_eq!(detail["replayable"], Value::Null);
    let times = &detail["times"];
    let at = |key: &str| times[key].as_u64().unwrap();
    assert!(
        at("connected_us") <= at("head_us")
            && at("head_us") <= at("first_byte_us")
            && at("last_byte_us") <= at("ended_us")
    );

    // What is masked is told to nobody without the token, and not found by a search.
    assert!(!stage.call("GET", "/api/requests/1", &[], b"").await.text().contains("hunter2"));
    assert_eq!(stage.call("GET", "/api/requests/1?reveal=true", &[], b"").await.status, 403);
    let token = [("x-inspector-token", &*stage.token)];
    let revealed = stage.call("GET", "/api/requests/1?reveal=true", &token, b"").await.json();
    assert_eq!(revealed["request"]["fields"][2][1], "Bearer hunter2");
    assert_eq!(stage.ids("text=NEEDLE").await, [1]);
    assert_eq!(stage.ids("text=hunter2").await, [0; 0]);
    for (target, status) in [("/api/har", 200), ("/api/requests/1/curl", 200), ("/api/har?reveal=1", 403)] {
        let answer = stage.call("GET", target, &[], b"").await;
        assert_eq!(answer.status, status, "{target}");
        assert!(!answer.text().contains("hunter2"), "{target}");
    }
    assert!(stage.call("GET", "/api/har?reveal=1", &token, b"").await.text().contains("hunter2"));
    assert!(!stage.agent.log().contains("hunter2") && !stage.agent.log().contains("needle"));
}

#[tokio::test]
async fn a_replay_is_the_same_bytes_and_an_edit_changes_only_what_it_names() {
    let mut stage = Inspected::start(&[]).await;
    let body = noise(70_000);
    let mut sent = with_body(request("PUT", "/a//b?%C3%A4=|{x}"), &body);
    for (name, value) in [("b", &b"1"[..]), ("cookie", b"s=1"), ("b", b"2"), ("obs", b"\xe4\xff"), ("e", b"")]
    {
        sent = with_header(sent, name, value);
    }
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 17\r\n\r\n{\"a\": 1, \"b\": 2}\n";
    let (head, got) = stage.pass(sent, answer).await;
    assert!(got == body);

    let marked = format!("{head}\r\nx-tunnel-replay: 1");
    let ids = stage.replay(1, &json!({})).await;
    assert_eq!((ids.status, ids.json()), (202, json!({"ids": [2]})));
    let mut peer = stage.upstream.accept().await;
    assert_eq!(peer.head().await, marked);
    assert!(peer.bytes(body.len()).await == body);
    peer.write(b"HTTP/1.1 307 x\r\nlocation: /elsewhere\r\ncontent-type: application/json\r\ncontent-length: 16\r\n\r\n{\"b\": 2, \"a\": 3}").await;
    let replayed = stage.get("/api/requests/2?wait=20").await;
    assert_eq!((&replayed["source"], &replayed["replay_of"]), (&json!("replay"), &json!(1)));
    let diff = &replayed["diff"];
    assert_eq!(diff["status"], json!({"before": 200, "after": 307}));
    assert_eq!(diff["body"]["json"], json!([{"pointer": "/a", "before": "1", "after": "3"}]));
    let names: Vec<_> =
        diff["fields"].as_array().unwrap().iter().map(|field| field["name"].clone()).collect();
    assert_eq!(names, ["content-length", "location"]);
    assert_eq!(stage.get("/api/requests/1").await["replays"], json!([2]));
    // The redirect was not followed: what comes next on the wire is the next replay, on the same connection.
    let edits =
        json!({"method": "PATCH", "set": [["b", "3"], ["new", "n"]], "body": {"text": "short"}, "times": 2});
    assert_eq!(stage.replay(1, &edits).await.json(), json!({"ids": [3, 4]}));
    let wanted = head
        .replace("PUT ", "PATCH ")
        .replace("\r\nb: 1\r\nb: 2", "\r\nb: 3")
        .replace("content-length: 70000", "content-length: 5")
        + "\r\nnew: n\r\nx-tunnel-replay: 1";
    for id in [3, 4] {
        assert_eq!(peer.head().await, wanted);
        assert_eq!(peer.bytes(5).await, b"short");
        peer.write(OK).await;
        assert_eq!(stage.get(&format!("/api/requests/{id}?wait=20")).await["outcome"], "complete");
    }
    // An upstream that is away is an outcome like any other.
    let Inspected { upstream, .. } = &stage;
    assert_eq!(stage.replay(1, &json!({"times": 1})).await.status, 202);
    peer.head().await;
    drop(peer);
    assert!(upstream.port > 0);
    let failed = stage.get("/api/requests/5?wait=20").await;
    assert_eq!((&failed["outcome"], &failed["error"]), (&json!("failed"), &json!("upstream_reset")));
    let bad =
        [json!({"times": 0}), json!({"times": 101}), json!({"target": "/a b"}), json!({"x": 1}), json!([])];
    for bad in bad {
        assert_eq!(stage.replay(1, &bad).await.status, 400, "{bad}");
    }
    assert_eq!(stage.replay(99, &json!({})).await.status, 404);
}

#[tokio::test]
async fn what_the_agent_answers_itself_is_shown_and_not_sent_to_an_upstream() {
    let mut stage = Inspected::daemon(
        "inspect = true\ndeny_ips = [\"10.6.6.6\"]\nip_except = [\"/status\", \"/old\", \"/site/*\", \"/else\"]\n\
         [[tunnel.route]]\npath = \"/closed\"\nrespond = { status = 204 }\n\
         [[tunnel.route]]\npath = \"/status\"\nrespond = { status = 203, body = \"fixed\" }\n\
         [[tunnel.route]]\npath = \"/old\"\nredirect = { to = \"/new\", status = 308 }\n\
         [[tunnel.route]]\npath = \"/site\"\nfiles = \"site\"\nstrip_prefix = true\n",
    )
    .await;
    // The edge names no address here, so that no other path is open.
    let cases = [
        ("/status", 203, "fixed", Value::Null),
        ("/old", 308, "", Value::Null),
        ("/site/a.txt", 200, "a file", Value::Null),
        ("/site/none", 404, "no_such_file", json!("no_such_file")),
        ("/closed", 403, "address_refused", json!("address_refused")),
        ("/refused", 403, "address_refused", json!("address_refused")),
    ];
    for (id, (target, status, body, error)) in (1..).zip(cases) {
        let sent = request("GET", target);
        stage.line.request(&sent).await;
        stage.line.whole(&sent).await;
        let detail = stage.get(&format!("/api/requests/{id}?wait=20")).await;
        assert_eq!((&detail["target"], &detail["status"]), (&json!(target), &json!(status)), "{detail}");
        assert_eq!((&detail["answered_by"], &detail["error"]), (&json!("agent"), &error), "{detail}");
        let kept = BASE64_STANDARD.decode(detail["response"]["body"]["base64"].as_str().unwrap()).unwrap();
        assert!(String::from_utf8(kept).unwrap().contains(body), "{detail}");
        // What was refused may be wanted in development, where it would have gone to an upstream.
        assert_eq!(detail["replayable"].is_null(), target == "/refused", "{detail}");
        if target == "/refused" {
            continue;
        }
        assert_eq!(detail["upstream"], "", "{detail}");
        let why = if error.is_null() { "answered this itself" } else { "no upstream was to get this" };
        for edits in [json!({}), json!({"body": {"text": "x"}})] {
            let refused = stage.replay(id, &edits).await;
            assert_eq!(refused.status, 422, "{refused:?}");
            assert!(refused.text().contains(why), "{}", refused.text());
        }
    }
    stage.pass(get("/else"), OK).await;
    let rows = stage.get("/api/requests?path=/else").await;
    assert_eq!(rows["requests"][0]["answered_by"], "upstream");
}

#[tokio::test]
async fn what_cannot_be_sent_again_says_why() {
    let mut stage = Inspected::daemon("inspect = true\ninspect_body = 1000").await;
    stage.pass(with_body(request("POST", "/"), &[b'x'; 1000]), OK).await;
    stage.pass(with_body(request("POST", "/"), &[b'x'; 1001]), OK).await;
    let body = stage.get("/api/requests/2").await["request"]["body"].clone();
    assert_eq!((&body["size"], &body["kept"], &body["cut"]), (&json!(1001), &json!(1000), &json!(true)));
    let refused = stage.replay(2, &json!({})).await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("1000 of 1001 bytes"), "{}", refused.text());
    assert_eq!(stage.call("GET", "/api/requests/2/curl", &[], b"").await.status, 422);
    assert_eq!(stage.replay(1, &json!({})).await.status, 202);
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    peer.bytes(1000).await;
    peer.write(OK).await;

    // The tunnel is gone: nothing goes anywhere else.
    let text = std::fs::read_to_string(stage.folder.path().join("agentd.toml")).unwrap();
    let text = text.replace("name = \"web\"", "name = \"other\"");
    private_file(stage.folder.path(), "agentd.toml", &text).unwrap();
    let stream = UnixStream::connect(stage.socket()).await.unwrap();
    let reload = exchange(stream, "POST", "/reload", &[("host", "localhost")], b"");
    let (reloaded, ()) = tokio::join!(reload, async { stage.line.expect_hello().await });
    assert_eq!(reloaded.status, 200, "{reloaded:?}");
    let gone = stage.replay(1, &json!({})).await;
    assert_eq!(gone.status, 409);
    assert!(gone.text().contains("the tunnel web is gone"), "{}", gone.text());

    // No tunnel may lead to the inspector.
    let port = stage.address.rsplit(':').next().unwrap();
    let exposed = text.replace(&format!("upstream = {}", stage.upstream.port), &format!("upstream = {port}"));
    private_file(stage.folder.path(), "agentd.toml", &exposed).unwrap();
    let refused = stage.control("POST", "/reload", b"").await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("own inspector"), "{}", refused.text());
}

#[tokio::test]
async fn a_tunnel_that_is_not_inspected_keeps_nothing_and_nobody_listens() {
    let mut stage = Inspected::daemon("").await;
    assert_eq!(stage.status().await.get("inspector"), None);
    stage.pass(get("/"), OK).await;
    assert_eq!(stage.control("GET", "/api/requests", b"").await.json()["requests"], json!([]));
    // A reload turns it on, and off again.
    for (setting, listens) in [("inspect = true", true), ("inspect = false", false)] {
        let text = std::fs::read_to_string(stage.folder.path().join("agentd.toml")).unwrap();
        private_file(
            stage.folder.path(),
            "agentd.toml",
            &format!("{text}\n{setting}\n").replace(if listens { "never" } else { "inspect = true" }, ""),
        )
        .unwrap();
        let reloaded = stage.control("POST", "/reload", b"").await;
        assert_eq!(reloaded.status, 200, "{reloaded:?}");
        assert_eq!(stage.status().await.get("inspector").is_some(), listens, "{setting}");
        stage.pass(get(setting.split(' ').next_back().map_or("/", |_| "/x")), OK).await;
    }
    let kept = stage.control("GET", "/api/requests", b"").await.json();
    assert_eq!(kept["requests"].as_array().unwrap().len(), 1);
    let without = Inspected::start(&["--no-inspect"]).await;
    assert_eq!(without.status().await.get("inspector"), None);
}

#[tokio::test]
async fn who_is_no_page_or_program_of_this_machine_is_refused() {
    let mut stage = Inspected::start(&[]).await;
    stage.pass(get("/secret"), OK).await;
    let own = stage.address.clone();
    let origin = format!("http://{own}");
    let (host, token) = (("host", &*own), ("x-inspector-token", &*stage.token));
    for (method, target, fields) in [
        // Rebinding: the name is the attacker's, for pages, calls and streams alike.
        ("GET", "/", &[("host", "evil.example")][..]),
        ("GET", "/api/requests", &[("host", "evil.example:4040"), ("origin", "http://evil.example:4040")]),
        ("GET", "/api/events", &[("host", "evil.example")]),
        ("GET", "/api/requests", &[("host", "localhost.evil.example")]),
        ("GET", "/api/requests", &[]),
        ("POST", "/api/requests/1/replay", &[("host", "evil.example"), token]),
        // Another origin, also one of this machine.
        ("GET", "/api/requests", &[host, ("origin", "http://localhost:3000")]),
        ("GET", "/api/requests/1", &[host, ("sec-fetch-site", "cross-site")]),
        ("GET", "/page.js", &[host, ("sec-fetch-site", "same-site")]),
        ("POST", "/api/requests/1/replay", &[host, token, ("origin", "https://evil.example")]),
        // A visitor whom a tunnel lets in.
        ("GET", "/api/requests", &[host, ("x-forwarded-for", "192.0.2.1")]),
        ("GET", "/", &[host, ("via", "1.1 tunnel")]),
        // Without the token.
        ("POST", "/api/requests/1/replay", &[host]),
        ("POST", "/api/requests/1/replay", &[host, ("origin", &*origin)]),
        ("POST", "/api/requests/1/replay", &[host, ("x-inspector-token", "x")]),
        ("POST", "/api/requests/1/replay", &[host, token, token]),
        ("POST", "/api/import", &[host]),
        ("DELETE", "/api/requests", &[host]),
        ("GET", "/api/requests/1/curl?reveal=true", &[host]),
    ] {
        let answer = stage.call_as(method, target, fields, b"").await;
        assert_eq!(answer.status, 403, "{method} {target} {fields:?}: {answer:?}");
        assert!(!answer.text().contains("/secret"));
    }
    assert!(stage.upstream.is_untouched().await, "nothing was sent");
    assert_eq!(stage.ids("").await, [1]);
    let page = stage.call("GET", "/", &[], b"").await;
    for wanted in [
        "content-security-policy: default-src 'none'",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
    ] {
        assert!(page.head.contains(wanted), "{}", page.head);
    }
    assert_eq!(stage.call("GET", "/../etc/passwd", &[], b"").await.status, 404);
    assert_eq!(stage.call("PUT", "/api/requests", &[token], b"").await.status, 405);
    // Who may open the control socket needs no token.
    assert_eq!(stage.control("DELETE", "/api/requests", b"").await.status, 204);
    assert_eq!(stage.ids("").await, [0; 0]);
}

/// Runs a command against the agent: code, standard output, standard error.
async fn run(stage: &Inspected, args: &[&str]) -> (i32, String, String) {
    run_at(&stage.socket(), args).await
}

/// The same against the agent with this control socket.
pub(crate) async fn run_at(socket: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = agentd();
    command.env("AGENTD_CONTROL_SOCKET", socket).args(args);
    let output = patiently("the end of a command", command.output()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn the_terminal_lists_shows_follows_replays_and_exports() {
    use std::os::unix::fs::PermissionsExt as _;
    use tokio::io::AsyncBufReadExt as _;
    let mut stage = Inspected::start(&[]).await;
    let sent = with_header(with_body(request("POST", "/hook"), b"in"), "authorization", b"hunter2");
    stage
        .pass(
            with_header(sent, "x-esc", b"\xc2\x9b31m"),
            b"HTTP/1.1 503 no\r\ncontent-length: 5\r\n\r\n\x1b[31m",
        )
        .await;
    stage.pass(get("/fine"), OK).await;

    let (code, list, _) = run(&stage, &["requests"]).await;
    let lines: Vec<_> = list.lines().collect();
    assert!(code == 0 && lines.len() == 2, "{list}");
    assert!(
        lines[0].starts_with("    1  ") && lines[0].contains("POST    503") && lines[0].ends_with("/hook")
    );
    let (_, list, _) = run(&stage, &["requests", "--status", "5xx", "--json"]).await;
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((list.as_array().unwrap().len(), &list[0]["id"]), (1, &json!(1)));
    let (code, _, error) = run(&stage, &["requests", "--status", "9xx"]).await;
    assert!(code == 1 && error.contains("is no status"), "{error}");

    let (code, shown, _) = run(&stage, &["request", "show", "1"]).await;
    assert!(code == 0 && shown.contains("authorization: *** (7 bytes"), "{shown}");
    assert!(shown.contains("x-esc: \\u{9b}31m") && !shown.contains("hunter2"), "{shown}");
    assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
    let (_, shown, _) = run(&stage, &["request", "show", "1", "--reveal"]).await;
    assert!(shown.contains("authorization: hunter2"), "{shown}");
    // Where it is no terminal, a body is what passed.
    assert_eq!(
        run(&stage, &["request", "show", "1", "--body"]).await,
        (0, "\x1b[31m".to_owned(), String::new())
    );
    assert_eq!(run(&stage, &["request", "show", "9"]).await.0, 1);

    let mut follow = agentd();
    follow.env("AGENTD_CONTROL_SOCKET", stage.socket()).args(["requests", "--follow", "--errors", "--json"]);
    let mut follow = follow.spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(follow.stdout.take().unwrap()).lines();
    let mut line = async || {
        let line = patiently("a line", lines.next_line()).await.unwrap().unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    assert_eq!(line().await["id"], 1, "what is there comes first");
    let file = stage.folder.path().join("body");
    std::fs::write(&file, b"another body").unwrap();
    let data = format!("@{}", file.display());
    let args = ["replay", "1", "--times", "2", "--set", "X-New: 1", "--remove", "x-esc", "--data", &data];
    let upstream = async {
        for _ in 0..2 {
            let mut peer = stage.upstream.accept().await;
            let head = peer.head().await;
            assert!(
                head.contains("\r\nauthorization: hunter2\r\n") && head.contains("\r\nx-new: 1\r\n"),
                "{head}"
            );
            assert!(!head.contains("x-esc") && head.ends_with("\r\nx-tunnel-replay: 1"), "{head}");
            assert_eq!(peer.bytes(12).await, b"another body");
            peer.write(b"HTTP/1.1 500 no\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno").await;
        }
    };
    let ((code, printed, error), ()) = tokio::join!(run(&stage, &args), upstream);
    assert_eq!(code, 0, "{printed} {error}");
    assert!(printed.contains("(replay of 1)") && printed.contains("status 503 -> 500"), "{printed}");
    assert_eq!((line().await["id"].clone(), line().await["id"].clone()), (json!(3), json!(4)));
    follow.kill().await.unwrap();
    assert_eq!(run(&stage, &["replay", "1", "--set", "nonsense"]).await.0, 2);

    let file = stage.folder.path().join("out.har");
    std::fs::write(&file, "x".repeat(100_000)).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let name = file.display().to_string();
    assert_eq!(run(&stage, &["export", "--har", &name]).await, (0, String::new(), String::new()));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let har = std::fs::read_to_string(&file).unwrap();
    assert!(!har.contains("hunter2"));
    let entries = serde_json::from_str::<Value>(&har).unwrap()["log"]["entries"].as_array().unwrap().len();
    assert_eq!(entries, 4);
    let (code, curl, _) = run(&stage, &["export", "--curl", "1"]).await;
    assert!(code == 0 && curl.contains("--header 'authorization: ***'"), "{curl}");
    assert_eq!(run(&stage, &["export", "--har", "-", "2"]).await.1.matches("\"startedDateTime\"").count(), 1);
    assert_eq!(run(&stage, &["export"]).await.0, 2);
    assert_eq!(run(&stage, &["import", "--har", &name]).await.1, "5\n6\n7\n8\n");
    assert_eq!(run(&stage, &["import", "--har", &name, "--tunnel", "web"]).await.1, "9\n10\n11\n12\n");
    let (code, _, error) = run(&stage, &["import", "--tunnel", "web"]).await;
    assert!(code == 2 && error.contains("<--har <FILE>|--curl <FILE>>"), "{error}");
    let (_, _, error) = run(&stage, &["import", "--har", &name, "--tunnel", "other"]).await;
    assert!(error.contains("the tunnel other is gone"), "{error}");
    // What cannot be written is said, also where it is not the only thing.
    for args in [
        &["requests"][..],
        &["requests", "--json"],
        &["requests", "--follow"],
        &["request", "show", "1"],
        &["request", "show", "1", "--body"],
        &["export", "--curl", "1"],
        &["import", "--har", &name],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = agentd();
        command.env("AGENTD_CONTROL_SOCKET", stage.socket()).args(args).stdout(full);
        let command = command.spawn().unwrap();
        let output = patiently("the end of a command", command.wait_with_output()).await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            "agentd: cannot write to standard output: No space left on device (os error 28)\n",
            "{args:?}"
        );
    }
    // An agent that is not there is named.
    let mut nobody = agentd();
    nobody.env("AGENTD_CONTROL_SOCKET", "none.sock").args(["requests"]);
    let nobody = nobody.output().await.unwrap();
    assert_eq!(nobody.status.code(), Some(1));
}

#[tokio::test]
async fn who_follows_ends_when_nobody_reads_any_more() {
    use tokio::io::AsyncBufReadExt as _;
    let mut stage = Inspected::start(&[]).await;
    stage.pass(get("/first"), OK).await;
    let follow = |stage: &Inspected| {
        let mut follow = agentd();
        follow.env("AGENTD_CONTROL_SOCKET", stage.socket()).args(["requests", "--follow"]);
        follow
    };
    let mut to_pipe = follow(&stage).spawn().unwrap();
    let mut pipe = tokio::io::BufReader::new(to_pipe.stdout.take().unwrap());
    patiently("a line", pipe.read_line(&mut String::new())).await.unwrap();
    drop(pipe);
    let ended = patiently("the end of who follows", to_pipe.wait()).await.unwrap();
    assert!(ended.success(), "{ended}");

    // Of other readers the next line tells.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut ours = tokio::io::BufReader::new(UnixStream::from_std(ours).unwrap());
    let mut to_socket = follow(&stage).stdout(std::os::fd::OwnedFd::from(theirs)).spawn().unwrap();
    patiently("a line", ours.read_line(&mut String::new())).await.unwrap();
    drop(ours);
    stage.pass(get("/second"), OK).await;
    let ended = patiently("the end of who follows", to_socket.wait()).await.unwrap();
    assert!(ended.success(), "{ended}");
}

/// Reads server-sent events as they come.
struct Events {
    stream: TcpStream,
    text: String,
}

impl Events {
    async fn open(stage: &Inspected, query: &str) -> Self {
        let mut stream = TcpStream::connect(&stage.address).await.unwrap();
        let head = format!("GET /api/events?{query} HTTP/1.1\r\nhost: {}\r\n\r\n", stage.address);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut events = Self { stream, text: String::new() };
        events.until("retry: 1000").await;
        events
    }

    /// Reads on until `wanted` is there; what stood before it is taken off.
    async fn until(&mut self, wanted: &str) {
        patiently(&format!("the event {wanted}"), async {
            while !self.text.contains(wanted) {
                let mut bytes = [0; 16 * 1024];
                let read = self.stream.read(&mut bytes).await.unwrap();
                assert!(read > 0, "{wanted} did not come: {}", self.text);
                self.text.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
            }
        })
        .await;
        let at = self.text.find(wanted).unwrap();
        self.text.drain(..at);
    }
}

#[tokio::test]
async fn those_who_listen_leave_room_for_who_asks() {
    let stage = Inspected::start(&[]).await;
    let mut all = Vec::new();
    for _ in 0..32 {
        all.push(Events::open(&stage, "").await);
    }
    let refused = stage.call("GET", "/api/events", &[], b"").await;
    assert!(refused.status == 503 && refused.text().contains("listen already"), "{refused:?}");
    assert!(stage.ids("").await.is_empty());
    // Who goes gives the place back.
    all.pop();
    patiently("there is a place", async {
        loop {
            let mut stream = TcpStream::connect(&stage.address).await.unwrap();
            let head = format!("GET /api/events HTTP/1.1\r\nhost: {}\r\n\r\n", stage.address);
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut status = [0; 12];
            stream.read_exact(&mut status).await.unwrap();
            if status == *b"HTTP/1.1 200" {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_stream_is_shown_while_it_flows_and_filters_hold() {
    let mut stage = Inspected::start(&[]).await;
    let mut events = Events::open(&stage, "watch=all").await;
    let mut errors = Events::open(&stage, "errors=true").await;
    let sent = get("/stream");
    stage.line.request(&sent).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    events.until("\"change\":\"added\"").await;
    peer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n").await;
    events.until("\"change\":\"changed\"").await;
    for number in 0..3 {
        peer.write(format!("data: {number}\n\n")).await;
        // The piece is shown before the next one is sent.
        let shown = ["ZGF0YTogMAoK", "ZGF0YTogMQoK", "ZGF0YTogMgoK"][number];
        events.until(&format!("\"size\":9,\"base64\":\"{shown}\"")).await;
    }
    let detail = stage.get("/api/requests/1").await;
    assert_eq!((&detail["state"], &detail["response_bytes"]), (&json!("open"), &json!(27)));
    assert_eq!(detail["pieces"].as_array().unwrap().len(), 3);
    drop(peer);
    events.until("\"change\":\"ended\"").await;
    stage.line.whole(&sent).await;

    for (target, status) in [("/a", "404 no"), ("/b", "200 ok"), ("/c", "503 no")] {
        let response = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        stage.pass(get(target), response.as_bytes()).await;
    }
    errors.until("\"target\":\"/c\"").await;
    assert!(!errors.text.contains("/b") && !errors.text.contains("/stream"));
    for (query, wanted) in [
        ("status=5xx", &[4][..]),
        ("status=404,503", &[4, 2]),
        ("errors=1", &[4, 2]),
        ("path=/b", &[3]),
        ("method=post", &[]),
        ("tunnel=other", &[]),
        ("text=data:%202", &[1]),
        ("limit=2", &[4, 3]),
        ("limit=2&before=3", &[2, 1]),
        ("since=2", &[4, 3]),
    ] {
        assert_eq!(stage.ids(query).await, wanted, "{query}");
    }
    // What the agent itself refuses is listed too.
    stage.line.request(&request("CONNECT", "/")).await;
    assert_eq!(stage.line.failure().await, (0, ErrorCode::UpgradeUnsupported));
    let row = &stage.get("/api/requests?limit=1").await["requests"][0];
    assert_eq!((&row["outcome"], &row["error"]), (&json!("failed"), &json!("upgrade_unsupported")));
    // And so is what nobody waited for.
    let left = get("/left");
    stage.line.request(&left).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    stage.line.cancel(&left).await;
    peer.closed().await;
    assert_eq!(stage.get("/api/requests/6?wait=20").await["outcome"], "cancelled");
}

#[tokio::test]
async fn an_announced_body_and_a_large_answer_are_cut_and_pass_whole() {
    let mut stage = Inspected::start(&[]).await;
    let body = noise(400_000);
    let mut sent = request("POST", "/upload");
    sent.announced = Some(body.len() as u64);
    stage.line.request(&sent).await;
    let Sent::Continue { .. } = stage.line.answer().await else { panic!("continue is wanted") };
    for (number, piece) in body.chunks(90_000).enumerate() {
        let end = number == body.chunks(90_000).count() - 1;
        stage.line.piece(&sent, number as u32 + 1, piece, end).await;
    }
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    assert!(peer.bytes(body.len()).await == body);
    let large = noise(1 << 20);
    peer.write(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", large.len())).await;
    let (whole, ()) = tokio::join!(stage.line.whole(&sent), peer.write(&large));
    assert!(whole.body == large);
    let detail = stage.get("/api/requests/1").await;
    for (side, size) in [("request", body.len()), ("response", large.len())] {
        let body = &detail[side]["body"];
        assert_eq!(
            (&body["size"], &body["kept"], &body["cut"]),
            (&json!(size), &json!(256 << 10), &json!(true))
        );
    }
    assert!(detail["replayable"].as_str().unwrap().contains("cut"));
}

/// A request as an edge with forwarding fields sends it.
fn forwarded(method: &'static str, target: &str) -> proto::message::Request<'static> {
    let fields = [("x-forwarded-proto", "https"), ("x-forwarded-host", "web.example.com")];
    fields
        .into_iter()
        .fold(request(method, target), |sent, (name, value)| with_header(sent, name, value.as_bytes()))
}

#[tokio::test]
async fn what_a_route_changes_is_kept_as_the_upstream_gets_it() {
    let mut stage = Inspected::daemon(
        "inspect = true\n[[tunnel.route]]\npath = \"/api\"\nupstream = {upstream}\nstrip_prefix = true\nadd_prefix = \"/v1\"\n",
    )
    .await;
    let (head, _) = stage.pass(forwarded("GET", "/api/json?x=1"), OK).await;
    assert!(head.starts_with("GET /v1/json?x=1 HTTP/1.1\r\n"), "{head}");
    let url = "https://web.example.com/api/json?x=1";
    let row = &stage.get("/api/requests").await["requests"][0];
    assert_eq!((&row["target"], &row["url"]), (&json!("/v1/json?x=1"), &json!(url)));

    assert_eq!(stage.replay(1, &json!({})).await.status, 202);
    let mut peer = stage.upstream.accept().await;
    assert_eq!(peer.head().await, format!("{head}\r\nx-tunnel-replay: 1"));
    peer.write(OK).await;
    assert_eq!(stage.get("/api/requests/2?wait=20").await["url"], url);
    // Which public address would lead to another target, nobody knows.
    assert_eq!(stage.replay(1, &json!({"target": "/v2"})).await.status, 202);
    assert!(peer.head().await.starts_with("GET /v2 HTTP/1.1\r\n"));
    peer.write(OK).await;
    assert_eq!(stage.get("/api/requests/3?wait=20").await["url"], Value::Null);

    let har = stage.get("/api/har?ids=1").await;
    assert_eq!(har["log"]["entries"][0]["request"]["url"], url);
    for (target, wanted) in [
        ("/api/requests/1/curl", format!("'http://localhost:{}/v1/json?x=1'", stage.upstream.port)),
        ("/api/requests/1/curl?to=public", format!("'{url}'")),
    ] {
        let command = stage.call("GET", target, &[], b"").await.text();
        assert!(command.contains(&format!(" {wanted} ")), "{command}");
        // The edge knows the tunnel by the name in the address, and by no other.
        assert_eq!(command.contains("host: localhost"), !target.contains("public"), "{command}");
    }

    // In path mode the edge has taken off something before.
    let sent = with_header(forwarded("GET", "/api/json"), "x-forwarded-prefix", b"/web");
    stage.pass(sent, OK).await;
    let in_path_mode = "https://web.example.com/web/api/json";
    assert_eq!(stage.get("/api/requests/4").await["url"], in_path_mode);

    // An import is for the upstream what it was, and knows its public address; so to the byte.
    let sent = forwarded("GET", "/x?a[]=|");
    stage.line.request(&sent).await;
    assert!(peer.head().await.starts_with("GET /x?a[]=| HTTP/1.1\r\n"));
    peer.write(OK).await;
    stage.line.whole(&sent).await;
    let (token, kind) = (("x-inspector-token", &*stage.token), ("content-type", "application/json"));
    let har = stage.call("GET", "/api/har?ids=1,4,5", &[], b"").await.body;
    let imported = stage.call("POST", "/api/import", &[token, kind], &har).await;
    assert_eq!(imported.json(), json!({"ids": [6, 7, 8]}));
    let public = "https://web.example.com/x?a%5B%5D=%7C";
    for (id, target, url) in
        [(6, "/v1/json?x=1", url), (7, "/v1/json", in_path_mode), (8, "/x?a[]=|", public)]
    {
        let row = stage.get(&format!("/api/requests/{id}")).await;
        assert_eq!((&row["target"], &row["url"]), (&json!(target), &json!(url)));
    }
}

#[tokio::test]
async fn what_was_refused_is_replayed_to_where_it_would_have_gone() {
    let other = Upstream::bind().await;
    let routes = format!(
        "[[tunnel.route]]\npath = \"/api\"\nupstream = {}\nstrip_prefix = true\nadd_prefix = \"/v1\"\n",
        other.port
    );
    for (rule, error) in [
        ("deny_ips = [\"10.6.6.6\"]\n", "address_refused"),
        ("[[tunnel.verify]]\nscheme = \"github\"\nsecret_file = \"token\"\n", "webhook_refused"),
    ] {
        let mut stage = Inspected::daemon(&format!(
            "inspect = true\nrequest_headers = {{ set = {{ x-by = \"tunnel\" }} }}\n{rule}{routes}"
        ))
        .await;
        let mut sent = with_body(forwarded("POST", "/api/hook"), b"{}");
        for (name, value) in [("host", "web.example.com"), ("x-tunnel-user", "mallory"), ("a", "1")] {
            sent = with_header(sent, name, value.as_bytes());
        }
        stage.line.request(&sent).await;
        stage.line.whole(&sent).await;
        let detail = stage.get("/api/requests/1?wait=20").await;
        assert_eq!((&detail["error"], &detail["replayable"]), (&json!(error), &Value::Null));
        assert_eq!(
            (&detail["target"], &detail["url"]),
            (&json!("/v1/hook"), &json!("https://web.example.com/api/hook"))
        );
        assert_eq!(stage.replay(1, &json!({})).await.status, 202);
        let mut peer = other.accept().await;
        assert_eq!(
            peer.head().await,
            format!(
                "POST /v1/hook HTTP/1.1\r\nhost: localhost:{}\r\nx-forwarded-proto: https\r\n\
                 x-forwarded-host: web.example.com\r\na: 1\r\ncontent-length: 2\r\n\
                 x-forwarded-prefix: /api\r\nx-by: tunnel\r\nx-tunnel-replay: 1",
                other.port
            )
        );
        assert_eq!(peer.bytes(2).await, b"{}");
        peer.write(OK).await;

        // No route can be told from such a path.
        let sent = with_body(forwarded("POST", "/api/../hook"), b"{}");
        stage.line.request(&sent).await;
        stage.line.whole(&sent).await;
        for edits in [json!({}), json!({"body": {"text": "x"}})] {
            let refused = stage.replay(3, &edits).await;
            assert_eq!(refused.status, 422, "{refused:?}");
            assert!(refused.text().contains("no upstream was to get this"), "{}", refused.text());
        }
        assert!(stage.upstream.is_untouched().await, "nothing went to the tunnel's own");
    }
}

#[tokio::test]
async fn an_export_is_imported_with_what_was_cut_and_what_has_no_upstream() {
    let mut stage = Inspected::daemon(
        "inspect = true\ninspect_body = 1000\n[[tunnel.route]]\npath = \"/fixed\"\nrespond = { status = 200, body = \"fixed\" }\n",
    )
    .await;
    let large = |fields: &str| {
        let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n{fields}\r\n").into_bytes();
        answer.extend([b'y'; 5000]);
        answer
    };
    stage.pass(with_body(request("POST", "/text"), &[b'x'; 3000]), &large("")).await;
    stage.pass(with_body(request("POST", "/bytes"), &[0xff; 3000]), &large("")).await;
    let fixed = request("GET", "/fixed");
    stage.line.request(&fixed).await;
    stage.line.whole(&fixed).await;
    stage.get("/api/requests/3?wait=20").await;
    let token = ("x-inspector-token", &*stage.token);
    let kind = ("content-type", "application/json");
    let har = stage.call("GET", "/api/har?reveal=true", &[token], b"").await.body;
    let again = stage.call("POST", "/api/import", &[token, kind], &har).await;
    assert_eq!((again.status, again.json()), (201, json!({"ids": [4, 5, 6]})));
    for (id, byte) in [(4, b'x'), (5, 0xff)] {
        let detail = stage.get(&format!("/api/requests/{id}")).await;
        for (side, byte, size) in [("request", byte, 3000), ("response", b'y', 5000)] {
            let body = &detail[side]["body"];
            let kept = json!(BASE64_STANDARD.encode([byte; 1000]));
            assert_eq!(
                (&body["size"], &body["cut"], &body["base64"]),
                (&json!(size), &json!(true), &kept),
                "{detail}"
            );
        }
        assert!(
            detail["request"]["fields"].to_string().contains("[\"content-length\",\"3000\"]"),
            "{detail}"
        );
        assert!(detail["replayable"].as_str().unwrap().contains("1000 of 3000 bytes"), "{detail}");
        assert_eq!(stage.replay(id, &json!({})).await.status, 422);
    }
    assert_eq!(stage.get("/api/requests/6").await["target"], "/fixed");
    // It says the same when it is exported once more.
    let bodies = |har: &[u8]| {
        let har: Value = serde_json::from_slice(har).unwrap();
        let all = har["log"]["entries"].as_array().unwrap().iter();
        all.map(|entry| (entry["request"]["postData"].clone(), entry["response"]["content"].clone()))
            .collect::<Vec<_>>()
    };
    let once_more = stage.call("GET", "/api/har?ids=4,5,6&reveal=true", &[token], b"").await.body;
    assert_eq!(bodies(&once_more), bodies(&har));
    // A WebSocket is none that could be replayed, and has its messages.
    let message =
        |kind: &str, data: &str| json!({"type": kind, "time": 1_796_083_200.5, "opcode": 1, "data": data});
    let mut cut = message("receive", "half");
    (cut["_cut"], cut["_size"]) = (json!(true), json!(9000));
    let socket = json!({"log": {"entries": [{
        "startedDateTime": "2026-12-01T00:00:00.000Z", "_resourceType": "websocket", "_webSocketMessagesDropped": 2,
        "request": {"method": "GET", "url": "wss://h/ws"}, "response": {"status": 101},
        "_webSocketMessages": [message("send", "hi"), cut],
    }]}});
    let imported = stage.call("POST", "/api/import", &[token, kind], socket.to_string().as_bytes()).await;
    assert_eq!(imported.json(), json!({"ids": [7]}));
    assert_eq!(stage.replay(7, &json!({})).await.status, 422);
    let (_, shown, _) = run(&stage, &["request", "show", "7"]).await;
    for line in [
        "(2 messages before these are not kept)",
        "->    500 ms  text (2 bytes)  hi",
        "<-    500 ms  text (9000 bytes, 4 of them kept)  half",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    // Another body makes it whole.
    assert_eq!(stage.replay(4, &json!({"body": {"text": "abc"}})).await.status, 202);
    let mut peer = stage.upstream.accept().await;
    assert!(peer.head().await.contains("\r\ncontent-length: 3\r\n"));
    assert_eq!(peer.bytes(3).await, b"abc");
    peer.write(OK).await;
}

#[tokio::test]
async fn half_of_a_body_is_not_sent_again() {
    let mut stage = Inspected::start(&[]).await;
    let mut sent = request("POST", "/upload");
    sent.announced = Some(400_000);
    stage.line.request(&sent).await;
    let Sent::Continue { .. } = stage.line.answer().await else { panic!("continue is wanted") };
    stage.line.piece(&sent, 1, &noise(90_000), false).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    peer.bytes(90_000).await;
    peer.write(b"HTTP/1.1 413 x\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno").await;
    drop(peer);
    stage.line.whole(&sent).await;
    let detail = stage.get("/api/requests/1?wait=20").await;
    assert_eq!((&detail["status"], &detail["request"]["body"]["size"]), (&json!(413), &json!(90_000)));
    assert!(detail["replayable"].as_str().unwrap().contains("90000 bytes of it have"), "{detail}");
    assert_eq!(stage.replay(1, &json!({})).await.status, 422);
    assert_eq!(stage.call("GET", "/api/requests/1/curl", &[], b"").await.status, 422);
    let har = stage.get("/api/har").await;
    assert_eq!(har["log"]["entries"][0]["request"]["postData"]["_cut"], true, "{har}");
    // Another body is whole.
    assert_eq!(stage.replay(1, &json!({"body": {"text": "abc"}})).await.status, 202);
    let mut peer = stage.upstream.accept().await;
    assert!(peer.head().await.contains("\r\ncontent-length: 3\r\n"));
    assert_eq!(peer.bytes(3).await, b"abc");
    peer.write(OK).await;
}

#[tokio::test]
async fn an_upload_without_a_length_is_sent_again_with_one() {
    let mut stage = Inspected::start(&[]).await;
    let mut sent = with_header(request("POST", "/upload"), "a", b"1");
    (sent.announced, sent.streamed) = (Some(proto::limits::UNKNOWN_LENGTH), true);
    stage.line.request(&sent).await;
    let Sent::Continue { .. } = stage.line.answer().await else { panic!("continue is wanted") };
    stage.line.piece(&sent, 1, b"abc", false).await;
    stage.line.piece(&sent, 2, b"", true).await;
    let mut peer = stage.upstream.accept().await;
    let head = peer.head().await;
    assert!(head.ends_with("\r\na: 1\r\ntransfer-encoding: chunked"), "{head}");
    assert_eq!(peer.bytes(13).await, b"3\r\nabc\r\n0\r\n\r\n");
    peer.write(OK).await;
    stage.line.whole(&sent).await;
    let detail = stage.get("/api/requests/1?wait=20").await;
    assert_eq!(detail["replayable"], Value::Null);
    assert!(!detail["request"]["fields"].to_string().contains("transfer-encoding"), "{detail}");
    assert_eq!(stage.replay(1, &json!({})).await.status, 202);
    let wanted = head.replace("transfer-encoding: chunked", "content-length: 3\r\nx-tunnel-replay: 1");
    assert_eq!(peer.head().await, wanted);
    assert_eq!(peer.bytes(3).await, b"abc");
    peer.write(OK).await;
}

#[tokio::test]
async fn failures_of_different_kinds_are_not_the_same_answer() {
    let mut stage = Inspected::start(&[]).await;
    let sent = get("/");
    stage.line.request(&sent).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    drop(peer);
    assert_eq!(stage.line.failure().await.1, ErrorCode::UpstreamReset);
    for (id, answer, error) in [
        (2, &b""[..], Value::Null),
        (3, b"NONSENSE\r\n\r\n", json!({"before": "upstream_reset", "after": "upstream_invalid"})),
    ] {
        assert_eq!(stage.replay(1, &json!({})).await.status, 202);
        let mut peer = stage.upstream.accept().await;
        peer.head().await;
        peer.write(answer).await;
        drop(peer);
        let diff = stage.get(&format!("/api/requests/{id}?wait=20")).await["diff"].clone();
        assert_eq!((&diff["same"], &diff["error"]), (&json!(error.is_null()), &error), "{diff}");
    }
    let (code, shown, _) = run(&stage, &["request", "show", "3"]).await;
    assert!(code == 0 && shown.contains("error upstream_reset -> upstream_invalid"), "{shown}");
}

#[tokio::test]
async fn a_curl_command_line_sends_the_same_bytes() {
    if std::process::Command::new("curl").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no curl");
        return;
    }
    let mut stage = Inspected::start(&[]).await;
    let bodies: [&[u8]; 4] = [b"", b"it's {\"a\": 1}\n @x", b"\0\x1b[31m\xff", &noise(80_000)];
    for (number, body) in bodies.into_iter().enumerate() {
        let mut sent = with_body(request("POST", "/a//b/../c?x='%20&y=$(id)`id`|{a}"), body);
        for (name, value) in [("cookie", &b"s=1"[..]), ("b", b"it's $HOME"), ("obs", b"\xe4%"), ("e", b"")] {
            sent = with_header(sent, name, value);
        }
        let (head, got) = stage.pass(sent, OK).await;
        assert!(got == body);
        let target = format!("/api/requests/{}/curl?reveal=true", number + 1);
        let command = stage.call("GET", &target, &[("x-inspector-token", &stage.token)], b"").await.text();
        // From a file: one argument may not be as long as this command.
        let script = stage.folder.path().join("curl.sh");
        std::fs::write(&script, &command).unwrap();
        let mut shell = tokio::process::Command::new("sh");
        shell.arg(&script).env_remove("HOME").kill_on_drop(true);
        let mut shell =
            shell.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        let mut peer = stage.upstream.accept().await;
        // curl writes the name of Host in its own way, and no blank before an empty value.
        let sent =
            peer.head().await.replacen("\r\nHost: ", "\r\nhost: ", 1).replace("\r\ne:\r\n", "\r\ne: \r\n");
        assert_eq!(sent, head, "{command}");
        assert!(peer.bytes(body.len()).await == body);
        peer.write(OK).await;
        assert!(patiently("the end of curl", shell.wait()).await.unwrap().success());
    }
}

#[tokio::test]
async fn a_curl_command_line_reaches_the_upstream_as_the_tunnel_does() {
    let mut stage = Inspected::daemon("inspect = true\nhttp2 = \"never\"").await;
    stage.pass(with_body(request("HEAD", "/"), b"x"), b"HTTP/1.1 200 OK\r\n\r\n").await;
    let refused = stage.call("GET", "/api/requests/1/curl", &[], b"").await;
    assert_eq!(refused.status, 422, "{refused:?}");
    assert!(refused.text().contains("no body with HEAD"), "{}", refused.text());
    stage.pass(get("/x"), OK).await;
    for (http2, option) in [("never", "--http1.1"), ("always", "--http2-prior-knowledge")] {
        let path = stage.folder.path().join("agentd.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("http2 = \"never\"", &format!("http2 = \"{http2}\""));
        private_file(stage.folder.path(), "agentd.toml", &text).unwrap();
        assert_eq!(stage.control("POST", "/reload", b"").await.status, 200);
        let command = stage.call("GET", "/api/requests/2/curl", &[], b"").await.text();
        assert!(command.starts_with(&format!("curl {option} ")), "{command}");
    }
}

#[tokio::test]
async fn requests_from_elsewhere_are_listed_and_sent() {
    let stage = Inspected::start(&[]).await;
    let token = ("x-inspector-token", &*stage.token);
    let text = ("content-type", "text/plain");
    let line = b"curl 'https://far.example/x?y=1' -H 'A: b' -d '{\"c\":1}' --compressed";
    let imported = stage.call("POST", "/api/import", &[token, text], line).await;
    assert_eq!((imported.status, imported.json()), (201, json!({"ids": [1]})));
    assert_eq!(stage.replay(1, &json!({})).await.status, 202);
    let mut peer = stage.upstream.accept().await;
    assert_eq!(
        peer.head().await,
        format!(
            "POST /x?y=1 HTTP/1.1\r\nhost: localhost:{}\r\na: b\r\naccept: */*\r\n\
             content-type: application/x-www-form-urlencoded\r\ncontent-length: 7\r\nx-tunnel-replay: 1",
            stage.upstream.port
        )
    );
    assert_eq!(peer.bytes(7).await, b"{\"c\":1}");
    peer.write(OK).await;
    let detail = stage.get("/api/requests/2?wait=20").await;
    assert_eq!(detail["diff"], Value::Null, "there is no answer to compare with: {detail}");
    // Its own file comes back as what it was.
    let har = stage.call("GET", "/api/har?reveal=true", &[token], b"").await.body;
    let kind = ("content-type", "application/json");
    let again = stage.call("POST", "/api/import?tunnel=web", &[token, kind], &har).await;
    assert_eq!(again.json(), json!({"ids": [3, 4]}));
    for (query, body, status) in
        [("", &b"curl -d @/etc/passwd x"[..], 400), ("", b"rm -rf /", 400), ("?tunnel=other", b"curl x", 409)]
    {
        let refused = stage.call("POST", &format!("/api/import{query}"), &[token, text], body).await;
        assert_eq!(refused.status, status, "{refused:?}");
    }
    assert_eq!(stage.ids("").await, [4, 3, 2, 1]);
}

/// Resident memory in bytes: all of it (`VmRSS`), or what does not come from the program's own file (`RssAnon`), of
/// which a debug build has three times as much.
fn resident(agent: &Agent, which: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Answers every request on every connection with as many bytes as its target says.
async fn answer_sizes(upstream: Upstream) {
    loop {
        let mut peer = upstream.accept_whenever().await;
        tokio::spawn(async move {
            loop {
                let head = peer.head_or_end().await;
                let Some(head) = head else { return };
                let number = |name: &str| {
                    let (_, rest) = head.split_once(name)?;
                    rest.split([' ', '\r', '&']).next()?.parse::<usize>().ok()
                };
                let (length, size) = (number("content-length: ").unwrap_or(0), number("size=").unwrap_or(0));
                peer.bytes(length).await;
                let mut response = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n").into_bytes();
                response.resize(response.len() + size, b'x');
                peer.write(response).await;
            }
        });
    }
}

#[tokio::test]
async fn ten_thousand_exchanges_stay_within_the_memory() {
    let Inspected { mut line, upstream, agent, folder, edge: _edge, .. } = Inspected::start(&[]).await;
    let upstream = tokio::spawn(answer_sizes(upstream));
    let body = noise(64 * 1024);
    let mut under_way = std::collections::VecDeque::new();
    let (before, mut peak, mut all) = (resident(&agent, "RssAnon"), 0, 0);
    for number in 0..10_000usize {
        // All sizes: mostly small ones, some that fill blocks, some that are cut.
        let (upload, size) = match number % 100 {
            0 if number % 500 == 0 => (60_000, 400_000),
            0..=1 => (number * 7 % 60_000, number * 13 % 200_000),
            2..=30 => (number % 5000, number * 3 % 20_000),
            _ => (number % 700, number % 2500),
        };
        let mut sent = with_body(request("POST", "/x"), &body[..upload]);
        sent.target = proto::target::Target::parse(&format!("/x?size={size}")).unwrap();
        line.request(&sent).await;
        under_way.push_back(sent);
        if under_way.len() == 8 || number == 9999 {
            {
                let mut open: Vec<_> = under_way.drain(..).collect();
                while !open.is_empty() {
                    let sent = line.answer().await;
                    let at = open.iter().position(|one| one.token == sent.token()).unwrap();
                    if let Sent::Chunk { seq, .. } = &sent {
                        line.credit(&open[at].clone(), *seq).await;
                    }
                    if sent.is_end() {
                        assert!(!matches!(sent, Sent::Failed { .. }), "{sent:?}");
                        open.remove(at);
                    }
                }
            }
        }
        if number % 500 == 499 {
            peak = peak.max(resident(&agent, "RssAnon"));
            all = all.max(resident(&agent, "VmRSS"));
        }
    }
    let kib = |bytes: u64| bytes / 1024;
    eprintln!(
        "10,000 exchanges: {} KiB became {} KiB; with the program's own pages {} KiB",
        kib(before),
        kib(peak),
        kib(all)
    );
    // With all of the program as it ships, a file of 16 MB; this one's own pages are those of a build for tests.
    let (program, limit) = (16 << 20, (32 + 20) << 20);
    assert!(peak + program < limit, "{peak} bytes beside the program, {limit} with it are allowed");
    let grown = peak - before;
    assert!(grown < (32 + 5) << 20, "{grown} bytes more are in use for a limit of 32 MiB");
    let socket = folder.path().join("control.sock");
    let stream = UnixStream::connect(socket).await.unwrap();
    let state = exchange(stream, "GET", "/api/state", &[("host", "localhost")], b"").await.json();
    assert!(state["memory_bytes"].as_u64().unwrap() <= 32 << 20);
    assert_eq!(state["requests"].as_u64().unwrap() + state["evicted"].as_u64().unwrap(), 10_000);
    upstream.abort();
}

#[tokio::test]
async fn a_stream_without_end_does_not_grow_the_agent() {
    let mut stage = Inspected::start(&[]).await;
    let sent = get("/endless");
    stage.line.request(&sent).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    peer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n").await;
    let Sent::Reply { .. } = stage.line.answer().await else { panic!("a reply comes first") };
    let event = format!("data: {}\n\n", "x".repeat(4000));
    let mut before = 0;
    for number in 0..8000 {
        peer.write(&event).await;
        if number % 20 == 19 {
            // Some of what was sent has come; the rest is under way.
            if let Sent::Chunk { seq, .. } = stage.line.answer().await {
                stage.line.credit(&sent, seq).await;
            }
        }
        if number == 2000 {
            before = resident(&stage.agent, "RssAnon");
        }
    }
    let after = resident(&stage.agent, "RssAnon");
    assert!(after < before + (4 << 20), "{before} bytes became {after}");
    let detail = stage.get("/api/requests/1").await;
    assert_eq!((&detail["state"], &detail["response"]["body"]["cut"]), (&json!("open"), &json!(true)));
    assert!(detail["pieces_dropped"].as_u64().unwrap() > 0);
}

/// What hostile visitors and services send.
pub(crate) fn hostile() -> Vec<Vec<u8>> {
    [
        "<script>alert(1)</script>",
        "</pre><script src=//evil.example></script>",
        "<img src=x onerror=alert(1)>",
        "\"><svg/onload=alert(1)>",
        "javascript:alert(1)",
        "{{token}}",
        "${7*7}",
        "'; rm -rf ~; echo '",
        "$(touch /pwned)",
        "`touch /pwned`",
        "\\x1b[31mred",
        "%0d%0aset-cookie:%20a=b",
        "%00",
        "\u{202e}gnp.exe",
        "\u{feff}\u{200b}\u{2028}\u{2029}",
        "data: x\n\nevent: request\ndata: {}\n\n",
        "__proto__",
        "constructor.prototype",
        "=cmd|' /C calc'!A0",
        "-----BEGIN",
    ]
    .into_iter()
    .map(|text| text.as_bytes().to_vec())
    .chain([
        b"\x1b[2J\x1b[H\x1b]0;owned\x07".to_vec(),
        b"\x1b]52;c;b3duZWQ=\x07".to_vec(),
        b"\x1bP+q\x1b\\".to_vec(),
        b"\x9b31m\x9d0;owned\x9c".to_vec(),
        b"\0\0\0".to_vec(),
        b"\xff\xfe\xfd\xc0\xaf".to_vec(),
        b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n".to_vec(),
        b"\x08\x08\x08\x7f".to_vec(),
        vec![b'A'; 20_000],
        [b'[', b'{'].repeat(5000),
        b"\xed\xa0\x80".to_vec(),
    ])
    .collect()
}

#[tokio::test]
async fn hostile_captures_are_data_in_the_page_and_in_the_terminal() {
    let mut stage = Inspected::start(&[]).await;
    let cases = hostile();
    assert!(cases.len() >= 30);
    let mut events = Events::open(&stage, "watch=all").await;
    let before = stage.call("GET", "/", &[], b"").await;
    for (number, case) in cases.iter().enumerate() {
        let in_field: Vec<u8> =
            case.iter().copied().filter(|byte| *byte >= b' ' && *byte != 0x7f || *byte == b'\t').collect();
        let target: String =
            in_field.iter().filter(|byte| byte.is_ascii_graphic()).map(|&b| b as char).collect();
        let target = format!("/{}", target.replace(['#', '\\', '^', '`', '"', '<', '>'], "%3C"));
        let mut sent = with_body(request("POST", "/"), case);
        sent.target = proto::target::Target::parse(&target)
            .unwrap_or_else(|_| proto::target::Target::parse("/").unwrap());
        for name in ["x-hostile", "content-type", "content-encoding", "user-agent"] {
            let name = if name == "content-encoding" && number % 2 == 0 { "x-other" } else { name };
            sent = with_header(sent, name, &in_field[..in_field.len().min(10_000)]);
        }
        let mut response =
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\ncontent-type: ", case.len()).into_bytes();
        response.extend(&in_field[..in_field.len().min(10_000)]);
        response.extend(b"\r\n\r\n");
        response.extend(case);
        stage.pass(sent, &response).await;
        events.until(&format!("\"change\":\"ended\",\"id\":{},", number + 1)).await;
        assert!(events.text.chars().all(|c| c == '\n' || c == '\r' || !c.is_control()), "{:?}", events.text);
    }
    let after = stage.call("GET", "/", &[], b"").await;
    assert_eq!(before.text(), after.text(), "nothing captured is in the document");
    assert_eq!(stage.ids("limit=100").await.len(), cases.len());
    for (number, case) in cases.iter().enumerate() {
        let answer = stage.call("GET", &format!("/api/requests/{}", number + 1), &[], b"").await;
        assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
        let text = answer.text();
        assert!(text.trim_end().chars().all(|c| !c.is_ascii_control()), "{text:?}");
        let detail: Value = serde_json::from_str(&text).unwrap();
        let bytes = BASE64_STANDARD.decode(detail["response"]["body"]["base64"].as_str().unwrap()).unwrap();
        assert!(bytes == *case, "{number}");
        let curl = stage.call("GET", &format!("/api/requests/{}/curl", number + 1), &[], b"").await.text();
        assert!(curl.chars().all(|c| c == '\n' || !c.is_control()), "{curl:?}");
    }
    let har = stage.call("GET", "/api/har", &[], b"").await;
    // For readers that are not ours, see tests/har.
    if let Some(file) = std::env::var_os("AGENTD_TEST_HAR") {
        std::fs::write(file, &har.body).unwrap();
    }
    let har: Value = serde_json::from_slice(&har.body).unwrap();
    assert_eq!(har["log"]["entries"].as_array().unwrap().len(), cases.len());
}
