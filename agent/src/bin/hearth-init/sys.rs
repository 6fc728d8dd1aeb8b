//! System calls that have no safe wrapper elsewhere: vsock addresses, signalfd, wait4, signals by number, entropy.

use std::{
    mem::{self, MaybeUninit},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    ptr,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{Mode, OFlags, open},
    io::Errno,
    net::{
        AddressFamily, SocketAddrAny,
        addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
    },
    process::Pid,
};

/// An AF_VSOCK address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VsockAddr {
    pub(crate) cid: u32,
    pub(crate) port: u32,
}

impl VsockAddr {
    pub(crate) const ANY_CID: u32 = libc::VMADDR_CID_ANY;
    pub(crate) const HOST_CID: u32 = libc::VMADDR_CID_HOST;
}

// SAFETY: the pointer and length given to `f` are those of a whole, initialised `sockaddr_vm` that lives across the call.
unsafe impl SocketAddrArg for VsockAddr {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        // SAFETY: all zero is a valid `sockaddr_vm`.
        let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
        address.svm_family = AddressFamily::VSOCK.as_raw();
        address.svm_cid = self.cid;
        address.svm_port = self.port;
        f((&raw const address).cast(), VM_ADDR_LEN)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "16")]
const VM_ADDR_LEN: u32 = size_of::<libc::sockaddr_vm>() as u32;

/// The CID of a vsock peer; none for any other kind of address.
pub(crate) fn peer_cid(address: &SocketAddrAny) -> Option<u32> {
    if address.address_family() != AddressFamily::VSOCK || address.addr_len() < VM_ADDR_LEN {
        return None;
    }
    // SAFETY: `addr_len` bytes behind the pointer are initialised, and that is at least a whole `sockaddr_vm`.
    Some(unsafe { ptr::read_unaligned(address.as_ptr().cast::<libc::sockaddr_vm>()) }.svm_cid)
}

/// Makes descriptors 0 to 2 refer to something, so that none of ours lands there: the kernel starts PID 1 without them
/// when there is no console.
pub(crate) fn occupy_standard_fds() {
    // SAFETY: a borrowed number that is only polled; the answer for a closed one is POLLNVAL.
    let numbers = [0, 1, 2].map(|number| unsafe { std::os::fd::BorrowedFd::borrow_raw(number) });
    let mut fds = numbers
        .each_ref()
        .map(|fd| PollFd::new(fd, PollFlags::empty()));
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if matches!(poll(&mut fds, Some(&now)), Ok(1..)) {
        for _ in fds
            .iter()
            .filter(|fd| fd.revents().contains(PollFlags::NVAL))
        {
            // Takes the lowest free number, for good.
            if let Ok(filler) = eventfd(0, EventfdFlags::CLOEXEC) {
                mem::forget(filler);
            }
        }
    }
}

/// Keeps what this process inherited from being inherited further.
pub(crate) fn close_inherited_on_exec() {
    // SAFETY: changes the close-on-exec flag only.
    unsafe {
        libc::close_range(
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        )
    };
}

/// Blocks SIGCHLD and SIGPIPE and gives a descriptor that is readable when SIGCHLD is pending.
pub(crate) fn child_signals() -> Result<OwnedFd, Errno> {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` is initialised by sigemptyset; the descriptor, once valid, is owned by nobody else.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGPIPE);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
        libc::sigdelset(set.as_mut_ptr(), libc::SIGPIPE);
        match libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            fd @ 0.. => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(last_error()),
        }
    }
}

/// A dead child.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dead {
    pub(crate) pid: i32,
    pub(crate) status: i32,
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    pub(crate) max_rss_kib: u64,
}

/// Reaps one child, whichever, if one is dead.
pub(crate) fn reap() -> Option<Dead> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to live, writable memory of the right types; all zero is a valid rusage.
    let (pid, usage) = unsafe {
        (
            libc::wait4(-1, &raw mut status, libc::WNOHANG, usage.as_mut_ptr()),
            usage.assume_init(),
        )
    };
    let micros = |time: libc::timeval| {
        u64::try_from(time.tv_sec)
            .unwrap_or(0)
            .saturating_mul(1_000_000)
            .saturating_add(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    (pid > 0).then(|| Dead {
        pid,
        status,
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    })
}

/// Sends a signal by number (1 to 64) to a process.
pub(crate) fn kill(pid: Pid, signal: u8) -> bool {
    // SAFETY: passes numbers only.
    unsafe { libc::kill(pid.as_raw_pid(), signal.into()) == 0 }
}

/// Sends a signal by number (1 to 64) to a process group.
pub(crate) fn kill_group(group: Pid, signal: u8) -> bool {
    // SAFETY: passes numbers only.
    unsafe { libc::kill(-group.as_raw_pid(), signal.into()) == 0 }
}

/// Credits entropy to the kernel's generator and makes it reseed from that at once.
pub(crate) fn reseed(entropy: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let bytes = i32::try_from(entropy.len()).map_err(|_| Errno::INVAL)?;
    let bits = bytes.checked_mul(8).ok_or(Errno::INVAL)?;
    // struct rand_pool_info: bits, bytes, data.
    let info = [&bits.to_ne_bytes()[..], &bytes.to_ne_bytes()[..], entropy].concat();
    let random = open(
        Path::new("/dev/urandom"),
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: `info` is a rand_pool_info whose size field is that of its data; the second request takes no argument.
    let done = unsafe {
        libc::ioctl(fd, RNDADDENTROPY, info.as_ptr()) == 0 && libc::ioctl(fd, RNDRESEEDCRNG) == 0
    };
    if done { Ok(()) } else { Err(last_error()) }
}

/// Makes this process deaf to SIGTERM.
pub(crate) fn ignore_term() {
    // SAFETY: sets a disposition, no handler runs.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
}

/// Makes a command start in a session of its own.
pub(crate) fn in_own_session(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: a single system call between fork and exec.
    unsafe { command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?)) };
}

fn last_error() -> Errno {
    // SAFETY: the address is that of this thread's errno.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}
