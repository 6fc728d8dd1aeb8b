//! Checks that `tests/HOSTILE.md` and the tests agree: each attack that it lists exists, and each
//! hostile test is listed. For `tests/FAULTS.md`, checks only that the listed tests exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A row of the table.
struct Attack {
    name: String,
    by: String,
    file: PathBuf,
    test: String,
    result: String,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Returns the rows: attack, device, by, test, what catches it, result. A heading names the file of
/// the tests below it.
fn attacks() -> Vec<Attack> {
    let table = std::fs::read_to_string(repository().join("tests/HOSTILE.md")).unwrap();
    let mut file = PathBuf::new();
    let mut attacks = Vec::new();
    for line in table.lines() {
        if let Some(heading) = line.strip_prefix("## `") {
            file = repository().join(heading.trim_end_matches('`'));
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, _, by, test, _, result] = cells[..] else {
            continue;
        };
        if name == "attack" {
            continue;
        }
        attacks.push(Attack {
            name: name.to_owned(),
            by: by.to_owned(),
            file: file.clone(),
            test: test.trim_matches('`').to_owned(),
            result: result.to_owned(),
        });
    }
    attacks
}

/// Returns the names of a file's tests.
fn tests_of(source: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    let mut marked = false;
    for line in source.lines().map(str::trim) {
        marked |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        let name = line
            .strip_prefix("async ")
            .unwrap_or(line)
            .strip_prefix("fn ");
        if let Some((name, _)) = name.and_then(|rest| rest.split_once('('))
            && std::mem::take(&mut marked)
        {
            tests.insert(name.to_owned());
        }
    }
    tests
}

#[test]
fn every_attack_of_the_table_is_in_the_test_that_it_names() {
    for attack in attacks() {
        let source = std::fs::read_to_string(&attack.file).unwrap();
        let place = format!("{}: {}", attack.file.display(), attack.name);
        let test = &attack.test;
        assert!(tests_of(&source).contains(test), "{place}: no test {test}");
        // A test of many attacks contains the name of each; a test of one attack is named after it.
        let (_, body) = source.split_once(&format!("fn {test}(")).unwrap();
        let body = body.split_once("\n}\n").unwrap().0;
        let named = body.contains(&format!("\"{}\"", attack.name));
        let by_name = test.replace('_', " ").contains(&attack.name);
        assert!(named || by_name, "{place}: not in {test}");
    }
}

#[test]
fn every_hostile_test_is_in_the_table() {
    let listed: BTreeSet<(PathBuf, String)> = attacks()
        .into_iter()
        .map(|attack| (attack.file, attack.test))
        .collect();
    let mut files: Vec<PathBuf> = [
        "tests/tests/hostile_program.rs",
        "agent/tests/hostile_programs.rs",
    ]
    .map(|file| repository().join(file))
    .into();
    for directory in ["vmm/src/virtio/hostile", "tests/tests/hostile"] {
        let entries = std::fs::read_dir(repository().join(directory)).unwrap();
        files.extend(entries.map(|entry| entry.unwrap().path()));
    }
    // The tests in this file are not about guests.
    files.retain(|file| !file.ends_with("registry.rs"));
    for file in files {
        for test in tests_of(&std::fs::read_to_string(&file).unwrap()) {
            let place = (file.clone(), test);
            assert!(listed.contains(&place), "not in HOSTILE.md: {place:?}");
        }
    }
}

#[test]
fn the_table_has_enough_attacks_no_two_alike() {
    let attacks = attacks();
    let mut seen = BTreeSet::new();
    for attack in &attacks {
        let place = (&attack.file, &attack.test, &attack.name);
        assert!(seen.insert(place), "twice: {place:?}");
        assert!(
            ["real", "played"].contains(&attack.by.as_str()),
            "{place:?}"
        );
        assert!(!attack.result.is_empty(), "{place:?}");
    }
    let real = attacks.iter().filter(|attack| attack.by == "real").count();
    assert!(
        attacks.len() >= 40 && real >= 10,
        "{}, {real}",
        attacks.len()
    );
}

#[test]
fn every_fault_of_others_has_the_test_that_is_named() {
    let table = std::fs::read_to_string(repository().join("tests/FAULTS.md")).unwrap();
    let rows = table.lines().filter_map(|line| line.strip_suffix("` |"));
    let places = rows.filter_map(|row| row.rsplit_once("| `")?.1.split_once("`: `"));
    let mut count = 0;
    for (file, test) in places {
        let source = std::fs::read_to_string(repository().join(file)).unwrap();
        assert!(tests_of(&source).contains(test), "{file}: no test {test}");
        count += 1;
    }
    // Every row counts except the head rows of the tables.
    let listed = table.lines().filter(|line| line.starts_with("| ")).count();
    let heads = table.matches("| report |").count();
    assert_eq!(count, listed - heads);
    assert!(count > 60, "{count}");
}

/// `SECURITY.md` promises bounds and names the test or file that enforces each.
#[test]
fn every_bound_that_is_promised_is_held_by_a_test_that_is_there() {
    let text = std::fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let (_, bounds) = text.split_once("\n## Bounds\n").unwrap();
    let (bounds, _) = bounds.split_once("\n## ").unwrap();
    let rows: Vec<&str> = bounds.lines().filter(|row| row.starts_with("| ")).collect();
    let mut tests = BTreeSet::new();
    for room in ["agent", "images", "pool", "tests", "vmm"] {
        tests_below(&repository().join(room), &mut tests);
    }
    for row in &rows[1..] {
        let mut cells = row.trim_matches('|').rsplit(" | ");
        let held_by = cells.next().unwrap();
        // Every second piece is between backticks.
        let mut names = held_by.split('`').skip(1).step_by(2).peekable();
        assert!(names.peek().is_some(), "held by nothing: {row}");
        for name in names {
            let test = name.rsplit("::").next().unwrap();
            let is_there = tests.contains(test) || repository().join(name).is_file();
            assert!(is_there, "no test or file {name}: {row}");
        }
    }
    assert!(rows.len() > 20, "{}", rows.len());
}

/// Adds the names of the tests of all files in and below a directory.
fn tests_below(dir: &Path, tests: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, tests);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            tests.append(&mut tests_of(&std::fs::read_to_string(path).unwrap()));
        }
    }
}
