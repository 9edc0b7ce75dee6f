//! An endpoint of AWS before that of `local`, for one function: it does to single calls what AWS does to them on bad days.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::sync::Semaphore;

use crate::{
    Local,
    client::Request,
    upstream::{Conn, Recorded, Upstream},
};

/// What becomes of a call.
#[derive(Debug, Clone)]
pub enum Fate {
    /// It is carried out and answered.
    Done,
    /// It is refused with this status and the name of an error, and not carried out.
    Refused(u16, &'static str),
    /// It is not carried out, and its connection ends without an answer.
    Broken,
    /// It is carried out, and its connection ends without an answer.
    Unanswered,
    /// It is carried out, however long that takes, and its connection ends without an answer once there is a permit; this
    /// one tells that it has come.
    Lost(Arc<Held>),
    /// It is carried out and answered once there is a permit, if its caller is still there; this one tells that it has come.
    Held(Arc<Held>),
}

/// A call that waits.
#[derive(Debug)]
pub struct Held {
    /// Has a permit for each that has come.
    pub come: Semaphore,
    /// Gives each that goes on a permit.
    pub go_on: Semaphore,
    /// Has a permit for each whose caller has gone meanwhile.
    pub gone: Semaphore,
}

impl Default for Held {
    fn default() -> Self {
        Self { come: Semaphore::new(0), go_on: Semaphore::new(0), gone: Semaphore::new(0) }
    }
}

type Decide = Box<dyn FnMut(&str, &str) -> Fate + Send>;

/// The endpoint. It ends with this value.
pub struct Calls {
    upstream: Upstream,
    decide: Arc<Mutex<Decide>>,
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").finish_non_exhaustive()
    }
}

impl Calls {
    /// Puts one before the calls of a function, which lets everything through.
    pub async fn of(local: &Local, function: &str) -> Self {
        let decide: Arc<Mutex<Decide>> = Arc::new(Mutex::new(Box::new(|_, _| Fate::Done)));
        let (shared, endpoint) = (Arc::clone(&decide), local.endpoint);
        let upstream = Upstream::start(move |request, conn| {
            let target = request.all("x-amz-target").pop().unwrap_or_default();
            let operation = target.rsplit('.').next().unwrap_or_default();
            let fate = (shared.lock().unwrap())(operation, &String::from_utf8_lossy(&request.body));
            carry_out(fate, request, conn, endpoint)
        })
        .await;
        let mut variables = local.variables(function).await;
        variables["AWS_ENDPOINT_URL"] = format!("http://{}", upstream.address()).into();
        local.deploy(function, &variables).await;
        Self { upstream, decide }
    }

    /// From now on `decide` says what becomes of a call, by the name of its operation and its body.
    pub fn decide(&self, decide: impl FnMut(&str, &str) -> Fate + Send + 'static) {
        *self.decide.lock().unwrap() = Box::new(decide);
    }

    /// How many calls have come that `is_one` takes, by their operations and bodies.
    #[must_use]
    pub fn count(&self, is_one: impl Fn(&str, &str) -> bool) -> usize {
        self.upstream.look(|calls| {
            let is_one = |call: &&Recorded| {
                let target = call.all("x-amz-target").pop().unwrap_or_default();
                let operation = target.rsplit('.').next().unwrap_or_default();
                is_one(operation, &String::from_utf8_lossy(&call.body))
            };
            calls.iter().filter(is_one).count()
        })
    }
}

async fn carry_out(fate: Fate, call: Recorded, mut conn: Conn, endpoint: SocketAddr) -> Option<Conn> {
    match &fate {
        Fate::Refused(status, name) => {
            let body = format!(r#"{{"__type":"{name}","message":"on demand"}}"#);
            let fields = "Content-Type: application/x-amz-json-1.0\r\n";
            return conn.answer(&format!("{status} Refused"), fields, body.as_bytes()).await.then_some(conn);
        }
        Fate::Broken => return None,
        Fate::Held(held) => {
            held.come.add_permits(1);
            tokio::select! {
                permit = held.go_on.acquire() => permit.unwrap().forget(),
                // Whoever called is dead: as if it had never called.
                () = conn.closed() => {
                    held.gone.add_permits(1);
                    return None;
                }
            }
        }
        Fate::Done | Fate::Unanswered | Fate::Lost(_) => {}
    }
    let method = call.line.split(' ').next().unwrap();
    let mut request = Request::new(method, call.target()).field("Host", &endpoint.to_string());
    for (name, value) in &call.fields {
        if !["host", "content-length", "connection"].contains(&name.to_ascii_lowercase().as_str()) {
            request = request.raw_field(name, value);
        }
    }
    let request = request.body(call.body.clone());
    if let Fate::Lost(held) = &fate {
        held.come.add_permits(1);
        // Not ended with the caller's connection.
        tokio::spawn(async move { request.send(endpoint).await });
        held.go_on.acquire().await.unwrap().forget();
        return None;
    }
    let answer = tokio::select! {
        answer = request.send(endpoint) => answer,
        // Whoever called waits no more.
        () = conn.closed() => return None,
    };
    if matches!(fate, Fate::Unanswered) {
        return None;
    }
    let fields: String = answer
        .fields
        .iter()
        .filter(|(name, _)| {
            !["content-length", "transfer-encoding", "connection"]
                .contains(&name.to_ascii_lowercase().as_str())
        })
        .map(|(name, value)| format!("{name}: {}\r\n", String::from_utf8_lossy(value)))
        .collect();
    conn.answer(&format!("{} Answered", answer.status), &fields, &answer.body).await.then_some(conn)
}
