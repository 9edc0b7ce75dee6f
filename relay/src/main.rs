//! Binary `relay`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    relay::run()
}
