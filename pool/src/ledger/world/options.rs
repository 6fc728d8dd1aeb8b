//! The steps that may happen next.

use std::time::Duration;

use super::{Among, Event, PassId, Phase, Place, ProfileId, Step, TicketId, WaiterId, World};

impl World {
    /// All steps that may happen now, including those that callers decide on.
    pub(in super::super) fn options(&self) -> Vec<Step> {
        let mut events = Vec::new();
        let mut steps = vec![Step::Sleep];
        if self.nudged {
            steps.push(Step::Act);
        }
        for profile in (0..self.profiles).map(ProfileId) {
            steps.push(Step::Take(profile));
            if self.bursts {
                steps.push(Step::TakeMany(profile, 2));
            }
            if self.waiters.len() < 2 {
                let waiter = WaiterId(self.next);
                steps.push(Step::Wait(waiter, Among(profile, None)));
                let next = ProfileId(profile.0 + 1);
                if next.0 < self.profiles {
                    steps.push(Step::Wait(waiter, Among(profile, Some(next))));
                }
            }
            if self.tickets.len() < 2 {
                events.push(Event::Replenish(profile, TicketId(self.next)));
                events.push(Event::Offer(profile, TicketId(self.next)));
            }
            events.push(Event::BeginCheck(profile, 1, PassId(1)));
            events.extend((0..=2).map(|size| Event::Resize(profile, size)));
            events.push(Event::Drain(profile));
            events.push(Event::Undrain(profile));
        }
        events.extend(self.waiters.keys().map(|waiter| Event::Leave(*waiter)));
        events.extend(self.tickets.iter().map(|ticket| Event::Forget(*ticket)));
        for (id, (_, place)) in &self.vms {
            let id = *id;
            match place {
                Place::Booting { .. } => events.extend([
                    Event::Booted(id),
                    Event::BootFailed(id, false),
                    Event::BootFailed(id, true),
                    Event::Denied(id),
                ]),
                Place::Joining { .. } => events.extend([
                    Event::Booted(id),
                    Event::BootFailed(id, false),
                    Event::BootFailed(id, true),
                ]),
                Place::Unmade => {}
                Place::Slot => events.push(Event::Ended(id)),
                Place::Lease { waiter } => {
                    events.extend([Event::Returned(id), Event::Withdrawn(id), Event::Ended(id)]);
                    if let Some((waiter, among)) = *waiter {
                        events.push(Event::Untouched(id));
                        if self.spent.contains(&id) {
                            steps.push(Step::Wait(waiter, among));
                        }
                    }
                }
                Place::Retiring => events.push(Event::Retired(id)),
            }
        }
        for (id, check) in &self.verdicts {
            events.push(Event::Checked(*id, *check, true));
            events.push(Event::Checked(*id, *check, false));
        }
        events.extend(self.kills.iter().map(|id| Event::Killed(*id)));
        for id in &self.asked {
            events.extend([Event::Active(*id), Event::Idle(*id)]);
        }
        events.extend([Event::AbandonPass(PassId(1)), Event::CapacityFreed]);
        events.extend([Event::Pressure(true), Event::Pressure(false)]);
        match self.ledger.phase() {
            Phase::Stopped => events.push(Event::Start),
            Phase::Starting => events.push(Event::Run),
            Phase::Running | Phase::Stopping => {}
        }
        events.push(Event::Stop(self.now + Duration::from_secs(5)));
        steps.extend(events.into_iter().map(Step::Tell));
        steps
    }
}
