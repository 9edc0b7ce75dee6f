//! The screen of `agentd http` on a terminal: the list of requests, one of them whole, and what was said, with keys.
//!
//! Enters: keys, news of the ring, lines for people. Leaves: what is drawn, replays, the wish to stop. What passes the
//! agent never waits for it.

mod draw;
mod pen;
mod view;

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use crossterm::{
    cursor,
    event::{Event as TerminalEvent, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    queue, terminal,
};
use futures_util::StreamExt as _;
use ratatui::{Terminal, backend::CrosstermBackend, style::Color};
use rustix::process::Signal;
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::Instant,
};

use self::{
    pen::{Pen, Sheet},
    view::{Action, Key, ROWS, View},
};
use crate::{
    capture::ring::Event,
    inspect::api::Inspector,
    report::telemetry::{ToScreen, is_coloured},
    timer::at,
};

/// How long requests that come one after the other wait to be drawn together.
const TOGETHER: Duration = Duration::from_millis(50);

/// A terminal that is drawn on. Dropped, it is as it was, and what was said stands below what was there before.
#[derive(Debug)]
pub(crate) struct Screen {
    lines: mpsc::Receiver<String>,
    view: View,
    pen: Pen,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    ///
    /// When it can't be drawn on.
    pub(crate) fn open() -> std::io::Result<(Self, ToScreen)> {
        let mut pen = Pen::open()?;
        terminal::enable_raw_mode()?;
        pen.write(entering()?);
        let (said, lines) = ToScreen::new();
        Ok((Self { lines, view: View::default(), pen }, said))
    }

    /// Shows what `inspector` has, and does what keys say, until it is dropped. `page` is the address of the page.
    pub(crate) async fn run(mut self, inspector: Inspector, page: Option<String>) {
        let drawn = self.try_run(&inspector, page.as_deref()).await;
        if let Err(error) = drawn {
            self.view.say(&format!("the screen could not be drawn: {error}"));
        }
        drop(self);
        std::future::pending::<()>().await;
    }

    async fn try_run(&mut self, inspector: &Inspector, page: Option<&str>) -> std::io::Result<()> {
        let mut news = inspector.captures().events();
        self.view.show(inspector.newest(ROWS));
        let mut canvas = Canvas::new()?;
        let mut keys = Some(EventStream::new());
        let mut changed = BTreeSet::new();
        let mut height = 0;
        let mut drawn = Instant::now();
        let mut redraw_at = Some(drawn);
        loop {
            tokio::select! {
                written = self.pen.written(), if self.pen.is_writing() => written?,
                key = next_key(&mut keys) => {
                    if let Some(key) = key {
                        let action = self.view.press(key, height);
                        self.act(action, inspector, page)?;
                        if action == Some(Action::Suspend) {
                            self.suspend().await?;
                            canvas = Canvas::new()?;
                        }
                    }
                    redraw_at = Some(Instant::now());
                }
                event = news.recv() => {
                    match event {
                        Ok(Event::Added(id) | Event::Changed(id) | Event::Ended(id) | Event::Frame { id, .. }) => {
                            changed.insert(id);
                        }
                        Ok(Event::Piece { .. }) => continue,
                        Ok(Event::Removed(id)) => {
                            changed.remove(&id);
                            self.view.remove(id);
                        }
                        Ok(Event::Cleared) | Err(RecvError::Lagged(_)) => {
                            changed.clear();
                            self.view.show(inspector.newest(ROWS));
                        }
                        // The ring outlives the screen.
                        Err(RecvError::Closed) => return Ok(()),
                    }
                    redraw_at.get_or_insert(drawn + TOGETHER);
                }
                Some(line) = self.lines.recv() => {
                    self.view.say(&line);
                    redraw_at = Some(Instant::now());
                }
                () = at(redraw_at), if !self.pen.is_writing() => {
                    let shown = self.view.detail.as_ref().map(|detail| detail.summary.id);
                    for id in std::mem::take(&mut changed) {
                        if let Some(row) = inspector.summary(id) {
                            self.view.put(row);
                        }
                        if shown == Some(id) && let Some(detail) = inspector.masked(id) {
                            self.view.open(detail);
                        }
                    }
                    let frame;
                    (frame, height) = canvas.draw(&mut self.view)?;
                    self.pen.write(frame);
                    drawn = Instant::now();
                    redraw_at = None;
                }
            }
        }
    }

    fn act(
        &mut self,
        action: Option<Action>,
        inspector: &Inspector,
        page: Option<&str>,
    ) -> std::io::Result<()> {
        match action {
            Some(Action::Read(id)) => match inspector.masked(id) {
                Some(detail) => self.view.open(detail),
                None => self.view.notice = Some(format!("#{id} has left to make room")),
            },
            Some(Action::Replay(id)) => {
                self.view.notice = Some(match inspector.replay_unchanged(id) {
                    Ok(made) => format!("#{id} is sent again as #{made}"),
                    Err(error) => error,
                });
            }
            Some(Action::OpenPage(id)) => {
                self.view.notice = Some(match page {
                    Some(page) => {
                        open_page(&id.map_or_else(|| page.to_owned(), |id| format!("{page}/#{id}")))
                    }
                    None => "there is no page: its address could not be had".to_owned(),
                });
            }
            Some(Action::Quit) => {
                self.view.notice =
                    Some("stopping: what is in flight is finished, ctrl-c cuts it off".to_owned());
                // As the terminal would have done, had it been left to it.
                rustix::process::kill_process(rustix::process::getpid(), Signal::INT)?;
            }
            // That takes a while, so it is not done here.
            Some(Action::Suspend) | None => {}
        }
        Ok(())
    }

    /// Gives the terminal back while the process is stopped.
    async fn suspend(&mut self) -> std::io::Result<()> {
        self.pen.written().await?;
        self.pen.write(leaving()?);
        self.pen.written().await?;
        terminal::disable_raw_mode()?;
        rustix::process::kill_process(rustix::process::getpid(), Signal::TSTP)?;
        terminal::enable_raw_mode()?;
        self.pen.write(entering()?);
        self.pen.written().await
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.view.say(&line);
        }
        // A terminal that has gone needs no care. Its modes do not wait for it to take anything.
        let _ = terminal::disable_raw_mode();
        let mut last = leaving().unwrap_or_default();
        for line in &self.view.said {
            last.extend_from_slice(draw::visible(line).as_bytes());
            last.push(b'\n');
        }
        self.pen.finish(last);
    }
}

/// What has a terminal show a screen of its own.
fn entering() -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    queue!(bytes, terminal::EnterAlternateScreen, cursor::Hide)?;
    Ok(bytes)
}

/// What has it show again what was there before.
fn leaving() -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    queue!(bytes, terminal::LeaveAlternateScreen, cursor::Show)?;
    Ok(bytes)
}

/// Puts frames together.
struct Canvas {
    terminal: Terminal<CrosstermBackend<Sheet>>,
    sheet: Sheet,
    is_coloured: bool,
}

impl Canvas {
    fn new() -> std::io::Result<Self> {
        let sheet = Sheet::default();
        let terminal = Terminal::new(CrosstermBackend::new(sheet.clone()))?;
        Ok(Self { terminal, sheet, is_coloured: is_coloured() })
    }

    /// What to write for the terminal to show `view`, and how many lines it has for the list.
    fn draw(&mut self, view: &mut View) -> std::io::Result<(Vec<u8>, u16)> {
        let mut height = 0;
        self.terminal.draw(|frame| {
            height = draw::draw(frame, view);
            if !self.is_coloured {
                for cell in &mut frame.buffer_mut().content {
                    (cell.fg, cell.bg) = (Color::Reset, Color::Reset);
                }
            }
        })?;
        Ok((self.sheet.take(), height))
    }
}

/// The next key; `None` for what is none but changes what is seen. Never, once there is no keyboard any more.
async fn next_key(keys: &mut Option<EventStream>) -> Option<Key> {
    loop {
        let Some(stream) = keys else { return std::future::pending().await };
        match stream.next().await {
            Some(Ok(TerminalEvent::Key(key))) if key.kind == KeyEventKind::Release => {}
            Some(Ok(TerminalEvent::Key(key))) => {
                if let Some(key) = known(key) {
                    return Some(key);
                }
            }
            Some(Ok(_)) => return None,
            Some(Err(_)) | None => *keys = None,
        }
    }
}

const fn known(key: KeyEvent) -> Option<Key> {
    let with_control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('c') if with_control => Key::Interrupt,
        KeyCode::Char('z') if with_control => Key::Suspend,
        KeyCode::Char(c) if !with_control => Key::Char(c),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        KeyCode::Enter | KeyCode::Right => Key::Enter,
        KeyCode::Esc | KeyCode::Left | KeyCode::Backspace => Key::Back,
        _ => return None,
    })
}

/// Opens the page in the browser of whoever sits here, and says so.
fn open_page(url: &str) -> String {
    let opener = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let opened = tokio::process::Command::new(opener)
        .arg(url)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match opened {
        // It is waited for elsewhere: a browser may stay as long as it likes.
        Ok(mut browser) => {
            tokio::spawn(async move { browser.wait().await });
            format!("opened {url}")
        }
        Err(_) => format!("no browser was found here; the page is {url}"),
    }
}
