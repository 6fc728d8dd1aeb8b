//! Serving a queue in bounded turns, for devices whose requests are answered at once.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Fault, Interrupt};
use crate::memory::GuestRam;

/// A request of the driver's.
pub(super) type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// Most descriptors of one request that are looked at: as many as the longest queue here has. Indirect
/// tables, which no device offers but a guest can make, are held to it as well.
const MAX_DESCRIPTORS: usize = 128;

/// The descriptors of a request, in order.
pub(super) fn descriptors(chain: Chain<'_>) -> impl Iterator<Item = Descriptor> {
    chain.take(MAX_DESCRIPTORS)
}

/// Serves chains of one queue until it is empty or the budget is gone. Each chain costs one; `handle`
/// says how many bytes it wrote into it, and spends more of the budget on one that is much work.
/// Notifications stay off while serving; the last look after switching them on again closes the race
/// with the driver.
pub(super) fn serve(
    queue: &mut Queue,
    ram: &GuestRam,
    interrupt: &Interrupt,
    budget: &mut usize,
    mut handle: impl FnMut(Chain<'_>, &mut usize) -> Result<u32, Fault>,
) -> Result<(), Fault> {
    let mem = ram.map();
    let mut used = false;
    let mut promised = false;
    loop {
        queue.disable_notification(mem)?;
        while *budget > 0 {
            let Some(chain) = queue.iter(mem)?.next() else {
                if promised {
                    return Err(Fault::Gone);
                }
                break;
            };
            promised = false;
            *budget -= 1;
            let head = chain.head_index();
            let written = handle(chain, budget)?;
            queue.add_used(mem, head, written)?;
            used = true;
        }
        if *budget == 0 || !queue.enable_notification(mem)? {
            break;
        }
        promised = true;
    }
    if used && queue.needs_notification(mem)? {
        interrupt.used();
    }
    Ok(())
}
