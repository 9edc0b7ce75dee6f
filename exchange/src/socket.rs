//! One public WebSocket, from the agent's first word to the close.
//!
//! The run has brought the handshake to an agent. Its first word is `accepted`, or anything else that an ordinary
//! request may get: a refusal is handed on as it is. After `accepted` one loop carries messages between the public
//! side and a [`Flow`]; the connection to the agent may change under it.
//!
//! However it ends, each side is told by a close: what the other side said where it said something, 1012 where
//! it vanished or something was lost, so that clients come again.

use std::{future::poll_fn, time::Duration};

use edge::{
    Error,
    agent_link::Posted,
    mailbox::Letter,
    metrics::{Line, Metric},
};
use futures_util::{
    FutureExt as _, SinkExt as _, StreamExt as _,
    future::{LocalBoxFuture, OptionFuture},
    stream::FuturesUnordered,
};
use proto::{
    body::{Codec, Codecs},
    id::{ConnectionId, RequestId, TunnelName},
    limits,
    message::{Accepted, AgentMessage, Cancel, EdgeMessage, Envelope as Tag},
    socket::{CLOSE_RESTART, Close, Envelope, Flow, FlowError, Message, Pace, Settings, patience},
};
use tokio::time::{Instant, sleep_until};

use crate::{Services, budget::Share, inbox::Mail, pick, public::SocketError, record::Record};

/// How many batches are posted to the agent at the same time. It puts them in order.
const POSTS: usize = 4;

/// Try again later: there is no room now.
const TRY_LATER: u16 = 1013;

/// A message is longer than may be.
const TOO_LONG: u16 = 1009;

/// What ends a WebSocket whose client answers no ping (1011, as clients do that are left without an answer).
const SILENT: u16 = 1011;

/// How long a batch is tried to be posted while AWS has no room for it.
const POSTED_WITHIN: Duration = Duration::from_secs(30);

/// How long a violation is kept from the client that committed it: what was sent before it is answered first.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

/// Posts to an agent, again for as long as AWS certainly had no room for it.
async fn post(
    services: &Services,
    request_id: &RequestId,
    connection: &ConnectionId,
    text: String,
) -> Result<Posted, Error> {
    until_taken(pick(request_id), async || services.link.post_text(connection, text.clone()).await).await
}

/// `random`, in `[0, 1)`, has those that are refused together not come back together.
async fn until_taken(
    random: f64,
    mut post: impl AsyncFnMut() -> Result<Posted, Error>,
) -> Result<Posted, Error> {
    let give_up = Instant::now() + POSTED_WITHIN;
    let mut pause = Duration::from_millis(100);
    loop {
        match post().await {
            Err(Error::Throttled { .. }) if Instant::now() + pause < give_up => {
                tokio::time::sleep(pause.mul_f64(f64::midpoint(1.0, random))).await;
                pause = (pause * 2).min(Duration::from_secs(3));
            }
            result => return result,
        }
    }
}

async fn cancel(services: &Services, request_id: &RequestId, connection: &ConnectionId) {
    let cancel = EdgeMessage::Cancel(Cancel { request_id: request_id.clone() });
    if let Err(error) = post(services, request_id, connection, cancel.encode()).await {
        tracing::warn!(%request_id, %error, "agent was not told");
    }
}

/// What an exchange says about the WebSocket that it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holding {
    /// It is open, and its agent is at this connection.
    Held(RequestId, ConnectionId),
    /// It is over, and its agent has been told.
    Over(RequestId),
}

/// What the agent says first.
pub(crate) enum FirstWord {
    /// The upstream opened a WebSocket; the mark of the agent's owner; and what came beside that word.
    Accepted(Accepted<'static>, Option<String>, Vec<Letter>),
    /// Something else, among these.
    Other(Vec<Letter>),
}

/// A handshake that was dispatched.
pub(crate) struct Handshake<'a, M> {
    pub(crate) mail: &'a M,
    pub(crate) request_id: &'a RequestId,
    pub(crate) connection: &'a ConnectionId,
}

impl<M: Mail> Handshake<'_, M> {
    /// Waits for the agent's first word. Batches may overtake it.
    pub(crate) async fn first_word(&self, first: Vec<Letter>, by: Instant) -> FirstWord {
        let mut early = Vec::new();
        let mut letters = first;
        loop {
            let mut taken = std::mem::take(&mut letters).into_iter();
            while let Some(letter) = taken.next() {
                if !is_from(&letter, self.request_id, self.connection) {
                    // Its own end: whoever reads an ordinary answer knows what to make of it.
                    if letter.lost_connection.as_deref() == Some(self.connection.as_str()) {
                        early.push(letter);
                        return FirstWord::Other(early);
                    }
                    continue;
                }
                match Tag::peek(&letter.body).map(|tag| tag.kind.into_owned()) {
                    Ok(kind) if kind == "frames" => early.push(letter),
                    Ok(kind) if kind == "accepted" => {
                        if let Ok(AgentMessage::Accepted(accepted)) = AgentMessage::decode(&letter.body) {
                            // Batches may come in the same breath.
                            early.extend(taken);
                            return FirstWord::Accepted(into_owned(accepted), letter.owner, early);
                        }
                        return FirstWord::Other(vec![letter]);
                    }
                    _ => {
                        let mut others = vec![letter];
                        others.extend(taken);
                        return FirstWord::Other(others);
                    }
                }
            }
            let wait = by.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return FirstWord::Other(Vec::new());
            }
            match self.mail.receive(wait.min(limits::MAILBOX_WAIT)).await {
                Ok(some) => letters = some,
                Err(error) => {
                    tracing::warn!(request_id = %self.request_id, %error, "mailbox could not be read");
                    return FirstWord::Other(Vec::new());
                }
            }
        }
    }
}

fn into_owned(accepted: Accepted<'_>) -> Accepted<'static> {
    let Accepted { token, subprotocol, headers, codecs } = accepted;
    Accepted {
        token: token.into_owned().into(),
        subprotocol: subprotocol.map(|one| one.into_owned().into()),
        headers,
        codecs,
    }
}

fn is_from(letter: &Letter, request_id: &RequestId, connection: &ConnectionId) -> bool {
    letter.request_id.as_deref() == Some(request_id.as_str()) && came_over(letter, connection)
}

fn came_over(letter: &Letter, connection: &ConnectionId) -> bool {
    letter.connection_id.as_deref().is_none_or(|sender| sender == connection.as_str())
}

/// Whether a letter is of the agent that has a WebSocket: it came over the agent's connection, or another one of the same
/// owner. The agent may replace its connection at any time, and what it says over the old one and the new one comes in no
/// order. Where a `response` of an earlier release names no owner, whoever may serve the tunnel is believed.
fn is_of_agent(letter: &Letter, connection: &ConnectionId, owner: Option<&str>) -> bool {
    came_over(letter, connection) || letter.owner.as_deref() == owner
}

/// What is known of a WebSocket that the upstream has opened.
pub(crate) struct Socket {
    pub(crate) connection: ConnectionId,
    /// The mark of the agent's owner.
    pub(crate) owner: Option<String>,
    pub(crate) token: String,
    pub(crate) codecs: Codecs,
    pub(crate) early: Vec<Letter>,
    pub(crate) share: Share,
}

/// How a WebSocket ended, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Both sides have said so.
    Closed,
    /// The public side vanished.
    ClientGone,
    /// The agent vanished.
    AgentLost,
    /// Something was lost on the link, or made no sense.
    Broken,
    /// The upstream sent a message that is longer than may be.
    TooLong,
    /// More of what the agent says would have to be held than there is room for.
    TooMuch,
    /// The agent said that it is over.
    AgentEnded,
    /// It grew too old, or this process ends.
    Restart,
}

#[derive(Debug, Default)]
struct Traffic {
    messages: u64,
    bytes: u64,
}

impl Traffic {
    fn count(&mut self, message: &Message) {
        if !matches!(message, Message::Close(_)) {
            self.messages += 1;
            self.bytes += message.len() as u64;
        }
    }
}

enum Posting {
    Done,
    /// The connection has gone; the same batch may be posted to another one.
    Gone(ConnectionId, String),
    Failed,
}

impl Socket {
    /// Tells the agent that nobody wants the WebSocket any more.
    pub(crate) async fn give_up(&self, services: &Services, request_id: &RequestId) {
        cancel(services, request_id, &self.connection).await;
    }

    /// Carries messages until both sides have closed, or one is gone.
    pub(crate) async fn run<S, M>(
        self,
        services: &Services,
        mail: &M,
        request_id: &RequestId,
        tunnel: &TunnelName,
        public: S,
        record: &Record,
    ) where
        S: futures_util::Stream<Item = Result<Message, SocketError>>
            + futures_util::Sink<Message, Error = SocketError>
            + Unpin,
        M: Mail,
    {
        let begun = Instant::now();
        let mut line = Line::begin();
        line.add(Metric::SocketsOpened, 1.0);
        line.member("request_id", request_id.as_str());
        line.member("tunnel_id", tunnel.as_str());
        line.write();
        record.opened();
        say(services, || Holding::Held(request_id.clone(), self.connection.clone()));

        let settings = Settings {
            message_bytes: services.config.socket_message_bytes,
            pace: Pace { interval: limits::SOCKET_EDGE_INTERVAL, burst: limits::SOCKET_BURST },
            codec: self.codecs.has(Codec::Zstd).then_some(Codec::Zstd),
            ask_after: None,
        };
        let mut pump = Pump {
            services,
            request_id,
            connection: self.connection,
            owner: self.owner,
            token: self.token,
            flow: Flow::new(settings, Instant::now().into_std()),
            posts: FuturesUnordered::new(),
            unposted: Vec::new(),
            lost_at: None,
            share: self.share,
            up: Traffic::default(),
            down: Traffic::default(),
            code: None,
        };
        let end = pump.run(mail, public, self.early).await;
        let Pump { up, down, code, connection, .. } = pump;
        if end != End::Closed && end != End::AgentLost && end != End::AgentEnded {
            // Seldom, and larger than all the rest of this future.
            Box::pin(cancel(services, request_id, &connection)).await;
        }
        say(services, || Holding::Over(request_id.clone()));
        let elapsed = begun.elapsed();
        tracing::info!(
            %request_id, tunnel_id = %tunnel, reason = ?end, code, elapsed_ms = elapsed.as_millis() as u64,
            messages_in = up.messages, bytes_in = up.bytes, messages_out = down.messages, bytes_out = down.bytes,
            "websocket ended"
        );
        let mut line = Line::begin();
        line.add(Metric::SocketSeconds, elapsed.as_secs_f64());
        if matches!(end, End::Broken | End::AgentLost) {
            line.add(Metric::SocketsLost, 1.0);
        }
        line.add(Metric::SocketMessages, (up.messages + down.messages) as f64);
        line.member("request_id", request_id.as_str());
        line.member("tunnel_id", tunnel.as_str());
        line.write();
    }
}

fn say(services: &Services, what: impl FnOnce() -> Holding) {
    if let Some(holdings) = &services.holdings {
        // Who listens may be gone; then this process drains.
        let _ = holdings.send(what());
    }
}

struct Pump<'a> {
    services: &'a Services,
    request_id: &'a RequestId,
    connection: ConnectionId,
    owner: Option<String>,
    token: String,
    flow: Flow,
    posts: FuturesUnordered<LocalBoxFuture<'a, Posting>>,
    /// Batches whose connection has gone.
    unposted: Vec<String>,
    /// When the agent counts as lost unless it says where it has moved to.
    lost_at: Option<Instant>,
    share: Share,
    up: Traffic,
    down: Traffic,
    code: Option<u16>,
}

impl<'a> Pump<'a> {
    async fn run<S, M>(&mut self, mail: &M, public: S, early: Vec<Letter>) -> End
    where
        S: futures_util::Stream<Item = Result<Message, SocketError>>
            + futures_util::Sink<Message, Error = SocketError>
            + Unpin,
        M: Mail,
    {
        let (mut sink, mut stream) = public.split();
        let ends_at = Instant::now() + limits::SOCKET_LIFETIME;
        let mut letters = Some(early);
        let mut receiving = None;
        let mut outgoing: Option<Message> = None;
        // How many bytes of the last message the public side has not taken.
        let mut unflushed_bytes = 0;
        let mut unflushed = false;
        let mut public_ended = false;
        let mut violation: Option<u16> = None;
        // When whoever has closed waits no longer for the other.
        let mut close_by: Option<Instant> = None;
        let end = loop {
            let now = Instant::now();
            for letter in letters.take().into_iter().flatten() {
                match self.take(letter) {
                    Ok(None) => {}
                    Ok(Some(end)) => {
                        if self.flow.is_closed() {
                            continue;
                        }
                        // What came before that word still goes out.
                        close_by.get_or_insert(now);
                        if end != End::AgentEnded {
                            return self.finish(end, &mut sink, violation).await;
                        }
                    }
                    Err(error) => return self.break_off(error, &mut sink, violation).await,
                }
            }
            if public_ended {
                outgoing = None;
            }
            let going = outgoing.as_ref().map_or(0, Message::len) + unflushed_bytes;
            if !self.share.hold(self.flow.held() + going) {
                tracing::warn!(request_id = %self.request_id, "websocket was closed: too much is held for all of them");
                return self.finish(End::TooMuch, &mut sink, Some(TRY_LATER)).await;
            }
            if outgoing.is_none() {
                outgoing = match self.flow.poll_message(now.into_std()) {
                    Ok(message) => message,
                    Err(error) => return self.break_off(error, &mut sink, violation).await,
                };
                if let Some(Message::Close(close)) = &outgoing {
                    self.code = close.as_ref().map(|close| close.code);
                    close_by.get_or_insert(now + patience(unflushed_bytes));
                    if let Some(code) = violation {
                        // Everything that was said before its violation has been answered.
                        outgoing = Some(Message::Close(Some(Close::new(code, ""))));
                    }
                }
                if public_ended && outgoing.take().is_some() {
                    continue;
                }
            }
            self.transmit();
            if self.flow.is_closed()
                && outgoing.is_none()
                && !unflushed
                && public_ended
                && self.flow.is_sent()
                && self.posts.is_empty()
            {
                break End::Closed;
            }
            let deliver = outgoing.is_some() && !public_ended;
            let flow_wake = self.flow.poll_timeout(now.into_std()).map(Instant::from_std);
            // While posts are under way nothing more is sent anyway: their end wakes this loop.
            let flow_wake = flow_wake.filter(|&at| at > now || self.posts.len() < POSTS);
            if receiving.is_none() {
                receiving = Some(Box::pin(mail.receive(limits::MAILBOX_WAIT)));
            }
            tokio::select! {
                biased;
                Some(taken) = OptionFuture::from(receiving.as_mut()) => {
                    receiving = None;
                    match taken {
                        Ok(taken) => letters = Some(taken),
                        Err(error) => {
                            tracing::info!(request_id = %self.request_id, %error, "websocket ends with its process");
                            break End::Restart;
                        }
                    }
                }
                Some(done) = self.posts.next() => match done {
                    Posting::Done => {}
                    Posting::Gone(connection, text) => {
                        self.unposted.push(text);
                        if connection == self.connection {
                            self.lost_at.get_or_insert(now + limits::LOST_DELAY);
                        } else {
                            self.repost();
                        }
                    }
                    Posting::Failed => break End::Broken,
                },
                ready = poll_fn(|cx| if deliver { sink.poll_ready_unpin(cx) } else { sink.poll_flush_unpin(cx) }),
                    if deliver || unflushed =>
                {
                    let sent = ready.and_then(|()| match outgoing.take() {
                        Some(message) => {
                            self.down.count(&message);
                            unflushed_bytes = message.len();
                            unflushed = true;
                            sink.start_send_unpin(message)
                        }
                        None => {
                            (unflushed, unflushed_bytes) = (false, 0);
                            Ok(())
                        }
                    });
                    if sent.is_err() {
                        (unflushed, unflushed_bytes) = (false, 0);
                        public_ended = true;
                    }
                }
                // After its close a client is heard until it ends the connection.
                next = stream.next(), if !public_ended && violation.is_none()
                    && (self.flow.wants_more() || self.flow.is_closing()) =>
                {
                    let mut next = Some(next);
                    while let Some(item) = next.take() {
                        match item {
                            Some(Ok(message)) => {
                                self.up.count(&message);
                                if let Message::Close(close) = &message {
                                    self.code = self.code.or(close.as_ref().map(|close| close.code));
                                    close_by.get_or_insert(now + patience(self.flow.untaken()));
                                }
                                self.flow.send(message);
                                // What is there at the same time travels together.
                                if self.flow.wants_more() {
                                    next = stream.next().now_or_never();
                                }
                            }
                            Some(Err(SocketError::Violation(code))) => {
                                violation = Some(code);
                                self.code = Some(code);
                                self.flow.send(Message::Close(Some(Close::new(1001, "the client broke a rule"))));
                                close_by.get_or_insert(now + ANSWERED_WITHIN);
                            }
                            Some(Err(SocketError::Silent)) => {
                                violation = Some(SILENT);
                                self.code = Some(SILENT);
                                self.flow.send(Message::Close(Some(Close::new(1001, "the client answers nothing"))));
                                close_by.get_or_insert(now + ANSWERED_WITHIN);
                            }
                            Some(Err(SocketError::Gone)) | None => public_ended = true,
                        }
                    }
                }
                () = sleep_until(flow_wake.unwrap_or(ends_at)), if flow_wake.is_some() => {
                    if let Err(FlowError::Lost) = self.flow.handle_timeout(Instant::now().into_std()) {
                        tracing::error!(request_id = %self.request_id, "a message of a websocket was lost");
                        break End::Broken;
                    }
                }
                () = sleep_until(self.lost_at.unwrap_or(ends_at)), if self.lost_at.is_some() => break End::AgentLost,
                () = sleep_until(close_by.unwrap_or(ends_at)), if close_by.is_some() => {
                    break if self.flow.is_closed() { End::Closed } else { End::AgentEnded };
                }
                () = sleep_until(ends_at) => break End::Restart,
            }
            if public_ended && !self.flow.is_closing() {
                // It vanished without a word.
                self.flow.send(Message::Close(Some(Close::new(1001, "the client has gone"))));
                close_by.get_or_insert(Instant::now() + patience(self.flow.untaken()));
                self.code = self.code.or(Some(1006));
            }
        };
        self.finish(end, &mut sink, violation).await
    }

    async fn break_off<K>(&mut self, error: FlowError, sink: &mut K, violation: Option<u16>) -> End
    where
        K: futures_util::Sink<Message, Error = SocketError> + Unpin,
    {
        tracing::warn!(request_id = %self.request_id, %error, "websocket was broken off");
        match error {
            FlowError::TooLong => self.finish(End::TooLong, sink, violation.or(Some(TOO_LONG))).await,
            FlowError::Lost | FlowError::Invalid(_) => self.finish(End::Broken, sink, violation).await,
        }
    }

    /// Has the public side closed and what is under way sent.
    async fn finish<K>(&mut self, end: End, sink: &mut K, violation: Option<u16>) -> End
    where
        K: futures_util::Sink<Message, Error = SocketError> + Unpin,
    {
        if end != End::Closed && end != End::ClientGone {
            let close = match violation {
                Some(code) => Close::new(code, ""),
                None => Close::new(CLOSE_RESTART, "the tunnel was interrupted"),
            };
            self.code = self.code.or(Some(close.code));
            let closing = async {
                let _ = sink.send(Message::Close(Some(close))).await;
                let _ = sink.close().await;
            };
            let _ = tokio::time::timeout(limits::SOCKET_CLOSE, closing).await;
        } else {
            let _ = tokio::time::timeout(limits::SOCKET_CLOSE, sink.close()).await;
        }
        while self.posts.next().await.is_some() {}
        end
    }

    fn transmit(&mut self) {
        while self.posts.len() < POSTS && self.lost_at.is_none() {
            let now = Instant::now().into_std();
            let Some(text) = self.flow.poll_transmit(Envelope::Agent(self.request_id), now) else { return };
            self.post(text);
        }
    }

    fn post(&self, text: String) {
        let (services, connection, request_id) = (self.services, self.connection.clone(), self.request_id);
        self.posts.push(
            async move {
                match post(services, request_id, &connection, text.clone()).await {
                    Ok(Posted::Accepted) => Posting::Done,
                    Ok(Posted::Gone) => Posting::Gone(connection, text),
                    Err(error) => {
                        tracing::warn!(%request_id, %error, "a message of a websocket was not sent on");
                        Posting::Failed
                    }
                }
            }
            .boxed_local(),
        );
    }

    fn repost(&mut self) {
        for text in std::mem::take(&mut self.unposted) {
            self.post(text);
        }
    }

    fn take(&mut self, letter: Letter) -> Result<Option<End>, FlowError> {
        if let Some(lost) = &letter.lost_connection {
            return Ok((lost == self.connection.as_str()).then_some(End::AgentLost));
        }
        if letter.request_id.as_deref() != Some(self.request_id.as_str()) {
            return Ok(None);
        }
        // `response` has seen that the sender may serve the tunnel. So may agents of other owners, and the token may have leaked.
        if !is_of_agent(&letter, &self.connection, self.owner.as_deref()) {
            tracing::warn!(request_id = %self.request_id, "a message of another owner's agent was dropped");
            return Ok(None);
        }
        let message = AgentMessage::decode(&letter.body).map_err(|error| {
            tracing::warn!(request_id = %self.request_id, %error, "agent's message is invalid");
            FlowError::Invalid("it cannot be read")
        })?;
        match message {
            AgentMessage::Frames(frames) => {
                if frames.token != self.token {
                    return Err(FlowError::Invalid("it is for another exchange"));
                }
                let moved = frames.moved;
                self.flow.receive(frames.batch(), Instant::now().into_std())?;
                if moved && let Some(connection) = letter.connection_id.and_then(|id| id.parse().ok()) {
                    self.connection = connection;
                    say(self.services, || Holding::Held(self.request_id.clone(), self.connection.clone()));
                    self.lost_at = None;
                    self.repost();
                    // The agent lets the old connection go once it has everything that was posted there.
                    self.flow.ask_now();
                }
                Ok(None)
            }
            AgentMessage::Failed(_) => Ok(Some(End::AgentEnded)),
            // The first word again.
            AgentMessage::Accepted(_) => Ok(None),
            AgentMessage::Hello(_)
            | AgentMessage::Heartbeat(_)
            | AgentMessage::Deliveries(_)
            | AgentMessage::Reply(_)
            | AgentMessage::Chunk(_)
            | AgentMessage::Continue(_)
            | AgentMessage::Progress(_) => Err(FlowError::Invalid("it is not said to a websocket")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use edge::Error;
    use proto::{header::Headers, id::MailboxId};

    use super::*;

    /// A mailbox with so many receives in it.
    struct Prepared(MailboxId, RefCell<Vec<Vec<Letter>>>);

    impl Mail for Prepared {
        fn mailbox(&self) -> &MailboxId {
            &self.0
        }

        fn queue_url(&self) -> Option<&str> {
            None
        }

        async fn receive(&self, _: Duration) -> Result<Vec<Letter>, Error> {
            Ok(self.1.borrow_mut().remove(0))
        }

        fn discard(&self, _: Vec<String>) -> Option<Vec<String>> {
            None
        }

        async fn delete(&self, _: Vec<String>) {}
    }

    #[tokio::test(start_paused = true)]
    async fn what_aws_has_no_room_for_is_posted_again_and_nothing_else_is() {
        let throttled = || Err(Error::Throttled { call: "PostToConnection" });
        let mut left = 5;
        let taken = until_taken(0.0, async || {
            left -= 1;
            if left > 0 { throttled() } else { Ok(Posted::Accepted) }
        });
        assert_eq!(taken.await.unwrap(), Posted::Accepted);
        let mut tries = 0;
        let failed = until_taken(0.9, async || {
            tries += 1;
            Err(Error::Failed { call: "PostToConnection", source: "no word".into() })
        });
        assert!(matches!(failed.await, Err(Error::Failed { .. })));
        assert_eq!(tries, 1, "it may have arrived");
        let begun = Instant::now();
        assert!(matches!(until_taken(0.0, async || throttled()).await, Err(Error::Throttled { .. })));
        assert!(begun.elapsed() <= POSTED_WITHIN, "{:?}", begun.elapsed());
    }

    fn id() -> RequestId {
        RequestId::from_random([1; 16])
    }

    fn letter(body: &str, lost: Option<&str>) -> Letter {
        Letter {
            receipt: String::new(),
            request_id: lost.is_none().then(|| id().as_str().to_owned()),
            connection_id: lost.is_none().then(|| "a=".to_owned()),
            owner: lost.is_none().then(|| "0a".to_owned()),
            lost_connection: lost.map(str::to_owned),
            sent_ms: None,
            body: body.to_owned(),
        }
    }

    async fn first_word(receives: Vec<Vec<Letter>>) -> Result<usize, usize> {
        let mail = Prepared("mailbox".parse().unwrap(), RefCell::new(receives));
        let (request_id, connection) = (id(), "a=".parse().unwrap());
        let handshake = Handshake { mail: &mail, request_id: &request_id, connection: &connection };
        match handshake.first_word(Vec::new(), Instant::now() + Duration::from_secs(9)).await {
            FirstWord::Accepted(_, owner, early) => {
                assert_eq!(owner.as_deref(), Some("0a"));
                Ok(early.len())
            }
            FirstWord::Other(letters) => Err(letters.len()),
        }
    }

    #[test]
    fn an_agent_is_known_by_its_connection_or_its_owner() {
        let connection: ConnectionId = "a=".parse().unwrap();
        for (sender, sender_owner, owner, is_own) in [
            ("a=", Some("0a"), Some("0a"), true),
            ("b=", Some("0a"), Some("0a"), true),
            ("b=", Some("0b"), Some("0a"), false),
            ("b=", None, Some("0a"), false),
            ("b=", Some("0b"), None, false),
            ("a=", None, None, true),
            ("b=", None, None, true),
        ] {
            let letter = Letter {
                connection_id: Some(sender.into()),
                owner: sender_owner.map(str::to_owned),
                ..letter("", None)
            };
            let seen = is_of_agent(&letter, &connection, owner);
            assert_eq!(seen, is_own, "{sender} {sender_owner:?} {owner:?}");
        }
    }

    #[tokio::test]
    async fn batches_before_and_behind_the_first_word_are_kept() {
        let accepted = AgentMessage::Accepted(Accepted {
            token: "t".into(),
            subprotocol: None,
            headers: Headers::new(),
            codecs: Codecs::default(),
        })
        .encode();
        let accepted = || letter(&accepted, None);
        let frames = || letter(r#"{"type":"frames","token":"t","seq":1,"frames":[{"kind":"text"}]}"#, None);
        let failed = || letter(r#"{"type":"failed","token":"t","seq":0,"code":"upstream_reset"}"#, None);
        assert_eq!(first_word(vec![vec![accepted(), frames(), frames()]]).await, Ok(2));
        assert_eq!(first_word(vec![vec![frames()], vec![frames(), accepted(), frames()]]).await, Ok(3));
        assert_eq!(first_word(vec![vec![letter("{}", Some("b="))], vec![accepted()]]).await, Ok(0));
        assert_eq!(first_word(vec![vec![letter("{}", Some("a="))]]).await, Err(1));
        assert_eq!(first_word(vec![vec![failed()]]).await, Err(1));
    }
}
