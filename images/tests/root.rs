//! Builds root file systems of the built-in recipes from Debian's packages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Unlike builds, the programs of a test may get this machine's environment.
#![allow(clippy::disallowed_methods)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use hearth_images::{DebianError, Images, ImagesError, Recipe, RootError, Silent};

#[path = "support/without_namespaces.rs"]
mod without_namespaces;
use without_namespaces::without_namespaces;

/// The environment variable that names the cache directory of the child process.
const PLACE: &str = "HEARTH_TEST_PLACE";

fn not_measured(reason: &str) {
    let line = format!("\nNOT MEASURED: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn build_all(images: &Images) -> Result<Vec<PathBuf>, ImagesError> {
    let recipes = Recipe::built_in_names().map(|name| Recipe::built_in(name).unwrap());
    recipes
        .map(|recipe| images.root(&recipe, &Silent))
        .collect()
}

/// Returns `None`, and reports that it was not measured, if packages cannot be fetched.
fn built_or_not_measured(images: &Images) -> Option<Vec<PathBuf>> {
    match build_all(images) {
        Ok(paths) => Some(paths),
        Err(error @ ImagesError::Root(RootError::Debian(DebianError::Fetch { .. }))) => {
            not_measured(&error.to_string());
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Builds the recipes in this user's cache if they are not there, and again in another directory
/// from the same packages: by another process, with another umask, and by an ordinary user if this
/// one is root.
#[test]
#[ignore = "long: builds each recipe twice, of packages that it fetches"]
fn every_recipe_gives_the_same_bytes_again_without_root() {
    if let Some(place) = std::env::var_os(PLACE) {
        let images = Images::open(Some(place.into())).unwrap();
        build_all(&images).unwrap();
        return;
    }
    let images = Images::open(None).unwrap();
    let Some(first) = built_or_not_measured(&images) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("place");
    let copy = |from: &Path, to: &Path| {
        let copied = Command::new("cp")
            .arg("--recursive")
            .arg(from)
            .arg(to)
            .status();
        assert!(copied.unwrap().success());
    };
    std::fs::create_dir(&place).unwrap();
    copy(&images.cache_dir().join("source"), &place.join("source"));
    // Other users may have no access to the directory where this program was built.
    let program = dir.path().join("program");
    copy(&std::env::current_exe().unwrap(), &program);
    let id = Command::new("id").arg("-u").output().unwrap();
    let other_user = if id.stdout == b"0\n" {
        let mut chown = Command::new("chown");
        let owned = chown.args(["--recursive", "65534:65534"]).arg(dir.path());
        assert!(owned.status().unwrap().success());
        "setpriv --reuid=65534 --regid=65534 --clear-groups"
    } else {
        ""
    };
    let script = format!("umask 077; exec {other_user} \"$@\"");
    let mut again = Command::new("sh");
    again.args(["-c", &script, "sh"]).arg(&program).args([
        "--exact",
        "every_recipe_gives_the_same_bytes_again_without_root",
        "--ignored",
        "--nocapture",
    ]);
    let output = again.env(PLACE, &place).current_dir("/").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let passed = output.status.success() && said.contains("1 passed");
    assert!(passed, "{said}\n{errors}");
    for one in first {
        let entry = one.strip_prefix(images.cache_dir()).unwrap().to_owned();
        let other = place.join(&entry);
        let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
        assert!(
            one == other,
            "{} depends on where it was built",
            entry.display()
        );
    }
}

#[test]
#[ignore = "long: builds each recipe twice, of packages that it fetches"]
fn every_recipe_gives_the_same_bytes_where_namespaces_are_refused() {
    let images = Images::open(None).unwrap();
    let Some(first) = built_or_not_measured(&images) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let source = images.cache_dir().join("source");
    std::os::unix::fs::symlink(source, place.join("source")).unwrap();
    let others = Images::open(Some(place)).unwrap();
    let second = without_namespaces(|| {
        assert!(others.commands_refused().is_some());
        build_all(&others).unwrap()
    });
    for (one, other) in first.iter().zip(second) {
        let name = one.display();
        assert_eq!(
            one.parent().unwrap().file_name(),
            other.parent().unwrap().file_name()
        );
        let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
        assert!(one == other, "{name} depends on namespaces");
    }
}

/// A recipe is resolved by apt with a state and a source of its own, fetched, and built. Then
/// checks the error for versions that the archive no longer has.
#[test]
#[ignore = "long: fetches Debian's index"]
fn a_recipe_of_one_s_own_is_pinned_and_built() {
    let dir = tempfile::tempdir().unwrap();
    let images = Images::open(Some(dir.path().join("cache"))).unwrap();
    let file = dir.path().join("mine.toml");
    let text = "name = 'mine'\nsuite = 'bookworm'\npackages = ['busybox-static', 'jq']\nleave_out = ['libc6']\n\
                applets = true\n";
    std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let lock = match images.lock(path, &Silent) {
        Ok(lock) => lock,
        Err(ImagesError::Lock(RootError::Debian(error @ DebianError::Resolve(_)))) => {
            let why = std::error::Error::source(&error).unwrap();
            return not_measured(&why.to_string());
        }
        Err(error) => panic!("{error:?}"),
    };
    let pins = std::fs::read_to_string(&lock).unwrap();
    let names = pins.lines().filter_map(|line| line.strip_prefix("name = "));
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    // With the dependencies of jq, except the C library and packages that only it needs.
    let wanted = ["busybox-static", "jq", "libjq1", "libonig5"];
    assert_eq!(names, wanted.map(|name| format!("\"{name}\"")));
    assert!(!pins.contains("://"), "{pins}");

    let root = images.root(&Recipe::read(&file).unwrap(), &Silent).unwrap();
    assert_eq!(images.cached().roots[0].path, root);

    let moved = pins
        .replace("/busybox-static_", "/busybox-static_0")
        .replace("sha256 = \"", "sha256 = \"00");
    let moved: Vec<String> = moved
        .lines()
        .map(|line| match line.strip_prefix("sha256 = \"") {
            Some(hash) => format!("sha256 = \"{}\"", &hash[..64]),
            None => line.to_owned(),
        })
        .collect();
    std::fs::write(&lock, moved.join("\n")).unwrap();
    let error = images
        .root(&Recipe::read(&file).unwrap(), &Silent)
        .unwrap_err();
    let ImagesError::Root(RootError::Debian(DebianError::Vanished { packages })) = error else {
        panic!("{error:?}");
    };
    assert!(packages[0].starts_with("busybox-static "), "{packages:?}");
}
