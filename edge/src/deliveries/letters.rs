//! Pointers to what was given up, in the queue of dead letters: they go once it is dead no more.

use aws_sdk_sqs::types::Message;
use proto::{
    delivery::State,
    id::{DeliveryId, TunnelName},
};
use serde::Deserialize;

use super::Deliveries;
use crate::{Error, aws::classify};

/// For how long those that stay are hidden, in seconds, so that the next batch has others: not from operators.
const HIDDEN_S: i32 = 2;

/// What a message points to.
#[derive(Debug, Deserialize)]
pub(super) struct Pointer {
    pub(super) delivery: DeliveryId,
    pub(super) tunnel: TunnelName,
}

impl Pointer {
    /// What a message points to.
    ///
    /// # Errors
    ///
    /// What makes it no pointer.
    pub(super) fn read(message: &Message) -> Result<Self, serde_json::Error> {
        serde_json::from_str(message.body().unwrap_or_default())
    }
}

impl Deliveries {
    /// Looks at ten dead letters at most and deletes those of deliveries that have been delivered or called off since; gives
    /// how many it looked at.
    ///
    /// # Errors
    ///
    /// [`Error`]; it may be repeated.
    pub async fn clear_dead_letters(&self) -> Result<usize, Error> {
        let Some(queue) = &self.dead_letters else { return Ok(0) };
        let receive = self.queues.receive_message().queue_url(queue).max_number_of_messages(10);
        let received = receive.visibility_timeout(HIDDEN_S).send().await;
        let received = received.map_err(|error| classify("ReceiveMessage", error))?;
        for message in received.messages() {
            // What is no pointer is for operators to look at.
            let Ok(pointer) = Pointer::read(message) else { continue };
            let kept = self.find(&pointer.tunnel, &pointer.delivery).await?;
            if !kept.is_some_and(|kept| matches!(kept.state, State::Delivered | State::Cancelled)) {
                continue;
            }
            let delete = self.queues.delete_message().queue_url(queue);
            let deleted = delete.set_receipt_handle(message.receipt_handle.clone()).send().await;
            deleted.map_err(|error| classify("DeleteMessage", error))?;
            tracing::info!(delivery_id = %pointer.delivery, tunnel_id = %pointer.tunnel, "delivery is dead no more");
        }
        Ok(received.messages().len())
    }
}
