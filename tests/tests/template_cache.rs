#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! The cache of templates, with guests of a few instructions: which entries are built once, built
//! again or evicted, and what a killed process leaves behind.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hearth_tests::flat::{cached_template, flat_key};
use hearth_tests::{kvm, noise, within};
use hearth_vmm::cache::{Entry, Found, TemplateCache};
use hearth_vmm::{Exit, StoreError, Template};

const NO_LIMIT: u64 = u64::MAX;
/// Approximate size of an entry on disk in bytes.
const ENTRY: u64 = 4 << 20;

fn get(cache: &TemplateCache, number: u64) -> (Template, Found) {
    let cached = cache.get_or_build(&flat_key(number), || cached_template(number));
    let cached = cached.unwrap();
    (cached.template, cached.found)
}

/// Fails unless the template is the one for `number`.
async fn is(template: &Template, number: u64) {
    let vm = template.fork().unwrap();
    assert_eq!(within(5, "end", vm.exited()).await, Exit::PowerOff);
    assert_eq!(vm.console().text(), number.to_string());
}

/// Starts another process that uses the cache.
fn process(root: &Path, limit: u64, keys: u64, rounds: u64, pause_ms: u64) -> Child {
    Command::new(env!("CARGO_BIN_EXE_template-cache"))
        .arg(root)
        .args([limit, keys, rounds, pause_ms].map(|number| number.to_string()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn an_entry_is_made_once_and_found_afterwards() {
    if !kvm() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let cache = TemplateCache::open(root.path(), NO_LIMIT).unwrap();
    let (made, found) = get(&cache, 1);
    assert!(matches!(found, Found::Built));
    is(&made, 1).await;
    for _ in 0..2 {
        let (template, found) = get(&cache, 1);
        assert!(matches!(found, Found::There));
        is(&template, 1).await;
    }
    let (other, found) = get(&cache, 2);
    assert!(matches!(found, Found::Built));
    is(&other, 2).await;
    assert!(cache.size().unwrap() >= 2 * ENTRY);
    // An entry's name covers its whole key: every part counts.
    assert_ne!(flat_key(1).name(), flat_key(2).name());
    assert_ne!(
        flat_key(1).part("vcpus", [1]).name(),
        flat_key(1).part("vcpus", [2]).name()
    );
    assert_ne!(
        flat_key(1).part("a", "bc").name(),
        flat_key(1).part("ab", "c").name()
    );
}

#[tokio::test]
async fn what_cannot_be_used_is_made_again_and_never_run() {
    if !kvm() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let cache = TemplateCache::open(root.path(), NO_LIMIT).unwrap();
    let keep = get(&cache, 1);
    get(&cache, 2);
    let dir = root.path().join(flat_key(1).name());
    let other = root.path().join(flat_key(2).name());
    let open = |name: &str| OpenOptions::new().write(true).open(dir.join(name)).unwrap();
    let harms: [(&str, &dyn Fn()); 9] = [
        ("truncated memory", &|| {
            open("memory").set_len(1 << 20).unwrap()
        }),
        ("truncated manifest", &|| {
            open("manifest").set_len(100).unwrap()
        }),
        ("tampered memory", &|| {
            open("memory").write_all_at(&[0xcc], (1 << 20) + 5).unwrap();
        }),
        ("tampered manifest", &|| {
            open("manifest").write_all_at(&[0xcc], 400).unwrap();
        }),
        ("another version", &|| {
            open("manifest").write_all_at(&[9], 8).unwrap();
        }),
        ("foreign memory", &|| {
            fs::copy(other.join("memory"), dir.join("memory")).unwrap();
        }),
        ("another entry", &|| {
            for part in ["memory", "manifest"] {
                fs::copy(other.join(part), dir.join(part)).unwrap();
            }
        }),
        ("no memory", &|| {
            fs::remove_file(dir.join("memory")).unwrap()
        }),
        ("no manifest", &|| {
            fs::remove_file(dir.join("manifest")).unwrap()
        }),
    ];
    for (what, harm) in harms {
        harm();
        let (template, found) = get(&cache, 1);
        let Found::Rebuilt(why) = found else {
            panic!("{what}: {found:?}");
        };
        match what {
            "another version" => assert!(matches!(why, StoreError::Version { found: 9, .. })),
            "no memory" => assert!(matches!(why, StoreError::NotATemplate(_)), "{why}"),
            "no manifest" => assert!(matches!(why, StoreError::Io { .. }), "{why}"),
            _ => assert!(matches!(why, StoreError::Damaged(_)), "{what}: {why}"),
        }
        is(&template, 1).await;
        assert!(matches!(get(&cache, 1).1, Found::There), "{what}");
    }
    // A template that was returned before its entry was replaced can still be used.
    is(&keep.0, 1).await;
    // A file lies in the place of an entry.
    fs::remove_dir_all(&dir).unwrap();
    fs::write(&dir, "").unwrap();
    let (template, found) = get(&cache, 1);
    assert!(matches!(found, Found::Rebuilt(_)), "{found:?}");
    is(&template, 1).await;
}

#[test]
fn a_cache_that_others_can_write_to_is_refused() {
    let root = tempfile::tempdir().unwrap();
    TemplateCache::open(root.path(), NO_LIMIT).unwrap();
    for dir in ["", "lock", "work"].map(|name| root.path().join(name)) {
        for mode in [0o720, 0o702] {
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
            let refused = TemplateCache::open(root.path(), NO_LIMIT);
            assert!(
                matches!(refused, Err(StoreError::NotPrivate(_))),
                "{dir:?} {mode:o}"
            );
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        TemplateCache::open(root.path(), NO_LIMIT).unwrap();
    }
}

#[tokio::test]
async fn the_longest_unused_entries_go_but_none_in_use() {
    if !kvm() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    // The limit leaves room for three entries.
    let cache = TemplateCache::open(root.path(), 3 * ENTRY + ENTRY / 2).unwrap();
    let there = |number| root.path().join(flat_key(number).name()).exists();
    // Timestamps in the file system are coarse.
    let tick = || std::thread::sleep(Duration::from_millis(20));
    let (in_use, _) = get(&cache, 0);
    for number in [1, 2] {
        tick();
        drop(get(&cache, number));
    }
    tick();
    // Entry 1 is used again: now 2 is the longest unused.
    drop(get(&cache, 1));
    tick();
    drop(get(&cache, 3));
    assert_eq!([0, 1, 2, 3].map(there), [true, true, false, true]);
    // A clone of the template that is in use also keeps the entry, even for another handle on the
    // cache.
    let clone = in_use.clone();
    drop(in_use);
    let same = TemplateCache::open(root.path(), ENTRY / 2).unwrap();
    let (fourth, found) = get(&same, 4);
    assert!(matches!(found, Found::Built));
    // The newly built entry stays although it exceeds the limit; 0 is in use, the others are gone.
    assert_eq!(
        [0, 1, 2, 3, 4].map(there),
        [true, false, false, false, true]
    );
    is(&clone, 0).await;
    is(&fourth, 4).await;
    drop((clone, fourth));
    drop(get(&same, 5));
    assert_eq!([0, 4, 5].map(there), [false, false, true]);
}

#[tokio::test]
async fn a_right_to_make_an_entry_that_is_dropped_goes_to_the_next() {
    if !kvm() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let cache = TemplateCache::open(root.path(), NO_LIMIT).unwrap();
    let Entry::Vacant(vacancy) = cache.enter(&flat_key(1)).unwrap() else {
        panic!("an entry that nobody made");
    };
    assert!(vacancy.why().is_none());
    let next = cache.clone();
    let waiting = tokio::task::spawn_blocking(move || get(&next, 1));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    drop(vacancy);
    let (template, found) = within(10, "next", waiting).await.unwrap();
    assert!(matches!(found, Found::Built));
    is(&template, 1).await;
    // An entry whose build failed leaves nothing behind.
    let failed = cache.get_or_build(&flat_key(2), || Err(std::io::Error::other("no")));
    assert!(failed.is_err());
    assert!(!root.path().join(flat_key(2).name()).exists());
    assert_eq!(fs::read_dir(root.path().join("work")).unwrap().count(), 0);
}

#[tokio::test]
async fn processes_that_want_the_same_entry_make_it_once() {
    if !kvm() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..4)
        .map(|_| process(root.path(), NO_LIMIT, 1, 1, 300))
        .collect();
    let mut said = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        said.push(String::from_utf8(output.stdout).unwrap().trim().to_owned());
    }
    said.sort();
    assert_eq!(said, ["Built", "There", "There", "There"]);
}

/// Kills processes at random moments while they build, load and evict entries. After each kill the
/// cache returns every template, and nothing is left of the process.
async fn killed_at_random(rounds: usize) {
    const KEYS: u64 = 4;
    let root = tempfile::tempdir().unwrap();
    // The limit leaves room for two, so that entries are built and evicted.
    let limit = 2 * ENTRY + ENTRY / 2;
    let moments = noise(rounds * 8, 0xdead);
    let (mut interrupted, mut used) = (0, 0);
    for moment in moments.as_chunks::<8>().0 {
        let mut child = process(root.path(), limit, KEYS, 10_000, 0);
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        // Kills the process after its first line and up to a quarter of a second more.
        said.next().unwrap().unwrap();
        let wait = u64::from_le_bytes(*moment) % 250_000;
        tokio::time::sleep(Duration::from_micros(wait)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        used += said.count();
        let work = root.path().join("work");
        interrupted += fs::read_dir(&work).unwrap().count();
        let cache = TemplateCache::open(root.path(), limit).unwrap();
        for number in 0..KEYS {
            // An entry is whole or missing: never damaged, so that it would have to be rebuilt.
            let (template, found) = get(&cache, number);
            assert!(!matches!(found, Found::Rebuilt(_)), "{found:?}");
            is(&template, number).await;
        }
        assert_eq!(fs::read_dir(&work).unwrap().count(), 0, "scratch is left");
    }
    eprintln!("{rounds} kills, {used} templates had by then, {interrupted} left scratch behind");
}

#[tokio::test]
async fn a_process_that_is_killed_leaves_a_usable_cache() {
    if kvm() {
        killed_at_random(5).await;
    }
}

#[tokio::test]
#[ignore = "long: 50 processes"]
async fn fifty_processes_that_are_killed_leave_a_usable_cache() {
    if kvm() {
        killed_at_random(50).await;
    }
}
