//! Collects a program's output up to a limit.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    Exec,
    error::ExecError,
    exec::{ExecOutput, ExecStdin},
};
use crate::proto::{ExitStatus, Exited, MAX_CHUNK, OutputEnd, Usage};

/// How much output is kept. The rest is read and counted, so that the program does not block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputLimits {
    /// Bytes of stdout.
    pub stdout_bytes: usize,
    /// Bytes of stderr.
    pub stderr_bytes: usize,
}

impl Default for OutputLimits {
    /// 16 MiB each.
    fn default() -> Self {
        Self {
            stdout_bytes: 16 << 20,
            stderr_bytes: 16 << 20,
        }
    }
}

/// A program's end and its output.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Whether its timeout ended it.
    pub timed_out: bool,
    /// Whether the guest read its output to the end.
    pub end: OutputEnd,
    /// The resources it used.
    pub usage: Usage,
    /// The first bytes of stdout, up to the limit.
    pub stdout: Vec<u8>,
    /// Bytes of stdout beyond the limit.
    pub stdout_cut: u64,
    /// The first bytes of stderr, up to the limit.
    pub stderr: Vec<u8>,
    /// Bytes of stderr beyond the limit.
    pub stderr_cut: u64,
}

pub(super) async fn collect<S: AsyncRead + AsyncWrite + Unpin + Send>(
    mut exec: Exec<S>,
    input: &[u8],
    limits: OutputLimits,
) -> Result<Output, ExecError> {
    let (stdin, stdout, stderr) = (exec.stdin(), exec.stdout(), exec.stderr());
    // Failures of the streams are ignored: `ended` reports them, with the way the program ended.
    let ((), (stdout, stdout_cut), (stderr, stderr_cut), ended) = tokio::join!(
        feed(stdin, input),
        keep(stdout, limits.stdout_bytes),
        keep(stderr, limits.stderr_bytes),
        async {
            let ended = exec.ended().await;
            // No more output will be taken from the guest: dropping this ends streams that are
            // still open.
            drop(exec);
            ended
        },
    );
    let Exited {
        status,
        timed_out,
        output: end,
        usage,
    } = ended?;
    Ok(Output {
        status,
        timed_out,
        end,
        usage,
        stdout,
        stdout_cut,
        stderr,
        stderr_cut,
    })
}

async fn feed<S: AsyncRead + AsyncWrite + Unpin + Send>(stdin: Option<ExecStdin<S>>, input: &[u8]) {
    if let Some(mut stdin) = stdin
        && stdin.write_all(input).await.is_ok()
    {
        let _ = stdin.shutdown().await;
    }
}

/// Reads to the end, keeps the first bytes and counts the rest.
async fn keep<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: Option<ExecOutput<S>>,
    limit: usize,
) -> (Vec<u8>, u64) {
    let (mut kept, mut cut) = (Vec::new(), 0_u64);
    let Some(mut stream) = stream else {
        return (kept, cut);
    };
    let mut chunk = vec![0; MAX_CHUNK];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        let room = limit.saturating_sub(kept.len()).min(count);
        let (keep, rest) = chunk.get(..count).unwrap_or_default().split_at(room);
        kept.extend_from_slice(keep);
        cut = cut.saturating_add(rest.len() as u64);
    }
    (kept, cut)
}
