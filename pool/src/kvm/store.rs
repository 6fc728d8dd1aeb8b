//! Templates that outlast the process: the cache on disk, and the key of a profile's entry in it.

use std::path::{Path, PathBuf};

use hearth_agent::proto;
use hearth_vmm::cache::{Entry, TemplateCache, TemplateKey};
use hearth_vmm::{CpuProfile, StoreError};

use super::templates::Ingredients;
use super::{KvmImage, session};
use crate::profile::Balloon;

/// Default limit of the space that templates take on disk, in bytes.
pub(super) const DEFAULT_LIMIT: u64 = 4 << 30;
/// Raised when templates are made by other steps from the same inputs.
const RECIPE: u32 = 7;

/// Where templates are kept.
#[derive(Clone, Debug)]
pub(super) struct Store {
    dir: PathBuf,
    limit: u64,
}

impl Store {
    pub(super) fn new(dir: PathBuf, limit: u64) -> Self {
        Self { dir, limit }
    }

    /// `$XDG_CACHE_HOME/hearth/templates`, or the same in `~/.cache`; `None` if neither
    /// `XDG_CACHE_HOME` nor `HOME` is an absolute path.
    pub(super) fn default_dir() -> Option<PathBuf> {
        let absolute = |name| {
            let dir = PathBuf::from(std::env::var_os(name)?);
            dir.is_absolute().then_some(dir)
        };
        let cache = absolute("XDG_CACHE_HOME");
        let cache = cache.or_else(|| Some(absolute("HOME")?.join(".cache")));
        Some(cache?.join("hearth").join("templates"))
    }

    /// Returns the entry, or the right to make it; `None` while another process makes it. Blocks
    /// for the disk only.
    pub(super) fn try_enter(&self, made_of: &Named) -> Result<Option<Entry>, StoreError> {
        let images: Vec<&Path> = made_of.root.iter().map(PathBuf::as_path).collect();
        TemplateCache::open(&self.dir, self.limit)?.try_enter_with(&made_of.key, &images)
    }
}

/// All inputs of a template; files count by their content.
#[derive(Clone, Debug)]
pub(super) struct MadeOf {
    pub(super) image: KvmImage,
    pub(super) ingredients: Ingredients,
    pub(super) cpu: CpuProfile,
    /// The kernel parameters, the monitor's own and the image's.
    pub(super) boot_words: Vec<String>,
    /// Guest memory in MiB that an inflated balloon leaves.
    pub(super) idle_mib: u32,
}

/// The key of an entry, and the root file system, which is not stored in the entry.
#[derive(Clone, Debug)]
pub(super) struct Named {
    key: TemplateKey,
    root: Option<PathBuf>,
}

impl MadeOf {
    /// Computes the key. Blocks: it reads the files.
    pub(super) fn name(self) -> Result<Named, StoreError> {
        let key = self.key()?;
        let root = self.image.root;
        Ok(Named { key, root })
    }

    fn key(&self) -> Result<TemplateKey, StoreError> {
        // Field by field, so that each new field has to be considered here.
        let Self {
            image,
            ingredients,
            cpu,
            boot_words,
            idle_mib,
        } = self;
        let Ingredients {
            // The image's files count, not its name in this backend.
            image: _,
            memory_mib,
            vcpus,
            packages,
            env,
            warm_up,
            session,
            prelude,
            balloon,
        } = ingredients;
        let KvmImage {
            kernel,
            initramfs,
            root,
            // Both are in `boot_words`.
            layer_mib: _,
            append: _,
        } = image;
        let left = match balloon {
            Balloon::Auto => *idle_mib,
            Balloon::Off => 0,
        };
        let mut key = TemplateKey::new()
            .part("recipe", RECIPE.to_le_bytes())
            .part("agent", proto::VERSION.to_le_bytes())
            .part("profile", format!("{cpu:?}"))
            .file("kernel", kernel)?
            .file("initramfs", initramfs)?
            .part("words", boot_words.join(" "))
            .part("memory", memory_mib.to_le_bytes())
            .part("vcpus", [*vcpus])
            .part("left", left.to_le_bytes());
        if let Some(root) = root {
            key = key.file("root", root)?;
        }
        for package in packages {
            key = key.part("package", package);
        }
        for (name, value) in env {
            key = key.part("variable", name).part("value", value);
        }
        for word in warm_up {
            key = key.part("warm-up", word);
        }
        if let Some(language) = session {
            key = key
                .part("session", language.as_str())
                .part("driver", session::in_guest(*language).driver())
                .part("prelude", prelude);
        }
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::profile::Profile;

    #[test]
    fn content_names_an_entry_and_the_place_of_files_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let profile = || Profile::new("name", "image");
        let base = MadeOf {
            image: KvmImage::new(file("kernel", "k"), file("initramfs", "i")),
            ingredients: Ingredients::from(&profile()),
            cpu: CpuProfile::Native,
            boot_words: vec!["a".into()],
            idle_mib: 64,
        };
        let name = |change: &dyn Fn(&mut MadeOf)| {
            let mut made_of = base.clone();
            change(&mut made_of);
            made_of.key().unwrap().name()
        };
        let of = |profile: Profile| name(&|made_of| made_of.ingredients = (&profile).into());
        let same = name(&|_| {});
        let copy = file("copy", "k");
        assert_eq!(name(&|made_of| made_of.image.kernel = copy.clone()), same);
        assert_eq!(of(Profile::new("other", "other")), same);
        let other = file("other", "x");
        let others = [
            name(&|made_of| made_of.image.kernel = other.clone()),
            name(&|made_of| made_of.image.initramfs = other.clone()),
            name(&|made_of| made_of.image.root = Some(other.clone())),
            name(&|made_of| made_of.image.root = Some(copy.clone())),
            name(&|made_of| made_of.boot_words.push("x".into())),
            name(&|made_of| made_of.cpu = CpuProfile::Emulated),
            name(&|made_of| made_of.idle_mib = 32),
            of(profile().memory_mib(64)),
            of(profile().vcpus(2)),
            of(profile().package("a")),
            of(profile().env("a", "b")),
            of(profile().env("b", "a")),
            of(profile().warm_up(["a"])),
            of(profile().warm_up(["a", "b"])),
            of(profile().balloon(Balloon::Off)),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(*other, same);
            assert!(others[index + 1..].iter().all(|next| next != other));
        }
    }
}
