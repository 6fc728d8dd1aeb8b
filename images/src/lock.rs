//! The lock of a recipe: version, path in the archive, and hash of each package.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cache::{CacheError, Key, io_error};
use crate::recipe::RecipeError;

const HEAD: &str = "# Written by `hearth image lock`: run it again instead of editing this.\n\n";

/// The result of resolving a recipe's packages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    /// The hash of the recipe's requirements.
    pub(crate) asked: String,
    #[serde(rename = "package")]
    pub(crate) packages: Vec<Package>,
    #[serde(default, rename = "wheel", skip_serializing_if = "Vec::is_empty")]
    pub(crate) wheels: Vec<Wheel>,
}

/// A Debian package. The lock lists packages in the order of installation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// The path in the archive, escaped as in URLs.
    pub(crate) path: String,
    pub(crate) sha256: String,
}

/// A Python package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wheel {
    /// The file name, which contains name, version and platform.
    pub(crate) file: String,
    pub(crate) sha256: String,
}

impl Lock {
    pub(crate) fn parse(text: &str, what: &str) -> Result<Self, RecipeError> {
        let lock: Self = toml::from_str(text).map_err(|source| RecipeError::Parse {
            what: format!("the lock of {what}"),
            source: Box::new(source),
        })?;
        // The hashes are used as file names.
        let is_hash =
            |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match lock
            .packages
            .iter()
            .find(|package| !is_hash(&package.sha256))
        {
            Some(package) => Err(RecipeError::Invalid {
                recipe: what.to_owned(),
                problem: format!("the lock has no SHA-256 of {}", package.name),
            }),
            None => Ok(lock),
        }
    }

    /// Replaces the file atomically. Writes to an unpredictable name first, because others could
    /// place links in the directory.
    pub(crate) fn write(&self, path: &Path) -> Result<(), CacheError> {
        let dir = path.parent().filter(|dir| *dir != Path::new(""));
        let write = || {
            let text = toml::to_string(self).map_err(io::Error::other)?;
            let readable = fs::Permissions::from_mode(0o644);
            let mut part = tempfile::Builder::new()
                .permissions(readable)
                .tempfile_in(dir.unwrap_or(Path::new(".")))?;
            part.write_all(format!("{HEAD}{text}").as_bytes())?;
            part.persist(path)?;
            Ok(())
        };
        write().map_err(io_error("write", path))
    }

    pub(crate) fn add_to(&self, key: Key) -> Key {
        self.packages.iter().fold(key, |key, package| {
            key.part("package", package.sha256.as_bytes())
        })
    }

    /// Returns the version of Python among the packages, such as `3.11`.
    pub(crate) fn python(&self) -> Option<&str> {
        self.packages.iter().find_map(|package| {
            let version = package
                .name
                .strip_prefix("python")?
                .strip_suffix("-minimal")?;
            version.contains('.').then_some(version)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_read_as_it_was_written() {
        let package = |name: &str| Package {
            name: name.to_owned(),
            version: "1:2.3-4+b5~x".to_owned(),
            path: "pool/main/p/x_2.3-4%2bb5%7ex_all.deb".to_owned(),
            sha256: "00".repeat(32),
        };
        let lock = Lock {
            asked: "ab".to_owned(),
            packages: vec![package("python3-minimal"), package("python3.11-minimal")],
            wheels: Vec::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it.lock");
        lock.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# Written by"));
        assert_eq!(Lock::parse(&text, "it").unwrap(), lock);
        assert_eq!(lock.python(), Some("3.11"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        // The target of a link is not changed.
        let other = dir.path().join("other");
        fs::write(&other, "precious").unwrap();
        fs::remove_file(&path).unwrap();
        for link in [&path, &dir.path().join("it.lock.part")] {
            std::os::unix::fs::symlink(&other, link).unwrap();
        }
        lock.write(&path).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert!(Lock::parse("asked = 1", "it").is_err());
        let error = Lock::parse(&text.replacen("00", "../", 1), "it").unwrap_err();
        assert!(error.to_string().contains("SHA-256"), "{error}");
    }
}
