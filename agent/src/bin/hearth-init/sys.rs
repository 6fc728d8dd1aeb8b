//! System calls that have no safe wrapper elsewhere: vsock addresses, signalfd, wait4, signals by
//! number, entropy.

use alloc::vec::Vec;
use core::{
    arch::asm,
    mem::{self, MaybeUninit},
    ptr,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    fs::{Mode, OFlags, open},
    io::Errno,
    net::{
        AddressFamily, SocketAddrAny,
        addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
    },
    process::Pid,
};

/// Size of the kernel's signal set.
const SIGSET_BYTES: usize = 8;

/// Makes a system call.
///
/// # Safety
/// The arguments must be what the kernel expects of this call, and pointers among them valid for
/// it.
pub(crate) unsafe fn call(number: i64, args: [usize; 4]) -> Result<usize, Errno> {
    let result: isize;
    let [first, second, third, fourth] = args;
    // SAFETY: the instruction itself changes nothing but the registers named here; the caller
    // vouches for what the kernel does.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second, in("rdx") third,
            in("r10") fourth, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(i32::try_from(-result).map_or(Errno::INVAL, Errno::from_raw_os_error)),
    }
}

/// Standard input.
pub(crate) fn stdin() -> BorrowedFd<'static> {
    standard(0)
}

/// Standard output.
pub(crate) fn stdout() -> BorrowedFd<'static> {
    standard(1)
}

/// Standard error.
pub(crate) fn stderr() -> BorrowedFd<'static> {
    standard(2)
}

fn standard(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: nothing in this program closes 0 to 2. Started without them, calls on them fail,
    // which is handled.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Ends this process with an exit code.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        // SAFETY: passes a number.
        let _ = unsafe { call(libc::SYS_exit_group, [code.into(), 0, 0, 0]) };
    }
}

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

// SAFETY: the pointer and length given to `f` are those of a whole, initialised `sockaddr_vm` that
// lives across the call.
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

/// Returns the CID of a vsock peer; `None` for another kind of address.
pub(crate) fn peer_cid(address: &SocketAddrAny) -> Option<u32> {
    if address.address_family() != AddressFamily::VSOCK || address.addr_len() < VM_ADDR_LEN {
        return None;
    }
    // SAFETY: `addr_len` bytes behind the pointer are initialised, and that is at least a whole
    // `sockaddr_vm`.
    Some(unsafe { ptr::read_unaligned(address.as_ptr().cast::<libc::sockaddr_vm>()) }.svm_cid)
}

/// Makes descriptors 0 to 2 refer to something, so that no other file of the agent gets these
/// numbers: the kernel starts PID 1 without them when there is no console.
pub(crate) fn occupy_standard_fds() {
    let numbers = [stdin(), stdout(), stderr()];
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
            // Takes the lowest free number permanently.
            if let Ok(filler) = eventfd(0, EventfdFlags::CLOEXEC) {
                mem::forget(filler);
            }
        }
    }
}

/// Keeps programs from inheriting the descriptors that this process inherited.
pub(crate) fn close_inherited_on_exec() {
    const CLOSE_RANGE_CLOEXEC: usize = 4;
    // SAFETY: changes the close-on-exec flag only.
    let _ = unsafe {
        call(
            libc::SYS_close_range,
            [3, u32::MAX as usize, CLOSE_RANGE_CLOEXEC, 0],
        )
    };
}

/// Blocks SIGCHLD and SIGPIPE and returns a descriptor that is readable when SIGCHLD is pending.
pub(crate) fn child_signals() -> Result<OwnedFd, Errno> {
    const fn bit(signal: i32) -> u64 {
        1 << (signal - 1)
    }
    set_signal_mask(bit(libc::SIGCHLD) | bit(libc::SIGPIPE))?;
    let watched = bit(libc::SIGCHLD);
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: a live set of the kernel's size; the descriptor, once valid, is owned by nobody else.
    unsafe {
        let args = [
            usize::MAX,
            (&raw const watched).addr(),
            SIGSET_BYTES,
            flags.unsigned_abs() as usize,
        ];
        let fd = call(libc::SYS_signalfd4, args)?;
        Ok(OwnedFd::from_raw_fd(
            RawFd::try_from(fd).map_err(|_| Errno::BADF)?,
        ))
    }
}

/// Sets the signals that this thread blocks.
pub(crate) fn set_signal_mask(blocked: u64) -> Result<(), Errno> {
    // SAFETY: a live set of the kernel's size; the old one is not asked for.
    unsafe {
        let args = [
            libc::SIG_SETMASK.unsigned_abs() as usize,
            (&raw const blocked).addr(),
            0,
            SIGSET_BYTES,
        ];
        call(libc::SYS_rt_sigprocmask, args).map(drop)
    }
}

/// A dead child's status and resource usage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dead {
    pub(crate) pid: i32,
    pub(crate) status: i32,
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    pub(crate) max_rss_kib: u64,
}

/// Reaps any one child, if one is dead. `ECHILD`: there is no child, dead or alive.
pub(crate) fn reap() -> Result<Option<Dead>, Errno> {
    let mut status = 0_i32;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to live, writable memory of the right types; all zero is a valid
    // rusage.
    let (pid, usage) = unsafe {
        let nohang = libc::WNOHANG.unsigned_abs() as usize;
        let args = [
            usize::MAX,
            (&raw mut status).addr(),
            nohang,
            usage.as_mut_ptr().addr(),
        ];
        (call(libc::SYS_wait4, args)?, usage.assume_init())
    };
    let micros = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec)
            .unwrap_or(0)
            .saturating_mul(1_000_000);
        seconds.saturating_add(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    let pid = i32::try_from(pid).ok().filter(|&pid| pid > 0);
    Ok(pid.map(|pid| Dead {
        pid,
        status,
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    }))
}

/// Waits until the state of a traced process changes.
pub(crate) fn wait_for(pid: usize) -> Result<(), Errno> {
    const ALL_KINDS: usize = libc::__WALL.unsigned_abs() as usize;
    // SAFETY: neither the status nor the usage is asked for.
    unsafe { call(libc::SYS_wait4, [pid, 0, ALL_KINDS, 0]).map(drop) }
}

/// Sends a signal by number (1 to 64) to a process.
pub(crate) fn kill(pid: Pid, signal: u8) -> bool {
    send(pid.as_raw_pid(), signal)
}

/// Duplicates `fd` as `number`, for the program that this process is about to become.
pub(crate) fn give(fd: RawFd, number: RawFd) -> Result<(), Errno> {
    let (call_number, args) = match fd == number {
        false => (libc::SYS_dup2, [fd as usize, number as usize, 0, 0]),
        // It has that number already, and would be closed on exec.
        true => (libc::SYS_fcntl, [fd as usize, libc::F_SETFD as usize, 0, 0]),
    };
    // SAFETY: passes numbers only; this process no longer uses the file that `number` referred to.
    unsafe { call(call_number, args) }.map(drop)
}

/// Sends a signal by number (1 to 64) to a process group.
pub(crate) fn kill_group(group: Pid, signal: u8) -> bool {
    send(-group.as_raw_pid(), signal)
}

fn send(whom: i32, signal: u8) -> bool {
    // SAFETY: passes numbers only.
    unsafe {
        call(
            libc::SYS_kill,
            [whom as isize as usize, signal.into(), 0, 0],
        )
        .is_ok()
    }
}

/// Makes this process ignore SIGTERM.
pub(crate) fn ignore_term() {
    // The kernel's sigaction: handler, flags, restorer, mask.
    let ignore = [libc::SIG_IGN, 0, 0, 0];
    // SAFETY: a live structure of the kernel's layout; no handler runs.
    let _ = unsafe {
        let args = [
            libc::SIGTERM.unsigned_abs() as usize,
            (&raw const ignore).addr(),
            0,
            SIGSET_BYTES,
        ];
        call(libc::SYS_rt_sigaction, args)
    };
}

/// Changes the filesystem user id; returns the previous one.
pub(crate) fn set_fs_uid(uid: u32) -> u32 {
    filesystem_id(libc::SYS_setfsuid, uid)
}

/// Changes the filesystem group id; returns the previous one.
pub(crate) fn set_fs_gid(gid: u32) -> u32 {
    filesystem_id(libc::SYS_setfsgid, gid)
}

/// Returns the filesystem user id.
pub(crate) fn fs_uid() -> u32 {
    set_fs_uid(u32::MAX)
}

/// Returns the filesystem group id.
pub(crate) fn fs_gid() -> u32 {
    set_fs_gid(u32::MAX)
}

/// Sets a filesystem id and returns the previous one. All ones is no valid id and changes nothing.
fn filesystem_id(number: i64, id: u32) -> u32 {
    // SAFETY: passes a number.
    let before = unsafe { call(number, [id as usize, 0, 0, 0]) };
    before
        .ok()
        .and_then(|before| u32::try_from(before).ok())
        .unwrap_or(u32::MAX)
}

/// Credits entropy to the kernel's random generator and makes it reseed from it at once.
pub(crate) fn reseed(entropy: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: usize = 0x4008_5203;
    const RNDRESEEDCRNG: usize = 0x5207;
    let bytes = i32::try_from(entropy.len()).map_err(|_| Errno::INVAL)?;
    let bits = bytes.checked_mul(8).ok_or(Errno::INVAL)?;
    // struct rand_pool_info: bits, bytes, data.
    let info: Vec<u8> = [&bits.to_ne_bytes()[..], &bytes.to_ne_bytes()[..], entropy].concat();
    let random = open(
        "/dev/urandom",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let fd = random.as_raw_fd().unsigned_abs() as usize;
    // SAFETY: `info` is a rand_pool_info whose size field is that of its data; the second request
    // takes no argument.
    unsafe {
        call(
            libc::SYS_ioctl,
            [fd, RNDADDENTROPY, info.as_ptr().addr(), 0],
        )?;
        call(libc::SYS_ioctl, [fd, RNDRESEEDCRNG, 0, 0]).map(drop)
    }
}
