//! Panics of the fake backend, at calls that a test chooses.

use std::collections::HashSet;

/// The call in which the fake backend panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// [`Backend::remote`](crate::Backend::remote).
    Remote,
    /// [`Backend::ended`](crate::Backend::ended).
    Ended,
    /// [`Backend::alive`](crate::Backend::alive).
    Alive,
    /// [`Backend::pause`](crate::Backend::pause).
    Pause,
    /// [`Backend::resume`](crate::Backend::resume).
    Resume,
    /// [`Backend::private_bytes`](crate::Backend::private_bytes).
    PrivateBytes,
    /// [`Backend::retire`](crate::Backend::retire).
    Retire,
    /// [`Backend::settled`](crate::Backend::settled).
    Settled,
    /// The future of [`Backend::ended`](crate::Backend::ended).
    Watch,
}

/// The methods whose next call panics.
#[derive(Default)]
pub(super) struct Faults(HashSet<Method>);

impl Faults {
    pub(super) fn arm(&mut self, method: Method) {
        self.0.insert(method);
    }

    pub(super) fn disarm(&mut self, method: Method) -> bool {
        self.0.remove(&method)
    }
}
