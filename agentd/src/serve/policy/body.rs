//! A body that is made here, in place of an upstream's.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;

/// How much of a file is read at a time.
const READ_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone)]
enum Part {
    Bytes(Bytes),
    /// This many bytes of a file from here on.
    File {
        file: Arc<File>,
        at: u64,
        left: u64,
    },
}

/// Texts and pieces of files, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LocalBody(VecDeque<Part>);

impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes(one), Self::Bytes(other)) => one == other,
            (Self::File { file, at, left }, Self::File { file: other, at: other_at, left: other_left }) => {
                Arc::ptr_eq(file, other) && (at, left) == (other_at, other_left)
            }
            _ => false,
        }
    }
}

impl Eq for Part {}

impl From<Bytes> for LocalBody {
    fn from(bytes: Bytes) -> Self {
        let mut body = Self::default();
        body.push(bytes);
        body
    }
}

impl LocalBody {
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.0.push_back(Part::Bytes(bytes));
        }
    }

    pub(crate) fn push_file(&mut self, file: Arc<File>, range: std::ops::Range<u64>) {
        if !range.is_empty() {
            self.0.push_back(Part::File { file, at: range.start, left: range.end - range.start });
        }
    }

    pub(crate) fn is_end(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, `None` at the end.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was read of a file is read again.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        let (file, from, most) = match self.0.front()? {
            Part::Bytes(_) => {
                let Some(Part::Bytes(bytes)) = self.0.pop_front() else { return None };
                return Some(Ok(bytes));
            }
            Part::File { file, at, left } => {
                (Arc::clone(file), *at, usize::try_from(*left).unwrap_or(usize::MAX).min(READ_BYTES))
            }
        };
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; most];
            let read = file.read_at(&mut buffer, from)?;
            buffer.truncate(read);
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
            }
            Ok(buffer)
        });
        let bytes = match read.await.unwrap_or_else(|_| Err(io::Error::other("the read broke off"))) {
            Ok(buffer) => buffer,
            Err(error) => return Some(Err(error)),
        };
        if let Some(Part::File { at, left, .. }) = self.0.front_mut() {
            *at += bytes.len() as u64;
            *left -= bytes.len() as u64;
            if *left == 0 {
                self.0.pop_front();
            }
        }
        Some(Ok(bytes.into()))
    }
}
