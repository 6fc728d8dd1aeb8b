//! Recipes of root file systems, which are written by hand, and their locks, which pin each package
//! by its hash.

mod text;

use std::fs;
use std::path::{Path, PathBuf};

use crate::lock::Lock;

pub(crate) use text::Text;

/// Built-in recipes: name, recipe, lock.
const BUILT_IN: &[(&str, &str, &str)] = &[
    (
        "javascript",
        include_str!("../../recipes/javascript.toml"),
        include_str!("../../recipes/javascript.lock"),
    ),
    (
        "python",
        include_str!("../../recipes/python.toml"),
        include_str!("../../recipes/python.lock"),
    ),
    (
        "shell",
        include_str!("../../recipes/shell.toml"),
        include_str!("../../recipes/shell.lock"),
    ),
];
/// The size limit of recipes and of their files: more would be a mistake.
const MAX_BYTES: u64 = 16 << 20;

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// No built-in recipe has the name.
    #[error(
        "no recipe is named {name}; there are {}, and those in files (./NAME.toml)",
        Recipe::built_in_names().collect::<Vec<_>>().join(", ")
    )]
    Unknown {
        /// The name as given.
        name: String,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The recipe, its lock, or a file that it names.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not valid TOML of a recipe or lock.
    #[error("{what} is not as it should be")]
    Parse {
        /// The recipe or lock.
        what: String,
        /// The position and the error.
        source: Box<toml::de::Error>,
    },
    /// A value is not valid.
    #[error("recipe {recipe}: {problem}")]
    Invalid {
        /// The recipe's name.
        recipe: String,
        /// What is wrong, and what is valid.
        problem: String,
    },
    /// There is no lock, or it was made for other packages.
    #[error(
        "the packages of recipe {recipe} are not pinned ({why}): run `hearth image lock {}`",
        file.as_deref().map_or_else(|| recipe.clone(), |file| file.display().to_string())
    )]
    Unlocked {
        /// The recipe's name.
        recipe: String,
        /// Its file, unless the recipe is built in.
        file: Option<PathBuf>,
        /// What is wrong with the lock.
        why: &'static str,
    },
}

/// The description of a root file system: Debian packages, and changes of their files.
///
/// ```toml
/// name = "tool"
/// suite = "bookworm"                   # of Debian; the component is main
/// packages = ["jq", "libc6=2.36-9"]    # with all that they depend on
/// leave_out = ["perl-base"]            # taken for installed, as what only it depends on
/// applets = true                       # links to busybox for programs that no package has
/// remove = ["/usr/share/jq"]
/// python = ["numpy==2.2.0"]            # wheels, into the packages of the image's Python
/// commands = ["jq --version"]          # by the image's /bin/sh, as its root, without network
///
/// [[file]]
/// path = "/etc/motd"                   # and one of:
/// content = "hello\n"
/// # source = "motd"                    # a file beside the recipe
/// # link = "issue"
/// mode = 0o644
///
/// [[user]]
/// name = "user"
/// uid = 1000                           # home /home/user, which is the user's
/// ```
///
/// The lock is a file beside the recipe with the suffix `.lock`, written by
/// [`Images::lock`](crate::Images::lock).
#[derive(Debug, Clone)]
pub struct Recipe {
    pub(crate) text: Text,
    /// The file that the recipe was read from.
    pub(crate) file: Option<PathBuf>,
    pub(crate) lock: Option<Lock>,
    /// Python packages that were requested in addition to the recipe's.
    pub(crate) extra: Vec<String>,
}

impl Recipe {
    /// Returns the names of the built-in recipes.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, ..)| *name)
    }

    /// Returns the built-in recipe with that name.
    ///
    /// # Errors
    /// [`RecipeError::Unknown`].
    pub fn built_in(name: &str) -> Result<Self, RecipeError> {
        let (_, text, lock) = BUILT_IN
            .iter()
            .find(|(known, ..)| *known == name)
            .ok_or_else(|| RecipeError::Unknown {
                name: name.to_owned(),
            })?;
        let mut recipe = Self::parse(text, name, Path::new(""))?;
        recipe.lock = Some(Lock::parse(lock, name)?);
        Ok(recipe)
    }

    /// Reads a recipe and, if it exists, its lock.
    ///
    /// # Errors
    /// [`RecipeError`]. A missing lock is an error only when the recipe is built.
    pub fn read(file: &Path) -> Result<Self, RecipeError> {
        let shown = file.display().to_string();
        let text = read_text(file)?;
        let dir = file.parent().unwrap_or(Path::new(""));
        let mut recipe = Self::parse(&text, &shown, dir)?;
        let lock = file.with_extension("lock");
        if lock.exists() {
            let text = read_text(&lock)?;
            recipe.lock = Some(Lock::parse(&text, &lock.display().to_string())?);
        }
        recipe.file = Some(file.to_owned());
        Ok(recipe)
    }

    /// Finds a built-in recipe by its name, or reads a recipe from a path. An argument with a slash
    /// or the suffix `.toml` is a path.
    ///
    /// Those of [`Recipe::built_in`] or [`Recipe::read`].
    /// As [`Recipe::built_in`] or [`Recipe::read`].
    pub fn find(name_or_path: &str) -> Result<Self, RecipeError> {
        if name_or_path.contains('/') || name_or_path.ends_with(".toml") {
            Self::read(Path::new(name_or_path))
        } else {
            Self::built_in(name_or_path)
        }
    }

    /// Adds a Python package, such as `numpy` or `numpy==2.2.0`, and its dependencies, as wheels.
    /// The version of a bare name is chosen by the first build, and then kept by this machine's
    /// cache.
    #[must_use]
    pub fn python_package(mut self, requirement: impl Into<String>) -> Self {
        self.extra.push(requirement.into());
        self
    }

    /// Returns the recipe's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.text.name
    }

    /// Returns the text of a built-in recipe.
    pub(crate) fn built_in_text(name: &str) -> Option<&'static str> {
        let found = BUILT_IN.iter().find(|(known, ..)| *known == name)?;
        Some(found.1)
    }

    fn parse(text: &str, what: &str, dir: &Path) -> Result<Self, RecipeError> {
        let mut text: Text = toml::from_str(text).map_err(|source| RecipeError::Parse {
            what: what.to_owned(),
            source: Box::new(source),
        })?;
        if let Some(problem) = text.problem() {
            return Err(RecipeError::Invalid {
                recipe: what.to_owned(),
                problem,
            });
        }
        for file in &mut text.files {
            if let Some(source) = &file.source {
                file.bytes = read(&dir.join(source))?;
            }
        }
        Ok(Self {
            text,
            file: None,
            lock: None,
            extra: Vec::new(),
        })
    }

    /// Returns the lock, if it is for the packages of this recipe.
    pub(crate) fn locked(&self) -> Result<&Lock, RecipeError> {
        let unlocked = |why| RecipeError::Unlocked {
            recipe: self.text.name.clone(),
            file: self.file.clone(),
            why,
        };
        let lock = self.lock.as_ref().ok_or_else(|| unlocked("no lock"))?;
        if lock.asked != self.text.asked() {
            return Err(unlocked("its lock is for others"));
        }
        Ok(lock)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, RecipeError> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
        .map_err(|source| RecipeError::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}

fn read_text(path: &Path) -> Result<String, RecipeError> {
    String::from_utf8(read(path)?).map_err(|error| RecipeError::Read {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Recipe, RecipeError> {
        Recipe::parse(text, "test", Path::new("/nowhere"))
    }

    const LEAST: &str = "name = 'a'\nsuite = 'bookworm'\npackages = ['jq']\n";

    #[test]
    fn each_recipe_of_this_crate_is_in_order_and_locked() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut there: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| Some(name.strip_suffix(".toml")?.to_owned()))
            .collect();
        there.sort();
        let mut names: Vec<&str> = Recipe::built_in_names().collect();
        names.sort_unstable();
        assert_eq!(names, there);
        for name in names {
            let recipe = Recipe::built_in(name).unwrap();
            assert_eq!(recipe.name(), name);
            let lock = recipe.locked().unwrap();
            assert!(!lock.packages.is_empty());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        parsed(LEAST).unwrap();
        let wrong = [
            ("name = 'base'\nsuite = 'bookworm'\npackages = []", "taken"),
            ("name = 'a'\nsuite = 'book worm'\npackages = []", "suite"),
            ("name = 'a'\nsuite = 'b'\npackages = ['-o=x']", "-o=x"),
            (
                "name = 'a'\nsuite = 'b'\npackages = []\nremove = ['/../etc']",
                "without . and ..",
            ),
            (
                "name = 'a'\nsuite = 'b'\npackages = []\n[[file]]\npath = '/a'",
                "one of content",
            ),
            (
                "name = 'a'\nsuite = 'b'\npackages = []\n[[file]]\npath = '/a'\nlink = 'b'\ncontent = ''",
                "one of content",
            ),
            (
                "name = 'a'\nsuite = 'b'\npackages = []\n[[user]]\nname = 'root'\nuid = 0",
                "from 1 up",
            ),
        ];
        for (text, said) in wrong {
            let error = parsed(text).unwrap_err();
            assert!(error.to_string().contains(said), "{text}: {error}");
        }
        let error = parsed(&format!("{LEAST}no_such = 1")).unwrap_err();
        assert!(matches!(error, RecipeError::Parse { .. }), "{error}");
        let error = parsed(&format!("{LEAST}[[file]]\npath = '/a'\nsource = 'none'")).unwrap_err();
        assert!(matches!(error, RecipeError::Read { .. }), "{error}");
    }

    #[test]
    fn a_build_wants_a_lock_for_these_packages() {
        let recipe = parsed(LEAST).unwrap();
        let error = recipe.locked().unwrap_err().to_string();
        assert!(error.contains("hearth image lock a"), "{error}");
        let mut other = Recipe::built_in("python").unwrap();
        other.locked().unwrap();
        other.text.packages.push("jq".to_owned());
        let error = other.locked().unwrap_err().to_string();
        assert!(error.contains("for others"), "{error}");
    }

    #[test]
    fn a_name_that_is_unknown_is_told_the_known_ones() {
        let error = Recipe::find("pyhton").unwrap_err().to_string();
        assert!(error.contains("python"), "{error}");
        assert!(matches!(
            Recipe::find("./none.toml"),
            Err(RecipeError::Read { .. })
        ));
    }

    #[test]
    fn the_key_tells_every_difference() {
        let base = parsed(LEAST).unwrap().text.key().name();
        for more in [
            "applets = true",
            "remove = ['/a']",
            "commands = ['/a']",
            "[[file]]\npath = '/a'\nlink = 'b'",
            "[[file]]\npath = '/a'\ncontent = 'b'",
            "[[user]]\nname = 'b'\nuid = 1",
        ] {
            let other = parsed(&format!("{LEAST}{more}")).unwrap().text;
            assert_ne!(base, other.key().name(), "{more}");
        }
        let asked = parsed(LEAST).unwrap().text.asked();
        for more in ["leave_out = ['a']", "python = ['a']"] {
            assert_ne!(
                asked,
                parsed(&format!("{LEAST}{more}")).unwrap().text.asked()
            );
        }
    }
}
