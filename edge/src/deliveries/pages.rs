//! Deliveries as their owner looks at them: pages of a list, pieces of a body, and calling one off.

use proto::{
    delivery::{Last, State, Summary},
    id::{DeliveryId, Owner, TunnelName},
    limits,
};

use super::{Deliveries, Kept, name_of, parked_key, piece_key, piece_name, read_row, tunnel_key};
use crate::{
    Error,
    aws::{classify, number, text},
    unix_now_ms,
};

/// How many rows one page looks at: each may have a head of 60 KB, and a page is answered within seconds.
const LOOKED_AT: i32 = 100;

/// Which deliveries of a tunnel are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The tunnel.
    pub tunnel: &'a TunnelName,
    /// Whose they must be.
    pub owner: &'a Owner,
    /// In this state.
    pub state: Option<State>,
    /// Only those that have not ended.
    pub open: bool,
    /// Accepted then or later, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// The oldest first, instead of the newest.
    pub oldest_first: bool,
    /// What the page begins after: the last one of the page before.
    pub after: Option<&'a DeliveryId>,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// In the order that was wanted.
    pub deliveries: Vec<Kept>,
    /// What the next page begins after, if there may be one.
    pub last: Option<DeliveryId>,
}

impl Kept {
    /// It as it is listed.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            id: self.id.clone(),
            tunnel: self.tunnel.clone(),
            state: self.state,
            received_ms: self.received_ms,
            expires_at: self.expires_at,
            attempt: self.attempt,
            method: self.head.method.clone(),
            target: self.head.target.clone(),
            body_bytes: self.body_bytes,
            run: Some(self.run.clone()),
            last: self.last.clone(),
        }
    }
}

impl Deliveries {
    /// A page of a tunnel's deliveries that have not expired at the Unix time `now`, in seconds. It may be empty and not
    /// the last.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn page(&self, wanted: &Wanted<'_>, now: u64) -> Result<Page, Error> {
        let mut filter = "#owner = :owner AND expires_at > :now".to_owned();
        let mut request = self
            .partition(&tunnel_key(wanted.tunnel))
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(wanted.owner.as_str()))
            .expression_attribute_values(":now", number(now))
            .scan_index_forward(wanted.oldest_first)
            .consistent_read(true)
            .limit(LOOKED_AT);
        if let Some(state) = wanted.state {
            filter.push_str(" AND #state = :state");
            request = request
                .expression_attribute_names("#state", "state")
                .expression_attribute_values(":state", text(state.as_str()));
        }
        if wanted.open {
            filter.push_str(" AND #state IN (:waiting, :delivering)");
            request = request
                .expression_attribute_names("#state", "state")
                .expression_attribute_values(":waiting", text(State::Waiting.as_str()))
                .expression_attribute_values(":delivering", text(State::Delivering.as_str()));
        }
        if let Some(since_ms) = wanted.since_ms {
            // Names begin with the time.
            let since = DeliveryId::new(since_ms, [0; 10]);
            request = request
                .key_condition_expression("pk = :pk AND sk >= :since")
                .expression_attribute_values(":since", text(since.as_str()));
        }
        if let Some(after) = wanted.after {
            let key = super::key(&tunnel_key(wanted.tunnel), after.as_str());
            request = request.set_exclusive_start_key(Some(key));
        }
        let output =
            request.filter_expression(filter).send().await.map_err(|error| classify("Query", error))?;
        let last = output.last_evaluated_key().and_then(name_of);
        Ok(Page { deliveries: output.items().iter().filter_map(read_row).collect(), last })
    }

    /// The body of a delivery from byte `from` on, `most` bytes of it at the most and perhaps fewer; empty at its end, and
    /// where it is kept no more.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn body_part(&self, kept: &Kept, from: u64, most: usize) -> Result<Vec<u8>, Error> {
        if from >= kept.body_bytes {
            return Ok(Vec::new());
        }
        let piece_bytes = limits::DELIVERY_PIECE_BYTES as u64;
        let piece = if kept.pieces > 0 {
            self.get(&piece_key(&kept.id), &piece_name(from / piece_bytes)).await?
        } else {
            None
        };
        let piece = piece.as_ref().and_then(|row| row.get("bytes")?.as_b().ok());
        let Some(bytes) = piece.or(kept.body.as_ref()) else { return Ok(Vec::new()) };
        let start = usize::try_from(from % piece_bytes).unwrap_or(usize::MAX);
        let rest = bytes.as_ref().get(start..).unwrap_or_default();
        Ok(rest[..rest.len().min(most)].to_vec())
    }

    /// Calls a delivery off and stops its run; false where it has ended.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn cancel(&self, kept: &Kept) -> Result<bool, Error> {
        if kept.state == State::Cancelled {
            // Perhaps the last try stopped half way: what it left goes.
            self.release(kept, true).await?;
            return Ok(false);
        }
        if kept.state.is_final() {
            return Ok(false);
        }
        let last = Last {
            attempt: kept.attempt,
            at_ms: unix_now_ms(),
            status: None,
            code: Some("cancelled".to_owned()),
            reason: "its owner called it off".to_owned(),
        };
        self.end(kept, State::Cancelled, &last, 0).await?;
        self.stop_run(&self.arn_of(&kept.run)).await?;
        self.delete(&parked_key(&kept.tunnel), kept.id.as_str()).await?;
        Ok(true)
    }
}
