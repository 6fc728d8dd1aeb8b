//! Serving a queue in bounded turns, for devices whose requests are answered at once.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Fault, Interrupt};
use crate::memory::GuestRam;

/// A request of the driver's.
pub(super) type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// Serves chains of one queue until it is empty or the budget is gone. `handle` says how many bytes
/// it wrote into a chain. Notifications stay off while serving; the last look after switching them
/// on again closes the race with the driver.
pub(super) fn serve(
    queue: &mut Queue,
    ram: &GuestRam,
    interrupt: &Interrupt,
    budget: &mut usize,
    mut handle: impl FnMut(Chain<'_>) -> Result<u32, Fault>,
) -> Result<(), Fault> {
    let mem = ram.map();
    let mut used = false;
    loop {
        queue.disable_notification(mem)?;
        while *budget > 0 {
            let Some(chain) = queue.iter(mem)?.next() else {
                break;
            };
            let head = chain.head_index();
            let written = handle(chain)?;
            queue.add_used(mem, head, written)?;
            used = true;
            *budget -= 1;
        }
        if *budget == 0 || !queue.enable_notification(mem)? {
            break;
        }
    }
    if used && queue.needs_notification(mem)? {
        interrupt.used();
    }
    Ok(())
}
