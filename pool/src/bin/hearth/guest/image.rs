//! The root file system of a guest, and how much memory that needs.

use std::path::PathBuf;

use hearth_images::{Images, Recipe, RecipeError};
use hearth_vmm::DEFAULT_MEMORY_MIB;

use super::RunError;
use crate::progress;

/// The image without a root file system.
const BASE: &str = "base";
/// Memory in MiB of guests with these images, where the default is too little.
const MEMORY: [(&str, u64); 2] = [("python", 256), ("javascript", 512)];

/// An image by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Image {
    Base,
    /// The name of a recipe, or the path of one.
    Root(String),
}

/// Finds an image by name. Wrong names are refused before any work is done; files are only read
/// when they are needed.
pub(crate) fn image(name: &str) -> Result<Image, RecipeError> {
    if name == BASE {
        return Ok(Image::Base);
    }
    if !name.contains('/') && !name.ends_with(".toml") {
        Recipe::built_in(name)?;
    }
    Ok(Image::Root(name.to_owned()))
}

impl Image {
    /// Returns the root file system, if the image has one; it is built if it is not cached.
    pub(crate) fn root(&self, packages: &[String]) -> Result<Option<PathBuf>, RunError> {
        let Self::Root(name) = self else {
            return Ok(None);
        };
        let packages = packages.iter();
        let recipe = packages.fold(Recipe::find(name)?, Recipe::python_package);
        let images = Images::open(None)?;
        let root = images.root(&recipe, progress::on_stderr().as_ref())?;
        Ok(Some(root))
    }

    pub(crate) fn memory_mib(&self) -> u64 {
        let known = MEMORY.iter().find(|(name, _)| match self {
            Self::Base => false,
            Self::Root(root) => root == name,
        });
        known.map_or(DEFAULT_MEMORY_MIB, |(_, mib)| *mib)
    }
}
