//! Finds out which packages a recipe needs. apt resolves them with a state and a source of its own,
//! so that the packages and sources of this machine have no influence.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{DebianError, mirror};
use crate::cache::io_error;
use crate::command;
use crate::lock::Package;
use crate::progress::{Progress, Stage, stage};

/// The keys of Debian's archive.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Packages that only serve to install others, which is not done here.
const INSTALLERS: [&str; 3] = ["debconf", "dpkg", "usrmerge"];
const ARCHITECTURE: &str = "amd64";

/// Resolves `packages` and all their dependencies, except `leave_out` and packages that only these
/// depend on. Fetches the archive's index (10 MB), whose signature apt checks. `scratch` is an
/// empty directory.
pub(crate) fn resolve(
    packages: &[String],
    leave_out: &[String],
    suite: &str,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Vec<Package>, DebianError> {
    stage(progress, Stage::Resolve, || {
        let index = Index::fetch(suite, leave_out, scratch)?;
        let install = [
            "install",
            "--print-uris",
            "--yes",
            "--no-install-recommends",
            "--",
        ];
        index.plan(&install, packages)
    })
}

/// Returns the newest version of one package in the suite's index. Fetches the index, whose
/// signature apt checks. `scratch` is an empty directory.
pub(crate) fn newest(
    package: &str,
    suite: &str,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Package, DebianError> {
    let packages = stage(progress, Stage::Resolve, || {
        let index = Index::fetch(suite, &[], scratch)?;
        index.plan(&["download", "--print-uris", "--"], &[package.to_owned()])
    })?;
    let found = packages.into_iter().find(|found| found.name == package);
    found.ok_or_else(|| DebianError::Answer(package.to_owned()))
}

/// The index of one suite, for an apt with a state, a source and settings of its own.
struct Index<'a> {
    mirror: String,
    scratch: &'a Path,
}

impl<'a> Index<'a> {
    fn fetch(suite: &str, leave_out: &[String], scratch: &'a Path) -> Result<Self, DebianError> {
        if !Path::new(KEYRING).exists() {
            return Err(DebianError::NoKeys);
        }
        let mirrors = mirror::mirrors(suite)?;
        let mirror = mirrors.into_iter().next().ok_or(DebianError::NoMirror)?;
        prepare(scratch, &mirror, suite, leave_out)?;
        let index = Self { mirror, scratch };
        command::run(index.apt().arg("update"), |_| {}).map_err(DebianError::Resolve)?;
        Ok(index)
    }

    fn apt(&self) -> Command {
        let mut apt = command::fetcher("apt-get");
        apt.arg("-q").arg("-c").arg(self.scratch.join("apt.conf"));
        apt
    }

    /// Returns the packages that apt would fetch.
    fn plan(&self, words: &[&str], packages: &[String]) -> Result<Vec<Package>, DebianError> {
        let mut apt = self.apt();
        let plan = command::output(apt.args(words).args(packages));
        read_plan(&plan.map_err(DebianError::Resolve)?, &self.mirror)
    }
}

/// Writes apt's configuration, its source, and a dpkg status in which only the installers and the
/// packages of `leave_out` are installed.
fn prepare(
    scratch: &Path,
    mirror: &str,
    suite: &str,
    leave_out: &[String],
) -> Result<(), DebianError> {
    let at = |name: &str| scratch.join(name);
    for dir in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(at(dir)).map_err(io_error("create", at(dir)))?;
    }
    let write =
        |name: &str, text: String| fs::write(at(name), text).map_err(io_error("write", at(name)));
    write(
        "source.list",
        format!("deb [arch={ARCHITECTURE} signed-by={KEYRING}] {mirror} {suite} main\n"),
    )?;
    let installers = INSTALLERS.iter().copied();
    let installed = installers.chain(leave_out.iter().map(String::as_str)).map(|name| {
        format!(
            "Package: {name}\nStatus: install ok installed\nArchitecture: {ARCHITECTURE}\nMulti-Arch: foreign\n\
             Version: 9999\nMaintainer: none\nDescription: none\n\n"
        )
    });
    write("status", installed.collect())?;
    let here = scratch.display();
    write(
        "apt.conf",
        format!(
            r#"Dir::Etc::sourcelist "{here}/source.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{here}/state";
Dir::State::status "{here}/status";
Dir::Cache "{here}/cache";
APT::Architecture "{ARCHITECTURE}";
#clear APT::Architectures;
APT::Architectures {{ "{ARCHITECTURE}"; }};
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::CNF;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"#
        ),
    )?;
    Ok(())
}

/// Parses the output of `apt-get install --print-uris`: packages in the order of installation.
fn read_plan(plan: &str, mirror: &str) -> Result<Vec<Package>, DebianError> {
    let lines = plan.lines().filter(|line| line.starts_with('\''));
    let packages = lines
        .map(|line| read_line(line, mirror).ok_or_else(|| DebianError::Answer(line.to_owned())));
    let packages: Vec<Package> = packages.collect::<Result<_, _>>()?;
    if packages.is_empty() {
        return Err(DebianError::Answer(plan.to_owned()));
    }
    Ok(packages)
}

/// Parses a line `'MIRROR/PATH' NAME_VERSION_ARCHITECTURE.deb SIZE SHA256:HASH`.
fn read_line(line: &str, mirror: &str) -> Option<Package> {
    let mut words = line.split(' ');
    let uri = words.next()?.strip_prefix('\'')?.strip_suffix('\'')?;
    let path = uri.strip_prefix(mirror)?.trim_start_matches('/');
    let mut parts = words.next()?.split('_');
    let (name, version) = (parts.next()?, parts.next()?);
    let sha256 = words.nth(1)?.strip_prefix("SHA256:")?;
    Some(Package {
        name: name.to_owned(),
        // The colon is the one character that apt escapes in file names.
        version: version.replace("%3a", ":"),
        path: path.to_owned(),
        sha256: sha256.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read() {
        let hash = "d7".repeat(32);
        let plan = format!(
            "Reading package lists...\n\
             'http://m.example/debian/pool/main/z/zlib/zlib1g_1.2.13.dfsg-1_amd64.deb' \
             zlib1g_1%3a1.2.13.dfsg-1_amd64.deb 86684 SHA256:{hash}\n"
        );
        let packages = read_plan(&plan, "http://m.example/debian").unwrap();
        let wanted = Package {
            name: "zlib1g".to_owned(),
            version: "1:1.2.13.dfsg-1".to_owned(),
            path: "pool/main/z/zlib/zlib1g_1.2.13.dfsg-1_amd64.deb".to_owned(),
            sha256: hash,
        };
        assert_eq!(packages, [wanted]);
        // Another mirror, no hash, or an empty plan.
        for wrong in [
            plan.replace("m.example", "n.example"),
            plan.replace("SHA256", "MD5Sum"),
            String::new(),
        ] {
            let read = read_plan(&wrong, "http://m.example/debian");
            assert!(matches!(read, Err(DebianError::Answer(_))), "{read:?}");
        }
    }
}
