//! The device: moves packets between the queues and the muxer.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::MutexGuard;
use virtio_queue::{Queue, QueueT};

use super::chain::Chain;
use super::host::VsockHost;
use super::muxer::Muxer;
use super::packet::{HEADER_BYTES, Header, MAX_PAYLOAD};
use super::shared::Hub;
use super::state::VsockState;
use crate::memory::GuestRam;
use crate::virtio::serve::{Budget, take};
use crate::virtio::{
    Activation, DeviceState, Doorbell, F_EVENT_IDX, F_VERSION_1, Fault, Interrupt, Progress,
    QueuePosition, VirtioDevice,
};

/// Device id of a socket device (virtio 1.2 section 5).
const DEVICE_TYPE: u32 = 19;
/// Sizes of the RX, TX and event queues. Linux fills the RX queue with buffers of 4 KiB at boot: 64
/// of them hold one connection's window, and a guest that never uses vsock loses no more memory
/// than that. Linux keeps 8 event buffers.
const QUEUE_SIZES: [u16; 3] = [64, 128, 8];
/// Most bytes of payload in one turn, both directions together.
const TURN_BYTES: u64 = 1 << 20;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, the only event that the specification defines.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// The virtio-vsock device of one VM. Dropping it ends all its streams.
#[derive(Debug)]
pub struct VsockDevice {
    hub: Arc<Hub>,
    guest_cid: u64,
    active: Option<Active>,
    transport_reset: TransportReset,
}

/// Progress of the event that tells a restored guest that all its connections are gone. The guest
/// applies the event to every connection that it has by then, so none may be opened before: packets
/// to the guest wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// The guest has acted on it, or it was never needed.
    Done,
    /// The event has still to be sent.
    Pending,
    /// The event was sent. A driver makes the buffer available again once it has acted on the
    /// event: by then it has made more than `available` buffers available. There is no timeout: a
    /// clone may be parked for hours before it runs. If a driver never does so, a connect to the
    /// guest times out.
    Sent { available: u16 },
}

#[derive(Debug)]
struct Active {
    ram: GuestRam,
    rx: Queue,
    tx: Queue,
    events: Queue,
    interrupt: Interrupt,
}

impl VsockDevice {
    /// A device for a guest with context id `guest_cid` (3 to 2^32 - 2) that is woken by
    /// `doorbell`, and the host's handle on it.
    #[must_use]
    pub fn new(guest_cid: u64, doorbell: Doorbell) -> (Self, VsockHost) {
        Self::with(
            guest_cid,
            doorbell,
            |hub| Muxer::new(guest_cid, hub),
            TransportReset::Done,
        )
    }

    /// The state from which [`VsockDevice::restore`] continues. The device must not run meanwhile.
    #[must_use]
    pub fn save(&self) -> VsockState {
        let pending_tx = self.transport_reset != TransportReset::Done;
        self.hub.muxer.lock().save(pending_tx)
    }

    /// A device that continues from `state` once it is activated with the queues that were saved
    /// with it. Durable connections continue (see [`VsockHost::reattach`]); the guest sees every
    /// other one end: by a reset of the whole transport if none is durable, else one by one.
    #[must_use]
    pub fn restore(state: &VsockState, doorbell: Doorbell) -> (Self, VsockHost) {
        let transport_reset = if state.resets_transport() {
            TransportReset::Pending
        } else {
            TransportReset::Done
        };
        Self::with(
            state.guest_cid(),
            doorbell,
            |hub| Muxer::restore(state, hub),
            transport_reset,
        )
    }

    /// Number of connections of this device, including those that are closing.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.hub.muxer.lock().connections()
    }

    fn with(
        guest_cid: u64,
        doorbell: Doorbell,
        muxer: impl FnOnce(Weak<Hub>) -> Muxer,
        transport_reset: TransportReset,
    ) -> (Self, VsockHost) {
        let hub = Arc::new_cyclic(|hub| Hub::new(doorbell, muxer(Weak::clone(hub))));
        let host = VsockHost::new(&hub);
        let device = Self {
            hub,
            guest_cid,
            active: None,
            transport_reset,
        };
        (device, host)
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let space = self.guest_cid.to_le_bytes();
        let mut bytes = space.iter().skip(offset);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Fault> {
        let mut queues = activation.queues.into_iter().flatten();
        let (Some(rx), Some(tx), Some(events), None) =
            (queues.next(), queues.next(), queues.next(), queues.next())
        else {
            return Err(Fault::Request("vsock needs its three queues"));
        };
        self.active = Some(Active {
            ram: activation.ram,
            rx,
            tx,
            events,
            interrupt: activation.interrupt,
        });
        let mut muxer = self.hub.muxer.lock();
        muxer.take_in(self.hub.take_inbox());
        muxer.activate();
        drop(muxer);
        // A restored guest may have kicked before it was saved; host tasks may wait for a new one.
        self.hub.ring();
        Ok(())
    }

    fn run(&mut self) -> Result<Progress, Fault> {
        self.run_at(Instant::now())
    }

    fn deadline(&self) -> Option<Instant> {
        self.hub.muxer.lock().deadline()
    }

    fn reset(&mut self) {
        self.active = None;
        self.transport_reset = TransportReset::Done;
        let mut muxer = self.hub.muxer.lock();
        muxer.take_in(self.hub.take_inbox());
        muxer.deactivate();
    }

    fn positions(&self) -> Vec<Option<QueuePosition>> {
        self.active
            .iter()
            .flat_map(|a| [&a.rx, &a.tx, &a.events])
            .map(|q| Some(QueuePosition::of(q)))
            .collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockDevice::save(self))
    }
}

impl VsockDevice {
    /// [`VirtioDevice::run`] at the time `now`.
    pub(super) fn run_at(&mut self, now: Instant) -> Result<Progress, Fault> {
        let outcome = self.serve(now);
        if outcome.is_err() {
            // No packet is moved any more: the host's streams must not wait for one.
            self.reset();
        }
        outcome
    }

    fn serve(&mut self, now: Instant) -> Result<Progress, Fault> {
        let mut muxer = self.hub.muxer.lock();
        muxer.take_in(self.hub.take_inbox());
        muxer.expire(now);
        let Some(active) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let mut budget = Budget::of_turn(TURN_BYTES);
        self.transport_reset = active.reset_transport(self.transport_reset, &mut budget)?;
        // TX comes first, so that packets it causes or makes room for go out in the same turn. It
        // gets half of the budget, so that RX has its part whatever the guest sends.
        let mut part = budget.half();
        let received = active.receive(&mut muxer, &mut part)?;
        budget.give_back(part);
        let sent = if self.transport_reset == TransportReset::Done {
            active.send(&mut muxer, &mut budget)?
        } else {
            Progress::Idle
        };
        // A guest that is never idle must not keep the host's calls waiting for the lock.
        MutexGuard::unlock_fair(muxer);
        let again = received == Progress::More || sent == Progress::More;
        Ok(if again {
            Progress::More
        } else {
            Progress::Idle
        })
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.hub.close();
    }
}

impl Active {
    /// Takes the guest's packets from the TX queue while there is space for the resets that answer
    /// them.
    fn receive(&mut self, muxer: &mut Muxer, budget: &mut Budget) -> Result<Progress, Fault> {
        let ram = self.ram.map();
        let mut used = false;
        let mut promised = false;
        let progress = loop {
            self.tx.disable_notification(ram)?;
            while !budget.is_spent() && muxer.can_receive() {
                let Some(chain) = take(&mut self.tx, ram)? else {
                    if promised {
                        return Err(Fault::Gone);
                    }
                    break;
                };
                promised = false;
                budget.spend_chain();
                let head = chain.head_index();
                let mut packet = Chain::readable(ram, chain)?;
                let mut wire = [0; HEADER_BYTES];
                packet
                    .read_exact(&mut wire)
                    .map_err(|_| Fault::Request("TX packet shorter than its header"))?;
                let header = Header::decode(&wire);
                let available = packet.left();
                muxer
                    .receive(&header, available, &mut packet)
                    .map_err(|_| Fault::Request("TX packet cannot be read"))?;
                budget.spend_bytes(u64::from(header.len.min(MAX_PAYLOAD)));
                self.tx.add_used(ram, head, 0)?;
                used = true;
            }
            if budget.is_spent() {
                break Progress::More;
            }
            if !muxer.can_receive() {
                // Continues once the guest has taken the refusals: its RX kick rings the doorbell.
                break Progress::Idle;
            }
            if !self.tx.enable_notification(ram)? {
                break Progress::Idle;
            }
            promised = true;
        };
        if used && self.tx.needs_notification(ram)? {
            self.interrupt.used();
        }
        Ok(progress)
    }

    /// Fills the guest's RX buffers while there are buffers and packets for them. Asks the guest to
    /// kick only if there is a packet without a buffer.
    fn send(&mut self, muxer: &mut Muxer, budget: &mut Budget) -> Result<Progress, Fault> {
        let ram = self.ram.map();
        let mut used = false;
        let mut promised = false;
        let stalled = !muxer.can_receive();
        self.rx.disable_notification(ram)?;
        let progress = loop {
            if !muxer.has_packet() {
                break Progress::Idle;
            }
            if budget.is_spent() {
                break Progress::More;
            }
            let Some(chain) = take(&mut self.rx, ram)? else {
                if promised {
                    return Err(Fault::Gone);
                }
                if self.rx.enable_notification(ram)? {
                    self.rx.disable_notification(ram)?;
                    promised = true;
                    continue;
                }
                break Progress::Idle;
            };
            promised = false;
            budget.spend_chain();
            let head = chain.head_index();
            let mut buffer = Chain::writable(ram, chain)?;
            let room = buffer
                .left()
                .checked_sub(HEADER_BYTES)
                .filter(|room| *room > 0)
                .ok_or(Fault::Request("RX buffer without space for a packet"))?;
            let room = u32::try_from(room).unwrap_or(MAX_PAYLOAD);
            let sent = muxer
                .send(room, &mut buffer)
                .map_err(|_| Fault::Request("RX buffer cannot be written"))?;
            budget.spend_bytes(u64::from(sent));
            self.rx.add_used(ram, head, buffer.moved())?;
            used = true;
        };
        if used && self.rx.needs_notification(ram)? {
            self.interrupt.used();
        }
        // TX stopped because there was no space for refusals; now there is some.
        if stalled && muxer.can_receive() {
            return Ok(Progress::More);
        }
        Ok(progress)
    }

    /// Advances the transport reset as far as possible; returns its new state.
    fn reset_transport(
        &mut self,
        mut at: TransportReset,
        budget: &mut Budget,
    ) -> Result<TransportReset, Fault> {
        if at == TransportReset::Pending {
            // Read before the guest can have acted on the event.
            let available = self.events.avail_idx(self.ram.map(), Ordering::Acquire)?.0;
            budget.spend_chain();
            if self.send_event(TRANSPORT_RESET)? {
                at = TransportReset::Sent { available };
            }
        }
        if let TransportReset::Sent { available } = at {
            let ram = self.ram.map();
            // Asks for a kick for the buffer after `available`, not for the next unused one.
            let next = self.events.next_avail();
            self.events.set_next_avail(available);
            let heard = self.events.enable_notification(ram);
            self.events.set_next_avail(next);
            if heard? {
                at = TransportReset::Done;
            }
        }
        Ok(at)
    }

    /// Puts an event into the guest's event queue; returns false if no buffer is available there.
    fn send_event(&mut self, event: [u8; 4]) -> Result<bool, Fault> {
        let ram = self.ram.map();
        let mut chain = take(&mut self.events, ram)?;
        if chain.is_none() && self.events.enable_notification(ram)? {
            // A buffer became available meanwhile.
            chain = Some(take(&mut self.events, ram)?.ok_or(Fault::Gone)?);
        }
        let Some(chain) = chain else {
            return Ok(false);
        };
        let head = chain.head_index();
        Chain::writable(ram, chain)?
            .write_all(&event)
            .map_err(|_| Fault::Request("event buffer shorter than an event"))?;
        self.events.add_used(ram, head, 4)?;
        if self.events.needs_notification(ram)? {
            self.interrupt.used();
        }
        Ok(true)
    }
}
