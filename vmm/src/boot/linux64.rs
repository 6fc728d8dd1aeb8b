//! The zero page of the Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst and
//! zero-page.rst) and the random seed for the guest.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Initrd, MapEntry};
use crate::layout;

/// Bytes of random seed: one ChaCha20 key. `add_bootloader_randomness` credits all of it.
pub(super) const SEED_BYTES: usize = 32;

/// `setup_header` fields (boot.rst).
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.15; the kernel reads `setup_data` from 2.09 on.
const VERSION: u16 = 0x20f;
/// "Undefined" boot loader.
const LOADER_TYPE: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
/// `SETUP_RNG_SEED` (arch/x86/include/uapi/asm/setup_data.h).
const SETUP_RNG_SEED: u32 = 9;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the zero page and the seed. With the seed, the guest's random generator is ready before
/// its first process runs, with either CPU profile. The kernel erases the seed after use.
pub(super) fn write(
    ram: &GuestMemoryMmap,
    map: &[MapEntry],
    initrd: Option<Initrd>,
    cmdline_len: u32,
    seed: &[u8; SEED_BYTES],
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params {
        acpi_rsdp_addr: layout::ACPI,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = VERSION;
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = 0x20_0000;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len;
    params.hdr.setup_data = layout::SETUP_DATA;
    if let Some(initrd) = initrd {
        // Both fit into 32 bits: the initramfs lies below 2 GiB.
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    let mut count = 0u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: if entry.usable {
                E820_RAM
            } else {
                E820_RESERVED
            },
        };
        count += 1;
    }
    params.e820_entries = count;
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    // struct setup_data: next, type, length, data.
    ram.write_obj(0u64, GuestAddress(layout::SETUP_DATA))?;
    ram.write_obj(SETUP_RNG_SEED, GuestAddress(layout::SETUP_DATA + 8))?;
    ram.write_obj(SEED_BYTES as u32, GuestAddress(layout::SETUP_DATA + 12))?;
    ram.write_slice(seed, GuestAddress(layout::SETUP_DATA + 16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory_map;
    use crate::memory::{GAP_END, GAP_START, GuestRam, MIB};

    #[test]
    fn the_zero_page_says_what_the_protocol_wants() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        let initrd = Initrd {
            start: 60 * MIB,
            len: 4096,
        };
        write(ram.map(), &memory_map(64 * MIB), Some(initrd), 7, &[9; 32]).unwrap();
        let at = |offset| GuestAddress(layout::ZERO_PAGE + offset);
        // Offsets from zero-page.rst and boot.rst.
        assert_eq!(ram.map().read_obj::<u64>(at(0x70)).unwrap(), layout::ACPI);
        assert_eq!(ram.map().read_obj::<u8>(at(0x1e8)).unwrap(), 3);
        assert_eq!(ram.map().read_obj::<u16>(at(0x1fe)).unwrap(), 0xaa55);
        assert_eq!(&ram.map().read_obj::<[u8; 4]>(at(0x202)).unwrap(), b"HdrS");
        assert_eq!(
            ram.map().read_obj::<u32>(at(0x218)).unwrap() as u64,
            60 * MIB
        );
        assert_eq!(ram.map().read_obj::<u32>(at(0x21c)).unwrap(), 4096);
        assert_eq!(
            ram.map().read_obj::<u32>(at(0x228)).unwrap() as u64,
            layout::CMDLINE
        );
        let first: u64 = ram.map().read_obj(at(0x2d0)).unwrap();
        assert_eq!(first, 0);
        let seed = ram
            .map()
            .read_obj::<[u8; 32]>(GuestAddress(layout::SETUP_DATA + 16))
            .unwrap();
        assert_eq!(seed, [9; 32]);
    }

    #[test]
    fn memory_beyond_the_gap_is_the_last_entry_of_e820() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        write(ram.map(), &memory_map(GAP_START + MIB), None, 7, &[9; 32]).unwrap();
        let at = |offset| GuestAddress(layout::ZERO_PAGE + offset);
        assert_eq!(ram.map().read_obj::<u8>(at(0x1e8)).unwrap(), 4);
        // Entries have 20 bytes.
        let last = at(0x2d0 + 3 * 20);
        assert_eq!(
            ram.map().read_obj::<[u64; 2]>(last).unwrap(),
            [GAP_END, MIB]
        );
    }
}
