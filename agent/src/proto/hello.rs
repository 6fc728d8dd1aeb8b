//! The first frame in each direction.

use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use super::{
    VERSION,
    frame::{FrameError, append, decode, encode_with},
};

/// The first bytes of every version's hello.
const MAGIC: &[u8; 4] = b"HRTH";

/// The identity of one running guest: new at each boot, and replaced in each clone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct InstanceId(pub [u8; 16]);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

/// The greeting of either side. The magic and the version that precede it are the same in all
/// versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The guest's identity; zero in the host's hello.
    pub instance: InstanceId,
    /// The guest's CLOCK_BOOTTIME when the agent's `main` began, in microseconds; zero in the
    /// host's hello.
    pub started_us: u64,
    /// The guest's CLOCK_BOOTTIME when this hello was written, in microseconds; zero in the host's
    /// hello.
    pub greeted_us: u64,
}

/// Why the first frame is not a hello that this side accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// The peer speaks another version.
    #[error(
        "peer speaks protocol version {peer}, this side {VERSION}: build the guest image with this release's agent"
    )]
    Version {
        /// The peer's version.
        peer: u16,
    },
    /// The first frame does not belong to this protocol.
    #[error("first frame is not a hello: the peer is not a Hearth agent or client")]
    NotHello,
    /// The frame itself is bad.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl Hello {
    /// Appends this hello to `out` as one frame.
    ///
    /// # Errors
    /// None in practice: a hello fits in a frame.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        encode_with(out, |payload| {
            payload.extend_from_slice(MAGIC);
            payload.extend_from_slice(&VERSION.to_le_bytes());
            append(self, payload)
        })
    }

    /// Decodes the payload of a first frame.
    ///
    /// # Errors
    /// [`HelloError::Version`] if the peer has another version, whatever follows the version;
    /// [`HelloError::NotHello`] and [`HelloError::Frame`].
    pub fn decode(payload: &[u8]) -> Result<Self, HelloError> {
        let rest = payload.strip_prefix(MAGIC).ok_or(HelloError::NotHello)?;
        let (version, body) = rest.split_first_chunk::<2>().ok_or(HelloError::NotHello)?;
        match u16::from_le_bytes(*version) {
            VERSION => Ok(decode(body)?),
            peer => Err(HelloError::Version { peer }),
        }
    }
}
