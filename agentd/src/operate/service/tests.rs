use std::{cell::RefCell, os::unix::fs::PermissionsExt as _};

use super::*;

/// A machine in a folder.
struct Machine {
    dir: tempfile::TempDir,
    config: PathBuf,
}

/// Notes what it is asked for, and fails where a command has this word.
#[derive(Default)]
struct Notes {
    fails_at: &'static str,
    commands: RefCell<Vec<String>>,
}

impl Systemctl for Notes {
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let command = arguments.join(" ");
        let fails = !self.fails_at.is_empty() && command.starts_with(self.fails_at);
        self.commands.borrow_mut().push(command);
        if fails { Err("no".into()) } else { Ok(String::new()) }
    }
}

fn write_token(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_token(&dir.path().join("my-token"), "secret\n");
        let config = dir.path().join("my.toml");
        let text = "[edge]\nurl = \"wss://edge.example.com\"\ntoken_file = \"my-token\"\n\
                    [[tunnel]]\nname = \"web\"\nupstream = 3000\n";
        fs::write(&config, text).unwrap();
        Self { dir, config }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn service(&self, which: &Which) -> Service {
        let home = self.path("home/me");
        Service::find(which, self.dir.path(), Path::new("/usr/local/bin/agentd"), move |name| {
            (name == "HOME").then(|| home.clone())
        })
        .unwrap()
    }

    fn install(&self, systemctl: &Notes) -> Result<(), Error> {
        let service = self.service(&SYSTEM);
        let overrides = Overrides { token_file: None, ..Overrides::default() };
        service.install(&service.plan(Some(&self.config), &overrides)?, systemctl)
    }

    /// Everything but what the caller brought.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                found.push(path.strip_prefix(root).unwrap().display().to_string());
                if path.is_dir() {
                    walk(&path, root, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), self.dir.path(), &mut found);
        found.retain(|path| !path.starts_with("my"));
        found.sort();
        found
    }
}

const SYSTEM: Which = Which { user: false, instance: None };

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_installation_writes_unit_configuration_and_token_and_starts_the_service() {
    let machine = Machine::new();
    let systemctl = Notes::default();
    machine.install(&systemctl).unwrap();
    assert_eq!(*systemctl.commands.borrow(), ["daemon-reload", "enable --now agentd.service"]);
    let unit = fs::read_to_string(machine.path("etc/systemd/system/agentd.service")).unwrap();
    assert!(unit.starts_with(MARK) && unit.contains("ExecStart=/usr/local/bin/agentd run"), "{unit}");
    assert!(unit.contains("DynamicUser=yes") && !unit.contains("User=root"));
    let token = machine.path("etc/agentd/token");
    assert_eq!((fs::read_to_string(&token).unwrap().as_str(), mode(&token)), ("secret\n", 0o600));
    assert_eq!(mode(&machine.path("etc/agentd/agentd.toml")), 0o644);

    // The same once more changes nothing.
    machine.install(&systemctl).unwrap();
    // Without a file it takes what is in place.
    let service = machine.service(&SYSTEM);
    fs::remove_file(machine.path("my-token")).unwrap();
    service.plan(None, &Overrides::default()).unwrap();

    let mut out = Vec::new();
    service.uninstall(false, &systemctl, &mut out).unwrap().unwrap();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("keeps") && out.contains("etc/agentd/agentd.toml"), "{out}");
    assert_eq!(
        machine.files(),
        ["etc", "etc/agentd", "etc/agentd/agentd.toml", "etc/systemd", "etc/systemd/system"]
    );
}

#[test]
fn what_is_there_and_different_is_refused_and_left_alone() {
    for (path, text) in [
        ("etc/agentd/agentd.toml", "# mine\n"),
        ("etc/agentd/token", "another\n"),
        ("etc/systemd/system/agentd.service", "[Unit]\n"),
    ] {
        let machine = Machine::new();
        fs::create_dir_all(machine.path(path).parent().unwrap()).unwrap();
        write_token(&machine.path(path), text);
        let before = machine.files();
        let systemctl = Notes::default();
        let error = machine.install(&systemctl).unwrap_err();
        assert!(matches!(&error, Error::Different(at) if *at == machine.path(path)), "{error}");
        assert_eq!(fs::read_to_string(machine.path(path)).unwrap(), text);
        assert_eq!((machine.files(), systemctl.commands.borrow().len()), (before, 0));
    }
}

#[test]
fn where_nothing_was_done_nothing_is_said_to_be_undone() {
    let machine = Machine::new();
    machine.install(&Notes::default()).unwrap();
    let before = machine.files();
    let service = machine.service(&SYSTEM);
    let mut out = Vec::new();
    let systemctl = Notes { fails_at: "show", ..Notes::default() };
    let error = service.status(&systemctl, &mut out).unwrap_err().to_string();
    assert!(error.starts_with("`systemctl show ") && error.ends_with("` failed: no"), "{error}");
    let systemctl = Notes { fails_at: "disable", ..Notes::default() };
    let error = service.uninstall(false, &systemctl, &mut out).unwrap_err().to_string();
    assert_eq!(error, "`systemctl disable --now agentd.service` failed: no");
    assert_eq!(machine.files(), before);
}

#[test]
fn an_installation_that_fails_leaves_nothing() {
    for fails_at in ["daemon-reload", "enable"] {
        let machine = Machine::new();
        let systemctl = Notes { fails_at, ..Notes::default() };
        let error = machine.install(&systemctl).unwrap_err();
        assert!(error.to_string().contains(fails_at) && error.to_string().contains("undone"), "{error}");
        assert!(error.to_string().ends_with("failed: no; everything was undone"), "{error}");
        assert_eq!(machine.files(), Vec::<String>::new());
        assert!(systemctl.commands.borrow().contains(&"disable --now agentd.service".to_owned()));
    }

    // Valid where it was, but what it includes does not come along.
    let machine = Machine::new();
    fs::write(machine.path("my-more.toml"), "[[tunnel]]\nname = \"more\"\nupstream = 1\n").unwrap();
    let text = fs::read_to_string(&machine.config).unwrap();
    fs::write(&machine.config, format!("include = [\"my-more.toml\"]\n{text}")).unwrap();
    let systemctl = Notes::default();
    let error = machine.install(&systemctl).unwrap_err();
    assert!(matches!(&error, Error::Undone(why) if matches!(**why, Error::InPlace(_))), "{error}");
    assert_eq!(machine.files(), Vec::<String>::new());
    assert!(!systemctl.commands.borrow().iter().any(|command| command.starts_with("enable")));
}

#[test]
fn a_bad_configuration_or_program_is_refused_before_anything_is_done() {
    let machine = Machine::new();
    fs::write(&machine.config, "[edge]\nurll = \"x\"\n").unwrap();
    assert!(matches!(machine.install(&Notes::default()), Err(Error::Config(_))));
    let service = machine.service(&SYSTEM);
    assert!(matches!(service.plan(None, &Overrides::default()), Err(Error::NoConfig(_))));
    assert_eq!(machine.files(), Vec::<String>::new());
    for program in ["/home/me/agentd", "/tmp/agentd", "/usr/local/bin/agent d", "/opt/100%/agentd"] {
        let found = Service::find(&SYSTEM, Path::new("/"), Path::new(program), |_| None);
        assert!(matches!(found, Err(Error::Program(_))), "{program}");
    }
}

#[test]
fn a_unit_that_a_package_brings_is_used() {
    let machine = Machine::new();
    let packaged = machine.path("usr/lib/systemd/system");
    fs::create_dir_all(&packaged).unwrap();
    let text = SYSTEM_UNIT.replace(PACKAGED_PROGRAM, "/usr/local/bin/agentd");
    fs::write(packaged.join("agentd.service"), text).unwrap();
    machine.install(&Notes::default()).unwrap();
    assert!(!machine.path("etc/systemd/system/agentd.service").exists());
    machine.service(&SYSTEM).uninstall(false, &Notes::default(), &mut Vec::new()).unwrap().unwrap();
    assert!(packaged.join("agentd.service").exists() && !machine.path("etc/agentd/token").exists());
}

#[test]
fn instances_and_users_have_their_own_places() {
    let machine = Machine::new();
    let instance = machine.service(&Which { user: false, instance: Some("one".into()) });
    assert_eq!(instance.name, "agentd@one.service");
    assert_eq!(instance.config, machine.path("etc/agentd/one.toml"));
    assert_eq!(instance.token, machine.path("etc/agentd/one.token"));
    assert_eq!(instance.unit, machine.path("etc/systemd/system/agentd@.service"));
    let user = machine.service(&Which { user: true, instance: None });
    assert_eq!(user.commands()[1], ["--user", "enable", "--now", "agentd.service"]);
    assert_eq!(user.unit, machine.path("home/me/.config/systemd/user/agentd.service"));
    assert_eq!(user.token, machine.path("home/me/.config/agentd/token"));
    for name in ["", "agentd", "a/b", "A", "a.b", &"a".repeat(25)] {
        parse_instance(name).unwrap_err();
    }
    parse_instance(&"a".repeat(24)).unwrap();
}

#[test]
fn a_dry_run_shows_all_of_it_but_the_token() {
    let machine = Machine::new();
    let service = machine.service(&SYSTEM);
    let mut out = Vec::new();
    let wanted = service.plan(Some(&machine.config), &Overrides::default()).unwrap();
    service.show_install(&wanted, &mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    for shown in ["etc/agentd/token (mode 600)", "systemctl enable --now agentd.service", "[Service]"] {
        assert!(out.contains(shown), "{out}");
    }
    assert!(!out.contains("secret"), "{out}");
    let mut gone = Vec::new();
    service.uninstall(true, &Notes::default(), &mut gone).unwrap().unwrap();
    assert!(String::from_utf8(gone).unwrap().contains("is not installed"));
    assert_eq!(machine.files(), Vec::<String>::new());
}

#[test]
fn the_state_is_said_in_one_line() {
    let state = |text| State(text).to_string();
    assert_eq!(state("LoadState=not-found\nActiveState=inactive\n"), "not installed");
    assert_eq!(
        state(
            "LoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\nMainPID=12\n\
             NRestarts=0\nResult=success\nStatusText=connected, 1 of 1 tunnels open\n"
        ),
        "active (running), enabled, pid 12\nconnected, 1 of 1 tunnels open"
    );
    assert_eq!(
        state(
            "LoadState=loaded\nActiveState=failed\nSubState=failed\nUnitFileState=enabled\nMainPID=0\nNRestarts=2\nResult=exit-code\nStatusText=\n"
        ),
        "failed (failed), enabled, restarts 2, result exit-code"
    );
}

#[test]
fn the_units_differ_only_in_names_and_leave_the_agent_time_to_drain() {
    let template = SYSTEM_UNIT
        .replace("Description=Tunnel agent", "Description=Tunnel agent (%i)")
        .replace("/etc/agentd/agentd.toml", "/etc/agentd/%i.toml")
        .replace("/etc/agentd/token", "/etc/agentd/%i.token")
        .replace("/etc/default/agentd", "/etc/default/agentd-%i")
        .replace("User=agentd", "User=agentd-%i")
        .replace("RuntimeDirectory=agentd", "RuntimeDirectory=agentd-%i");
    assert_eq!(template, TEMPLATE_UNIT);
    for unit in [SYSTEM_UNIT, TEMPLATE_UNIT, USER_UNIT] {
        let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        let timeout = config::parse_duration(value("TimeoutStopSec=")).unwrap();
        assert!(timeout > config::DEFAULT_GRACE_PERIOD);
        assert_eq!(value("RestartPreventExitStatus="), "77 78");
        assert!(unit.contains(&format!("={PACKAGED_PROGRAM} run")));
    }
}
