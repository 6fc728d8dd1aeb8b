//! What the tasks report: how boots and checks went, and leases that come home.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Actor, Verdict};
use crate::backend::{Backend, Making};
use crate::boot::Failed;
use crate::error::{BootFailure, OfferRefusal};
use crate::event::EventKind;
use crate::guard::guarded;
use crate::ledger::{Event, PassId, ProfileId};
use crate::shared::State;
use crate::slot::{Slot, VmId};
use crate::tasks::Doomed;

impl<B: Backend> Actor<B> {
    pub(super) fn booted(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        id: VmId,
        (how, began): (Making, Instant),
        result: Result<B::Vm, Failed<B>>,
    ) {
        let Some(slot) = state.slots.get_mut(&id) else {
            // The ledger keeps the slot of a boot until it is answered; do not lose the VM if not.
            if let Some(vm) = result.map_or_else(|failed| failed.vm, Some) {
                self.destroy(Doomed::Stray(Some(id)), vm, None);
            }
            return;
        };
        let profile = slot.profile;
        slot.job = None;
        if !state.ledger.is_booting(id) {
            // It was given up, however it went.
            let (Ok(vm) | Err(Failed { vm, .. })) = result.map(Some);
            let has_vm = vm.is_some();
            slot.vm = vm;
            state.tell(now, Event::BootFailed(id, has_vm));
            return self.perform(state, now);
        }
        let result = result.and_then(|vm| self.take_up(slot, vm));
        match result {
            Ok(()) => {
                let took = began.elapsed();
                if let Some(kept) = self.shared.profile(profile) {
                    kept.metrics.made(how, took);
                }
                tracing::debug!(vm = %id, ?how, ?took, "made");
                self.shared
                    .emit(Some(profile), Some(id), EventKind::Ready(took));
                state.tell(now, Event::Booted(id));
            }
            Err(Failed { why, kind, vm }) => {
                let has_vm = vm.is_some();
                slot.vm = vm;
                if let Some(kept) = self.shared.profile(profile) {
                    kept.metrics.boot_failed(&why, kind);
                }
                self.note_failure(state, profile, id, &why);
                self.failure = Some(why);
                state.tell(now, Event::BootFailed(id, has_vm));
                self.perform(state, now);
            }
        }
    }

    /// A fresh VM moves into its slot.
    fn take_up(&self, slot: &mut Slot<B>, vm: B::Vm) -> Result<(), Failed<B>> {
        let backend = &self.shared.backend;
        let Some(remote) = guarded("remote", || backend.remote(&vm)) else {
            let why = BootFailure::Panicked;
            let vm = Some(vm);
            return Err(Failed {
                why,
                kind: None,
                vm,
            });
        };
        let private = guarded("private_bytes", || backend.private_bytes(&vm)).flatten();
        if let Some(kept) = self.shared.profile(slot.profile)
            && let Some(kib) = private.and_then(|bytes| u32::try_from(bytes / 1024).ok())
        {
            // Exact to the KiB, up to 4 TiB.
            kept.metrics.private.record(f64::from(kib) * 1024.0);
        }
        slot.remote = Some(Arc::new(remote));
        slot.vm = Some(vm);
        Ok(())
    }

    /// Tells of breakers that opened or closed since the last time.
    pub(super) fn show_breakers(&mut self, state: &State<B>) {
        for (index, was_open) in self.breakers.iter_mut().enumerate() {
            let profile = ProfileId(index);
            let counts = state.ledger.counts(profile);
            if counts.breaker_open == *was_open {
                continue;
            }
            *was_open = counts.breaker_open;
            let kind = if counts.breaker_open {
                let failures = counts.failures_in_a_row;
                let profile = self.shared.profile_name(profile);
                tracing::error!(profile, failures, "boots keep failing: the breaker is open");
                EventKind::BreakerOpened(failures)
            } else {
                EventKind::BreakerClosed
            };
            self.shared.emit(Some(profile), None, kind);
        }
    }

    /// Tells if the profile's template could not be made, or could after all, since the last time.
    pub(super) fn show_template(&self, state: &mut State<B>, profile: ProfileId) {
        let (Some(kept), Some(last)) = (
            self.shared.profile(profile),
            state.no_template.get_mut(profile.0),
        ) else {
            return;
        };
        let backend = &self.shared.backend;
        let now = guarded("no_template", || backend.no_template(&kept.spec)).flatten();
        let (name, event) = (&*kept.name, |kind| {
            self.shared.emit(Some(profile), None, kind)
        });
        match (&*last, &now) {
            (None, None) => return,
            (Some(before), Some(now)) if Arc::ptr_eq(before, now) => return,
            (_, Some(error)) => {
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                tracing::warn!(profile = name, %error, cause, "no template: VMs boot from cold");
                kept.metrics.template_failures.increment(1);
                event(EventKind::TemplateFailed(Arc::clone(error)));
            }
            (Some(_), None) => {
                tracing::info!(profile = name, "a template was made after all");
                event(EventKind::TemplateMade);
            }
        }
        let without = f64::from(u8::from(now.is_some()));
        kept.metrics.without_template.set(without);
        *last = now;
    }

    pub(crate) fn note_failure(
        &self,
        state: &mut State<B>,
        profile: ProfileId,
        id: VmId,
        why: &BootFailure,
    ) {
        let cause = std::error::Error::source(why)
            .map(ToString::to_string)
            .unwrap_or_default();
        let name = self.shared.profile_name(profile);
        tracing::warn!(vm = %id, profile = name, error = %why, cause, "a boot failed");
        if let Some(last) = state.last_failure.get_mut(profile.0) {
            *last = Some(why.clone());
        }
        self.shared
            .emit(Some(profile), Some(id), EventKind::BootFailed(why.clone()));
    }

    pub(crate) fn joined(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        id: VmId,
        result: Result<(), OfferRefusal>,
    ) {
        let Some(slot) = state.slots.get_mut(&id) else {
            return;
        };
        slot.job = None;
        // It may have been given up after its check had passed.
        let wanted = state.ledger.is_booting(id);
        match result.and(wanted.then_some(()).ok_or(OfferRefusal::Full)) {
            Ok(()) => state.tell(now, Event::Booted(id)),
            Err(why) => {
                let owner = self.offers.values_mut().find(|offer| offer.id == Some(id));
                let back = owner.filter(|offer| !offer.reply.is_closed());
                let has_vm = match back {
                    // The one who offered it still wants it.
                    Some(offer) => {
                        offer.vm = slot.vm.take();
                        false
                    }
                    None => slot.vm.is_some(),
                };
                self.refusal = Some(why);
                state.tell(now, Event::BootFailed(id, has_vm));
                self.perform(state, now);
            }
        }
    }

    pub(super) fn checked(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        id: VmId,
        check: u64,
        pass: PassId,
        verdict: Verdict,
    ) {
        let current = state.ledger.is_checking(id, check);
        if current && let Some(slot) = state.slots.get_mut(&id) {
            slot.job = None;
            let kept = self.shared.profile(slot.profile);
            match &verdict {
                Verdict::Healthy(took) => {
                    if let Some(kept) = kept {
                        kept.metrics.ping.record(*took);
                    }
                }
                Verdict::Unhealthy(error) => {
                    tracing::warn!(vm = %id, %error, "a parked VM is unhealthy");
                    if let Some(kept) = kept {
                        kept.metrics.unhealthy(error);
                    }
                    let kind = EventKind::Unhealthy(error.clone());
                    self.shared.emit(Some(slot.profile), Some(id), kind);
                }
                Verdict::Dropped => {}
            }
        }
        let healthy = matches!(verdict, Verdict::Healthy(_));
        state.tell(now, Event::Checked(id, check, healthy));
        if let Some(entry) = self.passes.get_mut(&pass) {
            entry.left = entry.left.saturating_sub(1);
            match verdict {
                Verdict::Healthy(_) if current => entry.report.healthy += 1,
                Verdict::Unhealthy(_) if current => entry.report.unhealthy += 1,
                _ => entry.report.dropped += 1,
            }
        }
        self.perform(state, now);
        self.settle_pass(pass);
    }
}
