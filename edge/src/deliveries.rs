//! Deliveries: requests that were accepted and wait to be brought to their upstream. DynamoDB's table `deliveries`, key
//! `pk` + `sk`, and the STANDARD machine `delivery`, one run for each:
//!
//! | row | `pk` | `sk` | other attributes |
//! |---|---|---|---|
//! | delivery | `t#` + the tunnel | its id | `owner` `state` `received_ms` `attempt` `head` `body_bytes` `body` `pieces` `policy` `order_key` `place` `run` `last` |
//! | piece | `b#` + the id | `0001`… | `bytes` |
//! | parked | `p#` + the tunnel | the id | `token`, `run`: written by the machine's `AwaitAgent` |
//! | turn | `o#` + the tunnel + `#` + a hash | the place: its id, or a later name where it was begun anew | `id` in that case, `token`: one for each unfinished delivery of a key; the oldest has its turn |
//! | repetition | `u#` + the tunnel + `#` + a hash | `#` | `id` |
//! | waiting | `#waiting` | the tunnel | tunnels that may have parked rows |
//!
//! Every row has `expires_at`, the table's TTL. A short body stands in its delivery's row, a longer one in pieces, and
//! nowhere else.
//!
//! A delivery that was accepted has a row and a run. The row is written last, so one that is there is whole: whoever meets it
//! without a run starts that, under the one name that it can have. Before the row is there nobody delivers anything: whoever
//! waits for an acceptance that takes too long writes a row of their own in its place, which has no request, and the
//! acceptance, should it go on, finds that it was cut off.

mod letters;
mod mend;
pub mod pages;
mod removal;

use std::{
    collections::HashMap,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use aws_sdk_dynamodb::{
    operation::{query::builders::QueryFluentBuilder, update_item::builders::UpdateItemFluentBuilder},
    primitives::Blob,
    types::AttributeValue,
};
use aws_sdk_sfn::types::ExecutionStatus;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use proto::{
    delivery::{DeliveryPolicy, Last, State},
    header::Headers,
    id::{DeliveryId, Owner, TunnelName},
    limits,
    token::TaskToken,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error,
    aws::{Aws, classify, holds, if_held, is_code, number, text},
    config::{Env, env},
    unix_now_ms,
};

/// How much longer than it is tried a delivery is kept, in seconds: so that one that was given up can be looked at and
/// tried once more.
const KEPT_AFTER_S: u64 = 24 * 60 * 60;

/// How long an acceptance may take, in milliseconds, before whoever waits for it cuts it off.
const ACCEPTED_WITHIN_MS: u64 = 5_000;

/// How many rows one query reads beyond those that are wanted: some belong to runs that are over.
const SPARE: usize = 8;

/// The condition of [`Deliveries::change_open`]: the delivery has not ended.
const IS_OPEN: &str = "#state IN (:waiting, :delivering)";

/// The name that a run is told when it has to ask for its turn again.
pub const TURN_UNCLEAR: &str = "TurnUnclear";

/// What the owner's last `hello` said about a tunnel, as the registry's name row keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Whose the tunnel is.
    pub owner: Owner,
    /// What is kept, and how it is delivered.
    pub policy: DeliveryPolicy,
}

/// The head of a request as it goes to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The method.
    pub method: String,
    /// The target for the upstream.
    pub target: String,
    /// The fields for the upstream, in their order.
    pub headers: Headers,
}

/// A request that is to be accepted.
#[derive(Debug)]
pub struct Offer<'a> {
    /// The tunnel.
    pub tunnel: &'a TunnelName,
    /// What its owner wants.
    pub terms: &'a Terms,
    /// The head.
    pub head: &'a Head,
    /// The body.
    pub body: &'a [u8],
    /// How many attempts there have been.
    pub attempt: u32,
}

/// What became of an [`Offer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// It is kept and has a run.
    New(DeliveryId),
    /// The same was accepted before.
    Before(DeliveryId),
    /// The same is being accepted at this moment; it is not known yet whether it will be.
    Unclear,
}

/// A delivery as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub id: DeliveryId,
    /// Its tunnel.
    pub tunnel: TunnelName,
    /// Whose it is.
    pub owner: Owner,
    /// How far it is.
    pub state: State,
    /// When it was accepted, in milliseconds since 1970.
    pub received_ms: u64,
    /// Until when it is kept, in seconds since 1970.
    pub expires_at: u64,
    /// How many attempts have begun, those of earlier runs among them.
    pub attempt: u32,
    /// The request's head.
    pub head: Head,
    /// The length of its body.
    pub body_bytes: u64,
    /// Its body where that is kept here, and not in pieces.
    pub body: Option<Blob>,
    /// In how many pieces its body is kept.
    pub pieces: u32,
    /// How it is delivered.
    pub policy: DeliveryPolicy,
    /// What it is ordered by, as a hash.
    pub order_key: Option<String>,
    /// Its place among those of its key since it was begun anew, which sorts as the id that one accepted then would have.
    /// Before that its place is its own id.
    pub place: Option<DeliveryId>,
    /// The name of its run.
    pub run: String,
    /// What became of the last attempt.
    pub last: Option<Last>,
    /// How often the run that buried it had been redriven by then.
    pub buried: Option<u64>,
    /// Since when its attempts have come to nothing, none of which counts, in milliseconds since 1970.
    pub refused_since_ms: Option<u64>,
}

/// How an attempt has ended after which the delivery goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// It was made.
    Made,
    /// It was begun and no upstream was called: its number is used again.
    NotMade,
    /// It was not even begun.
    NotBegun,
}

/// One of the deliveries of a tunnel that are under way at the same time after its agent has come back. The first one opens
/// others, one after the other, so that the upstream is not flooded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lane {
    /// Its number; negative for a run that is in none.
    pub lane: i64,
    /// How many there are.
    pub lanes: u32,
}

impl Lane {
    /// The first one.
    pub const FIRST: Self = Self { lane: 0, lanes: 1 };
    /// None.
    pub const NONE: Self = Self { lane: -1, lanes: 0 };

    /// The lanes that go on when a run of this one has ended.
    #[must_use]
    pub fn next(self, most: u32) -> Vec<Self> {
        match self.lane {
            ..0 => Vec::new(),
            0 if self.lanes < most => {
                let lanes = self.lanes + 1;
                vec![Self { lane: 0, lanes }, Self { lane: i64::from(self.lanes), lanes }]
            }
            _ => vec![self],
        }
    }
}

/// How the run of a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Nobody has started it.
    Lacking,
    /// It will end the delivery.
    GoesOn,
    /// It has ended, or was stopped from outside.
    Over,
}

/// What there is to be expected of a delivery that has its turn before others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// It ends, and then passes its turn on.
    GoesOn,
    /// It has ended, or never will be accepted.
    Ended,
    /// It may be being accepted at this moment.
    Unclear,
}

/// What became of an answer to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// The run goes on.
    Taken,
    /// It does not wait for that any more.
    Late,
}

/// How long the runs of a tunnel have waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backlog {
    /// How many wait, up to the bound that was given.
    pub parked: usize,
    /// When the oldest of them was accepted, in milliseconds since 1970.
    pub oldest_ms: Option<u64>,
}

/// One of those that have, or wait for, the turn of a key.
#[derive(Debug)]
struct Turn {
    /// Where it stands: the first has the turn.
    place: DeliveryId,
    /// Which delivery it is.
    id: DeliveryId,
    /// What its run waits with, if it does.
    token: Option<String>,
}

impl Turn {
    fn read(row: &Row) -> Option<Self> {
        let part = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
        let place: DeliveryId = name_of(row)?;
        let id = part("id").map_or_else(|| Some(place.clone()), |id| id.parse().ok())?;
        Some(Self { place, id, token: part("token").cloned() })
    }
}

impl Kept {
    /// Its place among those of its key.
    fn place(&self) -> &DeliveryId {
        self.place.as_ref().unwrap_or(&self.id)
    }

    /// Its row among those of its key; nothing where it has none.
    fn turn_row(&self) -> Option<Row> {
        let pk = turn_key(&self.tunnel, self.order_key.as_ref()?);
        let mut row = item(&pk, self.place().as_str(), self.expires_at);
        if self.place.is_some() {
            row.insert("id".into(), text(self.id.as_str()));
        }
        Some(row)
    }
}

/// The table of deliveries and their runs.
#[derive(Debug, Clone)]
pub struct Deliveries {
    client: aws_sdk_dynamodb::Client,
    runs: aws_sdk_sfn::Client,
    queues: aws_sdk_sqs::Client,
    table: String,
    machine: Option<String>,
    dead_letters: Option<String>,
    redeliveries: Option<String>,
    /// Until when the tunnels are noted as waiting, as far as this process has written it.
    noted: Arc<Mutex<HashMap<TunnelName, u64>>>,
}

type Row = HashMap<String, AttributeValue>;

impl Deliveries {
    /// Reads the names of table, machine and queues from the environment; nothing where there is no table.
    #[must_use]
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Option<Self> {
        let table = env.optional(env::DELIVERIES_TABLE)?;
        Some(Self {
            client: aws.dynamodb(),
            runs: aws.runs(),
            queues: aws.sqs(),
            table,
            machine: env.optional(env::DELIVERY_MACHINE_ARN),
            dead_letters: env.optional(env::DEAD_LETTERS_URL),
            redeliveries: env.optional(env::REDELIVERIES_URL),
            noted: Arc::default(),
        })
    }

    /// Keeps a request and starts its run. Only then may anybody be told that it was accepted.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be delivered nevertheless where the start is what failed.
    pub async fn accept(&self, offer: &Offer<'_>) -> Result<Accepted, Error> {
        let now_ms = unix_now_ms();
        let id = new_id(now_ms);
        let policy = &offer.terms.policy;
        let path = offer.head.target.split('?').next().unwrap_or_default();
        let order_key = policy.order_key(path, &offer.head.headers).map(|key| hash(&key));
        let expires_at = now_ms / 1000 + policy.max_age_s + KEPT_AFTER_S;
        let repetition =
            policy.dedupe_key(&offer.head.headers).map(|key| repetition_key(offer.tunnel, &hash(key)));
        if let Some(pk) = &repetition
            && let Some(before) = self.repeats(offer, pk, &id, expires_at, now_ms).await?
        {
            return Ok(before);
        }
        let pieces = pieces_of(offer.body).len();
        let in_row = pieces == 0 && !offer.body.is_empty();
        let kept = Kept {
            run: id.to_string(),
            id,
            tunnel: offer.tunnel.clone(),
            owner: offer.terms.owner.clone(),
            state: State::Waiting,
            received_ms: now_ms,
            expires_at,
            attempt: offer.attempt,
            head: offer.head.clone(),
            body_bytes: offer.body.len() as u64,
            body: in_row.then(|| Blob::new(offer.body)),
            pieces: u32::try_from(pieces).unwrap_or(u32::MAX),
            policy: policy.clone(),
            order_key,
            place: None,
            last: None,
            buried: None,
            refused_since_ms: None,
        };
        if let Err(error) = Box::pin(self.store(&kept, offer.body)).await {
            // Nobody has been told. What stays expires.
            drop(self.forget(&kept, repetition.as_deref()).await);
            return Err(error);
        }
        // A row that is there may have been seen. So it stays where this fails, and whoever meets it starts its run.
        self.start(&kept).await?;
        Ok(Accepted::New(kept.id))
    }

    /// Writes everything of a delivery, its row last.
    async fn store(&self, kept: &Kept, body: &[u8]) -> Result<(), Error> {
        let turn = async {
            match kept.turn_row() {
                Some(row) => self.put(row).await,
                None => Ok(()),
            }
        };
        let noted = self.note_waiting(&kept.tunnel, kept.expires_at);
        tokio::try_join!(self.keep_body(kept, body), turn, noted)?;
        let written = self.put_if(row_of(kept), "attribute_not_exists(pk)", []).await;
        if matches!(written, Ok(true)) {
            return Ok(());
        }
        // An earlier try may have written it, or somebody has cut this off: then it is not to be written any more.
        if !self.cut_off(&kept.tunnel, &kept.id).await? {
            return Ok(());
        }
        written?;
        Err(Error::Failed { call: "PutItem", source: "it took too long and was cut off".into() })
    }

    /// Has an acceptance end that has not written its row, should it still be under way; false where the row is there.
    async fn cut_off(&self, tunnel: &TunnelName, id: &DeliveryId) -> Result<bool, Error> {
        let row = item(&tunnel_key(tunnel), id.as_str(), unix_now_ms() / 1000 + KEPT_AFTER_S);
        self.put_if(row, "attribute_not_exists(pk) OR attribute_not_exists(received_ms)", []).await
    }

    /// What its owner was accepted under the same key; nothing where this is the first, or where the first was cut off or is
    /// a former owner's of the tunnel.
    async fn repeats(
        &self,
        offer: &Offer<'_>,
        pk: &str,
        id: &DeliveryId,
        expires_at: u64,
        now_ms: u64,
    ) -> Result<Option<Accepted>, Error> {
        let Offer { tunnel, terms, .. } = *offer;
        let mut row = item(pk, "#", expires_at);
        row.insert("id".into(), text(id.as_str()));
        let now_s = (":now".to_owned(), number(now_ms / 1000));
        if self.put_if(row.clone(), "attribute_not_exists(pk) OR expires_at <= :now", [now_s]).await? {
            return Ok(None);
        }
        let before = self.get(pk, "#").await?;
        let before: Option<DeliveryId> =
            before.as_ref().and_then(|row| row.get("id")?.as_s().ok()?.parse().ok());
        let Some(before) = before else { return Ok(Some(Accepted::Unclear)) };
        if before == *id {
            // An earlier try of this call has written it.
            return Ok(None);
        }
        match self.find(tunnel, &before).await? {
            // Nobody who is not its owner learns that there is one.
            Some(kept) if kept.owner != terms.owner => {}
            Some(kept) => {
                if !kept.state.is_final() && self.run_of(&kept.run).await? == Run::Lacking {
                    self.start(&kept).await?;
                }
                return Ok(Some(Accepted::Before(before)));
            }
            None => {
                if now_ms < before.received_ms() + ACCEPTED_WITHIN_MS
                    || !self.cut_off(tunnel, &before).await?
                {
                    return Ok(Some(Accepted::Unclear));
                }
            }
        }
        let same = (":before".to_owned(), text(before.as_str()));
        Ok(if self.put_if(row, "id = :before", [same]).await? { None } else { Some(Accepted::Unclear) })
    }

    async fn keep_body(&self, kept: &Kept, body: &[u8]) -> Result<(), Error> {
        for (at, piece) in pieces_of(body).enumerate() {
            let mut row = item(&piece_key(&kept.id), &piece_name(at as u64), kept.expires_at);
            row.insert("bytes".into(), AttributeValue::B(Blob::new(piece)));
            self.put(row).await?;
        }
        Ok(())
    }

    /// Notes that runs of the tunnel may wait, for the sweep to find. Once in a day and process.
    async fn note_waiting(&self, tunnel: &TunnelName, until: u64) -> Result<(), Error> {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner).get(tunnel).copied();
        if noted.is_some_and(|noted| noted >= until) {
            return Ok(());
        }
        let until = until + KEPT_AFTER_S;
        self.put(item("#waiting", tunnel.as_str(), until)).await?;
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).insert(tunnel.clone(), until);
        Ok(())
    }

    /// Starts the run of a delivery, if there is none: the name is always the same, and so is what the run is given.
    async fn start(&self, kept: &Kept) -> Result<(), Error> {
        let is_first = kept.run == kept.id.as_str();
        let begins_ms = if is_first { kept.received_ms } else { kept.received_ms.max(unix_now_ms()) };
        let deadline_ms = begins_ms + kept.policy.max_age_s * 1000;
        let attempt = if is_first { kept.attempt } else { 0 };
        let turn = kept.order_key.is_none();
        if !is_first {
            self.line_up(kept).await?;
        }
        let input = json!({
            "delivery": kept.id, "tunnel": kept.tunnel, "timeout_s": kept.policy.timeout_s,
            "deadline_ms": deadline_ms.min(kept.expires_at * 1000),
            "attempt": attempt, "turn": turn, "lane": Lane::NONE.lane, "lanes": Lane::NONE.lanes,
        });
        let start = self.runs.start_execution().set_state_machine_arn(self.machine.clone());
        match start.name(&kept.run).input(input.to_string()).send().await {
            Ok(_) => Ok(()),
            // The name is taken by this very run: an earlier try has started it.
            Err(error) if is_code(&error, "ExecutionAlreadyExists") => Ok(()),
            Err(error) => Err(classify("StartExecution", error)),
        }
    }

    /// Has a delivery that was begun anew stand in its place among those of its key. It may be repeated.
    async fn line_up(&self, kept: &Kept) -> Result<(), Error> {
        if let Some(row) = kept.turn_row() {
            // One that is there may have the token of its run.
            self.put_if(row, "attribute_not_exists(pk)", []).await?;
        }
        Ok(())
    }

    fn arn_of(&self, run: &str) -> String {
        let machine = self.machine.as_deref().unwrap_or_default();
        format!("{}:{run}", machine.replacen(":stateMachine:", ":execution:", 1))
    }

    /// How a run of this name is.
    async fn run_of(&self, run: &str) -> Result<Run, Error> {
        match self.runs.describe_execution().execution_arn(self.arn_of(run)).send().await {
            Ok(run) => Ok(match run.status {
                ExecutionStatus::Running | ExecutionStatus::PendingRedrive => Run::GoesOn,
                _ => Run::Over,
            }),
            Err(error) if is_code(&error, "ExecutionDoesNotExist") => Ok(Run::Lacking),
            Err(error) => Err(classify("DescribeExecution", error)),
        }
    }

    /// Starts another run of a delivery that has ended; false where it has not, or its body is gone.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn restart(&self, kept: &Kept) -> Result<bool, Error> {
        if !kept.state.is_final() {
            // One that has no run yet gets it.
            if self.run_of(&kept.run).await? != Run::Lacking {
                return Ok(false);
            }
            return self.start(kept).await.map(|()| true);
        }
        if kept.body_bytes > 0 && kept.state != State::Dead {
            return Ok(false);
        }
        // After those of its key that are there: the turn of one that is under way is not taken from it.
        let place = new_id(unix_now_ms());
        let run = format!("{}-{}", kept.id, &place.as_str()[24..]);
        let begun = self
            .change(&kept.tunnel, &kept.id)
            .update_expression(
                "SET #state = :waiting, run = :run, place = :place REMOVE buried, refused_since",
            )
            .condition_expression("#state = :ended")
            .expression_attribute_values(":waiting", text(State::Waiting.as_str()))
            .expression_attribute_values(":place", text(place.as_str()))
            .expression_attribute_values(":ended", text(kept.state.as_str()))
            .expression_attribute_values(":run", text(&run));
        if !holds(begun).await? {
            return Ok(false);
        }
        self.note_waiting(&kept.tunnel, kept.expires_at).await?;
        self.start(&Kept { run, place: Some(place), ..kept.clone() }).await?;
        Ok(true)
    }

    /// The delivery with this name.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn find(&self, tunnel: &TunnelName, id: &DeliveryId) -> Result<Option<Kept>, Error> {
        Ok(self.get(&tunnel_key(tunnel), id.as_str()).await?.and_then(|row| read_row(&row)))
    }

    /// Begins an attempt: counts it and gives what is to be delivered to agents of `owner`. Nothing where the delivery has
    /// ended or gone, or is somebody else's.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn begin(
        &self,
        tunnel: &TunnelName,
        id: &DeliveryId,
        owner: &Owner,
    ) -> Result<Option<Kept>, Error> {
        let request = self
            .change_open(tunnel, id)
            .condition_expression(format!("{IS_OPEN} AND #owner = :owner"))
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(owner.as_str()))
            .update_expression("SET #state = :delivering, attempt = attempt + :one")
            .expression_attribute_values(":one", number(1))
            .return_values(aws_sdk_dynamodb::types::ReturnValue::AllNew);
        let begun = if_held("UpdateItem", request.send().await)?;
        Ok(begun.and_then(|output| output.attributes().and_then(read_row)))
    }

    /// A change of a delivery's row, with its state by the name `#state`.
    fn change(&self, tunnel: &TunnelName, id: &DeliveryId) -> UpdateItemFluentBuilder {
        let change = self.client.update_item().table_name(&self.table);
        change
            .set_key(Some(key(&tunnel_key(tunnel), id.as_str())))
            .expression_attribute_names("#state", "state")
    }

    /// The same on condition that it has not ended.
    fn change_open(&self, tunnel: &TunnelName, id: &DeliveryId) -> UpdateItemFluentBuilder {
        self.change(tunnel, id)
            .condition_expression(IS_OPEN)
            .expression_attribute_values(":waiting", text(State::Waiting.as_str()))
            .expression_attribute_values(":delivering", text(State::Delivering.as_str()))
    }

    /// The whole body.
    ///
    /// # Errors
    ///
    /// [`Error`], also when a piece of it is missing.
    pub async fn body(&self, kept: &Kept) -> Result<Vec<u8>, Error> {
        let mut body = Vec::with_capacity(usize::try_from(kept.body_bytes).unwrap_or_default());
        if kept.pieces == 0 {
            body.extend_from_slice(kept.body.as_ref().map_or(&[], |body| body.as_ref()));
            return complete(kept, body);
        }
        let pieces = self.partition(&piece_key(&kept.id)).consistent_read(true);
        let mut pages = pieces.into_paginator().items().send();
        while let Some(row) = pages.next().await {
            let row = row.map_err(|error| classify("Query", error))?;
            if let Some(bytes) = row.get("bytes").and_then(|bytes| bytes.as_b().ok()) {
                body.extend_from_slice(bytes.as_ref());
            }
        }
        complete(kept, body)
    }

    /// Notes how an attempt has ended, and that the delivery goes on with that.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn note(&self, kept: &Kept, last: &Last, noted: Noted) -> Result<(), Error> {
        let last_text = serde_json::to_string(last).unwrap_or_default();
        let change = match noted {
            Noted::Made => "SET #state = :waiting, #last = :last REMOVE refused_since",
            Noted::NotMade => {
                "SET #state = :waiting, #last = :last, attempt = attempt - :one, \
                 refused_since = if_not_exists(refused_since, :now)"
            }
            Noted::NotBegun => {
                "SET #state = :waiting, #last = :last, refused_since = if_not_exists(refused_since, :now)"
            }
        };
        let mut request = self
            .change_open(&kept.tunnel, &kept.id)
            .update_expression(change)
            .expression_attribute_names("#last", "last")
            .expression_attribute_values(":last", text(&last_text));
        if noted != Noted::Made {
            request = request.expression_attribute_values(":now", number(last.at_ms));
        }
        if noted == Noted::NotMade {
            request = request.expression_attribute_values(":one", number(1));
        }
        // One that has ended meanwhile stays as it is.
        holds(request).await.map(drop)
    }

    /// Ends a delivery: its row says how, what waits for its turn is woken, and what is not needed any more goes. It may
    /// be repeated. `redrives` is how often the run that gives it up was redriven.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn end(&self, kept: &Kept, to: State, last: &Last, redrives: u64) -> Result<(), Error> {
        let last = serde_json::to_string(last).unwrap_or_default();
        let with_body = to != State::Dead;
        let mut change = "SET #state = :to, #last = :last, buried = :redrives".to_owned();
        if with_body {
            change.push_str(" REMOVE body");
        }
        let request = self
            .change_open(&kept.tunnel, &kept.id)
            .update_expression(change)
            .expression_attribute_names("#last", "last")
            .expression_attribute_values(":to", text(to.as_str()))
            .expression_attribute_values(":redrives", number(redrives))
            .expression_attribute_values(":last", text(&last));
        holds(request).await?;
        self.release(kept, with_body).await
    }

    /// What goes with the end of a delivery: its turn, and the pieces of its body unless it may be wanted again.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn release(&self, kept: &Kept, with_body: bool) -> Result<(), Error> {
        if with_body {
            self.drop_body(kept).await?;
        }
        if let Some(order_key) = &kept.order_key {
            let pk = turn_key(&kept.tunnel, order_key);
            self.delete(&pk, kept.place().as_str()).await?;
            Box::pin(self.pass_turn(&kept.tunnel, &pk)).await?;
        }
        Ok(())
    }

    /// Makes a dead delivery wait once more, for a run that was redriven: after those of its key that are there.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn revive(&self, kept: &Kept) -> Result<bool, Error> {
        let place = new_id(unix_now_ms());
        let request = self
            .change(&kept.tunnel, &kept.id)
            .update_expression("SET #state = :waiting, place = :place")
            .condition_expression("#state = :dead")
            .expression_attribute_values(":waiting", text(State::Waiting.as_str()))
            .expression_attribute_values(":place", text(place.as_str()))
            .expression_attribute_values(":dead", text(State::Dead.as_str()));
        if !holds(request).await? {
            return Ok(false);
        }
        self.line_up(&Kept { place: Some(place), ..kept.clone() }).await?;
        Ok(true)
    }

    /// Whether no delivery of the same key came before. Where one did, [`Deliveries::await_turn`] finds out whether it goes on.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn has_turn(&self, kept: &Kept) -> Result<bool, Error> {
        let Some(order_key) = &kept.order_key else { return Ok(true) };
        let rows = self.oldest(&turn_key(&kept.tunnel, order_key), 1).await?;
        let first = rows.first().and_then(|row| row.get("sk")?.as_s().ok());
        Ok(first.is_none_or(|first| first.as_str() >= kept.place().as_str()))
    }

    /// Has a run wait for its turn. It is answered at once where it has it.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`TURN_UNCLEAR`] where it is not known whether the one before it will ever be delivered.
    pub async fn await_turn(&self, kept: &Kept, token: &TaskToken) -> Result<(), Error> {
        let (Some(order_key), Some(mut row)) = (&kept.order_key, kept.turn_row()) else {
            return self.succeed(token.as_str(), "{}").await.map(drop);
        };
        let pk = turn_key(&kept.tunnel, order_key);
        row.insert("token".into(), text(token.as_str()));
        self.put(row).await?;
        // Whoever ends before this is read leaves the first place to this one, whoever ends later finds the token.
        while let Some(first) = self.turns(&pk, 1).await?.pop() {
            if first.place >= *kept.place() {
                break;
            }
            match self.before(&kept.tunnel, &first, Some(&kept.owner)).await? {
                Before::GoesOn => return Ok(()),
                Before::Unclear => return Err(Error::Named { name: TURN_UNCLEAR }),
                Before::Ended => self.delete(&pk, first.place.as_str()).await?,
            }
        }
        self.succeed(token.as_str(), "{}").await.map(drop)
    }

    /// Gives the turn to the oldest of a key. One that has not asked for it asks by itself once its run is there; what waits
    /// behind one of which that is not known asks again.
    async fn pass_turn(&self, tunnel: &TunnelName, pk: &str) -> Result<(), Error> {
        loop {
            let turns = self.turns(pk, SPARE).await?;
            let Some(first) = turns.first() else { return Ok(()) };
            if let Some(token) = &first.token
                && self.succeed(token, "{}").await? == Answered::Taken
            {
                return Ok(());
            }
            match self.before(tunnel, first, None).await? {
                Before::GoesOn => return Ok(()),
                Before::Unclear => {
                    for token in turns.iter().filter_map(|turn| turn.token.as_deref()) {
                        if self.fail(token, TURN_UNCLEAR).await? == Answered::Taken {
                            break;
                        }
                    }
                    return Ok(());
                }
                Before::Ended => self.delete(pk, first.place.as_str()).await?,
            }
        }
    }

    /// What there is to be expected of one that has its turn before others. Whose delivery waits for it may be said: then one
    /// of another owner is as good as ended, because the tunnel has passed on and it is delivered no more.
    async fn before(&self, tunnel: &TunnelName, turn: &Turn, owner: Option<&Owner>) -> Result<Before, Error> {
        let id = &turn.id;
        match self.find(tunnel, id).await? {
            // It was begun anew since, and stands elsewhere.
            Some(kept) if *kept.place() != turn.place => Ok(Before::Ended),
            Some(kept) if owner.is_some_and(|owner| *owner != kept.owner) => Ok(Before::Ended),
            Some(kept) => Ok(if self.carry_on(&kept).await? { Before::GoesOn } else { Before::Ended }),
            None if unix_now_ms() < id.received_ms() + ACCEPTED_WITHIN_MS => Ok(Before::Unclear),
            None => Ok(if self.cut_off(tunnel, id).await? { Before::Ended } else { Before::Unclear }),
        }
    }

    /// The first of a key.
    async fn turns(&self, pk: &str, most: usize) -> Result<Vec<Turn>, Error> {
        Ok(self.oldest(pk, most).await?.iter().filter_map(Turn::read).collect())
    }

    /// Lets parked runs of a tunnel go on, the oldest first, one for each lane. Gives how many there were.
    ///
    /// # Errors
    ///
    /// [`Error`]; some may go on nevertheless.
    pub async fn wake(&self, tunnel: &TunnelName, lanes: &[Lane]) -> Result<usize, Error> {
        let pk = parked_key(tunnel);
        let mut woken = 0;
        while woken < lanes.len() {
            let wanted = lanes.len() - woken + SPARE;
            let rows = self.oldest(&pk, wanted).await?;
            for row in &rows {
                let Some(lane) = lanes.get(woken) else { break };
                let part = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
                let (Some(id), Some(token)) = (part("sk"), part("token")) else { continue };
                let output = serde_json::to_string(lane).unwrap_or_default();
                // Answered first: a process that ends between the two leaves a row, not a run that waits for ever.
                if self.succeed(token, &output).await? == Answered::Taken {
                    woken += 1;
                }
                // A row that was written anew meanwhile stays.
                self.delete_parked(&pk, id, token).await?;
            }
            if rows.len() < wanted {
                break;
            }
        }
        Ok(woken)
    }

    async fn delete_parked(&self, pk: &str, id: &str, token: &str) -> Result<(), Error> {
        let request = self
            .client
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(key(pk, id)))
            .condition_expression("#token = :token")
            .expression_attribute_names("#token", "token")
            .expression_attribute_values(":token", text(token));
        if_held("DeleteItem", request.send().await).map(drop)
    }

    /// The tunnels of which runs may wait at the Unix time `now`, in seconds.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn waiting(&self, now: u64) -> Result<Vec<TunnelName>, Error> {
        let waiting = self
            .partition("#waiting")
            .filter_expression("expires_at > :now")
            .expression_attribute_values(":now", number(now));
        names(waiting).await
    }

    /// How many runs of a tunnel wait for its agent, counted up to `most`.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn backlog(&self, tunnel: &TunnelName, most: usize) -> Result<Backlog, Error> {
        let rows = self.oldest(&parked_key(tunnel), most).await?;
        let oldest = rows.first().and_then(name_of::<DeliveryId>);
        Ok(Backlog { parked: rows.len(), oldest_ms: oldest.map(|id| id.received_ms()) })
    }

    /// Answers a run.
    ///
    /// # Errors
    ///
    /// [`Error`] when it is not known whether the run was told.
    pub async fn succeed(&self, token: &str, output: &str) -> Result<Answered, Error> {
        let call = self.runs.send_task_success().task_token(token).output(output);
        answered("SendTaskSuccess", call.send().await)
    }

    /// Tells a run that its task has failed, by a name of at most 256 bytes.
    ///
    /// # Errors
    ///
    /// [`Error`] when it is not known whether the run was told.
    pub async fn fail(&self, token: &str, name: &str) -> Result<Answered, Error> {
        let call = self.runs.send_task_failure().task_token(token).error(name);
        answered("SendTaskFailure", call.send().await)
    }

    /// Tells a run that its task goes on.
    ///
    /// # Errors
    ///
    /// [`Error`] when it is not known whether the run was told.
    pub async fn beat(&self, token: &str) -> Result<Answered, Error> {
        let call = self.runs.send_task_heartbeat().task_token(token);
        answered("SendTaskHeartbeat", call.send().await)
    }

    /// Puts a pointer to a delivery that was given up where operators find it.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn bury(&self, kept: &Kept, reason: &str) -> Result<(), Error> {
        let Some(queue) = &self.dead_letters else { return Ok(()) };
        let pointer = json!({ "delivery": kept.id, "tunnel": kept.tunnel, "reason": reason });
        let sent = self.queues.send_message().queue_url(queue).message_body(pointer.to_string()).send().await;
        sent.map_err(|error| classify("SendMessage", error))?;
        Ok(())
    }

    /// Starts what operators have moved back from the dead letters, a batch of ten at most; gives how many messages there
    /// were. A message about something that cannot be delivered again goes.
    ///
    /// # Errors
    ///
    /// [`Error`]; what was not done is received again.
    pub async fn redeliver(&self) -> Result<usize, Error> {
        let Some(queue) = &self.redeliveries else { return Ok(0) };
        let received = self.queues.receive_message().queue_url(queue).max_number_of_messages(10).send().await;
        let received = received.map_err(|error| classify("ReceiveMessage", error))?;
        let read = |message| (letters::Pointer::read(message), message);
        let mut messages: Vec<_> = received.messages().iter().map(read).collect();
        // The queue gives them in any order; of a key the oldest is begun first.
        messages.sort_by(|(one, _), (other, _)| {
            let id = |read: &Result<letters::Pointer, _>| read.as_ref().ok().map(|it| it.delivery.clone());
            id(one).cmp(&id(other))
        });
        for (pointer, message) in messages {
            match pointer {
                Ok(pointer) => {
                    let restarted = match self.find(&pointer.tunnel, &pointer.delivery).await? {
                        // It may have been delivered since, in another way.
                        Some(kept) if !matches!(kept.state, State::Delivered | State::Cancelled) => {
                            self.restart(&kept).await?
                        }
                        _ => false,
                    };
                    tracing::info!(delivery_id = %pointer.delivery, tunnel_id = %pointer.tunnel, restarted, "delivery was moved back");
                }
                Err(error) => tracing::warn!(%error, "a message of the queue of redeliveries is none"),
            }
            let delete = self.queues.delete_message().queue_url(queue);
            let deleted = delete.set_receipt_handle(message.receipt_handle.clone()).send().await;
            deleted.map_err(|error| classify("DeleteMessage", error))?;
        }
        Ok(received.messages().len())
    }

    /// Removes what belongs to a row that was not written. Nobody waits for it: who would have was told to ask again.
    async fn forget(&self, kept: &Kept, repetition: Option<&str>) -> Result<(), Error> {
        if let Some(pk) = repetition {
            let own = self.client.delete_item().table_name(&self.table).set_key(Some(key(pk, "#")));
            let own = own
                .condition_expression("id = :id")
                .expression_attribute_values(":id", text(kept.id.as_str()));
            if_held("DeleteItem", own.send().await)?;
        }
        if let Some(key) = &kept.order_key {
            self.delete(&turn_key(&kept.tunnel, key), kept.place().as_str()).await?;
        }
        self.drop_body(kept).await
    }

    async fn drop_body(&self, kept: &Kept) -> Result<(), Error> {
        for piece in 0..kept.pieces {
            self.delete(&piece_key(&kept.id), &piece_name(piece.into())).await?;
        }
        Ok(())
    }

    /// A query for the rows of one partition; whoever narrows it says so in a condition of their own.
    fn partition(&self, pk: &str) -> QueryFluentBuilder {
        let query = self.client.query().table_name(&self.table);
        query.key_condition_expression("pk = :pk").expression_attribute_values(":pk", text(pk))
    }

    async fn oldest(&self, pk: &str, most: usize) -> Result<Vec<Row>, Error> {
        let output = self
            .partition(pk)
            .consistent_read(true)
            .limit(i32::try_from(most).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(|error| classify("Query", error))?;
        Ok(output.items.unwrap_or_default())
    }

    async fn get(&self, pk: &str, sk: &str) -> Result<Option<Row>, Error> {
        let request = self.client.get_item().table_name(&self.table).set_key(Some(key(pk, sk)));
        let output =
            request.consistent_read(true).send().await.map_err(|error| classify("GetItem", error))?;
        Ok(output.item)
    }

    async fn put(&self, row: Row) -> Result<(), Error> {
        let request = self.client.put_item().table_name(&self.table).set_item(Some(row));
        request.send().await.map_err(|error| classify("PutItem", error))?;
        Ok(())
    }

    /// Writes, and says whether the condition held.
    async fn put_if(
        &self,
        row: Row,
        condition: &str,
        values: impl IntoIterator<Item = (String, AttributeValue)>,
    ) -> Result<bool, Error> {
        let values: HashMap<_, _> = values.into_iter().collect();
        let request = self
            .client
            .put_item()
            .table_name(&self.table)
            .set_item(Some(row))
            .condition_expression(condition)
            .set_expression_attribute_values((!values.is_empty()).then_some(values));
        Ok(if_held("PutItem", request.send().await)?.is_some())
    }

    async fn delete(&self, pk: &str, sk: &str) -> Result<(), Error> {
        let request = self.client.delete_item().table_name(&self.table).set_key(Some(key(pk, sk)));
        request.send().await.map_err(|error| classify("DeleteItem", error))?;
        Ok(())
    }
}

/// What became of an answer to a run.
fn answered<T, E, R>(call: &'static str, result: Result<T, SdkError<E, R>>) -> Result<Answered, Error>
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let late = ["TaskTimedOut", "TaskDoesNotExist", "InvalidToken"];
    match result {
        Ok(_) => Ok(Answered::Taken),
        Err(error) if late.iter().any(|code| is_code(&error, code)) => Ok(Answered::Late),
        Err(error) => Err(classify(call, error)),
    }
}

/// The pieces in which a body is kept outside of its row; none of one that fits there.
fn pieces_of(body: &[u8]) -> std::slice::Chunks<'_, u8> {
    let outside = if body.len() > limits::DELIVERY_ROW_BODY_BYTES { body } else { &[] };
    outside.chunks(limits::DELIVERY_PIECE_BYTES)
}

/// A body if nothing of it is missing.
fn complete(kept: &Kept, body: Vec<u8>) -> Result<Vec<u8>, Error> {
    if body.len() as u64 == kept.body_bytes {
        return Ok(body);
    }
    Err(Error::Failed { call: "Query", source: "a piece of the body is missing".into() })
}

fn new_id(now_ms: u64) -> DeliveryId {
    let mut random = [0; 10];
    aws_lc_rs::rand::fill(&mut random).expect("the system has random numbers");
    DeliveryId::new(now_ms, random)
}

/// 32 hexadecimal digits that stand for a key: senders choose it, and at any length.
fn hash(key: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, key);
    digest.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tunnel_key(tunnel: &TunnelName) -> String {
    format!("t#{tunnel}")
}

fn parked_key(tunnel: &TunnelName) -> String {
    format!("p#{tunnel}")
}

fn piece_key(id: &DeliveryId) -> String {
    format!("b#{id}")
}

/// The name of the piece with this index.
fn piece_name(index: u64) -> String {
    format!("{:04}", index + 1)
}

/// The name that a row has within its partition.
fn name_of<T: FromStr>(row: &Row) -> Option<T> {
    row.get("sk")?.as_s().ok()?.parse().ok()
}

/// Those of all rows that a query finds.
async fn names<T: FromStr>(query: QueryFluentBuilder) -> Result<Vec<T>, Error> {
    let mut rows = query.into_paginator().items().send();
    let mut names = Vec::new();
    while let Some(row) = rows.next().await {
        names.extend(name_of(&row.map_err(|error| classify("Query", error))?));
    }
    Ok(names)
}

fn repetition_key(tunnel: &TunnelName, key: &str) -> String {
    format!("u#{tunnel}#{key}")
}

fn turn_key(tunnel: &TunnelName, key: &str) -> String {
    format!("o#{tunnel}#{key}")
}

fn key(pk: &str, sk: &str) -> Row {
    HashMap::from([("pk".to_owned(), text(pk)), ("sk".to_owned(), text(sk))])
}

fn item(pk: &str, sk: &str, expires_at: u64) -> Row {
    let mut row = key(pk, sk);
    row.insert("expires_at".into(), number(expires_at));
    row
}

fn row_of(kept: &Kept) -> Row {
    let mut row = item(&tunnel_key(&kept.tunnel), kept.id.as_str(), kept.expires_at);
    let head = serde_json::to_vec(&kept.head).unwrap_or_default();
    let policy = serde_json::to_string(&kept.policy).unwrap_or_default();
    for (name, value) in [
        ("owner", text(kept.owner.as_str())),
        ("state", text(kept.state.as_str())),
        ("received_ms", number(kept.received_ms)),
        ("attempt", number(kept.attempt.into())),
        ("head", AttributeValue::B(Blob::new(head))),
        ("body_bytes", number(kept.body_bytes)),
        ("pieces", number(kept.pieces.into())),
        ("policy", text(&policy)),
        ("run", text(&kept.run)),
    ] {
        row.insert(name.into(), value);
    }
    if let Some(body) = &kept.body {
        row.insert("body".into(), AttributeValue::B(body.clone()));
    }
    if let Some(key) = &kept.order_key {
        row.insert("order_key".into(), text(key));
    }
    if let Some(place) = &kept.place {
        row.insert("place".into(), text(place.as_str()));
    }
    row
}

/// Reads a row of a delivery; `None` where it is none.
fn read_row(row: &Row) -> Option<Kept> {
    let string = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
    let whole = |name: &str| row.get(name).and_then(|value| value.as_n().ok()?.parse::<u64>().ok());
    let head = row.get("head").and_then(|value| value.as_b().ok())?;
    Some(Kept {
        id: string("sk")?.parse().ok()?,
        tunnel: string("pk")?.strip_prefix("t#")?.parse().ok()?,
        owner: string("owner")?.parse().ok()?,
        state: string("state")?.parse().ok()?,
        received_ms: whole("received_ms")?,
        expires_at: whole("expires_at")?,
        attempt: u32::try_from(whole("attempt")?).ok()?,
        head: serde_json::from_slice(head.as_ref()).ok()?,
        body_bytes: whole("body_bytes")?,
        body: row.get("body").and_then(|body| body.as_b().ok()).cloned(),
        pieces: u32::try_from(whole("pieces")?).ok()?,
        policy: serde_json::from_str(string("policy")?).ok()?,
        order_key: string("order_key").cloned(),
        place: string("place").and_then(|place| place.parse().ok()),
        run: string("run")?.clone(),
        last: string("last").and_then(|last| serde_json::from_str(last).ok()),
        buried: whole("buried"),
        refused_since_ms: whole("refused_since"),
    })
}

#[cfg(test)]
mod tests {
    use proto::delivery::Mode;

    use super::*;

    #[test]
    fn a_row_gives_back_what_was_kept() {
        let kept = Kept {
            id: new_id(1_790_000_000_123),
            tunnel: "web".parse().unwrap(),
            owner: "alice".parse().unwrap(),
            state: State::Waiting,
            received_ms: 1_790_000_000_123,
            expires_at: 1_790_000_999,
            attempt: 1,
            head: Head {
                method: "POST".into(),
                target: "/a?b".into(),
                headers: [(
                    http::HeaderName::from_static("x"),
                    http::HeaderValue::from_bytes(b"\xff \"").unwrap(),
                )]
                .into_iter()
                .collect(),
            },
            body_bytes: 700_001,
            body: Some(Blob::new([0, 255])),
            pieces: 3,
            policy: DeliveryPolicy::new(Mode::Durable),
            order_key: Some(hash(b"key")),
            place: Some(new_id(1_790_000_001_000)),
            run: "run".into(),
            last: None,
            buried: None,
            refused_since_ms: None,
        };
        assert_eq!(read_row(&row_of(&kept)), Some(kept.clone()));
        assert_eq!(kept.id.received_ms(), kept.received_ms);
        let mut other = row_of(&kept);
        other.insert("pk".into(), text("p#web"));
        assert_eq!(read_row(&other), None);
    }

    #[test]
    fn a_body_is_kept_in_its_row_up_to_a_length_and_in_pieces_from_there_on() {
        let lengths = |bytes: usize| pieces_of(&vec![0; bytes]).map(<[u8]>::len).collect::<Vec<_>>();
        let (in_row, piece) = (limits::DELIVERY_ROW_BODY_BYTES, limits::DELIVERY_PIECE_BYTES);
        assert_eq!(lengths(0), [0; 0]);
        assert_eq!(lengths(in_row), [0; 0]);
        assert_eq!(lengths(in_row + 1), [in_row + 1]);
        assert_eq!(lengths(piece + 1), [piece, 1]);
    }

    #[test]
    fn a_turn_says_which_delivery_stands_where() {
        let (id, later) = (new_id(1), new_id(2));
        let mut row = item("o#web#key", id.as_str(), 9);
        let turn = Turn::read(&row).unwrap();
        assert_eq!((turn.place, turn.id, turn.token), (id.clone(), id.clone(), None));
        row.insert("sk".into(), text(later.as_str()));
        row.insert("id".into(), text(id.as_str()));
        row.insert("token".into(), text("t"));
        let turn = Turn::read(&row).unwrap();
        assert_eq!((turn.place, turn.id, turn.token), (later, id, Some("t".to_owned())));
        row.insert("id".into(), text("x"));
        assert!(Turn::read(&row).is_none());
    }

    #[test]
    fn names_sort_by_time_and_keys_are_told_apart() {
        assert!(new_id(1) < new_id(2) && new_id(255) < new_id(256));
        assert_ne!(new_id(1), new_id(1));
        assert_ne!(hash(b"a"), hash(b"b"));
        assert_eq!(hash(b"a").len(), 32);
    }

    #[test]
    fn lanes_open_one_by_one_up_to_the_most() {
        let mut open = vec![Lane::FIRST];
        for most in [2, 3, 4, 4] {
            let mut next = Vec::new();
            for lane in open {
                next.extend(lane.next(4));
            }
            assert_eq!(next.len(), most);
            let mut numbers: Vec<_> = next.iter().map(|lane| lane.lane).collect();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), most);
            open = next;
        }
        assert_eq!(Lane::NONE.next(4), Vec::new());
        assert_eq!(Lane::FIRST.next(1), vec![Lane::FIRST]);
    }
}
