//! An agent that says exactly what a test tells it to, true or not.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use proto::{
    body::{Body, Codecs},
    header::Headers,
    message::{AgentMessage, Chunk, EdgeMessage, Hello, Progress, Reply, Request, VERSION, Welcome},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async_with_config,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        http::{HeaderValue, StatusCode, header::AUTHORIZATION},
        protocol::{
            WebSocketConfig,
            frame::{
                Frame,
                coding::{Data, OpCode},
            },
        },
    },
};

use crate::{PATIENCE, sockets, stack::Stack};

/// A WebSocket to the agents' side of the edge.
#[derive(Debug)]
pub struct RawAgent {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    id: String,
}

impl Drop for RawAgent {
    fn drop(&mut self) {
        sockets::hang_up(sockets::tcp(self.socket.get_ref()));
    }
}

impl RawAgent {
    /// Opens a connection with these credentials, or says with which status it was refused.
    pub async fn dial(stack: &impl AsRef<Stack>, authorization: Option<&str>) -> Result<Self, StatusCode> {
        let stack = stack.as_ref();
        let mut request = stack.agents().to_string().into_client_request().unwrap();
        if let Some(value) = authorization {
            request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        let stream = stack.dial_agents().await.unwrap();
        // Longer than what is allowed, so that it is the edge that minds.
        let config = WebSocketConfig::default().max_frame_size(Some(1 << 20)).max_message_size(Some(1 << 20));
        match timeout(PATIENCE, client_async_with_config(request, stream, Some(config))).await.unwrap() {
            Ok((socket, _)) => Ok(Self { socket, id: "raw".into() }),
            Err(Error::Http(response)) => Err(response.status()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Opens a connection with this token.
    pub async fn with(stack: &impl AsRef<Stack>, token: &str) -> Self {
        Self::dial(stack, Some(&format!("Bearer {token}"))).await.unwrap()
    }

    /// Gives the agent another id than all the others have.
    pub fn called(&mut self, id: &str) {
        id.clone_into(&mut self.id);
    }

    /// Opens a connection with the run's own token, and these tunnels on it.
    pub async fn open(stack: &impl AsRef<Stack>, tunnels: &[&str]) -> Self {
        let mut agent = Self::with(stack, &stack.as_ref().token()).await;
        agent.hello(tunnels).await;
        agent
    }

    /// Says `hello` and waits for a `welcome` that has every one of the tunnels.
    pub async fn hello(&mut self, tunnels: &[&str]) {
        let welcome = self.ask_for(tunnels).await;
        assert_eq!(welcome.tunnels.len(), tunnels.len(), "{:?}", welcome.refused);
    }

    /// Says `hello` and waits for the `welcome`, whatever it says.
    pub async fn ask_for(&mut self, tunnels: &[&str]) -> Welcome {
        let hello = Hello {
            seq: 1,
            version: VERSION,
            agent: self.id.parse().unwrap(),
            software: "test".into(),
            tunnels: tunnels.iter().map(|&name| name.to_owned()).collect(),
            codecs: Codecs::default(),
            websockets: false,
            deliveries: std::collections::BTreeMap::new(),
        };
        self.say(AgentMessage::Hello(hello)).await;
        self.welcome().await
    }

    /// Waits for a `welcome`, whatever it says.
    pub async fn welcome(&mut self) -> Welcome {
        loop {
            let text = self.hear().await;
            if let EdgeMessage::Welcome(welcome) = EdgeMessage::decode(&text).unwrap() {
                return welcome;
            }
        }
    }

    /// Sends a message.
    pub async fn say(&mut self, message: AgentMessage<'_>) {
        self.say_text(&message.encode()).await;
    }

    /// Sends a text, in frames that the edge takes.
    pub async fn say_text(&mut self, text: &str) {
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(proto::limits::FRAME_BYTES).collect();
        for (index, piece) in pieces.iter().enumerate() {
            let opcode = if index == 0 { Data::Text } else { Data::Continue };
            self.say_frame(opcode, piece, index + 1 == pieces.len()).await;
        }
    }

    /// Sends one frame; a failure shows in what is heard next.
    pub async fn say_frame(&mut self, opcode: Data, payload: &[u8], last: bool) {
        let frame = Frame::message(payload.to_vec(), OpCode::Data(opcode), last);
        drop(self.socket.send(Message::Frame(frame)).await);
    }

    /// The next text message.
    pub async fn hear(&mut self) -> String {
        loop {
            match timeout(PATIENCE, self.socket.next()).await.expect("a message in time") {
                Some(Ok(Message::Text(text))) => return text.to_string(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("not a message: {other:?}"),
            }
        }
    }

    /// Sends a ping; how long its pong took, if it came within `wait`.
    pub async fn ping(&mut self, wait: Duration) -> Option<Duration> {
        let begun = Instant::now();
        self.socket.send(Message::Ping("tunnel".into())).await.unwrap();
        let pong = async {
            while let Some(message) = self.socket.next().await {
                if matches!(message, Ok(Message::Pong(_))) {
                    return Some(begun.elapsed());
                }
            }
            None
        };
        timeout(wait, pong).await.ok().flatten()
    }

    /// How long the connection stays open, with nothing but a ping now and then said; `None` where it still is
    /// after `most`.
    pub async fn lasts(&mut self, most: Duration, ping_every: Option<Duration>) -> Option<Duration> {
        let begun = Instant::now();
        let mut pings = tokio::time::interval(ping_every.unwrap_or(most * 2));
        let over = tokio::time::sleep(most);
        let mut over = std::pin::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return None,
                message = self.socket.next() => if matches!(message, None | Some(Err(_) | Ok(Message::Close(_)))) {
                    return Some(begun.elapsed());
                },
                // A failure shows in what is read next.
                _ = pings.tick(), if ping_every.is_some() => drop(self.socket.send(Message::Ping("".into())).await),
            }
        }
    }

    /// The next public request; everything else before it is skipped.
    pub async fn request(&mut self) -> Call {
        loop {
            let text = self.hear().await;
            if let EdgeMessage::Request(request) = EdgeMessage::decode(&text).unwrap() {
                return Call::of(&request);
            }
        }
    }

    /// Waits for the `cancel` of a request.
    pub async fn cancelled(&mut self, call: &Call) {
        loop {
            let text = self.hear().await;
            if let EdgeMessage::Cancel(cancel) = EdgeMessage::decode(&text).unwrap() {
                assert_eq!(cancel.request_id.as_str(), call.request_id);
                return;
            }
        }
    }

    /// The code with which the edge closes the connection; `None` where it is cut.
    pub async fn closed(&mut self) -> Option<u16> {
        loop {
            match timeout(PATIENCE, self.socket.next()).await.expect("an end in time") {
                Some(Ok(Message::Close(frame))) => return frame.map(|frame| frame.code.into()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    }
}

/// A public request, as much of it as a test needs.
#[derive(Debug, Clone)]
pub struct Call {
    /// Its id.
    pub request_id: String,
    /// The task token to answer with.
    pub token: String,
    /// The request-target.
    pub target: String,
}

impl Call {
    fn of(request: &Request<'_>) -> Self {
        Self {
            request_id: request.request_id.as_str().to_owned(),
            token: request.token.to_string(),
            target: request.target.as_str().to_owned(),
        }
    }

    /// A `reply` of status 200 with this body.
    #[must_use]
    pub fn reply<'a>(&'a self, body: &'a str, end: bool) -> AgentMessage<'a> {
        AgentMessage::Reply(Reply {
            token: self.token.as_str().into(),
            status: 200,
            headers: Headers::new(),
            body: Some(Body::Text(body.into())),
            end,
        })
    }

    /// A `progress` that says this.
    #[must_use]
    pub fn progress(&self, sent: u32, ended: bool) -> AgentMessage<'_> {
        AgentMessage::Progress(Progress { token: self.token.as_str().into(), sent, ended, taken: 0 })
    }

    /// A `chunk` with this body.
    #[must_use]
    pub fn chunk<'a>(&'a self, seq: u32, body: &'a str, end: bool) -> AgentMessage<'a> {
        AgentMessage::Chunk(Chunk {
            token: self.token.as_str().into(),
            seq,
            body: Some(Body::Text(body.into())),
            end,
        })
    }
}
