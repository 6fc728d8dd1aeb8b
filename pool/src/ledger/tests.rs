//! The ledger against its invariants: every interleaving of small cases, and random long ones.

use std::collections::HashSet;

use proptest::prelude::*;

use super::ProfileId;
use super::world::{Case, Step, World};

/// Counters of an exploration.
#[derive(Debug, Default)]
struct Visited {
    states: usize,
    /// Steps that took several VMs at once.
    bursts: usize,
    /// States in which the periodic health-check round held a VM.
    passes: usize,
    /// Steps in which time changed a size.
    resizes: usize,
}

/// Visits every state that `depth` steps can lead to, each once, and returns how many there are.
fn explore(start: World, depth: usize, most_made: usize) -> Visited {
    let mut seen = HashSet::new();
    let mut visited = Visited::default();
    let mut frontier = vec![start];
    for _ in 0..depth {
        let mut next = Vec::new();
        for world in frontier {
            for step in world.options() {
                let mut after = world.clone();
                after.step(step);
                if after.made() <= most_made && seen.insert(fingerprint(&after)) {
                    visited.count(&world, step, &after);
                    after.clone().heals();
                    next.push(after);
                }
            }
        }
        frontier = next;
    }
    visited.states = seen.len();
    visited
}

impl Visited {
    fn count(&mut self, before: &World, step: Step, after: &World) {
        let grown = after.ledger.leased().saturating_sub(before.ledger.leased());
        self.bursts += usize::from(matches!(step, Step::TakeMany(..)) && grown > 1);
        self.passes += usize::from(after.is_in_periodic_pass());
        let size = |world: &World| world.ledger.counts(ProfileId(0)).size;
        self.resizes += usize::from(step == Step::Sleep && size(before) != size(after));
    }
}

/// A hash of 64 bits: enough to tell a million states apart, and it saves their memory.
fn fingerprint(world: &World) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

fn refilling(sizes: &[usize], lease_limit: usize) -> Case {
    Case {
        sizes: sizes.to_vec(),
        lease_limit,
        refill: true,
        ..Case::default()
    }
}

fn with_one_vm(depth: usize) -> Visited {
    explore(World::running(&refilling(&[1], 2)), depth, 4)
}

fn with_two_vms_and_one_lease(depth: usize) -> Visited {
    explore(World::running(&refilling(&[2], 1)), depth, 4)
}

fn with_two_profiles(depth: usize) -> Visited {
    explore(World::running(&refilling(&[1, 1], 1)), depth, 4)
}

fn at_the_lease_limit(depth: usize) -> Visited {
    explore(World::busy(&refilling(&[1, 1], 1)), depth, 5)
}

fn by_hand(depth: usize) -> Visited {
    let case = Case {
        refill: false,
        ..refilling(&[2], 2)
    };
    explore(World::running(&case), depth, 4)
}

fn from_the_start_on(depth: usize) -> Visited {
    explore(World::stopped(&refilling(&[1], 1)), depth, 4)
}

fn while_demand_moves_the_size(depth: usize) -> Visited {
    let case = Case {
        scales: true,
        ..refilling(&[1], 2)
    };
    explore(World::running(&case), depth, 4)
}

fn with_bursts_and_passes(depth: usize) -> Visited {
    let case = Case {
        bursts: true,
        passes: true,
        ..refilling(&[2], 2)
    };
    let visited = explore(World::running(&case), depth, 4);
    assert!(visited.bursts > 0 && visited.passes > 0, "{visited:?}");
    visited
}

fn with_passes_while_demand_moves_the_size(depth: usize) -> Visited {
    let case = Case {
        scales: true,
        bursts: true,
        passes: true,
        ..refilling(&[1], 2)
    };
    let visited = explore(World::running(&case), depth, 4);
    assert!(visited.passes > 0 && visited.resizes > 0, "{visited:?}");
    visited
}

/// Asserts that the exploration has visited more than `least` states.
fn at_least(least: usize, visited: Visited) {
    eprintln!("{visited:?}");
    assert!(visited.states > least, "{visited:?}");
}

#[test]
fn every_interleaving_with_one_vm() {
    at_least(70_000, with_one_vm(6));
}

#[test]
fn every_interleaving_with_two_vms_and_one_lease() {
    at_least(25_000, with_two_vms_and_one_lease(5));
}

#[test]
fn every_interleaving_with_two_profiles() {
    at_least(20_000, with_two_profiles(4));
}

#[test]
fn every_interleaving_at_the_lease_limit() {
    at_least(25_000, at_the_lease_limit(4));
}

#[test]
fn every_interleaving_by_hand() {
    at_least(30_000, by_hand(6));
}

#[test]
fn every_interleaving_from_the_start_on_and_through_the_stop() {
    at_least(6_000, from_the_start_on(6));
}

#[test]
fn every_interleaving_while_demand_moves_the_size() {
    at_least(20_000, while_demand_moves_the_size(5));
}

#[test]
fn every_interleaving_with_bursts_and_health_passes() {
    at_least(30_000, with_bursts_and_passes(5));
}

#[test]
fn every_interleaving_of_health_passes_with_demand_that_moves_the_size() {
    at_least(25_000, with_passes_while_demand_moves_the_size(5));
}

#[test]
#[ignore = "long: every interleaving, one step deeper"]
fn every_interleaving_one_step_deeper() {
    at_least(300_000, with_one_vm(7));
    at_least(100_000, with_two_vms_and_one_lease(6));
    at_least(150_000, with_two_profiles(5));
    at_least(30_000, at_the_lease_limit(5));
    at_least(140_000, by_hand(7));
    at_least(20_000, from_the_start_on(7));
    at_least(100_000, while_demand_moves_the_size(6));
    at_least(180_000, with_bursts_and_passes(6));
    at_least(130_000, with_passes_while_demand_moves_the_size(6));
}

fn run(case: &Case, choices: &[usize]) {
    let mut world = World::stopped(case);
    for choice in choices {
        let options = world.options();
        if let Some(step) = options.get(choice % options.len()) {
            world.step(*step);
        }
    }
    world.heals();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_deficits_heal_on_any_path(
        sizes in prop::collection::vec(0_usize..5, 1..4),
        lease_limit in 1_usize..6,
        refill in any::<bool>(),
        [scales, bursts, passes] in any::<[bool; 3]>(),
        choices in prop::collection::vec(any::<usize>(), 0..300),
    ) {
        run(&Case { sizes, lease_limit, refill, scales, bursts, passes }, &choices);
    }
}
