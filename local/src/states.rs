//! states.
pub mod jsonata;
