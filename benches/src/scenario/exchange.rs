//! Questions and answers of any size over a byte stream, in the format of the base image's
//! `vsock-exchange`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Length of a question's head: its own length and that of its answer, 32 bits each, little-endian.
pub(super) const HEAD: usize = 8;
/// Bytes that either side reads or writes at once.
const CHUNK: usize = 64 * 1024;

/// Number of bytes that go each way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exchange {
    /// Length of the question, at least [`HEAD`].
    pub(super) asked: u32,
    /// Length of the answer, at least one: without an answer to wait for, the next question would
    /// run into this one.
    pub(super) answered: u32,
}

impl Exchange {
    /// Sends a question and reads the whole answer; returns the time that took.
    ///
    /// # Errors
    /// Errors of the stream, and its end within the answer.
    pub(super) async fn on(
        self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<Duration> {
        let mut chunk = vec![0; CHUNK];
        let (mut asked, mut answered) = (self.asked as usize, self.answered as usize);
        let head = [self.asked, self.answered].map(u32::to_le_bytes).concat();
        let mut question = chunk.clone();
        question.splice(..HEAD, head);
        let begin = Instant::now();
        while asked > 0 {
            let part = question.get(..asked.min(CHUNK)).unwrap_or_default();
            stream.write_all(part).await?;
            // The other side reads a head only where a question begins, so each part may begin with
            // one.
            asked -= part.len();
        }
        while answered > 0 {
            let room = chunk.get_mut(..answered.min(CHUNK)).unwrap_or_default();
            match stream.read(room).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => answered -= count,
            }
        }
        Ok(begin.elapsed())
    }
}

/// Answers questions as the guest's program does, until the stream ends.
///
/// # Errors
/// Errors of the stream.
pub(super) fn serve(mut stream: UnixStream) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while let Some([asked, mut left]) = head(&mut stream, &mut chunk)? {
        let mut rest = (&mut stream).take(asked as u64);
        while rest.read(&mut chunk)? > 0 {}
        while left > 0 {
            let part = chunk.get(..left.min(CHUNK)).unwrap_or_default();
            stream.write_all(part)?;
            left -= part.len();
        }
    }
    Ok(())
}

/// Reads a question's head. Returns how many bytes of the question are still to come, and the
/// length of its answer; `None` at the end of the stream.
fn head(stream: &mut UnixStream, chunk: &mut [u8]) -> io::Result<Option<[usize; 2]>> {
    let mut taken = 0;
    while taken < HEAD {
        match stream.read(chunk.get_mut(taken..).unwrap_or_default())? {
            0 => return Ok(None),
            count => taken += count,
        }
    }
    let mut numbers = chunk.chunks_exact(4).map(|bytes| {
        let bytes = bytes.try_into().unwrap_or_default();
        u32::from_le_bytes(bytes) as usize
    });
    let (asked, answered) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    Ok(Some([asked.saturating_sub(taken), answered]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn questions_and_answers_of_every_size_keep_in_step() {
        let (here, there) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve(there));
        here.set_nonblocking(true).unwrap();
        let mut here = tokio::net::UnixStream::from_std(here).unwrap();
        let sizes = [8, 9, 64, 65_535, 65_536, 65_544, 65_545, 1 << 20];
        for asked in sizes {
            for answered in [1].into_iter().chain(sizes) {
                let exchange = Exchange { asked, answered };
                exchange.on(&mut here).await.unwrap();
            }
        }
        // Nothing is left over: the stream ends at once.
        here.shutdown().await.unwrap();
        assert_eq!(here.read(&mut [0; 1]).await.unwrap(), 0);
        server.join().unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_off_is_an_error() {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let mut here = tokio::net::UnixStream::from_std(here).unwrap();
        (&there).write_all(b"short").unwrap();
        there.shutdown(std::net::Shutdown::Write).unwrap();
        let exchange = Exchange {
            asked: 64,
            answered: 64,
        };
        let error = exchange.on(&mut here).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
