//! The part of a core that memory buys in Lambda, given to each process of a function by a control group of its own.
//!
//! What enters is a number of megabytes; what leaves is a [`Group`] for each process, which is gone when it is dropped.
//! Control groups of version 2 are used where the machine has them, else those of version 1. Nothing is pretended: where the
//! machine lets no part of a core be set, there is no [`Share`], and the error says why.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::Pid;

/// How many megabytes buy one core (Lambda Developer Guide, "Configure Lambda function memory").
pub const MB_PER_CORE: u32 = 1769;

/// How many megabytes a function may have (Lambda Developer Guide, "Lambda quotas").
pub const MEMORY_MB: std::ops::RangeInclusive<u32> = 128..=10_240;

/// In what turns the part is given, in microseconds. AWS does not publish its own; this is an assumption.
const PERIOD_US: u32 = 20_000;

/// Where control groups are.
const ROOT: &str = "/sys/fs/cgroup";

/// What the name of a control group of this program begins with, before its process id.
const NAME: &str = "local-";

/// Why no part of a core can be set.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The machine has no control groups for processors, or this program cannot be found in them.
    #[error("this machine has no control groups of processors (cpu.max or cpu.cfs_quota_us)")]
    None,
    /// They may not be changed.
    #[error(
        "no part of a core can be set here: {0}: {1}; run it as root, or with a control group of its own: \
         systemd-run --user --scope -p Delegate=yes local ..."
    )]
    Refused(String, #[source] io::Error),
}

/// Which files of a control group say how much of a core it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
    One,
    /// `cpu.max`.
    Two,
}

/// A part of a core for each process. Its control group is gone when it is dropped, after those of the processes.
#[derive(Debug)]
pub struct Share {
    folder: PathBuf,
    version: Version,
    quota_us: u32,
    count: AtomicU32,
}

/// The control group of one process.
#[derive(Debug)]
pub struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // Its process has ended. What is left nevertheless is empty and holds nothing up.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

impl Share {
    /// What `memory_mb` buy.
    ///
    /// # Errors
    ///
    /// [`ShareError`] when this machine lets no part of a core be set.
    pub fn of(memory_mb: u32) -> Result<Self, ShareError> {
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|_| ShareError::None)?;
        Self::under(Path::new(ROOT), &own, memory_mb)
    }

    /// The same below `root`; `own` is what the kernel says about this program.
    fn under(root: &Path, own: &str, memory_mb: u32) -> Result<Self, ShareError> {
        let (version, parent) = parent(root, own).ok_or(ShareError::None)?;
        remove_left(&parent);
        let name = format!("{NAME}{}", process::id());
        if version == Version::Two {
            delegate(&parent, &name)?;
        }
        let share = Self {
            folder: parent.join(name),
            version,
            quota_us: quota_us(memory_mb),
            count: AtomicU32::new(0),
        };
        create(&share.folder)?;
        if version == Version::Two {
            write(&share.folder.join("cgroup.subtree_control"), "+cpu")?;
        }
        // Whether it works is known now, and not with the first process.
        drop(share.group()?);
        Ok(share)
    }

    fn group(&self) -> Result<Group, ShareError> {
        let group = Group(self.folder.join(self.count.fetch_add(1, Ordering::Relaxed).to_string()));
        create(&group.0)?;
        let quota = self.quota_us;
        match self.version {
            Version::One => {
                write(&group.0.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                write(&group.0.join("cpu.cfs_quota_us"), &quota.to_string())?;
            }
            Version::Two => write(&group.0.join("cpu.max"), &format!("{quota} {PERIOD_US}"))?,
        }
        Ok(group)
    }

    /// Gives a process, and whatever it starts, its part.
    ///
    /// # Errors
    ///
    /// [`ShareError`] when the kernel refuses.
    pub(super) fn give(&self, process: Pid) -> Result<Group, ShareError> {
        let group = self.group()?;
        write(&group.0.join("cgroup.procs"), &process.as_raw_nonzero().to_string())?;
        Ok(group)
    }
}

/// How much time of a core in each period, in microseconds.
const fn quota_us(memory_mb: u32) -> u32 {
    memory_mb * PERIOD_US / MB_PER_CORE
}

/// This program's own control group of processors.
fn parent(root: &Path, own: &str) -> Option<(Version, PathBuf)> {
    let below = |folder: &Path, path: &str| folder.join(path.trim_start_matches('/'));
    let mut groups = own.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    if root.join("cgroup.controllers").exists() {
        return groups
            .find(|(controllers, _)| controllers.is_empty())
            .map(|(_, path)| (Version::Two, below(root, path)));
    }
    let (controllers, path) =
        groups.find(|(controllers, _)| controllers.split(',').any(|one| one == "cpu"))?;
    Some((Version::One, below(&root.join(controllers), path)))
}

/// Removes the control groups of programs that were killed. Those of others that run have processes, or are in `/proc`.
fn remove_left(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix(NAME)?.split('.').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            for group in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(group.path());
            }
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Has the children of `parent` get parts of processors. A control group of version 2 that has processes gives its children
/// nothing, so this one goes into a child first.
fn delegate(parent: &Path, name: &str) -> Result<(), ShareError> {
    let control = parent.join("cgroup.subtree_control");
    let given = fs::read_to_string(&control).map_err(|error| refused(&control, error))?;
    if given.split_whitespace().any(|one| one == "cpu") {
        return Ok(());
    }
    let own = parent.join(format!("{name}.edge"));
    create(&own)?;
    write(&own.join("cgroup.procs"), &process::id().to_string())?;
    write(&control, "+cpu")
}

fn create(folder: &Path) -> Result<(), ShareError> {
    match fs::create_dir(folder) {
        // What a killed one with the same process id has left.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done.map_err(|error| refused(folder, error)),
    }
}

fn refused(path: &Path, error: io::Error) -> ShareError {
    ShareError::Refused(path.display().to_string(), error)
}

fn write(file: &Path, text: &str) -> Result<(), ShareError> {
    fs::write(file, text).map_err(|error| refused(file, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_1769_megabytes() {
        let quotas = [128, 256, 512, 1769, 10_240].map(quota_us);
        assert_eq!(quotas, [1447, 2894, 5788, 20_000, 115_771]);
        // The kernel takes no less than a millisecond.
        assert!(quota_us(*MEMORY_MB.start()) >= 1000);
    }

    /// A folder with these empty files, in place of the kernel's.
    fn kernel(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        root
    }

    /// What is written where.
    fn written(files: &[&str], own: &str) -> String {
        let root = kernel(files);
        let share = Share::under(root.path(), own, 256).unwrap();
        let group = share.give(Pid::from_raw(7).unwrap()).unwrap();
        let read = |file: &str| fs::read_to_string(group.0.join(file)).unwrap_or_default();
        let text = ["cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cgroup.procs"].map(read).join("|");
        let below = share.folder.strip_prefix(root.path()).unwrap().display();
        let edge = fs::read_to_string(share.folder.with_extension("edge").join("cgroup.procs"));
        let moved = edge.is_ok_and(|edge| edge == process::id().to_string());
        format!("{below}|{text}|{moved}")
    }

    #[test]
    fn both_versions_are_spoken() {
        let name = format!("{NAME}{}", process::id());
        let text = written(&["cgroup.controllers", "user.slice/cgroup.subtree_control"], "0::/user.slice\n");
        assert_eq!(text, format!("user.slice/{name}|2894 20000|||7|true"));
        for controllers in ["cpu", "cpu,cpuacct"] {
            let own = format!("3:cpuset:/\n2:{controllers}:/box\n0::/other\n");
            let text = written(&[&format!("{controllers}/box/tasks")], &own);
            assert_eq!(text, format!("{controllers}/box/{name}||2894|20000|7|false"));
        }
    }

    #[test]
    fn what_a_killed_one_has_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let mut ended = process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let left = root.path().join(format!("{NAME}{}", ended.id()));
        let kept =
            [format!("{NAME}{}", process::id()), "local-sync".to_owned()].map(|name| root.path().join(name));
        for folder in [&left, &kept[0], &kept[1]] {
            fs::create_dir_all(folder.join("0")).unwrap();
        }
        remove_left(root.path());
        assert!(!left.exists() && kept.iter().all(|folder| folder.exists()));
    }

    #[test]
    fn a_machine_that_lets_no_part_be_set_is_told_of() {
        let refused =
            |files: &[&str], own| Share::under(kernel(files).path(), own, 256).unwrap_err().to_string();
        let error = refused(&[], "");
        assert!(error.contains("has no control groups"), "{error}");
        let error = refused(&["cgroup.controllers"], "0::/mine\n");
        assert!(error.contains("mine/cgroup.subtree_control") && error.contains("Delegate=yes"), "{error}");
    }
}
