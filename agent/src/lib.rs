//! The guest side of Hearth: the wire protocol ([`proto`]), the host's client ([`client`]), and PID
//! 1 of the guest (the binary `hearth-init`).
//!
//! ```no_run
//! # #[cfg(feature = "client")]
//! # async fn example<S>(stream: S) -> Result<(), Box<dyn std::error::Error>>
//! # where S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send {
//! use hearth_agent::client::{AgentClient, Command, OutputLimits};
//!
//! let mut agent = AgentClient::handshake(stream).await?;
//! println!("up for {:?}", agent.ping(1).await?.uptime);
//! let exec = agent.exec(Command::new("uname").arg("-r")).await?;
//! let output = exec.output(OutputLimits::default()).await?;
//! println!("{}: {}", output.status, String::from_utf8_lossy(&output.stdout));
//! # Ok(())
//! # }
//! ```
//!
//! Deliberately absent: nothing here opens a host file, a socket or a VM (the caller provides the
//! stream), no task is spawned, and neither side trusts a size that the other sent.

#![cfg_attr(not(feature = "client"), no_std)]

extern crate alloc;

#[cfg(feature = "client")]
pub mod client;
pub mod proto;

#[cfg(feature = "client")]
pub use client::{AgentClient, Command, Exec};
pub use proto::ExitStatus;
