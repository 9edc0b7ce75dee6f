//! The words that DynamoDB keeps for itself: enters a request, leaves the first of them that one of its
//! expressions uses as the name of an attribute. The emulation underneath takes them, AWS does not.

use std::{borrow::Cow, collections::BTreeSet, sync::LazyLock};

use serde::Deserialize;

/// DynamoDB Developer Guide, "Reserved words in DynamoDB".
static WORDS: LazyLock<BTreeSet<&'static str>> =
    LazyLock::new(|| include_str!("reserved_words.txt").split_whitespace().collect());

/// The words that an expression is made of.
const SYNTAX: [&str; 9] = ["AND", "OR", "NOT", "BETWEEN", "IN", "SET", "REMOVE", "ADD", "DELETE"];

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Expressions<'a> {
    #[serde(borrow)]
    condition_expression: Option<Cow<'a, str>>,
    #[serde(borrow)]
    filter_expression: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key_condition_expression: Option<Cow<'a, str>>,
    #[serde(borrow)]
    projection_expression: Option<Cow<'a, str>>,
    #[serde(borrow)]
    update_expression: Option<Cow<'a, str>>,
}

/// The first reserved word that is used as a name in the request `body`.
pub(super) fn misused(body: &[u8]) -> Option<String> {
    // What is not a request is refused elsewhere.
    let all: Expressions<'_> = serde_json::from_slice(body).ok()?;
    [
        all.condition_expression,
        all.filter_expression,
        all.key_condition_expression,
        all.projection_expression,
        all.update_expression,
    ]
    .iter()
    .flatten()
    .find_map(|expression| in_expression(expression))
}

fn in_expression(expression: &str) -> Option<String> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '#' || c == ':';
    let mut rest = expression;
    while let Some(from) = rest.find(part) {
        rest = &rest[from..];
        let (word, after) = rest.split_at(rest.find(|c| !part(c)).unwrap_or(rest.len()));
        rest = after;
        // `#name` and `:value` stand for something; what is before a parenthesis is a function.
        let is_name = !word.starts_with(['#', ':']) && !after.trim_start().starts_with('(');
        let upper = word.to_ascii_uppercase();
        if is_name && WORDS.contains(&*upper) && !SYNTAX.contains(&&*upper) {
            return Some(word.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_word_is_no_name() {
        assert!(WORDS.len() > 500);
        for (expression, expected) in [
            ("pool = :pool", Some("pool")),
            ("#pool = :pool AND mailbox >= :start", None),
            ("attribute_exists(agent)", Some("agent")),
            ("size(x) > :n AND NOT begins_with(tunnel, :p)", None),
            ("SET holder = :holder, Status = :s", Some("Status")),
            ("REMOVE holder", None),
            ("", None),
        ] {
            assert_eq!(in_expression(expression).as_deref(), expected, "{expression}");
        }
        let body =
            br#"{"TableName":"t","KeyConditionExpression":"tunnel = :t","FilterExpression":"owner = :o"}"#;
        assert_eq!(misused(body).as_deref(), Some("owner"));
        assert_eq!(misused(b"{}"), None);
    }
}
