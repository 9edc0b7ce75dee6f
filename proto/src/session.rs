//! The control side of one agent connection over time, without IO: `hello` and `welcome`,
//! heartbeats, the read deadline, the planned replacement and the way out of service.
//!
//! Enters: that the connection is open, control messages, the passing of time. Leaves: messages to
//! send ([`Session::poll_transmit`]), when to be woken ([`Session::poll_timeout`]) and what the owner of
//! the connection must know ([`Session::poll_event`]). Requests are not its business; the owner tells it
//! that something arrived, because any message proves the link alive.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::{
    body::Codecs,
    delivery::DeliveryPolicy,
    id::{AgentId, TunnelName},
    limits,
    message::{AgentMessage, Heartbeat, Hello, VERSION, Welcome},
};

/// Who the agent is.
#[derive(Debug, Clone)]
pub struct Config {
    /// The agent process.
    pub agent: AgentId,
    /// The program and its version.
    pub software: String,
    /// Where in the last part of the connection's life the replacement falls, uniform in `[0, 1)`,
    /// so that many agents that connected together do not come back together.
    pub jitter: f64,
}

/// What a connection shall serve.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// The tunnels.
    pub tunnels: Vec<TunnelName>,
    /// What the edge keeps for some of them, by name, where it cannot be delivered now.
    pub deliveries: BTreeMap<String, DeliveryPolicy>,
}

/// Why a connection is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Dead {
    /// `hello` was not answered.
    #[error("the edge did not answer hello in time")]
    NoWelcome,
    /// A heartbeat was not answered: the link is half open.
    #[error("the edge did not answer a heartbeat in time")]
    NoHeartbeat,
}

/// What the owner of the connection must know.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The edge answered `hello`: these tunnels are open now. After [`Session::retire`] there are
    /// none, and no new request will be dispatched here.
    Welcomed(Box<Welcome>),
    /// A new connection should take over; said once.
    Replace,
    /// The connection is dead and must be dropped; said once, and nothing follows.
    Dead(Dead),
    /// From now on this is how the link is watched.
    Rhythm(Rhythm),
}

/// How an idle link is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rhythm {
    /// By WebSocket pings, and a heartbeat now and then. They are not billed, and this edge answers them.
    Pings,
    /// By heartbeats alone: this edge does not answer pings.
    Heartbeats,
}

/// What is known of how the edge takes pings. Only a live edge can tell, so it is tried with the first heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pings {
    Untried,
    Answered,
    Silent,
}

/// One connection's control state. Created when the connection is open.
#[derive(Debug)]
pub struct Session {
    config: Config,
    opened_at: Instant,
    seq: u32,
    hello_deadline: Option<Instant>,
    heartbeat_interval: Duration,
    heartbeat_at: Option<Instant>,
    answer_deadline: Option<Instant>,
    pings: Pings,
    ping_due: bool,
    ping_deadline: Option<Instant>,
    /// When the edge last said a word: what a heartbeat may wait from.
    worded_at: Instant,
    replace_at: Option<Instant>,
    replace_planned: bool,
    dead: bool,
    service: Service,
    /// When the last `hello` is said once more so that no delivery is overlooked, see [`limits::HELLO_ONCE_MORE`].
    once_more_at: Option<Instant>,
    /// When the last `hello` is said again, and how often it was.
    again_at: Option<Instant>,
    said_again: u32,
    transmit: VecDeque<AgentMessage<'static>>,
    events: VecDeque<Event>,
}

impl Session {
    /// The connection is open at `now` and shall do `service`: `hello` is the first message to send.
    #[must_use]
    pub fn new(config: Config, service: Service, now: Instant) -> Self {
        let mut session = Self {
            config,
            opened_at: now,
            seq: 0,
            hello_deadline: None,
            heartbeat_interval: limits::HEARTBEAT_INTERVAL,
            heartbeat_at: None,
            answer_deadline: None,
            pings: Pings::Untried,
            ping_due: false,
            ping_deadline: None,
            worded_at: now,
            replace_at: None,
            replace_planned: false,
            dead: false,
            service: Service::default(),
            once_more_at: None,
            again_at: None,
            said_again: 0,
            transmit: VecDeque::new(),
            events: VecDeque::new(),
        };
        session.serve(service, now);
        session
    }

    /// From now on this connection shall do exactly `service`.
    pub fn serve(&mut self, service: Service, now: Instant) {
        self.seq += 1;
        self.hello_deadline = Some(now + limits::HEARTBEAT_ANSWER);
        self.service = service;
        (self.again_at, self.said_again, self.once_more_at) = (None, 0, None);
        self.say_hello();
    }

    fn say_hello(&mut self) {
        self.transmit.push_back(AgentMessage::Hello(Hello {
            seq: self.seq,
            version: VERSION,
            agent: self.config.agent.clone(),
            software: self.config.software.clone(),
            tunnels: self.service.tunnels.iter().map(ToString::to_string).collect(),
            codecs: Codecs::all(),
            websockets: true,
            deliveries: {
                let said = |(name, policy): (&String, &DeliveryPolicy)| (name.clone(), policy.clone().into());
                self.service.deliveries.iter().map(said).collect()
            },
        }));
    }

    /// Takes the connection out of service: it serves no tunnel any more, but stays alive for what is
    /// in flight. [`Event::Replace`] will not be said again.
    pub fn retire(&mut self, now: Instant) {
        self.replace_at = None;
        self.replace_planned = true;
        self.serve(Service::default(), now);
    }

    /// Any message arrived: the link is alive, and the edge above it.
    pub fn handle_alive(&mut self, now: Instant) {
        self.answer_deadline = None;
        self.worded_at = now;
        self.handle_ping(now);
    }

    /// A pong arrived.
    pub fn handle_pong(&mut self, now: Instant) {
        if self.ping_deadline.take().is_some() && self.pings == Pings::Untried {
            self.pings = Pings::Answered;
            self.events.push_back(Event::Rhythm(Rhythm::Pings));
        }
        self.handle_ping(now);
    }

    /// A ping arrived: the link is alive. What is above it may be dead, so it answers no heartbeat.
    pub fn handle_ping(&mut self, now: Instant) {
        if self.heartbeat_at.is_some() {
            self.heartbeat_at = Some(now + self.heartbeat_interval);
        }
    }

    /// The edge could not take one of the last messages, and does not say which. If it may have been `hello`, it is said
    /// again in a moment, a few times; an earlier one than the last never is.
    pub fn handle_refused(&mut self, now: Instant) {
        self.handle_alive(now);
        if self.hello_deadline.is_some() && self.again_at.is_none() && self.said_again < limits::REFUSED_TRIES
        {
            self.again_at = Some(now + limits::REFUSED_RETRY * 2_u32.pow(self.said_again));
            self.said_again += 1;
        }
    }

    /// The edge answered `hello`. An answer to an earlier `hello` than the last is dropped.
    pub fn handle_welcome(&mut self, welcome: Welcome, now: Instant) {
        self.handle_alive(now);
        if welcome.seq != self.seq || self.hello_deadline.take().is_none() {
            return;
        }
        self.again_at = None;
        self.heartbeat_interval = Duration::from_millis(welcome.heartbeat_ms)
            .min(limits::CONNECTION_IDLE - limits::HEARTBEAT_ANSWER);
        self.heartbeat_at = Some(now + self.heartbeat_interval);
        if !self.replace_planned {
            self.replace_planned = true;
            self.replace_at = Some(self.opened_at + replace_after(welcome.lifetime_ms, self.config.jitter));
        }
        if welcome.deliveries && !self.service.deliveries.is_empty() {
            self.once_more_at = Some(now + limits::HELLO_ONCE_MORE);
        }
        self.events.push_back(Event::Welcomed(Box::new(welcome)));
    }

    /// The edge asked for the connection to be replaced.
    pub fn handle_drain(&mut self, now: Instant) {
        self.handle_alive(now);
        if self.replace_at.is_some() {
            self.replace_at = Some(now);
        }
    }

    /// Time has passed. While the connection is `busy`, only heartbeats will do.
    pub fn handle_timeout(&mut self, now: Instant, busy: bool) {
        if self.dead {
            return;
        }
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let dead = if due(self.hello_deadline) {
            Some(Dead::NoWelcome)
        } else if due(self.answer_deadline) {
            Some(Dead::NoHeartbeat)
        } else {
            None
        };
        if let Some(dead) = dead {
            self.dead = true;
            self.transmit.clear();
            self.ping_due = false;
            self.events.push_back(Event::Dead(dead));
            return;
        }
        if due(self.again_at) {
            self.again_at = None;
            self.say_hello();
        }
        if due(self.once_more_at) {
            self.once_more_at = None;
            self.say_hello();
        }
        if due(self.replace_at) {
            self.replace_at = None;
            self.events.push_back(Event::Replace);
        }
        if due(self.ping_deadline) {
            self.ping_deadline = None;
            // Perhaps the link is dead, perhaps pings are no longer answered: a heartbeat will tell.
            if self.pings == Pings::Answered {
                self.beat(now);
            }
            self.pings = Pings::Silent;
            self.events.push_back(Event::Rhythm(Rhythm::Heartbeats));
        }
        if due(self.heartbeat_at) {
            self.heartbeat_at = Some(now + self.heartbeat_interval);
            let is_rare = now < self.worded_at + self.heartbeat_interval * limits::PINGS_A_HEARTBEAT;
            if self.pings != Pings::Silent {
                self.ping_due = true;
                self.ping_deadline.get_or_insert(now + limits::PING_ANSWER.min(self.heartbeat_interval));
            }
            if self.pings != Pings::Answered || busy || !is_rare {
                self.beat(now);
            }
        }
    }

    fn beat(&mut self, now: Instant) {
        if self.answer_deadline.is_none() {
            self.answer_deadline = Some(now + limits::HEARTBEAT_ANSWER);
        }
        self.transmit.push_back(AgentMessage::Heartbeat(Heartbeat { seq: self.seq }));
    }

    /// Whether a ping is to be sent now; asked once for each.
    pub fn poll_ping(&mut self) -> bool {
        std::mem::take(&mut self.ping_due)
    }

    /// The next message to send, if any.
    pub fn poll_transmit(&mut self) -> Option<AgentMessage<'static>> {
        self.transmit.pop_front()
    }

    /// The next thing to know, if any.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Session::handle_timeout`] wants to be called; `None` once the connection is dead.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.dead {
            return None;
        }
        [
            self.hello_deadline,
            self.again_at,
            self.once_more_at,
            self.answer_deadline,
            self.ping_deadline,
            self.heartbeat_at,
            self.replace_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

/// How long a connection that may live for `lifetime_ms` is used before it is replaced: an eighth of its
/// life (15 minutes of two hours, the longest response) is left for what is in flight, and the sixteenth
/// before that spreads the replacements.
fn replace_after(lifetime_ms: u64, jitter: f64) -> Duration {
    let sixteenth = Duration::from_millis(lifetime_ms) / 16;
    sixteenth * 13 + sixteenth.mul_f64(jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::delivery::Mode;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn epoch() -> Instant {
        Instant::now()
    }

    fn config() -> Config {
        Config { agent: "a".parse().unwrap(), software: "test".into(), jitter: 0.5 }
    }

    fn service() -> Service {
        Service { tunnels: vec!["web".parse().unwrap()], ..Service::default() }
    }

    fn welcome(seq: u32) -> Welcome {
        Welcome {
            seq,
            version: VERSION,
            connection_id: "c=".parse().unwrap(),
            tunnels: Vec::new(),
            refused: Vec::new(),
            heartbeat_ms: 25_000,
            lifetime_ms: 7_200_000,
            reply_timeout_ms: None,
            codecs: Codecs::default(),
            websockets: false,
            deliveries: true,
            policies: Vec::new(),
            owner: None,
            may_open: Vec::new(),
            identity_ms: None,
        }
    }

    /// A session, the time it lives in and an edge that answers until it is told to be silent.
    struct Pair {
        session: Session,
        now: Instant,
        silent: bool,
        /// Whether pings are answered.
        pongs: bool,
        busy: bool,
        pings: usize,
        sent: Vec<AgentMessage<'static>>,
        events: Vec<Event>,
    }

    impl Pair {
        fn new() -> Self {
            let now = epoch();
            let mut pair = Self {
                session: Session::new(config(), service(), now),
                now,
                silent: false,
                pongs: false,
                busy: false,
                pings: 0,
                sent: Vec::new(),
                events: Vec::new(),
            };
            pair.settle();
            pair
        }

        fn settle(&mut self) {
            if self.session.poll_ping() {
                self.pings += 1;
                if self.pongs {
                    self.session.handle_pong(self.now);
                }
            }
            while let Some(message) = self.session.poll_transmit() {
                if !self.silent {
                    match &message {
                        AgentMessage::Hello(hello) => {
                            self.session.handle_welcome(welcome(hello.seq), self.now)
                        }
                        _ => self.session.handle_alive(self.now),
                    }
                }
                self.sent.push(message);
            }
            self.events.extend(std::iter::from_fn(|| self.session.poll_event()));
        }

        /// Lets `duration` pass, stopping wherever the session wants to be woken.
        fn drive(&mut self, duration: Duration) {
            let end = self.now + duration;
            while let Some(at) = self.session.poll_timeout().filter(|&at| at <= end) {
                self.now = self.now.max(at);
                self.session.handle_timeout(self.now, self.busy);
                self.settle();
            }
            self.now = end;
        }

        fn heartbeats(&self) -> usize {
            self.sent.iter().filter(|message| matches!(message, AgentMessage::Heartbeat(_))).count()
        }
    }

    #[test]
    fn says_hello_then_heartbeats_then_asks_once_for_a_replacement() {
        let mut pair = Pair::new();
        assert!(matches!(&pair.sent[0], AgentMessage::Hello(hello) if hello.tunnels == ["web"]));
        assert!(matches!(pair.events[..], [Event::Welcomed(_)]));
        pair.drive(Duration::from_secs(100));
        assert_eq!(pair.heartbeats(), 4);
        pair.drive(Duration::from_secs(7_000));
        assert_eq!(pair.events.iter().filter(|event| **event == Event::Replace).count(), 1);
    }

    #[test]
    fn the_replacement_leaves_time_for_the_longest_response() {
        for jitter in [0.0, 0.5, 0.999] {
            let after = replace_after(7_200_000, jitter);
            assert!(after + limits::REPLACE_AHEAD <= limits::CONNECTION_LIFETIME, "{after:?}");
            assert!(after >= limits::CONNECTION_LIFETIME / 4 * 3);
        }
    }

    #[test]
    fn a_silent_edge_is_noticed_within_40_seconds() {
        let mut pair = Pair::new();
        pair.silent = true;
        pair.drive(Duration::from_secs(40));
        assert_eq!(pair.events.last(), Some(&Event::Dead(Dead::NoHeartbeat)));
        assert_eq!(pair.session.poll_timeout(), None);
        pair.drive(Duration::from_secs(1_000));
        assert_eq!(pair.events.iter().filter(|event| matches!(event, Event::Dead(_))).count(), 1);
    }

    #[test]
    fn where_pings_are_answered_heartbeats_are_rare_while_nothing_goes_on() {
        let mut pair = Pair::new();
        pair.pongs = true;
        pair.drive(Duration::from_secs(25));
        assert_eq!((pair.heartbeats(), pair.pings), (1, 1), "the first ones try it");
        assert!(pair.events.contains(&Event::Rhythm(Rhythm::Pings)));
        pair.drive(Duration::from_secs(3_600));
        assert_eq!((pair.heartbeats(), pair.pings), (13, 145));
        pair.busy = true;
        pair.drive(Duration::from_secs(100));
        assert_eq!((pair.heartbeats(), pair.pings), (17, 149));
    }

    #[test]
    fn where_pings_are_not_answered_everything_is_as_it_would_be_without() {
        let mut pair = Pair::new();
        pair.drive(Duration::from_secs(1_000));
        assert_eq!((pair.heartbeats(), pair.pings), (40, 1));
        assert_eq!(pair.events.last(), Some(&Event::Rhythm(Rhythm::Heartbeats)));
    }

    #[test]
    fn death_is_noticed_within_40_seconds_at_every_rhythm() {
        for (pongs, busy, before) in
            [(true, false, 30), (true, false, 299), (true, false, 330), (true, true, 90), (false, false, 330)]
        {
            for only_pings in [false, true] {
                let mut pair = Pair::new();
                (pair.pongs, pair.busy) = (pongs, busy);
                pair.drive(Duration::from_secs(before));
                pair.silent = true;
                // A way that answers pings and is dead above: heartbeats tell, where there are any.
                pair.pongs = only_pings && pongs;
                let within = if pair.pongs && !busy { 12 * 25 + 10 } else { 40 };
                pair.drive(Duration::from_secs(within));
                let dead = Event::Dead(Dead::NoHeartbeat);
                assert_eq!(pair.events.last(), Some(&dead), "{pongs} {busy} {before} {only_pings}");
            }
        }
    }

    #[test]
    fn pings_that_are_no_longer_answered_are_no_longer_sent() {
        let mut pair = Pair::new();
        pair.pongs = true;
        pair.drive(Duration::from_secs(1_000));
        pair.pongs = false;
        let before = pair.heartbeats();
        pair.drive(Duration::from_secs(1_000));
        assert!(pair.heartbeats() - before >= 39, "{}", pair.heartbeats() - before);
        assert!(!pair.events.iter().any(|event| matches!(event, Event::Dead(_))));
        assert_eq!(pair.events.last(), Some(&Event::Rhythm(Rhythm::Heartbeats)));
    }

    #[test]
    fn an_unanswered_hello_is_noticed() {
        let now = epoch();
        let mut session = Session::new(config(), service(), now);
        assert_eq!(session.poll_timeout(), Some(now + limits::HEARTBEAT_ANSWER));
        session.handle_timeout(now + limits::HEARTBEAT_ANSWER, false);
        assert_eq!(session.poll_event(), Some(Event::Dead(Dead::NoWelcome)));
    }

    #[test]
    fn a_hello_that_was_refused_is_said_again_a_few_times_while_it_is_the_last() {
        let now = epoch();
        let mut session = Session::new(config(), service(), now);
        let hellos = |session: &mut Session| {
            let sent = std::iter::from_fn(|| session.poll_transmit());
            sent.filter(|message| matches!(message, AgentMessage::Hello(_))).collect::<Vec<_>>()
        };
        let first = hellos(&mut session);
        session.handle_refused(now);
        session.handle_refused(now);
        session.handle_timeout(now, false);
        assert_eq!(hellos(&mut session).len(), 0, "not at once");
        let later = now + limits::REFUSED_RETRY;
        assert_eq!(session.poll_timeout(), Some(later));
        session.handle_timeout(later, false);
        assert_eq!(hellos(&mut session), first);
        let mut said = 1;
        for _ in 0..10 {
            session.handle_refused(later);
            session.handle_timeout(later + limits::REFUSED_RETRY * 4, false);
            said += u32::from(hellos(&mut session) == first);
        }
        assert_eq!(said, limits::REFUSED_TRIES);
        // Another list has been said since.
        session.serve(Service::default(), later);
        assert_eq!(hellos(&mut session).len(), 1);
        session.handle_refused(later);
        session.handle_welcome(welcome(2), later);
        session.handle_timeout(later + limits::REFUSED_RETRY, false);
        assert_eq!(hellos(&mut session).len(), 0, "it was answered");
    }

    #[test]
    fn whoever_has_deliveries_kept_says_hello_once_more_and_then_no_more() {
        let keeps = || Service {
            deliveries: BTreeMap::from([("web".to_owned(), DeliveryPolicy::new(Mode::Auto))]),
            ..service()
        };
        let hellos =
            |pair: &Pair| pair.sent.iter().filter(|said| matches!(said, AgentMessage::Hello(_))).count();
        let mut pair = Pair::new();
        pair.drive(limits::HELLO_ONCE_MORE * 3);
        assert_eq!(hellos(&pair), 1, "nothing is kept for it");
        pair.session.serve(keeps(), pair.now);
        pair.settle();
        pair.drive(limits::HELLO_ONCE_MORE - Duration::from_millis(1));
        assert_eq!(hellos(&pair), 2);
        pair.drive(limits::HELLO_ONCE_MORE * 10);
        assert_eq!(hellos(&pair), 3);
        let welcomes = pair.events.iter().filter(|event| matches!(event, Event::Welcomed(_))).count();
        assert_eq!(welcomes, 2, "the third is the second's");
        // What is said since stands in its place.
        pair.session.serve(keeps(), pair.now);
        pair.session.retire(pair.now);
        pair.settle();
        pair.drive(limits::HELLO_ONCE_MORE * 10);
        assert!(matches!(pair.sent.iter().rfind(|said| matches!(said, AgentMessage::Hello(_))),
            Some(AgentMessage::Hello(hello)) if hello.tunnels.is_empty()));
    }

    #[test]
    fn retiring_serves_nothing_and_asks_for_no_replacement() {
        let mut pair = Pair::new();
        pair.session.retire(pair.now);
        pair.settle();
        assert!(matches!(pair.sent.last(), Some(AgentMessage::Hello(hello)) if hello.tunnels.is_empty()));
        pair.drive(Duration::from_secs(7_200));
        assert!(!pair.events.contains(&Event::Replace));
    }

    #[test]
    fn drain_asks_for_a_replacement_at_once_and_once() {
        let mut pair = Pair::new();
        pair.session.handle_drain(pair.now);
        pair.session.handle_drain(pair.now);
        pair.drive(Duration::from_secs(7_200));
        assert_eq!(pair.events.iter().filter(|event| **event == Event::Replace).count(), 1);
    }

    #[test]
    fn a_late_welcome_for_an_earlier_hello_is_dropped() {
        let now = epoch();
        let mut session = Session::new(config(), service(), now);
        session.serve(Service::default(), now);
        session.handle_welcome(welcome(1), now);
        assert_eq!(session.poll_event(), None);
        session.handle_welcome(welcome(2), now);
        assert!(matches!(session.poll_event(), Some(Event::Welcomed(_))));
    }

    proptest! {
        /// Whatever happens in whatever order, nothing is sent or said after death.
        #[test]
        fn nothing_follows_death(steps in proptest::collection::vec((0u8..8, 0u64..60_000), 1..60)) {
            let mut now = epoch();
            let mut session = Session::new(config(), service(), now);
            let mut dead = false;
            for (step, ms) in steps {
                now += Duration::from_millis(ms);
                match step {
                    0 => session.handle_alive(now),
                    1 => session.handle_welcome(welcome(session.seq), now),
                    2 => session.handle_drain(now),
                    3 => session.handle_pong(now),
                    4 => session.handle_ping(now),
                    _ => session.handle_timeout(now, step == 5),
                }
                while let Some(event) = session.poll_event() {
                    prop_assert!(!dead || !matches!(event, Event::Dead(_)), "{event:?} after death");
                    dead |= matches!(event, Event::Dead(_));
                }
                let sent = std::iter::from_fn(|| session.poll_transmit()).count();
                prop_assert!(!(dead && (sent > 0 || session.poll_ping())));
            }
        }
    }
}
