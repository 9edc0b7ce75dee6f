//! What is known of one connection from outside its loop: what it serves, and what is due.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proto::{
    delivery::PolicyNotice,
    id::TunnelName,
    message::{Refusal, Welcome},
    session::Rhythm,
};
use tokio::{sync::mpsc, time::Instant};

use super::{connection::Command, refusal::is_passing};
use crate::{
    identity::credential::Token,
    random,
    report::status::{ConnectionState, ConnectionStatus, WatchedBy},
};

/// How long before the end of its identity a connection looks for another token, at most.
const RENEW_AHEAD: Duration = Duration::from_secs(60 * 60);

/// How long after a `welcome` that left some tunnels unopened `hello` is said again, at least.
const GREET_AGAIN: Duration = Duration::from_secs(2);

/// A connection as it is known here.
pub(super) struct Known {
    pub(super) commands: mpsc::Sender<Command>,
    since: Instant,
    /// Where it leads.
    url: String,
    connection_id: Option<String>,
    pub(super) open: BTreeSet<TunnelName>,
    /// What the edge did not open on this connection, and why.
    pub(super) refused: BTreeMap<TunnelName, Refusal>,
    pub(super) welcomed: bool,
    /// How the link is watched while nothing goes on, once that is known.
    pub(super) rhythm: Option<Rhythm>,
    /// Whether the edge keeps deliveries.
    pub(super) keeps_deliveries: bool,
    /// What it says about policies that do not hold as they were said.
    pub(super) policies: Vec<PolicyNotice>,
    pub(super) retiring: bool,
    pub(super) replace: bool,
    pub(super) greet_at: Option<Instant>,
    pub(super) greetings: u32,
    /// What it was opened with.
    pub(super) token: Token,
    /// When the identity behind it ends.
    pub(super) identity_ends: Option<Instant>,
    /// When to look for another token before that.
    pub(super) renew_at: Option<Instant>,
}

impl Known {
    /// One that has just been opened to `url` with `token`.
    pub(super) const fn new(
        commands: mpsc::Sender<Command>,
        since: Instant,
        url: String,
        token: Token,
    ) -> Self {
        Self {
            commands,
            since,
            url,
            connection_id: None,
            open: BTreeSet::new(),
            refused: BTreeMap::new(),
            welcomed: false,
            rhythm: None,
            keeps_deliveries: false,
            policies: Vec::new(),
            retiring: false,
            replace: false,
            greet_at: None,
            greetings: 0,
            token,
            identity_ends: None,
            renew_at: None,
        }
    }

    /// Takes it out of service; it ends once what is in flight is done and `quiet` has passed.
    pub(super) fn retire(&mut self, quiet: Duration) {
        self.retiring = true;
        self.greet_at = None;
        self.renew_at = None;
        // Its places are more than a connection is ever sent; one that has ended takes none.
        let _ = self.commands.try_send(Command::Retire { quiet });
    }

    /// Whether new requests may come through it.
    pub(super) const fn serves(&self) -> bool {
        self.welcomed && !self.retiring
    }

    const fn state(&self) -> ConnectionState {
        match self {
            Self { retiring: true, .. } => ConnectionState::Retiring,
            Self { welcomed: false, .. } => ConnectionState::Greeting,
            Self { replace: true, .. } => ConnectionState::BeingReplaced,
            Self { .. } => ConnectionState::Serving,
        }
    }

    /// Notes what the edge has answered.
    pub(super) fn take(&mut self, welcome: &Welcome, now: Instant) {
        self.open = welcome.tunnels.iter().map(|tunnel| tunnel.name.clone()).collect();
        self.refused = welcome
            .refused
            .iter()
            .filter_map(|refused| Some((refused.name.parse().ok()?, refused.reason)))
            .collect();
        self.keeps_deliveries = welcome.deliveries;
        self.policies.clone_from(&welcome.policies);
        self.connection_id = Some(welcome.connection_id.to_string());
        let again = welcome.refused.iter().any(|refused| is_passing(refused.reason));
        self.greet_at = again.then(|| {
            let factor = 1u32 << self.greetings.min(4);
            now + GREET_AGAIN.mul_f64(f64::from(factor) * (1.0 + random::fraction()))
        });
        self.greetings = if again { self.greetings + 1 } else { 0 };
        if let (Some(left_ms), None) = (welcome.identity_ms, self.identity_ends) {
            let left = Duration::from_millis(left_ms);
            // An end beyond what the clock can count is none.
            self.identity_ends = now.checked_add(left);
            self.renew_at = self.identity_ends.map(|end| end - (left / 8).min(RENEW_AHEAD));
        }
    }

    /// What is said of it.
    pub(super) fn status(&self, now: Instant) -> ConnectionStatus {
        ConnectionStatus {
            url: Some(self.url.clone()),
            connection_id: self.connection_id.clone(),
            state: self.state(),
            age_secs: now.duration_since(self.since).as_secs(),
            tunnels_open: self.open.len(),
            watched_by: self.rhythm.map(|rhythm| match rhythm {
                Rhythm::Pings => WatchedBy::Pings,
                Rhythm::Heartbeats => WatchedBy::Heartbeats,
            }),
        }
    }
}
