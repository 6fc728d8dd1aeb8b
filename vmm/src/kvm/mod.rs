//! Creates KVM virtual machines: creation with retries, memory slots, interrupt controllers, vCPUs.

pub(crate) mod spare;

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::advice::advice;
use crate::layout;
use crate::memory::GuestRam;
use crate::virtio::pmem::PmemImage;

/// Attempts at `KVM_CREATE_VM` when a signal or a busy host interrupts it.
const CREATE_ATTEMPTS: u32 = 8;
/// Attempts at `KVM_RUN`.
const RUN_ATTEMPTS: u32 = 10;

/// An ioctl on a VM or vCPU failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed{}", advice(source))]
pub struct KvmError {
    /// The ioctl's name.
    pub call: &'static str,
    /// The host's error.
    pub source: std::io::Error,
}

impl KvmError {
    pub(crate) fn of(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
        move |e| KvmError {
            call,
            source: std::io::Error::from_raw_os_error(e.errno()),
        }
    }
}

/// Repeats `call` while it fails with one of the `passing` errors, at most `attempts` times in all,
/// with a longer pause each time.
fn patiently<T>(
    passing: &[i32],
    attempts: u32,
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    for attempt in 1..attempts {
        match call() {
            Err(e) if passing.contains(&e.errno()) => {
                std::thread::sleep(Duration::from_micros(u64::from(100 * attempt)));
            }
            answer => return answer,
        }
    }
    call()
}

/// Calls `KVM_RUN`, and repeats it while it fails with a transient error: ENOMEM (a busy host
/// returns it at the first run, for no reason) or EAGAIN (the start-up interrupt of a second vCPU
/// came; or KVM got no thread for a VM that runs for the first time).
pub(crate) fn run_patiently<T>(
    run: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    patiently(&[libc::ENOMEM, libc::EAGAIN], RUN_ATTEMPTS, run)
}

/// Calls `KVM_CREATE_VM`, and repeats it while it is interrupted (a busy host returns EINTR) or
/// short of resources (EAGAIN, ENOMEM).
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let passing = [libc::EINTR, libc::EAGAIN, libc::ENOMEM];
    patiently(&passing, CREATE_ATTEMPTS, || kvm.create_vm()).map_err(KvmError::of("KVM_CREATE_VM"))
}

/// Sets one memory slot for each region of `ram`. Must precede [`create_irqchip`]: after it, each
/// slot waits for a grace period of several milliseconds.
pub(crate) fn set_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(ram.map().iter()) {
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|_| KvmError {
                call: "memory slot",
                source: std::io::ErrorKind::InvalidInput.into(),
            })?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the region is mapped for as long as `ram` lives, and the owner of this VM keeps
        // `ram` until the VM's last fd is closed (see `VmInner`'s field order).
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Sets a read-only memory slot for each pmem image, after the slots of RAM.
pub(crate) fn set_images(
    vm: &VmFd,
    ram: &GuestRam,
    images: &[(PmemImage, u64)],
) -> Result<(), KvmError> {
    let first = u32::try_from(ram.map().num_regions()).unwrap_or(u32::MAX);
    for (slot, (image, address)) in (first..).zip(images) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: *address,
            memory_size: image.bytes(),
            userspace_addr: image.host_address(),
        };
        // SAFETY: the image is mapped for as long as a clone of it lives, and the owner of this VM
        // keeps one until the VM's last fd is closed (see `VmInner::teardown`).
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION (read-only)"))?;
    }
    Ok(())
}

/// Creates the in-kernel interrupt controllers and, if `pit`, the PIT. The PIT has a worker thread
/// that must stop when the VM is destroyed, so guests that do not need it get none.
pub(crate) fn create_irqchip(vm: &VmFd, pit: bool) -> Result<(), KvmError> {
    // Intel needs the TSS and the identity map for its real mode; AMD ignores them.
    vm.set_tss_address(layout::TSS)
        .map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(KvmError::of("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::of("KVM_CREATE_IRQCHIP"))?;
    if pit {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(config)
            .map_err(KvmError::of("KVM_CREATE_PIT2"))?;
    }
    Ok(())
}

/// Creates the `index`th vCPU and sets its CPUID, which KVM needs before any register: kernels of
/// 6.12 return EINVAL for `KVM_SET_SREGS` as long as there is none, and MSRs depend on it in all
/// kernels.
pub(crate) fn create_vcpu(vm: &VmFd, index: u8, cpuid: &CpuId) -> Result<VcpuFd, KvmError> {
    #[allow(clippy::disallowed_methods, reason = "the one place that may")]
    let vcpu = vm
        .create_vcpu(u64::from(index))
        .map_err(KvmError::of("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid)
        .map_err(KvmError::of("KVM_SET_CPUID2"))?;
    Ok(vcpu)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    use vmm_sys_util::signal::Killable;

    use super::*;
    use crate::vcpu::kick;

    /// FC#5179: the first `KVM_RUN` failed with ENOMEM for no reason. FC#5046: `KVM_CREATE_VM`
    /// failed with EINTR.
    #[test]
    fn an_error_that_passes_is_waited_for_and_one_that_stays_is_told() {
        let failing = |times: u32, errno: i32| {
            let mut calls = 0;
            let answer = patiently(&[libc::ENOMEM, libc::EINTR], 4, || {
                calls += 1;
                if calls > times {
                    return Ok(());
                }
                Err(kvm_ioctls::Error::new(errno))
            });
            (answer.map_err(|e| e.errno()), calls)
        };
        assert_eq!(failing(0, libc::ENOMEM), (Ok(()), 1));
        assert_eq!(failing(3, libc::ENOMEM), (Ok(()), 4));
        assert_eq!(failing(3, libc::EINTR), (Ok(()), 4));
        assert_eq!(failing(4, libc::EINTR), (Err(libc::EINTR), 4));
        assert_eq!(failing(1, libc::EFAULT), (Err(libc::EFAULT), 1));
    }

    /// Kernels of 6.12 refuse the registers of a vCPU without CPUID.
    #[test]
    fn a_vcpu_knows_its_cpuid_before_anything_else_is_asked_of_it() {
        let Ok(kvm) = Kvm::new() else {
            let _ = writeln!(std::io::stderr(), "\nNOT MEASURED: no /dev/kvm");
            return;
        };
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vm = create_vm(&kvm).unwrap();
        let vcpu = create_vcpu(&vm, 0, &cpuid).unwrap();
        let known = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        // KVM may leave out some of them.
        assert!(known.as_slice().iter().any(|leaf| leaf.function == 1));
        let sregs = vcpu.get_sregs().unwrap();
        vcpu.set_sregs(&sregs).unwrap();
    }

    /// FC#5046, on the host's own KVM: a signal that arrives while a VM is created.
    #[test]
    fn a_vm_is_made_although_signals_interrupt_its_making() {
        let Ok(kvm) = Kvm::new() else {
            let _ = writeln!(std::io::stderr(), "\nNOT MEASURED: no /dev/kvm");
            return;
        };
        kick::install().unwrap();
        let maker = std::thread::spawn(move || {
            let (begin, mut interrupted) = (Instant::now(), 0);
            while interrupted < 3 && begin.elapsed() < Duration::from_secs(30) {
                match kvm.create_vm() {
                    Ok(_) => {}
                    Err(e) if e.errno() == libc::EINTR => interrupted += 1,
                    Err(e) => panic!("{e}"),
                }
                create_vm(&kvm).unwrap();
            }
            interrupted
        });
        while !maker.is_finished() {
            maker.kill(kick::kick_signal()).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        if maker.join().unwrap() < 3 {
            let _ = writeln!(
                std::io::stderr(),
                "\nNOT MEASURED: this kernel is not interrupted while it makes a VM"
            );
        }
    }
}
