//! Runs programs of an image while it is built, confined to the tree. They come from packages and
//! are not trusted.
//!
//! They run in namespaces of their own, with the tree's files, four devices and the processes of
//! the namespace. There is no network, and no process outside to signal. The user of this process
//! is root there, without capabilities that reach beyond files.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{
    Signal, chdir, fchdir, getegid, geteuid, pivot_root, set_parent_process_death_signal, setsid,
    umask,
};
use rustix::thread::{CapabilitySet, UnshareFlags, set_no_new_privs, unshare_unsafe};

use super::tree_root::TreeRoot;
use crate::command::{self, CommandError};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Devices of this machine that are bind-mounted.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];
/// The capabilities of root in the namespaces: those for files and owners.
const RIGHTS: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);
const NAMESPACES: UnshareFlags = UnshareFlags::NEWNS
    .union(UnshareFlags::NEWPID)
    .union(UnshareFlags::NEWNET)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS);
/// More than the number of capabilities that the kernel knows.
const RIGHTS_BITS: u32 = 64;

/// Returns why programs cannot be confined on this machine, or `None` if they can.
pub(crate) fn refused() -> Option<CommandError> {
    let ids = Ids::new();
    let mut probe = command::tool("true");
    // SAFETY: the closure makes system calls alone: no allocation, no lock.
    unsafe {
        probe.pre_exec(move || {
            isolate(&ids)?;
            // Some systems permit namespaces to all users, but no mounts in them.
            Ok(mount_change("/", PRIVATE)?)
        });
    }
    command::run(&mut probe, |_| {}).err()
}

const PRIVATE: MountPropagationFlags =
    MountPropagationFlags::PRIVATE.union(MountPropagationFlags::REC);

/// Returns a command for a program of the tree, given by its path in the tree.
pub(super) fn command(tree: &TreeRoot, program: &str) -> Result<Command, io::Error> {
    let (ids, dir) = (Ids::new(), tree.dir().try_clone_to_owned()?);
    let mut command = command::tool(program);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LC_ALL", "C.UTF-8")
        .env("SOURCE_DATE_EPOCH", "0");
    // SAFETY: the closure makes system calls alone: no allocation, no lock.
    unsafe {
        command.pre_exec(move || enter(dir.as_fd(), &ids));
    }
    Ok(command)
}

/// The mappings of this process's user and group for the new user namespace. Made before the fork,
/// because they need allocations.
struct Ids {
    user: String,
    group: String,
    is_root: bool,
}

impl Ids {
    fn new() -> Self {
        let user = geteuid();
        Self {
            user: format!("0 {} 1", user.as_raw()),
            group: format!("0 {} 1", getegid().as_raw()),
            is_root: user.is_root(),
        }
    }
}

/// Confines the child before it executes the program.
fn enter(tree: BorrowedFd<'_>, ids: &Ids) -> io::Result<()> {
    // The descriptor refers to a mount of the old namespace, but the working directory is carried
    // over into the new one.
    fchdir(tree)?;
    isolate(ids)?;
    become_init()?;
    setsid()?;
    umask(Mode::WGRP | Mode::WOTH);
    see_only_this_directory()?;
    rustix::system::sethostname(b"hearth")?;
    drop_rights()?;
    close_on_exec()
}

fn isolate(ids: &Ids) -> io::Result<()> {
    // SAFETY: this is a child with one thread, and no other code relies on its descriptors.
    let with_user = unsafe { unshare_unsafe(NAMESPACES | UnshareFlags::NEWUSER) };
    match with_user {
        Ok(()) => {
            write("/proc/self/setgroups", "deny")?;
            write("/proc/self/uid_map", &ids.user)?;
            write("/proc/self/gid_map", &ids.group)?;
            Ok(())
        }
        // Root can do without a user namespace.
        Err(_) if ids.is_root => {
            // SAFETY: as above; a list of length 0 needs no pointer.
            unsafe {
                unshare_unsafe(NAMESPACES)?;
                check(libc::setgroups(0, std::ptr::null()).into())
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

fn write(path: &str, text: &str) -> io::Result<()> {
    let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(file).write_all(text.as_bytes())
}

/// Forks and returns in the child, the first process of the new PID namespace: when it ends, the
/// kernel kills all others there. The parent waits for the child and exits with its status. If the
/// parent is killed, so is the child.
fn become_init() -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: one thread, and both sides only make system calls.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(set_parent_process_death_signal(Some(Signal::KILL))?),
        child => {
            // SAFETY: what is closed is not used again; `status` is written before it is read;
            // `_exit` runs no code of this process's.
            unsafe {
                // `Command::spawn` waits until all copies of a pipe's end are closed, to learn
                // whether the program could be started. This process must not keep one.
                libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
                let mut status = 0;
                while libc::waitpid(child, &raw mut status, 0) == -1 && Errno::INTR == last() {}
                libc::_exit(match libc::WIFEXITED(status) {
                    true => libc::WEXITSTATUS(status),
                    false => 128 + libc::WTERMSIG(status),
                })
            }
        }
    }
}

fn last() -> Errno {
    let errno = io::Error::last_os_error().raw_os_error();
    Errno::from_raw_os_error(errno.unwrap_or(0))
}

/// Makes the working directory the root of all files that this process can see.
fn see_only_this_directory() -> io::Result<()> {
    mount_change("/", PRIVATE)?;
    let here = fstatvfs(open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)?.f_flag;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mut devices: [Option<OwnedFd>; DEVICES.len()] = [const { None }; DEVICES.len()];
    for (device, path) in devices.iter_mut().zip(DEVICES) {
        *device = Some(open_tree(CWD, path, clone)?);
    }
    let processes = processes();
    let world = open_tree(CWD, ".", clone)?;
    attach(&world, ".")?;
    fchdir(&world)?;
    // This mounts the old root over the new one; it is then unmounted.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount_remount(
        "/",
        kept(here) | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::BIND,
        "",
    )?;
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount(
        c"tmpfs",
        "/dev",
        c"tmpfs",
        quiet,
        Some(c"mode=0755,size=1m"),
    )?;
    for (device, path) in devices.iter().zip(DEVICES) {
        let place = open(
            path,
            OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::RUSR,
        )?;
        drop(place);
        if let Some(device) = device {
            attach(device, path)?;
        }
    }
    // Programs can do without `/proc` where it cannot be mounted.
    if let Ok(processes) = processes {
        attach(&processes, "/proc")?;
    }
    Ok(())
}

/// Makes a `/proc` with the processes of the namespace only, without files about this machine. The
/// kernel permits this only while another `/proc` is visible, so it is made before the old root is
/// gone.
fn processes() -> Result<OwnedFd, Errno> {
    let proc = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&proc, "subset", "pid")?;
    fsconfig_create(&proc)?;
    let closed = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&proc, FsMountFlags::FSMOUNT_CLOEXEC, closed)
}

fn attach(mount: &OwnedFd, path: &str) -> io::Result<()> {
    Ok(move_mount(
        mount,
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Returns the mount flags that are set and that an ordinary user may not clear.
fn kept(has: StatVfsMountFlags) -> MountFlags {
    let pairs = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let kept = pairs.iter().filter(|(flag, _)| has.contains(*flag));
    kept.fold(MountFlags::empty(), |all, (_, flag)| all | *flag)
}

/// Drops capabilities for good: neither a set-id bit nor being root restores them.
fn drop_rights() -> io::Result<()> {
    set_no_new_privs(true)?;
    for right in (0..RIGHTS_BITS).filter(|right| RIGHTS.bits() & (1 << right) == 0) {
        // SAFETY: only numbers are passed.
        match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(right), 0, 0, 0) } {
            0 => {}
            _ if last() == Errno::INVAL => break,
            _ => return Err(last().into()),
        }
    }
    Ok(())
}

/// Marks all descriptors from 3 up as close-on-exec, so that no program of the image inherits them.
pub(super) fn close_on_exec() -> io::Result<()> {
    // SAFETY: only numbers are passed; descriptors are closed at exec and not before.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
}

fn check(result: i64) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
