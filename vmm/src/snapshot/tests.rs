//! Tests of templates on disk, without a guest: the ways in which a directory can be wrong.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::memory::{MIB, PAGE_SIZE, memfd};
use crate::snapshot::compat::Origin;
use crate::snapshot::compat::tests::host;
use crate::snapshot::store::write_parts;

const BYTES: u64 = 2 * MIB;

/// A template whose memory has `content` at its third page, and zeroes that are written out.
fn template(content: &[u8]) -> Template {
    let memory = memfd().unwrap();
    memory.set_len(BYTES).unwrap();
    memory.write_all_at(&[0; 3 * 4096], MIB).unwrap();
    memory.write_all_at(content, 2 * PAGE_SIZE).unwrap();
    Template::freeze(fixtures::state(BYTES), Arc::new(memory)).unwrap()
}

/// Writes a template's directory.
fn write(template: &Template, dir: &Path) {
    fs::create_dir(dir).unwrap();
    let Frozen { state, memory } = &*template.frozen;
    write_parts(dir, state, memory, &host(), "").unwrap();
}

fn load(dir: &Path) -> Result<Template, StoreError> {
    Template::load_for(dir, &host(), &[])
}

fn page(template: &Template, number: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let memory = &template.frozen.memory;
    memory.read_exact_at(&mut page, number * PAGE_SIZE).unwrap();
    page
}

/// Truncates a file in place, or extends it with zeroes.
fn resize(path: &Path, len: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn what_was_written_is_loaded_and_zeroes_take_no_space() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("t");
    let original = template(b"content");
    write(&original, &dir);
    let loaded = load(&dir).unwrap();
    assert_eq!(page(&loaded, 2), page(&original, 2));
    assert_eq!(&page(&loaded, 2)[..7], b"content");
    assert_eq!(
        postcard::to_stdvec(&loaded.frozen.state).unwrap(),
        postcard::to_stdvec(&original.frozen.state).unwrap()
    );
    assert!(
        loaded.footprint() <= 2 * PAGE_SIZE,
        "{}",
        loaded.footprint()
    );
    let memory = fs::metadata(dir.join("memory")).unwrap();
    assert_eq!(memory.len(), BYTES);
    assert!(
        memory.blocks() * 512 <= 16 * PAGE_SIZE,
        "{}",
        memory.blocks()
    );
    assert_eq!(memory.mode() & 0o777, 0o600);
    // The memory is sealed.
    assert!(loaded.frozen.memory.write_all_at(b"x", 0).is_err());
    assert!(loaded.frozen.memory.set_len(0).is_err());
}

#[test]
fn what_happens_to_the_files_after_loading_does_not_matter() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("t");
    write(&template(b"content"), &dir);
    let loaded = load(&dir).unwrap();
    let file = OpenOptions::new().write(true).open(dir.join("memory"));
    file.unwrap()
        .write_all_at(b"changed", 2 * PAGE_SIZE)
        .unwrap();
    assert_eq!(&page(&loaded, 2)[..7], b"content");
    resize(&dir.join("memory"), 0);
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(&page(&loaded, 2)[..7], b"content");
}

#[test]
fn a_host_of_another_kind_is_refused_with_the_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("t");
    fs::create_dir(&dir).unwrap();
    let template = template(b"");
    let Frozen { state, memory } = &*template.frozen;
    let mut there: Origin = host();
    there.rename_kernel("5.10 #7");
    write_parts(&dir, state, memory, &there, "").unwrap();
    let refused = load(&dir).unwrap_err();
    assert!(matches!(
        refused,
        StoreError::Foreign {
            difference: Difference::Kernel { .. },
            ..
        }
    ));
    assert!(refused.to_string().contains("5.10 #7"), "{refused}");
}

#[test]
fn parts_that_are_missing_or_no_files_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    assert!(matches!(load(&path("none")), Err(StoreError::Io { .. })));
    fs::write(path("file"), "").unwrap();
    assert!(matches!(
        load(&path("file")),
        Err(StoreError::NotATemplate(_))
    ));
    for (number, part) in ["manifest", "memory"].into_iter().enumerate() {
        let dir = path(&number.to_string());
        let part = dir.join(part);
        write(&template(b"content"), &dir);
        fs::rename(&part, path("aside")).unwrap();
        assert!(matches!(load(&dir), Err(StoreError::NotATemplate(_))));
        // The same content behind a symbolic link is refused, too.
        std::os::unix::fs::symlink(path("aside"), &part).unwrap();
        assert!(matches!(load(&dir), Err(StoreError::Damaged(_))));
        fs::remove_file(&part).unwrap();
        fs::create_dir(&part).unwrap();
        assert!(matches!(load(&dir), Err(StoreError::Damaged(_))));
        fs::remove_dir(&part).unwrap();
        // A pipe without a writer must not block the load.
        rustix::fs::mkfifoat(rustix::fs::CWD, &part, rustix::fs::Mode::RWXU).unwrap();
        assert!(matches!(load(&dir), Err(StoreError::Damaged(_))));
        fs::remove_file(&part).unwrap();
        fs::rename(path("aside"), &part).unwrap();
        load(&dir).unwrap();
    }
}

#[test]
fn sizes_that_no_vm_has_are_refused_before_memory_is_taken() {
    let scratch = tempfile::tempdir().unwrap();
    for (number, change) in [
        (|s: &mut VmState| s.hardware.memory_bytes = 0) as fn(&mut VmState),
        |s| s.hardware.memory_bytes = BYTES + 4096,
        |s| s.hardware.memory_bytes = !(MIB - 1),
        |s| s.hardware.vcpus = 0,
        |s| s.hardware.vcpus = 33,
        |s| s.hardware.vcpus = 2,
        |s| s.vcpus.clear(),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = scratch.path().join(number.to_string());
        fs::create_dir(&dir).unwrap();
        let mut state = fixtures::state(BYTES);
        change(&mut state);
        let bytes = manifest::encode(&host(), "", [0; 32], &[], &state).unwrap();
        fs::write(dir.join("manifest"), bytes).unwrap();
        resize_new(&dir.join("memory"), BYTES);
        assert!(
            matches!(load(&dir), Err(StoreError::Damaged(_))),
            "{number}"
        );
    }
}

fn resize_new(path: &Path, len: u64) {
    File::create(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_trusted_template_is_private_and_has_its_whole_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("t");
    write(&template(b"content"), &dir);
    let trusted = |dir: &Path| Template::load_trusted_for(dir, &host(), &[]);
    assert_eq!(&page(&trusted(&dir).unwrap(), 2)[..7], b"content");
    for path in [dir.clone(), dir.join("memory"), dir.join("manifest")] {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        for others in [0o020, 0o002] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode | others)).unwrap();
            assert!(matches!(trusted(&dir), Err(StoreError::NotPrivate(_))));
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    trusted(&dir).unwrap();
    resize(&dir.join("memory"), BYTES - 4096);
    assert!(matches!(trusted(&dir), Err(StoreError::Damaged(_))));
}

/// A corruption of one part of a template.
#[derive(Clone, Debug)]
enum Harm {
    Flip {
        memory: bool,
        at: f64,
        bit: u8,
    },
    Truncate {
        memory: bool,
        at: f64,
    },
    Lengthen {
        memory: bool,
        by: u64,
    },
    /// Bytes of another template at the same offset.
    Splice {
        memory: bool,
        at: f64,
        len: u64,
    },
    /// The whole part of another template.
    Swap {
        memory: bool,
    },
}

fn harm() -> impl Strategy<Value = Harm> {
    let (memory, at) = (any::<bool>, || 0.0..1.0f64);
    prop_oneof![
        4 => (memory(), at(), 0..8u8).prop_map(|(memory, at, bit)| Harm::Flip { memory, at, bit }),
        2 => (memory(), at()).prop_map(|(memory, at)| Harm::Truncate { memory, at }),
        1 => (memory(), 1..9000u64).prop_map(|(memory, by)| Harm::Lengthen { memory, by }),
        3 => (memory(), at(), 1..5000u64).prop_map(|(memory, at, len)| Harm::Splice { memory, at, len }),
        1 => memory().prop_map(|memory| Harm::Swap { memory }),
    ]
}

impl Harm {
    /// Corrupts the part; returns false if the file is unchanged.
    fn inflict(&self, dir: &Path, other: &Path) -> bool {
        let (Self::Flip { memory, .. }
        | Self::Truncate { memory, .. }
        | Self::Lengthen { memory, .. }
        | Self::Splice { memory, .. }
        | Self::Swap { memory }) = self;
        let name = if *memory { "memory" } else { "manifest" };
        let (path, other) = (dir.join(name), other.join(name));
        let before = fs::read(&path).unwrap();
        let len = before.len() as u64;
        let offset = |at: f64| (at * len as f64) as u64;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        match self {
            Self::Flip { at, bit, .. } => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, offset(*at)).unwrap();
                byte[0] ^= 1 << bit;
                file.write_all_at(&byte, offset(*at)).unwrap();
            }
            Self::Truncate { at, .. } => file.set_len(offset(*at)).unwrap(),
            Self::Lengthen { by, .. } => file.set_len(len + by).unwrap(),
            Self::Splice { at, len, .. } => {
                let other = fs::read(&other).unwrap();
                let from = usize::try_from(offset(*at)).unwrap().min(other.len());
                let to = (from + usize::try_from(*len).unwrap()).min(other.len());
                file.write_all_at(&other[from..to], from as u64).unwrap();
            }
            Self::Swap { .. } => {
                fs::copy(&other, &path).unwrap();
            }
        }
        fs::read(&path).unwrap() != before
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// A flip, a truncation, an extension, or bytes of another template give a typed error, unless
    /// they changed nothing.
    #[test]
    fn every_harm_is_an_error(harm in harm(), content in proptest::collection::vec(1..255u8, 1..9000)) {
        let scratch = tempfile::tempdir().unwrap();
        let (dir, other) = (scratch.path().join("t"), scratch.path().join("other"));
        write(&template(&content), &dir);
        write(&template(b"of another guest"), &other);
        let changed = harm.inflict(&dir, &other);
        match load(&dir) {
            Ok(_) => prop_assert!(!changed, "{harm:?} goes unnoticed"),
            Err(
                StoreError::Damaged(_) | StoreError::NotATemplate(_) | StoreError::Version { .. },
            ) => prop_assert!(changed),
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    /// Bytes that are not a manifest's are decoded or refused, but do not panic; as a sealed body
    /// they are refused.
    #[test]
    fn manifests_of_any_bytes_are_decoded_or_refused(body in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = manifest::Manifest::decode(&body);
        prop_assert!(manifest::Manifest::decode(&manifest::seal_body(&body)).is_err());
    }
}

#[test]
fn every_byte_of_a_manifest_counts() {
    let good = manifest::encode(&host(), "", [7; 32], &[], &fixtures::state(BYTES)).unwrap();
    manifest::Manifest::decode(&good).unwrap();
    // Each of the first 200 bytes (the header and the start of the body), then every 97th.
    for at in (0..200).chain((200..good.len()).step_by(97)) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(manifest::Manifest::decode(&bad).is_err(), "byte {at}");
        assert!(
            manifest::Manifest::decode(&good[..at]).is_err(),
            "{at} bytes"
        );
    }
}

/// Checks the encoding of a constant state. If this fails, the format changed: raise
/// [`manifest::FORMAT`], then put the new value here.
#[test]
fn the_format_is_what_its_version_says() {
    use sha2::Digest as _;
    let bytes = postcard::to_stdvec(&fixtures::state(BYTES)).unwrap();
    let digest: String = sha2::Sha256::digest(&bytes)
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!((manifest::FORMAT, digest.as_str()), (5, "1095c50cc92e09db"));
}

/// Otherwise the fuzz target of templates would begin without any usable seed.
#[cfg(feature = "testing")]
#[test]
fn the_seeds_of_the_fuzz_target_can_be_restored() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/snapshot");
    for name in ["idle", "live", "connections", "without-serial"] {
        let seed = fs::read(seeds.join(name)).unwrap();
        let (how, devices) = seed.split_first().unwrap();
        assert_eq!(how & 1, 0, "{name}: devices");
        let file = crate::testing::template_with(devices);
        assert!(crate::testing::read_template(&file), "{name}");
    }
}
