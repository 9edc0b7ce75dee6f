//! What passes the agent, kept in memory for the inspector: a tap at each request, and one ring for all of
//! them.
//!
//! Enters: heads, pieces of bodies and frames, as they pass. Leaves: [`record::Record`]s, and news of them.
//! A tap copies what it keeps, up to a limit, and never waits, changes or holds up what passes. Where a tunnel is
//! not inspected there is no tap.

pub(crate) mod fields;
pub(crate) mod kept;
pub(crate) mod record;
pub(crate) mod ring;
