//! An established connection: data both ways, credit, and which directions are closed.

use std::io::{self, Read, Write};

use super::buffer::Buffer;
use super::credit::{Inbound, Outbound};
use super::packet::{Header, MAX_PAYLOAD, Op, ShutdownFlags};
use super::state::CreditState;

/// Progress of the host's answer to the guest's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A host task has not accepted or refused the connection yet.
    Undecided,
    /// A RESPONSE to the guest is pending.
    Pending,
    /// The RESPONSE was sent, or the request was the host's.
    Given,
}

/// A packet that is pending for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PendingTx {
    Request,
    Response,
    Reset,
    Data(u32),
    Shutdown,
    CreditUpdate,
    CreditRequest,
}

/// Effect of a packet from the guest on an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The connection continues.
    Continues,
    /// The guest has closed both directions.
    Finished,
    /// The guest broke the protocol.
    Violated,
}

#[derive(Debug)]
pub(super) struct Established {
    /// From the guest to the host's reader.
    pub(super) rx: Buffer,
    /// From the host's writer to the guest.
    pub(super) tx: Buffer,
    pub(super) inbound: Inbound,
    outbound: Outbound,
    pub(super) answer: Answer,
    /// The guest asked for the host's credit.
    update_owed: bool,
    /// The host has asked for the guest's credit, and the guest has announced none since.
    asked: bool,
    /// Directions that the host closed.
    pub(super) host: ShutdownFlags,
    /// Closed directions of the host that the guest was sent a shutdown for.
    pub(super) sent_shutdown: ShutdownFlags,
    /// Directions that the guest closed.
    pub(super) guest: ShutdownFlags,
}

impl Established {
    pub(super) fn new(window: u32, header: &Header, answer: Answer) -> Self {
        Self {
            rx: Buffer::default(),
            tx: Buffer::default(),
            inbound: Inbound::new(window),
            outbound: Outbound::new(header),
            answer,
            update_owed: false,
            asked: false,
            host: ShutdownFlags::default(),
            sent_shutdown: ShutdownFlags::default(),
            guest: ShutdownFlags::default(),
        }
    }

    /// Resumes from a snapshot.
    pub(super) fn resume(saved: &CreditState) -> Self {
        let mut open = Self::new(saved.window, &Header::default(), Answer::Given);
        open.inbound = Inbound::resume(saved.window, saved.consumed, saved.announced);
        open.outbound = Outbound {
            sent: saved.sent,
            allocated: saved.allocated,
            forwarded: saved.forwarded,
        };
        open
    }

    /// The counters to resume from, if both directions are open and nothing is in flight on the
    /// host's side.
    pub(super) fn quiescent(&self) -> Option<CreditState> {
        let quiet = self.tx.is_empty()
            && self.answer == Answer::Given
            && !self.update_owed
            && (self.host, self.guest) == (ShutdownFlags::default(), ShutdownFlags::default());
        let (consumed, announced) = self.inbound.settled().filter(|_| quiet)?;
        Some(CreditState {
            window: self.inbound.window(),
            consumed,
            announced,
            sent: self.outbound.sent,
            allocated: self.outbound.allocated,
            forwarded: self.outbound.forwarded,
        })
    }

    /// Takes a packet from the guest, other than a reset, which the caller handles.
    ///
    /// # Errors
    /// When `payload` cannot be read.
    pub(super) fn receive(
        &mut self,
        op: Op,
        header: &Header,
        payload: &mut impl Read,
    ) -> io::Result<Verdict> {
        self.outbound.update(header);
        self.asked &= self.outbound.room() == 0;
        match op {
            Op::CreditUpdate => {}
            Op::CreditRequest => self.update_owed = true,
            Op::Data if self.guest.send => return Ok(Verdict::Violated),
            // The host receives no more: data still in flight is discarded.
            Op::Data if self.host.receive => {}
            Op::Data if self.inbound.receive(header.len) => {
                let len = usize::try_from(header.len).unwrap_or(usize::MAX);
                self.rx.fill(payload, len)?;
            }
            Op::Shutdown => {
                self.guest = self.guest.with(ShutdownFlags::from_flags(header.flags));
                if self.guest.receive {
                    self.tx.clear();
                }
                if self.guest == ShutdownFlags::BOTH {
                    return Ok(Verdict::Finished);
                }
            }
            Op::Data | Op::Request | Op::Response | Op::Reset => return Ok(Verdict::Violated),
        }
        Ok(Verdict::Continues)
    }

    /// The closed directions that the guest may be sent by now: the end of the data only after the
    /// data.
    fn tellable(&self) -> ShutdownFlags {
        ShutdownFlags {
            receive: self.host.receive,
            send: self.host.send && self.tx.is_empty(),
        }
    }

    /// The next pending packet to the guest, with the payload that fits `room`. Data comes before a
    /// shutdown so that a writer that drops its stream costs one shutdown packet, not two.
    pub(super) fn pending_tx(&self, room: u32) -> Option<PendingTx> {
        let credit = self.outbound.room();
        match self.answer {
            Answer::Undecided => return None,
            Answer::Pending => return Some(PendingTx::Response),
            Answer::Given => {}
        }
        if !self.tx.is_empty() && credit > 0 {
            let held = u32::try_from(self.tx.len()).unwrap_or(u32::MAX);
            Some(PendingTx::Data(held.min(credit).min(room).min(MAX_PAYLOAD)))
        } else if self.tellable() != self.sent_shutdown {
            Some(PendingTx::Shutdown)
        } else if self.update_owed || (!self.host.receive && self.inbound.update_due()) {
            Some(PendingTx::CreditUpdate)
        } else if !self.tx.is_empty() && !self.asked {
            Some(PendingTx::CreditRequest)
        } else {
            None
        }
    }

    /// Writes `pending_tx`, with its payload. `header` has the addresses.
    ///
    /// # Errors
    /// When `out` is too short.
    pub(super) fn emit(
        &mut self,
        pending_tx: PendingTx,
        mut header: Header,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let op = match pending_tx {
            PendingTx::Data(len) => {
                header.len = len;
                Op::Data
            }
            PendingTx::Shutdown => {
                self.sent_shutdown = self.tellable();
                header.flags = self.sent_shutdown.flags();
                Op::Shutdown
            }
            PendingTx::CreditRequest => {
                self.asked = true;
                Op::CreditRequest
            }
            PendingTx::Response => {
                self.answer = Answer::Given;
                Op::Response
            }
            PendingTx::CreditUpdate | PendingTx::Request | PendingTx::Reset => Op::CreditUpdate,
        };
        // Every packet carries the host's credit.
        self.update_owed = false;
        self.inbound.announce(&mut header);
        header.op = op.to_wire();
        out.write_all(&header.encode())?;
        self.outbound.send(header.len);
        let mut left = usize::try_from(header.len).unwrap_or(usize::MAX);
        while left > 0 && !self.tx.is_empty() {
            let front = self.tx.front();
            let n = front.len().min(left);
            out.write_all(front.get(..n).unwrap_or_default())?;
            self.tx.consume(n);
            left -= n;
        }
        Ok(())
    }
}
