//! How long each hop of the real AWS takes: the one place where a profile of latencies is applied.
//!
//! Enters: the name or the file of a [`Profile`]. Leaves: a wait for each hop, drawn from the hop's own
//! distribution, the same sequence in every run; and when the last hops were passed, for whoever asks where the
//! time goes.

use std::{
    collections::VecDeque,
    path::Path,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{chaos::mix, clock::epoch_us, lambda::share::MEMORY_MB};

/// The profile called `aws`.
const AWS: &str = include_str!("latency/aws.toml");

/// The longest that a profile may say, in milliseconds: what is longer is an outage, not a latency.
const MAX_MS: f64 = 10_000.0;

/// How many hops are remembered.
const PASSED: usize = 256;

/// How many standard deviations the 95th percentile is above the median.
const P95_DEVIATIONS: f64 = 1.645;

/// One call over the network inside AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hop {
    /// From the public client to `ingress`, and back.
    Front,
    /// A call to DynamoDB.
    DynamoDb,
    /// A call to SQS; a long poll has it before it begins to wait.
    Sqs,
    /// From a mailbox to the long poll that waits for it.
    Delivery,
    /// A post to, or a question about, an agent's connection.
    Connections,
    /// One way between an agent and the edge.
    Link,
    /// From an agent's connection to the function of its route.
    Invoke,
    /// Starting a run.
    StartRun,
    /// A question about a run.
    Describe,
}

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Its file cannot be read.
    #[error("--latency takes none, aws or a file: {0}: {1}")]
    File(String, #[source] std::io::Error),
    /// It is not a profile.
    #[error("the latency profile is not valid: {0}")]
    Invalid(#[from] toml::de::Error),
    /// A hop's numbers make no sense.
    #[error("the latency profile is not valid: p50 and p95 must be in order, above 0 and up to 10000 ms")]
    Range,
}

/// What `--latency` asks for: `PROFILE`, or `PROFILE,cpu=MB`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The name or the file of a profile, for [`Profile::find`].
    pub profile: String,
    /// How many megabytes buy the functions' processes their part of a core; they get all of it without.
    pub cpu_mb: Option<u32>,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (profile, cpu_mb) = match text.rsplit_once(',') {
            Some((profile, option)) if option.contains('=') => {
                let mb = option.strip_prefix("cpu=").and_then(|mb| mb.parse().ok());
                let mb = mb.filter(|mb| MEMORY_MB.contains(mb)).ok_or_else(|| {
                    let (least, most) = (MEMORY_MB.start(), MEMORY_MB.end());
                    format!("after the profile there may be cpu=MB with {least} to {most} megabytes, as in aws,cpu=256")
                })?;
                (profile, Some(mb))
            }
            _ => (text, None),
        };
        Ok(Self { profile: profile.to_owned(), cpu_mb })
    }
}

/// How long one hop takes, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Times {
    p50: f64,
    p95: f64,
}

/// How long every hop takes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    front: Times,
    start_run: Times,
    dynamodb: Times,
    connections: Times,
    link: Times,
    invoke: Times,
    sqs: Times,
    delivery: Times,
    describe: Times,
}

impl Profile {
    /// The profile of that name, or in that file; nothing for `none`.
    ///
    /// # Errors
    ///
    /// [`ProfileError`] when there is no such file, or it does not hold a profile.
    pub fn find(name: &str) -> Result<Option<Self>, ProfileError> {
        match name {
            "none" => Ok(None),
            "aws" => Self::parse(AWS).map(Some),
            file => {
                let text = std::fs::read_to_string(Path::new(file))
                    .map_err(|error| ProfileError::File(file.to_owned(), error))?;
                Self::parse(&text).map(Some)
            }
        }
    }

    fn parse(text: &str) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text)?;
        let all = [
            profile.front,
            profile.start_run,
            profile.dynamodb,
            profile.connections,
            profile.link,
            profile.invoke,
            profile.sqs,
            profile.delivery,
            profile.describe,
        ];
        let is_sound = |times: &Times| times.p50 > 0.0 && times.p95 >= times.p50 && times.p95 <= MAX_MS;
        if all.iter().all(is_sound) { Ok(profile) } else { Err(ProfileError::Range) }
    }

    const fn times(&self, hop: Hop) -> Times {
        match hop {
            Hop::Front => self.front,
            Hop::DynamoDb => self.dynamodb,
            Hop::Sqs => self.sqs,
            Hop::Delivery => self.delivery,
            Hop::Connections => self.connections,
            Hop::Link => self.link,
            Hop::Invoke => self.invoke,
            Hop::StartRun => self.start_run,
            Hop::Describe => self.describe,
        }
    }
}

/// A hop that was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Passed {
    /// Which.
    pub hop: Hop,
    /// When it began, in microseconds since 1970.
    pub at_us: u64,
}

/// How long hops take. The default takes no time at all.
#[derive(Debug, Clone, Default)]
pub struct Latency {
    extra: Duration,
    profile: Option<Arc<Profile>>,
    drawn: Arc<AtomicU64>,
    passed: Arc<Mutex<VecDeque<Passed>>>,
}

impl Latency {
    /// What the profile says, if there is one, and `extra` for every call to a service.
    #[must_use]
    pub fn new(profile: Option<Profile>, extra: Duration) -> Self {
        Self { extra, profile: profile.map(Arc::new), drawn: Arc::default(), passed: Arc::default() }
    }

    /// How long this hop takes this time.
    #[must_use]
    pub fn of(&self, hop: Hop) -> Duration {
        let extra = match hop {
            Hop::DynamoDb | Hop::Sqs | Hop::Connections | Hop::StartRun => self.extra,
            Hop::Front | Hop::Delivery | Hop::Link | Hop::Invoke | Hop::Describe => Duration::ZERO,
        };
        let Some(profile) = &self.profile else { return extra };
        let times = profile.times(hop);
        let deviation = (times.p95 / times.p50).ln() / P95_DEVIATIONS;
        let drawn = self.drawn.fetch_add(1, Ordering::Relaxed);
        // Latencies are skewed to the right: their logarithm is normal, near enough.
        let millis = times.p50 * (deviation * normal(mix(drawn))).exp();
        extra + Duration::from_secs_f64(millis / 1e3)
    }

    /// The last hops, oldest first.
    #[must_use]
    pub fn passed(&self) -> Vec<Passed> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// Passes the time of one hop.
    pub async fn hop(&self, hop: Hop) {
        {
            let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            if passed.len() == PASSED {
                passed.pop_front();
            }
            passed.push_back(Passed { hop, at_us: epoch_us() });
        }
        let duration = self.of(hop);
        if !duration.is_zero() {
            tokio::time::sleep(duration).await;
        }
    }
}

/// A number of the standard normal distribution out of random bits: the sum of four even ones, so never
/// beyond three and a half deviations.
fn normal(bits: u64) -> f64 {
    let sum: u32 = (0..4).map(|part| u32::from((bits >> (part * 16)) as u16)).sum();
    (f64::from(sum) / f64::from(u16::MAX) - 2.0) * 3.0_f64.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hop_takes_what_was_added() {
        let start = tokio::time::Instant::now();
        let latency = Latency::default();
        latency.hop(Hop::Sqs).await;
        assert!(start.elapsed().is_zero());
        assert!(matches!(latency.passed()[..], [Passed { hop: Hop::Sqs, .. }]));
        for _ in 0..PASSED {
            latency.hop(Hop::Link).await;
        }
        assert_eq!(latency.passed().len(), PASSED);
        assert!(latency.passed().iter().all(|passed| passed.hop == Hop::Link));
        Latency::new(None, Duration::from_millis(20)).hop(Hop::DynamoDb).await;
        assert_eq!(start.elapsed(), Duration::from_millis(20));
    }

    #[test]
    fn half_of_all_hops_are_below_the_median_and_one_in_twenty_above_the_95th_percentile() {
        let latency = Latency::new(Profile::find("aws").unwrap(), Duration::ZERO);
        let mut all: Vec<_> = (0..10_000).map(|_| latency.of(Hop::Sqs).as_secs_f64() * 1e3).collect();
        all.sort_by(f64::total_cmp);
        assert!((all[5000] - 8.0).abs() < 0.5, "{}", all[5000]);
        assert!((all[9500] - 20.0).abs() < 1.5, "{}", all[9500]);
    }

    #[test]
    fn every_line_of_the_profile_names_its_source() {
        let lines: Vec<_> = AWS.lines().filter(|line| line.contains('=')).collect();
        assert_eq!(lines.len(), 9);
        assert!(lines.iter().all(|line| line.contains("source = \"")));
    }

    #[test]
    fn a_part_of_a_core_is_chosen_beside_the_profile() {
        let choice = |profile: &str, cpu_mb| Ok(Choice { profile: profile.to_owned(), cpu_mb });
        for (text, expected) in [
            ("none", choice("none", None)),
            ("aws,cpu=128", choice("aws", Some(128))),
            ("aws,cpu=10240", choice("aws", Some(10_240))),
            ("none,cpu=256", choice("none", Some(256))),
            ("of,mine.toml", choice("of,mine.toml", None)),
            ("of,mine.toml,cpu=1769", choice("of,mine.toml", Some(1769))),
        ] {
            assert_eq!(text.parse::<Choice>(), expected, "{text}");
        }
        for text in
            ["aws,cpu=127", "aws,cpu=10241", "aws,cpu=", "aws,cpu=-1", "aws,cpu=256MB", "aws,memory=256"]
        {
            let error = text.parse::<Choice>().unwrap_err();
            assert!(error.contains("128 to 10240") && error.contains("aws,cpu=256"), "{text}: {error}");
        }
    }

    #[test]
    fn a_profile_may_be_a_file_and_mistakes_are_told() {
        assert_eq!(Profile::find("none").unwrap(), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().to_str().unwrap();
        std::fs::write(&file, AWS.replace("p50 = 15", "p50 = 30")).unwrap();
        assert!((Profile::find(name).unwrap().unwrap().start_run.p50 - 30.0).abs() < 1e-9);
        for (from, to, expected) in [
            ("p50 = 15", "p50 = 0", "above 0"),
            ("p95 = 35", "p95 = 14", "in order"),
            ("p95 = 35", "p95 = 10001", "up to 10000"),
            ("start_run", "start_walk", "start_walk"),
        ] {
            std::fs::write(&file, AWS.replace(from, to)).unwrap();
            let error = Profile::find(name).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = Profile::find("moon").unwrap_err().to_string();
        assert!(error.contains("none, aws or a file"), "{error}");
    }
}
