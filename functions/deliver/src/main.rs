//! Lambda `deliver`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    deliver::run()
}
