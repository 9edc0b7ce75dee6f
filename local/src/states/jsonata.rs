//! JSONata for the state machine: enters an expression and what it may name, leaves a JSON value.
//!
//! A pure selection such as `$states.input.a[0].b` is resolved on the JSON itself, without copying.
//! A plain expression (`plain`) is evaluated here. In any other one the selections are taken out, resolved
//! the same way, and bound to variables of their own, so that the evaluator never sees more of a large
//! state than it needs.

mod plain;
mod proven;

use std::collections::BTreeSet;

use bumpalo::Bump;
use jsonata_rs::JsonAta;
use serde_json::{Map, Number, Value};

use plain::Plain;

/// Where an expression's names lead.
pub trait Scope {
    /// The value of an assigned variable.
    fn variable(&self, name: &str) -> Option<&Value>;
    /// `$states.input`.
    fn input(&self) -> &Value;
    /// `$states.result`, in the places that have it.
    fn result(&self) -> Option<&Value>;
    /// `$states.errorOutput`, in the places that have it.
    fn error_output(&self) -> Option<&Value>;
    /// `$states.context.Execution.Input`.
    fn execution_input(&self) -> &Value;
    /// The rest of `$states.context`.
    fn context(&self) -> Value;
}

/// Why an expression is refused or has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the JSONata expression '{expression}' {problem}")]
pub struct QueryError {
    expression: String,
    problem: String,
}

/// An expression that was parsed once.
#[derive(Debug, Clone)]
pub struct Expression {
    source: Box<str>,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    Selection(Selection),
    General { plain: Option<Plain>, text: Box<str>, taken_out: Vec<Selection>, whole: Vec<Root> },
}

/// Where a selection begins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Root {
    Variable(Box<str>),
    Input,
    Result,
    ErrorOutput,
    ExecutionInput,
    Context,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Field(Box<str>),
    Index(i64),
}

/// A root and the fields and positions taken from it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selection {
    root: Root,
    steps: Vec<Step>,
}

/// What a selection found in one scope.
enum Found<'v> {
    Value(&'v Value),
    /// Part of the context, which exists only when asked for.
    Made(Value),
    Undefined,
    /// The path maps over an array: the evaluator's business.
    Mapped,
}

/// An evaluated expression: what was only selected is not copied.
#[derive(Debug, Clone, PartialEq)]
pub enum Evaluated<'v> {
    /// A value that is somewhere in the scope.
    Borrowed(&'v Value),
    /// A value that was made.
    Owned(Value),
}

impl Evaluated<'_> {
    /// The value, copied where it was borrowed.
    #[must_use]
    pub fn into_owned(self) -> Value {
        match self {
            Self::Borrowed(value) => value.clone(),
            Self::Owned(value) => value,
        }
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> &Value {
        match self {
            Self::Borrowed(value) => value,
            Self::Owned(value) => value,
        }
    }
}

impl Expression {
    /// Parses an expression of a machine: [`Expression::parse`] for what is known to give what it gives in AWS.
    ///
    /// # Errors
    ///
    /// Those of [`Expression::parse`], and what was not compared with AWS' evaluator.
    pub fn proven(source: &str, assigned: &BTreeSet<Box<str>>) -> Result<Self, QueryError> {
        let parsed = Self::parse(source, assigned)?;
        proven::check(&parsed.source)
            .map_err(|problem| QueryError { expression: parsed.source.to_string(), problem })?;
        Ok(parsed)
    }

    /// Parses the text between `{%` and `%}`. `assigned` are the names that any state assigns.
    ///
    /// # Errors
    ///
    /// The text is not JSONata, or uses `$` or `$$` at its top, which Step Functions does not define.
    pub fn parse(source: &str, assigned: &BTreeSet<Box<str>>) -> Result<Self, QueryError> {
        let source = source.trim();
        let refused = |problem: String| QueryError { expression: source.to_owned(), problem };
        let check = |text: &str| {
            let arena = Bump::new();
            JsonAta::new(text, &arena)
                .map(drop)
                .map_err(|error| refused(format!("cannot be parsed: {error}")))
        };
        check(source)?;
        let lexer = Lexer::new(source, assigned);
        let form = match lexer.split() {
            Split::Selection(selection) => Form::Selection(selection),
            Split::General { text, taken_out, whole } => {
                check(&text)?;
                Form::General { plain: Plain::parse(&lexer), text: text.into(), taken_out, whole }
            }
        };
        Ok(Self { source: source.into(), form })
    }

    /// The expression as it was written.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The value in `scope`; nothing where JSONata says "undefined".
    ///
    /// # Errors
    ///
    /// The evaluation failed, or gave something that JSON cannot hold.
    pub fn evaluate<'s>(&self, scope: &'s impl Scope) -> Result<Option<Evaluated<'s>>, QueryError> {
        match &self.form {
            Form::Selection(selection) => match selection.find(scope) {
                Found::Value(value) => Ok(Some(Evaluated::Borrowed(value))),
                Found::Made(value) => Ok(Some(Evaluated::Owned(value))),
                Found::Undefined => Ok(None),
                Found::Mapped => self.evaluate_whole(scope),
            },
            Form::General { plain, text, taken_out, whole } => {
                if let Some(value) = plain.as_ref().and_then(|plain| plain.evaluate(scope)) {
                    return Ok(value.map(Evaluated::Owned));
                }
                let found: Vec<Found<'s>> = taken_out.iter().map(|selection| selection.find(scope)).collect();
                if found.iter().any(|found| matches!(found, Found::Mapped)) {
                    return self.evaluate_whole(scope);
                }
                self.run(text, |arena, jsonata| {
                    for (index, found) in found.iter().enumerate() {
                        let value = match found {
                            Found::Value(value) => to_jsonata(arena, value),
                            Found::Made(value) => to_jsonata(arena, value),
                            Found::Undefined | Found::Mapped => jsonata_rs::Value::undefined(),
                        };
                        jsonata.assign_var(&format!("_{index}"), value);
                    }
                    bind(arena, jsonata, whole, scope);
                })
            }
        }
    }

    /// Evaluates the expression as it was written, with everything bound that it may name.
    fn evaluate_whole<'s>(&self, scope: &'s impl Scope) -> Result<Option<Evaluated<'s>>, QueryError> {
        let roots = roots(&self.source);
        self.run(&self.source, |arena, jsonata| bind(arena, jsonata, &roots, scope))
    }

    fn run<'s>(
        &self,
        text: &str,
        bind: impl for<'a> FnOnce(&'a Bump, &JsonAta<'a>),
    ) -> Result<Option<Evaluated<'s>>, QueryError> {
        let arena = Bump::new();
        let failed = |problem: String| QueryError { expression: self.source.to_string(), problem };
        let jsonata = JsonAta::new(text, &arena).map_err(|error| failed(error.to_string()))?;
        bind(&arena, &jsonata);
        // As deep and as long as any reasonable expression, and no deeper or longer. The evaluator panics at some values;
        // what it had is dropped with the arena.
        let evaluation = || jsonata.evaluate_timeboxed(None, Some(200), Some(1000));
        let value = std::panic::catch_unwind(std::panic::AssertUnwindSafe(evaluation))
            .map_err(|_| failed("failed: the evaluator panicked".to_owned()))?
            .map_err(|error| failed(format!("failed: {error}")))?;
        from_jsonata(value).map(|value| value.map(Evaluated::Owned)).map_err(failed)
    }
}

/// Binds whole roots under their own names.
fn bind<'a>(arena: &'a Bump, jsonata: &JsonAta<'a>, whole: &[Root], scope: &impl Scope) {
    let mut states = None;
    for root in whole {
        let (name, value) = match root {
            Root::Variable(name) => {
                if let Some(value) = scope.variable(name) {
                    jsonata.assign_var(name, to_jsonata(arena, value));
                }
                continue;
            }
            Root::Input => ("input", Some(to_jsonata(arena, scope.input()))),
            Root::Result => ("result", scope.result().map(|value| to_jsonata(arena, value))),
            Root::ErrorOutput => ("errorOutput", scope.error_output().map(|value| to_jsonata(arena, value))),
            Root::ExecutionInput => continue,
            Root::Context => {
                let mut context = scope.context();
                if let Some(Value::Object(execution)) = context.get_mut("Execution") {
                    execution.insert("Input".into(), scope.execution_input().clone());
                }
                ("context", Some(to_jsonata(arena, &context)))
            }
        };
        if let Some(value) = value {
            states.get_or_insert_with(|| jsonata_rs::Value::object(arena)).insert(name, value);
        }
    }
    if let Some(states) = states {
        jsonata.assign_var("states", states);
    }
}

impl Selection {
    fn find<'s>(&self, scope: &'s impl Scope) -> Found<'s> {
        self.find_front(self.steps.len(), scope)
    }

    /// What the first `count` steps lead to.
    fn find_front<'s>(&self, count: usize, scope: &'s impl Scope) -> Found<'s> {
        let steps = &self.steps[..count];
        let root = match &self.root {
            Root::Variable(name) => scope.variable(name),
            Root::Input => Some(scope.input()),
            Root::Result => scope.result(),
            Root::ErrorOutput => scope.error_output(),
            Root::ExecutionInput => Some(scope.execution_input()),
            Root::Context => {
                let mut context = scope.context();
                if steps.len() < 2
                    && let Some(Value::Object(execution)) = context.get_mut("Execution")
                {
                    execution.insert("Input".into(), scope.execution_input().clone());
                }
                return match walk(&context, steps) {
                    Found::Value(value) => Found::Made(value.clone()),
                    Found::Made(value) => Found::Made(value),
                    Found::Undefined => Found::Undefined,
                    Found::Mapped => Found::Mapped,
                };
            }
        };
        root.map_or(Found::Undefined, |root| walk(root, steps))
    }
}

fn walk<'v>(root: &'v Value, steps: &[Step]) -> Found<'v> {
    let mut value = root;
    for step in steps {
        let next = match (step, value) {
            (Step::Field(_), Value::Array(_)) => return Found::Mapped,
            (Step::Field(name), Value::Object(fields)) => fields.get(&**name),
            (Step::Field(_), _) => None,
            (Step::Index(index), Value::Array(items)) => position(*index, items.len()).map(|at| &items[at]),
            // JSONata takes a single value for an array of one.
            (Step::Index(index), _) => position(*index, 1).map(|_| value),
        };
        match next {
            Some(next) => value = next,
            None => return Found::Undefined,
        }
    }
    Found::Value(value)
}

fn position(index: i64, len: usize) -> Option<usize> {
    let len = i64::try_from(len).ok()?;
    let at = if index < 0 { len + index } else { index };
    if (0..len).contains(&at) { usize::try_from(at).ok() } else { None }
}

fn to_jsonata<'a>(arena: &'a Bump, value: &Value) -> &'a jsonata_rs::Value<'a> {
    match value {
        Value::Null => jsonata_rs::Value::null(arena),
        Value::Bool(value) => jsonata_rs::Value::bool(*value),
        Value::Number(number) => jsonata_rs::Value::number(arena, number.as_f64().unwrap_or(f64::MAX)),
        Value::String(text) => jsonata_rs::Value::string(arena, text),
        Value::Array(items) => {
            let array =
                jsonata_rs::Value::array_with_capacity(arena, items.len(), jsonata_rs::ArrayFlags::empty());
            for item in items {
                array.push(to_jsonata(arena, item));
            }
            array
        }
        Value::Object(fields) => {
            let object = jsonata_rs::Value::object_with_capacity(arena, fields.len());
            for (name, field) in fields {
                object.insert(name, to_jsonata(arena, field));
            }
            object
        }
    }
}

/// The largest whole number up to which a double holds every whole number.
const EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;

fn from_jsonata<'a>(value: &'a jsonata_rs::Value<'a>) -> Result<Option<Value>, String> {
    let converted = match value {
        jsonata_rs::Value::Undefined => return Ok(None),
        jsonata_rs::Value::Null => Value::Null,
        jsonata_rs::Value::Bool(value) => Value::Bool(*value),
        jsonata_rs::Value::Number(number) => number_value(*number)?,
        jsonata_rs::Value::String(text) => Value::String(text.as_str().to_owned()),
        jsonata_rs::Value::Array(..) | jsonata_rs::Value::Range(..) => {
            let mut items = Vec::with_capacity(value.len());
            for item in value.members() {
                if let Some(item) = from_jsonata(item)? {
                    items.push(item);
                }
            }
            Value::Array(items)
        }
        jsonata_rs::Value::Object(fields) => {
            // The evaluator keeps no order: give one that does not change from run to run.
            let mut names: Vec<&str> = fields.keys().map(|name| name.as_str()).collect();
            names.sort_unstable();
            let mut object = Map::with_capacity(names.len());
            for name in names {
                if let Some(field) = from_jsonata(value.get_entry(name))? {
                    object.insert(name.to_owned(), field);
                }
            }
            Value::Object(object)
        }
        jsonata_rs::Value::Regex(_)
        | jsonata_rs::Value::Lambda { .. }
        | jsonata_rs::Value::NativeFn { .. }
        | jsonata_rs::Value::Transformer { .. } => return Err("gave a function, not a value".to_owned()),
    };
    Ok(Some(converted))
}

fn number_value(number: f64) -> Result<Value, String> {
    if number.fract() == 0.0 && number.abs() <= EXACT_INTEGER {
        // Exact: checked on the line above.
        #[expect(clippy::cast_possible_truncation, reason = "a whole number within the exact range")]
        return Ok(Value::from(number as i64));
    }
    Number::from_f64(number).map(Value::Number).ok_or_else(|| "gave a number that is not finite".to_owned())
}

/// Takes the selections out of an expression's text.
struct Lexer<'t> {
    text: &'t str,
    assigned: &'t BTreeSet<Box<str>>,
}

enum Split {
    Selection(Selection),
    General { text: String, taken_out: Vec<Selection>, whole: Vec<Root> },
}

impl<'t> Lexer<'t> {
    fn new(text: &'t str, assigned: &'t BTreeSet<Box<str>>) -> Self {
        Self { text, assigned }
    }

    fn split(&self) -> Split {
        if let Some((selection, length)) = self.selection(0)
            && length == self.text.len()
        {
            return Split::Selection(selection);
        }
        let mut rewritten = String::with_capacity(self.text.len());
        let mut taken_out = Vec::new();
        if binds_names(self.text) {
            rewritten.push_str(self.text);
        } else {
            let bytes = self.text.as_bytes();
            let mut at = 0;
            while at < bytes.len() {
                let end = skip_quoted(bytes, at);
                if end > at {
                    rewritten.push_str(&self.text[at..end]);
                    at = end;
                } else if bytes[at] == b'$'
                    && !follows_dot(bytes, at)
                    && let Some((selection, length)) = self.selection(at)
                    && ends_selection(bytes, at + length)
                {
                    rewritten.push_str(&format!("$_{}", taken_out.len()));
                    taken_out.push(selection);
                    at += length;
                } else {
                    let next = at + self.text[at..].chars().next().map_or(1, char::len_utf8);
                    rewritten.push_str(&self.text[at..next]);
                    at = next;
                }
            }
        }
        let whole = roots(&rewritten);
        Split::General { text: rewritten, taken_out, whole }
    }

    /// The selection that begins at `start`, and its length.
    fn selection(&self, start: usize) -> Option<(Selection, usize)> {
        let rest = self.text.get(start..)?.strip_prefix('$')?;
        let name = identifier(rest);
        if name.is_empty() {
            return None;
        }
        let mut at = 1 + name.len();
        let mut steps = Vec::new();
        let text = &self.text[start..];
        loop {
            let rest = &text[at..];
            if let Some(field) = rest.strip_prefix('.').map(identifier).filter(|field| !field.is_empty()) {
                // `and`, `or` and `in` are names here as well: they follow a dot.
                steps.push(Step::Field(field.into()));
                at += 1 + field.len();
            } else if let Some((index, length)) = index(rest) {
                steps.push(Step::Index(index));
                at += length;
            } else {
                break;
            }
        }
        let root = if name == "states" {
            let Some(Step::Field(part)) = steps.first() else { return None };
            let root = match &**part {
                "input" => Root::Input,
                "result" => Root::Result,
                "errorOutput" => Root::ErrorOutput,
                "context" => Root::Context,
                _ => return None,
            };
            steps.remove(0);
            if root == Root::Context && steps.len() >= 2 && is_execution_input(&steps) {
                steps.drain(..2);
                Root::ExecutionInput
            } else {
                root
            }
        } else if self.assigned.contains(name) {
            Root::Variable(name.into())
        } else {
            return None;
        };
        Some((Selection { root, steps }, at))
    }
}

fn is_execution_input(steps: &[Step]) -> bool {
    matches!(steps, [Step::Field(first), Step::Field(second), ..] if &**first == "Execution" && &**second == "Input")
}

/// Whether the expression gives names of its own, or may hold a regular expression, so that a
/// name in it need not be what it seems.
fn binds_names(text: &str) -> bool {
    let regex_follows = |at: usize| {
        let before = text[..at].trim_end();
        before.is_empty() || before.ends_with(['(', ',', '=', '[', '{', ':', '?', '&', '>'])
    };
    text.contains(":=")
        || text.contains("function")
        || text.contains('λ')
        || text.contains(['@', '#', '|'])
        || text.match_indices('/').any(|(at, _)| regex_follows(at))
}

/// The end of the string, quoted name or comment that begins at `at`, or `at`.
fn skip_quoted(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    if rest.starts_with(b"/*") {
        let end = rest.windows(2).skip(2).position(|pair| pair == b"*/");
        return end.map_or(bytes.len(), |end| at + end + 4);
    }
    let Some(&quote @ (b'"' | b'\'' | b'`')) = rest.first() else { return at };
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != quote {
        end += if bytes[end] == b'\\' && quote != b'`' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

fn follows_dot(bytes: &[u8], at: usize) -> bool {
    bytes[..at].iter().rev().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'.')
}

/// Whether a selection may end here: what follows does not go on with the path or call it.
fn ends_selection(bytes: &[u8], at: usize) -> bool {
    match bytes[at..].iter().find(|byte| !byte.is_ascii_whitespace()) {
        // Two dots are a range, not a step.
        Some(b'.') => bytes[at..].trim_ascii_start().starts_with(b".."),
        Some(b'[' | b'{' | b'^' | b'(' | b'`') => false,
        _ => true,
    }
}

fn identifier(text: &str) -> &str {
    let end = text
        .char_indices()
        .find(|&(at, c)| !(c.is_ascii_alphabetic() || c == '_' || (at > 0 && c.is_ascii_digit())))
        .map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// A position in brackets at the beginning of `text`, and its length.
fn index(text: &str) -> Option<(i64, usize)> {
    let inside = text.strip_prefix('[')?;
    let end = inside.find(']')?;
    let number = &inside[..end];
    let digits = number.strip_prefix('-').unwrap_or(number);
    if digits.is_empty() || digits.len() > 9 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((number.parse().ok()?, end + 2))
}

/// Every root an expression may name. Names in strings only cost a binding that is not used.
fn roots(text: &str) -> Vec<Root> {
    let mut roots = BTreeSet::new();
    for (at, _) in text.match_indices('$') {
        let name = identifier(&text[at + 1..]);
        if name.is_empty() {
            continue;
        }
        if name != "states" {
            roots.insert(Root::Variable(name.into()));
            continue;
        }
        let part = text[at + 1 + name.len()..].strip_prefix('.').map_or("", identifier);
        match part {
            "input" => drop(roots.insert(Root::Input)),
            "result" => drop(roots.insert(Root::Result)),
            "errorOutput" => drop(roots.insert(Root::ErrorOutput)),
            "context" => drop(roots.insert(Root::Context)),
            _ => roots.extend([Root::Input, Root::Result, Root::ErrorOutput, Root::Context]),
        }
    }
    roots.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[derive(Default)]
    struct Fixture {
        variables: BTreeMap<&'static str, Value>,
        input: Value,
        result: Option<Value>,
        error_output: Option<Value>,
        execution_input: Value,
    }

    impl Scope for Fixture {
        fn variable(&self, name: &str) -> Option<&Value> {
            self.variables.get(name)
        }
        fn input(&self) -> &Value {
            &self.input
        }
        fn result(&self) -> Option<&Value> {
            self.result.as_ref()
        }
        fn error_output(&self) -> Option<&Value> {
            self.error_output.as_ref()
        }
        fn execution_input(&self) -> &Value {
            &self.execution_input
        }
        fn context(&self) -> Value {
            json!({ "Execution": { "Name": "n" }, "State": { "Name": "s", "RetryCount": 2 } })
        }
    }

    fn assigned() -> BTreeSet<Box<str>> {
        ["connections", "first", "text", "list"].into_iter().map(Into::into).collect()
    }

    fn fixture() -> Fixture {
        Fixture {
            variables: BTreeMap::from([
                ("connections", json!(["a=", "b=", "c="])),
                ("first", json!(2)),
                ("text", json!("x")),
                ("list", json!([])),
            ]),
            input: json!({ "pick": 0.5, "none": null, "rows": [{ "id": "#name" }, { "id": "a=" }], "one": [1] }),
            result: Some(json!({ "Messages": [{ "Body": "{\"a\":1}", "n": 1 }] })),
            error_output: Some(json!({ "Error": "E", "Cause": "C" })),
            execution_input: json!({ "tunnel": "web" }),
        }
    }

    fn eval(source: &str) -> Option<Value> {
        let expression = Expression::parse(source, &assigned()).unwrap();
        let scope = fixture();
        expression.evaluate(&scope).unwrap().map(Evaluated::into_owned)
    }

    #[test]
    fn selects_without_the_evaluator() {
        for (source, wanted) in [
            ("$states.input.pick", Some(json!(0.5))),
            ("$states.input.none", Some(json!(null))),
            ("$states.input.none.x", None),
            ("$states.input.one", Some(json!([1]))),
            ("$states.result.Messages[0].Body", Some(json!("{\"a\":1}"))),
            ("$states.result.Messages[-1].n", Some(json!(1))),
            ("$states.result.Messages[1].n", None),
            ("$states.errorOutput.Error", Some(json!("E"))),
            ("$states.context.Execution.Input.tunnel", Some(json!("web"))),
            ("$states.context.Execution.Name", Some(json!("n"))),
            ("$states.context.State.RetryCount", Some(json!(2))),
            (" $text ", Some(json!("x"))),
            ("$connections[1]", Some(json!("b="))),
        ] {
            let expression = Expression::parse(source, &assigned()).unwrap();
            assert!(matches!(expression.form, Form::Selection(_)), "{source}");
            assert_eq!(eval(source), wanted, "{source}");
        }
    }

    #[test]
    fn evaluates_what_the_machines_use() {
        for (source, wanted) in [
            ("'/@connections/' & $connections[0]", json!("/@connections/a=")),
            ("$connections[($first + 1) % $count($connections)]", json!("a=")),
            ("$connections[$first]", json!("c=")),
            ("[$states.input.rows.id[$ != '#name']]", json!(["a="])),
            ("$count($states.input.rows) > 0", json!(true)),
            ("$floor($states.input.pick * $count($connections))", json!(1)),
            ("$states.result.Messages[0].n = 1 and $text = 'x'", json!(true)),
            ("$states.result.Messages[3].n = 1 or $first < 3", json!(true)),
            ("$exists($states.result.Messages[0])", json!(true)),
            ("$exists($states.result.Nothing)", json!(false)),
            ("$max([1, $min([20, $floor((100000 - 1) / 1000)])])", json!(20)),
            ("$string($first)", json!("2")),
            ("$states.input.rows.id", json!(["#name", "a="])),
            ("($x := $first; $x + 1)", json!(3)),
            ("$map($connections, function($c) { $c & $text })", json!(["a=x", "b=x", "c=x"])),
            ("'$first' & \"$text\" & $text", json!("$first$textx")),
            ("$states.context.Execution.Input.tunnel & '!'", json!("web!")),
            ("$string($states.context.Execution.Input)", json!("{\"tunnel\":\"web\"}")),
            ("$states.context.Execution", json!({ "Name": "n", "Input": { "tunnel": "web" } })),
            ("[1..$first]", json!([1, 2])),
            ("{ 'a': $first, 'b': $states.nothing }", json!({ "a": 2 })),
        ] {
            assert_eq!(eval(source), Some(wanted), "{source}");
        }
        assert_eq!(eval("$states.input.nothing + 1"), None);
        assert!(eval("$millis()").is_some_and(|now| now.as_i64().is_some_and(|now| now > 1_700_000_000_000)));
    }

    #[test]
    fn what_the_machine_asks_for_is_plain() {
        let names = [
            "accept",
            "attempt",
            "policy",
            "connections",
            "connection_id",
            "deadline_ms",
            "mailbox",
            "pick",
            "request_id",
            "tunnel",
        ];
        let assigned = names.into_iter().map(Into::into).collect();
        let scope = Fixture {
            variables: BTreeMap::from([
                ("accept", json!(false)),
                ("attempt", json!(1)),
                ("policy", json!([])),
                ("connections", json!(["a=", "b=", "c="])),
                ("connection_id", json!("a=")),
                ("deadline_ms", json!(9_007_199_254_740_000_i64)),
                ("pick", json!(0.7)),
                ("request_id", json!("r1")),
            ]),
            input: json!({ "rows": 0, "Messages": [{ "Attributes": { "SentTimestamp": "1790000000123" }, "MessageAttributes": { "request_id": { "StringValue": "r1" } } }] }),
            result: Some(json!({ "Items": [
                { "connection_id": { "S": "#name" } }, { "connection_id": { "S": "a=" } }, { "other": 1 },
            ] })),
            ..Fixture::default()
        };
        let text: Value =
            serde_json::from_str(include_str!("../../../statemachines/public_request.asl.json")).unwrap();
        let mut expressions = Vec::new();
        collect(&text, &mut expressions);
        let mut plain = 0;
        for source in expressions {
            let expression = Expression::parse(&source, &assigned).unwrap();
            let Form::General { plain: found, .. } = &expression.form else { continue };
            let found = found.as_ref().unwrap_or_else(|| panic!("{source} is not plain"));
            let whole = expression.evaluate_whole(&scope).unwrap().map(Evaluated::into_owned);
            if !source.contains("$millis") {
                assert_eq!(found.evaluate(&scope), Some(whole), "{source}");
            }
            plain += 1;
        }
        assert!(plain >= 10, "{plain}");
    }

    fn collect(value: &Value, expressions: &mut Vec<String>) {
        match value {
            Value::String(text) => expressions
                .extend(text.strip_prefix("{%").and_then(|text| text.strip_suffix("%}")).map(str::to_owned)),
            Value::Array(items) => items.iter().for_each(|item| collect(item, expressions)),
            Value::Object(fields) => fields.values().for_each(|field| collect(field, expressions)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    #[test]
    fn what_is_unusual_is_left_to_the_evaluator() {
        for source in [
            "$first + 1.5",
            "$sum([1, 2])",
            "$text & 'a\\tb'",
            "$first > 1 ? 1 : 2",
            "$states.input.rows[id = 'a=']",
            "$connections[$first][0]",
            "($first; $first)",
            "- $first",
            "[1..3]",
            "$count",
            "$string($first, true)",
            "$",
            "/* no */ $first + 1",
        ] {
            let expression = Expression::parse(source, &assigned()).unwrap();
            match &expression.form {
                Form::General { plain: None, .. } => {}
                other => panic!("{source}: {other:?}"),
            }
        }
        for source in ["$text + 1", "$connections = 1", "$first and true", "$states.input.none & ''"] {
            let expression = Expression::parse(source, &assigned()).unwrap();
            if let Form::General { plain: Some(plain), .. } = &expression.form {
                assert_eq!(plain.evaluate(&fixture()), None, "{source}");
            }
        }
        let deep = |depth: usize| format!("{}1{} + 1", "(".repeat(depth), ")".repeat(depth));
        let is_plain = |depth| {
            let expression = Expression::parse(&deep(depth), &assigned()).unwrap();
            matches!(expression.form, Form::General { plain: Some(_), .. })
        };
        assert!(is_plain(31) && !is_plain(32));
    }

    #[test]
    fn large_values_stay_out_of_the_evaluator() {
        let expression = Expression::parse("$states.result.Messages[0].n = $first", &assigned()).unwrap();
        let Form::General { text, taken_out, whole, plain: _ } = expression.form else {
            panic!("a comparison")
        };
        assert_eq!(&*text, "$_0 = $_1");
        assert_eq!(taken_out.len(), 2);
        // The two new names are looked for in the scope, and are not there.
        assert!(whole.iter().all(|root| matches!(root, Root::Variable(name) if name.starts_with('_'))));
    }

    #[test]
    fn says_what_is_wrong_with_an_expression() {
        let error = Expression::parse("$states.input.", &assigned()).unwrap_err().to_string();
        assert!(error.starts_with("the JSONata expression '$states.input.' cannot be parsed: S0"), "{error}");
        let expression = Expression::parse("$text + 1", &assigned()).unwrap();
        let error = expression.evaluate(&fixture()).unwrap_err().to_string();
        assert!(error.contains("'$text + 1' failed: T2001"), "{error}");
        let expression = Expression::parse("$sum", &assigned()).unwrap();
        assert!(expression.evaluate(&fixture()).is_err());
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-1000_i64..1000).prop_map(Value::from),
            "[ab]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[abc]", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    fn path() -> impl Strategy<Value = String> {
        let step = prop_oneof![
            3 => "[abc]".prop_map(|name| format!(".{name}")),
            1 => (-2_i64..3).prop_map(|index| format!("[{index}]")),
        ];
        prop::collection::vec(step, 0..4).prop_map(|steps| steps.concat())
    }

    /// Plain expressions, and many that only look so.
    fn plain_source() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            (0..9_u8).prop_map(|number| number.to_string()),
            "[ab]{0,2}".prop_map(|text| format!("'{text}'")),
            path().prop_map(|path| format!("$states.input{path}")),
            prop::sample::select(vec!["$first", "$text", "$connections", "$connections[1]", "$list"])
                .prop_map(str::to_owned),
        ];
        leaf.prop_recursive(4, 16, 3, |inner| {
            let operators = vec!["+", "-", "*", "/", "%", "&", "=", "!=", "<", "<=", ">", ">=", "and", "or"];
            let functions = vec!["count", "exists", "floor", "max", "min", "not", "string"];
            prop_oneof![
                4 => (inner.clone(), prop::sample::select(operators), inner.clone())
                    .prop_map(|(left, operator, right)| format!("{left} {operator} {right}")),
                2 => (prop::sample::select(functions), inner.clone())
                    .prop_map(|(function, argument)| format!("${function}({argument})")),
                2 => prop::collection::vec(inner.clone(), 0..3)
                    .prop_map(|items| format!("[{}]", items.join(", "))),
                1 => inner.clone().prop_map(|inner| format!("({inner})")),
                1 => inner.clone().prop_map(|inner| format!("$connections[{inner}]")),
                2 => (path(), inner)
                    .prop_map(|(path, inner)| format!("[$states.input{path}[$ != {inner}]]")),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn a_plain_expression_is_what_the_evaluator_makes_of_it(input in json(), source in plain_source()) {
            let scope = Fixture { input, ..fixture() };
            let Ok(expression) = Expression::parse(&source, &assigned()) else { return Ok(()) };
            let Form::General { plain: Some(plain), .. } = &expression.form else { return Ok(()) };
            if let Some(quick) = plain.evaluate(&scope) {
                let slow = expression.evaluate_whole(&scope).map(|value| value.map(Evaluated::into_owned));
                prop_assert_eq!(Ok(quick), slow, "{}", source);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

        #[test]
        fn a_selection_is_what_the_evaluator_selects(input in json(), path in path(), wrapped in any::<bool>()) {
            let scope = Fixture { input, ..Fixture::default() };
            let source = if wrapped {
                format!("$exists($states.input{path}) ? [1, $states.input{path}]")
            } else {
                format!("$states.input{path}")
            };
            let expression = Expression::parse(&source, &assigned()).unwrap();
            let quick = expression.evaluate(&scope).unwrap().map(Evaluated::into_owned);
            let slow = expression.evaluate_whole(&scope).unwrap().map(Evaluated::into_owned);
            prop_assert_eq!(quick, slow, "{}", source);
        }
    }
}
