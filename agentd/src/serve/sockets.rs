//! The public WebSockets that are open, and the connections to the edge that they may go over.
//!
//! A WebSocket outlives the connection it was opened over: when that one goes out of service, it moves to the newest
//! one that is in service, and the old one stays until everything that was sent over it has arrived. Enters: what the
//! edge sends for a WebSocket, and which connections come and go. Leaves: [`SocketEvent`]s for its task.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::{id::RequestId, socket::Batch};
use tokio::sync::{Notify, mpsc};

use crate::serve::outbox::Outbox;

/// How many events of one WebSocket may wait: more than batches may be under way.
const EVENTS: usize = proto::limits::SOCKET_BATCHES as usize + 64;

/// The name of a connection within this process.
pub(crate) type Serial = u64;

/// What a WebSocket's task must know.
pub(crate) enum SocketEvent {
    /// The edge has sent something.
    Batch(Batch<'static>),
    /// From now on it sends over another connection.
    Move(Serial, Outbox),
    /// There is no connection any more.
    Lost,
    /// The edge wants no more of it.
    Cancel,
    /// This agent goes out of service.
    Retire,
}

struct Open {
    serial: Serial,
    /// On the heap: a channel keeps room for 32 of its items, also while it is empty.
    events: mpsc::Sender<Box<SocketEvent>>,
}

#[derive(Default)]
struct State {
    /// Connections in service.
    links: BTreeMap<Serial, Outbox>,
    open: HashMap<RequestId, Open>,
}

/// All WebSockets of this process.
#[derive(Default)]
pub(crate) struct Sockets {
    state: Mutex<State>,
    left: Notify,
}

/// A WebSocket's place among the others, given up when it is dropped.
pub(crate) struct Registered {
    sockets: std::sync::Arc<Sockets>,
    request_id: RequestId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.sockets.state().open.remove(&self.request_id);
        self.sockets.left.notify_waiters();
    }
}

impl Registered {
    /// Nothing more comes over the connection that was left.
    pub(crate) fn settled(&self, serial: Serial) {
        if let Some(open) = self.sockets.state().open.get_mut(&self.request_id) {
            open.serial = serial;
        }
        self.sockets.left.notify_waiters();
    }
}

impl Sockets {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a WebSocket that is opened over the connection `serial`.
    pub(crate) fn enter(
        self: &std::sync::Arc<Self>,
        request_id: RequestId,
        serial: Serial,
    ) -> (Registered, mpsc::Receiver<Box<SocketEvent>>) {
        let (events, received) = mpsc::channel(EVENTS);
        self.state().open.insert(request_id.clone(), Open { serial, events });
        (Registered { sockets: std::sync::Arc::clone(self), request_id }, received)
    }

    /// Hands something to a WebSocket; false where there is none of that name.
    pub(crate) fn tell(&self, request_id: &RequestId, event: SocketEvent) -> bool {
        let mut state = self.state();
        let Some(open) = state.open.get(request_id) else { return false };
        if open.events.try_send(Box::new(event)).is_err() {
            // More than an honest edge sends: its task ends with its channel.
            state.open.remove(request_id);
        }
        true
    }

    /// A connection is in service.
    pub(crate) fn link_up(&self, serial: Serial, outbox: &Outbox) {
        self.state().links.insert(serial, outbox.clone());
    }

    /// A connection goes out of service: its WebSockets move to the newest of the others.
    pub(crate) fn link_leaving(&self, serial: Serial) {
        let mut state = self.state();
        state.links.remove(&serial);
        let State { links, open } = &mut *state;
        let next = links.last_key_value();
        for one in open.values().filter(|one| one.serial == serial) {
            let event = match next {
                Some((&serial, outbox)) => SocketEvent::Move(serial, outbox.clone()),
                None => SocketEvent::Retire,
            };
            // A task that takes nothing is at its end.
            let _ = one.events.try_send(Box::new(event));
        }
    }

    /// A connection has ended.
    pub(crate) fn link_down(&self, serial: Serial) {
        let mut state = self.state();
        state.links.remove(&serial);
        for one in state.open.values().filter(|one| one.serial == serial) {
            let _ = one.events.try_send(Box::new(SocketEvent::Lost));
        }
    }

    /// How many WebSockets need the connection `serial`.
    pub(crate) fn count_on(&self, serial: Serial) -> usize {
        self.state().open.values().filter(|one| one.serial == serial).count()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.state().open.len()
    }

    /// Ends when a WebSocket has left a connection.
    pub(crate) async fn left(&self) {
        self.left.notified().await;
    }
}
