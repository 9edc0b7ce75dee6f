//! Lambda: decides who may open an agent connection.

use std::process::ExitCode;

fn main() -> ExitCode {
    authorizer::run()
}
