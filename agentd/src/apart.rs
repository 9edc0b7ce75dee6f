//! Calls that cannot be called off: a file on a mount that hangs, a pipe that nobody writes to, a name server that does
//! not answer. Each has a thread of its own, so that nothing else waits for it, and there are few of them at a time.

use std::{io, sync::Arc, thread};

use tokio::sync::{Semaphore, oneshot};

/// Calls of one kind.
pub(crate) struct Apart {
    /// What their threads are called.
    name: &'static str,
    places: Arc<Semaphore>,
}

/// Why a call was not begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotBegun {
    /// As many as may be are under way: all but the last have been given up.
    #[error("earlier ones still wait")]
    Hanging,
    /// There is no thread for it.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl Apart {
    /// No more than `most` are under way at a time, those that nobody waits for any more included.
    pub(crate) fn new(name: &'static str, most: usize) -> Self {
        Self { name, places: Arc::new(Semaphore::new(most)) }
    }

    /// Begins a call. What it comes to is sent, unless nobody waits for it any more; nothing is where it panics.
    ///
    /// # Errors
    ///
    /// [`NotBegun`].
    pub(crate) fn begin<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, NotBegun> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| NotBegun::Hanging)?;
        let (report, outcome) = oneshot::channel();
        thread::Builder::new().name(self.name.to_owned()).spawn(move || {
            let came_to = call();
            drop(place);
            let _ = report.send(came_to);
        })?;
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn those_that_hang_take_their_places_and_give_them_back() {
        let calls = Apart::new("test", 2);
        let hanging = || {
            let (let_go, hang) = mpsc::channel::<()>();
            (let_go, calls.begin(move || hang.recv().is_err()).unwrap())
        };
        let (first, one) = hanging();
        assert_eq!(calls.begin(|| 5).unwrap().await, Ok(5));
        let (second, given_up) = hanging();
        drop(given_up);
        assert!(matches!(calls.begin(|| 5), Err(NotBegun::Hanging)));
        drop(first);
        assert_eq!(one.await, Ok(true));
        assert_eq!(calls.begin(|| 6).unwrap().await, Ok(6));
        assert!(calls.begin(|| panic!("this is a test")).unwrap().await.is_err());
        assert_eq!(calls.begin(|| 7).unwrap().await, Ok(7));
        drop(second);
    }
}
