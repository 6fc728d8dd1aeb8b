//! A minimal microVM monitor on KVM that runs inside the embedding program's process.
//!
//! A [`Vm`] is one guest: memory, vCPU threads, a serial console, and the virtio devices that
//! Hearth needs (vsock, balloon, read-only pmem). Exactly one value owns it; dropping that value at
//! any moment is safe and ends the guest. A misbehaving guest causes at most a typed error in the
//! embedding program: a bad driver gets its device marked `DEVICE_NEEDS_RESET`, a bad vCPU ends its
//! own VM.
//!
//! Wakers of tasks that wait for a guest run on a dedicated thread of the library, which holds no
//! lock. They may do anything, but a waker that blocks delays those of all VMs of the process.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use hearth_vmm::{Vm, VmConfig};
//!
//! let config = VmConfig::builder("vmlinux").initramfs("initramfs.cpio").console(true).build()?;
//! let vm = Vm::boot(&config)?;
//! println!("{}", vm.exited().await);
//! print!("{}", vm.console().text());
//! # Ok(())
//! # }
//! ```

mod advice;
mod boot;
mod boot_error;
mod bus;
mod caps;
mod config;
mod cpu;
mod devices;
mod forked;
mod hardware;
pub mod host;
mod immediate_exit;
mod kvm;
mod layout;
mod legacy;
mod limits;
pub mod memory;
mod pagemap;
mod placement;
mod prefetch;
mod reactor;
mod saved;
mod seccomp;
mod sigbus;
mod signals;
mod snapshot;
mod state;
mod teardown;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod testing;
mod threads;
mod vcpu;
pub mod virtio;
mod vm;
mod vm_fds;
mod vm_inner;
mod wake;

pub use boot::{BzImageError, CmdlineError, EntryChoice, KernelError, KernelFormat, LoadError};
pub use boot_error::BootError;
pub use config::{
    ConfigError, DEFAULT_MEMORY_MIB, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, VmConfig,
    VmConfigBuilder,
};
pub use hardware::GUEST_CID;
pub use host::{CpuProfile, Host, HostError};
pub use kvm::KvmError;
pub use legacy::console::{Chunk, Console};
pub use memory::HugePages;
pub use placement::VcpuThread;
pub use prefetch::WorkingSet;
pub use reactor::ReactorError;
pub use seccomp::SeccompError;
pub use sigbus::leave_sigbus_alone;
pub use snapshot::{Difference, PreparedVm, SnapshotError, StoreError, Template, cache};
pub use state::{Exit, InternalError, VmStatus};
#[doc(hidden)]
pub use threads::spawn_neutral;
pub use vcpu::kick::kick_signal;
pub use vcpu::{ExitCounters, VcpuError};
pub use virtio::DeviceFaults;
pub use virtio::balloon::{Balloon, BalloonError, BalloonStats};
pub use virtio::pmem::PmemError;
pub use virtio::vsock::VsockHost;
pub use vm::{PauseError, Vm};
pub use vm_inner::{CreateTimes, leaked_vms};
