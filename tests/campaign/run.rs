//! One run: a scenario enters, leaves what came of it.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::oneshot;

use crate::{
    load::load,
    oracle::{Tally, judge_calls},
    scenario::Scenario,
    stage::Stage,
};

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    /// Why it has failed, and what the processes have said.
    pub(crate) failure: Option<(String, String)>,
    pub(crate) took: Duration,
}

/// Runs a scenario, in processes of its own.
pub(crate) async fn run(scenario: &Scenario) -> Outcome {
    let begun = std::time::Instant::now();
    let mut tally = Tally::default();
    let mut printed = String::new();
    let ended = stage(scenario, &mut tally, &mut printed).await;
    let mut problems: Vec<String> = tally.wrong.iter().take(5).cloned().collect();
    if tally.wrong.len() > 5 {
        problems.push(format!("and {} more", tally.wrong.len() - 5));
    }
    problems.extend(ended.err().map(|error| format!("{error:#}")));
    let failure = (!problems.is_empty()).then(|| (problems.join("\n"), printed));
    Outcome { tally, failure, took: begun.elapsed() }
}

async fn stage(scenario: &Scenario, tally: &mut Tally, printed: &mut String) -> anyhow::Result<()> {
    let mut stage = Stage::start(scenario).await?;
    let (moment, came) = oneshot::channel();
    let public = stage.public();
    let (loaded, injected) = tokio::join!(load(scenario, public, moment), async {
        // Nothing is to be done where the load is over before.
        if came.await.is_ok() { stage.inject(scenario.fault).await } else { Ok(()) }
    });
    *tally = loaded.tally;
    let after = async {
        injected.context("while the fault was made")?;
        stage.is_well().await.context("after the load")?;
        stage.leaves_nothing(scenario.clients).await
    };
    let after = after.await;
    let calls = stage.upstream.calls();
    for (ask, verdict) in &loaded.verdicts {
        let count = calls.get(&ask.id).copied().unwrap_or(0);
        tally.repeated += u64::from(count > 1);
        tally.wrong.extend(judge_calls(ask, verdict, count));
    }
    if after.is_err() || !tally.wrong.is_empty() {
        *printed = stage.printed();
    }
    after
}
