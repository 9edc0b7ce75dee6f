//! `agentd http` on a terminal: the list of requests, keys, and lines for whoever wants lines. The terminal is a real
//! one (a pseudo-terminal) with an emulator behind it, so what is looked at is what a person would see.

use std::{
    fs::{File, OpenOptions, Permissions},
    io::{Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use tokio::{
    process::Child,
    sync::{Mutex, watch},
};

use crate::{
    inspector::hostile,
    stage::{Edge, Manners, OK, TOKEN, Upstream, agentd, patiently, request, with_body, with_header},
};

/// A terminal with `agentd http` in it.
struct Sitting {
    keyboard: File,
    seen: watch::Receiver<Seen>,
    child: Child,
    folder: tempfile::TempDir,
    /// Who holds it keeps the terminal from being read.
    reading: Arc<Mutex<()>>,
}

#[derive(Clone, Default)]
struct Seen {
    /// Everything that was written.
    raw: Vec<u8>,
    screen: Arc<str>,
}

impl Sitting {
    fn start(edge: &Edge, upstream: &Upstream, more: &[&str]) -> Self {
        Self::start_in(edge, upstream, &[], more)
    }

    /// The same with more in its environment.
    fn start_in(edge: &Edge, upstream: &Upstream, environment: &[(&str, &str)], more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // No browser of whoever runs the tests is to open.
        let opener = folder.path().join("xdg-open");
        std::fs::write(&opener, "#!/bin/sh\nprintf %s \"$1\" >\"$(dirname \"$0\")/opening\"\nmv \"$(dirname \"$0\")/opening\" \"$(dirname \"$0\")/opened\"\n").unwrap();
        std::fs::set_permissions(&opener, Permissions::from_mode(0o700)).unwrap();

        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        tcsetwinsize(&master, Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::NOCTTY.bits() as i32;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(name.to_str().unwrap())
            .unwrap();
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = agentd();
        command.env("AGENTD_TOKEN", TOKEN).env("TERM", "xterm-256color").env("PATH", path);
        command.env("AGENTD_CONTROL_SOCKET", folder.path().join("control.sock"));
        command.args(["http", &upstream.port.to_string(), "--name", "web", "--edge", &edge.url]);
        command.args(["--inspect-address", "127.0.0.1:0"]).args(more).envs(environment.iter().copied());
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let child = command.spawn().unwrap();
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().unwrap();
        let (say, seen) = watch::channel(Seen::default());
        let reading = Arc::new(Mutex::new(()));
        let may_read = Arc::clone(&reading);
        std::thread::spawn(move || {
            let mut emulator = vt100::Parser::new(24, 100, 0);
            let mut bytes = [0; 4096];
            // The last end of the other side is an error here.
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                emulator.process(&bytes[..count]);
                say.send_modify(|seen| {
                    seen.raw.extend_from_slice(&bytes[..count]);
                    seen.screen = emulator.screen().contents().into();
                });
                drop(may_read.blocking_lock());
            }
        });
        Self { keyboard, seen, child, folder, reading }
    }

    /// Waits for what is to be seen, and returns all of it.
    async fn sees(&mut self, what: &str) -> Arc<str> {
        let shown = self.seen.wait_for(|seen| seen.screen.contains(what));
        let screen = match tokio::time::timeout(Duration::from_secs(15), shown).await {
            Ok(Ok(seen)) => Some(Arc::clone(&seen.screen)),
            _ => None,
        };
        screen.unwrap_or_else(|| panic!("{what:?} is never seen on:\n{}", self.seen.borrow().screen))
    }

    /// Waits until something and a whole line behind it have been written; what stands behind it.
    async fn writes(&mut self, what: &str) -> String {
        let behind = |seen: &Seen| {
            let raw = String::from_utf8_lossy(&seen.raw).into_owned();
            raw.rsplit_once(what).map(|(_, behind)| behind.to_owned()).filter(|behind| behind.contains('\n'))
        };
        let written = self.seen.wait_for(|seen| behind(seen).is_some());
        let seen = patiently(what, written).await.expect("the terminal is read to its end").clone();
        behind(&seen).unwrap()
    }

    fn signal(&self, what: Signal) {
        signal(&self.child, what);
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn raw(&self) -> String {
        String::from_utf8_lossy(&self.seen.borrow().raw).into_owned()
    }
}

fn signal(child: &Child, what: Signal) {
    let pid = Pid::from_raw(child.id().unwrap() as i32).unwrap();
    kill_process(pid, what).unwrap();
}

#[tokio::test]
async fn keys_move_read_replay_open_and_quit() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let mut sitting = Sitting::start(&edge, &upstream, &[]);
    let mut line = edge.welcome_with(Manners::default()).await;
    sitting.sees("Waiting for the first request").await;
    let banner = sitting.sees("every request, to look at").await;
    let page =
        banner.lines().find_map(|line| line.split_whitespace().find(|word| word.starts_with("http://127.")));
    let page = page.expect("the page's address").to_owned();

    for target in ["/one", "/two", "/three"] {
        let sent = with_header(with_body(request("POST", target), b"a body"), "x-seen", b"here");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.bytes(6).await;
        peer.write(OK).await;
        drop(peer);
        line.whole(&sent).await;
        sitting.sees(target).await;
    }
    sitting.press(b"j\r");
    let detail = sitting.sees("x-seen: here").await;
    assert!(detail.contains("POST /two") && detail.contains("a body"), "{detail}");
    sitting.press(b"k");
    sitting.sees("POST /three").await;
    sitting.press(b"jr");
    let mut peer = upstream.accept().await;
    let head = peer.head().await;
    assert!(head.contains("POST /two ") && head.contains("x-tunnel-replay: 2"), "{head}");
    peer.bytes(6).await;
    peer.write(OK).await;
    drop(peer);
    sitting.sees("#2 is sent again as #4").await;
    sitting.press(b"q");
    sitting.sees("↻2 /two").await;
    sitting.press(b"go");
    sitting.sees(&format!("opened {page}/#4")).await;
    sitting.press(b"?");
    sitting.sees("once more to stop at once").await;
    sitting.press(b"?");

    // What a terminal obeys is shown, not obeyed.
    let before = sitting.raw().len();
    for (number, case) in hostile().iter().enumerate() {
        let field: Vec<u8> =
            case.iter().copied().filter(|byte| *byte >= b' ' && *byte != 0x7f).take(4000).collect();
        let sent = with_header(with_body(request("POST", &format!("/h{number}")), case), "x-hostile", &field);
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.bytes(case.len()).await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-hostile: ", case.len());
        peer.write(&[head.as_bytes(), &field, b"\r\n\r\n", case].concat()).await;
        drop(peer);
        line.whole(&sent).await;
        sitting.sees(&format!("/h{number} ")).await;
        sitting.press(b"\r");
        sitting.sees(&format!("POST /h{number}")).await;
        sitting.press(b"\x1b[6~q");
        sitting.sees("enter detail").await;
    }
    let written = sitting.raw()[before..].to_owned();
    // Strings, titles, the clipboard, bells, other character sets: nothing here ever says these.
    for obeyed in [
        "\x1b]", "\x1bP", "\x1b_", "\x1b^", "\x1b(", "\x07", "\x08", "\0", "\u{9b}", "\u{9d}", "\u{202e}",
        "\x1b[2J",
    ] {
        assert!(!written.contains(obeyed), "{obeyed:?} was written");
    }

    sitting.press(b"q");
    let ended = patiently("the end of the agent", async {
        line.closed().await;
        sitting.child.wait().await
    });
    assert!(ended.await.unwrap().success());
    let opened = std::fs::read_to_string(sitting.folder.path().join("opened")).unwrap();
    assert_eq!(opened, format!("{page}/#4"));
    let modes = tcgetattr(&sitting.keyboard).unwrap().local_modes;
    assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON), "the terminal is as it was");
    let left = sitting.writes("\x1b[?1049l").await;
    assert!(
        left.contains("->  http://127.0.0.1:") || left.contains("->  http://localhost:"),
        "what was said stays: {left:?}"
    );
}

#[tokio::test]
async fn a_terminal_that_nobody_reads_holds_up_nothing() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let mut sitting = Sitting::start(&edge, &upstream, &[]);
    let mut line = edge.welcome_with(Manners::default()).await;
    sitting.sees("Waiting for the first request").await;
    let reading = Arc::clone(&sitting.reading);
    for round in 0..2 {
        let stopped = reading.lock().await;
        // Several times what a terminal holds: help covers most of the screen, and comes and goes.
        for number in 0..150 {
            sitting.press(b"?");
            let sent = request("GET", &format!("/r{round}-{number}"));
            line.request(&sent).await;
            let mut peer = upstream.accept().await;
            peer.head().await;
            peer.write(OK).await;
            drop(peer);
            line.whole(&sent).await;
        }
        if round == 0 {
            drop(stopped);
            // The latest are shown; what is seen of them may be half of a picture that is being drawn.
            sitting.sees("/r0-149").await;
            sitting.sees("/r0-140").await;
            continue;
        }
        // The end does not wait for it either.
        sitting.press(b"q");
        let ended = patiently("the end of the agent", async {
            line.closed().await;
            sitting.child.wait().await
        });
        assert!(ended.await.unwrap().success());
        let modes = tcgetattr(&sitting.keyboard).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON), "the terminal is as it was");
        drop(stopped);
    }
}

#[tokio::test]
async fn whoever_wants_lines_gets_the_lines_of_a_pipe() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    let mut sitting = Sitting::start(&edge, &upstream, &["--plain"]);
    let mut line = edge.welcome_with(Manners::default()).await;
    let sent = request("GET", "/plain");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    peer.write(OK).await;
    line.whole(&sent).await;
    sitting.sees("GET /plain  2 B").await;
    let raw = sitting.raw();
    let lines: Vec<&str> = raw.lines().collect();
    assert_eq!(lines.len(), 2, "{raw:?}");
    assert!(lines[0].starts_with("http") && lines[0].contains("  ->  "), "{raw:?}");
    assert!(!raw.contains('\x1b'), "{raw:?}");
}

/// Nobody who asks for no colour gets any, and a terminal that obeys nothing gets nothing to obey.
#[tokio::test]
async fn colours_and_the_screen_are_for_terminals_that_want_them() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    const COLOUR: &str = "\x1b[38;5;";
    for (environment, more, is_screen, is_coloured) in [
        (&[][..], &[][..], true, true),
        (&[("NO_COLOR", "1")], &[], true, false),
        (&[("NO_COLOR", "")], &[], true, true),
        (&[("TERM", "dumb")], &[], false, false),
        (&[("AGENTD_LOG_LEVEL", "debug")], &["--plain"], false, true),
        (&[("AGENTD_LOG_LEVEL", "debug"), ("NO_COLOR", "1")], &["--plain"], false, false),
        (&[("AGENTD_LOG_LEVEL", "debug"), ("TERM", "dumb")], &[], false, false),
    ] {
        let mut sitting = Sitting::start_in(&edge, &upstream, environment, more);
        let mut line = edge.welcome_with(Manners::default()).await;
        let sent = request("GET", "/coloured");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        peer.write(OK).await;
        drop(peer);
        line.whole(&sent).await;
        sitting.sees("/coloured").await;
        sitting.signal(Signal::TERM);
        let ended = patiently("the end of the agent", async {
            line.closed().await;
            sitting.child.wait().await
        });
        assert!(ended.await.unwrap().success());
        let raw = sitting.raw();
        assert_eq!(raw.contains("\x1b[?1049h"), is_screen, "{environment:?} {raw:?}");
        let has_colour = if is_screen { raw.contains(COLOUR) } else { raw.contains('\x1b') };
        assert_eq!(has_colour, is_coloured, "{environment:?} {raw:?}");
    }
}

/// A terminal that closes ends what it was opened for, in order; whoever has that ignored goes on.
#[tokio::test]
async fn a_terminal_that_closes_ends_the_agent_as_a_signal_does() {
    let (edge, upstream) = (Edge::bind().await, Upstream::bind().await);
    for more in [&[][..], &["--plain"]] {
        let runtime = tempfile::tempdir().unwrap();
        let own = runtime.path().join("agentd");
        let mut sitting = Sitting::start_in(
            &edge,
            &upstream,
            &[("XDG_RUNTIME_DIR", runtime.path().to_str().unwrap()), ("AGENTD_CONTROL_SOCKET", "")],
            more,
        );
        let mut line = edge.welcome_with(Manners::default()).await;
        let sent = request("GET", "/slow");
        line.request(&sent).await;
        let mut peer = upstream.accept().await;
        peer.head().await;
        assert_eq!(std::fs::read_dir(&own).unwrap().count(), 2, "a socket and its lock");
        // More than once, as a shell and the kernel say it: what is in flight is waited for all the same.
        sitting.signal(Signal::HUP);
        line.expect_hello().await;
        sitting.signal(Signal::HUP);
        peer.write(OK).await;
        drop(peer);
        line.whole(&sent).await;
        let ended = patiently("the end of the agent", async {
            line.closed().await;
            sitting.child.wait().await
        });
        assert!(ended.await.unwrap().success(), "{more:?}");
        assert_eq!(std::fs::read_dir(&own).unwrap().count(), 0, "{more:?}");
    }

    // As `nohup` starts it.
    let mut command = tokio::process::Command::new("sh");
    command
        .env_clear()
        .env("AGENTD_TOKEN", TOKEN)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_agentd"), "http"]);
    command.args([&upstream.port.to_string(), "--name", "web", "--edge", &edge.url, "--no-inspect"]);
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    let mut line = edge.welcome_with(Manners::default()).await;
    signal(&child, Signal::HUP);
    let sent = request("GET", "/on");
    line.request(&sent).await;
    let mut peer = upstream.accept().await;
    peer.head().await;
    peer.write(OK).await;
    drop(peer);
    line.whole(&sent).await;
    signal(&child, Signal::TERM);
    let ended = patiently("the end of the agent", async {
        line.closed().await;
        child.wait().await
    });
    assert!(ended.await.unwrap().success());
}
