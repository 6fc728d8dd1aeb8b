//! Why a VM could not be created.

use crate::boot::LoadError;
use crate::config::ConfigError;
use crate::host::HostError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::reactor::ReactorError;
use crate::vcpu::VcpuError;
use crate::virtio::pmem::PmemError;

/// Why a VM could not be created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The configuration is not possible on this host.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host cannot run guests.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Guest memory could not be created.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A pmem file cannot be given to the guest.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Kernel, initramfs or command line could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The saved state is not possible for a VM.
    #[error("the saved state cannot be used: {0}")]
    State(String),
    /// A KVM ioctl failed.
    #[error("KVM refused to make the VM")]
    Kvm(#[from] KvmError),
    /// A vCPU thread could not be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The event threads could not be used.
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    /// The host has no file descriptor left.
    #[error("the host has no file descriptor left for a device; raise ulimit -n")]
    Descriptors(#[source] std::io::Error),
}
