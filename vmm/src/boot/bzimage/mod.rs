//! Unpacks the kernel inside a bzImage on the host.
//!
//! A bzImage is a small program that unpacks the `vmlinux` that it carries. Unpacking on the host
//! takes less than a second on any host; in the guest it takes minutes where ring 0 is emulated.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};

use crate::advice::advice;
use crate::memory::{MIB, check_file_size, memfd};

/// Maximum bytes of an unpacked kernel; real ones have 15 to 100 MiB.
const MAX_UNPACKED: u64 = 512 * MIB;
/// Memory that unpacking xz may take, in KiB: the kernel's build gives xz and zstd windows of at
/// most 128 MiB (scripts/Makefile.lib, scripts/xz_wrap.sh).
const MAX_WINDOW_KIB: u32 = 160 << 10;
const MAX_WINDOW_LOG: u32 = 27;
/// Blocks of lz4's legacy format: unpacked bytes, and maximum packed bytes (lz4_Frame_format.md).
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_BLOCK_PACKED: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;

/// Why a bzImage is refused.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// It is older than boot protocol 2.08, whose header does not locate the kernel.
    #[error("it has boot protocol {major}.{minor:02}; 2.08 or newer is needed (Linux 2.6.26)")]
    Protocol {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// The kernel does not lie inside the file.
    #[error("its kernel does not lie inside the file; the file is cut short or damaged")]
    Outside,
    /// The kernel's compression format is not supported.
    #[error("its kernel is packed with {0}; build it with gzip, xz, zstd or lz4")]
    Packing(&'static str),
    /// The stated size of the unpacked kernel is above the maximum.
    #[error("its kernel says that it has {0} bytes; {MAX_UNPACKED} are the most")]
    TooLarge(u64),
    /// The packed data is damaged.
    #[error("its kernel cannot be unpacked; the file is damaged")]
    Damaged(#[source] std::io::Error),
    /// The host could not hold the unpacked kernel.
    #[error("the host could not hold its kernel{}", advice(.0))]
    Host(#[source] std::io::Error),
    /// The unpacked kernel does not have the size that the file states.
    #[error("its kernel unpacks to {found} bytes and not to {said}; the file is damaged")]
    Length {
        /// Bytes unpacked. Unpacking stops once there are more than `said`, so there may be more.
        found: u64,
        /// Bytes that the file states.
        said: u64,
    },
}

/// Compression formats, detected by their first bytes (lib/decompress.c).
#[derive(Clone, Copy)]
enum Packing {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

fn packing(head: &[u8]) -> Result<Packing, BzImageError> {
    match head {
        [0x1f, 0x8b | 0x9e, ..] => Ok(Packing::Gzip),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(Packing::Xz),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Packing::Zstd),
        [0x02, 0x21, 0x4c, 0x18, ..] => Ok(Packing::Lz4),
        [b'B', b'Z', b'h', ..] => Err(BzImageError::Packing("bzip2")),
        [0x5d, 0x00, 0x00, ..] => Err(BzImageError::Packing("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => Err(BzImageError::Packing("lzo")),
        _ => Err(BzImageError::Packing("something that we do not know")),
    }
}

/// Unpacks the kernel of the bzImage `file`, whose first bytes are `head`, into a memory file.
pub(super) fn unpack(mut file: &File, head: &[u8], file_len: u64) -> Result<File, BzImageError> {
    let (start, len) = payload(head, file_len)?;
    let mut edge = |at: u64| -> Result<[u8; 4], BzImageError> {
        let mut bytes = [0; 4];
        file.seek(SeekFrom::Start(at))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(BzImageError::Damaged)?;
        Ok(bytes)
    };
    // The last four bytes are the unpacked size: gzip's own trailer, or a number that the kernel's
    // build appends (scripts/Makefile.lib, size_append).
    let said = u64::from(u32::from_le_bytes(edge(start + len - 4)?));
    if said > MAX_UNPACKED {
        return Err(BzImageError::TooLarge(said));
    }
    // The magic of xz has six bytes, but no other format shares its first four.
    let mut magic = [0; 6];
    magic[..4].copy_from_slice(&edge(start)?);
    if magic[..4] == [0xfd, b'7', b'z', b'X'] {
        magic[4..].copy_from_slice(b"Z\0");
    }
    let packing = packing(&magic)?;
    let packed_len = match packing {
        Packing::Gzip => len,
        _ => len - 4,
    };
    file.seek(SeekFrom::Start(start))
        .map_err(BzImageError::Damaged)?;
    let packed = BufReader::new(file.take(packed_len));
    check_file_size(said.saturating_add(LZ4_BLOCK as u64)).map_err(BzImageError::Host)?;
    let mut unpacked = memfd().map_err(BzImageError::Host)?;
    let found = match packing {
        Packing::Gzip => copy(flate2::bufread::GzDecoder::new(packed), &mut unpacked, said),
        Packing::Xz => {
            let reader = lzma_rust2::XzReader::new_mem_limit(packed, false, MAX_WINDOW_KIB);
            copy(reader, &mut unpacked, said)
        }
        Packing::Zstd => zstd::Decoder::with_buffer(packed)
            .and_then(|mut reader| {
                reader.window_log_max(MAX_WINDOW_LOG)?;
                Ok(reader.single_frame())
            })
            .and_then(|reader| copy(reader, &mut unpacked, said)),
        Packing::Lz4 => unpack_lz4(packed, &mut unpacked, said),
    }
    .map_err(BzImageError::Damaged)?;
    if found != said {
        return Err(BzImageError::Length { found, said });
    }
    Ok(unpacked)
}

/// Returns file offset and bytes (8 or more) of the packed kernel.
fn payload(head: &[u8], file_len: u64) -> Result<(u64, u64), BzImageError> {
    // Documentation/arch/x86/boot.rst: setup_sects, version, payload_offset, payload_length.
    let field = |at: usize| head.get(at..).and_then(|rest| rest.first_chunk::<4>());
    let (Some(sectors), Some(version), Some(offset), Some(len)) =
        (head.get(0x1f1), field(0x206), field(0x248), field(0x24c))
    else {
        return Err(BzImageError::Outside);
    };
    let [minor, major, ..] = *version;
    if (major, minor) < (2, 8) {
        return Err(BzImageError::Protocol { major, minor });
    }
    // Zero means four, for compatibility with very old kernels.
    let sectors = if *sectors == 0 {
        4
    } else {
        u64::from(*sectors)
    };
    let start = (sectors + 1) * 512 + u64::from(u32::from_le_bytes(*offset));
    let len = u64::from(u32::from_le_bytes(*len));
    if len < 8 || start + len > file_len {
        return Err(BzImageError::Outside);
    }
    Ok((start, len))
}

/// Copies all of `reader`, but at most `said + 1` bytes. It reads on to the end, because checksums
/// are there.
fn copy(reader: impl Read, target: &mut File, said: u64) -> std::io::Result<u64> {
    std::io::copy(&mut reader.take(said + 1), target)
}

/// Unpacks lz4's legacy format: a magic number, then blocks, each after its packed size.
fn unpack_lz4(mut packed: impl BufRead, target: &mut File, said: u64) -> std::io::Result<u64> {
    let damaged = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
    let mut word = [0; 4];
    packed.read_exact(&mut word)?;
    let mut block = Vec::new();
    let mut unpacked = vec![0; LZ4_BLOCK];
    let mut found = 0;
    while found <= said && !packed.fill_buf()?.is_empty() {
        packed.read_exact(&mut word)?;
        let len = usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX);
        if len > LZ4_BLOCK_PACKED {
            return Err(damaged("an lz4 block that is too long"));
        }
        block.resize(len, 0);
        packed.read_exact(&mut block)?;
        let len = lz4_flex::block::decompress_into(&block, &mut unpacked)
            .map_err(|e| damaged(&e.to_string()))?;
        target.write_all(unpacked.get(..len).unwrap_or_default())?;
        found += len as u64;
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
