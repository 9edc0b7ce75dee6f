//! The `agentd` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    agentd::main_with_args(std::env::args_os())
}
