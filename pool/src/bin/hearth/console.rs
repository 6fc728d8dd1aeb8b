//! Shows a guest's serial console while it prints.

use hearth_vmm::Console;
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// Copies the console until its end. The console keeps a bounded window; where a slow reader missed
/// bytes, a note says how many.
pub(crate) async fn show(
    console: &Console,
    mut to: impl AsyncWrite + Unpin,
) -> std::io::Result<()> {
    let mut at = 0;
    loop {
        let chunk = console.read(at).await;
        if chunk.missed > 0 {
            let note = format!("\n[{} bytes of console output lost]\n", chunk.missed);
            to.write_all(note.as_bytes()).await?;
        }
        to.write_all(&chunk.bytes).await?;
        to.flush().await?;
        at = chunk.next;
        if chunk.end {
            return Ok(());
        }
    }
}
