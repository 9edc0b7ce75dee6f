//! `agentd service`: puts the agent under systemd and takes it away again.
//!
//! The agent never runs as root: the system's service gets a user of its own from systemd, and a service
//! of a user runs as that user. Nothing that is already there and different is overwritten, and an
//! installation that fails leaves nothing behind.

use std::{
    fmt, fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode, Stdio},
};

use clap::{Args, Subcommand};

use crate::{
    config::{self, ConfigError, Overrides},
    identity::credential::{Token, TokenSource},
};

const SYSTEM_UNIT: &str = include_str!("../../../systemd/agentd.service");
const TEMPLATE_UNIT: &str = include_str!("../../../systemd/agentd@.service");
const USER_UNIT: &str = include_str!("../../../systemd/user/agentd.service");

/// The program in the units as they are packaged.
const PACKAGED_PROGRAM: &str = "/usr/bin/agentd";

/// The first line of a unit that was written here, so that only such a unit is removed again.
const MARK: &str = "# Written by `agentd service install`; removed by `agentd service uninstall`.\n";

/// Folders that the service of the system does not see, or that others may write to.
const UNSEEN: [&str; 5] = ["/home", "/root", "/run", "/tmp", "/var/tmp"];

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Installs the agent as a service of systemd, starts it, and starts it again with the machine.
    Install {
        /// The configuration to install. Default: the one that is in place already.
        #[arg(long, value_name = "FILE", env = "AGENTD_CONFIG")]
        config: Option<PathBuf>,
        #[command(flatten)]
        which: Which,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Stops the service and removes it and its token. The configuration stays.
    Uninstall {
        #[command(flatten)]
        which: Which,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Says how the service is: code 0 if it is active, 1 if not.
    Status {
        #[command(flatten)]
        which: Which,
    },
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Which {
    /// A service of your own, which runs as you: no root is needed.
    #[arg(long, conflicts_with = "instance")]
    user: bool,
    /// One of several services of the system: agentd@NAME with a user, a configuration
    /// (/etc/agentd/NAME.toml) and a token of its own.
    #[arg(long, value_name = "NAME", value_parser = parse_instance)]
    instance: Option<String>,
}

/// Why the service is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("systemd does not run here: `agentd start` runs the agent in the background without it")]
    NoSystemd,
    #[error("a service of the system is root's to install: use sudo, or --user for a service of your own")]
    NotRoot,
    #[error("--user would make a service that runs as root: leave sudo away, or leave --user away")]
    UserIsRoot,
    #[error("there is no home folder, so there is no place for a service of your own")]
    NoHome,
    #[error(
        "the service cannot run {}: copy it to where only root can write, \
         `sudo install -m 755 {} /usr/local/bin/agentd`, and run that one", .0.display(), .0.display()
    )]
    Program(PathBuf),
    #[error("there is no configuration at {}: give --config FILE", .0.display())]
    NoConfig(PathBuf),
    #[error(
        "{} is there already and is different; it was left alone. To replace it: `agentd service uninstall`, \
         remove the file, and install again", .0.display()
    )]
    Different(PathBuf),
    #[error("{}", .0)]
    Config(#[from] ConfigError),
    #[error("in its new place the configuration is not valid: {0}")]
    InPlace(ConfigError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("`{command}` failed{}", hint(said))]
    Systemctl { command: String, said: String },
    #[error("{0}; everything was undone")]
    Undone(Box<Self>),
}

fn hint(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::File { path: path.into(), source }
}

/// A unit's user, agentd-NAME, may have 31 characters.
fn parse_instance(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !text.is_empty() && text.len() <= 24 && text.bytes().all(plain) && text != "agentd" {
        Ok(text.to_owned())
    } else {
        Err("an instance is named with at most 24 of a-z, 0-9 and '-', and not \"agentd\"".to_owned())
    }
}

/// Where a service's files are, and how systemd is spoken to.
struct Service {
    /// The unit's name.
    name: String,
    /// The unit's file where this program would write it.
    unit: PathBuf,
    /// The same where a package has it.
    packaged_unit: PathBuf,
    /// What is in it.
    unit_text: String,
    config: PathBuf,
    token: PathBuf,
    /// `--user` or nothing.
    scope: &'static [&'static str],
}

/// What runs `systemctl`: its arguments enter, what it printed leaves.
trait Systemctl {
    fn run(&self, arguments: &[&str]) -> Result<String, String>;
}

struct RealSystemctl;

impl Systemctl for RealSystemctl {
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Process::new("systemctl")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("systemctl cannot be run: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

/// Runs a command. `overrides` holds what flags and environment say about the token.
pub(crate) fn run(
    command: Command,
    overrides: &Overrides,
    environment: impl Fn(&str) -> Option<PathBuf>,
) -> Result<ExitCode, Error> {
    let (which, dry_run) = match &command {
        Command::Install { which, dry_run, .. } | Command::Uninstall { which, dry_run } => {
            (which.clone(), *dry_run)
        }
        Command::Status { which } => (which.clone(), true),
    };
    let is_root = rustix::process::geteuid().is_root();
    if which.user && is_root {
        return Err(Error::UserIsRoot);
    }
    if (!dry_run || matches!(command, Command::Status { .. })) && !Path::new("/run/systemd/system").exists() {
        return Err(Error::NoSystemd);
    }
    if !dry_run && !which.user && !is_root {
        return Err(Error::NotRoot);
    }
    let program = std::env::current_exe().map_err(file(Path::new("/proc/self/exe")))?;
    let service = Service::find(&which, Path::new("/"), &program, environment)?;
    let mut out = io::stdout();
    let done = match command {
        Command::Install { config, .. } => {
            let wanted = service.plan(config.as_deref(), overrides)?;
            if dry_run {
                service.show_install(&wanted, &mut out)
            } else {
                service.install(&wanted, &RealSystemctl)?;
                let _ = writeln!(out, "{} is installed and runs", service.name);
                if which.user {
                    let _ = writeln!(out, "it ends when you log out, unless you run: loginctl enable-linger");
                }
                Ok(())
            }
        }
        Command::Uninstall { .. } => service.uninstall(dry_run, &RealSystemctl, &mut out)?,
        Command::Status { .. } => return service.status(&RealSystemctl, &mut out),
    };
    // Nobody reads any more; what was to be done is done.
    let _ = done;
    Ok(ExitCode::SUCCESS)
}

/// A file to be installed.
struct Wanted {
    path: PathBuf,
    content: Content,
}

enum Content {
    Text(String),
    Token(Token),
}

impl Wanted {
    /// Whether it is there as it should be; an error if it is there and different.
    fn is_there(&self) -> Result<bool, Error> {
        let same = match &self.content {
            Content::Text(text) => match fs::read_to_string(&self.path) {
                Ok(there) => there == *text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(file(&self.path)(error)),
            },
            Content::Token(token) => {
                if !self.path.exists() {
                    return Ok(false);
                }
                let there = TokenSource::File(self.path.clone()).read().map_err(ConfigError::from)?;
                there == *token
            }
        };
        if same { Ok(true) } else { Err(Error::Different(self.path.clone())) }
    }

    fn write(&self) -> io::Result<()> {
        match &self.content {
            Content::Token(token) => token.write_to_new(&self.path),
            Content::Text(text) => {
                let mut options = fs::OpenOptions::new();
                options.write(true).create_new(true).mode(0o644).open(&self.path)?.write_all(text.as_bytes())
            }
        }
    }
}

/// What an installation has made, to be removed again unless all of it succeeds.
#[derive(Default)]
struct Made {
    /// Files and folders, in the order in which they were made.
    paths: Vec<PathBuf>,
}

impl Made {
    fn folder(&mut self, path: &Path) -> Result<(), Error> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        fs::create_dir(path).map_err(file(path))?;
        self.paths.push(path.into());
        Ok(())
    }

    fn undo(self) {
        for path in self.paths.iter().rev() {
            // A folder that somebody else uses by now is not empty and stays.
            let _ = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    }
}

impl Service {
    fn find(
        which: &Which,
        root: &Path,
        program: &Path,
        environment: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, Error> {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+".contains(b);
        let text = program.to_str().filter(|text| text.bytes().all(|b| plain(&b)));
        let Some(text) = text else { return Err(Error::Program(program.into())) };
        let unit_text = |unit: &str| unit.replace(PACKAGED_PROGRAM, text);
        if which.user {
            let home = || environment("HOME").map(|home| home.join(".config"));
            let folder = environment("XDG_CONFIG_HOME").or_else(home).ok_or(Error::NoHome)?;
            return Ok(Self {
                name: "agentd.service".into(),
                unit: folder.join("systemd/user/agentd.service"),
                packaged_unit: root.join("usr/lib/systemd/user/agentd.service"),
                unit_text: unit_text(USER_UNIT),
                config: folder.join("agentd/agentd.toml"),
                token: folder.join("agentd/token"),
                scope: &["--user"],
            });
        }
        if UNSEEN.iter().any(|folder| program.starts_with(folder)) {
            return Err(Error::Program(program.into()));
        }
        let (name, file, unit, config, token) = match &which.instance {
            None => {
                ("agentd.service".into(), "agentd.service", SYSTEM_UNIT, "agentd.toml".into(), "token".into())
            }
            Some(instance) => (
                format!("agentd@{instance}.service"),
                "agentd@.service",
                TEMPLATE_UNIT,
                format!("{instance}.toml"),
                format!("{instance}.token"),
            ),
        };
        Ok(Self {
            name,
            unit: root.join("etc/systemd/system").join(file),
            packaged_unit: root.join("usr/lib/systemd/system").join(file),
            unit_text: unit_text(unit),
            config: root.join("etc/agentd").join(config),
            token: root.join("etc/agentd").join(token),
            scope: &[],
        })
    }

    /// What must be in place, all of it valid and none of it in the way of something different.
    fn plan(&self, config: Option<&Path>, overrides: &Overrides) -> Result<Vec<Wanted>, Error> {
        let source = config.unwrap_or(&self.config);
        if !source.exists() {
            return Err(Error::NoConfig(source.into()));
        }
        let overrides = Overrides {
            token_file: overrides.token_file.clone(),
            token: overrides.token.clone(),
            ..Overrides::default()
        };
        let token = match config::load(source, &overrides) {
            Ok(config) => config.token,
            // The service uses the token that is in place, whether or not the configuration names one.
            Err(_) if overrides.token_file.is_none() && overrides.token.is_none() && self.token.exists() => {
                let token_file = Some(self.token.clone());
                config::load(source, &Overrides { token_file, ..Overrides::default() })?.token
            }
            Err(error) => return Err(error.into()),
        };
        let text = fs::read_to_string(source).map_err(file(source))?;
        let mut wanted = Vec::new();
        let packaged = fs::read_to_string(&self.packaged_unit).is_ok_and(|text| text == self.unit_text);
        let unit =
            Wanted { path: self.unit.clone(), content: Content::Text(format!("{MARK}{}", self.unit_text)) };
        if !packaged || self.unit.exists() {
            wanted.push(unit);
        }
        wanted.push(Wanted { path: self.config.clone(), content: Content::Text(text) });
        wanted.push(Wanted { path: self.token.clone(), content: Content::Token(token) });
        for one in &wanted {
            one.is_there()?;
        }
        Ok(wanted)
    }

    fn show_install(&self, wanted: &[Wanted], out: &mut impl io::Write) -> io::Result<()> {
        for Wanted { path, content } in wanted {
            match content {
                _ if path.exists() => writeln!(out, "keeps    {}", path.display())?,
                Content::Token(_) => writeln!(out, "writes   {} (mode 600)", path.display())?,
                Content::Text(_) => writeln!(out, "writes   {} (mode 644)", path.display())?,
            }
        }
        for command in self.commands() {
            writeln!(out, "runs     systemctl {}", command.join(" "))?;
        }
        writeln!(out, "\n{}", self.unit_text)
    }

    fn commands(&self) -> [Vec<&str>; 2] {
        [[self.scope, &["daemon-reload"]].concat(), [self.scope, &["enable", "--now", &self.name]].concat()]
    }

    /// Writes what is wanted and starts the service. All or nothing.
    fn install(&self, wanted: &[Wanted], systemctl: &impl Systemctl) -> Result<(), Error> {
        let mut made = Made::default();
        let result = self.try_install(wanted, systemctl, &mut made);
        if result.is_err() {
            if made.paths.contains(&self.unit) || matches!(result, Err(Error::Systemctl { .. })) {
                let _ = systemctl.run(&[self.scope, &["disable", "--now", &self.name]].concat());
            }
            let is_begun = !made.paths.is_empty() || matches!(result, Err(Error::Systemctl { .. }));
            made.undo();
            let _ = systemctl.run(&[self.scope, &["daemon-reload"]].concat());
            return result.map_err(|error| if is_begun { Error::Undone(Box::new(error)) } else { error });
        }
        result
    }

    fn try_install(
        &self,
        wanted: &[Wanted],
        systemctl: &impl Systemctl,
        made: &mut Made,
    ) -> Result<(), Error> {
        for one in wanted {
            if one.is_there()? {
                continue;
            }
            if let Some(folder) = one.path.parent() {
                made.folder(folder)?;
            }
            let written = one.write();
            // Half a file is removed as well, but not one that somebody else has just put there.
            if !matches!(&written, Err(error) if error.kind() == io::ErrorKind::AlreadyExists) {
                made.paths.push(one.path.clone());
            }
            written.map_err(file(&one.path))?;
        }
        let overrides = Overrides { token_file: Some(self.token.clone()), ..Overrides::default() };
        config::load(&self.config, &overrides).map_err(Error::InPlace)?;
        for command in self.commands() {
            systemctl.run(&command).map_err(|said| Error::Systemctl {
                command: format!("systemctl {}", command.join(" ")),
                said,
            })?;
        }
        Ok(())
    }

    /// Stops the service and removes what `install` wrote, but for the configuration. What is not there is
    /// skipped.
    fn uninstall(
        &self,
        dry_run: bool,
        systemctl: &impl Systemctl,
        out: &mut impl io::Write,
    ) -> Result<io::Result<()>, Error> {
        let mut lines = Vec::new();
        let disable = [self.scope, &["disable", "--now", &self.name]].concat();
        let reload = [self.scope, &["daemon-reload"]].concat();
        let is_there = self.unit.exists() || self.packaged_unit.exists();
        if is_there {
            if !dry_run {
                systemctl.run(&disable).map_err(|said| Error::Systemctl {
                    command: format!("systemctl {}", disable.join(" ")),
                    said,
                })?;
            }
            lines.push(format!("runs     systemctl {}", disable.join(" ")));
        }
        // A template may have other instances.
        let is_shared = self.name.contains('@');
        let is_ours = fs::read_to_string(&self.unit).is_ok_and(|text| text.starts_with(MARK));
        for path in [(is_ours && !is_shared).then_some(&self.unit), Some(&self.token)].into_iter().flatten() {
            if path.exists() {
                if !dry_run {
                    fs::remove_file(path).map_err(file(path))?;
                }
                lines.push(format!("removes  {}", path.display()));
            }
        }
        if is_there && !dry_run {
            let _ = systemctl.run(&reload);
        }
        if lines.is_empty() {
            lines.push(format!("{} is not installed", self.name));
        }
        if self.config.exists() {
            lines.push(format!("keeps    {}", self.config.display()));
        }
        Ok(lines.iter().try_for_each(|line| writeln!(out, "{line}")))
    }

    fn status(&self, systemctl: &impl Systemctl, out: &mut impl io::Write) -> Result<ExitCode, Error> {
        const ASKED: &str =
            "--property=LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result,StatusText";
        let command = [self.scope, &["show", ASKED, &self.name]].concat();
        let said = systemctl
            .run(&command)
            .map_err(|said| Error::Systemctl { command: format!("systemctl {}", command.join(" ")), said })?;
        let state = State(&said);
        let _ = writeln!(out, "{}: {state}", self.name);
        Ok(if state.of("ActiveState") == "active" { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What `systemctl show` says, for people.
struct State<'a>(&'a str);

impl<'a> State<'a> {
    fn of(&self, property: &str) -> &'a str {
        self.0.lines().find_map(|line| line.strip_prefix(property)?.strip_prefix('=')).unwrap_or_default()
    }
}

impl fmt::Display for State<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.of("LoadState") == "not-found" {
            return f.write_str("not installed");
        }
        write!(f, "{} ({}), {}", self.of("ActiveState"), self.of("SubState"), self.of("UnitFileState"))?;
        for (property, word, usual) in
            [("MainPID", "pid", "0"), ("NRestarts", "restarts", "0"), ("Result", "result", "success")]
        {
            if self.of(property) != usual && !self.of(property).is_empty() {
                write!(f, ", {word} {}", self.of(property))?;
            }
        }
        match self.of("StatusText") {
            "" => Ok(()),
            text => write!(f, "\n{text}"),
        }
    }
}

#[cfg(test)]
mod tests;
