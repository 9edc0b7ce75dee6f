//! The calls that the page is computed from are those that `local` counts.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use cost::{CALLS, Calls, Measured};

/// How far a count may be from the one that is kept: a receive may come too early, and whether messages
/// travel in one batch is a matter of speed.
fn assert_close(what: &str, kept: &Calls, counted: &Calls, within: f64) {
    for call in kept.keys().chain(counted.keys()) {
        let (kept, counted) =
            (kept.get(call).copied().unwrap_or(0.0), counted.get(call).copied().unwrap_or(0.0));
        let allowed = within * kept.max(counted);
        assert!((kept - counted).abs() <= allowed, "{what}: {call} is {counted}, and {kept} in calls.toml");
    }
}

#[tokio::test]
async fn local_still_counts_what_the_page_says() {
    let kept: Measured = toml::from_str(CALLS).unwrap();
    let counted = cost::measure::measure().await;
    assert_close("a small request", &kept.small_request, &counted.small_request, 0.1);
    assert_close("an agent's coming", &kept.connect, &counted.connect, 0.0);
    assert_close("a sweep", &kept.sweep, &counted.sweep, 0.0);
    assert_close("a delivery", &kept.delivery, &counted.delivery, 0.3);
    let messages = |measured: &Measured| measured.download_gb["sqs:SendMessage"];
    let few = (messages(&kept) - messages(&counted)).abs() <= 0.25 * messages(&kept);
    assert!(few, "{} messages a GB, and {} in calls.toml", messages(&counted), messages(&kept));
}
