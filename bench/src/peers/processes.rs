//! Processes that belong together: enters the first one's id, leaves what all of them use and which sockets
//! are theirs.

use std::{
    collections::{BTreeMap, HashSet},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::unix::ffi::OsStrExt,
    time::Duration,
};

use anyhow::Context;

use crate::usage;

/// A process and whatever it has started, directly or not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree(pub(crate) u32);

/// A TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Socket {
    /// It listens there.
    Listening(SocketAddr),
    /// It is connected: its own address, the other one.
    Connected(SocketAddr, SocketAddr),
}

/// CPU time by process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cpu(BTreeMap<u32, Duration>);

impl Cpu {
    /// What was used since `before`. What a process used that has ended meanwhile is not known.
    pub(crate) fn since(&self, before: &Self) -> Duration {
        let used = |(pid, time): (&u32, &Duration)| {
            time.saturating_sub(before.0.get(pid).copied().unwrap_or_default())
        };
        self.0.iter().map(used).sum()
    }
}

impl Tree {
    /// All of them that live now, the first one first.
    fn processes(self) -> Vec<u32> {
        let mut children = BTreeMap::<u32, Vec<u32>>::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Some(parent) = parent(pid) {
                children.entry(parent).or_default().push(pid);
            }
        }
        let mut found = vec![self.0];
        let mut next = 0;
        while let Some(pid) = found.get(next) {
            found.extend(children.remove(pid).unwrap_or_default());
            next += 1;
        }
        found
    }

    /// The CPU time of all of them so far.
    pub(crate) fn cpu(self) -> Cpu {
        let all = self.processes().into_iter();
        Cpu(all.filter_map(|pid| usage::cpu_time(pid).map(|time| (pid, time))).collect())
    }

    /// 10^6 bytes that they have resident, pages that several of them share counted for each.
    pub(crate) fn resident(self) -> f64 {
        self.megabytes(::tests::resident_bytes)
    }

    /// 10^6 bytes of that which are nobody else's: what one more such process costs, for the pages of a program
    /// are there once.
    pub(crate) fn anonymous(self) -> f64 {
        self.megabytes(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let kib =
                status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?.split_whitespace().next()?;
            kib.parse::<u64>().ok().map(|kib| kib * 1024)
        })
    }

    /// The most that each of them has had resident, in sum.
    pub(crate) fn peak(self) -> f64 {
        self.megabytes(::tests::peak_resident_bytes)
    }

    fn megabytes(self, of: fn(u32) -> Option<u64>) -> f64 {
        self.processes().into_iter().filter_map(of).sum::<u64>() as f64 / 1e6
    }

    /// Whether one of them has that socket.
    ///
    /// # Errors
    ///
    /// What the kernel lists cannot be read.
    pub(crate) fn has(self, socket: Socket) -> anyhow::Result<bool> {
        let table = std::fs::read_to_string("/proc/net/tcp").context("reading /proc/net/tcp")?;
        let links: HashSet<String> = sockets(&table)
            .filter(|(one, _)| *one == socket)
            .map(|(_, inode)| format!("socket:[{inode}]"))
            .collect();
        Ok(self.processes().into_iter().any(|pid| {
            let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            files
                .filter_map(|file| std::fs::read_link(file.path()).ok())
                .any(|link| links.iter().any(|one| one.as_bytes() == link.as_os_str().as_bytes()))
        }))
    }
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// The sockets of `/proc/net/tcp`, each with its inode (proc(5)).
fn sockets(table: &str) -> impl Iterator<Item = (Socket, &str)> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, own, other, state, _, _, _, _, _, inode, ..] = fields[..] else { return None };
        let own = address(own)?;
        match state {
            "0A" => Some((Socket::Listening(own), inode)),
            "01" => Some((Socket::Connected(own, address(other)?), inode)),
            _ => None,
        }
    })
}

/// An address as the kernel prints it: its four bytes as one number of this machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let ip = Ipv4Addr::from(u32::from_str_radix(ip, 16).ok()?.to_ne_bytes());
    Some(SocketAddrV4::new(ip, u16::from_str_radix(port, 16).ok()?).into())
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_socket_belongs_to_the_process_that_has_it_and_to_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let own = stream.local_addr().unwrap();
        let this = Tree(std::process::id());
        assert!(this.has(Socket::Listening(address)).unwrap());
        assert!(this.has(Socket::Connected(own, address)).unwrap());
        assert!(!this.has(Socket::Connected(own, own)).unwrap());
        // The sockets are closed in what is started.
        let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let child = Tree(other.id());
        assert!(!child.has(Socket::Listening(address)).unwrap());
        assert!(this.processes().contains(&other.id()));
        assert_eq!(child.processes(), [other.id()]);
        assert!(
            child.anonymous() > 0.0 && child.anonymous() < child.resident(),
            "a part of what is resident"
        );
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn cpu_time_counts_from_before_and_new_processes_from_zero() {
        let at = |all: &[(u32, u64)]| {
            Cpu(all.iter().map(|&(pid, millis)| (pid, Duration::from_millis(millis))).collect())
        };
        let used = at(&[(1, 50), (3, 7)]).since(&at(&[(1, 30), (2, 100)]));
        assert_eq!(used, Duration::from_millis(27));
    }
}
