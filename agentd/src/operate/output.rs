//! What the commands print. A reader that has left, as `head` does, is no failure; a full disk is one.

use std::{
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
    sync::OnceLock,
    time::Duration,
};

use super::exit;

/// Prints `text` as it is. Nobody is there to read any more: then there is no more to be done.
///
/// # Errors
///
/// Whatever else keeps it from being written, such as a full disk.
pub(crate) fn print(text: &str) -> io::Result<()> {
    print_to(&mut io::stdout().lock(), text)
}

/// Prints `text` as it is, for who goes on printing as long as somebody reads.
///
/// # Errors
///
/// It cannot be written, or nobody is there to read any more.
pub(super) fn write(text: &str) -> io::Result<()> {
    write_to(&mut io::stdout().lock(), text.as_bytes())
}

/// Prints how long an agent took to end, and ends the command well.
pub(crate) fn stopped(took: Duration) -> ExitCode {
    answer(&format!("stopped after {:.1} s\n", took.as_secs_f64()), ExitCode::SUCCESS)
}

fn write_to(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes).and_then(|()| out.flush())
}

fn print_to(out: &mut impl Write, text: &str) -> io::Result<()> {
    match write_to(out, text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

/// Prints `text`, which is all that a command has to say, and ends it with `code`; with [`exit::RUNTIME`] where it cannot
/// be printed.
pub(crate) fn answer(text: &str, code: ExitCode) -> ExitCode {
    match print(text) {
        Ok(()) => code,
        Err(error) => unprinted(error),
    }
}

/// Why something that was said could not be printed: the first time.
static UNSAID: OnceLock<String> = OnceLock::new();

/// Prints one of several texts of a command, which ends with [`said`].
pub(super) fn say(line: &str) {
    hand_over(format!("{line}\n").as_bytes());
}

/// The same for bytes as they are.
pub(super) fn hand_over(bytes: &[u8]) {
    if let Err(error) = write_to(&mut io::stdout().lock(), bytes) {
        unsaid(&error);
    }
}

/// Notes that something could not be printed, for [`said`].
pub(super) fn unsaid(error: &io::Error) {
    if error.kind() != io::ErrorKind::BrokenPipe {
        UNSAID.get_or_init(|| error.to_string());
    }
}

/// Whether something could not be printed: who goes on printing for ever need not.
pub(super) fn is_unsaid() -> bool {
    UNSAID.get().is_some()
}

/// Ends a command that has said everything with `code`; with [`exit::RUNTIME`] where something could not be printed.
pub(super) fn said(code: ExitCode) -> ExitCode {
    UNSAID.get().map_or(code, unprinted)
}

fn unprinted(error: impl Display) -> ExitCode {
    complain(format_args!("cannot write to standard output: {error}"));
    ExitCode::from(exit::RUNTIME)
}

/// Tells the person who called why something failed; there is nobody else to tell if that fails too.
pub(crate) fn complain(error: impl Display) {
    let _ = writeln!(io::stderr().lock(), "agentd: {error}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails always, with this.
    struct Broken(io::ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_reader_that_has_left_is_no_failure_and_a_full_disk_is_one() {
        assert!(print_to(&mut Broken(io::ErrorKind::BrokenPipe), "a line\n").is_ok());
        let full = print_to(&mut Broken(io::ErrorKind::StorageFull), "a line\n");
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
