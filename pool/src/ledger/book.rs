//! The ledger's record of one profile.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tokio::time::Instant;

use super::autoscale::{Scale, ScaleRules};
use super::breaker::{Breaker, BreakerRules};
use super::event::Shortage;
use super::{Origin, Stage, TicketId, WaiterId};
use crate::policy;
use crate::slot::VmId;

/// The rules of one profile.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rules {
    /// VMs to keep warm.
    pub size: usize,
    /// Boots at a time, in percent of the size.
    pub boots_percent: u32,
    /// Whether the loop refills by itself.
    pub refill: bool,
    /// Backoff and breaker.
    pub breaker: BreakerRules,
    /// Bounds of autoscaling; none: the size is fixed.
    pub scale: Option<ScaleRules>,
    /// Seed of the jitter that keeps this profile's retries apart from another's.
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Book {
    pub(super) size: usize,
    pub(super) boots_percent: u32,
    pub(super) refill: bool,
    pub(super) draining: bool,
    /// The host's limits refused a boot; set until capacity is freed.
    pub(super) denied: bool,
    /// Longest parked, or longest since its last check, first.
    pub(super) ready: VecDeque<VmId>,
    pub(super) checking: BTreeMap<VmId, u64>,
    pub(super) booting: BTreeMap<VmId, Origin>,
    /// Cancelled boots that have not ended yet: they hold their permit.
    pub(super) cancelling: usize,
    pub(super) leased: usize,
    pub(super) retiring: usize,
    /// VMs in any state.
    pub(super) vms: usize,
    /// In order of arrival.
    pub(super) waiters: BTreeSet<WaiterId>,
    pub(super) tickets: VecDeque<TicketId>,
    pub(super) breaker: Breaker,
    pub(super) scale: Option<Scale>,
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) boots: u64,
    pub(super) boot_failures: u64,
}

impl Book {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            size: rules.size,
            boots_percent: rules.boots_percent,
            refill: rules.refill,
            draining: false,
            denied: false,
            ready: VecDeque::new(),
            checking: BTreeMap::new(),
            booting: BTreeMap::new(),
            cancelling: 0,
            leased: 0,
            retiring: 0,
            vms: 0,
            waiters: BTreeSet::new(),
            tickets: VecDeque::new(),
            breaker: Breaker::new(rules.breaker, rules.seed),
            scale: rules.scale.map(Scale::new),
            hits: 0,
            misses: 0,
            boots: 0,
            boot_failures: 0,
        }
    }

    pub(super) fn target(&self) -> usize {
        if self.draining { 0 } else { self.size }
    }

    pub(super) fn parked(&self) -> usize {
        self.ready.len() + self.checking.len()
    }

    /// VMs that are parked or booting; never more than the target.
    pub(super) fn occupied(&self) -> usize {
        self.parked() + self.booting.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.occupied() < self.target()
    }

    pub(super) fn permits(&self) -> usize {
        policy::concurrent_boots(self.size, self.boots_percent)
    }

    /// The permits for requested boots, which do not wait for a backoff: one while the breaker is
    /// open.
    pub(super) fn permits_by_hand(&self) -> usize {
        let permits = self.permits();
        if self.breaker.is_open() {
            permits.min(1)
        } else {
            permits
        }
    }

    /// Boots that hold a permit; an offered VM needs none.
    pub(super) fn boots_running(&self) -> usize {
        let booting = self
            .booting
            .values()
            .filter(|origin| origin.holds_permit())
            .count();
        booting + self.cancelling
    }

    /// Whether the loop may begin a boot now.
    pub(super) fn may_refill(&self, now: Instant) -> bool {
        self.refill
            && !self.denied
            && self.has_room()
            && self.boots_running() < self.breaker.permits(now, self.permits())
    }

    /// Whether more callers wait than VMs are booting.
    pub(super) fn is_owed(&self) -> bool {
        self.waiters.len() > self.booting.len()
    }

    /// The VM to hand out next: the ready one that was checked last, else one under check.
    pub(super) fn best(&self) -> Option<VmId> {
        self.ready
            .back()
            .copied()
            .or_else(|| self.checking.keys().next_back().copied())
    }

    pub(super) fn join(&mut self, id: VmId, stage: Stage) {
        self.vms += 1;
        match stage {
            Stage::Booting {
                cancelled: true,
                origin,
            } => {
                self.cancelling += usize::from(origin.holds_permit());
            }
            Stage::Booting {
                cancelled: false,
                origin,
            } => {
                self.booting.insert(id, origin);
            }
            Stage::Ready => self.ready.push_back(id),
            Stage::Checking { check, .. } => {
                self.checking.insert(id, check);
            }
            Stage::Leased(_) => self.leased += 1,
            Stage::Retiring => self.retiring += 1,
        }
        self.watch_stock();
    }

    pub(super) fn leave(&mut self, id: VmId, stage: Stage) {
        self.vms -= 1;
        match stage {
            Stage::Booting {
                cancelled: true,
                origin,
            } => {
                self.cancelling -= usize::from(origin.holds_permit());
            }
            Stage::Booting {
                cancelled: false, ..
            } => {
                self.booting.remove(&id);
            }
            Stage::Ready => {
                // Callers take the last VM, checks and shrinking the first.
                if self.ready.back() == Some(&id) {
                    self.ready.pop_back();
                } else if self.ready.front() == Some(&id) {
                    self.ready.pop_front();
                } else {
                    self.ready.retain(|other| *other != id);
                }
            }
            Stage::Checking { .. } => {
                self.checking.remove(&id);
            }
            Stage::Leased(_) => self.leased -= 1,
            Stage::Retiring => self.retiring -= 1,
        }
    }

    fn watch_stock(&mut self) {
        let parked = self.parked();
        if let Some(scale) = &mut self.scale {
            scale.saw_ready(parked);
        }
    }

    /// Why no VM is ready. Of several reasons, returns the one that lasts longest.
    pub(super) fn shortage(&self, now: Instant, pressed: bool) -> Shortage {
        let waits = self.breaker.waits_until(now).is_some();
        let booting = self.booting.len();
        if self.size == 0 {
            Shortage::NoSize
        } else if self.breaker.is_open() && waits {
            Shortage::BreakerOpen(self.breaker.failures())
        } else if booting > 0 {
            Shortage::Booting(booting)
        } else if self.denied {
            Shortage::HostLimits
        } else if !self.refill {
            Shortage::RefillOff
        } else if waits {
            Shortage::BackingOff(self.breaker.failures())
        } else if pressed {
            Shortage::MemoryPressure
        } else {
            Shortage::Empty
        }
    }
}
