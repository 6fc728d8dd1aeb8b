//! Requests for a boot, a check or an adoption, and the replies to them.

use tokio::sync::oneshot;

use super::{Actor, CheckReport, Message, OfferReply};
use crate::backend::Backend;
use crate::error::{BootFailure, OfferError, OfferRefusal, Replenished};
use crate::ledger::{Outcome, PassId, TicketId};
use crate::shared::State;
use crate::slot::VmId;
use crate::tasks::Doomed;

/// Outcome of one request for a boot.
pub(crate) struct Attempt {
    pub(crate) did: Replenished,
    /// The VM whose boot failed, if one did.
    pub(crate) failed: Option<VmId>,
}

impl Attempt {
    pub(crate) fn stopping() -> Self {
        Replenished::Failed(BootFailure::Stopping).into()
    }
}

impl From<Replenished> for Attempt {
    fn from(did: Replenished) -> Self {
        Self { did, failed: None }
    }
}

pub(super) struct Pass {
    pub(super) left: usize,
    pub(super) report: CheckReport,
    pub(super) reply: oneshot::Sender<CheckReport>,
}

pub(super) struct Offered<B: Backend> {
    pub(super) vm: Option<B::Vm>,
    pub(super) id: Option<VmId>,
    pub(super) reply: OfferReply<B>,
}

impl<B: Backend> Actor<B> {
    pub(crate) fn count_check(&mut self, pass: PassId) {
        if let Some(pass) = self.passes.get_mut(&pass) {
            pass.left += 1;
        }
    }

    pub(super) fn settle_pass(&mut self, state: &mut State<B>, id: PassId) {
        if self.passes.get(&id).is_some_and(|pass| pass.left == 0)
            && let Some(pass) = self.passes.remove(&id)
        {
            // The caller may have gone.
            state.later(move || {
                let _ = pass.reply.send(pass.report);
            });
        }
    }

    pub(crate) fn settle(&mut self, state: &mut State<B>, ticket: TicketId, outcome: Outcome) {
        if let Some(reply) = self.tickets.remove(&ticket) {
            let answer = match outcome {
                Outcome::Booted(id) => Replenished::Booted(id),
                Outcome::Full => Replenished::Full,
                Outcome::Failed(_) => {
                    Replenished::Failed(self.failure.clone().unwrap_or(BootFailure::Cancelled))
                }
                Outcome::Denied(_) => Replenished::Failed(
                    self.denial
                        .map_or(BootFailure::Cancelled, BootFailure::Denied),
                ),
                Outcome::BreakerOpen(failures) => {
                    Replenished::Failed(BootFailure::BreakerOpen(failures))
                }
                Outcome::Pressed => Replenished::Failed(BootFailure::MemoryPressure),
                Outcome::Stopping => Replenished::Failed(BootFailure::Stopping),
            };
            let failed = match outcome {
                Outcome::Failed(id) | Outcome::Denied(id) => Some(id),
                _ => None,
            };
            // The caller may have gone.
            let did = answer;
            state.later(move || drop(reply.send(Attempt { did, failed })));
        }
        let Some(offer) = self.offers.remove(&ticket) else {
            return;
        };
        let answer = match outcome {
            Outcome::Booted(id) => Ok(id),
            // An offer is not a boot: the breaker and the host's memory pressure do not apply to
            // it.
            Outcome::Full | Outcome::BreakerOpen(_) | Outcome::Pressed => Err(OfferRefusal::Full),
            Outcome::Stopping => Err(OfferRefusal::Stopping),
            Outcome::Failed(_) => Err(self.refusal.clone().unwrap_or(OfferRefusal::Full)),
            Outcome::Denied(_) => Err(self.denial.map_or(OfferRefusal::Full, OfferRefusal::Denied)),
        };
        let home = self.home.clone();
        state.later(move || {
            let Offered { vm, id, reply } = offer;
            let answer = answer.map_err(|why| OfferError { vm, why });
            // A VM that was adopted stays adopted even if the caller has gone.
            if let Err(Err(OfferError { vm: Some(vm), .. })) = reply.send(answer) {
                // If the actor has ended, the error returns the VM, which is dropped.
                let _ = home.send(Message::Stray(id, vm, None));
            }
        });
    }

    pub(crate) fn take_offered(&mut self, ticket: TicketId, id: VmId) -> Option<B::Vm> {
        let offer = self.offers.get_mut(&ticket)?;
        offer.id = Some(id);
        offer.vm.take()
    }

    /// Handles a message that arrives after the end: destroys orphans, refuses offers and requests
    /// for boots, and drops the rest.
    pub(super) fn receive_late(&mut self, message: Message<B>) {
        match message {
            Message::Stray(id, vm, done) => self.destroy(Doomed::Stray(id), vm, done),
            Message::Offer(.., vm, reply) => {
                let refusal = OfferError {
                    vm: Some(vm),
                    why: OfferRefusal::Stopping,
                };
                if let Err(Err(OfferError { vm: Some(vm), .. })) = reply.send(Err(refusal)) {
                    self.destroy(Doomed::Stray(None), vm, None);
                }
            }
            Message::Replenish(.., reply) => {
                // The caller may have gone.
                let _ = reply.send(Attempt::stopping());
            }
            _ => {}
        }
    }
}
