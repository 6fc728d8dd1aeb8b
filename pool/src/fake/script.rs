//! What a fake backend and its VMs can be told to do.

use std::time::Duration;

use super::Gate;

/// How one boot goes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Boot {
    /// At once.
    Fine,
    /// After so long.
    After(Duration),
    /// As soon as the gate lets it through.
    Gate(Gate),
    /// It fails.
    Fail(&'static str),
    /// It fails after so long.
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
    /// Answered after so long.
    After(Duration),
    /// Answered as soon as the gate lets it through.
    Gate(Gate),
    /// Lost at once.
    Lost,
    /// Never answered.
    Silence,
    /// Answered in a way that no healthy guest answers.
    Wrong(&'static str),
    /// The VM ends while it is asked.
    Dies,
    /// The backend panics.
    Panic,
}
