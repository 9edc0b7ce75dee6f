//! Waiting for what may never be due.

use tokio::time::{Instant, Interval, sleep_until};

/// Waits until `due`, for ever if nothing is.
pub(crate) async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Waits for the next tick, for ever without an interval.
pub(crate) async fn tick(interval: Option<&mut Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}
