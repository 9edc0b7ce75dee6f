//! Waiting for what may never be due.

use std::pin::Pin;

use tokio::time::{Instant, Interval, Sleep, sleep_until};

/// Waits until `due`, for ever if nothing is.
pub(crate) async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Waits for a moment that is put off again and again, at no cost each time.
pub(crate) struct Alarm {
    due: Option<Instant>,
    sleep: Pin<Box<Sleep>>,
}

impl Alarm {
    /// One that is set to nothing.
    pub(crate) fn new() -> Self {
        Self { due: None, sleep: Box::pin(sleep_until(Instant::now())) }
    }

    /// Sets it to another moment, or to none.
    pub(crate) fn set(&mut self, due: Option<Instant>) {
        self.due = due;
    }

    /// Waits until it is due, for ever if it is set to nothing.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost by dropping the future.
    pub(crate) async fn due(&mut self) {
        let Some(due) = self.due else { return std::future::pending().await };
        // A sleep that ends earlier is not put off before it does.
        if self.sleep.deadline() > due {
            self.sleep.as_mut().reset(due);
        }
        loop {
            self.sleep.as_mut().await;
            if Instant::now() >= due {
                return;
            }
            self.sleep.as_mut().reset(due);
        }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn an_alarm_rings_at_the_moment_that_it_was_set_to_last_and_not_before() {
        let ms = Duration::from_millis(1);
        let mut alarm = Alarm::new();
        assert!(alarm.due().now_or_never().is_none(), "it is set to nothing");
        for (first, last) in [(20, 20), (5, 30), (3_600_000, 10)] {
            let began = Instant::now();
            alarm.set(Some(began + ms * first));
            assert!(alarm.due().now_or_never().is_none());
            alarm.set(Some(began + ms * last));
            alarm.due().await;
            assert!(began.elapsed() >= ms * last);
            // It is over, whoever asks again.
            alarm.due().await;
        }
        alarm.set(None);
        assert!(alarm.due().now_or_never().is_none());
    }
}
