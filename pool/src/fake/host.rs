//! A host whose memory is scripted.

use std::sync::{Arc, Mutex, PoisonError};

use crate::host::Host;

/// A host whose memory figures are set by a test.
#[derive(Debug, Clone, Default)]
pub struct FakeHost {
    available_mib: Option<u64>,
    stall_percent: Arc<Mutex<f64>>,
}

impl FakeHost {
    /// A host with this much memory available; none: unknown.
    #[must_use]
    pub fn new(available_mib: Option<u64>) -> Self {
        Self {
            available_mib,
            ..Self::default()
        }
    }

    /// Sets the memory stall.
    pub fn stall(&self, percent: f64) {
        *self
            .stall_percent
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = percent;
    }
}

impl Host for FakeHost {
    fn memory_available_mib(&self) -> Option<u64> {
        self.available_mib
    }

    fn memory_stall_percent(&self) -> Option<f64> {
        Some(
            *self
                .stall_percent
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}
