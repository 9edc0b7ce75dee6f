//! Where a request goes and what is changed on the way.
//!
//! Enters: a request's head, before and after its visitor was let in. Leaves: a [`Passage`] to an upstream, or the
//! [`Answer`] that is given in its place. Nothing of it waits but for files.

use std::{
    borrow::Cow,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use percent_encoding::{CONTROLS, utf8_percent_encode};
use proto::{
    error::ErrorCode,
    header::Headers,
    id::{RequestId, TunnelName},
    prefix,
    target::Target,
};
use tokio::time::Instant;

use crate::{
    config::{
        TunnelConfig,
        address::Address,
        template::{Template, Variable},
        traffic::{
            BreakerRule, Choice, CorsRule, FieldEdits, ForwardedFields, LimitedBy, RouteRule, RouteTarget,
            TrafficRules,
        },
    },
    serve::{
        carried::OfTunnel,
        health::Health,
        host::HostRule,
        policy::{
            answer::Answer,
            asked::Asked,
            breaker::{Attempt, Breaker},
            cors, files,
            limit::{RateLimit, TooMany},
        },
        upstream::{Upstream, Way},
    },
};

/// One of the upstreams of a route.
pub(crate) struct Member {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) host: HostRule,
    pub(crate) health: Arc<Health>,
}

/// The upstreams of one route.
struct Members {
    all: Vec<Member>,
    next: AtomicUsize,
    breaker: Option<Arc<Breaker>>,
}

/// What is done with the requests of one tunnel.
pub(crate) struct Traffic {
    tunnel: TunnelName,
    rules: TrafficRules,
    /// As many as there are routes; empty where one leads to no upstream.
    members: Vec<Members>,
    rate: Option<Arc<RateLimit>>,
    /// Of the tunnel's own upstream.
    breaker: Option<Arc<Breaker>>,
    /// Whether there is one.
    has_own: bool,
}

/// What a breaker guards, and how.
#[derive(PartialEq)]
struct Guarded {
    rule: BreakerRule,
    /// `None` for the tunnel's own upstream.
    route: Option<String>,
    upstreams: Vec<Address>,
    way: Way,
}

impl Traffic {
    /// What the rules of a tunnel say, whose upstreams are spoken to in this `way`; `member` is an upstream of a route.
    pub(crate) fn new<E>(
        TunnelConfig { name: tunnel, upstream, traffic: rules, .. }: &TunnelConfig,
        way: &Way,
        carried: OfTunnel<'_>,
        mut member: impl FnMut(&Address, &RouteRule) -> Result<Member, E>,
    ) -> Result<Self, E> {
        let breaker = |upstreams: &[Address], route: Option<String>| {
            rules.breaker.map(|rule| {
                let guarded = Guarded { rule, route, upstreams: upstreams.to_vec(), way: way.clone() };
                carried.state(guarded, |guarded| Breaker::new(guarded.rule))
            })
        };
        let mut members = Vec::with_capacity(rules.routes.len());
        for route in &rules.routes {
            let addresses = match &route.target {
                RouteTarget::Upstreams(addresses, _) => &addresses[..],
                _ => &[],
            };
            members.push(Members {
                all: addresses.iter().map(|address| member(address, route)).collect::<Result<_, E>>()?,
                next: AtomicUsize::new(0),
                breaker: breaker(addresses, Some(route.name())),
            });
        }
        Ok(Self {
            tunnel: tunnel.clone(),
            rules: rules.clone(),
            members,
            rate: rules.rate_limit.map(|rule| carried.state(rule, |rule| RateLimit::new(*rule))),
            breaker: upstream.as_ref().and_then(|own| breaker(std::slice::from_ref(own), None)),
            has_own: upstream.is_some(),
        })
    }

    /// Every upstream of every route.
    pub(crate) fn upstreams(&self) -> impl Iterator<Item = (&RouteRule, &Member)> {
        let members = self.rules.routes.iter().zip(&self.members);
        members.flat_map(|(route, members)| members.all.iter().map(move |member| (route, member)))
    }

    /// An upstream of a route that runs already.
    pub(crate) fn upstream_at(&self, address: &Address) -> Option<&Arc<Upstream>> {
        let mut all = self.members.iter().flat_map(|members| &members.all).map(|member| &member.upstream);
        all.find(|upstream| upstream.address() == address)
    }

    /// The page that browsers get where the upstream did not answer.
    pub(crate) fn error_page(&self, code: ErrorCode) -> Option<&str> {
        let status = matches!(
            code.status(),
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        );
        self.rules.error_page.as_deref().filter(|_| status)
    }

    /// What pages of other origins may do.
    pub(crate) const fn cors(&self) -> Option<&CorsRule> {
        self.rules.cors.as_ref()
    }

    /// What is decided before anybody asks who the visitor is.
    pub(crate) fn enter(&self, asked: &Asked<'_>, now: Instant) -> Result<Choice<'_>, Answer> {
        if self.rules.maintenance {
            return Err(self.unavailable(ErrorCode::Maintenance, Duration::from_secs(60)));
        }
        if let Some(rate) = self.rate.as_ref().filter(|rate| rate.rule().by != LimitedBy::User) {
            rate.take(asked.client(), None, now).map_err(too_many)?;
        }
        let choice = self.rules.choose(asked.method, asked.host(), asked.target.path());
        if choice == Choice::Ambiguous {
            return Err(Answer::refusal(ErrorCode::BadRequest));
        }
        // A preflight shows no password: it is answered before anybody asks for one.
        if let Some(answer) = self.rules.cors.as_ref().and_then(|rule| cors::preflight(rule, asked)) {
            return Err(answer);
        }
        Ok(choice)
    }

    /// Where a request that was refused would have gone, had it been let in; `None` where no upstream would have got it.
    /// Nothing is counted for it.
    pub(crate) fn meant<'a>(&'a self, asked: &Asked<'_>, request_id: &RequestId) -> Option<Passage<'a>> {
        let mut passage = self.passage(asked, None, request_id);
        match self.rules.choose(asked.method, asked.host(), asked.target.path()) {
            Choice::Route(index, route) if matches!(route.target, RouteTarget::Upstreams(..)) => {
                passage.follow(route, asked)?;
                let all = &self.members[index].all;
                let member = all.iter().find(|member| !member.health.is_down()).or(all.first())?;
                passage.upstream = Some((&member.upstream, &member.host));
                Some(passage)
            }
            Choice::Tunnel => self.has_own.then_some(passage),
            // Files, fixed answers and redirects are the agent's own.
            Choice::Route(..) | Choice::Ambiguous => None,
        }
    }

    /// The way to the tunnel's own upstream.
    fn passage<'a>(&'a self, asked: &Asked<'_>, user: Option<&str>, request_id: &RequestId) -> Passage<'a> {
        Passage {
            traffic: self,
            upstream: None,
            target: None,
            max_body: None,
            public_prefix: asked.prefix().to_owned(),
            strip: String::new(),
            add: Cow::Borrowed(""),
            breaker: None,
            attempt: None,
            facts: Facts {
                client_ip: asked.client().as_ref().map(IpAddr::to_string).unwrap_or_default(),
                user: user.unwrap_or_default().to_owned(),
                request_id: request_id.as_str().to_owned(),
                tunnel: self.tunnel.to_string(),
                target: asked.target.as_str().to_owned(),
            },
            origin: asked.headers.get(header::ORIGIN).cloned(),
        }
    }

    /// Leads a request that was let in to where `choice` says. `body_bytes` is what its body was announced to have,
    /// `None` where nobody knows yet.
    pub(crate) async fn lead<'a>(
        &'a self,
        choice: Choice<'a>,
        asked: &Asked<'_>,
        user: Option<&str>,
        request_id: &RequestId,
        body_bytes: Option<u64>,
    ) -> Result<Passage<'a>, Answer> {
        let now = Instant::now();
        if let Some(rate) = self.rate.as_ref().filter(|rate| rate.rule().by == LimitedBy::User) {
            rate.take(asked.client(), user, now).map_err(too_many)?;
        }
        let route = match choice {
            Choice::Route(_, route) => Some(route),
            Choice::Tunnel if !self.has_own => return Err(Answer::refusal(ErrorCode::NoRoute)),
            Choice::Tunnel | Choice::Ambiguous => None,
        };
        let most = route.and_then(|route| route.max_body).or(self.rules.max_body);
        if most.zip(body_bytes).is_some_and(|(most, bytes)| bytes > most) {
            return Err(Answer::refusal(ErrorCode::BodyTooLarge));
        }
        let mut passage = self.passage(asked, user, request_id);
        passage.max_body = most;
        let Choice::Route(index, route) = choice else {
            passage.breaker = self.closed(self.breaker.as_ref(), now)?;
            return Ok(passage);
        };
        passage.follow(route, asked).ok_or_else(|| Answer::refusal(ErrorCode::BadRequest))?;
        match &route.target {
            RouteTarget::Upstreams(..) => {
                let members = &self.members[index];
                let member = members
                    .pick()
                    .ok_or_else(|| self.unavailable(ErrorCode::UpstreamUnhealthy, Duration::from_secs(2)))?;
                passage.breaker = self.closed(members.breaker.as_ref(), now)?;
                passage.upstream = Some((&member.upstream, &member.host));
                Ok(passage)
            }
            RouteTarget::Files(folder) => {
                let target = passage.target.as_ref().unwrap_or(asked.target);
                let query = &target.as_str()[target.path().len()..];
                let mut answer = files::serve(
                    folder,
                    asked.method,
                    target.path(),
                    asked.target.path(),
                    query,
                    asked.headers,
                    SystemTime::now(),
                )
                .await;
                if answer.code.is_none() {
                    answer.edit(|headers| passage.edit_response(headers));
                }
                Err(answer)
            }
            RouteTarget::Respond { status, headers, body } => {
                let mut all: Headers = headers.iter().cloned().collect();
                if !matches!(*status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
                    all.push(header::CONTENT_LENGTH, body.len().into());
                }
                if !body.is_empty() && all.get(header::CONTENT_TYPE).is_none() {
                    all.push(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
                }
                passage.edit_response(&mut all);
                Err(Answer::whole(*status, all, bytes::Bytes::from(body.clone()).into()))
            }
            RouteTarget::Redirect { status, to } => {
                let location = HeaderValue::try_from(passage.facts.fill(to));
                let location = location.map_err(|_| Answer::refusal(ErrorCode::BadRequest))?;
                let mut answer = Answer::empty(*status).with(header::LOCATION, Some(location));
                answer.edit(|headers| passage.edit_response(headers));
                Err(answer)
            }
        }
    }

    /// Says in a refusal who may read it, as other answers do: a page could not tell it from a network that is down.
    pub(crate) fn mark_refusal(&self, code: ErrorCode, origin: Option<&HeaderValue>, answer: &mut Headers) {
        // The answer to a preflight has said so.
        if let Some(rule) = self.rules.cors.as_ref().filter(|_| code != ErrorCode::OriginRefused) {
            cors::mark(rule, origin, answer);
        }
    }

    /// A breaker that lets somebody through now, or none at all.
    fn closed<'a>(
        &self,
        breaker: Option<&'a Arc<Breaker>>,
        now: Instant,
    ) -> Result<Option<&'a Arc<Breaker>>, Answer> {
        let state = breaker.map_or(Ok(()), |breaker| breaker.look(now));
        state.map(|()| breaker).map_err(|wait| self.unavailable(ErrorCode::CircuitOpen, wait))
    }

    fn unavailable(&self, code: ErrorCode, wait: Duration) -> Answer {
        let answer = match self.error_page(code) {
            Some(page) => Answer::refusal(code).with_page(page),
            None => Answer::refusal(code),
        };
        answer.with(header::RETRY_AFTER, Some(whole_seconds(wait).into()))
    }
}

impl Members {
    /// The next one that is well.
    fn pick(&self) -> Option<&Member> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        in_turn(turn, self.all.iter().filter(|member| !member.health.is_down()))
    }
}

/// Whose turn it is among those that are there: each has as many as every other.
fn in_turn<T>(turn: usize, mut there: impl Iterator<Item = T> + Clone) -> Option<T> {
    there.clone().count().checked_sub(1).and_then(|last| there.nth(turn % (last + 1)))
}

fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

/// 429, with what draft-ietf-httpapi-ratelimit-headers-11 wants to be said.
fn too_many(TooMany { retry_after, rule }: TooMany) -> Answer {
    let wait = whole_seconds(retry_after);
    let policy = format!("\"tunnel\";q={};w={}", rule.requests, whole_seconds(rule.per));
    Answer::refusal(ErrorCode::RateLimited)
        .with(header::RETRY_AFTER, Some(wait.into()))
        .with(HeaderName::from_static("ratelimit-policy"), HeaderValue::try_from(policy).ok())
        .with(
            HeaderName::from_static("ratelimit"),
            HeaderValue::try_from(format!("\"tunnel\";r=0;t={wait}")).ok(),
        )
}

/// A path of the configuration, as an address says it.
fn in_address(path: &str) -> Cow<'_, str> {
    // What is not ASCII is escaped, whatever the set.
    utf8_percent_encode(path, CONTROLS).into()
}

/// The target without its first `strip` segments and below `add`.
fn moved(target: &Target, strip: usize, add: &str) -> Option<Target> {
    let mut rest = target.as_str();
    for _ in 0..strip {
        let inner = rest.strip_prefix('/')?;
        rest = &inner[inner.find(['/', '?']).unwrap_or(inner.len())..];
    }
    let slash = if rest.starts_with('/') { "" } else { "/" };
    Target::parse(&format!("{add}{slash}{rest}")).ok()
}

/// What is known of a request.
struct Facts {
    client_ip: String,
    user: String,
    request_id: String,
    tunnel: String,
    target: String,
}

impl Facts {
    fn fill(&self, template: &Template) -> String {
        template.fill(|variable| match variable {
            Variable::ClientIp => &self.client_ip,
            Variable::RequestId => &self.request_id,
            Variable::Tunnel => &self.tunnel,
            Variable::User => &self.user,
            Variable::Target => &self.target,
        })
    }

    /// The changes in order; a value that no field can have is left out.
    fn edit(&self, edits: &FieldEdits, mut change: impl FnMut(&HeaderName, Option<HeaderValue>, bool)) {
        for name in &edits.remove {
            change(name, None, true);
        }
        for (pairs, replaces) in [(&edits.set, true), (&edits.add, false)] {
            for (name, template) in pairs {
                change(name, HeaderValue::try_from(self.fill(template)).ok(), replaces);
            }
        }
    }
}

/// The way of one request to its upstream and of the response back.
pub(crate) struct Passage<'a> {
    traffic: &'a Traffic,
    /// Where a route leads; `None` for the tunnel's own upstream.
    pub(crate) upstream: Option<(&'a Arc<Upstream>, &'a HostRule)>,
    /// The longest body it may have, in bytes; to be looked at where its length was not announced.
    pub(crate) max_body: Option<u64>,
    /// What the upstream is asked for, where that is not what the public client asked for.
    pub(crate) target: Option<Target>,
    /// What was taken off the path, also in path mode.
    public_prefix: String,
    strip: String,
    add: Cow<'a, str>,
    breaker: Option<&'a Arc<Breaker>>,
    attempt: Option<Attempt>,
    facts: Facts,
    origin: Option<HeaderValue>,
}

impl<'a> Passage<'a> {
    /// Changes the path as a route does; `None` where that makes no target.
    fn follow(&mut self, route: &'a RouteRule, asked: &Asked<'_>) -> Option<()> {
        if route.strip > 0 || !route.add.is_empty() {
            self.add = in_address(&route.add);
            self.target = Some(moved(asked.target, route.strip, &self.add)?);
            self.strip = in_address(&route.path.first(route.strip)).into_owned();
            self.public_prefix = format!("{}{}", asked.prefix(), self.strip);
        }
        Some(())
    }

    /// What the path is moved from and to, if it is: as the public client knows it, and as the upstream does.
    pub(crate) fn prefixes(&self) -> Option<(&str, &str)> {
        self.target.as_ref().map(|_| (&*self.public_prefix, &*self.add))
    }

    /// Changes what the upstream is sent.
    pub(crate) fn edit_request(&self, headers: &mut HeaderMap) {
        let rules = &self.traffic.rules;
        let keeps = |x, rfc7239| match rules.forwarded {
            ForwardedFields::Both => true,
            ForwardedFields::X => x,
            ForwardedFields::Rfc7239 => rfc7239,
            ForwardedFields::None => false,
        };
        if keeps(true, false) {
            if !self.strip.is_empty()
                && let Ok(prefix) = HeaderValue::try_from(&self.public_prefix)
            {
                headers.insert(HeaderName::from_static("x-forwarded-prefix"), prefix);
            }
        } else {
            let x: Vec<_> =
                headers.keys().filter(|name| name.as_str().starts_with("x-forwarded-")).cloned().collect();
            for name in x {
                headers.remove(name);
            }
        }
        if !keeps(false, true) {
            headers.remove(header::FORWARDED);
        }
        self.facts.edit(&rules.request, |name, value, replaces| {
            if replaces {
                headers.remove(name);
            }
            if let Some(value) = value {
                headers.append(name.clone(), value);
            }
        });
    }

    /// Says paths of the upstream as the public client knows them, where they are others; in path mode without the
    /// tunnel's prefix, which the edge puts before them. `target` is what the upstream was asked for.
    pub(crate) fn move_response(&self, headers: &mut Headers, target: &Target, public_host: &str) {
        let says = matches!(self.traffic.rules.forwarded, ForwardedFields::Both | ForwardedFields::X);
        let told = if says { prefix::told(&self.public_prefix, target.as_str()) } else { "" };
        if self.target.is_some() || !told.is_empty() {
            prefix::move_fields(headers, &self.add, &self.strip, told, public_host);
        }
    }

    /// Changes what the public client is sent.
    pub(crate) fn edit_response(&self, headers: &mut Headers) {
        if let Some(rule) = self.cors() {
            cors::mark(rule, self.origin.as_ref(), headers);
        }
        self.facts.edit(&self.traffic.rules.response, |name, value, replaces| {
            if replaces {
                headers.remove(name);
            }
            if let Some(value) = value {
                headers.push(name.clone(), value);
            }
        });
    }

    fn cors(&self) -> Option<&CorsRule> {
        self.traffic.rules.cors.as_ref()
    }

    /// Takes its turn at an upstream that may have been left alone. To be called when nothing is left to wait for before
    /// the upstream is: a body whose signature is checked is there.
    pub(crate) fn enter(&mut self) -> Result<(), Answer> {
        if let Some(breaker) = self.breaker {
            let entered = breaker.enter(Instant::now());
            let refused = |wait| self.traffic.unavailable(ErrorCode::CircuitOpen, wait);
            self.attempt = Some(entered.map_err(refused)?);
        }
        Ok(())
    }

    /// Notes whether the upstream answered properly.
    pub(crate) fn came_to(&mut self, good: bool) {
        if let Some(attempt) = self.attempt.take() {
            attempt.came_to(good, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_upstream_that_is_well_has_as_many_turns_as_the_others() {
        for well in [&["a", "b", "c"][..], &["a", "c"], &["c"]] {
            let mut turns: Vec<_> = (0..12).map(|turn| in_turn(turn, well.iter()).unwrap()).collect();
            turns.sort_unstable();
            let wanted: Vec<_> =
                well.iter().flat_map(|name| std::iter::repeat_n(name, 12 / well.len())).collect();
            assert_eq!(turns, wanted);
        }
        assert_eq!(in_turn(5, std::iter::empty::<u8>()), None);
    }
}
