//! Lambda `disconnect`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    disconnect::run()
}
