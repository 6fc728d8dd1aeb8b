//! Layout of the guest's physical address space, and its interrupt lines.
//!
//! ```text
//! 0x0000_0500  GDT                       0x0000_0520  IDT
//! 0x0000_5000  setup_data (random seed)  0x0000_6000  PVH start info and memory map
//! 0x0000_7000  zero page (boot_params)   0x0000_8ff0  boot stack, growing down
//! 0x0000_9000  page tables               0x0002_0000  kernel command line
//! 0x0009_f000  ACPI tables               0x0009_fc00  MP table
//!                                        0x000a_0000  end of low memory
//! 0x0010_0000  high memory: kernel (where its ELF says), initramfs at the top
//! 0xc000_0000  gap: virtio-mmio at 0xd000_0000
//! 0xfec0_0000  I/O APIC                  0xfee0_0000  local APIC
//! 0x1_0000_0000 memory beyond 3 GiB, then pmem images, each at a multiple of 128 MiB
//! ```

/// Global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// Interrupt descriptor table (empty).
pub(crate) const IDT: u64 = 0x520;
/// `setup_data` node with the random seed.
pub(crate) const SETUP_DATA: u64 = 0x5000;
/// PVH start info, its module list and memory map.
pub(crate) const PVH_INFO: u64 = 0x6000;
/// Linux `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// PML4, PDPT and PD, a page each.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Bytes of command line with the terminating zero (`COMMAND_LINE_SIZE`,
/// arch/x86/include/asm/setup.h).
pub(crate) const CMDLINE_MAX: usize = 2048;
/// ACPI tables. The boot parameters hold the address of the first.
pub(crate) const ACPI: u64 = 0x9_f000;
/// MP table, in the extended BIOS data area where kernels look for it.
pub(crate) const MPTABLE: u64 = 0x9_fc00;
/// End of conventional memory.
pub(crate) const LOW_END: u64 = 0xa_0000;
/// Start of memory above the legacy hole.
pub(crate) const HIGH_START: u64 = 0x10_0000;
/// Identity-map page that KVM on Intel needs (below the TSS).
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel needs for real mode.
pub(crate) const TSS: usize = 0xfffb_d000;
/// First virtio-mmio device; each takes [`MMIO_SIZE`] bytes.
pub(crate) const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio device.
pub(crate) const MMIO_SIZE: u64 = 0x1000;
/// First interrupt line of the virtio-mmio devices.
pub(crate) const FIRST_IRQ: u32 = 5;
/// Interrupt lines of the I/O APIC.
pub(crate) const IRQ_LINES: u32 = 24;
/// Interrupt line of the serial port (COM1).
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Interrupt line of the interval timer. Reported to the guest also where there is no timer:
/// kernels give up without it.
pub(crate) const TIMER_IRQ: u32 = 0;
/// I/O APIC registers.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub(crate) const LAPIC: u32 = 0xfee0_0000;

/// Returns the interrupt lines of a guest with `devices` virtio-mmio devices.
pub(crate) fn interrupt_lines(devices: u32, console: bool) -> Vec<u8> {
    let serial = console.then_some(SERIAL_IRQ);
    let virtio = (FIRST_IRQ..IRQ_LINES).take(devices as usize);
    let lines = std::iter::once(TIMER_IRQ).chain(serial).chain(virtio);
    lines.map(|line| line as u8).collect()
}
