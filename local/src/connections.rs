//! The table of open agent connections: enters what is posted to `@connections`, leaves what the
//! WebSocket server writes to each agent.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use proto::{id::ConnectionId, limits};
use tokio::{sync::mpsc, time::Instant};

use crate::clock;

/// What the owner of a connection's socket has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// Send this text message.
    Message(Bytes),
    /// Close the connection; the end of the channel means the same.
    Close,
}

/// What became of a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostOutcome {
    /// The message is in the connection's buffer.
    Accepted,
    /// There is no such connection (410).
    Gone,
    /// The connection's buffer is full (429).
    BufferFull,
    /// The message is over [`limits::MESSAGE_BYTES`] (413).
    TooLarge,
}

/// Who opened a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The agent's address.
    pub source_ip: String,
    /// What it called itself.
    pub user_agent: String,
}

/// What is known of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// When it was opened, in epoch milliseconds.
    pub connected_at_ms: u64,
    /// When a message last went in either direction, in epoch milliseconds.
    pub last_active_at_ms: u64,
    /// Who opened it.
    pub identity: Identity,
}

/// The table. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Connections {
    table: Arc<Mutex<HashMap<ConnectionId, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    outgoing: mpsc::Sender<Outgoing>,
    activity: Arc<Activity>,
    connected_at_ms: u64,
    identity: Identity,
}

#[derive(Debug)]
struct Activity {
    last: Mutex<(Instant, u64)>,
}

impl Activity {
    fn now() -> Self {
        Self { last: Mutex::new((Instant::now(), clock::epoch_ms())) }
    }

    fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), clock::epoch_ms());
    }

    fn last(&self) -> (Instant, u64) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a connection in the table; dropping it takes the connection out.
#[derive(Debug)]
pub struct Handle {
    id: ConnectionId,
    activity: Arc<Activity>,
    connections: Connections,
}

impl Handle {
    /// The connection's id.
    #[must_use]
    pub fn id(&self) -> &ConnectionId {
        &self.id
    }

    /// Notes that a message came from the agent.
    pub fn touch(&self) {
        self.activity.touch();
    }

    /// When a message last went in either direction.
    #[must_use]
    pub fn last_active(&self) -> Instant {
        self.activity.last().0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut table = self.connections.table.lock().unwrap_or_else(PoisonError::into_inner);
        // The id may have been closed and, however unlikely, opened again.
        if table.get(&self.id).is_some_and(|entry| Arc::ptr_eq(&entry.activity, &self.activity)) {
            table.remove(&self.id);
        }
    }
}

impl Connections {
    /// Enters a connection. At most `capacity` posted messages wait for its socket.
    #[must_use]
    pub fn open(
        &self,
        id: ConnectionId,
        identity: Identity,
        capacity: usize,
    ) -> (Handle, mpsc::Receiver<Outgoing>) {
        let (outgoing, receiver) = mpsc::channel(capacity);
        let activity = Arc::new(Activity::now());
        let entry =
            Entry { outgoing, activity: Arc::clone(&activity), connected_at_ms: clock::epoch_ms(), identity };
        self.table.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), entry);
        (Handle { id, activity, connections: self.clone() }, receiver)
    }

    /// Posts a message to a connection. Never waits.
    #[must_use]
    pub fn post(&self, id: &ConnectionId, message: Bytes) -> PostOutcome {
        if message.len() > limits::MESSAGE_BYTES {
            return PostOutcome::TooLarge;
        }
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = table.get(id) else { return PostOutcome::Gone };
        match entry.outgoing.try_send(Outgoing::Message(message)) {
            Ok(()) => {
                entry.activity.touch();
                PostOutcome::Accepted
            }
            Err(mpsc::error::TrySendError::Full(_)) => PostOutcome::BufferFull,
            Err(mpsc::error::TrySendError::Closed(_)) => PostOutcome::Gone,
        }
    }

    /// What is known of an open connection.
    #[must_use]
    pub fn info(&self, id: &ConnectionId) -> Option<ConnectionInfo> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = table.get(id)?;
        (!entry.outgoing.is_closed()).then(|| ConnectionInfo {
            connected_at_ms: entry.connected_at_ms,
            last_active_at_ms: entry.activity.last().1,
            identity: entry.identity.clone(),
        })
    }

    /// Closes a connection from the edge's side. Returns whether there was one.
    pub fn close(&self, id: &ConnectionId) -> bool {
        let removed = self.table.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        // Where the buffer is full, the end of the channel says the same.
        removed.is_some_and(|entry| {
            let _ = entry.outgoing.try_send(Outgoing::Close);
            true
        })
    }

    /// How many connections are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no connection is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ConnectionId {
        text.parse().unwrap()
    }

    #[test]
    fn posts_reach_the_socket_in_order() {
        let connections = Connections::default();
        let (handle, mut receiver) = connections.open(id("abc="), Identity::default(), 2);
        assert_eq!(handle.id().as_str(), "abc=");
        assert_eq!(connections.post(&id("abc="), Bytes::from_static(b"1")), PostOutcome::Accepted);
        assert_eq!(connections.post(&id("abc="), Bytes::from_static(b"2")), PostOutcome::Accepted);
        assert_eq!(connections.post(&id("abc="), Bytes::from_static(b"3")), PostOutcome::BufferFull);
        assert_eq!(receiver.try_recv(), Ok(Outgoing::Message(Bytes::from_static(b"1"))));
        assert_eq!(receiver.try_recv(), Ok(Outgoing::Message(Bytes::from_static(b"2"))));
    }

    #[test]
    fn refuses_what_is_too_large_or_for_nobody() {
        let connections = Connections::default();
        let (handle, receiver) = connections.open(id("a"), Identity::default(), 1);
        let message = |bytes| Bytes::from(vec![b'x'; bytes]);
        assert_eq!(connections.post(&id("a"), message(limits::MESSAGE_BYTES + 1)), PostOutcome::TooLarge);
        assert_eq!(connections.post(&id("a"), message(limits::MESSAGE_BYTES)), PostOutcome::Accepted);
        assert_eq!(connections.post(&id("b"), message(1)), PostOutcome::Gone);
        drop(receiver);
        assert_eq!(connections.post(&id("a"), message(1)), PostOutcome::Gone);
        assert_eq!(connections.info(&id("a")), None);
        drop(handle);
        assert!(connections.is_empty());
    }

    #[test]
    fn a_dropped_or_closed_connection_is_gone() {
        let connections = Connections::default();
        let (handle, _receiver) = connections.open(id("a"), Identity::default(), 1);
        assert!(connections.info(&id("a")).is_some());
        drop(handle);
        assert_eq!(connections.post(&id("a"), Bytes::new()), PostOutcome::Gone);

        let (old, mut receiver) = connections.open(id("a"), Identity::default(), 1);
        assert!(connections.close(&id("a")));
        assert!(!connections.close(&id("a")));
        assert_eq!(receiver.try_recv(), Ok(Outgoing::Close));
        assert!(receiver.try_recv().is_err());
        // An old handle does not take a newer connection of the same id with it.
        let (_new, _receiver) = connections.open(id("a"), Identity::default(), 1);
        drop(old);
        assert_eq!(connections.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn messages_in_either_direction_count_as_activity() {
        let connections = Connections::default();
        let (handle, _receiver) = connections.open(id("a"), Identity::default(), 1);
        let opened = handle.last_active();
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        handle.touch();
        let touched = handle.last_active();
        assert_eq!(touched - opened, std::time::Duration::from_secs(5));
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        assert_eq!(connections.post(&id("a"), Bytes::new()), PostOutcome::Accepted);
        assert_eq!(handle.last_active() - touched, std::time::Duration::from_secs(5));
    }
}
