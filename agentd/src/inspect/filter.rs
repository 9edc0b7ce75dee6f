//! Which of the captured requests are wanted.
//!
//! Enters: the parameters of a query. Leaves: yes or no for a record.

use std::{collections::BTreeSet, ops::RangeInclusive};

use memchr::memmem::Finder;

use super::{decode, redact::Redact};
use crate::capture::{
    fields::Fields,
    kept::Kept,
    record::{Outcome, Record},
};

/// Reads ids with commas.
pub(crate) fn parse_ids(text: &str) -> Result<BTreeSet<u64>, String> {
    let ids = text.split(',').map(|id| id.trim().parse::<u64>());
    ids.collect::<Result<_, _>>().map_err(|_| format!("{text:?} is not a list of ids: write it as 3 or 3,5"))
}

/// Which are wanted. Everything that is said must hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    tunnel: Option<String>,
    methods: Vec<String>,
    path: Option<String>,
    status: Vec<RangeInclusive<u16>>,
    text: Option<Finder<'static>>,
    errors: bool,
}

impl Filter {
    /// Takes what is said by one parameter; false where that is none of a filter's.
    ///
    /// # Errors
    ///
    /// A sentence for the user.
    pub(crate) fn take(&mut self, name: &str, value: &str) -> Result<bool, String> {
        match name {
            "tunnel" => self.tunnel = Some(value.to_owned()),
            "method" => {
                let methods = value.split(',').map(str::trim).filter(|method| !method.is_empty());
                self.methods = methods.map(str::to_ascii_uppercase).collect();
            }
            "path" => self.path = Some(value.to_owned()),
            "status" => self.status = parse_statuses(value)?,
            "text" => {
                let lower = value.to_ascii_lowercase();
                self.text = (!lower.is_empty()).then(|| Finder::new(&lower).into_owned());
            }
            "errors" => self.errors = parse_flag(name, value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether bodies are searched, which takes long.
    pub(crate) const fn is_search(&self) -> bool {
        self.text.is_some()
    }

    /// Whether a record is wanted. Hidden values are not searched: that would tell them.
    pub(crate) fn wants(&self, tunnel: &str, record: &Record, redact: &Redact) -> bool {
        let status = record.answer.as_ref().map(|answer| answer.status);
        let path = record.target.split('?').next().unwrap_or_default();
        self.tunnel.as_ref().is_none_or(|wanted| wanted == tunnel)
            && (self.methods.is_empty()
                || self.methods.iter().any(|wanted| record.method.eq_ignore_ascii_case(wanted)))
            && self.path.as_ref().is_none_or(|wanted| {
                if wanted.contains('*') { matches(wanted, path) } else { record.target.contains(&**wanted) }
            })
            && (self.status.is_empty()
                || status.is_some_and(|status| self.status.iter().any(|range| range.contains(&status))))
            && (!self.errors || is_error(record))
            && self.text.as_ref().is_none_or(|text| has_text(text, record, redact))
    }
}

/// Whether it failed, or was answered with a status that says so.
pub(crate) fn is_error(record: &Record) -> bool {
    record.outcome == Some(Outcome::Failed)
        || record.answer.as_ref().is_some_and(|answer| answer.status >= 400)
}

pub(crate) fn parse_flag(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("{name}={value:?} is neither true nor false")),
    }
}

fn parse_statuses(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let one = |part: &str| {
        let number = |text: &str| text.parse::<u16>().ok().filter(|status| (100..600).contains(status));
        let class = part.strip_suffix("xx").or_else(|| part.strip_suffix("XX"));
        let class = class.and_then(|class| class.parse::<u16>().ok());
        match (class, part.split_once('-')) {
            (Some(class @ 1..=5), _) => Some(class * 100..=class * 100 + 99),
            (_, Some((from, to))) => Some(number(from)?..=number(to)?).filter(|range| !range.is_empty()),
            _ => number(part).map(|status| status..=status),
        }
    };
    text.split(',')
        .map(|part| one(part.trim()))
        .collect::<Option<_>>()
        .ok_or_else(|| format!("{text:?} is no status: write it as 404, 5xx, 400-499 or several with commas"))
}

/// Whether `pattern`, in which `*` stands for anything, is all of `text`.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn has_text(text: &Finder<'_>, record: &Record, redact: &Redact) -> bool {
    let mut lower = Vec::new();
    let mut found = |bytes: &[u8]| {
        lower.clear();
        lower.extend(bytes.iter().map(u8::to_ascii_lowercase));
        text.find(&lower).is_some()
    };
    let in_fields = |fields: &Fields, found: &mut dyn FnMut(&[u8]) -> bool| {
        fields.iter().any(|(name, value)| found(name.as_bytes()) || !redact.hides(name) && found(value))
    };
    // As it passed, and as it is shown.
    let in_body = |fields: &Fields, body: &Kept, found: &mut dyn FnMut(&[u8]) -> bool| {
        let bytes = body.to_vec();
        found(&bytes) || decode::body(fields, &bytes).is_some_and(|decoded| found(&decoded.bytes))
    };
    found(record.target.as_bytes())
        || in_fields(&record.fields, &mut found)
        || in_body(&record.fields, &record.body, &mut found)
        || record.answer.as_ref().is_some_and(|answer| {
            in_fields(&answer.fields, &mut found) || in_body(&answer.fields, &answer.body, &mut found)
        })
        || record.frames.iter().any(|frame| found(&frame.first))
}

#[cfg(test)]
mod tests {
    use crate::capture::record::{Answer, Kind, Source};

    use super::*;

    fn record() -> Record {
        let mut record = Record::new(Source::Edge, Kind::Http, "POST".into(), "/api/orders/17?page=2".into());
        record.fields = Fields::from_pairs(
            [("host", &b"localhost"[..]), ("authorization", b"Bearer hunter2")].into_iter(),
        );
        record.body = Kept::whole(b"{\"Name\":\"Ada\"}", 100);
        record.answer = Some(Answer::new(
            404,
            Fields::from_pairs([("x-reason", &b"missing"[..])].into_iter()),
            Kept::whole(&[&[0xff; 20_000][..], b"needle"].concat(), 100_000),
        ));
        record
    }

    fn wants(query: &[(&str, &str)]) -> bool {
        let mut filter = Filter::default();
        for (name, value) in query {
            assert!(filter.take(name, value).unwrap(), "{name}");
        }
        filter.wants("web", &record(), &Redact::default())
    }

    #[test]
    fn each_parameter_says_what_is_wanted() {
        for query in [
            &[][..],
            &[("tunnel", "web")],
            &[("method", "get,post")],
            &[("method", "")],
            &[("path", "orders")],
            &[("path", "page=2")],
            &[("path", "/api/*/17")],
            &[("path", "*17")],
            &[("status", "404")],
            &[("status", "2xx, 4xx")],
            &[("status", "400-410")],
            &[("text", "NEEDLE")],
            &[("text", "\"name\":\"ada")],
            &[("text", "x-reason")],
            &[("text", "missing")],
            &[("text", "")],
            &[("errors", "true")],
            &[("tunnel", "web"), ("method", "POST"), ("status", "4xx"), ("text", "ada"), ("errors", "")],
        ] {
            assert!(wants(query), "{query:?}");
        }
        for query in [
            &[("tunnel", "we")][..],
            &[("method", "get")],
            &[("path", "order/")],
            &[("path", "/api/*/1")],
            &[("path", "api/*")],
            &[("status", "200")],
            &[("text", "absent")],
            &[("text", "hunter2")],
            &[("method", "POST"), ("status", "5xx")],
        ] {
            assert!(!wants(query), "{query:?}");
        }
    }

    #[test]
    fn bodies_are_searched_unpacked_too() {
        let mut record = record();
        let packed = zstd::bulk::compress("a needle that is packed".repeat(10).as_bytes(), 1).unwrap();
        for fields in [&mut record.fields, &mut record.answer.as_mut().unwrap().fields] {
            *fields = Fields::from_pairs([("content-encoding", &b"zstd"[..])].into_iter());
        }
        let plain = (record.body.clone(), record.answer.as_ref().unwrap().body.clone());
        let mut filter = Filter::default();
        assert!(filter.take("text", "is packeda").unwrap() && filter.is_search());
        assert!(!filter.wants("web", &record, &Redact::default()));
        record.body = Kept::whole(&packed, 1000);
        assert!(filter.wants("web", &record, &Redact::default()));
        record.body = plain.0;
        record.answer.as_mut().unwrap().body = Kept::whole(&packed, 1000);
        assert!(filter.wants("web", &record, &Redact::default()));
    }

    #[test]
    fn what_is_no_status_is_refused() {
        for text in ["", "x", "6xx", "99", "600", "500-400", "4xx,"] {
            assert!(Filter::default().take("status", text).is_err(), "{text}");
        }
        assert!(Filter::default().take("errors", "maybe").is_err());
        assert_eq!(Filter::default().take("other", "x"), Ok(false));
    }
}
