//! What a terminal, or a reader's eye, would take for more than a letter.

/// Whether a terminal obeys a character, or it turns, joins or hides the text around it.
pub(crate) fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}')
}

/// JSON with the same value that no terminal obeys: in JSON such characters stand in strings alone.
pub(crate) fn harmless_json(text: &str) -> String {
    use std::fmt::Write as _;
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) && c != '\n' {
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_its_value_and_loses_what_is_obeyed() {
        let value =
            serde_json::json!({"a\u{9b}31m": "b\u{202e}c\u{7f}\u{61c}\u{1b}\n", "plain": "grün 日本"});
        let shown = harmless_json(&serde_json::to_string_pretty(&value).unwrap());
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
        assert!(!shown.contains(|c| is_obeyed(c) && c != '\n'), "{shown:?}");
        assert!(shown.contains("grün 日本") && shown.contains(r"\u009b31m"));
    }
}
