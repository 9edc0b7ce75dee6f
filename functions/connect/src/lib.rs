//! Lambda `connect`: opens an agent's connection and registers the tunnels it serves.
//!
//! It handles two routes. `$connect` checks that the authorizer has spoken, and that the identity has not been
//! revoked: nothing can be posted to a connection before that route has returned, so no tunnel is registered
//! yet. `hello` is the agent's first message, and later ones change what it serves; the answer, `welcome`,
//! goes back as the route's response.
//!
//! Whoever revokes an identity puts it on the list and then closes its connections. On both routes a connection is
//! entered among its owner's and then the list is read, so that at least one of the two sees the other. One that never
//! says `hello`, or is refused by a limit, is found as well.
//!
//! The first tunnel of an agent that wants `relay` wakes it. Deliveries that wait for a tunnel go on once it is open, one at
//! first.
//!
//! Permissions it needs: read, query, write and delete rows of the connections table, close connections; query and delete
//! parked rows of the table of deliveries and answer their runs; where there is a
//! `relay`, register how many of it run.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::Duration,
};

use edge::{
    Error,
    admission::Admission,
    aws::Aws,
    config::{ConfigError, Env, env},
    deliveries::{Deliveries, Lane, Terms},
    event::{AgentEvent, Authorized},
    fleet::Fleet,
    function::Answer,
    registry::Connection,
    unix_now, unix_now_ms,
};
use proto::{
    body::Codecs,
    delivery::{Holds, PolicyNotice, SaidPolicy},
    id::{ConnectionId, IdError, Owner, TunnelName},
    limits,
    message::{AgentMessage, EdgeMessage, Hello, OpenTunnel, Refusal, RefusedTunnel, VERSION, Welcome},
};

/// Everything a connection needs.
#[derive(Debug)]
pub struct Connect {
    admission: Admission,
    public_url: String,
    lifetime: Duration,
    heartbeat: Duration,
    reply_timeout: Duration,
    websockets: bool,
    fleet: Option<Fleet>,
    deliveries: Option<Deliveries>,
}

/// Runs the function until Lambda ends its process.
#[must_use]
pub fn run() -> ExitCode {
    edge::function::run(Connect::from_env, |event, connect| async move { handle(event, &connect).await })
}

impl Connect {
    /// Reads the environment and makes the clients.
    ///
    /// # Errors
    ///
    /// When a variable is missing or wrong.
    pub fn from_env(env: &Env<'_>) -> Result<Self, ConfigError> {
        let aws = Aws::from_env(env)?;
        Ok(Self {
            admission: Admission::from_env(&aws, env)?,
            public_url: env.required(env::PUBLIC_URL)?,
            lifetime: env.connection_lifetime()?,
            heartbeat: env.heartbeat()?,
            reply_timeout: env.secs(
                env::REPLY_TIMEOUT_SECS,
                limits::REPLY_TIMEOUT,
                limits::REPLY_TIMEOUT_MAX,
            )?,
            websockets: env.flag(env::WEBSOCKETS)?,
            fleet: Fleet::from_env(&aws, env)?,
            deliveries: Deliveries::from_env(&aws, env),
        })
    }

    /// What every welcome says. It opens nothing.
    fn welcome(&self, seq: u32, connection_id: ConnectionId, refused: Vec<RefusedTunnel>) -> Welcome {
        Welcome {
            seq,
            version: VERSION,
            connection_id,
            tunnels: Vec::new(),
            refused,
            heartbeat_ms: millis(self.heartbeat),
            lifetime_ms: millis(self.lifetime),
            reply_timeout_ms: Some(millis(self.reply_timeout)),
            codecs: Codecs::default(),
            websockets: self.websockets,
            deliveries: self.deliveries.is_some(),
            policies: Vec::new(),
            owner: None,
            may_open: Vec::new(),
            identity_ms: None,
        }
    }
}

/// Handles one event of either route.
///
/// # Errors
///
/// When the table cannot be used; the agent tries again.
pub async fn handle(mut event: AgentEvent, connect: &Connect) -> Result<Answer, Error> {
    let body = event.body.take();
    let context = event.request_context;
    let Some(authorized) = context.authorizer else {
        tracing::error!(connection_id = %context.connection_id, "connection has no identity; is the authorizer attached?");
        return Ok(Answer::status(403));
    };
    let now = unix_now();
    let connected_at = if context.connected_at == 0 { now } else { context.connected_at / 1000 };
    let by_lifetime = connected_at + connect.lifetime.as_secs().max(1);
    // An identity that ends takes its connections out of service.
    let expires_at = authorized.ends_at().map_or(by_lifetime, |end| end.min(by_lifetime));
    if context.route_key == "$connect" {
        let Admission { registry, revocations, .. } = &connect.admission;
        let (id, owner, token_id) =
            (&context.connection_id, &authorized.owner, authorized.token_id.as_deref());
        registry.let_in(id, owner, token_id, expires_at).await?;
        if revocations.holds(owner, token_id).await? {
            tracing::warn!(connection_id = %id, %owner, "agent connection refused: the identity is revoked");
            registry.forget(id, Some(owner)).await?;
            return Ok(Answer::status(403));
        }
        return Ok(Answer::status(200));
    }
    let hello = match AgentMessage::decode(&body.unwrap_or_default()) {
        Ok(AgentMessage::Hello(hello)) if hello.version == VERSION => hello,
        Ok(AgentMessage::Hello(hello)) => {
            tracing::warn!(connection_id = %context.connection_id, version = hello.version, "agent speaks another version");
            // In the words of this version: whoever changes it leaves `welcome` readable.
            let refused = hello.tunnels.iter().take(limits::TUNNELS_PER_CONNECTION);
            let refused = refused.map(|name| refusal(name, Refusal::OtherVersion)).collect();
            let nothing = connect.welcome(hello.seq, context.connection_id, refused);
            return Ok(Answer::message(EdgeMessage::Welcome(nothing).encode()));
        }
        Ok(_) | Err(_) => {
            tracing::warn!(connection_id = %context.connection_id, "hello was malformed");
            return Ok(Answer::status(400));
        }
    };
    let connection = Connection {
        id: context.connection_id,
        owner: authorized.owner.clone(),
        agent: hello.agent.clone(),
        token_id: authorized.token_id.clone(),
        connected_at,
        expires_at,
        websockets: hello.websockets,
    };
    let since_ms = connect.admission.registry.enter(&connection, unix_now_ms()).await?;
    let is_revoked =
        connect.admission.revocations.holds(&connection.owner, connection.token_id.as_deref()).await?;
    if is_revoked || authorized.is_over(now) {
        tracing::warn!(connection_id = %connection.id, owner = %connection.owner, is_revoked, "agent connection closed: its identity is over");
        connect.admission.cut(&connection.id, &connection.owner).await?;
        return Ok(Answer::status(403));
    }
    let (allowed, mut refused) = sort_names(&hello, &authorized);
    let (terms, policies) = match connect.deliveries {
        Some(_) => terms(&hello, &allowed, &connection.owner),
        None => Default::default(),
    };
    let outcomes = connect.admission.registry.serve(&connection, &allowed, &terms, since_ms, now).await?;
    let mut tunnels = Vec::with_capacity(outcomes.len());
    let mut wakes = Vec::new();
    for (name, outcome) in outcomes {
        match outcome {
            Ok(opened) => {
                if opened.wakes {
                    wakes.push(name.clone());
                }
                tunnels.push(OpenTunnel { url: connect.public_url.replace("{name}", name.as_str()), name })
            }
            Err(reason) => refused.push(RefusedTunnel { name: name.to_string(), reason }),
        }
    }
    if let Some(fleet) = &connect.fleet
        && !tunnels.is_empty()
        && fleet.is_for(hello.websockets)
    {
        match fleet.wake(now).await {
            Ok(true) => tracing::info!("relay was woken"),
            Ok(false) => {}
            // Its tunnels are open nevertheless; the next sweep wakes it.
            Err(error) => tracing::warn!(%error, "relay was not woken"),
        }
    }
    if let Some(deliveries) = &connect.deliveries {
        for name in &wakes {
            // One of them, whose end wakes the next: an app that has slept is not flooded.
            match deliveries.wake(name, &[Lane::FIRST]).await {
                Ok(0) => {}
                Ok(_) => tracing::info!(tunnel_id = %name, "deliveries go on"),
                // The next `hello` or sweep wakes them.
                Err(error) => tracing::warn!(tunnel_id = %name, %error, "deliveries were not woken"),
            }
        }
    }
    tracing::info!(
        connection_id = %connection.id, owner = %connection.owner, agent = %connection.agent,
        tunnels = tunnels.len(), refused = refused.len(), "agent registered"
    );
    let welcome = EdgeMessage::Welcome(Welcome {
        tunnels,
        policies,
        codecs: Codecs::all(),
        may_open: authorized.tunnels.0.iter().map(ToString::to_string).collect(),
        identity_ms: authorized.left_ms(unix_now_ms()),
        owner: Some(authorized.owner),
        ..connect.welcome(hello.seq, connection.id, refused)
    });
    Ok(Answer::message(welcome.encode()))
}

/// What the owner wants of those tunnels that keep requests, and what of that does not hold as it was said. A policy that is
/// not understood is none: the tunnel is live.
fn terms(
    hello: &Hello,
    allowed: &BTreeSet<TunnelName>,
    owner: &Owner,
) -> (BTreeMap<TunnelName, Terms>, Vec<PolicyNotice>) {
    let mut terms = BTreeMap::new();
    let mut notices = Vec::new();
    for name in allowed {
        let Some(said) = hello.deliveries.get(name.as_str()) else { continue };
        let mut notice = |holds, why: &str| {
            tracing::warn!(tunnel_id = %name, ?holds, "the tunnel's policy of deliveries does not hold as it was said");
            notices.push(PolicyNotice::new(name.as_str(), holds, why));
        };
        match said {
            SaidPolicy::Unreadable(why) => notice(Holds::Live, why),
            SaidPolicy::Policy(said) => match said.clone().clamped() {
                Ok(policy) => {
                    if let Err(error) = said.check() {
                        notice(Holds::Bounds, &error.to_string());
                    }
                    terms.insert(name.clone(), Terms { owner: owner.clone(), policy });
                }
                Err(error) => notice(Holds::Live, &error.to_string()),
            },
        }
    }
    (terms, notices)
}

/// The name as the agent gave it, but not at any length.
fn refusal(name: &str, reason: Refusal) -> RefusedTunnel {
    RefusedTunnel { name: name.chars().take(64).collect(), reason }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Sorts the names of a `hello` into those to be registered and those refused without asking anybody.
fn sort_names(hello: &Hello, authorized: &Authorized) -> (BTreeSet<TunnelName>, Vec<RefusedTunnel>) {
    let mut allowed = BTreeSet::new();
    let mut refused = Vec::new();
    for name in &hello.tunnels {
        let reason = match name.parse::<TunnelName>() {
            Err(IdError::Reserved(_)) => Refusal::ReservedName,
            Err(_) => Refusal::InvalidName,
            Ok(parsed) if !authorized.tunnels.matches(&parsed) => Refusal::NotAllowed,
            Ok(parsed) if allowed.len() == limits::TUNNELS_PER_CONNECTION && !allowed.contains(&parsed) => {
                Refusal::TooMany
            }
            Ok(parsed) => {
                allowed.insert(parsed);
                continue;
            }
        };
        // A hostile list must not make a long answer.
        if refused.len() < limits::TUNNELS_PER_CONNECTION {
            refused.push(refusal(name, reason));
        }
    }
    (allowed, refused)
}

#[cfg(test)]
mod tests {
    use proto::delivery::{DeliveryPolicy, Mode};

    use super::*;

    fn hello(tunnels: &[&str]) -> Hello {
        Hello {
            seq: 1,
            version: VERSION,
            agent: "a".parse().unwrap(),
            software: String::new(),
            tunnels: tunnels.iter().map(|&name| name.to_owned()).collect(),
            codecs: Codecs::default(),
            websockets: false,
            deliveries: BTreeMap::new(),
        }
    }

    fn authorized(patterns: &str) -> Authorized {
        Authorized {
            owner: "alice".parse().unwrap(),
            tunnels: patterns.parse().unwrap(),
            token_expires: None,
            token_id: None,
        }
    }

    #[test]
    fn every_name_is_allowed_or_refused_for_its_own_reason() {
        let (allowed, refused) = sort_names(
            &hello(&["web", "pr-1", "web", "other", "www", "A", "", "pr-"]),
            &authorized("web,pr-*"),
        );
        assert_eq!(allowed.iter().map(TunnelName::as_str).collect::<Vec<_>>(), ["pr-1", "web"]);
        let reasons: Vec<_> = refused.iter().map(|refused| (refused.name.as_str(), refused.reason)).collect();
        assert_eq!(
            reasons,
            [
                ("other", Refusal::NotAllowed),
                ("www", Refusal::ReservedName),
                ("A", Refusal::InvalidName),
                ("", Refusal::InvalidName),
                ("pr-", Refusal::InvalidName),
            ]
        );
    }

    #[test]
    fn policies_are_kept_within_bounds_for_tunnels_that_are_allowed() {
        let mut hello = hello(&["web", "pr-1", "pr-2", "pr-3", "pr-4"]);
        let mut wild = DeliveryPolicy::new(Mode::Durable);
        wild.attempts = 1_000;
        let mut broken = DeliveryPolicy::new(Mode::Auto);
        broken.paths = vec!["x".into()];
        hello.deliveries = [
            ("web".into(), wild.into()),
            ("pr-1".into(), broken.into()),
            ("pr-2".into(), SaidPolicy::Unreadable("unknown variant `twice`".into())),
            ("pr-3".into(), DeliveryPolicy::new(Mode::Auto).into()),
            ("foreign".into(), DeliveryPolicy::new(Mode::Auto).into()),
        ]
        .into_iter()
        .collect();
        let (allowed, _) = sort_names(&hello, &authorized("*"));
        let (terms, notices) = terms(&hello, &allowed, &"alice".parse().unwrap());
        let kept: Vec<_> = terms.iter().map(|(name, terms)| (name.as_str(), terms.policy.attempts)).collect();
        assert_eq!(kept, [("pr-3", 10), ("web", 50)]);
        // What does not hold as it was said is told, and why.
        let told: Vec<_> = notices.iter().map(|notice| (&*notice.name, notice.holds, &*notice.why)).collect();
        assert_eq!(
            told,
            [
                ("pr-1", Holds::Live, "paths: \"x\" is not a path that begins with / and has no query"),
                ("pr-2", Holds::Live, "unknown variant `twice`"),
                ("web", Holds::Bounds, "attempts must be from 1 to 50, not 1000"),
            ]
        );
    }

    #[test]
    fn a_connection_serves_as_many_tunnels_as_it_may_and_not_one_more() {
        let names: Vec<String> = (0..=limits::TUNNELS_PER_CONNECTION).map(|n| format!("t{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (allowed, refused) =
            sort_names(&hello(&names[..limits::TUNNELS_PER_CONNECTION]), &authorized("*"));
        assert_eq!((allowed.len(), refused.len()), (limits::TUNNELS_PER_CONNECTION, 0));
        let (allowed, refused) = sort_names(&hello(&names), &authorized("*"));
        assert_eq!((allowed.len(), refused.len()), (limits::TUNNELS_PER_CONNECTION, 1));
        assert_eq!(refused[0].reason, Refusal::TooMany);
    }
}
