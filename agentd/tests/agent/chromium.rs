//! A real browser, driven over its debugging protocol (CDP), with as much of that as a test of a page needs.

use std::{env, path::PathBuf, process::Stdio, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{Message, protocol::WebSocketConfig},
};

use crate::stage::patiently;

/// What the page itself is asked for what it did, and told before it begins.
const WITNESS: &str = "window.violations = [];
    document.addEventListener('securitypolicyviolation', (event) => {
        violations.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
    });";

/// A browser with one page. It ends when it is dropped.
pub(crate) struct Chromium {
    process: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: String,
    last_id: u64,
    /// What happened since it was started: the protocol's events.
    pub(crate) events: Vec<Value>,
    _profile: tempfile::TempDir,
}

/// Where the browser is: `CHROMIUM`, or one of its names in `PATH`.
fn find() -> Option<PathBuf> {
    if let Some(named) = env::var_os("CHROMIUM") {
        return Some(named.into());
    }
    let path = env::var_os("PATH")?;
    let mut places =
        env::split_paths(&path).flat_map(|dir| ["chromium", "chromium-browser"].map(|name| dir.join(name)));
    places.find(|place| place.is_file())
}

impl Chromium {
    /// Starts it; `None`, said loudly, where there is none.
    pub(crate) async fn start() -> Option<Self> {
        let Some(program) = find() else {
            eprintln!(
                "SKIPPED: there is no chromium here (Debian: apt install chromium), so no page was opened"
            );
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut process = Command::new(program)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage"])
            // Whatever it may want to reach beside the page: there is nothing.
            .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
            .args(["--remote-debugging-port=0", "--window-size=1300,900"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let url = patiently("the browser's start", async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((_, url)) = line.split_once("DevTools listening on ") {
                    return url.to_owned();
                }
            }
            panic!("the browser has ended");
        })
        .await;
        // It must not stop at a pipe that is full.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (socket, _) = connect_async_with_config(url, Some(config), true).await.unwrap();
        let (session, events) = (String::new(), Vec::new());
        let mut browser = Self { process, socket, session, last_id: 0, events, _profile: profile };
        browser.new_tab().await;
        // A page nobody looks at has no focus, and keys go to what has it.
        browser.command("Emulation.setFocusEmulationEnabled", json!({"enabled": true})).await;
        Some(browser)
    }

    /// Opens a tab before the others; what is done from now on is done in it.
    pub(crate) async fn new_tab(&mut self) -> String {
        self.session.clear();
        let target = self.command("Target.createTarget", json!({"url": "about:blank"})).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = self.command("Target.attachToTarget", attach).await;
        self.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Network", "Log"] {
            self.command(&format!("{domain}.enable"), json!({})).await;
        }
        self.command("Page.addScriptToEvaluateOnNewDocument", json!({"source": WITNESS})).await;
        self.session.clone()
    }

    /// Does from now on what is done in this tab, whether it is seen or not.
    pub(crate) fn turn_to(&mut self, tab: &str) {
        tab.clone_into(&mut self.session);
    }

    /// Brings a tab before the others, and turns to it.
    pub(crate) async fn look_at(&mut self, tab: &str) {
        self.turn_to(tab);
        self.command("Page.bringToFront", json!({})).await;
    }

    /// Gives a command and waits for its result.
    pub(crate) async fn command(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let mut command = json!({"id": self.last_id, "method": method, "params": params});
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        self.socket.send(Message::text(command.to_string())).await.unwrap();
        loop {
            let message = patiently(method, self.socket.next()).await.expect("the browser is there").unwrap();
            let Message::Text(text) = message else { continue };
            let mut answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == self.last_id {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].take();
            }
            // A dialog stops the page until somebody answers.
            assert_ne!(answer["method"], "Page.javascriptDialogOpening", "{answer}");
            self.events.push(answer);
        }
    }

    /// Opens an address.
    pub(crate) async fn open(&mut self, url: &str) {
        self.command("Page.navigate", json!({"url": url})).await;
    }

    /// What an expression, or its promise, comes to.
    pub(crate) async fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let mut result = self.command("Runtime.evaluate", params).await;
        let exception = &result["exceptionDetails"];
        assert!(exception.is_null(), "{expression}: {exception}");
        result["result"]["value"].take()
    }

    /// Waits until an expression is true: it is looked at whenever the document changes.
    pub(crate) async fn wait_for(&mut self, condition: &str) {
        let promise = format!(
            "new Promise((done) => {{
                const observer = new MutationObserver(() => look());
                const late = setTimeout(() => finish(document.body.innerText), {});
                const finish = (text) => {{ observer.disconnect(); clearTimeout(late); done(text); }};
                const look = () => {{ if ({condition}) finish(''); }};
                observer.observe(document, {{subtree: true, childList: true, attributes: true, characterData: true}});
                look();
            }})",
            Duration::from_secs(15).as_millis()
        );
        let seen = self.evaluate(&promise).await;
        assert_eq!(seen, "", "never true: {condition}");
    }

    /// Presses a key that stands for itself.
    pub(crate) async fn press(&mut self, key: &str) {
        let code = i32::from(key.to_ascii_uppercase().as_bytes()[0]);
        for kind in ["keyDown", "keyUp"] {
            let mut params = json!({"type": kind, "key": key, "windowsVirtualKeyCode": code});
            if kind == "keyDown" {
                params["text"] = json!(key);
            }
            self.command("Input.dispatchKeyEvent", params).await;
        }
    }

    /// Keeps a picture of the page in the folder that `SCREENSHOTS` names, if it does.
    pub(crate) async fn picture(&mut self, name: &str) {
        let Some(folder) = env::var_os("SCREENSHOTS") else { return };
        let picture = self.command("Page.captureScreenshot", json!({"format": "png"})).await;
        let bytes = BASE64_STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        std::fs::write(PathBuf::from(folder).join(name), bytes).unwrap();
    }

    /// The addresses that were asked for.
    pub(crate) fn asked(&self) -> impl Iterator<Item = &str> {
        self.events
            .iter()
            .filter(|event| event["method"] == "Network.requestWillBeSent")
            .filter_map(|event| event["params"]["request"]["url"].as_str())
    }

    /// Ends it.
    pub(crate) async fn close(mut self) {
        self.session.clear();
        // It closes the connection instead of an answer, or before one.
        let close = json!({"id": 0, "method": "Browser.close"});
        drop(self.socket.send(Message::text(close.to_string())).await);
        patiently("the browser's end", self.process.wait()).await.unwrap();
    }
}
