//! The manual page of `agentd.toml`, made from the packaged example: what explains a key there explains it here.

use std::fmt::Write as _;

use super::LINE_BYTES;

/// Every key of the configuration with its explanation.
const EXAMPLE: &str = include_str!("../../../../systemd/agentd.toml");

/// The title of the keys that are in no table.
const TOP: &str = "Of the agent";

/// A line of the example, as it is meant.
enum Line<'a> {
    /// A sentence or a part of one.
    Prose(&'a str),
    /// `[table]` or `[[table]]`.
    Table(&'a str),
    /// `key = value`, with the key.
    Key(&'a str, &'a str),
    /// The end of a paragraph.
    Break,
}

/// A key that is shown in a comment follows its `#` at once; prose does not.
fn read(line: &str) -> Line<'_> {
    let shown = line.strip_prefix('#').unwrap_or(line);
    match (shown.chars().next(), shown.split_once(" = ")) {
        (Some('['), _) => Line::Table(shown),
        (Some(first), Some((key, _))) if first.is_ascii_lowercase() => Line::Key(key, shown),
        _ if shown.trim().is_empty() => Line::Break,
        _ => Line::Prose(shown.trim_start()),
    }
}

/// Some keys with what is said of them all.
#[derive(Default)]
struct Entry<'a> {
    prose: Vec<&'a str>,
    keys: Vec<&'a str>,
    lines: Vec<&'a str>,
}

/// A table: its name, what is said of it, and its keys.
struct Section<'a> {
    title: &'a str,
    prose: Vec<&'a str>,
    entries: Vec<Entry<'a>>,
}

impl<'a> Section<'a> {
    const fn new(title: &'a str, prose: Vec<&'a str>) -> Self {
        Self { title, prose, entries: Vec::new() }
    }

    fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.keys.contains(&key))
    }
}

/// The introduction, then the tables in their order. A table that is shown again adds the keys that it has not had yet.
fn sections(example: &str) -> (Vec<&str>, Vec<Section<'_>>) {
    let (mut introduction, mut sections) = (Vec::new(), vec![Section::new(TOP, Vec::new())]);
    let (mut at, mut entry) = (0, Entry::default());
    for line in example.lines() {
        match read(line) {
            Line::Prose(text) => {
                if !entry.keys.is_empty() {
                    sections[at].entries.push(std::mem::take(&mut entry));
                }
                entry.prose.push(text);
            }
            Line::Key(key, line) => {
                if !sections[at].has(key) {
                    entry.keys.push(key);
                    entry.lines.push(line);
                }
            }
            Line::Table(title) => {
                let said = std::mem::take(&mut entry);
                // What is said of no key is about the table that follows.
                let prose = if said.keys.is_empty() {
                    said.prose
                } else {
                    sections[at].entries.push(said);
                    Vec::new()
                };
                at = sections.iter().position(|section| section.title == title).unwrap_or(sections.len());
                if at == sections.len() {
                    sections.push(Section::new(title, prose));
                }
            }
            Line::Break if !entry.keys.is_empty() => {
                sections[at].entries.push(std::mem::take(&mut entry));
            }
            // What is said before any key is about the file.
            Line::Break if at == 0 && sections[0].entries.is_empty() => introduction.append(&mut entry.prose),
            Line::Break => {}
        }
    }
    if !entry.keys.is_empty() {
        sections[at].entries.push(entry);
    }
    (introduction, sections)
}

/// The page's source; `heading` is what `.TH` says after name and section.
pub(super) fn page(heading: &str) -> String {
    let (introduction, sections) = sections(EXAMPLE);
    let mut page =
        format!(".TH AGENTD.TOML 5 {heading}\n.SH NAME\nagentd.toml \\- configuration of the tunnel agent\n");
    page.push_str(".SH SYNOPSIS\n.B /etc/agentd/agentd.toml\n.SH DESCRIPTION\n");
    // Its first line is a title.
    text(&mut page, &introduction[1..]);
    page.push_str(".PP\nThe values below are examples.\n");
    page.push_str(".SH SETTINGS\n");
    for Section { title, prose, entries } in sections {
        let _ = writeln!(page, ".SS {}", escape(title));
        text(&mut page, &prose);
        for Entry { prose, keys, lines } in entries {
            let names: Vec<_> = keys.iter().map(|key| format!("\\fB{}\\fR", escape(key))).collect();
            let _ = writeln!(page, ".TP\n{}", names.join(", "));
            text(&mut page, &prose);
            page.push_str(if prose.is_empty() { ".nf\n" } else { ".sp\n.nf\n" });
            for line in lines {
                verbatim(&mut page, line);
            }
            page.push_str(".fi\n");
        }
    }
    page.push_str(
        ".SH FILES\n.TP\n.B /etc/agentd/agentd.toml\nthe configuration of agentd.service\n.TP\n\
         .B /etc/agentd/NAME.toml\nthat of the instance agentd@NAME.service\n.TP\n\
         .B /usr/share/doc/agentd/examples/agentd.toml\nevery key at its place\n.SH SEE ALSO\n.BR agentd (8),\n\
         .BR agentd\\-config (8),\n.BR agentd\\-config\\-check (8),\n.BR agentd\\-config\\-explain (8)\n",
    );
    page
}

/// Prose, filled.
fn text(page: &mut String, prose: &[&str]) {
    if !prose.is_empty() {
        let _ = writeln!(page, "{}", escape(&prose.join(" ")));
    }
}

/// One line as it is; only its source is broken, between words, where it is long.
fn verbatim(page: &mut String, line: &str) {
    let mut length = 0;
    for word in escape(line).split_inclusive(' ') {
        if length > 0 && length + word.len() >= LINE_BYTES {
            page.push_str("\\\n");
            length = 0;
        }
        page.push_str(word);
        length += word.len();
    }
    page.push('\n');
}

fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('…', "...");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::ALL_KEYS;

    #[test]
    fn the_page_explains_every_key() {
        let page = page("\"\" \"\" \"\"").replace("\\\n", "").replace("\\-", "-").replace("\\fR", "\\fB");
        let names: BTreeSet<&str> = page
            .lines()
            .filter(|line| line.starts_with("\\fB"))
            .flat_map(|line| line.split("\\fB").skip(1).step_by(2))
            .collect();
        let is_named = |key: &str| {
            // A key of a table of its own, or one inside a value that is shown.
            names.contains(key)
                || page.lines().any(|line| {
                    line.strip_prefix(".SS [").is_some_and(|title| {
                        title.trim_end_matches(']').trim_start_matches('[').split('.').next_back()
                            == Some(key)
                    })
                })
                || page.contains(&format!("{{ {key} = "))
                || page.contains(&format!(", {key} = "))
        };
        let missing: Vec<_> = ALL_KEYS.iter().copied().flatten().filter(|key| !is_named(key)).collect();
        assert!(missing.is_empty(), "{missing:?}\n{page}");
        // Every entry says something, or is of a table that does.
        let (introduction, sections) = sections(EXAMPLE);
        assert!(introduction.len() > 2, "{introduction:?}");
        let silent: Vec<_> = sections
            .iter()
            .flat_map(|section| &section.entries)
            .filter(|entry| entry.prose.is_empty())
            .flat_map(|entry| &entry.keys)
            .collect();
        assert!(silent.is_empty(), "{silent:?}");
    }

    #[test]
    fn a_table_that_is_shown_twice_is_one() {
        let example = "# About.\n\n# One.\n#a = 1\nb = 2\n# T.\n#[[t]]\n# C.\n#c = 3\n#[[t]]\n#c = 4\n# D.\n#d = \"\\\\-\"\n";
        let (introduction, sections) = sections(example);
        assert_eq!(introduction, ["About."]);
        let shown: Vec<_> = sections
            .iter()
            .map(|section| {
                let keys = section.entries.iter().map(|entry| (entry.prose.join(" "), entry.keys.join(" ")));
                (section.title, section.prose.join(" "), keys.collect::<Vec<_>>())
            })
            .collect();
        let entry = |prose: &str, keys: &str| (prose.to_owned(), keys.to_owned());
        assert_eq!(
            shown,
            [
                (TOP, String::new(), vec![entry("One.", "a b")]),
                ("[[t]]", "T.".to_owned(), vec![entry("C.", "c"), entry("D.", "d")]),
            ]
        );
        let mut line = String::new();
        verbatim(&mut line, &"word ".repeat(30));
        assert!(line.lines().all(|line| line.len() <= LINE_BYTES), "{line}");
        assert_eq!(line.replace("\\\n", ""), format!("{}\n", "word ".repeat(30)));
    }
}
