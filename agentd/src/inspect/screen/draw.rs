//! Draws what the screen shows. Whatever came over the wire loses what a terminal would obey: every character that
//! cannot be seen is replaced before it is drawn.

use std::time::Duration;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Clear, Paragraph},
};

use super::view::View;
use crate::{
    inspect::shape::{self, Detail, Summary, Value},
    report::{
        access::{readable_bytes, readable_duration, time_of_day_at},
        terminal::is_obeyed,
    },
};

/// How many of the lines that were said are seen at a time.
const SAID_LINES: usize = 4;

/// How much of a body is laid out, in bytes: what one reads in a terminal. The page has all of it.
const BODY_SHOWN: usize = 16 * 1024;

const QUIET: Style = Style::new().add_modifier(Modifier::DIM);
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);

/// Text without what a terminal obeys or what turns or hides the text around it.
pub(super) fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\0'..='\u{1f}' => char::from_u32(0x2400 + u32::from(c)).unwrap_or('·'),
            '\u{7f}' => '␡',
            c if is_obeyed(c) => '·',
            other => other,
        })
        .collect()
}

/// How a request stands, in a word and a colour.
fn standing(row: &Summary) -> (String, Color) {
    match row.status {
        Some(status) if row.outcome.as_deref() != Some("failed") => {
            let colour = match status {
                _ if row.state == "open" => Color::Magenta,
                200..=299 => Color::Green,
                300..=399 => Color::Cyan,
                400..=499 => Color::Yellow,
                500.. => Color::Red,
                _ => Color::Magenta,
            };
            (status.to_string(), colour)
        }
        Some(status) => (status.to_string(), Color::Red),
        None if row.state == "open" => ("···".to_owned(), Color::Magenta),
        None if row.source == "import" => ("new".to_owned(), Color::Reset),
        None if row.outcome.as_deref() == Some("cancelled") => ("gone".to_owned(), Color::Red),
        None => ("fail".to_owned(), Color::Red),
    }
}

/// Draws all of it. The answer is how many rows or lines of the main part are seen.
pub(super) fn draw(frame: &mut Frame<'_>, view: &mut View) -> u16 {
    let said = u16::try_from(view.said.len().clamp(1, SAID_LINES)).unwrap_or(1);
    let [top, main, bottom] =
        Layout::vertical([Constraint::Length(said), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    let lines = view.said.iter().skip(view.said.len().saturating_sub(SAID_LINES));
    let lines: Vec<Line<'_>> = lines.map(|line| Line::styled(visible(line), STRONG)).collect();
    frame.render_widget(Paragraph::new(lines), top);
    let main = Rect { y: main.y + 1, height: main.height.saturating_sub(1), ..main };
    match &view.detail {
        Some(detail) => {
            let lines: Vec<_> =
                lines_of(detail).into_iter().flat_map(|line| broken(line, usize::from(main.width))).collect();
            let total = u16::try_from(lines.len()).unwrap_or(u16::MAX);
            view.scroll = view.scroll.min(total.saturating_sub(main.height));
            frame.render_widget(Paragraph::new(lines).scroll((view.scroll, 0)), main);
        }
        None => list(frame, main, view),
    }
    let keys = if view.detail.is_some() {
        "esc back  j/k next, previous  ↑/↓ scroll  r replay  o page  ? help"
    } else {
        "j/k move  enter detail  r replay  o page  q quit  ? help"
    };
    let bottom_line = match &view.notice {
        Some(notice) => Line::styled(visible(notice), Style::new().fg(Color::Yellow)),
        None => Line::styled(keys, QUIET),
    };
    frame.render_widget(bottom_line, bottom);
    if view.help {
        help(frame);
    }
    main.height
}

fn list(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let Some(cursor) = view.cursor() else {
        frame.render_widget(Line::styled("Waiting for the first request…", QUIET), area);
        return;
    };
    let height = usize::from(area.height).max(1);
    let first = (cursor + 1).saturating_sub(height);
    let several = view.rows.iter().any(|row| row.tunnel != view.rows[0].tunnel);
    let rows = view.rows.iter().enumerate().skip(first).take(height);
    let lines: Vec<Line<'_>> =
        rows.map(|(at, row)| line(row, usize::from(area.width), several, at == cursor)).collect();
    frame.render_widget(Paragraph::new(lines), area);
}

fn line(row: &Summary, width: usize, with_tunnel: bool, is_current: bool) -> Line<'static> {
    let (status, colour) = standing(row);
    let took = row.ended_us.map(readable_micros).unwrap_or_default();
    let size = match row.kind.as_str() {
        "websocket" => format!("{} msg", row.frames),
        _ => readable_bytes(row.response_bytes),
    };
    let method = if row.kind == "websocket" { "WS".to_owned() } else { visible(&row.method) };
    let replay = row.replay_of.map(|of| format!("↻{of} ")).unwrap_or_default();
    let tunnel = if with_tunnel { format!("{} ", row.tunnel) } else { String::new() };
    let error = row.error.as_ref().map(|error| format!("  {}", visible(error))).unwrap_or_default();
    // Longer ones than any terminal is wide are not measured.
    let target: String = row.target.chars().take(2 * width).collect();
    let left = width.saturating_sub(36);
    let what = fit(&format!("{tunnel}{replay}{}{error}", visible(&target)), left);
    let line = Line::from(vec![
        Span::styled(format!("{}  ", time_of_day_at(Duration::from_micros(row.received_at))), QUIET),
        Span::styled(format!("{status:<4} "), Style::new().fg(colour).add_modifier(Modifier::BOLD)),
        Span::styled(format!("{} ", fit(&method, 7)), STRONG),
        Span::raw(what),
        Span::styled(format!(" {took:>8} {size:>8}"), QUIET),
    ]);
    if is_current { line.style(Style::new().add_modifier(Modifier::REVERSED)) } else { line }
}

/// Text in exactly that many columns.
fn fit(text: &str, columns: usize) -> String {
    let mut fitted = String::new();
    let mut used = 0;
    for c in text.chars() {
        let wide = columns_of(c);
        let has_more = text.len() > fitted.len() + c.len_utf8();
        if used + wide + usize::from(has_more) > columns {
            if used < columns {
                fitted.push('…');
                used += 1;
            }
            break;
        }
        fitted.push(c);
        used += wide;
    }
    fitted.extend(std::iter::repeat_n(' ', columns.saturating_sub(used)));
    fitted
}

/// A line over as many lines as it needs, broken where they are full: what was captured has no words.
fn broken(line: Line<'static>, columns: usize) -> Vec<Line<'static>> {
    if line.width() <= columns {
        return vec![line];
    }
    let mut lines = vec![Line::default()];
    let mut used = 0;
    for span in line.spans {
        let mut part = String::new();
        for c in span.content.chars() {
            let wide = columns_of(c);
            if used + wide > columns {
                if let Some(full) = lines.last_mut() {
                    full.push_span(Span::styled(std::mem::take(&mut part), span.style));
                }
                lines.push(Line::default());
                used = 0;
            }
            part.push(c);
            used += wide;
        }
        if let Some(last) = lines.last_mut() {
            last.push_span(Span::styled(part, span.style));
        }
    }
    lines.into_iter().map(|broken| broken.style(line.style)).collect()
}

fn columns_of(c: char) -> usize {
    Span::raw(c.encode_utf8(&mut [0; 4]) as &str).width()
}

fn readable_micros(micros: u64) -> String {
    readable_duration(Duration::from_micros(micros))
}

/// Everything about one request, as lines.
fn lines_of(detail: &Detail) -> Vec<Line<'static>> {
    let row = &detail.summary;
    let (status, colour) = standing(row);
    let mut lines = vec![
        Line::from(vec![
            Span::styled(format!("{} ", visible(&row.method)), STRONG.fg(Color::Blue)),
            Span::styled(visible(&row.target.chars().take(4000).collect::<String>()), STRONG),
        ]),
        Line::from(vec![
            Span::styled(status, Style::new().fg(colour).add_modifier(Modifier::BOLD)),
            Span::styled(
                format!(
                    "  #{}  {} → {}  {}{}{}",
                    row.id,
                    row.tunnel,
                    match row.answered_by.as_deref() {
                        Some("agent") => "answered by the agent".into(),
                        _ => visible(&detail.upstream),
                    },
                    time_of_day_at(Duration::from_micros(row.received_at)),
                    row.ended_us.map(|us| format!("  {}", readable_micros(us))).unwrap_or_default(),
                    row.replay_of.map(|of| format!("  replay of #{of}")).unwrap_or_default(),
                ),
                QUIET,
            ),
        ]),
    ];
    let mut note = |text: String| lines.push(Line::styled(text, Style::new().fg(Color::Yellow)));
    if let Some(error) = &row.error {
        note(format!("It failed: {}.", visible(error)));
    }
    if detail.signature.as_ref().is_some_and(|signature| signature.too_old) {
        note(
            "The timestamp of its signature is too old for its scheme: a replay will be refused.".to_owned(),
        );
    }
    if let Some(obstacle) = &detail.replayable {
        note(format!("It cannot be replayed as it is: {}", visible(obstacle)));
    }
    if let Some(diff) = &detail.diff {
        note(match (&diff.status, diff.same) {
            (_, true) => "The answer is the same as the original's.".to_owned(),
            (Some(status), _) => {
                let named =
                    |status: Option<u16>| status.map_or("none".to_owned(), |status| status.to_string());
                format!(
                    "The answer differs from the original's: {} instead of {}; the page shows all of it.",
                    named(status.after),
                    named(status.before)
                )
            }
            (None, false) => "The answer differs from the original's; the page shows how.".to_owned(),
        });
    }
    section(&mut lines, "Request", Some(&detail.request));
    section(&mut lines, "Response", detail.response.as_ref());
    if row.kind == "websocket" {
        lines.push(Line::raw(""));
        lines.push(Line::styled("Messages", STRONG));
        for frame in detail.frames_kept.iter().rev().take(200).rev() {
            let bytes = shape::from_base64(&frame.base64).unwrap_or_default();
            let text =
                if frame.kind == "binary" { "(binary)".into() } else { String::from_utf8_lossy(&bytes) };
            let text: String = text.chars().take(200).collect();
            let arrow = if frame.direction == "to_client" { '←' } else { '→' };
            lines.push(Line::from(vec![
                Span::styled(format!("{arrow} +{:<9}", readable_micros(frame.at_us)), QUIET),
                Span::raw(visible(&text)),
            ]));
        }
    }
    lines
}

fn section(lines: &mut Vec<Line<'static>>, name: &'static str, message: Option<&shape::Message>) {
    lines.push(Line::raw(""));
    lines.push(Line::styled(name, STRONG));
    let Some(message) = message else {
        lines.push(Line::styled("none", QUIET));
        return;
    };
    for (name, value) in &message.fields {
        let value = match value {
            Value::Text(text) => visible(&text.chars().take(2000).collect::<String>()),
            Value::Masked { length, .. } => format!("•••••••• ({length} B, shown in the page)"),
            Value::Base64 { base64 } => {
                let bytes = shape::from_base64(base64).unwrap_or_default();
                visible(&String::from_utf8_lossy(&bytes))
            }
        };
        lines.push(Line::from(vec![Span::styled(format!("{}: ", visible(name)), QUIET), Span::raw(value)]));
    }
    let body = &message.body;
    if body.size == 0 {
        return;
    }
    lines.push(Line::raw(""));
    let base64 = body.decoded.as_ref().map_or(&body.base64, |decoded| &decoded.base64);
    let bytes = shape::from_base64(base64).unwrap_or_default();
    let shown = &bytes[..bytes.len().min(BODY_SHOWN)];
    if shown.contains(&0) {
        lines.push(Line::styled(
            format!("{} that are not text: the page shows them", readable_bytes(body.size)),
            QUIET,
        ));
        return;
    }
    lines.extend(
        String::from_utf8_lossy(shown).lines().map(|line| Line::raw(visible(&line.replace('\t', "    ")))),
    );
    if body.cut || body.dropped || bytes.len() > shown.len() {
        lines.push(Line::styled(format!("… of {}", readable_bytes(body.size)), QUIET));
    }
}

const HELP: [(&str, &str); 9] = [
    ("j k ↓ ↑", "next, previous request"),
    ("g G", "newest, oldest"),
    ("enter", "everything about it"),
    ("esc", "back to the list"),
    ("r", "send it to the upstream again"),
    ("o", "open the page in the browser"),
    ("q", "quit: what is in flight is finished"),
    ("ctrl-c", "the same; once more to stop at once"),
    ("ctrl-z", "to the shell, fg comes back"),
];

fn help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let (width, height) = (52.min(area.width), (HELP.len() as u16 + 2).min(area.height));
    let place = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    let lines = HELP
        .iter()
        .map(|(key, text)| Line::from(vec![Span::styled(format!(" {key:<10}"), STRONG), Span::raw(*text)]));
    frame.render_widget(Clear, place);
    let block = Block::bordered().title(" Keys ");
    frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()).block(block), place);
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::view::tests::row, *};

    fn drawn(view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal
            .draw(|frame| {
                draw(frame, view);
            })
            .unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn a_row_says_what_was_asked_and_what_came_of_it() {
        let mut view = View::default();
        view.say("https://web.example.com  ->  127.0.0.1:3000");
        view.show(vec![Summary { status: Some(500), ..row(2, "/b") }, row(1, "/a?x=1")]);
        let lines = drawn(&mut view, 80, 8);
        assert!(lines[0].starts_with("https://web.example.com"), "{lines:#?}");
        assert!(
            lines[2].contains("500  GET     /b") && lines[3].contains("200  GET     /a?x=1"),
            "{lines:#?}"
        );
        assert!(lines[7].starts_with("j/k move"), "{lines:#?}");
    }

    #[test]
    fn nothing_that_was_captured_is_obeyed_by_a_terminal() {
        let hostile = [
            "\x1b[2J\x1b[H\x1b]0;owned\x07",
            "\x1b]52;c;cm0gLXJmIC8=\x07",
            "\u{9b}31m\u{9d}0;x\u{9c}",
            "a\rb\nc\x08\x7f\0",
            "\u{202e}gpj.exe\u{2066}\u{200b}\u{feff}",
        ];
        let is_obeyed = |c: char| c.is_control() || visible(&c.to_string()) != c.to_string();
        for (at, text) in hostile.iter().enumerate() {
            let mut view = View::default();
            view.say(text);
            view.notice = Some((*text).to_owned());
            let mut bad = row(at as u64 + 1, text);
            bad.method = (*text).to_owned();
            bad.error = Some((*text).to_owned());
            view.show(vec![bad]);
            for line in drawn(&mut view, 100, 12) {
                assert!(!line.contains(is_obeyed), "{text:?} gave {line:?}");
            }
        }
    }

    #[test]
    fn every_size_of_terminal_will_do() {
        for (width, height) in [(1, 1), (2, 3), (10, 2), (40, 5), (200, 3)] {
            let mut view = View::default();
            view.show((1..100).rev().map(|id| row(id, "/漢字/ä/\u{1F600}")).collect());
            drawn(&mut view, width, height);
            view.help = true;
            drawn(&mut view, width, height);
        }
        let lines = broken(Line::from(vec![Span::raw("abc"), Span::styled("漢字e", STRONG)]), 4);
        let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["abc", "漢字", "e"]);
        assert_eq!(fit("abcdef", 4), "abc…");
        assert_eq!(
            (fit("abcd", 4), fit("a", 3), fit("漢字", 3)),
            ("abcd".into(), "a  ".into(), "漢…".into())
        );
    }
}
