//! Clients that ask one thing after the other over connections that they keep while they can.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::oneshot, task::JoinSet, time::timeout};

use crate::{
    oracle::{Ask, Seen, Tally, Verdict, judge},
    scenario::Scenario,
    upstream::ID,
};

/// The name of the tunnel.
pub(crate) const TUNNEL: &str = "campaign";

/// Longer than anything may take: the time-out of a reply is 30 s, and a request may be dispatched again once.
const END: Duration = Duration::from_secs(90);

/// What came of each request.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) tally: Tally,
    pub(crate) verdicts: Vec<(Ask, Verdict)>,
}

/// Sends every request of a scenario. `moment` is told when as many have been answered as the fault waits for.
pub(crate) async fn load(scenario: &Scenario, to: SocketAddr, moment: oneshot::Sender<()>) -> Loaded {
    let next = Arc::new(AtomicUsize::new(0));
    let due = scenario.requests * scenario.at / 100;
    let ended = Arc::new((AtomicUsize::new(0), std::sync::Mutex::new(Some(moment))));
    let mut clients = JoinSet::new();
    for _ in 0..scenario.clients {
        let (scenario, next, ended) = (scenario.clone(), Arc::clone(&next), Arc::clone(&ended));
        clients.spawn(async move {
            let mut client = Client::new(to);
            let mut seen = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= scenario.requests {
                    return seen;
                }
                let ask = Ask::new(scenario.seed, index, scenario.shape);
                let came = client.ask(&ask).await;
                let verdict = judge(&ask, &came, scenario.strictness());
                if matches!(came, Seen::Nothing)
                    || matches!(&verdict, Verdict::Honest(code) if code.starts_with("503") || code.starts_with("404"))
                {
                    // Nobody hammers what is away, or the requests would be over before it is back.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                seen.push((ask, verdict));
                if ended.0.fetch_add(1, Ordering::Relaxed) + 1 >= due
                    && let Some(moment) = ended.1.lock().ok().and_then(|mut moment| moment.take())
                {
                    let _ = moment.send(());
                }
            }
        });
    }
    let mut loaded = Loaded::default();
    for (ask, verdict) in clients.join_all().await.into_iter().flatten() {
        loaded.tally.count(verdict.clone());
        loaded.verdicts.push((ask, verdict));
    }
    loaded
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    to: SocketAddr,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub(crate) const fn new(to: SocketAddr) -> Self {
        Self { to, sender: None }
    }

    /// Asks, and reads what comes to its end.
    pub(crate) async fn ask(&mut self, ask: &Ask) -> Seen {
        match timeout(END, self.exchange(ask)).await {
            Ok(Some(seen)) => seen,
            Ok(None) => {
                self.sender = None;
                Seen::Nothing
            }
            Err(_) => {
                self.sender = None;
                Seen::Late
            }
        }
    }

    async fn exchange(&mut self, ask: &Ask) -> Option<Seen> {
        let mut kept = self.sender.take();
        if let Some(sender) = &mut kept
            && sender.ready().await.is_err()
        {
            kept = None;
        }
        let mut sender = match kept {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let mut request =
            Request::builder().uri(ask.target()).header(header::HOST, format!("{TUNNEL}.localhost"));
        let mut body = Bytes::new();
        if ask.sent.is_some() {
            request = request.method("POST");
            body = ask.body().into();
        }
        let answer = sender.send_request(request.body(Full::new(body)).ok()?).await.ok()?;
        let field = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (code, id) = (field("x-tunnel-error"), field(ID).and_then(|id| id.parse().ok()));
        let status = answer.status().as_u16();
        let mut stream = answer.into_body();
        let mut body = Vec::new();
        let mut complete = true;
        while let Some(frame) = stream.frame().await {
            match frame {
                Ok(frame) => body.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Err(_) => {
                    complete = false;
                    break;
                }
            }
        }
        if complete {
            self.sender = Some(sender);
        }
        Some(Seen::Answer { status, code, id, body, complete })
    }

    async fn connect(&self) -> Option<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.to).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
        tokio::spawn(connection);
        Some(sender)
    }
}
