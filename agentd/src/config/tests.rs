use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _};

use proto::delivery::{DeliveryPolicy, Field, Mode, OrderBy, RetryOn, StatusRule};

use super::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("token", "secret");
        fs::set_permissions(folder.path("token"), fs::Permissions::from_mode(0o600)).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A file that only its owner may read.
    fn private(&self, name: &str, text: &str) {
        self.write(name, text);
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn load(&self, text: &str) -> Result<Config, ConfigError> {
        self.write("agentd.toml", text);
        load(&self.path("agentd.toml"), &Overrides::default())
    }

    /// The message without the folder's name.
    fn error(&self, text: &str) -> String {
        self.load(text).unwrap_err().to_string().replace(&format!("{}/", self.0.path().display()), "")
    }
}

const CA: &str = include_str!("../../tests/fixtures/ca.pem");

const EDGE: &str = "[edge]\nurl = \"ws://127.0.0.1:1\"\ntoken_file = \"token\"\n";

fn tunnel(lines: &str) -> String {
    format!("{EDGE}[[tunnel]]\nname = \"web\"\nupstream = \"https://app\"\n{lines}\n")
}

#[test]
fn a_duration_is_written_as_it_is_read() {
    for text in ["0ms", "1ms", "1500ms", "1s", "90s", "2m", "25h", "1d"] {
        assert_eq!(write_duration(parse_duration(text).unwrap()), text);
    }
    assert_eq!(write_duration(Duration::from_secs(3600)), "1h");
}

#[test]
fn a_whole_number_is_the_same_however_it_is_written() {
    let folder = Folder::new();
    let with = |port: &str, bytes: &str, status: &str| {
        let text = format!(
            "{EDGE}[[tunnel]]\nname = \"web\"\nupstream = {port}\nmax_body = {bytes}\ndelivery = \"auto\"\n\
             durable = {{ retry_on = [{status}] }}\n\
             [[tunnel.route]]\npath = \"/a\"\nrespond = {{ headers = {{ x-a = {bytes}, x-b = [{bytes}] }} }}\n"
        );
        folder.load(&text).unwrap_or_else(|error| panic!("{text}{error}")).tunnels
    };
    let decimal = with("8080", "1024", "503");
    assert_eq!(decimal[0].traffic.max_body, Some(1024));
    for (port, bytes, status) in [
        ("0x1F90", "0x400", "0x1f7"),
        ("0o17620", "0o2000", "0o767"),
        ("0b1111110010000", "0b100_0000_0000", "0b111110111"),
        ("8_080", "1_024", "5_0_3"),
    ] {
        assert_eq!(with(port, bytes, status), decimal, "{port}");
    }
    let error = folder.error(&tunnel("max_body = 0xFFFFFFFFFFFFFFFFF"));
    assert!(error.contains("0xFFFFFFFFFFFFFFFFF is too large a number"), "{error}");
}

#[test]
fn reads_every_key() {
    let folder = Folder::new();
    folder.write("ca.pem", CA);
    folder.write("own/ca.pem", CA);
    let config = folder
        .load(
            &r#"
            include = ["conf.d/*.toml"]
            grace_period = "5s"
            max_concurrent = 10000
            control_socket = "run/control.sock"
            status_address = "[::1]:4041"
            inspect_address = "127.0.0.1:4444"
            inspect_memory = "1MiB"
            inspect_redact = ["X-Own"]
            [log]
            level = "agentd=debug,info"
            format = "journal"
            dir = "log"
            keep_days = 3
            [edge]
            url = "wss://edge.example.com/dev"
            token_file = "token"
            ca_file = "ca.pem"
            [[tunnel]]
            name = "web"
            upstream = "https://app.internal"
            host_header = "preserve"
            origin = "upstream"
            rewrite_location = false
            via = false
            request_timeout = "500ms"
            max_concurrent = 7
            ca_file = "/etc/ca.pem"
            server_name = "other.internal"
            insecure_skip_verify = false
            http2 = "never"
            keep_alive = "5s"
            inspect = true
            inspect_body = 1000
            [tunnel.health_check]
            path = "/healthz?full=1"
            host = "app.test:8000"
            expect_status = "401, 2xx,300-303"
            interval = "100ms"
            timeout = "10ms"
            max_failed = 1
            [[tunnel]]
            name = "api2"
            upstream = 3000
            host_header = "app.example.com:8080"
            "#
            .replace("/etc/ca.pem", folder.path("own/ca.pem").to_str().unwrap()),
        )
        .unwrap();
    assert_eq!(config.edge.url.to_string(), "wss://edge.example.com/dev");
    assert_eq!(config.edge.ca_file, Some(folder.path("ca.pem")));
    assert_eq!(config.grace_period, Duration::from_secs(5));
    let [web, api] = &config.tunnels[..] else { panic!("two tunnels") };
    assert_eq!(web.host_header, HostHeader::Preserve);
    assert_eq!((web.origin, web.rewrite_location, web.via), (OriginRule::Upstream, false, false));
    assert_eq!((api.origin, api.rewrite_location, api.via), (OriginRule::Auto, true, true));
    assert_eq!(web.request_timeout, Duration::from_millis(500));
    assert_eq!(web.max_concurrent, 7);
    assert_eq!(web.http2, Http2::Never);
    assert_eq!(web.keep_alive, Some(Duration::from_secs(5)));
    assert_eq!(web.ca_file, Some(folder.path("own/ca.pem")));
    assert_eq!(api.upstream.as_ref().unwrap().to_string(), "http://localhost:3000");
    assert!(matches!(&api.host_header, HostHeader::Value(value) if value == "app.example.com:8080"));
    assert_eq!((config.max_concurrent, config.status_address.unwrap().port()), (10_000, 4041));
    assert_eq!((config.inspect.address.port(), config.inspect.memory), (4444, 1 << 20));
    assert_eq!(config.inspect.redact, ["x-own"]);
    assert_eq!(
        (web.inspect, web.inspect_body, api.inspect, api.inspect_body),
        (true, 1000, false, 256 << 10)
    );
    assert_eq!(config.control_socket, Some(folder.path("run/control.sock")));
    assert_eq!(config.log.format, Some(LogFormat::Journal));
    assert_eq!((config.log.dir, config.log.keep_days), (Some(folder.path("log")), Some(3)));
    assert_eq!(config.log.level, Some("agentd=debug,info".parse().unwrap()));
    let check = web.health_check.as_ref().unwrap();
    assert_eq!(check.host.as_ref().unwrap(), "app.test:8000");
    let good: Vec<u16> = (100..700).filter(|status| check.expect_status.contains(*status)).collect();
    assert_eq!(good, (200..=303).chain([401]).collect::<Vec<_>>());
    assert_eq!((check.path.as_str(), check.max_failed), ("/healthz?full=1", 1));
    assert_eq!((check.interval, check.timeout), (Duration::from_millis(100), Duration::from_millis(10)));
    assert_eq!(api.health_check, None);
}

#[test]
fn all_tunnels_together_may_do_what_the_largest_one_may() {
    let folder = Folder::new();
    assert_eq!(folder.load(&tunnel("")).unwrap().max_concurrent, DEFAULT_TOTAL_CONCURRENT);
    assert_eq!(folder.load(&tunnel("max_concurrent = 1000")).unwrap().max_concurrent, 1000);
    let bounded = format!("max_concurrent = 5\n{}", tunnel("max_concurrent = 1000"));
    assert_eq!(folder.load(&bounded).unwrap().max_concurrent, 5);
}

#[test]
fn settings_of_the_agent_are_checked_like_those_of_a_tunnel() {
    let folder = Folder::new();
    for (line, message) in [
        ("max_concurrent = 10001", "1:18: \"max_concurrent\" must be from 1 to 10000"),
        ("status_address = \"0.0.0.0:80\"", "1:18: \"0.0.0.0:80\" can be reached by other machines"),
        ("status_address = \"4041\"", "1:18: \"4041\" is not an address and a port"),
        ("inspect_address = \"0.0.0.0:4040\"", "1:19: \"0.0.0.0:4040\" can be reached by other machines"),
        ("inspect_memory = \"1023KiB\"", "1:18: \"1023KiB\" must be from 1MiB to 4GiB"),
        ("inspect_redact = [\"a b\"]", "1:19: \"a b\" is not the name of a header field"),
        ("log.format = \"xml\"", "1:14: \"xml\" is none of \"human\", \"json\" and \"journal\""),
        ("log.level = \"loud\"", "1:13: \"loud\" is not a level"),
        ("log.keep_days = 0", "1:17: \"keep_days\" must be from 1 to 3650"),
        ("log.lvel = 1", "1:5: unknown key \"lvel\" in [log]: did you mean \"level\"?"),
        ("control_socket = \"\"", "1:18: a file name is wanted here"),
    ] {
        let error = folder.error(&format!("{line}\n{}", tunnel("")));
        assert!(error.starts_with(&format!("agentd.toml:{message}")), "{error}");
    }
    let socket = |bytes: usize| format!("control_socket = \"/{}\"\n{}", "s".repeat(bytes - 1), tunnel(""));
    folder.load(&socket(107)).unwrap();
    let error = folder.error(&socket(108));
    assert!(
        error.starts_with("agentd.toml:1:18: the path of a unix socket has at most 107 bytes"),
        "{error}"
    );
    let tunnels = |count: usize| {
        let tunnels = (0..count).map(|n| format!("[[tunnel]]\nname = \"t{n}\"\nupstream = 3000\n"));
        tunnels.fold(EDGE.to_owned(), |text, tunnel| text + &tunnel)
    };
    folder.load(&tunnels(100)).unwrap();
    let error = folder.error(&tunnels(101));
    assert!(
        error.starts_with("agentd.toml:305:8: one tunnel too many: an agent serves at most 100"),
        "{error}"
    );
    for (check, message) in [
        ("{}", "this health_check has no path"),
        ("{ path = \"healthz\" }", "\"healthz\" is not a path"),
        ("{ path = \"/\", interval = \"99ms\" }", "must be from 100ms to 1h"),
        ("{ path = \"/\", timeout = \"61s\" }", "must be from 10ms to 1m"),
        ("{ path = \"/\", max_failed = 0 }", "must be from 1 to 100"),
        ("{ path = \"/\", max_failed = 101 }", "must be from 1 to 100"),
        ("{ pth = \"/\" }", "did you mean \"path\"?"),
        (
            "\"/x\"",
            "\"health_check\" must be a table, not a string: write health_check = { path = \"/healthz\" }",
        ),
        ("true", "must be a table, not a boolean: write health_check = { path ="),
    ] {
        let error = folder.error(&tunnel(&format!("health_check = {check}")));
        assert!(error.starts_with("agentd.toml:7:") && error.contains(message), "{error}");
    }
}

#[test]
fn who_writes_a_text_for_a_table_is_told_how_it_is_written_and_not_what_was_written() {
    let folder = Folder::new();
    for (line, message) in [
        ("bearer = \"s3cret\"", "write bearer = { issuer = \"https://…\" }"),
        ("cors = \"*\"", "write cors = { … } with credentials, expose_headers,"),
        (
            "circuit_breaker = 5",
            "must be a table, not an integer: write circuit_breaker = { … } with open_after,",
        ),
        ("delivery = \"auto\"\ndurable = \"1d\"", "write durable = { … } with answer, attempts,"),
    ] {
        let error = folder.error(&tunnel(line));
        assert!(error.contains(message) && !error.contains("s3cret"), "{error}");
    }
    let error = folder.error("edge = \"wss://edge.example.com/?token=s3cret\"\n");
    assert!(error.contains("write edge = { url = \"wss://…\" }") && !error.contains("s3cret"), "{error}");
}

#[test]
fn an_unknown_key_is_named_with_its_place_and_the_nearest_one() {
    let folder = Folder::new();
    assert_eq!(
        folder.error(&tunnel("max_concurent = 5")),
        "agentd.toml:7:1: unknown key \"max_concurent\" in [[tunnel]]: did you mean \"max_concurrent\"?"
    );
    assert_eq!(
        folder.error(&format!("tunel = 1\n{EDGE}")),
        "agentd.toml:1:1: unknown key \"tunel\" in the file: did you mean \"tunnel\"?"
    );
    assert_eq!(
        folder.error("[edge]\n  colour = 1"),
        "agentd.toml:2:3: unknown key \"colour\" in [edge]: known are ca_file, token_file, url"
    );
}

#[test]
fn a_bad_value_is_named_with_its_place() {
    let folder = Folder::new();
    for (line, message) in [
        ("max_concurrent = 0", "7:18: \"max_concurrent\" must be from 1 to 10000"),
        (
            "max_concurrent = \"5\"",
            "7:18: \"max_concurrent\" must be a whole number without quotes, not a string",
        ),
        (
            "request_timeout = \"1 minute\"",
            "7:19: \"1 minute\" is not a duration: write it as 500ms, 60s, 5m or 1h",
        ),
        ("request_timeout = \"16m\"", "7:19: \"16m\" must be from 1ms to 15m"),
        ("http2 = \"yes\"", "7:9: \"yes\" is none of \"auto\", \"always\" and \"never\""),
        (
            "keep_alive = \"50ms\"",
            "7:14: \"50ms\" must be from 100ms to 1h; \"off\" uses no connection twice",
        ),
        ("insecure_skip_verify = 1", "7:24: \"insecure_skip_verify\" must be true or false, not an integer"),
        ("origin = \"null\"", "7:10: \"null\" is neither \"preserve\" nor \"upstream\""),
        (
            "health_check = { path = \"/\", expect_status = 199 }",
            "7:46: \"199\" is no status: write it as 200, \"2xx\", \"200-399\" or several with commas",
        ),
        ("health_check = { path = \"/\", host = \"a b\" }", "7:37: \"a b\" is not a host name"),
        ("inspect_body = \"17MiB\"", "7:16: \"17MiB\" must be from 0 to 16MiB"),
        (
            "inspect_body = \"1 MB\"",
            "7:16: \"1 MB\" is not a number of bytes: write it as 512, 256KiB or 32MiB",
        ),
        ("inspect = 1", "7:11: \"inspect\" must be true or false, not an integer"),
        ("via = \"no\"", "7:7: \"via\" must be true or false, not a string"),
        ("host_header = \"a b\"", "7:15: \"a b\" is neither \"upstream\" nor \"preserve\" nor a host name"),
    ] {
        assert_eq!(folder.error(&tunnel(line)), format!("agentd.toml:{message}"));
    }
    assert!(
        folder.error(&tunnel("x = [")).starts_with("agentd.toml:7:6: "),
        "{}",
        folder.error(&tunnel("x = ["))
    );
    assert!(folder.error(EDGE).contains("there is no tunnel"));
    let twice = format!("{}\n[[tunnel]]\nname = \"web\"\nupstream = 1\n", tunnel(""));
    assert!(
        folder.error(&twice).starts_with("agentd.toml:10:8: tunnel web is already in"),
        "{}",
        folder.error(&twice)
    );
    let plain = tunnel("server_name = \"x\"").replace("https://app", "app:80");
    assert!(folder.error(&plain).contains("is about TLS"), "{}", folder.error(&plain));
}

#[test]
fn included_files_add_tunnels_and_nothing_else() {
    let folder = Folder::new();
    folder.write("conf.d/b.toml", "[[tunnel]]\nname = \"b2\"\nupstream = 2\n");
    folder.write("conf.d/a.toml", "[[tunnel]]\nname = \"a1\"\nupstream = 1\n");
    folder.write("conf.d/.hidden.toml", "nonsense");
    folder.write("conf.d/readme.md", "nonsense");
    let text = format!("include = [\"conf.d/*.toml\", \"none.d/*.toml\"]\n{}", tunnel(""));
    let names: Vec<_> = folder.load(&text).unwrap().tunnels.iter().map(|t| t.name.to_string()).collect();
    assert_eq!(names, ["web", "a1", "b2"]);
    folder.write("conf.d/c.toml", "[edge]\nurl = \"ws://other\"\n");
    assert!(folder.error(&text).starts_with("conf.d/c.toml:1:2: unknown key \"edge\" in an included file"));
    assert!(
        folder.error(&format!("include = [\"x.toml\"]\n{}", tunnel(""))).contains("x.toml does not exist")
    );
}

#[test]
fn a_file_that_is_named_is_a_regular_one() {
    let folder = Folder::new();
    fs::create_dir(folder.path("conf.d")).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let pipe = folder.path("conf.d/pipe.toml");
    rustix::fs::mknodat(rustix::fs::CWD, pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for include in ["conf.d/*.toml", "conf.d/pipe.toml"] {
        assert_eq!(
            folder.error(&format!("include = [\"{include}\"]\n{}", tunnel(""))),
            "cannot read the configuration conf.d/pipe.toml: it is a pipe, not a regular file"
        );
    }
    for lines in [
        "error_page = \"conf.d/pipe.toml\"",
        "ca_file = \"conf.d/pipe.toml\"",
        "basic_auth = { file = \"conf.d/pipe.toml\" }",
        "bearer = { jwks_file = \"conf.d/pipe.toml\" }",
    ] {
        let error = folder.error(&tunnel(lines));
        assert!(error.ends_with("conf.d/pipe.toml: it is a pipe, not a regular file"), "{lines}: {error}");
    }
}

#[test]
fn flags_and_environment_go_over_the_file() {
    let folder = Folder::new();
    folder.write("agentd.toml", &tunnel(""));
    let overrides = Overrides {
        edge: Some("ws://other:5/x".into()),
        token: Some("from-the-environment".into()),
        grace_period: Some(Duration::from_secs(1)),
        control_socket: Some("/run/other.sock".into()),
        status_address: Some("127.0.0.1:1".into()),
        log: LogConfig { keep_days: Some(9), ..LogConfig::default() },
        ..Overrides::default()
    };
    let config = load(&folder.path("agentd.toml"), &overrides).unwrap();
    assert_eq!(config.edge.url.to_string(), "ws://other:5/x");
    assert!(matches!(config.token_source, TokenSource::Value(_)));
    assert_eq!(config.grace_period, Duration::from_secs(1));
    assert_eq!(config.control_socket, Some("/run/other.sock".into()));
    assert_eq!((config.status_address.unwrap().port(), config.log.keep_days), (1, Some(9)));
    let outside = Overrides { status_address: Some("192.0.2.1:1".into()), ..overrides };
    assert!(load(&folder.path("agentd.toml"), &outside).is_err());
}

#[test]
fn a_systemd_credential_is_the_last_resort() {
    let folder = Folder::new();
    let text = tunnel("").replace("token_file = \"token\"\n", "");
    assert!(folder.error(&text).contains("there is no token"));
    fs::set_permissions(folder.path("token"), fs::Permissions::from_mode(0o440)).unwrap();
    folder.write("agentd.toml", &text);
    let overrides = Overrides { credentials: Some(folder.0.path().into()), ..Overrides::default() };
    assert!(load(&folder.path("agentd.toml"), &overrides).is_ok());
}

#[test]
fn the_packaged_example_shows_every_key_and_nothing_else() {
    fn keys(table: &toml::Table, found: &mut BTreeSet<String>) {
        for (key, value) in table {
            found.insert(key.clone());
            // Its keys are anybody's.
            if ["claims", "headers"].contains(&&**key)
                || (["set", "add"].contains(&&**key) && value.is_table())
            {
                continue;
            }
            let tables =
                value.as_array().into_iter().flatten().chain([value]).filter_map(toml::Value::as_table);
            tables.for_each(|table| keys(table, found));
        }
    }
    let example = include_str!("../../../systemd/agentd.toml");
    // A key that is shown in a comment follows its '#' at once; prose does not.
    let is_shown = |line: &str| line.starts_with(|first: char| first.is_ascii_lowercase() || first == '[');
    let in_force: String = example
        .lines()
        .map(|line| line.strip_prefix('#').filter(|shown| is_shown(shown)).unwrap_or(line))
        .map(|line| format!("{line}\n"))
        .collect();
    // What is about TLS means something for such an upstream only.
    let in_force = in_force.replace("http://127.0.0.1:3000", "https://127.0.0.1:3000");
    let folder = Folder::new();
    let overrides = Overrides { token_file: Some(folder.path("token")), ..Overrides::default() };
    for (name, text) in [
        ("web.htpasswd", "ann:$2y$04$DWi7TdQmTGO1gNKxlEd7jeW8k8hyJKPvQTNt9V/Yz9gNCc4xOMRY2"),
        ("oidc-secret", "secret"),
        ("session-key", "0123456789abcdef0123456789abcdef"),
        ("stripe-secret", "whsec_abc"),
        ("sorry.html", "<p>Sorry"),
    ] {
        folder.private(name, text);
    }
    for name in ["edge-ca.pem", "upstream-ca.pem", "login-ca.pem"] {
        folder.write(name, CA);
    }
    let in_force = in_force.replace("ca_file = \"/etc/agentd/", "ca_file = \"");
    fs::create_dir(folder.path("site")).unwrap();
    // Keys are in a file or at an address.
    let loaded = in_force.replace("jwks_file = ", "#");
    for text in [example, &loaded] {
        folder.write("agentd.toml", text);
        assert_eq!(load(&folder.path("agentd.toml"), &overrides).unwrap().tunnels.len(), 1);
    }
    let mut shown = BTreeSet::new();
    keys(&in_force.parse().unwrap(), &mut shown);
    let known: BTreeSet<String> = ALL_KEYS.iter().copied().flatten().map(ToString::to_string).collect();
    assert_eq!(shown, known);
}

const HASH: &str = "ann:$2y$04$DWi7TdQmTGO1gNKxlEd7jeW8k8hyJKPvQTNt9V/Yz9gNCc4xOMRY2\n";

#[test]
fn what_visitors_are_known_by_is_read_with_its_files() {
    let folder = Folder::new();
    // As an editor on Windows writes them.
    folder.private("users", &format!("\u{feff}{}", HASH.replace('\n', "\r\n")));
    folder.private("secret", "\u{feff}hook-secret\r\ntwo\r\n");
    folder.private("client", "\u{feff}client-secret\r\n");
    folder.write(
        "keys.json",
        &crate::identity::Keys::generate(crate::identity::Algorithm::Eddsa).unwrap().jwks(),
    );
    let config = folder
        .load(&tunnel(
            r#"
            allow_ips = ["10.0.0.0/8", "::1"]
            deny_ips = ["10.6.6.6"]
            basic_auth = "users"
            [tunnel.bearer]
            jwks_file = "keys.json"
            audience = "web"
            claims = { scope = "read", admin = true, level = [1, "2"] }
            [tunnel.oidc]
            issuer = "https://login.example.com"
            client_id = "id"
            client_secret_file = "client"
            allow_domains = ["@Example.com"]
            callback_tunnel = "web"
            [[tunnel.verify]]
            scheme = "github"
            secret_file = "secret"
            [[tunnel.verify]]
            scheme = "hmac"
            secret_file = "secret"
            header = "X-Signature"
            "#,
        ))
        .unwrap();
    let web = &config.tunnels[0];
    let ips = web.visitors.ips.as_ref().unwrap();
    assert_eq!((ips.allow.len(), ips.deny[0].to_string()), (2, "10.6.6.6/32".into()));
    assert!(web.visitors.basic.as_ref().unwrap().users.get("ann").is_some());
    let bearer = web.visitors.bearer.as_ref().unwrap();
    assert_eq!((&*bearer.user_claim, bearer.algorithms.len()), ("sub", visitors::ALGORITHMS.len()));
    let claims: Vec<_> =
        bearer.claims.iter().map(|(name, values)| format!("{name}={}", values.join("|"))).collect();
    assert_eq!(
        claims.iter().map(|claim| &**claim).collect::<BTreeSet<_>>(),
        ["scope=read", "admin=true", "level=1|2"].into()
    );
    let oidc = web.visitors.oidc.as_ref().unwrap();
    assert_eq!(
        (&oidc.allow.domains[..], &*oidc.scopes),
        (&["example.com".to_owned()][..], "openid email profile")
    );
    assert!(web.visitors.is_callback && oidc.session == Duration::from_secs(8 * 3600));
    assert_eq!(oidc.client_secret, Some("client-secret".into()));
    assert_eq!(web.webhooks[0].secrets, ["hook-secret".into(), "two".into()]);
    assert_eq!(web.webhooks.len(), 2);
    let shown = format!("{web:?}");
    assert!(
        !shown.contains("client-secret") && !shown.contains("$2y$") && !shown.contains("hook-secret"),
        "{shown}"
    );
}

#[test]
fn rules_about_visitors_that_mean_nothing_or_too_much_are_refused() {
    let folder = Folder::new();
    folder.private("users", HASH);
    folder.private("plain", "ann:secret\n");
    folder.private("secret", "one\n");
    folder.private("two", "one\ntwo\n");
    folder.private("empty", "\n");
    folder.write("open", HASH);
    fs::set_permissions(folder.path("open"), fs::Permissions::from_mode(0o644)).unwrap();
    folder.write("keys.json", "{}");
    let oidc = |lines: &str| {
        format!("[tunnel.oidc]\nissuer = \"https://login.example.com\"\nclient_id = \"id\"\n{lines}")
    };
    for (lines, message) in [
        ("allow_ips = []".to_owned(), "nobody would pass"),
        ("allow_ips = [\"10.0.0.1/8\"]".into(), "7:14: \"10.0.0.1/8\" has bits behind its prefix"),
        ("ip_except = [\"/x\"]".into(), "needs \"allow_ips\""),
        ("basic_auth = \"open\"".into(), "can be read by others (mode 644): run chmod 600"),
        ("basic_auth = \"plain\"".into(), "plain: line 1: its hash is neither bcrypt"),
        ("basic_auth = \"none\"".into(), "cannot read"),
        ("basic_auth = { realm = \"x\" }".into(), "has no file"),
        ("basic_auth = { file = \"users\", except = [\"webhooks\"] }".into(), "is no path"),
        ("bearer = { audience = \"x\" }".into(), "needs one of jwks_file and jwks_url"),
        ("bearer = { jwks_url = \"https://a/b\" }".into(), "has no audience"),
        ("bearer = { jwks_url = \"http://a/b\", audience = \"x\" }".into(), "use https://"),
        ("bearer = { jwks_file = \"keys.json\", audience = \"x\" }".into(), "keys.json: it is no JWK set"),
        (
            "bearer = { jwks_url = \"https://a/b\", audience = \"x\", algorithms = [\"none\"] }".into(),
            "\"none\" is no signature",
        ),
        (
            "bearer = { jwks_url = \"https://a/b\", audience = \"x\", algorithms = [\"HS256\"] }".into(),
            "\"HS256\" is no signature",
        ),
        (
            "bearer = { jwks_url = \"https://a/b\", audience = \"x\", claims = { a = [] } }".into(),
            "\"a\" allows nothing",
        ),
        (oidc(""), "must say who is let in"),
        (oidc("allow_anyone = true\nallow_groups = [\"x\"]"), "must say who is let in"),
        (oidc("allow_emails = [\"example.com\"]"), "is no email"),
        (oidc("allow_domains = [\"*.example.com\"]"), "is no domain"),
        (
            oidc("allow_anyone = true\ncallback_tunnel = \"auth\""),
            "11:19: there is no tunnel auth in this configuration: name",
        ),
        (oidc("allow_anyone = true\nclient_secret_file = \"two\""), "must hold one line"),
        (oidc("allow_anyone = true\nsession_key_file = \"secret\""), "32 characters or more"),
        ("verify = { secret_file = \"secret\" }".into(), "has no scheme"),
        ("verify = { scheme = \"paypal\", secret_file = \"secret\" }".into(), "\"paypal\" is none of github"),
        ("verify = { scheme = \"github\" }".into(), "has no secret_file"),
        ("verify = { scheme = \"github\", secret_file = \"empty\" }".into(), "is empty"),
        (
            "verify = { scheme = \"github\", secret_file = \"secret\", header = \"x\" }".into(),
            "is for scheme = \"hmac\" only",
        ),
        (
            "verify = { scheme = \"github\", secret_file = \"secret\", tolerance = \"5m\" }".into(),
            "signs no time",
        ),
        (
            "verify = { scheme = \"stripe\", secret_file = \"secret\", tolerance = \"2h\" }".into(),
            "must be from 1s to 1h",
        ),
        ("verify = { scheme = \"hmac\", secret_file = \"secret\" }".into(), "needs header"),
        ("verify = { scheme = \"standard\", secret_file = \"two\" }".into(), "base64, after whsec_"),
    ] {
        let error = folder.error(&tunnel(&lines));
        assert!(error.contains(message), "{lines}\n{error}");
    }
}

#[test]
fn faults_in_routes_and_rules_say_what_would_be_right() {
    let folder = Folder::new();
    let route = |more: &str| format!("[[tunnel.route]]\npath = \"/a\"\n{more}");
    for (tunnel, said) in [
        (
            "[[tunnel]]\nname = \"web\"\n",
            "1: tunnel web leads nowhere: add upstream = \"127.0.0.1:3000\", or a [[tunnel.route]]",
        ),
        (
            "[[tunnel]]\nname = \"web\"\nhealth_check = { path = \"/\" }\n[[tunnel.route]]\npath = \"/\"\nupstream = 1\n",
            "it has none: put it into a route",
        ),
        (
            "[[tunnel]]\nname = \"web\"\nserver_name = \"a\"\n[[tunnel.route]]\npath = \"/\"\nrespond = {}\n",
            "no upstream of web is https://",
        ),
    ] {
        let error = folder.error(&format!("{EDGE}{tunnel}"));
        assert!(error.contains(said), "{tunnel}\n{error}");
    }
    for good in [
        "[[tunnel]]\nname = \"web\"\n[[tunnel.route]]\npath = \"/\"\nrespond = {}\n",
        "[[tunnel]]\nname = \"web\"\nserver_name = \"a\"\n[[tunnel.route]]\npath = \"/\"\nupstream = \"https://127.0.0.1:1\"\n",
    ] {
        let config = folder.load(&format!("{EDGE}{good}")).unwrap();
        assert_eq!(config.tunnels[0].upstream, None);
    }
    for (rules, said) in [
        ("rout = []".to_owned(), "unknown key \"rout\" in [[tunnel]]: did you mean \"route\"?"),
        (route("upstreem = 1"), "did you mean \"upstream\"?"),
        (route(""), "a route leads to one of upstream, files, respond and redirect"),
        (route("upstream = 1\nrespond = {}"), "a route leads to one of"),
        (route("upstream = []"), "a list of upstreams must not be empty"),
        (route("upstream = [\"a b\"]"), "a b"),
        (route("files = \"nowhere\""), "cannot read"),
        (route("files = \"token\""), "is no folder"),
        (route("respond = { status = 199 }"), "\"status\" must be from 200 to 599"),
        (route("respond = { status = 204, body = \"x\" }"), "has no body"),
        (route("respond = { headers = { content-length = \"1\" } }"), "the tunnel's own affair"),
        (route("redirect = \"new\""), "leads nowhere"),
        (route("redirect = { to = \"/x\", status = 304 }"), "301, 302, 303, 307 or 308"),
        (route("redirect = { status = 301 }"), "no \"to\""),
        (route("redirect = \"/x${user\""), "without \"}\""),
        (route("respond = {}\nstrip_prefix = true"), "is for routes to upstream or files"),
        (route("respond = {}\nhealth_check = { path = \"/\" }"), "is for routes to upstream"),
        (route("upstream = 1\nstrip_prefix = \"/b\""), "is no beginning of the route's path"),
        (route("upstream = 1\nmethods = [\"get\"]"), "is no method: write it as GET"),
        (route("upstream = 1\nhost = \"a:80\""), "without a port"),
        (
            format!("{}{}", route("upstream = 1\n"), route("upstream = 2")),
            "another route has the path /a already",
        ),
        ("[[tunnel.route]]\nupstream = 1".to_owned(), "this route has no path"),
        ("[[tunnel.route]]\npath = \"a\"\nupstream = 1".to_owned(), "is no path"),
        ("[[tunnel.route]]\npath = \"/a/*\"\nupstream = 1".to_owned(), "what is below it belongs to it"),
        ("request_headers = { set = { host = \"x\" } }".to_owned(), "host is set by \"host_header\""),
        ("request_headers = { set = { x-tunnel-user = \"x\" } }".to_owned(), "the tunnel's own affair"),
        (
            "response_headers = { set = { Sec-WebSocket-Accept = \"x\" } }".to_owned(),
            "the tunnel's own affair",
        ),
        (
            "response_headers = { remove = [\"Sec-WebSocket-Protocol\"] }".to_owned(),
            "the tunnel's own affair",
        ),
        ("request_headers = { set = { a = [\"1\", \"2\"] } }".to_owned(), "further ones go into \"add\""),
        ("request_headers = { set = { a = \"${usr}\" } }".to_owned(), "${usr} in"),
        ("response_headers = { remove = [\"transfer-encoding\"] }".to_owned(), "the tunnel's own affair"),
        ("response_headers = { delete = [] }".to_owned(), "unknown key \"delete\""),
        ("cors = { methods = [\"GET\"] }".to_owned(), "this cors has no origins"),
        ("cors = { origins = [\"*\"], credentials = true }".to_owned(), "name the origins"),
        (
            "cors = { origins = [\"https://a.example\", \"null\"], credentials = true }".to_owned(),
            "name the origins",
        ),
        (route("upstream = 1\nhost = \"*.a.example\""), "is no host name"),
        ("cors = { origins = [\"https://a.example:443\"] }".to_owned(), "write it as https://a.example"),
        ("cors = { origins = [\"http://*.a.example:80\"] }".to_owned(), "write it as http://*.a.example"),
        ("cors = { origins = [\"app.example.com\"] }".to_owned(), "is no origin"),
        ("cors = { origins = [\"https://a.example/\"] }".to_owned(), "is no origin"),
        ("forwarded = \"all\"".to_owned(), "is none of \"both\""),
        ("rate_limit = { per = \"1m\" }".to_owned(), "no requests"),
        ("rate_limit = { requests = 0 }".to_owned(), "must be from 1"),
        ("rate_limit = { requests = 1, by = \"me\" }".to_owned(), "is none of \"ip\""),
        ("max_body = \"1 GB\"".to_owned(), "is no size"),
        ("circuit_breaker = { open_after = 0 }".to_owned(), "must be from 1 to 1000"),
        ("error_page = \"none.html\"".to_owned(), "cannot read"),
        ("maintenance = \"yes\"".to_owned(), "must be true or false"),
    ] {
        let error = folder.load(&tunnel(&rules)).unwrap_err();
        assert!(error.message.contains(said), "{rules}\n{}", error.message);
        assert!(error.place.is_some(), "{rules}");
    }
}

#[test]
fn what_is_kept_has_its_defaults_and_every_key() {
    let folder = Folder::new();
    let kept = |lines: &str| folder.load(&tunnel(lines)).unwrap().tunnels.remove(0).delivery;
    assert_eq!(kept(""), None);
    assert_eq!(kept("delivery = \"live\""), None);
    assert_eq!(kept("delivery = \"auto\""), Some(DeliveryPolicy::new(Mode::Auto)));
    let durable = DeliveryPolicy::new(Mode::Durable);
    assert_eq!(durable.methods, ["POST", "PUT", "PATCH", "DELETE"]);
    assert_eq!((durable.max_age_s, durable.attempts, durable.timeout_s), (3 * 24 * 3600, 10, 30));
    assert_eq!((durable.retry_unknown, durable.max_concurrent), (true, 4));
    let all = kept(
        r#"
        delivery = "durable"
        [tunnel.durable]
        methods = ["POST", "REPORT"]
        paths = ["/webhooks/", "/in"]
        max_age = "14d"
        attempts = 50
        timeout = "290s"
        retry_on = ["no_connection", 409, "5xx"]
        retry_unknown = false
        backoff = { base = "1h", max = "24h" }
        order_by = "header:X-Order"
        dedupe_by = "header:Webhook-Id"
        max_concurrent = 64
        answer = { status = 200, body = "ok", content_type = "text/plain" }
        "#,
    )
    .unwrap();
    assert_eq!(all.mode, Mode::Durable);
    assert_eq!(
        (&all.methods[..], &all.paths[..]),
        (&["POST", "REPORT"].map(String::from)[..], &["/webhooks", "/in"].map(String::from)[..])
    );
    assert_eq!((all.max_age_s, all.attempts, all.timeout_s, all.max_concurrent), (1_209_600, 50, 290, 64));
    assert_eq!(
        all.retry_on,
        RetryOn { no_connection: true, statuses: vec![StatusRule::Exact(409), StatusRule::Class(5)] }
    );
    assert_eq!((all.retry_unknown, all.backoff.base_s, all.backoff.max_s), (false, 3600, 86_400));
    assert_eq!(all.order_by, OrderBy::Header("x-order".to_owned()));
    assert_eq!(all.dedupe_by, Some(Field::Header("webhook-id".to_owned())));
    assert_eq!((all.answer.status, all.answer.body.as_deref()), (200, Some("ok")));
    for (word, order_by) in [("none", OrderBy::None), ("tunnel", OrderBy::Tunnel), ("path", OrderBy::Path)] {
        let found = kept(&format!("delivery = \"auto\"\ndurable = {{ order_by = \"{word}\" }}")).unwrap();
        assert_eq!(found.order_by, order_by);
    }
    let none = kept("delivery = \"auto\"\ndurable = { retry_on = [] }").unwrap();
    assert_eq!(none.retry_on, RetryOn { no_connection: false, statuses: Vec::new() });
}

#[test]
fn what_is_kept_is_taken_at_each_bound_and_refused_past_it() {
    let folder = Folder::new();
    let with =
        |key: &str, value: &str| tunnel(&format!("delivery = \"auto\"\ndurable = {{ {key} = {value} }}"));
    let long = |bytes: usize| format!("\"{}\"", "a".repeat(bytes));
    let path = |bytes: usize| format!("[\"/{}\"]", "a".repeat(bytes - 1));
    let paths = |count: usize| {
        format!("[{}]", (0..count).map(|n| format!("\"/p{n}\"")).collect::<Vec<_>>().join(","))
    };
    for (key, good, bad, message) in [
        ("attempts", "1", "0", "must be from 1 to 50"),
        ("attempts", "50", "51", "must be from 1 to 50"),
        ("max_age", "\"1m\"", "\"59s\"", "must be from 1m to 14d"),
        ("max_age", "\"14d\"", "\"337h\"", "must be from 1m to 14d"),
        ("timeout", "\"1s\"", "\"999ms\"", "must be from 1s to 290s"),
        ("timeout", "\"290s\"", "\"291s\"", "must be from 1s to 290s"),
        ("timeout", "\"2s\"", "\"1500ms\"", "must be whole seconds"),
        ("max_concurrent", "1", "0", "must be from 1 to 64"),
        ("max_concurrent", "64", "65", "must be from 1 to 64"),
        ("methods", "[\"POST\"]", "[]", "must not be empty"),
        ("methods", "[\"POST\"]", "[\"GET\"]", "GET asks for an answer"),
        ("methods", "[\"POST\"]", "[\"post\"]", "is no method"),
        ("paths", "[]", "[\"in\"]", "is no path"),
        ("paths", &path(256), &path(257), "at most 256 bytes, not 257"),
        ("paths", &paths(32), &paths(33), "at most 32 entries, not 33"),
        ("retry_on", "[300, 599]", "[299]", "is none of"),
        ("retry_on", "[\"4xx\"]", "[600]", "is none of"),
        ("retry_on", "[\"no_connection\"]", "[true]", "a list of texts and whole numbers"),
        ("retry_unknown", "false", "\"no\"", "must be true or false"),
        ("backoff", "{ base = \"1s\" }", "{ base = \"0s\" }", "must be from 1s to 1h"),
        ("backoff", "{ base = \"1h\", max = \"1h\" }", "{ base = \"61m\" }", "must be from 1s to 1h"),
        ("backoff", "{ max = \"24h\" }", "{ max = \"25h\" }", "must be from 1s to 24h"),
        ("backoff", "{ max = \"5s\" }", "{ max = \"4s\" }", "must not be below its \"base\""),
        ("order_by", "\"header:x\"", "\"header:\"", "is none of"),
        ("order_by", "\"path\"", "\"body\"", "is none of"),
        ("dedupe_by", "\"header:x\"", "\"webhook-id\"", "header:webhook-id"),
        ("answer", "{ status = 200 }", "{ status = 199 }", "must be from 200 to 299"),
        ("answer", "{ status = 299 }", "{ status = 300 }", "must be from 200 to 299"),
        ("answer", "{ status = 204 }", "{ status = 204, body = \"x\" }", "has no body"),
        (
            "answer",
            &format!("{{ body = {} }}", long(1000)),
            &format!("{{ body = {} }}", long(1001)),
            "longer than 1000",
        ),
        (
            "answer",
            "{ body = \"x\", content_type = \"a/b\" }",
            "{ body = \"x\", content_type = \"a\" }",
            "no media type",
        ),
        ("answer", "{ body = \"\", content_type = \"a/b\" }", "{ content_type = \"a/b\" }", "there is none"),
        ("answer", "{}", "{ stat = 1 }", "did you mean \"status\"?"),
        ("attempts", "1", "1, atempts = 1", "did you mean \"attempts\"?"),
    ] {
        let taken = folder.load(&with(key, good));
        assert!(taken.is_ok(), "{key} = {good}: {taken:?}");
        let error = folder.error(&with(key, bad));
        assert!(error.starts_with("agentd.toml:8:") && error.contains(message), "{key} = {bad}: {error}");
    }
    let error = folder.error(&tunnel("delivery = \"always\""));
    assert!(error.ends_with("\"always\" is none of \"live\", \"auto\" and \"durable\""), "{error}");
    for lines in ["durable = {}", "delivery = \"live\"\ndurable = {}"] {
        let error = folder.error(&tunnel(lines));
        assert!(error.contains("add delivery = \"auto\" or \"durable\""), "{error}");
    }
}

#[test]
fn every_file_of_certificates_is_read_with_the_configuration() {
    let folder = Folder::new();
    folder.write("ca.pem", CA);
    folder.write("broken.pem", "no certificate");
    let secure = EDGE.replace("ws://127.0.0.1:1", "wss://edge.example.com");
    let oidc = "[tunnel.oidc]\nissuer = \"https://login.example.com\"\nclient_id = \"me\"\nallow_anyone = true\nca_file = \"FILE\"";
    let bearer = "[tunnel.bearer]\njwks_url = \"https://login.example.com/keys\"\naudience = \"me\"\nca_file = \"FILE\"";
    for (text, place) in [
        (format!("{secure}ca_file = \"FILE\"\n[[tunnel]]\nname = \"web\"\nupstream = 3000\n"), "4:11"),
        (tunnel("ca_file = \"FILE\""), "7:11"),
        (tunnel(oidc), "11:11"),
        (tunnel(bearer), "10:11"),
    ] {
        let with = |file: &str| text.replace("FILE", file);
        assert_eq!(folder.load(&with("ca.pem")).map(|_| ()), Ok(()), "{text}");
        let error = folder.error(&with("missing.pem"));
        let wanted = format!("agentd.toml:{place}: cannot read certificates from missing.pem: ");
        assert!(error.starts_with(&wanted), "{error}");
        let error = folder.error(&with("broken.pem"));
        let wanted = format!("agentd.toml:{place}: broken.pem holds no certificate in PEM form");
        assert_eq!(error, wanted);
    }
    // What is not used does not stand in the way.
    assert!(folder.load(&tunnel("ca_file = \"missing.pem\"\ninsecure_skip_verify = true")).is_ok());
    assert!(folder.load(&format!("{EDGE}ca_file = \"missing.pem\"\n{}", &tunnel("")[EDGE.len()..])).is_ok());
    folder.write("agentd.toml", &format!("{secure}ca_file = \"missing.pem\"\n{}", &tunnel("")[EDGE.len()..]));
    let load = |ca_file: &str| {
        let overrides = Overrides { ca_file: Some(folder.path(ca_file)), ..Overrides::default() };
        load(&folder.path("agentd.toml"), &overrides).map(|_| ())
    };
    assert_eq!(load("ca.pem"), Ok(()));
    let error = load("missing.pem").unwrap_err();
    assert!(error.place.is_none() && error.message.starts_with("cannot read certificates"), "{error}");
}
