//! Manual pages and completions, made from the command line's own description.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Subcommand;
use clap_complete::Shell;

/// What the help and the manual say beyond options.
pub(crate) const MORE: &str = "\
Exit codes:
  0   done
  1   failed
  2   wrong usage
  77  the edge refuses the token, or all of the tunnels
  78  the configuration is not valid

Signals:
  SIGTERM, SIGINT  stop after what is in flight, within the grace period; a second one stops at once

Files:
  /etc/agentd/agentd.toml          the configuration; every key is in the packaged example
  /etc/agentd/token                the token, mode 600, which systemd hands to the service
  /etc/agentd/NAME.toml, NAME.token  the same for the instance agentd@NAME";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prints the completion script for a shell.
    Completion {
        /// The shell.
        shell: Shell,
    },
    /// Writes the manual pages into a folder.
    #[command(hide = true)]
    Manual {
        /// The folder; it must exist.
        dir: PathBuf,
    },
}

/// Runs a command; `program` describes the whole command line.
pub(crate) fn run(command: &Command, mut program: clap::Command) -> ExitCode {
    let done = match command {
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut program, "agentd", &mut script);
            std::io::stdout().write_all(&script)
        }
        Command::Manual { dir } => write_manual(program, dir),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agentd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes `agentd.8`, and a page for each command, such as `agentd-run.8`.
fn write_manual(program: clap::Command, dir: &Path) -> std::io::Result<()> {
    fn pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            pages(command, dir)?;
        }
        let page = clap_mangen::Man::new(command.clone()).section("8").manual("Tunnel agent");
        page.generate_to(dir).map(drop)
    }
    let mut program = program.disable_help_subcommand(true);
    program.build();
    pages(&program, dir)
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand};

    use super::*;

    #[derive(Parser)]
    #[command(name = "agentd", version, after_long_help = MORE)]
    struct Program {
        #[command(subcommand)]
        _command: Outer,
    }

    #[derive(Subcommand)]
    enum Outer {
        /// Has an inner one.
        Config {
            #[command(subcommand)]
            _command: Inner,
        },
        #[command(flatten)]
        Reference(Command),
    }

    #[derive(Subcommand)]
    enum Inner {
        /// Checks.
        Check,
    }

    #[test]
    fn every_command_that_is_shown_has_a_page() {
        use clap::CommandFactory as _;
        let dir = tempfile::tempdir().unwrap();
        write_manual(Program::command(), dir.path()).unwrap();
        let mut pages: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        pages.sort();
        assert_eq!(pages, ["agentd-completion.8", "agentd-config-check.8", "agentd-config.8", "agentd.8"]);
        let page = std::fs::read_to_string(dir.path().join("agentd.8")).unwrap();
        assert!(page.contains(".TH agentd 8") && page.contains("78  the configuration"), "{page}");
    }
}
