//! How long one way takes: what every part that compares ways asks.

use std::time::{Duration, Instant};

use anyhow::Context;
use http_body_util::BodyExt;

use crate::{
    client::{Client, Target},
    upstream,
};

/// How long each of `count` requests took, in milliseconds, one after the other.
pub(crate) async fn delays(way: &Target, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut client = Client::connect(way).await?;
    for _ in 0..count / 10 {
        client.call("/hello", None).await?;
    }
    let mut delays = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        let body = client.call("/hello", None).await?;
        delays.push(millis(begun.elapsed()));
        anyhow::ensure!(body == upstream::HELLO, "a wrong answer");
    }
    Ok(delays)
}

/// The same in milliseconds, with their fractions.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// How long each event was on its way, in milliseconds.
pub(crate) async fn event_delays(way: &Target) -> anyhow::Result<Vec<f64>> {
    let mut client = Client::connect(way).await?;
    let mut body = client.begin("/events", None).await?.into_body();
    let mut events = upstream::Events::default();
    while let Some(frame) = body.frame().await {
        events.take(frame?.data_ref().context("no data")?)?;
    }
    events.finish(upstream::EVENTS)
}
