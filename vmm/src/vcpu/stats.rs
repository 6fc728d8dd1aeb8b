//! KVM's statistics of a vCPU, found by name (`Documentation/virt/kvm/api.rst`,
//! `KVM_GET_STATS_FD`).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVMIO, kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Name of the statistic that counts the instructions that KVM's emulator ran for the guest.
const EMULATED: &[u8] = b"insn_emulation";
/// Limit for the number of statistics, far above KVM's, and for the length of their names.
const MOST: u32 = 1024;

/// A vCPU's statistics. Holds the VM in the kernel for as long as it lives.
#[derive(Debug)]
pub(crate) struct VcpuStats {
    file: File,
    /// Offset of the count of emulated instructions in `file`.
    emulated: u64,
}

impl VcpuStats {
    /// # Errors
    /// The host's error (a kernel before 5.14 does not know the ioctl), or `Unsupported` from a
    /// kernel that does not count instructions.
    pub(crate) fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument and touches no memory of this process.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for the caller; nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let emulated = place_of(&file, EMULATED)?;
        Ok(Self { file, emulated })
    }

    /// Returns the number of instructions that KVM's emulator has run for this vCPU: nearly all of
    /// ring 0 where that is emulated, a few device accesses elsewhere.
    pub(crate) fn emulated_instructions(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        self.file.read_exact_at(&mut count, self.emulated)?;
        Ok(u64::from_ne_bytes(count))
    }
}

/// Returns the offset of the first value of the statistic `name` in `file`.
fn place_of(file: &File, name: &[u8]) -> io::Result<u64> {
    let mut words = [0; size_of::<kvm_stats_header>()];
    file.read_exact_at(&mut words, 0)?;
    let [_, name_size, count, _, descriptors, data] = split(&words);
    let step = size_of::<kvm_stats_desc>() as u64 + u64::from(name_size);
    let mut entry = vec![0; size_of::<kvm_stats_desc>() + name_size.min(MOST) as usize];
    for index in 0..u64::from(count.min(MOST)) {
        file.read_exact_at(&mut entry, u64::from(descriptors) + index * step)?;
        let (fixed, text) = entry.split_at(size_of::<kvm_stats_desc>());
        if text.split(|byte| *byte == 0).next() == Some(name) {
            // Third word: `offset` of the value within the data.
            let [_, _, offset, _] = split(fixed);
            return Ok(u64::from(data) + u64::from(offset));
        }
    }
    Err(io::ErrorKind::Unsupported.into())
}

/// Returns the first `N` words; missing ones are zero.
fn split<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = bytes.chunks_exact(4).map(|word| {
        let word = word.try_into().unwrap_or_default();
        u32::from_ne_bytes(word)
    });
    std::array::from_fn(|_| words.next().unwrap_or_default())
}
