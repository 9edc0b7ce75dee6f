//! One event of Lambda, answered through an exchange.

use std::{pin::pin, time::Duration};

use edge::unix_now_ms;
use exchange::{
    Services, answer,
    budget::{Budget, Share},
    http::carry,
    inbox::{Inbox, Own},
    public::{Head, NoSocket, Piece, Pieces, PublicSide},
    record::Record,
    route::{PublicRequest, Websockets, route},
};
use proto::{error::ErrorCode, header::Headers, id::RequestId, limits};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    answer::prelude,
    config::{Config, is_too_long},
    event::FrontEvent,
    runtime::{Answer, Invocation, Runtime},
};

/// What is kept free before Lambda's own deadline, to break an answer off in an orderly way.
const DEADLINE_MARGIN: Duration = Duration::from_secs(3);

/// Answers one event, and returns the mailbox, its lease renewed if need be.
///
/// # Errors
///
/// When no mailbox can be had any more; the process should end then.
pub async fn serve(
    services: &Services,
    config: &Config,
    runtime: &Runtime,
    invocation: Invocation,
    inbox: Inbox,
) -> anyhow::Result<Inbox> {
    let request_id = RequestId::from_random(crate::random()?);
    let inbox = inbox.keep(&services.pool, &crate::holder(), crate::random()?).await?;
    let Invocation { aws_request_id, deadline_ms, event } = invocation;
    let (answers, answer) = oneshot::channel();
    let respond = async {
        if let Ok(answer) = answer.await {
            runtime.respond(&aws_request_id, answer, config.stream_idle).await;
        }
    };
    let ends_at = Instant::now()
        + Duration::from_millis(deadline_ms.saturating_sub(unix_now_ms())).saturating_sub(DEADLINE_MARGIN);
    let record = Record::begin();
    let mut public = LambdaAnswer { request_id: &request_id, config, html: false, head_only: false, answers };
    let request = read(&event, services, &mut public);
    // Its body has been taken out: up to 6 MB are not held for as long as the answer takes.
    drop(event);
    {
        let mail = Own { inbox: &inbox, mailboxes: services.pool.mailboxes() };
        // Kept where they are: handed on or joined as they are, all of them would be moved.
        let exchange = pin!(carry(services, &mail, &request_id, request, ends_at, public, &record));
        let exchange = pin!(inbox.tidy_beside(services.pool.mailboxes(), exchange));
        tokio::join!(exchange, respond);
    }
    record.write(&request_id);
    Ok(inbox)
}

fn read(
    event: &[u8],
    services: &Services,
    public: &mut LambdaAnswer<'_>,
) -> Result<PublicRequest, ErrorCode> {
    let unknown = |error: &dyn std::fmt::Display| {
        tracing::error!(request_id = %public.request_id, %error, "event is not one of a function URL");
        ErrorCode::EdgeFailed
    };
    // As a whole: of bytes each string would be looked at once more.
    let event = std::str::from_utf8(event).map_err(|error| unknown(&error))?;
    let event: FrontEvent<'_> = serde_json::from_str(event).map_err(|error| unknown(&error))?;
    public.head_only = event.request_context.http.method == "HEAD";
    public.html = event.headers.get("accept").is_some_and(|accept| accept.contains("text/html"));
    let (arrival, body) = event.arrival()?;
    let mut request = route(arrival, body, &services.config, Websockets::Refused, public.request_id)?;
    public.config.request(&mut request.headers);
    if request.body.len() > limits::REQUEST_BODY_BYTES {
        return Err(ErrorCode::RequestTooLarge);
    }
    Ok(request)
}

/// The one answer to an event, in Lambda's form.
struct LambdaAnswer<'a> {
    request_id: &'a RequestId,
    config: &'a Config,
    html: bool,
    head_only: bool,
    answers: oneshot::Sender<Answer>,
}

impl LambdaAnswer<'_> {
    /// Answers with an error in place of what the upstream began to say. For the exchange it is as if the client had
    /// left: the upstream's call is cancelled.
    fn refuse(self, code: ErrorCode) -> Pieces {
        let (head, body) = answer::problem(code, self.request_id, self.html);
        let mut bytes = prelude(head.status, &head.headers);
        bytes.extend_from_slice(body.as_bytes());
        let (answer, pieces) = Answer::new(bytes);
        // There is room for one.
        drop(pieces.try_send(Piece::End));
        drop(self.answers.send(answer));
        mpsc::channel(1).0
    }
}

impl PublicSide for LambdaAnswer<'_> {
    async fn fail(self, code: ErrorCode) {
        let (head, body) = answer::problem(code, self.request_id, self.html);
        let mut bytes = prelude(head.status, &head.headers);
        if !self.head_only {
            bytes.extend_from_slice(body.as_bytes());
        }
        let (answer, pieces) = Answer::new(bytes);
        // Either may find that nobody listens any more; then there is nobody to tell.
        if self.answers.send(answer).is_ok() {
            drop(pieces.send(Piece::End).await);
        }
    }

    fn share(&self) -> Share {
        Budget::new(0).share()
    }

    type Socket = NoSocket;

    async fn accept(self, _: Option<String>, _: Headers) -> Option<NoSocket> {
        // `route` has refused it: a Lambda function holds no connection.
        None
    }

    fn begin(self, mut head: Head, first: Vec<u8>) -> Pieces {
        if is_too_long(&head, self.head_only) {
            tracing::info!(request_id = %self.request_id, "response is longer than one streamed answer");
            return self.refuse(ErrorCode::ResponseTooLarge);
        }
        if self.config.holds(&head, self.head_only) {
            let instead = answer::problem(ErrorCode::UpstreamReset, self.request_id, self.html);
            self.config.response(&mut head);
            let (answer, pieces) = Answer::held(head, first, instead);
            drop(self.answers.send(answer));
            return pieces;
        }
        self.config.response(&mut head);
        let mut bytes = prelude(head.status, &head.headers);
        bytes.extend_from_slice(&first);
        let (answer, pieces) = Answer::new(bytes);
        drop(self.answers.send(answer));
        pieces
    }
}
