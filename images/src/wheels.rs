//! Python packages as wheels: this machine's pip selects and fetches them for the image's Python.
//!
//! The wheels of a set of requirements are an entry of the cache, so that the same requirements
//! give the same packages until the entry is removed.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::cache::{Cache, CacheError, Key, io_error};
use crate::command::{self, CommandError};
use crate::lock::{Lock, Wheel};
use crate::progress::{Progress, Stage, stage};
use crate::recipe::Recipe;

const KIND: &str = "wheels";
/// The platforms of wheels that may be used. Their C library is older than Debian's.
const PLATFORMS: [&str; 4] = [
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "linux_x86_64",
];
/// Variables of the caller's environment that pip gets: the location of its settings, and its
/// index.
const PIP: [&str; 8] = [
    "HOME",
    "PIP_CONFIG_FILE",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_TRUSTED_HOST",
    "PIP_CERT",
    "PIP_PROXY",
];

/// Why the Python packages could not be provided.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WheelsError {
    /// The recipe's packages hold no Python.
    #[error(
        "recipe {recipe} has no Python to give packages to: add python3.11-minimal, say, to its packages"
    )]
    NoPython {
        /// The recipe's name.
        recipe: String,
    },
    /// This machine has no pip.
    #[error("Python packages are fetched by pip: sudo apt-get install -y python3-pip")]
    NoPip(#[source] CommandError),
    /// The text is not the name of a package, with optional versions.
    #[error("{0:?}: give a Python package as numpy or numpy==2.2.0")]
    Requirement(String),
    /// pip found no wheels that satisfy all requirements, or could not fetch them.
    #[error("pip found no wheels for {}", requirements.join(" "))]
    Pip {
        /// The requirements.
        requirements: Vec<String>,
        /// pip's error.
        source: CommandError,
    },
    /// A wheel differs from the lock.
    #[error("{file} is not the file that the recipe's lock has: run `hearth image lock`")]
    Other {
        /// The wheel's name.
        file: String,
    },
    /// A file operation in the cache failed.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

/// Wheels in the cache.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wheels {
    paths: Vec<PathBuf>,
    files: Vec<Wheel>,
}

impl Wheels {
    pub(crate) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Returns the name and hash of each wheel, sorted by name.
    pub(crate) fn files(&self) -> &[Wheel] {
        &self.files
    }

    fn in_dir(dir: &Path) -> Result<Self, CacheError> {
        let entries = fs::read_dir(dir).map_err(io_error("read", dir))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".whl"))
            .collect();
        names.sort();
        let mut wheels = Self::default();
        for file in names {
            let path = dir.join(&file);
            let bytes = fs::read(&path).map_err(io_error("read", &path))?;
            let sha256 = Sha256::digest(bytes)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            wheels.files.push(Wheel { file, sha256 });
            wheels.paths.push(path);
        }
        Ok(wheels)
    }
}

/// Returns the requirements for pip: the lock's versions, and the additional packages.
fn requirements(recipe: &Recipe, lock: &Lock) -> Vec<String> {
    let locked = lock.wheels.iter().filter_map(|wheel| {
        let mut parts = wheel.file.split('-');
        Some(format!("{}=={}", parts.next()?, parts.next()?))
    });
    locked.chain(recipe.extra.iter().cloned()).collect()
}

fn entry_name(requirements: &[String], python: &str) -> String {
    let key = Key::default().part("python", python.as_bytes());
    let words = requirements.iter();
    words
        .fold(key, |key, word| key.part("", word.as_bytes()))
        .name()
}

/// Returns the recipe's wheels if they are in the cache, or if the recipe has none.
pub(crate) fn cached(cache: &Cache, recipe: &Recipe, lock: &Lock) -> Option<Wheels> {
    let wanted = requirements(recipe, lock);
    if wanted.is_empty() {
        return Some(Wheels::default());
    }
    let wheels = cache.entry(KIND, &entry_name(&wanted, lock.python()?))?;
    checked(Wheels::in_dir(&wheels).ok()?, lock).ok()
}

/// Returns the recipe's wheels, fetched if they are not in the cache.
pub(crate) fn get(
    cache: &Cache,
    recipe: &Recipe,
    lock: &Lock,
    progress: &dyn Progress,
) -> Result<Wheels, WheelsError> {
    if let Some(wheels) = cached(cache, recipe, lock) {
        return Ok(wheels);
    }
    let python = python_of(recipe, lock)?;
    let wanted = requirements(recipe, lock);
    let build = cache.lock(KIND, progress)?;
    let scratch = cache.scratch(&build)?;
    let made = scratch.path().join("entry");
    let fetched = stage(progress, Stage::Wheels, || fetch(&wanted, python, &made))?;
    checked(fetched, lock)?;
    let entry = cache.publish(KIND, &entry_name(&wanted, python), &made)?;
    checked(Wheels::in_dir(&entry)?, lock)
}

/// Resolves the requirements in the recipe's text to the current versions.
pub(crate) fn resolve(
    recipe: &Recipe,
    lock: &Lock,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Vec<Wheel>, WheelsError> {
    if recipe.text.python.is_empty() {
        return Ok(Vec::new());
    }
    let python = python_of(recipe, lock)?;
    let fetched = stage(progress, Stage::Wheels, || {
        fetch(&recipe.text.python, python, scratch)
    })?;
    Ok(fetched.files)
}

fn python_of<'a>(recipe: &Recipe, lock: &'a Lock) -> Result<&'a str, WheelsError> {
    lock.python().ok_or_else(|| WheelsError::NoPython {
        recipe: recipe.name().to_owned(),
    })
}

fn checked(wheels: Wheels, lock: &Lock) -> Result<Wheels, WheelsError> {
    for wanted in &lock.wheels {
        if !wheels.files.contains(wanted) {
            let file = wanted.file.clone();
            return Err(WheelsError::Other { file });
        }
    }
    Ok(wheels)
}

/// Fetches the wheels that pip selects into `dir`.
fn fetch(requirements: &[String], python: &str, dir: &Path) -> Result<Wheels, WheelsError> {
    if let Some(wrong) = requirements.iter().find(|text| !is_requirement(text)) {
        return Err(WheelsError::Requirement(wrong.clone()));
    }
    let pip = || {
        let mut pip = command::fetcher("python3");
        command::keep(&mut pip, &PIP);
        // Isolated mode: no modules of the working directory or the user, and no Python variables.
        pip.args(["-I", "-m", "pip"]);
        pip.args(["--disable-pip-version-check", "--no-input"]);
        pip
    };
    command::run(pip().arg("--version"), |_| {}).map_err(WheelsError::NoPip)?;
    let mut download = pip();
    download
        .args([
            "download",
            "--quiet",
            "--no-cache-dir",
            "--only-binary=:all:",
        ])
        .args(["--implementation", "cp", "--python-version", python])
        .args(
            PLATFORMS
                .iter()
                .flat_map(|platform| ["--platform", platform]),
        )
        .arg("--dest")
        .arg(dir)
        .arg("--")
        .args(requirements);
    command::run(&mut download, |_| {}).map_err(|source| WheelsError::Pip {
        requirements: requirements.to_vec(),
        source,
    })?;
    Ok(Wheels::in_dir(dir)?)
}

/// Returns whether the text is a name, with optional extras and versions. Paths, addresses and
/// options are refused.
fn is_requirement(text: &str) -> bool {
    let letters = |c: char| c.is_ascii_alphanumeric() || "-_.,[]<>=!~+*".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(letters)
        && !text.ends_with(".whl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_is_a_name_and_versions() {
        for good in ["numpy", "numpy==2.2.0", "a[b]>=1,<2", "six~=1.16"] {
            assert!(is_requirement(good), "{good}");
        }
        for bad in [
            "",
            "-r",
            "./numpy",
            "https://m.example/a.whl",
            "a @ file:/b",
            "a.whl",
            "a b",
        ] {
            assert!(!is_requirement(bad), "{bad}");
        }
    }

    #[test]
    fn the_lock_s_versions_are_asked_for_and_no_other_file_is_taken() {
        let mut recipe = Recipe::built_in("python").unwrap();
        let mut lock = recipe.lock.take().unwrap();
        assert!(requirements(&recipe, &lock).is_empty());
        let file = "numpy-2.2.0-cp311-cp311-manylinux_2_17_x86_64.whl".to_owned();
        lock.wheels.push(Wheel {
            file,
            sha256: "ab".to_owned(),
        });
        let recipe = recipe.python_package("six");
        assert_eq!(requirements(&recipe, &lock), ["numpy==2.2.0", "six"]);
        let mut wheels = Wheels {
            paths: Vec::new(),
            files: lock.wheels.clone(),
        };
        assert!(checked(wheels.clone(), &lock).is_ok());
        wheels.files[0].sha256 = "cd".to_owned();
        assert!(matches!(
            checked(wheels, &lock),
            Err(WheelsError::Other { .. })
        ));
    }
}
