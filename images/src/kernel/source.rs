//! The kernel's source: a Debian package, pinned by its hash and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice;

use super::KernelError;
use crate::cache::io_error;
use crate::command;
use crate::debian::{self, DebianError, Download};
use crate::lock::Package;
use crate::progress::{Progress, Stage};

/// The package name. It is that of one long-term series: our patches apply to its newer versions,
/// or fail to.
const PACKAGE: &str = "linux-source-6.12";
/// The suite of the package: Debian's security updates.
const SUITE: &str = "bookworm-security";
/// The version for which our patches were made. Another one is used only if the archive no longer
/// has this one.
pub(super) const PINNED: &str = "6.12.117-1~deb12u1";
const PATH: &str = "pool/updates/main/l/linux-6.12/linux-source-6.12_6.12.117-1%7edeb12u1_all.deb";
const SHA256: &str = "e849faf31ca3555757f3a8877cb01af92122f744f75d1f3102734651c4e14703";

/// A downloaded source package.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) version: String,
    pub(super) file: PathBuf,
}

/// Returns the pinned version from `dir`, downloaded if it is missing or damaged. If the archive
/// has dropped it, returns the newest version in the suite's signed index.
pub(super) fn fetch(
    dir: &Path,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Source, KernelError> {
    let download = Download {
        suite: SUITE,
        dir,
        scratch,
        stage: Stage::Fetch,
    };
    let pinned = Package {
        name: PACKAGE.to_owned(),
        version: PINNED.to_owned(),
        path: PATH.to_owned(),
        sha256: SHA256.to_owned(),
    };
    let get = |package: &Package| download.fetch(slice::from_ref(package), progress);
    let (package, files) = match get(&pinned) {
        Err(DebianError::Vanished { .. }) => {
            let index = scratch.join("index");
            fs::create_dir(&index).map_err(io_error("create", &index))?;
            let newest = debian::newest(PACKAGE, SUITE, &index, progress)?;
            tracing::warn!(
                pinned = PINNED,
                version = newest.version,
                "Debian's archive no longer has the pinned kernel source, taking the newest"
            );
            let files = get(&newest)?;
            (newest, files)
        }
        files => (pinned, files?),
    };
    let file = files.into_iter().next().ok_or(KernelError::Package {
        version: package.version.clone(),
        missing: "file after its download",
    })?;
    Ok(Source {
        version: package.version,
        file,
    })
}

/// Unpacks the source tree into `to`, which must not exist.
pub(super) fn unpack(package: &Source, scratch: &Path, to: &Path) -> Result<(), KernelError> {
    let deb = scratch.join("deb");
    command::run(
        command::tool("dpkg-deb")
            .arg("-x")
            .arg(&package.file)
            .arg(&deb),
        |_| {},
    )?;
    let tarball = deb.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
    if !tarball.is_file() {
        return Err(KernelError::Package {
            version: package.version.clone(),
            missing: "usr/src/linux-source-6.12.tar.xz",
        });
    }
    fs::create_dir(to).map_err(io_error("create", to))?;
    command::run(
        command::tool("tar")
            .arg("-xJf")
            .arg(&tarball)
            .arg("-C")
            .arg(to)
            .args(["--strip-components=1", "--no-same-owner"]),
        |_| {},
    )?;
    fs::remove_dir_all(&deb).map_err(io_error("remove", &deb))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;
    use crate::command::CommandError;

    #[test]
    fn the_pin_is_one_version() {
        assert!(PATH.contains(&PINNED.replace('~', "%7e")));
        assert!(PATH.contains(PACKAGE));
        assert_eq!(SHA256.len(), 64);
        assert!(SHA256.bytes().all(|digit| digit.is_ascii_hexdigit()));
    }

    /// The fallback of builds for the time when the archive drops the pinned version.
    #[test]
    #[ignore = "long: needs the network"]
    fn debian_s_signed_index_names_a_version_of_the_series() {
        let dir = tempfile::tempdir().unwrap();
        let package = match debian::newest(PACKAGE, SUITE, dir.path(), &Silent) {
            Ok(package) => package,
            Err(DebianError::NoKeys | DebianError::NoMirror) => {
                return not_measured("no keys or mirrors of Debian's");
            }
            Err(DebianError::Resolve(error @ CommandError::Failed { .. })) => {
                return not_measured(&error.to_string());
            }
            Err(error) => panic!("{error:?}"),
        };
        assert!(package.version.starts_with("6.12."), "{package:?}");
        assert_eq!(package.sha256.len(), 64);
        if package.version == PINNED {
            assert_eq!(
                (package.path.as_str(), package.sha256.as_str()),
                (PATH, SHA256)
            );
        }
    }

    fn not_measured(reason: &str) {
        use std::io::Write;
        let line = format!("\nNOT MEASURED: {}\n", reason.replace('\n', " "));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
