//! Lambda `sweep`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    sweep::run()
}
