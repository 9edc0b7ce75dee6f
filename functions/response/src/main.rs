//! Lambda `response`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    response::run()
}
