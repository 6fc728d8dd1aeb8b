//! The output that a guest wrote to its serial port: a bounded window over an endless stream.
//!
//! The guest can neither block nor fill the host: when the window is full, the oldest bytes are
//! dropped, and a reader that was too slow learns how many it missed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::wake::Notice;

/// Size of the window in bytes.
const WINDOW: usize = 256 << 10;

/// A guest's console output. Cheap to clone; outlives its VM.
#[derive(Clone, Debug, Default)]
pub struct Console(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    window: Mutex<Window>,
    changed: Notice,
}

#[derive(Debug, Default)]
struct Window {
    bytes: VecDeque<u8>,
    /// Bytes dropped from the front so far: the position of the window's first byte.
    start: u64,
    closed: bool,
}

/// A piece of console output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Bytes lost between the position asked for and the first byte here.
    pub missed: u64,
    /// Position after the last byte, to pass to the next read.
    pub next: u64,
    /// True if no more output will follow after `next`.
    pub end: bool,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, Window> {
        self.0.window.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn push(&self, bytes: &[u8]) {
        {
            let mut window = self.lock();
            window.bytes.extend(bytes);
            let over = window.bytes.len().saturating_sub(WINDOW);
            window.bytes.drain(..over);
            window.start += over as u64;
        }
        self.0.changed.post();
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.0.changed.post();
    }

    /// Returns the output from position `from` on (0 is the first byte ever printed), without
    /// waiting.
    #[must_use]
    pub fn since(&self, from: u64) -> Chunk {
        let window = self.lock();
        let missed = window.start.saturating_sub(from);
        let end = window.start + window.bytes.len() as u64;
        let skip = usize::try_from(from.saturating_sub(window.start)).unwrap_or(usize::MAX);
        Chunk {
            bytes: window.bytes.iter().skip(skip).copied().collect(),
            missed,
            next: end.max(from),
            end: window.closed,
        }
    }

    /// Waits until there is output from position `from` on, or the console is closed. Cancel-safe:
    /// nothing is consumed.
    pub async fn read(&self, from: u64) -> Chunk {
        let look = || {
            let chunk = self.since(from);
            (chunk.end || !chunk.bytes.is_empty()).then_some(chunk)
        };
        self.0.changed.until(look).await
    }

    /// Returns the whole window as text, with invalid UTF-8 replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.since(0).bytes).into_owned()
    }
}

impl std::io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_drops_the_oldest_bytes_and_counts_them() {
        let console = Console::default();
        for _ in 0..3 {
            console.push(&[b'a'; WINDOW]);
        }
        console.push(b"end");
        let chunk = console.since(0);
        assert_eq!(chunk.bytes.len(), WINDOW);
        assert_eq!(chunk.missed, 2 * WINDOW as u64 + 3);
        assert!(chunk.bytes.ends_with(b"aend"));
        assert_eq!(console.since(chunk.next).bytes, b"");
    }

    #[tokio::test]
    async fn a_reader_is_woken_by_output_and_by_the_end() {
        let console = Console::default();
        let writer = console.clone();
        let reader = tokio::spawn(async move {
            let first = console.read(0).await;
            let second = console.read(first.next).await;
            (first, second)
        });
        tokio::task::yield_now().await;
        writer.push(b"hello");
        crate::wake::flush();
        tokio::task::yield_now().await;
        writer.close();
        let (first, second) = reader.await.unwrap();
        assert_eq!((first.bytes.as_slice(), first.end), (&b"hello"[..], false));
        assert!(second.end && second.bytes.is_empty());
    }
}
