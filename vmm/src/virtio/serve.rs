//! Takes chains off a queue, and serves a queue in bounded turns.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Fault, Interrupt, Progress};
use crate::memory::GuestRam;

/// A request of the driver.
pub(super) type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// Most descriptors of one request that are read: the size of the longest queue. It also limits
/// indirect tables, which no device offers but a guest can make.
const MAX_DESCRIPTORS: usize = 128;

/// Most chains that a device takes in one turn, over all its queues.
pub(super) const TURN_CHAINS: u32 = 64;

/// Work that a device may still do in this turn of its event thread.
#[derive(Debug)]
pub(super) struct Budget {
    chains: u32,
    bytes: u64,
}

impl Budget {
    /// The budget of one turn: [`TURN_CHAINS`] chains, and at most `bytes` bytes of work in them.
    pub(super) fn of_turn(bytes: u64) -> Self {
        Self {
            chains: TURN_CHAINS,
            bytes,
        }
    }

    /// Splits off half of the budget, for one of two directions that must both make progress.
    pub(super) fn half(&mut self) -> Self {
        let half = Self {
            chains: self.chains / 2,
            bytes: self.bytes / 2,
        };
        self.chains -= half.chains;
        self.bytes -= half.bytes;
        half
    }

    /// Adds back the unspent part of a budget that was split off.
    pub(super) fn give_back(&mut self, rest: Self) {
        self.chains += rest.chains;
        self.bytes += rest.bytes;
    }

    pub(super) fn is_spent(&self) -> bool {
        self.chains == 0 || self.bytes == 0
    }

    /// Bytes left.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Counts a chain that was taken.
    pub(super) fn spend_chain(&mut self) {
        self.chains = self.chains.saturating_sub(1);
    }

    pub(super) fn spend_bytes(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Returns [`Progress::More`] if the budget is spent: there may be more to do.
    pub(super) fn progress(&self) -> Progress {
        if self.is_spent() {
            Progress::More
        } else {
            Progress::Idle
        }
    }
}

/// Takes the next available chain. Every device must take its chains here: `virtio_queue` logs an
/// error for each head outside its table, and a guest could fill the log with them.
///
/// # Errors
/// A [`Fault`] when the ring's index or the chain's head is invalid.
pub(super) fn take<'a>(
    queue: &mut Queue,
    mem: &'a GuestMemoryMmap,
) -> Result<Option<Chain<'a>>, Fault> {
    let chain = queue.iter(mem)?.next();
    match chain {
        Some(chain) if chain.head_index() >= queue.size() => {
            Err(virtio_queue::Error::InvalidDescriptorIndex.into())
        }
        chain => Ok(chain),
    }
}

/// Returns the descriptors of a request, in order.
pub(super) fn descriptors(chain: Chain<'_>) -> impl Iterator<Item = Descriptor> {
    chain.take(MAX_DESCRIPTORS)
}

/// Serves chains of one queue until it is empty or the budget is spent. `handle` returns the number
/// of bytes that it wrote into the chain, or `None` if the budget ran out before the chain was
/// done: the chain then stays the queue's next, and `handle` gets it again in the next turn.
/// Notifications are off while the queue is served; the check after they are on again closes the
/// race with the driver.
pub(super) fn serve(
    queue: &mut Queue,
    ram: &GuestRam,
    interrupt: &Interrupt,
    budget: &mut Budget,
    mut handle: impl FnMut(Chain<'_>, &mut Budget) -> Result<Option<u32>, Fault>,
) -> Result<(), Fault> {
    let mem = ram.map();
    let mut used = false;
    let mut promised = false;
    'turn: loop {
        queue.disable_notification(mem)?;
        while !budget.is_spent() {
            let Some(chain) = take(queue, mem)? else {
                if promised {
                    return Err(Fault::Gone);
                }
                break;
            };
            promised = false;
            budget.spend_chain();
            let head = chain.head_index();
            let Some(written) = handle(chain, budget)? else {
                queue.go_to_previous_position();
                break 'turn;
            };
            queue.add_used(mem, head, written)?;
            used = true;
        }
        if budget.is_spent() || !queue.enable_notification(mem)? {
            break;
        }
        promised = true;
    }
    if used && queue.needs_notification(mem)? {
        interrupt.used();
    }
    Ok(())
}
