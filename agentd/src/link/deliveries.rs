//! What the edge is asked about the deliveries that it keeps for tunnels, over whatever connection serves now.
//!
//! Enters: questions of commands and of the inspector's page. Leaves: the edge's answers.

use std::{collections::HashMap, time::Duration};

use proto::{
    delivery::{Answer, Ask, DeliveriesAsk},
    message::AgentMessage,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::serve::outbox::Outbox;

/// How many questions may wait for a connection.
const QUESTIONS: usize = 16;

/// How many may wait for their answers on one connection.
const UNANSWERED: usize = 64;

/// The edge answers sooner than this, or not at all: a function that has to be started, and a few reads.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// No connection is in service.
    #[error("the agent is not connected to its edge")]
    NotConnected,
    /// An edge of an earlier release.
    #[error("this edge keeps no deliveries: it has to be upgraded")]
    NotKept,
    /// It did not come in time, or the connection ended.
    #[error("the edge did not answer; ask again")]
    Lost,
}

/// One question and where its answer goes.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) ask: Ask,
    pub(crate) answer: oneshot::Sender<Result<Answer<'static>, NoAnswer>>,
}

/// Where questions are handed in.
#[derive(Debug, Clone)]
pub(crate) struct Desk(mpsc::Sender<Question>);

impl Desk {
    /// A desk, and the end at which its questions arrive.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Question>) {
        let (questions, asked) = mpsc::channel(QUESTIONS);
        (Self(questions), asked)
    }

    /// Asks the edge.
    ///
    /// # Errors
    ///
    /// [`NoAnswer`].
    pub(crate) async fn ask(&self, ask: Ask) -> Result<Answer<'static>, NoAnswer> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.0.send(Question { ask, answer }).await.map_err(|_| NoAnswer::NotConnected)?;
            answered.await.unwrap_or(Err(NoAnswer::Lost))
        };
        timeout(PATIENCE, asked).await.unwrap_or(Err(NoAnswer::Lost))
    }
}

/// The questions of one connection that are not answered yet.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    last: u32,
    waiting: HashMap<u32, oneshot::Sender<Result<Answer<'static>, NoAnswer>>>,
}

impl Unanswered {
    /// Sends a question.
    pub(super) fn ask(&mut self, question: Question, outbox: &Outbox) {
        // Whoever asked may have given up.
        self.waiting.retain(|_, answer| !answer.is_closed());
        if self.waiting.len() >= UNANSWERED {
            return drop(question.answer.send(Err(NoAnswer::Lost)));
        }
        self.last = self.last.wrapping_add(1);
        let ask = AgentMessage::Deliveries(DeliveriesAsk { seq: self.last, ask: question.ask });
        match outbox.send_word(ask.encode()) {
            Ok(()) => drop(self.waiting.insert(self.last, question.answer)),
            Err(_) => drop(question.answer.send(Err(NoAnswer::Lost))),
        }
    }

    /// Hands on the answer to question number `seq`.
    pub(super) fn answer(&mut self, seq: u32, answer: Answer<'static>) {
        if let Some(asked) = self.waiting.remove(&seq) {
            drop(asked.send(Ok(answer)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::delivery::Refused;

    use super::*;

    fn pause() -> Ask {
        Ask::Pause { tunnel: "web".parse().unwrap() }
    }

    #[tokio::test]
    async fn an_answer_finds_its_question_and_none_is_waited_for_in_vain() {
        let (desk, mut asked) = Desk::new();
        let (outbox, mut queue) = Outbox::new();
        let mut unanswered = Unanswered::default();
        let refused = |reason| Answer::Refused { reason };
        let first = tokio::spawn({
            let desk = desk.clone();
            async move { desk.ask(pause()).await }
        });
        unanswered.ask(asked.recv().await.unwrap(), &outbox);
        let second = tokio::spawn(async move { desk.ask(pause()).await });
        unanswered.ask(asked.recv().await.unwrap(), &outbox);
        assert!(queue.control.recv().await.is_some() && queue.control.recv().await.is_some());
        unanswered.answer(7, refused(Refused::Busy));
        unanswered.answer(2, refused(Refused::NotFound));
        assert_eq!(second.await.unwrap(), Ok(refused(Refused::NotFound)));
        for _ in 0..2 {
            let (answer, gone) = oneshot::channel();
            unanswered.ask(Question { ask: pause(), answer }, &outbox);
            drop(gone);
        }
        assert_eq!(unanswered.waiting.len(), 2, "who gave up makes room");
        // The connection ends.
        drop(unanswered);
        assert_eq!(first.await.unwrap(), Err(NoAnswer::Lost));
    }
}
