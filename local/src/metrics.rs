//! CloudWatch, as far as functions feed it: enter lines of their standard output in the embedded metric
//! format, leave the sums of each metric. What CloudWatch would ignore without a word is an error here.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a line of this format begins with, as the functions write it.
const BEGIN: &[u8] = b"{\"_aws\":";

/// The most metrics in one line (CloudWatch User Guide, "Embedded metric format specification").
const METRICS: usize = 100;

/// Every metric so far.
#[derive(Debug, Default)]
pub struct Metrics {
    series: Mutex<BTreeMap<String, Series>>,
}

/// What is known of one metric with one value of its dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Series {
    /// How many values there were.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The largest.
    pub max: f64,
    /// The last.
    pub last: f64,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "_aws")]
    metadata: Metadata,
    #[serde(flatten)]
    members: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Metadata {
    timestamp: u64,
    cloud_watch_metrics: Vec<Directive>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Directive {
    namespace: String,
    dimensions: Vec<Vec<String>>,
    metrics: Vec<Definition>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Definition {
    name: String,
    unit: String,
}

impl Metrics {
    /// Takes a line of a function's standard output, if it is one of metrics. Says whether it was.
    pub fn take(&self, function: &str, line: &[u8]) -> bool {
        if !line.starts_with(BEGIN) {
            return false;
        }
        match read(line) {
            Ok(values) => {
                let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
                for (name, value) in values {
                    let own =
                        series.entry(name).or_insert(Series { count: 0, sum: 0.0, max: value, last: value });
                    own.count += 1;
                    own.sum += value;
                    own.max = own.max.max(value);
                    own.last = value;
                }
            }
            Err(problem) => tracing::error!(function, problem, "CloudWatch would not take these metrics"),
        }
        true
    }

    /// What was taken so far: a metric's name and, after it, the values of its dimensions.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<String, Series> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn read(line: &[u8]) -> Result<Vec<(String, f64)>, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if line.metadata.timestamp == 0 {
        return Err("no time".to_owned());
    }
    let mut values = Vec::new();
    for directive in &line.metadata.cloud_watch_metrics {
        if directive.namespace.is_empty() || directive.namespace.starts_with("AWS/") {
            return Err(format!("the namespace {:?} is not one of one's own", directive.namespace));
        }
        if directive.metrics.len() > METRICS {
            return Err(format!("{} metrics", directive.metrics.len()));
        }
        for Definition { name, unit } in &directive.metrics {
            if !["Count", "Milliseconds", "Bytes", "Seconds"].contains(&unit.as_str()) {
                return Err(format!("the unit {unit:?} of {name}"));
            }
            let value = line.members.get(name).and_then(Value::as_f64);
            let value = value.ok_or_else(|| format!("{name} has no number"))?;
            for set in &directive.dimensions {
                let mut key = name.clone();
                for dimension in set {
                    let text = line.members.get(dimension).and_then(Value::as_str);
                    let text = text.filter(|text| !text.is_empty());
                    let text = text.ok_or_else(|| format!("the dimension {dimension} has no text"))?;
                    key.push_str(&format!(" {dimension}={text}"));
                }
                values.push((key, value));
            }
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(dimensions: &str, unit: &str, members: &str) -> String {
        format!(
            r#"{{"_aws":{{"Timestamp":1,"CloudWatchMetrics":[{{"Namespace":"n","Dimensions":[[{dimensions}]],"Metrics":[{{"Name":"M","Unit":"{unit}"}}]}}]}},{members}}}"#
        )
    }

    #[test]
    fn sums_by_name_and_dimension() {
        let metrics = Metrics::default();
        for value in [3, 1] {
            assert!(metrics.take("f", line("", "Count", &format!("\"M\":{value}")).as_bytes()));
        }
        assert!(metrics.take("f", line("\"D\"", "Milliseconds", r#""M":0.5,"D":"x""#).as_bytes()));
        let snapshot = metrics.snapshot();
        assert_eq!(snapshot["M"], Series { count: 2, sum: 4.0, max: 3.0, last: 1.0 });
        assert_eq!(snapshot["M D=x"].sum, 0.5);
    }

    #[test]
    fn what_is_no_metric_is_left_and_what_is_wrong_is_not_counted() {
        let metrics = Metrics::default();
        assert!(!metrics.take("f", b"{\"level\":\"INFO\"}"));
        assert!(!metrics.take("f", b"text"));
        for wrong in [
            line("", "Count", r#""M":"1""#),
            line("", "Parsecs", r#""M":1"#),
            line("\"D\"", "Count", r#""M":1"#),
            line("\"D\"", "Count", r#""M":1,"D":"""#),
            line("", "Count", r#""M":1"#).replace("\"n\"", "\"AWS/Lambda\""),
            line("", "Count", r#""M":1"#).replace("\"Timestamp\":1", "\"Timestamp\":0"),
            "{\"_aws\":{".to_owned(),
        ] {
            assert!(metrics.take("f", wrong.as_bytes()), "it is taken, with an error in the log: {wrong}");
        }
        assert!(metrics.snapshot().is_empty());
    }
}
