//! Making a vCPU thread leave `KVM_RUN`.
//!
//! One real-time signal ([`kick_signal`]) whose handler does nothing but set `immediate_exit` in the
//! vCPU's shared page. A signal that comes between the thread's last check and `KVM_RUN` therefore
//! makes that run return at once: no kick is lost. A thread that has not entered its loop yet has no
//! page to set; the kicker repeats until the thread acknowledges.

use std::cell::Cell;
use std::sync::{Mutex, OnceLock};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use super::VcpuError;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs; null elsewhere. Const-initialised
    /// and without a destructor, so that the handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// The signal that Hearth uses: `SIGRTMIN + 6`. An embedder must leave its disposition alone. The only other one that
/// the library changes is that of SIGBUS (see [`leave_sigbus_alone`](crate::leave_sigbus_alone)).
#[must_use]
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 6
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    leave_guest();
}

/// Lets the vCPU of this thread, if it runs one, leave the guest. For signal handlers.
pub(crate) fn leave_guest() {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Running` set the pointer on this thread and clears it before the vCPU's shared
        // page goes; a one-byte volatile store is async-signal-safe.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, once per process.
pub(crate) fn install() -> Result<(), VcpuError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|e| e.errno()))
        .map_err(|errno| VcpuError::Signal(std::io::Error::from_raw_os_error(errno)))
}

/// Lets the signal in on the calling thread, also where whoever started it blocks all signals (to read them from
/// a signalfd, say), which threads inherit.
pub(super) fn let_in() -> Result<(), VcpuError> {
    unblock_signal(kick_signal())
        .map_err(|error| VcpuError::Signal(std::io::Error::other(error.to_string())))
}

/// While it lives, kicks reach the vCPU on this thread.
pub(super) struct Running(());

impl Running {
    pub(super) fn new(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

/// Sends the kick signal to one thread, only ever while that thread lives.
#[derive(Debug, Default)]
pub(super) struct Kicker(Mutex<Option<libc::pid_t>>);

impl Kicker {
    /// The calling thread, which lets the signal in, can be kicked from now on.
    pub(super) fn enlist(&self) {
        // SAFETY: gettid has no preconditions.
        let tid = unsafe { libc::gettid() };
        *self.lock() = Some(tid);
    }

    /// The calling thread runs no vCPU of this VM any more: it may end, and its id be reused.
    pub(super) fn discharge(&self) {
        *self.lock() = None;
    }

    pub(super) fn kick(&self) {
        if let Some(tid) = *self.lock() {
            // SAFETY: the thread lives (`discharge` takes the lock before it ends), and the handler
            // of the signal was installed before any vCPU thread started.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<libc::pid_t>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}
