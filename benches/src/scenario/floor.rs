//! The baseline: forking a one-vCPU guest by raw ioctls, without any code of Hearth's.
//!
//! The steps are fixed: a VM, one memory slot over a private mapping of a memory file, interrupt
//! controllers, a vCPU with CPUID, the saved state, an irqfd and an ioeventfd for each of two
//! devices, and `KVM_RUN` to the guest's first OUT. Any fork of a guest costs at least this.
//!
//! Like the guest that is compared with it, this one is in 64-bit mode with page tables in which
//! the processor has not set the accessed bits yet: KVM copies these pages for it, and walks them,
//! before its first instruction.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ScenarioError;

/// Guest memory in bytes.
const BYTES: usize = 128 << 20;
/// Address of the code.
const CODE_AT: u64 = 0x10_0000;
/// Address of the page tables, one behind the other: of level 4, 3 and 2.
const TABLES_AT: u64 = 0x9000;
/// Flags of their entries: present and writable; `LARGE` is a page of 2 MiB.
const TABLE: u64 = 3;
const LARGE: u64 = 0x83;
/// `l: out 0x80, al; jmp l`.
const CODE: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
/// IA32_DEBUGCTL (Intel SDM volume 4), which is not restored: KVM on AMD writes a line to the
/// kernel's log for each write of it.
const DEBUG_CONTROL: u32 = 0x1d9;
/// Number of devices that a Hearth guest has.
const DEVICES: u32 = 2;

/// A private mapping of the memory file, unmapped at drop.
struct Mapping(*mut libc::c_void);

impl Mapping {
    fn new(file: &File, flags: i32) -> Result<Self, ScenarioError> {
        // SAFETY: a new mapping of a file at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(ScenarioError::at("mmap")(std::io::Error::last_os_error()));
        }
        Ok(Self(at))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and the VM over it is closed before.
        unsafe { libc::munmap(self.0, BYTES) };
    }
}

struct Saved {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    irqchips: [kvm_irqchip; 3],
    clock: kvm_clock_data,
}

/// A guest that was saved once and is forked by [`Floor::fork`].
pub struct Floor {
    kvm: Kvm,
    cpuid: CpuId,
    memory: File,
    saved: Saved,
}

/// A VM without its state: the part that can be made ahead of demand. Field order is the order of
/// closing.
struct Shell {
    vcpu: VcpuFd,
    vm: VmFd,
    _mapping: Mapping,
    _fds: Vec<EventFd>,
}

/// Times of one fork.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From nothing to the first OUT.
    pub whole: Duration,
    /// From a prepared VM to the first OUT.
    pub from_shell: Duration,
}

fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ScenarioError {
    move |e| ScenarioError::at(call)(std::io::Error::from_raw_os_error(e.errno()))
}

impl Floor {
    /// Makes and saves the guest.
    ///
    /// # Errors
    /// When a call fails.
    pub fn new() -> Result<Self, ScenarioError> {
        let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let cpuid = system
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        // SAFETY: a new fd, checked before it is owned.
        let memory = unsafe {
            let fd = libc::memfd_create(c"floor".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(ScenarioError::at("memfd_create")(
                    std::io::Error::last_os_error(),
                ));
            }
            File::from_raw_fd(fd)
        };
        memory
            .set_len(BYTES as u64)
            .map_err(ScenarioError::at("ftruncate"))?;
        for (at, bytes) in contents() {
            std::os::unix::fs::FileExt::write_all_at(&memory, &bytes, at)
                .map_err(ScenarioError::at("write"))?;
        }
        let indices = system
            .get_msr_index_list()
            .map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .to_vec();
        let mut shell = shell(&system, &cpuid, &memory)?;
        let mut sregs = shell.vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        enter_long_mode(&mut sregs);
        shell.vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: CODE_AT,
            rflags: 2,
            ..Default::default()
        };
        shell.vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))?;
        run_to_out(&mut shell.vcpu)?;
        // Completes the OUT, so that the saved state is at the start of the next instruction.
        shell.vcpu.set_kvm_immediate_exit(1);
        let _ = shell.vcpu.run();
        shell.vcpu.set_kvm_immediate_exit(0);
        let saved = save(&shell, &indices)?;
        Ok(Self {
            kvm: system,
            cpuid,
            memory,
            saved,
        })
    }

    /// Forks once; the VM is closed after the clock was read.
    ///
    /// # Errors
    /// When a call fails.
    pub fn fork(&self) -> Result<Times, ScenarioError> {
        let start = Instant::now();
        let mut shell = shell(&self.kvm, &self.cpuid, &self.memory)?;
        let ready = Instant::now();
        restore(&shell, &self.saved)?;
        run_to_out(&mut shell.vcpu)?;
        let end = Instant::now();
        Ok(Times {
            whole: end - start,
            from_shell: end - ready,
        })
    }
}

/// Returns the guest's memory: its code, and page tables that map the first GiB to itself.
fn contents() -> Vec<(u64, Vec<u8>)> {
    let (level3, level2) = (TABLES_AT + 0x1000, TABLES_AT + 0x2000);
    let pages = (0..512u64).flat_map(|n| (n << 21 | LARGE).to_le_bytes());
    vec![
        (CODE_AT, CODE.to_vec()),
        (TABLES_AT, (level3 | TABLE).to_le_bytes().to_vec()),
        (level3, (level2 | TABLE).to_le_bytes().to_vec()),
        (level2, pages.collect()),
    ]
}

/// Sets 64-bit mode with paging (Intel SDM volume 3, section 11.8.5).
fn enter_long_mode(sregs: &mut kvm_sregs) {
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x10,
        type_: 11,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = TABLES_AT;
    // CR4.PAE; CR0.PE, ET and PG; EFER.LME and LMA.
    sregs.cr4 |= 1 << 5;
    sregs.cr0 |= 1 | 1 << 4 | 1 << 31;
    sregs.efer |= 1 << 8 | 1 << 10;
}

fn shell(system: &Kvm, cpuid: &CpuId, memory: &File) -> Result<Shell, ScenarioError> {
    let vm = system.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    let mapping = Mapping::new(memory, libc::MAP_PRIVATE)?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: BYTES as u64,
        userspace_addr: mapping.0 as u64,
    };
    // SAFETY: the mapping outlives the VM (field order of `Shell`).
    unsafe { vm.set_user_memory_region(slot) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
    vm.set_tss_address(0xfffb_d000)
        .map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(0xfffb_c000)
        .map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    #[allow(
        clippy::disallowed_methods,
        reason = "no code of Hearth's; CPUID follows"
    )]
    let vcpu = vm.create_vcpu(0).map_err(kvm("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
    let mut fds = Vec::new();
    for device in 0..DEVICES {
        let event =
            || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ScenarioError::at("eventfd"));
        let (irq, kick) = (event()?, event()?);
        vm.register_irqfd(&irq, 5 + device)
            .map_err(kvm("KVM_IRQFD"))?;
        let at = IoEventAddress::Mmio(0xd000_0050 + u64::from(device) * 0x1000);
        vm.register_ioevent(&kick, &at, NoDatamatch)
            .map_err(kvm("KVM_IOEVENTFD"))?;
        fds.extend([irq, kick]);
    }
    Ok(Shell {
        vcpu,
        vm,
        _mapping: mapping,
        _fds: fds,
    })
}

fn save(shell: &Shell, indices: &[u32]) -> Result<Saved, ScenarioError> {
    let (vm, vcpu) = (&shell.vm, &shell.vcpu);
    let chip = |chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(kvm("KVM_GET_IRQCHIP"))
            .map(|()| chip)
    };
    let mut msrs = Vec::new();
    for index in indices.iter().filter(|index| **index != DEBUG_CONTROL) {
        let entry = kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let mut list = Msrs::from_entries(&[entry])
            .map_err(|e| ScenarioError::at("MSR list")(format!("{e:?}")))?;
        // Only MSRs that can be read and written, so that one call restores them all.
        if vcpu.get_msrs(&mut list).is_ok_and(|n| n == 1)
            && vcpu.set_msrs(&list).is_ok_and(|n| n == 1)
        {
            msrs.extend_from_slice(list.as_slice());
        }
    }
    let mut clock = vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
    clock.flags = 0;
    Ok(Saved {
        mp_state: vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?,
        regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
        xsave: vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
        xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
        lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
        msrs,
        events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        irqchips: [chip(0)?, chip(1)?, chip(2)?],
        clock,
    })
}

fn restore(shell: &Shell, saved: &Saved) -> Result<(), ScenarioError> {
    let (vm, vcpu) = (&shell.vm, &shell.vcpu);
    for chip in &saved.irqchips {
        vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
    }
    vm.set_clock(&saved.clock).map_err(kvm("KVM_SET_CLOCK"))?;
    vcpu.set_mp_state(saved.mp_state)
        .map_err(kvm("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&saved.regs).map_err(kvm("KVM_SET_REGS"))?;
    vcpu.set_sregs(&saved.sregs).map_err(kvm("KVM_SET_SREGS"))?;
    // SAFETY: KVM reads the 4096 bytes of the structure; no larger features are enabled.
    unsafe { vcpu.set_xsave(&saved.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
    vcpu.set_xcrs(&saved.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
    vcpu.set_lapic(&saved.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
    let msrs = Msrs::from_entries(&saved.msrs)
        .map_err(|e| ScenarioError::at("MSR list")(format!("{e:?}")))?;
    vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
    vcpu.set_vcpu_events(&saved.events)
        .map_err(kvm("KVM_SET_VCPU_EVENTS"))
}

fn run_to_out(vcpu: &mut VcpuFd) -> Result<(), ScenarioError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => return Ok(()),
            Ok(other) => return Err(ScenarioError::at("KVM_RUN")(format!("exit {other:?}"))),
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(kvm("KVM_RUN")(e)),
        }
    }
}
