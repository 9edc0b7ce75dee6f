//! What AWS does on bad days, on demand: enters `key=value,…`, leaves seeded yes-or-no decisions.

use std::{
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Something that may go wrong, with a probability of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A sent mailbox message arrives twice.
    Duplicate,
    /// A sent mailbox message overtakes one that waits.
    Reorder,
    /// An agent's connection is cut.
    DropLink,
    /// A post to a connection is answered with 410 although the connection is there.
    Gone,
    /// A call is answered with its service's throttling error.
    Throttle,
    /// A function's process is killed.
    KillFunction,
    /// A sent mailbox message never arrives, as when the function that should have sent it failed.
    Lose,
}

const FAULTS: usize = 7;

/// The fastest clock: with a faster one, what is done every few minutes would never rest.
const CLOCK_MOST: u32 = 10_000;

/// The longest extra latency of a call: no caller waits for longer.
const DELAY_MOST_MS: u64 = 60_000;

/// Which faults happen how often.
#[derive(Debug, Clone, PartialEq)]
pub struct ChaosConfig {
    /// Where the sequence of decisions begins.
    pub seed: u64,
    /// How many times faster the long times pass, see [`crate::clock::Clock`].
    pub clock: u32,
    /// The extra latency of each call to AWS.
    pub delay: Duration,
    probabilities: [f64; FAULTS],
}

impl Default for ChaosConfig {
    fn default() -> Self {
        Self { seed: 0, clock: 1, delay: Duration::ZERO, probabilities: [0.0; FAULTS] }
    }
}

impl ChaosConfig {
    /// The probability of one fault.
    #[must_use]
    pub fn probability(&self, fault: Fault) -> f64 {
        self.probabilities[fault as usize]
    }

    /// The same configuration with another probability for one fault.
    #[must_use]
    pub fn with(mut self, fault: Fault, probability: f64) -> Self {
        self.probabilities[fault as usize] = probability.clamp(0.0, 1.0);
        self
    }
}

/// Why a chaos argument was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChaosError {
    /// A part without `=`.
    #[error("{0:?} is not key=value")]
    NotAPair(String),
    /// A key that means nothing.
    #[error(
        "unknown key {0:?}: use seed, clock, duplicate, reorder, drop_link, gone, throttle, kill_function, lose or delay"
    )]
    UnknownKey(String),
    /// A value its key cannot have.
    #[error("{key}={value} is not {wanted}")]
    BadValue {
        /// The key.
        key: String,
        /// What was given for it.
        value: String,
        /// What it takes.
        wanted: &'static str,
    },
}

impl FromStr for ChaosConfig {
    type Err = ChaosError;

    fn from_str(text: &str) -> Result<Self, ChaosError> {
        let mut config = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| ChaosError::NotAPair(part.into()))?;
            let bad = |wanted| ChaosError::BadValue { key: key.into(), value: value.into(), wanted };
            let fault = match key {
                "seed" => {
                    config.seed = value.parse().map_err(|_| bad("a whole number"))?;
                    continue;
                }
                "clock" => {
                    let factor = value.parse().ok().filter(|factor| (1..=CLOCK_MOST).contains(factor));
                    config.clock = factor.ok_or_else(|| bad("a whole number from 1 to 10000"))?;
                    continue;
                }
                "delay" => {
                    let ms = value.parse().ok().filter(|ms| *ms <= DELAY_MOST_MS);
                    let ms = ms.ok_or_else(|| bad("a whole number of milliseconds from 0 to 60000"))?;
                    config.delay = Duration::from_millis(ms);
                    continue;
                }
                "duplicate" => Fault::Duplicate,
                "reorder" => Fault::Reorder,
                "drop_link" => Fault::DropLink,
                "gone" => Fault::Gone,
                "throttle" => Fault::Throttle,
                "kill_function" => Fault::KillFunction,
                "lose" => Fault::Lose,
                _ => return Err(ChaosError::UnknownKey(key.into())),
            };
            let probability: f64 = value.parse().map_err(|_| bad("a probability from 0 to 1"))?;
            if !(0.0..=1.0).contains(&probability) {
                return Err(bad("a probability from 0 to 1"));
            }
            config.probabilities[fault as usize] = probability;
        }
        Ok(config)
    }
}

/// Decides, deterministically for one seed: the n-th question about one fault always has the same
/// answer, whatever was asked about the others.
#[derive(Debug, Default)]
pub struct Chaos {
    config: ChaosConfig,
    asked: [AtomicU64; FAULTS],
}

impl Chaos {
    /// Begins the sequences of `config.seed`.
    #[must_use]
    pub fn new(config: ChaosConfig) -> Self {
        Self { config, asked: Default::default() }
    }

    /// What was configured.
    #[must_use]
    pub fn config(&self) -> &ChaosConfig {
        &self.config
    }

    /// Whether the fault happens this time.
    #[must_use]
    pub fn strikes(&self, fault: Fault) -> bool {
        let probability = self.config.probability(fault);
        if probability <= 0.0 {
            return false;
        }
        let turn = self.asked[fault as usize].fetch_add(1, Ordering::Relaxed);
        let bits = mix(self.config.seed ^ mix(fault as u64 + 1) ^ mix(turn.wrapping_add(1 << 32)));
        // 53 bits, as many as a double holds exactly.
        ((bits >> 11) as f64 / (1_u64 << 53) as f64) < probability
    }
}

/// One step of the splitmix64 generator.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_key() {
        let config: ChaosConfig =
            "seed=7,clock=60,duplicate=0.1,reorder=0.2,drop_link=0.3,gone=0.4,throttle=0.5,kill_function=1,lose=0.6,delay=25"
                .parse()
                .unwrap();
        assert_eq!((config.seed, config.clock, config.delay), (7, 60, Duration::from_millis(25)));
        assert!((config.probability(Fault::Reorder) - 0.2).abs() < 1e-9);
        assert!((config.probability(Fault::KillFunction) - 1.0).abs() < 1e-9);
        assert!((config.probability(Fault::Lose) - 0.6).abs() < 1e-9);
        assert_eq!("".parse::<ChaosConfig>().unwrap(), ChaosConfig::default());
    }

    #[test]
    fn refuses_with_one_clear_sentence() {
        let refusal = |text: &str| text.parse::<ChaosConfig>().unwrap_err().to_string();
        assert_eq!(refusal("gone"), "\"gone\" is not key=value");
        assert!(refusal("loss=1").starts_with("unknown key \"loss\""));
        assert_eq!(refusal("gone=2"), "gone=2 is not a probability from 0 to 1");
        assert_eq!(refusal("gone=NaN"), "gone=NaN is not a probability from 0 to 1");
        assert_eq!(refusal("clock=0"), "clock=0 is not a whole number from 1 to 10000");
        assert_eq!(refusal("delay=-1"), "delay=-1 is not a whole number of milliseconds from 0 to 60000");
    }

    #[test]
    fn the_same_seed_gives_the_same_bad_day() {
        let day = |seed| {
            let config = ChaosConfig { seed, ..ChaosConfig::default() }
                .with(Fault::Gone, 0.3)
                .with(Fault::Throttle, 0.5);
            let chaos = Chaos::new(config);
            // Questions about another fault do not disturb the sequence.
            (0..1000)
                .map(|turn| {
                    if turn % 3 == 0 {
                        let _ = chaos.strikes(Fault::Throttle);
                    }
                    chaos.strikes(Fault::Gone)
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(day(1), day(1));
        assert_ne!(day(1), day(2));
        let strikes = day(1).into_iter().filter(|&struck| struck).count();
        assert!((250..350).contains(&strikes), "{strikes}");
    }

    #[test]
    fn nothing_happens_unless_asked_for() {
        let chaos = Chaos::default();
        assert!(!(0..100).any(|_| chaos.strikes(Fault::Duplicate)));
        let chaos = Chaos::new(ChaosConfig::default().with(Fault::Duplicate, 1.0));
        assert!((0..100).all(|_| chaos.strikes(Fault::Duplicate)));
    }
}
