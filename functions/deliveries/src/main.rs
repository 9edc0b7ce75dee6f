//! Lambda `deliveries`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    deliveries::run()
}
