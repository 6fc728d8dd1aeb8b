//! The guest's file systems. `/tmp` is part of the root, so that one size limit holds for both. No
//! file system is needed to answer a ping, so they are mounted after the first pong.

use alloc::vec::Vec;

use rustix::{
    fs::{Mode, chmod, mkdir, symlink},
    io::Errno,
    mount::{MountFlags, mount, mount_remount},
};

/// Where the cgroup file system is mounted.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Type, place, flags (whether it may hold devices or programs), options.
type Entry = (
    &'static core::ffi::CStr,
    &'static str,
    MountFlags,
    Option<&'static core::ffi::CStr>,
);

const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// The share of memory that files may take. All tmpfs together leave some memory free: otherwise
/// the kernel would kill one program after the other for memory that only files hold.
pub(crate) const ROOT_SHARE: &core::ffi::CStr = c"mode=0755,size=60%";
const SHARED_MEMORY: &core::ffi::CStr = c"mode=1777,size=10%";
const DEVICES: &core::ffi::CStr = c"mode=0755,size=1m";

/// Mounted in this order: some lie inside others.
const TABLE: [Entry; 6] = [
    (c"devtmpfs", "/dev", MountFlags::NOSUID, Some(DEVICES)),
    (c"proc", "/proc", SAFE, None),
    (c"sysfs", "/sys", SAFE, None),
    (c"cgroup2", CGROUP_ROOT, SAFE, None),
    (
        c"devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        Some(c"mode=620,ptmxmode=666"),
    ),
    (c"tmpfs", "/dev/shm", PLAIN, Some(SHARED_MEMORY)),
];

/// Directories that programs expect, in the root file system.
const DIRECTORIES: [(&str, u32); 5] = [
    ("/tmp", 0o1777),
    ("/run", 0o755),
    ("/etc", 0o755),
    ("/root", 0o700),
    ("/var", 0o755),
];

/// Links in `/dev` that devtmpfs leaves to user space.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts everything and returns what failed. A kernel without one of the file systems, or a
/// read-only root, is no reason to stop: programs that need the missing part report it themselves.
pub(crate) fn prepare() -> Vec<(&'static str, Errno)> {
    let mut failed = Vec::new();
    for (kind, place, flags, options) in TABLE {
        make_dir(place, 0o755);
        match mount(kind, place, kind, flags, options) {
            // EBUSY: the kernel or an image has mounted it already.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => failed.push((place, errno)),
        }
    }
    for (place, mode) in DIRECTORIES {
        make_dir(place, mode);
    }
    for (target, place) in LINKS {
        let _ = symlink(target, place);
    }
    // Regardless of the umask, the kernel or an image: the kernel makes its root writable for all,
    // and a `/usr/bin/id` that any user puts there would be what root runs as `id`.
    for (place, mode) in [("/", 0o755), ("/tmp", 0o1777)] {
        let _ = chmod(place, Mode::from_raw_mode(mode));
    }
    failed
}

/// Limits the size of what the kernel mounted before the agent started: its root and `/dev`.
pub(crate) fn bound() {
    let _ = mount_remount("/", MountFlags::empty(), ROOT_SHARE);
    let _ = mount_remount("/dev", MountFlags::NOSUID, DEVICES);
}

fn make_dir(place: &str, mode: u32) {
    let _ = mkdir(place, Mode::from_raw_mode(mode));
}
