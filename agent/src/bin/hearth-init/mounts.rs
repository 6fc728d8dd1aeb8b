//! The guest's file systems. `/tmp` is a part of the root, so that one bound holds for both. None
//! is needed to answer a ping, so they come after the first pong.

use alloc::vec::Vec;

use rustix::{
    fs::{Mode, chmod, mkdir, symlink},
    io::Errno,
    mount::{MountFlags, mount, mount_remount},
};

/// Where the cgroup file system is mounted.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Type, place, whether it holds devices or programs, options.
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

/// How much of the memory files may take: all of them together leave some, or else the kernel would
/// find nobody to kill but programs, one after the other, for memory that only files have.
pub(crate) const ROOT_SHARE: &core::ffi::CStr = c"mode=0755,size=60%";
const SHARED_MEMORY: &core::ffi::CStr = c"mode=1777,size=10%";
const DEVICES: &core::ffi::CStr = c"mode=0755,size=1m";

/// In order: some lie inside others.
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

/// Directories that programs expect; they lie in the root file system.
const DIRECTORIES: [(&str, u32); 5] = [
    ("/tmp", 0o1777),
    ("/run", 0o755),
    ("/etc", 0o755),
    ("/root", 0o700),
    ("/var", 0o755),
];

/// What devtmpfs leaves to user space.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts everything; gives what failed. A kernel without one of them, or a root that is read-only,
/// is no reason to stop: what needs the missing part says so itself.
pub(crate) fn prepare() -> Vec<(&'static str, Errno)> {
    let mut failed = Vec::new();
    for (kind, place, flags, options) in TABLE {
        make_dir(place, 0o755);
        match mount(kind, place, kind, flags, options) {
            // Already there: the kernel or an image has mounted it.
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
    // Whatever the mask, the kernel or an image says: the kernel makes its root for everybody to
    // write to, and what anybody then calls `/usr/bin/id` would be what root starts as `id`.
    for (place, mode) in [("/", 0o755), ("/tmp", 0o1777)] {
        let _ = chmod(place, Mode::from_raw_mode(mode));
    }
    failed
}

/// Bounds what the kernel mounted before there was an agent: its root, and the devices' directory.
pub(crate) fn bound() {
    let _ = mount_remount("/", MountFlags::empty(), ROOT_SHARE);
    let _ = mount_remount("/dev", MountFlags::NOSUID, DEVICES);
}

fn make_dir(place: &str, mode: u32) {
    let _ = mkdir(place, Mode::from_raw_mode(mode));
}
