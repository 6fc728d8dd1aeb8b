//! `hearth image`: builds and finds the files that guests boot from.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use hearth_images::{Images, ImagesError, ImportError, Recipe, RecipeError, RootError};

use crate::failure::failed;
use crate::progress;

/// Builds and finds guest images
///
/// Everything is built on this machine and kept in $XDG_CACHE_HOME/hearth or ~/.cache/hearth under
/// the hash of what it was built from. The first kernel takes minutes and downloads its source
/// (150 MB) with apt; root is not needed.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Builds an image unless it is cached, and prints the paths of its files
    Build {
        #[command(flatten)]
        image: Image,
    },
    /// Makes an EROFS image of a directory or tar archive, for `hearth run --root`
    ///
    /// All files belong to root. `docker export NAME > NAME.tar` writes such an archive.
    Import {
        /// The root file system: a directory or a tar archive, compressed or not
        source: PathBuf,
        /// The image to be written
        output: PathBuf,
    },
    /// Lists the images, their sizes and where they are cached
    List,
    /// Pins the packages of a recipe to what Debian has now, in a file beside it
    ///
    /// For a recipe of Hearth's own, recipe and lock are written into the working directory.
    Lock {
        /// The recipe: a name, or a path with a slash or the suffix .toml
        recipe: String,
    },
    /// Prints the paths of an image's files; fails if it is not cached
    Path {
        #[command(flatten)]
        image: Image,
    },
}

/// Which image is meant.
#[derive(Debug, clap::Args)]
pub(crate) struct Image {
    /// kernel: the guest kernel alone; base: the kernel, and an initramfs with the agent and its
    /// small built-in programs; javascript, python, shell: root file systems; else one by the
    /// path of its recipe (with a slash or the suffix .toml)
    #[arg(value_name = "NAME", value_parser = name)]
    name: Name,
    /// Adds a Python package to a root file system; may be repeated
    #[arg(long, value_name = "NAME[==VERSION]")]
    package: Vec<String>,
}

#[derive(Debug, Clone)]
enum Name {
    Kernel,
    Base,
    Root(String),
}

fn name(text: &str) -> Result<Name, String> {
    Ok(match text {
        "kernel" => Name::Kernel,
        "base" => Name::Base,
        // Wrong names are refused before any work is done; files are only read when they are
        // needed.
        name if name.contains('/') || name.ends_with(".toml") || Recipe::built_in(name).is_ok() => {
            Name::Root(name.to_owned())
        }
        _ => {
            let recipes = Recipe::built_in_names().collect::<Vec<_>>().join(", ");
            return Err(format!(
                "no such image; there are kernel, base, {recipes}, and recipes in files (./NAME.toml)"
            ));
        }
    })
}

#[derive(Debug, thiserror::Error)]
enum ImageError {
    #[error(transparent)]
    Images(#[from] ImagesError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error("--package is for root file systems with Python, such as python")]
    NoPackages,
    #[error("image {0} is not cached; build it with: hearth image build {0}")]
    NotCached(String),
}

impl From<RecipeError> for ImageError {
    fn from(error: RecipeError) -> Self {
        Self::Images(RootError::from(error).into())
    }
}

pub(crate) fn image(command: &Command) -> ExitCode {
    match act(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn act(command: &Command) -> Result<(), ImageError> {
    if let Command::Import { source, output } = command {
        hearth_images::import(source, output)?;
        return Ok(());
    }
    let images = Images::open(None)?;
    let paths = match command {
        Command::Build { image } => build(&images, image)?,
        Command::Path { image } => path(&images, image)?,
        Command::Lock { recipe } => {
            vec![images.lock(recipe, progress::on_stderr().as_ref())?]
        }
        Command::List | Command::Import { .. } => {
            list(&images);
            Vec::new()
        }
    };
    for path in paths {
        println!("{}", path.display());
    }
    Ok(())
}

impl Image {
    fn recipe(&self, name: &str) -> Result<Recipe, RecipeError> {
        let packages = self.package.iter();
        Ok(packages.fold(Recipe::find(name)?, Recipe::python_package))
    }

    /// The image as it was given on the command line.
    fn words(&self) -> String {
        let name = match &self.name {
            Name::Kernel => "kernel",
            Name::Base => "base",
            Name::Root(name) => name,
        };
        let packages = self.package.iter();
        packages.fold(name.to_owned(), |words, package| {
            format!("{words} --package {package}")
        })
    }

    fn without_packages(&self) -> Result<(), ImageError> {
        match self.package.is_empty() {
            true => Ok(()),
            false => Err(ImageError::NoPackages),
        }
    }
}

fn build(images: &Images, image: &Image) -> Result<Vec<PathBuf>, ImageError> {
    let progress = progress::on_stderr();
    Ok(match &image.name {
        Name::Kernel => {
            image.without_packages()?;
            vec![images.kernel(progress.as_ref())?]
        }
        Name::Base => {
            image.without_packages()?;
            let guest = images.base(progress.as_ref())?;
            vec![guest.kernel, guest.initramfs]
        }
        Name::Root(name) => vec![images.root(&image.recipe(name)?, progress.as_ref())?],
    })
}

fn path(images: &Images, image: &Image) -> Result<Vec<PathBuf>, ImageError> {
    let cached = images.cached();
    let found = match &image.name {
        Name::Kernel => cached.kernel.map(|kernel| vec![kernel]),
        Name::Base => cached
            .kernel
            .zip(cached.initramfs)
            .map(|(kernel, initramfs)| vec![kernel, initramfs]),
        Name::Root(name) => {
            let root = images.cached_root(&image.recipe(name)?);
            root.map(|root| vec![root])
        }
    };
    found.ok_or_else(|| ImageError::NotCached(image.words()))
}

fn list(images: &Images) {
    let cached = images.cached();
    let line = |name: &str, path: Option<PathBuf>| match path {
        Some(path) => println!("{name:<12} {:>6} {}", size(&path), path.display()),
        None => println!("{name:<12} not cached; build it with: hearth image build {name}"),
    };
    line("kernel", cached.kernel.clone());
    // Listed as cached only if both files are.
    line("base", cached.kernel.and(cached.initramfs));
    let own = Recipe::built_in_names().filter_map(|name| Recipe::built_in(name).ok());
    let own: Vec<_> = own
        .map(|recipe| (recipe.name().to_owned(), images.cached_root(&recipe)))
        .collect();
    for (name, path) in &own {
        line(name, path.clone());
    }
    // Also the cached images with packages, of recipes in files, and of earlier recipes.
    let known = |path: &PathBuf| own.iter().any(|(_, own)| own.as_ref() == Some(path));
    for root in cached.roots.into_iter().filter(|root| !known(&root.path)) {
        line(&root.name, Some(root.path));
    }
}

/// The size of a file in MiB, rounded up.
fn size(path: &std::path::Path) -> String {
    let bytes = path.metadata().map_or(0, |data| data.len());
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
