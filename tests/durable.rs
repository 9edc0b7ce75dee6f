//! Deliveries that wait: what is accepted while nobody is there arrives once, in order and to the byte, as the settings
//! say, and is nobody else's business. Through the real processes.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proto::{
    delivery::{self, Ask, DeliveriesAsk, DeliveryPolicy, Field, Holds, Mode, OrderBy},
    id::TunnelName,
    limits,
    message::{AgentMessage, Continue, EdgeMessage, Failed, Hello, Progress, Reply, VERSION},
};
use serde_json::Value;
use tests::{
    Agent, Local,
    calls::{Calls, Fate, Held},
    client::{Answer, Connection, Request},
    eventually, noise,
    operator::unix_now,
    raw_agent::{Call, RawAgent},
    signature::{hex, mac},
    sockets::Port,
    upstream::{Conn, Recorded, Upstream},
};

/// One webhook as its vendor sends it: `{vendor}/{account}` is what its order is kept by.
struct Hook {
    number: usize,
    path: String,
    fields: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

const SECRET: &[u8] = b"a-secret-of-webhooks-0123456789";

/// Webhooks in the vendors' shapes, each signed; bodies of text, of bytes, empty ones, and some that take several pieces.
fn hooks(count: usize) -> Vec<Hook> {
    let now = unix_now().to_string();
    let hook = |number: usize| {
        let json = format!("{{\"n\": {number},  \"text\":\"ä\\u00e9 &<\", \"at\":{now}}}\n").into_bytes();
        let (vendor, fields, body): (&str, Vec<(&str, String)>, Vec<u8>) = match number % 9 {
            0 => {
                let id = format!("msg_{number}");
                let signed = mac(SECRET, &[id.as_bytes(), b".", now.as_bytes(), b".", &json]);
                let signature = format!("v1,{} v1a,other", STANDARD.encode(signed));
                let fields = vec![
                    ("webhook-id", id),
                    ("webhook-timestamp", now.clone()),
                    ("webhook-signature", signature),
                ];
                ("standard", fields, json)
            }
            1 => {
                let signed = hex(&mac(SECRET, &[now.as_bytes(), b".", &json]));
                ("stripe", vec![("Stripe-Signature", format!("t={now},v1={signed},v0=x"))], json)
            }
            2 => {
                let signed = hex(&mac(SECRET, &[&json]));
                let fields = vec![
                    ("X-Hub-Signature-256", format!("sha256={signed}")),
                    ("X-GitHub-Event", "push".to_owned()),
                    ("X-GitHub-Delivery", format!("72d3162e-cc78-11e3-81ab-{number:012}")),
                ];
                ("github", fields, json)
            }
            3 => {
                let form = format!("token=a&text=%C3%A4+{number}&payload={{}}").into_bytes();
                let signed = hex(&mac(SECRET, &[b"v0:", now.as_bytes(), b":", &form]));
                let fields = vec![
                    ("X-Slack-Signature", format!("v0={signed}")),
                    ("X-Slack-Request-Timestamp", now.clone()),
                    ("content-type", "application/x-www-form-urlencoded".to_owned()),
                ];
                ("slack", fields, form)
            }
            4 => {
                let signed = STANDARD.encode(mac(SECRET, &[&json]));
                let fields = vec![
                    ("X-Shopify-Hmac-Sha256", signed),
                    ("X-Shopify-Topic", "orders/create".to_owned()),
                    ("X-Shopify-Shop-Domain", "shop.example.com".to_owned()),
                    ("X-Shopify-API-Version", "2026-10".to_owned()),
                    ("X-Shopify-Webhook-Id", number.to_string()),
                ];
                ("shopify", fields, json)
            }
            5 => {
                let form = format!("AccountSid=AC1&Body=hello+{number}").into_bytes();
                let settings = "key=AB,algorithm=HMAC_SHA256".to_owned();
                let signed = STANDARD.encode(mac(SECRET, &[&form]));
                let fields =
                    vec![("X-Twilio-Signature", signed), ("X-Twilio-Webhooks-Signature-Settings", settings)];
                ("twilio", fields, form)
            }
            6 => (
                "svix",
                vec![("svix-id", format!("msg_{number}")), ("svix-timestamp", now.clone())],
                Vec::new(),
            ),
            // Not text, and every now and then longer than one piece of the table, one message, one frame.
            7 if number % 63 == 7 => {
                ("bytes", Vec::new(), noise(number as u64, limits::DELIVERY_PIECE_BYTES + 1))
            }
            7 => ("bytes", Vec::new(), noise(number as u64, 300)),
            _ => ("own", vec![("x-twice", "a".to_owned()), ("x-twice", "b, c".to_owned())], json),
        };
        let mut fields: Vec<(String, Vec<u8>)> =
            fields.into_iter().map(|(name, value)| (name.to_owned(), value.into_bytes())).collect();
        fields.push(("x-number".to_owned(), number.to_string().into_bytes()));
        fields.push(("x-latin".to_owned(), b"gr\xfc\xdfe".to_vec()));
        Hook { number, path: format!("/{vendor}/{}?q=%2F&n={number}", number / 9 % 5), fields, body }
    };
    (0..count).map(hook).collect()
}

impl Hook {
    fn request(&self, tunnel: &str) -> Request {
        let request = Request::to(tunnel, "POST", &self.path);
        let request =
            self.fields.iter().fold(request, |request, (name, value)| request.raw_field(name, value));
        request.body(self.body.clone())
    }

    fn key(&self) -> &str {
        self.path.split('?').next().unwrap()
    }

    /// Whether everything that the sender has said has come to the service.
    fn is(&self, came: &Recorded) {
        assert_eq!(came.line, format!("POST {} HTTP/1.1", self.path));
        assert!(came.body == self.body, "the body of {}", self.number);
        let mut last = 0;
        for (name, value) in &self.fields {
            let is = |(own, of): &(String, Vec<u8>)| own.eq_ignore_ascii_case(name) && of == value;
            // Repeated fields may be joined, as HTTP allows.
            let joined = |(own, of): &(String, Vec<u8>)| {
                own.eq_ignore_ascii_case(name)
                    && of.split(|&byte| byte == b',').any(|part| part.trim_ascii() == &value[..])
            };
            let at = came.fields.iter().position(is).or_else(|| came.fields.iter().position(joined));
            let twice = name == "x-twice";
            let at = at.or_else(|| twice.then_some(last));
            assert!(at.is_some(), "{name} of {} in {:?}", self.number, came.fields);
            last = at.unwrap();
        }
    }
}

fn number(came: &Recorded) -> usize {
    came.all("x-number")[0].parse().unwrap()
}

fn attempt(came: &Recorded) -> u32 {
    came.all("x-tunnel-delivery-attempt")[0].parse().unwrap()
}

/// The id in an answer that says that a request is kept.
fn accepted(answer: &Answer) -> String {
    assert_eq!(answer.status, 202, "{:?} {}", answer.field("x-tunnel-error"), answer.text());
    answer.field("x-tunnel-delivery-id").unwrap()
}

async fn post(local: &Local, tunnel: &str, target: &str, body: &[u8]) -> Answer {
    Request::to(tunnel, "POST", target).body(body.to_vec()).send(local.public).await
}

/// Posts hooks: those of a key one after the other, ten keys at a time. Their ids by number.
async fn post_all(local: &Local, tunnel: &str, hooks: &[Hook]) -> BTreeMap<usize, String> {
    let mut by_key: BTreeMap<&str, Vec<&Hook>> = BTreeMap::new();
    for hook in hooks {
        by_key.entry(hook.key()).or_default().push(hook);
    }
    let keys: Vec<_> = by_key.into_values().collect();
    let mut lanes: Vec<Vec<&Hook>> = (0..10).map(|_| Vec::new()).collect();
    for (at, key) in keys.into_iter().enumerate() {
        lanes[at % 10].extend(key);
    }
    let lanes = lanes.into_iter().map(|lane| async move {
        let mut connection = Connection::open(local.public).await;
        let mut ids = Vec::new();
        for hook in lane {
            ids.push((hook.number, accepted(&connection.exchange(&hook.request(tunnel)).await)));
        }
        ids
    });
    futures_util::future::join_all(lanes).await.into_iter().flatten().collect()
}

/// `agentd delivery … --json`, which must come to something.
fn asked(agent: &Agent, command: &[&str]) -> Value {
    let (code, printed) = agent.ask(&[&["delivery"], command, &["--json"]].concat());
    assert_eq!(code, Some(0), "{command:?}: {printed}");
    serde_json::from_str(printed.trim()).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

fn list(agent: &Agent, more: &[&str]) -> Vec<Value> {
    asked(agent, &[&["list", "--limit", "100000"], more].concat()).as_array().unwrap().clone()
}

fn drained(agent: &Agent) {
    let (code, printed) = agent.ask(&["delivery", "drain", "--wait", "60s"]);
    assert_eq!(code, Some(0), "{printed}");
}

/// An agent that has come and gone: its edge knows what to keep.
fn introduce(local: &Local, tunnels: &str, names: &[&str]) {
    let mut agent = local.agent_with(tunnels, names);
    leave(&mut agent);
}

fn leave(agent: &mut Agent) {
    agent.process().signal(rustix::process::Signal::TERM);
    agent.process_mut().wait();
}

/// A service that counts how many it has under way.
async fn counting() -> (Upstream, Arc<(AtomicUsize, AtomicUsize)>) {
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let shared = Arc::clone(&counts);
    let upstream = Upstream::start(move |_, mut conn: Conn| {
        let counts = Arc::clone(&shared);
        async move {
            let now = counts.0.fetch_add(1, Ordering::SeqCst) + 1;
            counts.1.fetch_max(now, Ordering::SeqCst);
            tokio::task::yield_now().await;
            counts.0.fetch_sub(1, Ordering::SeqCst);
            conn.answer("204 No Content", "", b"").await.then_some(conn)
        }
    })
    .await;
    (upstream, counts)
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_while_nobody_was_there_arrives_once_in_order_and_to_the_byte() {
    let secrets = tempfile::tempdir().unwrap();
    let file = |name: &str, secret: &[u8]| {
        let path = secrets.path().join(name);
        fs::write(&path, secret).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let plain = file("plain", SECRET);
    let encoded = file("encoded", format!("whsec_{}", STANDARD.encode(SECRET)).as_bytes());
    let local = Local::start(&[]);
    let (upstream, counts) = counting().await;
    let mut tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"auto\"\n\
         durable = {{ order_by = \"path\", max_concurrent = 16 }}\n",
        upstream.address()
    );
    // The agent checks what is signed, as live.
    for (scheme, secret) in [
        ("standard", &encoded),
        ("stripe", &plain),
        ("github", &plain),
        ("slack", &plain),
        ("shopify", &plain),
    ] {
        tunnels += &format!(
            "[[tunnel.verify]]\nscheme = \"{scheme}\"\nsecret_file = \"{secret}\"\npaths = [\"/{scheme}/*\"]\n"
        );
    }
    assert_eq!(post(&local, "hooks", "/", b"").await.status, 404, "nobody has this name yet");
    introduce(&local, &tunnels, &["hooks"]);
    let hooks = hooks(500);
    let ids = post_all(&local, "hooks", &hooks).await;
    assert_eq!(ids.values().collect::<BTreeSet<_>>().len(), 500, "each has an id of its own");
    assert_eq!(upstream.look(<[_]>::len), 0);

    let agent = local.agent_with(&tunnels, &["hooks"]);
    eventually("all have come", async || upstream.look(<[_]>::len) >= 500).await;
    drained(&agent);
    let came = upstream.recorded();
    assert_eq!(came.len(), 500, "each once");
    let mut last: BTreeMap<&str, usize> = BTreeMap::new();
    for one in &came {
        let hook = &hooks[number(one)];
        hook.is(one);
        assert_eq!(one.all("x-tunnel-delivery-id"), [ids[&hook.number].clone()]);
        assert_eq!(attempt(one), 1, "{}", hook.number);
        let received = &one.all("x-tunnel-received")[0];
        assert!(received.starts_with("20") && received.ends_with('Z'), "{received}");
        let before = last.insert(hook.key(), hook.number);
        assert!(before.is_none_or(|before| before < hook.number), "the order of {}", hook.key());
    }
    let most = counts.1.load(Ordering::SeqCst);
    assert!((2..=16).contains(&most), "{most} at a time");
    assert_eq!(list(&agent, &["--state", "delivered"]).len(), 500);
    for state in ["waiting", "delivering", "dead", "cancelled"] {
        assert_eq!(list(&agent, &["--state", state]).len(), 0, "{state}");
    }
    // Their bodies are gone with them.
    let rows = local
        .dynamodb("Scan", serde_json::json!({"TableName": "deliveries", "Select": "ALL_ATTRIBUTES"}))
        .await;
    let left = rows["Items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["pk"]["S"].as_str().unwrap().starts_with("b#"));
    assert_eq!(left.count(), 0);
}

/// A service that answers as its path says: `/status/503/…`, `/later/2`, `/hang/…`; anything else with 200.
async fn as_told() -> Upstream {
    Upstream::start(|request, mut conn: Conn| async move {
        let target = request.target().to_owned();
        let words: Vec<&str> = target.split('/').skip(1).collect();
        match words[..] {
            ["status", status, ..] => conn.answer(&format!("{status} Told"), "", b"no").await.then_some(conn),
            ["later", seconds, ..] if attempt(&request) == 1 => {
                let field = format!("retry-after: {seconds}\r\n");
                conn.answer("429 Later", &field, b"").await.then_some(conn)
            }
            ["once", status, ..] if attempt(&request) == 1 => {
                conn.answer(&format!("{status} Told"), "", b"").await.then_some(conn)
            }
            ["hang", ..] => {
                conn.closed().await;
                None
            }
            _ => conn.answer("200 OK", "", b"live").await.then_some(conn),
        }
    })
    .await
}

fn to(upstream: &Upstream, target: &str) -> Vec<Recorded> {
    upstream.look(|all| all.iter().filter(|one| one.target() == target).cloned().collect())
}

fn count(upstream: &Upstream, target: &str) -> usize {
    upstream.look(|all| all.iter().filter(|one| one.target() == target).count())
}

/// Waits until a delivery has ended; what is listed of it then.
async fn ended(agent: &Agent, id: &str) -> Value {
    let mut found = Value::Null;
    eventually("it has ended", async || {
        found = asked(agent, &["show", id]);
        let is_over = ["delivered", "dead", "cancelled"].contains(&found["state"].as_str().unwrap());
        if !is_over {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        is_over
    })
    .await;
    found
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_setting_does_what_it_says_at_its_bound_and_not_past_it() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let closed = Port::take();
    let nobody = closed.to_string();
    let quick = "backoff = { base = \"1s\", max = \"1s\" }";
    let mut tunnels = String::new();
    let mut names = Vec::new();
    for (name, address, durable) in [
        ("plain", &upstream.address(), format!("{quick}, attempts = 2")),
        ("once", &upstream.address(), format!("{quick}, attempts = 1")),
        ("some", &upstream.address(), "methods = [\"POST\"], paths = [\"/in\"]".to_owned()),
        (
            "says",
            &upstream.address(),
            "answer = { status = 200, body = \"ok\", content_type = \"text/x-own\" }".to_owned(),
        ),
        ("picky", &upstream.address(), format!("{quick}, attempts = 3, retry_on = [404]")),
        (
            "brief",
            &upstream.address(),
            format!("{quick}, attempts = 2, timeout = \"1s\", retry_unknown = false"),
        ),
        ("anew", &upstream.address(), format!("{quick}, attempts = 2, timeout = \"1s\"")),
        ("nothing", &upstream.address(), "answer = { status = 204 }".to_owned()),
        ("whole", &upstream.address(), format!("{quick}, attempts = 3, order_by = \"tunnel\"")),
        ("order", &upstream.address(), format!("{quick}, attempts = 3, order_by = \"header:x-key\"")),
        ("dedupe", &upstream.address(), "dedupe_by = \"header:webhook-id\"".to_owned()),
        ("one", &upstream.address(), "max_concurrent = 1".to_owned()),
        ("down", &nobody, format!("{quick}, attempts = 2")),
        ("down-once", &nobody, format!("{quick}, attempts = 2, retry_on = [\"5xx\"]")),
    ] {
        names.push(name);
        tunnels += &format!(
            "[[tunnel]]\nname = \"{name}\"\nupstream = \"{address}\"\ndelivery = \"durable\"\ndurable = {{ {durable} }}\n"
        );
    }
    let secrets = tempfile::tempdir().unwrap();
    let secret = secrets.path().join("stripe");
    fs::write(&secret, SECRET).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    tunnels += &format!(
        "[[tunnel]]\nname = \"signed\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ {quick}, attempts = 3 }}\n\
         [[tunnel.verify]]\nscheme = \"stripe\"\nsecret_file = \"{}\"\n",
        upstream.address(),
        secret.display()
    );
    names.push("signed");
    let mut agent = local.agent_with(&tunnels, &names);

    // Which are kept.
    let answer = post(&local, "plain", "/kept", b"x").await;
    let id = accepted(&answer);
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body, serde_json::json!({"delivery": id, "status": "accepted"}));
    // One run has said that this tunnel keeps what comes; the next ones need none.
    let runs = async || local.counters().await.get("states:StartSyncExecution").copied();
    let before = runs().await;
    accepted(&post(&local, "plain", "/kept", b"x").await);
    assert_eq!(runs().await, before);
    // A short body lies in the row, a longer one in pieces beside it, and each goes with the delivery.
    for (bytes, pieces) in [(limits::DELIVERY_ROW_BODY_BYTES, 0), (limits::DELIVERY_ROW_BODY_BYTES + 1, 1)] {
        let body = noise(bytes as u64, bytes);
        let id = accepted(&post(&local, "one", "/sized", &body).await);
        let is_kept = async || rows(&local, "t#one").await.into_iter().find(|row| row["sk"]["S"] == *id);
        assert_eq!(is_kept().await.unwrap()["pieces"]["N"], pieces.to_string());
        assert_eq!(ended(&agent, &id).await["state"], "delivered");
        assert!(to(&upstream, "/sized").last().unwrap().body == body);
        assert!(is_kept().await.unwrap().get("body").is_none());
        // They go after the delivery has ended, so that whoever is killed in between leaves too much and not too little.
        let pieces = format!("b#{id}");
        eventually("its pieces are gone", async || rows(&local, &pieces).await.is_empty()).await;
    }
    for method in ["PUT", "PATCH", "DELETE"] {
        accepted(&Request::to("plain", method, "/kept").body(b"x".to_vec()).send(local.public).await);
    }
    let live = Request::to("plain", "GET", "/").send(local.public).await;
    assert_eq!((live.status, live.text()), (200, "live".to_owned()));
    for (method, target, is_kept) in [
        ("POST", "/in", true),
        ("POST", "/in/x?y", true),
        ("POST", "/inx", false),
        ("POST", "/", false),
        ("PUT", "/in", false),
    ] {
        let answer = Request::to("some", method, target).body(Vec::new()).send(local.public).await;
        assert_eq!(answer.status == 202, is_kept, "{method} {target}: {}", answer.status);
        assert_eq!(answer.field("x-tunnel-delivery-id").is_some(), is_kept);
    }
    // What the sender is told.
    let answer = post(&local, "says", "/", b"").await;
    assert_eq!(
        (answer.status, answer.text(), answer.field("content-type")),
        (200, "ok".to_owned(), Some("text/x-own".to_owned()))
    );
    assert!(answer.field("x-tunnel-delivery-id").is_some());
    let answer = post(&local, "nothing", "/", b"").await;
    assert_eq!((answer.status, answer.body.len(), answer.field("content-type")), (204, 0, None));
    assert!(answer.field("x-tunnel-delivery-id").is_some());
    // The longest body, and one byte more.
    let longest = noise(1, limits::REQUEST_BODY_BYTES);
    accepted(&post(&local, "plain", "/longest", &longest).await);
    eventually("it has come", async || count(&upstream, "/longest") == 1).await;
    assert!(to(&upstream, "/longest")[0].body == longest);
    let longer = noise(1, limits::REQUEST_BODY_BYTES + 1);
    assert_eq!(post(&local, "plain", "/longer", &longer).await.status, 413);
    // Nobody outside says what we say.
    let spoofed = Request::to("plain", "POST", "/spoofed")
        .field("X-Tunnel-Delivery-Attempt", "7")
        .field("x-tunnel-delivery-id", "other")
        .field("x-tunnel-received", "1999")
        .body(Vec::new());
    let id = accepted(&spoofed.send(local.public).await);
    eventually("it has come", async || count(&upstream, "/spoofed") == 1).await;
    let came = to(&upstream, "/spoofed").remove(0);
    assert_eq!((came.all("x-tunnel-delivery-id"), attempt(&came)), (vec![id], 1));
    assert_eq!(came.all("x-tunnel-received").len(), 1);

    // How often, and after what.
    let dead = async |tunnel: &str, target: &str, attempts: usize, what: &str| {
        let id = accepted(&post(&local, tunnel, target, b"x").await);
        let end = ended(&agent, &id).await;
        assert_eq!(end["state"], "dead", "{tunnel} {target}: {end}");
        let come: Vec<u32> = to(&upstream, target).iter().map(attempt).collect();
        assert_eq!(come, (1..=attempts as u32).collect::<Vec<_>>(), "{tunnel} {target}: {end}");
        let last = &end["last"];
        let told = last["status"].as_u64().map(|status| status.to_string());
        let told = told.or_else(|| last["code"].as_str().map(str::to_owned)).unwrap_or_default();
        assert_eq!(told, what, "{tunnel} {target}: {end}");
    };
    tokio::join!(
        dead("plain", "/status/503/a", 2, "503"),
        dead("once", "/status/503/b", 1, "503"),
        dead("plain", "/status/404/c", 1, "404"),
        dead("plain", "/status/410/d", 1, "410"),
        dead("plain", "/status/302/e", 1, "302"),
        dead("plain", "/status/408/f", 2, "408"),
        dead("plain", "/status/425/g", 2, "425"),
        dead("picky", "/status/404/h", 3, "404"),
        dead("picky", "/status/503/i", 1, "503"),
        dead("brief", "/hang/j", 1, "upstream_timed_out"),
        dead("anew", "/hang/k", 2, "upstream_timed_out"),
        dead("down", "/l", 0, "upstream_unreachable"),
        dead("down-once", "/m", 0, "upstream_unreachable"),
    );
    let tries = |target: &str| {
        list(&agent, &[]).iter().find(|row| row["target"] == target).unwrap()["attempt"].clone()
    };
    assert_eq!((tries("/l"), tries("/m")), (Value::from(2), Value::from(1)));
    // Retry-After is kept to.
    let begun = Instant::now();
    accepted(&post(&local, "plain", "/later/3", b"").await);
    eventually("it has come again", async || count(&upstream, "/later/3") == 2).await;
    assert!(begun.elapsed() >= Duration::from_secs(3), "{:?}", begun.elapsed());

    // Signatures are judged when it is delivered, by the time at which it came: one that is refused is not tried again.
    let signed = async |target: &str, at: u64, secret: &[u8]| {
        let mac = hex(&mac(secret, &[at.to_string().as_bytes(), b".", b"x"]));
        let field = format!("t={at},v1={mac}");
        let request =
            Request::to("signed", "POST", target).field("stripe-signature", &field).body(b"x".to_vec());
        accepted(&request.send(local.public).await)
    };
    let (now, long_ago) = (unix_now(), unix_now() - 7_200);
    let forged = signed("/forged", now, b"another-secret-of-webhooks-012345").await;
    let stale = signed("/stale", long_ago, SECRET).await;
    let good = signed("/good", now, SECRET).await;
    assert_eq!(ended(&agent, &good).await["state"], "delivered");
    for id in [&forged, &stale] {
        let end = ended(&agent, id).await;
        assert_eq!(
            (&end["state"], &end["last"]["code"]),
            (&"dead".into(), &"webhook_refused".into()),
            "{end}"
        );
        assert_eq!(end["attempt"], 1, "{end}");
    }
    assert_eq!((count(&upstream, "/forged"), count(&upstream, "/stale")), (0, 0));
    // The same as it would be had it come when it was signed, and waited since.
    assert_eq!(agent.ask(&["delivery", "pause", "signed"]).0, Some(0));
    let waits = signed("/waits", long_ago, SECRET).await;
    let all = rows(&local, "t#signed").await;
    let kept = all.iter().find(|row| row["sk"]["S"] == waits).unwrap();
    let waited = format!("{:012x}{}", long_ago * 1000, "0".repeat(20));
    cut_before_its_run(&local, kept, &waited, "/waited").await;
    asked(&agent, &["cancel", &waits]);
    assert_eq!(agent.ask(&["delivery", "resume", "signed"]).0, Some(0));
    eventually("it has been met", async || {
        list(&agent, &["--tunnel", "signed"]);
        count(&upstream, "/waited") == 1
    })
    .await;

    // A key waits for its first, and no other does.
    let keyed = async |target: &str, key: &str| {
        let request = Request::to("order", "POST", target).field("x-key", key).body(Vec::new());
        accepted(&request.send(local.public).await)
    };
    let stuck = keyed("/status/503/first", "a").await;
    let behind = keyed("/second", "a").await;
    let other = keyed("/other", "b").await;
    assert_eq!(ended(&agent, &other).await["state"], "delivered");
    assert_eq!(ended(&agent, &stuck).await["state"], "dead");
    assert_eq!(ended(&agent, &behind).await["state"], "delivered");
    let order: Vec<String> = upstream.look(|all| all.iter().map(|one| one.target().to_owned()).collect());
    let at = |target: &str| order.iter().rposition(|one| one == target).unwrap();
    assert!(at("/other") < at("/status/503/first") && at("/status/503/first") < at("/second"), "{order:?}");

    // All of a tunnel wait for its first.
    let stuck = accepted(&post(&local, "whole", "/status/503/whole", b"").await);
    let behind = accepted(&post(&local, "whole", "/behind", b"").await);
    assert_eq!(ended(&agent, &behind).await["state"], "delivered");
    assert_eq!(ended(&agent, &stuck).await["state"], "dead");
    let order: Vec<String> = upstream.look(|all| all.iter().map(|one| one.target().to_owned()).collect());
    let at = |target: &str| order.iter().rposition(|one| one == target).unwrap();
    assert!(at("/status/503/whole") < at("/behind"), "{order:?}");

    // A sender's second try is its first.
    let tried = async |target: &str, field: Option<&str>| {
        let request = Request::to("dedupe", "POST", target);
        let request = field.iter().fold(request, |request, id| request.field("webhook-id", id));
        accepted(&request.body(Vec::new()).send(local.public).await)
    };
    let first = tried("/d", Some("msg_1")).await;
    assert_eq!(tried("/d", Some("msg_1")).await, first);
    assert_ne!(tried("/d", Some("msg_2")).await, first);
    assert_ne!(tried("/d", None).await, tried("/d", None).await);
    drained(&agent);
    assert_eq!(count(&upstream, "/d"), 4);
    assert_eq!(tried("/d", Some("msg_1")).await, first, "also once it is delivered");
    drained(&agent);
    assert_eq!(count(&upstream, "/d"), 4);
    // At the end of the time for which it is known, which is a day after `max_age`, it is another.
    let known = rows(&local, "u#dedupe").await;
    let known = known.iter().find(|row| row["id"]["S"] == first).unwrap();
    let until: u64 = known["expires_at"]["N"].as_str().unwrap().parse().unwrap();
    let policy = DeliveryPolicy::new(Mode::Durable);
    let received = u64::from_str_radix(&first[..12], 16).unwrap() / 1000;
    assert_eq!(until, received + policy.max_age_s + 24 * 60 * 60);
    for (left, is_same) in [(60, true), (0, false)] {
        let mut row = known.clone();
        row["expires_at"]["N"] = (unix_now() + left).to_string().into();
        write_row(&local, row).await;
        assert_eq!(tried("/d", Some("msg_1")).await == first, is_same, "{left} s left");
    }
    drained(&agent);
    assert_eq!(count(&upstream, "/d"), 5);

    // What the owner says next holds at once, also where requests were kept a moment ago.
    leave(&mut agent);
    let live = format!("[[tunnel]]\nname = \"plain\"\nupstream = \"{}\"\n", upstream.address());
    let _agent = local.agent_with(&live, &["plain"]);
    let answer = post(&local, "plain", "/live-now", b"x").await;
    assert_eq!((answer.status, answer.field("x-tunnel-delivery-id")), (200, None));
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_is_looked_after_from_the_command_line() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ attempts = 1, max_concurrent = 1 }}\n",
        upstream.address()
    );
    let mut agent = local.agent_with(&tunnels, &["hooks"]);
    let info = agent.ask(&["tunnel", "info", "hooks"]).1;
    assert!(info.lines().any(|line| line.starts_with("delivery") && line.ends_with("durable")), "{info}");
    // What is held waits, and what is live passes.
    assert_eq!(agent.ask(&["delivery", "pause", "hooks"]).0, Some(0));
    let body = noise(3, 700_000);
    let held = accepted(&post(&local, "hooks", "/held?a=1", &body).await);
    let given_up = accepted(&post(&local, "hooks", "/given-up", b"x").await);
    assert_eq!(Request::to("hooks", "GET", "/live").send(local.public).await.text(), "live");
    let waiting = list(&agent, &["--state", "waiting"]);
    assert_eq!(waiting.len(), 2);
    assert_eq!(list(&agent, &["--state", "waiting", "--since", "1h", "--tunnel", "hooks"]).len(), 2);
    let shown = asked(&agent, &["show", &held, "--body"]);
    assert_eq!((&shown["method"], &shown["target"]), (&"POST".into(), &"/held?a=1".into()));
    assert_eq!(shown["body_bytes"], 700_000);
    assert!(STANDARD.decode(shown["body"].as_str().unwrap()).unwrap() == body);
    assert_eq!(agent.ask(&["delivery", "drain"]).0, Some(1));
    // As people read it, and as programs do.
    let (code, shown) = agent.ask(&["delivery", "show", &given_up]);
    assert!(code == Some(0) && shown.contains("POST") && shown.contains("/given-up"), "{shown}");
    assert!(!shown.lines().any(|line| line == "x"), "{shown}");
    let (code, piped) = agent.ask(&["delivery", "show", &given_up, "--tunnel", "hooks", "--body"]);
    assert_eq!((code, piped.trim_end()), (Some(0), "x"));
    let (code, lines) = agent.ask(&["delivery", "list", "--limit", "1"]);
    let (note, lines): (Vec<_>, Vec<_>) =
        lines.trim_end().lines().partition(|line| line.contains("there are more than 1"));
    assert!(code == Some(0) && lines.len() == 1 && lines[0].contains(&given_up), "{lines:?}");
    assert_eq!(note.len(), 1, "{note:?}");
    // Things are kept for days: the date is there.
    let shown = asked(&agent, &["show", &given_up]);
    let received = proto::calendar::rfc3339(shown["received_ms"].as_u64().unwrap());
    assert!(lines[0].contains(&received), "{lines:?}");
    let (_, lines) = agent.ask(&["delivery", "list", "--limit", "2"]);
    assert_eq!(lines.trim_end().lines().count(), 2, "{lines}");
    // What came earlier than is asked for.
    let mut old = rows(&local, "t#hooks").await.remove(0);
    let received = (unix_now() - 7_200) * 1000;
    let old_id = format!("{received:012x}{}", "0".repeat(20));
    (old["sk"]["S"], old["run"]["S"]) = (old_id.clone().into(), old_id.clone().into());
    (old["state"]["S"], old["received_ms"]["N"]) = ("cancelled".into(), received.to_string().into());
    write_row(&local, old).await;
    for (since, is_there) in [("119m", false), ("121m", true)] {
        let found = list(&agent, &["--since", since]);
        assert_eq!(
            (found.len(), found.iter().any(|row| row["id"] == old_id)),
            (2 + usize::from(is_there), is_there)
        );
    }
    // It is waited for what waits, as long as is said.
    let (code, printed) = agent.ask(&["delivery", "drain", "--wait", "1s"]);
    assert!(code == Some(1) && printed.contains("2 deliveries have not ended"), "{code:?} {printed}");
    for wrong in [
        &["retry"][..],
        &["retry", &held, "--dead"],
        &["list", "--state", "lost"],
        &["list", "--limit", "0"],
        &["show", "x"],
        &["cancel"],
        &["drain", "--wait", "soon"],
    ] {
        assert_eq!(agent.ask(&[&["delivery"], wrong].concat()).0, Some(2), "{wrong:?}");
    }
    for others in [&["pause", "foreign"][..], &["resume", "foreign"], &["list", "--tunnel", "foreign"]] {
        let (code, printed) = agent.ask(&[&["delivery"], others].concat());
        assert_eq!(code, Some(1), "{others:?}: {printed}");
        assert!(printed.contains("no such tunnel"), "{others:?}: {printed}");
    }
    // What waits is not retried, what has ended not cancelled, what is not there not found.
    let (code, printed) = agent.ask(&["delivery", "retry", &held]);
    assert!(code == Some(1) && printed.contains("its state"), "{code:?} {printed}");
    asked(&agent, &["cancel", &given_up]);
    assert_eq!(agent.ask(&["delivery", "cancel", &given_up]).0, Some(1));
    let nothing = "0".repeat(32);
    let (code, printed) = agent.ask(&["delivery", "show", &nothing]);
    assert!(code == Some(1) && printed.contains("no such delivery"), "{code:?} {printed}");
    assert_eq!(agent.ask(&["delivery", "resume", "hooks"]).0, Some(0));
    assert_eq!(ended(&agent, &held).await["state"], "delivered");
    assert_eq!(agent.ask(&["delivery", "drain", "--wait"]).0, Some(0), "nothing waits");
    assert!(to(&upstream, "/given-up").is_empty());
    assert!(to(&upstream, "/held?a=1")[0].body == body);
    // Delivered again by hand, and it says so.
    let dead = accepted(&post(&local, "hooks", "/once/500", b"again").await);
    assert_eq!(ended(&agent, &dead).await["state"], "dead");
    assert_eq!(list(&agent, &["--state", "dead"]).len(), 1);
    assert_eq!(asked(&agent, &["retry", "--dead", "--tunnel", "hooks"]), serde_json::json!({"done": 1}));
    eventually("it has come again", async || count(&upstream, "/once/500") == 2).await;
    assert_eq!(ended(&agent, &dead).await["state"], "delivered");
    let came = to(&upstream, "/once/500");
    assert_eq!((came[1].body.clone(), came[1].all("x-tunnel-delivery-id")), (b"again".to_vec(), vec![dead]));
    assert!(attempt(&came[1]) > 1);
    assert_eq!(list(&agent, &["--state", "dead"]).len(), 0);
    // Without an edge to ask there is a code of its own.
    drop(local);
    eventually("the link is gone", async || agent.ask(&["delivery", "list"]).0 == Some(69)).await;
    assert_eq!(agent.ask(&["delivery", "drain", "--wait", "1s"]).0, Some(69));
    leave(&mut agent);
}

/// Writes a row as a function does that is killed right after.
async fn write_row(local: &Local, row: Value) {
    local.dynamodb("PutItem", serde_json::json!({"TableName": "deliveries", "Item": row})).await;
}

/// What an acceptance has written of a delivery like `kept` when it is killed before it starts the run: everything but that.
async fn cut_before_its_run(local: &Local, kept: &Value, id: &str, target: &str) {
    let mut row = kept.clone();
    let head = STANDARD.decode(kept["head"]["B"].as_str().unwrap()).unwrap();
    let mut head: Value = serde_json::from_slice(&head).unwrap();
    head["target"] = target.into();
    row["head"]["B"] = STANDARD.encode(head.to_string()).into();
    for name in ["sk", "run"] {
        row[name]["S"] = id.into();
    }
    let received = u64::from_str_radix(&id[..12], 16).unwrap();
    row["received_ms"]["N"] = received.to_string().into();
    let pieces = rows(local, &format!("b#{}", kept["sk"]["S"].as_str().unwrap())).await;
    for mut piece in pieces {
        piece["pk"]["S"] = format!("b#{id}").into();
        write_row(local, piece).await;
    }
    write_row(local, row).await;
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cut_off_while_it_was_accepted_holds_nothing_up() {
    let local = Local::start(&["--chaos", "clock=10"]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"auto\"\n\
         durable = {{ order_by = \"header:x-key\", dedupe_by = \"header:x-id\" }}\n\
         [[tunnel]]\nname = \"alone\"\nupstream = \"{}\"\ndelivery = \"auto\"\n",
        upstream.address(),
        upstream.address()
    );
    introduce(&local, &tunnels, &["hooks", "alone"]);
    let send = async |target: &str, id: &str| {
        let request = Request::to("hooks", "POST", target).field("x-key", "k").field("x-id", id);
        request.body(b"body".to_vec()).send(local.public).await
    };
    let first = accepted(&send("/first", "first").await);
    let kept = rows(&local, "t#hooks").await.remove(0);
    let turn = rows(&local, "o#hooks").await.remove(0);
    let repetition = rows(&local, "u#hooks").await.remove(0);
    let first_ms = u64::from_str_radix(&first[..12], 16).unwrap();
    let id = |ms: u64| format!("{ms:012x}{}", "0".repeat(20));
    let in_turn = async |id: &str| {
        let mut row = turn.clone();
        row["sk"]["S"] = id.into();
        row.as_object_mut().unwrap().remove("token");
        write_row(&local, row).await;
    };
    let tried = async |id: &str, name: &str| {
        let mut row = repetition.clone();
        let digest = <sha2::Sha256 as sha2::Digest>::digest(name.as_bytes());
        row["pk"]["S"] = format!("u#hooks#{}", hex(&digest[..16])).into();
        row["id"]["S"] = id.into();
        write_row(&local, row).await;
    };

    // Cut off before its run; its sender tries again, and is told that it is kept.
    let again = id(first_ms + 1);
    in_turn(&again).await;
    tried(&again, "again").await;
    cut_before_its_run(&local, &kept, &again, "/again").await;
    assert_eq!(accepted(&send("/again", "again").await), again);
    // The same without a sender that tries again: the next of the key finds it.
    let left = id(first_ms + 2);
    in_turn(&left).await;
    cut_before_its_run(&local, &kept, &left, "/left").await;
    // Cut off before its row, long ago and just now: it is nothing that could be delivered.
    let old = id(first_ms - 10_000);
    in_turn(&old).await;
    tried(&old, "old").await;
    let new = id(first_ms + 3);
    in_turn(&new).await;
    tried(&new, "new").await;
    let busy = send("/new", "new").await;
    let is_old = proto::id::DeliveryId::new(first_ms, [0; 10]).received_ms() + 5_000 <= unix_now() * 1000;
    assert!(busy.status == 503 || is_old, "its acceptance may go on: {}", busy.status);
    let last = accepted(&send("/last", "last").await);
    // Its sender tries again: now it is accepted, as another one.
    let retried = accepted(&send("/old", "old").await);
    assert_ne!(retried, old);
    // One that nobody waits for and nobody sends again: whoever looks at what waits finds it.
    let mut other = kept.clone();
    other["pk"]["S"] = "t#alone".into();
    other.as_object_mut().unwrap().remove("order_key");
    let alone = id(first_ms - 20_000);
    cut_before_its_run(&local, &other, &alone, "/alone").await;
    // As old as it may become in half a minute, and already that old.
    let max_age_ms = DeliveryPolicy::new(Mode::Auto).max_age_s * 1000;
    let oldest = unix_now() * 1000 - max_age_ms;
    let (young, too_old) = (id(oldest + 30_000), id(oldest));
    cut_before_its_run(&local, &other, &young, "/young-enough").await;
    cut_before_its_run(&local, &other, &too_old, "/too-old").await;

    let agent = local.agent_with(&tunnels, &["hooks", "alone"]);
    drained(&agent);
    let came = upstream.recorded();
    let ordered = |target: &str| !["/alone", "/young-enough"].contains(&target);
    let of_key: Vec<_> = came.iter().map(Recorded::target).filter(|&target| ordered(target)).collect();
    let expected = ["/first", "/again", "/left", "/new", "/last", "/old"];
    let expected: Vec<_> = expected.into_iter().filter(|&one| one != "/new" || busy.status == 202).collect();
    assert_eq!(of_key, expected);
    assert_eq!((count(&upstream, "/alone"), count(&upstream, "/young-enough")), (1, 1));
    let end = asked(&agent, &["show", &too_old]);
    assert_eq!((&end["state"], &end["last"]["code"]), (&"dead".into(), &"Expired".into()), "{end}");
    let ids: BTreeSet<String> = came.iter().map(|one| one.all("x-tunnel-delivery-id")[0].clone()).collect();
    assert!([&first, &again, &left, &last, &retried, &alone].iter().all(|&id| ids.contains(id)), "{ids:?}");
    assert!(came.iter().all(|one| attempt(one) == 1 && one.body == b"body"));
    for gone in [&old, &new] {
        assert_eq!(agent.ask(&["delivery", "show", gone]).0, Some(1), "{gone} never was one");
    }
}

/// An agent that says what it is told, with a tunnel that keeps everything.
async fn raw(local: &Local, token: &str, tunnel: &str) -> RawAgent {
    let policy = DeliveryPolicy { max_concurrent: 2, ..DeliveryPolicy::new(Mode::Durable) };
    raw_with(local, token, tunnel, policy).await
}

async fn raw_with(local: &Local, token: &str, tunnel: &str, policy: DeliveryPolicy) -> RawAgent {
    let mut agent = RawAgent::with(local, token).await;
    agent
        .say(AgentMessage::Hello(Hello {
            seq: 1,
            version: VERSION,
            agent: "raw".parse().unwrap(),
            software: "test".into(),
            tunnels: vec![tunnel.to_owned()],
            codecs: proto::body::Codecs::default(),
            websockets: false,
            deliveries: [(tunnel.to_owned(), policy.into())].into_iter().collect(),
        }))
        .await;
    let welcome = agent.welcome().await;
    assert!(welcome.deliveries && welcome.tunnels.len() == 1, "{welcome:?}");
    agent
}

/// Asks about deliveries; what is answered.
async fn ask(agent: &mut RawAgent, ask: Ask) -> delivery::Answer<'static> {
    agent.say(AgentMessage::Deliveries(DeliveriesAsk { seq: 7, ask })).await;
    loop {
        let text = agent.hear().await;
        if let EdgeMessage::Deliveries(told) = EdgeMessage::decode(&text).unwrap() {
            assert_eq!(told.seq, 7);
            return told.answer.into_owned();
        }
    }
}

fn reply(token: &str) -> AgentMessage<'_> {
    let headers = proto::header::Headers::new();
    AgentMessage::Reply(Reply { token: token.into(), status: 200, headers, body: None, end: true })
}

#[tokio::test]
async fn a_revoked_identity_learns_of_no_delivery_and_cancels_none() {
    let local = Local::start(&[]);
    let token = local.issue("alice", &["hooks"]);
    let owner = raw(&local, &token, "hooks").await;
    let id = accepted(&post(&local, "hooks", "/secret", b"secret").await);
    // One that is opened in the very moment may not be found yet.
    let mut thief = RawAgent::with(&local, &token).await;
    local.forget_silent("alice").await;
    assert_eq!(local.revoke(serde_json::json!({"owner": "alice"})).await, 1);
    let (hooks, id): (TunnelName, proto::id::DeliveryId) = ("hooks".parse().unwrap(), id.parse().unwrap());
    for question in [
        Ask::List { tunnel: Some(hooks.clone()), state: None, open: false, since_ms: None, cursor: None },
        Ask::Show { tunnel: hooks.clone(), id: id.clone(), body_from: Some(0) },
        Ask::Cancel { tunnel: hooks.clone(), id },
        Ask::Pause { tunnel: hooks },
    ] {
        let told = ask(&mut thief, question).await;
        assert_eq!(told, delivery::Answer::Refused { reason: delivery::Refused::NotAllowed });
    }
    drop(owner);
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_learns_of_a_delivery_or_answers_it() {
    let local = Local::start(&[]);
    let alice = local.issue("alice", &["hooks", "live"]);
    // Bob's token covers the name as well, and another's does not.
    let (bob, carol) = (local.issue("bob", &["hooks", "bobs"]), local.issue("carol", &["carols"]));
    let mut owner = raw(&local, &alice, "hooks").await;
    let id = accepted(&post(&local, "hooks", "/secret", b"secret").await);
    let call = owner.request().await;
    assert_eq!(call.target, "/secret");

    // A policy that the edge does not understand keeps nothing, is told, and harms no other tunnel.
    let dora = local.issue("dora", &["later", "wild", "known"]);
    let mut newer = RawAgent::with(&local, &dora).await;
    let said = |policy: Value| {
        serde_json::json!({"type": "hello", "seq": 1, "version": VERSION, "agent": "newer", "tunnels": ["later", "wild", "known"],
            "deliveries": {"later": {"mode": "auto", "order_by": {"sender": "x"}}, "wild": policy, "known": {"mode": "auto"}}})
        .to_string()
    };
    newer.say_text(&said(serde_json::json!({"mode": "auto", "attempts": 51, "later": [1]}))).await;
    let welcome = newer.welcome().await;
    assert_eq!((welcome.tunnels.len(), welcome.deliveries), (3, true), "{welcome:?}");
    let told: Vec<_> = welcome.policies.iter().map(|told| (&*told.name, told.holds, &*told.why)).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].0 == "later" && told[0].1 == Holds::Live && told[0].2.contains("sender"), "{told:?}");
    assert_eq!(told[1], ("wild", Holds::Bounds, "attempts must be from 1 to 50, not 51"));
    drop(newer);
    eventually("it has gone", async || post(&local, "known", "/", b"").await.status == 202).await;
    assert_eq!(post(&local, "wild", "/", b"").await.status, 202);
    let offline = post(&local, "later", "/", b"").await;
    assert_eq!((offline.status, offline.field("x-tunnel-error").as_deref()), (503, Some("tunnel_offline")));

    let hooks: TunnelName = "hooks".parse().unwrap();
    let (known, unknown) = (id.parse().unwrap(), "0".repeat(32).parse().unwrap());
    for (token, tunnel) in [(&bob, "bobs"), (&carol, "carols")] {
        let mut other = raw(&local, token, tunnel).await;
        for id in [&known, &unknown] {
            let id: &proto::id::DeliveryId = id;
            for question in [
                Ask::Show { tunnel: hooks.clone(), id: id.clone(), body_from: Some(0) },
                Ask::Retry { tunnel: hooks.clone(), id: id.clone() },
                Ask::Cancel { tunnel: hooks.clone(), id: id.clone() },
                Ask::List {
                    tunnel: Some(hooks.clone()),
                    state: None,
                    open: false,
                    since_ms: None,
                    cursor: None,
                },
                Ask::RetryDead { tunnel: hooks.clone(), cursor: None },
                Ask::Pause { tunnel: hooks.clone() },
                Ask::Resume { tunnel: hooks.clone() },
                Ask::Show { tunnel: tunnel.parse().unwrap(), id: id.clone(), body_from: Some(0) },
            ] {
                let answer = ask(&mut other, question.clone()).await;
                let nothing = delivery::Answer::Refused { reason: delivery::Refused::NotFound };
                assert_eq!(answer, nothing, "{question:?}");
            }
        }
        let all = ask(
            &mut other,
            Ask::List { tunnel: None, state: None, open: false, since_ms: None, cursor: None },
        )
        .await;
        assert!(matches!(all, delivery::Answer::Deliveries { list, .. } if list.is_empty()));
        // Its task token is known, and of no use: Carol's connection may not serve the tunnel, and Bob's is not its owner's.
        other.say(reply(&call.token)).await;
        let failed = Failed {
            token: call.token.as_str().into(),
            seq: 0,
            code: proto::error::ErrorCode::WebhookRefused,
        };
        other.say(AgentMessage::Failed(failed)).await;
        // It hears of its own questions still: what was said before has been looked at.
        ask(&mut other, Ask::Pause { tunnel: tunnel.parse().unwrap() }).await;
    }
    let state = async |owner: &mut RawAgent| {
        let show = Ask::Show { tunnel: hooks.clone(), id: known.clone(), body_from: None };
        match ask(owner, show).await {
            delivery::Answer::Delivery { summary, .. } => summary.state,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(state(&mut owner).await, delivery::State::Delivering);

    // A live request's token says nothing about a delivery, and a delivery's nothing about a live request.
    let mut live = Connection::open(local.public).await;
    live.begin(&Request::to("hooks", "GET", "/live")).await;
    let live_call = loop {
        let next = owner.request().await;
        if next.target == "/live" {
            break next;
        }
    };
    let progress = |token: &str| {
        AgentMessage::Progress(Progress { token: token.to_owned().into(), sent: 0, ended: false, taken: 0 })
    };
    owner.say(progress(&live_call.token)).await;
    owner.say(progress(&call.token)).await;
    // With the kind changed, each is forged.
    for (token, kind) in [(&call.token, 1), (&live_call.token, 2)] {
        let mut bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).unwrap();
        bytes[0] = kind;
        owner.say(reply(&base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))).await;
    }
    owner.say(live_call.reply("live", true)).await;
    assert_eq!(live.answer("GET").await.text(), "live");
    assert_eq!(state(&mut owner).await, delivery::State::Delivering);
    owner.say(reply(&call.token)).await;
    eventually("its owner has answered it", async || state(&mut owner).await == delivery::State::Delivered)
        .await;
    // A used token is dropped.
    owner.say(reply(&call.token)).await;
    assert_eq!(state(&mut owner).await, delivery::State::Delivered);

    // Once a name is free again, what was kept for its former owner is nothing to the next one, who is not held up by it.
    let (erin, frank) = (local.issue("erin", &["spot"]), local.issue("frank", &["spot"]));
    let mut before = raw(&local, &erin, "spot").await;
    let spot: TunnelName = "spot".parse().unwrap();
    let paused = ask(&mut before, Ask::Pause { tunnel: spot.clone() }).await;
    assert!(matches!(paused, delivery::Answer::Done { count: 1, .. }), "{paused:?}");
    drop(before);
    let hers = accepted(&post(&local, "spot", "/hers", b"hers").await);
    eventually("it has parked", async || rows(&local, "p#spot").await.len() == 1).await;
    let_the_name_go(&local, "spot", "erin").await;
    let mut after = raw(&local, &frank, "spot").await;
    eventually("hers is dead", async || {
        let all = rows(&local, "t#spot").await;
        let found = all.iter().find(|row| row["sk"]["S"] == hers).unwrap();
        assert!(found["attempt"]["N"] == "0" && found["state"]["S"] != "delivering", "{found}");
        found["state"]["S"] == "dead"
    })
    .await;
    accepted(&post(&local, "spot", "/his", b"his").await);
    let his = after.request().await;
    assert_eq!(his.target, "/his", "nothing of hers has come");
    after.say(reply(&his.token)).await;
    let of_hers = Ask::Show { tunnel: spot, id: hers.parse().unwrap(), body_from: Some(0) };
    let nothing = delivery::Answer::Refused { reason: delivery::Refused::NotFound };
    assert_eq!(ask(&mut after, of_hers).await, nothing);
}

/// Has the name of a tunnel expire whose agent leaves: now it is anybody's.
async fn let_the_name_go(local: &Local, tunnel: &str, owner: &str) {
    let query = serde_json::json!({
        "TableName": "connections", "KeyConditionExpression": "tunnel = :t",
        "ExpressionAttributeValues": {":t": {"S": tunnel}},
    });
    let name_rows =
        async || local.dynamodb("Query", query.clone()).await["Items"].as_array().unwrap().clone();
    eventually("the owner's connection has gone", async || name_rows().await.len() == 1).await;
    let mut name_row = name_rows().await.remove(0);
    assert_eq!(name_row["owner"]["S"], owner);
    name_row["expires_at"]["N"] = (unix_now() - 1).to_string().into();
    local.dynamodb("PutItem", serde_json::json!({"TableName": "connections", "Item": name_row})).await;
}

#[tokio::test]
async fn who_has_a_name_next_is_neither_answered_nor_held_up_by_what_was_left_under_it() {
    let local = Local::start(&[]);
    let (erin, frank) = (local.issue("erin", &["spot"]), local.issue("frank", &["spot"]));
    let policy = DeliveryPolicy {
        order_by: OrderBy::Tunnel,
        dedupe_by: Some(Field::Header("x-id".into())),
        ..DeliveryPolicy::new(Mode::Durable)
    };
    let send = async |target: &str, id: &str| {
        let request = Request::to("spot", "POST", target).field("x-id", id);
        accepted(&request.body(b"x".to_vec()).send(local.public).await)
    };
    let mut before = raw_with(&local, &erin, "spot", policy.clone()).await;
    let hers = send("/hers", "one").await;
    assert_eq!(send("/hers", "one").await, hers);
    // It keeps its turn for an hour more.
    let call = before.request().await;
    let headers = [(http::header::RETRY_AFTER, http::HeaderValue::from_static("3600"))].into_iter().collect();
    let token = call.token.as_str().into();
    before.say(AgentMessage::Reply(Reply { token, status: 503, headers, body: None, end: true })).await;
    eventually("it waits for its next attempt", async || {
        let hers = rows(&local, "t#spot").await.remove(0);
        hers["state"]["S"] == "waiting" && hers.get("last").is_some()
    })
    .await;
    drop(before);
    let_the_name_go(&local, "spot", "erin").await;

    let mut after = raw_with(&local, &frank, "spot", policy).await;
    let his = send("/his", "one").await;
    assert_ne!(his, hers);
    let call = after.request().await;
    assert_eq!(call.target, "/his");
    after.say(reply(&call.token)).await;
    assert_eq!(send("/his", "one").await, his, "it is his now");
    let next = send("/next", "two").await;
    assert_ne!(next, his);
    assert_eq!(after.request().await.target, "/next");
}

/// What was counted since.
fn since(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let grown = |(call, &count): (&String, &u64)| {
        let more = count - before.get(call).copied().unwrap_or(0);
        (more > 0).then(|| (call.clone(), more))
    };
    after.iter().filter_map(grown).collect()
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_hours_asleep_cost_no_call_and_lose_nothing() {
    // Each second is an hour.
    let local = Local::start(&["--chaos", "clock=3600"]);
    let (upstream, counts) = counting().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"auto\"\n\
         durable = {{ max_concurrent = 1 }}\n\
         [[tunnel]]\nname = \"short\"\nupstream = \"{}\"\ndelivery = \"auto\"\ndurable = {{ max_age = \"1h\" }}\n",
        upstream.address(),
        upstream.address()
    );
    introduce(&local, &tunnels, &["hooks", "short"]);
    for number in 0..20 {
        accepted(&post(&local, "hooks", &format!("/{number}"), b"x").await);
    }
    let parked = async || {
        let rows = local.dynamodb("Scan", serde_json::json!({"TableName": "deliveries"})).await;
        let rows = rows["Items"].as_array().unwrap().clone();
        rows.iter().filter(|row| row["pk"]["S"].as_str().unwrap().starts_with("p#hooks")).count()
    };
    eventually("all have parked", async || parked().await == 20).await;
    let before = local.counters().await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let made = since(&before, &local.counters().await);
    // The edge's own sweep goes on: it looks once which tunnels wait, however much waits, and, on this clock, deletes and makes
    // mailboxes. No run, and no row of a delivery, is touched.
    assert!(!made.keys().any(|call| call.starts_with("states:") || call.starts_with("lambda:")), "{made:?}");
    for (of_rows, of_queues) in [
        ("dynamodb:PutItem", "sqs:CreateQueue"),
        ("dynamodb:UpdateItem", "sqs:DeleteQueue"),
        ("dynamodb:DeleteItem", "sqs:DeleteQueue"),
    ] {
        // One may be between the two at either end.
        let of = |call: &str| made.get(call).copied().unwrap_or(0);
        assert!(of(of_rows).abs_diff(of(of_queues)) <= 10, "{made:?}");
    }
    println!("8 h asleep with 20 deliveries parked, calls made meanwhile: {made:?}");
    // What is too old by then is not delivered.
    accepted(&post(&local, "short", "/late", b"x").await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let agent = local.agent_with(&tunnels, &["hooks", "short"]);
    eventually("all have come", async || upstream.look(<[_]>::len) >= 20).await;
    drained(&agent);
    assert_eq!(upstream.look(<[_]>::len), 20);
    assert_eq!(counts.1.load(Ordering::SeqCst), 1, "one at a time");
    // Each was woken, and told how it has ended: such calls are counted.
    let made = since(&before, &local.counters().await);
    assert!(made["states:SendTaskSuccess"] >= 40, "{made:?}");
    let late = list(&agent, &["--tunnel", "short"]);
    assert!(late.is_empty() || late[0]["state"] == "dead", "{late:?}");
}

/// Ends a process at once.
fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // One that has just ended by itself is as good.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// The rows of the table of deliveries whose keys begin so.
async fn rows(local: &Local, kind: &str) -> Vec<Value> {
    let rows = local.dynamodb("Scan", serde_json::json!({"TableName": "deliveries"})).await;
    let of = |row: &Value| row["pk"]["S"].as_str().unwrap().starts_with(kind);
    rows["Items"].as_array().unwrap().iter().filter(|row| of(row)).cloned().collect()
}

/// Waits for the rows of these kinds to be gone: a delivery is delivered first, and what belongs to it goes then.
async fn nothing_is_left(local: &Local, kinds: &[&str]) {
    for kind in kinds {
        eventually(&format!("{kind} is empty"), async || rows(local, kind).await.is_empty()).await;
    }
}

fn assert_try_again(answer: &Answer, what: &str) {
    assert_eq!(answer.status, 503, "{what}: {}", answer.text());
    assert_eq!(answer.field("x-tunnel-error").as_deref(), Some("edge_busy"), "{what}");
    let after: u64 = answer.field("retry-after").unwrap().parse().unwrap();
    assert!(after >= 1, "{what}");
    assert!(answer.field("x-tunnel-delivery-id").is_none(), "{what}");
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_kept_is_503_and_leaves_nothing_behind() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"full\"\nupstream = \"{}\"\ndelivery = \"auto\"\n\
         durable = {{ order_by = \"path\", dedupe_by = \"header:webhook-id\" }}\n",
        upstream.address()
    );
    introduce(&local, &tunnels, &["full"]);
    let calls = Calls::of(&local, "ingress").await;
    let body = noise(5, limits::DELIVERY_PIECE_BYTES + 1);
    let send = |target: &str, id: &str| {
        let request = Request::to("full", "POST", target).field("webhook-id", id).body(body.clone());
        let to = local.public;
        async move { request.send(to).await }
    };
    // Every call that an acceptance makes, in whatever way it fails.
    const THROTTLED: Fate = Fate::Refused(400, "ProvisionedThroughputExceededException");
    let mut kept = Vec::new();
    for (operation, part, fate) in [
        // Once noted, it is not written again: the first.
        ("PutItem", r##""#waiting""##, THROTTLED),
        ("PutItem", r#""u#full#"#, THROTTLED),
        ("PutItem", r#""0001""#, Fate::Refused(400, "ThrottlingException")),
        ("PutItem", r#""0002""#, Fate::Refused(400, "RequestLimitExceeded")),
        ("PutItem", r#""0002""#, Fate::Unanswered),
        ("PutItem", r#""o#full#"#, Fate::Refused(500, "InternalServerError")),
        ("PutItem", r#""t#full""#, THROTTLED),
        ("PutItem", r#""t#full""#, Fate::Broken),
        ("StartExecution", "delivery", Fate::Refused(400, "ThrottlingException")),
        ("StartExecution", "delivery", Fate::Refused(400, "ExecutionLimitExceeded")),
    ] {
        let what = format!("{operation} {part} {fate:?}");
        // What is accepted parks meanwhile.
        let written = async || {
            let all = rows(&local, "").await;
            let of = |row: &&Value| {
                let is_of = |kind: &str| row["pk"]["S"].as_str().unwrap().starts_with(kind);
                is_of("b#") || is_of("o#") || is_of("u#") || row.get("head").is_some()
            };
            all.iter().filter(of).count()
        };
        let before = written().await;
        let is_one = move |call: &str, body: &str| call == operation && body.contains(part);
        calls.decide(move |call, body| if is_one(call, body) { fate.clone() } else { Fate::Done });
        let (target, id) = (format!("/{}", kept.len()), format!("msg_{}", kept.len()));
        assert_try_again(&send(&target, &id).await, &what);
        assert!(calls.count(is_one) > 0, "{what}");
        // Only a whole one stays, whose run did not start: that is done by the next who meets it.
        let stays = if operation == "StartExecution" { 5 } else { 0 };
        assert_eq!(written().await - before, stays, "{what}");
        // The sender's next try works, and is one delivery with what was kept.
        calls.decide(|_, _| Fate::Done);
        kept.push((target.clone(), accepted(&send(&target, &id).await)));
        assert_eq!(written().await - before, 5, "{what}");
    }

    // The same once more, while the first is being kept.
    for (operation, part) in [("PutItem", r#""t#full""#), ("StartExecution", "delivery")] {
        let held = Arc::new(Held::default());
        let mut hold = Some(Arc::clone(&held));
        calls.decide(move |call, body| {
            let is_one = call == operation && body.contains(part);
            hold.take_if(|_| is_one).map_or(Fate::Done, Fate::Held)
        });
        let target = format!("/race/{operation}");
        let first = tokio::spawn(send(&target, operation));
        held.come.acquire().await.unwrap().forget();
        let second = send(&target, operation).await;
        held.go_on.add_permits(1);
        let first = first.await.unwrap();
        let id = if operation == "PutItem" {
            // Nobody knows yet whether it will be kept. Where that takes too long, the second takes its place.
            let (is, is_not) = if first.status == 202 { (first, second) } else { (second, first) };
            assert_try_again(&is_not, "of two only one is kept");
            accepted(&is)
        } else {
            assert_eq!(accepted(&first), accepted(&second));
            accepted(&first)
        };
        assert_eq!(accepted(&send(&target, operation).await), id);
        kept.push((target, id));
    }

    // The process is killed: before the row is there, and between the row and the run. Nobody was told 202, so the sender
    // tries again, or does not.
    let mut kept: Vec<(String, Option<String>)> =
        kept.into_iter().map(|(target, id)| (target, Some(id))).collect();
    for (operation, part, tries_again) in [
        ("PutItem", r#""t#full""#, false),
        ("PutItem", r#""t#full""#, true),
        ("StartExecution", "delivery", true),
        ("StartExecution", "delivery", false),
    ] {
        let held = Arc::new(Held::default());
        let mut hold = Some(Arc::clone(&held));
        calls.decide(move |call, body| {
            let is_one = call == operation && body.contains(part);
            hold.take_if(|_| is_one).map_or(Fate::Done, Fate::Held)
        });
        let name = format!("killed-{operation}-{tries_again}");
        let target = format!("/{name}");
        let first = tokio::spawn(send(&target, &name));
        held.come.acquire().await.unwrap().forget();
        for (function, pid) in local.function_processes() {
            if function == "ingress" {
                kill(pid);
            }
        }
        held.gone.acquire().await.unwrap().forget();
        let first = first.await.unwrap();
        assert!(first.status >= 500, "{name}: {} {}", first.status, first.text());
        assert!(first.field("x-tunnel-delivery-id").is_none(), "{name}");
        // What was cut off before its row is in the way for some seconds, as it might go on; and a process that was killed as
        // well may be taken for a free one once.
        let until_kept = async |id: &str| {
            let mut kept = None;
            eventually("the next try is kept", async || {
                let next = send(&target, id).await;
                if next.status == 202 {
                    kept = next.field("x-tunnel-delivery-id");
                } else {
                    assert!(next.status >= 500, "{name}: {} {}", next.status, next.text());
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
                kept.is_some()
            })
            .await;
            kept
        };
        let id = match (tries_again, operation) {
            (true, _) => until_kept(&name).await,
            // It is whole: delivered without anybody's asking.
            (false, "StartExecution") => None,
            // Nothing of it is delivered, and its key goes on.
            (false, _) => until_kept("of the same key").await,
        };
        kept.push((target, id));
    }

    let agent = local.agent_with(&tunnels, &["full"]);
    drained(&agent);
    let came = upstream.recorded();
    assert_eq!(came.len(), kept.len(), "each once");
    for (target, id) in kept {
        let came = to(&upstream, &target);
        assert_eq!((came.len(), attempt(&came[0])), (1, 1), "{target}");
        if let Some(id) = id {
            assert_eq!(came[0].all("x-tunnel-delivery-id"), [id], "{target}");
        }
        assert!(came[0].body == body, "{target}");
    }
    nothing_is_left(&local, &["o#", "p#"]).await;
    // Of what was killed before its row was there the body stays until it expires: two pieces of each of the two.
    eventually("the bodies of the others are gone", async || rows(&local, "b#").await.len() == 4).await;
    let left = rows(&local, "b#").await;
    assert_eq!(left.len(), 4);
    assert!(left.iter().all(|row| row.get("expires_at").is_some()));
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_or_comes_back_gets_what_it_should_and_when() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let token = fs::read_to_string(&local.token).unwrap().trim().to_owned();

    // Nobody knows whether it ran: kept as the second attempt, or told, as the policy says.
    for (tunnel, retry_unknown) in [("again", true), ("never", false)] {
        let policy = DeliveryPolicy { retry_unknown, ..DeliveryPolicy::new(Mode::Auto) };
        let mut agent = raw_with(&local, &token, tunnel, policy).await;
        let mut sender = Connection::open(local.public).await;
        sender.begin(&Request::to(tunnel, "POST", "/lost").body(b"lost".to_vec())).await;
        assert_eq!(agent.request().await.target, "/lost");
        drop(agent);
        let answer = sender.answer("POST").await;
        if !retry_unknown {
            assert_eq!(answer.status, 502, "{}", answer.text());
            assert_eq!(answer.field("x-tunnel-error").as_deref(), Some("agent_lost"));
            assert_eq!(rows(&local, "t#never").await.len(), 0);
            continue;
        }
        let id = accepted(&answer);
        let config = format!(
            "[[tunnel]]\nname = \"again\"\nupstream = \"{}\"\ndelivery = \"auto\"\n",
            upstream.address()
        );
        let mut agent = local.agent_with(&config, &["again"]);
        drained(&agent);
        let came = to(&upstream, "/lost");
        assert_eq!((came.len(), attempt(&came[0]), &came[0].body[..]), (1, 2, &b"lost"[..]));
        assert_eq!(came[0].all("x-tunnel-delivery-id"), [id]);
        leave(&mut agent);
    }

    // What waits comes one at a time at first, and one more with each that ends, up to the most.
    const MOST: u32 = 3;
    let policy = || DeliveryPolicy { max_concurrent: MOST, ..DeliveryPolicy::new(Mode::Durable) };
    drop(raw_with(&local, &token, "ramp", policy()).await);
    eventually("it has gone", async || {
        let query = serde_json::json!({
            "TableName": "connections", "KeyConditionExpression": "tunnel = :t",
            "ExpressionAttributeValues": {":t": {"S": "ramp"}},
        });
        local.dynamodb("Query", query).await["Count"] == 1
    })
    .await;
    let mut waiting = 12;
    for number in 0..waiting {
        accepted(&post(&local, "ramp", &format!("/{number:02}"), b"x").await);
    }
    eventually("all have parked", async || rows(&local, "p#ramp").await.len() == waiting).await;
    let mut agent = raw_with(&local, &token, "ramp", policy()).await;
    let mut order: Vec<String> = Vec::new();
    for at_once in [1, 2, 3, 3, 3] {
        let mut under_way = Vec::new();
        for _ in 0..at_once {
            let call: Call = agent.request().await;
            order.push(call.target.clone());
            under_way.push(call);
        }
        waiting -= at_once;
        // All others wait still.
        eventually("no more than that", async || rows(&local, "p#ramp").await.len() == waiting).await;
        for call in under_way {
            agent.say(reply(&call.token)).await;
        }
    }
    assert_eq!(waiting, 0);
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 12, "each once");
    // Of what goes on together any may be the first.
    let oldest_first = order.iter().enumerate().all(|(at, target)| {
        let number: usize = target[1..].parse().unwrap();
        number.abs_diff(at) < MOST as usize
    });
    assert!(oldest_first, "{order:?}");

    // A live request's sign of life says nothing to a run, and a delivery's does.
    let mut live = Connection::open(local.public).await;
    live.begin(&Request::to("ramp", "GET", "/live")).await;
    let live_call = agent.request().await;
    accepted(&post(&local, "ramp", "/kept", b"x").await);
    let call = agent.request().await;
    let calls = Calls::of(&local, "response").await;
    let beats = async || calls.count(|call, _| call == "SendTaskHeartbeat");
    agent.say(call.progress(0, false)).await;
    eventually("the run has heard it", async || beats().await == 1).await;
    agent.say(live_call.progress(0, false)).await;
    agent.say(live_call.reply("live", true)).await;
    live.answer("GET").await;
    agent.say(call.progress(0, false)).await;
    eventually("the run has heard it", async || beats().await == 2).await;
    agent.say(reply(&call.token)).await;

    // What an agent has no room for is no attempt, however often; since when that is so is noted.
    let busy = accepted(&post(&local, "ramp", "/busy", b"x").await);
    let row = async || {
        let all = rows(&local, "t#ramp").await;
        all.into_iter().find(|row| row["sk"]["S"] == busy).unwrap()
    };
    let mut since = Value::Null;
    for code in [proto::error::ErrorCode::AgentBusy, proto::error::ErrorCode::Maintenance] {
        let call = agent.request().await;
        assert_eq!(call.target, "/busy");
        agent.say(AgentMessage::Failed(Failed { token: call.token.as_str().into(), seq: 0, code })).await;
        let wanted = format!("{code}");
        eventually("it is noted", async || {
            let row = row().await;
            let noted = row["last"]["S"].as_str().is_some_and(|last| last.contains(&wanted));
            if noted && since.is_null() {
                since = row["refused_since"].clone();
            }
            noted && row["refused_since"] == since && !since.is_null()
        })
        .await;
    }
    let call = agent.request().await;
    agent.say(reply(&call.token)).await;
    eventually("it is delivered", async || row().await["state"]["S"] == "delivered").await;
    assert_eq!(row().await["attempt"]["N"], "1");
}

/// A body in chunks, without its end.
fn chunks(bytes: &[u8]) -> Vec<u8> {
    let chunk = |piece: &[u8]| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
    bytes.chunks(64 * 1024).flat_map(chunk).collect()
}

fn open_ended(tunnel: &str, target: &str) -> Request {
    Request::to(tunnel, "POST", target).field("Transfer-Encoding", "chunked")
}

/// A relay begins with a request before its body has come: whether it is kept does not depend on that.
// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_relay_what_is_still_coming_is_kept_as_well() {
    let local = Local::start(&["--front", "relay", "--websockets", "relay"]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{0}\"\ndelivery = \"auto\"\n\
         [[tunnel]]\nname = \"always\"\nupstream = \"{0}\"\ndelivery = \"durable\"\n\
         [[tunnel]]\nname = \"live\"\nupstream = \"{0}\"\n",
        upstream.address()
    );
    let names = ["hooks", "always", "live"];
    introduce(&local, &tunnels, &names);
    let most = limits::REQUEST_BODY_BYTES;
    let mut kept: Vec<(String, String, Vec<u8>)> = Vec::new();
    let mut keep = |target: &str, answer: &Answer, body: &[u8]| {
        kept.push((target.to_owned(), accepted(answer), body.to_owned()));
    };
    let offline = |answer: &Answer| {
        assert_eq!((answer.status, answer.field("x-tunnel-error").as_deref()), (503, Some("tunnel_offline")));
    };
    eventually("nobody is there", async || post(&local, "live", "/", b"").await.status == 503).await;

    // With a length and without, up to what may be kept and one byte more; twice, since the first one is remembered.
    let cases = [("hooks", limits::CHUNK_BYTES + 1), ("hooks", most), ("always", most), ("always", most)];
    for (number, (tunnel, length)) in cases.into_iter().enumerate() {
        let (body, target) = (noise(length as u64, length), format!("/{tunnel}/{number}/length"));
        keep(&target, &post(&local, tunnel, &target, &body).await, &body);
        let target = format!("/{tunnel}/{number}/chunked");
        let mut sender = Connection::open(local.public).await;
        sender
            .write(&[open_ended(tunnel, &target).head(), chunks(&body), b"0\r\n\r\n".to_vec()].concat())
            .await;
        keep(&target, &sender.answer("POST").await, &body);
        let long = noise(1, most + 1);
        offline(&post(&local, tunnel, "/long", &long).await);
        let mut sender = Connection::open(local.public).await;
        sender
            .begin(&open_ended(tunnel, "/long").raw_body([chunks(&long), b"0\r\n\r\n".to_vec()].concat()))
            .await;
        offline(&sender.answer("POST").await);
    }
    // One that waits to be asked is asked, and may be slow then.
    let (_, secret) = local.past_the_front().await;
    for tunnel in ["hooks", "always"] {
        let (mut sender, _) = local.past_the_front().await;
        let target = format!("/{tunnel}/asked");
        let head = Request::to(tunnel, "POST", &target)
            .field("X-Tunnel-Front", &secret)
            .field("X-Tunnel-Host", &format!("{tunnel}.localhost"))
            .field("Content-Length", "10")
            .field("Expect", "100-continue");
        sender.write(&head.head()).await;
        assert_eq!(sender.head_of_any_status().await.status, 100, "{tunnel}");
        sender.write(b"12345").await;
        sender.write(b"67890").await;
        keep(&target, &sender.answer("POST").await, b"1234567890");
    }
    // What keeps nothing does not begin to.
    offline(&post(&local, "live", "/", &noise(1, most)).await);

    let agent = local.agent_with(&tunnels, &names);
    drained(&agent);
    for (target, id, body) in &kept {
        let came = to(&upstream, target);
        assert_eq!((came.len(), attempt(&came[0])), (1, 1), "{target}");
        assert!(came[0].body == *body, "{target}");
        assert_eq!(came[0].all("x-tunnel-delivery-id"), [id.as_str()], "{target}");
    }
    // While somebody is there: kept as well where that is wanted, and live where it is too long for that.
    let body = noise(2, limits::CHUNK_BYTES + 1);
    accepted(&post(&local, "always", "/at-once", &body).await);
    let long = noise(1, most + 1);
    let live = post(&local, "always", "/long", &long).await;
    assert_eq!((live.status, live.text().as_str()), (200, "live"));
    drained(&agent);
    for (target, body) in [("/at-once", &body), ("/long", &long)] {
        let came = to(&upstream, target);
        assert!(came.len() == 1 && came[0].body == *body, "{target}");
    }
}

/// Nobody can hold more of them than there is memory for: the others are to be sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_relay_holds_to_keep_it_shares_one_memory() {
    let local = Local::start_in(
        &[("TUNNEL_RELAY_BUFFER_BYTES", "100000")],
        &["--no-agent", "--front", "relay", "--websockets", "relay"],
    );
    let token = fs::read_to_string(&local.token).unwrap().trim().to_owned();
    for (tunnel, mode) in [("hooks", Mode::Auto), ("always", Mode::Durable)] {
        drop(raw_with(&local, &token, tunnel, DeliveryPolicy::new(mode)).await);
        eventually("it has gone", async || post(&local, tunnel, "/", b"").await.status == 202).await;
        accepted(&post(&local, tunnel, "/", &noise(1, 150_000)).await);
        assert_try_again(&post(&local, tunnel, "/", &noise(1, 200_000)).await, tunnel);
        accepted(&post(&local, tunnel, "/", &noise(1, 150_000)).await);
    }
}

/// A request whose agent is lost is kept where its owner wants that, however much of its body the agent had.
// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_request_whose_agent_is_lost_is_kept_with_all_of_its_body() {
    for front in [&[][..], &["--front", "relay", "--websockets", "relay"]] {
        let local = Local::start(front);
        let upstream = as_told().await;
        let token = fs::read_to_string(&local.token).unwrap().trim().to_owned();
        let body = noise(3, 3 * limits::CHUNK_BYTES);
        let (begun, rest) = body.split_at(2 * limits::CHUNK_BYTES);
        // How much of its body an agent asks for, and whether there is a length; a function has no other requests.
        let cases = [
            ("short", 0, true),
            ("unasked", 0, true),
            ("begun", 1, true),
            ("all", 3, true),
            ("open", 1, false),
        ];
        let mut kept = Vec::new();
        for (tunnel, pieces, has_length) in cases.into_iter().filter(|case| case.2 || !front.is_empty()) {
            // What is kept would be delivered to the next agent.
            for retry_unknown in [false, true] {
                let policy = DeliveryPolicy { retry_unknown, ..DeliveryPolicy::new(Mode::Auto) };
                let mut agent = raw_with(&local, &token, tunnel, policy).await;
                let target = format!("/{tunnel}/{retry_unknown}");
                let body = if tunnel == "short" { &b"short"[..] } else { &body };
                let mut sender = Connection::open(local.public).await;
                if has_length {
                    sender.begin(&Request::to(tunnel, "POST", &target).body(body.to_owned())).await;
                } else {
                    sender.write(&[open_ended(tunnel, &target).head(), chunks(begun)].concat()).await;
                }
                let call = agent.request().await;
                assert_eq!(call.target, target);
                if pieces > 0 {
                    let codecs = proto::body::Codecs::default();
                    let token = call.token.as_str().into();
                    agent.say(AgentMessage::Continue(Continue { token, codecs, window: Some(9) })).await;
                }
                let mut heard = 0;
                while heard < pieces {
                    let text = agent.hear().await;
                    if matches!(EdgeMessage::decode(&text).unwrap(), EdgeMessage::RequestChunk(_)) {
                        heard += 1;
                    }
                }
                drop(agent);
                if !has_length {
                    sender.write(&[chunks(rest), b"0\r\n\r\n".to_vec()].concat()).await;
                }
                let answer = sender.answer("POST").await;
                if retry_unknown {
                    kept.push((target, accepted(&answer), body.to_owned()));
                } else {
                    let error = answer.field("x-tunnel-error");
                    assert_eq!((answer.status, error.as_deref()), (502, Some("agent_lost")), "{target}");
                }
            }
            assert_eq!(rows(&local, &format!("t#{tunnel}")).await.len(), 1, "{tunnel}");
        }
        let names: Vec<&str> = cases.into_iter().map(|case| case.0).collect();
        let tunnels: String = names
            .iter()
            .map(|name| {
                format!(
                    "[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\ndelivery = \"auto\"\n",
                    upstream.address()
                )
            })
            .collect();
        let agent = local.agent_with(&tunnels, &names);
        drained(&agent);
        for (target, id, body) in kept {
            let came = to(&upstream, &target);
            assert_eq!((came.len(), attempt(&came[0])), (1, 2), "{target}");
            assert!(came[0].body == body, "{target}");
            assert_eq!(came[0].all("x-tunnel-delivery-id"), [id], "{target}");
        }
    }
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_kept_is_delivered_after_a_power_cut() {
    let mut local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ order_by = \"header:x-key\", dedupe_by = \"header:x-id\", backoff = {{ base = \"1s\", max = \"1s\" }} }}\n",
        upstream.address()
    );
    introduce(&local, &tunnels, &["hooks"]);
    let send = async |local: &Local, target: &str, key: &str| {
        let request = Request::to("hooks", "POST", target).field("x-key", key).field("x-id", target);
        accepted(&request.body(noise(9, 500_000)).send(local.public).await)
    };
    // Two wait for an agent, and one for its turn.
    let ids = [
        send(&local, "/first", "a").await,
        send(&local, "/second", "a").await,
        send(&local, "/other", "b").await,
    ];
    eventually("all wait", async || {
        let turns = rows(&local, "o#hooks").await;
        rows(&local, "p#hooks").await.len() == 2 && turns.iter().any(|row| row.get("token").is_some())
    })
    .await;
    local.kill_and_start_again(&["--no-agent"]);
    assert_eq!(send(&local, "/first", "a").await, ids[0], "it is known still");
    let mut agent = local.agent_with(&tunnels, &["hooks"]);
    drained(&agent);
    // One that waits for its next attempt.
    let tried = send(&local, "/once/500", "c").await;
    eventually("its first attempt is noted", async || {
        asked(&agent, &["show", &tried])["last"]["status"] == 500
    })
    .await;
    local.kill_and_start_again(&["--no-agent"]);
    eventually("its agent is back", async || agent.ask(&["delivery", "list"]).0 == Some(0)).await;
    assert_eq!(ended(&agent, &tried).await["state"], "delivered");
    let came = upstream.recorded();
    let all: Vec<_> = came.iter().map(|one| (one.target(), attempt(one))).collect();
    let at = |target: &str| all.iter().position(|one| one.0 == target).unwrap();
    assert_eq!(all.len(), 5, "{all:?}");
    assert!(at("/first") < at("/second") && at("/other") < 3, "{all:?}");
    assert_eq!(all[3..], [("/once/500", 1), ("/once/500", 2)], "{all:?}");
    assert!(all[..3].iter().all(|one| one.1 == 1), "{all:?}");
    assert!(came.iter().all(|one| one.body == noise(9, 500_000)));
    leave(&mut agent);
}

/// A policy of one attempt at the most, and what is cut off before that: none was begun, so it is not the one. Once it has
/// begun, nobody knows.
// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cut_off_before_its_attempt_begins_has_its_attempt_still() {
    let mut local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"once\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ attempts = 1, retry_unknown = false }}\n",
        upstream.address()
    );
    introduce(&local, &tunnels, &["once"]);
    let calls = Calls::of(&local, "deliver").await;
    let stop = |operation: &'static str, fate: fn(Arc<Held>) -> Fate| {
        let held = Arc::new(Held::default());
        let mut hold = Some(Arc::clone(&held));
        calls.decide(move |call, body| {
            let is_one = call == operation && body.contains("once");
            hold.take_if(|_| is_one).map_or(Fate::Done, fate)
        });
        held
    };
    let kill_it = || {
        for (function, pid) in local.function_processes() {
            if function == "deliver" {
                kill(pid);
            }
        }
    };
    // While it looks for an agent, of which there is none.
    let looking = stop("Query", Fate::Held);
    accepted(&post(&local, "once", "/killed", b"x").await);
    looking.come.acquire().await.unwrap().forget();
    kill_it();
    eventually("its run waits for an agent", async || rows(&local, "p#once").await.len() == 1).await;
    // Once the attempt is counted.
    let mut agent = local.agent_with(&tunnels, &["once"]);
    drained(&agent);
    let begins = stop("UpdateItem", Fate::Lost);
    let unknown = accepted(&post(&local, "once", "/unknown", b"x").await);
    begins.come.acquire().await.unwrap().forget();
    eventually("it is counted", async || {
        rows(&local, "t#once").await.iter().any(|row| row["state"]["S"] == "delivering")
    })
    .await;
    kill_it();
    assert_eq!(ended(&agent, &unknown).await["state"], "dead");
    leave(&mut agent);
    // All of the edge at once.
    let looking = stop("Query", Fate::Held);
    accepted(&post(&local, "once", "/power", b"x").await);
    looking.come.acquire().await.unwrap().forget();
    local.kill_and_start_again(&["--no-agent"]);
    let mut agent = local.agent_with(&tunnels, &["once"]);
    drained(&agent);
    let came = upstream.recorded();
    let all: Vec<_> = came.iter().map(|one| (one.target(), attempt(one))).collect();
    assert_eq!(all, [("/killed", 1), ("/power", 1)]);
    leave(&mut agent);
}

const DEAD_LETTERS: &str = "tunnel-local-dead-letters";
const REDELIVERIES: &str = "tunnel-local-redeliveries";

/// How many messages a queue has.
async fn messages(local: &Local, queue: &str) -> usize {
    let url = local.sqs("GetQueueUrl", serde_json::json!({"QueueName": queue})).await["QueueUrl"].clone();
    let names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"];
    let asked = serde_json::json!({"QueueUrl": url, "AttributeNames": names});
    let told = local.sqs("GetQueueAttributes", asked).await;
    names.iter().map(|name| told["Attributes"][name].as_str().unwrap().parse::<usize>().unwrap()).sum()
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dead_is_delivered_again_in_each_of_four_ways_and_says_so() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ attempts = 1, order_by = \"path\" }}\n",
        upstream.address()
    );
    let agent = local.agent_with(&tunnels, &["hooks"]);
    let bury = async |name: &str| {
        let target = format!("/once/500/{name}");
        let id = accepted(&post(&local, "hooks", &target, name.as_bytes()).await);
        assert_eq!(ended(&agent, &id).await["state"], "dead");
        (target, id)
    };
    let machine = local.variables("ingress").await["TUNNEL_DELIVERY_MACHINE_ARN"].clone();
    // A run ends a moment after its delivery.
    let over = async |id: &str, runs: usize| {
        eventually("its runs have ended", async || {
            let asked = serde_json::json!({"stateMachineArn": machine});
            let listed = local.states("ListExecutions", asked).await;
            let all = listed["executions"].as_array().unwrap();
            let own = all.iter().filter(|run| run["name"].as_str().unwrap().starts_with(id));
            let own: Vec<_> = own.map(|run| run["status"].clone()).collect();
            assert_eq!(own.len(), runs, "{id}: {all:?}");
            own.iter().all(|status| status != "RUNNING")
        })
        .await;
    };
    let again = async |(target, id): (String, String), runs: usize| {
        eventually("it has come again", async || count(&upstream, &target) == 2).await;
        let end = ended(&agent, &id).await;
        assert_eq!((&end["state"], &end["attempt"]), (&"delivered".into(), &2.into()), "{end}");
        let came = to(&upstream, &target);
        assert_eq!(came.iter().map(attempt).collect::<Vec<_>>(), [1, 2], "{target}");
        assert!(came.iter().all(|one| one.all("x-tunnel-delivery-id") == [id.clone()]));
        assert_eq!(came[0].body, came[1].body);
        over(&id, runs).await;
    };
    let sweep = async || local.invoke("sweep", &serde_json::json!({})).await;

    // The command.
    let one = bury("retry").await;
    asked(&agent, &["retry", &one.1]);
    again(one, 2).await;
    let dead = [bury("dead-1").await, bury("dead-2").await];
    asked(&agent, &["retry", "--dead"]);
    for one in dead {
        again(one, 2).await;
    }
    // Its run: the same one goes on.
    let one = bury("redrive").await;
    over(&one.1, 1).await;
    let arn = machine.as_str().unwrap().replace(":stateMachine:", ":execution:");
    local.states("RedriveExecution", serde_json::json!({"executionArn": format!("{arn}:{}", one.1)})).await;
    again(one, 1).await;
    // What was delivered in one of these ways leaves the dead letters, and what is dead stays.
    let one = bury("queue").await;
    assert_eq!(messages(&local, DEAD_LETTERS).await, 5);
    assert_eq!(sweep().await.status, 200);
    assert_eq!(messages(&local, DEAD_LETTERS).await, 1);
    assert_eq!(count(&upstream, &one.0), 1);
    // The queue: moved back, it is delivered with the next sweep.
    let attributes = serde_json::json!({"QueueName": DEAD_LETTERS});
    let url = local.sqs("GetQueueUrl", attributes).await["QueueUrl"].clone();
    let attributes = serde_json::json!({"QueueUrl": url, "AttributeNames": ["QueueArn"]});
    let source = local.sqs("GetQueueAttributes", attributes).await["Attributes"]["QueueArn"].clone();
    // The edge has sent it there, so SQS does not know where from.
    let to = source.as_str().unwrap().replace(DEAD_LETTERS, REDELIVERIES);
    let task = serde_json::json!({"SourceArn": source, "DestinationArn": to});
    eventually("it may be moved", async || {
        local.sqs("StartMessageMoveTask", task.clone()).await;
        messages(&local, REDELIVERIES).await == 1
    })
    .await;
    assert_eq!(messages(&local, DEAD_LETTERS).await, 0);
    assert_eq!(sweep().await.status, 200);
    let id = one.1.clone();
    again(one, 2).await;
    // The same pointer once more, as after a move that was made twice: it is delivered, and stays that.
    let url =
        local.sqs("GetQueueUrl", serde_json::json!({"QueueName": REDELIVERIES})).await["QueueUrl"].clone();
    let pointer = serde_json::json!({"delivery": id, "tunnel": "hooks", "reason": "x"}).to_string();
    local.sqs("SendMessage", serde_json::json!({"QueueUrl": url, "MessageBody": pointer})).await;
    assert_eq!(sweep().await.status, 200);
    assert_eq!(messages(&local, REDELIVERIES).await, 0);
    assert_eq!(upstream.look(<[_]>::len), 10);
    drained(&agent);
    nothing_is_left(&local, &["b#", "o#", "p#"]).await;
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_delivered_again_has_its_turn_after_those_of_its_key_that_are_there() {
    let local = Local::start(&[]);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let (shared, opened) = (Arc::clone(&counts), Arc::clone(&gate));
    // What is called `/once` fails at first, and `/held` is answered once the gate lets one through.
    let upstream = Upstream::start(move |request, mut conn: Conn| {
        let (counts, gate) = (Arc::clone(&shared), Arc::clone(&opened));
        async move {
            let now = counts.0.fetch_add(1, Ordering::SeqCst) + 1;
            counts.1.fetch_max(now, Ordering::SeqCst);
            if request.target().starts_with("/held") {
                gate.acquire().await.unwrap().forget();
            }
            let is_well = attempt(&request) > 1 || !request.target().starts_with("/once");
            let status = if is_well { "204 No Content" } else { "500 Told" };
            counts.0.fetch_sub(1, Ordering::SeqCst);
            conn.answer(status, "", b"").await.then_some(conn)
        }
    })
    .await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ attempts = 1, order_by = \"tunnel\" }}\n",
        upstream.address()
    );
    let agent = local.agent_with(&tunnels, &["hooks"]);
    let bury = async |target: &str| {
        let id = accepted(&post(&local, "hooks", target, b"x").await);
        assert_eq!(ended(&agent, &id).await["state"], "dead");
        id
    };
    for number in 0..6 {
        bury(&format!("/once/{number}")).await;
    }
    assert_eq!(asked(&agent, &["retry", "--dead"]), serde_json::json!({"done": 6}));
    drained(&agent);
    let came = upstream.recorded();
    let again: Vec<_> = came.iter().filter(|one| attempt(one) == 2).map(Recorded::target).collect();
    assert_eq!(again, ["/once/0", "/once/1", "/once/2", "/once/3", "/once/4", "/once/5"]);

    // One that is under way keeps its turn, and the one that is delivered again waits for it.
    let behind = async |number: usize, target: &str, id: &str| {
        let held = format!("/held/{number}");
        eventually("it waits for its turn", async || {
            let turns = rows(&local, "o#hooks").await;
            turns.iter().any(|turn| turn["id"]["S"] == id && turn.get("token").is_some())
        })
        .await;
        assert_eq!((count(&upstream, &held), count(&upstream, target)), (1, 1));
        gate.add_permits(1);
        assert_eq!(ended(&agent, id).await["state"], "delivered");
        assert_eq!(count(&upstream, target), 2);
    };
    let hold = async |number: usize| {
        let held = format!("/held/{number}");
        accepted(&post(&local, "hooks", &held, b"x").await);
        eventually("it has come", async || count(&upstream, &held) == 1).await;
    };
    let one = bury("/once/by-hand").await;
    hold(1).await;
    asked(&agent, &["retry", &one]);
    behind(1, "/once/by-hand", &one).await;
    // The same with its own run.
    let two = bury("/once/redriven").await;
    let machine = local.variables("ingress").await["TUNNEL_DELIVERY_MACHINE_ARN"].clone();
    let run = format!("{}:{two}", machine.as_str().unwrap().replace(":stateMachine:", ":execution:"));
    let run = serde_json::json!({"executionArn": run});
    eventually("its run has failed", async || {
        local.states("DescribeExecution", run.clone()).await["status"] == "FAILED"
    })
    .await;
    hold(2).await;
    local.states("RedriveExecution", run).await;
    behind(2, "/once/redriven", &two).await;
    drained(&agent);
    assert_eq!(counts.1.load(Ordering::SeqCst), 1, "one at a time");
    nothing_is_left(&local, &["b#", "o#", "p#"]).await;
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_several_tunnels_have_kept_is_listed_newest_first_and_page_by_page() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let names = ["alpha", "beta", "gamma"];
    let tunnels: String = names
        .iter()
        .map(|name| {
            format!(
                "[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\ndelivery = \"auto\"\n",
                upstream.address()
            )
        })
        .collect();
    introduce(&local, &tunnels, &names);
    let mut ids = Vec::new();
    for number in 0..8 {
        ids.push(accepted(&post(&local, names[number % 2], &format!("/{number}"), b"x").await));
    }
    ids.reverse();
    let agent = local.agent_with(&tunnels, &names);
    drained(&agent);
    let listed =
        |rows: &[Value]| rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let all = list(&agent, &[]);
    assert_eq!(listed(&all), ids);
    // More than fit one answer, of a length that leaves one tunnel's page half listed.
    let kept = rows(&local, "t#alpha").await.remove(0);
    let begin = u64::from_str_radix(&ids[0][..12], 16).unwrap() - 1_000_000;
    let mut older: Vec<String> =
        (0..250).map(|at| format!("{:012x}{}", begin - at, "0".repeat(20))).collect();
    for (at, id) in older.iter().enumerate() {
        let mut row = kept.clone();
        row["pk"]["S"] = format!("t#{}", if at % 5 == 0 { "gamma" } else { "alpha" }).into();
        (row["sk"]["S"], row["run"]["S"]) = (id.as_str().into(), id.as_str().into());
        write_row(&local, row).await;
    }
    ids.append(&mut older);
    assert_eq!(listed(&list(&agent, &["--state", "delivered"])), ids);
    assert!(list(&agent, &["--state", "dead"]).is_empty());
}

// A command that is asked holds this thread; the service goes on in another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_stopped_by_hand_ends_its_delivery_and_holds_up_no_other() {
    let local = Local::start(&[]);
    let upstream = as_told().await;
    let tunnels = format!(
        "[[tunnel]]\nname = \"hooks\"\nupstream = \"{}\"\ndelivery = \"durable\"\n\
         durable = {{ order_by = \"header:x-key\" }}\n",
        upstream.address()
    );
    introduce(&local, &tunnels, &["hooks"]);
    let keyed = async |target: &str, key: &str| {
        let request = Request::to("hooks", "POST", target).field("x-key", key).body(b"x".to_vec());
        accepted(&request.send(local.public).await)
    };
    let machine = local.variables("ingress").await["TUNNEL_DELIVERY_MACHINE_ARN"].clone();
    let runs = machine.as_str().unwrap().replace(":stateMachine:", ":execution:");
    let stop = async |id: &str| {
        let run =
            serde_json::json!({"executionArn": format!("{runs}:{id}"), "error": "Tired", "cause": "by hand"});
        local.states("StopExecution", run).await;
    };

    // While it waits for an agent: it is parked no more, and the next of its key has its turn without anybody's asking.
    let (first, second, other) =
        (keyed("/first", "a").await, keyed("/second", "a").await, keyed("/other", "b").await);
    eventually("both have parked", async || rows(&local, "p#hooks").await.len() == 2).await;
    stop(&first).await;
    eventually("the next has parked in its place", async || {
        let parked = rows(&local, "p#hooks").await;
        let parked: BTreeSet<_> = parked.iter().map(|row| row["sk"]["S"].as_str().unwrap()).collect();
        parked == BTreeSet::from([second.as_str(), other.as_str()])
    })
    .await;
    let mut agent = local.agent_with(&tunnels, &["hooks"]);
    let stopped = async |id: &str| {
        let end = ended(&agent, id).await;
        assert_eq!(
            (&end["state"], &end["last"]["reason"]),
            (&"dead".into(), &"its run was stopped".into()),
            "{end}"
        );
    };
    stopped(&first).await;
    for id in [&second, &other] {
        assert_eq!(ended(&agent, id).await["state"], "delivered");
    }

    // While it is with the agent, and while it waits for its turn behind that.
    let hangs = keyed("/hang", "c").await;
    eventually("it has come", async || count(&upstream, "/hang") == 1).await;
    let (waits, next) = (keyed("/waits", "c").await, keyed("/next", "c").await);
    eventually("both wait for their turn", async || {
        let turns = rows(&local, "o#hooks").await;
        turns.iter().filter(|row| row.get("token").is_some()).count() == 2
    })
    .await;
    stop(&waits).await;
    stopped(&waits).await;
    assert_eq!(count(&upstream, "/next"), 0);
    stop(&hangs).await;
    assert_eq!(ended(&agent, &next).await["state"], "delivered");
    stopped(&hangs).await;
    assert_eq!(list(&agent, &["--state", "dead"]).len(), 3);
    drained(&agent);

    // Its run can be redriven as any other, and so can the delivery.
    local.states("RedriveExecution", serde_json::json!({"executionArn": format!("{runs}:{first}")})).await;
    asked(&agent, &["retry", &waits]);
    for (id, target) in [(&first, "/first"), (&waits, "/waits")] {
        // The first waits for an agent again, and the one that is there has said hello: a sweep tells it.
        eventually(target, async || {
            local.invoke("sweep", &serde_json::json!({})).await;
            count(&upstream, target) == 1
        })
        .await;
        assert_eq!(ended(&agent, id).await["state"], "delivered");
        assert_eq!(to(&upstream, target)[0].body, b"x");
    }
    nothing_is_left(&local, &["o#", "p#"]).await;

    // With the stack all of them are stopped: its state machine is not deleted before.
    leave(&mut agent);
    for number in 0..5 {
        keyed(&format!("/lost/{number}"), ["x", "y"][number % 2]).await;
    }
    let going = async || {
        let asked = serde_json::json!({"stateMachineArn": machine, "statusFilter": "RUNNING"});
        local.states("ListExecutions", asked).await["executions"].as_array().unwrap().len()
    };
    eventually("two have parked", async || rows(&local, "p#hooks").await.len() == 2).await;
    assert_eq!(going().await, 5);
    let formation =
        Upstream::start(
            |_, mut conn: Conn| async move { conn.answer("200 OK", "", b"").await.then_some(conn) },
        )
        .await;
    let event = serde_json::json!({
        "RequestType": "Delete", "ResponseURL": format!("http://{}/", formation.address()), "StackId": "stack",
        "RequestId": "request", "LogicalResourceId": "Mailboxes", "ResourceType": "Custom::Mailboxes",
    });
    assert_eq!(local.invoke("sweep", &event).await.status, 200);
    let told: Value = serde_json::from_slice(&formation.recorded()[0].body).unwrap();
    assert_eq!((&told["Status"], going().await), (&"SUCCESS".into(), 0), "{told}");
}
