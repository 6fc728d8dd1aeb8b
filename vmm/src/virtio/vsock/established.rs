//! An established connection: data both ways, credit, and which directions are closed.

use std::io::{self, Read, Write};

use super::buffer::Buffer;
use super::credit::{Inbound, Outbound};
use super::packet::{Header, MAX_PAYLOAD, Op, ShutdownFlags};
use super::state::CreditState;

/// Where the host's answer to the guest's request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A host task has still to say whether it takes the connection.
    Undecided,
    /// The guest is owed a RESPONSE.
    Pending,
    /// The guest knows, or was itself the one that was asked.
    Given,
}

/// A packet that the guest is owed.
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

/// What a packet from the guest does to an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
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
    /// The guest asked for our credit.
    update_owed: bool,
    /// We asked for the guest's credit since it last had none.
    asked: bool,
    /// What the host side closed.
    pub(super) host: ShutdownFlags,
    /// What of it the guest has heard.
    pub(super) sent_shutdown: ShutdownFlags,
    /// What the guest closed.
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

    /// Goes on from a snapshot.
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

    /// The counters to go on from, if it is open both ways and nothing is in flight on our side.
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

    /// Takes a packet from the guest; a reset is not for here.
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
            // The host side is gone: what was under way is nobody's.
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

    /// What can be told to the guest by now: no end of data before the data.
    fn tellable(&self) -> ShutdownFlags {
        ShutdownFlags {
            receive: self.host.receive,
            send: self.host.send && self.tx.is_empty(),
        }
    }

    /// The next packet that the guest is owed, with the payload that fits `room`. Data comes before
    /// a shutdown so that a writer that drops its stream costs one packet, not two.
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

    /// Writes `owed`, with its payload. `header` has the addresses.
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
        // Every packet carries our credit.
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
