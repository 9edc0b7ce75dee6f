//! Lambda `deliveries`: answers what an agent asks about the deliveries that are kept for its owner.
//!
//! It handles the route of that name; the answer goes back as the route's response. Who asks about a tunnel that its token
//! does not cover, or whose name is another owner's, is told the same as about one that does not exist.
//!
//! Permissions it needs: read and write rows of the table of deliveries; read and write rows of names, read those of
//! connections and the list of revoked identities; start, describe and stop runs of `delivery`, and answer those that wait.

use std::{collections::VecDeque, process::ExitCode};

use edge::{
    Error,
    aws::Aws,
    config::{ConfigError, Env, env},
    deliveries::{
        Deliveries as Store, Kept, Lane,
        pages::{Page, Wanted},
    },
    event::{AgentEvent, Authorized},
    function::Answer as Response,
    registry::Registry,
    revocation::Revocations,
    unix_now,
};
use proto::{
    body::Body,
    delivery::{Answer, Ask, DeliveriesAnswer, Refused, State, Summary},
    id::{ConnectionId, DeliveryId, Owner, TunnelName},
    limits,
    message::{AgentMessage, EdgeMessage},
};

/// How many dead deliveries one question starts again: each takes a few calls.
const RETRIED_AT_A_TIME: usize = 25;

/// How many pages without anything wanted one question looks through.
const EMPTY_PAGES: usize = 10;

/// Everything a question needs.
#[derive(Debug)]
pub struct Deliveries {
    registry: Registry,
    revocations: Revocations,
    store: Store,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(
        Deliveries::from_env,
        |event, deliveries| async move { handle(event, &deliveries).await },
    )
}

impl Deliveries {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        let store = Store::from_env(&aws, env);
        Ok(Self {
            registry: Registry::from_env(&aws, env)?,
            revocations: Revocations::from_env(&aws, env)?,
            store: store.ok_or_else(|| env.missing(env::DELIVERIES_TABLE))?,
        })
    }
}

/// Answers one question.
///
/// # Errors
///
/// Never: who asks is told that the edge is busy.
pub async fn handle(mut event: AgentEvent, deliveries: &Deliveries) -> Result<Response, Error> {
    let body = event.body.take();
    let context = event.request_context;
    let Some(authorized) = context.authorizer else {
        tracing::error!(connection_id = %context.connection_id, "connection has no identity; is the authorizer attached?");
        return Ok(Response::status(403));
    };
    let Ok(AgentMessage::Deliveries(question)) = AgentMessage::decode(&body.unwrap_or_default()) else {
        tracing::warn!(connection_id = %context.connection_id, "question was malformed");
        return Ok(Response::status(400));
    };
    let answered = async {
        let Deliveries { registry, revocations, store } = deliveries;
        // Also one that is revoked: it is being cut, and learns and changes nothing meanwhile.
        if authorized.is_over(unix_now())
            || revocations.holds(&authorized.owner, authorized.token_id.as_deref()).await?
        {
            return Ok(refused(Refused::NotAllowed));
        }
        let asked = Asked { deliveries: store, registry, authorized: &authorized };
        asked.answer(question.ask, &context.connection_id).await
    };
    let answer = answered.await.unwrap_or_else(|error: Error| {
        tracing::error!(connection_id = %context.connection_id, %error, "a question about deliveries was not answered");
        refused(Refused::Busy)
    });
    let message = EdgeMessage::Deliveries(DeliveriesAnswer { seq: question.seq, answer });
    Ok(Response::message(message.encode()))
}

const fn refused(reason: Refused) -> Answer<'static> {
    Answer::Refused { reason }
}

const fn done(count: u32) -> Answer<'static> {
    Answer::Done { count, cursor: None }
}

/// A question with what answers it.
struct Asked<'a> {
    deliveries: &'a Store,
    registry: &'a Registry,
    authorized: &'a Authorized,
}

impl Asked<'_> {
    async fn answer(&self, ask: Ask, connection: &ConnectionId) -> Result<Answer<'static>, Error> {
        match ask {
            Ask::List { tunnel, state, open, since_ms, cursor } => {
                let tunnels = match tunnel {
                    Some(tunnel) if !self.owns(&tunnel).await? => return Ok(refused(Refused::NotFound)),
                    Some(tunnel) => vec![tunnel],
                    None => self.registry.tunnels_of(connection).await?.into_iter().collect(),
                };
                self.list(&tunnels, &Filter { state, open, since_ms }, cursor.as_deref()).await
            }
            Ask::Show { tunnel, id, body_from } => match self.find(&tunnel, &id).await? {
                Some(kept) => self.show(&kept, body_from).await,
                None => Ok(refused(Refused::NotFound)),
            },
            Ask::Retry { tunnel, id } => match self.find(&tunnel, &id).await? {
                Some(kept) if self.deliveries.restart(&kept).await? => Ok(done(1)),
                Some(_) => Ok(refused(Refused::WrongState)),
                None => Ok(refused(Refused::NotFound)),
            },
            Ask::RetryDead { tunnel, cursor } => {
                if !self.owns(&tunnel).await? {
                    return Ok(refused(Refused::NotFound));
                }
                self.retry_dead(&tunnel, cursor.as_deref()).await
            }
            Ask::Cancel { tunnel, id } => match self.find(&tunnel, &id).await? {
                Some(kept) if self.deliveries.cancel(&kept).await? => Ok(done(1)),
                Some(_) => Ok(refused(Refused::WrongState)),
                None => Ok(refused(Refused::NotFound)),
            },
            Ask::Pause { tunnel } => {
                let is_done = self.may(&tunnel) && self.pause(&tunnel, true).await?;
                Ok(if is_done { done(1) } else { refused(Refused::NotFound) })
            }
            Ask::Resume { tunnel } => {
                if !self.may(&tunnel) || !self.pause(&tunnel, false).await? {
                    return Ok(refused(Refused::NotFound));
                }
                let woken = self.deliveries.wake(&tunnel, &[Lane::FIRST]).await?;
                tracing::info!(tunnel_id = %tunnel, woken, "deliveries go on");
                Ok(done(1))
            }
        }
    }

    const fn owner(&self) -> &Owner {
        &self.authorized.owner
    }

    /// Whether the identity covers a tunnel.
    fn may(&self, tunnel: &TunnelName) -> bool {
        self.authorized.tunnels.matches(tunnel)
    }

    /// Whether a tunnel is the owner's, as far as its name and the identity say.
    async fn owns(&self, tunnel: &TunnelName) -> Result<bool, Error> {
        Ok(self.may(tunnel) && self.registry.owner_of(tunnel).await?.as_ref() == Some(self.owner()))
    }

    async fn pause(&self, tunnel: &TunnelName, paused: bool) -> Result<bool, Error> {
        self.registry.pause(tunnel, self.owner(), paused).await
    }

    /// One delivery, if it is the owner's and has not expired.
    async fn find(&self, tunnel: &TunnelName, id: &DeliveryId) -> Result<Option<Kept>, Error> {
        if !self.owns(tunnel).await? {
            return Ok(None);
        }
        let kept = self.deliveries.find(tunnel, id).await?;
        Ok(kept.filter(|kept| kept.owner == *self.owner() && kept.expires_at > unix_now()))
    }

    async fn list(
        &self,
        tunnels: &[TunnelName],
        wanted: &Filter,
        cursor: Option<&str>,
    ) -> Result<Answer<'static>, Error> {
        let Ok(after) = cursor.map(str::parse::<DeliveryId>).transpose() else {
            return Ok(refused(Refused::NotFound));
        };
        let mut merge = Merge::new(tunnels.len(), after);
        let mut rows = Rows::default();
        // Each tunnel is asked once in any case.
        let mut may_be_empty = EMPTY_PAGES + tunnels.len();
        loop {
            match merge.next() {
                Next::End => return Ok(Answer::Deliveries { list: rows.list, cursor: None }),
                Next::Row(summary) => {
                    if !rows.has_room_for(&summary) {
                        // The next page begins with it.
                        let cursor = rows.list.last().map(|last| last.id.to_string());
                        return Ok(Answer::Deliveries { list: rows.list, cursor });
                    }
                    rows.push(*summary);
                }
                Next::Ask { after: Some(after), .. } if may_be_empty == 0 => {
                    return Ok(Answer::Deliveries { list: rows.list, cursor: Some(after.to_string()) });
                }
                Next::Ask { at, after } => {
                    let (summaries, last) = self.page(&tunnels[at], wanted, after.as_ref()).await?;
                    if summaries.is_empty() {
                        may_be_empty = may_be_empty.saturating_sub(1);
                    }
                    merge.take(at, summaries, last);
                }
            }
        }
    }

    /// A page of one tunnel's, and what the next one begins after if there may be one.
    async fn page(
        &self,
        tunnel: &TunnelName,
        filter: &Filter,
        after: Option<&DeliveryId>,
    ) -> Result<(Vec<Summary>, Option<DeliveryId>), Error> {
        let &Filter { state, open, since_ms } = filter;
        let wanted =
            Wanted { tunnel, owner: self.owner(), state, open, since_ms, oldest_first: false, after };
        let mut page = self.deliveries.page(&wanted, unix_now()).await?;
        // Nothing is shown as waiting that nothing will ever happen to.
        if self.deliveries.mend(tunnel, &page.deliveries).await? > 0 {
            page = self.deliveries.page(&wanted, unix_now()).await?;
        }
        Ok((page.deliveries.iter().map(Kept::summary).collect(), page.last))
    }

    async fn show(&self, kept: &Kept, body_from: Option<u64>) -> Result<Answer<'static>, Error> {
        let mut summary = kept.summary();
        // The head is told once, so that the rest of a long body has room.
        let headers =
            if body_from.unwrap_or(0) == 0 { kept.head.headers.clone() } else { Default::default() };
        let head = summary.target.len() + serde_json::to_string(&headers).map_or(0, |text| text.len());
        let room = limits::DELIVERIES_ANSWER_BYTES.saturating_sub(head + limits::ENVELOPE_BYTES) / 4 * 3;
        let (body, more) = match body_from {
            None => (None, None),
            Some(from) => {
                let bytes = self.deliveries.body_part(kept, from, room).await?;
                let next = from + bytes.len() as u64;
                let more = (next < kept.body_bytes && !bytes.is_empty()).then_some(next);
                (Some(Body::encode(&bytes).into_owned()), more)
            }
        };
        if body_from.is_some_and(|from| from > 0) {
            summary.target.clear();
        }
        Ok(Answer::Delivery { summary: Box::new(summary), headers, body, more })
    }

    async fn retry_dead(&self, tunnel: &TunnelName, cursor: Option<&str>) -> Result<Answer<'static>, Error> {
        let Ok(mut after) = cursor.map(str::parse::<DeliveryId>).transpose() else {
            return Ok(refused(Refused::NotFound));
        };
        let mut count = 0;
        for _ in 0..EMPTY_PAGES {
            // The oldest first, so that those of a key are delivered in the order in which they came.
            let wanted = Wanted {
                tunnel,
                owner: self.owner(),
                state: Some(State::Dead),
                open: false,
                since_ms: None,
                oldest_first: true,
                after: after.as_ref(),
            };
            let Page { deliveries, last } = self.deliveries.page(&wanted, unix_now()).await?;
            for (at, kept) in deliveries.iter().enumerate() {
                if at == RETRIED_AT_A_TIME {
                    let cursor = Some(deliveries[at - 1].id.to_string());
                    return Ok(Answer::Done { count, cursor });
                }
                count += u32::from(self.deliveries.restart(kept).await?);
            }
            let Some(last) = last else { return Ok(done(count)) };
            if count > 0 {
                return Ok(Answer::Done { count, cursor: Some(last.to_string()) });
            }
            after = Some(last);
        }
        Ok(Answer::Done { count, cursor: after.map(|after| after.to_string()) })
    }
}

/// The rows of a page that fit one message.
#[derive(Debug, Default)]
struct Rows {
    list: Vec<Summary>,
    bytes: usize,
}

impl Rows {
    /// How many there are at most.
    const MOST: usize = 200;

    fn bytes_of(summary: &Summary) -> usize {
        serde_json::to_string(summary).map_or(0, |text| text.len() + 1)
    }

    fn has_room_for(&self, summary: &Summary) -> bool {
        self.list.is_empty()
            || (self.bytes + Self::bytes_of(summary) <= limits::DELIVERIES_ANSWER_BYTES
                && self.list.len() < Self::MOST)
    }

    fn push(&mut self, summary: Summary) {
        self.bytes += Self::bytes_of(&summary);
        self.list.push(summary);
    }
}

/// Which deliveries a list has; see [`Wanted`].
#[derive(Debug)]
struct Filter {
    state: Option<State>,
    open: bool,
    since_ms: Option<u64>,
}

/// What comes next in a list of several tunnels.
#[derive(Debug)]
enum Next {
    /// This one.
    Row(Box<Summary>),
    /// It is not known before another page of this tunnel is.
    Ask {
        /// The place of the tunnel.
        at: usize,
        /// What its page begins after. All that is newer has come.
        after: Option<DeliveryId>,
    },
    /// Nothing.
    End,
}

/// What is known of one tunnel's part of a list.
#[derive(Debug, Clone)]
enum Known {
    /// These rows, the newest first, and what to ask for after them if there may be more.
    Rows(VecDeque<Summary>, Option<DeliveryId>),
    /// Nothing before it is asked for what comes after that.
    Unknown(Option<DeliveryId>),
}

/// The lists of several tunnels, each the newest first, as one. Pure.
#[derive(Debug)]
struct Merge(Vec<Known>);

impl Merge {
    /// Of so many tunnels, all that is older than `after`.
    fn new(tunnels: usize, after: Option<DeliveryId>) -> Self {
        Self(vec![Known::Unknown(after); tunnels])
    }

    fn next(&mut self) -> Next {
        // By the newest id that may come of a tunnel; of one that has not been asked, any may.
        let newest = |known: &Known| match known {
            Known::Rows(rows, _) => rows.front().map(|row| (false, Some(row.id.clone()))),
            Known::Unknown(after) => Some((after.is_none(), after.clone())),
        };
        let first = self.0.iter().enumerate().filter_map(|(at, known)| Some((newest(known)?, at))).max();
        let Some((_, at)) = first else { return Next::End };
        match &mut self.0[at] {
            Known::Unknown(after) => Next::Ask { at, after: after.clone() },
            Known::Rows(rows, more) => {
                let Some(row) = rows.pop_front() else { return Next::End };
                if rows.is_empty()
                    && let Some(more) = more.take()
                {
                    self.0[at] = Known::Unknown(Some(more));
                }
                Next::Row(Box::new(row))
            }
        }
    }

    /// Takes the page of a tunnel that [`Next::Ask`] has named.
    fn take(&mut self, at: usize, page: Vec<Summary>, last: Option<DeliveryId>) {
        self.0[at] = match last {
            Some(last) if page.is_empty() => Known::Unknown(Some(last)),
            last => Known::Rows(page.into(), last),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(tunnel: &str, at: u64) -> Summary {
        Summary {
            id: DeliveryId::new(at, [1; 10]),
            tunnel: tunnel.parse().unwrap(),
            state: State::Waiting,
            received_ms: at,
            expires_at: 8,
            attempt: 0,
            method: "POST".into(),
            target: "/".into(),
            body_bytes: 0,
            run: None,
            last: None,
        }
    }

    /// The times of what is listed of tunnels with deliveries of these times, in pages of two that begin after `after`; and
    /// how many pages were asked for.
    fn merged(tunnels: &[&[u64]], after: Option<u64>) -> (Vec<u64>, usize) {
        let mut merge = Merge::new(tunnels.len(), after.map(|at| DeliveryId::new(at, [1; 10])));
        let (mut times, mut asked) = (Vec::new(), 0);
        loop {
            match merge.next() {
                Next::End => return (times, asked),
                Next::Row(row) => times.push(row.received_ms),
                Next::Ask { at, after } => {
                    asked += 1;
                    assert!(asked < 100);
                    // All that is newer has been listed.
                    if let Some(after) = &after {
                        assert!(times.last().is_none_or(|last| *last >= after.received_ms()));
                    }
                    let is_older = |time: &u64| after.as_ref().is_none_or(|it| *time < it.received_ms());
                    let rest: Vec<u64> = tunnels[at].iter().copied().filter(is_older).collect();
                    let page: Vec<u64> = rest.iter().copied().take(2).collect();
                    let last = page.last().filter(|_| rest.len() > 2);
                    let last = last.map(|&at| DeliveryId::new(at, [1; 10]));
                    // What is odd does not fit what is wanted.
                    let page = page.iter().filter(|&&time| time % 2 == 0).map(|&time| kept("web", time));
                    merge.take(at, page.collect(), last);
                }
            }
        }
    }

    #[test]
    fn a_list_of_several_tunnels_is_the_newest_first_and_goes_on_anywhere() {
        let tunnels: [&[u64]; 4] = [&[20, 17, 15, 13, 12, 2], &[], &[18, 16, 14, 10, 8], &[19, 11, 9, 4]];
        let all = [20, 18, 16, 14, 12, 10, 8, 4, 2];
        assert_eq!(merged(&tunnels, None).0, all);
        for (at, last) in all.iter().enumerate() {
            assert_eq!(merged(&tunnels, Some(*last)).0, all[at + 1..], "after {last}");
        }
        assert_eq!(merged(&[], None), (Vec::new(), 0));
        // What is all older than another's is not read on before it is needed.
        let mut merge = Merge::new(2, None);
        for (at, times) in [(1, [9, 8]), (0, [5, 4])] {
            assert!(matches!(merge.next(), Next::Ask { at: asked, after: None } if asked == at));
            let last = DeliveryId::new(times[1], [1; 10]);
            merge.take(at, times.map(|time| kept("web", time)).to_vec(), Some(last));
        }
        assert!(matches!(merge.next(), Next::Row(row) if row.received_ms == 9));
        assert!(matches!(merge.next(), Next::Row(row) if row.received_ms == 8));
        assert!(matches!(merge.next(), Next::Ask { at: 1, after: Some(_) }));
    }

    #[test]
    fn a_page_fits_one_message_and_has_something() {
        let summary = |target: usize| Summary { target: "/".repeat(target), ..kept("web", 7) };
        let mut rows = Rows::default();
        assert!(rows.has_room_for(&summary(32_768)));
        while rows.has_room_for(&summary(32_768)) {
            rows.push(summary(32_768));
        }
        assert_eq!(rows.list.len(), 3);
        let answer = Answer::Deliveries { list: rows.list, cursor: Some("x".repeat(100)) };
        let message = EdgeMessage::Deliveries(DeliveriesAnswer { seq: u32::MAX, answer }).encode();
        assert!(message.len() <= limits::MESSAGE_BYTES, "{}", message.len());
        let mut rows = Rows::default();
        while rows.has_room_for(&summary(1)) {
            rows.push(summary(1));
        }
        assert_eq!(rows.list.len(), Rows::MOST);
    }
}
