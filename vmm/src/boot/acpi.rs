//! ACPI tables (ACPI specification 6.5, chapter 5), from which the kernels of distributions learn
//! their processors, interrupt lines and devices. Those kernels read no MP table and take no
//! devices from their command line. Our own kernel has no ACPI and ignores the tables.

use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;
use crate::legacy::serial;

const OEM: [u8; 6] = *b"HEARTH";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Bytes of the header of all tables but the RSDP (5.2.6).
const HEADER: u32 = 36;
/// Fixed features: no VGA, no CMOS clock (table 5.11, IAPC_BOOT_ARCH). The flag for a keyboard
/// controller is clear too: ours can only reset the machine.
const NO_VGA_NO_CLOCK: u16 = 1 << 2 | 1 << 5;

/// Writes the tables for a guest with `vcpus` processors (1 to 32), with APIC ids from 0, and with
/// devices on the interrupt lines `lines`. The first table is at [`layout::ACPI`].
pub(super) fn write(
    ram: &GuestMemoryMmap,
    vcpus: u8,
    lines: &[u8],
) -> Result<(), GuestMemoryError> {
    ram.write_slice(&tables(vcpus, lines), GuestAddress(layout::ACPI))
}

/// Returns RSDP, DSDT, FADT, MADT and XSDT, one after another, each at a multiple of 8.
fn tables(vcpus: u8, lines: &[u8]) -> Vec<u8> {
    // The RSDP comes first but holds the address of the XSDT, which comes last: it is filled in at
    // the end.
    let mut bytes = vec![0; Rsdp::len()];
    let mut put = |table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let address = layout::ACPI + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        address
    };
    let dsdt = put(&dsdt(lines));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = NO_VGA_NO_CLOCK.into();
    let described = [put(&fadt.finalize()), put(&madt(vcpus))];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in described {
        xsdt.add_entry(table);
    }
    let mut all = Vec::new();
    Rsdp::new(OEM, put(&xsdt)).to_aml_bytes(&mut all);
    all.extend(bytes.drain(all.len()..));
    all
}

/// Returns the MADT (5.2.12): a local APIC for each processor, and one I/O APIC.
fn madt(vcpus: u8) -> MADT {
    let apics = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, apics);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC, 0));
    madt
}

/// Returns the DSDT (5.2.11.1), which lists the devices.
fn dsdt(lines: &[u8]) -> Sdt {
    let lines = lines.iter().map(|line| u32::from(*line));
    let mut body = Body::default();
    for line in lines {
        match line {
            layout::SERIAL_IRQ => com1(&mut body),
            layout::FIRST_IRQ.. => virtio(line - layout::FIRST_IRQ, &mut body),
            _ => {}
        }
    }
    let mut scope = Vec::new();
    Scope::new("_SB_".into(), vec![&body]).to_aml_bytes(&mut scope);
    // Revision 2: 64-bit integers.
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&scope);
    dsdt
}

/// Encoded AML.
#[derive(Default)]
struct Body(Vec<u8>);

impl Aml for Body {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Appends a virtio-mmio device to `body` (virtio 1.2, 4.2.3.1: Linux's driver matches the id).
fn virtio(index: u32, body: &mut Body) {
    let base = layout::MMIO_BASE as u32 + index * layout::MMIO_SIZE as u32;
    let registers = Memory32Fixed::new(true, base, layout::MMIO_SIZE as u32);
    let interrupt = interrupt(layout::FIRST_IRQ + index);
    device(
        &format!("V{index:03}"),
        &"LNRO0005",
        index,
        vec![&registers, &interrupt],
        body,
    );
}

/// Appends the serial port COM1 to `body`.
fn com1(body: &mut Body) {
    let ports = IO::new(serial::BASE, serial::BASE, 0, 8);
    let interrupt = interrupt(layout::SERIAL_IRQ);
    device(
        "COM1",
        &EISAName::new("PNP0501"),
        0,
        vec![&ports, &interrupt],
        body,
    );
}

/// Returns the resource of an edge-triggered interrupt.
fn interrupt(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn device(name: &str, id: &dyn Aml, unique: u32, resources: Vec<&dyn Aml>, body: &mut Body) {
    let resources = ResourceTemplate::new(resources);
    let id = Name::new("_HID".into(), id);
    let unique = Name::new("_UID".into(), &unique);
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    let resources = Name::new("_CRS".into(), &resources);
    Device::new(name.into(), vec![&id, &unique, &coherent, &resources]).to_aml_bytes(&mut body.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_VCPUS;
    use crate::memory::{GuestRam, MIB};
    use crate::virtio::pmem::MAX_IMAGES;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Returns the table at `address`; its header holds its length.
    fn table(all: &[u8], address: usize) -> &[u8] {
        let at = address - layout::ACPI as usize;
        &all[at..at + number(all, at + 4)]
    }

    #[test]
    fn the_tables_of_the_largest_guest_lie_below_the_mp_table_and_lead_to_each_other() {
        let ram = GuestRam::new(64 * MIB).unwrap();
        let lines = layout::interrupt_lines(2 + MAX_IMAGES as u32, true);
        write(ram.map(), MAX_VCPUS, &lines).unwrap();
        let all = tables(MAX_VCPUS, &lines);
        assert!(
            layout::ACPI + all.len() as u64 <= layout::MPTABLE,
            "{}",
            all.len()
        );
        let mut written = vec![0; all.len()];
        ram.map()
            .read_slice(&mut written, GuestAddress(layout::ACPI))
            .unwrap();
        assert_eq!(written, all);
        // 5.2.5.3: the first 20 bytes sum to zero, and so does the whole table.
        assert_eq!(
            (&all[..8], sum(&all[..20]), sum(&all[..36])),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(&all, number(&all, 24));
        assert_eq!(
            (&xsdt[..4], sum(xsdt), xsdt.len()),
            (&b"XSDT"[..], 0, 36 + 16)
        );
        let (fadt, madt) = (table(&all, number(xsdt, 36)), table(&all, number(xsdt, 44)));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + usize::from(MAX_VCPUS) * 8 + 12);
        // Table 5.9: hardware-reduced is bit 20 of the flags.
        assert_ne!(number(fadt, 112) & 1 << 20, 0);
        let dsdt = table(&all, number(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let devices = dsdt.windows(8).filter(|bytes| bytes == b"LNRO0005");
        assert_eq!(devices.count(), 2 + MAX_IMAGES);
        assert!(dsdt.windows(4).any(|bytes| bytes == b"COM1"));
    }

    #[test]
    fn a_guest_without_a_console_has_no_serial_port() {
        let all = tables(1, &layout::interrupt_lines(2, false));
        assert!(!all.windows(4).any(|bytes| bytes == b"COM1"));
        let devices = all.windows(8).filter(|bytes| bytes == b"LNRO0005");
        assert_eq!(devices.count(), 2);
    }
}
