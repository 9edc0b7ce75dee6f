//! Signing in with a provider (OpenID Connect): the code flow with PKCE, and a session of our own afterwards.
//!
//! ```text
//! page ──► provider ──► /.agentd/oidc/callback ──► page, with a session's cookie
//! ```
//!
//! Nothing is kept for a visitor that is on the way: what must come back unchanged travels sealed in `state`, and a
//! cookie binds it to the browser that set out. The providers' side of it is asked for with the HTTP client that
//! calls upstreams, and its tokens are verified as all others: the crate `openidconnect` would bring a second
//! cryptography along, refuses a whole token over `"email_verified": "true"`, and any list of audiences.

use std::{
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest, error::Unspecified};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use proto::{error::ErrorCode, id::TunnelName};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    config::{
        http_url::HttpUrl,
        visitors::{ALGORITHMS, Allowed, OidcRule},
    },
    identity::public_keys::{Expected, PublicKeys, texts_of},
    report::denial::DeniedBy,
    serve::{
        carried::OfTunnel,
        policy::{
            answer::Answer,
            asked::Asked,
            cookie::{self, Sealer},
            fetch::{Fetch, Remote},
            jwt::{read_keys, verify_with},
            seen::Seen,
        },
    },
};

/// Where providers send visitors back to.
pub(crate) const CALLBACK: &str = "/.agentd/oidc/callback";

/// Where visitors sign out.
pub(crate) const SIGN_OUT: &str = "/.agentd/oidc/sign-out";

/// How long signing in may take.
const SIGN_IN_SECS: u64 = 600;

/// Longer ones are forgotten over signing in: providers take no `state` of any length.
const MOST_PLACE_BYTES: usize = 1024;

/// A provider's word for what went wrong is logged up to here.
const MOST_ERROR_BYTES: usize = 64;

/// What is sealed for the way to a provider and back: it may end at another tunnel of this agent.
static STATES: LazyLock<Sealer> = LazyLock::new(Sealer::of_process);

const STATE_PURPOSE: &str = "sign-in";

/// Somebody who has signed in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Session {
    /// What the upstream is told.
    user: String,
    email: Option<String>,
    /// Those of the allowed groups that the provider named.
    groups: Vec<String>,
    /// Unix seconds.
    since: u64,
    until: u64,
    id: String,
}

/// What must come back from the provider as it was sent.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    tunnel: String,
    /// The tunnel's public address.
    origin: String,
    /// Where the visitor wanted to go.
    place: String,
    /// What the provider was told.
    redirect: String,
    nonce: String,
    verifier: String,
    /// The hash of the browser's cookie.
    browser: String,
    until: u64,
}

/// What a provider says of itself.
#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
    userinfo_endpoint: Option<String>,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Option<Vec<String>>,
    #[serde(default)]
    authorization_response_iss_parameter_supported: bool,
}

/// A provider, ready to be asked.
struct Provider {
    authorization: HttpUrl,
    token: HttpUrl,
    userinfo: Option<HttpUrl>,
    keys: Remote<PublicKeys>,
    /// Whether our secret goes into the form and not into a field.
    secret_in_form: bool,
    says_issuer: bool,
}

/// Why signing in came to nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    Unavailable(String),
    #[error("{0} is not among those who are let in")]
    NotAllowed(String),
}

impl Failure {
    const fn code(&self) -> ErrorCode {
        match self {
            Self::Failed(_) => ErrorCode::SignInFailed,
            Self::Unavailable(_) => ErrorCode::SignInUnavailable,
            Self::NotAllowed(_) => ErrorCode::VisitorRefused,
        }
    }
}

fn failed(why: impl Into<String>) -> Failure {
    Failure::Failed(why.into())
}

/// Signing in at one tunnel.
pub(crate) struct SignIn {
    tunnel: TunnelName,
    rule: OidcRule,
    sealer: Sealer,
    /// What sessions are sealed for: another provider or client begins anew, and so does who was known by other claims.
    purpose: String,
    session_cookie: String,
    browser_cookie: String,
    fetch: Arc<Fetch>,
    provider: Arc<Remote<Provider>>,
    expected: Expected,
    used: Arc<Mutex<Seen>>,
    signed_out: Arc<Mutex<Seen>>,
}

/// What is remembered of a tunnel's visitors: ids that nobody can guess, and that mean the same by whatever rule.
#[derive(PartialEq, Eq)]
enum Marks {
    Used,
    SignedOut,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// 128 bits that nobody can guess, as text.
fn random<const N: usize>() -> Result<String, Unspecified> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

fn hash(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}

impl SignIn {
    /// What the same provider has said of itself is known, and so is what was used and who has signed out, whatever the
    /// rule says.
    pub(crate) fn new(tunnel: &TunnelName, rule: OidcRule, carried: OfTunnel<'_>) -> Self {
        let fetch = carried.state(rule.certificates.clone(), |certificates| Fetch::new(certificates.clone()));
        let sealer = match &rule.session_key {
            Some(key) => Sealer::of(key.bytes()),
            None => Sealer::of_process(),
        };
        let issuer = rule.issuer.as_str();
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let url: HttpUrl = url.parse().unwrap_or_else(|_| rule.issuer.clone());
        let settings = (issuer.to_owned(), rule.certificates.clone());
        let provider = carried.state(settings, |(issuer, _)| {
            let (issuer, keys_fetch) = (issuer.clone(), Arc::clone(&fetch));
            Remote::new(url, Arc::clone(&fetch), move |text| Provider::read(text, &issuer, &keys_fetch))
        });
        let algorithms: Vec<_> = ALGORITHMS.iter().map(|(_, algorithm)| *algorithm).collect();
        let Allowed { groups_claim, verified_email, .. } = &rule.allow;
        Self {
            purpose: format!(
                "session {tunnel} {issuer} {} {groups_claim} verified={verified_email}",
                rule.client_id
            ),
            session_cookie: format!("{}session-{tunnel}", cookie::PREFIX),
            browser_cookie: format!("{}browser-{tunnel}", cookie::PREFIX),
            expected: Expected::new(&algorithms, Some(issuer), std::slice::from_ref(&rule.client_id)),
            tunnel: tunnel.clone(),
            sealer,
            fetch,
            provider,
            rule,
            used: carried.state(Marks::Used, |_| Mutex::default()),
            signed_out: carried.state(Marks::SignedOut, |_| Mutex::default()),
        }
    }

    /// Where it does not hold, and for how long it does.
    pub(crate) const fn rule(&self) -> &OidcRule {
        &self.rule
    }

    /// Who has signed in and may still come in. Whom the rule lets in is looked up each time: a reload shuts out.
    pub(crate) fn user(&self, asked: &Asked<'_>, now: u64) -> Option<String> {
        self.sessions(asked, now).find(|session| self.rule.allow.lets_in(session)).map(|session| session.user)
    }

    /// The sessions that a request shows: one, unless somebody meddles with it.
    fn sessions<'a>(&'a self, asked: &Asked<'a>, now: u64) -> impl Iterator<Item = Session> + 'a {
        let headers = asked.headers;
        // In path mode all tunnels are one origin, and no session is made there.
        let name = Some(&*self.session_cookie).filter(|_| asked.prefix().is_empty());
        name.into_iter()
            .flat_map(move |name| cookie::values(headers, name))
            .filter_map(|value| self.sealer.open::<Session>(&self.purpose, value))
            .filter(move |session| {
                self.end_of(session) > now && !lock(&self.signed_out).contains(session.id.as_bytes(), now)
            })
    }

    /// When a session ends: a reload may have made it shorter.
    fn end_of(&self, session: &Session) -> u64 {
        session.until.min(session.since.saturating_add(self.rule.session.as_secs()))
    }

    /// Leads a page to the provider; everything else is told to sign in.
    pub(crate) async fn begin(&self, asked: &Asked<'_>, now: u64) -> Answer {
        if !asked.is_navigation() {
            let challenge = HeaderValue::from_static("OpenIDConnect realm=\"tunnel\"");
            return Answer::refusal(ErrorCode::SignInRequired)
                .with(header::WWW_AUTHENTICATE, Some(challenge));
        }
        // Also whose session does not let in: it was made under other rules, and knows only what those asked for. Who is not
        // let in after signing in anew is refused there and gets no session, so nobody is led round.
        match self.to_provider(asked, now).await {
            Ok(answer) => answer,
            Err(failure) => self.refuse(&failure),
        }
    }

    fn refuse(&self, failure: &Failure) -> Answer {
        tracing::warn!(tunnel_id = %self.tunnel, "nobody was signed in at {}: {failure}", self.tunnel);
        Answer::refusal(failure.code()).by(DeniedBy::Oidc)
    }

    async fn provider(&self) -> Result<Arc<Provider>, Failure> {
        let none = || Failure::Unavailable(format!("{} says nothing that is usable", self.provider.url()));
        self.provider.get(false).await.ok_or_else(none)
    }

    async fn to_provider(&self, asked: &Asked<'_>, now: u64) -> Result<Answer, Failure> {
        let origin = self.origin(asked)?;
        let redirect = match &self.rule.callback_tunnel {
            None => format!("{origin}{CALLBACK}"),
            Some(other) => {
                let own = format!("://{}.", self.tunnel);
                let (scheme, domain) = origin.split_once(&own).ok_or_else(|| {
                    Failure::Unavailable(format!("{origin} does not begin with the tunnel's name: callback_tunnel cannot be used with it"))
                })?;
                format!("{scheme}://{other}.{domain}{CALLBACK}")
            }
        };
        let provider = self.provider().await?;
        let no_randomness = |Unspecified| Failure::Unavailable("the system has no randomness".to_owned());
        // One that is there already may belong to another tab that is on the way.
        let known = cookie::values(asked.headers, &self.browser_cookie).find(|value| value.len() == 43);
        let browser = match known {
            Some(known) => known.to_owned(),
            None => random::<32>().map_err(no_randomness)?,
        };
        let verifier = random::<32>().map_err(no_randomness)?;
        let nonce = random::<16>().map_err(no_randomness)?;
        let place = asked.target.as_str();
        let state = State {
            tunnel: self.tunnel.to_string(),
            place: if place.len() > MOST_PLACE_BYTES { "/".to_owned() } else { place.to_owned() },
            redirect: redirect.clone(),
            nonce: nonce.clone(),
            verifier: verifier.clone(),
            browser: hash(&browser),
            until: now + SIGN_IN_SECS,
            origin,
        };
        let state = STATES.seal(STATE_PURPOSE, &state).map_err(no_randomness)?;
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.rule.client_id)
            .append_pair("redirect_uri", &redirect)
            .append_pair("scope", &self.rule.scopes)
            .append_pair("state", &state)
            .append_pair("nonce", &nonce)
            .append_pair("code_challenge", &hash(&verifier))
            .append_pair("code_challenge_method", "S256")
            .finish();
        let endpoint = provider.authorization.as_str();
        let joint = if endpoint.contains('?') { '&' } else { '?' };
        Ok(Answer::redirect(&format!("{endpoint}{joint}{query}"))
            .with(header::SET_COOKIE, cookie::set(&self.browser_cookie, &browser, SIGN_IN_SECS)))
    }

    /// The tunnel's own public address, if a session can be kept there.
    fn origin(&self, asked: &Asked<'_>) -> Result<String, Failure> {
        let unavailable = |why: &str| Failure::Unavailable(why.to_owned());
        if !asked.prefix().is_empty() {
            return Err(unavailable(
                "signing in needs a host name for each tunnel: under one name their cookies would be shared",
            ));
        }
        let origin = asked.origin().ok_or_else(|| unavailable("the edge does not say how it was asked"))?;
        let host = origin.split_once("://").map_or("", |(_, host)| host);
        if origin.starts_with("http://") && !is_this_machine(host) {
            return Err(unavailable(
                "browsers keep no session over http://, but for localhost: use https://",
            ));
        }
        Ok(origin)
    }

    /// The visitor comes back from the provider.
    pub(crate) async fn finish(&self, asked: &Asked<'_>, now: u64) -> Answer {
        match self.signed_in(asked, now).await {
            Ok((session, location)) => {
                tracing::info!(tunnel_id = %self.tunnel, user = session.user, "{} has signed in", session.user);
                let seconds = session.until.saturating_sub(now);
                let sealed = self.sealer.seal(&self.purpose, &session).ok();
                let kept = sealed.and_then(|sealed| cookie::set(&self.session_cookie, &sealed, seconds));
                match kept {
                    Some(kept) => Answer::redirect(&location).with(header::SET_COOKIE, Some(kept)),
                    None => self.refuse(&failed("the session is too long for a cookie")),
                }
            }
            Err(failure) => self.refuse(&failure),
        }
    }

    async fn signed_in(&self, asked: &Asked<'_>, now: u64) -> Result<(Session, String), Failure> {
        let answer = ProviderAnswer::of(asked)?;
        let state = answer.state(now)?;
        if state.tunnel != self.tunnel.as_str() {
            return Err(failed("it was begun at another tunnel"));
        }
        let is_browser =
            |value: &str| verify_slices_are_equal(hash(value).as_bytes(), state.browser.as_bytes()).is_ok();
        if !cookie::values(asked.headers, &self.browser_cookie).any(is_browser) {
            return Err(failed("it was begun in another browser, or its cookie was not kept"));
        }
        let provider = self.provider().await?;
        match &answer.issuer {
            Some(issuer) if issuer != self.rule.issuer.as_str() => {
                return Err(failed("the answer is of another provider"));
            }
            None if provider.says_issuer => return Err(failed("the answer does not say whose it is")),
            _ => {}
        }
        // Once, whatever comes of it: a code is good for one attempt too.
        if !lock(&self.used).insert(state.nonce.as_bytes(), now, Duration::from_secs(SIGN_IN_SECS)) {
            return Err(failed("this state was used before"));
        }
        if let Some(error) = &answer.error {
            return Err(failed(format!("the provider says {}", readable(error))));
        }
        let code = answer.code.as_deref().ok_or_else(|| failed("the provider sent no code"))?;
        let tokens = self.exchange(&provider, code, &state).await?;
        let verified = verify_with(&provider.keys, &tokens.id_token, &self.expected, now).await;
        let claims = verified
            .ok_or_else(|| Failure::Unavailable("the provider's keys cannot be had".to_owned()))?
            .map_err(|fault| failed(format!("the provider's token is not believed: {fault}")))?;
        if claims.get("nonce").and_then(Value::as_str) != Some(&*state.nonce) {
            return Err(failed("the provider's token is for another sign-in"));
        }
        // OpenID Connect Core §3.1.3.7: with several audiences it must say who asked.
        let several = claims.get("aud").and_then(Value::as_array).is_some_and(|list| list.len() > 1);
        match claims.get("azp").and_then(Value::as_str) {
            Some(party) if party != self.rule.client_id => {
                return Err(failed("the provider's token is another's"));
            }
            None if several => return Err(failed("the provider's token does not say who asked for it")),
            _ => {}
        }
        let session = self.session_of(&provider, claims, tokens.access_token.as_deref(), now).await?;
        if !self.rule.allow.lets_in(&session) {
            return Err(Failure::NotAllowed(readable(&session.user)));
        }
        Ok((session, format!("{}{}", state.origin, state.place)))
    }

    /// The fields and the form that a code is exchanged with.
    fn token_request(
        &self,
        provider: &Provider,
        code: &str,
        state: &State,
    ) -> Result<(HeaderMap, String), Failure> {
        let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "authorization_code")
            .append_pair("code", code)
            .append_pair("redirect_uri", &state.redirect)
            .append_pair("code_verifier", &state.verifier);
        let mut fields = HeaderMap::new();
        match &self.rule.client_secret {
            Some(secret) if !provider.secret_in_form => {
                // RFC 6749 §2.3.1: both are form-encoded before they become a password.
                let secret = String::from_utf8_lossy(secret.bytes());
                let both = format!("{}:{}", encoded(&self.rule.client_id), encoded(&secret));
                let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(both)))
                    .map_err(|_| failed("the client's secret cannot be sent"))?;
                value.set_sensitive(true);
                fields.insert(header::AUTHORIZATION, value);
            }
            Some(secret) => {
                form.append_pair("client_id", &self.rule.client_id)
                    .append_pair("client_secret", &String::from_utf8_lossy(secret.bytes()));
            }
            None => {
                form.append_pair("client_id", &self.rule.client_id);
            }
        }
        Ok((fields, form.finish()))
    }

    async fn exchange(&self, provider: &Provider, code: &str, state: &State) -> Result<Tokens, Failure> {
        let (fields, form) = self.token_request(provider, code, state)?;
        let (status, body) = self
            .fetch
            .post(&provider.token, fields, form)
            .await
            .map_err(|error| Failure::Unavailable(error.to_string()))?;
        if status == StatusCode::OK {
            return serde_json::from_slice(&body).map_err(|_| failed("the provider's answer holds no token"));
        }
        let why = error_of(&body);
        let message = format!("{} answers {status} ({why}) to the code", provider.token);
        // What a visitor's code cannot be the reason of is ours to mend.
        if status.is_server_error() || why == "invalid_client" || why == "unauthorized_client" {
            Err(Failure::Unavailable(message))
        } else {
            Err(Failure::Failed(message))
        }
    }

    async fn session_of(
        &self,
        provider: &Provider,
        mut claims: Value,
        access_token: Option<&str>,
        now: u64,
    ) -> Result<Session, Failure> {
        let allow = &self.rule.allow;
        let subject = claims.get("sub").and_then(Value::as_str).map(str::to_owned);
        let subject = subject.ok_or_else(|| failed("the provider's token has no sub"))?;
        let mut email = Email::of(&claims);
        let lacks = email.address.is_none()
            || (allow.verified_email && email.verified.is_none())
            || (!allow.groups.is_empty() && texts_of(&claims, &allow.groups_claim).is_empty());
        // Many providers keep a token short, and tell the rest to whoever asks with it.
        if lacks && let (Some(url), Some(token)) = (&provider.userinfo, access_token) {
            match self.userinfo(url, token).await {
                Ok(more) => {
                    // OpenID Connect Core §5.3.2.
                    if more.get("sub").and_then(Value::as_str) != Some(&*subject) {
                        return Err(failed(format!("{url} speaks of somebody else")));
                    }
                    email = email.or(Email::of(&more));
                    if let (Some(claims), Value::Object(more)) = (claims.as_object_mut(), more) {
                        for (name, value) in more {
                            claims.entry(name).or_insert(value);
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(tunnel_id = %self.tunnel, "what is known of a visitor is less: {error}")
                }
            }
        }
        let is_verified = email.verified == Some(true);
        let email = email.address.filter(|_| !allow.verified_email || is_verified);
        let groups = texts_of(&claims, &allow.groups_claim);
        let groups = allow.groups.iter().filter(|group| groups.contains(group)).cloned().collect();
        Ok(Session {
            user: email.clone().unwrap_or(subject),
            email,
            groups,
            since: now,
            until: now + self.rule.session.as_secs(),
            id: random::<16>().map_err(|Unspecified| failed("the system has no randomness"))?,
        })
    }

    /// What the provider tells whoever has the visitor's access token.
    async fn userinfo(&self, url: &HttpUrl, token: &str) -> Result<Value, String> {
        let mut fields = HeaderMap::new();
        if let Ok(mut value) = HeaderValue::try_from(format!("Bearer {token}")) {
            value.set_sensitive(true);
            fields.insert(header::AUTHORIZATION, value);
        }
        let body = self.fetch.get(url, fields).await.map_err(|error| error.to_string())?;
        serde_json::from_slice(&body).map_err(|_| format!("what {url} says is no JSON"))
    }

    /// Ends a session here. That of the provider goes on. Where another origin's page made the browser ask, the visitor is
    /// asked first.
    pub(crate) fn sign_out(&self, asked: &Asked<'_>, now: u64) -> Answer {
        if asked.is_cross_origin() {
            return Answer::question("Do you want to sign out?", "Sign out");
        }
        for session in self.sessions(asked, now) {
            let left = Duration::from_secs(session.until.saturating_sub(now));
            lock(&self.signed_out).insert(session.id.as_bytes(), now, left);
        }
        Answer::page("You are signed out.").with(header::SET_COOKIE, cookie::set(&self.session_cookie, "", 0))
    }
}

/// Sends a visitor on who comes back from a provider for another tunnel of this agent. `None` where the answer is
/// none of those.
pub(crate) fn pass_on(asked: &Asked<'_>, own: &TunnelName, now: u64) -> Option<Answer> {
    let state = ProviderAnswer::of(asked).ok()?.state(now).ok()?;
    if state.tunnel == own.as_str() {
        return None;
    }
    let query = asked.target.as_str().split_once('?').map_or("", |(_, query)| query);
    Some(Answer::redirect(&format!("{}{CALLBACK}?{query}", state.origin)))
}

/// What a provider sends a visitor back with.
struct ProviderAnswer {
    code: Option<String>,
    state: Option<String>,
    error: Option<String>,
    issuer: Option<String>,
}

impl ProviderAnswer {
    fn of(asked: &Asked<'_>) -> Result<Self, Failure> {
        if *asked.method != Method::GET {
            return Err(failed("the provider's answer was not sent with GET"));
        }
        let mut answer = Self { code: None, state: None, error: None, issuer: None };
        let query = asked.target.as_str().split_once('?').map_or("", |(_, query)| query);
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*name {
                "code" => &mut answer.code,
                "state" => &mut answer.state,
                "error" => &mut answer.error,
                "iss" => &mut answer.issuer,
                _ => continue,
            };
            // RFC 6749 §3.1.
            if place.replace(value.into_owned()).is_some() {
                return Err(failed(format!("the provider's answer has {name} twice")));
            }
        }
        Ok(answer)
    }

    fn state(&self, now: u64) -> Result<State, Failure> {
        let sealed = self.state.as_deref().ok_or_else(|| failed("the provider sent no state"))?;
        let state: State = STATES
            .open(STATE_PURPOSE, sealed)
            .ok_or_else(|| failed("this state is none of ours, or from before the agent was started"))?;
        if state.until < now {
            return Err(failed("it took too long"));
        }
        Ok(state)
    }
}

#[derive(Deserialize)]
struct Tokens {
    id_token: String,
    access_token: Option<String>,
}

/// A visitor's email, as one document of the provider has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Email {
    address: Option<String>,
    /// `None` where nothing is said that could be understood.
    verified: Option<bool>,
}

impl Email {
    fn of(claims: &Value) -> Self {
        Self {
            address: texts_of(claims, "email").into_iter().next(),
            // Some providers write it as a text. What is neither is no.
            verified: claims
                .get("email_verified")
                .filter(|value| !value.is_null())
                .map(|value| *value == true || *value == "true"),
        }
    }

    /// What the token says, completed by the userinfo endpoint. A word about one address is none about another.
    fn or(self, more: Self) -> Self {
        match (&self.address, self.verified) {
            (None, Some(false)) => Self { verified: Some(false), ..more },
            (None, _) => more,
            (Some(_), None) if self.address == more.address => Self { verified: more.verified, ..self },
            (Some(_), _) => self,
        }
    }
}

/// What a provider calls its error.
fn error_of(body: &Bytes) -> String {
    let error = serde_json::from_slice::<Value>(body).ok();
    let error = error.as_ref().and_then(|error| error.get("error")).and_then(Value::as_str);
    readable(error.unwrap_or("no reason given"))
}

/// What others wrote, for a log.
fn readable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MOST_ERROR_BYTES).collect()
}

fn is_this_machine(host: &str) -> bool {
    let name = host
        .rsplit_once(':')
        .map_or(host, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host });
    let is_loopback = |ip: std::net::IpAddr| ip.is_loopback();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.trim_matches(['[', ']']).parse().is_ok_and(is_loopback)
}

impl Provider {
    fn read(text: &[u8], issuer: &str, fetch: &Arc<Fetch>) -> Result<Self, String> {
        let metadata: Metadata =
            serde_json::from_slice(text).map_err(|error| format!("it describes no provider: {error}"))?;
        if metadata.issuer != issuer {
            return Err(format!("it calls itself {:?}: write issuer exactly so", readable(&metadata.issuer)));
        }
        let methods = metadata.token_endpoint_auth_methods_supported;
        let takes = |method: &str| methods.as_ref().is_some_and(|all| all.iter().any(|one| one == method));
        Ok(Self {
            authorization: metadata.authorization_endpoint.parse()?,
            token: metadata.token_endpoint.parse()?,
            userinfo: metadata.userinfo_endpoint.map(|url| url.parse()).transpose()?,
            keys: Remote::new(metadata.jwks_uri.parse()?, Arc::clone(fetch), read_keys),
            // What is not said means a field (OpenID Connect Discovery §3).
            secret_in_form: takes("client_secret_post") && !takes("client_secret_basic"),
            says_issuer: metadata.authorization_response_iss_parameter_supported,
        })
    }
}

impl Allowed {
    fn lets_in(&self, session: &Session) -> bool {
        let email = session.email.as_ref().map(|email| email.to_lowercase());
        let by_email = email.is_some_and(|email| {
            let domain = email.rsplit_once('@').map_or("", |(_, domain)| domain);
            self.emails.contains(&email) || self.domains.iter().any(|allowed| allowed == domain)
        });
        self.anyone || by_email || session.groups.iter().any(|group| self.groups.contains(group))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use proto::{header::Headers, target::Target};
    use serde_json::json;

    use super::*;
    use crate::serve::carried::Carried;

    const NOW: u64 = 1_000_000;

    fn rule(change: impl FnOnce(&mut OidcRule)) -> OidcRule {
        let mut rule = OidcRule {
            issuer: "http://127.0.0.1:1".parse().unwrap(),
            client_id: "web".to_owned(),
            client_secret: None,
            scopes: "openid".to_owned(),
            allow: Allowed {
                anyone: false,
                emails: Vec::new(),
                domains: vec!["example.com".to_owned()],
                groups: vec!["ops".to_owned()],
                groups_claim: "groups".to_owned(),
                verified_email: true,
            },
            callback_tunnel: None,
            session: Duration::from_secs(1000),
            session_key: None,
            certificates: None,
            except: Vec::new(),
        };
        change(&mut rule);
        rule
    }

    fn sign_in(rule: OidcRule) -> SignIn {
        let name = "web".parse().unwrap();
        SignIn::new(&name, rule, Carried::default().of(&name))
    }

    fn asking<T>(fields: &[(&'static str, String)], of: impl FnOnce(&Asked<'_>) -> T) -> T {
        let headers: Headers = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::try_from(value).unwrap()))
            .collect();
        let target = Target::parse("/").unwrap();
        of(&Asked { method: &Method::GET, target: &target, headers: &headers, upgrade: false })
    }

    #[test]
    fn a_session_counts_for_whom_the_rules_let_in_now() {
        let made = sign_in(rule(|_| ()));
        let session = |id: &str, email: Option<&str>, groups: &[&str]| {
            let session = Session {
                user: "ann".to_owned(),
                email: email.map(str::to_owned),
                groups: groups.iter().map(|&group| group.to_owned()).collect(),
                since: NOW,
                until: NOW + 1000,
                id: id.to_owned(),
            };
            format!("{}={}", made.session_cookie, made.sealer.seal(&made.purpose, &session).unwrap())
        };
        let cookie = session("1", Some("ann@example.com"), &["ops"]);
        let user = |sign_in: &SignIn, cookie: &str, prefix: &str, now| {
            let fields = [("cookie", cookie.to_owned()), ("x-forwarded-prefix", prefix.to_owned())];
            asking(&fields, |asked| sign_in.user(asked, now))
        };
        assert_eq!(user(&made, &cookie, "", NOW).as_deref(), Some("ann"));
        assert_eq!(user(&made, &cookie, "", NOW + 1000), None);
        assert_eq!(user(&made, &cookie, "/web", NOW), None, "all tunnels are one origin there");
        let later =
            |change: fn(&mut OidcRule), cookie: &str, now| user(&sign_in(rule(change)), cookie, "", now);
        assert!(later(|rule| rule.allow.groups = vec!["dev".to_owned()], &cookie, NOW).is_some());
        let nobody: fn(&mut OidcRule) = |rule| {
            rule.allow.groups = vec!["dev".to_owned()];
            rule.allow.domains.clear();
        };
        assert_eq!(later(nobody, &cookie, NOW), None);
        // What was read in another way says nothing about these.
        assert_eq!(later(|rule| rule.allow.verified_email = false, &cookie, NOW), None);
        assert_eq!(later(|rule| rule.allow.groups_claim = "roles".to_owned(), &cookie, NOW), None);
        // A shorter session ends the ones that there are, and a longer one does not lengthen them.
        let short: fn(&mut OidcRule) = |rule| rule.session = Duration::from_secs(10);
        assert!(later(short, &cookie, NOW + 9).is_some() && later(short, &cookie, NOW + 10).is_none());
        assert_eq!(later(|rule| rule.session = Duration::from_secs(5000), &cookie, NOW + 1000), None);
        // Of two the one that lets in counts, whichever stands first; signing out ends both.
        let useless = session("2", Some("ann@evil.test"), &[]);
        let both = format!("{useless}; {cookie}");
        assert!(user(&made, &both, "", NOW).is_some() && user(&made, &useless, "", NOW).is_none());
        // But not for another origin's page, which may be one of the same site.
        for site in ["cross-site", "same-site"] {
            let fields = [("cookie", both.clone()), ("sec-fetch-site", site.to_owned())];
            let answer = asking(&fields, |asked| made.sign_out(asked, NOW));
            assert!(answer.fields.iter().all(|(name, _)| name != header::SET_COOKIE), "{site}");
            assert!(user(&made, &both, "", NOW).is_some(), "{site}");
        }
        let own = [("cookie", both.clone()), ("sec-fetch-site", "same-origin".to_owned())];
        asking(&own, |asked| made.sign_out(asked, NOW));
        assert_eq!((user(&made, &both, "", NOW), user(&made, &cookie, "", NOW)), (None, None));
    }

    #[test]
    fn an_email_counts_where_the_provider_calls_that_very_one_verified() {
        for (token, userinfo, address, verified) in [
            (json!({ "email": "a@x", "email_verified": true }), json!({}), Some("a@x"), Some(true)),
            (json!({ "email": "a@x", "email_verified": "true" }), json!({}), Some("a@x"), Some(true)),
            (
                json!({ "email": "a@x" }),
                json!({ "email": "a@x", "email_verified": true }),
                Some("a@x"),
                Some(true),
            ),
            (
                json!({ "email": "a@x" }),
                json!({ "email": "a@x", "email_verified": "true" }),
                Some("a@x"),
                Some(true),
            ),
            (
                json!({ "email": "a@x", "email_verified": null }),
                json!({ "email": "a@x", "email_verified": true }),
                Some("a@x"),
                Some(true),
            ),
            (json!({}), json!({ "email": "a@x", "email_verified": "true" }), Some("a@x"), Some(true)),
            (json!({ "email": "a@x" }), json!({}), Some("a@x"), None),
            (json!({ "email": "a@x" }), json!({ "email": "b@x", "email_verified": true }), Some("a@x"), None),
            (json!({ "email": "a@x" }), json!({ "email_verified": true }), Some("a@x"), None),
            (
                json!({ "email": "a@x" }),
                json!({ "email": "a@x", "email_verified": "false" }),
                Some("a@x"),
                Some(false),
            ),
            (
                json!({ "email": "a@x" }),
                json!({ "email": "a@x", "email_verified": 1 }),
                Some("a@x"),
                Some(false),
            ),
            (
                json!({ "email": "a@x" }),
                json!({ "email": "a@x", "email_verified": ["true"] }),
                Some("a@x"),
                Some(false),
            ),
            (
                json!({ "email": "a@x", "email_verified": false }),
                json!({ "email": "a@x", "email_verified": true }),
                Some("a@x"),
                Some(false),
            ),
            (
                json!({ "email_verified": false }),
                json!({ "email": "a@x", "email_verified": true }),
                Some("a@x"),
                Some(false),
            ),
            (json!({ "email_verified": true }), json!({ "email": "a@x" }), Some("a@x"), None),
            (json!({}), json!({}), None, None),
        ] {
            let email = Email::of(&token).or(Email::of(&userinfo));
            let wanted = Email { address: address.map(str::to_owned), verified };
            assert_eq!(email, wanted, "{token} {userinfo}");
        }
    }
}
