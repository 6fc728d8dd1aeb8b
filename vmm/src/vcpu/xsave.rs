//! `XSAVE` and `XRSTOR` for a guest's kernel that cannot execute them.
//!
//! Where ring 0 is emulated, programs run on the processor itself, AVX included, but KVM's emulator
//! knows neither instruction. KVM keeps those registers at each exit (`KVM_GET_XSAVE`), so Hearth's
//! guest kernel passes the buffer's address to the VMM instead: a write to one port saves the
//! registers there, a write to another loads them. The buffers are in guest memory, in the standard
//! format (Intel SDM volume 1, 13.4), with the same content as after the instructions.

use core::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::OnceLock;

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::kvm::KvmError;
use crate::memory::GuestRam;

/// The port that saves; the kernel parameter `hearth.xsave` names it (see
/// `CpuProfile::kernel_words`).
const SAVE: u16 = 0x5f4;
/// The port that loads.
const LOAD: u16 = SAVE + 4;

/// Bytes of `kvm_xsave`, which hold all state components that a guest may have (`cpu::features`).
const AREA: usize = 4096;
/// The state components that are saved and loaded: x87, SSE, AVX and the three of AVX-512 (13.1).
const KEPT: u64 = FP | SSE | 1 << 2 | 7 << 5;
/// The numbers of these components are below this.
const COMPONENTS: usize = 8;
/// The first component that is not in the legacy region.
const EXTENDED: usize = 2;
const FP: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
/// The legacy region, as far as `FXSAVE` writes it (10.5.1): x87 control, MXCSR, x87 registers, SSE
/// registers.
const FP_CONTROL: Range<usize> = 0..24;
const FP_REGISTERS: Range<usize> = 32..160;
const SSE_REGISTERS: Range<usize> = 160..416;
/// Offset, in the bytes left to software, of the mask of components that the guest kernel's buffer
/// has room for.
const WANTED: u64 = 464;
const LEFT_TO_SOFTWARE: Range<usize> = 464..512;
/// The header: `XSTATE_BV`, then bytes that the standard format does not use.
const PRESENT: Range<usize> = 512..520;
const HEADER: Range<usize> = 512..576;
/// The control word of an x87 unit that was just initialized (8.1.5).
const FCW: [u8; 2] = 0x37f_u16.to_le_bytes();

/// Registers could not be saved or loaded. The guest cannot go on: its programs would compute with
/// another program's registers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum XsaveError {
    #[error("the guest's kernel keeps registers at {0:#x}, outside of its memory")]
    Outside(u64, #[source] GuestMemoryError),
    #[error("the registers of the guest's programs cannot be kept")]
    Kvm(#[source] KvmError),
}

/// A request of a guest's kernel, with the address of its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Save(u64),
    Load(u64),
}

impl Request {
    /// Decodes a write to a port; `None` if it is not a request.
    pub(crate) fn of(port: u16, data: &[u8]) -> Option<Self> {
        let line = u32::from_le_bytes(data.try_into().ok()?);
        let address = u64::from(line) << 6;
        match port {
            SAVE => Some(Self::Save(address)),
            LOAD => Some(Self::Load(address)),
            _ => None,
        }
    }

    /// Executes the request, for a vCPU that has left its guest.
    pub(crate) fn answer(self, vcpu: &VcpuFd, ram: &GuestRam) -> Result<(), XsaveError> {
        match self {
            Self::Save(address) => {
                let xsave = vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?;
                save(&bytes_of(&xsave), ram, address)
            }
            Self::Load(address) => {
                let xsave = xsave_of(&load(ram, address)?);
                // SAFETY: KVM reads no more than `kvm_xsave`'s 4096 bytes of a vCPU without dynamic
                // features (AMX), which no guest is shown (`cpu::features`).
                unsafe { vcpu.set_xsave(&xsave) }.map_err(kvm("KVM_SET_XSAVE"))
            }
        }
    }
}

fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> XsaveError {
    move |error| XsaveError::Kvm(KvmError::of(call)(error))
}

/// Writes `area` to the guest's buffer, as far as the buffer has room.
fn save(area: &[u8; AREA], ram: &GuestRam, address: u64) -> Result<(), XsaveError> {
    let outside = |error| XsaveError::Outside(address, error);
    let at = GuestAddress(address);
    let wanted = read(ram, address, WANTED)? & KEPT;
    let mut area = *area;
    let present = number(&area, PRESENT.start) & wanted;
    fill(&mut area, LEFT_TO_SOFTWARE, 0);
    fill(&mut area, HEADER, 0);
    put(&mut area, PRESENT.start, &present.to_le_bytes());
    let end = components(wanted).map(|range| range.end).max();
    let end = end.unwrap_or(HEADER.end).min(AREA);
    let saved = area.get(..end).unwrap_or(&area);
    ram.map().write_slice(saved, at).map_err(outside)
}

/// Reads the guest's buffer. Components that are not present in it get their initial values.
fn load(ram: &GuestRam, address: u64) -> Result<[u8; AREA], XsaveError> {
    let mut area = [0; AREA];
    let present = read(ram, address, PRESENT.start as u64)? & KEPT;
    for range in std::iter::once(0..SSE_REGISTERS.end).chain(components(present)) {
        let at = GuestAddress(address + range.start as u64);
        let read = ram
            .map()
            .read_slice(area.get_mut(range).unwrap_or(&mut []), at);
        read.map_err(|error| XsaveError::Outside(address, error))?;
    }
    if present & FP == 0 {
        fill(&mut area, FP_CONTROL, 0);
        fill(&mut area, FP_REGISTERS, 0);
        put(&mut area, 0, &FCW);
    }
    if present & SSE == 0 {
        fill(&mut area, SSE_REGISTERS, 0);
    }
    // `XRSTOR` loads MXCSR regardless of the header (13.8.1); KVM goes by the header.
    put(
        &mut area,
        PRESENT.start,
        &(present | FP | SSE).to_le_bytes(),
    );
    Ok(area)
}

/// Returns the ranges of the extended components of `mask` in the standard format.
fn components(mask: u64) -> impl Iterator<Item = Range<usize>> {
    let layout = layout().iter().enumerate().skip(EXTENDED);
    layout
        .filter(move |(component, _)| mask & 1 << component != 0)
        .map(|(_, range)| range.clone())
}

/// Returns the components' ranges, as the processor reports them. Asked once, as on a host that is
/// itself a guest each CPUID exits to that host's own.
fn layout() -> &'static [Range<usize>; COMPONENTS] {
    /// Extended state enumeration (Intel SDM volume 2, CPUID leaf 0xD).
    const LEAF: u32 = 0xd;
    static LAYOUT: OnceLock<[Range<usize>; COMPONENTS]> = OnceLock::new();
    LAYOUT.get_or_init(|| {
        std::array::from_fn(|component| {
            let place = __cpuid_count(LEAF, component as u32);
            let start = place.ebx as usize;
            start..start + place.eax as usize
        })
    })
}

fn read(ram: &GuestRam, address: u64, at: u64) -> Result<u64, XsaveError> {
    let bytes = ram.map().read_obj(GuestAddress(address + at));
    bytes.map_err(|error| XsaveError::Outside(address, error))
}

fn number(area: &[u8; AREA], at: usize) -> u64 {
    let bytes = area.get(at..).and_then(<[u8]>::first_chunk);
    bytes.copied().map_or(0, u64::from_le_bytes)
}

fn fill(area: &mut [u8; AREA], range: Range<usize>, value: u8) {
    if let Some(bytes) = area.get_mut(range) {
        bytes.fill(value);
    }
}

fn put(area: &mut [u8; AREA], at: usize, bytes: &[u8]) {
    let range = area.iter_mut().skip(at);
    range.zip(bytes).for_each(|(to, from)| *to = *from);
}

fn bytes_of(xsave: &kvm_xsave) -> [u8; AREA] {
    let mut area = [0; AREA];
    for (to, word) in area.chunks_exact_mut(4).zip(xsave.region) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    area
}

fn xsave_of(area: &[u8; AREA]) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    for (word, from) in xsave.region.iter_mut().zip(area.as_chunks().0) {
        *word = u32::from_le_bytes(*from);
    }
    xsave
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIB;

    /// Address of a buffer in guest memory.
    const BUFFER: u64 = 0x1_0040;
    /// The byte that the buffer is filled with beforehand.
    const REST: u8 = 0xa5;

    fn ram() -> GuestRam {
        let ram = GuestRam::new(MIB).unwrap();
        let fill = vec![REST; AREA];
        ram.map().write_slice(&fill, GuestAddress(BUFFER)).unwrap();
        ram
    }

    fn buffer(ram: &GuestRam) -> [u8; AREA] {
        let mut bytes = [0; AREA];
        let read = ram.map().read_slice(&mut bytes, GuestAddress(BUFFER));
        read.unwrap();
        bytes
    }

    fn write(ram: &GuestRam, at: u64, value: u64) {
        let at = GuestAddress(BUFFER + at);
        ram.map().write_obj(value, at).unwrap();
    }

    /// An area with all components in use, and a pattern that tells its bytes apart.
    fn area() -> [u8; AREA] {
        let mut area: [u8; AREA] = std::array::from_fn(|i| (i % 251) as u8);
        put(&mut area, PRESENT.start, &u64::MAX.to_le_bytes());
        area
    }

    #[test]
    fn only_writes_of_four_bytes_to_the_two_ports_are_requests() {
        let line = 0xffff_ffff_u32.to_le_bytes();
        assert_eq!(
            Request::of(SAVE, &line),
            Some(Request::Save(0x3f_ffff_ffc0))
        );
        assert_eq!(
            Request::of(LOAD, &line),
            Some(Request::Load(0x3f_ffff_ffc0))
        );
        for port in [SAVE - 1, SAVE + 1, SAVE + 3, LOAD + 1, 0, u16::MAX] {
            assert_eq!(Request::of(port, &line), None);
        }
        for data in [&[][..], &[1], &[1, 2], &[1; 8], &[1; 64]] {
            assert_eq!(Request::of(SAVE, data), None);
        }
    }

    #[test]
    fn a_buffer_is_written_as_far_as_it_has_room() {
        let ram = ram();
        for wanted in [0, FP | SSE, 7, KEPT, u64::MAX] {
            write(&ram, WANTED, wanted);
            save(&area(), &ram, BUFFER).unwrap();
            let saved = buffer(&ram);
            let end = components(wanted & KEPT).map(|range| range.end).max();
            let end = end.unwrap_or(HEADER.end);
            assert_eq!(saved[..SSE_REGISTERS.end], area()[..SSE_REGISTERS.end]);
            assert_eq!(saved[HEADER.end..end], area()[HEADER.end..end]);
            assert!(saved[end..].iter().all(|byte| *byte == REST), "{wanted:#x}");
            let mut header = [0; 64];
            header[..8].copy_from_slice(&(wanted & KEPT).to_le_bytes());
            assert_eq!(saved[HEADER], header);
            assert_eq!(saved[LEFT_TO_SOFTWARE], [0; 48]);
            ram.map()
                .write_slice(&[REST; AREA], GuestAddress(BUFFER))
                .unwrap();
        }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let ram = ram();
        write(&ram, WANTED, KEPT);
        save(&area(), &ram, BUFFER).unwrap();
        let loaded = load(&ram, BUFFER).unwrap();
        assert_eq!(number(&loaded, PRESENT.start), KEPT);
        assert_eq!(loaded[..SSE_REGISTERS.end], area()[..SSE_REGISTERS.end]);
        for range in components(KEPT) {
            assert_eq!(loaded[range.clone()], area()[range]);
        }
    }

    #[test]
    fn what_is_not_present_gets_its_initial_value_but_for_mxcsr() {
        let ram = ram();
        write(&ram, PRESENT.start as u64, 0);
        let loaded = load(&ram, BUFFER).unwrap();
        let mut initial = [0; AREA];
        put(&mut initial, 0, &FCW);
        fill(&mut initial, FP_CONTROL.end..FP_REGISTERS.start, REST);
        put(&mut initial, PRESENT.start, &(FP | SSE).to_le_bytes());
        assert_eq!(loaded, initial);
        // Components that are not kept are not passed to KVM.
        write(&ram, PRESENT.start as u64, u64::MAX);
        let loaded = load(&ram, BUFFER).unwrap();
        assert_eq!(number(&loaded, PRESENT.start), KEPT);
    }

    #[test]
    fn a_buffer_outside_of_memory_is_refused() {
        let here = ram();
        // At the end of memory, across it, behind it, and at the highest address of a request.
        for address in [MIB - 64, MIB - 576 + 64, MIB, 0x3f_ffff_ffc0] {
            let outside =
                |result| matches!(result, Err(XsaveError::Outside(at, _)) if at == address);
            assert!(outside(save(&area(), &here, address)), "{address:#x}");
            assert!(outside(load(&here, address).map(drop)), "{address:#x}");
        }
        // A buffer without extended components may end with its header, at the end of memory.
        let last = MIB - HEADER.end as u64;
        let ram = ram();
        save(&area(), &ram, last).unwrap();
        load(&ram, last).unwrap();
    }
}
