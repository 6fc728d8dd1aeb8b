//! Results that tasks report to the actor: of boots, adoptions and checks.

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
            // A boot's slot is kept until its result arrives. If it is missing all the same, do not
            // lose the VM.
            if let Some(vm) = result.map_or_else(|failed| failed.vm, Some) {
                self.destroy(Doomed::Stray(Some(id)), vm, None);
            }
            return;
        };
        let profile = slot.profile;
        slot.job = None;
        if !state.ledger.is_booting(id) {
            // The boot was cancelled: its result no longer matters.
            let (Ok(vm) | Err(Failed { vm, .. })) = result.map(Some);
            let has_vm = vm.is_some();
            slot.vm = vm;
            state.tell(now, Event::BootFailed(id, has_vm));
            return self.perform(state, now);
        }
        let result = result.and_then(|vm| self.take_up(slot, vm));
        match result {
            Ok(private) => {
                let took = began.elapsed();
                self.shared.measure(state, profile, move |metrics| {
                    if let Some(kib) = private {
                        // Exact to the KiB, up to 4 TiB.
                        metrics.private.record(f64::from(kib) * 1024.0);
                    }
                    metrics.made(how, took);
                    tracing::debug!(vm = %id, ?how, ?took, "made");
                });
                let kind = EventKind::Ready(took);
                self.shared.emit_in(state, Some(profile), Some(id), kind);
                state.tell(now, Event::Booted(id));
            }
            Err(Failed { why, kind, vm }) => {
                let has_vm = vm.is_some();
                slot.vm = vm;
                let failure = why.clone();
                self.shared.measure(state, profile, move |metrics| {
                    metrics.boot_failed(&failure, kind);
                });
                self.note_failure(state, profile, id, &why);
                self.failure = Some(why);
                state.tell(now, Event::BootFailed(id, has_vm));
                self.perform(state, now);
            }
        }
    }

    /// Moves a fresh VM into its slot. Returns how many KiB of memory it does not share, if that is
    /// known.
    fn take_up(&self, slot: &mut Slot<B>, vm: B::Vm) -> Result<Option<u32>, Failed<B>> {
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
        slot.remote = Some(Arc::new(remote));
        slot.vm = Some(vm);
        Ok(private.and_then(|bytes| u32::try_from(bytes / 1024).ok()))
    }

    /// Reports breakers that opened or closed since the last call.
    pub(super) fn show_breakers(&mut self, state: &mut State<B>) {
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
                state.later(move || {
                    tracing::error!(profile, failures, "boots keep failing: the breaker is open");
                });
                EventKind::BreakerOpened(failures)
            } else {
                EventKind::BreakerClosed
            };
            self.shared.emit_in(state, Some(profile), None, kind);
        }
    }

    /// Reports if the profile's template could not be made, or was made by a retry, since the last
    /// call.
    pub(super) fn show_template(&self, state: &mut State<B>, profile: ProfileId) {
        let (Some(kept), Some(last)) = (
            self.shared.profile(profile),
            state.no_template.get_mut(profile.0),
        ) else {
            return;
        };
        let backend = &self.shared.backend;
        let now = guarded("no_template", || backend.no_template(&kept.spec)).flatten();
        let kind = match (&*last, &now) {
            (None, None) => return,
            (Some(before), Some(now)) if Arc::ptr_eq(before, now) => return,
            (_, Some(error)) => EventKind::TemplateFailed(Arc::clone(error)),
            (Some(_), None) => EventKind::TemplateMade,
        };
        last.clone_from(&now);
        let name = Arc::clone(&kept.name);
        self.shared.measure(state, profile, move |metrics| {
            metrics
                .without_template
                .set(f64::from(u8::from(now.is_some())));
            let Some(error) = now else {
                return tracing::info!(profile = &*name, "a template was made after all");
            };
            metrics.template_failures.increment(1);
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(profile = &*name, %error, cause, "no template: VMs boot from cold");
        });
        self.shared.emit_in(state, Some(profile), None, kind);
    }

    pub(crate) fn note_failure(
        &self,
        state: &mut State<B>,
        profile: ProfileId,
        id: VmId,
        why: &BootFailure,
    ) {
        let (name, error) = (self.shared.profile_name(profile), why.clone());
        state.later(move || {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let cause = cause.unwrap_or_default();
            tracing::warn!(vm = %id, profile = name, %error, cause, "a boot failed");
        });
        if let Some(last) = state.last_failure.get_mut(profile.0) {
            *last = Some(why.clone());
        }
        let kind = EventKind::BootFailed(why.clone());
        self.shared.emit_in(state, Some(profile), Some(id), kind);
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
        // The adoption may have been cancelled after the check had passed.
        let wanted = state.ledger.is_booting(id);
        match result.and(wanted.then_some(()).ok_or(OfferRefusal::Full)) {
            Ok(()) => state.tell(now, Event::Booted(id)),
            Err(why) => {
                let owner = self.offers.values_mut().find(|offer| offer.id == Some(id));
                let back = owner.filter(|offer| !offer.reply.is_closed());
                let has_vm = match back {
                    // The caller that offered the VM still waits for it.
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
            let profile = slot.profile;
            match &verdict {
                Verdict::Healthy(took) => {
                    let took = *took;
                    self.shared
                        .measure(state, profile, move |metrics| metrics.ping.record(took));
                }
                Verdict::Unhealthy(error) => {
                    let why = error.clone();
                    self.shared.measure(state, profile, move |metrics| {
                        tracing::warn!(vm = %id, error = %why, "a parked VM is unhealthy");
                        metrics.unhealthy(&why);
                    });
                    let kind = EventKind::Unhealthy(error.clone());
                    self.shared.emit_in(state, Some(profile), Some(id), kind);
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
        self.settle_pass(state, pass);
    }
}
