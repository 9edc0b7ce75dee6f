//! Randomness that nothing depends on for secrecy.

/// Uniform in `[0, 1)`: spreads what many would otherwise do at once.
pub(crate) fn fraction() -> f64 {
    // 53 bits are what a double holds. Without randomness every agent waits the same: half.
    getrandom::u64().map_or(0.5, |random| (random >> 11) as f64 / (1u64 << 53) as f64)
}
