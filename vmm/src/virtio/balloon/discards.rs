//! Queues on which the guest gives pages back. A chain may name gigabytes, so its pages are
//! released in bounded steps.

use std::collections::VecDeque;

use virtio_queue::Queue;
use vm_memory::Bytes;

use super::PAGE_SIZE;
use crate::memory::{GuestRam, MIB};
use crate::virtio::serve::{Budget, Chain, descriptors, serve};
use crate::virtio::{Fault, Interrupt, QueuePosition};

/// Most bytes released in one turn: the host's kernel takes about 4 ms for them.
pub(super) const TURN_BYTES: u64 = 16 * MIB;
/// Least bytes that a range counts for in the budget: however small, it costs two system calls.
pub(super) const LEAST_BYTES: u64 = 64 << 10;
/// Most page numbers in one chain: a full page, as Windows sends; Linux sends 256.
pub(super) const MAX_PFNS: usize = 1024;

/// Page ranges of guest memory (address, bytes) that a chain gives up, read once when the chain was
/// taken: whole pages inside memory. At most [`MAX_PFNS`].
#[derive(Debug, Default)]
pub(super) struct PageRanges(VecDeque<(u64, u64)>);

impl PageRanges {
    /// Reads a chain of the inflate queue: arrays of 32-bit page numbers. Neighbouring pages are
    /// merged into one range; page numbers outside guest memory are ignored.
    pub(super) fn of_pages(ram: &GuestRam, chain: Chain<'_>) -> Result<Self, Fault> {
        let mut ranges = VecDeque::new();
        let mut left = MAX_PFNS;
        for descriptor in descriptors(chain).filter(|d| !d.is_write_only()) {
            let count = (descriptor.len() / 4) as usize;
            left = left.checked_sub(count).ok_or(Fault::Request(
                "more page numbers than a balloon chain may carry",
            ))?;
            let mut bytes = vec![0u8; count * 4];
            ram.map().read_slice(&mut bytes, descriptor.addr())?;
            for pfn in bytes.as_chunks::<4>().0 {
                let page = u64::from(u32::from_le_bytes(*pfn)) * PAGE_SIZE;
                if !ram.contains(page, PAGE_SIZE) {
                    continue;
                }
                match ranges.back_mut() {
                    Some((start, len)) if page == *start + *len => *len += PAGE_SIZE,
                    // Linux hands out pages from high to low addresses.
                    Some((start, len)) if page + PAGE_SIZE == *start => {
                        (*start, *len) = (page, *len + PAGE_SIZE);
                    }
                    _ => ranges.push_back((page, PAGE_SIZE)),
                }
            }
        }
        Ok(Self(ranges))
    }

    /// Reads a chain of the reporting queue: each descriptor is a free range, cut to whole pages.
    /// Ranges that are not inside memory are ignored.
    pub(super) fn of_ranges(ram: &GuestRam, chain: Chain<'_>) -> Result<Self, Fault> {
        let ranges = descriptors(chain).filter(|d| d.is_write_only());
        let inside = ranges.filter_map(|descriptor| {
            let (addr, len) = (descriptor.addr().0, u64::from(descriptor.len()));
            let end = ram.contains(addr, len).then(|| addr + len)?;
            let start = addr.next_multiple_of(PAGE_SIZE);
            let len = (end & !(PAGE_SIZE - 1)).checked_sub(start)?;
            (len > 0).then_some((start, len))
        });
        Ok(Self(inside.collect()))
    }

    /// Releases what the budget allows; returns the number of bytes released.
    fn release(&mut self, ram: &GuestRam, budget: &mut Budget) -> u64 {
        let mut released = 0;
        while budget.bytes() > 0
            && let Some((addr, len)) = self.0.pop_front()
        {
            let now = len.min(budget.bytes());
            budget.spend_bytes(now.max(LEAST_BYTES));
            match ram.discard(addr, now) {
                Ok(()) => released += now,
                Err(error) => tracing::debug!(addr, now, %error, "pages not released"),
            }
            if now < len {
                self.0.push_front((addr + now, len - now));
            }
        }
        released
    }
}

/// A queue whose chains give pages back.
#[derive(Debug)]
pub(super) struct Discards {
    queue: Queue,
    /// The rest of the queue's next chain, if a turn ended within it. Not part of a snapshot: the
    /// chain is still the queue's next, and a clone does it again from its start. The guest uses
    /// none of its pages until it gets the chain back.
    in_hand: Option<PageRanges>,
}

impl Discards {
    pub(super) fn new(queue: Queue) -> Self {
        let in_hand = None;
        Self { queue, in_hand }
    }

    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition::of(&self.queue)
    }

    /// Serves the queue within the budget; `read` returns the ranges of a chain. Returns the number
    /// of bytes released.
    pub(super) fn serve(
        &mut self,
        ram: &GuestRam,
        interrupt: &Interrupt,
        budget: &mut Budget,
        read: impl Fn(&GuestRam, Chain<'_>) -> Result<PageRanges, Fault>,
    ) -> Result<u64, Fault> {
        let mut released = 0;
        serve(&mut self.queue, ram, interrupt, budget, |chain, budget| {
            let mut ranges = match self.in_hand.take() {
                Some(rest) => rest,
                None => read(ram, chain)?,
            };
            released += ranges.release(ram, budget);
            if ranges.0.is_empty() {
                return Ok(Some(0));
            }
            self.in_hand = Some(ranges);
            Ok(None)
        })?;
        Ok(released)
    }
}
