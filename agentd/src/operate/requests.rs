//! The commands about captured requests. They ask the running agent's inspector over its control socket.
//!
//! What was captured is an attacker's: on a terminal, nothing of it is a command to the terminal.

use std::{
    fmt::Write as _,
    fs::OpenOptions,
    io::{IsTerminal as _, Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use http::Method;
use http_body_util::BodyExt as _;
use serde::Serialize;
use tokio::{io::Interest, net::unix::pipe::Sender};

use super::{
    ask::{Format, ask, complain, no_answer},
    output::{hand_over, is_unsaid, said, say, unsaid, write},
};
use crate::{
    control::client::{Agent, AskError},
    inspect::shape::{self, Detail, DiffShape, Ids, List, Message, RequestEvent, Summary, Value},
    report::{
        access::{readable_duration, time_of_day_at},
        terminal::{harmless_json, is_obeyed},
    },
};

/// How long a replay is waited for at a time, in seconds.
const WAIT: u32 = 30;

// Which requests are wanted. What is flattened has no doc comment: it would take the place of the command's own.
#[derive(Debug, Args)]
#[group(id = "wanted")]
pub(crate) struct Wanted {
    /// Those of one tunnel.
    #[arg(long, value_name = "NAME")]
    tunnel: Option<String>,
    /// Methods with commas.
    #[arg(long)]
    method: Option<String>,
    /// A part of the target; with * the whole path.
    #[arg(long)]
    path: Option<String>,
    /// 404, 5xx, 400-499, or several with commas.
    #[arg(long)]
    status: Option<String>,
    /// Text in target, fields or bodies.
    #[arg(long)]
    text: Option<String>,
    /// Those that failed, or were answered with 400 and above.
    #[arg(long)]
    errors: bool,
}

impl Wanted {
    /// As the parameters of a query.
    fn query(&self) -> form_urlencoded::Serializer<'static, String> {
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (name, value) in [
            ("tunnel", &self.tunnel),
            ("method", &self.method),
            ("path", &self.path),
            ("status", &self.status),
            ("text", &self.text),
        ] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        if self.errors {
            query.append_pair("errors", "true");
        }
        query
    }
}

// What to send again, and how.
#[derive(Debug, Args)]
#[group(id = "again")]
pub(crate) struct Replay {
    /// Its number in the list.
    id: u64,
    /// How often, one after the other.
    #[arg(long, value_name = "NUMBER", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=100))]
    times: u32,
    /// Another method.
    #[arg(long)]
    method: Option<String>,
    /// Another path and query.
    #[arg(long)]
    target: Option<String>,
    /// A header field, instead of all of its name: 'name: value'.
    #[arg(long, value_name = "FIELD")]
    set: Vec<String>,
    /// The name of a header field to leave out.
    #[arg(long, value_name = "NAME")]
    remove: Vec<String>,
    /// Another body: text, or @FILE, or @- for standard input.
    #[arg(long, value_name = "TEXT")]
    data: Option<String>,
}

// What to write where.
#[derive(Debug, Args)]
#[group(id = "what", required = true, multiple = false)]
pub(crate) struct Form {
    /// A HAR 1.2 file, which only its owner can read; - for standard output.
    #[arg(long, value_name = "FILE")]
    har: Option<PathBuf>,
    /// A curl command line that sends the same request.
    #[arg(long, value_name = "ID")]
    curl: Option<u64>,
}

// What to export.
#[derive(Debug, Args)]
#[group(id = "exported")]
pub(crate) struct Export {
    #[command(flatten)]
    form: Form,
    /// Numbers in the list. Default: all that are wanted.
    #[arg(value_name = "ID")]
    ids: Vec<u64>,
    #[command(flatten)]
    wanted: Wanted,
    /// With what is masked otherwise.
    #[arg(long)]
    reveal: bool,
}

// What to read.
#[derive(Debug, Args)]
#[group(id = "from", required = true, multiple = false)]
pub(crate) struct Source {
    /// A HAR file; - for standard input.
    #[arg(long, value_name = "FILE")]
    har: Option<PathBuf>,
    /// A file with a curl command line; - for standard input.
    #[arg(long, value_name = "FILE")]
    curl: Option<PathBuf>,
}

// What to import.
#[derive(Debug, Args)]
#[group(id = "imported")]
pub(crate) struct Import {
    #[command(flatten)]
    from: Source,
    /// Whose upstream they are for. Default: the only tunnel that is inspected.
    #[arg(long, value_name = "NAME")]
    tunnel: Option<String>,
}

fn read<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, AskError> {
    serde_json::from_slice(bytes)
        .map_err(|error| AskError::Refused(format!("the agent's answer is not understood: {error}")))
}

async fn get(agent: &mut Agent, path: &str) -> Result<bytes::Bytes, AskError> {
    agent.inspect(Method::GET, path, "text/plain", Vec::new()).await
}

/// Prints an answer that is there, or why there is none.
fn finish<T>(answer: Result<T, AskError>, format: Format, print: impl FnOnce(T) -> ExitCode) -> ExitCode {
    match answer {
        Ok(answer) => said(print(answer)),
        Err(error) => no_answer(&error, format),
    }
}

/// `agentd requests`
pub(crate) fn list(
    places: &[PathBuf],
    wanted: &Wanted,
    limit: u32,
    follow: bool,
    format: Format,
) -> ExitCode {
    let answer = ask(places, async |agent: &mut Agent| {
        let mut query = wanted.query();
        query.append_pair("limit", &limit.to_string());
        // What comes while the list is read is in the events: they are asked for first.
        let events = if follow { Some(follow_events(places, wanted).await?) } else { None };
        let list: List = read(&get(agent, &format!("/api/requests?{}", query.finish())).await?)?;
        let shown = list.requests.iter().filter(|row| !follow || row.state == "ended");
        match (format, follow) {
            (Format::Json, false) => say(&json(&list.requests)),
            (Format::Json, true) => shown.rev().for_each(|row| say(&json(row))),
            (Format::Text, _) => shown.rev().for_each(|row| say(&line(row))),
        }
        if let Some(mut events) = events.filter(|_| !is_unsaid()) {
            let last = list.requests.first().map_or(0, |row| row.id);
            let known: Vec<u64> =
                list.requests.iter().filter(|row| row.state == "ended").map(|row| row.id).collect();
            let is_news = |row: &Summary| !(row.id <= last && known.contains(&row.id));
            tokio::select! {
                ended = events.print(format, is_news) => ended?,
                () = reader_leaves() => {}
            }
        }
        Ok(())
    });
    finish(answer, format, |()| ExitCode::SUCCESS)
}

/// Waits until nobody reads standard output any more. A write would tell, but what is followed may not come for long.
async fn reader_leaves() {
    // A file cannot be waited for, and nobody leaves it. Nothing is written here, so it may block as it did.
    if let Ok(out) = std::io::stdout().as_fd().try_clone_to_owned()
        && let Ok(out) = Sender::from_owned_fd_unchecked(out)
        && out.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// The events of the agent at one of `places`.
struct Events {
    body: hyper::body::Incoming,
    pending: Vec<u8>,
    /// Keeps the connection.
    _agent: Agent,
}

async fn follow_events(places: &[PathBuf], wanted: &Wanted) -> Result<Events, AskError> {
    let mut agent = Agent::find(places).await?;
    let body = agent.follow(&format!("/api/events?{}", wanted.query().finish())).await?;
    Ok(Events { body, pending: Vec::new(), _agent: agent })
}

impl Events {
    /// Prints each request when it has ended, until the agent ends or nobody reads any more.
    async fn print(&mut self, format: Format, is_news: impl Fn(&Summary) -> bool) -> Result<(), AskError> {
        while let Some(frame) = self.body.frame().await {
            let Ok(frame) = frame else { break };
            self.pending.extend_from_slice(frame.data_ref().map(|data| &data[..]).unwrap_or_default());
            while let Some(end) = self.pending.windows(2).position(|end| end == b"\n\n") {
                let event: Vec<u8> = self.pending.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&event);
                let Some(data) = text.strip_prefix("event: request\ndata: ") else {
                    if text.starts_with("event: lagged") {
                        complain("some requests went by too fast to be listed here");
                    }
                    continue;
                };
                let event: RequestEvent = read(data.as_bytes())?;
                if let Some(row) = event.request.filter(|row| event.change == "ended" && is_news(row)) {
                    let printed = match format {
                        Format::Json => print(&json(&row)),
                        Format::Text => print(&line(&row)),
                    };
                    if let Err(error) = printed {
                        unsaid(&error);
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

/// `agentd request show`
pub(crate) fn show(places: &[PathBuf], id: u64, body: bool, reveal: bool, format: Format) -> ExitCode {
    let reveal = if reveal { "?reveal=true" } else { "" };
    let path = format!("/api/requests/{id}{reveal}");
    let answer = ask(places, async |agent: &mut Agent| get(agent, &path).await);
    let answer = answer.and_then(|bytes| Ok((read::<Detail>(&bytes)?, bytes)));
    finish(answer, format, |(detail, bytes)| {
        let to_terminal = std::io::stdout().is_terminal();
        if format == Format::Json {
            say(harmless_json(&String::from_utf8_lossy(&bytes)).trim_end());
        } else if body && !to_terminal {
            let bytes = detail.response.as_ref().and_then(|answer| shape::from_base64(&answer.body.base64));
            hand_over(&bytes.unwrap_or_default());
            if detail.response.is_some_and(|answer| answer.body.cut) {
                complain("the body goes on: only its beginning was kept");
                return ExitCode::FAILURE;
            }
        } else {
            say(text(&detail, body).trim_end());
        }
        ExitCode::SUCCESS
    })
}

/// What a replay is told, as JSON.
#[derive(Serialize)]
struct Edits<'a> {
    times: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<&'a str>,
    set: Vec<(&'a str, Value)>,
    remove: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<NewBody>,
}

#[derive(Serialize)]
struct NewBody {
    base64: String,
}

/// `agentd replay`
pub(crate) fn replay(places: &[PathBuf], replay: &Replay, format: Format) -> ExitCode {
    let edits = match edits(replay) {
        Ok(edits) => json(&edits).into_bytes(),
        Err(error) => {
            complain(error);
            return ExitCode::from(super::exit::USAGE);
        }
    };
    let answer = ask(places, async |agent: &mut Agent| {
        let path = format!("/api/requests/{}/replay", replay.id);
        let Ids { ids } = read(&agent.inspect(Method::POST, &path, "application/json", edits).await?)?;
        let mut replays: Vec<Detail> = Vec::with_capacity(ids.len());
        for id in ids {
            let detail: Detail = loop {
                let detail: Detail = read(&get(agent, &format!("/api/requests/{id}?wait={WAIT}")).await?)?;
                if detail.summary.state == "ended" {
                    break detail;
                }
            };
            if format == Format::Text {
                say(&line(&detail.summary));
                if let Some(diff) = &detail.diff {
                    say(difference(diff).trim_end());
                }
            }
            replays.push(detail);
        }
        Ok(replays)
    });
    finish(answer, format, |replays| {
        if format == Format::Json {
            say(&json(&replays));
        }
        let answered = replays.iter().all(|replay| replay.summary.outcome.as_deref() == Some("complete"));
        if answered { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

fn edits(replay: &Replay) -> Result<Edits<'_>, String> {
    let set = replay.set.iter().map(|field| {
        let (name, value) =
            field.split_once(':').ok_or(format!("--set {field:?}: write it as 'name: value'"))?;
        Ok((name.trim(), Value::Text(value.trim().to_owned())))
    });
    let body = match &replay.data {
        None => None,
        Some(data) => Some(match data.strip_prefix('@') {
            Some(file) => input(Path::new(file)).map_err(|error| format!("--data @{file}: {error}"))?,
            None => data.clone().into_bytes(),
        }),
    };
    Ok(Edits {
        times: replay.times,
        method: replay.method.as_deref(),
        target: replay.target.as_deref(),
        set: set.collect::<Result<_, String>>()?,
        remove: &replay.remove,
        body: body.map(|body| NewBody { base64: shape::to_base64(&body) }),
    })
}

fn input(file: &Path) -> std::io::Result<Vec<u8>> {
    if file == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    std::fs::read(file)
}

/// `agentd export`
pub(crate) fn export(places: &[PathBuf], export: &Export) -> ExitCode {
    let mut query = export.wanted.query();
    if export.reveal {
        query.append_pair("reveal", "true");
    }
    let path = match export.form.curl {
        Some(id) => format!("/api/requests/{id}/curl{}", if export.reveal { "?reveal=true" } else { "" }),
        None => {
            if !export.ids.is_empty() {
                let ids: Vec<_> = export.ids.iter().map(u64::to_string).collect();
                query.append_pair("ids", &ids.join(","));
            }
            format!("/api/har?{}", query.finish())
        }
    };
    let answer = ask(places, async |agent: &mut Agent| get(agent, &path).await);
    finish(answer, Format::Text, |bytes| {
        match &export.form.har {
            Some(file) if file != Path::new("-") => {
                if let Err(error) = private(file, &bytes) {
                    complain(format!("{}: {error}", file.display()));
                    return ExitCode::FAILURE;
                }
            }
            Some(_) if std::io::stdout().is_terminal() => {
                hand_over(harmless_json(&String::from_utf8_lossy(&bytes)).as_bytes());
            }
            _ => hand_over(&bytes),
        }
        ExitCode::SUCCESS
    })
}

/// Writes a file that only its owner can read, also where it was there before.
fn private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    file.set_len(0)?;
    file.write_all(bytes)
}

/// `agentd import`
pub(crate) fn import(places: &[PathBuf], import: &Import) -> ExitCode {
    let (file, kind) = match (&import.from.har, &import.from.curl) {
        (Some(file), _) => (file, "application/json"),
        (None, Some(file)) => (file, "text/plain"),
        (None, None) => return ExitCode::from(super::exit::USAGE),
    };
    let body = match input(file) {
        Ok(body) => body,
        Err(error) => {
            complain(format!("{}: {error}", file.display()));
            return ExitCode::FAILURE;
        }
    };
    let mut query = form_urlencoded::Serializer::new(String::new());
    if let Some(tunnel) = &import.tunnel {
        query.append_pair("tunnel", tunnel);
    }
    let path = format!("/api/import?{}", query.finish());
    let answer = ask(places, async |agent: &mut Agent| {
        read::<Ids>(&agent.inspect(Method::POST, &path, kind, body).await?)
    });
    finish(answer, Format::Text, |Ids { ids }| {
        ids.iter().for_each(|id| say(&id.to_string()));
        ExitCode::SUCCESS
    })
}

pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> String {
    harmless_json(&serde_json::to_string(value).expect("texts, numbers and lists are JSON"))
}

/// Prints a line; an error where nobody reads any more.
fn print(line: &str) -> std::io::Result<()> {
    write(&format!("{line}\n"))
}

/// A text without anything that a terminal takes for a command, or that turns letters around.
pub(super) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Several lines, each harmless.
pub(super) fn harmless_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.split('\n').map(|line| {
        let line = line.strip_suffix('\r').unwrap_or(line);
        line.split('\t').map(harmless).collect::<Vec<_>>().join("\t")
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn duration(us: Option<u64>) -> String {
    us.map_or_else(|| "-".to_owned(), |us| readable_duration(Duration::from_micros(us)))
}

/// One row.
fn line(row: &Summary) -> String {
    let status = row.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    let mut line = format!(
        "{:>5}  {}  {}  {:<7} {status:>3}  {:>8}  {}",
        row.id,
        time_of_day_at(Duration::from_micros(row.received_at)),
        harmless(&row.tunnel),
        harmless(&row.method),
        duration(row.ended_us),
        harmless(&row.target),
    );
    let how = match (row.state.as_str(), row.outcome.as_deref()) {
        ("open", _) => Some("open".to_owned()),
        (_, Some("cancelled")) => Some("cancelled".to_owned()),
        _ => row.error.clone(),
    };
    if let Some(how) = how {
        let _ = write!(line, "  ({how})");
    }
    if let Some(original) = row.replay_of {
        let _ = write!(line, "  (replay of {original})");
    }
    line
}

pub(super) fn value(value: &Value) -> String {
    match value {
        Value::Text(text) => harmless(text),
        Value::Masked { length, .. } => format!("*** ({length} bytes, --reveal shows them)"),
        Value::Base64 { base64 } => {
            let bytes = shape::from_base64(base64).unwrap_or_default();
            bytes.escape_ascii().to_string()
        }
    }
}

fn message(text: &mut String, message: &Message, with_body: bool) {
    for (name, of) in &message.fields {
        let _ = writeln!(text, "  {}: {}", harmless(name), value(of));
    }
    let body = &message.body;
    if body.size == 0 {
        return;
    }
    let cut = if body.cut { format!(", {} of them kept", body.kept) } else { String::new() };
    let _ = writeln!(text, "  ({} bytes{cut})", body.size);
    if with_body {
        let shown = body.decoded.as_ref().map_or(&body.base64, |decoded| &decoded.base64);
        let bytes = shape::from_base64(shown).unwrap_or_default();
        let _ = match std::str::from_utf8(&bytes) {
            Ok(_) => writeln!(text, "\n{}\n", harmless_lines(&bytes)),
            Err(_) => writeln!(text, "\n{}\n", hex(&bytes)),
        };
    }
}

/// Sixteen bytes a line.
fn hex(bytes: &[u8]) -> String {
    let lines = bytes.chunks(16).enumerate().map(|(number, chunk)| {
        let digits: Vec<_> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
        let letters: String = chunk
            .iter()
            .map(|&byte| if (b' '..=b'~').contains(&byte) { byte as char } else { '.' })
            .collect();
        format!("{:08x}  {:<47}  {letters}", number * 16, digits.join(" "))
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn difference(diff: &DiffShape) -> String {
    let mut text = String::new();
    if diff.same {
        text.push_str("       the same answer as before\n");
    }
    if let Some(error) = &diff.error {
        let named = |error: &Option<String>| error.as_deref().map_or("none".to_owned(), harmless);
        let _ = writeln!(text, "       error {} -> {}", named(&error.before), named(&error.after));
    }
    if let Some(status) = &diff.status {
        let say = |status: Option<u16>| status.map_or_else(|| "none".to_owned(), |status| status.to_string());
        let _ = writeln!(text, "       status {} -> {}", say(status.before), say(status.after));
    }
    for field in &diff.fields {
        let say = |values: &[Value]| values.iter().map(value).collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            text,
            "       {}: {} -> {}",
            harmless(&field.name),
            say(&field.before),
            say(&field.after)
        );
    }
    for change in &diff.body.json {
        let say = |text: &Option<String>| text.as_deref().map_or_else(|| "nothing".to_owned(), harmless);
        let _ = writeln!(
            text,
            "       {}: {} -> {}",
            harmless(&change.pointer),
            say(&change.before),
            say(&change.after)
        );
    }
    if diff.body.json_more > 0 {
        let _ = writeln!(text, "       and {} more places in the body", diff.body.json_more);
    }
    match &*diff.body.kind {
        "bytes" => text.push_str("       the body is another\n"),
        "unknown" => text.push_str("       the bodies are as long as each other and not kept whole\n"),
        _ => {}
    }
    text
}

/// All of one.
fn text(detail: &Detail, with_bodies: bool) -> String {
    let row = &detail.summary;
    let mut text = format!("{}\n", line(row));
    if let Some(url) = &row.url {
        let to = if detail.upstream.is_empty() { "the agent itself" } else { &detail.upstream };
        let _ = writeln!(text, "       {} -> {}", harmless(url), harmless(to));
    }
    if let Some(id) = &row.request_id {
        let _ = writeln!(text, "       request id {id}");
    }
    let times = &detail.times;
    let _ = writeln!(
        text,
        "       connected {}, head {}, first byte {}, last byte {}, end {}",
        duration(times.connected_us),
        duration(times.head_us),
        duration(times.first_byte_us),
        duration(times.last_byte_us),
        duration(times.ended_us)
    );
    if let Some(signature) = &detail.signature
        && signature.too_old
    {
        let _ = writeln!(
            text,
            "       its {} signature is older than {} s: what checks it will refuse a replay",
            signature.scheme, signature.tolerance_s
        );
    }
    if let Some(obstacle) = &detail.replayable {
        let _ = writeln!(text, "       not to be replayed: {}", harmless(obstacle));
    }
    if let Some(diff) = &detail.diff {
        text.push_str(&difference(diff));
    }
    let _ = writeln!(text, "\n{} {}", harmless(&row.method), harmless(&row.target));
    message(&mut text, &detail.request, with_bodies);
    if let Some(answer) = &detail.response {
        let _ = writeln!(text, "\n{}", row.status.unwrap_or_default());
        message(&mut text, answer, with_bodies);
    }
    if detail.frames_dropped > 0 {
        let _ = writeln!(text, "\n({} messages before these are not kept)", detail.frames_dropped);
    }
    for frame in &detail.frames_kept {
        let arrow = if frame.direction == "to_upstream" { "->" } else { "<-" };
        let bytes = shape::from_base64(&frame.base64).unwrap_or_default();
        let what =
            if frame.kind == "binary" { bytes.escape_ascii().to_string() } else { harmless_lines(&bytes) };
        let code = frame.code.map(|code| format!(" {code}")).unwrap_or_default();
        let kept = if frame.cut { format!(", {} of them kept", bytes.len()) } else { String::new() };
        let _ = writeln!(
            text,
            "{arrow} {:>9}  {}{code} ({} bytes{kept})  {what}",
            duration(Some(frame.at_us)),
            frame.kind,
            frame.size
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_a_command_to_a_terminal() {
        for (text, shown) in [
            ("plain ä 漢", "plain ä 漢"),
            ("\x1b[2J", "\\u{1b}[2J"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\r\nb\x07\x08", "a\\u{d}\\u{a}b\\u{7}\\u{8}"),
            ("\u{202e}exe.png", "\\u{202e}exe.png"),
            ("\u{200b}\u{feff}\0", "\\u{200b}\\u{feff}\\u{0}"),
        ] {
            assert_eq!(harmless(text), shown);
        }
        assert_eq!(harmless_lines(b"a\tb\r\n\x1bc\xff"), "a\tb\n\\u{1b}c\u{fffd}");
        assert_eq!(hex(b"AB\x1b"), "00000000  41 42 1b                                         AB.");
    }
}
