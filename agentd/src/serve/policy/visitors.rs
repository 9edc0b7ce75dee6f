//! Who may use a tunnel: address first, then one of the ways to say who one is.
//!
//! Enters: a request's head. Leaves: a [`Visitor`] for the upstream, or the [`Answer`] that is given instead. Only
//! passwords that are not known yet, keys that have to be fetched and providers make anybody wait.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, header};
use proto::{error::ErrorCode, header::Headers, id::TunnelName};

use crate::{
    config::{paths::PathPattern, traffic::CorsRule, visitors::VisitorRules},
    report::denial::DeniedBy,
    serve::{
        carried::OfTunnel,
        policy::{
            answer::Answer,
            asked::Asked,
            basic::{Checked, Passwords},
            cookie, cors, ip,
            jwt::{Bearer, Shown},
            oidc::{self, SignIn},
        },
    },
};

/// What the upstream is told of who asks. Nobody else's word for it reaches the upstream.
pub(crate) const USER: HeaderName = HeaderName::from_static(USER_TEXT);
const USER_TEXT: &str = "x-tunnel-user";

/// Who may use one tunnel.
pub(crate) struct Visitors {
    tunnel: TunnelName,
    rules: VisitorRules,
    passwords: Option<Arc<Passwords>>,
    bearer: Option<Bearer>,
    sign_in: Option<SignIn>,
}

/// Somebody who was let in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Visitor {
    /// Who it is, where that is known.
    pub(crate) user: Option<String>,
    /// Whether `authorization` was for us.
    spent_authorization: bool,
}

impl Visitor {
    /// Takes out of a request what was for us, and says who asks.
    pub(crate) fn mark(&self, headers: &mut Headers) {
        let fields = std::mem::take(headers).into_iter().filter_map(|(name, value)| {
            if is_user(&name) || (self.spent_authorization && name == header::AUTHORIZATION) {
                return None;
            }
            if name == header::COOKIE {
                return cookie::without_own(&value).map(|value| (name, value));
            }
            Some((name, value))
        });
        *headers = fields.collect();
        // A name with bytes that no field may hold is not said at all.
        if let Some(user) = self.user.as_ref().and_then(|user| HeaderValue::from_bytes(user.as_bytes()).ok())
        {
            headers.push(USER, user);
        }
    }
}

/// Whether a field could be taken for [`USER`]: many servers know no difference between `-` and `_`.
pub(crate) fn is_user(name: &HeaderName) -> bool {
    let (name, user) = (name.as_str().as_bytes(), USER_TEXT.as_bytes());
    name.len() == user.len() && name.iter().zip(user).all(|(&b, &own)| b == own || (b == b'_' && own == b'-'))
}

impl Visitors {
    /// What the rules of a tunnel say.
    pub(crate) fn new(tunnel: &TunnelName, rules: &VisitorRules, carried: OfTunnel<'_>) -> Self {
        Self {
            tunnel: tunnel.clone(),
            // Who is right, and who has guessed wrong, depends on the list alone.
            passwords: rules.basic.as_ref().map(|rule| carried.state(rule.users.clone(), Passwords::new)),
            bearer: rules.bearer.clone().map(|rule| Bearer::new(rule, carried)),
            sign_in: rules.oidc.clone().map(|rule| SignIn::new(tunnel, rule, carried)),
            rules: rules.clone(),
        }
    }

    /// Lets a request's address in or answers it: looked at before everything else.
    pub(crate) fn address(&self, asked: &Asked<'_>) -> Result<(), Answer> {
        let path = asked.target.path();
        if let Some(rule) = &self.rules.ips
            && !rule.except.iter().any(|pattern| pattern.surely_is(path))
            && let Some(list) = ip::denied_by(rule, asked.client())
        {
            return Err(Answer::refusal(ErrorCode::AddressRefused).by(list));
        }
        Ok(())
    }

    /// Lets a request in or answers it, once its address is. `cors` says whose pages may act for a visitor, besides the
    /// tunnel's own; `now` is the Unix time in seconds at which it came.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves nothing behind that counts.
    pub(crate) async fn admit(
        &self,
        asked: &Asked<'_>,
        cors: Option<&CorsRule>,
        now: u64,
    ) -> Result<Visitor, Answer> {
        let path = asked.target.path();
        let holds = |except: &[PathPattern]| !except.iter().any(|pattern| pattern.surely_is(path));
        if path.starts_with("/.agentd/")
            && let Some(answer) = self.own_page(asked, now).await
        {
            return Err(answer);
        }
        let passwords = self.passwords.as_ref().zip(self.rules.basic.as_ref());
        let passwords = passwords.filter(|(_, rule)| holds(&rule.except));
        let bearer = self.bearer.as_ref().filter(|bearer| holds(bearer.except()));
        let sign_in = self.sign_in.as_ref().filter(|sign_in| holds(&sign_in.rule().except));
        if passwords.is_none() && bearer.is_none() && sign_in.is_none() {
            return Ok(Visitor::default());
        }

        // Sessions and passwords are shown by the browser itself, whosever page makes it ask; tokens by none.
        let is_forged = is_forged(asked, cors);
        let mut shown_for_others = None;
        if let Some(user) = sign_in.and_then(|sign_in| sign_in.user(asked, now)) {
            if !is_forged {
                return Ok(Visitor { user: Some(user), spent_authorization: false });
            }
            shown_for_others = Some(DeniedBy::Oidc);
        }
        let mut busy = None;
        if let Some((passwords, _)) = passwords {
            match passwords.check(asked.headers, asked.client()).await {
                Checked::User(_) if is_forged => {
                    shown_for_others.get_or_insert(DeniedBy::BasicAuth);
                }
                Checked::User(user) => {
                    return Ok(Visitor { user: Some((*user).to_owned()), spent_authorization: true });
                }
                Checked::Busy(wait) => busy = Some(wait),
                Checked::Wrong => {}
            }
        }
        let mut shown = Shown::Nothing;
        if let Some(bearer) = bearer {
            shown = bearer.check(asked.headers, now).await;
            if let Shown::User(user) = shown {
                let user = Some(user).filter(|user| !user.is_empty());
                return Ok(Visitor { user, spent_authorization: true });
            }
        }
        if let Some(rule) = shown_for_others {
            return Err(Answer::refusal(ErrorCode::OriginRefused).by(rule));
        }
        if let Some(wait) = busy {
            return Err(later(ErrorCode::TooManyGuesses, wait));
        }
        if shown == Shown::NoKeys {
            return Err(later(ErrorCode::SignInUnavailable, Duration::from_secs(5)).by(DeniedBy::Bearer));
        }
        // A browser is led to the provider rather than asked for a password.
        if let Some(sign_in) = sign_in
            && (asked.is_navigation() || (passwords.is_none() && bearer.is_none()))
        {
            return Err(sign_in.begin(asked, now).await);
        }
        let mut answer = Answer::refusal(if passwords.is_some() {
            ErrorCode::PasswordRequired
        } else {
            ErrorCode::TokenRequired
        });
        if let Some((_, rule)) = passwords {
            let challenge = format!("Basic realm=\"{}\", charset=\"UTF-8\"", rule.realm);
            answer = answer.with(header::WWW_AUTHENTICATE, HeaderValue::try_from(challenge).ok());
        }
        if bearer.is_some() {
            // RFC 6750 §3.1: nothing more is said to whoever showed nothing.
            let challenge = match &shown {
                Shown::Wrong(fault) => {
                    format!("Bearer realm=\"tunnel\", error=\"invalid_token\", error_description=\"{fault}\"")
                }
                _ => "Bearer realm=\"tunnel\"".to_owned(),
            };
            answer = answer.with(header::WWW_AUTHENTICATE, HeaderValue::try_from(challenge).ok());
        }
        Err(answer)
    }

    /// The pages that signing in needs.
    async fn own_page(&self, asked: &Asked<'_>, now: u64) -> Option<Answer> {
        match asked.target.path() {
            oidc::CALLBACK => {
                if self.rules.is_callback
                    && let Some(answer) = oidc::pass_on(asked, &self.tunnel, now)
                {
                    return Some(answer);
                }
                match &self.sign_in {
                    Some(sign_in) => Some(sign_in.finish(asked, now).await),
                    None => self.rules.is_callback.then(|| Answer::refusal(ErrorCode::SignInFailed)),
                }
            }
            oidc::SIGN_OUT => self.sign_in.as_ref().map(|sign_in| sign_in.sign_out(asked, now)),
            _ => None,
        }
    }
}

/// Whether another origin's page makes a visitor's browser send what may change something, and is not let to. Tunnels of
/// one domain are one site to browsers: `SameSite` keeps their pages from nothing.
fn is_forged(asked: &Asked<'_>, cors: Option<&CorsRule>) -> bool {
    let mut origins = asked.headers.get_all(header::ORIGIN).peekable();
    let is_named =
        origins.peek().is_some() && cors.is_some_and(|rule| origins.all(|origin| cors::names(rule, origin)));
    asked.is_unsafe() && asked.is_cross_origin() && !is_named
}

fn later(code: ErrorCode, wait: Duration) -> Answer {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    Answer::refusal(code).with(header::RETRY_AFTER, Some(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> Headers {
        let field = |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        fields.iter().map(field).collect()
    }

    #[test]
    fn the_upstream_hears_who_asks_from_us_alone() {
        let sent = [
            ("x-tunnel-user", "root"),
            ("x_tunnel_user", "root"),
            ("x-tunnel_user", "root"),
            ("x-tunnel-users", "kept"),
            ("authorization", "Basic eDp5"),
            ("cookie", "a=1; __Host-agentd-session-web=s"),
            ("accept", "*/*"),
        ];
        let marked = |visitor: Visitor| {
            let mut headers = headers(&sent);
            visitor.mark(&mut headers);
            headers
        };
        let nobody = marked(Visitor::default());
        let kept = [
            ("x-tunnel-users", "kept"),
            ("authorization", "Basic eDp5"),
            ("cookie", "a=1"),
            ("accept", "*/*"),
        ];
        assert_eq!(nobody, headers(&kept));
        let ann = marked(Visitor { user: Some("ann".into()), spent_authorization: true });
        let kept =
            [("x-tunnel-users", "kept"), ("cookie", "a=1"), ("accept", "*/*"), ("x-tunnel-user", "ann")];
        assert_eq!(ann, headers(&kept));
        let split = marked(Visitor { user: Some("a\r\nb: c".into()), spent_authorization: false });
        assert_eq!(split.get("x-tunnel-user"), None);
    }
}
