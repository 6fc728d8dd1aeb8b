//! The packet header of virtio-vsock (virtio 1.2 section 5.10.6), copied out of guest memory once.

/// Bytes of a header on the wire: little-endian fields without padding.
pub const HEADER_BYTES: usize = 44;
/// Most payload bytes that one packet may carry, in either direction.
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// The context id of the host.
pub const HOST_CID: u64 = 2;
/// The only socket type that this device supports.
pub const TYPE_STREAM: u16 = 1;

/// The operation of a packet, with its number in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses or resets a connection.
    Reset = 3,
    /// Closes one or both directions; see [`ShutdownFlags`].
    Shutdown = 4,
    /// Carries payload.
    Data = 5,
    /// Tells the peer how much it may send.
    CreditUpdate = 6,
    /// Asks the peer for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if the specification defines one.
    #[must_use]
    pub fn from_wire(raw: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| op.to_wire() == raw)
    }

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u16 {
        // Unit-only enum with an explicit representation: the cast is its definition.
        self as u16
    }
}

/// The directions that the sender of a shutdown has closed. A closed direction stays closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShutdownFlags {
    /// The sender takes no more data (flag bit 0).
    pub receive: bool,
    /// The sender sends no more data (flag bit 1).
    pub send: bool,
}

impl ShutdownFlags {
    /// Both directions.
    pub const BOTH: Self = Self {
        receive: true,
        send: true,
    };

    /// Reads the flags of a shutdown packet; bits without a meaning are ignored.
    #[must_use]
    pub fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    /// The flags of a shutdown packet.
    #[must_use]
    pub fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// The directions that either of the two has closed.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }
}

/// A header as its sender wrote it. Nothing in it can be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload after the header.
    pub len: u32,
    /// Type of socket; [`TYPE_STREAM`] is the only one supported here.
    pub kind: u16,
    /// Operation; see [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes of payload that the sender has consumed so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes the wire format.
    #[must_use]
    pub fn decode(wire: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = wire.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes the wire format.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut wire = [0; HEADER_BYTES];
        let fields = self
            .src_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        for (slot, byte) in wire.iter_mut().zip(fields) {
            *slot = byte;
        }
        wire
    }

    /// The reset that answers this packet (section 5.10.6.4), or `None` where the packet is itself
    /// a reset: two sides that answer resets would never stop.
    #[must_use]
    pub fn refusal(&self) -> Option<Self> {
        (self.op != Op::Reset.to_wire()).then(|| Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset.to_wire(),
            ..Self::default()
        })
    }
}

/// Splits `N` bytes off the front; returns zeroes if `rest` is too short, which no caller allows.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, tail)) => {
            *rest = tail;
            *field
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100F_0E0D_0C0B_0A09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1C1B_1A19,
            kind: 0x1E1D,
            op: 0x201F,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2C2B_2A29,
        };
        let wire: Vec<u8> = (1..=44).collect();
        assert_eq!(header.encode().as_slice(), wire);
    }

    #[test]
    fn a_reset_is_never_answered() {
        let reset = Header {
            op: Op::Reset.to_wire(),
            ..Header::default()
        };
        assert_eq!(reset.refusal(), None);
    }

    #[test]
    fn a_refusal_goes_back_where_the_packet_came_from() {
        let packet = Header {
            src_cid: 3,
            dst_cid: 9,
            src_port: 10,
            dst_port: 20,
            kind: 77,
            op: 99,
            ..Header::default()
        };
        let refusal = packet.refusal().unwrap();
        assert_eq!((refusal.src_cid, refusal.dst_cid), (9, 3));
        assert_eq!((refusal.src_port, refusal.dst_port), (20, 10));
        assert_eq!((refusal.kind, refusal.op), (77, 3));
    }

    proptest! {
        #[test]
        fn decode_and_encode_are_inverse(halves in any::<([u8; 32], [u8; 12])>()) {
            let mut wire = [0; HEADER_BYTES];
            wire[..32].copy_from_slice(&halves.0);
            wire[32..].copy_from_slice(&halves.1);
            prop_assert_eq!(Header::decode(&wire).encode(), wire);
        }

        #[test]
        fn operations_have_one_number(raw: u16) {
            match Op::from_wire(raw) {
                Some(op) => prop_assert_eq!(op.to_wire(), raw),
                None => prop_assert!(raw == 0 || raw > 7),
            }
        }
    }
}
