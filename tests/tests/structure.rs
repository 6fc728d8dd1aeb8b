#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Dependencies between crates point down, and no new circle of imports comes in. Each test prints
//! what it found: `cargo test -p hearth-tests --test structure -- --nocapture`.

use std::collections::BTreeSet;
use std::fs;

use hearth_tests::structure::{circular, crates, imports, workspace};

/// What each crate may be built with, of ours.
const DOWN: &[(&str, &[&str])] = &[
    ("hearth-vmm", &[]),
    ("hearth-agent", &[]),
    ("hearth-images", &[]),
    (
        "hearth-pool",
        &["hearth-vmm", "hearth-agent", "hearth-images"],
    ),
    (
        "hearth-bench",
        &["hearth-vmm", "hearth-agent", "hearth-images", "hearth-pool"],
    ),
    (
        "hearth-tests",
        &["hearth-vmm", "hearth-agent", "hearth-images"],
    ),
];

#[test]
fn crates_depend_on_those_below_them_alone() {
    let crates = crates();
    let known: BTreeSet<_> = DOWN.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<_> = crates.keys().map(String::as_str).collect();
    assert_eq!(found, known, "each crate has its place");
    for (name, below) in DOWN {
        let (_, built_with) = &crates[*name];
        println!(
            "{name}: {}",
            built_with.iter().cloned().collect::<Vec<_>>().join(", ")
        );
        for other in built_with {
            let why = "not one of those below it";
            assert!(below.contains(&other.as_str()), "{name} -> {other}: {why}");
        }
    }
}

/// The imports that are part of a circle stand in `tests/module-cycles.txt`: one that is not is
/// new, and one that is no more must be taken out, so that it does not come back.
#[test]
fn modules_import_each_other_in_no_new_circle() {
    let mut found = BTreeSet::new();
    for (name, (folder, _)) in crates() {
        for (from, to) in circular(&imports(&folder.join("src"))) {
            found.insert(format!("{name}: {from} -> {to}"));
        }
    }
    let known = fs::read_to_string(workspace().join("tests/module-cycles.txt")).unwrap();
    let known = known.lines().filter(|line| !line.starts_with('#'));
    let known: BTreeSet<_> = known.map(str::to_owned).collect();
    found.iter().for_each(|import| println!("{import}"));
    let new: Vec<_> = found.difference(&known).collect();
    let gone: Vec<_> = known.difference(&found).collect();
    assert!(new.is_empty(), "new: {new:#?}");
    assert!(gone.is_empty(), "to be taken out of the list: {gone:#?}");
}
