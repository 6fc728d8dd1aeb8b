//! The image's Python works on the image's files: its own program does what its packages' scripts would have it do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{RootError, tree};
use crate::cache::io_error;
use crate::command::{self, CommandError};

/// Where Debian's Python looks for packages that are not Debian's.
fn packages_in(tree: &Path, version: &str) -> PathBuf {
    tree.join(format!("usr/local/lib/python{version}/dist-packages"))
}

/// Unpacks Python packages where the image's Python finds them.
pub(super) fn install(
    tree: &Path,
    version: Option<&str>,
    wheels: &[PathBuf],
) -> Result<(), RootError> {
    let Some(version) = version.filter(|_| !wheels.is_empty()) else {
        return Ok(());
    };
    let packages = packages_in(tree, version);
    tree::make_dirs(&packages)?;
    for wheel in wheels {
        let mut unpack = interpreter(tree, version);
        unpack
            .args(["-m", "zipfile", "-e"])
            .arg(wheel)
            .arg(&packages);
        command::run(&mut unpack, |_| {}).map_err(RootError::Unpack)?;
    }
    spread(&packages)
}

/// Parts of a wheel for several places come in a directory `NAME.data`: those for this place are moved to it, others
/// (programs, headers) are dropped.
fn spread(packages: &Path) -> Result<(), RootError> {
    let entries = fs::read_dir(packages).map_err(io_error("read", packages))?;
    let mut data: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    data.retain(|path| path.extension().is_some_and(|suffix| suffix == "data") && path.is_dir());
    data.sort();
    for dir in data {
        for part in ["purelib", "platlib"].map(|part| dir.join(part)) {
            if part.is_dir() {
                let mut copy = command::open_handed("cp");
                copy.args(["--recursive", "--no-target-directory"])
                    .arg(&part)
                    .arg(packages);
                command::run(&mut copy, |_| {}).map_err(RootError::Unpack)?;
            }
        }
        fs::remove_dir_all(&dir).map_err(io_error("remove", &dir))?;
    }
    Ok(())
}

/// Compiles all modules, so that no guest has to. Their sources are not looked at again: they do not change.
pub(super) fn compile(tree: &Path, version: Option<&str>) -> Result<(), RootError> {
    let Some(version) = version else {
        return Ok(());
    };
    let modules = |dir: &Path| {
        let mut compile = interpreter(tree, version);
        compile
            .args([
                "-m",
                "compileall",
                "-q",
                "-f",
                "--invalidation-mode=unchecked-hash",
            ])
            // Tracebacks name files as the guest does.
            .args(["-p", "/", "-s"])
            .arg(tree)
            .arg(dir);
        command::run(&mut compile, |_| {})
    };
    let failed = |source| RootError::Tool {
        tool: "Python",
        source,
    };
    modules(&tree.join(format!("usr/lib/python{version}"))).map_err(failed)?;
    let packages = packages_in(tree, version);
    match packages.is_dir().then(|| modules(&packages)) {
        // Packages carry files for other versions of Python; those stay as they are.
        None | Some(Ok(()) | Err(CommandError::Failed { .. })) => Ok(()),
        Some(Err(error)) => Err(failed(error)),
    }
}

/// The image's Python with the image's libraries. It leaves nothing in the image, and is not led by this machine's
/// settings or by chance.
fn interpreter(tree: &Path, version: &str) -> Command {
    let mut python = command::open_handed(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    python
        .arg("--library-path")
        .arg(tree.join("usr/lib/x86_64-linux-gnu"))
        .arg(tree.join(format!("usr/bin/python{version}")))
        .args(["-B", "-S", "-s"])
        .env_clear()
        // Modules are its own alone. As a variable, for Pythons before 3.11 have no such option.
        .env("PYTHONSAFEPATH", "1")
        .env("PYTHONHOME", tree.join("usr"))
        .env("PYTHONHASHSEED", "0");
    python
}
