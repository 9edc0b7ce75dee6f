//! Reading one TOML document with the place of everything in it.

use std::{
    borrow::Cow,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeInteger, DeTable, DeValue},
};

use super::{ConfigError, Place, address::SOCKET_PATH_BYTES, beside, parse_duration};

/// A file's name and text.
pub(super) struct Document<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
}

impl<'a> Document<'a> {
    pub(super) fn error(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        let before = self.text.get(..span.start.min(self.text.len())).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        ConfigError {
            place: Some(Place { file: PathBuf::from(self.path), line, column }),
            message: message.into(),
        }
    }

    pub(super) fn parse(&self) -> Result<Spanned<DeTable<'a>>, ConfigError> {
        DeTable::parse(self.text).map_err(|error| {
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            self.error(error.span().unwrap_or_default(), message)
        })
    }
}

/// Tables for which people write one text, and what they mean. What they wrote is not repeated: it may be a secret.
const MEANT: [(&str, &str); 7] = [
    ("bearer", "issuer = \"https://…\""),
    ("edge", "url = \"wss://…\""),
    ("health_check", "path = \"/healthz\""),
    ("log", "level = \"info\""),
    ("oidc", "issuer = \"https://…\""),
    ("redirect", "to = \"https://…\""),
    ("respond", "body = \"…\""),
];

/// A table, all of whose keys are known.
pub(super) struct Table<'a> {
    document: &'a Document<'a>,
    entries: &'a DeTable<'a>,
    span: Range<usize>,
}

impl<'a> Table<'a> {
    /// Takes a table whose keys must be among `known`; `what` names it in messages.
    pub(super) fn new(
        document: &'a Document<'a>,
        entries: &'a DeTable<'a>,
        span: Range<usize>,
        what: &str,
        known: &[&str],
    ) -> Result<Self, ConfigError> {
        let unknown = entries
            .iter()
            .map(|(key, _)| key)
            .filter(|key| !known.contains(&&**key.get_ref()))
            .min_by_key(|key| key.span().start);
        if let Some(key) = unknown {
            let name = key.get_ref();
            let nearest = known
                .iter()
                .map(|known| (strsim::damerau_levenshtein(name, known), *known))
                .filter(|(distance, known)| *distance <= 1 + known.len() / 3)
                .min();
            let advice = match nearest {
                Some((_, known)) => format!("did you mean {known:?}?"),
                None => format!("known are {}", known.join(", ")),
            };
            return Err(document.error(key.span(), format!("unknown key {name:?} in {what}: {advice}")));
        }
        Ok(Self { document, entries, span })
    }

    pub(super) fn error(&self, message: impl Into<String>) -> ConfigError {
        self.document.error(self.span.clone(), message)
    }

    fn wrong_type(&self, key: &str, value: &Spanned<DeValue<'_>>, wanted: &str) -> ConfigError {
        let message = format!("{key:?} must be {wanted}, not {}", article(value.get_ref().type_str()));
        self.document.error(value.span(), message)
    }

    /// A text that `parse` accepts.
    pub(super) fn text<T, E: ToString>(
        &self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        let text = value.get_ref().as_str().ok_or_else(|| self.wrong_type(key, value, "a text in quotes"))?;
        parse(text).map(Some).map_err(|error| self.document.error(value.span(), error.to_string()))
    }

    /// The same for a number that may stand without quotes.
    pub(super) fn text_or_integer<T, E: ToString>(
        &self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match value.get_ref().as_integer() {
            Some(integer) => parse(&self.decimal(integer, value.span())?)
                .map(Some)
                .map_err(|error| self.document.error(value.span(), error.to_string())),
            None => self.text(key, parse),
        }
    }

    /// A whole number with decimal digits, whichever way it is written: `0x400` is 1024.
    fn decimal(&self, integer: &DeInteger<'_>, span: Range<usize>) -> Result<String, ConfigError> {
        match integer.radix() {
            10 => Ok(integer.as_str().to_owned()),
            radix => u64::from_str_radix(integer.as_str(), radix)
                .map(|number| number.to_string())
                .map_err(|_| self.document.error(span, format!("{integer} is too large a number"))),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        value.get_ref().as_bool().map(Some).ok_or_else(|| self.wrong_type(key, value, "true or false"))
    }

    pub(super) fn integer(
        &self,
        key: &str,
        range: std::ops::RangeInclusive<u32>,
    ) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        let integer = value
            .get_ref()
            .as_integer()
            .ok_or_else(|| self.wrong_type(key, value, "a whole number without quotes"))?;
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
            let message = format!("{key:?} must be from {} to {}", range.start(), range.end());
            self.document.error(value.span(), message)
        })
    }

    /// A table in this one.
    pub(super) fn table(&self, key: &str, known: &[&str]) -> Result<Option<Self>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        let entries = value.get_ref().as_table().ok_or_else(|| self.no_table(key, value, known))?;
        Self::new(self.document, entries, value.span(), &format!("[{key}]"), known).map(Some)
    }

    /// Says how the table is written that should stand here.
    fn no_table(&self, key: &str, value: &Spanned<DeValue<'_>>, known: &[&str]) -> ConfigError {
        let advice = match MEANT.iter().find(|(table, _)| *table == key) {
            Some((_, meant)) => format!("write {key} = {{ {meant} }}"),
            None => format!("write {key} = {{ … }} with {}", known.join(", ")),
        };
        let is = article(value.get_ref().type_str());
        self.document.error(value.span(), format!("{key:?} must be a table, not {is}: {advice}"))
    }

    /// Every table of a list of tables.
    pub(super) fn tables(&self, key: &str, known: &[&str]) -> Result<Vec<Self>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(Vec::new()) };
        let wrong = |value| self.wrong_type(key, value, &format!("a list of tables, [[{key}]]"));
        let mut tables = Vec::new();
        for value in value.get_ref().as_array().ok_or_else(|| wrong(value))?.iter() {
            let entries = value.get_ref().as_table().ok_or_else(|| wrong(value))?;
            tables.push(Self::new(self.document, entries, value.span(), &format!("[[{key}]]"), known)?);
        }
        Ok(tables)
    }

    /// Every text of a list, with its place.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<(&'a str, Range<usize>)>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(Vec::new()) };
        let wrong = |value| self.wrong_type(key, value, "a list of texts");
        let mut texts = Vec::new();
        for value in value.get_ref().as_array().ok_or_else(|| wrong(value))?.iter() {
            texts.push((value.get_ref().as_str().ok_or_else(|| wrong(value))?, value.span()));
        }
        Ok(texts)
    }

    /// The same where whole numbers may stand without quotes.
    pub(super) fn texts_or_integers(&self, key: &str) -> Result<Vec<(String, Range<usize>)>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(Vec::new()) };
        let wrong = |value: &_| self.wrong_type(key, value, "a list of texts and whole numbers");
        let read = |value: &Spanned<DeValue<'a>>| match value.get_ref() {
            DeValue::String(text) => Ok((text.to_string(), value.span())),
            DeValue::Integer(number) => Ok((self.decimal(number, value.span())?, value.span())),
            _ => Err(wrong(value)),
        };
        value.get_ref().as_array().ok_or_else(|| wrong(value))?.iter().map(read).collect()
    }

    /// One table, or every table of a list of them.
    pub(super) fn table_or_tables(&self, key: &str, known: &[&str]) -> Result<Vec<Self>, ConfigError> {
        match self.entries.get(key) {
            Some(value) if value.get_ref().as_array().is_some() => self.tables(key, known),
            _ => Ok(self.table(key, known)?.into_iter().collect()),
        }
    }

    /// A table of any names, each with one text or several, or true, false or a number.
    pub(super) fn choices(&self, key: &str) -> Result<Vec<(String, Vec<String>)>, ConfigError> {
        let Some(value) = self.entries.get(key) else { return Ok(Vec::new()) };
        let entries = value.get_ref().as_table().ok_or_else(|| self.wrong_type(key, value, "a table"))?;
        let text = |name: &str, value: &Spanned<DeValue<'a>>| match value.get_ref() {
            DeValue::String(text) => Ok(text.to_string()),
            DeValue::Boolean(truth) => Ok(truth.to_string()),
            DeValue::Integer(number) => self.decimal(number, value.span()),
            _ => Err(self.wrong_type(name, value, "a text or a list of texts")),
        };
        let read = |(name, value): (&Spanned<Cow<'a, str>>, &Spanned<DeValue<'a>>)| {
            let name = name.get_ref();
            let texts = match value.get_ref().as_array() {
                Some(list) => list.iter().map(|value| text(name, value)).collect::<Result<_, _>>()?,
                None => vec![text(name, value)?],
            };
            if texts.is_empty() {
                return Err(self.document.error(value.span(), format!("{name:?} allows nothing")));
            }
            Ok((name.to_string(), texts))
        };
        entries.iter().map(read).collect()
    }

    pub(super) fn is_text(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| value.get_ref().as_str().is_some())
    }

    pub(super) fn is_list(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| value.get_ref().as_array().is_some())
    }

    pub(super) const fn document(&self) -> &'a Document<'a> {
        self.document
    }

    /// An error about one key.
    pub(super) fn error_at(&self, key: &str, message: impl Into<String>) -> ConfigError {
        self.document.error(self.span_of(key), message)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    pub(super) fn span_of(&self, key: &str) -> Range<usize> {
        self.entries.get(key).map_or_else(|| self.span.clone(), Spanned::span)
    }
}

fn article(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

/// A file's name, beside the file that names it.
pub(super) fn nonempty_path(file: &Path, text: &str) -> Result<PathBuf, &'static str> {
    if text.is_empty() { Err("a file name is wanted here") } else { Ok(beside(file, text)) }
}

/// A unix socket's name, beside the file that names it.
pub(super) fn socket_path(file: &Path, text: &str) -> Result<PathBuf, String> {
    let path = nonempty_path(file, text)?;
    match path.as_os_str().len() {
        0..=SOCKET_PATH_BYTES => Ok(path),
        bytes => Err(format!(
            "the path of a unix socket has at most {SOCKET_PATH_BYTES} bytes, and this has {bytes}"
        )),
    }
}

pub(super) fn duration_within(text: &str, least: &str, most: &str) -> Result<Duration, String> {
    let duration = parse_duration(text)?;
    if (parse_duration(least)?..=parse_duration(most)?).contains(&duration) {
        Ok(duration)
    } else {
        Err(format!("{text:?} must be from {least} to {most}"))
    }
}
