//! Lambda `connect`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    connect::run()
}
