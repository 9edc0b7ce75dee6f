//! JSON without ambiguity: text enters, a value leaves in which no object names a member twice.
//!
//! Two readers of one token must see the same claims. Readers differ in which of two equal
//! members they take, so an object that has two is refused at any depth, also where the names
//! only become equal when their escapes are resolved.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};

/// A JSON value whose objects have no duplicate members.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Json {
    /// `null`, a boolean, or a number that is no integer from 0 to 2^64 - 1: nothing a token or a
    /// key needs.
    Other,
    /// An integer from 0 to 2^64 - 1, written without fraction or exponent.
    Integer(u64),
    /// A string.
    Text(String),
    /// An array.
    Array(Vec<Self>),
    /// An object.
    Object(Object),
}

/// The members of an object.
pub(crate) type Object = BTreeMap<String, Json>;

impl Json {
    /// Parses an object; nothing else may stand before or after it.
    pub(crate) fn object(bytes: &[u8]) -> Option<Object> {
        serde_json::from_slice(bytes).ok().and_then(Self::into_object)
    }

    pub(crate) fn into_object(self) -> Option<Object> {
        if let Self::Object(members) = self { Some(members) } else { None }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(crate) fn as_integer(&self) -> Option<u64> {
        if let Self::Integer(number) = self { Some(*number) } else { None }
    }

    /// The strings of an array that holds nothing else.
    pub(crate) fn as_texts(&self) -> Option<Vec<&str>> {
        if let Self::Array(items) = self { items.iter().map(Self::as_text).collect() } else { None }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate members")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json, E> {
        Ok(u64::try_from(number).map_or(Json::Other, Json::Integer))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json, E> {
        Ok(Json::Integer(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Text(text.into()))
    }

    fn visit_string<E>(self, text: String) -> Result<Json, E> {
        Ok(Json::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut members = Object::new();
        while let Some((name, value)) = access.next_entry()? {
            if members.insert(name, value).is_some() {
                return Err(A::Error::custom("duplicate member"));
            }
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_refused_at_any_depth() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"x":{"a":1,"a":2}}"#,
            r#"{"x":[{"a":1,"b":2,"a":3}]}"#,
        ] {
            assert_eq!(Json::object(text.as_bytes()), None, "{text}");
        }
        assert!(Json::object(br#"{"a":{"a":1},"A":2}"#).is_some());
    }

    #[test]
    fn only_one_object_is_an_object() {
        for text in ["", "null", "[]", "\"a\"", "{}{}", "{} x", "\u{feff}{}", "{\"a\":1,}", "{'a':1}"] {
            assert_eq!(Json::object(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn integers_are_integers() {
        let value =
            |text: &str| Json::object(format!("{{\"n\":{text}}}").as_bytes()).map(|o| o["n"].as_integer());
        assert_eq!(value("18446744073709551615"), Some(Some(u64::MAX)));
        for other in ["1.0", "1e3", "-1", "-0", "18446744073709551616", "\"1\"", "true", "null"] {
            assert_eq!(value(other), Some(None), "{other}");
        }
    }

    #[test]
    fn nesting_ends_in_an_error_and_not_in_an_overflow() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(Json::object(deep.as_bytes()), None);
    }
}
