//! Initial processor modes of the first vCPU: 64-bit mode with the first GiB identity-mapped, as
//! the Linux 64-bit boot protocol requires (Documentation/arch/x86/boot.rst, section "64-bit boot
//! protocol"), and 32-bit protected mode for PVH.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

/// Control bits, Intel SDM volume 3, sections 2.5 and 2.2.1.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page-table bits: present and writable; and, in a PD entry, a 2 MiB page.
const PRESENT_WRITABLE: u64 = 3;
const HUGE: u64 = 1 << 7;

/// Flat segments as GDT entries: null, (unused), 64-bit code at 0x10, data at 0x18, TSS at 0x20.
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

fn segment(index: u16) -> kvm_segment {
    let entry = GDT.get(usize::from(index)).copied().unwrap_or(0);
    let bit = |n: u32| ((entry >> n) & 1) as u8;
    kvm_segment {
        base: 0,
        limit: if bit(55) == 1 { 0xffff_ffff } else { 0xffff },
        selector: index * 8,
        type_: ((entry >> 40) & 0xf) as u8,
        present: bit(47),
        dpl: ((entry >> 45) & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        padding: 0,
        unusable: 0,
    }
}

/// Writes GDT, IDT and page tables and sets `sregs` to 64-bit mode with paging on.
///
/// # Errors
/// When the guest has less than the low 64 KiB of memory.
pub(crate) fn enter(ram: &GuestMemoryMmap, sregs: &mut kvm_sregs) -> Result<(), GuestMemoryError> {
    tables(ram)?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cs = segment(2);
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(4);
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(())
}

/// Writes GDT and IDT and sets `sregs` to 32-bit protected mode without paging, as PVH requires
/// (xen/include/public/arch-x86/hvm/start_info.h).
///
/// # Errors
/// When the guest has less than the low 64 KiB of memory.
pub(crate) fn enter_protected(
    ram: &GuestMemoryMmap,
    sregs: &mut kvm_sregs,
) -> Result<(), GuestMemoryError> {
    gdt(ram)?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    let mut code = segment(2);
    (code.l, code.db) = (0, 1);
    let data = segment(3);
    let mut tss = segment(4);
    tss.limit = 0x67;
    tss.g = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    Ok(())
}

fn gdt(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (address, entry) in (layout::GDT..).step_by(8).zip(GDT) {
        ram.write_obj(entry, GuestAddress(address))?;
    }
    ram.write_obj(0u64, GuestAddress(layout::IDT))
}

fn tables(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    gdt(ram)?;
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    ram.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let mut page = [0u8; 4096];
    for (n, slot) in (0u64..).zip(page.chunks_exact_mut(8)) {
        slot.copy_from_slice(&((n << 21) | PRESENT_WRITABLE | HUGE).to_le_bytes());
    }
    ram.write_slice(&page, GuestAddress(pd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIB};

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let ram = GuestRam::new(MIB).unwrap();
        let mut sregs = kvm_sregs::default();
        enter(ram.map(), &mut sregs).unwrap();
        assert_eq!(sregs.cs.l, 1);
        assert_eq!(sregs.ss.db, 1);
        let pd = layout::PAGE_TABLES + 0x2000;
        let last: u64 = ram.map().read_obj(GuestAddress(pd + 511 * 8)).unwrap();
        assert_eq!(last, (511 << 21) | 0x83);
    }

    #[test]
    fn pvh_starts_in_flat_protected_mode() {
        let ram = GuestRam::new(MIB).unwrap();
        let mut sregs = kvm_sregs {
            cr4: CR4_PAE,
            ..Default::default()
        };
        enter_protected(ram.map(), &mut sregs).unwrap();
        assert_eq!(
            (sregs.cs.db, sregs.cs.l, sregs.cs.base, sregs.cs.limit),
            (1, 0, 0, u32::MAX)
        );
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cr4), (0, 0));
    }
}
