//! Builds a kernel and an initramfs. Needs the build packages, apt's lists, and minutes.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Mutex;

use hearth_images::{Event, Images, Progress, Stage};

#[derive(Default)]
struct Stages(Mutex<Vec<Stage>>);

impl Progress for Stages {
    fn event(&self, event: Event) {
        if let Event::End(stage) = event {
            self.0.lock().unwrap().push(stage);
        }
    }
}

/// Compares the image in this user's cache (built if it is not there) with one that is built from
/// scratch in another directory: the files are the same, and existing files are not built again.
#[test]
#[ignore = "builds the kernel: 5 minutes"]
fn a_build_from_nothing_gives_the_cached_files_and_is_not_repeated() {
    let cached = Images::open(None).unwrap();
    let cached = cached.base(&Stages::default()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let images = Images::open(Some(dir.path().to_owned())).unwrap();
    let guest = images.base(&Stages::default()).unwrap();
    assert_eq!(images.cached().kernel.as_ref(), Some(&guest.kernel));
    assert_eq!(images.cached().initramfs.as_ref(), Some(&guest.initramfs));
    let same = |one: &Path, other: &Path| {
        assert_ne!(one, other);
        let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
        assert!(one.starts_with(b"\x7fELF") || one.starts_with(b"0707"));
        one == other
    };
    let place = "depends on where or when it was built";
    assert!(same(&cached.kernel, &guest.kernel), "the kernel {place}");
    assert!(
        same(&cached.initramfs, &guest.initramfs),
        "the initramfs {place}"
    );

    let again = Stages::default();
    assert_eq!(images.base(&again).unwrap(), guest);
    assert_eq!(
        again.0.into_inner().unwrap(),
        [],
        "something was built again"
    );
}
