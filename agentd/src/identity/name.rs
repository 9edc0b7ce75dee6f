//! Names for tunnels whose owner did not choose one.

use proto::id::{TunnelName, TunnelPattern, TunnelPatterns};

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

/// A readable name that `may_open` covers; where nothing is known of that, any.
///
/// # Errors
///
/// When only certain names may be opened: taking one of them unasked could mix this service with the one
/// that the name is for.
pub(crate) fn from_patterns(random: u64, may_open: &TunnelPatterns) -> Result<TunnelName, String> {
    let name = from_random(random);
    if may_open.0.is_empty() || may_open.matches(&name) {
        return Ok(name);
    }
    let with_prefix = may_open.0.iter().find_map(|pattern| match pattern {
        TunnelPattern::Prefix(prefix) => format!("{prefix}{name}").parse().ok(),
        TunnelPattern::Exact(_) => None,
    });
    with_prefix.ok_or_else(|| format!("the token opens no random name: give --name, one of {may_open}"))
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

    #[test]
    fn a_random_name_is_one_that_the_token_opens() {
        let name = |patterns: &str| from_patterns(7, &patterns.parse().unwrap());
        let any = from_random(7);
        assert_eq!(name(""), Ok(any.clone()));
        assert_eq!(name("web,*"), Ok(any.clone()));
        assert_eq!(name("web,pr-*,x-*").unwrap().as_str(), format!("pr-{any}"));
        assert_eq!(
            name("web,shop").unwrap_err(),
            "the token opens no random name: give --name, one of web,shop"
        );
        // A prefix that leaves no room for a name.
        let long = format!("{}-*", "x".repeat(60));
        assert!(name(&long).is_err());
        assert_eq!(name(&format!("{long},pr-*")).unwrap().as_str(), format!("pr-{any}"));
    }
}
