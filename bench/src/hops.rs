//! Where the time of one request goes: enters nothing, leaves a table and a picture of the hops.
//!
//! One request at a time is sent; `local` says when it passed which hop, the upstream when the request reached
//! it, and both share this machine's clock. Each figure is a median, so their sum is the whole only nearly.

use std::{fmt::Write as _, path::Path};

use crate::{
    client::{Client, Target},
    edge::TUNNEL,
    figures::{Report, Unit, quantile},
    upstream::{self, Upstream},
};
use anyhow::Context;
use serde::Deserialize;

/// How many requests are followed.
const REQUESTS: usize = 300;

/// What happens between one moment that is known and the next.
const STEPS: [&str; 8] = [
    "front: from the client to the event",
    "ingress: event to StartSyncExecution",
    "run: to LookUpConnections",
    "run: look-up and choice, to DispatchRequest",
    "link and agent: post to upstream",
    "upstream, agent, link: to the edge",
    "response: message to mailbox",
    "mailbox, end of run, ingress, front: to the client",
];

/// A hop as `local` tells it.
#[derive(Debug, Deserialize)]
struct Passed {
    hop: String,
    at_us: u64,
}

/// Follows requests; draws them into `picture`, if there is one.
pub(crate) async fn measure(
    upstream: &Upstream,
    picture: Option<&Path>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let local = ::tests::Local::start(&[]);
    let _agent = local.agent(TUNNEL, &format!("127.0.0.1:{}", upstream.port));
    let mut client =
        Client::connect(&Target { address: local.public, host: format!("{TUNNEL}.localhost") }).await?;
    let aws = Target { address: local.endpoint, host: local.endpoint.to_string() };
    let mut asked = Client::connect(&aws).await?;
    for _ in 0..REQUESTS / 3 {
        client.call("/stamp", None).await?;
    }
    let mut steps: [Vec<f64>; STEPS.len()] = Default::default();
    for _ in 0..REQUESTS {
        let begun = upstream::now_ns() / 1000;
        let stamp = client.call("/stamp", None).await?;
        let ended = upstream::now_ns() / 1000;
        let reached = std::str::from_utf8(&stamp)?.parse::<u64>()? / 1000;
        let passed: Vec<Passed> = serde_json::from_slice(&asked.call("/_local/hops", None).await?)?;
        let moments = moments(&passed, begun, reached, ended)?;
        for (step, pair) in steps.iter_mut().zip(moments.windows(2)) {
            step.push(pair[1].saturating_sub(pair[0]) as f64);
        }
    }
    let medians: Vec<f64> = steps.iter_mut().map(|step| quantile(step, 0.5)).collect();
    for (name, median) in STEPS.iter().zip(&medians) {
        report.note(format!("hops: {name}"), Unit::Micros, None, None, *median);
    }
    if let Some(path) = picture {
        std::fs::write(path, draw(&medians)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The moments between the steps.
fn moments(
    passed: &[Passed],
    begun: u64,
    reached: u64,
    ended: u64,
) -> anyhow::Result<[u64; STEPS.len() + 1]> {
    let first = |hop: &str, from: u64| {
        passed
            .iter()
            .filter(|passed| passed.hop == hop && (from..=ended).contains(&passed.at_us))
            .map(|passed| passed.at_us)
            .min()
            .with_context(|| format!("{hop} was not passed"))
    };
    let front = first("front", begun)?;
    let start = first("start_run", front)?;
    let table = first("dynamo_db", start)?;
    let post = first("connections", table)?;
    let back = first("link", reached)?;
    let mailbox = first("delivery", back)?;
    Ok([begun, front, start, table, post, reached, back, mailbox, ended])
}

/// A bar for each step, one after the other.
fn draw(medians: &[f64]) -> String {
    const WIDTH: f64 = 560.0;
    const LEFT: f64 = 330.0;
    const ROW: f64 = 26.0;
    let total: f64 = medians.iter().sum();
    let height = ROW * (medians.len() as f64 + 2.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<title>Where the time of one request goes</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"8\" y=\"17\" font-weight=\"bold\">One request in local: {total:.0} µs, medians of {REQUESTS}\
         </text>\n",
        LEFT + WIDTH + 70.0
    );
    let mut from = 0.0;
    for (row, (name, median)) in (1..).zip(STEPS.iter().zip(medians)) {
        let y = f64::from(row) * ROW;
        let x = LEFT + from / total * WIDTH;
        let width = median / total * WIDTH;
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{:.1}\">{name}</text><rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
             height=\"16\" fill=\"#4477aa\"/><text x=\"{:.1}\" y=\"{:.1}\">{median:.0} µs</text>",
            y + 17.0,
            y + 4.0,
            x + width + 4.0,
            y + 17.0,
        );
        from += median;
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(hop: &str, at_us: u64) -> Passed {
        Passed { hop: hop.to_owned(), at_us }
    }

    #[test]
    fn the_hops_of_other_requests_do_not_count() {
        let all = [
            passed("front", 5),
            passed("front", 12),
            passed("start_run", 13),
            passed("dynamo_db", 14),
            passed("connections", 15),
            passed("link", 16),
            passed("link", 20),
            passed("delivery", 22),
            passed("delivery", 31),
        ];
        assert_eq!(moments(&all, 10, 18, 30).unwrap(), [10, 12, 13, 14, 15, 18, 20, 22, 30]);
        assert!(moments(&all, 10, 18, 21).unwrap_err().to_string().contains("delivery"));
    }

    #[test]
    fn the_picture_has_a_bar_for_each_step() {
        let svg = draw(&[1.0; STEPS.len()]);
        assert_eq!(svg.matches("<rect x=").count(), STEPS.len());
        assert!(STEPS.iter().all(|step| svg.contains(step)));
    }
}
