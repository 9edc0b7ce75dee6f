//! Lambda `deliveries`: answers what an agent asks about the deliveries that are kept for its owner.
//!
//! It handles the route of that name; the answer goes back as the route's response. Who asks about a tunnel that its token
//! does not cover, or whose name is another owner's, is told the same as about one that does not exist.
//!
//! Permissions it needs: read and write rows of the table of deliveries; read and write rows of names, read those of
//! connections and the list of revoked identities; start, describe and stop runs of `delivery`, and answer those that wait.

use std::process::ExitCode;

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
            Ask::List { tunnel, state, since_ms, cursor } => {
                let tunnels = match tunnel {
                    Some(tunnel) if !self.owns(&tunnel).await? => return Ok(refused(Refused::NotFound)),
                    Some(tunnel) => vec![tunnel],
                    None => self.registry.tunnels_of(connection).await?.into_iter().collect(),
                };
                self.list(&tunnels, state, since_ms, cursor.as_deref()).await
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
        state: Option<State>,
        since_ms: Option<u64>,
        cursor: Option<&str>,
    ) -> Result<Answer<'static>, Error> {
        let Some((mut at, mut after)) = Cursor::read(tunnels, cursor) else {
            return Ok(refused(Refused::NotFound));
        };
        let mut rows = Rows::default();
        let mut empty = 0;
        while let Some(tunnel) = tunnels.get(at) {
            let wanted = Wanted { tunnel, owner: self.owner(), state, since_ms, after: after.as_ref() };
            let mut page = self.deliveries.page(&wanted, unix_now()).await?;
            // Nothing is shown as waiting that nothing will ever happen to.
            if self.deliveries.mend(tunnel, &page.deliveries).await? > 0 {
                page = self.deliveries.page(&wanted, unix_now()).await?;
            }
            let Page { deliveries, last } = page;
            empty = if deliveries.is_empty() { empty + 1 } else { 0 };
            for kept in deliveries {
                let summary = kept.summary();
                if !rows.has_room_for(&summary) {
                    // The next page begins with it.
                    let cursor = Cursor { tunnel, after: rows.last_of(tunnel).or(after.as_ref()) }.write();
                    return Ok(Answer::Deliveries { list: rows.list, cursor: Some(cursor) });
                }
                rows.push(summary);
            }
            match last {
                Some(last) => after = Some(last),
                None => (at, after) = (at + 1, None),
            }
            if (empty >= EMPTY_PAGES || rows.list.len() >= Rows::MOST)
                && let Some(tunnel) = tunnels.get(at)
            {
                let cursor = Cursor { tunnel, after: after.as_ref() }.write();
                return Ok(Answer::Deliveries { list: rows.list, cursor: Some(cursor) });
            }
        }
        Ok(Answer::Deliveries { list: rows.list, cursor: None })
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
            let state = Some(State::Dead);
            let wanted = Wanted { tunnel, owner: self.owner(), state, since_ms: None, after: after.as_ref() };
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

    /// The last one of a tunnel.
    fn last_of(&self, tunnel: &TunnelName) -> Option<&DeliveryId> {
        self.list.last().filter(|last| last.tunnel == *tunnel).map(|last| &last.id)
    }
}

/// Where a list goes on: at a tunnel, after one of its deliveries.
#[derive(Debug)]
struct Cursor<'a> {
    tunnel: &'a TunnelName,
    after: Option<&'a DeliveryId>,
}

impl Cursor<'_> {
    fn write(&self) -> String {
        format!("{}/{}", self.tunnel, self.after.map(ToString::to_string).unwrap_or_default())
    }

    /// The place in `tunnels` and what it goes on after; `None` for what was never handed out, or a tunnel that is served
    /// no more.
    fn read(tunnels: &[TunnelName], text: Option<&str>) -> Option<(usize, Option<DeliveryId>)> {
        let Some(text) = text else { return Some((0, None)) };
        let (tunnel, after) = text.split_once('/')?;
        let at = tunnels.iter().position(|own| own.as_str() == tunnel)?;
        let after = if after.is_empty() { None } else { Some(after.parse().ok()?) };
        Some((at, after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_goes_on_where_it_ended_and_nowhere_else() {
        let tunnels: Vec<TunnelName> = ["a1", "b2"].map(|name| name.parse().unwrap()).to_vec();
        let id = DeliveryId::new(7, [1; 10]);
        for (at, after) in [(0, None), (1, None), (1, Some(&id))] {
            let text = Cursor { tunnel: &tunnels[at], after }.write();
            assert_eq!(Cursor::read(&tunnels, Some(&text)), Some((at, after.cloned())), "{text}");
        }
        assert_eq!(Cursor::read(&tunnels, None), Some((0, None)));
        for text in ["", "a1", "c3/", "a1/x", "a1/0/0"] {
            assert_eq!(Cursor::read(&tunnels, Some(text)), None, "{text}");
        }
    }

    #[test]
    fn a_page_fits_one_message_and_has_something() {
        let summary = |target: usize| Summary {
            id: DeliveryId::new(7, [1; 10]),
            tunnel: "web".parse().unwrap(),
            state: State::Waiting,
            received_ms: 7,
            expires_at: 8,
            attempt: 0,
            method: "POST".into(),
            target: "/".repeat(target),
            body_bytes: 0,
            run: None,
            last: None,
        };
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
