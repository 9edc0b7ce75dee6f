//! What a run says, line by line as it finds it, and whether it was well.

use std::{
    io::Write,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Where the lines go, and what was not well.
pub(crate) struct Report<'w> {
    out: Mutex<&'w mut (dyn Write + Send)>,
    failures: Mutex<Vec<String>>,
}

impl<'w> Report<'w> {
    pub(crate) fn new(out: &'w mut (dyn Write + Send)) -> Self {
        Self { out: Mutex::new(out), failures: Mutex::default() }
    }

    /// Says something.
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads it may have gone; what was made has to be taken away all the same.
        drop(writeln!(out, "{}", line.as_ref()).and_then(|()| out.flush()));
    }

    /// Something was as it has to be, or as its front is known to leave it.
    pub(crate) fn well(&self, name: &str, took: Duration, behaviour: Option<&str>) {
        let behaviour = behaviour.map(|name| format!(" (as its front does it: {name})")).unwrap_or_default();
        self.say(format!("ok          {:>6.1} s  {name}{behaviour}", took.as_secs_f64()));
    }

    /// Something cannot be asked of this edge.
    pub(crate) fn inapplicable(&self, name: &str, why: &str) {
        self.say(format!("not run               {name}: {why}"));
    }

    /// Something was not as it has to be.
    pub(crate) fn failed(&self, name: &str, why: &str) {
        self.say(format!("FAILED                {name}: {why}"));
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
    }

    /// An open point is settled, or is not, and why.
    pub(crate) fn point(&self, name: &str, found: &Result<String, String>) {
        match found {
            Ok(text) => self.say(format!("settled               {name}: {text}")),
            Err(why) => self.say(format!("not settled           {name}: {why}")),
        }
    }

    /// The names of everything that was not well.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
