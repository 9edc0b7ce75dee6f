//! What is different in the answer to a replay.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::value::RawValue;

use super::decode;
use crate::capture::{fields::Fields, kept::Kept, record::Answer};

/// How many differences of two JSON bodies are named.
const MOST: usize = 200;

/// How deep two JSON bodies are compared; what is below is compared as text.
const DEPTH: usize = 64;

/// Fields that are another each time.
const EPHEMERAL: [&str; 1] = ["date"];

/// What is different.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Diff {
    /// Before and after, where they differ.
    pub(crate) status: Option<(Option<u16>, Option<u16>)>,
    pub(crate) fields: Vec<FieldChange>,
    pub(crate) body: BodyDiff,
}

/// The values of a field before and after.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FieldChange {
    pub(crate) name: String,
    pub(crate) before: Vec<Vec<u8>>,
    pub(crate) after: Vec<Vec<u8>>,
}

/// What is different in a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BodyDiff {
    Same,
    /// The places that differ, and how many more there are.
    Json(Vec<Change>, usize),
    Bytes,
    /// One of the two is not whole.
    Unknown,
}

/// A place in a JSON body.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Change {
    pub(crate) pointer: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) after: Option<String>,
}

impl Diff {
    /// Compares two answers.
    pub(crate) fn between(before: Option<&Answer>, after: Option<&Answer>) -> Self {
        let status = |answer: Option<&Answer>| answer.map(|answer| answer.status);
        let statuses = (status(before), status(after));
        let nothing = (Fields::default(), Kept::default());
        let before = before.map_or((&nothing.0, &nothing.1), |answer| (&answer.fields, &answer.body));
        let after = after.map_or((&nothing.0, &nothing.1), |answer| (&answer.fields, &answer.body));
        let (fields, body) = (fields_between(before.0, after.0), bodies(before, after));
        Self { status: (statuses.0 != statuses.1).then_some(statuses), fields, body }
    }

    /// Whether nothing is.
    pub(crate) fn is_same(&self) -> bool {
        self.status.is_none() && self.fields.is_empty() && self.body == BodyDiff::Same
    }
}

fn fields_between(before: &Fields, after: &Fields) -> Vec<FieldChange> {
    let by_name = |fields: &Fields| {
        let mut by_name: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
        for (name, value) in fields.iter() {
            by_name.entry(name.to_ascii_lowercase()).or_default().push(value.to_vec());
        }
        by_name
    };
    let (mut before, mut after) = (by_name(before), by_name(after));
    let names: BTreeSet<String> = before.keys().chain(after.keys()).cloned().collect();
    names
        .into_iter()
        .filter(|name| !EPHEMERAL.contains(&&**name))
        .filter_map(|name| {
            let before = before.remove(&name).unwrap_or_default();
            let after = after.remove(&name).unwrap_or_default();
            (before != after).then_some(FieldChange { name, before, after })
        })
        .collect()
}

fn bodies((fields_before, before): (&Fields, &Kept), (fields_after, after): (&Fields, &Kept)) -> BodyDiff {
    if before.is_cut() || after.is_cut() {
        return if before.size() == after.size() { BodyDiff::Unknown } else { BodyDiff::Bytes };
    }
    let (before, after) = (before.to_vec(), after.to_vec());
    if before == after {
        return BodyDiff::Same;
    }
    let (before, after) = (unpacked(fields_before, before), unpacked(fields_after, after));
    if before == after {
        return BodyDiff::Same;
    }
    let json = |bytes| serde_json::from_slice::<&RawValue>(bytes).ok();
    match (json(&before), json(&after)) {
        (Some(before), Some(after)) => {
            let mut found = Found::default();
            found.compare(&mut String::new(), before, after, 0);
            // Only blanks, or the order of keys, differ.
            if found.changes.is_empty() { BodyDiff::Same } else { BodyDiff::Json(found.changes, found.more) }
        }
        _ => BodyDiff::Bytes,
    }
}

/// A body without its coding, where all of it comes out.
fn unpacked(fields: &Fields, bytes: Vec<u8>) -> Vec<u8> {
    match decode::body(fields, &bytes) {
        Some(decoded) if decoded.error.is_none() && !decoded.cut => decoded.bytes,
        _ => bytes,
    }
}

#[derive(Default)]
struct Found {
    changes: Vec<Change>,
    more: usize,
}

impl Found {
    fn push(&mut self, pointer: &str, before: Option<&RawValue>, after: Option<&RawValue>) {
        if self.changes.len() == MOST {
            self.more += 1;
            return;
        }
        let text = |value: &RawValue| value.get().to_owned();
        self.changes.push(Change {
            pointer: pointer.to_owned(),
            before: before.map(text),
            after: after.map(text),
        });
    }

    /// Compares texts first: only where they differ are they read.
    fn compare(&mut self, pointer: &mut String, before: &RawValue, after: &RawValue, depth: usize) {
        if before.get() == after.get() {
            return;
        }
        let len = pointer.len();
        let kind = |value: &RawValue| value.get().as_bytes().first().copied();
        match (kind(before), kind(after)) {
            (Some(b'{'), Some(b'{')) if depth < DEPTH => {
                let object = |value| {
                    serde_json::from_str::<BTreeMap<String, &RawValue>>(RawValue::get(value))
                        .unwrap_or_default()
                };
                let (before, after) = (object(before), object(after));
                let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
                for name in names {
                    pointer.push('/');
                    pointer.push_str(&name.replace('~', "~0").replace('/', "~1"));
                    self.compare_both(pointer, before.get(name), after.get(name), depth);
                    pointer.truncate(len);
                }
            }
            (Some(b'['), Some(b'[')) if depth < DEPTH => {
                let list =
                    |value| serde_json::from_str::<Vec<&RawValue>>(RawValue::get(value)).unwrap_or_default();
                let (before, after) = (list(before), list(after));
                for at in 0..before.len().max(after.len()) {
                    pointer.push_str(&format!("/{at}"));
                    self.compare_both(pointer, before.get(at), after.get(at), depth);
                    pointer.truncate(len);
                }
            }
            // The same text may be escaped in another way.
            (Some(b'"'), Some(b'"')) => {
                let text = |value| serde_json::from_str::<String>(RawValue::get(value)).ok();
                if text(before) != text(after) {
                    self.push(pointer, Some(before), Some(after));
                }
            }
            _ => self.push(pointer, Some(before), Some(after)),
        }
    }

    fn compare_both(
        &mut self,
        pointer: &mut String,
        before: Option<&&RawValue>,
        after: Option<&&RawValue>,
        depth: usize,
    ) {
        match (before, after) {
            (Some(before), Some(after)) => self.compare(pointer, before, after, depth + 1),
            (before, after) => self.push(pointer, before.copied(), after.copied()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, fields: &[(&str, &str)], body: &str) -> Answer {
        let fields = Fields::from_pairs(fields.iter().map(|(name, value)| (*name, value.as_bytes())));
        Answer::new(status, fields, Kept::whole(body.as_bytes(), 1 << 20))
    }

    #[test]
    fn status_fields_and_json_are_compared() {
        let before = answer(
            500,
            &[("date", "yesterday"), ("x", "1"), ("set-cookie", "a"), ("set-cookie", "b"), ("gone", "")],
            r#"{"a": 1, "b": [1, 2, {"c~/": "x"}], "same": {"deep": [1]}, "escaped": "\u00e4"}"#,
        );
        let after = answer(
            200,
            &[("date", "today"), ("x", "1"), ("set-cookie", "a")],
            r#"{"b":[1,3,{"c~/":"y"},4],"a":1.0,"same":{ "deep":[1] },"escaped":"ä","new":null}"#,
        );
        let diff = Diff::between(Some(&before), Some(&after));
        assert_eq!(diff.status, Some((Some(500), Some(200))));
        let names: Vec<_> = diff.fields.iter().map(|field| &*field.name).collect();
        assert_eq!(names, ["gone", "set-cookie"]);
        assert_eq!((diff.fields[1].before.len(), diff.fields[1].after.len()), (2, 1));
        let BodyDiff::Json(changes, 0) = &diff.body else { panic!("{:?}", diff.body) };
        let said: Vec<_> = changes
            .iter()
            .map(|change| (&*change.pointer, change.before.as_deref(), change.after.as_deref()))
            .collect();
        assert_eq!(
            said,
            [
                ("/a", Some("1"), Some("1.0")),
                ("/b/1", Some("2"), Some("3")),
                ("/b/2/c~0~1", Some("\"x\""), Some("\"y\"")),
                ("/b/3", None, Some("4")),
                ("/new", None, Some("null")),
            ]
        );
        assert!(!diff.is_same());
        assert!(Diff::between(Some(&before), Some(&before)).is_same());
        assert!(Diff::between(None, None).is_same());
        assert_eq!(Diff::between(None, Some(&after)).status, Some((None, Some(200))));
    }

    #[test]
    fn bodies_that_are_not_json_are_the_same_or_not() {
        let body = |before: &str, after: &str| {
            Diff::between(Some(&answer(200, &[], before)), Some(&answer(200, &[], after))).body
        };
        assert_eq!(body("a", "a"), BodyDiff::Same);
        assert_eq!(body("a", "b"), BodyDiff::Bytes);
        assert_eq!(body("{\"a\":1, \"b\":2}", "{\"b\":2,\"a\":1}"), BodyDiff::Same);
        assert_eq!(
            body("[1]", "{}"),
            BodyDiff::Json(
                vec![Change { pointer: String::new(), before: Some("[1]".into()), after: Some("{}".into()) }],
                0
            )
        );
        let deep = |end: &str| format!("{}{end}{}", "[".repeat(5000), "]".repeat(5000));
        assert!(matches!(body(&deep("1"), &deep("2")), BodyDiff::Json(..) | BodyDiff::Bytes));
        let many = |from: u32| {
            format!("[{}]", (from..from + 500).map(|n| n.to_string()).collect::<Vec<_>>().join(","))
        };
        assert!(matches!(body(&many(0), &many(1)), BodyDiff::Json(changes, 300) if changes.len() == MOST));
    }

    #[test]
    fn packed_bodies_are_compared_unpacked() {
        let packed = |body: &str, level: i32| {
            let fields = Fields::from_pairs([("content-encoding", &b"zstd"[..])].into_iter());
            let packed = zstd::bulk::compress(body.as_bytes(), level).unwrap();
            Answer::new(200, fields, Kept::whole(&packed, 1 << 22))
        };
        let body = |before: &Answer, after: &Answer| Diff::between(Some(before), Some(after)).body;
        let text =
            r#"{"a": 1, "b": "long enough to be packed in two ways"}"#.replace("two", &"x".repeat(3000));
        let (one, other) = (packed(&text, 1), packed(&format!("{text} "), 19));
        assert_eq!(body(&one, &other), BodyDiff::Same, "of the same JSON");
        let BodyDiff::Json(changes, 0) = body(&one, &packed(&text.replace('1', "2"), 1)) else {
            panic!("JSON")
        };
        assert_eq!((changes.len(), &*changes[0].pointer), (1, "/a"));
        assert_eq!(body(&packed("x", 1), &packed("y", 1)), BodyDiff::Bytes);
        // Of what is too long nothing comes but its bytes.
        let long = |end: &str| packed(&format!("[{}{end}]", " ".repeat(3 << 20)), 1);
        assert_eq!(body(&long("1"), &long("2")), BodyDiff::Bytes);
    }

    #[test]
    fn of_a_cut_body_nothing_is_claimed() {
        let cut = |size: usize| Answer::new(200, Fields::default(), Kept::whole(&vec![b'x'; size], 10));
        assert_eq!(Diff::between(Some(&cut(20)), Some(&cut(20))).body, BodyDiff::Unknown);
        assert_eq!(Diff::between(Some(&cut(20)), Some(&cut(21))).body, BodyDiff::Bytes);
    }
}
