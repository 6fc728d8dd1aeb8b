//! What a VM may use of its host, whatever its guest does. The host's policy: a clone inherits it
//! from its template, but nothing that is stored ever decides it.

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Whether the threads that run the guest and its devices are confined (see
    /// [`crate::seccomp`]).
    pub(crate) seccomp: bool,
    /// Percent of one processor that all vCPUs together may use.
    pub(crate) cpu_percent: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            seccomp: true,
            cpu_percent: None,
        }
    }
}
