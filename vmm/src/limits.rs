//! Limits on a VM's use of its host, whatever its guest does. They are the host's policy: a clone
//! inherits them from its template, but they are never read from a stored template.

/// See the module's documentation.
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
