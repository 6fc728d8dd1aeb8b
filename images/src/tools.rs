//! The Debian packages that builds need on this machine, and the command that installs them.

use std::path::{Path, PathBuf};

use crate::command;

/// The file that shows that a package is installed.
#[derive(Debug, Clone, Copy)]
enum Sign {
    /// A program in `PATH`.
    Program(&'static str),
    /// A header in one of the compiler's default directories.
    Header(&'static str),
}

/// The Debian package of each sign. Missing packages are reported in this order.
const NEEDS: &[(Sign, &str)] = &[
    (Sign::Program("apt-get"), "apt"),
    (Sign::Program("dpkg-deb"), "dpkg"),
    (Sign::Program("tar"), "tar"),
    (Sign::Program("xz"), "xz-utils"),
    (Sign::Program("patch"), "patch"),
    (Sign::Program("make"), "make"),
    (Sign::Program("gcc"), "gcc"),
    (Sign::Program("ld"), "binutils"),
    (Sign::Program("strip"), "binutils"),
    (Sign::Program("flex"), "flex"),
    (Sign::Program("bison"), "bison"),
    (Sign::Program("bc"), "bc"),
    (Sign::Header("stdio.h"), "libc6-dev"),
    // For objtool, which checks and fixes every object of an x86 kernel.
    (Sign::Header("gelf.h"), "libelf-dev"),
    // Needed for root file systems, not for the kernel.
    (Sign::Program("mkfs.erofs"), "erofs-utils"),
];

/// Debian packages that builds need and this machine lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingTools {
    packages: Vec<&'static str>,
}

impl MissingTools {
    /// The names of the packages; never empty.
    #[must_use]
    pub fn packages(&self) -> &[&'static str] {
        &self.packages
    }

    /// The one command that installs them all.
    #[must_use]
    pub fn install_command(&self) -> String {
        format!(
            "sudo apt-get install -y --no-install-recommends {}",
            self.packages.join(" ")
        )
    }
}

/// Looks for missing packages in `PATH` and in the compiler's include directories.
pub(crate) fn missing() -> Option<MissingTools> {
    let programs: Vec<PathBuf> = std::env::split_paths(&command::search_path()).collect();
    let headers = [
        "/usr/include",
        "/usr/local/include",
        "/usr/include/x86_64-linux-gnu",
    ]
    .map(PathBuf::from);
    missing_from(&programs, &headers)
}

fn missing_from(programs: &[PathBuf], headers: &[PathBuf]) -> Option<MissingTools> {
    let has = |dirs: &[PathBuf], name: &str| dirs.iter().any(|dir| exists(&dir.join(name)));
    let mut packages = Vec::new();
    for (sign, package) in NEEDS {
        let there = match sign {
            Sign::Program(name) => has(programs, name),
            Sign::Header(name) => has(headers, name),
        };
        if !there && !packages.contains(package) {
            packages.push(*package);
        }
    }
    (!packages.is_empty()).then_some(MissingTools { packages })
}

fn exists(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The script does not install the packages of the list that every Debian system has.
    #[test]
    fn the_script_that_installs_packages_has_the_same_list() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.ci/packages");
        let script = std::fs::read_to_string(script).unwrap();
        let list = script
            .lines()
            .find_map(|line| line.strip_prefix("packages=\""));
        let list = list.unwrap().trim_end_matches('"');
        let mut installed: Vec<&str> = list.split(' ').chain(["apt", "dpkg", "tar"]).collect();
        let mut needed: Vec<&str> = NEEDS.iter().map(|(_, package)| *package).collect();
        for list in [&mut installed, &mut needed] {
            list.sort_unstable();
            list.dedup();
        }
        assert_eq!(installed, needed);
    }

    #[test]
    fn an_empty_machine_lacks_each_package_once() {
        let missing = missing_from(&[], &[]).unwrap();
        assert_eq!(
            missing.install_command(),
            "sudo apt-get install -y --no-install-recommends apt dpkg tar xz-utils patch make \
             gcc binutils flex bison bc libc6-dev libelf-dev erofs-utils"
        );
    }

    #[test]
    fn only_what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (sign, _) in NEEDS {
            let (Sign::Program(name) | Sign::Header(name)) = sign;
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let dirs = [dir.path().to_owned()];
        assert_eq!(missing_from(&dirs, &dirs), None);

        std::fs::remove_file(dir.path().join("bison")).unwrap();
        std::fs::remove_file(dir.path().join("gelf.h")).unwrap();
        let missing = missing_from(&dirs, &dirs).unwrap();
        assert_eq!(missing.packages(), ["bison", "libelf-dev"]);
    }
}
