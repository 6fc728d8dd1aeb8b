//! The image's Python: its packages, and its library compiled by its own program.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::tree_root::TreeRoot;
use super::{RootError, confine, rules, unpack};
use crate::cache::io_error;
use crate::command::{self, CommandError};

/// The file itself: the name that programs know is a link to it from the root, which is another
/// here.
const LINKER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Where Debian's Python looks for packages that are not Debian's.
fn packages_in(version: &str) -> PathBuf {
    PathBuf::from(format!("/usr/local/lib/python{version}/dist-packages"))
}

/// Unpacks Python packages where the image's Python finds them.
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

/// Compiles all modules, so that no guest has to. Their sources are not looked at again: they do
/// not change.
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
        // Packages carry files for other versions of Python; those stay as they are.
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

/// It sees the tree where the tree is on this machine. What it writes is the same.
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
    // Tracebacks name files as the guest does.
    python.args(["-p", "/", "-s"]).arg(tree.path());
    python.arg(tree.path().join(dir));
    Ok(python)
}

/// It is led by nothing but its own library, and not by chance.
fn settle(python: &mut Command, home: &Path) {
    python
        .args(["-B", "-S", "-s", "-m", "compileall", "-q", "-f"])
        .arg("--invalidation-mode=unchecked-hash")
        // Modules are its own alone. As a variable, for Pythons before 3.11 have no such option.
        .env("PYTHONSAFEPATH", "1")
        .env("PYTHONHOME", home)
        .env("PYTHONHASHSEED", "0");
}
