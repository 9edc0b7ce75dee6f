//! What the screen shows and what keys do to it. Pure: it neither reads nor draws.

use std::collections::VecDeque;

use crate::inspect::shape::{Detail, Summary};

/// How many lines of what was said are kept.
const SAID: usize = 50;

/// How many requests are listed: the newest.
pub(super) const ROWS: usize = 1000;

/// A key that somebody pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    Enter,
    Back,
    Interrupt,
    Suspend,
}

/// What a key asks for, beside another view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Everything about this request is wanted.
    Read(u64),
    /// This request is to be sent again.
    Replay(u64),
    /// The page is wanted, at this request if there is one.
    OpenPage(Option<u64>),
    /// The agent is to stop.
    Quit,
    /// The shell is wanted.
    Suspend,
}

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct View {
    /// Newest first.
    pub(super) rows: Vec<Summary>,
    /// The number of the request the cursor is on; without one it stays on the newest.
    pub(super) current: Option<u64>,
    pub(super) detail: Option<Detail>,
    /// How far the detail has been scrolled, in lines.
    pub(super) scroll: u16,
    pub(super) help: bool,
    /// What was said to whoever sits here, oldest first.
    pub(super) said: VecDeque<String>,
    /// What was just done, until the next key.
    pub(super) notice: Option<String>,
}

impl View {
    /// Begins anew with these, newest first.
    pub(super) fn show(&mut self, rows: Vec<Summary>) {
        self.rows = rows;
        self.hold();
    }

    /// Takes one in, or what is new about it.
    pub(super) fn put(&mut self, row: Summary) {
        match self.rows.binary_search_by(|own| row.id.cmp(&own.id)) {
            Ok(at) => self.rows[at] = row,
            Err(at) => self.rows.insert(at, row),
        }
        if self.rows.len() > ROWS {
            self.rows.pop();
            self.hold();
        }
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, id: u64) {
        self.rows.retain(|row| row.id != id);
        self.hold();
    }

    /// Leaves what is no longer there.
    fn hold(&mut self) {
        if self.current.is_some_and(|id| self.place(id).is_none()) {
            self.current = None;
        }
    }

    /// Takes in a line for people.
    pub(super) fn say(&mut self, line: &str) {
        for line in line.lines().filter(|line| !line.trim().is_empty()) {
            if self.said.len() == SAID {
                self.said.pop_front();
            }
            self.said.push_back(line.to_owned());
        }
    }

    fn place(&self, id: u64) -> Option<usize> {
        self.rows.iter().position(|row| row.id == id)
    }

    /// The row the cursor is on.
    pub(super) fn cursor(&self) -> Option<usize> {
        match self.current {
            Some(id) => self.place(id),
            None => (!self.rows.is_empty()).then_some(0),
        }
    }

    fn selected(&self) -> Option<u64> {
        self.detail
            .as_ref()
            .map(|detail| detail.summary.id)
            .or_else(|| Some(self.rows.get(self.cursor()?)?.id))
    }

    fn step(&mut self, by: isize) -> Option<Action> {
        let to = self.cursor()?.saturating_add_signed(by).min(self.rows.len() - 1);
        let id = self.rows[to].id;
        // At the top the cursor follows what comes.
        self.current = (to > 0).then_some(id);
        self.scroll = 0;
        self.detail.is_some().then_some(Action::Read(id))
    }

    /// Does what a key says. `page` is how many rows or lines are seen.
    pub(super) fn press(&mut self, key: Key, page: u16) -> Option<Action> {
        self.notice = None;
        if self.help && !matches!(key, Key::Interrupt | Key::Suspend) {
            self.help = false;
            return None;
        }
        let reading = self.detail.is_some();
        let half = isize::from(i16::try_from(page / 2).unwrap_or(i16::MAX)).max(1);
        match key {
            Key::Interrupt => return Some(Action::Quit),
            Key::Suspend => return Some(Action::Suspend),
            Key::Char('q') if reading => self.close(),
            Key::Char('q') => return Some(Action::Quit),
            Key::Char('h') | Key::Back => self.close(),
            Key::Char('?') => self.help = true,
            Key::Char('j') => return self.step(1),
            Key::Char('k') => return self.step(-1),
            Key::Char('g') | Key::Home => return self.step(isize::MIN),
            Key::Char('G') | Key::End => return self.step(isize::MAX),
            Key::Down if reading => self.scroll = self.scroll.saturating_add(1),
            Key::Up if reading => self.scroll = self.scroll.saturating_sub(1),
            Key::PageDown | Key::Char(' ') if reading => self.scroll = self.scroll.saturating_add(page / 2),
            Key::PageUp if reading => self.scroll = self.scroll.saturating_sub(page / 2),
            Key::Down => return self.step(1),
            Key::Up => return self.step(-1),
            Key::PageDown | Key::Char(' ') => return self.step(half),
            Key::PageUp => return self.step(-half),
            Key::Enter | Key::Char('l') => return self.selected().map(Action::Read),
            Key::Char('r') => return self.selected().map(Action::Replay),
            Key::Char('o') => return Some(Action::OpenPage(self.selected())),
            Key::Char(_) => {}
        }
        None
    }

    /// Shows everything about one.
    pub(super) fn open(&mut self, detail: Detail) {
        let id = detail.summary.id;
        if self.detail.as_ref().is_none_or(|shown| shown.summary.id != id) {
            self.scroll = 0;
        }
        self.current = (self.place(id) != Some(0)).then_some(id);
        self.detail = Some(detail);
    }

    fn close(&mut self) {
        self.detail = None;
        self.scroll = 0;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A row such as the inspector makes.
    pub(in super::super) fn row(id: u64, target: &str) -> Summary {
        Summary {
            id,
            tunnel: "web".to_owned(),
            source: "edge".to_owned(),
            kind: "http".to_owned(),
            request_id: None,
            replay_of: None,
            method: "GET".to_owned(),
            target: target.to_owned(),
            url: None,
            status: Some(200),
            answered_by: Some("upstream".to_owned()),
            state: "ended".to_owned(),
            outcome: Some("complete".to_owned()),
            error: None,
            received_at: 1_700_000_000_000_000,
            head_us: Some(1000),
            ended_us: Some(1500),
            content_type: None,
            request_bytes: 0,
            response_bytes: 12,
            frames: 0,
        }
    }

    fn view(count: u64) -> View {
        let mut view = View::default();
        view.show((1..=count).rev().map(|id| row(id, "/")).collect());
        view
    }

    fn at(view: &View) -> Option<u64> {
        view.cursor().map(|at| view.rows[at].id)
    }

    #[test]
    fn the_cursor_follows_the_newest_until_it_is_moved() {
        let mut view = view(3);
        assert_eq!(at(&view), Some(3));
        view.show((1..=4).rev().map(|id| row(id, "/")).collect());
        assert_eq!(at(&view), Some(4));
        view.press(Key::Char('j'), 10);
        assert_eq!(at(&view), Some(3));
        view.show((1..=9).rev().map(|id| row(id, "/")).collect());
        assert_eq!(at(&view), Some(3), "what somebody is on stays under them");
        view.press(Key::Char('g'), 10);
        assert_eq!(at(&view), Some(9));
        view.press(Key::Char('G'), 10);
        assert_eq!(at(&view), Some(1));
        view.press(Key::Down, 10);
        assert_eq!(at(&view), Some(1));
        view.remove(1);
        assert_eq!((at(&view), view.rows.len()), (Some(9), 8), "one that has left is not kept");
        view.put(row(10, "/"));
        view.put(Summary { status: None, ..row(5, "/") });
        let ids: Vec<u64> = view.rows.iter().map(|row| row.id).collect();
        assert_eq!(ids, [10, 9, 8, 7, 6, 5, 4, 3, 2]);
        assert!(view.rows[5].status.is_none());
        view.show(vec![row(9, "/")]);
        assert_eq!(at(&view), Some(9), "one that has left is not kept");
    }

    #[test]
    fn keys_ask_for_what_they_say() {
        let mut none = View::default();
        for key in [Key::Char('j'), Key::Enter, Key::Char('r'), Key::End, Key::PageUp] {
            assert_eq!(none.press(key, 10), None);
        }
        let mut view = view(3);
        view.press(Key::Char('j'), 10);
        assert_eq!(view.press(Key::Enter, 10), Some(Action::Read(2)));
        assert_eq!(view.press(Key::Char('r'), 10), Some(Action::Replay(2)));
        assert_eq!(view.press(Key::Char('o'), 10), Some(Action::OpenPage(Some(2))));
        assert_eq!(view.press(Key::Char('z'), 10), None);
        assert_eq!(view.press(Key::Char('?'), 10), None);
        assert!(view.help);
        assert_eq!(view.press(Key::Char('q'), 10), None, "a key closes the help and does nothing else");
        assert!(!view.help);
        assert_eq!(view.press(Key::Char('q'), 10), Some(Action::Quit));
        assert_eq!(view.press(Key::Interrupt, 10), Some(Action::Quit));
    }

    #[test]
    fn what_was_said_is_bounded() {
        let mut view = View::default();
        for number in 0..200 {
            view.say(&format!("line {number}\n\nmore"));
        }
        assert_eq!((view.said.len(), view.said.back().map(String::as_str)), (SAID, Some("more")));
    }
}
