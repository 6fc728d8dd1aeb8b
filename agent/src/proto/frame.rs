//! Frames (a length and a payload), and the buffer that splits a byte stream into them.

use alloc::vec::Vec;

use serde::{Serialize, de::Deserialize};

use super::MAX_FRAME;

const HEADER: usize = 4;
/// Room for a read while no large frame is expected: one page, because untouched memory costs the
/// guest no page fault.
const SMALL: usize = 4096;

/// Why bytes are not a frame of this protocol. The connection cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The announced length is above [`MAX_FRAME`].
    #[error("frame of {0} bytes, at most {MAX_FRAME} are allowed")]
    TooLong(u64),
    /// The payload is not a value of the expected type, or has trailing bytes.
    #[error("frame does not decode as the expected message")]
    Malformed,
}

/// Appends `message` to `out` as one frame.
///
/// # Errors
/// [`FrameError::TooLong`] if it does not fit in a frame; `out` is then unchanged.
pub fn encode<T: Serialize>(message: &T, out: &mut Vec<u8>) -> Result<(), FrameError> {
    encode_with(out, |payload| append(message, payload))
}

/// Appends `value` in postcard's encoding.
pub(super) fn append<T: Serialize>(value: &T, out: &mut Vec<u8>) -> Result<(), FrameError> {
    postcard::serialize_with_flavor(value, Appender(out)).map_err(|_| FrameError::Malformed)
}

/// A postcard flavour that appends to a buffer.
struct Appender<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Appender<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Appends a frame; `fill` appends its payload.
pub(super) fn encode_with(
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Vec<u8>) -> Result<(), FrameError>,
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    if let Err(error) = fill(out) {
        out.truncate(start);
        return Err(error);
    }
    let length = out.len().saturating_sub(start + HEADER);
    match (u32::try_from(length), out.get_mut(start..start + HEADER)) {
        (Ok(wire), Some(header)) if length <= MAX_FRAME => {
            header.copy_from_slice(&wire.to_le_bytes());
            Ok(())
        }
        _ => {
            out.truncate(start);
            Err(FrameError::TooLong(length as u64))
        }
    }
}

/// Decodes a payload; trailing bytes are an error.
pub(super) fn decode<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameError::Malformed),
    }
}

/// Splits a byte stream into frames: read into [`spare`](Self::spare), report the bytes read with
/// [`filled`](Self::filled), take frames with [`next_frame`](Self::next_frame).
///
/// Never holds more than one frame of [`MAX_FRAME`] and its header, and grows only after a frame's
/// length was checked.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl FrameBuffer {
    /// Returns an empty buffer, which allocates on the first read.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of bytes that were read and belong to no frame taken yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// Returns room to read into; never empty unless a complete frame is ready to be taken.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the frame being received is too long.
    pub fn spare(&mut self) -> Result<&mut [u8], FrameError> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = match self.announced()? {
            Some(length) => SMALL.max(HEADER + length),
            None => SMALL,
        };
        if self.bytes.len() < wanted {
            self.bytes.resize(wanted, 0);
        }
        Ok(self.bytes.get_mut(self.end..).unwrap_or_default())
    }

    /// Records that the first `count` bytes of [`spare`](Self::spare) now hold data.
    pub fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.bytes.len());
    }

    /// Returns the payload of the next complete frame without taking it.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] as soon as a length above the limit is seen.
    pub fn peek(&self) -> Result<Option<&[u8]>, FrameError> {
        let Some(length) = self.announced()? else {
            return Ok(None);
        };
        let from = self.start + HEADER;
        Ok(self
            .bytes
            .get(..self.end)
            .and_then(|bytes| bytes.get(from..from + length)))
    }

    /// Takes the next complete frame and returns its payload.
    ///
    /// # Errors
    /// As [`peek`](Self::peek).
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some(length) = self.announced()? else {
            return Ok(None);
        };
        let from = self.start + HEADER;
        let until = from + length;
        if until > self.end {
            return Ok(None);
        }
        self.start = until;
        Ok(self.bytes.get(from..until))
    }

    /// Returns the checked length of the frame at the front, once its header was received.
    fn announced(&self) -> Result<Option<usize>, FrameError> {
        let Some(header) = self
            .bytes
            .get(self.start..self.end)
            .and_then(|bytes| bytes.first_chunk::<HEADER>())
        else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header);
        match usize::try_from(length) {
            Ok(length) if length <= MAX_FRAME => Ok(Some(length)),
            _ => Err(FrameError::TooLong(length.into())),
        }
    }
}
