//! Who may come in: every rule with a request that passes and one that does not, through the real processes.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use agentd::identity::{Algorithm as KeyKind, JWKS_FILE, KEY_FILE, Keys};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tests::{
    Agent, Local,
    client::{Answer, Connection, Request},
    operator::unix_now,
    signature::{hex, mac},
    sockets::Port,
    upstream::{Recorded, Upstream},
};
use tokio::net::TcpListener;

/// Files with secrets, as an operator keeps them.
struct Secrets(tempfile::TempDir);

impl Secrets {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes one; its path for TOML.
    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path.display().to_string()
    }

    /// A signing key, with its JWK set in a file.
    fn signer(&self) -> Signer {
        Signer::new(self.0.path())
    }
}

#[derive(Clone)]
struct Signer {
    key: EncodingKey,
    id: String,
    jwks: String,
}

impl Signer {
    fn new(dir: &Path) -> Self {
        let keys = Keys::generate(KeyKind::Es256).unwrap();
        keys.write(dir).unwrap();
        let pem = fs::read(dir.join(KEY_FILE)).unwrap();
        Self { key: EncodingKey::from_ec_pem(&pem).unwrap(), id: keys.id().to_owned(), jwks: keys.jwks() }
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::ES256) };
        encode(&header, claims, &self.key).unwrap()
    }
}

fn tunnel(name: &str, upstream: &Upstream, rules: &str) -> String {
    format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{}\"\n{rules}\n", upstream.address())
}

/// What a refusal looks like: status and code, a page for people and a document for programs.
async fn is_refused(local: &Local, request: &Request, status: u16, code: &str) -> Answer {
    let answer = request.send(local.public).await;
    let seen = (answer.status, answer.field("x-tunnel-error"));
    assert_eq!(seen, (status, Some(code.to_owned())), "{request:?}\n{}", answer.text());
    assert_eq!(answer.field("content-type").as_deref(), Some("application/problem+json"));
    let problem: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((&problem["code"], &problem["status"]), (&json!(code), &json!(status)));
    assert_eq!(answer.field("cache-control").as_deref(), Some("no-store"));
    answer
}

async fn passes(local: &Local, upstream: &Upstream, request: &Request) -> Recorded {
    let answer = request.send(local.public).await;
    assert_eq!(
        (answer.status, answer.field("x-tunnel-error")),
        (200, None),
        "{request:?}\n{}",
        answer.text()
    );
    upstream.recorded().last().unwrap().clone()
}

fn basic(name: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))
}

#[tokio::test]
async fn each_rule_lets_in_whom_it_names_and_nobody_else() {
    let secrets = Secrets::new();
    let upstream = Upstream::echo().await;
    let hash = bcrypt::hash("correct horse", 4).unwrap();
    let users = secrets.write("users", &format!("ann:{hash}\n"));
    let signer = secrets.signer();
    let jwks = secrets.path(JWKS_FILE).display().to_string();
    let github = secrets.write("github", "old\nnew\n");
    let stripe = secrets.write("stripe", "whsec_abc\n");
    let tunnels = [
        tunnel("open", &upstream, ""),
        tunnel("office", &upstream, "allow_ips = [\"10.0.0.0/8\"]\nip_except = [\"/healthz\"]"),
        tunnel("home", &upstream, "allow_ips = [\"127.0.0.0/8\", \"::1\"]"),
        tunnel("banned", &upstream, "deny_ips = [\"127.0.0.0/8\", \"::1\"]"),
        tunnel(
            "basic",
            &upstream,
            &format!("basic_auth = {{ file = \"{users}\", realm = \"team\", except = [\"/hooks/*\"] }}"),
        ),
        tunnel(
            "bearer",
            &upstream,
            &format!(
                "[tunnel.bearer]\njwks_file = \"{jwks}\"\nissuer = \"https://issuer.example\"\naudience = [\"me\", \"us\"]\n\
                 claims = {{ scope = \"read\" }}\nuser_claim = \"name\""
            ),
        ),
        tunnel(
            "either",
            &upstream,
            &format!("basic_auth = \"{users}\"\n[tunnel.bearer]\njwks_file = \"{jwks}\"\naudience = \"me\""),
        ),
        tunnel(
            "hooks",
            &upstream,
            &format!(
                "[[tunnel.verify]]\nscheme = \"github\"\nsecret_file = \"{github}\"\npaths = [\"/github\"]\n\
                 [[tunnel.verify]]\nscheme = \"stripe\"\nsecret_file = \"{stripe}\"\npaths = [\"/stripe/*\"]"
            ),
        ),
    ];
    let local = Local::start(&[]);
    let names = ["open", "office", "home", "banned", "basic", "bearer", "either", "hooks"];
    let agent = local.agent_with(&tunnels.concat(), &names);
    let get = |tunnel: &str, target: &str| Request::to(tunnel, "GET", target);

    // Nobody's word for who asks reaches the upstream but ours.
    let seen = passes(
        &local,
        &upstream,
        &get("open", "/")
            .field("x-tunnel-user", "root")
            .field("x_tunnel_user", "root")
            .field("authorization", "Basic eDp5"),
    )
    .await;
    assert_eq!((seen.all("x-tunnel-user"), seen.all("x_tunnel_user")), (vec![], vec![]));
    assert_eq!(seen.all("authorization"), ["Basic eDp5"]);

    // Addresses: what a client says of itself counts for nothing.
    passes(&local, &upstream, &get("home", "/")).await;
    let lying = |tunnel: &str| {
        get(tunnel, "/")
            .field("x-forwarded-for", "10.0.0.1")
            .field("forwarded", "for=10.0.0.1")
            .field("x-real-ip", "10.0.0.1")
    };
    is_refused(&local, &get("office", "/"), 403, "address_refused").await;
    is_refused(&local, &lying("office"), 403, "address_refused").await;
    is_refused(&local, &lying("banned"), 403, "address_refused").await;
    passes(&local, &upstream, &get("office", "/healthz")).await;
    for path in ["/healthz/", "/healthz/../x", "/x/../healthz", "/%2e%2e/healthz", "//healthz", "/Healthz"] {
        is_refused(&local, &get("office", path), 403, "address_refused").await;
    }

    // Passwords.
    let answer = is_refused(&local, &get("basic", "/"), 401, "password_required").await;
    assert_eq!(answer.field("www-authenticate").as_deref(), Some("Basic realm=\"team\", charset=\"UTF-8\""));
    let with = |name: &str, password: &str| get("basic", "/").field("authorization", &basic(name, password));
    for _ in 0..2 {
        let seen =
            passes(&local, &upstream, &with("ann", "correct horse").field("x-tunnel-user", "root")).await;
        assert_eq!((seen.all("x-tunnel-user"), seen.all("authorization")), (vec!["ann".to_owned()], vec![]));
    }
    is_refused(&local, &with("ann", "Correct horse"), 401, "password_required").await;
    is_refused(&local, &with("bob", "correct horse"), 401, "password_required").await;
    let excepted = get("basic", "/hooks/x").field("authorization", "Bearer for-the-app");
    assert_eq!(passes(&local, &upstream, &excepted).await.all("authorization"), ["Bearer for-the-app"]);
    is_refused(&local, &get("basic", "/hooks/..%2fadmin"), 401, "password_required").await;
    let page = get("basic", "/").field("accept", "text/html").send(local.public).await;
    assert_eq!((page.status, page.field("content-type").as_deref()), (401, Some("text/html; charset=utf-8")));
    let head = Request::to("basic", "HEAD", "/").send(local.public).await;
    assert_eq!((head.status, head.body.len()), (401, 0));
    let upload = Request::to("basic", "POST", "/").body(vec![7; 600 * 1024]);
    is_refused(&local, &upload, 401, "password_required").await;
    for n in 0..10 {
        // Three were wrong already.
        let answer = with("ann", &n.to_string()).send(local.public).await;
        let expected = if n < 8 { 401 } else { 429 };
        assert_eq!(answer.status, expected, "guess {n}");
    }
    let answer = is_refused(&local, &with("ann", "x"), 429, "too_many_guesses").await;
    assert!(answer.field("retry-after").unwrap().parse::<u32>().unwrap() <= 60);
    passes(&local, &upstream, &with("ann", "correct horse")).await;

    // Tokens.
    let claims = |change: Value| {
        let mut claims = json!({
            "iss": "https://issuer.example", "aud": "us", "sub": "1", "name": "Ann", "scope": "write read", "exp": unix_now() + 60
        });
        claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        signer.sign(&claims)
    };
    let bearer =
        |tunnel: &str, token: &str| get(tunnel, "/").field("authorization", &format!("Bearer {token}"));
    let seen = passes(&local, &upstream, &bearer("bearer", &claims(json!({})))).await;
    assert_eq!((seen.all("x-tunnel-user"), seen.all("authorization")), (vec!["Ann".to_owned()], vec![]));
    let answer = is_refused(&local, &get("bearer", "/"), 401, "token_required").await;
    assert_eq!(answer.field("www-authenticate").as_deref(), Some("Bearer realm=\"tunnel\""));
    for (change, why) in [
        (json!({ "exp": unix_now() - 120 }), "it has expired"),
        (json!({ "aud": "them" }), "it is for somebody else"),
        (json!({ "iss": "https://other.example" }), "it is from somebody else"),
        (json!({ "scope": "write" }), "a claim is missing or another"),
    ] {
        let answer = is_refused(&local, &bearer("bearer", &claims(change)), 401, "token_required").await;
        let challenge = answer.field("www-authenticate").unwrap();
        assert!(challenge.contains("error=\"invalid_token\"") && challenge.contains(why), "{challenge}");
    }
    let unsigned = format!(
        "{}.{}.",
        URL_SAFE_NO_PAD.encode("{\"alg\":\"none\"}"),
        URL_SAFE_NO_PAD.encode("{\"aud\":\"us\"}")
    );
    is_refused(&local, &bearer("bearer", &unsigned), 401, "token_required").await;

    // Either way is enough.
    passes(&local, &upstream, &bearer("either", &claims(json!({ "aud": "me" })))).await;
    passes(&local, &upstream, &get("either", "/").field("authorization", &basic("ann", "correct horse")))
        .await;
    let answer = is_refused(&local, &get("either", "/"), 401, "password_required").await;
    let challenges = answer.all("www-authenticate").join(", ");
    assert!(challenges.contains("Basic realm=") && challenges.contains("Bearer realm="), "{challenges}");

    // Webhooks, over the bytes as they came; a body in one message and one that is announced.
    for body in [&b"{\"a\":1}"[..], &[0xff; 700 * 1024]] {
        let signed = |path: &str, secret: &str, body: &[u8]| {
            let signature = format!("sha256={}", hex(&mac(secret.as_bytes(), &[body])));
            Request::to("hooks", "POST", path).field("x-hub-signature-256", &signature)
        };
        for secret in ["old", "new"] {
            let seen = passes(&local, &upstream, &signed("/github", secret, body).body(body.to_vec())).await;
            assert!(seen.body == body);
        }
        let mut changed = body.to_vec();
        changed[3] ^= 1;
        let before = upstream.recorded().len();
        is_refused(&local, &signed("/github", "new", body).body(changed), 401, "webhook_refused").await;
        let other = signed("/GitHub/", "other", body).body(body.to_vec());
        is_refused(&local, &other, 401, "webhook_refused").await;
        is_refused(
            &local,
            &Request::to("hooks", "POST", "/github").body(body.to_vec()),
            401,
            "webhook_refused",
        )
        .await;
        assert_eq!(upstream.recorded().len(), before, "the upstream was not called");
    }
    let stripe = |t: u64| {
        let signature = hex(&mac(b"whsec_abc", &[format!("{t}.").as_bytes(), b"{}"]));
        Request::to("hooks", "POST", "/stripe/x")
            .field("stripe-signature", &format!("t={t},v1={signature}"))
            .body(b"{}".to_vec())
    };
    let now = unix_now();
    passes(&local, &upstream, &stripe(now)).await;
    is_refused(&local, &stripe(now), 401, "webhook_refused").await;
    passes(&local, &upstream, &stripe(now - 1)).await;
    is_refused(&local, &stripe(now - 400), 401, "webhook_refused").await;
    for (bytes, expected) in [(1024 * 1024, 401), (1024 * 1024 + 1, 413)] {
        let answer = Request::to("hooks", "POST", "/github").body(vec![1; bytes]).send(local.public).await;
        assert_eq!(answer.status, expected, "{bytes}");
    }
    let large = Request::to("hooks", "POST", "/github").body(vec![1; 1024 * 1024 + 1]);
    is_refused(&local, &large, 413, "webhook_too_large").await;
    passes(&local, &upstream, &Request::to("hooks", "POST", "/elsewhere").body(vec![1; 1024 * 1024 + 1]))
        .await;
    denials(
        &agent,
        &[
            ("office", "allow_ips"),
            ("banned", "deny_ips"),
            ("basic", "basic_auth"),
            ("bearer", "bearer"),
            ("either", "basic_auth"),
            ("hooks", "verify"),
        ],
    )
    .await;
    let said = agent.process().printed();
    for secret in ["correct horse", "Correct horse", &hash, "whsec_abc", "of-the-app", "for-the-app"] {
        assert!(!said.contains(secret), "{secret} is in the log");
    }
}

/// The rules that the access lines of an agent name in `denied_by`, and those that its metrics count, by tunnel. Both have them all
/// once the agent has said so of each request.
async fn denials(agent: &Agent, wanted: &[(&str, &str)]) {
    use std::io::{Read as _, Write as _};
    let wanted: BTreeSet<(String, String)> =
        wanted.iter().map(|&(tunnel, rule)| (tunnel.to_owned(), rule.to_owned())).collect();
    let printed = || {
        let lines = agent.process().printed();
        let lines: Vec<Value> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let named = lines.iter().filter_map(|line| {
            Some((line["tunnel_id"].as_str()?.to_owned(), line["denied_by"].as_str()?.to_owned()))
        });
        named.collect::<BTreeSet<_>>()
    };
    tests::eventually("each refusal has its line", async || printed().is_superset(&wanted)).await;
    assert_eq!(printed(), wanted);
    let mut socket = std::os::unix::net::UnixStream::connect(agent.dir().join("control.sock")).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut metrics = String::new();
    socket.read_to_string(&mut metrics).unwrap();
    let counted: BTreeSet<_> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("agentd_requests_denied_total{tunnel=\"")?.split_once("\"} "))
        .map(|(labels, count)| {
            assert!(count.parse::<u64>().unwrap() > 0, "{count}");
            let (tunnel, rule) = labels.split_once("\",denied_by=\"").unwrap();
            (tunnel.to_owned(), rule.to_owned())
        })
        .collect();
    assert_eq!(counted, wanted, "{metrics}");
}

/// A provider in a few lines: whoever comes is signed in at once, as `user` says.
#[derive(Clone)]
struct Provider {
    signer: Signer,
    user: Arc<Mutex<Value>>,
    /// What a code was given for.
    codes: Arc<Mutex<HashMap<String, HashMap<String, String>>>>,
    /// Claims that only the userinfo endpoint says.
    more: Arc<Mutex<Value>>,
}

fn pairs(text: &str) -> HashMap<String, String> {
    form_urlencoded::parse(text.as_bytes()).into_owned().collect()
}

impl Provider {
    fn new(signer: Signer) -> Self {
        Self {
            signer,
            user: Arc::default(),
            codes: Arc::default(),
            more: Arc::new(Mutex::new(json!({ "sub": "7" }))),
        }
    }

    async fn start(&self) -> Upstream {
        let this = self.clone();
        Upstream::start(move |request, mut conn| {
            let (status, fields, body) = this.answer(&request);
            async move { conn.answer(&status, &fields, body.as_bytes()).await.then_some(conn) }
        })
        .await
    }

    fn answer(&self, request: &Recorded) -> (String, String, String) {
        let issuer = format!("http://{}", request.all("host")[0]);
        let ok = |body: Value| ("200 OK".to_owned(), String::new(), body.to_string());
        let refused =
            |why: &str| ("400 Bad Request".to_owned(), String::new(), json!({ "error": why }).to_string());
        let (path, query) = request.target().split_once('?').unwrap_or((request.target(), ""));
        match path {
            "/.well-known/openid-configuration" => ok(json!({
                "issuer": issuer,
                "authorization_endpoint": format!("{issuer}/authorize"),
                "token_endpoint": format!("{issuer}/token"),
                "userinfo_endpoint": format!("{issuer}/userinfo"),
                "jwks_uri": format!("{issuer}/keys"),
                "authorization_response_iss_parameter_supported": true,
            })),
            "/keys" => ("200 OK".to_owned(), String::new(), self.signer.jwks.clone()),
            "/authorize" => {
                let asked = pairs(query);
                let code = URL_SAFE_NO_PAD.encode(getrandom::u64().unwrap().to_be_bytes());
                let back = form_urlencoded::Serializer::new(String::new())
                    .append_pair("code", &code)
                    .append_pair("state", &asked["state"])
                    .append_pair("iss", &issuer)
                    .finish();
                assert_eq!((&*asked["response_type"], &*asked["code_challenge_method"]), ("code", "S256"));
                self.codes.lock().unwrap().insert(code, asked.clone());
                (
                    "302 Found".to_owned(),
                    format!("Location: {}?{back}\r\n", asked["redirect_uri"]),
                    String::new(),
                )
            }
            "/token" => {
                let form = pairs(std::str::from_utf8(&request.body).unwrap());
                let Some(asked) = self.codes.lock().unwrap().remove(&form["code"]) else {
                    return refused("invalid_grant");
                };
                let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(&form["code_verifier"]));
                let is_client = request.all("authorization") == [basic("web%2Ftunnel", "top+secret")];
                if challenge != asked["code_challenge"]
                    || form["redirect_uri"] != asked["redirect_uri"]
                    || !is_client
                {
                    return refused("invalid_client");
                }
                let mut claims = json!({
                    "iss": issuer, "aud": "web/tunnel", "exp": unix_now() + 60, "nonce": asked["nonce"], "sub": "7"
                });
                claims
                    .as_object_mut()
                    .unwrap()
                    .extend(self.user.lock().unwrap().as_object().cloned().unwrap_or_default());
                ok(
                    json!({ "id_token": self.signer.sign(&claims), "access_token": "access", "token_type": "Bearer" }),
                )
            }
            "/userinfo" if request.all("authorization") == ["Bearer access"] => {
                ok(self.more.lock().unwrap().clone())
            }
            _ => ("404 Not Found".to_owned(), String::new(), String::new()),
        }
    }
}

/// A browser: pages and cookies, each host with its own.
#[derive(Default, Clone)]
struct Browser {
    cookies: HashMap<String, HashMap<String, String>>,
}

impl Browser {
    fn request(&self, host: &str, method: &str, target: &str) -> Request {
        let cookies = self.cookies.get(host).into_iter().flatten();
        let cookies: Vec<_> = cookies.map(|(name, value)| format!("{name}={value}")).collect();
        let request = Request::new(method, target).field("Host", host);
        if cookies.is_empty() { request } else { request.field("Cookie", &cookies.join("; ")) }
    }

    async fn send(&mut self, local: &Local, host: &str, target: &str) -> Answer {
        let request = self
            .request(host, "GET", target)
            .field("Accept", "text/html")
            .field("Sec-Fetch-Mode", "navigate");
        let answer = request.send(local.public).await;
        for cookie in answer.all("set-cookie") {
            assert!(cookie.starts_with("__Host-agentd-") && cookie.contains("; Path=/;"), "{cookie}");
            assert!(
                ["Secure", "HttpOnly", "SameSite=Lax"].iter().all(|part| cookie.contains(part)),
                "{cookie}"
            );
            let (name, value) = cookie.split(';').next().unwrap().split_once('=').unwrap();
            let jar = self.cookies.entry(host.to_owned()).or_default();
            if cookie.contains("Max-Age=0") {
                jar.remove(name);
            } else {
                jar.insert(name.to_owned(), value.to_owned());
            }
        }
        answer
    }

    /// Goes to a page and wherever that leads, at most so far. The last answer, and the addresses on the way.
    async fn open(&mut self, local: &Local, host: &str, target: &str) -> (Answer, Vec<String>) {
        let (mut host, mut target) = (host.to_owned(), target.to_owned());
        let mut way = Vec::new();
        for _ in 0..8 {
            let answer = if host.ends_with(".localhost") {
                self.send(local, &host, &target).await
            } else {
                Request::new("GET", &target).field("Host", &host).send(host.parse().unwrap()).await
            };
            let Some(location) = answer.field("location") else { return (answer, way) };
            way.push(location.clone());
            let rest = location.strip_prefix("http://").unwrap();
            let at = rest.find('/').unwrap();
            (host, target) = (rest[..at].to_owned(), rest[at..].to_owned());
        }
        panic!("it leads nowhere: {way:?}")
    }
}

fn oidc(issuer: &Upstream, secrets: &Secrets, more: &str) -> String {
    let secret = secrets.write("client", "top secret\n");
    format!(
        "[tunnel.oidc]\nissuer = \"http://{}\"\nclient_id = \"web/tunnel\"\nclient_secret_file = \"{secret}\"\n{more}",
        issuer.address()
    )
}

#[tokio::test]
async fn signing_in_leads_to_the_provider_and_back_with_a_session_of_this_tunnel() {
    let secrets = Secrets::new();
    let provider = Provider::new(secrets.signer());
    let (issuer, upstream) = (provider.start().await, Upstream::echo().await);
    let rules = |more: &str| oidc(&issuer, &secrets, more);
    let by_domain = "allow_domains = [\"example.com\"]\nallow_groups = [\"ops\"]\n";
    let tunnels = [
        tunnel("web", &upstream, &rules(&format!("{by_domain}except = [\"/open/*\"]"))),
        tunnel("other", &upstream, &rules(by_domain)),
        tunnel("short", &upstream, &rules("allow_anyone = true\nsession = \"5s\"")),
        tunnel("sent", &upstream, &rules("allow_anyone = true\ncallback_tunnel = \"auth\"")),
        tunnel("auth", &upstream, ""),
    ];
    let local = Local::start(&[]);
    let agent: Agent = local.agent_with(&tunnels.concat(), &["web", "other", "short", "sent", "auth"]);
    let sign_in_as = |user: Value| *provider.user.lock().unwrap() = user;
    let ann = json!({ "email": "Ann@Example.com", "email_verified": true });

    // Programs are told; nothing reaches the upstream.
    let mut browser = Browser::default();
    is_refused(&local, &browser.request("web.localhost", "GET", "/a"), 401, "sign_in_required").await;
    let form = browser.request("web.localhost", "POST", "/a").field("Accept", "*/*").body(b"x".to_vec());
    is_refused(&local, &form, 401, "sign_in_required").await;
    passes(&local, &upstream, &browser.request("web.localhost", "GET", "/open/x")).await;
    let before = upstream.recorded().len();

    // A page goes to the provider and comes back where it was.
    sign_in_as(ann.clone());
    let (answer, way) = browser.open(&local, "web.localhost", "/a/b?c=d&e").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(way[0].starts_with(&format!("http://{}/authorize?", issuer.address())), "{way:?}");
    assert!(way[1].starts_with("http://web.localhost/.agentd/oidc/callback?code="), "{way:?}");
    assert_eq!(way[2..], ["http://web.localhost/a/b?c=d&e"]);
    let seen = upstream.recorded().last().unwrap().clone();
    assert_eq!((upstream.recorded().len(), seen.target()), (before + 1, "/a/b?c=d&e"));
    assert_eq!((seen.all("x-tunnel-user"), seen.all("cookie")), (vec!["Ann@Example.com".to_owned()], vec![]));
    let program = browser
        .request("web.localhost", "POST", "/api")
        .field("Authorization", "Bearer of-the-app")
        .body(b"x".to_vec());
    assert_eq!(passes(&local, &upstream, &program).await.all("authorization"), ["Bearer of-the-app"]);

    // What came back from the provider is good once, and in this browser.
    let callback = way[1].strip_prefix("http://web.localhost").unwrap();
    for mut who in [browser.clone(), Browser::default()] {
        let again = who.send(&local, "web.localhost", callback).await;
        assert_eq!((again.status, again.field("x-tunnel-error").as_deref()), (400, Some("sign_in_failed")));
        assert_eq!(again.all("set-cookie"), Vec::<String>::new());
    }
    for changed in [
        callback.replace("state=", "state=A"),
        callback.replace("code=", "code=1&code="),
        "/.agentd/oidc/callback".into(),
    ] {
        assert_eq!(browser.send(&local, "web.localhost", &changed).await.status, 400, "{changed}");
    }
    assert_eq!(browser.clone().send(&local, "other.localhost", callback).await.status, 400);

    // No other tunnel takes the session, under whatever name it is shown.
    let session = browser.cookies["web.localhost"]["__Host-agentd-session-web"].clone();
    for name in ["__Host-agentd-session-web", "__Host-agentd-session-other"] {
        let stolen = Request::to("other", "GET", "/").field("Cookie", &format!("{name}={session}"));
        is_refused(&local, &stolen, 401, "sign_in_required").await;
    }
    // The provider knows the visitor still, and the other tunnel asks it anew.
    let (answer, way) = browser.open(&local, "other.localhost", "/").await;
    assert_eq!((answer.status, way.len()), (200, 3));

    // An end: of its own, and by signing out, which a kept cookie does not undo.
    let (answer, way) = browser.open(&local, "short.localhost", "/").await;
    assert_eq!((answer.status, way.len()), (200, 3));
    let expiring = browser.request("short.localhost", "GET", "/");
    tests::eventually("the session is over", async || expiring.send(local.public).await.status == 401).await;
    let kept = browser.request("web.localhost", "GET", "/");
    passes(&local, &upstream, &kept).await;
    // A link of another origin's page leads to a button.
    let led = browser.request("web.localhost", "GET", "/.agentd/oidc/sign-out");
    let answer = led.field("Sec-Fetch-Site", "same-site").send(local.public).await;
    assert!(answer.status == 200 && answer.text().contains("<form method=\"post\">"), "{}", answer.text());
    assert_eq!(answer.field("content-security-policy").as_deref(), Some("frame-ancestors 'none'"));
    passes(&local, &upstream, &kept).await;
    let answer = browser.send(&local, "web.localhost", "/.agentd/oidc/sign-out").await;
    assert!(answer.status == 200 && answer.text().contains("You are signed out."), "{}", answer.text());
    assert!(!browser.cookies["web.localhost"].contains_key("__Host-agentd-session-web"));
    is_refused(&local, &kept, 401, "sign_in_required").await;

    // Who is not named stays out; what the token does not say is asked for.
    for (user, more, status) in [
        (json!({ "email": "ann@example.com" }), json!({ "sub": "7" }), 403),
        (json!({ "email": "ann@example.com", "email_verified": "true" }), json!({ "sub": "7" }), 200),
        (json!({ "email": "ann@example.com.evil.test", "email_verified": true }), json!({ "sub": "7" }), 403),
        (
            json!({ "email": "eve@evil.test", "email_verified": true, "groups": ["dev"] }),
            json!({ "sub": "7" }),
            403,
        ),
        (
            json!({ "email": "eve@evil.test", "email_verified": true, "groups": ["dev", "ops"] }),
            json!({ "sub": "7" }),
            200,
        ),
        (json!({}), json!({ "sub": "7", "email": "ann@example.com", "email_verified": true }), 200),
        // The token names the email, and only the endpoint says whose word it is worth.
        (
            json!({ "email": "ann@example.com" }),
            json!({ "sub": "7", "email": "ann@example.com", "email_verified": "true" }),
            200,
        ),
        (
            json!({ "email": "ann@example.com" }),
            json!({ "sub": "7", "email": "eve@evil.test", "email_verified": true }),
            403,
        ),
        (
            json!({ "email": "ann@example.com" }),
            json!({ "sub": "8", "email": "ann@example.com", "email_verified": true }),
            400,
        ),
        (
            json!({ "email": "ann@example.com", "email_verified": false }),
            json!({ "sub": "7", "email": "ann@example.com", "email_verified": true }),
            403,
        ),
        (json!({}), json!({ "sub": "8", "email": "ann@example.com", "email_verified": true }), 400),
        (json!({ "nonce": "another" }), json!({ "sub": "7" }), 400),
        (
            json!({ "aud": ["web/tunnel", "x"], "email": "ann@example.com", "email_verified": true }),
            json!({ "sub": "7" }),
            400,
        ),
        (
            json!({ "aud": ["web/tunnel", "x"], "azp": "web/tunnel", "email": "ann@example.com", "email_verified": true }),
            json!({ "sub": "7" }),
            200,
        ),
        (json!({ "iss": "http://127.0.0.1:1" }), json!({ "sub": "7" }), 400),
        (json!({ "exp": 1 }), json!({ "sub": "7" }), 400),
    ] {
        sign_in_as(user.clone());
        *provider.more.lock().unwrap() = more;
        let (answer, _) = Browser::default().open(&local, "web.localhost", "/").await;
        assert_eq!(answer.status, status, "{user}: {}", answer.text());
    }

    // One address for all: the tunnel that has it sends visitors on.
    sign_in_as(ann);
    let (answer, way) = Browser::default().open(&local, "sent.localhost", "/x").await;
    assert_eq!(answer.status, 200, "{way:?} {}", answer.text());
    assert!(way[1].starts_with("http://auth.localhost/.agentd/oidc/callback?"), "{way:?}");
    assert!(way[2].starts_with("http://sent.localhost/.agentd/oidc/callback?"), "{way:?}");
    let lost =
        Request::to("auth", "GET", "/.agentd/oidc/callback?code=1&state=2").field("Accept", "text/html");
    assert_eq!(lost.send(local.public).await.status, 400);
    // In path mode tunnels share their cookies' host.
    let by_path = Request::new("GET", "/web/").field("Host", "127.0.0.1").field("Accept", "text/html");
    let answer = by_path.send(local.public).await;
    assert_eq!(
        (answer.status, answer.field("x-tunnel-error").as_deref()),
        (503, Some("sign_in_unavailable"))
    );
    denials(&agent, &[("web", "oidc"), ("other", "oidc"), ("short", "oidc"), ("auth", "oidc")]).await;
}

#[tokio::test]
async fn a_session_made_under_other_rules_leads_to_signing_in_anew() {
    let secrets = Secrets::new();
    let provider = Provider::new(secrets.signer());
    let (issuer, upstream) = (provider.start().await, Upstream::echo().await);
    let rules = |allow: &str| tunnel("web", &upstream, &oidc(&issuer, &secrets, allow));
    let local = Local::start(&[]);
    let agent = local.agent_with(&rules("allow_groups = [\"ops\"]"), &["web"]);
    let reload = |allow: &str| {
        agent.write_tunnels(&local, &rules(allow));
        assert_eq!(agent.ask(&["reload"]).0, Some(0));
    };
    *provider.user.lock().unwrap() =
        json!({ "email": "ann@example.com", "email_verified": false, "groups": ["ops", "dev"] });
    let mut browser = Browser::default();
    let (answer, way) = browser.open(&local, "web.localhost", "/").await;
    assert_eq!((answer.status, way.len()), (200, 3));

    // The session knows nothing of the group that is asked for now; the provider does.
    reload("allow_groups = [\"dev\"]");
    is_refused(&local, &browser.request("web.localhost", "GET", "/x"), 401, "sign_in_required").await;
    let (answer, way) = browser.open(&local, "web.localhost", "/x").await;
    assert_eq!((answer.status, way.len()), (200, 3), "{way:?}");
    let (answer, way) = browser.open(&local, "web.localhost", "/x").await;
    assert_eq!((answer.status, way.len()), (200, 0), "it has a session of these rules");

    // Whoever is not let in after that is told so, and not led round.
    reload("allow_groups = [\"admin\"]");
    let (answer, way) = browser.open(&local, "web.localhost", "/x").await;
    assert_eq!((answer.status, answer.field("x-tunnel-error").as_deref()), (403, Some("visitor_refused")));
    assert_eq!((way.len(), answer.all("set-cookie").len()), (2, 0), "{way:?}");

    // What was not verified when nobody asked for it does not count where somebody does.
    reload("allow_domains = [\"example.com\"]\nrequire_verified_email = false");
    assert_eq!(browser.open(&local, "web.localhost", "/x").await.0.status, 200);
    passes(&local, &upstream, &browser.request("web.localhost", "GET", "/x")).await;
    reload("allow_domains = [\"example.com\"]");
    is_refused(&local, &browser.request("web.localhost", "GET", "/x"), 401, "sign_in_required").await;
    assert_eq!(browser.open(&local, "web.localhost", "/x").await.0.status, 403);
}

#[tokio::test]
async fn pages_of_other_tunnels_do_not_act_with_a_visitors_session() {
    let secrets = Secrets::new();
    let provider = Provider::new(secrets.signer());
    let (issuer, upstream) = (provider.start().await, Upstream::echo().await);
    let anybody = oidc(&issuer, &secrets, "allow_anyone = true");
    let tunnels = [
        tunnel("web", &upstream, &anybody),
        tunnel("named", &upstream, &format!("cors = {{ origins = [\"http://*.localhost\"] }}\n{anybody}")),
    ];
    let local = Local::start(&[]);
    let agent = local.agent_with(&tunnels.concat(), &["web", "named"]);
    let mut browser = Browser::default();
    for host in ["web.localhost", "named.localhost"] {
        assert_eq!(browser.open(&local, host, "/").await.0.status, 200);
    }
    let with = |host: &str, method: &str, fields: &[(&str, &str)]| {
        let request =
            browser.request(host, method, "/act").body(if method == "GET" { vec![] } else { vec![1] });
        fields.iter().fold(request, |request, (name, value)| request.field(name, value))
    };
    let other = ("Origin", "http://other.localhost");
    for method in ["POST", "DELETE"] {
        for fields in [&[other][..], &[("Origin", "null")], &[("Sec-Fetch-Site", "same-site")]] {
            let request = with("web.localhost", method, fields);
            is_refused(&local, &request, 403, "origin_refused").await;
        }
        for fields in [
            &[][..],
            &[("Origin", "http://web.localhost")],
            &[("Sec-Fetch-Site", "same-origin"), ("Origin", "null")],
        ] {
            passes(&local, &upstream, &with("web.localhost", method, fields)).await;
        }
        passes(&local, &upstream, &with("named.localhost", method, &[other])).await;
        let evil = with("named.localhost", method, &[("Origin", "http://evil.test")]);
        is_refused(&local, &evil, 403, "origin_refused").await;
    }
    // A link from anywhere leads where it says.
    for fields in [&[other][..], &[("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")]] {
        passes(&local, &upstream, &with("web.localhost", "GET", fields)).await;
    }
    denials(&agent, &[("web", "oidc"), ("named", "oidc")]).await;
}

/// One that says who it is and what it was asked for, with a status that the target may name (`/status/503`).
async fn naming(name: &'static str) -> Upstream {
    Upstream::start(move |request, mut conn| async move {
        let status = request.target().rsplit_once("/status/").map_or("200", |(_, status)| status).to_owned();
        let fields = format!(
            "x-name: {name}\r\nx-old: 1\r\nLocation: /next\r\nSet-Cookie: a=1; Path=/\r\n\
             Access-Control-Allow-Origin: https://own.example\r\n"
        );
        conn.answer(&format!("{status} X"), &fields, name.as_bytes()).await.then_some(conn)
    })
    .await
}

#[tokio::test]
async fn requests_go_where_their_rules_say_and_are_changed_on_the_way() {
    let secrets = Secrets::new();
    let (own, one, two) = (naming("own").await, naming("one").await, naming("two").await);
    let site = secrets.path("site");
    fs::create_dir_all(site.join("sub")).unwrap();
    fs::write(site.join("index.html"), "<p>home").unwrap();
    let large: Vec<u8> = (0..700_000_u32).map(|n| (n % 251) as u8).collect();
    fs::write(site.join("sub/large.bin"), &large).unwrap();
    fs::write(site.join(".env"), "secret").unwrap();
    fs::write(secrets.path("outside"), "secret").unwrap();
    std::os::unix::fs::symlink("../outside", site.join("link")).unwrap();
    let page = secrets.write("sorry.html", "<p>Sorry, back soon");
    let closed = Port::take();
    let site = site.display();
    let (a, b) = (one.address(), two.address());
    let tunnels = [
        tunnel(
            "routes",
            &own,
            &format!(
                "max_body = 1000\n\
                 request_headers = {{ remove = [\"x-debug\"], set = {{ x-client = \"${{client_ip}}\", x-from = \"${{tunnel}}\" }}, add = {{ x-tag = \"t\" }} }}\n\
                 response_headers = {{ remove = [\"x-old\"], set = {{ x-new = \"${{request_id}}\" }} }}\n\
                 cors = {{ origins = [\"https://app.example\"], methods = [\"PUT\"] }}\n\
                 [[tunnel.route]]\npath = \"/api\"\nupstream = \"{a}\"\nstrip_prefix = true\nadd_prefix = \"/v1\"\n\
                 [[tunnel.route]]\npath = \"/both\"\nupstream = [\"{a}\", \"{b}\"]\n\
                 [[tunnel.route]]\npath = \"/well\"\nupstream = [\"{closed}\", \"{b}\"]\n\
                 health_check = {{ path = \"/\", interval = \"100ms\", max_failed = 1 }}\n\
                 [[tunnel.route]]\npath = \"/site\"\nfiles = \"{site}\"\nstrip_prefix = true\n\
                 [[tunnel.route]]\npath = \"/hello\"\nrespond = {{ status = 203, body = \"hello\" }}\n\
                 [[tunnel.route]]\npath = \"/old\"\nredirect = \"https://new.example${{target}}\"\n\
                 [[tunnel.route]]\npath = \"/upload\"\nmethods = [\"POST\"]\nupstream = \"{b}\"\nmax_body = \"1MiB\""
            ),
        ),
        tunnel("plain", &own, "forwarded = \"none\""),
        tunnel("rfc", &own, "forwarded = \"rfc7239\""),
        tunnel("few", &own, "rate_limit = { requests = 2, per = \"1h\" }"),
        tunnel("fuse", &own, "circuit_breaker = { open_after = 2, retry_after = \"1h\" }"),
        tunnel("works", &own, "maintenance = true"),
        format!("[[tunnel]]\nname = \"down\"\nupstream = \"{closed}\"\nerror_page = \"{page}\"\n"),
        format!(
            "[[tunnel]]\nname = \"pages\"\n[[tunnel.route]]\npath = \"/site\"\nfiles = \"{site}\"\nstrip_prefix = true\n"
        ),
    ];
    let local = Local::start(&[]);
    let names = ["routes", "plain", "rfc", "few", "fuse", "works", "down", "pages"];
    let agent = local.agent_with(&tunnels.concat(), &names);
    let get = |tunnel: &str, target: &str| Request::to(tunnel, "GET", target);
    let sent = async |request: &Request| request.send(local.public).await;

    // Fields, and a path that is another one for the upstream.
    let asked =
        get("routes", "/api/x?y").field("x-debug", "1").field("x-client", "forged").field("x-tag", "s");
    let answer = sent(&asked).await;
    let seen = one.recorded().last().unwrap().clone();
    assert_eq!((answer.text(), seen.target()), ("one".to_owned(), "/v1/x?y"));
    assert_eq!((seen.all("x-debug"), seen.all("x-from")), (vec![], vec!["routes".to_owned()]));
    assert_eq!(
        (seen.all("x-client"), seen.all("x-tag")),
        (vec!["127.0.0.1".to_owned()], vec!["s".into(), "t".into()])
    );
    assert_eq!(seen.all("x-forwarded-prefix"), ["/api"]);
    assert_eq!((answer.field("x-old"), answer.field("x-new")), (None, answer.field("x-tunnel-request-id")));
    // The upstream's root is not below what was added, so its own address of it stays; its cookie covers the route.
    assert_eq!(answer.field("set-cookie").as_deref(), Some("a=1; Path=/api"));
    assert_eq!(answer.field("access-control-allow-origin"), None, "who may read it is said here");

    // Load, and who is not well.
    let mut turns = Vec::new();
    for _ in 0..4 {
        turns.push(sent(&get("routes", "/both")).await.text());
    }
    turns.sort();
    assert_eq!(turns, ["one", "one", "two", "two"]);
    tests::eventually("the dead one is left out", async || {
        let mut well = 0;
        for _ in 0..4 {
            well += u32::from(sent(&get("routes", "/well")).await.text() == "two");
        }
        well == 4
    })
    .await;

    // The rest, and what no route reads in two ways.
    assert_eq!(sent(&get("routes", "/apix")).await.text(), "own");
    is_refused(&local, &get("routes", "/api/%2e%2e/x"), 400, "bad_request").await;
    let hello = sent(&get("routes", "/hello/you")).await;
    assert_eq!((hello.status, hello.text(), hello.field("x-tunnel-error")), (203, "hello".to_owned(), None));
    let moved = sent(&get("routes", "/old/x?y")).await;
    assert_eq!(
        (moved.status, moved.field("location").as_deref()),
        (302, Some("https://new.example/old/x?y"))
    );

    // Files.
    let home = sent(&get("routes", "/site/")).await;
    assert_eq!((home.status, home.text()), (200, "<p>home".to_owned()));
    assert_eq!(home.field("content-type").as_deref(), Some("text/html; charset=utf-8"));
    let whole = sent(&get("routes", "/site/sub/large.bin")).await;
    assert!((whole.status, whole.complete) == (200, true) && whole.body == large);
    let etag = whole.field("etag").unwrap();
    let range = get("routes", "/site/sub/large.bin").field("range", "bytes=100-600099");
    let part = sent(&range.field("if-range", &etag)).await;
    assert_eq!(part.field("content-range").as_deref(), Some("bytes 100-600099/700000"));
    assert!(part.status == 206 && part.body == large[100..600_100]);
    let same = sent(&get("routes", "/site/sub/large.bin").field("if-none-match", &etag)).await;
    assert_eq!((same.status, same.body.len()), (304, 0));
    let head = Request::to("routes", "HEAD", "/site/sub/large.bin").send(local.public).await;
    assert_eq!((head.field("content-length").as_deref(), head.body.len()), (Some("700000"), 0));
    for path in
        ["/site/.env", "/site/link", "/site/%2eenv", "/site//etc/passwd", "/site/nothing", "/site/sub/"]
    {
        is_refused(&local, &get("routes", path), 404, "no_such_file").await;
    }
    is_refused(&local, &Request::to("routes", "PUT", "/site/x").body(b"x".to_vec()), 405, "method_refused")
        .await;

    // Bodies: of one message, and announced ones.
    let post = |target: &str, bytes: usize| Request::to("routes", "POST", target).body(vec![1; bytes]);
    assert_eq!(sent(&post("/x", 1000)).await.status, 200);
    is_refused(&local, &post("/x", 1001), 413, "body_too_large").await;
    is_refused(&local, &post("/x", 900_000), 413, "body_too_large").await;
    assert_eq!(sent(&post("/upload", 1024 * 1024)).await.text(), "two");
    is_refused(&local, &post("/upload", 1024 * 1024 + 1), 413, "body_too_large").await;

    // Nothing but files: the rest is nowhere.
    assert_eq!(sent(&get("pages", "/site/")).await.text(), "<p>home");
    is_refused(&local, &get("pages", "/"), 404, "no_route").await;

    // How the upstreams of routes are.
    let (code, status) = agent.ask(&["status", "--json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    let of = |name: &str| {
        let all = status["tunnels"].as_array().unwrap();
        all.iter().find(|tunnel| tunnel["name"] == name).unwrap().clone()
    };
    assert_eq!(
        (code, &of("pages")["upstream"], &of("plain")["routes"]),
        (Some(0), &Value::Null, &Value::Null)
    );
    let routes = of("routes")["routes"].clone();
    let well: Vec<_> = routes.as_array().unwrap().iter().filter(|route| route["route"] == "/well").collect();
    let states: Vec<_> = well.iter().map(|route| route["health"]["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["down", "up"], "{routes}");
    assert_eq!(well[0]["upstream"], format!("http://{closed}"));
    let (_, info) = agent.ask(&["tunnel", "info", "routes"]);
    assert!(info.contains(&format!("/well  http://{closed}  down: ")), "{info}");
    assert!(info.contains(&format!("POST /upload  http://{b}  not checked")), "{info}");

    // Other origins.
    let before = own.recorded().len();
    let preflight = |origin: &str| {
        let request = Request::to("routes", "OPTIONS", "/x").field("origin", origin);
        request.field("access-control-request-method", "PUT")
    };
    let answer = sent(&preflight("https://app.example")).await;
    let allowed = answer.field("access-control-allow-origin");
    assert_eq!((answer.status, allowed.as_deref()), (204, Some("https://app.example")));
    is_refused(&local, &preflight("https://evil.example"), 403, "origin_refused").await;
    assert_eq!(own.recorded().len(), before, "the upstream was not called");
    let read = sent(&get("routes", "/x").field("origin", "https://app.example")).await;
    assert_eq!(read.field("access-control-allow-origin").as_deref(), Some("https://app.example"));

    let evil = sent(&get("routes", "/x").field("origin", "https://evil.example")).await;
    assert_eq!((evil.status, evil.field("access-control-allow-origin")), (200, None));
    // A page may read why it was refused.
    for (request, status, code) in [
        (post("/x", 1001), 413, "body_too_large"),
        (get("routes", "/site/nothing"), 404, "no_such_file"),
        (get("routes", "/api/../x"), 400, "bad_request"),
    ] {
        for (origin, allowed) in
            [("https://app.example", Some("https://app.example")), ("https://evil.example", None)]
        {
            let refused = is_refused(&local, &request.clone().field("origin", origin), status, code).await;
            assert_eq!(refused.field("access-control-allow-origin").as_deref(), allowed, "{code}");
            assert_eq!(refused.all("vary"), ["origin"], "{code}");
        }
    }

    // What the upstream learns.
    sent(&get("plain", "/")).await;
    let seen = own.recorded().last().unwrap().clone();
    for name in ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port"]
    {
        assert_eq!(seen.all(name), Vec::<String>::new(), "{name}");
    }
    sent(&get("rfc", "/")).await;
    let seen = own.recorded().last().unwrap().clone();
    assert_eq!((seen.all("forwarded").len(), seen.all("x-forwarded-for").len()), (1, 0));

    // Limits.
    for _ in 0..2 {
        assert_eq!(sent(&get("few", "/")).await.status, 200);
    }
    let answer = is_refused(&local, &get("few", "/"), 429, "rate_limited").await;
    let wait: u32 = answer.field("retry-after").unwrap().parse().unwrap();
    assert!((1700..=1800).contains(&wait), "{wait}");
    assert_eq!(answer.field("ratelimit-policy").as_deref(), Some("\"tunnel\";q=2;w=3600"));
    for _ in 0..2 {
        assert_eq!(sent(&get("fuse", "/status/503")).await.text(), "own");
    }
    is_refused(&local, &get("fuse", "/"), 503, "circuit_open").await;

    // Pages.
    is_refused(&local, &get("works", "/"), 503, "maintenance").await;
    is_refused(&local, &get("down", "/"), 502, "upstream_unreachable").await;
    let html = |tunnel: &str| get(tunnel, "/").field("accept", "text/html");
    let sorry = sent(&html("down")).await;
    assert_eq!((sorry.status, sorry.text()), (502, "<p>Sorry, back soon".to_owned()));
    assert_eq!(sorry.field("x-tunnel-error").as_deref(), Some("upstream_unreachable"));
    let works = sent(&html("works")).await;
    assert!(works.status == 503 && works.text().contains("maintenance"), "{}", works.text());

    denials(
        &agent,
        &[
            ("routes", "route"),
            ("routes", "max_body"),
            ("routes", "cors"),
            ("pages", "route"),
            ("few", "rate_limit"),
            ("fuse", "circuit_breaker"),
            ("works", "maintenance"),
        ],
    )
    .await;

    // Another policy by reload; what was used of a limit stays used.
    let reloaded = tunnels.concat().replace("maintenance = true", "").replace("/hello", "/hi");
    agent.write_tunnels(&local, &reloaded);
    assert_eq!(agent.ask(&["reload"]).0, Some(0));
    assert_eq!(sent(&get("works", "/")).await.status, 200);
    assert_eq!(sent(&get("routes", "/hi")).await.status, 203);
    assert_eq!(sent(&get("routes", "/hello")).await.text(), "own");
    is_refused(&local, &get("few", "/"), 429, "rate_limited").await;

    // What a request would meet.
    let file = agent.dir().join("agentd.toml").display().to_string();
    let url = "https://routes.tunnel.example.com/api/x?y";
    let mut explain =
        tests::process::Process::start("agentd", &["config", "explain", url, "--config", &file], &[]);
    let code = explain.wait();
    let said = explain.printed();
    assert_eq!(code, Some(0), "{said}");
    for line in [
        "tunnel           routes\n",
        "route            /api\n",
        "max_body         1000 bytes: a longer one is answered with 413 body_too_large\n",
        "strip_prefix     \"/api\"\n",
        "add_prefix       \"/v1\"\n",
        "request_headers  remove = [\"x-debug\"], set = { ",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

/// An upstream that takes every body, however its end is said; with the lengths of those that came whole.
async fn taking() -> (SocketAddr, Arc<Mutex<Vec<usize>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, lengths) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let taken = Arc::clone(&lengths);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let taken = Arc::clone(&taken);
            let service = service_fn(move |request: http::Request<Incoming>| {
                let taken = Arc::clone(&taken);
                async move {
                    let body = request.into_body().collect().await?.to_bytes();
                    taken.lock().unwrap().push(body.len());
                    Ok::<_, hyper::Error>(http::Response::new(Empty::<Bytes>::new()))
                }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    (address, lengths)
}

/// Through a relay a body may come without a length: it is counted, and a short one is as good as an announced one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_body_of_unknown_length_is_held_to_the_same_limits() {
    let secrets = Secrets::new();
    let (address, lengths) = taking().await;
    let github = secrets.write("github", "new\n");
    let verify =
        format!("verify = {{ scheme = \"github\", secret_file = \"{github}\", paths = [\"/github\"] }}");
    let tunnels = [("small", "max_body = 1000"), ("hooks", &verify)]
        .map(|(name, rules)| format!("[[tunnel]]\nname = \"{name}\"\nupstream = \"{address}\"\n{rules}\n"));
    let local = Local::start(&["--front", "relay", "--websockets", "relay"]);
    let agent = local.agent_with(&tunnels.concat(), &["small", "hooks"]);
    let send = async |request: Request, body: &[u8]| {
        let mut client = Connection::open(local.public).await;
        client.begin(&request.field("Transfer-Encoding", "chunked")).await;
        for piece in body.chunks(64 * 1024) {
            client.write(format!("{:x}\r\n", piece.len()).as_bytes()).await;
            client.write(piece).await;
            client.write(b"\r\n").await;
        }
        client.write(b"0\r\n\r\n").await;
        let answer = client.answer("POST").await;
        (answer.status, answer.field("x-tunnel-error").unwrap_or_default())
    };
    let post = |tunnel: &str, path: &str| Request::to(tunnel, "POST", path);
    let mut passed = Vec::new();
    for (bytes, expected) in [(0, 200), (1, 200), (1000, 200), (1001, 413), (200_000, 413)] {
        let (status, code) = send(post("small", "/"), &vec![1; bytes]).await;
        assert_eq!(
            (status, &*code),
            (expected, if expected == 200 { "" } else { "body_too_large" }),
            "{bytes}"
        );
        passed.extend((expected == 200).then_some(bytes));
    }
    for (bytes, expected) in [(2, 200), (1 << 20, 200), ((1 << 20) + 1, 413)] {
        let body = vec![b'x'; bytes];
        let signature = format!("sha256={}", hex(&mac(b"new", &[&body])));
        let signed = post("hooks", "/github").field("x-hub-signature-256", &signature);
        let (status, code) = send(signed, &body).await;
        assert_eq!(
            (status, &*code),
            (expected, if expected == 200 { "" } else { "webhook_too_large" }),
            "{bytes}"
        );
        passed.extend((expected == 200).then_some(bytes));
    }
    assert_eq!(send(post("hooks", "/github"), b"{}").await, (401, "webhook_refused".to_owned()));
    assert_eq!(
        *lengths.lock().unwrap(),
        passed,
        "nothing that was refused reached the upstream as if it were whole"
    );
    denials(&agent, &[("small", "max_body"), ("hooks", "verify")]).await;
}

/// What comes in beside the requests that are measured, a hundred a second, each from an address of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Beside {
    Nothing,
    /// Requests that show no password, to a path that wants none.
    Requests,
    /// Wrong passwords.
    Guesses,
}

/// Sends what is to come beside for as long as it is polled; counts the answers by status.
async fn come_beside(beside: Beside, public: SocketAddr, answers: &mut HashMap<u16, usize>) {
    if beside == Beside::Nothing {
        return std::future::pending().await;
    }
    let mut all = tokio::task::JoinSet::new();
    let mut each = tokio::time::interval(Duration::from_millis(10));
    let first = getrandom::u32().unwrap();
    for number in 0_u32.. {
        tokio::select! {
            _ = each.tick() => {}
            Some(status) = all.join_next() => {
                *answers.entry(status.unwrap()).or_default() += 1;
                continue;
            }
        }
        let [_, a, b, c] = first.wrapping_add(number).to_be_bytes();
        all.spawn(async move {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(([127, 1 | a, b, c.clamp(1, 254)], 0).into()).unwrap();
            let stream = socket.connect(public).await.unwrap();
            let request = match beside {
                Beside::Guesses => {
                    Request::to("team", "GET", "/").field("authorization", &basic("ann", &number.to_string()))
                }
                _ => Request::to("team", "GET", "/open"),
            };
            let mut connection = Connection::over(tokio_tungstenite::MaybeTlsStream::Plain(stream));
            connection.exchange(&request).await.status
        });
    }
}

/// Whoever is known waits no longer beside a hundred guesses a second than beside as many requests that guess nothing.
#[tokio::test]
#[ignore = "measures for a minute and a half, alone: cargo test -p tests --test policy guesses -- --ignored --nocapture"]
async fn a_hundred_guesses_a_second_do_not_slow_who_is_known() {
    const ROUNDS: usize = 5;
    const LASTS: Duration = Duration::from_secs(5);
    let secrets = Secrets::new();
    let upstream = naming("own").await;
    let users = secrets.write("users", &format!("ann:{}\n", bcrypt::hash("correct horse", 10).unwrap()));
    let rules = format!("basic_auth = {{ file = \"{users}\", except = [\"/open\"] }}");
    let local = Local::start(&[]);
    let _agent = local.agent_with(&tunnel("team", &upstream, &rules), &["team"]);
    let known = Request::to("team", "GET", "/").field("authorization", &basic("ann", "correct horse"));
    let mut connection = Connection::open(local.public).await;
    for _ in 0..50 {
        assert_eq!(connection.exchange(&known).await.status, 200);
    }
    let kinds = [Beside::Nothing, Beside::Requests, Beside::Guesses];
    let (mut times, mut answers) = (vec![Vec::new(); kinds.len()], vec![HashMap::new(); kinds.len()]);
    for _ in 0..ROUNDS {
        for (kind, &beside) in kinds.iter().enumerate() {
            let until = Instant::now() + LASTS;
            let measured = async {
                while Instant::now() < until {
                    let begun = Instant::now();
                    assert_eq!(connection.exchange(&known).await.status, 200);
                    times[kind].push(begun.elapsed());
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::select! {
                () = measured => {}
                () = come_beside(beside, local.public, &mut answers[kind]) => {}
            }
        }
    }
    let percentile = |times: &mut Vec<Duration>, percent: usize| {
        times.sort();
        times[(times.len() - 1) * percent / 100]
    };
    for (kind, beside) in kinds.iter().enumerate() {
        let (p50, p95) = (percentile(&mut times[kind], 50), percentile(&mut times[kind], 95));
        eprintln!(
            "beside {beside:?}: {} requests, p50 {p50:?}, p95 {p95:?}; answers {:?}",
            times[kind].len(),
            answers[kind]
        );
    }
    // Both came as often, and guesses were really hashed.
    assert!(answers[1][&200] > 300 && answers[2][&401] > 30 && !answers[2].contains_key(&200), "{answers:?}");
    let (plain, guessed) = (percentile(&mut times[1], 95), percentile(&mut times[2], 95));
    assert!(
        guessed <= plain.mul_f64(1.25) + Duration::from_millis(2),
        "{guessed:?} beside guesses, {plain:?} without"
    );
}
