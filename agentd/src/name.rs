//! Names for tunnels whose owner did not choose one.

use proto::id::TunnelName;

const ADJECTIVES: &[&str] = &[
    "amber", "brave", "brisk", "calm", "clear", "coral", "crisp", "eager", "fair", "fresh", "gentle",
    "golden", "green", "happy", "ivory", "jolly", "keen", "kind", "light", "lively", "lucky", "mellow",
    "mild", "neat", "noble", "plain", "quick", "quiet", "rapid", "sunny", "swift", "warm",
];

const NOUNS: &[&str] = &[
    "badger", "beaver", "bison", "crane", "curlew", "dove", "falcon", "finch", "fox", "gecko", "hare",
    "heron", "ibis", "jay", "lark", "lemur", "lynx", "marten", "mole", "moose", "newt", "otter", "owl",
    "panda", "plover", "puffin", "robin", "seal", "stoat", "swan", "tern", "wren",
];

/// A readable name from a random number: `calm-otter-4821`.
pub(crate) fn from_random(random: u64) -> TunnelName {
    let pick = |words: &[&'static str], bits: u64| words[(bits % words.len() as u64) as usize];
    let name =
        format!("{}-{}-{:04}", pick(ADJECTIVES, random), pick(NOUNS, random >> 16), (random >> 32) % 10_000);
    name.parse().expect("words, dashes and digits are a DNS label")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_random_number_makes_a_name() {
        for random in [0, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert!(from_random(random).as_str().len() < 30);
        }
        for (index, _) in ADJECTIVES.iter().enumerate() {
            from_random(index as u64 | (index as u64) << 16);
        }
    }
}
