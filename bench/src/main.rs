//! Bench binary.
fn main() {}
