//! The device's state in a snapshot. The guest's end of every connection is in guest memory and is
//! restored with it; the host needs this state to end those connections, or to continue the durable
//! ones.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::muxer::{
    HOST_PORTS, MAX_CONNECTIONS, MAX_REFUSALS, NARROW_WINDOW, WIDE_CONNECTIONS, WIDE_WINDOW,
};

/// Context ids that a guest can have.
const GUEST_CIDS: std::ops::Range<u64> = 3..0xFFFF_FFFF;

/// Why a saved device state cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not a context id that a guest can have.
    #[error("saved vsock state: {0} is not a guest's context id")]
    Cid(u64),
    /// Not a port that the host opens connections from.
    #[error("saved vsock state: {0} is not a host port")]
    Port(u32),
    /// More connections than a device can have.
    #[error("saved vsock state: {0} connections are too many")]
    TooMany(usize),
    /// Two connections with the same ports.
    #[error("saved vsock state: connection {host}:{guest} is there twice")]
    Twice {
        /// Host port.
        host: u32,
        /// Guest port.
        guest: u32,
    },
    /// A window size that no connection gets.
    #[error("saved vsock state: no connection has a window of {0} bytes")]
    Window(u32),
    /// Counters that no connection can reach.
    #[error("saved vsock state: connection {host}:{guest} has impossible counters")]
    Credit {
        /// Host port.
        host: u32,
        /// Guest port.
        guest: u32,
    },
}

/// The counters from which a quiescent connection continues after a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditState {
    /// Bytes that the host may buffer.
    pub window: u32,
    /// Bytes received from the guest, all consumed.
    pub consumed: u32,
    /// `consumed` as last announced to the guest.
    pub announced: u32,
    /// Bytes sent to the guest.
    pub sent: u32,
    /// Size of the guest's buffer.
    pub allocated: u32,
    /// Bytes that the guest said it consumed.
    pub forwarded: u32,
}

/// The outcome of a restore for the guest's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreOutcome {
    /// It continues from these counters.
    Durable(CreditState),
    /// It is reset, by a packet or, together with all others, by the transport's reset.
    Lost,
    /// It gets a reset packet in any case: the guest may still wait for the answer to its request,
    /// and a transport reset does not end that wait.
    Refused,
}

/// One connection that may exist for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnState {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Its outcome after a restore.
    pub outcome: RestoreOutcome,
}

/// The fields of a [`VsockState`], as a snapshot holds them: not validated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawVsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The host port of the next connection: never one that the guest may still know.
    pub next_port: u32,
    /// The guest has not yet acted on the transport reset of an earlier restore.
    pub reset_pending: bool,
    /// Connections, in any order.
    pub conns: Vec<ConnState>,
}

/// A validated state; see [`VsockDevice::save`](super::VsockDevice::save).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawVsockState", into = "RawVsockState")]
pub struct VsockState(RawVsockState);

impl TryFrom<RawVsockState> for VsockState {
    type Error = StateError;

    fn try_from(raw: RawVsockState) -> Result<Self, StateError> {
        if !GUEST_CIDS.contains(&raw.guest_cid) {
            return Err(StateError::Cid(raw.guest_cid));
        }
        if !HOST_PORTS.contains(&raw.next_port) {
            return Err(StateError::Port(raw.next_port));
        }
        if raw.conns.len() > MAX_CONNECTIONS + MAX_REFUSALS {
            return Err(StateError::TooMany(raw.conns.len()));
        }
        let mut seen = HashSet::new();
        let mut wide = 0;
        for conn in &raw.conns {
            let (host, guest) = (conn.host_port, conn.guest_port);
            if !seen.insert((host, guest)) {
                return Err(StateError::Twice { host, guest });
            }
            let RestoreOutcome::Durable(credit) = conn.outcome else {
                continue;
            };
            match credit.window {
                NARROW_WINDOW => {}
                WIDE_WINDOW if wide < WIDE_CONNECTIONS => wide += 1,
                other => return Err(StateError::Window(other)),
            }
            if credit.consumed.wrapping_sub(credit.announced) > credit.window {
                return Err(StateError::Credit { host, guest });
            }
        }
        Ok(Self(raw))
    }
}

impl From<VsockState> for RawVsockState {
    fn from(state: VsockState) -> Self {
        state.0
    }
}

impl VsockState {
    /// The state of a live device, which is valid by construction.
    pub(super) fn of_live(raw: RawVsockState) -> Self {
        Self(raw)
    }

    /// The guest's context id.
    #[must_use]
    pub fn guest_cid(&self) -> u64 {
        self.0.guest_cid
    }

    pub(super) fn next_port(&self) -> u32 {
        self.0.next_port
    }

    /// The connections.
    #[must_use]
    pub fn conns(&self) -> &[ConnState] {
        &self.0.conns
    }

    /// Whether one transport reset event ends all connections that the guest lost: if there are any
    /// (or the reset of an earlier restore is pending) and no connection survives, which the event
    /// would end too.
    pub(super) fn resets_transport(&self) -> bool {
        let any =
            |test: fn(&RestoreOutcome) -> bool| self.0.conns.iter().any(|conn| test(&conn.outcome));
        let lost = self.0.reset_pending || any(|outcome| *outcome == RestoreOutcome::Lost);
        lost && !any(|outcome| matches!(outcome, RestoreOutcome::Durable(_)))
    }
}
