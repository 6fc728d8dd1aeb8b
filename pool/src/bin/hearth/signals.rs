//! The signals by which a user asks a command to end.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Catches SIGINT, SIGTERM, SIGHUP and SIGQUIT. The handlers stay installed after it is dropped.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    /// Needs a tokio runtime with I/O enabled.
    pub(crate) fn catch() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// Returns the number of the next signal. Cancel-safe.
    pub(crate) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
            _ = self.quit.recv() => 3,
        }
    }
}

/// The exit code that a shell reports for a program that was ended by this signal.
pub(crate) fn exit_code(signal: u8) -> u8 {
    signal.saturating_add(128)
}
