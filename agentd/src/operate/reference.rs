//! Manual pages and completions, made from the command line's own description and the packaged configuration.

mod settings;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Subcommand;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::output::complain;

/// The manual's name, at the foot of each page.
const MANUAL: &str = "Tunnel agent";

/// When the manual last said something else than before, for the foot of each page.
const CHANGED: &str = "2026-12-01";

/// The longest line of a page's source, in bytes: what `mandoc -T lint` asks for.
const LINE_BYTES: usize = 80;

/// What the manual says beyond options: a section's title, and what is explained in it.
const SECTIONS: [(&str, &[(&str, &str)]); 4] = [
    (
        "Exit status",
        &[
            ("0", "done"),
            ("1", "failed"),
            ("2", "wrong usage"),
            ("69", "the edge cannot be reached (one-shot commands)"),
            ("77", "the edge refuses the token, or all of the tunnels"),
            ("78", "the configuration is not valid"),
        ],
    ),
    (
        "Signals",
        &[
            (
                "SIGTERM, SIGINT",
                "stop after what is in flight, within the grace period; a second one stops at once",
            ),
            (
                "SIGHUP",
                "read the configuration again, and keep the old one if it is not valid; agentd http stops",
            ),
        ],
    ),
    (
        "Environment",
        &[
            ("AGENTD_…", "what an option can say, by the option's name; an option goes over it"),
            ("NO_COLOR", "lines for people have no colour"),
            ("TERM", "where it is \"dumb\", no terminal is drawn on"),
            (
                "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY",
                "nothing: the agent connects directly and uses no proxy",
            ),
        ],
    ),
    (
        "Files",
        &[
            ("/etc/agentd/agentd.toml", "the configuration of agentd.service"),
            ("/etc/agentd/token", "its token, mode 600, which systemd hands over"),
            (
                "/etc/agentd/NAME.toml, /etc/agentd/NAME.token",
                "the same for the instance agentd@NAME.service",
            ),
            (
                "/etc/default/agentd, /etc/default/agentd-NAME",
                "further environment, such as AGENTD_LOG_LEVEL",
            ),
            (
                "/run/agentd/control.sock, /run/agentd-NAME/control.sock",
                "where the running agent is asked and told",
            ),
            (
                "/usr/share/doc/agentd/examples/agentd.toml",
                "every key of the configuration; see agentd.toml(5)",
            ),
        ],
    ),
];

/// The exit codes, for the help.
pub(crate) fn exit_codes() -> String {
    let (title, codes) = SECTIONS[0];
    let lines = codes.iter().map(|(code, meaning)| format!("\n  {code:<3} {meaning}"));
    std::iter::once(format!("{title}:")).chain(lines).collect()
}

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
            complain(error);
            ExitCode::FAILURE
        }
    }
}

/// Writes `agentd.8`, a page for each command, such as `agentd-run.8`, and `agentd.toml.5`.
fn write_manual(program: clap::Command, dir: &Path) -> std::io::Result<()> {
    fn page(command: clap::Command) -> Man {
        let source = format!("agentd {}", env!("CARGO_PKG_VERSION"));
        let title = command.get_display_name().unwrap_or_else(|| command.get_name()).to_uppercase();
        Man::new(command).title(title).section("8").date(CHANGED).source(source).manual(MANUAL)
    }
    fn pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            pages(command, dir)?;
            let man = page(command.clone());
            let mut text = Vec::new();
            man.render(&mut text)?;
            std::fs::write(dir.join(man.get_filename()), tidy(&String::from_utf8_lossy(&text)))?;
        }
        Ok(())
    }
    // The manual has a section for what the help appends.
    let mut program = program.disable_help_subcommand(true).after_long_help(None::<&str>);
    program.build();
    pages(&program, dir)?;
    let man = page(program);
    let mut text = Vec::new();
    man.render(&mut text)?;
    let mut roff = Roff::new();
    for (title, lines) in SECTIONS {
        roff.control("SH", [title.to_uppercase().as_str()]);
        for (what, meaning) in lines {
            roff.control("TP", []).text([bold(*what)]).text([roman(*meaning)]);
        }
    }
    roff.to_writer(&mut text)?;
    std::fs::write(dir.join(man.get_filename()), tidy(&String::from_utf8_lossy(&text)))?;
    let heading = format!("{CHANGED} \"agentd {}\" \"{MANUAL}\"", env!("CARGO_PKG_VERSION"));
    std::fs::write(dir.join("agentd.toml.5"), tidy(&settings::page(&heading)))
}

/// The same page as `mandoc -T lint` wants it written: text in lines of [`LINE_BYTES`], which are filled anyway, no spaces at
/// their ends, no break beside an empty line.
fn tidy(page: &str) -> String {
    let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
    let mut tidy = String::with_capacity(page.len());
    for (at, &line) in lines.iter().enumerate() {
        let beside = |other: usize| lines.get(other).is_some_and(|line| line.is_empty());
        if line == ".br" && (beside(at + 1) || at.checked_sub(1).is_some_and(beside)) {
            continue;
        }
        if line.is_empty() {
            tidy.push_str(".sp\n");
            continue;
        }
        // A line that begins with one of these is a request.
        let is_request = |text: &str| text.starts_with(['.', '\'']);
        let mut length = 0;
        for (number, word) in line.split(' ').enumerate() {
            let breaks = length > 0 && length + 1 + word.len() > LINE_BYTES;
            if breaks && !is_request(line) && !is_request(word) {
                tidy.push('\n');
                length = 0;
            } else if number > 0 {
                tidy.push(' ');
                length += 1;
            }
            tidy.push_str(word);
            length += word.len();
        }
        tidy.push('\n');
    }
    tidy
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand};

    use super::*;

    #[derive(Parser)]
    #[command(name = "agentd", version, after_long_help = exit_codes())]
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
        assert_eq!(
            pages,
            ["agentd-completion.8", "agentd-config-check.8", "agentd-config.8", "agentd.8", "agentd.toml.5"]
        );
        let page = std::fs::read_to_string(dir.path().join("agentd.8")).unwrap();
        for wanted in [
            concat!(".TH AGENTD 8 2026-12-01 \"agentd ", env!("CARGO_PKG_VERSION"), "\" \"Tunnel agent\""),
            ".SH \"EXIT STATUS\"",
            "the configuration is not valid",
            "agentd\\-config(8)",
        ] {
            assert!(page.contains(wanted), "{wanted} is not in {page}");
        }
        assert!(!page.contains("EXTRA"), "{page}");
        assert!(page.lines().all(|line| line.len() <= LINE_BYTES && !line.ends_with(' ')), "{page}");
        assert!(exit_codes().contains("\n  78  the configuration"));
        let settings = std::fs::read_to_string(dir.path().join("agentd.toml.5")).unwrap();
        let is_tidy = |line: &str| line.len() <= LINE_BYTES && !line.ends_with(' ');
        assert!(settings.lines().all(is_tidy), "{settings}");
        is_clean(dir.path());
    }

    /// Asks `mandoc`, where there is one.
    fn is_clean(dir: &Path) {
        let pages = std::fs::read_dir(dir).unwrap().map(|page| page.unwrap().path());
        match std::process::Command::new("mandoc").args(["-T", "lint"]).args(pages).output() {
            Ok(said) => {
                // Its own pages name others that are not installed here.
                let said = String::from_utf8_lossy(&said.stdout).into_owned();
                let faults: Vec<_> =
                    said.lines().filter(|line| !line.contains("referenced manual not found")).collect();
                assert!(faults.is_empty(), "{faults:#?}");
            }
            Err(error) => eprintln!("not linted: mandoc: {error}"),
        }
    }

    #[test]
    fn a_page_is_broken_into_lines_without_another_meaning() {
        let words = "word ".repeat(40);
        let page = tidy(&format!(".SH \"A {words}\"\n{words}.x 'y\n.br\n \n.br\nlast \n"));
        let [title, text @ .., sp, last] = &page.lines().collect::<Vec<_>>()[..] else { panic!("{page}") };
        assert!(title.starts_with(".SH \"A word word") && title.len() > LINE_BYTES, "{title}");
        assert_eq!(text.join(" "), format!("{words}.x 'y"));
        // No word that would be a request stands first.
        assert!(text.iter().all(|line| line.len() <= LINE_BYTES && line.starts_with("word")), "{page}");
        assert_eq!((*sp, *last), (".sp", "last"));
    }
}
