//! What outlives this program: enters each change that a service has made, leaves the changes of the time before.
//!
//! One file, one line for each change, in the order in which they were made. A change is written before whoever asked
//! for it hears that it is done, so that it outlives a process that is killed at any moment; `fdatasync` follows within a
//! second, so that a machine that loses its power forgets no more than that. At each start the file is written anew, as
//! short as it can be.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::sync::Notify;

/// How long after a change at the latest the disk has it.
const SYNC: Duration = Duration::from_secs(1);

/// Whose change it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// DynamoDB's.
    Tables,
    /// SQS's.
    Queues,
    /// Step Functions'.
    Runs,
}

impl Service {
    const ALL: [(Self, &'static str); 3] =
        [(Self::Tables, "tables"), (Self::Queues, "queues"), (Self::Runs, "runs")];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(service, _)| *service == self).map_or("", |(_, name)| name)
    }
}

/// One change, as JSON of its service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Whose it was.
    pub service: Service,
    /// What it was.
    pub record: Box<str>,
}

/// The file, open for more.
#[derive(Debug)]
pub struct Store {
    file: Mutex<File>,
    written: Notify,
}

/// Where a service finds the store: nowhere, unless its state is kept.
pub type Kept = OnceLock<Arc<Store>>;

/// The changes of an earlier process. A file that is not there has none; one that was being written when the process
/// was killed ends with the last whole line.
///
/// # Errors
///
/// The file cannot be read, or has a line that is none of ours.
pub fn read(path: &Path) -> io::Result<Vec<Change>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let text = std::str::from_utf8(&text[..whole]).map_err(|error| invalid(error.to_string()))?;
    text.lines()
        .enumerate()
        .map(|(at, line)| {
            let (name, record) = line.split_once(' ').unwrap_or_default();
            let service = Service::ALL.iter().find(|(_, known)| *known == name).map(|(service, _)| *service);
            let service =
                service.ok_or_else(|| invalid(format!("line {} is not one of this file", at + 1)))?;
            Ok(Change { service, record: record.into() })
        })
        .collect()
}

impl Store {
    /// Writes the file anew and keeps it open. Whoever is killed meanwhile finds the old one.
    ///
    /// # Errors
    ///
    /// The file cannot be written; an older one is left as it was.
    pub fn create(path: &Path, fill: impl FnOnce(&mut Filling) -> io::Result<()>) -> io::Result<Arc<Self>> {
        let new = path.with_extension("new");
        let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
        let mut filling = Filling(BufWriter::new(file));
        fill(&mut filling)?;
        let file = filling.0.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(Arc::new(Self { file: Mutex::new(file), written: Notify::new() }))
    }

    /// Writes a change down. Where that cannot be, the process ends here: what is not kept is not answered.
    pub fn append(&self, service: Service, record: &impl Serialize) {
        let line = line(service, record);
        let result =
            line.and_then(|line| self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line));
        if let Err(error) = result {
            tracing::error!(%error, "the state cannot be kept in --state-dir any more; ending");
            std::process::exit(1);
        }
        self.written.notify_one();
    }

    /// Has the disk take what was written, for ever.
    pub async fn sync(self: Arc<Self>) {
        loop {
            self.written.notified().await;
            tokio::time::sleep(SYNC).await;
            let store = Arc::clone(&self);
            let synced = tokio::task::spawn_blocking(move || store.sync_now()).await;
            if let Ok(Err(error)) = synced {
                tracing::warn!(%error, "the disk did not take the state in --state-dir");
            }
        }
    }

    /// Has the disk take what was written.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn sync_now(&self) -> io::Result<()> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).try_clone()?;
        file.sync_data()
    }
}

/// A file that is being written anew.
#[derive(Debug)]
pub struct Filling(BufWriter<File>);

impl Filling {
    /// Adds a change.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn add(&mut self, service: Service, record: &impl Serialize) -> io::Result<()> {
        self.0.write_all(&line(service, record)?)
    }
}

/// Compact JSON has no line breaks.
fn line(service: Service, record: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = format!("{} ", service.name()).into_bytes();
    serde_json::to_writer(&mut line, record)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_written_is_read_up_to_the_last_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert!(read(&path).unwrap().is_empty());
        let store = Store::create(&path, |file| file.add(Service::Tables, &json!({ "a": "\n" }))).unwrap();
        store.append(Service::Queues, &json!([1]));
        store.append(Service::Runs, &json!("x".repeat(10_000)));
        let change = |service, record: &str| Change { service, record: record.into() };
        let all = read(&path).unwrap();
        assert_eq!(all[..2], [change(Service::Tables, r#"{"a":"\n"}"#), change(Service::Queues, "[1]")]);
        let whole = std::fs::read(&path).unwrap();
        // Killed in the middle of a line, at each of some places.
        for cut in [1, 2, 5000, 10_000] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(read(&path).unwrap(), all[..2], "{cut}");
        }
        // Killed while it was written anew.
        std::fs::write(path.with_extension("new"), "tables {").unwrap();
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(read(&path).unwrap(), all);
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions()) & 0o77,
            0
        );
        std::fs::write(&path, "mine\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1"));
    }
}
