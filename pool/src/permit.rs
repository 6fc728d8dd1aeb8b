//! Admission: limits on the host resources that all profiles take together.
//!
//! A [`Reservation`] covers the number of VMs, vCPUs and memory in one step. It is made before a
//! boot begins and lives as long as the VM does, also outside of the pool.

use std::sync::{Arc, Mutex, PoisonError};

use crate::profile::Demand;

/// Upper bounds on all existing VMs, parked ones included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// VMs.
    pub vms: usize,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// Resources in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// VMs.
    pub vms: usize,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// The limit that would be exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denial {
    /// The limit on the number of VMs.
    #[error("limits.vms = {0} are alive; raise it or make pools smaller")]
    Vms(usize),
    /// The limit on vCPUs.
    #[error("limits.vcpus = {0} would be exceeded; raise it or make pools smaller")]
    Vcpus(u64),
    /// The limit on guest memory, in MiB.
    #[error(
        "{0} MiB of guest memory would be exceeded; raise limits.memory_mib or \
         limits.memory_overcommit_percent, or make pools smaller"
    )]
    Memory(u64),
}

impl Usage {
    /// Returns the usage with `vms` more VMs, each of which takes `demand`.
    pub(crate) fn plus(self, vms: usize, demand: Demand) -> Self {
        let many = u64::try_from(vms).unwrap_or(u64::MAX);
        let vcpus = many.saturating_mul(demand.vcpus.into());
        let memory_mib = many.saturating_mul(demand.memory_mib);
        Self {
            vms: self.vms.saturating_add(vms),
            vcpus: self.vcpus.saturating_add(vcpus),
            memory_mib: self.memory_mib.saturating_add(memory_mib),
        }
    }
}

impl Limits {
    /// Returns `usage`, or the limit that it exceeds.
    pub(crate) fn admit(self, usage: Usage) -> Result<Usage, Denial> {
        if usage.vms > self.vms {
            Err(Denial::Vms(self.vms))
        } else if usage.vcpus > self.vcpus {
            Err(Denial::Vcpus(self.vcpus))
        } else if usage.memory_mib > self.memory_mib {
            Err(Denial::Memory(self.memory_mib))
        } else {
            Ok(usage)
        }
    }
}

/// The resource account of one pool. Its lock is taken last, and no code outside of this module
/// runs under it.
pub(crate) struct Admission {
    limits: Limits,
    usage: Mutex<Usage>,
    freed: Box<dyn Fn() + Send + Sync>,
}

impl Admission {
    /// `freed` is called after each release; it must not block.
    pub(crate) fn new(limits: Limits, freed: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            limits,
            usage: Mutex::default(),
            freed: Box::new(freed),
        })
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn usage(&self) -> Usage {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reserve(self: &Arc<Self>, demand: Demand) -> Result<Reservation, Denial> {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        *usage = self.limits.admit(usage.plus(1, demand))?;
        Ok(Reservation {
            admission: Arc::clone(self),
            demand,
        })
    }
}

/// One VM's share of the limits, given back when dropped.
///
/// [`crate::Lease::into_inner`] returns it with the VM: keep it as long as the VM.
#[must_use = "dropping it gives the VM's share of the limits back"]
pub struct Reservation {
    admission: Arc<Admission>,
    demand: Demand,
}

impl Reservation {
    /// The resources that it covers.
    #[must_use]
    pub fn demand(&self) -> Demand {
        self.demand
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reservation").field(&self.demand).finish()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        {
            let mut usage = self
                .admission
                .usage
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            usage.vms = usage.vms.saturating_sub(1);
            usage.vcpus = usage.vcpus.saturating_sub(self.demand.vcpus.into());
            usage.memory_mib = usage.memory_mib.saturating_sub(self.demand.memory_mib);
        }
        (self.admission.freed)();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_three_are_reserved_together_or_not_at_all_and_come_back_on_drop() {
        let freed = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&freed);
        let limits = Limits {
            vms: 3,
            vcpus: 4,
            memory_mib: 1000,
        };
        let admission = Admission::new(limits, move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let small = Demand {
            vcpus: 1,
            memory_mib: 100,
        };
        let first = admission.reserve(small).unwrap();
        assert_eq!(
            admission
                .reserve(Demand {
                    vcpus: 4,
                    memory_mib: 1
                })
                .unwrap_err(),
            Denial::Vcpus(4)
        );
        assert_eq!(
            admission
                .reserve(Demand {
                    vcpus: 1,
                    memory_mib: 901
                })
                .unwrap_err(),
            Denial::Memory(1000)
        );
        assert_eq!(
            admission.usage(),
            Usage {
                vms: 1,
                vcpus: 1,
                memory_mib: 100
            }
        );
        let rest = [
            admission.reserve(small).unwrap(),
            admission.reserve(small).unwrap(),
        ];
        assert_eq!(admission.reserve(small).unwrap_err(), Denial::Vms(3));
        drop((first, rest));
        assert_eq!(admission.usage(), Usage::default());
        assert_eq!(freed.load(Ordering::SeqCst), 3);
    }
}
