//! One JSON object a line: an event of the log as programs read it.
//!
//! `timestamp`, `level`, `message`, the event's own fields in their order, and `target`. A line is put together in one
//! piece of memory: every request has one.

use std::{
    fmt::{self, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatFields,
        format::{FormatEvent, Writer},
    },
    registry::LookupSpan,
};

/// How long a line usually is, in bytes.
const USUAL_BYTES: usize = 512;

/// Writes events so.
pub(super) struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let mut line = Vec::with_capacity(USUAL_BYTES);
        line.extend_from_slice(b"{\"timestamp\":\"");
        put_time(&mut line, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros());
        line.extend_from_slice(b"\",\"level\":\"");
        line.extend_from_slice(meta.level().as_str().as_bytes());
        line.push(b'"');
        let mut fields = Fields { line: &mut line, scratch: String::new(), target: None };
        event.record(&mut fields);
        let target = fields.target.take();
        put_text(&mut line, "target", target.as_deref().unwrap_or_else(|| meta.target()));
        line.extend_from_slice(b"}\n");
        // All of it came from texts and numbers.
        writer.write_str(std::str::from_utf8(&line).map_err(|_| fmt::Error)?)
    }
}

/// `2026-11-29T08:59:23.123456Z`, from microseconds since 1970.
fn put_time(line: &mut Vec<u8>, micros: u128) {
    let nanos = i128::try_from(micros).unwrap_or_default() * 1000;
    let at =
        time::OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let mut digits = |number: u32, count: u32, end: u8| {
        let places = (0..count).rev().map(|place| b'0' + (number / 10_u32.pow(place) % 10) as u8);
        line.extend(places);
        line.push(end);
    };
    digits(at.year().unsigned_abs(), 4, b'-');
    digits(u8::from(at.month()).into(), 2, b'-');
    digits(at.day().into(), 2, b'T');
    digits(at.hour().into(), 2, b':');
    digits(at.minute().into(), 2, b':');
    digits(at.second().into(), 2, b'.');
    digits(at.microsecond(), 6, b'Z');
}

/// `,"name":`; names of fields are words.
fn put_name(line: &mut Vec<u8>, name: &str) {
    line.extend_from_slice(b",\"");
    line.extend_from_slice(name.as_bytes());
    line.extend_from_slice(b"\":");
}

fn put_text(line: &mut Vec<u8>, name: &str, value: &str) {
    put_name(line, name);
    put_value(line, &value);
}

fn put_value<T: serde::Serialize>(line: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(line, value).expect("texts and numbers are JSON, and memory takes every write");
}

struct Fields<'a> {
    line: &'a mut Vec<u8>,
    scratch: String,
    /// Where an event of the crate `log` comes from: it says so in a field.
    target: Option<String>,
}

impl Fields<'_> {
    fn put<T: serde::Serialize>(&mut self, field: &Field, value: &T) {
        // What else `log` has to say of the place in the program is not said of others.
        if !field.name().starts_with("log.") {
            put_name(self.line, field.name());
            put_value(self.line, value);
        }
    }
}

impl Visit for Fields<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            self.target = Some(value.to_owned());
        }
        self.put(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = std::mem::take(&mut self.scratch);
        text.clear();
        if write!(text, "{value:?}").is_ok() {
            self.put(field, &text);
        }
        self.scratch = text;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().map_err(|_| std::io::ErrorKind::Other)?.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(own: bool, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let to = lines.clone();
        let layer =
            tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(move || to.clone());
        let registry = tracing_subscriber::registry();
        if own {
            tracing::subscriber::with_default(registry.with(layer.event_format(Json)), log);
        } else {
            tracing::subscriber::with_default(registry.with(layer), log);
        }
        let text = lines.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn an_event_is_the_object_that_the_library_makes_of_it() {
        let nobody: Option<&str> = None;
        let log = || {
            tracing::info!(
                target: "agentd::access",
                text = "a\"b\\c\u{1}\n\u{2028}ä",
                number = 7_u64,
                less = -7,
                float = 0.25,
                none = nobody,
                yes = true,
                shown = %"x y",
                debug = ?Some("z"),
                not_a_number = f64::NAN,
                "a {} of {}",
                "message",
                1
            );
            tracing::warn!("plain");
        };
        let read = |text: &str| -> Vec<Value> {
            let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
            lines
                .map(|mut line: Value| {
                    let at = line["timestamp"].take();
                    assert_eq!((at.as_str().unwrap().len(), line.is_object()), (27, true));
                    line
                })
                .collect()
        };
        let (own, theirs) = (logged(true, log), logged(false, log));
        assert_eq!(read(&own), read(&theirs));
        assert_eq!(read(&own)[0]["less"], json!(-7));
        assert!(
            own.starts_with("{\"timestamp\":\"20")
                && own.ends_with("\"target\":\"agentd::report::json::tests\"}\n")
        );
    }

    #[test]
    fn a_time_is_written_as_rfc_3339_says() {
        for (micros, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399_999_999, "2000-02-28T23:59:59.999999Z"),
            (1_795_942_763_000_042, "2026-11-29T08:59:23.000042Z"),
        ] {
            let mut line = Vec::new();
            put_time(&mut line, micros);
            assert_eq!(String::from_utf8(line).unwrap(), text);
        }
    }
}
