//! A program that an ordinary user runs in a guest to try to gain privileges. It is built without
//! Cargo packages and statically linked, because the guest has no libraries. `attempts WHAT
//! [ARGUMENT...]` prints a line `TRY NUMBER` for each try: the system's error number, or 0 if the
//! try succeeded.

use std::ffi::{CString, c_int, c_long};
use std::fs::OpenOptions;
use std::io::{Error, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

// arch/x86/entry/syscalls/syscall_64.tbl
const MMAP: c_long = 9;
const IOCTL: c_long = 16;
const ACCESS: c_long = 21;
const SOCKET: c_long = 41;
const CONNECT: c_long = 42;
const BIND: c_long = 49;
const LISTEN: c_long = 50;
const FORK: c_long = 57;
const KILL: c_long = 62;
const PTRACE: c_long = 101;
const SETUID: c_long = 105;
const SETSID: c_long = 112;
const SETGROUPS: c_long = 116;
const CAPSET: c_long = 126;
const MKNOD: c_long = 133;
const SETPRIORITY: c_long = 141;
const SCHED_SETSCHEDULER: c_long = 144;
const PIVOT_ROOT: c_long = 155;
const CHROOT: c_long = 161;
const SETTIMEOFDAY: c_long = 164;
const MOUNT: c_long = 165;
const REBOOT: c_long = 169;
const SETHOSTNAME: c_long = 170;
const SCHED_SETAFFINITY: c_long = 203;
const UNSHARE: c_long = 272;
const PRLIMIT: c_long = 302;
const PROCESS_VM_READV: c_long = 310;
const PROCESS_VM_WRITEV: c_long = 311;
const KCMP: c_long = 312;
const PIDFD_SEND_SIGNAL: c_long = 424;
const PIDFD_OPEN: c_long = 434;
const PIDFD_GETFD: c_long = 438;

const AGENT: c_long = 1;
const STOP: c_long = 19;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize| args[index].parse::<c_long>().unwrap();
    match args[0].as_str() {
        "signals" => signals(argument(1)),
        "trace" => trace(),
        "schedule" => schedule(),
        "files" => files(),
        "writable" => writable(),
        "plant" => plant(),
        "sockets" => sockets(argument(2)),
        "rights" => rights(),
        "namespaces" => namespaces(),
        "terminal" => terminal(&args[1]),
        "who" => who(),
        "stop-all" => stop_all(),
        "fork" => fork(),
        "memory" => memory(),
        other => panic!("{other}"),
    }
}

/// The error number of a system call, 0 if it succeeded.
macro_rules! error {
    ($($argument:expr),+) => {
        // SAFETY: each call is given what it expects, or fails.
        if unsafe { syscall($($argument),+) } < 0 {
            Error::last_os_error().raw_os_error().unwrap()
        } else {
            0
        }
    };
}

fn told(what: &str, error: c_int) {
    println!("{what} {error}");
}

fn signals(other: c_long) {
    for process in [AGENT, other] {
        for signal in [0, 1, 9, 10, 15, 17, 18, STOP] {
            told("kill", error!(KILL, process, signal));
        }
        // -1 would not be a group, but all processes.
        if process != AGENT {
            told("kill-group", error!(KILL, -process, 9 as c_long));
        }
        // SAFETY: numbers only.
        let fd = unsafe { syscall(PIDFD_OPEN, process, 0 as c_long) };
        told(
            "pidfd",
            error!(PIDFD_SEND_SIGNAL, fd, 9 as c_long, 0 as c_long, 0 as c_long),
        );
    }
}

fn trace() {
    const ATTACH: c_long = 16;
    const SEIZE: c_long = 0x4206;
    for request in [ATTACH, SEIZE] {
        told(
            "ptrace",
            error!(PTRACE, request, AGENT, 0 as c_long, 0 as c_long),
        );
    }
    let mut byte = [0_u8; 8];
    let here = [byte.as_mut_ptr() as usize, byte.len()];
    let there = [0x40_0000_usize, byte.len()];
    for call in [PROCESS_VM_READV, PROCESS_VM_WRITEV] {
        let (here, there) = (here.as_ptr(), there.as_ptr());
        told(
            "process-vm",
            error!(
                call,
                AGENT, here, 1 as c_long, there, 1 as c_long, 0 as c_long
            ),
        );
    }
    // SAFETY: numbers only.
    let fd = unsafe { syscall(PIDFD_OPEN, AGENT, 0 as c_long) };
    for number in 0..16 {
        told(
            "pidfd-getfd",
            error!(PIDFD_GETFD, fd, number as c_long, 0 as c_long),
        );
    }
    told(
        "kcmp",
        error!(KCMP, AGENT, AGENT, 0 as c_long, 0 as c_long, 0 as c_long),
    );
    for file in [
        "environ", "auxv", "stack", "syscall", "io", "maps", "smaps", "pagemap",
    ] {
        told(file, read(&format!("/proc/1/{file}")));
    }
    for file in [
        "mem",
        "oom_score_adj",
        "comm",
        "clear_refs",
        "coredump_filter",
    ] {
        told(file, write(&format!("/proc/1/{file}")));
    }
    for place in ["fd", "fdinfo", "map_files", "root/", "cwd/"] {
        let found = std::fs::read_dir(format!("/proc/1/{place}")).map(|_| ());
        told(place, code(found));
    }
    for link in ["exe", "ns/mnt", "ns/user", "ns/pid"] {
        told(link, read(&format!("/proc/1/{link}")));
    }
}

fn schedule() {
    let parameter = 1_i32;
    told(
        "scheduler",
        error!(SCHED_SETSCHEDULER, AGENT, 1 as c_long, &parameter),
    );
    let mask = 1_u64;
    told(
        "affinity",
        error!(SCHED_SETAFFINITY, AGENT, 8 as c_long, &mask),
    );
    told(
        "priority",
        error!(SETPRIORITY, 0 as c_long, AGENT, 19 as c_long),
    );
    let limit = [0_u64; 2];
    for resource in [0, 1, 7, 9] {
        told(
            "limit",
            error!(PRLIMIT, AGENT, resource as c_long, &limit, 0 as c_long),
        );
    }
}

fn files() {
    for place in [
        "/dev/console",
        "/dev/kmsg",
        "/dev/mem",
        "/dev/port",
        "/dev/kmem",
        "/dev/pmem0",
        "/dev/ttyS0",
        "/dev/hvc0",
        "/init",
        "/proc/kcore",
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hotplug",
        "/proc/sys/kernel/sysrq",
        "/proc/sys/kernel/random/boot_id",
        "/proc/sys/kernel/random/rekey",
        "/proc/sys/kernel/step_wall_clock",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/fs/suid_dumpable",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/cgroup.subtree_control",
        "/sys/fs/cgroup/exec-0/cgroup.procs",
        "/sys/fs/cgroup/exec-0/cgroup.kill",
        "/sys/fs/cgroup/exec-0/cgroup.freeze",
        "/sys/fs/cgroup/exec-0/pids.max",
        "/sys/kernel/uevent_helper",
        "/sys/power/state",
        "/etc/machine-id",
    ] {
        told(place, write(place));
    }
    for place in [
        "/file",
        "/.layer",
        "/etc/passwd",
        "/etc/ld.so.preload",
        "/root/file",
        "/run/file",
        "/dev/file",
        "/sys/fs/cgroup/file",
    ] {
        told(
            place,
            code(
                OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .open(place)
                    .map(|_| ()),
            ),
        );
    }
    // Directories where dynamic linkers look for libraries and where login shells look for scripts.
    for place in ["/lib", "/lib64", "/etc/profile.d"] {
        told(place, code(std::fs::create_dir(place)));
    }
    // The new name is on the same file system, so that a different file system is not the reason
    // for a failure.
    for place in ["/init", "/etc", "/etc/machine-id", "/tmp/attempts"] {
        told(
            "rename",
            code(std::fs::rename(place, format!("{place}.mine"))),
        );
        told("mode", code(set_mode(place)));
    }
    for place in ["/init", "/etc/machine-id", "/tmp/attempts"] {
        told("unlink", code(std::fs::remove_file(place)));
        told(place, write(place));
    }
}

fn set_mode(place: &str) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o777))
}

/// Prints all files that the kernel would let this user write to, except for links and the files of
/// processes in `/proc`.
fn writable() {
    let mut places = vec![PathBuf::from("/")];
    while let Some(place) = places.pop() {
        let name = CString::new(place.as_os_str().as_bytes()).unwrap();
        // W_OK
        if error!(ACCESS, name.as_ptr(), 2 as c_long) == 0 {
            println!("{}", place.display());
        }
        let Ok(entries) = std::fs::read_dir(&place) else {
            continue;
        };
        places.extend(entries.flatten().filter_map(|entry| {
            let path = entry.path();
            let of_process = place == Path::new("/proc")
                && (entry.file_name().as_bytes()[0].is_ascii_digit()
                    || ["self", "thread-self"]
                        .iter()
                        .any(|own| entry.file_name() == *own));
            let link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            (!link && !of_process).then_some(path)
        }));
    }
}

/// Copies itself, as `id`, to where programs are looked up by name.
fn plant() {
    for place in [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ] {
        told(place, code(std::fs::create_dir_all(place)));
        let copied = std::fs::copy("/proc/self/exe", format!("{place}/id"));
        told("id", code(copied.map(|_| ())));
    }
}

/// Returns an AF_VSOCK address.
fn address(cid: u32, port: u32) -> [u8; 16] {
    let mut address = [0; 16];
    address[0] = 40;
    address[4..8].copy_from_slice(&port.to_le_bytes());
    address[8..12].copy_from_slice(&cid.to_le_bytes());
    address
}

fn sockets(own: c_long) {
    let socket = |kind: c_long| {
        // SAFETY: numbers only.
        unsafe { syscall(SOCKET, 40 as c_long, kind, 0 as c_long) }
    };
    const STREAM: c_long = 1;
    const SEQPACKET: c_long = 5;
    let own = u32::try_from(own).unwrap();
    // Acts as the agent: its port, on each address, and ports below it.
    for (cid, port) in [(u32::MAX, 1024), (own, 1024), (u32::MAX, 1023), (own, 80)] {
        for kind in [STREAM, SEQPACKET] {
            let fd = socket(kind);
            let bound = error!(BIND, fd, &address(cid, port), 16 as c_long);
            told("bind", bound);
            if bound == 0 {
                told("listen", error!(LISTEN, fd, 1 as c_long));
            }
        }
    }
    // Acts as the host: connects to the agent from inside. Acts as the agent: connects to the
    // host's ports.
    for (cid, port) in [(1, 1024), (own, 1024), (0, 1024), (2, 1025), (2, 1024)] {
        let fd = socket(STREAM);
        told(
            "connect",
            error!(CONNECT, fd, &address(cid, port), 16 as c_long),
        );
    }
}

fn rights() {
    const NONE: c_long = 0;
    told("setuid", error!(SETUID, NONE));
    let group = 0_u32;
    told("setgroups", error!(SETGROUPS, 1 as c_long, &group));
    // _LINUX_CAPABILITY_VERSION_3, all capabilities.
    let (header, data) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
    told("capset", error!(CAPSET, &header, &data));
    told(
        "mknod",
        error!(
            MKNOD,
            c"/tmp/device".as_ptr(),
            0o020_666 as c_long,
            0x101 as c_long
        ),
    );
    told(
        "mount",
        error!(
            MOUNT,
            c"none".as_ptr(),
            c"/tmp".as_ptr(),
            c"tmpfs".as_ptr(),
            NONE,
            NONE
        ),
    );
    told("chroot", error!(CHROOT, c"/tmp".as_ptr()));
    told(
        "pivot-root",
        error!(PIVOT_ROOT, c"/".as_ptr(), c"/tmp".as_ptr()),
    );
    told("unshare", error!(UNSHARE, 0x2_0000 as c_long));
    told(
        "hostname",
        error!(SETHOSTNAME, c"mine".as_ptr(), 4 as c_long),
    );
    told("time", error!(SETTIMEOFDAY, &[0_u64; 2], NONE));
    told(
        "reboot",
        error!(
            REBOOT,
            0xfee1_dead_u64, 672_274_793 as c_long, 0x4321_fedc as c_long, NONE
        ),
    );
}

/// Takes all capabilities in new namespaces; they must not work outside of them.
fn namespaces() {
    const USER_AND_MOUNTS: c_long = 0x1002_0000;
    let made = error!(UNSHARE, USER_AND_MOUNTS);
    println!("made {made}");
    for signal in [9, STOP] {
        told("kill", error!(KILL, AGENT, signal));
    }
    told(
        "ptrace",
        error!(PTRACE, 0x4206 as c_long, AGENT, 0 as c_long, 0 as c_long),
    );
    for place in [
        "/proc/1/mem",
        "/proc/sys/kernel/core_pattern",
        "/proc/sysrq-trigger",
        "/dev/mem",
        "/dev/console",
        "/init",
    ] {
        told(place, write(place));
    }
    told(
        "hostname",
        error!(SETHOSTNAME, c"mine".as_ptr(), 4 as c_long),
    );
    told("time", error!(SETTIMEOFDAY, &[0_u64; 2], 0 as c_long));
    told(
        "mknod",
        error!(
            MKNOD,
            c"/tmp/device".as_ptr(),
            0o020_666 as c_long,
            0x101 as c_long
        ),
    );
    let none = 0 as c_long;
    told(
        "reboot",
        error!(
            REBOOT,
            0xfee1_dead_u64, 672_274_793 as c_long, 0x4321_fedc as c_long, none
        ),
    );
    // SAFETY: numbers only.
    let fd = unsafe { syscall(SOCKET, 40 as c_long, 1 as c_long, 0 as c_long) };
    told(
        "bind",
        error!(BIND, fd, &address(u32::MAX, 1023), 16 as c_long),
    );
    // Mounts the image again, from its device, without the file systems that lie over it.
    let target = c"/tmp".as_ptr();
    told(
        "mount",
        error!(
            MOUNT,
            c"devtmpfs".as_ptr(),
            target,
            c"devtmpfs".as_ptr(),
            none,
            none
        ),
    );
    told(
        "mount",
        error!(
            MOUNT,
            c"/dev/pmem0".as_ptr(),
            target,
            c"erofs".as_ptr(),
            none,
            none
        ),
    );
    told("cgroup", write("/sys/fs/cgroup/cgroup.procs"));
}

/// Uses another request's terminal.
fn terminal(place: &str) {
    const CONTROL: c_long = 0x540e;
    const TYPE: c_long = 0x5412;
    // SAFETY: numbers only.
    unsafe { syscall(SETSID) };
    match OpenOptions::new().read(true).write(true).open(place) {
        Err(error) => told("open", error.raw_os_error().unwrap()),
        Ok(terminal) => {
            let fd = terminal.as_raw_fd() as c_long;
            told("type", error!(IOCTL, fd, TYPE, c"x".as_ptr()));
            for force in [0, 1] {
                told("control", error!(IOCTL, fd, CONTROL, force as c_long));
            }
        }
    }
}

fn who() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for line in status.lines() {
        if ["Uid:", "Gid:", "CapEff:", "NoNewPrivs:"]
            .iter()
            .any(|name| line.starts_with(name))
        {
            println!("{}", line.replace('\t', " "));
        }
    }
}

/// Stops all other processes of its user until it is killed.
fn stop_all() {
    println!("stopping");
    loop {
        let _ = error!(KILL, -1 as c_long, STOP);
    }
}

/// Creates processes until no more can be created, and keeps them.
fn fork() {
    let mut made = 0;
    loop {
        // SAFETY: the child only sleeps.
        match unsafe { syscall(FORK) } {
            0 => loop {
                std::thread::sleep(std::time::Duration::from_secs(1000));
            },
            -1 => break,
            _ => made += 1,
        }
    }
    println!("made {made}");
    std::thread::sleep(std::time::Duration::from_secs(1000));
}

/// Allocates memory until it is killed for that, or none is left.
fn memory() {
    println!("taking");
    let mut chunk = 0_usize;
    loop {
        const ANONYMOUS_PRIVATE_POPULATED: c_long = 0x8022;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            syscall(
                MMAP,
                0 as c_long,
                1 << 20,
                3 as c_long,
                ANONYMOUS_PRIVATE_POPULATED,
                -1 as c_long,
                0 as c_long,
            )
        };
        if at < 0 {
            break;
        }
        chunk += 1;
    }
    println!("took {chunk}");
}

fn read(place: &str) -> c_int {
    use std::io::Read;
    let opened = OpenOptions::new().read(true).open(place);
    code(opened.and_then(|mut file| file.read(&mut [0; 1]).map(|_| ())))
}

fn write(place: &str) -> c_int {
    let opened = OpenOptions::new().write(true).open(place);
    code(opened.and_then(|mut file| file.write_all(b"1")))
}

fn code(result: std::io::Result<()>) -> c_int {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0)
}
