//! Builds the real thing. Needs the build packages, apt's lists, and minutes.
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

/// The cache to build in: `HEARTH_TEST_CACHE`, or a fresh one.
fn cache() -> (Option<tempfile::TempDir>, Images) {
    match std::env::var_os("HEARTH_TEST_CACHE") {
        Some(dir) => (None, Images::open(Some(dir.into())).unwrap()),
        None => {
            let dir = tempfile::tempdir().unwrap();
            let images = Images::open(Some(dir.path().to_owned())).unwrap();
            (Some(dir), images)
        }
    }
}

fn is_elf(path: &Path) -> bool {
    std::fs::read(path).unwrap().starts_with(b"\x7fELF")
}

#[test]
#[ignore = "builds the kernel: 5 minutes"]
fn a_base_image_is_built_once() {
    let (_dir, images) = cache();
    let guest = images.base(&Stages::default()).unwrap();
    assert!(is_elf(&guest.kernel));
    assert_eq!(images.cached().kernel.as_ref(), Some(&guest.kernel));
    assert_eq!(images.cached().initramfs.as_ref(), Some(&guest.initramfs));

    let again = Stages::default();
    assert_eq!(images.base(&again).unwrap(), guest);
    assert_eq!(
        again.0.into_inner().unwrap(),
        [],
        "something was built again"
    );
}

#[test]
#[ignore = "builds the kernel twice: 10 minutes"]
fn two_builds_give_the_same_kernel() {
    let kernel = |images: &Images| {
        let path = images.kernel(&Stages::default()).unwrap();
        std::fs::read(path).unwrap()
    };
    let (_first_dir, first) = cache();
    let second_dir = tempfile::tempdir().unwrap();
    let second = Images::open(Some(second_dir.path().to_owned())).unwrap();
    assert!(
        kernel(&first) == kernel(&second),
        "the kernel depends on where or when it was built"
    );
}
