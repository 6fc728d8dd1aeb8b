//! Queues on which the guest gives pages back: a chain may name gigabytes, so that its pages leave
//! the host in bounded steps.

use std::collections::VecDeque;

use virtio_queue::Queue;
use vm_memory::Bytes;

use super::PAGE_SIZE;
use crate::memory::{GuestRam, MIB};
use crate::virtio::serve::{Budget, Chain, descriptors, serve};
use crate::virtio::{Fault, Interrupt, QueuePosition};

/// Most bytes that leave the host in one turn: the host's kernel takes some 4 ms for as many.
pub(super) const TURN_BYTES: u64 = 16 * MIB;
/// A stretch counts for at least as many bytes: however small, it is two calls of the host's.
pub(super) const LEAST_BYTES: u64 = 64 << 10;
/// Page numbers that one chain may carry: a page full, as Windows sends; Linux sends 256.
pub(super) const MAX_PFNS: usize = 1024;

/// Stretches of guest memory (address, bytes) that a chain gives up, as they were when it was
/// taken: whole pages inside memory. At most [`MAX_PFNS`].
#[derive(Debug, Default)]
pub(super) struct Stretches(VecDeque<(u64, u64)>);

impl Stretches {
    /// The inflate queue: arrays of 32-bit page numbers. Runs of neighbours are one stretch;
    /// numbers outside memory are ignored, as the page is not ours to give.
    pub(super) fn of_pages(ram: &GuestRam, chain: Chain<'_>) -> Result<Self, Fault> {
        let mut stretches = VecDeque::new();
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
                match stretches.back_mut() {
                    Some((start, len)) if page == *start + *len => *len += PAGE_SIZE,
                    // Linux hands out pages from high to low.
                    Some((start, len)) if page + PAGE_SIZE == *start => {
                        (*start, *len) = (page, *len + PAGE_SIZE);
                    }
                    _ => stretches.push_back((page, PAGE_SIZE)),
                }
            }
        }
        Ok(Self(stretches))
    }

    /// Free page reporting: each descriptor is a free range. Those that are not inside memory are
    /// ignored.
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

    /// Gives back what the budget allows; returns how many bytes that were.
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
    /// What is left of the queue's next chain, if a turn ended within it. No part of a snapshot:
    /// the chain still is the queue's next, and a clone does it again from its start. Until it
    /// gets the chain back the guest uses none of its pages.
    in_hand: Option<Stretches>,
}

impl Discards {
    pub(super) fn new(queue: Queue) -> Self {
        let in_hand = None;
        Self { queue, in_hand }
    }

    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition::of(&self.queue)
    }

    /// Serves the queue within the budget; `read` says what a chain gives up. Returns how many
    /// bytes left the host.
    pub(super) fn serve(
        &mut self,
        ram: &GuestRam,
        interrupt: &Interrupt,
        budget: &mut Budget,
        read: impl Fn(&GuestRam, Chain<'_>) -> Result<Stretches, Fault>,
    ) -> Result<u64, Fault> {
        let mut released = 0;
        serve(&mut self.queue, ram, interrupt, budget, |chain, budget| {
            let mut stretches = match self.in_hand.take() {
                Some(rest) => rest,
                None => read(ram, chain)?,
            };
            released += stretches.release(ram, budget);
            if stretches.0.is_empty() {
                return Ok(Some(0));
            }
            self.in_hand = Some(stretches);
            Ok(None)
        })?;
        Ok(released)
    }
}
