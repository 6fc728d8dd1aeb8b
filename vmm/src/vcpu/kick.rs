//! Makes a vCPU thread leave `KVM_RUN`.
//!
//! A kick is one signal ([`kick_signal`]) whose handler only sets `immediate_exit` in the vCPU's
//! shared page. A signal that arrives between the thread's last check and `KVM_RUN` therefore makes
//! that run return at once: no kick is lost. A thread that has not entered its loop yet has no page
//! to set; the kicker repeats until the thread acknowledges.
//!
//! It is a standard signal, because those are sent regardless of what is queued: a real-time signal
//! is refused once the user's processes have as many pending as `ulimit -i` allows
//! (`__send_signal_locked` in kernel/signal.c), and a vCPU could not be stopped then.

use std::sync::{Mutex, Once, OnceLock, PoisonError};

use vmm_sys_util::signal::unblock_signal;

use super::VcpuError;
use crate::immediate_exit::leave_guest;

/// The signal that this process uses; set when the handler is installed.
static CHOSEN: OnceLock<i32> = OnceLock::new();

/// Returns the signal that Hearth kicks vCPUs with: `SIGSTKFLT`, which Linux never sends on x86. If
/// the embedding program has a handler for `SIGSTKFLT` when it makes its first VM, it is the first
/// real-time signal from `SIGRTMIN + 6` on that has none. The embedding program must leave its
/// disposition alone from then on. The only other disposition that the library changes is that of
/// SIGBUS (see [`leave_sigbus_alone`](crate::leave_sigbus_alone)).
#[must_use]
pub fn kick_signal() -> i32 {
    CHOSEN.get().copied().unwrap_or(libc::SIGSTKFLT)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    leave_guest();
}

/// Installs the handler, once per process, for a signal that has no other handler. Later calls
/// check that it is still there.
pub(crate) fn install() -> Result<(), VcpuError> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&signal) = CHOSEN.get() {
        return match disposition(signal, None)? {
            ours if ours == handler() => Ok(()),
            _ => Err(VcpuError::SignalTaken(signal)),
        };
    }
    let realtime = libc::SIGRTMIN() + 6..=libc::SIGRTMAX();
    for signal in std::iter::once(libc::SIGSTKFLT).chain(realtime) {
        // An ignored signal counts as unused: its disposition may be inherited from the parent
        // process.
        if [libc::SIG_DFL, libc::SIG_IGN].contains(&disposition(signal, None)?) {
            disposition(signal, Some(handler()))?;
            CHOSEN.get_or_init(|| signal);
            return Ok(());
        }
    }
    Err(VcpuError::SignalTaken(libc::SIGSTKFLT))
}

fn handler() -> libc::sighandler_t {
    on_kick as *const () as libc::sighandler_t
}

/// Returns the handler of a signal, and replaces it with `new` if that is given.
fn disposition(
    signal: i32,
    new: Option<libc::sighandler_t>,
) -> Result<libc::sighandler_t, VcpuError> {
    // SAFETY: all-zero bytes are a valid sigaction: no flag, and an empty mask.
    let (mut old, mut action): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    let action = new.map(|handler| {
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_SIGINFO;
        &raw const action
    });
    // SAFETY: both pointers are null or to live structures; the handler may run on any thread at
    // any time.
    let done = unsafe { libc::sigaction(signal, action.unwrap_or(std::ptr::null()), &raw mut old) };
    match done {
        0 => Ok(old.sa_sigaction),
        _ => Err(VcpuError::Signal(std::io::Error::last_os_error())),
    }
}

/// Unblocks the signal on the calling thread, which begins with all signals blocked.
pub(super) fn let_in() -> Result<(), VcpuError> {
    unblock_signal(kick_signal())
        .map_err(|error| VcpuError::Signal(std::io::Error::other(error.to_string())))
}

/// Sends the kick signal to one thread, and only while that thread lives.
#[derive(Debug, Default)]
pub(super) struct Kicker(Mutex<Option<libc::pid_t>>);

impl Kicker {
    /// Registers the calling thread, which has unblocked the signal, for kicks.
    pub(super) fn enlist(&self) {
        // SAFETY: gettid has no preconditions.
        let tid = unsafe { libc::gettid() };
        *self.lock() = Some(tid);
    }

    /// Unregisters the thread, which runs no vCPU of this VM any more: it may end, and its id be
    /// reused.
    pub(super) fn discharge(&self) {
        *self.lock() = None;
    }

    pub(super) fn kick(&self) {
        let thread = self.lock();
        let Some(tid) = *thread else {
            return;
        };
        // SAFETY: the thread lives (`discharge` takes the lock, which is held here, before it
        // ends), and the handler of the signal was installed before any vCPU thread
        // started.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        let error = std::io::Error::last_os_error();
        drop(thread);
        if sent != 0 {
            // The only known refusal is of a real-time signal when the user's queue is full.
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                tracing::error!(%error, "a vCPU thread could not be signalled; check ulimit -i");
            });
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<libc::pid_t>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}
