//! Root file systems of recipes. Packages are fetched and unpacked without running any of their
//! scripts. The recipe's changes are applied, and the tree is written as an image that guests read
//! in place.

mod applets;
mod commands;
mod confine;
#[cfg(test)]
mod hostile;
mod libraries;
mod python;
mod rules;
#[cfg(test)]
mod tests;
mod tree;
mod tree_root;
mod unpack;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use crate::cache::{Cache, CacheError, Key, io_error};
use crate::command::CommandError;
use crate::debian::{self, DebianError, Download};
use crate::erofs::{self, ErofsError};
use crate::lock::Lock;
use crate::progress::{Progress, Stage, stage};
use crate::recipe::{Recipe, RecipeError};
use crate::wheels::{self, Wheels, WheelsError};

pub(crate) use self::confine::refused as commands_refused;
use self::tree_root::TreeRoot;

const KIND: &str = "root";
const FILE: &str = "root.erofs";
/// Increased when the same recipe and packages give another image.
const BUILDER: &str = "2";

/// Why a root file system could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// The recipe or its lock cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The Debian packages could not be resolved or fetched.
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// The Python packages could not be resolved or fetched.
    #[error(transparent)]
    Wheels(#[from] WheelsError),
    /// Packages could not be unpacked.
    #[error("a package could not be unpacked")]
    Unpack(#[source] CommandError),
    /// A package or wheel is damaged.
    #[error("a package is no whole archive: remove it from the image cache's `source` or `wheels`")]
    Archive(#[source] std::io::Error),
    /// A package has a file whose path leads out of the image.
    #[error("a package has a file {name:?}, which leads out of the image: it is not to be trusted")]
    Member {
        /// The file's name in the package.
        name: String,
    },
    /// A program of the image failed.
    #[error("the image's {tool} failed")]
    Tool {
        /// The program's name.
        tool: &'static str,
        /// Its exit status and the end of its output.
        source: CommandError,
    },
    /// This machine does not permit an ordinary user to run commands in a tree of files.
    #[error(
        "the recipe has commands, and this machine permits no user namespaces to run them in: \
         sudo sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=1000 (on Ubuntu \
         kernel.apparmor_restrict_unprivileged_userns=0), or build without commands"
    )]
    NoNamespaces(#[source] CommandError),
    /// This machine can confine a program of the image neither by namespaces nor by Landlock.
    #[error(
        "the image's Python compiles its library, and this machine can confine it neither by namespaces nor by Landlock: \
         sudo sysctl user.max_user_namespaces=1000, or build on another"
    )]
    NotConfined(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A command of the recipe failed.
    #[error("the recipe's command `{command}` failed")]
    Command {
        /// The command as in the recipe.
        command: String,
        /// Its exit status and the end of its output.
        source: CommandError,
    },
    /// The image could not be written.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// A file operation in the cache failed.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

/// A root file system in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRoot {
    /// The recipe's name, and after a `+` each Python package that was requested in addition.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Returns the name of the cache entry: a readable label, and the hash of all inputs.
fn entry_name(recipe: &Recipe, lock: &Lock, wheels: &Wheels) -> String {
    let key = recipe.text.key().part("builder", BUILDER.as_bytes());
    let key = wheels
        .files()
        .iter()
        .fold(lock.add_to(key), |key: Key, wheel| {
            key.part("wheel", wheel.sha256.as_bytes())
        });
    format!("{}-{}", label(recipe), key.name())
}

fn label(recipe: &Recipe) -> String {
    let tame = |c: char| {
        if c.is_ascii_alphanumeric() || "=.".contains(c) {
            c
        } else {
            '_'
        }
    };
    let extra = recipe.extra.iter();
    extra.fold(recipe.name().to_owned(), |name, package| {
        let package: String = package.chars().take(40).map(tame).collect();
        format!("{name}+{package}")
    })
}

pub(crate) fn cached(cache: &Cache, recipe: &Recipe) -> Option<PathBuf> {
    let lock = recipe.locked().ok()?;
    let wheels = wheels::cached(cache, recipe, lock)?;
    let file = cache
        .entry(KIND, &entry_name(recipe, lock, &wheels))?
        .join(FILE);
    file.is_file().then_some(file)
}

/// Returns all cached root file systems, sorted by name.
pub(crate) fn all(cache: &Cache) -> Vec<CachedRoot> {
    let of = |entry: String| {
        let path = cache.entry(KIND, &entry)?.join(FILE);
        let (name, _) = entry.rsplit_once('-')?;
        let bytes = path.metadata().ok()?.len();
        Some(CachedRoot {
            name: name.to_owned(),
            path,
            bytes,
        })
    };
    let mut all: Vec<CachedRoot> = cache.names(KIND).into_iter().filter_map(of).collect();
    all.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    all
}

pub(crate) fn get(
    cache: &Cache,
    recipe: &Recipe,
    progress: &dyn Progress,
) -> Result<PathBuf, RootError> {
    let lock = recipe.locked()?;
    if let Some(path) = cached(cache, recipe) {
        return Ok(path);
    }
    commands::check(&recipe.text.commands)?;
    let build = cache.lock(KIND, progress)?;
    if let Some(path) = cached(cache, recipe) {
        return Ok(path);
    }
    let wheels = wheels::get(cache, recipe, lock, progress)?;
    let scratch = cache.scratch(&build)?;
    let scratch = scratch.path();
    let packages = Download {
        suite: &recipe.text.suite,
        dir: &cache.dir("source")?,
        scratch,
        stage: Stage::Packages,
    };
    let packages = packages.fetch(&lock.packages, progress)?;
    let entry = scratch.join("entry");
    let tree = TreeRoot::create(&scratch.join("tree"))?;
    let text = &recipe.text;
    stage(progress, Stage::Tree, || {
        tree::fill(&tree, &packages, text, progress)?;
        python::install(&tree, lock.python(), wheels.paths())
    })?;
    if !text.commands.is_empty() {
        stage(progress, Stage::Commands, || {
            commands::run(&tree, &text.commands)
        })?;
    }
    stage(progress, Stage::Root, || {
        python::compile(&tree, lock.python())?;
        libraries::index(&tree)?;
        fs::create_dir(&entry).map_err(io_error("create", &entry))?;
        let image = entry.join(FILE);
        erofs::make(tree.path(), &image)?;
        for user in &text.users {
            erofs::own(&image, &user.home(), user.uid)?;
        }
        Ok::<_, RootError>(())
    })?;
    let entry = cache.publish(KIND, &entry_name(recipe, lock, &wheels), &entry)?;
    Ok(entry.join(FILE))
}

/// Writes the lock of a recipe; see [`Images::lock`](crate::Images::lock).
pub(crate) fn lock(
    cache: &Cache,
    name_or_path: &str,
    progress: &dyn Progress,
) -> Result<PathBuf, RootError> {
    let (file, new) = match Recipe::built_in_text(name_or_path) {
        Some(text) => (PathBuf::from(format!("{name_or_path}.toml")), Some(text)),
        None => (PathBuf::from(name_or_path), None),
    };
    if let Some(text) = new.filter(|_| !file.exists()) {
        // Fails if the name is taken, so that no link is followed.
        let made = fs::File::create_new(&file).and_then(|mut made| made.write_all(text.as_bytes()));
        made.map_err(io_error("write", &file))?;
    }
    let recipe = Recipe::read(&file)?;
    let text = &recipe.text;
    let build = cache.lock("resolve", progress)?;
    let scratch = cache.scratch(&build)?;
    let (packages, left_out) = (&text.packages, &text.leave_out);
    let packages = debian::resolve(packages, left_out, &text.suite, scratch.path(), progress)?;
    let mut lock = Lock {
        asked: text.asked(),
        packages,
        wheels: Vec::new(),
    };
    lock.wheels = wheels::resolve(&recipe, &lock, &scratch.path().join("wheels"), progress)?;
    let to = file.with_extension("lock");
    lock.write(&to)?;
    Ok(to)
}
