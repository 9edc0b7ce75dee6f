//! The commands about deliveries that the edge keeps. They ask over the running agent's link, so they need no account and
//! reach exactly the tunnels that its token covers.
//!
//! What was sent is an attacker's: on a terminal, nothing of it is a command to the terminal.

use std::{
    fmt::Write as _,
    io::IsTerminal as _,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use clap::Args;
use http::Method;
use proto::{
    calendar,
    delivery::{Answer, Ask, State, Summary},
    id::{DeliveryId, TunnelName},
};
use serde::{Deserialize, Serialize};

use super::{
    ask::{Format, ask, complain, no_answer},
    exit,
    output::{hand_over, said, say},
    requests::{harmless, harmless_lines, json, value},
};
use crate::{
    config::parse_duration,
    control::client::{Agent, AskError},
    inspect::shape::{self, Value},
};

/// How often a tunnel that is drained is looked at: nothing tells when the edge has delivered the last one.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

// Which deliveries are listed. What is flattened has no doc comment: it would take the place of the command's own.
#[derive(Debug, Args)]
#[group(id = "listed")]
pub(crate) struct List {
    #[command(flatten)]
    of: Tunnel,
    /// Only those that are waiting, delivering, delivered, dead or cancelled.
    #[arg(long)]
    state: Option<State>,
    /// Only those that came within this time: 2h, 3d.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    since: Option<Duration>,
    /// How many at most.
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// Answer with a JSON list.
    #[arg(long)]
    json: bool,
}

// Which delivery is shown, and how much of it.
#[derive(Debug, Args)]
#[group(id = "shown")]
pub(crate) struct Show {
    /// Its id, as the sender was told in x-tunnel-delivery-id.
    id: DeliveryId,
    #[command(flatten)]
    of: Tunnel,
    /// With its body; where the output is no terminal, the body and nothing else, as it came.
    #[arg(long)]
    body: bool,
    /// With what is masked otherwise.
    #[arg(long)]
    reveal: bool,
    /// Answer with a JSON object.
    #[arg(long)]
    json: bool,
}

// Which are delivered again.
#[derive(Debug, Args)]
#[group(id = "retried", required = true, multiple = false, args = ["id", "dead"])]
pub(crate) struct Retry {
    /// This one.
    id: Option<DeliveryId>,
    /// All that are dead.
    #[arg(long)]
    dead: bool,
    #[command(flatten)]
    of: Tunnel,
    /// Answer with a JSON object.
    #[arg(long)]
    json: bool,
}

// Which is given up.
#[derive(Debug, Args)]
#[group(id = "given_up")]
pub(crate) struct Cancel {
    /// Its id.
    id: DeliveryId,
    #[command(flatten)]
    of: Tunnel,
    /// Answer with a JSON object.
    #[arg(long)]
    json: bool,
}

// What is waited for.
#[derive(Debug, Args)]
#[group(id = "drained")]
pub(crate) struct Drain {
    #[command(flatten)]
    of: Tunnel,
    /// How long to wait for it; alone, for as long as it takes.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "36500d", value_parser = parse_duration)]
    wait: Option<Duration>,
}

// Whose deliveries.
#[derive(Debug, Args)]
#[group(id = "whose")]
pub(crate) struct Tunnel {
    /// Those of one tunnel that the token covers. Default: all tunnels of this agent.
    #[arg(long, value_name = "NAME")]
    tunnel: Option<TunnelName>,
}

/// What is answered where something was done.
#[derive(Serialize)]
struct Done {
    done: u32,
}

/// Asks the edge one question; `query` says how the agent shows the answer.
async fn answered(agent: &mut Agent, ask: &Ask, query: &str) -> Result<Bytes, AskError> {
    let path = format!("/api/deliveries{query}");
    agent.inspect(Method::POST, &path, "application/json", json(ask).into_bytes()).await
}

fn read<'a, T: Deserialize<'a>>(answer: &'a [u8]) -> Result<T, AskError> {
    serde_json::from_slice(answer).map_err(|error| misunderstood(&error.to_string()))
}

/// One question to the edge.
async fn question(agent: &mut Agent, ask: &Ask) -> Result<Answer<'static>, AskError> {
    let answer = answered(agent, ask, "").await?;
    Ok(read::<Answer<'_>>(&answer)?.into_owned())
}

/// One delivery, and a piece of its body.
struct Piece {
    summary: Summary,
    fields: Vec<(String, Value)>,
    bytes: Vec<u8>,
    more: Option<u64>,
}

/// Asks for one delivery; its secrets are masked unless they are to be revealed.
async fn piece(agent: &mut Agent, ask: &Ask, reveal: bool) -> Result<Piece, AskError> {
    let answer = answered(agent, ask, if reveal { "?reveal=true" } else { "" }).await?;
    let shape::Delivery { summary, headers, body, more } = read(&answer)?;
    let bytes = match body {
        Some(body) => body.decode().map_err(|error| misunderstood(&error.to_string()))?,
        None => Vec::new(),
    };
    Ok(Piece { summary: *summary, fields: headers, bytes, more })
}

fn misunderstood(what: &str) -> AskError {
    AskError::Refused(format!("the edge's answer is not understood: {what}"))
}

/// The tunnels that are meant.
async fn tunnels(agent: &mut Agent, of: &Tunnel) -> Result<Vec<TunnelName>, AskError> {
    if let Some(tunnel) = &of.tunnel {
        return Ok(vec![tunnel.clone()]);
    }
    // What was kept before a tunnel became live is there still.
    let all = agent.status().await?.tunnels.into_iter();
    Ok(all.filter_map(|tunnel| tunnel.name.parse().ok()).collect())
}

fn finish<T>(answer: Result<T, AskError>, format: Format, print: impl FnOnce(T) -> ExitCode) -> ExitCode {
    match answer {
        Ok(answer) => said(print(answer)),
        Err(error) => {
            let is_unreachable = matches!(&error, AskError::Unreachable(_));
            let code = no_answer(&error, format);
            if is_unreachable { ExitCode::from(exit::EDGE_UNREACHABLE) } else { code }
        }
    }
}

/// Every delivery that is wanted, page by page, to at most `most`; and whether there are more.
async fn rows(
    agent: &mut Agent,
    of: &Tunnel,
    state: Option<State>,
    since_ms: Option<u64>,
    most: usize,
) -> Result<(Vec<Summary>, bool), AskError> {
    let mut found = Vec::new();
    let mut cursor = None;
    loop {
        let ask = Ask::List { tunnel: of.tunnel.clone(), state, open: false, since_ms, cursor };
        let Answer::Deliveries { list, cursor: next } = question(agent, &ask).await? else {
            return Err(misunderstood("a list was asked for"));
        };
        found.extend(list);
        let is_more = found.len() > most;
        if next.is_none() || is_more {
            found.truncate(most);
            return Ok((found, is_more));
        }
        cursor = next;
    }
}

/// `agentd delivery list`
pub(crate) fn list(places: &[PathBuf], wanted: &List) -> ExitCode {
    let List { of, state, since, limit, json: is_json } = wanted;
    let (format, limit) = (Format::from_flag(*is_json), *limit as usize);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since_ms = since.as_ref().map(|since| now.saturating_sub(*since).as_millis() as u64);
    let answer = ask(places, async |agent: &mut Agent| rows(agent, of, *state, since_ms, limit).await);
    finish(answer, format, |(all, is_more)| {
        match format {
            Format::Json => say(&json(&all)),
            Format::Text if all.is_empty() => say("nothing is kept"),
            Format::Text => all.iter().for_each(|row| say(&line(row))),
        }
        if is_more {
            complain(format_args!(
                "there are more than {limit}: raise --limit, or narrow it with --state or --since"
            ));
        }
        ExitCode::SUCCESS
    })
}

/// Asks about each of the tunnels that are meant, until one knows the delivery.
async fn first<T>(
    agent: &mut Agent,
    of: &Tunnel,
    about: impl AsyncFn(&mut Agent, TunnelName) -> Result<T, AskError>,
) -> Result<(TunnelName, T), AskError> {
    let mut refused = None;
    for tunnel in tunnels(agent, of).await? {
        match about(agent, tunnel.clone()).await {
            Ok(answer) => return Ok((tunnel, answer)),
            Err(AskError::NotFound(error)) => refused = Some(AskError::NotFound(error)),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| AskError::NotFound("there is no such delivery".to_owned())))
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    delivery: &'a Summary,
    headers: &'a [(String, Value)],
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
}

/// `agentd delivery show`
pub(crate) fn show(places: &[PathBuf], wanted: &Show) -> ExitCode {
    let Show { id, of, body, reveal, json: is_json } = wanted;
    let (with_body, format) = (*body, Format::from_flag(*is_json));
    let answer = ask(places, async |agent: &mut Agent| {
        let from = async |agent: &mut Agent, tunnel, body_from| {
            piece(agent, &Ask::Show { tunnel, id: id.clone(), body_from }, *reveal).await
        };
        let begin = with_body.then_some(0);
        let about = async |agent: &mut Agent, tunnel| from(agent, tunnel, begin).await;
        let (tunnel, mut whole) = first(agent, of, about).await?;
        while let Some(next) = whole.more.filter(|_| with_body) {
            let piece = from(agent, tunnel.clone(), Some(next)).await?;
            whole.bytes.extend(piece.bytes);
            // One that does not come nearer to the end has none.
            if piece.more.is_some_and(|after| after <= next) {
                return Err(misunderstood("its body has no end"));
            }
            whole.more = piece.more;
        }
        Ok(whole)
    });
    finish(answer, format, |Piece { summary: row, fields: headers, bytes, .. }| {
        // It goes when it was delivered or cancelled, if need be while it is read.
        let is_gone = with_body && (bytes.len() as u64) < row.body_bytes;
        let body = (with_body && !is_gone).then_some(&bytes);
        match format {
            Format::Json => {
                let body = body.map(|bytes| shape::to_base64(bytes));
                say(&json(&Shown { delivery: &row, headers: &headers, body }));
            }
            Format::Text if with_body && !std::io::stdout().is_terminal() => {
                hand_over(body.map_or(&[], |bytes| bytes));
            }
            Format::Text => say(text(&row, &headers, body).trim_end()),
        }
        if is_gone {
            complain("its body is kept no more");
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    })
}

/// `agentd delivery retry`
pub(crate) fn retry(places: &[PathBuf], retry: &Retry) -> ExitCode {
    let format = Format::from_flag(retry.json);
    match &retry.id {
        Some(id) => one(places, &retry.of, format, "is delivered again", |tunnel| Ask::Retry {
            tunnel,
            id: id.clone(),
        }),
        None => retry_dead(places, &retry.of, format),
    }
}

/// `agentd delivery cancel`
pub(crate) fn cancel(places: &[PathBuf], cancel: &Cancel) -> ExitCode {
    let ask = |tunnel| Ask::Cancel { tunnel, id: cancel.id.clone() };
    one(places, &cancel.of, Format::from_flag(cancel.json), "is cancelled", ask)
}

/// `agentd delivery pause`
pub(crate) fn pause(places: &[PathBuf], tunnel: TunnelName) -> ExitCode {
    switch(places, Ask::Pause { tunnel }, "paused: what comes is kept until it is resumed")
}

/// `agentd delivery resume`
pub(crate) fn resume(places: &[PathBuf], tunnel: TunnelName) -> ExitCode {
    switch(places, Ask::Resume { tunnel }, "resumed")
}

fn one(
    places: &[PathBuf],
    of: &Tunnel,
    format: Format,
    what: &str,
    about: impl Fn(TunnelName) -> Ask,
) -> ExitCode {
    let answer = ask(places, async |agent: &mut Agent| {
        first(agent, of, async |agent: &mut Agent, tunnel| question(agent, &about(tunnel)).await).await
    });
    finish(answer, format, |(tunnel, _)| {
        match format {
            Format::Json => say(&json(&Done { done: 1 })),
            Format::Text => say(&format!("{tunnel}: it {what}")),
        }
        ExitCode::SUCCESS
    })
}

fn retry_dead(places: &[PathBuf], of: &Tunnel, format: Format) -> ExitCode {
    let answer = ask(places, async |agent: &mut Agent| {
        let mut all = 0;
        for tunnel in tunnels(agent, of).await? {
            let mut cursor = None;
            loop {
                let ask = Ask::RetryDead { tunnel: tunnel.clone(), cursor };
                let answer = match question(agent, &ask).await {
                    // One of the agent's that the edge has not given it.
                    Err(AskError::NotFound(_)) if of.tunnel.is_none() => break,
                    answer => answer?,
                };
                let Answer::Done { count, cursor: next } = answer else {
                    return Err(misunderstood("a number was asked for"));
                };
                all += count;
                cursor = next;
                if cursor.is_none() {
                    break;
                }
            }
        }
        Ok(all)
    });
    finish(answer, format, |done| {
        match format {
            Format::Json => say(&json(&Done { done })),
            Format::Text => say(&format!("{done} are delivered again")),
        }
        ExitCode::SUCCESS
    })
}

fn switch(places: &[PathBuf], about: Ask, what: &str) -> ExitCode {
    let answer = ask(places, async |agent: &mut Agent| question(agent, &about).await);
    finish(answer, Format::Text, |_| {
        say(what);
        ExitCode::SUCCESS
    })
}

/// How many deliveries have not ended, as far as one page tells, and whether there may be more.
async fn pending(agent: &mut Agent, of: &Tunnel) -> Result<(usize, bool), AskError> {
    let mut next = None;
    loop {
        // All in one question: one that goes from one state to the other between two would be in neither answer.
        let ask =
            Ask::List { tunnel: of.tunnel.clone(), state: None, open: true, since_ms: None, cursor: next };
        let Answer::Deliveries { list, cursor } = question(agent, &ask).await? else {
            return Err(misunderstood("a list was asked for"));
        };
        // An edge of an earlier release lists the others as well.
        let count = list.iter().filter(|row| !row.state.is_final()).count();
        // A page without anything need not be the last.
        if count > 0 || cursor.is_none() {
            return Ok((count, cursor.is_some()));
        }
        next = cursor;
    }
}

/// `agentd delivery drain`: code 0 once nothing waits.
pub(crate) fn drain(places: &[PathBuf], Drain { of, wait }: &Drain) -> ExitCode {
    let patience = wait.unwrap_or_default();
    let answer = ask(places, async |agent: &mut Agent| {
        let begun = tokio::time::Instant::now();
        loop {
            let looked = pending(agent, of).await;
            let is_known = match &looked {
                Ok((left, _)) => *left == 0,
                Err(error) => !error.may_pass(),
            };
            if is_known || begun.elapsed() + LOOK_AGAIN > patience {
                return looked;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    });
    finish(answer, Format::Text, |(left, is_more)| {
        if left == 0 {
            say("nothing waits");
            return ExitCode::SUCCESS;
        }
        let more = if is_more { "at least " } else { "" };
        complain(format_args!("{more}{left} deliveries have not ended"));
        ExitCode::FAILURE
    })
}

/// One row.
fn line(row: &Summary) -> String {
    let mut line = format!(
        "{}  {}  {}  {:<10} {:>2}  {:<6} {}",
        row.id,
        calendar::rfc3339(row.received_ms),
        row.tunnel,
        row.state.as_str(),
        row.attempt,
        harmless(&row.method),
        harmless(&row.target),
    );
    if let Some(last) = &row.last {
        let _ = write!(line, "  ({})", harmless(&last.reason));
    }
    line
}

/// All of one.
fn text(row: &Summary, fields: &[(String, Value)], body: Option<&Vec<u8>>) -> String {
    let mut text = format!("{}\n", line(row));
    if let Some(run) = &row.run {
        let _ = writeln!(text, "       run {}", harmless(run));
    }
    let _ = writeln!(text, "\n{} {}", harmless(&row.method), harmless(&row.target));
    for (name, of) in fields {
        let _ = writeln!(text, "  {}: {}", harmless(name), value(of));
    }
    let _ = writeln!(text, "  ({} bytes)", row.body_bytes);
    if let Some(bytes) = body {
        let _ = writeln!(text, "\n{}", harmless_lines(bytes));
    }
    text
}
