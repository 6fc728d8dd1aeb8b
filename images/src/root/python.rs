//! The image's Python: installs its packages, and compiles its library with its own program.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::tree_root::TreeRoot;
use super::{RootError, confine, rules, unpack};
use crate::cache::io_error;
use crate::command::{self, CommandError};

/// The dynamic linker's own file. The name in programs is a link with an absolute path, which does
/// not lead into the tree here.
const LINKER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Returns the directory where Debian's Python looks for packages from elsewhere.
fn packages_in(version: &str) -> PathBuf {
    PathBuf::from(format!("/usr/local/lib/python{version}/dist-packages"))
}

/// Unpacks Python packages into the directory where the image's Python looks for them.
pub(super) fn install(
    tree: &TreeRoot,
    version: Option<&str>,
    wheels: &[PathBuf],
) -> Result<(), RootError> {
    let Some(version) = version else {
        return Ok(());
    };
    let packages = packages_in(version);
    wheels
        .iter()
        .try_for_each(|wheel| unpack::wheel(wheel, tree, &packages))
}

/// Compiles all modules, so that no guest has to. Python does not check compiled modules against
/// their sources, which do not change.
pub(super) fn compile(tree: &TreeRoot, version: Option<&str>) -> Result<(), RootError> {
    let Some(version) = version else {
        return Ok(());
    };
    let namespaces = confine::refused().is_none();
    let modules = |dir: &Path| {
        let mut compile = match namespaces {
            true => in_namespaces(tree, version, dir)?,
            false => by_rules(tree, version, dir)?,
        };
        Ok::<_, RootError>(command::run(&mut compile, |_| {}))
    };
    let failed = |source| RootError::Tool {
        tool: "Python",
        source,
    };
    modules(Path::new(&format!("/usr/lib/python{version}")))?.map_err(failed)?;
    let packages = packages_in(version);
    if !tree.is_dir(&packages) {
        return Ok(());
    }
    match modules(&packages)? {
        // Packages contain files for other versions of Python, which are not compiled.
        Ok(()) | Err(CommandError::Failed { .. }) => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

fn in_namespaces(tree: &TreeRoot, version: &str, dir: &Path) -> Result<Command, RootError> {
    let python = confine::command(tree, &format!("/usr/bin/python{version}"));
    let mut python = python.map_err(io_error("open", tree.path()))?;
    settle(&mut python, Path::new("/usr"));
    python.arg(dir);
    Ok(python)
}

/// Runs Python confined by rules. It sees the tree at its path on this machine, but its output is
/// the same as in namespaces.
fn by_rules(tree: &TreeRoot, version: &str, dir: &Path) -> Result<Command, RootError> {
    let at = |path: &str| tree.path().join(path);
    let mut python =
        rules::command(tree, LINKER).map_err(|source| RootError::NotConfined(Box::new(source)))?;
    python
        .arg("--library-path")
        .arg(at("usr/lib/x86_64-linux-gnu"))
        .arg(at(&format!("usr/bin/python{version}")));
    settle(&mut python, &at("usr"));
    let dir = dir.strip_prefix("/").unwrap_or(dir);
    // Tracebacks name files by their path in the guest.
    python.args(["-p", "/", "-s"]).arg(tree.path());
    python.arg(tree.path().join(dir));
    Ok(python)
}

/// Adds options that exclude influences from outside of Python's own library, and randomness.
fn settle(python: &mut Command, home: &Path) {
    python
        .args(["-B", "-S", "-s", "-m", "compileall", "-q", "-f"])
        .arg("--invalidation-mode=unchecked-hash")
        // Modules come from its own library only. Set as a variable, because Python before 3.11 has
        // no such option.
        .env("PYTHONSAFEPATH", "1")
        .env("PYTHONHOME", home)
        .env("PYTHONHASHSEED", "0");
}
