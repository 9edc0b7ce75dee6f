//! How long something took, many times; and the hops of a profile for `local --latency`, made of that.

use std::{fmt, time::Duration};

/// The profile that `local` comes with: for the one hop that cannot be measured here.
const SHIPPED: &str = include_str!("../../local/src/latency/aws.toml");

/// The least and the most that a profile may say, in milliseconds.
const RANGE_MS: (f64, f64) = (0.01, 10_000.0);

/// How long something took, each time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    /// One more.
    pub(crate) fn add(&mut self, took: Duration) {
        let millis = took.as_secs_f64() * 1e3;
        let at = self.0.partition_point(|own| *own <= millis);
        self.0.insert(at, millis);
    }

    /// How many there are.
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest that `share` of all are not above, in milliseconds; 0 where there are none.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "thousands at most"
    )]
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    fn hop(&self, without_ms: f64) -> Hop {
        let within = |value: f64| value.clamp(RANGE_MS.0, RANGE_MS.1);
        let p50 = within(self.quantile(0.5) - without_ms);
        Hop { p50, p95: within(self.quantile(0.95) - without_ms).max(p50) }
    }
}

impl FromIterator<Duration> for Times {
    fn from_iter<I: IntoIterator<Item = Duration>>(durations: I) -> Self {
        let mut times = Self::default();
        durations.into_iter().for_each(|took| times.add(took));
        times
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| self.quantile(share));
        write!(f, "p50 {p50:.1} ms, p95 {p95:.1} ms, p99 {p99:.1} ms of {}", self.len())
    }
}

#[derive(Debug, Clone, Copy)]
struct Hop {
    p50: f64,
    p95: f64,
}

/// What was measured from here, the way there and back included.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    /// The way to the front and back: a TCP handshake.
    pub(crate) to_front: Times,
    /// The way to the region and back.
    pub(crate) to_region: Times,
    /// A public request that `ingress` refuses at once.
    pub(crate) refused: Times,
    /// A public request to an upstream that answers at once.
    pub(crate) small_request: Times,
    /// A run that finds no tunnel.
    pub(crate) run: Times,
    /// A read of the table of connections.
    pub(crate) query: Times,
    /// A question about a connection.
    pub(crate) connection: Times,
    /// A heartbeat and its answer.
    pub(crate) heartbeat: Times,
    /// `SendMessage`.
    pub(crate) send: Times,
    /// From the beginning of `SendMessage` to the end of the long poll that receives it.
    pub(crate) delivered: Times,
}

impl Measured {
    /// The profile: each hop without the way to the region and back, so as it is between the stack's parts.
    pub(crate) fn profile(&self, region: &str) -> String {
        let (front, away) = (self.to_front.quantile(0.5), self.to_region.quantile(0.5));
        let query = self.query.hop(away);
        let send = self.send.hop(away);
        let link = Times(self.to_region.0.iter().map(|both_ways| both_ways / 2.0).collect()).hop(0.0);
        let hops = [
            ("front", self.refused.hop(front), "a refused public request"),
            ("start_run", self.run.hop(away + query.p50), "a run that finds no tunnel, without its read"),
            ("dynamodb", query, "Query, consistent"),
            ("connections", self.connection.hop(away), "GET @connections"),
            ("link", link, "half of a TCP handshake from where this ran"),
            ("invoke", self.heartbeat.hop(away), "a heartbeat's answer, without the link"),
            ("sqs", send, "SendMessage of a few bytes"),
            (
                "delivery",
                self.delivered.hop(away + send.p50),
                "to the waiting long poll, without SendMessage",
            ),
        ];
        let mut text = format!(
            "# Hop latencies of {region}, measured by tests/deployed from {away:.1} ms away (a TCP handshake), which is \
             taken off.\n"
        );
        for (name, Hop { p50, p95 }, source) in hops {
            text.push_str(&format!(
                "{name} = {{ p50 = {p50:.2}, p95 = {p95:.2}, source = \"measured: {source}\" }}\n"
            ));
        }
        let shipped = SHIPPED.lines().find(|line| line.starts_with("describe"));
        text.push_str(shipped.expect("the shipped profile has every hop"));
        text.push('\n');
        text
    }
}

#[test]
fn quantiles_are_values_that_came() {
    let times: Times = (1..=100).rev().map(Duration::from_millis).collect();
    let quantiles = [0.5, 0.95, 0.99, 1.0].map(|share| times.quantile(share));
    assert_eq!(quantiles, [50.0, 95.0, 99.0, 100.0]);
    assert_eq!(Times::default().quantile(0.5).to_bits(), 0.0_f64.to_bits());
    assert_eq!(times.to_string(), "p50 50.0 ms, p95 95.0 ms, p99 99.0 ms of 100");
}

#[test]
fn a_profile_of_nothing_and_one_of_odd_times_are_profiles_all_the_same() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let slow: Times = [Duration::from_secs(1000)].into_iter().collect();
    // The way is longer than what was measured over it.
    let odd = Measured { to_region: slow.clone(), run: slow, ..Measured::default() };
    for measured in [Measured::default(), odd] {
        std::fs::write(file.path(), measured.profile("nowhere-1")).unwrap();
        local::latency::Profile::find(file.path().to_str().unwrap()).unwrap();
    }
}
