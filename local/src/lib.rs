//! The whole edge on one machine, without AWS.
//!
//! One program stands for everything that AWS does between a public client and an agent. It listens
//! on loopback only and runs the functions, the state machine and the AWS SDKs unchanged:
//!
//! * [`public`] is the Function URL behind which `ingress` runs, [`agents`] the WebSocket API of the
//!   agents;
//! * [`lambda`] runs the functions as processes of this same program, over the real Runtime API;
//! * [`aws`] answers the SDKs: queues, tables, the state machine and `@connections`;
//! * [`stack`] is what the files that deploy the edge say about it;
//! * [`store`] is what outlives the program;
//! * [`chaos`], [`clock`] and [`latency`] are what AWS does on bad days; [`metrics`] is what
//!   CloudWatch would show.
//!
//! [`cli`] says how it is called; [`run`] puts it together and takes it apart again.

pub mod agents;
pub mod aws;
pub mod calendar;
pub mod chaos;
pub mod cli;
pub mod clock;
pub mod connections;
pub mod counters;
pub mod demo;
pub mod dynamodb;
pub mod identity;
pub mod lambda;
pub mod latency;
pub mod listener;
pub mod metrics;
pub mod public;
pub mod relay;
pub mod run;
pub mod services;
pub mod sqs;
pub mod stack;
pub mod states;
pub mod store;

use std::{ffi::OsString, process::ExitCode};

/// Runs the program with `arguments`, the program's name first.
pub fn main_with_args(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match cli::parse(arguments) {
        Ok(cli::Call::Run(options)) => run::run(*options),
        Ok(cli::Call::Function(function)) => run::function(function),
        Ok(cli::Call::Relay) => run::relay(),
        Ok(cli::Call::Agent(arguments)) => run::agent(arguments),
        Err(error) => {
            // Help and version are what was asked for; anything else is a mistake.
            let code = error.exit_code();
            let _ = error.print();
            ExitCode::from(u8::try_from(code).unwrap_or(2))
        }
    }
}
