//! Kills all processes that a program started where there is no cgroup: its process group, its
//! session and its descendants.

use alloc::{collections::BTreeSet, format, vec, vec::Vec};

use rustix::{
    fs::{Dir, Mode, OFlags, open},
    io::{Errno, read},
    process::Pid,
};

use crate::sys;

/// Most processes looked at in one round.
const MOST: usize = 65_536;
/// Rounds before giving up on a program that forks as fast as it is killed.
const PASSES: usize = 16;

const STOP: u8 = 19;
/// SIGKILL.
pub(crate) const KILL: u8 = 9;
/// SIGTERM.
pub(crate) const TERM: u8 = 15;

/// Kills a program, its process group and session, and its remaining descendants. Processes that
/// left the session and lost their parent are not found; cgroups are needed for these.
///
/// All are stopped before any is killed: the children of a dead parent are reparented.
pub(crate) fn kill_tree(main: Pid) {
    sys::kill_group(main, STOP);
    let mut known = BTreeSet::from([main.as_raw_pid()]);
    for _ in 0..PASSES {
        let before = known.len();
        for process in processes() {
            let ours = process.session == main.as_raw_pid() || known.contains(&process.parent);
            if ours && known.insert(process.pid) {
                signal(process.pid, STOP);
            }
        }
        if known.len() == before {
            break;
        }
    }
    sys::kill_group(main, KILL);
    known.into_iter().for_each(|pid| signal(pid, KILL));
}

fn signal(pid: i32, signal: u8) {
    if let Some(pid) = Pid::from_raw(pid) {
        sys::kill(pid, signal);
    }
}

struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

fn processes() -> Vec<Process> {
    let Ok(dir) = open(
        "/proc",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(Dir::new) else {
        return vec![];
    };
    let process = |name: &str| {
        let pid = name.parse().ok()?;
        parse(pid, &stat(pid).ok()?)
    };
    dir.take(MOST)
        .flatten()
        .filter_map(|entry| process(entry.file_name().to_str().ok()?))
        .collect()
}

/// Reads the beginning of `/proc/<pid>/stat`, which has all fields needed here.
fn stat(pid: i32) -> Result<Vec<u8>, Errno> {
    let file = open(
        format!("/proc/{pid}/stat"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut text = vec![0; 256];
    let count = read(&file, &mut text)?;
    text.truncate(count);
    Ok(text)
}

/// Parses `pid (name) state ppid pgrp session …`; the name may hold anything, parentheses included.
fn parse(pid: i32, stat: &[u8]) -> Option<Process> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = core::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Process {
        pid,
        parent,
        session,
    })
}
