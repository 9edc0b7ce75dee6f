//! Requests against policies, without any IO but files.

use std::collections::BTreeMap;

use base64::Engine as _;
use http::{HeaderName, HeaderValue, Method};
use proto::{
    forwarded::{Hop, Trust, apply},
    header::Headers,
    target::Target,
};

use super::*;
use crate::{
    config,
    identity::{Algorithm, public_keys::tests::Signer},
    report::denial::DeniedBy,
    serve::{carried::Carried, tunnel::Tunnel},
};

/// One tunnel's rules, and requests as `METHOD TARGET [@host] [from=IP] [bytes=N|unknown] [as=USER:PASSWORD] [upgrade] [name:value …] =>
/// OUTCOME`, with `_` for a blank in a value.
struct Case {
    rules: &'static str,
    requests: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        rules: "",
        requests: &[
            "GET / => own /",
            "GET /../x => own /../x",
            "GET //x?y => own //x?y",
            "OPTIONS * => own *",
            "POST /x bytes=9999999 => own /x",
            "GET /x @other.example => own /x",
            "GET /x from=unknown => own /x",
            "OPTIONS / origin:https://a.example access-control-request-method:PUT => own /",
        ],
    },
    Case {
        rules: r#"
            [[tunnel.route]]
            path = "/api"
            upstream = "127.0.0.1:2"
            [[tunnel.route]]
            path = "/api/v2"
            upstream = "127.0.0.1:3"
            [[tunnel.route]]
            path = "/api"
            methods = ["DELETE", "PUT"]
            upstream = "127.0.0.1:4"
            [[tunnel.route]]
            path = "/"
            host = "admin.example"
            upstream = "127.0.0.1:5"
        "#,
        requests: &[
            "GET / => own /",
            "GET /x => own /x",
            "GET /api => 2 /api",
            "GET /api/ => 2 /api/",
            "GET /api?x=/y => 2 /api?x=/y",
            "GET /api/x => 2 /api/x",
            "GET /api/v2 => 3 /api/v2",
            "GET /api/v2/x => 3 /api/v2/x",
            "GET /api/v20 => 2 /api/v20",
            "GET /apix => own /apix",
            "GET /API => own /API",
            "GET /Api/x => own /Api/x",
            "GET //api => own //api",
            "GET /x/api => own /x/api",
            "GET /api//x => 2 /api//x",
            "GET /api//v2 => 2 /api//v2",
            "GET /%61pi => 2 /%61pi",
            "GET /api%2Fv2 => own /api%2Fv2",
            "GET /api/v2%2Fx => 2 /api/v2%2Fx",
            "GET /api/%76%32/x => 3 /api/%76%32/x",
            "GET /%2561pi => own /%2561pi",
            "DELETE /api => 4 /api",
            "PUT /api/x => 4 /api/x",
            "DELETE /api/v2 => 3 /api/v2",
            "POST /api => 2 /api",
            "DELETE /x => own /x",
            "GET / @admin.example => 5 /",
            "GET /x @ADMIN.example:8443 => 5 /x",
            "GET /x @admin.example. => 5 /x",
            "GET /x @badmin.example => own /x",
            "GET /x @admin.example.evil => own /x",
            "GET /api @admin.example => 2 /api",
            "GET /api/../x => 400 bad_request",
            "GET /x/../api => 400 bad_request",
            "GET /x/%2e%2e/api => 400 bad_request",
            "GET /x/%2E./api => 400 bad_request",
            "GET /x/.%2e/api => 400 bad_request",
            "GET /x/./api => 400 bad_request",
            "GET /.. => 400 bad_request",
            "GET /x%2f..%2fapi => 400 bad_request",
            "GET /x%5c..%5capi => 400 bad_request",
            "GET /..%5c => 400 bad_request",
            "GET /%252e%252e/api => 400 bad_request",
            "GET /api/..;/x => 400 bad_request",
            "GET /.../api => own /.../api",
            "GET /..api => own /..api",
            "GET /x?a=/../ => own /x?a=/../",
            "OPTIONS * => own *",
        ],
    },
    Case {
        rules: r#"
            [[tunnel.route]]
            path = "/api"
            strip_prefix = true
            upstream = "127.0.0.1:2"
            [[tunnel.route]]
            path = "/old/app"
            strip_prefix = "/old"
            add_prefix = "/v1"
            upstream = "127.0.0.1:3"
            [[tunnel.route]]
            path = "/"
            add_prefix = "/site/"
            upstream = "127.0.0.1:4"
        "#,
        requests: &[
            "GET /api => 2 /",
            "GET /api/ => 2 /",
            "GET /api/x => 2 /x",
            "GET /api?q => 2 /?q",
            "GET /api/?q => 2 /?q",
            "GET /api/x?q=/api/ => 2 /x?q=/api/",
            "GET /api//x => 2 //x",
            "GET /%61pi/x => 2 /x",
            "GET /api/api/x => 2 /api/x",
            "GET /api/%2Fx => 2 /%2Fx",
            "GET /old/app => 3 /v1/app",
            "GET /old/app/x?q => 3 /v1/app/x?q",
            "GET /old => 4 /site/old",
            "GET / => 4 /site/",
            "GET /?q => 4 /site/?q",
            "GET /x => 4 /site/x",
            "GET //x => 4 /site//x",
            "GET /apix => 4 /site/apix",
            "GET /api/.. => 400 bad_request",
            "GET /api/../../x => 400 bad_request",
            "GET /old/app/%2e%2e => 400 bad_request",
        ],
    },
    Case {
        rules: r#"
            [[tunnel.route]]
            path = "/hello"
            respond = { status = 201, body = "hi", headers = { x-a = "b", content-type = "text/x" } }
            [[tunnel.route]]
            path = "/gone"
            respond = { status = 410 }
            [[tunnel.route]]
            path = "/none"
            respond = { status = 204 }
            [[tunnel.route]]
            path = "/ok"
            methods = ["GET"]
            respond = {}
            [[tunnel.route]]
            path = "/moved"
            redirect = "https://new.example${target}"
            [[tunnel.route]]
            path = "/login"
            redirect = { to = "/sso?by=${tunnel}", status = 307 }
        "#,
        requests: &[
            "GET /hello => 201 hi x-a:b content-type:text/x content-length:2",
            "POST /hello/x => 201 hi",
            "GET /hellox => own /hellox",
            "GET /gone => 410  content-length:0",
            "GET /none => 204 ",
            "GET /ok => 200 ",
            "HEAD /ok => own /ok",
            "POST /ok => own /ok",
            "GET /moved => 302 https://new.example/moved",
            "GET /moved/a%20b?c => 302 https://new.example/moved/a%20b?c",
            "GET /login?x => 307 /sso?by=web",
            "GET /hello/.. => 400 bad_request",
        ],
    },
    Case {
        rules: "max_body = 100\n[[tunnel.route]]\npath = \"/big\"\nmax_body = \"1KiB\"\nupstream = 2\n[[tunnel.route]]\npath = \"/small\"\nmax_body = 0\nupstream = 3\n",
        requests: &[
            "POST / bytes=0 => own /",
            "POST / bytes=99 => own /",
            "POST / bytes=100 => own /",
            "POST / bytes=101 => 413 body_too_large",
            "POST / bytes=unknown => own /",
            "POST /x bytes=5000000 => 413 body_too_large",
            "POST /big bytes=101 => 2 /big",
            "POST /big bytes=1024 => 2 /big",
            "POST /big bytes=1025 => 413 body_too_large",
            "POST /bigger bytes=101 => 413 body_too_large",
            "POST /small bytes=0 => 3 /small",
            "POST /small bytes=1 => 413 body_too_large",
            "POST /small bytes=unknown => 3 /small",
            "GET /small => 3 /small",
        ],
    },
    Case {
        rules: "maintenance = true\nmax_body = 1\nallow_ips = [\"192.0.2.0/24\"]",
        requests: &[
            "GET / => 503 maintenance retry-after:60",
            "POST / bytes=2 => 503 maintenance",
            "OPTIONS / origin:https://a.example access-control-request-method:PUT => 503 maintenance",
            "GET / from=198.51.100.1 => 403 address_refused",
        ],
    },
    Case {
        rules: r#"
            [tunnel.cors]
            origins = ["https://app.example", "https://*.app.example", "http://localhost:5173"]
            methods = ["GET", "PUT"]
            headers = ["x-a", "content-type"]
            credentials = true
            max_age = "10m"
        "#,
        requests: &[
            "GET / => own /",
            "GET / origin:https://app.example => own /",
            "GET / origin:https://evil.example => own /",
            "OPTIONS / => own /",
            "OPTIONS / origin:https://app.example => own /",
            "OPTIONS / access-control-request-method:PUT => own /",
            "OPTIONS / origin:https://app.example access-control-request-method:PUT => 204  access-control-allow-origin:https://app.example access-control-allow-methods:GET,_PUT access-control-allow-headers:x-a,_content-type access-control-allow-credentials:true access-control-max-age:600",
            "OPTIONS /x origin:https://a.app.example access-control-request-method:GET => 204  access-control-allow-origin:https://a.app.example",
            "OPTIONS / origin:http://localhost:5173 access-control-request-method:GET => 204  access-control-allow-origin:http://localhost:5173",
            "OPTIONS / origin:null access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:http://app.example access-control-request-method:GET => 403 origin_refused vary:origin",
            "OPTIONS / origin:https://app.example:444 access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:https://app.example.evil access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:https://xapp.example access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:https://.app.example access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:http://localhost access-control-request-method:GET => 403 origin_refused",
            "OPTIONS / origin:https://APP.example access-control-request-method:GET => 403 origin_refused",
            "POST / origin:https://app.example access-control-request-method:PUT => own /",
        ],
    },
    Case {
        rules: "[tunnel.cors]\norigins = [\"null\"]\n",
        requests: &[
            "OPTIONS / origin:null access-control-request-method:GET => 204  access-control-allow-origin:null",
        ],
    },
    Case {
        rules: "[tunnel.cors]\norigins = [\"*\"]\n",
        requests: &[
            "OPTIONS / origin:https://any.example access-control-request-method:PATCH access-control-request-headers:x-b => 204  access-control-allow-origin:* access-control-allow-headers:x-b",
            "OPTIONS / origin:null access-control-request-method:PATCH => 204  access-control-allow-origin:*",
            "OPTIONS / origin:https://any.example => own /",
        ],
    },
    Case {
        rules: "rate_limit = { requests = 2, per = \"1h\" }",
        requests: &[
            "GET / from=192.0.2.1 => own /",
            "POST /x from=192.0.2.1 => own /x",
            "GET / from=192.0.2.1 => 429 rate_limited retry-after:1800 ratelimit:\"tunnel\";r=0;t=1800 ratelimit-policy:\"tunnel\";q=2;w=3600",
            "GET / from=::ffff:192.0.2.1 => 429 rate_limited",
            "GET / from=192.0.2.2 => own /",
            "GET / from=2001:db8::1 => own /",
            "GET / from=2001:db8::2 => own /",
            "GET / from=2001:db8::3 => 429 rate_limited",
            "GET / from=2001:db8:0:1::3 => own /",
            "GET / from=unknown => own /",
            "GET / from=unknown => own /",
            "GET / from=unknown => 429 rate_limited",
            "OPTIONS / from=192.0.2.1 origin:https://a.example access-control-request-method:PUT => 429 rate_limited",
        ],
    },
    Case {
        rules: "rate_limit = { requests = 3, per = \"1h\", by = \"tunnel\" }",
        requests: &[
            "GET / from=192.0.2.1 => own /",
            "GET / from=192.0.2.2 => own /",
            "GET / from=192.0.2.3 => own /",
            "GET / from=192.0.2.4 => 429 rate_limited retry-after:1200",
        ],
    },
    Case {
        rules: "rate_limit = { requests = 1, per = \"1h\", by = \"user\" }",
        requests: &[
            "GET / from=192.0.2.1 => own /",
            "GET / from=192.0.2.1 => 429 rate_limited",
            "GET / from=192.0.2.2 => own /",
        ],
    },
    Case {
        rules: "allow_ips = [\"192.0.2.0/24\", \"2001:db8::/32\", \"198.51.100.7\"]\ndeny_ips = [\"192.0.2.128/25\"]\nip_except = [\"/open/*\"]",
        requests: &[
            "GET / from=192.0.2.0 => own /",
            "GET / from=192.0.2.127 => own /",
            "GET / from=192.0.2.128 => 403 address_refused",
            "GET / from=192.0.2.255 => 403 address_refused",
            "GET / from=192.0.3.0 => 403 address_refused",
            "GET / from=192.0.1.255 => 403 address_refused",
            "GET / from=198.51.100.7 => own /",
            "GET / from=198.51.100.8 => 403 address_refused",
            "GET / from=::ffff:192.0.2.1 => own /",
            "GET / from=::ffff:192.0.2.200 => 403 address_refused",
            "GET / from=2001:db8:ffff::1 => own /",
            "GET / from=2001:db9::1 => 403 address_refused",
            "GET / from=::1 => 403 address_refused",
            "GET / from=unknown => 403 address_refused",
            "GET / from=203.0.113.1 x-forwarded-for:192.0.2.1 => 403 address_refused",
            "GET / from=203.0.113.1 forwarded:for=192.0.2.1 => 403 address_refused",
            "GET / from=203.0.113.1 x-real-ip:192.0.2.1 => 403 address_refused",
            "GET /open/x from=203.0.113.1 => own /open/x",
            "GET /open from=203.0.113.1 => 403 address_refused",
            "GET /openx from=203.0.113.1 => 403 address_refused",
            "GET /Open/x from=203.0.113.1 => 403 address_refused",
            "GET /open/../x from=203.0.113.1 => 403 address_refused",
            "GET /open/%2e%2e/x from=203.0.113.1 => 403 address_refused",
            "GET /open//x from=203.0.113.1 => 403 address_refused",
            "GET /open/a%2Fb from=203.0.113.1 => 403 address_refused",
            "GET //open/x from=203.0.113.1 => 403 address_refused",
            "GET /open/x;y from=203.0.113.1 => 403 address_refused",
        ],
    },
    Case {
        rules: r#"
            [[tunnel.route]]
            path = "/lb"
            upstream = ["127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4"]
        "#,
        requests: &[
            "GET /lb => 2 /lb",
            "GET /lb => 3 /lb",
            "GET /lb => 4 /lb",
            "GET /lb => 2 /lb",
            "GET /x => own /x",
            "GET /lb/x => 3 /lb/x",
        ],
    },
    Case {
        rules: r#"
            max_body = 10
            [[tunnel.route]]
            path = "/a/b/c"
            strip_prefix = "/a/b"
            upstream = 2
            [[tunnel.route]]
            path = "/a"
            strip_prefix = "/"
            methods = ["GET", "HEAD"]
            upstream = 3
            [[tunnel.route]]
            path = "/größe"
            redirect = "/size"
            [tunnel.cors]
            origins = ["https://app.example"]
        "#,
        requests: &[
            "GET /a/b/c => 2 /c",
            "GET /a/b/c/ => 2 /c/",
            "GET /a/b/c/d?e => 2 /c/d?e",
            "GET /a/b/cd => 3 /a/b/cd",
            "GET /a/b => 3 /a/b",
            "HEAD /a => 3 /a",
            "POST /a => own /a",
            "POST /a/b/c bytes=10 => 2 /c",
            "POST /a/b/c bytes=11 => 413 body_too_large",
            "GET /a%2Fb/c => own /a%2Fb/c",
            "GET /a/b%2Fc => 3 /a/b%2Fc",
            "GET /%61/%62/%63/d => 2 /%63/d",
            "GET /A/b/c => own /A/b/c",
            "GET /a;x/b/c => own /a;x/b/c",
            "GET /gr%C3%B6%C3%9Fe => 302 /size",
            "GET /gr%c3%b6%c3%9fe/x => 302 /size",
            "GET /gr%C3%96%C3%9Fe => own /gr%C3%96%C3%9Fe",
            "OPTIONS /a/b/c origin:https://app.example access-control-request-method:GET => 204  access-control-allow-methods:GET,_HEAD,_POST,_PUT,_PATCH,_DELETE",
            "OPTIONS /a/../b origin:https://app.example access-control-request-method:GET => 400 bad_request",
            "OPTIONS /a/b/c origin:https://app.example => 2 /c",
        ],
    },
    Case {
        rules: r#"
            [[tunnel.route]]
            path = "/a"
            upstream = 2
            [[tunnel.route]]
            path = "/b"
            methods = ["GET"]
            respond = { status = 418 }
            # no upstream
        "#,
        requests: &[
            "GET /a/x => 2 /a/x",
            "GET /b => 418 ",
            "POST /b => 404 no_route denied_by:route",
            "GET / => 404 no_route",
            "GET /apix => 404 no_route",
            "GET /a/../b => 400 bad_request denied_by:route",
        ],
    },
    Case {
        rules: r#"
            allow_ips = ["192.0.2.0/24"]
            deny_ips = ["192.0.2.6"]
            max_body = 10
            rate_limit = { requests = 3, per = "1h", by = "tunnel" }
            cors = { origins = ["https://app.example"] }
        "#,
        requests: &[
            "GET / from=192.0.2.6 => 403 address_refused denied_by:deny_ips",
            "GET / from=198.51.100.1 => 403 address_refused denied_by:allow_ips",
            "GET / from=unknown => 403 address_refused denied_by:allow_ips",
            "POST / bytes=11 => 413 body_too_large denied_by:max_body",
            "OPTIONS / origin:https://evil.example access-control-request-method:PUT => 403 origin_refused denied_by:cors",
            "GET / => own /",
            "GET / => 429 rate_limited denied_by:rate_limit",
        ],
    },
    Case { rules: "maintenance = true", requests: &["GET / => 503 maintenance denied_by:maintenance"] },
    Case {
        rules: "deny_ips = [\"192.0.2.6\"]",
        requests: &["GET / from=unknown => 403 address_refused denied_by:deny_ips"],
    },
    Case {
        rules: "circuit_breaker = { open_after = 2, retry_after = \"1h\" }",
        requests: &[
            "GET / => own / failing",
            "GET / => own /",
            "GET / => own / failing",
            "GET / => own / failing",
            "GET / => 503 circuit_open retry-after:3600 denied_by:circuit_breaker",
            "GET /x => 503 circuit_open",
        ],
    },
];

#[tokio::test]
async fn requests_meet_the_rules_of_their_tunnel() {
    let mut seen = 0;
    for case in CASES {
        let policy = policy(case.rules);
        for request in case.requests {
            seen += 1;
            let (asked, outcome) = request.split_once(" => ").unwrap();
            let outcome =
                outcome.strip_suffix(" failing").map_or((outcome, false), |outcome| (outcome, true));
            let is = ask(&policy, asked, outcome.1).await;
            let mut wanted = outcome.0.split(' ');
            let expected = format!("{} {}", wanted.next().unwrap(), wanted.next().unwrap_or_default());
            assert_eq!(is.0, expected, "{}\n{asked}", case.rules);
            for field in wanted {
                let (name, value) = field.split_once(':').unwrap();
                assert_eq!(
                    is.1.get(name),
                    Some(&value.replace('_', " ")),
                    "{}\n{asked}: {:?}",
                    case.rules,
                    is.1
                );
            }
        }
    }
    assert!(seen >= 200, "{seen} requests");
}

#[tokio::test]
async fn who_has_not_shown_a_whole_body_keeps_nobody_from_an_upstream_that_is_tried() {
    let policy = policy("circuit_breaker = { open_after = 1, retry_after = \"500ms\" }").unwrap();
    let (target, headers) = (Target::parse("/").unwrap(), Headers::new());
    let asked = Asked { method: &Method::POST, target: &target, headers: &headers, upgrade: false };
    let request_id = RequestId::from_random([1; 16]);
    let admit =
        async || policy.admit(&asked, &request_id, None, unix_now()).await.map(|let_in| let_in.passage);
    let mut failing = admit().await.unwrap();
    failing.enter().unwrap();
    failing.came_to(false);
    assert_eq!(admit().await.err().unwrap().code, Some(ErrorCode::CircuitOpen));
    let mut held = loop {
        match admit().await {
            Ok(passage) => break passage,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    };
    let mut whole = admit().await.unwrap();
    whole.enter().unwrap();
    whole.came_to(true);
    held.enter().unwrap();
}

#[tokio::test]
async fn what_an_app_says_below_its_whole_prefix_is_not_moved_again() {
    const STRIPS: &str = "[[tunnel.route]]\npath = \"/app\"\nupstream = 2\nstrip_prefix = true\n";
    const ACCENTS: &str = "[[tunnel.route]]\npath = \"/café\"\nupstream = 2\nstrip_prefix = true\n\
        add_prefix = \"/très\"\n";
    let silent = format!("forwarded = \"none\"\n{STRIPS}");
    for (rules, prefix, target, said, moved) in [
        // As addresses say them.
        (ACCENTS, None, "/caf%C3%A9/", "/tr%C3%A8s/é", "/caf%C3%A9/é"),
        (ACCENTS, None, "/caf%c3%a9/", "/caf%C3%A9/é", "/caf%C3%A9/é"),
        (ACCENTS, Some("/web"), "/caf%C3%A9/", "/web/caf%C3%A9/é", "/caf%C3%A9/é"),
        (STRIPS, None, "/app/", "/app/login", "/app/login"),
        (STRIPS, None, "/app/", "/login", "/app/login"),
        (STRIPS, None, "/app/app/x", "/app/login", "/app/app/login"),
        (silent.as_str(), None, "/app/", "/app/login", "/app/app/login"),
        // The edge puts the prefix of path mode before what comes from here.
        (STRIPS, Some("/web"), "/app/", "/web/app/login", "/app/login"),
        (STRIPS, Some("/web"), "/app/", "/login", "/app/login"),
        (STRIPS, Some("/web"), "/app/", "/web/login", "/app/web/login"),
        (STRIPS, Some("/web"), "/app/", "https://pub/web/app/login", "https://pub/web/app/login"),
        ("max_body = 1", Some("/web"), "/", "/web/login", "/login"),
        ("max_body = 1", Some("/web"), "/", "/login", "/login"),
        ("max_body = 1", Some("/web"), "/web/x", "/web/login", "/web/login"),
    ] {
        let policy = policy(rules).unwrap();
        let (asked_for, request_id) = (Target::parse(target).unwrap(), RequestId::from_random([1; 16]));
        let mut headers = Headers::new();
        let hop = Hop { client: None, scheme: "https", host: "pub", port: 443, prefix };
        apply(&mut headers, &hop, Trust::Chain, &request_id);
        let asked = Asked { method: &Method::GET, target: &asked_for, headers: &headers, upgrade: false };
        let passage = policy.admit(&asked, &request_id, Some(0), unix_now()).await.unwrap().passage;
        let mut answer: Headers =
            [(http::header::LOCATION, HeaderValue::from_str(said).unwrap())].into_iter().collect();
        passage.move_response(&mut answer, passage.target.as_ref().unwrap_or(&asked_for), "pub");
        let location = answer.get(http::header::LOCATION).unwrap();
        assert_eq!(location, moved, "{rules}{prefix:?} {target}: {said}");
    }
}

#[tokio::test]
async fn a_folder_below_a_route_leads_to_itself_and_not_out_of_the_route() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("sub/added")).unwrap();
    std::fs::write(dir.path().join("index.html"), "home").unwrap();
    std::fs::write(dir.path().join("sub/index.html"), "sub").unwrap();
    let files = format!("files = \"{}\"", dir.path().display());
    let policy = policy(&format!(
        "[[tunnel.route]]\npath = \"/docs\"\n{files}\nstrip_prefix = true\n\
         [[tunnel.route]]\npath = \"/added\"\n{files}\nadd_prefix = \"/sub\"\n"
    ));
    for (asked, outcome) in [
        ("GET /docs", "301 /docs/"),
        ("GET /docs?x=/", "301 /docs/?x=/"),
        ("GET /docs/", "200 home"),
        ("GET /docs/sub", "301 /docs/sub/"),
        ("GET /%64ocs/sub?x", "301 /%64ocs/sub/?x"),
        ("GET /docs/sub/", "200 sub"),
        ("GET /docs/index.html", "200 home"),
        ("GET /docs/index.html/", "404 no_such_file"),
        ("GET /added", "301 /added/"),
    ] {
        assert_eq!(ask(&policy, asked, false).await.0, outcome, "{asked}");
    }
}

#[tokio::test]
async fn a_token_is_judged_by_the_time_at_which_its_request_came() {
    let dir = tempfile::tempdir().unwrap();
    let (file, signer) = (dir.path().join("jwks.json"), Signer::new(Algorithm::Es256));
    std::fs::write(&file, &signer.jwks).unwrap();
    let policy =
        policy(&format!("[tunnel.bearer]\njwks_file = \"{}\"\naudience = \"me\"", file.display())).unwrap();
    let token = signer.sign(&serde_json::json!({ "aud": "me", "sub": "ann", "exp": 1_000_000 }));
    let target = Target::parse("/").unwrap();
    let mut headers = Headers::new();
    headers.push(http::header::AUTHORIZATION, HeaderValue::try_from(format!("Bearer {token}")).unwrap());
    let asked = Asked { method: &Method::POST, target: &target, headers: &headers, upgrade: false };
    let request_id = RequestId::from_random([1; 16]);
    let at =
        async |now| policy.admit(&asked, &request_id, Some(0), now).await.map(|let_in| let_in.visitor.user);
    // One that was kept until its token had expired.
    assert_eq!(at(999_999).await.unwrap().as_deref(), Some("ann"));
    assert_eq!(at(1_000_100).await.unwrap_err().code, Some(ErrorCode::TokenRequired));
}

#[tokio::test]
async fn pages_of_other_origins_do_not_act_with_a_visitors_password() {
    const OWN: &str = "origin:https://web.tunnel.example.com";
    const OTHER: &str = "origin:https://a.tunnel.example.com";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("users");
    std::fs::write(&file, format!("ann:{}\n", bcrypt::hash("secret", 4).unwrap())).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let rules = |more: &str| {
        policy(&format!("basic_auth = {{ file = \"{}\", except = [\"/open\"] }}\n{more}", file.display()))
    };
    let plain = rules("");
    let named = rules("cors = { origins = [\"https://a.tunnel.example.com\"] }");
    let all = rules("cors = { origins = [\"*\"] }");
    let sandboxed = rules("cors = { origins = [\"null\"] }");
    let refused = "403 origin_refused";
    for (policy, asked, outcome) in [
        (&plain, "POST /".to_owned(), "own /"),
        (&plain, format!("POST / {OWN}"), "own /"),
        (&plain, format!("POST / {OWN}:443"), "own /"),
        (&plain, format!("POST / {OTHER}"), refused),
        (&plain, format!("POST / {OWN}:8443"), refused),
        (&plain, "POST / origin:null".to_owned(), refused),
        (&plain, "POST / origin:null sec-fetch-site:same-origin".to_owned(), "own /"),
        (&plain, "POST / sec-fetch-site:none".to_owned(), "own /"),
        (&plain, "POST / sec-fetch-site:same-site".to_owned(), refused),
        (&plain, format!("DELETE / sec-fetch-site:cross-site {OTHER}"), refused),
        (&plain, format!("PATCH / {OTHER}"), refused),
        // Reading is the browser's to refuse, and links lead here.
        (&plain, format!("GET / {OTHER}"), "own /"),
        (&plain, "GET / sec-fetch-site:cross-site sec-fetch-mode:navigate".to_owned(), "own /"),
        (&plain, format!("HEAD / {OTHER}"), "own /"),
        // A WebSocket is asked for with GET, and no browser asks anybody whether its page may.
        (&plain, format!("GET / upgrade {OTHER}"), refused),
        (&plain, "GET / upgrade sec-fetch-site:same-site".to_owned(), refused),
        (&plain, format!("GET / upgrade {OWN}"), "own /"),
        (&plain, "GET / upgrade".to_owned(), "own /"),
        // Whose pages may is named; to let all read names none.
        (&named, format!("POST / {OTHER}"), "own /"),
        (&named, format!("POST / sec-fetch-site:same-site {OTHER}"), "own /"),
        (&named, format!("GET / upgrade {OTHER}"), "own /"),
        (&named, format!("POST / {OTHER}.evil.test"), refused),
        (&named, "POST / sec-fetch-site:same-site".to_owned(), refused),
        (&named, "POST / origin:null".to_owned(), refused),
        (&all, format!("POST / {OTHER}"), refused),
        (&sandboxed, "POST / origin:null sec-fetch-site:cross-site".to_owned(), refused),
        (&plain, format!("POST /open {OTHER}"), "own /open"),
    ] {
        let (is, fields) = ask(policy, &format!("{asked} authorization:Basic_YW5uOnNlY3JldA=="), false).await;
        assert_eq!(is, outcome, "{asked}");
        let rule = fields.get("denied_by").map(String::as_str);
        assert_eq!(rule, (outcome == refused).then_some("basic auth"), "{asked}");
    }
    // Who shows no password is asked for it, whatever page it is.
    let asked = format!("POST / {OTHER}");
    assert_eq!(ask(&plain, &asked, false).await.0, "401 password_required");
}

/// State that requests make under some rules, and what is answered after a reload. `FILE` and `OTHER` are lists of passwords
/// in which ann's is `secret`.
struct Reload {
    rules: &'static str,
    /// Requests as those of [`Case`], and how often each is made.
    before: &'static [(usize, &'static str)],
    /// Each time other rules, and a request under them.
    after: &'static [(&'static str, &'static str)],
}

const RELOADS: &[Reload] = &[
    Reload {
        rules: r#"basic_auth = "FILE""#,
        before: &[(1, "GET / as=ann:secret => own /"), (10, "GET / as=ann:1 => 401 password_required")],
        after: &[
            (
                r#"
                max_body = 9
                basic_auth = { file = "FILE", realm = "other", except = ["/x"] }
                "#,
                "GET / as=ann:2 => 429 too_many_guesses",
            ),
            // Were it not known, nobody would look at it.
            ("inspect = true\nbasic_auth = \"FILE\"", "GET / as=ann:secret => own /"),
            (r#"basic_auth = "OTHER""#, "GET / as=ann:2 => 401 password_required"),
        ],
    },
    Reload {
        rules: r#"rate_limit = { requests = 1, per = "1h", by = "ip" }"#,
        before: &[(1, "GET / => own /")],
        after: &[
            (
                r#"
                max_body = 9
                rate_limit = { requests = 1, per = "1h", by = "ip" }
                "#,
                "GET / => 429 rate_limited",
            ),
            (r#"rate_limit = { requests = 2, per = "1h", by = "ip" }"#, "GET / => own /"),
        ],
    },
    Reload {
        rules: r#"circuit_breaker = { open_after = 1, retry_after = "60s" }"#,
        before: &[(1, "GET / => own / failing")],
        after: &[
            (
                r#"
                max_body = 9
                circuit_breaker = { open_after = 1, retry_after = "60s" }
                [[tunnel.route]]
                path = "/api"
                upstream = "127.0.0.1:2"
                "#,
                "GET / => 503 circuit_open",
            ),
            (r#"circuit_breaker = { open_after = 2, retry_after = "60s" }"#, "GET / => own /"),
            (
                r#"upstream = "127.0.0.1:3"
                circuit_breaker = { open_after = 1, retry_after = "60s" }
                "#,
                "GET / => own /",
            ),
            (
                r#"
                http2 = "never"
                circuit_breaker = { open_after = 1, retry_after = "60s" }
                "#,
                "GET / => own /",
            ),
        ],
    },
    Reload {
        rules: r#"
            circuit_breaker = { open_after = 1, retry_after = "60s" }
            [[tunnel.route]]
            path = "/api"
            upstream = "127.0.0.1:2"
        "#,
        before: &[(1, "GET /api => 2 /api failing")],
        after: &[
            (
                r#"upstream = "127.0.0.1:3"
                circuit_breaker = { open_after = 1, retry_after = "60s" }
                [[tunnel.route]]
                path = "/longer/so/first"
                upstream = "127.0.0.1:4"
                [[tunnel.route]]
                path = "/api"
                max_body = 9
                upstream = "127.0.0.1:2"
                "#,
                "GET /api => 503 circuit_open",
            ),
            (
                r#"
                circuit_breaker = { open_after = 1, retry_after = "60s" }
                [[tunnel.route]]
                path = "/api"
                upstream = "127.0.0.1:4"
                "#,
                "GET /api => 4 /api",
            ),
        ],
    },
];

#[tokio::test]
async fn a_reload_forgets_what_it_changes_and_nothing_else() {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    let dir = tempfile::tempdir().unwrap();
    let list = |name: &str, users: &[&str]| {
        let hash = bcrypt::hash("secret", 4).unwrap();
        let file = dir.path().join(name);
        fs::write(&file, users.iter().map(|user| format!("{user}:{hash}\n")).collect::<String>()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        file.display().to_string()
    };
    let (file, other) = (list("file", &["ann"]), list("other", &["ann", "bob"]));
    let whole = |rules: &str| rules.replace("FILE", &file).replace("OTHER", &other);
    let answers = async |policy: &Option<Policy>, request: &str| {
        let (asked, outcome) = request.split_once(" => ").unwrap();
        let (wanted, failing) =
            outcome.strip_suffix(" failing").map_or((outcome, false), |outcome| (outcome, true));
        assert_eq!(ask(policy, asked, failing).await.0, wanted, "{request}");
    };
    for Reload { rules, before, after } in RELOADS {
        for (reloaded, request) in *after {
            println!("{rules}\n{reloaded}");
            let carried = Carried::default();
            let first = policy_after(&whole(rules), &carried);
            for (times, request) in *before {
                for _ in 0..*times {
                    answers(&first, request).await;
                }
            }
            let second = policy_after(&whole(reloaded), &carried);
            drop(first);
            answers(&second, request).await;
        }
    }
}

#[test]
fn a_webhook_stays_seen_whatever_else_its_rule_says() {
    use crate::config::visitors::{Scheme, WebhookRule};

    let carried = Carried::default();
    let name = "web".parse().unwrap();
    let webhook = |scheme: Scheme, secrets: &[&str], tolerance, paths: &[&str]| {
        let rule = WebhookRule {
            scheme,
            secrets: secrets.iter().map(|&secret| secret.into()).collect(),
            tolerance: std::time::Duration::from_secs(tolerance),
            paths: paths.iter().map(|path| path.parse().unwrap()).collect(),
        };
        Webhook::new(rule, carried.of(&name))
    };
    let signed = aws_lc_rs::hmac::sign(
        &aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"old"),
        b"1800000000.{}",
    );
    let field = format!("t=1800000000,v1={}", webhook::hex(signed.as_ref()));
    let headers: Headers =
        [(HeaderName::from_static("stripe-signature"), HeaderValue::try_from(field).unwrap())]
            .into_iter()
            .collect();
    let target = Target::parse("/").unwrap();
    let asked = Asked { method: &Method::POST, target: &target, headers: &headers, upgrade: false };
    let check = |webhook: &Webhook| webhook.check(&asked, b"{}", 1_800_000_000, false);
    let first = webhook(Scheme::Stripe, &["old"], 300, &[]);
    check(&first).unwrap().delivered();
    for (secrets, tolerance, paths) in [
        (&["old"][..], 300, &[][..]),
        (&["old"], 300, &["/hooks/*"]),
        (&["old"], 60, &[]),
        (&["new", "old"], 300, &[]),
    ] {
        let again = webhook(Scheme::Stripe, secrets, tolerance, paths);
        assert_eq!(check(&again).unwrap_err(), WebhookError::Replay, "{secrets:?} {tolerance} {paths:?}");
    }
    let other = webhook(Scheme::Stripe, &["new"], 300, &[]);
    assert_eq!(check(&other).unwrap_err(), WebhookError::Signature);
    drop((first, other));
    let anew = webhook(Scheme::Stripe, &["old"], 300, &[]);
    assert!(check(&anew).is_ok(), "nobody had it any more");
}

/// `None` where the rules ask for nothing.
fn policy(rules: &str) -> Option<Policy> {
    policy_after(rules, &Carried::default())
}

/// The same, with what earlier rules of the tunnel have come to.
fn policy_after(rules: &str, carried: &Carried) -> Option<Policy> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agentd.toml");
    let text = format!(
        "[edge]\nurl = \"ws://127.0.0.1:1\"\n[[tunnel]]\nname = \"web\"\n{}\n{rules}\n",
        if rules.contains("# no upstream") || rules.starts_with("upstream") {
            ""
        } else {
            "upstream = \"127.0.0.1:1\""
        }
    );
    std::fs::write(&file, text).unwrap();
    let overrides = config::Overrides { token: Some("secret".into()), ..config::Overrides::default() };
    let config = config::load(&file, &overrides).unwrap_or_else(|error| panic!("{rules}: {error}"));
    let tunnel = &config.tunnels[0];
    Tunnel::policy_of(tunnel, carried.of(&tunnel.name)).unwrap()
}

async fn ask(policy: &Option<Policy>, text: &str, failing: bool) -> (String, BTreeMap<String, String>) {
    let mut words = text.split(' ');
    let method: Method = words.next().unwrap().parse().unwrap();
    let target = Target::parse(words.next().unwrap()).unwrap();
    let (mut host, mut client, mut bytes) = ("web.tunnel.example.com", "192.0.2.1".parse().ok(), Some(0));
    let (mut headers, mut upgrade) = (Headers::new(), false);
    for word in words {
        if let Some(named) = word.strip_prefix('@') {
            host = named;
        } else if let Some(from) = word.strip_prefix("from=") {
            client = from.parse().ok();
        } else if let Some(count) = word.strip_prefix("bytes=") {
            bytes = (count != "unknown").then(|| count.parse().unwrap());
        } else if word == "upgrade" {
            upgrade = true;
        } else if let Some(credentials) = word.strip_prefix("as=") {
            let value = format!("Basic {}", base64::prelude::BASE64_STANDARD.encode(credentials));
            headers.push(http::header::AUTHORIZATION, HeaderValue::try_from(value).unwrap());
        } else {
            let (name, value) = word.split_once(':').unwrap();
            headers.push(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::try_from(value.replace('_', " ")).unwrap(),
            );
        }
    }
    let request_id = RequestId::from_random([1; 16]);
    let hop = Hop { client, scheme: "https", host, port: 443, prefix: None };
    apply(&mut headers, &hop, Trust::Chain, &request_id);
    let asked = Asked { method: &method, target: &target, headers: &headers, upgrade };
    let Some(policy) = policy else { return (format!("own {}", target.as_str()), BTreeMap::new()) };
    match policy.admit(&asked, &request_id, bytes, unix_now()).await {
        Ok(mut admitted) => {
            let passage = &mut admitted.passage;
            let target = passage.target.as_ref().unwrap_or(&target).as_str().to_owned();
            let to = match passage.upstream {
                None => "own".to_owned(),
                Some((upstream, _)) => upstream.address().to_string().rsplit(':').next().unwrap().to_owned(),
            };
            passage.enter().unwrap();
            passage.came_to(!failing);
            (format!("{to} {target}"), BTreeMap::new())
        }
        Err(answer) => {
            let code = answer.code;
            let denied_by = answer.denied_by.map(DeniedBy::as_str);
            // What files cannot give and what is down are nobody's refusal.
            let is_denial = code.is_some_and(|code| {
                !matches!(
                    code,
                    ErrorCode::NoSuchFile | ErrorCode::MethodRefused | ErrorCode::UpstreamUnhealthy
                )
            });
            assert_eq!(denied_by.is_some(), is_denial, "{text}");
            let (status, headers, mut body) = answer.into_parts(&request_id, false);
            let mut content = Vec::new();
            while let Some(next) = body.next().await {
                content.extend_from_slice(&next.unwrap());
            }
            let fields: BTreeMap<String, String> = headers
                .iter()
                .map(|(name, value)| (name.as_str().to_owned(), value.to_str().unwrap().to_owned()))
                .chain(denied_by.map(|rule| ("denied_by".to_owned(), rule.replace('_', " "))))
                .collect();
            let says = match (code, fields.get("location")) {
                (Some(code), _) => code.as_str().to_owned(),
                (None, Some(location)) => location.clone(),
                (None, None) => String::from_utf8(content).unwrap(),
            };
            (format!("{status} {says}"), fields)
        }
    }
}
