//! Lambda `revoke`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    revoke::run()
}
