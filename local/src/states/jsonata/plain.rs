//! The plain part of JSONata, evaluated directly: enters the text of an expression, leaves its value in a
//! scope, or the word that the whole evaluator is to decide.
//!
//! The evaluator parses an expression anew each time and binds fifty functions before it looks at it,
//! eight times in a run. What machines write is mostly this: numbers, texts, selections, `+ - * / %`,
//! `&`, comparisons, `and`, `or`, `in` a list of texts, lists, one filter or position behind a selection, and a few functions.
//! Whatever is unusual about an expression or about a value in it (another type, nothing where
//! something is computed) is left to the evaluator, which also finds the words for an error.

use std::borrow::Cow;

use serde_json::Value;

use super::{Found, Lexer, Scope, Selection, Step, identifier, number_value};
use crate::clock;

/// How deep an expression may be nested to be a plain one.
const DEPTH: usize = 32;

/// Up to here a whole number is written with its digits alone.
const WRITTEN_IN_DIGITS: f64 = 1e15;

/// A plain expression.
#[derive(Debug, Clone)]
pub(super) enum Plain {
    Number(f64),
    Text(Box<str>),
    /// `$`: what a filter looks at.
    Item,
    Selection(Selection),
    List(Vec<Self>),
    /// What is at this position of a selected list.
    At(Selection, Box<Self>),
    /// What of a selected list meets the condition.
    Filtered(Selection, Box<Self>),
    Binary(Operator, Box<(Self, Self)>),
    Call(Function, Vec<Self>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Add,
    Subtract,
    In,
    Concatenate,
    Multiply,
    Divide,
    Remainder,
}

impl Operator {
    /// What stands at the beginning of `text`, and its length.
    fn read(text: &str) -> Option<(Self, usize)> {
        let word = identifier(text);
        Some(match word {
            "or" => (Self::Or, 2),
            "and" => (Self::And, 3),
            "in" => (Self::In, 2),
            _ => match text.as_bytes() {
                [b'!', b'=', ..] => (Self::NotEqual, 2),
                [b'<', b'=', ..] => (Self::LessOrEqual, 2),
                [b'>', b'=', ..] => (Self::GreaterOrEqual, 2),
                [b'=', ..] => (Self::Equal, 1),
                [b'<', ..] => (Self::Less, 1),
                [b'>', ..] => (Self::Greater, 1),
                [b'+', ..] => (Self::Add, 1),
                [b'-', ..] => (Self::Subtract, 1),
                [b'&', ..] => (Self::Concatenate, 1),
                [b'*', ..] => (Self::Multiply, 1),
                [b'/', ..] => (Self::Divide, 1),
                [b'%', ..] => (Self::Remainder, 1),
                _ => return None,
            },
        })
    }

    /// How strongly it binds.
    const fn strength(self) -> u8 {
        match self {
            Self::Or => 1,
            Self::And => 2,
            Self::Equal
            | Self::NotEqual
            | Self::Less
            | Self::LessOrEqual
            | Self::Greater
            | Self::GreaterOrEqual
            | Self::In => 3,
            Self::Add | Self::Subtract | Self::Concatenate => 4,
            Self::Multiply | Self::Divide | Self::Remainder => 5,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Count,
    Exists,
    Floor,
    Max,
    Millis,
    Min,
    Not,
    String,
}

impl Function {
    /// A function of this name that takes this many arguments.
    fn named(name: &str, arguments: usize) -> Option<Self> {
        Some(match (name, arguments) {
            ("count", 1) => Self::Count,
            ("exists", 1) => Self::Exists,
            ("floor", 1) => Self::Floor,
            ("max", 1) => Self::Max,
            ("millis", 0) => Self::Millis,
            ("min", 1) => Self::Min,
            ("not", 1) => Self::Not,
            ("string", 1) => Self::String,
            _ => return None,
        })
    }
}

/// A value on the way.
#[derive(Debug, Clone, PartialEq)]
enum Operand<'v> {
    Undefined,
    Bool(bool),
    Number(f64),
    Text(Cow<'v, str>),
    /// Null, an array or an object.
    Other(&'v Value),
    List(Vec<Self>),
    /// What a path found: several values that are not an array yet.
    Several(Vec<Self>),
}

impl<'v> From<&'v Value> for Operand<'v> {
    fn from(value: &'v Value) -> Self {
        match value {
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => Self::Number(number.as_f64().unwrap_or(f64::MAX)),
            Value::String(text) => Self::Text(text.into()),
            Value::Null | Value::Array(_) | Value::Object(_) => Self::Other(value),
        }
    }
}

impl Operand<'_> {
    const fn is_scalar(&self) -> bool {
        matches!(self, Self::Bool(_) | Self::Number(_) | Self::Text(_))
    }

    const fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    fn into_value(self) -> Option<Value> {
        match self {
            Self::Bool(value) => Some(value.into()),
            Self::Number(number) => number_value(number).ok(),
            Self::Text(text) => Some(text.into_owned().into()),
            Self::List(items) => items.into_iter().map(Self::into_value).collect(),
            Self::Undefined | Self::Other(_) | Self::Several(_) => None,
        }
    }
}

impl Plain {
    /// Reads an expression; nothing where it is not a plain one.
    pub(super) fn parse(lexer: &Lexer<'_>) -> Option<Self> {
        let mut parser = Parser { lexer, at: 0, depth: 0, in_filter: false };
        let plain = parser.expression(0)?;
        parser.rest().is_empty().then_some(plain)
    }

    /// Its value in `scope`, the inner `None` being JSONata's "undefined"; nothing where the evaluator is
    /// to decide.
    pub(super) fn evaluate(&self, scope: &impl Scope) -> Option<Option<Value>> {
        match self.operand(scope, None)? {
            Operand::Undefined => Some(None),
            operand => operand.into_value().map(Some),
        }
    }

    fn operand<'s>(&'s self, scope: &'s impl Scope, item: Option<&Operand<'s>>) -> Option<Operand<'s>> {
        match self {
            Self::Number(number) => Some(Operand::Number(*number)),
            Self::Text(text) => Some(Operand::Text(Cow::Borrowed(text))),
            Self::Item => item.cloned(),
            Self::Selection(selection) => match selection.find(scope) {
                Found::Value(value) => Some(value.into()),
                Found::Undefined => Some(Operand::Undefined),
                Found::Made(_) | Found::Mapped => None,
            },
            Self::List(items) => {
                let mut list = Vec::with_capacity(items.len());
                for element in items {
                    match element.operand(scope, item)? {
                        Operand::Several(several) => list.extend(several),
                        scalar if scalar.is_scalar() => list.push(scalar),
                        Operand::Undefined => {}
                        _ => return None,
                    }
                }
                Some(Operand::List(list))
            }
            Self::At(selection, position) => {
                let Found::Value(Value::Array(items)) = selection.find(scope) else { return None };
                let position = position.operand(scope, item)?.number()?.floor();
                // Whole and small: exact.
                #[expect(clippy::cast_possible_truncation, reason = "checked on the line below")]
                let index = (position.abs() <= f64::from(i32::MAX)).then_some(position as i64)?;
                Some(super::position(index, items.len()).map_or(Operand::Undefined, |at| (&items[at]).into()))
            }
            Self::Filtered(selection, condition) => {
                let found = mapped(selection, scope)?;
                if found.is_empty() {
                    // The evaluator looks at the condition even so, and may find an error in it.
                    return None;
                }
                let mut kept = Vec::new();
                for found in found {
                    match condition.operand(scope, Some(&found))? {
                        Operand::Bool(true) => kept.push(found),
                        Operand::Bool(false) => {}
                        _ => return None,
                    }
                }
                Some(Operand::Several(kept))
            }
            Self::Binary(operator, sides) => {
                let left = sides.0.operand(scope, item)?;
                match (operator, &left) {
                    (Operator::And, Operand::Bool(false)) | (Operator::Or, Operand::Bool(true)) => Some(left),
                    _ => binary(*operator, left, sides.1.operand(scope, item)?),
                }
            }
            Self::Call(function, arguments) => match arguments.first() {
                // Milliseconds of this age are far below what a double holds.
                None => Some(Operand::Number(clock::epoch_ms() as f64)),
                Some(argument) => call(*function, argument.operand(scope, item)?),
            },
        }
    }
}

/// What a path that leads through one array finds.
fn mapped<'s>(selection: &'s Selection, scope: &'s impl Scope) -> Option<Vec<Operand<'s>>> {
    let steps = &selection.steps;
    let (to_array, rest) = (0..=steps.len()).find_map(|at| match selection.find_front(at, scope) {
        Found::Value(Value::Array(items)) => Some((items, &steps[at..])),
        _ => None,
    })?;
    let mut found = Vec::with_capacity(to_array.len());
    for item in to_array {
        let mut value = Some(item);
        for step in rest {
            let (Step::Field(name), Some(Value::Object(fields))) = (step, value) else { return None };
            value = fields.get(&**name);
            if value.is_none() {
                break;
            }
        }
        if let Some(value) = value {
            let operand = Operand::from(value);
            if !operand.is_scalar() {
                return None;
            }
            found.push(operand);
        }
    }
    Some(found)
}

fn binary<'v>(operator: Operator, left: Operand<'v>, right: Operand<'v>) -> Option<Operand<'v>> {
    let finite = |number: f64| number.is_finite().then_some(Operand::Number(number));
    match operator {
        Operator::Or | Operator::And => match (left, right) {
            // What would have decided alone has been looked at before.
            (Operand::Bool(_), Operand::Bool(right)) => Some(Operand::Bool(right)),
            _ => None,
        },
        Operator::Equal | Operator::NotEqual => {
            let wanted = operator == Operator::Equal;
            match (left, right) {
                (Operand::Undefined, _) | (_, Operand::Undefined) => Some(Operand::Bool(false)),
                (Operand::Text(left), Operand::Text(right)) => Some(Operand::Bool((left == right) == wanted)),
                (Operand::Number(left), Operand::Number(right)) => {
                    // The evaluator compares doubles as they are.
                    #[expect(clippy::float_cmp, reason = "it is what the language says")]
                    let equal = left == right;
                    Some(Operand::Bool(equal == wanted))
                }
                (Operand::Bool(left), Operand::Bool(right)) => Some(Operand::Bool((left == right) == wanted)),
                _ => None,
            }
        }
        Operator::In => match (left, right) {
            (Operand::Undefined, _) | (_, Operand::Undefined) => Some(Operand::Bool(false)),
            (Operand::Text(left), Operand::Other(Value::Array(items))) => {
                let texts = items.iter().map(Value::as_str).collect::<Option<Vec<_>>>()?;
                Some(Operand::Bool(texts.contains(&&*left)))
            }
            _ => None,
        },
        Operator::Less => Some(Operand::Bool(left.number()? < right.number()?)),
        Operator::LessOrEqual => Some(Operand::Bool(left.number()? <= right.number()?)),
        Operator::Greater => Some(Operand::Bool(left.number()? > right.number()?)),
        Operator::GreaterOrEqual => Some(Operand::Bool(left.number()? >= right.number()?)),
        Operator::Add => finite(left.number()? + right.number()?),
        Operator::Subtract => finite(left.number()? - right.number()?),
        Operator::Multiply => finite(left.number()? * right.number()?),
        Operator::Divide => finite(left.number()? / right.number()?),
        Operator::Remainder => finite(left.number()? % right.number()?),
        Operator::Concatenate => {
            let (left, right) = (written(left)?, written(right)?);
            Some(Operand::Text(left + right))
        }
    }
}

fn call(function: Function, argument: Operand<'_>) -> Option<Operand<'_>> {
    match function {
        Function::Exists => match argument {
            Operand::Several(_) => None,
            argument => Some(Operand::Bool(argument != Operand::Undefined)),
        },
        Function::Count => {
            let count = match &argument {
                Operand::Undefined => 0,
                Operand::List(items) => items.len(),
                Operand::Other(Value::Array(items)) => items.len(),
                Operand::Several(_) => return None,
                Operand::Bool(_) | Operand::Number(_) | Operand::Text(_) | Operand::Other(_) => 1,
            };
            u32::try_from(count).ok().map(|count| Operand::Number(count.into()))
        }
        Function::Floor => argument.number().map(|number| Operand::Number(number.floor())),
        Function::Max => extreme(&argument, f64::max),
        Function::Min => extreme(&argument, f64::min),
        Function::Not => match argument {
            Operand::Bool(value) => Some(Operand::Bool(!value)),
            _ => None,
        },
        Function::String => written(argument).map(Operand::Text),
        Function::Millis => None,
    }
}

fn extreme(numbers: &Operand<'_>, choose: fn(f64, f64) -> f64) -> Option<Operand<'static>> {
    let Operand::List(items) = numbers else { return None };
    let numbers = items.iter().map(Operand::number).collect::<Option<Vec<_>>>()?;
    numbers.into_iter().reduce(choose).map(Operand::Number)
}

/// A text, or a whole number as text.
fn written(operand: Operand<'_>) -> Option<Cow<'_, str>> {
    match operand {
        Operand::Text(text) => Some(text),
        // Not the zero below zero.
        Operand::Number(number)
            if number.fract() == 0.0 && number.abs() < WRITTEN_IN_DIGITS && number.to_bits() != 1 << 63 =>
        {
            number_value(number).ok().map(|number| number.to_string().into())
        }
        _ => None,
    }
}

struct Parser<'l, 't> {
    lexer: &'l Lexer<'t>,
    at: usize,
    depth: usize,
    in_filter: bool,
}

impl<'t> Parser<'_, 't> {
    /// What has not been read, without the space before it.
    fn rest(&mut self) -> &'t str {
        let rest = &self.lexer.text[self.at..];
        let trimmed = rest.trim_ascii_start();
        self.at += rest.len() - trimmed.len();
        trimmed
    }

    fn take(&mut self, token: &str) -> Option<()> {
        self.rest().starts_with(token).then(|| self.at += token.len())
    }

    /// An expression of operators that bind more strongly than `than`.
    fn expression(&mut self, than: u8) -> Option<Plain> {
        self.depth += 1;
        if self.depth > DEPTH {
            return None;
        }
        let mut left = self.operand()?;
        while let Some((operator, length)) = Operator::read(self.rest())
            && operator.strength() > than
        {
            self.at += length;
            let right = self.expression(operator.strength())?;
            left = Plain::Binary(operator, Box::new((left, right)));
        }
        self.depth -= 1;
        Some(left)
    }

    fn operand(&mut self) -> Option<Plain> {
        let rest = self.rest();
        match rest.bytes().next()? {
            b'0'..=b'9' => {
                let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                // No fraction, exponent or range, and no more digits than a double holds.
                if end > 15 || rest[end..].starts_with(['.', 'e', 'E']) {
                    return None;
                }
                self.at += end;
                rest[..end].parse().ok().map(Plain::Number)
            }
            quote @ (b'\'' | b'"') => {
                let text = &rest[1..];
                let end = text.find(char::from(quote))?;
                if text[..end].contains('\\') {
                    return None;
                }
                self.at += end + 2;
                Some(Plain::Text(text[..end].into()))
            }
            b'(' => {
                self.take("(")?;
                let inner = self.expression(0)?;
                self.take(")")?;
                self.ended(inner)
            }
            b'[' => {
                self.take("[")?;
                let list = Plain::List(self.list(']')?);
                self.ended(list)
            }
            b'$' => self.named(),
            _ => None,
        }
    }

    /// Expressions up to the closing bracket.
    fn list(&mut self, close: char) -> Option<Vec<Plain>> {
        let mut list = Vec::new();
        if self.rest().starts_with(close) {
            self.at += 1;
            return Some(list);
        }
        loop {
            list.push(self.expression(0)?);
            if self.rest().starts_with(close) {
                self.at += 1;
                return Some(list);
            }
            self.take(",")?;
        }
    }

    /// Something that begins with `$`.
    fn named(&mut self) -> Option<Plain> {
        let rest = self.rest();
        let Some((selection, length)) = self.lexer.selection(self.at) else {
            let name = identifier(&rest[1..]);
            self.at += 1 + name.len();
            if name.is_empty() {
                return if self.in_filter { self.ended(Plain::Item) } else { None };
            }
            if !self.lexer.text[self.at..].starts_with('(') {
                return None;
            }
            self.at += 1;
            let arguments = self.list(')')?;
            let call = Plain::Call(Function::named(name, arguments.len())?, arguments);
            return self.ended(call);
        };
        self.at += length;
        if !self.rest().starts_with('[') {
            return self.ended(Plain::Selection(selection));
        }
        if self.in_filter {
            return None;
        }
        self.at += 1;
        self.in_filter = true;
        let inside = Box::new(self.expression(0)?);
        self.in_filter = false;
        self.take("]")?;
        let plain = if inside.names_item() {
            Plain::Filtered(selection, inside)
        } else {
            Plain::At(selection, inside)
        };
        self.ended(plain)
    }

    /// Refuses an operand that goes on.
    fn ended(&mut self, operand: Plain) -> Option<Plain> {
        (!self.rest().starts_with(['.', '[', '{', '(', '^', '`'])).then_some(operand)
    }
}

impl Plain {
    fn names_item(&self) -> bool {
        match self {
            Self::Item => true,
            Self::Number(_) | Self::Text(_) | Self::Selection(_) => false,
            Self::List(items) | Self::Call(_, items) => items.iter().any(Self::names_item),
            Self::At(_, inside) | Self::Filtered(_, inside) => inside.names_item(),
            Self::Binary(_, sides) => sides.0.names_item() || sides.1.names_item(),
        }
    }
}
