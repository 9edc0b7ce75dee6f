//! Which expressions give here what they give in AWS: enters the text of one, leaves nothing, or what in it is not known
//! to do so.
//!
//! The evaluator differs from jsonata 2.0.6, which Step Functions runs, in a number of places, mostly without a word.
//! What is let through here is a part of the language whose every function and operator was compared with the original
//! (`tests/jsonata`); anything else is refused when the machine is loaded.

/// The functions, and how many arguments they take.
const FUNCTIONS: &[(&str, usize, usize)] = &[
    ("abs", 1, 1),
    ("boolean", 1, 1),
    ("ceil", 1, 1),
    ("contains", 2, 2),
    ("count", 1, 1),
    ("distinct", 1, 1),
    ("exists", 1, 1),
    ("floor", 1, 1),
    ("join", 1, 2),
    ("length", 1, 1),
    ("max", 1, 1),
    ("merge", 1, 1),
    ("millis", 0, 0),
    ("min", 1, 1),
    ("not", 1, 1),
    ("power", 2, 2),
    ("round", 1, 2),
    ("sort", 1, 1),
    ("sqrt", 1, 1),
    ("string", 1, 1),
    ("sum", 1, 1),
];

/// The functions whose numbers have no fraction, but for the rounded ones.
const WHOLE: &[&str] = &["ceil", "count", "floor", "length", "millis", "round"];

/// The functions whose numbers may have any number of digits.
const LONG: &[&str] = &["power", "sqrt"];

/// How deep an expression may be nested.
const DEPTH: usize = 32;

/// Looks through an expression.
///
/// # Errors
///
/// What in it is not known to give the same as in AWS.
pub(super) fn check(text: &str) -> Result<()> {
    let mut reader =
        Reader { rest: text, depth: 0, filters: 0, is_long: false, is_written: false, is_negative: false };
    reader.expression()?;
    if !reader.ahead().is_empty() {
        return Err(reader.not_known());
    }
    // The evaluator writes one digit less, and the zero below zero with its sign.
    if reader.is_written && (reader.is_long || reader.is_negative) {
        return Err("writes a number that may have many digits, or a sign; use $floor".to_owned());
    }
    Ok(())
}

struct Reader<'t> {
    rest: &'t str,
    depth: usize,
    /// How many filters there are around what is read.
    filters: usize,
    /// Whether a number may have any number of digits.
    is_long: bool,
    /// Whether something is written as text.
    is_written: bool,
    /// Whether a number has a sign.
    is_negative: bool,
}

type Result<T> = std::result::Result<T, String>;

impl<'t> Reader<'t> {
    /// What has not been read, without the space before it.
    fn ahead(&mut self) -> &'t str {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
        self.rest
    }

    fn not_known(&mut self) -> String {
        let found: String = self.ahead().chars().take(20).collect();
        if found.is_empty() {
            "ends too early".to_owned()
        } else {
            format!("does not run here from '{found}' on")
        }
    }

    fn take(&mut self, token: &str) -> bool {
        let is_there = self.ahead().starts_with(token);
        if is_there {
            self.rest = &self.rest[token.len()..];
        }
        is_there
    }

    fn need(&mut self, token: &str) -> Result<()> {
        if self.take(token) { Ok(()) } else { Err(self.not_known()) }
    }

    fn word(&mut self) -> &'t str {
        let ahead = self.ahead();
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = ahead.find(|c| !is_part(c)).unwrap_or(ahead.len());
        &ahead[..end]
    }

    fn expression(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err("is nested too deeply".to_owned());
        }
        self.operand()?;
        while self.operator() {
            self.operand()?;
        }
        let ahead = self.ahead();
        if ahead.starts_with('?') && !ahead.starts_with("??") && !ahead.starts_with("?:") {
            self.need("?")?;
            self.expression()?;
            if self.take(":") {
                self.expression()?;
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn operator(&mut self) -> bool {
        let word = self.word();
        if ["and", "or", "in"].contains(&word) {
            return self.take(word);
        }
        // A comment begins as a division does.
        if self.ahead().starts_with("/*") {
            return false;
        }
        let tokens = ["!=", "<=", ">=", "=", "<", ">", "+", "-", "&", "*", "/", "%"];
        let found = tokens.into_iter().find(|token| self.take(token));
        self.is_long |= matches!(found, Some("*" | "/" | "%"));
        self.is_written |= found == Some("&");
        found.is_some()
    }

    fn operand(&mut self) -> Result<()> {
        let ahead = self.ahead();
        match ahead.bytes().next() {
            Some(b'-') => {
                self.need("-")?;
                self.is_negative = true;
                self.operand()
            }
            Some(b'0'..=b'9') => self.number(),
            Some(b'"' | b'\'') => self.text(),
            Some(b'(') => {
                self.need("(")?;
                self.expression()?;
                self.need(")")?;
                self.steps()
            }
            Some(b'[') => {
                self.need("[")?;
                self.list("]", true)?;
                self.ended()
            }
            Some(b'{') => {
                self.need("{")?;
                if !self.take("}") {
                    loop {
                        // A name that is written out: which of two equal ones counts was not compared.
                        self.text()?;
                        self.need(":")?;
                        self.expression()?;
                        if self.take("}") {
                            break;
                        }
                        self.need(",")?;
                    }
                }
                self.ended()
            }
            Some(b'$') => self.named(),
            Some(b'a'..=b'z' | b'A'..=b'Z' | b'_') => {
                let word = self.word();
                let is_value = ["true", "false", "null"].contains(&word);
                // A field of what a filter looks at; without one there is nothing that has fields.
                if ["function", "and", "or", "in"].contains(&word) || (self.filters == 0 && !is_value) {
                    return Err(self.not_known());
                }
                self.rest = &self.rest[word.len()..];
                if is_value { Ok(()) } else { self.steps() }
            }
            _ => Err(self.not_known()),
        }
    }

    /// Something that begins with `$`.
    fn named(&mut self) -> Result<()> {
        let at = self.rest;
        self.need("$")?;
        let end =
            self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(self.rest.len());
        let name = &self.rest[..end];
        if name.is_empty() && (self.filters == 0 || self.rest.starts_with('$')) {
            self.rest = at;
            return Err(self.not_known());
        }
        self.rest = &self.rest[end..];
        if !self.rest.starts_with('(') {
            // A function that is handed on is none of these; a variable may have any other name.
            if FUNCTIONS.iter().any(|(known, ..)| *known == name) {
                self.rest = at;
                return Err(self.not_known());
            }
            return self.steps();
        }
        let Some((_, least, most)) = FUNCTIONS.iter().find(|(known, ..)| *known == name) else {
            return Err(format!("calls ${name}, which does not run here"));
        };
        self.need("(")?;
        let was_long = self.is_long;
        let count = self.list(")", false)?;
        if !(*least..=*most).contains(&count) {
            return Err(format!("calls ${name} with {count} arguments"));
        }
        if WHOLE.contains(&name) {
            self.is_long = was_long;
        }
        self.is_long |= LONG.contains(&name);
        self.is_written |= name == "string";
        self.ended()
    }

    /// Refuses fields and filters of what was made here.
    fn ended(&mut self) -> Result<()> {
        match self.ahead().bytes().next() {
            Some(b'.' | b'[' | b'(' | b'{') if !self.rest.starts_with("..") => Err(self.not_known()),
            _ => Ok(()),
        }
    }

    /// Expressions up to the closing bracket, and how many.
    fn list(&mut self, close: &str, has_ranges: bool) -> Result<usize> {
        let mut count = 0;
        if self.take(close) {
            return Ok(count);
        }
        loop {
            self.expression()?;
            if has_ranges && self.take("..") {
                self.expression()?;
            }
            count += 1;
            if self.take(close) {
                return Ok(count);
            }
            self.need(",")?;
        }
    }

    /// Fields and filters.
    fn steps(&mut self) -> Result<()> {
        loop {
            let ahead = self.ahead();
            if ahead.starts_with('.') && !ahead.starts_with("..") {
                self.need(".")?;
                let word = self.word();
                if word.is_empty() || word.starts_with(|c: char| c.is_ascii_digit()) {
                    return Err(self.not_known());
                }
                self.rest = &self.rest[word.len()..];
            } else if ahead.starts_with('[') {
                self.need("[")?;
                self.filters += 1;
                self.expression()?;
                self.filters -= 1;
                self.need("]")?;
            } else if ahead.starts_with(['(', '{']) {
                return Err(self.not_known());
            } else {
                return Ok(());
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let mut end = digits(self.rest);
        // As JSON writes them.
        if end > 1 && self.rest.starts_with('0') {
            return Err(self.not_known());
        }
        if self.rest[end..].starts_with('.') && !self.rest[end..].starts_with("..") {
            let fraction = digits(&self.rest[end + 1..]);
            if fraction == 0 {
                return Err(self.not_known());
            }
            end += 1 + fraction;
        }
        // No more digits than a double holds, and no exponent.
        if end > 15 || self.rest[end..].starts_with(['e', 'E', '.']) && !self.rest[end..].starts_with("..") {
            return Err(self.not_known());
        }
        self.rest = &self.rest[end..];
        Ok(())
    }

    fn text(&mut self) -> Result<()> {
        let ahead = self.ahead();
        let Some(quote @ ('"' | '\'')) = ahead.chars().next() else { return Err(self.not_known()) };
        let mut chars = ahead.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.rest = &ahead[at + 1..];
                return Ok(());
            }
            if c == '\\' {
                let escaped = chars.next().is_some_and(|(_, c)| "\"\\bfnrtu".contains(c));
                if !escaped {
                    return Err(self.not_known());
                }
            }
        }
        Err(self.not_known())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Value;

    use super::{
        super::{Evaluated, Expression, Scope},
        check,
    };

    const SCOPE: &str = include_str!("../../../../tests/jsonata/scope.json");
    const CORPUS: &str = include_str!("../../../../tests/jsonata/corpus.jsonl");

    /// When it is in these expressions: the same in the recorded ones.
    const MILLIS: &str = "1790000000000";

    struct Recorded {
        variables: BTreeMap<String, Value>,
        states: Value,
    }

    impl Scope for Recorded {
        fn variable(&self, name: &str) -> Option<&Value> {
            self.variables.get(name)
        }
        fn input(&self) -> &Value {
            &self.states["input"]
        }
        fn result(&self) -> Option<&Value> {
            self.states.get("result")
        }
        fn error_output(&self) -> Option<&Value> {
            self.states.get("errorOutput")
        }
        fn execution_input(&self) -> &Value {
            &self.states["context"]["Execution"]["Input"]
        }
        fn context(&self) -> Value {
            self.states["context"].clone()
        }
    }

    fn same(one: &Value, other: &Value) -> bool {
        match (one, other) {
            // What reads the record rounds its last digit otherwise than what wrote it.
            (Value::Number(one), Value::Number(other)) => {
                let (one, other) = (one.as_f64().unwrap(), other.as_f64().unwrap());
                (one - other).abs() <= f64::EPSILON * one.abs()
            }
            (Value::Array(one), Value::Array(other)) => {
                one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
            }
            (Value::Object(one), Value::Object(other)) => {
                one.len() == other.len()
                    && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| same(one, other)))
            }
            (one, other) => one == other,
        }
    }

    #[test]
    fn what_is_let_through_is_what_the_original_makes_of_it() {
        let mut scope: Value = serde_json::from_str(SCOPE).unwrap();
        let variables: BTreeMap<String, Value> = serde_json::from_value(scope["variables"].take()).unwrap();
        let assigned: BTreeSet<Box<str>> = variables.keys().map(|name| name.as_str().into()).collect();
        let scope = Recorded { variables, states: scope["states"].take() };
        let (mut compared, mut refused, mut differing) = (0, Vec::new(), Vec::new());
        for line in CORPUS.lines() {
            let recorded: Value = serde_json::from_str(line).unwrap();
            let source = recorded["source"].as_str().unwrap();
            if let Err(problem) = check(source) {
                refused.push(format!("{source}: {problem}"));
                continue;
            }
            compared += 1;
            let source = source.replace("$millis()", MILLIS);
            let found = Expression::parse(&source, &assigned)
                .and_then(|expression| Ok(expression.evaluate(&scope)?.map(Evaluated::into_owned)));
            let is_same = match &found {
                // What is no number is null as JSON. Here it ends the run.
                Err(error) if error.to_string().contains("not finite") => recorded["value"].is_null(),
                Err(_) => recorded.get("error").is_some(),
                Ok(None) => recorded.get("undefined").is_some(),
                Ok(Some(value)) => recorded.get("value").is_some_and(|wanted| same(wanted, value)),
            };
            if !is_same {
                differing.push(format!("{recorded}\n    here {found:?}"));
            }
        }
        assert!(differing.is_empty(), "{} differ:\n{}", differing.len(), differing.join("\n"));
        assert!(compared >= 300, "{compared}, refused:\n{}", refused.join("\n"));
        println!("{compared} expressions are the same, {} are refused", refused.len());
    }

    fn collect(value: &Value, expressions: &mut Vec<String>) {
        match value {
            Value::String(text) => expressions.extend(
                text.strip_prefix("{%")
                    .and_then(|text| text.strip_suffix("%}"))
                    .map(|text| text.trim().into()),
            ),
            Value::Array(items) => items.iter().for_each(|item| collect(item, expressions)),
            Value::Object(fields) => fields.values().for_each(|field| collect(field, expressions)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    #[test]
    fn every_expression_of_the_machines_is_compared() {
        let recorded: BTreeSet<String> = CORPUS
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["source"].as_str().unwrap().to_owned())
            .collect();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../statemachines");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut machines = 0;
        for file in files.filter(|file| file.extension().is_some_and(|kind| kind == "json")) {
            let mut expressions = Vec::new();
            let machine = std::fs::read_to_string(&file).unwrap();
            collect(&serde_json::from_str(&machine).unwrap(), &mut expressions);
            for source in expressions {
                assert_eq!(check(&source), Ok(()), "{source} of {}", file.display());
                assert!(recorded.contains(&source), "run tests/jsonata/run --record: {source}");
            }
            machines += 1;
        }
        assert!(machines > 0);
    }

    #[test]
    fn what_was_not_compared_is_refused() {
        for source in [
            "",
            "1 +",
            "$",
            "$$",
            "$$.a",
            "a",
            "a.b",
            "*",
            "**",
            "%",
            "1 ?? 2",
            "1 ?: 2",
            "$x := 1",
            "($x := 1; $x)",
            "1; 2",
            "function($a) { $a }",
            "λ($a) { $a }",
            "$sum",
            "$map([1], $string)",
            "[1] ~> $sum",
            "/a/",
            "$match('a', /a/)",
            "$replace('a', /a/, 'b')",
            "$states.input.rows^(n)",
            "$states.input.rows{id: n}",
            "$states.input.rows@$r",
            "$states.input.rows#$i",
            "$states.input.rows.*",
            "$states.input.rows.(n)",
            "$states.input.rows[]",
            "$states.input.`a b`",
            "$states.input.rows.%",
            "|$|{}|",
            "$fromMillis(1)",
            "$toMillis('2026')",
            "$now()",
            "$uuid()",
            "$random()",
            "$parse('1')",
            "$hash('a', 'MD5')",
            "$range(1, 2, 1)",
            "$partition([1], 1)",
            "$eval('1')",
            "$base64encode('a')",
            "$keys({})",
            "$each({}, $f)",
            "$spread({})",
            "$type(1)",
            "$formatNumber(1, '0')",
            "$string({}, true)",
            "$string()",
            "$count()",
            "$sort([1], $f)",
            "1e3",
            "12345678901234567",
            "'\\x'",
            "'a",
            "/* a */ 1",
            "1 /* a */",
            "$count([1]).a",
            "{a: 1}",
            "{'a' 1}",
            "$states.input.rows.1",
            "$string(1 / 3)",
            "'a' & $first * 2",
            "$string(-$first)",
            "$string($power(2, 3))",
            "[{'a': 1}][0]",
            "{'a': 1}.a",
            "01",
            "1.",
            "'\\/'",
            "$trim('a')",
            "$number('1')",
            "$states.input.rows[n = 1",
            "[1..]",
            "(1",
            "[1,]",
            "$f?.a",
        ] {
            assert!(check(source).is_err(), "{source}");
        }
        assert_eq!(check("$string($floor($millis() / 1000)) & $string($count([1]))"), Ok(()));
        let deep = |depth: usize| format!("{}1{}", "(".repeat(depth), ")".repeat(depth));
        assert_eq!(check(&deep(31)), Ok(()));
        assert!(check(&deep(32)).is_err());
        assert_eq!(check("$fromMillis(1)").unwrap_err(), "calls $fromMillis, which does not run here");
    }
}
