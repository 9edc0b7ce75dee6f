//! Exit codes and messages.

use std::{
    fs::File,
    os::unix::fs::PermissionsExt as _,
    process::{Output, Stdio},
};

use crate::stage::{Agent, Edge, TOKEN, Upstream, agentd, private_file};

async fn output(args: &[&str]) -> Output {
    agentd().args(args).output().await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn wrong_usage_is_2_and_help_is_not() {
    assert_eq!(output(&["nonsense"]).await.status.code(), Some(2));
    assert_eq!(output(&["http"]).await.status.code(), Some(2));
    assert_eq!(output(&["http", "ftp://x"]).await.status.code(), Some(2));
    assert_eq!(output(&["http", "3000", "--token", "x"]).await.status.code(), Some(2));
    let version = output(&["--version"]).await;
    assert_eq!(version.status.code(), Some(0));
    assert!(text(&version.stdout).starts_with("agentd "));
    assert_eq!(output(&["--help"]).await.status.code(), Some(0));
}

#[tokio::test]
async fn a_bad_configuration_is_78_with_one_message() {
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let good = "[edge]\nurl = \"ws://127.0.0.1:1\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 3000\n";
    let bad = good.replace("upstream", "upstraem");
    let path = |name: &str| folder.path().join(name).display().to_string();
    private_file(folder.path(), "good.toml", good).unwrap();
    private_file(folder.path(), "bad.toml", &bad).unwrap();

    let checked = output(&["config", "check", "--config", &path("good.toml")]).await;
    assert_eq!((checked.status.code(), text(&checked.stderr)), (Some(0), ""));
    let wanted = format!(
        "agentd: {}:6:1: unknown key \"upstraem\" in [[tunnel]]: did you mean \"upstream\"?\n",
        path("bad.toml")
    );
    for args in [["config", "check", "--config"].as_slice(), &["run", "--config"]] {
        let refused = output(&[args, &[&path("bad.toml")]].concat()).await;
        assert_eq!((refused.status.code(), text(&refused.stderr)), (Some(78), &*wanted));
    }
    let checked = output(&["config", "check", "--json", "--config", &path("bad.toml")]).await;
    assert_eq!(checked.status.code(), Some(78));
    assert!(text(&checked.stdout).contains(r#""line":6,"column":1"#), "{}", text(&checked.stdout));
    let checked = output(&["config", "check", "--json", "--config", &path("good.toml")]).await;
    assert_eq!(
        text(&checked.stdout),
        "{\"ok\":true,\"edge\":\"ws://127.0.0.1:1/\",\"tunnels\":[{\"name\":\"web\",\"upstream\":\"http://localhost:3000\"}]}\n"
    );
    assert_eq!(output(&["run", "--config", &path("none.toml")]).await.status.code(), Some(78));
}

#[tokio::test]
async fn an_exposed_token_is_refused_with_the_command() {
    let edge = Edge::bind().await;
    let folder = tempfile::tempdir().unwrap();
    let token = private_file(folder.path(), "token", TOKEN).unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    let shown = token.display().to_string();
    let refused = output(&["http", "3000", "--edge", &edge.url, "--token-file", &shown]).await;
    assert_eq!(refused.status.code(), Some(78));
    assert_eq!(
        text(&refused.stderr),
        format!("agentd: the token file {shown} can be read by others (mode 644): run chmod 600 {shown}\n")
    );
    let refused = output(&["http", "3000", "--edge", &edge.url]).await;
    assert_eq!(refused.status.code(), Some(78));
    let refused =
        output(&["http", "3000", "--edge", &edge.url, "--token-file", &shown, "--name", "www"]).await;
    assert_eq!(refused.status.code(), Some(78));
}

#[tokio::test]
async fn a_log_that_cannot_be_in_its_folder_is_one_error() {
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let config = "[edge]\nurl = \"ws://127.0.0.1:1\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 1\n";
    let config = private_file(folder.path(), "agentd.toml", config).unwrap().display().to_string();
    let refused = output(&["run", "--config", &config, "--log-dir", &config]).await;
    assert_eq!(
        text(&refused.stderr),
        format!(
            "agentd: cannot write the log: {config} cannot be a folder for it: File exists (os error 17)\n"
        )
    );
    assert_ne!(refused.status.code(), Some(0));
}

#[tokio::test]
async fn an_output_that_cannot_be_written_is_an_error_and_a_reader_that_has_left_is_none() {
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let config = "[edge]\nurl = \"ws://127.0.0.1:1\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 1\n";
    let config = private_file(folder.path(), "agentd.toml", config).unwrap().display().to_string();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let nobody = || Stdio::from(std::io::pipe().unwrap().1);
    for args in [
        &["config", "check"][..],
        &["config", "check", "--json"],
        &["config", "explain", "https://web.example.com/"],
        &["status"],
        &["status", "--json"],
        &["tunnel", "list", "--json"],
        &["stop"],
        &["diagnose"],
    ] {
        let run = async |out: Stdio, errors: Stdio| {
            let mut asked = agentd();
            asked.args(args).args(["--config", &config]).env("AGENTD_STATE_DIR", folder.path());
            let ended = asked.stdout(out).stderr(errors).spawn().unwrap().wait_with_output().await.unwrap();
            (ended.status.code(), text(&ended.stderr).to_owned())
        };
        let usual = run(Stdio::piped(), Stdio::piped()).await;
        assert_eq!(run(nobody(), Stdio::piped()).await, usual, "{args:?}");
        let (code, said) = run(full(), Stdio::piped()).await;
        assert_eq!(code, Some(1), "{args:?}: {said}");
        assert!(
            said.starts_with("agentd: cannot write to standard output: No space left"),
            "{args:?}: {said}"
        );
        assert_eq!(run(full(), full()).await.0, Some(1), "{args:?}");
    }
    let mut refused = agentd();
    refused.args(["config", "check", "--config", "none"]).stderr(full());
    assert_eq!(refused.status().await.unwrap().code(), Some(78));
}

#[tokio::test]
async fn an_empty_variable_of_the_environment_is_one_that_is_not_set() {
    let folder = tempfile::tempdir().unwrap();
    private_file(folder.path(), "token", TOKEN).unwrap();
    let config = "[edge]\nurl = \"ws://127.0.0.1:1\"\ntoken_file = \"token\"\n[[tunnel]]\nname = \"web\"\nupstream = 1\n";
    let config = private_file(folder.path(), "agentd.toml", config).unwrap().display().to_string();
    const EMPTY: [&str; 12] = [
        "AGENTD_CA_FILE",
        "AGENTD_CONFIG",
        "AGENTD_CONTROL_SOCKET",
        "AGENTD_EDGE",
        "AGENTD_GRACE_PERIOD",
        "AGENTD_INSPECT_ADDRESS",
        "AGENTD_LOG_DIR",
        "AGENTD_LOG_FORMAT",
        "AGENTD_LOG_LEVEL",
        "AGENTD_STATE_DIR",
        "AGENTD_STATUS_ADDRESS",
        "AGENTD_TOKEN_FILE",
    ];
    let with_empty = async |args: &[&str]| {
        let asked = agentd().args(args).envs(EMPTY.map(|name| (name, ""))).output().await.unwrap();
        (asked.status.code(), format!("{}{}", text(&asked.stdout), text(&asked.stderr)))
    };
    let (code, said) = with_empty(&["config", "check", "--config", &config]).await;
    assert_eq!(code, Some(0), "{said}");
    for command in ["run", "start", "restart"] {
        let (code, said) = with_empty(&[command, "--config", "none.toml"]).await;
        assert_eq!(code, Some(78), "{command}: {said}");
        assert!(said.starts_with("agentd: cannot read the configuration none.toml: "), "{command}: {said}");
    }
    // The default of what is not named.
    let (code, said) = with_empty(&["config", "check", "--log-level", "info"]).await;
    assert!(said.contains("/etc/agentd/agentd.toml") || code == Some(0), "{said}");
    // An argument that is empty is one all the same.
    let (code, said) = with_empty(&["config", "check", "--log-level", "", "--config", &config]).await;
    assert!(code == Some(2) && said.contains("is not a level"), "{said}");

    for value in ["", "here"] {
        let mut asked = agentd();
        asked.args(["tunnel", "list", "--config", &config]);
        asked.env("XDG_RUNTIME_DIR", value).env("XDG_STATE_HOME", value);
        let asked = asked.output().await.unwrap();
        let said = text(&asked.stderr);
        let places = said.split_once("looked for ").unwrap().1.trim_end().trim_end_matches(')');
        assert!(places.split(", ").all(|place| place.starts_with('/')), "{said}");
    }
}

#[tokio::test]
async fn the_agents_own_token_is_shown_where_no_other_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    assert_eq!(output(&["keys", "new", "--out", &path("")]).await.status.code(), Some(0));
    let issue = async |owner: &str| {
        let key = path("signing-key.pem");
        let tunnel = ["--tunnel", "web", "--expires", "1h"];
        let issued =
            output(&[&["token", "issue", "--key", &key, "--owner", owner], &tunnel[..]].concat()).await;
        private_file(folder.path(), owner, text(&issued.stdout)).unwrap();
    };
    issue("me").await;
    issue("other").await;
    let shows = async |args: &[&str], variable: &str| {
        let mut shown = agentd();
        shown.args(["token", "show"]).args(args).env("AGENTD_TOKEN_FILE", variable);
        text(&shown.stdin(File::open(path("me")).unwrap()).output().await.unwrap().stdout).to_owned()
    };
    let (mine, others) = (shows(&[&path("me")], "").await, shows(&[&path("other")], "").await);
    assert!(mine.contains("me") && others.contains("other"), "{mine}{others}");
    assert_eq!(shows(&[], "").await, mine, "standard input");
    assert_eq!(shows(&["-"], &path("other")).await, mine, "standard input that is asked for");
    assert_eq!(shows(&[], &path("other")).await, others);
    assert_eq!(shows(&["--token-file", &path("other")], "").await, others);
    assert_eq!(shows(&[&path("me"), "--token-file", &path("other")], "").await, mine);
}

#[tokio::test]
async fn who_asks_how_the_agent_is_hears_of_the_one_in_the_foreground_where_there_is_no_other() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let folder = tempfile::tempdir().unwrap();
    let here = |mut command: tokio::process::Command| {
        command.env("XDG_RUNTIME_DIR", folder.path()).env("AGENTD_STATE_DIR", "").env("HOME", folder.path());
        command
    };
    let asked = async |args: &[&str]| {
        let mut command = here(agentd());
        command.args(args).args(["--config", "none.toml"]);
        let asked = command.output().await.unwrap();
        (asked.status.code(), format!("{}{}", text(&asked.stdout), text(&asked.stderr)))
    };
    let (code, said) = asked(&["status"]).await;
    assert_eq!((code, said.as_str()), (Some(1), "not running\n"));
    let mut command = here(agentd());
    command.env("AGENTD_TOKEN", TOKEN).args(["http", &upstream.port.to_string(), "--name", "web"]);
    command.args(["--no-inspect", "--edge", &edge.url]);
    let mut agent = Agent::spawn(command);
    let mut line = edge.welcome().await;
    // Its first line says that it serves.
    agent.line().await;
    for question in [&["status"][..], &["status", "--json"], &["tunnel", "list"], &["tunnel", "info", "web"]]
    {
        let (code, said) = asked(question).await;
        assert!(code == Some(0) && said.contains("web"), "{question:?} {code:?} {said}");
    }
    // A script that waits for the daemon is not told that another will do, and nobody else's is ended.
    let (code, said) = asked(&["ready"]).await;
    assert!(code == Some(1) && said.contains("no agent is running here"), "{said}");
    assert_eq!(asked(&["stop"]).await, (Some(0), "not running\n".to_owned()));
    agent.signal(rustix::process::Signal::TERM);
    line.closed().await;
    assert!(agent.exit().await.success());
    assert_eq!(asked(&["status"]).await.0, Some(1));
}
