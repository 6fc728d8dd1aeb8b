//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4), from which kernels without
//! ACPI learn their processors and interrupt lines.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const SPEC_REVISION: u8 = 4;
/// The version that KVM's APICs report.
const APIC_VERSION: u8 = 0x14;
/// CPU flags: enabled, boot processor.
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Features: FPU and APIC on the chip.
const CPU_FEATURES: u32 = 0x201;
/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

/// Writes the floating pointer and the configuration table for `vcpus` processors (1 to 32), with
/// APIC ids from 0. `lines` are the interrupt lines in use (below [`layout::IRQ_LINES`]). Only
/// these are listed, because a kernel sets up each line that is.
pub(super) fn write(
    ram: &GuestMemoryMmap,
    vcpus: u8,
    lines: &[u8],
) -> Result<(), GuestMemoryError> {
    let floating = floating_pointer(layout::MPTABLE as u32 + 16);
    ram.write_slice(&floating, GuestAddress(layout::MPTABLE))?;
    ram.write_slice(&table(vcpus, lines), GuestAddress(layout::MPTABLE + 16))
}

/// Returns the floating pointer (section 4.1): 16 bytes that sum to zero.
fn floating_pointer(table: u32) -> [u8; 16] {
    let mut bytes = [0u8; 16];
    let mut cursor = bytes.iter_mut();
    let parts = b"_MP_"
        .iter()
        .copied()
        .chain(table.to_le_bytes())
        .chain([1, SPEC_REVISION]);
    for (slot, byte) in cursor.by_ref().zip(parts) {
        *slot = byte;
    }
    let sum = checksum(&bytes);
    bytes[10] = sum;
    bytes
}

fn table(vcpus: u8, lines: &[u8]) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    // Section 4.3.1: processors.
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        let mut entry = vec![0, id, APIC_VERSION, flags];
        entry.extend_from_slice(&0x600u32.to_le_bytes());
        entry.extend_from_slice(&CPU_FEATURES.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        push(&entry);
    }
    // Section 4.3.2: one ISA bus.
    push(b"\x01\x00ISA   ");
    // Section 4.3.3: one I/O APIC.
    let mut ioapic = vec![2, ioapic_id, APIC_VERSION, 1];
    ioapic.extend_from_slice(&layout::IOAPIC.to_le_bytes());
    push(&ioapic);
    // Section 4.3.4: each line is connected to the I/O APIC pin with the same number.
    for line in lines {
        push(&[3, INT, 0, 0, 0, *line, ioapic_id, *line]);
    }
    // Section 4.3.5: local interrupt pins.
    push(&[4, EXTINT, 0, 0, 0, 0, 0, 0]);
    push(&[4, NMI, 0, 0, 0, 0, 0xff, 1]);

    // Section 4.2: header.
    let mut bytes = Vec::with_capacity(44 + entries.len());
    bytes.extend_from_slice(b"PCMP");
    bytes.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&[SPEC_REVISION, 0]);
    bytes.extend_from_slice(b"HEARTH  VMM         ");
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&layout::LAPIC.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&entries);
    let sum = checksum(&bytes);
    bytes[7] = sum;
    bytes
}

/// Returns the byte that makes `bytes` sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIB};

    fn all() -> Vec<u8> {
        (0..layout::IRQ_LINES as u8).collect()
    }

    #[test]
    fn lines_lead_to_the_pin_of_their_number_and_no_other_is_listed() {
        let bytes = table(1, &[0, 5, 23]);
        // After header, processor, bus and I/O APIC.
        let entries = &bytes[44 + 20 + 8 + 8..];
        let listed: Vec<_> = entries.chunks(8).filter(|entry| entry[0] == 3).collect();
        let lines: Vec<_> = listed.iter().map(|entry| (entry[5], entry[7])).collect();
        assert_eq!(lines, [(0, 0), (5, 5), (23, 23)]);
    }

    #[test]
    fn tables_sum_to_zero_and_fit_for_every_count() {
        for vcpus in 1..=32 {
            let bytes = table(vcpus, &all());
            assert_eq!(checksum(&bytes), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([bytes[4], bytes[5]])),
                bytes.len()
            );
            assert!(bytes.len() as u64 + 16 + layout::MPTABLE <= layout::LOW_END);
            let entries = u16::from_le_bytes([bytes[34], bytes[35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 24 + 2);
        }
    }

    #[test]
    fn processors_are_numbered_as_in_cpuid_and_the_first_boots() {
        let bytes = table(3, &all());
        for id in 0..3usize {
            let entry = &bytes[44 + 20 * id..];
            assert_eq!((entry[0], usize::from(entry[1])), (0, id));
            assert_eq!(entry[3], if id == 0 { 3 } else { 1 });
        }
    }

    #[test]
    fn the_floating_pointer_finds_the_table() {
        let ram = GuestRam::new(MIB).unwrap();
        write(ram.map(), 1, &all()).unwrap();
        let floating: [u8; 16] = ram.map().read_obj(GuestAddress(layout::MPTABLE)).unwrap();
        assert_eq!((&floating[..4], checksum(&floating)), (&b"_MP_"[..], 0));
        let at = u32::from_le_bytes([floating[4], floating[5], floating[6], floating[7]]);
        let magic: [u8; 4] = ram.map().read_obj(GuestAddress(u64::from(at))).unwrap();
        assert_eq!(&magic, b"PCMP");
    }
}
