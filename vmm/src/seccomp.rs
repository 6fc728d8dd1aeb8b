//! Seccomp filters for the threads that a guest could take over.
//!
//! A vCPU thread needs few system calls, an event thread few others. All others fail with `EPERM`:
//! a library must not end its caller's process. These threads can start no program, open no socket
//! or file, and make no memory executable. They share their memory with the threads of the
//! embedding program, which have no filter: the filters are a mitigation, not an isolation boundary
//! (`SECURITY.md`).
//!
//! Code of the embedding program that runs on these threads is confined, too: its `tracing`
//! subscriber, its panic hook, its allocator. Allocators, and writers to descriptors that are
//! already open, work. Its wakers run on another thread (see [`crate::wake`]).

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// A thread could not be confined.
#[derive(Debug, thiserror::Error)]
#[error(
    "the host's kernel refused a seccomp filter; it needs CONFIG_SECCOMP_FILTER, or switch the filters off with VmConfigBuilder::seccomp(false)"
)]
pub struct SeccompError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// Kinds of threads that have a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs the guest.
    Vcpu,
    /// Serves devices.
    Events,
}

/// System calls that all of these threads need: for memory, locks, time, open descriptors, and
/// their own exit.
const COMMON: [i64; 26] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Panics.
    libc::SYS_rt_sigaction,
    libc::SYS_write,
    libc::SYS_writev,
];
/// System calls that event threads need besides: to wait (epoll), and to give guest pages back to
/// the host (fallocate).
const EVENTS: [i64; 4] = [
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
];
/// Bits 8 to 15 of an `ioctl` request are its type (`_IOC_TYPE`, include/uapi/asm-generic/ioctl.h),
/// and KVM's type.
const IOCTL_TYPE_MASK: u64 = 0xff00;
const KVM_TYPE: u64 = 0xae00;

/// Installs the filter of `role` on the calling thread; it cannot be removed.
pub(crate) fn confine(role: Role) -> Result<(), SeccompError> {
    static VCPU: OnceLock<Option<BpfProgram>> = OnceLock::new();
    static EVENT: OnceLock<Option<BpfProgram>> = OnceLock::new();
    let slot = match role {
        Role::Vcpu => &VCPU,
        Role::Events => &EVENT,
    };
    let program = slot.get_or_init(|| filter(role).and_then(|filter| filter.try_into()).ok());
    let Some(program) = program else {
        return Err(SeccompError("the filter is not valid".into()));
    };
    seccompiler::apply_filter(program).map_err(|e| SeccompError(Box::new(e)))
}

fn filter(role: Role) -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        COMMON.into_iter().map(|call| (call, Vec::new())).collect();
    // No executable memory.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    }
    // To kick other vCPUs when this one ends the VM; no signals to other processes.
    let own = masked(0, u64::MAX, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    // The standard library checks a descriptor with `F_GETFD` before it closes it.
    let look = masked(1, u64::MAX, libc::F_GETFD as u64)?;
    rules.insert(libc::SYS_fcntl, vec![look]);
    match role {
        Role::Vcpu => {
            let kvm = masked(1, IOCTL_TYPE_MASK, KVM_TYPE)?;
            rules.insert(libc::SYS_ioctl, vec![kvm]);
            // The thread is named after the vCPU that it runs.
            let name = masked(0, u64::MAX, libc::PR_SET_NAME as u64)?;
            rules.insert(libc::SYS_prctl, vec![name]);
            // To delete the timer of a meter (see `vcpu::quota`).
            rules.insert(libc::SYS_timer_delete, Vec::new());
        }
        Role::Events => rules.extend(EVENTS.into_iter().map(|call| (call, Vec::new()))),
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
}

/// Returns a rule that allows a call whose `argument`, masked with `mask`, equals `value`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let op = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Qword,
        op,
        value,
    )?])
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::*;

    /// Runs `act` on a thread with a filter.
    fn confined<T: Send + 'static>(role: Role, act: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(move || {
            confine(role).unwrap();
            act()
        });
        thread.join().unwrap()
    }

    fn denied<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM))
    }

    fn called(result: i64) -> io::Result<()> {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn map(protection: i32) -> io::Result<()> {
        // SAFETY: a new private mapping of one page, at an address that the kernel chooses; it is
        // leaked.
        let address = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
        };
        called(if address == libc::MAP_FAILED { -1 } else { 0 })
    }

    #[test]
    fn what_a_guest_would_want_from_its_host_is_answered_with_eperm() {
        for role in [Role::Vcpu, Role::Events] {
            confined(role, move || {
                assert!(denied(std::process::Command::new("/bin/true").status()));
                assert!(denied(UdpSocket::bind("127.0.0.1:0")));
                assert!(denied(std::fs::read("/etc/passwd")));
                assert!(denied(std::thread::Builder::new().spawn(|| ())));
                assert!(denied(map(libc::PROT_READ | libc::PROT_EXEC)));
                // SAFETY: system calls without memory arguments, all of them refused.
                unsafe {
                    assert!(denied(called(libc::syscall(libc::SYS_execve, 0, 0, 0))));
                    assert!(denied(called(libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0))));
                    assert!(denied(called(libc::syscall(libc::SYS_bpf, 0, 0, 0))));
                    assert!(denied(called(libc::syscall(libc::SYS_setuid, 0))));
                }
            });
        }
    }

    #[test]
    fn what_the_threads_need_works() {
        for role in [Role::Vcpu, Role::Events] {
            confined(role, move || {
                assert!(map(libc::PROT_READ | libc::PROT_WRITE).is_ok());
                let large = vec![1u8; 8 << 20];
                assert_eq!(
                    large.iter().map(|b| usize::from(*b)).sum::<usize>(),
                    8 << 20
                );
                std::thread::sleep(std::time::Duration::from_millis(1));
                let lock = std::sync::Mutex::new(1);
                assert_eq!(*lock.lock().unwrap(), 1);
                assert!(std::panic::catch_unwind(|| panic!("expected")).is_err());
            });
        }
    }

    #[test]
    fn a_vcpu_thread_reaches_kvm_and_nothing_else_by_ioctl() {
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: neither ioctl reads or writes memory: /dev/null knows none, the filter refuses
        // one.
        let ask =
            move |request| unsafe { called(libc::ioctl(null.as_raw_fd(), request, 0).into()) };
        let (kvm, tty) = confined(Role::Vcpu, move || (ask(0xae80), ask(libc::TIOCSTI)));
        assert_eq!(kvm.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert!(denied(tty));
    }

    #[test]
    fn a_confined_thread_signals_nobody_but_its_own_process() {
        // Signal 0 only checks, and sends none (kill(2)); a process's first thread has its id.
        // SAFETY: system calls without memory arguments.
        let ask =
            |process: i32| unsafe { called(libc::syscall(libc::SYS_tgkill, process, process, 0)) };
        let own = std::process::id().cast_signed();
        let parent = std::os::unix::process::parent_id().cast_signed();
        assert!(ask(parent).is_ok());
        for role in [Role::Vcpu, Role::Events] {
            confined(role, move || {
                assert!(ask(own).is_ok());
                assert!(denied(ask(parent)));
            });
        }
    }

    #[test]
    fn a_filter_stays_on_its_thread() {
        confined(Role::Vcpu, || ());
        assert!(std::fs::read("/etc/passwd").is_ok());
    }
}
