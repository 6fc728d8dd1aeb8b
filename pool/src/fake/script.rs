//! Scripted behaviour of a fake backend and its VMs.

use std::time::Duration;

use super::Gate;

/// How one boot goes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Boot {
    /// It succeeds at once.
    Fine,
    /// It succeeds after this time.
    After(Duration),
    /// It succeeds as soon as the gate lets it through.
    Gate(Gate),
    /// It fails.
    Fail(&'static str),
    /// It fails after this time.
    FailAfter(Duration, &'static str),
    /// It never ends.
    Hang,
    /// The backend panics.
    Panic,
    /// It yields a VM that has ended already.
    Dead,
    /// It yields a VM that answers nothing.
    Frozen,
}

/// How one ping goes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Ping {
    /// Answered.
    Pong,
    /// Answered after this time.
    After(Duration),
    /// Answered as soon as the gate lets it through.
    Gate(Gate),
    /// Lost at once.
    Lost,
    /// Never answered.
    Silence,
    /// Answered wrongly, as no healthy guest does.
    Wrong(&'static str),
    /// The VM ends during the probe.
    Dies,
    /// The backend panics.
    Panic,
}
