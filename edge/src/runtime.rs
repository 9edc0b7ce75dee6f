//! What a function runs on: one thread, since it has one event at a time and a second thread would only cost memory.

use std::{io, panic::resume_unwind};

use tokio::runtime::{Builder, LocalOptions};

/// Runs a future to its end.
///
/// It is a task like those that it spawns: what wakes the future of `block_on` itself goes through the kernel each time
/// (an `eventfd` is written, and the sockets are looked at once more), and a call of AWS wakes its caller several times.
///
/// # Errors
///
/// The kernel gives no `epoll` or `eventfd`.
///
/// # Panics
///
/// As the future does.
pub fn run<F>(future: F) -> io::Result<F::Output>
where
    F: Future<Output: 'static> + 'static,
{
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let task = runtime.spawn_local(future);
    runtime.block_on(task).or_else(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(error) => Err(error.into()),
    })
}

#[cfg(test)]
mod tests {
    use std::{panic::catch_unwind, rc::Rc};

    use super::*;

    #[test]
    fn what_a_future_leaves_comes_out_be_it_a_value_or_a_panic() {
        let value = Rc::new(7);
        let out = run(async move {
            let shared = Rc::clone(&value);
            tokio::task::spawn_local(async move { *shared + 1 }).await.unwrap() + *value
        });
        assert_eq!(out.unwrap(), 15);
        let panic = catch_unwind(|| run(async { panic!("as it does") })).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"as it does"));
    }
}
