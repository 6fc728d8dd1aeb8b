//! Loads a kernel into guest memory and prepares the guest for its first instruction.
//!
//! [`load`] writes kernel, initramfs, command line, memory map, MP table, ACPI tables and boot
//! parameters into guest memory and returns where the first vCPU starts.

mod acpi;
mod bzimage;
mod cmdline;
mod image;
mod kernel;
mod linux64;
pub(crate) mod long_mode;
mod mptable;
mod pvh;

use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};

pub use self::bzimage::BzImageError;
pub use self::cmdline::CmdlineError;
pub(crate) use self::image::ImageFiles;
pub use self::kernel::{KernelError, KernelFormat};
use crate::layout;
use crate::memory::{GAP_START, GuestRam, MemoryError};

/// The boot protocol by which the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntryChoice {
    /// Hearth's choice: the Linux 64-bit boot protocol, also for a kernel with a PVH note.
    #[default]
    Auto,
    /// The Linux 64-bit boot protocol.
    Linux64,
    /// The PVH boot protocol; the kernel needs a PVH note.
    Pvh,
}

/// The processor mode that an entry point expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryMode {
    Linux64,
    Pvh,
}

/// Where the first vCPU starts, and in which mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    pub(crate) mode: EntryMode,
}

/// Why a guest could not be loaded into memory.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel file is not usable.
    #[error("kernel {path}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The error in the file.
        source: KernelError,
    },
    /// The initramfs could not be read.
    #[error("initramfs {path} could not be read; check that it exists and is readable")]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// Kernel and initramfs do not fit into memory together.
    #[error(
        "kernel (to {kernel_end:#x}) and an initramfs of {initramfs} bytes do not fit into {memory} bytes of memory; give the guest more memory"
    )]
    DoesNotFit {
        /// First free byte after the kernel.
        kernel_end: u64,
        /// Bytes of the initramfs.
        initramfs: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// The command line is not usable.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The boot structures do not fit (impossible with 32 MiB or more).
    #[error("guest memory is too small for the boot structures")]
    TooSmall(#[from] vm_memory::GuestMemoryError),
    /// The host could not hold or map the kernel image.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host gave no random seed.
    #[error("the host gave no random seed")]
    Seed(#[source] std::io::Error),
}

/// Input of [`load`].
pub(crate) struct Source<'a> {
    pub(crate) payload: &'a Payload,
    pub(crate) words: &'a [String],
    pub(crate) vcpus: u8,
    /// Interrupt lines in use.
    pub(crate) lines: &'a [u8],
    pub(crate) entry: EntryChoice,
}

/// The software that a guest boots.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    /// Kernel and initramfs files.
    Linux(ImageFiles),
    /// Machine code that starts in 64-bit mode at 1 MiB, with the first GiB identity-mapped. For
    /// probes and tests of the VMM.
    Flat(Vec<u8>),
}

/// A range of guest memory and whether the guest may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) usable: bool,
}

/// Returns the memory map for the guest (e820). Conventional memory ends below the ACPI tables and
/// the MP table, which kernels look for in the last KiB below [`layout::LOW_END`].
pub(crate) fn memory_map(bytes: u64) -> Vec<MapEntry> {
    let usable = |start: u64, end: u64| MapEntry {
        start,
        len: end - start,
        usable: true,
    };
    let mut map = vec![
        usable(0, layout::ACPI),
        MapEntry {
            start: layout::ACPI,
            len: layout::LOW_END - layout::ACPI,
            usable: false,
        },
    ];
    for (start, len) in crate::memory::ranges(bytes) {
        let start = start.0.max(layout::HIGH_START);
        let end = if start < GAP_START {
            bytes.min(GAP_START)
        } else {
            start + len
        };
        if end > start {
            map.push(usable(start, end));
        }
    }
    map
}

/// Writes everything that the guest needs for its boot into `ram`.
pub(crate) fn load(ram: &mut GuestRam, source: &Source<'_>) -> Result<Entry, LoadError> {
    let image = match source.payload {
        Payload::Linux(files) => files.image()?,
        Payload::Flat(code) => {
            ram.map()
                .write_slice(code, GuestAddress(layout::HIGH_START))?;
            return Ok(Entry {
                address: layout::HIGH_START,
                mode: EntryMode::Linux64,
            });
        }
    };
    let entry = image.entry(source.entry)?;
    let initrd = image.map_into(ram)?;
    let cmdline_len = cmdline::write(ram.map(), source.words)?;
    mptable::write(ram.map(), source.vcpus, source.lines)?;
    acpi::write(ram.map(), source.vcpus, source.lines)?;
    let map = memory_map(ram.bytes());
    match entry.mode {
        EntryMode::Linux64 => {
            let mut seed = [0u8; linux64::SEED_BYTES];
            fill_random(&mut seed).map_err(LoadError::Seed)?;
            linux64::write(ram.map(), &map, initrd, cmdline_len, &seed)?;
        }
        EntryMode::Pvh => pvh::write(ram.map(), &map, initrd)?,
    }
    Ok(entry)
}

fn fill_random(buffer: &mut [u8]) -> std::io::Result<()> {
    let got = rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty())?;
    // Requests of up to 256 bytes are always filled (getrandom(2)).
    if got == buffer.len() {
        Ok(())
    } else {
        Err(std::io::ErrorKind::UnexpectedEof.into())
    }
}

/// Reads a kernel as a boot does; for fuzz targets.
#[cfg(feature = "testing")]
pub(crate) fn check_kernel(path: &std::path::Path) -> Result<(), KernelError> {
    kernel::load(path).map(drop)
}

/// Location of an initramfs: guest address and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Initrd {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GAP_END, MIB};

    #[test]
    fn the_map_ends_low_memory_below_the_tables() {
        let map = memory_map(128 * MIB);
        assert_eq!(
            map[0],
            MapEntry {
                start: 0,
                len: 0x9_f000,
                usable: true
            }
        );
        assert!(!map[1].usable);
        assert_eq!(
            map[2],
            MapEntry {
                start: MIB,
                len: 127 * MIB,
                usable: true
            }
        );
        assert_eq!(map.len(), 3);
    }

    #[test]
    fn the_map_covers_exactly_the_memory_at_every_boundary() {
        for mib in [32, 33, 128, 3071, 3072, 3073, 4095, 4096, 4097, 5120, 65536] {
            let map = memory_map(mib * MIB);
            let hole = layout::HIGH_START - layout::LOW_END;
            let total: u64 = map.iter().map(|e| e.len).sum();
            assert_eq!(total + hole, mib * MIB, "{mib} MiB");
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
            assert_eq!(map.len(), if mib > 3072 { 4 } else { 3 });
            if mib > 3072 {
                assert_eq!(map[2].start + map[2].len, GAP_START);
                assert_eq!(map[3].start, GAP_END);
            }
        }
    }
}
