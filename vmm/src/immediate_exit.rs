//! Makes the vCPU of the calling thread leave `KVM_RUN`, from a signal handler: by
//! `kvm_run.immediate_exit` (Documentation/virt/kvm/api.rst, section 5).

use std::cell::Cell;

use kvm_ioctls::VcpuFd;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs; null elsewhere.
    /// Const-initialised and without a destructor, so that the handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Makes the vCPU of this thread, if it runs one, leave the guest. For signal handlers.
pub(crate) fn leave_guest() {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Running` set the pointer on this thread and clears it before the vCPU's shared
        // page goes; a one-byte volatile store is async-signal-safe.
        unsafe { flag.write_volatile(1) };
    }
}

/// Guard: while it lives, [`leave_guest`] reaches the vCPU on this thread.
pub(crate) struct Running(());

impl Running {
    pub(crate) fn new(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}
