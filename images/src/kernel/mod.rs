//! The guest kernel: Debian's `linux-source` package, our configuration, our
//! patches.
//!
//! An entry is named `<package version>-<recipe>`, where the recipe is the hash of our inputs. The
//! compiler is not part of the name, so that a kernel remains valid when the machine is upgraded.

mod build;
mod config;
mod source;

use std::path::{Path, PathBuf};

pub use config::Wrong;

use crate::cache::{Cache, CacheError, Key};
use crate::command::CommandError;
use crate::debian::DebianError;
use crate::progress::Progress;
use crate::tools::{self, MissingTools};

/// Increased when the build changes in a way that is not visible in its inputs.
const BUILDER: &str = "1";
const KIND: &str = "kernel";
const FILE: &str = "vmlinux";

/// Our configuration, on top of `tinyconfig`.
const CONFIG: &str = include_str!("../../kernel/config/guest.config");

macro_rules! patches {
    ($($name:literal),* $(,)?) => {
        /// Our patches, in order. A test compares the list with the directory.
        const PATCHES: &[(&str, &str)] = &[
            $(($name, include_str!(concat!("../../kernel/patches/", $name)))),*
        ];
    };
}

patches![
    "0001-x86-hearth-skip-the-INT3-self-test-where-ring-0-is-e.patch",
    "0002-x86-fpu-hearth-no-FWAIT-where-ring-0-is-emulated.patch",
    "0003-x86-mm-hearth-take-SYSCALL-from-the-page-fault-it-tu.patch",
    "0004-x86-reboot-hearth-report-how-the-machine-ends-to-an-.patch",
    "0005-init-hearth-no-sysfs-entries-and-uevents-that-nobody.patch",
    "0006-mm-hearth-less-work-on-memory-at-boot.patch",
    "0007-x86-alternatives-hearth-patch-without-decoding-and-p.patch",
    "0008-tick-hearth-fewer-timer-interrupts-while-booting.patch",
    "0009-mm-hearth-struct-pages-by-the-block-no-page-attribut.patch",
    "0010-init-hearth-no-messages-that-a-quiet-boot-hides-no-f.patch",
    "0011-x86-lib-hearth-copy-and-fill-with-string-instruction.patch",
    "0012-x86-hearth-no-2-MiB-page-for-the-entry-code-without-.patch",
    "0013-random-hearth-let-root-renew-the-boot_id-of-a-cloned.patch",
    "0014-mm-hearth-do-not-look-for-bad-pages-among-those-neve.patch",
    "0015-x86-hearth-no-2-MiB-alignment-of-decrypted-data-with.patch",
    "0016-x86-kvmclock-hearth-let-root-step-the-wall-clock-of-.patch",
    "0017-tick-hearth-fewer-timer-interrupts-where-ring-0-is-e.patch",
    "0018-random-hearth-let-root-rekey-the-generator-of-a-clon.patch",
    "0019-vsock-hearth-no-credit-update-after-each-message-whe.patch",
    "0020-init-hearth-compare-boot-words-with-few-parameters.patch",
    "0021-mm-hearth-plain-loops-over-the-first-struct-pages.patch",
    "0022-mm-page_reporting-hearth-not-while-booting.patch",
    "0023-x86-alternatives-hearth-look-before-decoding-leave-s.patch",
    "0024-drivers-hearth-leave-out-what-nobody-looks-at.patch",
    "0025-workqueue-hearth-rescuers-after-the-boot.patch",
    "0026-x86-hearth-read-our-words-before-the-others.patch",
    "0027-random-hearth-a-new-boot_id-with-the-new-key.patch",
    "0028-sched-hearth-no-fair-server-without-real-time-tasks.patch",
    "0029-tick-hearth-no-tick-in-a-short-wake-up.patch",
    "0030-mm-hearth-memory-that-nobody-has-used-is-zero.patch",
    "0031-x86-mm-hearth-no-tables-for-what-a-guest-never-maps.patch",
    "0032-x86-alternatives-hearth-patch-less-code-at-boot.patch",
    "0033-x86-ioapic-hearth-do-not-mask-what-is-masked.patch",
    "0034-lib-hearth-find-the-end-of-a-string-with-one-instruc.patch",
    "0035-x86-fpu-hearth-let-the-monitor-save-registers-where.patch",
    "0036-tick-hearth-end-the-long-stride-of-the-boot-with-it.patch",
];

/// Why the kernel could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The machine lacks packages that builds need.
    #[error("building the kernel needs more packages; install them with: {}", .0.install_command())]
    Tools(MissingTools),
    /// The source package could not be found or fetched.
    #[error("the kernel's source cannot be had")]
    Source(#[from] DebianError),
    /// A file that the package should have is missing.
    #[error("the package linux-source-6.12 {version} holds no {missing}")]
    Package {
        /// Version of the package.
        version: String,
        /// The missing file.
        missing: &'static str,
    },
    /// A patch does not apply to this version of the source.
    #[error("the patch {patch} does not apply to linux-source-6.12 {version}")]
    Patch {
        /// File name of the patch.
        patch: &'static str,
        /// Version of the package.
        version: String,
        /// The error of `patch`.
        source: CommandError,
    },
    /// Some options of our configuration did not take effect.
    #[error("the kernel configuration did not take effect: {}", wrong.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config {
        /// Each option that differs from the requested value.
        wrong: Vec<Wrong>,
    },
    /// A program of the build failed.
    #[error("a build step failed")]
    Command(#[from] CommandError),
    /// A file operation in the cache failed.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

/// Returns the hash of our inputs to a kernel.
fn recipe(config: &str, patches: &[(&str, &str)]) -> String {
    patches
        .iter()
        .fold(
            Key::default()
                .part("builder", BUILDER.as_bytes())
                .part("config", config.as_bytes()),
            |key, (name, text)| key.part(name, text.as_bytes()),
        )
        .name()
}

fn entry_name(version: &str, recipe: &str) -> String {
    format!("{version}-{recipe}")
}

/// Returns the kernel of the pinned source version, or else of another one.
fn cached_as(cache: &Cache, recipe: &str) -> Option<PathBuf> {
    let file = |name: &str| {
        let file = cache.entry(KIND, name)?.join(FILE);
        file.is_file().then_some(file)
    };
    file(&entry_name(source::PINNED, recipe)).or_else(|| {
        let mut others = cache.names(KIND);
        others.retain(|name| name.ends_with(&format!("-{recipe}")));
        others.sort();
        file(others.last()?)
    })
}

pub(crate) fn cached(cache: &Cache) -> Option<PathBuf> {
    cached_as(cache, &recipe(CONFIG, PATCHES))
}

pub(crate) fn get(cache: &Cache, progress: &dyn Progress) -> Result<PathBuf, KernelError> {
    if let Some(path) = cached(cache) {
        return Ok(path);
    }
    if let Some(missing) = tools::missing() {
        return Err(KernelError::Tools(missing));
    }
    let lock = cache.lock(KIND, progress)?;
    if let Some(path) = cached(cache) {
        return Ok(path);
    }
    let scratch = cache.scratch(&lock)?;
    let scratch = scratch.path();
    let package = source::fetch(&cache.dir("source")?, scratch, progress)?;
    let finished = build::build(scratch, &package, CONFIG, PATCHES, progress)?;
    let name = entry_name(&package.version, &recipe(CONFIG, PATCHES));
    let entry = cache.publish(KIND, &name, &finished)?;
    Ok(entry.join(FILE))
}

/// Writes a text to a file of the build.
fn write(path: &Path, text: &str) -> Result<(), CacheError> {
    std::fs::write(path, text).map_err(crate::cache::io_error("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_patches_is_the_directory() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel/patches");
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let listed: Vec<&str> = PATCHES.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, listed);
    }

    #[test]
    fn every_patch_explains_itself_and_names_its_boot_word() {
        for (name, text) in PATCHES {
            let message = text.split("\ndiff --git ").next().unwrap();
            assert!(text.starts_with("From "), "{name}");
            assert!(message.lines().count() > 8, "{name}");
            assert!(
                message.contains("hearth."),
                "{name} does not say which boot word switches it on"
            );
            assert!(
                message.contains("Without the boot word"),
                "{name} does not say what it is without its boot word"
            );
        }
    }

    #[test]
    fn the_recipe_changes_with_each_input() {
        let patches = [("0001-a.patch", "text"), ("0002-b.patch", "more")];
        let base = recipe("CONFIG_A=y\n", &patches);
        assert_eq!(base, recipe("CONFIG_A=y\n", &patches));
        for other in [
            recipe("CONFIG_A=n\n", &patches),
            recipe("CONFIG_A=y\n", &patches[..1]),
            recipe("CONFIG_A=y\n", &[patches[1], patches[0]]),
            recipe("CONFIG_A=y\n", &[patches[0], ("0002-b.patch", "less")]),
            recipe("CONFIG_A=y\n", &[patches[0], ("0002-c.patch", "more")]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn a_kernel_from_another_source_version_serves_but_the_pinned_one_is_preferred() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(dir.path().to_owned())).unwrap();
        let put = |version: &str, recipe: &str| {
            let made = dir.path().join("made");
            std::fs::create_dir(&made).unwrap();
            std::fs::write(made.join(FILE), version).unwrap();
            cache
                .publish(KIND, &entry_name(version, recipe), &made)
                .unwrap();
        };
        put("6.12.999-1", "other-recipe");
        assert_eq!(cached_as(&cache, "r"), None);
        put("6.12.999-1", "r");
        let found = cached_as(&cache, "r").unwrap();
        assert_eq!(std::fs::read(found).unwrap(), b"6.12.999-1");
        put(source::PINNED, "r");
        let found = cached_as(&cache, "r").unwrap();
        assert_eq!(std::fs::read(found).unwrap(), source::PINNED.as_bytes());
    }
}
