//! Lambda `ingress`. See the crate's documentation.

fn main() -> std::process::ExitCode {
    ingress::run()
}
