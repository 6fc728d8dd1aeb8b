//! The start info of the PVH boot protocol (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Initrd, MapEntry};
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// Module list and memory map follow the start info in its page.
const MODULES: u64 = layout::PVH_INFO + 0x100;
const MEMORY_MAP: u64 = layout::PVH_INFO + 0x200;

/// Writes start info, module list and memory map.
pub(super) fn write(
    ram: &GuestMemoryMmap,
    map: &[MapEntry],
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.len,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(MODULES))?;
    }
    ram.write_obj(info, GuestAddress(layout::PVH_INFO))?;
    let size = size_of::<hvm_memmap_table_entry>();
    for (address, entry) in (MEMORY_MAP..).step_by(size).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: if entry.usable { RAM } else { RESERVED },
            reserved: 0,
        };
        ram.write_obj(entry, GuestAddress(address))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory_map;
    use crate::memory::{GAP_END, GAP_START, GuestRam, MIB};

    #[test]
    fn start_info_names_command_line_module_and_map() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        let initrd = Initrd {
            start: 60 * MIB,
            len: 5,
        };
        write(ram.map(), &memory_map(64 * MIB), Some(initrd)).unwrap();
        let info: hvm_start_info = ram.map().read_obj(GuestAddress(layout::PVH_INFO)).unwrap();
        assert_eq!(
            (info.magic, info.nr_modules, info.memmap_entries),
            (MAGIC, 1, 3)
        );
        assert_eq!(info.rsdp_paddr, layout::ACPI);
        let module: hvm_modlist_entry = ram
            .map()
            .read_obj(GuestAddress(info.modlist_paddr))
            .unwrap();
        assert_eq!((module.paddr, module.size), (60 * MIB, 5));
        let high: hvm_memmap_table_entry =
            ram.map().read_obj(GuestAddress(MEMORY_MAP + 48)).unwrap();
        assert_eq!((high.addr, high.size, high.type_), (MIB, 63 * MIB, RAM));
    }

    #[test]
    fn the_map_of_memory_beyond_the_gap_has_an_entry_for_it() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        write(ram.map(), &memory_map(GAP_START + MIB), None).unwrap();
        let info: hvm_start_info = ram.map().read_obj(GuestAddress(layout::PVH_INFO)).unwrap();
        assert_eq!((info.nr_modules, info.memmap_entries), (0, 4));
        let at = GuestAddress(MEMORY_MAP + 72);
        let beyond: hvm_memmap_table_entry = ram.map().read_obj(at).unwrap();
        let found = (beyond.addr, beyond.size, beyond.type_);
        assert_eq!(found, (GAP_END, MIB, RAM));
    }
}
