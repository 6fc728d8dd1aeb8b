//! `hearth image`: builds and finds what guests boot from.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use hearth_images::{Images, ImagesError};

use crate::FAILED;
use crate::failure::failed;
use crate::progress;

/// Builds and finds guest images
///
/// Everything is built from source on this machine and kept in $XDG_CACHE_HOME/hearth or
/// ~/.cache/hearth under the hash of what it was built from. The first kernel takes minutes and
/// downloads its source (150 MB) with apt; root is not needed.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Builds an image unless it is cached, and prints the paths of its files
    Build {
        /// The image
        name: Name,
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
    /// Lists the images and where they are cached
    List,
    /// Prints the paths of an image's files; fails if it is not cached
    Path {
        /// The image
        name: Name,
    },
}

/// An image by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// The guest kernel alone
    Kernel,
    /// The guest kernel, and an initramfs that holds the agent and its small built-in programs
    Base,
}

pub(crate) fn image(command: &Command) -> ExitCode {
    let images = match Images::open(None) {
        Ok(images) => images,
        Err(error) => return failed(&error),
    };
    match command {
        Command::Build { name } => match build(&images, *name) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::Import { source, output } => match hearth_images::import(source, output) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::List => {
            list(&images);
            ExitCode::SUCCESS
        }
        Command::Path { name } => path(&images, *name),
    }
}

fn build(images: &Images, name: Name) -> Result<(), ImagesError> {
    let progress = progress::on_stderr();
    match name {
        Name::Kernel => println!("{}", images.kernel(progress.as_ref())?.display()),
        Name::Base => {
            let guest = images.base(progress.as_ref())?;
            println!("{}\n{}", guest.kernel.display(), guest.initramfs.display());
        }
    }
    Ok(())
}

fn list(images: &Images) {
    let cached = images.cached();
    let line = |name: &str, path: Option<&Path>| match path {
        Some(path) => println!("{name:<8} {}", path.display()),
        None => println!("{name:<8} not cached; build it with: hearth image build {name}"),
    };
    line("kernel", cached.kernel.as_deref());
    // Both halves or nothing.
    let base = cached.kernel.and(cached.initramfs);
    line("base", base.as_deref());
}

fn path(images: &Images, name: Name) -> ExitCode {
    let cached = images.cached();
    let paths = match name {
        Name::Kernel => cached.kernel.map(|kernel| vec![kernel]),
        Name::Base => cached
            .kernel
            .zip(cached.initramfs)
            .map(|(kernel, initramfs)| vec![kernel, initramfs]),
    };
    let Some(paths) = paths else {
        let name = match name {
            Name::Kernel => "kernel",
            Name::Base => "base",
        };
        eprintln!("hearth: image {name} is not cached; build it with: hearth image build {name}");
        return ExitCode::from(FAILED);
    };
    for path in paths {
        println!("{}", path.display());
    }
    ExitCode::SUCCESS
}
