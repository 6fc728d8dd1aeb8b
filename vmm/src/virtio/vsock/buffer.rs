//! The bytes in flight in one direction of a connection.

use std::collections::VecDeque;
use std::io::{self, Read};

/// Smallest size of a piece of a buffer, so that small writes share one.
const PIECE_MIN: usize = 1024;
/// Largest size of a piece, so that the allocator has no reason to map and unmap each of them.
const PIECE_MAX: usize = 64 * 1024;

/// A first-in, first-out byte queue that takes memory only for its contents: none when empty. Its
/// owner bounds its length.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes already consumed from the first piece; always fewer than its length.
    consumed: usize,
    len: usize,
}

impl Buffer {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends exactly `len` bytes from `source`.
    ///
    /// # Errors
    /// The error of `source`. Of the bytes read here, the buffer then holds only the full pieces
    /// before the failed one.
    pub(super) fn fill(&mut self, source: &mut impl Read, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let mut piece = match self.pieces.pop_back() {
                Some(last) if last.len() < last.capacity() => last,
                full => {
                    self.pieces.extend(full);
                    Vec::with_capacity(len.clamp(PIECE_MIN, PIECE_MAX))
                }
            };
            let old = piece.len();
            let n = len.min(piece.capacity() - old);
            piece.resize(old + n, 0);
            let read = match piece.get_mut(old..) {
                Some(space) => source.read_exact(space),
                None => Ok(()),
            };
            if read.is_err() {
                piece.truncate(old);
            } else {
                self.len += n;
                len -= n;
            }
            if !piece.is_empty() {
                self.pieces.push_back(piece);
            }
            read?;
        }
        Ok(())
    }

    /// The oldest bytes that are contiguous in memory; empty only if the buffer is.
    pub(super) fn front(&self) -> &[u8] {
        self.pieces
            .front()
            .and_then(|piece| piece.get(self.consumed..))
            .unwrap_or_default()
    }

    /// Removes the `n` oldest bytes, at most all of [`Buffer::front`].
    pub(super) fn consume(&mut self, n: usize) {
        let front = self.front().len();
        let n = n.min(front);
        self.len -= n;
        if n == front {
            self.pieces.pop_front();
            self.consumed = 0;
        } else {
            self.consumed += n;
        }
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
    }

    /// Removes all bytes; returns how many there were.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(self).len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Buffer {
        /// Bytes of heap that the contents occupy.
        fn footprint(&self) -> usize {
            self.pieces.iter().map(Vec::capacity).sum()
        }
    }

    #[test]
    fn memory_follows_the_contents() {
        let mut buffer = Buffer::default();
        buffer.fill(&mut io::repeat(7), 256 * 1024).unwrap();
        assert_eq!(buffer.footprint(), 256 * 1024);
        while buffer.len() > 1000 {
            buffer.consume(100);
        }
        assert!(buffer.footprint() <= PIECE_MAX);
        buffer.consume(1000);
        assert_eq!((buffer.len(), buffer.footprint()), (0, 0));
        assert_eq!(buffer.pieces.capacity(), 0);
    }

    #[test]
    fn a_source_that_fails_leaves_what_was_there() {
        let mut buffer = Buffer::default();
        buffer.fill(&mut &b"abc"[..], 3).unwrap();
        assert!(buffer.fill(&mut &b"de"[..], 3).is_err());
        assert_eq!((buffer.front(), buffer.len()), (&b"abc"[..], 3));
        let mut empty = Buffer::default();
        assert!(empty.fill(&mut io::empty(), 1).is_err());
        assert!(empty.is_empty() && empty.front().is_empty());
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in proptest::collection::vec((any::<bool>(), 0usize..200_000), 1..40)) {
            let (mut buffer, mut model) = (Buffer::default(), VecDeque::new());
            let mut next = 0u8;
            for (write, n) in steps {
                if write {
                    let bytes: Vec<u8> = (0..n).map(|_| { next = next.wrapping_add(1); next }).collect();
                    buffer.fill(&mut bytes.as_slice(), n).unwrap();
                    model.extend(bytes);
                } else {
                    let n = n.min(buffer.front().len());
                    let expected: Vec<u8> = model.drain(..n).collect();
                    prop_assert_eq!(&buffer.front()[..n], expected);
                    buffer.consume(n);
                }
                prop_assert_eq!(buffer.len(), model.len());
                prop_assert_eq!(buffer.front().is_empty(), model.is_empty());
            }
        }
    }
}
