//! Deliveries that an acceptance, a retry or a hand in the account has left without a run. Whoever meets one has it go on.

use std::collections::BTreeSet;

use proto::{
    delivery::{Last, State},
    id::{DeliveryId, TunnelName},
};

use super::{ACCEPTED_WITHIN_MS, Deliveries, Kept, Run, names, parked_key, read_row, tunnel_key, turn_key};
use crate::{
    Error,
    aws::{classify, text},
    unix_now_ms,
};

/// How far back [`Deliveries::mend_recent`] looks, in milliseconds: some of its calls may fail, or not come about.
const RECENT_MS: u64 = 15 * 60 * 1000;

/// How many runs one call of [`Deliveries::mend`] asks about. What waits and is neither parked nor in a queue is on its way
/// from one state to the next, so there are few.
const ASKED_ABOUT: usize = 10;

/// How many pages, of 1 MB each, [`Deliveries::mend_recent`] looks through.
const PAGES: usize = 20;

/// Whether a delivery may be without a run: it waits, nothing tells that a run has ever had it, and nobody can be about to
/// start it. Pure.
fn may_lack_run(kept: &Kept, now_ms: u64) -> bool {
    let is_first = kept.run == kept.id.as_str();
    kept.state == State::Waiting
        && (kept.last.is_none() || !is_first)
        && now_ms >= kept.received_ms + ACCEPTED_WITHIN_MS
}

impl Deliveries {
    /// Whether a delivery goes on. One without a run gets it; one whose run was stopped from outside is dead.
    pub(super) async fn carry_on(&self, kept: &Kept) -> Result<bool, Error> {
        if kept.state.is_final() {
            return Ok(false);
        }
        match self.run_of(&kept.run).await? {
            Run::GoesOn => Ok(true),
            Run::Lacking => {
                self.start(kept).await?;
                tracing::info!(delivery_id = %kept.id, tunnel_id = %kept.tunnel, "delivery had no run");
                Ok(true)
            }
            Run::Over => {
                // As it is after the run: the last that a run does is to say how the delivery has ended.
                let now = self.find(&kept.tunnel, &kept.id).await?;
                let Some(now) = now.filter(|now| !now.state.is_final()) else { return Ok(false) };
                if now.run != kept.run {
                    return Ok(true);
                }
                let last = Last {
                    attempt: now.attempt,
                    at_ms: unix_now_ms(),
                    status: None,
                    code: Some("run_ended".to_owned()),
                    reason: "its run was stopped".to_owned(),
                };
                Box::pin(self.end(&now, State::Dead, &last, 0)).await?;
                tracing::warn!(delivery_id = %now.id, tunnel_id = %now.tunnel, "run of a delivery was stopped");
                Ok(false)
            }
        }
    }

    /// Somebody has stopped a run of this delivery: it is dead, unless it has ended or has another run.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn run_was_stopped(&self, tunnel: &TunnelName, id: &DeliveryId) -> Result<(), Error> {
        let pk = parked_key(tunnel);
        // Read before it is asked: what is parked later belongs to a run that goes on.
        let parked = self.get(&pk, id.as_str()).await?;
        let goes_on = match self.find(tunnel, id).await? {
            Some(kept) => self.carry_on(&kept).await?,
            None => false,
        };
        let token = parked.as_ref().and_then(|row| row.get("token")?.as_s().ok());
        if !goes_on && let Some(token) = token {
            self.delete_parked(&pk, id.as_str(), token).await?;
        }
        Ok(())
    }

    /// Has those of a tunnel's deliveries go on that have no run. Gives how many of them have ended instead.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn mend(&self, tunnel: &TunnelName, deliveries: &[Kept]) -> Result<usize, Error> {
        let now_ms = unix_now_ms();
        let open: Vec<&Kept> = deliveries.iter().filter(|kept| may_lack_run(kept, now_ms)).collect();
        let ids = || open.iter().map(|kept| &kept.id);
        let (Some(first), Some(last)) = (ids().min(), ids().max()) else { return Ok(0) };
        let parked = self.parked(tunnel, first, last).await?;
        let (mut asked, mut ended) = (0, 0);
        for kept in open.into_iter().filter(|kept| !parked.contains(&kept.id)) {
            if let Some(key) = &kept.order_key
                && let Some(turn) = self.get(&turn_key(tunnel, key), kept.place().as_str()).await?
                && turn.contains_key("token")
            {
                continue;
            }
            if asked == ASKED_ABOUT {
                break;
            }
            asked += 1;
            ended += usize::from(!self.carry_on(kept).await?);
        }
        Ok(ended)
    }

    /// The same with those that were accepted in the last quarter of an hour.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn mend_recent(&self, tunnel: &TunnelName) -> Result<(), Error> {
        let now_ms = unix_now_ms();
        let since = DeliveryId::new(now_ms.saturating_sub(RECENT_MS), [0; 10]);
        let mut pages = self
            .partition(&tunnel_key(tunnel))
            .key_condition_expression("pk = :pk AND sk >= :since")
            .filter_expression("#state = :waiting AND attribute_not_exists(#last)")
            .expression_attribute_names("#state", "state")
            .expression_attribute_names("#last", "last")
            .expression_attribute_values(":since", text(since.as_str()))
            .expression_attribute_values(":waiting", text(State::Waiting.as_str()))
            .into_paginator()
            .send();
        for _ in 0..PAGES {
            let Some(page) = pages.next().await else { break };
            let page = page.map_err(|error| classify("Query", error))?;
            let deliveries: Vec<Kept> = page.items().iter().filter_map(read_row).collect();
            self.mend(tunnel, &deliveries).await?;
        }
        Ok(())
    }

    /// Which deliveries between two names have a run that waits for an agent.
    async fn parked(
        &self,
        tunnel: &TunnelName,
        first: &DeliveryId,
        last: &DeliveryId,
    ) -> Result<BTreeSet<DeliveryId>, Error> {
        let parked = self
            .partition(&parked_key(tunnel))
            .key_condition_expression("pk = :pk AND sk BETWEEN :first AND :last")
            .projection_expression("sk")
            .expression_attribute_values(":first", text(first.as_str()))
            .expression_attribute_values(":last", text(last.as_str()))
            .consistent_read(true);
        Ok(names(parked).await?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use proto::delivery::{DeliveryPolicy, Mode};

    use super::*;
    use crate::deliveries::Head;

    #[test]
    fn what_waits_and_was_in_no_runs_hands_may_lack_one() {
        let id = DeliveryId::new(1_000, [1; 10]);
        let last = Last { attempt: 1, at_ms: 2_000, status: Some(503), code: None, reason: String::new() };
        let kept = Kept {
            run: id.to_string(),
            id,
            tunnel: "web".parse().unwrap(),
            owner: "alice".parse().unwrap(),
            state: State::Waiting,
            received_ms: 1_000,
            expires_at: 9_000,
            attempt: 0,
            head: Head { method: "POST".into(), target: "/".into(), headers: Default::default() },
            body_bytes: 0,
            body: None,
            pieces: 0,
            policy: DeliveryPolicy::new(Mode::Durable),
            order_key: None,
            place: None,
            last: None,
            buried: None,
            refused_since_ms: None,
        };
        let at = 1_000 + ACCEPTED_WITHIN_MS;
        assert!(may_lack_run(&kept, at));
        // Its acceptance may be about to start it.
        assert!(!may_lack_run(&kept, at - 1));
        for state in [State::Delivering, State::Delivered, State::Dead, State::Cancelled] {
            assert!(!may_lack_run(&Kept { state, ..kept.clone() }, at), "{state:?}");
        }
        let tried = Kept { last: Some(last), ..kept };
        assert!(!may_lack_run(&tried, at));
        // A retry by hand keeps what was noted, and may have been cut off as well.
        assert!(may_lack_run(&Kept { run: format!("{}-00000000", tried.id), ..tried }, at));
    }
}
