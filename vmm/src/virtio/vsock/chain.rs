//! The guest memory of one packet: any number of descriptors, bounded and checked once.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::packet::{HEADER_BYTES, MAX_PAYLOAD};
use crate::virtio::Fault;

/// Most descriptors that the device reads for one packet: the size of the longest queue. The limit
/// also holds for indirect tables, which the device does not offer but a guest can build.
const MAX_DESCRIPTORS: usize = 128;
/// Size of the largest packet; bytes of a chain beyond it are ignored.
const MAX_BYTES: usize = HEADER_BYTES + MAX_PAYLOAD as usize;

/// The bytes of a descriptor chain that a packet is read from or written to.
#[derive(Debug)]
pub(super) struct Chain<'a> {
    pieces: VecDeque<VolatileSlice<'a>>,
    /// Bytes that can still be read or written.
    left: usize,
    /// Bytes read or written so far.
    moved: u32,
}

impl<'a> Chain<'a> {
    /// The part of `chain` that the device may read.
    ///
    /// # Errors
    /// A [`Fault`] if a descriptor is not wholly inside one region of guest memory.
    pub(super) fn readable(
        ram: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
    ) -> Result<Self, Fault> {
        Self::collect(ram, chain, false)
    }

    /// The part of `chain` that the device may write.
    ///
    /// # Errors
    /// As [`Chain::readable`].
    pub(super) fn writable(
        ram: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
    ) -> Result<Self, Fault> {
        Self::collect(ram, chain, true)
    }

    fn collect(
        ram: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
        writable: bool,
    ) -> Result<Self, Fault> {
        let mut pieces = VecDeque::new();
        let mut left: usize = 0;
        for desc in chain.take(MAX_DESCRIPTORS) {
            if desc.is_write_only() != writable {
                continue;
            }
            let len = usize::try_from(desc.len()).unwrap_or(usize::MAX);
            // The whole range is checked, including the part that is not used.
            let piece = ram.get_slice(desc.addr(), len)?;
            let piece = piece
                .subslice(0, len.min(MAX_BYTES - left))
                .unwrap_or(piece);
            left += piece.len();
            pieces.push_back(piece);
            if left >= MAX_BYTES {
                break;
            }
        }
        Ok(Self {
            pieces,
            left,
            moved: 0,
        })
    }

    /// Bytes that can still be read or written.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Bytes read or written so far.
    pub(super) fn moved(&self) -> u32 {
        self.moved
    }

    /// Moves bytes from or to the next piece with `copy`, which returns how many it moved.
    fn advance(&mut self, copy: impl FnOnce(&VolatileSlice<'a>) -> usize) -> usize {
        while self.pieces.pop_front_if(|piece| piece.is_empty()).is_some() {}
        let Some(piece) = self.pieces.front_mut() else {
            return 0;
        };
        let n = copy(piece).min(piece.len());
        match piece.offset(n) {
            Ok(rest) => *piece = rest,
            Err(_) => drop(self.pieces.pop_front()),
        }
        self.left -= n;
        // At most MAX_BYTES in total.
        self.moved = self
            .moved
            .saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
        n
    }
}

impl Read for Chain<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(self.advance(|piece| piece.copy_to(into)))
    }
}

impl Write for Chain<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(self.advance(|piece| {
            piece.copy_from(from);
            from.len().min(piece.len())
        }))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
