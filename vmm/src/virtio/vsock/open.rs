//! An established connection: data both ways, credit, and which directions are closed.

use std::io::{self, Read, Write};

use super::buffer::Buffer;
use super::credit::{Inbound, Outbound};
use super::packet::{Header, MAX_PAYLOAD, Op, Shut};
use super::state::CreditState;

/// Where the host's answer to the guest's request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A host task has still to say whether it takes the connection.
    Undecided,
    /// The guest is owed a RESPONSE.
    Owed,
    /// The guest knows, or was itself the one that was asked.
    Given,
}

/// A packet that the guest is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owed {
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
pub(super) struct Open {
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
    pub(super) host: Shut,
    /// What of it the guest has heard.
    pub(super) told: Shut,
    /// What the guest closed.
    pub(super) guest: Shut,
}

impl Open {
    pub(super) fn new(window: u32, header: &Header, answer: Answer) -> Self {
        Self {
            rx: Buffer::default(),
            tx: Buffer::default(),
            inbound: Inbound::new(window),
            outbound: Outbound::new(header),
            answer,
            update_owed: false,
            asked: false,
            host: Shut::default(),
            told: Shut::default(),
            guest: Shut::default(),
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
            && (self.host, self.guest) == (Shut::default(), Shut::default());
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
                self.guest = self.guest.with(Shut::from_flags(header.flags));
                if self.guest.receive {
                    self.tx.clear();
                }
                if self.guest == Shut::BOTH {
                    return Ok(Verdict::Finished);
                }
            }
            Op::Data | Op::Request | Op::Response | Op::Reset => return Ok(Verdict::Violated),
        }
        Ok(Verdict::Continues)
    }

    /// What can be told to the guest by now: no end of data before the data.
    fn tellable(&self) -> Shut {
        Shut {
            receive: self.host.receive,
            send: self.host.send && self.tx.is_empty(),
        }
    }

    /// The next packet that the guest is owed, with the payload that fits `room`. Data comes before
    /// a shutdown so that a writer that drops its stream costs one packet, not two.
    pub(super) fn owed(&self, room: u32) -> Option<Owed> {
        let credit = self.outbound.room();
        match self.answer {
            Answer::Undecided => return None,
            Answer::Owed => return Some(Owed::Response),
            Answer::Given => {}
        }
        if !self.tx.is_empty() && credit > 0 {
            let held = u32::try_from(self.tx.len()).unwrap_or(u32::MAX);
            Some(Owed::Data(held.min(credit).min(room).min(MAX_PAYLOAD)))
        } else if self.tellable() != self.told {
            Some(Owed::Shutdown)
        } else if self.update_owed || (!self.host.receive && self.inbound.update_due()) {
            Some(Owed::CreditUpdate)
        } else if !self.tx.is_empty() && !self.asked {
            Some(Owed::CreditRequest)
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
        owed: Owed,
        mut header: Header,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let op = match owed {
            Owed::Data(len) => {
                header.len = len;
                Op::Data
            }
            Owed::Shutdown => {
                self.told = self.tellable();
                header.flags = self.told.flags();
                Op::Shutdown
            }
            Owed::CreditRequest => {
                self.asked = true;
                Op::CreditRequest
            }
            Owed::Response => {
                self.answer = Answer::Given;
                Op::Response
            }
            Owed::CreditUpdate | Owed::Request | Owed::Reset => Op::CreditUpdate,
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
