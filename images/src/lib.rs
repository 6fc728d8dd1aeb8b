//! Builds the guest kernel, initramfs and root file systems that Hearth boots.
//!
//! Everything is built from source on the user's machine and kept in a cache
//! under the hash of what it was built from; nothing here needs root. The
//! kernel comes from Debian's `linux-source` package, our configuration and
//! our patches; the initramfs holds the statically linked agent and nothing
//! else; root file systems are made of Debian packages, as a [`Recipe`] says.
//!
//! ```no_run
//! use hearth_images::{Images, Recipe, Silent};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let images = Images::open(None)?;
//! if let Some(missing) = images.missing_tools() {
//!     eprintln!("to build a kernel, first run: {}", missing.install_command());
//! }
//! let guest = images.base(&Silent)?;
//! println!("{} {}", guest.kernel.display(), guest.initramfs.display());
//! let recipe = Recipe::built_in("python")?.python_package("numpy");
//! println!("{}", images.root(&recipe, &Silent)?.display());
//! # Ok(())
//! # }
//! ```
//!
//! Calls block: a first kernel build takes minutes. Two processes that want
//! the same image build it once; the second waits for the first.

mod agent;
mod cache;
mod command;
mod debian;
mod erofs;
mod import;
mod initramfs;
mod kernel;
mod lock;
mod progress;
mod recipe;
mod root;
mod tools;
mod wheels;

use std::path::{Path, PathBuf};

pub use agent::AgentError;
pub use cache::CacheError;
pub use command::CommandError;
pub use debian::DebianError;
pub use erofs::ErofsError;
pub use import::{ImportError, import};
pub use initramfs::InitramfsError;
pub use kernel::{KernelError, Wrong};
pub use progress::{Event, Progress, Silent, Stage};
pub use recipe::{Recipe, RecipeError};
pub use root::{CachedRoot, RootError};
pub use tools::MissingTools;
pub use wheels::WheelsError;

use cache::Cache;

/// The files that a guest boots from. The kernel parameters are up to the VMM: they depend on the
/// host and on its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestImage {
    /// An uncompressed ELF `vmlinux`, or the user's own kernel.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive whose `/init` is the agent.
    pub initramfs: PathBuf,
}

/// The images of this version that are in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// The kernel that [`Images::kernel`] would return without building.
    pub kernel: Option<PathBuf>,
    /// The initramfs that [`Images::base`] would return without building.
    pub initramfs: Option<PathBuf>,
    /// Root file systems by name, including those of earlier versions or recipes.
    pub roots: Vec<CachedRoot>,
}

/// Why an image could not be provided.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImagesError {
    /// The cache directory cannot be used.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
    /// The kernel could not be built.
    #[error("the guest kernel could not be built")]
    Kernel(#[from] KernelError),
    /// The agent could not be built.
    #[error("the guest agent could not be built")]
    Agent(#[from] AgentError),
    /// The initramfs could not be written.
    #[error("the initramfs could not be written")]
    Initramfs(#[from] InitramfsError),
    /// The root file system could not be built.
    #[error("the root file system could not be built")]
    Root(#[from] RootError),
    /// The recipe's packages could not be pinned.
    #[error("the recipe's packages could not be pinned")]
    Lock(#[source] RootError),
    /// The user's own kernel is not a readable file.
    #[error("cannot read the kernel {}: check the path and its permissions", path.display())]
    OwnKernel {
        /// The path as given.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// The guest images of this user: finds them in the cache, and builds those that are missing.
#[derive(Debug)]
pub struct Images {
    cache: Cache,
}

impl Images {
    /// Opens the cache in `dir`, or in `$XDG_CACHE_HOME/hearth` or
    /// `~/.cache/hearth`. The directory need not exist: the first build
    /// creates it, for this user alone.
    ///
    /// # Errors
    /// [`ImagesError::Cache`] if no place for the cache is known, or if another user may write
    /// there: that user could choose what guests boot.
    pub fn open(dir: Option<PathBuf>) -> Result<Self, ImagesError> {
        Ok(Self {
            cache: Cache::open(dir)?,
        })
    }

    /// The directory of the cache.
    #[must_use]
    pub fn cache_dir(&self) -> &Path {
        self.cache.root()
    }

    /// Returns the images in the cache. Builds nothing and does not use the network.
    #[must_use]
    pub fn cached(&self) -> Cached {
        Cached {
            kernel: kernel::cached(&self.cache),
            initramfs: agent::find()
                .ok()
                .and_then(|agent| initramfs::cached(&self.cache, &agent)),
            roots: root::all(&self.cache),
        }
    }

    /// Returns the Debian packages (of programs and headers) that builds need and this machine
    /// lacks, or `None` if none is missing.
    #[must_use]
    pub fn missing_tools(&self) -> Option<MissingTools> {
        tools::missing()
    }

    /// Returns why recipes with `commands` cannot be built here, or `None` if they can. Commands
    /// run in namespaces of their own, which some machines permit only to root, or not at all.
    #[must_use]
    pub fn commands_refused(&self) -> Option<CommandError> {
        root::commands_refused()
    }

    /// The guest kernel, built if it is not cached: an uncompressed, stripped
    /// ELF `vmlinux`.
    ///
    /// # Errors
    /// [`ImagesError::Kernel`] if something that the build needs is missing,
    /// or if it fails; nothing half-built is left in the cache.
    pub fn kernel(&self, progress: &dyn Progress) -> Result<PathBuf, ImagesError> {
        Ok(kernel::get(&self.cache, progress)?)
    }

    /// The base guest: our kernel, and an initramfs that holds the agent.
    ///
    /// The agent is built by cargo from the sources that are part of this
    /// crate, or taken from the path in the environment variable
    /// `HEARTH_AGENT`.
    ///
    /// # Errors
    /// Those of [`Images::kernel`], and [`ImagesError::Agent`] or [`ImagesError::Initramfs`] for
    /// the initramfs.
    pub fn base(&self, progress: &dyn Progress) -> Result<GuestImage, ImagesError> {
        let kernel = self.kernel(progress)?;
        Ok(GuestImage {
            kernel,
            initramfs: self.initramfs(progress)?,
        })
    }

    /// Like [`Images::base`], with a kernel of the user's own. All that the guest needs must be
    /// built into it; the VMM checks its format.
    ///
    /// # Errors
    /// [`ImagesError::OwnKernel`] if the file cannot be read, otherwise as
    /// [`Images::base`].
    pub fn with_kernel(
        &self,
        kernel: &Path,
        progress: &dyn Progress,
    ) -> Result<GuestImage, ImagesError> {
        std::fs::File::open(kernel).map_err(|source| ImagesError::OwnKernel {
            path: kernel.to_owned(),
            source,
        })?;
        Ok(GuestImage {
            kernel: kernel.to_owned(),
            initramfs: self.initramfs(progress)?,
        })
    }

    /// The root file system of a recipe, built if it is not cached: an EROFS image that guests read
    /// in place.
    ///
    /// # Errors
    /// [`ImagesError::Root`]; nothing half-built is left in the cache.
    pub fn root(&self, recipe: &Recipe, progress: &dyn Progress) -> Result<PathBuf, ImagesError> {
        Ok(root::get(&self.cache, recipe, progress)?)
    }

    /// Returns the image that [`Images::root`] would return without building.
    #[must_use]
    pub fn cached_root(&self, recipe: &Recipe) -> Option<PathBuf> {
        root::cached(&self.cache, recipe)
    }

    /// Pins the packages of a recipe to the current versions in Debian (and, for Python packages,
    /// in pip's index). Writes the lock beside the recipe, and returns its path. A built-in recipe,
    /// given by name, is first copied into the working directory, unless it has a file of that
    /// name.
    ///
    /// # Errors
    /// [`ImagesError::Lock`]; the lock is then unchanged.
    pub fn lock(
        &self,
        name_or_path: &str,
        progress: &dyn Progress,
    ) -> Result<PathBuf, ImagesError> {
        root::lock(&self.cache, name_or_path, progress).map_err(ImagesError::Lock)
    }

    fn initramfs(&self, progress: &dyn Progress) -> Result<PathBuf, ImagesError> {
        let agent = agent::find()?;
        initramfs::get(&self.cache, &agent, progress, |scratch| {
            Ok(agent::build(scratch, &agent, progress)?)
        })
    }
}
